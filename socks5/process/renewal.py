"""A worker process that has carried a crowd makes way for a fresh one as soon as it is empty.

Python keeps much of the memory of a thousand sessions for the next ones: one small object that stays, a freed one that
is kept for reuse, holds a megabyte. A process that ends gives all of it back.
"""
from __future__ import annotations

import logging
import signal
from time import monotonic
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..server.server import Server

log = logging.getLogger(__name__)

CROWD = 500                 # sessions at once, which leave some 3 MiB behind
EMPTY_S = 1.0               # nobody came for so long: it is over


class Renewal:
    """Looks after one server, in a process of its own: to be made in the main thread, where signals are handled."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.leaving = False            # it accepts nobody any more, and has nobody
        self._busy_at = monotonic()
        signal.signal(signal.SIGURG, lambda _number, _frame: None)      # Spares.leave sends it

    def look(self) -> None:
        """To be called now and then by the thread that serves: end it when it has had a crowd, and has nobody."""
        if len(self.server.sessions):
            self._busy_at = monotonic()
        elif self.server.sessions.peak >= CROWD and monotonic() - self._busy_at >= EMPTY_S and self.server.leave():
            self.leaving = True
            self.server.stop()
