"""The status page: /metrics, /healthz, /sessions, which requests it accepts, and its sums over several processes."""
import base64
import bisect
import contextlib
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import unittest
from ipaddress import ip_address
from unittest import mock

from socks5 import client, log
import socks5
from socks5.config import Config, ConfigError
from socks5.net.addresses import Endpoint
from socks5.protocol.codes import Cmd, Rep
from socks5.protocol.messages import Address, Reply, Request
from socks5.server.counters import Shared
from socks5.server.sessions import Sessions
from socks5.status import beside, line, metrics, web
from socks5.status.channel import Channel
from socks5.status.history import History
from socks5.status.meter import AT_ONCE, BOUNDS_S, BUCKETS, Board, Meter
from tests import support
from tests.support import (
    PATIENCE_S, SCRIPT, ask, children, closed_port, connect_through, dial, echoes, greeted, heard, in_threads, need,
    need_program, read_to_end, run_cli, run_python, script, served, spawned, taken_port, target, udp_socket, users_line,
    wait_until)

FORKS = hasattr(os, "fork")
ONE_AND_TWO = ("1", "2") if FORKS else ("1",)                       # workers
SESSIONS = int(os.environ.get("SOCKS5_STATUS_SESSIONS", "2000"))    # of which metrics and log must agree; 8 or more


def get(port, path, method="GET", host="127.0.0.1", **headers):
    """(status, headers, body)"""
    connection = http.client.HTTPConnection(host, port, timeout=PATIENCE_S)
    with contextlib.closing(connection):
        connection.request(method, path, headers={name.replace("_", "-"): value for name, value in headers.items()})
        answer = connection.getresponse()
        return answer.status, dict(answer.getheaders()), answer.read()


def json_of(port, path):
    status, _headers, body = get(port, path)
    assert status == 200, (status, body)
    return json.loads(body)


def samples(port):
    """Each line of /metrics as its name with labels, and its value."""
    text = get(port, "/metrics")[2].decode()
    return {name: float(value) for name, value in re.findall(r"^([^#\s]\S*|[^#{]\S*\{[^}]*\}) (\S+)$", text, re.M)}


def total(port, name, **labels):
    parts = ['%s="%s"' % pair for pair in labels.items()]
    return sum(value for key, value in samples(port).items()
               if key.partition("{")[0] == name and all(part in key for part in parts))


@contextlib.contextmanager
def status(*args, **kwargs):
    """Our server with a status page: yields it and the page's port."""
    with spawned("--status", "127.0.0.1:0", *args, **kwargs) as server:
        yield server, int(server.wait_line(r"status on http://127.0.0.1:(\d+)/$", server.lines).group(1))


@contextlib.contextmanager
def serving(source):
    """The page in this process, with the answers of `source`: yields its port."""
    with served(web.Web(socket.create_server(("127.0.0.1", 0)), source, None, False), 0.01) as page:
        yield page.server_address[1]


