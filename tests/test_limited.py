"""relay/limited.py: the model of test_tunnel.py with rate limits, and what only real sockets show."""
import contextlib
import os
import socket
import unittest
from unittest import mock

from socks5.net.poller import READ, URGENT, WRITE
from socks5.relay import limited
from socks5.relay.bucket import NEVER, PORTION_S, Limit, OwnBucket
from socks5.relay.limited import Timers, limit, read_on
from socks5.relay.loop import MANY
from socks5.relay.pipe import CHUNK_BYTES
from socks5.relay.relay import Relay
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
            writable = bool(end.back.held) and not end.back.resume_at
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


class HeldBackTest(unittest.TestCase):
    def test_a_gate_that_is_taken_away_while_it_is_looked_at(self):
        """The thread of the status page asks, that of the tunnel takes them away after a reload."""
        class Changing:
            """A pipe whose gate is there for the first who looks, and never again."""

            def __init__(self):
                self.gates = [limited.Gate([])]

            @property
            def gate(self):
                return self.gates.pop() if self.gates else None

        relay, pipes = Relay(), (Changing(), Changing())
        with mock.patch.object(Relay, "pipes", lambda _relay: pipes):
            for _ in range(2):
                self.assertEqual(relay.held_back(), NEVER)


class EarlyDataTest(unittest.TestCase):
    def test_it_waits_for_its_turn_as_what_is_read_does(self):
        """Or a client could send 4 KiB with each of many connections, whatever the rate."""
        now = 1000.0
        ours, theirs = socket.socketpair()
        with ours, theirs, mock.patch.object(limited, "monotonic", lambda: now):
            rate = Limit("rate-per-client", OwnBucket(), 1000, 100)
            tunnels = [Tunnel(ours, theirs, bytes(1000)) for _ in range(3)]
            for tunnel in tunnels:
                limit(tunnel, [rate], [rate])
            self.assertEqual([tunnel.up.resume_at for tunnel in tunnels], [0, now + 0.9, now + 1.9])
            self.assertEqual([tunnel.interest()[1] & WRITE for tunnel in tunnels], [WRITE, 0, 0])
            timers = Timers()
            for tunnel in tunnels:
                timers.note(tunnel)
            now += 1
            self.assertEqual([tunnel for tunnel, _pipe in timers.due(now)], tunnels[1:2])
            read_on(tunnels[1], tunnels[1].up, now)
            self.assertEqual((tunnels[1].interest()[1] & WRITE, tunnels[1].up.gate.flow.granted), (WRITE, 0))
            tunnels[2].close()                              # what was reserved for it is for others
            self.assertEqual(rate.reserve(1000, now), now + 0.9)


class LoopTest(test_loop.LoopTest):
    def slow(self, rate=20 * KIB, made=None, **kwargs):
        """A tunnel whose directions share a rate, or the Limit `made`."""
        made = made or Limit("rule", OwnBucket(), rate)

        def limited_tunnel(*args, **more):
            tunnel = Tunnel(*args, **more)
            limit(tunnel, [made], [made])
            return tunnel

        with mock.patch.object(test_loop, "Tunnel", limited_tunnel):
            return self.tunnel(**kwargs)

    def test_early_data_that_has_to_wait_comes_whole_and_first(self):
        made, early = Limit("rule", OwnBucket(), 200 * KIB), test_loop.NOISE[:20 * KIB]
        for _ in range(4):
            standing = self.slow(made=made, early=early)
            standing.client.sendall(b"more")
        self.assertEqual(test_loop.read_exactly(standing.remote, len(early) + 4), early + b"more")
        wait_until(lambda: standing.tunnel.up.total == len(early) + 4)

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
