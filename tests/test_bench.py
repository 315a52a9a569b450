"""bench.py runs, says what it measured and leaves nothing behind; how fast anything is, no test may ask."""
import os
import re
import signal
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path

from tests.support import PATIENCE_S, ROOT, children, need, wait_until

BENCH = [sys.executable, str(ROOT / "tests" / "bench.py"), "--quick"]


VALGRIND = """#!/bin/sh
echo run >>"%s/runs"
echo "summary: $((12000 * $(grep -c run "%s/runs")))" >"${2#--callgrind-out-file=}"
shift 2
exec "$@"
"""


def bench(*args, path=os.environ.get("PATH", os.defpath)):
    return subprocess.run([*BENCH, *args], stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=60, text=True,
                          encoding="utf-8", env=dict(os.environ, PYTHONIOENCODING="utf-8", COLUMNS="70", PATH=path))


class Bench(unittest.TestCase):
    @unittest.skipUnless(hasattr(os, "fork"), "no fork here")
    def test_rates(self):
        done = bench("--rates")
        self.assertIn(done.returncode, (0, 1), done.stderr)
        self.assertRegex(done.stdout, r"\n16K +1 +[0-9]+ +[0-9.]+ +1\.00\n$")

    @unittest.skipUnless(hasattr(os, "fork"), "no fork here")
    def test_prints_table_chart_and_rst(self):
        done = bench("--only", "conn,bulk-down", "--servers", "direct,ours=-w 1", "--rst")
        self.assertEqual(done.returncode, 0, done.stderr)
        for what, pattern in (
                ("conn", r"\nconn: more is better, x is the ratio to direct\n.*conn/s.*\n  direct +[0-9.]+ +1\.00 +-"),
                ("ours", r"\n  ours=-w 1 +[0-9.]+ +[0-9.]+ +[0-9.-]+ +-\n"),
                ("chart", r"\nconn, conn/s: longer is better\n(direct|ours=-w 1) +[0-9.]+ [█▏▎▍▌▋▊▉]+\n"),
                ("command", r"``python3 tests/bench.py --quick --only conn,bulk-down .*'direct,ours=-w 1' --rst``"),
                ("head", r"\n=+  =[= ]+\nworkload +unit +reference +direct +ours=-w 1\n="),
                ("row", r"\nbulk-down +GiB/s +direct +[0-9.]+ \(1\.00\) +[0-9.]+ \([0-9.]+\)\n")):
            with self.subTest(what):
                self.assertRegex(done.stdout, pattern)
        self.assertLessEqual(max(len(line) for line in re.findall(".*█.*", done.stdout)), 70)

    @unittest.skipUnless(hasattr(os, "fork"), "no fork here")
    def test_round_trips_beside_downloads(self):
        done = bench("--only", "beside", "--servers", "direct,ours=-w 1")
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertRegex(done.stdout, r"\n  ours=-w 1 +[0-9.]+ +[0-9.]+ +- +-\n")

    @unittest.skipUnless(hasattr(os, "fork"), "no fork here")
    def test_counts_instructions(self):
        """By a valgrind of our own, for which every run takes 12,000 more than the one before: a twentieth of the units
        of each load is 12 or 100."""
        need(self, os.name == "posix", "sh")
        with tempfile.TemporaryDirectory() as folder:
            valgrind = Path(folder) / "valgrind"
            valgrind.write_text(VALGRIND.replace("%s", folder))
            valgrind.chmod(0o755)
            done = bench("--instructions", path=folder + os.pathsep + os.environ.get("PATH", os.defpath))
        self.assertEqual(done.returncode, 0, done.stderr)
        for what, figure in (("connection, as one before", 1000), ("connection, to a new name", 1000),
                             ("round trip", 120), ("datagram and its answer", 120)):
            with self.subTest(what):
                self.assertRegex(done.stdout, r"%s +%d\n" % (what, figure))

    def test_says_in_a_line_that_valgrind_is_missing(self):
        done = bench("--instructions", path="/nowhere")
        self.assertEqual((done.returncode, done.stdout, done.stderr.count("\n")), (2, "", 1))
        self.assertIn("valgrind", done.stderr)

    @unittest.skipUnless(hasattr(os, "fork"), "no fork here")
    def test_a_server_that_does_not_start_is_told_and_the_others_go_on(self):
        done = bench("--only", "rr", "--servers", "ours=--no-such-option,direct")
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertRegex(done.stdout, r"\n  ours=--no-such-optio +- +- +- +-  did not start\n  direct +[0-9.]+ ")

    def test_mistakes_on_the_command_line(self):
        for args in (["--servers", "theirs"], ["--only", "fast"], ["--servers", "direct", "--ref", "ours"]):
            with self.subTest(" ".join(args)):
                done = bench(*args)
                self.assertEqual((done.returncode, done.stdout), (2, ""))
                self.assertIn(args[-1], done.stderr)

    @unittest.skipUnless(hasattr(os, "fork"), "no fork here")
    def test_ended_in_the_middle_it_ends_what_it_started(self):
        need(self, os.path.exists("/proc/self/task"), "/proc")
        with subprocess.Popen([*BENCH, "--rounds", "1000", "--only", "rr-64", "--servers", "ours"],
                              stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
            try:
                wait_until(lambda: len(children(process.pid)) > 10, "the load")
                pids = children(process.pid)
                process.send_signal(signal.SIGTERM)
                self.assertEqual(process.wait(PATIENCE_S), 143)
            finally:
                process.kill()
        for pid in pids:
            self.assertRaises(ProcessLookupError, os.kill, pid, 0)
