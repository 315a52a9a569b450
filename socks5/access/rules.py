"""Authorize: may this client, as this user, reach that address and port?

Facts in, decisions out; opens no socket and resolves no name. Any thread may call it. The first rule that matches
decides; a destination that no rule matches is denied. Rules judge addresses when they are used: each address of a name
by itself, and an IPv4-mapped or other IPv4-embedded IPv6 address as the IPv4 address in it. RFC 1928 section 6 (X'02').
"""
from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import lru_cache, partial
from ipaddress import IPv4Address, IPv6Address, ip_network
from typing import Callable, Dict, Iterable, Iterator, List, NamedTuple, Optional, Sequence, Tuple, Union

from ..protocol.codes import Cmd
from ..config import Config, ConfigError
from ..values import DIRECT, Network, Rate, Upstream, network, rate
from .files import read_lines
from ..protocol.fields import Host
from ..protocol.memory import when_given_back

IP = Union[IPv4Address, IPv6Address]

COMMANDS = {"connect": Cmd.CONNECT, "bind": Cmd.BIND, "udp": Cmd.UDP_ASSOCIATE}
ALL_PORTS = (0, 65535)
VERDICTS = 4096             # cached: 1 MB
ASKERS = 512                # whose rules are cached: 8 bytes for each rule
GRAMMAR = "allow|deny [user NAME] [from CIDR] [to CIDR|name|.suffix|any] [port N|N-M] " \
          "[command connect|bind|udp] [via NAME|direct] [rate RATE]"
WORD = re.compile(r'"([^"]*)"|(\S+)')
QUOTED = re.compile(r"\s|^#|^$")                       # what a word has that stands in quotes
PORTS = re.compile(r"([0-9]{1,5})(?:-([0-9]{1,5}))?")
NAME = re.compile(rb"\.?[a-z0-9_-]{1,63}(\.[a-z0-9_-]{1,63})*")

# The rules without a file. A BIND for 0.0.0.0 reaches no host: it says that any host may connect to us.
DEFAULT = """
allow from 127.0.0.0/8
allow from ::1
allow to 0.0.0.0 command bind
allow to :: command bind
deny to 0.0.0.0/8
deny to 127.0.0.0/8
deny to 169.254.0.0/16
deny to 224.0.0.0/24
deny to ::
deny to ::1
deny to fe80::/10
deny to ff01::/16
deny to ff02::/16
allow to any
"""
# With an upstream, names are left to it: the denied addresses above are those that this machine itself must not reach.
NAMES_TO_UPSTREAM = "allow to ."
# Loopback, unspecified and link-local addresses (169.254.169.254 gives out a cloud machine's credentials), and at the
# end of each family the multicast addresses of the same scope: RFC 5771 §4, RFC 4291 §2.7.
LOCAL: Tuple[Network, ...] = tuple(map(ip_network, (
    "0.0.0.0/8", "127.0.0.0/8", "169.254.0.0/16", "224.0.0.0/24",
    "::/128", "::1/128", "fe80::/10", "ff01::/16", "ff02::/16")))
# A connection to 0.0.0.0 or :: reaches our loopback: a rule for either denies it, only a rule for loopback allows it.
LOOPBACK: Dict[int, IP] = {4: IPv4Address("127.0.0.1"), 6: IPv6Address("::1")}

# IPv4-embedded IPv6 addresses: their prefix, and the offset of the IPv4 address in bytes.
IPV4_EMBEDDED = (
    (bytes(10) + b"\xff\xff", 12),                      # IPv4-mapped, RFC 4291 §2.5.5.2
    (b"\x20\x02", 2),                                   # 6to4, RFC 3056 §2
    (b"\x00\x64\xff\x9b" + bytes(8), 12),               # NAT64, RFC 6052 §2.1
    (b"\x00\x64\xff\x9b\x00\x01", 12),                  # a network's own NAT64, RFC 8215, at its usual length of 96
    (bytes(8) + b"\xff\xff\x00\x00", 12),               # IPv4-translated, RFC 2765 §2.1
    (bytes(12), 12),                                    # IPv4-compatible, RFC 4291 §2.5.5.1; not :: and ::1
)


class Asker(NamedTuple):
    """The client that asks, its user if it has logged in, and the command."""

    client: IP
    user: Optional[bytes]
    cmd: Cmd


class Verdict(NamedTuple):
    allowed: bool
    where: str                          # file:line, or what else decided
    upstream: Optional[Upstream] = None     # through which it is allowed; None: we connect ourselves
    rate: Union[Rate, Tuple[()]] = ()   # that each session may have; (): any


