"""UDP sockets, and sending many datagrams by few system calls. Knows no SOCKS. Any thread may call.

Datagrams of one length to one address are sent by one call, and the Linux kernel cuts them up again (UDP generic
segmentation offload, UDP_SEGMENT in udp(7), since 4.18). On loopback that takes a seventh of the time of a call for
each.
"""
from __future__ import annotations

import contextlib
import errno
import socket
import struct
import sys
from typing import Any, Callable, Counter, Dict, Iterable, List, Optional, Sequence, TypeVar, Union

from ..net.addresses import IP, Sockaddr, family_of, ip_of, leaving
from ..net.shares import Ports
from ..protocol.codes import Rep
from ..protocol.errors import RequestRefused, name_of, rep_of

BURST = 64                      # datagrams from one socket before the next socket is served; one call cuts 64 at most
DATAGRAM_BYTES = 1 << 16        # more than UDP can carry, so that no datagram is truncated
BURST_BYTES = 60000             # what a burst may hold before its last datagram: one call sends 65,507 at most
SEGMENT_BYTES = 1452            # of payload in an Ethernet frame with IPv6 and UDP headers; longer ones go one by one
SOCKET_BYTES = 1 << 20          # of each kernel buffer, or what the kernel allows (net.core.rmem_max)
NONBLOCK = getattr(socket, "SOCK_NONBLOCK", 0)          # saves a system call where it exists
LINUX = sys.platform.startswith("linux")
DISCARD = 9                     # a port
SOL_UDP, UDP_SEGMENT = 17, 103                          # linux/udp.h; the socket module has no names for them
REMEMBERED = 512                # headers each way, of one association
K = TypeVar("K")
V = TypeVar("V")
Run = Sequence[Union[bytes, bytearray]]                 # datagrams


def bound(family: int, host: str, ports: Iterable[int], scope: Sequence[Any] = ()) -> socket.socket:
    """A non-blocking UDP socket at `host` ("": any) and the first of `ports` that is free; of an IPv6 `host`, `scope`
    is the rest of its sockaddr. Raises OSError, EADDRINUSE when no port is free."""
    sock = socket.socket(family, socket.SOCK_DGRAM | NONBLOCK)
    taken: Optional[OSError] = None
    try:
        if not NONBLOCK:
            sock.setblocking(False)
        for option in (socket.SO_RCVBUF, socket.SO_SNDBUF):
            try:
                sock.setsockopt(socket.SOL_SOCKET, option, SOCKET_BYTES)
            except OSError:                             # Linux takes less instead, BSD refuses
                pass
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        for port in ports:
            try:
                sock.bind((host, port, *scope))
                return sock
            except OSError as exc:
                if exc.errno != errno.EADDRINUSE:
                    raise
                taken = exc
        raise taken or OSError(errno.EADDRINUSE, "no port")
    except OSError:
        sock.close()
        raise
    finally:
        taken = None                                    # or it and this frame would be a cycle


def our_end(control: socket.socket, client: IP) -> Sockaddr:
    """Where a client can send datagrams to: the address at which its TCP connection reached us. If a load balancer made
    that connection over loopback, or over the other family: our address on the route to the client."""
    here = control.getsockname()
    if (ip_of(here).version, ip_of(here).is_loopback) != (client.version, client.is_loopback):
        with contextlib.suppress(OSError), socket.socket(family_of(client), socket.SOCK_DGRAM) as probe:
            probe.connect((str(client), DISCARD))           # sends nothing; the kernel chooses our address
            here = probe.getsockname()
    return here                                             # type: ignore[no-any-return]