class Pages(unittest.TestCase):
    def test_sessions_and_metrics_of_one_process_and_of_several(self):
        for count in ("1", "3") if FORKS else ("1",):
            with self.subTest(workers=count), target() as echo, \
                    status("-w", count, "-u", "bob:right") as (server, port), contextlib.ExitStack() as stack:
                tunnels = [stack.enter_context(connect_through(server.port, *echo, user=(b"bob", b"right")))
                           for _ in range(9)]
                self.assertTrue(all(map(echoes, tunnels)))
                found = json_of(port, "/sessions")
                self.assertEqual((len(found["sessions"]), found["more"]), (9, False))
                one = found["sessions"][0]
                self.assertEqual([one[key] for key in ("user", "command", "destination", "state", "up", "down", "rep")],
                                 ["bob", "CONNECT", "%s:%d" % echo, "relaying", 4, 4, "SUCCEEDED"])
                for query, number in (("user=bob", 9), ("user=eve", 0), ("client=127.0.0.0/8", 9), ("client=::1", 0),
                                      ("command=BIND", 0), ("state=relaying&command=CONNECT", 9), ("limit=4", 4)):
                    with self.subTest(query):
                        found = json_of(port, "/sessions?" + query)
                        self.assertEqual((len(found["sessions"]), found["more"]), (number, query == "limit=4"))
                wait_until(lambda: total(port, "socks5_sessions", state="relaying") == 9, "the sweep")
                self.assertEqual(total(port, "socks5_bytes_total", direction="up"), 36, "of live sessions")
                for tunnel in tunnels:
                    tunnel.close()
                wait_until(lambda: total(port, "socks5_connections_total") == 9, "their end")
                for way in ("up", "down"):
                    self.assertEqual(total(port, "socks5_bytes_total", direction=way), 36, "and counted once")
                self.assertEqual(total(port, "socks5_connections_total", command="CONNECT", rep="SUCCEEDED"), 9)
                self.assertEqual(total(port, "socks5_handshake_seconds_count"), 9)
                self.assertEqual(total(port, "socks5_connect_seconds_count"), 9)
                self.assertEqual(total(port, "socks5_logins_total", result="right"), 9)
                self.assertEqual(total(port, "socks5_workers"), int(count))
                if os.path.exists("/proc/self/fd"):
                    self.assertGreater(total(port, "socks5_open_fds"), 5)
                    with open("/proc/%d/limits" % server.process.pid) as file:      # the server raises it
                        soft, = re.findall(r"Max open files +\d+ +(\d+)", file.read())
                    self.assertEqual(total(port, "socks5_max_fds"), int(count) * int(soft))
                wait_until(lambda: total(port, "socks5_sessions") == 0, "the sweep")

    def test_a_handshake_field_by_field_and_no_password(self):
        with status("-w", "2" if FORKS else "1", "-u", "bob:s3cret") as (server, port):
            with greeted(server.port, (b"bob", b"s3cret")) as sock:
                self.assertEqual(ask(sock, Cmd.CONNECT, "127.0.0.1", closed_port()).rep, Rep.CONNECTION_REFUSED)
            with dial(server.port) as sock:
                sock.sendall(b"\5\1\2" + b"\1\3eve\6wr0ng!")
                read_to_end(sock)
            wait_until(lambda: len(json_of(port, "/recent")) == 2)
            wrong, refused = sorted(json_of(port, "/recent"), key=lambda one: one["user"], reverse=True)
            self.assertEqual((wrong["user"], wrong["why"], wrong["refused"]),
                             ("eve", "wrong user name or password", True))
            story = json_of(port, "/sessions/%d" % refused["id"])
            self.assertEqual([message["title"].partition(":")[0] for message in story["messages"]],
                             ["Greeting", "Selection", "Login", "LoginStatus", "Request", "Reply"])
            self.assertEqual([field["name"] for field in story["messages"][4]["fields"]],
                             ["VER", "CMD", "RSV", "ATYP", "DST.ADDR", "DST.PORT"])
            self.assertEqual(story["messages"][4]["fields"][4], {
                "name": "DST.ADDR", "bytes": "7f000001", "means": "127.0.0.1"})
            self.assertEqual(story["messages"][5]["notes"], ["that is: the host is there, and nothing listens on that "
                                                             "port"])
            login = story["messages"][2]["fields"]
            self.assertEqual([(field["name"], field["bytes"]) for field in login[2:]],
                             [("UNAME", "626f62"), ("PLEN", None), ("PASSWD", None)])
            for path in ("/sessions/%d" % refused["id"], "/sessions/%d" % wrong["id"], "/recent", "/summary"):
                text = get(port, path)[2]
                for secret in (b"s3cret", b"s3cret".hex().encode(), b"wr0ng!", b"wr0ng!".hex().encode()):
                    self.assertNotIn(secret, text, path)
            self.assertEqual(get(port, "/sessions/999999")[0], 404)
            self.assertEqual(total(port, "socks5_logins_total", result="wrong"), 1)

    def test_datagrams_and_their_drops(self):
        with status() as (server, port), udp_socket() as peer:
            with client.associate(("127.0.0.1", server.port), None, PATIENCE_S) as udp:
                udp.settimeout(PATIENCE_S)
                for _ in range(3):
                    udp.sendto(b"x" * 10, peer.getsockname())
                    _data, sender = peer.recvfrom(100)
                peer.sendto(b"y" * 7, sender)
                udp.recvfrom()
                with udp_socket() as foreign:
                    foreign.sendto(bytes(20), udp.relay)
                wait_until(lambda: total(port, "socks5_udp_dropped_total", reason="not the client") == 1, "the sweep")
            wait_until(lambda: total(port, "socks5_connections_total", command="UDP_ASSOCIATE") == 1)
            self.assertEqual(total(port, "socks5_udp_datagrams_total", direction="up"), 3)
            self.assertEqual(total(port, "socks5_udp_datagrams_total", direction="down"), 1)
            self.assertEqual(total(port, "socks5_udp_dropped_total"), 1)
            self.assertEqual(total(port, "socks5_bytes_total", direction="up"), 30)

    def test_the_two_replies_of_a_bind_are_one_handshake(self):
        with status() as (server, port), client.bind(("127.0.0.1", server.port)) as waiting:
            with dial(waiting.bnd), waiting.accept(PATIENCE_S)[0]:
                wait_until(lambda: total(port, "socks5_sessions", state="relaying") == 1, "the second reply")
            wait_until(lambda: total(port, "socks5_connections_total", command="BIND", rep="SUCCEEDED") == 1)
            self.assertEqual(total(port, "socks5_handshake_seconds_count"), 1)

    def test_draining_is_said_until_the_end(self):
        for count in ONE_AND_TWO:
            with self.subTest(workers=count), target() as echo, status("-w", count, "--drain-timeout", "600") as (
                    server, port), connect_through(server.port, *echo) as tunnel:
                self.assertEqual(get(port, "/healthz")[::2], (200, b"ok\n"))
                server.signal(signal.SIGTERM)
                wait_until(lambda: get(port, "/healthz")[::2] == (503, b"draining\n"))
                tunnel.close()
                server.process.wait(PATIENCE_S)
                self.assertRaises(OSError, get, port, "/healthz")

    def test_many_sessions_and_metrics_that_wait_for_no_worker(self):
        """More sessions than a worker counts between two moments for others; /metrics reads shared memory only."""
        many = 2 * AT_ONCE + 10
        with target() as echo, status("-w", "2" if FORKS else "1") as (server, port), contextlib.ExitStack() as stack:
            for _ in range(many):
                stack.enter_context(connect_through(server.port, *echo))
            wait_until(lambda: total(port, "socks5_sessions") == many, "the sweep")
            self.assertEqual(len(json_of(port, "/sessions")["sessions"]), many)
            if FORKS and os.path.exists("/proc/self/task"):
                workers = server_pids(port, server)
                for pid in workers:
                    os.kill(pid, signal.SIGSTOP)
                try:
                    self.assertEqual(total(port, "socks5_sessions"), many)
                finally:
                    for pid in workers:
                        os.kill(pid, signal.SIGCONT)


