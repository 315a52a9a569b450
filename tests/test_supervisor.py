"""supervisor.py and alone.py: real processes, one or several on the same listeners, and real signals."""
import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
import unittest
from unittest import mock

try:
    import resource
except ImportError:                     # Windows
    resource = None

from socks5 import client
from socks5.access import throttle
from socks5.config import Config
from socks5.process import control, systemd
from socks5.process import supervisor as workers
from socks5.process.files import read_access
from socks5.protocol.codes import Cmd, Rep
from tests import support
from tests.support import (
    PATIENCE_S, SCRIPT, Spawned, ask, children, connect_through, dial, echoes, free_ports, greeted, heard, need,
    read_to_end, refusal, refuses, script, spawned, target, threads, users_line, wait_until)

NO_LOGIN = b"\x05\x01\x00"
QUICK = "from socks5.process import supervisor\nsupervisor.RESTART_MOST_S = 0.1"


@unittest.skipUnless(hasattr(os, "fork"), "this system has no fork")
class Processes(support.Case):
    @contextlib.contextmanager
    def crew(self, *args, count=3, **kwargs):
        """Our server with `count` workers: yields it, and their pids."""
        need(self, os.path.exists("/proc/self/task"), "/proc")
        with spawned("-w", str(count), *args, **kwargs) as server:
            wait_until(lambda: len(children(server.process.pid)) == count, "%d workers" % count)
            yield server, children(server.process.pid)

    def replace_all(self, server):
        """Kill the workers, and wait for as many others."""
        before = children(server.process.pid)
        for pid in before:
            os.kill(pid, signal.SIGKILL)
        wait_until(lambda: len(set(children(server.process.pid)) - set(before)) == len(before), "fresh workers")

    def test_all_serve_and_share_the_port(self):
        with target() as echo, self.crew() as (server, pids), contextlib.ExitStack() as stack:
            wait_until(lambda: all(threads(pid) >= 3 for pid in pids), "each hears orders, and waits for clients")
            before = {pid: len(links(pid)) for pid in pids}
            tunnels = [stack.enter_context(connect_through(server.port, *echo)) for _ in range(60)]
            self.assertTrue(all(map(echoes, tunnels)))
            busy = [pid for pid in pids if len(links(pid)) >= before[pid] + 2]
            self.assertGreater(len(busy), 1, "all connections went to one process")
            self.assertLess(threads(server.process.pid), 2, "the supervisor forks, so it has no threads")

    def test_one_process_where_asked(self):
        with spawned("-w", "1") as server:
            self.assertEqual(children(server.process.pid), [])

    def test_a_killed_worker_is_replaced_and_the_others_do_not_notice(self):
        with target() as echo, self.crew("--max-sessions", "44") as (server, pids), contextlib.ExitStack() as stack:
            tunnels = [stack.enter_context(connect_through(server.port, *echo)) for _ in range(40)]
            self.assertTrue(all(map(echoes, tunnels)))
            os.kill(pids[0], signal.SIGKILL)
            died = server.wait_line(r"worker_died pid=(\d+) how=(\S+) sessions=(\d+)")
            self.assertEqual(died.group(1, 2), (str(pids[0]), "signal-9"))
            alive = 0
            for tunnel in tunnels:
                with contextlib.suppress(OSError, EOFError):
                    alive += echoes(tunnel)
            self.assertEqual(alive, 40 - int(died.group(3)))
            wait_until(lambda: len(children(server.process.pid)) == 3, "three workers again")
            for _ in range(int(died.group(3))):             # its places under --max-sessions are free again
                stack.enter_context(connect_through(server.port, *echo))
            with dial(server.port) as more:
                self.assertEqual(heard(more, NO_LOGIN), b"")

    def test_guessing_is_throttled_over_all_workers_and_their_replacements(self):
        with self.crew("-u", "bob:right", "--handshake-timeout", "1") as (server, _pids):
            begun = time.monotonic()
            for turn in range(2):
                with contextlib.ExitStack() as stack:
                    clients = [stack.enter_context(dial(server.port)) for _ in range(40)]
                    for number, sock in enumerate(clients):
                        sock.sendall(b"\x05\x01\x02\x01\x03bob\x02" + bytes([65 + turn, 65 + number]))
                    for sock in clients:
                        with contextlib.suppress(OSError):
                            read_to_end(sock)
                if turn == 0:
                    self.replace_all(server)
            wait_until(lambda: count(server, "auth_failed") >= throttle.BURST, "the first of them are looked at")
            server.end()
            looked = count(server, "auth_failed")
            most = throttle.BURST + 1 + (time.monotonic() - begun) / throttle.INTERVAL_S
            self.assertTrue(throttle.BURST <= looked <= most, (looked, most))

    def test_a_password_is_known_to_all_workers_and_their_replacements(self):
        """And after a reload: it is hashed once, however many log in with it."""
        text = """
from socks5.access import passwords
derive = passwords.derive
passwords.derive = lambda *args: (print("hashed", flush=True), derive(*args))[-1]
"""
        path = self.new_folder() / "users"
        path.write_text(users_line("bob", b"right"))
        with script(text) as command, self.crew("--users", path, count=2, script=command) as (server, _pids):
            for turn in range(3):
                for _ in range(10):
                    greeted(server.port, (b"bob", b"right")).close()
                if turn == 0:
                    self.replace_all(server)
                elif turn == 1:
                    server.signal(signal.SIGHUP)
                    wait_until(lambda: count(server, " reloaded ") == 2, "both have read it")
            server.end()
            self.assertEqual(server.lines.count("hashed"), 1)

    def test_a_fresh_worker_has_the_rules_in_force_whatever_is_in_the_file(self):
        rules = self.new_folder() / "rules"
        rules.write_text("allow to any\n")
        with target() as echo, script(QUICK) as command, \
                self.crew("--rules", rules, count=2, script=command) as (server, _pids):
            rules.write_text("no rule at all\n")
            self.replace_all(server)
            server.signal(signal.SIGHUP)
            server.wait_line("not reloaded, users and rules stay as they were: .*rules:1: ")
            self.replace_all(server)
            self.check_serves(server.port, echo)
            self.assertEqual(count(server, "not reloaded"), 1)
            rules.write_text("deny to any\n")
            server.signal(signal.SIGHUP)
            wait_until(lambda: count(server, "INFO reloaded ") == 2, "both have them")
            rules.write_text("no rule at all\n")
            self.replace_all(server)
            self.assertEqual(refusal(self, client.connect, ("127.0.0.1", server.port), echo), Rep.NOT_ALLOWED)

    def test_limits_hold_over_all(self):
        for option, most, taken in (("--max-sessions", "11", 10), ("--max-per-client", "5", 5)):
            with self.subTest(option), target() as echo, self.crew(option, most) as (server, _pids), \
                    contextlib.ExitStack() as stack:
                for _ in range(taken):
                    stack.enter_context(connect_through(server.port, *echo))
                for _ in range(6):
                    with dial(server.port) as more:
                        self.assertEqual(heard(more, NO_LOGIN), b"")
                greeted(server.port, source="127.0.0.9").close()

    def test_one_address_cannot_take_the_ports_of_all_until_a_worker_dies(self):
        low = free_ports(10, "0.0.0.0")
        with script(QUICK) as command, self.crew("--bind-ports", "%d-%d" % (low, low + 9), "--udp-ports",
                                                 "%d-%d" % (low, low + 9), count=2, script=command) as (server, _pids):
            for turn in range(2):
                with contextlib.ExitStack() as stack:
                    def asked(cmd, source="127.0.0.1"):
                        return ask(stack.enter_context(greeted(server.port, source=source)), cmd, "127.0.0.1", 0).rep

                    for cmd, share in ((Cmd.BIND, 9), (Cmd.UDP_ASSOCIATE, 4)):
                        with self.subTest(cmd.name, turn=turn):
                            self.assertEqual([asked(cmd) for _ in range(share + 2)].count(Rep.SUCCEEDED), share)
                            self.assertEqual([asked(cmd, "127.0.0.%d" % number) for number in (2, 3)],
                                             [Rep.SUCCEEDED, Rep.GENERAL_FAILURE])
                    self.replace_all(server)

    def test_a_signal_drains_and_a_tunnel_may_finish(self):
        """To the supervisor, or to the whole group, as Ctrl-C in a terminal: then the workers leave it to the
        supervisor, or it would count as a second one."""
        for send, number in ((os.kill, signal.SIGTERM), (getattr(os, "killpg", None), signal.SIGINT)):
            with self.subTest(number.name), target() as echo, self.crew(
                    "--drain-timeout", "600", preexec_fn=os.setsid) as (server, _pids):
                with connect_through(server.port, *echo) as tunnel:
                    port = server.port
                    send(server.process.pid, number)
                    wait_until(lambda: refuses(port), "no process listens")
                    self.assertTrue(echoes(tunnel))
                self.assertEqual(server.process.wait(PATIENCE_S), 0)

    def test_a_second_signal_ends_it_at_once(self):
        with target() as echo, self.crew("--drain-timeout", "600") as (server, _pids):
            with connect_through(server.port, *echo) as tunnel:
                self.assertTrue(echoes(tunnel))         # it stands
                port = server.port
                server.signal(signal.SIGTERM)
                wait_until(lambda: refuses(port), "no process listens")
                server.signal(signal.SIGTERM)
                with self.assertRaises(ConnectionResetError):
                    tunnel.recv(1)
            self.assertEqual(server.process.wait(PATIENCE_S), 0)

    def test_workers_end_with_a_supervisor_that_was_killed(self):
        with target() as echo, self.crew() as (server, pids):
            with connect_through(server.port, *echo) as tunnel:
                self.assertTrue(echoes(tunnel))
                port = server.port
                server.process.kill()
                server.process.wait(PATIENCE_S)
                wait_until(lambda: not any(map(alive, pids)), "no worker left")
            with spawned("-w", "2", "-p", str(port)) as again:
                self.assertEqual(again.port, port)


