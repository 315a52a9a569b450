"""A busy tunnel in a thread of its own, which waits for its two sockets alone and moves the bytes through kernel pipes.

Where there is only select(), every tunnel is relayed so from the start to its end.
"""
from __future__ import annotations

from time import monotonic

from ..net.poller import new_poll
from .tunnel import CLIENT, REMOTE, UNREGISTERED, Tunnel

QUIET_S = 0.5                       # how often a busy tunnel is looked at:
QUIET_BYTES = 256 * 1024            # one that moved less in that time is quiet again and gives its kernel pipes back


def relay_alone(tunnel: Tunnel, until_quiet: bool) -> None:
    """Relay one tunnel in the calling thread until it has ended, is aborted or, if wished, is quiet again.

    A direction with much to move goes through a kernel pipe where there is one.
    """
    for sock in (tunnel.client, tunnel.remote):
        if sock.gettimeout() != 0:
            sock.setblocking(False)
    poll = new_poll()
    sides = {tunnel.client.fileno(): CLIENT, tunnel.remote.fileno(): REMOTE}
    watched = (UNREGISTERED, UNREGISTERED)
    look = True
    look_back_at, moved = monotonic() + QUIET_S, tunnel.moved()
    while not tunnel.ended and not tunnel.aborted:
        if look:
            for pipe in (tunnel.up, tunnel.down):
                if pipe.full and not pipe.held:
                    pipe.use_kernel(tunnel.owner)
            wanted = tunnel.interest()
            for fd, before, after in zip(sides, watched, wanted):
                if before == UNREGISTERED != after:
                    poll.register(fd, after)
                elif after == UNREGISTERED != before:
                    poll.unregister(fd)
                elif before != after:
                    poll.modify(fd, after)
            watched = wanted
        ready = poll.poll(QUIET_S * 1000)
        now = monotonic()
        look = False
        for fd, events in ready:
            look = tunnel.handle(sides[fd], events, now) or look
            if tunnel.ended:
                return
        if now >= look_back_at:                 # a few bytes now and then must not keep a thread and a kernel pipe
            before, moved = moved, tunnel.moved()
            if moved - before < QUIET_BYTES:
                tunnel.up.leave_kernel()
                tunnel.down.leave_kernel()
                if until_quiet:
                    return
            look_back_at = now + QUIET_S
            if now >= tunnel.deadline():
                tunnel.expire()
