"""UDP ASSOCIATE: one association, in the thread of the client whose TCP connection holds it open.

One socket faces the client; one per address family faces the world, opened when first needed, so whoever the client
writes to sees the same port, and anybody may answer through it (endpoint-independent mapping, RFC 4787 section 4.1).
One poll loop serves all of them: a datagram that cannot be carried is dropped, counted by reason, and that is all.

The speed lies in what is remembered: the bytes of a header with the socket and address they stand for, and back. A
datagram is received into a buffer with room for a header in front, and sent as a slice of it. RFC 1928 section 7.
"""
from __future__ import annotations

import errno
import socket
from collections import Counter
from functools import partial
from ipaddress import ip_address
from threading import Lock
from time import monotonic
from typing import Any, Callable, Counter as Counts, Dict, List, Optional, Sequence, Tuple, TypeVar

from .config import each_port
from .errors import RequestRefused, name_of, rep_of
from .relay import READ, new_poll
from .resolve import IP, Names, Sockaddr, address_of, advertised, clean, family_of, unmapped
from .wire import Address, Datagram

Route = Tuple[socket.socket, Sockaddr]

NONBLOCK = getattr(socket, "SOCK_NONBLOCK", 0)          # saves a system call where it exists
SOCKET_BYTES = 1 << 20          # what may wait in the kernel; it takes as much of that as it allows (net.core.rmem_max)
BURST = 64                      # datagrams from one socket before the others have their turn
HEADER_BYTES = 22               # the longest header that we write: RSV, FRAG, ATYP, 16 of IPv6, port
DATAGRAM_BYTES = 1 << 16        # more than UDP can carry, so that nothing is ever cut short
BUSY_S = 0.5                    # how long a quiet association keeps its buffer
REMEMBERED = 512                # headers each way
FORGET_S = 30.0                 # for as long a destination is not judged again: rules change, and so do names
REASSEMBLY_S = 5.0              # RFC 1928 §7: the REASSEMBLY TIMER is no less
LAST = 0x80                     # the bit of FRAG that ends a sequence
WAITING_NAMES = 8               # of one association, so that others have lookups left,
WAITING_DATAGRAMS = 64          # and what may wait for them
WAITING_BYTES = 1 << 18


class Fragments:
    """The datagram that is on its way in pieces. A piece that does not continue it drops it.         RFC 1928 §7

    dropped     how many pieces were
    """

    def __init__(self) -> None:
        self.pieces: List[bytes] = []
        self.dst: Optional[Address] = None
        self.deadline = float("inf")
        self.dropped = 0

    def drop(self) -> None:
        self.dropped += len(self.pieces)
        self.pieces, self.dst, self.deadline = [], None, float("inf")

    def add(self, piece: Datagram) -> Optional[Datagram]:
        """The whole datagram, if this was its last piece."""
        position, now = piece.frag & ~LAST, monotonic()
        if position != len(self.pieces) + 1 or piece.dst != self.dst or now >= self.deadline:
            self.drop()
            if position != 1:                   # a piece is missing: nobody would know what the rest meant
                self.dropped += 1
                return None
            self.dst, self.deadline = piece.dst, now + REASSEMBLY_S
        self.pieces.append(piece.data)
        if sum(map(len, self.pieces)) > DATAGRAM_BYTES:
            self.drop()
        elif piece.frag & LAST:
            whole = Datagram(piece.dst, b"".join(self.pieces))
            self.pieces = []
            self.drop()
            return whole
        return None


class Mailbox:
    """Where the threads of Names leave their answers. `readable` is for the poll loop of the thread that takes them."""

    def __init__(self) -> None:
        self.readable, self._bell = socket.socketpair()
        self._lock = Lock()                     # a lookup may outlive us: nobody rings once we are closed
        self._answers: List[Tuple[bytes, Sequence[IP]]] = []
        self._open = True

    def put(self, name: bytes, addresses: Sequence[IP]) -> None:
        with self._lock:
            if self._open:
                self._answers.append((name, addresses))
                self._bell.send(b"\0")          # never blocks: there are WAITING_NAMES at the most

    def take(self) -> List[Tuple[bytes, Sequence[IP]]]:
        with self._lock:
            self.readable.recv(4096)
            answers, self._answers = self._answers, []
            return answers

    def close(self) -> None:
        with self._lock:
            self._open = False
            self.readable.close()
            self._bell.close()


