"""A direction of a tunnel under a rate limit: it is read only as far as its limits have granted bytes.

What was not granted stays in the kernel, so the sender feels backpressure. A direction that has to wait is paused until
its time comes: nothing of it is read or asked for. The thread that has the tunnel keeps the time: the relay loop by its
Timers, the thread of a busy tunnel by the time limit of its poll(). How bytes are moved does not change: a kernel pipe
is used as ever, and takes no more than was granted.
"""
from __future__ import annotations

import heapq
import itertools
import sys
from time import monotonic
from typing import Any, Dict, Iterator, List, Optional, Sequence, Tuple, Type

from . import pipe as pipes
from .bucket import NEVER, Flow, HeldBack, Limit
from .pipe import Pipe
from .protected import CodingPipe
from .splice import PIPE_BYTES
from .tunnel import CLIENT, INCOMING, REMOTE, Tunnel

try:
    import fcntl
    from termios import FIONREAD
except ImportError:                         # Windows
    fcntl = None                            # type: ignore[assignment]
    FIONREAD = 0                            # type: ignore[misc]

Limits = Sequence[Limit]


class Limited:
    """What the two kinds of Pipe have in common that are limited. `flow` has what their limits granted."""

    __slots__ = ()
    flow: Flow
    timed_at: float                         # the resume_at for which the loop has a timer

    def fill(self: Any) -> Optional[bool]:
        now, flow, paused = monotonic(), self.flow, self.resume_at > 0
        if self.resume_at > now:            # a hang-up is reported while it waits
            return None
        self.resume()
        if flow.granted and flow.stale(now):
            flow.close()
        if not flow.granted and not self.reserve(now):
            return True                     # paused: the owner has to look
        room = flow.granted
        self.room = min(room, pipes.CHUNK_BYTES)
        if self.kernel is not None:
            self.kernel.room = min(room, PIPE_BYTES)
        before = self.total
        filled: Optional[bool] = self.plain_fill()
        if room < pipes.CHUNK_BYTES:        # so little is not worth a thread
            self.full = 0
        flow.use(self.read_since(before), now)
        return paused or filled             # the owner has to look when it was paused until now

    def reserve(self: Any, now: float) -> bool:
        """Reserve what may be read next. False: it is paused until then."""
        flow = self.flow
        if not flow.limits:                 # a reload has lifted them
            flow.granted, flow.used_at = PIPE_BYTES, now
            return True
        size = flow.portion()
        if self.kernel is None:             # no more than there is, unless that is a whole read
            there = readable(self.source)
            size = size if there >= pipes.CHUNK_BYTES else min(size, there)
        if not size:                        # EOF or an error, which cost nothing
            flow.granted, flow.used_at = 1, now
            return True
        may: bool = flow.reserve(size, now)
        self.resume_at = flow.resume_at
        return may

    def resume(self: Any) -> None:
        """It is not paused any more."""
        if self.resume_at:
            self.resume_at = 0.0
            self.flow.resume()

    def limit(self: Any, limits: Limits) -> None:
        """From now on these limits hold."""
        self.resume_at = 0.0
        self.flow.close()
        held_back = self.flow.held_back
        self.flow = Flow(limits)
        self.flow.held_back = held_back

    def close(self: Any) -> None:
        self.resume_at = 0.0
        self.flow.close()
        super().close()                     # type: ignore[misc]


class LimitedPipe(Limited, Pipe):
    __slots__ = ("flow", "timed_at")

    def plain_fill(self) -> Optional[bool]:
        return Pipe.fill(self)

    def read_since(self, before: int) -> int:
        """Bytes that were read since `total` was so much."""
        return self.total - before + self.held


class LimitedCodingPipe(Limited, CodingPipe):
    __slots__ = ("flow", "timed_at")

    def plain_fill(self) -> Optional[bool]:
        self.payload = 0                    # of what was delivered before
        return CodingPipe.fill(self)

    def read_since(self, _before: int) -> int:
        """The same in plain bytes."""
        return self.payload


KINDS: Dict[Type[Pipe], Type[Any]] = {Pipe: LimitedPipe, CodingPipe: LimitedCodingPipe}


