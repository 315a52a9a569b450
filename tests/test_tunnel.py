"""relay/tunnel.py and relay/pipe.py over plain events: a model of two TCP connections that a seed drives.

No thread, no kernel socket, no waiting. What only real sockets show is in test_loop.py.
"""
import contextlib
import errno
import os
import random
import socket
import unittest
from unittest import mock

from socks5.net.poller import BROKEN, HANG_UP, READ, URGENT, WRITE
from socks5.relay import pipe as pipe_module
from socks5.relay import splice
from socks5.relay.pipe import Pipe
from socks5.relay.relay import UNREGISTERED
from socks5.relay.tunnel import BUSY_READS, BUSY_S, Tunnel

CLIENT, REMOTE = 0, 1       # their descriptors
SEEDS = 3000
CHUNK = 16                  # one read, in place of 64 KiB: then short streams have many
SMALL = 3                   # one read where little comes
LARGE = CHUNK // 2          # a large read
KERNEL = 40                 # what a kernel pipe takes at once
NOISE = random.Random(1928).getrandbits(8 * 4099).to_bytes(4099, "big")


class Connection:
    """The socket of the proxy, and the peer behind it, which a test plays by arrive(), finish(), fail() and take().

    arrived, read   bytes of the stream that have come, and how many of them the proxy has read
    mark            where in this stream the latest urgent byte is, None when it is read
    sent, room      what the proxy has sent, and how many bytes of it would still be taken
    oob             where in `sent` the urgent bytes are
    """

    by_fd = {}

    def __init__(self, rng, fd):
        self.rng, self.fd = rng, fd
        self.by_fd[fd] = self
        self.stream = memoryview(NOISE)[rng.randrange(1000):]
        self.arrived = self.read = 0
        self.mark, self.marks = None, []
        self.sent, self.oob = bytearray(), []
        self.room = 2 * CHUNK
        self.eof = self.fin = self.dead = self.reset_on_close = False
        self.error = 0
        self.pipe = self.back = None            # from here, and to here

    # ---- what the peer does

    def arrive(self, size, urgent=False):
        if not self.eof and not self.dead:
            self.arrived += size
            if urgent and size:
                self.mark = self.arrived - 1    # one at a time: the one before becomes an ordinary byte

    def finish(self):
        self.eof = True

    def fail(self):
        self.dead, self.error = True, errno.ECONNRESET

    def take(self, size):
        self.room += size

    # ---- what poll() says

    def events(self):
        unread = self.arrived > self.read
        return (READ if unread or self.eof or self.dead else 0) | (URGENT if self.mark is not None else 0) | (
            WRITE if self.room or self.fin or self.dead else 0) | (
            HANG_UP if self.dead or self.eof and self.fin else 0) | (BROKEN if self.error else 0)

    # ---- what the proxy calls

    def fileno(self):
        return self.fd

    def at_mark(self):
        return self.mark == self.read

    def recv(self, size, _flags=0):
        assert not self.pipe.held and not self.pipe.done, "read while something is in hand, or after EOF"
        # SO_OOBINLINE: a read stops in front of the urgent byte; one that begins there takes it, and what follows.
        size = min(size, self.arrived - self.read if self.at_mark() else self.available())
        if not size:
            self.raise_error()
            if self.eof:
                return b""
            raise BlockingIOError
        return self.consume(self.rng.randint(1, size) if self.rng.random() < 0.3 else size)

    def recv_into(self, buffer, size, flags):
        data = self.recv(size or len(buffer), flags)
        buffer[:len(data)] = data
        return len(data)

    def available(self):
        """How much can be read before the urgent byte stops it."""
        return (self.arrived if self.mark is None else self.mark) - self.read

    def consume(self, size):
        data = bytes(self.stream[self.read:self.read + size])
        self.read += size
        if self.mark is not None and self.mark < self.read:
            self.marks.append(self.mark)
            self.mark = None
        return data

    def send(self, data, flags=0):
        self.raise_error()
        if self.dead or self.fin:
            raise BrokenPipeError(errno.EPIPE, "broken pipe")
        if not self.room:
            raise BlockingIOError
        size = min(len(data), self.room)
        size = self.rng.randint(1, size) if self.rng.random() < 0.3 else size
        self.room -= size
        self.sent += data[:size]
        if flags & socket.MSG_OOB:
            self.oob.append(len(self.sent) - 1)
        return size

    def raise_error(self):
        number, self.error = self.error, 0
        if number:
            raise ConnectionResetError(number, "reset")

    def shutdown(self, how):
        assert how == socket.SHUT_WR
        source = self.back.source
        assert source.eof and source.read == source.arrived == len(self.sent), "FIN before all was delivered"
        if self.dead:
            raise OSError(errno.ENOTCONN, "not connected")
        self.fin = True

    def getsockopt(self, _level, _name):
        number, self.error = self.error, 0
        return number

    def setsockopt(self, _level, name, value):
        assert (name, value) == (socket.SO_LINGER, pipe_module.RESET_ON_CLOSE)
        self.reset_on_close = True


