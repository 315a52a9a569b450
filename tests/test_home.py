"""home.py: real threads on real CPUs; what the rule for moving decides is fed with figures of the test's own."""
import contextlib
import os
import subprocess
import sys
import threading
import types
import unittest
from unittest import mock

from socks5.server import home

from socks5.relay import splice
from tests.support import PATIENCE_S, connect_through, spawned, target, wait_until

CHOICE = hasattr(os, "sched_setaffinity") and len(os.sched_getaffinity(0)) > 1
BURN = "import os, sys; os.sched_setaffinity(0, [int(sys.argv[1])]); print(flush=True)\nwhile True: pass"


def aside(function):
    """function() in a thread of its own, so that the tests' thread stays where it is; what it returns or raises."""
    outcome = []

    def run():
        try:
            outcome.append((function(), None))
        except BaseException as exc:
            outcome.append((None, exc))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(PATIENCE_S)
    result, error = outcome[0]
    if error:
        raise error
    return result


def here():
    """The CPUs of the calling thread."""
    return os.sched_getaffinity(0)


@unittest.skipUnless(CHOICE, "a single CPU, or no way to choose one")
class Affinity(unittest.TestCase):
    def test_a_home_and_all_that_is_started_there(self):
        def settle():
            ours = home.Home()
            ours.settle()
            return ours.cpu, here(), aside(here), aside(lambda: aside(here))

        before = here()
        cpu, own, child, grandchild = aside(settle)
        self.assertEqual([own, child, grandchild], [{cpu}] * 3)
        self.assertEqual(here(), before)                    # other threads are left alone

    def test_bulk_work_is_done_anywhere(self):
        def work():
            ours = home.Home()
            ours.settle()
            seen = []
            for bulk in (True, True, False, False):
                ours.on_bulk(bulk)
                seen.append(here())
            return {ours.cpu}, seen

        at_home, seen = aside(work)
        self.assertEqual(seen, [here(), here(), at_home, at_home])

    def test_several_processes_live_apart(self):
        cpus = sorted(here())
        self.assertEqual([home.Home(which).cpu for which in range(len(cpus) + 1)], cpus + cpus[:1])

    def test_a_cpu_that_is_taken_from_us(self):
        """Then we live where we may, and nobody is told."""
        def work():
            ours = home.Home()
            ours.cpu = 4000
            before = here()
            ours.settle()
            ours.on_bulk(False)
            return before, here()

        before, after = aside(work)
        self.assertEqual(before, after)

    def test_moving_takes_along_who_is_at_home(self):
        ours = home.Home()
        old, new = ours.everywhere[:2]
        barrier, leave = threading.Barrier(5), threading.Event()
        where = {}

        def stay(name, cpus):
            os.sched_setaffinity(0, cpus)
            where[name] = threading.get_native_id()
            barrier.wait(PATIENCE_S)
            leave.wait(PATIENCE_S)

        crew = {"one at home": [old], "another": [old], "in bulk": ours.everywhere, "elsewhere": [new]}
        crowd = [threading.Thread(target=stay, args=item, daemon=True) for item in crew.items()]
        for thread in crowd:
            thread.start()
        try:
            barrier.wait(PATIENCE_S)
            gone = threading.Thread(target=lambda: where.update(gone=threading.get_native_id()))
            gone.start()
            gone.join()
            wait_until(lambda: str(where["gone"]) not in os.listdir("/proc/self/task"))
            alive = os.listdir("/proc/self/task")
            # One of those that were listed has ended before its turn comes: first, so that all others come after it.
            with mock.patch.object(os, "listdir", return_value=[str(where["gone"]), *alive]):
                ours.move(new)
            found = {name: os.sched_getaffinity(where[name]) for name in crew}
        finally:
            leave.set()
        self.assertEqual(ours.cpu, new)
        self.assertEqual(found, {"one at home": {new}, "another": {new}, "in bulk": set(ours.everywhere),
                                 "elsewhere": {new}})
        for thread in crowd:
            thread.join(PATIENCE_S)

    @unittest.skipUnless(splice.available and home.has_gil(), "no bulk work, or no home")
    def test_a_server_and_its_sessions(self):
        """Sessions are at home, one that turns to bulk is not, and when it falls quiet it goes back."""
        go_on, more = threading.Event(), threading.Event()
        self.addCleanup(go_on.set)

        def pour(connection):
            while not go_on.is_set():
                connection.sendall(bytes(1 << 16))
            connection.sendall(b"\xff")
            more.wait(PATIENCE_S)

        with spawned() as server, target(pour) as destination, target() as echo:
            pid = server.process.pid
            everywhere = os.sched_getaffinity(0)

            def affinities():
                found = []
                for tid in os.listdir("/proc/%d/task" % pid):
                    with contextlib.suppress(OSError):      # it has ended
                        found.append(os.sched_getaffinity(int(tid)))
                return found

            def all_at_home():
                """On the same CPU; which one may change, when others make it crowded."""
                found = set(map(frozenset, affinities()))
                return len(found) == 1 and len(found.pop()) == 1

            with connect_through(server.port, *echo):
                wait_until(all_at_home)
            self.addCleanup(more.set)
            with connect_through(server.port, *destination) as client:
                wait_until(lambda: client.recv(1 << 16) and everywhere in affinities(), "a thread in bulk")
                go_on.set()
                while not client.recv(1 << 16).endswith(b"\xff"):
                    pass
                wait_until(all_at_home, "back at home")


