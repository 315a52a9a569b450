"""BIND: listen for the one peer that the client expects, and close any other.

handler.py sends the two replies: the first with `Rendezvous.bnd`, the second with the peer that `wait` returns. Runs in
the handler's thread. RFC 1928 sections 4 and 6.
"""
from __future__ import annotations

import errno
import logging
import os
import select
import socket
from ipaddress import IPv4Address, IPv6Address
from time import monotonic
from typing import Callable, List, Optional, Sequence, Tuple, Union

from ..protocol.codes import Rep
from ..protocol.errors import RequestRefused, name_of, rep_of, telling
from ..net.addresses import advertised, endpoint_of, family_of, IP, ip_of, leaving, Sockaddr, Endpoint
from ..net.listeners import tune
from ..net.poller import READ, new_poll
from ..net.shares import ANY_PORT, Ports
from ..protocol.fields import Host, text
from ..protocol.messages import Address
from .dialogue import Dialogue

log = logging.getLogger(__name__)

EARLY_BYTES = 1 << 16               # of data that the client sends before the peer connects
READ_BYTES = 4096                   # of it at a time
BACKLOG = 64                        # so that unexpected peers do not fill the queue
DISCARD = 9                         # any port, to look up the route; nothing is sent. RFC 863
TAKEN = {errno.EADDRINUSE, errno.EACCES}        # in use or privileged; the next port may be free
Place = Union[Endpoint, Address]     # an Address where an upstream tells it
LEFT = getattr(select, "POLLRDHUP", 0)          # Linux: reports a FIN without reading


def any_peer(dst: Address) -> bool:
    """Whether a DST, not yet normalised, has neither address nor port. It means any peer, as 0.0.0.0 does."""
    return dst == Address(b"", 0)


def expected(host: Host, resolve: Callable[[Host], Sequence[IP]]) -> List[IP]:
    """The addresses of the expected peer: those of the normalised `host`. The unspecified one means any peer.

    `resolve` looks a name up, and may raise. Raises RequestRefused X'04' for a name without a usable address.
    """
    if not isinstance(host, bytes):
        return [host]
    # Name servers that block a name answer 0.0.0.0: that must not mean any peer.
    peers = [peer for peer in resolve(host) if not peer.is_unspecified]
    if not peers:
        raise RequestRefused(Rep.HOST_UNREACHABLE, "%s resolves to no host" % text(host))
    return peers


class PeerWait:
    """Waits for a peer between the two replies, and for the client to leave.

    bnd         where the peer has to connect
    awaited     a socket that is readable when accept() is to be called
    early       the bytes that the client sent meanwhile, for the peer
    dialogue    with the upstream that listens, if one does
    deadline    of wait()
    unexpected  the number of unexpected peers
    """

    awaited: socket.socket
    deadline = float("inf")
    unexpected = 0
    early = b""
    dialogue: Optional[Dialogue] = None
    bnd: Place

    def __init__(self, client: socket.socket) -> None:
        self.client = client

    def __enter__(self) -> PeerWait:
        return self

    def __exit__(self, *_: object) -> None:
        raise NotImplementedError

    def accept(self) -> Optional[Tuple[socket.socket, Place]]:
        """The connection of the peer and its address; None: wait on."""
        raise NotImplementedError

    def wait(self, timeout_s: float) -> Tuple[socket.socket, Place]:
        """Wait for the expected peer. Returns its connection and address; leave the `with` then: one peer only.

        Raises EOFError or OSError if the client leaves, RequestRefused X'06' after timeout_s (0: never), and what
        accept() raises.
        """
        deadline = self.deadline = monotonic() + (timeout_s or float("inf"))
        poll = new_poll()
        poll.register(self.awaited.fileno(), READ)
        poll.register(self.client.fileno(), READ)
        while True:
            left_ms = (deadline - monotonic()) * 1000 if timeout_s else None
            if left_ms is not None and left_ms <= 0:
                raise RequestRefused(Rep.TTL_EXPIRED, self.also("no peer connected within %g s" % timeout_s))
            for fd, events in poll.poll(left_ms and left_ms + 1):
                if fd == self.client.fileno():
                    self.read_client(events)
                    if len(self.early) >= EARLY_BYTES:
                        poll.modify(fd, LEFT)
                    continue
                connected = self.accept()
                if connected:
                    return connected

    def read_client(self, events: int) -> None:
        """Read what the client sent, up to EARLY_BYTES. Raises EOFError or OSError if it left."""
        room = EARLY_BYTES - len(self.early)
        if events & READ and room:
            data = self.client.recv(min(room, READ_BYTES))
            self.early += data
            if data:
                return
        raise EOFError(self.also("client left before a peer connected"))

    def also(self, why: str) -> str:
        """Add the number of unexpected peers to `why`, for the log."""
        if not self.unexpected:
            return why
        note = "%d unexpected peer%s turned away" % (self.unexpected, "s" * (self.unexpected > 1))
        return "%s; %s" % (why, note) if why else note


