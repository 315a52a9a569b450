"""logs.py: the same facts in text and JSON, one line each, and the priorities that the systemd journal reads."""
import io
import json
import logging
import os
import re
import subprocess
import sys
import tempfile
import threading
import unittest
from unittest import mock

from socks5 import client, log as logs
from socks5.protocol.fields import text
from socks5.server.sessions import Session
from tests.support import PATIENCE_S, ROOT, connect_through, dial, need, running, spawned, target, wait_until


def record(message, *args, level=logging.INFO, exc_info=None):
    return logging.LogRecord("socks5.x", level, "x.py", 1, message, args, exc_info)


def as_json(*args, **kwargs):
    line = logs.JsonFormatter().format(record(*args, **kwargs))
    assert "\n" not in line, line
    return json.loads(line)


class Stream:
    """Where the log goes; its write() waits until it may."""

    def __init__(self):
        self.text, self.calls, self.entered, self.may = "", 0, threading.Semaphore(0), threading.Event()

    def write(self, text):
        self.entered.release()
        if not self.may.wait(PATIENCE_S):
            raise TimeoutError
        self.text, self.calls = self.text + text, self.calls + 1

    def flush(self):
        pass


class Writer(unittest.TestCase):
    def setUp(self):
        self.writer, self.stream = logs.Writer(), Stream()
        self.writer.stream = self.stream

    def say(self, *lines):
        for line in lines:
            self.writer.handle(record(line))

    def aside(self, *lines):
        thread = threading.Thread(target=self.say, args=lines, daemon=True)
        thread.start()
        self.addCleanup(thread.join, PATIENCE_S)
        self.addCleanup(self.stream.may.set)
        return thread

    def test_nobody_waits_for_another_ones_write_and_no_line_is_lost(self):
        first = self.aside("first")
        self.assertTrue(self.stream.entered.acquire(timeout=PATIENCE_S))
        self.say("second", "third")                         # comes back, though the first has not
        self.assertTrue(first.is_alive())
        self.stream.may.set()
        first.join(PATIENCE_S)
        self.assertEqual((self.stream.text, self.stream.calls), ("first\nsecond\nthird\n", 2))

    def test_where_nobody_reads_all_wait_in_the_end(self):
        self.aside("first")
        self.assertTrue(self.stream.entered.acquire(timeout=PATIENCE_S))
        with mock.patch.object(logs, "MOST_LEFT", 2):
            self.say("second", "third")
            last = self.aside("last")
            wait_until(lambda: len(self.writer._lines) == 3)
            last.join(0.05)
            self.assertTrue(last.is_alive())
            self.stream.may.set()
            last.join(PATIENCE_S)
        wait_until(lambda: self.stream.text == "first\nsecond\nthird\nlast\n")

    def test_many_threads(self):
        self.stream.may.set()
        threads = [self.aside(*("%d %d" % (number, line) for line in range(200))) for number in range(8)]
        for thread in threads:
            thread.join(PATIENCE_S)
        lines = self.stream.text.split()
        for number in range(8):
            mine = [int(line) for who, line in zip(lines[::2], lines[1::2]) if who == str(number)]
            self.assertEqual(mine, list(range(200)))

    def test_a_stream_that_fails_ends_nothing(self):
        self.stream.write = mock.Mock(side_effect=OSError(28, "No space left on device"))
        with mock.patch("sys.stderr", io.StringIO()) as said:
            self.say("lost")
        self.assertIn("No space left", said.getvalue())
        del self.stream.write
        self.stream.may.set()
        self.say("there")
        self.assertEqual(self.stream.text, "there\n")

    def test_a_record_shows_what_its_base_shows(self):
        try:
            raise ValueError("no\nwonder")
        except ValueError:
            trouble = sys.exc_info()
        for args in (("plain",), ("%s and %d", "this", 2), ("word key=%(key)s", {"key": "value"}), ("100 %",),
                     ("%s", {}), ("it failed", trouble)):
            *message, exc_info = args if args[-1] is trouble else (*args, None)
            told = "socks5.x", logging.WARNING, "x.py", 1, message[0], tuple(message[1:]), exc_info
            base, ours = logging.LogRecord(*told), logs.Record(*told)
            ours.created, ours.msecs = base.created, base.msecs
            for form in (logging.Formatter(logs.TEXT), logging.Formatter(logs.BARE), logs.TextFormatter(True),
                         logs.TextFormatter(False), logs.JsonFormatter()):
                with self.subTest(args[0], form=form):
                    self.assertEqual(form.format(ours), form.format(base))
            for timed, text_form in ((True, logs.TEXT), (False, logs.BARE)):
                self.assertEqual(logs.TextFormatter(timed).format(ours), logging.Formatter(text_form).format(base))
        for name in vars(base):                             # whoever asks for more gets something
            self.assertTrue(hasattr(ours, name) or name in ("relativeCreated", "taskName"), name)

    def test_the_time_is_that_of_the_base(self):
        for created in (1700000000.0, 1700000000.999, 1700000001.5, 1699999999.25):
            line = record("x")
            line.created, line.msecs = created, int(created % 1 * 1000)
            self.assertEqual(TEXT_FORMATTER.format(line), logging.Formatter(logs.TEXT).format(line))


