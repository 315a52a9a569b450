"""The command line: options to a Config, logging, and a running server. The only module that prints or exits."""
from __future__ import annotations

import argparse
import configparser
import errno
import getpass
import logging
import os
import re
import socket
import sys
import threading
from functools import partial
from ipaddress import ip_address
from typing import Any, Callable, Dict, List, NoReturn, Optional, Sequence

from . import __version__, log as logs, selftest
from .access.check import admission, report, warnings
from .access.files import open_file
from .access.users import line_for, need_gssapi, service_credentials, set_line
from .config import GROUPS, Config, ConfigError, from_environment, long_flag, options, parse
from .values import SAME
from .net import listeners as listening
from .net.addresses import IP, Endpoint, endpoint_of, is_here
from .protocol.facts import Facts, FactsRecord
from .process import files, identity, signals, supervisor as workers
from .process.alone import Alone
from .process.systemd import Notifier, passed_sockets
from .server import tracing
from .server.counters import Shared
from .server.server import Server
from .server.tracing import colourful
from .status import beside
from .status.line import ERASE

try:
    import resource
except ImportError:                         # Windows
    resource = None                         # type: ignore[assignment]

EXIT_USAGE = 2
STACK_BYTES = 1 << 20                       # of a thread, where the address space is limited; 8 MiB otherwise
M_ARENA_MAX = -8                            # of mallopt(3)
LOOPBACK: Dict[int, IP] = {4: ip_address("127.0.0.1"), 6: ip_address("::1")}
SECTION = "socks5"
INI_ERRORS = {
    configparser.MissingSectionHeaderError: "the line [%s] must come first" % SECTION,
    configparser.DuplicateSectionError: "this section is there already",
    configparser.DuplicateOptionError: "this option is there already",
}

DESCRIPTION = "A SOCKS5 proxy server (RFC 1928, RFC 1929). Times are in seconds."
EPILOG = "Example: python3 socks5_server.py -l 0.0.0.0 -p 1080 -u NAME:PASSWORD"


class Parser(argparse.ArgumentParser):
    def flags(self) -> List[str]:
        return re.findall("--[a-z-]+", self.format_help())

    def error(self, message: str) -> NoReturn:
        """Print one line, without the usage text."""
        self.exit(EXIT_USAGE, "%s: %s\n" % (self.prog, " ".join(message.split())))


def build_parser() -> Parser:
    """Make the parser for all options of config.py and the actions, such as --check."""
    parser = Parser(prog="socks5-server", usage="%(prog)s [options]", description=DESCRIPTION, epilog=EPILOG,
                    allow_abbrev=False, argument_default=argparse.SUPPRESS)
    groups = {name: parser.add_argument_group(name) for name in GROUPS}
    for item in options():
        meta = item.metadata
        text = meta["help"] + default_words(item.default)
        if meta["kind"] is bool:
            groups[meta["group"]].add_argument(*meta["flags"], dest=item.name, action="store_const", const="yes",
                                               help=text)
        else:
            groups[meta["group"]].add_argument(*meta["flags"], dest=item.name, action="append", metavar=meta["metavar"],
                                               nargs="?" if meta["bare"] else None, const=meta["bare"] or None,
                                               help=text)
    groups["access"].add_argument("--hash-password", metavar="NAME", nargs="?", const="",
                                  help="read a password, print its line for --users, and exit")
    groups["access"].add_argument("--set-password", metavar="NAME", help="read a password, put its line into the "
                                  "--users FILE, in the place of NAME's line if there is one, and exit")
    running, watching = groups["running"], groups["watching"]
    running.add_argument("--check", action="store_true", help="check options and files, print the access granted, and "
                         "exit with 0, or 2 after an error")
    running.add_argument("--config", metavar="FILE", help="read options from an INI file, section [%s]; the command "
                         "line takes precedence" % SECTION)
    watching.add_argument("-v", "--verbose", action="store_true", help="log every step of a negotiation, too")
    watching.add_argument("-q", "--quiet", action="store_true", help="log only warnings and errors")
    watching.add_argument("--self-test", action="store_true", help="test every command with these options, print the "
                          "results, and exit with 0, or 1 after a failure")
    watching.add_argument("--version", action="version", version="%(prog)s " + __version__)
    return parser


def parse_args(argv: Optional[Sequence[str]]) -> Dict[str, Any]:
    """Parse the command line. An unknown option ends the program with an error that suggests a similar option."""
    parser = build_parser()
    args, rest = parser.parse_known_args(argv)
    if rest:
        parser.error("unrecognized arguments: %s%s" % (" ".join(rest), hint(parser, rest[0])))
    return vars(args)


