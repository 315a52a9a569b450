"""relay/loop.py over real TCP connections: its drivers, its traps, urgent data, limits, memory."""
import collections
import contextlib
import errno
import gc
import hashlib
import os
import random
import select
import socket
import subprocess
import sys
import threading
import time
import tracemalloc
import unittest
import weakref
from unittest import mock

from socks5.net import poller as poller_module
from socks5.net.addresses import ip_in
from socks5.net.listeners import tune
from socks5.net.poller import EpollPoller, PollPoller, SelectPoll
from socks5.net.shares import Share
from socks5.relay import busy, splice
from socks5.relay import loop as loop_module
from socks5.relay.busy import First
from socks5.relay.loop import Loop
from socks5.relay.pipe import Pipe
from socks5.relay.relay import UNREGISTERED, Relay, rewatch
from socks5.relay.tunnel import Tunnel
from socks5.relay.watch import Registered
from tests.support import PATIENCE_S, ROOT, descriptors, reset, wait_until

MIB = 1 << 20
SMALL = 8192                # socket buffers of tunnels that shall feel backpressure soon
NOISE = random.Random(1928).getrandbits(8 * MIB).to_bytes(MIB, "big")
SPLICED = splice.available and hasattr(select, "poll")
IN_LOOP = unittest.skipUnless(loop_module.MANY, "by select(), each tunnel has a thread to its end")
CALM_TURNS = 40             # of all loops within 0.2 s


def tcp_pair(buffers=0):
    """Two connected TCP sockets as the server has them, with socket buffers of about that many bytes."""
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
        tune(sock)
    one.settimeout(PATIENCE_S)
    return one, two


def read_exactly(sock, size):
    data = b""
    while len(data) < size:
        data += sock.recv(size - len(data)) or b"EOF" * size
    return data


def fate(sock):
    """How a connection ends, after all that may still arrive: "EOF" or "reset"."""
    try:
        while sock.recv(MIB):
            pass
        return "EOF"
    except OSError as exc:
        return {errno.ECONNRESET: "reset", errno.EPIPE: "reset"}.get(exc.errno, exc)


def send_until_stuck(sock):
    """How many bytes are taken before nothing more is, however long one waits."""
    sock.setblocking(False)
    sent = 0
    while select.select([], [sock], [], 0.1)[1]:
        with contextlib.suppress(BlockingIOError):
            sent += sock.send(NOISE[:1 << 16])
    sock.settimeout(PATIENCE_S)
    return sent


def send_hashed(sock, size):
    """Send so many bytes and FIN, in a thread; the hash is in its `digest` when it is joined."""
    def run():
        left, at = size, 0
        with contextlib.suppress(OSError):                  # a test that does not read it to the end
            while left:
                piece = NOISE[at:at + left]
                sock.sendall(piece)
                thread.digest.update(piece)
                left, at = left - len(piece), (at + 7919) % 4096
            sock.shutdown(socket.SHUT_WR)
    thread = threading.Thread(target=run, daemon=True)
    thread.digest = hashlib.sha256()
    thread.start()
    return thread


def read_hashed(sock, digest=None):
    digest, size = digest or hashlib.sha256(), 0
    for data in iter(lambda: sock.recv(1 << 18), b""):
        digest.update(data)
        size += len(data)
    return size, digest.hexdigest()


class Subject:
    """Something that a weak reference can point to, in place of a session."""


class CountedPoll:
    """new_poll() of the threads, which counts their turns."""

    turns = 0

    def __init__(self):
        self.poll_object = poller_module.new_poll()
        self.register, self.modify = self.poll_object.register, self.poll_object.modify
        self.unregister = self.poll_object.unregister

    def poll(self, timeout_ms):
        CountedPoll.turns += 1
        return self.poll_object.poll(timeout_ms)


class Standing:
    """A tunnel in a loop; `client` and `remote` are the far ends."""

    def __init__(self, loop, early=b"", buffers=0, before=None, first=False, **limits):
        self.client, self.near_client = tcp_pair(buffers)
        self.remote, self.near_remote = tcp_pair(buffers)
        self.over = threading.Event()
        if before:
            before(self)
        self.tunnel = Tunnel(self.near_client, self.near_remote, early, session=self, **limits)
        if first and not early:
            threading.Thread(target=self.bring, args=(loop,), daemon=True).start()
            return
        try:
            loop.relay(self.tunnel)
        except OSError:
            for sock in (self.client, self.near_client, self.remote, self.near_remote):
                sock.close()
            raise

    def bring(self, loop):
        """As a handler does."""
        first = First(self.near_client, self.near_remote)
        first.relay()
        first.go_on(self.tunnel)
        if first.over:
            self.tunnel.ended = True
        loop.relay(self.tunnel)

    def echo(self, data=b"x"):
        for one, other in ((self.client, self.remote), (self.remote, self.client)):
            one.sendall(data)
            assert read_exactly(other, len(data)) == data

    def ended(self):
        """(ended_by, why), when it has."""
        assert self.over.wait(PATIENCE_S), "the tunnel does not end"
        return self.tunnel.ended_by, self.tunnel.why


