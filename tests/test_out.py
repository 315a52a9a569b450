"""--out: the address that destinations, peers and remotes see, for CONNECT, BIND and UDP ASSOCIATE."""
import contextlib
import errno
import itertools
import socket
import subprocess
import sys
import unittest
from ipaddress import ip_address

from socks5 import client
from socks5.commands.connect import bind, connect
from socks5.net.addresses import leaving
from socks5.protocol.codes import Cmd, Rep
from socks5.protocol.errors import RequestRefused

from .support import (
    FAR, HAS_IPV6, NEAR, PATIENCE_S, TwoHosts, connect_through, need, read_to_end, refusal, run_cli, running, target,
    udp_socket, wait_until)

OTHER = {4: "198.51.100.11", 6: "2001:db8:51::11"}      # more addresses of the near host
THIRD = {4: "198.51.100.12", 6: "2001:db8:51::12"}


def say_who(connection):
    """A TCP server that tells its client by which address it knows it."""
    connection.sendall(connection.getpeername()[0].encode())


class Choice(unittest.TestCase):
    def test_which_address(self):
        """(--out, where the client came in, the remote, our address; "" where the system chooses)"""
        both = ("192.0.2.1", "2001:db8::1")
        for out, here, remote, ours in (
                ((), "192.0.2.9", "198.51.100.1", ""),
                (both, "192.0.2.9", "198.51.100.1", "192.0.2.1"),
                (both, "192.0.2.9", "2001:db8:51::1", "2001:db8::1"),
                (both[:1], "192.0.2.9", "2001:db8:51::1", ""),
                (both, "192.0.2.9", 4, "192.0.2.1"), (both, "192.0.2.9", 6, "2001:db8::1"), (both[1:], "::1", 4, ""),
                # what goes to loopback does not leave
                (both, "127.0.0.1", "127.0.0.1", ""), (both, "::1", "::1", ""), (both, "::1", "0.0.0.0", ""),
                (("same",), "192.0.2.9", "198.51.100.1", "192.0.2.9"),
                (("same",), "::ffff:192.0.2.9", "198.51.100.1", ""),        # endpoint_of() has made it IPv4 before
                (("same",), "192.0.2.9", "2001:db8:51::1", ""),
                (("same",), "2001:db8::9", "2001:db8:51::1", "2001:db8::9"),
                (("same",), "2001:db8::9", 6, "2001:db8::9"), (("same",), "2001:db8::9", 4, ""),
                # a client on this machine, or on the same link: its address is good for nothing else
                (("same",), "127.0.0.1", "198.51.100.1", ""), (("same",), "127.0.0.1", 4, ""),
                (("same",), "::1", "2001:db8:51::1", ""), (("same",), "fe80::9", "2001:db8:51::1", ""),
                (("same",), "169.254.9.9", "198.51.100.1", ""), (("same",), "192.0.2.9", "127.0.0.1", ""),
                (("same",), "127.0.0.2", "127.0.0.1", "127.0.0.2"), (("same",), "127.0.0.2", "0.0.0.0", ""),
                # and then the next one of the list
                (("same", "192.0.2.1"), "127.0.0.1", "198.51.100.1", "192.0.2.1"),
                (("same", "192.0.2.1"), "2001:db8::9", "198.51.100.1", "192.0.2.1"),
                (("same", "192.0.2.1"), "192.0.2.9", "198.51.100.1", "192.0.2.9")):
            with self.subTest(out=out, here=here, remote=remote):
                to = remote if isinstance(remote, int) else ip_address(remote)
                self.assertEqual(str(leaving(out, ip_address(here), to) or ""), ours)

    def test_an_address_that_is_not_ours_any_more(self):
        with self.assertRaises(RequestRefused) as caught:
            connect([ip_address("127.0.0.1")], 9, float("inf"), None, lambda remote: ip_address("192.0.2.1"))
        self.assertEqual(caught.exception.rep, Rep.GENERAL_FAILURE)
        self.assertRegex(caught.exception.why, r"^127\.0\.0\.1 EADDRNOTAVAIL after")

    def test_the_port_is_not_taken_before_the_destination_is_known(self):
        need(self, sys.platform.startswith("linux"), "Linux")
        with socket.socket() as sock:
            bind(sock, ip_address("127.0.0.1"))
            self.assertEqual(sock.getsockname(), ("127.0.0.1", 0))

    def test_refused_before_anything_listens(self):
        self.assertEqual(run_cli("-p", "0", "--out", "192.0.2.1"),
                         (2, "", "socks5-server: --out 192.0.2.1: not an address of this machine\n"))

    def test_same_on_loopback(self):
        """All of 127.0.0.0/8 is ours on Linux: a client that comes in on 127.0.0.2 leaves from there."""
        need(self, sys.platform.startswith("linux"), "Linux")
        with running(listen=("0.0.0.0",), open=True, out=("same",)) as server, target(say_who) as there:
            for here in ("127.0.0.1", "127.0.0.2"):
                with self.subTest(here), connect_through((here, server.server_address[1]), *there) as sock:
                    self.assertEqual(read_to_end(sock).decode(), here)