class Needed(unittest.TestCase):
    @unittest.skipUnless(CHOICE, "a single CPU, or no way to choose one")
    def test_it_is(self):
        with mock.patch.object(home, "has_gil", return_value=True):
            self.assertTrue(home.needed())
            self.assertEqual(home.make(1).cpu, sorted(here())[1])

    @unittest.skipUnless(CHOICE, "a single CPU, or no way to choose one")
    def test_not_on_one_cpu(self):
        def alone():
            os.sched_setaffinity(0, [min(here())])
            return home.needed(), home.make()

        with mock.patch.object(home, "has_gil", return_value=True):
            self.assertEqual(aside(alone), (False, None))

    def test_not_where_there_is_no_gil(self):
        for gil in (True, False):
            with self.subTest("GIL: %s" % gil), \
                    mock.patch.object(sys, "_is_gil_enabled", lambda: gil, create=True):
                self.assertEqual(home.has_gil(), gil)
                self.assertEqual(home.needed(), gil and CHOICE)
                self.assertEqual(home.make() is None, not (gil and CHOICE))

    def test_before_python_3_13_there_is_one(self):
        with mock.patch.object(home, "sys", types.SimpleNamespace()):
            self.assertTrue(home.has_gil())

    def test_not_where_nobody_can_choose(self):
        with mock.patch.object(home, "os", types.SimpleNamespace()):
            self.assertFalse(home.needed())
            self.assertIsNone(home.make())


