"""sessions.py: caps, who goes when there is no room, deadlines; alone, and in the server."""
import contextlib
import select
import socket
import threading
import time
import unittest
from ipaddress import ip_address, ip_network
from unittest import mock

from socks5.server import sessions
from socks5.protocol.codes import Cmd, Rep
from socks5.server.counters import Shared
from socks5.relay.tunnel import Tunnel
from socks5.server.sessions import Full, Session, Sessions
from socks5.net.addresses import Endpoint
from socks5.protocol.messages import Address
from tests.support import (HAS_IPV6, PATIENCE_S, ask, connect_through, dial, negotiate, reader_of, running,
                           target, wait_until)


def closed(client):
    """Whether the server has closed it, by FIN or RST."""
    try:
        return client.recv(1) == b""
    except ConnectionError:
        return True


def gone(clients):
    """How many of them the server has closed."""
    poll = select.poll()
    for client in clients:
        poll.register(client, select.POLLIN)
    return len(poll.poll(0))


class Case(unittest.TestCase):
    """Sessions over socket pairs, by a clock of our own."""

    def setUp(self):
        self.now = 100.0
        for patch in (mock.patch.object(sessions, "monotonic", lambda: self.now),):
            patch.start()
            self.addCleanup(patch.stop)
        self.stack = contextlib.ExitStack()
        self.addCleanup(self.stack.close)
        self.far = {}

    def admit(self, live, host="192.0.2.1", origin=None):
        mine, far = map(self.stack.enter_context, socket.socketpair())
        session = live.admit(mine, Endpoint(ip_address(host), 1), origin)
        far.setblocking(False)
        self.far[session] = far
        return session

    def shut(self, session):
        """Whether it was shut down."""
        try:
            return self.far[session].recv(1) == b""
        except BlockingIOError:
            return False


class Caps(Case):
    def test_most(self):
        live = Sessions(2, 10)
        first, _ = self.admit(live), self.admit(live)
        with self.assertRaisesRegex(Full, "^max-sessions 2 reached$"):
            self.admit(live)
        live.remove(first.sock)
        self.admit(live)
        self.assertEqual(len(live), 2)

    def test_most_per_origin(self):
        live = Sessions(100, 10, most_per_origin=2)
        first, _ = self.admit(live), self.admit(live)
        with self.assertRaisesRegex(Full, r"^max-per-client 2 reached by 192\.0\.2\.1$"):
            self.admit(live)
        self.admit(live, "192.0.2.2")
        live.negotiated(first)
        self.assertRaises(Full, self.admit, live)
        live.remove(first.sock)
        self.admit(live)

    def test_an_origin_is_what_the_caller_says(self):
        live = Sessions(100, 10, most_per_origin=1)
        net = ip_network("2001:db8::/64")
        self.admit(live, "2001:db8::1", net)
        self.assertRaisesRegex(Full, "reached by 2001:db8::/64", self.admit, live, "2001:db8::2", net)

    def test_who_negotiates_longest_where_most_do_goes(self):
        live = Sessions(100, 10, most_negotiating=4)
        done = self.admit(live, "192.0.2.1")
        live.negotiated(done)
        other = self.admit(live, "192.0.2.2")
        silent = [self.admit(live, "192.0.2.1") for _ in range(3)]
        self.now += 5
        new = self.admit(live, "192.0.2.3")
        self.assertEqual([self.shut(session) for session in (done, other, *silent, new)],
                         [False, False, True, False, False, False])
        self.assertEqual(silent[0].facts()["ended"], "crowded-out")
        self.admit(live, "192.0.2.1")
        self.assertEqual([self.shut(session) for session in (other, *silent[1:])], [False, True, False])

    def test_nobody_goes_who_has_just_come(self):
        live = Sessions(100, 10, most_negotiating=2)
        crowd = [self.admit(live) for _ in range(50)]
        self.now += sessions.GRACE_S - 0.01
        self.admit(live)
        self.assertFalse(any(map(self.shut, crowd)))

    def test_no_cap_on_negotiating(self):
        live = Sessions(100, 10)
        crowd = [self.admit(live) for _ in range(50)]
        self.now += 5
        self.admit(live)
        self.assertFalse(any(map(self.shut, crowd)))

    def test_where_there_is_no_room_silence_makes_it(self):
        live = Sessions(3, 10)
        busy, silent, other = self.admit(live, "192.0.2.9"), self.admit(live), self.admit(live)
        live.negotiated(busy)
        self.assertRaises(Full, self.admit, live, "192.0.2.2")
        self.now += 2
        self.admit(live, "192.0.2.2")
        self.assertEqual([self.shut(session) for session in (busy, silent, other)], [False, True, False])
        self.assertEqual(len(live), 4, "until its thread has noticed")
        live.remove(silent.sock)
        self.assertEqual(len(live), 3)
        live.negotiated(other)
        self.assertRaises(Full, self.admit, live, "192.0.2.2")

    def test_not_more_room_than_there_are_spare_descriptors(self):
        live = Sessions(100, 10)
        for _ in range(100):
            self.admit(live)
        self.now += 2
        for _ in range(sessions.LEAVING):
            self.admit(live, "192.0.2.2")
        self.assertRaises(Full, self.admit, live, "192.0.2.2")

    def test_nothing_is_left_behind(self):
        live = Sessions(10, 10, 5, 3)
        for number in range(40):
            with contextlib.suppress(Full):
                session = self.admit(live, "192.0.2.%d" % (number % 3))
                self.now += 0.7
                if number % 2:
                    live.negotiated(session)
                if number % 3:
                    live.remove(session.sock)
        for session in live:
            live.remove(session.sock)
            live.remove(session.sock)
        table = live._counts._shared.table
        self.assertEqual((len(live), sum(table) - table[Shared.GIVEN], live._negotiating, live._negotiating_of,
                          live._leaving), (0, 0, {}, {}, 0))


