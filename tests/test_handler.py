"""One client's negotiation over real sockets: what is tolerated, what is refused, the deadline, the log line."""
import contextlib
import itertools
import re
import select
import signal
import socket
import sys
import threading
import unittest
from unittest import mock

import socks5
from socks5.access import throttle
from socks5.client import ProxyError, associate, bind, connect
from socks5.server import inbox
from socks5.protocol.codes import Cmd, Method, Rep
from socks5.protocol.fields import BytesReader
from socks5.protocol.messages import UNSPECIFIED, Address, Greeting, Login, Reply, Request, Selection
from tests import support
from tests.support import (PATIENCE_S, address, dial, echoes, greeted, read_to_end, reader_of, refusal, running, target,
                           wait_until)

NO_LOGIN = Greeting(bytes([Method.NO_AUTHENTICATION])).pack()
BY_PASSWORD = Greeting(bytes([Method.USERNAME_PASSWORD])).pack()
ALICE = (b"alice", b"s3cret-of-alice")
USERS = (("alice", "s3cret-of-alice"), ("bob", "pass:word"), ("zoë", "пароль"))
NUMBERS = itertools.count(1)
LINE = re.compile(
    r"session client=(?P<client>\S+) user=(?P<user>-|'.*?'|\".*?\") cmd=(?P<cmd>\S+) dst=(?P<dst>.+?) "
    r"reached=(?P<reached>\S+) rep=(?P<rep>\S+) up=(?P<up>\d+) down=(?P<down>\d+) "
    r"seconds=(?P<seconds>\d+\.\d{3}) ended=(?P<ended>.+?) why=(?P<why>.+)")


def connect_to(destination):
    return Request(Cmd.CONNECT, address(*destination[:2])).pack()


def newcomer(server):
    """A connection from an address of its own."""
    source = ("127.3.%d.%d" % divmod(next(NUMBERS), 256), 0) if sys.platform == "linux" else None
    return socket.create_connection(server.server_address[:2], PATIENCE_S, source)


def exchange(server, *pieces, end=False):
    """Everything the server answers to `pieces`, each in a segment of its own; `end` says FIN behind them."""
    with newcomer(server) as client:
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for piece in pieces:
            client.sendall(piece)
        if end:
            client.shutdown(socket.SHUT_WR)
        return read_to_end(client)


class Case(unittest.TestCase):
    """With one server for each class, started with its OPTIONS."""

    OPTIONS = {}

    @classmethod
    def setUpClass(cls):
        unlimited = mock.patch.multiple(throttle, BURST=1e9, NAME_BURST=1e9)        # 127.0.0.0/8 is one origin
        unlimited.start()
        cls.addClassCleanup(unlimited.stop)
        stack = contextlib.ExitStack()
        cls.addClassCleanup(stack.close)
        cls.server = stack.enter_context(running(**cls.OPTIONS))

    @contextlib.contextmanager
    def logged(self, *patterns, level="INFO"):
        """The log of what happens inside, in which each of `patterns` has to turn up."""
        with support.logging_of(self, level) as logs:
            yield logs
            for pattern in patterns:
                logs.wait(pattern)

    def all_gone(self):
        wait_until(lambda: not len(self.server.sessions), "every session ended")


