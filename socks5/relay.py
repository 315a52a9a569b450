"""Move bytes both ways between two connected sockets.

Knows no SOCKS and never logs. Half-close is passed on, so a client may shut its sending side and still read; a reset on
one side becomes a reset on the other, so that a cut-off download never looks complete.

Both sockets are non-blocking: a blocking send in one direction deadlocks with a peer that answers while it is still
being sent to. A Pipe per direction reads only while it holds nothing and writes only while it holds something: that is
the whole of backpressure, and of half-close.
"""
from __future__ import annotations

import os
import select
import socket
import struct
from typing import Dict, List, Optional, Tuple, Union

CHUNK_BYTES = 1 << 16                       # one read; an idle tunnel holds none
RESET_ON_CLOSE = struct.pack("ii", 1, 0)    # SO_LINGER on, for 0 s: close() sends RST

# The numbers of poll(2), the same wherever there is one.
READ = getattr(select, "POLLIN", 0x01)
WRITE = getattr(select, "POLLOUT", 0x04)
BROKEN = getattr(select, "POLLERR", 0x08)


class SelectPoll:
    """select.poll() for systems that have only select(): the same four methods."""

    def __init__(self) -> None:
        self._wanted: Dict[int, int] = {}

    def register(self, fd: int, events: int) -> None:
        self._wanted[fd] = events

    modify = register

    def unregister(self, fd: int) -> None:
        del self._wanted[fd]

    def poll(self, timeout_ms: Optional[float] = None) -> List[Tuple[int, int]]:
        readers = [fd for fd, events in self._wanted.items() if events & READ]
        writers = [fd for fd, events in self._wanted.items() if events & WRITE]
        # Windows tells of a connect that failed in the third set only.
        ready = select.select(readers, writers, writers, None if timeout_ms is None else timeout_ms / 1000)
        found: Dict[int, int] = {}
        for fds, event in zip(ready, (READ, WRITE, BROKEN)):
            for fd in fds:
                found[fd] = found.get(fd, 0) | event
        return list(found.items())


def new_poll() -> "Union[select.poll, SelectPoll]":
    """A poll object: select.select() raises for descriptors from 1024 up, which is about 500 tunnels."""
    return select.poll() if hasattr(select, "poll") else SelectPoll()


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
    """One direction: at most one chunk in hand, read from `source` and not yet taken by `sink`.

    total   bytes that the sink has taken
    done    the source said EOF, and nothing is in hand
    """

    __slots__ = ("source", "sink", "names", "chunk", "total", "done")

    def __init__(self, source: socket.socket, sink: socket.socket, names: Tuple[str, str], early: bytes = b"") -> None:
        self.source = source
        self.sink = sink
        self.names = names
        self.chunk: Union[bytes, memoryview] = early
        self.total = 0
        self.done = False

    def fill(self) -> None:
        """The source is readable, and nothing is in hand: take a chunk and pass on what fits, or note the EOF."""
        try:
            self.chunk = self.source.recv(CHUNK_BYTES)
        except (BlockingIOError, InterruptedError):
            return
        except OSError as exc:
            raise Broken(self.names[0], exc) from None
        if self.chunk:
            self.drain()
        else:
            self.done = True

    def drain(self) -> None:
        """Pass on what the sink takes of the chunk."""
        try:
            sent = self.sink.send(self.chunk)
        except (BlockingIOError, InterruptedError):
            return
        except OSError as exc:
            raise Broken(self.names[1], exc) from None
        self.total += sent
        self.chunk = memoryview(self.chunk)[sent:] if sent < len(self.chunk) else b""


