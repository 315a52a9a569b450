"""Make guessing passwords slow, without making it expensive for us.

Counts, and says how late an answer is to be; sleeps for nobody. Memory is bounded. RFC 1929.
"""
from __future__ import annotations

import threading
from time import monotonic
from typing import Callable, Dict, Hashable, Optional, Tuple

from ..protocol.errors import ProtocolError

LATE_AFTER = 3                          # failures without consequence: people mistype
REFUSE_AFTER = 6                        # failures, and then nothing is looked at for a time
AT_ONCE = 64                            # passwords being checked for an origin that has not failed yet
LATE_S = 1.0                            # doubles with every failure between the two
REFUSE_S = 30.0                         # doubles with every failure after
REFUSE_MOST_S = 900.0
ADDRESSES = 10000                       # remembered at most: 5 MB


class Record:
    """What is held against one origin."""

    __slots__ = ("failures", "last", "until", "pending")

    def __init__(self) -> None:
        self.failures = 0
        self.last = 0.0                             # when the last one failed
        self.until = 0.0                            # nothing is looked at before
        self.pending: Dict[bytes, int] = {}         # attempts being checked, and how many of each


class Throttle:
    """Makes guessing slow. An origin is an IPv4 address or an IPv6 /64; the caller says which.

    Failures are answered late, then refused unseen for a time that doubles. One password tried on many connections at
    once is one attempt. A success clears the record, and so does as long a silence as the longest refusal.
    """

    def __init__(self, clock: Callable[[], float] = monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._records: Dict[Hashable, Record] = {}  # the one that failed longest ago first
        self.tell: Optional[Callable[..., None]] = None     # other processes: origin, failures, last, until

    def judge(self, origin: Hashable, attempt: bytes, check: Callable[[], bool]) -> Tuple[bool, float]:
        """Whether check() lets it in, and how many seconds the answer is to be held back.

        `attempt` tells apart what is tried. Raises ProtocolError when too much is tried at once.
        """
        if not self.enter(origin, attempt):
            return False, 0.0
        right = None
        try:
            right = check()
        finally:
            delay = self.leave(origin, attempt, right)
        return right, delay

    def enter(self, origin: Hashable, attempt: bytes) -> bool:
        """Whether this attempt is looked at; leave() must follow if so. Raises ProtocolError."""
        with self._lock:
            record = self._records.get(origin) or Record()
            now = self._clock()
            if record.failures and now > max(record.until, record.last) + REFUSE_MOST_S:
                record.failures = 0
            if now < record.until:
                return False
            # A thousand at a time are no way round the limit; nor is it for an office that comes back all at once.
            most = max(1, REFUSE_AFTER - record.failures) if record.failures else AT_ONCE
            if len(record.pending) >= most and attempt not in record.pending:
                raise ProtocolError("too many passwords are tried at once")
            record.pending[attempt] = record.pending.get(attempt, 0) + 1
            self._records[origin] = record
            return True

    def leave(self, origin: Hashable, attempt: bytes, right: Optional[bool]) -> float:
        """The attempt's end; right is None when it was not decided. The seconds by which the answer is late."""
        with self._lock:
            record = self._records.pop(origin, None) or Record()
            others = record.pending.pop(attempt, 1) - 1
            if others:
                record.pending[attempt] = others
            known = record.failures
            if right:
                record.failures, record.until = 0, 0.0
            elif right is not None and not others:
                record.failures += 1
                record.last = self._clock()
            if record.failures > REFUSE_AFTER:
                over = min(record.failures - REFUSE_AFTER - 1, 16)
                record.until = record.last + min(REFUSE_S * 2 ** over, REFUSE_MOST_S)
            if record.failures or record.pending:
                self._records[origin] = record
                if len(self._records) > ADDRESSES:
                    del self._records[next(iter(self._records))]
            if self.tell and record.failures != known:
                self.tell(origin, record.failures, record.last, record.until)
            late = 0 if right is not False else record.failures - LATE_AFTER
            return LATE_S * 2 ** (min(late, REFUSE_AFTER - LATE_AFTER) - 1) if late > 0 else 0.0

    def learn(self, origin: Hashable, failures: int, last: float, until: float) -> None:
        """What another process, whose clock is the same, holds against an origin; no failures clear it."""
        with self._lock:
            record = self._records.pop(origin, None) or Record()
            if failures:
                failures, last, until = max(failures, record.failures), max(last, record.last), max(until, record.until)
            record.failures, record.last, record.until = failures, last, until
            if record.failures or record.pending:
                self._records[origin] = record
                if len(self._records) > ADDRESSES:
                    del self._records[next(iter(self._records))]
