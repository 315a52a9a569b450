"""Fair shares: the last tenth is for those that hold little."""
import threading
import unittest

from socks5.net.shares import ANY_PORT, Ports, Share, Tally
from socks5.server.counters import Shared
from tests.support import in_threads


def taken(share, owner, number=1):
    """How often the owner is given `number` more."""
    times = 0
    while share.take(owner, number):
        times += 1
    return times


class ShareTest(unittest.TestCase):
    def test_one_owner_gets_all_but_the_last_tenth_and_newcomers_the_rest(self):
        for total, most, newcomers in ((100, 90, 10), (1000, 900, 100), (19, 18, 1), (5, 4, 1), (2, 1, 1), (1, 1, 0)):
            with self.subTest(total=total):
                share = Share(total)
                self.assertEqual(taken(share, "greedy"), most)
                self.assertEqual([share.take("newcomer %d" % number) for number in range(newcomers)],
                                 [True] * newcomers)
                self.assertFalse(share.take("late"))

    def test_of_the_last_tenth_an_owner_gets_up_to_a_tenth(self):
        share = Share(200)
        self.assertEqual([taken(share, owner) for owner in ("greedy", "one", "two")], [180, 20, 0])

    def test_several_at_once_or_none(self):
        share = Share(7, least=2)
        self.assertEqual([taken(share, owner, 2) for owner in ("greedy", "newcomer", "late")], [2, 1, 0])
        self.assertFalse(share.take("late", 2))
        self.assertTrue(share.take("late", 1))

    def test_what_is_given_back_can_be_taken_again(self):
        share = Share(10)
        for _ in range(3):
            self.assertEqual(taken(share, "greedy"), 9)
            share.give_back("greedy", 9)
        self.assertEqual(taken(share, "other"), 9)

    def test_nothing_is_left_of_owners_that_hold_nothing(self):
        tally = Tally()
        share = Share(10, tally=tally)
        for number in range(100):
            share.take(str(number))
            share.give_back(str(number))
        self.assertEqual((tally.live(), tally._held), (0, {}))

    def test_threads_never_take_more_than_there_is(self):
        share, counts = Share(1000), []

        def take():
            counts.append(taken(share, threading.current_thread().name))

        in_threads(8, take)
        self.assertLessEqual(sum(counts), 1000)
        self.assertGreaterEqual(sum(counts), 900)


class PortsTest(unittest.TestCase):
    def test_any_port_is_never_scarce(self):
        self.assertTrue(all(ANY_PORT.take("one", 4) for _ in range(1000)))
        self.assertEqual((list(ANY_PORT), str(ANY_PORT)), ([0], "any port"))

    def test_a_range_is_shared_once_for_each_ip_version(self):
        ports = Ports((5000, 5009))
        for version in (4, 6):
            times = 0
            while ports.take("greedy", version):
                times += 1
            self.assertEqual((times, ports.take("newcomer", version)), (9, True))
        ports.give_back("newcomer", 4)
        self.assertEqual([ports.take("late", version) for version in (4, 6)], [True, False])
        self.assertEqual((sorted(ports), str(ports)), (list(range(5000, 5010)), "ports 5000-5009"))
        self.assertGreater(len({next(iter(ports)) for _ in range(100)}), 1, "the first one is random")

    def test_over_all_processes_until_one_dies(self):
        shared = Shared(2)
        rows = [shared.row(0), shared.row(1)]
        here, there = (Ports((5000, 5009), 1, lambda ip, row=row: row.of_thing("udp-ports %d" % ip)) for row in rows)
        self.assertEqual([taken(ports._shares[4], "greedy") for ports in (here, there)], [9, 0])
        self.assertTrue(there.take("greedy", 6), "IPv6 has ports of its own")
        self.assertTrue(there.take("newcomer", 4))
        rows[0].clear()
        self.assertEqual((taken(there._shares[4], "greedy"), rows[1].of_thing("udp-ports 4").of("newcomer")), (8, 1))
