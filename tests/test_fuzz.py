"""Streams and datagrams that no client sends, against the live server: mutated, cut, spliced, reset.

CASES of them, a fifth streams and the rest datagrams, in some 8 s; SOCKS5_FUZZ=N in the environment makes it N. All
come from SEED, so that what fails can be seen again. What the server is asked for never leaves this machine: its rules
allow the ports of this test and no other, and `harmless` keeps names from the resolver.
"""
import contextlib
import os
import random
import re
import socket
import struct
import tempfile
import threading

from socks5.protocol.codes import Cmd, Method, Rep
from socks5.protocol.errors import SocksError
from socks5.protocol.fields import BytesReader
from socks5.net.resolver import normalise
from socks5.server.acceptors import MAX_SPARE, MAX_WAITING
from socks5.protocol.messages import Datagram, Greeting, Login, LoginStatus, Request, Selection
from tests.support import (OTHER_THREADS, PATIENCE_S, ROOT, Case, address, ask, closed_port, connect_through,
                           descriptors, dial, echoes, greeted, need, read_to_end, reader_of, reset, resident_kib,
                           spawned, target, threads, udp_socket, wait_until)

CASES = int(os.environ.get("SOCKS5_FUZZ") or 30000)
SEED = 1928
BATCH = 200                         # streams that are open at the same time
BURST = 50                          # datagrams before we look whether the server still answers: what its socket holds
# Some 1.5 MiB were seen: tables that fill up, and what allocators keep. A leak of 2 KiB a stream would be more.
GROWTH_KIB = 8 << 10
USER = b"fuzz", b"secret"
# All of 127.0.0.0/8 is one origin to the throttle: without this, the mutated logins would wait.
UNTHROTTLED = ("import sys; from socks5 import cli; from socks5.access import throttle; "
               "throttle.BURST = throttle.NAME_BURST = 1e9; sys.exit(cli.main())")
INTERESTING = [0x00, 0x01, 0x02, 0x03, 0x04, 0x05, 0x06, 0x0A, 0x20, 0x7F, 0x80, 0x81, 0xFE, 0xFF]
GREETING = Greeting(bytes([Method.USERNAME_PASSWORD])).pack()
LOGIN = Login(*USER).pack()
STEPS = Selection(Method.USERNAME_PASSWORD).pack(), LoginStatus(0).pack()
LINE = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} (WARNING|ERROR) [ -~]*")        # one event each
FOREIGN = [b"\x04\x01\x00\x50\x7f\x00\x00\x01user\0", b"GET http://localhost/ HTTP/1.1\r\nHost: localhost\r\n\r\n",
           b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", b"SSH-2.0-OpenSSH_9.2\r\n", b"\r\n\r\n", b"\0" * 300]
NAMES = [b"localhost", b"LocalHost", b"127.0.0.1", b"::1", b"127.0.0.1\0.example", b"a..b", b"", b"\xff" * 255,
         b"x" * 64, b"*.example", b" ", b"%00", b"fe80::1%lo", b"\xc3\xa9\xcc\x81 ", "\u2026.\u3002".encode()]


# ---- what is sent ------------------------------------------------------------------------------------------------

def mutate(rng, data, others):
    """One to four changes; `others` is where the other half of a splice comes from."""
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 2, 4))):
        at = rng.randrange(len(data) + 1)
        to = min(len(data), at + rng.choice((1, 1, 2, 4, 16)))
        how = rng.randrange(8)
        if how == 0 and at < len(data):
            data[at] ^= 1 << rng.randrange(8)
        elif how == 1 and at < len(data):
            data[at] = rng.choice(INTERESTING)
        elif how == 2:
            del data[at:to]
        elif how == 3:
            data[at:at] = data[at:to] * rng.choice((1, 2, 40))
        elif how == 4:
            data[at:at] = bytes(rng.choice(INTERESTING) for _ in range(rng.choice((1, 2, 8, 300))))
        elif how == 5:
            data[at:] = b""
        elif how == 6:
            other = rng.choice(others)
            data[at:] = other[rng.randrange(len(other) + 1):]
        else:
            data[at:to] = bytes(rng.randrange(256) for _ in range(to - at))
    return bytes(data)


