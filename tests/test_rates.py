"""Rate limits and --max-per-user through real sockets: what flows, over a few seconds and between wide bars."""
import contextlib
import json
import os
import signal
import socket
import threading
import time
import unittest
from functools import partial
from ipaddress import ip_address
from unittest import mock
from urllib.request import urlopen

import socks5
from socks5 import client
from socks5.client import associate
from socks5.protocol.codes import Cmd, Rep
from socks5.protocol.messages import Reply
from socks5.relay import splice
from socks5.relay.limited import limits_of
from socks5.relay.tunnel import Tunnel
from socks5.values import rate, upstream
from tests import realm, support
from tests.support import (
    ask, connect_through, greeted, logging_of, reader_of, run_cli, running, spawned, target, udp_socket, wait_until)

KIB, MIB = 1 << 10, 1 << 20
SECONDS = 1.5
TIMES = 8
BAR = 0.15
ALICE, BOB = (b"alice", b"secret"), (b"bob", b"secret")
USERS = (("alice", "secret"), ("bob", "secret"))


def limited(session):
    return isinstance(session.relay, Tunnel) and session.relay.up.gate is not None


def pour(connection):
    """A target that sends for ever."""
    while True:
        connection.sendall(bytes(1 << 16))


def swallow(connection):
    """A target that reads for ever, and counts in `swallowed`."""
    while True:
        data = connection.recv(1 << 16)
        if not data:
            return
        with lock:
            swallowed[0] += len(data)


lock, swallowed = threading.Lock(), [0]


class Reader(threading.Thread):
    """Reads a tunnel to its end: `total` bytes until now."""

    def __init__(self, sock):
        super().__init__(daemon=True)
        self.sock, self.total = sock, 0
        self.start()

    def run(self):
        with contextlib.suppress(OSError):
            for data in iter(lambda: self.sock.recv(1 << 16), b""):
                self.total += len(data)


class Rated(support.Case):
    def flows(self, count, wanted, bar=BAR):
        """Whether count() grows by so many bytes a second: in one of several times, as what was on its way before, or a
        machine that has no time, does not count. With a bar of 1: by some, and by less than twice as many."""
        found = []
        for _ in range(TIMES):
            began, before = time.monotonic(), count()
            wait_until(lambda: time.monotonic() >= began + SECONDS, "time")
            found.append((count() - before) / (time.monotonic() - began))
            if abs(found[-1] / wanted - 1) < bar:
                return
        self.fail("%s in place of %d bytes a second" % (", ".join("%.0f" % one for one in found), wanted))

    def tunnels(self, port, to, number, user=None):
        return [self.enter(connect_through(port, *to, user=user)) for _ in range(number)]

    def file(self, text):
        path = self.new_folder() / "file"
        path.write_text(text)
        return path

    def readers(self, *args, **kwargs):
        return [Reader(sock) for sock in self.tunnels(*args, **kwargs)]


