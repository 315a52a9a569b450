"""The registry of live sessions: it limits, expires, evicts, aborts and counts them.

A session lives from accept to close. Its sockets belong to the thread that serves it, or to the relay loop; every other
thread may only shut them down, through here and under the lock, so that it never touches a descriptor that was closed
and used again. Any thread may call this.
"""
from __future__ import annotations

import collections
import itertools
import logging
import queue
import socket
import threading
from time import monotonic
from typing import Callable, Dict, Iterator, Optional

from ..net.addresses import Endpoint
from ..net.shares import Tally, fits, kept
from .counters import Counts, Shared, UserCounts
from .session import FIRST, Session

log = logging.getLogger(__name__)

GRACE_S = 0.25          # a newcomer is not evicted before
NO_LIMIT = float("inf")
UNKNOWN = "unknown"     # the origin of a connection from a load balancer, until its PROXY header is here
MAX_LEAVING = 32        # evicted sessions that still hold a descriptor, one of the spare ones
CANDIDATES = 256        # for eviction: so many of those that negotiate are looked at, the oldest ones
HEAVIEST = 3            # the weight of a UDP association: the connection, up to three sockets, one or two to wake it


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
        self._by_origin = bool(per_origin) or maximum != NO_LIMIT       # whether other processes' counts are asked for
        self._weights = Tally()                             # of all live sessions here, by origin
        # Below it there is a place for every origin: see fits().
        self._plenty = maximum_here - kept(maximum_here, HEAVIEST) if maximum == NO_LIMIT else 0
        self._live: Dict[socket.socket, Session] = {}
        self.get = self._live.get                           # get(sock): its session, or None
        self.negotiating: Dict[Session, None] = {}          # in the order in which they came; see _settle()
        self._leaving = 0
        self._closed = False

    def __len__(self) -> int:
        return len(self._live)

    def __iter__(self) -> Iterator[Session]:
        with self._lock:
            return iter(list(self._live.values()))

    def __getitem__(self, sock: socket.socket) -> Session:
        return self._live[sock]

    # ---- in and out -----------------------------------------------------------------------------------------------

    def admit(self, sock: socket.socket, client: Endpoint, origin: str = "") -> Session:
        """A new session. Raises Full when there is no room for it."""
        origin = origin or str(client.ip)
        session = Session(client, origin, sock)
        self._lock.acquire()                                # `with` takes twice as long
        try:
            if self._closed:
                raise Full("server", "stopped")
            if self.per_origin and origin != UNKNOWN and self.per_origin <= self._counts.of(origin):
                raise self._too_many_of(origin)
            if 0 < self.negotiating_max <= len(self.negotiating):
                self._evict()
            if self._weights.total >= self._plenty:
                self._find_place(origin, 1, 1)
            session.number = self._counts.enter(origin, self._by_origin)
            self._live[sock] = session
            self.negotiating[session] = None
            self._weights.add(origin, 1)
        finally:
            self._lock.release()
        return session

    def move(self, session: Session, client: Endpoint, origin: str) -> None:
        """The session is of this client, as a load balancer says: from now on it counts for `origin`. Raises Full, and
        has not moved, when the limits of that origin leave no place for it."""
        with self._lock:
            if session.ended_at or session.leaving:             # then it is not counted any more
                return
            if 0 < self.per_origin <= self._counts.of(origin):
                raise self._too_many_of(origin)
            session.weight, weight = 0, session.weight      # it is not evicted in its own favour, nor counted twice
            self._moves(session.origin, -1, -weight)
            try:
                self._find_place(origin, 1, weight)
                session.client, session.origin = client, origin
            finally:
                session.weight = weight
                self._moves(session.origin, 1, weight)

    def _moves(self, origin: str, sessions: int, weight: int) -> None:
        """Add to what is counted for an origin; negative numbers take away."""
        if self._by_origin:
            self._counts.add(origin, sessions)
        self._weights.add(origin, weight)

    def _too_many_of(self, origin: str) -> Full:
        return Full("max-per-client", "%d reached by %s" % (self.per_origin, origin))

    def grow(self, session: Session, weight: int, evict: bool = True) -> None:
        """The session will take as many descriptors as `weight` ordinary ones, at the expense of others if `evict`.
        Raises Full."""
        with self._lock:
            if session.ended_at:
                return
            more = weight - session.weight
            if more > 0:
                self._find_place(session.origin, 0, more, evict)
            session.weight = weight
            self._weights.add(session.origin, more)

    def _find_place(self, origin: str, sessions: int, weight: int, evict: bool = True) -> None:
        """Evict others, if that is wanted, until there is a place for so many more. Raises Full."""
        if self._fits(origin, sessions, weight):
            return
        # Two processes that admit at once may be beyond the maximum together.
        needed = weight + int(max(0, min(self._counts.live() - self.maximum, MAX_LEAVING)))
        # In the place of another origin's session it would still have more than its share: then one of its own.
        own = "" if self._fits(origin, sessions, weight, freed=needed) else origin
        for _ in range(needed):
            if not evict or self._leaving >= MAX_LEAVING or not self._evict(own):
                raise Full("max-sessions", "%d reached" % min(self.maximum, self.maximum_here))
            if self._fits(origin, sessions, weight):
                return

    def _fits(self, origin: str, sessions: int, weight: int, freed: int = 0) -> bool:
        """Whether there is a place for so many more of this origin, when `freed` others have left."""
        leaving = min(self._leaving, MAX_LEAVING)           # which are not counted any more, but hold descriptors
        origin = origin if origin != UNKNOWN else ""            # which holds none: nothing is kept from it
        return ((self.maximum == NO_LIMIT or not sessions
                 or fits(self.maximum, self._counts, origin, sessions, freed=freed))
                and (self.maximum_here == NO_LIMIT
                     or fits(self.maximum_here, self._weights, origin, weight, HEAVIEST, freed + leaving)))

    def _evict(self, origin: str = "") -> bool:
        """Shut down one session that is still negotiating (of this origin, if one is given), unless it is new."""
        oldest = list(self.negotiating)
        if origin:
            oldest = [session for session in oldest if session.origin == origin]
        before = monotonic() - GRACE_S
        oldest = [session for session in oldest[:CANDIDATES] if session.weight and session.started <= before]
        silent = [session for session in oldest if not session.greeted] or oldest
        if not silent:
            return False
        [(busiest, _)] = collections.Counter(session.origin for session in silent).most_common(1)
        victim = next(session for session in silent if session.origin == busiest)
        if not self._settle(victim):
            return False
        victim.leaving = True
        self._leaving += 1
        self._counts.leave(victim.origin, self._by_origin)  # other processes need not wait for it to go
        self._shut(victim, "evicted")
        return True

    def _settle(self, session: Session) -> bool:
        """It is not negotiating any more. False if that was so before: of two threads, the faster one decides what
        becomes of a session."""
        return self.negotiating.pop(session, session) is None

    def negotiated(self, session: Session) -> None:
        """The request is here: its deadline no longer holds, and it counts for its user. Raises Full."""
        user = session.user
        self.negotiating.pop(session, None)                     # needs no lock
        if user is None:
            return
        with self._lock:
            if session.ended_at:
                return
            self._users.add(user, 1)                            # first: two processes must not both take the last place
            if 0 < self.per_user < self._users.of(user):
                self._users.add(user, -1)
                raise Full("max-per-user", "%d reached" % self.per_user)
            session.counted_as = user

    def end(self, session: Session) -> bool:
        """It is over: its place is free, its facts are final, and its socket is the caller's, who closes that and then
        calls remove(). False if another thread was faster."""
        self._lock.acquire()
        try:
            if session.ended_at:
                return False
            session.ended_at = monotonic()
            self.negotiating.pop(session, None)
            if session.leaving:
                self._leaving -= 1
            else:
                self._counts.leave(session.origin, self._by_origin)
            self._weights.add(session.origin, -session.weight)
            if session.counted_as is not None:
                self._users.add(session.counted_as, -1)
        finally:
            self._lock.release()
        return True

    def remove(self, session: Session) -> None:
        """Take it out of the registry. Its socket is closed."""
        self._live.pop(session.sock, None)

    # ---- ending them ----------------------------------------------------------------------------------------------

    def expire(self) -> None:
        """Shut down the sessions that are over the handshake's deadline; the thread that serves each sees EOF."""
        if not self._live:
            with self._lock:
                if not self._live:
                    self._live.clear()                      # or it keeps the memory for as many as there ever were
        if not self.negotiating or not self.handshake_s:
            return
        since = monotonic() - self.handshake_s
        with self._lock:
            for session in itertools.takewhile(lambda session: session.started <= since, list(self.negotiating)):
                if session.started + session.extended_s <= since and self._settle(session):
                    self._shut(session, "handshake timeout")

    def extend(self, session: Session, seconds: float) -> None:
        """Let this handshake take so much longer: it waits for something of ours."""
        session.extended_s += seconds

    def close(self) -> None:
        """Admit no more. Without this, a connection accepted while the server is closed would be served for ever."""
        with self._lock:
            self._closed = True

    def abort(self, why: str) -> None:
        """End every session that has no tunnel or association; the relay loop ends the others. What is in its first
        moments ends after these."""
        with self._lock:
            for session in list(self._live.values()):       # remove() takes no lock
                if session.relay is FIRST:
                    session.ended_by = why
                elif not session.relay:
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
