"""UDP sockets: where they are bound, and that runs of datagrams arrive as single ones."""
import errno
import os
import socket
import unittest
from collections import Counter
from unittest.mock import patch

from socks5.commands import datagrams
from socks5.commands.datagrams import BURST, SEGMENT_BYTES, bound, segments, send
from socks5.net.shares import ANY_PORT, Ports

from .support import HAS_IPV6, PATIENCE_S, descriptors

FAMILIES = [("IPv4", socket.AF_INET, "127.0.0.1")] + [("IPv6", socket.AF_INET6, "::1")] * HAS_IPV6


class Bound(unittest.TestCase):
    def test_families(self):
        for name, family, host in FAMILIES:
            with self.subTest(name), bound(family, host, ANY_PORT) as sock:
                self.assertEqual((sock.family, sock.getsockname()[0], sock.gettimeout()), (family, host, 0))
                self.assertRaises(BlockingIOError, sock.recv, 1)

    def test_anywhere_is_one_family_only(self):
        with bound(socket.AF_INET, "", ANY_PORT) as sock:
            self.assertEqual(sock.getsockname()[0], "0.0.0.0")
            if HAS_IPV6:
                port = sock.getsockname()[1]
                with bound(socket.AF_INET6, "", [port]) as six:       # would be taken if it were dual-stack
                    self.assertEqual(six.getsockname()[:2], ("::", port))

    def test_much_may_wait(self):
        with bound(socket.AF_INET, "127.0.0.1", ANY_PORT) as sock, bound(socket.AF_INET, "", ANY_PORT) as plain:
            plain.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, datagrams.SOCKET_BYTES)
            self.assertEqual(*(s.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF) for s in (sock, plain)))

    def test_a_system_that_refuses_large_buffers(self):
        class Small(socket.socket):
            def setsockopt(self, level, option, value):
                if option in (socket.SO_RCVBUF, socket.SO_SNDBUF):
                    raise OSError(errno.ENOBUFS, "No buffer space available")
                super().setsockopt(level, option, value)

        with patch("socket.socket", Small), bound(socket.AF_INET, "127.0.0.1", ANY_PORT) as sock:
            self.assertTrue(sock.getsockname()[1])

    def test_ports_of_a_range_until_there_is_none(self):
        low = 40000 + os.getpid() % 10000
        ports, socks = (low, low + 3), []
        before = descriptors()
        try:
            with self.assertRaises(OSError) as caught:
                for _ in range(5):
                    socks.append(bound(socket.AF_INET, "127.0.0.1", Ports(ports)))
            self.assertEqual(caught.exception.errno, errno.EADDRINUSE)
            numbers = [sock.getsockname()[1] for sock in socks]
            self.assertTrue(numbers and set(numbers) <= set(range(low, low + 4)), numbers)
            self.assertEqual(len(set(numbers)), len(numbers))
        finally:
            for sock in socks:
                sock.close()
        self.assertLessEqual(descriptors(), before)

    def test_an_address_that_is_not_ours(self):
        before = descriptors()
        with self.assertRaises(OSError) as caught:
            bound(socket.AF_INET, "192.0.2.1", (1024, 65535))               # and is not tried at every port
        self.assertEqual(caught.exception.errno, errno.EADDRNOTAVAIL)
        self.assertLessEqual(descriptors(), before)


class Sent(unittest.TestCase):
    def setUp(self):
        self.dropped = Counter()
        self.here, self.there = (self.kept(bound(socket.AF_INET, "127.0.0.1", ANY_PORT)) for _ in range(2))
        self.there.settimeout(PATIENCE_S)

    def kept(self, sock):
        self.addCleanup(sock.close)
        return sock

    def arrive(self, length, count=BURST):
        data = [os.urandom(length) for _ in range(count)]
        self.assertEqual(send(self.here, data, self.there.getsockname(), self.dropped), count)
        self.assertEqual([self.there.recv(1 << 16) for _ in data], data)
        self.there.setblocking(False)
        self.assertRaises(BlockingIOError, self.there.recv, 1)              # and no more than that
        self.there.settimeout(PATIENCE_S)
        self.assertEqual(self.dropped, {})

    def test_lengths(self):
        for length in (0, 1, 100, 900, SEGMENT_BYTES, SEGMENT_BYTES + 1, 3000):
            for count in (1, 2, 40):
                with self.subTest(length=length, count=count):
                    self.arrive(length, count)

    def test_a_full_burst_of_short_ones(self):
        self.arrive(512)

    def test_where_the_kernel_does_not_cut_up(self):
        with patch.object(datagrams, "LINUX", False):
            self.assertFalse(segments(self.here))
            self.arrive(100)

    def test_a_kernel_that_does_not_know_the_option(self):
        with patch.object(datagrams, "UDP_SEGMENT", 99):
            self.assertFalse(segments(self.here))
            self.arrive(100)

    def test_a_card_that_cannot(self):
        with patch.object(datagrams, "segments", lambda sock: True), patch.object(datagrams, "UDP_SEGMENT", 99):
            self.arrive(100)

    def test_what_cannot_be_sent_is_counted(self):
        cases = [("EMSGSIZE", bytes(65508), self.there.getsockname()), ("EINVAL", b"x", ("127.0.0.1", 0)),
                 ("EACCES", b"x", ("255.255.255.255", 9))]
        for reason, data, address in cases:
            with self.subTest(reason):
                self.dropped.clear()
                self.assertEqual(send(self.here, [data] * 3, address, self.dropped), 0)
                self.assertEqual(self.dropped, {reason: 3})
