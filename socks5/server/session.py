"""A session: what is known of one client, from accept to close, and how the log shows it.

Every thread that serves the session writes to it. The table of live sessions (SIGUSR1) reads what is there, in the
thread of serve_forever(); it costs a session nothing before.
"""
from __future__ import annotations

import logging
import os
import socket
from functools import cached_property
from time import monotonic
from typing import Any, Dict, Iterable, Optional, Tuple, Union

from ..net.addresses import Endpoint
from ..protocol.facts import NOTHING, Facts, LeanRecord, template
from ..protocol.fields import Host, text
from ..protocol.messages import Address
from ..relay.relay import Relay
from .inbox import Record

log = logging.getLogger(__name__)
FIRST = Relay()             # of a session whose first moments are relayed by its handler: there is nothing to ask

LIVE = ("live id=%(id)d client=%(client)s user=%(user)s cmd=%(cmd)s dst=%(dst)s state=%(state)s age=%(age).1f "
        "idle=%(idle)s up=%(up)d down=%(down)d rate=%(rate)d")


class Session:
    """What is known of one client, for the log, the table and the limits.

    number      unlike any other session's, also in other processes
    origin      what shares one limit: an IPv4 address, an IPv6 /64
    reached     the address that answered (CONNECT; the upstream's, if there is one) or called (BIND)
    rep         the name of the last reply's REP
    relay       its tunnel or association, as long as there is one; or FIRST
    up, down    bytes from the client and to it, once the session is over; `moved` knows them before
    ended_by    "client", "remote", or the reason why we ended it; `why` is the error behind it
    notes       what is to be added to `why`
    judged      the host that the rules allowed, where `reached` is an upstream
    counted_as  the user for which it counts
    """

    __slots__ = ("number", "client", "origin", "sock", "started", "ended_at", "user", "cmd", "dst", "reached", "rep",
                 "relay", "up", "down", "ended_by", "why", "notes", "greeted", "leaving", "weight",
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
        self.relay: Optional[Relay] = None
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

    def facts(self) -> Facts:
        up, down = self.moved()
        return Facts(client=self.client, user=self.user, cmd=self.cmd, dst=self.dst, reached=self.reached, rep=self.rep,
                     up=up, down=down, seconds=(self.ended_at or monotonic()) - self.started,
                     ended=self.ended_by.replace(" ", "-"), why=self.reason())

    def reason(self) -> str:
        return "; ".join(filter(None, (self.why, self.notes))) if self.notes else self.why

    def moved(self) -> Tuple[int, int]:
        """Bytes up and down until now."""
        relay = self.relay                          # the relay loop may take it away meanwhile
        return relay.moved() if relay else (self.up, self.down)

    def over(self, relay: Relay) -> None:
        """Its tunnel or association has ended: keep what that has done, and let go of it."""
        self.up, self.down = relay.moved()
        # We may have shut its connection down: that, not the EOF, is why.
        self.ended_by, self.why = self.ended_by or relay.ended_by, self.why or relay.why
        self.notes = relay.summary() or self.notes
        self.relay = relay.session = None

    def idle_s(self, now: float) -> Optional[float]:
        """For how many seconds no byte was relayed; None before there is a relay."""
        relay = self.relay
        return max(0.0, now - max(relay.moved_at, self.started)) if relay else None

    def state(self) -> str:
        """What it is doing, in a word."""
        relay = self.relay
        if self.ended_by or (relay and (relay.ended or relay.aborted)):
            return "closing"
        if relay:
            return relay.state()
        return "waiting" if self.cmd == "BIND" and self.rep else "connecting" if self.cmd else "negotiating"

    def step(self, word: str, **facts: object) -> None:
        """A line at DEBUG for a step of the negotiation, its facts in the order in which they are given."""
        said = Facts(client=self.client, **facts)
        log.debug(template(word, said), said)


class SessionRecord(LeanRecord):
    """The line of a session that is over. Its facts are made when they are asked for: text does not need them."""

    @cached_property
    def args(self) -> Any:                          # type: ignore[override]
        return self.source.facts()

    @cached_property
    def msg(self) -> str:                           # type: ignore[override]
        return template("session", self.args)

    def text(self) -> str:
        """The same, several times as fast. Only user, a name as DST and reason need quotes; we chose the rest."""
        session: Session = self.source
        user, dst, reached = session.user, session.dst, session.reached
        why = session.reason() if session.notes else session.why
        to = dst.text() if dst else NOTHING
        at = to if reached is dst else reached.text() if reached else NOTHING
        return (f"session client={session.client.text()} user={NOTHING if user is None else text(user)} "
                f"cmd={session.cmd or NOTHING} dst={to} reached={at} rep={session.rep or NOTHING} up={session.up} "
                f"down={session.down} seconds={session.ended_at - session.started:.3f} "
                f"ended={session.ended_by.replace(' ', '-') or NOTHING} why={ascii(why) if why else NOTHING}")


def tell(logger: logging.Logger, level: int, session: Session) -> None:
    """Log that the session is over."""
    if logger.isEnabledFor(level):
        logger.handle(SessionRecord(logger.name, level, session))


class Table:
    """Remembers the totals of the last time, for the rates."""

    def __init__(self) -> None:
        self._before: Dict[int, Tuple[float, int]] = {}         # id: when, and bytes both ways

    def log(self, sessions: Iterable[Session]) -> None:
        """One line for each session, the oldest first, and a line with their number."""
        seen = {}
        for session in sorted(sessions, key=lambda session: session.number):
            facts = self.facts(session)
            seen[session.number] = monotonic(), int(facts["up"]) + int(facts["down"])
            log.info(LIVE, facts)
        self._before = seen
        log.info("live sessions=%(sessions)d pid=%(pid)d", Facts(sessions=len(seen), pid=os.getpid()))

    def facts(self, session: Session) -> Facts:
        """`rate` is bytes a second, both ways together, since the last table, or since the session began."""
        now = monotonic()
        facts = session.facts()
        up, down = session.moved()
        when, before = self._before.get(session.number, (session.started, 0))
        idle_s = session.idle_s(now)
        return Facts(facts, id=session.number, state=session.state(), age=now - session.started,
                     idle=None if idle_s is None else round(idle_s, 1), up=up, down=down,
                     rate=round((up + down - before) / max(now - when, 0.001)))
