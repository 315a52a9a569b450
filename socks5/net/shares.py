"""Fair shares of what is scarce (ports, places, kernel pipes): no address takes all of it.

The last tenth is kept for owners that hold less than a tenth. A newcomer is served while one owner holds all the rest,
and one owner alone still gets nine tenths. An owner is what addresses.subscriber() gives. Any thread may call; Tally
and fits() leave locking to the caller.
"""
from __future__ import annotations

import random
from threading import Lock
from typing import Callable, Dict, Iterator, Optional, Protocol, Tuple

TENTH = 10


def each_port(ports: Tuple[int, ...]) -> Iterator[int]:
    """Yield every port of a port_range once. The first one is random, so that clients seldom try the same port at once.
    Without a range, yield 0: the system then chooses a free port."""
    if not ports:
        yield 0
        return
    low, high = ports
    start = random.randint(low, high)
    yield from range(start, high + 1)
    yield from range(low, start)


class Counter(Protocol):
    """Counts what each owner holds. server/counters.py has the implementation in shared memory, for all processes."""

    def add(self, owner: str, change: int) -> None: ...
    def live(self) -> int: ...                      # what all hold together
    def of(self, owner: str) -> int: ...


class Tally:
    """The Counter of one process."""

    def __init__(self) -> None:
        self.total = 0
        self._held: Dict[str, int] = {}

    def add(self, owner: str, change: int) -> None:
        held = self._held
        self.total += change
        number = held.get(owner, 0) + change
        if number:
            held[owner] = number
        else:
            held.pop(owner, None)

    def live(self) -> int:
        return self.total

    def of(self, owner: str) -> int:
        return self._held.get(owner, 0)


def kept(total: float, least: int = 1) -> float:
    """How many of `total` are kept for owners that hold less than so many."""
    return max(least, total // TENTH) if total > least else 0


def fits(total: float, counter: Counter, owner: str, more: int, least: int = 1, freed: int = 0) -> bool:
    """Whether there are `more` for the owner: they are left, and not kept for owners that hold less than a tenth.

    least   how many are kept if a tenth is less: what a newcomer needs at once
    freed   how many of those that are counted will be given back at once
    """
    last = kept(total, least)
    left = total - counter.live() + freed - more
    return left >= last or left >= 0 and counter.of(owner) + more <= last


class Share:
    """A number of equal things, of which owners take some and give them back.

    total   how many there are
    least   as in fits()
    tally   counts them. Where it is shared by processes, two that take the last ones in the same moment may both get
            them: then one finds that there is none.
    """

    def __init__(self, total: int, least: int = 1, tally: Optional[Counter] = None) -> None:
        self.total = total
        self.least = least
        self._tally: Counter = tally or Tally()
        self._lock = Lock()

    def take(self, owner: str, number: int = 1) -> bool:
        """Take `number` of them, or none: whether the owner has got them. Never waits."""
        with self._lock:
            if not fits(self.total, self._tally, owner, number, self.least):
                return False
            self._tally.add(owner, number)
            return True

    def give_back(self, owner: str, number: int = 1) -> None:
        with self._lock:
            self._tally.add(owner, -number)

    def live(self) -> int:
        """How many are taken."""
        return self._tally.live()


class Ports:
    """The ports of --bind-ports or --udp-ports, and fair shares of them. IPv4 and IPv6 have the same numbers twice.

    range   as config.port_range gives it; () is any port, of which there are enough for all
    need    how many one client needs at once
    tally   makes the Counter of an IP version: 4 or 6
    """

    def __init__(self, ports: Tuple[int, ...] = (), need: int = 1,
                 tally: Callable[[int], Counter] = lambda version: Tally()) -> None:
        self.range = ports
        total = ports[1] - ports[0] + 1 if ports else 0
        self._shares = {version: Share(total, need, tally(version)) for version in (4, 6)} if ports else {}

    def __iter__(self) -> Iterator[int]:
        """The ports to try, in this order."""
        return each_port(self.range)

    def __str__(self) -> str:
        return "ports %d-%d" % self.range if self.range else "any port"

    def take(self, owner: str, version: int, number: int = 1) -> bool:
        """Whether the owner may open `number` more sockets of this IP version."""
        return not self.range or self._shares[version].take(owner, number)

    def give_back(self, owner: str, version: int, number: int = 1) -> None:
        if self.range:
            self._shares[version].give_back(owner, number)


ANY_PORT = Ports()
