"""The line at the bottom of a terminal that renews itself, once a second; the log scrolls above it.

The log erases the line before it writes (log.py), the next second draws it again. Drawn by the main loop of the
program, written by a thread of its own, so that a terminal which takes nothing (Ctrl-S) stops neither.
"""
from __future__ import annotations

import os
from functools import partial
from time import monotonic
from typing import Callable, List, Tuple

from ..net.writer import CLOSE_S, Writer
from .history import sample
from .meter import Board

ERASE = b"\r\033[K"                     # ECMA-48: to the first column, erase to the end of the line
EVERY_S = 1.0
COLUMNS = 80                            # where the terminal does not tell
UNITS = ("B", "kB", "MB", "GB", "TB", "PB")


class Line:
    def __init__(self, fd: int, board: Board, begun: Callable[[], int]) -> None:
        self.due = monotonic() + EVERY_S
        self._fd = fd
        self._board = board
        self._begun = begun
        self._before = sample(board, begun())
        self._writer = Writer(partial(write_last, fd), "".format)

    def draw(self) -> None:
        """If it is time."""
        if monotonic() < self.due:
            return
        self.due = monotonic() + EVERY_S
        now = sample(self._board, self._begun())
        words, self._before = text(self._before, now), now
        self._writer.put(fitting(words, columns(self._fd) - 1))

    def close(self) -> None:
        self._writer.put("")
        self._writer.close(CLOSE_S)


def write_last(fd: int, data: bytes) -> int:
    """Of several lines that are late, the last."""
    os.write(fd, ERASE + data.splitlines()[-1])
    return len(data)


def columns(fd: int) -> int:
    try:
        return os.get_terminal_size(fd).columns or COLUMNS
    except OSError:
        return COLUMNS


def fitting(words: str, room: int) -> str:
    """As many of its parts as there is room for: no figure is cut."""
    if len(words) <= room:
        return words
    return words[:max(0, *(words.rfind(between, 0, room + len(between)) for between in ("   ", ", ")))]


def text(before: Tuple[float, ...], now: Tuple[float, ...]) -> str:
    """Two samples (history.sample) as words; the rates are those between them."""
    seconds = max(now[0] - before[0], 0.001)
    up, down, begun = ((new - old) / seconds for new, old in zip(now[1:4], before[1:4]))
    parts: List[str] = [
        "%d session%s" % (now[4], "" if now[4] == 1 else "s"), "%.0f conn/s" % begun,
        "up %s/s" % amount(up), "down %s/s" % amount(down),
        "total %d conn, up %s, down %s" % (now[3], amount(now[1]), amount(now[2]))]
    return "   ".join(parts)


def amount(size: float) -> str:
    """Bytes in three digits or so."""
    unit = 0
    while size >= 999.5 and unit < len(UNITS) - 1:
        size /= 1000
        unit += 1
    return ("%.0f %s" if unit == 0 or size >= 99.95 else "%.1f %s") % (size, UNITS[unit])
