"""Exceptions that end a session and carry its REP, and the REP for each errno.

Deep code raises; one place sends the reply (server/handler.py). `why` goes to the log, never to the client.
"""
from __future__ import annotations

import errno
from typing import Dict, Optional

from .codes import Rep


class SocksError(Exception):
    """Base class: ends a SOCKS session before its tunnel is established."""


class ProtocolError(SocksError):
    """The received bytes are not SOCKS5. The connection is closed without a reply."""


class GssError(ProtocolError):
    """A GSS-API call failed, or gave what is not wanted. The message is one line, with the mechanism's own words."""


class GssUnavailable(GssError):
    """The server lacks what the call needs: a descriptor, memory, its keytab, the replay cache. Says nothing about the
    peer's token."""


class RequestRefused(SocksError):
    """The reply is `rep`, and the connection is closed. `why` goes to the log.                     RFC 1928 §6"""

    def __init__(self, rep: Rep, why: str) -> None:
        super().__init__("%s: %s" % (rep.name, why))
        self.rep = rep
        self.why = why


# The REP for each errno; any other errno is X'01'. The most specific errno stands first: where several addresses of a
# destination fail, the first of their errnos in this table decides.
REP_OF_ERRNO: Dict[int, Rep] = {
    errno.ECONNREFUSED: Rep.CONNECTION_REFUSED,
    errno.EACCES: Rep.NOT_ALLOWED,
    errno.EPERM: Rep.NOT_ALLOWED,                   # from a local firewall
    errno.EHOSTUNREACH: Rep.HOST_UNREACHABLE,
    errno.EHOSTDOWN: Rep.HOST_UNREACHABLE,
    errno.ENETUNREACH: Rep.NETWORK_UNREACHABLE,
    errno.ENETDOWN: Rep.NETWORK_UNREACHABLE,
    errno.ETIMEDOUT: Rep.TTL_EXPIRED,
    errno.EAFNOSUPPORT: Rep.ADDRESS_TYPE_NOT_SUPPORTED,
}
_ORDER = list(REP_OF_ERRNO)


def rep_of(error: OSError) -> Rep:
    """The REP for an OSError."""
    return REP_OF_ERRNO.get(error.errno or 0, Rep.GENERAL_FAILURE)


def telling(error: OSError) -> int:
    """Sort key for OSErrors: the most specific first."""
    return _ORDER.index(error.errno) if error.errno in REP_OF_ERRNO else len(_ORDER)


class ProxyError(SocksError, OSError):
    """The proxy refused a request of client.py, or failed.

    rep     the REP, X'01' to X'FF'; None without a reply: the proxy closed, refused the login or sent no SOCKS5
    errno   the errno that connect() has for this REP, for callers that do not know SOCKS: ECONNREFUSED for X'05'
    """

    def __init__(self, message: str, rep: Optional[int] = None) -> None:
        number = next((number for number, its_rep in REP_OF_ERRNO.items() if its_rep == rep), errno.ECONNABORTED)
        super().__init__(number, message)
        self.rep = rep

    def __str__(self) -> str:
        return str(self.strerror)


def name_of(error: OSError) -> str:
    """The symbol of an errno, such as ECONNREFUSED."""
    return errno.errorcode.get(error.errno or 0, str(error))
