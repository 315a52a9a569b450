"""BIND: listen for the one peer that the client expects, and watch the client while it does.

Says nothing to the client: handler.py sends the two replies, the first with `Rendezvous.bnd`, the second with the peer
that `wait` gives. Whoever comes and is not expected is closed, and the wait goes on. RFC 1928 sections 4 and 6.
"""
from __future__ import annotations

import errno
import logging
import os
import select
import socket
from ipaddress import IPv4Address, IPv6Address
from time import monotonic
from typing import Callable, List, Optional, Sequence, Tuple

from ..protocol.codes import Rep
from ..protocol.errors import RequestRefused, name_of, rep_of, telling
from ..net.addresses import advertised, endpoint_of, family_of, IP, ip_of, Sockaddr, Endpoint
from ..net.listeners import tune
from ..net.poller import READ, new_poll
from ..net.shares import ANY_PORT, Ports
from ..protocol.fields import Host, text
from ..protocol.messages import Address

log = logging.getLogger(__name__)

EARLY_BYTES = 1 << 16               # what we keep for the peer of what the client sends before it comes
BACKLOG = 64                        # strangers must not crowd out the peer while we turn them away
DISCARD = 9                         # a port to ask the routes with, never sent to: RFC 863
TAKEN = {errno.EADDRINUSE, errno.EACCES}        # by somebody else, or below 1024: perhaps the next port is free
LEFT = getattr(select, "POLLRDHUP", 0)          # Linux: a FIN is told even when we no longer read


def any_peer(dst: Address) -> bool:
    """A DST with neither address nor port, before it is normalised: any host may connect, as for 0.0.0.0."""
    return dst == Address(b"", 0)


def expected(host: Host, resolve: Callable[[Host], Sequence[IP]]) -> List[IP]:
    """The peers that may connect: every address of the normalised `host`, or the unspecified one for any host.

    `resolve` looks a name up. Raises what it raises, and RequestRefused X'04' for a name that stands for no host.
    """
    if not isinstance(host, bytes):
        return [host]
    # Name servers that block a name answer 0.0.0.0: that must not stand for any host.
    peers = [peer for peer in resolve(host) if not peer.is_unspecified]
    if not peers:
        raise RequestRefused(Rep.HOST_UNREACHABLE, "%s resolves to no host" % text(host))
    return peers


