"""Every tunable once: its name, unit, default, why that default, and help text.

The fields of Config are the command line (cli.py), the INI file and the table in README.rst; a test holds the three
together. A value comes in as text and is judged here, before anything listens. Times are in seconds, sizes in bytes.
"""
from __future__ import annotations

import random
from dataclasses import Field, dataclass, field, fields
from ipaddress import IPv4Network, IPv6Network, ip_address, ip_network
from typing import Any, Callable, Dict, Iterator, List, Mapping, Sequence, Tuple, TypeVar, Union

N = TypeVar("N", int, float)
Network = Union[IPv4Network, IPv6Network]
MOST_S = 2000000            # 23 days: poll() counts milliseconds in 31 bits
GROUPS = ("listening", "access", "leaving", "limits", "running", "watching")


class ConfigError(ValueError):
    """One line that names the option (or file:line) and what is wrong with it."""


# ---- what text may stand for, each raising ValueError with the reason --------------------------------------------

def seconds(text: str) -> float:
    return _number(float, text, MOST_S, "a number of seconds from 0 to %d" % MOST_S)


def count(text: str) -> int:
    return _number(int, text, 1 << 31, "a whole number from 0")


def workers(text: str) -> int:
    return 0 if text == "auto" else _number(int, text, 256, "a number of processes from 1 to 256, or auto")


def port(text: str) -> int:
    return _number(int, text, 65535, "a port from 0 to 65535")


def _number(kind: Callable[[str], N], text: str, most: float, what: str) -> N:
    try:
        value = kind(text)
        if 0 <= value <= most:                  # false for a NaN, too
            return value
    except ValueError:
        pass
    raise ValueError("%r is not %s" % (text, what))


def port_range(text: str) -> Tuple[int, ...]:
    """A-B, both included, as (A, B); a single A is (A, A)."""
    low, _, high = text.partition("-")
    try:
        ports = int(low), int(high or low)
    except ValueError:
        ports = 0, 0
    if not 1 <= ports[0] <= ports[1] <= 65535:
        raise ValueError("%r is not a range of ports A-B within 1 to 65535" % text)
    return ports


def each_port(ports: Tuple[int, ...]) -> Iterator[int]:
    """Every port of a port_range once, from a random one on, so that clients do not all start at the same; for an
    option that was not given only 0, any free port."""
    if not ports:
        yield 0
        return
    size = ports[1] - ports[0] + 1
    start = random.randrange(size)
    for step in range(size):
        yield ports[0] + (start + step) % size


def address(text: str) -> str:
    """An IP address to listen on; a scope (fe80::1%eth0) may follow."""
    if text == "localhost":
        return "127.0.0.1"
    host, percent, _scope = text.partition("%")         # 3.8 knows no scope
    try:
        usable = ip_address(host).version == 6 or not percent
    except ValueError:
        usable = False
    if not usable:
        raise ValueError("%r is not an IP address" % text)
    return text


def own_address(text: str) -> str:
    """An IP address under which others reach us."""
    try:
        usable = not ip_address(text).is_unspecified and "%" not in text
    except ValueError:
        usable = False
    if not usable:
        raise ValueError("%r is not an IP address that others could connect to" % text)
    return text


def network(text: str) -> Network:
    """An IP address or a network in CIDR form; one of IPv4-mapped addresses is the IPv4 network that it means."""
    try:
        net = ip_network(text)
    except ValueError as exc:
        raise ValueError("%s is not an address or a network: %s" % (ascii(text), exc)) from None
    mapped = isinstance(net, IPv6Network) and net.prefixlen >= 96 and net.network_address.ipv4_mapped
    return IPv4Network((mapped, net.prefixlen - 96)) if mapped else net


def path(text: str) -> str:
    if not text or "\0" in text:
        raise ValueError("not the name of a file")
    return text


def log_format(text: str) -> str:
    if text not in ("text", "json"):
        raise ValueError("%r is neither text nor json" % text)
    return text


def credentials(text: str) -> Tuple[str, str]:
    """NAME:PASSWORD, each 1 to 255 bytes; the password may hold colons.                      RFC 1929 §2"""
    name, colon, password = text.partition(":")
    if not colon or not all(1 <= len(part.encode("utf-8", "surrogateescape")) <= 255 for part in (name, password)):
        raise ValueError("not NAME:PASSWORD with 1 to 255 bytes each")      # never shows what was typed
    return name, password


