"""What a message's LAYOUT is made of: fields, taken in the RFC's order, and shown by the same description.

`read(n)` gives exactly n bytes or raises EOFError; nobody here asks for a byte that is not part of the message.
RFC 1928 section 5 for addresses.
"""
from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from ipaddress import IPv4Address, IPv6Address
from typing import Callable, Dict, Iterator, Optional, Tuple, Union

from .codes import Atyp, Rep
from .errors import ProtocolError, RequestRefused

ReadExactly = Callable[[int], bytes]
Raw = Dict[str, bytes]
Host = Union[IPv4Address, IPv6Address, bytes]     # bytes: a domain name, just as it came
ADDRESS_BYTES = {0x01: 4, 0x04: 16}               # by ATYP, RFC 1928 §5
DOMAINNAME = int(Atyp.DOMAINNAME)


class BytesReader:
    """Gives a byte string piece by piece: the `read` for parsing what is already here, such as a datagram."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.at = 0

    def __call__(self, size: int) -> bytes:
        end = self.at + size
        if end > len(self.data):
            raise EOFError("message cut short after %d bytes" % len(self.data))
        piece, self.at = self.data[self.at:end], end
        return piece

    def rest(self) -> bytes:
        return self.data[self.at:]


@dataclass(frozen=True)
class Field:
    """One field of a message.

    name    the RFC's name, unique in its message
    size    in bytes; or the name of the earlier field that holds it; or None: ATYP decides, RFC 1928 §5
    means   the bytes in words, for people; not asked for an address, which ATYP explains
    must    the only value that may stand here (VER): anything else is not this protocol
    secret  never to be shown
    """

    name: str
    size: Union[int, str, None]
    means: Callable[[bytes], str]
    must: Optional[int] = None
    secret: bool = False

    def take(self, read: ReadExactly, earlier: Raw) -> bytes:
        size, must = self.size, self.must
        if size is None:
            return take_address(read, earlier["ATYP"][0])
        raw = read(earlier[size][0] if isinstance(size, str) else size)
        if must is not None and raw[0] != must:
            raise ProtocolError("%s 0x%02x, expected 0x%02x" % (self.name, raw[0], must))
        return raw

    def words(self, raw: Raw) -> str:
        """What this field of a message says, for people."""
        if self.size is None:
            host = host_of(raw["ATYP"][0], raw[self.name])
            return text(host) if isinstance(host, bytes) else str(host)
        return self.means(raw[self.name])


Layout = Tuple[Field, ...]


def take_address(read: ReadExactly, atyp: int) -> bytes:
    """The raw address for `atyp`; a name with its length byte. Raises RequestRefused X'08' before it reads anything
    when the ATYP is unknown: nobody can say how many bytes would follow."""
    if atyp == DOMAINNAME:
        length = read(1)
        return length + read(length[0])
    if atyp not in ADDRESS_BYTES:
        raise RequestRefused(Rep.ADDRESS_TYPE_NOT_SUPPORTED, "ATYP 0x%02x" % atyp)
    return read(ADDRESS_BYTES[atyp])


@lru_cache(maxsize=4096)
def host_of(atyp: int, packed: bytes) -> Host:
    """The host in what take_address gave. Remembered: that is faster than making it."""
    if atyp == DOMAINNAME:
        return packed[1:]
    return IPv4Address(packed) if len(packed) == 4 else IPv6Address(packed)


def split(layout: Layout, read: ReadExactly) -> Raw:
    """Read one message: the raw bytes of each field, in the RFC's order."""
    raw: Raw = {}
    for field in layout:
        raw[field.name] = field.take(read, raw)
    return raw


def dissect(layout: Layout, message: bytes) -> Iterator[Tuple[Field, bytes, str]]:
    """Each field of a message that is here, its bytes and what they say; ends quietly where the message does."""
    read = BytesReader(message)
    raw: Raw = {}
    for field in layout:
        start = read.at
        try:
            field.take(read, raw)
        except (EOFError, RequestRefused):
            return
        except ProtocolError:
            pass                                # shown all the same: it is what came
        raw[field.name] = message[start:read.at]
        yield field, raw[field.name], field.words(raw)


def text(name: bytes) -> str:
    """Peer-chosen bytes as one quoted line of ASCII, whatever is in them."""
    return ascii(name.decode("utf-8", "backslashreplace"))
