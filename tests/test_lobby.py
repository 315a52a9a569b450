"""lobby.py: whoever says nothing costs no thread, and is served as soon as it speaks."""
import contextlib
import errno
import select
import socket
import threading
import unittest
from ipaddress import ip_address
from unittest import mock

from socks5.net import listeners as listening

from socks5.server import server, sessions
from socks5.protocol.codes import Cmd, Rep
from socks5.net.addresses import Endpoint
from socks5.server.handler import Handler
from tests.support import PATIENCE_S, ask, connect_through, dial, negotiate, reset, running, target, threads, wait_until

SILENT = 30


@unittest.skipUnless(hasattr(select, "epoll") and hasattr(socket, "TCP_DEFER_ACCEPT"), "a Linux thing")
class Lobby(unittest.TestCase):
    def setUp(self):
        self.stack = contextlib.ExitStack()
        self.addCleanup(self.stack.close)
        # So that the silent ones reach accept() at once, not a second later.
        self.stack.enter_context(mock.patch.object(listening, "DEFER_ACCEPT_S", 0))
        self.stack.enter_context(mock.patch.object(server, "CROWD", -1))
        self.logs = self.stack.enter_context(self.assertLogs("socks5", "INFO"))

    def crowd(self, **options):
        """The clients of a new server, all of them in its lobby."""
        self.server = self.stack.enter_context(running(**options))
        return self.come(SILENT)

    def come(self, count):
        before = len(self.server.lobby._there)
        there = [self.stack.enter_context(dial(self.server.server_address)) for _ in range(count)]
        wait_until(lambda: len(self.server.lobby._there) == before + count)         # admitted first, entered then
        return there

    def lines(self, text):
        return sum(text in line for line in self.logs.output)

    def test_they_cost_no_thread_and_are_served_when_they_speak(self):
        destination = self.stack.enter_context(target())
        before = threads()
        crowd = self.crowd()
        self.assertLess(threads() - before, SILENT)
        for client in crowd:
            negotiate(client)
            self.assertEqual(ask(client, Cmd.CONNECT, *destination).rep, Rep.SUCCEEDED)

    def test_only_in_a_crowd(self):
        served = []

        class Counted(Handler):
            def setup(self):
                super().setup()
                served.append(self)

        with mock.patch.object(server, "CROWD", 10):
            self.server = self.stack.enter_context(running(Counted))
            for _ in range(10):
                self.stack.enter_context(dial(self.server.server_address))
            wait_until(lambda: len(served) == 10, "ten have a thread each")
            self.come(SILENT - 10)
            self.assertEqual(len(served), 10)

    def test_who_leaves_is_gone(self):
        for leave in (socket.socket.close, reset):
            with self.subTest(leave.__name__):
                self.logs.output.clear()
                for client in self.crowd():
                    leave(client)
                wait_until(lambda: not len(self.server.sessions))
                self.assertEqual(self.lines("ended=client why='client closed'"), SILENT)

    def test_the_deadline_holds(self):
        crowd = self.crowd()
        self.server.sessions.handshake_s = 0.2                  # now that all are there, however long that took
        for client in crowd:
            self.assertEqual(client.recv(1), b"")
        wait_until(lambda: self.lines("ended=handshake-timeout why=-") == SILENT)

    def test_who_must_make_room_is_gone(self):
        self.stack.enter_context(mock.patch.object(sessions, "GRACE_S", 0.0))
        destination = self.stack.enter_context(target())
        self.crowd(max_sessions=SILENT, handshake_timeout=0)
        with connect_through(self.server.server_address, *destination):
            wait_until(lambda: self.lines("ended=crowded-out why=-") == 1)

    def test_a_hook_that_fails_is_nobody_elses_trouble(self):
        destination = self.stack.enter_context(target())
        first, second, *_ = self.crowd()
        with mock.patch.object(self.server, "process_request", side_effect=ZeroDivisionError):
            first.sendall(b"\5\1\0")
            with contextlib.suppress(ConnectionError):
                self.assertEqual(first.recv(1), b"")
        negotiate(second)
        self.assertEqual(ask(second, Cmd.CONNECT, *destination).rep, Rep.SUCCEEDED)
        self.assertEqual(self.lines("ERROR:socks5.server.server:bug while serving"), 1)

    def test_who_cannot_wait_here_gets_a_thread(self):
        destination = self.stack.enter_context(target())
        self.server = self.stack.enter_context(running())
        with dial(self.server.server_address) as first:
            negotiate(first)                                    # the loop has begun, with the lobby as it is
        wait_until(lambda: not len(self.server.sessions))
        full = mock.Mock(register=mock.Mock(side_effect=OSError(errno.ENOSPC, "too many watches")))
        with mock.patch.object(self.server.lobby, "_epoll", full), dial(self.server.server_address) as client:
            wait_until(lambda: len(self.server.sessions) == 1)
            negotiate(client)
            self.assertEqual(ask(client, Cmd.CONNECT, *destination).rep, Rep.SUCCEEDED)
        self.assertFalse(self.server.lobby._there)

    def test_the_end_of_the_server_is_theirs(self):
        crowd = self.crowd()
        self.server.shutdown()
        self.assertEqual(self.server.drain(PATIENCE_S), 0)
        for client in crowd:
            self.assertEqual(client.recv(1), b"")
        self.assertEqual(self.lines("ended=server-stopped why=-"), SILENT)

    def test_who_is_entering_ends_with_the_others(self):
        """Closed between the moment a newcomer is noted down and that of its registration."""
        self.crowd()
        lobby = self.server.lobby
        self.server.shutdown()

        def register(*_args):
            lobby.close()
            raise ValueError("I/O operation on closed epoll object")

        mine, far = map(self.stack.enter_context, socket.socketpair())
        self.server.sessions.admit(mine, Endpoint(ip_address("192.0.2.1"), 1))
        closed = mock.Mock(register=register, close=lobby._epoll.close)
        with mock.patch.object(lobby, "_epoll", closed):
            self.assertTrue(lobby.enter(mine, ("192.0.2.1", 1)))
        self.assertEqual(far.recv(1), b"")
        self.assertEqual(self.lines("ended=server-stopped why=-"), SILENT + 1)
        self.assertEqual(self.lines("ERROR"), 0)

    def test_no_thread_for_who_speaks(self):
        crowd = self.crowd()
        with mock.patch.object(threading.Thread, "start", side_effect=RuntimeError("can't start new thread")):
            for client in crowd:
                client.sendall(b"\5\1\0")
                with contextlib.suppress(ConnectionError):
                    self.assertEqual(client.recv(1), b"")
        wait_until(lambda: not len(self.server.sessions))
        self.assertEqual(self.lines("WARNING:socks5.server.server:refused client="), 1)


if __name__ == "__main__":
    unittest.main()
