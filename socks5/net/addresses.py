"""IP addresses and endpoints, as sockets have them: never a name.

An IPv4-mapped IPv6 address (::ffff:192.0.2.1) is always shown and judged as the IPv4 address.
"""
from __future__ import annotations

import socket
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address
from typing import NamedTuple, Optional, Sequence, Tuple, Union

from ..values import SAME

from ..protocol.fields import IPv4, IPv6, bracketed, new_tuple
from ..protocol.memory import remembered

IP = Union[IPv4Address, IPv6Address]
Sockaddr = Tuple[Union[str, int], ...]


class Endpoint(NamedTuple):
    """An IP address and a port: one end of a connection."""

    ip: IP
    port: int

    def text(self) -> str:
        """192.0.2.1:80 or [2001:db8::1]:80"""
        ip = self.ip
        if type(ip) is IPv4:                            # nearly always, and the others take longer
            return f"{ip.text}:{self.port}"
        return f"{bracketed(ip)}:{self.port}"

    def __str__(self) -> str:
        return self.text()


def unmapped(address: IP) -> IP:
    """The IPv4 address inside an IPv4-mapped one, else the address itself.             RFC 4291 §2.5.5.2"""
    mapped = isinstance(address, IPv6Address) and address.ipv4_mapped
    return IPv4(int(mapped)) if mapped else address


def endpoint_of(sockaddr: Sockaddr) -> Endpoint:
    """What getsockname, getpeername, accept and recvfrom return, as an Endpoint."""
    return new_tuple(Endpoint, (ip_in(sockaddr[0]), sockaddr[1]))


def ip_of(sockaddr: Sockaddr) -> IP:
    """The same without the port."""
    return ip_in(sockaddr[0])


@remembered(4096)
def ip_in(text: Union[str, int]) -> IP:
    """Remembered, because the same few come with every connection, and reading one takes longer than finding it."""
    bare = str(text).partition("%")[0]
    return unmapped(IPv6(bare) if ":" in bare else IPv4(bare))


def advertised(addresses: Sequence[str], here: IP) -> IP:
    """What a peer is to connect to: of the configured `addresses` the one of `here`'s family, else `here` itself."""
    return next((address for address in map(ip_address, addresses) if address.version == here.version), here)


def leaving(out: Sequence[str], here: IP, remote: Union[IP, int]) -> Optional[IP]:
    """Our address for a connection to `remote`, by --out; None: the system chooses.

    `remote` may be 4 or 6, for any host of that IP version. "same" in `out` is `here`, the address that the client
    connected to. A loopback address reaches loopback only, and a connection to loopback does not leave this machine:
    neither is mixed with other addresses. A link-local address is of no use without its scope.
    """
    if isinstance(remote, int):
        version, inside = remote, False
    elif remote.is_unspecified:                         # from an address of ours it would lead there, not to loopback
        return None
    else:
        version, inside = remote.version, remote.is_loopback
    for text in out:
        address = here if text == SAME else ip_in(text)
        if address.version == version and address.is_loopback == inside and not address.is_link_local:
            return address
    return None


def subscriber(address: IP) -> str:
    """What shares one limit with this address: itself, or of an IPv6 address its /64, all of which one host can use."""
    return str(address if isinstance(address, IPv4Address) else IPv6Network((address, 64), strict=False))


def origin_of(sockaddr: Sockaddr) -> str:
    """The same of what accept() returns."""
    return _origin_in(sockaddr[0])


@remembered(4096)
def _origin_in(text: Union[str, int]) -> str:
    """Remembered by the text, whose hash Python keeps; to hash an address takes longer than all the rest."""
    return subscriber(ip_in(text))


def family_of(address: IP) -> int:
    return socket.AF_INET if isinstance(address, IPv4Address) else socket.AF_INET6


def is_here(address: IP) -> bool:
    """Is it an address of this machine? Only such can be bound."""
    try:
        with socket.socket(family_of(address), socket.SOCK_DGRAM) as probe:
            probe.bind((str(address), 0))
        return True
    except OSError:
        return False
