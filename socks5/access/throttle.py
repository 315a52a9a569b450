"""Rate limit for wrong passwords, without locking out users.                                              RFC 1929

An origin is an IPv4 address or an IPv6 /64; all of 127.0.0.0/8 and ::1 are one. A look is one check of a password.
The rules:

1. An origin has BURST looks at once and one more every INTERVAL_S.
2. A user name has NAME_BURST looks and one more every NAME_INTERVAL_S from all origins together, fewer than 10,000.
3. A right password costs no look, and gives back what wrong ones for the same user from the same origin have cost.
4. A password that was right from the same origin within a day needs no look: it is let in at once. A guesser learns
   from this, without a look, that another password is not that one. So a wrong password for such a user that had no
   look is counted as a miss, of the user and of the origin. When no misses are left, rule 5 holds for every attempt.
   Looks and misses of an origin are fewer than 1,000 in any hour.
5. Attempts without a look wait. The next look goes to the newest of them; users who have failed three times come after
   the others. An attempt is deferred, which means that it never gets a look, when the handshake's time is over or when
   PENDING others wait.

Newest first, because an attacker can leave any number of wrong attempts waiting. A right password that comes later
must not wait for them: it waits INTERVAL_S at most. How a connection's thread waits is in logins.py; this module takes
facts and a time, and returns decisions. Its records are in tables of a fixed size (shared.py), which all server
processes share.

Each limit is a GCRA (ITU-T I.371), which stores one number: the time at which all looks are there again, `full`.
"""
from __future__ import annotations

import hmac
from time import monotonic
from typing import Any, Callable, Dict, List, Optional, Tuple

from .shared import Lock, Table, digest

BURST, INTERVAL_S = 10, 4.2                 # 10 + 3600 / 4.2 = 867 an hour; a right password is looked at within 5 s
MISSES, MISSES_INTERVAL_S = 60, 60.0        # of an origin: 60 + 3600 / 60 = 120 an hour
MISS_BURST, MISS_INTERVAL_S = 20, 120.0     # of one user from there: guessing at one costs the other users little
NAME_BURST, NAME_INTERVAL_S = 900, 0.4      # 900 + 3600 / 0.4 = 9,900 an hour
KNOWN_S = 86400.0                           # how long a success lets the same password in at once
FRESH_S = 60.0                              # a success this young is not written again
REPEATED = 3                                # failures of a user from an origin: people mistype
QUIET_S = 60.0                              # an origin without a failure for so long is not guessing

PENDING = 256                               # attempts that wait for a look, for an origin in a process
POLL_S = 0.1                                # how often a waiting attempt asks again
SHORTEST_S = 0.001                          # so that no wait is rounded to 0
STALE_S = 0.5                               # an attempt that has not asked for so long has ended

ORIGINS = PAIRS = GOOD = 16384              # records, 60 bytes or less each
NAMES = 16384


class Attempt:
    """One password tried for one user from one origin. `arrived` also identifies it."""

    __slots__ = ("origin", "name", "pair", "proof", "arrived", "rank", "known", "compared", "dropped", "waits", "facts")

    def __init__(self, secret: bytes, origin: str, uname: bytes, passwd: bytes, arrived: float) -> None:
        self.facts = secret, origin.encode(), uname
        self.origin = self.name = b""       # their digests, when they are needed: a known password does not need them
        self.pair = digest(secret, b"pair", self.facts[1], uname)
        self.proof = digest(secret, b"attempt", self.facts[1], uname, passwd)
        self.arrived = arrived
        self.rank = 0                       # 1 for a user that has failed REPEATED times: others go first
        self.known = False                  # it was right from here within a day: it took no look
        self.compared = False               # with the password that was
        self.dropped = False                # deferred: too many others wait
        self.waits = False                  # it is among the pending

    def find_limits(self) -> None:
        secret, origin, uname = self.facts
        self.origin, self.name = digest(secret, b"origin", origin), digest(secret, b"name", uname)


