"""acceptors.py: threads that wait in accept(), on real listeners."""
import contextlib
import socket
import threading
import unittest
from unittest import mock

from socks5.net import listeners
from socks5.server import acceptors
from tests.support import PATIENCE_S, read_to_end, wait_until


@unittest.skipUnless(acceptors.available, "shutting a listener down wakes no thread here")
class Waiting(unittest.TestCase):
    def setUp(self):
        self.listener = listeners.open_one("127.0.0.1", 0, False, True)
        self.addCleanup(self.listener.close)
        self.listener.listen(64)
        self.go_on = threading.Event()
        self.served, self.uncovered = [], []
        self.acceptors = acceptors.Acceptors(self.accept_one)
        self.addCleanup(self.acceptors.release, 64)
        self.addCleanup(self.go_on.set)

    def accept_one(self):
        covered = True
        try:
            connection, _ = self.acceptors.listener().accept()
        except OSError:
            return
        finally:
            covered = self.acceptors.accepted()
        with connection:
            self.served.append(self.acceptors.listener())
            if not covered:
                self.uncovered.append(True)
            if connection.recv(1) == b"w":
                self.go_on.wait(PATIENCE_S)
            connection.sendall(b"done")

    def waiting(self):
        return self.acceptors._waiting[self.listener]

    def client(self, first):
        client = socket.create_connection(self.listener.getsockname(), PATIENCE_S)
        client.sendall(first)
        return client

    def test_each_client_has_a_thread_however_many_are_busy(self):
        self.acceptors.serve([self.listener])
        self.acceptors.refill()
        with contextlib.ExitStack() as stack:
            busy = [stack.enter_context(self.client(b"w")) for _ in range(30)]
            with self.client(b"x") as quick:
                self.assertEqual(read_to_end(quick), b"done")
            self.go_on.set()
            for client in busy:
                self.assertEqual(read_to_end(client), b"done")
        self.assertEqual(self.served, [self.listener] * 31)
        wait_until(lambda: 0 < self.waiting() <= acceptors.MAX_WAITING, "the others ended")
        self.assertIsNone(self.acceptors.listener(), "this thread is none of them")

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

        def accept_one():
            plain()
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

    def test_a_thread_that_cannot_be_started(self):
        self.acceptors.serve([self.listener])
        self.acceptors.refill()
        wait_until(self.waiting)
        with mock.patch.object(threading.Thread, "start", side_effect=RuntimeError("can't start new thread")):
            self.assertFalse(self.acceptors.start(self.listener))
            with self.client(b"x") as client:
                self.assertEqual(read_to_end(client), b"done")
            self.assertEqual(self.uncovered, [True])
        with self.client(b"x") as client:
            self.assertEqual(read_to_end(client), b"done")
        self.assertEqual(self.uncovered, [True])


if __name__ == "__main__":
    unittest.main()
