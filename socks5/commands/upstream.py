"""CONNECT, BIND and UDP ASSOCIATE through another SOCKS5 proxy, the upstream.

A name goes to the upstream as it is. Its REP is passed on; a failure of the upstream itself, or of our way to it, is
X'01'. Runs in the handler's thread, by the deadline of --connect-timeout from the lookup of the upstream's name to its
reply. RFC 1928.
"""
from __future__ import annotations

import socket
from time import monotonic
from typing import Any, Callable, Container, Counter, Dict, Iterator, List, Optional, Sequence, Tuple

from ..values import Upstream
from ..net.addresses import IP, Endpoint, Sockaddr, family_of, is_here
from ..net.listeners import tune
from ..net.resolver import normalise
from ..net.shares import ANY_PORT
from ..protocol.codes import Cmd, Rep
from ..protocol.errors import REP_OF_ERRNO, ProxyError, RequestRefused, name_of
from ..protocol.fields import Host
from ..protocol.messages import UNSPECIFIED, Address, Datagram
from .bind import PeerWait, Place
from .connect import Source, connect
from .datagrams import BURST, BURST_BYTES, bound
from .dialogue import ClientLeft, Deadline, Dialogue, Gssapi
from .enveloped import EnvelopedSocket

TELLING = list(dict.fromkeys(REP_OF_ERRNO.values()))        # the most specific REP first
HEADER_BYTES = {0x01: 10, 0x04: 22}                         # of a datagram, by ATYP


class Chain:
    """What one client asks of an upstream.

    client      its connection, watched while it waits
    lookup      the addresses of the upstream's name, by the deadline
    source      our address towards the upstream, by --out; None: the system chooses
    deadline    of monotonic(); inf: none
    own_ports   that we listen on: the upstream must not be this server
    reached     the upstream's address, once we are connected to it
    asked       the host of the last request
    """

    def __init__(self, upstream: Upstream, client: socket.socket, lookup: Callable[[Host], Sequence[IP]],
                 source: Source, deadline: float, own_ports: Container[int]) -> None:
        self.upstream = upstream
        self.client = client
        self.lookup = lookup
        self.source = source
        self.deadline = deadline
        self.own_ports = own_ports
        self.reached: Optional[Endpoint] = None
        self.asked: Optional[Host] = None

    def connect(self, hosts: Sequence[Host], port: int) -> Tuple[Dialogue, Address]:
        """Connect to the first of `hosts` that the upstream reaches: the dialogue, and BND of the reply."""
        failures: List[RequestRefused] = []
        for host in hosts:
            try:
                return self.ask(Cmd.CONNECT, Address(host, port))
            except RequestRefused as exc:
                failures.append(exc)
                if exc.rep not in TELLING:                  # the next address would fare no better
                    break
        raise min(failures, key=lambda exc: TELLING.index(exc.rep) if exc.rep in TELLING else len(TELLING))

    def bind(self, host: Host, port: int, permit: Callable[[IP], bool]) -> UpstreamWait:
        """Have the upstream listen for this peer; 0.0.0.0: for any that `permit` allows."""
        dialogue, bnd = self.ask(Cmd.BIND, Address(host, port))
        return UpstreamWait(self, dialogue, dialogue.reachable(bnd), host, permit)

    def associate(self) -> Link:
        """An association with the upstream, for as long as the Link is open."""
        dialogue, bnd = self.ask(Cmd.UDP_ASSOCIATE, UNSPECIFIED)
        try:
            relay = dialogue.reachable(bnd)
            if isinstance(relay.host, bytes):
                raise ProxyError("the proxy's relay has a name and no address: %s" % str(relay))
            return Link(self.upstream, dialogue, Endpoint(relay.host, relay.port), self.source(relay.host))
        except OSError as exc:
            dialogue.sock.close()
            raise self.refusal(exc) from None

    def ask(self, cmd: Cmd, dst: Address) -> Tuple[Dialogue, Address]:
        """Connect to the upstream, log in and send a request: the dialogue, and BND of the first reply."""
        self.asked = dst.host
        sock = self.dial()
        try:
            tune(sock)
            deadline = Deadline(None)
            deadline.at = self.deadline
            dialogue = Dialogue(sock, deadline, self.client)
            service = self.upstream.service
            dialogue.negotiate(self.upstream.user, Gssapi(service) if service else None, cmd != Cmd.UDP_ASSOCIATE)
            return dialogue, dialogue.ask(cmd, dst)
        except BaseException as exc:
            sock.close()
            if isinstance(exc, OSError) and not isinstance(exc, ClientLeft):
                raise self.refusal(exc) from None
            raise

    def dial(self) -> socket.socket:
        """Connect to the upstream. Raises RequestRefused X'01'; ConnectionResetError when the client has left."""
        upstream = self.upstream
        try:
            addresses = self.lookup(normalise(upstream.host.encode("ascii")))
            if upstream.port in self.own_ports:
                addresses = [address for address in addresses if not is_here(address)]
                if not addresses:
                    raise RequestRefused(Rep.GENERAL_FAILURE, "that is this server itself")
            sock, ip = connect(addresses, upstream.port, self.deadline, self.client, self.source)
        except RequestRefused as exc:                       # its REP is about the upstream, not about the destination
            raise RequestRefused(Rep.GENERAL_FAILURE, "%s: %s" % (upstream, exc.why)) from None
        self.reached = Endpoint(ip, upstream.port)
        return sock

    def refusal(self, error: OSError) -> RequestRefused:
        """What the client is told of an error in the dialogue."""
        rep, why = Rep.GENERAL_FAILURE, "no reply in time" if isinstance(error, socket.timeout) else name_of(error)
        if isinstance(error, ProxyError):
            why = str(error)
            if error.rep is not None and error.rep <= Rep.ADDRESS_TYPE_NOT_SUPPORTED:
                rep = Rep(error.rep)
        return RequestRefused(rep, "%s: %s" % (self.upstream, why))


