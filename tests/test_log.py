"""log.py, protocol/facts.py, net/writer.py: what a line shows, that it reaches the kernel whole, and that only the
writer thread waits for its reader."""
import contextlib
import copy
import errno
import io
import json
import logging
import os
import pickle
import queue
import re
import select
import socket
import subprocess
import sys
import tempfile
import threading
import time
import unittest
import weakref
from ipaddress import ip_address
from logging.handlers import QueueHandler
from unittest import mock

from socks5 import cli, client, log as logs
from socks5.net import writer as writers
from socks5.net.addresses import Endpoint
from socks5.net.writer import PIPE_BUF, Writer, chunks, cut, writing_at_once
from socks5.protocol.codes import Cmd, Rep
from socks5.protocol.facts import Facts, FactsRecord, template
from socks5.server.session import Session, SessionRecord
from tests import support
from tests.support import (PATIENCE_S, ROOT, address, dial, need, run_python, spawned, target, time_zone, wait_until)

EVIL = b"\n2026-11-22 17:21:31,010 WARNING auth_failed client=192.0.2.1 user='x'\r\n\x1b[2J\xff'\"\\"
CLIENT = Endpoint(ip_address("127.0.0.1"), 5)


def record(message, *args, level=logging.INFO, exc_info=None):
    return logging.LogRecord("socks5.x", level, "x.py", 1, message, args, exc_info)


def trouble(text="a\nb"):
    try:
        raise RuntimeError(text)
    except RuntimeError:
        return sys.exc_info()


def as_json(*args, **kwargs):
    line = logs.JsonFormatter().format(record(*args, **kwargs))
    assert "\n" not in line, line
    return json.loads(line)


def as_text(*args, **kwargs):
    return logs.TextFormatter(False).format(record(*args, **kwargs))


def handed_over(line):
    """The record as another process or thread gets it from logging's QueueHandler."""
    sent = queue.Queue()
    QueueHandler(sent).handle(line)
    return sent.get()


def evil_session(**facts):
    """The facts of a session whose client chose the worst of names."""
    return Facts(dict(client=CLIENT, user=EVIL, cmd="CONNECT", dst=address(EVIL, 443), reached=None, rep="", up=1,
                      down=2, seconds=0.5, ended="client", why="no host: %s" % ascii(EVIL), **facts))


EVIL_LINE = template("session", evil_session())


# ---- what a line shows -------------------------------------------------------------------------------------------

