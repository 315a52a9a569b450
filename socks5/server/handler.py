"""One client, from the first byte until its tunnel stands: read it next to RFC 1928, from section 3 to section 6.

Runs in the thread of an acceptor, or in one of its own. Deep code raises what the client is to be told; only `handle`
answers. The negotiation is blocking code without time-outs: the whole of it has one deadline, and Sessions.expire shuts
the connection down when that has passed. When the tunnel stands, the handler hands it over to the relay loop and ends.
"""
from __future__ import annotations

import logging
import socket
from functools import cached_property, partial
from socketserver import StreamRequestHandler
from time import monotonic
from typing import Any, Callable, Dict, FrozenSet, Mapping, Optional, Sequence, Type

from ..access import users
from ..access.logins import Verdict, origin_of as login_origin
from ..access.rules import Rules
from ..access.users import Users
from ..commands.authorize import Authorizer
from ..commands.bind import PeerWait, Rendezvous, expected
from ..commands.connect import connect
from ..commands.dialogue import Dialogue
from ..commands.rates import Rates
from ..commands.udp import Association
from ..commands.upstream import Chain, Links
from ..config import Config
from ..values import Upstream
from ..net.addresses import IP, Endpoint, ip_in, ip_of, leaving
from ..net.listeners import keep_alive, tune
from ..net.lookups import Names
from ..net.shares import Ports
from ..protocol.codes import Cmd, Method, Rep
from ..protocol.envelope import Envelope
from ..protocol.errors import ProtocolError, RequestRefused, rep_of
from ..protocol.facts import Facts
from ..protocol.fields import Host, new_tuple
from ..protocol.messages import (
    HTTP_HELP, REPLY_HEADS, SELECTIONS, SOCKS4_REFUSAL, UNSPECIFIED, VER, Address, Greeting, Login, LoginStatus, Reply,
    Request, Selection, pack_address)
from ..protocol.proxy import begins
from ..protocol.trace import M, Sent
from ..relay.busy import FIRST_AVAILABLE, First
from ..relay.loop import Loop
from ..relay.pipe import reset_on_close
from ..relay.protected import ProtectedTunnel
from ..relay.relay import Relay
from ..relay.tunnel import Tunnel
from .counters import Meter
from .inbox import Inbox, InboxFile, LoginWait, Outbox, linger
from .principal import by_gssapi
from .session import FIRST, Session
from .sessions import HEAVIEST, Full, Sessions

log = logging.getLogger(__name__)
FEW_NEGOTIATING = 1         # clients at a time, beside those whose connections are relayed
GREETS = bytes([VER])       # how a client begins that speaks SOCKS5
SUCCEEDED = Rep.SUCCEEDED   # to look up a member of an enum takes longer


class Service:
    """What a Handler needs of its server."""

    config: Config
    users: Users
    rules: Rules
    rates: Rates
    names: Names
    bind_ports: Ports
    udp_ports: Ports
    sessions: Sessions
    meter: Meter
    server_address: Any
    own_ports: FrozenSet[int]                       # of all listeners
    methods: Mapping[int, Callable[[Handler], Optional[bytes]]]     # see MethodTable

    def rules_in_force(self) -> Rules:
        return self.rules

    def session_of(self, request: socket.socket, client_address: Any) -> Session:
        raise NotImplementedError

    def relay(self, tunnel: Relay) -> None:
        raise NotImplementedError

    def relay_loop(self) -> Loop:
        raise NotImplementedError


