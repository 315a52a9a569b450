"""The log of the command line: text or JSON, priorities where the systemd journal reads it, and a thread that writes.

A record is written at once where that cannot wait, else by a thread (net/writer.py): nothing waits for the reader of
the log. A program that embeds the package has handlers and formatters of its own.
"""
from __future__ import annotations

import json
import logging
import os
import time
from enum import Enum
from typing import Any, Callable, Dict, Optional, Tuple

from .brief import BriefFormatter
from .net.writer import CLOSE_S, PIPE_BUF, Write, Writer, nothing, writing_at_once, writing_to
from .protocol.facts import Facts, FactsRecord, LeanRecord, positional
from .protocol.messages import Address

TEXT = "%(asctime)s %(levelname)s %(message)s"
BARE = "%(levelname)s %(message)s"                              # the journal notes the time by itself
PRIORITIES = ((logging.CRITICAL, 2), (logging.ERROR, 3), (logging.WARNING, 4), (logging.INFO, 6))     # sd-daemon(3)
DEBUG = 7
MOST_BYTES = PIPE_BUF - len("<6>\n")                            # of a line that is to stay whole
MORE = "..."                                                    # at the end of what was cut
LOST = "lost lines=%(lines)d"
MILLISECONDS = [",%03d " % number for number in range(1000)]      # to format a number costs ten times as much
MARK = "| "                                                    # before its lines, or its text could begin a line


class Handler(logging.Handler):
    """Makes text of records, and has a Writer write it.

    write, at_once, release     as net.writer.Writer takes them: os.write with a descriptor, say
    """

    def __init__(self, write: Write, form: logging.Formatter, at_once: Optional[Write] = None,
                 release: Callable[[], object] = nothing) -> None:
        super().__init__()
        self.form = form
        self.writer = Writer(write, lost_line(form), release=release, at_once=at_once)

    def createLock(self) -> None:
        """None is needed: what is shared is the writer."""
        self.lock = None

    def handle(self, record: logging.LogRecord) -> bool:
        """As logging.Handler.handle(), without a lock and filters. The record is not kept: with a traceback, it holds
        every variable of its frames, sockets too."""
        try:
            text = self.form.format(record)
        except MemoryError:
            self.writer.lose(1)
            return True
        except Exception as exc:            # an argument that does not fit its format, say
            text = "ERROR cannot be written: %s" % ascii(exc)
        self.writer.put(text)
        return True

    def emit(self, record: logging.LogRecord) -> None:
        self.handle(record)

    def close(self) -> None:
        """Write what is queued, for CLOSE_S at the most. logging.shutdown() calls this, too."""
        self.writer.close(CLOSE_S)
        super().close()


def install(level: int, kind: str, stream: Any, journal: str, before: bytes = b"",
            brief: bool = False) -> logging.Handler:
    """Have the package's logger write to `stream` (None or closed: to nothing). Gives the handler, to be closed at the
    end. The root logger is left alone: it belongs to a program that embeds the package.

    kind      "text" or "json"
    journal   $JOURNAL_STREAM
    before    written in front of each chunk: erases the line that renews itself on a terminal
    brief     text is for people at a terminal: a session in a short line
    """
    handler: logging.Handler = logging.NullHandler()
    if not getattr(stream, "closed", stream is None):
        at_once, release = writing_at_once(stream)
        handler = Handler(after(before, writing_to(stream)), formatter(kind, descriptor_of(stream), journal, brief),
                          at_once and after(before, at_once), release)
    log = logging.getLogger("socks5")
    for former in log.handlers[:]:
        log.removeHandler(former)
    log.addHandler(handler)
    log.propagate = False
    log.setLevel(level)
    return handler


def after(before: bytes, write: Write) -> Write:
    """A `write` that writes `before` first, in the same call."""
    def both(data: bytes) -> Optional[int]:
        done = write(before + data)
        return None if done is None else max(done - len(before), 0)

    return both if before else write


def descriptor_of(stream: Any) -> Optional[int]:
    try:
        return int(stream.fileno())
    except (AttributeError, OSError, ValueError):           # not a file
        return None


def lost_line(form: logging.Formatter) -> Callable[[int], str]:
    """The line that says how many lines were lost."""
    return lambda lines: form.format(FactsRecord("socks5.log", logging.WARNING, LOST, Facts(lines=lines)))


# ---- text --------------------------------------------------------------------------------------------------------

class TextFormatter(logging.Formatter):
    """TEXT or BARE as the base shows it, the time once a second, in local time, which fail2ban expects.

    One record is one line of printable text, whatever its arguments are; a traceback follows, each line marked.
    """

    def __init__(self, timed: bool) -> None:
        super().__init__(TEXT if timed else BARE)
        self.timed = timed
        self.clock = 0, ""                      # the last second that was shown, and its local time as text

    def format(self, record: logging.LogRecord) -> str:
        lean = isinstance(record, LeanRecord)                       # which has no traceback
        words = record.text() if lean else words_of(record)         # type: ignore[attr-defined]
        if not self.timed:
            text = f"{record.levelname} {words}"
        else:
            second, shown = self.clock
            elapsed = record.created - second
            if not 0 <= elapsed < 1:
                second, shown = self.clock = clock_of(int(record.created))
                elapsed = record.created - second
            text = f"{shown}{MILLISECONDS[int(elapsed * 1000)]}{record.levelname} {words}"
        if lean or not (record.exc_text or record.exc_info or record.stack_info):
            return text
        trouble = record.exc_text or record.exc_info and self.formatException(record.exc_info)
        for more in filter(None, (trouble, record.stack_info)):
            text += "".join("\n" + MARK + printable(line) for line in more.split("\n"))
        return text


