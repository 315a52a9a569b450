"""relay/limited.py: the model of test_tunnel.py with rate limits, and what only real sockets show."""
import contextlib
import os
import socket
import unittest
from unittest import mock

from socks5.net.poller import READ, URGENT, WRITE
from socks5.relay import limited
from socks5.relay.bucket import PORTION_S, Limit, OwnBucket
from socks5.relay.limited import Timers, limit, read_on
from socks5.relay.loop import MANY
from socks5.relay.pipe import CHUNK_BYTES
from socks5.relay.relay import UNREGISTERED
from socks5.relay.tunnel import Tunnel
from tests import test_loop
from tests.support import wait_until
from tests.test_tunnel import SEEDS, Play, model

KIB, MIB = 1 << 10, 1 << 20


class LimitedPlay(Play):
    """A Play with limits, which may change on the way. `now` goes on by a second with every event."""

    def __init__(self, seed):
        super().__init__(seed)
        self.timers = Timers()
        self.granted = 0
        self.limit()

    def limit(self):
        rate = self.rng.choice([3, 20, 100, 1000])
        shared = Limit("rate-per-user", OwnBucket(), rate, rate)
        own = Limit("rule", OwnBucket(), 10 * rate)
        limit(self.tunnel, self.rng.choice([[shared], [shared, own], []]), [shared])
        self.limits = shared, own

    def clock(self):
        return self.now

    def turn(self, stale=True):
        if self.rng.random() < 0.02:
            self.limit()
        if not stale and self.timers.heap:              # nothing else is to come
            self.now = max(self.now, self.timers.heap[0][0])
        for tunnel, pipe in self.timers.due(self.now):
            read_on(tunnel, pipe, self.now)
            self.check()
        came = super().turn(stale)
        self.timers.note(self.tunnel)
        return came or bool(self.timers.heap)

    def state(self):
        return [(end.read, len(end.sent), end.pipe.done, end.pipe.resume_at) for end in self.ends]

    def check_interest(self, wanted):
        for mask, end in zip(wanted, self.ends):
            readable = not end.pipe.held and not end.pipe.done and not end.pipe.resume_at
            writable = bool(end.back.held)
            assert mask == UNREGISTERED or mask == (READ | URGENT) * readable | WRITE * writable, (mask, readable)
            assert mask != UNREGISTERED or not readable and not writable

    def judge(self):
        super().judge()
        assert [one._sharing for one in self.limits] == [0, 0], "closed, and still has some"


class ModelTest(unittest.TestCase):
    def test_many_seeds(self):
        first = int(os.environ.get("SEED", 0))
        with model(), mock.patch.object(limited, "readable", lambda sock: sock.arrived - sock.read), \
                mock.patch("socks5.relay.bucket.LEAST_BYTES", 5):
            for seed in range(first, first + SEEDS // 2):
                play = LimitedPlay(seed)
                with mock.patch.object(limited, "monotonic", play.clock):
                    try:
                        play.run()
                    except Exception as exc:
                        raise AssertionError("seed %d: %s" % (seed, exc)) from exc


class KernelPipeTest(unittest.TestCase):
    def test_it_takes_no_more_than_is_granted(self):
        with model(), mock.patch.object(limited, "readable", lambda sock: sock.arrived - sock.read), \
                mock.patch("socks5.relay.bucket.LEAST_BYTES", 5):
            play = LimitedPlay(1)
            slow = Limit("rule", OwnBucket(), 1, 7)
            limit(play.tunnel, [slow], [slow])
            client, tunnel = play.ends[0], play.tunnel
            tunnel.up.use_kernel()
            before = client.read
            client.arrive(60)
            tunnel.handle(0, READ, 0)
            self.assertEqual(client.read - before, 5)
            tunnel.up.close()


class LoopTest(test_loop.LoopTest):
    def slow(self, rate=20 * KIB, **kwargs):
        """A tunnel whose directions share a rate."""
        made = Limit("rule", OwnBucket(), rate)

        def limited_tunnel(*args, **more):
            tunnel = Tunnel(*args, **more)
            limit(tunnel, [made], [made])
            return tunnel

        with mock.patch.object(test_loop, "Tunnel", limited_tunnel):
            return self.tunnel(**kwargs)

    def test_a_hang_up_of_a_paused_side_makes_no_thread_spin(self):
        for how in ("FIN both ways", "reset"):
            with self.subTest(how):
                standing = self.slow(4 * KIB)
                standing.client.shutdown(socket.SHUT_WR)
                self.assertEqual(standing.remote.recv(1), b"")
                standing.remote.sendall(bytes(30000))
                wait_until(lambda: standing.tunnel.down.resume_at, "paused")
                if how == "reset":
                    test_loop.reset(standing.remote)
                else:
                    standing.remote.close()
                self.assert_calm()
                self.loop.change_all(lambda tunnel: limit(tunnel, [], []))
                self.assertEqual(test_loop.read_exactly(standing.client, 30000), bytes(30000))
                self.assertEqual(test_loop.fate(standing.client), "reset" if how == "reset" else "EOF")
                self.assertEqual(standing.ended()[0], "client")

    def test_the_end_of_a_paused_tunnel_gives_back_what_it_has_reserved(self):
        standing = self.slow(KIB)
        standing.remote.sendall(bytes(10000))
        wait_until(lambda: standing.tunnel.down.resume_at, "paused")
        slow, = standing.tunnel.down.gate.flow.limits
        self.assertEqual(slow._sharing, 1)
        test_loop.reset(standing.client)
        standing.ended()
        self.assertEqual(slow._sharing, 0)

    def test_urgent_data_keeps_its_place(self):
        standing = self.slow()
        standing.client.setsockopt(socket.SOL_SOCKET, socket.SO_OOBINLINE, 1)
        standing.remote.sendall(bytes(20000))
        wait_until(lambda: standing.tunnel.down.resume_at, "paused")
        standing.remote.send(b"!", socket.MSG_OOB)
        standing.remote.sendall(b"\1" * 5000)
        got = test_loop.read_exactly(standing.client, 25001)
        self.assertEqual(got, bytes(20000) + b"!" + b"\1" * 5000)

    def test_a_tunnel_that_is_lent_gets_its_limits_from_its_own_thread(self):
        """From none to slow and back to none, while it is busy."""
        standing = self.tunnel()
        test_loop.send_hashed(standing.remote, 1 << 30)
        total = [0]

        def more(size):
            before = total[0]
            while total[0] < before + size:
                total[0] += len(standing.client.recv(1 << 18))

        more(64 * MIB)
        slow = Limit("rate-per-user", OwnBucket(), 200 * KIB)
        self.loop.change_all(lambda tunnel: limit(tunnel, [slow], [slow]))
        wait_until(lambda: (more(KIB), standing.tunnel.held_back().name)[1] == "rate-per-user", "slow")
        self.loop.change_all(lambda tunnel: limit(tunnel, [], []))
        more(64 * MIB)
        with contextlib.suppress(OSError):
            standing.client.close()

    @unittest.skipUnless(MANY, "by select(), every tunnel has a thread")
    def test_a_slow_one_needs_no_thread(self):
        standing = self.slow(MIB)
        test_loop.send_hashed(standing.remote, 1 << 30)
        test_loop.read_exactly(standing.client, MIB)
        self.assertFalse(standing.tunnel.lent)
        self.assertLess(MIB * PORTION_S, CHUNK_BYTES)
