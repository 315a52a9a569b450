"""passwords.py: hashes as a users file keeps them, and turns at computing them."""
import contextlib
import hashlib
import os
import signal
import threading
import unittest
from unittest import mock

from socks5.access import passwords
from socks5.access.passwords import Hash, Turns, Wait
from socks5.access.shared import Lock, lock_file
from tests.support import PATIENCE_S, in_threads

ALICE, BOB, CAROL = (name.ljust(16) for name in (b"alice", b"bob", b"carol"))


class Passwords(unittest.TestCase):
    """One password, as the users file keeps it."""

    CHEAP = (("scrypt", (2, 1, 1)), ("scrypt", (1024, 8, 2)), ("pbkdf2", (3,)))

    def test_there_and_back(self):
        for kind, cost in self.CHEAP:
            with self.subTest(kind, cost=cost):
                made = Hash.of(b"secret", kind, cost)
                self.assertEqual(Hash.parse(str(made)), made)
                self.assertRegex(str(made), r"^%s(\$\d+)+\$[A-Za-z0-9+/=]{24}\$[A-Za-z0-9+/=]{24}$" % kind)
                self.assertTrue(made.matches(b"secret"))
                for wrong in (b"", b"Secret", b"secre", b"secret\0", b"secretx"):
                    self.assertFalse(made.matches(wrong))

    def test_the_hash_is_computed_in_a_thread_that_ends(self):
        """Or each thread that has served a login keeps the memory of a hash."""
        ran, derive = [], passwords.derive

        def noting(*args):
            ran.append(threading.current_thread())
            return derive(*args)
        made = Hash.of(b"secret", *self.CHEAP[0])
        with mock.patch.object(passwords, "derive", noting):
            self.assertTrue(made.matches(b"secret"))
            self.assertIsNot(ran[0], threading.current_thread())
            self.assertFalse(ran[0].is_alive())
            with mock.patch.object(threading.Thread, "start", side_effect=RuntimeError("can't start new thread")):
                self.assertTrue(made.matches(b"secret"))
                self.assertFalse(made.matches(b"another"))
            self.assertIs(ran[1], threading.current_thread())
        with mock.patch.object(passwords, "derive", side_effect=MemoryError), self.assertRaises(MemoryError):
            made.matches(b"secret")

    def test_known_answers(self):
        """scrypt: RFC 7914 section 12; PBKDF2-HMAC-SHA-256: the same, section 11."""
        for kind, cost, password, salt, key in (
                ("scrypt", (1024, 8, 16), b"password", b"NaCl",
                 "fdbabe1c9d3472007856e7190d01e9fe7c6ad7cbc8237830e77376634b373162"),
                ("pbkdf2", (1,), b"passwd", b"salt",
                 "55ac046e56e3089fec1691c22544b605f94185216dde0465e68b9d57c20dacbc")):
            with self.subTest(kind):
                self.assertEqual(passwords.derive(kind, cost, salt, password, 32).hex(), key)

    def test_made_by_scrypt_where_there_is_one(self):
        self.assertEqual(Hash.of(b"x").kind, "scrypt")
        self.assertEqual(Hash.of(b"x").cost, (1 << 14, 8, 5))

    def test_without_scrypt(self):
        line = str(Hash.of(b"x", "scrypt", (2, 1, 1)))
        with mock.patch.object(hashlib, "scrypt"), mock.patch.object(passwords, "PBKDF2_ROUNDS", 7):
            del hashlib.scrypt
            made = Hash.of(b"x")
            self.assertEqual((made.kind, made.cost), ("pbkdf2", (7,)))
            self.assertTrue(Hash.parse(str(made)).matches(b"x"))
            self.assertRaisesRegex(ValueError, "this Python has no scrypt", Hash.parse, line)

    def test_mistakes(self):
        good = "scrypt$16$8$1$c2FsdHNhbHRzYWx0$a2V5a2V5a2V5a2V5a2V5a2V5"
        Hash.parse(good)
        for text, why in (
                ("", "not what --hash-password prints"), ("secret", "not what --hash-password prints"),
                ("$$", "not what"), ("md5$1$a$b", "not what"), ("scrypt$16$8$c2Fs$a2V5", "not what"),
                ("pbkdf2$1$1$c2Fs$a2V5", "not what"), (good.replace("16", "x"), "damaged"), (good + "!", "damaged"),
                (good.replace("c2FsdHNhbHRzYWx0$", "c2Fs$"), "cut short"),
                (good[:-4].replace("a2V5a2V5", ""), "cut short"),
                (good.replace("16", "15"), "power of 2"), (good.replace("16", "0"), "power of 2"),
                (good.replace("16", "-2"), "power of 2"), (good.replace("16", "1"), "power of 2"),
                (good.replace("$8$", "$0$"), "power of 2"), (good.replace("$1$", "$65$"), "power of 2"),
                (good.replace("$16$", "$%d$" % (1 << 30)), "up to %d" % (1 << 28)),
                ("pbkdf2$0$c2FsdHNhbHRzYWx0$a2V5a2V5a2V5a2V5a2V5a2V5", "10000000 rounds"),
                ("pbkdf2$10000001$c2FsdHNhbHRzYWx0$a2V5a2V5a2V5a2V5a2V5a2V5", "10000000 rounds")):
            with self.subTest(text), self.assertRaisesRegex(ValueError, why) as caught:
                Hash.parse(text)
            with self.subTest(text + ", said"):
                self.assertNotIn("secret", str(caught.exception))


