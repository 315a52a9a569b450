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

What is said to the proxy is in commands/dialogue.py. RFC 1928, RFC 1929, RFC 1961.
"""
from __future__ import annotations

import selectors
import socket
from ipaddress import ip_address
from typing import List, Optional, Tuple, TypeVar, Union

from .commands.dialogue import Deadline, Dialogue, Gssapi
from .net.encapsulated import ProtectedSocket
from .protocol.codes import Cmd
from .protocol.envelope import Envelope
from .protocol.errors import ProtocolError, ProxyError, RequestRefused
from .protocol.messages import UNSPECIFIED, Address, Datagram

HostPort = Tuple[str, int]
User = Tuple[Union[str, bytes], Union[str, bytes]]      # name and password; str is sent as UTF-8
C = TypeVar("C", bound="_Closing")

TIMEOUT_S = 30.0                    # a proxy may take 10 s to resolve a name, and 10 s to connect
DATAGRAM_BYTES = 1 << 16            # larger than any datagram
MAX_FRAGMENTS = 0x7F                # the high bit of FRAG says "last": RFC 1928 §7
Selector = getattr(selectors, "PollSelector", selectors.SelectSelector)     # opens no descriptor


def connect(proxy: HostPort, destination: HostPort, user: Optional[User] = None,
            timeout: Optional[float] = TIMEOUT_S, gssapi: Union[bool, Gssapi] = False) -> socket.socket:
    """Connect to `destination` through `proxy`. Returns a blocking socket without a time-out."""
    with _Session(proxy, user, timeout, gssapi) as session:
        session.ask(Cmd.CONNECT, address(*destination))
        return session.hand_over()


def bind(proxy: HostPort, expected_peer: HostPort = ("0.0.0.0", 0), user: Optional[User] = None,
         timeout: Optional[float] = TIMEOUT_S, gssapi: Union[bool, Gssapi] = False) -> Waiting:
    """Ask `proxy` to listen for expected_peer. 0.0.0.0 means any peer; most proxies ignore the port."""
    with _Session(proxy, user, timeout, gssapi) as session:
        bnd = session.ask(Cmd.BIND, address(*expected_peer))
        session.sock.settimeout(None)
        return Waiting(session, bnd)


def associate(proxy: HostPort, user: Optional[User] = None, timeout: Optional[float] = TIMEOUT_S,
              gssapi: Union[bool, Gssapi] = False) -> Association:
    """Ask `proxy` to relay datagrams for as long as the Association is open."""
    with _Session(proxy, user, timeout, gssapi, ordered=False) as session:
        # All zeros: behind NAT we do not know the address from which our datagrams arrive. RFC 1928 §4
        relay = session.ask(Cmd.UDP_ASSOCIATE, UNSPECIFIED)
        return Association(session.hand_over(), relay, session.envelope)


class _Closing:
    """A context manager that is closed at its end."""

    def close(self) -> None:
        raise NotImplementedError

    def __enter__(self: C) -> C:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Waiting(_Closing):
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


class Association(_Closing):
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
        deadline = Deadline(self.timeout)
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


class _Session:
    """An authenticated connection to the proxy, closed after an error. All its steps share one deadline."""

    def __init__(self, proxy: HostPort, user: Optional[User], timeout: Optional[float],
                 gssapi: Union[bool, Gssapi], ordered: bool = True) -> None:
        deadline = Deadline(timeout)
        self.sock = _dial(proxy, deadline)
        with self:
            self._dialogue = Dialogue(self.sock, deadline)
            wanted = Gssapi() if gssapi is True else gssapi or None
            self._dialogue.negotiate(user and (_bytes(user[0]), _bytes(user[1])), wanted and wanted.at(proxy[0]),
                                     ordered)
            self.envelope = self._dialogue.envelope

    def __enter__(self) -> _Session:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind:
            self.sock.close()

    def restart(self, timeout: Optional[float]) -> None:
        self._dialogue.deadline = Deadline(timeout)

    def hand_over(self) -> socket.socket:
        self.sock.settimeout(None)
        return ProtectedSocket(self.sock, self.envelope, self._dialogue.held) if self.envelope else self.sock

    def ask(self, cmd: Cmd, dst: Address) -> HostPort:
        """Send a request. Returns BND of its first reply."""
        return _host_port(self._dialogue.reachable(self._dialogue.ask(cmd, dst)))

    def reply(self) -> HostPort:
        """Read the next reply. Returns BND."""
        return _host_port(self._dialogue.reachable(self._dialogue.reply()))


def _bytes(part: Union[str, bytes]) -> bytes:
    return part.encode() if isinstance(part, str) else part


def _dial(proxy: HostPort, deadline: Deadline) -> socket.socket:
    failures: List[OSError] = []
    for family, kind, protocol, _, sockaddr in socket.getaddrinfo(*proxy, type=socket.SOCK_STREAM):
        sock = socket.socket(family, kind, protocol)
        try:
            sock.settimeout(deadline.left())
            sock.connect(sockaddr)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            return sock
        except OSError as exc:
            failures.append(exc)
            sock.close()
    raise failures[-1]
