"""First of relay/busy.py: what it relays, when it stops, and that a Tunnel goes on there. In test_loop.py, the tests
of every driver run through it as well."""
import contextlib
import socket
import threading
import unittest
from unittest import mock

import socks5
from socks5.relay import busy
from socks5.relay.busy import FIRST_BYTES, FIRST_TURNS, First
from socks5.relay.tunnel import Tunnel
from socks5.server import handler as handler_module
from tests import support
from tests.support import PATIENCE_S, reset, running, target, wait_until
from tests.test_loop import fate, read_exactly, send_until_stuck, tcp_pair

RESET = ConnectionResetError(104, "Connection reset by peer")


class Failing:
    """A socket of which one call fails, as between poll() and that call it may."""

    def __init__(self, sock, call, error):
        self.sock = sock
        self.failing = call, error

    def __getattr__(self, name):
        call, error = self.failing
        return mock.Mock(side_effect=error) if name == call else getattr(self.sock, name)


@unittest.skipUnless(busy.FIRST_AVAILABLE, "neither MSG_DONTWAIT nor poll()")
class FirstTest(unittest.TestCase):
    def setUp(self):
        self.client, self.near_client = tcp_pair(8192)
        self.remote, self.near_remote = tcp_pair(8192)
        for sock in (self.client, self.near_client, self.remote, self.near_remote):
            self.addCleanup(sock.close)
        self.first = First(self.near_client, self.near_remote)

    def state(self):
        return self.first.up, self.first.down, self.first.ended_by, self.first.over

    def tunnel(self):
        """A Tunnel that goes on."""
        tunnel = Tunnel(self.near_client, self.near_remote)
        self.first.go_on(tunnel)
        return tunnel

    def test_a_short_connection(self):
        for begins, other in (("client", "remote"), ("remote", "client")):
            with self.subTest(begins + " closes first"):
                self.setUp()
                thread = threading.Thread(target=self.first.relay, daemon=True)
                with mock.patch.object(busy, "FIRST_MS", 1000 * PATIENCE_S):
                    thread.start()
                    self.client.sendall(b"ask")
                    self.assertEqual(read_exactly(self.remote, 3), b"ask")
                    self.remote.sendall(b"answer")
                    self.assertEqual(read_exactly(self.client, 6), b"answer")
                    early, late = getattr(self, begins), getattr(self, other)
                    early.shutdown(socket.SHUT_WR)
                    self.assertEqual(late.recv(1), b"")
                    late.sendall(b"more")
                    self.assertEqual(read_exactly(early, 4), b"more")
                    late.close()
                    thread.join(PATIENCE_S)
                up, down = (3, 10) if begins == "client" else (7, 6)
                self.assertEqual(self.state(), (up, down, begins, True))

    def test_it_stops_when_it_is_quiet(self):
        self.first.relay()
        self.assertEqual(self.state(), (0, 0, "", False))
        tunnel = self.tunnel()
        self.assertEqual((tunnel.ended, tunnel.moved(), tunnel.interest()), (False, (0, 0), (3, 3)))

    def test_a_half_closed_tunnel_goes_on(self):
        for begins in ("client", "remote"):
            with self.subTest(begins):
                self.setUp()
                getattr(self, begins).sendall(b"all")
                getattr(self, begins).shutdown(socket.SHUT_WR)
                self.first.relay()
                tunnel = self.tunnel()
                of_client = begins == "client"
                self.assertEqual(tunnel.moved(), (3, 0) if of_client else (0, 3))
                self.assertEqual((tunnel.ended_by, tunnel.state()), (begins, "half-closed"))
                self.assertEqual(tunnel.interest(), (0, 3) if of_client else (3, 0))

    def test_what_the_sink_does_not_take_is_in_the_hand_of_the_tunnel(self):
        for sender, sink, reader in ((self.client, self.near_remote, self.remote),
                                     (self.remote, self.near_client, self.client)):
            with self.subTest(sender is self.client):
                stuffed = send_until_stuck(sink)
                sink.setblocking(True)
                sender.sendall(b"held")
                self.first.relay()
                tunnel = self.tunnel()
                pipe = tunnel.up if sender is self.client else tunnel.down
                self.assertEqual((pipe.held, bytes(pipe.chunk), pipe.total), (4, b"held", 0))
                read_exactly(reader, stuffed)
                tunnel.handle(sink.fileno(), 4, 0)
                self.assertEqual((reader.recv(9), pipe.held, pipe.total), (b"held", 0, 4))

    def test_urgent_data_is_left_where_it_is(self):
        self.client.sendall(b"in front")
        self.first.relay()
        self.client.send(b"!", socket.MSG_OOB)
        self.first.relay()
        self.assertEqual(self.state(), (8, 0, "", False))
        self.assertEqual(self.near_client.recv(9), b"!")

    def test_after_a_full_read_it_stops(self):
        (client, near_client), (remote, near_remote) = tcp_pair(), tcp_pair()       # with room for so much
        for sock in (client, near_client, remote, near_remote):
            self.addCleanup(sock.close)
        first = First(near_client, near_remote)
        client.sendall(bytes(FIRST_BYTES + 1))
        wait_until(lambda: len(near_client.recv(FIRST_BYTES + 1, socket.MSG_PEEK)) > FIRST_BYTES, "all is there")
        first.relay()
        self.assertEqual(first.up, FIRST_BYTES)
        self.assertEqual(len(near_client.recv(9)), 1)

    def test_after_some_turns_it_stops(self):
        with mock.patch.object(busy, "FIRST_MS", 1000 * PATIENCE_S):
            thread = threading.Thread(target=self.first.relay, daemon=True)
            thread.start()
            for _ in range(FIRST_TURNS):
                self.client.sendall(b"x")
                self.assertEqual(self.remote.recv(2), b"x")
            thread.join(PATIENCE_S)
            self.assertFalse(thread.is_alive())
        self.assertEqual(self.state(), (FIRST_TURNS, 0, "", False))

    def test_a_reset_becomes_a_reset_of_the_other_side(self):
        for side, other in (("client", "remote"), ("remote", "client")):
            with self.subTest(side):
                self.setUp()
                reset(getattr(self, side))
                self.first.relay()
                self.assertEqual(self.state(), (0, 0, "", False))
                tunnel = self.tunnel()
                sock = getattr(self, "near_" + side)
                tunnel.handle(sock.fileno(), 0x19, 0)           # as poll() says: readable, error, hang-up
                self.assertEqual((tunnel.ended, tunnel.ended_by), (True, side))
                for near in (self.near_client, self.near_remote):
                    near.close()
                self.assertEqual(fate(getattr(self, other)), "reset")

    def test_a_reset_between_poll_and_the_call(self):
        for call, broken, other in (("recv", "client", "remote"), ("send", "remote", "client")):
            with self.subTest(call):
                self.setUp()
                near_client, near_remote = self.near_client, self.near_remote
                if call == "recv":
                    near_client = Failing(near_client, call, RESET)
                else:
                    near_remote = Failing(near_remote, call, RESET)
                self.first = First(near_client, near_remote)
                self.client.sendall(b"x")
                self.first.relay()
                tunnel = Tunnel(near_client, near_remote)
                self.first.go_on(tunnel)
                self.assertEqual((tunnel.ended, tunnel.ended_by, tunnel.why),
                                 (True, broken, broken + ": Connection reset by peer"))
                for near in (self.near_client, self.near_remote):
                    near.close()
                self.assertEqual(fate(getattr(self, other)), "reset")

    def test_readable_and_then_not(self):
        first = First(Failing(self.near_client, "recv", BlockingIOError()), self.near_remote)
        self.client.sendall(b"x")
        first.relay()
        self.assertEqual((first.up, first.broken, first.held), (0, None, b""))


