"""The status page's HTTP server: GET and HEAD, one request a connection, everything bounded. It changes nothing.

A thread for each connection, MOST at a time; a request has HEAD_S seconds and HEAD_BYTES bytes. Where it listens beyond
loopback, each request but /healthz needs the password of a user (HTTP Basic, RFC 7617), unless the proxy is --open. A
web page elsewhere could have a browser on this machine ask us under a name of its own (DNS rebinding): without a
password, the Host has to be an IP address or localhost.
"""
from __future__ import annotations

import base64
import binascii
import hashlib
import io
import json
import logging
import pkgutil
import re
import socket
import threading
from http.server import BaseHTTPRequestHandler
from ipaddress import ip_address
from socketserver import ThreadingTCPServer
from time import monotonic
from typing import Any, Callable, Dict, Optional, Tuple
from urllib.parse import parse_qsl, urlsplit

from ..access.logins import Verdict, origin_of as login_origin
from ..access.passwords import Wait
from ..access.users import Users
from ..values import network
from ..net.addresses import endpoint_of, origin_of
from ..net.shares import Share
from ..protocol.codes import Cmd
from ..protocol.facts import Facts
from .meter import STATES
from .views import MOST as MOST_SESSIONS, Body, Source

log = logging.getLogger(__name__)

MOST = 32                       # connections at a time
HEAD_S = 5.0                    # for the request, for a login that waits, and for the answer
HEAD_BYTES = 8192
TURN_S = 5.0                    # for others that ask for sessions, one after the other
SESSIONS = 1000                 # in one answer, if not asked for another number
BASIC = 'Basic realm="socks5", charset="UTF-8"'
TEXT, JSON, HTML = "text/plain; charset=utf-8", "application/json", "text/html; charset=utf-8"
HEADERS = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff", "X-Frame-Options": "DENY",
           "Referrer-Policy": "no-referrer", "Cross-Origin-Resource-Policy": "same-origin", "Connection": "close"}


class Refused(Exception):
    """The request is answered with this status and these words."""

    def __init__(self, status: int, words: str, **headers: str) -> None:
        super().__init__(words)
        self.status = status
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}


class Web(ThreadingTCPServer):
    """Serves on a socket that listens already."""

    daemon_threads = True
    block_on_close = False

    def __init__(self, listener: socket.socket, source: Source, users: Users, with_password: bool) -> None:
        super().__init__(listener.getsockname(), Handler, bind_and_activate=False)
        self.socket.close()
        self.socket = listener
        self.source = source
        self.users = users                      # a reload brings others
        self.with_password = with_password
        self.turn = threading.Lock()            # several answers at once would take the interpreter from traffic
        self._places = Share(MOST)              # or one address could keep health checks out

    def process_request(self, request: Any, client_address: Any) -> None:
        owner = origin_of(client_address)
        if not self._places.take(owner):
            self.shutdown_request(request)
            return
        try:
            super().process_request(request, client_address)
        except (RuntimeError, MemoryError):     # no thread
            self._places.give_back(owner)
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._places.give_back(origin_of(client_address))

    def handle_error(self, request: Any, client_address: Any) -> None:
        log.exception("bug in the status page")


