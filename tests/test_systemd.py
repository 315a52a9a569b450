"""process/systemd.py and identity.py: sockets that systemd has opened, what it is told, and giving up root."""
import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
from functools import partial
from pathlib import Path
from unittest import mock

from socks5.config import ConfigError
from socks5.net import listeners
from socks5.process import identity, systemd
from tests import support
from tests.support import (
    PATIENCE_S, ROOT, Spawned, children, connect_through, dial, echoes, need, need_program, negotiate, readme_block,
    run_cli, run_python, spawned, target, wait_until)

# Opens a socket as systemd does, and becomes the program of its arguments.
ACTIVATE = """
import os, socket, sys
sock = socket.socket(*map(int, sys.argv[1].split(",")))
if sock.family == socket.AF_INET:
    sock.bind(("127.0.0.1", 0))
if sock.type == socket.SOCK_STREAM and sys.argv[2] == "listen":
    sock.listen()
if sock.fileno() != 3:
    os.dup2(sock.fileno(), 3)
os.set_inheritable(3, True)
os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS="1", LISTEN_FDNAMES="socks5.socket")
os.execv(sys.argv[3], sys.argv[3:])
"""
# Opens a socket, and starts the program twice with it, one after the other.
RESTART = """
import os, socket, sys
sock = socket.create_server(("127.0.0.1", 0))
if sock.fileno() != 3:
    os.dup2(sock.fileno(), 3)
os.set_inheritable(3, True)
for _ in range(2):
    child = os.fork()
    if not child:
        os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS="1")
        os.execv(sys.argv[1], sys.argv[1:])
    os.waitpid(child, 0)
"""
SOCKET_UNIT = readme_block("ini", "[Socket]")
SERVICE_UNIT = readme_block("ini", "[Service]")


def listening_on(pid, port):
    """Whether the process has a descriptor of the socket that listens there."""
    with open("/proc/net/tcp") as lines:
        inodes = {fields[9] for fields in map(str.split, lines)
                  if fields[1] == "0100007F:%04X" % port and fields[3] == "0A"}         # LISTEN, in net/tcp_states.h
    links = []
    with contextlib.suppress(OSError):                      # it has ended
        for fd in os.listdir("/proc/%d/fd" % pid):
            with contextlib.suppress(OSError):
                links.append(os.readlink("/proc/%d/fd/%s" % (pid, fd)))
    return any("socket:[%s]" % inode in links for inode in inodes)


class Case(support.Case):
    def setUp(self):
        self.folder = self.new_folder()

    def works(self, server):
        with target() as echo, connect_through(server.port, *echo) as sock:
            self.assertTrue(echoes(sock))


