"""--self-test: start a server with the given options on a free loopback port, and test it with client.py.

Reports the result and the duration of each check, and what this machine lacks. For the test, the server gets one more
user and rules that permit the checks. Options that refer to other machines are left out, and named. The checks run in
the main thread, the server in another.
"""
from __future__ import annotations

import contextlib
import os
import secrets
import socket
import threading
from dataclasses import fields, replace
from ipaddress import ip_network
from time import monotonic
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Tuple

from . import client
from .access.rules import parse_lines
from .client import HostPort, User
from .commands.dialogue import Gssapi
from .config import Config
from .values import ANY_SERVICE
from .net import listeners as listening
from .protocol.codes import Rep
from .protocol.errors import ProxyError
from .relay import splice
from .server.server import Server

TIMEOUT_S = 10.0                # for one step, which takes milliseconds on loopback
BULK = bytes(range(256)) * 256  # 64 KiB
FEW_SESSIONS = 1000             # a lower limit is reported
LOOPBACK = (ip_network("127.0.0.0/8"), ip_network("::1/128"))
LEFT_OUT = ("advertise", "out", "proxy_protocol")      # options that refer to other machines

Check = Callable[["Setup"], str]


class Failed(Exception):
    """A check saw something other than expected."""


class Missing(Exception):
    """This machine lacks what a check needs."""


class Line(NamedTuple):
    """One line of the report. `good` is False for a failure."""

    text: str
    good: bool = True


class Setup(NamedTuple):
    """What a check uses."""

    proxy: HostPort
    user: Optional[User]
    echo: HostPort              # a server that returns what it receives
    echo6: Optional[HostPort]   # None where there is no IPv6


def run(config: Config) -> Iterator[Line]:
    """Run all checks. Yields the lines of the report. Raises ConfigError for a bad file, OSError without a port."""
    name, password = "self-test-" + secrets.token_hex(4), secrets.token_hex(16)
    tested = on_loopback(config)
    with_user = replace(tested, user=(*config.user, (name, password)))
    yield Line("self-test on 127.0.0.1 with the given options%s" % names_left_out(config))
    tested = with_user if tested.authenticates() else tested
    failed = 0
    with contextlib.ExitStack() as stack:
        echo = stack.enter_context(echo_server("127.0.0.1"))
        try:
            echo6: Optional[HostPort] = stack.enter_context(echo_server("::1"))
        except OSError:
            echo6 = None
        proxy = stack.enter_context(serving(tested, name, echo[1]))
        asking = proxy if tested is with_user else stack.enter_context(serving(with_user, name, echo[1]))
        setup = Setup(proxy, (name, password) if tested.needs_password() else None, echo, echo6)
        wrong = setup._replace(proxy=asking, user=(name, "wrong" + password))
        checks = [*CHECKS, ("a wrong password", lambda _setup: wrong_password(wrong))]
        if config.gssapi:
            checks.append(("GSSAPI", lambda setup: by_gssapi(setup, config)))
        for words, check in checks:
            line = attempt(words, check, setup)
            failed += not line.good
            yield line
    for text in lacking(echo6 is not None):
        yield Line("note     " + text)
    yield Line("%d failed" % failed if failed else "all checks passed", not failed)


def attempt(words: str, check: Check, setup: Setup) -> Line:
    began = monotonic()
    try:
        verdict, seen = "ok", check(setup)
    except Missing as exc:
        verdict, seen = "missing", str(exc)
    except (Failed, OSError, ValueError) as exc:
        verdict, seen = "FAILED", str(exc) or type(exc).__name__
    return Line("%-7s  %-33s %8.1f ms  %s" % (verdict, words, (monotonic() - began) * 1000, seen), verdict != "FAILED")


# ---- the server under test, and the destination ------------------------------------------------------------------

def on_loopback(config: Config) -> Config:
    """The same options, but listening on loopback."""
    changes: Dict[str, Any] = {item.name: item.default for item in fields(Config) if item.name in LEFT_OUT}
    allowed = (*config.allow_from, *LOOPBACK) if config.allow_from else ()
    return replace(config, listen=("127.0.0.1",), port=0, allow_from=allowed, **changes)


