"""The encapsulation of a connection whose security context protects its messages: plain bytes to messages and back.

Everything behind the GSSAPI sub-negotiation travels in messages VER=X'01', MTYP=X'03', LEN, TOKEN (Encapsulated in
messages.py): requests and replies, the bytes of a tunnel, each datagram. The tokens are the mechanism's, by
access/gssapi.py. No socket, no thread: the owner reads and writes, one thread at a time. RFC 1961 section 5.
"""
from __future__ import annotations

import struct
from typing import Iterator, Protocol

from .codes import Mtyp
from .errors import ProtocolError
from .messages import GSSAPI_VER, Encapsulated

HEADER = struct.Struct("!BBH")              # VER, MTYP, LEN
PAYLOAD_BYTES = 60000                       # of one message: room for any mechanism's overhead in 65,535


class Wrapping(Protocol):
    """What an Envelope needs of a security context."""

    def wrap(self, data: bytes) -> bytes:
        """A token. Raises ProtocolError."""

    def unwrap(self, token: bytes, ordered: bool = True) -> bytes:
        """What is in it. `ordered`: a token that was lost, repeated or moved is an error, too. Raises ProtocolError."""


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
            next_at = token_at + self._length(data, at)
            if next_at > end:
                break
            yield self.context.unwrap(data[token_at:next_at])
            at = next_at
        self._begun = data[at:]

    def open_one(self, datagram: bytes) -> bytes:
        """The payload of a datagram: one whole message. It may come in any order, but only once."""
        if len(datagram) < HEADER.size or HEADER.size + self._length(datagram, 0) != len(datagram):
            raise ProtocolError("not one encapsulated message")
        return self.context.unwrap(datagram[HEADER.size:], ordered=False)

    @property
    def unfinished(self) -> int:
        """The bytes of a message that has begun and is not whole: if there are any, an EOF cuts the stream off."""
        return len(self._begun)

    @staticmethod
    def _length(data: bytes, at: int) -> int:
        ver, mtyp, length = HEADER.unpack_from(data, at)
        if ver != GSSAPI_VER or mtyp != Mtyp.ENCAPSULATED:
            raise ProtocolError("VER 0x%02x and MTYP 0x%02x, expected 0x01 and 0x03: not encapsulated" % (ver, mtyp))
        return int(length)
