"""--self-test: our own server with the given options, on a free loopback port, driven by our own client.

Says of every part what was seen and how long it took, and what this machine lacks and what that costs. A user, and
rules that let it do what is tried here, are added for as long as this lasts; what would lead away from this machine is
left out, and said so.
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


from .net import listeners as listening

from .relay import splice
from .client import HostPort, User
from .protocol.codes import Rep
from .config import Config
from .protocol.errors import ProxyError
from .access.rules import parse_lines
from .server.server import Server

PATIENCE_S = 10.0               # for one step, which takes milliseconds on loopback
BULK = bytes(range(256)) * 256  # 64 KiB
FEW_SESSIONS = 1000             # a limit below is worth a word
LOOPBACK = (ip_network("127.0.0.0/8"), ip_network("::1/128"))
AWAY = ("advertise",)                   # options that speak of other machines

Play = Callable[["Stage"], str]


class Failed(Exception):
    """Something else came than what had to come."""


class Line(NamedTuple):
    """One line of the report; `good` is False for what failed."""

    text: str
    good: bool = True


class Stage(NamedTuple):
    """What a check has to play with."""

    proxy: HostPort
    user: Optional[User]
    echo: HostPort              # sends back what it gets
    echo6: Optional[HostPort]   # None where there is no IPv6


def run(config: Config) -> Iterator[Line]:
    """The report, line by line as it comes about. Raises ConfigError for a bad file, OSError for no port at all."""
    name, password = "self-test-" + secrets.token_hex(4), secrets.token_hex(16)
    mine = on_loopback(config)
    guarded = replace(mine, user=(*config.user, (name, password)))
    yield Line("self-test on 127.0.0.1, with the options that were given%s" % left_out(config))
    mine = guarded if mine.needs_password() else mine
    failed = 0
    with contextlib.ExitStack() as stack:
        echo = stack.enter_context(answering("127.0.0.1"))
        try:
            echo6: Optional[HostPort] = stack.enter_context(answering("::1"))
        except OSError:
            echo6 = None
        proxy = stack.enter_context(serving(mine, name, echo[1]))
        stage = Stage(proxy, (name, password) if mine.needs_password() else None, echo, echo6)
        for words, check in CHECKS:
            line = attempt(words, check, stage)
            failed += not line.good
            yield line
        if mine is not guarded:
            proxy = stack.enter_context(serving(guarded, name, echo[1]))
        line = attempt("a wrong password", wrong_password, stage._replace(proxy=proxy, user=(name, "wrong" + password)))
        failed += not line.good
        yield line
    for text in lacking(echo6 is not None):
        yield Line("note     " + text)
    yield Line("%d failed" % failed if failed else "all is well", not failed)


def attempt(words: str, check: Play, stage: Stage) -> Line:
    began = monotonic()
    try:
        verdict, seen = "ok", check(stage)
    except (Failed, OSError, ValueError) as exc:
        verdict, seen = "FAILED", str(exc) or type(exc).__name__
    if not seen:
        verdict, seen = "missing", "this machine has no IPv6"
    return Line("%-7s  %-33s %8.1f ms  %s" % (verdict, words, (monotonic() - began) * 1000, seen), verdict != "FAILED")


# ---- the server, and whom it is to reach --------------------------------------------------------------------------

def on_loopback(config: Config) -> Config:
    """The same, where only this machine reaches it."""
    changes: Dict[str, Any] = {item.name: item.default for item in fields(Config) if item.name in AWAY}
    allowed = (*config.allow_from, *LOOPBACK) if config.allow_from else ()
    return replace(config, listen=("127.0.0.1",), port=0, allow_from=allowed, **changes)


def left_out(config: Config) -> str:
    names = ["--" + item.name.replace("_", "-") for item in fields(Config)
             if item.name in AWAY and getattr(config, item.name) != item.default]
    return ", without %s" % ", ".join(names) if names else ""


@contextlib.contextmanager
def serving(config: Config, name: str, port: int) -> Iterator[HostPort]:
    """A server in a thread, whose first rules are ours: this user may reach this machine, but not one port of it."""
    who = "user %s " % name if config.needs_password() else ""
    with Server(config) as server:
        ours = parse_lines(["deny %sto 127.0.0.3 port %d" % (who, port), "allow %sto 127.0.0.0/8" % who,
                            "allow %sto ::1" % who], "self-test")
        object.__setattr__(server.rules, "rules", (*ours, *server.rules.rules))     # frozen, for everybody else
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield str(server.server_address[0]), server.server_address[1]
        finally:
            server.shutdown()
            thread.join(PATIENCE_S)


@contextlib.contextmanager
def answering(host: str) -> Iterator[HostPort]:
    """A TCP server that sends everything back, and a FIN for a FIN."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as listener:
        listener.bind((host, 0))
        listener.listen(16)

        def answer() -> None:
            with contextlib.suppress(OSError):
                while True:
                    with listener.accept()[0] as sock, contextlib.suppress(OSError):
                        sock.settimeout(PATIENCE_S)
                        for data in iter(lambda: sock.recv(1 << 16), b""):
                            sock.sendall(data)

        threading.Thread(target=answer, daemon=True).start()
        try:
            yield listener.getsockname()[:2]
        finally:
            with contextlib.suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)