def names_left_out(config: Config) -> str:
    names = ["--" + item.name.replace("_", "-") for item in fields(Config)
             if item.name in LEFT_OUT and getattr(config, item.name) != item.default]
    return ", without %s" % ", ".join(names) if names else ""


@contextlib.contextmanager
def serving(config: Config, name: str, port: int) -> Iterator[HostPort]:
    """Run a server in a thread. Its first rules permit this user to reach loopback, except 127.0.0.3 at `port`."""
    who = "user %s " % name if config.needs_password() else ""
    with Server(config) as server:
        first = parse_lines(["deny %sto 127.0.0.3 port %d" % (who, port), "allow %sto 127.0.0.0/8 via direct" % who,
                            "allow %sto ::1 via direct" % who], "self-test")
        object.__setattr__(server.rules, "rules", (*first, *server.rules.rules))     # although Rules is frozen
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield str(server.server_address[0]), server.server_address[1]
        finally:
            server.shutdown()
            thread.join(TIMEOUT_S)


@contextlib.contextmanager
def echo_server(host: str) -> Iterator[HostPort]:
    """Run a TCP server that echoes everything, and answers FIN with FIN."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as listener:
        listener.bind((host, 0))
        listener.listen(16)

        def answer() -> None:
            with contextlib.suppress(OSError):
                while True:
                    with listener.accept()[0] as sock, contextlib.suppress(OSError):
                        sock.settimeout(TIMEOUT_S)
                        for data in iter(lambda: sock.recv(1 << 16), b""):
                            sock.sendall(data)

        threading.Thread(target=answer, daemon=True).start()
        try:
            yield listener.getsockname()[:2]
        finally:
            with contextlib.suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)


# ---- the checks: each returns what it saw, or raises --------------------------------------------------------------

def connected(setup: Setup, destination: HostPort) -> socket.socket:
    sock = client.connect(setup.proxy, destination, setup.user, TIMEOUT_S)
    sock.settimeout(TIMEOUT_S)
    return sock


def round_trip(setup: Setup, destination: HostPort) -> str:
    with connected(setup, destination) as sock:
        began = monotonic()
        sock.sendall(b"?")
        expect(sock.recv(1), b"?")
        return "connected to %s port %d, round trip %.2f ms" % (*destination, (monotonic() - began) * 1000)


def by_ipv4(setup: Setup) -> str:
    return round_trip(setup, setup.echo)


def by_ipv6(setup: Setup) -> str:
    if not setup.echo6:
        raise Missing("this machine has no IPv6")
    return round_trip(setup, setup.echo6)


def by_name(setup: Setup) -> str:
    return round_trip(setup, ("localhost", setup.echo[1]))


def half_close(setup: Setup) -> str:
    """After our FIN, the other direction still delivers all data."""
    with connected(setup, setup.echo) as sock:
        sock.sendall(BULK)
        sock.shutdown(socket.SHUT_WR)
        back = b"".join(iter(lambda: sock.recv(1 << 16), b""))
        expect(back, BULK)
        return "%d bytes received after our FIN" % len(back)


def bind(setup: Setup) -> str:
    with client.bind(setup.proxy, ("127.0.0.1", 0), setup.user, TIMEOUT_S) as waiting:
        with socket.create_connection(waiting.bnd, TIMEOUT_S) as peer:
            sock, who = waiting.accept(TIMEOUT_S)
            with sock:
                sock.settimeout(TIMEOUT_S)
                expect(who, peer.getsockname()[:2])
                peer.sendall(b"?")
                expect(sock.recv(1), b"?")
        return "listened on %s port %d, the second reply has the peer's address" % waiting.bnd


def datagrams(setup: Setup, fragments: int) -> str:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as peer, \
            client.associate(setup.proxy, setup.user, TIMEOUT_S) as udp:
        peer.bind(("127.0.0.1", 0))
        peer.settimeout(TIMEOUT_S)
        udp.settimeout(TIMEOUT_S)
        udp.sendto(BULK[:1000], peer.getsockname(), fragments)
        data, sender = peer.recvfrom(1 << 16)
        expect(data, BULK[:1000])
        peer.sendto(b"back", sender)
        expect(udp.recvfrom(), (b"back", peer.getsockname()))
        return "1000 bytes sent through %s port %d, 4 received" % udp.relay


def refused_by_rule(setup: Setup) -> str:
    return refusal(setup, ("127.0.0.3", setup.echo[1]), Rep.NOT_ALLOWED)


def refused_by_host(setup: Setup) -> str:
    """Connect to a port that was just closed."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        closed = sock.getsockname()
    return refusal(setup, closed, Rep.CONNECTION_REFUSED)


