"""A group of sockets that are only read, by one thread: a UDP association is one. The relay loop has it as it has a
tunnel; where there is only select(), the thread that brings it relays it to its end, by `relay_alone`.
"""
from __future__ import annotations

import socket
from time import monotonic
from typing import Any, Callable, Dict, List, Tuple

from ..net.poller import READ, new_poll
from ..net.wakeup import Wakeup

LOOK_S = 1.0                        # how late relay_alone may notice a time limit


class Group:
    """Sockets that are relayed together. To override: handle, sockets, deadline, expire, change_now, close.

    session         whatever the owner wants to find again
    fds             the descriptors to wait for, until they can be read; more may come while the group is relayed
    watched         for how many of them, the first ones, its thread waits
    waker           given by the thread that has it: see `wake`
    moved_at, lent, aborted, ended, ended_by, why       as in Tunnel
    """

    __slots__ = ("session", "fds", "watched", "waker", "moved_at", "lent", "aborted", "ended", "ended_by", "why")

    def __init__(self, session: Any = None) -> None:
        self.session = session
        self.fds: List[int] = []
        self.watched = 0
        self.waker: Callable[[Group], object] = lambda _group: None
        self.moved_at = monotonic()
        self.lent = False
        self.aborted = ""
        self.ended = False
        self.ended_by = ""
        self.why = ""

    def handle(self, fd: int, events: int, now: float) -> bool:
        """Read. True when the owner has to look: at `ended`, at `fds`."""
        raise NotImplementedError

    def sockets(self) -> Tuple[socket.socket, ...]:
        """The TCP connections by which other threads wake its thread, when they are shut down."""
        raise NotImplementedError

    def wake(self) -> None:
        """By any thread: have the thread that has the group call `change_now`."""
        self.waker(self)

    def change_now(self) -> None:
        """Do what another thread has asked for by `wake`. The owner looks afterwards, as behind `handle`."""

    def deadline(self) -> float:
        """When `expire` is to be called, by time.monotonic()."""
        raise NotImplementedError

    def expire(self) -> None:
        """Its deadline has passed. It need not be the end."""
        raise NotImplementedError

    def end(self, by: str, why: str = "") -> None:
        self.ended, self.ended_by, self.why = True, by, why

    def close(self) -> None:
        """Close the sockets, but not that of the session."""
        raise NotImplementedError


class Member:
    """One descriptor of a group, for the relay loop. Its turn comes behind those of tunnels."""

    __slots__ = ("fd", "group", "ready")

    def __init__(self, fd: int, group: Group, ready: Dict[Member, int]) -> None:
        """`ready` has the events of those whose turn comes, the next one first."""
        self.fd = fd
        self.group = group
        self.ready = ready

    def handle(self, _side: int, events: int, _now: float) -> bool:
        self.ready[self] = events
        return False


def relay_alone(group: Group) -> None:
    """Relay a lent group in the calling thread until it has ended or is aborted.

    Raises OSError when poll() or select() takes no more, or there is no descriptor left."""
    poll = new_poll()
    with Wakeup() as wakeup:
        group.waker = lambda _group: wakeup.set()
        mine = wakeup.fileno()
        poll.register(mine, READ)
        while not group.ended and not group.aborted:
            while group.watched < len(group.fds):
                poll.register(group.fds[group.watched], READ)
                group.watched += 1
            ready = poll.poll(LOOK_S * 1000)
            now = monotonic()
            for fd, events in ready:
                if group.ended:
                    break
                if fd == mine:
                    wakeup.clear()
                    group.change_now()
                else:
                    group.handle(fd, events, now)
            if not group.ended and now >= group.deadline():
                group.expire()
