"""Counters in memory that forked processes share: what the status page and the terminal's line are made of.

Each server process writes one row, and only that process does; readers add the rows up. A row outlives its process: a
worker that replaces another one goes on where that has stopped. Nothing is formatted here.

The threads that serve sessions call the methods of Meter; one more thread calls `sweep` about once a second, for the
sessions that are not over yet.
"""
from __future__ import annotations

import mmap
import threading
import time
from bisect import bisect_left
from collections import deque
from time import monotonic, sleep
from typing import Deque, Dict, List, Tuple

from ..commands import rates
from ..commands.udp import BEYOND, Association
from ..net.writer import lost_in_all
from ..protocol.codes import Cmd, Rep
from ..protocol.messages import Request
from ..relay.relay import Relay
from ..server import counters
from ..server.session import Session
from ..server.sessions import Sessions

try:
    import resource
except ImportError:                     # Windows
    resource = None                     # type: ignore[assignment]

NONE = "none"                           # in the place of a command or REP that there was not
OTHER = "other"
COMMANDS = (NONE, *(cmd.name for cmd in Cmd))
REPS = (NONE, *(rep.name for rep in Rep))
STATES = ("negotiating", "connecting", "waiting", "relaying", "half-closed", "closing")
WAYS = ("up", "down")
LOGINS = ("right", "wrong", "deferred")
REFUSALS = ("allow-from", "max-sessions", "max-per-client", "no thread", "server", OTHER)
ACCEPT_ERRORS = ("EMFILE", "ENFILE", "ENOBUFS", "ENOMEM", OTHER)
DROPS = ("not the client", "client not known yet", "bad header", "fragment", "not allowed", "unresolved",
         "waiting for a name", "EMSGSIZE", "ENETUNREACH", "EHOSTUNREACH", "ECONNREFUSED", "EPERM", "EINVAL", "ENOBUFS",
         "EAGAIN", BEYOND, OTHER)
BOUNDS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
TIMES = ("handshake", "connect")
BUCKETS = tuple(map(str, range(len(BOUNDS_S) + 1)))
SUM = "sum"                             # of a time, in microseconds

# What a row has: (what, which) to its place. The gauges are what holds now; all others only ever grow.
GAUGES = (*(("state", state) for state in STATES), *(("held", name) for name in rates.NAMES),
          ("pid", ""), ("max_sessions", ""), ("max_fds", ""))
COUNTERS = (
    *(("session", command + " " + rep) for command in COMMANDS for rep in REPS),
    *(("bytes", way) for way in WAYS), *(("datagrams", way) for way in WAYS),
    *(("dropped", reason) for reason in DROPS), *(("login", result) for result in LOGINS),
    *(("refused", reason) for reason in REFUSALS), *(("accept_error", name) for name in ACCEPT_ERRORS),
    *((name, bucket) for name in TIMES for bucket in (*BUCKETS, SUM)), ("lost", ""), ("restarts", ""))
PLACES = {key: place for place, key in enumerate(GAUGES + COUNTERS)}
ROW = len(PLACES)

# Looked up once, for what comes with every session.
UP, DOWN = PLACES["bytes", "up"], PLACES["bytes", "down"]
HANDSHAKE, CONNECTED = PLACES["handshake", BUCKETS[0]], PLACES["connect", BUCKETS[0]]
HANDSHAKE_SUM, CONNECTED_SUM = PLACES["handshake", SUM], PLACES["connect", SUM]
ENDED = {("" if command == NONE else command, "" if rep == NONE else rep): PLACES["session", command + " " + rep]
         for command in COMMANDS for rep in REPS}
SUCCEEDED, CONNECT = Rep.SUCCEEDED.name, Cmd.CONNECT.name
GOOD = "", SUCCEEDED
Count = Tuple[str, str]

KEPT = 200                              # sessions that are over, and as many that were refused, in each process
AT_ONCE = 100                           # sessions between two moments in which other threads may have the interpreter


class Board:
    """The rows of all server processes. Made before they are forked. `shared_limit` says whether all of them together
    have one session limit."""

    def __init__(self, rows: int, shared_limit: bool = False) -> None:
        self.rows = rows
        self.shared_limit = shared_limit
        self.started = time.time()
        self.table = memoryview(mmap.mmap(-1, 8 * rows * ROW)).cast("Q")

    def add(self, row: int, what: str, which: str = "", change: int = 1) -> None:
        self.table[row * ROW + PLACES[what, which]] += change

    def put(self, row: int, what: str, which: str, value: int) -> None:
        self.table[row * ROW + PLACES[what, which]] = value

    def get(self, row: int, what: str, which: str = "") -> int:
        return self.table[row * ROW + PLACES[what, which]]

    def sum(self, what: str, which: str = "") -> int:
        return sum(self.table[PLACES[what, which]::ROW])

    def clear_gauges(self, row: int) -> None:
        for place in range(len(GAUGES)):
            self.table[row * ROW + place] = 0


class Counted:
    """What the counters already contain of a session that is not over.

    answered    the first reply to its request
    udp         what its association has done
    """

    __slots__ = ("up", "down", "answered", "udp")

    def __init__(self) -> None:
        self.up = self.down = 0
        self.answered = False
        self.udp: Dict[Count, int] = {}