class TypedFacts(unittest.TestCase):
    """The same value in text and in JSON."""

    CASES = [
        ("None", None, "-", None), ("an empty word", "", "-", None), ("a word", "CONNECT", "CONNECT", "CONNECT"),
        ("an int", 7, 7, 7), ("zero", 0, 0, 0), ("a float", 1.23456789, 1.23456789, 1.234568),
        ("a user", b"alice", "'alice'", "alice"), ("no name", b"", "''", ""), ("a dash", b"-", "'-'", "-"),
        ("a newline", b"a\nb", "'a\\nb'", "a\nb"), ("quotes", b"it's \"so\"", "'it\\'s \"so\"'", "it's \"so\""),
        ("a backslash", b"a\\b", r"'a\\b'", "a\\b"), ("no UTF-8", b"\xff", r"'\\xff'", r"\xff"),
        ("an endpoint", CLIENT, "127.0.0.1:5", "127.0.0.1:5"),
        ("an IPv6 endpoint", Endpoint(ip_address("2001:db8::1"), 443), "[2001:db8::1]:443", "[2001:db8::1]:443"),
        ("an IP address", CLIENT.ip, "127.0.0.1", "127.0.0.1"),
        ("an address", address("192.0.2.1", 80), "192.0.2.1:80", "192.0.2.1:80"),
        ("a name and port", address("example.com", 443), "'example.com':443", "example.com:443"),
        ("a name with a blank", address("a b", 443), "'a b':443", "a b:443"),
        ("an enum member", Cmd.UDP_ASSOCIATE, "UDP_ASSOCIATE", "UDP_ASSOCIATE"),
        ("one that is 0", Rep.SUCCEEDED, "SUCCEEDED", "SUCCEEDED"),
        ("no word", "two words", "'two words'", "two words"), ("no line", "a\nb", "'a\\nb'", "a\nb"),
    ]

    def test_text_and_json(self):
        for name, value, text, plain in self.CASES:
            with self.subTest(name):
                self.assertEqual(Facts(key=value)["key"], text)
                self.assertEqual(as_text("word key=%(key)s", Facts(key=value)), "INFO word key=%s" % text)
                self.assertEqual(as_text("word key=%(key)s", {"key": value}), "INFO word key=%s" % text)
                self.assertEqual(as_json("word key=%(key)s", Facts(key=value))["key"], plain)

    def test_why_is_always_quoted_unless_there_is_none(self):
        for why, text in (("", "-"), (None, "-"), ("idle", "'idle'"), ("it's over", "\"it's over\""), ("-", "'-'")):
            self.assertEqual(as_text("word why=%(why)s", Facts(why=why)), "INFO word why=" + text)
            self.assertEqual(as_json("word why=%(why)s", Facts(why=why))["why"], why or None)

    def test_every_byte_in_a_name_is_one_line_and_comes_back(self):
        for number in range(256):
            name = b"a" + bytes([number]) + b"'\"\\"
            line = as_text("word user=%(user)s", Facts(user=name))
            self.assertTrue(line.isprintable() and line.isascii(), line)
            self.assertEqual(as_json("word user=%(user)s", Facts(user=name))["user"],
                             name.decode("utf-8", "backslashreplace"))

    def test_a_handler_of_another_program_shows_the_same_line(self):
        line = FactsRecord("socks5.x", logging.INFO, EVIL_LINE, evil_session())
        shown = logging.Formatter("%(name)s %(threadName)s %(process)d %(lineno)d %(message)s").format(line)
        self.assertTrue(shown.isprintable(), shown)
        self.assertEqual(shown.partition("session ")[2], as_text(EVIL_LINE, evil_session()).partition("session ")[2])
        self.assertEqual(copy.copy(line).getMessage(), line.getMessage())
        known = set(record("x").__dict__)
        self.assertEqual({name for name in known if not hasattr(line, name)}, set())

    def test_a_sessions_record(self):
        """Its text is made in one piece, not from its facts: both say the same, whatever the session was."""
        named, there, six = address(EVIL, 443), address("192.0.2.1", 80), address("2001:db8::1", 80)
        for fields in (
                {}, {"user": EVIL, "cmd": "BIND", "dst": named}, {"dst": there, "reached": there, "rep": "SUCCEEDED"},
                {"dst": there, "reached": Endpoint(ip_address("192.0.2.9"), 443)}, {"dst": six, "reached": six},
                {"up": 1, "down": 1 << 40, "ended_by": "handshake timeout", "why": ascii(EVIL), "notes": "via x"},
                {"ended_by": "client", "notes": "via office"}, {"client": Endpoint(ip_address("::1"), 9)}):
            session = Session(CLIENT, "192.0.2.1", None)
            session.ended_at = session.started + 1.2345
            for name, value in fields.items():
                setattr(session, name, value)
            with self.subTest(fields):
                line = SessionRecord("socks5.x", logging.INFO, session)
                self.assertEqual(line.text(), session.facts().fill(line.msg))
                self.assertTrue(line.text().isprintable(), line.text())
                said = json.loads(logs.JsonFormatter().format(line))
                self.assertEqual(list(said), ["time", "level", "event", *session.facts()])
                self.assertEqual((said["client"], said["why"]), (str(session.client), session.reason() or None))
                shown = logging.Formatter("%(levelname)s %(message)s").format(line)
                self.assertEqual(shown, "INFO " + line.text())
                for other in (copy.copy(line), pickle.loads(pickle.dumps(line)), handed_over(line)):
                    self.assertEqual(other.getMessage(), line.text())


class Text(unittest.TestCase):
    def test_a_time_as_logging_shows_it(self):
        form = logs.TextFormatter(True)
        for created in (1700000000.0, 1700000000.999, 1700000001.5, 1699999999.25):
            line = record("x %d", 1)
            line.created, line.msecs = created, int(created % 1 * 1000)
            self.assertEqual(form.format(line), logging.Formatter(logs.TEXT).format(line))

    def test_words_are_one_line(self):
        self.assertEqual(as_text("bad file: %s", "a\nWARNING auth_failed\x1b[2J"),
                         r"INFO bad file: a\nWARNING auth_failed\x1b[2J")
        self.assertEqual(as_text("100 %"), "INFO 100 %")

    def test_no_line_of_a_traceback_looks_like_another_line(self):
        bug = trouble("x\nWARNING auth_failed client=192.0.2.1\n\x1b[2J")
        shown = as_text("bug", level=logging.ERROR, exc_info=bug).split("\n")
        self.assertEqual(shown[0], "ERROR bug")
        self.assertTrue(all(line.startswith("| ") for line in shown[1:]), shown)
        self.assertIn("| WARNING auth_failed client=192.0.2.1", shown)
        self.assertEqual(shown[-1], r"| \x1b[2J")

    @unittest.skipUnless(hasattr(time, "tzset"), "no tzset")
    def test_local_time_in_text_and_utc_in_json(self):
        line = record("x")
        line.created, line.msecs = 1700000000.25, 250
        with time_zone("XXX-5:30"):
            self.assertEqual(logs.TextFormatter(True).format(line), "2023-11-15 03:43:20,250 INFO x")
            self.assertEqual(json.loads(logs.JsonFormatter().format(line))["time"], "2023-11-14T22:13:20.250Z")


