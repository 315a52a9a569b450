"""Where --trace writes to: a file or standard error, from a thread of its own.

Trouble there (a full disk, a reader that left or does not read) costs blocks of the trace, never a session.
"""
from __future__ import annotations

import errno
import os
import stat
import sys
from functools import partial
from typing import Any, Callable, List, Optional

from ..config import ConfigError
from ..net.writer import PIPE_BUF, Write, Writer, writing_to
from ..protocol.trace import Trace

STDERR = "-"                        # in the place of a file's name
NO_WAIT = getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOCTTY", 0) | getattr(os, "O_BINARY", 0)
BLOCK_BYTES = 1 << 16               # written at once to a file; the longest block has some 20 KiB


def opened(where: str) -> Optional[Trace]:
    """A trace to a file, or to standard error for "-"; None for "". Raises ConfigError when the file cannot be opened.

    The Server that it is given to closes it."""
    if where not in ("", STDERR):
        fd = open_file(where)
        return trace_to(partial(os.write, fd), chunk_of(fd), release=partial(os.close, fd))
    stream = sys.stderr if where else None
    if stream is None:              # closed at the start: its descriptor may be a socket by now
        return None
    return trace_to(writing_to(stream), PIPE_BUF, colourful(stream))


def check(where: str) -> None:
    """Raises ConfigError where opened() would."""
    if where in ("", STDERR):
        return
    if not is_fifo(where):
        os.close(open_file(where))
    elif not os.access(where, os.R_OK | os.W_OK):           # not by open and close: its reader would read an end
        raise ConfigError("--trace %s: %s" % (where, os.strerror(errno.EACCES)))


def open_file(path: str) -> int:
    """For appending, and private: who talks to whom is secret. Does not wait for the reader of a FIFO; what a reader
    that is not there or is slow does not take is lost, and counted."""
    mode = os.O_RDWR if is_fifo(path) else os.O_WRONLY      # to open a FIFO only for writing takes a reader
    try:
        return os.open(path, mode | os.O_CREAT | os.O_APPEND | NO_WAIT, 0o600)
    except OSError as exc:
        raise ConfigError("--trace %s: %s" % (path, exc.strerror)) from None


def is_fifo(path: str) -> bool:
    try:
        return stat.S_ISFIFO(os.stat(path).st_mode)
    except OSError:
        return False


def chunk_of(fd: int) -> int:
    """How much one write() appends whole when several processes have the file open."""
    return BLOCK_BYTES if stat.S_ISREG(os.fstat(fd).st_mode) else PIPE_BUF


def trace_to(write: Write, chunk_bytes: int, colour: bool = False,
             release: Callable[[], object] = lambda: None) -> Trace:
    writer = Writer(write, lambda count: "# lost blocks=%d" % count, chunk_bytes, release)
    return Trace(lambda block: writer.put(text_of(block)), colour, writer.close)


def text_of(block: List[str]) -> str:
    return "\n".join(block)


def colourful(stream: Any) -> bool:
    """Whether it is a terminal that can show colours, and the user wants them.              https://no-color.org"""
    return bool(stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb")
