"""The client side of SOCKS5: CONNECT, BIND and UDP ASSOCIATE through any SOCKS5 proxy.

    with connect(("127.0.0.1", 1080), ("example.com", 80)) as sock:     # a plain connected socket
        sock.sendall(b"GET / HTTP/1.0\\r\\n\\r\\n")

    with bind(proxy, ("192.0.2.7", 21)) as waiting:                     # first tell the peer waiting.bnd
        sock, peer = waiting.accept()

    with associate(proxy) as udp:
        udp.sendto(b"question", ("192.0.2.53", 53))
        data, peer = udp.recvfrom()

All calls block the calling thread. The proxy resolves names. `timeout` is one deadline in seconds, from connecting to
the proxy to its reply; None: no limit. Every failure is an OSError: ProxyError with the REP if the proxy refused,
socket.timeout, or an error of the connection to the proxy. A name that fits into no message is a ValueError.

`gssapi` logs in with the user's own Kerberos ticket: a Gssapi, or True for Gssapi(). The socket is then a
ProtectedSocket where a protection level holds. The library may ask a KDC, which `timeout` does not cover.

No read goes beyond a reply: the bytes after it belong to the tunnel. RFC 1928, RFC 1929, RFC 1961.
"""
from __future__ import annotations

import selectors
import socket
from ipaddress import IPv4Address, IPv6Address, ip_address
from time import monotonic
from typing import Any, Callable, List, NamedTuple, Optional, Tuple, Type, TypeVar, Union

from .access import subnegotiation
from .net.encapsulated import RECEIVE_BYTES, ProtectedSocket
from .protocol.codes import Cmd, Method, Protection, Rep, phrase
from .protocol.envelope import Envelope
from .protocol.errors import ProtocolError, ProxyError, RequestRefused
from .protocol.fields import BytesReader, ReadExactly
from .protocol.messages import (UNSPECIFIED, Abort, Address, Datagram, Greeting, Login, LoginStatus, Reply, Request,
                                Selection)

HostPort = Tuple[str, int]
User = Tuple[Union[str, bytes], Union[str, bytes]]      # name and password; str is sent as UTF-8
M = TypeVar("M")

TIMEOUT_S = 30.0                    # a proxy may take 10 s to resolve a name, and 10 s to connect
DATAGRAM_BYTES = 1 << 16            # larger than any datagram
MAX_FRAGMENTS = 0x7F                # the high bit of FRAG says "last": RFC 1928 §7
Selector = getattr(selectors, "PollSelector", selectors.SelectSelector)     # opens no descriptor


class Gssapi(NamedTuple):
    """How to log in by GSSAPI.

    service     SERVICE or SERVICE@HOST of the proxy; without HOST, the host that `proxy` names
    protection  the least that the proxy may answer: clear, integrity or confidentiality
    """

    service: str = "rcmd"
    protection: str = "confidentiality"


def connect(proxy: HostPort, destination: HostPort, user: Optional[User] = None,
            timeout: Optional[float] = TIMEOUT_S, gssapi: Union[bool, Gssapi] = False) -> socket.socket:
    """Connect to `destination` through `proxy`. Returns a blocking socket without a time-out."""
    session = _Session(proxy, user, timeout, gssapi)
    try:
        session.ask(Cmd.CONNECT, address(*destination))
        return session.hand_over()
    except BaseException:
        session.sock.close()
        raise


def bind(proxy: HostPort, expected_peer: HostPort = ("0.0.0.0", 0), user: Optional[User] = None,
         timeout: Optional[float] = TIMEOUT_S, gssapi: Union[bool, Gssapi] = False) -> Waiting:
    """Ask `proxy` to listen for expected_peer. 0.0.0.0 means any peer; most proxies ignore the port."""
    session = _Session(proxy, user, timeout, gssapi)
    try:
        return Waiting(session, session.ask(Cmd.BIND, address(*expected_peer)))
    except BaseException:
        session.sock.close()
        raise


def associate(proxy: HostPort, user: Optional[User] = None, timeout: Optional[float] = TIMEOUT_S,
              gssapi: Union[bool, Gssapi] = False) -> Association:
    """Ask `proxy` to relay datagrams for as long as the Association is open."""
    session = _Session(proxy, user, timeout, gssapi)
    try:
        # All zeros: behind NAT we do not know the address from which our datagrams arrive. RFC 1928 §4
        relay = session.ask(Cmd.UDP_ASSOCIATE, UNSPECIFIED)
        return Association(session.hand_over(), relay, session.envelope)
    except BaseException:
        session.sock.close()
        raise


