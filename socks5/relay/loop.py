"""The relay loop: one thread that relays every quiet tunnel of the process, and waits for silent newcomers.

An event loop in the classic form: wait for events, let each tunnel move its bytes, then close what has ended. An idle
tunnel is two descriptors and a few small objects: no thread, no buffer, no timer of its own. A tunnel that turns busy
is lent to a thread of its own, which waits for its two sockets alone and sends the bytes through a kernel pipe; when it
is quiet again the loop takes it back. Where there is only select(), each tunnel has such a thread from the start.

Any thread may call `adopt`, `watch`, `call_soon` and `stop`; everything else runs in the loop's thread, which alone
closes sockets that it has registered. So no event can name a descriptor that was closed and used again: closing comes
after the batch of events in which the tunnel ended.
"""
from __future__ import annotations

import errno
import select
import socket
import threading
from collections import deque
from time import monotonic
from typing import Any, Callable, Deque, Dict, List, Optional, Set, Tuple

from ..net.poller import BATCH, READ, new_poll, new_poller
from . import splice
from .pipe import DONTWAIT
from .tunnel import CLIENT, REMOTE, UNREGISTERED, Tunnel

SWEEP_S = 1.0                       # how late a time limit may be noticed
QUIET_S = 0.5                       # without a byte: a busy tunnel is quiet again, a kernel pipe is given back
MAX_LENT = splice.MAX_PIPES         # threads of busy tunnels at a time; further ones stay in the loop
FAR_S = 3600.0                      # no wait is longer
SOON_S = 0.001                      # when another thread is about to finish something
MANY = hasattr(select, "poll")      # whether one thread can wait for thousands of descriptors