def clock_of(second: int) -> Tuple[int, str]:
    """The second, and its local time as text."""
    return second, time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(second))


def words_of(record: logging.LogRecord) -> str:
    """The message, printable. A plain dict of arguments is read like Facts."""
    args = record.args
    if isinstance(args, dict) and args:
        return (args if isinstance(args, Facts) else Facts(args)).fill(str(record.msg))
    return printable(record.getMessage())


def printable(text: str) -> str:
    """With escapes in the place of newlines, terminal codes and the like."""
    return text if text.isprintable() else "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


# ---- JSON --------------------------------------------------------------------------------------------------------

class JsonFormatter(logging.Formatter):
    """One object a line: time (UTC), level, event, then the event's facts in the order of the text, typed.

    A line that would be longer than most_bytes has its longest texts cut, so that it is valid JSON all the same.
    """

    def __init__(self, most_bytes: int = MOST_BYTES) -> None:
        super().__init__()
        self.most_bytes = most_bytes

    def format(self, record: logging.LogRecord) -> str:
        said: Dict[str, Any] = {"time": utc(record.created), "level": record.levelname.lower()}
        message = str(record.msg)
        if isinstance(record.args, dict):
            said["event"] = message.partition(" ")[0]
            keys = positional(message)[1]
            for key in keys:
                said[key] = plain(record.args.get(key))
            if not keys or "=" not in message:
                said["message"] = words_of(record)
        else:
            said.update(event="message", message=record.getMessage())
        if record.exc_text or record.exc_info:
            said["traceback"] = record.exc_text or (record.exc_info and self.formatException(record.exc_info))
        line = json.dumps(said)
        return line if len(line) <= self.most_bytes else shortened(said, self.most_bytes)


def utc(seconds: float) -> str:
    """RFC 3339, in milliseconds."""
    return "%s.%03dZ" % (time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds)), seconds % 1 * 1000)


def plain(value: Any) -> Any:
    """A fact as JSON has it. A float to the microsecond: more digits say nothing."""
    if isinstance(value, bytes):
        return name_of(value)
    if value is None or value == "":
        return None
    if isinstance(value, Enum):
        return value.name
    if isinstance(value, float):
        return round(value, 6)
    if isinstance(value, Address) and isinstance(value.host, bytes):
        return "%s:%d" % (name_of(value.host), value.port)
    return value if isinstance(value, (int, str)) else str(value)


def name_of(name: bytes) -> str:
    """A peer's name as text; bytes that are not UTF-8 as escapes."""
    return name.decode("utf-8", "backslashreplace")


def shortened(said: Dict[str, Any], most_bytes: int) -> str:
    """`said` as JSON of at most most_bytes: its longest texts are cut, and end in MORE."""
    said = dict(said)
    lengths = {key: len(json.dumps(value)) for key, value in said.items() if isinstance(value, str)}
    over = len(json.dumps(said)) - most_bytes
    while over > 0 and lengths:
        key = max(lengths, key=lambda name: lengths[name])
        room = lengths.pop(key) - over - len('""' + MORE)
        kept = said[key]
        said[key] = kept[:fitting(kept, room)] + MORE
        over = len(json.dumps(said)) - most_bytes
    return json.dumps(said) if over <= 0 else json.dumps({"time": said.get("time"), "event": MORE})


def fitting(text: str, most_bytes: int) -> int:
    """How many characters of `text` take at most most_bytes as JSON."""
    size = 0
    for count, char in enumerate(text):
        size += len(json.dumps(char)) - len('""')
        if size > most_bytes:
            return count
    return len(text)


# ---- the journal -------------------------------------------------------------------------------------------------

class Prioritized(logging.Formatter):
    """Puts <N> in front of every line of what `inner` makes, several where there is a traceback.      sd-daemon(3)"""

    def __init__(self, inner: logging.Formatter) -> None:
        super().__init__()
        self.inner = inner

    def format(self, record: logging.LogRecord) -> str:
        priority = next((number for level, number in PRIORITIES if record.levelno >= level), DEBUG)
        return "\n".join("<%d>%s" % (priority, line) for line in self.inner.format(record).split("\n"))


def formatter(kind: str, descriptor: Optional[int], journal: str, brief: bool = False) -> logging.Formatter:
    """For `kind` "text" or "json", and what is written to `descriptor`; `journal` is $JOURNAL_STREAM."""
    to_journal = is_journal(descriptor, journal)
    if brief and kind == "text":
        return BriefFormatter(TextFormatter(False))
    inner = JsonFormatter() if kind == "json" else TextFormatter(not to_journal)
    return Prioritized(inner) if to_journal else inner


def is_journal(descriptor: Optional[int], journal: str) -> bool:
    """Whether the journal reads it: $JOURNAL_STREAM names its device and inode.                   systemd.exec(5)"""
    try:
        status = os.fstat(-1 if descriptor is None else descriptor)
    except OSError:
        return False
    return journal == "%d:%d" % (status.st_dev, status.st_ino)
