"""The live sessions as a table in the log: SIGUSR1. Reads what others keep, and asks the kernel for what nobody does.

Nothing here costs a session anything until somebody asks.
"""
from __future__ import annotations

import logging
import socket
import struct
from time import monotonic
from typing import Dict, List, Optional, Tuple

from ..protocol.facts import Facts
from .sessions import Session, Sessions

log = logging.getLogger(__name__)

LINE = ("live id=%(id)d client=%(client)s user=%(user)s cmd=%(cmd)s dst=%(dst)s state=%(state)s age=%(age).1f "
        "idle=%(idle)s up=%(up)d down=%(down)d rate=%(rate)d")
# struct tcp_info of linux/tcp.h: 8 bytes, 9 numbers, then milliseconds since data was last sent, an ACK was sent, data
# was last received.
TCP_INFO = getattr(socket, "TCP_INFO", 0)
LAST_DATA = struct.Struct("=8x36xI4xI")


class Table:
    """Remembers the totals of the last time, for the rates."""

    def __init__(self) -> None:
        self._before: Dict[int, Tuple[float, int]] = {}         # id: when, and bytes both ways

    def log(self, sessions: Sessions) -> None:
        """One line for each session, the oldest first, and one that counts them."""
        seen = {}
        for session in sessions:
            facts = self.facts(session, sessions)
            seen[session.number] = monotonic(), int(facts["up"]) + int(facts["down"])
            log.info(LINE, facts)
        self._before = seen
        log.info("live sessions=%(sessions)d", {"sessions": len(seen)})

    def facts(self, session: Session, sessions: Sessions) -> Facts:
        """`rate` is bytes a second, both ways together, since the last table, or since the session began."""
        now = monotonic()
        up, down = session.moved()
        when, before = self._before.get(session.number, (session.started, 0))
        quiet = session.association
        idle_s = now - quiet.moved_at if quiet else sessions.with_sockets(session, idle_seconds)
        age = now - session.started
        return Facts(session.facts(), id=session.number, state=session.state(), age=age,
                     idle=None if idle_s is None else round(min(idle_s, age), 1), up=up, down=down,
                     rate=round((up + down - before) / max(now - when, 0.001)))


def idle_seconds(sockets: List[socket.socket]) -> Optional[float]:
    """For how long no data came or went on any of these; None where nobody can tell.

    The kernel counts it for each TCP connection, in milliseconds, to the clock tick (4 ms or so). Linux only.
    """
    silences = []
    for sock in sockets:
        try:
            raw = sock.getsockopt(socket.IPPROTO_TCP, TCP_INFO, LAST_DATA.size) if TCP_INFO else b""
        except OSError:
            raw = b""
        if len(raw) == LAST_DATA.size:
            silences.append(min(LAST_DATA.unpack(raw)) / 1000)
    return min(silences) if silences else None
