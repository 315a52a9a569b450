"""splice.py: bytes through a real pipe in the kernel, and descriptors that all come back."""
import contextlib
import errno
import hashlib
import importlib
import os
import random
import select
import socket
import unittest
from time import monotonic
from unittest import mock

from socks5.net.shares import Share
from socks5.relay import splice
from tests.support import PATIENCE_S, descriptors, reset

TOO_LARGE = 0xFFFFFFFF          # beyond what any user may ask for: EINVAL


def numbered(size):
    return random.Random(size).getrandbits(8 * size).to_bytes(size, "big")


@unittest.skipUnless(splice.available, "os.splice is Linux, Python 3.10 and newer")
class SpliceTest(unittest.TestCase):
    def setUp(self):
        self.writer, self.source = self.pair()
        self.sink, self.reader = self.pair()
        self.source.setblocking(False)
        self.sink.setblocking(False)
        self.live = splice.PIPES.live()
        self.descriptors = descriptors()
        self.addCleanup(self.nothing_is_left)

    def pair(self):
        """TCP, as in a tunnel."""
        with socket.create_server(("127.0.0.1", 0)) as listener:
            near = socket.create_connection(listener.getsockname(), PATIENCE_S)
            far = listener.accept()[0]
        for sock in (near, far):
            sock.settimeout(PATIENCE_S)
            self.addCleanup(sock.close)
        return near, far

    def nothing_is_left(self):
        self.assertEqual((splice.PIPES.live(), descriptors()), (self.live, self.descriptors))

    def pipe(self):
        pipe = splice.KernelPipe()
        self.addCleanup(pipe.close)
        return pipe

    def read(self, size):
        data = b""
        while len(data) < size:
            data += self.reader.recv(size - len(data))
        return data


class Bytes(SpliceTest):
    def test_what_goes_in_comes_out(self):
        pipe = self.pipe()
        for size in (1, 1000, 50000):
            with self.subTest(str(size)):
                data = numbered(size)
                self.writer.sendall(data)
                taken = 0
                while taken < size:
                    try:
                        taken += pipe.fill(self.source.fileno())
                    except BlockingIOError:         # loopback has not carried the rest yet
                        pass
                self.assertEqual(pipe.held, size)
                self.assertEqual(pipe.empty(self.sink.fileno()), size)
                self.assertEqual(pipe.held, 0)
                self.assertEqual(self.read(size), data)

    def test_a_full_pipe_and_a_full_sink_block_nothing_and_lose_nothing(self):
        pipe = self.pipe()
        sent, received, piece = hashlib.sha256(), hashlib.sha256(), numbered(1 << 16)
        self.writer.setblocking(False)
        counts = {"in": 0, "taken": 0, "given": 0}

        def write():
            count = self.writer.send(piece)
            sent.update(piece[:count])
            counts["in"] += count

        def fill():
            counts["taken"] += pipe.fill(self.source.fileno())

        def give():
            counts["given"] += pipe.empty(self.sink.fileno())

        def until_all_block(*steps):
            blocked = 0
            while blocked < len(steps):
                blocked = 0
                for step in steps:
                    try:
                        step()
                    except BlockingIOError:
                        blocked += 1
                self.assertEqual(pipe.held, counts["taken"] - counts["given"])

        until_all_block(write, fill)                # nothing is read: pipe and socket fill up
        self.assertGreater(counts["in"], pipe.held)
        self.assertGreater(pipe.held, 0)
        until_all_block(give, fill)                 # the sink's own buffers fill up, too
        self.assertGreater(pipe.held, 0)
        self.reader.setblocking(False)
        total = 0
        while total < counts["in"]:
            for step in (give, fill) if pipe.held else (fill,):
                with contextlib.suppress(BlockingIOError):
                    step()
            with contextlib.suppress(BlockingIOError):
                data = self.reader.recv(1 << 16)
                received.update(data)
                total += len(data)
        self.assertEqual((received.digest(), pipe.held, counts["given"]), (sent.digest(), 0, counts["in"]))

    def test_what_it_holds_can_be_taken_back(self):
        pipe = self.pipe()
        data = numbered(300000)
        self.writer.sendall(data)
        while pipe.held < len(data):
            with contextlib.suppress(BlockingIOError):
                pipe.fill(self.source.fileno())
        self.assertEqual((pipe.read(), pipe.held), (data, 0))
        self.assertRaises(BlockingIOError, pipe.fill, self.source.fileno())

    def test_urgent_data_stops_it(self):
        """With EAGAIN, or 0 after FIN: neither says that nothing is left."""
        pipe = self.pipe()
        self.source.setsockopt(socket.SOL_SOCKET, socket.SO_OOBINLINE, 1)
        self.writer.sendall(b"abc")
        self.writer.send(b"D", socket.MSG_OOB)
        self.writer.sendall(b"efg")
        select.select([], [], [self.source], PATIENCE_S)
        while pipe.held < 3:
            with contextlib.suppress(BlockingIOError):
                pipe.fill(self.source.fileno())
        self.assertEqual(pipe.read(), b"abc")
        self.assertRaises(BlockingIOError, pipe.fill, self.source.fileno())
        self.writer.shutdown(socket.SHUT_WR)
        with contextlib.suppress(BlockingIOError):
            self.assertEqual(pipe.fill(self.source.fileno()), 0)
        self.assertEqual(self.source.recv(1), b"D")

    def test_it_takes_little_while_much_is_parked(self):
        pipe = self.pipe()
        splice.park(splice.MAX_PARKED)
        try:
            with mock.patch.object(splice, "_splice", return_value=1) as asked:
                pipe.fill(self.source.fileno())
        finally:
            splice.park(-splice.MAX_PARKED)
        self.assertEqual(asked.call_args[0][2], splice.FRUGAL_BYTES)
        pipe.held = 0                               # it was told of one byte that is not there

    def test_it_takes_less_while_relay_loops_work(self):
        pipe = self.pipe()
        for seconds, size in ((60, splice.BRIEF_BYTES), (0, splice.PIPE_BYTES)):
            with self.subTest(size), mock.patch.object(splice, "BRIEF_S", seconds), \
                    mock.patch.object(splice, "worked_at", [monotonic()]), \
                    mock.patch.object(splice, "_splice", return_value=1) as asked:
                pipe.fill(self.source.fileno())
            self.assertEqual(asked.call_args[0][2], size)
        pipe.held = 0

    def test_it_knows_of_loops_in_other_workers(self):
        pid = os.fork()
        if not pid:
            splice.worked_at[0] = 42.0
            os._exit(0)
        os.waitpid(pid, 0)
        self.assertEqual(splice.worked_at[0], 42.0)

    def test_a_sink_that_was_reset(self):
        pipe = self.pipe()
        self.writer.sendall(b"data")
        while not pipe.held:
            try:
                pipe.fill(self.source.fileno())
            except BlockingIOError:
                pass
        self.sink.setblocking(True)
        reset(self.reader)
        self.descriptors -= 1
        self.assertRaises(ConnectionError, self.sink.recv, 1)
        self.assertRaises(ConnectionError, pipe.empty, self.sink.fileno())
        self.assertEqual(pipe.held, 4)

    def test_a_source_that_was_reset(self):
        pipe = self.pipe()
        reset(self.writer)
        self.descriptors -= 1
        with self.assertRaises(ConnectionResetError):
            while True:
                try:
                    pipe.fill(self.source.fileno())
                except BlockingIOError:
                    pass