def option(default: Any, flags: str, kind: Callable[[str], Any], group: str, help: str, *, metavar: str = "",
           why: str = "", many: bool = False, secret: bool = False, bare: str = "") -> Any:
    """A Config field. `flags` as on the command line, the long one last; `why` is where the default comes from; a
    `secret` is not in repr(config); `bare` is what the flag means without a value, "" where it needs one."""
    return field(default=default, repr=not secret, metadata={
        "flags": tuple(flags.split()), "kind": kind, "group": group, "help": help, "metavar": metavar, "why": why,
        "many": many, "bare": bare})


@dataclass(frozen=True)
class Config:
    listen: Tuple[str, ...] = option(
        ("127.0.0.1",), "-l --listen", address, "listening", metavar="ADDRESS", many=True,
        help="address to listen on, repeatable; '::' serves IPv4 and IPv6",
        why="nobody else can reach loopback, so the plain command is safe")
    port: int = option(
        1080, "-p --port", port, "listening", metavar="PORT",
        help="port to listen on; 0 takes any free one and prints it",
        why="IANA's port for SOCKS, RFC 1928 §3")
    user: Tuple[Tuple[str, str], ...] = option(
        (), "-u --user", credentials, "access", metavar="NAME:PASSWORD", many=True, secret=True,
        help="let only this user in, repeatable; also from the environment as SOCKS5_USERS=NAME:PASSWORD,...")
    users: str = option(
        "", "--users", path, "access", metavar="FILE",
        help="let in only the users of this file: lines NAME:HASH, made by --hash-password; SIGHUP reads it again")
    allow_from: Tuple[Network, ...] = option(
        (), "--allow-from", network, "access", metavar="CIDR", many=True,
        help="serve only clients at these addresses, repeatable; others are closed at once")
    rules: str = option(
        "", "--rules", path, "access", metavar="FILE",
        help="who may reach what, the first rule that matches decides; SIGHUP reads it again")
    open: bool = option(
        False, "--open", bool, "access", help="serve everybody who can reach this port, without a password")
    advertise: Tuple[str, ...] = option(
        (), "--advertise", own_address, "leaving", metavar="ADDRESS", many=True,
        help="our address in replies to BIND and UDP ASSOCIATE, for a server behind NAT; one each for IPv4 and IPv6")
    bind_ports: Tuple[int, ...] = option(
        (), "--bind-ports", port_range, "leaving", metavar="A-B", help="ports for BIND to listen on, instead of any")
    udp_ports: Tuple[int, ...] = option(
        (), "--udp-ports", port_range, "leaving", metavar="A-B",
        help="ports for UDP ASSOCIATE, two or three for each client at a time, instead of any")
    workers: int = option(
        0, "-w --workers", workers, "running", metavar="N|auto",
        help="server processes; 0 or auto is one for each CPU, up to 4, and 1 where there is no fork",
        why="threads of one process take turns at running Python; 64 busy tunnels on 2 CPUs want two")
    max_sessions: int = option(
        0, "--max-sessions", count, "limits", metavar="N",
        help="most clients at once; 0 is what the descriptor limit carries",
        why="a tunnel takes two descriptors")
    max_per_client: int = option(
        0, "--max-per-client", count, "limits", metavar="N",
        help="most connections from one address (IPv6: from one /64); 0 is any number",
        why="a browser opens a hundred, and an office may share one address")
    max_negotiating: int = option(
        1000, "--max-negotiating", count, "limits", metavar="N",
        help="most clients still before their request; beyond it the busiest address loses its longest silent one",
        why="one thread each for up to 10 s: a hundred newcomers a second")
    handshake_timeout: float = option(
        10.0, "--handshake-timeout", seconds, "limits", metavar="S",
        help="for the whole negotiation, up to the request",
        why="RFC 1928 §6 gives 10 s to close after a failure; a slow modem needs one")
    connect_timeout: float = option(
        10.0, "--connect-timeout", seconds, "limits", metavar="S",
        help="for reaching the destination, all its addresses together",
        why="shorter than what clients wait for us, so that they hear the reason")
    bind_timeout: float = option(
        120.0, "--bind-timeout", seconds, "limits", metavar="S", help="for the peer of a BIND to come; 0 is never",
        why="an FTP server calls back at once, but a person may first have to accept a file")
    idle_timeout: float = option(
        3600.0, "--idle-timeout", seconds, "limits", metavar="S", help="for a tunnel without traffic; 0 is never",
        why="longer than the pauses of ssh and IMAP clients")
    half_closed_timeout: float = option(
        300.0, "--half-closed-timeout", seconds, "limits", metavar="S",
        help="for a tunnel of which one side is closed and the other silent; 0 is never",
        why="a server may think that long about a request whose client has said all")
    udp_idle_timeout: float = option(
        300.0, "--udp-idle-timeout", seconds, "limits", metavar="S",
        help="for a UDP association without datagrams; 0 is never",
        why="RFC 4787 §4.3 recommends 5 minutes for a mapping")
    drain_timeout: float = option(
        5.0, "--drain-timeout", seconds, "limits", metavar="S", help="for sessions to finish after SIGTERM or SIGINT",
        why="inside the 10 s that `docker stop` allows")
    log_format: str = option(
        "text", "--log-format", log_format, "watching", metavar="text|json",
        help="how lines of the log look: for people, or as one JSON object each")
    trace: str = option(
        "", "--trace", path, "watching", metavar="FILE", bare="-",
        help="show every message of every session, field by field, on standard error, or append it to FILE")

    def __post_init__(self) -> None:
        """Raises ConfigError for what cannot be served, or must not be without being asked for."""
        if not self.listen:
            raise ConfigError("--listen: no address")
        names = [name for name, _ in self.user]
        if len(set(names)) < len(names):
            raise ConfigError("--user: a name was given twice")
        beyond = self.beyond()
        if beyond and not (self.needs_password() or self.clients_limited() or self.rules or self.open):
            raise ConfigError(
                "--listen %s: everybody who reaches it could use this proxy; add --user NAME:PASSWORD to let in whom "
                "you know, as in: python socks5_server.py -l %s -p %d -u NAME:PASSWORD (or --users FILE, or "
                "--allow-from CIDR, or --rules FILE; or --open, if everybody may)" % (beyond[0], beyond[0], self.port))

    def beyond(self) -> List[str]:
        """The listening addresses that others than this machine reach."""
        return [text for text in self.listen if not ip_address(text.partition("%")[0]).is_loopback]

    def needs_password(self) -> bool:
        return bool(self.user or self.users)

    def clients_limited(self) -> bool:
        """Whether --allow-from leaves anybody out: a /0 does not."""
        return bool(self.allow_from) and all(net.prefixlen for net in self.allow_from)


