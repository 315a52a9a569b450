"""What a client sends before its tunnel stands, exactly as much as is asked for, and how to part from it afterwards.

Knows no SOCKS, but opens the envelope of RFC 1961. Nothing that was read is ever lost: `rest` gives the tunnel what
came behind the request. Blocking; used by the thread that serves the client.
"""
from __future__ import annotations

import io
import socket
from functools import partial
from time import monotonic
from typing import Any, List, Optional, Tuple, Type

from ..protocol.envelope import Envelope

from ..access.passwords import Wait
from ..net.poller import new_poll
from ..protocol.errors import SocksError
from ..protocol.messages import HEADER_BYTES, Login, ProtectionLevel, SecurityToken, whole
from ..protocol.trace import M, Story
from ..relay.pipe import SMALL_BYTES

ANSWER_S = 0.5              # before a handshake's deadline, to answer a login that has waited until then
NO_TIMEOUT_S = 60.0         # for a login to wait where the handshake may take any time
MESSAGE_BYTES = SMALL_BYTES         # a greeting or a request is at most 262
READ_BYTES = 4096           # where more than a message is expected
SECRET = {Login, SecurityToken, ProtectionLevel}        # neither a Record nor whole() keeps all of these
LINGER_S = 1.0              # how long we read away what still comes after a refusal,
LINGER_BYTES = 1 << 16      # and how much of it

# The messages of one handshake as they went over the wire: when, the message's type, its bytes, and whether the client
# sent it. Kept only where a status page may ask for them, and nothing is formatted before. A Login ends after its UNAME
# and a message of RFC 1961 before its TOKEN: neither secrets nor 64 KiB are kept.
Record = List[Tuple[float, Type[Any], bytes, bool]]


class Inbox:
    """What the client has sent: a buffer that the tunnel can take over.

    A reader of io's own would do; but nothing says how much it has read ahead without reading on. `record` and `story`
    are told of every message, if there are any.
    """

    __slots__ = ("sock", "record", "story", "held", "heard", "envelope")

    def __init__(self, sock: socket.socket, record: Optional[Record] = None, story: Optional[Story] = None) -> None:
        self.sock = sock
        self.record = record
        self.story = story
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

    def _receive(self, size: int = MESSAGE_BYTES) -> bytes:
        """What comes next; b"" at the end. Raises ProtocolError for what is not encapsulated, but should be."""
        data = self.sock.recv(size)
        while self.envelope and data:
            data = self.envelope.open(data)
            if data:
                break
            data = self.sock.recv(size)             # that was a part of a message
        if self.heard is not None:
            self.heard += data
        return data

    def read_exactly(self, size: int) -> bytes:
        """Exactly `size` bytes. Raises EOFError when the client closes before."""
        held = self.held
        while len(held) < size:
            data = self._receive(max(MESSAGE_BYTES, size - len(held)))      # one call a message, not one a field
            if not data:
                raise EOFError("client closed")
            held = self.held = held + data
        self.held = held[size:]
        return held[:size]

    def take(self, kind: Type[M]) -> M:
        """The next message. Nearly always it is all that has come, and has come before."""
        if not self.held:
            self.held = self._receive()
        if self.story is None and kind not in SECRET:
            try:
                message: M = whole(kind, self.held)
                if self.record is not None:
                    self.record.append((monotonic(), kind, self.held, True))
                self.held = b""
                return message
            except (EOFError, SocksError):          # it is in pieces, or more has come behind it; or it is a bad one
                pass
        return self._parse(kind)

    def _parse(self, kind: Type[M]) -> M:
        """The next message, field by field. What was read is recorded, also where that was no message."""
        parse = partial(self.story.take, kind) if self.story else kind.parse
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

    def sent(self, kind: Type[Any], raw: bytes, why: str) -> None:
        """Tell the record and the story of a message of ours; `why` is the reason of a refusal."""
        if self.story:
            self.story.sent(kind, raw, why)
        if self.record is not None:
            self.record.append((monotonic(), kind, raw[:HEADER_BYTES] if kind in SECRET else raw, False))

    def peek(self) -> bytes:
        """What is in hand, or else what comes next, without taking it; b"" at the end."""
        if not self.held:
            self.held = self._receive()
        return self.held

    def read(self, size: Optional[int]) -> bytes:
        """Up to `size` bytes, fewer only at the end; all until the end for None or a negative size."""
        held = self.held
        while size is None or size < 0 or len(held) < size:
            data = self._receive(READ_BYTES)
            if not data:
                break
            held += data
        end = len(held) if size is None or size < 0 else size
        self.held = held[end:]
        return held[:end]

    def rest(self) -> bytes:
        """Take what is in hand."""
        rest, self.held = self.held, b""
        return rest


class InboxFile(io.BufferedIOBase):
    """The handler's rfile: an Inbox as a file. Made when it is asked for: such an object costs more than a greeting."""

    def __init__(self, inbox: Inbox) -> None:
        self.inbox = inbox

    def readable(self) -> bool:
        return True

    def peek(self, size: int = 1) -> bytes:
        return self.inbox.peek()

    def read(self, size: Any = -1) -> bytes:
        """As io.BufferedIOBase: up to `size` bytes, fewer only at the end; all until the end for None or -1."""
        return self.inbox.read(size)

    def read1(self, size: int = -1) -> bytes:
        """At most one recv()."""
        held = len(self.inbox.peek())
        return self.inbox.read(held if size < 0 else min(size, held))

    def readinto(self, buffer: Any) -> int:
        data = self.read(len(buffer))
        buffer[:len(data)] = data
        return len(data)


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