class LoopTest(unittest.TestCase):
    settings = (("SWEEP_S", 0.05),)     # of loop.py and busy.py, while the tests of the class run
    without = ()                        # of the module select

    def setUp(self):
        self.stack = contextlib.ExitStack()
        self.addCleanup(self.stack.close)
        for name, value in self.settings:
            module = busy if hasattr(busy, name) else loop_module
            self.stack.enter_context(mock.patch.object(module, name, value))
        for name in self.without:
            if hasattr(select, name):
                self.stack.enter_context(mock.patch.object(select, name))
                delattr(select, name)
        self.standing = []
        self.ends = collections.Counter()
        self.bugs = []
        self.loop = Loop(self.tunnel_ended, lambda: self.bugs.append(1))
        self.turns = 0
        self.loop._poller.poll = self.counting(self.loop._poller.poll)
        self.loop.start()
        self.stack.callback(self.tear_down)

    def pair(self):
        one, two = tcp_pair()
        self.addCleanup(one.close)
        self.addCleanup(two.close)
        return one, two

    def counting(self, poll):
        def counted(timeout_s, maximum):
            self.turns += 1
            return poll(timeout_s, maximum)
        return counted

    def tear_down(self):
        self.loop.stop("test over")
        for standing in self.standing:
            standing.client.close()
            standing.remote.close()
        self.assertEqual((len(self.loop), splice.PIPES.live(), splice.parked), (0, 0, 0))
        self.assertEqual(set(self.ends.values()) - {1}, set(), "ended() once for every tunnel")
        self.assertEqual(len(self.ends), len(self.standing))

    def tunnel_ended(self, tunnel):
        tunnel.close()
        tunnel.client.close()
        if isinstance(tunnel.session, Standing):
            self.ends[tunnel] += 1
            tunnel.session.over.set()

    def tunnel(self, *args, **kwargs):
        standing = Standing(self.loop, *args, **kwargs)
        self.standing.append(standing)
        return standing

    def assert_calm(self):
        """No thread spins when nothing more moves: one that does has thousands of turns in each of these times."""
        pause, seen = threading.Event(), []
        while not seen or seen[-1] >= CALM_TURNS:
            self.assertLess(len(seen), 20, "never calm: %s" % seen)
            before = self.turns + CountedPoll.turns
            pause.wait(0.2)
            seen.append(self.turns + CountedPoll.turns - before)