def limit(tunnel: Tunnel, up: Limits, down: Limits) -> None:
    """Have these limits hold for a tunnel from now on. By the thread that has it."""
    for pipe, limits in ((tunnel.up, up), (tunnel.down, down)):
        if isinstance(pipe, Limited):
            pipe.limit(limits)
        elif limits:
            made = limited(pipe, limits)
            if pipe is tunnel.up:
                tunnel.up = made
            else:
                tunnel.down = made


def limited(pipe: Pipe, limits: Limits) -> Pipe:
    """A Pipe that goes on where this one is."""
    kind = KINDS[type(pipe)]
    made: Any = object.__new__(kind)
    for above in type(pipe).__mro__:
        for name in getattr(above, "__slots__", ()):
            setattr(made, name, getattr(pipe, name))
    made.flow = Flow(limits)
    made.timed_at = 0.0
    return made                             # type: ignore[no-any-return]


def readable(sock: Any) -> int:
    """How many bytes can be read now; a whole read where nothing tells."""
    if not FIONREAD:
        return pipes.CHUNK_BYTES
    try:
        answer = fcntl.ioctl(sock.fileno(), FIONREAD, bytes(4))
    except OSError:                         # then the read says what is wrong
        return pipes.CHUNK_BYTES
    return max(0, int.from_bytes(answer, sys.byteorder, signed=True))


def held_back(tunnel: Tunnel) -> HeldBack:
    """When a limit held this tunnel back last, and which."""
    return max(pipe.flow.held_back if isinstance(pipe, Limited) else NEVER for pipe in (tunnel.up, tunnel.down))


def pause(tunnel: Tunnel, wait_s: float) -> float:
    """For the thread of a busy tunnel: go on with the directions whose time has come. How long to wait for events, at
    most wait_s."""
    now = monotonic()
    for pipe in (tunnel.up, tunnel.down):
        if pipe.resume_at > now:
            wait_s = min(wait_s, pipe.resume_at - now)
        elif isinstance(pipe, Limited):
            pipe.resume()
    return wait_s


class Timers:
    """For the relay loop: when paused directions go on. In its thread only.

    heap    has something in it while a direction is paused
    """

    def __init__(self) -> None:
        self.heap: List[Tuple[float, int, Tunnel, int]] = []
        self._numbers = itertools.count()               # so that no two entries are equal

    def note(self, tunnel: Tunnel) -> None:
        """This tunnel may be paused."""
        for side, pipe in ((CLIENT, tunnel.up), (REMOTE, tunnel.down)):
            if pipe.resume_at and isinstance(pipe, Limited) and pipe.timed_at != pipe.resume_at:
                pipe.timed_at = pipe.resume_at
                heapq.heappush(self.heap, (pipe.resume_at, next(self._numbers), tunnel, side))

    def wait_s(self, most_s: float) -> float:
        """How long to wait for events; while nothing is paused, the caller need not ask."""
        return max(0.0, min(most_s, self.heap[0][0] - monotonic()))

    def due(self, now: float) -> Iterator[Tuple[Tunnel, int]]:
        """Yield the tunnels that go on now, each with the side that may be read."""
        heap = self.heap
        while heap and heap[0][0] <= now:
            when, _, tunnel, side = heapq.heappop(heap)
            pipe = tunnel.down if side else tunnel.up
            if isinstance(pipe, Limited) and pipe.timed_at == when:
                pipe.timed_at = 0.0             # or a tunnel that is lent now would have no timer when it is back
            if pipe.resume_at == when and not tunnel.lent and not tunnel.ended:
                yield tunnel, side


def read_on(tunnel: Tunnel, side: int, now: float) -> None:
    """For the relay loop: read what is granted by now. What comes next is reserved at once, which saves two calls to
    the poller while the direction is paused most of the time."""
    tunnel.handle(side, INCOMING, now)      # urgent data included: without that, recv() would skip the urgent byte
    pipe: Any = tunnel.down if side else tunnel.up
    if not (tunnel.ended or pipe.held or pipe.done or pipe.resume_at or pipe.flow.granted):
        pipe.reserve(now)


def limits_of(tunnel: Tunnel) -> Tuple[Limits, Limits]:
    """Those in force, up and down."""
    up, down = (pipe.flow.limits if isinstance(pipe, Limited) else () for pipe in (tunnel.up, tunnel.down))
    return up, down
