"""The sockets that are listened on, and the descriptors that serving takes."""
from __future__ import annotations

import errno
import os
import socket
from ipaddress import ip_address
from typing import Any, List, Sequence, Tuple

from ..relay import splice

try:
    import resource
except ImportError:                     # Windows has no such limit
    resource = None                     # type: ignore[assignment]

BACKLOG = 4096                          # Linux's own most since 5.4 (net.core.somaxconn)
DEFER_ACCEPT_S = 1                      # Linux: until the greeting is there, a silent client costs no thread
REUSE_ADDRESS = os.name == "posix"      # elsewhere it would share the port with whoever comes
# Listeners, threads in accept() (each has one in hand), log, resolver, kernel pipes.
SPARE_DESCRIPTORS = 80 + (splice.DESCRIPTORS if splice.available else 0)
DESCRIPTORS_PER_SESSION = 2
TRIES = 10                              # for a port that is free on every address


class Listener(socket.socket):
    """Accepts like its base, which asks enum for the names of family and type each time."""

    def accept(self) -> Tuple[socket.socket, Any]:
        fd, client_address = self._accept()                 # type: ignore[attr-defined]    # the C class has it
        return socket.socket(-1, socket.SOCK_STREAM, 0, fd), client_address     # -1: as the descriptor says


def open_all(addresses: Sequence[str], port: int) -> List[socket.socket]:
    """A listening socket for each address; those after the first take its port where any was asked for.

    "::" takes IPv4 as well, unless an IPv4 address is named too: Linux does not let both have it. Raises OSError with
    the address in `filename`, and leaves nothing open.
    """
    tries = 1 if port else TRIES            # a port that is free on one address may be taken on the next
    while True:
        listeners: List[socket.socket] = []
        try:
            for text in addresses:
                dual = text == "::" and all(":" in other for other in addresses)
                listeners.append(open_one(text, listeners[0].getsockname()[1] if listeners else port, dual))
            return listeners
        except OSError as exc:
            close_all(listeners)
            tries -= 1
            if not tries or exc.errno != errno.EADDRINUSE:
                raise


def open_one(text: str, port: int, dual: bool) -> socket.socket:
    """A listening socket; an IPv6 one takes IPv4 as well if it is `dual`."""
    host, _, scope = text.partition("%")
    six = ip_address(host).version == 6
    listener = Listener(socket.AF_INET6 if six else socket.AF_INET, socket.SOCK_STREAM)
    try:
        if REUSE_ADDRESS:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if six:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, not dual)
        # What is accepted inherits these: saves two system calls a connection.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        if hasattr(socket, "TCP_DEFER_ACCEPT"):
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_DEFER_ACCEPT, DEFER_ACCEPT_S)
        scope_id = socket.if_nametoindex(scope) if scope else 0
        listener.bind((host, port, 0, scope_id) if six else (host, port))
        if not port:
            # Linux gives a port of its own choice away again when the listener is shut down, which is how our threads
            # are woken out of accept(): take the same one by its number.
            port = listener.getsockname()[1]
            listener.close()
            return open_one(text, port, dual)
        listener.listen(BACKLOG)
        return listener
    except OSError as exc:
        listener.close()
        exc.filename = "%s port %d" % (text, port)
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
