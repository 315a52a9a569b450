"""UDP ASSOCIATE: relay the datagrams of one association. It never blocks: the relay loop runs it, without a thread.

One socket faces the client, one for each address family the remotes: all of them see the client at the same port, and
any may answer (endpoint-independent mapping, RFC 4787 section 4.1). What cannot be relayed is dropped and counted.

Headers are remembered with the socket and address that they stand for, so that the next datagram to the same place is
neither parsed nor judged again; a change of the rules clears that. All associations share a buffer; to copy a datagram
out of it takes less time than to keep a view of it. A datagram that stands alone is received without asking for another
behind it. RFC 1928 section 7.
"""
from __future__ import annotations

import socket
from collections import Counter
from math import inf
from typing import Any, Callable, Counter as Counts, Dict, List, Optional, Sequence, Tuple

from ..net.addresses import Endpoint, IP, Sockaddr, advertised, endpoint_of, ip_of, subscriber
from ..net.lookups import Busy, Names, Waiting
from ..net.resolver import normalise
from ..net.shares import Ports
from ..protocol.envelope import Envelope
from ..protocol.errors import RequestRefused, name_of
from ..protocol.fields import Host
from ..protocol.messages import Address, Datagram
from ..protocol.trace import DOWN, UP
from ..relay.bucket import NEVER, HeldBack
from ..relay.pipe import DONTWAIT
from ..relay.relay import Relay
from ..values import Upstream
from .datagrams import BURST, BURST_BYTES, DATAGRAM_BYTES, Run, Sockets, remember, send
from .enveloped import EnvelopedSocket
from .fragments import Fragments
from .rates import DOWN as DOWN_WAY, UP as UP_WAY, Police
from .upstream import Link, Links

Route = Tuple[socket.socket, Sockaddr, int, str]     # header bytes that go along: to an upstream, all; the rule's place
Way = Callable[[Optional[IP], int, Host], Optional[Upstream]]
OnDatagram = Callable[[str, bytes, Sockaddr], None]

BEYOND = "beyond the rate"
LOOKS = 4                       # new headers to parse and judge in one burst; with many rules each takes milliseconds
FORGET_S = 30.0                 # how long a name stands for the same address
ALONE_S = 0.001                 # a datagram that comes so long after the one before: no burst is expected
BUFFERS: List[bytearray] = []   # to receive in, that no thread uses now: one, where the relay loop has all associations


