"""The values of options: parse them from text. Each parser raises ValueError with the reason."""
from __future__ import annotations

import re
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from typing import Callable, NamedTuple, Optional, Tuple, TypeVar, Union
from urllib.parse import unquote, unquote_to_bytes

N = TypeVar("N", int, float)
Network = Union[IPv4Network, IPv6Network]
MAX_S = 2000000             # 23 days: poll() counts milliseconds in 31 bits
ANY_SERVICE = "any"
SAME = "same"               # of --out
DIRECT = "direct"           # in a rule: not through an upstream
DEFAULT_UPSTREAM = "upstream"           # the name of an upstream without one: rules that name none lead there
UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
LEAST_RATE, MOST_RATE = 1 << 10, 1 << 40
NUMBER = r"([0-9]{1,15}(?:\.[0-9]{1,9})?)([KMGkmg]?)"
RATE = re.compile("%s(?::%s)?" % (NUMBER, NUMBER), re.ASCII)
UPSTREAM = re.compile(r"(?:([A-Za-z0-9_-]{1,64})=)?socks5h?(\+gssapi)?://(?:([^@/\s]*)@)?"
                      r"(?:\[([0-9A-Fa-f:.]+)\]|([A-Za-z0-9_.-]{1,253})):([0-9]{1,5})/?", re.ASCII)


def seconds(text: str) -> float:
    return _number(float, text, MAX_S, "a number of seconds from 0 to %d" % MAX_S)


def count(text: str) -> int:
    return _number(int, text, 1 << 31, "a whole number from 0 to %d" % (1 << 31))


class OneWay(NamedTuple):
    """A rate limit of one direction."""

    bytes_s: float
    burst_bytes: float = 0      # 0: the default


class Rate(NamedTuple):
    """A rate limit: of each direction (None: no limit), or of both together."""

    up: Optional[OneWay]
    down: Optional[OneWay]
    together: bool              # `up` and `down` are the same one


def rate(text: str) -> Union[Rate, Tuple[()]]:
    """Parse RATE for both directions together, or UP/DOWN, in bytes a second; each with :BURST in bytes, if need be.
    0 is no limit."""
    halves = [RATE.fullmatch(half) for half in text.split("/")]
    if len(halves) > 2 or not all(halves):
        raise ValueError("%s is not RATE[:BURST] or UP[:BURST]/DOWN[:BURST] in bytes a second, as in 512K, 2M:8M or "
                         "1M/20M" % ascii(text))
    flows = [OneWay(*(float(number or 0) * UNITS[unit.upper() if unit else ""]
                    for number, unit in ((half[1], half[2]), (half[3], half[4])))) for half in halves if half]
    for flow in flows:
        if flow.bytes_s and not LEAST_RATE <= flow.bytes_s <= MOST_RATE or flow.burst_bytes > MOST_RATE:
            raise ValueError("%s is out of range: a rate is 0 or from 1K to 1024G" % ascii(text))
    up, down = flows[0], flows[-1]
    if not up.bytes_s and not down.bytes_s:
        return ()
    return Rate(up if up.bytes_s else None, down if down.bytes_s else None, len(flows) == 1)


def workers(text: str) -> int:
    return 0 if text == "auto" else _number(int, text, 256, "a number of processes from 0 (auto) to 256")


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
    ip = _ip(host)
    if ip is None or percent and ip.version == 4:
        raise ValueError("%r is not an IP address, nor localhost%s" % (text, port_hint(text)))
    return text


def _ip(text: str) -> Union[IPv4Address, IPv6Address, None]:
    """The IP address without a scope; None if it is none."""
    try:
        return None if "%" in text else ip_address(text)
    except ValueError:
        return None


def port_hint(text: str) -> str:
    """Words for an ADDRESS:PORT where only an address is taken."""
    found = re.fullmatch(r"\[?([0-9A-Fa-f:.]+|localhost)\]?:([0-9]{1,5})", text, re.ASCII)
    return "; the port has an option of its own: -l %s -p %s" % found.groups() if found else ""


def own_address(text: str) -> str:
    """Parse an IP address to advertise in replies."""
    ip = _ip(text)
    if ip is None or ip.is_unspecified:
        raise ValueError("%r is not an IP address to which a peer can connect" % text)
    return text


def out_address(text: str) -> str:
    """Parse an IP address of ours to connect from, or "same"."""
    if text == SAME:
        return text
    ip = _ip(text)
    if ip is None or ip.is_unspecified or ip.is_loopback or ip.is_link_local or ip.is_multicast:
        raise ValueError("%r is neither 'same' nor an IP address from which other hosts can be reached" % text)
    return str(getattr(ip, "ipv4_mapped", None) or ip)


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
    """A SOCKS5 proxy through which we reach destinations. Its password is not shown.

    service     SERVICE@HOST for GSSAPI, in place of a password; "": not by GSSAPI
    """

    name: str
    host: str                                   # an IP address or a name
    port: int
    user: Optional[Tuple[bytes, bytes]] = None
    service: str = ""

    def __str__(self) -> str:
        name = "" if self.name == DEFAULT_UPSTREAM else self.name + " "
        return "upstream %s(%s)" % (name, ("[%s]:%d" if ":" in self.host else "%s:%d") % (self.host, self.port))

    def __repr__(self) -> str:
        return str(self)


def upstream(text: str) -> Upstream:
    """Parse [NAME=]socks5://[USER:PASSWORD@]HOST:PORT or [NAME=]socks5+gssapi://[SERVICE@]HOST:PORT. USER, PASSWORD and
    SERVICE may have bytes as %XX, as in any URL."""
    found = UPSTREAM.fullmatch(text)
    # The text may hold a password: it is not shown.
    problem = "not [NAME=]socks5://[USER:PASSWORD@]HOST:PORT or [NAME=]socks5+gssapi://[SERVICE@]HOST:PORT"
    if not found:
        raise ValueError(problem)
    name, gssapi, login, bracketed, host, number = found.groups()
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
    if gssapi:
        if ":" in unquote(login or ""):
            raise ValueError("GSSAPI takes a SERVICE before the @, and no password")
        by = service("rcmd" if login is None else unquote(login))
        by = by if "@" in by else "%s@%s" % (by, bracketed or host)
        return Upstream(name or DEFAULT_UPSTREAM, bracketed or host, at, None, by)
    if login is not None:
        pair = [unquote_to_bytes(part.encode("utf-8", "surrogateescape")) for part in login.split(":", 1)]
        if len(pair) < 2 or not all(1 <= len(part) <= 255 for part in pair):
            raise ValueError("%s, with 1 to 255 bytes each of USER and PASSWORD" % problem)
        user = pair[0], pair[1]
    return Upstream(name or DEFAULT_UPSTREAM, bracketed or host, at, user)
