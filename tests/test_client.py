"""client.py against our server, and against proxies made of prepared bytes for what ours never says."""
import contextlib
import errno
import socket
import threading
import time
import unittest
import warnings
from functools import partial

from socks5 import client
from socks5.protocol.codes import Rep
from socks5.protocol.errors import ProxyError, SocksError
from socks5.protocol.messages import Address, Datagram

from .support import HAS_IPV6, PATIENCE_S, closed_port, echoes, read_to_end, refusal, running, target, udp_socket
from .test_connect import silent

OK = bytes.fromhex("05 00 00 01 7f000001 1f90")         # 127.0.0.1:8080
FREE = bytes.fromhex("05 00")                           # METHOD 00


@contextlib.contextmanager
def script(*turns):
    """A proxy that answers the nth message with turns[n], then sends EOF. Yields its (host, port) and the messages."""
    received = []

    def serve(connection):
        for turn in turns:
            received.append(connection.recv(4096))
            connection.sendall(turn)
        connection.shutdown(socket.SHUT_WR)
        received.append(read_to_end(connection))

    with target(serve) as proxy:
        yield proxy, received


class ThroughOurServer(unittest.TestCase):
    def test_connect_gives_a_plain_blocking_socket(self):
        for ours, host in [("127.0.0.1", "127.0.0.1"), ("127.0.0.1", "localhost"), ("::1", "::1")][:2 + HAS_IPV6]:
            with self.subTest(host), running(listen=(ours,)) as server, target(host=ours) as there:
                with client.connect(server.server_address[:2], (host, there[1])) as sock:
                    self.assertIsNone(sock.gettimeout())
                    sock.sendall(b"ping")
                    sock.shutdown(socket.SHUT_WR)
                    self.assertEqual(read_to_end(sock), b"ping")

    def test_user_and_password_as_text_or_bytes(self):
        with target() as there, running(user=(("frédéric", "p:w"),)) as server:
            for name, user in [("text", ("frédéric", "p:w")), ("bytes", ("frédéric".encode(), b"p:w"))]:
                with self.subTest(name), client.connect(server.server_address, there, user) as sock:
                    self.assertTrue(echoes(sock))
            with self.subTest("wrong"), self.assertRaisesRegex(ProxyError, "refused the user name") as caught:
                with self.assertLogs("socks5", "WARNING"):
                    client.connect(server.server_address, there, ("frédéric", "other"))
            self.assertIsNone(caught.exception.rep)
            with self.subTest("none"), self.assertRaisesRegex(ProxyError, "no offered method; it may require"):
                client.connect(server.server_address, there)

    def test_password_stays_here_when_the_proxy_asks_for_none(self):
        with script(FREE, OK) as (proxy, received):
            client.connect(proxy, ("192.0.2.1", 80), ("me", "hunter2")).close()
        self.assertEqual(received[0].hex(), "05020002")
        self.assertNotIn(b"hunter2", b"".join(received))

    def test_a_refusal_carries_rep_wording_and_errno(self):
        with running() as server, self.assertRaises(ProxyError) as caught:
            client.connect(server.server_address, ("127.0.0.1", closed_port()))
        error = caught.exception
        self.assertIsInstance(error, SocksError)
        self.assertIsInstance(error, OSError)
        self.assertEqual((error.rep, error.errno), (Rep.CONNECTION_REFUSED, errno.ECONNREFUSED))
        self.assertEqual(str(error), "the proxy answered X'05', Connection refused")

    def test_a_proxy_that_is_silent_and_sockets_without_a_time_limit(self):
        port, began = closed_port(), time.monotonic()
        with silent("127.0.0.1", port):
            for ask in (partial(client.connect, destination=("192.0.2.1", 80)), client.bind, client.associate):
                self.assertRaises(socket.timeout, ask, ("127.0.0.1", port), timeout=0.05)
        self.assertLess(time.monotonic() - began, PATIENCE_S / 2)
        with running() as server, target() as there, client.connect(server.server_address, there) as sock, \
                client.bind(server.server_address, timeout=9) as waiting:
            self.assertEqual((sock.gettimeout(), waiting.sock.gettimeout()), (None, None))

    def test_bind(self):
        with running() as server, client.bind(server.server_address, ("127.0.0.1", 0)) as waiting:
            with socket.create_connection(waiting.bnd, PATIENCE_S) as peer:
                peer.sendall(b"hello")
                sock, who = waiting.accept(PATIENCE_S)
                self.assertEqual(who, peer.getsockname())
                waiting.close()                         # no longer its socket
                with sock:
                    self.assertEqual(sock.recv(9), b"hello")
                    sock.sendall(b"you")
                    self.assertEqual(peer.recv(9), b"you")

    def test_a_peer_that_does_not_come_in_time(self):
        with running(bind_timeout=2) as server, client.bind(server.server_address[:2], ("127.0.0.1", 0)) as waiting:
            self.assertRaises(socket.timeout, waiting.accept, 0.05)


