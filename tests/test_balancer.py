"""server/newcomers.py: behind a load balancer, everything sees the client that the PROXY header names."""
import contextlib
import logging
import re
from ipaddress import ip_address, ip_network
from unittest import mock

import socks5
from socks5.config import Config, ConfigError
from socks5.net import listeners
from socks5.protocol.codes import Cmd, Rep
from socks5.protocol.messages import Address, Datagram, Greeting, Login, Reply, Request, Selection
from socks5.protocol.proxy import SIGNATURE, ProxyHeader
from socks5.protocol.trace import Trace
from socks5.relay.watch import Watch
from socks5.server import newcomers
from socks5.server.newcomers import client_of
from tests import support
from tests.support import (HAS_IPV6, ask, closed_port, dial, echoes, logging_of, need, negotiate, read_to_end,
                           reader_of, run_cli, running, target, threads, udp_socket, wait_until)

HERE = (ip_network("127.0.0.1"),)           # the load balancer; 127.0.0.2 and the like are other clients
LOCAL = ProxyHeader(2).pack()
GREETING = Greeting(b"\0").pack()


def header(client="192.0.2.7", port=51000):
    there = "2001:db8::9" if ":" in client else "198.51.100.9"
    return ProxyHeader(2, Address(ip_address(client), port), Address(ip_address(there), 1080)).pack()


def line(client="192.0.2.7", port=51000):
    return b"PROXY TCP%d %s %s %d 1080\r\n" % (
        ip_address(client).version, client.encode(), b"198.51.100.9" if "." in client else b"2001:db8::9", port)


def connect_to(host, port):
    return Request(Cmd.CONNECT, Address(ip_address(host), port)).pack()


class Case(support.Case):
    def setUp(self):
        self.logs = self.enter(logging_of(self, "DEBUG"))
        self.addCleanup(logging.getLogger("socks5").info, "the end")        # for a test that has cleared them
        self.echo = self.enter(target())

    def serve(self, handler=socks5.Handler, server_class=socks5.Server, **options):
        options.setdefault("proxy_protocol", HERE)
        if not {"user", "allow_from", "rules"} & set(options):
            options.setdefault("open", True)
        self.server = self.enter(running(handler, server_class, **options))

    def dial(self, said=b"", source=None):
        sock = self.enter(dial(self.server.server_address, source=source))
        sock.sendall(said)
        return sock

    def greeted(self, said=b"", source=None, user=None):
        sock = self.dial(said, source)
        negotiate(sock, user)
        return sock

    def wait_line(self, text):
        return self.logs.wait(re.escape(text))

    def refused(self, sock, why):
        with contextlib.suppress(ConnectionError):
            self.assertEqual(read_to_end(sock), b"")
        sock.close()                                        # or the server lingers
        return self.wait_line(why)


