"""affinity.py: the threads of a worker share a CPU that no other worker has; that of a busy tunnel may run anywhere.
The relay loop does not interrupt others."""
import contextlib
import os
import threading
import unittest
from pathlib import Path
from unittest import mock

from socks5.net import affinity
from socks5.relay import loop, splice
from tests.support import children, connect_through, spawned, target, wait_until

CPUS = os.sched_getaffinity(0) if affinity.available else ()


def affinities(pid):
    """The CPUs of each thread of a process, the main thread first. Acceptors come and go."""
    found = []
    for thread in sorted(Path("/proc/%d/task" % pid).iterdir()):
        with contextlib.suppress(ProcessLookupError):
            found.append(os.sched_getaffinity(int(thread.name)))
    return found


def workers(server, count):
    """The affinities of each worker, when all have started."""
    wait_until(lambda: [len(affinities(pid)[0]) for pid in children(server.process.pid)] == count * [1],
               "%d workers with one CPU each" % count)
    return [affinities(pid) for pid in children(server.process.pid)]


@unittest.skipUnless(len(CPUS) > 1 and hasattr(os, "fork"), "needs sched_setaffinity(2), fork(2), a GIL and two CPUs")
class Affinity(unittest.TestCase):
    def test_each_worker_has_a_cpu_of_its_own_and_the_supervisor_all(self):
        with spawned("-w", "2") as server, target() as remote:
            connect_through(("127.0.0.1", server.port), *remote).close()
            first, second = workers(server, 2)
            self.assertEqual(os.sched_getaffinity(server.process.pid), CPUS)
        for cpus in first, second:
            self.assertEqual(cpus, cpus[:1] * len(cpus))
        self.assertNotEqual(first[0], second[0])

    def test_more_workers_than_cpus_start_again_with_the_first(self):
        count = len(CPUS) + 1
        with spawned("-w", str(count)) as server:
            self.assertEqual(set().union(*(cpus[0] for cpus in workers(server, count))), CPUS)

    def test_one_process_is_not_pinned(self):
        with spawned("-w", "1") as server, target() as remote, \
                connect_through(("127.0.0.1", server.port), *remote):
            found = affinities(server.process.pid)
        self.assertEqual(found, len(found) * [CPUS])

    @unittest.skipUnless(splice.available and loop.MANY, "needs splice(2) of Python 3.10, and poll(2)")
    def test_the_thread_of_a_busy_tunnel_runs_on_any_cpu(self):
        over = threading.Event()

        def pour(sock):
            while not over.is_set():
                sock.sendall(bytes(1 << 16))

        def drink(sock):
            while sock.recv(1 << 16):
                pass

        with spawned("-w", "2") as server, target(pour) as remote, \
                connect_through(("127.0.0.1", server.port), *remote) as tunnel:
            drinker = threading.Thread(target=drink, args=(tunnel,))
            drinker.start()
            try:
                wait_until(lambda: CPUS in [cpus for pid in children(server.process.pid) for cpus in affinities(pid)],
                           "a thread that may run anywhere")
            finally:
                over.set()
                drinker.join()


class Yield(unittest.TestCase):
    def test_where_the_system_can_and_where_not(self):
        with mock.patch.object(os, "sched_yield", create=True) as yielded:
            affinity.yield_cpu()
            yielded.assert_called_once_with()
            del os.sched_yield
            affinity.yield_cpu()


@unittest.skipUnless(hasattr(os, "SCHED_BATCH"), "needs SCHED_BATCH")
class Policy(unittest.TestCase):
    def test_the_relay_loop_lets_others_finish_and_acceptors_do_not(self):
        with spawned("-w", "1") as server, target() as remote, \
                connect_through(("127.0.0.1", server.port), *remote):
            folder = Path("/proc/%d/task" % server.process.pid)
            wait_until(lambda: sorted(os.sched_getscheduler(int(thread.name)) for thread in folder.iterdir())
                       == [os.SCHED_OTHER] * (len(list(folder.iterdir())) - 1) + [os.SCHED_BATCH])

    def test_another_policy_stays(self):
        with mock.patch.object(os, "sched_getscheduler", return_value=os.SCHED_FIFO), \
                mock.patch.object(os, "sched_setscheduler") as change:
            affinity.batch()
            affinity.unpin()
        change.assert_not_called()

    def test_a_system_that_forbids_it(self):
        with mock.patch.object(os, "sched_setscheduler", side_effect=PermissionError):
            affinity.batch()
        self.assertEqual(os.sched_getscheduler(0), os.SCHED_OTHER)

    def test_the_thread_of_a_busy_tunnel_is_an_ordinary_one(self):
        found = []

        def thread():
            affinity.batch()
            inner = threading.Thread(target=lambda: found.append(os.sched_getscheduler(0)) or affinity.unpin()
                                     or found.append(os.sched_getscheduler(0)))
            inner.start()
            inner.join()

        outer = threading.Thread(target=thread)
        outer.start()
        outer.join()
        self.assertEqual(found, [os.SCHED_BATCH, os.SCHED_OTHER])
