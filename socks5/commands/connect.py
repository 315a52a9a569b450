"""CONNECT: try the addresses of the destination in parallel, and use the first connection that is established.

Happy Eyeballs, RFC 8305 sections 4 and 5: IPv6 and IPv4 addresses alternate, and the next attempt starts after 250 ms
or when one fails. At most MAX_PENDING are under way: then the oldest ends first. A reset by the client ends all. Runs
in the thread of the handler.
"""
from __future__ import annotations

import errno
import os
import select
import socket
import sys
from collections import deque
from time import monotonic
from typing import Any, Callable, Deque, Dict, List, Optional, Sequence, Tuple, Union

from ..protocol.errors import RequestRefused, name_of, rep_of, telling
from ..net.poller import WRITE, SelectPoll, new_poll
from ..net.addresses import IP, family_of
from ..protocol.fields import IPv4

ATTEMPT_DELAY_S = 0.25                                  # RFC 8305 §5
MAX_PENDING = 8         # attempts at a time, each with a descriptor: a name may have any number of silent addresses,
FREE_PENDING = 2        # and how many the caller is not asked for
# Linux: bind() takes an address only, and connect() the port, which then need not be free for all destinations. ip(7)
LATE_PORT = getattr(socket, "IP_BIND_ADDRESS_NO_PORT", 24 if sys.platform.startswith("linux") else 0)
NONBLOCK = int(getattr(socket, "SOCK_NONBLOCK", 0))     # Linux: saves a system call
AF_INET, STREAM_NONBLOCK = int(socket.AF_INET), int(socket.SOCK_STREAM) | NONBLOCK      # enums take longer
EINPROGRESS = errno.EINPROGRESS
IN_PROGRESS = {errno.EINPROGRESS, errno.EALREADY, errno.EWOULDBLOCK}        # the last one on Windows
Connected = Tuple[socket.socket, IP]
Source = Callable[[IP], Optional[IP]]
Room = Callable[[int], bool]


def connect(addresses: Sequence[IP], port: int, deadline: float,
            client: Optional[socket.socket] = None, source: Optional[Source] = None,
            room: Room = lambda attempts: True) -> Connected:
    """Connect to the first of `addresses` that answers. Returns a non-blocking socket and the address.

    source(address) is our own address for the connection to `address`; None: the system chooses.
    room(attempts) says whether so many may be under way; called with 1 when it is over.

    The deadline for all addresses together is one of monotonic(); inf: none. Raises RequestRefused with the REP of the
    most specific failure, or ConnectionResetError if `client` resets its connection.
    """
    address = addresses[0]
    sock, error = dial(address, port, source)
    if sock and not error:                              # nearly always, where it is near
        return sock, address
    with _Race(port, deadline, client, monotonic(), source, room) as race:
        race.note(address, sock, error)
        return race.run(interleave(addresses)[1:])


def dial(address: IP, port: int, source: Optional[Source] = None) -> Tuple[Optional[socket.socket], int]:
    """Start to connect. Returns a non-blocking socket, and the errno: 0 if it is connected at once, as on loopback, one
    of IN_PROGRESS if it may be soon; without a socket, why it failed.

    SocketType is what socket.socket() is made of, in C: that takes three times as long to make and to close, for what
    the socket of a tunnel does not need, such as makefile() and `with`."""
    if type(address) is IPv4:                           # nearly always, and the others take longer
        text, family = address.text, AF_INET
    else:
        text, family = str(address), family_of(address)
    try:
        sock: Any = socket.SocketType(family, STREAM_NONBLOCK)
    except OSError as exc:                              # out of descriptors, or unknown address family
        return None, exc.errno or errno.EIO
    if not NONBLOCK:
        sock.setblocking(False)
    if source:
        try:
            bind(sock, source(address))
        except OSError as exc:                          # the address is not ours any more
            sock.close()
            return None, exc.errno or errno.EIO
    target = text, port
    error = sock.connect_ex(target)
    if error == EINPROGRESS and NONBLOCK:               # loopback has answered by now: a second call on Linux tells,
        error = sock.connect_ex(target)                 # and costs less than poll()
    if not error or error in IN_PROGRESS:
        return sock, error
    sock.close()
    return None, error


def bind(sock: socket.socket, source: Optional[IP]) -> None:
    """Have `sock` connect from this address of ours, if it is given. Raises OSError."""
    if source is None:
        return
    if LATE_PORT:
        try:
            sock.setsockopt(socket.IPPROTO_IP, LATE_PORT, 1)
        except OSError:                                 # before Linux 4.2
            pass
    sock.bind((str(source), 0))


