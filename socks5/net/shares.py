"""Fair shares of what is scarce (ports, places, kernel pipes): no address takes all of it.

The last tenth is kept for owners that hold less than a tenth. A newcomer is served while one owner holds all the rest,
and one owner alone still gets nine tenths. An owner is what addresses.subscriber() gives. Any thread may call.
"""
from __future__ import annotations

from threading import Lock
from typing import Callable, Dict, Iterator, Optional, Tuple

from ..config import each_port

TENTH = 10


class Tally:
    """Counts what each owner holds, in this process."""

    def __init__(self) -> None:
        self._all = 0
        self._held: Dict[str, int] = {}

    def add(self, owner: str, change: int) -> None:
        self._all += change
        held = self._held.get(owner, 0) + change
        if held:
            self._held[owner] = held
        else:
            self._held.pop(owner, None)

    def live(self) -> int:
        return self._all

    def of(self, owner: str) -> int:
        return self._held.get(owner, 0)


class Share:
    """A number of equal things, of which owners take some and give them back.

    total   how many there are
    least   how many are kept for newcomers if a tenth is less: what one of them needs at once
    tally   what counts them; another one with these three methods may count over several processes
    """

    def __init__(self, total: int, least: int = 1, tally: Optional[Tally] = None) -> None:
        self.total = total
        self.kept = max(least, total // TENTH) if total > least else 0
        self._tally = tally or Tally()
        self._lock = Lock()

    def take(self, owner: str, number: int = 1) -> bool:
        """Take `number` of them, or none: whether the owner has got them. Never waits."""
        with self._lock:
            left = self.total - self._tally.live() - number
            if left < 0 or (left < self.kept and self._tally.of(owner) * TENTH >= self.total):
                return False
            self._tally.add(owner, number)
            return True

    def give_back(self, owner: str, number: int = 1) -> None:
        with self._lock:
            self._tally.add(owner, -number)


class Ports:
    """The ports of --bind-ports or --udp-ports, and fair shares of them. IPv4 and IPv6 have the same numbers twice.

    range   as config.port_range gives it; () is any port, of which there are enough for all
    need    how many one client needs at once
    share   makes a Share: once for IPv4, once for IPv6
    """

    def __init__(self, ports: Tuple[int, ...] = (), need: int = 1,
                 share: Callable[[int, int], Share] = Share) -> None:
        self.range = ports
        total = ports[1] - ports[0] + 1 if ports else 0
        self._shares = {version: share(total, need) for version in (4, 6)} if ports else {}

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