class ReadsIt(Case):
    def test_everything_at_once_and_byte_by_byte(self):
        self.serve()
        for number, (name, raw) in enumerate((
                ("v1", line("127.0.0.9")), ("v1 IPv6", line("::1")), ("v2", header("127.0.0.9")),
                ("v2 IPv6", header("::1")), ("v2 IPv4-mapped", header("::ffff:127.0.0.9")),
                ("v2, 65,535 bytes of addresses and TLVs", SIGNATURE + b"\x21\x11\xff\xff" + b"\x7f\0\0\x09" * 3
                 + b"\xff" * (65535 - 12)))):
            for pieces in (False, True):
                with self.subTest(name, pieces=pieces):
                    del self.logs.records[:]
                    raw_all = raw + GREETING + connect_to(*self.echo) + b"data behind it"
                    sock = self.dial()
                    if pieces:
                        for at in range(0, len(raw_all), 1 if len(raw) < 200 else 4999):
                            sock.sendall(raw_all[at:at + (1 if len(raw) < 200 else 4999)])
                    else:
                        sock.sendall(raw_all)
                    read = reader_of(sock)
                    self.assertEqual(Selection.parse(read).method, 0)
                    self.assertEqual(Reply.parse(read).rep, Rep.SUCCEEDED)
                    self.assertEqual(read(14), b"data behind it")
                    sock.close()
                    client = "[::1]" if name.endswith("IPv6") else "127.0.0.9"
                    self.assertIn(" rep=SUCCEEDED up=14 ", self.wait_line("session client=%s:" % client))
                    self.assertIn("proxied client=%s:" % client, self.wait_line("balancer=127.0.0.1:"))

    def test_required_from_the_load_balancer(self):
        self.serve()
        for name, said, why in (
                ("a greeting", GREETING, "why='no PROXY header: first byte 0x05'"),
                ("HTTP", b"GET / HTTP/1.0\r\n\r\n", "why='no PROXY header: first byte 0x47'"),
                ("too long a line", b"PROXY UNKNOWN" + b"x" * 200, "no line of up to 107 bytes"),
                ("v1 of two families", b"PROXY TCP4 ::1 ::1 1 1\r\n" + GREETING, "malformed PROXY header"),
                ("v2, a datagram's", SIGNATURE + b"\x21\x12\0\x0c" + bytes(12), "FAM 0x12, LEN 12"),
                ("v2, from nowhere", SIGNATURE + b"\x21\x11\0\x0c" + bytes(12), "0.0.0.0 is no client"),
                ("two headers", header() + header(), "a PROXY header, which only"),
                ("a header and HTTP", header() + b"GET / HTTP/1.0\r\n\r\n", "an HTTP client")):
            with self.subTest(name):
                sock = self.dial(said)
                with contextlib.suppress(ConnectionError):
                    self.assertIn(read_to_end(sock)[:4], (b"", b"HTTP"))
                sock.close()
                self.wait_line(why)
        wait_until(lambda: not len(self.server.sessions))

    def test_an_error_from_others(self):
        self.serve()
        for raw in (header(), line(), LOCAL):
            self.refused(self.dial(raw + GREETING, "127.0.0.2"), "a PROXY header, which only a source in")
            del self.logs.records[:]
        sock = self.greeted(source="127.0.0.2")
        self.assertEqual(ask(sock, Cmd.CONNECT, *self.echo).rep, Rep.SUCCEEDED)

    def test_without_the_option_every_header_is_refused(self):
        self.serve(proxy_protocol=())
        self.refused(self.dial(header() + GREETING), "a PROXY header, which only a source in")

    def test_the_connection_is_the_load_balancers_own(self):
        self.serve()
        for raw in (LOCAL, b"PROXY UNKNOWN\r\n", SIGNATURE + b"\x21\0\0\3abc"):
            sock = self.greeted(raw)
            self.assertEqual(ask(sock, Cmd.CONNECT, *self.echo).rep, Rep.SUCCEEDED)
            sock.close()
            self.wait_line("INFO session client=127.0.0.1:")
            del self.logs.records[:]

    def test_a_health_check_is_no_news(self):
        self.serve()
        for said in (b"", LOCAL, SIGNATURE[:5]):
            self.dial(said).close()
            self.wait_line("DEBUG session client=127.0.0.1:")
            del self.logs.records[:]
        self.dial(header()).close()
        self.wait_line("INFO session client=192.0.2.7:")
        wait_until(lambda: not len(self.server.sessions))

    def test_within_the_handshakes_deadline(self):
        self.serve(handshake_timeout=0.3)
        for said in (header()[:-1], line()[:-1], header()):
            self.refused(self.dial(said), "ended=handshake-timeout")
            del self.logs.records[:]

    def test_the_trace(self):
        blocks = []
        self.serve()
        self.server.trace = Trace(lambda block: blocks.append(" ".join(block)))
        self.greeted(header())
        self.assertRegex(blocks[1], r"#1 127.0.0.1:\d+ is a load balancer: its PROXY header names 192.0.2.7:51000")


