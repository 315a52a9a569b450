"""Every option of the server: name, unit, default, the reason for the default, help text.

The fields of Config define the command line (cli.py), the INI file and the option table of README.rst; a test compares
the three. Values are parsed from text and checked before anything listens. Times are in seconds, sizes in bytes.
"""
from __future__ import annotations

from dataclasses import Field, dataclass, field, fields, replace
from ipaddress import ip_address
from typing import Any, Callable, Dict, List, Mapping, Optional, Sequence, Tuple, Union

from . import values
from .values import DEFAULT_UPSTREAM, DIRECT, SAME, Network, Rate, Upstream

RELOADED = ("max_per_user", "rate_per_client", "rate_per_user")     # SIGHUP reads them again in --config
GROUPS = ("listening", "access", "outgoing", "limits", "running", "watching")


class ConfigError(ValueError):
    """An invalid option or file. The message is one line: the option or file:line, and the reason."""


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
        ("127.0.0.1",), "-l --listen", values.address, "listening", metavar="ADDRESS", many=True,
        help="address to listen on, repeatable; '::' serves IPv4 and IPv6, but beside an IPv4 address only IPv6",
        why="only this machine can reach loopback, so the server is safe without options")
    port: int = option(
        1080, "-p --port", values.port, "listening", metavar="PORT",
        help="port to listen on; 0: any free port",
        why="the port that IANA assigned to SOCKS, RFC 1928 §3")
    proxy_protocol: Tuple[Network, ...] = option(
        (), "--proxy-protocol", values.network, "listening", metavar="CIDR", many=True,
        help="load balancers of this network send the client's address in a PROXY header (v1, v2), repeatable")
    user: Tuple[Tuple[str, str], ...] = option(
        (), "-u --user", values.credentials, "access", metavar="NAME:PASSWORD", many=True, secret=True,
        help="require this user name and password, repeatable; or set SOCKS5_USERS=NAME:PASSWORD,...")
    users: str = option(
        "", "--users", values.path, "access", metavar="FILE",
        help="require a user listed in FILE; SIGHUP reads it again")
    allow_from: Tuple[Network, ...] = option(
        (), "--allow-from", values.network, "access", metavar="CIDR", many=True,
        help="serve only clients of this network, repeatable")
    gssapi: str = option(
        "", "--gssapi", values.service, "access", metavar="SERVICE[@HOST]", bare=values.ANY_SERVICE,
        help="authenticate by GSSAPI (Kerberos), with the keys in the keytab: all of them, or those of SERVICE")
    keytab: str = option(
        "", "--keytab", values.path, "access", metavar="FILE",
        help="keys for --gssapi, instead of the system's keytab; SIGHUP checks it again")
    gssapi_protection: str = option(
        "clear", "--gssapi-protection", values.protection, "access", metavar="LEVEL",
        help="the least protection of a GSSAPI client's bytes: clear, integrity or confidentiality",
        why="curl asks for clear; a client that asks for more gets it")
    rules: str = option(
        "", "--rules", values.path, "access", metavar="FILE",
        help="authorize by the rules in FILE; SIGHUP reads it again")
    open: bool = option(
        False, "--open", bool, "access", help="permit an open proxy: any client, without a password")
    out: Tuple[str, ...] = option(
        (), "--out", values.out_address, "outgoing", metavar="ADDRESS|same", many=True,
        help="address of this machine to connect from, one each for IPv4 and IPv6; same: the local "
             "address of the client's connection")
    upstream: Tuple[Upstream, ...] = option(
        (), "--upstream", values.upstream, "outgoing", metavar="[NAME=]URL", many=True, secret=True,
        help="connect through the SOCKS5 proxy at socks5://[USER:PASSWORD@]HOST:PORT, or by GSSAPI at "
             "socks5+gssapi://[SERVICE@]HOST:PORT; with NAME=, only where --rules say via NAME; or set "
             "SOCKS5_UPSTREAM=[NAME=]URL,...")
    advertise: Tuple[str, ...] = option(
        (), "--advertise", values.own_address, "outgoing", metavar="ADDRESS", many=True,
        help="address in replies to BIND and UDP ASSOCIATE, for a server behind NAT; one each for IPv4 and IPv6")
    bind_ports: Tuple[int, ...] = option(
        (), "--bind-ports", values.port_range, "outgoing", metavar="A-B",
        help="ports for BIND to listen on, instead of any")
    udp_ports: Tuple[int, ...] = option(
        (), "--udp-ports", values.port_range, "outgoing", metavar="A-B",
        help="ports for UDP ASSOCIATE, two or three per association")
    workers: int = option(
        0, "-w --workers", values.workers, "running", metavar="N|auto",
        help="server processes; 0 or auto: one for each CPU, at most 4; always 1 without fork()",
        why="the GIL runs one thread of a process at a time; 64 busy tunnels on 2 CPUs need two processes")
    run_as: str = option(
        "", "--run-as", values.user_group, "running", metavar="USER[:GROUP]",
        help="after listening, run as USER, for good; SIGHUP then reads the files as USER")
    max_sessions: int = option(
        0, "--max-sessions", values.count, "limits", metavar="N",
        help="session limit; 0: by the descriptor limit",
        why="a tunnel takes two descriptors")
    max_per_client: int = option(
        0, "--max-per-client", values.count, "limits", metavar="N",
        help="session limit for each client address (IPv6: each /64); 0: no limit",
        why="a browser opens a hundred connections, and an office may share one address")
    max_per_user: int = option(
        0, "--max-per-user", values.count, "limits", metavar="N",
        help="session limit for each user name; 0: no limit; SIGHUP reads it again in --config",
        why="a user's programs open as many connections as they like")
    rate_per_client: Union[Rate, Tuple[()]] = option(
        (), "--rate-per-client", values.rate, "limits", metavar="RATE",
        help="bytes a second of each client address (IPv6: each /64), as in 2M or UP/DOWN; SIGHUP reads it again in "
             "--config")
    rate_per_user: Union[Rate, Tuple[()]] = option(
        (), "--rate-per-user", values.rate, "limits", metavar="RATE",
        help="the same of each user name")
    max_negotiating: int = option(
        1000, "--max-negotiating", values.count, "limits", metavar="N",
        help="negotiation limit; a further client evicts the longest silent one of the busiest address",
        why="one thread each for up to 10 s: a hundred new clients a second")
    handshake_timeout: float = option(
        10.0, "--handshake-timeout", values.seconds, "limits", metavar="S",
        help="time up to the request; 0: no limit",
        why="RFC 1928 §6 gives 10 s to close after a failure; a negotiation over a modem takes 1 s")
    connect_timeout: float = option(
        10.0, "--connect-timeout", values.seconds, "limits", metavar="S",
        help="time to resolve the name and connect; 0: no limit",
        why="shorter than the time-outs of clients, so that they receive the REP")
    bind_timeout: float = option(
        120.0, "--bind-timeout", values.seconds, "limits", metavar="S", help="time until a peer connects; 0: no limit",
        why="an FTP server connects at once, but a person may first have to accept a file")
    idle_timeout: float = option(
        3600.0, "--idle-timeout", values.seconds, "limits", metavar="S", help="idle time of a tunnel; 0: no limit",
        why="longer than the pauses of ssh and IMAP clients")
    half_closed_timeout: float = option(
        300.0, "--half-closed-timeout", values.seconds, "limits", metavar="S",
        help="idle time of a half-closed tunnel; 0: no limit",
        why="a server may take that long to answer a client that has sent everything and closed its direction")
    udp_idle_timeout: float = option(
        300.0, "--udp-idle-timeout", values.seconds, "limits", metavar="S",
        help="idle time of an association; 0: no limit",
        why="RFC 4787 §4.3 recommends 5 minutes for a mapping")
    drain_timeout: float = option(
        5.0, "--drain-timeout", values.seconds, "limits", metavar="S",
        help="time for sessions to end after SIGTERM or SIGINT",
        why="less than the 10 s that `docker stop` allows")
    log_format: str = option(
        "text", "--log-format", values.log_format, "watching", metavar="text|json",
        help="text, or a JSON object for each line")
    status: Tuple[Any, ...] = option(
        (), "--status", values.endpoint, "watching", metavar="ADDRESS:PORT",
        help="serve a status page, /metrics, /sessions and /healthz over HTTP")
    trace: str = option(
        "", "--trace", values.path, "watching", metavar="FILE", bare="-",
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
                "--listen %s: every client that reaches it could use this proxy; require a password, as in: python3 "
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


def reloaded(before: Config, now: Config) -> Tuple[Config, List[str]]:
    """The Config in force after a reload, and the options that have changed as well, but take a restart."""
    changed = [item.name for item in fields(Config) if getattr(before, item.name) != getattr(now, item.name)]
    return (replace(before, **{name: getattr(now, name) for name in RELOADED}),
            [long_flag(item) for item in options() if item.name in changed and item.name not in RELOADED])


def options() -> Sequence["Field[Any]"]:
    """The fields of Config."""
    return fields(Config)


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
