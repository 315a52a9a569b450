"""/metrics: the counters in the text format of Prometheus. Reads shared memory and /proc; asks no worker.

https://prometheus.io/docs/instrumenting/exposition_formats/ and .../practices/naming/
"""
from __future__ import annotations

import os
from typing import Iterable, Iterator, List, Tuple

from ..commands.rates import NAMES
from .meter import (
    ACCEPT_ERRORS, BOUNDS_S, BUCKETS, COMMANDS, DROPS, LOGINS, NONE, REFUSALS, REPS, STATES, SUM, TIMES, WAYS, Board)

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
TIME_HELP = {"handshake": "Seconds from accept to the last byte of the request.",
             "connect": "Seconds from the request to the reply, of a CONNECT that succeeded: the lookup and the dial."}

Sample = Tuple[str, float]                      # labels as text, and the value


def page(board: Board, begun: int, version: str) -> str:
    """`begun` is how many sessions have been admitted."""
    lines: List[str] = []
    for name, kind, about, samples in families(board, begun, version):
        lines += ["# HELP %s %s" % (name, about), "# TYPE %s %s" % (name, kind)]
        lines += ["%s%s %s" % (name, labels, number(value)) for labels, value in samples]
    for name in TIMES:
        lines += histogram(board, name)
    return "\n".join(lines) + "\n"


def families(board: Board, begun: int, version: str) -> Iterator[Tuple[str, str, str, Iterable[Sample]]]:
    """Yield name, type, help and samples of each metric but the histograms."""
    rows = [row for row in range(board.rows) if board.get(row, "pid")]
    yield "socks5_build_info", "gauge", "The version of the server, in a label.", [(label(version=version), 1)]
    yield "socks5_start_time_seconds", "gauge", "When the server was started, in Unix time.", [("", board.started)]
    yield "socks5_workers", "gauge", "Server processes that run.", [("", len(rows))]
    yield "socks5_worker_restarts_total", "counter", "Server processes that were replaced because they had died.", [
        ("", board.sum("restarts"))]
    yield "socks5_sessions", "gauge", "Live sessions, by what they are doing.", by(board, "state", "state", STATES)
    yield "socks5_sessions_held_back", "gauge", "Live sessions that wait for their rate, by the limit.", (
        by(board, "held", "limit", NAMES))
    yield "socks5_sessions_max", "gauge", "The session limit.", [("", limit(board, rows))]
    yield "socks5_sessions_total", "counter", "Sessions that were admitted.", [("", begun)]
    yield "socks5_connections_total", "counter", (
        "Sessions that are over, by command and by the REP of their last reply; none where there was none."), [
            (label(command=command, rep=rep), board.sum("session", command + " " + rep))
            for command in COMMANDS for rep in REPS if command != NONE or rep in (NONE, *REPS[2:])]
    yield "socks5_bytes_total", "counter", "Bytes relayed, up from the client; of live sessions once a second.", (
        by(board, "bytes", "direction", WAYS))
    yield "socks5_udp_datagrams_total", "counter", "Datagrams relayed, up is from the client.", (
        by(board, "datagrams", "direction", WAYS))
    yield "socks5_udp_dropped_total", "counter", "Datagrams that were not relayed.", by(
        board, "dropped", "reason", DROPS)
    yield "socks5_logins_total", "counter", "Passwords tried; deferred: not looked at, too many were tried.", (
        by(board, "login", "result", LOGINS))
    yield "socks5_refused_total", "counter", "Connections closed before the client was heard.", (
        by(board, "refused", "reason", REFUSALS))
    yield "socks5_accept_errors_total", "counter", "accept() failed for want of descriptors or memory.", (
        by(board, "accept_error", "errno", ACCEPT_ERRORS))
    yield "socks5_log_lines_lost_total", "counter", "Lines of the log, or blocks of the trace, that were lost.", [
        ("", board.sum("lost"))]
    yield "socks5_open_fds", "gauge", "Descriptors that a server process has open.", [
        (label(worker=str(row)), opened) for row in rows for opened in descriptors(board.get(row, "pid"))]
    yield "socks5_max_fds", "gauge", "Descriptors that a server process may have open.", [
        (label(worker=str(row)), board.get(row, "max_fds")) for row in rows if board.get(row, "max_fds")]


def by(board: Board, what: str, name: str, values: Iterable[str]) -> List[Sample]:
    return [(label(**{name: value}), board.sum(what, value)) for value in values]


def histogram(board: Board, name: str) -> Iterator[str]:
    metric, total = "socks5_%s_seconds" % name, 0
    yield "# HELP %s %s" % (metric, TIME_HELP[name])
    yield "# TYPE %s histogram" % metric
    for bucket, bound in zip(BUCKETS, (*map(repr, BOUNDS_S), "+Inf")):
        total += board.sum(name, bucket)
        yield "%s_bucket%s %d" % (metric, label(le=bound), total)
    yield "%s_sum %s" % (metric, number(board.sum(name, SUM) / 1e6))
    yield "%s_count %d" % (metric, total)


def limit(board: Board, rows: List[int]) -> int:
    """That of all processes together, or the sum of their own ones."""
    return board.get(0, "max_sessions") if board.shared_limit else sum(board.get(row, "max_sessions") for row in rows)


def label(**labels: str) -> str:
    """No value has a quote, a backslash or a newline: all are ours."""
    return "{%s}" % ",".join('%s="%s"' % pair for pair in labels.items())


def number(value: float) -> str:
    return "%d" % value if value == int(value) else repr(value)


def descriptors(pid: int) -> List[int]:
    """How many descriptors a process has open, in a list; none where there is no /proc to ask."""
    folder = "/proc/%d/fd" % pid
    try:
        return [os.stat(folder).st_size or len(os.listdir(folder))]     # the size is the number, since Linux 6.2
    except OSError:
        return []
