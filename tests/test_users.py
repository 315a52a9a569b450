"""users.py and logins.py: which METHOD is chosen, and which logins are let in."""
import contextlib
import re
import socket
import threading
import unittest
from ipaddress import ip_address
from time import monotonic
from unittest import mock

from socks5.access import passwords, throttle
from socks5.access.logins import Logins, Verdict, origin_of
from socks5.access.passwords import Hash, Wait
from socks5.access.users import Users
from socks5.protocol.codes import Cmd, Method, Rep
from socks5.config import Config, ConfigError
from socks5.values import credentials
from socks5.net.addresses import subscriber
from socks5.protocol.messages import Greeting, Login, LoginStatus, Reply, Request, Selection
from tests import support
from tests.support import (PATIENCE_S, address, connect_through, dial, logging_of, read_to_end, reader_of,
                           readme_block, reset, running, spawned, target, users_line, wait_until)


def users(*pairs):
    return Users(Config(user=tuple(credentials(pair) for pair in pairs)))


class Check(unittest.TestCase):
    def test_without_users_no_login_is_right(self):
        none = users()
        self.assertFalse(none)
        for login in ((b"", b""), (b"a", b"b"), (b"a", b"")):
            with self.subTest(login):
                self.assertIs(none.check(*login), False)

    def test_right_and_wrong(self):
        known = users("alice:secret", "bob:b:o:b", "carol:x")
        self.assertTrue(known)
        for name, uname, passwd, right in (
                ("right", b"alice", b"secret", True),
                ("a colon in the password", b"bob", b"b:o:b", True),
                ("one byte", b"carol", b"x", True),
                ("another's password", b"alice", b"x", False),
                ("one letter less", b"alice", b"secre", False),
                ("one letter more", b"alice", b"secretx", False),
                ("a NUL behind it", b"alice", b"secret\0", False),
                ("other case", b"alice", b"SECRET", False),
                ("name in other case", b"Alice", b"secret", False),
                ("a NUL behind the name", b"alice\0", b"secret", False),
                ("empty password", b"alice", b"", False),
                ("empty name", b"", b"secret", False),
                ("nothing at all", b"", b"", False),
                ("unknown, empty password", b"mallory", b"", False),
                ("unknown", b"mallory", b"secret", False),
                ("both in the name", b"alice:secret", b"", False),
                ("255 bytes", b"a" * 255, b"b" * 255, False)):
            with self.subTest(name):
                self.assertIs(known.check(uname, passwd), right)

    def test_compared_as_bytes_whatever_their_encoding(self):
        known = users("j\u00fcrgen:\u20ac5", "raw\udcff:\udc80\udcfe")    # the last: foreign bytes from argv or environ
        for name, uname, passwd, right in (
                ("UTF-8", "j\u00fcrgen".encode(), "\u20ac5".encode(), True),
                ("Latin-1 is other bytes", "j\u00fcrgen".encode("latin-1"), "\u20ac5".encode(), False),
                ("decomposed is other bytes", "ju\u0308rgen".encode(), "\u20ac5".encode(), False),
                ("not UTF-8 at all", b"raw\xff", b"\x80\xfe", True)):
            with self.subTest(name):
                self.assertIs(known.check(uname, passwd), right)

    def test_an_empty_password_in_the_configuration_is_never_right(self):
        known = Users(Config(user=(("alice", ""), ("", "secret"))))       # past credentials(), as an embedder might
        self.assertTrue(known, "a password is asked for all the same")
        self.assertFalse(known.check(b"alice", b""))
        self.assertFalse(known.check(b"alice", b"x"))

    def test_secrets_do_not_show(self):
        self.assertNotIn("s3cret", repr(users("alice:s3cret")))


class FileCase(support.Case):
    """With a users file; the slow hash is made cheap, and counted."""

    def setUp(self):
        self.path = self.new_folder() / "users"
        self.derived = []
        derive = passwords.derive

        def counted(*args):
            self.derived.append(args[:2])
            return derive(*args)
        self.enter(mock.patch.object(passwords, "derive", counted))

    def write(self, *lines):
        self.path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return str(self.path)

    def line(self, name, password, cost=(2, 1, 1)):
        return "%s:%s" % (name, Hash.of(password, "scrypt", cost))

    def users(self, *lines, **options):
        users = Users(Config(users=self.write(*lines), **options))
        self.derived.clear()
        return users