class Json(unittest.TestCase):
    def test_facts_in_the_order_of_the_text(self):
        said = as_json("session client=%(client)s up=%(up)d seconds=%(seconds).3f", Facts(
            up=5, client=CLIENT, seconds=1.25, other="not said"))
        self.assertEqual(list(said), ["time", "level", "event", "client", "up", "seconds"])
        self.assertEqual(list(said.values())[1:], ["info", "session", "127.0.0.1:5", 5, 1.25])

    def test_other_lines(self):
        self.assertEqual(as_json("cannot accept: %s; %d live", "x", 3, level=logging.WARNING)["message"],
                         "cannot accept: x; 3 live")
        self.assertEqual(as_json("100% sure")["message"], "100% sure")

    def test_a_traceback_stays_on_its_line(self):
        said = as_json("bug while serving %s", "x", level=logging.ERROR, exc_info=trouble())
        self.assertEqual((said["level"], said["message"]), ("error", "bug while serving x"))
        self.assertIn("RuntimeError: a\nb", said["traceback"])

    def test_time(self):
        self.assertEqual(logs.utc(0.0625), "1970-01-01T00:00:00.062Z")
        self.assertEqual(logs.utc(1.9999), "1970-01-01T00:00:01.999Z")
        self.assertRegex(as_json("x")["time"], r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z$")

    def test_a_long_line_is_cut_and_valid(self):
        for name, user, why in (("one", "x" * 5000, ""), ("both", "\n" * 4000, "\xff" * 3000),
                                ("the rest", "x", "y" * 4100),
                                ("surrogates", "\U0001f600" * 900, "x" * 300)):
            for most in (PIPE_BUF - 4, 300):
                with self.subTest(name, most=most):
                    line = logs.JsonFormatter(most).format(record("word user=%(user)s why=%(why)s up=%(up)d", Facts(
                        user=user, why=why, up=7)))
                    self.assertLessEqual(len(line), most)
                    said = json.loads(line)
                    self.assertEqual((said["event"], said["up"]), ("word", 7))
                    cut = max(("user", "why"), key=lambda key: len(json.dumps({"user": user, "why": why}[key])))
                    self.assertTrue(said[cut].endswith("..."))
                    self.assertTrue({"user": user, "why": why}[cut].startswith(said[cut][:-3]))
                    if name == "one":
                        self.assertEqual(len(line), most)
        self.assertLessEqual(len(logs.JsonFormatter(100).format(record("x" * 200))), 100)


# ---- how it is written -------------------------------------------------------------------------------------------

class Chunks(unittest.TestCase):
    def test_at_line_ends_and_never_too_long(self):
        for name, blocks, joined in (
                ("small", [b"a\n", b"b\n"], [(b"a\nb\n", 2)]),
                ("exact", [b"1234567\n", b"89\n"], [(b"1234567\n", 1), (b"89\n", 1)]),
                ("a block stays together", [b"a\n", b"123\n456\n"], [(b"a\n", 1), (b"123\n456\n", 1)]),
                ("or is split at line ends", [b"a\n", b"123\n45\n67\n", b"b\n"],
                 [(b"a\n", 1), (b"123\n45\n", 1), (b"67\nb\n", 2)]),
                ("nothing", [], [])):
            with self.subTest(name):
                self.assertEqual(list(chunks(blocks, 8)), joined)

    def test_long_lines_are_cut(self):
        self.assertEqual(cut(b"1234567\n", 8), b"1234567\n")
        self.assertEqual(cut(b"12345678\n", 8), b"1234...\n")
        self.assertEqual(cut(b"a\n12345678\nb\n", 8), b"a\n1234...\nb\n")


class Sink:
    """A write() for a Writer. It can be made to hang, to fail, and to take less than it is given."""

    def __init__(self):
        self.data, self.calls, self.entered, self.may = b"", 0, threading.Semaphore(0), threading.Event()
        self.failures, self.most = [], None
        self.may.set()

    def __call__(self, data):
        self.calls += 1
        self.entered.release()
        if not self.may.wait(PATIENCE_S):
            raise OSError(errno.ETIMEDOUT, "")
        if self.failures:
            raise self.failures.pop(0)
        self.data += data[:self.most]
        return len(data[:self.most])

    @property
    def lines(self):
        return self.data.decode("ascii").splitlines()


class WriterThread(unittest.TestCase):
    def setUp(self):
        self.sink = Sink()
        self.released = []
        self.writer = Writer(self.sink, "lost=%d".__mod__, 64, lambda: self.released.append(1))
        self.addCleanup(self.writer.close)
        self.addCleanup(self.sink.may.set)

    def put(self, *lines):
        for line in lines:
            self.writer.put(line)

    def hang(self):
        """The thread hangs in a write of "first"."""
        self.sink.may.clear()
        self.put("first")
        self.assertTrue(self.sink.entered.acquire(timeout=PATIENCE_S))

    def test_a_write_that_hangs_keeps_no_other_thread_waiting_and_loses_nothing(self):
        self.hang()
        self.put("second", "third")                         # would never come back
        self.sink.may.set()
        self.writer.close(PATIENCE_S)
        self.assertEqual(self.sink.lines, ["first", "second", "third"])
        self.assertEqual(self.sink.calls, 2)                # what came meanwhile is written at once
        self.assertEqual(self.released, [1])

    def test_beyond_the_bound_items_are_dropped_and_counted(self):
        self.hang()
        self.writer._most = 3
        self.put(*"abcdefgh")
        self.sink.may.set()
        wait_until(lambda: "c" in self.sink.lines)
        self.put("more")
        self.writer.close(PATIENCE_S)
        self.assertEqual(self.sink.lines, ["first", "lost=5", "a", "b", "c", "more"])

    def test_the_bound_is_that_of_the_issue(self):
        self.assertEqual(self.writer._most, 10000)

    def test_it_is_woken_for_each_line_when_it_waits(self):
        for number in range(50):
            self.put(str(number))
            self.assertTrue(self.sink.entered.acquire(timeout=PATIENCE_S), number)

    def test_it_rests_between_batches(self):
        rests = []

        def rest(seconds):
            rests.append(seconds)
            self.put(*"0123456789") if len(rests) == 1 else None

        with mock.patch.object(writers, "sleep", rest):
            self.put("first")
            wait_until(lambda: len(rests) == 2)
        self.assertEqual(rests, [0.001, 0.001])
        self.assertEqual(self.sink.calls, 2)

    def test_failing_writes_are_counted_and_end_nothing(self):
        self.hang()
        self.sink.failures += [OSError(errno.ENOSPC, ""), OSError(errno.EPIPE, ""), ValueError("closed")]
        self.put("second", "third")
        self.sink.may.set()                                 # fails: first; its "lost=1"; second and third
        wait_until(lambda: self.sink.lines == ["lost=3"])
        self.put("more")
        self.writer.close(PATIENCE_S)
        self.assertEqual(self.sink.lines, ["lost=3", "more"])
        self.assertEqual(self.writer.lost, 3, "each counts once, however often it could not be said")

    def test_what_takes_only_a_part_is_given_the_rest(self):
        self.sink.most = 3
        self.put("abcdefgh")
        self.writer.close(PATIENCE_S)
        self.assertEqual(self.sink.data, b"abcdefgh\n")

    def test_a_line_that_was_written_in_part_is_ended_before_the_next(self):
        class Disk:
            left = 5

            def __call__(disk, data):
                if not disk.left:
                    disk.left = 100
                    raise OSError(errno.ENOSPC, "")
                size = min(len(data), disk.left)
                disk.left -= size
                self.sink.data += data[:size]
                return size

        writer = Writer(Disk(), "lost=%d".__mod__, 64)
        writer.put("abcdefgh")
        writer.put("more")
        writer.close(PATIENCE_S)
        self.assertEqual(self.sink.lines[0], "abcde")
        self.assertIn(self.sink.lines[1:], (["lost=1", "more"], ["lost=2"]))

    def test_a_full_descriptor_that_does_not_block_is_tried_again(self):
        self.sink.failures += [BlockingIOError(errno.EAGAIN, "")] * 3
        self.put("abc")
        self.writer.close(PATIENCE_S)
        self.assertEqual(self.sink.lines, ["abc"])

    def test_close_waits_no_longer_than_told(self):
        self.hang()
        begun = time.monotonic()
        self.writer.close(0.05)
        self.assertLess(time.monotonic() - begun, PATIENCE_S / 2)
        self.put("too late")
        self.sink.may.set()
        wait_until(lambda: self.released)
        self.assertEqual(self.sink.lines, ["first", "lost=1"])
        self.writer.close()                                 # once more does nothing
        self.assertEqual(self.released, [1])

    def test_a_thread_that_ends_while_it_is_being_closed(self):
        writer = self.writer

        class Bell(queue.SimpleQueue):
            def put(self, item):
                super().put(item)
                if writer._closed:
                    wait_until(lambda: writer._thread is None)

        writer._bell = Bell()
        self.put("a")
        closing = threading.Thread(target=writer.close, daemon=True)
        closing.start()
        closing.join(PATIENCE_S)
        self.assertFalse(closing.is_alive())
        self.assertEqual((self.sink.lines, self.released), (["a"], [1]))

    def test_close_of_one_that_had_nothing(self):
        self.writer.close()
        self.assertEqual((self.sink.calls, self.released), (0, [1]))

    def test_pause_and_resume(self):
        for before in (["a"], []):
            with self.subTest(before):
                self.setUp()
                self.put(*before)
                self.writer.pause(PATIENCE_S)
                self.assertFalse([thread for thread in threading.enumerate() if thread.name == "writer"])
                self.put("b")
                self.assertEqual(self.sink.lines, before)
                self.writer.resume()
                wait_until(lambda: self.sink.lines == [*before, "b"])
                self.writer.close(PATIENCE_S)

    def test_a_pause_that_a_write_outlasts(self):
        self.hang()
        self.writer.pause(0.01)
        self.put("second")
        self.writer.resume()
        self.sink.may.set()
        wait_until(lambda: self.sink.lines == ["first", "second"])
        self.put("third")
        wait_until(lambda: self.sink.lines == ["first", "second", "third"])

    def test_what_comes_while_it_goes_on_after_such_a_pause(self):
        def write(data):
            if data == b"second\n":
                writer.put("third")
            return self.sink(data)

        writer = Writer(write, "lost=%d".__mod__)
        self.addCleanup(writer.close)
        self.addCleanup(self.sink.may.set)
        self.sink.may.clear()
        writer.put("first")
        self.assertTrue(self.sink.entered.acquire(timeout=PATIENCE_S))
        writer.pause(0.01)
        writer.put("second")
        writer.resume()
        self.sink.may.set()
        wait_until(lambda: self.sink.lines == ["first", "second", "third"])

    def test_a_signal_handler_logs_while_the_thread_is_started(self):
        started, start = [], threading.Thread.start

        def interrupted(thread):
            started.append(thread)
            if len(started) == 1:
                self.put("of the handler")
            start(thread)

        with mock.patch.object(threading.Thread, "start", interrupted):
            self.put("first")
        self.writer.close(PATIENCE_S)
        self.assertEqual((len(started), self.sink.lines), (1, ["first", "of the handler"]))

    def test_no_thread_can_be_started(self):
        with mock.patch.object(threading.Thread, "start", side_effect=RuntimeError("can't start new thread")):
            self.put("a")
        self.put("b")
        self.writer.close(PATIENCE_S)
        self.assertEqual(self.sink.lines, ["a", "b"])

    def test_a_thread_that_fails_has_a_successor(self):
        with mock.patch.object(writers, "sleep", side_effect=MemoryError), \
                mock.patch.object(threading, "excepthook") as hook:
            self.put("a")
            wait_until(lambda: hook.called and self.writer._thread is None)
        self.put("b")
        wait_until(lambda: self.sink.lines == ["a", "b"])

    def test_no_thread_can_be_started_until_the_end(self):
        """Then the thread that closes it writes: it is the log that says why the program ends."""
        for error in (RuntimeError("can't start new thread"), MemoryError()):
            with self.subTest(repr(error)), mock.patch.object(threading.Thread, "start", side_effect=error):
                self.setUp()
                self.put("a", "b")
                self.writer.close(PATIENCE_S)
                self.assertEqual((self.sink.lines, self.released), (["a", "b"], [1]))


class AtOnce(unittest.TestCase):
    """Lines that a descriptor takes without waiting are written by the thread that logs."""

    def setUp(self):
        self.sink = Sink()
        self.takes = []                                     # of each line; then everything
        self.seen = []                                      # by at_once
        self.writer = Writer(self.sink, "lost=%d".__mod__, 64, at_once=self.at_once)
        self.addCleanup(self.writer.close)
        self.addCleanup(self.sink.may.set)

    def at_once(self, data):
        self.seen.append(data)
        takes = self.takes.pop(0) if self.takes else len(data)
        if isinstance(takes, Exception):
            raise takes
        self.sink.data += data[:takes]
        return takes

    def test_no_thread_is_woken(self):
        for word in "abc":
            self.writer.put(word)
        self.assertEqual((self.sink.lines, self.sink.calls, self.writer._thread), (["a", "b", "c"], 0, None))

    def test_what_is_not_taken_keeps_its_order_and_its_line(self):
        for trouble in BlockingIOError(), OSError(errno.EIO, ""), 0, 3:
            self.sink.data, self.seen, self.takes = b"", [], [trouble]
            self.sink.may.clear()                           # the thread hangs,
            for word in "first", "second", "third":
                self.writer.put(word)
            self.assertEqual(self.seen, [b"first\n"])       # and nothing overtakes it
            self.sink.may.set()
            wait_until(lambda: self.sink.lines == ["first", "second", "third"])
            wait_until(lambda: not self.writer._turn.locked())
            self.writer.put("fourth")
            self.assertEqual(self.seen, [b"first\n", b"fourth\n"])

    def test_the_next_line_does_not_continue_half_of_one(self):
        self.takes, self.sink.failures = [3], [OSError(errno.ENOSPC, "")]
        self.writer.put("first")
        wait_until(lambda: self.writer.lost)
        self.writer.put("second")
        self.writer.close(PATIENCE_S)
        self.assertEqual(self.sink.lines[0], "fir")
        self.assertEqual(sorted(self.sink.lines[1:]), ["lost=1", "second"])

    def test_what_is_lost_while_a_line_is_written_is_said(self):
        """By the thread, and not only when there is another line."""
        self.writer._at_once = lambda data: (self.writer.lose(3), self.at_once(data))[1]
        self.writer.put("first")
        wait_until(lambda: self.sink.lines == ["first", "lost=3"])

    def test_close_does_not_wait_for_a_write_that_hangs(self):
        writing, go_on = threading.Event(), threading.Event()
        self.writer._at_once = lambda data: (writing.set(), go_on.wait(PATIENCE_S), self.at_once(data))[2]
        logging_thread = threading.Thread(target=self.writer.put, args=("first",), daemon=True)
        logging_thread.start()
        self.assertTrue(writing.wait(PATIENCE_S))
        begun = time.monotonic()
        self.writer.close(0.05)
        self.assertLess(time.monotonic() - begun, PATIENCE_S / 2)
        go_on.set()
        logging_thread.join(PATIENCE_S)
        self.assertEqual(self.sink.lines, ["first"])

    def test_one_that_says_nothing_has_written_all(self):
        self.writer._at_once = lambda data: self.at_once(data) and None
        self.writer.put("first")
        self.writer.put("second")
        self.assertEqual((self.sink.lines, self.writer._thread), (["first", "second"], None))

    def test_a_slow_disk_is_left_to_the_thread(self):
        with tempfile.TemporaryFile() as file, mock.patch("socks5.net.writer.SLOW_S", -1.0):
            self.writer._at_once = writing_at_once(file)[0]
            for line in ("first", "second", "third"):
                self.writer.put(line)
            self.writer.close(PATIENCE_S)
            file.seek(0)
            self.assertEqual((file.read(), self.sink.lines), (b"first\n", ["second", "third"]))

    def test_a_disk_that_was_slow_is_written_to_at_once_later(self):
        with tempfile.TemporaryFile() as file, mock.patch("socks5.net.writer.SLOW_REST_S", 0.0):
            at_once = writing_at_once(file)[0]
            with mock.patch("socks5.net.writer.SLOW_S", -1.0):
                at_once(b"first\n")
            at_once(b"second\n")
            file.seek(0)
            self.assertEqual(file.read(), b"first\nsecond\n")

    def test_many_threads_lose_nothing_and_keep_their_order(self):
        self.takes = [BlockingIOError() if number % 7 == 0 else 64 for number in range(500)]
        names = iter(range(5))

        def say():
            name = next(names)
            for number in range(200):
                self.writer.put("%d %d" % (name, number))

        support.in_threads(5, say)
        self.writer.close(PATIENCE_S)
        for name in range(5):
            self.assertEqual([line for line in self.sink.lines if line.startswith("%d " % name)],
                             ["%d %d" % (name, number) for number in range(200)])

    def test_descriptors(self):
        read, write = os.pipe()
        ours, theirs = socket.socketpair()
        file = tempfile.TemporaryFile("w")
        for name, stream in (("pipe", os.fdopen(write, "w")), ("socket", ours.makefile("w")), ("file", file),
                             ("/dev/null", open(os.devnull, "w"))):
            with self.subTest(name), stream:
                at_once, release = writing_at_once(stream)
                if name == "pipe" and not sys.platform.startswith("linux"):
                    self.assertIsNone(at_once)
                    continue
                self.assertEqual(at_once(b"line\n"), 5)
                if name in ("pipe", "socket"):
                    with self.assertRaises(BlockingIOError):
                        while True:
                            at_once(b"x" * PIPE_BUF)
                    self.assertTrue(os.get_blocking(stream.fileno()), "other programs write to it as well")
                release()
        for end in (ours, theirs):
            end.close()
        os.close(read)
        self.assertIsNone(writing_at_once(io.StringIO())[0])


class Forks(unittest.TestCase):
    """Of processes that have a Writer, in interpreters of their own: a fork of this one has too many threads."""

    def run_program(self, program):
        need(self, hasattr(os, "fork"), "fork")
        # Python 3.12 warns of a fork beside threads, also of those that have ended and the system still counts.
        status, out, err = run_python("-W", "ignore::DeprecationWarning", "-c", """
import os, threading
from functools import partial
def look():
    look.threads = threading.active_count()
os.register_at_fork(before=look)                    # runs after those registered later
from socks5.net.writer import Writer
""" + program)
        self.assertEqual((status, err), (0, ""))
        return out.splitlines()

    def test_the_child_has_an_empty_queue_and_a_thread_of_its_own(self):
        lines = self.run_program("""
w = Writer(partial(os.write, 1), 'lost=%d'.__mod__)
w.put('parent 1')
for number in range(5):
    w.put('before %d' % number)
    pid = os.fork()
    if not pid:
        w.put('child %d %d' % (number, look.threads))
        w.close(20)
        os._exit(0)
    w.put('after %d' % number)
    os.waitpid(pid, 0)
w.close(20)
""")
        self.assertEqual(sorted(lines), sorted(["parent 1"] + [
            line % number for number in range(5) for line in ("before %d", "child %d 1", "after %d")]))

    def test_a_fork_while_a_write_hangs(self):
        lines = self.run_program("""
may, entered = threading.Event(), threading.Event()
def write(data):
    entered.set()
    may.wait()
    return os.write(1, data)
w = Writer(write, 'lost=%d'.__mod__)
w.put('parent')
entered.wait()
pid = os.fork()
may.set()
if not pid:
    w.put('child')
    w.close(20)
    os._exit(0)
w.put('parent again')
os.waitpid(pid, 0)
w.close(20)
""")
        self.assertEqual(sorted(lines), ["child", "parent", "parent again"])


class Handler(unittest.TestCase):
    def setUp(self):
        self.sink = Sink()

    def handler(self, form=None):
        made = logs.Handler(self.sink, form or logs.TextFormatter(False))
        self.addCleanup(made.close)
        return made

    def test_a_record_that_waits_keeps_no_frame_alive_and_other_handlers_see_it(self):
        handler = self.handler()
        bug = record("bug", level=logging.ERROR, exc_info=trouble())
        kept = weakref.ref(bug)
        self.sink.may.clear()                               # the thread hangs
        handler.handle(bug)
        handler.handle(bug)
        self.assertIsNotNone(bug.exc_info)
        del bug
        self.assertIsNone(kept())
        self.sink.may.set()
        handler.writer.close(PATIENCE_S)
        self.assertEqual(self.sink.lines[0], "ERROR bug")
        self.assertIn("| RuntimeError: a", self.sink.lines)

    def test_a_record_that_cannot_be_shown_costs_itself(self):
        class Bad:
            def __str__(self):
                raise KeyError("no\nkey")

        handler = self.handler()
        for line in "a", Bad(), "b":
            handler.handle(record("%s", line))
        handler.writer.close(PATIENCE_S)
        self.assertEqual(self.sink.lines, ["INFO a", "ERROR cannot be written: KeyError('no\\nkey')", "INFO b"])

    def test_a_record_for_which_there_is_no_memory_is_counted(self):
        class Large:
            def __str__(self):
                raise MemoryError

        handler = self.handler()
        handler.handle(record("%s", Large()))
        wait_until(lambda: self.sink.lines == ["WARNING lost lines=1"])
        self.assertEqual(handler.writer.lost, 1)

    def test_lost_lines_are_told_in_the_format_of_the_others(self):
        for form in (logs.TextFormatter(True), logs.JsonFormatter(), logs.Prioritized(logs.TextFormatter(False))):
            line = logs.lost_line(form)(7)
            self.assertRegex(line, r"(^[-0-9]+ [:,0-9]+ |^<4>)WARNING lost lines=7$|^{.*\"event\": \"lost\", "
                                   r"\"lines\": 7}$")

    def test_shutdown_of_logging_writes_what_is_queued(self):
        _status, out, err = run_python("-c", """
import logging, os
from functools import partial
from socks5 import log
log.CLOSE_S = 20
logging.getLogger('x').addHandler(log.Handler(partial(os.write, 1), log.TextFormatter(False)))
for number in range(3000):
    logging.getLogger('x').warning('line %d', number)
""")
        self.assertEqual((out.splitlines(), err), (["WARNING line %d" % number for number in range(3000)], ""))


# ---- the program -------------------------------------------------------------------------------------------------

TALKER = """
import logging, random, sys
from socks5 import log
from socks5.protocol.facts import Facts
form, number, evil = sys.argv[1], int(sys.argv[2]), bytes.fromhex(sys.argv[3])
handler = log.install(logging.INFO, form, sys.stderr, "")
talker = logging.getLogger("socks5.talker")
random.seed(number)
sys.stdin.readline()
for turn in range(400):
    name = (evil * 20)[:random.randrange(10, 1500)] * random.choice((1, 1, 1, 3))
    talker.info("session who=%(who)d turn=%(turn)d user=%(user)s end=%(who)d", Facts(
        who=number, turn=turn, user=name))
handler.writer.close(60)
"""


class OnePipe(unittest.TestCase):
    """Several processes that write to one pipe at once."""

    def lines_of(self, form, processes=3):
        reading, writing = os.pipe()
        talkers = [subprocess.Popen([sys.executable, "-c", TALKER, form, str(number), EVIL.hex()], cwd=str(ROOT),
                                    stdin=subprocess.PIPE, stderr=writing) for number in range(processes)]
        os.close(writing)
        for talker in talkers:
            talker.stdin.write(b"\n")
            talker.stdin.close()
        with open(reading, "rb") as pipe:
            data = pipe.read()
        for talker in talkers:
            self.assertEqual(talker.wait(PATIENCE_S), 0)
        self.assertEqual(data[-1:], b"\n")
        return data.decode("ascii").splitlines(), {(who, turn) for who in range(processes) for turn in range(400)}

    def test_text(self):
        lines, wanted = self.lines_of("text")
        whole = re.compile(r"[-0-9]{10} [:,0-9]{12} INFO session "
                           r"who=(\d) turn=(\d+) user=['\"].*(?:['\"] end=\1|\.\.\.)")
        found = [whole.fullmatch(line) for line in lines]
        self.assertEqual([line for line, match in zip(lines, found) if not match], [])
        self.assertEqual({tuple(map(int, match.groups())) for match in found}, wanted)
        self.assertEqual(len(lines), len(wanted))
        self.assertTrue(any(line.endswith("...") for line in lines))
        self.assertGreater(max(map(len, lines)), 3000)
        self.assertLess(max(map(len, lines)), PIPE_BUF)

    def test_json(self):
        lines, wanted = self.lines_of("json")
        found = [json.loads(line) for line in lines]
        self.assertEqual(sorted((said["who"], said["turn"]) for said in found), sorted(wanted))
        self.assertTrue(all(said["end"] == said["who"] for said in found if "end" in said))


class Unread(unittest.TestCase):
    """A standard error that is a pipe from which no process reads."""

    def test_it_serves_and_ends(self):
        need(self, os.name == "posix", "SIGTERM")
        for args in (("-w", "2"), ("-w", "1", "--trace")):
            reading, writing = os.pipe()
            self.addCleanup(os.close, reading)
            while select.select([], [writing], [], 0)[1]:
                os.write(writing, bytes(PIPE_BUF))          # full from the start
            with self.subTest(args), spawned("-v", *args, stderr=writing) as server, target() as destination:
                os.close(writing)
                for _ in range(60):
                    with client.connect(("127.0.0.1", server.port), destination) as sock:
                        self.assertTrue(support.echoes(sock, b"x"))
                self.assertEqual(server.end(), 0)


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
    def test_nothing_of_logging_is_changed_for_the_process(self):
        self.assertEqual(run_python("-c", """
import logging, sys
def names():
    return {key: value for key, value in vars(logging).items() if key[:2] != '__'}
before = names()
from socks5 import log
log.install(logging.INFO, 'text', sys.stderr, '')
assert names() == before
assert not logging.getLogger().handlers
"""), (0, "", ""))

    def test_the_log_is_written_when_main_returns(self):
        log = logging.getLogger("socks5")
        before = log.handlers[:], log.propagate, log.level

        def serve(*_):
            for number in range(2000):
                log.warning("line %d", number)
            return 0

        try:
            with mock.patch.object(cli, "serve", serve), mock.patch.object(logs, "CLOSE_S", PATIENCE_S), \
                    contextlib.redirect_stderr(io.StringIO()) as said:
                self.assertEqual(cli.main([]), 0)
        finally:
            log.handlers[:], log.propagate = before[:2]
            log.setLevel(before[2])
        self.assertEqual(len(said.getvalue().splitlines()), 2000)

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
            said = [json.loads(line) for line in server.lines + server.log]
        self.assertEqual({line["user"] for line in said if line.get("user")}, {user[0]})
        self.assertIn("login", {line["event"] for line in said})

    def test_text_in_the_journal(self):
        need(self, os.name == "posix", "fstat of a file")
        with tempfile.TemporaryFile() as log:
            def lines():                        # and leave alone where the program writes next
                return os.pread(log.fileno(), 1 << 16, 0).decode().splitlines()

            status = os.fstat(log.fileno())
            env = {"JOURNAL_STREAM": "%d:%d" % (status.st_dev, status.st_ino)}
            with spawned(env=env, stderr=log) as server, target() as destination:
                client.connect(("127.0.0.1", server.port), destination).close()
                wait_until(lambda: any("session " in line for line in lines()))
                server.end()
            self.assertTrue(all(line.startswith("<6>INFO ") for line in lines()), lines())