class AnySplit(Case):
    """Bytes come as the network likes."""

    def conversation(self, destination):
        """(what the client says, how much the server says before the echo)"""
        return NO_LOGIN + connect_to(destination) + b"payload", 2 + 10

    def check(self, client, prefix):
        read = reader_of(client)
        answers = read(prefix)
        self.assertEqual(answers[0], 0x05)
        self.assertEqual(answers[-10:-6], bytes([0x05, Rep.SUCCEEDED, 0x00, 0x01]))
        self.assertEqual(read(7), b"payload")

    def test_one_segment_and_a_half_close_behind_it(self):
        with target() as destination, dial(self.server.server_address) as client:
            said, prefix = self.conversation(destination)
            client.sendall(said)
            client.shutdown(socket.SHUT_WR)
            self.check(client, prefix)
            self.assertEqual(client.recv(1), b"")

    def test_cut_at_every_byte(self):
        with target() as destination:
            said, prefix = self.conversation(destination)
            for cut in range(1, len(said)):
                with self.subTest(cut=cut), dial(self.server.server_address) as client:
                    client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                    client.sendall(said[:cut])
                    client.sendall(said[cut:])
                    self.check(client, prefix)

    def test_a_byte_at_a_time(self):
        """The server's socket gives one byte to each recv, however the network joined them."""
        class Miser(socket.socket):
            def recv(self, size, *flags):
                return super().recv(min(size, 1), *flags)

        class Server(socks5.Server):
            def get_request(self, *args):
                request, client_address = super().get_request(*args)
                return Miser(request.family, request.type, fileno=request.detach()), client_address

        with target() as destination, running(server_class=Server, **self.OPTIONS) as server:
            said, prefix = self.conversation(destination)
            with dial(server.server_address) as client:
                client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                for i in range(len(said)):
                    client.sendall(said[i:i + 1])
                self.check(client, prefix)

    def test_payload_behind_the_request_reaches_the_target_first(self):
        early = bytes(range(256)) * 64
        with target() as destination, dial(self.server.server_address) as client:
            client.sendall(self.conversation(destination)[0][:-7] + early)
            client.sendall(b"later")
            client.shutdown(socket.SHUT_WR)
            self.assertTrue(read_to_end(client).endswith(early + b"later"))


class AnySplitWithLogin(AnySplit):
    OPTIONS = {"user": USERS}

    def conversation(self, destination):
        login = Login(*ALICE).pack()
        return BY_PASSWORD + login + connect_to(destination) + b"payload", 2 + 2 + 10


class Methods(Case):
    """RFC 1928 section 3, without users."""

    CASES = [("none offered", b"", 0xFF), ("no authentication", b"\0", 0x00),
             ("it comes last of 255", bytes(range(254, -1, -1)), 0x00), ("GSSAPI only", b"\1", 0xFF),
             ("password only", b"\2", 0xFF), ("both", b"\2\0", 0x00), ("FF itself", b"\xff", 0xFF),
             ("the same twice", b"\0\0", 0x00), ("private ones", b"\x80\xfe", 0xFF)]

    def test_which_method_is_chosen(self):
        for name, offered, chosen in self.CASES:
            with self.subTest(name):
                answer = exchange(self.server, Greeting(offered).pack(), end=True)
                self.assertEqual(answer, Selection(chosen).pack())

    def test_no_acceptable_method_is_the_end_although_a_request_follows(self):
        with socket.create_server(("127.0.0.1", 0)) as listener:
            listener.setblocking(False)
            refused = Greeting(b"\1").pack()
            with self.logged(r"rep=- .*ended=refused why=.*METHOD"):
                answer = exchange(self.server, refused + NO_LOGIN + connect_to(listener.getsockname()))
            self.assertEqual(answer, b"\x05\xff")
            self.assertRaises(BlockingIOError, listener.accept)


class MethodsWithUsers(Methods):
    OPTIONS = {"user": USERS}
    CASES = [("none offered", b"", 0xFF), ("no authentication", b"\0", 0xFF), ("both", b"\0\2", 0x02),
             ("password only", b"\2", 0x02), ("all but password", bytes({*range(256)} - {2}), 0xFF),
             ("GSSAPI and password", b"\1\2", 0x02)]


