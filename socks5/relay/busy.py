"""Relay one connection in the calling thread, which waits for its sockets alone.

`First` is for its first moments, in the thread that has served the client until then. `relay_busy` is for a tunnel with
much to move, in a thread of its own: it sends the bytes through kernel pipes (splice.py). Where there is only select(),
all tunnels are relayed so, and UDP associations by `relay_bursts`.

A busy tunnel moves much at a time, which takes the least CPU; but what wakes up meanwhile on the same CPU waits for
milliseconds. So while relay loops have work (splice.loops_work), it moves less at a time and yields the CPU after each
turn. Measured beside four such tunnels, on two CPUs: of another tunnel's round trips 99 % take about 1 ms, not 6.
"""
from __future__ import annotations

import select
import socket
from time import monotonic
from typing import Any, Callable, Iterator, Optional, Tuple

from ..net.affinity import yield_cpu
from ..net.poller import READ, new_poll
from ..net.wakeup import Wakeup
from .limited import pause
from .pipe import DONTWAIT, Broken
from .relay import Relay, rewatch
from .splice import loops_work
from .tunnel import INCOMING, READS, Tunnel

FIRST_MS = 5                        # how long the first moments wait at a time,
FIRST_TURNS = 16                    # and how often
FIRST_BYTES = 1 << 14               # one read of them; when it is full, there is much to move
FIRST_AVAILABLE = DONTWAIT and hasattr(select, "poll")
QUIET_S = 0.5                       # how often a busy tunnel is looked at:
QUIET_BYTES = 256 * 1024            # if it moved less in that time, it is quiet again and gives its kernel pipes back


class First:
    """The first moments of a connection, relayed by a loop in its plain form. To be read before tunnel.py.

    Read what is ready on one socket, write it to the other, pass EOF on, and end when both sides have said EOF. Most
    connections are short: the thread that has served the client relays so itself, unless many do, which saves a sixth
    of all instructions of such a connection. What takes longer, or is not plain (much to move, a sink that takes no
    more, urgent data, an error), is left to a Tunnel, which goes on where this has stopped.

    up, down    bytes from client to remote and from remote to client
    ended_by    "client" or "remote", which said EOF first; or ""
    over        both have said EOF
    source      the socket of which `held` was read, and not yet written to the other
    broken      the error that ends it
    """

    __slots__ = ("client", "remote", "up", "down", "ended_by", "over", "source", "held", "broken")

    def __init__(self, client: Any, remote: Any) -> None:
        self.client = client
        self.remote = remote
        self.up = 0
        self.down = 0
        self.ended_by = ""
        self.over = False
        self.source: Optional[socket.socket] = None
        self.held = b""
        self.broken: Optional[Broken] = None

    def relay(self) -> None:
        """Return when it is over, or when a Tunnel is to go on."""
        client, remote, poll = self.client, self.remote, new_poll()
        of_client = client.fileno()
        poll.register(of_client, INCOMING)
        poll.register(remote.fileno(), INCOMING)
        for _ in range(FIRST_TURNS):
            ready = poll.poll(FIRST_MS)
            if not ready:
                return
            for fd, events in ready:
                if events not in READS:
                    return
                upward = fd == of_client
                source, sink = (client, remote) if upward else (remote, client)
                try:
                    data = source.recv(FIRST_BYTES, DONTWAIT)
                except BlockingIOError:
                    continue
                except OSError as exc:
                    self.broken = Broken(source, exc)
                    return
                if not data:
                    if self.ended_by:
                        self.over = True
                        return
                    self.ended_by = "client" if upward else "remote"
                    try:
                        sink.shutdown(socket.SHUT_WR)
                    except OSError:                     # it is dead, and will say so
                        pass
                    poll.unregister(fd)
                    continue
                try:
                    sent = sink.send(data, DONTWAIT)
                except BlockingIOError:
                    sent = 0
                except OSError as exc:
                    self.broken = Broken(sink, exc)
                    return
                if upward:
                    self.up += sent
                else:
                    self.down += sent
                if sent < len(data):
                    self.source, self.held = source, data[sent:]
                    return
                if sent == FIRST_BYTES:
                    return

    def go_on(self, tunnel: Tunnel) -> None:
        """Have a new Tunnel go on where this has stopped."""
        for pipe, total, side in zip(tunnel.pipes(), (self.up, self.down), ("client", "remote")):
            pipe.total = total
            if side == self.ended_by:
                pipe.done, pipe.small = True, False
            elif pipe.source is self.source:
                pipe.chunk, pipe.held, pipe.small = self.held, len(self.held), False
        tunnel.ended_by = self.ended_by
        if self.broken:
            tunnel.fail(self.broken)


