"""The lookup service: fair turns, limits, what is remembered, and requests that wait for a name."""
import contextlib
import errno
import select
import socket
import threading
import time
import unittest
from ipaddress import IPv4Address
from queue import Empty, SimpleQueue
from unittest import mock

from socks5.net import lookups as module
from socks5.net import resolver
from socks5.net.lookups import Busy, Names, Waiting
from socks5.net.poller import SelectPoll, new_poll
from socks5.net.wakeup import Wakeup
from socks5.protocol.codes import Cmd, Rep
from socks5.protocol.errors import RequestRefused
from socks5.protocol.messages import Datagram
from socks5.server import handler
from tests import support
from tests.support import PATIENCE_S, wait_until

FOUND = IPv4Address("127.0.0.1")
real_getaddrinfo = socket.getaddrinfo


class Resolver:
    """Takes the place of the system's: names under .test hang until they are let go; "quick" and "bad" ones do not."""

    def __init__(self):
        self.asked = []
        self.news = threading.Condition()
        self.let_go = set()
        self.all = False

    def getaddrinfo(self, host, *args, **kwargs):
        name = host if isinstance(host, bytes) else host.encode()
        if not name.endswith(b".test"):
            return real_getaddrinfo(host, *args, **kwargs)
        with self.news:
            self.asked.append(name)
            self.news.notify_all()
            quick = name.startswith((b"quick", b"bad"))
            self.news.wait_for(lambda: quick or self.all or name in self.let_go, PATIENCE_S)
        if name.startswith(b"bad"):
            raise socket.gaierror(socket.EAI_NONAME, "no such name")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (str(FOUND), 0))]

    def answer(self, *names):
        """For these names, or for all from now on."""
        with self.news:
            self.let_go.update(names)
            self.all = self.all or not names
            self.news.notify_all()

    def wait_asked(self, number):
        """The names that were looked up, as soon as there are `number` of them."""
        with self.news:
            assert self.news.wait_for(lambda: len(self.asked) >= number, PATIENCE_S), (number, self.asked)
            return list(self.asked)


def lookup_threads():
    return [thread for thread in threading.enumerate() if thread.name == "names"]


class LookupCase(unittest.TestCase):
    def setUp(self):
        self.resolver = Resolver()
        bugs = []
        self.addCleanup(self.assertEqual, bugs, [])
        for patch in (mock.patch("socket.getaddrinfo", self.resolver.getaddrinfo),
                      mock.patch("threading.excepthook", bugs.append), mock.patch.object(module, "REST_S", 0.02)):
            patch.start()
            self.addCleanup(patch.stop)
        self.addCleanup(wait_until, lambda: not lookup_threads(), "the lookup threads end")
        self.addCleanup(self.resolver.answer)
        self.told = []
        self.names = Names()

    def tell(self, answer):
        self.told.append((answer.name, list(answer.addresses)))

    def ask(self, name, client="one", tell=None):
        return self.names.ask(name, client, tell or self.tell)

    def hang(self, client, number, prefix=b""):
        """Have `number` names that hang looked up for this client."""
        for at in range(number):
            self.assertIsNone(self.ask(b"%shang%d.%s.test" % (prefix, at, client.encode()), client))


