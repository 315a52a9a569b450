"""What the counters said, once a second, over the last minutes; and the summary for the page. Runs in a thread of the
process that serves the page."""
from __future__ import annotations

import threading
from collections import deque
from time import time
from typing import Any, Callable, Deque, Dict, List, Optional, Sequence, Tuple

from ..commands.rates import NAMES
from .meter import LOGINS, REFUSALS, STATES, Board

EVERY_S = 1.0
KEPT = 600                      # ten minutes

Sample = Tuple[float, int, int, int, int]       # Unix time, bytes up, bytes down, sessions begun, live sessions


class History:
    def __init__(self, board: Board, begun: Callable[[], int]) -> None:
        self._board = board
        self._begun = begun
        self._samples: Deque[Sample] = deque(maxlen=KEPT)
        self._lock = threading.Lock()                   # without a GIL, to copy a deque that changes may raise
        self._stop = threading.Event()
        self._thread: Optional[threading.Thread] = None

    def start(self) -> None:
        # Made here: from Python 3.13 on, a Thread that was made before a fork cannot be started after it.
        self._thread = threading.Thread(target=self._run, name="status history", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        self._add()
        while not self._stop.wait(EVERY_S):
            self._add()

    def _add(self) -> None:
        one = sample(self._board, self._begun())
        with self._lock:
            if self._samples and one[0] < self._samples[-1][0]:     # the clock was set back
                self._samples.clear()
            self._samples.append(one)

    def since(self, when: float) -> List[Sample]:
        """Those after this time; all of them if it is still to come: then the clock was set back."""
        with self._lock:
            samples = list(self._samples)
        return [one for one in samples if one[0] > when or samples[-1][0] < when]


def sample(board: Board, begun: int) -> Sample:
    live = sum(board.sum("state", state) for state in STATES)
    return round(time(), 3), board.sum("bytes", "up"), board.sum("bytes", "down"), begun, live


def summary(board: Board, history: History, begun: int, since: float, **more: Any) -> Dict[str, Any]:
    """What the page shows beside the sessions. `since` is the time of the last sample that it has."""
    now, up, down, begun, live = sample(board, begun)
    workers: Sequence[int] = [row for row in range(board.rows) if board.get(row, "pid")]
    return dict(
        more, now=now, started=board.started, up=up, down=down, begun=begun, live=live, workers=len(workers),
        restarts=board.sum("restarts"), states={state: board.sum("state", state) for state in STATES},
        held_back={name: board.sum("held", name) for name in NAMES},
        logins={result: board.sum("login", result) for result in LOGINS},
        refused={reason: board.sum("refused", reason) for reason in REFUSALS},
        datagrams=[board.sum("datagrams", way) for way in ("up", "down")], samples=history.since(since))
