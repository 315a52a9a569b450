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
from typing import Any, Callable, Iterator, List, Optional, Sequence, Tuple

from . import pipe as pipes
from .bucket import Flow, Limit
from .pipe import Pipe
from .splice import PIPE_BYTES
from .relay import Relay
from .tunnel import INCOMING, Tunnel

try:
    import fcntl
    from termios import FIONREAD
except ImportError:                         # Windows
    fcntl = None                            # type: ignore[assignment]
    FIONREAD = 0                            # type: ignore[misc]

Limits = Sequence[Limit]


class Gate:
    """In front of a Pipe: it is read only as far as its limits have granted bytes. Its owner alone may call.

    flow        what the limits have granted
    timed_at    the resume_at of the Pipe for which the loop has a timer
    """

    __slots__ = ("flow", "timed_at")

    def __init__(self, limits: Limits) -> None:
        self.flow = Flow(limits)
        self.timed_at = 0.0

    def fill(self, pipe: Pipe, fill: Callable[[], Optional[bool]]) -> Optional[bool]:
        """Call `fill` of the Pipe, if bytes are granted or can be had now. Answers as that does."""
        now, flow, paused = monotonic(), self.flow, pipe.resume_at > 0
        if pipe.resume_at > now:            # a hang-up is reported while it waits
            return None
        self.resume(pipe)
        if flow.stale(now):
            flow.close()
        room = flow.granted or self.reserve(pipe, now)
        if not room:
            return True                     # paused: the owner has to look
        pipe.room = min(room, pipes.CHUNK_BYTES)
        if pipe.kernel is not None:
            pipe.kernel.room = min(room, PIPE_BYTES)
        before = pipe.taken()
        filled = fill()
        if room < pipes.CHUNK_BYTES:        # so little is not worth a thread
            pipe.large = 0
        flow.use(max(0, pipe.taken() - before), now)        # a message is less when it is opened
        return paused or filled             # the owner has to look when it was paused until now

    def reserve(self, pipe: Pipe, now: float) -> int:
        """Reserve what is to be read next: how much may be read now. 0: the Pipe is paused."""
        flow = self.flow
        size = flow.portion()
        if pipe.kernel is None:             # no more than there is, unless that is a whole read
            there = readable(pipe.source)
            size = size if there >= pipes.CHUNK_BYTES else min(size, there)
        if not size:                        # EOF or an error, which cost nothing
            return 1
        if flow.reserve(size, now):
            return flow.granted
        pipe.resume_at = flow.resume_at
        return 0

    def hold(self, pipe: Pipe) -> None:
        """What is in hand already, such as early data, is passed on when it may be: the Pipe is paused until then."""
        if self.flow.reserve(pipe.held, monotonic()):
            self.resume(pipe)
        pipe.resume_at = self.flow.resume_at

    def resume(self, pipe: Pipe) -> None:
        """The Pipe is not paused any more."""
        pipe.resume_at = self.flow.resume_at = 0.0
        if pipe.held:
            self.flow.use(pipe.held, monotonic())

    def close(self, pipe: Pipe) -> None:
        """Give back what is reserved."""
        pipe.resume_at = 0.0
        self.flow.close()


def limit(tunnel: Tunnel, up: Limits, down: Limits) -> None:
    """Have these limits hold for a tunnel from now on. By the thread that has it."""
    for pipe, limits in zip(tunnel.pipes(), (up, down)):
        unpaid = pipe.held and pipe.gate is None
        if pipe.gate is not None:
            pipe.gate.close(pipe)
        pipe.gate = Gate(limits) if limits else None
        pipe.small = False
        pipe.room = pipes.CHUNK_BYTES
        if pipe.kernel is not None:
            pipe.kernel.room = PIPE_BYTES
        if unpaid and pipe.gate is not None:
            pipe.gate.hold(pipe)


def readable(sock: Any) -> int:
    """How many bytes can be read now; a whole read where nothing tells."""
    if not FIONREAD:
        return pipes.CHUNK_BYTES
    try:
        answer = fcntl.ioctl(sock.fileno(), FIONREAD, bytes(4))
    except OSError:                         # then the read says what is wrong
        return pipes.CHUNK_BYTES
    return max(0, int.from_bytes(answer, sys.byteorder, signed=True))


def pause(relay: Relay, wait_s: float) -> float:
    """For the thread of a busy tunnel: go on with the directions whose time has come. How long to wait for events, at
    most wait_s."""
    now = monotonic()
    for pipe in relay.pipes():
        if pipe.resume_at > now:
            wait_s = min(wait_s, pipe.resume_at - now)
        elif pipe.resume_at:
            pipe.gate.resume(pipe)
    return wait_s


class Timers:
    """For the relay loop: when paused directions go on. In its thread only.

    heap    has something in it while a direction is paused
    """

    def __init__(self) -> None:
        self.heap: List[Tuple[float, int, Relay, Pipe]] = []
        self._numbers = itertools.count()               # so that no two entries are equal

    def note(self, relay: Relay) -> None:
        """It may be paused."""
        for pipe in relay.pipes():
            if pipe.resume_at and pipe.gate.timed_at != pipe.resume_at:
                pipe.gate.timed_at = pipe.resume_at
                heapq.heappush(self.heap, (pipe.resume_at, next(self._numbers), relay, pipe))

    def wait_s(self, most_s: float) -> float:
        """How long to wait for events; while nothing is paused, the caller need not ask."""
        return max(0.0, min(most_s, self.heap[0][0] - monotonic()))

    def due(self, now: float) -> Iterator[Tuple[Relay, Pipe]]:
        """Yield what goes on now, each with the direction that may be read."""
        heap = self.heap
        while heap and heap[0][0] <= now:
            when, _, relay, pipe = heapq.heappop(heap)
            if pipe.gate and pipe.gate.timed_at == when:
                pipe.gate.timed_at = 0.0        # or a tunnel that is lent now would have no timer when it is back
            if pipe.resume_at == when and not relay.lent and not relay.ended:
                yield relay, pipe


def read_on(relay: Relay, pipe: Pipe, now: float) -> None:
    """For the relay loop: read what is granted by now. What comes next is reserved at once, which saves two calls to
    the poller while the direction is paused most of the time."""
    if pipe.held and pipe.gate:
        pipe.gate.resume(pipe)
        return
    relay.handle(pipe.source.fileno(), INCOMING, now)       # or recv() would skip an urgent byte
    if pipe.gate and not (relay.ended or pipe.held or pipe.done or pipe.resume_at or pipe.gate.flow.granted):
        pipe.gate.reserve(pipe, now)


def limits_of(tunnel: Tunnel) -> Tuple[Limits, Limits]:
    """Those in force, up and down."""
    up, down = (pipe.gate.flow.limits if pipe.gate else () for pipe in tunnel.pipes())
    return up, down