class KernelPipe:
    """In place of splice.KernelPipe."""

    live = 0
    room = KERNEL

    def __init__(self, owner):
        self.data = b""
        KernelPipe.live += 1

    held = property(lambda self: len(self.data))

    def fill(self, fd):
        source = Connection.by_fd[fd]
        assert not self.data
        size = min(KERNEL, self.room, source.available())
        if not size:
            if source.error:
                source.raise_error()
            if source.eof or source.rng.random() < 0.5:     # at urgent data it says either
                return 0
            raise BlockingIOError
        self.data = source.consume(size)
        return size

    def empty(self, fd):
        size = Connection.by_fd[fd].send(self.data)
        self.data = self.data[size:]
        return size

    def read(self):
        data, self.data = self.data, b""
        return data

    def close(self):
        KernelPipe.live -= 1


@contextlib.contextmanager
def model():
    with contextlib.ExitStack() as stack:
        for place, name, value in ((pipe_module, "CHUNK_BYTES", CHUNK), (pipe_module, "LARGE_BYTES", LARGE),
                                   (pipe_module, "SMALL_BYTES", SMALL), (pipe_module, "_buffers", []),
                                   (splice, "KernelPipe", KernelPipe), (splice, "available", True),
                                   (splice, "parked", 0),
                                   (Pipe, "at_mark", lambda pipe: pipe.source.at_mark())):
            stack.enter_context(mock.patch.object(place, name, value))
        yield


