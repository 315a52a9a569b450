"""The files that options name: users, rules and the INI file. Only regular ones, which a reload can read again. A users
file is written by --set-password."""
from __future__ import annotations

import contextlib
import os
import stat
import tempfile
from typing import List, TextIO

from ..config import ConfigError


def open_file(flag: str, path: str, encoding: str = "utf-8", errors: str = "surrogateescape") -> TextIO:
    """Open the file that an option names, for reading. Raises ConfigError, also for what is not a regular file: reading
    a FIFO or a terminal could take for ever, and a reload could not read it again."""
    def never_waits(name: str, flags: int) -> int:
        return os.open(name, flags | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOCTTY", 0))

    try:
        file = open(path, encoding=encoding, errors=errors, opener=never_waits)
    except OSError as exc:
        raise ConfigError("%s %s: %s" % (flag, path, exc.strerror)) from None
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise ConfigError("%s %s: not a regular file" % (flag, path))
    return file


def read_lines(flag: str, path: str) -> List[str]:
    """The lines of a file of rules or users. Raises ConfigError, also when all users of this machine may write it."""
    try:
        with open_file(flag, path) as file:
            if os.name == "posix" and os.fstat(file.fileno()).st_mode & stat.S_IWOTH:
                raise ConfigError("%s %s: others can write this file (chmod o-w)" % (flag, path))
            return file.read().split("\n")
    except OSError as exc:
        raise ConfigError("%s %s: %s" % (flag, path, exc.strerror)) from None


def replace(path: str, text: str) -> None:
    """Write the file anew under another name, and rename it: a reader sees the old text or the new one, whole.

    A new file has mode 0600. A file that exists already keeps its owner, its group and the read permission of the
    group. Raises OSError.
    """
    path = os.path.realpath(path)
    fd, made = tempfile.mkstemp(prefix=".", dir=os.path.dirname(path))          # mode 0600
    try:
        with open(fd, "w", encoding="utf-8", errors="surrogateescape", newline="") as file:
            with contextlib.suppress(FileNotFoundError):
                before = os.stat(path)
                if hasattr(os, "fchown"):
                    os.fchown(fd, before.st_uid, before.st_gid)
                    os.fchmod(fd, 0o600 | before.st_mode & stat.S_IRGRP)
            file.write(text)
            file.flush()
            os.fsync(fd)
        os.replace(made, path)
    except BaseException:
        os.unlink(made)
        raise