class Queue(unittest.TestCase):
    """Turns in one process, without threads: which request may go when."""

    def setUp(self):
        self.turns = Turns(Lock())

    def arrive(self, user):
        ticket = object()
        self.turns._queue[ticket] = user
        return ticket

    def test_two_at_a_time_in_order_of_arrival(self):
        tickets = [self.arrive(bytes([number]) * 16) for number in range(1, 5)]
        for late in (3, 2, 1):
            self.assertIsNone(self.turns.try_take(tickets[late]))
        first, second = self.turns.try_take(tickets[0]), self.turns.try_take(tickets[1])
        self.assertEqual({first, second}, {0, 1})
        self.assertIsNone(self.turns.try_take(tickets[2]))
        self.turns.give_back(first)
        self.assertIsNone(self.turns.try_take(tickets[3]))
        self.assertEqual(self.turns.try_take(tickets[2]), first)

    def test_a_wait_for_a_turn_is_longer_once(self):
        told = []
        wait = Wait(0.0)
        wait.extend = told.append
        before = wait.left_s
        for _ in range(3):
            wait.extend_once()
        self.assertEqual(told, [passwords.EXTRA_S])
        self.assertAlmostEqual(wait.left_s - before, passwords.EXTRA_S, delta=5)

    def test_a_client_that_leaves_gives_its_place_up(self):
        class Gone(Wait):
            def pause(self, seconds):
                raise EOFError("left")
        taken = [self.turns.take(user, Wait()) for user in (ALICE, BOB)]
        self.assertRaises(EOFError, self.turns.take, CAROL, Gone())
        self.turns.give_back(taken[0])
        self.assertEqual(self.turns.take(ALICE, Wait()), taken[0])

    def test_needless_meanwhile(self):
        known = []

        class Learns(Wait):
            def pause(self, seconds):
                known.append(True)
        for user in (ALICE, BOB):
            self.turns.take(user, Wait())
        self.assertIsNone(self.turns.take(CAROL, Learns(), lambda: bool(known)))


@unittest.skipUnless(hasattr(os, "fork"), "several processes take fork")
class Processes(unittest.TestCase):
    def setUp(self):
        self.lock = Lock()
        self.lock.file = lock_file()
        self.addCleanup(self.lock.file.close)
        self.turns = Turns(self.lock)

    def child(self, does):
        """The pid of a forked process that does it, and stays until it is killed."""
        ready, done = os.pipe()
        pid = os.fork()
        if not pid:
            try:
                with contextlib.suppress(Exception):
                    does()
                    os.write(done, b"x")
                    signal.pause()
                os.write(done, b"!")
            finally:
                os._exit(1)
        self.assertEqual(os.read(ready, 1), b"x")
        os.close(ready)
        os.close(done)
        return pid

    def end(self, pid):
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)

    def test_two_at_a_time_in_all_and_a_killed_process_gives_them_back(self):
        pid = self.child(lambda: (self.turns.take(ALICE, Wait()), self.turns.take(BOB, Wait())))
        ticket = object()
        self.turns._queue[ticket] = CAROL
        self.assertIsNone(self.turns.try_take(ticket))
        self.end(pid)
        self.assertIsNotNone(self.turns.try_take(ticket))
        self.assertIsNotNone(self.turns.take(ALICE, Wait()), "nor does its user count as busy")

    def test_what_is_given_back_is_there_for_others_at_once(self):
        for turn in [self.turns.take(user, Wait()) for user in (ALICE, BOB)]:
            self.turns.give_back(turn)

        def take_both():
            with mock.patch.object(passwords, "EXTRA_S", 0.0):
                if None in [self.turns.take(user, Wait(0)) for user in (ALICE, BOB)]:
                    raise AssertionError("no turn")
        self.end(self.child(take_both))

    def test_one_for_a_user_in_all(self):
        pid = self.child(lambda: self.turns.take(ALICE, Wait()))
        alice, bob = object(), object()
        self.turns._queue.update({alice: ALICE, bob: BOB})
        self.assertIsNone(self.turns.try_take(alice))
        turn = self.turns.try_take(bob)
        self.assertIsNotNone(turn)
        self.turns.give_back(turn)
        self.end(pid)
        self.assertIsNotNone(self.turns.try_take(alice))

    def test_none_is_lost_when_two_processes_take_turns(self):
        """Eight threads in each of two processes: every one gets its ten turns."""
        failed = []

        def work():
            in_threads(8, self.take_some, iter(range(8)), failed)
        pid = os.fork()
        if not pid:
            work()
            os._exit(len(failed))
        work()
        self.assertEqual((os.waitpid(pid, 0)[1], failed), (0, []))
        self.assertEqual(self.turns._taken, {})
        for user in (ALICE, BOB):
            self.assertIsNotNone(self.turns.take(user, Wait()))

    def take_some(self, numbers, failed):
        number = next(numbers)
        for _ in range(10):
            turn = self.turns.take(bytes([number + 1]) * 16, Wait(PATIENCE_S))
            if turn is None:
                failed.append(number)
            else:
                self.turns.give_back(turn)