class LoginTest(Case):
    """RFC 1929."""

    OPTIONS = {"user": USERS}

    def test_wrong_is_01_and_nothing_behind_it_is_a_request(self):
        cases = [("wrong password", b"alice", b"wrong"), ("empty password", b"alice", b""),
                 ("empty name", b"", ALICE[1]),
                 ("unknown user", b"mallory", ALICE[1]), ("not UTF-8", b"\xff\xfe", b"\xff"),
                 ("255 bytes", b"a" * 255, b"b" * 255)]
        with socket.create_server(("127.0.0.1", 0)) as listener:
            listener.setblocking(False)
            for name, uname, passwd in cases:
                with self.subTest(name):
                    said = BY_PASSWORD + Login(uname, passwd).pack() + connect_to(listener.getsockname())
                    with self.logged("ended=refused why='wrong user name or password'", level="DEBUG") as logs:
                        answer = exchange(self.server, said)
                    self.assertEqual(answer, b"\x05\x02" + b"\x01\x01")
                    self.assertRaises(BlockingIOError, listener.accept)
                    self.assertNotIn("s3cret", "".join(logs.output))

    def test_one_try_only(self):
        wrong, right = Login(b"alice", b"wrong").pack(), Login(*ALICE).pack()
        with self.logged("session client=.* user='alice' .*ended=refused"):
            self.assertEqual(exchange(self.server, BY_PASSWORD + wrong + right), b"\x05\x02\x01\x01")

    def test_another_version_of_the_sub_negotiation_is_the_end(self):
        with self.logged("ended=refused why='VER 0x05"):
            answer = exchange(self.server, BY_PASSWORD + b"\x05" + Login(*ALICE).pack()[1:])
        self.assertEqual(answer, b"\x05\x02")

    def test_no_password_is_ever_logged(self):
        with self.logged("user='alice' .*rep=CONNECTION_REFUSED", level="DEBUG") as logs:
            said = BY_PASSWORD + Login(*ALICE).pack() + connect_to(("127.0.0.1", support.closed_port()))
            self.assertEqual(exchange(self.server, said)[4:], Reply(Rep.CONNECTION_REFUSED).pack())
        self.assertNotIn("s3cret", "".join(logs.output))

    def test_users_of_the_environment(self):
        with support.spawned(env={"SOCKS5_USERS": "carol:from:env,dave:x"}) as server, target() as destination:
            for user in ((b"carol", b"from:env"), (b"dave", b"x")):
                with self.subTest(user[0]), support.connect_through(server.port, *destination, user=user) as client:
                    self.assertTrue(echoes(client))
            for user in (("carol", "x"), None):
                self.assertRaises(ProxyError, connect, ("127.0.0.1", server.port), destination, user)
            server.wait_line(r"user='dave' cmd=CONNECT")
            self.assertEqual(server.end(signal.SIGTERM), 0)
            self.assertNotIn("from:env", "".join(server.log))


class Strangers(Case):
    """A client of another protocol is answered in that protocol if we know it, and the log names it."""

    def test_each_is_answered_in_its_own_protocol_and_named(self):
        socks4 = b"\x04\x01\x00\x50\x7f\x00\x00\x01user\x00"
        cases = [("SOCKS4", socks4, b"\x00\x5b" + bytes(6), "SOCKS4"),
                 ("SOCKS4, first byte only", b"\x04", b"\x00\x5b" + bytes(6), "SOCKS4"),
                 ("a TLS hello", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(64), b"", "TLS"),
                 ("a zero byte", bytes(40), b"", "0x00"), ("SSH", b"SSH-2.0-OpenSSH_9.6\r\n", None, None),
                 ("garbage", b"\xde\xad\xbe\xef", b"", "0xde"), ("VER 06", b"\x06\x01\x00", b"", "0x06")]
        for name, said, answer, word in cases:
            with self.subTest(name):
                with self.logged(r"cmd=- .*ended=refused why='.*%s" % (word or "")) as logs:
                    answered = exchange(self.server, said)
                if answer is not None:
                    self.assertEqual(answered, answer)
                self.assertEqual(len(logs.output), 1)

    def test_http_gets_a_page_that_says_what_to_do(self):
        for method in ("GET http://example.com/ HTTP/1.1", "CONNECT example.com:443 HTTP/1.1", "OPTIONS * HTTP/1.1"):
            with self.subTest(method):
                with self.logged(r"ended=refused why='.*HTTP"):
                    said = "%s\r\nHost: example.com\r\nCookie: %s\r\n\r\n" % (method, "x" * 5000)
                    page = exchange(self.server, said.encode())
                self.assertRegex(page, rb"\AHTTP/1\.0 400 [^\r\n]+\r\n(?s:.*)\r\n\r\n(?s:.*)SOCKS5(?s:.*)socks5h://")

    def test_another_version_in_the_request_is_closed_without_a_reply(self):
        with self.logged("ended=refused why='VER 0x04"):
            self.assertEqual(exchange(self.server, NO_LOGIN + b"\x04\x01\x00\x01\x7f\x00\x00\x01\x00\x50"), b"\x05\x00")


