"""UDP ASSOCIATE: one association, in the thread of the client whose TCP connection holds it open.

One socket faces the client; one per address family faces the world, opened when first needed, so whoever the client
writes to sees the same port, and anybody may answer through it (endpoint-independent mapping, RFC 4787 section 4.1).
One poll loop serves all of them: a datagram that cannot be carried is dropped, counted by reason, and that is all.
The speed lies in what is remembered, the bytes of a header with the socket and address they stand for, and back; and in
datagrams.py. A datagram is sent as a slice of the buffer that received it, less or plus a header. RFC 1928 section 7.
"""
from __future__ import annotations

import socket
from collections import Counter
from functools import partial
from time import monotonic
from typing import Any, Callable, Counter as Counts, Dict, List, Optional, Sequence, Tuple, TypeVar

from .datagrams import BURST, BURST_BYTES, DATAGRAM_BYTES, bound, send
from ..protocol.errors import RequestRefused, name_of, rep_of
from ..protocol.fields import Host
from .fragments import Fragments
from ..net.addresses import advertised, endpoint_of, family_of, IP, ip_of, Sockaddr, unmapped, Endpoint
from ..net.resolver import Busy, Names, Waiting, clean
from ..net.poller import READ, new_poll
from ..protocol.messages import Address, Datagram

Route = Tuple[socket.socket, Sockaddr]
K = TypeVar("K")
V = TypeVar("V")

HEADER_BYTES = 22               # the longest header that we write: RSV, FRAG, ATYP, 16 of IPv6, port
BUSY_S = 0.5                    # how long a quiet association keeps its buffer
REMEMBERED = 512                # headers each way
FORGET_S = 30.0                 # how long a name stands for the same address
FOREVER = float("inf")