def options() -> List["Field[Any]"]:
    """The fields of Config in the order in which people read them."""
    return sorted(fields(Config), key=lambda item: GROUPS.index(item.metadata["group"]))


def long_flag(item: "Field[Any]") -> str:
    return str(item.metadata["flags"][-1])


def parse(item: "Field[Any]", texts: Sequence[str], where: str) -> Any:
    """The value of an option from its text, or from several for a repeatable one. ConfigError names `where`."""
    kind, many = item.metadata["kind"], item.metadata["many"]
    try:
        if kind is bool:
            return {"yes": True, "true": True, "on": True, "1": True,
                    "no": False, "false": False, "off": False, "0": False}[texts[-1].lower()]
        values = tuple(kind(text) for text in texts)
    except KeyError:
        raise ConfigError("%s: say yes or no, not %r" % (where, texts[-1])) from None
    except ValueError as exc:
        raise ConfigError("%s: %s" % (where, exc)) from None
    return values if many else values[-1]


def from_environment(environ: Mapping[str, str]) -> Dict[str, Any]:
    """SOCKS5_USERS=NAME:PASSWORD,NAME:PASSWORD, so that a password need not stand in the list of processes."""
    texts = [text for text in environ.get("SOCKS5_USERS", "").split(",") if text]
    users = next(item for item in fields(Config) if item.name == "user")
    return {"user": parse(users, texts, "SOCKS5_USERS")} if texts else {}
