"""CONNECT: reach the destination by whichever of its addresses answers first.

Racing after RFC 8305 sections 4 and 5: both families in turn, the next attempt when one fails or after 250 ms, the
first that connects wins. The client is watched meanwhile: if it resets, there is nobody left to connect for.
"""
from __future__ import annotations

import errno
import os
import select
import socket
from collections import deque
from time import monotonic
from typing import Deque, Dict, List, Optional, Sequence, Tuple, Union

from ..protocol.errors import RequestRefused, name_of, rep_of, telling
from ..net.poller import WRITE, SelectPoll, new_poll
from ..net.addresses import family_of, IP, text_of

ATTEMPT_DELAY_S = 0.25                                  # RFC 8305 §5
NONBLOCK = getattr(socket, "SOCK_NONBLOCK", 0)          # Linux: a call less
IN_PROGRESS = {errno.EINPROGRESS, errno.EALREADY, errno.EWOULDBLOCK}        # Windows says the last
Connected = Tuple[socket.socket, IP]


def connect(addresses: Sequence[IP], port: int, timeout_s: float,
            client: Optional[socket.socket] = None) -> Connected:
    """A socket that does not block, connected to the first of `addresses` that answers, and this address; all within
    timeout_s (0: for ever).

    Raises RequestRefused with the REP of the most telling failure, or ConnectionResetError when `client` has gone.
    """
    with _Race(port, timeout_s, client) as race:
        return race.run(interleave(addresses))


def interleave(addresses: Sequence[IP]) -> List[IP]:
    """Families in turn, beginning with the resolver's first choice.                    RFC 8305 §4"""
    if len(addresses) == 1:
        return list(addresses)
    first = [address for address in addresses if address.version == addresses[0].version]
    other = [address for address in addresses if address.version != addresses[0].version]
    mixed = [address for pair in zip(first, other) for address in pair]
    return mixed + first[len(other):] + other[len(first):]


class _Race:
    """The attempts under way, and what became of the others."""

    def __init__(self, port: int, timeout_s: float, client: Optional[socket.socket]) -> None:
        self.port = port
        self.client = client
        self.began = monotonic()
        self.deadline = self.began + timeout_s if timeout_s else float("inf")
        self.pending: Dict[int, Tuple[socket.socket, IP]] = {}
        self.failures: List[Tuple[OSError, str]] = []
        self.poll: Union[select.poll, SelectPoll, None] = None      # made when an attempt has to be waited for

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
            delay_s = ATTEMPT_DELAY_S if len(self.failures) == known else 0.0       # it failed on the spot
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
        """Begin one attempt; the socket, if it connected on the spot as loopback does."""
        try:
            sock = socket.socket(family_of(address), socket.SOCK_STREAM | NONBLOCK)
        except OSError as exc:                          # no descriptors, or no such family
            self.failed(address, exc)
            return None
        if not NONBLOCK:
            sock.setblocking(False)
        target = text_of(address), self.port
        error = sock.connect_ex(target)
        if error == errno.EINPROGRESS and NONBLOCK:     # what is on this machine has answered meanwhile: Linux says so
            error = sock.connect_ex(target)             # when asked again, which is cheaper than waiting for it
        if not error:
            return sock, address
        if error not in IN_PROGRESS:
            sock.close()
            self.failed(address, OSError(error, os.strerror(error)))
            return None
        if self.poll is None:
            self.poll = new_poll()
            if self.client is not None:                 # no events: a reset is reported all the same, and a FIN,
                self.poll.register(self.client.fileno(), 0)     # which may be a half-close, is not
        self.pending[sock.fileno()] = sock, address
        self.poll.register(sock.fileno(), WRITE)
        return None

    def wait(self, until: float) -> Tuple[Optional[Connected], bool]:
        """Look at the attempts until one connects (it is given back), one fails (True), or `until`."""
        timeout_ms = None if until == float("inf") else max(0.0, until - monotonic()) * 1000 + 1
        failed = False
        assert self.poll is not None                    # something is pending
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
