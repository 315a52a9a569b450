"""throttle.py: which password is looked at and when, by a clock of our own and without threads."""
import random
from unittest import mock

from socks5.access import throttle
from socks5.access.shared import Lock
from socks5.access.throttle import Attempt, Throttle
from tests import support

HERE, THERE = "192.0.2.1", "192.0.2.2"
SECRET = bytes(32)
HOUR, DAY = 3600, 86400


class Case(support.Case):
    def setUp(self):
        self.now = 1000.0
        self.throttle = Throttle(Lock(), lambda: self.now)

    def attempt(self, passwd=b"x", uname=b"bob", origin=HERE):
        self.now += 1e-6                                    # no two arrive at once
        return Attempt(SECRET, origin, uname, passwd, self.now)

    def look(self, passwd=b"x", uname=b"bob", origin=HERE, right=False):
        """Try once: whether the password was looked at at once. It is settled, and waits no more."""
        attempt = self.attempt(passwd, uname, origin)
        looked = self.throttle.ask(attempt) == 0
        if looked:
            self.throttle.settle(attempt, right)
        self.throttle.withdraw(attempt)
        return looked

    def seconds_until_looked_at(self, attempt, others=(), most=60.0):
        """Ask as the threads of these attempts would, each when it was told to; others that get a look are wrong."""
        due = dict.fromkeys([attempt, *others], self.now)
        begun = self.now
        while self.now - begun < most:
            one = min(due, key=lambda one: due[one])
            self.now = max(self.now, due[one])
            wait_s = self.throttle.ask(one)
            if one is attempt and not wait_s:
                return None if wait_s is None else self.now - begun
            if not wait_s:
                del due[one]
                if wait_s == 0:
                    self.throttle.settle(one, False)
            else:
                due[one] = self.now + wait_s
        return None


class Guessing(Case):
    def guesses(self, seconds, make, right=lambda number: False):
        """How many are looked at when four are tried a second."""
        looked = 0
        for number in range(int(seconds * 4)):
            looked += self.look(*make(number), right=right(number))
            self.now += 0.25
        return looked

    def test_a_thousand_an_hour_of_an_origin_whatever_the_names(self):
        for name, make in (("one name", lambda number: (b"%d" % number,)),
                           ("many names", lambda number: (b"x", b"%d" % number))):
            with self.subTest(name):
                self.setUp()
                self.assertTrue(850 < self.guesses(HOUR, make) <= 1000)

    def test_ten_thousand_an_hour_of_a_name_from_all_origins(self):
        rng = random.Random(1)
        looked = self.guesses(HOUR, lambda number: (b"x", b"bob", "192.0.2.%d" % rng.randrange(250)))
        self.assertTrue(9000 < looked <= 10000)
        with self.subTest("another name from there"):
            self.assertTrue(self.look(b"x", b"al", "198.51.100.1"))
        with self.subTest("by delay"):
            self.assertLess(self.seconds_until_looked_at(self.attempt(b"x", b"bob", "198.51.100.2")), 1)

    def test_own_logins_are_no_way_round(self):
        """Three wrong guesses for another's name, and one login of one's own, repeated."""
        def make(number):
            return (b"me", b"me") if number % 4 == 3 else (b"%d" % number,)
        looked, own = 0, 0
        for number in range(HOUR * 2):
            right = number % 4 == 3
            seen = self.look(*make(number), right=right)
            looked, own = looked + (seen and not right), own + (seen and right)
            self.now += 0.5
        self.assertTrue(0 < looked <= 1000)
        self.assertGreater(own, HOUR * 2 / 4 - 100)

    def test_own_failures_are_no_way_round(self):
        """Failures of one's own, cleared by a login of one's own, between the guesses for another's name."""
        looked = 0
        for number in range(HOUR * 2):
            what = number % 4
            if what == 0:
                looked += self.look(b"%d" % number)
            else:
                self.look(b"wrong" if what < 3 else b"me", b"me", right=what == 3)
            self.now += 0.5
        self.assertTrue(0 < looked <= 1000)

    def test_undecided_costs_nothing(self):
        for _ in range(100):
            attempt = self.attempt()
            self.assertEqual(self.throttle.ask(attempt), 0)
            self.throttle.settle(attempt, None)
        self.assertTrue(all(self.look() for _ in range(throttle.BURST)))
        self.assertFalse(self.look())

    def test_checks_that_take_long_are_no_way_round(self):
        """None is settled before all have asked: the looks are taken, not counted afterwards."""
        asked = [self.throttle.ask(self.attempt(b"%d" % number)) for number in range(100)]
        self.assertEqual(asked.count(0), throttle.BURST)

    def test_other_origins_do_not_notice(self):
        while self.look():
            pass
        self.assertTrue(self.look(origin=THERE))


