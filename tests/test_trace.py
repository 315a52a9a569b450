"""protocol/trace.py and server/tracing.py: the trace shows what passed, no password, and costs no session anything."""
import contextlib
import errno
import io
import os
import re
import select
import socket
import tempfile
import unittest
from pathlib import Path
from unittest import mock

from socks5 import client
from socks5.config import ConfigError
from socks5.protocol.codes import Cmd, Rep
from socks5.protocol.trace import DOWN, UP, Story, Trace
from socks5.protocol.fields import BytesReader
from socks5.server import tracing
from socks5.protocol.facts import Facts
from socks5.protocol.messages import LAYOUTS, Datagram, Greeting, Login, LoginStatus, Reply, Request, Selection
from tests import support
from tests.support import (PATIENCE_S, ROOT, address, closed_port, dial, in_threads, need, read_to_end, run_cli,
                           running, spawned, target, udp_socket, wait_until)

ALICE = ("alice", "correct horse")
ROW = re.compile(r"(?m)^#\d+   ([0-9a-f*]{2}(?: [0-9a-f*]{2})*) *?(?:  ([A-Z.]+) .*)?$")
MESSAGES = [
    (UP, Greeting(b"\0\2")), (DOWN, Selection(2)), (UP, Login(b"alice", b"correct horse")), (DOWN, LoginStatus(0)),
    (UP, Request(Cmd.CONNECT, address("example.com", 443))), (UP, Request(Cmd.BIND, address("2001:db8::1", 21))),
    (DOWN, Reply(Rep.SUCCEEDED, address("192.0.2.1", 1234))), (UP, Datagram(address("192.0.2.53", 53), b"", 1)),
]


def story(colour=False, number=1):
    """A Story, and the list in which its blocks arrive, each as the text that is written."""
    blocks = []
    told = Story(Trace(lambda lines: blocks.append(tracing.text_of(lines) + "\n"), colour), number,
                 address("192.0.2.9", 5))
    blocks.clear()
    return told, blocks


def is_open(fd):
    try:
        return bool(os.fstat(fd))
    except OSError:
        return False


def rows(text):
    """[name, hex] of each field that is shown, long ones joined."""
    found = []
    for digits, name in ROW.findall(text):
        if name:
            found.append([name, digits])
        else:
            found[-1][1] += " " + digits
    return found


