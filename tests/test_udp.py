"""UDP ASSOCIATE: what is carried, for whom, where to, and what is left when it is over."""
import contextlib
import errno
import gc
import itertools
import os
import resource
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import unittest
from ipaddress import ip_address
from unittest.mock import patch

import socks5
from socks5 import client
from socks5.commands import datagrams
from socks5.protocol import trace
from socks5.protocol.codes import Cmd, Rep
from socks5.protocol.errors import ProxyError
from socks5.server.acceptors import MAX_SPARE, MAX_WAITING
from socks5.net.lookups import PER_CLIENT, WAITING_BYTES, WAITING_ITEMS, WAITING_NAMES, Names
from socks5.net.shares import ANY_PORT
from socks5.commands.udp import BUFFERS, LOOKS, Association
from socks5.net.poller import SelectPoll
from socks5.relay import busy
from socks5.relay.loop import BURSTS_S, MANY, Loop
from socks5.relay.relay import Relay
from socks5.relay.tunnel import Tunnel
from socks5.protocol.messages import Datagram

from .support import (
    FAR, FREE_THREADED, HAS_IPV6, NEAR, OTHER_THREADS, PATIENCE_S, TwoHosts, address, ask, authorizing, closed_port,
    descriptors, dial, free_ports, need, need_program, negotiate, reset, resident_kib, running, spawned, threads,
    wait_until)

MOST = 65507                        # of a UDP datagram over IPv4: 65,535 less the headers
IP_RECVERR = 11                     # linux/in.h
HEADER = 10                         # of ours, with an IPv4 address
FAMILIES = ["127.0.0.1"] + ["::1"] * HAS_IPV6
VERSIONS = [4] + [6] * HAS_IPV6
ALONE = ("-w", "1") if hasattr(socks5.Config, "workers") else ()        # what /proc is asked about is one process


def udp_socket(host="127.0.0.1"):
    sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_DGRAM)
    sock.bind((host, 0))
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
    sock.settimeout(PATIENCE_S)
    return sock


@contextlib.contextmanager
def remote(answer=bytes.upper, host="127.0.0.1"):
    """A UDP server: (host, port). It sends answer(data) back to whoever asks."""
    sock = udp_socket(host)
    over = os.urandom(8)

    def serve():
        sock.settimeout(None)
        while True:
            data, sender = sock.recvfrom(1 << 16)
            if data == over:
                return
            with contextlib.suppress(OSError):
                sock.sendto(answer(data), sender)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield sock.getsockname()[:2]
    finally:
        with udp_socket(host) as other:
            other.sendto(over, sock.getsockname())
        thread.join(PATIENCE_S)
        sock.close()


@contextlib.contextmanager
def associated(server, timeout=PATIENCE_S):
    """An association through a Server, or through one at (host, port)."""
    with client.associate(server if isinstance(server, tuple) else server.server_address[:2]) as udp:
        udp.settimeout(timeout)
        yield udp


@contextlib.contextmanager
def session_line(test, server):
    """A list that will have the line of the one session that ends meanwhile."""
    found = []
    with test.assertLogs("socks5.server", "INFO") as logs:
        yield found
        wait_until(lambda: not len(server.sessions), "the session ends")
    found.append(logs.output[-1])


def unread(relay):
    """How much lies in the IPv4 socket at `relay`: the rx_queue of proc(5), /proc/net/udp."""
    port = ":%04X" % relay[1]
    with open("/proc/net/udp") as table:
        return [int(line.split()[4].partition(":")[2], 16) for line in table if line.split()[1].endswith(port)][0]


def exchange(test, udp, where, data=b"some words"):
    udp.sendto(data, where)
    test.assertEqual(udp.recvfrom(), (data.upper(), where))


# ---- what is carried ---------------------------------------------------------------------------------------------

class Carried(unittest.TestCase):
    def test_every_kind_of_destination(self):
        cases = [("IPv4", "127.0.0.1", "127.0.0.1"), ("a name", "localhost", "127.0.0.1"),
                 ("a literal as a name", b"127.0.0.1", "127.0.0.1"), ("IPv4-mapped", "::ffff:127.0.0.1", "127.0.0.1")]
        cases += [("IPv6", "::1", "::1"), ("an IPv6 literal as a name", b"::1", "::1")] * HAS_IPV6
        with running() as server, associated(server) as udp:
            for name, host, real in cases:
                with self.subTest(name), remote(host=real) as (_, port):
                    for _ in range(3):                              # first looked at, then remembered
                        udp.sendto(b"some words", (host, port))
                        self.assertEqual(udp.recvfrom(), (b"SOME WORDS", (real, port)))

    def test_the_client_may_come_by_either_family(self):
        with running(listen=("::",) if HAS_IPV6 else ("0.0.0.0",), open=True) as server, remote() as where:
            for host in FAMILIES:                                   # 127.0.0.1 reaches "::" as ::ffff:127.0.0.1
                with self.subTest(host), associated((host, server.server_address[1])) as udp:
                    self.assertEqual(udp.relay[0], host)
                    exchange(self, udp, where)

    def test_every_size(self):
        sizes = [0, 1, 511, 1452, 1453, 1472, 9000, MOST - HEADER]
        with running() as server, remote(lambda data: data) as where, session_line(self, server) as line:
            with associated(server) as udp:
                for size in sizes:
                    data = os.urandom(size)
                    for _ in range(2):
                        with self.subTest(size=size):
                            udp.sendto(data, where)
                            self.assertEqual(udp.recvfrom(), (data, where))
        self.assertIn(" up=%d down=%d " % (2 * sum(sizes), 2 * sum(sizes)), line[0])

    def test_what_does_not_fit_is_dropped_and_never_cut(self):
        def answer(data):
            return bytes(MOST - HEADER + int(data))

        with running() as server, remote(answer) as where, session_line(self, server) as line:
            with associated(server) as udp:
                for more in (1, HEADER, 0):
                    udp.sendto(b"%d" % more, where)
                self.assertEqual(udp.recvfrom(), (answer(b"0"), where))
                # Nobody can send us one that is too long; but pieces may make one.
                udp.sendto(bytes(MOST + 1), where, fragments=2)
                udp.sendto(b"0", where)
                self.assertEqual(udp.recvfrom(), (answer(b"0"), where))
        self.assertIn("why='dropped: 3 EMSGSIZE'", line[0])

    def test_fragments_become_one(self):
        with running() as server, remote() as where, associated(server) as udp:
            for pieces in (2, 3, 127):
                with self.subTest(pieces=pieces):
                    udp.sendto(b"some words" * 100, where, fragments=pieces)
                    self.assertEqual(udp.recvfrom(), (b"SOME WORDS" * 100, where))

    def test_a_datagram_that_stands_alone_passes_the_pieces_of_another(self):
        with running() as server, remote() as where, associated(server) as udp:
            dst = address(*where)
            udp.sock.send(Datagram(dst, b"one ", 1).pack())
            exchange(self, udp, where, b"alone")
            udp.sock.send(Datagram(dst, b"two", 2 | 0x80).pack())
            self.assertEqual(udp.recvfrom(), (b"ONE TWO", where))