class Sockets(unittest.TestCase):
    def test_both_ends_of_a_tunnel_send_at_once_and_notice_a_dead_peer(self):
        seen = []

        class Looks(socks5.Handler):
            def relay(self, remote):
                seen.extend(bool(sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
                            for sock in (self.connection, remote))
                super().relay(remote)

            def hand_over(self, relay):                 # what is over before needs no probe
                seen.extend(bool(sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)) for sock in relay.sockets())
                super().hand_over(relay)

        with running(Looks) as server, target() as destination:
            with support.connect_through(server.server_address, *destination):
                wait_until(lambda: len(seen) == 4, "handed over")
            with bind(server.server_address, ("127.0.0.1", 0)) as waiting, \
                    socket.create_connection(waiting.bnd, PATIENCE_S), waiting.accept(PATIENCE_S)[0]:
                wait_until(lambda: len(seen) == 8, "handed over")
        self.assertEqual(seen, [True] * 8)

    def test_a_timeout_of_0_is_none(self):
        with running(handshake_timeout=0, connect_timeout=0, bind_timeout=0, idle_timeout=0, half_closed_timeout=0,
                     udp_idle_timeout=0, user=USERS[:1]) as server, target() as destination, \
                mock.patch.multiple(throttle, BURST=1, INTERVAL_S=0.5):
            exchange(server, BY_PASSWORD + Login(b"alice", b"wrong").pack())        # behind which the next has to wait
            with associate(server.server_address, ("alice", ALICE[1])), support.connect_through(
                    server.server_address, "localhost", destination[1], user=ALICE) as tunnel:
                self.assertTrue(support.echoes(tunnel))
                tunnel.shutdown(socket.SHUT_WR)
                self.assertEqual(tunnel.recv(1), b"")
                wait_until(lambda: [session.cmd for session in server.sessions if session.relay]
                           == ["UDP_ASSOCIATE"], "it stands")


class Deadline(Case):
    """The whole negotiation has one absolute deadline."""

    OPTIONS = {"handshake_timeout": 2, "user": USERS}

    def test_every_way_to_be_slow(self):
        """All at once. A silent connection may reach accept() a second late, because of TCP_DEFER_ACCEPT."""
        login = Login(*ALICE).pack()
        ways = {"silent": b"", "half a greeting": BY_PASSWORD[:2], "no login": BY_PASSWORD,
                "half a login": BY_PASSWORD + login[:9], "no request": BY_PASSWORD + login,
                "half a request": BY_PASSWORD + login + b"\x05\x01\x00\x03\xff" + b"a" * 40}
        with contextlib.ExitStack() as stack:
            destination = stack.enter_context(target())
            tunnel = stack.enter_context(support.connect_through(self.server.server_address, *destination, user=ALICE))
            logs = stack.enter_context(support.logging_of(self))
            clients = {name: stack.enter_context(dial(self.server.server_address)) for name in ways}
            for name, said in ways.items():
                clients[name].sendall(said)
            for name, client in clients.items():
                with self.subTest(name):
                    self.assertLessEqual(len(read_to_end(client)), 4)           # Selection and LoginStatus, no more
            wait_until(lambda: len(logs.output) == len(ways), "a log line for each")
            for line in logs.output:
                self.assertRegex(line, "rep=- .*ended=handshake-timeout why=-$")
            tunnel.sendall(b"a tunnel has no such deadline")
            self.assertEqual(reader_of(tunnel)(29), b"a tunnel has no such deadline")

    def test_a_byte_now_and_then_does_not_buy_time(self):
        with dial(self.server.server_address) as client, self.logged("ended=handshake-timeout"):
            said = iter(Greeting(bytes([Method.USERNAME_PASSWORD]) * 255).pack())
            client.settimeout(0.1)                              # the pace: all 257 bytes would take 25 s
            for byte in said:
                try:
                    client.sendall(bytes([byte]))
                    self.assertEqual(client.recv(1), b"")
                    break
                except socket.timeout:
                    continue
                except OSError:                                 # a byte that crossed the close
                    break
            self.assertGreater(len(list(said)), 0)

    def test_it_ends_with_the_request_and_leaves_connect_its_own_time(self):
        """A target that takes longer than the handshake may: here the handler is held up until that time is over."""
        over = threading.Event()

        class Slow(socks5.Authorizer):
            def permitted(self, *args):
                over.wait(PATIENCE_S)
                return super().permitted(*args)

        with target() as destination, running(support.authorizing(Slow), handshake_timeout=1) as server, \
                dial(server.server_address) as client, dial(server.server_address) as late:
            client.sendall(NO_LOGIN + connect_to(destination) + b"hello")
            self.assertEqual(reader_of(client)(2), b"\x05\x00")
            late.sendall(NO_LOGIN[:1])
            self.assertEqual(late.recv(1), b"")                 # came later and is over its time: so would be the first
            over.set()
            self.assertEqual(reader_of(client)(15)[10:], b"hello")


