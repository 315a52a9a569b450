"""Which METHOD to pick, and is this UNAME and PASSWD right?

Bytes in, decisions out; reads no socket. Passwords in a file are slow to check on purpose, so that a stolen file is
worth little; what was right once is recognised by a keyed digest from then on. RFC 1928 section 3, RFC 1929.
"""
from __future__ import annotations

import base64
import hashlib
import hmac
import os
import secrets
import stat
import tempfile
import threading
from dataclasses import dataclass
from time import monotonic, sleep
from typing import IO, Dict, Iterable, List, Optional, Set, Tuple

from ..protocol.codes import Method
from ..config import Config, ConfigError
from ..protocol.errors import ProtocolError

try:
    import fcntl
except ImportError:                     # Windows, where nobody forks
    fcntl = None                        # type: ignore[assignment]

# One of OWASP's equal choices for scrypt (Password Storage Cheat Sheet): 16 MiB, a fifth of a second.
SCRYPT_N, SCRYPT_R, SCRYPT_P = 1 << 14, 8, 5
PBKDF2_ROUNDS = 600000                  # the same source, for SHA-256
MOST_BYTES = 1 << 28                    # what one scrypt may take: a line in the file must not cost us all memory
SALT_BYTES = KEY_BYTES = 16

SLOW_AT_ONCE = 2                        # slow checks, whatever is thrown at us
SLOW_WAIT_S = 5.0                       # for one's turn: half of the handshake's time


def choose(offered: bytes, acceptable: Iterable[int]) -> int:
    """The first acceptable METHOD that the client offers, else X'FF'.                   RFC 1928 §3"""
    for method in acceptable:
        if method in offered:
            return method
    return int(Method.NO_ACCEPTABLE)


# ---- one password -------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Hash:
    """A password as the users file keeps it.

    scrypt$N$R$P$SALT$KEY or pbkdf2$ROUNDS$SALT$KEY, with SALT and KEY in base64
    """

    kind: str
    cost: Tuple[int, ...]
    salt: bytes
    key: bytes

    @classmethod
    def of(cls, password: bytes, kind: str = "", cost: Tuple[int, ...] = ()) -> Hash:
        kind = kind or ("scrypt" if hasattr(hashlib, "scrypt") else "pbkdf2")
        cost = cost or ((SCRYPT_N, SCRYPT_R, SCRYPT_P) if kind == "scrypt" else (PBKDF2_ROUNDS,))
        salt = secrets.token_bytes(SALT_BYTES)
        return cls(kind, cost, salt, derive(kind, cost, salt, closed(password)))

    @classmethod
    def parse(cls, text: str) -> Hash:
        """Raises ValueError with what is wrong, never with the text."""
        kind, *cost, salt, key = text.split("$") if text.count("$") >= 2 else ("", "", "")
        if (kind, len(cost)) not in (("scrypt", 3), ("pbkdf2", 1)):
            raise ValueError("the part after the colon is not what --hash-password prints")
        try:
            made = cls(kind, tuple(map(int, cost)), *(base64.b64decode(part, validate=True) for part in (salt, key)))
        except ValueError:
            raise ValueError("the hash is damaged") from None
        if len(made.key) < KEY_BYTES or len(made.salt) < 8:
            raise ValueError("the hash is cut short")
        made.judge_cost()
        return made

    def judge_cost(self) -> None:
        """Raises ValueError for what this Python cannot compute, or should not."""
        if self.kind == "pbkdf2":
            if not 1 <= self.cost[0] <= 10000000:
                raise ValueError("pbkdf2 takes 1 to 10000000 rounds")
            return
        n, r, p = self.cost
        if n < 2 or n & (n - 1) or r < 1 or not 1 <= p <= 64 or 128 * r * (n + p) > MOST_BYTES:
            raise ValueError("scrypt takes N a power of 2, P up to 64, and 128 * R * (N + P) up to %d" % MOST_BYTES)
        if not hasattr(hashlib, "scrypt"):
            raise ValueError("this Python has no scrypt: make the line again with --hash-password")

    def matches(self, password: bytes) -> bool:
        return hmac.compare_digest(derive(self.kind, self.cost, self.salt, closed(password), len(self.key)), self.key)

    def __str__(self) -> str:
        parts = [base64.b64encode(part).decode() for part in (self.salt, self.key)]
        return "$".join([self.kind, *map(str, self.cost), *parts])


