"""control.py, files.py and signals.py: what signals ask for, how often, in which order; files without descriptors."""
import contextlib
import errno
import io
import os
import signal
import subprocess
import sys
import unittest
from unittest import mock

from socks5.config import Config, ConfigError
from socks5.process import control, files, signals
from socks5.process.control import ABORT_S, OVERDUE_S, RELOAD_EVERY_S, Control
from socks5.process.files import Exhausted, Files
from socks5.process.orders import Order
from tests.support import PATIENCE_S, Case, run_python

HAS_MASK = hasattr(signal, "pthread_sigmask")
DRAIN_S = 30.0


class Recorded(Control):
    """Notes what it is told; `outcomes` are what reading the files gives, the last one for ever."""

    def __init__(self, *outcomes):
        super().__init__(Config(drain_timeout=DRAIN_S), "at the start")
        self.told, self.reads, self.sessions = [], 0, 0
        self.outcomes = list(outcomes)
        self.files.close()
        self.files = self

    def read(self):
        self.reads += 1
        outcome = self.outcomes.pop(0) if len(self.outcomes) > 1 else self.outcomes[0]
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    def tell(self, order):
        self.told.append(order)

    def live(self):
        return self.sessions

    def kill(self):
        self.told.append("kill")


class Obeying(Case):
    def setUp(self):
        self.now = 1000.0
        self.enter(mock.patch.object(control, "monotonic", lambda: self.now))

    def control(self, *outcomes):
        made = Recorded(*outcomes)
        self.addCleanup(made.signals.close)
        return made

    def at(self, made, seconds, *orders):
        """What is told when these orders come so many seconds after the start."""
        self.now = 1000.0 + seconds
        made.told.clear()
        made.end(set(orders))
        made.obey(set(orders))
        return made.told

    def test_stop_goes_before_reload(self):
        made = self.control("new")
        self.assertEqual(self.at(made, 0, Order.RELOAD, Order.STOP, Order.SESSIONS),
                         [Order.STOP, Order.RELOAD, Order.SESSIONS])

    def test_a_storm_of_reloads_is_a_handful_and_the_last_one_counts(self):
        made = self.control("new")
        for tick in range(2000):
            self.at(made, tick / 1000, Order.RELOAD)
        self.assertEqual(made.reads, 2)
        self.assertEqual(self.at(made, 2 + RELOAD_EVERY_S), [Order.RELOAD])
        self.assertEqual(self.at(made, 100), [])
        self.assertEqual(made.reads, 3)

    def test_a_bad_file_is_reported_once_and_the_old_stays(self):
        made = self.control(ConfigError("rules:1: bad"))
        with self.assertLogs("socks5", "ERROR") as logs:
            self.assertEqual(self.at(made, 0, Order.RELOAD), [])
            self.assertEqual(self.at(made, 100), [])
        self.assertEqual((made.access, made.reads, len(logs.output)), ("at the start", 1, 1))
        self.assertIn("not reloaded, users and rules stay as they were: rules:1: bad", logs.output[0])

    def test_a_reload_that_failed_for_want_of_resources_is_tried_again(self):
        made = self.control(Exhausted("too many open files"), Exhausted("too many open files"), "new")
        with self.assertLogs("socks5", "ERROR") as logs:
            self.assertEqual(self.at(made, 0, Order.RELOAD), [])
            self.assertEqual(self.at(made, RELOAD_EVERY_S), [])
            self.assertEqual(made.access, "at the start")
            self.assertEqual(self.at(made, 2 * RELOAD_EVERY_S), [Order.RELOAD])
        self.assertEqual((made.access, len(logs.output)), ("new", 1))
        self.assertEqual(self.at(made, 100), [])

    def test_a_reload_for_which_there_is_no_memory_is_in_force_nowhere(self):
        made = self.control("new")
        with mock.patch.object(made, "tell", side_effect=MemoryError), self.assertLogs("socks5", "ERROR"):
            self.at(made, 0, Order.RELOAD)
        self.assertEqual(made.access, "at the start")
        self.assertEqual(self.at(made, RELOAD_EVERY_S), [Order.RELOAD])
        self.assertEqual(made.access, "new")

    def test_want_of_memory_ends_nothing_and_no_order_is_lost(self):
        made = self.control("new")
        made.running, made.close = lambda: not made.told, lambda: None
        made.signals = mock.MagicMock()
        made.signals.wait.side_effect = [MemoryError(), {Order.STOP}]
        with mock.patch("socks5.protocol.memory.REST_S", 0):
            self.assertEqual(made.run(), 0)
        self.assertEqual(made.told, [Order.STOP])

    def test_a_bad_file_ends_the_tries(self):
        made = self.control(Exhausted("too many open files"), ConfigError("bad"))
        with self.assertLogs("socks5", "ERROR"):
            self.at(made, 0, Order.RELOAD)
            self.at(made, RELOAD_EVERY_S)
        self.at(made, 100)
        self.assertEqual(made.reads, 2)

    def test_what_is_overdue_beyond_the_drain_is_killed(self):
        made = self.control("new")
        self.assertEqual(self.at(made, 0, Order.STOP), [Order.STOP])
        self.assertEqual(self.at(made, DRAIN_S + OVERDUE_S - 0.1), [])
        self.assertEqual(self.at(made, DRAIN_S + OVERDUE_S), ["kill"])
        self.assertEqual(self.at(made, 1000), [])

    def test_a_second_stop_ends_it_at_once_and_a_third_delays_nothing(self):
        made = self.control("new")
        self.at(made, 0, Order.STOP)
        self.assertEqual(self.at(made, 1, Order.STOP), [Order.ABORT])
        self.assertEqual(self.at(made, 1.1, Order.STOP), [Order.ABORT])
        self.assertEqual(self.at(made, 1 + ABORT_S), ["kill"])

    def test_a_stop_says_for_what_it_waits(self):
        for sessions, words in ((1, ["up to 30 s for 1 session to end; a second Ctrl-C"]), (2, ["for 2 sessions "])):
            with self.subTest(sessions), self.assertLogs("socks5", "INFO") as logs:
                made = self.control("new")
                made.sessions = sessions
                self.at(made, 0, Order.STOP)
                self.at(made, 1, Order.STOP)
                self.assertEqual(len(logs.output), 1)
                self.assertIn(words[0], logs.output[0])

    def test_a_stop_that_waits_for_nothing_says_nothing(self):
        made = self.control("new")
        with self.assertLogs("socks5", "INFO") as logs:
            self.at(made, 0, Order.STOP)
            made.config = Config(drain_timeout=0.0)
            made.sessions, made.stops = 1, 0
            self.at(made, 0, Order.STOP)
            control.log.info("the end")
        self.assertEqual(len(logs.output), 1)

    def test_remarks_follow_a_reload_that_succeeds(self):
        made = self.control(ConfigError("bad"), "new")
        made.remarks = lambda access: ["%s: there is no user" % access]
        with self.assertLogs("socks5", "WARNING") as logs:
            self.at(made, 0, Order.RELOAD)
            self.at(made, 5, Order.RELOAD)
        self.assertEqual([record.getMessage() for record in logs.records],
                         ["not reloaded, users and rules stay as they were: bad", "new: there is no user"])


