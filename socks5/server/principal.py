"""Authenticate a client by GSSAPI, and agree on the protection level of its messages. RFC 1961."""
from __future__ import annotations

from typing import Any

from ..access.logins import Verdict, origin_of
from ..access.subnegotiation import LEVELS, accept
from ..protocol.envelope import Envelope
from ..protocol.errors import GssError, GssUnavailable
from ..protocol.messages import Abort
from .inbox import LoginWait


def by_gssapi(handler: Any) -> bytes:
    """A security context, then its protection level. The client's principal. Raises GssError when it is refused, which
    waits while this client's address has had too many refusals; for want of something of ours that is no refusal."""
    session, server = handler.session, handler.server
    context = server.users.gssapi.context()
    try:
        accept(context, handler.take, handler.send, LEVELS[server.config.gssapi_protection])
    except GssError as exc:
        verdict = Verdict.DEFERRED
        if not isinstance(exc, GssUnavailable):
            verdict = server.users.logins.charge(origin_of(session.client.ip, session.origin), LoginWait(handler),
                                                 context.credentials.usable)
        handler.login_failed(verdict, context.peer or None)
        handler.send(Abort())
        raise
    server.meter.login(Verdict.RIGHT.value)
    if handler.debug:
        session.step("gssapi", user=context.peer, level=context.level.name)
    if context.level:
        handler.envelope = Envelope(context)
        handler.inbox.protect(handler.envelope)
        if session.story:
            session.story.protected(context.level.phrase)
    return bytes(context.peer)