def closed(password: bytes) -> bytes:
    """With its length behind it: HMAC fills keys up with NULs, so b"x" and b"x\\0" would be the same (RFC 2104 §2)."""
    return password + len(password).to_bytes(2, "big")


def derive(kind: str, cost: Tuple[int, ...], salt: bytes, password: bytes, size: int = KEY_BYTES) -> bytes:
    """The slow hash. RFC 7914 (scrypt), RFC 8018 §5.2 (PBKDF2)."""
    if kind == "pbkdf2":
        return hashlib.pbkdf2_hmac("sha256", password, salt, cost[0], size)
    n, r, p = cost
    return hashlib.scrypt(password, salt=salt, n=n, r=r, p=p, dklen=size, maxmem=128 * r * (n + p + 2) + (1 << 20))


class Turns:
    """Whose turn it is to be slow: SLOW_AT_ONCE at a time, in this process and all that are forked after share().

    Across processes they are locked bytes of a file without a name: what a process had, its end gives back.
    """

    POLL_S = 0.01

    def __init__(self) -> None:
        self._mine = threading.BoundedSemaphore(SLOW_AT_ONCE)
        self._lock = threading.Lock()
        self._taken: Set[int] = set()
        self._file: Optional[IO[bytes]] = None

    def share(self) -> None:
        if fcntl:
            self._file = tempfile.TemporaryFile()

    def take(self, timeout_s: float) -> Optional[int]:
        """One to give_back(), or None when there was none in time."""
        deadline = monotonic() + timeout_s
        if not self._mine.acquire(timeout=timeout_s):
            return None
        while True:
            with self._lock:
                for turn in set(range(SLOW_AT_ONCE)) - self._taken:
                    if self._locks(turn):
                        self._taken.add(turn)
                        return turn
            if monotonic() >= deadline:
                self._mine.release()
                return None
            sleep(self.POLL_S)

    def give_back(self, turn: int) -> None:
        with self._lock:
            if self._file:
                fcntl.lockf(self._file, fcntl.LOCK_UN, 1, turn)
            self._taken.remove(turn)
        self._mine.release()

    def _locks(self, turn: int) -> bool:
        try:
            if self._file:
                fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, turn)
            return True
        except OSError:                         # another process has it
            return False


TURNS = Turns()


# ---- everybody's passwords ----------------------------------------------------------------------------------------