class Shown(unittest.TestCase):
    def test_every_field_of_every_message_with_its_bytes(self):
        for way, message in MESSAGES:
            with self.subTest(type(message).__name__):
                told, blocks = story()
                if way == DOWN:
                    told.sent(type(message), message.pack())
                elif isinstance(message, Datagram):
                    told.datagram(way, message.pack(), ("192.0.2.9", 5))
                else:
                    self.assertEqual(told.take(type(message), BytesReader(message.pack() + b"tail")), message)
                self.assertEqual(len(blocks), 1)
                self.assertIn(way, blocks[0].split("\n")[0])
                self.assertRegex(blocks[0].split("\n")[0], r"%s.*\(RFC 19\d\d section \d\)$" % type(message).__name__)
                shown = rows(blocks[0])
                self.assertEqual([name for name, _ in shown], [field.name for field in LAYOUTS[type(message)]])
                if not isinstance(message, Login):
                    self.assertEqual(bytes.fromhex("".join(digits for _, digits in shown)), message.pack())

    def test_a_long_field_is_cut(self):
        told, blocks = story()
        told.take(Request, BytesReader(Request(Cmd.CONNECT, address(b"a" * 200, 443)).pack()))
        self.assertIn("... and 137 bytes more", blocks[0])
        self.assertLess(max(map(len, blocks[0].split("\n"))), 260)
        self.assertEqual(blocks[0].count("61 61 61 61 61 61 61"), 8)

    def test_neither_the_password_nor_its_length(self):
        for passwd in (b"s3cret", b"\x77" * 119, b"\x77" * 250):
            told, blocks = story()
            told.take(Login, BytesReader(Login(b"alice", passwd).pack()))
            self.assertNotIn(passwd[:2].hex(" "), blocks[0])
            self.assertNotIn("  %02x  " % len(passwd), blocks[0])
            self.assertNotIn("%d bytes of PASSWD" % len(passwd), blocks[0])
            self.assertEqual(rows(blocks[0])[-2:], [["PLEN", "**"], ["PASSWD", "**"]])

    def test_no_password_of_a_message_that_is_cut_or_wrong(self):
        whole = Login(b"alice", b"s3cret").pack()
        for name, raw in (("cut", whole[:-1]), ("wrong", b"\5" + whole[1:])):
            with self.subTest(name):
                told, blocks = story()
                with self.assertRaises(Exception):
                    told.take(Login, BytesReader(raw))
                self.assertNotIn(b"s3cre".hex(" "), blocks[0])

    def test_peer_chosen_text_forges_no_line(self):
        told, blocks = story()
        told.take(Login, BytesReader(Login(b"a\n#1 the end\r\x1b[31m\xff", b"x").pack()))
        told.take(Request, BytesReader(Request(Cmd.CONNECT, address(b"a\n#9 x", 1)).pack()))
        text = "".join(blocks)
        self.assertTrue(all(line.startswith("#1 ") for line in text.splitlines()))
        self.assertNotIn("\x1b", text)
        self.assertNotIn("\n#1 the end", text)

    def test_no_reason_of_a_refusal_begins_a_line(self):
        told, blocks = story()
        told.sent(Reply, Reply(Rep.GENERAL_FAILURE).pack(), "no\n#1 the end")
        self.assertTrue(all(line.startswith("#1   ") for line in blocks[0].splitlines()[1:]), blocks)

    def test_the_totals(self):
        for why, shown in (("", "ended by: idle"), ("it's \n over", "ended by: idle, why: \"it's \\n over\"")):
            told, blocks = story()
            told.end(Facts(seconds=1.25, up=3, down=4, ended="idle", why=why))
            self.assertEqual(blocks, ["#1 the end after 1.250 s: 3 bytes up (from the client), 4 bytes down (to it); "
                                      "%s\n" % shown])

    def test_what_is_cut_or_wrong_is_shown_as_far_as_it_came(self):
        for name, kind, raw, fields, words in (
                ("cut", Greeting, b"\5\3\0", ["VER", "NMETHODS"], "there it ends"),
                ("version", Login, b"\5\1a\1b", ["VER"], "expected 0x01"),
                ("command", Request, b"\5\x09\0\1\1\2\3\4\0\5", ["VER", "CMD", "RSV", "ATYP", "DST.ADDR", "DST.PORT"],
                 "CMD 0x09"),
                ("address type", Request, b"\5\1\0\2", ["VER", "CMD", "RSV", "ATYP"], "ATYP 0x02")):
            with self.subTest(name):
                told, blocks = story()
                with self.assertRaises(Exception):
                    told.take(kind, BytesReader(raw))
                self.assertEqual([field for field, _ in rows(blocks[0])], fields)
                self.assertIn(words, blocks[0])

    def test_every_refusal_in_plain_words_and_why(self):
        for rep in list(Rep)[1:]:
            with self.subTest(rep.name):
                told, blocks = story()
                told.sent(Reply, Reply(rep).pack(), "rules:3 says so")
                self.assertRegex(blocks[0], "that is: .{20}")
                self.assertIn("why: rules:3 says so", blocks[0])

    def test_both_replies_of_bind_and_the_first_of_the_others(self):
        for cmd, tunnel in ((Cmd.CONNECT, [True]), (Cmd.BIND, [False, True]), (Cmd.UDP_ASSOCIATE, [False])):
            with self.subTest(cmd.name):
                told, blocks = story()
                told.take(Request, BytesReader(Request(cmd, address("0.0.0.0", 0)).pack()))
                for _ in tunnel:
                    told.sent(Reply, Reply(Rep.SUCCEEDED).pack())
                self.assertEqual(["tunnel: " in block for block in blocks[1:]], tunnel)
                self.assertEqual(len({re.search("that is: .*", block).group() for block in blocks[1:]}), len(tunnel))