class Streams(Rated):
    def test_down_and_the_kernel_pipe_stays_in_use(self):
        for text in ("100K", "40M"):
            with self.subTest(text), target(pour) as to, running(rate_per_client=rate(text)) as server:
                speed = rate(text).down.bytes_s
                reader, = self.readers(server.server_address, to, 1)
                self.flows(lambda: reader.total, speed)
                if text == "40M" and splice.available:
                    wait_until(lambda: splice.PIPES.live() == 1, "the kernel pipe is in use")

    def test_up(self):
        swallowed[0] = 0
        with target(swallow) as to, running(rate_per_client=rate("200K/0")) as server:
            sock, = self.tunnels(server.server_address, to, 1)
            threading.Thread(target=pour_quietly, args=(sock,), daemon=True).start()
            self.flows(lambda: swallowed[0], 200 * KIB)

    def test_both_directions_share_one_rate(self):
        with target() as to, running(rate_per_client=rate("200K")) as server:
            sock, = self.tunnels(server.server_address, to, 1)
            reader = Reader(sock)
            threading.Thread(target=pour_quietly, args=(sock,), daemon=True).start()
            self.flows(lambda: reader.total, 100 * KIB)

    def test_two_tunnels_of_a_user_get_half_each_and_another_user_all_of_it(self):
        with target(pour) as to, running(user=USERS, rate_per_user=rate("200K")) as server:
            one, two = self.readers(server.server_address, to, 2, user=ALICE)
            other, = self.readers(server.server_address, to, 1, user=BOB)
            self.flows(lambda: other.total, 200 * KIB)
            self.flows(lambda: one.total + two.total, 200 * KIB)
            before = one.total, two.total
            self.flows(lambda: one.total + two.total, 200 * KIB)
            self.assertAlmostEqual((one.total - before[0]) / (two.total - before[1]), 1, delta=0.3)

    @unittest.skipUnless(hasattr(os, "fork"), "no fork here")
    def test_over_two_processes(self):
        with target(pour) as to, spawned("-u", "alice:secret", "--rate-per-user", "300K", "-w", "2") as server:
            readers = self.readers(server.port, to, 6, user=ALICE)
            self.flows(lambda: sum(reader.total for reader in readers), 300 * KIB)
            self.assertGreater(min(reader.total for reader in readers), 10 * KIB)

    def test_the_rate_of_a_rule_is_each_sessions_own(self):
        with target(pour) as to, target(pour) as free:
            rules = self.file("allow to 127.0.0.1 port %d rate 100K\nallow to any\n" % to[1])
            with running(rules=str(rules)) as server:
                one, two = self.readers(server.server_address, to, 2)
                fast, = self.readers(server.server_address, free, 1)
                self.flows(lambda: one.total, 100 * KIB)
                self.flows(lambda: two.total, 100 * KIB)
                wait_until(lambda: fast.total > 2 * MIB, "no rate there")

    def test_the_rule_of_the_address_that_an_upstream_has_reached(self):
        """Of a name's two addresses, it refuses the first one: only the other one's rule counts."""
        here, nowhere = map(ip_address, ("127.0.0.1", "127.0.0.2"))
        for rated in here, nowhere:
            rules = self.file("allow to %s rate 1M\nallow to any\n" % rated)
            with self.subTest(rated), target() as to, running() as above, running(rules=str(rules), upstream=(
                    upstream("socks5://127.0.0.1:%d" % above.server_address[1]),)) as server:
                known = {b"two.example": [nowhere, here]}
                with mock.patch.object(server.names, "resolve", lambda host, *_: known.get(host, [host])):
                    self.tunnels(server.server_address, ("two.example", to[1]), 1)
                session, = server.sessions
                wait_until(lambda: session.relay, "the tunnel stands")
                self.assertEqual(limits_of(session.relay)[0] != (), rated == here)

    def test_a_bind_for_any_peer_without_an_address(self):
        for before in "allow rate 1M\n", "allow\n":
            rules = self.file(before)
            with self.subTest(before), running(rules=str(rules)) as server, greeted(server.server_address) as sock:
                sock.sendall(bytes([5, Cmd.BIND, 0, 3, 0, 0, 0]))           # the name is empty, and the port 0
                bnd = Reply.parse(reader_of(sock)).bnd
                with socket.create_connection((str(bnd.host), bnd.port)) as peer:
                    self.assertEqual(Reply.parse(reader_of(sock)).rep, Rep.SUCCEEDED)
                    rules.write_text("allow rate 2M\n")
                    self.assertTrue(server.reload())
                    session, = server.sessions
                    wait_until(lambda: limited(session), "the rate holds")
                    sock.sendall(b"ping")
                    self.assertEqual(reader_of(peer)(4), b"ping")
                    peer.sendall(b"pong")
                    self.assertEqual(reader_of(sock)(4), b"pong")

    def test_a_paused_tunnel_is_not_idle(self):
        """At 1 KiB a second four tunnels have a turn every second."""
        with target(pour) as to, running(rate_per_client=rate("1K"), idle_timeout=0.5) as server:
            readers = self.readers(server.server_address, to, 4)
            wait_until(lambda: min(reader.total for reader in readers) >= 1024, "all have had several turns", 60)
            self.assertTrue(all(reader.is_alive() for reader in readers))

    def test_half_close_and_all_that_was_sent_before(self):
        got = []
        done = threading.Event()

        def collect(connection):
            got.append(support.read_to_end(connection))
            connection.sendall(b"thanks" * 1000)
            done.set()

        with target(collect) as to, running(rate_per_client=rate("20K")) as server:
            sock, = self.tunnels(server.server_address, to, 1)
            sock.sendall(bytes(range(250)) * 80)
            sock.shutdown(socket.SHUT_WR)
            self.assertEqual(support.read_to_end(sock), b"thanks" * 1000)
            self.assertTrue(done.is_set())
            self.assertEqual(got, [bytes(range(250)) * 80])

    def test_the_end_of_a_paused_tunnel(self):
        """The remote sends and closes while its bytes wait for their turn: all of it comes, then EOF."""
        with target(lambda connection: connection.sendall(bytes(range(250)) * 80)) as to, \
                running(rate_per_client=rate("20K")) as server:
            sock, = self.tunnels(server.server_address, to, 1)
            self.assertEqual(support.read_to_end(sock), bytes(range(250)) * 80)
            sock.close()
            wait_until(lambda: not len(server.sessions), "the session is over")

    def test_stop_does_not_wait_for_a_paused_tunnel(self):
        with target(pour) as to, running(rate_per_client=rate("1K"), drain_timeout=0) as server:
            reader, = self.readers(server.server_address, to, 1)
            wait_until(lambda: reader.total, "the burst")
        reader.join(support.PATIENCE_S)
        self.assertFalse(reader.is_alive())