def refusal(setup: Setup, destination: HostPort, rep: Rep) -> str:
    try:
        connected(setup, destination).close()
    except ProxyError as exc:
        expect(exc.rep, int(rep))
        return str(exc)
    raise Failed("the connection was not refused")


def wrong_password(setup: Setup) -> str:
    try:
        connected(setup, setup.echo).close()
    except ProxyError as exc:
        expect(exc.rep, None)
        return str(exc)
    raise Failed("the wrong password was accepted")


def by_gssapi(setup: Setup, config: Config) -> str:
    """Log in with the ticket of the user who runs this, for the service on this host."""
    service = "rcmd" if config.gssapi == ANY_SERVICE else config.gssapi
    gssapi = Gssapi(service if "@" in service else "%s@%s" % (service, socket.gethostname()))
    try:
        with client.connect(setup.proxy, setup.echo, None, TIMEOUT_S, gssapi) as sock:
            sock.settimeout(TIMEOUT_S)
            sock.sendall(b"?")
            expect(sock.recv(1), b"?")
    except ProxyError as exc:
        if "gss_init_sec_context" in str(exc):              # no ticket, no KDC
            raise Missing(str(exc)) from None
        if exc.rep != Rep.NOT_ALLOWED:                      # what the rules let this user reach is another matter
            raise
    return "logged in for %s at confidentiality" % gssapi.service


def expect(seen: Any, wanted: Any) -> None:
    if seen != wanted:
        raise Failed("%s instead of %s" % tuple("%.60s" % ascii(thing) for thing in (seen, wanted)))


CHECKS: List[Tuple[str, Check]] = [
    ("CONNECT to an IPv4 address", by_ipv4),
    ("CONNECT to an IPv6 address", by_ipv6),
    ("CONNECT to a name", by_name),
    ("half-close", half_close),
    ("BIND", bind),
    ("UDP ASSOCIATE", lambda setup: datagrams(setup, 1)),
    ("UDP ASSOCIATE, in 3 fragments", lambda setup: datagrams(setup, 3)),
    ("a destination that a rule denies", refused_by_rule),
    ("a closed port", refused_by_host),
]


# ---- what this machine lacks ---------------------------------------------------------------------------------------

def lacking(ipv6: bool) -> Iterator[str]:
    """Yield a line for each feature that this machine lacks, with the consequence."""
    if not ipv6:
        yield "no IPv6: the server cannot listen on IPv6 addresses or connect to them"
    limit = listening.session_limit()
    if limit < FEW_SESSIONS:
        yield "low descriptor limit: it permits %d sessions (ulimit -n, or LimitNOFILE= of systemd)" % limit
    if not splice.available:
        yield "no os.splice (Linux, from Python 3.10 on): large transfers cost more CPU, which copy each byte twice"
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if cpus == 1:
        yield "one CPU: more than one worker process has no advantage"
    elif not hasattr(os, "fork"):
        yield "no fork(): one process serves all clients, and its GIL leaves most of %d CPUs idle" % cpus
    if not hasattr(socket, "TCP_DEFER_ACCEPT"):
        yield "no TCP_DEFER_ACCEPT (Linux): a client holds a thread before it sends anything"
