"""The other side of the protocol: CONNECT, BIND and UDP ASSOCIATE through a SOCKS5 proxy, ours or anybody's.

    with connect(("127.0.0.1", 1080), ("example.com", 80)) as sock:     # a plain connected socket
        sock.sendall(b"GET / HTTP/1.0\\r\\n\\r\\n")

    with bind(proxy, ("192.0.2.7", 21)) as waiting:                     # tell the peer waiting.bnd, then
        sock, peer = waiting.accept()

    with associate(proxy) as udp:
        udp.sendto(b"question", ("192.0.2.53", 53))
        data, peer = udp.recvfrom()

Blocking, in the calling thread. Names go to the proxy unresolved. `timeout` is one deadline in seconds, from dialling
to the reply; None waits for ever. Whatever is raised is an OSError: ProxyError with the REP where the proxy refused,
socket.timeout, or what kept us from the proxy. Only what fits into no message (a name of 256 bytes) is a ValueError.

Reads never ask for more than a reply has: what stands behind it is the tunnel's. RFC 1928, RFC 1929.
"""
from __future__ import annotations

import selectors
import socket
from ipaddress import IPv4Address, IPv6Address, ip_address
from time import monotonic
from typing import Callable, List, Optional, Tuple, TypeVar, Union

from .protocol.codes import Cmd, Method, Rep, phrase
from .protocol.errors import ProtocolError, ProxyError, RequestRefused
from .protocol.fields import ReadExactly
from .protocol.messages import UNSPECIFIED, Address, Datagram, Greeting, Login, LoginStatus, Reply, Request, Selection

HostPort = Tuple[str, int]
User = Tuple[Union[str, bytes], Union[str, bytes]]      # name and password; text goes out as UTF-8
M = TypeVar("M")

TIMEOUT_S = 30.0                    # a proxy may spend 10 s on the destination's addresses, and as much on its name
DATAGRAM_BYTES = 1 << 16            # more than any datagram has
MOST_FRAGMENTS = 0x7F               # the high bit of FRAG says "last": RFC 1928 §7
Selector = getattr(selectors, "PollSelector", selectors.SelectSelector)     # needs no descriptor of its own


def connect(proxy: HostPort, destination: HostPort, user: Optional[User] = None,
            timeout: Optional[float] = TIMEOUT_S) -> socket.socket:
    """A socket connected to `destination` through `proxy`, blocking and without a time-out from here on."""
    session = _Session(proxy, user, timeout)
    try:
        session.ask(Cmd.CONNECT, address(*destination))
        return session.hand_over()
    except BaseException:
        session.sock.close()
        raise


def bind(proxy: HostPort, expected_peer: HostPort = ("0.0.0.0", 0), user: Optional[User] = None,
         timeout: Optional[float] = TIMEOUT_S) -> Waiting:
    """Have `proxy` listen for a connection from expected_peer: 0.0.0.0 for anybody; few proxies look at its port."""
    session = _Session(proxy, user, timeout)
    try:
        return Waiting(session, session.ask(Cmd.BIND, address(*expected_peer)))
    except BaseException:
        session.sock.close()
        raise


def associate(proxy: HostPort, user: Optional[User] = None, timeout: Optional[float] = TIMEOUT_S) -> Association:
    """Have `proxy` pass datagrams on for as long as the Association is open."""
    session = _Session(proxy, user, timeout)
    try:
        # All zeros: where our datagrams come from is for the proxy to see, there may be a NAT between. RFC 1928 §4
        relay = session.ask(Cmd.UDP_ASSOCIATE, UNSPECIFIED)
        return Association(session.hand_over(), relay)
    except BaseException:
        session.sock.close()
        raise