class EveryDriver:
    """What holds whichever way the bytes are moved: one run for each driver, below."""

    def test_hashes_both_ways_at_once(self):
        for buffers in (0, SMALL):
            size = 8 * MIB + 4321 if not buffers else MIB + 11
            with self.subTest(buffers=buffers):
                standing = self.tunnel(buffers=buffers)
                senders = [send_hashed(sock, size) for sock in (standing.client, standing.remote)]
                results = []
                reader = threading.Thread(target=lambda: results.append(read_hashed(standing.remote)), daemon=True)
                reader.start()
                down = read_hashed(standing.client)
                for thread in (*senders, reader):
                    thread.join(PATIENCE_S)
                self.assertEqual([down, *results], [(size, thread.digest.hexdigest()) for thread in senders[::-1]])
                self.assertEqual(standing.ended()[1], "")
                self.assertEqual((standing.tunnel.up.total, standing.tunnel.down.total), (size, size))

    def test_half_close_both_ways(self):
        for first, second in (("client", "remote"), ("remote", "client")):
            with self.subTest(first + " closes first"):
                standing = self.tunnel()
                early, late = getattr(standing, first), getattr(standing, second)
                early.sendall(b"that was all")
                early.shutdown(socket.SHUT_WR)
                self.assertEqual((read_exactly(late, 12), late.recv(1)), (b"that was all", b""))
                sender = send_hashed(late, 3 * MIB)
                size, digest = read_hashed(early)
                sender.join(PATIENCE_S)
                self.assertEqual((size, digest), (3 * MIB, sender.digest.hexdigest()))
                self.assertEqual(standing.ended(), (first, ""))

    def test_early_data_larger_than_the_send_buffer_and_eof_before_the_hand_over(self):
        early = NOISE[:777777]
        standing = self.tunnel(early, SMALL, lambda ends: (ends.client.sendall(b"tail"),
                                                           ends.client.shutdown(socket.SHUT_WR)))
        self.assertEqual(read_hashed(standing.remote)[1], hashlib.sha256(early + b"tail").hexdigest())
        standing.remote.close()
        self.assertEqual(standing.ended(), ("client", ""))

    def test_a_reset_is_passed_on_as_a_reset(self):
        for side, far in (("client", "remote"), ("remote", "client")):
            for name, prepare in (("quiet", lambda ends: ends.echo()),
                                  ("flooded", lambda ends: send_until_stuck(getattr(ends, far)))):
                with self.subTest("%s resets, %s" % (side, name)):
                    standing = self.tunnel(buffers=SMALL)
                    prepare(standing)
                    reset(getattr(standing, side))
                    ended_by, why = standing.ended()
                    self.assertEqual(ended_by, side)
                    self.assertRegex(why, "^%s: " % side)
                    self.assertEqual(fate(getattr(standing, far)), "reset")

    def test_a_reader_that_pauses_in_a_download(self):
        """Longer than a kernel pipe is kept: what it holds by then must not be lost."""
        size = 12 * MIB
        standing = self.tunnel()
        sender = send_hashed(standing.remote, size)
        digest = hashlib.sha256()
        for _ in range(2):
            digest.update(read_exactly(standing.client, 2 * MIB))
            wait_until(lambda: not splice.PIPES.live(), "given back")
            wait_until(lambda: not standing.tunnel.lent or not loop_module.MANY, "taken back")
        count, digest = read_hashed(standing.client, digest)
        sender.join(PATIENCE_S)
        self.assertEqual((count + 4 * MIB, digest), (size, sender.digest.hexdigest()))

    def test_idle_and_half_closed_limits_reset_both_sides(self):
        def close(name):
            return lambda ends: getattr(ends, name).shutdown(socket.SHUT_WR)
        for name, before, stuck, expected in (
                ("silent", None, False, ("idle", "nothing moved for 0.3 s")),
                ("stuck", None, True, ("idle", "nothing moved for 0.3 s")),
                ("client closed", close("client"), False, ("half-closed", "nothing moved for 0.2 s")),
                ("remote closed", close("remote"), False, ("half-closed", "nothing moved for 0.2 s"))):
            with self.subTest(name):
                standing = self.tunnel(b"", SMALL, before, idle_s=0 if stuck else 0.3, half_closed_s=0.2)
                if stuck:
                    send_until_stuck(standing.client)
                    standing.tunnel.idle_s = 0.3
                self.assertEqual(standing.ended(), expected)
                if not before:
                    self.assertEqual((fate(standing.client), fate(standing.remote)), ("reset", "reset"))

    def test_urgent_data_keeps_its_place(self):
        """With SO_OOBINLINE at the receiver, where its place can be seen."""
        for one, other in (("client", "remote"), ("remote", "client")):
            with self.subTest("from the " + one):
                standing = self.tunnel()
                sender, receiver = getattr(standing, one), getattr(standing, other)
                for before, after in ((b"abc", b"efg"), (b"", b"y"), (b"", b"")):
                    sender.sendall(before)
                    sender.send(b"D", socket.MSG_OOB)
                    sender.sendall(after + b".")
                    self.assertEqual(read_exactly(receiver, len(before + after) + 2), before + b"D" + after + b".")
                sender.send(b"1", socket.MSG_OOB)           # two in a row, then FIN
                sender.send(b"2", socket.MSG_OOB)
                sender.shutdown(socket.SHUT_WR)
                self.assertEqual((read_exactly(receiver, 2), receiver.recv(1)), (b"12", b""))

    def test_urgent_data_is_still_urgent(self):
        """Without SO_OOBINLINE at the receiver: FTP's and telnet's Synch."""
        standing = self.tunnel()
        standing.remote.setsockopt(socket.SOL_SOCKET, socket.SO_OOBINLINE, 0)
        standing.client.sendall(b"abc")
        self.assertEqual(read_exactly(standing.remote, 3), b"abc")
        standing.client.send(b"D", socket.MSG_OOB)
        self.assertTrue(select.select([], [], [standing.remote], PATIENCE_S)[2])
        standing.remote.setblocking(False)
        self.assertEqual(standing.remote.recv(1, socket.MSG_OOB), b"D")
        standing.remote.settimeout(PATIENCE_S)
        standing.client.sendall(b"efg")
        self.assertEqual(read_exactly(standing.remote, 3), b"efg")

    def test_urgent_data_in_a_large_transfer(self):
        """Nothing is lost and nothing spins, also while the sink is full and when FIN is behind it."""
        for one, other in (("client", "remote"), ("remote", "client")):
            with self.subTest("from the " + one):
                standing = self.tunnel(idle_s=PATIENCE_S)
                sender, receiver = getattr(standing, one), getattr(standing, other)
                sent = hashlib.sha256()

                def send():
                    for _ in range(6):
                        sender.sendall(NOISE)
                        sender.send(b"!", socket.MSG_OOB)
                        sent.update(NOISE + b"!")
                    sender.shutdown(socket.SHUT_WR)
                thread = threading.Thread(target=send, daemon=True)
                thread.start()
                first = read_exactly(receiver, MIB)
                self.assert_calm()                          # the receiver rests, the rest is under way
                count, digest = read_hashed(receiver, hashlib.sha256(first))
                thread.join(PATIENCE_S)
                self.assertEqual((count + MIB, digest), (6 * MIB + 6, sent.hexdigest()))

    def test_a_tunnel_with_urgent_data_in_it_has_its_limits(self):
        """The sink takes nothing, an urgent byte waits behind all: no event of it counts as traffic."""
        standing = self.tunnel(buffers=SMALL)
        send_until_stuck(standing.client)
        with contextlib.suppress(BlockingIOError):
            standing.client.setblocking(False)
            standing.client.send(b"!", socket.MSG_OOB)
        standing.tunnel.idle_s = 0.4
        self.assertEqual(standing.ended()[0], "idle")

    def test_nothing_spins(self):
        def hung_up(ends):
            """The client is closed both ways, and what it said before is still to be delivered."""
            sent = 0
            while not ends.tunnel.up.held:                  # and not more than that, or its FIN does not come through
                sent += ends.client.send(NOISE[:1024])
                wait_until(lambda: ends.tunnel.up.held or ends.tunnel.up.total == sent, "read")
            ends.client.shutdown(socket.SHUT_WR)
            ends.remote.shutdown(socket.SHUT_WR)
            self.assertEqual(ends.client.recv(1), b"")

        def gone(ends):
            send_until_stuck(ends.client)
            ends.client.close()

        def both_stuck(ends):
            send_until_stuck(ends.client)
            send_until_stuck(ends.remote)

        for prepare in (lambda ends: None, hung_up, gone, both_stuck):
            prepare(self.tunnel(buffers=SMALL))
        self.assert_calm()

    def test_abort_all_in_every_state(self):
        standings = [self.tunnel(buffers=SMALL) for _ in range(4)]
        send_until_stuck(standings[1].client)
        send_until_stuck(standings[2].remote)
        standings[3].client.shutdown(socket.SHUT_WR)
        self.assertEqual(standings[3].remote.recv(1), b"")
        self.loop.abort_all("enough")
        for standing in standings:
            self.assertEqual(standing.ended(), ("enough", ""))
        self.assertEqual([fate(standing.client) for standing in standings[:3]], ["reset"] * 3)