class Throttle:
    """Decides when a password is looked at. Call `ask` until it says 0, check the password, and call `settle`."""

    def __init__(self, lock: Lock, clock: Callable[[], float] = monotonic) -> None:
        self._lock = lock
        self._clock = clock
        # full, when the last wrong one was, and the first of those that wait: rank, arrival, when it asked last
        self._origins = Table(ORIGINS, "ddddd")
        self._names = Table(NAMES, "ddddd")
        self._pairs = Table(PAIRS, "d")             # full, as if the origin's looks were this user's alone
        self._good = Table(GOOD, "d16sd")           # when it was right, the proof, full of this user's misses
        self._misses = Table(ORIGINS, "d")          # full, of an origin
        self._pending: Dict[bytes, List[Attempt]] = {}      # in this process, by origin

    def is_known(self, attempt: Attempt) -> bool:
        """Whether this password was right from this origin within a day: then it takes no look. Takes no lock."""
        good, now = self._good.get(attempt.pair), self._clock()
        attempt.known = (good is not None and not attempt.compared and self._may_miss(attempt, good, now)
                         and hmac.compare_digest(good[1], attempt.proof))
        return attempt.known

    def _may_miss(self, attempt: Attempt, good: Tuple[Any, ...], now: float) -> bool:
        """Whether an attempt may be compared with the password that was right, which may be a miss."""
        if now - good[0] > KNOWN_S or missing(good[2], MISS_BURST, MISS_INTERVAL_S, now) > 0:
            return False
        if not attempt.origin:
            attempt.find_limits()
        full, = self._misses.get(attempt.origin) or (0.0,)
        return missing(full, MISSES, MISSES_INTERVAL_S, now) <= 0

    def ask(self, attempt: Attempt) -> Optional[float]:
        """0 when the password is to be looked at now, else in how many seconds to ask again; None: not at all."""
        if not attempt.origin:
            attempt.find_limits()
        with self._lock:
            now = self._clock()
            if self.is_known(attempt):
                self._forget(attempt)
                return 0.0
            full, = self._pairs.get(attempt.pair) or (0.0,)
            attempt.rank = int(full - now > (REPEATED - 1) * INTERVAL_S)
            wait_s = self._look(attempt, now)
            if not wait_s:
                self._forget(attempt)
                self._pairs.put(attempt.pair, max(now, full) + INTERVAL_S)
                return 0.0
            self._count_miss(attempt, now)
            if not attempt.waits:
                self._wait(attempt)
            return None if attempt.dropped else wait_s

    def settle(self, attempt: Attempt, right: Optional[bool]) -> None:
        """What came of the look; None when the password was not checked after all."""
        if not attempt.origin:
            attempt.find_limits()
        with self._lock:
            now = self._clock()
            if right:
                good = self._good.get(attempt.pair)
                self._good.put(attempt.pair, now, attempt.proof, good[2] if good else 0.0)
            elif right is False and attempt.known:              # it was changed: what was known is no longer right
                self._good.drop(attempt.pair)
            if right or not attempt.known:
                self._settle_look(attempt, right, now)

    def _settle_look(self, attempt: Attempt, right: Optional[bool], now: float) -> None:
        full, failed, *first = self._origins.get(attempt.origin) or NOTHING
        if right is False:
            self._origins.put(attempt.origin, full, now, *first)
            return
        # A pair's looks come back as fast as its origin's, so what it has cost is at most what the origin lacks, and
        # giving it back leaves the origin's other users where they would be without this one.
        owed = max((self._pairs.get(attempt.pair) or (0.0,))[0] - now, 0.0)
        returned = owed if right else min(owed, INTERVAL_S)
        self._pairs.put(attempt.pair, now + owed - returned)
        self._origins.put(attempt.origin, full - returned, failed, *first)
        if attempt.known:                                   # it took no look of the name
            return
        full, *rest = self._names.get(attempt.name) or NOTHING
        self._names.put(attempt.name, full - min(max(full - now, 0.0), NAME_INTERVAL_S), *rest)

    def is_news(self, attempt: Attempt) -> bool:
        """Whether a success is worth a settle(): not when it was so within a minute, and no failure is to be cleared.
        Takes no lock."""
        good, now = self._good.get(attempt.pair) if attempt.known else None, self._clock()
        return good is None or now - good[0] > FRESH_S or (self._pairs.get(attempt.pair) or (0.0,))[0] > now

    def withdraw(self, attempt: Attempt) -> None:
        """This attempt no longer waits."""
        with self._lock:
            self._forget(attempt)

    def is_quiet(self, attempt: Attempt) -> bool:
        """Whether no password from this origin was wrong lately: then attempts wait for slow hashes only."""
        found = self._origins.get(attempt.origin)
        return not found or self._clock() - found[1] > QUIET_S

    # ---- looks; under the lock ------------------------------------------------------------------------------------

    def _count_miss(self, attempt: Attempt, now: float) -> None:
        """The attempt was compared with the password that was right from there, and is another one: count a miss."""
        good = None if attempt.compared else self._good.get(attempt.pair)
        if good and self._may_miss(attempt, good, now):
            attempt.compared = True
            self._good.put(attempt.pair, *good[:2], max(good[2], now) + MISS_INTERVAL_S)
            full, = self._misses.get(attempt.origin) or (0.0,)
            self._misses.put(attempt.origin, max(full, now) + MISSES_INTERVAL_S)

    def _look(self, attempt: Attempt, now: float) -> float:
        """Take a look of the origin and one of the name: 0, or in how many seconds to ask again. An attempt takes its
        place among those that wait only for what it lacks: it must not keep a user's looks from other origins while it
        waits for its own origin, nor the other way round."""
        origin = self._origins.get(attempt.origin) or NOTHING
        name = self._names.get(attempt.name) or NOTHING
        lacks = missing(origin[0], BURST, INTERVAL_S, now), missing(name[0], NAME_BURST, NAME_INTERVAL_S, now)
        if max(lacks) > 0:
            table, key, record = ((self._origins, attempt.origin, origin) if lacks[0] >= lacks[1]
                                  else (self._names, attempt.name, name))
            if not other_first(record, attempt, now):
                table.put(key, *record[:2], attempt.rank, attempt.arrived, now)
            return min(max(*lacks, SHORTEST_S), POLL_S)
        if other_first(origin, attempt, now) or other_first(name, attempt, now):
            return POLL_S
        self._origins.put(attempt.origin, max(origin[0], now) + INTERVAL_S, origin[1], 0.0, 0.0, 0.0)
        self._names.put(attempt.name, max(name[0], now) + NAME_INTERVAL_S, name[1], 0.0, 0.0, 0.0)
        return 0.0

    # ---- those that wait; under the lock --------------------------------------------------------------------------

    def _wait(self, attempt: Attempt) -> None:
        waiting = self._pending.setdefault(attempt.origin, [])
        waiting.append(attempt)
        attempt.waits = True
        if len(waiting) > PENDING:
            last = max(waiting, key=lambda one: (one.rank, -one.arrived))
            self._forget(last)
            last.dropped = last.waits = True            # it finds out when it asks again, and is not taken in anew

    def _forget(self, attempt: Attempt) -> None:
        waiting = self._pending.get(attempt.origin, [])
        if attempt in waiting:
            waiting.remove(attempt)
            if not waiting:
                del self._pending[attempt.origin]
        attempt.waits = False


NOTHING = (0.0, float("-inf"), 0.0, 0.0, 0.0)


def missing(full: float, burst: int, interval_s: float, now: float) -> float:
    """In how many seconds there is a look, 0 or less when there is one."""
    return max(full, now) - now - (burst - 1) * interval_s - 1e-6      # which rounding may cost


def other_first(record: Tuple[Any, ...], attempt: Attempt, now: float) -> bool:
    """Whether another attempt that still waits for this record's looks goes first."""
    rank, arrived, asked = record[2:]
    return (now - asked < STALE_S and arrived != attempt.arrived
            and (rank, -arrived) < (attempt.rank, -attempt.arrived))