class Waiting:
    """A BIND between its two replies.

    bnd     (host, port) where the proxy listens: tell it to the peer
    sock    the connection to the proxy; what is sent on it early reaches the peer
    """

    def __init__(self, session: _Session, bnd: HostPort) -> None:
        self._session = session
        self._accepted = False
        self.sock = session.sock
        self.bnd = bnd

    def accept(self, timeout: Optional[float] = None) -> Tuple[socket.socket, HostPort]:
        """Wait for the peer: the socket connected to it, which is now the caller's, and its (host, port).

        Raises ProxyError when the proxy gave up, socket.timeout after `timeout` seconds; either way, close then.
        """
        self._session.restart(timeout)
        peer = self._session.reply()
        self._accepted = True
        return self._session.hand_over(), peer

    def close(self) -> None:
        """End the wait. The socket that accept() gave stays open."""
        if not self._accepted:
            self.sock.close()

    def __enter__(self) -> Waiting:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Association:
    """An endpoint for datagrams that go through the proxy.

    relay   (host, port) to which the proxy wants them sent
    sock    the datagram socket, connected to the relay
    control the TCP connection, on which the association hangs
    """

    def __init__(self, control: socket.socket, relay: HostPort) -> None:
        family, _, _, _, sockaddr = socket.getaddrinfo(*relay, type=socket.SOCK_DGRAM)[0]
        self.relay = relay
        self.control = control
        self.timeout: Optional[float] = None
        self.sock = socket.socket(family, socket.SOCK_DGRAM)
        self._selector = Selector()
        try:
            self.sock.connect(sockaddr)             # the kernel then drops what comes from anybody else
        except OSError:
            self.close()
            raise
        self._selector.register(self.sock, selectors.EVENT_READ)
        self._selector.register(control, selectors.EVENT_READ)

    def settimeout(self, timeout: Optional[float]) -> None:
        """For each recvfrom() from here on, in seconds; None, as at the start, is for ever."""
        self.timeout = timeout

    def sendto(self, data: bytes, destination: HostPort, fragments: int = 1) -> None:
        """Send one datagram, cut into `fragments` if more than 1 (at most 127; few proxies put them together again)."""
        if not 1 <= fragments <= MOST_FRAGMENTS:
            raise ValueError("1 to %d fragments, not %d" % (MOST_FRAGMENTS, fragments))
        dst = address(*destination)
        if fragments == 1:
            self.sock.send(Datagram(dst, data).pack())
            return
        size = -(-len(data) // fragments)
        for number in range(1, fragments + 1):
            frag = number | (0x80 if number == fragments else 0)
            self.sock.send(Datagram(dst, data[(number - 1) * size:number * size], frag).pack())

    def recvfrom(self) -> Tuple[bytes, HostPort]:
        """The next datagram and the (host, port) that it is from. Fragments and malformed datagrams are passed over.

        Raises ProxyError when the proxy has ended the association, socket.timeout when settimeout()'s time is over.
        """
        deadline = _Deadline(self.timeout)
        while True:
            ready = [key.fileobj for key, _ in self._selector.select(deadline.left())]
            if self.sock in ready:
                try:
                    datagram = Datagram.parse(self.sock.recv(DATAGRAM_BYTES))
                except (EOFError, RequestRefused):
                    continue
                if not datagram.frag:
                    return datagram.data, _host_port(datagram.dst)
            elif self.control in ready and not self.control.recv(1):
                raise ProxyError("the proxy ended the association")

    def close(self) -> None:
        """End the association, at the proxy too."""
        self._selector.close()
        self.sock.close()
        self.control.close()

    def __enter__(self) -> Association:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


# ---- the parts ---------------------------------------------------------------------------------------------------

def address(host: Union[str, bytes], port: int) -> Address:
    """From the text of an IP address or from a name. Raises ValueError for a name that IDNA cannot put into ASCII."""
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
        """Seconds, for settimeout(). Raises socket.timeout when there are none."""
        if self.at is None:
            return None
        left = self.at - monotonic()
        if left <= 0:
            raise socket.timeout("timed out")
        return left


class _Session:
    """A connection to the proxy on which we are let in; each step of it under the same deadline."""

    def __init__(self, proxy: HostPort, user: Optional[User], timeout: Optional[float]) -> None:
        self.deadline = _Deadline(timeout)
        self.sock = self._dial(proxy)
        try:
            self._negotiate(user)
        except BaseException:
            self.sock.close()
            raise

    def restart(self, timeout: Optional[float]) -> None:
        self.deadline = _Deadline(timeout)

    def hand_over(self) -> socket.socket:
        self.sock.settimeout(None)
        return self.sock

    def ask(self, cmd: Cmd, dst: Address) -> HostPort:
        """Send a request and take its first reply: BND."""
        self._send(Request(cmd, dst).pack())
        return self.reply()

    def reply(self) -> HostPort:
        """BND of a reply; where the proxy wrote 0.0.0.0 or ::, the host at which we reached it."""
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

    def _negotiate(self, user: Optional[User]) -> None:
        """RFC 1928 §3, RFC 1929. The password is only sent to a proxy that asks for it."""
        offered = [Method.NO_AUTHENTICATION, Method.USERNAME_PASSWORD] if user else [Method.NO_AUTHENTICATION]
        login = Login(*(part.encode() if isinstance(part, str) else part for part in user)).pack() if user else b""
        self._send(Greeting(bytes(offered)).pack())
        method = self._take(Selection.parse).method
        if method not in offered:
            raise ProxyError("the proxy accepts no method of ours" + ("" if user else "; it may want user, password"))
        if method == Method.USERNAME_PASSWORD:
            self._send(login)
            if self._take(LoginStatus.parse).status:
                raise ProxyError("the proxy refused the user name or password")

    def _send(self, message: bytes) -> None:
        self.sock.settimeout(self.deadline.left())
        self.sock.sendall(message)

    def _take(self, parse: Callable[[ReadExactly], M]) -> M:
        """One message of the proxy's. Raises ProxyError when it closes before, or speaks something else."""
        try:
            return parse(self._read)
        except EOFError:
            raise ProxyError("the proxy closed the connection") from None
        except (ProtocolError, RequestRefused) as exc:      # RequestRefused: an ATYP that nobody knows
            raise ProxyError("not an answer of a SOCKS5 proxy: %s" % exc) from None

    def _read(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            self.sock.settimeout(self.deadline.left())
            piece = self.sock.recv(size - len(data))
            if not piece:
                raise EOFError
            data += piece
        return data