class Standards(unittest.TestCase):
    def page(self):
        board = Board(2)
        board.put(0, "pid", "", os.getpid())
        board.add(0, "bytes", "up", 5)
        board.add(1, "bytes", "up", 7)
        board.add(1, "handshake", "3", 2)
        board.add(1, "handshake", "sum", 1500000)
        return metrics.page(board, 3, "1.2.3")

    def test_promtool_has_no_complaint(self):
        promtool = need_program(self, "promtool")           # Debian: prometheus
        done = subprocess.run([promtool, "check", "metrics"], input=self.page(), capture_output=True, text=True)
        self.assertEqual((done.returncode, done.stdout + done.stderr), (0, ""))

    def test_the_official_parser_reads_it(self):
        python = os.environ.get("SOCKS5_VENV_PYTHON", "")
        code = ("import sys, json\nfrom prometheus_client.parser import text_string_to_metric_families as parse\n"
                "print(json.dumps([[f.name, f.type, [[s.name, s.labels, s.value] for s in f.samples]] "
                "for f in parse(sys.stdin.read())]))")
        done = python and subprocess.run([python, "-c", code], input=self.page(), capture_output=True, text=True)
        need(self, done and "No module named" not in done.stderr,
             "prometheus_client (pip install prometheus-client, for SOCKS5_VENV_PYTHON)")
        found = {name: (kind, values) for name, kind, values in json.loads(done.stdout)}
        self.assertEqual(found["socks5_bytes"], ("counter", [
            ["socks5_bytes_total", {"direction": "up"}, 12.0], ["socks5_bytes_total", {"direction": "down"}, 0.0]]))
        kind, values = found["socks5_handshake_seconds"]
        self.assertEqual(kind, "histogram")
        self.assertIn(["socks5_handshake_seconds_bucket", {"le": "0.005"}, 0.0], values)
        self.assertIn(["socks5_handshake_seconds_bucket", {"le": "0.01"}, 2.0], values)
        self.assertIn(["socks5_handshake_seconds_bucket", {"le": "+Inf"}, 2.0], values)
        self.assertIn(["socks5_handshake_seconds_sum", {}, 1.5], values)
        self.assertNotIn("unknown", {kind for kind, _values in found.values()})

    def test_the_buckets_ascend(self):
        for name, counted in (("handshake", 2), ("connect", 0)):
            with self.subTest(name):
                rows = re.findall(r'^socks5_%s_seconds_bucket{le="(.+)"} (\d+)$' % name, self.page(), re.M)
                bounds, counts = [float(bound) for bound, _ in rows], [int(count) for _, count in rows]
                self.assertEqual((bounds, counts), (sorted(set(bounds)), sorted(counts)))
                self.assertEqual((bounds[-1], counts[-1]), (float("inf"), counted))

    def test_every_name_begins_with_ours_and_has_help(self):
        text = self.page()
        names = set(re.findall(r"^# TYPE (\S+)", text, re.M))
        self.assertEqual(names, set(re.findall(r"^# HELP (\S+) \S", text, re.M)))
        self.assertEqual([name for name in names if not name.startswith("socks5_")], [])


