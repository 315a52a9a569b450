"""The ThreadingTCPServer: listen, accept, limit, hand over to the relay loop, drain.

A Handler serves each connection, in the acceptor's thread or one of its own, until its tunnel stands; then the relay
loop does. Every session ends in one place, `end_session`.
"""
from __future__ import annotations

import errno
import logging
import os
import socket
import threading
from collections import deque
from functools import partial
from socketserver import BaseServer
from time import sleep
from typing import Any, Callable, Deque, Dict, List, Optional, Sequence, Tuple

from ..access.rules import Rules
from ..access.users import Users
from ..commands.rates import Rates
from ..config import Config, ConfigError
from ..net import listeners as net_listeners
from ..net.addresses import Endpoint, endpoint_of, origin_of
from ..net.lookups import Names
from ..net.poller import READ, new_poll
from ..net.shares import Ports
from ..protocol.errors import name_of
from ..protocol.facts import Facts
from ..relay.loop import Loop
from ..relay.relay import Relay
from ..relay.watch import Bell
from . import acceptors, tracing
from .counters import Counts, Meter, Shared
from .handler import Handler, method_table
from .newcomers import COMPLAIN_EVERY_S, REFUSED, Newcomers
from .session import FIRST, Session, Table, tell
from .sessions import UNKNOWN, Full, Sessions, Teller

log = logging.getLogger(__name__)

TICK_S = 0.25                           # how late a handshake's deadline may be noticed
REST_S = 0.1                            # without it, accept() at the descriptor limit spins
MAX_UNTOLD = 1000                       # sessions for which session_ended is due; then acceptors wait for it
EXHAUSTED = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}