class Lingering(Case):
    """A refusal arrives although input is still unread: no RST overtakes it."""

    OPTIONS = {"user": USERS}
    LOGIN = BY_PASSWORD + Login(*ALICE).pack()

    def refusals(self):
        """(name, what is said, what is answered) of each refusal that has an answer"""
        yield "request", self.LOGIN + connect_to((b"a..b", 80)), b"\5\2\1\0" + Reply(Rep.HOST_UNREACHABLE).pack()
        yield "unknown ATYP", self.LOGIN + b"\5\1\0\7", b"\5\2\1\0" + Reply(Rep.ADDRESS_TYPE_NOT_SUPPORTED).pack()
        yield "login", BY_PASSWORD + Login(b"alice", b"wrong").pack(), b"\5\2\1\1"
        yield "METHOD", NO_LOGIN, b"\5\xff"
        yield "SOCKS4", b"\4\1\0\x50\1\2\3\4\0", b"\0\x5b" + bytes(6)

    def test_40_kb_behind_it(self):
        for name, said, answer in self.refusals():
            with self.subTest(name):
                self.assertEqual(exchange(self.server, said + bytes(40000)), answer)   # and an EOF, no reset

    def test_more_comes_after_it(self):
        for name, said, answer in self.refusals():
            with self.subTest(name), mock.patch.object(inbox, "LINGER_S", PATIENCE_S), \
                    newcomer(self.server) as client:
                client.sendall(said)
                self.assertEqual(read_to_end(client), answer)
                for _ in range(10):                             # the server has said FIN, and still takes this
                    client.sendall(bytes(2000))
                client.shutdown(socket.SHUT_WR)
                self.all_gone()
                self.assertEqual(client.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR), 0)

    def test_100_kb_behind_it(self):
        """More than is read away: the answer is there before the reset."""
        for name, said, answer in self.refusals():
            with self.subTest(name), newcomer(self.server) as client:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 400000)
                with contextlib.suppress(ConnectionError):      # the reset may come while we still send
                    client.sendall(said + bytes(100000))
                self.assertEqual(reader_of(client)(len(answer)), answer)

    def test_a_client_that_never_stops_sending_is_cut_off(self):
        with newcomer(self.server) as client:
            client.sendall(NO_LOGIN)
            with self.assertRaises(ConnectionError):
                for _ in range(1000):
                    client.sendall(bytes(1 << 16))

    def test_a_client_that_never_closes_is_not_waited_for(self):
        """The handshake's deadline does not hold any more when a request is refused; this has a time of its own."""
        with newcomer(self.server) as client:
            client.sendall(self.LOGIN + connect_to((b"a..b", 80)))
            self.assertEqual(read_to_end(client), b"\5\2\1\0" + Reply(Rep.HOST_UNREACHABLE).pack())
            self.all_gone()

    def test_a_client_that_never_reads_delays_no_other(self):
        """A receive buffer as small as it can be: our help page may not fit, the others are served, and it ends."""
        with contextlib.ExitStack() as stack:
            for said in (b"GET / HTTP/1.0\r\n\r\n", NO_LOGIN, BY_PASSWORD + Login(b"a", b"b").pack()):
                client = stack.enter_context(socket.socket())
                client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
                client.connect(self.server.server_address)
                client.sendall(said)
            self.assertEqual(exchange(self.server, NO_LOGIN), b"\5\xff")
            self.all_gone()


