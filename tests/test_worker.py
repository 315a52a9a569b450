"""orders.py and worker.py: orders over a socket, and what a worker does with them."""
import io
import os
import pickle
import socket
import tempfile
import threading
import unittest
from ipaddress import ip_address
from unittest import mock

from socks5.access.rules import Asker
from socks5.config import Config
from socks5.process import files, orders, worker
from socks5.process.orders import Order, Outbox, pack
from socks5.protocol.codes import Cmd
from tests.support import PATIENCE_S, users_line


class Framing(unittest.TestCase):
    CASES = [(Order.STOP, None), (Order.RELOAD, ("users", "rules" * 1000)), (Order.ABORT, None)]

    def test_orders_come_as_they_were_sent_until_eof(self):
        raw = b"".join(pack(*case) for case in self.CASES)
        self.assertEqual(list(orders.read(io.BytesIO(raw))), self.CASES)

    def test_an_order_that_was_cut_short_is_the_end(self):
        whole = pack(Order.SESSIONS)
        raw = pack(Order.RELOAD, "news")
        for cut in range(len(raw)):
            self.assertEqual(list(orders.read(io.BytesIO(whole + raw[:cut]))), [(Order.SESSIONS, None)])

    def test_users_and_rules_decide_the_same_on_the_other_side(self):
        with tempfile.TemporaryDirectory() as folder:
            users, rules = os.path.join(folder, "users"), os.path.join(folder, "rules")
            with open(users, "w", encoding="ascii") as file:
                file.write(users_line("bob", b"right"))
            with open(rules, "w", encoding="ascii") as file:
                file.write("allow user bob to 192.0.2.0/24\n")
            access = files.read_access(Config(users=users, rules=rules, user=(("eve", "secret"),)))
        (_, (people, laws)), = orders.read(io.BytesIO(pack(Order.RELOAD, access)))
        people.join(access[0])                      # of which a worker has a copy since it was forked
        self.assertTrue(people)
        self.assertEqual(people.names, [b"bob", b"eve"])
        self.assertTrue(people.check(b"eve", b"secret"))
        self.assertTrue(people.check(b"bob", b"right"))
        asker = Asker(ip_address("127.0.0.1"), b"bob", Cmd.CONNECT)
        for text, allowed in (("192.0.2.1", True), ("198.51.100.1", False)):
            self.assertEqual(laws.judge(asker, ip_address(text), 80).allowed, allowed)


class Sending(unittest.TestCase):
    def setUp(self):
        ours, self.theirs = socket.socketpair()
        self.addCleanup(ours.close)
        self.addCleanup(self.theirs.close)
        self.outbox = Outbox(ours)

    def put(self, order, access=None):
        self.outbox.put(order, pack(order, access))

    def received(self):
        """All that arrives, as the outbox gets rid of it."""
        flushed = threading.Event()

        def flush():
            while self.outbox.flush():
                flushed.wait(0.001)
            self.outbox.sock.shutdown(socket.SHUT_WR)

        thread = threading.Thread(target=flush, daemon=True)
        thread.start()
        with self.theirs.makefile("rb") as stream:
            got = list(orders.read(stream))
        thread.join(PATIENCE_S)
        return got

    def test_a_worker_that_does_not_read_costs_no_time_and_gets_the_latest_most_urgent_first(self):
        large = b"x" * (4 << 20)
        for number in range(20):
            self.put(Order.RELOAD, (number, large))
            self.put(Order.SESSIONS)
        self.put(Order.STOP)
        self.put(Order.ABORT)
        got = self.received()
        self.assertEqual([order for order, _ in got],
                         [Order.RELOAD, Order.ABORT, Order.STOP, Order.RELOAD, Order.SESSIONS])
        self.assertEqual([access[0] for _, access in got if access], [0, 19])       # the first was under way

    def test_nothing_is_kept_for_a_worker_that_is_gone(self):
        self.put(Order.RELOAD, b"x" * (4 << 20))
        self.assertTrue(self.outbox.flush())
        self.theirs.close()
        self.assertFalse(self.outbox.flush())
        self.put(Order.STOP)
        self.assertFalse(self.outbox.flush())


class Server:
    """Notes what it is told."""

    def __init__(self):
        self.told = []

    def stop(self):
        self.told.append("stop")

    def reload(self, access):
        self.told.append(access)

    def log_sessions_soon(self):
        self.told.append("sessions")


class Obeying(unittest.TestCase):
    def heard(self, raw):
        """What the server was told, and whether to hurry, when these bytes and then EOF come over the channel."""
        ours, theirs = socket.socketpair()
        server, hurry = Server(), threading.Event()
        with ours, theirs:
            theirs.sendall(raw)
            theirs.shutdown(socket.SHUT_WR)
            worker.listen(server, hurry, ours)
        return server.told, hurry.is_set()

    def test_orders(self):
        self.assertEqual(self.heard(pack(Order.SESSIONS) + pack(Order.RELOAD, "new") + pack(Order.STOP)),
                         (["sessions", "new", "stop", "stop"], True))

    def test_a_supervisor_that_is_gone_ends_it_at_once(self):
        self.assertEqual(self.heard(b""), (["stop"], True))

    def test_a_worker_that_cannot_take_what_is_in_force_stops(self):
        body = pickle.dumps("no order")
        with self.assertLogs("socks5", "ERROR"):
            self.assertEqual(self.heard(orders.SIZE.pack(len(body)) + body), (["stop"], False))

    def test_the_drain_takes_as_long_as_the_configuration_says(self):
        server, hurry = mock.MagicMock(config=Config(drain_timeout=600.0)), threading.Event()
        server.drain.return_value = 0
        worker.serve(server, hurry)
        server.drain.assert_called_once_with(600.0, hurry)

    def test_an_abort_hurries_a_stop_does_not(self):
        for order, hurried in ((Order.STOP, False), (Order.ABORT, True)):
            server, hurry = Server(), threading.Event()
            worker.obey(server, hurry, order)
            self.assertEqual((server.told, hurry.is_set()), (["stop"], hurried))
