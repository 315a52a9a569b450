"""Several server processes under one supervisor, which forks them before any thread exists.

Each has its own GIL and its own home CPU, and waits in accept() on the same listening sockets. The supervisor serves
nobody: it replaces a worker that died, and passes on what signals ask for. Orders go down a socket to each worker, one
JSON object a line. What the workers know of logins is in memory that they share (access/logins.py). A worker whose
supervisor is gone reads EOF, and ends.
"""
from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import socket
import sys
import threading
from functools import partial
from time import monotonic
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

from ..server import home

from ..net import listeners as listening
from ..access.users import Users
from ..config import Config, ConfigError
from ..server.counters import Shared
from .renewal import Renewal
from ..access.rules import Rules
from ..server.server import Server
from ..net.poller import READ, new_poll

log = logging.getLogger(__name__)

MOST_BY_DEFAULT = 4             # beyond this a proxy is bound by its network, and each costs some 10 MiB
RESTART_S = 0.1                 # before a dead worker is replaced; doubles while they keep dying
RESTART_MOST_S = 5.0
STEADY_S = 10.0                 # a worker that lived so long did not die of its start
OVERDUE_S = 5.0                 # beyond the drain: then a worker is killed
ORDER_S = 1.0                   # a worker that does not listen must not keep the others from hearing an order
LINE_BYTES = 1 << 16
SWITCH_S = 20e-6                # for each session: see ask_in_turn()
RENEWED = 75                    # exit status of a worker that makes way for a fresh one
ORDERS = {signal.SIGTERM: "stop", signal.SIGINT: "stop"}
if hasattr(signal, "SIGHUP"):
    ORDERS.update({signal.SIGHUP: "reload", signal.SIGUSR1: "sessions"})

MakeServer = Callable[..., Server]


def number(asked: int) -> int:
    """How many processes: as many as asked for; 0 is one for each CPU, up to a few. One where there is no fork."""
    if not hasattr(os, "fork"):
        return 1
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if not home.has_gil():
        cpus = 1                # threads alone use every CPU
    return asked or min(cpus, MOST_BY_DEFAULT)


def run(server: Server, hurry: threading.Event) -> None:
    """Serve until stop(), then drain; `hurry` ends the drain at once."""
    server.chores.append(partial(ask_in_turn, server, sys.getswitchinterval()))
    server.serve_forever()
    aborted = server.drain(server.config.drain_timeout, hurry)
    if aborted:
        log.warning("stopped with %d sessions cut off", aborted)


def ask_in_turn(server: Server, least_s: float) -> None:
    """Every thread that waits for the GIL wakes up in each switch interval to ask for it. When the tunnels of a crowd
    all end at once, thousands of them keep a CPU busy with asking: the more there are, the longer the interval."""
    sys.setswitchinterval(max(least_s, len(server.sessions) * SWITCH_S))


class Worker:
    """One process as its supervisor knows it."""

    def __init__(self, row: int, pid: int, channel: socket.socket) -> None:
        self.row = row
        self.pid = pid
        self.channel = channel
        self.started = monotonic()
        self.unread = b""

    def tell(self, line: bytes, wait_s: float = 0.0) -> None:
        """What does not fit into its socket within wait_s is lost: orders are worth waiting for, news is not."""
        try:
            self.channel.settimeout(wait_s)
            self.channel.sendall(line)
        except OSError:                         # it is dying, or does not listen: it will be replaced
            pass

    def lines(self) -> List[bytes]:
        """What it has said since; nothing more when it is gone."""
        try:
            self.unread += self.channel.recv(LINE_BYTES)
        except OSError:
            pass
        *whole, self.unread = self.unread.split(b"\n")
        return [line + b"\n" for line in whole]


