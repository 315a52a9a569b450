"""sessions.py: limits, shares, eviction, deadlines; alone, and in the server."""
import contextlib
import logging
import socket
import threading
import time
import unittest
from ipaddress import ip_address
from unittest import mock

from socks5.server import session as one_session, sessions
from socks5.server.counters import GIVEN, ORIGINS, Shared
from socks5.server.session import Session
from socks5.server.sessions import Full, Sessions
from socks5.net.addresses import Endpoint
from socks5.relay.relay import Relay
from socks5.relay.tunnel import Tunnel
from socks5.protocol.facts import template
from socks5.protocol.messages import Address
from tests import support
from tests.support import HAS_IPV6, PATIENCE_S, greeted, running, text_of


class State(unittest.TestCase):
    def test_each(self):
        def tunnel(up=False, down=False, ended=False, aborted=""):
            made = Tunnel(mock.Mock(), mock.Mock())
            made.up.done, made.down.done, made.ended, made.aborted = up, down, ended, aborted
            return {"relay": made}

        for expected, facts in (
                ("negotiating", {}), ("connecting", {"cmd": "CONNECT"}), ("connecting", {"cmd": "BIND"}),
                ("waiting", {"cmd": "BIND", "rep": "SUCCEEDED"}), ("relaying", tunnel()),
                ("half-closed", tunnel(up=True)), ("half-closed", tunnel(down=True)), ("relaying", {"relay": Relay()}),
                ("closing", tunnel(ended=True)), ("closing", tunnel(aborted="server stopped")),
                ("closing", {"ended_by": "evicted"})):
            with self.subTest(expected, facts=facts):
                session = Session(Endpoint(ip_address("192.0.2.1"), 1), "192.0.2.1", None)
                for name, value in facts.items():
                    setattr(session, name, value)
                self.assertEqual(session.state(), expected)


class Case(support.Case):
    """Sessions over socket pairs, by a clock of our own."""

    def setUp(self):
        self.now = 100.0
        for module in (one_session, sessions):
            self.enter(mock.patch.object(module, "monotonic", lambda: self.now))
        self.far = {}

    def admit(self, live, host="192.0.2.1", origin=None):
        mine, far = map(self.enter, socket.socketpair())
        session = live.admit(mine, Endpoint(ip_address(host), 1), origin)
        far.setblocking(False)
        self.far[session] = far
        return session

    def over(self, live, session):
        self.assertTrue(live.end(session))
        live.remove(session)

    def shut(self, session):
        """Whether it was shut down."""
        try:
            return self.far[session].recv(1) == b""
        except BlockingIOError:
            return False


