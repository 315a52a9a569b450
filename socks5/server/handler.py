"""One client, from the first byte to the last: read it next to RFC 1928, from section 3 to section 6.

Deep code raises what the client is to be told; only `handle` answers. The negotiation is blocking code without
time-outs: the whole of it has one deadline, and Sessions.expire shuts the connection down when that has passed.
"""
from __future__ import annotations

import logging
import socket
from functools import partial
from socketserver import StreamRequestHandler
from time import monotonic
from typing import TYPE_CHECKING, Callable, Dict, List, Optional, Set, Type

from ..access import users as auth
from ..access.logins import Verdict, origin_of
from ..access.passwords import Wait
from ..commands.bind import Rendezvous, expected
from ..protocol.codes import Cmd, Method, Rep
from ..commands.connect import connect
from ..protocol.errors import ProtocolError, RequestRefused, rep_of
from .inbox import Inbox, linger
from ..relay.tunnel import Tunnel
from ..net.addresses import endpoint_of, IP, is_here, Endpoint
from ..net.resolver import name_in, resolve
from ..access.rules import Asker
from .sessions import Session
from ..protocol.trace import M, Sent
from ..commands.udp import Association
from ..net.poller import new_poll
from ..protocol.fields import Host, text
from ..protocol.messages import UNSPECIFIED, VER, Address, Greeting, Login, LoginStatus, Reply, Request, Selection

if TYPE_CHECKING:
    from .server import Server

log = logging.getLogger(__name__)

ANSWER_S = 0.5              # before a handshake's deadline, to answer a login that has waited until then
NO_TIMEOUT_S = 60.0         # for a login to wait where the handshake may take any time
TOLD = 10                   # rules that one association may name in the log

SOCKS4_REFUSAL = bytes([0x00, 0x5B]) + bytes(6)     # request rejected or failed
HTTP_HELP = (b"HTTP/1.0 400 Bad Request\r\nContent-Type: text/plain\r\nConnection: close\r\n\r\n"
             b"This is a SOCKS5 proxy, not an HTTP proxy or web server.\n"
             b"Point the program at it with socks5h://HOST:PORT (curl: --socks5-hostname HOST:PORT;\n"
             b"Firefox: Settings, Network Settings, SOCKS Host, SOCKS v5, Proxy DNS when using SOCKS v5).\n")


