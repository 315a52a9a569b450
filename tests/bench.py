#!/usr/bin/env python3
"""Measure our server beside other SOCKS5 servers, in one run, on loopback: `make bench ARGS="--rounds 5 --rst"`.

Every round runs every server in turn on every workload, so that a slow spell of the machine falls on all of them: trust
the ratios of one run, never one figure alone. Server CPU is user and system time of all the server's processes, which
noise disturbs least. The load (bench_load.py) is Python as well, so
with small work (conn, rr, udp) it takes its share of the CPUs: "direct", which is the load without any proxy, is the
ceiling, and the nearer to it, the more alike all servers look.

--instructions counts in place of timing: what ours takes in user space for one unit of work, by valgrind. On a quiet
machine the count of a connection is the same to half a percent, so that it shows what a change in the code is worth:
the hashes of strings are the same each time (PYTHONHASHSEED), which otherwise move it by 2 %. A round trip or a
datagram takes fewer, the more of them come at a time. Builds of Python differ.

--rates measures how exact a rate limit is: bytes a second over ten seconds, from 16 KiB to 1 GiB, of one tunnel and of
200; the exit status is 1 where it is off by more than 5 %.

A server is direct, ours, microsocks, dante, hev or 3proxy; "ours=-w 1" is ours with options. Those that are on PATH or
in --peers DIR are measured unless --servers tells which.
"""
import argparse
import collections
import contextlib
import datetime
import os
import platform
import shlex
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import bench_rates
from bench_load import ENDING, GIB, HOST, Trouble, dial, measure

SCRIPT = Path(__file__).resolve().parent.parent / "socks5_server.py"

# kind: KIND_client and KIND_target of bench_load.py; count: for each client; per: from seconds to the unit of `cpu`
Load = collections.namedtuple("Load", "kind clients count unit higher_is_better cpu per")
LOADS = {
    "idle": Load("idle", 8, 625, "KiB/tunnel", False, "us/tunnel", 1e6),
    "bulk-down": Load("down", 1, 3 * GIB, "GiB/s", True, "ms/GiB", 1e3 * GIB),
    "bulk-both": Load("both", 1, GIB, "GiB/s", True, "ms/GiB", 1e3 * GIB / 2),
    "conn": Load("conn", 32, 100, "conn/s", True, "us/conn", 1e6),
    "conn-1": Load("conn", 1, 1000, "us median", False, "us/conn", 1e6),
    "rr": Load("rr", 1, 20000, "rt/s", True, "us/rt", 1e6),
    "rr-64": Load("rr", 64, 500, "rt/s", True, "us/rt", 1e6),
    "beside": Load("beside", 5, 4000, "us p99", False, "us/rt", 1e6),
    "udp": Load("udp", 2, 30000, "rt/s", True, "us/rt", 1e6),
}

# With --instructions, each with this count and twice as much: the difference has no start and no end in it.
COUNTED = {
    "a connection, as one before": Load("conn", 1, 250, "", False, "", 1),
    "a connection, to a new name": Load("new", 1, 250, "", False, "", 1),       # localhost has 512 spellings
    "a round trip": Load("rr", 1, 2000, "", False, "", 1),
    "a UDP datagram and its answer": Load("udp", 1, 2000, "", False, "", 1),
}

# ---- the servers --------------------------------------------------------------------------------------------------

# name: (program, its arguments, its configuration file)
PEERS = {
    "microsocks": ("microsocks", "-i 127.0.0.1 -p {port}", ""),
    "dante": ("danted", "-f {file} -p {file}.pid",
              "logoutput: /dev/null\ninternal: 127.0.0.1 port = {port}\nexternal: 127.0.0.1\n"
              "clientmethod: none\nsocksmethod: none\nclient pass {{ from: 0.0.0.0/0 to: 0.0.0.0/0 }}\n"
              "socks pass {{ from: 0.0.0.0/0 to: 0.0.0.0/0 }}\n"),
    "hev": ("hev-socks5-server", "{file}", "main:\n  workers: {cpus}\n  port: {port}\n  listen-address: '127.0.0.1'\n"
                                           "misc:\n  log-level: error\n"),
    "3proxy": ("3proxy", "{file}", "maxconn 20000\nstacksize 32768\nsocks -i127.0.0.1 -p{port}\n"),
}


