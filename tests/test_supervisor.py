"""workers: several processes on the same listeners, one supervisor, real signals."""
import contextlib
import os
import signal
import socket
import sys
import tempfile
import threading
import time
import unittest

from socks5.access import throttle
from socks5.access.passwords import Hash
from socks5.net import listeners as listening

from socks5.process import renewal, supervisor as workers
from socks5.protocol.codes import Cmd, Rep
from socks5.config import Config
from tests.support import (
    PATIENCE_S, ask, connect_through, dial, need, negotiate, read_to_end, reader_of, spawned, target, threads,
    wait_until)

ANYBODY = b"\x05\x01\x00"


def children(pid):
    with open("/proc/%d/task/%d/children" % (pid, pid)) as file:
        return list(map(int, file.read().split()))


def echoes(tunnel):
    tunnel.sendall(b"ping")
    return reader_of(tunnel)(4) == b"ping"


@unittest.skipUnless(hasattr(os, "fork"), "this system has no fork")
class Channel(unittest.TestCase):
    """The socket between a worker and its supervisor, of which nobody reads the other end."""

    def setUp(self):
        self.ours, self.theirs = socket.socketpair()
        self.addCleanup(self.ours.close)
        self.addCleanup(self.theirs.close)
        self.theirs.settimeout(0.2)

    def full(self, say):
        """Whether saying it 10,000 times comes to an end, and something of it arrived."""
        talking = threading.Thread(target=lambda: [say() for _ in range(10000)], daemon=True)
        talking.start()
        talking.join(PATIENCE_S)
        return not talking.is_alive() and len(self.theirs.recv(100)) == 100

    def test_news_never_waits(self):
        self.assertTrue(self.full(lambda: workers.Worker(0, 0, self.ours).tell(b"[]\n")))

    def test_a_line_that_was_cut_short_costs_that_line_only(self):
        heard = threading.Event()

        class Server:
            reload_soon = staticmethod(heard.set)
            stop = staticmethod(lambda: None)

        self.theirs.sendall(b'["throt["stop"]\n["reload"]\n')
        self.theirs.shutdown(socket.SHUT_WR)
        workers.obey(Server(), self.ours, threading.Event())
        self.assertTrue(heard.is_set())