class Association:
    """The relay between one client and everybody that it writes to.

    control     the TCP connection, whose end is the association's; what arrives on it is read and ignored
    client      datagrams are taken from this address only, and from the port of the first good one
    ports       for all our sockets, as config.each_port takes them
    permit      may a datagram go to this address and port, which its header called so? None: before it is looked up
    rules       what this is judged by: when that is another thing than before, everything is judged again
    bnd         where the client is to send its datagrams
    up, down    payload bytes relayed
    dropped     datagrams that were not, by reason
    ended_by    "client" or "idle"; `why` is the error that ended it, or ""

    Raises RequestRefused when there is no socket for it.
    """

    def __init__(self, control: socket.socket, client: str, ports: Tuple[int, ...], advertise: Sequence[str],
                 names: Names, permit: Callable[[Optional[IP], int, Host], bool],
                 rules: Callable[[], object] = lambda: None,
                 overhear: Optional[Callable[[socket.socket], socket.socket]] = None) -> None:
        self.control = control
        self.client = client
        self.ports = ports
        self.names = names
        self.permit = permit
        self.rules = rules
        self._judged_by = rules()
        self.up = self.down = 0
        self.dropped: Counts[str] = Counter()
        self.ended_by = self.why = ""
        self._peer: Any = None                               # the client, once its port is known
        self._routes: Dict[bytes, Route] = {}               # by the header that leads there
        self._headers: Dict[Sockaddr, bytes] = {}           # by the remote that they name
        self._forget_at = self.moved_at = 0.0
        self._fragments = Fragments()
        self._waiting: Optional[Waiting[Datagram]] = None
        self._outside: Dict[int, socket.socket] = {}        # by family
        self._buffer = bytearray()
        self._view = memoryview(b"")
        self._moved = False
        self._serve: Dict[int, Callable[[], None]] = {}
        self._poll = new_poll()
        self._watch(control, self._from_control)
        sockaddr = control.getsockname()
        here = ip_of(sockaddr)
        try:
            self._inside = bound(family_of(here), str(here), ports, sockaddr[2:] if here.version == 6 else ())
        except OSError as exc:
            raise RequestRefused(rep_of(exc), "no socket for the client's datagrams: %s" % exc) from None
        if overhear:                                        # trace.py's
            self._inside = overhear(self._inside)
        self._watch(self._inside, self._from_client)
        self.bnd = Endpoint(advertised(advertise, here), self._inside.getsockname()[1])

    def __enter__(self) -> Association:
        return self

    def __exit__(self, *_: object) -> None:
        for opened in (self._inside, *self._outside.values(), self._waiting):
            if opened:
                opened.close()

    def run(self, idle_s: float) -> None:
        """Relay until the client is gone, or nothing went through for idle_s (0: for ever)."""
        self.control.setblocking(False)
        now = monotonic()
        idle_at = now + (idle_s or FOREVER)
        while not self.ended_by:
            until = min(idle_at, self._fragments.deadline, now + BUSY_S if self._buffer else FOREVER)
            ready = self._poll.poll(None if until == FOREVER else max(0.0, until - now) * 1000 + 1)
            now = monotonic()
            if ready and not self._buffer:
                self._buffer = bytearray(BURST_BYTES + HEADER_BYTES + DATAGRAM_BYTES)
                self._view = memoryview(self._buffer)
            if now >= self._forget_at or self.rules() is not self._judged_by:
                self._routes.clear()
                self._forget_at, self._judged_by = now + FORGET_S, self.rules()
            for fd, _events in ready:
                self._serve[fd]()
            if self._moved:
                idle_at, self._moved, self.moved_at = now + (idle_s or FOREVER), False, now
            elif now >= idle_at:
                self.ended_by = self.ended_by or "idle"
            if now >= self._fragments.deadline:
                self._fragments.drop()
            if not ready:
                self._view, self._buffer = memoryview(b""), bytearray()

    def summary(self) -> str:
        """What was dropped, in words; "" if nothing was."""
        counts = self.dropped + Counter({"fragment": self._fragments.dropped})
        return "dropped: " + ", ".join("%d %s" % (n, reason) for reason, n in counts.most_common()) if counts else ""

    # ---- the loop's turns: one for each kind of socket --------------------------------------------------------------

    def _from_control(self) -> None:
        try:
            if not self.control.recv(4096):
                self.ended_by = "client"
        except (BlockingIOError, InterruptedError):
            pass
        except OSError as exc:
            self.ended_by, self.why = "client", exc.strerror or str(exc)

    def _from_client(self) -> None:
        """A burst of the client's. Whatever leads where the one before went is not looked at again."""
        buffer, view, receive, routes = self._buffer, self._view, self._inside.recvfrom_into, self._routes
        header, start, length, at = b"", DATAGRAM_BYTES, 0, 0
        run: List[memoryview] = []
        route = to = None
        for _ in range(BURST):
            try:
                size, sender = receive(view[at:])
            except (BlockingIOError, InterruptedError):
                break
            except OSError as exc:                          # an answer to what we sent: nobody listens there, say
                self.dropped[name_of(exc)] += 1
                continue
            if sender != self._peer and (self._peer or sender[0] != self.client):
                self.dropped["not the client"] += 1
                continue
            self._moved = True
            if size < start or not buffer.startswith(header, at):
                start = 10 if buffer[at + 3] == 0x01 else 22 if buffer[at + 3] == 0x04 else 7 + buffer[at + 4]
                header = bytes(view[at:at + start])
                route = routes.get(header) if size >= start else None
                if not route:
                    start = DATAGRAM_BYTES
                    self._up(run, to)                       # what came before leaves before
                    run = []
                    self._look_at(bytes(view[at:at + size]), sender)
                    continue
            if run and (size - start != length or route is not to):
                self._up(run, to)
                run = []
            run.append(view[at + start:at + size])
            to, length, at = route, size - start, at + size
            if at > BURST_BYTES:
                break
        self._up(run, to)

    def _up(self, run: List[memoryview], to: Optional[Route]) -> None:
        if run and to:
            self.up += send(to[0], run, to[1], self.dropped) * len(run[0])

    def _from_remote(self, sock: socket.socket) -> None:
        """A burst of what anybody sends to the client's port out there."""
        buffer, view, receive, headers = self._buffer, self._view, sock.recvfrom_into, self._headers
        before, header, room, length, at = None, b"", 0, 0, 0
        run: List[memoryview] = []
        for _ in range(BURST):
            body = at + HEADER_BYTES
            try:
                size, sender = receive(view[body:])
            except (BlockingIOError, InterruptedError):
                break
            except OSError as exc:
                self.dropped[name_of(exc)] += 1
                continue
            if run and size != length:
                self._down(run, length)
                run = []
            if sender != before:
                header = headers.get(sender) or self._header_of(sender)
                before, room = sender, len(header)
            buffer[body - room:body] = header
            run.append(view[body - room:body + size])
            length, at = size, body + size
            if at > BURST_BYTES:
                break
        self._down(run, length)

    def _down(self, run: List[memoryview], length: int) -> None:
        if run:
            sent = send(self._inside, run, self._peer, self.dropped)
            self.down += sent * length
            self._moved = self._moved or sent > 0

    def _from_names(self) -> None:
        for datagram, addresses in self._waiting.take() if self._waiting else ():
            self._send(datagram, addresses)

    # ---- what is not remembered -------------------------------------------------------------------------------------

    def _look_at(self, raw: bytes, sender: Sockaddr) -> None:
        """A datagram of the client's whose header is new, or none."""
        try:
            datagram: Optional[Datagram] = Datagram.parse(raw)
        except (EOFError, RequestRefused):
            self.dropped["bad header"] += 1
            return
        self._peer = sender
        if datagram and datagram.frag:
            datagram = self._fragments.add(datagram)
        if not datagram:
            return
        try:
            addresses = self._addresses(datagram)
        except RequestRefused:                              # not a name at all
            addresses = ()
        except Busy:
            self.dropped["waiting for a name"] += 1
            return
        except OSError as exc:                              # no descriptors left for waiting
            self.dropped[name_of(exc)] += 1
            return
        if addresses is not None:
            self._send(datagram, addresses)

    def _addresses(self, datagram: Datagram) -> Optional[Sequence[IP]]:
        """Where it may go; or None, and it waits for a name. Raises RequestRefused, Busy, OSError."""
        host = datagram.dst.host
        if isinstance(host, bytes):
            host = clean(host)
        if not isinstance(host, bytes):
            return [unmapped(host)]
        if not self.permit(None, datagram.dst.port, host):
            self.dropped["not allowed"] += 1
            return None
        if not self._waiting:
            self._waiting = Waiting(self.names)
            self._watch(self._waiting.readable, self._from_names)
        return self._waiting.ask(host, datagram, len(datagram.data))

    def _send(self, datagram: Datagram, addresses: Sequence[IP]) -> None:
        """To the first address that takes it, which its header then stands for."""
        reason, port = "unresolved", datagram.dst.port
        for address in addresses:
            if not self.permit(address, port, datagram.dst.host):
                reason = "not allowed"
                continue
            try:
                route = self._toward(family_of(address)), (str(address), port)
                route[0].sendto(datagram.data, route[1])
            except OSError as exc:
                reason = name_of(exc)
                continue
            self.up += len(datagram.data)
            remember(self._routes, Datagram(datagram.dst, b"").pack(), route)
            return
        self.dropped[reason] += 1

    def _header_of(self, sender: Sockaddr) -> bytes:
        header = Datagram(Address(*endpoint_of(sender)), b"").pack()
        remember(self._headers, sender, header)
        return header

    def _toward(self, family: int) -> socket.socket:
        """The socket for one family of remotes. Raises OSError when there can be none."""
        sock = self._outside.get(family)
        if not sock:
            sock = self._outside[family] = bound(family, "", self.ports)
            self._watch(sock, partial(self._from_remote, sock))
        return sock

    def _watch(self, sock: socket.socket, serve: Callable[[], None]) -> None:
        self._serve[sock.fileno()] = serve
        self._poll.register(sock.fileno(), READ)


def remember(table: Dict[K, V], key: K, value: V) -> None:
    """The oldest makes room."""
    while len(table) >= REMEMBERED:
        del table[next(iter(table))]
    table[key] = value