class Handler(StreamRequestHandler):
    """Serves one client until its tunnel stands, or until it has ended without one.

    As StreamRequestHandler documents it; what differs: `rfile` hands over to the tunnel what it has read ahead, and
    `finish` is called when the tunnel stands, not when the session is over (that is Server.session_ended).
    """

    AuthorizerClass = Authorizer                    # to be replaced where you decide what may be reached
    server: Service                                             # type: ignore[assignment]
    request: socket.socket

    def setup(self) -> None:
        self.connection = self.request
        if self.timeout is not None:
            self.connection.settimeout(self.timeout)
        server, request = self.server, self.request
        self.session = session = server.sessions.get(request) or server.session_of(request, self.client_address)
        self.inbox = Inbox(self.connection, session.record, session.story)
        self.opened: Any = None                                 # closed if the command fails
        self.envelope: Optional[Envelope] = None                # of a client that came by GSSAPI, if it is protected
        self.dialogue: Optional[Dialogue] = None                # with the upstream that `remote` is
        self.debug = log.isEnabledFor(logging.DEBUG)

    @cached_property
    def rfile(self) -> InboxFile:                               # type: ignore[override]
        return InboxFile(self.inbox)

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
            server = self.server
            self.may = self.AuthorizerClass(session.client, session.user, server.rules_in_force, server.own_ports)
            try:
                cmd, dst = self.inbox.take(Request)             # §4
                session.cmd, session.dst = cmd.word, dst
                if self.debug:
                    session.step("request", cmd=session.cmd, dst=dst)
                try:
                    server.sessions.negotiated(session)
                except Full as exc:                             # --max-per-user
                    raise RequestRefused(Rep.NOT_ALLOWED, str(exc)) from None
                # When --connect-timeout is over, which begins now: with the lookup.
                self.deadline = monotonic() + (server.config.connect_timeout or float("inf"))
                try:
                    COMMANDS[cmd](self, dst)                    # §4 CONNECT | BIND | UDP ASSOCIATE
                except BaseException:
                    if self.opened is not None:
                        if session.relay is FIRST:              # what has been relayed is not all
                            reset_on_close(self.connection)
                            reset_on_close(self.opened)
                        self.opened.close()
                    raise
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
        return self.inbox.take(kind)

    def send(self, message: Sent) -> None:
        """One message of ours."""
        self.send_packed(type(message), message if isinstance(message, bytes) else message.pack())

    def send_packed(self, kind: Type[Any], raw: bytes) -> None:
        """The same, as its type and its bytes."""
        inbox = self.inbox
        if inbox.story or inbox.record is not None:
            inbox.sent(kind, raw, self.session.why)
        self.connection.sendall(self.envelope.seal(raw) if self.envelope else raw)

    # ---- §3: the method, and the user ----------------------------------------------------------------------------

    def negotiate(self) -> None:
        """Agree on a METHOD and run its sub-negotiation. Raises ProtocolError when there is nothing to agree on."""
        if self.inbox.peek()[:1] != GREETS:
            self.explain()
        offered, session, methods = self.inbox.take(Greeting).methods, self.session, self.server.methods
        session.greeted = True
        method = users.choose(offered, methods)
        if self.debug:
            session.step("method", offered=offered.hex(), chosen="%02x" % method)
        self.send_packed(Selection, SELECTIONS[method])
        if method not in methods:
            raise ProtocolError("no acceptable METHOD among %s" % (offered.hex(" ") if offered else "none"))
        session.user = methods[method](self)

    def explain(self) -> None:
        """Tell a client that does not speak SOCKS5 so, in its own protocol where we know it."""
        seen = self.inbox.peek()
        if not seen:
            raise EOFError("client closed")
        first = seen[0]
        if begins(seen):
            raise ProtocolError("a PROXY header, which only a source in --proxy-protocol may send, and once")
        if first == 0x04:
            self.send(SOCKS4_REFUSAL)
            raise ProtocolError("a SOCKS4 client")
        if 0x41 <= first <= 0x5A:                               # a capital letter: GET, CONNECT, ...
            self.send(HTTP_HELP)
            raise ProtocolError("an HTTP client")
        raise ProtocolError("a TLS client" if first == 0x16 else "not SOCKS: first byte 0x%02x" % first)

    def no_authentication(self) -> Optional[bytes]:
        return None

    def username_password(self) -> Optional[bytes]:
        """RFC 1929: one try. The name that was let in."""
        login, session, known = self.take(Login), self.session, self.server.users     # a reload makes others
        verdict = known.logins.judge(login_origin(session.client.ip, session.origin), login.uname, login.passwd,
                                     known.check, LoginWait(self))
        if verdict is not Verdict.RIGHT:
            self.login_failed(verdict, login.uname)
            self.send(LoginStatus(0x01))
            raise ProtocolError("wrong user name or password" if verdict is Verdict.WRONG else
                                "the password was not looked at: too many logins are tried, or no memory is left")
        self.server.meter.login(verdict.value)
        session.step("login", user=login.uname)
        self.send(LoginStatus(0x00))
        return login.uname

    def login_failed(self, verdict: Verdict, user: Optional[bytes]) -> None:
        """Count and log it. README.rst: fail2ban looks for auth_failed. What was deferred is logged now and then."""
        self.session.user = user
        self.server.meter.login(verdict.value)
        facts = Facts(client=self.session.client.ip, user=user)
        if verdict is Verdict.WRONG:
            log.warning("auth_failed client=%(client)s user=%(user)s", facts)
            return
        left_out = self.server.users.logins.lines_left_out()
        if left_out is not None:
            log.warning("auth_deferred client=%(client)s user=%(user)s left_out=%(left_out)d",
                        Facts(facts, left_out=left_out))

    # ---- §4: the commands; each tells its whole story -------------------------------------------------------------

    def connect(self, dst: Address) -> None:
        config, host, port = self.server.config, dst.host, dst.port
        if config.upstream:
            upstream, hosts = self.may.way(Cmd.CONNECT, dst, self.lookup)
            if upstream:
                self.connect_through(self.chain(upstream), hosts, port)
                return
            addresses: Sequence[IP] = hosts                     # type: ignore[assignment]  # no name is among them
        else:
            addresses = self.may.reachable(dst, self.lookup)
        if port in self.may.own_ports:
            addresses = self.may.not_ourselves(addresses)
        remote, ip = connect(addresses, port, self.deadline, self.connection, self.source if config.out else None,
                             self.has_room)
        self.opened = remote
        self.session.reached = dst if ip is host else new_tuple(Endpoint, (ip, port))
        try:
            tune(remote)
            here = remote.getsockname()
        except OSError as exc:                                  # reset already; Linux leaves that to the tunnel
            raise RequestRefused(rep_of(exc), "reset by the destination at once") from None
        self.reply(SUCCEEDED, ip_in(here[0]), here[1])
        self.relay(remote)

    def connect_through(self, chain: Chain, hosts: Sequence[Host], port: int) -> None:
        dialogue, bnd = chain.connect(hosts, port)
        self.opened, self.dialogue = dialogue.sock, dialogue
        self.session.reached, self.session.notes = chain.reached, "via %s" % chain.upstream.name
        self.session.judged = chain.asked
        self.reply(SUCCEEDED, *bnd)                             # the upstream's own end: what the destination sees
        self.relay(dialogue.sock)

    def bind(self, dst: Address) -> None:
        config, session = self.server.config, self.session
        permit = partial(self.may.permits_caller, dst.port)
        upstream, peers = self.may.way(Cmd.BIND, dst, partial(expected, resolve=self.lookup))
        waiting: PeerWait
        if upstream:
            waiting = self.chain(upstream).bind(peers[0], dst.port, permit)
        else:
            waiting = Rendezvous(self.connection, peers, self.server.bind_ports,    # type: ignore[arg-type]
                                 config.advertise, permit, session.origin, config.out)
        with waiting:
            self.reply(SUCCEEDED, *waiting.bnd)                 # the first: where we listen, or the upstream
            remote, peer = waiting.wait(config.bind_timeout)
        self.opened, self.dialogue = remote, waiting.dialogue   # the listener is closed: one peer only
        session.reached, session.notes = peer, waiting.also("via %s" % upstream.name if upstream else "")
        self.inbox.feed(waiting.early)
        self.reply(SUCCEEDED, *peer)                            # the second: the peer that has connected
        self.relay(remote)

    def udp_associate(self, dst: Address) -> None:
        """DST says where the client means to send from; it may be wrong behind NAT, and is not needed."""
        server, config, session = self.server, self.server.config, self.session      # it outlives this handler
        asker = self.may.associate()
        try:
            server.sessions.grow(session, HEAVIEST)
        except Full as exc:
            raise RequestRefused(Rep.GENERAL_FAILURE, str(exc)) from None
        way = (lambda *what: server.rules.way_of(asker, *what)) if config.upstream else None
        links = Links(self.chain, server.rules.upstreams(asker)) if config.upstream else None
        self.opened = links
        self.opened = association = Association(                # which closes the links, too
            self.connection, session.client.ip, server.udp_ports, config.advertise, server.names,
            self.may.permits_datagram, server.rules_in_force, session.story.datagram if session.story else None,
            config.out, links, way, self.envelope, lambda: server.rates.police(session), config.udp_idle_timeout,
            session)
        self.reply(SUCCEEDED, *association.bnd)
        self.hand_over(association)

    def relay(self, remote: socket.socket) -> None:
        """Relay the first moments, if that is simple: most connections are over then. Hand the others over to the relay
        loop, which owns both sockets from there on. What the client sent behind its request goes first."""
        server, session, dialogue, client = self.server, self.session, self.dialogue, self.connection
        rates, early, first = server.rates, self.inbox.rest(), None
        protected = self.envelope or dialogue and dialogue.envelope
        # In a crowd, so many threads would fight for the GIL.
        crowd = not FIRST_AVAILABLE or len(server.sessions.negotiating) > FEW_NEGOTIATING
        if not (crowd or early or protected or rates.on or client.gettimeout()):
            session.relay, first = FIRST, First(client, remote)
            first.relay()
            if first.over:
                session.up, session.down, session.ended_by = first.up, first.down, session.ended_by or first.ended_by
                remote.close()
                return
        keep_alive(remote)
        tunnel = Tunnel(client, remote, early, server.config.idle_timeout, server.config.half_closed_timeout, session,
                        session.origin)
        if protected:
            theirs, held = (dialogue.envelope, dialogue.held) if dialogue else (None, b"")
            tunnel = ProtectedTunnel(tunnel, self.envelope, theirs, held)
        if first:
            first.go_on(tunnel)
            if session.ended_by:                                # set by another thread: the server stops
                tunnel.end(session.ended_by)
        rules = rates.rules
        if rates.on:
            rates.apply(tunnel)
        self.hand_over(tunnel)
        if rates.rules is not rules:                            # a reload came between the two, and missed this tunnel
            server.relay_loop().change_all(rates.apply)

    def hand_over(self, relay: Relay) -> None:
        """Have the relay loop relay it. Raises OSError, and it is still ours, when that cannot be."""
        if self.connection.gettimeout():                        # as `timeout` or an overridden hook has set it
            self.connection.settimeout(None)
        self.server.relay(relay)
        self.opened = None

    def chain(self, upstream: Upstream) -> Chain:
        return Chain(upstream, self.connection, self.lookup, self.source, self.deadline, self.server.own_ports)

    def source(self, remote: IP) -> Optional[IP]:
        """By --out, the address from which we connect to this one."""
        return leaving(self.server.config.out, ip_of(self.connection.getsockname()), remote)

    def has_room(self, attempts: int) -> bool:
        """Whether this session may have so many attempts to connect under way, each with a descriptor."""
        try:
            self.server.sessions.grow(self.session, 1 + attempts // 2, evict=False)
            return True
        except Full:
            return False

    def lookup(self, host: Host) -> Sequence[IP]:
        """The addresses of a normalised host. Raises RequestRefused; ConnectionResetError when the client has left."""
        return self.server.names.resolve(host, self.deadline, self.connection, self.session.origin)

    # ---- §6: answers ----------------------------------------------------------------------------------------------

    def reply(self, rep: Rep, host: Host = UNSPECIFIED.host, port: int = UNSPECIFIED.port) -> None:
        self.session.rep = rep.word
        self.send_packed(Reply, REPLY_HEADS[rep] + pack_address(host, port))      # no Reply is made


COMMANDS: Dict[Cmd, Callable[[Handler, Address], None]] = {
    Cmd.CONNECT: Handler.connect,
    Cmd.BIND: Handler.bind,
    Cmd.UDP_ASSOCIATE: Handler.udp_associate,
}

# METHOD to the code of its sub-negotiation, which returns the user's name or raises ProtocolError.
MethodTable = Dict[int, Callable[[Handler], Optional[bytes]]]
ANONYMOUS: MethodTable = {Method.NO_AUTHENTICATION: Handler.no_authentication}
BY_PASSWORD: MethodTable = {Method.USERNAME_PASSWORD: Handler.username_password}


def method_table(known: Users) -> MethodTable:
    """The acceptable METHODs, the first choice first."""
    by_password = BY_PASSWORD if known else {}
    return {Method.GSSAPI: by_gssapi, **by_password} if known.gssapi else dict(by_password or ANONYMOUS)
