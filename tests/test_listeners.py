"""listeners.py: real listeners on every sort of address, and what the descriptor limit carries."""
import contextlib
import errno
import socket
import unittest
from unittest import mock

from socks5.net import listeners as listening
from tests.support import HAS_IPV6, PATIENCE_S, Case, closed_port, descriptors, need

HOSTS = ["127.0.0.1", "127.0.0.2", "127.0.0.3"]     # Linux and Windows have all of 127/8


def port_of(listener):
    return listener.getsockname()[1]


def answers(listener, host):
    """Whether a client of host and the listener's port comes out of its accept()."""
    with socket.create_connection((host, port_of(listener)), PATIENCE_S) as client:
        client.sendall(b"hello")                    # accept() may wait for it
        listener.settimeout(PATIENCE_S)
        with listener.accept()[0] as accepted:
            accepted.settimeout(PATIENCE_S)
            return accepted.recv(5) == b"hello"


class ListenersTest(Case):
    def open(self, addresses, port=0):
        return list(map(self.enter, listening.open_all(addresses, port)))

    def occupy(self, host, port=0):
        """A port on which another socket listens."""
        return port_of(self.enter(socket.create_server((host, port))))

    def fails(self, addresses, port):
        """The OSError of open_all, which has left nothing open (garbage collection would close it later)."""
        before = descriptors()
        try:
            self.open(addresses, port)
        except OSError as exc:
            self.assertLessEqual(descriptors(), before)
            return exc
        self.fail("listening on %s" % addresses)


class Open(ListenersTest):
    def setUp(self):
        for host in HOSTS:
            with socket.socket() as probe:
                try:
                    probe.bind((host, 0))
                except OSError:
                    need(self, False, host)

    def test_one_port_on_every_address(self):
        hosts = HOSTS + ["::1"] * HAS_IPV6
        listeners = self.open(hosts)
        self.assertEqual([listener.getsockname()[0] for listener in listeners], hosts)
        self.assertEqual({port_of(listener) for listener in listeners}, {port_of(listeners[0])})
        for host, listener in zip(hosts, listeners):
            self.assertTrue(answers(listener, host), host)

    def test_the_port_that_was_asked_for(self):
        port = closed_port()
        self.assertEqual(list(map(port_of, self.open(HOSTS, port))), [port] * 3)

    def test_any_port_is_another_one_each_time(self):
        self.assertEqual(len({port_of(self.open(["127.0.0.1"])[0]) for _ in range(5)}), 5)

    def test_ipv6_takes_ipv4_where_no_other_listener_does(self):
        need(self, HAS_IPV6, "IPv6")
        cases = [("the only one", ["::"], 0, True), ("with an IPv4 address", ["::", "127.0.0.1"], 0, False),
                 ("with all of IPv4", ["0.0.0.0", "::"], 1, False), ("and in this order", ["::", "0.0.0.0"], 0, False)]
        for name, addresses, six, dual in cases:
            with self.subTest(name):
                listeners = listening.open_all(addresses, 0)
                try:
                    self.assertEqual(not listeners[six].getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY), dual)
                    self.assertTrue(answers(listeners[six], "::1"))
                    four = listeners[1 - six] if len(listeners) > 1 else listeners[six]
                    self.assertTrue(answers(four, "127.0.0.1"))
                finally:
                    listening.close_all(listeners)

    def test_a_port_of_the_systems_choice_survives_shutdown(self):
        """This is how threads are woken out of accept(); a port that Linux chose would be given away."""
        for listener in self.open(HOSTS[:2]):
            port = port_of(listener)
            try:
                listener.shutdown(socket.SHUT_RDWR)
            except OSError as exc:                          # macOS and the BSDs do not do this to a listener
                self.skipTest("shutdown() of a listener: %s" % exc)
            listener.listen(5)
            self.assertEqual(port_of(listener), port)
            self.assertTrue(answers(listener, listener.getsockname()[0]))

    def test_what_is_accepted_inherits_its_options(self):
        listener, = self.open(["127.0.0.1"])
        with socket.create_connection(listener.getsockname(), PATIENCE_S) as client:
            client.sendall(b"x")
            listener.settimeout(PATIENCE_S)
            with listener.accept()[0] as accepted:
                for level, option, value in (listening.NO_DELAY, listening.URGENT_IN_LINE):
                    self.assertEqual(accepted.getsockopt(level, option), value, (level, option))

    @unittest.skipUnless(hasattr(socket, "TCP_DEFER_ACCEPT"), "Linux defers accept()")
    def test_a_silent_client_stays_in_the_kernel(self):
        listener, = self.open(["127.0.0.1"])
        self.assertGreaterEqual(listener.getsockopt(socket.IPPROTO_TCP, socket.TCP_DEFER_ACCEPT),
                                listening.DEFER_ACCEPT_S)

    @unittest.skipUnless(listening.REUSE_ADDRESS, "not asked for here")
    def test_a_restart_at_once(self):
        """Connections that this side closed first hold the port in TIME_WAIT."""
        listener, = self.open(["127.0.0.1"])
        port = port_of(listener)
        with socket.create_connection(listener.getsockname(), PATIENCE_S) as client:
            client.sendall(b"x")
            listener.settimeout(PATIENCE_S)
            with listener.accept()[0] as accepted:
                accepted.recv(1)
            self.assertEqual(client.recv(1), b"")
        listener.close()
        self.assertTrue(answers(self.open(["127.0.0.1"], port)[0], "127.0.0.1"))


