"""relay/bucket.py by a clock that the test sets: exact rates, fair turns, shared memory."""
import heapq
import os
import signal
import unittest
from unittest import mock

from socks5.relay import bucket
from socks5.relay.bucket import BURST_S, LONGEST_S, RECORDS, Buckets, Flow, Limit, OwnBucket
from tests.support import need

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30


def limits(number, rate, burst=0, key=b"key"):
    """The same bucket as so many processes have it."""
    buckets = Buckets()
    return [Limit("rate-per-user", buckets.bucket(key), rate, burst) for _ in range(number)]


def play(flows, seconds, late_s=0.0, sizes=None):
    """Have each flow read all that it may, as streams with endless data do: the bytes of each. Turns come `late_s`
    after their time."""
    got = [0] * len(flows)
    turns = [(100.0, number) for number in range(len(flows))]
    while turns[0][0] < 100.0 + seconds:
        now, number = heapq.heappop(turns)
        flow = flows[number]
        flow.resume_at = 0.0
        if not flow.granted and not flow.reserve(min(flow.portion(), (sizes or {}).get(number, GIB)), now):
            heapq.heappush(turns, (flow.resume_at + late_s, number))
            continue
        got[number] += flow.granted
        flow.use(flow.granted, now)
        heapq.heappush(turns, (now + 1e-6, number))
    return got


