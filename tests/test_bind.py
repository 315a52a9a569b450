"""BIND: which peers may connect, where, for how long, and what is released afterwards."""
import contextlib
import errno
import ftplib
import io
import os
import select
import socket
import subprocess
import sys
import tempfile
import threading
import unittest
from ipaddress import ip_address
from unittest.mock import patch

from socks5 import client
from socks5.commands.bind import EARLY_BYTES, LEFT, Rendezvous, any_peer, expected, listen, our_end
from socks5.protocol.codes import Cmd, Rep
from socks5.protocol.errors import ProxyError, RequestRefused
from socks5.net.poller import SelectPoll
from socks5.net.shares import ANY_PORT
from socks5.protocol.messages import Address, Reply, Request

from .support import (FAR, HAS_IPV6, NEAR, PATIENCE_S, Case, TwoHosts, ask, descriptors, free_ports, greeted,
                      logging_of, need, need_program, read_to_end, reader_of, refusal, reset, running, spawned, threads,
                      wait_until)

LOCAL = ("127.0.0.1", 0)


def call(bnd, source=None):
    """Connect to where a BIND listens, from the address `source`."""
    return socket.create_connection(bnd, PATIENCE_S, source_address=source and (source, 0))


def is_closed(bnd):
    try:
        call(bnd).close()
    except ConnectionRefusedError:
        return True
    except ConnectionResetError:                    # it was closed while we connected: the next look tells
        pass
    return False


def tunnel(test, waiting, peer):
    """The client and this peer are the ends of one tunnel: the address that the client is told."""
    sock, who = waiting.accept(PATIENCE_S)
    with sock:
        for sender, receiver in ((sock, peer), (peer, sock)):
            receiver.settimeout(PATIENCE_S)
            sender.sendall(b"some words")
            test.assertEqual(receiver.recv(100), b"some words")
    return who


