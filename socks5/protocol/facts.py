"""The facts of a line in the log: typed values with names, and how they read as text.

A line is logged as log.info("word key=%(key)s ...", Facts(key=value)). The values stay what they are until a formatter
takes them: `%` shows them as words that no peer can forge a line with, whichever formatter that is; a formatter of
values (JSON) takes them with get(). Runs in any thread.
"""
from __future__ import annotations

import logging
import re
import time
from enum import EnumMeta
from functools import cached_property, lru_cache
from typing import Any, Dict, List, Tuple

from .fields import text

NOTHING = "-"                       # stands in the text for a fact that there is not
NUMBERS = {int, float}
KEY = re.compile(r"%\((\w+)\)")
FREE = {"why"}                      # keys whose values are sentences
PLAIN = re.compile("[!-~]+").fullmatch         # one word
LEVELS = {level: logging.getLevelName(level) for level in range(10, 60, 10)}


@lru_cache(maxsize=256)
def positional(line: str) -> Tuple[str, List[str]]:
    """A line without its keys, and the keys in their order: "up=%(up)d" is "up=%d" and ["up"]."""
    return KEY.sub("%", line), KEY.findall(line)


def template(word: str, facts: Dict[str, Any]) -> str:
    """The line that shows these facts, in their order: "word key=%(key)s ...". A float has three decimals."""
    return word + "".join(" %s=%%(%s)%s" % (key, key, ".3f" if type(value) is float else "s")
                          for key, value in facts.items())


class Facts(Dict[str, Any]):
    """A dict whose `facts[key]`, which is what `%` asks for, is the value as text shows it; get() gives the value.

        None, ""        -                   there is no such fact
        int, float      as it is            the format says how: %(up)d
        bytes           'quoted'            chosen by a peer
        an enum member  its name
        str             as it is if it is one word, else 'quoted'; under "why" always 'quoted'
        anything else   str() of it         an Endpoint, an Address
    """

    def fill(self, line: str) -> str:
        """line % self, in a third of the time: `%` is quicker with a tuple than with a dict."""
        pattern, keys = positional(line)
        return pattern % tuple([value if type(value) in NUMBERS else NOTHING if value is None else shown(key, value)
                                for key, value in zip(keys, map(self.get, keys))])

    def __getitem__(self, key: str) -> Any:
        return shown(key, super().__getitem__(key))


def shown(key: str, value: Any) -> Any:
    """A value as text shows it under this key."""
    kind = type(value)
    if kind is str:
        return shown_text(value, key in FREE)
    if kind in NUMBERS:
        return value
    if value is None:
        return NOTHING
    if kind is bytes:
        return text(value)
    word = value.name if isinstance(kind, EnumMeta) else str(value)         # faster than isinstance(value, Enum)
    return word if word.isascii() and word.isprintable() else ascii(word)


@lru_cache(maxsize=256)
def shown_text(value: str, free: bool) -> str:
    """Remembered, because most of them are words of ours."""
    return NOTHING if not value else value if PLAIN(value) and not free else ascii(value)


class LeanRecord(logging.LogRecord):
    """A record made in a fraction of the time that Logger.info() takes: the place in the code, the thread and the
    process that it comes from are not looked up. A subclass has msg, args and text()."""

    __slots__ = ("source",)                         # what it tells of; not in __dict__, which handlers copy and send

    pathname = filename = module = funcName = threadName = processName = ""
    lineno = thread = process = 0
    relativeCreated = 0.0
    exc_info = exc_text = stack_info = taskName = None

    def __init__(self, name: str, level: int, source: Any) -> None:
        self.created = time.time()
        self.name = name
        self.levelno = level
        self.levelname = LEVELS.get(level) or logging.getLevelName(level)
        self.source = source

    @cached_property
    def msecs(self) -> float:                       # type: ignore[override]
        return self.created % 1 * 1000

    def text(self) -> str:
        """msg % args: a line of printable text."""
        raise NotImplementedError

    def getMessage(self) -> str:
        """The same. A logging.Formatter asks for it first, then looks into __dict__ for what else its format shows."""
        self._complete()
        return super().getMessage()

    def __reduce__(self) -> Any:
        """Copied or pickled, it is a plain record."""
        self._complete()
        return logging.makeLogRecord, (self.__dict__.copy(),)

    def _complete(self) -> None:
        for key in KEYS:
            self.__dict__.setdefault(key, getattr(self, key))


# What handlers and formatters look for in the __dict__ of a record.
KEYS = ("msg", "args", "msecs", "pathname", "filename", "module", "funcName", "threadName", "processName", "lineno",
        "thread", "process", "relativeCreated", "exc_info", "exc_text", "stack_info", "taskName")


class FactsRecord(LeanRecord):
    """A line of facts."""

    def __init__(self, name: str, level: int, line: str, facts: Facts) -> None:
        super().__init__(name, level, facts)
        self.msg = line
        self.args = facts

    def text(self) -> str:
        facts: Facts = self.source
        return facts.fill(self.msg)
