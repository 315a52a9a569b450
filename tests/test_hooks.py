"""server.py: what socketserver promises to subclasses with hooks of their own, and session_ended; on real sockets."""
import contextlib
import errno
import functools
import os
import socket
import struct
import sys
import threading
import unittest
from unittest import mock

import socks5
from socks5 import client
from socks5.net import listeners
from socks5.protocol.codes import Cmd
from socks5.protocol.messages import Greeting, Request
from socks5.relay import busy, loop
from socks5.relay.tunnel import Tunnel
from socks5.server import acceptors, newcomers, sessions
from tests import support
from tests.support import (PATIENCE_S, address, connect_through, dial, echoes, heard, in_threads, logging_of,
                           read_to_end, reader_of, reset, running, served, target, wait_until)

NO_LOGIN = Greeting(b"\0").pack()
HOOKS = ("server_bind server_activate get_request verify_request process_request finish_request handle_error "
         "shutdown_request close_request service_actions session_ended").split()


class Case(support.Case):
    def setUp(self):
        self.echo = self.enter(target())


def wait_for(name, calls):
    wait_until(lambda: name in dict(calls), name)


def recording(calls):
    """A Server that notes which hooks were called, and by the thread of which name."""
    class Recording(socks5.Server):
        pass

    def overridden(name):
        def hook(self, *args):
            result = getattr(super(Recording, self), name)(*args)
            calls.append((name, threading.current_thread().name))
            return result
        return hook

    for name in HOOKS:
        setattr(Recording, name, overridden(name))
    return Recording


