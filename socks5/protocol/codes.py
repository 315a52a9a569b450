"""The numbers of RFC 1928 as enums that carry the RFC's own wording. RFC 1928 sections 3 to 6."""
from __future__ import annotations

from enum import IntEnum
from typing import Tuple, Type, TypeVar

E = TypeVar("E", bound="Worded")


class Worded(IntEnum):
    """An IntEnum whose members also have `.phrase`, the RFC's wording, and `.word`, their name as a plain attribute:
    `.name` is a property of enum's own, which takes five times as long."""

    phrase: str
    word: str

    def __new__(cls: Type[E], value: int, phrase: str = "") -> E:
        member = int.__new__(cls, value)
        member._value_ = value
        member.phrase = phrase
        return member

    def __init__(self, *_: object) -> None:
        self.word = self.name


class Method(Worded):
    """METHOD: how a client authenticates.                                               RFC 1928 §3"""

    NO_AUTHENTICATION = 0x00, "NO AUTHENTICATION REQUIRED"
    GSSAPI = 0x01, "GSSAPI"
    USERNAME_PASSWORD = 0x02, "USERNAME/PASSWORD"
    NO_ACCEPTABLE = 0xFF, "NO ACCEPTABLE METHODS"


class Cmd(Worded):
    """CMD: the command of a request.                                                    RFC 1928 §4"""

    CONNECT = 0x01, "CONNECT"
    BIND = 0x02, "BIND"
    UDP_ASSOCIATE = 0x03, "UDP ASSOCIATE"


class Atyp(Worded):
    """ATYP: the type of the address that follows.                                       RFC 1928 §5"""

    IPV4 = 0x01, "IP V4 address"
    DOMAINNAME = 0x03, "fully-qualified domain name"
    IPV6 = 0x04, "IP V6 address"


class Rep(Worded):
    """REP: the result in a reply.                                                       RFC 1928 §6"""

    SUCCEEDED = 0x00, "succeeded"
    GENERAL_FAILURE = 0x01, "general SOCKS server failure"
    NOT_ALLOWED = 0x02, "connection not allowed by ruleset"
    NETWORK_UNREACHABLE = 0x03, "Network unreachable"
    HOST_UNREACHABLE = 0x04, "Host unreachable"
    CONNECTION_REFUSED = 0x05, "Connection refused"
    TTL_EXPIRED = 0x06, "TTL expired"
    COMMAND_NOT_SUPPORTED = 0x07, "Command not supported"
    ADDRESS_TYPE_NOT_SUPPORTED = 0x08, "Address type not supported"


def phrase(kind: Type[Worded], number: int, ranges: Tuple[Tuple[int, int, str], ...] = ()) -> str:
    """The RFC's wording for `number`, or for its range, or "unassigned"."""
    try:
        return kind(number).phrase
    except ValueError:
        return next((words for low, high, words in ranges if low <= number <= high), "unassigned")


METHOD_RANGES = ((0x03, 0x7F, "IANA ASSIGNED"), (0x80, 0xFE, "RESERVED FOR PRIVATE METHODS"))