class Activation(Case):
    def activated(self, *args, kind=(socket.AF_INET, socket.SOCK_STREAM), how="listen"):
        server = Spawned(*args, prefix=(sys.executable, "-c", ACTIVATE, "%d,%d" % kind, how))
        self.addCleanup(server.end, signal.SIGKILL)
        return server

    def test_a_socket_that_is_passed_is_served(self):
        need(self, os.name == "posix", "fork and exec")
        for workers in "1", "2":
            with self.subTest(workers=workers):
                server = self.activated("-w", workers)
                self.works(server)
                self.assertEqual(server.end(), 0, server.log)

    def test_a_client_while_it_stops_waits_for_the_next_server(self):
        """The queue is systemd's, too: a restart resets no connection in it."""
        need(self, hasattr(os, "fork"), "fork")
        for workers in "1", "2":
            with self.subTest(workers=workers), target() as echo, contextlib.ExitStack() as stack:
                manager = Spawned("-w", workers, prefix=(sys.executable, "-c", RESTART))
                stack.callback(manager.end, signal.SIGKILL)
                port = manager.port
                first, = children(manager.process.pid)
                stack.callback(self.end_children, manager)
                # Only now: the supervisor says that it listens before it has forked the first worker.
                wait_until(lambda: len(children(first)) == (0 if workers == "1" else 2), "its workers")
                serving = [first, *children(first)]
                self.assertTrue(all(listening_on(pid, port) for pid in serving))
                live = stack.enter_context(connect_through(port, *echo))
                os.kill(first, signal.SIGTERM)
                wait_until(lambda: not any(listening_on(pid, port) for pid in serving), "it listens no more")
                waiting = [stack.enter_context(dial(port)) for _ in range(5)]
                live.close()
                for client in waiting:
                    negotiate(client)
                self.assertNotEqual(children(manager.process.pid), [first])

    def end_children(self, manager):
        """End the servers that the manager starts, one after the other; then it ends by itself. After a failure, the
        first server may still run, and the second one only starts when it has ended."""
        told = set()

        def ended():
            if manager.process.poll() is not None:
                return True
            for pid in set(children(manager.process.pid)) - told:
                told.add(pid)
                with contextlib.suppress(ProcessLookupError):           # it has ended meanwhile
                    os.kill(pid, signal.SIGTERM)
            return False

        wait_until(ended, "all servers have ended")

    def test_a_socket_of_no_use(self):
        need(self, os.name == "posix", "fork and exec")
        for kind, how in (((socket.AF_INET, socket.SOCK_STREAM), "no"), ((socket.AF_INET, socket.SOCK_DGRAM), "no"),
                          ((socket.AF_UNIX, socket.SOCK_STREAM), "no")):
            with self.subTest(kind):
                server = self.activated(kind=kind, how=how)
                self.assertEqual((server.process.wait(PATIENCE_S), server.end()), (2, 2))
                self.assertEqual(len(server.log), 1)
                self.assertIn("LISTEN_FDS: descriptor 3: not a TCP socket that listens", server.log[0])

    def test_addresses_beside_it(self):
        need(self, os.name == "posix", "fork and exec")
        server = self.activated("-p", "1080")
        self.assertEqual((server.process.wait(PATIENCE_S), server.end()), (2, 2))
        self.assertIn("--port: systemd has opened the sockets", server.log[0])

    def test_variables(self):
        for pid, number in ((str(os.getpid() + 1), "1"), ("", "1"), (str(os.getpid()), "0")):
            environ = {"LISTEN_PID": pid, "LISTEN_FDS": number, "HOME": "/"}
            self.assertEqual(systemd.passed_sockets(environ), [])
            self.assertEqual(environ, {"HOME": "/"})
        for number in ("", "x", "-1", "1025", "\u0665x"):
            with self.assertRaises(ConfigError):
                systemd.passed_sockets({"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": number})

    def test_a_passed_socket_beyond_loopback_needs_users(self):
        """The addresses of the sockets are those that the options would have given."""
        with contextlib.closing(listeners.open_all(["0.0.0.0"], 0)[0]) as sock:
            from socks5 import cli
            with self.assertRaises(ConfigError) as caught:
                cli.read_config({}, [sock])
            self.assertIn("--listen 0.0.0.0: every client", str(caught.exception))