class Hooks(Case):
    def test_each_is_called_once_and_in_its_thread(self):
        calls = []
        with running(server_class=recording(calls)) as server:
            with connect_through(server.server_address, *self.echo) as tunnel:
                self.assertTrue(echoes(tunnel))
                if loop.MANY:                                    # else the acceptor relays it to its end
                    wait_for("shutdown_request", calls)
                self.assertNotIn("close_request", dict(calls), "the session is not over")
            wait_for("session_ended", calls)
            wait_for("service_actions", calls)
        called = [name for name, _thread in calls if name != "service_actions"]
        self.assertEqual(sorted(called), sorted(set(HOOKS) - {"handle_error", "service_actions"}))
        if loop.MANY:
            self.assertEqual(called.index("session_ended"), len(called) - 1)
        threads = dict(calls)
        main = threading.current_thread().name
        self.assertEqual([threads[name] for name in ("server_bind", "server_activate", "close_request",
                                                     "session_ended")],
                         [main, main, "relay loop" if loop.MANY else threads["get_request"], "session_ended"])
        if acceptors.available:
            self.assertEqual({threads[name] for name in ("get_request", "verify_request", "process_request",
                                                         "finish_request", "shutdown_request")}, {"acceptor"})

    def test_each_is_called_once_for_a_tunnel_that_its_own_thread_relays_to_the_end(self):
        for many in (True, False):
            with self.subTest(many=many), mock.patch.object(loop, "MANY", many):
                calls = []
                with running(server_class=recording(calls)) as server:
                    with dial(server.server_address) as sock:
                        sock.sendall(Greeting(b"\0").pack() + Request(Cmd.CONNECT, address(*self.echo)).pack() + b"all")
                        sock.shutdown(socket.SHUT_WR)
                        self.assertTrue(read_to_end(sock).endswith(b"all"))
                    wait_for("session_ended", calls)
                called = [name for name, _thread in calls if name != "service_actions"]
                self.assertEqual(sorted(called), sorted(set(HOOKS) - {"handle_error", "service_actions"}))

    def test_a_bug_in_a_handler(self):
        calls, seen = [], []

        class Buggy(socks5.Handler):
            def handle(self):
                raise ZeroDivisionError

        class Server(recording(calls)):
            def handle_error(self, request, client_address):
                super().handle_error(request, client_address)
                seen.append((sys.exc_info()[0], client_address))

        with running(Buggy, Server) as server, dial(server.server_address) as sock, \
                self.assertLogs("socks5", "ERROR") as logs:
            self.assertEqual(heard(sock, b"x"), b"")
            here = sock.getsockname()
            wait_for("session_ended", calls)
        self.assertEqual(seen, [(ZeroDivisionError, here)])
        self.assertRegex(logs.output[0], r"bug while serving 127\.0\.0\.1:%d\n(?s:.*)ZeroDivisionError" % here[1])
        for name in ("handle_error", "shutdown_request", "close_request", "session_ended"):
            self.assertEqual([called for called, _thread in calls].count(name), 1, name)

    def test_a_hook_that_fails_costs_its_client_only(self):
        for name in ("verify_request", "process_request", "finish_request"):
            errors = []

            def fail(self, *args, name=name):
                if not errors:
                    raise ValueError("a bug")
                return getattr(socks5.Server, name)(self, *args)

            hooks = {name: fail, "handle_error": lambda *_args: errors.append(sys.exc_info()[0])}
            with self.subTest(name), running(server_class=type("Buggy", (socks5.Server,), hooks)) as server:
                with dial(server.server_address) as sock:
                    self.assertEqual(heard(sock, NO_LOGIN), b"")
                self.check_serves(server.server_address, self.echo)
                self.assertEqual(errors, [ValueError])
                wait_until(lambda: not len(server.sessions))

    def test_a_hook_that_fails_when_the_session_is_there_leaves_none(self):
        class Server(socks5.Server):
            def process_request(self, request, client_address):
                self.session_of(request, client_address)
                raise KeyError("bug")

        with running(server_class=Server) as server, self.assertLogs("socks5", "ERROR"), \
                dial(server.server_address) as client:
            client.sendall(b"\5")
            self.assertEqual(heard(client), b"")
            wait_until(lambda: not len(server.sessions))

    def test_close_request_that_fails_leaves_no_session(self):
        class Server(socks5.Server):
            def close_request(self, request):
                super().close_request(request)
                raise KeyError("bug")

        for name, act in (("tunnel", lambda server: connect_through(server.server_address, *self.echo).close()),
                          ("none", lambda server: dial(server.server_address).close())):
            with self.subTest(name), running(server_class=Server) as server, self.assertLogs("socks5", "ERROR") as logs:
                act(server)
                wait_until(lambda: logs.output)
                wait_until(lambda: not len(server.sessions))

    def test_get_request_may_wrap_the_socket_and_fail(self):
        class Wrapped(socket.socket):
            pass

        troubles = [OSError(errno.ECONNABORTED, "gone")]

        class Server(socks5.Server):
            def get_request(self):
                request, client_address = super().get_request()
                if troubles:
                    trouble = troubles.pop()                # before the client can notice, and the next one comes
                    request.close()
                    raise trouble
                return Wrapped(fileno=request.detach()), client_address

        with running(server_class=Server) as server:
            with dial(server.server_address) as sock:
                self.assertEqual(heard(sock, NO_LOGIN), b"")
            with connect_through(server.server_address, *self.echo) as tunnel:
                self.assertTrue(echoes(tunnel))
                self.assertEqual([type(session.sock) for session in server.sessions], [Wrapped])

    def test_listening(self):
        """request_queue_size, allow_reuse_address, server_bind and server_activate hold for the real socket."""
        class Server(socks5.Server):
            request_queue_size = 7
            allow_reuse_address = False

            def server_bind(self):
                super().server_bind()
                self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 5000)

        for later in (False, True):
            with self.subTest(later=later), Server(socks5.Config(port=0), bind_and_activate=not later) as server:
                if later:
                    self.assertEqual(server.listeners, [])
                    server.server_bind()
                    self.assertRaises(ConnectionRefusedError, dial, server.server_address)
                    server.server_activate()
                self.assertFalse(server.socket.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR))
                self.assertLess(server.socket.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF), 20000)
                if sys.platform == "linux":                     # of a listener, tcpi_sacked is the backlog
                    info = server.socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 32)
                    self.assertEqual(struct.unpack_from("I", info, 28), (7,))
                with served(server), connect_through(server.server_address, *self.echo) as tunnel:
                    self.assertTrue(echoes(tunnel))

    def test_handle_request(self):
        """One connection, without serve_forever; and not for longer than `timeout`."""
        calls = []
        server = self.enter(recording(calls)(socks5.Config(port=0)))
        with dial(server.server_address) as tunnel:
            tunnel.sendall(NO_LOGIN + Request(Cmd.CONNECT, address(*self.echo)).pack())
            server.handle_request()
            self.assertEqual(reader_of(tunnel)(12)[:4], b"\5\0\5\0")
            self.assertTrue(echoes(tunnel))
        wait_for("session_ended", calls)
        self.assertNotIn("service_actions", dict(calls))
        server.timeout = 0.05
        with mock.patch.object(server, "handle_timeout") as handle_timeout:
            server.handle_request()
        self.assertEqual(handle_timeout.call_count, 1)

    def test_rfile_and_wfile_before_the_greeting(self):
        """What rfile has read ahead is the handler's, then the tunnel's."""
        class Handler(socks5.Handler):
            def handle(self):
                self.wfile.write(b"you said " + self.rfile.readline())
                super().handle()

        with running(functools.partial(Handler)) as server, dial(server.server_address) as tunnel:
            tunnel.sendall(b"hello\r\n" + NO_LOGIN + Request(Cmd.CONNECT, address(*self.echo)).pack() + b"payload")
            read = reader_of(tunnel)
            self.assertEqual((read(16), read(12)[:4], read(7)), (b"you said hello\r\n", b"\5\0\5\0", b"payload"))

    def test_timeout_of_a_handler(self):
        """Of a single recv(), and not of the tunnel."""
        class Handler(socks5.Handler):
            timeout = 1

        class ByHook(socks5.Handler):
            def setup(self):
                super().setup()
                self.connection.settimeout(1)

        for handler in (Handler, ByHook):
            with self.subTest(handler), running(handler, handshake_timeout=0) as server, logging_of(self) as logs:
                with connect_through(server.server_address, *self.echo) as tunnel, dial(server.server_address) as slow:
                    slow.sendall(NO_LOGIN[:1])
                    self.assertEqual(slow.recv(1), b"")
                    wait_until(lambda: len(server.sessions) == 1)
                    self.assertIn("ended=client why='timed out'", logs.output[-1])
                    session, = server.sessions
                    self.assertIn(session.sock.gettimeout(), (None, 0))
                    self.assertTrue(echoes(tunnel))

    def test_closing_twice_is_harmless(self):
        server = self.enter(running())
        with connect_through(server.server_address, *self.echo) as tunnel:
            wait_until(lambda: [isinstance(session.relay, Tunnel) for session in server.sessions] == [True])
            session, = server.sessions
            server.shutdown_request(session.sock)               # as socketserver does when the handler has ended
            self.assertTrue(echoes(tunnel))
        wait_until(lambda: not len(server.sessions))
        for close in (server.shutdown_request, server.close_request, server.shutdown_request):
            close(session.sock)
        server.end_session(session)
        server.shutdown()
        server.server_close()
        server.server_close()

    def test_one_that_is_accepted_while_the_server_closes(self):
        accepted, go_on = threading.Event(), threading.Event()

        class Slow(socks5.Server):
            def get_request(self):
                request = super().get_request()
                accepted.set()
                go_on.wait(PATIENCE_S)
                return request

        with running(server_class=Slow) as server:
            client = self.enter(dial(server.server_address))
            client.sendall(NO_LOGIN[:1])
            self.assertTrue(accepted.wait(PATIENCE_S))
        go_on.set()
        self.assertEqual(heard(client), b"")
        self.assertEqual(len(server.sessions), 0)

    @unittest.skipUnless(hasattr(os, "fork"), "no fork here")
    def test_a_server_that_was_made_before_a_fork(self):
        support.need(self, sys.platform == "linux", "fork and /proc")
        script = """
import os, signal, threading
import socks5
from tests.support import connect_through, reader_of, target
server = socks5.Server(socks5.Config(port=0))
assert threading.active_count() == 1, threading.enumerate()
opened = [os.readlink("/proc/self/fd/%d" % fd) for fd in range(3, 50) if os.path.exists("/proc/self/fd/%d" % fd)]
assert not any("eventpoll" in link for link in opened), opened
pid = os.fork()
if not pid:
    signal.alarm(60)
    server.serve_forever()
where = server.server_address
server.server_close()
with target() as echo:
    for _ in range(3):
        with connect_through(where, *echo) as tunnel:
            tunnel.sendall(b"ping")
            assert reader_of(tunnel)(4) == b"ping"
os.kill(pid, signal.SIGKILL)
os.waitpid(pid, 0)
"""
        self.succeeds(script)

    @unittest.skipUnless(hasattr(os, "fork"), "no fork here")
    def test_a_fork_when_the_relay_loop_runs_already(self):
        """The child has a loop of its own, and the parent's goes on."""
        support.need(self, sys.platform == "linux", "fork and /proc")
        self.succeeds("""
import os, signal, threading
import socks5
from tests.support import connect_through, echoes, target
with socks5.Server(socks5.Config(port=0)) as server, target() as echo:
    where = server.server_address
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    with connect_through(where, *echo) as before:
        assert echoes(before)
        server.shutdown()
        thread.join()
        pid = os.fork()
        if not pid:
            signal.alarm(60)                            # also when the parent fails
            server.serve_forever()
        with connect_through(where, *echo) as tunnel:
            assert echoes(tunnel)
        assert echoes(before)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        assert echoes(before)
""")

    def succeeds(self, script):
        ignore = "ignore::DeprecationWarning"               # of a fork beside threads
        self.assertEqual(support.run_python("-W", ignore, "-c", script), (0, "", ""))


