"""CONNECT: try the addresses of the destination in parallel, and use the first connection that is established.

Happy Eyeballs, RFC 8305 sections 4 and 5: IPv6 and IPv4 addresses alternate, and the next attempt starts after 250 ms
or when one fails. A reset by the client ends all attempts. Runs in the handler's thread.
"""
from __future__ import annotations

import errno
import os
import select
import socket
import sys
from collections import deque
from time import monotonic
from typing import Callable, Deque, Dict, List, Optional, Sequence, Tuple, Union

from ..protocol.errors import RequestRefused, name_of, rep_of, telling
from ..net.poller import WRITE, SelectPoll, new_poll
from ..net.addresses import family_of, IP, text_of

ATTEMPT_DELAY_S = 0.25                                  # RFC 8305 §5
# Linux: bind() takes an address only, and connect() the port, which then need not be free for all destinations. ip(7)
LATE_PORT = getattr(socket, "IP_BIND_ADDRESS_NO_PORT", 24 if sys.platform.startswith("linux") else 0)
NONBLOCK = getattr(socket, "SOCK_NONBLOCK", 0)          # Linux: saves a system call
IN_PROGRESS = {errno.EINPROGRESS, errno.EALREADY, errno.EWOULDBLOCK}        # the last one on Windows
Connected = Tuple[socket.socket, IP]
Source = Callable[[IP], Optional[IP]]


def any_address(remote: IP) -> Optional[IP]:
    """The Source that leaves the choice to the system."""
    return None


def connect(addresses: Sequence[IP], port: int, timeout_s: float,
            client: Optional[socket.socket] = None, source: Source = any_address) -> Connected:
    """Connect to the first of `addresses` that answers. Returns a non-blocking socket and the address.

    source(address) is our own address for the connection to `address`; None: the system chooses.

    The time limit for all addresses together is timeout_s (0: none). Raises RequestRefused with the REP of the most
    specific failure, or ConnectionResetError if `client` resets its connection.
    """
    with _Race(port, timeout_s, client, source) as race:
        return race.run(interleave(addresses))


def interleave(addresses: Sequence[IP]) -> List[IP]:
    """Alternate address families, the first one of `addresses` first.                  RFC 8305 §4"""
    if len(addresses) == 1:
        return list(addresses)
    first = [address for address in addresses if address.version == addresses[0].version]
    other = [address for address in addresses if address.version != addresses[0].version]
    mixed = [address for pair in zip(first, other) for address in pair]
    return mixed + first[len(other):] + other[len(first):]


def bind(sock: socket.socket, source: IP) -> None:
    """Have `sock` connect from this address of ours. Raises OSError."""
    if LATE_PORT:
        try:
            sock.setsockopt(socket.IPPROTO_IP, LATE_PORT, 1)
        except OSError:                                 # before Linux 4.2
            pass
    sock.bind((text_of(source), 0))


class _Race:
    """The pending attempts to connect, and the failures of the others."""

    def __init__(self, port: int, timeout_s: float, client: Optional[socket.socket], source: Source) -> None:
        self.port = port
        self.client = client
        self.source = source
        self.began = monotonic()
        self.deadline = self.began + timeout_s if timeout_s else float("inf")
        self.pending: Dict[int, Tuple[socket.socket, IP]] = {}
        self.failures: List[Tuple[OSError, str]] = []
        self.poll: Union[select.poll, SelectPoll, None] = None      # made for the first pending attempt

    def __enter__(self) -> _Race:
        return self

    def __exit__(self, *_: object) -> None:
        for sock, _address in self.pending.values():
            sock.close()

    def run(self, addresses: Sequence[IP]) -> Connected:
        waiting: Deque[IP] = deque(addresses)
        while waiting or self.pending:
            known = len(self.failures)
            if waiting:
                winner = self.start(waiting.popleft())
                if winner:
                    return winner
            delay_s = ATTEMPT_DELAY_S if len(self.failures) == known else 0.0       # it failed immediately
            next_start = monotonic() + delay_s if waiting else float("inf")
            while self.pending:
                winner, failed = self.wait(min(next_start, self.deadline))
                if winner:
                    return winner
                now = monotonic()
                if now >= self.deadline:
                    raise self.refusal(OSError(errno.ETIMEDOUT, ""))
                if waiting and (failed or now >= next_start):
                    break
        raise self.refusal()

    def start(self, address: IP) -> Optional[Connected]:
        """Start one attempt. Returns the socket if it is connected immediately, as on loopback."""
        try:
            sock = socket.socket(family_of(address), socket.SOCK_STREAM | NONBLOCK)
        except OSError as exc:                          # out of descriptors, or unknown address family
            self.failed(address, exc)
            return None
        if not NONBLOCK:
            sock.setblocking(False)
        source = self.source(address)
        if source:
            try:
                bind(sock, source)
            except OSError as exc:                      # the address is not ours any more
                sock.close()
                self.failed(address, exc, source)
                return None
        target = text_of(address), self.port
        error = sock.connect_ex(target)
        if error == errno.EINPROGRESS and NONBLOCK:     # loopback has answered by now: a second call on Linux tells,
            error = sock.connect_ex(target)             # and costs less than poll()
        if not error:
            return sock, address
        if error not in IN_PROGRESS:
            sock.close()
            self.failed(address, OSError(error, os.strerror(error)))
            return None
        if self.poll is None:
            self.poll = new_poll()
            if self.client is not None:                 # no events: poll() always reports a reset, but not a FIN,
                self.poll.register(self.client.fileno(), 0)     # which may be a half-close
        self.pending[sock.fileno()] = sock, address
        self.poll.register(sock.fileno(), WRITE)
        return None

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

    def failed(self, address: IP, error: OSError, source: Optional[IP] = None) -> None:
        words = "%s from %s" % (address, source) if source else str(address)
        self.failures.append((error, "%s %s after %.3f s" % (words, name_of(error), monotonic() - self.began)))

    def tried(self) -> str:
        silent = ["%s silent for %.3f s" % (address, monotonic() - self.began) for _, address in self.pending.values()]
        return ", ".join([words for _, words in self.failures] + silent)

    def refusal(self, *more: OSError) -> RequestRefused:
        error = min([error for error, _ in self.failures] + list(more), key=telling)
        return RequestRefused(rep_of(error), self.tried())
