"""Which rate limits hold for a session: --rate-per-client, --rate-per-user, and the rate of the rule that allows it.

The first two are buckets that all server processes share, that of a rule is the session's own. A reload makes new
Rates, which are applied to the sessions that live. Any thread may call.
"""
from __future__ import annotations

import threading
from time import monotonic
from typing import Any, Dict, List, Optional, Tuple, Union
from weakref import WeakValueDictionary

from ..access.rules import Asker, Rules, Verdict
from ..net.addresses import IP, Sockaddr, ip_of
from ..net.resolver import name_in, normalise
from ..protocol.codes import Cmd
from ..protocol.fields import Host
from ..protocol.messages import Datagram
from ..relay import limited
from ..relay.bucket import NEVER, Buckets, Flow, HeldBack, Limit, OwnBucket
from ..relay.loop import Loop
from ..relay.relay import Relay
from ..relay.tunnel import Tunnel
from ..values import OneWay, Rate
from .bind import any_peer
from .datagrams import remember

CLIENT, USER, RULE = "rate-per-client", "rate-per-user", "rule"
NAMES = (CLIENT, USER, RULE)
UP, DOWN = 0, 1
HELD_S = 2.0                                            # a session that waited so lately is held back by its rate
Limits = Tuple[List[Limit], List[Limit]]                # up and down
AnyRate = Union[Rate, Tuple[()]]


class Rates:
    """The limits in force. `on` says whether there is one."""

    def __init__(self, buckets: Buckets, rules: Rules) -> None:
        self._buckets = buckets
        self._lock = threading.Lock()
        self._put(rules)

    def _put(self, rules: Rules) -> None:
        config = rules.config
        self.rules = rules
        self.rated = rules.rated()
        self.on = bool(self.rated or config.rate_per_client or config.rate_per_user)
        self._limits: "WeakValueDictionary[Tuple[str, str, str], Limit]" = WeakValueDictionary()

    def renew(self, rules: Rules, loop: Optional[Loop]) -> None:
        """After a reload: put these in force, also for the tunnels of the loop."""
        before, rated = self.rules.config, self.rated
        with self._lock:
            self._put(rules)
        now = rules.config
        if loop is not None and (rated or self.rated or (now.rate_per_client, now.rate_per_user)
                                 != (before.rate_per_client, before.rate_per_user)):
            loop.change_all(self.apply)

    def apply(self, tunnel: Relay) -> None:
        """Put the limits in force for this tunnel. Called by the thread that relays it. An association looks itself:
        see Police."""
        session = tunnel.session
        if session is None or not isinstance(tunnel, Tunnel):       # None: it has ended
            return
        limits = self.shared(session)
        before = [[limit for limit in one if limit.name == RULE] for one in limited.limits_of(tunnel)]
        if self.rated or any(before):
            verdict = self._verdict(session)
            if verdict and verdict.allowed:
                self.add(limits, RULE, verdict.rate)
            else:                                       # no session is cut, nor does it gain by that
                for own, kept in zip(limits, before):
                    own += kept
        limited.limit(tunnel, *limits)

    def _verdict(self, session: Any) -> Optional[Verdict]:
        """That of the rule by which this session has its destination or peer."""
        if session.reached is None:                     # an embedder has made this tunnel
            return None
        asker = Asker(session.client.ip, session.user, Cmd[session.cmd])
        host, dst = session.judged or session.reached[0], session.dst
        if isinstance(host, bytes):
            return self.rules.judge_name(asker, dst.port, host)
        name = None if any_peer(dst) else name_in(normalise(dst.host))
        return self.rules.judge(asker, host, dst.port, name)

    def shared(self, session: Any) -> Limits:
        """The limits that this session shares with others of its client and user."""
        limits: Limits = ([], [])
        self.add(limits, CLIENT, self.rules.config.rate_per_client, session.origin)
        if session.user is not None:
            self.add(limits, USER, self.rules.config.rate_per_user, repr(session.user))
        return limits

    def add(self, limits: Limits, name: str, rate: AnyRate, whose: str = "") -> None:
        """Add those of one rate; without `whose` it is that of the session alone."""
        if not rate:
            return
        if rate.together and rate.up:
            both = self._limit(name, "both", whose, rate.up)
            limits[UP].append(both)
            limits[DOWN].append(both)
            return
        for at, way, one in ((UP, "up", rate.up), (DOWN, "down", rate.down)):
            if one:
                limits[at].append(self._limit(name, way, whose, one))

    def _limit(self, name: str, way: str, whose: str, one: OneWay) -> Limit:
        """That of this process for a bucket; all sessions of the client or user have the same one."""
        if not whose:
            return Limit(name, OwnBucket(), *one)
        with self._lock:
            found = self._limits.get((name, way, whose))
            if found is None:                           # another rate is another bucket: it begins full
                bucket = self._buckets.bucket(name.encode(), way.encode(), whose.encode(), repr(one).encode())
                found = self._limits[name, way, whose] = Limit(name, bucket, *one)
            return found

    def police(self, session: Any) -> Optional[Police]:
        """For the datagrams of a session; None where there is no limit."""
        return Police(self, session) if self.on else None