class Colour(unittest.TestCase):
    def test_only_on_a_terminal_that_wants_it(self):
        class Terminal(io.StringIO):
            def isatty(self):
                return True

        for name, stream, environment, wanted in (
                ("terminal", Terminal(), {}, True), ("NO_COLOR", Terminal(), {"NO_COLOR": "1"}, False),
                ("NO_COLOR empty", Terminal(), {"NO_COLOR": ""}, True), ("dumb", Terminal(), {"TERM": "dumb"}, False),
                ("a file", io.StringIO(), {}, False)):
            with self.subTest(name), mock.patch.dict(os.environ, dict({"TERM": "xterm"}, **environment)):
                if "NO_COLOR" not in environment:
                    os.environ.pop("NO_COLOR", None)
                self.assertEqual(tracing.colourful(stream), wanted)

    def test_the_same_words_with_and_without(self):
        (plain, black), (painted, coloured) = story(), story(True)
        for told in (plain, painted):
            told.take(Greeting, BytesReader(b"\5\1\0"))
            told.sent(Reply, Reply(Rep.NOT_ALLOWED).pack())
        self.assertNotIn("\033", "".join(black))
        self.assertIn("\033[", "".join(coloured))
        self.assertEqual(re.sub(r"\033\[\d+m", "", "".join(coloured)), "".join(black))

    def test_a_real_terminal(self):
        pty = None
        with contextlib.suppress(ImportError):
            import pty
        need(self, pty, "a pseudo-terminal")
        master, slave = pty.openpty()
        seen = b""
        with mock.patch.dict(os.environ, TERM="xterm"):
            os.environ.pop("NO_COLOR", None)
            with spawned("--trace", stderr=slave) as server, target() as destination:
                os.close(slave)
                client.connect(("127.0.0.1", server.port), destination).close()
                while b"the end" not in seen:
                    seen += os.read(master, 4096)
        os.close(master)
        self.assertIn(b"\033[1m", seen)


# ---- whole sessions, and what README.rst teaches with them -------------------------------------------------------

def connect_by_name(proxy):
    with target() as (_, port), client.connect(proxy, ("localhost", port)) as sock:
        sock.sendall(b"hello")
        sock.shutdown(socket.SHUT_WR)
        assert read_to_end(sock) == b"hello"


def bind_and_be_called(proxy):
    with client.bind(proxy) as waiting, socket.create_connection(waiting.bnd, PATIENCE_S) as peer:
        sock, _ = waiting.accept(PATIENCE_S)
        with sock:
            peer.sendall(b"a file of 23 bytes, say")
            peer.shutdown(socket.SHUT_WR)
            assert read_to_end(sock) == b"a file of 23 bytes, say"


def ask_by_datagram(proxy):
    with udp_socket() as server, client.associate(proxy) as udp:
        udp.settimeout(PATIENCE_S)
        udp.sendto(b"question", server.getsockname())
        _, sender = server.recvfrom(100)
        server.sendto(b"the answer", sender)
        assert udp.recvfrom()[0] == b"the answer"


def log_in_wrongly(proxy):
    with contextlib.suppress(client.ProxyError):
        client.connect(proxy, ("127.0.0.1", 80), ("alice", "a guess")).close()


def connect_to_a_closed_port(proxy):
    with contextlib.suppress(client.ProxyError):
        client.connect(proxy, ("127.0.0.1", closed_port())).close()


# `.. trace: NAME` in README.rst: what the client does, and the options of the server.
SCENES = {
    "connect": (connect_by_name, {}),
    "bind": (bind_and_be_called, {}),
    "udp": (ask_by_datagram, {}),
    "refused login": (log_in_wrongly, {"user": (ALICE,)}),
    "refused request": (connect_to_a_closed_port, {}),
}


def perform(name):
    """The trace of one scene, as the program prints it today."""
    act, options = SCENES[name]
    with tempfile.NamedTemporaryFile() as file:
        with running(trace=file.name, **options) as server:
            act(server.server_address[:2])
            wait_until(lambda: b"the end after" in Path(file.name).read_bytes(), "the end")
        return file.read().decode("ascii")


def in_readme(text):
    """{name: trace} of the blocks that a comment `.. trace: NAME` announces."""
    found = {}
    announced = r"(?m)^\.\. trace: (.+)\n\n?(?:\.\. code-block:: \w+|::)\n\n((?:(?: +.*)?\n)+)"
    for name, block in re.findall(announced, text):
        found[name] = "".join(line.strip() + "\n" for line in block.strip().split("\n"))
    return found


