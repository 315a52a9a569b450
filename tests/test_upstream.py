"""--upstream: CONNECT, BIND and UDP ASSOCIATE through another SOCKS5 proxy, and rules that say via NAME."""
import contextlib
import socket
import subprocess
import threading
from ipaddress import ip_address
from unittest import mock

from socks5 import client
from socks5.access.check import report
from socks5.access.rules import Asker, Rules, parse_lines
from socks5.commands import upstream as upstream_module
from socks5.config import Config
from socks5.net.listeners import NO_DELAY, URGENT_IN_LINE
from socks5.relay.tunnel import Tunnel
from socks5.values import upstream
from socks5.protocol.codes import Cmd, Rep
from socks5.protocol.errors import ProxyError

from . import support
from .support import (
    PATIENCE_S, closed_port, greeted, logging_of, need_program, read_to_end, refusal, reset, run_cli, running, target,
    wait_until)
from .test_client import FREE, OK, script
from .test_udp import associated, exchange, remote, udp_socket


def url(proxy, user="", name=""):
    host, port = proxy.server_address[:2] if hasattr(proxy, "server_address") else proxy
    return upstream("%ssocks5://%s%s:%d" % (name and name + "=", user and user + "@", host, port))


class Case(support.Case):
    def chained(self, *upstreams, **options):
        return self.enter(running(upstream=upstreams, **options))

    def pair(self, **options):
        """A server, and one whose upstream it is."""
        other = self.enter(running())
        return other, self.chained(url(other), **options)

    def rules(self, *lines):
        path = self.new_folder() / "rules"
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return str(path)

    def tunnel(self, server, there, half_close=True):
        """A tunnel to an echo server works, and is half-closed where the upstream can do that."""
        with client.connect(server.server_address[:2], there) as sock:
            sock.settimeout(PATIENCE_S)
            sock.sendall(b"some words")
            if half_close:
                sock.shutdown(socket.SHUT_WR)
            self.assertEqual(read_to_end(sock) if half_close else sock.recv(100), b"some words")

    def peer_comes(self, server):
        with client.bind(server.server_address[:2], ("127.0.0.1", 0)) as waiting:
            waiting.sock.sendall(b"early")
            with socket.create_connection(waiting.bnd, PATIENCE_S) as peer:
                sock, who = waiting.accept(PATIENCE_S)
                with sock:
                    self.assertEqual(who, peer.getsockname())
                    self.assertEqual(peer.recv(5), b"early")
                    peer.sendall(b"from the peer")
                    self.assertEqual(sock.recv(100), b"from the peer")


