"""The server around the handler: listening, running out of everything, draining, leaking nothing, being a package."""
import contextlib
import errno
import os
import re
import select
import selectors
import signal
import socket
import sys
import threading
import unittest
from ipaddress import ip_address
from unittest import mock

import socks5
from socks5.server import acceptors
from socks5.server import server as module
from socks5.protocol.codes import Cmd, Method, Rep
from socks5.net.addresses import Endpoint
from socks5.protocol.messages import Greeting, Reply, Request
from tests import support
from tests.support import (HAS_IPV6, OTHER_THREADS, PATIENCE_S, address, closed_port, connect_through, descriptors,
                           dial, echoes, greeted, heard, need, read_to_end, reader_of, refuses, run_python, running,
                           spawned, target, threads, wait_until)

try:
    import resource
except ImportError:                     # Windows
    resource = None

NO_LOGIN = Greeting(bytes([Method.NO_AUTHENTICATION])).pack()
# For tests that look at the process that serves: all of the server in the one that was started.
ALONE = ("-w", "1") if hasattr(socks5.Config, "workers") else ()
HAS_PROC = os.path.isdir("/proc/self/fd")


def limited(soft, hard):
    """preexec_fn for a server with these descriptor limits."""
    return lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def fails_first(name, failed):
    """That method of a Server, which has no memory when it is called first."""
    def method(server, *args, **kwargs):
        if name not in failed:
            failed.append(name)
            raise MemoryError
        return getattr(module.Server, name)(server, *args, **kwargs)
    return method


@contextlib.contextmanager
def crowd_echo():
    """An echo server for thousands of connections in one thread."""
    with selectors.DefaultSelector() as selector, socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(4096)
        wake, waker = socket.socketpair()
        for sock in (listener, wake):
            selector.register(sock, selectors.EVENT_READ)

        def loop():
            while True:
                for key, _ in selector.select():
                    if key.fileobj is wake:
                        return
                    if key.fileobj is listener:
                        selector.register(listener.accept()[0], selectors.EVENT_READ)
                        continue
                    data = key.fileobj.recv(4096)
                    if data:
                        key.fileobj.send(data)
                    else:
                        selector.unregister(key.fileobj)
                        key.fileobj.close()

        thread = threading.Thread(target=loop)
        thread.start()
        try:
            yield listener.getsockname()
        finally:
            waker.close()
            thread.join(PATIENCE_S)
            for key in list(selector.get_map().values()):
                key.fileobj.close()


class Listening(unittest.TestCase):
    def test_several_addresses_share_the_port(self):
        need(self, HAS_IPV6, "IPv6")
        with spawned("-l", "127.0.0.1", "-l", "::1", "-l", "127.0.0.2") as server, target() as destination:
            port = int(server.wait_line(r"listening on 127\.0\.0\.2:(\d+)$", server.lines).group(1))
            shown = ["127.0.0.1", "[::1]", "127.0.0.2"]
            self.assertEqual(server.listening, ["listening on %s:%d" % (host, port) for host in shown])
            for host in ("127.0.0.1", "::1", "127.0.0.2"):
                with self.subTest(host), connect_through((host, port), *destination) as tunnel:
                    self.assertTrue(echoes(tunnel))

    def test_dual_stack_shows_ipv4_clients_as_ipv4(self):
        need(self, HAS_IPV6, "IPv6")
        with spawned("-l", "::", "--open") as server, target() as destination:
            for host in ("127.0.0.1", "::1"):
                with self.subTest(host):
                    with connect_through((host, server.port), *destination) as tunnel:
                        here = str(address(*tunnel.getsockname()[:2]))
                    server.wait_line("client=%s user=- cmd=CONNECT .*rep=SUCCEEDED" % re.escape(here))

    def test_ipv6_loopback_does_not_take_ipv4(self):
        need(self, HAS_IPV6, "IPv6")
        with running(listen=("::1",), port=closed_port("127.0.0.1", "::1")) as server:
            self.assertTrue(refuses(server.server_address[1]))

    def test_a_second_address_that_fails_leaves_nothing_open(self):
        need(self, HAS_PROC, "/proc")
        before = descriptors()
        with self.assertRaises(OSError):
            socks5.Server(socks5.Config(listen=("127.0.0.1", "192.0.2.1"), port=0, open=True))
        self.assertLessEqual(descriptors(), before)