class Handler(StreamRequestHandler):
    """Serves one client in its own thread."""

    server: Server
    request: socket.socket
    session: Session

    def setup(self) -> None:
        """Instead of StreamRequestHandler's: its rfile reads ahead, and hides from the tunnel what it has read."""
        self.connection = self.request
        self.inbox = Inbox(self.connection)
        self.session = self.server.sessions[self.request]
        trace = self.server.trace
        self.story = trace.begin(self.session.number, self.session.client) if trace else None

    def handle(self) -> None:
        """Serve the client until either side is done.                                   RFC 1928 §3 to §6"""
        session = self.session
        try:
            self.negotiate()                                    # §3 METHOD, then its sub-negotiation
            try:
                request = self.take(Request)                   # §4
                self.server.sessions.negotiated(session)
                session.cmd, session.dst = request.cmd.name, request.dst
                session.step("request", cmd=session.cmd, dst=request.dst)
                self.foresee(request)
                COMMANDS[request.cmd](self, request)            # §4 CONNECT | BIND | UDP ASSOCIATE
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

    def finish(self) -> None:
        facts = self.session.facts()
        log.info(Session.LINE, facts)
        if self.story:
            self.story.end(facts)

    def take(self, kind: Type[M]) -> M:
        """The client's next message."""
        return self.story.take(kind, self.inbox.read) if self.story else kind.parse(self.inbox.read)

    def send(self, message: Sent) -> None:
        """One message of ours."""
        if self.story:
            self.story.sent(message, self.session.why)
        self.connection.sendall(message if isinstance(message, bytes) else message.pack())

    # ---- §3: the method, and who is it? ---------------------------------------------------------------------------

    def negotiate(self) -> None:
        """Agree on a METHOD and run its sub-negotiation. Raises ProtocolError when there is nothing to agree on."""
        if self.inbox.first() != VER:
            self.explain()
        offered = self.take(Greeting).methods
        methods = self.server.methods
        method = auth.choose(offered, methods)
        self.session.step("method", offered=offered, chosen=bytes([method]))
        self.send(Selection(method))
        if method not in methods:
            raise ProtocolError("no acceptable METHOD among %s" % (offered.hex(" ") if offered else "none"))
        self.session.user = methods[method](self)

    def explain(self) -> None:
        """Whoever does not speak SOCKS5 is told so in its own language, where we know it."""
        first = self.inbox.first()
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
        login, session, server = self.take(Login), self.session, self.server
        users = server.users                                    # a reload puts others in their place
        verdict = users.logins.judge(origin_of(session.client.ip, str(session.origin)), login.uname, login.passwd,
                                     users.check, LoginWait(self))
        if verdict is not Verdict.RIGHT:
            session.user = login.uname
            self.log_failure(verdict, login.uname)
            self.send(LoginStatus(0x01))
            raise ProtocolError("wrong user name or password" if verdict is Verdict.WRONG else
                                "too many logins are tried: the password was not looked at")
        session.step("login", user=text(login.uname))
        self.send(LoginStatus(0x00))
        return login.uname

    def log_failure(self, verdict: Verdict, uname: bytes) -> None:
        """README.rst: fail2ban looks for auth_failed. What was not looked at is logged now and then only."""
        facts: Dict[str, object] = {"client": str(self.session.client.ip), "user": text(uname)}
        if verdict is Verdict.WRONG:
            log.warning("auth_failed client=%(client)s user=%(user)s", facts)
            return
        left_out = self.server.users.logins.lines_left_out()
        if left_out is not None:
            log.warning("auth_deferred client=%(client)s user=%(user)s left_out=%(left_out)d",
                        dict(facts, left_out=left_out))

    # ---- §4: the commands; each tells its whole story -------------------------------------------------------------

    def connect(self, request: Request) -> None:
        config = self.server.config
        addresses = self.not_ourselves(request.dst.port, self.permitted(request, resolve(request.dst.host)))
        remote, address = connect(addresses, request.dst.port, config.connect_timeout, self.connection)
        with remote:
            dst = request.dst
            self.session.reached = Endpoint(address, dst.port)
            try:
                remote.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                remote.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
                bnd = endpoint_of(remote.getsockname())
            except OSError as exc:                              # reset already; Linux leaves that to the tunnel
                raise RequestRefused(rep_of(exc), "reset by the destination at once") from None
            self.reply(Rep.SUCCEEDED, bnd)
            self.relay(remote)

    def bind(self, request: Request) -> None:
        config = self.server.config
        peers = self.permitted(request, expected(request.dst))
        permit = partial(self.permits_caller, request)
        with Rendezvous(self.connection, peers, config.bind_ports, config.advertise, permit) as rendezvous:
            self.reply(Rep.SUCCEEDED, rendezvous.bnd)           # the first: where we listen
            remote, peer = rendezvous.wait(config.bind_timeout)
        with remote:                                            # and the listener is closed: one peer only
            self.session.reached = peer
            self.inbox.held += rendezvous.early
            self.reply(Rep.SUCCEEDED, peer)                     # the second: who came
            self.relay(remote)
        self.session.why = rendezvous.also(self.session.why)

    def udp_associate(self, request: Request) -> None:
        """DST says where the client means to send from; it may be wrong behind NAT, and is not needed."""
        config, session = self.server.config, self.session
        self.told: Set[str] = set()             # rules that a line in the log has named
        with Association(self.connection, str(session.client.ip), config.udp_ports, config.advertise,
                         self.server.names, self.permits_datagram, lambda: self.server.rules,
                         self.story.overhear if self.story else None) as association:
            self.reply(Rep.SUCCEEDED, association.bnd)
            session.association = association
            association.run(config.udp_idle_timeout)
            session.up, session.down = association.up, association.down
            session.ended_by = session.ended_by or association.ended_by
            session.why = "; ".join(filter(None, (session.why, association.why, association.summary())))

    # ---- may this client do that? ---------------------------------------------------------------------------------

    def asker(self, cmd: Cmd) -> Asker:
        return Asker(self.session.client.ip, self.session.user, cmd)

    def foresee(self, request: Request) -> None:
        """Before anything is looked up. Raises RequestRefused X'02' for what no address could make right."""
        udp = request.cmd == Cmd.UDP_ASSOCIATE                  # whose destinations come with the datagrams
        name = None if udp else name_in(request.dst.host)
        if name is None and not udp:                            # an address, which is judged as such
            return
        verdict = self.server.rules.foresee(self.asker(request.cmd), None if udp else request.dst.port, name)
        if not verdict.allowed:
            raise RequestRefused(Rep.NOT_ALLOWED, "denied by %s" % verdict.where)

    def permitted(self, request: Request, addresses: List[IP]) -> List[IP]:
        """Those of `addresses` that this client may reach. Raises RequestRefused X'02' when there is none."""
        asker, name, allowed, why = self.asker(request.cmd), name_in(request.dst.host), [], ""
        for address in addresses:
            verdict = self.server.rules.judge(asker, address, request.dst.port, name)
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
        Who is on this machine may: it gains nothing. Raises RequestRefused X'02' when none is left."""
        if port != self.server.server_address[1] or self.session.client.ip.is_loopback:
            return addresses
        others = [address for address in addresses if not is_here(address)]
        if not others:
            raise RequestRefused(Rep.NOT_ALLOWED, "%s is this proxy itself" % addresses[0])
        return others

    def permits_caller(self, request: Request, peer: IP) -> bool:
        """For a BIND that expects nobody in particular: may this one come?"""
        return self.server.rules.judge(self.asker(Cmd.BIND), peer, request.dst.port).allowed

    def permits_datagram(self, address: Optional[IP], port: int, host: Host) -> bool:
        """May this client's datagrams go there? Without an address: is it worth looking up? Logs once for each rule."""
        asker, name, rules = self.asker(Cmd.UDP_ASSOCIATE), name_in(host), self.server.rules
        verdict = rules.judge(asker, address, port, name) if address else rules.foresee(asker, port, name)
        if not verdict.allowed and verdict.where not in self.told and len(self.told) < TOLD:
            self.told.add(verdict.where)
            log.info("denied client=%(client)s user=%(user)s cmd=UDP_ASSOCIATE dst=%(dst)s why=%(why)s", {
                "client": str(self.session.client), "user": self.session.facts()["user"],
                "dst": str(Address(address or host, port)), "why": ascii("denied by %s" % verdict.where)})
        return verdict.allowed

    def unsupported(self, request: Request) -> None:
        raise RequestRefused(Rep.COMMAND_NOT_SUPPORTED, "CMD %s" % request.cmd.phrase)

    def relay(self, remote: socket.socket, early_down: bytes = b"") -> None:
        """Tunnel until both sides are done. What the client sent behind its request goes first."""
        config, sessions = self.server.config, self.server.sessions
        tunnel = Tunnel(self.connection, remote, self.inbox.rest(), early_down,
                        config.idle_timeout, config.half_closed_timeout,
                        self.server.home.on_bulk if self.server.home else None)
        sessions.attach(self.session, tunnel)
        try:
            tunnel.run()
        finally:
            sessions.detach(self.session)

    # ---- §6: answers ----------------------------------------------------------------------------------------------

    def reply(self, rep: Rep, bnd: Optional[Endpoint] = None) -> None:
        self.session.rep = rep.name
        self.send(Reply(rep, Address(*bnd) if bnd else UNSPECIFIED))


