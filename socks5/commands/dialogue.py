"""The client's side of SOCKS5, on a connection to another proxy: client.py and upstream.py speak it.

Blocks the calling thread, by one deadline for all steps, and watches a client that waits for the outcome. No read goes
beyond a reply: the bytes after it belong to the tunnel. RFC 1928 sections 3 to 6, RFC 1929, RFC 1961.
"""
from __future__ import annotations

import errno
import socket
from time import monotonic
from typing import Any, Callable, List, NamedTuple, Optional, Tuple, Type, TypeVar

from ..access import subnegotiation
from ..net.addresses import endpoint_of
from ..net.encapsulated import RECEIVE_BYTES
from ..net.poller import READ, new_poll
from ..protocol.codes import Cmd, Method, Protection, Rep, phrase
from ..protocol.envelope import Envelope
from ..protocol.errors import ProtocolError, ProxyError, RequestRefused
from ..protocol.fields import BytesReader, ReadExactly
from ..protocol.messages import Abort, Address, Greeting, Login, LoginStatus, Reply, Request, Selection

NO_LIMIT = float("inf")
M = TypeVar("M")


class ClientLeft(ConnectionResetError):
    """The client that waits for the outcome has reset its connection."""


class Deadline:
    """A moment by which all is to be done. `timeout` is in seconds; None: no limit."""

    def __init__(self, timeout: Optional[float]) -> None:
        self.at = NO_LIMIT if timeout is None else monotonic() + timeout

    def left(self) -> Optional[float]:
        """The seconds left, for settimeout(). Raises socket.timeout if none are left."""
        if self.at == NO_LIMIT:
            return None
        left = self.at - monotonic()
        if left <= 0:
            raise socket.timeout("timed out")
        return left


class Gssapi(NamedTuple):
    """How to log in by GSSAPI.

    service     SERVICE or SERVICE@HOST of the proxy; without HOST, the host that the proxy is named by
    protection  the least that the proxy may answer: clear, integrity or confidentiality
    """

    service: str = "rcmd"
    protection: str = "confidentiality"

    def at(self, host: str) -> Gssapi:
        """With a HOST."""
        return self if "@" in self.service else self._replace(service="%s@%s" % (self.service, host))


class Dialogue:
    """What is said to a proxy, and what it answers.

    sock        connected to the proxy, blocking or not
    deadline    of all steps; may be set to another one between two of them
    client      a socket whose reset ends a wait
    envelope    what protects the messages, after GSSAPI; `held` is what was opened and not taken yet

    Raises ProxyError with the REP when the proxy refuses, without one when it fails or speaks no SOCKS5; ClientLeft;
    socket.timeout; or an OSError of `sock`.
    """

    def __init__(self, sock: socket.socket, deadline: Deadline, client: Optional[socket.socket] = None) -> None:
        self.sock = sock
        self.deadline = deadline
        self.envelope: Optional[Envelope] = None
        self.held = b""
        self._poll = new_poll()
        self._poll.register(sock.fileno(), READ)
        if client is not None:
            self._poll.register(client.fileno(), 0)         # a reset is reported unasked; a FIN may be a half-close

    def negotiate(self, user: Optional[Tuple[bytes, bytes]], gssapi: Optional[Gssapi] = None,
                  ordered: bool = True) -> None:
        """Agree on a METHOD. The password is only sent to a proxy that asks for it. `ordered`: no datagrams will come.

        RFC 1928 §3, RFC 1929"""
        offered: List[int] = [Method.GSSAPI if gssapi else Method.NO_AUTHENTICATION]
        offered += [Method.USERNAME_PASSWORD] if user else []
        login = Login(*user).pack() if user else b""
        self._send(Greeting(bytes(offered)).pack())
        method = self._take(Selection.parse).method
        if method not in offered:
            raise ProxyError("the proxy accepts no offered method" + ("" if user else "; it may require a password"))
        if method == Method.USERNAME_PASSWORD:
            self._send(login)
            if self._take(LoginStatus.parse).status:
                raise ProxyError("the proxy refused the user name or password")
        elif gssapi:
            self._by_gssapi(gssapi, ordered)

    def _by_gssapi(self, gssapi: Gssapi, ordered: bool) -> None:
        """RFC 1961. Raises ProxyError, also without a library, a ticket or a KDC."""
        try:
            from ..access.gssapi import Initiator       # loads ctypes, which not every Python has

            context = Initiator(gssapi.service, ordered)
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
        return self._take(lambda read: kind.parse(lambda size: begun(size) if begun.rest() else read(size)))

    def _send(self, message: bytes) -> None:
        self.sock.sendall(self.envelope.seal(message) if self.envelope else message)

    def ask(self, cmd: Cmd, dst: Address) -> Address:
        """Send a request. Returns BND of its first reply.                                             RFC 1928 §4"""
        self._send(Request(cmd, dst).pack())
        return self.reply()

    def reply(self) -> Address:
        """Read a reply that says X'00', and return its BND.                                           RFC 1928 §6"""
        reply = self._take(Reply.parse)
        if reply.rep != Rep.SUCCEEDED:
            raise ProxyError("the proxy answered X'%02X', %s" % (reply.rep, phrase(Rep, reply.rep)), int(reply.rep))
        return reply.bnd

    def reachable(self, bnd: Address) -> Address:
        """`bnd`, for a peer or for datagrams; for 0.0.0.0 or :: it is the address of the proxy."""
        if not isinstance(bnd.host, bytes) and bnd.host.is_unspecified:
            return Address(endpoint_of(self.sock.getpeername()).ip, bnd.port)
        return bnd

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
        while len(self.held) < size:
            left = self.deadline.left()
            ready = dict(self._poll.poll(None if left is None else left * 1000 + 1))
            if ready.pop(self.sock.fileno(), 0):
                try:
                    piece = self.sock.recv(RECEIVE_BYTES if self.envelope else size - len(self.held))
                except (BlockingIOError, InterruptedError):
                    continue
                if not piece:
                    raise EOFError
                self.held += self.envelope.open(piece) if self.envelope else piece
            elif ready:
                raise ClientLeft(errno.ECONNRESET, "client left before the upstream answered")
        data, self.held = self.held[:size], self.held[size:]
        return data
