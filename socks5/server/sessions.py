"""Who is connected: the registry that caps, expires, aborts and counts sessions.

A session lives from accept to close. Its socket belongs to the thread that serves it; everybody else may only shut it
down, through here and under the lock, so that nobody ever touches a descriptor that was closed and used again.
"""
from __future__ import annotations

import itertools
import logging
import socket
import threading
from collections import defaultdict
from time import monotonic
from typing import TYPE_CHECKING, Callable, Dict, Hashable, Iterator, List, Optional, Tuple, TypeVar, Union

from .counters import Counts, Shared
from ..protocol.fields import text
from ..protocol.messages import Address
from ..net.addresses import Endpoint

if TYPE_CHECKING:
    from ..relay.tunnel import Tunnel               # a neighbour, which is only held and told to end
    from ..commands.udp import Association            # the same

T = TypeVar("T")
log = logging.getLogger(__name__)

GRACE_S = 1.0           # nobody is called silent before: whoever is fast is never in the way
NO_LIMIT = float("inf")
LEAVING = 32            # whoever was shut down holds one of the spare descriptors until its thread has noticed


class Session:
    """What there is to know about one client, for the log and for whoever watches."""

    __slots__ = ("number", "client", "origin", "sock", "started", "user", "cmd", "dst", "reached", "rep", "tunnel",
                 "association", "up", "down", "ended_by", "why", "leaving", "extended_s")

    def __init__(self, client: Endpoint, origin: Hashable, sock: socket.socket) -> None:
        self.number = 0                             # it has one as soon as it is let in
        self.client = client
        self.origin = origin
        self.sock = sock
        self.started = monotonic()
        self.user: Optional[bytes] = None
        self.cmd = ""                               # "" until the request is there
        self.dst: Optional[Address] = None
        self.reached: Optional[Endpoint] = None      # the address that answered, or called
        self.rep = ""                               # of the last reply
        self.tunnel: Optional[Tunnel] = None
        self.association: Optional[Association] = None
        self.up = 0
        self.down = 0
        self.ended_by = ""
        self.why = ""
        self.leaving = False                        # shut down to make room
        self.extended_s = 0.0                       # so much longer than others may its handshake take

    # The order in which a session's facts stand in the log; a fact that there is not is "-".
    LINE = ("session client=%(client)s user=%(user)s cmd=%(cmd)s dst=%(dst)s reached=%(reached)s rep=%(rep)s "
            "up=%(up)d down=%(down)d seconds=%(seconds).3f ended=%(ended)s why=%(why)s")

    def facts(self) -> Dict[str, Union[str, int, float]]:
        dst = str(self.dst or "-")
        return {"client": str(self.client), "user": "-" if self.user is None else text(self.user),
                "cmd": self.cmd or "-", "dst": dst,
                "reached": str(self.reached or "-"), "rep": self.rep or "-",
                "up": self.up, "down": self.down, "seconds": monotonic() - self.started,
                "ended": self.ended_by.replace(" ", "-") or "-", "why": ascii(self.why) if self.why else "-"}

    def moved(self) -> Tuple[int, int]:
        """Bytes up and down until now."""
        tunnel, association = self.tunnel, self.association     # its own thread may take them away meanwhile
        if tunnel:
            return tunnel.up.total, tunnel.down.total
        return (association.up, association.down) if association else (self.up, self.down)

    def state(self) -> str:
        """What it is doing, in a word."""
        tunnel = self.tunnel
        if self.ended_by or (tunnel and tunnel.aborted):
            return "closing"
        if tunnel:
            return "half-closed" if tunnel.up.done or tunnel.down.done else "relaying"
        if self.association:
            return "relaying"
        return "waiting" if self.cmd == "BIND" and self.rep else "connecting" if self.cmd else "negotiating"

    def step(self, word: str, **facts: object) -> None:
        """A line at DEBUG for a step of the negotiation, its facts in the order in which they are given."""
        if log.isEnabledFor(logging.DEBUG):
            said = {name: fact.hex() or "-" if isinstance(fact, bytes) else str(fact) for name, fact in facts.items()}
            said = dict(client=str(self.client), **said)
            log.debug(word + "".join(" %s=%%(%s)s" % (name, name) for name in said), said)


class Full(Exception):
    """There is no room for one more session: this limit is reached."""

    def __init__(self, limit: str, words: str) -> None:
        super().__init__("%s %s" % (limit, words))
        self.limit = limit


