"""A datagram that comes in pieces: FRAG, RFC 1928 section 7. Few clients do it, but none should be misunderstood."""
from __future__ import annotations

from time import monotonic
from typing import List, Optional

from ..protocol.messages import Address, Datagram

REASSEMBLY_S = 5.0              # RFC 1928 §7: the REASSEMBLY TIMER is no less
LAST = 0x80                     # the bit of FRAG that ends a sequence
WHOLE_BYTES = 1 << 16           # more would not be one datagram


class Fragments:
    """The datagram that is on its way in pieces. A piece that does not continue it drops it.         RFC 1928 §7

    dropped     how many pieces were
    """

    def __init__(self) -> None:
        self.pieces: List[bytes] = []
        self.dst: Optional[Address] = None
        self.deadline = float("inf")
        self.dropped = 0

    def drop(self) -> None:
        self.dropped += len(self.pieces)
        self.pieces, self.dst, self.deadline = [], None, float("inf")

    def add(self, piece: Datagram) -> Optional[Datagram]:
        """The whole datagram, if this was its last piece."""
        position, now = piece.frag & ~LAST, monotonic()
        if position != len(self.pieces) + 1 or piece.dst != self.dst or now >= self.deadline:
            self.drop()
            if position != 1:                   # a piece is missing: nobody would know what the rest meant
                self.dropped += 1
                return None
            self.dst, self.deadline = piece.dst, now + REASSEMBLY_S
        self.pieces.append(piece.data)
        if sum(map(len, self.pieces)) > WHOLE_BYTES:
            self.drop()
        elif piece.frag & LAST:
            whole = Datagram(piece.dst, b"".join(self.pieces))
            self.pieces = []
            self.drop()
            return whole
        return None
