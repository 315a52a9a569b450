"""One login, from the attempt to the verdict: wait for a look, check the password, tell the throttle.

A security token (GSSAPI) cannot be guessed: a right one never waits, and a wrong one is held against its origin.
Runs in the thread of the login's connection, which waits here. What is remembered is shared by all server processes:
make Logins, share() it and only then fork.
"""
from __future__ import annotations

import enum
import secrets
import threading
from time import monotonic
from typing import Callable, Dict, List, Optional

from .passwords import Turns, Wait
from .shared import Lock, Table
from .throttle import Attempt, Throttle

TOKENS = b""                            # in the place of the user name of failed tokens: no password has this one
KNOWN = 65536                           # right passwords remembered, 24 bytes each
SAME_POLL_S = 0.03                      # how often one asks that waits for the same password on another connection
TELL_BURST, TELL_EVERY_S = 20, 1.0      # lines about deferred attempts


class Verdict(enum.Enum):
    RIGHT = "right"
    WRONG = "wrong"                     # looked at, and wrong
    DEFERRED = "deferred"               # no look was left for it: too many attempts wait


class Look:
    """A check under way. The same login on other connections of this process waits for its verdict."""

    def __init__(self) -> None:
        self.verdict: Optional[Verdict] = None
        self.over = False


Check = Callable[[bytes, bytes, Wait], Optional[bool]]


class Logins:
    """What is remembered of logins, in all server processes together."""

    def __init__(self, clock: Callable[[], float] = monotonic) -> None:
        self.secret = secrets.token_bytes(32)
        self.lock = Lock()
        self.throttle = Throttle(self.lock, clock)
        self.turns = Turns(self.lock)
        self._clock = clock
        self._known = Table(KNOWN, "d")
        self._looks: Dict[bytes, Look] = {}
        self._looking = threading.Lock()
        self._told: List[float] = [0.0, 0.0]              # when the lines are all there again, lines left out

    def share(self) -> None:
        """Make all of it hold over the processes that are forked later: call it before the first."""
        self.lock.share()

    def unshare(self) -> None:
        """Close what share() has opened: the processes have ended."""
        self.lock.unshare()

    # ---- passwords that were right --------------------------------------------------------------------------------

    def knows(self, proof: bytes) -> bool:
        return self._known.get(proof) is not None

    def remember(self, proof: bytes) -> None:
        with self.lock:
            self._known.put(proof, self._clock())

    # ---- a login --------------------------------------------------------------------------------------------------

    def judge(self, origin: str, uname: bytes, passwd: bytes, check: Check, wait: Wait) -> Verdict:
        """Wait for a look at this password, and check it. Never takes longer than `wait` has left, but for one slow
        hash. What wait.pause() raises ends it, and is not held against the origin."""
        attempt = Attempt(self.secret, origin, uname, passwd, self._clock())
        if self.throttle.is_known(attempt):
            return self._look(attempt, uname, passwd, check, wait)
        while True:
            with self._looking:
                look = self._looks.get(attempt.proof)
                if look is None:
                    mine = self._looks[attempt.proof] = Look()
                    break
            while not look.over:
                if wait.left_s <= 0:
                    return Verdict.DEFERRED
                wait.pause(min(SAME_POLL_S, max(wait.left_s, 0.0)))
            if look.verdict in (Verdict.RIGHT, Verdict.WRONG):
                return look.verdict
        try:
            mine.verdict = self._look(attempt, uname, passwd, check, wait)
            return mine.verdict
        finally:
            with self._looking:
                del self._looks[attempt.proof]
            mine.over = True

    def charge(self, origin: str, wait: Wait, usable: Callable[[], bool]) -> Verdict:
        """Have a security token that was refused cost its origin a look. It is WRONG as soon as there is one, which may
        take as long as `wait` has left; else DEFERRED, and also when our keys are not `usable`. From its third failure
        on, passwords go first."""
        attempt = Attempt(self.secret, origin, TOKENS, b"", self._clock())
        if not self._wait_for_look(attempt, wait):
            return Verdict.DEFERRED
        wrong = usable()
        self.throttle.settle(attempt, False if wrong else None)
        return Verdict.WRONG if wrong else Verdict.DEFERRED

    def _look(self, attempt: Attempt, uname: bytes, passwd: bytes, check: Check, wait: Wait) -> Verdict:
        throttle = self.throttle
        if not attempt.known and not self._wait_for_look(attempt, wait):
            return Verdict.DEFERRED
        right = None
        try:
            right = check(uname, passwd, wait)
        finally:
            if right is not True or throttle.is_news(attempt):
                throttle.settle(attempt, right)
        return Verdict.DEFERRED if right is None else Verdict.RIGHT if right else Verdict.WRONG

    def _wait_for_look(self, attempt: Attempt, wait: Wait) -> bool:
        """Whether there was one in time."""
        try:
            wait_s = self.throttle.ask(attempt)
            while wait_s:
                if self.throttle.is_quiet(attempt):
                    wait.extend_once()
                if wait.left_s <= 0:
                    return False
                wait.pause(min(wait_s, wait.left_s))
                wait_s = self.throttle.ask(attempt)
            return wait_s is not None
        finally:
            self.throttle.withdraw(attempt)

    def lines_left_out(self) -> Optional[int]:
        """Whether one more line about a deferred attempt may be logged: None, or how many were left out before."""
        with self._looking:
            now, (full, left_out) = self._clock(), self._told
            if max(full, now) + TELL_EVERY_S - now > TELL_BURST * TELL_EVERY_S:
                self._told[1] += 1
                return None
            self._told = [max(full, now) + TELL_EVERY_S, 0.0]
            return int(left_out)


def origin_of(address: object, origin: str) -> str:
    """The origin of an attempt: `origin`, which is an address or an IPv6 /64, but one for all loopback addresses."""
    return "loopback" if getattr(address, "is_loopback") else origin
