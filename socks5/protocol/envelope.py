"""The encapsulation of a connection whose security context protects its messages: plain bytes to messages and back.

Everything behind the GSSAPI sub-negotiation travels in messages VER=X'01', MTYP=X'03', LEN, TOKEN (Encapsulated in
messages.py): requests and replies, the bytes of a tunnel, each datagram. The tokens are the mechanism's, by
access/gssapi.py. A direction with much to move is coded in the memory into which it is received. No socket, no thread:
the owner reads and writes, one thread at a time. RFC 1961 section 5.
"""
from __future__ import annotations

import struct
from typing import Iterator, Optional, Protocol, Tuple, Union

from .codes import Mtyp
from .errors import ProtocolError
from .messages import GSSAPI_VER, Encapsulated

HEADER = struct.Struct("!BBH")              # VER, MTYP, LEN
PAYLOAD_BYTES = 60000                       # of one message: room for any mechanism's overhead in 65,535
OPENED_BYTES = 1 << 17                      # the longest message, and as much again
MARGIN_BYTES = 512                          # for a token in front of its payload, and behind: Kerberos takes 32 and 28
PLAIN_AT = HEADER.size + MARGIN_BYTES       # where what is to be sealed is received


class Memory(Protocol):
    """Memory in which a security context wraps and unwraps messages where they are."""

    view: memoryview

    def wrap(self, at: int, size: int) -> Tuple[int, int]:
        """Where the token is of the payload that begins at `at`; within MARGIN_BYTES. Raises ProtocolError."""

    def unwrap(self, at: int, size: int) -> Tuple[int, int]:
        """Where the payload is of the token that begins at `at`. Raises ProtocolError."""


class Wrapping(Protocol):
    """What an Envelope needs of a security context."""

    def wrap(self, data: bytes) -> bytes:
        """A token. Raises ProtocolError."""

    def unwrap(self, token: bytes, ordered: bool = True) -> bytes:
        """What is in it. `ordered`: a token that was lost, repeated or moved is an error, too. Raises ProtocolError."""

    def memory(self, size: int) -> Optional[Memory]:
        """None where it cannot work in place."""


class Envelope:
    """The two directions of one connection. Raises ProtocolError for what is no message, or no token of the context."""

    __slots__ = ("context", "_begun")

    def __init__(self, context: Wrapping) -> None:
        self.context = context
        self._begun = b""

    def seal(self, data: bytes) -> bytes:
        """As many messages as it takes."""
        if len(data) <= PAYLOAD_BYTES:
            return self.seal_one(data)
        return b"".join(self.seal_one(data[at:at + PAYLOAD_BYTES]) for at in range(0, len(data), PAYLOAD_BYTES))

    def seal_one(self, data: bytes) -> bytes:
        """One message: a datagram is never split. Raises OverflowError when it does not fit."""
        return Encapsulated(self.context.wrap(data)).pack()

    def open(self, data: bytes) -> bytes:
        """The payload of the messages that are whole with `data`; the beginning of the next one is kept."""
        pieces = list(self._opened(self._begun + data if self._begun else data))
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def _opened(self, data: bytes) -> Iterator[bytes]:
        at, end = 0, len(data)
        self._begun = b""
        while end - at >= HEADER.size:
            token_at = at + HEADER.size
            next_at = token_at + length_of(data, at)
            if next_at > end:
                break
            yield self.context.unwrap(data[token_at:next_at])
            at = next_at
        self._begun = data[at:]

    def open_one(self, datagram: bytes) -> bytes:
        """The payload of a datagram: one whole message. It may come in any order, but only once."""
        if len(datagram) < HEADER.size or HEADER.size + length_of(datagram, 0) != len(datagram):
            raise ProtocolError("not one encapsulated message")
        return self.context.unwrap(datagram[HEADER.size:], ordered=False)

    def sealing(self) -> Optional[Sealing]:
        """seal() without a copy, for one with much to seal; None where that is not possible."""
        memory = self.context.memory(PLAIN_AT + PAYLOAD_BYTES + MARGIN_BYTES)
        return Sealing(memory) if memory else None

    def opening(self) -> Optional[Opening]:
        """open() without a copy, to be used in its place until its close(); None where that is not possible."""
        memory = self.context.memory(OPENED_BYTES)
        return Opening(self, memory) if memory else None

    def swap_unfinished(self, begun: bytes = b"") -> bytes:
        """Take the beginning of a message that is kept, and keep this one."""
        before, self._begun = self._begun, begun
        return before

    @property
    def unfinished(self) -> int:
        """The bytes of a message that has begun and is not whole: if there are any, an EOF cuts the stream off."""
        return len(self._begun)


class Sealing:
    """Seals what was received into its room."""

    unfinished = 0

    def __init__(self, memory: Memory) -> None:
        self._memory = memory
        self._room = memory.view[PLAIN_AT:PLAIN_AT + PAYLOAD_BYTES]

    def room(self) -> memoryview:
        """Where to receive. What code() gave must have been sent before."""
        return self._room

    def code(self, size: int) -> memoryview:
        """The message with the first bytes of the room."""
        start, end = self._memory.wrap(PLAIN_AT, size)
        HEADER.pack_into(self._memory.view, start - HEADER.size, GSSAPI_VER, Mtyp.ENCAPSULATED, end - start)
        return self._memory.view[start - HEADER.size:end]

    def close(self) -> None:
        pass


class Opening:
    """Opens what was received into its room. Payloads are moved together where several messages are whole."""

    def __init__(self, envelope: Envelope, memory: Memory) -> None:
        self._envelope = envelope
        self._memory = memory
        begun = envelope.swap_unfinished()
        self._at, self._end = 0, len(begun)                 # of what is not opened
        memory.view[:len(begun)] = begun

    def room(self) -> memoryview:
        """Where to receive. What code() gave must have been sent before."""
        view, rest = self._memory.view, self.unfinished
        if self._at:
            view[:rest] = view[self._at:self._end]
            self._at, self._end = 0, rest
        return view[rest:]

    def code(self, size: int) -> memoryview:
        """The payload of the messages that are whole with the first bytes of the room."""
        self._end += size
        view, first, last = self._memory.view, self._at, self._at
        while self.unfinished >= HEADER.size:
            token_at, length = self._at + HEADER.size, length_of(view, self._at)
            if token_at + length > self._end:
                break
            start, end = self._memory.unwrap(token_at, length)
            self._at = token_at + length
            if first == last:
                first, last = start, end
            else:
                view[last:last + end - start] = view[start:end]
                last += end - start
        return view[first:last]

    @property
    def unfinished(self) -> int:
        return self._end - self._at

    def close(self) -> None:
        """The envelope goes on."""
        self._envelope.swap_unfinished(bytes(self._memory.view[self._at:self._end]))


def length_of(data: Union[bytes, memoryview], at: int) -> int:
    """The LEN of the message that begins there. Raises ProtocolError."""
    ver, mtyp, length = HEADER.unpack_from(data, at)
    if ver != GSSAPI_VER or mtyp != Mtyp.ENCAPSULATED:
        raise ProtocolError("VER 0x%02x and MTYP 0x%02x, expected 0x01 and 0x03: not encapsulated" % (ver, mtyp))
    return int(length)
