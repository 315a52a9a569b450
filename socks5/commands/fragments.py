"""Reassemble a datagram that a client sends in fragments (FRAG, RFC 1928 section 7). Few clients do."""
from __future__ import annotations

from time import monotonic
from typing import List, Optional

from ..protocol.messages import Address, Datagram

REASSEMBLY_S = 5.0              # RFC 1928 §7: the REASSEMBLY TIMER is no less
LAST = 0x80                     # the bit of FRAG that ends a sequence
WHOLE_BYTES = 1 << 16           # more would not be one datagram


class Fragments:
    """The fragments of one datagram, as far as they have come.                                      RFC 1928 §7

    A fragment that is not the next one drops those before it.

    deadline    when what has come is to be dropped (monotonic); inf: nothing has come
    dropped     how many fragments were dropped
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
        """Take the next fragment; the whole datagram if this was its last one."""
        position, now = piece.frag & ~LAST, monotonic()
        if position != len(self.pieces) + 1 or piece.dst != self.dst or now >= self.deadline:
            self.drop()
            if position != 1:                   # the first one is missing, so the rest is of no use
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