class Handler(BaseHTTPRequestHandler):
    """One request."""

    server: Web
    server_version = "socks5-server"
    sys_version = ""

    def setup(self) -> None:
        super().setup()
        self.rfile = io.BytesIO(self._head())   # so that the base neither waits nor reads more

    def _head(self) -> bytes:
        """The request up to its empty line; b"", which closes the connection, when its time or size is over."""
        head, deadline = b"", monotonic() + HEAD_S
        try:
            while b"\r\n\r\n" not in head and b"\n\n" not in head and len(head) < HEAD_BYTES:
                self.connection.settimeout(max(deadline - monotonic(), 0.001))
                data = self.connection.recv(HEAD_BYTES)
                if not data:
                    return b""
                head += data
        except OSError:
            return b""
        self.connection.settimeout(HEAD_S)
        return head if b"\r\n\r\n" in head or b"\n\n" in head else b""

    def handle(self) -> None:
        try:
            self.close_connection = True
            self.handle_one_request()
        except OSError:                         # the client left, or does not read
            pass

    def do_GET(self) -> None:
        try:
            where, _, query = self.path.partition("?")
            answer = PATHS.get(where) or (PATHS["/sessions/"] if where.startswith("/sessions/") else None)
            if not answer:
                raise Refused(404, "there is no such page; there are %s" % ", ".join(sorted(PATHS)))
            self._check_host()
            if where != "/healthz":
                self._check_password()
            self._send(200, *answer(self, dict(parse_qsl(query, max_num_fields=10))))
        except Refused as exc:
            self._send(exc.status, TEXT, ("%s\n" % exc).encode(), **exc.headers)
        except ValueError as exc:               # of a parameter
            self._send(400, TEXT, ("%s\n" % exc).encode("ascii", "backslashreplace"))

    do_HEAD = do_GET

    def send_error(self, code: int, message: Optional[str] = None, explain: Optional[str] = None) -> None:
        """As the base calls it, for a request that is malformed or has another method."""
        if code == 501:
            self._send(405, TEXT, b"GET and HEAD only\n", Allow="GET, HEAD")
        else:
            self._send(code, TEXT, b"bad request\n")

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _send(self, status: int, kind: str, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in {**HEADERS, "Content-Security-Policy": POLICY, **headers}.items():
            self.send_header(name, value)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    # ---- which requests are accepted ------------------------------------------------------------------------------

    def _check_host(self) -> None:
        host = self.headers.get("Host", "")
        if host and not self.server.with_password and not is_local_name(host):
            raise Refused(421, "ask by an IP address or as localhost, not by a name")

    def _check_password(self) -> None:
        if not self.server.with_password:
            return
        given = basic(self.headers.get("Authorization", ""))
        if not given:
            raise Refused(401, "a user and a password, please", WWW_Authenticate=BASIC)
        client, users = endpoint_of(self.client_address).ip, self.server.users
        verdict = users.logins.judge(login_origin(client, origin_of(self.client_address)), *given, users.check,
                                     Wait(HEAD_S))
        if verdict is Verdict.DEFERRED:
            raise Refused(429, "the password was not looked at: too many logins are tried, or no memory is left")
        if verdict is Verdict.WRONG:
            log.warning("auth_failed client=%(client)s user=%(user)s", Facts(client=client, user=given[0]))
            raise Refused(401, "wrong user name or password", WWW_Authenticate=BASIC)

    # ---- the pages ------------------------------------------------------------------------------------------------

    def page(self, query: Dict[str, str]) -> Body:
        return HTML, PAGE

    def metrics(self, query: Dict[str, str]) -> Body:
        return self.server.source.metrics()

    def health(self, query: Dict[str, str]) -> Body:
        well, word = self.server.source.health()
        if not well:
            raise Refused(503, word)
        return TEXT, (word + "\n").encode()

    def summary(self, query: Dict[str, str]) -> Body:
        return as_json(self.server.source.summary(float(query.get("since", "0"))))

    def recent(self, query: Dict[str, str]) -> Body:
        return as_json(self._in_turn(self.server.source.recent))

    def sessions(self, query: Dict[str, str]) -> Body:
        unknown = set(query) - {"client", "user", "command", "state", "limit"}
        if unknown:
            raise ValueError("no parameter is called %s" % ascii(unknown.pop()))
        if "client" in query:
            network(query["client"])
        if query.get("command") not in (None, *(cmd.name for cmd in Cmd)):
            raise ValueError("command is one of %s" % ", ".join(cmd.name for cmd in Cmd))
        if query.get("state") not in (None, *STATES):
            raise ValueError("state is one of %s" % ", ".join(STATES))
        limit = int(query.pop("limit", SESSIONS))
        if not 0 < limit <= MOST_SESSIONS:
            raise ValueError("limit is a number from 1 to %d" % MOST_SESSIONS)
        return JSON, self._in_turn(self.server.source.sessions, query, limit)

    def session(self, query: Dict[str, str]) -> Body:
        number = urlsplit(self.path).path[len("/sessions/"):]
        found = self._in_turn(self.server.source.session, int(number)) if re.fullmatch("[0-9]{1,18}", number) else None
        if not found:
            raise Refused(404, "this session is not remembered")
        return as_json(found)

    def _in_turn(self, ask: Callable[..., Any], *args: Any) -> Any:
        """Ask for sessions when no other request does."""
        if not self.server.turn.acquire(timeout=TURN_S):
            raise Refused(503, "too many ask for sessions")
        try:
            return ask(*args)
        finally:
            self.server.turn.release()


PATHS: Dict[str, Callable[[Handler, Dict[str, str]], Body]] = {
    "/": Handler.page, "/metrics": Handler.metrics, "/healthz": Handler.health, "/sessions": Handler.sessions,
    "/sessions/": Handler.session, "/summary": Handler.summary, "/recent": Handler.recent}


def as_json(value: Any) -> Body:
    return JSON, json.dumps(value, separators=(",", ":")).encode() + b"\n"


def is_local_name(host: str) -> bool:
    """Whether a Host is "localhost" or an IP address, with or without a port."""
    found = re.fullmatch(r"(\[[^\]]*\]|[^:]*)(:[0-9]*)?", host)
    name = found.group(1) if found else ""
    try:
        return name.lower() == "localhost" or bool(ip_address(name[1:-1] if name.startswith("[") else name))
    except ValueError:
        return False


def basic(header: str) -> Optional[Tuple[bytes, bytes]]:
    """User and password of an Authorization header.                                              RFC 7617 §2"""
    scheme, _, coded = header.partition(" ")
    if scheme.lower() != "basic":
        return None
    try:
        user, colon, password = base64.b64decode(coded, validate=True).partition(b":")
    except (binascii.Error, ValueError):
        return None
    return (user, password) if colon else None


def policy(page: bytes) -> str:
    """A Content-Security-Policy that lets only the page's own style and script in, by their hashes."""
    def hashes(tag: bytes) -> str:
        return " ".join("'sha256-%s'" % base64.b64encode(hashlib.sha256(text).digest()).decode()
                        for text in re.findall(b"<%s>(.*?)</%s>" % (tag, tag), page, re.DOTALL))

    return ("default-src 'none'; script-src %s; style-src %s; connect-src 'self'; img-src data:; base-uri 'none'; "
            "form-action 'none'; frame-ancestors 'none'" % (hashes(b"script"), hashes(b"style")))


PAGE = pkgutil.get_data(__package__, "page.html") or b""
POLICY = policy(PAGE)