class LettingIn(Case):
    def test_within_5_seconds_after_any_number_of_failures(self):
        for name, uname in (("the same name", b"bob"), ("another", b"al")):
            for times in (1, 14, 100, 3000):
                with self.subTest(name, times=times):
                    self.setUp()
                    for number in range(times):
                        self.look(b"%d" % number)
                        self.now += 0.001
                    waited = self.seconds_until_looked_at(self.attempt(b"right", uname))
                    self.assertLess(waited, 5)

    def test_within_5_seconds_though_wrong_ones_still_wait(self):
        for name, uname in (("the same name", b"bob"), ("another", b"al")):
            for times in (14, 100, 500):
                with self.subTest(name, times=times):
                    self.setUp()
                    others = [self.attempt(b"%d" % number) for number in range(times)]
                    others = [other for other in others if self.throttle.ask(other)]
                    self.assertEqual(len(others), times - throttle.BURST)
                    waited = self.seconds_until_looked_at(self.attempt(b"right", uname), others)
                    self.assertLess(waited, 5)

    def test_a_user_who_has_failed_waits_for_one_who_has_not(self):
        for number in range(throttle.BURST):
            self.look(b"%d" % number)
        first = self.attempt(b"right", b"al")
        self.throttle.ask(first)
        flood = [self.attempt(b"later%d" % number) for number in range(50)]     # newer, but of bob
        for other in flood:
            self.throttle.ask(other)
        self.assertLess(self.seconds_until_looked_at(first, flood), 4.5)

    def test_what_was_right_within_a_day_is_let_in_at_once(self):
        self.look(b"right", right=True)
        for number in range(99):
            self.look(b"%d" % number)
        self.now += DAY - 10
        while self.look(uname=b"al"):
            pass
        self.assertTrue(self.look(b"right", right=True))
        with self.subTest("not another password, nor from elsewhere, nor for another user"):
            self.assertFalse(self.look(b"Right"))
            self.assertFalse(self.look(b"right", b"al"))
            while self.look(uname=b"al", origin=THERE):
                pass
            self.assertFalse(self.look(b"right", origin=THERE))
        with self.subTest("nor later"):
            self.now += DAY + 1
            while self.look(uname=b"al"):
                pass
            self.assertFalse(self.look(b"right"))

    def guess(self, users, number):
        """One wrong password, which does not wait: whether it was looked at, or compared with the one that is known."""
        attempt = self.attempt(b"%d" % number, users[number % len(users)])
        looked = self.throttle.ask(attempt) == 0
        if looked:
            self.throttle.settle(attempt, False)
        self.throttle.withdraw(attempt)
        return looked + attempt.compared

    def test_known_passwords_cannot_be_guessed_without_end(self):
        """From the users' own address: looks and comparisons are a thousand an hour together, whatever the names."""
        for users in ([b"bob"], [b"user %d" % number for number in range(100)]):
            with self.subTest(users=len(users)):
                self.setUp()
                for user in users:
                    self.assertTrue(self.look(b"right", user, right=True))
                told = [self.guess(users, number) for number in range(HOUR * 2) if self.later(0.5)]
                self.assertTrue(850 < sum(told) <= 1000, sum(told))
                self.later(throttle.INTERVAL_S)
                self.assertTrue(self.look(b"right", users[0], right=True), "at once when it is over")

    def later(self, seconds):
        self.now += seconds
        return True

    def test_guessing_at_one_user_does_not_delay_another(self):
        """A user who logged in today is let in at once."""
        for user in (b"al", b"bob"):
            self.look(b"right", user, right=True)
        for number in range(HOUR // 4):
            self.guess([b"bob", b"eve"], number)
            self.assertTrue(self.look(b"right", b"al", right=True), number)
            self.later(0.5)

    def test_a_wrong_password_that_is_looked_at_is_no_miss(self):
        self.look(b"right", right=True)
        for number in range(HOUR // 4):
            self.assertTrue(self.look(b"%d" % number))
            self.later(throttle.INTERVAL_S + 0.001)
        for number in range(throttle.BURST + throttle.MISS_BURST - 1):
            self.guess([b"bob"], number)
        self.assertTrue(self.look(b"right", right=True))

    def test_a_password_that_was_changed_is_known_no_more(self):
        self.look(b"right", right=True)
        self.assertTrue(self.look(b"right", right=False))
        while self.look(uname=b"al"):
            pass
        self.assertFalse(self.look(b"right"))

    def test_a_success_clears_the_failures_of_that_user_only(self):
        for number in range(throttle.BURST - 1):
            self.look(b"%d" % number, b"al" if number % 2 else b"bob")
        self.look(b"right", right=True)
        spent = 0
        while self.look(uname=b"carol"):
            spent += 1
        self.assertEqual(spent, throttle.BURST - (throttle.BURST - 1) // 2)

    def test_a_success_of_a_known_password_clears_as_well(self):
        self.look(b"right", right=True)
        for number in range(throttle.BURST):
            self.assertTrue(self.look(b"%d" % number))
        self.assertTrue(self.look(b"right", right=True))
        self.assertTrue(self.look(uname=b"al"))

    def test_a_success_clears_the_failures_from_that_origin_only(self):
        for origin in (HERE, THERE):
            for number in range(throttle.BURST):
                self.look(b"%d" % number, origin=origin)
        attempt = self.attempt(b"right")
        self.seconds_until_looked_at(attempt)
        self.throttle.settle(attempt, True)
        self.assertTrue(self.look(origin=HERE))
        self.now += 0.001
        self.assertTrue(self.look(origin=THERE))                # the time that the first had to wait
        self.assertFalse(self.look(origin=THERE))


class Bounds(Case):
    def test_pending(self):
        with mock.patch.object(throttle, "PENDING", 5):
            attempts = [self.attempt(b"%d" % number) for number in range(throttle.BURST + 8)]
            asked = [self.throttle.ask(attempt) for attempt in attempts]
            self.assertNotIn(None, asked, "the newest is never the one that is deferred")
            again = [self.throttle.ask(attempt) for attempt in attempts[throttle.BURST:]]
            self.assertEqual([wait_s is None for wait_s in again], [True] * 3 + [False] * 5)
            for attempt in attempts:
                self.throttle.withdraw(attempt)
            self.assertEqual(self.throttle._pending, {})

    def test_a_user_who_has_failed_is_deferred_first(self):
        with mock.patch.object(throttle, "PENDING", 3):
            for number in range(throttle.BURST):
                self.look(b"%d" % number)
            others = [self.attempt(b"x", b"user%d" % number) for number in range(3)]
            for other in others:
                self.throttle.ask(other)
            self.assertIsNone(self.throttle.ask(self.attempt(b"x", b"bob")))
            self.assertNotIn(None, [self.throttle.ask(other) for other in others])

    def test_records(self):
        """A flood of names and origins changes neither the memory's size nor a limit that is in force."""
        for table in ("ORIGINS", "NAMES", "PAIRS", "GOOD"):
            self.enter(mock.patch.object(throttle, table, 256))
        self.throttle = Throttle(Lock(), lambda: self.now)
        self.look(b"right", b"al", right=True)
        while self.look():
            pass
        for number in range(5000):
            self.look(b"x", b"u%d" % number, "origin %d" % number)
        self.assertFalse(self.look())
        again = self.attempt(b"right", b"al")               # whose failures, none, are not remembered any more
        self.assertTrue(self.throttle.is_known(again))
        self.assertFalse(self.throttle.is_news(again))
        self.assertTrue(self.look(b"right", b"al", right=True))

    def test_one_that_has_left_without_a_word_is_waited_for_half_a_second(self):
        """Its process was killed, say."""
        while self.look():
            pass
        old, gone = self.attempt(b"old"), self.attempt(b"gone")
        self.throttle.ask(gone)
        self.throttle.ask(old)
        self.now += throttle.INTERVAL_S - 0.1
        self.throttle.ask(gone)
        self.assertLess(self.seconds_until_looked_at(old), 0.1 + throttle.STALE_S + 2 * throttle.POLL_S)


class Names(Case):
    def test_an_origin_without_looks_does_not_keep_a_name_from_others(self):
        """The newest attempts for a name come from an origin that has no looks left: they wait for these, not first
        in line for the name's."""
        with mock.patch.multiple(throttle, NAME_BURST=20):
            for number in range(20):
                self.look(b"%d" % number, origin="192.0.2.%d" % number)
            while self.look(uname=b"al", origin=HERE + "0"):
                pass
            elsewhere = self.attempt(b"right", origin=THERE + "0")
            self.throttle.ask(elsewhere)
            flood = [self.attempt(b"w%d" % number, origin=HERE + "0") for number in range(20)]
            self.assertLess(self.seconds_until_looked_at(elsewhere, flood), 1.0)