def turns(relay: Relay, most_s: float, wakeup: Optional[Wakeup] = None) -> Iterator[Optional[bool]]:
    """Wait for events and handle them, until the relay has ended or is aborted. Yields after each wait: whether the
    caller has to look at it, as handle() returns; None when there was no event in most_s seconds.

    Raises OSError when poll() or select() takes no more."""
    poll, fds, look, woken = new_poll(), relay.fds(), True, -1
    watched: Tuple[int, ...] = ()
    if wakeup:
        woken = wakeup.fileno()
        poll.register(woken, READ)
    while not relay.ended and not relay.aborted:
        wait_s = most_s
        if relay.change is not None:
            relay.change_now()
            look = True
        if look:
            paused = relay.paused()
            if paused:
                wait_s = pause(relay, most_s)
            wanted = relay.interest()
            if wanted != watched:
                rewatch(poll, fds, watched, wanted)
                watched = wanted
            look = paused                           # its time may come without an event
        ready = poll.poll(wait_s * 1000)
        now = monotonic()
        for fd, events in ready:
            if fd == woken and wakeup:
                wakeup.clear()
                relay.change_now()
                look = True
            elif relay.handle(fd, events, now):
                look = True
                if relay.ended:
                    return
        yield look if ready else None


def relay_busy(tunnel: Relay, until_quiet: bool = False) -> None:
    """Relay until the tunnel has ended, is aborted or, if wished, is quiet again.

    A direction with much to move goes through a kernel pipe where there is one.
    """
    for sock in tunnel.sockets():
        if sock.gettimeout() != 0:
            sock.setblocking(False)
    look_back_at, moved, pipes = monotonic() + QUIET_S, sum(tunnel.moved()), tunnel.pipes()
    for look in turns(tunnel, QUIET_S):
        if look:
            for pipe in pipes:
                if pipe.large and not pipe.held:
                    pipe.use_kernel(tunnel.owner)
        if loops_work():
            yield_cpu()
        now = monotonic()
        if now < look_back_at:
            continue
        look_back_at = now + QUIET_S            # a few bytes now and then must not keep a thread and a kernel pipe
        before, moved = moved, sum(tunnel.moved())
        if moved - before < QUIET_BYTES:
            for pipe in pipes:
                pipe.leave_kernel()
            if until_quiet:
                return
        if now >= tunnel.deadline():
            tunnel.expire()


def relay_bursts(relay: Relay) -> None:
    """Relay an association until it has ended or is aborted. Other threads wake it when a name is resolved."""
    with Wakeup() as wakeup:
        relay.woken_by(lambda _relay: wakeup.set())
        for _ in turns(relay, QUIET_S, wakeup):
            if monotonic() >= relay.deadline():
                relay.expire()


def borrow(relay: Relay, how: Callable[[Any], None], failed: Callable[[], object]) -> None:
    """Relay a lent tunnel in the calling thread, which closes nothing. failed() is told of a bug."""
    try:
        how(relay)
    except Exception as exc:
        give_up(relay, exc, failed)
    if relay.aborted and not relay.ended:
        relay.end(relay.aborted)


def give_up(relay: Relay, exc: Exception, failed: Callable[[], object]) -> None:
    """In an except block: end a lent tunnel that cannot be relayed. failed() is told of a bug."""
    if isinstance(exc, OSError):                    # poll() or select() takes no more
        relay.end("server", exc.strerror or str(exc))
    else:
        failed()
        relay.end("server", "a bug of the server")