def lookup(host):
    """Would the server ask a resolver for it? What stands in the file of hosts does not leave this machine."""
    try:
        name = normalise(host)
    except SocksError:
        return False
    return isinstance(name, bytes) and name.lower() != b"localhost"


def harmless(stream, kinds):
    """`stream`, or what is left of it before a message that has a name to look up."""
    reads = BytesReader(stream)
    try:
        for kind in kinds:
            before = reads.at
            message = kind.parse(reads)
            if lookup(getattr(message, "dst", address("0.0.0.0", 0)).host):
                return stream[:before]
    except (EOFError, SocksError):
        pass
    return stream


def name_request(cmd, name, port):
    return bytes([5, cmd, 0, 3, len(name)]) + name + struct.pack("!H", port)


def streams(echo, closed):
    """Conversations from which the others are made: most of them right, all in one piece."""
    destinations = [echo, ("127.0.0.1", closed), ("127.0.0.1", 0), ("192.0.2.1", 80), ("::1", echo[1]), ("0.0.0.0", 0),
                    ("::ffff:127.0.0.1", echo[1]), ("::", 0), ("255.255.255.255", 65535), ("224.0.0.1", 9)]
    requests = [Request(cmd, address(*where)).pack() for cmd in Cmd for where in destinations]
    requests += [name_request(cmd, name, echo[1]) for cmd in Cmd for name in NAMES]
    logins = [LOGIN] * 8 + [Login(b"fuzz", b"wrong").pack(), Login(b"x" * 255, b"y" * 255).pack(), b"\x01\x00\x00",
                            Login(b"a\r\nWARNING auth_failed client=192.0.2.1 user='root'", b"p").pack()]
    greetings = [GREETING] * 4 + [Greeting(bytes(range(255))).pack(), Greeting(b"").pack(), b"\x05\x02\x00\x02"]
    found = [greetings[n % len(greetings)] + logins[n % len(logins)] + request + b"payload" * (n % 4)
             for n, request in enumerate(requests * 3)]
    return found + FOREIGN


def packets(echo):
    """Datagrams from which the others are made."""
    destinations = [echo, ("127.0.0.1", 0), ("192.0.2.1", 53), ("::1", echo[1]), ("::ffff:127.0.0.1", echo[1]),
                    ("0.0.0.0", 0), ("255.255.255.255", 9), ("224.0.0.1", 5353)]
    found = [Datagram(address(*where), b"data" * size, frag).pack() for where in destinations for size in (0, 1, 300)
             for frag in (0, 0, 1, 2, 3, 0x82, 0xFF)]
    return found + [b"\0\0\0\3" + bytes([len(name)]) + name + struct.pack("!H", echo[1]) + b"data" for name in NAMES]


# ---- the server that has to bear it ------------------------------------------------------------------------------

def upper(sock, over):
    """Answers datagrams until `over` comes; "port?" with the port that it came from."""
    while True:
        data, sender = sock.recvfrom(1 << 16)
        if data == over:
            return
        with contextlib.suppress(OSError):
            sock.sendto(b"%d" % sender[1] if data == b"port?" else data.upper(), sender)