class Play:
    """One tunnel, a schedule made from a seed, and what must hold after each step."""

    def __init__(self, seed):
        self.rng = rng = random.Random(seed)
        self.ends = client, remote = Connection(rng, 0), Connection(rng, 1)
        self.early = early = rng.choice([0, 0, 0, 1, 3 * CHUNK, 100])
        client.arrived = client.read = early
        self.tunnel = Tunnel(client, remote, bytes(client.stream[:early]), idle_s=60, half_closed_s=10)
        client.pipe = remote.back = self.tunnel.up
        remote.pipe = client.back = self.tunnel.down
        self.now = 0.0
        self.urgent, self.kernel, self.resets = rng.random() < 0.4, rng.random() < 0.5, rng.random() < 0.3
        self.failed = False

    def run(self):
        for _ in range(self.rng.randrange(5, 60)):
            self.peer_step()
            self.turn()
            if self.tunnel.ended:
                break
        quiet = False
        while not quiet and not self.tunnel.ended:          # now the peers take all; then nothing may be left
            for end in self.ends:
                end.room = 1 << 20
            quiet = not self.turn(stale=False)
        self.judge()

    def peer_step(self):
        rng, end = self.rng, self.rng.choice(self.ends)
        what = rng.random()
        if what < 0.45:
            end.arrive(rng.choice([1, 2, CHUNK - 1, CHUNK, CHUNK + 1, 60]), self.urgent and rng.random() < 0.4)
        elif what < 0.75:
            end.take(rng.choice([1, 5, CHUNK, 100]))
        elif what < 0.8:
            end.finish()
        elif what < 0.83 and self.resets:
            end.fail()
            self.failed = True
        elif what < 0.92 and self.kernel:
            pipe = end.pipe
            if rng.random() < 0.3:
                pipe.leave_kernel()
            elif not pipe.held and not pipe.done:
                pipe.use_kernel()

    def turn(self, stale=True):
        """One batch of events, as the loop would have it. Whether there were any."""
        wanted = self.tunnel.interest()
        self.check_interest(wanted)
        batch = []
        for side, (end, mask) in enumerate(zip(self.ends, wanted)):
            ready = 0 if mask == UNREGISTERED else end.events() & (mask | HANG_UP | BROKEN)
            if ready:
                batch.append((side, ready))
            elif stale and mask > 0 and end.mark is None and self.rng.random() < 0.1:
                batch.append((side, mask & ~URGENT))        # an event for which there is nothing left
        if self.rng.random() < 0.5:
            batch.reverse()
        for at, (side, ready) in enumerate(batch):
            if not self.tunnel.ended:
                self.handle(side, ready, must_act=at == 0 and ready & self.ends[side].events() == ready)
        return bool(batch)

    def handle(self, side, ready, must_act):
        tunnel, self.now = self.tunnel, self.now + 1
        before, moved, wanted = self.state(), tunnel.moved_at, tunnel.interest()
        look = tunnel.handle(side, ready, self.now)
        after = self.state()
        assert (tunnel.moved_at == self.now) == (after != before) or tunnel.why, "moved_at is for bytes and EOF only"
        assert tunnel.moved_at in (moved, self.now)
        changed = tunnel.interest() != wanted
        assert look or not changed and not tunnel.ended, "the owner was not told to look"
        assert not must_act or after != before or changed or tunnel.ended, "an event that would come for ever"
        self.check()

    def state(self):
        return [(end.read, len(end.sent), end.pipe.done) for end in self.ends]

    def check_interest(self, wanted):
        for mask, end in zip(wanted, self.ends):
            readable, writable = not end.pipe.held and not end.pipe.done, bool(end.back.held)
            assert mask == UNREGISTERED or mask == (READ | URGENT) * readable | WRITE * writable, (mask, readable)
            assert mask != UNREGISTERED or not readable and not writable

    def check(self):
        tunnel = self.tunnel
        for end, sink in (self.ends, self.ends[::-1]):
            pipe = end.pipe
            assert sink.sent == end.stream[:len(sink.sent)], "lost, twice or out of order"
            assert pipe.total == len(sink.sent)
            assert pipe.total + pipe.held == end.read or tunnel.why     # read, and the sink was dead
            assert not pipe.done or end.eof and not pipe.held
            assert sink.oob == [mark for mark in end.marks if mark < len(sink.sent)], "urgent data"
            assert sink.fin == pipe.done or tunnel.ended or sink.dead, "EOF is passed on at once"
            assert len(pipe.chunk) <= max(KERNEL, self.early), "more than one read in hand"
            assert pipe.held or isinstance(pipe.chunk, bytes) and not pipe.chunk, "keeps what it has delivered"
        assert tunnel.ended == (tunnel.up.done and tunnel.down.done or bool(tunnel.why))
        assert tunnel.ended_by or not tunnel.ended

    def judge(self):
        tunnel, ends = self.tunnel, self.ends
        if not self.failed:
            assert all(end.read == end.arrived == len(sink.sent) for end, sink in (ends, ends[::-1]))
            assert tunnel.ended == (ends[0].eof and ends[1].eof) and not tunnel.why
            assert not ends[0].reset_on_close and not ends[1].reset_on_close
        else:
            assert tunnel.ended, "a reset was not noticed"
            if tunnel.why:
                broken = tunnel.why.split(":")[0]
                side = ("client", "remote").index(broken)
                assert ends[side].dead and ends[1 - side].reset_on_close, "a reset must become a reset"
        tunnel.up.close()
        tunnel.down.close()
        assert (KernelPipe.live, splice.parked) == (0, 0)