def program(name, args):
    return shutil.which(PEERS[name][0], path=os.pathsep.join(
        [args.peers or os.devnull, os.environ.get("PATH", os.defpath), "/usr/sbin", "/usr/local/sbin"]))


@contextlib.contextmanager
def serving(name, args, *wrapper):
    """(port, pid) of a server, started for this and ended afterwards; (0, None) for direct. Raises Trouble.

    `wrapper` is the command that runs ours, to count and not to time: then with the same hashes each time."""
    if name == "direct":
        yield 0, None
        return
    with reserve() as sock, tempfile.TemporaryDirectory() as folder:
        port, file = sock.getsockname()[1], Path(folder) / "conf"
        if sys.platform != "linux":         # there the server could not listen beside it
            sock.close()
        if name == "dante":
            wait_ports()
        if name in PEERS:
            words = {"port": port, "file": file, "cpus": os.cpu_count()}
            file.write_text(PEERS[name][2].format(**words))
            command = [program(name, args) or PEERS[name][0], *PEERS[name][1].format(**words).split()]
        else:
            command = [*wrapper, args.python, str(SCRIPT), "-p", str(port), *name.partition("=")[2].split()]
        try:
            child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                                     stderr=subprocess.DEVNULL, start_new_session=True,
                                     env=dict(os.environ, PYTHONHASHSEED="0") if wrapper else None)
        except OSError as exc:
            raise Trouble(str(exc)) from None
        try:
            wait_listening(port, child)
            yield port, child.pid
            if child.poll() is not None:
                raise Trouble("the server died with %d" % child.returncode)
        finally:
            end(child, 60 if wrapper else 5)


def reserve():
    """A socket that reserves its port for a server with SO_REUSEADDR: nothing else is given a port that is bound."""
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.bind((HOST, 0))
    return sock


def wait_ports():
    """Closed connections keep their ports for 60 s: a server that binds before it connects may find none free."""
    for _ in range(60):
        with contextlib.suppress(OSError):
            if int(Path("/proc/net/sockstat").read_text().partition(" tw ")[2].split()[0]) > 20000 and not ENDING:
                time.sleep(1)


def wait_listening(port, child):
    for _ in range(1200):                   # a minute: valgrind takes ten seconds
        with contextlib.suppress(OSError):
            dial(port).close()
            time.sleep(0.3)                 # and its other processes
            if child.poll() is None:
                return
        if child.poll() is not None:
            break
        time.sleep(0.05)
    raise Trouble("did not start")


def end(child, patience_s):
    """End a server and the processes that it started: they are one group, its number is the pid of the first."""
    for number in ("SIGTERM", "SIGKILL"):
        with contextlib.suppress(OSError):
            if hasattr(os, "killpg"):
                os.killpg(child.pid, getattr(signal, number))
            else:
                child.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(patience_s)


def family(pid):
    """A process and its living descendants, where /proc tells."""
    yield pid
    for file in Path("/proc/%d/task" % pid).glob("*/children"):
        with contextlib.suppress(OSError):
            for child in file.read_text().split():
                yield from family(int(child))


def cpu_seconds(pid):
    """User and system time of a process and its descendants, those that it has waited for included; None untold."""
    total = None
    for one in family(pid) if pid else ():
        with contextlib.suppress(OSError):
            fields = Path("/proc/%d/stat" % one).read_text().rpartition(")")[2].split()     # proc(5), from 3: state
            total = (total or 0) + sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")
    return total


def memory_kib(pid):
    """Proportional set size: pages shared by several processes count once. None untold."""
    total = None
    for one in family(pid) if pid else ():
        with contextlib.suppress(OSError):
            for line in Path("/proc/%d/smaps_rollup" % one).read_text().splitlines():
                if line.startswith("Pss:"):
                    total = (total or 0) + int(line.split()[1])
    return total


# ---- the run, and what it prints ----------------------------------------------------------------------------------