class Police:
    """Which datagrams of an association are within its rates. One thread calls, but for held_back().

    A datagram counts for the first rule that allows its remote, which is known by that rule's place (Verdict.where);
    "" stands for all rules without a rate. An upstream that resolves a name does not say to which address: an answer
    through it counts as that address does or, where no rule has a rate for it, as the last name with its port.
    """

    def __init__(self, rates: Rates, session: Any) -> None:
        self._rates = rates
        self._session = session
        self._asker = Asker(session.client.ip, session.user, Cmd.UDP_ASSOCIATE)
        self._flows: Dict[str, Tuple[Flow, Flow]] = {}          # by the rule that has the rate; "": no rule has one
        self._rules: Dict[Tuple[Any, ...], str] = {}            # the rule, by the remote's address, or "", and port
        self._headers: Dict[bytes, str] = {}                    # the same by the header in which an upstream names it

    def passes(self, way: int, size: int, rule: str) -> bool:
        """Whether a datagram with so much payload, which this rule allows, may pass now."""
        flow = (self._flows.get(rule) or self._open(rule))[way]
        return not flow.limits or flow.passes(max(size, 1), monotonic())

    def rule_to(self, address: Optional[IP], port: int, host: Host) -> str:
        """By which rule a remote is reached, which the client called `host`. No address: an upstream resolves that."""
        if not self._rates.rated:
            return ""
        rules, name = self._rates.rules, name_in(host) or None
        verdict = (rules.judge(self._asker, address, port, name) if address else
                   rules.judge_name(self._asker, port, name or b""))
        rule = verdict.where if verdict and verdict.allowed and verdict.rate else ""
        if rule and verdict and rule not in self._flows:
            self._open(rule, verdict.rate)
        return remember(self._rules, (str(address) if address else "", port), rule)

    def rule_from(self, remote: Sockaddr) -> str:
        """The same for the sender of an answer."""
        if not self._rates.rated:
            return ""
        known = self._rules.get(remote[:2])
        return self.rule_to(ip_of(remote), int(remote[1]), b"") if known is None else known

    def rule_of(self, header: bytes) -> str:
        """The same for the header of an answer that comes through an upstream."""
        if not self._rates.rated:
            return ""
        known = self._headers.get(header)
        if known is None:
            host, port = Datagram.parse(header).dst
            known = "" if isinstance(host, bytes) else self.rule_from((str(host), port))
            known = remember(self._headers, header, known or self._rules.get(("", port), ""))
        return known

    def _open(self, where: str, rate: AnyRate = ()) -> Tuple[Flow, Flow]:
        limits = self._rates.shared(self._session)
        self._rates.add(limits, RULE, rate)
        made = self._flows[where] = Flow(limits[UP]), Flow(limits[DOWN])
        return made

    def held_back(self) -> HeldBack:
        return max((flow.held_back for pair in list(self._flows.values()) for flow in pair), default=NEVER)

    def close(self) -> None:
        """Give back what is reserved."""
        for pair in self._flows.values():
            for flow in pair:
                flow.close()


def held_back(session: Any, now: float) -> str:
    """What holds this session back now or did within HELD_S; "" for nothing."""
    relay = session.relay
    last = relay.held_back() if relay else NEVER
    return last.name if now - last.at < HELD_S else ""
