"""The ThreadingTCPServer: listen, accept, cap, expire, drain.

Every connection gets a Handler in a thread of its own. The hooks are socketserver's (get_request, verify_request,
process_request, service_actions, shutdown_request, handle_error) and may be overridden as there.
"""
from __future__ import annotations

import errno
import logging
import os
import socket
import threading
from ipaddress import ip_address
from socketserver import BaseServer, ThreadingTCPServer
from time import monotonic, sleep
from typing import Any, Dict, List, Optional, Tuple, Type

from .auth import Users
from .config import Config, ConfigError
from .handler import ANYBODY, BY_PASSWORD, Handler
from .waiting import READ, new_poll
from .resolve import Names, address_of, ip_of, subscriber
from .rules import Rules
from .sessions import Full, Sessions
from .throttle import Throttle
from .wire import Address

try:
    import resource
except ImportError:                     # Windows has no such limit
    resource = None                     # type: ignore[assignment]

log = logging.getLogger(__name__)

TICK_S = 0.25                           # how late a handshake's deadline may be noticed
BACKLOG = 4096                          # Linux's own most since 5.4 (net.core.somaxconn)
STACK_BYTES = 256 * 1024                # address space, not memory; getaddrinfo wants some 100 KiB of it
DEFER_ACCEPT_S = 1                      # Linux: until the greeting is there, a silent client costs no thread
SPARE_DESCRIPTORS = 64                  # for listeners, log, resolver, BIND and the like
DESCRIPTORS_PER_SESSION = 2
COMPLAIN_EVERY_S = 60.0
REST_S = 0.1                            # without it, accept() at the descriptor limit spins
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
    allow_reuse_address = os.name == "posix"        # elsewhere it would share the port with whoever comes
    request_queue_size = BACKLOG

    def __init__(self, config: Optional[Config] = None, handler: Type[Handler] = Handler) -> None:
        self.config = config or Config()
        self.users, self.rules = Users(self.config), Rules(self.config)
        self.throttle = Throttle()
        self.names = Names()
        self.methods = dict(BY_PASSWORD if self.users else ANYBODY)
        raise_descriptor_limit()
        self.sessions = Sessions(self.config.max_sessions or descriptor_limit(), self.config.handshake_timeout,
                                 self.config.max_per_client, self.config.max_negotiating)
        self.listeners: List[socket.socket] = []
        try:
            for text in self.config.listen:
                port = self.listeners[0].getsockname()[1] if self.listeners else self.config.port
                self.listeners.append(self.listen_on(text, port))
            self._wakeup, self._waker = socket.socketpair()
        except OSError:
            self.server_close()
            raise
        self.socket = self.listeners[0]
        BaseServer.__init__(self, self.socket.getsockname(), handler)
        self._stopping = threading.Event()
        self._reloading = threading.Event()
        self._stopped = threading.Event()
        self._stopped.set()
        self._complained: Dict[str, float] = {}

    @property
    def addresses(self) -> List[Address]:
        return [address_of(listener.getsockname()) for listener in self.listeners]

    def listen_on(self, text: str, port: int) -> socket.socket:
        """A listening socket. "::" takes IPv4 as well, unless 0.0.0.0 is listened on in its own right."""
        host, _, scope = text.partition("%")
        six = ip_address(host).version == 6
        listener = socket.socket(socket.AF_INET6 if six else socket.AF_INET, socket.SOCK_STREAM)
        try:
            if self.allow_reuse_address:
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if six:
                dual = host == "::" and "0.0.0.0" not in self.config.listen
                listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, not dual)
            # What is accepted inherits these on Linux; get_request sets them elsewhere.
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            if hasattr(socket, "TCP_DEFER_ACCEPT"):
                listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_DEFER_ACCEPT, DEFER_ACCEPT_S)
            scope_id = socket.if_nametoindex(scope) if scope else 0
            listener.bind((host, port, 0, scope_id) if six else (host, port))
            listener.listen(self.request_queue_size)
            listener.setblocking(False)
            return listener
        except OSError as exc:
            listener.close()
            exc.filename = "%s port %d" % (text, port)
            raise

    # ---- the loop -------------------------------------------------------------------------------------------------

    def serve_forever(self, poll_interval: float = TICK_S) -> None:
        """Serve until shutdown(). Calls service_actions() every poll_interval seconds at the least."""
        self._stopped.clear()
        threading.stack_size(STACK_BYTES)
        poll = new_poll()
        by_fd = {listener.fileno(): listener for listener in self.listeners}
        for fd in [*by_fd, self._wakeup.fileno()]:
            poll.register(fd, READ)
        try:
            while not self._stopping.is_set():
                for fd, _events in poll.poll(poll_interval * 1000):
                    if fd in by_fd:
                        self.accept_from(by_fd[fd])
                    else:
                        self._wakeup.recv(64)           # or serving again after shutdown() would spin
                self.service_actions()
        finally:
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

    def service_actions(self) -> None:
        self.sessions.expire()
        if self._reloading.is_set():
            self._reloading.clear()
            self.reload()

    def reload_soon(self) -> None:
        """Make serve_forever reload(). A signal handler may call it."""
        self._reloading.set()
        self._wake()

    def reload(self) -> bool:
        """Read users and rules again, for what is asked from now on. Where one of the files is bad, both stay."""
        try:
            self.users, self.rules = Users(self.config), Rules(self.config)
        except ConfigError as exc:
            log.error("not reloaded, users and rules stay as they were: %s", exc)
            return False
        log.info("reloaded users=%(users)d rules=%(rules)d", {"users": len(self.users.names), "rules": len(self.rules)})
        return True

    # ---- one connection -------------------------------------------------------------------------------------------

    def accept_from(self, listener: socket.socket) -> None:
        try:
            request, client_address = self.get_request(listener)
        except OSError:
            return
        try:
            if self.verify_request(request, client_address):
                self.process_request(request, client_address)
            else:
                self.shutdown_request(request)
        except (RuntimeError, MemoryError, OSError) as exc:     # RuntimeError: can't start new thread
            self.complain("no thread for a client, which is closed: %s", exc)
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
                self.complain("cannot accept: %s; %d sessions live", exc.strerror, len(self.sessions))
                sleep(REST_S)
            raise
        request.setblocking(True)
        return request, client_address

    def verify_request(self, request: Any, client_address: Any) -> bool:
        client, ip = address_of(client_address), ip_of(client_address)
        if not self.rules.admits(ip):
            log.info("refused client=%(client)s why=%(why)s", {"client": str(client), "why": "'not in --allow-from'"})
            return False
        try:
            self.sessions.admit(request, client, subscriber(ip))
        except Full as exc:
            self.complain("%s: %s is closed", exc, client)
            return False
        return True

    def shutdown_request(self, request: Any) -> None:
        """Every request ends here: out of the registry first, then closed. FIN or RST is the handler's choice."""
        self.sessions.remove(request)
        request.close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        log.exception("bug while serving %s", address_of(client_address))

    def complain(self, message: str, *args: Any) -> None:
        """A warning that would come with every connection: once a minute is enough, for each of them."""
        now = monotonic()
        if now - self._complained.get(message, -COMPLAIN_EVERY_S) >= COMPLAIN_EVERY_S:
            self._complained[message] = now
            log.warning(message, *args)

    # ---- the end --------------------------------------------------------------------------------------------------

    def server_close(self) -> None:
        """Stop listening, and end whatever is still live."""
        for listener in self.listeners:
            listener.close()
        self.drain(0)
        for sock in (getattr(self, "_wakeup", None), getattr(self, "_waker", None)):
            if sock:
                sock.close()

    def drain(self, timeout_s: float, hurry: Optional[threading.Event] = None) -> int:
        """Stop listening, give sessions timeout_s to finish, then abort the rest. How many were aborted."""
        for listener in self.listeners:
            listener.close()
        if self.sessions.wait_empty(timeout_s, hurry or threading.Event()):
            return 0
        aborted = len(self.sessions)
        self.sessions.abort("server stopped")
        self.sessions.wait_empty(1.0, threading.Event())
        return aborted


def descriptor_limit() -> int:
    """How many sessions the descriptor limit carries."""
    if resource is None:
        return 1000
    soft, _hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        soft = 1 << 20
    return max(1, (soft - SPARE_DESCRIPTORS) // DESCRIPTORS_PER_SESSION)


def raise_descriptor_limit() -> None:
    """The soft limit is there for programs that use select(), which we do not: take the hard one."""
    if resource is not None:
        _soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        except (ValueError, OSError):           # macOS refuses its own "unlimited"
            pass
