"""What the relay loop waits for besides tunnels: a client that has not said anything yet, and other threads."""
from __future__ import annotations

import socket
from typing import Callable, Optional

from .pipe import DONTWAIT


class Watch:
    """A client that has not said anything yet: it costs a descriptor, and no thread."""

    __slots__ = ("sock", "fd", "spoke", "forget")

    def __init__(self, sock: socket.socket, spoke: Callable[[bool], None], forget: Callable[[int], None]) -> None:
        """forget(fd) unregisters it, then spoke(whether there is something to read) is called."""
        self.sock = sock
        self.fd = sock.fileno()
        self.spoke = spoke
        self.forget = forget

    def handle(self, _side: int, _events: int, _now: float) -> bool:
        said = peek(self.sock)
        if said is None:
            return False
        self.forget(self.fd)
        self.spoke(said)
        return False


def peek(sock: socket.socket) -> Optional[bool]:
    """Whether there is something to read (True), the peer has left (False), or neither is known yet (None)."""
    timeout = sock.gettimeout()
    try:
        if not DONTWAIT:
            sock.setblocking(False)
        return bool(sock.recv(1, socket.MSG_PEEK | DONTWAIT))
    except BlockingIOError:
        return None
    except OSError:                         # reset
        return False
    finally:
        if not DONTWAIT:
            sock.settimeout(timeout)


class Bell:
    """Wakes the loop: a socket pair, of which one end is registered."""

    def __init__(self) -> None:
        self._heard, self._rung = socket.socketpair()
        for sock in (self._heard, self._rung):
            sock.setblocking(False)
        self.fd = self._heard.fileno()

    def ring(self) -> None:
        try:
            self._rung.send(b"\0")
        except OSError:                     # so many are unread that the loop wakes up anyway; or it is over
            pass

    def handle(self, _side: int, _events: int, _now: float) -> bool:
        self._heard.recv(4096)
        return False

    def close(self) -> None:
        self._heard.close()
        self._rung.close()