class ExpectedPeers(unittest.TestCase):
    def test_the_peer_that_a_request_expects(self):
        ips = [ip_address(text) for text in ("192.0.2.1", "2001:db8::1", "0.0.0.0")]

        def no_lookup(host):
            self.fail(host)

        for ip in ips + [ip_address("::")]:
            with self.subTest(ip=ip):
                self.assertEqual(expected(ip, no_lookup), [ip])
        with self.subTest("a name; what resolves to 0.0.0.0 is blocked, and does not mean any peer"):
            self.assertEqual(expected(b"name.test", lambda host: ips), ips[:2])
            with self.assertRaises(RequestRefused) as caught:
                expected(b"ads.test", lambda host: ips[2:])
            self.assertEqual(caught.exception.rep, Rep.HOST_UNREACHABLE)
        cases = [(Address(b"", 0), True), (Address(b"", 21), False), (Address(b"a", 0), False)]
        self.assertEqual([any_peer(dst) for dst, _ in cases], [any_host for _, any_host in cases])

    def test_requests_that_name_no_host(self):
        with running() as server:
            for name, host, port, rep in (("neither address nor port: any peer", b"", 0, Rep.SUCCEEDED),
                                          ("a port without an address", b"", 21, Rep.HOST_UNREACHABLE),
                                          ("no name", b"a b", 21, Rep.HOST_UNREACHABLE),
                                          ("it does not exist", b"name.invalid", 21, Rep.HOST_UNREACHABLE)):
                with self.subTest(name), greeted(server.server_address) as sock:
                    sock.sendall(b"\5\2\0\3" + bytes([len(host)]) + host + port.to_bytes(2, "big"))
                    self.assertEqual(Reply.parse(reader_of(sock)).rep, rep)

    def test_the_expected_peer(self):
        cases = [("IPv4", "127.0.0.2"), ("IPv4-mapped", "::ffff:127.0.0.2"), ("any peer", "0.0.0.0"),
                 ("any peer on IPv6", "::"), ("any peer, as a name", b"0.0.0.0")]
        with running() as server:
            for name, host in cases:
                with self.subTest(name), client.bind(server.server_address, (host, 21)) as waiting:
                    self.assertEqual(waiting.bnd[0], "127.0.0.1")
                    with call(waiting.bnd, "127.0.0.2") as peer:
                        sock, who = waiting.accept(PATIENCE_S)
                        with sock:
                            self.assertEqual(who, peer.getsockname())
                            self.assertTrue(is_closed(waiting.bnd), "one peer only")

    def test_IPv6(self):
        need(self, HAS_IPV6, "IPv6")
        for name, here in [("client on IPv6", "::1"), ("client on IPv4", "127.0.0.1"), ("dual-stack", "::")]:
            with self.subTest(name), running(listen=(here,), open=True) as server:
                proxy = ("127.0.0.1", server.server_address[1]) if here == "::" else server.server_address[:2]
                with client.bind(proxy, ("::1", 21)) as waiting, call(waiting.bnd) as peer:
                    self.assertEqual(waiting.bnd[0], "::1")
                    self.assertEqual(tunnel(self, waiting, peer), peer.getsockname()[:2])

    def test_dual_stack_tells_an_IPv4_client_an_IPv4_address(self):
        need(self, HAS_IPV6, "IPv6")
        with running(listen=("::",), open=True) as server:
            with client.bind(("127.0.0.1", server.server_address[1])) as waiting, call(waiting.bnd) as peer:
                self.assertEqual(waiting.bnd[0], "127.0.0.1")
                tunnel(self, waiting, peer)

    def test_unexpected_peers_are_closed_logged_and_counted(self):
        with running() as server, logging_of(self) as logs:
            with client.bind(server.server_address, ("127.0.0.2", 21)) as waiting:
                for _ in range(2):
                    with call(waiting.bnd) as unexpected:
                        self.assertEqual(read_to_end(unexpected), b"")
                        logs.wait("unexpected_peer bnd=.*%s:%d" % unexpected.getsockname())
                with call(waiting.bnd, "127.0.0.2") as peer:
                    tunnel(self, waiting, peer)
            line = logs.wait("session client=")
        self.assertRegex(line, r"dst=127.0.0.2:21 reached=127.0.0.2:\d+ rep=SUCCEEDED up=10 down=10 ")
        self.assertIn("why='2 unexpected peers turned away'", line)

    def test_any_address_of_a_name(self):
        found = [ip_address("127.0.0.9"), ip_address("127.0.0.2")]
        with running() as server, patch("socks5.net.lookups.Names.resolve", return_value=found):
            with client.bind(server.server_address, (b"peer.test", 21)) as waiting, \
                    call(waiting.bnd, "127.0.0.2") as peer:
                self.assertEqual(tunnel(self, waiting, peer), peer.getsockname())

    def test_the_first_that_can_be_reached_and_else_the_most_telling_failure(self):
        self.assertEqual(str(our_end(None, [ip_address("255.255.255.255"), ip_address("127.0.0.2")])[0]), "127.0.0.1")
        two = [ip_address("192.0.2.1"), ip_address("192.0.2.2")]
        for numbers in ((errno.EHOSTUNREACH, errno.ENETUNREACH), (errno.ENETUNREACH, errno.EHOSTUNREACH)):
            with self.subTest(numbers), patch("socks5.commands.bind.socket.socket",
                                              side_effect=[OSError(number, "") for number in numbers]):
                with self.assertRaises(RequestRefused) as caught:
                    our_end(None, two)
                self.assertEqual(caught.exception.rep, Rep.HOST_UNREACHABLE)

    @unittest.skipUnless(HAS_IPV6, "no IPv6 here")
    def test_a_listener_on_IPv6_takes_no_IPv4(self):
        with listen(ip_address("::"), 0, ANY_PORT) as listener:
            self.assertTrue(listener.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY))


