"""Which METHOD to choose, who the users are, and whether a user name and password are right.

Bytes in, decisions out; reads no socket. Passwords in a users file are slow to check (passwords.py). A right password
is known by a keyed digest from then on, in all server processes, until its line changes. RFC 1928 section 3, RFC 1929.
"""
from __future__ import annotations

import os
import stat
from typing import TYPE_CHECKING, Dict, Iterable, List, Optional, Set, Tuple

from ..protocol.codes import Method
from ..config import Config, ConfigError
from ..values import ANY_SERVICE
from ..protocol.errors import GssError
from .files import read_lines, replace
from .logins import Logins
from .passwords import Hash, Wait
from .shared import digest

if TYPE_CHECKING:
    from .gssapi import Credentials


def choose(offered: bytes, acceptable: Iterable[int]) -> int:
    """The first acceptable METHOD that the client offers, else X'FF'.                   RFC 1928 §3"""
    for method in acceptable:
        if method in offered:
            return method
    return int(Method.NO_ACCEPTABLE)


class Users:
    """The users that a configuration names, with --user and in the --users file. True when a password is needed.

    Never changes: a reload makes new Users, with `before`, and these know the passwords that were right before, as far
    as a user's line is the same. `lines` are those of the users file where another process has read it. Raises
    ConfigError with file:line.
    """

    def __init__(self, config: Config, before: Optional[Users] = None, lines: Optional[List[str]] = None) -> None:
        self.logins: Logins = before.logins if before is not None else Logins()     # they may be false
        self.lines = lines if lines is not None else read_lines("--users", config.users) if config.users else []
        self._needed = config.needs_password()
        self._hashes = dict(parse_lines(self.lines, config.users)) if config.users else {}
        self._text = {name: str(value).encode() for name, value in self._hashes.items()}
        self._plain: Set[bytes] = set()                 # digests of those of --user
        for name, password in config.user:
            if encode(name) in self._hashes:
                raise ConfigError("--user: %s is also in %s" % (ascii(name), config.users))
            self._plain.add(self._digest(b"plain", encode(name), encode(password)))
        self.gssapi = service_credentials(config)
        self.names = sorted([*(encode(name) for name, _ in config.user), *self._hashes])

    def __getstate__(self) -> Dict[str, object]:
        """For another server process, which has the same Logins since it was forked: see join()."""
        return {name: value for name, value in vars(self).items() if name != "logins"}

    def join(self, before: Users) -> None:
        """Use the Logins of the Users that were in force before."""
        self.logins = before.logins

    def __bool__(self) -> bool:
        return self._needed

    def _digest(self, kind: bytes, *parts: bytes) -> bytes:
        return digest(self.logins.secret, kind, *parts)

    def check(self, uname: bytes, passwd: bytes, wait: Optional[Wait] = None) -> Optional[bool]:
        """Whether the password is right; None when there was no turn at the slow hash within `wait`, or no memory.

        Compared as bytes, in a time that tells neither how much was right nor whether the name exists.
        """
        if not uname or not passwd:                     # wrong, also where a configuration has it
            return False
        # No secret is compared here: without the key, no digest can be made that is nearly right.
        if self._digest(b"plain", uname, passwd) in self._plain:
            return True
        if not self._hashes:
            return False
        # The proof has the user's hash in it, so that it is worth nothing once the line has changed.
        proof = self._digest(b"right", uname, passwd, self._text.get(uname, b""))
        return self.logins.knows(proof) or self._check_slowly(uname, passwd, proof, wait or Wait())

    def _check_slowly(self, uname: bytes, passwd: bytes, proof: bytes, wait: Wait) -> Optional[bool]:
        turns, logins = self.logins.turns, self.logins
        expected = self._hashes.get(uname)
        # For a name that does not exist, the hash of another is computed: costs may differ from line to line.
        decoys = list(self._hashes.values())
        work = expected or decoys[self._digest(b"decoy", uname)[0] % len(decoys)]
        turn = turns.take(self._digest(b"turn", uname), wait, lambda: logins.knows(proof))
        if turn is None:                                # checked on another connection meanwhile, or no time is left
            return True if logins.knows(proof) else None
        try:
            if not logins.knows(proof):
                if not work.matches(passwd) or expected is None:
                    return False
                logins.remember(proof)                  # before the next turn for this user, which may be the same
            return True
        except MemoryError:                             # the password was not looked at
            return None
        finally:
            turns.give_back(turn)


def need_gssapi(option: str) -> None:
    """Raise ConfigError where there is no GSS-API library."""
    try:
        from .gssapi import library                         # loads ctypes, which not every Python has
        library()
    except ImportError as exc:
        raise ConfigError("%s: this Python has no ctypes: %s" % (option, exc)) from None
    except GssError as exc:
        raise ConfigError("%s: %s" % (option, exc)) from None


def service_credentials(config: Config) -> Optional[Credentials]:
    """The keys for --gssapi; None without it. Raises ConfigError, also when all users of this machine may read the
    keytab."""
    if not config.gssapi:
        for name, given in (("--keytab", config.keytab), ("--gssapi-protection", config.gssapi_protection != "clear")):
            if given:
                raise ConfigError("%s: without --gssapi it has no use" % name)
        return None
    where = "--keytab %s" % config.keytab if config.keytab else "--gssapi"
    try:
        from .gssapi import Credentials                     # loads ctypes, which not every Python has
        if config.keytab:
            with open(config.keytab, "rb") as file:
                if os.name == "posix" and os.fstat(file.fileno()).st_mode & (stat.S_IROTH | stat.S_IWOTH):
                    raise ConfigError("%s: others can read or write this file (chmod o-rw)" % where)
        return Credentials("" if config.gssapi == ANY_SERVICE else config.gssapi, config.keytab)
    except ImportError as exc:
        raise ConfigError("--gssapi: this Python has no ctypes: %s" % exc) from None
    except OSError as exc:
        raise ConfigError("%s: %s" % (where, exc.strerror)) from None
    except GssError as exc:
        raise ConfigError("%s: %s" % (where, exc)) from None


def parse_lines(lines: Iterable[str], path: str) -> List[Tuple[bytes, Hash]]:
    """The users of the lines NAME:HASH; empty lines and # comments do not count. Raises ConfigError with file:line."""
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
        raise ConfigError("--users %s: it names no user" % path)
    return list(found.items())


def line_for(name: str, password: bytes) -> str:
    """The line for the users file. Raises ValueError for a name or a password that could never log in."""
    if not 1 <= len(encode(name)) <= 255 or not name.isprintable() or set(name) & set(": ") or name[0] == "#":
        raise ValueError("a user name has 1 to 255 bytes, no colon, no spaces and no # in front")
    if not 1 <= len(password) <= 255:
        raise ValueError("a password has 1 to 255 bytes")
    return "%s:%s" % (name, Hash.of(password))


def set_line(path: str, name: str, line: str) -> bool:
    """Put a user's line into the users file, in the place of those with the same name. Returns whether there was one.
    Raises ConfigError."""
    lines = read_lines("--users", path) if os.path.exists(path) else [""]
    same = [at for at, other in enumerate(lines) if other.partition(":")[0].strip() == name]
    for at in same:
        lines[at] = line
    lines = [other for at, other in enumerate(lines) if at not in same[1:]]
    if not same:
        lines.insert(len(lines) - (not lines[-1]), line)
    parse_lines(lines, path)
    try:
        replace(path, "\n".join(lines))
    except OSError as exc:
        raise ConfigError("--users %s: %s" % (path, exc.strerror)) from None
    return bool(same)


def encode(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")