class Limits(Case):
    def admitted(self, live, count, host="192.0.2.1"):
        """Sessions with a request, as many as are let in of `count`."""
        found = []
        for _ in range(count):
            with contextlib.suppress(Full):
                found.append(self.admit(live, host))
                live.negotiated(found[-1])
        return found

    def test_maximum(self):
        live = Sessions(2, 10)
        first, = self.admitted(live, 1)
        self.admitted(live, 1, "192.0.2.2")
        with self.assertRaisesRegex(Full, "^max-sessions 2 reached$"):
            self.admit(live, "192.0.2.3")
        self.over(live, first)
        self.admit(live, "192.0.2.3")
        self.assertEqual(len(live), 2)

    def test_the_last_tenth_is_for_newcomers(self):
        """One address holds all that it can get: nine tenths, and one session at the least is left to others."""
        for name, limits, taken, left in [
                ("100", dict(maximum=100), 90, 10), ("of this process", dict(maximum_here=100), 90, 10),
                ("both", dict(maximum=100, maximum_here=50), 45, 5), ("40", dict(maximum=40), 36, 4),
                ("10", dict(maximum=10), 9, 1), ("5", dict(maximum=5), 4, 1), ("2", dict(maximum=2), 1, 1),
                ("1", dict(maximum=1), 1, 0)]:
            with self.subTest(name):
                live = Sessions(**limits)
                self.assertEqual(len(self.admitted(live, 110)), taken)
                newcomers = [self.admitted(live, 1, "198.51.100.%d" % number) for number in range(20)]
                self.assertEqual(sum(map(len, newcomers)), left)
                self.assertRaises(Full, self.admit, live, "203.0.113.1")

    def test_the_share_is_of_all_processes(self):
        shared = Shared(2)
        here, there = (Sessions(20, counts=shared.row(row)) for row in range(2))
        self.assertEqual([len(self.admitted(here, 10)), len(self.admitted(there, 10))], [10, 8])
        self.assertEqual([len(self.admitted(live, 1, "198.51.100.1")) for live in (here, there, here)], [1, 1, 0])

    def test_per_origin(self):
        live = Sessions(100, 10, per_origin=2)
        first, _ = self.admit(live), self.admit(live)
        with self.assertRaisesRegex(Full, r"^max-per-client 2 reached by 192\.0\.2\.1$"):
            self.admit(live)
        self.admit(live, "192.0.2.2")
        live.negotiated(first)
        self.assertRaises(Full, self.admit, live)
        self.over(live, first)
        self.admit(live)

    def test_a_session_that_grows(self):
        """Its weight is of this process's descriptors, and it stays one session."""
        live = Sessions(12, maximum_here=20)
        session, = self.admitted(live, 1)
        live.grow(session, 9)
        self.assertEqual((live._counts.of(session.origin), live._counts.live(), len(live)), (1, 1, 1))
        self.assertEqual(len(self.admitted(live, 20)), 8, "and three places are left to a newcomer")
        self.assertRaisesRegex(Full, "^max-sessions 12 reached$", live.grow, session, 10)
        newcomer, = self.admitted(live, 1, "192.0.2.2")
        live.grow(newcomer, sessions.HEAVIEST)
        self.assertRaises(Full, self.admit, live, "192.0.2.3")
        live.grow(session, 8)
        self.admit(live, "192.0.2.3")
        self.assertRaises(Full, self.admit, live, "192.0.2.3")

    def test_a_session_that_grows_takes_the_places_of_silent_ones(self):
        live = Sessions(maximum_here=20)
        session, = self.admitted(live, 1)
        silent = [self.admit(live, "192.0.2.%d" % number) for number in range(2, 21)]
        self.assertRaises(Full, live.grow, session, 3)
        self.now += 5
        self.assertRaises(Full, live.grow, session, 3, evict=False)
        self.assertEqual([self.shut(one) for one in silent], [False] * 19)
        live.grow(session, 3)
        self.assertEqual([self.shut(one) for one in silent], [True] * 2 + [False] * 17)