class Failure(ListenersTest):
    def test_a_port_in_use(self):
        port = self.occupy("127.0.0.2", closed_port())           # which the others have free
        for addresses in (["127.0.0.2"], ["127.0.0.1", "127.0.0.2"], ["127.0.0.1", "127.0.0.3", "127.0.0.2"]):
            with self.subTest(" ".join(addresses)):
                exc = self.fails(addresses, port)
                self.assertEqual((exc.errno, exc.filename), (errno.EADDRINUSE, "127.0.0.2 port %d" % port))

    def test_an_address_that_is_not_ours(self):
        cases = [("IPv4", "192.0.2.1")] + [("IPv6", "2001:db8::1"), ("no such scope", "fe80::1%nosuch0")] * HAS_IPV6
        for name, text in cases:
            with self.subTest(name), mock.patch.object(listening, "open_one", wraps=listening.open_one) as spy:
                exc = self.fails(["127.0.0.1", text], 0)
                self.assertRegex(exc.filename, "^%s port [0-9]+$" % text)
                self.assertEqual([call[0][0] for call in spy.call_args_list].count(text), 1, "no use to try again")

    def rival(self, times):
        """Another program takes on the second address the port that we were given on the first one, so many times."""
        real, taken = listening.open_one, []

        def open_one(text, port, dual, reuse):
            listener = real(text, port, dual, reuse)
            if text == "127.0.0.1" and port and len(taken) < times:     # without one it calls itself with one
                taken.append(port)
                with contextlib.suppress(OSError):      # it is in use there already
                    self.occupy("127.0.0.2", port)
            return listener

        self.enter(mock.patch.object(listening, "open_one", open_one))
        return taken

    def test_any_port_is_one_that_every_address_has_free(self):
        times = listening.TRIES - 1
        taken = self.rival(times)
        with mock.patch.object(listening, "TRIES", listening.TRIES + 20):       # the kernel may give one twice
            listeners = self.open(["127.0.0.1", "127.0.0.2"])
        self.assertEqual(len(taken), times)
        self.assertEqual(port_of(listeners[0]), port_of(listeners[1]))
        self.assertNotIn(port_of(listeners[0]), taken)

    def test_but_not_for_ever(self):
        taken = self.rival(1000)
        before = descriptors()
        with self.assertRaises(OSError) as caught:
            listening.open_all(["127.0.0.1", "127.0.0.2"], 0)
        self.assertEqual(len(taken), listening.TRIES)
        self.assertEqual(caught.exception.filename, "127.0.0.2 port %d" % taken[-1])
        self.assertLessEqual(descriptors(), before + len(taken))

    def test_a_port_that_was_named_is_tried_once(self):
        taken = self.rival(1000)
        with self.assertRaises(OSError):
            listening.open_all(["127.0.0.1", "127.0.0.2"], closed_port())
        self.assertEqual(len(taken), 1)


@unittest.skipUnless(listening.resource, "there is no such limit here")
class Limits(unittest.TestCase):
    def setUp(self):
        self.resource = listening.resource
        self.before = self.resource.getrlimit(self.resource.RLIMIT_NOFILE)
        self.addCleanup(self.resource.setrlimit, self.resource.RLIMIT_NOFILE, self.before)

    def test_sessions_that_the_limit_carries(self):
        spare = listening.SPARE_DESCRIPTORS
        for name, soft, sessions in (("plenty", 1000, (1000 - spare) // 2), ("as much to spare", 2 * spare, spare // 2),
                                     ("little", 128, 32)):
            with self.subTest(name):
                self.resource.setrlimit(self.resource.RLIMIT_NOFILE, (soft, self.before[1]))
                self.assertEqual(listening.session_limit(), sessions)

    def test_limits_that_no_test_can_set(self):
        for name, soft, sessions in (("none at all", self.resource.RLIM_INFINITY,
                                      ((1 << 20) - listening.SPARE_DESCRIPTORS) // 2),
                                     ("two", 2, 1), ("nothing", 0, 1)):
            with self.subTest(name), mock.patch.object(self.resource, "getrlimit", return_value=(soft, soft)):
                self.assertEqual(listening.session_limit(), sessions)

    def test_the_soft_limit_becomes_the_hard_one(self):
        self.resource.setrlimit(self.resource.RLIMIT_NOFILE, (self.before[1] - 1, self.before[1]))
        listening.raise_descriptor_limit()
        self.assertEqual(self.resource.getrlimit(self.resource.RLIMIT_NOFILE), (self.before[1],) * 2)

    def test_a_system_that_refuses(self):
        for error in (ValueError("not allowed to raise maximum limit"), OSError(errno.EINVAL, "Invalid argument")):
            with self.subTest(type(error).__name__), \
                    mock.patch.object(self.resource, "setrlimit", side_effect=error) as setrlimit:
                listening.raise_descriptor_limit()
                self.assertEqual(setrlimit.call_count, 1)


class NoLimits(unittest.TestCase):
    def test_a_system_without(self):
        with mock.patch.object(listening, "resource", None):
            self.assertEqual(listening.session_limit(), 1000)
            listening.raise_descriptor_limit()