@unittest.skipUnless(hasattr(select, "epoll"), "epoll is Linux's")
class EpollDriverTest(EveryDriver, LoopTest):
    def test_which_poller(self):
        self.assertIsInstance(self.loop._poller, EpollPoller)


@unittest.skipUnless(hasattr(select, "poll"), "no poll()")
class PollDriverTest(EveryDriver, LoopTest):
    """The loop by poll(), and no tunnel is lent: what is busy is copied."""

    without = ("epoll",)

    def setUp(self):
        super().setUp()
        self.stack.enter_context(mock.patch.object(splice, "available", False))

    def test_which_poller(self):
        self.assertIsInstance(self.loop._poller, PollPoller)


class FirstMomentsTest(EveryDriver, LoopTest):
    """In the thread that brings it, and then by the loop."""

    def tunnel(self, *args, **kwargs):
        return super().tunnel(*args, first=True, **kwargs)


class ThreadDriver(EveryDriver):
    """A thread for each tunnel, from the start to the end."""

    settings = (("SWEEP_S", 0.05), ("MANY", False), ("QUIET_S", 0.1), ("new_poll", CountedPoll))


class SelectDriverTest(ThreadDriver, LoopTest):
    """As on Windows."""

    without = ("epoll", "poll")

    def setUp(self):
        super().setUp()
        self.stack.enter_context(mock.patch.object(splice, "available", False))

    def test_which_poller(self):
        self.assertIsInstance(poller_module.new_poll(), SelectPoll)


@unittest.skipUnless(SPLICED, "splice() is for Linux, Python 3.10 and newer")
class SpliceDriverTest(ThreadDriver, LoopTest):
    pass


