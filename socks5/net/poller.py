"""Wait until one of several sockets is ready: poll() where there is one, else select().

select.select() itself raises for descriptors from 1024 up, which is about 500 tunnels; what socketserver uses is what
we use. selectors has the same in more general clothes, at some 10 us a turn, which a relay would feel.
"""
from __future__ import annotations

import select
from typing import Dict, List, Optional, Tuple, Union

# The numbers of poll(2), the same wherever there is one.
READ = getattr(select, "POLLIN", 0x01)
WRITE = getattr(select, "POLLOUT", 0x04)
BROKEN = getattr(select, "POLLERR", 0x08)


class SelectPoll:
    """select.poll() for systems that have only select(): the same four methods."""

    def __init__(self) -> None:
        self._wanted: Dict[int, int] = {}

    def register(self, fd: int, events: int) -> None:
        self._wanted[fd] = events

    modify = register

    def unregister(self, fd: int) -> None:
        del self._wanted[fd]

    def poll(self, timeout_ms: Optional[float] = None) -> List[Tuple[int, int]]:
        readers = [fd for fd, events in self._wanted.items() if events & READ]
        writers = [fd for fd, events in self._wanted.items() if events & WRITE]
        # Windows tells of a connect that failed in the third set only.
        ready = select.select(readers, writers, writers, None if timeout_ms is None else timeout_ms / 1000)
        found: Dict[int, int] = {}
        for fds, event in zip(ready, (READ, WRITE, BROKEN)):
            for fd in fds:
                found[fd] = found.get(fd, 0) | event
        return list(found.items())


def new_poll() -> "Union[select.poll, SelectPoll]":
    return select.poll() if hasattr(select, "poll") else SelectPoll()


class Watch:
    """What is wanted of two descriptors; speaks to the poll object only when that changes.

    One of which nothing is wanted stays registered with no events, because a reset is reported all the same; unless it
    is closed both ways, which would be reported without end: then mute() it.
    """

    __slots__ = ("first", "second", "poll", "wanted", "muted")

    def __init__(self, first: int, second: int) -> None:
        self.first = first
        self.second = second
        self.poll = new_poll()
        self.wanted = (-1, -1)              # of each; -1: not registered
        self.muted = -1

    def want(self, first: int, second: int) -> None:
        if (first, second) != self.wanted:
            self.wanted = (self._want(self.first, first, self.wanted[0]),
                           self._want(self.second, second, self.wanted[1]))

    def mute(self, fd: int) -> None:
        """Forget it until something is wanted of it again."""
        self.poll.unregister(fd)
        self.muted = fd
        self.wanted = (-1, self.wanted[1]) if fd == self.first else (self.wanted[0], -1)

    def _want(self, fd: int, events: int, before: int) -> int:
        if before == -1:
            if fd == self.muted and not events:
                return -1
            self.poll.register(fd, events)
        elif events != before:
            self.poll.modify(fd, events)
        return events


def new_epoll() -> "select.epoll":
    """For very many descriptors, of which few are ready. Linux only."""
    return select.epoll()