class Waiting(unittest.TestCase):
    """Between the two replies."""

    def test_no_peer_connects(self):
        with running(bind_timeout=0.05) as server, logging_of(self) as logs:
            with client.bind(server.server_address, LOCAL) as waiting:
                self.assertEqual(refusal(self, waiting.accept, PATIENCE_S), Rep.TTL_EXPIRED)
                self.assertEqual(waiting.sock.recv(1), b"")
                self.assertTrue(is_closed(waiting.bnd))
            logs.wait("session client=.*rep=TTL_EXPIRED.*ended=refused why='no peer connected within 0.05 s'")

    def test_the_client_leaves(self):
        ways = [("close", socket.socket.close), ("reset", reset),
                ("shutdown", lambda sock: sock.shutdown(socket.SHUT_WR)),
                ("close after early data", lambda sock: (sock.sendall(b"x" * 5000), sock.close()))]
        with running() as server, logging_of(self) as logs:
            for name, leave in ways:
                with self.subTest(name):
                    waiting = client.bind(server.server_address, ("127.0.0.2", 21))
                    with waiting:
                        with call(waiting.bnd) as unexpected:
                            self.assertEqual(read_to_end(unexpected), b"")
                        leave(waiting.sock)
                        wait_until(lambda: is_closed(waiting.bnd), "listener closed")
                        wait_until(lambda: not len(server.sessions), "session over")
                    wait_until(lambda: "session client=" in "".join(logs.output[-1:]))
                    self.assertIn("reached=- rep=SUCCEEDED", logs.output[-1])
                    self.assertIn("ended=client", logs.output[-1])
                    if name != "reset":
                        self.assertRegex(logs.output[-1], r"a peer connected; \d+ unexpected peers? turned away'$")

    def let_it_read(self, bnd):
        """Wait until all that the client sent is read: at the latest when the proxy closes an unexpected peer."""
        with call(bnd) as unexpected:
            self.assertEqual(read_to_end(unexpected), b"")

    def test_what_the_client_sends_early_reaches_the_peer_first(self):
        with running() as server:
            for name, early in [("behind the request", True), ("while waiting", False)]:
                with self.subTest(name), greeted(server.server_address) as sock:
                    request = Request(Cmd.BIND, Address(ip_address("127.0.0.2"), 21)).pack()
                    sock.sendall(request + b"one " if early else request)
                    reply = Reply.parse(reader_of(sock)).bnd
                    bnd = str(reply.host), reply.port
                    sock.sendall(b"two ")
                    self.let_it_read(bnd)
                    with call(bnd, "127.0.0.2") as peer:
                        self.assertEqual(Reply.parse(reader_of(sock)).rep, Rep.SUCCEEDED)
                        sock.sendall(b"three")
                        sock.shutdown(socket.SHUT_WR)
                        self.assertEqual(read_to_end(peer), b"one two three" if early else b"two three")

    def test_early_data_beyond_what_is_kept_is_not_lost(self):
        data = os.urandom(1 << 20)
        with running() as server, client.bind(server.server_address, ("127.0.0.2", 21)) as waiting:
            waiting.sock.settimeout(None)
            waiting.sock.sendall(data[:EARLY_BYTES + 6000])
            self.let_it_read(waiting.bnd)
            sender = threading.Thread(target=waiting.sock.sendall, args=(data[EARLY_BYTES + 6000:],))
            sender.start()
            with call(waiting.bnd, "127.0.0.2") as peer:
                sock, _ = waiting.accept()
                received = reader_of(peer)(len(data))
                sender.join(PATIENCE_S)
                sock.close()
        self.assertTrue(received == data)

    @contextlib.contextmanager
    def rendezvous(self):
        """A Rendezvous, its client's far end, and what wait(0) does in a thread: [result or exception]."""
        with socket.create_server(LOCAL) as listener, socket.create_connection(listener.getsockname()) as far:
            near, _ = listener.accept()
            outcome = []

            def wait():
                try:
                    outcome.append(rendezvous.wait(0))
                except (EOFError, OSError, RequestRefused) as exc:
                    outcome.append(exc)

            with near, Rendezvous(near, [ip_address("127.0.0.1")]) as rendezvous:
                thread = threading.Thread(target=wait, daemon=True)
                thread.start()
                yield rendezvous, far, outcome
                thread.join(PATIENCE_S)
                self.assertFalse(thread.is_alive())

    def test_no_default_timeout_holds_for_the_peer(self):
        """Python would wait for its socket, and with it all other tunnels."""
        with self.rendezvous() as (rendezvous, far, outcome):
            socket.setdefaulttimeout(PATIENCE_S)
            self.addCleanup(socket.setdefaulttimeout, None)
            with call((str(rendezvous.bnd.ip), rendezvous.bnd.port)):
                wait_until(lambda: outcome)
            with outcome[0][0] as remote:
                self.assertEqual(remote.gettimeout(), 0)

    def test_it_reads_no_more_than_it_keeps(self):
        with self.rendezvous() as (rendezvous, far, outcome):
            far.sendall(b"first")
            wait_until(lambda: rendezvous.early == b"first")
            far.sendall(b"x" * (EARLY_BYTES + 5995))
            wait_until(lambda: len(rendezvous.early) == EARLY_BYTES)
            self.assertEqual((outcome, rendezvous.early[:6]), ([], b"firstx"))
            call((str(rendezvous.bnd.ip), rendezvous.bnd.port)).close()
            wait_until(lambda: outcome)
            outcome[0][0].close()
            self.assertEqual(len(rendezvous.early), EARLY_BYTES)
            self.assertEqual(len(rendezvous.client.recv(1 << 16)), 6000, "which are left to the tunnel")

    @unittest.skipUnless(LEFT and hasattr(select, "poll"), "here a FIN behind unread data is not told")
    def test_a_client_that_leaves_behind_too_much_early_data_is_noticed(self):
        with self.rendezvous() as (rendezvous, far, outcome):
            far.sendall(b"x" * (EARLY_BYTES + 6000))
            wait_until(lambda: len(rendezvous.early) == EARLY_BYTES)
            far.close()
        self.assertIsInstance(outcome[0], EOFError)

    def test_without_poll_and_without_RDHUP(self):
        with patch("socks5.commands.bind.LEFT", 0), patch("socks5.commands.bind.new_poll", SelectPoll):
            with self.subTest("client leaves"), self.rendezvous() as (_, far, outcome):
                far.close()
            self.assertIsInstance(outcome[0], EOFError)
            with self.subTest("peer comes"), self.rendezvous() as (rendezvous, far, outcome):
                far.sendall(b"x" * (EARLY_BYTES + 1))
                wait_until(lambda: len(rendezvous.early) == EARLY_BYTES)
                with call((str(rendezvous.bnd.ip), rendezvous.bnd.port)) as peer:
                    wait_until(lambda: outcome)
                    self.assertEqual(str(outcome[0][1]), "%s:%d" % peer.getsockname())
                outcome[0][0].close()

    def test_draining_ends_it(self):
        with running() as server, logging_of(self) as logs:
            with client.bind(server.server_address, LOCAL) as waiting:
                self.assertEqual([session.cmd for session in server.sessions], ["BIND"])
                server.shutdown()
                self.assertEqual(server.drain(0), 1)
                self.assertEqual(waiting.sock.recv(1), b"")
                self.assertTrue(is_closed(waiting.bnd))
            logs.wait("session client=.*ended='?server.stopped")