class Waiting:
    """A BIND between its two replies.

    bnd     (host, port) where the proxy listens, for the peer to connect to
    sock    the connection to the proxy; bytes sent on it now reach the peer later
    """

    def __init__(self, session: _Session, bnd: HostPort) -> None:
        self._session = session
        self._accepted = False
        self.sock = session.sock
        self.bnd = bnd

    def accept(self, timeout: Optional[float] = None) -> Tuple[socket.socket, HostPort]:
        """Wait for the peer. Returns the socket connected to it, which the caller now owns, and its (host, port).

        Raises ProxyError if the proxy refuses, socket.timeout after `timeout` seconds; call close() after either.
        """
        self._session.restart(timeout)
        peer = self._session.reply()
        self._accepted = True
        return self._session.hand_over(), peer

    def close(self) -> None:
        """Stop waiting. A socket that accept() returned stays open."""
        if not self._accepted:
            self.sock.close()

    def __enter__(self) -> Waiting:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Association:
    """A UDP association: send and receive datagrams through the proxy.

    relay   (host, port) of the proxy for datagrams
    sock    the datagram socket, connected to the relay
    control the TCP connection to the proxy; closing it ends the association
    """

    def __init__(self, control: socket.socket, relay: HostPort, envelope: Optional[Envelope] = None) -> None:
        family, _, _, _, sockaddr = socket.getaddrinfo(*relay, type=socket.SOCK_DGRAM)[0]
        self.relay = relay
        self.control = control
        self.timeout: Optional[float] = None
        self._envelope = envelope
        self.sock = socket.socket(family, socket.SOCK_DGRAM)
        self._selector = Selector()
        try:
            self.sock.connect(sockaddr)             # the kernel then drops datagrams from other senders
        except OSError:
            self.close()
            raise
        self._selector.register(self.sock, selectors.EVENT_READ)
        self._selector.register(control, selectors.EVENT_READ)

    def settimeout(self, timeout: Optional[float]) -> None:
        """Set the time-out of recvfrom() in seconds; None, the default: no limit."""
        self.timeout = timeout

    def sendto(self, data: bytes, destination: HostPort, fragments: int = 1) -> None:
        """Send one datagram in 1 to 127 fragments. Few proxies reassemble fragments."""
        if not 1 <= fragments <= MAX_FRAGMENTS:
            raise ValueError("1 to %d fragments, not %d" % (MAX_FRAGMENTS, fragments))
        dst = address(*destination)
        if fragments == 1:
            self._send(Datagram(dst, data))
            return
        size = -(-len(data) // fragments)
        for number in range(1, fragments + 1):
            frag = number | (0x80 if number == fragments else 0)
            self._send(Datagram(dst, data[(number - 1) * size:number * size], frag))

    def _send(self, datagram: Datagram) -> None:
        raw = datagram.pack()
        self.sock.send(self._envelope.seal_one(raw) if self._envelope else raw)

    def recvfrom(self) -> Tuple[bytes, HostPort]:
        """Receive the next datagram and the (host, port) of its sender. Skips fragments and malformed datagrams.

        Raises ProxyError when the proxy has ended the association, socket.timeout after the time of settimeout().
        """
        deadline = _Deadline(self.timeout)
        while True:
            ready = [key.fileobj for key, _ in self._selector.select(deadline.left())]
            if self.sock in ready:
                try:
                    raw = self.sock.recv(DATAGRAM_BYTES)
                    datagram = Datagram.parse(self._envelope.open_one(raw) if self._envelope else raw)
                except (EOFError, RequestRefused, ProtocolError):
                    continue
                if not datagram.frag:
                    return datagram.data, _host_port(datagram.dst)
            elif self.control in ready and not self.control.recv(1):
                raise ProxyError("the proxy ended the association")

    def close(self) -> None:
        """End the association, also on the proxy."""
        self._selector.close()
        self.sock.close()
        self.control.close()

    def __enter__(self) -> Association:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


# ---- the parts ---------------------------------------------------------------------------------------------------

def address(host: Union[str, bytes], port: int) -> Address:
    """Make an Address from an IP address or a name. Raises ValueError for a name that IDNA cannot encode."""
    if isinstance(host, bytes):
        return Address(host, port)
    try:
        return Address(ip_address(host), port)
    except ValueError:
        return Address(host.encode("ascii" if host.isascii() else "idna"), port)


def _host_port(bnd: Address) -> HostPort:
    return bnd.host.decode("utf-8", "backslashreplace") if isinstance(bnd.host, bytes) else str(bnd.host), bnd.port


class _Deadline:
    def __init__(self, timeout: Optional[float]) -> None:
        self.at = None if timeout is None else monotonic() + timeout

    def left(self) -> Optional[float]:
        """The seconds left, for settimeout(). Raises socket.timeout if none are left."""
        if self.at is None:
            return None
        left = self.at - monotonic()
        if left <= 0:
            raise socket.timeout("timed out")
        return left


class _Session:
    """An authenticated connection to the proxy. All its steps share one deadline."""

    def __init__(self, proxy: HostPort, user: Optional[User], timeout: Optional[float],
                 gssapi: Union[bool, Gssapi]) -> None:
        self.deadline = _Deadline(timeout)
        self.envelope: Optional[Envelope] = None
        self.held = b""                         # opened, but not taken yet
        self.sock = self._dial(proxy)
        try:
            self._negotiate(user, Gssapi() if gssapi is True else gssapi or None, proxy[0])
        except BaseException:
            self.sock.close()
            raise

    def restart(self, timeout: Optional[float]) -> None:
        self.deadline = _Deadline(timeout)

    def hand_over(self) -> socket.socket:
        self.sock.settimeout(None)
        return ProtectedSocket(self.sock, self.envelope, self.held) if self.envelope else self.sock

    def ask(self, cmd: Cmd, dst: Address) -> HostPort:
        """Send a request. Returns BND of its first reply."""
        self._send(Request(cmd, dst).pack())
        return self.reply()

    def reply(self) -> HostPort:
        """Read a reply. Returns BND; instead of 0.0.0.0 or :: it has the address of the proxy."""
        reply = self._take(Reply.parse)
        if reply.rep != Rep.SUCCEEDED:
            raise ProxyError("the proxy answered X'%02X', %s" % (reply.rep, phrase(Rep, reply.rep)), int(reply.rep))
        host, port = _host_port(reply.bnd)
        if isinstance(reply.bnd.host, (IPv4Address, IPv6Address)) and reply.bnd.host.is_unspecified:
            host = self.sock.getpeername()[0]
        return host, port

    def _dial(self, proxy: HostPort) -> socket.socket:
        failures: List[OSError] = []
        for family, kind, protocol, _, sockaddr in socket.getaddrinfo(*proxy, type=socket.SOCK_STREAM):
            sock = socket.socket(family, kind, protocol)
            try:
                sock.settimeout(self.deadline.left())
                sock.connect(sockaddr)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                return sock
            except OSError as exc:
                failures.append(exc)
                sock.close()
        raise failures[-1]

    def _negotiate(self, user: Optional[User], gssapi: Optional[Gssapi], host: str) -> None:
        """RFC 1928 §3, RFC 1929, RFC 1961. The password is only sent to a proxy that asks for it."""
        offered = [Method.GSSAPI] if gssapi else [Method.NO_AUTHENTICATION]
        if user:
            offered.append(Method.USERNAME_PASSWORD)
        login = Login(*(part.encode() if isinstance(part, str) else part for part in user)).pack() if user else b""
        self._send(Greeting(bytes(offered)).pack())
        method = self._take(Selection.parse).method
        if method not in offered:
            raise ProxyError("the proxy accepts no offered method" + ("" if user else "; it may require a password"))
        if method == Method.USERNAME_PASSWORD:
            self._send(login)
            if self._take(LoginStatus.parse).status:
                raise ProxyError("the proxy refused the user name or password")
        elif gssapi:
            self._by_gssapi(gssapi, host)

    def _by_gssapi(self, gssapi: Gssapi, host: str) -> None:
        """Raises ProxyError, also without a library, a ticket or a KDC."""
        service = gssapi.service if "@" in gssapi.service else "%s@%s" % (gssapi.service, host)
        try:
            from .access.gssapi import Initiator        # loads ctypes, which not every Python has

            context = Initiator(service)
            subnegotiation.initiate(context, self._take_gssapi, lambda message: self._send(message.pack()),
                                    subnegotiation.LEVELS[gssapi.protection])
        except (ImportError, ProtocolError) as exc:
            raise ProxyError("GSSAPI: %s" % exc) from None
        if context.level != Protection.CLEAR:
            self.envelope = Envelope(context)

    def _take_gssapi(self, kind: Type[Any]) -> Any:
        """A message with a token, or ProxyError for an Abort."""
        head = self._take(lambda read: read(2))
        if head == Abort().pack():
            raise ProxyError("the proxy refused the GSSAPI token or protection level")
        begun = BytesReader(head)
        return self._take(lambda _read: kind.parse(lambda size: begun(size) if begun.rest() else self._read(size)))

    def _send(self, message: bytes) -> None:
        self.sock.settimeout(self.deadline.left())
        self.sock.sendall(self.envelope.seal(message) if self.envelope else message)

    def _take(self, parse: Callable[[ReadExactly], M]) -> M:
        """Read one message. Raises ProxyError if the proxy closes first, or sends no SOCKS5."""
        try:
            return parse(self._read)
        except EOFError:
            raise ProxyError("the proxy closed the connection") from None
        except (ProtocolError, RequestRefused) as exc:      # RequestRefused: an unknown ATYP
            raise ProxyError("not a SOCKS5 proxy: %s" % exc) from None

    def _read(self, size: int) -> bytes:
        """Exactly `size` bytes. Raises EOFError, ProtocolError."""
        if not self.envelope:
            return self._read_plain(size)
        while len(self.held) < size:
            self.sock.settimeout(self.deadline.left())
            piece = self.sock.recv(RECEIVE_BYTES)
            if not piece:
                raise EOFError
            self.held += self.envelope.open(piece)
        data, self.held = self.held[:size], self.held[size:]
        return data

    def _read_plain(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            self.sock.settimeout(self.deadline.left())
            piece = self.sock.recv(size - len(data))
            if not piece:
                raise EOFError
            data += piece
        return data