class RunningOut(support.Case):
    def setUp(self):
        need(self, resource and HAS_PROC, "/proc and resource limits")

    def test_descriptors(self):
        """Accepting rests, says so once, and starts again; a tunnel that stands does not notice."""
        with contextlib.ExitStack() as stack:
            destination = stack.enter_context(target())
            server = stack.enter_context(spawned(*ALONE, "--max-sessions", 1000, "--handshake-timeout", 60,
                                                 preexec_fn=limited(64, 64)))
            tunnel = stack.enter_context(connect_through(server.port, *destination))
            many = contextlib.ExitStack()
            stack.enter_context(many)
            clients = [many.enter_context(dial(server.port)) for _ in range(80)]
            for client in clients:
                client.sendall(NO_LOGIN)
            server.wait_line("WARNING accept_failed errno=EMFILE sessions=[0-9]+$")
            self.assertTrue(all(echoes(tunnel) for _ in range(20)))
            self.assertEqual(reader_of(clients[0])(2), b"\x05\x00")
            self.assertEqual(support.ask(clients[0], Cmd.CONNECT, *destination), Reply(Rep.GENERAL_FAILURE))
            many.close()
            wait_until(lambda: descriptors(server.process.pid) < 20, "the many clients are gone")
            self.check_serves(server.port, destination)
            self.assertTrue(echoes(tunnel))
            self.assertEqual(len([line for line in server.log if "accept_failed" in line]), 1)

    def test_accept_that_fails_and_recovers(self):
        """What the system says when it has run out of something else: each ends no loop, and waits for better times."""
        plain = socket.socket.accept
        for number in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.ECONNABORTED, MemoryError):
            troubles = [MemoryError() if number == MemoryError else OSError(number, os.strerror(number))] * 3

            def accept(sock):
                with contextlib.suppress(IndexError):
                    raise troubles.pop()
                return plain(sock)

            with self.subTest(errno.errorcode.get(number, number)), \
                    mock.patch.object(socket.socket, "accept", accept), \
                    mock.patch.object(module, "sleep") as rest, \
                    support.logging_of(self) as logs, running() as server:
                served = 0
                while troubles or not served:
                    served += 1
                    with dial(server.server_address) as client:
                        client.sendall(NO_LOGIN + b"\x05\x09\x00\x01" + bytes(6))
                        self.assertEqual(read_to_end(client), b"\x05\x00" + Reply(Rep.COMMAND_NOT_SUPPORTED).pack())
                wait_until(lambda: any("session client=" in line for line in logs.output))
            exhausted = number != errno.ECONNABORTED            # one client's bad luck, and no news
            self.assertEqual(sum("accept_failed " in line for line in logs.output), exhausted, logs.output)
            self.assertEqual(rest.call_args_list, [mock.call(module.REST_S)] * 3 * exhausted, "or it would spin")

    def test_associations_leave_descriptors_to_others(self):
        """Each may take six descriptors, and here all do; `ulimit -n 64` carries 16 times two."""
        with contextlib.ExitStack() as stack:
            server = stack.enter_context(spawned(*ALONE, preexec_fn=limited(64, 64)))

            def asked(cmd, source, host="127.0.0.1", port=0):
                sock = greeted(server.port, source=source)
                rep = support.ask(sock, cmd, host, port).rep
                (stack.callback if rep == Rep.SUCCEEDED else lambda close: close())(sock.close)
                return rep

            self.assertEqual([asked(Cmd.UDP_ASSOCIATE, "127.0.0.1") for _ in range(5)],
                             [Rep.SUCCEEDED] * 4 + [Rep.GENERAL_FAILURE])
            server.wait_line("rep=GENERAL_FAILURE .*why='max-sessions 16 reached'")
            self.assertEqual(asked(Cmd.UDP_ASSOCIATE, "127.0.0.2"), Rep.SUCCEEDED)
            self.assertEqual(asked(Cmd.CONNECT, "127.0.0.3", *stack.enter_context(target())), Rep.SUCCEEDED)

    def test_max_sessions_0_is_what_the_descriptor_limit_carries(self):
        with mock.patch("socks5.net.listeners.session_limit", return_value=1), running(max_sessions=0) as server, \
                target() as destination, support.logging_of(self, "WARNING") as logs:
            with connect_through(server.server_address, *destination), dial(server.server_address) as second:
                self.assertEqual(heard(second, NO_LOGIN), b"")
        self.assertIn("max-sessions 1 reached", logs.output[0])

    def test_threads(self):
        """While no thread can be started, a client that needs one is closed, and no other."""
        with contextlib.ExitStack() as stack:
            destination = stack.enter_context(crowd_echo())
            server = stack.enter_context(running())
            tunnels = [stack.enter_context(connect_through(server.server_address, *destination)) for _ in range(3)]
            logs = stack.enter_context(support.logging_of(self, "WARNING"))
            none = RuntimeError("can't start new thread")
            with mock.patch.object(threading.Thread, "start", side_effect=none):
                for _ in range(100):                            # those whose thread was there already are served
                    client = stack.enter_context(dial(server.server_address))
                    client.sendall(NO_LOGIN)
                    if not heard(client):
                        break
                else:
                    self.fail("100 clients served without a thread to start")
                self.assertTrue(all(map(echoes, tunnels)))
            self.check_serves(server.server_address, destination)
            self.assertIn("can't start new thread", logs.output[0])

    def test_memory(self):
        """A MemoryError costs one session, wherever it comes, also in what is done about another one."""
        for names in (["verify_request"], ["finish_request"], ["session_of"], ["finish_request", "complain"],
                      ["verify_request", "complain"]):
            class Short(module.Server):
                pass

            failed = []
            for name in names:
                setattr(Short, name, fails_first(name, failed))
            with self.subTest(names), support.logging_of(self) as logs, crowd_echo() as destination, \
                    mock.patch.object(acceptors, "REST_S", 0), mock.patch.object(threading, "excepthook") as hook, \
                    running(server_class=Short) as server:
                with dial(server.server_address) as client:
                    client.sendall(NO_LOGIN)
                    self.assertFalse(heard(client))
                for _ in range(30):                             # more than there are acceptors
                    self.check_serves(server.server_address, destination)
                self.assertEqual(failed, names)
                wait_until(lambda: not len(server.sessions), "no session is left")
                hook.assert_not_called()
                self.assertNotIn("Traceback", "".join(logs.output))

    @unittest.skipUnless(resource and sys.platform.startswith("linux"), "no address space is limited here")
    @unittest.skipIf(support.FREE_THREADED, "a free-threaded Python reserves more at the start")
    def test_address_space(self):
        """`ulimit -v`: each thread takes a MiB of it, not 72. At 180 MiB the acceptor could not be started."""
        limit = 180 << 20
        with crowd_echo() as destination, spawned(*ALONE, preexec_fn=lambda: resource.setrlimit(
                resource.RLIMIT_AS, (limit, limit))) as server, contextlib.ExitStack() as stack:
            begun = [stack.enter_context(dial(server.port)) for _ in range(30)]
            for client in begun:
                client.sendall(NO_LOGIN[:1])                     # a thread waits for the rest
            wait_until(lambda: threads(server.process.pid) > len(begun), "a thread for each")
            for _ in range(5):
                self.assertTrue(echoes(stack.enter_context(connect_through(("127.0.0.1", server.port), *destination))))

    def test_where_there_are_no_acceptors(self):
        """As outside of Linux: serve_forever accepts, and each client has a thread, also beside a slow one."""
        with mock.patch.object(acceptors, "available", False), crowd_echo() as destination, running() as server, \
                dial(server.server_address) as slow:
            slow.sendall(NO_LOGIN[:1])
            wait_until(lambda: len(server.sessions) == 1, "it is accepted")
            with connect_through(server.server_address, *destination) as tunnel:
                self.assertTrue(echoes(tunnel))

    @unittest.skipUnless(acceptors.available, "no acceptors here")
    def test_without_a_thread_to_accept_with(self):
        """At the start it is the end, and the command says why in a line. Later it is told, and tried again."""
        start = """
import threading
old = threading.Thread.start
def start(thread):
    if thread.name == "acceptor":
        raise RuntimeError("can't start new thread")
    old(thread)
threading.Thread.start = start"""
        with support.script(start) as path:
            status, _out, err = run_python(path, "-p", "0", *ALONE)
        self.assertEqual(status, 1)
        self.assertRegex(err, r"^[^\n]*ERROR cannot start: can't start new thread\n$")
        with running() as server, support.logging_of(self, "WARNING") as logs, crowd_echo() as destination:
            for patched in (True, False):
                with connect_through(server.server_address, *destination) as tunnel:
                    self.assertTrue(echoes(tunnel))
                    if patched:
                        with mock.patch.object(server._acceptors, "refill", return_value=False):
                            wait_until(lambda: logs.output, "a line")
        self.assertEqual(logs.output, ["WARNING accept_failed errno=EAGAIN sessions=1"])

    def test_each_kind_of_trouble_is_told(self):
        """Once a minute each: one does not hide the other."""
        with running(max_sessions=1) as server, self.assertLogs("socks5", "WARNING") as logs, target() as destination:
            with connect_through(server.server_address, *destination), dial(server.server_address) as client:
                self.assertEqual(heard(client, NO_LOGIN), b"")
            wait_until(lambda: not len(server.sessions))

            def no_more(*args):
                raise RuntimeError("can't start new thread")

            with mock.patch.object(server, "process_request", no_more), dial(server.server_address) as client:
                self.assertEqual(heard(client, NO_LOGIN), b"")
        self.assertEqual([record.args.get("why") for record in logs.records],
                         ["max-sessions 1 reached", "no thread: can't start new thread"])

    def test_soft_descriptor_limit_is_raised(self):
        hard = min(4096, resource.getrlimit(resource.RLIMIT_NOFILE)[1])
        with spawned(*ALONE, preexec_fn=limited(100, hard)) as server:
            with open("/proc/%d/limits" % server.process.pid) as file:
                self.assertRegex(file.read(), r"Max open files +%d +%d " % (hard, hard))

    def test_1100_tunnels_at_once(self):
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        need(self, hard == resource.RLIM_INFINITY or hard >= 5000, "a descriptor limit of 5000")
        need(self, hasattr(select, "poll"), "poll(): select() takes no more than 1,024 descriptors")
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        self.addCleanup(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
        with contextlib.ExitStack() as stack:
            destination = stack.enter_context(crowd_echo())
            server = stack.enter_context(spawned(*ALONE, "-q"))
            request = Request(Cmd.CONNECT, address(*destination)).pack()
            tunnels = []
            for _ in range(1100):
                tunnels.append(stack.enter_context(dial(server.port)))
                tunnels[-1].sendall(NO_LOGIN + request)
            for tunnel in tunnels:
                self.assertEqual(reader_of(tunnel)(12)[:4], b"\x05\x00\x05\x00")
            self.assertGreater(descriptors(server.process.pid), 2200)
            most = OTHER_THREADS + acceptors.MAX_WAITING + acceptors.MAX_SPARE
            wait_until(lambda: threads(server.process.pid) <= most,
                       "no thread for each")
            for number, tunnel in enumerate(tunnels):
                tunnel.sendall(b"%04d" % number)
            for number, tunnel in enumerate(tunnels):
                self.assertEqual(reader_of(tunnel)(4), b"%04d" % number)


class Stopping(unittest.TestCase):
    def test_idle_server_ends_at_once(self):
        for number in (signal.SIGTERM, signal.SIGINT):
            with self.subTest(number.name), spawned("--drain-timeout", 600) as server:
                self.assertEqual(server.end(number), 0)

    def test_live_tunnel_may_finish(self):
        for number in (signal.SIGTERM, signal.SIGINT):
            with self.subTest(number.name), target() as destination, spawned("--drain-timeout", 600) as server:
                port = server.port
                with connect_through(port, *destination) as tunnel:
                    server.signal(number)
                    wait_until(lambda: refuses(port), "no longer listening")
                    self.assertTrue(echoes(tunnel, b"to the end"))
                    tunnel.shutdown(socket.SHUT_WR)
                    self.assertEqual(read_to_end(tunnel), b"")
                self.assertEqual(server.process.wait(PATIENCE_S), 0)
                server.wait_line("rep=SUCCEEDED up=10 down=10 .*ended=client why=-")

    def cut(self, tunnel):
        """A cut-off tunnel must never look complete: it ends with RST."""
        with self.assertRaises(ConnectionResetError):
            tunnel.recv(1)

    def test_what_is_left_is_cut(self):
        ended = []

        def serve(connection):
            try:
                support.echo(connection)
                ended.append("EOF")
            except OSError as exc:
                ended.append(type(exc))

        with target(serve) as destination, spawned("--drain-timeout", "0.3") as server:
            with connect_through(server.port, *destination) as tunnel, dial(server.port) as half:
                half.sendall(NO_LOGIN[:1])
                self.assertTrue(echoes(tunnel))
                server.signal(signal.SIGTERM)
                self.cut(tunnel)
                self.assertEqual(heard(half), b"")
            self.assertEqual(server.process.wait(PATIENCE_S), 0)
            wait_until(lambda: ended)
            self.assertEqual(ended, [ConnectionResetError])
            server.wait_line("rep=SUCCEEDED up=4 down=4 .*ended=server-stopped why=-")
            server.wait_line(r"WARNING stopped with (?:1 session|2 sessions) cut off")

    def test_the_end_of_the_drain_is_the_end_of_all_sessions(self):
        class Slow(socks5.Handler):
            def handle(self):
                super().handle()
                threading.Event().wait(0.1)

        with running(Slow) as server, contextlib.ExitStack() as stack:
            for _ in range(3):
                stack.enter_context(greeted(server.server_address))
            server.shutdown()
            self.assertEqual((server.drain(0), len(server.sessions)), (3, 0))

    def test_second_signal_ends_it_at_once(self):
        term, int_ = signal.SIGTERM, signal.SIGINT
        for first, second in [(term, term), (int_, term), (term, int_)]:
            with self.subTest("%s %s" % (first.name, second.name)):
                with target() as destination, spawned("--drain-timeout", 600) as server:
                    port = server.port
                    with connect_through(port, *destination) as tunnel:
                        server.signal(first)
                        wait_until(lambda: refuses(port), "no longer listening")
                        self.assertTrue(echoes(tunnel))
                        server.signal(second)
                        self.cut(tunnel)
                    self.assertEqual(server.process.wait(PATIENCE_S), 0)


class Package(support.Case):
    """Server is a socketserver class, and behaves as one."""

    def test_shutdown_from_another_thread(self):
        before = threading.active_count()
        with socks5.Server(socks5.Config(port=0)) as server:
            host, port = server.server_address[:2]
            self.assertEqual((host, server.addresses), ("127.0.0.1", [Endpoint(ip_address("127.0.0.1"), port)]))
            self.assertGreater(port, 0)
            thread = threading.Thread(target=server.serve_forever, daemon=True)
            thread.start()
            with target() as destination, connect_through(server.server_address, *destination) as tunnel:
                self.assertTrue(echoes(tunnel))
                server.shutdown()
                thread.join(PATIENCE_S)
                self.assertFalse(thread.is_alive())
                self.assertTrue(echoes(tunnel))                 # shutdown() ends the loop, server_close() the sessions
            wait_until(lambda: threading.active_count() <= before + 1, "the relay loop, and no acceptor")
        self.assertLessEqual(threading.active_count(), before)
        self.assertTrue(refuses(port))

    def test_serving_again_after_shutdown(self):
        loops = []

        class Server(socks5.Server):
            def service_actions(self):
                loops.append(1)
                super().service_actions()

        with target() as destination, Server(socks5.Config(port=0)) as server:
            for _ in range(2):
                thread = threading.Thread(target=server.serve_forever, args=(600,), daemon=True)
                thread.start()
                wait_until(lambda: not refuses(server.server_address[1]))
                for _ in range(10):
                    self.check_serves(server.server_address, destination)
                server.shutdown()
                thread.join(PATIENCE_S)
            self.assertLess(len(loops), 100)                    # a loop that spins makes thousands