class Bursts(unittest.TestCase):
    """What lies in the socket before the association looks at it is taken in one go."""

    @contextlib.contextmanager
    def association(self, idle_s=0):
        """One that does not run before run() is called: (it, its client's socket, run)."""
        with socket.create_server(("127.0.0.1", 0)) as listener, dial(listener.getsockname()) as control:
            with listener.accept()[0] as ours, udp_socket() as sock:
                association = Association(ours, ip_address("127.0.0.1"), ANY_PORT, (), Names(), lambda *_: True,
                                          idle_s=idle_s)
                with contextlib.closing(association):
                    association.moved_at = busy.monotonic()
                    thread = threading.Thread(target=busy.relay_bursts, args=(association,), daemon=True)
                    sock.connect((str(association.bnd.ip), association.bnd.port))
                    try:
                        yield association, sock, thread.start
                    finally:
                        control.close()
                        thread.join(PATIENCE_S)
                        self.assertFalse(thread.is_alive())

    def both_ways(self):
        """Up in one burst to three remotes, whose answers come down in another: all of them, whole, in their order."""
        lengths = [100] * 10 + [0, 0, 0, 100, 7, 100, 1452, 1452, 1453, 1453] + [1442, 1443] * 2 + [9000, 1]
        lengths += [50] * 25 + [30000] * 12
        sent = [os.urandom(length) for length in lengths]
        with contextlib.ExitStack() as stack:
            hosts = ["127.0.0.1", "127.0.0.1", FAMILIES[-1]]
            remotes = [stack.enter_context(udp_socket(host)) for host in hosts]
            association, sock, run = stack.enter_context(self.association())
            to = [remotes[at // 5 % 3] for at in range(len(sent))]
            for data, there in zip(sent, to):
                sock.send(Datagram(address(*there.getsockname()[:2]), data).pack())
            run()
            for there in remotes:
                expected = [data for data, other in zip(sent, to) if other is there]
                received = [there.recvfrom(1 << 16) for _ in expected]
                self.assertEqual([len(data) for data, _ in received], [len(data) for data in expected])
                self.assertEqual([data for data, _ in received], expected)
                for data, mapped in received:
                    there.sendto(data, mapped)
            back = [Datagram.parse(sock.recv(1 << 16)) for _ in sent]
            for there in remotes:
                self.assertEqual([datagram.data for datagram in back if datagram.dst.port == there.getsockname()[1]],
                                 [data for data, other in zip(sent, to) if other is there])
            wait_until(lambda: association.down >= sum(lengths))
            self.assertEqual((association.up, association.down), (sum(lengths), sum(lengths)))
            self.assertEqual(association.summary(), "")

    def test_with_all_that_this_system_has(self):
        self.both_ways()

    def test_without_segmentation_in_the_kernel(self):
        with patch.object(datagrams, "segments", lambda sock: False):
            self.both_ways()

    def test_when_the_kernel_refuses_to_segment(self):
        with patch.object(datagrams, "UDP_SEGMENT", 99), patch.object(datagrams, "segments", lambda sock: True):
            self.both_ways()                                        # 99 is no option of its: EINVAL

    def test_without_poll_and_nonblocking_creation(self):
        with patch.object(busy, "new_poll", SelectPoll), patch.object(datagrams, "NONBLOCK", 0):
            self.both_ways()

    def test_a_short_datagram_is_not_taken_for_the_one_before(self):
        with udp_socket() as there, self.association() as (association, sock, run):
            whole = Datagram(address(*there.getsockname()), b"").pack()
            sock.send(whole)
            for cut in range(len(whole)):
                sock.send(whole[:cut])
            sock.send(whole + b"the end")
            run()
            self.assertEqual([there.recv(100), there.recv(100)], [b"", b"the end"])
            self.assertEqual(association.summary(), "dropped: %d bad header" % len(whole))

    def test_losses_are_read_while_more_are_counted(self):
        """By the thread of the status page, which would end by an exception, and the page's figures with it."""
        def count():
            while not over.is_set():
                for number in range(50):
                    association.dropped["reason %d" % number] += 1
                association.dropped.clear()

        over, before = threading.Event(), sys.getswitchinterval()
        with self.association() as (association, _sock, run):
            run()
            thread = threading.Thread(target=count, daemon=True)
            sys.setswitchinterval(1e-6)
            try:
                thread.start()
                for _ in range(5000):
                    association.losses()
            finally:
                sys.setswitchinterval(before)
                over.set()
                thread.join(PATIENCE_S)

    def test_errors_that_a_socket_reports_are_counted_and_no_more(self):
        """As BSD and Windows do unasked: what was sent to a closed port makes the next recvfrom() fail."""
        with udp_socket() as there, self.association() as (association, sock, run):
            dst, nobody = address(*there.getsockname()), address("127.0.0.1", closed_port())
            association._sockets.open_toward(socket.AF_INET).setsockopt(socket.IPPROTO_IP, IP_RECVERR, 1)
            sock.send(Datagram(nobody, b"anybody?").pack())
            run()
            wait_until(lambda: association.dropped)
            sock.send(Datagram(dst, b"hello").pack())
            there.sendto(b"hello", there.recvfrom(100)[1])
            self.assertEqual(Datagram.parse(sock.recv(100)), Datagram(dst, b"hello"))
            self.assertEqual(association.summary(), "dropped: 1 ECONNREFUSED")

    def test_idle_is_without_datagrams_either_way(self):
        for direction in ("up", "down"):
            clock = [1000.0]
            with self.subTest(direction), patch.object(busy, "monotonic", lambda: clock[0]), \
                    udp_socket() as there:
                with self.association(idle_s=100) as (association, sock, run), udp_socket("127.0.0.2") as stranger:
                    run()
                    dst = address(*there.getsockname())
                    sock.send(Datagram(dst, b"hello").pack())
                    mapped = there.recvfrom(100)[1]
                    for _ in range(5):
                        clock[0] += 90
                        if direction == "up":
                            sock.send(Datagram(dst, b"still here").pack())
                            self.assertEqual(there.recv(100), b"still here")
                        else:
                            there.sendto(b"still here", mapped)
                            self.assertEqual(Datagram.parse(sock.recv(100)).data, b"still here")
                    self.assertEqual(association.ended_by, "")
                    clock[0] += 101

                    def ended():
                        stranger.sendto(b"wake up", sock.getpeername())     # which does not count
                        return association.ended_by

                    wait_until(ended)
                    self.assertEqual(association.ended_by, "idle")

    def test_what_could_not_be_sent_is_not_counted_and_keeps_nothing_alive(self):
        with udp_socket() as there, self.association(idle_s=0.5) as (association, sock, run):
            run()
            whole = Datagram(address(*there.getsockname()), b"hello").pack()
            sock.send(whole)
            mapped = there.recvfrom(100)[1]
            with patch("socks5.commands.udp.send", lambda *_: 0):
                sock.send(whole)                                    # of the header that is remembered

                def ended():
                    there.sendto(b"an answer", mapped)
                    return association.ended_by

                wait_until(ended)
            self.assertEqual((association.ended_by, association.up, association.down), ("idle", 5, 0))

    def test_what_is_remembered_is_bounded(self):
        with patch("socks5.commands.datagrams.REMEMBERED", 2), contextlib.ExitStack() as stack:
            remotes = [stack.enter_context(udp_socket()) for _ in range(5)]
            association, sock, run = stack.enter_context(self.association())
            run()
            for _ in range(3):
                for there in remotes:
                    sock.send(Datagram(address(*there.getsockname()), b"hello").pack())
                    there.sendto(b"hello", there.recvfrom(100)[1])
                    self.assertEqual(Datagram.parse(sock.recv(100)).dst, address(*there.getsockname()))
            self.assertEqual((len(association._routes), len(association._headers)), (2, 2))

    def test_order_is_kept_whatever_leads_there(self):
        with udp_socket() as there, self.association() as (association, sock, run):
            port = there.getsockname()[1]
            hosts = ["127.0.0.1", "127.0.0.1", "127.0.0.1", b"127.0.0.1", "::ffff:127.0.0.1", "127.0.0.1"]
            for number in range(12):
                sock.send(Datagram(address(hosts[number % 6], port), b"%d" % (number % 10)).pack())
            run()
            self.assertEqual(b"".join(there.recv(100) for _ in range(12)), b"012345678901")

    def test_more_than_one_burst(self):
        with udp_socket() as there, self.association() as (association, sock, run):
            dst = address(*there.getsockname())
            for number in range(200):
                sock.send(Datagram(dst, b"%04d" % number).pack())
            run()
            self.assertEqual([there.recv(100) for _ in range(200)], [b"%04d" % number for number in range(200)])

    def test_every_datagram_between_client_and_association_is_told(self):
        told = []
        with udp_socket() as there, udp_socket("127.0.0.2") as stranger, self.association() as (association, sock, run):
            association.on_datagram = lambda *what: told.append(what)
            dst, client = address(*there.getsockname()), sock.getsockname()
            up = [Datagram(dst, b"datagram %d" % number).pack() for number in range(3)] + [b"garbage"]
            for raw in up:
                sock.send(raw)
            stranger.sendto(up[0], sock.getpeername())
            run()
            mapped = [there.recvfrom(100) for _ in range(3)][0][1]
            for number in range(3):
                there.sendto(b"answer %d" % number, mapped)
            down = [sock.recv(100) for _ in range(3)]
            wait_until(lambda: len(told) == 7)
            self.assertEqual([what for what in told if what[0] == trace.UP], [(trace.UP, raw, client) for raw in up])
            self.assertEqual([what for what in told if what[0] == trace.DOWN],
                             [(trace.DOWN, raw, client) for raw in down])

    def test_a_quiet_association_holds_nothing(self):
        with patch("socks5.commands.fragments.REASSEMBLY_S", 0.05):
            with udp_socket() as there, self.association() as (association, sock, run):
                dst = address(*there.getsockname())
                sock.send(Datagram(dst, b"whole").pack())
                sock.send(Datagram(dst, b"a piece", 1).pack())
                run()
                self.assertEqual(there.recv(100), b"whole")
                wait_until(lambda: association.losses()["fragment"])
                sock.send(Datagram(dst, b"too late", 2 | 0x80).pack())
                sock.send(Datagram(dst, b"whole").pack())
                self.assertEqual(there.recv(100), b"whole")
                self.assertEqual(association.summary(), "dropped: 2 fragment")


# ---- for whom ----------------------------------------------------------------------------------------------------

class Whom(unittest.TestCase):
    def test_strangers_on_the_clients_side(self):
        with running() as server, remote() as where, session_line(self, server) as line:
            with associated(server) as udp, udp_socket("127.0.0.2") as stranger, udp_socket() as neighbour:
                hello = Datagram(address(*where), b"hello").pack()
                stranger.sendto(hello, udp.relay)                   # before the client's port is known, and after
                exchange(self, udp, where)
                for sock in (stranger, neighbour):                  # a neighbour has the client's address
                    sock.sendto(hello, udp.relay)
                exchange(self, udp, where)                          # nothing of theirs came back in between
                for sock in (stranger, neighbour):
                    sock.setblocking(False)
                    self.assertRaises(BlockingIOError, sock.recv, 100)
        self.assertIn(" up=20 down=20 ", line[0])
        self.assertIn("why='dropped: 3 not the client'", line[0])

    def test_who_sends_garbage_first_is_not_the_client(self):
        with running() as server, remote() as where, associated(server) as udp, udp_socket() as neighbour:
            neighbour.sendto(b"garbage", udp.relay)
            exchange(self, udp, where)

    def test_the_port_in_the_request_is_a_hint_at_most(self):
        with running() as server, remote() as where, dial(server.server_address) as control, udp_socket() as sock:
            negotiate(control)
            reply = ask(control, Cmd.UDP_ASSOCIATE, "10.9.8.7", 9)
            sock.sendto(Datagram(address(*where), b"hello").pack(), (str(reply.bnd.host), reply.bnd.port))
            self.assertEqual(Datagram.parse(sock.recv(100)), Datagram(address(*where), b"HELLO"))

    def test_anybody_may_write_to_the_mapped_port(self):
        with running() as server, associated(server) as udp, udp_socket() as first, udp_socket() as second:
            udp.sendto(b"to learn my port", first.getsockname())
            _, mapped = first.recvfrom(100)
            udp.sendto(b"the same for all", second.getsockname())
            self.assertEqual(second.recvfrom(100), (b"the same for all", mapped))
            for host in ("127.0.0.2", "127.0.0.3"):                 # to whom the client never wrote
                with self.subTest(host), udp_socket(host) as caller:
                    caller.sendto(b"surprise", mapped)
                    self.assertEqual(udp.recvfrom(), (b"surprise", caller.getsockname()))
                    udp.sendto(b"who is there?", caller.getsockname())
                    self.assertEqual(caller.recvfrom(100), (b"who is there?", mapped))

    def test_a_caller_cannot_pass_for_somebody_else(self):
        with running() as server, remote() as where, associated(server) as udp, udp_socket("127.0.0.2") as stranger:
            exchange(self, udp, where)
            with udp_socket() as first:
                udp.sendto(b"to learn my port", first.getsockname())
                mapped = first.recvfrom(100)[1]
            stranger.sendto(Datagram(address(*where), b"as if from where").pack(), mapped)
            self.assertEqual(udp.recvfrom(), (Datagram(address(*where), b"as if from where").pack(),
                                              stranger.getsockname()))


# ---- where to ----------------------------------------------------------------------------------------------------

class Dropped(unittest.TestCase):
    def test_bad_headers_cost_one_datagram_each(self):
        bad = [b"", b"\0", b"\0\0\0", b"\0\0\0\1", b"\0\0\0\1\x7f\0\0\1\0", b"\0\0\0\2" + bytes(20),
               b"\0\0\0\4" + bytes(17),
               b"\0\0\0\0" + bytes(20), b"\0\0\0\xff" + bytes(99), b"\0\0\0\3", b"\0\0\0\3\5name", b"\0\0\1\3\5name\0"]
        with running() as server, remote() as where, session_line(self, server) as line, associated(server) as udp:
            for raw in bad:
                udp.sock.send(raw)
                exchange(self, udp, where)
            udp.sock.send(b"\xff\xff" + Datagram(address(*where), b"any RSV").pack()[2:])
            self.assertEqual(udp.recvfrom(), (b"ANY RSV", where))
        self.assertIn("why='dropped: %d bad header'" % len(bad), line[0])

    def test_reasons(self):
        class Strict(socks5.Authorizer):
            def permits_datagram(self, address, port, name):
                return port != 9

        cases = [("not allowed", Datagram(address("127.0.0.1", 9), b"x")),
                 ("EINVAL", Datagram(address("127.0.0.1", 0), b"x")),
                 ("EACCES", Datagram(address("255.255.255.255", 7), b"x")),
                 ("unresolved", Datagram(address(b"127.0.0.1\0.example", 7), b"x")),
                 ("unresolved", Datagram(address(b"a..b", 7), b"x")),
                 ("unresolved", Datagram(address(b" ", 7), b"x"))]
        with running(authorizing(Strict)) as server, remote() as where:
            for reason, datagram in cases:
                with self.subTest(reason, dst=str(datagram.dst)):
                    with session_line(self, server) as line, associated(server) as udp:
                        for _ in range(2):
                            udp.sock.send(datagram.pack())
                            exchange(self, udp, where)
                    self.assertIn("why='dropped: 2 %s'" % reason, line[0])

    def test_a_rule_that_changes_is_in_force_at_once(self):
        allowed = [True]

        class Moody(socks5.Authorizer):
            def permits_datagram(self, address, port, name):
                return allowed[0] or port != where[1]

        with running(authorizing(Moody)) as server, remote() as where, remote() as other, associated(server) as udp:
            exchange(self, udp, where)
            allowed[0] = False
            server.rules = type(server.rules)(server.config)
            udp.sendto(b"now denied", where)
            exchange(self, udp, other)

    def test_nobody_listens_there(self):
        with running() as server, remote() as where, associated(server) as udp:
            nobody = ("127.0.0.1", closed_port())
            for _ in range(5):                                      # each is answered by ICMP port unreachable
                udp.sendto(b"anybody?", nobody)
                exchange(self, udp, where)

    def test_the_clients_datagram_socket_is_closed_for_a_while(self):
        with running() as server, udp_socket() as there, dial(server.server_address) as control:
            negotiate(control)
            bnd = ask(control, Cmd.UDP_ASSOCIATE, "0.0.0.0", 0).bnd
            relay, dst = (str(bnd.host), bnd.port), address(*there.getsockname())
            with udp_socket() as sock:
                sock.sendto(Datagram(dst, b"hello").pack(), relay)
                mine = sock.getsockname()
            _, mapped = there.recvfrom(100)
            for _ in range(5):
                there.sendto(b"anybody?", mapped)
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
                sock.settimeout(PATIENCE_S)
                sock.bind(mine)
                sock.sendto(Datagram(dst, b"here again").pack(), relay)
                self.assertEqual(there.recvfrom(100), (b"here again", mapped))

    def test_a_remote_that_closes(self):
        with running() as server, associated(server) as udp, remote() as where:
            with remote() as gone:
                exchange(self, udp, gone)
            udp.sendto(b"still there?", gone)
            exchange(self, udp, where)

    def test_no_descriptor_for_the_outgoing_socket(self):
        def few():
            resource.setrlimit(resource.RLIMIT_NOFILE, (60, 60))

        with remote() as where, spawned(*ALONE, "--max-sessions", 100, preexec_fn=few) as server:
            proxy = ("127.0.0.1", server.port)
            with contextlib.ExitStack() as idle, associated(proxy) as udp:
                before = descriptors(server.process.pid)
                for _ in range(60):
                    idle.enter_context(dial(proxy)).sendall(b"\5")
                server.wait_line("accept_failed errno=EMFILE")
                udp.sendto(b"no way out", where)
                udp.sendto(b"no way out", ("name.invalid", 9))
                udp.sock.send(b"garbage")
                wait_until(lambda: not unread(udp.relay))
                idle.close()
                wait_until(lambda: descriptors(server.process.pid) <= before)
                exchange(self, udp, where)
            line = server.wait_line("session .*cmd=UDP_ASSOCIATE").string
            self.assertEqual(sorted(line.rpartition("why='dropped: ")[2].rstrip("'").split(", ")),
                             ["1 EMFILE", "1 bad header", "1 unresolved"])


class NamesOfRemotes(unittest.TestCase):
    """getaddrinfo is replaced: it is the system's, and not under test."""

    def setUp(self):
        self.asked = []
        self.hang = threading.Event()
        self.addCleanup(self.hang.set)
        real = socket.getaddrinfo

        def getaddrinfo(host, *args, **kwargs):
            name = host.decode() if isinstance(host, bytes) else host
            if not name.endswith(".test"):
                return real(host, *args, **kwargs)
            self.asked.append(name)
            if name.startswith("slow"):
                self.hang.wait(PATIENCE_S)
            if name.startswith("bad"):
                raise socket.gaierror(socket.EAI_NONAME, "no such name")
            return real("127.0.0.1", *args, **kwargs)

        bugs = []
        self.addCleanup(self.assertEqual, bugs, [])
        for patched in (patch("socket.getaddrinfo", getaddrinfo), patch("threading.excepthook", bugs.append)):
            patched.start()
            self.addCleanup(patched.stop)

    def test_a_literal_never_waits_behind_a_name(self):
        with running() as server, remote() as where, associated(server) as udp:
            udp.sendto(b"late", ("slow.test", where[1]))
            for number in range(1000):
                exchange(self, udp, where, b"number %d" % number)
            exchange(self, udp, ("127.0.0.1", where[1]), b"a literal")
            udp.sendto(b"another name", ("quick.test", where[1]))
            self.assertEqual(udp.recvfrom(), (b"ANOTHER NAME", where))
            self.hang.set()
            self.assertEqual(udp.recvfrom(), (b"LATE", where))

    def test_answers_are_remembered_and_failures_too(self):
        with patch("socks5.net.resolver.FAILURE_S", 60), running() as server, remote() as where:
            with session_line(self, server) as line:
                for _ in range(2):                                  # by all associations
                    with associated(server) as udp:
                        for _ in range(10):
                            udp.sendto(b"hello", ("good.test", where[1]))
                            self.assertEqual(udp.recvfrom(), (b"HELLO", where))
                            udp.sendto(b"hello", ("bad.test", where[1]))
                        wait_until(lambda: any(session.relay and session.relay.dropped["unresolved"] == 10
                                               for session in server.sessions))
        self.assertEqual(sorted(self.asked), ["bad.test", "good.test"])
        self.assertIn("why='dropped: 10 unresolved'", line[0])

    def test_but_not_for_long(self):
        with patch("socks5.net.resolver.FAILURE_S", 0), patch("socks5.net.resolver.ANSWER_S", 0), running() as server:
            with patch("socks5.commands.udp.FORGET_S", 0), remote() as where, associated(server) as udp:
                for number in range(1, 4):
                    udp.sendto(b"hello", ("good.test", where[1]))
                    self.assertEqual(udp.recvfrom(), (b"HELLO", where))
                    udp.sendto(b"hello", ("bad.test", where[1]))
                    wait_until(lambda: [session.relay.dropped["unresolved"] for session in server.sessions]
                               == [number], "the answer is there, and forgotten")
                    self.assertEqual((self.asked.count("good.test"), self.asked.count("bad.test")), (number, number))

    def test_what_waits_is_bounded(self):
        names = [("slow%d.test" % number, b"x", 1) for number in range(WAITING_NAMES + 5)]
        cases = [("names", names, 5), ("datagrams", [("slow.test", b"x", 1)] * 100, 100 - WAITING_ITEMS),
                 ("bytes", [("slow.test", bytes(60000), 2)] * 6, 6 - WAITING_BYTES // 60000)]
        for name, sent, dropped in cases:
            with self.subTest(name), running() as server, remote() as where, session_line(self, server) as line:
                with associated(server) as udp:
                    for host, data, pieces in sent:
                        udp.sendto(data, (host, where[1]), pieces)
                        exchange(self, udp, where)
            self.assertIn("why='dropped: %d waiting for a name'" % dropped, line[0])

    def test_a_lookup_may_outlive_its_association(self):
        with running() as server, remote() as where:
            with session_line(self, server), associated(server) as udp:
                udp.sendto(b"x", ("slow.test", where[1]))
                exchange(self, udp, where)
                wait_until(lambda: self.asked)
            self.assertTrue(any(thread.name == "names" for thread in threading.enumerate()))
            self.hang.set()
            wait_until(lambda: not any(thread.name == "names" for thread in threading.enumerate()), "its thread ends")
            with associated(server) as udp:
                exchange(self, udp, where)

    def test_threads_are_few_and_end(self):
        def lookups():
            return [thread for thread in threading.enumerate() if thread.name == "names"]

        wait_until(lambda: not lookups(), "those of other tests have ended")
        with running() as server, remote() as where, contextlib.ExitStack() as stack:
            for number in range(5):
                udp = stack.enter_context(associated(server))
                for name in range(WAITING_NAMES):
                    udp.sendto(b"x", ("slow%d-%d.test" % (number, name), where[1]))
                exchange(self, udp, where)
            self.assertEqual(len(lookups()), PER_CLIENT)
            self.hang.set()
            wait_until(lambda: not lookups(), "they end")


class OurSide(unittest.TestCase):
    def refused(self, server, source="127.0.0.1"):
        """Why an association from this address is refused with X'01'."""
        with self.assertLogs("socks5.server", "INFO") as logs, socket.socket() as control:
            control.settimeout(PATIENCE_S)
            control.bind((source, 0))
            control.connect(server.server_address)
            negotiate(control)
            self.assertEqual(ask(control, Cmd.UDP_ASSOCIATE, "0.0.0.0", 0).rep, Rep.GENERAL_FAILURE)
            control.close()
            wait_until(lambda: any("cmd=UDP_ASSOCIATE" in line for line in logs.output))
        return logs.output[-1].rpartition("why=")[2]

    def test_ports(self):
        low = free_ports(6, "0.0.0.0")
        with running(udp_ports=(low, low + 5)) as server, udp_socket() as there:
            for turn in range(3):                                   # what has ended leaves its ports
                with contextlib.ExitStack() as stack:
                    seen = []
                    for _ in range(2):
                        udp = stack.enter_context(associated(server))
                        udp.sendto(b"from where?", there.getsockname())
                        seen += [udp.relay[1], there.recvfrom(100)[1][1]]
                    self.assertEqual(len(set(seen) & set(range(low, low + 6))), 4, seen)
                    why = "no UDP socket in ports %d-%d: EADDRINUSE" % (low, low + 5)
                    self.assertIn(why, self.refused(server))        # the last tenth, here what one client needs,
                    with socket.socket() as newcomer:               # is not for this one
                        newcomer.bind(("127.0.0.2", 0))
                        newcomer.connect(server.server_address)
                        negotiate(newcomer)
                        self.assertEqual(ask(newcomer, Cmd.UDP_ASSOCIATE, "0.0.0.0", 0).rep, Rep.SUCCEEDED)
                        self.assertIn(why, self.refused(server, "127.0.0.3"))
                wait_until(lambda: not len(server.sessions))

    def test_a_socket_that_cannot_be_opened_takes_no_port(self):
        low = free_ports(4, "0.0.0.0")
        real = datagrams.bound

        def bound(family, *args):
            if family == socket.AF_INET6:
                raise OSError(errno.EAFNOSUPPORT, "no IPv6 here")
            return real(family, *args)

        with running(udp_ports=(low, low + 3)) as server, patch("socks5.commands.datagrams.bound", bound), \
                associated(server) as udp, patch.object(
                    server.udp_ports, "give_back", wraps=server.udp_ports.give_back) as give_back:
            for number in range(1, 4):
                udp.sendto(b"x", ("2001:db8::1", 53))
                wait_until(lambda: [one.relay and one.relay.dropped["EAFNOSUPPORT"]
                                    for one in server.sessions] == [number])
                self.assertEqual(give_back.call_count, number)

    def test_a_port_that_something_else_has(self):
        low = free_ports(2, "0.0.0.0")
        with running(udp_ports=(low, low + 1)) as server, remote() as where:
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as other:
                other.bind(("", low))
                for _ in range(3):
                    self.assertIn("no UDP socket in ports %d-%d" % (low, low + 1), self.refused(server))
            with associated(server) as udp:
                exchange(self, udp, where)

    def test_what_comes_before_the_clients_first_datagram(self):
        low = free_ports(2, "0.0.0.0")
        with running(udp_ports=(low, low + 1)) as server, remote() as where:
            with session_line(self, server) as line:
                with associated(server) as udp, udp_socket() as early:
                    outside = low + 1 if udp.relay[1] == low else low
                    early.sendto(b"too early", ("127.0.0.1", outside))
                    wait_until(lambda: any(session.relay and session.relay.dropped
                                           for session in server.sessions))
                    exchange(self, udp, where)
            self.assertIn("dropped: 1 client not known yet", line[0])

    def test_advertise(self):
        with running(advertise=("192.0.2.1",)) as server, dial(server.server_address) as control:
            negotiate(control)
            reply = ask(control, Cmd.UDP_ASSOCIATE, "0.0.0.0", 0)
            self.assertEqual((str(reply.bnd.host), bool(reply.bnd.port)), ("192.0.2.1", True))


# ---- the end -----------------------------------------------------------------------------------------------------

def is_free(relay):
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        try:
            sock.bind(relay)
        except OSError:
            return False
        return True


@contextlib.contextmanager
def no_collector():
    """What is garbage but in a cycle stays, meanwhile."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


WAITS = "in a free-threaded Python, an object waits until the thread that made it runs again"


class TheEnd(unittest.TestCase):
    @unittest.skipIf(FREE_THREADED, WAITS)
    def test_closed_associations_leave_nothing_to_the_garbage_collector(self):
        def associations():
            return sum(isinstance(thing, Association) for thing in gc.get_objects())

        with no_collector(), running() as server, remote() as where:
            for host in ("127.0.0.1", "localhost"):
                for end in (lambda udp: udp.close(), lambda udp: reset(udp.control)):
                    with associated(server) as udp:
                        udp.sendto(b"hello", (host, where[1]))
                        self.assertEqual(udp.recvfrom(), (b"HELLO", where))
                        self.assertEqual(associations(), 1)
                        end(udp)
                    wait_until(lambda: not associations(), "it is gone")

    @unittest.skipIf(FREE_THREADED, WAITS)
    def test_one_that_was_refused_leaves_nothing_either(self):
        low = free_ports(2, "0.0.0.0")
        with no_collector(), running(udp_ports=(low, low + 1)) as server:
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as other, self.assertRaises(ProxyError):
                other.bind(("", low))
                client.associate(server.server_address)
            wait_until(lambda: not any(isinstance(thing, Association) for thing in gc.get_objects()))

    def test_one_buffer_is_enough_however_many_associations_are_busy(self):
        had = len(BUFFERS)                  # of associations that had threads
        with running() as server, remote() as where, contextlib.ExitStack() as stack:
            many = [stack.enter_context(associated(server)) for _ in range(40)]
            for _ in range(3):
                for udp in many:
                    udp.sendto(b"some words", where)
                for udp in many:
                    self.assertEqual(udp.recvfrom(), (b"SOME WORDS", where))
            wait_until(lambda: len(BUFFERS) == max(had, 1), "it is given back")

    def test_how_it_ends(self):
        def fin(udp, server):
            udp.control.close()

        def rst(udp, server):
            reset(udp.control)

        def half(udp, server):
            udp.control.shutdown(socket.SHUT_WR)
            self.assertEqual(udp.control.recv(1), b"")

        def idle(udp, server):
            self.assertRaises(ProxyError, udp.recvfrom)

        def loop_stops(udp, server):
            server.relay_loop().abort_all("server stopped")
            self.assertRaises(ProxyError, udp.recvfrom)

        def drain(udp, server):
            server.shutdown()
            self.assertEqual(server.drain(0.01), 1)
            self.assertEqual(len(server.sessions), 0)

        cases = [("FIN", fin, {}, "ended=client why=-"),
                 ("RST", rst, {}, "ended=client why='Connection reset by peer'"),
                 ("half-closed", half, {}, "ended=client why=-"),
                 ("loop", loop_stops, {}, "ended=server-stopped why=-"),
                 ("drain", drain, {}, "ended=server-stopped why=-"),
                 ("idle", idle, {"udp_idle_timeout": 2}, "ended=idle why=-")]
        for name, end, options, words in cases:
            with self.subTest(name), running(**options) as server, remote() as where:
                with session_line(self, server) as line, associated(server) as udp:
                    exchange(self, udp, where)
                    self.assertFalse(is_free(udp.relay))
                    end(udp, server)
                    wait_until(lambda: is_free(udp.relay), timeout=PATIENCE_S)
                self.assertIn(words, line[0])

    def test_strangers_do_not_keep_it_alive(self):
        with running(udp_idle_timeout=0.3) as server, udp_socket("127.0.0.2") as stranger:
            with associated(server) as udp:
                over = threading.Event()

                def pester():
                    while not over.wait(0.05):
                        stranger.sendto(b"keep alive", udp.relay)

                thread = threading.Thread(target=pester, daemon=True)
                thread.start()
                try:
                    self.assertRaises(ProxyError, udp.recvfrom)
                finally:
                    over.set()
                    thread.join(PATIENCE_S)

    def test_bytes_on_the_connection_are_ignored(self):
        with running() as server, remote() as where, dial(server.server_address) as control, udp_socket() as sock:
            negotiate(control)
            bnd = ask(control, Cmd.UDP_ASSOCIATE, "0.0.0.0", 0).bnd
            for _ in range(3):
                control.sendall(b"\5\1\0\1garbage" * 5000)
                sock.sendto(Datagram(address(*where), b"hello").pack(), (str(bnd.host), bnd.port))
                self.assertEqual(Datagram.parse(sock.recv(100)).data, b"HELLO")
            self.assertEqual(len(server.sessions), 1)

    def test_nothing_is_left_of_500(self):
        endings = itertools.cycle(["FIN", "RST", "datagram socket first", "early", "name", "idle"])
        with remote() as where, spawned(*ALONE, "-q", "--udp-idle-timeout", 2) as server:
            proxy, pid = ("127.0.0.1", server.port), server.process.pid
            with associated(proxy) as first:                    # the server has opened what it keeps
                exchange(self, first, where)
            before, held = descriptors(pid), contextlib.ExitStack()
            idle_threads = OTHER_THREADS + MAX_WAITING + MAX_SPARE
            with held:
                for number, ending in enumerate(itertools.islice(endings, 500)):
                    if number == 150:
                        memory = resident_kib(pid)
                    udp = client.associate(proxy)
                    udp.settimeout(PATIENCE_S)
                    if ending == "name":
                        udp.sendto(b"x", ("localhost", closed_port()))
                    if ending != "early":
                        exchange(self, udp, where)
                    if ending == "RST":
                        reset(udp.control)
                    if ending == "datagram socket first":
                        udp.sock.close()
                    if ending == "idle":
                        held.callback(udp.close)
                    else:
                        udp.close()
                wait_until(lambda: descriptors(pid) <= before and threads(pid) <= idle_threads, "nothing is left")
                self.assertLess(resident_kib(pid), memory + (10 << 10))         # with a buffer for each: 44 MiB


# ---- in the relay loop -------------------------------------------------------------------------------------------

@unittest.skipUnless(MANY, "by select(), the thread that brings an association relays it to its end")
class InTheLoop(unittest.TestCase):
    def test_an_association_holds_no_thread(self):
        with spawned(*ALONE, "-q") as server, remote() as where, contextlib.ExitStack() as stack:
            for _ in range(40):
                exchange(self, stack.enter_context(associated(("127.0.0.1", server.port))), where)
            self.assertLessEqual(threads(server.process.pid), OTHER_THREADS + MAX_WAITING + MAX_SPARE)

    def test_a_name_that_is_looked_up_holds_no_descriptor(self):
        hang = threading.Event()
        real = socket.getaddrinfo

        def getaddrinfo(host, *args, **kwargs):
            hang.wait(PATIENCE_S)
            return real("127.0.0.1", *args, **kwargs)

        with running() as server, remote() as where, associated(server) as udp:
            exchange(self, udp, where)
            before = descriptors()
            try:
                with patch("socket.getaddrinfo", getaddrinfo):
                    udp.sendto(b"late", ("slow.test", where[1]))
                    exchange(self, udp, where)
                    self.assertEqual(descriptors(), before)
                    hang.set()
                    self.assertEqual(udp.recvfrom(), (b"LATE", where))
            finally:
                hang.set()

    def test_a_flood_leaves_tunnels_their_turns(self):
        """Relays whose bursts never end take turns with one another, and a tunnel's turn comes between two of them."""
        turns = []

        class Endless(Relay):
            __slots__ = ("number", "sock")

            def __init__(self, number, sock):
                super().__init__()
                self.number, self.sock = number, sock

            def fds(self):
                return [self.sock.fileno()]

            def handle(self, fd, events, now):
                turns.append(self.number)
                over.wait(2 * BURSTS_S)
                return False

            def sockets(self):
                return (self.sock,)

            def deadline(self):
                return float("inf")

        over, ended, bugs = threading.Event(), [], []
        loop = Loop(ended.append, lambda: bugs.append(sys.exc_info()[1]))
        poll, at_polls = loop._poller.poll, []
        loop._poller.poll = lambda *args: at_polls.append(len(turns)) or poll(*args)
        loop.start()
        with contextlib.ExitStack() as stack:
            pairs = [stack.enter_context(sock) for _ in range(5) for sock in socket.socketpair()]
            stack.callback(loop.stop, "the test is over")
            stack.callback(over.set)
            for number in range(3):
                pairs[2 * number].send(b"is never read")
                loop.relay(Endless(number, pairs[2 * number + 1]))
            tunnel = Tunnel(pairs[7], pairs[8])
            loop.relay(tunnel)
            pairs[6].settimeout(PATIENCE_S)
            pairs[9].settimeout(PATIENCE_S)
            wait_until(lambda: len(turns) >= 30)
            for _ in range(20):
                before = len(turns)
                pairs[6].send(b"there")
                self.assertEqual(pairs[9].recv(100), b"there")
                pairs[9].send(b"and back")
                self.assertEqual(pairs[6].recv(100), b"and back")
                wait_until(lambda: len(turns) > before, "bursts have turns as well")
            between = [after - before for before, after in zip(at_polls, at_polls[1:])]
            self.assertEqual(max(between), 1, "one long turn, and then the tunnels")
            counts = [turns[:30].count(number) for number in range(3)]
            self.assertLessEqual(max(counts[1:]) - min(counts[1:]), 1, turns[:30])
        self.assertEqual((bugs, len(ended)), ([], 4))


def held_back(event):
    """A Server that hands nothing over to its relay loop before the event."""
    class Server(socks5.Server):
        def relay(self, relay):
            event.wait(PATIENCE_S)
            super().relay(relay)

    return Server


class OneForItself(unittest.TestCase):
    """In the loop, or in threads where there is only select()."""

    def test_what_comes_before_the_hand_over_is_relayed(self):
        came = threading.Event()

        with running(server_class=held_back(came)) as server, remote() as where, associated(server) as udp:
            for number in range(5):
                udp.sendto(b"early %d" % number, where)
            came.set()
            for number in range(5):
                self.assertEqual(udp.recvfrom(), (b"EARLY %d" % number, where))

    def test_a_control_connection_that_ended_before_the_hand_over(self):
        gone = threading.Event()

        for end in (lambda udp: udp.close(), lambda udp: reset(udp.control)):
            with running(server_class=held_back(gone)) as server, session_line(self, server) as line:
                with associated(server) as udp:
                    end(udp)
                gone.set()
            self.assertIn("rep=SUCCEEDED up=0 down=0", line[0])
            self.assertIn("ended=client", line[0])

    def test_a_bug_in_one_costs_only_that_one(self):
        def bug(*_):
            raise KeyError("bug")

        for host in ("127.0.0.1", "localhost"):             # in handle(), and behind a lookup
            with self.subTest(host), running() as server, remote() as where, associated(server) as one, \
                    associated(server) as other, dial(server.server_address) as idle:
                for udp in (one, other):
                    exchange(self, udp, where)
                oldest = min(server.sessions, key=lambda session: session.number)
                with self.assertLogs("socks5", "INFO") as logs:
                    oldest.relay.permit = lambda address, port, name: address is None or bug()
                    one.sendto(b"x", (host, closed_port()))
                    self.assertRaises(ProxyError, one.recvfrom)
                    wait_until(lambda: len(server.sessions) == 2)
                self.assertTrue(any("KeyError" in line for line in logs.output), logs.output)
                self.assertTrue(any("ended=server" in line for line in logs.output), logs.output)
                exchange(self, other, where)
                negotiate(idle)

    def test_a_lone_datagram_is_received_by_one_call(self):
        calls = []

        class Counted:
            def __init__(self, sock):
                self.sock = sock
                self.fileno, self.sendto, self.close = sock.fileno, sock.sendto, sock.close

            def recvfrom_into(self, view):
                try:
                    calls.append("datagram")
                    return self.sock.recvfrom_into(view)
                except BlockingIOError:
                    calls[-1] = "nothing"
                    raise

        with socket.create_server(("127.0.0.1", 0)) as listener, dial(listener.getsockname()), \
                listener.accept()[0] as ours, udp_socket() as sock, udp_socket() as there:
            association = Association(ours, ip_address("127.0.0.1"), ANY_PORT, (), Names(), lambda *_: True)
            with contextlib.closing(association):
                association._inside = Counted(association._inside)
                sock.connect((str(association.bnd.ip), association.bnd.port))
                raw = Datagram(address(*there.getsockname()), b"hello").pack()
                for now, sent, expected in (
                        (1000.0, 1, ["datagram"]), (2000.0, 1, ["datagram"]), (3000.0, 3, ["datagram"]),
                        (3000.0, 0, ["datagram"] * 2 + ["nothing"]), (4000.0, 1, ["datagram"])):
                    for _ in range(sent):
                        sock.send(raw)
                    del calls[:]
                    association.handle(association._facing, 1, now)
                    self.assertEqual(calls, expected)

    def test_a_burst_ends_after_a_few_headers_that_are_not_known(self):
        """To judge one may take milliseconds, where there are thousands of rules."""
        judged = []
        with socket.create_server(("127.0.0.1", 0)) as listener, dial(listener.getsockname()), \
                listener.accept()[0] as ours, udp_socket() as sock:
            association = Association(ours, ip_address("127.0.0.1"), ANY_PORT, (), Names(),
                                      lambda host, port, _name: judged.append(port))
            with contextlib.closing(association):
                sock.connect((str(association.bnd.ip), association.bnd.port))
                ports = list(range(1, 3 * LOOKS + 1))
                for port in ports:
                    sock.send(Datagram(address("127.0.0.1", port), b"hello").pack())
                association.handle(association._facing, 1, 1000.0)      # the first one comes alone
                for burst in range(3):
                    self.assertEqual(judged, ports[:1 + burst * LOOKS])
                    association.handle(association._facing, 1, 1000.0)
                self.assertEqual(judged, ports)


# ---- many --------------------------------------------------------------------------------------------------------

class Many(unittest.TestCase):
    def test_300_associations_at_once(self):
        with spawned("-q") as server, remote() as where, contextlib.ExitStack() as stack:
            all_of_them = [stack.enter_context(associated(("127.0.0.1", server.port))) for _ in range(300)]
            for turn in range(3):
                for number, udp in enumerate(all_of_them):
                    udp.sendto(b"turn %d of %d" % (turn, number), where)
                for number, udp in enumerate(all_of_them):
                    self.assertEqual(udp.recvfrom(), (b"TURN %d OF %d" % (turn, number), where))

    def test_a_storm(self):
        """50,000 datagrams, 64 of them under way: at most one in a hundred is lost."""
        count, flight = 50000, 64
        with spawned("-q") as server, remote(lambda data: data) as where, associated(("127.0.0.1", server.port)) as udp:
            header = Datagram(address(*where), b"").pack()
            sock, sent, received, lost = udp.sock, 0, 0, 0
            sock.settimeout(3)
            pad = bytes(500)
            while received + lost < count:
                while sent < count and sent - received - lost < flight:
                    sock.send(header + struct.pack("!I", sent) + pad)
                    sent += 1
                try:
                    number, = struct.unpack_from("!I", sock.recv(2000), HEADER)
                    self.assertLess(number, sent)
                    received += 1
                except socket.timeout:
                    lost = sent - received
        self.assertLessEqual(lost, count // 100)


class OtherHosts(TwoHosts, unittest.TestCase):
    """BND.ADDR is where the other host can reach it; and what is between them is no loopback."""

    def test_the_client_is_on_the_other_host(self):
        for version in VERSIONS:
            with self.subTest("IPv%d" % version), contextlib.ExitStack() as stack:
                server = stack.enter_context(self.proxy("-l", NEAR[version], "--open"))
                there = stack.enter_context(self.far(udp_socket, FAR[version]))
                udp = stack.enter_context(self.far(client.associate, (NEAR[version], server.port)))
                udp.settimeout(PATIENCE_S)
                self.assertEqual(udp.relay[0], NEAR[version])
                for size in (0, 1, 1400, 1440, 1472, 9000, 60000):
                    data = [os.urandom(size) for _ in range(8 if size < 9000 else 2)]
                    for sent in data:
                        udp.sendto(sent, there.getsockname()[:2])
                    for sent in data:
                        received, mapped = there.recvfrom(1 << 16)
                        self.assertEqual((received == sent, len(received), mapped[0]), (True, size, NEAR[version]))
                        there.sendto(received, mapped)
                    self.assertEqual([udp.recvfrom() for _ in data], [(sent, there.getsockname()[:2]) for sent in data])

    def test_the_remote_is_on_the_other_host(self):
        with self.proxy() as server:
            with self.near(client.associate, ("127.0.0.1", server.port)) as udp:
                udp.settimeout(PATIENCE_S)
                udp.sendto(b"no way", ("203.0.113.9", 9))
                for version in VERSIONS:
                    with self.subTest("IPv%d" % version), self.far(udp_socket, FAR[version]) as there:
                        udp.sendto(b"there", there.getsockname()[:2])
                        data, mapped = there.recvfrom(100)
                        self.assertEqual((data, mapped[0]), (b"there", NEAR[version]))
                        there.sendto(b"and back", mapped)
                        self.assertEqual(udp.recvfrom(), (b"and back", there.getsockname()[:2]))
            server.wait_line("why='dropped: 1 ENETUNREACH'")


# ---- other people's programs -------------------------------------------------------------------------------------

NODE_ASSOCIATE = """
const { SocksClient } = require(process.argv[1] + '/socks');
const dgram = require('dgram');
const [proxy, port] = [Number(process.argv[2]), Number(process.argv[3])];
const udp = dgram.createSocket('udp4');
const client = new SocksClient({ proxy: { host: '127.0.0.1', port: proxy, type: 5 }, command: 'associate',
                                 destination: { host: '0.0.0.0', port: 0 } });
client.on('error', error => { console.error(error); process.exit(1); });
client.on('established', info => {
  udp.on('message', message => {
    const frame = SocksClient.parseUDPFrame(message);
    console.log(frame.remoteHost.host, frame.remoteHost.port, frame.data.toString());
    process.exit(0);
  });
  const frame = SocksClient.createUDPFrame({ remoteHost: { host: '127.0.0.1', port }, data: Buffer.from('from node') });
  udp.send(frame, info.remoteHost.port, info.remoteHost.host);
});
client.connect();
"""

SOCKSIFIED = """
import socket, sys
sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
sock.settimeout(%d)
sock.sendto(b"from socksify", ("localhost", int(sys.argv[1])))
data, (host, port) = sock.recvfrom(1000)
print(host, port, data.decode())
""" % PATIENCE_S


def question(name):
    """A DNS query for the name's A record, RFC 1035 section 4.1."""
    labels = b"".join(bytes([len(label)]) + label for label in name.split(b"."))
    return struct.pack("!6H", 0x1234, 0x0100, 1, 0, 0, 0) + labels + b"\0" + struct.pack("!2H", 1, 1)


class Programs(unittest.TestCase):
    def output_of(self, *args, **kwargs):
        done = subprocess.run(list(map(str, args)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=PATIENCE_S,
                              universal_newlines=True, **kwargs)
        self.assertEqual(done.returncode, 0, done.stderr)
        return done.stdout

    def test_DNS(self):
        dnsmasq = need_program(self, "dnsmasq")
        port = closed_port()
        process = subprocess.Popen(
            [dnsmasq, "--keep-in-foreground", "--conf-file=/dev/null", "--port=%d" % port, "--listen-address=127.0.0.1",
             "--bind-interfaces", "--no-resolv", "--no-hosts", "--user=", "--group=", "--pid-file=",
             "--log-facility=-", "--address=/name.test/192.0.2.53"], stderr=subprocess.PIPE, text=True)
        try:
            with running() as server, associated(server) as udp:
                self.assertIn("started", process.stderr.readline())
                for host in ("127.0.0.1", "localhost"):
                    with self.subTest(host):
                        udp.sendto(question(b"name.test"), (host, port))
                        answer, where = udp.recvfrom()
                        self.assertEqual(where, ("127.0.0.1", port))
                        self.assertEqual(struct.unpack_from("!4H", answer), (0x1234, 0x8580, 1, 1))
                        self.assertEqual(answer[-4:], ip_address("192.0.2.53").packed)
        finally:
            process.kill()
            process.communicate()

    def test_node_socks(self):
        node = need_program(self, "node")
        modules = os.environ.get("SOCKS5_NODE_MODULES", "")
        need(self, os.path.isdir(os.path.join(modules, "socks")), "Node's socks (in SOCKS5_NODE_MODULES)")
        with running() as server, remote() as (host, port):
            said = self.output_of(node, "-e", NODE_ASSOCIATE, modules, server.server_address[1], port)
            self.assertEqual(said, "127.0.0.1 %d FROM NODE\n" % port)

    def test_dante_socksify(self):
        socksify = need_program(self, "socksify")
        with running() as server, remote() as (host, port), tempfile.NamedTemporaryFile("w", suffix=".conf") as config:
            # Dante goes directly to whatever is on a network of this host; a name it leaves to the proxy.
            config.write("""resolveprotocol: fake
                route {
                from: 0.0.0.0/0 to: 0.0.0.0/0 via: 127.0.0.1 port = %d
                protocol: udp
                command: udpassociate
                proxyprotocol: socks_v5
                method: none
                }
                """ % server.server_address[1])
            config.flush()
            with session_line(self, server) as line:
                said = self.output_of(socksify, sys.executable, "-c", SOCKSIFIED, port,
                                      env=dict(os.environ, SOCKS_CONF=config.name))
            self.assertEqual(said, "127.0.0.1 %d FROM SOCKSIFY\n" % port)
            self.assertRegex(line[0], "cmd=UDP_ASSOCIATE.* up=13 down=13 ")


if __name__ == "__main__":
    unittest.main()