class Requests(support.Case):
    def test_a_foreign_name_is_refused(self):
        with status() as (_server, port):
            for host, code in (("127.0.0.1:%d" % port, 200), ("localhost", 200), ("[::1]:80", 200), ("10.0.0.7", 200),
                               ("evil.example", 421), ("evil.example:%d" % port, 421), ("127.0.0.1.evil.example", 421),
                               ("localhost.evil.example", 421), ("[::1].evil.example", 421), ("a b", 421)):
                for path in ("/", "/metrics", "/sessions", "/healthz"):
                    with self.subTest(host=host, path=path):
                        self.assertEqual(get(port, path, Host=host)[0], code)

    def test_what_every_answer_says_to_a_browser(self):
        with status() as (_server, port):
            for path in ("/", "/metrics", "/nothing"):
                headers = get(port, path)[1]
                self.assertIn("default-src 'none'", headers["Content-Security-Policy"])
                self.assertNotIn("unsafe", headers["Content-Security-Policy"])
                self.assertEqual(headers["X-Content-Type-Options"], "nosniff")
                self.assertNotIn("Set-Cookie", headers)
            page = get(port, "/")[2]
            self.assertEqual(re.findall(rb"""(?:src|href)=["']?(?:https?:)?//""", page), [], "no outside asset")
            self.assertNotIn(b"innerHTML", page)

    def test_get_and_head_only(self):
        with status() as (_server, port):
            for method in ("POST", "PUT", "DELETE", "OPTIONS", "TRACE", "BREW"):
                code, headers, _body = get(port, "/sessions", method)
                self.assertEqual((code, headers["Allow"]), (405, "GET, HEAD"))
            code, headers, body = get(port, "/metrics", "HEAD")
            self.assertEqual((code, body), (200, b""))
            self.assertGreater(int(headers["Content-Length"]), 1000)

    def test_a_wrong_parameter_is_told(self):
        with status() as (_server, port):
            for query in ("client=x", "command=GET", "state=x", "limit=0", "limit=x", "limit=10001", "nothing=1",
                          "&".join("a=1" for _ in range(20))):
                with self.subTest(query):
                    self.assertEqual(get(port, "/sessions?" + query)[0], 400)
            self.assertEqual(get(port, "/summary?since=x")[0], 400)
            self.assertEqual(get(port, "/sessions/x")[0], 404)

    def test_requests_are_bounded(self):
        with mock.patch("socks5.status.web.HEAD_S", 60), serving(None) as port:
            for raw in (b"GET / HTTP/1.1\r\nX: " + b"x" * 10000, b"\r\n\r\n", b"GET\r\n\r\n", b"\x16\x03\x01\n\n",
                        b"GET / HTTP/1.1\r\n" + b"A: b\r\n" * 200 + b"\r\n"):
                with self.subTest(raw[:20]), dial(port) as sock, contextlib.suppress(ConnectionResetError):
                    sock.sendall(raw)
                    self.assertNotIn(b" 200 ", read_to_end(sock)[:20])
        with mock.patch("socks5.status.web.HEAD_S", 0.1), serving(None) as port, dial(port) as sock:
            sock.sendall(b"GET ")
            self.assertEqual(heard(sock), b"", "its time is over")

    def test_one_address_does_not_take_all_places(self):
        share = web.MOST - web.MOST // 10
        with mock.patch("socks5.status.web.HEAD_S", 60), serving(None) as port:
            threads = threading.active_count()
            for turn in range(2):                       # the places come back
                with contextlib.ExitStack() as stack:
                    silent = [stack.enter_context(dial(port)) for _ in range(share)]
                    for sock in silent:
                        sock.sendall(b"GET ")
                    for _ in range(4):
                        with dial(port) as more:
                            self.assertEqual(heard(more, b"GET "), b"", "closed at once")
                    with dial(port, source="127.0.0.2") as sock:
                        self.assertIn(b" 200 ", heard(sock, b"GET / HTTP/1.0\r\n\r\n")[:20], "another is served")
                    for sock in silent:
                        sock.sendall(b"/ HTTP/1.0\r\n\r\n")
                        self.assertIn(b" 200 ", read_to_end(sock)[:20])
                wait_until(lambda: threading.active_count() <= threads, "free again")

    def test_sessions_are_asked_for_by_one_request_at_a_time(self):
        """28 at once made a round trip through the same process take 300 times as long."""
        asked, go_on, daemons = threading.Event(), threading.Event(), []

        class Slow:
            def sessions(self, query, limit):
                if not asked.is_set():
                    daemons.append(threading.current_thread().daemon)
                    asked.set()
                    go_on.wait(PATIENCE_S)
                return b"{}"

            def metrics(self):
                return "text/plain", b"served meanwhile"

        codes = []
        with serving(Slow()) as port:
            first = threading.Thread(target=lambda: codes.append(get(port, "/sessions")[0]), daemon=True)
            first.start()
            self.assertTrue(asked.wait(PATIENCE_S))
            with mock.patch("socks5.status.web.TURN_S", 0.01):
                for path, code in (("/sessions", 503), ("/metrics", 200)):
                    self.assertEqual(get(port, path)[0], code, path)
            go_on.set()
            first.join(PATIENCE_S)
            self.assertEqual((codes, get(port, "/sessions")[0]), ([200], 200))
        self.assertEqual(daemons, [True], "the end of the program waits for no answer")

    def test_beyond_loopback_only_with_a_password(self):
        self.assertRaises(ConfigError, Config, status=("0.0.0.0", 9180))
        self.assertRaises(ConfigError, Config, status=("::", 9180))
        self.assertEqual(Config(status=("0.0.0.0", 9180), open=True).status[1], 9180)
        self.check_refused(run_cli("-p", "0", "--status", "0.0.0.0:0"), "--status 0.0.0.0")
        for count in ONE_AND_TWO:
            with self.subTest(workers=count), \
                    spawned("-w", count, "--status", "0.0.0.0:0", "-u", "bob:right") as server:
                port = int(server.wait_line(r"status on http://0.0.0.0:(\d+)/$", server.lines).group(1))
                for user, code in (("bob:right", 200), ("bob:wrong", 401), ("eve:right", 401), ("bob", 401), ("", 401)):
                    with self.subTest(user):
                        coded = "Basic " + base64.b64encode(user.encode()).decode()
                        self.assertEqual(get(port, "/metrics", Authorization=coded)[0], code)
                status_code, headers, _body = get(port, "/")
                self.assertEqual((status_code, headers["WWW-Authenticate"][:5]), (401, "Basic"))
                self.assertEqual(get(port, "/healthz")[0], 200)
                server.wait_line(r"auth_failed client=127.0.0.1 user='eve'")

    def test_a_reload_brings_new_passwords_to_the_page(self):
        users = self.new_folder() / "users"
        users.write_text(users_line("bob", b"first"))
        for count in ONE_AND_TWO:
            with self.subTest(workers=count), \
                    spawned("-w", count, "--status", "0.0.0.0:0", "--users", users) as server:
                port = int(server.wait_line(r"status on http://0.0.0.0:(\d+)/$", server.lines).group(1))
                users.write_text(users_line("bob", b"second%s" % count.encode()))
                server.signal(signal.SIGHUP)
                server.wait_line(r"reloaded users=1")
                coded = "Basic " + base64.b64encode(b"bob:second" + count.encode()).decode()
                wait_until(lambda: get(port, "/metrics", Authorization=coded)[0] == 200)

    def test_check_says_where_it_would_be(self):
        self.assertIn("status would be on http://127.0.0.1:9180/, with no password",
                      run_cli("--check", "--status", "127.0.0.1:9180")[1])
        self.assertIn("http://[::]:9180/, with a password", run_cli("--check", "--status", "[::]:9180", "-u", "a:b")[1])

    def test_a_port_that_is_taken(self):
        with taken_port() as port:
            self.check_refused(run_cli("-p", "0", "--status", "127.0.0.1:%d" % port), "cannot listen")


