"""One password as a users file keeps it, and turns at the slow hash that checks it.

The hash is slow on purpose: a stolen users file is worth little. That makes checks expensive, so few run at a time.
Opens no socket. Runs in the threads that serve logins. RFC 7914 (scrypt), RFC 8018 (PBKDF2).
"""
from __future__ import annotations

import base64
import hashlib
import hmac
import mmap
import secrets
import threading
from dataclasses import dataclass
from time import monotonic, sleep
from typing import Callable, Dict, List, Optional, Tuple

from .shared import Lock, TABLE_BYTE, try_lock, unlock

# One of OWASP's equal choices for scrypt (Password Storage Cheat Sheet): 16 MiB, a fifth of a second.
SCRYPT_N, SCRYPT_R, SCRYPT_P = 1 << 14, 8, 5
PBKDF2_ROUNDS = 600000                  # the same source, for SHA-256
MAX_HASH_BYTES = 1 << 28                # memory of one scrypt: a line in the file must not take all there is
SALT_BYTES = KEY_BYTES = 16

SLOW_AT_ONCE = 2                        # slow checks that run at a time, in all processes together
NEXT_POLL_S = 0.005                     # how often the first in the queue looks for a free turn,
LATER_POLL_S = 0.05                     # and the others
EXTRA_S = 60.0                          # beyond the handshake's time, for a login that waits for slow hashes


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
        if n < 2 or n & (n - 1) or r < 1 or not 1 <= p <= 64 or 128 * r * (n + p) > MAX_HASH_BYTES:
            raise ValueError("scrypt takes N a power of 2, P up to 64, and 128 * R * (N + P) up to %d" % MAX_HASH_BYTES)
        if not hasattr(hashlib, "scrypt"):
            raise ValueError("this Python has no scrypt: make the line again with --hash-password")

    def matches(self, password: bytes) -> bool:
        found = in_new_thread(lambda: derive(self.kind, self.cost, self.salt, closed(password), len(self.key)))
        return hmac.compare_digest(found, self.key)

    def __str__(self) -> str:
        parts = [base64.b64encode(part).decode() for part in (self.salt, self.key)]
        return "$".join([self.kind, *map(str, self.cost), *parts])


def closed(password: bytes) -> bytes:
    """The password and its length: HMAC pads keys with NULs, so b"x" and b"x\\0" would be the same (RFC 2104 §2)."""
    return password + len(password).to_bytes(2, "big")


def derive(kind: str, cost: Tuple[int, ...], salt: bytes, password: bytes, size: int = KEY_BYTES) -> bytes:
    """The slow hash. RFC 7914 (scrypt), RFC 8018 §5.2 (PBKDF2). Raises MemoryError."""
    if kind == "pbkdf2":
        return hashlib.pbkdf2_hmac("sha256", password, salt, cost[0], size)
    n, r, p = cost
    try:
        return hashlib.scrypt(password, salt=salt, n=n, r=r, p=p, dklen=size, maxmem=128 * r * (n + p + 2) + (1 << 20))
    except ValueError as exc:               # the cost was judged before: OpenSSL has said "malloc failure"
        raise MemoryError(str(exc)) from None


def in_new_thread(call: Callable[[], bytes]) -> bytes:
    """What call() returns or raises, run in a new thread; in this one where the system has none to give.

    glibc's malloc does not return the 16 MiB that a hash has freed to the system: they stay in the arena of the thread
    that computed it. A new thread reuses the arena of a thread that has ended, so there are few such arenas, however
    many threads serve logins. mallopt(3), malloc arena."""
    results: List[bytes] = []
    errors: List[BaseException] = []

    def run() -> None:
        try:
            results.append(call())
        except BaseException as exc:
            errors.append(exc)

    thread = threading.Thread(target=run, name="slow hash", daemon=True)
    try:
        thread.start()
    except (RuntimeError, MemoryError):
        return call()
    thread.join()
    for error in errors:
        raise error
    return results[0]


class Wait:
    """How a login waits. The handler has one of its own, which also watches the client.

    To override: pause(seconds)     wait; raise when the client has left
                 extend(seconds)    the handshake may take so much longer
    """

    def __init__(self, seconds: float = 10.0) -> None:
        self.deadline = monotonic() + seconds
        self._extended = False

    def pause(self, seconds: float) -> None:
        sleep(seconds)

    def extend(self, seconds: float) -> None:
        pass

    def extend_once(self) -> None:
        """Extend the deadline, once: the delay is caused by slow hashes and not by the client."""
        if not self._extended:
            self._extended = True
            self.deadline += EXTRA_S
            self.extend(EXTRA_S)

    @property
    def left_s(self) -> float:
        return self.deadline - monotonic()


class Turns:
    """Turns at the slow hash: SLOW_AT_ONCE at a time, one for a user, first come first served.

    After share() this holds over all processes that are forked later; among processes, each one's first in the queue
    competes for the next turn. Every wait has a deadline. A turn is a locked byte of the lock's file: the end of a
    process, however it ends, gives its turns back.
    """

    def __init__(self, lock: Lock) -> None:
        self._shared = lock
        self._lock = threading.Lock()
        self._queue: Dict[object, bytes] = {}               # waiting in this process, in order of arrival: the user
        self._taken: Dict[int, bytes] = {}                  # turns of this process: the user
        self._users = mmap.mmap(-1, SLOW_AT_ONCE * KEY_BYTES)       # of all turns, in all processes

    def take(self, user: bytes, wait: Wait, needless: Callable[[], bool] = lambda: False) -> Optional[int]:
        """Wait for a turn, and return it for give_back(); None when no time is left, or when needless() says so.

        `user` is a digest of KEY_BYTES. When wait.pause() raises, the place in the queue is given up.
        """
        ticket = object()
        with self._lock:
            self._queue[ticket] = user
        try:
            while not needless():
                turn = self.try_take(ticket)
                if turn is not None:
                    return turn
                wait.extend_once()
                if wait.left_s <= 0:
                    break
                first = next(iter(self._queue), None) is ticket
                wait.pause(min(wait.left_s, NEXT_POLL_S if first else LATER_POLL_S))
            return None
        finally:
            with self._lock:
                self._queue.pop(ticket, None)

    def try_take(self, ticket: object) -> Optional[int]:
        """A turn, if there is one and no earlier attempt in this process can use it."""
        with self._lock, self._shared:
            free = [turn for turn in range(SLOW_AT_ONCE) if turn not in self._taken
                    and try_lock(self._shared.file, TABLE_BYTE + 1 + turn)]
            for turn in free:
                self._mark(turn, bytes(KEY_BYTES))          # its process may have been killed
            running = {self._users[at:at + KEY_BYTES] for at in range(0, SLOW_AT_ONCE * KEY_BYTES, KEY_BYTES)}
            first = next((waiting for waiting, user in self._queue.items() if user not in running), None)
            mine = free.pop() if free and first is ticket else None
            for turn in free:
                unlock(self._shared.file, TABLE_BYTE + 1 + turn)
            if mine is not None:
                self._taken[mine] = self._queue.pop(ticket)
                self._mark(mine, self._taken[mine])
            return mine

    def give_back(self, turn: int) -> None:
        with self._lock, self._shared:
            del self._taken[turn]
            self._mark(turn, bytes(KEY_BYTES))
            unlock(self._shared.file, TABLE_BYTE + 1 + turn)

    def _mark(self, turn: int, user: bytes) -> None:
        self._users[turn * KEY_BYTES:(turn + 1) * KEY_BYTES] = user