def run(works, servers, args):
    """{(work, server): ([figures], [server CPU], {what went wrong})}"""
    results = {(work, server): ([], [], set()) for work in works for server in servers}
    for number in range(1, args.rounds + 1):
        for (work, server), (figures, cpus, wrong) in results.items():
            said = "no figure"
            if ENDING:
                raise SystemExit(128 + ENDING[0])
            try:
                with serving(server, args) as (port, pid):
                    figure, cpu = measure(works[work], port, lambda: cpu_seconds(pid), lambda: memory_kib(pid),
                                          args.timeout)
                if figure is not None:
                    figures.append(figure)
                    said = "%.4g %s" % (figure, works[work].unit)
                if cpu is not None:
                    cpus.append(cpu)
            except Trouble as exc:
                wrong.add(str(exc))
                said = str(exc)
            print("round %d of %d  %-10s %-16s %s" % (number, args.rounds, work, server, said), file=sys.stderr)
    return results


def instructions(load, args):
    """How many of the server's own a run takes. Raises Trouble."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "callgrind"
        with serving("ours=-w 1", args, "valgrind", "--tool=callgrind", "--callgrind-out-file=%s" % file) as (port, _):
            measure(load, port, lambda: None, lambda: None, args.timeout)
        for line in file.read_text().splitlines():
            if line.startswith(("summary:", "totals:")):
                return int(line.split()[1])
    raise Trouble("valgrind has counted nothing")


def count_instructions(args):
    if not shutil.which("valgrind"):
        print("bench.py: --instructions needs valgrind, which is not installed", file=sys.stderr)
        return 2
    build = subprocess.run([args.python, "-VV"], stdout=subprocess.PIPE, text=True).stdout.strip()
    print("%s; user instructions of a server with -w 1" % build)
    for words, load in COUNTED.items():
        load = load._replace(count=load.count // 20) if args.quick else load
        try:
            once, twice = (instructions(load._replace(count=times * load.count), args) for times in (1, 2))
            print("  %-32s %9d" % (words, (twice - once) / load.count), flush=True)
        except Trouble as exc:
            print("  %-32s %9s  %s" % (words, "-", exc), flush=True)
        if ENDING:
            return 128 + ENDING[0]
    return 0


def reference(work, servers, medians, wanted):
    """The server that the others are compared with: as told, or the first peer that has a figure, or direct."""
    order = [wanted] if wanted else [name for name in servers if name in PEERS] + ["direct"]
    return next((name for name in order if medians.get((work, name), (None,))[0] is not None), None)


def ratio(value, ref):
    return "%.2f" % (value / ref) if value is not None and ref else "-"


def number(value):
    return "-" if value is None else "%.0f" % value if value >= 1000 else "%.3g" % value


def tables(works, servers, medians, refs, wrong):
    for work, load in works.items():
        yield "%s: %s is better%s" % (work, "more" if load.higher_is_better else "less",
                                      ", x is the ratio to %s" % refs[work] if refs[work] else "")
        yield "  %-20s %14s %6s %16s %6s" % ("", load.unit, "x", "CPU " + load.cpu, "x")
        ref = medians.get((work, refs[work]), (None, None))
        for server in servers:
            own = medians[work, server]
            yield ("  %-20s %14s %6s %16s %6s  %s" % (
                server[:20], number(own[0]), ratio(own[0], ref[0]), number(own[1]), ratio(own[1], ref[1]),
                "; ".join(sorted(wrong[work, server])))).rstrip()
        yield ""


def chart(works, servers, medians, columns, blocks):
    """A bar for each figure, the most as long as fits; in eighths of a column where there are blocks."""
    for work, load in works.items():
        values = {server: medians[work, server][0] for server in servers if medians[work, server][0] is not None}
        most, room = max(values.values(), default=0), max(10, columns - 26)
        yield "%s, %s: %s is better" % (work, load.unit, "longer" if load.higher_is_better else "shorter")
        for server, value in values.items():
            eighths = round(8 * room * max(0, value) / most) if most > 0 else 0
            bar = "█" * (eighths // 8) + " ▏▎▍▌▋▊▉"[eighths % 8].strip() if blocks else "#" * (eighths // 8)
            yield ("%-16s %7s %s" % (server[:16], number(value), bar)).rstrip()
        yield ""


def rst(works, servers, medians, refs, args):
    """The table for README.rst; file names in the command lose their folders."""
    words = [Path(word).name if os.sep in word else word for word in sys.argv[1:]]
    yield "Measured on %s: %s; medians of %d, in brackets the ratio to the reference." % (
        datetime.date.today(), machine(), args.rounds)
    yield "Command: ``%s``" % " ".join(map(shlex.quote, ["python3", "tests/bench.py", *words]))
    yield ""
    rows = [["workload", "unit", "reference", *servers]]
    for work, load in works.items():
        ref = medians.get((work, refs[work]), (None, None))
        for at, unit in ((0, load.unit), (1, "CPU " + load.cpu)):
            cells = ["%s (%s)" % (number(own[at]), ratio(own[at], ref[at])) if own[at] is not None else "-"
                     for own in (medians[work, server] for server in servers)]
            if (at == 0 or load.kind != "idle") and set(cells) != {"-"}:
                rows.append([work, unit, refs[work] or "-", *cells])
    widths = [max(map(len, column)) for column in zip(*rows)]
    edge = "  ".join("=" * width for width in widths)
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
    yield from [edge, lines[0], edge, *lines[1:], edge]


def machine():
    return "%d CPUs, %s %s, %s %s" % (os.cpu_count() or 1, platform.system(), platform.release(),
                                      platform.python_implementation(), platform.python_version())


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, metavar="N", help="default 3; with --quick 1")
    parser.add_argument("--only", metavar="WORK,...", default=",".join(LOADS), help="default %(default)s")
    parser.add_argument("--servers", metavar="NAME,...", help="default: all that are here")
    parser.add_argument("--ref", metavar="NAME", help="compare with this one (default: the first peer with a figure)")
    parser.add_argument("--peers", metavar="DIR", help="look for peers' programs here, then on PATH")
    parser.add_argument("--python", metavar="PATH", default=sys.executable, help="the interpreter that runs ours")
    parser.add_argument("--quick", action="store_true", help="a twentieth of the work: does it run at all?")
    parser.add_argument("--timeout", type=float, metavar="S", default=60, help="for one measurement (default 60)")
    parser.add_argument("--instructions", action="store_true", help="count instructions with valgrind; nothing else")
    parser.add_argument("--rates", action="store_true", help="measure how exact rate limits are; nothing else")
    parser.add_argument("--rst", action="store_true", help="print the table for README.rst, too")
    args = parser.parse_args()
    args.rounds = args.rounds or (1 if args.quick else 3)
    args.servers = args.servers.split(",") if args.servers else \
        ["direct", *(name for name in PEERS if program(name, args)), "ours"]
    for name in args.servers:
        if name.partition("=")[0] not in ("ours", "direct", *PEERS):
            parser.error("--servers: no server is called %s" % name)
    if args.ref not in (None, *args.servers):
        parser.error("--ref: %s is not among the servers" % args.ref)
    for work in args.only.split(","):
        if work not in LOADS:
            parser.error("--only: no workload is called %s" % work)
    return args


def main():
    args, load = arguments(), os.getloadavg()[0] if hasattr(os, "getloadavg") else float("nan")
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _frame: ENDING.append(number))
    if args.instructions:
        return count_instructions(args)
    if args.rates:
        return bench_rates.table(serving, args)
    works = {work: LOADS[work] for work in args.only.split(",")}
    if args.quick:
        works = {work: load._replace(count=load.count // 20) for work, load in works.items()}
    results = run(works, args.servers, args)
    medians = {key: [statistics.median(values) if values else None for values in found[:2]]
               for key, found in results.items()}
    refs = {work: reference(work, args.servers, medians, args.ref) for work in works}
    print("%s; load average at the start %.2f; medians of %d\n" % (machine(), load, args.rounds))
    blocks = "█".encode(sys.stdout.encoding or "ascii", "replace") != b"?"
    lines = [*tables(works, args.servers, medians, refs, {key: wrong for key, (_, _, wrong) in results.items()}),
             *chart(works, args.servers, medians, shutil.get_terminal_size().columns, blocks),
             *(rst(works, args.servers, medians, refs, args) if args.rst else ())]
    print("\n".join(lines))
    return 0 if any(figures for figures, _, _ in results.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
