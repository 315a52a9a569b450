"""One client, from the first byte until its tunnel stands: read it next to RFC 1928, from section 3 to section 6.

Runs in the thread of an acceptor, or in one of its own. Deep code raises what the client is to be told; only `handle`
answers. The negotiation is blocking code without time-outs: the whole of it has one deadline, and Sessions.expire shuts
the connection down when that has passed. When the tunnel stands, the handler hands it over to the relay loop and ends.
"""
from __future__ import annotations

import logging
import socket
from functools import cached_property, partial
from ipaddress import IPv4Address
from socketserver import StreamRequestHandler
from time import monotonic
from typing import Any, Callable, Dict, List, Mapping, Optional, Sequence, Set, Tuple, Type, Union

from ..access import users
from ..access.logins import Verdict, origin_of as login_origin
from ..access.rules import Asker, Rules
from ..access.users import Users
from ..commands.bind import PeerWait, Rendezvous, any_peer, expected
from ..commands.connect import Source, connect
from ..commands.udp import Association
from ..commands.upstream import Chain, Links
from ..config import Config, Upstream
from ..net.addresses import IP, Endpoint, endpoint_of, ip_of, is_here, leaving
from ..net.listeners import tune
from ..net.lookups import Names
from ..net.resolver import name_in, normalise
from ..net.shares import Ports
from ..protocol.codes import Cmd, Method, Rep
from ..protocol.errors import ProtocolError, RequestRefused, rep_of
from ..protocol.facts import Facts
from ..protocol.fields import Host
from ..protocol.messages import (
    HTTP_HELP, SOCKS4_REFUSAL, UNSPECIFIED, VER, Address, Greeting, Login, LoginStatus, Reply, Request,
    Selection)
from ..protocol.trace import M, Sent
from ..relay.tunnel import Tunnel
from .counters import Meter
from .inbox import ClosedOnError, Inbox, LoginWait, Outbox, linger
from .sessions import HEAVIEST, Full, Session, Sessions

log = logging.getLogger(__name__)

Way = Tuple[Optional[Upstream], Sequence[Host]]
LEAST_S = 0.001             # of the connect timeout: 0 would mean for ever
TOLD = 10                   # rules that one association may name in the log


class Service:
    """What a Handler needs of its server."""

    config: Config
    users: Users
    rules: Rules
    names: Names
    bind_ports: Ports
    udp_ports: Ports
    sessions: Sessions
    meter: Meter
    server_address: Any
    methods: Mapping[int, Callable[[Handler], Optional[bytes]]]     # see MethodTable

    def session_of(self, request: socket.socket, client_address: Any) -> Session:
        raise NotImplementedError

    def relay(self, tunnel: Tunnel) -> None:
        raise NotImplementedError