@unittest.skipUnless(hasattr(os, "fork"), "this system has no fork")
class Processes(unittest.TestCase):
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
        with target() as echo, self.crew("--max-sessions", "40") as (server, pids), contextlib.ExitStack() as stack:
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
                more.sendall(ANYBODY)
                with contextlib.suppress(ConnectionResetError):
                    self.assertEqual(read_to_end(more), b"")

    def test_a_worker_that_had_a_crowd_makes_way_for_a_fresh_one(self):
        listening.raise_descriptor_limit()
        with contextlib.ExitStack() as stack, self.crew(count=2) as (server, pids):
            far = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
            with contextlib.ExitStack() as crowd:
                for _ in range(2 * renewal.CROWD):              # one of the two has half of them, or more
                    crowd.enter_context(connect_through(server.port, *far.getsockname()))
                    crowd.enter_context(far.accept()[0])
            renewed = server.wait_line(r"worker_renewed pid=(\d+)")
            self.assertIn(int(renewed.group(1)), pids)
            wait_until(lambda: len(children(server.process.pid)) == 2, "two workers")
            echo = stack.enter_context(target())
            tunnels = [stack.enter_context(connect_through(server.port, *echo)) for _ in range(10)]
            self.assertTrue(all(map(echoes, tunnels)))
            self.assertFalse([line for line in server.log if "worker_died" in line])

    def test_guessing_is_throttled_over_all_workers_and_their_replacements(self):
        with self.crew("-u", "bob:right", "--handshake-timeout", "1") as (server, _pids):
            begun = time.monotonic()
            for turn in range(2):
                with contextlib.ExitStack() as stack:
                    clients = [stack.enter_context(dial(server.port)) for _ in range(40)]
                    for number, client in enumerate(clients):
                        client.sendall(b"\x05\x01\x02\x01\x03bob\x02" + bytes([65 + turn, 65 + number]))
                    for client in clients:
                        with contextlib.suppress(OSError):
                            read_to_end(client)
                self.replace_all(server)
            looked = sum("auth_failed" in line for line in server.log)
            most = throttle.BURST + 1 + (time.monotonic() - begun) / throttle.INTERVAL_S
            self.assertTrue(throttle.BURST <= looked <= most, (looked, most))

    def test_a_password_is_known_to_all_workers_and_their_replacements(self):
        """And after a reload: one slow check is enough, as the CPU time of the workers shows."""
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "users")
            slow = Hash.of(b"right", "pbkdf2", (800000,))           # some tenths of a second
            with open(path, "w", encoding="ascii") as file:
                file.write("bob:%s\n" % slow)
            with self.crew("--users", path, count=2) as (server, _pids):
                begun = time.process_time()
                slow.matches(b"right")
                cost = time.process_time() - begun
                for turn in range(3):
                    for _ in range(10):
                        with dial(server.port) as sock:
                            negotiate(sock, (b"bob", b"right"))
                    pids = children(server.process.pid)
                    used = sum(map(cpu_seconds, pids))
                    self.assertLess(used, 2 * cost if turn == 0 else cost, turn)
                    if turn == 0:
                        self.replace_all(server)
                    elif turn == 1:
                        server.signal(signal.SIGHUP)
                        wait_until(lambda: sum(" reloaded " in line for line in server.log) == 2, "both have read it")

    def test_a_fresh_worker_has_the_rules_in_force_whatever_is_in_the_file(self):
        with tempfile.TemporaryDirectory() as folder, target() as echo:
            path = os.path.join(folder, "rules")

            def write(text):
                with open(path, "w", encoding="ascii") as file:
                    file.write(text)

            write("allow to any")
            with self.crew("--rules", path, count=2) as (server, _pids):
                write("no rule at all")
                self.replace_all(server)
                server.signal(signal.SIGHUP)
                wait_until(lambda: sum("not reloaded" in line for line in server.log) == 2, "both say no")
                self.replace_all(server)
                with connect_through(server.port, *echo) as tunnel:
                    self.assertTrue(echoes(tunnel))
                write("deny to any")
                server.signal(signal.SIGHUP)
                wait_until(lambda: sum(" reloaded " in line for line in server.log) == 2, "both have read it")
                write("no rule at all")
                self.replace_all(server)
                with dial(server.port) as sock:
                    negotiate(sock)
                    self.assertEqual(ask(sock, Cmd.CONNECT, *echo).rep, Rep.NOT_ALLOWED)

    def test_max_sessions_holds_over_all(self):
        with target() as echo, self.crew("--max-sessions", "10") as (server, _pids), contextlib.ExitStack() as stack:
            for _ in range(10):
                stack.enter_context(connect_through(server.port, *echo))
            for _ in range(6):
                with dial(server.port) as more:
                    more.sendall(ANYBODY)
                    with contextlib.suppress(ConnectionResetError):
                        self.assertEqual(read_to_end(more), b"")

    def test_max_per_client_holds_over_all(self):
        with target() as echo, self.crew("--max-per-client", "5") as (server, _pids), contextlib.ExitStack() as stack:
            for _ in range(5):
                stack.enter_context(connect_through(server.port, *echo))
            for _ in range(6):
                with dial(server.port) as more:
                    more.sendall(ANYBODY)
                    with contextlib.suppress(ConnectionResetError):
                        self.assertEqual(read_to_end(more), b"")
            with socket.create_connection(("127.0.0.1", server.port), 20, ("127.0.0.9", 0)) as other:
                other.sendall(ANYBODY)
                self.assertEqual(reader_of(other)(2), b"\x05\x00")

    def test_sigterm_drains_and_a_tunnel_may_finish(self):
        with target() as echo, self.crew("--drain-timeout", "20") as (server, _pids):
            with connect_through(server.port, *echo) as tunnel:
                port = server.port
                server.signal(signal.SIGTERM)
                wait_until(lambda: refuses(port), "nobody listens")
                self.assertTrue(echoes(tunnel))
            self.assertEqual(server.process.wait(20), 0)

    def test_a_signal_to_the_whole_group_is_one_signal(self):
        """As Ctrl-C in a terminal: the workers leave it to the supervisor, or it would count as a second one."""
        with target() as echo, self.crew("--drain-timeout", "20", preexec_fn=os.setsid) as (server, _pids):
            with connect_through(server.port, *echo) as tunnel:
                port = server.port
                os.killpg(server.process.pid, signal.SIGINT)
                wait_until(lambda: refuses(port), "nobody listens")
                self.assertTrue(echoes(tunnel))
            self.assertEqual(server.process.wait(20), 0)

    def test_a_second_signal_ends_it_at_once(self):
        with target() as echo, self.crew("--drain-timeout", "600") as (server, _pids):
            with connect_through(server.port, *echo) as tunnel:
                port = server.port
                server.signal(signal.SIGTERM)
                wait_until(lambda: refuses(port), "nobody listens")
                server.signal(signal.SIGTERM)
                with self.assertRaises(ConnectionResetError):
                    tunnel.recv(1)
            self.assertEqual(server.process.wait(20), 0)

    def test_workers_end_with_a_supervisor_that_was_killed(self):
        with target() as echo, self.crew() as (server, pids):
            with connect_through(server.port, *echo) as tunnel:
                self.assertTrue(echoes(tunnel))
                port = server.port
                server.process.kill()
                server.process.wait(20)
                wait_until(lambda: not any(map(alive, pids)), "no worker left")
            with spawned("-w", "2", "-p", str(port)) as again:
                self.assertEqual(again.port, port)

    def test_reload_reaches_all(self):
        with self.crew() as (server, _pids):
            server.signal(signal.SIGHUP)
            wait_until(lambda: sum(" reloaded " in line for line in server.log) == 3, "three lines")

    def test_a_worker_that_keeps_dying_is_not_restarted_without_rest(self):
        with self.crew(count=2) as (server, _pids):
            for _ in range(3):
                before = len([line for line in server.log if "worker_died" in line])
                wait_until(lambda: len(children(server.process.pid)) == 2, "two workers")
                os.kill(children(server.process.pid)[0], signal.SIGKILL)
                wait_until(lambda: len([line for line in server.log if "worker_died" in line]) == before + 1, "line")
            wait_until(lambda: len(children(server.process.pid)) == 2, "two workers")