class Users:
    """Who may come in with username/password. False when everybody may, without one.

    Those of --user and those of the --users file. Read once: a reload makes new ones, which know nobody yet. Raises
    ConfigError with file:line.
    """

    def __init__(self, config: Config) -> None:
        self._needed = config.needs_password()
        self._key = secrets.token_bytes(32)
        self._hashes = dict(read_users(config.users)) if config.users else {}
        self._known: Set[bytes] = set()                 # keyed digests of what is right: as many as there are users
        self._checks: Dict[bytes, Check] = {}           # under way
        self._lock = threading.Lock()
        for name, password in config.user:
            if encode(name) in self._hashes:
                raise ConfigError("--user: %s is also in %s" % (ascii(name), config.users))
            self._known.add(self.attempt(encode(name), encode(password)))
        self.names = sorted([*(encode(name) for name, _ in config.user), *self._hashes])

    def __getstate__(self) -> Dict[str, object]:
        """For another process: without the checks that are under way."""
        return {**vars(self), "_checks": {}, "_lock": None}

    def __setstate__(self, state: Dict[str, object]) -> None:
        vars(self).update(state, _lock=threading.Lock())

    def __bool__(self) -> bool:
        return self._needed

    def attempt(self, uname: bytes, passwd: bytes) -> bytes:
        """What tells two attempts apart and says nothing to who does not have the key."""
        return hashlib.blake2b(bytes([len(uname)]) + uname + passwd, key=self._key, digest_size=32).digest()

    def check(self, uname: bytes, passwd: bytes) -> bool:
        """Compared as bytes, in a time that tells neither how much was right nor whether the name exists.

        May wait for its turn; raises ProtocolError when that takes too long.
        """
        if not uname or not passwd:                     # simply wrong, also where a configuration has it
            return False
        attempt = self.attempt(uname, passwd)
        if attempt in self._known:                      # no secret is compared here: nobody can aim at a digest
            return True
        if not self._hashes:
            return False
        with self._lock:
            running = self._checks.get(attempt)
            mine = self._checks[attempt] = running or Check()
        if running:                                     # a browser's hundred connections are one check
            running.done.wait(2 * SLOW_WAIT_S)
        else:
            try:
                mine.right = self._check_slowly(uname, passwd)
                if mine.right:
                    self._known.add(attempt)
            finally:
                with self._lock:
                    del self._checks[attempt]
                mine.done.set()
        if mine.right is None:
            raise ProtocolError("too many passwords are being checked")
        return mine.right

    def _check_slowly(self, uname: bytes, passwd: bytes) -> Optional[bool]:
        expected = self._hashes.get(uname)
        # For a name that does not exist, one of the others is worked on: costs may differ from line to line.
        decoys = list(self._hashes.values())
        work = expected or decoys[self.attempt(uname, b"")[0] % len(decoys)]
        turn = TURNS.take(SLOW_WAIT_S)
        if turn is None:
            return None
        try:
            return work.matches(passwd) and expected is not None
        finally:
            TURNS.give_back(turn)


class Check:
    """A slow check under way; `right` is None when it came to nothing."""

    def __init__(self) -> None:
        self.done = threading.Event()
        self.right: Optional[bool] = None


def read_users(path: str) -> List[Tuple[bytes, Hash]]:
    """The lines NAME:HASH of a file; empty ones and # comments do not count. Raises ConfigError with file:line."""
    try:
        with open(path, encoding="utf-8", errors="surrogateescape") as file:
            if os.name == "posix" and os.fstat(file.fileno()).st_mode & stat.S_IWOTH:
                raise ConfigError("--users %s: others can write this file (chmod o-w)" % path)
            lines = file.read().split("\n")
    except OSError as exc:
        raise ConfigError("--users %s: %s" % (path, exc.strerror)) from None
    found: Dict[bytes, Hash] = {}
    for number, line in enumerate(map(str.strip, lines), 1):
        if not line or line.startswith("#"):
            continue
        name, colon, rest = line.partition(":")
        try:
            if not colon or not 1 <= len(encode(name)) <= 255:
                raise ValueError("not NAME:HASH with a name of 1 to 255 bytes")
            if encode(name) in found:
                raise ValueError("%s is here for the second time" % ascii(name))
            found[encode(name)] = Hash.parse(rest)
        except ValueError as exc:
            raise ConfigError("%s:%d: %s" % (path, number, exc)) from None
    if not found:
        raise ConfigError("--users %s: nobody is in it" % path)
    return list(found.items())


def line_for(name: str, password: bytes) -> str:
    """The line for the users file. Raises ValueError for a name or a password that could never log in."""
    if not 1 <= len(encode(name)) <= 255 or not name.isprintable() or set(name) & set(": ") or name[0] == "#":
        raise ValueError("a user name has 1 to 255 bytes, no colon, no spaces and no # in front")
    if not 1 <= len(password) <= 255:
        raise ValueError("a password has 1 to 255 bytes")
    return "%s:%s" % (name, Hash.of(password))


def encode(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")
