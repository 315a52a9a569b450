"""The relay loop: one thread that relays every quiet tunnel of the process and every UDP association, and waits for
silent newcomers.

An event loop in the classic form: wait for events, let each tunnel move its bytes, then close what has ended. An idle
tunnel is two descriptors and a few small objects: no thread, no buffer, no timer of its own. A tunnel that turns busy
is lent to a thread of its own, which waits for its two sockets alone and sends the bytes through a kernel pipe; when it
is quiet again the loop takes it back. Where there is only select(), each tunnel has such a thread to its end. A UDP
association is a Relay as a tunnel is, but never busy, and its turns come when tunnels have had theirs: see Relay.

Any thread may call `relay`, `watch`, `call_soon` and `stop`, in a forked child only the last of them; everything else
runs in the loop's thread, which alone closes sockets that it has registered. So no event can name a descriptor that was
closed and used again: closing comes after the batch of events in which the tunnel ended.
"""
from __future__ import annotations

import errno
import os
import select
import socket
import threading
from collections import deque
from functools import partial
from time import monotonic, sleep
from typing import Any, Callable, Deque, List, Set

from ..net import affinity
from ..net.poller import BATCH, READ
from ..net.shares import Share
from ..protocol.memory import give_back, persist
from . import splice
from .busy import QUIET_S, borrow, give_up, relay_bursts, relay_busy
from .limited import Timers, read_on
from .pipe import DONTWAIT
from .relay import Relay
from .watch import Bell, Registered, Watch

CROWD = 256                         # tunnels; when nearly all of so many have ended, their memory is given back
SWEEP_S = 1.0                       # how late a time limit may be noticed; no wait is longer
BURSTS_S = 0.0003                   # how long bursts may take before tunnels come again; one burst takes as long
MAX_LENT = splice.MAX_PIPES         # threads of busy tunnels at a time; further ones stay in the loop
MANY = hasattr(select, "poll")      # whether one thread can wait for thousands of descriptors


