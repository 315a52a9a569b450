"""rules.py: what a line says, what it decides, and that the server does as it says."""
import contextlib
import gc
import itertools
import os
import signal
import socket
import tempfile
import unittest
import weakref
from ipaddress import ip_address, ip_network
from unittest import mock

import socks5
from socks5 import client
from socks5.protocol.codes import Cmd, Rep
from socks5.protocol.errors import RequestRefused
from socks5.protocol.memory import give_back
from socks5.config import Config, ConfigError
from socks5.net.addresses import Endpoint, unmapped
from socks5.access.rules import ALL_PORTS, LOCAL as LOCAL_NETWORKS, Asker, Rule, Rules, inside
from socks5.access.users import Users
from socks5.commands.authorize import TOLD, Authorizer
from socks5.protocol.messages import Address
from tests import support
from tests.support import (HAS_IPV6, PATIENCE_S, ask, closed_port, connect_through, dial, echo, echoes, greeted, heard,
                           need, refusal, running, served, spawned, target, udp_socket, wait_until)

ELSEWHERE = "192.0.2.7"
IPV4_EMBEDDED = {
    "IPv4-mapped": "::ffff:%02x%02x:%02x%02x",
    "6to4": "2002:%02x%02x:%02x%02x::9",
    "NAT64": "64:ff9b::%02x%02x:%02x%02x",
    "a network's own NAT64": "64:ff9b:1::%02x%02x:%02x%02x",
    "IPv4-translated": "::ffff:0:%02x%02x:%02x%02x",
    "IPv4-compatible": "::%02x%02x:%02x%02x"}


def embedded(form, host):
    return IPV4_EMBEDDED[form] % tuple(ip_address(host).packed)