class Requests(Case):
    """RFC 1928 sections 4 to 6."""

    def answer(self, request, end=False):
        """The REP of `request`, whose reply must be whole, and the last thing said."""
        answer = exchange(self.server, NO_LOGIN + request, end=end)
        self.assertEqual(answer[:2], b"\x05\x00")
        reply = Reply.parse(BytesReader(answer[2:]))
        self.assertEqual(answer[2:], Reply(reply.rep, UNSPECIFIED).pack())
        return reply.rep

    def test_unknown_cmd(self):
        for cmd in (0x00, 0x04, 0x09, 0x7F, 0xFF):
            for name, rest in [("IPv4", connect_to(("127.0.0.1", 80))[2:]), ("IPv6", connect_to(("::1", 80))[2:]),
                               ("name", connect_to(("localhost", 80))[2:])]:
                with self.subTest("CMD %02x to %s" % (cmd, name)):
                    with self.logged("cmd=- .*rep=COMMAND_NOT_SUPPORTED .*ended=refused why='CMD 0x%02x'" % cmd):
                        self.assertEqual(self.answer(bytes([0x05, cmd]) + rest), Rep.COMMAND_NOT_SUPPORTED)

    def test_unknown_atyp_is_answered_at_once(self):
        """How many bytes would follow is unknown, so none is waited for: the client sends none, and no FIN."""
        for atyp in (0x00, 0x02, 0x05, 0x7F, 0xFF):
            with self.subTest("ATYP %02x" % atyp):
                with self.logged("rep=ADDRESS_TYPE_NOT_SUPPORTED .*why='ATYP 0x%02x'" % atyp):
                    rep = self.answer(bytes([0x05, Cmd.CONNECT, 0x00, atyp]))
                self.assertEqual(rep, Rep.ADDRESS_TYPE_NOT_SUPPORTED)

    def test_bad_names(self):
        names = [b"", b"\0", b"127.0.0.1\0.example.com", b"127.0.0.1\0", b"local host", b" localhost", b"localhost\n",
                 b"a\tb", b"\x7f", b"a..b", b".", b".localhost", b"a" * 64 + b".example", b"a." * 127 + b"a",
                 b"\xff\xfe", b"\xc3\x28",
                 b"fe80::1%lo", b"[::1]", b"localhost:80", b"http://localhost", b"*", b"a/b", b"a" * 255]
        port = support.closed_port()
        for name in names:
            with self.subTest(name):
                raw = bytes([0x05, Cmd.CONNECT, 0x00, 0x03, len(name)]) + name + port.to_bytes(2, "big")
                with self.logged("rep=HOST_UNREACHABLE .*ended=refused"):
                    self.assertEqual(self.answer(raw), Rep.HOST_UNREACHABLE)

    def test_a_name_that_is_an_address_is_that_address(self):
        for host in ("127.0.0.1", "::1"):
            if ":" in host and not support.HAS_IPV6:
                continue
            with self.subTest(host), target(host=host) as (_, port), dial(self.server.server_address) as client:
                with self.logged("dst='%s':%d reached=%s " % (host, port, re.escape(str(address(host, port))))):
                    client.sendall(NO_LOGIN + Request(Cmd.CONNECT, Address(host.encode(), port)).pack() + b"x")
                    self.assertEqual(reader_of(client)(4)[2:], b"\x05\x00")
                    client.shutdown(socket.SHUT_WR)
                    self.assertTrue(read_to_end(client).endswith(b"x"))

    def test_a_remote_that_resets_at_once_still_gets_its_client_a_reply(self):
        """The reset is there before the handler looks at the connection, and not before that stands."""
        import socks5.server.handler as module
        plain, connected = module.connect, threading.Event()

        def reset_when_connected(sock):
            connected.wait(PATIENCE_S)
            support.reset(sock)

        def connect_and_wait(*args):
            remote, address = plain(*args)
            connected.set()
            select.select([remote], [], [], PATIENCE_S)
            return remote, address

        with target(reset_when_connected) as destination, mock.patch.object(module, "connect", connect_and_wait):
            with self.logged("rep=SUCCEEDED up=0 down=0 .*ended=remote why='remote: Connection reset"), \
                    greeted(self.server.server_address) as client:
                self.assertEqual(support.ask(client, Cmd.CONNECT, *destination).rep, Rep.SUCCEEDED)
                with self.assertRaises(ConnectionResetError):
                    client.recv(1)


