"""counts: rows of counters that processes share."""
import unittest

from socks5.server.counters import Shared


class Counting(unittest.TestCase):
    def test_rows_add_up_and_are_cleared(self):
        shared = Shared(3)
        rows = [shared.row(which) for which in range(3)]
        for row in rows:
            row.add("192.0.2.1", 1)
        rows[0].add("192.0.2.1", 1)
        rows[0].add("192.0.2.2", 1)
        self.assertEqual((rows[1].live(), rows[1].of("192.0.2.1"), rows[1].of("192.0.2.2")), (5, 4, 1))
        self.assertEqual(rows[0].clear(), 3)
        self.assertEqual((rows[2].live(), rows[2].of("192.0.2.1"), rows[2].of("192.0.2.2")), (2, 2, 0))
        rows[1].add("192.0.2.1", -1)
        self.assertEqual((rows[2].live(), rows[2].of("192.0.2.1")), (1, 1))

    def test_no_number_is_given_twice(self):
        shared = Shared(2)
        rows = [shared.row(which) for which in range(2)]
        numbers = [row.enter("", False) for row in rows for _ in range(3)]
        rows[0].clear()
        numbers += [shared.row(0).enter("", False), rows[1].enter("", False)]
        self.assertEqual(sorted(numbers), list(range(1, 9)))

    def test_each_thing_by_itself_and_all_are_cleared_when_a_process_has_died(self):
        shared = Shared(2)
        row, other = shared.row(0), shared.row(1)
        for what in Shared.THINGS:
            (row if what == "sessions" else row.of_thing(what)).add("192.0.2.1", 3)
            other.of_thing(what).add("192.0.2.1", 1)
            self.assertEqual(other.of_thing(what).of("192.0.2.1"), 4)
        row.enter("", False)
        self.assertEqual(row.clear(), 4)
        for what in Shared.THINGS:
            self.assertEqual((other.of_thing(what).live(), other.of_thing(what).of("192.0.2.1")), (1, 1))
        self.assertEqual(row.enter("", False), 3, "the number goes on")
        self.assertEqual(other.live(), 2, "the count does not")
