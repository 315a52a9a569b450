"""Real clients through the server: curl and git. Each is looked for, and its test skipped where it is missing."""
import contextlib
import os
import re
import socket
import ssl
import subprocess
from functools import partial
from http.server import BaseHTTPRequestHandler, HTTPServer, SimpleHTTPRequestHandler
from socketserver import ThreadingMixIn

from tests import support
from tests.support import HAS_IPV6, PATIENCE_S, closed_port, need, need_program, served, spawned

BIG_BYTES = 200 << 20
BLOCK = os.urandom(1 << 20)


class Pages(BaseHTTPRequestHandler):
    """/ says hello; /big is as large as it says, without a file on the disk."""

    def do_GET(self):
        pieces = [b"hello from the other side\n"] if self.path == "/" else [BLOCK] * (BIG_BYTES >> 20)
        self.send_response(200)
        self.send_header("Content-Length", str(sum(map(len, pieces))))
        self.end_headers()
        for piece in pieces:
            self.wfile.write(piece)

    def log_message(self, *args):
        pass


class QuietFiles(SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


class Threading(ThreadingMixIn, HTTPServer):
    daemon_threads = True
    block_on_close = False


class ThreadingV6(Threading):
    address_family = socket.AF_INET6


@contextlib.contextmanager
def web(handler=Pages, host="127.0.0.1", tls=None):
    """A web server; its port."""
    server = (ThreadingV6 if ":" in host else Threading)((host, 0), handler)
    if tls:
        server.socket = tls.wrap_socket(server.socket, server_side=True)
    with served(server, 0.01):
        yield server.server_address[1]


def environment(**more):
    """Ours, without what leads a client around the proxy, and without the settings of the user who runs the tests."""
    env = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    return dict(env, HOME=os.devnull, GIT_CONFIG_NOSYSTEM="1", GIT_TERMINAL_PROMPT="0", **more)


class Case(support.Case):
    def run_client(self, *args, status=0, **kwargs):
        """What the client prints; it must end with `status`."""
        kwargs = {"env": environment(), "timeout": PATIENCE_S, **kwargs}
        done = subprocess.run(list(map(str, args)), stdin=subprocess.DEVNULL, capture_output=True, text=True, **kwargs)
        self.assertEqual(done.returncode, status, done.stderr)
        return done.stdout

    def refused(self, *args):
        """What the client says on stderr when the proxy lets it down."""
        done = subprocess.run(list(map(str, args)), stdin=subprocess.DEVNULL, capture_output=True, text=True,
                              timeout=PATIENCE_S, env=environment())
        self.assertIn(done.returncode, (7, 97), done.stderr)    # curl: 97 from 7.73 on
        self.assertEqual(done.stdout, "")
        return done.stderr


class Curl(Case):
    def setUp(self):
        self.command = [need_program(self, "curl"), "-q", "-sS", "--noproxy", "", "--max-time", str(PATIENCE_S)]

    def curl(self, *args):
        return self.run_client(*self.command, *args)

    def test_by_address_and_by_name(self):
        """(how the proxy is named, with which option, what is asked for, what the server must have seen)"""
        server, port = self.enter(spawned()), self.enter(web())
        cases = [("127.0.0.1", "--socks5", "127.0.0.1", "127.0.0.1"),
                 ("127.0.0.1", "--socks5", "localhost", "127.0.0.1"),
                 ("127.0.0.1", "--socks5-hostname", "localhost", "'localhost'"),
                 ("localhost", "--socks5-hostname", "localhost", "'localhost'")]
        for proxy, option, host, seen in cases:
            with self.subTest("%s %s %s" % (option, proxy, host)):
                page = self.curl("-4", option, "%s:%d" % (proxy, server.port), "http://%s:%d/" % (host, port))
                self.assertEqual(page, "hello from the other side\n")
                server.wait_line(r"cmd=CONNECT dst=%s:%d reached=127\.0\.0\.1:%d rep=SUCCEEDED"
                                 % (re.escape(seen), port, port))
                server.log.clear()

    def test_ipv6(self):
        need(self, HAS_IPV6, "IPv6")
        server, port = self.enter(spawned("-l", "::1")), self.enter(web(host="::1"))
        for option in ("--socks5", "--socks5-hostname"):
            with self.subTest(option):
                page = self.curl("-g", option, "[::1]:%d" % server.port, "http://[::1]:%d/" % port)
                self.assertEqual(page, "hello from the other side\n")
        server.wait_line(r"client=\[::1\]:\d+ .*dst=\[::1\]:%d reached=\[::1\]:%d rep=SUCCEEDED" % (port, port))

    def test_user_and_password(self):
        server, port = self.enter(spawned("-u", "alice:s3cret", "-u", "bob:with:colon")), self.enter(web())
        for user in ("alice:s3cret", "bob:with:colon"):
            with self.subTest(user):
                page = self.curl("--socks5", "127.0.0.1:%d" % server.port, "--proxy-user", user,
                                 "http://127.0.0.1:%d/" % port)
                self.assertEqual(page, "hello from the other side\n")
        page = self.curl("--proxy", "socks5h://alice:s3cret@127.0.0.1:%d" % server.port,
                         "http://localhost:%d/" % port)
        self.assertEqual(page, "hello from the other side\n")
        for args in (["--proxy-user", "alice:wrong"], []):
            with self.subTest("refused %s" % args):
                self.refused(*self.command, "--socks5", "127.0.0.1:%d" % server.port, *args,
                             "http://127.0.0.1:%d/" % port)

    def test_what_curl_says_of_a_refusal(self):
        """The REP is in its message: 5 for a port that is closed, 4 for a name that does not exist."""
        server = self.enter(spawned())
        for host, word in [("127.0.0.1", r"\(5\)|refused"), ("no.such.name.invalid", r"\(4\)|unreachable")]:
            with self.subTest(host):
                said = self.refused(*self.command, "--socks5-hostname", "127.0.0.1:%d" % server.port,
                                    "http://%s:%d/" % (host, closed_port()))
                self.assertRegex(said, word)

    def test_used_as_an_http_proxy_it_explains_itself(self):
        server = self.enter(spawned())
        page = self.curl("--proxy", "http://127.0.0.1:%d" % server.port, "http://example.invalid/")
        self.assertIn("SOCKS5 proxy", page)

    def test_socks4_is_refused(self):
        server = self.enter(spawned())
        said = self.refused(*self.command, "--socks4", "127.0.0.1:%d" % server.port, "http://127.0.0.1:1/")
        self.assertRegex(said, r"\(91\)|rejected")
        server.wait_line("why='a SOCKS4 client'")

    def test_https_with_a_certificate_of_our_own(self):
        openssl = need_program(self, "openssl")
        folder = self.new_folder()
        (folder / "cnf").write_text(
            "[req]\ndistinguished_name=dn\nx509_extensions=ext\nprompt=no\n[dn]\nCN=localhost\n"
            "[ext]\nsubjectAltName=DNS:localhost,IP:127.0.0.1\nbasicConstraints=critical,CA:true\n")
        self.run_client(openssl, "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2",
                        "-config", folder / "cnf", "-keyout", folder / "key", "-out", folder / "cert")
        tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        tls.load_cert_chain(str(folder / "cert"), str(folder / "key"))
        server, port = self.enter(spawned()), self.enter(web(tls=tls))
        for option, host in [("--socks5", "127.0.0.1"), ("--socks5-hostname", "localhost")]:
            with self.subTest(option):
                big = self.curl(option, "127.0.0.1:%d" % server.port, "--cacert", folder / "cert",
                                "--output", folder / "big", "--write-out", "%{http_code} %{ssl_verify_result}",
                                "https://%s:%d/big" % (host, port))
                self.assertEqual(big, "200 0")
                self.assertEqual((folder / "big").stat().st_size, BIG_BYTES)


class Git(Case):
    def test_clone(self):
        git = need_program(self, "git")
        folder = self.new_folder()
        env = environment(GIT_CONFIG_GLOBAL=os.devnull, GIT_AUTHOR_NAME="a", GIT_AUTHOR_EMAIL="a@example.org",
                          GIT_COMMITTER_NAME="a", GIT_COMMITTER_EMAIL="a@example.org")
        run = partial(self.run_client, git, env=env)
        run("init", "-q", folder / "work")
        for number in range(20):
            (folder / "work" / ("file%d" % number)).write_bytes(os.urandom(20000))
        run("-C", folder / "work", "add", ".")
        run("-C", folder / "work", "commit", "-q", "-m", "twenty files")
        run("clone", "-q", "--bare", folder / "work", folder / "served" / "project.git")
        run("-C", folder / "served" / "project.git", "update-server-info")
        port = self.enter(web(partial(QuietFiles, directory=str(folder / "served"))))
        for name, options, login, seen in (("cloned", [], "", "-"),
                                           ("cloned-by-password", ["-u", "alice:s3cret"], "alice:s3cret@", "'alice'")):
            with self.subTest(name):
                server = self.enter(spawned(*options))
                run("-c", "http.proxy=socks5h://%s127.0.0.1:%d" % (login, server.port), "clone", "-q",
                    "http://localhost:%d/project.git" % port, folder / name)
                heads = {run("-C", folder / copy, "rev-parse", "HEAD") for copy in ("work", name)}
                self.assertEqual(len(heads), 1)
                self.assertEqual(run("-C", folder / name, "fsck", "--strict"), "")
                server.wait_line("user=%s cmd=CONNECT dst='localhost':%d .*rep=SUCCEEDED" % (seen, port))
        run("-c", "http.proxy=socks5h://alice:wrong@127.0.0.1:%d" % server.port, "clone", "-q",
            "http://localhost:%d/project.git" % port, folder / "refused", status=128)
