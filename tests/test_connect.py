"""connect.py: each REP from a real failure, and parallel attempts to connect (RFC 8305)."""
import contextlib
import errno
import itertools
import os
import socket
import subprocess
import time
import unittest
from ipaddress import ip_address
from unittest import mock

import socks5
from socks5.commands import connect as module
from socks5.net import resolver
from socks5.net.poller import new_poll
from socks5.protocol.codes import Cmd, Method, Rep
from socks5.commands.connect import connect, interleave
from socks5.protocol.errors import RequestRefused
from socks5.protocol.messages import Greeting, Reply, Request, Selection
from socks5.relay.tunnel import Tunnel
from tests import support

try:
    import resource
except ImportError:
    resource = None

NAME = "name.test"          # reserved by RFC 6761
real_getaddrinfo = socket.getaddrinfo


def ips(*texts):
    return [ip_address(text) for text in texts]


def soon():
    """A deadline that is not reached."""
    return time.monotonic() + support.PATIENCE_S


@contextlib.contextmanager
def silent(host, port):
    """host:port neither accepts nor refuses a connection: its backlog is full."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket(family))
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(0)
        while True:
            filler = stack.enter_context(socket.socket(family))
            filler.settimeout(0.1)
            try:
                filler.connect((host, port))
            except socket.timeout:
                break
        yield listener


@contextlib.contextmanager
def resolving(*addresses, name=NAME):
    """While it lasts, `name` has these addresses, in this order, and no answer is remembered; every other name is
    looked up as ever."""
    def getaddrinfo(host, port, *args, **kwargs):
        if host != name.encode():
            return real_getaddrinfo(host, port, *args, **kwargs)
        return [(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 0))
                for address in addresses]
    with mock.patch.object(socket, "getaddrinfo", getaddrinfo), mock.patch.object(resolver, "ANSWER_S", 0):
        yield


class Server(socks5.Server):
    """Keeps the facts of the session that has ended."""

    facts = None

    def session_ended(self, session):
        self.facts = session.facts()

    def fact(self, key):
        support.wait_until(lambda: self.facts, "the end of the session")
        return self.facts.get(key)


def outcome(host, port, **options):
    """(REP, why it says so in the log) of a CONNECT through a server with these options."""
    with support.running(server_class=Server, **options) as server, support.greeted(server.server_address) as client:
        reply = support.ask(client, Cmd.CONNECT, host, port)
        if reply.rep != Rep.SUCCEEDED:
            assert reply.bnd == support.address("0.0.0.0", 0), reply
        client.close()
        return reply.rep, server.fact("why")


@contextlib.contextmanager
def counting_waits():
    """The milliseconds for which connect() says that it will wait, while it lasts."""
    waits = []

    class Poll:
        def __init__(self):
            self.poll_object = new_poll()
            self.register, self.unregister = self.poll_object.register, self.poll_object.unregister

        def poll(self, timeout_ms):
            waits.append(timeout_ms)
            return self.poll_object.poll(timeout_ms)

    with mock.patch.object(module, "new_poll", Poll):
        yield waits


class InterleaveTest(unittest.TestCase):
    def test_families_in_turn(self):
        cases = [("one", "a", "a"), ("IPv4 first", "ab12", "a1b2"), ("IPv6 first", "12ab", "1a2b"),
                 ("mixed already", "a1b2", "a1b2"), ("more of the first", "abc1", "a1bc"),
                 ("more of the other", "a123", "a123"), ("only IPv6", "123", "123"),
                 ("first choice kept among many", "1a23b", "1a2b3")]
        address = {"a": "192.0.2.1", "b": "192.0.2.2", "c": "192.0.2.3", "1": "2001:db8::1", "2": "2001:db8::2",
                   "3": "2001:db8::3"}
        for name, given, expected in cases:
            with self.subTest(name):
                self.assertEqual(interleave(ips(*(address[letter] for letter in given))),
                                 ips(*(address[letter] for letter in expected)))


class ConnectTest(unittest.TestCase):
    """On loopback."""

    def refused(self, addresses, port, timeout_s=support.PATIENCE_S, client=None):
        with self.assertRaises(RequestRefused) as caught:
            connect(addresses, port, time.monotonic() + timeout_s, client)[0].close()
        return caught.exception

    def test_bnd_is_what_the_target_sees(self):
        cases = [("IPv4", "127.0.0.1", "127.0.0.1"), ("IPv4-mapped", "::ffff:127.0.0.1", "127.0.0.1"),
                 ("name", "localhost", "127.0.0.1")]
        if support.HAS_IPV6:
            cases.append(("IPv6", "::1", "::1"))
        for name, host, listening in cases:
            peers = []
            with self.subTest(name), support.target(lambda sock: peers.append(sock.getpeername()), listening) as target:
                with support.running() as server, support.greeted(server.server_address) as client:
                    reply = support.ask(client, Cmd.CONNECT, host, target[1])
                    self.assertEqual(support.read_to_end(client), b"")
                    self.assertEqual(reply, Reply(Rep.SUCCEEDED, support.address(*peers[0][:2])))

    def test_connection_refused(self):
        for host in ["127.0.0.1", "localhost"] + ["::1"] * support.HAS_IPV6:
            with self.subTest(host):
                rep, why = outcome(host, support.closed_port("127.0.0.1"))
                self.assertEqual(rep, Rep.CONNECTION_REFUSED)
                self.assertIn("ECONNREFUSED", why)

    def test_a_name_that_does_not_resolve(self):
        rep, why = outcome("name.invalid", 80)
        self.assertEqual(rep, Rep.HOST_UNREACHABLE)
        self.assertIn("does not resolve", why)

    def test_silence_is_a_time_out(self):
        port = support.closed_port("127.0.0.1")
        with silent("127.0.0.1", port):
            began = time.monotonic()
            rep, why = outcome("127.0.0.1", port, connect_timeout=0.3)
            self.assertEqual(rep, Rep.TTL_EXPIRED)
            self.assertRegex(why, r"127\.0\.0\.1 silent for 0\.[2-9]|silent for [1-9]")
            self.assertGreaterEqual(time.monotonic() - began, 0.3)

    def test_out_of_descriptors(self):
        support.need(self, resource and os.path.exists("/proc/self/fd"), "a descriptor limit")
        with support.target() as target, support.running() as server, support.greeted(server.server_address) as client:
            soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
            lowest = os.dup(0)
            os.close(lowest)
            resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, hard))
            try:
                reply = support.ask(client, Cmd.CONNECT, *target)
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            self.assertEqual(reply.rep, Rep.GENERAL_FAILURE)

    def test_a_family_that_this_machine_does_not_have(self):
        """A family number that no kernel knows stands for IPv6 where it was left out: socket() says the same."""
        def family_of(address):
            return 9999 if address.version == 6 else socket.AF_INET

        with mock.patch.object(module, "family_of", family_of):
            exc = self.refused(ips("2001:db8::1"), 80)
            self.assertEqual((exc.rep, exc.why.split()[1]), (Rep.ADDRESS_TYPE_NOT_SUPPORTED, "EAFNOSUPPORT"))
            with support.target() as (host, port):
                connect(ips("2001:db8::1", host), port, soon())[0].close()
            port = support.closed_port("127.0.0.1")
            with silent("127.0.0.1", port):
                exc = self.refused(ips("2001:db8::1", "127.0.0.1"), port, 0.1)
                self.assertEqual(exc.rep, Rep.TTL_EXPIRED, "the address that could have answered tells more")

    def test_the_most_telling_failure_wins(self):
        port = support.closed_port("127.0.0.1", "127.0.0.2")
        with silent("127.0.0.1", port):
            for addresses, nonblock in itertools.product(
                    (["127.0.0.1", "127.0.0.2"], ["127.0.0.2", "127.0.0.1"]), {module.NONBLOCK, 0}):
                # Without NONBLOCK only poll() tells of a refusal.
                with self.subTest("silent and refused: %s" % addresses, nonblock=nonblock), \
                        mock.patch.object(module, "NONBLOCK", nonblock), \
                        mock.patch.object(module, "ATTEMPT_DELAY_S", 0.01):
                    exc = self.refused(ips(*addresses), port, 1)
                    self.assertEqual(exc.rep, Rep.CONNECTION_REFUSED)
                    self.assertIn("127.0.0.2 ECONNREFUSED", exc.why)
                    self.assertIn("127.0.0.1 silent", exc.why)

    def test_the_next_begins_as_soon_as_one_fails(self):
        port = support.closed_port("127.0.0.1", "127.0.0.2", "127.0.0.3")
        with support.target(host="127.0.0.3", port=port):
            addresses = ips("127.0.0.1", "127.0.0.2", "127.0.0.3")
            with mock.patch.object(module, "ATTEMPT_DELAY_S", 60):
                connect(addresses, port, soon())[0].close()

    def test_the_next_begins_as_soon_as_one_of_those_under_way_fails(self):
        class Socket(socket.SocketType):
            def connect_ex(self, where):
                if where[0] == "127.0.0.2":
                    module.ATTEMPT_DELAY_S = 60             # and by time alone the next would begin too late
                return super().connect_ex(where)

        port = support.closed_port("127.0.0.1", "127.0.0.2", "127.0.0.3")
        with support.target(host="127.0.0.3", port=port), silent("127.0.0.1", port), \
                mock.patch.object(module, "ATTEMPT_DELAY_S", 0.01), mock.patch.object(module, "NONBLOCK", 0), \
                mock.patch.object(module.socket, "SocketType", Socket):         # only poll() tells of a refusal
            connect(ips("127.0.0.1", "127.0.0.2", "127.0.0.3"), port, soon())[0].close()

    def test_a_dead_address_delays_a_live_one_little(self):
        """RFC 8305: the first choice has 250 ms, no more and no less."""
        dead = "::1" if support.HAS_IPV6 else "127.0.0.2"
        port = support.closed_port("127.0.0.1", dead)
        with support.target(port=port) as (host, _), silent(dead, port), support.running() as server, \
                resolving(dead, host), counting_waits() as waits:
            began = time.monotonic()
            support.connect_through(server.server_address, NAME, port).close()
            self.assertGreaterEqual(time.monotonic() - began, 0.25)
        self.assertEqual(len(waits), 1)
        self.assertLessEqual(waits[0], 251)

    def test_the_first_that_connects_wins_and_the_others_are_closed(self):
        support.need(self, os.path.exists("/proc/self/fd"), "/proc")
        port = support.closed_port("127.0.0.1", "127.0.0.2", "127.0.0.3")
        with support.target(host="127.0.0.3", port=port) as (host, _), \
                silent("127.0.0.1", port), silent("127.0.0.2", port):
            before = support.descriptors()
            winner, address = connect(ips("127.0.0.1", "127.0.0.2", host), port, soon())
            with contextlib.closing(winner):
                self.assertEqual(winner.getpeername(), (str(address), port))
                self.assertEqual(str(address), host)
                support.wait_until(lambda: support.descriptors() <= before + 2, "it and the target's end are open")
            self.refused(ips("127.0.0.1", "127.0.0.2"), port, 0.3)
            support.wait_until(lambda: support.descriptors() <= before, "nothing else is")

    def test_many_silent_addresses_take_few_descriptors(self):
        """However many addresses a name has, and fewer where the session may take no more."""
        support.need(self, os.path.exists("/proc/self/fd"), "/proc")
        hosts = ["127.0.1.%d" % number for number in range(1, 15)]
        port = support.closed_port(*hosts)
        with contextlib.ExitStack() as stack, mock.patch.object(module, "ATTEMPT_DELAY_S", 0.005):
            for host in hosts[:-1]:
                stack.enter_context(silent(host, port))
            stack.enter_context(socket.create_server((hosts[-1], port)))    # accepts none: each would count as well
            before = support.descriptors()
            for name, allowed, most in (("enough", 1000, module.MAX_PENDING), ("four", 4, 4), ("few", 0, 2)):
                asked, seen = [], []

                def room(attempts):
                    asked.append(attempts)
                    return attempts <= allowed

                class Socket(socket.SocketType):
                    def connect_ex(self, where):
                        seen.append(support.descriptors() - before)
                        return super().connect_ex(where)

                with self.subTest(name), mock.patch.object(module.socket, "SocketType", Socket):
                    with contextlib.closing(connect(ips(*hosts), port, soon(), None, None, room)[0]) as sock:
                        self.assertEqual(sock.getpeername()[0], hosts[-1])
                    self.assertEqual(max(seen), most)
                    self.assertEqual((asked[0], asked[-1]), (3, 1))

    def test_attempts_count_as_descriptors_of_the_session(self):
        hosts = ["127.0.1.%d" % number for number in range(1, 9)]
        port = support.closed_port(*hosts)
        with contextlib.ExitStack() as stack, mock.patch.object(module, "ATTEMPT_DELAY_S", 0.005):
            fillers = [stack.enter_context(silent(host, port)) for host in hosts]
            server = stack.enter_context(support.running())
            stack.enter_context(resolving(*hosts))
            client = stack.enter_context(support.greeted(server.server_address))
            client.sendall(Request(Cmd.CONNECT, support.address(NAME, port)).pack())
            support.wait_until(lambda: [session.weight for session in server.sessions] == [5], "5 pairs")
            for filler in fillers:                              # the kernel refuses those that wait
                filler.close()
            self.assertEqual(Reply.parse(support.reader_of(client)).rep, Rep.CONNECTION_REFUSED)
            support.wait_until(lambda: not len(server.sessions), "its end")
            self.assertEqual(server.sessions._weights.live(), 0)

    def test_a_client_that_resets_is_connected_for_no_longer(self):
        with support.running(server_class=Server, connect_timeout=600) as server:
            port = support.closed_port("127.0.0.1", "127.0.0.2")
            with silent("127.0.0.1", port), silent("127.0.0.2", port), resolving("127.0.0.1", "127.0.0.2"):
                client = support.greeted(server.server_address)
                client.sendall(Request(Cmd.CONNECT, support.address(NAME, port)).pack())
                support.wait_until(lambda: any(session.cmd for session in server.sessions), "the request is read")
                support.reset(client)
                self.assertRegex(server.fact("why"), "client left before (.*127.0.0.1 silent|'name.test' resolved)")
                self.assertEqual(server.fact("ended"), "client")

    def test_a_client_that_has_said_all_is_still_connected_for(self):
        port = support.closed_port("127.0.0.1", "127.0.0.2")
        with support.target(port=port) as (host, _), silent("127.0.0.2", port), support.running() as server:
            with resolving("127.0.0.2", host), support.dial(server.server_address) as client:
                client.sendall(Greeting(bytes([Method.NO_AUTHENTICATION])).pack()
                               + Request(Cmd.CONNECT, support.address(NAME, port)).pack() + b"all that I have to say")
                client.shutdown(socket.SHUT_WR)
                read = support.reader_of(client)
                Selection.parse(read)
                self.assertEqual(Reply.parse(read).rep, Rep.SUCCEEDED)
                self.assertEqual(support.read_to_end(client), b"all that I have to say")

    def test_a_timeout_of_0_is_none(self):
        port = support.closed_port("127.0.0.1", "127.0.0.2")
        with support.target(port=port) as (host, _), silent("127.0.0.2", port):
            connect(ips("127.0.0.2", host), port, float("inf"))[0].close()
            with resolving("127.0.0.2", host), support.running(connect_timeout=0) as server:
                support.connect_through(server.server_address, NAME, port).close()


class NetworkTest(support.TwoHosts, unittest.TestCase):
    """On two hosts: what routers and neighbours say, or do not."""

    SILENT = "203.0.113.1"                                      # routed to the far host, which throws it away
    ABSENT = {4: "198.51.100.77", 6: "2001:db8:51::77"}         # no host of this link has it

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        near, far = cls.names
        lines = ["ip -n %s route add 203.0.113.0/24 via %s" % (near, support.FAR[4]),
                 "ip -n %s route add blackhole 203.0.113.0/24" % far,
                 "ip -n %s route add 192.0.2.0/24 via %s" % (near, support.FAR[4]),
                 "ip netns exec %s sysctl -q net.ipv4.ip_forward=1" % far,
                 "ip -n %s route add unreachable 192.0.2.0/25" % far,
                 "ip -n %s route add prohibit 198.18.0.0/24" % near,
                 # One probe for a neighbour after 50 ms, not 1 s.
                 "ip netns exec %s sysctl -q net.ipv4.neigh.cable.retrans_time_ms=50" % near,
                 "ip netns exec %s sysctl -q net.ipv6.neigh.cable.retrans_time_ms=50" % near]
        try:
            for line in lines if not cls.why_not else []:
                subprocess.run(line.split(), check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError) as exc:
            cls.why_not = str(getattr(exc, "stderr", None) or exc)

    def setUp(self):
        super().setUp()
        support.need(self, support.HAS_IPV6, "IPv6")

        def answers():
            with socket.socket(socket.AF_INET6) as sock:
                return sock.connect_ex((support.FAR[6], 80)) == errno.ECONNREFUSED
        support.wait_until(lambda: self.near(answers), "IPv6 works on a cable that is new")

    def test_each_failure(self):
        cases = [("no route", "198.18.1.1", Rep.NETWORK_UNREACHABLE, "ENETUNREACH"),
                 ("no route, IPv6", "2001:db8:99::1", Rep.NETWORK_UNREACHABLE, "ENETUNREACH"),
                 ("no neighbour", self.ABSENT[4], Rep.HOST_UNREACHABLE, "EHOSTUNREACH"),
                 ("no neighbour, IPv6", self.ABSENT[6], Rep.HOST_UNREACHABLE, "EHOSTUNREACH"),
                 ("a router says that there is no such host", "192.0.2.1", Rep.HOST_UNREACHABLE, "EHOSTUNREACH"),
                 ("refused by another host", support.FAR[4], Rep.CONNECTION_REFUSED, "ECONNREFUSED"),
                 ("refused by another host, IPv6", support.FAR[6], Rep.CONNECTION_REFUSED, "ECONNREFUSED"),
                 ("forbidden here", "198.18.0.1", Rep.NOT_ALLOWED, "EACCES"),
                 ("no resolver", "name.invalid", Rep.HOST_UNREACHABLE, "does not resolve")]
        for name, host, rep, words in cases:
            with self.subTest(name):
                self.assertEqual(self.near(outcome, host, 80)[0], rep)
                self.assertIn(words, self.near(outcome, host, 80)[1])

    def test_the_most_telling_failure_wins(self):
        cases = [("unreachable before timed out", ["198.18.1.1", self.SILENT], Rep.NETWORK_UNREACHABLE),
                 ("refused before unreachable", ["198.18.1.1", support.FAR[4]], Rep.CONNECTION_REFUSED),
                 ("the host before its network", ["198.18.1.1", self.ABSENT[4]], Rep.HOST_UNREACHABLE),
                 ("in whatever order", [support.FAR[4], self.SILENT, "198.18.1.1"], Rep.CONNECTION_REFUSED)]
        for name, addresses, rep in cases:
            with self.subTest(name), resolving(*addresses), mock.patch.object(module, "ATTEMPT_DELAY_S", 0.01):
                self.assertEqual(self.near(outcome, NAME, 80, connect_timeout=1)[0], rep)

    def test_without_ipv6(self):
        """Switched off, as on many servers: what has an IPv4 address as well does not notice."""
        off = "ip netns exec %s sysctl -q net.ipv6.conf.all.disable_ipv6=%d"
        subprocess.run((off % (self.names[0], 1)).split(), check=True)
        self.addCleanup(subprocess.run, (off % (self.names[0], 0)).split(), check=True)
        rep, why = self.near(outcome, support.FAR[6], 80)
        self.assertIn(rep, (Rep.NETWORK_UNREACHABLE, Rep.GENERAL_FAILURE), why)         # ENETUNREACH, EADDRNOTAVAIL
        with resolving(support.FAR[6], support.FAR[4]):
            self.assertEqual(self.near(outcome, NAME, 80)[0], Rep.CONNECTION_REFUSED)

    def test_a_peer_whose_acks_stop(self):
        """The tunnel ends by its time limit although bytes are on their way, and the client learns that it was cut."""
        def listen():
            listener = socket.socket()
            listener.bind((support.FAR[4], 0))
            listener.listen(1)
            listener.settimeout(support.PATIENCE_S)
            return listener

        def cut(listener):
            with support.running(server_class=Server, idle_timeout=2) as server, support.connect_through(
                    server.server_address, *listener.getsockname()) as client, listener.accept()[0] as peer:
                client.sendall(b"before")
                self.assertEqual(support.reader_of(peer)(6), b"before")
                subprocess.run(route % "add", shell=True, check=True)
                session, = server.sessions
                support.wait_until(lambda: isinstance(session.relay, Tunnel), "the loop has it")
                remote = session.relay.remote
                client.sendall(b"never acknowledged")
                unacked = slice(24, 28)                         # tcpi_unacked of struct tcp_info
                support.wait_until(lambda: any(remote.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 28)[unacked]))
                with self.assertRaises(ConnectionResetError):
                    client.recv(1)
                return server.fact("ended"), server.fact("up")

        route = "ip -n %s route %%s blackhole %s/32" % (self.names[1], support.NEAR[4])
        self.addCleanup(subprocess.run, route % "del", shell=True)
        with self.far(listen) as listener:
            self.assertEqual(self.near(cut, listener), ("idle", len(b"before" b"never acknowledged")))