class Fuzz(Case):
    def setUp(self):
        need(self, os.path.isdir("/proc/self/fd"), "/proc")
        try:
            with socket.socket() as probe:
                probe.bind(("127.1.2.3", 0))
        except OSError:
            need(self, False, "a loopback of 16 million addresses")
        self.rng = random.Random(SEED)
        self.echo = self.enter(target())
        self.closed = closed_port()
        self.remote = self.enter(udp_socket())
        self.remote.settimeout(None)
        answering = threading.Thread(target=upper, args=(self.remote, b"over"), daemon=True)
        answering.start()
        self.addCleanup(answering.join, PATIENCE_S)
        self.addCleanup(self.remote.sendto, b"over", self.remote.getsockname())
        rules = self.enter(tempfile.NamedTemporaryFile("w"))
        rules.write("allow to 127.0.0.0/8 port %d command connect\nallow to 127.0.0.0/8 port %d command connect\n"
                    "allow to 127.0.0.0/8 command bind\nallow to 0.0.0.0 command bind\n"
                    "allow to 127.0.0.0/8 port %d command udp\n"
                    % (self.echo[1], self.closed, self.remote.getsockname()[1]))
        rules.flush()
        self.server = self.enter(spawned(
            UNTHROTTLED, "-q", "-u", b":".join(USER).decode(), "--rules", rules.name, script="-c", cwd=ROOT))
        self.port, self.pid = self.server.port, self.server.process.pid

    def still_serves(self):
        with connect_through(self.port, *self.echo, user=USER) as tunnel:
            self.assertTrue(echoes(tunnel))

    def spare_threads_only(self):
        """The acceptors that wait, the server's and the relay loop's."""
        wait_until(lambda: threads(self.pid) <= MAX_WAITING + MAX_SPARE + OTHER_THREADS, "no threads but acceptors")

    @contextlib.contextmanager
    def nothing_left(self, warm_up):
        """After what has happened inside, the server is as it was after warm_up()."""
        warm_up()
        self.spare_threads_only()
        self.still_serves()
        fds, kib = descriptors(self.pid), resident_kib(self.pid)
        yield
        self.still_serves()
        wait_until(lambda: descriptors(self.pid) <= fds, "descriptors back at %d" % fds)
        self.spare_threads_only()
        self.assertLess(resident_kib(self.pid), kib + GROWTH_KIB)
        self.assertIsNone(self.server.process.poll())
        self.assertEqual([line for line in self.server.log if not LINE.fullmatch(line) or "bug " in line], [])

    # ---- streams ------------------------------------------------------------------------------------------------

    def stream(self, originals):
        """One in eight as it should be, three with the greeting and the login as they should be."""
        data, start = self.rng.choice(originals), len(GREETING + LOGIN)
        how = self.rng.randrange(8)
        if how > 3:
            data = mutate(self.rng, data, originals)
        elif how:
            data = GREETING + LOGIN + mutate(self.rng, data[start:], originals)
        return harmless(data, (Greeting, Login, Request))

    def newcomer(self, stack, port):
        """A client at an address of its own."""
        rng, client = self.rng, stack.enter_context(socket.socket())
        client.settimeout(PATIENCE_S)
        client.bind(("127.%d.%d.%d" % (rng.randrange(1, 255), rng.randrange(256), rng.randrange(1, 255)), 0))
        client.connect(("127.0.0.1", port))
        return client

    def batch(self, originals, size):
        """`size` clients at once, each with a stream in up to three pieces, and an end of its own."""
        rng, clients = self.rng, []
        with contextlib.ExitStack() as stack:
            for _ in range(size):
                data = self.stream(originals)
                cuts = sorted(rng.randrange(len(data) + 1) for _ in range(rng.choice((0, 1, 2))))
                pieces = [data[a:b] for a, b in zip([0, *cuts], [*cuts, len(data)])]
                client = self.newcomer(stack, self.port)
                client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                clients.append((client, data, pieces, rng.choice((socket.socket.close, reset, self.finish))))
            for turn in range(3):
                for client, _data, pieces, _end in clients:
                    with contextlib.suppress(OSError):          # refused already, and closed
                        client.sendall(pieces[turn] if turn < len(pieces) else b"")
            for client, data, _pieces, end in clients:
                try:
                    end(client)
                except socket.timeout:
                    self.fail("the server does not let go of %r" % data)

    def finish(self, client):
        """A client who says that this was all hears the end of it."""
        try:
            client.shutdown(socket.SHUT_WR)
            heard = read_to_end(client)
        except socket.timeout:
            raise
        except OSError:                                         # reset already: ECONNRESET, ENOTCONN
            return
        self.assertIn(heard[:1], (b"", b"\x05", b"\x00", b"H"))
        self.assertLess(len(heard), 4096)

    def test_streams(self):
        """A client with good manners is served between any two batches."""
        originals = streams(self.echo, self.closed)
        with self.nothing_left(lambda: [self.batch(originals, BATCH) for _ in range(20)]):
            for _ in range(max(1, CASES // 5 // BATCH - 20)):
                self.batch(originals, BATCH)
                self.still_serves()

    def test_resets_at_every_stage(self):
        """Behind every byte of a conversation, when the server has answered all that was complete."""
        bind = Request(Cmd.BIND, address("127.0.0.1", 0)).pack()
        udp = Request(Cmd.UDP_ASSOCIATE, address("0.0.0.0", 0)).pack()
        connect = Request(Cmd.CONNECT, address(*self.echo)).pack()

        def go_round():
            for request in (connect, bind, udp):
                messages = [GREETING, LOGIN, request, b"data"]
                whole = b"".join(messages)
                ends = [sum(map(len, messages[:n])) for n in (1, 2, 3)]
                for length in range(len(whole) + 1):
                    client = dial(self.port)
                    client.sendall(whole[:length])
                    heard = sum(size for size, end in zip((2, 2, 10), ends) if length >= end)
                    answer = reader_of(client)(heard)
                    self.assertEqual(answer[:4], b"".join(STEPS)[:heard][:4])
                    self.assertIn(answer[4:6], (b"", b"\x05\x00"))
                    reset(client)

        with self.nothing_left(go_round):
            for _ in range(3):
                go_round()

    def test_clients_that_never_read(self):
        """Neither an answer nor an echo: no thread, descriptor or memory of ours for ever."""
        def refused(stack):
            clients = [self.newcomer(stack, self.port) for _ in range(50)]
            for client in clients:
                client.sendall(GREETING + LOGIN + Request(Cmd.CONNECT, address("192.0.2.1", 80)).pack())

        with contextlib.ExitStack() as stack, self.nothing_left(lambda: refused(stack)):
            refused(stack)                                  # these stay open, and unread
        request = Request(Cmd.CONNECT, address(*self.echo)).pack()
        with self.nothing_left(self.still_serves), contextlib.ExitStack() as stack:
            for _ in range(50):
                client = self.newcomer(stack, self.port)
                client.setblocking(False)
                client.sendall(GREETING + LOGIN + request)
                with contextlib.suppress(BlockingIOError):      # an echo that is not read comes to a stop
                    while True:
                        client.send(bytes(1 << 16))
            self.still_serves()
            self.assertLess(resident_kib(self.pid), 120 << 10)

    # ---- datagrams ----------------------------------------------------------------------------------------------

    def association(self, originals, count):
        """One association and `count` datagrams for it: most from its client, some from others, on both its sides."""
        rng, remote = self.rng, self.remote.getsockname()
        ping, pong = (Datagram(address(*remote), data).pack() for data in (b"still there?", b"STILL THERE?"))
        with contextlib.ExitStack() as stack:
            control = stack.enter_context(greeted(self.port, USER))
            reply = ask(control, Cmd.UDP_ASSOCIATE, "0.0.0.0", 0)
            self.assertEqual(reply.rep, Rep.SUCCEEDED)
            relay = str(reply.bnd.host), reply.bnd.port
            client, stranger = (stack.enter_context(udp_socket(host)) for host in ("127.0.0.1", "127.0.0.2"))
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
            client.sendto(Datagram(address(*remote), b"port?").pack(), relay)
            outside = "127.0.0.1", int(Datagram.parse(client.recv(1 << 16)).data)
            for begin in range(0, count, BURST):
                for _ in range(min(BURST, count - begin)):
                    data = mutate(rng, rng.choice(originals), originals)
                    sender = stranger if rng.random() < 0.1 else client
                    sender.sendto(harmless(data, (Packet,)), relay)
                    if sender is stranger:
                        sender.sendto(data, outside)
                client.sendto(ping, relay)
                self.hear(client, pong, (self.remote.getsockname()[1], stranger.getsockname()[1]))

    def hear(self, client, pong, ports):
        """The answer to what came last. What comes before it has a header each, with the port of its sender."""
        while True:
            try:
                data = client.recv(1 << 16)
            except socket.timeout:
                self.fail("the association does not answer any more")
            if data == pong:
                return
            self.assertEqual(data[:3], bytes(3))
            self.assertIn(Datagram.parse(data).dst.port, ports)

    def test_datagrams(self):
        originals = packets(self.remote.getsockname())
        each = max(BURST, CASES * 4 // 5 // 16)
        with self.nothing_left(lambda: self.association(originals, each)):
            for _ in range(15):
                self.association(originals, each)
                self.still_serves()


class Packet:
    """For `harmless`, which reads from a stream: a datagram is all that is there."""

    @staticmethod
    def parse(reads):
        return Datagram.parse(reads.rest())
