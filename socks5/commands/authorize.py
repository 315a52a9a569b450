"""What one client may reach: DST of its requests, its callers and datagrams, by the rules that are in force.

Everything raises RequestRefused with the REP that the client is to get.
"""
from __future__ import annotations

import logging
from ipaddress import IPv4Address
from typing import Callable, Container, List, Optional, Sequence, Set, Tuple

from ..access.rules import Asker, Rules
from ..values import Upstream
from ..net.addresses import IP, Endpoint, is_here, unmapped
from ..net.resolver import name_in, normalise
from ..protocol.codes import Cmd, Rep
from ..protocol.errors import RequestRefused
from ..protocol.facts import Facts
from ..protocol.fields import Host
from ..protocol.messages import Address
from .bind import any_peer

log = logging.getLogger(__name__)

TOLD = 10                       # rules that one association may name in the log
Way = Tuple[Optional[Upstream], Sequence[Host]]
Resolve = Callable[[Host], Sequence[IP]]        # the addresses of a normalised host


class Authorizer:
    """Authorizes what one client asks for.

    rules      gives the rules in force, which a reload changes
    own_ports  those at which this server listens
    """

    _asker: Optional[Asker] = None

    def __init__(self, client: Endpoint, user: Optional[bytes], rules: Callable[[], Rules],
                 own_ports: Container[int]) -> None:
        self.client = client
        self.user = user
        self.rules = rules
        self.own_ports = own_ports

    def asker(self, cmd: Cmd) -> Asker:
        """The last Asker is kept: nearly all clients ask for one command."""
        if self._asker is None or self._asker.cmd is not cmd:
            self._asker = Asker(self.client.ip, self.user, cmd)
        return self._asker

    def normalised(self, cmd: Cmd, dst: Address) -> Host:
        """DST.ADDR in its normal form: an IP address, or a name in ASCII. Refused: X'04' for what is not a name, X'02'
        for a name that is denied whatever its address is, before anything is looked up."""
        host = IPv4Address(0) if cmd == Cmd.BIND and any_peer(dst) else normalise(dst.host)
        if isinstance(host, bytes):                             # an address is judged as such
            self.foresee(cmd, host, dst.port)
        return host

    def foresee(self, cmd: Cmd, name: bytes, port: int) -> None:
        """Refused: X'02' when no address of this name could be reached."""
        verdict = self.rules().foresee(self.asker(cmd), port, name)
        if not verdict.allowed:
            raise RequestRefused(Rep.NOT_ALLOWED, "denied by %s" % verdict.where)

    def reachable(self, dst: Address, resolve: Resolve) -> Sequence[IP]:
        """The addresses of a CONNECT's destination that this client may reach. A name is looked up anew; what was
        allowed is remembered for its address, and for as long as these rules are in force."""
        host, port, client, user = dst.host, dst.port, self.client.ip.packed, self.user
        if isinstance(host, bytes):
            host = normalise(host)
        rules = self.rules()
        if isinstance(host, bytes):
            any_name = client, user, port
            if any_name not in rules.known:
                self.foresee(Cmd.CONNECT, host, port)
                if not rules.named:                             # then it is the same for all names
                    rules.known.put(any_name, [])
            addresses = resolve(host)
            rules = self.rules()                                # a reload may have come during the lookup
            if len(addresses) > 1 or rules.named:
                return self.permitted(Cmd.CONNECT, host, port, addresses)
            host = addresses[0]                                 # judged as if the client had asked for it
        known = rules.known
        # By the address's bytes: to hash an address itself takes longer than all the rest.
        key = client, user, host.packed, port
        allowed = known.get(key)
        if allowed is None:
            host = unmapped(host)
            allowed = self.permitted(Cmd.CONNECT, host, port, [host])
            known.put(key, allowed)
        return allowed

    def permitted(self, cmd: Cmd, host: Host, port: int, addresses: Sequence[IP]) -> List[IP]:
        """Those of `addresses` that this client may reach. Refused: X'02' when there is none."""
        asker, rules, allowed, why = self.asker(cmd), self.rules(), [], ""
        name = host if rules.named and isinstance(host, bytes) else None
        for address in addresses:
            verdict = rules.judge(asker, address, port, name)
            if verdict.allowed:
                allowed.append(address)
            else:
                why = why or "%s denied by %s" % (address, verdict.where)
        if not allowed:
            raise RequestRefused(Rep.NOT_ALLOWED, why)
        return allowed

    def not_ourselves(self, addresses: Sequence[IP]) -> Sequence[IP]:
        """Those of `addresses` that do not lead back into this server, at one of its own ports, where the client would
        come a second time, as one of our own addresses: a rule "from" our network, or a limit for each client, would
        not know it any more. A client on this machine may: it gains nothing. Refused: X'02' when none is left."""
        if self.client.ip.is_loopback:
            return addresses
        others = [address for address in addresses if not is_here(address)]
        if not others:
            raise RequestRefused(Rep.NOT_ALLOWED, "%s is this proxy itself" % addresses[0])
        return others

    def way(self, cmd: Cmd, dst: Address, resolve: Resolve) -> Way:
        """Through which upstream, if any, and to what: permitted addresses, or a name that no rule needs resolved."""
        host, asker, rules = self.normalised(cmd, dst), self.asker(cmd), self.rules()
        name = name_in(host)
        verdict = rules.judge_name(asker, dst.port, name) if name and rules.config.upstream else None
        if verdict and name:
            if not verdict.allowed:
                raise RequestRefused(Rep.NOT_ALLOWED, "denied by %s" % verdict.where)
            return verdict.upstream, [name]
        return rules.first_way(asker, self.permitted(cmd, host, dst.port, resolve(host)), dst.port, name)

    def permits_caller(self, port: int, peer: IP) -> bool:
        """For a BIND that accepts any peer: may this one connect?"""
        return self.rules().judge(self.asker(Cmd.BIND), peer, port).allowed

    def associate(self) -> Asker:
        """Authorize UDP ASSOCIATE itself. Refused: X'02' when no datagram could be permitted."""
        asker = self.asker(Cmd.UDP_ASSOCIATE)
        verdict = self.rules().foresee(asker)
        if not verdict.allowed:
            raise RequestRefused(Rep.NOT_ALLOWED, "denied by %s" % verdict.where)
        self.told: Set[str] = set()             # rules that a line in the log has named
        return asker

    def permits_datagram(self, address: Optional[IP], port: int, host: Host) -> bool:
        """May this client's datagrams go there? Without an address: is it worth looking up? Logs once for each rule.

        Called in the relay loop: it must not wait."""
        asker, name, rules = self.asker(Cmd.UDP_ASSOCIATE), name_in(host), self.rules()
        verdict = rules.judge(asker, address, port, name) if address else rules.foresee(asker, port, name)
        if not verdict.allowed and verdict.where not in self.told and len(self.told) < TOLD:
            self.told.add(verdict.where)
            log.info("denied client=%(client)s user=%(user)s cmd=UDP_ASSOCIATE dst=%(dst)s why=%(why)s", Facts(
                client=self.client, user=self.user, dst=Address(address or host, port),
                why="denied by %s" % verdict.where))
        return verdict.allowed