def links(pid):
    found = []
    for fd in os.listdir("/proc/%d/fd" % pid):
        with contextlib.suppress(OSError):
            found.append(os.readlink("/proc/%d/fd/%s" % (pid, fd)))
    return [link for link in found if link.startswith("socket:")]


def alive(pid):
    try:
        with open("/proc/%d/stat" % pid) as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def count(server, words):
    return sum(words in line for line in list(server.log))


class Storm:
    """Sends a signal over and over until the process ends, or the block does."""

    def __init__(self, process, number):
        self.sent = 0
        self._process, self._number = process, number
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._send, daemon=True)

    def _send(self):
        while not self._over.wait(0.0005) and self._process.poll() is None:
            self._process.send_signal(self._number)
            self.sent += 1

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_exc):
        self._over.set()
        self._thread.join(PATIENCE_S)


@unittest.skipUnless(hasattr(os, "fork"), "no fork here, so no signals like these")
class Signals(support.Case):
    """With one process and with several."""

    def test_a_storm_of_sighup_is_a_handful_of_reloads_and_sigterm_goes_first(self):
        with target() as echo:
            for processes in (1, 2):
                with self.subTest("-w %d" % processes), spawned("-w", processes, "--drain-timeout", "0") as server:
                    begun = time.monotonic()
                    with Storm(server.process, signal.SIGHUP) as storm:
                        wait_until(lambda: storm.sent >= 1000, "a storm")
                        self.check_serves(server.port, echo)
                        self.assertEqual(server.end(signal.SIGTERM), 0)
                    most = 2 + (time.monotonic() - begun) / control.RELOAD_EVERY_S
                    self.assertLessEqual(count(server, "INFO reloaded "), most * processes)
                    self.assertEqual(count(server, "Error"), 0, server.log)

    def early(self, path, *args):
        """A server that got SIGHUP and SIGUSR1 before it could obey them does so later, and serves."""
        server = Spawned("-p", "0", *args, script=path)
        try:
            server.wait_line("listening on", server.lines)
            server.wait_line("INFO reloaded ")
            server.wait_line(" live sessions=")
            self.assertEqual(server.end(signal.SIGTERM), 0)
        finally:
            server.end(signal.SIGKILL)

    def test_signals_that_come_too_early_are_obeyed_later(self):
        send = "os.kill(os.getpid(), signal.SIGHUP), os.kill(os.getpid(), signal.SIGUSR1)"
        for when in ("build_parser", "read_config", "serve"):
            text = "from socks5 import cli\nold = cli.%s\ncli.%s = lambda *args: (%s, old(*args))[-1]" % (
                when, when, send)
            with self.subTest(when), script(text) as path:
                self.early(path, "-w", "1")
                self.early(path, "-w", "2")

    def test_signals_that_come_while_modules_are_imported(self):
        for way in ("runpy.run_path(%r, run_name='__main__')" % str(SCRIPT),
                    "runpy.run_module('socks5', run_name='__main__')",
                    "from socks5.__main__ import main; sys.exit(main())"):      # the entry point
            text = """
import runpy
class Importing:
    def find_spec(self, name, path=None, target=None):
        if name.startswith("socks5.") and name != "socks5.__main__":
            os.kill(os.getpid(), signal.SIGHUP), os.kill(os.getpid(), signal.SIGUSR1)
sys.meta_path.insert(0, Importing())
""" + way
            with self.subTest(way), script(text) as path:
                self.early(path, "-w", "1")

    def test_a_worker_that_cannot_start_a_thread_says_so_in_one_line(self):
        text = """
import threading
def start(thread): raise RuntimeError("can't start new thread")
threading.Thread.start = start"""
        with script(text) as path:
            server = Spawned("-p", "0", "-w", "2", script=path)
            try:
                server.wait_line("cannot start: can't start new thread")
            finally:
                server.end(signal.SIGTERM)
            self.assertEqual(count(server, "Traceback"), 0, server.log)

    def test_a_bug_that_ends_the_relay_loop_ends_the_process(self):
        """With an error: a worker is replaced, a server that is alone ends."""
        text = """
from socks5.relay.loop import Loop
Loop._sweep = lambda loop: 1 / 0"""
        with script(text) as path:
            for processes in ("1", "2"):
                with self.subTest("-w " + processes):
                    server = Spawned("-p", "0", "-w", processes, script=path)
                    try:
                        server.wait_line("cannot go on")
                        if processes == "1":
                            self.assertEqual(server.process.wait(PATIENCE_S), 1)
                        else:
                            server.wait_line("worker_died pid=[0-9]+ how=exit-1 sessions=0")
                    finally:
                        server.end(signal.SIGTERM)

    def test_a_stop_that_comes_too_early(self):
        for number in (signal.SIGTERM, signal.SIGINT):
            text = "from socks5 import cli\nold = cli.serve\ncli.serve = lambda *args: " \
                   "(os.kill(os.getpid(), %d), old(*args))[-1]" % number
            for processes in ("1", "2"):
                with self.subTest("%s -w %s" % (number.name, processes)), script(text) as path:
                    server = Spawned("-p", "0", "-w", processes, script=path)
                    self.assertEqual((server.process.wait(PATIENCE_S), server.end()), (0, 0))

    def test_a_reload_that_failed_for_want_of_descriptors_succeeds_later(self):
        need(self, hasattr(resource, "prlimit"), "prlimit")
        rules = self.new_folder() / "rules"
        with target() as echo:
            for processes in (1, 2):
                rules.write_text("allow to any\n")
                with self.subTest("-w %d" % processes), spawned("-w", processes, "--rules", rules) as server:
                    if processes > 1:
                        wait_until(lambda: len(children(server.process.pid)) == processes, "workers")
                    rules.write_text("deny to any\n")
                    soft, hard = resource.prlimit(server.process.pid, resource.RLIMIT_NOFILE)
                    resource.prlimit(server.process.pid, resource.RLIMIT_NOFILE, (3, hard))
                    server.signal(signal.SIGHUP)
                    server.wait_line("not reloaded yet, tried again every second: .*Too many open files")
                    resource.prlimit(server.process.pid, resource.RLIMIT_NOFILE, (soft, hard))
                    wait_until(lambda: count(server, "INFO reloaded ") == processes, "reloaded without another signal")
                    self.assertEqual(refusal(self, client.connect, ("127.0.0.1", server.port), echo), Rep.NOT_ALLOWED)

    def test_a_server_that_does_not_stop_does_not_keep_the_program(self):
        text = """
import threading
from socks5 import Server
Server.drain = lambda *args: (print("draining", flush=True), threading.Event().wait())
"""
        with script(text) as path, spawned("-w", "1", script=path) as server:
            greeted(server.port).close()                # it serves
            server.signal(signal.SIGTERM)
            server.wait_line("draining", server.lines)
            server.signal(signal.SIGINT)
            self.assertEqual(server.process.wait(PATIENCE_S), 0)
            server.wait_line("the server did not stop in time")

    def test_a_server_that_breaks_ends_the_program_with_1(self):
        """With the traceback, also where a hook raises what a want of threads raises as well."""
        for hook, error in ("serve_forever", ZeroDivisionError), ("service_actions", RuntimeError):
            text = "from socks5 import Server\ndef fail(self):\n    raise %s\nServer.%s = fail" % (error.__name__, hook)
            with self.subTest(hook), script(text) as path, spawned("-w", "1", script=path) as server:
                self.assertEqual(server.process.wait(PATIENCE_S), 1)
                server.wait_line("Traceback")
                server.wait_line(error.__name__)


