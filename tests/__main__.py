"""Run the test files in several processes at once; say at the end what was skipped, why, and how long it took.

    python3 -m tests [-p PATTERN] [--without FEATURE] [options of unittest, such as -v, -f and -k]

`python3 -m unittest discover` runs the same tests one after the other. Here, a test also fails if it leaves a thread or
a descriptor behind, or forgets to close a file or a socket. --without FEATURE, repeatable, takes away what other
systems lack, in the tests and in every Python that they start.
"""
import argparse
import logging
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
import unittest
import warnings
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

AT_ONCE = 4 * (os.cpu_count() or 1)     # tests wait more than they compute
LEAVING_S = 30                          # for threads that end by themselves, but later
# They begin first, in this order, which is measured; the others by size.
LONGEST = ("test_rates.py", "test_programs.py", "test_supervisor.py", "test_status.py", "test_loop.py",
           "test_systemd.py", "test_fuzz.py", "test_cli.py", "test_bench.py", "test_bind.py",
           "test_end_to_end.py", "test_clients.py", "test_status_page.py", "test_gssapi.py",
           "test_server.py", "test_udp.py", "test_connect.py", "test_log.py", "test_users.py",
           "test_limited.py", "test_throttle.py", "test_trace.py", "test_handler.py")
FOLDER = Path(__file__).resolve().parent
# A feature, and how a Python loses it as it starts.
WITHOUT = {
    "epoll": "import select; del select.epoll",
    "poll": "import select; del select.epoll, select.poll",
    "splice": "import os; vars(os).pop('splice', None)",
    "eventfd": "import os; vars(os).pop('eventfd', None)",
    "fork": "import os; del os.fork",
    "affinity": "import os; del os.sched_getaffinity, os.sched_setaffinity",
    "acceptors": "import socket; del socket.TCP_DEFER_ACCEPT",
    "reuseport": "import socket; del socket.SO_REUSEPORT",
    "ipv6": """
import errno, os, socket
class Socket(socket.socket):
    def __init__(self, family=-1, type=-1, proto=-1, fileno=None):
        if family == socket.AF_INET6 and fileno is None:
            raise OSError(errno.EAFNOSUPPORT, os.strerror(errno.EAFNOSUPPORT))
        super().__init__(family, type, proto, fileno)
socket.has_ipv6, socket.socket = False, Socket
""",
}


# ---- one file, in a process of its own ---------------------------------------------------------------------------

class Result(unittest.TextTestResult):
    """A test that leaves something behind has failed. Where a class has a server for all of its tests, its own
    setUpClass(), only what was forgotten is looked at."""

    def startTest(self, test):
        self.before = set(threading.enumerate()), open_descriptors()
        self.forgotten = []
        warnings.showwarning = self.warned
        super().startTest(test)

    def stopTest(self, test):
        if not hasattr(test, "setUpClass") or test.setUpClass.__func__ is unittest.TestCase.setUpClass.__func__:
            deadline = time.monotonic() + LEAVING_S
            while self.left() and time.monotonic() < deadline:
                time.sleep(0.01)
            self.forgotten += self.left()
        if self.forgotten:
            try:
                raise AssertionError("left behind: " + ", ".join(self.forgotten))
            except AssertionError:
                self.addFailure(test, sys.exc_info())
        super().stopTest(test)

    def addSkip(self, test, reason):
        super().addSkip(test, reason)
        self.stream.writeln("skipped %s: %s" % (test.id(), reason))

    def left(self):
        threads, descriptors = self.before
        return [str(thread) for thread in set(threading.enumerate()) - threads] + [
            "descriptor %s, %s" % found for found in open_descriptors() - descriptors]

    def warned(self, message, category, *_args):
        if category is ResourceWarning:
            self.forgotten.append(str(message))


def open_descriptors():
    """{(number, what it is)}; nothing where there is no /proc."""
    found = set()
    for number in os.listdir("/proc/self/fd") if os.path.isdir("/proc/self/fd") else ():
        try:
            found.add((number, os.readlink("/proc/self/fd/" + number)))
        except OSError:                 # the one by which the folder was read
            pass
    return found


def run_one(name, options):
    logging.getLogger("socks5").addHandler(logging.NullHandler())       # or warnings of the server go to stderr
    unittest.main(module=None, argv=["tests", "tests." + name, *options],
                  testRunner=unittest.TextTestRunner(resultclass=Result, verbosity=2, warnings="always"))


# ---- all files ---------------------------------------------------------------------------------------------------

def environment(folder, place):
    """Where Python is told to write no bytecode, each server that a test starts would compile all modules: it is kept
    in `folder` instead. No two files of one run have the same `place` for the ports of support.free_ports()."""
    environ = dict(os.environ, SOCKS5_TEST_PLACE=str(os.getpid() + place))
    if environ.pop("PYTHONDONTWRITEBYTECODE", ""):
        environ["PYTHONPYCACHEPREFIX"] = folder
    return environ


def run_file(path, options, environ):
    """(file, whether all is well, what it printed)"""
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as output:
        status = subprocess.call([sys.executable, "-m", "tests", "--only", path.stem, *options],
                                 stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, cwd=FOLDER.parent,
                                 env=environ)
        output.seek(0)
        return path, status in (0, 5), output.read()        # 5: no test has the name that -k asks for


def run_all(pattern, verbose, options):
    began = time.monotonic()
    paths = sorted(FOLDER.glob(pattern), key=lambda path: (
        LONGEST.index(path.name) if path.name in LONGEST else len(LONGEST), -path.stat().st_size))
    failed, skipped, tests = [], [], 0
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(AT_ONCE) as pool:
        for done in as_completed([pool.submit(run_file, path, options, environment(folder, place))
                                  for place, path in enumerate(paths)]):
            path, well, output = done.result()
            ran, seconds = re.findall(r"^Ran (\d+) tests? in (.*)s$", "Ran 0 tests in 0s\n" + output, re.MULTILINE)[-1]
            print("%-24s %4s tests in %7s s  %s" % (path.name, ran, seconds, "ok" if well else "FAILED"), flush=True)
            if verbose or not well:
                print(output, flush=True)
            tests += int(ran)
            failed += [] if well else [path.name]
            skipped += re.findall(r"^skipped .*: .*$", output, re.MULTILINE)
    print("\n".join(skipped))
    print("%d tests, %d skipped, in %.0f s, %d files at once: %s" % (
        tests, len(skipped), time.monotonic() - began, AT_ONCE, "FAILED in " + ", ".join(failed) if failed else "OK"))
    return bool(failed or not tests)


def run_without(features, *what):
    """run_all() where every Python that starts imports a `sitecustomize` first, which takes the features away."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "sitecustomize.py").write_text("\n".join(WITHOUT[feature] for feature in features))
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (folder, os.environ.get("PYTHONPATH"))))
        return run_all(*what)


if __name__ == "__main__":
    parser = argparse.ArgumentParser("python3 -m tests", usage=__doc__, allow_abbrev=False)
    parser.add_argument("-p", "--pattern", default="test_*.py")
    parser.add_argument("-v", "--verbose", action="store_true")
    parser.add_argument("--without", action="append", default=[], choices=sorted(WITHOUT))
    parser.add_argument("--only")
    known, rest = parser.parse_known_args()
    sys.exit(run_one(known.only, rest) if known.only else
             run_without(known.without, known.pattern, known.verbose, rest))