class Where(unittest.TestCase):
    def test_advertise_is_told_and_every_address_of_ours_listened_on(self):
        with running(advertise=("2001:db8::5", "203.0.113.5")) as server:
            for name, expect, ours, told in [("IPv4", "127.0.0.1", "127.0.0.3", "203.0.113.5"),
                                             ("any peer", "0.0.0.0", "127.0.0.3", "203.0.113.5"),
                                             ("IPv6", "::1", "::1", "2001:db8::5")]:
                if name == "IPv6" and not HAS_IPV6:
                    continue
                with self.subTest(name), client.bind(server.server_address, (expect, 21)) as waiting:
                    self.assertEqual(waiting.bnd[0], told)
                    with call((ours, waiting.bnd[1]), expect if expect != "0.0.0.0" else None) as peer:
                        tunnel(self, waiting, peer)

    def test_otherwise_only_that_address_is_listened_on(self):
        with running() as server, client.bind(server.server_address) as waiting:
            self.assertEqual(waiting.bnd[0], "127.0.0.1")
            self.assertTrue(is_closed(("127.0.0.3", waiting.bnd[1])))

    def test_ports_from_the_range_and_no_others(self):
        first = free_ports(2)
        with running(bind_ports=(first, first + 1)) as server, logging_of(self) as logs:
            with client.bind(server.server_address, LOCAL) as one, bind_from("127.0.0.2", server) as two:
                self.assertEqual({one.bnd[1], two.bnd[1]}, {first, first + 1})
                self.assertEqual(refusal(self, client.bind, server.server_address, LOCAL), Rep.GENERAL_FAILURE)
                logs.wait("no port left for 127.0.0.1: ports %d-%d" % (first, first + 1))
                for waiting in (one, two):
                    with call(waiting.bnd) as peer:             # and we close first: TIME_WAIT is ours
                        sock, _ = waiting.accept(PATIENCE_S)
                        sock.close()
                        self.assertEqual(read_to_end(peer), b"")
            with self.subTest("again at once"):
                wait_until(lambda: not len(server.sessions))
                with client.bind(server.server_address, LOCAL) as one:
                    for _ in range(8):                          # each starts at a random port
                        with bind_from("127.0.0.2", server) as two:
                            self.assertEqual({one.bnd[1], two.bnd[1]}, {first, first + 1})
                        wait_until(lambda: len(server.sessions) == 1)

    def test_ports_that_others_have_are_none_of_ours(self):
        first = free_ports(2)
        with socket.create_server(("127.0.0.1", first)), socket.create_server(("127.0.0.1", first + 1)):
            with running(bind_ports=(first, first + 1)) as server, self.assertLogs("socks5", "INFO") as logs:
                for _ in range(3):                              # and what cannot be had is not counted as taken
                    self.assertEqual(refusal(self, client.bind, server.server_address, LOCAL), Rep.GENERAL_FAILURE)
                wait_until(lambda: sum("ports %d-%d: EADDRINUSE" % (first, first + 1) in line
                                       for line in logs.output) == 3)