def hint(parser: Parser, word: str) -> str:
    from difflib import get_close_matches                   # for this error only
    if word.isdecimal():
        return "; the port has an option: -p %s" % word
    close = get_close_matches(word.partition("=")[0], parser.flags(), 1) if word.startswith("--") else []
    return "; did you mean %s?" % close[0] if close else ""


def default_words(default: Any) -> str:
    if isinstance(default, bool) or default in ((), ""):
        return ""
    return " (default %s)" % (" ".join(default) if isinstance(default, tuple) else
                              "%g" % default if isinstance(default, float) else default)


def read_config(args: Dict[str, Any], passed: Sequence[socket.socket] = ()) -> Config:
    """Defaults, then --config FILE, then SOCKS5_USERS, then the command line; the addresses are those of the `passed`
    sockets, if there are any. Raises ConfigError."""
    values = read_file(args["config"]) if "config" in args else {}
    values.update(from_environment(os.environ))
    for item in options():
        if item.name in args:
            given = args[item.name]
            where = "/".join(item.metadata["flags"])
            values[item.name] = parse(item, given if isinstance(given, list) else [given], where)
    if passed:
        for name in {"listen", "port"} & set(values):
            raise ConfigError("--%s: systemd has opened the sockets; the addresses stand in its .socket unit" % name)
        found = [endpoint_of(sock.getsockname()) for sock in passed]
        values.update(listen=tuple(str(endpoint.ip) for endpoint in found), port=found[0].port)
    return Config(**values)


def read_file(path: str) -> Dict[str, Any]:
    """The options of an INI file. Raises ConfigError with the file, and the line where the parser knows it."""
    ini = configparser.ConfigParser(interpolation=None, default_section="")     # else [DEFAULT] would count for nothing
    try:
        with open_file("--config", path, "utf-8-sig", "strict") as file:    # Windows editors put a BOM in front
            ini.read_file(file)
    except OSError as exc:
        raise ConfigError("--config %s: %s" % (path, exc.strerror)) from None
    except UnicodeDecodeError:
        raise ConfigError("--config %s: not UTF-8" % path) from None
    except configparser.Error as exc:                       # its own words show the line, which may hold a password
        (line, *_), *_ = getattr(exc, "errors", None) or [[getattr(exc, "lineno", "?")]]
        raise ConfigError("--config %s:%s: %s" % (path, line, INI_ERRORS.get(type(exc), "not NAME = VALUE"))) from None
    known = {long_flag(item)[2:]: item for item in options()}
    values = {}
    for section in ini.sections():
        if section != SECTION:
            raise ConfigError("--config %s: [%s] is not a section of ours, [%s] is" % (path, section, SECTION))
        for name, text in ini[section].items():
            if name not in known:
                parser, flag = build_parser(), "--" + name
                raise ConfigError("--config %s: " % path + (
                    "%r is for the command line only" % name if flag in parser.flags() else
                    "no option is called %r%s" % (name, hint(parser, flag))))
            lines = [line for line in text.split("\n") if line] if known[name].metadata["many"] else [text]
            values[known[name].name] = parse(known[name], lines or [""], "%s: %s" % (path, name))
    return values


