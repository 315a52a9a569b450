"""Move bytes both ways between two connected sockets.

Knows no SOCKS and never logs. Half-close is passed on, so a client may shut its sending side and still read; a reset on
one side becomes a reset on the other, so that a cut-off download never looks complete.

Nothing blocks in here: a blocking send in one direction deadlocks with a peer that answers while it is still being
sent to. A Pipe per direction reads only while it holds nothing and writes only while it holds something: that is the
whole of backpressure, and of half-close. A direction that is busy goes through the kernel (splice.py) until it falls
quiet.
"""
from __future__ import annotations

import os
import socket
import struct
from typing import Callable, List, Optional, Tuple, Union

from . import splice
from ..net.poller import READ, WRITE, Watch

CHUNK_BYTES = 1 << 16                       # one read; an idle tunnel holds none
QUIET_S = 0.5                               # after which a kernel pipe is given back; and how late abort() may be seen
RESET_ON_CLOSE = struct.pack("ii", 1, 0)    # SO_LINGER on, for 0 s: close() sends RST
DONTWAIT = getattr(socket, "MSG_DONTWAIT", 0)       # spares small tunnels from making their sockets non-blocking


def reset_on_close(sock: socket.socket) -> None:
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
    except OSError:                         # it is dead already, which is as good
        pass


class Broken(Exception):
    """The connection called `side` ("client" or "remote") failed while bytes were moved."""

    def __init__(self, side: str, error: OSError) -> None:
        super().__init__(side, error)
        self.side = side
        self.error = error


class Pipe:
    """One direction: what was read from `source` and not yet taken by `sink`.

    held    bytes in hand: in `chunk`, or in the kernel pipe where there is one
    total   bytes that the sink has taken
    done    the source said EOF, and nothing is in hand
    full    the last read filled its buffer, so there is more, and a kernel pipe pays
    """

    __slots__ = ("source", "sink", "names", "chunk", "kernel", "held", "total", "done", "full")

    def __init__(self, source: socket.socket, sink: socket.socket, names: Tuple[str, str], early: bytes = b"") -> None:
        self.source = source
        self.sink = sink
        self.names = names
        self.chunk: Union[bytes, memoryview] = early
        self.kernel: Optional[splice.KernelPipe] = None
        self.held = len(early)
        self.total = 0
        self.done = False
        self.full = False

    def fill(self) -> bool:
        """The source is readable, and nothing is in hand: take what is there and pass on what fits, or note the EOF.

        True when the loop has to think: a rest in hand, the EOF, or more to come. Raises Broken.
        """
        try:
            if self.kernel:
                self.held = self.kernel.fill(self.source.fileno())
            else:
                self.chunk = self.source.recv(CHUNK_BYTES, DONTWAIT)
                self.held = len(self.chunk)
                self.full = self.held == CHUNK_BYTES
        except (BlockingIOError, InterruptedError):
            return False
        except OSError as exc:
            raise Broken(self.names[0], exc) from None
        if not self.held:
            self.done = True
            return True
        self.drain()
        return self.held > 0 or self.full

    def drain(self) -> None:
        """Pass on what the sink takes of what is in hand. Raises Broken."""
        try:
            if self.kernel:
                sent = self.kernel.empty(self.sink.fileno())
            else:
                sent = self.sink.send(self.chunk, DONTWAIT)
                self.chunk = memoryview(self.chunk)[sent:] if sent < self.held else b""
        except (BlockingIOError, InterruptedError):
            return
        except OSError as exc:
            raise Broken(self.names[1], exc) from None
        self.held -= sent
        self.total += sent

    def promote(self) -> bool:
        """Go through the kernel from now on, where it can be had. Both sockets must not block. Nothing is in hand."""
        try:
            self.kernel = splice.KernelPipe()
        except OSError:
            return False
        self.full = False
        return True

    def demote(self) -> None:
        if self.kernel:
            self.kernel.close()
            self.kernel = None