class Notified(Case):
    def setUp(self):
        super().setUp()
        need(self, hasattr(socket, "AF_UNIX"), "AF_UNIX")
        self.sock = self.enter(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
        self.sock.settimeout(PATIENCE_S)

    def hear(self, but=b"WATCHDOG=1"):
        while True:
            said = self.sock.recv(4096)
            if said != but:
                return said.decode().split("\n")

    def test_from_start_to_stop(self):
        path = self.folder / "notify"
        self.sock.bind(str(path))
        rules = self.folder / "rules"
        for workers in "1", "2":
            with self.subTest(workers=workers):
                rules.write_text("allow from 127.0.0.0/8\n")
                with spawned("-w", workers, "--rules", rules, "--drain-timeout", "60",
                             env={"NOTIFY_SOCKET": str(path)}) as server:
                    self.assertEqual(self.hear(), ["READY=1", "STATUS=serving"])
                    for text, status in (("allow\n", "STATUS=serving"),
                                         ("nonsense\n", "STATUS=serving; not reloaded: ")):
                        rules.write_text(text)
                        server.signal(signal.SIGHUP)
                        first = self.hear()
                        self.assertEqual((first[0], first[1][:15]), ("RELOADING=1", "MONOTONIC_USEC="))
                        self.assertTrue(first[1][15:].isdecimal())
                        ready = self.hear()
                        self.assertEqual((ready[0], ready[1][:len(status)]), ("READY=1", status))
                    self.works(server)
                    server.signal(signal.SIGTERM)
                    said = self.hear()
                    self.assertEqual(said[::2], ["STOPPING=1", "STATUS=draining"])
                    name, _, usec = said[1].partition("=")
                    self.assertEqual(name, "EXTEND_TIMEOUT_USEC", "or TimeoutStopSec= of the unit ends the draining")
                    self.assertGreater(int(usec), 60e6)
                    self.assertEqual(server.end(), 0)

    def test_watchdog_over_an_abstract_socket(self):
        need(self, sys.platform.startswith("linux"), "abstract sockets")
        name = "socks5-test-%d" % os.getpid()
        self.sock.bind("\0" + name)
        for workers in "1", "2":
            with self.subTest(workers=workers):
                with spawned("-w", workers, env={"NOTIFY_SOCKET": "@" + name, "WATCHDOG_USEC": "100000"}):
                    self.assertEqual(self.hear()[0], "READY=1")
                    for _ in range(3):
                        self.assertEqual(self.hear(but=None), ["WATCHDOG=1"])

    def test_no_systemd_listens(self):
        for address in ("/no/such/socket", "relative", "@", ""):
            notifier = systemd.Notifier({"NOTIFY_SOCKET": address, "WATCHDOG_USEC": "x"})
            notifier.ready("serving")
            self.assertEqual(notifier.watchdog_s, 0)
            notifier.close()

    def test_how_often_the_watchdog_is_told(self):
        """Twice as often as systemd asks for; never, where it asks another process."""
        there = {"NOTIFY_SOCKET": "@x", "WATCHDOG_USEC": "3000000"}
        for seconds, environ in ((1.5, there), (0, {"WATCHDOG_USEC": "3000000"}), (0, {**there, "WATCHDOG_PID": "1"})):
            notifier = systemd.Notifier(environ)
            self.addCleanup(notifier.close)
            self.assertEqual(notifier.watchdog_s, seconds)


class RunAs(Case):
    def need_root(self):
        need(self, hasattr(os, "geteuid") and os.geteuid() == 0, "root")

    def ids(self, pid):
        text = Path("/proc/%s/status" % pid).read_text()
        return {key: set(re.search(r"^%s:(.*)$" % key, text, re.M).group(1).split()) for key in ("Uid", "Gid", "Groups",
                                                                                                 "CapPrm", "CapEff")}

    def test_no_way_back(self):
        self.need_root()
        processes = 3 if hasattr(os, "fork") else 1
        os.chmod(str(self.folder), 0o755)
        rules = self.folder / "rules"
        rules.write_text("allow from 127.0.0.0/8\n")
        with spawned("--run-as", "65534:65534", "--rules", rules, "-w", "2",
                     preexec_fn=partial(os.setgroups, [4, 24])) as server:
            def pids():
                children = Path("/proc/%d/task/%d/children" % ((server.process.pid,) * 2)).read_text().split()
                return [str(server.process.pid), *children]
            wait_until(lambda: len(pids()) == processes)
            for pid in pids():
                found = self.ids(pid)
                self.assertEqual((found["Uid"], found["Gid"], found["Groups"]), ({"65534"}, {"65534"}, set()))
                self.assertEqual((found["CapPrm"], found["CapEff"]), ({"0" * 16}, {"0" * 16}))
            self.works(server)
            server.signal(signal.SIGHUP)
            server.wait_line("reloaded users=0 rules=1")
            rules.chmod(0o600)
            server.signal(signal.SIGHUP)
            server.wait_line("not reloaded, users and rules stay as they were: .*rules.*Permission denied")
            self.works(server)
            self.assertEqual(server.end(), 0)

    def test_files_that_cannot_be_read_again_are_named(self):
        self.need_root()
        rules = self.folder / "rules"
        rules.write_text("allow from 127.0.0.0/8\n")
        rules.chmod(0o600)
        with spawned("--run-as", "65534:65534", "--rules", rules) as server:
            server.wait_line("WARNING --run-as 65534:65534: SIGHUP will not be able to read --rules .*Permission")
            self.works(server)

    def test_errors(self):
        self.need_root()
        for text, words in (("no-such-user", "there is no user no-such-user"), ("daemon:no-such", "no group no-such"),
                            ("root", "must not be root's"), ("daemon:root", "must not be root's"),
                            ("4000000000", "there is no user"), ("9" * 30, "there is no user")):
            with self.subTest(text):
                self.check_refused(run_cli("-p", "0", "--run-as", text), "--run-as %s: " % text, words)

    def test_only_root_may(self):
        self.need_root()
        probe = "from socks5.process import identity\nidentity.become(identity.look_up('65534:65534'))\n" \
            "identity.look_up('65534')"
        self.assertIn("--run-as 65534: only root may become another user", run_python("-c", probe)[2])

    def test_where_there_are_no_users(self):
        self.enter(mock.patch.object(identity, "pwd", None))
        self.assertRaises(ConfigError, identity.look_up, "daemon")


class Units(Case):
    def analyze(self, *args):
        program = need_program(self, "systemd-analyze")
        return subprocess.run([program, *map(str, args)], capture_output=True, text=True, timeout=PATIENCE_S)

    def units(self):
        """The service as it stands in README.rst, and without a user of its own, as a comment there says."""
        user, dynamic = "User=socks5\n", re.search(r"(DynamicUser=\S+) and (LoadCredential=\S+)\. ", SERVICE_UNIT)
        self.assertIn(user, SERVICE_UNIT)
        service = self.folder / "socks5.service"
        (self.folder / "socks5.socket").write_text(SOCKET_UNIT)
        for name, text in (("User", SERVICE_UNIT),
                           ("DynamicUser", SERVICE_UNIT.replace(user, "\n".join(dynamic.groups()) + "\n"))):
            service.write_text(text.replace("/usr/bin/python3", sys.executable))
            yield name, service

    def test_verify(self):
        for name, service in self.units():
            done = self.analyze("verify", "--man=no", service, self.folder / "socks5.socket")
            with self.subTest(name):
                ours = [line for line in done.stderr.splitlines() if "socks5" in line]
                self.assertEqual((done.returncode, ours), (0, []), done.stderr)

    def test_exposure(self):
        for name, service in self.units():
            done = self.analyze("security", "--offline=true", service)
            with self.subTest(name):
                found = re.search(r"Overall exposure level for \S+: ([0-9.]+)", done.stdout)
                self.assertTrue(found, done.stdout + done.stderr)
                self.assertLess(float(found.group(1)), 2.0, done.stdout)

    def test_the_filter_lets_every_call_of_ours_pass(self):
        """systemd kills the process that makes a call which is filtered out, unless the unit names an error."""
        self.assertIn("SystemCallErrorNumber=EPERM\n", SERVICE_UNIT)
        # --run-as and --set-password, which are for root, take more: they are left out below.
        denied, allowed = set(), set()
        for words in re.findall(r"(?m)^SystemCallFilter=(.*)$", SERVICE_UNIT):
            names = [name for word in words.lstrip("~").split() for name in self.calls(word)]
            (denied.update if words.startswith("~") else allowed.update)(names)
            (allowed if words.startswith("~") else denied).difference_update(names)
        source = "".join(path.read_text() for path in (ROOT / "socks5").rglob("*.py")
                         if path.parts[-2:] not in (("process", "identity.py"), ("access", "files.py")))
        ours = {name for name in denied | allowed if re.search(r"\.%s\(" % name, source)}
        self.assertLessEqual({"sched_setaffinity", "setrlimit"}, ours, "this looks at nothing")
        self.assertEqual(ours & denied, set())

    def calls(self, word):
        """The system calls that a name or an @group stands for."""
        if not word.startswith("@"):
            return [word]
        lines = [line.strip() for line in self.analyze("syscall-filter", word).stdout.splitlines()[1:]]
        return [name for line in lines if line and not line.startswith("#") for name in self.calls(line)]
