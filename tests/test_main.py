"""__init__.py, __main__.py and socks5_server.py: the ways in."""
import os
import tempfile
import unittest

import socks5
from socks5 import config
from tests import support
from tests.support import run_python

VERSION = "socks5-server %s\n" % socks5.__version__


class WaysIn(support.Case):
    def test_all_are_the_same_command(self):
        with tempfile.TemporaryDirectory() as elsewhere:
            for name, argv, cwd in (("python -m socks5", ["-m", "socks5"], support.ROOT),
                                    ("python socks5_server.py", ["socks5_server.py"], support.ROOT),
                                    ("from elsewhere", [support.SCRIPT], elsewhere),
                                    ("with nothing installed", ["-S", "-E", "-s", support.SCRIPT], elsewhere)):
                with self.subTest(name):
                    self.assertEqual(run_python(*argv, "--version", cwd=cwd), (0, VERSION, ""))
                    self.check_refused(run_python(*argv, "-p", "x", cwd=cwd))

    def test_the_entry_point_of_the_package(self):
        setup = (support.ROOT / "setup.cfg").read_text(encoding="utf-8")
        self.assertIn("socks5-server = socks5.__main__:main", setup)
        self.assertIn("version = attr: socks5.__version__", setup)
        self.assertIn("include = socks5, socks5.*", setup, "tests/ is a package, too, and not to be installed")

    def test_help_fits_a_terminal(self):
        status, out, err = run_python("socks5_server.py", "--help", env=dict(os.environ, COLUMNS="80"))
        self.assertEqual((status, err), (0, ""))
        self.assertLess(max(map(len, out.splitlines())), 80)
        self.assertEqual([line[:-1] for line in out.splitlines() if line[:1].isalpha() and line.endswith(":")][1:],
                         list(config.GROUPS))


class Starting(unittest.TestCase):
    def test_no_thread_for_the_server(self):
        script = """
import sys, threading
def start(thread): raise RuntimeError("can't start new thread")
threading.Thread.start = start
from socks5.cli import main
sys.exit(main(["-p", "0", "-w", "1"]))"""
        self.assertEqual(run_python("-c", script),
                         (2, "", "socks5-server: cannot start: can't start new thread\n"))


class Package(unittest.TestCase):
    def test_names(self):
        self.assertEqual(sorted(set(socks5.__all__)), sorted(socks5.__all__), "a name twice")
        for name in socks5.__all__:
            with self.subTest(name):
                self.assertTrue(hasattr(socks5, name))
        self.assertLessEqual({"Config", "ConfigError", "Handler", "ProtocolError", "RequestRefused", "Server",
                              "SocksError", "__version__"}, set(socks5.__all__))
        self.assertRegex(socks5.__version__, r"\A\d+\.\d+\.\d+\Z")

    def test_import_does_nothing_but_define(self):
        code = ("import sys, logging, threading, signal; before = signal.getsignal(signal.SIGTERM); import socks5; "
                "assert not logging.getLogger().handlers, 'root logger'; "
                "assert not logging.getLogger('socks5').handlers, 'our logger'; "
                "assert threading.active_count() == 1, 'a thread'; "
                "assert signal.getsignal(signal.SIGTERM) is before, 'a signal'; "
                "assert 'socks5.cli' not in sys.modules and 'argparse' not in sys.modules, 'the command line'")
        self.assertEqual(run_python("-E", "-S", "-c", code), (0, "", ""))

    def test_import_warns_of_nothing(self):
        code = "import socks5.cli, socks5.__main__"
        self.assertEqual(run_python("-W", "error", "-c", code), (0, "", ""))
