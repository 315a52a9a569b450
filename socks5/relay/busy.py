"""Relay one tunnel in the calling thread, which waits for its two sockets alone.

`relay_first` is for the first moments of every tunnel, in the thread that has served its client until then: most
connections are short, and to hand one over costs as much as to relay a few bytes. `relay_busy` is for a tunnel with
much to move, in a thread of its own: it sends the bytes through kernel pipes (splice.py).
"""
from __future__ import annotations

from time import monotonic
from typing import Callable

from ..net.poller import new_poll
from .limited import pause
from .tunnel import CLIENT, REMOTE, UNREGISTERED, Tunnel, rewatch

FIRST_S = 0.005                     # how long a tunnel that has just been made is waited for at a time,
FIRST_TURNS = 16                    # and how often
QUIET_S = 0.5                       # how often a busy tunnel is looked at:
QUIET_BYTES = 256 * 1024            # if it moved less in that time, it is quiet again and gives its kernel pipes back


class Turns:
    """Waits for the events of one tunnel, and has it handle them."""

    def __init__(self, tunnel: Tunnel) -> None:
        self._tunnel = tunnel
        self._poll = new_poll()
        self._client, self._remote = tunnel.client.fileno(), tunnel.remote.fileno()
        self._watched = (UNREGISTERED, UNREGISTERED)
        self.look = True                # whether it may want other events than before

    def turn(self, wait_s: float) -> bool:
        """Wait for events, and handle them. False when there were none in wait_s.

        Raises OSError when poll() or select() takes no more."""
        tunnel = self._tunnel
        if tunnel.change is not None:
            tunnel.change_now()
            self.look = True
        if tunnel.up.resume_at or tunnel.down.resume_at:
            wait_s = pause(tunnel, wait_s)
            self.look = True
        if self.look:
            wanted, before = tunnel.interest(), self._watched
            rewatch(self._poll, self._client, before[CLIENT], wanted[CLIENT])
            rewatch(self._poll, self._remote, before[REMOTE], wanted[REMOTE])
            self._watched, self.look = wanted, False
        ready = self._poll.poll(wait_s * 1000)
        now = monotonic()
        for fd, events in ready:
            if tunnel.handle(CLIENT if fd == self._client else REMOTE, events, now):
                self.look = True
                if tunnel.ended:
                    break
        return bool(ready)


def relay_first(tunnel: Tunnel) -> None:
    """Relay until the tunnel has ended, is aborted, quiet or busy, or has had its turns.

    What a rate limit holds back, or another thread wants changed, is for the loop: such a tunnel is quiet soon."""
    client, remote, wait_ms = tunnel.client.fileno(), tunnel.remote.fileno(), FIRST_S * 1000
    poll, watched, look = new_poll(), (UNREGISTERED, UNREGISTERED), True
    for _ in range(FIRST_TURNS):
        if look:
            wanted = tunnel.interest()
            rewatch(poll, client, watched[CLIENT], wanted[CLIENT])
            rewatch(poll, remote, watched[REMOTE], wanted[REMOTE])
            watched, look = wanted, False
        ready = poll.poll(wait_ms)
        now = monotonic()
        for fd, events in ready:
            if tunnel.handle(CLIENT if fd == client else REMOTE, events, now):
                look = True
                if tunnel.ended:
                    return
        if not ready or tunnel.aborted or look and tunnel.busy():
            return


def relay_busy(tunnel: Tunnel, until_quiet: bool) -> None:
    """Relay until the tunnel has ended, is aborted or, if wished, is quiet again.

    A direction with much to move goes through a kernel pipe where there is one.
    """
    for sock in (tunnel.client, tunnel.remote):
        if sock.gettimeout() != 0:
            sock.setblocking(False)
    turns = Turns(tunnel)
    look_back_at, moved = monotonic() + QUIET_S, tunnel.moved()
    while not tunnel.ended and not tunnel.aborted:
        if turns.look:
            for pipe in (tunnel.up, tunnel.down):
                if pipe.large and not pipe.held:
                    pipe.use_kernel(tunnel.owner)
        turns.turn(QUIET_S)
        now = monotonic()
        if now < look_back_at:
            continue
        look_back_at = now + QUIET_S            # a few bytes now and then must not keep a thread and a kernel pipe
        before, moved = moved, tunnel.moved()
        if moved - before < QUIET_BYTES:
            tunnel.up.leave_kernel()
            tunnel.down.leave_kernel()
            if until_quiet:
                return
        if not tunnel.ended and now >= tunnel.deadline():
            tunnel.expire()


def borrow(tunnel: Tunnel, relay: Callable[[Tunnel], None], failed: Callable[[], object]) -> None:
    """Relay a lent tunnel in the calling thread, which closes nothing. failed() is told of a bug."""
    try:
        relay(tunnel)
    except OSError as exc:                          # poll() or select() takes no more
        tunnel.end("server", exc.strerror or str(exc))
    except Exception:
        failed()
        tunnel.end("server", "a bug of the server")
    if tunnel.aborted and not tunnel.ended:
        tunnel.end(tunnel.aborted)