class Association(Relay):
    """The relay between one client and the remotes that it sends to. Raises RequestRefused without a socket or port.

    control      the TCP connection, whose end is the association's; what arrives on it is read and ignored
    client       the client's address: datagrams are taken from there only, and from the port of the first good one
    ports        for all our sockets
    permit       may a datagram go to this address and port? The host is that of its header, normalised; without an
                 address: may the name be looked up?
    rules        what `permit` judges by: when that is another object than before, everything is judged again
    on_datagram  called with trace.UP or trace.DOWN, each datagram between client and association, and the client's
                 socket address
    out          our addresses towards the remotes, by --out
    links        associations with upstreams, whose sockets we read and close
    way          through which upstream does a datagram go? None: we send it; without an address: we resolve the name
    envelope     that of the client's datagrams, if they have one
    police       which datagrams are within the rate limits; made anew when the rules are others
    idle_s       seconds without a datagram after which it ends, 0 for never
    bnd          where the client is to send its datagrams
    up, down     payload bytes relayed, and `datagrams`: [up, down]
    dropped      datagrams that were not, by reason
    ended_by     "client", "remote" or "idle"; or why it was aborted
    """

    __slots__ = ("control", "client", "names", "permit", "rules", "on_datagram", "links", "way", "police", "idle_s",
                 "bnd", "up", "down", "datagrams", "dropped", "_judged_by", "_hire", "_peer", "_routes", "_headers",
                 "_fds", "_forget_at", "_fragments", "_waiting", "_waker", "_sockets", "_inside", "_facing", "_linked",
                 "_now", "_last_up", "_last_down")

    def __init__(self, control: socket.socket, client: IP, ports: Ports, advertise: Sequence[str],
                 names: Names, permit: Callable[[Optional[IP], int, Host], bool],
                 rules: Callable[[], object] = lambda: None, on_datagram: Optional[OnDatagram] = None,
                 out: Sequence[str] = (), links: Optional[Links] = None, way: Optional[Way] = None,
                 envelope: Optional[Envelope] = None, police: Callable[[], Optional[Police]] = lambda: None,
                 idle_s: float = 0, session: Any = None) -> None:
        super().__init__(session, subscriber(client))
        self.control = control
        self.client = str(client)
        self.names = names
        self.permit = permit
        self.rules = rules
        self.on_datagram = on_datagram
        self.links, self.way = links, way
        self.idle_s = idle_s
        self._judged_by = rules()
        self._hire, self.police = police, police()
        self.up, self.down, self.datagrams = 0, 0, [0, 0]
        self.dropped: Counts[str] = Counter()
        self._peer: Any = None                              # the client's socket address, once its port is known
        self._routes: Dict[bytes, Route] = {}               # by the header that leads there
        self._headers: Dict[Sockaddr, bytes] = {}           # by the remote that they name
        self._forget_at = self._now = self._last_up = self._last_down = 0.0
        self._fragments: Optional[Fragments] = None
        self._waiting: Optional[Waiting[Tuple[Datagram, Host]]] = None
        self._waker: Callable[[Relay], object] = lambda _relay: None
        self._fds: List[int] = []                           # of all that is read
        self._sockets = sockets = Sockets(control, client, self.owner, ports, out, self._fds.append)
        self._inside: Any = EnvelopedSocket(sockets.inside, envelope, self.client) if envelope else sockets.inside
        self._facing = self._inside.fileno()
        self._linked = {sock.fileno(): link for link in (links or {}).values() for sock in (link.sock, link.control)}
        self._fds += [control.fileno(), self._facing, *self._linked]
        here = self._inside.getsockname()
        self.bnd = Endpoint(advertised(advertise, ip_of(here)), here[1])

    def sockets(self) -> Tuple[socket.socket, ...]:
        return (self.control,)

    def fds(self) -> List[int]:
        return self._fds

    def woken_by(self, waker: Callable[[Relay], object]) -> None:
        self._waker = waker

    def moved(self) -> Tuple[int, int]:
        return self.up, self.down

    def held_back(self) -> HeldBack:
        police = self.police                                # the loop may take it away meanwhile
        return police.held_back() if police else NEVER

    def close(self) -> None:
        self._sockets.close()
        if self.links:
            self.links.close()
        if self._waiting:
            self._waiting.close()
        if self.police:
            self.police.close()

    def handle(self, fd: int, _events: int, now: float) -> bool:
        """Relay a burst of what has come to one socket."""
        if now >= self._forget_at or self.rules() is not self._judged_by:
            self._judge_anew(now)
        self._now, known = now, len(self._fds)
        try:
            buffer = BUFFERS.pop()
        except IndexError:
            buffer = bytearray(DATAGRAM_BYTES)
        try:
            if fd == self._facing:
                self._from_client(buffer)
            elif fd in self._sockets.outside:
                self._from_remote(self._sockets.outside[fd], buffer)
            elif fd == self.control.fileno():
                self._from_control()
            else:
                self._from_link(self._linked[fd], fd, buffer)
        finally:
            BUFFERS.append(buffer)
        return self.ended or known < len(self._fds)

    def deadline(self) -> float:
        return min(self._idle_at(), self._fragments.deadline if self._fragments else inf)

    def _idle_at(self) -> float:
        return self.moved_at + (self.idle_s or inf)

    def expire(self) -> None:
        if self._fragments and self._fragments.deadline <= self._idle_at():
            self._fragments.drop()
        else:
            self.end("idle")

    def _judge_anew(self, now: float) -> None:
        """Forget which header leads where: the rules are others, or the names that are in headers."""
        self._routes.clear()
        rules = self.rules()
        if rules is not self._judged_by:
            if self.police:
                self.police.close()
            self.police = self._hire()
        self._forget_at, self._judged_by = now + FORGET_S, rules

    def losses(self) -> Counts[str]:
        """How many datagrams were dropped, by reason. Any thread may call."""
        losses = Counter(self.dropped)                      # copied in one step: the loop may be counting on
        losses["fragment"] = self._fragments.dropped if self._fragments else 0
        return +losses

    def summary(self) -> str:
        """What was dropped, in words, and which upstreams have no link; "" if there is nothing to say."""
        dropped = ", ".join("%d %s" % (n, reason) for reason, n in self.losses().most_common())
        words = dropped and "dropped: " + dropped
        return words if self.links is None else self.links.also(words)

    def _from_control(self) -> None:
        try:
            if not self.control.recv(4096, DONTWAIT):
                self.end(self.aborted or "client")
        except (BlockingIOError, InterruptedError):
            pass
        except OSError as exc:
            self.end("client", exc.strerror or str(exc))

    def _from_client(self, buffer: bytearray) -> None:
        """Receive a burst from the client and send it on. A header that is the same as before is not parsed again."""
        receive, routes, on_datagram, police = self._inside.recvfrom_into, self._routes, self.on_datagram, self.police
        peer, header, start, skip, length, looks, left = self._peer, b"", DATAGRAM_BYTES, 0, 0, 0, BURST_BYTES
        run: List[bytearray] = []
        route: Any = None
        most, self._last_up = 1 if self._now - self._last_up > ALONE_S else BURST, self._now
        for _ in range(most):
            try:
                size, sender = receive(buffer)
            except (BlockingIOError, InterruptedError):
                break
            except OSError as exc:                          # ICMP's answer to what we sent, on some systems
                self.dropped[name_of(exc)] += 1
                continue
            if sender != peer and (peer or sender[0] != self.client):
                self.dropped["not the client"] += 1
                continue
            if on_datagram:
                on_datagram(UP, bytes(buffer[:size]), sender)
            if size < start or not buffer.startswith(header):
                self._up(run, route)                        # in the order in which they came
                run, length, self.moved_at = [], size, self._now    # the first of a burst always comes here
                start = 10 if buffer[3] == 0x01 else 22 if buffer[3] == 0x04 else 7 + buffer[4]
                header = bytes(buffer[:start])
                route = routes.get(header) if size >= start else None
                if not route:
                    start = DATAGRAM_BYTES
                    self._look_at(bytes(buffer[:size]), sender)
                    peer, looks = self._peer, looks + 1
                    if looks == LOOKS:                     # with many rules the loop would hang here
                        break
                    continue
                skip = start - route[2]
            if police and not police.passes(UP_WAY, size - start, route[3]):
                self.dropped[BEYOND] += 1
                continue
            if size != length:
                self._up(run, route)
                run, length = [], size
            run.append(buffer[skip:size])
            left -= size
            if left < 0:
                break
        self._up(run, route)

    def _up(self, run: Run, to: Optional[Route]) -> None:
        if run and to:
            sent = send(to[0], run, to[1], self.dropped)
            self.datagrams[0] += sent
            self.up += sent * (len(run[0]) - to[2])

    def _from_remote(self, sock: socket.socket, buffer: bytearray) -> None:
        """Receive a burst from remotes and send it to the client, each datagram behind the header of its sender."""
        receive, headers, police = sock.recvfrom_into, self._headers, self.police
        before, header, length, left = None, b"", 0, BURST_BYTES
        run: List[bytes] = []
        most, self._last_down = 1 if self._now - self._last_down > ALONE_S else BURST, self._now
        for _ in range(most):
            try:
                size, sender = receive(buffer)
            except (BlockingIOError, InterruptedError):
                break
            except OSError as exc:
                self.dropped[name_of(exc)] += 1
                continue
            if police and not police.passes(DOWN_WAY, size, police.rule_from(sender)):
                self.dropped[BEYOND] += 1
                continue
            if sender != before:
                header = headers.get(sender) or remember(
                    headers, sender, Datagram(Address(*endpoint_of(sender)), b"").pack())
                before = sender
            if size != length:
                self._down(run, length)
                run, length = [], size
            run.append(header + buffer[:size])
            left -= size
            if left < 0:
                break
        self._down(run, length)

    def _from_link(self, link: Link, fd: int, buffer: bytearray) -> None:
        if fd == link.sock.fileno():
            for run, length in link.receive(buffer, self.dropped):
                police = self.police
                if police:
                    came, run = len(run), [one for one in run if police.passes(
                        DOWN_WAY, length, police.rule_of(one[:len(one) - length]))]
                    self.dropped[BEYOND] += came - len(run)
                self._down(run, length)
        elif not link.alive():
            self.end("remote", "%s ended the association" % str(link.upstream))

    def _down(self, run: Run, length: int) -> None:
        if run and not self._peer:
            self.dropped["client not known yet"] += len(run)
        elif run:
            sent = send(self._inside, run, self._peer, self.dropped)
            if self.on_datagram and sent == len(run):
                for datagram in run:
                    self.on_datagram(DOWN, bytes(datagram), self._peer)
            self.datagrams[1] += sent
            self.down += sent * length
            if sent:
                self.moved_at = self._now

    def change_now(self) -> None:
        """The addresses of a name have come."""
        super().change_now()
        for (datagram, host), answer in self._waiting.take() if self._waiting else ():
            self._send(datagram, host, answer.addresses)

    def _look_at(self, raw: bytes, sender: Sockaddr) -> None:
        """Parse a datagram of the client, and send it, or let it wait for its name or its other fragments."""
        try:
            datagram: Optional[Datagram] = Datagram.parse(raw)
        except (EOFError, RequestRefused):
            self.dropped["bad header"] += 1
            return
        self._peer = sender
        if datagram and datagram.frag:
            self._fragments = self._fragments or Fragments()
            datagram = self._fragments.add(datagram)
        if not datagram:
            return
        try:
            host = normalise(datagram.dst.host)
            addresses = self._addresses(datagram, host)
        except RequestRefused:                              # not a name
            self.dropped["unresolved"] += 1
        except Busy:
            self.dropped["waiting for a name"] += 1
        else:
            if addresses is not None:
                self._send(datagram, host, addresses)

    def _addresses(self, datagram: Datagram, host: Host) -> Optional[Sequence[IP]]:
        """Where it may go; None if it waits for its name, or was dropped. Raises Busy."""
        if not isinstance(host, bytes):
            return [host]
        if not self.permit(None, datagram.dst.port, host):
            self.dropped["not allowed"] += 1
            return None
        upstream = self.way and self.way(None, datagram.dst.port, host)
        if upstream:
            rule = self.police.rule_to(None, datagram.dst.port, host) if self.police else ""
            self._send_through(upstream, datagram, host, rule)
            return None
        if not self._waiting:
            self._waiting = Waiting(self.names, self.owner, lambda: self._waker(self))
        answer = self._waiting.ask(host, (datagram, host), len(datagram.data))
        return answer.addresses if answer else None

    def _send(self, datagram: Datagram, host: Host, addresses: Sequence[IP]) -> None:
        """Send it to the first address that may be sent to, for which its header stands from now on."""
        reason, port = "unresolved", datagram.dst.port
        for address in addresses:
            if not self.permit(address, port, host):
                reason = "not allowed"
                continue
            upstream = self.way and self.way(address, port, host)
            rule = self.police.rule_to(address, port, host) if self.police else ""
            if upstream:
                self._send_through(upstream, datagram, address, rule)
                return
            if self.police and not self.police.passes(UP_WAY, len(datagram.data), rule):
                reason = BEYOND
                break
            try:
                route = self._sockets.toward(address), (str(address), port), 0, rule
                route[0].sendto(datagram.data, route[1])
            except OSError as exc:
                reason = name_of(exc)
                continue
            self.datagrams[0] += 1
            self.up += len(datagram.data)
            remember(self._routes, Datagram(datagram.dst, b"").pack(), route)
            return
        self.dropped[reason] += 1

    def _send_through(self, upstream: Upstream, datagram: Datagram, host: Host, rule: str) -> None:
        """Send it to an upstream, and so from now on what has its header, unless that names another host."""
        if self.police and not self.police.passes(UP_WAY, len(datagram.data), rule):
            self.dropped[BEYOND] += 1
            return
        try:
            link = self.links and self.links.get(upstream.name)
            if not link:
                self.dropped["for upstream %s, which relays none" % upstream.name] += 1
                return
            header, route = link.send(datagram, host)
        except OSError as exc:
            self.dropped[name_of(exc)] += 1
        else:
            self.datagrams[0] += 1
            self.up += len(datagram.data)
            if host == datagram.dst.host:
                remember(self._routes, header, (*route, rule))
