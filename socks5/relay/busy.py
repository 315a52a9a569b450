"""Relay one tunnel in the calling thread, which waits for its sockets alone.

`relay_first` is for the first moments of every tunnel, in the thread that has served its client until then: most
connections are short, and to hand one over costs as much as to relay a few bytes. `relay_busy` is for a tunnel with
much to move, in a thread of its own: it sends the bytes through kernel pipes (splice.py). Where there is only select(),
all tunnels are relayed so, and UDP associations by `relay_bursts`.
"""
from __future__ import annotations

from time import monotonic
from typing import Any, Callable, Iterator, Optional, Tuple

from ..net.poller import READ, new_poll
from ..net.wakeup import Wakeup
from .limited import pause
from .relay import UNREGISTERED, Relay, rewatch, rewatch_all
from .tunnel import Tunnel

FIRST_S = 0.005                     # how long a tunnel that has just been made is waited for at a time,
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
                rewatch_all(poll, fds, watched, wanted)
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

    What a rate limit holds back, or another thread wants changed, is for the loop: such a tunnel is quiet soon. It
    does not use turns(), with which a short connection takes 3 to 4 % more instructions."""
    (client, remote), wait_ms = tunnel.fds(), FIRST_S * 1000
    poll, watched, look = new_poll(), (UNREGISTERED, UNREGISTERED), True
    for _ in range(FIRST_TURNS):
        if look:
            wanted = tunnel.interest()
            rewatch(poll, client, watched[0], wanted[0])
            rewatch(poll, remote, watched[1], wanted[1])
            watched, look = wanted, False
        ready = poll.poll(wait_ms)
        now = monotonic()
        for fd, events in ready:
            if tunnel.handle(fd, events, now):
                look = True
                if tunnel.ended:
                    return
        if not ready or tunnel.aborted or look and tunnel.busy():
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
    except OSError as exc:                          # poll() or select() takes no more
        relay.end("server", exc.strerror or str(exc))
    except Exception:
        failed()
        relay.end("server", "a bug of the server")
    if relay.aborted and not relay.ended:
        relay.end(relay.aborted)