class Collecting(unittest.TestCase):
    def test_what_is_there_at_the_start_is_left_out_of_collections(self):
        code = '''
import gc
from socks5.config import Config
from socks5.process.control import GC_OBJECTS, Control

class Short(Control):
    def running(self):
        return False

before = gc.get_freeze_count()
Short(Config(), None).run()
assert gc.get_freeze_count() > before + 1000, (before, gc.get_freeze_count())
assert gc.get_threshold()[0] == GC_OBJECTS, gc.get_threshold()
'''
        self.assertEqual(run_python("-c", code), (0, "", ""))


class Reading(unittest.TestCase):
    def test_with_no_descriptor_left(self):
        """In a process of its own, which has opened all that it may."""
        code = """
import os, resource, sys, tempfile
from socks5.config import Config, ConfigError
from socks5.process.files import Files, read_access
with tempfile.TemporaryDirectory() as folder:
    config = Config(rules=os.path.join(folder, "rules"))
    with open(config.rules, "w") as file:
        file.write("deny to any\\n")
    files = Files(config)
    resource.setrlimit(resource.RLIMIT_NOFILE, (50, 50))
    held = []
    for _ in range(3):
        try:
            while True:
                held.append(os.open(os.devnull, os.O_RDONLY))
        except OSError:
            pass
        try:
            read_access(config)
            sys.exit("there was a descriptor")
        except ConfigError as exc:
            assert "Too many open files" in str(exc), exc
        assert len(files.read()[1]) == 1
    for fd in held:
        os.close(fd)
"""
        self.assertEqual(run_python("-c", code), (0, "", ""))

    def failing(self, exc):
        def read(_config):
            try:
                raise exc
            except OSError as caught:
                raise ConfigError("--rules x: %s" % caught.strerror) from None      # as users and rules do
        reader = Files(Config(), read)
        self.addCleanup(reader.close)
        return reader

    def test_options_that_run_as_cannot_read_again_do_not_hold_up_users_and_rules(self):
        def refused(reason):
            def read_config():
                try:
                    raise reason
                except OSError:
                    raise ConfigError("--config x: %s" % reason) from None
            return read_config

        before = files.read_access(Config())
        with self.assertLogs("socks5", "WARNING") as logs:
            users, rules = files.fresh_access(refused(PermissionError("Permission denied")), before)
        self.assertEqual((len(users.names), len(rules) > 0), (0, True))
        self.assertIn("--config x: Permission denied; its options stay as they were", logs.output[0])
        self.assertRaises(ConfigError, files.fresh_access, refused(FileNotFoundError("none")), before)

    def test_want_of_resources_is_told_from_bad_files(self):
        for number in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):
            with self.subTest(errno.errorcode[number]):
                self.assertRaises(Exhausted, self.failing(OSError(number, os.strerror(number))).read)
        for exc in (OSError(errno.ENOENT, "no such file"), ConfigError("rules:1: bad")):
            with self.subTest(repr(exc)):
                self.assertRaises(ConfigError, self.failing(exc).read)
        self.assertRaises(Exhausted, self.failing(MemoryError()).read)


