"""Move bytes from one socket to another through a pipe in the kernel, without a copy into this process.

Linux, Python 3.10 and newer; elsewhere `available` is false and pipe.py copies. Knows descriptors, not sockets.
splice(2), pipe(7).
"""
from __future__ import annotations

import errno
import mmap
import os
import threading
from time import monotonic
from typing import Any

from ..net.shares import Share

try:
    import fcntl
except ImportError:                     # Windows
    available = False
else:
    available = hasattr(os, "splice")

PIPE_BYTES = 1 << 20                    # the largest that an ordinary user may ask for (fs.pipe-max-size)
MAX_PIPES = 48                          # all pipes of a user together may hold 64 MiB (fs.pipe-user-pages-soft)
MAX_PARKED = 16 << 20                   # bytes of stalled tunnels in memory: beyond that a pipe takes FRUGAL_BYTES
FRUGAL_BYTES = 1 << 16                  # as much as a tunnel that copies has in hand
BRIEF_BYTES = 1 << 18                   # what one fill() takes while relay loops have work,
BRIEF_S = 0.1                           # which they have for so long after an event; they note one in BRIEF_S / 2
_splice: Any = getattr(os, "splice", None)
F_SETPIPE_SZ = 1031                     # fcntl has the name from Python 3.10 on
MOVE_NONBLOCK = 0x01 | 0x02             # SPLICE_F_MOVE, SPLICE_F_NONBLOCK: a full or empty pipe is EAGAIN


PIPES = Share(MAX_PIPES)                # of this process
# When a relay loop had an event last, by monotonic(), in any worker: this memory is made before they are forked.
worked_at = memoryview(mmap.mmap(-1, mmap.PAGESIZE)).cast("d")
parked = 0                              # bytes that were taken back from kernel pipes and are not delivered yet
_lock = threading.Lock()


def park(size: int) -> None:
    """Count bytes that a stalled tunnel takes back from its kernel pipe; with a negative size, has got rid of."""
    global parked
    if size:
        with _lock:
            parked += size


def loops_work() -> bool:
    """Whether tunnels that are not busy may be waiting for a CPU."""
    return monotonic() < worked_at[0] + BRIEF_S


class KernelPipe:
    """One fill() takes at most `room`; `held` is how many bytes it holds.

    Clients that stall in the middle of a download must not fill the memory: what all kernel pipes of the process held
    when their tunnels stalled is at most MAX_PARKED, MAX_PIPES times PIPE_BYTES, and FRUGAL_BYTES for each.
    """

    __slots__ = ("held", "room", "_owner", "_out", "_into")

    def __init__(self, owner: str = "") -> None:
        """Raises OSError when there is none: no descriptors, the owner's share or the user's pipe memory used up."""
        if not PIPES.take(owner):
            raise OSError(errno.EMFILE, "no kernel pipe left for %s" % owner)
        self._owner = owner
        self.held = 0
        self.room = PIPE_BYTES
        self._out = self._into = -1
        try:
            self._out, self._into = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
            fcntl.fcntl(self._into, F_SETPIPE_SZ, PIPE_BYTES)       # a small pipe would be slower than copying
        except OSError:
            self.close()
            raise

    def fill(self, source: int) -> int:
        """Take what a non-blocking descriptor has. 0 and BlockingIOError both mean "ask recv()": at urgent data
        splice() stops with either of them, whatever else has come. Raises OSError as recv does."""
        size = self.room if parked < MAX_PARKED else min(self.room, FRUGAL_BYTES)
        if size > BRIEF_BYTES and loops_work():
            size = BRIEF_BYTES
        taken: int = _splice(source, self._into, size, flags=MOVE_NONBLOCK)
        self.held += taken
        return taken

    def empty(self, sink: int) -> int:
        """Give a non-blocking descriptor what fits. Raises OSError as send does."""
        given: int = _splice(self._out, sink, self.held, flags=MOVE_NONBLOCK)
        self.held -= given
        return given

    def read(self) -> bytes:
        """Take back what it holds: then it is empty."""
        pieces = []
        while self.held:
            pieces.append(os.read(self._out, self.held))
            self.held -= len(pieces[-1])
        return b"".join(pieces)

    def close(self) -> None:
        for fd in (self._out, self._into):
            if fd != -1:
                os.close(fd)
        self._out = self._into = -1
        PIPES.give_back(self._owner)