class OurOwn(Case):
    """Through our own server."""

    def test_connect(self):
        other, server = self.pair()
        with target() as there, logging_of(self) as logs:
            for host in ("127.0.0.1", "localhost"):
                with self.subTest(host):
                    self.tunnel(server, (host, there[1]))
            wait_until(lambda: len([line for line in logs.output if "session " in line]) == 4)
        reached = "reached=%s:%d " % other.server_address
        self.assertEqual(len([line for line in logs.output if reached in line and "why='via upstream'" in line]), 2)
        self.assertEqual(len([line for line in logs.output if "dst='localhost'" in line]), 2, "the name went there")

    def test_the_connection_to_it_has_the_options_of_every_connection(self):
        other, server = self.pair()
        with target() as there, client.connect(server.server_address[:2], there):
            session, = server.sessions
            wait_until(lambda: isinstance(session.relay, Tunnel), "the loop has it")
            for level, option, value in (NO_DELAY, URGENT_IN_LINE, (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)):
                self.assertEqual(session.relay.remote.getsockopt(level, option), value, (level, option))

    def test_early_data(self):
        other, server = self.pair()
        with target() as there, greeted(server.server_address) as sock:
            sock.sendall(bytes.fromhex("05010001") + socket.inet_aton(there[0]) + there[1].to_bytes(2, "big")
                         + b"early")
            sock.shutdown(socket.SHUT_WR)
            self.assertEqual(read_to_end(sock)[10:], b"early")

    def test_names_are_not_looked_up_here(self):
        other, server = self.pair()
        with target() as there:
            with mock.patch.object(server.names, "resolve", side_effect=lambda host, *_: [host]) as resolve:
                self.tunnel(server, ("localhost", there[1]))
            self.assertEqual([call[0][0] for call in resolve.call_args_list], [ip_address("127.0.0.1")])

    def test_two_in_a_row_with_passwords(self):
        with running(user=(("al", "s:3"),)) as last, target() as there, remote() as udp_there:
            middle = self.chained(url(last, "al:s%3A3"), user=(("bo", "x"),))
            server = self.chained(url(middle, "bo:x"))
            self.tunnel(server, there)
            self.peer_comes(server)
            with associated(server) as udp:
                exchange(self, udp, udp_there)

    def test_a_bind_waits_for_longer_than_the_connect_timeout(self):
        class Late(upstream_module.UpstreamWait):
            def __init__(self, chain, dialogue, *args):
                super().__init__(chain, dialogue, *args)
                dialogue.deadline.at = 0.0                          # that of --connect-timeout is over

        with running() as other, mock.patch.object(upstream_module, "UpstreamWait", Late):
            self.peer_comes(self.chained(url(other)))

    def test_bind_for_any_peer_is_judged_here(self):
        rules = self.rules("allow to 0.0.0.0 command bind", "deny to 127.0.0.0/8 command bind", "allow")
        other, server = self.pair(rules=rules)
        with client.bind(server.server_address[:2]) as waiting, socket.create_connection(waiting.bnd, PATIENCE_S):
            self.assertEqual(refusal(self, waiting.accept, PATIENCE_S), Rep.NOT_ALLOWED)

    def test_bind_ends_when_the_client_leaves_or_none_comes(self):
        other, server = self.pair(bind_timeout=0.2)
        with client.bind(server.server_address[:2]) as waiting:
            self.assertEqual(refusal(self, waiting.accept, PATIENCE_S), Rep.TTL_EXPIRED)
        client.bind(server.server_address[:2]).close()
        wait_until(lambda: not len(other.sessions) and not len(server.sessions))

    def test_udp(self):
        other, server = self.pair()
        with remote() as there:
            with associated(server) as udp:
                for host in ("127.0.0.1", "localhost"):
                    for size in (0, 1, 1000, 1000, 60000):
                        udp.sendto(b"x" * size, (host, there[1]))
                        self.assertEqual(udp.recvfrom(), (b"X" * size, there))
                for _ in range(100):                        # bursts, by the header that is remembered
                    udp.sendto(b"again", there)
                self.assertEqual({udp.recvfrom() for _ in range(100)}, {(b"AGAIN", there)})
                udp.sendto(b"in three pieces", there, 3)
                self.assertEqual(udp.recvfrom(), (b"IN THREE PIECES", there))
                session, = server.sessions
                total = 2 * 61001 + 2 * 1000 + 500 + 15
                wait_until(lambda: session.moved() == (total, total), "all is counted")
            wait_until(lambda: not len(other.sessions))

    def test_udp_idle_time(self):
        other, server = self.pair(udp_idle_timeout=0.2)
        with associated(server) as udp, self.assertRaisesRegex(ProxyError, "ended the association"):
            udp.recvfrom()

    def test_udp_ends_with_the_upstreams(self):
        with running(udp_idle_timeout=0.2) as other, logging_of(self) as logs:
            server = self.chained(url(other))
            with associated(server) as udp, self.assertRaisesRegex(ProxyError, "ended the association"):
                udp.recvfrom()
            logs.wait(r"ended=remote why='upstream \(")

    def test_udp_from_elsewhere_than_the_relay_is_dropped(self):
        other, server = self.pair()
        with udp_socket() as stranger, udp_socket() as there, logging_of(self) as logs:
            with associated(server) as udp:
                udp.sendto(b"?", there.getsockname())
                there.recv(10)
                session, = server.sessions
                link, = session.relay.links.values()
                stranger.sendto(bytes.fromhex("00000001 7f000001 0009") + b"forged",
                                ("127.0.0.1", link.sock.getsockname()[1]))
                wait_until(lambda: session.relay.dropped["not the upstream"])
            logs.wait("1 not the upstream")


