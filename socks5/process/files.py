"""Read the users and rules files again, also when the process has no descriptor left. The main thread does it."""
from __future__ import annotations

import contextlib
import errno
import logging
import os
from typing import Callable, List, Optional, Tuple

from ..access.rules import Rules
from ..access.users import Users
from ..config import Config, ConfigError, reloaded

log = logging.getLogger(__name__)

Access = Tuple[Users, Rules]

RESERVE = 2                 # descriptors: the files are open one at a time, but another thread may take one of them
EXHAUSTED = {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS}


def read_access(config: Config, before: Optional[Access] = None) -> Access:
    """Users and rules as the files have them now, and what is known of logins `before`. Raises ConfigError with
    file:line."""
    return Users(config, before and before[0]), Rules(config)


def fresh_access(read_config: Callable[[], Config], before: Access) -> Access:
    """The same for a reload: the options that SIGHUP changes are read again, too. What else has changed there is said,
    and so is a --config file that --run-as has made unreadable: users and rules must be changeable all the same."""
    config = before[1].config
    try:
        config, others = reloaded(config, read_config())
        for flag in others:
            log.warning("%s: its change takes a restart", flag)
    except ConfigError as exc:
        if not isinstance(exc.__cause__ or exc.__context__, PermissionError):
            raise
        log.warning("%s; its options stay as they were", exc)
    return read_access(config, before)


class Exhausted(Exception):
    """The files could not be read for want of descriptors or memory: try again later."""


class Files:
    """Reads the files, with descriptors kept in reserve for it: a user who has taken all others must not be able to
    prevent his revocation."""

    def __init__(self, config: Config, read: Callable[[Config], Access] = read_access) -> None:
        self._config = config
        self._read = read
        self._reserve: List[int] = []
        self._refill()

    def read(self) -> Access:
        """Raises ConfigError for a bad file, and Exhausted."""
        self.close()
        try:
            return self._read(self._config)
        except MemoryError:
            raise Exhausted("out of memory") from None
        except (ConfigError, OSError) as exc:
            cause = exc if isinstance(exc, OSError) else exc.__cause__ or exc.__context__
            if isinstance(cause, OSError) and cause.errno in EXHAUSTED:
                raise Exhausted(str(exc)) from None
            raise
        finally:
            self._refill()

    def _refill(self) -> None:
        with contextlib.suppress(OSError):          # none left: the next call tries again
            while len(self._reserve) < RESERVE:
                self._reserve.append(os.open(os.devnull, os.O_RDONLY))

    def close(self) -> None:
        while self._reserve:
            os.close(self._reserve.pop())