@unittest.skipUnless(hasattr(os, "sched_setaffinity"), "no way to choose a CPU")
class Rule(unittest.TestCase):
    """Three CPUs, and how busy they were in each second; `ours` is what this process burnt itself. At home on CPU 0."""

    CROWDED = (0.9, 0.8, 0.1)
    CASES = [
        ("twice crowded", [(CROWDED, 0.0)] * 2, [2]),
        ("once crowded", [(CROWDED, 0.0)], []),
        ("now and then", [(CROWDED, 0.0), ((0.2, 0.8, 0.1), 0.0)] * 3, []),
        ("it is we who are busy", [((1.0, 0.0, 0.0), 0.9)] * 5, []),
        ("both, and not enough of theirs", [((1.0, 0.0, 0.0), 0.75)] * 5, []),
        ("both, and enough", [((1.0, 0.3, 0.0), 0.5)] * 2, [2]),
        ("the others are no better", [((0.5, 0.4, 0.45), 0.0)] * 5, []),
        ("a little noise", [((0.25, 0.0, 0.0), 0.0)] * 5, []),
        ("and once more, where it is crowded now", [(CROWDED, 0.0)] * 2 + [((0.0, 0.7, 0.9), 0.0)] * 2, [2, 0]),
        ("moving starts the count anew", [(CROWDED, 0.0)] * 2 + [((0.0, 0.7, 0.9), 0.0)], [2]),
    ]

    def setUp(self):
        self.now, self.spent, self.burnt = 1000.0, {0: 50.0, 1: 60.0, 2: 70.0}, 5.0
        for name, function in (("monotonic", lambda: self.now), ("process_time", lambda: self.burnt),
                               ("busy_seconds", lambda: dict(self.spent))):
            patch = mock.patch.object(home, name, function)
            patch.start()
            self.addCleanup(patch.stop)

    def home(self):
        ours = home.Home()
        ours.cpu, ours.everywhere, moves = 0, [0, 1, 2], []

        def move(cpu):
            moves.append(cpu)
            ours.cpu = cpu

        ours.move = move
        return ours, moves

    def pass_time(self, seconds, busy, burnt):
        self.now += seconds
        self.burnt += burnt * seconds
        for cpu, share in enumerate(busy):
            self.spent[cpu] += share * seconds

    def test_each(self):
        for length in (1.0, 7.5):
            for name, seconds, expected in self.CASES:
                with self.subTest("%s, every %g s" % (name, length)):
                    ours, moves = self.home()
                    self.pass_time(length, (0, 0, 0), 0)
                    ours.look()                             # from here on it counts
                    for busy, burnt in seconds:
                        self.pass_time(length, busy, burnt)
                        ours.look()
                    self.assertEqual(moves, expected)

    def test_looking_more_often_changes_nothing(self):
        ours, moves = self.home()
        self.pass_time(1, (0, 0, 0), 0)
        ours.look()
        for _ in range(3):
            self.pass_time(0.3, self.CROWDED, 0)
            ours.look()
        self.assertEqual(moves, [])
        for _ in range(5):
            self.pass_time(0.3, self.CROWDED, 0)
            ours.look()
        self.assertEqual(moves, [2])

    def test_where_nobody_tells(self):
        ours, moves = self.home()
        self.spent.clear()
        for _ in range(4):
            self.now += 1
            ours.look()
        self.assertEqual(moves, [])

    def test_a_cpu_that_is_not_ours_is_no_choice(self):
        ours, moves = self.home()
        ours.everywhere = [0, 1]
        for busy in ((0, 0, 0), (0.9, 0.3, 0.0), (0.9, 0.3, 0.0)):
            self.pass_time(1, busy, 0)
            ours.look()
        self.assertEqual(moves, [1])


class BusySeconds(unittest.TestCase):
    @unittest.skipUnless(CHOICE and os.path.exists("/proc/stat"), "a single CPU, or no /proc/stat")
    def test_who_burns_a_cpu_is_seen_on_it(self):
        cpu = max(here())
        before = home.busy_seconds()
        self.assertLessEqual(here(), set(before))
        with subprocess.Popen([sys.executable, "-c", BURN, str(cpu)], stdout=subprocess.PIPE) as burner:
            try:
                burner.stdout.readline()
                wait_until(lambda: home.busy_seconds()[cpu] - before[cpu] >= 0.2)
            finally:
                burner.kill()

    @unittest.skipUnless(os.path.exists("/proc/stat"), "no /proc/stat")
    def test_idle_and_waiting_for_disks_are_not_busy(self):
        stat = (b"cpu  9 9 9 9 9 9 9 9 9 9\ncpu0 100 20 30 5000 600 7 8 9 50 60\ncpu11 0 0 0 100 0 0 0 0\n"
                b"intr 5\nbtime 7\n")
        ticks = os.sysconf("SC_CLK_TCK")
        with mock.patch.object(home, "open", mock.mock_open(read_data=stat), create=True):
            self.assertEqual(home.busy_seconds(), {0: 174 / ticks, 11: 0.0})

    def test_where_nobody_tells(self):
        for name, fake in (("no file", mock.Mock(side_effect=FileNotFoundError)),
                           ("another format", mock.mock_open(read_data=b"cpu0 a b c\n")),
                           ("no fields", mock.mock_open(read_data=b"cpu0\n")),
                           ("empty lines", mock.mock_open(read_data=b"\n"))):
            with self.subTest(name), mock.patch.object(home, "open", fake, create=True):
                self.assertEqual(home.busy_seconds(), {})


if __name__ == "__main__":
    unittest.main()