class Handler(StreamRequestHandler):
    """Serves one client until its tunnel stands, or until it has ended without one.

    As StreamRequestHandler documents it; what differs: `rfile` hands over to the tunnel what it has read ahead, and
    `finish` is called when the tunnel stands, not when the session is over (that is Server.session_ended).
    """

    server: Service                                             # type: ignore[assignment]
    request: socket.socket

    def setup(self) -> None:
        self.connection = self.request
        if self.timeout is not None:
            self.connection.settimeout(self.timeout)
        self.rfile = self.inbox = Inbox(self.connection)
        self.session = self.server.session_of(self.request, self.client_address)
        self.story = self.session.story
        self.debug = log.isEnabledFor(logging.DEBUG)

    @cached_property
    def wfile(self) -> Outbox:                                  # type: ignore[override]
        return Outbox(self.connection)

    def finish(self) -> None:
        """Nothing to flush, and nothing to close: both sockets may be the relay loop's by now."""

    def handle(self) -> None:
        """Serve the client until its tunnel stands.                                     RFC 1928 §3 to §6"""
        session = self.session
        try:
            self.negotiate()                                    # §3 METHOD, then its sub-negotiation
            try:
                request = self.take(Request)                    # §4
                self.server.sessions.negotiated(session)
                session.cmd, session.dst = request.cmd.word, request.dst
                if self.debug:
                    session.step("request", cmd=session.cmd, dst=request.dst)
                COMMANDS[request.cmd](self, request.dst)        # §4 CONNECT | BIND | UDP ASSOCIATE
            except RequestRefused as exc:                       # §6: the answer, then close within 10 s
                session.ended_by, session.why = "refused", exc.why
                self.reply(exc.rep)
                linger(self.connection)
        except ProtocolError as exc:
            session.ended_by, session.why = "refused", str(exc)
            linger(self.connection)
        except (EOFError, OSError) as exc:                      # the client's doing, not our bug
            if not session.ended_by:                            # else we shut it down: that, not the EOF, is why
                session.ended_by, session.why = "client", str(getattr(exc, "strerror", None) or exc)

    def take(self, kind: Type[M]) -> M:
        """The client's next message."""
        record = self.session.record
        return record.take(kind, self.parse, self.inbox) if record else self.parse(kind)

    def parse(self, kind: Type[M]) -> M:
        return self.story.take(kind, self.inbox.read_exactly) if self.story else self.inbox.take(kind)

    def send(self, message: Sent) -> None:
        """One message of ours."""
        if self.story:
            self.story.sent(message, self.session.why)
        if self.session.record:
            self.session.record.sent(message)
        self.connection.sendall(message if isinstance(message, bytes) else message.pack())

    # ---- §3: the method, and who is it? ---------------------------------------------------------------------------

    def negotiate(self) -> None:
        """Agree on a METHOD and run its sub-negotiation. Raises ProtocolError when there is nothing to agree on."""
        if self.first() != VER:
            self.explain()
        offered = self.take(Greeting).methods
        self.session.greeted = True
        methods = self.server.methods
        method = users.choose(offered, methods)
        if self.debug:
            self.session.step("method", offered=offered.hex(), chosen="%02x" % method)
        self.send(Selection(method))
        if method not in methods:
            raise ProtocolError("no acceptable METHOD among %s" % (offered.hex(" ") if offered else "none"))
        self.session.user = methods[method](self)

    def explain(self) -> None:
        """Tell a client that does not speak SOCKS5 so, in its own protocol where we know it."""
        first = self.first()
        if first == 0x04:
            self.send(SOCKS4_REFUSAL)
            raise ProtocolError("a SOCKS4 client")
        if 0x41 <= first <= 0x5A:                               # a capital letter: GET, CONNECT, ...
            self.send(HTTP_HELP)
            raise ProtocolError("an HTTP client")
        raise ProtocolError("a TLS client" if first == 0x16 else "not SOCKS: first byte 0x%02x" % first)

    def first(self) -> int:
        """The next byte, which stays to be read. Raises EOFError."""
        seen = self.inbox.peek()
        if not seen:
            raise EOFError("client closed")
        return seen[0]

    def no_authentication(self) -> Optional[bytes]:
        return None

    def username_password(self) -> Optional[bytes]:
        """RFC 1929: one try. The name that was let in."""
        login, session, known = self.take(Login), self.session, self.server.users     # a reload makes others
        verdict = known.logins.judge(login_origin(session.client.ip, session.origin), login.uname, login.passwd,
                                     known.check, LoginWait(self))
        self.server.meter.login(verdict.value)
        if verdict is not Verdict.RIGHT:
            session.user = login.uname
            self.log_failure(verdict, login.uname)
            self.send(LoginStatus(0x01))
            raise ProtocolError("wrong user name or password" if verdict is Verdict.WRONG else
                                "too many logins are tried: the password was not looked at")
        session.step("login", user=login.uname)
        self.send(LoginStatus(0x00))
        return login.uname

    def log_failure(self, verdict: Verdict, uname: bytes) -> None:
        """README.rst: fail2ban looks for auth_failed. What was not looked at is logged now and then only."""
        facts = Facts(client=self.session.client.ip, user=uname)
        if verdict is Verdict.WRONG:
            log.warning("auth_failed client=%(client)s user=%(user)s", facts)
            return
        left_out = self.server.users.logins.lines_left_out()
        if left_out is not None:
            log.warning("auth_deferred client=%(client)s user=%(user)s left_out=%(left_out)d",
                        Facts(facts, left_out=left_out))

    # ---- §4: the commands; each tells its whole story -------------------------------------------------------------

    def connect(self, dst: Address) -> None:
        session, deadline = self.session, self.deadline()
        if self.server.config.upstream:
            host = self.authorized(Cmd.CONNECT, dst)
            upstream, hosts = self.way(Cmd.CONNECT, host, dst.port, partial(self.lookup, deadline))
            if upstream:
                self.connect_through(self.chain(upstream, deadline), hosts, dst.port)
                return
        else:
            hosts = self.reachable(dst, deadline)
        addresses = self.not_ourselves(dst.port, hosts)         # type: ignore[arg-type]    # no name is among them
        remote, ip = connect(addresses, dst.port, max(deadline - monotonic(), LEAST_S), self.connection, self.source())
        with ClosedOnError(remote):
            session.reached = Endpoint(ip, dst.port)
            try:
                tune(remote)
                here = endpoint_of(remote.getsockname())
            except OSError as exc:                              # reset already; Linux leaves that to the tunnel
                raise RequestRefused(rep_of(exc), "reset by the destination at once") from None
            self.reply(Rep.SUCCEEDED, here)
            self.relay(remote)

    def connect_through(self, chain: Chain, hosts: Sequence[Host], port: int) -> None:
        remote, bnd = chain.connect(hosts, port)
        with ClosedOnError(remote):
            self.session.reached, self.session.notes = chain.reached, "via %s" % chain.upstream.name
            self.reply(Rep.SUCCEEDED, bnd)                      # the upstream's own end: what the destination sees
            self.relay(remote)

    def bind(self, dst: Address) -> None:
        config, session = self.server.config, self.session
        host, deadline, permit = self.authorized(Cmd.BIND, dst), self.deadline(), partial(self.permits_caller, dst.port)
        upstream, peers = self.way(Cmd.BIND, host, dst.port, partial(expected, resolve=partial(self.lookup, deadline)))
        waiting: PeerWait
        if upstream:
            waiting = self.chain(upstream, deadline).bind(peers[0], dst.port, permit)
        else:
            waiting = Rendezvous(self.connection, peers, self.server.bind_ports,    # type: ignore[arg-type]
                                 config.advertise, permit, session.origin, config.out)
        with waiting:
            self.reply(Rep.SUCCEEDED, waiting.bnd)              # the first: where we listen, or the upstream
            remote, peer = waiting.wait(config.bind_timeout)
        with ClosedOnError(remote):                             # the listener is closed: one peer only
            session.reached, session.notes = peer, waiting.also("via %s" % upstream.name if upstream else "")
            self.inbox.held += waiting.early
            self.reply(Rep.SUCCEEDED, peer)                     # the second: who came
            self.relay(remote)

    def udp_associate(self, dst: Address) -> None:
        """DST says where the client means to send from; it may be wrong behind NAT, and is not needed."""
        config, session = self.server.config, self.session
        asker = self.asker(Cmd.UDP_ASSOCIATE)
        verdict = self.server.rules.foresee(asker)
        if not verdict.allowed:
            raise RequestRefused(Rep.NOT_ALLOWED, "denied by %s" % verdict.where)
        try:
            self.server.sessions.grow(session, HEAVIEST)
        except Full as exc:
            raise RequestRefused(Rep.GENERAL_FAILURE, str(exc)) from None
        self.told: Set[str] = set()             # rules that a line in the log has named
        way = (lambda *what: self.server.rules.way_of(asker, *what)) if config.upstream else None
        links = Links(self.chain, self.server.rules.upstreams(asker), self.deadline()) if config.upstream else Links()
        with links, Association(self.connection, session.client.ip, self.server.udp_ports, config.advertise,
                                self.server.names, self.permits_datagram, lambda: self.server.rules,
                                self.story.datagram if self.story else None, config.out, links, way) as association:
            self.reply(Rep.SUCCEEDED, association.bnd)
            session.association = association
            try:
                association.run(config.udp_idle_timeout)
            finally:
                session.up, session.down = association.up, association.down
                self.server.meter.udp(session, association)
                session.association = None                      # which refers to us, and we to the session
            session.ended_by = session.ended_by or association.ended_by
            session.why, session.notes = session.why or association.why, links.also(association.summary())

    def relay(self, remote: socket.socket) -> None:
        """Relay the first moments, and hand the tunnel over to the relay loop, which owns both sockets from here on.
        What the client sent behind its request goes first."""
        config = self.server.config
        if self.timeout is not None:
            self.connection.settimeout(None)
        self.server.relay(Tunnel(self.connection, remote, self.inbox.rest(), config.idle_timeout,
                                 config.half_closed_timeout, self.session, self.session.origin))

    def deadline(self) -> float:
        """When --connect-timeout is over, which begins now: with the lookup."""
        return monotonic() + (self.server.config.connect_timeout or float("inf"))

    def source(self) -> Optional[Source]:
        """By --out, the address from which we connect to a given one."""
        out = self.server.config.out
        return partial(leaving, out, ip_of(self.connection.getsockname())) if out else None

    def lookup(self, deadline: float, host: Host) -> Sequence[IP]:
        """The addresses of a normalised host. Raises RequestRefused; ConnectionResetError when the client has left."""
        return self.server.names.resolve(host, deadline, self.connection, self.session.origin)

    # ---- may this client do that? ---------------------------------------------------------------------------------

    def asker(self, cmd: Cmd) -> Asker:
        return Asker(self.session.client.ip, self.session.user, cmd)

    def authorized(self, cmd: Cmd, dst: Address) -> Host:
        """DST.ADDR in its normal form: an IP address, or a name in ASCII. Raises RequestRefused: X'04' for what is not
        a name, X'02' for a name that no address could make right, before anything is looked up."""
        host = IPv4Address(0) if cmd == Cmd.BIND and any_peer(dst) else normalise(dst.host)
        if isinstance(host, bytes):                             # an address is judged as such
            verdict = self.server.rules.foresee(self.asker(cmd), dst.port, host)
            if not verdict.allowed:
                raise RequestRefused(Rep.NOT_ALLOWED, "denied by %s" % verdict.where)
        return host

    def reachable(self, dst: Address, deadline: float) -> List[IP]:
        """The addresses of a CONNECT's destination that this client may reach. Raises RequestRefused. What was allowed
        is remembered for an address, and for as long as these rules are in force; for a name it is looked up anew."""
        known = self.server.rules.known
        key = self.session.client.ip, self.session.user, dst
        addresses = known.get(key)
        if addresses is None:
            host = self.authorized(Cmd.CONNECT, dst)
            addresses = self.permitted(Cmd.CONNECT, host, dst.port, self.lookup(deadline, host))
            if not isinstance(host, bytes):
                known.put(key, addresses)
        return addresses

    def permitted(self, cmd: Cmd, host: Host, port: int, addresses: Sequence[IP]) -> List[IP]:
        """Those of `addresses` that this client may reach. Raises RequestRefused X'02' when there is none."""
        asker, name, allowed, why = self.asker(cmd), name_in(host), [], ""
        for address in addresses:
            verdict = self.server.rules.judge(asker, address, port, name)
            if verdict.allowed:
                allowed.append(address)
            else:
                why = why or "%s denied by %s" % (address, verdict.where)
        if not allowed:
            raise RequestRefused(Rep.NOT_ALLOWED, why)
        return allowed

    def not_ourselves(self, port: int, addresses: List[IP]) -> List[IP]:
        """Those of `addresses` that do not lead back into this server, where the client would come a second time, as
        one of our own addresses: a rule "from" our network, or a limit for each client, would not know it any more.
        A client on this machine may: it gains nothing. Raises RequestRefused X'02' when none is left."""
        if port != self.server.server_address[1] or self.session.client.ip.is_loopback:
            return addresses
        others = [address for address in addresses if not is_here(address)]
        if not others:
            raise RequestRefused(Rep.NOT_ALLOWED, "%s is this proxy itself" % addresses[0])
        return others

    def way(self, cmd: Cmd, host: Host, port: int, resolve: Callable[[Host], Sequence[IP]]) -> Way:
        """Through which upstream, if any, and to what: permitted addresses, or a name that no rule needs resolved."""
        asker, rules, name = self.asker(cmd), self.server.rules, name_in(host)
        verdict = rules.judge_name(asker, port, name) if name and self.server.config.upstream else None
        if verdict and name:
            if not verdict.allowed:
                raise RequestRefused(Rep.NOT_ALLOWED, "denied by %s" % verdict.where)
            return verdict.upstream, [name]
        return rules.first_way(asker, self.permitted(cmd, host, port, resolve(host)), port, name)

    def chain(self, upstream: Upstream, deadline: float) -> Chain:
        return Chain(upstream, self.connection, self.lookup, self.source(), deadline, self.server.server_address[1])

    def permits_caller(self, port: int, peer: IP) -> bool:
        """For a BIND that accepts any peer: may this one connect?"""
        return self.server.rules.judge(self.asker(Cmd.BIND), peer, port).allowed

    def permits_datagram(self, address: Optional[IP], port: int, host: Host) -> bool:
        """May this client's datagrams go there? Without an address: is it worth looking up? Logs once for each rule."""
        asker, name, rules = self.asker(Cmd.UDP_ASSOCIATE), name_in(host), self.server.rules
        verdict = rules.judge(asker, address, port, name) if address else rules.foresee(asker, port, name)
        if not verdict.allowed and verdict.where not in self.told and len(self.told) < TOLD:
            self.told.add(verdict.where)
            log.info("denied client=%(client)s user=%(user)s cmd=UDP_ASSOCIATE dst=%(dst)s why=%(why)s", Facts(
                client=self.session.client, user=self.session.user, dst=Address(address or host, port),
                why="denied by %s" % verdict.where))
        return verdict.allowed

    # ---- §6: answers ----------------------------------------------------------------------------------------------

    def reply(self, rep: Rep, bnd: Union[Endpoint, Address, None] = None) -> None:
        self.session.rep = rep.word
        self.send(Reply(rep, Address(*bnd) if isinstance(bnd, Endpoint) else bnd or UNSPECIFIED))
        self.server.meter.replied(self.session)


COMMANDS: Dict[Cmd, Callable[[Handler, Address], None]] = {
    Cmd.CONNECT: Handler.connect,
    Cmd.BIND: Handler.bind,
    Cmd.UDP_ASSOCIATE: Handler.udp_associate,
}

# METHOD to the code of its sub-negotiation, which returns the user's name or raises ProtocolError.
MethodTable = Dict[int, Callable[[Handler], Optional[bytes]]]
ANONYMOUS: MethodTable = {Method.NO_AUTHENTICATION: Handler.no_authentication}
BY_PASSWORD: MethodTable = {Method.USERNAME_PASSWORD: Handler.username_password}