@unittest.skipUnless(SPLICED, "splice() is for Linux, Python 3.10 and newer")
class LentTest(LoopTest):
    settings = (("SWEEP_S", 0.05), ("QUIET_S", 0.1), ("new_poll", CountedPoll))

    def busy(self, standing=None):
        """A tunnel in the middle of a download, which was lent a moment ago and is not read from then on."""
        standing = standing or self.tunnel()
        thread = send_hashed(standing.remote, 256 * MIB)
        while not standing.tunnel.lent:
            self.assertTrue(standing.client.recv(MIB), "never lent")
        return standing, thread

    def make_busy(self, standing):
        """Send and read until it is lent; a tunnel that rests for a moment on a busy machine may be given back."""
        for _ in range(1000):
            standing.remote.sendall(NOISE)
            self.assertEqual(read_exactly(standing.client, MIB), NOISE)
            if standing.tunnel.lent:
                return
        self.fail("never lent")

    def test_lent_and_taken_back_again_and_again(self):
        standing = self.tunnel()
        for _turn in range(3):
            self.make_busy(standing)
            wait_until(lambda: not standing.tunnel.lent and not splice.PIPES.live(), "taken back")
            standing.echo()

    def test_the_loop_notes_that_it_works(self):
        standing = self.tunnel()
        wait_until(lambda: not standing.tunnel.lent, "handed over")
        splice.worked_at[0] = 0.0
        wait_until(lambda: standing.echo() or splice.worked_at[0] > 0, "noted, which is not done for each event")

    def test_it_yields_the_cpu_while_relay_loops_work(self):
        for worked_at, yields in ((float("inf"), True), (float("-inf"), False)):
            with self.subTest(worked_at), mock.patch.object(splice, "worked_at", [worked_at]), \
                    mock.patch.object(busy, "yield_cpu") as yielded:
                standing = self.tunnel()
                self.make_busy(standing)
                wait_until(lambda: not standing.tunnel.lent, "taken back")
                self.assertEqual(bool(yielded.called), yields)

    def test_a_few_bytes_now_and_then_keep_no_thread(self):
        with mock.patch.object(busy, "QUIET_S", 0.3):
            standing = self.tunnel()
            self.make_busy(standing)
            pause = threading.Event()
            for _ in range(200):
                standing.echo()
                pause.wait(0.02)
                if not standing.tunnel.lent:
                    break
            self.assertFalse(standing.tunnel.lent)

    def test_abort_all_and_stop_with_lent_tunnels(self):
        for name in ("abort_all", "stop"):
            with self.subTest(name), mock.patch.object(busy, "QUIET_S", 60):     # it is woken, and stays lent
                standing, _thread = self.busy()
                getattr(self.loop, name)("enough")
                self.assertEqual(standing.ended(), ("enough", ""))
                self.assertEqual(fate(standing.client), "reset")    # the remote's is told to the thread that sends

    def test_a_lent_tunnel_that_stalls_has_its_limits(self):
        standing, _thread = self.busy()
        standing.tunnel.idle_s = 0.3
        self.assertEqual(standing.ended(), ("idle", "nothing moved for 0.3 s"))

    def test_the_sweep_leaves_a_lent_tunnel_to_its_thread(self):
        swept = threading.Event()
        with mock.patch.object(busy, "QUIET_S", 60):
            standing, _thread = self.busy(self.tunnel(idle_s=60))
            standing.tunnel.idle_s = 1e-9               # over; its thread does not look
            self.loop.call_soon(lambda: (self.loop._sweep(), swept.set()))
            self.assertTrue(swept.wait(PATIENCE_S))
            for _ in range(64):                         # more than the kernel holds
                self.assertEqual(len(read_exactly(standing.client, MIB)), MIB)

    def test_stalled_tunnels_hold_little_memory(self):
        self.stack.enter_context(mock.patch.object(splice, "worked_at", [float("-inf")]))    # kernel pipes take all
        self.loop._threads = Share(3)

        def stall():
            standing, _thread = self.busy()
            wait_until(lambda: not standing.tunnel.lent, "stalled and taken back")
            return standing.tunnel.down.held
        with mock.patch.object(splice, "MAX_PARKED", MIB // 2):
            held = []
            while splice.parked < MIB // 2:             # each holds what its kernel pipe had just then
                held.append(stall())
                self.assertLess(len(held), 60, "what stalled tunnels hold is not counted")
            self.assertGreater(max(held), 1 << 16, "no kernel pipe was ever fuller than a copying tunnel")
            self.assertLessEqual(max(stall() for _ in range(4)), splice.FRUGAL_BYTES)
            self.assertLessEqual(splice.parked, MIB // 2 + 3 * MIB + (len(held) + 4) * splice.FRUGAL_BYTES)

    def test_more_busy_tunnels_than_may_be_lent(self):
        """The others stay in the loop, and a small one beside them is served."""
        self.loop._threads = Share(1)
        standings = [self.tunnel() for _ in range(3)]
        senders = [send_hashed(standing.remote, 10 * MIB) for standing in standings]
        results = {}
        readers = [threading.Thread(target=lambda s=s: results.update({s: read_hashed(s.client)}), daemon=True)
                   for s in standings]
        for reader in readers:
            reader.start()
        small = self.tunnel()
        for _ in range(20):
            small.echo()
        for thread in (*senders, *readers):
            thread.join(PATIENCE_S)
        self.assertEqual([results[s] for s in standings], [(10 * MIB, s.digest.hexdigest()) for s in senders])

    def test_one_address_cannot_take_all_threads_and_kernel_pipes(self):
        self.loop._threads = Share(3)
        self.stack.enter_context(mock.patch.object(busy, "QUIET_S", 60))        # what is lent stays so
        for _ in range(2):
            self.busy(self.tunnel(owner="192.0.2.1"))
        third = self.tunnel(owner="192.0.2.1")
        send_hashed(third.remote, 10 * MIB)
        read_exactly(third.client, 5 * MIB)
        self.assertFalse(third.tunnel.lent)
        self.busy(self.tunnel(owner="192.0.2.2"))
        read_exactly(third.client, 5 * MIB)

    def test_no_thread_to_lend_it_to(self):
        standing = self.tunnel()
        with mock.patch.object(loop_module.threading, "Thread", side_effect=RuntimeError("can't start new thread")):
            for _ in range(8):
                standing.remote.sendall(NOISE)
                self.assertEqual(read_exactly(standing.client, MIB), NOISE)
        self.assertFalse(standing.tunnel.lent or self.bugs)
        standing.echo()

    def test_a_bug_in_the_thread_costs_one_tunnel(self):
        other = self.tunnel()
        with mock.patch.object(loop_module, "relay_busy", side_effect=KeyError("bug")):
            standing = self.tunnel()
            send_hashed(standing.remote, 4 * MIB)
            self.assertEqual(standing.ended(), ("server", "a bug of the server"))
        self.assertEqual(len(self.bugs), 1)
        other.echo()


class TrapTest(LoopTest):
    def test_an_idle_limit_comes_though_nothing_else_happens(self):
        """The loop waited for ever before the tunnel came, and no event of the tunnel wakes it."""
        wait_until(lambda: self.turns >= 1, "the loop waits")
        self.assertEqual(self.tunnel(idle_s=0.1).ended()[0], "idle")

    @IN_LOOP
    def test_a_batch_that_names_a_descriptor_that_was_closed_and_used_again(self):
        """Both sides of a tunnel end in one batch; its descriptors are those of the next tunnel at once."""
        one = self.tunnel()
        fds = [one.near_client.fileno(), one.near_remote.fileno()]
        prepared = [self.pair(), self.pair()]
        blocked, go = threading.Event(), threading.Event()
        self.loop.call_soon(lambda: (blocked.set(), go.wait(PATIENCE_S)))
        self.assertTrue(blocked.wait(PATIENCE_S))
        reset(one.client)
        reset(one.remote)                                   # one batch has both

        def relay_next(tunnel):                             # in the loop's thread, within the same turn
            ended(tunnel)
            if not next_one:
                for (_far, near), fd in zip(prepared, fds):
                    os.dup2(near.fileno(), fd)
                pairs = [(far, socket.socket(fileno=fd)) for (far, _near), fd in zip(prepared, fds)]
                with mock.patch.object(sys.modules[__name__], "tcp_pair", side_effect=pairs):
                    next_one.append(self.tunnel(b"early"))
        ended, next_one = self.loop._ended, []
        self.loop._ended = relay_next
        go.set()
        one.ended()
        wait_until(lambda: next_one, "the next one")
        self.assertEqual(read_exactly(next_one[0].remote, 5), b"early")
        next_one[0].echo()

    @IN_LOOP
    def test_no_descriptor_is_closed_within_a_batch(self):
        """Handlers of a batch see the sockets of every tunnel of it open."""
        standings = [self.tunnel() for _ in range(3)]
        seen, end = [], Tunnel.handle

        def handle(tunnel, side, events, now):
            result = end(tunnel, side, events, now)
            seen.append([s.near_client.fileno() for s in standings])
            return result
        go = threading.Event()
        blocked = threading.Event()
        self.loop.call_soon(lambda: (blocked.set(), go.wait(PATIENCE_S)))
        blocked.wait(PATIENCE_S)
        for standing in standings:
            reset(standing.client)
        with mock.patch.object(Tunnel, "handle", handle):
            go.set()
            for standing in standings:
                standing.ended()
        self.assertEqual(len(seen), 3)
        self.assertNotIn(-1, [fd for fds in seen for fd in fds])

    def test_registered_before_published(self):
        """An event that comes between the two is not lost, and not taken for another tunnel's."""
        old = self.loop._poller.register
        standing = None

        def register(fd, events):
            self.assertNotIn(fd, self.loop._watched)
            old(fd, events)
        self.loop._poller.register = register
        standing = self.tunnel(before=lambda ends: ends.client.sendall(b"first"))
        self.assertEqual(read_exactly(standing.remote, 5), b"first")

    def test_a_poller_is_told_of_changes_only(self):
        off, quiet = UNREGISTERED, poller_module.READ
        for before, wanted, told in (
                ((), (quiet, quiet), [mock.call.register(7, quiet), mock.call.register(8, quiet)]),
                ((quiet, quiet), (0, quiet), [mock.call.modify(7, 0)]),
                ((0, quiet), (off, quiet), [mock.call.unregister(7)]),
                ((off, quiet), (off, 0), [mock.call.modify(8, 0)]),
                ((off, 0), (quiet, off), [mock.call.register(7, quiet), mock.call.unregister(8)])):
            with self.subTest(before=before, wanted=wanted):
                poller = mock.Mock()
                rewatch(poller, (7, 8), before, wanted)
                self.assertEqual(poller.mock_calls, told)

    @IN_LOOP
    def test_what_is_not_published_yet_is_waited_for(self):
        """Or poll() would report it again and again, and the thread that is to publish it would get no turn."""
        self.stack.enter_context(mock.patch.object(loop_module, "SWEEP_S", 60))     # a sweep waits for that thread, too
        wait_until(lambda: self.loop._sweep_at > time.monotonic() + 1, "the last sweep")
        old, pause, seen = self.loop._poller.register, threading.Event(), []

        def register(fd, events):
            before = self.turns
            old(fd, events)
            pause.wait(0.2)
            seen.append(self.turns - before)
        self.loop._poller.register = register
        standing = self.tunnel(before=lambda ends: ends.client.sendall(b"first"))
        self.assertEqual(read_exactly(standing.remote, 5), b"first")
        self.assertEqual([turns for turns in seen if turns >= CALM_TURNS], [])

    def test_all_of_a_tunnel_is_published_in_one_step(self):
        """Or the loop could end it after an event of one side, and then the other side's entry would stay."""
        registered, seen = Registered(), []
        self.addCleanup(registered.poller.close)

        class Watched(dict):
            def __setitem__(self, fd, relay):
                super().__setitem__(fd, relay)
                seen.append(len(self))
                registered.remove(relay)

        registered.watched = Watched()
        tunnel = Tunnel(*self.pair())
        registered.renew(tunnel)
        self.assertEqual((set(registered.watched), seen), (set(tunnel.fds()), []))

    def test_a_change_waits_until_the_hand_over_is_done(self):
        """Or the loop and the thread that brings it would register the same descriptors."""
        loop, changed, done = self.loop, [], threading.Event()

        class Association(Relay):
            __slots__ = ("socks", "wake")

            def sockets(self):
                return self.socks

            def fds(self):
                return [sock.fileno() for sock in self.socks]

            def deadline(self):
                return float("inf")

            def woken_by(self, waker):
                self.wake = waker

            def interest(self):                         # first called when it is registered, by relay()
                if not self.watched and not done.is_set():
                    self.wake(self)                     # as a thread that has resolved a name
                    loop.call_soon(done.set)
                    changed.append(done.wait(0.2))
                return super().interest()

            def change_now(self):
                done.set()
                changed.append("now")

            def close(self):
                pass

        relay = Association()
        relay.socks = self.pair()
        loop.relay(relay)
        self.assertTrue(done.wait(PATIENCE_S))
        self.assertEqual((changed, relay.ended), ([False, "now"], False))

    def test_one_exception_costs_one_tunnel(self):
        bad, good = self.tunnel(), self.tunnel()
        with mock.patch.object(bad.tunnel.up.__class__, "fill_small", side_effect=KeyError("bug")):
            bad.client.sendall(b"x")
            self.assertEqual(bad.ended(), ("server", "a bug of the server"))
        self.assertEqual((len(self.bugs), fate(bad.remote)), (1, "reset"))
        good.echo()

    def test_an_exception_of_the_owner_costs_nothing_else(self):
        good, bad = self.tunnel(), self.tunnel()
        ended = self.loop._ended

        def fails(tunnel):
            ended(tunnel)
            raise KeyError("bug")
        self.loop._ended = fails
        bad.client.close()
        bad.remote.close()
        bad.ended()
        self.loop.call_soon(lambda: 1 / 0)
        good.echo()
        wait_until(lambda: len(self.bugs) == 2, "both are told")

    @IN_LOOP
    def test_want_of_memory_ends_neither_the_loop_nor_a_tunnel(self):
        standing = self.tunnel()
        failures = [MemoryError()] * 2
        poll = self.loop._poller.poll

        def failing(*args):
            if failures:
                raise failures.pop()
            return poll(*args)

        self.loop._poller.poll = failing                    # the loop takes it when it begins anew
        with mock.patch("socks5.protocol.memory.REST_S", 0):
            with mock.patch.object(self.loop, "_run_calls", side_effect=MemoryError()) as run_calls:
                self.loop.call_soon(lambda: None)
                wait_until(lambda: run_calls.called and not failures)
            standing.echo()
        standing.echo()
        self.assertEqual(self.bugs, [])

    @IN_LOOP
    def test_a_loop_that_fails_ends_its_tunnels(self):
        standing = self.tunnel()
        with mock.patch.object(self.loop, "_run_calls", side_effect=SystemError("bug")):
            self.loop.call_soon(self.fail)
            self.assertEqual(standing.ended(), ("the relay loop failed", ""))
        self.assertEqual(len(self.bugs), 1)
        self.assertRaises(OSError, Standing, self.loop)

    def test_relay_from_many_threads_with_immediate_ends(self):
        errors = []

        def one(number):
            try:
                rng = random.Random(number)
                for _ in range(15):
                    how = rng.choice([lambda ends: reset(ends.client), lambda ends: reset(ends.remote),
                                      lambda ends: ends.client.shutdown(socket.SHUT_WR), lambda ends: None])
                    standing = self.tunnel(rng.choice([b"", b"early"]), 0, how)
                    standing.remote.close()
                    standing.client.close()
                    standing.ended()
            except Exception as exc:
                errors.append(exc)
        threads = [threading.Thread(target=one, args=(number,), daemon=True) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE_S)
        self.assertEqual((errors, self.bugs, len(self.loop), len(self.ends)), ([], [], 0, 120))

    @IN_LOOP
    def test_stop_while_threads_bring_tunnels(self):
        """Each tunnel is taken and then ended, or refused: never both, never neither."""
        refused, taken = [], []

        def one():
            while not refused:
                try:
                    taken.append(self.tunnel())
                except OSError:
                    refused.append(1)
        threads = [threading.Thread(target=one, daemon=True) for _ in range(4)]
        for thread in threads:
            thread.start()
        wait_until(lambda: len(taken) > 8, "some are in")
        self.loop.abort_all("first")
        self.loop.stop("server stopped")
        for thread in threads:
            thread.join(PATIENCE_S)
        for standing in taken:
            standing.ended()
        self.assertEqual((len(self.ends), self.bugs), (len(taken), []))

    def test_relay_and_watch_after_stop(self):
        self.loop.stop("server stopped")
        near = self.pair()[1]
        for call in (lambda: self.loop.relay(Tunnel(near, near)), lambda: self.loop.watch(near, self.fail)):
            with self.assertRaises(OSError) as caught:
                call()
            self.assertEqual(caught.exception.errno, errno.ECANCELED)
        self.assertGreater(near.fileno(), -1)
        self.loop.stop("again")

    @IN_LOOP
    def test_what_cannot_be_registered_ends(self):
        other = self.tunnel()
        for at in (1, 2):
            for error, why in (OSError(errno.ENOSPC, "no more"), "no more"), (MemoryError(), "a bug of the server"):
                full = [None] * (at - 1) + [error]
                with self.subTest(at, why=why), mock.patch.object(self.loop._poller, "register", side_effect=full), \
                        mock.patch.object(self.loop._poller, "unregister"):
                    self.assertEqual(self.tunnel().ended(), ("server", why))
                wait_until(lambda: (len(self.loop), len(self.loop._watched)) == (1, 3))
        self.assertEqual(len(self.bugs), 2, "the owner is told of want of memory")
        other.echo()

    def test_stop_of_a_loop_that_never_ran_and_in_its_own_thread(self):
        unstarted = Loop(self.tunnel_ended, self.fail)
        standing = Standing(unstarted)
        self.standing.append(standing)
        unstarted.stop("server stopped")
        self.assertEqual(standing.ended(), ("server stopped", ""))
        other = self.tunnel()
        self.loop.call_soon(lambda: self.loop.stop("by itself"))
        self.assertEqual(other.ended(), ("by itself", ""))
        self.assertEqual(self.bugs, [])

    @unittest.skipUnless(hasattr(os, "fork"), "no fork()")
    def test_a_forked_child_disturbs_nothing(self):
        standing = self.tunnel()
        standing.echo()
        child = os.fork()
        if not child:
            try:
                self.loop.stop("child")
                os._exit(0 if standing.near_client.fileno() > 0 else 2)
            except BaseException:
                os._exit(3)
        self.assertEqual(os.waitpid(child, 0)[1], 0)
        standing.echo()

    def test_watch(self):
        for name, act, said in (("speaks", lambda far: far.sendall(b"\5"), True),
                                ("leaves", lambda far: far.close(), False), ("resets", reset, False)):
            with self.subTest(name):
                far, near = self.pair()
                told, event = [], threading.Event()
                self.loop.watch(near, lambda spoke: (told.append(spoke), event.set()))
                act(far)
                self.assertTrue(event.wait(PATIENCE_S))
                self.assertEqual(told, [said])
                near.close()
        with self.subTest("is shut down by its owner"):
            _far, near = self.pair()
            told, event = [], threading.Event()
            self.loop.watch(near, lambda spoke: (told.append(spoke), event.set()))
            near.shutdown(socket.SHUT_RDWR)
            self.assertTrue(event.wait(PATIENCE_S))
        self.assertEqual((len(self.loop._watched), self.bugs), (1, []))

    def test_a_watch_whose_call_fails_does_not_spin(self):
        far, near = self.pair()
        self.loop.watch(near, lambda spoke: 1 / 0)
        far.sendall(b"x")
        wait_until(lambda: self.bugs, "told")
        self.assert_calm()
        self.assertEqual((len(self.bugs), len(self.loop._watched)), (1, 1))

    def test_no_tunnel_stays_after_its_end(self):
        gc.disable()
        self.addCleanup(gc.enable)
        left = []
        for end in (lambda s: self.loop.abort_all("enough"), lambda s: s.client.close() or s.remote.close(),
                    lambda s: reset(s.client)):
            standing = Standing(self.loop)
            standing.tunnel.session = Subject()             # weak references to a Tunnel are not to be had
            left.append(weakref.ref(standing.tunnel.session))
            for sock in (standing.client, standing.remote):
                self.addCleanup(sock.close)                 # later: its event would make the loop forget the tunnel
            end(standing)
            del standing
            wait_until(lambda: left[-1]() is None, "nothing holds it")

    @IN_LOOP
    def test_an_idle_tunnel_costs_little(self):
        count = 150
        pairs = [(tcp_pair(), tcp_pair()) for _ in range(count)]
        self.tunnel().echo()
        tracemalloc.start()
        self.addCleanup(tracemalloc.stop)
        before = tracemalloc.get_traced_memory()[0]
        for (client, near_client), (remote, near_remote) in pairs:
            self.loop.relay(Tunnel(near_client, near_remote, idle_s=60))
            client.sendall(NOISE[:5000])
            self.assertEqual(len(read_exactly(remote, 5000)), 5000)
        used = tracemalloc.get_traced_memory()[0] - before
        self.loop.stop("test over")
        for (client, _), (remote, _) in pairs:
            client.close()
            remote.close()
        self.assertLess(used / count, 2048)

    @IN_LOOP
    def test_tables_shrink_when_a_crowd_has_left(self):
        """What stays is served as ever."""
        with mock.patch.object(loop_module, "CROWD", 64):
            ip_in("192.0.2.1")
            over = self.loop._over
            stays, *crowd = [self.tunnel() for _ in range(70)]
            wait_until(lambda: self.loop._most == 70, "a sweep saw them all")
            full = sys.getsizeof(self.loop._watched), sys.getsizeof(self.loop._tunnels)
            self.loop.call_soon(lambda: [tunnel.end("test") or self.loop._look_at(tunnel)
                                         for tunnel in (one.tunnel for one in crowd)])
            for one in crowd:
                one.ended()
                one.client.close()
                one.remote.close()
            wait_until(lambda: sys.getsizeof(self.loop._watched) * 8 < full[0], "few entries, a small dict")
            self.assertLess(sys.getsizeof(self.loop._tunnels) * 8, full[1])
            self.assertIs(self.loop._over, over)
            self.assertEqual(ip_in.cache_info().currsize, 0, "what was remembered amid the crowd is forgotten")
            stays.echo()
            self.tunnel().echo()

    def test_no_list_of_events_and_no_time_is_held_while_memory_goes_back(self):
        """An object that was made amid a crowd holds the memory around it."""
        made, held = [], []

        def noted(thing):
            made.append(weakref.ref(thing))
            return thing

        class Events(list):
            """With weak references."""

        class Time(float):
            """With weak references."""

        loop = Loop(lambda tunnel: None, self.fail)
        poll = loop._poller.poll
        loop._poller.poll = lambda *how: noted(Events(poll(*how)))
        loop._shrink = lambda: held.append((loop._sweep_at, [one() for one in made if one() is not None]))
        with mock.patch.object(loop_module, "monotonic", lambda: noted(Time(time.monotonic()))):
            loop.start()
            wait_until(lambda: len(held) > 1, "two sweeps")
            loop.stop("test over")
        self.assertEqual(held, [(0.0, [])] * len(held))
        self.assertGreater(len(made), 4)

    def test_a_read_allocates_no_more_than_has_come(self):
        """A buffer for each read, allocated and shrunk to what has come, fragments the heap, which then grows."""
        subprocess.run([sys.executable, "-c", "from socks5.relay.pipe import _buffers; assert _buffers, 'none yet'"],
                       cwd=str(ROOT), check=True)
        (client, near_client), (remote, near_remote) = tcp_pair(), tcp_pair()
        for sock in (client, near_client, remote, near_remote):
            self.addCleanup(sock.close)
            sock.settimeout(PATIENCE_S)
        near_remote.setblocking(False)
        pipe = Pipe(near_client, near_remote)
        peaks = []
        for _ in range(2):                                  # the first one makes the buffer that all share
            client.sendall(b"data")
            tracemalloc.start()
            try:
                pipe.fill()
                peaks.append(tracemalloc.get_traced_memory()[1])
            finally:
                tracemalloc.stop()
        self.assertEqual(read_exactly(remote, 8), b"datadata")
        self.assertLess(peaks[-1], 4096)

    @unittest.skipUnless(os.path.exists("/proc/self/fd"), "/proc")
    def test_every_descriptor_comes_back(self):
        before = descriptors()
        loop = Loop(lambda tunnel: None, self.fail)
        loop.start()
        loop.stop("server stopped")
        self.assertEqual(descriptors(), before)


class TrapByPollTest(TrapTest):
    without = ("epoll",)


if __name__ == "__main__":
    unittest.main()