def serve(config: Config, passed: Sequence[socket.socket] = (), live: bool = False,
          read_again: Optional[Callable[[], Config]] = None) -> int:
    """Run until SIGTERM or SIGINT, drain; a second signal ends it at once. The exit status. `passed`: sockets that
    systemd has opened; `live`: a line on the terminal shows what is going on; read_again(): options for a reload."""
    save_address_space()
    try:
        access = files.read_access(config)                  # a bad file ends it here, before anything listens
        who = identity.look_up(config.run_as) if config.run_as else None
        listeners = list(passed) or listening.bind_all(config.listen, config.port)
        pages = listening.open_all(config.status[:1], config.status[1]) if config.status else []
        if who:                                             # a low port is bound; from here on what is opened is its
            become(who, config)
        tracing.check(config.trace)
        if not passed:
            listening.listen_all(listeners, listening.BACKLOG)
    except ConfigError as exc:
        return fail(str(exc))
    except OSError as exc:
        low = exc.errno == errno.EACCES and 0 < config.port < 1024
        why = (exc.strerror or str(exc.args[0])) + (low_port() if low else "")
        return fail("cannot listen on %s: %s" % (exc.filename, why) if exc.filename else "cannot start: %s" % why)
    except MemoryError:
        return fail("cannot start: out of memory")
    for warning in warnings(config, *access):
        logging.getLogger(__name__).warning(warning)

    def ready() -> None:                                    # a reader of this line may send a signal at once
        for listener in listeners:
            announce(config, "listening", "listening on %s", str(endpoint_of(listener.getsockname())))
        for page in pages:
            announce(config, "status", "status on %s", "http://%s/" % str(endpoint_of(page.getsockname())))
        announce(config, "admission", "clients: %s", admission(config))
        if colourful(sys.stdout):
            say("try it: " + first_command(config, endpoint_of(listeners[0].getsockname())))

    def remarks(access: files.Access) -> List[str]:
        return warnings(config, *access)

    count, notifier = workers.number(config.workers), Notifier(os.environ)
    shared, companion = Shared(count), None
    if pages or live:
        companion = beside.Status(config, shared, listeners, pages, sys.stderr.fileno() if live else None)
    if count > 1:
        supervisor = workers.Supervisor(config, listeners, count, access, notifier=notifier, companion=companion,
                                        shared=shared, read_config=read_again)
        supervisor.remarks = remarks
        return supervisor.run(ready)
    try:
        server = Server(config, listeners=listeners, access=access, counts=shared.row(0))
        alone = Alone(server, access, notifier, companion, read_again)
    except (RuntimeError, MemoryError, OSError) as exc:     # no thread, no memory, no descriptor
        return fail("cannot start: %s" % (exc or "out of memory"))
    alone.remarks = remarks
    return alone.run(ready)


def save_address_space() -> None:
    """Under `ulimit -v` (LimitAS= of systemd), have each thread take 1 MiB of it. It would be 8 MiB for its stack, and
    64 MiB more that glibc reserves for its memory; so at 200 MiB the third thread could not be started."""
    if resource is None or resource.getrlimit(resource.RLIMIT_AS)[0] == resource.RLIM_INFINITY:
        return
    threading.stack_size(STACK_BYTES)
    try:
        import ctypes                                       # here only: hardly a server needs it
        ctypes.CDLL(None).mallopt(M_ARENA_MAX, 1)
        ctypes.CDLL("libgcc_s.so.1")                        # glibc loads it to end a thread, and aborts if it cannot
    except (ImportError, OSError, AttributeError, MemoryError):     # not glibc
        pass


def low_port() -> str:
    """Words for the error that a port is reserved for root."""
    how = "start as root, with --run-as USER"
    if sys.platform == "linux":
        how += ", or allow this Python all low ports: setcap cap_net_bind_service=+ep %s" % os.path.realpath(
            sys.executable)
    return "; ports below 1024 are root's: %s" % how


def announce(config: Config, event: str, line: str, fact: str) -> None:
    """Print a line when the server is ready: text, or an object like those of the JSON log."""
    if config.log_format == "json":
        key = "clients" if event == "admission" else "where"
        said = FactsRecord(__name__, logging.INFO, "%s %s=%%(%s)s" % (event, key, key), Facts({key: fact}))
        say(logs.JsonFormatter().format(said))
    else:
        say(line % fact)


def become(who: identity.Identity, config: Config) -> None:
    """Give up root. Raises ConfigError."""
    try:
        identity.become(who)
        service_credentials(config)                         # the library reads the keytab for each client
    except OSError as exc:
        raise ConfigError("--run-as %s: %s" % (config.run_as, exc.strerror or exc)) from None
    except ConfigError as exc:
        raise ConfigError("--run-as %s: %s" % (config.run_as, exc)) from None
    trouble = identity.unreadable(config)
    if trouble:
        logging.getLogger(__name__).warning("--run-as %s: SIGHUP will not be able to read %s", config.run_as, trouble)


def first_command(config: Config, where: Endpoint) -> str:
    """What a newcomer types to see the proxy work."""
    host = where if not where.ip.is_unspecified else Endpoint(LOOPBACK[where.ip.version], where.port)
    user = "-U NAME:PASSWORD " if config.needs_password() else ""
    return "curl %s--socks5-hostname %s https://example.com/" % (user, str(host))


def check_out(addresses: Sequence[str]) -> None:
    """Raise ConfigError when an address of --out is not one of this machine."""
    for text in addresses:
        if text != SAME and not is_here(ip_address(text)):
            raise ConfigError("--out %s: not an address of this machine" % text)


