"""A descriptor that another thread makes readable: an eventfd (Linux, Python 3.10), elsewhere a socket pair.

One thread creates it, polls it and closes it. Any thread may call set(), also after it was closed.
"""
from __future__ import annotations

import os
import socket
from threading import Lock
from typing import Optional, Tuple

EVENTFD = hasattr(os, "eventfd")


class Wakeup:
    """A descriptor that is readable from set() to clear(). Raises OSError when there is no descriptor left."""

    def __init__(self) -> None:
        self._lock = Lock()             # or set() could write to a descriptor that was closed and used again
        self._pair: Optional[Tuple[socket.socket, socket.socket]] = None
        self._set = self._closed = False
        if EVENTFD:
            self._fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        else:
            self._pair = socket.socketpair()
            self._fd = self._pair[0].fileno()

    def __enter__(self) -> Wakeup:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def fileno(self) -> int:
        return self._fd

    def set(self) -> None:
        with self._lock:
            if self._set or self._closed:
                return
            self._set = True
            if self._pair:
                self._pair[1].send(b"\0")           # one byte at the most is under way: never blocks
            else:
                os.eventfd_write(self._fd, 1)

    def clear(self) -> None:
        with self._lock:
            if not self._set or self._closed:
                return
            self._set = False
            if self._pair:
                self._pair[0].recv(1)
            else:
                os.eventfd_read(self._fd)

    def close(self) -> None:
        with self._lock:
            if self._closed:
                return
            self._closed = True
            if self._pair:
                for sock in self._pair:
                    sock.close()
            else:
                os.close(self._fd)