def bind_from(source, server):
    """A BIND by a client at this address."""
    real_connect = socket.socket.connect

    def connect(sock, where):
        if where[1] == server.server_address[1]:
            sock.bind((source, 0))
        real_connect(sock, where)

    with patch.object(socket.socket, "connect", connect):
        return client.bind(server.server_address, LOCAL)


class RunningOut(unittest.TestCase):
    @unittest.skipUnless(os.path.isdir("/proc/self/fd"), "counts descriptors in /proc")
    def test_500_ended_in_every_way_leave_nothing(self):
        def finished(waiting):
            with call(waiting.bnd, "127.0.0.2") as peer:
                sock, _ = waiting.accept(PATIENCE_S)
                peer.sendall(b"bye")
                with sock:
                    self.assertEqual(sock.recv(9), b"bye")

        def reset_by_peer(waiting):
            peer = call(waiting.bnd, "127.0.0.2")
            sock, _ = waiting.accept(PATIENCE_S)
            reset(peer)
            with sock:
                self.assertRaises(ConnectionResetError, sock.recv, 1)

        def peer_gone_at_once(waiting):
            reset(call(waiting.bnd, "127.0.0.2"))
            waiting.sock.settimeout(PATIENCE_S)
            with contextlib.suppress(ConnectionResetError):
                read_to_end(waiting.sock)

        def unexpected_peer_then_client_leaves(waiting):
            with call(waiting.bnd) as unexpected, contextlib.suppress(ConnectionResetError):
                unexpected.sendall(b"let me in")
                read_to_end(unexpected)

        ways = [finished, reset_by_peer, peer_gone_at_once, unexpected_peer_then_client_leaves,
                lambda waiting: reset(waiting.sock), lambda waiting: None]
        if LEFT and hasattr(select, "poll"):                # else such a one waits for its time-out
            ways.append(lambda waiting: waiting.sock.sendall(b"x" * 70000))
        with spawned("-q") as server:
            proxy, pid = ("127.0.0.1", server.port), server.process.pid
            with client.bind(proxy, ("127.0.0.2", 21)) as waiting:      # the server has opened what it keeps
                finished(waiting)
            before = descriptors(pid), threads(pid)
            for _ in range(2):
                with contextlib.ExitStack() as stack:
                    batch = [stack.enter_context(client.bind(proxy, ("127.0.0.2", 21))) for _ in range(217)]
                    for number, waiting in enumerate(batch):
                        ways[number % len(ways)](waiting)
                for host in (b"no name", "nobody.invalid"):
                    self.assertRaises(ProxyError, client.bind, proxy, (host, 21))
            self.settles(server, before)
        with spawned("-q", "--bind-timeout", "0.5") as server, contextlib.ExitStack() as stack:
            proxy, pid = ("127.0.0.1", server.port), server.process.pid
            with client.bind(proxy, ("127.0.0.2", 21)) as waiting:
                self.assertRaises(ProxyError, waiting.accept, PATIENCE_S)
            before = descriptors(pid), threads(pid)
            for waiting in [stack.enter_context(client.bind(proxy, ("127.0.0.2", 21))) for _ in range(66)]:
                self.assertRaises(ProxyError, waiting.accept, PATIENCE_S)
            stack.close()
            self.settles(server, before)

    def settles(self, server, before):
        """Not counting threads that the server may keep for the next clients; of each way there are 62."""
        pid = server.process.pid
        wait_until(lambda: descriptors(pid) <= before[0] and threads(pid) <= before[1] + 40,
                   "back to %d descriptors and about %d threads" % before)

    @unittest.skipUnless(sys.platform == "linux", "sets a limit for the server")
    def test_no_descriptors(self):
        import resource

        def limit():
            resource.setrlimit(resource.RLIMIT_NOFILE, (40, 40))

        with spawned("--max-sessions", "1000", "--handshake-timeout", "600", preexec_fn=limit) as server:
            proxy, before = ("127.0.0.1", server.port), descriptors(server.process.pid)
            with contextlib.ExitStack() as stack:
                waiting = stack.enter_context(client.bind(proxy, LOCAL))
                clients = []
                while descriptors(server.process.pid) < 40:
                    clients.append(stack.enter_context(greeted(proxy)))
                with self.subTest("to listen"):
                    self.assertEqual(ask(clients[-1], Cmd.BIND, "127.0.0.1", 0).rep, Rep.GENERAL_FAILURE)
                    self.assertEqual(clients[-1].recv(1), b"")
                    clients.pop().close()
                    wait_until(lambda: descriptors(server.process.pid) < 40)
                    clients.append(stack.enter_context(greeted(proxy)))
                with self.subTest("to accept"):
                    with contextlib.suppress(ConnectionResetError):     # when the listener is closed that soon
                        stack.enter_context(call(waiting.bnd))
                    self.assertEqual(refusal(self, waiting.accept, PATIENCE_S), Rep.GENERAL_FAILURE)
                    server.wait_line(r"cmd=BIND .* why='cannot accept: EMFILE'")
            wait_until(lambda: descriptors(server.process.pid) <= before, "they have gone")
            with self.subTest("it goes on afterwards"), client.bind(proxy, LOCAL) as waiting, call(waiting.bnd) as peer:
                tunnel(self, waiting, peer)


