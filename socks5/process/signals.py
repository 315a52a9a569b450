"""Signals become orders: held back until they can be obeyed, noted by a handler, acted upon by the main loop.

Only the main thread uses this, for Python runs signal handlers there. Signals are blocked in every thread, and in the
main thread as well except while it waits. So nothing that the main loop does is interrupted, and signals that come
meanwhile coalesce: the kernel keeps one of each number.

SIGHUP has two senders. An administrator asks for a reload. The kernel or a shell says that the terminal was closed:
then the server stops, like any program that was started there.
"""
from __future__ import annotations

import contextlib
import os
import signal
import socket
from types import FrameType
from typing import Dict, Iterable, Optional, Set

from ..net.poller import READ, WRITE, new_poll
from .orders import Order

ORDERS: Dict[int, Order] = {signal.SIGTERM: Order.STOP, signal.SIGINT: Order.STOP}
if hasattr(signal, "SIGHUP"):                       # not on Windows
    ORDERS.update({signal.SIGHUP: Order.RELOAD, signal.SIGUSR1: Order.SESSIONS})
CHILD = {signal.SIGCHLD} if hasattr(signal, "SIGCHLD") else set()
LONGEST_WAIT_S = 3600.0


def hold() -> None:
    """Block our signals in this thread, and in those that it starts from now on. They stay pending."""
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {*ORDERS, *CHILD})


def release() -> None:
    """Unblock them: handlers are called for those that are pending."""
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {*ORDERS, *CHILD})


def ignore() -> None:
    """In a worker, after the fork: orders come from the supervisor. Ctrl-C and service managers signal all of us."""
    signal.set_wakeup_fd(-1)
    for number in ORDERS:
        signal.signal(number, signal.SIG_IGN)
    for number in CHILD:
        signal.signal(number, signal.SIG_DFL)
    release()


def terminals() -> Set[int]:
    """Those of the standard descriptors that are a terminal which is still there."""
    return {fd for fd in range(3) if os.isatty(fd)}


class Signals:
    """Notes signals, and waits for them. Leaves them blocked at the end: a late one must not change how the program
    ends."""

    def __init__(self) -> None:
        self.sockets = socket.socketpair()
        self._seen: Dict[int, Optional[FrameType]] = {}
        self._terminals = terminals()
        for sock in self.sockets:
            sock.setblocking(False)

    def __enter__(self) -> Signals:
        hold()
        # A full socket is no reason to warn, because what counts is in _seen.
        signal.set_wakeup_fd(self.sockets[1].fileno(), warn_on_full_buffer=False)
        for number in {*ORDERS, *CHILD}:
            # A C function: the next signal cannot interrupt it. A handler in Python is interrupted by its own next
            # call, so that a storm of signals ends in a RecursionError.
            signal.signal(number, self._seen.__setitem__)
        return self

    def __exit__(self, *_exc: object) -> None:
        hold()
        signal.set_wakeup_fd(-1)

    def close(self) -> None:
        for sock in self.sockets:
            sock.close()

    def wait(self, timeout_s: float, writing: Iterable[int] = ()) -> Set[Order]:
        """Wait for a signal, for wake(), or until one of the descriptors `writing` can be written to. Returns the
        orders that signals have given since the last call."""
        poll = new_poll()
        poll.register(self.sockets[0].fileno(), READ)
        for fd in writing:
            poll.register(fd, WRITE)
        release()
        try:
            poll.poll(min(max(timeout_s, 0.0), LONGEST_WAIT_S) * 1000)
        finally:
            hold()
        with contextlib.suppress(BlockingIOError):
            self.sockets[0].recv(4096)
        seen = list(self._seen)
        orders = {ORDERS[number] for number in seen if number in ORDERS}
        for number in seen:                         # only now: a MemoryError costs no order
            del self._seen[number]
        if Order.RELOAD in orders and self._terminals and not terminals():
            orders = orders - {Order.RELOAD} | {Order.STOP}
            self._terminals = set()                     # the kernel and the shell may send one SIGHUP each
        return orders

    def wake(self) -> None:
        """Make wait() return. Any thread may call this."""
        with contextlib.suppress(OSError):          # full, or closed
            self.sockets[1].send(b"x")
