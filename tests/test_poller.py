"""net/poller.py: what stands in for poll() says of real sockets what poll() says; and the pollers of an event loop."""
import contextlib
import select
import socket
import threading
import unittest
from unittest import mock

from socks5.net.poller import (BROKEN, HANG_UP, READ, URGENT, WRITE, EpollPoller, PollPoller, SelectPoll, new_poll,
                               new_poller)
from tests.support import PATIENCE_S, Case, closed_port, need, reset, udp_socket


class SocketsTest(Case):
    def pair(self):
        """Two ends of a TCP connection."""
        with socket.create_server(("127.0.0.1", 0)) as listener:
            near = self.enter(socket.create_connection(listener.getsockname(), PATIENCE_S))
            far = self.enter(listener.accept()[0])
        far.settimeout(PATIENCE_S)
        return near, far


class States(SocketsTest):
    """Sockets in every state that a relay, a listener or a connect meets; each is (socket, what is ready)."""

    def quiet(self):
        return self.pair()[0], WRITE

    def something_to_read(self):
        near, far = self.pair()
        far.sendall(b"x")
        near.recv(1, socket.MSG_PEEK)                       # it has come
        return near, READ | WRITE

    def eof(self):
        near, far = self.pair()
        far.shutdown(socket.SHUT_WR)
        near.recv(1, socket.MSG_PEEK)
        return near, READ | WRITE

    def closed_both_ways(self):
        near, far = self.pair()
        near.shutdown(socket.SHUT_WR)
        far.close()
        near.recv(1)
        return near, READ | WRITE

    def was_reset(self):
        near, far = self.pair()
        reset(far)
        with contextlib.suppress(ConnectionError):
            near.recv(1, socket.MSG_PEEK)
        return near, READ | WRITE

    def full(self):
        near, _far = self.pair()
        near.setblocking(False)
        quiet = 0
        while quiet < 3:                                    # what is under way to the other side makes room again
            try:
                near.send(bytes(1 << 20))
                quiet = 0
            except BlockingIOError:
                quiet += not select.select([], [near], [], 0.02)[1]
        return near, 0

    def listener_alone(self):
        return self.enter(socket.create_server(("127.0.0.1", 0))), 0

    def listener_with_a_caller(self):
        listener, _ready = self.listener_alone()
        self.enter(socket.create_connection(listener.getsockname(), PATIENCE_S))
        return listener, READ

    def refused(self):
        sock = self.enter(socket.socket())
        sock.setblocking(False)
        sock.connect_ex(("127.0.0.1", closed_port()))
        select.select([], [sock], [sock], PATIENCE_S)
        return sock, READ | WRITE

    def datagram(self):
        ours = self.enter(udp_socket())
        ours.sendto(b"", ours.getsockname())                # an empty one is something to read
        ours.recv(1, socket.MSG_PEEK)
        return ours, READ | WRITE

    STATES = [quiet, something_to_read, eof, closed_both_ways, was_reset, full, listener_alone, listener_with_a_caller,
              refused, datagram]
    ENDED = [closed_both_ways, was_reset, refused]

    def test_each(self):
        for state in self.STATES:
            sock, ready = state(self)
            for wanted in (READ, WRITE, READ | WRITE, 0)[:3 if "listener" in state.__name__ else 4]:
                with self.subTest("%s, asked for %d" % (state.__name__, wanted)):
                    ours = SelectPoll()
                    ours.register(sock.fileno(), wanted)
                    found = dict(ours.poll(0))
                    told = ready & wanted or (not wanted and state in self.ENDED) * (BROKEN | HANG_UP)
                    self.assertEqual(found, {sock.fileno(): told} if told else {})

    def test_the_third_set_is_told_as_broken(self):
        """On Windows a refused connect is there and nowhere else; here, what came out of band is."""
        near, far = self.pair()
        far.send(b"!", socket.MSG_OOB)
        select.select([], [], [near], PATIENCE_S)
        poll = SelectPoll()
        poll.register(near.fileno(), WRITE)
        self.assertEqual(poll.poll(PATIENCE_S * 1000), [(near.fileno(), WRITE | BROKEN)])
        poll.register(900, URGENT)
        poll.register(901, WRITE)
        with mock.patch.object(select, "select", return_value=([], [], [900, 901])):
            self.assertEqual(poll.poll(0), [(900, URGENT), (901, BROKEN)])