def interleave(addresses: Sequence[IP]) -> Sequence[IP]:
    """Alternate address families, the first one of `addresses` first.                  RFC 8305 §4"""
    first = [address for address in addresses if address.version == addresses[0].version]
    other = [address for address in addresses if address.version != addresses[0].version]
    mixed = [address for pair in zip(first, other) for address in pair]
    return mixed + first[len(other):] + other[len(first):]


class _Race:
    """The pending attempts to connect, and the failures of the others."""

    def __init__(self, port: int, deadline: float, client: Optional[socket.socket], began: float,
                 source: Optional[Source], room: Room) -> None:
        self.port = port
        self.client = client
        self.began = began
        self.source = source
        self.room = room
        self.asked = False                              # for room
        self.next_start = began                         # of an attempt
        self.deadline = deadline
        self.pending: Dict[int, Tuple[socket.socket, IP]] = {}
        self.failures: List[Tuple[OSError, str]] = []
        self.poll: Union[select.poll, SelectPoll, None] = None      # made for the first pending attempt

    def __enter__(self) -> _Race:
        return self

    def __exit__(self, *_: object) -> None:
        for sock, _address in self.pending.values():
            sock.close()
        if self.asked:
            self.room(1)

    def run(self, addresses: Sequence[IP]) -> Connected:
        """Wait for the attempts that are noted, and start others."""
        waiting: Deque[IP] = deque(addresses)
        while waiting or self.pending:
            next_start = self.next_start if waiting else float("inf")
            while self.pending:
                winner, failed = self.wait(min(next_start, self.deadline))
                if winner:
                    return winner
                now = monotonic()
                if now >= self.deadline:
                    raise self.refusal(OSError(errno.ETIMEDOUT, ""))
                if waiting and (failed or now >= next_start):
                    break
            if waiting:
                self.make_room()
                address = waiting.popleft()
                sock, error = dial(address, self.port, self.source)
                if sock and not error:
                    return sock, address
                self.note(address, sock, error)
        raise self.refusal()

    def note(self, address: IP, sock: Optional[socket.socket], error: int) -> None:
        """Take over what dial() has started, or remember why it failed."""
        if sock is None:
            self.failed(address, OSError(error, os.strerror(error)))
            self.next_start = monotonic()
            return
        if self.poll is None:
            self.poll = new_poll()
            if self.client is not None:                 # no events: poll() always reports a reset, but not a FIN,
                self.poll.register(self.client.fileno(), 0)     # which may be a half-close
        self.pending[sock.fileno()] = sock, address
        self.poll.register(sock.fileno(), WRITE)
        self.next_start = monotonic() + ATTEMPT_DELAY_S

    def make_room(self) -> None:
        """For one more attempt. The oldest has had MAX_PENDING times ATTEMPT_DELAY_S, if no other failed."""
        count = len(self.pending)
        if count < FREE_PENDING:
            return
        self.asked = True
        if count < MAX_PENDING and self.room(count + 1):
            return
        fd, (sock, address) = next(iter(self.pending.items()))
        assert self.poll is not None                    # because an attempt is pending
        self.poll.unregister(fd)
        del self.pending[fd]
        sock.close()
        self.failed(address, OSError(errno.ETIMEDOUT, ""))

    def wait(self, until: float) -> Tuple[Optional[Connected], bool]:
        """Wait for an attempt to connect or fail, at most `until`. Returns the connection and whether one failed."""
        timeout_ms = None if until == float("inf") else max(0.0, until - monotonic()) * 1000 + 1
        failed = False
        assert self.poll is not None                    # because an attempt is pending
        for fd, _events in self.poll.poll(timeout_ms):
            if fd not in self.pending:
                raise ConnectionResetError(errno.ECONNRESET, "client left before %s answered" % self.tried())
            sock, address = self.pending.pop(fd)
            self.poll.unregister(fd)
            error = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if not error:
                return (sock, address), failed
            sock.close()
            self.failed(address, OSError(error, os.strerror(error)))
            failed = True
        return None, failed

    def failed(self, address: IP, error: OSError) -> None:
        self.failures.append((error, "%s %s after %.3f s" % (address, name_of(error), monotonic() - self.began)))

    def tried(self) -> str:
        silent = ["%s silent for %.3f s" % (address, monotonic() - self.began) for _, address in self.pending.values()]
        return ", ".join([words for _, words in self.failures] + silent)

    def refusal(self, *more: OSError) -> RequestRefused:
        error = min([error for error, _ in self.failures] + list(more), key=telling)
        return RequestRefused(rep_of(error), self.tried())