class Slow(support.Case):
    """Workers that do not do as they are told."""

    crew, setUp = Processes.crew, lambda self: need(self, hasattr(os, "fork"), "fork")

    def test_a_stopped_worker_keeps_no_other_from_orders_and_is_killed_when_overdue(self):
        with self.crew("--users", large_users(self.new_folder()), count=3) as (server, pids):
            os.kill(pids[0], signal.SIGSTOP)
            try:
                for number in (1, 2):
                    server.signal(signal.SIGHUP)        # more than the stopped one's socket takes
                    wait_until(lambda: count(server, "INFO reloaded ") == 2 * number, "the others have reloaded")
                server.signal(signal.SIGUSR1)
                wait_until(lambda: count(server, " live sessions=") == 2, "the others have logged")
                server.signal(signal.SIGTERM)
                wait_until(lambda: not any(map(alive, pids[1:])), "the others have stopped")
                self.assertIsNone(server.process.poll())
                server.signal(signal.SIGTERM)
                self.assertEqual(server.process.wait(PATIENCE_S), 0)
            finally:
                with contextlib.suppress(OSError):
                    os.kill(pids[0], signal.SIGKILL)
            server.wait_line("worker %d did not stop in time and was killed" % pids[0])
            server.wait_line("worker_died pid=%d how=signal-9" % pids[0])

    def test_a_stopped_worker_has_the_latest_rules_when_it_goes_on(self):
        with self.crew("--users", large_users(self.new_folder()), count=2) as (server, pids):
            os.kill(pids[0], signal.SIGSTOP)
            try:
                for number in (1, 2, 3):
                    server.signal(signal.SIGHUP)
                    wait_until(lambda: count(server, "INFO reloaded ") == number, "the other has reloaded")
            finally:
                os.kill(pids[0], signal.SIGCONT)
            wait_until(lambda: count(server, "INFO reloaded ") == 5, "the one under way, and the latest")
            self.assertEqual(set(children(server.process.pid)), set(pids))

    def test_a_fork_that_fails_is_tried_again(self):
        text = """
from socks5.process import supervisor
supervisor.RESTART_MOST_S = 0.1
fork, failures = os.fork, [1, 2, 3]
def failing():
    if failures:
        failures.pop()
        raise BlockingIOError(11, "Resource temporarily unavailable")
    return fork()
os.fork = failing
"""
        with script(text) as path, self.crew(script=path, count=2) as (server, _pids), target() as echo:
            self.assertEqual(count(server, "no worker can be started, tried again in 0.1 s"), 3)
            self.check_serves(server.port, echo)
            self.assertEqual(server.end(signal.SIGTERM), 0)

    def test_a_worker_that_cannot_start_is_logged_and_replaced_and_sigterm_ends_it(self):
        text = """
from socks5.process import supervisor
supervisor.RESTART_S = supervisor.RESTART_MOST_S = 0.05
from socks5 import Server
Server.serve_forever = lambda self: 1 // 0
"""
        with script(text) as path, spawned("-w", "2", script=path) as server:
            wait_until(lambda: count(server, "how=exit-1") >= 4, "each died twice")
            server.wait_line("ZeroDivisionError")
            self.assertEqual(server.end(signal.SIGTERM), 0)

    def test_signal_masks_and_dispositions(self):
        def mask(pid, name):
            with open("/proc/%d/status" % pid) as file:
                found = next(int(line.split()[1], 16) for line in file if line.startswith(name))
            return {number for number in range(1, 65) if found >> number - 1 & 1}

        orders = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1}
        with self.crew(count=2) as (server, pids):
            for pid in pids:
                wait_until(lambda: mask(pid, "SigIgn:") >= orders and not mask(pid, "SigBlk:"), "a worker ignores them")
                self.assertEqual(mask(pid, "SigCgt:") & {*orders, signal.SIGCHLD}, set())
            wait_until(lambda: not mask(server.process.pid, "SigBlk:"), "the supervisor waits for them")
            self.assertGreaterEqual(mask(server.process.pid, "SigCgt:"), {*orders, signal.SIGCHLD})