class Streams(unittest.TestCase):
    def test_exact_from_16_KiB_to_1_GiB_with_one_and_with_200(self):
        for rate in (16 * KIB, 300 * KIB, MIB, 64 * MIB, GIB):
            for number in (1, 2, 200):
                with self.subTest(rate=rate, number=number):
                    limit, = limits(1, rate)
                    total = sum(play([Flow([limit]) for _ in range(number)], 10))
                    self.assertAlmostEqual(total / rate, 10 + BURST_S, delta=0.15)

    def test_turns_that_come_late_cost_nothing(self):
        for late_s in (0.001, 0.02, 0.1):
            with self.subTest(late_s=late_s):
                limit, = limits(1, MIB)
                self.assertAlmostEqual(sum(play([Flow([limit])], 10, late_s)) / MIB, 10 + BURST_S, delta=0.3)

    def test_half_each_in_one_process_and_in_two(self):
        for processes in (1, 2):
            with self.subTest(processes=processes):
                got = play([Flow([limit]) for limit in limits(2, MIB)[:processes] for _ in range(2 // processes)], 10)
                self.assertAlmostEqual(got[0] / sum(got), 0.5, delta=0.02)

    def test_one_beside_nine_of_another_process_gets_its_share(self):
        one, other = limits(2, MIB)
        got = play([Flow([one]), *(Flow([other]) for _ in range(9))], 10)
        self.assertGreater(got[0], 0.9 * sum(got) / 10)
        self.assertGreater(min(got[1:]), 0.04 * sum(got))

    def test_200_get_about_the_same(self):
        limit, = limits(1, 16 * MIB)
        got = play([Flow([limit]) for _ in range(200)], 10)
        self.assertLess(max(got) / min(got), 1.6)

    def test_the_least_of_several_limits_holds(self):
        user, = limits(1, MIB)
        clients = [Limit("rate-per-client", OwnBucket(), 100 * KIB) for _ in range(2)]
        got = play([Flow([user, client]) for client in clients], 10)
        for size in got:
            self.assertAlmostEqual(size / (100 * KIB), 10 + BURST_S, delta=0.2)

    def test_a_slow_one_beside_a_fast_one_is_not_held_back(self):
        """A small message waits one turn of the other, not more."""
        limit, = limits(1, MIB)
        bulk, small = Flow([limit]), Flow([limit])
        now = 100.0
        while bulk.reserve(bulk.portion(), now):
            bulk.use(bulk.granted, now)
        self.assertFalse(small.reserve(10, now))
        self.assertLess(small.resume_at - now, 0.05)
        self.assertEqual(small.held_back, (now, "rate-per-user"))

    def test_a_burst_then_the_rate(self):
        limit = Limit("rule", OwnBucket(), MIB, 8 * MIB)
        flow, now, size = Flow([limit]), 100.0, 0
        while flow.reserve(flow.portion(), now):
            size += flow.granted
            flow.use(flow.granted, now)
        self.assertAlmostEqual(size / MIB, 8, delta=0.1)
        flow.close()
        later = Flow([limit])
        self.assertTrue(later.reserve(MIB, now + 5), "it has filled again meanwhile")

    def test_small_messages_seldom_draw_from_the_shared_memory(self):
        class Counted(OwnBucket):
            draws = 0

            def take(self, *args):
                self.draws += 1
                return super().take(*args)

        counted = Counted()
        flow = Flow([Limit("rule", counted, 10 * MIB)])
        for number in range(10000):
            self.assertTrue(flow.reserve(10, 100 + number / 1000))
            flow.use(10, 100 + number / 1000)
        self.assertLess(counted.draws, 10)

    def test_what_is_reserved_is_given_back(self):
        limit, = limits(1, 10 * KIB)
        first, second = Flow([limit]), Flow([limit])
        self.assertTrue(first.reserve(4 * KIB, 100))
        self.assertFalse(second.reserve(1000, 100))
        second.close()
        first.close()
        third = Flow([limit])
        self.assertTrue(third.reserve(4 * KIB, 100.21))

    def test_what_receivers_that_take_nothing_keep_reserved_is_little(self):
        """It was 20 ms of the rate for each, and 200 could read 4 s of it at once when they went on."""
        for rate in (MIB, GIB):
            for processes in (1, 4):
                with self.subTest(rate=rate, processes=processes):
                    flows = [Flow([limit]) for limit in limits(processes, rate) for _ in range(200 // processes)]
                    for flow in flows:
                        flow.reserve(flow.portion(), 100.0)
                    self.assertLess(sum(flow.granted for flow in flows) / rate, 0.3)
                    for flow in flows:
                        flow.close()
                    self.assertEqual(flows[0].portion(), Flow(limits(1, rate)).portion(), "all have left")

    def test_no_rubbish_in_the_memory_stops_a_flow_for_ever(self):
        flow = Flow([limits(1, MIB)[0]])
        with mock.patch.object(bucket.Table, "get", lambda *_: (1e300,)):
            flow.reserve(1000, 100)
        self.assertEqual(flow.resume_at, 100 + LONGEST_S)


class Datagrams(unittest.TestCase):
    def flood(self, flow, size, every_s, seconds=10, streams=()):
        """How many bytes of a flood pass."""
        passed = 0
        for number in range(int(seconds / every_s)):
            now = 100 + number * every_s
            passed += size * flow.passes(size, now)
            for stream in streams:
                if stream.resume_at <= now:
                    stream.use(stream.granted, now)
                    stream.reserve(stream.portion(), now)
        return passed

    def test_exact_in_a_flood(self):
        for rate in (16 * KIB, MIB, 50 * MIB):
            with self.subTest(rate=rate):
                passed = self.flood(Flow([limits(1, rate)[0]]), 1000, 1000 / rate / 5)
                self.assertAlmostEqual(passed / rate, 10 + BURST_S, delta=0.3)

    def test_below_the_rate_nothing_is_lost(self):
        flow = Flow([limits(1, 100 * KIB)[0]])
        self.assertEqual(self.flood(flow, 1000, 0.011), 1000 * int(10 / 0.011))

    def test_larger_than_the_bucket(self):
        flow = Flow([limits(1, 16 * KIB)[0]])
        self.assertAlmostEqual(self.flood(flow, 60000, 0.01, 100) / (16 * KIB), 100, delta=8)

    def test_beside_streams_it_gets_its_share(self):
        for number in (1, 50):
            with self.subTest(streams=number):
                limit, = limits(1, MIB)
                passed = self.flood(Flow([limit]), 500, 0.0002, 10, [Flow([limit]) for _ in range(number)])
                self.assertGreater(passed / (10 * MIB), 0.5 / (number + 1))
                self.assertLess(passed / (10 * MIB), 0.65)


class Memory(unittest.TestCase):
    def test_users_do_not_share(self):
        buckets = Buckets()
        one, two = (Flow([Limit("rate-per-user", buckets.bucket(name), KIB)]) for name in (b"alice", b"bob"))
        while one.reserve(100, 100):
            one.use(100, 100)
        self.assertTrue(two.reserve(100, 100))

    def test_a_full_table_forgets_the_fullest(self):
        buckets = Buckets()
        busy = buckets.bucket(b"busy")
        for number in range(20000):
            busy.take(2000, 2000, MIB, BURST_S, 100 + number / 1000)
            if number % 2:
                buckets.bucket(b"%d" % number).take(1, 1, MIB, BURST_S, 100 + number / 1000)
        self.assertGreater(20000 // 2, RECORDS // 2)
        self.assertGreater(busy.take(2000, 2000, MIB, BURST_S, 120)[0], 130)

    def test_no_draw_is_lost_among_processes_and_a_killed_one_stops_none(self):
        need(self, hasattr(os, "fork"), "fork()")
        buckets = Buckets()
        buckets.lock.share()
        self.addCleanup(buckets.lock.unshare)
        name, rounds = buckets.bucket(b"alice"), 2000
        pids = []
        for number in range(4):
            pid = os.fork()
            if not pid:
                try:
                    if number == 3:
                        while True:                     # until it is killed
                            buckets.bucket(b"other").take(1000, 1000, MIB, BURST_S, 100.0)
                    for _ in range(rounds):
                        name.take(1 << 10, 1 << 10, MIB, BURST_S, 100.0)
                finally:
                    os._exit(0)
            pids.append(pid)
        os.kill(pids[3], signal.SIGKILL)
        for pid in pids:
            os.waitpid(pid, 0)
        start, _ = name.take(1, 1, MIB, BURST_S, 100.0)
        self.assertAlmostEqual(start, 100 - BURST_S + 3 * rounds / 1024, places=6)