class Rendezvous:
    """A listener, from the first reply to the second.

    peers      as `expected` gives them
    ports      to listen on, of which `owner` (as addresses.subscriber gives it) takes its share
    bnd        where the peer is to connect to, never 0.0.0.0
    early      what the client has sent since, for the peer
    permit     where any host may connect: may this one?
    strangers  how many unexpected peers came

    Raises RequestRefused: X'01' when no port is free, X'03' and the like when there is no way to the peer.
    """

    def __init__(self, client: socket.socket, peers: Sequence[IP], ports: Ports = ANY_PORT,
                 advertise: Sequence[str] = (), permit: Callable[[IP], bool] = lambda peer: True,
                 owner: str = "") -> None:
        self.client = client
        self.permit = permit
        self.peers = frozenset(peers)
        self.anybody = all(peer.is_unspecified for peer in peers)
        self.early = b""
        self.strangers = 0
        here, scope = our_end(client if self.anybody else None, peers)
        told = advertised(advertise, here)
        anywhere: IP = IPv4Address(0) if here.version == 4 else IPv6Address(0)
        self.version = here.version
        self.ports = ports
        self.owner = owner
        if not ports.take(owner, self.version):
            raise RequestRefused(Rep.GENERAL_FAILURE, "no port left for %s: %s" % (owner, ports))
        try:
            self.listener = listen(here if told == here else anywhere, scope, ports)
        except RequestRefused:
            ports.give_back(owner, self.version)
            raise
        self.bnd = Endpoint(told, self.listener.getsockname()[1])

    def __enter__(self) -> Rendezvous:
        return self

    def __exit__(self, *_: object) -> None:
        self.listener.close()
        self.ports.give_back(self.owner, self.version)

    def wait(self, timeout_s: float) -> Tuple[socket.socket, Endpoint]:
        """The connection of the expected peer, and who that is. Leave the `with` then: one peer only.

        Raises EOFError or OSError when the client leaves, RequestRefused X'06' after timeout_s (0: never), X'01' when
        we have no descriptor for whoever comes.
        """
        deadline = monotonic() + timeout_s
        poll = new_poll()
        poll.register(self.listener.fileno(), READ)
        poll.register(self.client.fileno(), READ)
        while True:
            left_ms = (deadline - monotonic()) * 1000 if timeout_s else None
            if left_ms is not None and left_ms <= 0:
                raise RequestRefused(Rep.TTL_EXPIRED, self.also("nobody came within %g s" % timeout_s))
            for fd, events in poll.poll(left_ms and left_ms + 1):
                if fd == self.client.fileno():
                    self.hear(events)
                    if len(self.early) >= EARLY_BYTES:
                        poll.modify(fd, LEFT)
                    continue
                came = self.accept()
                if came:
                    return came

    def hear(self, events: int) -> None:
        """The client sent something, or left. Raises EOFError or OSError when it left."""
        room = EARLY_BYTES - len(self.early)
        if events & READ and room:
            data = self.client.recv(room)
            self.early += data
            if data:
                return
        raise EOFError(self.also("client left before anybody came"))

    def accept(self) -> Optional[Tuple[socket.socket, Endpoint]]:
        """Whoever came, if it is the expected peer."""
        try:
            remote, sockaddr = self.listener.accept()
        except (BlockingIOError, InterruptedError, ConnectionAbortedError):     # gone again
            return None
        except OSError as exc:                  # would come back at once, for as long as it lasts
            raise RequestRefused(rep_of(exc), self.also("cannot accept: %s" % name_of(exc))) from None
        peer = endpoint_of(sockaddr)
        if self.permit(ip_of(sockaddr)) if self.anybody else peer.ip in self.peers:
            tune(remote)
            return remote, peer
        remote.close()
        self.strangers += 1
        log.info("stranger bnd=%(bnd)s peer=%(peer)s expected=%(expected)s", {
            "bnd": str(self.bnd), "peer": str(peer), "expected": ",".join(map(str, self.peers))})
        return None

    def also(self, why: str) -> str:
        """`why`, and how many strangers there were, for the log."""
        if not self.strangers:
            return why
        return "%s%d stranger%s turned away" % (why and why + "; ", self.strangers, "s" * (self.strangers > 1))


def our_end(client: Optional[socket.socket], peers: Sequence[IP]) -> Tuple[IP, int]:
    """Our address where `client` reached us, or else on the route to the first of `peers` that has one; and its scope.

    Raises RequestRefused X'03' and the like when there is no way to any of them.
    """
    if client:
        return split(client.getsockname())
    failures: List[OSError] = []
    for peer in peers:
        try:
            with socket.socket(family_of(peer), socket.SOCK_DGRAM) as probe:
                probe.connect((str(peer), DISCARD))         # sends nothing: the kernel chooses the route, and our end
                return split(probe.getsockname())
        except OSError as exc:
            failures.append(exc)
    worst = min(failures, key=telling)
    raise RequestRefused(rep_of(worst), "no way to %s: %s" % (", ".join(map(str, peers)), name_of(worst)))


def split(sockaddr: Sockaddr) -> Tuple[IP, int]:
    """Host, and the scope without which a link-local one cannot be listened on: our own getsockname() has both."""
    return ip_of(sockaddr), int(sockaddr[3]) if len(sockaddr) == 4 else 0


def listen(host: IP, scope: int, ports: Ports) -> socket.socket:
    """A listener at one of `ports`. Raises RequestRefused X'01' when no port or descriptor is free."""
    failure = OSError()
    for port in ports:
        try:
            listener = socket.socket(family_of(host), socket.SOCK_STREAM)
        except OSError as exc:
            failure = exc
            break
        try:
            if ports.range and os.name == "posix":          # what an earlier tunnel left in TIME_WAIT is no obstacle
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
