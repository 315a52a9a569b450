"""sessions.py: caps, who goes when there is no room, deadlines; alone, and in the server."""
import contextlib
import select
import socket
import unittest
from ipaddress import ip_address, ip_network
from unittest import mock

from socks5 import sessions
from socks5.codes import Cmd, Rep
from socks5.sessions import Full, Sessions
from socks5.wire import Address
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
        session = live.admit(mine, Address(ip_address(host), 1), origin)
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
        self.assertEqual(silent[0].facts()["ended"], "still negotiating, when others came")
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
        self.assertEqual((len(live), live._live_of, live._negotiating, live._negotiating_of, live._leaving),
                         (0, {}, {}, {}, 0))


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
        self.assertEqual(late.facts()["ended"], "handshake timeout")

    def test_0_is_never(self):
        live = Sessions(10, 0)
        session = self.admit(live)
        self.now += 1e9
        live.expire()
        self.assertFalse(self.shut(session))


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
        self.assertRegex(logs.output[0], r"max-per-client 2 reached by 127\.0\.0\.1: 127\.0\.0\.1:\d+ is closed")

    @unittest.skipUnless(HAS_IPV6, "no IPv6 here")
    def test_an_ipv6_client_is_its_64(self):
        with running(listen=("::1",), max_per_client=7) as server, dial(server.server_address) as client:
            negotiate(client)
            session, = server.sessions
            self.assertEqual(session.origin, ip_address("::"))

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
