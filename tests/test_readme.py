"""README.rst: it renders, its examples are true, and what it shows of the log is what the log has.

Other parts are tested where they belong: options in test_cli, traces in test_trace, units in test_systemd, fail2ban in
test_users, `pip install` in test_end_to_end.
"""
import contextlib
import io
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import textwrap
import threading
import unittest
from pathlib import Path

from socks5 import cli
from socks5.access.rules import Rules
from socks5.config import Config
from socks5.server.session import LIVE, Session
from socks5.values import upstream
from tests.__main__ import WITHOUT
from tests.support import (
    PATIENCE_S, ROOT, Case, connect_through, echoes, need, readme_block, readme_blocks, run_python, running, script,
    spawned, target, udp_socket)

README = ROOT / "README.rst"
MOST_LINES = 500                                    # of text and tables, without code and traces
PYTHON = os.environ.get("SOCKS5_VENV_PYTHON") or sys.executable


class Page(unittest.TestCase):
    def test_it_renders_without_a_warning(self):
        found = subprocess.run([PYTHON, "-c", "import docutils"], stderr=subprocess.DEVNULL)
        need(self, found.returncode == 0, "docutils (pip install docutils, for SOCKS5_VENV_PYTHON)")
        done = subprocess.run([PYTHON, "-m", "docutils", "--strict", "--report=info", "--syntax-highlight=none",
                               str(README)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=PATIENCE_S)
        self.assertEqual((done.returncode, done.stderr.decode()), (0, ""))
        html = done.stdout.decode("utf-8")
        for slip, name in ((r"<td>\s*<ul", "a bullet in a cell"), (r'href="file:', "a link to file:line")):
            with self.subTest(name):
                self.assertNotRegex(html, slip)
        self.assertRegex(html, r'(?i)id="(?:table-of-)?contents"')

    def test_it_is_short(self):
        lines = [line for line in README.read_text(encoding="utf-8").splitlines()
                 if line.strip() and not line.startswith("    ")]
        self.assertLessEqual(len(lines), MOST_LINES)
        self.assertLess(200, len(lines), "this counts nothing")

    def test_every_section_in_the_order_of_a_newcomer(self):
        text = README.read_text(encoding="utf-8")
        sections = re.findall(r"(?m)^(\S.*)\n=+$", text)[1:]
        first = ["Start", "Words", "Point your programs at it", "Let others in", "Install on a server", "Security"]
        self.assertEqual(sections[:len(first)], first)


class Examples(unittest.TestCase):
    def test_python_that_says_it_runs_in_the_tests(self):
        blocks = [block for block in readme_blocks("python") if "# runs in the tests" in block]
        self.assertTrue(blocks)
        for number, block in enumerate(blocks):
            with self.subTest(number):
                self.assertEqual(run_python("-c", block)[::2], (0, ""))

    def test_rules(self):
        blocks = [block for block in readme_blocks("") if re.search(r"(?m)^(?:allow|deny) \w", block)]
        self.assertGreaterEqual(len(blocks), 2)
        for number, block in enumerate(blocks):
            with self.subTest(number), tempfile.TemporaryDirectory() as folder:
                path = Path(folder, "rules")
                path.write_text(block)
                rules = Rules(Config(rules=str(path), upstream=(upstream("office=socks5://192.0.2.1:1080"),)))
                self.assertEqual(len(rules), sum(line[:1] in "ad" for line in block.splitlines()))

    def test_ini(self):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "ini")
            path.write_text(readme_block("ini", "max-per-client"))
            self.assertEqual(cli.read_file(str(path)), {"listen": ("0.0.0.0",), "port": 1080, "max_per_client": 200,
                                                        "users": "/etc/socks5/users"})

    def test_ftp(self):
        def serve(control):
            """So much of an FTP server as LIST in active mode takes."""
            with control.makefile("rwb", 0) as lines:
                lines.write(b"220 ready\r\n")
                for line in lines:
                    word, _, rest = line.decode().strip().partition(" ")
                    lines.write({"USER": b"331 password\r\n", "PASS": b"230 welcome\r\n", "PORT": b"200 noted\r\n",
                                 "LIST": b"150 coming\r\n"}[word])
                    if word == "PORT":
                        parts = rest.split(",")
                        where = ".".join(parts[:4]), int(parts[4]) * 256 + int(parts[5])
                    elif word == "LIST":
                        with socket.create_connection(where, PATIENCE_S) as data:
                            data.sendall(b"a file\r\n")

        with running() as proxy, target(serve) as server:
            said = self.run_block("import ftplib", proxy, '("192.0.2.21", 21)', server)
        self.assertRegex(said, r"\A\('127\.0\.0\.1', \d+\) a file\n")

    def test_dns(self):
        with running() as proxy, udp_socket() as server:
            def answer():
                question, client = server.recvfrom(512)
                if question[12:] == b"\3www\7example\0\0\1\0\1":        # behind the header: an A record of this name
                    server.sendto(question + bytes([203, 0, 113, 9]), client)

            thread = threading.Thread(target=answer)
            thread.start()
            said = self.run_block("import associate", proxy, '("192.0.2.53", 53)', server.getsockname())
            thread.join()
            self.assertEqual(said, "%r 203.0.113.9\n" % (server.getsockname(),))

    def run_block(self, word, proxy, destination, real):
        """Run the Python block with this word, with real addresses: what it prints."""
        block = readme_block("python", word)
        for shown, used in (('("127.0.0.1", 1080)', proxy.server_address[:2]), (destination, real)):
            self.assertEqual(block.count(shown), 1)
            block = block.replace(shown, repr(used))
        with contextlib.redirect_stdout(io.StringIO()) as said:
            exec(block, {"__name__": "readme"})
        return said.getvalue()


class Log(unittest.TestCase):
    def shown(self, word):
        return next(line for block in readme_blocks("") for line in block.splitlines() if " INFO %s " % word in
                    " " + line)

    def test_the_line_of_a_session(self):
        keys = re.findall(r"(\w+)=", self.shown("session"))
        self.assertEqual(keys, list(Session(None, "", None).facts()))
        said = json.loads(readme_block("json", '"session"'))
        self.assertEqual(list(said), ["time", "level", "event", *keys])

    def test_it_is_what_the_log_has(self):
        shape = re.sub(r"\d+", r"\\d+", re.escape(self.shown("session")))
        shape = re.sub("ended=remote", r"ended=\\w+", shape)
        with spawned() as server, target() as echo:
            with connect_through(server.port, "localhost", echo[1]) as tunnel:
                self.assertTrue(echoes(tunnel))
                tunnel.shutdown(socket.SHUT_WR)
                self.assertEqual(tunnel.recv(1), b"")
            line = server.wait_line(r".* INFO session .*").group()
        self.assertRegex(line, "^%s$" % shape)

    def test_the_line_of_a_live_session(self):
        self.assertEqual(re.findall(r"(\w+)=", self.shown("live")), re.findall(r"(\w+)=%", LIVE))


class Promises(Case):
    def test_it_serves_without_what_other_systems_lack(self):
        for feature, loss in WITHOUT.items():
            text = "import contextlib\nwith contextlib.suppress(AttributeError):\n" + textwrap.indent(loss, "    ")
            with self.subTest(feature), script(text) as path, spawned("-w", "2", script=path) as server, \
                    target() as echo:
                self.check_serves(server.port, echo)
                self.assertEqual(server.end(), 0)
