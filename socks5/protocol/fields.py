"""The fields of a message. A Layout lists them in the RFC's order, both for parsing and for the trace.

A parser takes its input as bytes, which are one whole message, or as a function `read(n)`, which reads exactly n
bytes of a stream or raises EOFError. A parser never reads beyond the end of its message. RFC 1928 section 5.
"""
from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address
from struct import Struct
from typing import Callable, Dict, Iterable, Iterator, List, Optional, Sequence, Tuple, Union

from .codes import Atyp, Rep
from .errors import ProtocolError, RequestRefused
from .memory import remembered

ReadExactly = Callable[[int], bytes]
Source = Union[bytes, ReadExactly]
Host = Union[IPv4Address, IPv6Address, bytes]     # bytes: a domain name as received
ADDRESS_BYTES = {0x01: 4, 0x04: 16}               # by ATYP, RFC 1928 §5
DOMAINNAME = int(Atyp.DOMAINNAME)
new_tuple = tuple.__new__                         # new_tuple(kind, fields) is kind(*fields), in half the time
LENGTH_IN_FRONT, ATYP_IN_FRONT = 0, -1            # in place of a size: what the field in front says


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
    """A `read` function for bytes that are already in memory, such as the beginning of a stream."""

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


@dataclass(frozen=True)         # a NamedTuple's attributes take several times as long to read
class Field:
    """One field of a message.

    name    the RFC's name, unique in its message
    size    in bytes; or LENGTH_IN_FRONT: the field in front holds it; or ATYP_IN_FRONT: of an address, RFC 1928 §5
    means   describes the bytes in words; not called for an address, which depends on ATYP
    must    the only valid value (VER); any other raises ProtocolError
    secret  never shown
    """

    name: str
    size: int
    means: Callable[[bytes], str]
    must: Optional[int] = None
    secret: bool = False

    def words(self, piece: bytes, before: bytes) -> str:
        """Describe the value of this field in words; `before` is the field in front of it."""
        if self.size == ATYP_IN_FRONT:
            host = host_of(before[0], piece)
            return text(host) if isinstance(host, bytes) else str(host)
        return self.means(piece)


class Layout(Tuple[Field, ...]):
    """The fields of a message, in the RFC's order.

    must     what the first byte has to be, if anything
    addr     where ADDR begins, of which only the size differs from message to message; 0 if there is none
    others   bytes of all other fields
    format   of a struct.Struct for all fields, where `%d` stands for the size of ADDR
    unpack   of these, by the size of ADDR
    """

    def __init__(self, fields: Iterable[Field]) -> None:
        sizes = [field.size for field in self]
        self.must = self[0].must
        self.addr = sum(sizes[:sizes.index(ATYP_IN_FRONT)]) if ATYP_IN_FRONT in sizes else 0
        self.others = sum(size for size in sizes if size > 0)
        self.format = "".join("%ds" if size == ATYP_IN_FRONT else "%ds" % size for size in sizes)
        self.unpack: Dict[int, Callable[[bytes], Sequence[bytes]]] = {}


def host_of(atyp: int, packed: bytes) -> Host:
    """The host in the bytes of an ADDR field; those of a name begin with its length."""
    return packed[1:] if atyp == DOMAINNAME else ip_packed(packed)


@remembered(4096)
def ip_packed(packed: bytes) -> Union[IPv4, IPv6]:
    """The address in 4 or 16 bytes. Cached: a lookup is faster than a new object."""
    return IPv4(packed) if len(packed) == 4 else IPv6(packed)


def split(layout: Layout, source: Source) -> Sequence[bytes]:
    """The raw bytes of each field of one message. Raises what split_by_field() does.

    A valid message with an ADDR that is here as a whole is taken apart by one call.
    """
    addr = layout.addr
    if addr and isinstance(source, bytes):
        size = len(source) - layout.others
        if size > 0 and source[0] == layout.must:
            atyp = source[addr - 1]
            if size == (1 + source[addr] if atyp == DOMAINNAME else ADDRESS_BYTES.get(atyp)):
                unpack = layout.unpack.get(size)
                if unpack is None:
                    unpack = layout.unpack[size] = Struct(layout.format % size).unpack
                return unpack(source)
    return split_by_field(layout, source)


def split_by_field(layout: Layout, source: Source, strict: bool = True,
                   pieces: Optional[List[bytes]] = None) -> List[bytes]:
    """The raw bytes of each field of one message, in `pieces` if that is given, as far as it gets.

    Raises EOFError for less than a message and ProtocolError for a value that `must` forbids; for an unknown ATYP, at
    once, because the size of the address is unknown, too, RequestRefused X'08'. `source` may not hold more than the
    message: EOFError. Unless `strict`, it may, and what `must` forbids is taken.
    """
    data, read = (source, _cut_short) if isinstance(source, bytes) else (b"", source)
    pieces = [] if pieces is None else pieces
    piece, at, have = b"", 0, len(data)
    for field in layout:
        size = field.size
        if size <= 0:
            if size == LENGTH_IN_FRONT:
                size = int.from_bytes(piece, "big")
            elif piece[0] == DOMAINNAME:                # its length stands in front
                if at == have:
                    data, have = data + read(1), have + 1
                size = 1 + data[at]
            elif piece[0] in ADDRESS_BYTES:
                size = ADDRESS_BYTES[piece[0]]
            else:
                raise RequestRefused(Rep.ADDRESS_TYPE_NOT_SUPPORTED, "ATYP 0x%02x" % piece[0])
        end = at + size
        if end > have:
            data, have = data + read(end - have), end
        piece = data[at:end]
        at = end
        pieces.append(piece)
        if field.must is not None and piece[0] != field.must and strict:
            raise ProtocolError("%s 0x%02x, expected 0x%02x" % (field.name, piece[0], field.must))
    if at < have and strict:
        raise EOFError("more than one message")
    return pieces


def _cut_short(size: int) -> bytes:
    raise EOFError("message cut short: %d bytes more" % size)


def dissect(layout: Layout, message: bytes) -> Iterator[Tuple[Field, bytes, str]]:
    """Yield each field of a message, its bytes and their meaning. Stops where the message is cut short. A wrong VER is
    shown, too."""
    pieces: List[bytes] = []
    with suppress(EOFError, RequestRefused):
        split_by_field(layout, message, strict=False, pieces=pieces)
    for field, piece, before in zip(layout, pieces, [b"", *pieces]):
        yield field, piece, field.words(piece, before)


def text(name: bytes) -> str:
    """Quote bytes that a peer chose as one line of printable ASCII."""
    return ascii(name.decode("utf-8", "backslashreplace"))
