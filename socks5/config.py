"""Every option of the server: name, unit, default, the reason for the default, help text.

The fields of Config define the command line (cli.py), the INI file and the option table of README.rst; a test compares
the three. Values are parsed from text and checked before anything listens. Times are in seconds, sizes in bytes.
"""
from __future__ import annotations

import re
from dataclasses import Field, dataclass, field, fields
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from typing import (
    Any, Callable, Dict, List, Mapping, NamedTuple, Optional, Sequence, Tuple, TypeVar, Union)
from urllib.parse import unquote_to_bytes

N = TypeVar("N", int, float)
Network = Union[IPv4Network, IPv6Network]
MAX_S = 2000000             # 23 days: poll() counts milliseconds in 31 bits
ANY_SERVICE = "any"
SAME = "same"               # of --out
DIRECT = "direct"           # in a rule: not through an upstream
DEFAULT_UPSTREAM = "upstream"           # the name of an upstream without one: rules that name none lead there
UPSTREAM = re.compile(r"(?:([A-Za-z0-9_-]{1,64})=)?socks5h?://(?:([^@/\s]*)@)?"
                      r"(?:\[([0-9A-Fa-f:.]+)\]|([A-Za-z0-9_.-]{1,253})):([0-9]{1,5})/?", re.ASCII)
GROUPS = ("listening", "access", "outgoing", "limits", "running", "watching")


class ConfigError(ValueError):
    """An invalid option or file. The message is one line: the option or file:line, and the reason."""


# ---- parsers of option values: each raises ValueError with the reason --------------------------------------------

def seconds(text: str) -> float:
    return _number(float, text, MAX_S, "a number of seconds from 0 to %d" % MAX_S)


def count(text: str) -> int:
    return _number(int, text, 1 << 31, "a whole number from 0 to %d" % (1 << 31))


def workers(text: str) -> int:
    return 0 if text == "auto" else _number(int, text, 256, "a number of processes from 1 to 256, or auto")


def port(text: str) -> int:
    return _number(int, text, 65535, "a port from 0 to 65535")


def _number(kind: Callable[[str], N], text: str, maximum: float, expected: str) -> N:
    try:
        value = kind(text)
        if 0 <= value <= maximum:               # false for NaN
            return value
    except ValueError:
        pass
    raise ValueError("%r is not %s" % (text, expected))


def port_range(text: str) -> Tuple[int, ...]:
    """Parse a range of ports A-B, both included, as (A, B). A single port A gives (A, A)."""
    low, _, high = text.partition("-")
    try:
        ports = int(low), int(high or low)
    except ValueError:
        ports = 0, 0
    if not 1 <= ports[0] <= ports[1] <= 65535:
        raise ValueError("%r is not a range of ports A-B within 1 to 65535" % text)
    return ports


def address(text: str) -> str:
    """Parse an IP address to listen on. An IPv6 address may have a scope: fe80::1%eth0."""
    if text == "localhost":
        return "127.0.0.1"
    host, percent, _scope = text.partition("%")         # Python 3.8 parses no scope
    try:
        usable = ip_address(host).version == 6 or not percent
    except ValueError:
        usable = False
    if not usable:
        raise ValueError("%r is not an IP address" % text)
    return text


def own_address(text: str) -> str:
    """Parse an IP address to advertise in replies."""
    try:
        usable = not ip_address(text).is_unspecified and "%" not in text
    except ValueError:
        usable = False
    if not usable:
        raise ValueError("%r is not an IP address to which a peer can connect" % text)
    return text


def out_address(text: str) -> str:
    """Parse an IP address of ours to connect from, or "same"."""
    if text == SAME:
        return text
    try:
        here = ip_address(text)
        usable = "%" not in text and not (here.is_unspecified or here.is_loopback or here.is_link_local
                                          or here.is_multicast)
    except ValueError:
        usable = False
    if not usable:
        raise ValueError("%r is neither 'same' nor an IP address from which other hosts can be reached" % text)
    return str(getattr(here, "ipv4_mapped", None) or here)


