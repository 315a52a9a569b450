"""Describe what a configuration would serve, to which clients and users: --check. Reads its files; opens no socket."""
from __future__ import annotations

from ipaddress import ip_address
from typing import List, Tuple, Union

from .users import Users
from ..config import Config
from ..values import ANY_SERVICE, DEFAULT_UPSTREAM, Rate
from .rules import Rules
from ..protocol.fields import text
from ..protocol.messages import Address

NAMES = 10              # user names that are listed; the others are counted


def report(config: Config) -> List[str]:
    """The lines of the description. Raises ConfigError, with file:line for an error in a file."""
    users, rules = Users(config), Rules(config)
    lines = ["would listen on %s" % listener(where, config.port) for where in config.listen]
    if config.status:
        who = "a password" if config.status_beyond() and not config.open else "no password"
        lines.append("status would be on http://%s/, with %s" % (listener(*config.status), who))
    lines.append("clients: %s" % clients(config))
    if config.gssapi:
        lines.append("GSSAPI: users with a ticket for %s, the keys are in %s, protection at least %s" % (
            "any service of the keytab" if config.gssapi == ANY_SERVICE else config.gssapi,
            config.keytab or "the system's keytab", config.gssapi_protection))
    if users or not config.gssapi:
        lines.append("users: %s" % (names(users) if users else "none, no password is required"))
    lines.append("rules: %s, the first that matches decides" % (config.rules or "the default ones"))
    lines += ["  %s" % ascii(rule.line)[1:-1] for rule in rules.rules]
    lines.append("  and what none of them matches is denied")
    if config.bind_ports:
        lines.append("BIND: %d clients at a time by --bind-ports" % number_of(config.bind_ports))
    if config.udp_ports:
        lines.append("UDP ASSOCIATE: %d clients at a time by --udp-ports" % (number_of(config.udp_ports) // 2))
    lines += shares(config) + ways(config, rules)
    return lines + ["warning: %s" % warning for warning in warnings(config, users, rules)]


def shares(config: Config) -> List[str]:
    """What one client or user may take."""
    lines = ["%s %s: %s" % (words, whose, what) for words, whose, what in (
        ("sessions of one", "client", config.max_per_client), ("sessions of one", "user", config.max_per_user),
        ("bytes a second of one", "client", rate_words(config.rate_per_client)),
        ("bytes a second of one", "user", rate_words(config.rate_per_user))) if what]
    if not config.authenticates() and (config.max_per_user or config.rate_per_user):
        lines.append("warning: no client has to log in, so the limits of users do not hold")
    return lines


def rate_words(rate: Union[Rate, Tuple[()]]) -> str:
    if not rate:
        return ""
    one, other = ("%d" % way.bytes_s if way else "any number" for way in rate[:2])
    return "%s up and down together" % one if rate[2] else "%s up, %s down" % (one, other)


def ways(config: Config, rules: Rules) -> List[str]:
    """Where what is allowed goes."""
    if not config.upstream:
        return []
    lines = ["%s%s" % (upstream, ", as user %s" % text(upstream.user[0]) if upstream.user else
                       ", by GSSAPI for %s" % text(upstream.service.encode()) if upstream.service else "")
             for upstream in config.upstream]
    lines.append("an allow without via goes %s" % (
        "via %s" % DEFAULT_UPSTREAM if config.upstream_of(None) else "directly to the destination"))
    named = {rule.via for rule in rules.rules}
    return lines + ["warning: no rule says via %s" % upstream.name for upstream in config.upstream
                    if upstream.name not in named and upstream.name != DEFAULT_UPSTREAM]


def warnings(config: Config, users: Users, rules: Rules) -> List[str]:
    """What the administrator has to know when the server starts, and after a reload."""
    lines = ["%s: there is no user %s" % (rule.where, text(rule.user)) for rule in rules.rules
             if rule.user is not None and rule.user not in users.names and not (config.gssapi and b"@" in rule.user)]
    opener = rules.opener()
    if not opener:
        return lines
    reached = ", ".join(listener(where, config.port) for where in config.beyond())
    which = " (%s: %s)" % (opener.where, ascii(opener.line)[1:-1]) if config.rules else ""
    return lines + ["open proxy: every client that reaches %s is let in without a password%s" % (reached, which)]


def number_of(ports: Tuple[int, ...]) -> int:
    return ports[1] - ports[0] + 1


def listener(where: str, port: int) -> str:
    if not port:
        return "%s, any free port" % where
    return "[%s]:%d" % (where, port) if "%" in where else str(Address(ip_address(where), port))


def admission(config: Config) -> str:
    """Which clients are let in, in one line."""
    how = "a Kerberos ticket" if config.gssapi else ""
    if config.needs_password():
        how = "%s or a password" % how if how else "a password"
    return "%s; %s is required" % (clients(config), how or "no password")


def clients(config: Config) -> str:
    if config.allow_from:
        return "only those at %s" % ", ".join(map(str, config.allow_from))
    return "every client that reaches these addresses" if config.beyond() else "programs on this machine"


def names(users: Users) -> str:
    more = len(users.names) - NAMES
    return "only with a password: %s%s" % (", ".join(map(text, users.names[:NAMES])),
                                           " and %d more" % more if more > 0 else "")
