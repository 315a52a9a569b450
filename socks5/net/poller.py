"""Wait until descriptors are ready: epoll where it exists, else poll(), else select().

select.select() itself raises ValueError for descriptors from 1024 up, which is about 500 tunnels. The selectors module
has the same in a more general form; it costs 10 us a turn, which a relay loop feels, and hides a hang-up from callers
that did not ask for reading. Events are the numbers of poll(2) everywhere.

Two kinds: `new_poll()` for a thread that waits for a few descriptors of its own, `new_poller()` for an event loop with
thousands, to which other threads may add. poll(2), epoll(7), select(2).
"""
from __future__ import annotations

import errno
import os
import select
import socket
from time import monotonic
from typing import Callable, Dict, List, Optional, Tuple, Union

# The numbers of poll(2), which are epoll's as well.
READ = getattr(select, "POLLIN", 0x01)
URGENT = getattr(select, "POLLPRI", 0x02)       # TCP urgent data: send(..., MSG_OOB) at the other end
WRITE = getattr(select, "POLLOUT", 0x04)
BROKEN = getattr(select, "POLLERR", 0x08)
HANG_UP = getattr(select, "POLLHUP", 0x10)      # closed both ways; reported whether asked for or not, like BROKEN

LOOK_MS = 500                                   # how often SelectPoll looks for a reset that select() does not tell of
MAX_SELECT = 1024 if os.name == "posix" else 500    # descriptors from this number up; or sockets, on Windows
EXCLUSIVE = getattr(select, "EPOLLEXCLUSIVE", 0)    # wake one of the threads that wait for a descriptor, not all
BATCH = 256                                     # events that an event loop takes at a time
Events = List[Tuple[int, int]]                  # (descriptor, events) pairs


class SelectPoll:
    """select.poll() for systems that have only select(): the same four methods.

    A reset of a socket of which neither READ nor WRITE is wanted is told as well, up to LOOK_MS late. A FIN is not."""

    def __init__(self) -> None:
        self._wanted: Dict[int, int] = {}

    def register(self, fd: int, events: int) -> None:
        """Raises OSError for a descriptor that would make select() raise ValueError from then on."""
        if (fd if os.name == "posix" else len(self._wanted)) >= MAX_SELECT and fd not in self._wanted:
            raise OSError(errno.EMFILE, "select() takes no more")
        self._wanted[fd] = events

    def modify(self, fd: int, events: int) -> None:
        self._wanted[fd] = events

    def unregister(self, fd: int) -> None:
        del self._wanted[fd]

    def poll(self, timeout_ms: Optional[float] = None) -> Events:
        quiet = [fd for fd, events in list(self._wanted.items()) if not events & (READ | WRITE)]
        if not quiet:
            return self._select(timeout_ms)
        until = float("inf") if timeout_ms is None else monotonic() + timeout_ms / 1000
        while True:
            broken = [(fd, BROKEN | HANG_UP) for fd in quiet if was_reset(fd)]
            left_ms = max(0.0, (until - monotonic()) * 1000)
            found = self._select(0 if broken else min(left_ms, LOOK_MS))
            if found or broken or left_ms <= LOOK_MS:
                return found + broken

    def _select(self, timeout_ms: Optional[float]) -> Events:
        wanted = list(self._wanted.items())
        readers = [fd for fd, events in wanted if events & READ]
        writers = [fd for fd, events in wanted if events & WRITE]
        # Windows reports a connect that failed in the third set only; elsewhere that set is for urgent data.
        others = sorted({*writers, *(fd for fd, events in wanted if events & URGENT)})
        ready = select.select(readers, writers, others, None if timeout_ms is None else timeout_ms / 1000)
        found: Dict[int, int] = {}
        for fds, event in zip(ready, (READ, WRITE, BROKEN)):
            for fd in fds:
                urgent = event == BROKEN and self._wanted.get(fd, 0) & URGENT
                found[fd] = found.get(fd, 0) | (URGENT if urgent else event)
        return list(found.items())


def was_reset(fd: int) -> bool:
    """Whether this connection was reset or is closed both ways. Its error stays, for the owner's next call.

    Not for a listener, or while a connect is under way."""
    try:
        sock = socket.socket(fileno=fd)
    except OSError:                                 # no socket
        return False
    try:
        sock.getpeername()
        return False
    except OSError as exc:
        return exc.errno == errno.ENOTCONN and sock.type == socket.SOCK_STREAM
    finally:
        sock.detach()


def new_poll() -> "Union[select.poll, SelectPoll]":
    """For one thread and the few descriptors that it waits for. poll() takes milliseconds."""
    try:
        return select.poll()
    except AttributeError:                          # Windows
        return SelectPoll()


def one_of_many(shared: int, own: int) -> Callable[[], object]:
    """A function that waits until a descriptor of two is readable. Several threads wait for `shared`, and one of them
    is enough. It may return without either."""
    if EXCLUSIVE and hasattr(select, "epoll"):
        try:
            epoll = select.epoll()
            epoll.register(shared, READ | EXCLUSIVE)
            epoll.register(own, READ)
            return epoll.poll
        except OSError:                             # no descriptor is left
            pass
    poll = new_poll()
    poll.register(shared, READ)
    poll.register(own, READ)
    return poll.poll


class EpollPoller:
    """For an event loop. Any thread may register a descriptor, and a wait that is under way takes notice of it."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self.register = self._epoll.register        # (fd, events)
        self.modify = self._epoll.modify
        self.unregister = self._epoll.unregister
        self.poll = self._epoll.poll                # (timeout_s, how many events at most)

    def close(self) -> None:
        self._epoll.close()


class PollPoller:
    """The same by poll() or select(), which read the descriptors when they begin: a wait under way is interrupted."""

    def __init__(self) -> None:
        self._poll = new_poll()
        self._waiting = False
        self._woken, self._waker = socket.socketpair()
        for sock in (self._woken, self._waker):
            sock.setblocking(False)
        self._poll.register(self._woken.fileno(), READ)

    def register(self, fd: int, events: int) -> None:
        self._poll.register(fd, events)
        if self._waiting:
            try:
                self._waker.send(b"\0")
            except BlockingIOError:                 # so many are unread that it wakes up anyway
                pass

    def modify(self, fd: int, events: int) -> None:
        self._poll.modify(fd, events)

    def unregister(self, fd: int) -> None:
        self._poll.unregister(fd)

    def poll(self, timeout_s: float, _maximum: int = 0) -> Events:
        self._waiting = True
        try:
            ready = self._poll.poll(timeout_s * 1000)
        finally:
            self._waiting = False
        mine = self._woken.fileno()
        if any(fd == mine for fd, _events in ready):
            self._woken.recv(4096)
            return [pair for pair in ready if pair[0] != mine]
        return ready

    def close(self) -> None:
        self._woken.close()
        self._waker.close()


def new_poller() -> Union[EpollPoller, PollPoller]:
    """For an event loop with thousands of descriptors. poll() takes seconds."""
    return EpollPoller() if hasattr(select, "epoll") else PollPoller()
