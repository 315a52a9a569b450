"""acceptors.py: threads that wait in accept(), on real listeners."""
import contextlib
import socket
import threading
import unittest
from unittest import mock

from socks5.net import listeners, poller
from socks5.server import acceptors
from tests.support import PATIENCE_S, read_to_end, wait_until


@unittest.skipUnless(acceptors.available, "shutting a listener down wakes no thread here")
class Waiting(unittest.TestCase):
    def open(self):
        return listeners.open_one("127.0.0.1", 0, False, True)

    def setUp(self):
        self.listener = self.open()
        self.addCleanup(self.listener.close)
        self.listener.listen(64)
        self.go_on = threading.Event()
        self.served, self.uncovered, self.calls = [], [], 0
        self.acceptors = acceptors.Acceptors(self.accept_one)
        self.addCleanup(self.acceptors.release, 64)
        self.addCleanup(self.go_on.set)

    def accept_one(self, listener):
        covered = True
        self.calls += 1
        try:
            connection, _ = self.acceptors.here.listener.accept()
        except OSError:
            return
        finally:
            covered = self.acceptors.accepted(listener)
        with connection:
            self.served.append(self.acceptors.here.listener)
            if not covered:
                self.uncovered.append(True)
            if connection.recv(1) == b"w":
                self.go_on.wait(PATIENCE_S)
            connection.sendall(b"done")

    def waiting(self):
        return len(self.acceptors._waiting[self.listener])

    def client(self, first):
        client = socket.create_connection(self.listener.getsockname(), PATIENCE_S)
        client.sendall(first)
        return client

    def test_each_client_has_a_thread_however_many_are_busy(self):
        before = {*threading.enumerate()}
        self.acceptors.serve([self.listener])
        first = {*threading.enumerate()} - before
        self.acceptors.refill()
        with contextlib.ExitStack() as stack:
            busy = [stack.enter_context(self.client(b"w")) for _ in range(30)]
            with self.client(b"x") as quick:
                self.assertEqual(read_to_end(quick), b"done")
            self.go_on.set()
            for client in busy:
                self.assertEqual(read_to_end(client), b"done")
        self.assertEqual(self.served, [self.listener] * 31)
        most = acceptors.MAX_WAITING + acceptors.MAX_SPARE
        wait_until(lambda: acceptors.MAX_WAITING <= self.waiting() <= most, "the others ended")
        self.assertTrue(all(thread.is_alive() for thread in first), "what is new would hold a crowd's memory")
        self.assertIsNone(self.acceptors.here.listener, "this thread is none of them")

    def test_release_wakes_all_and_the_listener_still_listens(self):
        self.acceptors.serve([self.listener])
        for _ in range(4):
            self.assertTrue(self.acceptors.start(self.listener))
        address = self.listener.getsockname()
        self.acceptors.release(64)
        self.assertEqual(self.waiting(), 0)
        self.assertTrue(self.acceptors.start(self.listener), "none is needed, which is no failure")
        self.assertEqual(self.waiting(), 0)
        with socket.create_connection(address, PATIENCE_S) as later:
            later.sendall(b"x")
            self.acceptors.serve([self.listener])
            self.acceptors.refill()
            self.assertEqual(read_to_end(later), b"done")

    def test_a_thread_survives_want_of_memory(self):
        plain, self.fails = self.acceptors._accept_one, 3

        def accept_one(listener):
            plain(listener)
            if self.fails:
                self.fails -= 1
                raise MemoryError
        self.acceptors._accept_one = accept_one
        self.acceptors.serve([self.listener])
        with mock.patch.object(threading, "excepthook") as hook, mock.patch.object(acceptors, "REST_S", 0):
            self.acceptors.refill()
            for _ in range(10):
                with self.client(b"x") as client:
                    self.assertEqual(read_to_end(client), b"done")
            wait_until(lambda: not self.fails, "all three")
            hook.assert_not_called()

    @mock.patch.object(acceptors, "MAX_WAITING", 1)
    def test_a_thread_that_cannot_be_started(self):
        self.acceptors.serve([self.listener])
        self.acceptors.refill()
        wait_until(self.waiting)

        def cannot(*_):                             # a new error each time: its traceback keeps no frame alive
            raise RuntimeError("can't start new thread")

        with mock.patch.object(threading.Thread, "start", cannot):
            self.assertFalse(self.acceptors.start(self.listener))
            with self.client(b"x") as client:
                self.assertEqual(read_to_end(client), b"done")
            self.assertEqual(self.uncovered, [True])
        with self.client(b"x") as client:
            self.assertEqual(read_to_end(client), b"done")
        self.assertEqual(self.uncovered, [True])


class Shared(Waiting):
    """The same of a listener that another program has as well."""

    def open(self):
        return listeners.SharedListener(fileno=super().open().detach())

    def serve_one(self):
        """One client, while several threads wait."""
        self.acceptors.serve([self.listener])
        for _ in range(4):
            self.acceptors.start(self.listener)
        with self.client(b"x") as client:
            self.assertEqual(read_to_end(client), b"done")

    def test_a_client_after_the_release_is_for_the_next_server(self):
        """The queue is not reset, nor is anything taken from it."""
        with self.listener.dup() as next_server:
            self.serve_one()
            self.acceptors.release(64)
            self.assertEqual(self.waiting(), 0)
            served = len(self.served)
            with self.client(b"x") as early:
                self.acceptors.release(64)                  # another process of ours stops later
                next_server.settimeout(PATIENCE_S)
                with next_server.accept()[0] as connection:
                    connection.sendall(connection.recv(1))
                self.assertEqual(read_to_end(early), b"x")
            self.assertEqual(len(self.served), served)

    def test_they_do_not_ask_again_and_again_while_none_comes(self):
        self.serve_one()
        wait_until(lambda: self.waiting() >= 4, "all wait")
        before = self.calls
        threading.Event().wait(0.2)                         # one that spins asks thousands of times
        self.assertLessEqual(self.calls - before, 4)        # those that were about to, when the client had gone

    def test_by_poll(self):
        """Where epoll cannot wake one thread only, and where no descriptor is left for it."""
        for name, patch in (("none", mock.patch.object(poller, "EXCLUSIVE", 0)),
                            ("EMFILE", mock.patch("select.epoll", create=True, side_effect=OSError(24, "full")))):
            with self.subTest(name), patch:
                self.serve_one()
                self.acceptors.release(64)
                self.assertEqual(self.waiting(), 0)
