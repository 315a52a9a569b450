"""Explain every message of a session as it passes, field by field: its bytes, its name and what it says.

A Story turns the messages of one session into blocks of lines, each of which begins with the session's number, and
hands each block to a callable. It walks over the same Layout that the messages are parsed with, so it cannot show
another protocol than is spoken. Passwords are masked; payload is counted, not shown.

Opens and writes nothing: server/tracing.py does. Runs in the thread that serves the session.
"""
from __future__ import annotations

from typing import Any, Callable, Dict, Iterator, List, Mapping, Optional, Tuple, Type, TypeVar, Union

from .codes import Atyp, Cmd, Rep
from .errors import SocksError
from .facts import NOTHING
from .fields import ATYP_IN_FRONT, ReadExactly, dissect
from .messages import (LAYOUTS, Abort, Datagram, Greeting, Login, LoginStatus, ProtectionLevel, Reply, Request,
                       SecurityToken, Selection)

M = TypeVar("M", Greeting, Login, SecurityToken, ProtectionLevel, Request)
Sent = Union[Selection, LoginStatus, SecurityToken, ProtectionLevel, Abort, bytes]
Message = Union[Greeting, Selection, Login, LoginStatus, SecurityToken, ProtectionLevel, Abort, Request, Reply,
                Datagram]
Sockaddr = Tuple[Any, ...]
Tell = Callable[[List[str]], object]

ROW_BYTES = 8                       # of hex in one line
SHOWN_BYTES = 64                    # of one field
UP, DOWN = "client -> proxy", "proxy -> client"
PLAIN, TITLE, HEX, NAME, BAD = "0", "1", "36", "33", "31"       # colours: ECMA-48, "select graphic rendition"

# What each message is for, and where it is defined.
TITLES: Dict[type, str] = {
    Greeting: "Greeting: these are the methods that I can do, choose one (RFC 1928 section 3)",
    Selection: "Selection: this is the method that we use (RFC 1928 section 3)",
    Login: "Login: this is who I am (RFC 1929 section 2)",
    LoginStatus: "LoginStatus: this is what I think of it (RFC 1929 section 2)",
    SecurityToken: "SecurityToken: this is for your GSS-API mechanism (RFC 1961 section 3)",
    ProtectionLevel: "ProtectionLevel: so are the messages protected (RFC 1961 section 4)",
    Abort: "Abort: the security context or its protection level is refused (RFC 1961 section 3)",
    Request: "Request: do this for me (RFC 1928 section 4)",
    Reply: "Reply: this is what came of it (RFC 1928 section 6)",
}
SECOND_REPLY = "Second reply: this is what came of the waiting (RFC 1928 section 4)"
DATAGRAM = {UP: "Datagram: send this there (RFC 1928 section 7)",
            DOWN: "Datagram: this came from there (RFC 1928 section 7)"}
# What a field says, in a sentence, where the word alone would leave a newcomer with a question.
SENTENCES = {"ATYP": "%s follows", "DST.PORT": "port %s", "BND.PORT": "port %s"}
# What BND.ADDR and BND.PORT of a reply that says "succeeded" mean, by command; BIND has a second reply.
MEANING_OF_BND = {
    "CONNECT": ["the destination is reached; BND is the proxy's own end of that connection"],
    "BIND": ["the proxy listens; the peer is to connect to BND, the second reply says who did",
             "the peer has connected; BND is the peer's own address"],
    "UDP_ASSOCIATE": ["the proxy takes datagrams from the client at BND for as long as this connection is open"],
}
TUNNEL = "tunnel: from here on, what either side sends goes to the other as it is"
PROTECTED_TUNNEL = "tunnel: from here on, bytes go both ways, encapsulated between client and proxy"
# The RFC's phrases are short: what each of them means to the client.
REASONS = {
    Rep.GENERAL_FAILURE: "the proxy could not do it, for a reason that has no number of its own",
    Rep.NOT_ALLOWED: "the proxy is there, but its rules do not let this client go there",
    Rep.NETWORK_UNREACHABLE: "the proxy has no way into the network of the destination",
    Rep.HOST_UNREACHABLE: "there is a way, but the host was not found; or its name does not exist",
    Rep.CONNECTION_REFUSED: "the host is there, and nothing listens on that port",
    Rep.TTL_EXPIRED: "no answer came in time",
    Rep.COMMAND_NOT_SUPPORTED: "the proxy does not know this CMD",
    Rep.ADDRESS_TYPE_NOT_SUPPORTED: "the proxy cannot use this ATYP",
}


class Trace:
    """What the stories of all sessions have in common.

    tell     takes one block, a list of lines without newlines. Called by the threads of all sessions; must not wait
    colour   paint it for a terminal
    close    of the place that tell() writes to
    """

    def __init__(self, tell: Tell, colour: bool = False, close: Callable[[], object] = lambda: None) -> None:
        self.close = close
        self._tell = tell
        self._colour = colour

    def begin(self, number: int, client: object) -> Story:
        """The story of session `number`, whose client has connected."""
        return Story(self, number, client)

    def paint(self, style: str, text: str) -> str:
        return "\033[%sm%s\033[0m" % (style, text) if self._colour and text.strip() else text

    def block(self, number: int, lines: List[str]) -> None:
        self._tell(["#%d %s" % (number, line.replace("\n", "\\n")) for line in lines])


