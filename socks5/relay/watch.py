"""What the relay loop waits for: the descriptors of tunnels and groups, clients that have not said anything yet, and
other threads.
"""
from __future__ import annotations

import errno
import socket
from time import sleep
from typing import Any, Callable, Dict, Optional, Sequence, Tuple, Union

from ..net.poller import READ, new_poller
from .group import Group, Member
from .pipe import DONTWAIT
from .tunnel import CLIENT, REMOTE, UNREGISTERED, Tunnel, rewatch

REST_S = 0.1                    # when memory has run out


class Watch:
    """A client that has not said anything yet: it costs a descriptor, and no thread."""

    __slots__ = ("sock", "fd", "spoke", "forget")

    def __init__(self, sock: socket.socket, spoke: Callable[[bool], None], forget: Callable[[int], None]) -> None:
        """forget(fd) unregisters it, then spoke(whether there is something to read) is called."""
        self.sock = sock
        self.fd = sock.fileno()
        self.spoke = spoke
        self.forget = forget

    def handle(self, _side: int, _events: int, _now: float) -> bool:
        said = peek(self.sock)
        if said is None:
            return False
        self.forget(self.fd)
        self.spoke(said)
        return False


def peek(sock: socket.socket) -> Optional[bool]:
    """Whether there is something to read (True), the peer has left (False), or neither is known yet (None)."""
    timeout = sock.gettimeout()
    try:
        if not DONTWAIT:
            sock.setblocking(False)
        return bool(sock.recv(1, socket.MSG_PEEK | DONTWAIT))
    except BlockingIOError:
        return None
    except OSError:                         # reset
        return False
    finally:
        if not DONTWAIT:
            sock.settimeout(timeout)


class Bell:
    """Wakes the loop: a socket pair, of which one end is registered."""

    def __init__(self) -> None:
        self._heard, self._rung = socket.socketpair()
        for sock in (self._heard, self._rung):
            sock.setblocking(False)
        self.fd = self._heard.fileno()

    def ring(self) -> None:
        try:
            self._rung.send(b"\0")
        except OSError:                     # so many are unread that the loop wakes up anyway; or it is over
            pass

    def handle(self, _side: int, _events: int, _now: float) -> bool:
        self._heard.recv(4096)
        return False

    def close(self) -> None:
        self._heard.close()
        self._rung.close()


def persist(serve: Callable[[], object]) -> None:
    """Call it again when memory has run out: what it could not do is still due, and the next time there may be more."""
    while True:
        try:
            serve()
            return
        except MemoryError:
            sleep(REST_S)


class Registered:
    """`watched` has, by descriptor, that whose handle() is to be called: Tunnel, Member of a Group, Watch or Bell.

    A descriptor is registered first and only then published there: an event that comes between is seen again at once.
    `ready` has those members of groups that have been told of events.
    """

    def __init__(self) -> None:
        self.poller = new_poller()
        self.watched: Dict[int, Any] = {}
        self.ready: Dict[Member, int] = {}

    def add(self, one: Union[Tunnel, Group]) -> None:
        """Wait for all descriptors of it. Raises OSError, and waits for none."""
        if isinstance(one, Group):
            self._add_members(one)
            return
        client, remote = one.client.fileno(), one.remote.fileno()
        wanted = one.interest()
        self._register(((remote, wanted[REMOTE]), (client, wanted[CLIENT])))            # the client speaks first
        one.watched = wanted
        one.fd = client
        self.watched.update({client: one, remote: one})

    def _register(self, pairs: Sequence[Tuple[int, int]]) -> None:
        done = []
        try:
            for fd, events in pairs:
                if events != UNREGISTERED:
                    self.poller.register(fd, events)
                    done.append(fd)
        except (OSError, ValueError) as exc:        # ValueError: a socket that is closed already
            for fd in done:
                self.poller.unregister(fd)
            raise exc if isinstance(exc, OSError) else OSError(errno.EBADF, str(exc)) from None

    def _add_members(self, group: Group) -> None:
        """Wait for those descriptors of a group that are new."""
        new = group.fds[group.watched:]
        self._register([(fd, READ) for fd in new])
        group.watched += len(new)
        self.watched.update({fd: Member(fd, group, self.ready) for fd in new})

    def renew(self, one: Union[Tunnel, Group]) -> None:
        """Wait for what it wants now. Raises OSError."""
        if isinstance(one, Group):
            if one.watched < len(one.fds):
                self._add_members(one)
            return
        wanted, before = one.interest(), one.watched
        if wanted != before:
            rewatch(self.poller, one.client.fileno(), before[CLIENT], wanted[CLIENT])
            one.watched = wanted[CLIENT], before[REMOTE]            # what is true if the next line fails
            rewatch(self.poller, one.remote.fileno(), before[REMOTE], wanted[REMOTE])
            one.watched = wanted

    def remove(self, one: Union[Tunnel, Group]) -> None:
        """Wait for none of its descriptors any more."""
        if isinstance(one, Group):
            for fd in one.fds[:one.watched]:
                self.forget(fd)
            one.watched = 0
            return
        for sock in (one.client, one.remote):
            self.forget(sock.fileno())
        one.watched = (UNREGISTERED, UNREGISTERED)

    def forget(self, fd: int) -> None:
        if self.watched.pop(fd, None):
            try:
                self.poller.unregister(fd)
            except (OSError, KeyError):             # not registered, or closed by its owner before its time
                pass