TEXT_FORMATTER = logs.TextFormatter(True)                   # one for all of these lines


class Facts(unittest.TestCase):
    def test_facts_become_fields_in_the_same_order(self):
        said = as_json("session client=%(client)s up=%(up)d seconds=%(seconds).3f", {
            "up": 5, "client": "127.0.0.1:5", "seconds": 1.25, "other": "not said"})
        self.assertEqual(list(said), ["time", "level", "event", "client", "up", "seconds"])
        self.assertEqual(list(said.values())[1:], ["info", "session", "127.0.0.1:5", 5, 1.25])

    def test_what_is_not_there_is_null_and_a_dash_of_a_client_is_not(self):
        said = as_json("session user=%(user)s dst=%(dst)s why=%(why)s", {"user": text(b"-"), "dst": "-", "why": "-"})
        self.assertEqual((said["user"], said["dst"], said["why"]), ("-", None, None))

    def test_quotes_are_those_of_json(self):
        for name, value, wanted in (
                ("plain", text(b"alice"), "alice"), ("a newline", text(b"a\nb"), "a\nb"),
                ("quotes", text(b"it's \"so\""), "it's \"so\""), ("a backslash", text(b"a\\b"), "a\\b"),
                ("no UTF-8", text(b"\xff"), "\\xff"),
                ("a name and port", text(b"example.com") + ":443", "example.com:443"),
                ("an address", "[2001:db8::1]:443", "[2001:db8::1]:443"), ("two quoted", "'a' 'b'", "'a' 'b'"),
                ("a number", 7, 7), ("a long number", 1.23456789, 1.234568), ("nothing", "-", None)):
            with self.subTest(name):
                self.assertEqual(logs.plain(value), wanted)

    def test_every_name_comes_back(self):
        for number in range(256):
            name = b"a" + bytes([number]) + b"'\"\\"
            self.assertEqual(logs.plain(text(name)), name.decode("utf-8", "backslashreplace"))

    def test_other_lines(self):
        self.assertEqual(as_json("cannot accept: %s; %d live", "x", 3, level=logging.WARNING)["message"],
                         "cannot accept: x; 3 live")
        self.assertEqual(as_json("100% sure")["message"], "100% sure")

    def test_a_traceback_stays_on_its_line(self):
        try:
            raise RuntimeError("a\nb")
        except RuntimeError:
            said = as_json("bug while serving %s", "x", level=logging.ERROR, exc_info=sys.exc_info())
        self.assertEqual((said["level"], said["message"]), ("error", "bug while serving x"))
        self.assertIn("RuntimeError: a\nb", said["traceback"])

    def test_time_is_utc(self):
        self.assertEqual(logs.utc(0.0625), "1970-01-01T00:00:00.062Z")
        self.assertRegex(as_json("x")["time"], r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z$")

    def test_a_session_has_all_its_facts(self):
        keys = re.findall(r"%\((\w+)\)", Session.LINE)
        with self.assertLogs("socks5.server.handler", "INFO") as caught, running() as server, target() as destination:
            connect_through(server.server_address, *destination).close()
            wait_until(lambda: caught.records)
        line = caught.records[0]
        said = json.loads(logs.JsonFormatter().format(line))
        self.assertEqual(list(said), ["time", "level", "event", *keys])
        self.assertEqual((said["event"], said["cmd"], said["dst"], said["rep"]),
                         ("session", "CONNECT", "%s:%d" % destination, "SUCCEEDED"))


class Journal(unittest.TestCase):
    def test_priorities(self):
        form = logs.Prioritized(logging.Formatter("%(message)s"))
        for level, priority in ((logging.DEBUG, 7), (logging.INFO, 6), (logging.WARNING, 4), (logging.ERROR, 3),
                                (logging.CRITICAL, 2), (logging.INFO + 1, 6), (1, 7)):
            with self.subTest(logging.getLevelName(level)):
                self.assertEqual(form.format(record("x", level=level)), "<%d>x" % priority)

    def test_every_line_of_a_traceback(self):
        self.assertEqual(logs.Prioritized(logging.Formatter("%(message)s")).format(record("a\nb")), "<6>a\n<6>b")

    def test_only_where_the_journal_reads(self):
        reading, writing = os.pipe()
        self.addCleanup(os.close, reading)
        self.addCleanup(os.close, writing)
        status = os.fstat(writing)
        here = "%d:%d" % (status.st_dev, status.st_ino)
        for name, descriptor, journal, wanted in (
                ("the journal", writing, here, "<6>INFO x"), ("something else", writing, here + "1", "INFO x"),
                ("not told", writing, "", "INFO x"), ("no descriptor", None, here, "INFO x")):
            with self.subTest(name):
                line = logs.formatter("text", descriptor, journal).format(record("x"))
                self.assertTrue(line.endswith(wanted))
                self.assertEqual(line.startswith("<6>"), wanted.startswith("<6>"))
        self.assertTrue(logs.formatter("json", writing, here).format(record("x")).startswith('<6>{"time"'))


class Program(unittest.TestCase):
    def test_json_lines_only(self):
        user = ("alice\nsession client=forged", "x")
        with spawned("--log-format", "json", "-v", "-u", "%s:%s" % user) as server, target() as destination:
            with client.connect(("127.0.0.1", server.port), destination, user):
                pass
            with self.assertRaises(client.ProxyError):
                client.connect(("127.0.0.1", server.port), destination, (user[0], "y")).close()
            with dial(server.port) as sock:
                sock.sendall(b"\x16")
            server.wait_line('"why": "a TLS client"')
            server.wait_line('"cmd": "CONNECT"')
            server.wait_line('"event": "auth_failed"')
            server.end()
            said = [json.loads(line) for line in server.log]
        self.assertEqual({line["user"] for line in said if line.get("user")}, {user[0]})
        self.assertIn("login", {line["event"] for line in said})

    def test_text_in_the_journal(self):
        need(self, os.name == "posix", "fstat of a file")
        with tempfile.TemporaryFile() as log:
            status = os.fstat(log.fileno())
            env = dict(os.environ, JOURNAL_STREAM="%d:%d" % (status.st_dev, status.st_ino))
            process = subprocess.Popen([sys.executable, str(ROOT / "socks5_server.py"), "-p", "0"], env=env, stderr=log,
                                       stdout=subprocess.PIPE, stdin=subprocess.DEVNULL)
            try:
                port = int(process.stdout.readline().rpartition(b":")[2])
                with target() as destination:
                    client.connect(("127.0.0.1", port), destination).close()

                def lines():                    # and leave alone where the program writes next
                    return os.pread(log.fileno(), 1 << 16, 0).decode().splitlines()
                wait_until(lambda: any("session " in line for line in lines()))
            finally:
                process.terminate()
                process.communicate(timeout=PATIENCE_S)
            self.assertTrue(all(line.startswith("<6>INFO ") for line in lines()), lines())


if __name__ == "__main__":
    unittest.main()
