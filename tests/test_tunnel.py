"""relay: half-close, backpressure, resets, time-outs and abort, over real TCP connections.

Every test holds for any way of moving the bytes: subclasses run all of them with something taken away or set otherwise.
"""
import contextlib
import errno
import logging
import os
import queue
import random
import re
import select
import socket
import threading
import time
import unittest
from unittest import mock

from socks5.relay import tunnel as relay, splice

from socks5.net import poller as waiting
from socks5.protocol.codes import Cmd, Method
from socks5.relay.tunnel import Tunnel
from socks5.protocol.messages import Greeting, Reply, Request, Selection
from tests import support

MIB = 1 << 20
SMALL = 8192                # socket buffers for those who shall feel backpressure soon
QUIET_MS = 60               # a full socket that takes nothing for so long is stuck (if it is not, a test passes easily)
NOISE = memoryview(random.Random(1928).getrandbits(8 * 1000003).to_bytes(1000003, "big"))     # a prime number of bytes:
STREAM = memoryview(bytes(NOISE) * 5)           # nothing that moved by a power of two looks right


def stream(size):
    """Pieces that make `size` bytes, never the same at distances that a relay could get wrong."""
    while size > 0:
        yield NOISE[:size]
        size -= len(NOISE)


new_poll = getattr(select, "poll", waiting.SelectPoll)       # ours, when the server's is taken away


class Check:
    """Takes what arrives and compares it with stream(): how much came, and whether all of it was right."""

    def __init__(self):
        self.count = 0
        self.right = True

    def take(self, piece):
        at = self.count % len(NOISE)
        self.right = self.right and STREAM[at:at + len(piece)] == piece
        self.count += len(piece)

    def read_to_end(self, sock):
        """Until EOF or an error, which is given back: 0, or an errno."""
        try:
            while True:
                piece = sock.recv(1 << 18)
                if not piece:
                    return 0
                self.take(piece)
        except OSError as exc:
            return exc.errno


