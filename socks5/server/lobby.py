"""Where connections wait that have not said anything yet: they cost a descriptor, and no thread.

Without it, two thousand silent clients are two thousand threads to start, and whoever comes next waits for that. Linux
only: elsewhere nobody can tell at accept who is silent and who merely has not got round to it (TCP_DEFER_ACCEPT).
"""
from __future__ import annotations

import logging
import socket
from typing import TYPE_CHECKING, Any, Dict, Tuple

from .sessions import Session
from ..net.poller import READ, new_epoll

if TYPE_CHECKING:
    from .server import Server

log = logging.getLogger(__name__)

MOST = 64                   # that are looked at in one turn
LEFT, SAID, SILENT = "left", "said", "silent"


class Lobby:
    """Any thread may let them in, and shut them down; the one that serves lets them out."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self._epoll = new_epoll()
        self._there: Dict[int, Tuple[socket.socket, Any]] = {}

    def fileno(self) -> int:
        """Readable as soon as somebody is to be let out."""
        return self._epoll.fileno()

    def enter(self, request: socket.socket, client_address: Any) -> bool:
        """False for whoever need not wait here."""
        if state_of(request) != SILENT:
            return False
        fd = request.fileno()
        self._there[fd] = request, client_address           # before it can be let out
        try:
            self._epoll.register(fd, READ)
        except (OSError, ValueError):                       # the system has no more to give; or we are closed,
            return not self._there.pop(fd, None)            # and close() has ended this one with the others
        return True

    def let_out(self) -> None:
        """Have those served who have said something, close those who left or were shut down."""
        for fd, _events in self._epoll.poll(0, MOST):
            self._epoll.unregister(fd)
            request, client_address = self._there.pop(fd)
            try:
                if state_of(request) == SAID:
                    self.server.process_request(request, client_address)
                else:
                    self.end(request, "client", "client closed")
            except (RuntimeError, MemoryError) as exc:
                self.server.refuse(client_address, "no thread", "no thread: %s" % exc)
                self.end(request, "server", str(exc))
            except Exception:                               # in an overridden hook: as socketserver does
                self.server.handle_error(request, client_address)
                self.server.shutdown_request(request)

    def end(self, request: socket.socket, by: str, why: str = "") -> None:
        """Without a handler, and with the line in the log that it would have written."""
        session = self.server.sessions[request]
        if not session.ended_by:                            # or it was shut down, and that is why
            session.ended_by, session.why = by, why
        log.info(Session.LINE, session.facts())
        self.server.shutdown_request(request)

    def close(self) -> None:
        """End them all, for good."""
        while self._there:
            self.end(self._there.popitem()[1][0], "server stopped")
        self._epoll.close()


def state_of(request: socket.socket) -> str:
    try:
        return SAID if request.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) else LEFT
    except BlockingIOError:
        return SILENT
    except OSError:                                         # reset
        return LEFT