# ---- the checks: each gives what was seen, or raises ----------------------------------------------------------------

def connected(stage: Stage, destination: HostPort) -> socket.socket:
    sock = client.connect(stage.proxy, destination, stage.user, PATIENCE_S)
    sock.settimeout(PATIENCE_S)
    return sock


def there_and_back(stage: Stage, destination: HostPort) -> str:
    with connected(stage, destination) as sock:
        began = monotonic()
        sock.sendall(b"?")
        expect(sock.recv(1), b"?")
        return "reached %s port %d, an answer took %.2f ms" % (*destination, (monotonic() - began) * 1000)


def by_ipv4(stage: Stage) -> str:
    return there_and_back(stage, stage.echo)


def by_ipv6(stage: Stage) -> str:
    return there_and_back(stage, stage.echo6) if stage.echo6 else ""


def by_name(stage: Stage) -> str:
    return there_and_back(stage, ("localhost", stage.echo[1]))


def half_close(stage: Stage) -> str:
    """We say that we have sent everything, and still get all of it back."""
    with connected(stage, stage.echo) as sock:
        sock.sendall(BULK)
        sock.shutdown(socket.SHUT_WR)
        back = b"".join(iter(lambda: sock.recv(1 << 16), b""))
        expect(back, BULK)
        return "%d bytes came back after our FIN" % len(back)


def bind(stage: Stage) -> str:
    with client.bind(stage.proxy, ("127.0.0.1", 0), stage.user, PATIENCE_S) as waiting:
        with socket.create_connection(waiting.bnd, PATIENCE_S) as peer:
            sock, who = waiting.accept(PATIENCE_S)
            with sock:
                sock.settimeout(PATIENCE_S)
                expect(who, peer.getsockname()[:2])
                peer.sendall(b"?")
                expect(sock.recv(1), b"?")
        return "called at %s port %d, the second reply named the caller" % waiting.bnd


def datagrams(stage: Stage, fragments: int) -> str:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as peer, \
            client.associate(stage.proxy, stage.user, PATIENCE_S) as udp:
        peer.bind(("127.0.0.1", 0))
        peer.settimeout(PATIENCE_S)
        udp.settimeout(PATIENCE_S)
        udp.sendto(BULK[:1000], peer.getsockname(), fragments)
        data, sender = peer.recvfrom(1 << 16)
        expect(data, BULK[:1000])
        peer.sendto(b"back", sender)
        expect(udp.recvfrom(), (b"back", peer.getsockname()))
        return "1000 bytes there by way of %s port %d, 4 back" % udp.relay


def refused_by_rule(stage: Stage) -> str:
    return refusal(stage, ("127.0.0.3", stage.echo[1]), Rep.NOT_ALLOWED)


def refused_by_host(stage: Stage) -> str:
    """A port that was free a moment ago."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        nowhere = sock.getsockname()
    return refusal(stage, nowhere, Rep.CONNECTION_REFUSED)


def refusal(stage: Stage, destination: HostPort, rep: Rep) -> str:
    try:
        connected(stage, destination).close()
    except ProxyError as exc:
        expect(exc.rep, int(rep))
        return str(exc)
    raise Failed("it was let through")


def wrong_password(stage: Stage) -> str:
    try:
        connected(stage, stage.echo).close()
    except ProxyError as exc:
        expect(exc.rep, None)
        return str(exc)
    raise Failed("it was let in")


def expect(seen: Any, wanted: Any) -> None:
    if seen != wanted:
        raise Failed("%s instead of %s" % tuple("%.60s" % ascii(thing) for thing in (seen, wanted)))


CHECKS: List[Tuple[str, Play]] = [
    ("CONNECT to an IPv4 address", by_ipv4),
    ("CONNECT to an IPv6 address", by_ipv6),
    ("CONNECT to a name", by_name),
    ("half-close", half_close),
    ("BIND", bind),
    ("UDP ASSOCIATE", lambda stage: datagrams(stage, 1)),
    ("UDP ASSOCIATE, in 3 fragments", lambda stage: datagrams(stage, 3)),
    ("a destination that a rule denies", refused_by_rule),
    ("a port on which nobody listens", refused_by_host),
]


# ---- the machine --------------------------------------------------------------------------------------------------

def lacking(ipv6: bool) -> Iterator[str]:
    """What this machine has not got, and what that costs."""
    if not ipv6:
        yield "no IPv6: destinations that have only such an address cannot be reached, and nobody can listen on one"
    most = listening.session_limit()
    if most < FEW_SESSIONS:
        yield "low descriptor limit: it carries %d clients at once (ulimit -n, or LimitNOFILE= of systemd)" % most
    if not splice.available:
        yield "no os.splice (Linux, from Python 3.10 on): large transfers cost more CPU, each byte is copied twice"
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if cpus == 1:
        yield "one CPU: more than one worker would gain nothing"
    elif not hasattr(os, "fork"):
        yield "no fork: one process serves all clients, and its threads take turns at one of %d CPUs" % cpus
    if not hasattr(socket, "TCP_DEFER_ACCEPT"):
        yield "no TCP_DEFER_ACCEPT (Linux): every client costs a thread from the start, the silent ones, too"