def own_address():
    """An address of this machine that is not loopback, or None."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe, contextlib.suppress(OSError):
        probe.connect(("198.51.100.1", 9))                  # chooses a route, sends nothing
        mine = probe.getsockname()[0]
        return None if ip_address(mine).is_loopback else mine


class Case(support.Case):
    def setUp(self):
        self.path = self.new_folder() / "rules"

    def write(self, *lines):
        self.path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return str(self.path)

    def rules(self, *lines, **options):
        return Rules(Config(rules=self.write(*lines), **options))

    def judge(self, rules, host, port=80, name=None, client="127.0.0.1", user=None, cmd=Cmd.CONNECT):
        verdict = rules.judge(Asker(ip_address(client), user, cmd), ip_address(host), port, name)
        return verdict.allowed, verdict.where.replace(str(self.path), "F")


class Reading(Case):
    def test_a_file_that_is_half_written(self):
        """Cut off anywhere in a line, it is an error; "allow from ..." would become "allow"."""
        raw = "# mail\ndeny port 25\nallow from 192.168.7.0/24 to .a.b port 1-44\nallow user \u00fc rate 1M\n".encode()
        for cut in range(len(raw) + 1):
            self.path.write_bytes(raw[:cut])
            lines = raw[:cut].count(b"\n")
            with self.subTest(raw[:cut]):
                if raw[:cut].endswith(b"\n") or not cut:
                    self.assertEqual(len(Rules(Config(rules=str(self.path)))), max(0, lines - 1))
                else:
                    with self.assertRaisesRegex(ConfigError, "rules:%d: .*half written" % (lines + 1)):
                        Rules(Config(rules=str(self.path)))

    def test_every_part(self):
        for line, facts in (
                ("allow", {}), ("deny", {}),
                ("allow user bob", {"user": b"bob"}),
                ('allow user "bob the builder"', {"user": b"bob the builder"}),
                ("allow user j\u00fcrgen", {"user": "j\u00fcrgen".encode()}),
                ("deny from 10.0.0.0/8", {"source": ip_network("10.0.0.0/8")}),
                ("deny from 2001:db8::/32", {"source": ip_network("2001:db8::/32")}),
                ("deny from ::ffff:10.0.0.0/104", {"source": ip_network("10.0.0.0/8")}),
                ("deny from any", {}),
                ("deny to any", {"anywhere": True}),
                ("deny to 192.0.2.1", {"network": ip_network("192.0.2.1/32")}),
                ("deny to ::1", {"network": ip_network("::1/128")}),
                ("deny to ::ffff:127.0.0.1", {"network": ip_network("127.0.0.1/32")}),
                ("deny to ::/0", {"network": ip_network("::/0")}),
                ("deny to 64:ff9b::/96", {"network": ip_network("64:ff9b::/96")}),
                ("deny to Example.COM", {"name": b"example.com"}),
                ("deny to example.com.", {"name": b"example.com"}),
                ("deny to .Example.com", {"name": b".example.com"}),
                ("deny to localhost", {"name": b"localhost"}),
                ("deny to b\u00fccher.example", {"name": b"xn--bcher-kva.example"}),
                ("deny port 25", {"ports": (25, 25)}),
                ("deny port 0-65535", {"ports": ALL_PORTS}),
                ("deny port 6660-6669", {"ports": (6660, 6669)}),
                ("deny command connect", {"cmd": Cmd.CONNECT}),
                ("deny command bind", {"cmd": Cmd.BIND}),
                ("deny command udp", {"cmd": Cmd.UDP_ASSOCIATE}),
                ("\tdeny  port 1  # why not", {"ports": (1, 1)}),
                ("allow command udp port 53 to any from ::1 user x",
                 {"cmd": Cmd.UDP_ASSOCIATE, "ports": (53, 53), "anywhere": True, "source": ip_network("::1"),
                  "user": b"x"})):
            with self.subTest(line):
                rule, = self.rules(line).rules
                words = " ".join(line.partition("  #")[0].split())
                self.assertEqual(rule, Rule(words.startswith("allow"), "%s:1" % self.path, words, **facts))

    def test_lines_are_counted_as_an_editor_does(self):
        rules = self.rules("# first", "", "allow to any", "   ", "deny", "#deny")
        self.assertEqual([rule.where for rule in rules.rules], ["%s:%d" % (self.path, number) for number in (3, 5)])
        self.assertEqual(len(rules), 2)

    def test_an_empty_file_denies_everything(self):
        rules = self.rules("# nothing yet")
        self.assertTrue(rules)
        self.assertEqual(self.judge(rules, "192.0.2.1"), (False, "F: no rule allows it"))

    def test_mistakes(self):
        for line, why in (
                ("permit", "a rule starts with allow or deny, not 'permit'"),
                ("Allow", "a rule starts with allow or deny"),
                ("allow all", "'all' is not a part of a rule: allow"),
                ("allow to", "nothing follows 'to'"),
                ("allow port 1 port 2", "'port' stands here twice"),
                ("allow from 10.0.0.1/8", "has host bits set"),
                ("allow from example.com", "'example.com' is not an address or a network"),
                ("allow to 10.0.0.0/33", "is not an address or a network"),
                ("allow to 300.1.1.1", "is not an address or a network"),
                ("allow to 2001:db8::g", "is not an address or a network"),
                ("allow to a..b", "'a..b' is neither an address nor a name"),
                ("allow to *.example.com", "is neither an address nor a name"),
                ("allow to ..", "is neither an address nor a name"),
                ("allow via office", "no --upstream is called 'office'"),
                ("deny via direct", "'via' belongs to an allow"),
                ("allow to \u00fc..a", "is neither an address nor a name"),
                ('allow to ""', "is neither an address nor a name"),
                ("allow port x", "'x' is not a port"),
                ("allow port 65536", "'65536' is not a port"),
                ("allow port 2-1", "'2-1' is not a port"),
                ("allow port -1", "'-1' is not a port"),
                ("allow port 1-", "'1-' is not a port"),
                ("allow port \u0661", "is not a port"),
                ("allow command http", "'http' is not connect, bind or udp"),
                ("allow to 64:ff9b::/96", "stands for IPv4 addresses"),
                ("allow to 2002::/16", "stands for IPv4 addresses")):
            with self.subTest(line), self.assertRaises(ConfigError) as caught:
                self.rules("allow to any", line)
            with self.subTest(line + ", said"):
                self.assertIn(why, str(caught.exception))
                self.assertTrue(str(caught.exception).startswith("%s:2: " % self.path))
                self.assertRegex(str(caught.exception), r"\A[ -~]+\Z")

    @unittest.skipUnless(hasattr(os, "mkfifo"), "no FIFOs here")
    def test_files_that_are_refused_of_rules_and_of_users(self):
        fifo, line = self.path.with_name("fifo"), support.users_line("bob", b"x")
        os.mkfifo(str(fifo), 0o600)
        for option, kind in (("rules", Rules), ("users", Users)):
            for path, why in ((fifo, "not a regular file"), (os.devnull, "not a regular file"),
                              (self.path.parent, "Is a directory"), ("/none", "No such file or directory")):
                with self.subTest(option, path=path), self.assertRaisesRegex(
                        ConfigError, "^--%s %s: %s$" % (option, path, why)):
                    kind(Config(**{option: str(path)}))
            self.write("allow" if kind is Rules else line)
            for mode in (0o646, 0o602):
                self.path.chmod(mode)
                with self.subTest(option, mode=mode), self.assertRaisesRegex(
                        ConfigError, r"--%s .*: others can write this file \(chmod o-w\)" % option):
                    kind(Config(**{option: str(self.path)}))
            self.path.chmod(0o644)
            kind(Config(**{option: str(self.path)}))


class Judging(Case):
    def test_what_is_remembered_for_an_asker_takes_little_memory(self):
        """With many rules and many askers there is one verdict for each rule, not one for each asker as well."""
        rules = self.rules("allow to 192.0.2.0/24", "deny user bob", "allow to any")
        first, second = (rules.concerning(Asker(ip_address(host), None, Cmd.CONNECT)) for host in (ELSEWHERE, "::1"))
        self.assertEqual(len(first), 2)
        for one, other in zip(first, second):
            self.assertIs(one, other)

    def test_the_first_that_matches(self):
        rules = self.rules("deny to 192.0.2.0/25", "allow to 192.0.2.0/24", "deny to 192.0.2.200",
                           "allow to 198.51.100.1")
        for host, expected in (("192.0.2.1", (False, "F:1")), ("192.0.2.129", (True, "F:2")),
                               ("192.0.2.200", (True, "F:2")), ("198.51.100.1", (True, "F:4")),
                               ("198.51.100.2", (False, "F: no rule allows it")),
                               ("2001:db8::1", (False, "F: no rule allows it"))):
            with self.subTest(host):
                self.assertEqual(self.judge(rules, host), expected)

    def test_every_condition_must_hold(self):
        rules = self.rules("allow user bob from 10.0.0.0/8 to 192.0.2.0/24 port 80-81 command connect")
        right = {"host": "192.0.2.1", "port": 80, "client": "10.9.9.9", "user": b"bob", "cmd": Cmd.CONNECT}
        self.assertEqual(self.judge(rules, **right), (True, "F:1"))
        self.assertEqual(self.judge(rules, **dict(right, port=81)), (True, "F:1"))
        for wrong in ({"host": "192.0.3.1"}, {"port": 79}, {"port": 82}, {"client": "11.0.0.1"},
                      {"client": "2001:db8::1"}, {"user": b"Bob"}, {"user": None}, {"user": b""},
                      {"cmd": Cmd.BIND}, {"cmd": Cmd.UDP_ASSOCIATE}):
            with self.subTest(wrong):
                self.assertFalse(self.judge(rules, **dict(right, **wrong))[0])

    def test_what_is_remembered_is_what_was_judged(self):
        rules = self.rules("deny user eve", "deny from 192.0.2.0/28 to 198.51.100.1 port 80", "allow to bad.example",
                           "allow to 198.51.100.0/24 port 1-100 command connect", "allow user bob to any")
        for _ in range(2):
            for question in itertools.product(
                    [Asker(ip_address(client), user, cmd) for client in ("192.0.2.1", "192.0.2.99")
                     for user in (None, b"bob", b"eve") for cmd in Cmd],
                    map(ip_address, ("198.51.100.1", "203.0.113.1", "2001:db8::1")), (80, 81, 8080),
                    (None, b"bad.example", b"")):
                self.assertEqual(rules.judge(*question), Rules.judge(rules, *question), question)

    def test_to_connect_to_the_unspecified_address_is_to_connect_to_loopback(self):
        rules = self.rules("deny to 127.0.0.0/8", "deny to ::1", "allow")
        for host, where in (("0.0.0.0", "F:1"), ("::", "F:2"), ("::ffff:0.0.0.0", "F:1")):
            for cmd in (Cmd.CONNECT, Cmd.UDP_ASSOCIATE):
                with self.subTest(host, cmd=cmd):
                    host = str(unmapped(ip_address(host)))
                    self.assertEqual(self.judge(rules, host, cmd=cmd), (False, where))
            with self.subTest(host, cmd=Cmd.BIND):              # there it means any peer
                self.assertEqual(self.judge(rules, host, cmd=Cmd.BIND), (True, "F:3"))
        self.assertEqual(self.judge(self.rules("deny to 0.0.0.0", "allow"), "0.0.0.0"), (False, "F:1"))
        self.assertEqual(self.judge(self.rules("allow to 127.0.0.1"), "0.0.0.0"), (True, "F:1"))
        self.assertFalse(self.judge(self.rules("allow to 0.0.0.0"), "0.0.0.0")[0])

    def test_names(self):
        rules = self.rules("deny to bad.example", "deny to .worse.example", "allow to any")
        for name, allowed in ((b"bad.example", False), (b"BAD.example.", False), (b"sub.bad.example", True),
                              (b"notbad.example", True), (b"worse.example", False), (b"a.b.Worse.Example", False),
                              (b"notworse.example", True), (None, True), (b"example", True)):
            with self.subTest(name):
                self.assertEqual(self.judge(rules, "192.0.2.1", name=name)[0], allowed)

    def test_an_ipv4_embedded_address_is_judged_as_ipv4(self):
        denying = self.rules("deny to 192.0.2.0/24", "allow to any")
        allowing = self.rules("allow to 192.0.2.0/24")
        six = self.rules("allow to ::/0")
        for form in IPV4_EMBEDDED:
            with self.subTest(form):
                worn = embedded(form, "192.0.2.1")
                self.assertEqual(inside(ip_address(worn)), ip_address("192.0.2.1"))
                self.assertEqual(self.judge(denying, worn), (False, "F:1"))
                self.assertEqual(self.judge(allowing, worn), (True, "F:1"))
                self.assertFalse(self.judge(six, worn)[0], "to allow all of IPv6 allows no IPv4")
        self.assertTrue(self.judge(six, "2001:db8::1")[0])

    def test_the_ipv6_form_can_be_denied(self):
        rules = self.rules("deny to 2002::/16", "allow to any")
        self.assertFalse(self.judge(rules, embedded("6to4", "192.0.2.1"))[0])
        self.assertTrue(self.judge(rules, "192.0.2.1")[0])

    def test_addresses_that_embed_no_ipv4_one(self):
        for host in ("2001:db8::c000:201", "::", "::1", "64:ff9b:2::c000:201", "::fffe:192.0.2.1", "fe80::c000:201"):
            with self.subTest(host):
                self.assertEqual(inside(ip_address(host)), ip_address(host))

    def test_from_looks_at_the_address_itself(self):
        """A client may choose such an IPv6 address itself: it does not become IPv4 by it."""
        rules = self.rules("allow from 10.0.0.0/8")
        self.assertFalse(self.judge(rules, "192.0.2.1", client=embedded("6to4", "10.0.0.1"))[0])


LOCAL = ("127.0.0.1", "127.255.255.254", "::1", "0.0.0.0", "0.1.2.3", "::", "169.254.169.254", "fe80::1", "224.0.0.251",
         "ff01::1", "ff02::fb")


class Defaults(Case):
    """Without a file; and what holds in spite of one."""

    def test_clients_on_loopback_reach_anything(self):
        rules = Rules(Config())
        for source in ("127.0.0.1", "127.8.8.8", "::1"):
            for host in (*LOCAL, "192.0.2.1", "10.0.0.1", "2001:db8::1"):
                with self.subTest((source, host)):
                    self.assertTrue(self.judge(rules, host, client=source)[0])

    def test_others_reach_anything_but_this_machine_and_its_link(self):
        rules = Rules(Config())
        for source in (ELSEWHERE, "10.0.0.1", "2001:db8::7", "fe80::7"):
            for host in LOCAL:
                with self.subTest((source, host)):
                    allowed, where = self.judge(rules, host, client=source)
                    self.assertFalse(allowed)
                    self.assertRegex(where, r"^default rules:\d+$")
            for host in ("192.0.2.1", "10.0.0.1", "2001:db8::1", "fd00::1", "169.253.0.1", "1.0.0.0", "128.0.0.1",
                         "fec0::1"):
                with self.subTest((source, host)):
                    self.assertTrue(self.judge(rules, host, client=source)[0])

    def test_what_a_word_must_open_is_what_the_defaults_close(self):
        denied = {rule.network for rule in Rules(Config()).rules if not rule.allow}
        self.assertEqual(denied, set(LOCAL_NETWORKS))

    def test_nor_as_an_ipv4_embedded_address(self):
        for form in IPV4_EMBEDDED:
            for host in ("127.0.0.1", "169.254.169.254", "0.0.0.0"):
                if (form, host) != ("IPv4-compatible", "0.0.0.0"):      # is ::
                    with self.subTest((form, host)):
                        self.assertFalse(self.judge(Rules(Config()), embedded(form, host), client=ELSEWHERE)[0])

    def test_a_bind_for_any_peer_reaches_no_address(self):
        for rules in (Rules(Config()), self.rules("allow")):
            for host in ("0.0.0.0", "::"):
                self.assertTrue(self.judge(rules, host, client=ELSEWHERE, cmd=Cmd.BIND)[0])
            self.assertFalse(self.judge(rules, "127.0.0.1", client=ELSEWHERE, cmd=Cmd.BIND)[0])

    def test_to_open_this_machine_takes_words_that_mean_it(self):
        """The owner of a name can make it resolve to 127.0.0.1: that the name is allowed does not allow this."""
        for line, opens in (("allow", False), ("allow from 0.0.0.0/0", False), ("allow port 80", False),
                            ("allow to .example.com", False), ("allow to www.example.com", False),
                            ("allow to any", True), ("allow to 127.0.0.1", True), ("allow to 0.0.0.0/0", True)):
            rules = self.rules(line)
            with self.subTest(line):
                self.assertEqual(self.judge(rules, "127.0.0.1", name=b"www.example.com", client=ELSEWHERE)[0], opens)
                if "from" not in line:
                    self.assertTrue(self.judge(rules, "127.0.0.1", name=b"www.example.com")[0], "is there already")
            with self.subTest(line + ", NAT64"):
                self.assertEqual(self.judge(rules, embedded("NAT64", "127.0.0.1"), name=b"www.example.com",
                                            client=ELSEWHERE)[0], opens)


class Foreseeing(Case):
    def test_before_anything_is_known(self):
        for lines, port, name, allowed in (
                (["allow to 192.0.2.1"], 80, b"a.example", True),           # it might resolve to that
                (["deny to 192.0.2.1", "allow to any"], 80, b"a.example", True),
                (["deny to .example", "allow to any"], 80, b"a.example", False),
                (["deny to .example", "allow to any"], 80, b"a.test", True),
                (["allow to .test"], 80, b"a.example", False),
                (["deny port 80", "allow to any"], 80, b"a.example", False),
                (["deny port 80", "allow to any"], None, None, True),
                (["allow port 80"], None, None, True),
                (["allow port 80"], 81, b"a.example", False),
                (["allow to .test"], None, None, True),
                (["deny to .test", "allow"], None, None, True),
                (["deny command connect", "allow to any"], None, None, False),
                (["deny user bob", "allow to any"], 80, b"a.example", True),
                (["allow user bob"], 80, b"a.example", False),
                (["deny from 127.0.0.0/8", "allow to any"], None, None, False),
                ([], None, None, False)):
            with self.subTest((lines, port, name)):
                verdict = self.rules(*lines).foresee(Asker(ip_address("127.0.0.1"), None, Cmd.CONNECT), port, name)
                self.assertEqual(verdict.allowed, allowed)


class OpenProxy(Case):
    def test_a_file_that_lets_in_every_client_is_refused(self):
        for lines, where in ((["allow"], 1), (["allow to 10.0.0.0/8"], 1),
                             (["deny port 25", "allow from 0.0.0.0/0"], 2),
                             (["allow from 10.0.0.0/8", "allow from ::/0"], 2), (["deny user bob", "allow"], 2),
                             (["deny port 1-2", "deny command udp", "allow command bind"], 3)):
            why = r":%d: lets in every client that reaches 0\.0\.0\.0; add 'from" % where
            with self.subTest(lines), self.assertRaisesRegex(ConfigError, why):
                self.rules(*lines, listen=("127.0.0.1", "0.0.0.0"))

    def test_unless(self):
        for name, lines, options in (
                ("it listens on loopback only", ["allow"], {"listen": ("127.0.0.1", "::1")}),
                ("it was asked for", ["allow"], {"open": True}),
                ("there are users", ["allow"], {"user": (("a", "b"),)}),
                ("clients are limited", ["allow"], {"allow_from": (ip_network("10.0.0.0/8"),)}),
                ("by the rule", ["allow from 10.0.0.0/8", "allow user bob"], {}),
                ("by a rule before", ["allow from 10.0.0.0/8", "deny", "allow"], {}),
                ("by a rule for any destination", ["deny to any", "allow"], {})):
            with self.subTest(name):
                self.assertTrue(self.rules(*lines, **dict({"listen": ("0.0.0.0",)}, **options)))

    def test_allow_from_everywhere_is_no_limit(self):
        everywhere = (ip_network("0.0.0.0/0"),)
        with self.assertRaisesRegex(ConfigError, "every client that reaches it"):
            Config(listen=("0.0.0.0",), allow_from=everywhere)
        with self.assertRaisesRegex(ConfigError, "lets in every client"):
            self.rules("allow", listen=("0.0.0.0",), allow_from=everywhere)


class Serving(Case):
    """The real server does as its rules say, tells REP 02, and names the rule in the log."""

    def serve(self, *lines, **options):
        return self.enter(running(rules=self.write(*lines), **options))

    def refusal(self, server, cmd, host, port, user=None):
        """The reply, and the session's `why`, of one request."""
        with support.logging_of(self) as logs, greeted(server.server_address, user) as sock:
            reply = ask(sock, cmd, host, port)
            sock.shutdown(socket.SHUT_RDWR)
            line = logs.wait("session client=%s:%d " % sock.getsockname()[:2])
        return reply.rep, line.partition(" why=")[2].replace(str(self.path), "F")

    def test_connect(self):
        destination = self.enter(target())
        server = self.serve("deny to 127.0.0.2", "deny to .invalid", "allow port %d" % destination[1])
        self.check_serves(server.server_address, destination)
        for name, host, port, why in (
                ("address", "127.0.0.2", destination[1], "'127.0.0.2 denied by F:1'"),
                ("address as a name", b"127.0.0.2", destination[1], "'127.0.0.2 denied by F:1'"),
                ("mapped address", "::ffff:127.0.0.2", destination[1], "'127.0.0.2 denied by F:1'"),
                ("port", "127.0.0.1", destination[1] ^ 1, "'127.0.0.1 denied by F: no rule allows it'"),
                ("name", b"secret.INVALID", destination[1], "'denied by F:2'")):
            with self.subTest(name):
                self.assertEqual(self.refusal(server, Cmd.CONNECT, host, port), (Rep.NOT_ALLOWED, why))

    def test_verdicts_are_remembered_by_name_only_where_a_rule_has_one(self):
        to = [ip_address("192.0.2.1")]
        for lines, kept in ((["allow"], 1), (["deny to secret.invalid", "allow"], 3)):
            with self.subTest(lines):
                server = self.serve(*lines)
                may = Authorizer(Endpoint(ip_address("127.0.0.1"), 1), None, lambda: server.rules, ())
                for name in (b"a.invalid", b"b.invalid", b"c.invalid"):
                    self.assertEqual(may.permitted(Cmd.CONNECT, name, 80, to), to)
                self.assertEqual(server.rules.judge.cache_info().currsize, kept)
                with self.assertRaises(RequestRefused) if kept > 1 else contextlib.nullcontext():
                    may.permitted(Cmd.CONNECT, b"secret.invalid", 80, to)

    def test_an_authorizer_asks_for_each_command(self):
        server = self.serve("deny command udp", "allow")
        may = Authorizer(Endpoint(ip_address("127.0.0.1"), 1), None, lambda: server.rules, ())
        for _ in range(2):
            self.assertEqual(may.asker(Cmd.CONNECT).cmd, Cmd.CONNECT)
            self.assertRaises(RequestRefused, may.associate)

    def test_what_was_allowed_is_remembered_within_bounds_and_until_a_reload(self):
        destination = self.enter(target())
        server = self.serve("allow")
        with mock.patch.object(type(server.rules), "foresee", side_effect=AssertionError("a name")):
            for _ in range(2):
                connect_through(server.server_address, *destination).close()
        self.assertEqual(list(server.rules.known.values()), [[ip_address("127.0.0.1")]])
        for number in range(10000):
            server.rules.known.put(number, [])
        self.assertLessEqual(len(server.rules.known), 4096)
        connect_through(server.server_address, *destination).close()
        self.write("deny to 127.0.0.1", "allow")
        self.assertTrue(server.reload())
        self.assertEqual(self.refusal(server, Cmd.CONNECT, *destination),
                         (Rep.NOT_ALLOWED, "'127.0.0.1 denied by F:1'"))

    def test_no_name_that_is_denied_is_looked_up(self):
        server = self.serve("deny to .invalid", "allow to any")
        with mock.patch("socks5.net.lookups.Names.resolve", side_effect=AssertionError("was looked up")):
            self.assertEqual(self.refusal(server, Cmd.CONNECT, b"passwords.invalid", 80)[0], Rep.NOT_ALLOWED)

    def test_every_address_of_a_name_is_judged_and_only_what_is_allowed_is_dialled(self):
        destination = self.enter(target(port=closed_port("127.0.0.1", "127.0.0.2")))
        server = self.serve("deny to 127.0.0.2", "allow")
        found = [ip_address("127.0.0.2"), ip_address("127.0.0.1")]
        trap = self.enter(socket.create_server(("127.0.0.2", destination[1])))
        trap.setblocking(False)
        with mock.patch("socks5.net.lookups.Names.resolve", return_value=found):
            with connect_through(server.server_address, b"rebinding.example", destination[1]) as tunnel:
                self.assertTrue(echoes(tunnel))
            found.pop()
            self.assertEqual(self.refusal(server, Cmd.CONNECT, b"rebinding.example", destination[1]),
                             (Rep.NOT_ALLOWED, "'127.0.0.2 denied by F:1'"))
        self.assertRaises(BlockingIOError, trap.accept)

    def test_by_user(self):
        destination = self.enter(target())
        server = self.serve("allow user alice", user=(("alice", "a"), ("bob", "b")))
        connect_through(server.server_address, *destination, user=(b"alice", b"a")).close()
        self.assertEqual(self.refusal(server, Cmd.CONNECT, *destination, user=(b"bob", b"b")),
                         (Rep.NOT_ALLOWED, "'127.0.0.1 denied by F: no rule allows it'"))

    def test_bind_by_the_expected_peer(self):
        server = self.serve("deny to 127.0.0.9", "allow command connect", "allow to 127.0.0.1 command bind")
        self.assertEqual(self.refusal(server, Cmd.BIND, "127.0.0.9", 80),
                         (Rep.NOT_ALLOWED, "'127.0.0.9 denied by F:1'"))
        self.assertEqual(self.refusal(server, Cmd.BIND, "0.0.0.0", 0)[0], Rep.NOT_ALLOWED)
        self.assertEqual(self.refusal(server, Cmd.BIND, "127.0.0.1", 80)[0], Rep.SUCCEEDED)

    def test_a_bind_for_any_peer_is_judged_when_a_peer_connects(self):
        server = self.serve("deny to 127.0.0.9", "allow")
        with client.bind(server.server_address) as waiting:
            with dial(waiting.bnd, source="127.0.0.9") as denied:
                self.assertEqual(denied.recv(1), b"")
            with dial(waiting.bnd, source="127.0.0.8") as peer:
                sock, who = waiting.accept(PATIENCE_S)
                with sock:
                    self.assertEqual(who[0], "127.0.0.8")
                    peer.sendall(b"hello")
                    self.assertEqual(sock.recv(5), b"hello")

    def test_the_port_of_a_bind_holds_for_the_peer_that_connects(self):
        server = self.serve("deny to 127.0.0.9 port 21", "allow")
        for port, permitted in ((21, False), (22, True)):
            with self.subTest(port=port), client.bind(server.server_address, ("0.0.0.0", port)) as waiting, \
                    dial(waiting.bnd, source="127.0.0.9") as peer:
                if permitted:
                    waiting.accept(PATIENCE_S)[0].close()
                self.assertEqual(peer.recv(1), b"")

    def test_of_many_denied_addresses_the_first_is_told(self):
        server = self.serve("deny to 127.0.0.2", "deny to 127.0.0.3", "allow")
        found = [ip_address("127.0.0.3"), ip_address("127.0.0.2")]
        with mock.patch("socks5.net.lookups.Names.resolve", return_value=found):
            self.assertEqual(self.refusal(server, Cmd.CONNECT, b"two.example", 80),
                             (Rep.NOT_ALLOWED, "'127.0.0.3 denied by F:2'"))

    def test_an_association_names_few_rules_in_the_log(self):
        server = self.serve(*("deny to 127.0.1.%d" % number for number in range(TOLD + 5)), "allow")
        with support.logging_of(self) as logs:
            with client.associate(server.server_address) as udp:
                for number in range(TOLD + 5):
                    udp.sendto(b"", ("127.0.1.%d" % number, 9))
                wait_until(lambda: any(session.relay and session.relay.dropped["not allowed"] == TOLD + 5
                                       for session in server.sessions))
            wait_until(lambda: not len(server.sessions))
        self.assertEqual(sum("denied client=" in line for line in logs.output), TOLD)

    def test_udp_is_judged_by_datagram(self):
        server = self.serve("deny to 127.0.0.2 command udp", "deny to localhost command udp", "allow")
        allowed = self.enter(udp_socket())
        port = allowed.getsockname()[1]
        denied = self.enter(udp_socket("127.0.0.2", port))
        with support.logging_of(self) as logs:
            with client.associate(server.server_address) as udp:
                for host in ("127.0.0.2", "127.0.0.2", "localhost", "127.0.0.1"):
                    udp.sendto(b"to %a" % host, (host, port))
                self.assertEqual(allowed.recv(100), b"to '127.0.0.1'")
                wait_until(lambda: sum("denied client=" in line for line in logs.output) == 2)
            self.assertIn("3 not allowed", logs.wait("session client="))
        denied.setblocking(False)
        self.assertRaises(BlockingIOError, denied.recv, 100)
        denials = [line.replace(str(self.path), "F") for line in logs.output if "denied client=" in line]
        self.assertEqual(len(denials), 2, "one for each rule")
        self.assertIn("dst=127.0.0.2:%d why='denied by F:1'" % port, denials[0])
        self.assertIn("why='denied by F:2'", denials[1])

    def test_no_name_of_a_datagram_that_is_denied_is_looked_up(self):
        server = self.serve("deny to .invalid", "allow to any")
        with mock.patch.object(server.names, "ask", side_effect=AssertionError("was looked up")), \
                support.logging_of(self) as logs, client.associate(server.server_address) as udp:
            udp.sendto(b"x", ("passwords.invalid", 53))
            logs.wait("dst='passwords.invalid':53 why=")

    def test_udp_forbidden_altogether(self):
        server = self.serve("deny command udp", "allow to any")
        self.assertEqual(self.refusal(server, Cmd.UDP_ASSOCIATE, "0.0.0.0", 0), (Rep.NOT_ALLOWED, "'denied by F:1'"))

    def test_from_elsewhere_this_machine_is_out_of_reach(self):
        mine = own_address()
        need(self, mine, "an address that is not loopback")
        destination = self.enter(target(host="0.0.0.0"))
        with running(listen=("0.0.0.0",), open=True) as server:
            here = mine, server.server_address[1]
            server.server_address = here                                        # dialled from there, too
            connect_through(here, mine, destination[1]).close()
            for host in ("127.0.0.1", b"localhost", "0.0.0.0", "::ffff:127.0.0.1", "64:ff9b::7f00:1",
                         "169.254.169.254"):
                with self.subTest(host):
                    rep, why = self.refusal(server, Cmd.CONNECT, host, destination[1])
                    self.assertEqual(rep, Rep.NOT_ALLOWED)
                    self.assertRegex(why, r"denied by default rules:\d+'")

    def test_no_port_of_ours_leads_back_into_us(self):
        """systemd may pass sockets with several ports."""
        mine = own_address()
        need(self, mine, "an address that is not loopback")
        listeners = [self.enter(socket.create_server(("0.0.0.0", 0))) for _ in range(2)]
        ports = [listener.getsockname()[1] for listener in listeners]
        with served(socks5.Server(Config(listen=("0.0.0.0",), open=True), listeners=listeners)):
            for asked, port in itertools.product(ports, ports):
                with self.subTest(asked=asked, port=port):
                    self.assertEqual(refusal(self, client.connect, (mine, asked), (mine, port)), Rep.NOT_ALLOWED)

    def test_allow_from(self):
        destination = self.enter(target())
        server = self.enter(running(allow_from=(ip_network("127.0.0.0/29"), ip_network("2001:db8::/32"))))
        connect_through(server.server_address, *destination, source="127.0.0.7").close()
        with support.logging_of(self) as logs, dial(server.server_address, source="127.0.0.8") as sock:
            self.assertEqual(heard(sock, b"\5\1\0"), b"")
            logs.wait(r"refused client=127\.0\.0\.8:\d+ why='not in --allow-from'")

    @unittest.skipUnless(HAS_IPV6, "no IPv6 here")
    def test_allow_from_knows_ipv4_that_comes_by_ipv6(self):
        with target() as destination, running(listen=("::",), allow_from=(ip_network("127.0.0.0/8"),)) as server:
            connect_through(server.server_address[1], *destination).close()
            with dial(("::1", server.server_address[1])) as sock:
                self.assertEqual(heard(sock, b"\5\1\0"), b"")


