"""What a client sends before its tunnel stands, exactly as much as is asked for, and how to part from it afterwards.

Knows no SOCKS, but opens the envelope of RFC 1961. Nothing that was read is ever lost: `rest` gives the tunnel what
came behind the request. Blocking; used by the thread that serves the client.
"""
from __future__ import annotations

import io
import socket
from time import monotonic
from typing import Any, Callable, List, Optional, Tuple, Type

from ..protocol.envelope import Envelope

from ..access.passwords import Wait
from ..net.poller import new_poll
from ..protocol.errors import SocksError
from ..protocol.messages import HEADER_BYTES, MOST_BYTES, Login, ProtectionLevel, SecurityToken, whole
from ..protocol.trace import M, Sent

ANSWER_S = 0.5              # before a handshake's deadline, to answer a login that has waited until then
NO_TIMEOUT_S = 60.0         # for a login to wait where the handshake may take any time
READ_BYTES = 4096           # a greeting, a login and a request together are at most 1,034
SECRET = {Login, SecurityToken, ProtectionLevel}        # neither a Record nor whole() keeps all of these
LINGER_S = 1.0              # how long we read away what still comes after a refusal,
LINGER_BYTES = 1 << 16      # and how much of it

# The messages of one handshake as they went over the wire: when, the message's type, its bytes or the message itself,
# and whether the client sent it. Kept only where a status page may ask for them, and nothing is formatted before. A
# Login ends after its UNAME and a message of RFC 1961 before its TOKEN: neither secrets nor 64 KiB are kept.
Record = List[Tuple[float, Type[Any], Any, bool]]


class Inbox(io.BufferedIOBase):
    """The handler's rfile: a buffered reader whose buffer can be taken over by the tunnel.

    A reader of io's own would do; but nothing says how much it has read ahead without reading on.
    """

    def __init__(self, sock: socket.socket, record: Optional[Record] = None) -> None:
        self.sock = sock
        self.record = record
        self.held = b""
        self.heard: Optional[bytes] = None          # while a message is recorded: all that came; `held` is its end
        self.envelope: Optional[Envelope] = None

    def protect(self, envelope: Envelope) -> None:
        """All that the client sends from now on is encapsulated."""
        self.envelope = envelope
        self.feed(self.rest())

    def feed(self, data: bytes) -> None:
        """Put bytes in hand that were read from the socket elsewhere. Raises ProtocolError."""
        data = self.envelope.open(data) if self.envelope else data
        self.held += data
        if self.heard is not None:
            self.heard += data

    def _receive(self) -> bytes:
        """What comes next; b"" at the end. Raises ProtocolError for what is not encapsulated, but should be."""
        while True:
            data = self.sock.recv(READ_BYTES)
            if data and self.envelope:
                data = self.envelope.open(data)
                if not data:
                    continue                        # a part of a message
            if self.heard is not None:
                self.heard += data
            return data

    def readable(self) -> bool:
        return True

    def read_exactly(self, size: int) -> bytes:
        """Exactly `size` bytes. Raises EOFError when the client closes before."""
        held = self.held
        while len(held) < size:
            data = self._receive()                  # one call a message, not one a field
            if not data:
                raise EOFError("client closed")
            held = self.held = held + data
        self.held = held[size:]
        return held[:size]

    def take(self, kind: Type[M]) -> M:
        """The next message. Nearly always it is all that has come, and has come before."""
        if kind not in SECRET and len(self.held or self.peek()) <= MOST_BYTES:
            try:
                message: M = whole(kind, self.held)
                if self.record is not None:
                    self.record.append((monotonic(), kind, self.held, True))
                self.held = b""
                return message
            except (EOFError, SocksError):          # it is in pieces, or more has come behind it; or it is a bad one
                pass
        return self.parse(kind, kind.parse)

    def parse(self, kind: Type[M], parse: Callable[[Callable[[int], bytes]], M]) -> M:
        """The next message by parse(read_exactly). What it has read is recorded, also where that was no message."""
        if self.record is None:
            return parse(self.read_exactly)
        self.heard = self.held
        try:
            return parse(self.read_exactly)
        finally:
            raw, self.heard = self.heard, None
            if self.held:
                raw = raw[:len(raw) - len(self.held)]
            if kind in SECRET:
                raw = raw[:HEADER_BYTES if kind is not Login else 2 + raw[1] if len(raw) > 1 else 2]
            self.record.append((monotonic(), kind, raw, True))

    def sent(self, message: Sent) -> None:
        """Record a message of ours."""
        if self.record is not None:
            kind: Any = type(message)
            kept = message.pack()[:HEADER_BYTES] if kind in SECRET else message     # type: ignore[union-attr]
            self.record.append((monotonic(), kind, kept, False))

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
    """Closes a socket, or what has sockets, if the block raises. If it does not, they are the relay loop's."""

    def __init__(self, sock: Any) -> None:
        self.sock = sock

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Optional[Type[BaseException]], *_: object) -> None:
        if kind and self.sock is not None:
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
