"""Every message of SOCKS5 as a NamedTuple with parse() and pack(). No socket, no thread, no decision.

Each message has one Layout, the RFC's table of fields as data (fields.py). parse() reads the fields in the RFC's order,
and the trace (trace.py) shows a message by the same Layout, so the two always agree.

A parser never reads beyond its message: bytes that a client sends after its request stay unread, for the tunnel.

RFC 1928 sections 3 to 7, RFC 1929, RFC 1961 sections 3 to 5. All integers are in network order (big-endian).
"""
from __future__ import annotations

from struct import Struct
from typing import Any, Callable, Dict, NamedTuple, Sequence, Type, TypeVar

from .codes import METHOD_RANGES, Atyp, Cmd, Method, Mtyp, Rep, phrase
from .errors import RequestRefused
from .fields import (
    ATYP_IN_FRONT, LENGTH_IN_FRONT, Field, Host, IPv4, Layout, Source, bracketed, ip_packed, new_tuple, split,
    split_by_field, text)
from .memory import remembered

VER = 0x05          # RFC 1928 §3
AUTH_VER = 0x01     # RFC 1929 §2: the version of the sub-negotiation, not of SOCKS
GSSAPI_VER = 0x01   # RFC 1961 §3.4
MAX_TOKEN_BYTES = 0xFFFF
T = TypeVar("T", bound="Framed")


def _number(raw: bytes) -> str:
    return str(int.from_bytes(raw, "big"))


def _method(raw: bytes) -> str:
    return phrase(Method, raw[0], METHOD_RANGES)


VERSION = Field("VER", 1, lambda raw: "SOCKS version %d" % raw[0], must=VER)
AUTH_VERSION = Field("VER", 1, lambda raw: "version %d of the username/password sub-negotiation" % raw[0],
                     must=AUTH_VER)
RESERVED = Field("RSV", 1, lambda raw: "reserved")
ATYP = Field("ATYP", 1, lambda raw: phrase(Atyp, raw[0]))
IPV4, NAME, IPV6 = bytes([Atyp.IPV4]), bytes([Atyp.DOMAINNAME]), bytes([Atyp.IPV6])
PORT_BYTES = 2
pack_ipv4 = Struct("!c4sH").pack                    # ATYP, ADDR and PORT
CMDS = {bytes([cmd]): cmd for cmd in Cmd}           # much faster than Cmd(number)


def _address(prefix: str) -> Sequence[Field]:
    """ATYP, ADDR and PORT, as in requests, replies and datagrams.                      RFC 1928 §5"""
    return (ATYP, Field(prefix + ".ADDR", ATYP_IN_FRONT, text), Field(prefix + ".PORT", PORT_BYTES, _number))


# ---- addresses, RFC 1928 §5 --------------------------------------------------------------------------------------

class Address(NamedTuple):
    """The host and port of a request, reply or datagram.                               RFC 1928 §5

        | ATYP | ADDR | PORT |     octets: 1 variable 2

    ATYP is not stored: it follows from the type of `host`.
    """

    host: Host
    port: int

    @classmethod
    def of(cls, atyp: bytes, addr: bytes, port: bytes) -> Address:
        """Make it from the fields of a message."""
        return new_tuple(cls, (addr[1:] if atyp == NAME else ip_packed(addr), port[0] << 8 | port[1]))

    def pack(self) -> bytes:
        """Raises ValueError for a name that is empty or longer than 255 bytes."""
        return pack_address(self.host, self.port)

    def text(self) -> str:
        """192.0.2.1:80, [2001:db8::1]:80 or 'example.com':80. Safe to log: a name is quoted."""
        host = self.host
        if type(host) is IPv4:                          # nearly always, and the others take longer
            return f"{host.text}:{self.port}"
        return f"{text(host) if isinstance(host, bytes) else bracketed(host)}:{self.port}"

    def __str__(self) -> str:
        return self.text()


def pack_address(host: Host, port: int) -> bytes:
    """ATYP, ADDR and PORT."""
    if type(host) is IPv4:                          # nearly always, and the others take longer
        return pack_ipv4(IPV4, host.packed, port)
    if not isinstance(host, bytes):
        return (IPV4 if host.version == 4 else IPV6) + host.packed + port.to_bytes(PORT_BYTES, "big")
    if not 1 <= len(host) <= 255:
        raise ValueError("a name has 1 to 255 bytes, not %d" % len(host))
    return b"%b%c%b%b" % (NAME, len(host), host, port.to_bytes(PORT_BYTES, "big"))


UNSPECIFIED = Address(IPv4(0), 0)                 # BND of a failure reply


# ---- the method negotiation, RFC 1928 §3 -------------------------------------------------------------------------

GREETING = Layout((
    VERSION, Field("NMETHODS", 1, lambda raw: "%d method(s) follow" % raw[0]),
    Field("METHODS", LENGTH_IN_FRONT, lambda raw: ", ".join(_method(raw[i:i + 1]) for i in range(len(raw))) or "none")))


