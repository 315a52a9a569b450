"""Names to addresses: what may be looked up, and one lookup.

`getaddrinfo` takes more than a name, and these bytes come from clients: it stops at a NUL and answers for what stands
before it, so "127.0.0.1\\0.example" would be 127.0.0.1. Every host of a request or a datagram passes `normalise` once;
only what it returns is judged, looked up or connected to. RFC 1928 section 5, RFC 1123 section 2.1.

`look_up` blocks for as long as the system's resolver does: lookups.py calls it, in threads of its own.
"""
from __future__ import annotations

import re
import socket
from contextlib import suppress
from time import monotonic
from typing import NamedTuple, Optional, Sequence

from ..protocol.codes import Rep
from ..protocol.errors import RequestRefused
from ..protocol.fields import Host, new_tuple, text
from ..protocol.memory import remembered
from .addresses import IP, ip_in, unmapped

STREAM = int(socket.SOCK_STREAM)    # an enum takes longer
MOST_ADDRESSES = 64             # of one name: its owner must not cause thousands of attempts by one request
ANSWER_S = 30.0                 # getaddrinfo does not tell the TTL: short enough for names that move
FAILURE_S = 5.0                 # RFC 2308 §7.1: failures may be remembered for 5 minutes at the most
# The resolver knows that there is no such name, or no address of it. All else (no name server, no descriptor) may be
# over at once, and is not remembered.
NO_SUCH_NAME = {getattr(socket, name) for name in ("EAI_NONAME", "EAI_NODATA") if hasattr(socket, name)}

MOST_LETTERS = 253              # RFC 1035 §2.3.4
# Letters, digits, hyphen and dot are RFC 1123's; the underscore stands in many names that people do use.
DIGITS = b"0123456789"
ASCII_NAME = re.compile(rb"[A-Za-z0-9_-]{1,63}(\.[A-Za-z0-9_-]{1,63})*\.?")


def normalise(host: Host) -> Host:
    """The IP address that `host` is or spells, IPv4-mapped ones as IPv4; else the name in ASCII (IDNA if it was UTF-8).

    Raises RequestRefused X'04' for anything else: empty, NUL, control characters, spaces, empty labels, foreign bytes.
    """
    if not isinstance(host, bytes):
        return unmapped(host)
    if len(host) <= MOST_LETTERS and ASCII_NAME.fullmatch(host) and host[-1] not in DIGITS:      # nearly always
        return host
    return _spelled(host)


@remembered(4096)
def _spelled(name: bytes) -> Host:
    """normalise() for an address that was sent as text, a name that is not in ASCII, and what is no name."""
    try:
        ascii_name = name if name.isascii() else name.decode("utf-8").encode("idna")
    except UnicodeError:
        ascii_name = b""
    spelled = ascii_name.decode("ascii")        # IDNA makes ASCII of full-width digits, too
    if (":" in spelled or spelled[-1:].isdigit()) and "%" not in spelled:       # a scope would choose an interface
        with suppress(ValueError):
            return ip_in(spelled)
    letters = len(ascii_name) - ascii_name.endswith(b".")       # the root's dot does not count
    if letters > MOST_LETTERS or not ASCII_NAME.fullmatch(ascii_name):
        raise RequestRefused(Rep.HOST_UNREACHABLE, "not a name to look up: %s" % text(name))
    return ascii_name


def name_in(host: Host) -> Optional[bytes]:
    """The name in a normalised host; None for an address."""
    return host if isinstance(host, bytes) else None


class Answer(NamedTuple):
    """What the lookup of a name came to.

    addresses   none: it does not resolve,
    why         for this reason
    until       when it is to be forgotten, by monotonic(); 0: it is not to be remembered
    """

    name: bytes
    addresses: Sequence[IP]
    why: str
    until: float


def look_up(name: bytes) -> Answer:
    """The addresses of a normalised name, the resolver's first choice first, without repetition. Blocks.

    IPv4-mapped addresses are returned as IPv4.
    """
    try:
        found = socket.getaddrinfo(name, None, 0, STREAM)
    except (OSError, ValueError, MemoryError) as exc:     # UnicodeError is a ValueError
        known = isinstance(exc, socket.gaierror) and exc.errno in NO_SUCH_NAME
        until = monotonic() + FAILURE_S if known else 0.0
        return Answer(name, (), "%s does not resolve: %s" % (text(name), exc), until)
    if len(found) == 1:                                     # what follows takes longer
        addresses: Sequence[IP] = (ip_in(found[0][4][0]),)
    else:
        addresses = tuple(dict.fromkeys(ip_in(each[4][0]) for each in found))[:MOST_ADDRESSES]      # of its sockaddr
    why = "" if addresses else "%s has no address" % text(name)
    return new_tuple(Answer, (name, addresses, why, monotonic() + ANSWER_S))