class Reloading(Case):
    def test_a_bad_file_changes_nothing(self):
        with target() as destination, running(rules=self.write("allow")) as server:
            rules, users = server.rules, server.users
            for name, line, why in (("mistake", "alow", "rules:1: a rule starts with"), ("gone", None, "No such file")):
                self.write(line) if line else self.path.unlink()
                with self.subTest(name), self.assertLogs("socks5", "ERROR") as logs:
                    self.assertFalse(server.reload())
                    self.assertRegex(logs.output[0], "not reloaded, users and rules stay as they were: .*" + why)
                self.assertIs(server.rules, rules)
                self.assertIs(server.users, users)
                connect_through(server.server_address, *destination).close()

    def test_an_association_is_judged_again(self):
        """Its destinations are remembered, for speed; not across a reload."""
        with udp_socket() as sink, running(rules=self.write("allow")) as server, \
                client.associate(server.server_address) as udp:
            for _ in range(2):
                udp.sendto(b"x", sink.getsockname())
                self.assertEqual(sink.recv(10), b"x")
            self.write("deny to 127.0.0.1", "allow")
            self.assertTrue(server.reload())
            with support.logging_of(self) as logs:
                udp.sendto(b"x", sink.getsockname())
                logs.wait("denied client=.*:1'")
            sink.setblocking(False)
            self.assertRaises(BlockingIOError, sink.recv, 10)

    @unittest.skipUnless(hasattr(signal, "SIGHUP"), "no SIGHUP here")
    def test_by_sighup(self):
        with target(echo) as destination, spawned("--rules", self.write("allow")) as server:
            with connect_through(server.port, *destination) as tunnel:
                self.write("deny")
                server.signal(signal.SIGHUP)
                server.wait_line(r"reloaded users=0 rules=1 pid=")
                with self.assertRaisesRegex(AssertionError, "NOT_ALLOWED"):
                    connect_through(server.port, *destination)
                self.write("allow", "perhaps")
                server.signal(signal.SIGHUP)
                server.wait_line(r"ERROR not reloaded, .*rules:2: a rule starts with allow or deny, not 'perhaps'$")
                self.assertTrue(echoes(tunnel), "it stays as it is")
                self.write("allow")
                server.signal(signal.SIGHUP)
                wait_until(lambda: sum("reloaded users" in line for line in server.log) == 2)
                connect_through(server.port, *destination).close()


