"""The GSSAPI sub-negotiation, the server's half above and the client's below. RFC 1961 sections 3 and 4.

Messages in, messages out: `take(kind)` gives the peer's next message, `send(message)` sends one of ours.
"""
from __future__ import annotations

from typing import TYPE_CHECKING, Any, Callable, Type, Union

from ..protocol.codes import Protection
from ..protocol.errors import GssError
from ..protocol.messages import ProtectionLevel, SecurityToken

if TYPE_CHECKING:                                           # which loads ctypes
    from .gssapi import Context

MAX_ROUNDS = 10             # Kerberos takes one, or two
LEVELS = {level.name.lower(): level for level in Protection}
Take = Callable[[Type[Any]], Any]
Send = Callable[[Union[SecurityToken, ProtectionLevel]], object]


def accept(context: Context, take: Take, send: Send, least: Protection) -> None:
    """Establish the context with a client, and agree on the level, which is at least `least`. Raises GssError."""
    for _ in range(MAX_ROUNDS):
        answer = context.step(take(SecurityToken).token)
        if answer:
            send(SecurityToken(answer))
        if context.done:
            break
    else:
        raise GssError("no security context after %d tokens" % MAX_ROUNDS)
    token = take(ProtectionLevel).token
    in_clear = len(token) == 1                              # NEC's reference implementation; curl --socks5-gssapi-nec
    if in_clear and context.may_be_replay:
        raise GssError("the protection level is not wrapped: this may be a replay")
    level = choose(token if in_clear else context.unwrap(token), least)
    if not context.supports(level):
        raise GssError("the security context cannot give %s" % level.name.lower())
    packed = bytes([level])
    send(ProtectionLevel(packed if in_clear else context.wrap(packed)))
    context.level = level                                   # not before: that message is never encrypted


def choose(required: bytes, least: Protection) -> Protection:
    """The level that holds where the client requires this one."""
    try:
        level = Protection(ord(required))
    except (ValueError, TypeError):
        raise GssError("no protection level: %s" % required[:8].hex()) from None
    return max(Protection.CONFIDENTIALITY if level == Protection.SELECTIVE else level, least)


def initiate(context: Context, take: Take, send: Send, required: Protection) -> None:
    """Establish the context with a server, and agree on a level, which is at least `required`. Raises GssError."""
    token = context.step(b"")
    for _ in range(MAX_ROUNDS):
        if token:
            send(SecurityToken(token))
        if context.done:
            break
        token = context.step(take(SecurityToken).token)
    else:
        raise GssError("no security context after %d tokens" % MAX_ROUNDS)
    send(ProtectionLevel(context.wrap(bytes([required]))))
    level = choose(context.unwrap(take(ProtectionLevel).token), Protection.CLEAR)
    if level < required or not context.supports(level):
        raise GssError("the protection level is %s, not %s" % (level.name.lower(), required.name.lower()))
    context.level = level