class Answers(LookupCase):
    def test_every_asker_is_told_and_the_resolver_asked_once(self):
        for client in ("one", "one", "two"):
            self.assertIsNone(self.ask(b"name.test", client))
        self.resolver.answer()
        wait_until(lambda: len(self.told) == 3)
        self.assertEqual((self.told, self.resolver.asked), ([(b"name.test", [FOUND])] * 3, [b"name.test"]))
        self.assertEqual(self.ask(b"name.test").addresses, (FOUND,))
        self.assertEqual(len(self.told), 3)

    def test_failures_are_remembered_for_a_shorter_time(self):
        self.assertIsNone(self.ask(b"bad.test"))
        wait_until(lambda: self.told)
        self.assertEqual(self.told, [(b"bad.test", [])])
        self.assertEqual(self.ask(b"bad.test").addresses, ())
        later = module.monotonic() + resolver.FAILURE_S + 1
        with mock.patch.object(module, "monotonic", lambda: later):
            self.assertIsNone(self.ask(b"bad.test"))
        wait_until(lambda: len(self.told) == 2)

    def test_what_may_be_over_at_once_is_not_remembered(self):
        with mock.patch("socket.getaddrinfo", side_effect=socket.gaierror(socket.EAI_AGAIN, "no server")):
            self.assertIsNone(self.ask(b"quick.test"))
            wait_until(lambda: self.told)
        self.assertIsNone(self.ask(b"quick.test"))
        wait_until(lambda: len(self.told) == 2)
        self.assertEqual(self.told, [(b"quick.test", []), (b"quick.test", [FOUND])])

    def test_answers_are_bounded(self):
        with mock.patch.object(module, "ANSWERS", 10):
            for number in range(30):
                self.ask(b"quick%d.test" % number)
            wait_until(lambda: len(self.told) == 30)
        self.assertLessEqual(len(self.names._known), 10)

    def test_a_name_that_is_looked_up_anew_is_the_newest(self):
        with mock.patch.object(module, "ANSWERS", 3):
            for count, name in enumerate((b"quick1.test", b"quick2.test", b"quick3.test", b"quick2.test"), 1):
                self.names._join(name, "one", self.tell)
                wait_until(lambda: len(self.told) == count)
        self.assertEqual(list(self.names._known), [b"quick1.test", b"quick3.test", b"quick2.test"])