class Rendezvous(PeerWait):
    """A listener for one peer, between the two replies.

    peers       from `expected`
    ports       to listen on; `owner`, an addresses.subscriber, has a share of them
    bnd         where the peer has to connect; never 0.0.0.0
    out         our addresses, by --out
    permit      if any peer is expected: decides whether an address is allowed

    Raises RequestRefused: X'01' if no port is free, X'03' or similar if there is no route to the peer.
    """

    def __init__(self, client: socket.socket, peers: Sequence[IP], ports: Ports = ANY_PORT,
                 advertise: Sequence[str] = (), permit: Callable[[IP], bool] = lambda peer: True,
                 owner: str = "", out: Sequence[str] = ()) -> None:
        super().__init__(client)
        self.permit = permit
        self.peers = frozenset(peers)
        self.any_peer = all(peer.is_unspecified for peer in peers)
        here, scope = our_end(client, peers, out)
        told = advertised(advertise, here)
        anywhere: IP = IPv4Address(0) if here.version == 4 else IPv6Address(0)
        self.version = here.version
        self.ports = ports
        self.owner = owner
        if not ports.take(owner, self.version):
            raise RequestRefused(Rep.GENERAL_FAILURE, "no port left for %s: %s" % (owner, ports))
        try:
            self.awaited = self.listener = listen(here if told == here else anywhere, scope, ports)
        except RequestRefused:
            ports.give_back(owner, self.version)
            raise
        self.bnd = Endpoint(told, self.listener.getsockname()[1])

    def __exit__(self, *_: object) -> None:
        self.listener.close()
        self.ports.give_back(self.owner, self.version)

    def accept(self) -> Optional[Tuple[socket.socket, Endpoint]]:
        """Accept one connection. Returns it if it is from the expected peer, and closes it otherwise.

        Raises RequestRefused X'01' if no descriptor is left for it.
        """
        try:
            remote, sockaddr = self.listener.accept()
        except (BlockingIOError, InterruptedError, ConnectionAbortedError):     # it was reset again
            return None
        except OSError as exc:                  # retrying would fail immediately
            raise RequestRefused(rep_of(exc), self.also("cannot accept: %s" % name_of(exc))) from None
        peer = endpoint_of(sockaddr)
        if self.permit(ip_of(sockaddr)) if self.any_peer else peer.ip in self.peers:
            tune(remote)
            remote.setblocking(False)           # whatever socket.setdefaulttimeout() says
            return remote, peer
        remote.close()
        self.unexpected += 1
        log.info("unexpected_peer bnd=%(bnd)s peer=%(peer)s expected=%(expected)s", {
            "bnd": str(self.bnd), "peer": str(peer), "expected": ",".join(map(str, self.peers))})
        return None


def our_end(client: Optional[socket.socket], peers: Sequence[IP], out: Sequence[str] = ()) -> Tuple[IP, int]:
    """Our address for the peer to connect to, and its IPv6 scope: by --out; else on the route to the first reachable
    peer, or for any peer the one to which `client` connected (None: no peer is "any", and `out` is empty).

    Raises RequestRefused X'03' or similar if there is no route to any of `peers`.
    """
    here, scope = split(client.getsockname()) if client else (peers[0], 0)
    if all(peer.is_unspecified for peer in peers):
        chosen = leaving(out, here, here.version)
        return (chosen, 0) if chosen else (here, scope)
    failures: List[OSError] = []
    for peer in peers:
        try:
            with socket.socket(family_of(peer), socket.SOCK_DGRAM) as probe:
                source = leaving(out, here, peer)
                if source:
                    probe.bind((str(source), 0))
                probe.connect((str(peer), DISCARD))         # sends nothing; the kernel chooses our address
                return split(probe.getsockname())
        except OSError as exc:
            failures.append(exc)
    worst = min(failures, key=telling)
    raise RequestRefused(rep_of(worst), "no route to %s: %s" % (", ".join(map(str, peers)), name_of(worst)))


def split(sockaddr: Sockaddr) -> Tuple[IP, int]:
    """The host and scope of a getsockname(). To listen on a link-local address needs its scope."""
    return ip_of(sockaddr), int(sockaddr[3]) if len(sockaddr) == 4 else 0


def listen(host: IP, scope: int, ports: Ports) -> socket.socket:
    """Listen on one of `ports`. Raises RequestRefused X'01' if no port or descriptor is free."""
    failure = OSError()
    for port in ports:
        try:
            listener = socket.socket(family_of(host), socket.SOCK_STREAM)
        except OSError as exc:
            failure = exc
            break
        try:
            if ports.range and os.name == "posix":          # a port in TIME_WAIT can be used again
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if host.version == 6:
                listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            listener.bind((str(host), port, 0, scope) if host.version == 6 else (str(host), port))
            listener.listen(BACKLOG)
            listener.setblocking(False)
            return listener
        except OSError as exc:
            listener.close()
            failure = exc
            if exc.errno not in TAKEN:
                break
    rep = Rep.GENERAL_FAILURE if failure.errno in TAKEN else rep_of(failure)
    raise RequestRefused(rep, "cannot listen on %s, %s: %s" % (host, ports, name_of(failure)))