class Failures(Case):
    def test_its_REP_is_passed_on(self):
        other, server = self.pair()
        self.assertEqual(refusal(self, client.connect, server.server_address, ("127.0.0.1", closed_port())),
                         Rep.CONNECTION_REFUSED)
        self.assertEqual(refusal(self, client.connect, server.server_address, ("name.invalid", 80)),
                         Rep.HOST_UNREACHABLE)
        for number in range(1, 10):
            for call in (lambda proxy: client.connect(proxy, ("192.0.2.1", 80)), client.bind, client.associate):
                answer = bytes([5, number]) + OK[2:]
                with self.subTest(number), script(FREE, answer) as (proxy, _):
                    self.assertEqual(refusal(self, call, self.chained(url(proxy)).server_address),
                                     number if number < 9 else 1)

    def test_its_own_failures_are_1_and_the_log_says_why(self):
        closed = ("127.0.0.1", closed_port())
        with running(user=(("al", "x"),)) as other, script(b"HTTP/1.0 400") as (http, _), script(b"") as (mute, _), \
                target(lambda sock: sock.recv(100) and sock.recv(100)) as silent:
            for name, proxy, words, options in (
                    ("closed", url(closed), "127.0.0.1 ECONNREFUSED after", {}),
                    ("no name", upstream("socks5://name.invalid:1"), "'name.invalid' does not resolve", {}),
                    ("wrong password", url(other, "al:y"), "refused the user name or password", {}),
                    ("no password", url(other), "it may require a password", {}),
                    ("not SOCKS", url(http), "not a SOCKS5 proxy", {}),
                    ("gone", url(mute), "closed the connection", {}),
                    ("silent", url(silent), "no reply in time", {"connect_timeout": 0.2})):
                for call in (lambda proxy: client.connect(proxy, ("192.0.2.1", 80)), client.bind, client.associate):
                    with self.subTest(name), logging_of(self) as logs:
                        server = self.chained(proxy, **options)
                        self.assertEqual(refusal(self, call, server.server_address), Rep.GENERAL_FAILURE)
                        logs.wait(r"upstream \(.*" + words)

    def test_it_is_this_server_itself(self):
        with running(upstream=(upstream("socks5://127.0.0.1:1"),)) as server, logging_of(self) as logs:
            object.__setattr__(server.config, "upstream", (url(server),))
            server.reload()
            self.assertEqual(refusal(self, client.connect, server.server_address, ("192.0.2.1", 80)), 1)
            logs.wait("that is this server itself")

    def test_it_is_this_server_itself_by_its_options(self):
        """Then it does not start; another program's port is accepted."""
        itself = "is this server itself"
        for listen, proxy, words in ((["127.0.0.1"], "127.0.0.1:1080", itself),
                                     (["127.0.0.1"], "localhost:1080", itself),
                                     (["0.0.0.0", "--open"], "127.0.0.1:1080", itself),
                                     (["::", "--open"], "x:y@127.0.0.1:1080", itself),
                                     (["127.0.0.1"], "127.0.0.2:1080", ""), (["127.0.0.1"], "127.0.0.1:1081", ""),
                                     (["0.0.0.0", "--open"], "192.0.2.1:1080", "")):
            with self.subTest(listen=listen, proxy=proxy):
                status, _out, err = run_cli("-l", *listen, "--upstream", "socks5://" + proxy, "--check")
                self.assertEqual(status, 2 if words else 0, err)
                self.assertRegex(err, r"^socks5-server: --upstream: upstream \(%s\) %s\n$" % (
                    proxy.rpartition("@")[2], words) if words else "^$")

    def test_the_client_leaves(self):
        came = threading.Event()

        def wait(sock):
            sock.recv(100)
            came.set()
            self.assertEqual(sock.recv(100), b"")
            left.set()

        left = threading.Event()
        with target(wait) as silent:
            server = self.chained(url(silent), connect_timeout=600)
            with greeted(server.server_address) as sock:
                sock.sendall(bytes.fromhex("05010001 c0000201 0050"))
                came.wait(PATIENCE_S)
                reset(sock)
            self.assertTrue(left.wait(PATIENCE_S))
            wait_until(lambda: not len(server.sessions))