class Supervisor:
    """Keeps `count` workers running until SIGTERM or SIGINT has ended them all."""

    def __init__(self, config: Config, listeners: Sequence[socket.socket], count: int, access: Tuple[Users, Rules],
                 make: MakeServer = Server) -> None:
        self.config = config
        self.access = access                            # in force: a file may be half written when a worker is replaced
        self.listeners = listeners
        self.make = make
        self.shared = Shared(count)
        access[0].logins.share()
        self.workers: Dict[int, Worker] = {}            # by pid
        self.due: Dict[int, float] = dict.fromkeys(range(count), 0.0)      # row: when it is to be started
        self.backoff_s = RESTART_S
        self.stopping = 0
        self.kill_at = float("inf")
        self.wakeup, self.waker = socket.socketpair()

    def run(self, ready: Callable[[], None] = lambda: None) -> None:
        """Until all workers are gone after a stop; calls ready() once signals are obeyed. Signal handlers stay as they
        are afterwards: the program ends."""
        for sock in (self.wakeup, self.waker):
            sock.setblocking(False)
        signal.set_wakeup_fd(self.waker.fileno())
        for signum in [*ORDERS, signal.SIGCHLD]:
            signal.signal(signum, lambda _signum, _frame: None)         # its number arrives at `wakeup`
        ready()
        while self.workers or not self.stopping:
            self.start_due()
            self.wait()
            self.reap()
            if monotonic() >= self.kill_at:
                self.kill_at = float("inf")
                for pid in self.workers:
                    log.error("worker %d did not stop, and is killed", pid)
                    os.kill(pid, signal.SIGKILL)
        signal.set_wakeup_fd(-1)

    def wait(self) -> None:
        """For a signal, a word from a worker, or the next thing that is due."""
        poll = new_poll()
        poll.register(self.wakeup.fileno(), READ)
        speakers = {worker.channel.fileno(): worker for worker in self.workers.values()}
        for fd in speakers:
            poll.register(fd, READ)
        next_s = min([*self.due.values(), self.kill_at]) - monotonic()
        for fd, _events in poll.poll(max(min(next_s, 3600.0), 0.0) * 1000 + 1):
            if fd in speakers:
                speakers[fd].lines()
            else:
                for signum in self.wakeup.recv(64):
                    self.on_signal(signum)

    def on_signal(self, signum: int) -> None:
        order = ORDERS.get(signal.Signals(signum))
        if order == "stop":
            self.stopping += 1
            self.due.clear()
            self.kill_at = monotonic() + OVERDUE_S + (self.config.drain_timeout if self.stopping == 1 else 0)
            listening.close_all(self.listeners)
        elif order == "reload":
            with contextlib.suppress(ConfigError):      # then all stays as it was; each worker says so
                self.access = Users(self.config, self.access[0]), Rules(self.config)
        if order:
            self.tell_all(line_of(order), wait_s=ORDER_S)

    def tell_all(self, line: bytes, except_for: Optional[Worker] = None, wait_s: float = 0.0) -> None:
        for worker in self.workers.values():
            if worker is not except_for:
                worker.tell(line, wait_s)

    def start_due(self) -> None:
        for row in [row for row, when in self.due.items() if when <= monotonic()]:
            del self.due[row]
            try:
                self.start(row)
            except OSError as exc:              # no process, no descriptors: try again later
                self.due[row] = monotonic() + RESTART_MOST_S
                log.error("no worker can be started: %s", exc.strerror)

    def start(self, row: int) -> None:
        ours, theirs = socket.socketpair()
        signals = {*ORDERS, signal.SIGCHLD}
        signal.pthread_sigmask(signal.SIG_BLOCK, signals)       # in the child they would wake the supervisor
        try:
            pid = os.fork()
            if not pid:
                self.become_worker(row, theirs, ours)
            self.workers[pid] = Worker(row, pid, ours)
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)
            theirs.close()

    def become_worker(self, row: int, channel: socket.socket, supervisors: socket.socket) -> None:
        """In the child; never returns. Signals are the supervisor's, which sends orders: Ctrl-C reaches all of us."""
        status = 1
        try:
            signal.set_wakeup_fd(-1)
            for signum in ORDERS:
                signal.signal(signum, signal.SIG_IGN)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {*ORDERS, signal.SIGCHLD})
            for sock in [supervisors, self.wakeup, self.waker, *[other.channel for other in self.workers.values()]]:
                sock.close()
            server = self.make(self.config, listeners=self.listeners, home=home.make(row), counts=self.shared.row(row),
                               access=self.access)
            status = RENEWED if work(server, channel) else 0
        except BaseException:
            log.exception("worker %d cannot go on", os.getpid())
        finally:
            logging.shutdown()
            os._exit(status)

    def reap(self) -> None:
        """Count the dead, and have them replaced."""
        for pid in list(self.workers):
            done, status = os.waitpid(pid, os.WNOHANG)
            if not done:
                continue
            worker = self.workers.pop(pid)
            worker.channel.close()
            lost = self.shared.row(worker.row).clear()
            if self.stopping:
                continue
            if os.WIFEXITED(status) and os.WEXITSTATUS(status) == RENEWED:
                self.due[worker.row] = monotonic()
                log.info("worker_renewed pid=%(pid)d", {"pid": pid})
                continue
            self.backoff_s = RESTART_S if monotonic() - worker.started > STEADY_S else min(
                self.backoff_s * 2, RESTART_MOST_S)
            self.due[worker.row] = monotonic() + self.backoff_s
            log.error("worker_died pid=%(pid)d how=%(how)s sessions=%(lost)d",
                      {"pid": pid, "how": how_it_died(status), "lost": lost})


def how_it_died(status: int) -> str:
    return "signal-%d" % os.WTERMSIG(status) if os.WIFSIGNALED(status) else "exit-%d" % os.WEXITSTATUS(status)


def line_of(order: str, *facts: Any) -> bytes:
    return json.dumps([order, *facts]).encode("ascii") + b"\n"


def heard(line: bytes) -> Tuple[str, List[Any]]:
    """The order and its facts; nothing where a full socket has cut the line short."""
    try:
        order, *facts = json.loads(line)
    except (ValueError, TypeError):
        return "", []
    return order, facts


def work(server: Server, channel: socket.socket) -> bool:
    """Serve as the supervisor's orders say. True when it ends to make way for a fresh one."""
    hurry = threading.Event()
    renewal = Renewal(server)
    server.chores.append(renewal.look)
    threading.Thread(target=obey, args=(server, channel, hurry), daemon=True).start()
    with server:
        run(server, hurry)
    return renewal.leaving


def obey(server: Server, channel: socket.socket, hurry: threading.Event) -> None:
    """Do what the supervisor says; end at once when it is gone, or says stop twice."""
    stopping = False
    with channel.makefile("rb") as lines:
        for line in lines:
            order, _facts = heard(line)
            if order == "stop":
                if stopping:
                    hurry.set()
                stopping = True
                server.stop()
            elif order == "reload":
                server.reload_soon()
            elif order == "sessions":
                server.log_sessions_soon()
    hurry.set()
    server.stop()