class Hosts(TwoHosts, unittest.TestCase):
    """The proxy has three addresses of each IP version; what does the other host see?"""

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        try:
            for four, six in zip(OTHER.values(), THIRD.values()) if not cls.why_not else ():
                for text in (four, six):            # preferred_lft 0: the system does not choose it
                    how = "/64 dev cable nodad preferred_lft 0" if ":" in text else "/24 dev cable"
                    args = "ip -n %s addr add %s%s" % (cls.names[0], text, how)
                    subprocess.run(args.split(), check=True, capture_output=True)
        except subprocess.CalledProcessError as exc:
            cls.why_not = str(exc.stderr)

    def setUp(self):
        super().setUp()
        need(self, HAS_IPV6, "IPv6")

        def answers():
            with socket.socket(socket.AF_INET6) as sock:
                return sock.connect_ex((FAR[6], 80)) == errno.ECONNREFUSED
        wait_until(lambda: self.near(answers), "IPv6 works on a cable that is new")

    def seen(self, stack, proxy, version):
        """How the far host sees a client of `proxy`: by CONNECT, where BIND listens, and by UDP."""
        there = stack.enter_context(self.entered(self.far, target(say_who, FAR[version])))
        place = self.far if proxy[0] in OTHER.values() else self.near
        with place(client.connect, proxy, there) as sock:
            by_connect = read_to_end(sock).decode()
        with place(client.bind, proxy, (FAR[version], 0)) as waiting:
            with self.far(socket.create_connection, waiting.bnd, PATIENCE_S):
                waiting.accept(PATIENCE_S)[0].close()
            by_bind = waiting.bnd[0]
        with place(client.associate, proxy) as udp, self.far(udp_socket, FAR[version]) as remote:
            udp.settimeout(PATIENCE_S)
            udp.sendto(b"who am I?", remote.getsockname()[:2])
            _, mapped = remote.recvfrom(100)
            remote.sendto(b"you", mapped)
            self.assertEqual(udp.recvfrom(), (b"you", remote.getsockname()[:2]))
        return by_connect, by_bind, mapped[0]

    @contextlib.contextmanager
    def entered(self, place, context):
        """`context`, whose sockets are made at that place."""
        value = place(context.__enter__)
        try:
            yield value
        finally:
            context.__exit__(None, None, None)

    def test_addresses(self):
        for name, out, seen in (
                ("both", (OTHER[4], OTHER[6]), OTHER),
                ("IPv4 only", (OTHER[4],), {4: OTHER[4], 6: NEAR[6]}),
                ("same, for a client on loopback", ("same",), NEAR),
                ("same, then these", ("same", THIRD[4], THIRD[6]), THIRD)):
            with self.proxy(*itertools.chain(*(("--out", text) for text in out))) as server:
                for version in (4, 6):
                    with self.subTest(name, version=version), contextlib.ExitStack() as stack:
                        self.assertEqual(self.seen(stack, ("127.0.0.1", server.port), version), (seen[version],) * 3)

    def test_same(self):
        with self.proxy("-l", "::", "--open", "--out", "same") as server:
            for version in (4, 6):
                with self.subTest(version=version), contextlib.ExitStack() as stack:
                    self.assertEqual(self.seen(stack, (OTHER[version], server.port), version), (OTHER[version],) * 3)

    def test_bind_for_any_peer(self):
        with self.proxy("--out", OTHER[4]) as server, self.near(client.bind, ("127.0.0.1", server.port)) as waiting:
            self.assertEqual(waiting.bnd[0], OTHER[4])
            with self.far(socket.create_connection, waiting.bnd, PATIENCE_S):
                waiting.accept(PATIENCE_S)[0].close()

    def test_loopback_is_reached_all_the_same(self):
        with self.proxy("--out", OTHER[4], "--out", OTHER[6]) as server, contextlib.ExitStack() as stack:
            there = stack.enter_context(self.entered(self.near, target(say_who)))
            with self.near(client.connect, ("127.0.0.1", server.port), there) as sock:
                self.assertEqual(read_to_end(sock), b"127.0.0.1")
            with self.near(client.associate, ("127.0.0.1", server.port)) as udp, \
                    self.near(udp_socket, "127.0.0.1") as remote:
                udp.settimeout(PATIENCE_S)
                udp.sendto(b"to loopback", remote.getsockname())
                data, mapped = remote.recvfrom(100)
                remote.sendto(b"and back", mapped)
                self.assertEqual((data, udp.recvfrom()), (b"to loopback", (b"and back", remote.getsockname())))

    def test_the_address_goes_away(self):
        with self.proxy("--out", THIRD[4]) as server:
            ip = "ip -n %s addr %%s %s/24 dev cable" % (self.names[0], THIRD[4])
            subprocess.run((ip % "del").split(), check=True)
            try:
                for command in (client.connect, client.bind):
                    rep = refusal(self, self.near, command, ("127.0.0.1", server.port), (FAR[4], 80))
                    self.assertEqual(rep, Rep.GENERAL_FAILURE)
                server.wait_line("cmd=%s .*EADDRNOTAVAIL" % Cmd.CONNECT.name)
                server.wait_line("cmd=%s .*EADDRNOTAVAIL" % Cmd.BIND.name)
            finally:
                subprocess.run((ip % "add").split(), check=True)
