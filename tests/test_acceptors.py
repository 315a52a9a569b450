"""spares: threads that wait in accept(), on real listeners."""
import contextlib
import socket
import threading
import unittest
from unittest import mock

from socks5.net import listeners as listening

from socks5.server import acceptors as spares
from tests.support import PATIENCE_S, read_to_end, wait_until


@unittest.skipUnless(spares.available, "shutting a listener down wakes nobody here")
class Waiting(unittest.TestCase):
    def setUp(self):
        self.listener = listening.open_one("127.0.0.1", 0, False)
        self.addCleanup(self.listener.close)
        self.go_on = threading.Event()
        self.served, self.uncovered = [], []
        self.spares = spares.Spares([self.listener], self.accept_from)
        self.addCleanup(self.spares.release, 64)
        self.addCleanup(self.go_on.set)

    def accept_from(self, listener):
        covered = True
        try:
            connection, _ = listener.accept()
        except OSError:
            return
        finally:
            covered = self.spares.accepted(listener)
        with connection:
            self.served.append(self.spares.here())
            if not covered:
                self.uncovered.append(True)
            if connection.recv(1) == b"w":
                self.go_on.wait(PATIENCE_S)
            connection.sendall(b"done")

    def waiting(self):
        return self.spares._waiting[self.listener]

    def client(self, first):
        client = socket.create_connection(self.listener.getsockname(), PATIENCE_S)
        client.sendall(first)
        return client

    def test_each_client_has_a_thread_however_many_are_busy(self):
        self.spares.serve()
        self.spares.refill()
        with contextlib.ExitStack() as stack:
            busy = [stack.enter_context(self.client(b"w")) for _ in range(30)]
            with self.client(b"x") as quick:
                self.assertEqual(read_to_end(quick), b"done")
            self.go_on.set()
            for client in busy:
                self.assertEqual(read_to_end(client), b"done")
        self.assertEqual(self.served, [True] * 31)
        wait_until(lambda: 0 < self.waiting() <= spares.MOST, "the others ended")
        self.assertFalse(self.spares.here(), "this thread is none of them")

    def test_release_wakes_all_and_the_listener_still_listens(self):
        self.spares.serve()
        for _ in range(4):
            self.assertTrue(self.spares.start(self.listener))
        address = self.listener.getsockname()
        self.spares.release(64)
        self.assertEqual(self.waiting(), 0)
        self.assertTrue(self.spares.start(self.listener), "nobody is needed, which is no failure")
        self.assertEqual(self.waiting(), 0)
        with socket.create_connection(address, PATIENCE_S) as later:
            later.sendall(b"x")
            self.spares.serve()
            self.spares.refill()
            self.assertEqual(read_to_end(later), b"done")

    def test_a_thread_that_cannot_be_started(self):
        self.spares.serve()
        self.spares.refill()
        wait_until(self.waiting)
        with mock.patch.object(spares, "start_new_thread", side_effect=RuntimeError("can't start new thread")):
            self.assertFalse(self.spares.start(self.listener))
            with self.client(b"x") as client:
                self.assertEqual(read_to_end(client), b"done")
            self.assertEqual(self.uncovered, [True])
        with self.client(b"x") as client:
            self.assertEqual(read_to_end(client), b"done")
        self.assertEqual(self.uncovered, [True])


if __name__ == "__main__":
    unittest.main()
