"""What a client sends before its tunnel stands, exactly as much as is asked for, and how to part from it afterwards.

Knows no SOCKS, but opens the envelope of RFC 1961. Nothing that was read is ever lost: `rest` gives the tunnel what
came behind the request. Blocking; used by the thread that serves the client.
"""
from __future__ import annotations

import io
import socket
from time import monotonic
from typing import Any, Optional, Type

from ..protocol.envelope import Envelope

from ..access.passwords import Wait
from ..net.poller import new_poll

ANSWER_S = 0.5              # before a handshake's deadline, to answer a login that has waited until then
NO_TIMEOUT_S = 60.0         # for a login to wait where the handshake may take any time
READ_BYTES = 4096           # a greeting, a login and a request together are at most 1,034
LINGER_S = 1.0              # how long we read away what still comes after a refusal,
LINGER_BYTES = 1 << 16      # and how much of it


class Inbox(io.BufferedIOBase):
    """The handler's rfile: a buffered reader whose buffer can be taken over by the tunnel.

    A reader of io's own would do; but nothing says how much it has read ahead without reading on.
    """

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.held = b""
        self.envelope: Optional[Envelope] = None

    def protect(self, envelope: Envelope) -> None:
        """All that the client sends from now on is encapsulated."""
        self.envelope = envelope
        self.feed(self.rest())

    def feed(self, data: bytes) -> None:
        """Put bytes in hand that were read from the socket elsewhere. Raises ProtocolError."""
        self.held += self.envelope.open(data) if self.envelope else data

    def _receive(self) -> bytes:
        """What comes next; b"" at the end. Raises ProtocolError for what is not encapsulated, but should be."""
        while True:
            data = self.sock.recv(READ_BYTES)
            if not data or not self.envelope:
                return data
            data = self.envelope.open(data)
            if data:
                return data

    def readable(self) -> bool:
        return True

    def read_exactly(self, size: int) -> bytes:
        """Exactly `size` bytes. Raises EOFError when the client closes before."""
        held = self.held
        while len(held) < size:
            data = self._receive()       # one call a message, not one a field
            if not data:
                raise EOFError("client closed")
            held = self.held = held + data
        self.held = held[size:]
        return held[:size]

    def peek(self, size: int = 1) -> bytes:
        """What is in hand, or else what comes next, without taking it; b"" at the end."""
        if not self.held:
            self.held = self._receive()
        return self.held

    def read(self, size: Any = -1) -> bytes:
        """As io.BufferedIOBase: up to `size` bytes, fewer only at the end; all until the end for None or -1."""
        held = self.held
        while size is None or size < 0 or len(held) < size:
            data = self._receive()
            if not data:
                break
            held += data
        end = len(held) if size is None or size < 0 else size
        self.held = held[end:]
        return held[:end]

    def read1(self, size: int = -1) -> bytes:
        """At most one recv()."""
        held = self.peek()
        end = len(held) if size < 0 else size
        self.held = held[end:]
        return held[:end]

    def readinto(self, buffer: Any) -> int:
        data = self.read(len(buffer))
        buffer[:len(data)] = data
        return len(data)

    def rest(self) -> bytes:
        """Take what is in hand."""
        rest, self.held = self.held, b""
        return rest


class Outbox(io.BufferedIOBase):
    """The handler's wfile, as StreamRequestHandler has it: unbuffered, and write() sends all."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self.sock.sendall(data)
        with memoryview(data) as view:
            return view.nbytes


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


class ClosedOnError:
    """Closes a socket if the block raises. If it does not, the socket is the relay loop's."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Optional[Type[BaseException]], *_: object) -> None:
        if kind:
            self.sock.close()


class LoginWait(Wait):
    """The wait of a login: as long as the handshake has left, and watching for the client to leave."""

    def __init__(self, handler: Any) -> None:
        self.handler = handler
        session, handshake_s = handler.session, handler.server.config.handshake_timeout or NO_TIMEOUT_S
        left_s = session.started + session.extended_s + handshake_s - monotonic()
        super().__init__(left_s - min(ANSWER_S, handshake_s / 10))

    def pause(self, seconds: float) -> None:
        """Raises EOFError when the connection is reset or shut down. A FIN may be a half-close, and is waited for."""
        poll = new_poll()
        poll.register(self.handler.connection.fileno(), 0)      # a hang-up and an error are reported unasked
        if poll.poll(max(seconds, 0.0) * 1000):
            raise EOFError("client left while its login waited")

    def extend(self, seconds: float) -> None:
        self.handler.server.sessions.extend(self.handler.session, seconds)
