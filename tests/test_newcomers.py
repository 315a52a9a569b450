"""server.py and the relay loop: clients that say nothing, while many others negotiate, cost no thread."""
import errno
import socket
import threading
from unittest import mock

from socks5.net import listeners
from socks5.protocol.codes import Cmd, Rep
from socks5.relay.loop import Loop, Watch
from socks5.server import newcomers, sessions
from socks5.server.handler import Handler
from tests import support
from tests.support import (ask, connect_through, dial, greeted, heard, logging_of, negotiate, reset, running, target,
                           threads, wait_until)

SILENT = 100                 # more than acceptors ever are


class Newcomers(support.Case):
    def setUp(self):
        # So that the silent ones reach accept() at once, not a second later.
        self.enter(mock.patch.object(listeners, "DEFER_ACCEPT_S", 0))
        self.enter(mock.patch.object(newcomers, "MANY_NEGOTIATING", -1))
        self.logs = self.enter(logging_of(self))
        self.echo = self.enter(target())

    def serve(self, handler=Handler, **options):
        self.server = self.enter(running(handler, **options))

    def come(self, count=SILENT, **options):
        """The clients of a new server (or of the one that there is), which wait in its relay loop."""
        if options or not hasattr(self, "server"):
            self.serve(**options)
        before = self.waiting()
        there = [self.enter(dial(self.server.server_address)) for _ in range(count)]
        wait_until(lambda: self.waiting() == before + count)
        return there

    def waiting(self):
        return sum(isinstance(watched, Watch) for watched in list(self.server.relay_loop()._watched.values()))

    def lines(self, text):
        return sum(text in line for line in self.logs.output)

    def all_gone(self):
        wait_until(lambda: not len(self.server.sessions))
        self.assertEqual(self.waiting(), 0)

    def test_they_cost_no_thread_and_are_served_when_they_speak(self):
        before = threads()
        silent = self.come()
        self.assertLess(threads() - before, SILENT)
        for client in silent:
            negotiate(client)
            self.assertEqual(ask(client, Cmd.CONNECT, *self.echo).rep, Rep.SUCCEEDED)
        self.assertEqual(self.waiting(), 0)

    def test_only_while_many_negotiate(self):
        served = []

        class Counted(Handler):
            def setup(self):
                super().setup()
                served.append(self)

        with mock.patch.object(newcomers, "MANY_NEGOTIATING", 10):
            self.serve(Counted)
            for _ in range(10):
                self.enter(dial(self.server.server_address))
            wait_until(lambda: len(served) == 10, "ten have a thread each")
            self.come(SILENT - 10)
            self.assertEqual(len(served), 10)

    def test_one_that_has_spoken_already_does_not_wait(self):
        with mock.patch.object(Loop, "watch", side_effect=AssertionError("it has spoken")):
            self.enter(mock.patch.object(listeners, "DEFER_ACCEPT_S", 1))
            self.serve()
            greeted(self.server.server_address).close()

    def test_one_that_leaves(self):
        self.serve()
        for number, leave in enumerate((socket.socket.close, reset), 1):
            for client in self.come():
                leave(client)
            self.all_gone()
            self.assertEqual(self.lines("ended=client why='client closed'"), number * SILENT)

    def test_the_deadline_holds(self):
        silent = self.come()
        self.server.sessions.handshake_s = 0.2                  # now that all are there, however long that took
        for client in silent:
            self.assertEqual(client.recv(1), b"")
        self.all_gone()
        self.assertEqual(self.lines("ended=handshake-timeout why=-"), SILENT)

    def test_over_the_limit_one_is_evicted(self):
        self.enter(mock.patch.object(sessions, "GRACE_S", 0.0))
        self.come(max_negotiating=SILENT, handshake_timeout=0)
        with connect_through(self.server.server_address, *self.echo):
            wait_until(lambda: self.lines("ended=evicted why=-") == 1)

    def test_the_end_of_the_server_is_theirs(self):
        silent = self.come()
        self.server.shutdown()
        self.server.server_close()
        for client in silent:
            self.assertEqual(client.recv(1), b"")
        self.assertEqual(self.lines("ended=server-stopped why=-"), SILENT)

    def test_a_hook_that_fails_costs_its_client_only(self):
        first, second, *_ = self.come()
        with mock.patch.object(self.server, "finish_request", side_effect=ZeroDivisionError):
            first.sendall(b"\5\1\0")
            self.assertEqual(heard(first), b"")
            wait_until(lambda: self.lines("ended=server why='a bug of the server'") == 1)
        negotiate(second)
        self.assertEqual(ask(second, Cmd.CONNECT, *self.echo).rep, Rep.SUCCEEDED)
        self.assertEqual(self.lines("ERROR bug while serving"), 1)

    def test_one_that_cannot_wait_there_gets_a_thread(self):
        for error in (OSError(errno.ENOSPC, "too many watches"), ValueError("I/O operation on closed epoll object")):
            with self.subTest(repr(error)), mock.patch.object(Loop, "watch", side_effect=error):
                self.serve()
                with dial(self.server.server_address) as client:
                    wait_until(lambda: len(self.server.sessions) == 1)
                    negotiate(client)
                    self.assertEqual(ask(client, Cmd.CONNECT, *self.echo).rep, Rep.SUCCEEDED)

    def test_no_thread_for_one_that_speaks(self):
        silent = self.come()
        with mock.patch.object(threading.Thread, "start", side_effect=RuntimeError("can't start new thread")):
            for client in silent:
                client.sendall(b"\5\1\0")
                self.assertEqual(heard(client), b"")
            self.all_gone()
        self.assertEqual((self.lines("WARNING refused client="), self.lines("ended=server ")), (1, SILENT))