@dataclass(frozen=True)
class Rule:
    """One line. A part that is None or left out matches everything."""

    allow: bool
    where: str
    line: str
    user: Optional[bytes] = None
    source: Optional[Network] = None
    network: Optional[Network] = None
    name: Optional[bytes] = None            # in lower case; .suffix matches itself and all that end with it, "." all
    anywhere: bool = False                  # the line has "to any"
    ports: Tuple[int, int] = ALL_PORTS
    cmd: Optional[Cmd] = None
    via: Optional[str] = None               # an upstream's name, or "direct"; None: the default
    rate: Union[Rate, Tuple[()]] = ()       # of each session

    def concerns(self, asker: Asker) -> bool:
        return ((self.cmd is None or self.cmd == asker.cmd) and (self.user is None or self.user == asker.user)
                and (self.source is None or asker.client in self.source))

    def covers(self, address: IP, real: IP, port: int, name: Optional[bytes]) -> bool:
        """Whether the rule is about this destination. `real` is what a connection to the address reaches. An allow
        matches by `real` only, a deny by either address."""
        if not self.ports[0] <= port <= self.ports[1]:
            return False
        if self.name is not None:
            return name is not None and is_name(self.name, name)
        if self.network is not None:
            return real in self.network or real is not address and not self.allow and address in self.network
        return True

    def may_expose(self) -> bool:
        """Whether it also decides on a local address for a client that is not on this machine. An allow has to say so
        by an address or "any": the owner of a name can make it resolve to 127.0.0.1."""
        return not self.allow or self.network is not None or self.anywhere

    def may_cover(self, port: Optional[int], name: Optional[bytes]) -> bool:
        """covers() while the address, and perhaps port and name, are unknown (None): true for an allow that may match,
        and for a deny that matches in any case."""
        if self.ports != ALL_PORTS and (port is None or not self.ports[0] <= port <= self.ports[1]):
            return port is None and self.allow
        if self.name is not None:
            return is_name(self.name, name) if name is not None else self.allow
        return self.network is None or self.allow

    def opens_to_all(self) -> bool:
        return self.allow and self.user is None and (self.source is None or self.source.prefixlen == 0)

    def closes_to_all(self) -> bool:
        return self == Rule(False, self.where, self.line, anywhere=self.anywhere)


class Known(Dict[object, List[IP]]):
    """What these rules have allowed, by client, user and destination: any key will do. Bounded: a full one begins anew,
    so that putting takes the same time whatever is asked for."""

    def put(self, key: object, addresses: List[IP]) -> None:
        if len(self) >= VERDICTS:
            self.clear()
        self[key] = addresses


