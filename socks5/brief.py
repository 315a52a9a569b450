"""The log for people at a terminal: a session in a short line. Files, pipes and the journal get all facts (log.py).

    14:05:12 alice -> example.com:443 ok 2.1 MB 3.4 s

What a peer chose is quoted unless it looks like a host or a word, so that no name forges the rest of the line.
"""
from __future__ import annotations

import logging
import re
import time
from typing import Any, Mapping

from .protocol.codes import Rep
from .protocol.facts import shown
from .status.line import amount

PLAIN = re.compile(r"'([A-Za-z0-9._-]+)'(:[0-9]+)?")
COMMANDS = {"CONNECT": "->", "BIND": "BIND", "UDP_ASSOCIATE": "UDP"}
OWN_WILL = {"client", "remote", "refused"}              # these ends say nothing beyond the rest of the line


def session(facts: Mapping[str, Any]) -> str:
    """The facts of a session's line, in a few words."""
    rep, size = word(facts, "rep"), facts["up"] + facts["down"]
    words = [word(facts, "user") if facts.get("user") else word(facts, "client").rpartition(":")[0]]
    if facts.get("cmd"):
        words += [COMMANDS.get(word(facts, "cmd"), ""), word(facts, "dst")]
    words.append("ok" if rep == Rep.SUCCEEDED.name else "no request" if rep == "-" else rep.lower().replace("_", " "))
    if size:
        words.append(amount(size))
    words.append("%.1f s" % facts["seconds"])
    ended, why = word(facts, "ended"), facts.get("why")
    words[-1] += "" if ended in OWN_WILL else ", %s" % ended
    words[-1] += ": %s" % ascii(why)[1:-1] if why else ""
    return " ".join(words)


def word(facts: Mapping[str, Any], key: str) -> str:
    text = str(shown(key, facts.get(key)))          # Facts[key] would be quoted already
    found = PLAIN.fullmatch(text)
    return found.group(1) + (found.group(2) or "") if found else text


class BriefFormatter(logging.Formatter):
    """Shows sessions short, and the time of day; other lines as `inner` does, which shows no time."""

    def __init__(self, inner: logging.Formatter) -> None:
        super().__init__()
        self.inner = inner

    def format(self, record: logging.LogRecord) -> str:
        facts = record.args
        if isinstance(facts, dict) and str(record.msg).startswith("session "):
            words = session(facts)
        else:
            words = self.inner.format(record)
        return "%s %s" % (time.strftime("%H:%M:%S", time.localtime(record.created)), words)