class Sockets:
    """The UDP sockets of one association: one faces the client, one for each family the remotes. They take ports from
    the share of `owner`. Raises RequestRefused when there is no socket or port.

    inside      faces the client
    outside     the others, by descriptor
    """

    def __init__(self, control: socket.socket, client: IP, owner: str, ports: Ports, out: Sequence[str],
                 watch: Callable[[int], None]) -> None:
        """`watch` is called with the descriptor of every socket that faces remotes, as soon as it is there."""
        self._ports, self._owner = ports, owner
        self._control, self._out, self._watch = control, out, watch
        self.outside: Dict[int, socket.socket] = {}
        self._toward: Dict[int, socket.socket] = {}         # the same by family
        self._taken: List[int] = []                         # of the ports: IP versions
        self.inside = self._open(our_end(control, client))

    def _open(self, sockaddr: Sockaddr) -> socket.socket:
        """The socket that faces the client. Where ports are scarce those towards the remotes come with it."""
        here = ip_of(sockaddr)
        families = sorted({socket.AF_INET, family_of(here)}) if self._ports.range else []
        versions = [here.version] + [version_of(family) for family in families]
        inside = None
        try:
            for version in set(versions):
                self._take(version, versions.count(version))
            inside = bound(family_of(here), str(here), self._ports, sockaddr[2:] if here.version == 6 else ())
            for family in families:
                self.open_toward(family)
            return inside
        except OSError as exc:
            if inside:
                inside.close()
            self._close()
            why = "no UDP socket in %s: %s" % (self._ports, name_of(exc))
            raise RequestRefused(Rep.GENERAL_FAILURE if exc.errno == errno.EADDRINUSE else rep_of(exc), why) from None

    def _take(self, version: int, number: int) -> None:
        if not self._ports.take(self._owner, version, number):
            raise OSError(errno.EADDRINUSE, "no port left for %s" % self._owner)
        self._taken += [version] * number

    def open_toward(self, family: int) -> socket.socket:
        source = self._out and leaving(self._out, ip_of(self._control.getsockname()), version_of(family))
        sock = self._toward[family] = bound(family, str(source) if source else "", self._ports)
        self.outside[sock.fileno()] = sock
        self._watch(sock.fileno())
        return sock

    def toward(self, remote: IP) -> socket.socket:
        """Our socket of the remote's family, opened when it is first needed. Raises OSError when there can be none."""
        sock = self._toward.get(family_of(remote))
        if not sock:
            self._take(remote.version, 1)
            try:
                sock = self.open_toward(family_of(remote))
            except OSError:
                self._taken.pop()
                self._ports.give_back(self._owner, remote.version)
                raise
        return sock

    def close(self) -> None:
        self.inside.close()
        self._close()

    def _close(self) -> None:
        for sock in self.outside.values():
            sock.close()
        for version in self._taken:
            self._ports.give_back(self._owner, version)
        self._taken = []


def version_of(family: int) -> int:
    return 4 if family == socket.AF_INET else 6


def segments(sock: socket.socket) -> bool:
    """Does the kernel know UDP_SEGMENT? A kernel that does not would send all as one long datagram."""
    try:
        return LINUX and sock.getsockopt(SOL_UDP, UDP_SEGMENT) == 0
    except OSError:
        return False


def send(sock: socket.socket, run: Run, address: Any, dropped: "Counter[str]") -> int:
    """Send the datagrams of `run`, all of one length, and return how many; the others are counted in `dropped`."""
    if len(run) > 1 and 0 < len(run[0]) <= SEGMENT_BYTES and segments(sock):
        try:
            sock.sendmsg([b"".join(run)], [(SOL_UDP, UDP_SEGMENT, struct.pack("=H", len(run[0])))], 0, address)
            return len(run)
        except OSError:                                 # a smaller MTU, or a network card without checksum offload
            pass
    sent = 0
    for datagram in run:
        try:
            sock.sendto(datagram, address)
            sent += 1
        except OSError as exc:
            dropped[name_of(exc)] += 1
    return sent


def remember(table: Dict[K, V], key: K, value: V) -> V:
    """Put it in, and return it; the oldest goes when the table is full."""
    while len(table) >= REMEMBERED:
        del table[next(iter(table))]
    table[key] = value
    return value