def code_of(port, path="/healthz"):
    try:
        return get(port, path)[0]
    except (OSError, http.client.HTTPException):
        return None


@unittest.skipUnless(FORKS, "this system has no fork")
class Processes(unittest.TestCase):
    def test_totals_agree_with_the_log_over_several_workers_and_a_killed_one(self):
        """SOCKS5_STATUS_SESSIONS=10000 makes it five times as many: 10 s."""
        need(self, os.path.exists("/proc/self/task"), "/proc")
        closed = closed_port()
        with target() as echo, status("-w", "3") as (server, port):
            def some(number):
                for turn in range(number):
                    if turn % 5 == 0:
                        with contextlib.suppress(AssertionError):
                            connect_through(server.port, "127.0.0.1", closed)
                    else:
                        with connect_through(server.port, *echo) as tunnel:
                            tunnel.sendall(b"x" * (turn % 700))
                            tunnel.shutdown(socket.SHUT_WR)
                            read_to_end(tunnel)

            def round_of(number, before):
                in_threads(4, some, number)
                wait_until(lambda: len(lines()) == before + 4 * number, "their lines")

            def lines():
                return [text for text in list(server.log) if " session client=" in text]

            round_of(SESSIONS // 8, 0)
            wait_until(lambda: total(port, "socks5_workers") == 3)
            page = set(children(server.process.pid))
            victim = int(server_pids(port, server)[0])
            os.kill(victim, signal.SIGKILL)
            wait_until(lambda: total(port, "socks5_worker_restarts_total") == 1
                       and total(port, "socks5_workers") == 3, "another worker")
            self.assertNotEqual(set(children(server.process.pid)), page)
            round_of(SESSIONS // 8, SESSIONS // 2)
            logged = [re.search(r"cmd=(\S+) .* rep=(\S+) up=(\d+) down=(\d+)", text).groups() for text in lines()]
            wait_until(lambda: total(port, "socks5_connections_total") == SESSIONS)
            for rep in ("SUCCEEDED", "CONNECTION_REFUSED"):
                self.assertEqual(total(port, "socks5_connections_total", command="CONNECT", rep=rep),
                                 sum(found[1] == rep for found in logged))
            self.assertEqual(total(port, "socks5_bytes_total", direction="up"), sum(int(found[2]) for found in logged))
            self.assertEqual(total(port, "socks5_bytes_total", direction="down"),
                             sum(int(found[3]) for found in logged))
            self.assertEqual(total(port, "socks5_sessions_total"), SESSIONS)
            self.assertEqual(total(port, "socks5_handshake_seconds_count"), SESSIONS)

    def test_the_page_comes_back_when_its_process_died(self):
        need(self, os.path.exists("/proc/self/task"), "/proc")
        with target() as echo, status("-w", "2") as (server, port), connect_through(server.port, *echo):
            wait_until(lambda: code_of(port) == 200)
            page = page_pid(server, port)
            os.kill(page, signal.SIGKILL)
            server.wait_line(r"status_died pid=%d how=signal-9" % page)
            wait_until(lambda: code_of(port) == 200, "another one")
            self.assertEqual(len(json_of(port, "/sessions")["sessions"]), 1)
            self.assertEqual(total(port, "socks5_workers"), 2)
            server.end(signal.SIGKILL)
            wait_until(lambda: code_of(port) is None, "it ends with its supervisor")

    def test_nothing_of_it_without_the_option(self):
        need(self, os.path.exists("/proc/self/task"), "/proc")
        with spawned("-w", "2") as server:
            wait_until(lambda: len(children(server.process.pid)) == 2)
        code = "import sys, socks5.cli; print('http.server' in sys.modules)"
        self.assertEqual(run_python("-c", code), (0, "False\n", ""))

    def test_want_of_memory_does_not_end_the_thread_that_counts(self):
        counted, failures = threading.Event(), [MemoryError()]

        def sweep(_meter, _sessions):
            if failures:
                raise failures.pop()
            counted.set()

        shared = Shared(1)
        with socks5.Server(Config(port=0)) as server, mock.patch("socks5.status.beside.SWEEP_S", 0.01), \
                mock.patch("socks5.protocol.memory.REST_S", 0), mock.patch.object(Meter, "sweep", sweep):
            status = beside.Status(server.config, shared, [], [], None)
            status.attend(server, 0)
            self.assertTrue(counted.wait(PATIENCE_S))
            status.close()

    def test_a_worker_that_is_gone_costs_its_answer_only(self):
        channel = Channel()
        with mock.patch("socks5.status.channel.ANSWER_S", 0.05):
            self.assertEqual(channel.ask({"what": "recent"}).read(), [], "no worker is there")
        asked = channel.ask({"what": "recent"})

        def answer(query):
            yield b"1"
            if query["what"] == "bug":
                raise ValueError(query)
            yield b"2"

        worker = threading.Thread(target=channel.answer, args=(answer, lambda: None, 0.02), daemon=True)
        worker.start()
        self.assertEqual(asked.read(), [b"1", b"2"], "that of the worker that comes next")
        with self.assertLogs("socks5.status.channel", "ERROR"):
            self.assertEqual(channel.ask({"what": "bug"}).read(), [b"1"])
        self.assertEqual(channel.ask({"what": "recent"}).read(), [b"1", b"2"])
        longest = {"what": "sessions", "user": "\xe9" * web.HEAD_BYTES}
        self.assertEqual(channel.ask(longest).read(), [b"1", b"2"])
        channel.close()
        worker.join(PATIENCE_S)
        self.assertFalse(worker.is_alive())


def server_pids(port, server):
    """Those of the workers: all children that listen for clients."""
    return [pid for pid in children(server.process.pid) if pid != page_pid(server, port)]


def page_pid(server, port):
    """The child that has the page's port open."""
    with open("/proc/net/tcp") as file:
        inodes = [row.split()[9] for row in file.readlines()[1:]
                  if row.split()[1].endswith(":%04X" % port) and row.split()[3] == "0A"]
    for pid in children(server.process.pid):
        for fd in os.listdir("/proc/%d/fd" % pid):
            with contextlib.suppress(OSError):
                if os.readlink("/proc/%d/fd/%s" % (pid, fd)) == "socket:[%s]" % inodes[0]:
                    return pid
    return None


class Counting(unittest.TestCase):
    """The handshake's time is counted once: when the session is over, or by the sweep while it lives."""

    def session(self, sessions, cmd, *replies):
        session = sessions.admit(object(), Endpoint(ip_address("127.0.0.1"), 1))
        self.meter.begin(session)
        request = Request(cmd, Address(ip_address("127.0.0.1"), 1))
        went = [(0.02, Request, request.pack()), *((1.0 + n, Reply, Reply(rep)) for n, rep in enumerate(replies))]
        for after_s, kind, message in went:
            session.record.append((session.started + after_s, kind, message, kind is Request))
        session.cmd, session.rep = cmd.word, replies[-1].word if replies else ""
        return session

    def counted(self, name):
        return [self.board.sum(name, bucket) for bucket in BUCKETS]

    def test_once_whichever_is_first(self):
        for swept in (False, True):
            for cmd, replies, connects in ((Cmd.CONNECT, (Rep.SUCCEEDED,), 1), (Cmd.CONNECT, (Rep.TTL_EXPIRED,), 0),
                                           (Cmd.BIND, (Rep.SUCCEEDED, Rep.SUCCEEDED), 0)):
                with self.subTest(cmd, swept=swept, replies=replies):
                    self.board = Board(1)
                    self.meter, sessions = Meter(self.board, 0), Sessions()
                    session = self.session(sessions, cmd, *replies)
                    if swept:
                        self.meter.sweep(sessions)
                        self.assertEqual(sum(self.counted("handshake")), 1)
                    self.assertTrue(sessions.end(session))
                    self.meter.ended(session)
                    self.meter.sweep(sessions)
                    self.assertEqual(self.counted("handshake").index(1), bisect.bisect_left(BOUNDS_S, 0.02))
                    self.assertEqual((sum(self.counted("handshake")), sum(self.counted("connect"))), (1, connects))
                    self.assertAlmostEqual(self.board.sum("handshake", "sum"), 20000, delta=1)

    def test_not_before_the_reply(self):
        self.board = Board(1)
        self.meter, sessions = Meter(self.board, 0), Sessions()
        session = self.session(sessions, Cmd.CONNECT)
        session.rep = "SUCCEEDED"                           # it is about to be sent
        self.meter.sweep(sessions)
        self.assertEqual(sum(self.counted("handshake")), 0)


class Words(unittest.TestCase):
    def test_amounts(self):
        for size, text in ((0, "0 B"), (999, "999 B"), (999.6, "1.0 kB"), (1500, "1.5 kB"), (99960, "100 kB"),
                           (1e6, "1.0 MB"), (12.3e9, "12.3 GB"), (1e30, "1000000000000000 PB")):
            self.assertEqual(line.amount(size), text)

    def test_the_line(self):
        self.assertEqual(line.text((10.0, 0, 1000, 5, 2), (12.0, 3000, 1000, 9, 1)),
                         "1 session   2 conn/s   up 1.5 kB/s   down 0 B/s   total 9 conn, up 3.0 kB, down 1.0 kB")

    def test_the_line_loses_whole_parts_where_it_is_too_long(self):
        words = "1 session   up 1.5 kB/s, down 20 B/s"
        for room, left in ((99, words), (len(words), words), (len(words) - 1, words[:23]), (23, words[:23]),
                           (22, "1 session"), (9, "1 session"), (8, "")):
            with self.subTest(room=room):
                self.assertEqual(line.fitting(words, room), left)

    def test_the_log_erases_the_line_first(self):
        written = []

        def write(data):                                # takes six bytes at a time
            written.append(data[:6])
            return len(data[:6])

        both = log.after(b"\r!", write)
        self.assertEqual(both(b"abcdefgh"), 4)
        self.assertEqual(both(b"efgh"), 4)
        self.assertEqual(written, [b"\r!abcd", b"\r!efgh"])
        self.assertIs(log.after(b"", write), write)

    def test_history_when_the_clock_is_set(self):
        """The page asks for what came after its last sample, which is in the future when the clock was set back."""
        history = History(Board(1), lambda: 0)
        for times, since, found in (((1000, 1001, 1002), 0, [1000, 1001, 1002]), ((500,), 1002, [500]),
                                    ((501, 502), 500, [501, 502]), ((2000,), 502, [2000])):
            for when in times:
                with mock.patch("socks5.status.history.time", return_value=when):
                    history._add()
            self.assertEqual([one[0] for one in history.since(since)], found)


OFTEN = "from socks5.status import beside, line\nline.EVERY_S = beside.SWEEP_S = 0.1"


@unittest.skipUnless(hasattr(os, "openpty"), "this system has no terminals")
class Terminal(unittest.TestCase):
    def server_on(self, *args, path=SCRIPT, **env):
        """Start our server on a terminal: (wait for a pattern in its output, end it and give all output)."""
        ours, theirs = os.openpty()
        self.hang_up = contextlib.ExitStack()               # closed once, here or in the test
        self.hang_up.callback(os.close, ours)
        self.addCleanup(self.hang_up.close)
        environ = {name: value for name, value in os.environ.items() if name != "NO_COLOR"}
        process = subprocess.Popen([sys.executable, str(path), "-p", "0", *args], stdin=theirs, stdout=theirs,
                                   stderr=theirs, env={**environ, "TERM": "xterm", **env})
        os.close(theirs)
        self.process = process
        self.addCleanup(process.wait)
        self.addCleanup(process.kill)
        seen = bytearray()

        def wait_for(pattern):
            deadline = time.monotonic() + PATIENCE_S
            while not re.search(pattern, seen):
                self.assertLess(time.monotonic(), deadline, bytes(seen))
                try:
                    seen.extend(os.read(ours, 4096))
                except OSError:                                 # the other end is closed
                    self.assertRegex(bytes(seen), pattern)
            return re.search(pattern, seen)

        def end():
            process.terminate()
            with contextlib.suppress(OSError):
                while True:
                    data = os.read(ours, 4096)
                    if not data:
                        break
                    seen.extend(data)
            self.assertEqual(process.wait(PATIENCE_S), 0)
            return bytes(seen)
        return wait_for, end

    def test_the_line_renews_itself_and_is_gone_at_the_end(self):
        for count in ONE_AND_TWO:
            with self.subTest(workers=count), target() as echo, script(OFTEN) as path:
                wait_for, end = self.server_on("-w", count, path=path)
                port = int(wait_for(rb"listening on 127.0.0.1:(\d+)\r\n").group(1))
                wait_for(rb"try it: curl --socks5-hostname 127.0.0.1:%d " % port)
                wait_for(rb"\r\x1b\[K0 sessions   0 conn/s ")
                with connect_through(port, *echo) as tunnel:
                    tunnel.sendall(b"x" * 1000)
                    wait_for(rb"\r\x1b\[K1 session .*total 1 conn, up 1.0 kB")
                wait_for(rb"\r\x1b\[K\d\d:\d\d:\d\d 127\.0\.0\.1 -> 127\.0\.0\.1:%d ok 2\.0 kB \d+\.\d s[^\r]*\r\n"
                         % echo[1])
                wait_for(rb"\r\x1b\[K0 sessions .*total 1 conn")
                self.assertRegex(end(), rb"\r\x1b\[K(?:\r\x1b\[K[^\r]*\r\n)*$")

    def test_ctrl_c_says_for_what_it_waits(self):
        with target() as echo:
            wait_for, end = self.server_on("--drain-timeout", "600")
            port = int(wait_for(rb"listening on 127.0.0.1:(\d+)\r\n").group(1))
            with connect_through(port, *echo):
                self.process.send_signal(signal.SIGINT)
                wait_for(rb"\d INFO stopping: up to 600 s for 1 session to end; a second Ctrl-C ")
                end()

    def test_it_ends_with_its_terminal(self):
        for count in ONE_AND_TWO:
            with self.subTest(workers=count):
                wait_for, _end = self.server_on("-w", count)
                wait_for(rb"try it: ")
                self.process.send_signal(signal.SIGHUP)             # the terminal is there
                wait_for(rb"INFO reloaded users=0 ")
                self.hang_up.close()
                self.process.send_signal(signal.SIGHUP)
                self.assertEqual(self.process.wait(PATIENCE_S), 0)

    def test_where_it_is_not(self):
        with script("from socks5.status import line\nline.EVERY_S = 0") as path:   # drawn in each turn of the main loop
            for args, env, shown in (([], {}, True), (["-q"], {}, False), (["-v"], {}, False),
                                     ([], {"NO_COLOR": "1"}, False), ([], {"TERM": "dumb"}, False)):
                with self.subTest(args=args, env=env):
                    wait_for, end = self.server_on("-w", "1", *args, path=path, **env)
                    wait_for(rb"listening on")
                    self.assertEqual(b"\x1b" in end(), shown)
        with spawned() as server:
            server.end()
            self.assertEqual([text for text in server.lines + server.log if "try it" in text or "\x1b" in text], [])