class UpstreamWait(PeerWait):
    """A BIND of the upstream between its two replies. In place of a listener, as bind.Rendezvous is.

    bnd     where the upstream listens
    """

    def __init__(self, chain: Chain, dialogue: Dialogue, bnd: Address, expected: Host,
                 permit: Callable[[IP], bool]) -> None:
        super().__init__(chain.client)
        self.chain = chain
        self.dialogue: Dialogue = dialogue
        self.awaited = dialogue.sock
        self.any_peer = not isinstance(expected, bytes) and expected.is_unspecified
        self.permit = permit
        self.bnd = bnd
        self.accepted = False

    def wait(self, timeout_s: float) -> Tuple[socket.socket, Place]:
        """The second reply may have come along with the first: then the socket would not be readable again."""
        if self.dialogue.held:
            self.deadline = monotonic() + (timeout_s or float("inf"))
            return self.accept()
        return super().wait(timeout_s)

    def __exit__(self, *_: object) -> None:
        if not self.accepted:
            self.awaited.close()

    def accept(self) -> Tuple[socket.socket, Address]:
        """Read the second reply. Raises RequestRefused, X'02' for a peer that our rules deny."""
        self.dialogue.deadline.at = self.deadline
        try:
            peer = self.dialogue.reply()
        except ClientLeft:
            raise
        except OSError as exc:
            raise self.chain.refusal(exc) from None
        if self.any_peer and (isinstance(peer.host, bytes) or not self.permit(peer.host)):
            raise RequestRefused(Rep.NOT_ALLOWED, "%s: peer %s is denied by our rules" % (self.chain.upstream, peer))
        self.accepted = True
        return self.awaited, peer


class Link:
    """An association with an upstream: a socket for datagrams, and the TCP connection that keeps it open.

    relay   the upstream's address for datagrams; those of other senders are dropped
    """

    def __init__(self, upstream: Upstream, dialogue: Dialogue, relay: Endpoint, source: Optional[IP]) -> None:
        self.upstream = upstream
        self.control = dialogue.sock
        self.control.setblocking(False)
        self.relay: Sockaddr = (str(relay.ip), relay.port)
        self.sock: Any = bound(family_of(relay.ip), str(source) if source else "", ANY_PORT)
        if dialogue.envelope:
            self.sock = EnvelopedSocket(self.sock, dialogue.envelope, str(relay.ip))

    def alive(self) -> bool:
        """Whether the upstream keeps the association open, asked when `control` is readable."""
        try:
            return bool(self.control.recv(4096))
        except (BlockingIOError, InterruptedError):
            return True
        except OSError:
            return False

    def receive(self, buffer: bytearray, dropped: "Counter[str]") -> Iterator[Tuple[List[bytes], int]]:
        """A burst of datagrams, each behind its header: runs of one size, and the size of the payload."""
        run: List[bytes] = []
        length, left = 0, BURST_BYTES
        for _ in range(BURST):
            try:
                size, sender = self.sock.recvfrom_into(buffer)
            except (BlockingIOError, InterruptedError):
                break
            except OSError as exc:
                dropped[name_of(exc)] += 1
                continue
            raw = bytes(buffer[:size])
            header = header_bytes(raw)
            if sender[:2] != self.relay:
                dropped["not the upstream"] += 1
                continue
            if not header:
                dropped["bad header from the upstream"] += 1
                continue
            if run and (size != len(run[0]) or size - header != length):
                yield run, length
                run = []
            run.append(raw)
            length, left = size - header, left - size
            if left < 0:
                break
        if run:
            yield run, length

    def send(self, datagram: Datagram, host: Host) -> Tuple[bytes, Tuple[socket.socket, Sockaddr, int]]:
        """Send a client's datagram to `host`: its header, and the way of further ones with this header."""
        header = Datagram(Address(host, datagram.dst.port), b"").pack()
        self.sock.sendto(header + datagram.data, self.relay)
        return header, (self.sock, self.relay, len(header))

    def close(self) -> None:
        self.sock.close()
        self.control.close()


class Links(Dict[str, Link]):
    """The links of one client, by the upstream's name. `failures` says why others have none."""

    def __init__(self, chain: Optional[Callable[[Upstream], Chain]] = None,
                 ways: Sequence[Optional[Upstream]] = ()) -> None:
        """Associate with each of `ways`; None stands for datagrams that we send ourselves. Raises RequestRefused when
        no way is left."""
        super().__init__()
        refusals: List[RequestRefused] = []
        for upstream in ways:
            try:
                if chain and upstream:
                    self[upstream.name] = chain(upstream).associate()
            except RequestRefused as exc:
                refusals.append(exc)
            except BaseException:
                self.close()
                raise
        if refusals and len(refusals) == len(ways):
            raise refusals[0]
        self.failures = [exc.why for exc in refusals]

    def also(self, summary: str) -> str:
        """Add to `summary`, for the log, why upstreams have no link."""
        return "; ".join(filter(None, (summary, *self.failures)))

    def close(self) -> None:
        for link in self.values():
            link.close()


def header_bytes(datagram: bytes) -> int:
    """The size of a datagram's header, up to DATA; 0 when it is none.                              RFC 1928 §7"""
    if len(datagram) < 5:
        return 0
    size = 7 + datagram[4] if datagram[3] == 0x03 else HEADER_BYTES.get(datagram[3], 0)
    return size if size <= len(datagram) else 0
