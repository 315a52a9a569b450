"""What the relay loop relays: a tunnel, or the sockets of a UDP association. No thread, no log and no SOCKS in here."""
from __future__ import annotations

import socket
from itertools import zip_longest
from typing import Any, Callable, Optional, Sequence, Tuple

from ..net.poller import READ
from .bucket import NEVER, HeldBack
from .pipe import Pipe

UNREGISTERED = -1                       # in the place of events


class Relay:
    """Sockets that are relayed together, by one thread at a time. What is defined here is right for sockets that are
    only read; to override at least: handle, sockets, fds, deadline, expire, close.

    session         whatever the owner wants to find again
    owner           the client's share of kernel pipes and threads is counted by this: see net/shares.py
    moved_at        when a byte was last moved, by time.monotonic()
    watched         the events for which the loop has registered each of `fds`; further ones are not registered
    lent            another thread than the loop's has it: the loop must not touch it
    change          a function, set by another thread: the thread that relays this calls change(self) in change_now()
    aborted         set by another thread: it is to end, for this reason
    ended           it is over, and `close` may be called
    ended_by        "client" or "remote", which said EOF or failed first; "idle", "half-closed", or why it was aborted
    why             the error that ended it, or ""
    """

    __slots__ = ("session", "owner", "moved_at", "watched", "lent", "change", "aborted", "ended", "ended_by", "why")
    bursts = True                       # handle() may take long: its turn comes when tunnels have had theirs

    def __init__(self, session: Any = None, owner: str = "") -> None:
        self.session = session
        self.owner = owner
        self.moved_at = 0.0
        self.watched: Tuple[int, ...] = ()
        self.lent = False
        self.change: Optional[Callable[[Any], object]] = None
        self.aborted = ""
        self.ended = False
        self.ended_by = ""
        self.why = ""

    # ---- for the thread that relays it ----------------------------------------------------------------------------

    def fds(self) -> Sequence[int]:
        """The descriptors to wait for. To this list more may be added while it is relayed."""
        raise NotImplementedError

    def interest(self) -> Tuple[int, ...]:
        """The events to wait for now: a mask for each of fds(), in the same order. With mask 0, poll() still reports
        errors and hang-ups. With UNREGISTERED the descriptor is not polled: its connection is closed both ways, which
        poll() would report again and again."""
        return (READ,) * len(self.fds())

    def handle(self, fd: int, events: int, now: float) -> bool:
        """Move bytes after an event. True when the owner has to look: at `ended`, `busy`, `fds`, `interest`."""
        raise NotImplementedError

    def busy(self) -> bool:
        """Whether there is so much to move that a thread of its own is worth its price."""
        return False

    def pipes(self) -> Sequence[Pipe]:
        """Its two directions, client to remote first. None where datagrams are relayed."""
        return ()

    def paused(self) -> bool:
        """Whether a rate limit holds a direction back."""
        return False

    def deadline(self) -> float:
        """When `expire` is to be called, by time.monotonic()."""
        raise NotImplementedError

    def expire(self) -> None:
        """Its deadline has passed. It need not be the end."""
        raise NotImplementedError

    def change_now(self) -> None:
        """Make the change that another thread has asked for."""
        change, self.change = self.change, None
        if change is not None:
            change(self)

    def end(self, by: str, why: str = "") -> None:
        """End it by our own decision."""
        self.ended, self.ended_by, self.why = True, by, why

    def close(self) -> None:
        """Close the sockets and what is in hand; but the client's socket is closed with its session."""
        raise NotImplementedError

    def woken_by(self, waker: Callable[[Relay], object]) -> None:
        """Keep `waker`: any thread that wants change_now() to be called calls waker(self)."""

    # ---- for any thread -------------------------------------------------------------------------------------------

    def sockets(self) -> Sequence[socket.socket]:
        """Its TCP sockets. To end it, another thread calls shutdown() on them; the thread that relays it sees EOF."""
        raise NotImplementedError

    def moved(self) -> Tuple[int, int]:
        """Bytes that were delivered, up and down."""
        return 0, 0

    def state(self) -> str:
        """What it is doing, in a word."""
        return "relaying"

    def held_back(self) -> HeldBack:
        """When a rate limit held it back last, and which."""
        gates = [pipe.gate for pipe in self.pipes()]        # the thread that relays it may remove them meanwhile
        return max((gate.flow.held_back for gate in gates if gate), default=NEVER)

    def summary(self) -> str:
        """What else there is to say of it when it has ended."""
        return ""


def rewatch(poller: Any, fds: Sequence[int], before: Sequence[int], wanted: Sequence[int]) -> None:
    """Have a poller of net/poller.py wait for the events `wanted` of these descriptors, in place of those `before`, of
    which there may be fewer. Raises OSError; ValueError for a descriptor that is closed already."""
    for fd, old, new in zip_longest(fds, before, wanted, fillvalue=UNREGISTERED):
        if new == old:
            continue
        if old == UNREGISTERED:
            poller.register(fd, new)
        elif new == UNREGISTERED:
            poller.unregister(fd)
        else:
            poller.modify(fd, new)
