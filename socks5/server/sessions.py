"""The registry of live sessions: it limits, expires, evicts, aborts and counts them.

A session lives from accept to close. Its sockets belong to the thread that serves it, or to the relay loop; every other
thread may only shut them down, through here and under the lock, so that it never touches a descriptor that was closed
and used again. Any thread may call this.
"""
from __future__ import annotations

import itertools
import logging
import queue
import socket
import threading
from time import monotonic
from typing import Any, Callable, Dict, Iterator, Optional, Tuple, Union

from ..commands.udp import Association
from ..net.addresses import Endpoint
from ..net.shares import ByOwner, Tally, fits
from ..protocol.facts import Facts
from ..protocol.fields import Host
from ..protocol.messages import Address
from ..relay.tunnel import Tunnel
from .counters import Counts, Shared, UserCounts
from .inbox import Record

log = logging.getLogger(__name__)

GRACE_S = 1.0           # a newcomer is not evicted before
NO_LIMIT = float("inf")
UNKNOWN = "unknown"     # the origin of a connection from a load balancer, until its PROXY header is here
MAX_LEAVING = 32        # evicted sessions that still hold a descriptor, one of the spare ones
HEAVIEST = 3            # the weight of a UDP association: the connection, up to three sockets, one or two to wake it


class Session:
    """What is known of one client, for the log, the table and the limits.

    number      unlike any other session's, also in other processes
    origin      what shares one limit: an IPv4 address, an IPv6 /64
    reached     the address that answered (CONNECT; the upstream's, if there is one) or called (BIND)
    rep         the name of the last reply's REP
    up, down    bytes from the client and to it, once the session is over; `moved` knows them before
    ended_by    "client", "remote", or the reason why we ended it; `why` is the error behind it
    notes       what is to be added to `why`
    judged      the host that the rules allowed, where `reached` is an upstream
    counted_as  the user for which it counts
    """

    __slots__ = ("number", "client", "origin", "sock", "started", "ended_at", "user", "cmd", "dst", "reached", "rep",
                 "tunnel", "association", "up", "down", "ended_by", "why", "notes", "greeted", "leaving", "weight",
                 "story", "record", "extended_s", "judged", "counted_as")

    def __init__(self, client: Endpoint, origin: str, sock: socket.socket) -> None:
        self.number = 0                             # until it is admitted
        self.client = client
        self.origin = origin
        self.sock = sock
        self.started = monotonic()
        self.ended_at = 0.0                         # by time.monotonic(), once it is over
        self.user: Optional[bytes] = None
        self.cmd = ""                               # until the request is there
        self.dst: Optional[Address] = None
        self.reached: Union[Endpoint, Address, None] = None
        self.rep = ""
        self.tunnel: Optional[Tunnel] = None
        self.association: Optional[Association] = None
        self.judged: Optional[Host] = None
        self.counted_as: Optional[bytes] = None
        self.up = 0
        self.down = 0
        self.ended_by = ""
        self.why = ""
        self.notes = ""
        self.extended_s = 0.0                       # so much longer than others may its handshake take
        self.greeted = False                        # its greeting is here: it speaks SOCKS5
        self.leaving = False                        # evicted, and its thread has not noticed yet
        self.weight = 1                             # how many pairs of descriptors it may take
        self.story: Any = None                      # the trace of this session
        self.record: Optional[Record] = None        # of its handshake, for the status page

    # The order in which a session's facts stand in the log.
    LINE = ("session client=%(client)s user=%(user)s cmd=%(cmd)s dst=%(dst)s reached=%(reached)s rep=%(rep)s "
            "up=%(up)d down=%(down)d seconds=%(seconds).3f ended=%(ended)s why=%(why)s")

    def facts(self) -> Facts:
        up, down = self.moved()
        return Facts(client=self.client, user=self.user, cmd=self.cmd, dst=self.dst, reached=self.reached, rep=self.rep,
                     up=up, down=down, seconds=(self.ended_at or monotonic()) - self.started,
                     ended=self.ended_by.replace(" ", "-"),
                     why="; ".join(filter(None, (self.why, self.notes))) if self.notes else self.why)

    def moved(self) -> Tuple[int, int]:
        """Bytes up and down until now."""
        tunnel, association = self.tunnel, self.association     # its own thread may take them away meanwhile
        if tunnel:
            return tunnel.up.total, tunnel.down.total
        return (association.up, association.down) if association else (self.up, self.down)

    def idle_s(self, now: float) -> Optional[float]:
        """For how many seconds no byte was relayed; None before there is a relay."""
        relay = self.tunnel or self.association
        return max(0.0, now - max(relay.moved_at, self.started)) if relay else None

    def state(self) -> str:
        """What it is doing, in a word."""
        tunnel = self.tunnel
        if self.ended_by or (tunnel and (tunnel.ended or tunnel.aborted)):
            return "closing"
        if tunnel:
            return "half-closed" if tunnel.up.done or tunnel.down.done else "relaying"
        if self.association:
            return "relaying"
        return "waiting" if self.cmd == "BIND" and self.rep else "connecting" if self.cmd else "negotiating"

    def step(self, word: str, **facts: object) -> None:
        """A line at DEBUG for a step of the negotiation, its facts in the order in which they are given."""
        said = Facts(client=self.client, **facts)
        log.debug(word + "".join(" %s=%%(%s)s" % (name, name) for name in said), said)


