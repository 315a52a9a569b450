"""selftest.py: it reports success if all checks pass, and otherwise names each check that failed."""
import contextlib
import re
import socket
import unittest
from ipaddress import ip_network
from unittest import mock

from socks5 import client, selftest
from socks5.config import Config
from socks5.protocol.errors import RequestRefused
from socks5.protocol.codes import Rep
from socks5.server import handler
from tests.support import HAS_IPV6, Case, closed_port, read_to_end, run_cli, running, taken_port, target, users_line

PARTS = ["CONNECT to an IPv4 address", "CONNECT to an IPv6 address", "CONNECT to a name", "half-close", "BIND",
         "UDP ASSOCIATE", "UDP ASSOCIATE, in 3 fragments", "a destination that a rule denies",
         "a closed port", "a wrong password"]


def report(**options):
    """{part: verdict} and all lines."""
    lines = list(selftest.run(Config(**options)))
    found = [re.match(r"(\w+) +(.*?) +[\d.]+ ms  ", line.text) for line in lines]
    return {match.group(2): match.group(1) for match in found if match}, lines


class AllIsWell(Case):
    def check(self, **options):
        verdicts, lines = report(**options)
        self.assertEqual(list(verdicts), PARTS)
        self.assertEqual([line.text for line in lines if not line.good], [])
        self.assertEqual(verdicts.pop(PARTS[1]), "ok" if HAS_IPV6 else "missing")
        self.assertEqual(set(verdicts.values()), {"ok"})
        self.assertEqual(lines[-1].text, "all checks passed")
        return lines

    def test_as_it_comes(self):
        self.check()

    def test_with_users(self):
        self.check(user=(("alice", "x"),))

    def test_with_users_of_whom_only_hashes_are_known(self):
        path = self.new_folder() / "users"
        path.write_text(users_line("alice", b"x") + "\n")
        self.check(users=str(path))
        self.assertNotIn("self-test", path.read_text())

    def test_with_what_would_keep_it_out_or_lead_elsewhere(self):
        path = self.new_folder() / "rules"
        path.write_text("deny to any\n")
        lines = self.check(rules=str(path), allow_from=(ip_network("192.0.2.0/24"),), advertise=("192.0.2.1",),
                           listen=("0.0.0.0",), port=1)
        self.assertIn("without --advertise", lines[0].text)


class SomethingIsNot(unittest.TestCase):
    def failing(self, expected, **options):
        verdicts, lines = report(**options)
        failed = {part for part, verdict in verdicts.items() if verdict == "FAILED"}
        self.assertEqual(failed, expected)
        self.assertEqual(lines[-1], selftest.Line("%d failed" % len(expected), False))
        self.assertTrue(all(line.good for line in lines[:-1] if "FAILED" not in line.text))

    def test_a_command_that_breaks(self):
        def broken(*_):
            raise RequestRefused(Rep.GENERAL_FAILURE, "out of order")

        with mock.patch.dict(handler.COMMANDS, {handler.Cmd.BIND: broken}):
            self.failing({"BIND"})

    def test_a_server_that_accepts_every_password(self):
        with mock.patch("socks5.access.users.Users.check", return_value=True):
            self.failing({"a wrong password"})

    def test_a_server_that_permits_every_destination(self):
        with mock.patch("socks5.access.rules.Rule.covers", lambda rule, *_: rule.allow), \
                mock.patch("socks5.access.rules.Rule.may_cover", lambda rule, *_: rule.allow):
            self.failing({"a destination that a rule denies"})

    def test_a_range_of_ports_that_is_taken(self):
        with taken_port() as port:
            self.failing({"BIND"}, bind_ports=(port, port))