class Descriptors(SpliceTest):
    def test_each_has_two_of_its_own_that_no_child_inherits(self):
        pipe = splice.KernelPipe()
        self.assertEqual((splice.PIPES.live(), descriptors()), (self.live + 1, self.descriptors + 2))
        self.assertEqual([os.get_inheritable(fd) for fd in (pipe._out, pipe._into)], [False, False])
        pipe.close()
        self.nothing_is_left()

    def test_it_has_the_size_that_was_asked_for(self):
        pipe = self.pipe()
        get_size = 1032                             # F_GETPIPE_SZ
        self.assertGreaterEqual(splice.fcntl.fcntl(pipe._into, get_size), splice.PIPE_BYTES)

    def test_so_many_and_no_more(self):
        with mock.patch.object(splice, "PIPES", Share(4)):      # the last one is for another owner
            before = descriptors()
            pipes = [splice.KernelPipe() for _ in range(3)]
            for _ in range(2):
                with self.assertRaises(OSError) as caught:
                    splice.KernelPipe()
                self.assertEqual(caught.exception.errno, errno.EMFILE)
            self.assertEqual((splice.PIPES.live(), descriptors()), (3, before + 6))
            pipes.append(splice.KernelPipe("newcomer"))
            for _ in range(2):
                pipes.pop().close()
            pipes.append(splice.KernelPipe())       # one went, one may come
            for pipe in pipes:
                pipe.close()

    def test_the_size_is_refused(self):
        with mock.patch.object(splice, "PIPE_BYTES", TOO_LARGE):
            for _ in range(3):
                with self.assertRaises(OSError) as caught:
                    splice.KernelPipe()
                self.assertIn(caught.exception.errno, (errno.EINVAL, errno.EPERM))
                self.nothing_is_left()

    def test_no_descriptors(self):
        resource = importlib.import_module("resource")      # which Windows has not
        before = resource.getrlimit(resource.RLIMIT_NOFILE)
        free = os.dup(self.source.fileno())         # the lowest number that is free
        os.close(free)
        for room in (0, 1):                         # a pipe takes two
            with self.subTest("room for %d" % room):
                resource.setrlimit(resource.RLIMIT_NOFILE, (free + room, before[1]))
                try:
                    with self.assertRaises(OSError) as caught:
                        splice.KernelPipe()
                finally:
                    resource.setrlimit(resource.RLIMIT_NOFILE, before)
                self.assertEqual(caught.exception.errno, errno.EMFILE)
                self.nothing_is_left()
