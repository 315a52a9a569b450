"""UDP sockets, and sending many datagrams by few system calls. Knows no SOCKS. Any thread may call.

Datagrams of one length to one address are sent by one call, and the Linux kernel cuts them up again (UDP generic
segmentation offload, UDP_SEGMENT in udp(7), since 4.18). On loopback that takes a seventh of the time of a call for
each.
"""
from __future__ import annotations

import errno
import os
import socket
import struct
import sys
from threading import Condition
from typing import Any, Counter, Dict, Iterable, List, Optional, Sequence, Tuple, TypeVar

from ..protocol.errors import name_of

BURST = 64                      # datagrams from one socket before the next socket is served; one call cuts 64 at most
DATAGRAM_BYTES = 1 << 16        # more than UDP can carry, so that no datagram is truncated
BURST_BYTES = 60000             # what a burst may hold before its last datagram: one call sends 65,507 at most
SEGMENT_BYTES = 1452            # of payload in an Ethernet frame with IPv6 and UDP headers; longer ones go one by one
SOCKET_BYTES = 1 << 20          # of each kernel buffer, or what the kernel allows (net.core.rmem_max)
BUFFER_WAIT_S = 1.0             # for a shared buffer, before one more is allocated
NONBLOCK = getattr(socket, "SOCK_NONBLOCK", 0)          # saves a system call where it exists
LINUX = sys.platform.startswith("linux")
SOL_UDP, UDP_SEGMENT = 17, 103                          # linux/udp.h; the socket module has no names for them
REMEMBERED = 512                # headers each way, of one association
K = TypeVar("K")
V = TypeVar("V")
Buffer = Tuple[bytearray, memoryview]                   # and a view of the whole of it


class Buffers:
    """Receive buffers that the threads of the process share, so that none has to keep one while it waits for datagrams.

    As many threads receive and send at the same time as there are buffers; the others wait for one, as they would for
    the interpreter.
    """

    def __init__(self, size: int, most: int = max(4, min(os.cpu_count() or 1, 32))) -> None:
        self.size = size
        self.most = most
        self._free: List[Optional[Buffer]] = [None] * most      # None: allocated when it is first needed
        self._returned = Condition()

    def take(self) -> Buffer:
        with self._returned:
            # If none comes, others are stuck: a trace to a full pipe, a fork amid a burst.
            free = self._free.pop() if self._returned.wait_for(lambda: self._free, BUFFER_WAIT_S) else None
        if free:
            return free
        buffer = bytearray(self.size)
        return buffer, memoryview(buffer)

    def give_back(self, buffer: Buffer) -> None:
        with self._returned:
            if len(self._free) < self.most:
                self._free.append(buffer)
                self._returned.notify()


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


def segments(sock: socket.socket) -> bool:
    """Does the kernel know UDP_SEGMENT? One that does not would send all as one long datagram."""
    try:
        return LINUX and sock.getsockopt(SOL_UDP, UDP_SEGMENT) == 0
    except OSError:
        return False


def send(sock: socket.socket, run: List[memoryview], address: Any, dropped: "Counter[str]") -> int:
    """Send the datagrams of `run`, all of one length, and return how many; the others are counted in `dropped`."""
    if len(run) > 1 and 0 < len(run[0]) <= SEGMENT_BYTES and segments(sock):
        try:
            sock.sendmsg(run, [(SOL_UDP, UDP_SEGMENT, struct.pack("=H", len(run[0])))], 0, address)
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