class LoginWait(Wait):
    """The wait of a login: as long as the handshake has left, and watching for the client to leave."""

    def __init__(self, handler: Handler) -> None:
        self.handler = handler
        session, handshake_s = handler.session, handler.server.config.handshake_timeout or NO_TIMEOUT_S
        left_s = session.started + session.extended_s + handshake_s - monotonic()
        super().__init__(left_s - min(ANSWER_S, handshake_s / 10))

    def pause(self, seconds: float) -> None:
        """Raises EOFError when the connection is reset or shut down. A FIN may be a half-close, and is waited for."""
        poll = new_poll()
        poll.register(self.handler.connection.fileno(), 0)      # a hang-up and an error are reported unasked
        if poll.poll(max(seconds, 0.0) * 1000):
            raise EOFError("client left while its login waited")

    def extend(self, seconds: float) -> None:
        self.handler.server.sessions.extend(self.handler.session, seconds)


COMMANDS: Dict[Cmd, Callable[[Handler, Request], None]] = {
    Cmd.CONNECT: Handler.connect,
    Cmd.BIND: Handler.bind,
    Cmd.UDP_ASSOCIATE: Handler.udp_associate,
}

# METHOD to the code of its sub-negotiation, which gives the user's name or raises ProtocolError.
MethodTable = Dict[int, Callable[[Handler], Optional[bytes]]]
ANYBODY: MethodTable = {Method.NO_AUTHENTICATION: Handler.no_authentication}
BY_PASSWORD: MethodTable = {Method.USERNAME_PASSWORD: Handler.username_password}