class Server(Newcomers):
    """A SOCKS5 server.

        with Server(Config(port=0)) as server:
            print(server.server_address)
            server.serve_forever()          # until server.shutdown() in another thread

    Raises OSError (with the address in `filename`) when it cannot listen, ConfigError for a bad file.

    To call: serve_forever, handle_request, shutdown, server_close, fileno as in socketserver; stop, reload, drain.

    To override, as in socketserver; the thread that calls it in brackets:
        server_bind, server_activate    the sockets of config.listen are bound, and listened on [that makes the Server]
        service_actions                 every poll_interval seconds [serve_forever]
        get_request                     accept a connection [an acceptor, or serve_forever where there are none]
        verify_request                  may this client talk to us? The default asks --allow-from. A load balancer's
                                        client: as soon as the PROXY header is read [the same]
        process_request                 admit the session, then serve it [the same]
        finish_request, handle_error    make the handler; a bug in it [the acceptor, or a thread of the connection]
        shutdown_request                the handler has ended. Nothing happens to a session that has a tunnel [the same]
        close_request                   the session is over: close the client's socket [the same, or the relay loop]
        session_ended                   not in socketserver: once for every session that was admitted, however it
                                        ended, one after the other [a thread for this alone]

    Attributes: `config`, `sessions`, `addresses`, whose first one is `server_address`; `methods` has each METHOD, best
    first, to its sub-negotiation; request_queue_size, allow_reuse_address and timeout as in socketserver.

    What differs from socketserver: the Config has the addresses, so address_family and socket_type mean nothing;
    `socket` is the first of several listeners; block_on_close is false, since server_close ends what is left.
    """

    daemon_threads = True
    block_on_close = False
    allow_reuse_address = net_listeners.REUSE_ADDRESS
    request_queue_size = net_listeners.BACKLOG

    def __init__(self, config: Optional[Config] = None, RequestHandlerClass: Callable[..., Any] = Handler,
                 bind_and_activate: bool = True, *, listeners: Sequence[socket.socket] = (),
                 counts: Optional[Counts] = None, access: Optional[Tuple[Users, Rules]] = None) -> None:
        """`listeners` are open already where several processes share them, and `counts` what these know of one
        another's sessions and ports; `access` is read already."""
        self.config = config = config or Config()
        self.users, self.rules = access or (Users(self.config), Rules(self.config))
        self.trace = tracing.opened(self.config.trace)
        self.names = Names()
        row = counts or Shared(1).row(0)
        self.rates = Rates(row.buckets, self.rules)
        self.bind_ports = Ports(self.config.bind_ports, 1, lambda ip: row.of_thing("bind-ports %d" % ip))
        # Two at once: one towards the client, one towards the remotes.
        self.udp_ports = Ports(self.config.udp_ports, 2, lambda ip: row.of_thing("udp-ports %d" % ip))
        self.methods = method_table(self.users)
        net_listeners.raise_descriptor_limit()
        limits = self.config.handshake_timeout, self.config.max_per_client, self.config.max_negotiating
        self.sessions = Sessions(self.config.max_sessions or float("inf"), *limits, row,
                                 max(self.config.max_sessions, net_listeners.session_limit()), config.max_per_user)
        self.table, self.meter = Table(), Meter()
        self._bell = Bell()         # for serve_forever. With 30 attributes, CPython would read each more slowly
        self._stopping, self._stopped = threading.Event(), threading.Event()
        self._stopped.set()
        self._due: Deque[Callable[[], object]] = deque()        # for serve_forever to do
        self._loop: Optional[Loop] = None                       # made when first needed: not before a fork
        self._lock, self._complained = threading.Lock(), {}
        hook = None if type(self).session_ended is Server.session_ended else self.session_ended
        self._teller = Teller(hook) if hook else None           # a thread for a hook that does something
        self._acceptors = acceptors.Acceptors(self._accept_one)
        self._accepting: Optional[socket.socket] = None         # where there are no acceptors: what is ready
        self.listeners: List[socket.socket] = []
        self.own_ports = frozenset()
        BaseServer.__init__(self, (self.config.listen[0], self.config.port), RequestHandlerClass)
        try:
            if not listeners and bind_and_activate:
                self.server_bind()
                self.server_activate()
            elif listeners:
                self._listen_on(list(listeners))
        except BaseException:
            self.server_close()
            raise

    def server_bind(self) -> None:
        self._listen_on(net_listeners.bind_all(self.config.listen, self.config.port, self.allow_reuse_address))

    def _listen_on(self, listeners: List[socket.socket]) -> None:
        self.listeners, self.socket = listeners, listeners[0]
        self.server_address = self.socket.getsockname()
        self.own_ports = frozenset(endpoint.port for endpoint in self.addresses)     # systemd may pass several

    def server_activate(self) -> None:
        net_listeners.listen_all(self.listeners, self.request_queue_size)

    @property
    def addresses(self) -> List[Endpoint]:
        return [endpoint_of(sock.getsockname()) for sock in self.listeners]

    # ---- the thread of serve_forever ------------------------------------------------------------------------------

    def serve_forever(self, poll_interval: float = TICK_S) -> None:
        """Serve until shutdown(); service_actions() every poll_interval seconds. RuntimeError: no thread, no loop."""
        loop = self.relay_loop()
        self._stopped.clear()
        poll = new_poll()
        poll.register(self._bell.fd, READ)
        by_fd = {listener.fileno(): listener for listener in self.listeners}
        for fd, listener in by_fd.items():
            listener.setblocking(acceptors.available)
            if not acceptors.available:
                poll.register(fd, READ)
        try:
            self._acceptors.serve(self.listeners if acceptors.available else [])
            while not self._stopping.is_set():
                try:
                    self._serve_once(poll, by_fd, poll_interval)
                except MemoryError:                             # the next time there may be more
                    sleep(REST_S)
                if loop.failed:
                    raise RuntimeError("the relay loop has failed")
        finally:
            self._acceptors.release(self.request_queue_size)
            self._stopping.clear()
            self._stopped.set()

    def _serve_once(self, poll: Any, by_fd: Dict[int, socket.socket], poll_interval: float) -> None:
        """Wait; accept from listeners that are ready, where there are no acceptors; and do what else is due."""
        if not self._acceptors.refill():                        # EAGAIN: no thread
            self._complain_of_accept("EAGAIN")
        for fd, events in poll.poll(poll_interval * 1000):
            self._accepting = by_fd.get(fd)
            if self._accepting:
                self._accept_one()
            else:
                self._bell.clear()                              # or serving again after shutdown() would spin
        self.sessions.expire()
        while self._due:
            self._due.popleft()()
        self.service_actions()

    def stop(self) -> None:
        """Make serve_forever return soon. Unlike shutdown() it does not wait: a signal handler may call it."""
        self._stopping.set()
        self.soon(lambda: None)

    def shutdown(self) -> None:
        """Make serve_forever return, and wait for it: for another thread than the one that serves."""
        self.stop()
        self._stopped.wait()

    def soon(self, action: Callable[[], object]) -> None:
        """Have serve_forever do it."""
        self._due.append(action)
        self._bell.ring()

    def log_sessions_soon(self) -> None:
        self.soon(lambda: self.table.log(self.sessions))

    def reload(self, access: Optional[Tuple[Users, Rules]] = None) -> bool:
        """Put users and rules in force for what is asked from now on. Reads the files again unless `access` is given;
        where one of them is bad, both stay as they were. Any thread may call this."""
        try:
            users, rules = access or (Users(self.config, self.users), Rules(self.config))
        except ConfigError as exc:
            log.error("not reloaded, users and rules stay as they were: %s", exc)
            return False
        users.join(self.users)
        self.rates.renew(rules, self._loop)                     # first: associations look whether the rules are others
        self.users, self.rules, self.sessions.per_user = users, rules, rules.config.max_per_user
        log.info("reloaded users=%(users)d rules=%(rules)d pid=%(pid)d",
                 Facts(users=len(self.users.names), rules=len(self.rules), pid=os.getpid()))
        return True

    # ---- one connection, from accept to its handler -----------------------------------------------------------------

    def _accept_one(self, listener: Optional[socket.socket] = None) -> None:
        """Accept one connection, by an acceptor of `listener` if there are any, and have it served. Raises nothing."""
        while self._teller is not None and len(self._teller) > MAX_UNTOLD:      # an overridden session_ended is slow
            sleep(REST_S)
        covered = True
        try:
            request, client_address = self.get_request()
        except OSError:
            return
        finally:
            covered = listener is None or self._acceptors.accepted(listener)
        try:
            if not covered:
                raise RuntimeError("can't start new thread")
            if (self.config.proxy_protocol and self.is_balancer(client_address)
                    or self.verify_request(request, client_address)):
                self.process_request(request, client_address)
            else:
                self.shutdown_request(request)
        except (RuntimeError, MemoryError, OSError) as exc:
            try:
                self.refuse(client_address, "no thread", "no thread: %s" % (exc or "out of memory"))
            finally:                                            # that may take more memory than is left
                self.shutdown_request(request)
        except Exception:                                       # in an overridden hook: as socketserver does
            self.handle_error(request, client_address)
            self.shutdown_request(request)

    def get_request(self) -> Tuple[socket.socket, Any]:
        """Accept one connection. When resources have run out, rest a little before raising."""
        listener = self._acceptors.here.listener
        try:
            request, client_address = (listener or self._accepting or self.socket).accept()
        except (OSError, MemoryError) as error:
            exc = error if isinstance(error, OSError) else OSError(errno.ENOMEM, "out of memory")
            if exc.errno in EXHAUSTED:
                self._complain_of_accept(name_of(exc))
                sleep(REST_S)
            raise exc from None
        if not listener:                                        # or it has inherited all this
            request.setblocking(True)
            net_listeners.tune_accepted(request)
        return request, client_address

    def _complain_of_accept(self, errno_name: str) -> None:
        self.complain("accept", "accept_failed errno=%(errno)s sessions=%(sessions)d",
                      Facts(errno=errno_name, sessions=len(self.sessions)))
        self.meter.accept_failed(errno_name)

    def verify_request(self, request: Any, client_address: Any) -> bool:
        if not self.config.allow_from or self.rules.admits(endpoint_of(client_address).ip):
            return True
        log.info(REFUSED, Facts(client=endpoint_of(client_address), why="not in --allow-from"))
        self.meter.refused("allow-from")
        return False

    def process_request(self, request: Any, client_address: Any) -> None:
        """Serve it in this thread if it is an acceptor, else in a new one; in neither while it says nothing and many
        others negotiate."""
        try:
            session = self.session_of(request, client_address)
        except Full as exc:
            self.refuse(client_address, exc.limit, str(exc))
            self.shutdown_request(request)
            return
        if self.waits_silently(session, client_address):
            return
        if self._acceptors.here.listener:
            self.process_request_thread(request, client_address)
        else:
            super().process_request(request, client_address)

    def session_of(self, request: socket.socket, client_address: Any) -> Session:
        """The session of a connection, admitted now if it was not before. Raises Full."""
        session = self.sessions.get(request)
        if not session:
            client = endpoint_of(client_address)
            unknown = self.config.proxy_protocol and self.is_balancer(client_address)
            origin = UNKNOWN if unknown else origin_of(client_address)
            session = self.sessions.admit(request, client, origin)
            self.meter.begin(session)
            session.story = self.trace and self.trace.begin(session.number, client)
        return session

    def handle_error(self, request: Any, client_address: Any) -> None:
        session = self.sessions.get(request)
        why = self.tell_bug("while serving %s" % str(endpoint_of(client_address)))
        if session:
            session.ended_by, session.why = "server", why

    def relay_loop(self) -> Loop:
        """The relay loop of this process, started when it is first needed. A forked child does not use its parent's,
        which has no thread there. Raises RuntimeError without a thread."""
        loop = self._loop
        if loop is not None and loop.process == os.getpid():
            return loop
        with self._lock:
            if self._loop is not None and self._loop.process != os.getpid():
                self._loop.stop("forked")                       # only closes the child's copies of its descriptors
                self._loop = None
            if self._loop is None:
                loop = Loop(self._tunnel_ended, partial(self.tell_bug, "in the relay loop"))
                loop.start()
                self._loop = loop
            return self._loop

    def relay(self, tunnel: Relay) -> None:
        """Relay a tunnel or an association: see Loop.relay. OSError: the loop cannot take it."""
        session: Session = tunnel.session
        session.relay = tunnel
        try:
            self.relay_loop().relay(tunnel)
        except BaseException as exc:                            # both sides are reset: what was relayed is not all
            tunnel.end("server", str(getattr(exc, "strerror", None) or exc))
            session.over(tunnel)
            raise

    def _tunnel_ended(self, tunnel: Relay) -> None:
        session: Session = tunnel.session
        self.meter.relayed(session, tunnel)
        tunnel.close()
        session.over(tunnel)
        self.end_session(session)

    def shutdown_request(self, request: Any) -> None:
        """The handler has ended, or there was none."""
        session = self.sessions.get(request)
        if not session and request.fileno() >= 0:               # else the session is over, and has closed it
            self.close_request(request)
        elif session and session.relay in (None, FIRST):
            session.relay = None
            self.end_session(session)

    def close_request(self, request: Any) -> None:
        """FIN or RST is decided already."""
        request.close()

    def end_session(self, session: Session) -> None:
        """The session is over: the line in the log, the socket, the hook, the registry."""
        if not self.sessions.end(session):                      # the relay loop and the handler's thread may both come
            return
        try:
            health_check = session.ended_by == "client" and not session.greeted and self.is_balancer(session.client)
            tell(log, logging.DEBUG if health_check else logging.INFO, session)
            if session.story:
                session.story.end(session.facts())
            if session.record is not None:
                self.meter.ended(session)
        finally:                                                # also where memory has run out
            try:
                self.close_request(session.sock)
            finally:
                if self._teller is not None:
                    self._teller.tell(session)
                self.sessions.remove(session)                   # last: server_close() waits for it, then for the hook

    def session_ended(self, session: Session) -> None:
        """To override. No traffic waits for it."""

    def server_close(self) -> None:
        """Stop listening, and end the sessions that are left."""
        self.sessions.close()
        self.drain(0)
        if self._loop is not None:                      # it is false while it has no tunnel
            self._loop.stop("server stopped")
        if self._teller is not None:
            self._teller.close(COMPLAIN_EVERY_S)
        if self.trace:
            self.trace.close()
        self._bell.close()

    def drain(self, timeout_s: float, hurry: Optional[threading.Event] = None) -> int:
        """Stop listening, give sessions timeout_s to finish, then abort the rest. How many were aborted."""
        net_listeners.close_all(self.listeners)
        if self.sessions.wait_empty(timeout_s, hurry or threading.Event()):
            return 0
        aborted = len(self.sessions)
        self.sessions.abort("server stopped")
        if self._loop is not None:
            self._loop.abort_all("server stopped")
        self.sessions.wait_empty(1.0, threading.Event())
        return aborted
