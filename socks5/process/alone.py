"""One server in this process: --workers 1, and where there is no fork.

The main thread waits for signals, a thread of its own serves.
"""
from __future__ import annotations

import logging
import threading
from typing import Callable, List, Optional

from ..config import Config
from ..server.server import Server
from .companion import Companion
from .control import Control
from .files import Access
from .orders import Order
from .systemd import Notifier
from .worker import CannotStart, obey, serve

log = logging.getLogger(__name__)


class Alone(Control):
    """Serves in a thread until SIGTERM or SIGINT has ended it."""

    def __init__(self, server: Server, access: Access, notifier: Optional[Notifier] = None,
                 companion: Optional[Companion] = None, read_config: Optional[Callable[[], Config]] = None) -> None:
        super().__init__(server.config, access, notifier, companion, read_config)
        self.server = server
        server.relay_loop()                     # what serving takes is there before it is said to listen
        self._hurry = threading.Event()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._started = self._ended = False

    def running(self) -> bool:
        return not self._ended if self._started else not self.stops

    def due(self) -> List[float]:
        return [] if self._started else [0.0]

    def work(self) -> None:
        if not self._started and not self.stops:
            self._started = True
            self.companion.attend(self.server, 0)
            self.companion.start(self.access)
            self._thread.start()                # blocks the same signals as this one

    def tell(self, order: Order) -> None:
        self.companion.obey(order, self.access)
        obey(self.server, self._hurry, order, self.access)

    def prove_alive(self) -> None:
        """Send WATCHDOG=1 from the relay loop, asked to by the serving thread: a hang of either stops it."""
        self.server.soon(lambda: self.server.relay_loop().call_soon(self.notifier.alive))

    def live(self) -> int:
        return len(self.server.sessions)

    def kill(self) -> None:
        """The thread cannot be killed; it ends with the program."""
        self._ended = True
        log.error("the server did not stop in time")

    def close(self) -> None:
        if not self._started:                   # a signal was faster
            self.server.server_close()
        super().close()

    def _serve(self) -> None:
        try:
            serve(self.server, self._hurry)
        except CannotStart as exc:
            log.error("cannot start: %s", exc)
            self.status = 1
        except BaseException:
            log.exception("the server cannot go on")
            self.status = 1
        finally:
            self._ended = True
            self.signals.wake()