class Greeting(NamedTuple):
    """Client: the authentication methods that it supports.                              RFC 1928 §3

        | VER | NMETHODS | METHODS |     octets: 1 1 0..255
    """

    methods: bytes

    @classmethod
    def parse(cls, source: Source) -> Greeting:
        return cls(split(GREETING, source)[2])

    def pack(self) -> bytes:
        return bytes([VER, len(self.methods)]) + self.methods


SELECTION = Layout((VERSION, Field("METHOD", 1, _method)))


class Selection(NamedTuple):
    """Server: the selected method, or X'FF' if none is acceptable.                      RFC 1928 §3

        | VER | METHOD |     octets: 1 1
    """

    method: int

    @classmethod
    def parse(cls, source: Source) -> Selection:
        return cls(split(SELECTION, source)[1][0])

    def pack(self) -> bytes:
        return bytes([VER, self.method])


SELECTIONS = [Selection(method).pack() for method in range(256)]


# ---- username/password, RFC 1929 ---------------------------------------------------------------------------------

LOGIN = Layout((
    AUTH_VERSION, Field("ULEN", 1, lambda raw: "%s bytes of UNAME" % raw[0]), Field("UNAME", LENGTH_IN_FRONT, text),
    Field("PLEN", 1, lambda raw: "%s bytes of PASSWD" % raw[0], secret=True),
    Field("PASSWD", LENGTH_IN_FRONT, lambda raw: "", secret=True)))


class Login(NamedTuple):
    """Client: user name and password.                                                   RFC 1929 §2

        | VER | ULEN | UNAME | PLEN | PASSWD |     octets: 1 1 1..255 1 1..255
    """

    uname: bytes
    passwd: bytes

    @classmethod
    def parse(cls, source: Source) -> Login:
        _ver, _ulen, uname, _plen, passwd = split(LOGIN, source)
        return cls(uname, passwd)

    def pack(self) -> bytes:
        """Raises ValueError for a field of more than 255 bytes."""
        return bytes([AUTH_VER, len(self.uname)]) + self.uname + bytes([len(self.passwd)]) + self.passwd

    def __repr__(self) -> str:
        return "Login(uname=%r, passwd=...)" % self.uname


LOGIN_STATUS = Layout((
    AUTH_VERSION, Field("STATUS", 1, lambda raw: "failure, the connection closes" if raw[0] else "success")))


class LoginStatus(NamedTuple):
    """Server: X'00' is success; any other status is failure, and the server closes.     RFC 1929 §2

        | VER | STATUS |     octets: 1 1
    """

    status: int

    @classmethod
    def parse(cls, source: Source) -> LoginStatus:
        return cls(split(LOGIN_STATUS, source)[1][0])

    def pack(self) -> bytes:
        return bytes([AUTH_VER, self.status])


# ---- GSSAPI, RFC 1961 --------------------------------------------------------------------------------------------

def _framing(mtyp: Mtyp) -> Layout:
    """VER and MTYP, as in every message of RFC 1961."""
    return Layout((Field("VER", 1, lambda raw: "version %d of the GSSAPI sub-negotiation" % raw[0], must=GSSAPI_VER),
                   Field("MTYP", 1, lambda raw: phrase(Mtyp, raw[0]), must=mtyp)))


TOKEN = (Field("LEN", 2, lambda raw: "%s bytes of TOKEN" % _number(raw)),
         Field("TOKEN", LENGTH_IN_FRONT,
               lambda raw: "of the GSS-API mechanism" if len(raw) > 1 else "one byte in clear"))


HEADER_BYTES = 4                # in front of TOKEN


class Framed(NamedTuple):
    """What the messages with a token have in common. RFC 1961 §3.4, §4.3 and §5 have the same box:

        | VER | MTYP | LEN | TOKEN |     octets: 1 1 2 0..65535
    """

    token: bytes

    @classmethod
    def parse(cls: Type[T], source: Source) -> T:
        return cls(split(LAYOUTS[cls], source)[3])

    def pack(self) -> bytes:
        """Raises OverflowError for a token of more than MAX_TOKEN_BYTES."""
        return bytes([GSSAPI_VER, MTYPS[type(self)]]) + len(self.token).to_bytes(2, "big") + self.token


class SecurityToken(Framed):
    """Either side: a token of gss_init_sec_context() or gss_accept_sec_context().       RFC 1961 §3.4, §3.7"""


class ProtectionLevel(Framed):
    """Client: the level that it requires; server: the level that holds. A token of gss_wrap() around one byte; or that
    byte as it is, from NEC's reference implementation.                                  RFC 1961 §4.3, §4.4"""


class Encapsulated(Framed):
    """Either side: a part of all that follows, in a token of gss_wrap().                RFC 1961 §5"""


MTYPS: Dict[type, Mtyp] = {
    SecurityToken: Mtyp.TOKEN, ProtectionLevel: Mtyp.PROTECTION, Encapsulated: Mtyp.ENCAPSULATED}
ABORT = _framing(Mtyp.ABORT)


class Abort:
    """Server: the client is refused, and the server closes.                             RFC 1961 §3.8

        | VER | MTYP |     octets: 1 1
    """

    @classmethod
    def parse(cls, source: Source) -> Abort:
        split(ABORT, source)
        return cls()

    def pack(self) -> bytes:
        return bytes([GSSAPI_VER, Mtyp.ABORT])