class Tunnel:
    """The two pipes between a client and its remote. `run` in the thread that owns both sockets; closing them is
    the owner's, afterwards.

    idle_s, half_closed_s   how long nothing may move, before and after one side said EOF; 0 is for ever
    ended_by                "client" or "remote", who said EOF or broke first; else "idle", "half-closed", or what
                            abort said
    why                     the error that ended it, or ""
    """

    __slots__ = ("client", "remote", "up", "down", "idle_s", "half_closed_s", "ended_by", "why", "aborted")

    def __init__(self, client: socket.socket, remote: socket.socket, early: bytes = b"", early_down: bytes = b"",
                 idle_s: float = 0, half_closed_s: float = 0) -> None:
        """`early` are bytes of the client's that were read before the tunnel stood, `early_down` the remote's."""
        self.client = client
        self.remote = remote
        self.up = Pipe(client, remote, ("client", "remote"), early)
        self.down = Pipe(remote, client, ("remote", "client"), early_down)
        self.idle_s = idle_s
        self.half_closed_s = half_closed_s
        self.ended_by = ""
        self.why = ""
        self.aborted = ""

    def run(self) -> None:
        """Relay until both sides are done, or the tunnel is. Raises nothing: `ended_by` and `why` tell."""
        for sock in (self.client, self.remote):
            if sock.gettimeout() != 0:
                sock.setblocking(False)
        try:
            self._loop()
        except Broken as exc:
            self.ended_by = self.ended_by or exc.side
            self.why = "%s: %s" % (exc.side, exc.error.strerror or exc.error)
            reset_on_close(self.client if exc.side == "remote" else self.remote)
        if self.aborted or self.ended_by in ("idle", "half-closed"):
            self.ended_by = self.aborted or self.ended_by
            reset_on_close(self.client)
            reset_on_close(self.remote)

    def abort(self, why: str) -> None:
        """End the tunnel from another thread, which must know that the sockets are still open.

        A shut receiving side wakes the loop and sends nothing: closing is still up to the owner, who then resets.
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
        watch = _Watch(self.client.fileno(), self.remote.fileno())
        client_fd, ready = watch.client_fd, [(watch.client_fd, WRITE), (watch.remote_fd, WRITE)]
        idle_s, name = self.idle_s, "idle"
        while True:
            for fd, events in ready:
                mine, other = (up, down) if fd == client_fd else (down, up)     # whose source, whose sink is it?
                acted = False
                if events & ~WRITE and not mine.done and not mine.chunk:
                    mine.fill()
                    acted = True
                    if mine.done:
                        if self.aborted:
                            return
                        self._pass_on(mine)
                        idle_s, name = self.half_closed_s, "half-closed"
                if other.chunk and events & ~READ:
                    other.drain()
                    acted = True
                if not acted and events & ~(READ | WRITE):
                    self._look_at(mine, fd, watch)
            if self.aborted or (up.done and down.done):
                return
            ready = watch.wait(
                (0 if up.done or up.chunk else READ) | (WRITE if down.chunk else 0),
                (0 if down.done or down.chunk else READ) | (WRITE if up.chunk else 0), idle_s)
            if not ready:
                self.ended_by = name
                self.why = "nothing moved for %g s" % idle_s
                return

    def _pass_on(self, pipe: Pipe) -> None:
        """EOF on one side becomes FIN on the other, once what was in hand has been delivered."""
        self.ended_by = self.ended_by or pipe.names[0]
        try:
            pipe.sink.shutdown(socket.SHUT_WR)
        except OSError:                     # the sink has gone, and its own direction will say so
            pass

    def _look_at(self, pipe: Pipe, fd: int, watch: _Watch) -> None:
        """A side of which nothing is wanted is broken, or closed both ways, and poll() will say so for ever."""
        error = pipe.source.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if error:
            raise Broken(pipe.names[0], OSError(error, os.strerror(error)))
        watch.mute(fd)


class _Watch:
    """What the loop waits for; speaks to the poll object only when that changes.

    A side of which nothing is wanted stays registered with no events, because a reset is reported all the same; unless
    it is closed both ways, which would be reported without end.
    """

    __slots__ = ("client_fd", "remote_fd", "poll", "wanted", "muted")

    def __init__(self, client_fd: int, remote_fd: int) -> None:
        self.client_fd = client_fd
        self.remote_fd = remote_fd
        self.poll = new_poll()
        self.wanted = (-1, -1)              # of client and remote; -1: not registered
        self.muted = -1

    def mute(self, fd: int) -> None:
        self.poll.unregister(fd)
        self.muted = fd
        self.wanted = (-1, self.wanted[1]) if fd == self.client_fd else (self.wanted[0], -1)

    def wait(self, client: int, remote: int, timeout_s: float) -> List[Tuple[int, int]]:
        """(fd, events) of what is ready; empty when nothing was for timeout_s (0: for ever)."""
        if (client, remote) != self.wanted:
            self.wanted = (self._want(self.client_fd, client, self.wanted[0]),
                           self._want(self.remote_fd, remote, self.wanted[1]))
        return self.poll.poll(timeout_s * 1000 if timeout_s else None)

    def _want(self, fd: int, events: int, before: int) -> int:
        if before == -1:
            if fd == self.muted and not events:
                return -1
            self.poll.register(fd, events)
        elif events != before:
            self.poll.modify(fd, events)
        return events