class Story:
    """The trace of one session, as it happens: take, sent and datagram for its messages, end for its totals."""

    def __init__(self, trace: Trace, number: int, client: object) -> None:
        self.trace = trace
        self.number = number
        self.cmd = ""
        self.replies = 0                                # that said "succeeded"
        self.tunnel = TUNNEL
        self.tell("%s has connected" % str(client))

    def tell(self, *lines: str) -> None:
        self.trace.block(self.number, list(lines))

    # ---- messages -------------------------------------------------------------------------------------------------

    def take(self, kind: Type[M], read: ReadExactly) -> M:
        """kind.parse(read), and show what was read; of a message that is cut short, the fields that are whole."""
        came, end = bytearray(), []

        def listening(size: int) -> bytes:
            piece = read(size)
            came.extend(piece)
            return piece

        try:
            message = kind.parse(listening)
            if isinstance(message, Request):
                self.cmd = message.cmd.name
            return message
        except SocksError as exc:
            end = ["refused: %s" % exc]
            raise
        except (EOFError, OSError):
            end = ["and there it ends: the client left, or its time was over"]
            raise
        finally:
            self.show(UP, kind, bytes(came), end)

    def sent(self, kind: Type[Any], raw: bytes, why: str = "") -> None:
        """Show what the server is about to send; for a refusal `why`, the reason that the log gives."""
        if kind is bytes:
            self.tell(self.title(DOWN, "%d bytes that the client may understand, as this is not SOCKS5" % len(raw)))
            return
        notes: List[str] = []
        title = ""
        if kind is Reply:
            title = SECOND_REPLY if self.cmd == Cmd.BIND.name and self.replies else ""
            notes = self.explain(raw[1], why)
        elif why:
            notes = ["why: " + why]
        self.show(DOWN, kind, raw, notes, title)

    def explain(self, rep: int, why: str) -> List[str]:
        """What a reply means to the client, in plain words."""
        notes = meaning(rep, self.cmd, self.replies, self.tunnel)
        if rep != Rep.SUCCEEDED:
            return [self.trace.paint(BAD, notes[0])] + (["why: " + why] if why else [])
        self.replies += 1
        return notes

    def datagram(self, way: str, raw: bytes, address: Sockaddr) -> None:
        """Show one between the client, at `address`, and its UDP association; `way` is UP or DOWN."""
        shown = sum(len(piece) for _, piece, _ in dissect(LAYOUTS[Datagram], raw))
        self.show(way, Datagram, raw, ["DATA: %d bytes, %s %s" % (
            len(raw) - shown, "from" if way == UP else "to", "%s port %s" % address[:2])])

    def end(self, facts: Mapping[str, Any]) -> None:
        """Show the totals: `facts` are those of the session's line in the log, a protocol.facts.Facts."""
        why = "" if facts["why"] == NOTHING else ", why: %s" % facts["why"]
        words = "the end after %.3f s: %d bytes up (from the client), %d bytes down (to it); ended by: %s%s" % (
            facts["seconds"], facts["up"], facts["down"], facts["ended"], why)
        self.tell(self.trace.paint(TITLE, words))

    def protected(self, words: str) -> None:
        """Show which protection level holds."""
        self.tunnel = PROTECTED_TUNNEL
        self.tell(self.trace.paint(TITLE, "protection: from here on, %s (RFC 1961 section 5)" % words))

    # ---- how they look --------------------------------------------------------------------------------------------

    def title(self, way: str, words: str) -> str:
        return self.trace.paint(TITLE, "%s  %s" % (way, words))

    def show(self, way: str, kind: Type[Message], raw: bytes, notes: List[str], title: str = "") -> None:
        lines = [self.title(way, title or TITLES.get(kind) or DATAGRAM[way])]
        for name, piece, words in explained(kind, raw):
            lines += self.rows(name, piece, words)
        self.tell(*lines, *("  " + note for note in notes))

    def rows(self, name: str, piece: Optional[bytes], words: str) -> Iterator[str]:
        shown = b"" if piece is None else piece[:SHOWN_BYTES]
        for at in range(0, max(len(shown), 1), ROW_BYTES):
            digits = "**" if piece is None else shown[at:at + ROW_BYTES].hex(" ")
            yield ("  %s  %s  %s" % (self.trace.paint(HEX, "%-23s" % digits), self.trace.paint(NAME, "%-8s" % name),
                                     words)).rstrip()
            name = words = ""
        if piece and len(piece) > SHOWN_BYTES:
            yield "  ... and %d bytes more" % (len(piece) - SHOWN_BYTES)


# ---- also for the status page ------------------------------------------------------------------------------------

def explained(kind: Type[Message], raw: bytes) -> Iterator[Tuple[str, Optional[bytes], str]]:
    """Yield name, bytes and meaning of each field of a message; for the bytes of a secret None."""
    before = b""
    for field, piece, words in dissect(LAYOUTS[kind], raw):
        if field.secret:
            yield field.name, None, "not shown"
        else:
            if field.size == ATYP_IN_FRONT and before[0] == Atyp.DOMAINNAME:     # its length stands in front
                words = "%d bytes: %s" % (piece[0], words)
            yield field.name, piece, SENTENCES.get(field.name, "%s") % words
        before = piece


def meaning(rep: int, cmd: str, succeeded: int, tunnel: str = TUNNEL) -> List[str]:
    """What a reply to `cmd` means to the client, in plain words; `succeeded` of those before it said so. `tunnel` says
    what comes behind the last one."""
    if rep != Rep.SUCCEEDED:
        return ["that is: " + REASONS.get(Rep(rep), "")]
    meanings = MEANING_OF_BND.get(cmd, [])
    notes = ["that is: " + words for words in meanings[succeeded:succeeded + 1]]
    if cmd != Cmd.UDP_ASSOCIATE.name and succeeded + 1 == len(meanings):
        notes.append(tunnel)
    return notes