@dataclass(frozen=True)
class Rules:
    """The rules in force. Never changes: a reload makes new Rules. Raises ConfigError with file:line."""

    config: Config
    path: str = field(init=False)
    rules: Tuple[Rule, ...] = field(init=False)
    named: bool = field(init=False)                                 # whether any rule is about a name
    known: Known = field(init=False, compare=False)
    pairs: Dict[int, Tuple[Rule, Verdict]] = field(init=False, compare=False)       # by id(): one for each rule

    def __post_init__(self) -> None:
        path = self.config.rules
        lines = read_lines("--rules", path) if path else default_lines(self.config)
        if path and lines[-1].strip():                          # "allow from ..." cut off may be "allow"
            raise ConfigError("%s:%d: this line has no newline at its end: is the file half written?" % (
                path, len(lines)))
        object.__setattr__(self, "path", path or "default rules")
        object.__setattr__(self, "rules", tuple(parse_lines(lines, self.path)))
        for rule in self.rules:
            if rule.via not in (None, DIRECT, *(upstream.name for upstream in self.config.upstream)):
                raise ConfigError("%s: no --upstream is called %s" % (rule.where, ascii(rule.via)))
        object.__setattr__(self, "named", any(rule.name for rule in self.rules))
        self.begin()
        opener = self.opener()
        if path and opener and not self.config.open:
            raise ConfigError("%s: lets in every client that reaches %s; add 'from CIDR' or 'user NAME' to this rule, "
                              "or use --open, if every client may" % (opener.where, self.config.beyond()[0]))

    def __getstate__(self) -> Dict[str, object]:
        """For another process: without what is remembered."""
        return {name: value for name, value in vars(self).items() if name not in self.remembered()}

    def __setstate__(self, state: Dict[str, object]) -> None:
        vars(self).update(state)
        self.begin()

    def begin(self) -> None:
        """Start with empty caches, which are emptied again when memory is given back."""
        vars(self).update(self.remembered())
        when_given_back(self.forget)

    def forget(self) -> None:
        """Empty the caches."""
        self.known.clear()
        for name in "judge", "concerning", "foreseeing":
            vars(self)[name].cache_clear()

    def remembered(self) -> Dict[str, object]:
        """What takes the place of these attributes, and is bounded."""
        kind = type(self)
        return {"pairs": {}, "known": Known(), "judge": lru_cache(VERDICTS)(partial(kind.judge, self)),
                "concerning": lru_cache(ASKERS)(partial(kind.concerning, self)),
                "foreseeing": lru_cache(ASKERS)(partial(kind.foreseeing, self))}

    def __len__(self) -> int:
        return len(self.rules)

    def __bool__(self) -> bool:
        return True

    def opener(self) -> Optional[Rule]:
        """The rule that makes this an open proxy: it allows any client without a password. None where there is none."""
        config = self.config
        if not config.beyond() or config.authenticates() or config.clients_limited():
            return None
        for rule in self.rules:
            if rule.opens_to_all():
                return rule
            if rule.closes_to_all():
                break
        return None

    def admits(self, client: IP) -> bool:
        """Whether --allow-from lets a client at this address connect."""
        allowed = self.config.allow_from
        return not allowed or any(client in network for network in allowed)

    def judge(self, asker: Asker, address: IP, port: int, name: Optional[bytes] = None) -> Verdict:
        """Whether `asker` may reach this address. `name` is the request's name in ASCII, None where it had an address.
        Verdicts are cached."""
        any_peer, real = False, inside(address)
        if int(address) == 0:
            any_peer = asker.cmd == Cmd.BIND            # any host may connect to us
            real = address if any_peer else LOOPBACK[address.version]
        for rule, verdict in self.concerning(asker):
            if rule.covers(address, real, port, name) and (
                    any_peer or rule.may_expose() or asker.client.is_loopback or not is_local(address)):
                return verdict
        return Verdict(False, "%s: no rule allows it" % self.path)

    def concerning(self, asker: Asker) -> List[Tuple[Rule, Verdict]]:
        """The rules that concern this asker, in order, and the verdict of each. Cached."""
        return [self.pairs.get(id(rule)) or self.pairs.setdefault(id(rule), (rule, self.verdict(rule)))
                for rule in self.rules if rule.concerns(asker)]

    def verdict(self, rule: Rule) -> Verdict:
        return Verdict(rule.allow, rule.where, self.config.upstream_of(rule.via) if rule.allow else None, rule.rate)

    def rated(self) -> bool:
        return any(rule.rate for rule in self.rules)

    def judge_name(self, asker: Asker, port: int, name: bytes) -> Optional[Verdict]:
        """Judge a name that an upstream resolves. None: we have to, for a rule "to CIDR" or to connect ourselves."""
        for rule, verdict in self.concerning(asker):
            if not (rule.ports[0] <= port <= rule.ports[1] and (rule.name is None or is_name(rule.name, name))):
                continue
            return None if rule.network is not None or verdict.allowed and not verdict.upstream else verdict
        return Verdict(False, "%s: no rule allows it" % self.path)

    def first_way(self, asker: Asker, addresses: Sequence[IP], port: int,
                  name: Optional[bytes]) -> Tuple[Optional[Upstream], List[IP]]:
        """Where the first of the allowed `addresses` leads, and all of them that lead there."""
        if not self.config.upstream:
            return None, list(addresses)
        ways = [self.judge(asker, address, port, name).upstream for address in addresses]
        return ways[0], [address for address, way in zip(addresses, ways) if way == ways[0]]

    def way_of(self, asker: Asker, address: Optional[IP], port: int, host: Host) -> Optional[Upstream]:
        """Through which upstream something allowed goes. Without an address: is the name `host` left to an upstream?"""
        name = host if isinstance(host, bytes) else None
        verdict = self.judge(asker, address, port, name) if address else self.judge_name(asker, port, name or b"")
        return verdict.upstream if verdict else None

    def upstreams(self, asker: Asker) -> List[Optional[Upstream]]:
        """Where the rules may lead this asker, each once; None stands for connections of our own."""
        return list(dict.fromkeys(verdict.upstream for _rule, verdict in self.concerning(asker) if verdict.allowed))

    def foresee(self, asker: Asker, port: Optional[int] = None, name: Optional[bytes] = None) -> Verdict:
        """Judge before a name is resolved: denied is final, allowed means that judge() has to decide."""
        for rule, verdict in self.foreseeing(asker):
            if rule.may_cover(port, name):
                return verdict
        return Verdict(False, "%s: no rule allows it" % self.path)

    def foreseeing(self, asker: Asker) -> List[Tuple[Rule, Verdict]]:
        """Those of concerning() that decide on something whose address is not known: no "deny to CIDR". Cached."""
        return [(rule, verdict) for rule, verdict in self.concerning(asker) if rule.allow or rule.network is None]


