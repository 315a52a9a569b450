"""Who is connected: the registry that caps, expires, aborts and counts sessions.

A session lives from accept to close. Its socket belongs to the thread that serves it; everybody else may only shut it
down, through here and under the lock, so that nobody ever touches a descriptor that was closed and used again.
"""
from __future__ import annotations

import itertools
import socket
import threading
from time import monotonic
from typing import Dict, Iterator, Optional, Union

from .relay import Tunnel
from .wire import Address, text


class Session:
    """What there is to know about one client, for the log and for whoever watches."""

    __slots__ = ("number", "client", "sock", "started", "user", "cmd", "dst", "reached", "rep", "tunnel", "up", "down",
                 "ended_by", "why")

    def __init__(self, number: int, client: Address, sock: socket.socket) -> None:
        self.number = number
        self.client = client
        self.sock = sock
        self.started = monotonic()
        self.user: Optional[bytes] = None
        self.cmd = ""                               # "" until the request is there
        self.dst: Optional[Address] = None
        self.reached: Optional[Address] = None      # the address that answered, or called
        self.rep = ""                               # of the last reply
        self.tunnel: Optional[Tunnel] = None
        self.up = 0
        self.down = 0
        self.ended_by = ""
        self.why = ""

    # The order in which a session's facts stand in the log; a fact that there is not is "-".
    LINE = ("session client=%(client)s user=%(user)s cmd=%(cmd)s dst=%(dst)s reached=%(reached)s rep=%(rep)s "
            "up=%(up)d down=%(down)d seconds=%(seconds).3f ended=%(ended)s why=%(why)s")

    def facts(self) -> Dict[str, Union[str, int, float]]:
        return {"client": str(self.client), "user": "-" if self.user is None else text(self.user),
                "cmd": self.cmd or "-", "dst": str(self.dst or "-"), "reached": str(self.reached or "-"), "rep": self.rep or "-",
                "up": self.up, "down": self.down, "seconds": monotonic() - self.started,
                "ended": self.ended_by or "-", "why": ascii(self.why) if self.why else "-"}


class Sessions:
    """The live sessions, by their client's socket."""

    def __init__(self, most: int, handshake_s: float) -> None:
        self.most = most
        self.handshake_s = handshake_s
        self._numbers = itertools.count(1)
        self._lock = threading.Lock()
        self._live: Dict[socket.socket, Session] = {}
        self._negotiating: Dict[Session, float] = {}    # to their deadlines, which come in this order

    def __len__(self) -> int:
        return len(self._live)

    def __iter__(self) -> Iterator[Session]:
        with self._lock:
            return iter(list(self._live.values()))

    def __getitem__(self, sock: socket.socket) -> Session:
        return self._live[sock]

    def admit(self, sock: socket.socket, client: Address) -> Optional[Session]:
        """A new session, or None when there are `most` of them already."""
        session = Session(next(self._numbers), client, sock)
        with self._lock:
            if len(self._live) >= self.most:
                return None
            self._live[sock] = session
            if self.handshake_s:
                self._negotiating[session] = session.started + self.handshake_s
        return session

    def remove(self, sock: socket.socket) -> None:
        """To be called before `sock` is closed."""
        with self._lock:
            session = self._live.pop(sock, None)
            if session:
                self._negotiating.pop(session, None)

    def negotiated(self, session: Session) -> None:
        """The request is here: the handshake's deadline no longer holds."""
        with self._lock:
            self._negotiating.pop(session, None)

    def attach(self, session: Session, tunnel: Tunnel) -> None:
        with self._lock:
            session.tunnel = tunnel

    def detach(self, session: Session) -> None:
        """To be called before the tunnel's remote is closed."""
        with self._lock:
            tunnel, session.tunnel = session.tunnel, None
        if tunnel:
            session.up, session.down = tunnel.up.total, tunnel.down.total
            session.ended_by, session.why = tunnel.ended_by, tunnel.why

    def expire(self) -> None:
        """Shut down whoever is over the handshake's deadline; the thread that serves it sees EOF and closes."""
        if not self._negotiating:
            return
        now = monotonic()
        with self._lock:
            late = list(itertools.takewhile(lambda item: item[1] <= now, self._negotiating.items()))
            for session, _deadline in late:
                del self._negotiating[session]
                self._shut(session, "handshake timeout")

    def abort(self, why: str) -> None:
        """End every session, now."""
        with self._lock:
            for session in self._live.values():
                if session.tunnel:
                    session.tunnel.abort(why)
                else:
                    self._shut(session, why)

    def wait_empty(self, timeout_s: float, hurry: threading.Event) -> bool:
        """Whether all sessions ended within timeout_s; `hurry` ends the wait at once."""
        deadline = monotonic() + timeout_s
        while self._live and monotonic() < deadline and not hurry.is_set():
            hurry.wait(0.02)
        return not self._live

    @staticmethod
    def _shut(session: Session, why: str) -> None:
        session.ended_by = why
        try:
            session.sock.shutdown(socket.SHUT_RDWR)
        except OSError:                                 # the client was faster
            pass
