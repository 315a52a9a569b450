"""Several server processes: the supervisor forks them, replaces a worker that died, passes on what signals ask for.

It has one thread and serves no client. The workers wait in accept() on the same listening sockets, which are made
before they are forked. Each has a GIL of its own, so together they use several CPUs.
"""
from __future__ import annotations

import logging
import os
import signal
import socket
from time import monotonic
from typing import Callable, Dict, Iterable, List, Optional, Sequence

from ..config import Config
from ..net import affinity, listeners as listening
from ..server.counters import Shared
from ..server.server import Server
from . import worker as child
from .companion import Companion
from .control import Control
from .files import Access
from .orders import Order, Outbox, pack
from .systemd import Notifier

log = logging.getLogger(__name__)

MOST_BY_DEFAULT = 4             # beyond this a proxy is bound by its network, and each costs some 10 MiB
RESTART_S = 0.1                 # before a dead worker is replaced; doubles while they keep dying
RESTART_MOST_S = 5.0
STEADY_S = 10.0                 # a worker that lived so long did not die of its start
COMPANION = -1                  # in the place of a row: the process of the companion, which is no worker

MakeServer = Callable[..., Server]


def number(asked: int) -> int:
    """How many processes: as many as asked for; 0 is one for each CPU, up to a few. One where there is no fork."""
    if not hasattr(os, "fork"):
        return 1
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return asked or min(cpus, MOST_BY_DEFAULT)


class Worker:
    """One worker process as its supervisor knows it."""

    def __init__(self, row: int, pid: int, outbox: Outbox) -> None:
        self.row = row
        self.pid = pid
        self.outbox = outbox
        self.started = monotonic()


class Supervisor(Control):
    """Keeps `count` workers running until SIGTERM or SIGINT has ended them all."""

    def __init__(self, config: Config, listeners: Sequence[socket.socket], count: int, access: Access,
                 make: MakeServer = Server, notifier: Optional[Notifier] = None,
                 companion: Optional[Companion] = None, shared: Optional[Shared] = None,
                 read_config: Optional[Callable[[], Config]] = None) -> None:
        super().__init__(config, access, notifier, companion, read_config)
        self.listeners = listeners
        self.make = make
        self.shared = shared or Shared(count)
        access[0].logins.share()
        self.shared.buckets.lock.share()
        self.workers: Dict[int, Worker] = {}            # by pid
        self.start_at: Dict[int, float] = dict.fromkeys(range(count), 0.0)     # by row, of those that do not run
        if self.companion.wanted:
            self.start_at[COMPANION] = 0.0
        self.backoff_s = RESTART_S

    # ---- Control asks ---------------------------------------------------------------------------------------------

    def running(self) -> bool:
        return any(worker.row != COMPANION for worker in self.workers.values()) or not self.stops

    def due(self) -> List[float]:
        return list(self.start_at.values())

    def unsent(self) -> Iterable[int]:
        return [worker.outbox.sock.fileno() for worker in self.workers.values() if worker.outbox.flush()]

    def work(self) -> None:
        self.reap()
        for row in [row for row, when in self.start_at.items() if when <= monotonic()]:
            del self.start_at[row]
            try:
                self.start(row)
            except (OSError, MemoryError) as exc:       # no process, no descriptors
                self.start_at[row] = monotonic() + RESTART_MOST_S
                log.error("no worker can be started, tried again in %g s: %s", RESTART_MOST_S, exc)

    def tell(self, order: Order) -> None:
        """No worker waits for another one, and the supervisor for none."""
        if order == Order.STOP:
            self.start_at.clear()
            listening.close_all(self.listeners)
        message = pack(order, self.access if order == Order.RELOAD else None)
        for worker in self.workers.values():
            worker.outbox.put(order, message)

    def prove_alive(self) -> None:
        """As in the base, unless every worker dies of its start: then systemd is to restart the service."""
        steady = any(monotonic() - worker.started > STEADY_S for worker in self.workers.values()
                     if worker.row != COMPANION)
        if steady or self.backoff_s < RESTART_MOST_S:
            super().prove_alive()

    def live(self) -> int:
        return self.shared.row(0).live()

    def kill(self) -> None:
        """Kill first, report afterwards: the log may be slow."""
        pids = [pid for pid, worker in self.workers.items() if worker.row != COMPANION]
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        for pid in pids:
            log.error("worker %d did not stop in time and was killed", pid)

    # ---- workers come and go --------------------------------------------------------------------------------------

    def start(self, row: int) -> None:
        """Fork a worker, or the companion. Signals are blocked meanwhile: see Signals."""
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                pid = os.fork()
            except BaseException:
                ours.close()
                raise
            if not pid:
                self.become_child(row, theirs, ours)
            self.workers[pid] = Worker(row, pid, Outbox(ours))
            if row != COMPANION:
                self.companion.started(row, pid)

    def become_child(self, row: int, channel: socket.socket, ours: socket.socket) -> None:
        """In the child; never returns."""
        def make() -> Server:
            self.files.close()
            self.notifier.close()
            affinity.pin(os.getppid() + row)        # neighbours by row; not always the first CPUs of the machine
            server = self.make(self.config, listeners=self.listeners, counts=self.shared.row(row), access=self.access)
            self.companion.attend(server, row)
            return server

        def accompany() -> None:
            self.files.close()
            self.notifier.close()
            listening.close_all(self.listeners)
            self.companion.start(self.access)
            self.companion.wait(channel)

        outboxes = [other.outbox.sock for other in self.workers.values()]
        supervisors = [ours, *self.signals.sockets, *outboxes]
        if row == COMPANION:
            child.end_after(accompany, supervisors)
        child.become(make, channel, supervisors)

    def reap(self) -> None:
        """Take note of the processes that died, and have them replaced."""
        for pid in list(self.workers):
            done, status = os.waitpid(pid, os.WNOHANG)
            if not done:
                continue
            worker = self.workers.pop(pid)
            worker.outbox.sock.close()
            if not self.stops:
                steady = monotonic() - worker.started > STEADY_S
                self.backoff_s = RESTART_S if steady else min(self.backoff_s * 2, RESTART_MOST_S)
                self.start_at[worker.row] = monotonic() + self.backoff_s
            self.report(worker, status)

    def report(self, worker: Worker, status: int) -> None:
        facts = {"pid": worker.pid, "how": how_it_died(status)}
        if worker.row == COMPANION:
            if not self.stops:
                log.error("status_died pid=%(pid)d how=%(how)s", facts)
            return
        lost = self.shared.row(worker.row).clear()
        self.companion.ended(worker.row)
        if status or not self.stops:
            log.error("worker_died pid=%(pid)d how=%(how)s sessions=%(lost)d", dict(facts, lost=lost))

    def close(self) -> None:
        """The companion goes last: it tells until then that the server drains."""
        for pid in self.workers:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        for worker in self.workers.values():
            worker.outbox.sock.close()
        super().close()
        self.access[0].logins.unshare()
        self.shared.buckets.lock.unshare()


def how_it_died(status: int) -> str:
    return "signal-%d" % os.WTERMSIG(status) if os.WIFSIGNALED(status) else "exit-%d" % os.WEXITSTATUS(status)
