"""Relay one tunnel in the calling thread, which waits for its sockets alone.

`relay_first` is for the first moments of a tunnel while there is no other, in the thread that has served its client
until then: most connections are short, and to hand one over costs as much as to relay a few bytes. `relay_busy` is for
a tunnel with much to move, in a thread of its own: it sends the bytes through kernel pipes (splice.py). Where there is
only select(), all tunnels are relayed so, and UDP associations by `relay_bursts`.

A busy tunnel moves much at a time, which takes the least CPU; but what wakes up meanwhile on the same CPU waits for
milliseconds. So while relay loops have work (splice.loops_work), it moves less at a time and yields the CPU after each
turn. Measured beside four such tunnels, on two CPUs: of another tunnel's round trips 99 % take about 1 ms, not 6.
"""
from __future__ import annotations

from time import monotonic
from typing import Any, Callable, Iterator, Optional, Tuple

from ..net.affinity import yield_cpu
from ..net.poller import READ, new_poll
from ..net.wakeup import Wakeup
from .limited import pause
from .relay import Relay, rewatch
from .splice import loops_work
from .tunnel import Tunnel

FIRST_MS = 5                        # how long a tunnel that has just been made is waited for at a time,
FIRST_TURNS = 16                    # and how often
QUIET_S = 0.5                       # how often a busy tunnel is looked at:
QUIET_BYTES = 256 * 1024            # if it moved less in that time, it is quiet again and gives its kernel pipes back


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


def relay_first(tunnel: Tunnel) -> None:
    """Relay until the tunnel has ended, is aborted, quiet or busy, or has had its turns.

    What a rate limit holds back, or another thread wants changed, is for the loop: such a tunnel is quiet soon. So is
    one with a side that is closed both ways. It does not use turns(), which asks for all that on each turn."""
    poll, client, remote = new_poll(), tunnel.fd, tunnel.remote.fileno()
    now, look = tunnel.moved_at, True                   # the clock is not read again for so short a time
    for _ in range(FIRST_TURNS):
        if look:
            if tunnel.hung_up:
                return
            of_client, of_remote = tunnel.interest()
            poll.register(client, of_client)            # the second time, these events take the place of the first
            poll.register(remote, of_remote)
            look = False
        ready = poll.poll(FIRST_MS)
        if not ready:
            return
        for fd, events in ready:
            if tunnel.handle(fd, events, now):
                look = True
                if tunnel.ended:
                    return
        if look and tunnel.busy():
            return


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