@unittest.skipUnless(HAS_MASK, "no pthread_sigmask here")
class Waiting(unittest.TestCase):
    def setUp(self):
        numbers = [*signals.ORDERS, *signals.CHILD]
        handlers = {number: signal.getsignal(number) for number in numbers}
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, ())
        self.signals = signals.Signals()
        self.signals.__enter__()

        def as_it_was():
            self.signals.__exit__()
            self.signals.close()
            signals.release()                               # to handlers that only take note
            for number, handler in handlers.items():
                signal.signal(number, handler)
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)

        self.addCleanup(as_it_was)

    def raise_all(self, *numbers):
        for number in numbers:
            os.kill(os.getpid(), number)

    def test_what_came_while_held_is_told_at_the_next_wait_once(self):
        self.raise_all(*[signal.SIGHUP] * 100, signal.SIGTERM, signal.SIGUSR1)
        self.assertEqual(self.signals.wait(PATIENCE_S), {Order.STOP, Order.RELOAD, Order.SESSIONS})
        self.assertEqual(self.signals.wait(0), set())

    def test_both_stop_signals(self):
        for number in (signal.SIGTERM, signal.SIGINT):
            with self.subTest(number.name):
                self.raise_all(number)
                self.assertEqual(self.signals.wait(PATIENCE_S), {Order.STOP})

    def test_hangup_reloads_until_the_terminal_is_closed(self):
        ours, theirs = os.openpty()
        self.addCleanup(os.close, theirs)
        before = [os.dup(fd) for fd in range(3)]
        try:
            for fd in range(3):
                os.dup2(theirs, fd)
            self.signals._terminals = signals.terminals()
            self.raise_all(signal.SIGHUP)
            first = self.signals.wait(PATIENCE_S)
            os.close(ours)
            self.raise_all(signal.SIGHUP, signal.SIGUSR1)
            second = self.signals.wait(PATIENCE_S)
            self.raise_all(signal.SIGHUP)
            third = self.signals.wait(PATIENCE_S)
        finally:
            for fd, saved in enumerate(before):
                os.dup2(saved, fd)
                os.close(saved)
        self.assertEqual((first, second), ({Order.RELOAD}, {Order.STOP, Order.SESSIONS}))
        self.assertEqual(third, {Order.RELOAD}, "a second STOP would cut sessions")

    def test_a_child_that_ends_wakes_it(self):
        self.raise_all(signal.SIGCHLD)
        self.assertEqual(self.signals.wait(PATIENCE_S), set())

    def test_wake_and_a_full_socket(self):
        with contextlib.redirect_stderr(io.StringIO()) as err:
            for _ in range(5000):
                self.signals.wake()
            self.raise_all(signal.SIGTERM)
            self.assertEqual(self.signals.wait(PATIENCE_S), {Order.STOP})
        self.assertEqual(err.getvalue(), "", "a warning of Python")
        while True:                                         # until it is empty: then only wake() ends the wait
            try:
                self.signals.sockets[0].recv(4096)
            except BlockingIOError:
                break
        self.signals.wake()
        self.assertEqual(self.signals.wait(PATIENCE_S), set())

    def test_held_outside_of_wait(self):
        self.signals.wait(0)
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, ())
        self.assertLessEqual({*signals.ORDERS, *signals.CHILD}, blocked)

    def test_handlers_are_c_functions(self):
        """One written in Python is called within itself by the next signal, until there is a RecursionError."""
        for number in {*signals.ORDERS, *signals.CHILD}:
            self.assertFalse(hasattr(signal.getsignal(number), "__code__"))

    def test_under_a_flood_other_signals_are_seen(self):
        """Two processes that do nothing but send."""
        code = "import os, signal, sys\nwhile True: os.kill(int(sys.argv[1]), signal.SIGHUP)"
        floods = [subprocess.Popen([sys.executable, "-c", code, str(os.getpid())]) for _ in range(2)]
        try:
            for _ in range(300):
                self.assertEqual(self.signals.wait(PATIENCE_S) - {Order.RELOAD}, set())
            os.kill(os.getpid(), signal.SIGTERM)
            self.assertIn(Order.STOP, self.signals.wait(PATIENCE_S))
        finally:
            for flood in floods:
                flood.kill()
                flood.wait()
