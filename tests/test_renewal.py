"""renewal: a server that leaves its listeners to others, and loses nobody by it."""
import contextlib
import errno
import os
import signal
import threading
import unittest
from unittest import mock

import socks5
from socks5.net import listeners as listening
from socks5.process import renewal
from socks5.server import acceptors as spares
from tests.support import connect_through, reader_of, target, wait_until


@unittest.skipUnless(spares.available and hasattr(os, "fork"), "no server shares its listeners with others here")
class Leaving(unittest.TestCase):
    """Two servers on one port, as in two processes: each has descriptors of its own."""

    def setUp(self):
        before = signal.getsignal(signal.SIGURG)
        self.addCleanup(signal.signal, signal.SIGURG, before)
        self.listener = listening.open_one("127.0.0.1", 0, False)
        self.address = self.listener.getsockname()
        self.addCleanup(self.listener.close)
        self.first, self.second = self.serve(), self.serve()
        self.renewal = renewal.Renewal(self.first.server)

    def serve(self):
        server = socks5.Server(socks5.Config(), listeners=[self.listener.dup()])
        self.addCleanup(server.server_close)
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.server = server
        thread.start()
        self.addCleanup(server.shutdown)
        wait_until(lambda: sum(server._spares._waiting.values()), "somebody waits")
        return thread

    def test_nobody_who_connects_meanwhile_notices(self):
        served, failed, enough = [], [], threading.Event()

        def hammer(echo):
            while not enough.is_set():
                try:
                    with connect_through(self.address, *echo) as tunnel:
                        tunnel.sendall(b"ping")
                        served.append(reader_of(tunnel)(4) == b"ping")
                except (OSError, EOFError) as exc:
                    failed.append(exc)

        with target() as echo:
            hammers = [threading.Thread(target=hammer, args=(echo,), daemon=True) for _ in range(8)]
            for thread in hammers:
                thread.start()
            for _ in range(30):                                 # mostly somebody has just come, and then it stays
                before = len(served)
                self.first.server.leave()
                wait_until(lambda: len(served) > before + 3)
            enough.set()
            for thread in hammers:
                thread.join()
            wait_until(self.first.server.leave, "nobody is left")
            self.assertEqual(sum(self.first.server._spares._waiting.values()), 0)
            with connect_through(self.address, *echo):          # at the second
                pass
        self.assertEqual(failed, [])
        self.assertTrue(all(served))

    def test_it_ends_when_the_crowd_has_gone(self):
        self.first.server.chores.append(self.renewal.look)
        wait_until(self.second.server.leave)                    # the first has all the crowd
        with mock.patch.multiple(renewal, CROWD=5, EMPTY_S=0.0):
            with target() as echo, contextlib.ExitStack() as stack:
                for _ in range(5):
                    stack.enter_context(connect_through(self.address, *echo))
                self.assertFalse(self.renewal.leaving)
            self.first.join(20)
        self.assertFalse(self.first.is_alive())
        self.assertTrue(self.renewal.leaving)

    def test_a_few_are_no_crowd(self):
        wait_until(self.second.server.leave)
        with mock.patch.multiple(renewal, CROWD=5, EMPTY_S=0.0):
            with target() as echo, contextlib.ExitStack() as stack:
                for _ in range(4):
                    stack.enter_context(connect_through(self.address, *echo))
                self.renewal.look()
            wait_until(lambda: not len(self.first.server.sessions), "they have gone")
            for _ in range(3):
                self.renewal.look()
        self.assertEqual((self.first.server.sessions.peak, self.renewal.leaving), (4, False))

    def test_with_somebody_there_it_stays(self):
        wait_until(self.second.server.leave)
        with target() as echo:
            with connect_through(self.address, *echo) as tunnel:
                self.assertFalse(self.first.server.leave())
                for again in (tunnel, connect_through(self.address, *echo)):
                    with again:
                        again.sendall(b"ping")
                        self.assertEqual(reader_of(again)(4), b"ping")
            wait_until(self.first.server.leave, "nobody is left")

    def test_without_descriptors_it_stays(self):
        wait_until(self.second.server.leave)
        with mock.patch.object(listening.Listener, "dup", side_effect=OSError(errno.EMFILE, "")):
            self.assertFalse(self.first.server.leave())
        with target() as echo, connect_through(self.address, *echo) as tunnel:
            tunnel.sendall(b"ping")
            self.assertEqual(reader_of(tunnel)(4), b"ping")


if __name__ == "__main__":
    unittest.main()
