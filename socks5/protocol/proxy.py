"""The PROXY protocol: a load balancer says, in front of the client's first byte, from which address the client came.

Version 1 is a line of text, version 2 is binary. Not part of SOCKS; HAProxy's proxy-protocol.txt defines both. Bytes to
facts, like messages.py: `read(n)` returns exactly n bytes or raises EOFError, and no parser reads beyond the header.
Whether a source may send a header is not decided here.
"""
from __future__ import annotations

import re
import struct
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address
from typing import Optional, Tuple

from .errors import ProtocolError
from .fields import ReadExactly, text
from .messages import Address

SIGNATURE = b"\r\n\r\n\0\r\nQUIT\n"     # of version 2, §2.2; version 1 begins with "PROXY"
SHORTEST, LONGEST = 15, 107             # bytes of a line of version 1 with its CRLF, §2.1
HEAD = struct.Struct("!BBH")            # of version 2: VER and CMD, FAM, LEN
PORTS = struct.Struct("!HH")            # behind the addresses: source, destination
SKIP_BYTES = 4096                       # of what stands behind the addresses, read at a time
LOCAL, PROXY = 0x20, 0x21               # VER and CMD of version 2
TCP4, TCP6 = 0x11, 0x21                 # FAM of version 2
SIZES = {0x00: 0, TCP4: 12, TCP6: 36, 0x31: 216}    # bytes of the addresses by FAM: UNSPEC, TCP and UNIX; not UDP
NUMBER = r"(0|[1-9][0-9]{0,4})"
LINES = {                               # of version 1
    b"TCP4": re.compile(r"([0-9.]+) ([0-9.]+) %s %s" % (NUMBER, NUMBER)),
    b"TCP6": re.compile(r"([0-9A-Fa-f:.]+) ([0-9A-Fa-f:.]+) %s %s" % (NUMBER, NUMBER)),
}


@dataclass(frozen=True)
class ProxyHeader:
    """Load balancer: for whom it has connected.                                    proxy-protocol.txt §2

    version         1 or 2
    source          the client, as the load balancer sees it; None: the connection is the load balancer's own
                    (LOCAL, which a health check sends), or the client has no IP address (UNKNOWN, UNSPEC, UNIX)
    destination     where the client has connected to; None where `source` is

    Version 2, the octets in front of the addresses, which TLVs may follow within LEN:

        | SIGNATURE | VER and CMD | FAM | LEN |     octets: 12 1 1 2
    """

    version: int
    source: Optional[Address] = None
    destination: Optional[Address] = None

    @classmethod
    def parse(cls, read: ReadExactly) -> ProxyHeader:
        """Read a header of either version. Raises ProtocolError for anything else, and for an address that no client
        has."""
        first = read(1)                 # alone: a SOCKS greeting ends after three bytes, and is refused at once
        if first == SIGNATURE[:1]:
            header = cls(2, *_binary(first, read))
        elif first == b"P":
            header = cls(1, *_line(first, read))
        else:
            raise ProtocolError("no PROXY header: first byte 0x%02x" % first[0])
        host = header.source.host if header.source else None
        for ip in (host, getattr(host, "ipv4_mapped", None)):
            if isinstance(ip, (IPv4Address, IPv6Address)) and (ip.is_unspecified or ip.is_multicast):
                raise ProtocolError("PROXY header: %s is no client's address" % ip)
        return header

    def pack(self) -> bytes:
        """As version 2. Raises ValueError for a name, or for addresses of two families."""
        if not self.source or not self.destination:
            return SIGNATURE + HEAD.pack(LOCAL, 0, 0)
        source, destination = self.source.host, self.destination.host
        if isinstance(source, bytes) or isinstance(destination, bytes) or source.version != destination.version:
            raise ValueError("no two addresses of one family: %s, %s" % (self.source, self.destination))
        family = TCP4 if source.version == 4 else TCP6
        ports = PORTS.pack(self.source.port, self.destination.port)
        return SIGNATURE + HEAD.pack(PROXY, family, SIZES[family]) + source.packed + destination.packed + ports


Ends = Tuple[Optional[Address], Optional[Address]]
NO_ENDS: Ends = (None, None)


def begins(seen: bytes) -> bool:
    """Whether these first bytes of a connection, at least one, are those of a PROXY header."""
    return seen.startswith(b"PROXY ") or seen.startswith(SIGNATURE[:len(seen)])


def _line(first: bytes, read: ReadExactly) -> Ends:
    """Version 1: PROXY TCP4|TCP6 SOURCE DESTINATION PORT PORT, or PROXY UNKNOWN and anything.          §2.1"""
    line = first + read(SHORTEST - 1)
    if not line.startswith(b"PROXY "):
        raise ProtocolError("no PROXY header: %s" % text(line))
    while not line.endswith(b"\n"):
        if len(line) == LONGEST:
            raise ProtocolError("PROXY header: no line of up to %d bytes: %s" % (LONGEST, text(line)))
        line += read(1)
    family, _, rest = line[6:-2].partition(b" ")
    if line.endswith(b"\r\n") and family == b"UNKNOWN":
        return NO_ENDS
    found = family in LINES and line.endswith(b"\r\n") and LINES[family].fullmatch(rest.decode("latin-1"))
    if found:
        source, destination, *ports = found.groups()
        ip = IPv4Address if family == b"TCP4" else IPv6Address
        try:
            if max(map(int, ports)) <= 0xFFFF:
                return Address(ip(source), int(ports[0])), Address(ip(destination), int(ports[1]))
        except ValueError:
            pass
    raise ProtocolError("malformed PROXY header: %s" % text(line))


def _binary(first: bytes, read: ReadExactly) -> Ends:
    """Version 2. LEN may be larger than the addresses: TLVs follow, and are skipped.                   §2.2"""
    head = first + read(len(SIGNATURE) - 1 + HEAD.size)
    if not head.startswith(SIGNATURE):
        raise ProtocolError("no PROXY header: %s" % text(head))
    command, family, length = HEAD.unpack_from(head, len(SIGNATURE))
    size = SIZES.get(family, -1)
    if command == LOCAL:                                # whatever the family says: §2.2
        _skip(length, read)
        return NO_ENDS
    if command != PROXY or not 0 <= size <= length:
        raise ProtocolError("PROXY header: VER and CMD 0x%02x, FAM 0x%02x, LEN %d" % (command, family, length))
    if family not in (TCP4, TCP6):
        _skip(length, read)
        return NO_ENDS
    raw = read(size)
    _skip(length - size, read)
    ip, wide = (IPv4Address, 4) if family == TCP4 else (IPv6Address, 16)
    ports = PORTS.unpack_from(raw, 2 * wide)
    return Address(ip(raw[:wide]), ports[0]), Address(ip(raw[wide:2 * wide]), ports[1])


def _skip(size: int, read: ReadExactly) -> None:
    """At most 65,535 bytes, because LEN has two: never all of them in memory."""
    while size:
        piece = min(size, SKIP_BYTES)
        read(piece)
        size -= piece
