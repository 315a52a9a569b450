"""Which METHOD to pick, and is this UNAME and PASSWD right?

Bytes in, decisions out; reads no socket. RFC 1928 section 3, RFC 1929.
"""
from __future__ import annotations

import hmac
from typing import Dict, Iterable

from .codes import Method
from .config import Config


def choose(offered: bytes, acceptable: Iterable[int]) -> int:
    """The first acceptable METHOD that the client offers, else X'FF'.                   RFC 1928 §3"""
    return next((method for method in acceptable if method in offered), int(Method.NO_ACCEPTABLE))


class Users:
    """Who may come in with username/password. Empty (and false) when everybody may."""

    def __init__(self, config: Config) -> None:
        self._passwords: Dict[bytes, bytes] = {_encode(name): _encode(password) for name, password in config.user}

    def __bool__(self) -> bool:
        return bool(self._passwords)

    def check(self, uname: bytes, passwd: bytes) -> bool:
        """Compared as bytes, in a time that tells neither how much was right nor whether the name exists."""
        expected = self._passwords.get(uname, b"")
        return hmac.compare_digest(expected, passwd) and expected != b""


def _encode(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")