class Turns(LookupCase):
    def test_one_client_holds_no_more_than_its_share_of_the_threads(self):
        self.hang("one", module.PER_CLIENT + 5)
        self.assertIsNone(self.ask(b"quick.test", "two"))
        wait_until(lambda: self.told)
        self.assertEqual(self.told, [(b"quick.test", [FOUND])])
        self.assertEqual(len(self.resolver.asked), module.PER_CLIENT + 1)

    def test_when_several_hold_all_they_may_newcomers_have_a_reserve(self):
        clients = ["client %d" % number for number in range(4 + module.RESERVE)]
        for client in clients:
            self.hang(client, module.PER_CLIENT)
        held = [sum(name.endswith(b"." + client.encode() + b".test")
                    for name in self.resolver.wait_asked(module.THREADS)) for client in clients]
        self.assertEqual(held, [module.PER_CLIENT] * 3 + [8] + [1] * module.RESERVE)

    def test_the_client_with_the_fewest_lookups_is_next(self):
        with mock.patch.multiple(module, THREADS=4, PER_CLIENT=2, RESERVE=1):
            self.hang("one", 3)
            self.hang("two", 3)
            self.assertEqual(self.resolver.wait_asked(3), [b"hang0.one.test", b"hang1.one.test", b"hang0.two.test"])
            self.hang("three", 1)                               # from the reserve
            self.hang("four", 1)                                # has to wait, but less than the others
            self.resolver.wait_asked(4)
            self.resolver.answer(b"hang0.one.test")
            self.assertEqual(self.resolver.wait_asked(5)[4], b"hang0.four.test")
            self.resolver.answer(b"hang1.one.test")             # it holds none now, and is served from the reserve
            self.assertEqual(self.resolver.wait_asked(6)[5], b"hang2.one.test")

    def test_of_two_clients_with_lookups_under_way_the_one_with_fewer_is_next(self):
        with mock.patch.multiple(module, THREADS=4, PER_CLIENT=3, RESERVE=0):
            self.hang("one", 4)
            self.hang("two", 2)
            self.resolver.wait_asked(4)
            self.resolver.answer(b"hang0.one.test")
            self.assertEqual(self.resolver.wait_asked(5)[4], b"hang1.two.test")

    def test_a_popular_name_does_not_wait_behind_the_queue_of_another(self):
        self.hang("one", module.PER_CLIENT)
        self.ask(b"quick.test", "one")
        self.ask(b"quick.test", "two")
        wait_until(lambda: len(self.told) == 2)
        self.assertEqual(self.resolver.asked.count(b"quick.test"), 1)

    def test_a_name_that_nothing_waits_for_is_not_looked_up(self):
        self.hang("one", module.PER_CLIENT)
        for number in range(50):
            self.ask(b"late%d.test" % number)
        for number in range(49):
            self.names.drop(b"late%d.test" % number, "one", self.tell)
        self.resolver.answer()
        wait_until(lambda: len(self.told) == module.PER_CLIENT + 1)
        self.assertEqual([name for name in self.resolver.asked if name.startswith(b"late")], [b"late49.test"])
        self.assertEqual((self.names._askers, self.names._queues, self.names._running), ({}, {}, {}))

    def test_a_name_that_another_request_of_the_client_waits_for_is_still_looked_up(self):
        self.hang("one", module.PER_CLIENT)
        other = []
        self.ask(b"quick.test")
        self.ask(b"quick.test", tell=other.append)
        self.names.drop(b"quick.test", "one", self.tell)
        self.resolver.answer(b"hang0.one.test")
        wait_until(lambda: other)
        self.assertEqual(self.told, [(b"hang0.one.test", [FOUND])])

    def test_a_name_that_another_client_waits_for_is_still_looked_up(self):
        with mock.patch.multiple(module, THREADS=2, PER_CLIENT=1, RESERVE=0):
            self.hang("one", 1)
            self.hang("two", 1)
            for client in ("one", "two"):
                self.ask(b"quick.test", client)
            self.names.drop(b"quick.test", "one", self.tell)
            self.names.drop(b"quick.test", "one", self.tell)    # once more changes nothing
            self.resolver.answer(b"hang0.two.test")
            wait_until(lambda: len(self.told) == 2)
            self.assertEqual(self.told[1], (b"quick.test", [FOUND]))

    def test_a_lookup_under_way_stays_on_the_account_of_a_client_that_left(self):
        self.hang("one", module.PER_CLIENT)
        for at in range(module.PER_CLIENT):
            self.names.drop(b"hang%d.one.test" % at, "one", self.tell)
        self.ask(b"quick.test", "one")
        self.ask(b"quick2.test", "two")
        wait_until(lambda: self.told)
        self.assertEqual(self.told, [(b"quick2.test", [FOUND])])

    def test_names_of_one_client_are_bounded(self):
        with mock.patch.object(module, "QUEUED_NAMES", 20):
            self.hang("one", module.PER_CLIENT + 20)
            with self.assertRaises(Busy):
                self.ask(b"one.more.test")
            self.assertIsNone(self.ask(b"quick.test", "two"))
            self.resolver.answer()
            wait_until(lambda: len(self.told) == module.PER_CLIENT + 21)
            self.assertIsNone(self.ask(b"one.more.test"))

    def test_threads_end_when_there_is_no_work(self):
        for turn in range(3):
            for number in range(20):
                self.ask(b"quick%d-%d.test" % (turn, number))
            wait_until(lambda: not lookup_threads())
            self.assertEqual((self.names._idle, len(self.told)), ([], 20 * (turn + 1)))

    def test_a_thread_that_a_name_is_meant_for_waits_for_it(self):
        """Its time without work may be over in the moment in which it gets some."""
        class Work(SimpleQueue):
            def get(work, block=True, timeout=None):
                if timeout is not None:
                    if len(self.told) < 10:
                        self.ask(b"quick%d.test" % len(self.told))
                    raise Empty
                return super().get()

        with mock.patch.object(module, "SimpleQueue", Work):
            self.ask(b"quick.test")
            wait_until(lambda: len(self.told) == 10)
        wait_until(lambda: not lookup_threads())
        self.assertEqual(self.names._idle, [])

    def test_without_a_thread_it_says_so(self):
        with mock.patch.object(module, "Thread", side_effect=RuntimeError("can't start new thread")):
            with self.assertRaises(Busy):
                self.ask(b"quick.test")
            with self.assertRaises(RequestRefused) as caught:
                self.names.resolve(b"quick.test", float("inf"), None, "one")
            self.assertEqual(caught.exception.rep, Rep.GENERAL_FAILURE)
        self.assertEqual((self.names._askers, self.names._queues, self.names._running), ({}, {}, {}))
        self.assertIsNone(self.ask(b"quick.test"), "and tries again the next time")
        wait_until(lambda: self.told)

    def test_without_a_second_thread_the_first_does_all(self):
        self.hang("one", 1)
        with mock.patch.object(module, "Thread", side_effect=RuntimeError("can't start new thread")):
            for client in ("one", "two"):
                for number in range(3):
                    self.assertIsNone(self.ask(b"quick%d.test" % number, client))
            self.resolver.answer()
            wait_until(lambda: len(self.told) == 7)


