"""The sockets that the server listens on, the options of every TCP socket, and the descriptors that serving takes."""
from __future__ import annotations

import errno
import os
import socket
from contextlib import suppress
from ipaddress import ip_address
from typing import Any, List, Sequence

try:
    import resource
except ImportError:                     # Windows has no such limit
    resource = None                     # type: ignore[assignment]

BACKLOG = 4096                          # Linux's own maximum since 5.4 (net.core.somaxconn)
DEFER_ACCEPT_S = 1                      # Linux: until the greeting is there, a silent client costs no thread
REUSE_ADDRESS = os.name == "posix"      # elsewhere it would share the port with any program that asks for it
SPARE_DESCRIPTORS = 180                 # listeners, acceptors (each has one in hand), log, resolver, kernel pipes
DESCRIPTORS_PER_SESSION = 2
TRIES = 10                              # for a port that is free on every address

# Of both sockets of a tunnel. Urgent data (MSG_OOB) stays in line: recv() stops in front of it, nothing overtakes it.
NO_DELAY = socket.IPPROTO_TCP, socket.TCP_NODELAY, 1
URGENT_IN_LINE = socket.SOL_SOCKET, socket.SO_OOBINLINE, 1


class Listener(socket.socket):
    """A listening TCP socket. accept() asks for its family and type with each connection: here they are plain numbers;
    socket.socket looks up members of an enum."""

    family = type = 0                           # type: ignore[assignment]

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self.family, self.type = int(super().family), int(super().type)


class SharedListener(Listener):
    """A listener that another program has as well, such as systemd: to shut it down would reset the connections in its
    queue, which are for the next server."""


def tune(sock: socket.socket) -> None:
    """Set what every TCP connection of ours has. Raises OSError, where a dead socket cannot be set (not Linux)."""
    sock.setsockopt(*NO_DELAY)
    sock.setsockopt(*URGENT_IN_LINE)


def keep_alive(sock: socket.socket) -> None:
    """Have the system find out when the other end has vanished. For a connection that lasts."""
    with suppress(OSError):                         # it is dead already
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)


def tune_accepted(sock: socket.socket) -> None:
    """Both of these, for the connection of a client. Raises OSError."""
    tune(sock)
    keep_alive(sock)


def tune_listener(listener: socket.socket) -> None:
    """The same of a listener: on Linux what is accepted inherits it, three system calls less. Raises OSError."""
    tune_accepted(listener)
    if hasattr(socket, "TCP_DEFER_ACCEPT"):
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_DEFER_ACCEPT, DEFER_ACCEPT_S)


def open_all(addresses: Sequence[str], port: int) -> List[socket.socket]:
    """bind_all and listen_all in one."""
    listeners = bind_all(addresses, port)
    try:
        listen_all(listeners, BACKLOG)
    except OSError:
        close_all(listeners)
        raise
    return listeners


def bind_all(addresses: Sequence[str], port: int, reuse: bool = REUSE_ADDRESS) -> List[socket.socket]:
    """A bound socket for each address; those after the first take its port where any was asked for.

    "::" takes IPv4 as well, unless an IPv4 address is named too: Linux does not let both have it. Raises OSError with
    the address in `filename`, and leaves nothing open.
    """
    tries = 1 if port else TRIES            # a port that is free on one address may be taken on the next
    while True:
        listeners: List[socket.socket] = []
        try:
            for text in addresses:
                dual = text == "::" and all(":" in other for other in addresses)
                listeners.append(open_one(text, listeners[0].getsockname()[1] if listeners else port, dual, reuse))
            return listeners
        except OSError as exc:
            close_all(listeners)
            tries -= 1
            if not tries or exc.errno != errno.EADDRINUSE:
                raise


def open_one(text: str, port: int, dual: bool, reuse: bool) -> socket.socket:
    """A bound socket; an IPv6 one takes IPv4 as well if it is `dual`."""
    host, _, scope = text.partition("%")
    six = ip_address(host).version == 6
    listener = None
    try:
        listener = Listener(socket.AF_INET6 if six else socket.AF_INET, socket.SOCK_STREAM)
        if reuse:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if six:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, not dual)
        tune_listener(listener)
        scope_id = socket.if_nametoindex(scope) if scope else 0
        listener.bind((host, port, 0, scope_id) if six else (host, port))
        if not port:
            # Linux gives a port of its own choice away again when the listener is shut down, which is how acceptors
            # are woken: take the same port by its number.
            port = listener.getsockname()[1]
            listener.close()
            return open_one(text, port, dual, reuse)
        return listener
    except OSError as exc:
        if listener:
            listener.close()
        exc.filename = "%s port %d" % (text, port)
        raise


def listen_all(listeners: Sequence[socket.socket], backlog: int) -> None:
    """Raises OSError with the address in `filename`: another socket listens there already."""
    for listener in listeners:
        try:
            listener.listen(backlog)
        except OSError as exc:
            exc.filename = "%s port %d" % listener.getsockname()[:2]
            raise


def close_all(listeners: Sequence[socket.socket]) -> None:
    for listener in listeners:
        listener.close()


def session_limit() -> int:
    """How many sessions the descriptor limit carries."""
    if resource is None:
        return 1000
    soft, _hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        soft = 1 << 20
    return max(1, (soft - min(SPARE_DESCRIPTORS, soft // 2)) // DESCRIPTORS_PER_SESSION)


def raise_descriptor_limit() -> None:
    """The soft limit is there for programs that use select(), which we do not: take the hard one."""
    if resource is not None:
        _soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        except (ValueError, OSError):           # macOS refuses its own "unlimited"
            pass