class Association:
    """The relay between one client and everybody that it writes to.

    control     the TCP connection, whose end is the association's; what arrives on it is read and ignored
    client      datagrams are taken from this address only, and from the port of the first good one
    ports       for all our sockets, as config.each_port takes them
    permit      may a datagram go to this address and port?
    bnd         where the client is to send its datagrams
    up, down    payload bytes relayed
    dropped     datagrams that were not, by reason
    ended_by    "client" or "idle"; `why` is the error that ended it, or ""

    Raises RequestRefused when there is no socket for it.
    """

    def __init__(self, control: socket.socket, client: str, ports: Tuple[int, ...], advertise: Sequence[str],
                 names: Names, permit: Callable[[IP, int], bool]) -> None:
        self.control = control
        self.client = client
        self.ports = ports
        self.names = names
        self.permit = permit
        self.up = self.down = 0
        self.dropped: Counts[str] = Counter()
        self.ended_by = self.why = ""
        self._peer: Any = None                               # the client, once its port is known
        self._routes: Dict[bytes, Route] = {}               # by the header that leads there
        self._headers: Dict[Sockaddr, bytes] = {}           # by the remote that they name
        self._forget_at = 0.0
        self._fragments = Fragments()
        self._waiting: Dict[bytes, List[Datagram]] = {}     # by the name whose addresses they wait for
        self._mailbox: Optional[Mailbox] = None
        self._outside: Dict[int, socket.socket] = {}        # by family
        self._buffer = bytearray()
        self._view = memoryview(b"")
        self._moved = False
        self._serve: Dict[int, Callable[[], None]] = {control.fileno(): self._from_control}
        self._poll = new_poll()
        self._poll.register(control.fileno(), READ)
        host, _port, *scope = control.getsockname()
        here = unmapped(ip_address(host.partition("%")[0]))
        try:
            self._inside = self._open(family_of(here), str(here), scope if here.version == 6 else ())
        except OSError as exc:
            raise RequestRefused(rep_of(exc), "no socket for the client's datagrams: %s" % exc) from None
        self._watch(self._inside, self._from_client)
        self.bnd = Address(advertised(advertise, here), self._inside.getsockname()[1])

    def __enter__(self) -> Association:
        return self

    def __exit__(self, *_: object) -> None:
        self._inside.close()
        for sock in self._outside.values():
            sock.close()
        if self._mailbox:
            self._mailbox.close()

    def run(self, idle_s: float) -> None:
        """Relay until the client is gone, or nothing went through for idle_s (0: for ever)."""
        self.control.setblocking(False)
        last = now = monotonic()
        while not self.ended_by:
            until = min(last + (idle_s or float("inf")), self._fragments.deadline,
                        now + BUSY_S if self._buffer else float("inf"))
            ready = self._poll.poll(None if until == float("inf") else max(0.0, until - now) * 1000 + 1)
            now = monotonic()
            if ready and not self._buffer:
                self._buffer = bytearray(HEADER_BYTES + DATAGRAM_BYTES)
                self._view = memoryview(self._buffer)
            if now >= self._forget_at:
                self._routes.clear()
                self._forget_at = now + FORGET_S
            for fd, _events in ready:
                self._serve[fd]()
            if self._moved:
                last, self._moved = now, False
            elif not ready:
                self._rest(now, last + (idle_s or float("inf")))

    def _rest(self, now: float, idle_at: float) -> None:
        """Nothing came: what is not needed any more?"""
        self._view, self._buffer = memoryview(b""), bytearray()
        if now >= self._fragments.deadline:
            self._fragments.drop()
        if now >= idle_at:
            self.ended_by = "idle"

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
        """What the client sends. Whatever leads where the one before went does so without being looked at again."""
        buffer, view, receive, routes = self._buffer, self._view, self._inside.recvfrom_into, self._routes
        header, start = b"", len(buffer)
        for _ in range(BURST):
            try:
                size, sender = receive(buffer)
            except (BlockingIOError, InterruptedError):
                return
            except OSError as exc:                          # an answer to what we sent: its port is closed, say
                self.dropped[name_of(exc)] += 1
                continue
            if sender != self._peer and (self._peer or sender[0] != self.client):
                self.dropped["not the client"] += 1
                continue
            self._moved = True
            if size < start or not buffer.startswith(header):
                start = 10 if buffer[3] == 0x01 else 22 if buffer[3] == 0x04 else 7 + buffer[4]
                header = bytes(view[:start])
                if size < start or header not in routes:
                    header, start = b"", len(buffer)
                    self._look_at(bytes(view[:size]), sender)
                    continue
                sock, address = routes[header]
            try:
                sock.sendto(view[start:size], address)
                self.up += size - start
            except OSError as exc:
                self.dropped[name_of(exc)] += 1

    def _from_remote(self, sock: socket.socket) -> None:
        """What anybody sends to the client's port out there."""
        buffer, view, receive, send = self._buffer, self._view, sock.recvfrom_into, self._inside.sendto
        body, before, start = view[HEADER_BYTES:], None, 0
        for _ in range(BURST):
            try:
                size, sender = receive(body)
            except (BlockingIOError, InterruptedError):
                return
            except OSError as exc:
                self.dropped[name_of(exc)] += 1
                continue
            if sender != before:
                header = self._headers.get(sender) or self._header_of(sender)
                start, before = HEADER_BYTES - len(header), sender
                buffer[start:HEADER_BYTES] = header
            try:
                send(view[start:HEADER_BYTES + size], self._peer)
                self.down += size
                self._moved = True
            except OSError as exc:
                self.dropped[name_of(exc)] += 1

    def _from_mailbox(self) -> None:
        for name, addresses in self._mailbox.take() if self._mailbox else ():
            for datagram in self._waiting.pop(name, ()):
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
        host = datagram.dst.host
        try:
            host = clean(host) if isinstance(host, bytes) else host
            if isinstance(host, bytes):
                self._send_to_name(host, datagram)
            else:
                self._send(datagram, [unmapped(host)])
        except RequestRefused:
            self.dropped["unresolved"] += 1

    def _send_to_name(self, name: bytes, datagram: Datagram) -> None:
        """Now, if its addresses are known; else when they are. Raises RequestRefused."""
        waiting = self._waiting.get(name)
        if waiting is None:
            if len(self._waiting) >= WAITING_NAMES:
                self.dropped["too many names"] += 1
                return
            if not self._mailbox:
                self._mailbox = Mailbox()
                self._watch(self._mailbox.readable, self._from_mailbox)
            addresses = self.names.ask(name, self._mailbox.put)
            if addresses is not None:
                self._send(datagram, addresses)
                return
            waiting = self._waiting.setdefault(name, [])
        held = [len(other.data) for others in self._waiting.values() for other in others]
        if len(held) < WAITING_DATAGRAMS and sum(held) + len(datagram.data) <= WAITING_BYTES:
            waiting.append(datagram)
        else:
            self.dropped["waiting for a name"] += 1

    def _send(self, datagram: Datagram, addresses: Sequence[IP]) -> None:
        """To the first address that takes it, which its header then stands for."""
        reason, port = "unresolved", datagram.dst.port
        for address in addresses:
            if not self.permit(address, port):
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
        header = Datagram(address_of(sender), b"").pack()
        remember(self._headers, sender, header)
        return header

    # ---- sockets ----------------------------------------------------------------------------------------------------

    def _toward(self, family: int) -> socket.socket:
        """The socket for one family of remotes. Raises OSError when there can be none."""
        if family not in self._outside:
            sock = self._open(family, "", ())
            self._outside[family] = sock
            self._watch(sock, partial(self._from_remote, sock))
        return self._outside[family]

    def _open(self, family: int, host: str, more: Sequence[Any]) -> socket.socket:
        """A socket bound to `host` ("": any) and one of our ports. Raises OSError."""
        sock = socket.socket(family, socket.SOCK_DGRAM | NONBLOCK)
        try:
            if not NONBLOCK:
                sock.setblocking(False)
            for option in (socket.SO_RCVBUF, socket.SO_SNDBUF):
                try:
                    sock.setsockopt(socket.SOL_SOCKET, option, SOCKET_BYTES)
                except OSError:                             # BSD refuses what Linux cuts down
                    pass
            if family == socket.AF_INET6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            error = OSError()
            for port in each_port(self.ports):
                try:
                    sock.bind((host, port, *more))
                    return sock
                except OSError as exc:
                    error = exc
                    if exc.errno != errno.EADDRINUSE:
                        break
            raise error
        except OSError:
            sock.close()
            raise

    def _watch(self, sock: socket.socket, serve: Callable[[], None]) -> None:
        self._serve[sock.fileno()] = serve
        self._poll.register(sock.fileno(), READ)


K = TypeVar("K")
V = TypeVar("V")


def remember(table: Dict[K, V], key: K, value: V) -> None:
    """The oldest makes room."""
    while len(table) >= REMEMBERED:
        del table[next(iter(table))]
    table[key] = value
