"""Token buckets for rate limits, in memory that the server processes share.

A bucket is a virtual queue (GCRA, ITU-T I.371): it stores one number, the time at which all that was taken from it is
paid for. Who takes some bytes is told when they may be read: now, or after those of all others that asked before. So
sessions take turns, in all processes, and none polls for tokens. Each takes about PORTION_S of the rate at a time, and
less while others have some: the lock costs some 10 us a portion, and no byte. What is taken and not read yet, because
the receiver is slow, may be read later beyond the rate: at most some tenths of a second of it, however many sessions
there are. A process that is killed loses what it had taken.

Any thread may call. Sizes in bytes, times in seconds by time.monotonic(). Knows no sockets.
"""
from __future__ import annotations

import secrets
import threading
from typing import NamedTuple, Protocol, Sequence, Tuple

from ..access.shared import Lock, Table, digest

RECORDS = 16384                 # buckets. Beyond that, the fullest is dropped: its owner gets up to one burst too much
BURST_S = 0.2                   # a bucket holds as much as flows in this time, if nothing else is said
PORTION_S = 0.01                # what one session takes at a time, while no other has any;
SHARED_BY = 20                  # divided by as many as have some, up to this
LEAST_BYTES = 256               # a portion at the lowest rates
SPARE_BYTES = 1 << 16           # what a process takes ahead from a bucket that has enough, for small messages
SLACK_S = 0.002                 # a wait that is no longer is not worth a timer; it is made up for later
LONGEST_S = 600.0               # no wait is longer, whatever a killed process has left in the memory
STALE_S = 1.0                   # what a flow took and has not used for so long is given back


class Bucket(Protocol):
    def take(self, least: int, most: int, bytes_s: float, burst_s: float, now: float) -> Tuple[float, int]:
        """Take `most` if that may be read now, else `least`: when it may be read, and how much it is."""


def after(paid_at: float, least: int, most: int, bytes_s: float, burst_s: float,
          now: float) -> Tuple[float, int, float]:
    """The same for a bucket that is paid for at `paid_at`; and when it will be then."""
    start = min(max(paid_at, now - burst_s), now + LONGEST_S)
    size = most if start <= now else least
    return start, size, start + size / bytes_s


class OwnBucket:
    """Of one session. The caller holds the lock of its Limit."""

    def __init__(self) -> None:
        self._paid_at = 0.0

    def take(self, least: int, most: int, bytes_s: float, burst_s: float, now: float) -> Tuple[float, int]:
        start, size, self._paid_at = after(self._paid_at, least, most, bytes_s, burst_s, now)
        return start, size


class Buckets:
    """The buckets of all server processes. Made before they are forked."""

    def __init__(self) -> None:
        self._secret = secrets.token_bytes(32)
        self.lock = Lock()                              # share() it before the processes are forked
        self._table = Table(RECORDS, "d")               # paid_at

    def bucket(self, *parts: bytes) -> SharedBucket:
        """The one of this name. All that ask for the same name share it."""
        return SharedBucket(self, digest(self._secret, b"rate", *parts))

    def take(self, key: bytes, least: int, most: int, bytes_s: float, burst_s: float,
             now: float) -> Tuple[float, int]:
        with self.lock:
            paid_at, = self._table.get(key) or (0.0,)
            start, size, paid_at = after(paid_at, least, most, bytes_s, burst_s, now)
            self._table.put(key, paid_at)
        return start, size


class SharedBucket:
    """One of the Buckets."""

    def __init__(self, buckets: Buckets, key: bytes) -> None:
        self._buckets = buckets
        self._key = key

    def take(self, least: int, most: int, bytes_s: float, burst_s: float, now: float) -> Tuple[float, int]:
        return self._buckets.take(self._key, least, most, bytes_s, burst_s, now)


