"""The ThreadingTCPServer: listen, accept, cap, expire, drain.

Every connection gets a Handler in a thread of its own, which waited in accept() for it or is new. The hooks are
socketserver's (get_request, verify_request, process_request, service_actions, shutdown_request, handle_error) and may
be overridden as there.
"""
from __future__ import annotations

import errno
import logging
import socket
import threading
from collections import deque
from functools import partial
from socketserver import BaseServer, ThreadingTCPServer
from time import monotonic, sleep
from typing import Any, Callable, Deque, Dict, List, Optional, Sequence, Tuple, Type

from ..net import listeners as listening

from . import acceptors as spares

from ..protocol import trace
from ..access.users import Users
from ..config import Config, ConfigError
from .counters import Counts
from ..protocol.errors import name_of
from .handler import ANYBODY, BY_PASSWORD, Handler
from .home import Home
from .lobby import Lobby
from ..net.addresses import Endpoint, endpoint_of, subscriber
from ..net.resolver import Names
from ..access.rules import Rules
from .sessions import Full, Sessions
from .table import Table
from ..net.poller import READ, new_poll

log = logging.getLogger(__name__)

TICK_S = 0.25                           # how late a handshake's deadline may be noticed
STACK_BYTES = 256 * 1024                # address space, not memory; getaddrinfo wants some 100 KiB of it
CROWD = 64                              # negotiating at once: from then on the silent ones get no thread
COMPLAIN_EVERY_S = 60.0
REST_S = 0.1                            # without it, accept() at the descriptor limit spins
REFUSED = "refused client=%(client)s why=%(why)s"
EXHAUSTED = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}