def large_users(folder):
    """The path of a users file that is more than a socket takes."""
    line, path = users_line("x", b"x").partition(":")[2], folder / "users"
    path.write_text("".join("user%d%s:%s\n" % (number, "x" * 200, line) for number in range(3000)))
    return path


class Parts(unittest.TestCase):
    @unittest.skipUnless(hasattr(os, "fork"), "no fork here")
    def test_backoff(self):
        """A worker that dies young is replaced later and later, one that was steady at once. While all die young, the
        watchdog is not told any more."""
        now, told = [1000.0], []

        class Told(systemd.Notifier):
            def alive(self):
                told.append(now[0])

        def tells():
            told.clear()
            supervisor.prove_alive()
            return bool(told)

        with mock.patch.object(workers, "monotonic", lambda: now[0]), self.assertLogs("socks5", "ERROR"):
            supervisor = workers.Supervisor(Config(), [], 1, read_access(Config()), notifier=Told({}))
            self.addCleanup(supervisor.close)
            for lived, expected in ((0, 0.2), (1, 0.4), (1, 0.8), (1, 1.6), (1, 3.2), (1, 5.0), (1, 5.0), (11, 0.1)):
                child = subprocess.Popen([sys.executable, "-c", "pass"])
                supervisor.workers[child.pid] = workers.Worker(0, child.pid, mock.Mock())
                supervisor.shared.row(0).add("192.0.2.1", 1)
                now[0] += lived
                self.assertEqual(tells(), lived > 10 or supervisor.backoff_s < 5)
                os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
                supervisor.reap()
                child.returncode = 0                    # reaped already
                self.assertAlmostEqual(supervisor.start_at[0] - now[0], expected)
                self.assertEqual(supervisor.shared.row(0).live(), 0)
                self.assertEqual(tells(), expected < 5)

    @unittest.skipUnless(hasattr(os, "fork"), "no fork here")
    def test_what_the_processes_count_together_is_locked_for_all(self):
        supervisor = workers.Supervisor(Config(), [], 1, read_access(Config()))
        locks = supervisor.access[0].logins.lock, supervisor.shared.buckets.lock
        self.assertTrue(all(lock.file for lock in locks))
        supervisor.close()
        self.assertEqual([lock.file for lock in locks], [None, None])

    def test_how_many(self):
        with mock.patch.object(os, "fork", create=True):
            self.assertEqual(workers.number(7), 7)
            for cpus, expected in ((1, 1), (3, 3), (16, 4)):
                with mock.patch.object(os, "sched_getaffinity", lambda _: set(range(cpus)), create=True):
                    self.assertEqual(workers.number(0), expected)
        with mock.patch.object(workers, "os", mock.Mock(spec=[])):
            self.assertEqual((workers.number(0), workers.number(7)), (1, 1), "where there is no fork")