def tcp_pair(buffers=0):
    """Two connected TCP sockets on loopback, with socket buffers of about that many bytes."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        one = socket.socket()
        for sock in (listener, one):
            if buffers:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffers)
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, buffers)
        listener.listen(1)
        one.connect(listener.getsockname())
        two = listener.accept()[0]
    for sock in (one, two):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.settimeout(support.PATIENCE_S)
    return one, two


def comes(sock, event, timeout_ms):
    watch = new_poll()
    watch.register(sock.fileno(), event)
    return bool(watch.poll(timeout_ms))


def send_until_stuck(sock, limit=1 << 62):
    """Send stream() until nothing more is taken, however long one waits: how many bytes were."""
    sock.setblocking(False)
    sent = 0
    while sent < limit:
        at = sent % len(NOISE)
        try:
            sent += sock.send(STREAM[at:min(at + (1 << 16), at + limit - sent)])
        except BlockingIOError:
            if not comes(sock, waiting.WRITE, QUIET_MS):
                break
    sock.settimeout(support.PATIENCE_S)
    return sent


class Standing:
    """A Tunnel in a thread that owns its two sockets and closes them after it; `client` and `remote` are the far
    ends."""

    def __init__(self, early=b"", early_down=b"", buffers=0, before=None, **limits):
        self.client, self.near_client = tcp_pair(buffers)
        self.remote, self.near_remote = tcp_pair(buffers)
        if before:
            before(self)
        self.tunnel = Tunnel(self.near_client, self.near_remote, early, early_down, **limits)
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self):
        with self.near_client, self.near_remote:
            self.tunnel.run()
        self.cpu_s = time.thread_time()

    def ended(self):
        """(ended_by, why), when it has."""
        self.thread.join(support.PATIENCE_S)
        assert not self.thread.is_alive(), "the tunnel does not end"
        return self.tunnel.ended_by, self.tunnel.why

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.client.close()
        self.remote.close()
        self.thread.join(support.PATIENCE_S)


def fate(sock):
    """How a connection ends, after all that may still arrive: "EOF" or "reset"."""
    code = Check().read_to_end(sock)
    return {0: "EOF", errno.ECONNRESET: "reset", errno.EPIPE: "reset"}.get(code, code)


def dead(sock):
    """Whether a connection that had its EOF was then reset: HUP, though this side may still send. Waits for it."""
    return comes(sock, 0, support.PATIENCE_S * 1000)


@contextlib.contextmanager
def conditions(without=(), settings=()):
    """While it lasts, (module, name) of `without` do not exist and (module, name, value) of `settings` hold."""
    kept = [(module, name, getattr(module, name)) for module, name in without if hasattr(module, name)]
    with contextlib.ExitStack() as stack:
        for module, name, value in settings:
            stack.enter_context(mock.patch.object(module, name, value))
        for module, name, _value in kept:
            delattr(module, name)
        try:
            yield
        finally:
            for module, name, value in kept:
                setattr(module, name, value)


class Conditioned(unittest.TestCase):
    without = ()            # ((select, "poll"),): taken away while the tests of this class run
    settings = ()           # ((relay, "CHUNK_BYTES", 1),): set otherwise meanwhile

    @classmethod
    def setUpClass(cls):
        cls._stack = contextlib.ExitStack()
        cls._stack.enter_context(conditions(cls.without, cls.settings))

    @classmethod
    def tearDownClass(cls):
        cls._stack.close()


class ServerTest(Conditioned):
    """Through a whole server."""

    def through(self, server, target):
        return support.connect_through(server.server_address, *target)

    def test_half_close_with_8_mib_still_to_come(self):
        size = 8 * MIB

        def listen(sock):                       # says that it has said all, then listens
            sock.shutdown(socket.SHUT_WR)
            return check.read_to_end(sock)

        def talk(sock):                         # hears that, then has much to say
            heard = sock.recv(1)
            for piece in stream(size):
                sock.sendall(piece)
            sock.shutdown(socket.SHUT_WR)
            return heard

        for name, ours, theirs in (("client closes first", listen, talk), ("remote closes first", talk, listen)):
            results = queue.Queue()
            check = Check()
            with self.subTest(name), support.running() as server:
                with support.target(lambda sock: results.put(theirs(sock))) as target:
                    with self.through(server, target) as client:
                        results.put(ours(client))
                        heard = [results.get(timeout=support.PATIENCE_S) for _ in range(2)]
                self.assertCountEqual(heard, [b"", 0])
                self.assertEqual((check.count, check.right), (size, True))

    def test_an_echo_that_answers_while_it_is_sent_to(self):
        """A blocking send in one direction would wait for ever for an echo that waits for the other direction."""
        size = 50 * MIB
        check = Check()
        with support.target() as target, support.running() as server, self.through(server, target) as client:
            def send():
                for piece in stream(size):
                    client.sendall(piece)
                client.shutdown(socket.SHUT_WR)
            sender = threading.Thread(target=send, daemon=True)
            sender.start()
            self.assertEqual(check.read_to_end(client), 0)
            sender.join(support.PATIENCE_S)
        self.assertEqual((check.count, check.right), (size, True))

    def test_a_receiver_that_reads_nothing_costs_the_server_no_memory(self):
        size, allowed = 64 * MIB, 2 * MIB
        names = {module.__name__ for module, *_ in (*self.without, *self.settings)}
        code = ["import sys", *("import " + name for name in names), "from socks5.cli import main",
                *("vars(%s).pop(%r, 0)" % (module.__name__, name) for module, name in self.without),
                *("%s.%s = %r" % (module.__name__, name, value) for module, name, value in self.settings),
                "sys.exit(main())"]

        def resident(pid, what="VmRSS"):
            with open("/proc/%d/status" % pid) as status:
                return int(re.search(what + r":\s+(\d+) kB", status.read()).group(1)) * 1024

        support.need(self, os.path.exists("/proc/self/status"), "/proc")
        with socket.socket() as listener, \
                support.spawned("; ".join(code), "-p", "0", script="-c", cwd=support.ROOT) as server:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SMALL)
            listener.bind(("127.0.0.1", 0))
            listener.listen(1)
            client = support.connect_through(server.port, *listener.getsockname())
            with client, listener.accept()[0] as remote:
                remote.settimeout(support.PATIENCE_S)
                client.sendall(b"warm")
                remote.sendall(b"warm")
                self.assertEqual((support.reader_of(remote)(4), support.reader_of(client)(4)), (b"warm", b"warm"))
                before = resident(server.process.pid)
                sent = send_until_stuck(client, size)
                self.assertLess(sent, size, "nothing stopped the sender")
                self.assertLess(resident(server.process.pid) - before, allowed)

                def send_the_rest():
                    at = sent % len(NOISE)
                    left = size - sent
                    while left:
                        piece = NOISE[at:at + left]
                        client.sendall(piece)
                        left -= len(piece)
                        at = 0
                    client.shutdown(socket.SHUT_WR)
                sender = threading.Thread(target=send_the_rest, daemon=True)
                sender.start()
                check = Check()
                self.assertEqual(check.read_to_end(remote), 0)
                sender.join(support.PATIENCE_S)
                self.assertEqual((check.count, check.right), (size, True))
                self.assertLess(resident(server.process.pid, "VmHWM") - before, allowed, "at its highest")

    def test_data_right_behind_the_request_goes_first(self):
        for name, size in (("with the request", 100), ("more than one read", MIB)):
            with self.subTest(name), support.target() as target, support.running() as server:
                with support.dial(server.server_address) as client:
                    check = Check()
                    hello = Greeting(bytes([Method.NO_AUTHENTICATION])).pack()
                    client.sendall(hello + Request(Cmd.CONNECT, support.address(*target)).pack() + bytes(NOISE[:50]))
                    sender = threading.Thread(target=client.sendall, args=(STREAM[50:size],))
                    sender.start()
                    read = support.reader_of(client)
                    Selection.parse(read)
                    Reply.parse(read)
                    while check.count < size:
                        check.take(client.recv(1 << 16) or self.fail("EOF"))
                    sender.join(support.PATIENCE_S)
                    self.assertEqual((check.count, check.right), (size, True))

    def test_the_remote_may_speak_first(self):
        def serve(sock):
            sock.sendall(b"220 at your service\r\n")
            sock.sendall(b"you said " + support.reader_of(sock)(11))
        with support.target(serve) as target, support.running() as server, self.through(server, target) as client:
            self.assertEqual(support.reader_of(client)(21), b"220 at your service\r\n")
            client.sendall(b"nothing yet")
            self.assertEqual(support.read_to_end(client), b"you said nothing yet")

    def test_ping_pong_waits_for_no_timer(self):
        """5,000 answers, each 40 ms late (delayed ACK against Nagle), would take 200 s."""
        deadline = time.monotonic() + 100
        with support.target() as target, support.running() as server, self.through(server, target) as client:
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for turn in range(5000):
                ball = bytes([turn & 255])
                client.send(ball)
                self.assertEqual(client.recv(2), ball)
                self.assertLess(time.monotonic(), deadline, "turn %d" % turn)

    def test_the_log_tells_what_moved_and_who_ended_it(self):
        cases = [("client ends", True, "ended=client why=-"), ("remote ends", False, "ended=remote why=-")]
        for name, client_first, words in cases:
            with self.subTest(name), support.running() as server, \
                    self.assertLogs("socks5.server.handler", logging.INFO) as logs:
                def serve(sock):
                    sock.sendall(support.reader_of(sock)(5)[:1] + b"even !")
                    return client_first and sock.recv(1)
                with support.target(serve) as target:
                    with self.through(server, target) as client:
                        client.sendall(b"sweet")
                        self.assertEqual(support.reader_of(client)(7), b"seven !")
                        if not client_first:
                            self.assertEqual(client.recv(1), b"")
                support.wait_until(lambda: not len(server.sessions), "session over")
                support.wait_until(lambda: logs.output, "line")
                self.assertRegex(logs.output[0], " up=5 down=7 .* %s$" % words)

    def test_idle_ends_with_a_reset(self):
        with support.target() as target, support.running(idle_timeout=0.1) as server:
            with self.assertLogs("socks5.server.handler", logging.INFO) as logs, self.through(server, target) as client:
                self.assertEqual(fate(client), "reset")
                support.wait_until(lambda: logs.output, "line")
            self.assertRegex(logs.output[0], "ended=idle why='nothing moved for 0.1 s'$")


class TunnelTest(Conditioned):
    """A Tunnel by itself."""

    sees_quiet_resets = True        # of a side of which nothing is wanted at the moment

    def test_totals_and_early_bytes(self):
        with Standing(b"early ", b"EARLY ") as standing:
            standing.client.sendall(b"up")
            standing.client.shutdown(socket.SHUT_WR)
            self.assertEqual(support.read_to_end(standing.remote), b"early up")
            standing.remote.sendall(b"down")
            standing.remote.close()
            self.assertEqual(support.read_to_end(standing.client), b"EARLY down")
            self.assertEqual(standing.ended(), ("client", ""))
            self.assertEqual((standing.tunnel.up.total, standing.tunnel.down.total), (8, 10))

    def test_more_early_bytes_than_fit_at_once(self):
        """And both ends have closed their sending side before anything is read."""
        size = MIB
        early = bytes(STREAM[:size])
        with Standing(early, early, SMALL, lambda ends: (ends.client.shutdown(socket.SHUT_WR),
                                                         ends.remote.shutdown(socket.SHUT_WR))) as standing:
            for sock in (standing.client, standing.remote):
                check = Check()
                self.assertEqual((check.read_to_end(sock), check.count, check.right), (0, size, True))
            standing.ended()

    def test_a_reset_is_passed_on_as_a_reset(self):
        def stuck(sender):
            def prepare(standing):
                send_until_stuck(getattr(standing, sender))
            return prepare

        def half_closed(closer):
            def prepare(standing):
                getattr(standing, closer).shutdown(socket.SHUT_WR)
                self.assertEqual(getattr(standing, other[closer]).recv(1), b"")
            return prepare

        def used(standing):
            standing.client.sendall(b"x")
            self.assertEqual(standing.remote.recv(1), b"x")

        other = {"client": "remote", "remote": "client"}
        for side, far in other.items():
            cases = [("nothing else happening", used), ("flooded", stuck(far)), ("other closed", half_closed(far)),
                     ("flooding the other", stuck(side)), ("itself closed", half_closed(side))]
            for name, prepare in cases if self.sees_quiet_resets else cases[:3]:
                with self.subTest("%s resets, %s" % (side, name)), Standing(buffers=SMALL) as standing:
                    prepare(standing)
                    support.reset(getattr(standing, side))
                    ended_by, why = standing.ended()
                    self.assertEqual(ended_by, far if name == "other closed" else side)
                    self.assertRegex(why, "^%s: " % side)
                    if name == "itself closed":
                        self.assertTrue(dead(getattr(standing, far)))
                    else:
                        self.assertEqual(fate(getattr(standing, far)), "reset")

    def test_a_cut_off_download_arrives_as_its_beginning_and_a_reset(self):
        with Standing(buffers=SMALL) as standing:
            sent = send_until_stuck(standing.remote)
            support.reset(standing.remote)
            check = Check()
            self.assertEqual(check.read_to_end(standing.client), errno.ECONNRESET)
            self.assertTrue(check.right)
            self.assertLess(check.count, sent)

    def test_time_outs_reset_both_sides(self):
        def flood(*sides):
            return lambda ends: [send_until_stuck(getattr(ends, side)) for side in sides]

        cases = [("nothing said", None, dict(idle_s=0.1), "idle"),
                 ("one way stuck", flood("client"), dict(idle_s=0.4), "idle"),
                 ("both ways stuck", flood("client", "remote"), dict(idle_s=1.0), "idle"),
                 ("both ways stuck, a short limit", flood("client", "remote"), dict(idle_s=0.4), "idle")]
        for name, prepare, limits, expected in cases:
            with self.subTest(name), Standing(buffers=SMALL, **limits) as standing:
                if prepare:
                    prepare(standing)
                self.assertEqual(standing.ended(), (expected, "nothing moved for %g s" % limits["idle_s"]))
                self.assertEqual((fate(standing.client), fate(standing.remote)), ("reset", "reset"))

    def test_half_closed_has_a_time_out_of_its_own(self):
        """Also for the side that has said all: what it waits for is cut off, and must not look complete."""
        for closer, other in (("client", "remote"), ("remote", "client")):
            for name, limits in (("shorter than idle", dict(idle_s=60, half_closed_s=0.1)),
                                 ("longer than idle", dict(idle_s=0.1, half_closed_s=0.3))):
                began = time.monotonic()
                close = lambda ends: getattr(ends, closer).shutdown(socket.SHUT_WR)     # noqa: E731
                with self.subTest("%s closed, %s" % (closer, name)), Standing(before=close, **limits) as standing:
                    limit_s = limits["half_closed_s"]
                    self.assertEqual(standing.ended(), ("half-closed", "nothing moved for %g s" % limit_s))
                    self.assertGreaterEqual(time.monotonic() - began, limit_s)
                    self.assertEqual(fate(getattr(standing, closer)), "reset")
                    self.assertTrue(dead(getattr(standing, other)))

    def test_traffic_keeps_a_tunnel_from_being_idle(self):
        with Standing(idle_s=1.5) as standing:
            began = time.monotonic()
            while time.monotonic() - began < 1.8:
                standing.client.send(b"x")
                self.assertEqual(standing.remote.recv(1), b"x")
                self.assertFalse(comes(standing.client, waiting.READ, 50))
            self.assertTrue(standing.thread.is_alive())

    def test_abort_from_another_thread_in_every_state(self):
        def shut(*sides):
            def prepare(ends):
                for side in sides:
                    getattr(ends, side).shutdown(socket.SHUT_WR)
                    far = ends.remote if side == "client" else ends.client
                    if not ends.flooded & {side}:
                        self.assertEqual(far.recv(1), b"")
            return prepare

        def flood(*sides):
            def prepare(ends):
                for side in sides:
                    send_until_stuck(getattr(ends, side))
                    ends.flooded.add(side)
            return prepare

        cases = [("idle",), ("up stuck", flood("client")), ("down stuck", flood("remote")),
                 ("both stuck", flood("client", "remote")),
                 ("client closed", shut("client")), ("remote closed", shut("remote")),
                 ("client closed, down stuck", shut("client"), flood("remote")),
                 ("remote closed, up stuck", shut("remote"), flood("client")),
                 ("both stuck, client closed", flood("client", "remote"), shut("client")),
                 ("both stuck, both closed", flood("client", "remote"), shut("client", "remote"))]
        for name, *steps, standing in self.standing_all(cases):
            with self.subTest(name):
                standing.flooded = set()
                for step in steps:
                    step(standing)
        # All at once, because the loops of those that can only wait to send look up but twice a second.
        for _name, *_steps, standing in self.standing:
            standing.tunnel.abort("server stopped")
        for name, *_steps, standing in self.standing:
            with self.subTest(name):
                self.assertEqual(standing.ended()[0], "server stopped")
                for side, far in (("client", "remote"), ("remote", "client")):
                    if far + " closed" in name and far not in standing.flooded:
                        self.assertTrue(dead(getattr(standing, side)), "%s: had its EOF" % side)
                    else:
                        self.assertEqual(fate(getattr(standing, side)), "reset", side)

    def standing_all(self, cases):
        """The cases, each with a tunnel of its own at its end: side by side, so that they wait at the same time."""
        stack = contextlib.ExitStack()
        self.addCleanup(stack.close)
        self.standing = [(*case, stack.enter_context(Standing(buffers=SMALL))) for case in cases]
        return self.standing

    def test_nothing_spins(self):
        """The thread's processor time, while nothing can move for 250 ms and more: a loop that spins would burn
        them."""

        def hung_up(ends):
            """The client is closed both ways, and what it said before is still to be delivered."""
            send_until_stuck(ends.client)
            ends.client.shutdown(socket.SHUT_WR)
            ends.remote.shutdown(socket.SHUT_WR)
            self.assertEqual(ends.client.recv(1), b"")

        def closed_and_stuck(ends):
            ends.client.shutdown(socket.SHUT_WR)
            self.assertEqual(ends.remote.recv(1), b"")
            send_until_stuck(ends.remote)

        def gone(ends):
            """The client has closed altogether, and nobody has told it yet that it will not be listened to."""
            send_until_stuck(ends.client)
            ends.client.close()

        def both_stuck(ends):
            send_until_stuck(ends.client)
            send_until_stuck(ends.remote)

        cases = [("idle", lambda ends: None), ("hung up", hung_up), ("closed and stuck", closed_and_stuck),
                 ("gone", gone), ("both stuck", both_stuck)]
        for _name, prepare, standing in self.standing_all(cases):
            prepare(standing)
        self.standing[0][-1].thread.join(0.25)
        for name, _prepare, standing in self.standing:
            with self.subTest(name):
                self.assertTrue(standing.thread.is_alive())
                standing.tunnel.abort("looked at long enough")
                standing.ended()
                self.assertLess(standing.cpu_s, 0.1)

    def test_run_raises_nothing_on_sockets_that_are_dead_already(self):
        for side in ("client", "remote"):
            with self.subTest(side):
                with Standing(before=lambda ends: support.reset(getattr(ends, side))) as standing:
                    self.assertEqual(standing.ended()[0], side)


class End:
    """One far end of a tunnel in ModelTest: what it will do, and what it has seen. Both come from a seed.

    size        bytes that it sends in all
    resets_at   None, or it resets: after that many bytes sent, or if `closes` after its FIN and that many received
    """

    def __init__(self, sock, rng, early):
        self.sock, self.rng, self.sent = sock, rng, early
        self.size = early + rng.choice([0, 1, rng.randrange(2000), rng.randrange(2000), rng.randrange(200000), 65536])
        if rng.random() < 0.02:
            self.size += rng.randrange(4 * MIB)
        self.closes = rng.random() < 0.8
        self.resets_at = None
        self.check = Check()
        self.closed = self.eof = self.broken = False
        self.rests_until = 0
        self.other = None

    def pair_with(self, other):
        self.other = other
        if not self.closes:
            self.resets_at = self.rng.randint(self.sent, max(self.sent, self.size))
        elif self.rng.random() < 0.1:
            self.resets_at = self.rng.randint(0, other.size)

    def over(self):
        return self.broken or self.eof and self.closed

    def wanted(self):
        return (0 if self.eof else waiting.READ) | (0 if self.closed else waiting.WRITE)

    def turn(self, events, now):
        """Do what can be done; then perhaps rest for some turns of the driver."""
        try:
            if events & ~waiting.WRITE and not self.eof:
                piece = self.sock.recv(1 << self.rng.randrange(9, 19))
                self.check.take(piece)
                self.eof = not piece
            if events & ~waiting.READ and not self.closed:
                if self.sent < self.size:
                    self.send()
                elif self.closes:
                    self.closed = True
                    self.sock.shutdown(socket.SHUT_WR)
            if self.resets_at is not None and (self.closed or not self.closes):
                if self.resets_at <= (self.check.count if self.closes else self.sent):
                    self.broken = True
                    support.reset(self.sock)
        except BlockingIOError:
            pass
        except OSError:
            self.broken = True
        if self.rng.random() < 0.05:
            self.rests_until = now + self.rng.randrange(50)

    def send(self):
        at = self.sent % len(NOISE)
        until = self.size if self.closes else min(self.size, self.resets_at)
        self.sent += self.sock.send(STREAM[at:at + min(until - self.sent, 1 << self.rng.randrange(7, 18))])


class ModelTest(Conditioned):
    """Many short tunnels at once, each with two ends that send, rest, close and reset as a seed tells.

    What arrives is what was sent, in whole where there is an EOF, and as a beginning where there is a reset.
    """

    tunnels = 2000
    at_once = 40
    most_s = 12                 # on a slow machine no new tunnels begin after that
    seed = 1928

    def test_what_arrives_is_what_was_sent(self):
        began, turn, started, ended = time.monotonic(), 0, 0, 0
        ends, standings = {}, {}
        before = support.descriptors() if os.path.exists("/proc/self/fd") else 0
        try:
            while True:
                late = time.monotonic() > began + self.most_s
                while len(standings) < self.at_once and started < self.tunnels and not late:
                    started += 1
                    standings[started] = self.begin(started, ends)
                if not standings:
                    break
                turn += 1
                resting = self.turn_all(ends, turn)
                self.assertGreaterEqual(resting, 0, "tunnels hang: %s" % list(standings))
                for number, (standing, up, down) in list(standings.items()):
                    if up.over() and down.over():
                        for end in (up, down):
                            ends.pop(end.sock.fileno(), None)
                        del standings[number]
                        with self.subTest(seed=self.seed, tunnel=number), standing:
                            standing.client.close()
                            standing.remote.close()
                            self.judge(standing, up, down)
                        ended += 1
        finally:
            for standing, _up, _down in standings.values():
                standing.__exit__()
        self.assertEqual(ended, started)
        self.assertGreater(ended, 100)
        self.assertEqual(splice.KernelPipe.live, 0)
        if before:
            support.wait_until(lambda: support.descriptors() <= before, "all descriptors closed")

    def begin(self, number, ends):
        rng = random.Random(self.seed * 1000003 + number)
        early = [rng.choice([0, 0, 0, rng.randrange(1000), rng.randrange(100000)]) for _ in range(2)]
        standing = Standing(*(bytes(STREAM[:size]) for size in early), buffers=rng.choice([0, 0, SMALL]))
        up, down = (End(sock, rng, size) for sock, size in zip((standing.client, standing.remote), early))
        up.pair_with(down)
        down.pair_with(up)
        for end in (up, down):
            end.sock.setblocking(False)
            ends[end.sock.fileno()] = end
        return standing, up, down

    def turn_all(self, ends, turn):
        """Give a turn to each end that can do something: how many rest, or -1 when nobody rests and nothing comes."""
        watch, resting = new_poll(), 0
        for fd, end in list(ends.items()):
            if end.over():
                del ends[fd]
            elif end.rests_until > turn:
                resting += 1
            else:
                watch.register(fd, end.wanted())
        ready = watch.poll(0 if resting else support.PATIENCE_S * 1000)
        for fd, events in ready:
            ends[fd].turn(events, turn)
            if ends[fd].over():
                del ends[fd]
        return resting if ready or resting or not ends else -1

    def judge(self, standing, up, down):
        ended_by, why = standing.ended()
        resets = any(end.resets_at is not None for end in (up, down))
        self.assertIn(ended_by, ("client", "remote"))
        for end, pipe in ((up, standing.tunnel.up), (down, standing.tunnel.down)):
            seen = end.other.check
            self.assertTrue(seen.right, "other bytes than were sent")
            self.assertLessEqual(seen.count, pipe.total)
            self.assertLessEqual(pipe.total, end.sent)
            if end.other.eof:
                self.assertEqual((end.closed, seen.count), (True, end.size), "cut off, but with an EOF")
            if not resets:
                self.assertEqual((end.other.eof, pipe.total, why), (True, end.size, ""))


class WithoutPoll:
    """With select() instead of poll(), as on systems that have no other."""

    without = ((select, "poll"),)
    sees_quiet_resets = False       # select() tells nothing of a socket of which nothing is wanted
    tunnels = 300
    test_traffic_keeps_a_tunnel_from_being_idle = None      # takes its time, and has nothing to do with it


class ServerWithoutPollTest(WithoutPoll, ServerTest):
    pass


class TunnelWithoutPollTest(WithoutPoll, TunnelTest):
    pass


class ModelWithoutPollTest(WithoutPoll, ModelTest):
    pass


@unittest.skipUnless(splice.available, "splice() is for Linux, Python 3.10 and newer")
class Spliced:
    """Every direction turns to its kernel pipe after one byte; those of TunnelTest are too small to do it on their
    own."""

    settings = ((relay, "CHUNK_BYTES", 1),)
    tunnels = 500
    test_traffic_keeps_a_tunnel_from_being_idle = None


class ServerSplicedTest(Spliced, ServerTest):
    pass


class TunnelSplicedTest(Spliced, TunnelTest):
    def test_a_tunnel_that_falls_quiet_gives_its_kernel_pipe_back(self):
        told = []
        with Standing(on_bulk=told.append) as standing:
            for turn in (1, 2):
                standing.client.sendall(STREAM[:MIB])
                self.assertEqual(support.reader_of(standing.remote)(MIB), STREAM[:MIB])
                support.wait_until(lambda: told == [True, False] * turn, "the pipe is given back")
                self.assertEqual(splice.KernelPipe.live, 0)
            self.assertTrue(standing.thread.is_alive())

    def test_a_tunnel_that_ends_in_the_middle_gives_it_back(self):
        for name, end in (("reset", lambda ends: support.reset(ends.remote)),
                          ("aborted", lambda ends: ends.tunnel.abort("enough"))):
            told = []
            with self.subTest(name), Standing(buffers=SMALL, on_bulk=told.append) as standing:
                send_until_stuck(standing.client)
                support.wait_until(lambda: told == [True], "it has one")
                end(standing)
                standing.ended()
                self.assertEqual((told, splice.KernelPipe.live), ([True, False], 0))


class ModelSplicedTest(Spliced, ModelTest):
    pass


class Copied:
    """No direction ever does."""

    settings = ((splice, "available", False),)
    tunnels = 300


class ServerCopiedTest(Copied, ServerTest):
    pass


class ModelCopiedTest(Copied, ModelTest):
    pass


class ModelFewPipesTest(ModelTest):
    """Some find no kernel pipe left."""

    settings = ((relay, "CHUNK_BYTES", 1024), (splice, "MOST_PIPES", 5))
    tunnels = 300