class Tunnel:
    """The two pipes between a client and its remote. `run` in the thread that owns both sockets; closing them is
    the owner's, afterwards.

    idle_s, half_closed_s   how long nothing may move, before and after one side said EOF; 0 is for ever
    on_bulk                 told True when the thread turns to bulk work, and False when that is over
    ended_by                "client" or "remote", who said EOF or broke first; else "idle", "half-closed", or what
                            abort said
    why                     the error that ended it, or ""
    """

    __slots__ = ("client", "remote", "up", "down", "idle_s", "half_closed_s", "on_bulk", "ended_by", "why", "aborted")

    def __init__(self, client: socket.socket, remote: socket.socket, early: bytes = b"", early_down: bytes = b"",
                 idle_s: float = 0, half_closed_s: float = 0, on_bulk: Optional[Callable[[bool], None]] = None) -> None:
        """`early` are bytes of the client's that were read before the tunnel stood, `early_down` the remote's."""
        self.client = client
        self.remote = remote
        self.up = Pipe(client, remote, ("client", "remote"), early)
        self.down = Pipe(remote, client, ("remote", "client"), early_down)
        self.idle_s = idle_s
        self.half_closed_s = half_closed_s
        self.on_bulk = on_bulk
        self.ended_by = ""
        self.why = ""
        self.aborted = ""

    def run(self) -> None:
        """Relay until both sides are done, or the tunnel is. Raises nothing: `ended_by` and `why` tell."""
        # A socket with a time-out waits for it, whatever the flag says.
        if not DONTWAIT or self.client.gettimeout() or self.remote.gettimeout():
            self._make_nonblocking()
        try:
            self._loop()
        except Broken as exc:
            self.ended_by = self.ended_by or exc.side
            self.why = "%s: %s" % (exc.side, exc.error.strerror or exc.error)
            reset_on_close(self.client if exc.side == "remote" else self.remote)
        finally:
            self.up.held = self.down.held = 0       # what nobody can take any more
            self._demote()
        if self.aborted or self.ended_by in ("idle", "half-closed"):
            self.ended_by = self.aborted or self.ended_by
            reset_on_close(self.client)
            reset_on_close(self.remote)

    def abort(self, why: str) -> None:
        """End the tunnel from another thread, which must know that the sockets are still open.

        A shut receiving side wakes the loop and sends nothing: closing is still up to the owner, who then resets. A
        loop that waits only to send is not woken, but looks up every QUIET_S.
        """
        self.aborted = why
        for sock in (self.client, self.remote):
            reset_on_close(sock)
            try:
                sock.shutdown(socket.SHUT_RD)
            except OSError:
                pass

    def _loop(self) -> None:
        up, down = self.up, self.down
        watch = Watch(self.client.fileno(), self.remote.fileno())
        client_fd = watch.first
        ready: List[Tuple[int, int]] = [(watch.first, WRITE), (watch.second, WRITE)]    # there may be something in hand
        poll = watch.poll.poll
        wait_s = quiet_s = 0.0                      # how long to wait now; how long nothing has moved
        think = True
        while True:
            for fd, events in ready:
                mine, other = (up, down) if fd == client_fd else (down, up)     # whose source, whose sink it is
                acted = False
                if events & ~WRITE and not mine.held and not mine.done:
                    acted = True
                    if mine.fill():
                        think = True
                        if mine.done:
                            if self.aborted:
                                return
                            self._pass_on(mine, other)
                        elif mine.full and not mine.held and splice.available:
                            self._promote(mine)
                if other.held and events & ~READ:
                    other.drain()
                    acted = think = True
                if not acted and events & ~(READ | WRITE):
                    self._look_at(mine, fd, watch)
                    think = True
            if self.aborted or (up.done and down.done):
                return
            if think:                               # a ping-pong never comes here
                watch.want((0 if up.done or up.held else READ) | (WRITE if down.held else 0),
                           (0 if down.done or down.held else READ) | (WRITE if up.held else 0))
                wait_s = self._patience(quiet_s)
            ready = poll(wait_s * 1000 if wait_s else None)
            think = not ready or quiet_s > 0
            quiet_s = 0.0 if ready else quiet_s + wait_s
            if not ready:
                self._demote()
                if self._tired(quiet_s):
                    return

    def _limit(self) -> Tuple[float, str]:
        return (self.half_closed_s, "half-closed") if self.up.done or self.down.done else (self.idle_s, "idle")

    def _patience(self, quiet_s: float) -> float:
        """How long to wait for the next event, in seconds; 0 is for ever."""
        limit_s, _name = self._limit()
        left_s = max(limit_s - quiet_s, 0.001) if limit_s else 0.0
        if self.up.held or self.down.held or self.up.kernel or self.down.kernel:
            return min(left_s or QUIET_S, QUIET_S)
        return left_s

    def _tired(self, quiet_s: float) -> bool:
        limit_s, name = self._limit()
        if not limit_s or quiet_s < limit_s:
            return False
        self.ended_by, self.why = name, "nothing moved for %g s" % limit_s
        return True

    def _pass_on(self, pipe: Pipe, other: Pipe) -> None:
        """EOF on one side becomes FIN on the other, once what was in hand has been delivered."""
        self.ended_by = self.ended_by or pipe.names[0]
        if other.done:                      # then both are, and close() says it
            return
        try:
            pipe.sink.shutdown(socket.SHUT_WR)
        except OSError:                     # the sink has gone, and its own direction will say so
            pass

    def _look_at(self, pipe: Pipe, fd: int, watch: Watch) -> None:
        """A side of which nothing is wanted is broken, or closed both ways, and poll() will say so for ever."""
        error = pipe.source.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if error:
            raise Broken(pipe.names[0], OSError(error, os.strerror(error)))
        watch.mute(fd)

    def _make_nonblocking(self) -> None:
        for sock in (self.client, self.remote):
            if sock.gettimeout() != 0:
                sock.setblocking(False)

    def _promote(self, pipe: Pipe) -> None:
        """A direction with nothing in hand and much to come: let the kernel carry it."""
        if not pipe.kernel:
            self._make_nonblocking()        # splice() has no flag that does it for a socket
            if pipe.promote() and self.on_bulk:
                self.on_bulk(True)

    def _demote(self) -> None:
        """Give kernel pipes back that have nothing in them; at the end, all of them."""
        had = self.up.kernel or self.down.kernel
        for pipe in (self.up, self.down):
            if not pipe.held:
                pipe.demote()
        if had and self.on_bulk and not (self.up.kernel or self.down.kernel):
            self.on_bulk(False)
