"""Both directions between a client and its remote: a state machine that never waits.

The owner (loop.py) waits for events and calls `handle`; `interest` says which events to wait for. There is no thread,
no log and no SOCKS in here, so that it can be tested with plain events, in every order.

Half-close is passed on: a client may shut its sending side down and still read. A reset on one side becomes a reset on
the other, so that a download which was cut off never looks complete. Urgent data stays urgent, and in its place.
"""
from __future__ import annotations

import socket
from typing import Any, Tuple

from ..net.poller import HANG_UP, READ, URGENT, WRITE
from .pipe import Broken, Pipe, error_of, reset_on_close
from .relay import UNREGISTERED, Relay

INCOMING = READ | URGENT                # what a source is asked for
FAILED = ~(READ | URGENT | WRITE)       # a hang-up or an error, which poll() and epoll report without being asked
READS = READ, READ | HANG_UP            # what nearly all events are: bytes or FIN, the last FIN
QUIET = INCOMING, INCOMING              # what nearly all tunnels want, who share this tuple
BUSY_READS = 4                          # so many large reads in one direction make a tunnel busy,
BUSY_S = 0.1                            # if they come in so short a time


class Tunnel(Relay):
    """A client, a remote, and a Pipe for each direction. Both sockets are the owner's, who closes them by close().

    up, down        client to remote, remote to client
    idle_s          seconds without a byte after which the tunnel ends, 0 for never; half_closed_s after the first EOF
    counted_until   when its pipes begin to count large reads anew
    fd              the client's descriptor, which tells the sides apart
    hung_up         the sides that are closed both ways, as bits 1 (client) and 2 (remote)
    """

    __slots__ = ("client", "remote", "up", "down", "idle_s", "half_closed_s", "counted_until", "fd", "hung_up")
    bursts = False

    def __init__(self, client: socket.socket, remote: socket.socket, early: bytes = b"", idle_s: float = 0,
                 half_closed_s: float = 0, session: Any = None, owner: str = "") -> None:
        """`early` is what the client has sent behind its request."""
        Relay.__init__(self, session, owner)        # faster than super()
        self.client = client
        self.remote = remote
        self.up = Pipe(client, remote, early)
        self.down = Pipe(remote, client)
        self.idle_s = idle_s
        self.half_closed_s = half_closed_s
        self.counted_until = 0.0
        self.fd = client.fileno()
        self.hung_up = 0

    def sockets(self) -> Tuple[socket.socket, ...]:
        return self.client, self.remote

    def fds(self) -> Tuple[int, int]:
        return self.fd, self.remote.fileno()

    def interest(self) -> Tuple[int, int]:
        up, down = self.up, self.down
        if up.small and down.small:         # nearly always
            return QUIET
        client = remote = 0
        if up.held:
            remote = 0 if up.resume_at else WRITE
        elif not up.done and not up.resume_at:
            client = INCOMING
        if down.held:
            client |= 0 if down.resume_at else WRITE
        elif not down.done and not down.resume_at:
            remote |= INCOMING
        if self.hung_up:
            client = client or (UNREGISTERED if self.hung_up & 1 else 0)
            remote = remote or (UNREGISTERED if self.hung_up & 2 else 0)
        return QUIET if client == remote == INCOMING else (client, remote)

    def handle(self, fd: int, events: int, now: float) -> bool:
        mine = self.up if fd == self.fd else self.down
        try:
            if mine.small and events in READS:          # nearly always
                filled = mine.fill_small()
                if filled is not None:
                    self.moved_at = now
                    if mine.done:
                        self._pass_eof_on(mine)
                    return filled
                if events == READ:
                    return False
            acted = look = False
            other = self.down if mine is self.up else self.up
            if events & ~WRITE and not mine.held and not mine.done:
                # A bare hang-up says nothing about urgent data: it was not asked for when this batch was made.
                fill = mine.fill if events & (READ | URGENT) == READ else mine.fill_urgent
                filled = fill() if mine.gate is None else mine.gate.fill(mine, fill)
                if filled is not None:
                    acted = True
                    self.moved_at = now
                    if filled:
                        look = True
                        if mine.done:
                            self._pass_eof_on(mine)
            if other.held and events & ~INCOMING:
                held = other.held
                other.drain()
                if other.held < held:
                    acted = look = True
                    self.moved_at = now
            if events & FAILED and not acted:
                return self._look_at_failure(mine, events)
            return look
        except Broken as exc:
            self.fail(exc)
            return True

    def busy(self) -> bool:
        """Whether a direction has so much to move that a thread of its own is worth its price. To be asked after each
        read that was large. What comes between counts for nothing: when the loop is quick, one buffer is often not
        enough for what has come, and the next one too much."""
        up, down = self.up, self.down
        if not up.large and not down.large:
            return False
        if up.large >= BUSY_READS or down.large >= BUSY_READS:
            return True
        if self.moved_at >= self.counted_until:         # a few large messages, now and then, are not much
            self.counted_until = self.moved_at + BUSY_S
            up.large = down.large = 0
        return False

    def pipes(self) -> Tuple[Pipe, Pipe]:
        return self.up, self.down

    def moved(self) -> Tuple[int, int]:
        return self.up.total, self.down.total

    def state(self) -> str:
        return "half-closed" if self.up.done or self.down.done else "relaying"

    def limit(self) -> Tuple[float, str]:
        """The time limit in force, in seconds (0: none), and its name."""
        return (self.half_closed_s, "half-closed") if self.up.done or self.down.done else (self.idle_s, "idle")

    def paused(self) -> bool:
        return bool(self.up.resume_at or self.down.resume_at)

    def deadline(self) -> float:
        """When the time limit ends it, if no byte moves before. A paused tunnel is not idle."""
        limit_s, _name = self.limit()
        return self.moved_at + limit_s if limit_s and not self.paused() else float("inf")

    def expire(self) -> None:
        limit_s, name = self.limit()
        self.end(name, "nothing moved for %g s" % limit_s)

    def end(self, by: str, why: str = "") -> None:
        """End it by our own decision: both sides are reset."""
        super().end(by, why)
        reset_on_close(self.client)
        reset_on_close(self.remote)

    def fail(self, broken: Broken) -> None:
        """End it because a side has failed: the other one is reset."""
        side, other = ("client", self.remote) if broken.sock is self.client else ("remote", self.client)
        self.ended = True
        self.ended_by = self.ended_by or side
        self.why = "%s: %s" % (side, broken.error.strerror or broken.error)
        reset_on_close(other)

    def close(self) -> None:
        up, down = self.up, self.down
        if up.held or down.held or up.kernel or down.kernel or up.gate or down.gate:
            up.close()
            down.close()
        self.remote.close()

    # ---- the parts ------------------------------------------------------------------------------------------------

    def _pass_eof_on(self, pipe: Pipe) -> None:
        """EOF on one side becomes FIN on the other; nothing is in hand, or there would have been no read."""
        if self.aborted:                    # the owner has shut this socket down to wake us up: no EOF of the peer
            self.end(self.aborted)
            return
        if self.up.done and self.down.done:     # close() says the rest
            self.ended = True
            return
        self.ended_by = "client" if pipe is self.up else "remote"
        try:
            pipe.sink.shutdown(socket.SHUT_WR)
        except OSError:                     # the sink is dead, and its own direction will say so
            pass

    def _look_at_failure(self, pipe: Pipe, events: int) -> bool:
        """A side of which nothing is wanted has failed; or is closed both ways, which would be reported for ever."""
        side = 1 if pipe is self.up else 2
        if pipe.resume_at:                  # what has come before is read when it is time, and then the error
            self.hung_up |= side
            return True
        error = error_of(pipe.source)
        if error:
            raise Broken(pipe.source, error)
        if events & HANG_UP:
            self.hung_up |= side
        return True