class EachCheck(unittest.TestCase):
    """Each fails where what comes back is not what went out."""

    def fails(self, check, serve=None, change=contextlib.nullcontext(), words=" instead of "):
        with self.subTest(words), running() as server, target(serve) as echo, change:
            with self.assertRaisesRegex(selftest.Failed, words):
                check(selftest.Setup(server.server_address[:2], None, echo, None))

    def test_tunnels(self):
        self.fails(selftest.by_ipv4, lambda connection: connection.sendall(b"!"))
        self.fails(selftest.by_name, lambda connection: connection.sendall(b"!"))
        self.fails(lambda setup: selftest.by_ipv6(setup._replace(echo6=setup.echo)),
                   lambda connection: connection.sendall(b"!"))
        self.fails(selftest.half_close, lambda connection: connection.sendall(read_to_end(connection)[1:]))

    def test_bind(self):
        accept, here, there = client.Waiting.accept, *socket.socketpair()
        self.addCleanup(here.close)
        here.sendall(b"!")
        for change in (lambda sock, who: (sock, ("192.0.2.1", 1)), lambda sock, who: (sock.close(), (there, who))[1]):
            self.fails(selftest.bind, change=mock.patch.object(
                client.Waiting, "accept", lambda *args: change(*accept(*args))))

    def test_datagrams(self):
        sendto, recvfrom = client.Association.sendto, client.Association.recvfrom
        for change in (mock.patch.object(client.Association, "sendto",
                                         lambda udp, data, *where: sendto(udp, data[1:], *where)),
                       mock.patch.object(client.Association, "recvfrom", lambda udp: (b"", recvfrom(udp)[1]))):
            self.fails(lambda setup: selftest.datagrams(setup, 1), change=change)

    def test_refusals(self):
        self.fails(selftest.refused_by_rule)
        self.fails(lambda setup: selftest.refusal(setup, setup.echo, Rep.NOT_ALLOWED), words="was not refused")
        closed = "127.0.0.1", closed_port()
        self.fails(lambda setup: selftest.wrong_password(setup._replace(echo=closed)), words="5 instead of None")

    def test_what_is_asked_for(self):
        asked, sendto = [], client.Association.sendto

        def count(udp, data, where, fragments):
            asked.append(fragments)
            sendto(udp, data, where, fragments)

        refuse = mock.Mock(side_effect=RequestRefused(Rep.NOT_ALLOWED, "not here"))
        with mock.patch.object(client.Association, "sendto", count), mock.patch.object(
                handler.Handler, "lookup", lambda self, host: refuse() if host == b"localhost" else [host]):
            verdicts, _ = report()
        self.assertEqual((asked, verdicts["CONNECT to a name"]), ([1, 3], "FAILED"))
        with mock.patch.dict(handler.COMMANDS, {handler.Cmd.CONNECT: lambda *_: refuse()}):
            verdicts, _ = report()
        self.assertEqual(verdicts["a closed port"], "FAILED")


class Lacking(unittest.TestCase):
    def test_each(self):
        for words, ipv6, change in (
                ("no IPv6", False, mock.patch.object(selftest.splice, "available", True)),
                ("no os.splice", True, mock.patch.object(selftest.splice, "available", False)),
                ("low descriptor limit: it permits 7", True,
                 mock.patch("socks5.net.listeners.session_limit", lambda: 7)),
                ("one CPU", True, mock.patch.object(selftest.os, "sched_getaffinity", lambda _: {0}, create=True))):
            with self.subTest(words), change:
                self.assertEqual(sum(line.startswith(words) for line in selftest.lacking(ipv6)), 1)

    def test_no_ipv6_is_no_failure(self):
        real = selftest.echo_server

        def only_ipv4(host):
            if ":" in host:
                raise OSError("no such family")
            return real(host)

        with mock.patch.object(selftest, "echo_server", only_ipv4):
            verdicts, lines = report()
        self.assertEqual(verdicts["CONNECT to an IPv6 address"], "missing")
        self.assertTrue(all(line.good for line in lines))
        self.assertTrue(any(line.text.startswith("note     no IPv6: ") for line in lines))


class Program(unittest.TestCase):
    def test_exit_status(self):
        status, out, err = run_cli("--self-test")
        self.assertEqual((status, err, out.splitlines()[-1]), (0, "", "all checks passed"))
        with taken_port() as port:
            status, out, _ = run_cli("--self-test", "--bind-ports", port)
        self.assertEqual((status, out.splitlines()[-1]), (1, "1 failed"))

    def test_a_bad_file_is_one_line(self):
        status, _out, err = run_cli("--self-test", "--users", "/no/such/file")
        self.assertEqual((status, len(err.splitlines())), (2, 1))

    def test_with_the_trace(self):
        status, _, err = run_cli("--self-test", "--trace")
        self.assertEqual(status, 0)
        self.assertIn("client -> proxy  Request", err)
