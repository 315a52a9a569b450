"""What the relay loop waits for: the descriptors of what it relays, clients that have not said anything yet, and other
threads.
"""
from __future__ import annotations

import errno
import socket
from typing import Any, Callable, Dict, Optional, Tuple

from ..net.poller import new_poller
from .pipe import DONTWAIT
from .relay import Relay, rewatch


class Watch:
    """A client that has not said anything yet: it costs a descriptor, and no thread."""

    __slots__ = ("sock", "spoke", "forget")

    def __init__(self, sock: socket.socket, spoke: Callable[[bool], None], forget: Callable[[int], None]) -> None:
        """forget(fd) unregisters it, then spoke(whether there is something to read) is called."""
        self.sock = sock
        self.spoke = spoke
        self.forget = forget

    def handle(self, fd: int, _events: int, _now: float) -> bool:
        said = peek(self.sock)
        if said is None:
            return False
        self.forget(fd)
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
    """Wakes a thread that waits in poll(): a socket pair, of which one end is registered. A signal handler may ring."""

    def __init__(self) -> None:
        self._heard, self._rung = socket.socketpair()
        for sock in (self._heard, self._rung):
            sock.setblocking(False)
        self.fd = self._heard.fileno()

    def ring(self) -> None:
        try:
            self._rung.send(b"\0")
        except OSError:                     # so many are unread that the loop wakes up anyway; or it is over
            pass

    def clear(self) -> None:
        self._heard.recv(4096)

    def handle(self, _fd: int, _events: int, _now: float) -> bool:
        self.clear()
        return False

    def close(self) -> None:
        self._heard.close()
        self._rung.close()


class Later:
    """In the place of a relay whose turn comes when tunnels have had theirs: see Relay.bursts."""

    __slots__ = ("relay", "ready")

    def __init__(self, relay: Relay, ready: Dict[int, Tuple[Relay, int]]) -> None:
        self.relay = relay
        self.ready = ready

    def handle(self, fd: int, events: int, _now: float) -> bool:
        self.ready[fd] = self.relay, events
        return False


class Registered:
    """`watched` has, by descriptor, that whose handle() is to be called: Tunnel, Later, Watch or Bell.

    A descriptor is registered first and only then published there: an event that comes between is seen again at once.
    `ready` has the events of those relays whose turn comes later, by descriptor; the next one is first.
    """

    def __init__(self) -> None:
        self.poller = new_poller()
        self.watched: Dict[int, Any] = {}
        self.ready: Dict[int, Tuple[Relay, int]] = {}

    def renew(self, relay: Relay) -> None:
        """Wait for what it wants now. Raises OSError, and then waits for none of its descriptors any more."""
        wanted, before = relay.interest(), relay.watched
        if wanted == before:
            return
        fds, relay.watched = relay.fds(), wanted
        try:
            rewatch(self.poller, fds, before, wanted)
            if len(before) < len(wanted):
                one = Later(relay, self.ready) if relay.bursts else relay
                # All in one step: after the first event, the loop's thread may have ended the relay and closed them.
                self.watched.update(dict.fromkeys(fds[len(before):], one))
        except (OSError, ValueError, MemoryError) as exc:
            self.remove(relay)
            if isinstance(exc, ValueError):
                raise OSError(errno.EBADF, str(exc)) from None
            raise

    def remove(self, relay: Relay) -> None:
        """Wait for none of its descriptors any more."""
        for fd, _ in zip(relay.fds(), relay.watched):
            self.forget(fd)
        relay.watched = ()

    def forget(self, fd: int) -> None:
        self.watched.pop(fd, None)
        try:
            self.poller.unregister(fd)
        except (OSError, KeyError, ValueError):     # not registered, or closed by its owner before its time
            pass