def check_upstreams(config: Config) -> None:
    """Raise ConfigError when an upstream is this server itself, as far as that shows without a lookup, or needs a
    library that is not here."""
    for upstream in config.upstream:
        if upstream.service:
            need_gssapi("--upstream %s" % upstream.name)
        try:
            hosts = list(LOOPBACK.values()) if upstream.host == "localhost" else [ip_address(upstream.host)]
        except ValueError:                                  # a name
            continue
        if upstream.port == config.port and any(listens_at(config, host) for host in hosts):
            raise ConfigError("--upstream: %s is this server itself" % str(upstream))


def listens_at(config: Config, address: IP) -> bool:
    listened = [ip_address(text.partition("%")[0]) for text in config.listen]
    return address in listened or any(ip.is_unspecified for ip in listened) and is_here(address)


def self_test(config: Config) -> int:
    """The exit status."""
    good = True
    try:
        for line in selftest.run(config):
            say(line.text)
            good = good and line.good
    except (ConfigError, OSError) as exc:
        return fail(str(exc))
    return 0 if good else 1


def hash_password(flag: str, name: str, use: Callable[[str, str], str]) -> int:
    """Asks twice, without echo; or takes the password from one line of a pipe. Prints what `use` makes of the name and
    the line for the users file. The exit status."""
    try:
        if sys.stdin and sys.stdin.isatty():
            name = name or input("user name: ")
            password = getpass.getpass("password: ")
            if getpass.getpass("the same again: ") != password:
                return fail("%s: these are two passwords" % flag)
            typed = password.encode("utf-8", "surrogateescape")
        else:
            typed = sys.stdin.buffer.readline().rstrip(b"\r\n") if sys.stdin else b""
        say(use(name or "NAME", line_for(name or "NAME", typed)))
    except (ValueError, EOFError, KeyboardInterrupt) as exc:
        return fail("%s: %s" % (flag, exc if isinstance(exc, ValueError) else "nothing was typed"))
    return 0


def set_password(args: Dict[str, Any]) -> int:
    """The exit status."""
    try:
        given = args.get("users") or [read_file(args["config"]).get("users", "") if "config" in args else ""]
    except ConfigError as exc:
        return fail(str(exc))
    path = str(given[-1])
    if not path:
        return fail("--set-password: which file? it takes --users FILE")

    def use(name: str, line: str) -> str:
        done = "has a new password" if set_line(path, name, line) else "was added"
        return "%s: %s %s; a running server reads it on SIGHUP" % (path, name, done)

    return hash_password("--set-password", args["set_password"], use)


def say(line: str) -> None:
    """Print. A standard output that is closed or broken is no error."""
    try:
        print(line, flush=True)
    except (OSError, ValueError, AttributeError):
        pass


def fail(message: str) -> int:
    print("socks5-server: %s" % message, file=sys.stderr)
    return EXIT_USAGE


def main(argv: Optional[Sequence[str]] = None) -> int:
    """The command. Leaves the signals that a server obeys blocked: see Signals."""
    signals.hold()                                          # a SIGHUP that comes too early waits
    args = parse_args(argv)
    if not {"hash_password", "set_password", "check", "self_test"}.isdisjoint(args):
        signals.release()                                   # no server runs: Ctrl-C ends the process as usual
    if "hash_password" in args:
        return hash_password("--hash-password", args["hash_password"], lambda _name, line: line)
    if "set_password" in args:
        return set_password(args)
    try:
        passed = [] if {"check", "self_test"} & set(args) else passed_sockets(os.environ)
        config = read_config(args, passed)
        check_upstreams(config)
        check_out(config.out)
        beside.check(config)
        if "check" in args:
            if config.run_as:
                identity.look_up(config.run_as, to_become=False)
            say("\n".join(report(config)))
            return 0
    except (ConfigError, OSError) as exc:
        return fail(str(exc))
    testing = "self_test" in args
    level = (logging.DEBUG if "verbose" in args else logging.CRITICAL if testing else
             logging.WARNING if "quiet" in args else logging.INFO)
    screen = level == logging.INFO and sys.stderr is not None and sys.stderr.isatty()
    live = screen and not config.trace and colourful(sys.stderr)
    handler = logs.install(level, config.log_format, sys.stderr, os.environ.get("JOURNAL_STREAM", ""),
                           ERASE if live else b"", screen)
    try:
        if testing:
            return self_test(config)
        return serve(config, passed, live, partial(read_config, args, passed))
    finally:
        handler.close()                                     # writes what is queued
