"""What can go wrong, as exceptions that carry the answer.

Deep code raises, one place answers (handler.py). `why` is for the log of whoever runs the server, never for the peer.
"""
from __future__ import annotations

import errno
from typing import Dict, Optional

from .codes import Rep


class SocksError(Exception):
    """Anything that ends a SOCKS session before its tunnel stands."""


class ProtocolError(SocksError):
    """What came is not the protocol: there is no answer that the peer would understand, so close."""


class RequestRefused(SocksError):
    """The request is answered with `rep` and the connection closed; `why` goes to the log.        RFC 1928 §6"""

    def __init__(self, rep: Rep, why: str) -> None:
        super().__init__("%s: %s" % (rep.name, why))
        self.rep = rep
        self.why = why


# What an OSError means to the client; whatever is not here is X'01'. The most telling first: where several addresses
# fail, the failure that stands highest is the answer.
REP_OF_ERRNO: Dict[int, Rep] = {
    errno.ECONNREFUSED: Rep.CONNECTION_REFUSED,
    errno.EACCES: Rep.NOT_ALLOWED,
    errno.EPERM: Rep.NOT_ALLOWED,                   # a local firewall's
    errno.EHOSTUNREACH: Rep.HOST_UNREACHABLE,
    errno.EHOSTDOWN: Rep.HOST_UNREACHABLE,
    errno.ENETUNREACH: Rep.NETWORK_UNREACHABLE,
    errno.ENETDOWN: Rep.NETWORK_UNREACHABLE,
    errno.ETIMEDOUT: Rep.TTL_EXPIRED,
    errno.EAFNOSUPPORT: Rep.ADDRESS_TYPE_NOT_SUPPORTED,
}
_TELLING = list(REP_OF_ERRNO)


def rep_of(error: OSError) -> Rep:
    """The REP that tells the client what happened."""
    return REP_OF_ERRNO.get(error.errno or 0, Rep.GENERAL_FAILURE)


def telling(error: OSError) -> int:
    """Sorts errors, the most telling first."""
    return _TELLING.index(error.errno) if error.errno in REP_OF_ERRNO else len(_TELLING)


class ProxyError(SocksError, OSError):
    """The proxy that we are a client of (client.py) did not do what it was asked for.

    rep     its REP, from X'01' to X'FF'; None when there was no reply: it closed, let us not in, spoke something else
    errno   what connect() would have said in the place of `rep`, for callers that know no SOCKS: ECONNREFUSED for X'05'
    """

    def __init__(self, words: str, rep: Optional[int] = None) -> None:
        number = next((number for number, its_rep in REP_OF_ERRNO.items() if its_rep == rep), errno.ECONNABORTED)
        super().__init__(number, words)
        self.rep = rep

    def __str__(self) -> str:
        return str(self.strerror)


def name_of(error: OSError) -> str:
    """ECONNREFUSED and the like: what an administrator searches for."""
    return errno.errorcode.get(error.errno or 0, str(error))