class Server(ThreadingTCPServer):
    """A SOCKS5 server.

        with Server(Config(port=0)) as server:
            print(server.server_address)
            server.serve_forever()          # until server.shutdown() in another thread

    Listens from the start: raises OSError (with the address in `filename`) when it cannot, ConfigError for a bad file.
    `server_address` is the first address, `addresses` are all of them. `methods` maps each METHOD, best first, to its
    sub-negotiation.
    """

    daemon_threads = True
    block_on_close = False                  # our own set of live sessions is drained instead
    allow_reuse_address = listening.REUSE_ADDRESS
    request_queue_size = listening.BACKLOG

    def __init__(self, config: Optional[Config] = None, handler: Type[Handler] = Handler,
                 listeners: Sequence[socket.socket] = (), home: Optional[Home] = None,
                 counts: Optional[Counts] = None, access: Optional[Tuple[Users, Rules]] = None) -> None:
        """`listeners` are open already where several processes share them, `access` is read; `home` is the CPU to stay
        on, and `counts` what they know of one another's sessions."""
        self.config = config or Config()
        self.home = home
        self.users, self.rules = access or (Users(self.config), Rules(self.config))
        self.trace = trace.opened(self.config.trace)
        self.names = Names()
        self.methods = dict(BY_PASSWORD if self.users else ANYBODY)
        listening.raise_descriptor_limit()
        self.sessions = Sessions(self.config.max_sessions or float("inf"), self.config.handshake_timeout,
                                 self.config.max_per_client, self.config.max_negotiating, counts,
                                 float("inf") if self.config.max_sessions else listening.session_limit())
        self.table = Table()
        self.listeners = list(listeners) or listening.open_all(self.config.listen, self.config.port)
        self._wakeup, self._waker = socket.socketpair()
        self.socket = self.listeners[0]
        BaseServer.__init__(self, self.socket.getsockname(), handler)
        self._stopping = threading.Event()
        self._due: Deque[Callable[[], object]] = deque()        # for serve_forever to do
        self._stopped = threading.Event()
        self._stopped.set()
        self._complained: Dict[str, float] = {}
        self._lock = threading.Lock()
        self._spares = spares.Spares(self.listeners, self.accept_from) if spares.available else None
        self.chores: List[Callable[[], None]] = [self.sessions.expire] + ([home.look] if home else [])
        self.lobby = Lobby(self) if spares.available else None      # whoever says nothing yet

    @property
    def addresses(self) -> List[Endpoint]:
        return [endpoint_of(listener.getsockname()) for listener in self.listeners]

    # ---- the loop -------------------------------------------------------------------------------------------------

    def serve_forever(self, poll_interval: float = TICK_S) -> None:
        """Serve until shutdown(). Calls service_actions() every poll_interval seconds at the least."""
        self._stopped.clear()
        threading.stack_size(STACK_BYTES)
        if self.home:
            self.home.settle()
        poll = new_poll()
        poll.register(self._wakeup.fileno(), READ)
        if self.lobby:
            poll.register(self.lobby.fileno(), READ)
        by_fd = {listener.fileno(): listener for listener in self.listeners}
        for fd, listener in by_fd.items():
            listener.setblocking(bool(self._spares))
            if not self._spares:
                poll.register(fd, READ)
        if self._spares:
            self._spares.serve()
        try:
            while not self._stopping.is_set():
                if self._spares:
                    self._spares.refill()
                for fd, _events in poll.poll(poll_interval * 1000):
                    if fd in by_fd:
                        self.accept_from(by_fd[fd])
                    elif fd == self._wakeup.fileno():
                        self._wakeup.recv(64)               # or serving again after shutdown() would spin
                    elif self.lobby:
                        self.lobby.let_out()
                self.service_actions()
        finally:
            if self._spares:
                self._spares.release(self.request_queue_size)
            self._stopping.clear()
            self._stopped.set()

    def stop(self) -> None:
        """Make serve_forever return soon. Unlike shutdown() it does not wait: a signal handler may call it."""
        self._stopping.set()
        self._wake()

    def _wake(self) -> None:
        try:
            self._waker.send(b"x")
        except OSError:
            pass

    def shutdown(self) -> None:
        """Make serve_forever return, and wait for it: for another thread than the one that serves."""
        self.stop()
        self._stopped.wait()

    def leave(self) -> bool:
        """Accept nobody any more, unless somebody has just come; other processes go on with the same listeners."""
        return bool(self._spares and self._spares.leave())

    def service_actions(self) -> None:
        for chore in self.chores:
            chore()
        while self._due:
            self._due.popleft()()

    def soon(self, action: Callable[[], object]) -> None:
        """Have serve_forever do it. A signal handler may call this."""
        self._due.append(action)
        self._wake()

    def reload_soon(self) -> None:
        self.soon(self.reload)

    def log_sessions_soon(self) -> None:
        self.soon(partial(self.table.log, self.sessions))

    def reload(self) -> bool:
        """Read users and rules again, for what is asked from now on. Where one of the files is bad, both stay."""
        try:
            self.users, self.rules = Users(self.config, self.users), Rules(self.config)
        except ConfigError as exc:
            log.error("not reloaded, users and rules stay as they were: %s", exc)
            return False
        log.info("reloaded users=%(users)d rules=%(rules)d", {"users": len(self.users.names), "rules": len(self.rules)})
        return True

    # ---- one connection -------------------------------------------------------------------------------------------

    def accept_from(self, listener: socket.socket) -> None:
        """Accept one connection and serve it, or have it served."""
        covered = True
        try:
            request, client_address = self.get_request(listener)
        except OSError:
            return
        finally:
            if self._spares:
                covered = self._spares.accepted(listener)
        try:
            if not covered:
                raise RuntimeError("can't start new thread")
            if not self.verify_request(request, client_address):
                self.shutdown_request(request)
            elif not self.waits(request, client_address):
                self.process_request(request, client_address)
        except (RuntimeError, MemoryError, OSError) as exc:
            self.refuse(client_address, "no thread", "no thread: %s" % exc)
            self.shutdown_request(request)
        except Exception:                                       # in an overridden hook: as socketserver does
            self.handle_error(request, client_address)
            self.shutdown_request(request)

    def get_request(self, listener: Optional[socket.socket] = None) -> Tuple[socket.socket, Any]:
        """Accept one connection. When resources have run out, rest a little before raising."""
        try:
            request, client_address = (listener or self.socket).accept()
        except OSError as exc:
            if exc.errno in EXHAUSTED:
                self.complain("accept", "accept_failed errno=%(errno)s sessions=%(sessions)d",
                              {"errno": name_of(exc), "sessions": len(self.sessions)})
                sleep(REST_S)
            raise
        if not self._spares:                                    # or it inherits what the listener has
            request.setblocking(True)
            request.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            request.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        return request, client_address

    def waits(self, request: socket.socket, client_address: Any) -> bool:
        """Whether it is left in the lobby, because it is silent and there is a crowd."""
        crowd = self.sessions.negotiating > CROWD
        return bool(crowd and self.lobby and self.lobby.enter(request, client_address))

    def process_request(self, request: Any, client_address: Any) -> None:
        """Serve it in this thread if that is what this thread waited for, else in a new one."""
        if self._spares and self._spares.here():
            self.process_request_thread(request, client_address)
        else:
            super().process_request(request, client_address)

    def finish_request(self, request: Any, client_address: Any) -> None:
        """As socketserver does it, but __init__, which serves, runs as a method: calling the class would put another
        frame on the C stack for as long as the tunnel stands, and with it another page."""
        if isinstance(self.RequestHandlerClass, type):
            kind: Any = self.RequestHandlerClass
            kind.__init__(kind.__new__(kind), request, client_address, self)
        else:                                                   # a functools.partial, say
            super().finish_request(request, client_address)

    def verify_request(self, request: Any, client_address: Any) -> bool:
        client = endpoint_of(client_address)
        ip = client.ip
        if not self.rules.admits(ip):
            log.info(REFUSED, {"client": str(client), "why": "'not in --allow-from'"})
            return False
        try:
            self.sessions.admit(request, client, subscriber(ip))
        except Full as exc:
            self.refuse(client_address, exc.limit, str(exc))
            return False
        return True

    def shutdown_request(self, request: Any) -> None:
        """Every request ends here: out of the registry first, then closed. FIN or RST is the handler's choice."""
        self.sessions.remove(request)
        request.close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        log.exception("bug while serving %s", endpoint_of(client_address))

    def refuse(self, client_address: Any, about: str, why: str) -> None:
        """Say that this client is turned away before it is heard, for want of something of ours."""
        self.complain(about, REFUSED, {"client": str(endpoint_of(client_address)), "why": ascii(why)})

    def complain(self, about: str, line: str, facts: Dict[str, Any]) -> None:
        """A warning that would come with every connection: once a minute is enough, for each thing it is about."""
        now = monotonic()
        with self._lock:
            due = now - self._complained.get(about, -COMPLAIN_EVERY_S) >= COMPLAIN_EVERY_S
            if due:
                self._complained[about] = now
        if due:
            log.warning(line, facts)

    # ---- the end --------------------------------------------------------------------------------------------------

    def server_close(self) -> None:
        """Stop listening, and end whatever is still live."""
        self.drain(0)
        self._wakeup.close()
        if self.trace:
            self.trace.close()
        self._waker.close()

    def drain(self, timeout_s: float, hurry: Optional[threading.Event] = None) -> int:
        """Stop listening, give sessions timeout_s to finish, then abort the rest. How many were aborted."""
        listening.close_all(self.listeners)
        if self.lobby:
            self.lobby.close()
        if self.sessions.wait_empty(timeout_s, hurry or threading.Event()):
            return 0
        aborted = len(self.sessions)
        self.sessions.abort("server stopped")
        self.sessions.wait_empty(1.0, threading.Event())
        return aborted