class Requests(LookupCase):
    """Names.resolve, as a handler calls it."""

    def refusal(self, name, deadline=float("inf"), connection=None):
        with self.assertRaises(RequestRefused) as caught:
            self.names.resolve(name, deadline, connection, "one")
        return caught.exception.rep, caught.exception.why

    def test_what_it_gives(self):
        self.assertEqual(self.names.resolve(FOUND, 0.0, None, "one"), [FOUND])
        for _ in range(2):
            self.assertEqual(list(self.names.resolve(b"quick.test", float("inf"), None, "one")), [FOUND])
            self.assertEqual(self.refusal(b"bad.test"),
                             (Rep.HOST_UNREACHABLE, "'bad.test' does not resolve: [Errno -2] no such name"))
        self.assertEqual(sorted(self.resolver.asked), [b"bad.test", b"quick.test"])

    def test_time_is_limited(self):
        for poll in (module.new_poll, SelectPoll):
            with self.subTest(poll), mock.patch.object(module, "new_poll", poll):
                rep, why = self.refusal(b"hang.test", time.monotonic() + 0.05)
                self.assertEqual(rep, Rep.HOST_UNREACHABLE)
                self.assertRegex(why, r"'hang.test' did not resolve within 0\.0\d* s")
        self.assertEqual(self.names._askers, {b"hang.test": []})

    def test_a_client_that_resets_ends_it_and_one_that_only_shuts_its_side_does_not(self):
        with socket.create_server(("127.0.0.1", 0)) as listener, support.dial(listener.getsockname()) as client:
            with listener.accept()[0] as ours, contextlib.ExitStack() as stack:
                polled = threading.Event()

                class Poll:
                    def __init__(self):
                        self.poll_object = new_poll()
                        self.register = self.poll_object.register

                    def poll(self, timeout):
                        polled.set()
                        return self.poll_object.poll(timeout)

                stack.enter_context(mock.patch.object(module, "new_poll", Poll))
                outcome = []

                def resolve():
                    try:
                        self.names.resolve(b"hang.test", time.monotonic() + PATIENCE_S, ours, "one")
                    except Exception as exc:
                        outcome.append(exc)

                thread = threading.Thread(target=resolve)
                thread.start()
                self.assertTrue(polled.wait(PATIENCE_S))
                client.shutdown(socket.SHUT_WR)
                self.assertEqual(ours.recv(1), b"")
                self.assertTrue(thread.is_alive())
                support.reset(client)
                thread.join(PATIENCE_S)
                self.assertFalse(thread.is_alive())
                self.assertEqual([type(exc) for exc in outcome], [ConnectionResetError])
                self.assertEqual(outcome[0].strerror, "client left before 'hang.test' resolved")

    def test_without_a_descriptor_to_wait_with(self):
        with mock.patch.object(module, "Wakeup", side_effect=OSError(errno.EMFILE, "Too many open files")):
            self.assertEqual(self.refusal(b"hang.test"),
                             (Rep.GENERAL_FAILURE, "'hang.test' is not looked up: EMFILE"))
            self.assertEqual(self.names._askers, {b"hang.test": []})
            with mock.patch.object(module, "SOON_S", PATIENCE_S):
                self.assertEqual(list(self.names.resolve(b"quick.test", float("inf"), None, "one")), [FOUND])

    def test_an_answer_that_comes_while_the_descriptor_is_made(self):
        class Late(Wakeup):
            def __init__(wakeup):
                self.resolver.answer()
                wait_until(lambda: not lookup_threads())
                super().__init__()

        with mock.patch.object(module, "Wakeup", Late), mock.patch.object(module, "SOON_S", 0.0), \
                mock.patch.object(self.names, "_watch", side_effect=AssertionError("nothing sets this one")):
            found = self.names.resolve(b"hang.test", time.monotonic() + PATIENCE_S, None, "one")
            self.assertEqual(list(found), [FOUND])

    def test_an_answer_that_comes_late_wakes_the_handler(self):
        real_watch = self.names._watch

        def watch(wakeup, *others):
            self.resolver.answer()
            self.assertTrue(select.select([wakeup], [], [], PATIENCE_S)[0])
            real_watch(wakeup, *others)

        with mock.patch.object(module, "SOON_S", 0.0), mock.patch.object(self.names, "_watch", watch):
            self.assertEqual(list(self.names.resolve(b"hang.test", float("inf"), None, "one")), [FOUND])