# ---- two hosts ---------------------------------------------------------------------------------------------------

class Hosts(TwoHosts, unittest.TestCase):
    """The proxy and a client on its loopback on one host, the peer on another."""

    def test_a_loopback_client_is_told_an_address_that_the_peer_can_reach(self):
        with self.proxy() as server:
            for version in [4] + [6] * HAS_IPV6:
                with self.subTest("IPv%d" % version):
                    with self.near(client.bind, ("127.0.0.1", server.port), (FAR[version], 21)) as waiting:
                        self.assertEqual(waiting.bnd[0], NEAR[version])
                        with self.near(call, waiting.bnd) as unexpected:
                            self.assertEqual(read_to_end(unexpected), b"")
                        with self.far(call, waiting.bnd) as peer:
                            self.assertEqual(tunnel(self, waiting, peer), peer.getsockname()[:2])

    def test_no_way_to_the_peer(self):
        with self.proxy() as server:
            for name, host in [("IPv4", "192.0.2.1")] + [("IPv6", "2001:db8:99::1")] * HAS_IPV6:
                with self.subTest(name):
                    rep = refusal(self, self.near, client.bind, ("127.0.0.1", server.port), (host, 21))
                    self.assertEqual(rep, Rep.NETWORK_UNREACHABLE)

    def test_for_any_peer_BND_is_the_address_to_which_the_client_connected(self):
        for version in [4] + [6] * HAS_IPV6:
            with self.subTest("IPv%d" % version), self.proxy("-l", NEAR[version], "--open") as server:
                with self.far(client.bind, (NEAR[version], server.port)) as waiting:
                    self.assertEqual(waiting.bnd[0], NEAR[version])
                    with self.far(call, waiting.bnd) as peer:
                        tunnel(self, waiting, peer)


