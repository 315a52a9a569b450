"""The fields of a message. A Layout lists them in the RFC's order, both for parsing and for the trace.

`read(n)` returns exactly n bytes or raises EOFError. No parser reads beyond its message. RFC 1928 section 5.
"""
from __future__ import annotations

from contextlib import suppress
from ipaddress import IPv4Address, IPv6Address
from typing import Callable, Dict, Iterator, NamedTuple, Optional, Tuple, Union

from .codes import Atyp, Rep
from .errors import ProtocolError, RequestRefused
from .memory import remembered

ReadExactly = Callable[[int], bytes]
Raw = Dict[str, bytes]
Host = Union[IPv4Address, IPv6Address, bytes]     # bytes: a domain name as received
ADDRESS_BYTES = {0x01: 4, 0x04: 16}               # by ATYP, RFC 1928 §5
DOMAINNAME = int(Atyp.DOMAINNAME)


class IPv4(IPv4Address):
    """An IPv4Address that knows its hash, its text and its bytes, which the base works out anew whenever they are asked
    for, and slowly."""

    __slots__ = ("hash", "text", "packed")

    def __init__(self, address: object) -> None:
        super().__init__(address)
        self.hash = super().__hash__()
        self.packed = super().packed                # type: ignore[misc]    # a property of the base
        self.text = "%d.%d.%d.%d" % tuple(self.packed)

    def __hash__(self) -> int:
        return self.hash

    def __str__(self) -> str:
        return self.text

    @property
    def is_loopback(self) -> bool:
        return self.packed[0] == 127                # RFC 1122 §3.2.1.3


class IPv6(IPv6Address):
    """The same for IPv6."""

    __slots__ = ("hash", "text", "packed")

    def __init__(self, address: object) -> None:
        super().__init__(address)
        self.hash = super().__hash__()
        self.text = super().__str__()
        self.packed = super().packed                # type: ignore[misc]

    def __hash__(self) -> int:
        return self.hash

    def __str__(self) -> str:
        return self.text


def bracketed(ip: Union[IPv4Address, IPv6Address]) -> str:
    """An address as it stands in front of a port: IPv6 in brackets."""
    return f"[{ip}]" if ip.version == 6 else str(ip)


class BytesReader:
    """A `read` function for bytes that are already in memory, such as a datagram."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.at = 0

    def read(self, size: int) -> bytes:
        end = self.at + size
        if end > len(self.data):
            raise EOFError("message cut short after %d bytes" % len(self.data))
        piece, self.at = self.data[self.at:end], end
        return piece

    __call__ = read                 # calling read itself takes half the time

    def rest(self) -> bytes:
        return self.data[self.at:]


class Field(NamedTuple):
    """One field of a message.

    name    the RFC's name, unique in its message
    size    in bytes; or the name of the earlier field that holds it; or None: ATYP decides, RFC 1928 §5
    means   describes the bytes in words; not called for an address, which depends on ATYP
    must    the only valid value (VER); any other raises ProtocolError
    secret  never shown
    """

    name: str
    size: Union[int, str, None]
    means: Callable[[bytes], str]
    must: Optional[int] = None
    secret: bool = False

    def words(self, raw: Raw) -> str:
        """Describe the value of this field in words."""
        if self.size is None:
            host = host_of(raw["ATYP"][0], raw[self.name])
            return text(host) if isinstance(host, bytes) else str(host)
        return self.means(raw[self.name])


Layout = Tuple[Field, ...]


def take_address(read: ReadExactly, atyp: int) -> bytes:
    """Read the raw address for `atyp`; a name includes its length byte. Raises RequestRefused X'08' for an unknown ATYP
    before any read, because the size of the address is unknown, too."""
    if atyp == DOMAINNAME:
        length = read(1)
        return length + read(length[0])
    if atyp not in ADDRESS_BYTES:
        raise RequestRefused(Rep.ADDRESS_TYPE_NOT_SUPPORTED, "ATYP 0x%02x" % atyp)
    return read(ADDRESS_BYTES[atyp])


def host_of(atyp: int, packed: bytes) -> Host:
    """The host in the bytes from take_address."""
    return packed[1:] if atyp == DOMAINNAME else _ip_of(packed)


@remembered(4096)
def _ip_of(packed: bytes) -> Union[IPv4, IPv6]:
    """Cached: a lookup is faster than a new object."""
    return IPv4(packed) if len(packed) == 4 else IPv6(packed)


def split(layout: Layout, read: ReadExactly, raw: Optional[Raw] = None, strict: bool = True) -> Raw:
    """Read one message. Returns the raw bytes of each field by its name, in `raw` if it is given, as far as it gets.
    Unless `strict`, a value that `must` forbids is taken."""
    raw = {} if raw is None else raw
    for field in layout:            # to unpack one takes longer
        size, must = field.size, field.must
        if isinstance(size, int):
            data = read(size)
        elif size is None:
            data = take_address(read, raw["ATYP"][0])
        else:
            data = read(int.from_bytes(raw[size], "big"))
        raw[field.name] = data
        if must is not None and data[0] != must and strict:
            raise ProtocolError("%s 0x%02x, expected 0x%02x" % (field.name, data[0], must))
    return raw


def dissect(layout: Layout, message: bytes) -> Iterator[Tuple[Field, bytes, str]]:
    """Yield each field of a message, its bytes and their meaning. Stops where the message is cut short. A wrong VER is
    shown, too."""
    raw: Raw = {}
    with suppress(EOFError, RequestRefused):
        split(layout, BytesReader(message), raw, strict=False)
    for field in layout[:len(raw)]:
        yield field, raw[field.name], field.words(raw)


def text(name: bytes) -> str:
    """Quote bytes that a peer chose as one line of printable ASCII."""
    return ascii(name.decode("utf-8", "backslashreplace"))