class Loop:
    """`ended(tunnel)` is called once for every tunnel when it is over, in the loop's thread; in that of relay() if it
    has ended before. Then close it. Where it says "tunnel" here, any Relay is meant.

    `failed()` is called inside of an except block, for an exception that cost a tunnel its life: a bug of ours.
    """

    def __init__(self, ended: Callable[[Any], None], failed: Callable[[], object]) -> None:
        self._ended = ended
        self._failed = failed
        self._registered = Registered()
        self._poller, self._watched = self._registered.poller, self._registered.watched
        self._tunnels: Set[Relay] = set()
        self._most, self._few = 0, False                        # tunnels at a time; whether few of these are left
        self._over: List[Relay] = []                           # to be closed after this batch
        self._calls: Deque[Callable[[], object]] = deque()
        self._timers = Timers()                                 # of directions that a rate limit holds back
        self._lent = 0                                          # to threads of their own
        self._threads = Share(MAX_LENT)                         # for busy tunnels
        self._gate = threading.Lock()                           # held while a tunnel comes
        self._stopping = ""                                     # why, once it is to stop: nothing comes in then
        self._sweep_at = 0.0
        self.process = os.getpid()                              # of its thread; a forked child needs a loop of its own
        self.failed = False                                     # a bug has ended it: relay() refuses everything
        self._bell = Bell()
        self._poller.register(self._bell.fd, READ)
        self._watched[self._bell.fd] = self._bell
        self._thread = threading.Thread(target=self._run, name="relay loop", daemon=True)

    def start(self) -> None:
        """Raises RuntimeError when the system has no thread to give."""
        self._thread.start()

    def __len__(self) -> int:
        return len(self._tunnels)

    # ---- for any thread -------------------------------------------------------------------------------------------

    def relay(self, tunnel: Relay) -> None:
        """Relay a tunnel to its end. The sockets are the loop's from here on; they have no timeout, for which Python
        would wait in spite of MSG_DONTWAIT. Raises OSError, and has not taken them, when that cannot be."""
        if not DONTWAIT:
            for sock in tunnel.sockets():
                sock.setblocking(False)
        if tunnel.bursts:
            tunnel.woken_by(self._wake)
        with self._gate:
            self._check_open()
            tunnel.moved_at = monotonic()
            over = tunnel.ended or not self._take(tunnel)
        if over:
            self._close_tunnel(tunnel)

    def _take(self, tunnel: Relay) -> bool:
        """Whether the loop has it now, and may have ended it already; or else it has ended here."""
        if MANY:
            return self._register(tunnel)
        tunnel.lent = True
        self._tunnels.add(tunnel)
        self.call_soon(partial(self._lend, tunnel))
        return True

    def _check_open(self) -> None:
        if self._stopping:
            raise OSError(errno.ECANCELED, self._stopping)

    def watch(self, sock: socket.socket, spoke: Callable[[bool], None]) -> None:
        """Call spoke(whether there is something to read) as soon as the client has said something or left. Raises
        OSError when the system has no more to give, or the loop has stopped."""
        watch, fd = Watch(sock, spoke, self._registered.forget), sock.fileno()
        with self._gate:
            self._check_open()
            self._poller.register(fd, READ)
            self._watched[fd] = watch

    def call_soon(self, call: Callable[[], object]) -> None:
        """Have the loop's thread call it, after the events that it is busy with."""
        self._calls.append(call)
        self._bell.ring()

    def change_all(self, change: Callable[[Any], None]) -> None:
        """Have change(tunnel) called for each tunnel, by the thread that has it."""
        self.call_soon(partial(self._change_each, change))

    def abort_all(self, why: str) -> None:
        """End all tunnels; both sides of each are reset."""
        self.call_soon(lambda: self._abort_each(why))

    def stop(self, why: str) -> None:
        """End all tunnels and then the loop's thread, and wait for that. A tunnel that comes later is not taken.
        In a forked child it only closes the descriptors of the loop: the tunnels are the parent's."""
        if os.getpid() != self.process:
            self._close()
            return
        with self._gate:
            self._stopping = self._stopping or why
        self.abort_all(why)
        if self._thread.is_alive():
            if self._thread is not threading.current_thread():
                self._thread.join()
        else:                                       # it never ran, or this is the second call
            self._end_all()

    # ---- the loop -------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        affinity.batch()
        try:
            persist(self._serve)
        except Exception:                           # no tunnel may wait for a thread that is gone
            self.failed = True
            self._failed()
        self._end_all()

    def _end_all(self) -> None:
        """End the tunnels that are left, and close the descriptors of the loop."""
        with self._gate:
            self._stopping = self._stopping or "the relay loop failed"
        self._abort_each(self._stopping)
        while any(tunnel.lent for tunnel in self._tunnels):     # after a failure only: _serve() waits for them
            self._run_calls()
            sleep(QUIET_S / 10)
        self._close_ended()
        self._close()

    def _close(self) -> None:
        self._watched.clear()
        self._poller.close()
        self._bell.close()

    def _serve(self) -> None:
        poll, watched, paused, bursts = self._poller.poll, self._watched, self._timers.heap, self._registered.ready
        subject, calls, worked_at, note_at = None, self._calls, splice.worked_at, 0.0
        while not self._stopping or self._lent or calls:
            wait_s = 0.0 if bursts else self._timers.wait_s(SWEEP_S) if paused else SWEEP_S
            ready = poll(wait_s, BATCH)
            now = monotonic()
            if ready and now >= note_at:
                worked_at[0], note_at = now, now + splice.BRIEF_S / 2
            for fd, events in ready:
                try:
                    subject = watched[fd]
                except KeyError:                # unregistered by an earlier event of this batch; or not published yet
                    with self._gate:            # by a thread that holds the gate, and would get no turn if we spun
                        continue
                try:
                    if subject.handle(fd, events, now):
                        self._look_at(subject)
                except Exception:               # one exception costs one tunnel
                    self._bug(subject)
            subject = None                      # keep no tunnel alive while the loop waits
            if bursts:
                self._relay_bursts(now)
            if paused and paused[0][0] <= now:
                self._go_on(now)
            if calls:
                self._run_calls()
            if now >= self._sweep_at:
                del now, ready                  # made amid a crowd, perhaps: protocol/memory.py
                self._sweep()
            if self._over:
                self._close_ended()

    def _relay_bursts(self, now: float) -> None:
        """Relay the next bursts, in turns, before the tunnels are looked at again: one at the least."""
        ready, until = self._registered.ready, monotonic() + BURSTS_S
        while ready:
            fd = next(iter(ready))
            relay, events = ready.pop(fd)
            try:
                if not relay.ended and relay.handle(fd, events, now):
                    self._look_at(relay)
            except Exception:
                self._bug(relay)
            if monotonic() >= until:
                return

    def _go_on(self, now: float) -> None:
        """Read from the directions that were paused until now."""
        for tunnel, pipe in self._timers.due(now):
            try:
                read_on(tunnel, pipe, now)
                self._look_at(tunnel)
            except Exception:
                self._bug(tunnel)

    def _run_calls(self) -> None:
        while self._calls:
            try:
                self._calls.popleft()()
            except Exception:
                self._failed()

    def _look_at(self, tunnel: Relay) -> None:
        """After an event that changed more than bytes: has it ended, is it busy, what is to be waited for?"""
        if tunnel.ended:
            self._over.append(tunnel)
            self._registered.remove(tunnel)
            return
        if tunnel.busy() and splice.available and self._threads.take(tunnel.owner):
            self._registered.remove(tunnel)
            self._lend(tunnel)
            return
        self._registered.renew(tunnel)
        if tunnel.paused():
            self._timers.note(tunnel)

    def _bug(self, subject: object) -> None:
        self._failed()
        if isinstance(subject, Relay) and subject not in self._over:
            subject.end("server", "a bug of the server")
            self._over.append(subject)
            self._registered.remove(subject)

    def _sweep(self) -> None:
        """End the tunnels whose deadline has passed."""
        self._sweep_at = 0.0                        # as in _serve()
        with self._gate:
            self._shrink()
            now = monotonic()
            for tunnel in [one for one in self._tunnels if one.deadline() <= now and not (one.lent or one.ended)]:
                tunnel.expire()
                self._look_at(tunnel)
        self._sweep_at = now + SWEEP_S

    def _shrink(self) -> None:
        """When a crowd has left, give its memory back."""
        few, self._most = self._few, max(self._most, len(self._tunnels))
        self._few = len(self._tunnels) <= self._most // 8
        if self._most < CROWD or not (few and self._few):       # the second time: those that were ending have ended
            return
        self._most = 0
        give_back(self._watched, self._tunnels)

    def _close_ended(self) -> None:
        for tunnel in self._over:
            self._tunnels.discard(tunnel)
            self._close_tunnel(tunnel)
        self._over.clear()                          # not a new list, made amid a crowd

    def _close_tunnel(self, tunnel: Relay) -> None:
        try:
            self._ended(tunnel)
        except Exception:
            self._failed()

    def _change_each(self, change: Callable[[Any], None]) -> None:
        with self._gate:
            for tunnel in self._tunnels:
                tunnel.change = change              # the thread of a lent tunnel sees it soon
                self._calls.append(partial(self._change, tunnel))

    def _change(self, tunnel: Relay) -> None:
        """Do what another thread has asked for, and take note of a pause, if the loop has the tunnel."""
        with self._gate:                            # the thread that brings it may be registering it
            if tunnel.lent or tunnel.ended:
                return
        try:
            tunnel.change_now()
            self._look_at(tunnel)
        except Exception:
            self._bug(tunnel)

    def _wake(self, tunnel: Relay) -> None:
        """By any thread: have the loop call change_now()."""
        self.call_soon(partial(self._change, tunnel))

    def _abort_each(self, why: str) -> None:
        with self._gate:                            # a lent tunnel must not be closed meanwhile
            for tunnel in self._tunnels:
                self._abort(tunnel, why)

    def _abort(self, tunnel: Relay, why: str) -> None:
        if tunnel.lent:
            tunnel.aborted = why                    # first: its thread takes EOF for the client's else
        if tunnel.ended:
            return
        if tunnel.lent:                             # its thread is woken, and sees it
            for sock in tunnel.sockets():
                try:
                    sock.shutdown(socket.SHUT_RD)   # sends nothing
                except OSError:
                    pass
        else:
            tunnel.end(why)
            self._look_at(tunnel)

    def _register(self, tunnel: Relay) -> bool:
        """Whether the loop has it now, and may have ended it already; or else the tunnel has ended here."""
        try:
            self._tunnels.add(tunnel)
            self._registered.renew(tunnel)
        except Exception as exc:                    # nothing more can be registered, or memory has run out
            self._tunnels.discard(tunnel)
            give_up(tunnel, exc, self._failed)
            return False
        if tunnel.change or tunnel.paused():
            self._wake(tunnel)
        return True

    # ---- tunnels in threads of their own --------------------------------------------------------------------------

    def _lend(self, tunnel: Relay) -> None:
        """Give a busy tunnel a thread of its own, and take it back when there is none to be had."""
        tunnel.lent = True
        self._lent += 1
        try:
            threading.Thread(target=self._relay_busy, args=(tunnel,), name="busy tunnel", daemon=True).start()
        except (RuntimeError, MemoryError):
            self._take_back(tunnel)

    def _relay_busy(self, tunnel: Relay) -> None:
        """The thread of a busy tunnel."""
        affinity.unpin()
        borrow(tunnel, relay_bursts if tunnel.bursts else partial(relay_busy, until_quiet=MANY), self._failed)
        self.call_soon(lambda: self._take_back(tunnel))

    def _take_back(self, tunnel: Relay) -> None:
        tunnel.lent = False
        self._lent -= 1
        if MANY:                                        # else all are lent, whatever their number
            self._threads.give_back(tunnel.owner)
        if tunnel.aborted and not tunnel.ended:
            tunnel.end(tunnel.aborted)
        if tunnel.ended:
            self._over.append(tunnel)
            return
        for pipe in tunnel.pipes():
            pipe.large = 0
        if not self._register(tunnel):
            self._over.append(tunnel)
