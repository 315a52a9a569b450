"""Bytes from one socket to another by way of a pipe in the kernel, never copied into this process.

Linux, Python 3.10 and newer; elsewhere `available` is false and relay.py copies. It knows descriptors, not sockets.
splice(2), pipe(7).
"""
from __future__ import annotations

import errno
import os
import threading
from typing import Any

try:
    import fcntl
except ImportError:                     # Windows
    available = False
else:
    available = hasattr(os, "splice")

PIPE_BYTES = 1 << 20                    # the most an ordinary user may ask for (fs.pipe-max-size)
MOST_PIPES = 48                         # all users' pipes together may hold 64 MiB (fs.pipe-user-pages-soft)
DESCRIPTORS = 2 * MOST_PIPES            # what they may take from the sessions
_splice: Any = getattr(os, "splice", None)
F_SETPIPE_SZ = 1031                     # fcntl has the name from Python 3.10 on
MOVE_NONBLOCK = 0x01 | 0x02             # SPLICE_F_MOVE, SPLICE_F_NONBLOCK: a full or empty pipe is EAGAIN


class KernelPipe:
    """One fill takes at most PIPE_BYTES. `held` is how many it has."""

    __slots__ = ("held", "_out", "_into")
    live = 0
    _lock = threading.Lock()

    def __init__(self) -> None:
        """Raises OSError when there is none to be had: too many of ours, no descriptors, the user's share used up."""
        with self._lock:
            if KernelPipe.live >= MOST_PIPES:
                raise OSError(errno.EMFILE, "%d kernel pipes in use" % KernelPipe.live)
            KernelPipe.live += 1
        self.held = 0
        self._out = self._into = -1
        try:
            self._out, self._into = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
            fcntl.fcntl(self._into, F_SETPIPE_SZ, PIPE_BYTES)       # a small pipe would be worse than copying
        except OSError:
            self.close()
            raise

    def fill(self, source: int) -> int:
        """Take what is there, of a descriptor that does not block; 0 at EOF. Raises OSError as recv does."""
        taken: int = _splice(source, self._into, PIPE_BYTES, flags=MOVE_NONBLOCK)
        self.held += taken
        return taken

    def empty(self, sink: int) -> int:
        """Give what fits, to a descriptor that does not block. Raises OSError as send does."""
        given: int = _splice(self._out, sink, self.held, flags=MOVE_NONBLOCK)
        self.held -= given
        return given

    def close(self) -> None:
        for fd in (self._out, self._into):
            if fd != -1:
                os.close(fd)
        self._out = self._into = -1
        with self._lock:
            KernelPipe.live -= 1