def inside(address: IP) -> IP:
    """The IPv4 address in an IPv4-embedded IPv6 address, else the address itself."""
    if isinstance(address, IPv4Address) or int(address) <= 1:
        return address
    raw = address.packed
    return next((IPv4Address(raw[at:at + 4]) for prefix, at in IPV4_EMBEDDED if raw.startswith(prefix)), address)


def is_local(address: IP) -> bool:
    return any(one in network for one in (inside(address), address) for network in LOCAL)


def is_name(pattern: bytes, name: bytes) -> bool:
    """Whether a rule's name or .suffix matches this name. Upper and lower case are the same: RFC 4343."""
    name = name.lower().rstrip(b".")
    return name == pattern.lstrip(b".") or pattern.startswith(b".") and name.endswith(pattern) or pattern == b"."


def default_lines(config: Config) -> List[str]:
    """The rules without a file."""
    lines = DEFAULT.strip().split("\n")
    if config.upstream_of(None):
        lines.insert(next(at for at, line in enumerate(lines) if line.startswith("deny")), NAMES_TO_UPSTREAM)
    return lines


# ---- reading ------------------------------------------------------------------------------------------------------

def parse_lines(lines: Iterable[str], path: str) -> Iterator[Rule]:
    for number, line in enumerate(lines, 1):
        where = "%s:%d" % (path, number)
        words = split_words(line)
        if words:
            try:
                yield parse_rule(words, where)
            except ValueError as exc:
                raise ConfigError("%s: %s" % (where, exc)) from None


def split_words(line: str) -> List[str]:
    """The words of a line, separated by spaces or in "quotes"; from a # on it is a comment."""
    words = []
    for found in WORD.finditer(line):
        if found.group().startswith("#"):
            break
        words.append(found.group(2) if found.group(1) is None else found.group(1))
    return words


def parse_rule(words: List[str], where: str) -> Rule:
    """Raises ValueError with what is wrong."""
    verb, keys, values = words[0], words[1::2], words[2::2]
    if verb not in ("allow", "deny"):
        raise ValueError("a rule starts with allow or deny, not %s" % ascii(verb))
    facts: Dict[str, object] = {}
    for at, key in enumerate(keys):
        if key not in PARTS:
            raise ValueError("%s is not a part of a rule: %s" % (ascii(key), GRAMMAR))
        if at >= len(values):
            raise ValueError("nothing follows %r" % key)
        if key in keys[:at]:
            raise ValueError("%r stands here twice" % key)
        facts.update(PARTS[key](values[at]))
    for key in ("via", "rate"):
        if verb == "deny" and key in keys:
            raise ValueError("%r belongs to an allow" % key)
    line = " ".join('"%s"' % word if QUOTED.search(word) else word for word in words)
    rule = Rule(verb == "allow", where, line, **facts)                  # type: ignore[arg-type]
    net = rule.network
    if rule.allow and net and net.prefixlen and inside(net.network_address) != net.network_address:
        raise ValueError("%s stands for IPv4 addresses, which are judged as such: allow these instead" % net)
    return rule


def part_to(text: str) -> Dict[str, object]:
    if text == "any":
        return {"anywhere": True}
    if text == ".":
        return {"name": b"."}
    last = text.rstrip(".").rpartition(".")[2]
    if "/" in text or ":" in text or last.isdigit():                # no name's last label is a number: RFC 1123 §2.1
        return {"network": network(text)}
    try:
        name = text.lower().rstrip(".").encode("ascii" if text.isascii() else "idna")
    except UnicodeError:
        name = b""
    if not NAME.fullmatch(name):
        raise ValueError("%s is neither an address nor a name" % ascii(text))
    return {"name": name}


def part_port(text: str) -> Dict[str, object]:
    found = PORTS.fullmatch(text)
    low, high = (int(found.group(1)), int(found.group(2) or found.group(1))) if found else (1, 0)
    if not low <= high <= 65535:
        raise ValueError("%s is not a port or a range of them" % ascii(text))
    return {"ports": (low, high)}


def part_command(text: str) -> Dict[str, object]:
    if text not in COMMANDS:
        raise ValueError("%s is not connect, bind or udp" % ascii(text))
    return {"cmd": COMMANDS[text]}


PARTS: Dict[str, Callable[[str], Dict[str, object]]] = {
    "user": lambda text: {"user": text.encode("utf-8", "surrogateescape")},
    "from": lambda text: {"source": None if text == "any" else network(text)},
    "to": part_to, "port": part_port, "command": part_command, "via": lambda text: {"via": text},
    "rate": lambda text: {"rate": rate(text)}}
