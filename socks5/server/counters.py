"""How many sessions and ports are in use, in all server processes together: the limits that hold over all go by it. And
the Meter, which the server tells what else may be counted."""
from __future__ import annotations

import mmap
from typing import Any, Hashable

from ..relay.bucket import Buckets


LIVE, GIVEN = 0, 1              # how many there are, how many numbers were given: a row begins with these
ORIGINS = 16384


class Counts:
    """How many there are of one thing, in all and of an origin. This process adds; the sums are those of all processes.

    `what` is one of Shared.THINGS. For each thing, a process adds to one Counts only, in one thread at a time.
    """

    def __init__(self, shared: Shared, row: int, what: str = "sessions") -> None:
        self._shared = shared
        self._row = row
        self._table = shared.tables[what]
        self._own = own = self._table[row * Shared.ROW:(row + 1) * Shared.ROW]
        self._live, self._given = own[LIVE], own[GIVEN]         # as in _own, where to read them takes longer

    def of_thing(self, what: str) -> Counts:
        """This process's counts of another thing."""
        return Counts(self._shared, self._row, what)

    @property
    def buckets(self) -> Buckets:
        """Of the rate limits."""
        return self._shared.buckets

    def enter(self, origin: Hashable, by_origin: bool) -> int:
        """Count one more session; for its origin only where a limit asks for that. Returns its number, from 1: no other
        session has it or had it, in any process."""
        given = self._given
        self._given = self._own[GIVEN] = (given + 1) % (1 << 32)
        if by_origin:
            self.add(origin, 1)
        else:
            self._live = self._own[LIVE] = self._live + 1
        return 1 + self._row + given * self._shared.rows

    def leave(self, origin: Hashable, by_origin: bool) -> None:
        """Count one session less."""
        if by_origin:
            self.add(origin, -1)
        else:
            self._live = self._own[LIVE] = self._live - 1

    def add(self, origin: Hashable, change: int) -> None:
        self._live = self._own[LIVE] = self._live + change
        self._own[self._place(origin)] += change

    def live(self) -> int:
        return self._sum(LIVE)

    def of(self, origin: Hashable) -> int:
        return self._sum(self._place(origin))

    def clear(self) -> int:
        """The process has died: it holds nothing any more, of any thing. How many sessions it had."""
        lost, self._live = int(self._own[LIVE]), 0
        for what in self._shared.tables:
            own = self.of_thing(what)._own
            given = own[GIVEN]
            own[:] = memoryview(bytes(4 * Shared.ROW)).cast("I")
            own[GIVEN] = given
        return lost

    def _sum(self, place: int) -> int:
        return sum(self._table[place::Shared.ROW])

    @staticmethod
    def _place(origin: Hashable) -> int:
        """Two origins may meet in one place, by chance but not on purpose: Python's hash of an address is keyed."""
        return 2 + hash(origin) % ORIGINS


class UserCounts:
    """The sessions of each user. Two users that meet in a place of one table do not meet in the other, but by a rare
    chance: the smaller number is right."""

    def __init__(self, counts: Counts) -> None:
        self._tables = counts.of_thing("users"), counts.of_thing("users again")

    def add(self, user: bytes, change: int) -> None:
        for number, table in enumerate(self._tables):
            table.add((number, user), change)

    def of(self, user: bytes) -> int:
        return min(table.of((number, user)) for number, table in enumerate(self._tables))


class Shared:
    """Counters in memory that forked processes share. Each writes to its own row, and reads the sum of all."""

    ROW = 2 + ORIGINS
    THINGS = ("sessions", "bind-ports 4", "bind-ports 6", "udp-ports 4", "udp-ports 6",     # ports by IP version
              "users", "users again")

    def __init__(self, rows: int) -> None:
        self.rows = rows
        self.buckets = Buckets()
        # The system gives memory to what was written to only.
        self.tables = {what: memoryview(mmap.mmap(-1, 4 * rows * self.ROW)).cast("I") for what in self.THINGS}

    def row(self, which: int) -> Counts:
        return Counts(self, which)

    def given(self) -> int:
        """How many sessions have been admitted, in all processes."""
        return sum(self.tables["sessions"][GIVEN::self.ROW])


class Meter:
    """Is told what happens in a server process. This one counts nothing; that of status/ does. Called by the thread in
    which it happens, so no method may wait."""

    def begin(self, session: Any) -> None:
        """A Session was admitted."""

    def relayed(self, session: Any, relay: Any) -> None:
        """Its tunnel or association has ended."""

    def ended(self, session: Any) -> None:
        """It is over, and its facts are final. Of a session with a record."""

    def login(self, verdict: str) -> None:
        """A password was tried: "right", "wrong" or "deferred"."""

    def refused(self, reason: str) -> None:
        """A connection was closed before its client was heard."""

    def accept_failed(self, errno: str) -> None:
        """accept() failed for want of descriptors or memory."""