class Eviction(Case):
    def test_processes_that_are_beyond_the_maximum_together(self):
        """Both have admitted one for the last place: a newcomer gets its place all the same, for two that are silent.
        What is evicted is not counted any more, and is not counted twice when it goes."""
        shared = Shared(2)
        here, there = (Sessions(6, counts=shared.row(row)) for row in range(2))
        # By chance two origins meet in one place of Counts, and would count as one.
        places = {hash(origin) % ORIGINS: origin for origin in map("192.0.2.{}".format, range(20))}
        another, newcomer, *origins = places.values()
        silent = [self.admit(live, origin) for live, origin in zip([here, there] * 3, origins)]
        shared.row(1).add(another, 1)
        self.assertRaises(Full, self.admit, here, newcomer)
        self.now += 5
        self.admit(here, newcomer)
        self.assertEqual([self.shut(one) for one in silent], [True, False, True, False, False, False])
        self.assertEqual(shared.row(0).live(), 6)
        for one in silent[::2]:
            self.over(here, one)
        self.assertEqual((shared.row(0).live(), len(here)), (5, 1))

    def test_a_load_balancers_connection_that_is_evicted_before_its_header(self):
        """The header may be read already: the session stays where it was counted, and is counted off once."""
        shared = Shared(1)
        live = Sessions(2, counts=shared.row(0))
        balanced = self.admit(live, "192.0.2.1", sessions.UNKNOWN)
        self.admit(live, "192.0.2.2")
        self.now += 5
        self.admit(live, "192.0.2.3")
        self.assertTrue(self.shut(balanced))
        live.move(balanced, Endpoint(ip_address("198.51.100.1"), 1), "198.51.100.1")
        self.over(live, balanced)
        self.assertEqual([shared.row(0).live(), len(live), *map(shared.row(0).of, (sessions.UNKNOWN, "198.51.100.1"))],
                         [2, 2, 0, 0])

    def test_one_that_is_old_enough_is_found_beside_newer_ones_of_a_busier_origin(self):
        live = Sessions(100, 10, negotiating_max=3)
        old = self.admit(live, "192.0.2.1")
        self.now += 5
        new = [self.admit(live, "192.0.2.2") for _ in range(3)]
        self.assertEqual([self.shut(one) for one in (old, *new)], [True, False, False, False])

    def test_the_oldest_of_the_origin_that_has_most(self):
        live = Sessions(100, 10, negotiating_max=4)
        done = self.admit(live, "192.0.2.1")
        live.negotiated(done)
        other = self.admit(live, "192.0.2.2")
        silent = [self.admit(live, "192.0.2.1") for _ in range(3)]
        self.now += 5
        new = self.admit(live, "192.0.2.3")
        self.assertEqual([self.shut(session) for session in (done, other, *silent, new)],
                         [False, False, True, False, False, False])
        self.assertEqual(silent[0].facts().get("ended"), "evicted")
        self.admit(live, "192.0.2.1")
        self.assertEqual([self.shut(session) for session in (other, *silent[1:])], [False, True, False])

    def test_those_without_a_greeting_before_those_in_mid_login(self):
        live = Sessions(100, 10, negotiating_max=4)
        logins = [self.admit(live, "192.0.2.1") for _ in range(3)]
        for session in logins:
            session.greeted = True
        silent = self.admit(live, "192.0.2.2")
        self.now += 5
        self.admit(live, "192.0.2.3").greeted = True
        self.assertEqual([self.shut(session) for session in (*logins, silent)], [False, False, False, True])
        self.admit(live, "192.0.2.3")
        self.assertEqual([self.shut(session) for session in logins], [True, False, False], "where there is no other")

    def test_one_that_a_load_balancer_has_named(self):
        live = Sessions(100, 10, negotiating_max=2)
        named = self.admit(live, "192.0.2.9", sessions.UNKNOWN)
        live.move(named, Endpoint(ip_address("198.51.100.1"), 1), "198.51.100.1")
        self.admit(live)
        self.now += 5
        self.admit(live, "198.51.100.1")
        self.assertTrue(self.shut(named))

    def test_none_that_has_just_come(self):
        live = Sessions(100, 10, negotiating_max=2)
        flood = [self.admit(live) for _ in range(50)]
        self.now += sessions.GRACE_S - 0.01
        self.admit(live)
        self.assertFalse(any(map(self.shut, flood)))

    def test_when_the_maximum_is_reached(self):
        live = Sessions(3, 10)
        busy, silent, other = (self.admit(live, "192.0.2.%d" % number) for number in (9, 1, 2))
        live.negotiated(busy)
        self.assertRaises(Full, self.admit, live, "192.0.2.3")
        self.now += 2
        self.admit(live, "192.0.2.3")
        self.assertEqual([self.shut(session) for session in (busy, silent, other)], [False, True, False])
        self.assertEqual(len(live), 4, "until its thread has noticed")
        self.over(live, silent)
        self.assertEqual(len(live), 3)
        live.negotiated(other)
        self.assertRaises(Full, self.admit, live, "192.0.2.2")

    def test_an_address_that_has_its_share_takes_the_place_of_its_own_only(self):
        live = Sessions(10)
        for _ in range(8):
            live.negotiated(self.admit(live))
        own, other = self.admit(live), self.admit(live, "192.0.2.2")
        self.now += 2
        self.admit(live)
        self.assertEqual([self.shut(session) for session in (own, other)], [True, False])
        self.assertRaises(Full, self.admit, live)
        self.admit(live, "192.0.2.3")
        self.assertTrue(self.shut(other), "for a newcomer")

    def test_not_more_than_there_are_spare_descriptors(self):
        live = Sessions(100, 10)
        for number in range(100):
            self.admit(live, "192.0.2.%d" % (number % 50))
        self.now += 2
        for number in range(sessions.MAX_LEAVING):
            self.admit(live, "198.51.100.%d" % number)
        self.assertRaises(Full, self.admit, live, "203.0.113.1")

    def test_nothing_is_left_behind(self):
        live = Sessions(10, 10, 5, 3)
        for number in range(60):
            with contextlib.suppress(Full):
                session = self.admit(live, "192.0.2.%d" % (number % 5))
                self.now += 0.7
                if number % 2:
                    live.negotiated(session)
                if number % 7 == 0:
                    live.grow(session, 3)
                if number % 3:
                    self.over(live, session)
        self.assertTrue(len(live))
        for session in live:
            self.over(live, session)
            self.assertFalse(live.end(session))
        table = live._counts._table
        self.assertEqual((len(live), sum(table) - table[GIVEN], len(live.negotiating), live._leaving,
                          live._weights.live()), (0, 0, 0, 0, 0))


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
        self.assertEqual(late.facts().get("ended"), "handshake-timeout")

    def test_0_is_never(self):
        live = Sessions(10, 0)
        session = self.admit(live)
        self.now += 1e9
        live.expire()
        self.assertFalse(self.shut(session))


