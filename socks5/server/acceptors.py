"""Acceptors: threads that wait in accept() themselves, and serve what they accept until its tunnel stands.

Starting a thread costs about as much as a whole negotiation, so a few are kept. Only where shutting a listener down
wakes the threads that wait in its accept(), which is Linux; elsewhere the server's own thread accepts, and starts a
thread for each connection. A listener that is shared with other programs is not shut down: its acceptors wait in
epoll_wait(), also for a descriptor that wakes them.
"""
from __future__ import annotations

import itertools
import socket
import threading
from collections import deque
from time import monotonic, sleep
from typing import Callable, Deque, Dict, Optional, Sequence

from ..net.listeners import SharedListener
from ..net.poller import one_of_many
from ..net.wakeup import Wakeup

available = hasattr(socket, "TCP_DEFER_ACCEPT")     # Linux has this option
MAX_WAITING = 16            # for each listener, from the start
MAX_SPARE = 8               # a thread that was started later ends when it comes back and so many wait
RELEASE_S = 1.0
REST_S = 0.1                # when memory has run out


class NoThread(RuntimeError):
    """Not even the first acceptor could be started."""


class Here(threading.local):
    """What the calling thread accepts from; None if it is not an acceptor."""

    listener: Optional[socket.socket] = None


class Acceptors:
    """`accept_one(listener)` is what they call: it must call `accepted` as soon as accept() has returned.

    A thread that waits has put an entry into `_waiting` before it looks at `_serving`; release() changes `_serving`
    before it looks at `_waiting`. So one of the two sees the other, and no lock is needed for each connection.
    """

    def __init__(self, accept_one: Callable[[socket.socket], None]) -> None:
        self._accept_one = accept_one
        self.here = Here()
        self._lock = threading.Lock()
        self._serving = False                               # may threads go on to accept()?
        self._waiting: Dict[socket.socket, Deque[None]] = {}        # an entry for each thread in accept(), or before it
        self._wakeup: Optional[Wakeup] = None               # of those that wait for a shared listener

    def serve(self, listeners: Sequence[socket.socket]) -> None:
        """Raises NoThread."""
        with self._lock:
            self._serving = True
            for listener in listeners:
                self._waiting.setdefault(listener, deque())
                if isinstance(listener, SharedListener):
                    listener.setblocking(False)             # or two threads that wake up for one client
                    self._wakeup = self._wakeup or Wakeup()
        if not self.refill(2 * MAX_WAITING):                # these hardly ever end
            raise NoThread("can't start new thread")

    def refill(self, spare: int = MAX_SPARE) -> bool:
        """None waits at first; and later, when none could be started. Whether one waits now for each listener.

        All at once, and these stay: what a thread needs would otherwise be allocated amid a crowd's tunnels, and keep
        their memory from being given back."""
        covered = True
        for listener in [listener for listener, waiting in self._waiting.items() if not waiting]:
            started = [*itertools.takewhile(bool, (self.start(listener, spare) for _ in range(MAX_WAITING)))]
            covered = covered and bool(started)
        return covered

    def start(self, listener: socket.socket, spare: int = MAX_SPARE) -> bool:
        """One more, until it comes back and `spare` others wait; False when the system has no thread to give."""
        with self._lock:
            if not self._serving:
                return True                                 # none is needed any more
            self._waiting[listener].append(None)
        try:
            threading.Thread(target=self._run, args=(listener, spare), name="acceptor", daemon=True).start()
        except (RuntimeError, MemoryError):                 # RuntimeError: can't start new thread
            self._waiting[listener].pop()
            return False
        return True

    def accepted(self, listener: socket.socket) -> bool:
        """The calling acceptor waits no longer. False when it should have a successor, and none can be started."""
        waiting = self._waiting[listener]
        waiting.pop()
        return bool(waiting) or self.start(listener)

    def _run(self, listener: socket.socket, spare: int) -> None:
        self.here.listener = listener
        wakeup, waiting = self._wakeup, self._waiting[listener]
        shared = wakeup and isinstance(listener, SharedListener)
        poll = one_of_many(listener.fileno(), wakeup.fileno()) if wakeup and shared else None
        while self._serving:
            if poll:
                poll()
                if not self._serving:                       # what has come since then is the next server's
                    break
            try:
                self._accept_one(listener)
            except MemoryError:                             # also for what it does about errors: the thread goes on
                sleep(REST_S)
            if len(waiting) >= spare or wakeup is not self._wakeup:
                return
            waiting.append(None)
        waiting.pop()

    def release(self, backlog: int) -> None:
        """Wake the threads in accept(), which takes a moment without listening; a client that connects later waits in
        the kernel's queue."""
        with self._lock:
            self._serving = False
            wakeup, self._wakeup = self._wakeup, None
        if wakeup:
            wakeup.set()
        for listener in self._waiting:
            shared, deadline = isinstance(listener, SharedListener), monotonic() + RELEASE_S
            try:
                if not shared:
                    listener.shutdown(socket.SHUT_RDWR)
                while self._waiting[listener] and monotonic() < deadline:
                    sleep(0.001)
                if not shared:
                    listener.listen(backlog)
            except OSError:                                 # closed meanwhile
                pass
        if wakeup:
            wakeup.close()