class Deadline(Case):
    def test_expire(self):
        live = Sessions(10, 10)
        late, done = self.admit(live), self.admit(live)
        self.now += 6
        young = self.admit(live)
        live.negotiated(done)
        self.now += 4
        live.expire()
        self.assertEqual([self.shut(session) for session in (late, done, young)], [True, False, False])
        self.assertEqual(late.facts()["ended"], "handshake-timeout")

    def test_0_is_never(self):
        live = Sessions(10, 0)
        session = self.admit(live)
        self.now += 1e9
        live.expire()
        self.assertFalse(self.shut(session))


class Facts(Case):
    def test_a_session_that_never_asked_for_anything(self):
        session = self.admit(Sessions(9, 0))
        self.assertEqual(Session.LINE % session.facts(), "session client=192.0.2.1:1 user=- cmd=- dst=- reached=- "
                         "rep=- up=0 down=0 seconds=0.000 ended=- why=-")

    def test_order_of_a_whole_line(self):
        session = self.admit(Sessions(9, 0), "2001:db8::1")
        session.user, session.cmd, session.dst = b"alice", "CONNECT", Address(b"example.com", 443)
        session.reached, session.rep = Endpoint(ip_address("192.0.2.9"), 443), "SUCCEEDED"
        session.up, session.down, session.ended_by, session.why = 812, 40961, "remote", "remote: reset"
        self.now += 1.25
        self.assertEqual(Session.LINE % session.facts(), "session client=[2001:db8::1]:1 user='alice' cmd=CONNECT "
                         "dst='example.com':443 reached=192.0.2.9:443 rep=SUCCEEDED up=812 down=40961 seconds=1.250 "
                         "ended=remote why='remote: reset'")

    def test_what_a_peer_chose_forges_no_line(self):
        evil = [b"x\n2026 session client=1.2.3.4:5 user='root'", b"\r", b"\x1b[2J", b"\0", b"\xff\xfe", b"' up=1",
                "\u2028\u202e\x85".encode(), b"%s%(client)s"]
        for raw in evil:
            with self.subTest(raw):
                session = self.admit(Sessions(9, 0))
                plain = Session.LINE % session.facts()
                session.user, session.dst = raw, Address(raw, 1)
                session.why = raw.decode("utf-8", "replace")
                line = Session.LINE % session.facts()
                self.assertTrue(line.isascii() and line.isprintable(), line)
                self.assertEqual(len(line.splitlines()), 1)
                for word in ("client", "user", "cmd", "dst", "reached", "rep", "up", "down", "seconds", "ended", "why"):
                    self.assertIn(" %s=" % word, plain)
                self.assertTrue(line.startswith("session client=192.0.2.1:1 user="), line)