# ---- real programs -----------------------------------------------------------------------------------------------

FTP_SERVER = """
import sys
from pyftpdlib.authorizers import DummyAuthorizer
from pyftpdlib.handlers import FTPHandler
from pyftpdlib.servers import FTPServer
FTPHandler.authorizer = DummyAuthorizer()
FTPHandler.authorizer.add_anonymous(sys.argv[2], perm="elradfmw")
server = FTPServer((sys.argv[1], 0), FTPHandler)
print(server.address[1], flush=True)
server.serve_forever()
"""

NODE_BIND = """
const { SocksClient } = require(process.argv[1] + '/socks');
const client = new SocksClient({
  command: 'bind', proxy: { host: '127.0.0.1', port: +process.argv[2], type: 5 },
  destination: { host: '127.0.0.1', port: 0 } });
client.on('error', error => { console.log('error ' + error.message); process.exit(1); });
client.on('bound', info => console.log(info.remoteHost.host + ' ' + info.remoteHost.port));
client.on('established', info => {
  console.log(info.remoteHost.host + ' ' + info.remoteHost.port);
  info.socket.pipe(info.socket);
  info.socket.resume();
});
client.connect();
"""

# libc's accept() by its name: CPython calls accept4(), which Dante does not know.
SOCKSIFIED = """
import ctypes, socket, sys
listener = socket.socket()
listener.bind(("0.0.0.0", 0))
listener.listen(1)
print("%s %d" % listener.getsockname(), flush=True)
size = ctypes.c_uint(128)
fd = ctypes.CDLL(None).accept(listener.fileno(), ctypes.create_string_buffer(128), ctypes.byref(size))
sock = socket.socket(fileno=fd)
sock.sendall(sock.recv(100))
sock.recv(1)
"""