def network(text: str) -> Network:
    """Parse an IP address or a CIDR network. A network of IPv4-mapped addresses becomes the IPv4 network."""
    try:
        net = ip_network(text)
    except ValueError as exc:
        raise ValueError("%s is not an address or a network: %s" % (ascii(text), exc)) from None
    mapped = isinstance(net, IPv6Network) and net.prefixlen >= 96 and net.network_address.ipv4_mapped
    return IPv4Network((mapped, net.prefixlen - 96)) if mapped else net


def endpoint(text: str) -> Tuple[str, int]:
    """Parse ADDRESS:PORT, an IPv6 address in brackets: [::1]:9180."""
    host, colon, digits = text.rpartition(":")
    bare = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    if not colon or (":" in bare) != (bare != host):
        raise ValueError("%r is not ADDRESS:PORT, as in 127.0.0.1:9180 or [::1]:9180" % text)
    return address(bare), port(digits)


def path(text: str) -> str:
    if not text or "\0" in text:
        raise ValueError("not a file name")
    return text


def user_group(text: str) -> str:
    user, colon, group = text.partition(":")
    if not user or bool(colon) != bool(group) or not text.isprintable() or ":" in group:
        raise ValueError("%s is not USER or USER:GROUP" % ascii(text))
    return text


def log_format(text: str) -> str:
    if text not in ("text", "json"):
        raise ValueError("%r is neither text nor json" % text)
    return text


def protection(text: str) -> str:
    if text not in ("clear", "integrity", "confidentiality"):
        raise ValueError("%r is none of clear, integrity, confidentiality" % text)
    return text


def service(text: str) -> str:
    """Parse SERVICE or SERVICE@HOST; ANY_SERVICE: what the keytab has."""
    name, _at, host = text.partition("@")
    if not name or not text.isprintable() or set(text) & set(" /") or "@" in host or text.endswith("@"):
        raise ValueError("%s is not SERVICE or SERVICE@HOST" % ascii(text))
    return text


def credentials(text: str) -> Tuple[str, str]:
    """Parse NAME:PASSWORD, each 1 to 255 bytes. The password may contain colons.             RFC 1929 §2"""
    name, colon, password = text.partition(":")
    if not colon or not all(1 <= len(part.encode("utf-8", "surrogateescape")) <= 255 for part in (name, password)):
        raise ValueError("not NAME:PASSWORD with 1 to 255 bytes each")      # the text may hold a password
    return name, password


class Upstream(NamedTuple):
    """A SOCKS5 proxy through which we reach destinations. Its password is not shown."""

    name: str
    host: str                                   # an IP address or a name
    port: int
    user: Optional[Tuple[bytes, bytes]] = None

    def __str__(self) -> str:
        return "upstream %s (%s)" % (self.name, ("[%s]:%d" if ":" in self.host else "%s:%d") % (self.host, self.port))

    def __repr__(self) -> str:
        return str(self)


def upstream(text: str) -> Upstream:
    """Parse [NAME=]socks5://[USER:PASSWORD@]HOST:PORT. USER and PASSWORD may have bytes as %XX, as in any URL."""
    found = UPSTREAM.fullmatch(text)
    problem = "not [NAME=]socks5://[USER:PASSWORD@]HOST:PORT"           # the text may hold a password
    if not found:
        raise ValueError(problem)
    name, login, bracketed, host, number = found.groups()
    try:
        if bracketed:
            IPv6Address(bracketed)
        elif host.replace(".", "").isdigit():
            IPv4Address(host)
        at = port(number)
    except ValueError:
        raise ValueError(problem) from None
    if name == DIRECT or not at:
        raise ValueError("an upstream is not called %s" % DIRECT if at else problem)
    user = None
    if login is not None:
        pair = [unquote_to_bytes(part.encode("utf-8", "surrogateescape")) for part in login.split(":", 1)]
        if len(pair) < 2 or not all(1 <= len(part) <= 255 for part in pair):
            raise ValueError("%s, with 1 to 255 bytes each of USER and PASSWORD" % problem)
        user = pair[0], pair[1]
    return Upstream(name or DEFAULT_UPSTREAM, bracketed or host, at, user)