class Loop:
    """`ended(tunnel)` is called once for every tunnel, in the loop's thread, when it is over: then close it.

    `failed()` is called inside of an except block, for an exception that cost a tunnel its life: a bug of ours.
    """

    def __init__(self, ended: Callable[[Tunnel], None], failed: Callable[[], None]) -> None:
        self._ended = ended
        self._failed = failed
        self._poller = new_poller()
        self._watched: Dict[int, Tuple[Any, int]] = {}          # by descriptor: Tunnel or Watch or Bell, and side
        self._tunnels: Set[Tunnel] = set()
        self._early: List[Tunnel] = []                          # to be looked at when they are adopted
        self._over: List[Tunnel] = []                           # to be closed after this batch
        self._calls: Deque[Callable[[], object]] = deque()
        self._lent = 0
        self._stopping = ""                                     # why, once it is to stop
        self._sweep_at = 0.0
        self._bell = Bell()
        self._poller.register(self._bell.fileno(), READ)
        self._watched[self._bell.fileno()] = self._bell, CLIENT
        self._thread = threading.Thread(target=self._run, name="relay loop", daemon=True)

    def start(self) -> None:
        """Raises RuntimeError when the system has no thread to give."""
        self._thread.start()

    def __len__(self) -> int:
        return len(self._tunnels)

    # ---- for any thread -------------------------------------------------------------------------------------------

    def adopt(self, tunnel: Tunnel) -> None:
        """Take over a tunnel and both of its sockets. Raises OSError, and has not, when the loop has stopped."""
        tunnel.moved_at = monotonic()
        self._tunnels.add(tunnel)
        if not MANY:
            self.call_soon(lambda: self._lend(tunnel))
            return
        try:
            self._register(tunnel)
        except ValueError:                          # its epoll is closed
            self._unregister(tunnel)
            self._tunnels.discard(tunnel)
            raise OSError(errno.ECANCELED, "the relay loop has stopped") from None

    def watch(self, sock: socket.socket, spoke: Callable[[bool], None]) -> None:
        """Call spoke(whether there is something to read) as soon as the client has said something or left.

        Raises OSError or ValueError when the system has no more to give, or the loop has stopped."""
        fd = sock.fileno()
        self._poller.register(fd, READ)
        self._watched[fd] = Watch(self, sock, spoke), CLIENT

    def call_soon(self, call: Callable[[], object]) -> None:
        """Have the loop's thread call it, after the events that it is busy with."""
        self._calls.append(call)
        self._bell.ring()

    def abort_all(self, why: str) -> None:
        """End all tunnels; both sides of each are reset."""
        self.call_soon(lambda: self._abort_each(why))

    def stop(self, why: str) -> None:
        """End all tunnels and then the loop's thread, and wait for that. A tunnel that comes later is not taken."""
        self._stopping = why
        self.abort_all(why)
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join()
        self._poller.close()
        for tunnel in list(self._tunnels):          # that came when the thread had ended, or never ran
            tunnel.end(why)
            self._over.append(tunnel)
        self._close_ended()
        self._bell.close()

    # ---- the loop -------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        poll, watched = self._poller.poll, self._watched
        while not self._stopping or self._lent or self._calls:
            ready = poll(SOON_S if self._early else SWEEP_S if self._tunnels else FAR_S, BATCH)
            now = monotonic()
            for fd, events in ready:
                try:
                    subject, side = watched[fd]
                except KeyError:                # unregistered by an earlier event of this batch; or not published yet
                    continue
                try:
                    if subject.handle(side, events, now):
                        self._look_at(subject)
                except Exception:               # one exception costs one tunnel
                    self._bug(subject)
            while self._calls:
                try:
                    self._calls.popleft()()
                except Exception:
                    self._failed()
            if self._early:
                early, self._early = self._early, []
                for tunnel in early:
                    self._look_at(tunnel)
            if now >= self._sweep_at:
                self._sweep(now)
            if self._over:
                self._close_ended()

    def _look_at(self, tunnel: Any) -> None:
        """After an event that changed more than bytes: has it ended, is it busy, what is to be waited for?"""
        if not isinstance(tunnel, Tunnel):
            return
        if not tunnel.adopted:
            self._early.append(tunnel)
            return
        if tunnel.ended:
            self._over.append(tunnel)
            self._unregister(tunnel)
            return
        if tunnel.busy() and self._lent < MAX_LENT and splice.available:
            self._unregister(tunnel)
            self._lend(tunnel)
            return
        wanted = tunnel.interest()
        if wanted != tunnel.watched:
            self._rewatch(tunnel.client, tunnel, CLIENT, tunnel.watched[CLIENT], wanted[CLIENT])
            self._rewatch(tunnel.remote, tunnel, REMOTE, tunnel.watched[REMOTE], wanted[REMOTE])
            tunnel.watched = wanted

    def _bug(self, subject: Any) -> None:
        self._failed()
        if isinstance(subject, Tunnel) and not subject.ended:
            subject.end("server", "a bug of the server")
            self._look_at(subject)

    def _sweep(self, now: float) -> None:
        """End the tunnels whose deadline has passed."""
        for tunnel in list(self._tunnels):
            if not tunnel.lent and not tunnel.ended and tunnel.deadline() <= now:
                tunnel.expire()
                self._look_at(tunnel)
        self._sweep_at = now + SWEEP_S

    def _close_ended(self) -> None:
        over, self._over = self._over, []
        for tunnel in over:
            if tunnel not in self._tunnels:     # it was looked at twice
                continue
            self._tunnels.discard(tunnel)
            try:
                self._ended(tunnel)
            except Exception:
                self._failed()

    def _abort_each(self, why: str) -> None:
        for tunnel in list(self._tunnels):
            self._abort(tunnel, why)

    def _abort(self, tunnel: Tunnel, why: str) -> None:
        if tunnel.ended:
            return
        if tunnel.lent:                             # its thread sees it within QUIET_S, and is woken for that
            tunnel.aborted = why
            for sock in (tunnel.client, tunnel.remote):
                try:
                    sock.shutdown(socket.SHUT_RD)   # sends nothing
                except OSError:
                    pass
        else:
            tunnel.end(why)
            self._look_at(tunnel)

    # ---- which descriptors are registered -------------------------------------------------------------------------

    def _register(self, tunnel: Tunnel) -> None:
        """Register both sides. They are published first, so that the loop can go to work at once, while this thread may
        still wait for the GIL; until `adopted` says so, the loop changes no registration and closes nothing."""
        client, remote = tunnel.client.fileno(), tunnel.remote.fileno()
        wanted = tunnel.watched = tunnel.interest()
        self._watched.update({client: (tunnel, CLIENT), remote: (tunnel, REMOTE)})
        try:
            for fd, events in ((remote, wanted[REMOTE]), (client, wanted[CLIENT])):     # the client speaks first
                if events != UNREGISTERED:
                    self._poller.register(fd, events)
        except OSError as exc:                              # the system has no more to give
            tunnel.end("server", exc.strerror or str(exc))
            self.call_soon(lambda: self._look_at(tunnel))
        finally:
            tunnel.adopted = True

    def _rewatch(self, sock: socket.socket, tunnel: Tunnel, side: int, before: int, wanted: int) -> None:
        if wanted == before:
            return
        fd = sock.fileno()
        if before == UNREGISTERED:
            self._poller.register(fd, wanted)
        elif wanted == UNREGISTERED:
            self._poller.unregister(fd)
        else:
            self._poller.modify(fd, wanted)

    def _unregister(self, tunnel: Tunnel) -> None:
        for sock, events in zip((tunnel.client, tunnel.remote), tunnel.watched):
            fd = sock.fileno()
            if self._watched.pop(fd, None) and events != UNREGISTERED:
                try:
                    self._poller.unregister(fd)
                except (OSError, ValueError, KeyError):     # it could not be registered; or the loop has stopped
                    pass
        tunnel.watched = (UNREGISTERED, UNREGISTERED)

    # ---- busy tunnels ---------------------------------------------------------------------------------------------

    def _lend(self, tunnel: Tunnel) -> None:
        """Give it a thread of its own, and take it back when there is none to be had."""
        tunnel.lent = True
        self._lent += 1
        try:
            threading.Thread(target=self._relay_alone, args=(tunnel,), name="busy tunnel", daemon=True).start()
        except (RuntimeError, MemoryError) as exc:
            if not MANY:
                tunnel.end("server", "no thread: %s" % exc)
            self._take_back(tunnel)

    def _relay_alone(self, tunnel: Tunnel) -> None:
        """What the thread of a busy tunnel does. It closes nothing."""
        try:
            relay_alone(tunnel, until_quiet=MANY)
        except Exception:
            self._failed()
            tunnel.end("server", "a bug of the server")
        self.call_soon(lambda: self._take_back(tunnel))

    def _take_back(self, tunnel: Tunnel) -> None:
        tunnel.lent = False
        self._lent -= 1
        if tunnel.aborted and not tunnel.ended:
            tunnel.end(tunnel.aborted)
        if tunnel.ended:
            self._over.append(tunnel)
            return
        tunnel.up.full = tunnel.down.full = 0
        tunnel.adopted = False
        self._register(tunnel)