class ActiveFTP(ftplib.FTP):
    """An FTP client in active mode that has a SOCKS5 proxy between itself and the server, both ways."""

    def __init__(self, proxy, host, port):
        super().__init__(timeout=PATIENCE_S)
        self.proxy = proxy
        self.host, self.port = host, port
        self.sock = client.connect(proxy, (host, port))
        self.sock.settimeout(PATIENCE_S)
        self.af = socket.AF_INET6 if ":" in host else socket.AF_INET
        self.file = self.sock.makefile("r", encoding=self.encoding)
        self.welcome = self.getresp()
        self.set_pasv(False)

    def makeport(self):
        waiting = client.bind(self.proxy, (self.host, self.port))
        try:
            (self.sendport if self.af == socket.AF_INET else self.sendeprt)(*waiting.bnd)
        except ftplib.Error:
            waiting.close()
            raise
        return waiting


class Programs(Case):
    @contextlib.contextmanager
    def program(self, *args, **kwargs):
        """A program that tells by lines on stdout what we need to know."""
        process = subprocess.Popen(list(map(str, args)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                                   **kwargs)
        try:
            yield process
        finally:
            process.kill()
            process.communicate()

    def ftp_server(self, host="127.0.0.1"):
        python = os.environ.get("SOCKS5_VENV_PYTHON", sys.executable)
        have = subprocess.run([python, "-c", "import pyftpdlib"], capture_output=True).returncode == 0
        need(self, have, "pyftpdlib (in SOCKS5_VENV_PYTHON)")
        return self.program(python, "-W", "ignore", "-c", FTP_SERVER, host, self.new_folder())

    def test_FTP_in_active_mode(self):
        data = os.urandom(3000000)
        for name, host in [("PORT", "127.0.0.1")] + [("EPRT", "::1")] * HAS_IPV6:
            with self.subTest(name), self.ftp_server(host) as server, running() as proxy:
                with ActiveFTP(proxy.server_address, host, int(server.stdout.readline())) as ftp:
                    ftp.login()
                    ftp.storbinary("STOR file", io.BytesIO(data))
                    self.assertEqual(ftp.nlst(), ["file"])
                    down = io.BytesIO()
                    ftp.retrbinary("RETR file", down.write)
                    self.assertTrue(down.getvalue() == data)
                    self.assertEqual(ftp.retrbinary("RETR file", down.write)[:3], "226")

    def test_node_socks(self):
        node = need_program(self, "node")
        modules = os.environ.get("SOCKS5_NODE_MODULES", "")
        need(self, os.path.isdir(os.path.join(modules, "socks")), "Node's socks (in SOCKS5_NODE_MODULES)")
        with running() as proxy, self.program(node, "-e", NODE_BIND, modules, proxy.server_address[1]) as program:
            host, port = program.stdout.readline().split()
            with call((host, int(port))) as peer:
                self.assertEqual(program.stdout.readline().split(), ["127.0.0.1", str(peer.getsockname()[1])])
                peer.sendall(b"there and back")
                self.assertEqual(peer.recv(100), b"there and back")

    def test_dante_socksify(self):
        socksify = need_program(self, "socksify")
        with running() as proxy, tempfile.NamedTemporaryFile("w", suffix=".conf") as config:
            config.write("""route {
                from: 0.0.0.0/0 to: 0.0.0.0/0 via: 127.0.0.1 port = %d
                protocol: tcp
                proxyprotocol: socks_v5
                method: none
                }
                """ % proxy.server_address[1])
            config.flush()
            env = dict(os.environ, SOCKS_CONF=config.name)
            with self.program(socksify, sys.executable, "-c", SOCKSIFIED, env=env) as program:
                host, port = program.stdout.readline().split()
                with call((host, int(port))) as peer:
                    self.assertEqual([session.cmd for session in proxy.sessions], ["BIND"])
                    peer.sendall(b"there and back")
                    self.assertEqual(peer.recv(100), b"there and back")