@unittest.skipUnless(busy.FIRST_AVAILABLE, "neither MSG_DONTWAIT nor poll()")
class HandlerTest(unittest.TestCase):
    """When the handler relays the first moments, and what becomes of the session."""

    def test_a_short_connection_has_no_tunnel(self):
        sessions = []

        class Server(socks5.Server):
            def session_ended(self, session):
                sessions.append(session)
        with mock.patch.object(handler_module, "Tunnel") as tunnel, \
                mock.patch.object(busy, "FIRST_MS", 1000 * PATIENCE_S), \
                target() as destination, running(server_class=Server) as server:
            with support.connect_through(server.server_address, *destination) as sock:
                sock.sendall(b"echo")
                self.assertEqual(read_exactly(sock, 4), b"echo")
                self.assertEqual([session.state() for session in server.sessions], ["relaying"])
            wait_until(lambda: sessions, "the session is over")
        tunnel.assert_not_called()
        session, = sessions
        self.assertEqual((session.up, session.down, session.ended_by, session.why), (4, 4, "client", ""))

    def test_in_a_crowd_the_loop_has_it_at_once(self):
        with mock.patch.object(handler_module, "First", side_effect=AssertionError), \
                target() as destination, running() as server:
            crowd = [socket.create_connection(server.server_address) for _ in range(2)]
            for sock in crowd:
                sock.sendall(b"\x05")                       # or the system does not accept it
            wait_until(lambda: len(server.sessions.negotiating) == 2, "a crowd")
            with support.connect_through(server.server_address, *destination) as sock:
                sock.sendall(b"echo")
                self.assertEqual(read_exactly(sock, 4), b"echo")
            for sock in crowd:
                sock.close()

    def test_a_bug_resets_both_sides(self):
        def fails(first):
            first.client.send(b"half of it")
            raise MemoryError
        with mock.patch.object(First, "relay", fails), running() as server, \
                socket.create_server(("127.0.0.1", 0)) as listener:
            sock = support.connect_through(server.server_address, *listener.getsockname())
            with sock, listener.accept()[0] as remote:
                ends = fate(sock), fate(remote)
            wait_until(lambda: not len(server.sessions), "the session is over")
        self.assertEqual(ends, ("reset", "reset"))

    @contextlib.contextmanager
    def half_a_download(self):
        """A server and a session in its first moments. What is done in the block has to reset both sides."""
        with mock.patch.object(busy, "FIRST_MS", 200), running() as server, \
                socket.create_server(("127.0.0.1", 0)) as listener:
            sock = support.connect_through(server.server_address, *listener.getsockname())
            with sock, listener.accept()[0] as remote:
                remote.sendall(b"half of it")
                self.assertEqual(read_exactly(sock, 10), b"half of it")
                session, = server.sessions
                yield server, session
                self.assertEqual((fate(sock), fate(remote)), ("reset", "reset"))
            wait_until(lambda: not len(server.sessions), "the session is over")

    def test_no_memory_for_a_tunnel_resets_both_sides(self):
        with mock.patch.object(handler_module, "Tunnel", side_effect=MemoryError), self.half_a_download():
            pass

    def test_a_server_that_stops_resets_both_sides(self):
        """Or what has come of a download would look like all of it."""
        with self.half_a_download() as (server, session):
            server.sessions.abort("server stopped")
        self.assertEqual((session.ended_by, session.up, session.down), ("server stopped", 0, 10))

    def test_a_hand_over_that_fails_resets_both_sides(self):
        with self.half_a_download() as (server, session):
            server.relay_loop().stop("the loop is gone")
        self.assertEqual((session.ended_by, session.why, session.up, session.down),
                         ("server", "the loop is gone", 0, 10))


if __name__ == "__main__":
    unittest.main()