def relay_alone(tunnel: Tunnel, until_quiet: bool) -> None:
    """Relay one tunnel in the calling thread until it has ended, is aborted or, if wished, nothing moved for QUIET_S.

    A direction with much to move goes through a kernel pipe where there is one.
    """
    for sock in (tunnel.client, tunnel.remote):
        if sock.gettimeout() != 0:
            sock.setblocking(False)
    poll = new_poll()
    sides = {tunnel.client.fileno(): CLIENT, tunnel.remote.fileno(): REMOTE}
    watched = (UNREGISTERED, UNREGISTERED)
    look = True
    now = monotonic()
    while not tunnel.ended and not tunnel.aborted:
        if look:
            for pipe in (tunnel.up, tunnel.down):
                if pipe.full and not pipe.held:
                    pipe.use_kernel()
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
        if now - tunnel.moved_at >= QUIET_S:
            tunnel.up.leave_kernel()
            tunnel.down.leave_kernel()
            if until_quiet:
                return
            if now >= tunnel.deadline():
                tunnel.expire()


class Watch:
    """A client that has not said anything yet: it costs a descriptor, and no thread."""

    __slots__ = ("loop", "sock", "spoke")

    def __init__(self, loop: Loop, sock: socket.socket, spoke: Callable[[bool], None]) -> None:
        self.loop = loop
        self.sock = sock
        self.spoke = spoke

    def handle(self, _side: int, _events: int, _now: float) -> bool:
        said = peek(self.sock)
        if said is None:
            return False
        fd = self.sock.fileno()
        self.loop._watched.pop(fd)
        self.loop._poller.unregister(fd)
        self.spoke(said)
        return False


def peek(sock: socket.socket) -> Optional[bool]:
    """Whether there is something to read (True), the peer has left (False), or neither is known yet (None)."""
    timeout = sock.gettimeout()
    try:
        if not DONTWAIT:
            sock.setblocking(False)
        return bool(sock.recv(1, socket.MSG_PEEK | DONTWAIT))
    except BlockingIOError:
        return None
    except OSError:                         # reset
        return False
    finally:
        if not DONTWAIT:
            sock.settimeout(timeout)


class Bell:
    """Wakes the loop: a socket pair, of which one end is registered."""

    def __init__(self) -> None:
        self._heard, self._rung = socket.socketpair()
        for sock in (self._heard, self._rung):
            sock.setblocking(False)

    def fileno(self) -> int:
        return self._heard.fileno()

    def ring(self) -> None:
        try:
            self._rung.send(b"\0")
        except OSError:                     # so many are unread that the loop wakes up anyway; or it is over
            pass

    def handle(self, _side: int, _events: int, _now: float) -> bool:
        self._heard.recv(4096)
        return False

    def close(self) -> None:
        self._heard.close()
        self._rung.close()
