"""Memory that forked server processes share: a lock, and tables of small records.

Made before the processes are forked; used by every thread that serves a login. A table has a fixed size, so no flood
makes it grow. Keys are keyed digests, so no client can choose the place that it takes, and a dump shows no name.
"""
from __future__ import annotations

import contextlib
import hashlib
import mmap
import os
import struct
import tempfile
import threading
from typing import IO, Any, Optional, Tuple

try:
    import fcntl
except ImportError:                     # Windows: no fork, and so one process
    fcntl = None                        # type: ignore[assignment]

KEY_BYTES = 16
TABLE_BYTE = 0                          # of the lock file: held while a record is read and written


def lock_file() -> Optional[IO[bytes]]:
    """An empty file without a name, to lock bytes of; None where there is nothing to lock with."""
    if not fcntl:
        return None
    if hasattr(os, "memfd_create"):     # needs no writable folder
        with contextlib.suppress(OSError):
            return open(os.memfd_create("socks5-logins"), "r+b", buffering=0)
    return tempfile.TemporaryFile(buffering=0)


def try_lock(file: Optional[IO[bytes]], byte: int) -> bool:
    """Lock this byte against other processes, without waiting. The kernel unlocks it when the process ends."""
    if file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, byte)
        except OSError:
            return False
    return True


def unlock(file: Optional[IO[bytes]], byte: int) -> None:
    if file:
        with contextlib.suppress(OSError):
            fcntl.lockf(file, fcntl.LOCK_UN, 1, byte)


class Lock:
    """Excludes the other threads; with a file, the other processes, too. A killed process keeps nothing locked."""

    def __init__(self) -> None:
        self._threads = threading.Lock()
        self.file: Optional[IO[bytes]] = None

    def share(self) -> None:
        """Have it exclude the processes that are forked later: call it before the first."""
        self.file = self.file or lock_file()

    def unshare(self) -> None:
        """Close what share() has opened: the processes have ended."""
        if self.file:
            self.file.close()
            self.file = None

    def __enter__(self) -> None:
        self._threads.acquire()
        if self.file:
            with contextlib.suppress(OSError):      # no locks left (ENOLCK): counting is less exact, logins go on
                fcntl.lockf(self.file, fcntl.LOCK_EX, 1, TABLE_BYTE)

    def __exit__(self, *_exc: object) -> None:
        unlock(self.file, TABLE_BYTE)
        self._threads.release()


class Table:
    """A fixed number of records, found by a key of KEY_BYTES.

    The first field of a record is a time in seconds. A record that is put where there is no room replaces the one with
    the earliest time among the WAYS places that its key may have. The caller holds the lock while it puts or drops; a
    record that a killed process has half written reads as another record, and costs at most a wrong count.
    """

    WAYS = 8

    def __init__(self, records: int, fields: str) -> None:
        self._format = struct.Struct("=%ds%s" % (KEY_BYTES, fields))
        self._sets = records // self.WAYS
        self._memory = mmap.mmap(-1, records * self._format.size)

    def get(self, key: bytes) -> Optional[Tuple[Any, ...]]:
        """The fields; None when there is no such record."""
        at = self._find(key)
        return None if at < 0 else self._format.unpack_from(self._memory, at)[1:]

    def put(self, key: bytes, *fields: object) -> None:
        found = [(record[0] != key, record[1], at) for at in self._places(key)
                 for record in [self._format.unpack_from(self._memory, at)]]
        self._format.pack_into(self._memory, min(found)[2], key, *fields)

    def drop(self, key: bytes) -> None:
        at = self._find(key)
        if at >= 0:
            self._memory[at:at + self._format.size] = bytes(self._format.size)

    def _find(self, key: bytes) -> int:
        """Where the record is, or -1."""
        places = self._places(key)
        at = self._memory.find(key, places.start, places.stop)
        return at if at in places else -1           # a key's bytes elsewhere are chance

    def _places(self, key: bytes) -> range:
        size = self._format.size
        first = int.from_bytes(key[:4], "big") % self._sets * self.WAYS * size
        return range(first, first + self.WAYS * size, size)


def digest(secret: bytes, kind: bytes, *parts: bytes) -> bytes:
    """What stands for these parts in a table. Says nothing about them to a reader who does not have the secret."""
    made = hashlib.blake2b(key=secret, digest_size=KEY_BYTES, person=kind)
    for part in parts:
        made.update(len(part).to_bytes(4, "big") + part)
    return made.digest()