class Sessions:
    """The live sessions, by their client's socket.

    most              of them at once, in all processes; and `most_here`, in this one
    most_per_origin   of these from one origin, 0 for any number; an origin is who shares one limit: an IPv4 address, an
                      IPv6 /64
    most_negotiating  before their request. Beyond it, and when there is no room at all, the origin with most of them
                      loses the one that has been at it longest: silence crowds out nobody but the silent.
    """

    def __init__(self, most: float, handshake_s: float, most_per_origin: int = 0, most_negotiating: int = 0,
                 counts: Optional[Counts] = None, most_here: float = NO_LIMIT) -> None:
        self.most = most
        self.most_here = most_here
        self.handshake_s = handshake_s
        self.most_per_origin = most_per_origin
        self.most_negotiating = most_negotiating
        self._counts = counts or Shared(1).row(0)
        self._lock = threading.Lock()
        self._live: Dict[socket.socket, Session] = {}
        self._negotiating: Dict[Session, None] = {}     # the oldest, whose deadline comes first, first
        self._negotiating_of: Dict[Hashable, Dict[Session, None]] = defaultdict(dict)
        self.peak = 0                                   # most there have been
        self._leaving = 0                               # shut down to make room, and not gone yet

    def __len__(self) -> int:
        return len(self._live)

    @property
    def negotiating(self) -> int:
        return len(self._negotiating)

    def __iter__(self) -> Iterator[Session]:
        with self._lock:
            return iter(list(self._live.values()))

    def with_sockets(self, session: Session, ask: Callable[[List[socket.socket]], Optional[T]]) -> Optional[T]:
        """What ask() says of its TCP connections, which nobody can close meanwhile; None when they are closed."""
        with self._lock:
            if session.sock not in self._live:
                return None
            return ask([session.sock, session.tunnel.remote] if session.tunnel else [session.sock])

    def __getitem__(self, sock: socket.socket) -> Session:
        return self._live[sock]

    def admit(self, sock: socket.socket, client: Endpoint, origin: Hashable = None) -> Session:
        """A new session. Raises Full when there is no room for it."""
        session = Session(client, client.ip if origin is None else origin, sock)
        with self._lock:
            mine = self._counts.of(session.origin) if self.most_per_origin else 0
            if 0 < self.most_per_origin <= mine:
                raise Full("max-per-client", "%d reached by %s" % (self.most_per_origin, session.origin))
            if 0 < self.most_negotiating <= len(self._negotiating):
                self._make_room()
            here, leaving = len(self._live), self._leaving and min(self._leaving, LEAVING)
            full = (here - leaving >= self.most_here
                    or self.most < NO_LIMIT and self._counts.live() - leaving >= self.most)
            if full and not (self._leaving < LEAVING and self._make_room()):
                raise Full("max-sessions", "%d reached" % min(self.most, self.most_here))
            session.number = self._counts.number()
            self._live[sock] = session
            self.peak = here + 1 if here >= self.peak else self.peak
            self._counts.add(session.origin, 1)
            self._negotiating[session] = None
            self._negotiating_of[session.origin][session] = None
        return session

    def _make_room(self) -> bool:
        """Shut down the longest negotiating session of the origin that has most of them, unless it is new as well."""
        if not self._negotiating:
            return False
        busiest: Dict[Session, None] = max(self._negotiating_of.values(), key=len)
        victim = next(iter(busiest))
        if monotonic() - victim.started < GRACE_S:
            return False
        self._settle(victim)
        victim.leaving = True
        self._leaving += 1
        self._shut(victim, "crowded out")
        return True

    def _settle(self, session: Session) -> None:
        """It is no longer negotiating."""
        if session in self._negotiating:
            del self._negotiating[session]
            mine = self._negotiating_of[session.origin]
            del mine[session]
            if not mine:
                del self._negotiating_of[session.origin]

    def remove(self, sock: socket.socket) -> None:
        """To be called before `sock` is closed."""
        with self._lock:
            session = self._live.pop(sock, None)
            if session:
                self._settle(session)
                self._leaving -= session.leaving
                self._counts.add(session.origin, -1)

    def negotiated(self, session: Session) -> None:
        """The request is here: the handshake's deadline no longer holds."""
        with self._lock:
            self._settle(session)

    def attach(self, session: Session, tunnel: Tunnel) -> None:
        with self._lock:
            session.tunnel = tunnel

    def detach(self, session: Session) -> None:
        """To be called before the tunnel's remote is closed."""
        with self._lock:
            tunnel, session.tunnel = session.tunnel, None
        if tunnel:
            session.up, session.down = tunnel.up.total, tunnel.down.total
            session.ended_by, session.why = tunnel.ended_by, tunnel.why

    def expire(self) -> None:
        """Shut down whoever is over the handshake's deadline; the thread that serves it sees EOF and closes."""
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

    def abort(self, why: str) -> None:
        """End every session, now."""
        with self._lock:
            for session in self._live.values():
                if session.tunnel:
                    session.tunnel.abort(why)
                else:
                    self._shut(session, why)

    def wait_empty(self, timeout_s: float, hurry: threading.Event) -> bool:
        """Whether all sessions ended within timeout_s; `hurry` ends the wait at once."""
        deadline = monotonic() + timeout_s
        while self._live and monotonic() < deadline and not hurry.wait(0.02):
            pass
        return not self._live

    @staticmethod
    def _shut(session: Session, why: str) -> None:
        session.ended_by = why
        try:
            session.sock.shutdown(socket.SHUT_RDWR)
        except OSError:                                 # the client was faster
            pass
