"""inbox.py: exactly as much as is asked for, nothing lost, and a parting that does not destroy the answer."""
import socket
import threading
import unittest

from socks5.protocol.errors import RequestRefused
from socks5.protocol.messages import Greeting, Login, ProtectionLevel, Request, SecurityToken, whole
from socks5.server import inbox
from socks5.server.inbox import Inbox, InboxFile, linger
from tests.support import PATIENCE_S, read_to_end


class Reading(unittest.TestCase):
    def setUp(self):
        self.theirs, ours = socket.socketpair()
        self.addCleanup(self.theirs.close)
        self.addCleanup(ours.close)
        self.inbox = Inbox(ours)
        self.rfile = InboxFile(self.inbox)

    def test_exactly_what_is_asked_for(self):
        self.theirs.sendall(b"abcdef")
        self.assertEqual([self.inbox.read_exactly(size) for size in (1, 0, 3)], [b"a", b"", b"bcd"])
        self.assertEqual(self.inbox.rest(), b"ef")
        self.assertEqual(self.inbox.rest(), b"")

    def test_peek_takes_nothing(self):
        self.theirs.sendall(b"abc")
        self.assertEqual([self.inbox.peek(), self.rfile.peek(1), self.rfile.read(3)], [b"abc", b"abc", b"abc"])

    def test_the_end(self):
        self.theirs.sendall(b"ab")
        self.theirs.close()
        self.assertRaises(EOFError, self.inbox.read_exactly, 3)
        self.assertEqual(self.inbox.rest(), b"ab", "what came is not lost")
        self.assertEqual([self.inbox.peek(), self.rfile.read(), self.rfile.readline()], [b""] * 3)
        self.assertRaises(EOFError, self.inbox.read_exactly, 1)

    def test_bytes_are_kept_a_second_time_only_while_a_record_takes_a_message(self):
        raw = Greeting(b"\0\2").pack()
        self.theirs.sendall(raw + raw[:1])
        self.assertEqual(self.inbox.take(Greeting).methods, b"\0\2")
        self.assertIsNone(self.inbox.heard)
        self.inbox.record = record = []
        self.theirs.sendall(raw[1:] + b"early")
        self.assertEqual(self.inbox.take(Greeting).methods, b"\0\2")
        self.assertEqual([(kind, kept) for _when, kind, kept, _came in record], [(Greeting, raw)])
        self.assertEqual((self.inbox.heard, self.inbox.rest()), (None, b"early"))

    def test_no_secret_is_remembered(self):
        """A parsed message is kept for the next client that says the same, but neither a password nor a token: 1 KiB
        for each GSSAPI login."""
        for message, kept in ((Greeting(b"\0\1\2\3\4"), 1), (Login(b"name", b"pass"), 0), (SecurityToken(b"once"), 0),
                              (ProtectionLevel(b"once"), 0)):
            with self.subTest(type(message).__name__):
                whole.cache_clear()
                self.theirs.sendall(message.pack())
                self.assertEqual(self.inbox.take(type(message)), message)
                self.assertEqual(whole.cache_info().currsize, kept)

    def test_a_record_keeps_what_came_whole_in_pieces_or_as_a_bad_message(self):
        bad = b"\5\x09\0\1\x7f\0\0\1\0\x50"                        # CMD 9
        for kind, pieces, kept in ((Greeting, (b"\5\1\0",), b"\5\1\0"), (Greeting, (b"\5", b"\1\0"), b"\5\1\0"),
                                   (Greeting, (b"\5\1\0\5",), b"\5\1\0"), (Request, (bad,), bad)):
            with self.subTest(pieces):
                self.inbox.record = record = []
                self.inbox.feed(pieces[0])
                self.theirs.sendall(b"".join(pieces[1:]))
                if kind is Greeting:
                    self.assertEqual(self.inbox.take(kind).methods, b"\0")
                else:
                    self.assertRaises(RequestRefused, self.inbox.take, kind)
                self.assertEqual([entry[1:] for entry in record], [(kind, kept, True)])
                self.inbox.rest()

    def test_as_io_promises(self):
        """What socketserver's rfile can do, and a TextIOWrapper relies on."""
        lines = b"one\r\ntwo\nthree" + bytes(10000)
        self.theirs.sendall(lines)
        self.theirs.shutdown(socket.SHUT_WR)
        buffer = bytearray(2)
        self.assertEqual((self.rfile.readline(), self.rfile.readinto(buffer), bytes(buffer)), (b"one\r\n", 2, b"tw"))
        self.assertEqual((self.rfile.readline(), self.rfile.read1(3), self.rfile.read(0)), (b"o\n", b"thr", b""))
        self.assertEqual((self.rfile.readable(), self.rfile.writable(), self.rfile.seekable()), (True, False, False))
        self.assertEqual(self.rfile.read(4), b"ee\0\0")
        self.assertEqual(self.rfile.read(None), bytes(9998))


class Writing(unittest.TestCase):
    def test_all_of_it(self):
        theirs, ours = socket.socketpair()
        with theirs, ours:
            wfile = inbox.Outbox(ours)
            self.assertEqual((wfile.write(b"abc"), wfile.write(memoryview(b"defg")), wfile.writable()), (3, 4, True))
            wfile.flush()
            self.assertEqual(theirs.recv(100), b"abcdefg")


class Parting(unittest.TestCase):
    def setUp(self):
        with socket.create_server(("127.0.0.1", 0)) as listener:
            self.theirs = socket.create_connection(listener.getsockname(), PATIENCE_S)
            self.ours = listener.accept()[0]
        self.addCleanup(self.theirs.close)
        self.addCleanup(self.ours.close)

    def test_unread_input_does_not_destroy_the_answer(self):
        self.addCleanup(setattr, inbox, "LINGER_S", inbox.LINGER_S)
        inbox.LINGER_S = 0.5                            # they say no more, and do not close
        self.theirs.sendall(bytes(10000))
        self.ours.sendall(b"answer")
        linger(self.ours)
        self.ours.setblocking(False)
        self.assertRaises(BlockingIOError, self.ours.recv, 1)       # unread, it would make close() a reset
        self.ours.close()
        self.assertEqual(read_to_end(self.theirs), b"answer")

    def test_neither_for_ever_nor_without_end(self):
        for name, limit, said in (("in time", "LINGER_S", b""), ("in bytes", "LINGER_BYTES", bytes(100))):
            with self.subTest(name):
                before = getattr(inbox, limit)
                self.addCleanup(setattr, inbox, limit, before)
                setattr(inbox, limit, 0.01)
                self.theirs.sendall(said)
                thread = threading.Thread(target=linger, args=(self.ours,), daemon=True)
                thread.start()
                thread.join(PATIENCE_S)
                self.assertFalse(thread.is_alive())
                setattr(inbox, limit, before)