class Ending(Case):
    def tunnelled(self, live):
        """A session with a tunnel that runs in a thread, which ends it as a server's does; and its far ends."""
        (mine, client), (near, remote) = (map(self.stack.enter_context, socket.socketpair()) for _ in range(2))
        session = live.admit(mine, Endpoint(ip_address("192.0.2.1"), 1))
        tunnel = Tunnel(mine, near)
        live.attach(session, tunnel)

        def run():
            tunnel.run()
            live.detach(session)
            near.close()
            live.remove(mine)
            mine.close()
        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        for sock in (client, remote):
            sock.settimeout(PATIENCE_S)
        return session, client, remote, thread

    def test_detach_keeps_what_the_tunnel_counted(self):
        live = Sessions(9, 0)
        session, client, remote, thread = self.tunnelled(live)
        client.sendall(b"five!")
        self.assertEqual(reader_of(remote)(5), b"five!")
        remote.sendall(b"seven!!")
        self.assertEqual(reader_of(client)(7), b"seven!!")
        client.close()
        remote.close()
        thread.join(PATIENCE_S)
        self.assertEqual((session.up, session.down, session.tunnel, len(live)), (5, 7, None, 0))
        self.assertIn(session.ended_by, ("client", "remote"))

    def test_detach_without_a_tunnel_keeps_the_reason(self):
        live = Sessions(9, 0)
        session = self.admit(live)
        session.ended_by, session.why = "refused", "wrong user name or password"
        live.detach(session)
        self.assertEqual((session.ended_by, session.why), ("refused", "wrong user name or password"))

    def test_abort_ends_every_session_in_whatever_state(self):
        live = Sessions(9, 60)
        negotiating, connecting = self.admit(live), self.admit(live)
        live.negotiated(connecting)
        session, client, remote, thread = self.tunnelled(live)
        live.abort("server stopped")
        self.assertTrue(self.shut(negotiating) and self.shut(connecting))
        self.assertEqual((negotiating.ended_by, connecting.ended_by), ("server stopped",) * 2)
        thread.join(PATIENCE_S)
        self.assertFalse(thread.is_alive())
        self.assertEqual((session.ended_by, list(live)), ("server stopped", [negotiating, connecting]))
        self.assertEqual((client.recv(1), remote.recv(1)), (b"", b""))

    def test_abort_when_a_client_has_gone_already(self):
        live = Sessions(9, 60)
        session = self.admit(live)
        session.sock.close()
        live.abort("server stopped")
        self.assertEqual(session.ended_by, "server stopped")

    def test_wait_empty(self):
        live = Sessions(9, 0)
        never, now = threading.Event(), threading.Event()
        now.set()
        real = time.monotonic
        with mock.patch.object(sessions, "monotonic", real):
            self.assertTrue(live.wait_empty(PATIENCE_S, never))
            session = self.admit(live)
            self.assertFalse(live.wait_empty(0.05, never), "time is over")
            began = real()
            self.assertFalse(live.wait_empty(PATIENCE_S, now), "hurry")
            self.assertLess(real() - began, PATIENCE_S / 2)
            gone = threading.Timer(0.05, live.remove, [session.sock])
            gone.start()
            self.assertTrue(live.wait_empty(PATIENCE_S, never), "the last one has gone")