class LogLine(Case):
    """One line for each session, complete, into which no peer can write."""

    def test_which_side_ended_it(self):
        with self.subTest("remote"), target(lambda connection: connection.sendall(b"bye")) as destination:
            with self.logged("rep=SUCCEEDED up=0 down=3 .*ended=remote why=-"):
                with support.connect_through(self.server.server_address, *destination) as client:
                    self.assertEqual(read_to_end(client), b"bye")
        with self.subTest("client's reset"), target() as destination:
            with self.logged("rep=SUCCEEDED .*ended=client why='client: "):
                support.reset(support.connect_through(self.server.server_address, *destination))

    def test_a_forged_line_is_impossible(self):
        forged = b"\r\n2030-01-01 INFO session client=10.0.0.1:1 user=- cmd=CONNECT\x1b[2J\0\x85\xe2\x80\xa8"
        with running(user=USERS) as guarded:
            cases = [("name", self.server, NO_LOGIN + Request(Cmd.CONNECT, Address(forged, 80)).pack()),
                     ("user", guarded, BY_PASSWORD + Login(forged, b"x").pack()), ("first bytes", self.server, forged),
                     ("HTTP", self.server, b"GET " + forged)]
            for name, server, said in cases:
                with self.subTest(name):
                    with self.logged(r"\A[A-Z]+ session ", level="DEBUG") as logs:
                        exchange(server, said, end=True)
                    for line in logs.output:
                        self.assertRegex(line, r"\A[ -~]+\Z")        # one line of printable ASCII
                    self.assertRegex(line, LINE)
                    self.assertEqual(sum(record.msg.startswith("session ") for record in logs.records), 1)


class Ourselves(support.TwoHosts, unittest.TestCase):
    """Through the proxy to the proxy, one would come again as one of its own addresses, which rules may trust."""

    def test_a_client_of_another_host_does_not_come_again_as_one_of_us(self):
        near = support.NEAR[4]
        with self.proxy("-l", "0.0.0.0", "--open") as server:
            for name, host in (("address", near), ("mapped", "::ffff:" + near)):
                with self.subTest(name), self.far(greeted, (near, server.port)) as client:
                    self.assertEqual(support.ask(client, Cmd.CONNECT, host, server.port), Reply(Rep.NOT_ALLOWED))
            server.wait_line("is this proxy itself")
            with self.subTest("another port of ours"):
                rep = refusal(self, self.far, connect, (near, server.port), (near, 1))
                self.assertEqual(rep, Rep.CONNECTION_REFUSED)
            with self.subTest("a client on this machine may"):
                self.near(connect, ("127.0.0.1", server.port), ("127.0.0.1", server.port)).close()