class AgainstPreparedBytes(unittest.TestCase):
    def test_what_stands_behind_the_reply_is_the_tunnels(self):
        for name, turns in [("in one segment", (FREE, OK + b"220 hello")), ("at once", (FREE + OK + b"220 hello",))]:
            with self.subTest(name), script(*turns) as (proxy, _), client.connect(proxy, ("192.0.2.1", 21)) as sock:
                self.assertEqual(read_to_end(sock), b"220 hello")

    def test_both_replies_of_a_bind_and_the_payload_in_one_segment(self):
        peer = bytes.fromhex("05 00 00 01 c0000207 0015")
        with script(FREE, OK + peer + b"data") as (proxy, _), client.bind(proxy, ("192.0.2.7", 21)) as waiting:
            self.assertEqual(waiting.bnd, ("127.0.0.1", 8080))
            sock, who = waiting.accept(PATIENCE_S)
            with sock:
                self.assertEqual((who, read_to_end(sock)), (("192.0.2.7", 21), b"data"))

    def test_every_rep(self):
        for rep in range(1, 256):
            with self.subTest(rep=rep), script(FREE, bytes([5, rep]) + OK[2:]) as (proxy, _):
                with self.assertRaises(ProxyError) as caught:
                    client.connect(proxy, ("192.0.2.1", 80))
                self.assertEqual(caught.exception.rep, rep)
                self.assertIn("unassigned" if rep > 8 else Rep(rep).phrase, str(caught.exception))

    def test_a_second_reply_that_refuses(self):
        with script(FREE, OK + b"\5\6" + OK[2:]) as (proxy, _), client.bind(proxy) as waiting:
            self.assertEqual(refusal(self, waiting.accept, PATIENCE_S), Rep.TTL_EXPIRED)

    def test_what_is_no_answer(self):
        cases = [("silence", (b"",), "closed the connection"), ("HTTP", (b"HTTP/1.0 400 Bad Request\r\n",), "VER 0x48"),
                 ("no method", (b"\5\xff",), "no offered method"), ("a method not offered", (b"\5\2",), "no offered"),
                 ("half a reply", (FREE, OK[:6]), "closed the connection"),
                 ("an unknown ATYP", (FREE, b"\5\0\0\2\0\0\0\0\0\0"), "ATYP 0x02")]
        for name, turns, words in cases:
            with self.subTest(name), script(*turns) as (proxy, _):
                with self.assertRaisesRegex(ProxyError, words) as caught:
                    client.connect(proxy, ("192.0.2.1", 80))
                self.assertIsNone(caught.exception.rep)

    def test_one_deadline_however_slowly_the_bytes_come(self):
        """Each byte alone is in time; all of them together are not."""
        done = threading.Event()

        def serve(connection):
            for byte in FREE + OK:
                if done.wait(0.1):
                    return
                connection.sendall(bytes([byte]))

        with target(serve) as proxy, self.assertRaises(socket.timeout):
            try:
                client.connect(proxy, ("192.0.2.1", 80), timeout=0.5)
            finally:
                done.set()

    def test_destinations_as_they_go_out(self):
        cases = [("IPv4", "192.0.2.1", "01c0000201"), ("IPv6", "2001:db8::1", "0420010db8" + 11 * "00" + "01"),
                 ("name", "example.com", "030b" + b"example.com".hex()), ("bytes", b"\xff", "0301ff"),
                 ("IDNA", "bücher.example", "0315" + b"xn--bcher-kva.example".hex())]
        for name, host, packed in cases:
            with self.subTest(name), script(FREE, OK) as (proxy, received):
                client.connect(proxy, (host, 80)).close()
                self.assertEqual(received[1].hex(), "050100" + packed + "0050")

    def test_what_fits_into_no_message_is_a_ValueError_and_leaves_nothing_open(self):
        for name, host in [("empty", ""), ("long", "a" * 256), ("empty label", "ü..b")]:
            with self.subTest(name), script(FREE) as (proxy, _), warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                with self.assertRaises(ValueError):
                    client.connect(proxy, (host, 80))
                self.assertEqual(caught, [])            # no ResourceWarning of a socket that was left to the collector

    def test_unspecified_BND_is_where_the_proxy_is(self):
        for name, reply in [("IPv4", "05 00 00 01 00000000 1f90"), ("IPv6", "05 00 00 04" + 32 * "0" + "1f90")]:
            with self.subTest(name), script(FREE, bytes.fromhex(reply)) as (proxy, _), client.bind(proxy) as waiting:
                self.assertEqual(waiting.bnd, ("127.0.0.1", 8080))

    def test_a_proxy_that_does_not_listen(self):
        with self.assertRaises(ConnectionRefusedError):
            client.connect(("127.0.0.1", closed_port()), ("192.0.2.1", 80))