class SeesTheClient(Case):
    def reply(self, raw, host, port, user=None):
        return ask(self.greeted(raw, user=user), Cmd.CONNECT, host, port).rep

    def test_default_rules(self):
        self.serve()
        self.assertEqual(self.reply(header("192.0.2.7"), *self.echo), Rep.NOT_ALLOWED)
        self.assertEqual(self.reply(header("127.0.0.9"), *self.echo), Rep.SUCCEEDED)

    def test_a_loopback_address_of_another_machine_is_not_ours(self):
        there = ("192.0.2.1", 4000)
        for host, balancer, client in (("127.0.0.9", there, there), ("::1", there, there),
                                       ("::ffff:127.0.0.9", there, there),
                                       ("127.0.0.9", ("127.0.0.1", 4000), ("127.0.0.9", 5)),
                                       ("192.0.2.7", there, ("192.0.2.7", 5)),
                                       ("2001:db8::7", there, ("2001:db8::7", 5, 0, 0))):
            with self.subTest(host, balancer=balancer):
                found = client_of(ProxyHeader(2, Address(ip_address(host), 5), None), balancer)
                self.assertEqual(found, client)
        self.assertEqual(client_of(ProxyHeader(1), there), there)

    def test_allow_from_and_the_hook(self):
        asked = []

        class Asked(socks5.Server):
            def verify_request(self, request, client_address):
                asked.append(client_address)
                return super().verify_request(request, client_address)

        class Seen(socks5.Handler):
            def setup(self):
                super().setup()
                asked.append(self.client_address)

        self.serve(Seen, Asked, allow_from=(ip_network("127.0.0.8/29"),))
        self.refused(self.dial(header("192.0.2.7", 1) + GREETING), "why='not in --allow-from'")
        self.assertEqual(self.reply(header("127.0.0.9", 2), *self.echo), Rep.SUCCEEDED)
        self.refused(self.dial(LOCAL), "refused client=127.0.0.1:")
        self.assertEqual(asked[:3], [("192.0.2.7", 1), ("127.0.0.9", 2), ("127.0.0.9", 2)])
        self.assertEqual(asked[3][0], "127.0.0.1")

    def test_a_hook_that_fails_costs_its_client_only(self):
        self.serve()
        with mock.patch.object(self.server, "verify_request", side_effect=ZeroDivisionError):
            self.refused(self.dial(header() + GREETING), "ERROR bug while serving 192.0.2.7:51000")
        self.wait_line("ended=server why='a bug of the server'")
        self.greeted(header())

    def test_a_limit_for_each_client(self):
        self.serve(max_per_client=2)
        clients = "192.0.2.7", "192.0.2.7", "192.0.2.8", "192.0.2.8", "127.0.0.9"
        held = [self.greeted(header(client)) for client in clients]
        self.refused(self.dial(header("192.0.2.7", 99)), "why='max-per-client 2 reached by 192.0.2.7'")
        for raw in (LOCAL, LOCAL, header("127.0.0.9")):
            self.greeted(raw)
        held.pop().close()
        held[0].close()
        wait_until(lambda: self.server.sessions._counts.of("192.0.2.7") == 1)
        self.greeted(header("192.0.2.7"))
        self.doCleanups()
        counts = self.server.sessions._counts
        self.assertEqual([counts.of(origin) for origin in ("192.0.2.7", "192.0.2.8", "127.0.0.1", "127.0.0.9",
                                                           newcomers.UNKNOWN)], [0] * 5)
        self.assertEqual((counts.live(), self.server.sessions._weights.live()), (0, 0))

    def test_one_client_does_not_take_the_last_tenth(self):
        self.serve(max_sessions=20)
        held = [self.greeted(header("192.0.2.7", 1 + number)) for number in range(18)]
        for sock in held:
            self.assertEqual(ask(sock, Cmd.CONNECT, "127.0.0.1", closed_port()).rep, Rep.NOT_ALLOWED)
            sock.close()
        wait_until(lambda: not len(self.server.sessions))
        held = [self.greeted(header("127.0.0.9", 1 + number)) for number in range(18)]
        for sock in held:
            self.assertEqual(ask(sock, Cmd.CONNECT, *self.echo).rep, Rep.SUCCEEDED)
        self.refused(self.dial(header("127.0.0.9", 99)), "max-sessions 20 reached")
        wait_until(lambda: len(self.server.sessions) == 18, "the place of the refused one is free")
        self.assertEqual(self.reply(header("127.0.0.8"), *self.echo), Rep.SUCCEEDED)
        self.assertTrue(all(map(echoes, held)))

    def test_wrong_passwords(self):
        self.serve(user=(("alice", "secret"),))
        for client in ("192.0.2.7", "192.0.2.8"):
            sock = self.dial(header(client) + Greeting(b"\2").pack() + Login(b"alice", b"wrong").pack())
            self.assertEqual(read_to_end(sock), b"\5\2\1\1")
            self.wait_line("auth_failed client=%s user='alice'" % client)

    def test_the_filter_of_udp(self):
        self.serve()
        bnd = ask(self.greeted(header("127.0.0.9")), Cmd.UDP_ASSOCIATE, "0.0.0.0", 0).bnd
        with udp_socket() as remote, udp_socket("127.0.0.9") as mine, udp_socket() as others:
            to = Address(ip_address("127.0.0.1"), remote.getsockname()[1])
            others.sendto(Datagram(to, b"not mine").pack(), (str(bnd.host), bnd.port))
            mine.sendto(Datagram(to, b"mine").pack(), (str(bnd.host), bnd.port))
            self.assertEqual(remote.recv(100), b"mine")

    def test_a_client_over_the_other_family_is_given_an_address_that_it_reaches(self):
        """The load balancer reaches us over IPv4, on loopback."""
        need(self, HAS_IPV6, "IPv6")
        self.serve(allow_from=(ip_network("::/0"), ip_network("0.0.0.0/0")), open=True)
        for client in ("::1", "127.0.0.9"):
            with self.subTest(client):
                reply = ask(self.greeted(header(client)), Cmd.UDP_ASSOCIATE, "0.0.0.0", 0)
                self.assertEqual((reply.rep, str(reply.bnd.host)),
                                 (Rep.SUCCEEDED, "::1" if client == "::1" else "127.0.0.1"))