class Protected(Rated):
    """Tunnels of GSSAPI clients: plain bytes count, and a principal is a user."""

    def setUp(self):
        realm.need_realm(self)
        made = self.enter(realm.realm())
        made.principal("alice")
        self.enter(mock.patch.dict(os.environ, made.login("alice")))
        self.keytab = str(made.keytab)

    def through(self, to, text):
        server = self.enter(running(gssapi="any", keytab=self.keytab, rate_per_user=rate(text)))
        sock = self.enter(client.connect(server.server_address[:2], to, gssapi=client.Gssapi("rcmd@localhost")))
        sock.settimeout(support.PATIENCE_S)
        return sock, server

    def test_down_and_both_ways(self):
        to, echo = self.enter(target(pour)), self.enter(target())
        for text, bar in ("100K", BAR), ("2M", BAR), ("8M", 1):     # busy, if the machine can encrypt so much
            with self.subTest(text):
                reader = Reader(self.through(to, text)[0])
                self.flows(lambda: reader.total, rate(text).down.bytes_s, bar)
        sock, server = self.through(echo, "200K")
        reader = Reader(sock)
        threading.Thread(target=pour_quietly, args=(sock,), daemon=True).start()
        self.flows(lambda: reader.total, 100 * KIB)
        session, = server.sessions
        self.assertEqual(session.user, b"alice@EXAMPLE.ORG")

    def test_up(self):
        swallowed[0] = 0
        sock, _server = self.through(self.enter(target(swallow)), "200K/0")
        threading.Thread(target=pour_quietly, args=(sock,), daemon=True).start()
        self.flows(lambda: swallowed[0], 200 * KIB)


def pour_quietly(sock):
    with contextlib.suppress(OSError):
        pour(sock)


class Reload(Rated):
    def test_rules_change_the_rates_of_live_sessions(self):
        rules = self.file("allow to any rate 50K\n")
        with target(pour) as to, running(rules=str(rules)) as server:
            reader, = self.readers(server.server_address, to, 1)
            self.flows(lambda: reader.total, 50 * KIB)
            for line, speed in (("allow to any rate 400K", 400 * KIB), ("deny to any", 400 * KIB),
                                ("allow to any", None), ("allow to any rate 100K", 100 * KIB)):
                with self.subTest(line):
                    rules.write_text(line + "\n")
                    self.assertTrue(server.reload())
                    before = reader.total
                    if speed:
                        self.flows(lambda: reader.total, speed)
                    else:
                        wait_until(lambda: reader.total > before + 4 * MIB, "no limit")

    def test_a_reload_while_a_tunnel_is_handed_over(self):
        """Its limits were chosen before, and the loop did not have it when those of all tunnels were changed."""
        rules = self.file("allow to any\n")

        class Reloading(socks5.Server):
            def relay(server, relay):
                rules.write_text("allow to any rate 1M\n")
                changed = threading.Event()
                self.assertTrue(server.reload())
                server.relay_loop().call_soon(changed.set)
                self.assertTrue(changed.wait(support.PATIENCE_S))
                super().relay(relay)

        with target() as to, running(rules=str(rules), server_class=Reloading) as server:
            self.tunnels(server.server_address, to, 1)
            wait_until(lambda: [session for session in server.sessions if limited(session)])

    def test_sighup_reads_the_rates_in_the_ini_file(self):
        support.need(self, hasattr(signal, "SIGHUP"), "SIGHUP")
        ini = self.file("")
        with target(pour) as to:
            for workers in ("1", "2"):
                ini.write_text("[socks5]\nport = 0\n")
                with self.subTest(workers=workers), spawned("--config", ini, "-w", workers) as server:
                    reader, = self.readers(server.port, to, 1)
                    wait_until(lambda: reader.total > 4 * MIB, "no limit")
                    ini.write_text("[socks5]\nport = 0\nrate-per-client = 100K\nidle-timeout = 5\n")
                    server.signal(signal.SIGHUP)
                    server.wait_line("--idle-timeout: its change takes a restart")
                    server.wait_line("reloaded users=0")
                    self.flows(lambda: reader.total, 100 * KIB)
                    ini.write_text("[socks5]\nrate-per-client = fast\n")
                    server.signal(signal.SIGHUP)
                    server.wait_line("not reloaded, .*rate-per-client: 'fast' is not RATE")