# ---- request and reply, RFC 1928 §4 and §6 -----------------------------------------------------------------------

REQUEST = Layout((
    VERSION, Field("CMD", 1, lambda raw: phrase(Cmd, raw[0])), RESERVED, *_address("DST")))


class Request(NamedTuple):
    """Client: a command and its destination.                                            RFC 1928 §4

        | VER | CMD | RSV | ATYP | DST.ADDR | DST.PORT |     octets: 1 1 1 1 variable 2
    """

    cmd: Cmd
    dst: Address

    @classmethod
    def parse(cls, source: Source) -> Request:
        """Raises RequestRefused: X'07' for an unknown CMD, after reading all of it; X'08' for an unknown ATYP."""
        _ver, cmd, _rsv, atyp, addr, port = split(REQUEST, source)      # RSV other than X'00' is tolerated
        if cmd not in CMDS:
            raise RequestRefused(Rep.COMMAND_NOT_SUPPORTED, "CMD 0x%02x" % cmd[0])
        return new_tuple(cls, (CMDS[cmd], Address.of(atyp, addr, port)))

    def pack(self) -> bytes:
        return bytes([VER, self.cmd, 0x00]) + self.dst.pack()


REPLY = Layout((
    VERSION, Field("REP", 1, lambda raw: phrase(Rep, raw[0])), RESERVED, *_address("BND")))


class Reply(NamedTuple):
    """Server: the result of the request. BIND has two replies.                          RFC 1928 §6

        | VER | REP | RSV | ATYP | BND.ADDR | BND.PORT |     octets: 1 1 1 1 variable 2
    """

    rep: int
    bnd: Address = UNSPECIFIED

    @classmethod
    def parse(cls, source: Source) -> Reply:
        """`rep` is a plain int where the RFC assigns no meaning to it."""
        _ver, code, _rsv, atyp, addr, port = split(REPLY, source)
        rep = code[0]
        return cls(Rep(rep) if rep <= Rep.ADDRESS_TYPE_NOT_SUPPORTED else rep, Address.of(atyp, addr, port))

    def pack(self) -> bytes:
        return REPLY_HEADS[self.rep] + self.bnd.pack()


REPLY_HEADS = [bytes([VER, rep, 0x00]) for rep in range(256)]       # VER, REP and RSV, by REP


# ---- datagrams, RFC 1928 §7 --------------------------------------------------------------------------------------

DATAGRAM = Layout((
    Field("RSV", 2, lambda raw: "reserved"),
    Field("FRAG", 1, lambda raw: "stands alone" if not raw[0] else "fragment %d%s" % (
        raw[0] & 0x7F, ", the last of its sequence" if raw[0] & 0x80 else "")),
    *_address("DST")))


class Datagram(NamedTuple):
    """A UDP datagram between client and relay, in either direction.                     RFC 1928 §7

        | RSV | FRAG | ATYP | DST.ADDR | DST.PORT | DATA |     octets: 2 1 1 variable 2 variable
    """

    dst: Address
    data: bytes
    frag: int = 0

    @classmethod
    def parse(cls, datagram: bytes) -> Datagram:
        """Parse a whole datagram; DATA is the rest after the header. Raises EOFError when it ends inside the header,
        RequestRefused X'08' for an unknown ATYP."""
        header = split_by_field(DATAGRAM, datagram, strict=False)        # DATA follows
        _rsv, frag, atyp, addr, port = header                   # RSV other than X'0000' is tolerated
        return cls(Address.of(atyp, addr, port), datagram[sum(map(len, header)):], frag[0])

    def pack(self) -> bytes:
        return bytes([0x00, 0x00, self.frag]) + self.dst.pack() + self.data


# ---- to clients that speak another protocol ----------------------------------------------------------------------

SOCKS4_REFUSAL = bytes([0x00, 0x5B]) + bytes(6)     # request rejected or failed
HTTP_HELP = (b"HTTP/1.0 400 Bad Request\r\nContent-Type: text/plain\r\nConnection: close\r\n\r\n"
             b"This is a SOCKS5 proxy, not an HTTP proxy or web server.\n"
             b"Point the program at it with socks5h://HOST:PORT (curl: --socks5-hostname HOST:PORT;\n"
             b"Firefox: Settings, Network Settings, SOCKS Host, SOCKS v5, Proxy DNS when using SOCKS v5).\n")


# ---- all of them -------------------------------------------------------------------------------------------------

LAYOUTS: Dict[type, Layout] = {
    Greeting: GREETING, Selection: SELECTION, Login: LOGIN, LoginStatus: LOGIN_STATUS, Request: REQUEST, Reply: REPLY,
    Datagram: DATAGRAM, Abort: ABORT, **{kind: Layout((*_framing(mtyp), *TOKEN)) for kind, mtyp in MTYPS.items()}}


# kind.parse(data) of a whole message. Remembered, because clients say the same again and again. Not for a Login or a
# token: those would stay in memory.
whole: Callable[[Any, bytes], Any] = remembered(4096)(lambda kind, data: kind.parse(data))
