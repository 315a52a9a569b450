"""The main loop of the program: it does what signals ask for. The same for one server process and for several.

Runs in the main thread, which does nothing else.
"""
from __future__ import annotations

import gc
import logging
from time import monotonic
from typing import Callable, Iterable, List, Optional, Set

from ..config import Config, ConfigError
from ..protocol.memory import persist
from .companion import Companion
from .files import Access, Exhausted, Files, fresh_access
from .orders import Order
from .signals import Signals
from .systemd import Notifier

log = logging.getLogger(__name__)

NEVER = float("inf")
RELOAD_EVERY_S = 1.0            # at most so often; and a reload that failed for want of resources is tried again
OVERDUE_S = 5.0                 # beyond the drain timeout: then what has not stopped is killed
ABORT_S = 2.0                   # the same after a second signal
GC_OBJECTS = 10000              # new ones, after which the garbage collector looks for cycles, which are few here


class Control:
    """Runs until a stop has been asked for and everything has ended.

    To be overridden: running(), tell(), kill(), live(), and where there is something to do: work(), due(), unsent().
    """

    def __init__(self, config: Config, access: Access, notifier: Optional[Notifier] = None,
                 companion: Optional[Companion] = None, read_config: Optional[Callable[[], Config]] = None) -> None:
        """`read_config` reads the options again."""
        self.config = config
        self.notifier = notifier or Notifier()
        self.access = access                    # in force, whatever is in the files by now
        self.companion = companion or Companion()
        self.signals = Signals()
        self.files = Files(config, lambda config: fresh_access(read_config or (lambda: config), self.access))
        self.stops = 0                          # how often it was asked for
        self.status = 0                         # the program's exit status
        self._reload_at = NEVER
        self._read_at = -NEVER                  # when the files were read last
        self._kill_at = NEVER
        self._delayed = False                   # a reload is tried again, which has been said
        self.remarks: Callable[[Access], Iterable[str]] = lambda access: ()     # warnings that follow a reload
        self._alive_at = 0.0 if self.notifier.watchdog_s else NEVER

    def run(self, ready: Callable[[], None] = lambda: None) -> int:
        """Calls ready() as soon as signals will be obeyed. Returns the exit status."""
        gc.collect()
        gc.freeze()                     # what is here stays: no collection looks at it, nor copies it in a worker
        gc.set_threshold(GC_OBJECTS)
        with self.signals:
            ready()
            self.notifier.ready("serving")
            persist(self.serve)
            self.companion.close()
        self.close()
        return self.status

    def serve(self) -> None:
        """Until all servers have ended."""
        while self.running():
            self.turn()

    def turn(self) -> None:
        """Wait for what is due next, and do it."""
        due = min([self._reload_at, self._kill_at, self._alive_at, self.companion.due(), *self.due()])
        orders = self.signals.wait(due - monotonic(), self.unsent())
        self.end(orders)
        self.work()
        self.obey(orders)
        self.companion.work()
        if monotonic() >= self._alive_at:
            self._alive_at = monotonic() + self.notifier.watchdog_s
            self.prove_alive()

    def close(self) -> None:
        self.signals.close()
        self.files.close()
        self.notifier.close()

    # ---- what subclasses say --------------------------------------------------------------------------------------

    def running(self) -> bool:
        """Whether to go on."""
        raise NotImplementedError

    def tell(self, order: Order) -> None:
        """Have the servers do it. RELOAD puts self.access in force: everywhere, or, with a MemoryError, nowhere."""
        raise NotImplementedError

    def kill(self) -> None:
        """End what has not stopped in time."""
        raise NotImplementedError

    def live(self) -> int:
        """How many sessions there are."""
        return 0

    def work(self) -> None:
        """Do what is due. Called after each wait."""

    def due(self) -> List[float]:
        """When, by time.monotonic(), work() is to be called at the latest."""
        return []

    def unsent(self) -> Iterable[int]:
        """Descriptors to which work() wants to write."""
        return ()

    def prove_alive(self) -> None:
        """Have the watchdog told, if the servers are well."""
        self.notifier.alive()

    # ---- signals --------------------------------------------------------------------------------------------------

    def end(self, orders: Set[Order]) -> None:
        """Stop and drain when it is asked for, at once when it is asked for again. Goes before all else: it must not
        wait for a reload."""
        if Order.STOP in orders:
            self.stops += 1
            if self.stops == 1:
                self._kill_at = monotonic() + self.config.drain_timeout + OVERDUE_S
                self.notifier.stopping(self.config.drain_timeout + 2 * OVERDUE_S)       # with time to kill and be gone
                live = self.live()
                if live and self.config.drain_timeout:
                    log.info("stopping: up to %g s for %d session%s to end; a second Ctrl-C (SIGINT) or SIGTERM resets "
                             "them", self.config.drain_timeout, live, "" if live == 1 else "s")
                self.tell(Order.STOP)
            else:
                self._kill_at = min(self._kill_at, monotonic() + ABORT_S)
                self.tell(Order.ABORT)
        if monotonic() >= self._kill_at:
            self._kill_at = NEVER
            self.kill()

    def obey(self, orders: Set[Order]) -> None:
        """Do what else is asked for."""
        if Order.RELOAD in orders:
            self._reload_at = min(self._reload_at, self._read_at + RELOAD_EVERY_S)
        if monotonic() >= self._reload_at:
            self.reload()
        if Order.SESSIONS in orders:
            self.tell(Order.SESSIONS)

    def reload(self) -> None:
        """Read the files and put them in force. A bad file changes nothing; want of resources only delays it."""
        self._reload_at, self._read_at = NEVER, monotonic()
        before, said, self._delayed = self.access, self._delayed, False
        self.notifier.reloading()
        outcome = "serving"
        try:
            self.access = self.files.read()
            self.tell(Order.RELOAD)
            for remark in self.remarks(self.access):
                log.warning("%s", remark)
        except (Exhausted, MemoryError) as exc:
            self.access, self._delayed = before, True
            self._reload_at = monotonic() + RELOAD_EVERY_S
            outcome = "serving; not reloaded yet: %s" % exc
            if not said:                        # once is enough
                log.error("not reloaded yet, tried again every second: %s", exc)
        except (ConfigError, OSError) as exc:
            outcome = "serving; not reloaded: %s" % exc
            log.error("not reloaded, users and rules stay as they were: %s", exc)
        finally:
            self.notifier.ready(outcome)