class ModelTest(unittest.TestCase):
    def test_many_seeds(self):
        first = int(os.environ.get("SEED", 0))
        with model():
            for seed in range(first, first + SEEDS):
                try:
                    Play(seed).run()
                except Exception as exc:
                    raise AssertionError("seed %d: %s" % (seed, exc)) from exc


class TunnelTest(unittest.TestCase):
    def setUp(self):
        stack = contextlib.ExitStack()
        self.addCleanup(stack.close)
        stack.enter_context(model())
        play = Play(0)
        self.client, self.remote = play.ends
        self.client.rng.random = lambda: 0.9            # nothing by halves
        self.client.arrived = self.client.read = 0
        self.tunnel = Tunnel(self.client, self.remote, idle_s=60, half_closed_s=10)
        self.client.pipe = self.remote.back = self.tunnel.up
        self.remote.pipe = self.client.back = self.tunnel.down

    def test_limits(self):
        self.assertEqual((self.tunnel.limit(), self.tunnel.deadline()), ((60, "idle"), 60))
        self.client.arrive(SMALL - 1)
        self.tunnel.handle(CLIENT, READ, 7.0)
        self.assertEqual(self.tunnel.deadline(), 67)
        self.client.finish()
        self.tunnel.handle(CLIENT, READ, 9.0)
        self.assertEqual((self.tunnel.limit(), self.tunnel.deadline()), ((10, "half-closed"), 19))
        self.tunnel.expire()
        self.assertEqual((self.tunnel.ended, self.tunnel.ended_by, self.tunnel.why),
                         (True, "half-closed", "nothing moved for 10 s"))
        self.assertTrue(self.client.reset_on_close and self.remote.reset_on_close)
        self.assertEqual(Tunnel(self.client, self.remote).deadline(), float("inf"))

    def test_events_without_bytes_do_not_count_as_activity(self):
        for events in (READ, URGENT, WRITE, READ | WRITE):
            self.tunnel.handle(REMOTE, events, 50.0)
        self.assertEqual(self.tunnel.moved_at, 0)

    def busy_after(self, *sizes, every_s=0.001):
        """How many reads, of these sizes, it takes until the owner looks and finds it busy."""
        self.remote.room = sum(sizes)
        for turn, size in enumerate(sizes):
            self.client.arrive(size)
            if self.tunnel.handle(CLIENT, READ, 1.0 + turn * every_s) and self.tunnel.busy():
                return turn + 1
        return None

    def test_busy_after_some_large_reads(self):
        self.assertEqual(self.busy_after(*[CHUNK] * 20), BUSY_READS + 1)

    def test_busy_whatever_comes_between_large_reads(self):
        """On loopback 3 * 65483 bytes come at a time: two buffers full, and less than a third."""
        self.assertEqual(self.busy_after(*[CHUNK, CHUNK, CHUNK - 1, 1] * 20), BUSY_READS + 2)

    def test_busy_without_one_full_read(self):
        self.assertEqual(self.busy_after(*[CHUNK - 1] * 20), BUSY_READS + 1)

    def test_not_busy_with_small_messages(self):
        self.assertIsNone(self.busy_after(*[LARGE - 1] * 200))

    def test_not_busy_with_large_messages_now_and_then(self):
        self.assertIsNone(self.busy_after(*[CHUNK] * 20, every_s=BUSY_S / 2))

    def test_the_shutdown_that_wakes_an_aborted_tunnel_is_no_eof(self):
        """A download that is cut off must not look complete."""
        self.tunnel.aborted = "server stopped"
        self.remote.finish()
        self.tunnel.handle(REMOTE, READ, 1.0)
        self.assertEqual((self.tunnel.ended_by, self.client.fin, self.client.reset_on_close),
                         ("server stopped", False, True))

    def test_a_side_that_is_closed_both_ways_is_watched_no_longer(self):
        self.remote.finish()
        self.tunnel.handle(REMOTE, READ, 1.0)               # EOF goes to the client
        self.remote.room = 0
        self.client.arrive(CHUNK)
        self.tunnel.handle(CLIENT, READ, 2.0)               # stuck
        self.client.finish()
        self.assertEqual(self.client.events() & HANG_UP, HANG_UP)
        self.tunnel.handle(CLIENT, HANG_UP, 3.0)
        self.assertEqual(self.tunnel.interest(), (UNREGISTERED, WRITE))
        self.remote.take(100)
        self.tunnel.handle(REMOTE, WRITE, 4.0)
        self.assertEqual(self.tunnel.interest()[0], READ | URGENT)
        self.tunnel.handle(CLIENT, READ | HANG_UP, 5.0)
        self.assertEqual((self.tunnel.ended, self.tunnel.why, bytes(self.remote.sent)),
                         (True, "", bytes(self.client.stream[:CHUNK])))

    def test_a_message_goes_on_in_one_piece(self):
        sends = []
        send = self.remote.send
        self.remote.send = lambda data, flags: sends.append(len(data)) or send(data, flags)
        for size in (SMALL - 1, SMALL, SMALL + 1, SMALL - 1, CHUNK):
            self.client.arrive(size)
            self.assertFalse(self.tunnel.handle(CLIENT, READ, 1.0) and self.tunnel.up.held)
            self.assertEqual(self.tunnel.up.small, size < SMALL, "what the next read will be")
        self.assertEqual(sends, [SMALL - 1, SMALL, SMALL + 1, SMALL - 1, CHUNK])

    def test_what_came_before_a_reset_is_passed_on(self):
        self.client.arrive(SMALL)
        recv = self.client.recv_into
        self.client.recv_into = lambda *args: self.client.fail() or recv(*args)
        self.assertTrue(self.tunnel.handle(CLIENT, READ, 1.0))
        self.assertEqual((len(self.remote.sent), self.tunnel.up.total, self.tunnel.why, self.remote.reset_on_close),
                         (SMALL, SMALL, "client: reset", True))

    def test_a_kernel_pipe_that_was_emptied_is_nothing_to_look_at(self):
        self.tunnel.up.use_kernel()
        self.remote.room = KERNEL
        self.client.arrive(KERNEL + 1)
        self.assertFalse(self.tunnel.handle(CLIENT, READ, 1.0))
        self.assertEqual((len(self.remote.sent), self.tunnel.moved_at), (KERNEL, 1.0))
        self.assertTrue(self.tunnel.handle(CLIENT, READ, 2.0), "something is in hand")
        self.remote.take(2)
        self.tunnel.handle(REMOTE, WRITE, 3.0)
        self.client.finish()
        self.assertTrue(self.tunnel.handle(CLIENT, READ, 4.0), "EOF")

    def test_what_stalled_kernel_pipes_held_is_counted_until_it_is_delivered(self):
        up = self.tunnel.up
        self.remote.room = 1
        self.client.arrive(KERNEL)
        up.use_kernel()
        self.tunnel.handle(CLIENT, READ, 1.0)
        up.leave_kernel()
        self.assertEqual((splice.parked, KernelPipe.live), (KERNEL - 1, 0))
        self.remote.take(10)
        self.tunnel.handle(REMOTE, WRITE, 2.0)
        self.assertEqual(splice.parked, KERNEL - 1)         # the memory is free when all of it is gone
        self.remote.take(KERNEL)
        self.tunnel.handle(REMOTE, WRITE, 3.0)
        self.assertEqual((splice.parked, up.total, up.chunk), (0, KERNEL, b""))
