"""What a client sends before its tunnel stands, exactly as much as is asked for, and how to part from it afterwards.

Knows no SOCKS. Nothing that was read is ever lost: `rest` gives the tunnel what came behind the request.
"""
from __future__ import annotations

import socket
from time import monotonic

READ_BYTES = 4096           # a greeting, a login and a request together are at most 1,034
LINGER_S = 1.0              # how long we read away what still comes after a refusal,
LINGER_BYTES = 1 << 16      # and how much of it


class Inbox:
    """What the client sends, exactly as much as is asked for; the rest stays for the tunnel."""

    __slots__ = ("sock", "held")

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.held = b""

    def read(self, size: int) -> bytes:
        """Exactly `size` bytes. Raises EOFError when the client closes before."""
        held = self.held
        while len(held) < size:
            held = self.held = held + self._receive()
        self.held = held[size:]
        return held[:size]

    def first(self) -> int:
        """The next byte, which stays to be read."""
        self.held = self.held or self._receive()
        return self.held[0]

    def rest(self) -> bytes:
        piece, self.held = self.held, b""
        return piece

    def _receive(self) -> bytes:
        data = self.sock.recv(READ_BYTES)       # one call a message, not one a field
        if not data:
            raise EOFError("client closed")
        return data


def linger(sock: socket.socket) -> None:
    """Read away what still comes: closing on unread input sends RST, which can destroy the answer on its way."""
    deadline, left = monotonic() + LINGER_S, LINGER_BYTES
    try:
        sock.shutdown(socket.SHUT_WR)
        while left > 0 and deadline > monotonic():
            sock.settimeout(max(deadline - monotonic(), 0.001))
            received = len(sock.recv(READ_BYTES))
            if not received:
                break
            left -= received
    except OSError:                             # a time-out, or gone: nothing more to wait for
        pass