class Datagrams(unittest.TestCase):
    """associate() with a relay of the test's own; udp.py's tests do the rest."""

    @contextlib.contextmanager
    def association(self):
        with udp_socket() as relay:
            end = threading.Event()

            def serve(connection):
                connection.recv(4096)
                connection.sendall(FREE)
                self.request = connection.recv(4096)
                connection.sendall(bytes.fromhex("05 00 00 01 00000000") + relay.getsockname()[1].to_bytes(2, "big"))
                end.wait(PATIENCE_S)

            with target(serve) as proxy, client.associate(proxy, timeout=PATIENCE_S) as udp:
                udp.settimeout(PATIENCE_S)
                yield udp, relay, end
                end.set()

    def test_both_ways(self):
        with self.association() as (udp, relay, _):
            self.assertEqual(self.request.hex(), "05030001000000000000")
            udp.sendto(b"question", ("192.0.2.53", 53))
            raw, back = relay.recvfrom(4096)
            self.assertEqual(raw.hex(), "00000001c00002350035" + b"question".hex())
            relay.sendto(Datagram(Address(b"ns.example", 53), b"answer").pack(), back)
            self.assertEqual(udp.recvfrom(), (b"answer", ("ns.example", 53)))

    def test_fragments_go_out_numbered_and_are_passed_over_coming_in(self):
        with self.association() as (udp, relay, _):
            udp.sendto(b"abcdefg", ("192.0.2.1", 9), fragments=3)
            sent = []
            for _ in range(3):
                raw, back = relay.recvfrom(4096)
                sent.append(Datagram.parse(raw))
            self.assertEqual([(part.frag, part.data) for part in sent], [(1, b"abc"), (2, b"def"), (0x83, b"g")])
            for raw in (b"", b"\0\0\0\1", b"\0\0\0\7" + bytes(9), Datagram(sent[0].dst, b"part", 1).pack(),
                        Datagram(sent[0].dst, b"whole").pack()):
                relay.sendto(raw, back)
            self.assertEqual(udp.recvfrom()[0], b"whole")

    def test_the_end_of_the_association_and_the_end_of_patience_are_told_apart(self):
        with self.association() as (udp, _, end):
            udp.settimeout(0.05)
            self.assertRaises(socket.timeout, udp.recvfrom)
            end.set()
            udp.settimeout(PATIENCE_S)
            self.assertRaisesRegex(ProxyError, "ended the association", udp.recvfrom)

    def test_from_elsewhere_nothing_comes_in(self):
        with self.association() as (udp, relay, _), udp_socket() as stranger:
            stranger.sendto(Datagram(Address(b"x", 1), b"forged").pack(), udp.sock.getsockname())
            relay.sendto(Datagram(Address(b"x", 1), b"real").pack(), udp.sock.getsockname())
            self.assertEqual(udp.recvfrom()[0], b"real")