class Memory(unittest.TestCase):
    def test_what_an_address_may_is_not_what_a_name_with_the_same_bytes_or_another_user_may(self):
        rules, host = Rules(Config()), ip_address("97.98.99.100")
        clients = [Endpoint(ip_address(text), 5) for text in ("127.0.0.1", "192.0.2.1")]
        for endpoint, user in itertools.product(clients, (None, b"bob")):
            may = Authorizer(endpoint, user, lambda: rules, ())
            for dst, judged, resolved in ((Address(host, 80), 1, 0), (Address(b"abcd", 80), 0, 2),
                                          (Address(host, 81), 1, 0), (Address(b"abcd", 82), 1, 2)):
                resolve = mock.Mock(return_value=[host])
                with self.subTest(endpoint=endpoint, user=user, dst=dst), \
                        mock.patch.object(may, "permitted", side_effect=may.permitted) as permitted:
                    for _ in range(2):
                        self.assertEqual(may.reachable(dst, resolve), [host])
                    self.assertEqual((permitted.call_count, resolve.call_count), (judged, resolved))

    def test_what_a_name_may_is_what_its_address_may_at_the_end_of_the_lookup(self):
        denied, allowed, port = ip_address("192.0.2.9"), ip_address("192.0.2.1"), 80
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "rules")
            rules = []
            for line in ("deny to 192.0.2.9", "deny to 192.0.2.1", "deny to .test", "deny port 80"):
                with open(path, "w") as file:
                    file.write(line + "\nallow from 127.0.0.1\n")
                rules.append(Rules(Config(rules=path)))
        in_force = rules[0]
        may = Authorizer(Endpoint(ip_address("127.0.0.1"), 5), None, lambda: in_force, ())

        def reloaded(host):
            nonlocal in_force
            in_force = rules[1]
            return [allowed]

        for _ in range(2):
            self.assertEqual(may.reachable(Address(b"a.test", port), lambda host: [allowed]), [allowed])
            self.assertEqual(may.reachable(Address(b"b.test", port), lambda host: [denied, allowed]), [allowed])
            with self.assertRaisesRegex(RequestRefused, "denied by .*rules:1"):
                may.reachable(Address(b"c.test", port), lambda host: [denied])
        with self.assertRaisesRegex(RequestRefused, "denied by .*rules:1"):
            may.reachable(Address(b"a.test", port), reloaded)
        for in_force in rules[2:]:                              # for these, a name that may not is not looked up
            for _ in range(2):
                self.assertEqual(may.reachable(Address(b"a.example", 81), lambda host: [allowed]), [allowed])
                with self.assertRaisesRegex(RequestRefused, "denied by .*rules:1"):
                    may.reachable(Address(b"a.test", port), mock.Mock(side_effect=AssertionError("looked up")))

    def test_what_is_remembered_goes_with_a_crowd_and_rules_that_were_read_again_go(self):
        rules = Rules(Config())
        rules.known.put("key", [])
        here = ip_address("127.0.0.1")
        rules.judge(Asker(here, None, Cmd.CONNECT), here, 80)
        give_back()
        self.assertEqual((dict(rules.known), rules.judge.cache_info().currsize), ({}, 0))
        gone = weakref.ref(rules)
        del rules
        gc.collect()
        self.assertIsNone(gone())
