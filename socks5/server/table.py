"""The live sessions as a table in the log: SIGUSR1. Reads what others keep; nothing here costs a session anything until
it is asked for. Runs in the thread of serve_forever()."""
from __future__ import annotations

import logging
import os
from time import monotonic
from typing import Dict, Tuple

from ..protocol.facts import Facts
from .sessions import Session, Sessions

log = logging.getLogger(__name__)

LINE = ("live id=%(id)d client=%(client)s user=%(user)s cmd=%(cmd)s dst=%(dst)s state=%(state)s age=%(age).1f "
        "idle=%(idle)s up=%(up)d down=%(down)d rate=%(rate)d")


class Table:
    """Remembers the totals of the last time, for the rates."""

    def __init__(self) -> None:
        self._before: Dict[int, Tuple[float, int]] = {}         # id: when, and bytes both ways

    def log(self, sessions: Sessions) -> None:
        """One line for each session, the oldest first, and one that counts them."""
        seen = {}
        for session in sorted(sessions, key=lambda session: session.number):
            facts = self.facts(session)
            seen[session.number] = monotonic(), int(facts["up"]) + int(facts["down"])
            log.info(LINE, facts)
        self._before = seen
        log.info("live sessions=%(sessions)d pid=%(pid)d", Facts(sessions=len(seen), pid=os.getpid()))

    def facts(self, session: Session) -> Facts:
        """`rate` is bytes a second, both ways together, since the last table, or since the session began."""
        now = monotonic()
        facts = session.facts()
        up, down = session.moved()
        when, before = self._before.get(session.number, (session.started, 0))
        idle_s = session.idle_s(now)
        return Facts(facts, id=session.number, state=session.state(), age=now - session.started,
                     idle=None if idle_s is None else round(idle_s, 1), up=up, down=down,
                     rate=round((up + down - before) / max(now - when, 0.001)))