def lasting(text):
    """Without what differs from run to run: ports, but for 0, are counted by their first turn; times; numbers."""
    ports = {}

    def port(digits):
        return "P%d" % ports.setdefault(int(digits), len(ports) + 1) if int(digits) else "0"

    def row(found):
        raw, name, digits = found.groups()
        told = int(raw.replace(" ", ""), 16)
        return "%s %s port %s" % (raw if told != int(digits) or not told else "PP", name, port(digits))

    text = re.sub(r"([0-9a-f]{2} [0-9a-f]{2}) +(\w+\.PORT) +port (\d+)", row, text)
    text = re.sub(r"(127\.0\.0\.1(?::| port ))(\d+)", lambda found: found.group(1) + port(found.group(2)), text)
    text = re.sub(r"after \d+\.\d+ s", "after SECONDS", text)
    return re.sub(r"(?m)^#\d+ ", "#1 ", text).replace("  ", " ")


class Scenes(support.Case):
    """README.rst has both replies of BIND, the headers of both ways of UDP, and a login whose password is not shown."""

    maxDiff = None

    def test_what_readme_teaches_is_what_happens(self):
        taught = in_readme((ROOT / "README.rst").read_text(encoding="utf-8"))
        self.assertEqual(set(taught), set(SCENES))
        for name, shown in taught.items():
            with self.subTest(name):
                self.assertEqual(lasting(shown).rstrip("\n"), lasting(perform(name)).rstrip("\n"))
        for name, words in (("bind", "proxy -> client  Second reply"), ("udp", "DATA: 10 bytes, to 127.0.0.1 port"),
                            ("refused login", "why: 'wrong user name or password'")):
            self.assertIn(words, taught[name])
        self.assertNotIn(b"a guess".hex(" "), taught["refused login"])

    def test_this_comparison_sees_what_matters(self):
        one = perform("connect")
        self.assertEqual(lasting(one), lasting(perform("connect")))
        for words, other in ((r"SOCKS version 5", "SOCKS version 4"), (r"DST\.PORT +port \d+", "DST.PORT port 1"),
                             ("09 6c", "08 6c"), ("5 bytes up", "6 bytes up"), ("(?m)^.*RSV.*\n", "")):
            with self.subTest(words):
                changed = re.sub(words, other, one, count=1)
                self.assertNotEqual(changed, one)
                self.assertNotEqual(lasting(changed), lasting(one))

    def test_a_run_of_datagrams_that_leave_in_one_call(self):
        path, sent = self.new_folder() / "trace", [b"%05d" % number for number in range(20)]
        with running(trace=str(path)) as proxy, client.associate(proxy.server_address) as udp, udp_socket() as server:
            udp.settimeout(PATIENCE_S)
            udp.sendto(b"hello", server.getsockname(), fragments=2)
            sender = server.recvfrom(100)[1]
            for data in sent:
                server.sendto(data, sender)
            self.assertEqual([udp.recvfrom()[0] for _ in sent], sent)
        text = path.read_text(encoding="ascii")
        self.assertEqual(text.count("proxy -> client  Datagram"), 20)
        self.assertIn("fragment 1\n", text)
        self.assertIn("fragment 2, the last of its sequence", text)

    def test_other_protocols(self):
        path = self.new_folder() / "trace"
        with running(trace=str(path)) as server:
            with dial(server.server_address) as sock:
                sock.sendall(b"GET / HTTP/1.1\r\nProxy-Authorization: Basic c2VjcmV0\r\n\r\n")
                sock.shutdown(socket.SHUT_WR)
                self.assertTrue(read_to_end(sock).startswith(b"HTTP/1.0 400"))
            wait_until(lambda: "the end" in path.read_text())
        self.assertIn("this is not SOCKS5", path.read_text())
        self.assertNotIn("c2VjcmV0", path.read_text())