class Ways(Case):
    def test_rules(self):
        config = Config(upstream=(upstream("socks5://192.0.2.1:1"), upstream("of=socks5://192.0.2.2:1")))
        rules = Rules(config)
        object.__setattr__(rules, "rules", tuple(parse_lines((
            "deny to bad.example", "allow to .of.example via of", "allow to .near.example via direct",
            "allow to 10.0.0.0/8 via of", "allow port 80"), "rules")))
        asker = Asker(ip_address("192.0.2.9"), None, Cmd.CONNECT)
        for name, port, expected in (("bad.example", 80, "denied"), ("a.of.example", 1, "of"),
                                     ("near.example", 1, None), ("b.example", 80, None)):
            with self.subTest(name):
                verdict = rules.judge_name(asker, port, name.encode())
                self.assertEqual(verdict and (verdict.upstream.name if verdict.allowed else "denied"), expected)
        for address, port, expected in (("10.1.1.1", 1, "of"), ("192.0.2.7", 80, "upstream")):
            self.assertEqual(rules.judge(asker, ip_address(address), port).upstream.name, expected)
        self.assertEqual([way and way.name for way in rules.upstreams(asker)], ["of", None, "upstream"])
        several = [ip_address(text) for text in ("10.1.1.1", "192.0.2.7", "10.1.1.2")]      # of one name
        way, addresses = rules.first_way(asker, several, 80, b"c.example")
        self.assertEqual((way.name, addresses), ("of", [several[0], several[2]]), "no rule leads the other there")

    def test_the_default_rules_leave_names_to_the_upstream(self):
        rules = Rules(Config(upstream=(upstream("socks5://192.0.2.1:1"),)))
        asker = Asker(ip_address("192.0.2.9"), None, Cmd.CONNECT)
        self.assertEqual(rules.judge_name(asker, 80, b"a.example").upstream.name, "upstream")
        self.assertFalse(rules.judge(asker, ip_address("127.0.0.1"), 80).allowed)
        self.assertNotIn("allow to .", [rule.line for rule in Rules(Config()).rules])

    def test_traffic_is_split(self):
        """By name and by address, for CONNECT and UDP; an address that a rule needed is what the upstream gets."""
        rules = self.rules("allow to localhost via of", "allow to 127.0.0.2 via of", "allow via direct")
        with running() as other, target() as there, target(host="127.0.0.2") as second, remote() as udp_there, \
                remote(host="127.0.0.2") as udp_second, logging_of(self) as logs:
            server = self.chained(url(other, name="of"), rules=rules)
            for where in (("localhost", there[1]), second, there):
                self.tunnel(server, where)
            with associated(server) as udp:
                for where in (udp_second, udp_there):
                    exchange(self, udp, where)
            wait_until(lambda: len([line for line in logs.output if "session " in line]) == 7)
        lines = [line for line in logs.output if "session " in line and "cmd=CONNECT" in line]
        self.assertEqual(len([line for line in lines if "reached=%s:%d " % other.server_address in line]), 2)
        self.assertEqual(len([line for line in lines if "dst=%s:%d" % there in line]), 1)

    def test_a_name_that_a_rule_denies_goes_to_no_upstream(self):
        other, server = self.pair(rules=self.rules("deny to localhost", "allow"))
        with target() as there:
            self.assertEqual(refusal(self, client.connect, server.server_address, ("localhost", there[1])),
                             Rep.NOT_ALLOWED)
            self.tunnel(server, there)

    def test_a_rule_needs_the_address(self):
        other, server = self.pair(rules=self.rules("deny to 10.0.0.0/8", "allow to any"))
        with target() as there, logging_of(self) as logs:
            self.tunnel(server, ("localhost", there[1]))
            wait_until(lambda: len([line for line in logs.output if "session " in line]) == 2)
        self.assertEqual(len([line for line in logs.output if "dst=127.0.0.1:" in line]), 1)

    def test_udp_that_one_of_two_ways_lacks(self):
        rules = self.rules("allow to 127.0.0.2 via of", "allow via direct")
        with script(FREE, bytes([5, 7]) + OK[2:]) as (proxy, _), remote() as there, logging_of(self) as logs:
            server = self.chained(url(proxy, name="of"), rules=rules)
            with associated(server) as udp:
                udp.sendto(b"nowhere", ("127.0.0.2", 9))
                exchange(self, udp, there)
            logs.wait("1 for upstream of, which relays none.*answered X'07'")

    def test_check(self):
        config = Config(upstream=(upstream("socks5://al:s3cret@192.0.2.1:1"), upstream("of=socks5://h:2")))
        lines = report(config)
        for line in ("  allow to .", "upstream (192.0.2.1:1), as user 'al'", "upstream of (h:2)",
                     "an allow without via goes via upstream", "warning: no rule says via of"):
            self.assertIn(line, lines)
        self.assertNotIn("s3cret", "\n".join(lines))