class Meter(counters.Meter):
    """Counts what happens in one server process, into its row, and remembers the last sessions that are over.

    finished, refusals      of all sessions that are over, and of those that were refused, the last KEPT
    """

    def __init__(self, board: Board, row: int) -> None:
        self.board = board
        self.finished: Deque[Session] = deque(maxlen=KEPT)
        self.refusals: Deque[Session] = deque(maxlen=KEPT)
        self._row = row
        self._table = board.table[row * ROW:(row + 1) * ROW]
        self._lock = threading.Lock()                   # += is not atomic; held for some microseconds
        self._counted: Dict[Session, Counted] = {}      # few: most sessions end before the first sweep
        self._lost = 0

    # ---- what the server tells; see server/counters.py ------------------------------------------------------------

    def begin(self, session: Session) -> None:
        session.record = []

    def relayed(self, session: Session, relay: Relay) -> None:
        if isinstance(relay, Association):              # the bytes are the session's facts
            with self._lock:
                if not session.ended_at:
                    self._count_udp(self._counted.setdefault(session, Counted()), relay)

    def ended(self, session: Session) -> None:
        table, rep, up, down = self._table, session.rep, session.up, session.down
        with self._lock:
            counted = self._counted.pop(session, None) if self._counted else None
            if counted:
                up, down = up - counted.up, down - counted.down
            table[ENDED[session.cmd, rep]] += 1
            if up:
                table[UP] += up
            if down:
                table[DOWN] += down
            if rep and not (counted and counted.answered):
                self._count_answer(session)
            self.finished.append(session)
            if rep not in GOOD or session.ended_by == "refused":
                self.refusals.append(session)

    def last(self) -> Tuple[List[Session], List[Session]]:
        """Copies of `finished` and `refusals`, the oldest first."""
        with self._lock:                                # without a GIL, to copy a deque that changes may raise
            return list(self.finished), list(self.refusals)

    def login(self, verdict: str) -> None:
        self._add("login", verdict, LOGINS)

    def refused(self, reason: str) -> None:
        self._add("refused", reason, REFUSALS)

    def accept_failed(self, errno: str) -> None:
        self._add("accept_error", errno, ACCEPT_ERRORS)

    # ---- sessions that are not over -------------------------------------------------------------------------------

    def sweep(self, sessions: Sessions) -> None:
        """Count what the live sessions have done since the last time, and what they are doing."""
        states, held, now = dict.fromkeys(STATES, 0), dict.fromkeys(("", *rates.NAMES), 0), monotonic()
        for number, session in enumerate(sessions):
            if number % AT_ONCE == AT_ONCE - 1:
                sleep(0)                                # let others have the interpreter
            relay = session.relay
            states[session.state()] += 1
            held[rates.held_back(session, now)] += 1
            with self._lock:
                if session.record is not None and not session.ended_at:     # or ended() counts it
                    counted = self._counted.setdefault(session, Counted())
                    up, down = session.moved()
                    self._table[UP] += up - counted.up
                    self._table[DOWN] += down - counted.down
                    counted.up, counted.down = up, down
                    if session.rep and not counted.answered:
                        counted.answered = self._count_answer(session)
                    if isinstance(relay, Association):
                        self._count_udp(counted, relay)
        lost = lost_in_all()
        self._table[PLACES["lost", ""]] += lost - self._lost
        self._lost = lost
        for state in STATES:
            self._table[PLACES["state", state]] = states[state]
        for name in rates.NAMES:
            self._table[PLACES["held", name]] = held[name]

    # ---- inside; under the lock -----------------------------------------------------------------------------------

    def _add(self, what: str, which: str, known: Tuple[str, ...]) -> None:
        with self._lock:
            self._table[PLACES[what, which if which in known else OTHER]] += 1

    def _count_answer(self, session: Session) -> bool:
        """Count how long its handshake and its connect took. Returns whether that is known. Not done when it replies,
        which would cost each connection more."""
        record = session.record or []
        asked = len(record) - 2                         # of a CONNECT, a BIND that waits, a refusal
        while asked >= 0 and record[asked][1] is not Request:
            asked -= 1
        if asked < 0:
            return False
        table, at = self._table, record[asked][0]
        seconds = at - session.started
        table[HANDSHAKE + bisect_left(BOUNDS_S, seconds)] += 1
        table[HANDSHAKE_SUM] += int(seconds * 1e6)
        if session.rep == SUCCEEDED and session.cmd == CONNECT:
            seconds = record[asked + 1][0] - at
            table[CONNECTED + bisect_left(BOUNDS_S, seconds)] += 1
            table[CONNECTED_SUM] += int(seconds * 1e6)
        return True

    def _count_udp(self, counted: Counted, association: Association) -> None:
        """The relay loop may be counting on: what is missed now comes with the next call."""
        now: Dict[Count, int] = {("datagrams", way): count for way, count in zip(WAYS, association.datagrams)}
        for reason, count in association.losses().items():
            key = "dropped", reason if reason in DROPS else OTHER
            now[key] = now.get(key, 0) + count
        for key, count in now.items():
            self._table[PLACES[key]] += count - counted.udp.get(key, 0)
        counted.udp = now


def descriptor_limit() -> int:
    """0 where there is none, or nothing to ask."""
    if resource is None:
        return 0
    soft, _hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    return 0 if soft == resource.RLIM_INFINITY else soft