class Limit:
    """A bucket as this process uses it. What it has taken ahead waits in a pot for its sessions.

    name    what sets the limit, for the status page
    """

    __slots__ = ("name", "_bucket", "_bytes_s", "_burst_s", "_portion", "_spare", "_sharing", "_pot", "_pot_at",
                 "_lock", "__weakref__")

    def __init__(self, name: str, bucket: Bucket, bytes_s: float, burst_bytes: float = 0) -> None:
        self.name = name
        self._bucket = bucket
        self._bytes_s = bytes_s
        self._burst_s = max(burst_bytes / bytes_s, PORTION_S) if burst_bytes else BURST_S
        self._portion = int(bytes_s * PORTION_S)
        self._spare = max(LEAST_BYTES, min(self._portion, SPARE_BYTES))
        self._sharing = 0                           # flows of this process that have some of it, or wait for it
        self._pot, self._pot_at = 0, 0.0            # taken and not used yet; when it may be read
        self._lock = threading.Lock()

    def portion(self) -> int:
        """What a flow should ask for at a time, at the most: then those that wait get their turns soon."""
        return max(LEAST_BYTES, self._portion // max(1, min(self._sharing, SHARED_BY)))

    def reserve(self, size: int, now: float, joins: bool = False) -> float:
        """Take it: from when on it may be read. `joins` says that the flow has none yet."""
        with self._lock:
            self._sharing += joins
            if self._pot >= size:
                self._pot -= size
                return self._pot_at
            lacks = size - self._pot
            self._pot_at, taken = self._bucket.take(lacks, max(lacks, self._spare), self._bytes_s, self._burst_s, now)
            self._pot = taken - lacks
            return self._pot_at

    def leave(self, size: int) -> None:
        """A flow has no more of it; so much was reserved and not read."""
        with self._lock:
            self._sharing -= 1
            self._pot = min(self._pot + size, 2 * max(self._portion, SPARE_BYTES))


class HeldBack(NamedTuple):
    """A session waited for a limit of this name at this time."""

    at: float
    name: str


NEVER = HeldBack(float("-inf"), "")


class Flow:
    """What one session takes of its limits for one direction. One thread at a time may call.

    granted     bytes that were reserved and are not read yet
    resume_at   when they may be read, while that is waited for; 0: now
    used_at     when something of it was read, or was to be read
    held_back   when it waited last, and for what
    """

    __slots__ = ("limits", "granted", "resume_at", "used_at", "held_back")

    def __init__(self, limits: Sequence[Limit]) -> None:
        self.limits = limits
        self.granted = 0
        self.resume_at = self.used_at = 0.0
        self.held_back = NEVER

    def portion(self) -> int:
        return min(limit.portion() for limit in self.limits)

    def reserve(self, size: int, now: float) -> bool:
        """Reserve it of every limit, beside what is granted already. Whether that may be read now; else resume_at says
        when."""
        joins = not self.granted
        self.granted += size
        slowest = max(((limit.reserve(size, now, joins), limit) for limit in self.limits), key=lambda pair: pair[0])
        self.used_at = max(now, slowest[0])
        if slowest[0] <= now + SLACK_S:
            return True
        self.resume_at = slowest[0]
        self.held_back = HeldBack(now, slowest[1].name)
        return False

    def use(self, size: int, now: float) -> None:
        self.used_at = now
        if size < self.granted:
            self.granted -= size
        elif self.granted:
            self._leave(0)

    def stale(self, now: float) -> bool:
        """Whether something is granted and was not used for long."""
        return self.granted > 0 and now > self.used_at + STALE_S

    def close(self) -> None:
        """Give back what is reserved."""
        self.resume_at = 0.0
        if self.granted:
            self._leave(self.granted)

    def _leave(self, size: int) -> None:
        self.granted = 0
        for limit in self.limits:
            limit.leave(size)

    def passes(self, size: int, now: float) -> bool:
        """For a datagram, which cannot wait: whether it may pass now. The flow waits its turn as a stream does, but
        what comes meanwhile is lost."""
        if self.resume_at > now + SLACK_S:
            return False
        self.resume_at = 0.0
        if self.stale(now):
            self.close()
        if self.granted < size and not self.reserve(max(size, self.portion()), now):
            return False
        self.use(size, now)
        return True