class Datagrams(Rated):
    DATAGRAM = bytes(1000)

    def flood(self, sock, to):
        """Send some 500 kB a second in a thread, until the test ends."""
        over = threading.Event()

        def run():
            began, sent = time.monotonic(), 0
            with contextlib.suppress(OSError):
                while not over.wait(0.002):
                    due = int((time.monotonic() - began) * 500)
                    for _ in range(min(due - sent, 50)):            # a thread that comes late makes up for it
                        sock.sendto(self.DATAGRAM, to)
                    sent = due

        self.play(run, over)

    def count(self, sock, receive):
        """How much has come so far, by a function."""
        total, over = [0], threading.Event()
        sock.settimeout(0.2)

        def run():
            while not over.is_set():
                try:
                    total[0] += len(receive()[0])
                except socket.timeout:
                    pass
                except OSError:                             # closed
                    return

        self.play(run, over)
        return lambda: total[0]

    def play(self, run, over):
        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        self.addCleanup(thread.join)
        self.addCleanup(over.set)

    def remote(self):
        return self.enter(udp_socket())

    def test_beyond_the_rate_they_are_dropped_and_counted(self):
        remote = self.remote()
        with logging_of(self) as log, running(rate_per_client=rate("100K/50K")) as server:
            with associate(server.server_address[:2]) as udp:
                udp.sendto(b"x" * 1000, remote.getsockname())
                _, back = remote.recvfrom(2048)
                arrived, answered = self.count(remote, partial(remote.recvfrom, 2048)), self.count(udp, udp.recvfrom)
                self.flood(udp, remote.getsockname())
                self.flood(remote, back)
                self.flows(arrived, 100 * KIB)
                self.flows(answered, 50 * KIB)
                session, = server.sessions
                self.assertGreater(session.relay.losses()["beyond the rate"], 100)
            wait_until(lambda: not len(server.sessions), "the end")
        self.assertRegex(log.output[-1], "UDP_ASSOCIATE .* why='dropped: [0-9]+ beyond the rate")

    def test_the_rate_of_a_rule_is_for_what_it_allows(self):
        slow, fast = self.remote(), self.remote()
        rules = self.file("allow port %d rate 50K\nallow to any\n" % slow.getsockname()[1])
        with running(rules=str(rules)) as server, associate(server.server_address[:2]) as udp:
            slowly, quickly = (self.count(one, partial(one.recvfrom, 2048)) for one in (slow, fast))
            self.flood(udp, ("localhost", slow.getsockname()[1]))
            self.flood(udp, fast.getsockname())
            self.flows(slowly, 50 * KIB)
            before, began = quickly(), time.monotonic()
            wait_until(lambda: quickly() - before > 200 * KIB, "no rate there")
            self.assertLess(time.monotonic() - began, 10)
            rules.write_text("allow to any rate 150K\n")
            self.assertTrue(server.reload())
            self.flows(lambda: slowly() + quickly(), 150 * KIB)

    def test_the_rate_of_a_rule_holds_through_an_upstream(self):
        """By address; and by a name that the upstream resolves, and whose answers come from an address."""
        for host, up, down in (("127.0.0.1", 100, 50), ("localhost", 50, 100)):
            with self.subTest(host), running() as above:
                remote = self.remote()
                port = remote.getsockname()[1]
                rules = self.file("allow to %s port %d rate %dK/%dK\nallow to any\n" % (
                    "any" if host == "127.0.0.1" else host, port, up, down))
                way = upstream("socks5://127.0.0.1:%d" % above.server_address[1])
                with running(rules=str(rules), upstream=(way,)) as server, associate(server.server_address[:2]) as udp:
                    udp.sendto(b"x" * 1000, (host, port))
                    _, back = remote.recvfrom(2048)
                    arrived = self.count(remote, partial(remote.recvfrom, 2048))
                    answered = self.count(udp, udp.recvfrom)
                    self.flood(udp, (host, port))
                    self.flood(remote, back)
                    self.flows(arrived, up * KIB)
                    self.flows(answered, down * KIB)
                    session, = server.sessions
                    self.assertGreater(session.relay.losses()["beyond the rate"], 100)