class Silent(Case):
    """A header is the load balancer's word: a client that has said nothing costs no thread."""

    def test_they_wait_in_the_relay_loop(self):
        self.enter(mock.patch.object(newcomers, "MANY_NEGOTIATING", 5))
        self.serve()
        before = threads()
        silent = [self.dial(header(port=number)) for number in range(1, 101)]
        wait_until(lambda: self.waiting() >= 95)
        self.assertLess(threads() - before, 50)             # acceptors, and the few that came first
        for sock in silent:
            negotiate(sock)
            self.assertEqual(ask(sock, Cmd.CONNECT, *self.echo).rep, Rep.NOT_ALLOWED)
        self.assertEqual(self.waiting(), 0)

    def test_one_that_leaves_and_one_without_a_header(self):
        self.enter(mock.patch.object(newcomers, "MANY_NEGOTIATING", -1))
        self.enter(mock.patch.object(listeners, "DEFER_ACCEPT_S", 0))
        self.serve()
        sock = self.dial()
        wait_until(lambda: self.waiting() == 1)             # for the header
        sock.sendall(header())
        wait_until(lambda: any("proxied" in line for line in self.logs.output) and self.waiting() == 1)
        sock.close()                                        # and for the greeting
        self.wait_line("INFO session client=192.0.2.7:51000")
        wait_until(lambda: not len(self.server.sessions))

    def waiting(self):
        return sum(isinstance(watched, Watch) for watched in list(self.server.relay_loop()._watched.values()))


class Options(support.Case):
    def test_loopback_is_reached_by_all_clients_of_the_load_balancer(self):
        with self.assertRaises(ConfigError) as caught:
            Config(proxy_protocol=HERE)
        self.assertIn("--listen 127.0.0.1", str(caught.exception))
        for safe in ({"user": (("a", "b"),)}, {"open": True}, {"allow_from": HERE}):
            self.assertEqual(Config(proxy_protocol=HERE, **safe).proxy_protocol, HERE)

    def test_command_line(self):
        for network, words in (("10.0.0.1/8", "--proxy-protocol: "), ("x", "--proxy-protocol: "),
                               ("10.0.0.0/8", "--listen 127.0.0.1: ")):
            self.check_refused(run_cli("-p", "0", "--proxy-protocol", network), words)

    def test_the_self_test_does_without(self):
        status, out, _err = run_cli("--proxy-protocol", "127.0.0.1", "--open", "--self-test")
        self.assertEqual(status, 0, out)
        self.assertIn("without --proxy-protocol", out)