def option(default: Any, flags: str, kind: Callable[[str], Any], group: str, help: str, *, metavar: str = "",
           why: str = "", many: bool = False, secret: bool = False, bare: str = "") -> Any:
    """Make a field of Config. `flags` are those of the command line, the long one last. `why` is the reason for the
    default. A `secret` is not in repr(config). `bare` is the value of a flag without one; "": a value is required."""
    return field(default=default, repr=not secret, metadata={
        "flags": tuple(flags.split()), "kind": kind, "group": group, "help": help, "metavar": metavar, "why": why,
        "many": many, "bare": bare})


@dataclass(frozen=True)
class Config:
    """The options of one server. Frozen, so threads can share it."""

    listen: Tuple[str, ...] = option(
        ("127.0.0.1",), "-l --listen", address, "listening", metavar="ADDRESS", many=True,
        help="address to listen on, repeatable; '::' serves IPv4 and IPv6",
        why="only this machine can reach loopback, so the server is safe without options")
    port: int = option(
        1080, "-p --port", port, "listening", metavar="PORT",
        help="port to listen on; 0: any free port",
        why="the port that IANA assigned to SOCKS, RFC 1928 §3")
    proxy_protocol: Tuple[Network, ...] = option(
        (), "--proxy-protocol", network, "listening", metavar="CIDR", many=True,
        help="load balancers of this network send the client's address in a PROXY header (v1, v2), repeatable")
    user: Tuple[Tuple[str, str], ...] = option(
        (), "-u --user", credentials, "access", metavar="NAME:PASSWORD", many=True, secret=True,
        help="require this user name and password, repeatable; or set SOCKS5_USERS=NAME:PASSWORD,...")
    users: str = option(
        "", "--users", path, "access", metavar="FILE", help="require a user listed in FILE; SIGHUP reads it again")
    allow_from: Tuple[Network, ...] = option(
        (), "--allow-from", network, "access", metavar="CIDR", many=True,
        help="serve only clients of this network, repeatable")
    gssapi: str = option(
        "", "--gssapi", service, "access", metavar="SERVICE[@HOST]", bare=ANY_SERVICE,
        help="authenticate by GSSAPI (Kerberos), with the keys in the keytab: all of them, or those of SERVICE")
    keytab: str = option(
        "", "--keytab", path, "access", metavar="FILE",
        help="keys for --gssapi, instead of the system's keytab; SIGHUP checks it again")
    gssapi_protection: str = option(
        "clear", "--gssapi-protection", protection, "access", metavar="LEVEL",
        help="the least protection of a GSSAPI client's bytes: clear, integrity or confidentiality",
        why="curl asks for clear; a client that asks for more gets it")
    rules: str = option(
        "", "--rules", path, "access", metavar="FILE", help="authorize by the rules in FILE; SIGHUP reads it again")
    open: bool = option(
        False, "--open", bool, "access", help="permit an open proxy: any client, without a password")
    out: Tuple[str, ...] = option(
        (), "--out", out_address, "outgoing", metavar="ADDRESS|same", many=True,
        help="address of this machine to connect from, one each for IPv4 and IPv6; same: the one that the client "
             "connected to")
    upstream: Tuple[Upstream, ...] = option(
        (), "--upstream", upstream, "outgoing", metavar="[NAME=]URL", many=True, secret=True,
        help="connect through the SOCKS5 proxy at socks5://[USER:PASSWORD@]HOST:PORT; with NAME=, only where --rules "
             "say via NAME; or set SOCKS5_UPSTREAM=[NAME=]URL,...")
    advertise: Tuple[str, ...] = option(
        (), "--advertise", own_address, "outgoing", metavar="ADDRESS", many=True,
        help="address in replies to BIND and UDP ASSOCIATE, for a server behind NAT; one each for IPv4 and IPv6")
    bind_ports: Tuple[int, ...] = option(
        (), "--bind-ports", port_range, "outgoing", metavar="A-B", help="ports for BIND to listen on, instead of any")
    udp_ports: Tuple[int, ...] = option(
        (), "--udp-ports", port_range, "outgoing", metavar="A-B",
        help="ports for UDP ASSOCIATE, two or three per association")
    workers: int = option(
        0, "-w --workers", workers, "running", metavar="N|auto",
        help="server processes; 0 or auto: one for each CPU, at most 4; always 1 without fork()",
        why="the GIL runs one thread of a process at a time; 64 busy tunnels on 2 CPUs need two processes")
    run_as: str = option(
        "", "--run-as", user_group, "running", metavar="USER[:GROUP]",
        help="after listening, run as USER, for good; SIGHUP then reads the files as USER")
    max_sessions: int = option(
        0, "--max-sessions", count, "limits", metavar="N",
        help="session limit; 0: by the descriptor limit",
        why="a tunnel takes two descriptors")
    max_per_client: int = option(
        0, "--max-per-client", count, "limits", metavar="N",
        help="session limit for each client address (IPv6: each /64); 0: no limit",
        why="a browser opens a hundred connections, and an office may share one address")
    max_negotiating: int = option(
        1000, "--max-negotiating", count, "limits", metavar="N",
        help="negotiation limit; a further client evicts the longest silent one of the busiest address",
        why="one thread each for up to 10 s: a hundred new clients a second")
    handshake_timeout: float = option(
        10.0, "--handshake-timeout", seconds, "limits", metavar="S",
        help="time up to the request; 0: no limit",
        why="RFC 1928 §6 gives 10 s to close after a failure; a negotiation over a modem takes 1 s")
    connect_timeout: float = option(
        10.0, "--connect-timeout", seconds, "limits", metavar="S",
        help="time to resolve the name and connect",
        why="shorter than the time-outs of clients, so that they receive the REP")
    bind_timeout: float = option(
        120.0, "--bind-timeout", seconds, "limits", metavar="S", help="time until a peer connects; 0: no limit",
        why="an FTP server connects at once, but a person may first have to accept a file")
    idle_timeout: float = option(
        3600.0, "--idle-timeout", seconds, "limits", metavar="S", help="idle time of a tunnel; 0: no limit",
        why="longer than the pauses of ssh and IMAP clients")
    half_closed_timeout: float = option(
        300.0, "--half-closed-timeout", seconds, "limits", metavar="S",
        help="idle time of a half-closed tunnel; 0: no limit",
        why="a server may take that long to answer a client that has sent everything and closed its direction")
    udp_idle_timeout: float = option(
        300.0, "--udp-idle-timeout", seconds, "limits", metavar="S",
        help="idle time of an association; 0: no limit",
        why="RFC 4787 §4.3 recommends 5 minutes for a mapping")
    drain_timeout: float = option(
        5.0, "--drain-timeout", seconds, "limits", metavar="S", help="time for sessions to end after SIGTERM",
        why="less than the 10 s that `docker stop` allows")
    log_format: str = option(
        "text", "--log-format", log_format, "watching", metavar="text|json",
        help="text, or a JSON object for each line")
    status: Tuple[Any, ...] = option(
        (), "--status", endpoint, "watching", metavar="ADDRESS:PORT",
        help="serve a status page, /metrics, /sessions and /healthz over HTTP")
    trace: str = option(
        "", "--trace", path, "watching", metavar="FILE", bare="-",
        help="write each message, field by field, to stderr or FILE")

    def __post_init__(self) -> None:
        """Raise ConfigError for a combination that is impossible, or an open proxy without --open."""
        if not self.listen:
            raise ConfigError("--listen: no address")
        if self.udp_ports and self.udp_ports[0] == self.udp_ports[1]:
            raise ConfigError("--udp-ports %d: an association needs two ports, one towards the client and one towards "
                              "the remotes" % self.udp_ports[0])
        names = [name for name, _ in self.user]
        if len(set(names)) < len(names):
            raise ConfigError("--user: a name is given twice")
        proxies = [upstream.name for upstream in self.upstream]
        if len(set(proxies)) < len(proxies):
            raise ConfigError("--upstream: a name is given twice, or more than one has none")
        for kind in (4, 6):
            if sum(text != SAME and ip_address(text).version == kind for text in self.out) > 1:
                raise ConfigError("--out: more than one IPv%d address" % kind)
        beyond = self.beyond()
        if beyond and not (self.authenticates() or self.clients_limited() or self.rules or self.open):
            raise ConfigError(
                "--listen %s: every client that reaches it could use this proxy; require a password, as in: python "
                "socks5_server.py -l %s -p %d -u NAME:PASSWORD (or use --users FILE, --allow-from CIDR or --rules "
                "FILE; --open permits an open proxy)" % (beyond[0], beyond[0], self.port))
        if self.status_beyond() and not (self.needs_password() or self.open):
            raise ConfigError("--status %s: every client that reaches it could see who connects where; require a "
                              "password by --user or --users (--open permits all)" % self.status[0])

    def status_beyond(self) -> bool:
        """Whether the status page is to be reached from other machines."""
        return bool(self.status) and not ip_address(self.status[0].partition("%")[0]).is_loopback

    def beyond(self) -> List[str]:
        """The listening addresses that clients elsewhere reach: those that are not loopback; all of them through a load
        balancer."""
        return [text for text in self.listen
                if self.proxy_protocol or not ip_address(text.partition("%")[0]).is_loopback]

    def upstream_of(self, via: Optional[str]) -> Optional[Upstream]:
        """The upstream to which a rule with this `via` leads; None: we connect ourselves. KeyError if there is none."""
        by_name: Dict[Optional[str], Upstream] = {upstream.name: upstream for upstream in self.upstream}
        return by_name.get(DEFAULT_UPSTREAM) if via is None else None if via == DIRECT else by_name[via]

    def needs_password(self) -> bool:
        return bool(self.user or self.users)

    def authenticates(self) -> bool:
        """Whether each client has to say who its user is."""
        return self.needs_password() or bool(self.gssapi)

    def clients_limited(self) -> bool:
        """Whether --allow-from excludes any client; a /0 does not."""
        return bool(self.allow_from) and all(net.prefixlen for net in self.allow_from)