class Places(support.Case):
    """Where it is written to, and that no session suffers from what happens there."""

    def session(self, port):
        with target() as destination, client.connect(("127.0.0.1", port), destination) as sock:
            sock.sendall(b"hello")
            sock.shutdown(socket.SHUT_WR)
            self.assertEqual(read_to_end(sock), b"hello")

    def test_standard_error_without_a_value(self):
        with spawned("--trace", "-q") as server:
            self.session(server.port)
            server.wait_line(r"^#\d+ the end after")
            self.assertNotIn("\033", "".join(server.log))

    def test_a_file_is_appended_to_and_private(self):
        folder = self.new_folder()
        path, ini = folder / "trace", folder / "ini"
        ini.write_text("[socks5]\ntrace = %s\n" % path)
        for sessions, args in ((1, ["--trace=%s" % path]), (2, ["--config", ini])):
            with spawned(*args) as server:
                self.session(server.port)
                wait_until(lambda: path.read_text().count("the end after") == sessions)
                self.assertFalse([line for line in server.log if line.startswith("#")])
        if os.name == "posix":
            self.assertEqual(path.stat().st_mode & 0o077, 0)

    def test_a_file_that_cannot_be(self):
        self.check_refused(run_cli("-p", "0", "--trace=/no/such/folder/trace"), "--trace /no/such/folder/trace: ")

    def test_the_file_is_closed_with_the_server_and_has_everything(self):
        opened = []

        def open_file(path, real=tracing.open_file):
            opened.append(real(path))
            return opened[0]

        path = self.new_folder() / "trace"
        with mock.patch.object(tracing, "open_file", open_file), running(trace=str(path)) as server:
            for number in range(500):
                server.trace.begin(number, "client %d" % number)
        wait_until(lambda: not is_open(opened[0]))          # the server waits for it a second at the most
        self.assertEqual(path.read_text().splitlines(),
                         ["#%d client %d has connected" % (number, number) for number in range(500)])

    def test_lost_blocks_are_counted(self):
        written = []

        def write(data):
            if not written:
                written.append(b"")
                raise OSError(errno.ENOSPC, "")
            written.append(data)
            return len(data)

        told = tracing.trace_to(write, 4096)
        told.begin(1, "x")
        told.close(PATIENCE_S)
        self.assertEqual(written, [b"", b"# lost blocks=1\n"])

    def test_a_full_disk(self):
        need(self, os.path.exists("/dev/full"), "/dev/full")
        with spawned("--trace=/dev/full") as server:
            for _ in range(2):
                self.session(server.port)
                server.wait_line("^.* session .*up=5 down=5")

    @unittest.skipUnless(hasattr(os, "mkfifo"), "no FIFOs here")
    def test_a_fifo_without_a_reader_and_one_that_comes_later(self):
        for workers in (1, 2):
            with self.subTest(workers=workers):
                fifo = self.new_folder() / "fifo"
                os.mkfifo(str(fifo), 0o600)
                with spawned("--trace=%s" % fifo, "-w", workers) as server:
                    self.session(server.port)
                    with open(str(fifo), encoding="ascii") as reader:
                        self.assertIn(" has connected", reader.readline())

    @unittest.skipUnless(hasattr(os, "mkfifo"), "no FIFOs here")
    def test_the_reader_of_a_fifo_reads_no_end_at_the_start(self):
        fifo = self.new_folder() / "fifo"
        os.mkfifo(str(fifo), 0o600)
        reader = os.open(str(fifo), os.O_RDONLY | os.O_NONBLOCK)
        self.addCleanup(os.close, reader)
        tracing.check(str(fifo))
        self.assertEqual(select.select([reader], [], [], 0)[0], [], "an end would be readable")
        with mock.patch.object(os, "access", lambda *_: False), \
                self.assertRaisesRegex(ConfigError, "^--trace .*/fifo: Permission denied$"):
            tracing.check(str(fifo))

    def test_standard_error_closed_from_the_start(self):
        need(self, os.path.exists("/bin/sh"), "/bin/sh")
        with spawned("--trace", "-v", prefix=("/bin/sh", "-c", 'exec "$0" "$@" 2>&-')) as server:
            for _ in range(2):
                self.session(server.port)

    def test_standard_error_whose_reader_has_left(self):
        reading, writing = os.pipe()
        with spawned("--trace", stderr=writing) as server:
            os.close(writing)
            os.close(reading)
            for _ in range(2):
                self.session(server.port)

    def test_sessions_interleave_but_their_messages_do_not(self):
        path = self.new_folder() / "trace"
        with running(trace=str(path)) as server, target() as destination:
            def one():
                for _ in range(5):
                    client.connect(server.server_address[:2], destination).close()

            in_threads(8, one)
            wait_until(lambda: path.read_text().count("the end after") == 40)
        text = path.read_text()
        blocks = re.findall(r"(?m)^#(\d+) (?:client|proxy) ->.*\n((?:#\d+   .*\n)+)", text)
        self.assertEqual(len(blocks), 40 * 4)
        for number, lines in blocks:
            self.assertEqual({line.split()[0] for line in lines.splitlines()}, {"#" + number})
        self.assertEqual(len({number for number, _ in blocks}), 40)
