"""Sessions and handshakes as JSON. A worker answers with a line for each session, and the page's process puts the lines
of all workers together; it also explains a handshake field by field, by the same descriptions as --trace.

Peer-chosen bytes become printable text here. Passwords are not among what is kept, see server/inbox.Record.
"""
from __future__ import annotations

import json
from itertools import islice
from time import monotonic, sleep
from typing import Any, Dict, Iterable, Iterator, List, Optional, Protocol, Tuple, Type

from ..commands.rates import held_back
from ..values import network
from ..protocol.codes import Rep
from ..protocol.messages import Address
from ..protocol.trace import DOWN, SECOND_REPLY, TITLES, UP, Message, explained, meaning
from ..server.server import Server
from ..server.session import Session
from .channel import Query
from .meter import Meter

MOST = 10000                        # sessions in one answer of a worker
RECENT = 50                         # sessions that are over, of each kind, in one answer of a worker
AT_ONCE = 50                        # sessions between two moments in which other threads may have the interpreter
KINDS: Dict[str, Type[Message]] = {kind.__name__: kind for kind in TITLES}
NOT_KEPT = {"Login": ("PLEN", "PASSWD"), "SecurityToken": ("TOKEN",), "ProtectionLevel": ("TOKEN",)}
FOREIGN = "%d bytes that the client may understand, as this is not SOCKS5"

Json = Dict[str, Any]
Body = Tuple[str, bytes]            # content type, and the content


class Source(Protocol):
    """What the HTTP server asks for its answers. Any thread may call."""

    def metrics(self) -> Body: ...
    def health(self) -> Tuple[bool, str]: ...       # whether new clients are served, and the word for it
    def summary(self, since: float) -> Json: ...
    def sessions(self, query: Dict[str, str], limit: int) -> bytes: ...
    def session(self, number: int) -> Optional[Json]: ...
    def recent(self) -> List[Json]: ...


# ---- in the worker -----------------------------------------------------------------------------------------------

def answer(server: Server, meter: Meter, query: Query) -> Iterator[bytes]:
    """Lines of JSON: what the query asks for, a subset of this worker's sessions."""
    found: Iterable[Json] = ()
    if query["what"] == "sessions":
        found = (facts(session) for session in islice(select(server, query), int(query["limit"])))
    elif query["what"] == "recent":
        found = recent(meter)
    elif query["what"] == "session":
        found = map(handshake, islice(by_number(server, meter, int(query["id"])), 1))
    for number, value in enumerate(found):
        if number % AT_ONCE == AT_ONCE - 1:
            sleep(0)
        yield json.dumps(value, separators=(",", ":")).encode()


def select(server: Server, query: Query) -> Iterator[Session]:
    net = network(query["client"]) if query.get("client") else None
    user, command, state = query.get("user"), query.get("command"), query.get("state")
    for session in server.sessions:
        if ((net is None or session.client.ip in net) and (not user or words(session.user) == user)
                and (not command or session.cmd == command) and (not state or session.state() == state)):
            yield session


def recent(meter: Meter) -> Iterator[Json]:
    refused, others = ({session.number: session for session in kept[-RECENT:]} for kept in reversed(meter.last()))
    for number, session in {**others, **refused}.items():
        yield dict(facts(session), refused=number in refused)


def by_number(server: Server, meter: Meter, number: int) -> Iterator[Session]:
    for sessions in (server.sessions, *meter.last()):
        for session in sessions:
            if session.number == number:
                yield session


def facts(session: Session) -> Json:
    """What the log tells, and what holds now; times in seconds before now."""
    now = monotonic()
    up, down = session.moved()
    idle_s = session.idle_s(now)
    ended = session.ended_at
    return {
        "id": session.number, "client": str(session.client), "user": words(session.user), "command": session.cmd,
        "destination": words(session.dst), "reached": words(session.reached), "rep": session.rep,
        "state": "ended" if ended else session.state(), "held_back": "" if ended else held_back(session, now),
        "age": round((ended or now) - session.started, 3),
        "idle": None if idle_s is None else round(idle_s, 1), "up": up, "down": down,
        "ended": session.ended_by, "why": printable("; ".join(filter(None, (session.why, session.notes)))),
        "ago": round(now - ended, 1) if ended else None}


def handshake(session: Session) -> Json:
    """The facts, and the messages as they are kept: seconds since accept, the type, the bytes in hex, and whether the
    client sent them."""
    messages = []
    for when, kind, raw, came in list(session.record or ()):
        messages.append([round(when - session.started, 6), kind.__name__, raw.hex(), came])
    return dict(facts(session), messages=messages)


def words(value: object) -> Optional[str]:
    """A name, an address or an endpoint as text; None for none."""
    if value is None or isinstance(value, bytes):
        return None if value is None else name(value)
    if isinstance(value, Address) and isinstance(value.host, bytes):
        return "%s:%d" % (name(value.host), value.port)
    return str(value)


def name(chosen: bytes) -> str:
    return printable(chosen.decode("utf-8", "backslashreplace"))


def printable(chosen: str) -> str:
    """With escapes in the place of control characters and of marks that turn the direction of writing."""
    return chosen if chosen.isprintable() else "".join(
        char if char.isprintable() else ascii(char)[1:-1] for char in chosen)


# ---- in the process of the page ----------------------------------------------------------------------------------

def explain(session: Json) -> Json:
    """A handshake with its messages field by field, in the words of --trace."""
    shown, succeeded = [], 0
    for seconds, kind, digits, came in session["messages"]:
        raw = bytes.fromhex(digits)
        way, notes, fields = (UP if came else DOWN), [], []
        title = TITLES.get(KINDS[kind], "") if kind in KINDS else FOREIGN % len(raw)
        if kind in KINDS:
            fields = [{"name": field, "bytes": None if piece is None else piece.hex(), "means": meant}
                      for field, piece, meant in explained(KINDS[kind], raw)]
        fields += [{"name": field, "bytes": None, "means": "not shown"} for field in NOT_KEPT.get(kind, ())]
        if kind == "Reply":
            title = SECOND_REPLY if session["command"] == "BIND" and succeeded else title
            notes = meaning(raw[1], session["command"], succeeded)
            succeeded += raw[1] == Rep.SUCCEEDED
        shown.append({"seconds": seconds, "way": way, "title": title, "fields": fields, "notes": notes})
    return dict(session, messages=shown)


def merged(answers: Iterable[List[bytes]], limit: int) -> bytes:
    """The sessions of all workers as one JSON object."""
    lines = [line for answer in answers for line in answer]
    more = b"true" if len(lines) > limit else b"false"
    return b'{"sessions":[%s],"more":%s}\n' % (b",\n".join(lines[:limit]), more)


def newest_first(answers: Iterable[List[bytes]]) -> List[Json]:
    found: List[Json] = [json.loads(line) for answer in answers for line in answer]
    return sorted(found, key=lambda session: float(session["ago"] or 0))
