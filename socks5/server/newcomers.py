"""A connection before it has a handler: silent clients, and the PROXY header of a load balancer.

While many clients negotiate, a silent client costs no thread: the relay loop waits for its first byte. A load balancer
(--proxy-protocol) sends a PROXY header first. Until the header has arrived, a session counts for no client. Then it
counts for the client that the header names: limits, rules, rate limit, log and the UDP source filter use that address.
Runs in the thread that serves the connection; methods that say so run in the relay loop's thread.
"""
from __future__ import annotations

import logging
import sys
from contextlib import suppress
from functools import partial
from socketserver import ThreadingTCPServer
from threading import Lock
from time import monotonic
from typing import Any, Dict

from ..net.addresses import Sockaddr, endpoint_of, ip_of, origin_of, unmapped
from ..protocol.errors import ProtocolError
from ..protocol.facts import Facts
from ..protocol.fields import ReadExactly
from ..protocol.proxy import ProxyHeader
from ..relay.watch import peek
from .handler import Service
from .inbox import linger
from .session import Session
from .sessions import UNKNOWN, Full

log = logging.getLogger(__name__)

COMPLAIN_EVERY_S = 60.0
REFUSED = "refused client=%(client)s why=%(why)s"
MANY_NEGOTIATING = 64                   # at once: from then on a silent newcomer gets no thread


class Newcomers(ThreadingTCPServer, Service):
    """The part of a Server that is concerned with a connection before there is a handler."""

    _lock: Lock
    _complained: Dict[str, float]           # when it was said last, by what it is about

    # ---- load balancers -------------------------------------------------------------------------------------------

    def is_balancer(self, client_address: Any) -> bool:
        balancers = self.config.proxy_protocol
        return bool(balancers) and any(ip_of(client_address) in network for network in balancers)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """As in socketserver; but first, where it is due, the PROXY header."""
        session = self.sessions.get(request) if self.config.proxy_protocol else None
        if session and session.origin == UNKNOWN:
            balancer, client_address = client_address, self._client_of(session, client_address)
            if client_address is None:
                session.ended_by = session.ended_by or "refused"
                self.shutdown_request(request)
                return
            session.step("proxied", balancer=endpoint_of(balancer))
            if self.waits_silently(session, client_address):    # the header is no word of the client's
                return
        super().process_request_thread(request, client_address)

    def _client_of(self, session: Session, balancer: Sockaddr) -> Any:
        """The client's address, as accept() would have returned it; None when the client is not to be served."""
        client_address = balancer
        try:
            client_address = client_of(ProxyHeader.parse(exact_reader(session)), balancer)
            client = endpoint_of(client_address)
            if session.story:
                session.story.tell("%s is a load balancer: its PROXY header names %s" % (session.client, client))
            self.sessions.move(session, client, origin_of(client_address))
            if self.verify_request(session.sock, client_address):
                return client_address
            session.why = "not admitted"
        except Full as exc:
            session.why = str(exc)
            self.refuse(client_address, exc.limit, session.why)
        except ProtocolError as exc:
            session.why = str(exc)
            linger(session.sock)
        except (EOFError, OSError) as exc:                      # unless we shut it down, and that is why
            if not session.ended_by:
                session.ended_by, session.why = "client", str(getattr(exc, "strerror", None) or exc)
        except Exception:                                       # in an overridden hook
            self.handle_error(session.sock, client_address)
        return None

    # ---- silent clients -------------------------------------------------------------------------------------------

    def waits_silently(self, session: Session, client_address: Any) -> bool:
        """Whether the relay loop waits for the first byte of this client, because many others negotiate."""
        if len(self.sessions.negotiating) <= MANY_NEGOTIATING or peek(session.sock) is not None:
            return False
        try:
            self.relay_loop().watch(session.sock, partial(self._newcomer, session, client_address))
        except (OSError, ValueError):                           # the system has no more to give: a thread, then
            return False
        return True

    def _newcomer(self, session: Session, client_address: Any, said: bool) -> None:
        """In the relay loop's thread: a silent newcomer has said something, or left."""
        try:
            if said:
                super().process_request(session.sock, client_address)
                return
            session.ended_by = session.ended_by or "client"     # unless it was shut down, and that is why
            session.why = session.why or ("client closed" if session.ended_by == "client" else "")
        except (RuntimeError, MemoryError) as exc:
            self.refuse(client_address, "no thread", "no thread: %s" % exc)
            session.ended_by, session.why = "server", str(exc)
        self.end_session(session)

    # ---- clients that are refused ---------------------------------------------------------------------------------

    def refuse(self, client_address: Any, about: str, why: str) -> None:
        """Say that this client is closed unheard, for want of something of ours."""
        self.complain(about, REFUSED, Facts(client=endpoint_of(client_address), why=why))
        self.meter.refused(about)

    def complain(self, about: str, line: str, facts: Facts) -> None:
        """A warning that would come with every connection: once a minute is enough, for each thing it is about."""
        now = monotonic()
        with self._lock:
            if now - self._complained.get(about, -COMPLAIN_EVERY_S) < COMPLAIN_EVERY_S:
                return
            self._complained[about] = now
        log.warning(line, facts)

    def tell_bug(self, where: str) -> str:
        """In an except block: log a bug with its traceback, but want of memory in one line. What it was, in words."""
        no_memory = isinstance(sys.exc_info()[1], MemoryError)
        with suppress(MemoryError):                             # to say so takes some
            if no_memory:
                self.complain("memory", "out_of_memory where=%(where)s", Facts(where=where))
            else:
                log.exception("bug %s", where)
        return "out of memory" if no_memory else "a bug of the server"

    # ---- what the Server has --------------------------------------------------------------------------------------

    def end_session(self, session: Session) -> None:
        raise NotImplementedError


def client_of(header: ProxyHeader, balancer: Sockaddr) -> Sockaddr:
    """The client that a load balancer names. Its own address, if the header names none; and for a loopback address,
    unless the load balancer is on this machine as well: a program on another machine has no right to our loopback."""
    source = header.source
    if source is None or isinstance(source.host, bytes):
        return balancer
    host = unmapped(source.host)
    if host.is_loopback and not ip_of(balancer).is_loopback:
        return balancer
    return (str(host), source.port) if host.version == 4 else (str(host), source.port, 0, 0)


def exact_reader(session: Session) -> ReadExactly:
    """read(n) from the client's socket. Nothing is read ahead: what follows is the handler's."""
    def read(size: int) -> bytes:
        data = session.sock.recv(size)
        while len(data) < size:
            piece = session.sock.recv(size - len(data))
            if not piece:
                raise EOFError("client closed")
            data += piece
        return data
    return read