class Files(FileCase):
    """What may stand in a file, and what a check costs."""

    def test_which_login_is_right(self):
        users = self.users("# people", "", self.line("alice", b"secret"), "  " + self.line("zo\u00eb", b"\xff:x") + " ",
                           user=(("carol", "c"),))
        self.assertTrue(users)
        self.assertEqual(users.names, [b"alice", b"carol", "zo\u00eb".encode()])
        for uname, passwd, right in ((b"alice", b"secret", True), (b"alice", b"Secret", False), (b"alice", b"", False),
                                     ("zo\u00eb".encode(), b"\xff:x", True), (b"zo\xeb", b"\xff:x", False),
                                     (b"carol", b"c", True), (b"carol", b"secret", False), (b"", b"secret", False),
                                     (b"mallory", b"secret", False)):
            for _ in range(2):
                with self.subTest((uname, passwd)):
                    self.assertIs(users.check(uname, passwd), right)

    def test_a_file_that_is_half_written(self):
        """Cut off anywhere in a line, it is an error: no hash is the beginning of another."""
        raw = "\n".join([self.line("al", b"x"), self.line("bob", b"y"), ""])
        for cut in range(len(raw) // 3, len(raw) + 1):
            self.path.write_text(raw[:cut], encoding="ascii")
            whole = raw[:cut].endswith("\n") or raw[cut:cut + 1] == "\n"
            with self.subTest(raw[:cut]), contextlib.nullcontext() if whole else self.assertRaises(ConfigError):
                Users(Config(users=str(self.path)))

    def test_mistakes(self):
        good = self.line("bob", b"x")
        for name, lines, why in (
                ("no colon", [good, "alice"], r":2: not NAME:HASH"),
                ("no name", [":" + good.partition(":")[2]], r":1: not NAME:HASH"),
                ("a long name", ["n" * 256 + good[3:]], r":1: not NAME:HASH with a name of 1 to 255 bytes"),
                ("a password", ["# comment", "", "bob:hunter2"], r":3: the part after the colon is not what --hash-"),
                ("a name twice", [good, "#", good], r":3: 'bob' is here for the second time"),
                ("damaged", [good, "al" + good[3:] + "*"], r":2: the hash is damaged"),
                ("no user", ["# none"], r"names no user")):
            with self.subTest(name), self.assertRaisesRegex(ConfigError, why) as caught:
                self.users(*lines)
            with self.subTest(name + ", said"):
                self.assertIn(str(self.path), str(caught.exception))
                self.assertNotIn("hunter2", str(caught.exception))
        with self.subTest("in both"), self.assertRaisesRegex(ConfigError, "--user: 'bob' is also in .*users"):
            self.users(good, user=(("bob", "y"),))

    def test_the_first_success_is_slow_and_the_others_are_not(self):
        users = self.users(self.line("bob", b"x"))
        for _ in range(100):
            self.assertTrue(users.check(b"bob", b"x"))
        self.assertEqual(len(self.derived), 1)
        self.assertFalse(users.check(b"bob", b"y"))
        self.assertFalse(users.check(b"bo", b"bx"), "name and password do not run together")
        self.assertEqual(len(self.derived), 3, "what is wrong is never remembered")

    def test_a_reload_forgets_what_has_changed_only(self):
        bob, al = self.line("bob", b"x"), self.line("al", b"y")
        with running(users=self.write(bob, al)) as server:
            self.derived.clear()
            self.assertTrue(server.users.check(b"bob", b"x"))
            self.assertTrue(server.users.check(b"al", b"y"))
            self.write("# a comment", self.line("bob", b"new"), al)
            self.derived.clear()
            self.assertTrue(server.reload())
            self.assertTrue(server.users.check(b"al", b"y"))
            self.assertEqual(len(self.derived), 0)
            self.assertFalse(server.users.check(b"bob", b"x"))
            self.assertTrue(server.users.check(b"bob", b"new"))
            self.assertEqual(len(self.derived), 2)
            self.write(bob)                                 # another user is gone, and the old line is back
            self.assertTrue(server.reload())
            self.assertFalse(server.users.check(b"al", b"y"))
            self.assertTrue(server.users.check(b"bob", b"x"))

    def test_a_reload_keeps_what_is_known_of_logins_where_no_password_is_needed(self):
        """There, security tokens are rate limited by it, in all processes."""
        before = Users(Config())
        self.assertIs(Users(Config(), before).logins, before.logins)

    def test_lines_that_another_process_has_read(self):
        users = self.users(self.line("bob", b"x"))
        self.path.unlink()
        again = Users(Config(users=str(self.path)), users, users.lines)
        self.assertTrue(again.check(b"bob", b"x"))
        self.assertRaises(ConfigError, Users, Config(users=str(self.path)), users, ["bob:x"])

    def test_an_unknown_name_costs_the_same(self):
        users = self.users(self.line("bob", b"x", (2, 1, 1)), self.line("al", b"y", (4, 1, 1)), user=(("plain", "p"),))
        for uname in (b"bob", b"al", b"nobody", b"plain"):
            with self.subTest(uname):
                self.derived.clear()
                self.assertFalse(users.check(uname, b"wrong"))
                self.assertEqual(len(self.derived), 1)
        costs = set()
        for number in range(64):
            self.derived.clear()
            for _ in range(2):
                users.check(b"nobody%d" % number, b"wrong")
            self.assertEqual(self.derived[0], self.derived[1], "always the same for one name")
            costs.add(self.derived[0][1])
        self.assertEqual(costs, {(2, 1, 1), (4, 1, 1)}, "no line's cost says that it is not there")

    def test_the_password_of_another_is_not_right_for_an_unknown_name(self):
        self.assertFalse(self.users(self.line("bob", b"x")).check(b"nobody", b"x"))


class Slowly(FileCase):
    """Checks that take as long as the test wants."""

    def setUp(self):
        super().setUp()
        self.go, self.lock, self.now, self.most = threading.Event(), threading.Lock(), 0, 0
        self.addCleanup(self.go.set)
        derive = passwords.derive

        def slow(*args):
            with self.lock:
                self.now += 1
                self.most = max(self.most, self.now)
            try:
                self.assertTrue(self.go.wait(PATIENCE_S))
                return derive(*args)
            finally:
                with self.lock:
                    self.now -= 1
        self.people = self.users(self.line("bob", b"x"), self.line("al", b"y"), self.line("dan", b"z"),
                                 user=(("carol", "c"),))
        self.assertTrue(self.people.check(b"al", b"y"))
        self.derived.clear()
        self.enter(mock.patch.object(passwords, "derive", slow))
        self.answers, self.threads = [], []

    def start(self, uname, passwd, people=None):
        people = people or self.people
        self.threads.append(threading.Thread(target=lambda: self.answers.append(people.check(uname, passwd))))
        self.threads[-1].start()

    def finish(self):
        self.go.set()
        for thread in self.threads:
            thread.join(PATIENCE_S)

    def test_two_at_a_time_one_for_a_user_and_what_is_known_does_not_wait(self):
        for number in range(4):
            self.start(b"bob", b"wrong%d" % number)
        wait_until(lambda: self.now == 1)
        for number in range(4):
            self.start(b"dan", b"wrong%d" % number)
        wait_until(lambda: self.now == 2)
        self.assertTrue(self.people.check(b"al", b"y"))             # in this thread: would hang
        self.assertTrue(self.people.check(b"carol", b"c"))
        self.start(b"bob", b"no", Users(Config(users=str(self.path)), self.people))     # as after a reload
        self.finish()
        self.assertEqual((self.most, self.answers), (2, [False] * 9))

    def test_the_same_at_once_is_one_check(self):
        for _ in range(30):
            self.start(b"bob", b"x")
        wait_until(lambda: self.now == 1)
        self.finish()
        self.assertEqual((self.most, self.answers, len(self.derived)), (1, [True] * 30, 1))

    def test_no_login_waits_longer_than_it_has_time(self):
        self.start(b"bob", b"1")
        self.start(b"dan", b"2")
        wait_until(lambda: self.now == 2)
        with mock.patch.object(passwords, "EXTRA_S", 0.0):
            self.assertIsNone(self.people.check(b"nobody", b"x", Wait(0.01)))
        self.finish()
        self.assertTrue(self.people.check(b"dan", b"z"))

    def test_a_check_that_fails_gives_its_turn_back(self):
        with mock.patch.object(passwords, "derive", side_effect=MemoryError):
            for _ in range(5):
                self.assertIsNone(self.people.check(b"bob", b"x"))
        with mock.patch.object(passwords, "derive", side_effect=ZeroDivisionError):
            for _ in range(5):
                self.assertRaises(ZeroDivisionError, self.people.check, b"bob", b"x")
        self.go.set()
        self.assertTrue(self.people.check(b"bob", b"x"))


# What README.rst tells fail2ban, whose <HOST> it has.
FAILREGEX = re.search(r"(?m)^failregex = (.*)$", readme_block("ini", "failregex")).group(1)
HOST = r"(?P<host>(?:\d{1,3}\.){3}\d{1,3}|[0-9a-fA-F:]*:[0-9a-fA-F:.]*)"


def offered(server_address, uname, passwd, source="127.0.0.1"):
    """A connection whose login is on its way."""
    client = dial(server_address, source=source)
    client.sendall(Greeting(bytes([Method.USERNAME_PASSWORD])).pack() + Login(uname, passwd).pack())
    return client


def status(client):
    """The STATUS that its login gets."""
    read = reader_of(client)
    Selection.parse(read)
    return LoginStatus.parse(read).status


def login(*args):
    with offered(*args) as client:
        return status(client)


class Guessing(unittest.TestCase):
    """The throttle, in force."""

    def test_14_wrong_ones_in_10_ms_lock_no_user_out(self):
        """Another user of the same address, and the same user, get one of the next looks, not the fifth."""
        with mock.patch.object(throttle, "INTERVAL_S", 1.5), running(
                user=(("bob", "x"), ("al", "y"))) as server, contextlib.ExitStack() as stack:
            where = server.server_address
            for client in [stack.enter_context(offered(where, b"bob", b"%d" % number, "127.0.0.%d" % (number + 1)))
                           for number in range(14)]:
                Selection.parse(reader_of(client))
            wait_until(lambda: len(server.sessions) <= 4, "ten were looked at, four wait")
            for name, uname, passwd in (("the same user", b"bob", b"x"), ("a known one", b"bob", b"x"),
                                        ("another", b"al", b"y")):
                with self.subTest(name):
                    begun = monotonic()
                    self.assertEqual(login(where, uname, passwd), 0)
                    self.assertLess(monotonic() - begun, 4 * throttle.INTERVAL_S)

    def test_what_is_not_looked_at_is_deferred_and_has_a_word_of_its_own(self):
        with mock.patch.multiple(throttle, BURST=1, INTERVAL_S=1000.0), running(
                user=(("bob", "x"),), handshake_timeout=1) as server, self.assertLogs("socks5", "WARNING") as logs:
            self.assertEqual(login(server.server_address, b"bob", b"1"), 1)
            with mock.patch.object(server.users, "check", side_effect=AssertionError("looked at")), \
                    offered(server.server_address, b"bob", b"x", "127.9.9.9") as client:
                wait_until(lambda: server.users.logins.throttle._pending, "it waits")
                client.sendall(b"\5")                           # what comes behind it does not cost it its answer
                self.assertEqual(status(client), 1)
        self.assertEqual([record.getMessage() for record in logs.records],
                         ["auth_failed client=127.0.0.1 user='bob'",
                          "auth_deferred client=127.9.9.9 user='bob' left_out=0"])

    def test_deferred_ones_cannot_flood_the_log(self):
        now = [0.0]
        made = Logins(lambda: now[0])
        said = [made.lines_left_out() for _ in range(1000)]
        self.assertEqual(said, [0] * 20 + [None] * 980)
        now[0] += 1
        self.assertEqual([made.lines_left_out(), made.lines_left_out()], [980, None])

    def test_a_password_that_is_known_is_news_when_there_are_failures_or_time_has_passed(self):
        now = [1000.0]
        made = Logins(lambda: now[0])

        def judged(uname, passwd, right):
            now[0] += 0.001
            return made.judge("192.0.2.1", uname, passwd, lambda *_: right, Wait(0))

        def all_looks_are_taken():
            for number in range(throttle.BURST):
                self.assertEqual(judged(b"bob", b"%d" % number, False), Verdict.WRONG)
            self.assertEqual(judged(b"al", b"y", True), Verdict.DEFERRED)

        self.assertEqual(judged(b"bob", b"x", True), Verdict.RIGHT)
        all_looks_are_taken()
        self.assertEqual(judged(b"bob", b"x", True), Verdict.RIGHT)
        self.assertEqual(judged(b"al", b"y", True), Verdict.RIGHT, "the failures are forgotten")
        for _ in range(3):                                  # known for a day since the last time
            now[0] += 0.9 * throttle.KNOWN_S
            self.assertEqual(judged(b"bob", b"x", True), Verdict.RIGHT)
        now[0] += 0.9 * throttle.KNOWN_S
        all_looks_are_taken()
        self.assertEqual(judged(b"bob", b"x", True), Verdict.RIGHT)

    def test_a_client_that_leaves_is_not_waited_for(self):
        for name, options, leave in (("reset", {}, reset), ("deadline", {"handshake_timeout": 1}, read_to_end)):
            with self.subTest(name), mock.patch.multiple(throttle, BURST=1, INTERVAL_S=1000.0), \
                    running(user=(("bob", "x"),), **options) as server:
                self.assertEqual(login(server.server_address, b"bob", b"1"), 1)
                client = offered(server.server_address, b"bob", b"y")
                wait_until(lambda: server.users.logins.throttle._pending)
                leave(client)
                wait_until(lambda: not len(server.sessions))
                self.assertEqual(server.users.logins.throttle._pending, {})
                client.close()

    def test_which_addresses_fail_together(self):
        for one, other, together in (("192.0.2.1", "192.0.2.1", True), ("192.0.2.1", "192.0.2.2", False),
                                     ("127.0.0.1", "127.255.0.9", True), ("127.0.0.1", "::1", True),
                                     ("2001:db8:0:1::1", "2001:db8:0:1:ffff::2", True),
                                     ("2001:db8:0:1::1", "2001:db8:0:2::1", False), ("::2", "0.0.0.2", False)):
            with self.subTest((one, other)):
                origins = [origin_of(ip_address(text), subscriber(ip_address(text))) for text in (one, other)]
                self.assertEqual(origins[0] == origins[1], together)


class Equal(unittest.TestCase):
    """The same login several times at once, as a browser does it."""

    class Wait(Wait):
        def __init__(self, seconds):
            super().__init__(seconds)
            self.paused = threading.Event()

        def pause(self, seconds):
            self.paused.set()
            super().pause(seconds)

    def judged(self, *others, right=True):
        """The verdicts of a first login, which is being checked, and of these others; how many checks there were."""
        made, checking, go, checks, verdicts = Logins(), threading.Event(), threading.Event(), [], {}

        def check(*_):
            checks.append(1)
            checking.set()
            return go.wait(PATIENCE_S) and right

        def judge(wait):
            verdicts[wait] = made.judge("192.0.2.1", b"bob", b"x", check, wait)

        waits = [self.Wait(PATIENCE_S), *others]
        threads = [threading.Thread(target=judge, args=(wait,), daemon=True) for wait in waits]
        for thread in threads:
            thread.start()
            self.assertTrue(checking.wait(PATIENCE_S))
        for wait in others:
            wait_until(lambda: wait.paused.is_set() or wait in verdicts)
        go.set()
        for thread in threads:
            thread.join(PATIENCE_S)
        return [verdicts.get(wait) for wait in waits], len(checks)

    def test_one_check_is_enough_for_all(self):
        for right, verdict in ((True, Verdict.RIGHT), (False, Verdict.WRONG)):
            with self.subTest(verdict.name):
                waits = [self.Wait(PATIENCE_S - 1) for _ in range(5)]
                self.assertEqual(self.judged(*waits, right=right), ([verdict] * 6, 1))

    def test_one_that_has_no_time_left_is_deferred(self):
        self.assertEqual(self.judged(self.Wait(0)), ([Verdict.RIGHT, Verdict.DEFERRED], 1))


class Many(support.Case):
    """200 users, each at an address of its own, log in at once."""

    USERS = 200

    def setUp(self):
        self.path = self.new_folder() / "users"
        self.write(self.USERS)

    def write(self, first_new):
        """All users; from `first_new` on with lines that are new."""
        lines = getattr(self, "lines", [])
        self.lines = lines[:first_new] + [users_line("u%d" % number, b"p%d" % number)
                                          for number in range(min(first_new, len(lines)), self.USERS)]
        self.path.write_text("\n".join(self.lines), encoding="ascii")

    def log_in(self, server):
        """The STATUS that each gets."""
        with contextlib.ExitStack() as stack:
            return list(map(status, [stack.enter_context(offered(
                server.server_address, b"u%d" % number, b"p%d" % number, "127.1.%d.1" % number))
                for number in range(self.USERS)]))

    def test_a_password_for_which_there_is_no_memory_was_not_looked_at(self):
        for error in (ValueError("[digital envelope routines] malloc failure"), MemoryError()):
            with self.subTest(error=error), running(users=str(self.path)) as server:
                for failing, wrong in ((mock.patch("hashlib.scrypt", side_effect=error), 1),
                                       (contextlib.nullcontext(), 0)):
                    with failing, logging_of(self) as logs:
                        self.assertEqual(login(server.server_address, b"u1", b"p1"), wrong)
                        wait_until(lambda: not len(server.sessions))
                    self.assertEqual([line.split()[1] for line in logs.output if "auth_" in line],
                                     ["auth_deferred"] * wrong)

    def test_all_are_let_in_at_the_start_and_after_a_reload(self):
        """The slow hash takes 20 ms here, and the handshake may take 1 s: half of what 200 hashes take."""
        derived, derive = [], passwords.derive

        def slow(*args):
            derived.append(args)
            threading.Event().wait(0.02)
            return derive(*args)
        with mock.patch.object(passwords, "derive", slow), \
                running(users=str(self.path), handshake_timeout=1) as server:
            self.assertEqual((self.log_in(server), len(derived)), ([0] * self.USERS, self.USERS))
            self.write(self.USERS - 1)
            derived.clear()
            self.assertTrue(server.reload())
            self.assertEqual((self.log_in(server), len(derived)), ([0] * self.USERS, 1))


class TheLogLine(unittest.TestCase):
    def banned(self, log):
        """What fail2ban would: the date is cut out, then the expression is matched."""
        regex = re.compile(FAILREGEX.replace("<HOST>", HOST))
        lines = (re.sub(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3}", "", line) for line in log)
        return [found.group("host") for found in map(regex.search, lines) if found]

    def test_fail2ban(self):
        forged = b"' 2030-01-01 00:00:00,000 WARNING auth_failed client=10.6.6.6 user='x"
        with target() as destination, spawned("-u", "bob:x") as server:
            where = ("127.0.0.1", server.port)
            connect_through(server.port, *destination, user=(b"bob", b"x")).close()
            names = (b"bob", b"it's", b'say "it\'s"', b"\r\n2030 WARNING auth_failed client=10.6.6.6 user='x'", forged,
                     b"\xff\xe2\x80\xa8", b"n" * 255)
            for number, name in enumerate(names):
                self.assertEqual(login(where, name, b"never shown", "127.0.7.%d" % number), 1)
            server.wait_line("session client=127.0.7.%d:" % (len(names) - 1))
            self.assertEqual(self.banned(server.log), ["127.0.7.%d" % number for number in range(len(names))])
            journal = ["host python3[7]: " + line.split(" ", 2)[2] for line in server.log]
            self.assertEqual(self.banned(journal), self.banned(server.log))
            self.assertIn("auth_failed client=127.0.7.0 user='bob'", "\n".join(server.log))
            self.assertNotIn("never shown", "\n".join(server.log))


def readme_example(word):
    """What the Python block of README.rst defines that has `word` in it."""
    names = {"__name__": "readme"}
    exec(readme_block("python", word), names)
    return names


class OtherMethods(unittest.TestCase):
    """A program that embeds the package brings a method of its own; README.rst shows it."""

    def test_a_private_one(self):
        by_token = readme_example("def by_token")["by_token"]
        with target() as destination, running(user=(("bob", "x"),)) as server, \
                self.assertLogs("socks5", "INFO") as logs:
            server.methods = {0x80: by_token, **server.methods}
            with self.subTest("right"), dial(server.server_address) as client:
                client.sendall(Greeting(b"\x02\x80").pack() + b"\x0aopensesame"
                               + Request(Cmd.CONNECT, address(*destination)).pack() + b"early")
                read = reader_of(client)
                self.assertEqual(read(3), b"\x05\x80\x01")
                self.assertEqual(Reply.parse(read).rep, Rep.SUCCEEDED)
                self.assertEqual(read(5), b"early")
                client.shutdown(socket.SHUT_WR)
                wait_until(lambda: logs.output)
                self.assertIn("user='alibaba' cmd=CONNECT", logs.output[0])
            with self.subTest("wrong"), dial(server.server_address) as client:
                client.sendall(Greeting(b"\x80").pack() + b"\x01x")
                self.assertEqual(read_to_end(client), b"\x05\x80\x00")
            with self.subTest("ours as before"):
                connect_through(server.server_address, *destination, user=(b"bob", b"x")).close()
            with self.subTest("none that is acceptable"), dial(server.server_address) as client:
                client.sendall(Greeting(b"\x00\x81").pack())
                self.assertEqual(read_to_end(client), b"\x05\xff")