class WaitingTest(LookupCase):
    def waiting(self):
        self.woken = threading.Event()
        waiting = Waiting(self.names, "one", self.woken.set)
        self.addCleanup(waiting.close)
        return waiting

    def test_items_come_back_with_their_addresses_in_order(self):
        waiting = self.waiting()
        for item in ("one", "two"):
            self.assertIsNone(waiting.ask(b"name.test", item, 10))
        self.resolver.answer()
        self.assertTrue(self.woken.wait(PATIENCE_S))
        self.assertEqual([(item, answer.addresses) for item, answer in waiting.take()],
                         [("one", (FOUND,)), ("two", (FOUND,))])
        self.assertEqual(list(waiting.take()), [])
        self.assertEqual(waiting.ask(b"name.test", "three", 10).addresses, (FOUND,), "known by now")

    def test_what_waits_is_bounded(self):
        cases = [("names", [b"name%d.test" % number for number in range(module.WAITING_NAMES)], 1, b"other.test", 1),
                 ("items", [b"name.test"] * module.WAITING_ITEMS, 1, b"name.test", 1),
                 ("bytes", [b"name.test"] * 4, module.WAITING_BYTES // 4, b"name.test", 1)]
        for what, names, size, one_more, its_size in cases:
            waiting = self.waiting()
            with self.subTest(what):
                for name in names:
                    self.assertIsNone(waiting.ask(name, "item", size))
                with self.assertRaises(Busy):
                    waiting.ask(one_more, "one more", its_size)

    def test_close_drops_what_is_queued(self):
        self.hang("one", module.PER_CLIENT)
        waiting = self.waiting()
        waiting.ask(b"name.test", "item", 1)
        waiting.close()
        self.assertNotIn(b"name.test", self.names._askers)

    def test_an_answer_after_close_is_dropped(self):
        waiting = self.waiting()
        waiting.ask(b"name.test", "item", 1)
        self.ask(b"name.test")
        waiting.close()
        self.resolver.answer()
        wait_until(lambda: self.told)
        self.assertEqual((waiting._answers, self.woken.is_set()), ([], False))


class Attacks(LookupCase):
    """Through a server, from two addresses."""

    def connect(self, server, host, port, source):
        sock = socket.create_connection(server.server_address, PATIENCE_S, (source, 0))
        self.addCleanup(sock.close)
        support.negotiate(sock)
        sock.sendall(b"\5\1\0\3" + bytes([len(host)]) + host + port.to_bytes(2, "big"))
        return sock

    def test_32_associations_with_8_silent_names_each_stop_nobody_else(self):
        with support.running(listen=("127.0.0.1",)) as server, contextlib.ExitStack() as stack:
            there = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
            there.bind(("127.0.0.1", 0))
            there.settimeout(PATIENCE_S)
            for number in range(32):
                sock, relay = self.associate(stack, server, "127.0.0.2")
                for name in range(8):
                    sock.sendto(self.datagram(b"hang%d-%d.test" % (number, name), 9), relay)
            self.resolver.wait_asked(module.PER_CLIENT)
            sock, relay = self.associate(stack, server, "127.0.0.1")
            sock.sendto(self.datagram(b"quick.test", there.getsockname()[1]), relay)
            self.assertEqual(there.recv(100), b"x")
            with support.target() as (host, port):
                ours = self.connect(server, b"quick.test", port, "127.0.0.1")
                self.assertEqual(support.reader_of(ours)(2), b"\5\0")
            self.assertEqual(sum(name.startswith(b"hang") for name in self.resolver.asked), module.PER_CLIENT)
            stack.close()
            wait_until(lambda: not server.names._queues, "queued names go with their associations")
            self.assertEqual(sum(name.startswith(b"hang") for name in self.resolver.asked), module.PER_CLIENT)

    def associate(self, stack, server, source):
        control = stack.enter_context(socket.create_connection(server.server_address, PATIENCE_S, (source, 0)))
        support.negotiate(control)
        reply = support.ask(control, Cmd.UDP_ASSOCIATE, "0.0.0.0", 0)
        sock = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        sock.bind((source, 0))
        return sock, ("127.0.0.1", reply.bnd.port)

    @staticmethod
    def datagram(name, port):
        return Datagram(support.address(name, port), b"x").pack()

    def test_clients_that_reset_during_a_hanging_lookup_free_their_places_at_once(self):
        with support.running() as server:
            socks = [self.connect(server, b"hang%d.test" % number, 80, "127.0.0.1") for number in range(40)]
            wait_until(lambda: len(self.names_of(server)) == 40, "all are waiting")
            for sock in socks:
                support.reset(sock)
            wait_until(lambda: not len(server.sessions), "all sessions have ended")
            self.assertEqual(len(self.resolver.asked), module.PER_CLIENT)

    @staticmethod
    def names_of(server):
        return dict(server.names._askers)

    def test_the_connect_timeout_begins_with_the_lookup(self):
        for cmd in (Cmd.CONNECT, Cmd.BIND):
            with self.subTest(cmd.name), support.running(connect_timeout=0.1) as server:
                with self.assertLogs("socks5.server", "INFO") as logs:
                    with support.dial(server.server_address) as sock:
                        support.negotiate(sock)
                        self.assertEqual(support.ask(sock, cmd, b"hang.test", 80).rep, Rep.HOST_UNREACHABLE)
                    wait_until(lambda: not len(server.sessions))
                self.assertRegex(logs.output[-1], r"did not resolve within 0\.\d+ s")

    def test_what_the_lookup_has_taken_is_missing_when_connect_dials(self):
        for took in (0, 23, 40):
            began, passed, dialled = time.monotonic(), [], []

            def getaddrinfo(host, *args, **kwargs):
                if "quick" in str(host):                    # not the client's own, for its connection
                    passed.append(took)
                return self.resolver.getaddrinfo(host, *args, **kwargs)

            def connect(addresses, port, deadline, *args):
                dialled.append(deadline - began)
                raise RequestRefused(Rep.TTL_EXPIRED, "as far as this test goes")

            with self.subTest(took), mock.patch("socket.getaddrinfo", getaddrinfo), \
                    mock.patch.object(handler, "monotonic", lambda: began + sum(passed)), \
                    mock.patch.object(handler, "connect", connect), \
                    support.running(connect_timeout=30) as server, support.dial(server.server_address) as sock:
                support.negotiate(sock)
                self.assertEqual(support.ask(sock, Cmd.CONNECT, b"quick.test", 80).rep, Rep.TTL_EXPIRED)
                self.assertEqual((passed, [round(left, 3) for left in dialled]), ([took], [30.0]), "before the lookup")