def options() -> List["Field[Any]"]:
    """The fields of Config in the order of GROUPS."""
    return sorted(fields(Config), key=lambda item: GROUPS.index(item.metadata["group"]))


def long_flag(item: "Field[Any]") -> str:
    return str(item.metadata["flags"][-1])


def parse(item: "Field[Any]", texts: Sequence[str], where: str) -> Any:
    """Parse the text of an option, or the texts of a repeatable one. ConfigError names `where`."""
    kind, many = item.metadata["kind"], item.metadata["many"]
    try:
        if kind is bool:
            return {"yes": True, "true": True, "on": True, "1": True,
                    "no": False, "false": False, "off": False, "0": False}[texts[-1].lower()]
        values = tuple(kind(text) for text in texts)
    except KeyError:
        raise ConfigError("%s: %r is neither yes nor no" % (where, texts[-1])) from None
    except ValueError as exc:
        raise ConfigError("%s: %s" % (where, exc)) from None
    return values if many else values[-1]


def from_environment(environ: Mapping[str, str]) -> Dict[str, Any]:
    """Parse SOCKS5_USERS=NAME:PASSWORD,... and SOCKS5_UPSTREAM=[NAME=]URL,...: unlike --user and --upstream, `ps` does
    not show them to other users."""
    values = {}
    for name, variable in (("user", "SOCKS5_USERS"), ("upstream", "SOCKS5_UPSTREAM")):
        texts = [text for text in environ.get(variable, "").split(",") if text]
        if texts:
            item = next(item for item in fields(Config) if item.name == name)
            values[name] = parse(item, texts, variable)
    return values
