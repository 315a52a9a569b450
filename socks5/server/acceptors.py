"""Threads that wait in accept() themselves, and serve what they accept.

Starting a thread costs about as much as a whole negotiation, so a few are kept. Only where shutting a listener down
wakes whoever waits in its accept(), which is Linux; elsewhere the server's loop accepts and starts a thread each.
"""
from __future__ import annotations

import os
import signal
import socket
import sys
import threading
from _thread import get_ident, start_new_thread     # a Thread object is 2.5 KiB a tunnel, and its start() waits
from time import monotonic, sleep
from typing import Callable, Sequence, Set

available = hasattr(socket, "TCP_DEFER_ACCEPT")     # Linux has this option
MOST = 8                    # that wait, for each listener; a thread that comes back when there are so many ends
RELEASE_S = 1.0


class Spares:
    """`accept_from(listener)` is what they call: it must call `accepted` when accept() has come back."""

    def __init__(self, listeners: Sequence[socket.socket], accept_from: Callable[[socket.socket], None]) -> None:
        self._accept_from = accept_from
        self._lock = threading.Lock()
        self._serving = False                               # may threads go on to accept()? changes under the lock
        self._waiting = dict.fromkeys(listeners, 0)         # in accept()
        self._idents: Set[int] = set()

    def here(self) -> bool:
        """Whether the calling thread is one of them, which serves what it accepted."""
        return get_ident() in self._idents

    def serve(self) -> None:
        with self._lock:
            self._serving = True

    def refill(self) -> None:
        """Nobody may wait at first; and later, when none could be started."""
        for listener, waiting in self._waiting.items():
            if not waiting:
                self.start(listener)

    def start(self, listener: socket.socket) -> bool:
        """One more; False when the system has no thread to give."""
        with self._lock:
            if not self._serving:
                return True                                 # nobody needs it any more
            self._waiting[listener] += 1
        try:
            start_new_thread(self._loop, (listener,))
        except (RuntimeError, MemoryError):                 # RuntimeError: can't start new thread
            with self._lock:
                self._waiting[listener] -= 1
            return False
        return True

    def accepted(self, listener: socket.socket) -> bool:
        """The calling thread waits no longer; False when it should have a successor, and none can be started."""
        with self._lock:
            self._waiting[listener] -= 1
            last = not self._waiting[listener]
        return not last or self.start(listener)

    def _loop(self, listener: socket.socket) -> None:
        hook = getattr(threading, "_trace_hook", None)      # a Thread would do this: debuggers, coverage
        if hook:
            sys.settrace(hook)
        with self._lock:
            self._idents.add(get_ident())
        try:
            while True:
                self._accept_from(listener)
                with self._lock:
                    if not self._serving or self._waiting[listener] >= MOST:
                        return
                    self._waiting[listener] += 1
        finally:
            with self._lock:
                self._idents.discard(get_ident())       # leave() signals these, and only a living thread can take it

    def release(self, backlog: int) -> None:
        """Wake those in accept(), which takes a moment without listening; who comes later waits in the queue."""
        with self._lock:
            self._serving = False
        for listener in self._waiting:
            deadline = monotonic() + RELEASE_S
            try:
                listener.shutdown(socket.SHUT_RDWR)
                while self._waiting[listener] and monotonic() < deadline:
                    sleep(0.001)
                listener.listen(backlog)
            except OSError:                                 # closed by somebody else
                pass

    def leave(self) -> bool:
        """Have everybody leave accept(), while other processes go on with the same sockets: who connects meanwhile does
        not notice. True when nobody is left, for good; where somebody had just accepted a client, all is as before.

        Takes a signal that somebody handles: a thread whose accept() it interrupts calls it again, and finds in the
        listener's place a socket that does not listen.
        """
        try:
            kept = {listener: listener.dup() for listener in self._waiting}
            with socket.socket() as deaf:
                with self._lock:
                    self._serving = False
                for listener in self._waiting:
                    os.dup2(deaf.fileno(), listener.fileno(), inheritable=False)
        except OSError:                                     # no descriptors
            return False
        deadline = monotonic() + RELEASE_S
        while any(self._waiting.values()) and monotonic() < deadline:
            with self._lock:                                # nobody ends meanwhile
                for ident in self._idents:
                    signal.pthread_kill(ident, signal.SIGURG)
            sleep(0.001)
        gone = not self._idents
        for listener, copy in kept.items():
            with copy:
                if not gone:
                    os.dup2(copy.fileno(), listener.fileno(), inheritable=False)
        if not gone:
            self.serve()
        return gone