class Programs(Case):
    """Other proxies as upstream."""

    @contextlib.contextmanager
    def program(self, port, *args):
        process = subprocess.Popen(args, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            def listens():
                with socket.socket() as sock:
                    return not sock.connect_ex(("127.0.0.1", port))
            wait_until(listens, args[0])
            yield "127.0.0.1", port
        finally:
            process.terminate()
            process.wait(PATIENCE_S)

    def test_microsocks(self):
        microsocks, port = need_program(self, "microsocks"), closed_port()
        with self.program(port, microsocks, "-i", "127.0.0.1", "-p", str(port), "-u", "al", "-P", "x") as proxy, \
                target() as there:
            server = self.chained(url(proxy, "al:x"))
            self.tunnel(server, there, half_close=False)
            self.tunnel(server, ("localhost", there[1]), half_close=False)
            for call in (client.bind, client.associate):
                self.assertEqual(refusal(self, call, server.server_address), Rep.COMMAND_NOT_SUPPORTED)

    def test_dante(self):
        danted, port = need_program(self, "danted"), closed_port()
        folder = self.new_folder()
        (folder / "conf").write_text("""
            logoutput: /dev/null
            internal: 127.0.0.1 port = %d
            external: 127.0.0.1
            clientmethod: none
            socksmethod: none
            user.notprivileged: nobody
            client pass { from: 0.0.0.0/0 to: 0.0.0.0/0 }
            socks pass { from: 0.0.0.0/0 to: 0.0.0.0/0 command: bind connect udpassociate }
            socks pass { from: 0.0.0.0/0 to: 0.0.0.0/0 command: bindreply udpreply }
            """ % port)
        with self.program(port, danted, "-f", str(folder / "conf"), "-p", str(folder / "pid")) as proxy, \
                target() as there, remote() as udp_there:
            server = self.chained(url(proxy))
            self.tunnel(server, there)
            self.tunnel(server, ("localhost", there[1]))
            self.peer_comes(server)
            with associated(server) as udp:
                exchange(self, udp, udp_there)