class Facts(Case):
    def line(self, session):
        facts = session.facts()
        return text_of(logging.makeLogRecord({"levelname": "INFO", "msg": template("session", facts), "args": facts}))

    def test_order_of_a_whole_line(self):
        session = self.admit(Sessions(9, 0), "2001:db8::1")
        session.user, session.cmd, session.dst = b"alice", "CONNECT", Address(b"example.com", 443)
        session.reached, session.rep = Endpoint(ip_address("192.0.2.9"), 443), "SUCCEEDED"
        session.up, session.down, session.ended_by, session.why = 812, 40961, "remote", "remote: reset"
        session.notes = "2 more"
        self.now += 1.25
        self.assertEqual(self.line(session), "INFO session client=[2001:db8::1]:1 user='alice' cmd=CONNECT "
                         "dst='example.com':443 reached=192.0.2.9:443 rep=SUCCEEDED up=812 down=40961 seconds=1.250 "
                         "ended=remote why='remote: reset; 2 more'")


class Ending(Case):
    def test_abort_shuts_down_what_has_no_tunnel(self):
        """The relay loop ends the others: it has their sockets."""
        live = Sessions(9, 60)
        negotiating, connecting, relaying = (self.admit(live) for _ in range(3))
        live.negotiated(connecting)
        relaying.relay = mock.Mock()
        live.abort("server stopped")
        self.assertEqual([self.shut(session) for session in (negotiating, connecting, relaying)], [True, True, False])
        self.assertEqual([session.ended_by for session in (negotiating, connecting, relaying)],
                         ["server stopped", "server stopped", ""])

    def test_abort_while_others_end(self):
        live, leaving = Sessions(9, 60), []

        class Sock(socket.socket):
            def shutdown(self, how):
                super().shutdown(how)
                for session in leaving:
                    live.remove(session)            # by another thread, which needs no lock for it
                leaving.clear()

        first, second, ended = (self.admit(live) for _ in range(3))
        self.assertTrue(live.end(ended))
        leaving.append(ended)
        first.sock = self.enter(Sock(fileno=first.sock.detach()))
        live.abort("server stopped")
        self.assertEqual([self.shut(session) for session in (first, second)], [True, True])

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
            gone = threading.Timer(0.05, live.remove, [session])
            gone.start()
            self.assertTrue(live.wait_empty(PATIENCE_S, never), "the last one has gone")


class Serving(unittest.TestCase):
    @unittest.skipUnless(HAS_IPV6, "no IPv6 here")
    def test_an_ipv6_client_is_its_64(self):
        with running(listen=("::1",), max_per_client=7) as server, greeted(server.server_address):
            session, = server.sessions
            self.assertEqual(session.origin, "::/64")
