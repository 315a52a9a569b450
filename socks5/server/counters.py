"""How many sessions there are, in all server processes together: what caps that hold over all of them go by. And the
Meter, which the server tells what else may be counted."""
from __future__ import annotations

import mmap
from typing import Any, Hashable


class Counts:
    """How many sessions there are, in all and of an origin: this process's own, and what the others have."""

    def __init__(self, shared: Shared, row: int) -> None:
        self._shared = shared
        self._at = row * Shared.ROW

    def number(self) -> int:
        """For one more session: one that no other has, in any process, nor had in one that has ended. From 1."""
        given = self._shared.table[self._at + Shared.GIVEN]
        self._shared.table[self._at + Shared.GIVEN] = (given + 1) % (1 << 32)
        return 1 + self._at // Shared.ROW + given * self._shared.rows

    def add(self, origin: Hashable, change: int) -> None:
        table, place = self._shared.table, self._at + self._place(origin)
        table[self._at + Shared.LIVE] += change
        table[place] += change

    def live(self) -> int:
        return self._sum(Shared.LIVE)

    def of(self, origin: Hashable) -> int:
        return self._sum(self._place(origin))

    def clear(self) -> int:
        """The process has died: how many sessions it had."""
        lost = int(self._shared.table[self._at + Shared.LIVE])
        for place in (Shared.LIVE, *range(Shared.GIVEN + 1, Shared.ROW)):
            self._shared.table[self._at + place] = 0
        return lost

    def _sum(self, place: int) -> int:
        return sum(self._shared.table[place::Shared.ROW])

    @staticmethod
    def _place(origin: Hashable) -> int:
        """Two origins may meet in one place, by chance but not on purpose: Python's hash of an address is keyed."""
        return 2 + hash(origin) % Shared.ORIGINS


class Shared:
    """Counters in memory that forked processes share. Each writes to its own row, and reads the sum of all."""

    LIVE, GIVEN = 0, 1              # how many sessions, how many numbers: a row begins with these
    ORIGINS = 16384
    ROW = 2 + ORIGINS

    def __init__(self, rows: int) -> None:
        self.rows = rows
        self.table = memoryview(mmap.mmap(-1, 4 * rows * self.ROW)).cast("I")

    def row(self, which: int) -> Counts:
        return Counts(self, which)

    def given(self) -> int:
        """How many sessions have been admitted, in all processes."""
        return sum(self.table[self.GIVEN::self.ROW])


class Meter:
    """Is told what happens in a server process. This one counts nothing; that of status/ does. Called by the thread in
    which it happens, so no method may wait."""

    def begin(self, session: Any) -> None:
        """A Session was admitted."""

    def replied(self, session: Any) -> None:
        """A reply to its request was sent; session.rep has its REP."""

    def udp(self, session: Any, association: Any) -> None:
        """What an Association has done until now."""

    def ended(self, session: Any) -> None:
        """It is over, and its facts are final."""

    def login(self, verdict: str) -> None:
        """A password was tried: "right", "wrong" or "deferred"."""

    def refused(self, reason: str) -> None:
        """A connection was closed before its client was heard."""

    def accept_failed(self, errno: str) -> None:
        """accept() failed for want of descriptors or memory."""