class SessionEnded(Case):
    """session_ended: once for each session that was admitted, however it ended, when its facts are final."""

    def ended(self, act, handler=socks5.Handler, **options):
        """The sessions for which it was called while act(server) ran, and by the server's end."""
        found = []

        class Noting(socks5.Server):
            def session_ended(self, session):
                found.append((session, dict(session.facts()), session.sock.fileno()))

        with logging_of(self) as logs, running(handler, Noting, **options) as server:
            act(server)
        lines = [dict(record.args) for record in logs.records if record.msg.startswith("session ")]
        self.assertEqual(sorted([facts for _session, facts, _fd in found], key=repr), sorted(lines, key=repr))
        for session, facts, fd in found:
            self.assertEqual((dict(session.facts()), fd), (facts, -1))
        return [session for session, *_rest in found]

    def check(self, name, by, act, handler=socks5.Handler, count=1, **options):
        with self.subTest(name):
            self.assertEqual([session.ended_by for session in self.ended(act, handler, **options)], [by] * count)

    def tunnel(self, end):
        def act(server):
            with connect_through(server.server_address, *self.echo) as tunnel:
                self.assertTrue(echoes(tunnel))
                end(tunnel)
                wait_until(lambda: not len(server.sessions))
        return act

    def test_tunnels(self):
        self.check("client", "client", self.tunnel(lambda tunnel: tunnel.close()))
        self.check("reset", "client", self.tunnel(reset))
        self.check("idle", "idle", self.tunnel(lambda tunnel: None), idle_timeout=1)
        with target(lambda sock: sock.recv(1)) as destination:
            def act(server):
                with connect_through(server.server_address, *destination) as tunnel:
                    tunnel.sendall(b"x")
                    self.assertEqual(tunnel.recv(1), b"")
                wait_until(lambda: not len(server.sessions))
            self.check("remote", "remote", act)

        def stays(server):
            self.enter(connect_through(server.server_address, *self.echo))
            wait_until(lambda: any(session.relay for session in server.sessions))
        self.check("server_close", "server stopped", stays)

    def test_what_has_no_tunnel(self):
        def says(*pieces, leave=False):
            def act(server):
                with dial(server.server_address) as sock, contextlib.suppress(ConnectionError):
                    for piece in pieces:
                        sock.sendall(piece)
                    if leave:
                        wait_until(lambda: len(server.sessions))
                    else:
                        read_to_end(sock)
                wait_until(lambda: not len(server.sessions))
            return act

        refused = Request(Cmd.CONNECT, address("127.0.0.1", support.closed_port())).pack()
        self.check("refused", "refused", says(NO_LOGIN + refused))
        self.check("not SOCKS", "refused", says(b"GET / HTTP/1.0\r\n\r\n"))
        self.check("handshake time-out", "handshake timeout", says(NO_LOGIN[:1]), handshake_timeout=0.3)
        self.check("left", "client", says(NO_LOGIN[:1], leave=True))

        class Buggy(socks5.Authorizer):
            def permitted(self, *args):
                return 1 // 0
        self.check("bug", "server", says(NO_LOGIN + refused), support.authorizing(Buggy))

        def stays(server):
            self.enter(dial(server.server_address)).sendall(NO_LOGIN[:1])
            wait_until(lambda: len(server.sessions))
        self.check("server_close", "server stopped", stays)

    def test_evicted(self):
        def act(server):
            for count in range(1, 4):
                self.enter(dial(server.server_address)).sendall(b"\5")
                wait_until(lambda: max([session.number for session in server.sessions], default=0) == count)
            wait_until(lambda: len(server.sessions) == 2)
        with mock.patch.object(sessions, "GRACE_S", 0.0):
            found = self.ended(act, max_negotiating=2, handshake_timeout=0)
        self.assertEqual(sorted(session.ended_by for session in found), ["evicted", "server stopped", "server stopped"])

    def test_silent_newcomers(self):
        def act(server):
            for leave in (socket.socket.close, reset):
                sock = dial(server.server_address)
                wait_until(lambda: len(server.sessions))
                leave(sock)
                wait_until(lambda: not len(server.sessions))
        with mock.patch.object(listeners, "DEFER_ACCEPT_S", 0), mock.patch.object(newcomers, "MANY_NEGOTIATING", -1):
            self.check("left", "client", act, count=2)

    def test_bind_and_udp(self):
        def bind(server):
            with client.bind(server.server_address, ("127.0.0.1", 0)) as waiting, \
                    socket.create_connection(waiting.bnd, PATIENCE_S) as peer:
                sock, _peer = waiting.accept(PATIENCE_S)
                sock.close()
                self.assertEqual(peer.recv(1), b"")
            wait_until(lambda: not len(server.sessions))

        def left(server):
            client.bind(server.server_address, ("127.0.0.1", 0)).close()
            wait_until(lambda: not len(server.sessions))

        def udp(server):
            client.associate(server.server_address).close()
            wait_until(lambda: not len(server.sessions))
        for act in (bind, left, udp):
            self.check(act.__name__, "client", act)

    def test_a_slow_hook_that_fails_delays_no_traffic(self):
        go_on, told = threading.Event(), []
        self.addCleanup(go_on.set)

        class Slow(socks5.Server):
            def session_ended(self, session):
                told.append(threading.current_thread().name)
                go_on.wait(PATIENCE_S)
                raise ValueError("a bug")

        with logging_of(self, "ERROR") as logs, running(server_class=Slow) as server:
            for _ in range(20):
                self.check_serves(server.server_address, self.echo)
            wait_until(lambda: not len(server.sessions))
            self.assertEqual(len(told), 1)
            go_on.set()
        self.assertEqual(told, ["session_ended"] * 20)
        self.assertEqual([record.msg for record in logs.records], ["bug in session_ended"] * 20)

    def test_without_a_thread_for_it(self):
        """The next session tries again; at the latest server_close calls it."""
        start, told = threading.Thread.start, []

        def no_teller(thread):
            if thread.name == "session_ended":
                raise RuntimeError("can't start new thread")
            start(thread)

        class Noting(socks5.Server):
            def session_ended(self, session):
                told.append(threading.current_thread())

        with mock.patch.object(threading.Thread, "start", no_teller), running(server_class=Noting) as server:
            for _ in range(2):
                connect_through(server.server_address, *self.echo).close()
            wait_until(lambda: not len(server.sessions))
        self.assertEqual(told, [threading.current_thread()] * 2)

    def test_both_threads_come_to_end_it(self):
        """The relay loop, because the tunnel has ended, and the acceptor, because the handler has."""
        taken, closed = threading.Event(), []

        class Server(socks5.Server):
            def shutdown_request(self, request):
                taken.wait(PATIENCE_S)
                super().shutdown_request(request)

            def _tunnel_ended(self, tunnel):
                session, end = tunnel.session, self.end_session

                def both(session):
                    taken.set()                                 # the tunnel is taken from it, and it is still there
                    in_threads(8, end, session)
                with mock.patch.object(self, "end_session", both):
                    super()._tunnel_ended(tunnel)
                closed.append(session)

            def session_ended(self, session):
                closed.append(session)

        with mock.patch.object(busy, "FIRST_TURNS", 0), logging_of(self) as logs, \
                running(server_class=Server) as server:
            connect_through(server.server_address, *self.echo).close()
            wait_until(lambda: len(closed) == 2)
        self.assertEqual((len(closed), len(logs.records)), (2, 1))