def links(pid):
    found = []
    for fd in os.listdir("/proc/%d/fd" % pid):
        with contextlib.suppress(OSError):
            found.append(os.readlink("/proc/%d/fd/%s" % (pid, fd)))
    return [link for link in found if link.startswith("socket:")]


def cpu_seconds(pid):
    with open("/proc/%d/stat" % pid) as file:
        return sum(map(int, file.read().rpartition(")")[2].split()[11:13])) / os.sysconf("SC_CLK_TCK")


def alive(pid):
    try:
        with open("/proc/%d/stat" % pid) as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def refuses(port):
    try:
        socket.create_connection(("127.0.0.1", port), 5).close()
        return False
    except ConnectionRefusedError:
        return True
    except OSError:
        return False


class Parts(unittest.TestCase):
    def test_the_switch_interval_grows_with_a_crowd(self):
        before = sys.getswitchinterval()
        self.addCleanup(sys.setswitchinterval, before)
        seen = []

        class Server:
            config, chores, sessions = Config(), [], []
            drain = staticmethod(lambda _timeout_s, _hurry: 0)

            def serve_forever(self):
                for sessions in (100, 5000, 1):
                    self.sessions = range(sessions)
                    self.chores[0]()
                    seen.append(sys.getswitchinterval())

        workers.run(Server(), threading.Event())
        for found, expected in zip(seen, (before, 0.1, before)):
            self.assertAlmostEqual(found, expected, 4)

    def test_how_it_died(self):
        self.assertEqual(workers.how_it_died(9), "signal-9")
        self.assertEqual(workers.how_it_died(1 << 8), "exit-1")

    def test_how_many(self):
        self.assertEqual(workers.number(7), 7)
        self.assertIn(workers.number(0), range(1, workers.MOST_BY_DEFAULT + 1))

    def test_lines_come_whole(self):
        ours, theirs = socket.socketpair()
        with ours, theirs:
            worker = workers.Worker(0, 1, ours)
            theirs.sendall(b'["a"]\n["b"')
            self.assertEqual(worker.lines(), [b'["a"]\n'])
            theirs.sendall(b"]\n")
            self.assertEqual(worker.lines(), [b'["b"]\n'])
            theirs.close()
            self.assertEqual(worker.lines(), [])
            worker.tell(b"nobody hears it")                     # must not raise
        self.assertIsNotNone(threading.current_thread())


if __name__ == "__main__":
    unittest.main()
