"""How lines of the log look: text, one JSON object a line, and with priorities where the systemd journal reads along.

A line that states facts is logged as "word key=%(key)s ..." with one dict, so both forms show the same facts. The
command line chooses; whoever embeds the package has formatters of his own.
"""
from __future__ import annotations

import ast
import json
import logging
import os
import re
import threading
import time
from collections import deque
from typing import Any, Deque, Dict, Optional, Tuple

TEXT = "%(asctime)s %(levelname)s %(message)s"
BARE = "%(levelname)s %(message)s"                              # the journal notes the time by itself
PRIORITIES = ((logging.CRITICAL, 2), (logging.ERROR, 3), (logging.WARNING, 4), (logging.INFO, 6))     # sd-daemon(3)
DEBUG = 7
QUOTED = re.compile(r"""('(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")(:\d+)?""")     # as fields.text() quotes; and :PORT
MOST_LEFT = 1000
NOTHING = "-"                                                   # stands in the text for a fact that there is not


class Writer(logging.StreamHandler):      # type: ignore[type-arg]     # generic for mypy, not for Python 3.8
    """Writes to stderr like its base, but no thread waits while another one writes: it leaves its line to that one.

    Every session ends with a line, and threads that all wait for each other's write() are slow. Where nobody reads what
    is written, MOST_LEFT lines are kept, and then everybody waits.
    """

    def __init__(self) -> None:
        super().__init__()
        self._lines: Deque[str] = deque()
        self._writing = threading.Lock()

    def handle(self, record: logging.LogRecord) -> bool:
        """Without the lock that the base takes."""
        self.emit(record)
        return True

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._lines.append(self.format(record) + self.terminator)
            while self._lines and self._writing.acquire(blocking=len(self._lines) > MOST_LEFT):
                try:
                    self.stream.write("".join([self._lines.popleft() for _ in range(len(self._lines))]))
                    self.stream.flush()
                finally:
                    self._writing.release()         # and look again: somebody may have left a line just now
        except Exception:                           # as the base does: say it on stderr, and go on
            self.handleError(record)


class Record(logging.LogRecord):
    """What our formats show of a record. Its base also asks where and in which thread it was made, and takes it apart,
    for every line."""

    pathname = filename = module = ""           # what else a record may be asked for
    lineno = 0
    funcName = threadName = processName = ""
    thread = process = None

    def __init__(self, name: str, level: int, pathname: str, lineno: int, msg: object, args: Any, exc_info: Any,
                 func: Optional[str] = None, sinfo: Optional[str] = None, **_: object) -> None:
        self.created = time.time()
        self.msecs = int(self.created % 1 * 1000) + 0.0
        self.name = name
        self.levelno = level
        self.levelname = logging.getLevelName(level)
        self.msg = msg
        self.args = args[0] if len(args) == 1 and isinstance(args[0], dict) and args[0] else args
        self.exc_info = exc_info
        self.exc_text = None
        self.stack_info = sinfo


class TextFormatter(logging.Formatter):
    """Like its base; what the clock says is worked out once a second."""

    _last: Tuple[int, str] = (0, "")

    def __init__(self, timed: bool) -> None:
        super().__init__(TEXT if timed else BARE)
        self.timed = timed

    def format(self, record: logging.LogRecord) -> str:
        if record.exc_info or record.stack_info:
            return super().format(record)
        line = "%s %s" % (record.levelname, record.getMessage())
        return "%s %s" % (self.formatTime(record), line) if self.timed else line

    def formatTime(self, record: logging.LogRecord, datefmt: Optional[str] = None) -> str:
        second, words = self._last
        if second != int(record.created):
            second = int(record.created)
            words = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(second))
            self._last = second, words
        return "%s,%03d" % (words, record.msecs)


class JsonFormatter(logging.Formatter):
    """One object a line: time, level, event, then the event's facts in the order of the text.

    A fact that there is not is null; what the text puts in quotes is there without them, because JSON has its own.
    """

    def format(self, record: logging.LogRecord) -> str:
        said: Dict[str, Any] = {"time": utc(record.created), "level": record.levelname.lower()}
        if isinstance(record.args, dict):
            said["event"] = str(record.msg).partition(" ")[0]
            keys = re.findall(r"%\((\w+)\)", str(record.msg))
            said.update((key, plain(record.args[key])) for key in keys)
            if not keys or "=" not in str(record.msg):
                said["message"] = record.getMessage()
        else:
            said.update(event="message", message=record.getMessage())
        if record.exc_info:
            said["traceback"] = self.formatException(record.exc_info)
        return json.dumps(said, default=str)


def utc(seconds: float) -> str:
    """RFC 3339, in milliseconds."""
    return "%s.%03dZ" % (time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds)), seconds % 1 * 1000)


def plain(value: Any) -> Any:
    """A fact as JSON has it. A float to the microsecond: more digits say nothing."""
    if isinstance(value, float):
        return round(value, 6)
    if not isinstance(value, str):
        return value
    if value == NOTHING:
        return None
    found = QUOTED.fullmatch(value)
    return ast.literal_eval(found.group(1)) + (found.group(2) or "") if found else value


class Prioritized(logging.Formatter):
    """Puts <N> in front of every line of what `inner` makes, several where there is a traceback.      sd-daemon(3)"""

    def __init__(self, inner: logging.Formatter) -> None:
        super().__init__()
        self.inner = inner

    def format(self, record: logging.LogRecord) -> str:
        priority = next((number for level, number in PRIORITIES if record.levelno >= level), DEBUG)
        return "\n".join("<%d>%s" % (priority, line) for line in self.inner.format(record).split("\n"))


def formatter(kind: str, descriptor: Optional[int], journal: str) -> logging.Formatter:
    """For `kind` "text" or "json", and what is written to `descriptor`; `journal` is $JOURNAL_STREAM."""
    to_journal = is_journal(descriptor, journal)
    inner = JsonFormatter() if kind == "json" else TextFormatter(not to_journal)
    return Prioritized(inner) if to_journal else inner


def is_journal(descriptor: Optional[int], journal: str) -> bool:
    """Whether the journal reads it: $JOURNAL_STREAM names its device and inode.                   systemd.exec(5)"""
    try:
        status = os.fstat(-1 if descriptor is None else descriptor)
    except OSError:
        return False
    return journal == "%d:%d" % (status.st_dev, status.st_ino)
