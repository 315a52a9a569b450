"""throttle.py: what guessing costs, by a clock of our own."""
import threading
import unittest

from socks5.access import throttle
from socks5.protocol.errors import ProtocolError
from socks5.access.throttle import Throttle
from tests.support import PATIENCE_S

HERE, THERE = "192.0.2.1", "192.0.2.2"


def wrong():
    return False


def right():
    return True


def unseen():
    raise AssertionError("a password was looked at")


class Guessing(unittest.TestCase):
    def setUp(self):
        self.now = 1000.0
        self.throttle = Throttle(lambda: self.now)

    def fail(self, times, origin=HERE):
        """How late each answer is."""
        return [self.throttle.judge(origin, b"%d" % number, wrong)[1] for number in range(times)]

    def test_late_then_refused_unseen(self):
        self.assertEqual(self.fail(7), [0, 0, 0, 1, 2, 4, 4])
        for _ in range(3):
            self.assertEqual(self.throttle.judge(HERE, b"x", unseen), (False, 0.0))

    def test_the_same_password_again_is_another_failure(self):
        self.assertEqual([self.throttle.judge(HERE, b"same", wrong)[1] for _ in range(5)], [0, 0, 0, 1, 2])

    def test_the_time_doubles_to_15_minutes(self):
        self.fail(7)
        for seconds in (30, 60, 120, 240, 480, 900, 900, 900):
            with self.subTest(seconds):
                self.now += seconds - 0.001
                self.assertEqual(self.throttle.judge(HERE, b"x", unseen), (False, 0.0))
                self.now += 0.002
                self.assertEqual(self.throttle.judge(HERE, b"x", wrong), (False, 4.0))

    def test_forty_years_of_failures(self):
        self.fail(7)
        for _ in range(2000):
            self.now += 900.1
            self.throttle.judge(HERE, b"x", wrong)
        self.assertEqual(self.throttle.judge(HERE, b"x", unseen), (False, 0.0))

    def test_a_right_one_is_refused_as_well_while_it_lasts(self):
        """Else the answer would tell what is right."""
        self.fail(7)
        self.assertEqual(self.throttle.judge(HERE, b"x", unseen), (False, 0.0))

    def test_a_success_clears_it(self):
        for before in (1, 6):
            with self.subTest(before):
                self.fail(before)
                self.assertEqual(self.throttle.judge(HERE, b"x", right), (True, 0.0))
                self.assertEqual(self.fail(3), [0, 0, 0])
                self.throttle.judge(HERE, b"x", right)
        with self.subTest("after having been refused"):
            self.fail(9)
            self.now += 31
            self.assertEqual(self.throttle.judge(HERE, b"x", right), (True, 0.0))
            self.assertEqual(self.fail(4), [0, 0, 0, 1])

    def test_silence_clears_it(self):
        self.fail(7)
        self.now += 30 + 901
        self.assertEqual(self.fail(4), [0, 0, 0, 1])

    def test_others_do_not_notice(self):
        self.fail(9)
        self.assertEqual(self.fail(3, THERE), [0, 0, 0])

    def test_undecided_counts_for_nothing(self):
        def busy():
            raise ProtocolError("too many")
        for _ in range(20):
            self.assertRaises(ProtocolError, self.throttle.judge, HERE, b"x", busy)
        self.assertEqual(self.fail(4), [0, 0, 0, 1])

    def test_memory_is_bounded(self):
        self.fail(7)
        for number in range(throttle.ADDRESSES + 500):
            self.throttle.judge(number, b"x", wrong)
        self.assertEqual(len(self.throttle._records), throttle.ADDRESSES)
        self.assertIn(number, self.throttle._records, "the newest stay")

    def test_success_leaves_nothing_behind(self):
        self.throttle.judge(HERE, b"x", right)
        self.fail(2)
        self.throttle.judge(HERE, b"x", right)
        self.assertEqual(len(self.throttle._records), 0)


class AtOnce(unittest.TestCase):
    """Passwords whose check takes its time."""

    def setUp(self):
        self.throttle = Throttle()
        self.go = threading.Event()
        self.addCleanup(self.go.set)
        self.threads, self.answers = [], []

    def start(self, attempt, answer, origin=HERE):
        """Returns once the check is under way."""
        begun = threading.Event()

        def check():
            begun.set()
            self.assertTrue(self.go.wait(PATIENCE_S))
            return answer
        thread = threading.Thread(target=lambda: self.answers.append(self.throttle.judge(origin, attempt, check)))
        thread.start()
        self.threads.append(thread)
        self.assertTrue(begun.wait(PATIENCE_S))

    def finish(self):
        self.go.set()
        for thread in self.threads:
            thread.join(PATIENCE_S)

    def test_one_password_on_many_connections_is_one_attempt(self):
        for _ in range(20):
            self.start(b"same", False)
        self.finish()
        self.assertEqual([self.throttle.judge(HERE, b"x", wrong)[1] for _ in range(3)], [0, 0, 1])

    def test_a_browser_starts(self):
        for _ in range(throttle.AT_ONCE + 20):
            self.start(b"same", True)
        self.finish()
        self.assertEqual(self.answers, [(True, 0.0)] * (throttle.AT_ONCE + 20))

    def test_many_passwords_at_once_are_no_way_round(self):
        for number in range(throttle.AT_ONCE):
            self.start(b"%d" % number, False)
        self.assertRaises(ProtocolError, self.throttle.judge, HERE, b"one more", unseen)
        self.assertEqual(self.throttle.judge(THERE, b"one more", right), (True, 0.0))
        self.finish()
        self.assertEqual(self.throttle.judge(HERE, b"x", unseen), (False, 0.0))

    def test_fewer_for_who_has_failed(self):
        for number in range(4):
            self.throttle.judge(HERE, b"%d" % number, wrong)
        for number in range(2):
            self.start(b"%d" % number, False)
        self.assertRaises(ProtocolError, self.throttle.judge, HERE, b"third", unseen)


if __name__ == "__main__":
    unittest.main()