class Serving(unittest.TestCase):
    def test_max_per_client(self):
        with target() as destination, running(max_per_client=2) as server, self.assertLogs("socks5", "WARNING") as logs:
            with connect_through(server.server_address, *destination), \
                    connect_through(server.server_address, *destination):
                for _ in range(3):
                    with dial(server.server_address) as third, contextlib.suppress(ConnectionError):
                        third.sendall(b"\5\1\0")
                        self.assertTrue(closed(third))
                with socket.create_connection(server.server_address[:2], PATIENCE_S, ("127.0.0.2", 0)) as other:
                    negotiate(other)
                    self.assertEqual(ask(other, Cmd.CONNECT, *destination).rep, Rep.SUCCEEDED)
            wait_until(lambda: not len(server.sessions))
            connect_through(server.server_address, *destination).close()
        self.assertEqual(len(logs.output), 1)
        self.assertRegex(logs.output[0],
                         r"refused client=127\.0\.0\.1:\d+ why='max-per-client 2 reached by 127\.0\.0\.1'$")

    @unittest.skipUnless(HAS_IPV6, "no IPv6 here")
    def test_an_ipv6_client_is_its_64(self):
        with running(listen=("::1",), max_per_client=7) as server, dial(server.server_address) as client:
            negotiate(client)
            session, = server.sessions
            self.assertEqual(session.origin, "::/64")

    def test_the_silent_make_room_for_others(self):
        """Who says nothing, or stops half-way, goes; tunnels and newcomers do not notice."""
        with target() as destination, running(max_negotiating=10, handshake_timeout=0) as server, \
                mock.patch.object(sessions, "GRACE_S", 0.0), contextlib.ExitStack() as stack:
            tunnel = stack.enter_context(connect_through(server.server_address, *destination))
            silent = []
            for number in range(30):
                silent.append(stack.enter_context(dial(server.server_address)))
                silent[-1].sendall(b"\5\2\0"[:1 + number % 3])
            wait_until(lambda: len(server.sessions) == 11)
            wait_until(lambda: gone(silent) == 20)
            for _ in range(20):
                with socket.create_connection(server.server_address[:2], PATIENCE_S, ("127.0.0.2", 0)) as other:
                    negotiate(other)
                    self.assertEqual(ask(other, Cmd.CONNECT, *destination).rep, Rep.SUCCEEDED)
            tunnel.sendall(b"x")
            self.assertEqual(reader_of(tunnel)(1), b"x")

    def test_full_of_the_silent(self):
        with target() as destination, running(max_sessions=10, handshake_timeout=0) as server, \
                mock.patch.object(sessions, "GRACE_S", 0.0), contextlib.ExitStack() as stack:
            silent = [stack.enter_context(dial(server.server_address)) for _ in range(10)]
            for client in silent:
                client.sendall(b"\5")
            wait_until(lambda: len(server.sessions) == 10)
            with socket.create_connection(server.server_address[:2], PATIENCE_S, ("127.0.0.2", 0)) as other:
                negotiate(other)
                self.assertEqual(ask(other, Cmd.CONNECT, *destination).rep, Rep.SUCCEEDED)
            self.assertEqual(gone(silent), 1)

    def test_slow_loris_is_cut_at_the_deadline(self):
        """A byte now and then changes nothing about the one deadline of the negotiation."""
        with running(handshake_timeout=0.5) as server, dial(server.server_address) as client:
            client.settimeout(0.02)
            for number in range(257):                       # a whole greeting would have so many
                try:
                    client.sendall(b"\xff" if number == 1 else b"\5")
                    if client.recv(1) == b"":
                        break
                    self.fail("an answer to an unfinished greeting")
                except socket.timeout:
                    continue
                except ConnectionError:
                    break
            else:
                self.fail("never cut")
            wait_until(lambda: not len(server.sessions))


if __name__ == "__main__":
    unittest.main()