class PerUser(Rated):
    def test_a_limit_over_all_processes(self):
        with target() as to, spawned("-u", "alice:secret", "-u", "bob:secret", "--max-per-user", "3", "-w",
                                     "2") as server:
            kept = self.tunnels(server.port, to, 3, ALICE)
            for _ in range(8):                              # whichever process it is
                self.assertEqual(self.rep(server.port, to, ALICE), Rep.NOT_ALLOWED)
            self.assertEqual(self.rep(server.port, to, BOB), Rep.SUCCEEDED)
            server.wait_line("user='alice' cmd=CONNECT .*rep=NOT_ALLOWED .*ended=refused why='max-per-user 3 reached'")
            kept[0].close()
            wait_until(lambda: self.rep(server.port, to, ALICE) == Rep.SUCCEEDED, "a place is free")

    @unittest.skipUnless(hasattr(os, "fork"), "no fork here")
    def test_of_a_dead_process_nothing_is_counted(self):
        with target() as to, spawned("-u", "alice:secret", "--max-per-user", "1", "-w", "2") as server:
            self.tunnels(server.port, to, 1, ALICE)
            for pid in support.children(server.process.pid):
                os.kill(pid, signal.SIGKILL)
            server.wait_line("worker_died .*sessions=1")
            wait_until(lambda: self.rep(server.port, to, ALICE) == Rep.SUCCEEDED, "a place is free")

    def test_a_client_without_a_name_has_no_limit(self):
        with target() as to, running(max_per_user=1) as server:
            self.tunnels(server.server_address, to, 3)

    def test_a_reload_changes_it(self):
        ini = self.file("[socks5]\nmax-per-user = 1\n")
        with target() as to, spawned("--config", ini, "-u", "alice:secret") as server:
            self.tunnels(server.port, to, 1, ALICE)
            self.assertEqual(self.rep(server.port, to, ALICE), Rep.NOT_ALLOWED)
            ini.write_text("[socks5]\nmax-per-user = 2\n")
            server.signal(signal.SIGHUP)
            server.wait_line("reloaded")
            self.assertEqual(self.rep(server.port, to, ALICE), Rep.SUCCEEDED)

    def rep(self, port, to, user):
        try:
            with greeted(port, user) as sock:
                return ask(sock, Cmd.CONNECT, *to).rep
        except (OSError, EOFError):                         # of a process that dies
            return None


class Said(Rated):
    def test_bad_values_are_one_clear_line(self):
        rules = self.file("")
        for line, args, words in (("", ("--rate-per-user", "2T"), "--rate-per-user: '2T' is not RATE"),
                                  ("", ("--max-per-user", "-1"), "--max-per-user: '-1' is not a whole number"),
                                  ("allow rate 1", ("--rules", rules), "%s:1: '1' is out of range" % rules),
                                  ("deny rate 1M", ("--rules", rules), "%s:1: 'rate' belongs to an allow" % rules)):
            with self.subTest(words):
                rules.write_text(line + "\n")
                self.check_refused(run_cli("--check", *args), "socks5-server: " + words)

    def test_check_says_the_limits(self):
        status, out, err = run_cli("--check", "--max-per-client", "9", "--rate-per-client", "1K/0", "--max-per-user",
                                   "2", "--rate-per-user", "2M")
        self.assertEqual((status, err), (0, ""))
        for line in ("sessions of one client: 9", "sessions of one user: 2",
                     "bytes a second of one client: 1024 up, any number down",
                     "bytes a second of one user: 2097152 up and down together",
                     "warning: no client has to log in, so the limits of users do not hold"):
            self.assertIn(line, out.splitlines())

    def test_status_and_metrics_show_which_limit_holds_a_session_back(self):
        with target(pour) as to, spawned("-u", "alice:secret", "--rate-per-user", "50K", "--status",
                                         "127.0.0.1:0", "-w", "2") as server:
            page = server.wait_line(r"status on (http://\S+)", server.lines).group(1)
            self.readers(server.port, to, 1, user=ALICE)
            wait_until(lambda: 'socks5_sessions_held_back{limit="rate-per-user"} 1\n' in get(page + "metrics").decode(),
                       "held back")
            self.assertIn('socks5_sessions_held_back{limit="rule"} 0\n', get(page + "metrics").decode())
            session, = json.loads(get(page + "sessions"))["sessions"]
            self.assertEqual((session["state"], session["held_back"]), ("relaying", "rate-per-user"))
            self.assertEqual(json.loads(get(page + "summary"))["held_back"],
                             {"rate-per-client": 0, "rate-per-user": 1, "rule": 0})


def get(url):
    with urlopen(url, timeout=support.PATIENCE_S) as answer:
        return answer.read()