class Methods(SocketsTest):
    def polls(self):
        yield "SelectPoll", SelectPoll()
        if hasattr(select, "poll"):
            yield "poll", select.poll()

    def test_modify_and_unregister(self):
        for name, poll in self.polls():
            with self.subTest(name):
                near, _far = self.pair()
                fd = near.fileno()
                poll.register(fd, READ)
                self.assertEqual(poll.poll(0), [])
                poll.modify(fd, READ | WRITE)
                self.assertEqual(poll.poll(0), [(fd, WRITE)])
                poll.register(fd, READ)                     # again is as good as modify
                self.assertEqual(poll.poll(0), [])
                poll.modify(fd, WRITE)
                poll.unregister(fd)
                self.assertEqual(poll.poll(0), [])
                self.assertRaises(KeyError, poll.unregister, fd)

    def test_a_time_out_ends_it(self):
        for name, poll in self.polls():
            near, _far = self.pair()
            poll.register(near.fileno(), READ)
            for timeout_ms in (0, 1, 0.5, 20.0):
                with self.subTest("%s, %s ms" % (name, timeout_ms)):
                    self.assertEqual(poll.poll(timeout_ms), [])

    def test_a_time_out_is_in_milliseconds(self):
        with mock.patch.object(select, "select", return_value=([], [], [])) as asked:
            for timeout_ms, timeout_s in ((None, None), (0, 0), (1500, 1.5), (0.5, 0.0005)):
                with self.subTest(str(timeout_ms)):
                    SelectPoll().poll(timeout_ms)
                    self.assertEqual(asked.call_args[0][3], timeout_s)

    def test_without_one_it_waits_for_the_event(self):
        for name, poll in self.polls():
            with self.subTest(name):
                near, far = self.pair()
                poll.register(near.fileno(), READ)
                found = []
                waiter = threading.Thread(target=lambda: found.extend(poll.poll()), daemon=True)
                waiter.start()
                self.assertEqual(found, [])
                far.sendall(b"x")
                waiter.join(PATIENCE_S)
                self.assertEqual(found, [(near.fileno(), READ)])

    def test_which_one_we_are_given(self):
        if hasattr(select, "poll"):
            self.assertIsInstance(new_poll(), type(select.poll()))
            with mock.patch.object(select, "poll"):
                del select.poll
                self.assertIsInstance(new_poll(), SelectPoll)
        else:
            self.assertIsInstance(new_poll(), SelectPoll)

    @unittest.skipUnless(hasattr(select, "poll"), "select() has this limit")
    def test_descriptors_beyond_what_select_can_take(self):
        import fcntl
        import resource
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        need(self, hard == resource.RLIM_INFINITY or hard > 1100, "a limit beyond 1100 descriptors")
        if soft != resource.RLIM_INFINITY and soft <= 1100:
            resource.setrlimit(resource.RLIMIT_NOFILE, (1101, hard))
            self.addCleanup(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
        near, _far = self.pair()
        high = self.enter(socket.socket(fileno=fcntl.fcntl(near.fileno(), fcntl.F_DUPFD, 1024)))
        poll = new_poll()
        poll.register(high.fileno(), WRITE)
        self.assertEqual(poll.poll(0), [(high.fileno(), WRITE)])
        low = SelectPoll()
        self.assertRaises(OSError, low.register, high.fileno(), WRITE)     # poll() would raise ValueError for ever
        self.assertEqual(low.poll(0), [])

    def test_the_numbers_are_the_systems(self):
        for ours, name in ((READ, "POLLIN"), (URGENT, "POLLPRI"), (WRITE, "POLLOUT"), (BROKEN, "POLLERR"),
                           (HANG_UP, "POLLHUP")):
            with self.subTest(name):
                self.assertEqual(ours, getattr(select, name, ours))


class Pollers(SocketsTest):
    """What an event loop waits with: other threads may add to it."""

    def pollers(self):
        kinds = [("epoll", EpollPoller, ())] if hasattr(select, "epoll") else []
        kinds += [("poll", PollPoller, ()), ("select", PollPoller, ("poll",))]
        for name, kind, without in kinds:
            with self.subTest(name), contextlib.ExitStack() as stack:
                for what in without:
                    if hasattr(select, what):
                        stack.enter_context(mock.patch.object(select, what))
                        delattr(select, what)
                yield stack.enter_context(contextlib.closing(kind()))

    def test_methods(self):
        for poller in self.pollers():
            near, far = self.pair()
            fd = near.fileno()
            poller.register(fd, READ)
            self.assertEqual(poller.poll(0), [])
            poller.modify(fd, READ | WRITE)
            self.assertEqual(poller.poll(PATIENCE_S), [(fd, WRITE)])
            far.sendall(b"x")
            poller.modify(fd, READ)
            self.assertEqual(poller.poll(PATIENCE_S), [(fd, READ)])
            self.assertEqual(poller.poll(PATIENCE_S), [(fd, READ)], "as long as it is so")
            poller.unregister(fd)
            self.assertEqual(poller.poll(0), [])

    def test_urgent_data(self):
        for poller in self.pollers():
            (near, far), (other, far_other) = self.pair(), self.pair()
            near.setsockopt(socket.SOL_SOCKET, socket.SO_OOBINLINE, 1)
            poller.register(other.fileno(), READ | URGENT)
            poller.register(near.fileno(), URGENT)
            far.send(b"!", socket.MSG_OOB)
            self.assertEqual(poller.poll(PATIENCE_S), [(near.fileno(), URGENT)])
            poller.modify(near.fileno(), READ | URGENT)
            self.assertEqual(poller.poll(PATIENCE_S), [(near.fileno(), READ | URGENT)])
            near.recv(1)
            far_other.send(b"?")
            self.assertEqual(poller.poll(PATIENCE_S), [(other.fileno(), READ)])

    def test_a_wait_under_way_takes_notice_of_what_another_thread_adds(self):
        for poller in self.pollers():
            near = self.pair()[0]
            found = []

            def wait():
                while not found:                            # PollPoller gives nothing when it is woken for that
                    found.extend(poller.poll(PATIENCE_S))
            waiter = threading.Thread(target=wait, daemon=True)
            waiter.start()
            waiter.join(0.05)                               # mostly, it waits by then; if not, the test passes too
            poller.register(near.fileno(), WRITE)
            waiter.join(PATIENCE_S)
            self.assertEqual(found, [(near.fileno(), WRITE)])

    def test_a_reset_is_told_unasked(self):
        """Also behind data that is not read, once the time comes; and its error is left to the owner of the socket."""
        for poller in self.pollers():
            for sent in (b"", b"unread"):
                with self.subTest(poller.__class__.__name__, sent=sent):
                    near, far = self.pair()
                    poller.register(near.fileno(), 0)
                    far.sendall(sent)
                    self.assertEqual(poller.poll(0), [])
                    reset(far)
                    (fd, events), = poller.poll(PATIENCE_S)
                    self.assertEqual((fd, events & (HANG_UP | BROKEN)), (near.fileno(), HANG_UP | BROKEN))
                    self.assertRaises(ConnectionResetError, lambda: [near.recv(9) for _ in range(2)])
                    poller.unregister(fd)

    def test_which_one_we_are_given(self):
        for without, kind in (((), EpollPoller if hasattr(select, "epoll") else PollPoller), (("epoll",), PollPoller)):
            with contextlib.ExitStack() as stack:
                for what in without:
                    if hasattr(select, what):
                        stack.enter_context(mock.patch.object(select, what))
                        delattr(select, what)
                self.assertIsInstance(stack.enter_context(contextlib.closing(new_poller())), kind)