class Full(Exception):
    """There is no room for one more session: this limit is reached."""

    def __init__(self, limit: str, words: str) -> None:
        super().__init__("%s %s" % (limit, words))
        self.limit = limit


class Sessions:
    """The live sessions, by their client's socket.

    maximum          sessions at once, in all processes
    maximum_here     in this process, each with its weight: pairs of descriptors. Of both, the last tenth is kept for
                     origins that hold less than a tenth, so that a newcomer is served while one address holds the rest
    per_origin       sessions at once of one origin, in all processes; 0 for any number
    per_user         the same of one user
    negotiating_max  sessions before their request, in this process. Beyond it, and when a maximum is reached, a
                     connection that has not sent a greeting is evicted (if there is none, one in mid-login): the oldest
                     of the origin that has most of these
    """

    def __init__(self, maximum: float = NO_LIMIT, handshake_s: float = 0, per_origin: int = 0,
                 negotiating_max: int = 0, counts: Optional[Counts] = None, maximum_here: float = NO_LIMIT,
                 per_user: int = 0) -> None:
        self.maximum = maximum
        self.maximum_here = maximum_here
        self.per_origin = per_origin
        self.per_user = per_user
        self.negotiating_max = negotiating_max
        self.handshake_s = handshake_s
        self._lock = threading.Lock()
        self._counts = counts or Shared(1).row(0)
        self._users = UserCounts(self._counts)
        self._weights = Tally()                             # of all live sessions here, by origin
        self._live: Dict[socket.socket, Session] = {}
        self.get = self._live.get                           # get(sock): its session, or None
        self._negotiating: Dict[Session, None] = {}         # in the order in which they came
        self._silent: ByOwner[Session] = ByOwner()          # of these, by origin, those without a greeting
        self._greeted: ByOwner[Session] = ByOwner()         # and the others: see _evict()
        self._leaving = 0
        self._closed = False

    def __len__(self) -> int:
        return len(self._live)

    @property
    def negotiating(self) -> int:
        return len(self._negotiating)

    def __iter__(self) -> Iterator[Session]:
        with self._lock:
            return iter(list(self._live.values()))

    def __getitem__(self, sock: socket.socket) -> Session:
        return self._live[sock]

    # ---- in and out -----------------------------------------------------------------------------------------------

    def admit(self, sock: socket.socket, client: Endpoint, origin: str = "") -> Session:
        """A new session. Raises Full when there is no room for it."""
        session = Session(client, origin or str(client.ip), sock)
        with self._lock:
            if self._closed:
                raise Full("server", "stopped")
            if session.origin != UNKNOWN and 0 < self.per_origin <= self._counts.of(session.origin):
                raise self._too_many_of(session.origin)
            if 0 < self.negotiating_max <= len(self._negotiating):
                self._evict()
            self._find_place(session.origin, 1, 1)
            session.number = self._counts.number()
            self._live[sock] = session
            self._counts.add(session.origin, 1)
            self._weights.add(session.origin, 1)
            self._negotiating[session] = None
            self._silent.add(session.origin, session)
        return session

    def move(self, session: Session, client: Endpoint, origin: str) -> None:
        """The session is of this client, as a load balancer says: from now on it counts for `origin`. Raises Full, and
        has not moved, when the limits of that origin leave no place for it."""
        with self._lock:
            if self._live.get(session.sock) is not session:
                return
            if 0 < self.per_origin <= self._counts.of(origin):
                raise self._too_many_of(origin)
            self._silent.discard(session.origin, session)   # it is not evicted in its own favour, nor counted twice
            self._counts.add(session.origin, -1)
            self._weights.add(session.origin, -session.weight)
            try:
                self._find_place(origin, 1, session.weight)
                session.client, session.origin = client, origin
            finally:
                self._counts.add(session.origin, 1)
                self._weights.add(session.origin, session.weight)
                if session in self._negotiating:
                    self._silent.add(session.origin, session)

    def _too_many_of(self, origin: str) -> Full:
        return Full("max-per-client", "%d reached by %s" % (self.per_origin, origin))

    def grow(self, session: Session, weight: int) -> None:
        """The session will take as many descriptors as `weight` ordinary ones. Raises Full."""
        with self._lock:
            more = weight - session.weight
            if more > 0:
                self._find_place(session.origin, 0, more)
            session.weight = weight
            self._weights.add(session.origin, more)

    def _find_place(self, origin: str, sessions: int, weight: int) -> None:
        """Evict others until there is a place for so many more. Raises Full."""
        if self._fits(origin, sessions, weight):
            return
        # In the place of another origin's session it would still have more than its share: then one of its own.
        own = "" if self._fits(origin, sessions, weight, freed=weight) else origin
        for _ in range(weight):
            if self._leaving >= MAX_LEAVING or not self._evict(own):
                raise Full("max-sessions", "%d reached" % min(self.maximum, self.maximum_here))
            if self._fits(origin, sessions, weight):
                return

    def _fits(self, origin: str, sessions: int, weight: int, freed: int = 0) -> bool:
        """Whether there is a place for so many more of this origin, when `freed` others have left."""
        freed += min(self._leaving, MAX_LEAVING)
        origin = origin if origin != UNKNOWN else ""            # which holds none: nothing is kept from it
        return ((self.maximum == NO_LIMIT or not sessions
                 or fits(self.maximum, self._counts, origin, sessions, freed=freed))
                and (self.maximum_here == NO_LIMIT
                     or fits(self.maximum_here, self._weights, origin, weight, HEAVIEST, freed)))

    def _evict(self, origin: str = "") -> bool:
        """Shut down one session that is still negotiating (of this origin, if one is given), unless it is new.

        Sessions become `greeted` without a word to us, and are sorted out here when one is about to be evicted."""
        victim = self._silent.oldest(origin)
        while victim and victim.greeted:
            self._silent.discard(victim.origin, victim)
            self._greeted.add(victim.origin, victim)
            victim = self._silent.oldest(origin)
        victim = victim or self._greeted.oldest(origin)
        if not victim or monotonic() - victim.started < GRACE_S:
            return False
        self._settle(victim)
        victim.leaving = True
        self._leaving += 1
        self._shut(victim, "evicted")
        return True

    def _settle(self, session: Session) -> None:
        """It is not negotiating any more."""
        if session in self._negotiating:
            del self._negotiating[session]
            self._silent.discard(session.origin, session)
            self._greeted.discard(session.origin, session)

    def negotiated(self, session: Session) -> None:
        """The request is here: its deadline no longer holds, and it counts for its user. Raises Full."""
        user = session.user
        with self._lock:
            self._settle(session)
            if user is None or self._live.get(session.sock) is not session:
                return
            self._users.add(user, 1)                        # first: two processes must not both take the last place
            if 0 < self.per_user < self._users.of(user):
                self._users.add(user, -1)
                raise Full("max-per-user", "%d reached" % self.per_user)
            session.counted_as = user

    def end(self, session: Session) -> bool:
        """From now on its facts are final, and its socket is the caller's. False if another thread was faster."""
        with self._lock:
            if session.ended_at or self._live.get(session.sock) is not session:
                return False
            session.ended_at = monotonic()
        return True

    def remove(self, session: Session) -> bool:
        """Its place is free. False if it was removed before."""
        with self._lock:
            if self._live.pop(session.sock, None) is None:
                return False
            self._settle(session)
            self._leaving -= session.leaving
            self._counts.add(session.origin, -1)
            self._weights.add(session.origin, -session.weight)
            if session.counted_as is not None:
                self._users.add(session.counted_as, -1)
        return True

    # ---- ending them ----------------------------------------------------------------------------------------------

    def expire(self) -> None:
        """Shut down the sessions that are over the handshake's deadline; the thread that serves each sees EOF."""
        if not self._negotiating or not self.handshake_s:
            return
        since = monotonic() - self.handshake_s
        with self._lock:
            for session in list(itertools.takewhile(lambda session: session.started <= since, self._negotiating)):
                if session.started + session.extended_s <= since:
                    self._settle(session)
                    self._shut(session, "handshake timeout")

    def extend(self, session: Session, seconds: float) -> None:
        """Let this handshake take so much longer: it waits for something of ours."""
        session.extended_s += seconds

    def close(self) -> None:
        """Admit no more. Without this, a connection accepted while the server is closed would be served for ever."""
        with self._lock:
            self._closed = True

    def abort(self, why: str) -> None:
        """End every session that has no tunnel; the relay loop ends the others."""
        with self._lock:
            for session in self._live.values():
                if not session.tunnel:
                    self._shut(session, why)

    def wait_empty(self, timeout_s: float, hurry: threading.Event) -> bool:
        """Whether all sessions ended within timeout_s; `hurry` ends the wait at once."""
        deadline = monotonic() + timeout_s
        while self._live and monotonic() < deadline and not hurry.wait(0.02):
            pass
        return not self._live

    @staticmethod
    def _shut(session: Session, why: str) -> None:
        if session.ended_at:                            # its socket may be closed, and the descriptor used again
            return
        session.ended_by = session.ended_by or why      # it may be lingering after a refusal
        try:
            session.sock.shutdown(socket.SHUT_RDWR)
        except OSError:                                 # the client was faster
            pass


class Teller:
    """Calls hook(session) for every session that is over, one after the other, in a thread that does nothing else."""

    def __init__(self, hook: Callable[[Session], None]) -> None:
        self._hook = hook
        self._lock = threading.Lock()
        self._queue: "queue.SimpleQueue[Optional[Session]]" = queue.SimpleQueue()      # asked for its size: no lock
        self._thread: Optional[threading.Thread] = None

    def __len__(self) -> int:
        return self._queue.qsize()

    def tell(self, session: Session) -> None:
        self._queue.put(session)
        with self._lock:
            if self._thread is None:
                thread = threading.Thread(target=self._run, name="session_ended", daemon=True)
                try:
                    thread.start()
                except (RuntimeError, MemoryError):     # the next session tries again
                    return
                self._thread = thread

    def close(self, timeout_s: float) -> None:
        """Wait until the hook has been called for all."""
        self._queue.put(None)
        with self._lock:
            thread, self._thread = self._thread, None   # a session that ends later starts another one
        if thread:
            thread.join(timeout_s)
        else:
            self._run()

    def _run(self) -> None:
        for session in iter(self._queue.get, None):
            try:
                self._hook(session)
            except Exception:
                log.exception("bug in session_ended")
