"""cli.py: the command line, environment and INI file become a Config, or one line on stderr for an error.

Most tests run main([...]) in this process; the others start server processes.
"""
import contextlib
import ctypes
import io
import json
import logging
import os
import random
import re
import signal
import socket
import sys
import unittest
from pathlib import Path
from unittest import mock

from socks5 import cli
from socks5.config import Config, ConfigError, long_flag, options
from tests import support
from tests.test_config import SAMPLES, WRONG

ANY_USER = "alice:secret"
README = support.ROOT / "README.rst"


class StopWhenListening(io.StringIO):
    """Standard output that ends the server, as an administrator would, as soon as it says that it listens."""

    def write(self, text):
        done = super().write(text)
        if "listening on" in text or '"listening"' in text:
            signal.raise_signal(signal.SIGTERM)
        return done


@contextlib.contextmanager
def as_it_was():
    """What main() changes in this process is put back."""
    log = logging.getLogger("socks5")
    before = log.handlers[:], log.propagate, log.level
    names = [name for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGCHLD") if hasattr(signal, name)]
    signals = {name: signal.getsignal(getattr(signal, name)) for name in names}
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, ()) if hasattr(signal, "pthread_sigmask") else ()
    try:
        yield
    finally:
        for name, action in signals.items():
            signal.signal(getattr(signal, name), action)
        if hasattr(signal, "pthread_sigmask"):
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        log.handlers[:], log.propagate = before[:2]
        log.setLevel(before[2])


def main(*argv, **environ):
    """main(argv) in this process: (exit status, stdout, stderr). A server that comes to listen is ended at once."""
    with as_it_was(), contextlib.redirect_stdout(StopWhenListening()) as out, \
            contextlib.redirect_stderr(io.StringIO()) as err, mock.patch.dict(os.environ, environ):
        if "SOCKS5_USERS" not in environ:
            os.environ.pop("SOCKS5_USERS", None)
        try:
            status = cli.main(list(map(str, argv)))
        except SystemExit as exc:
            status = exc.code
    return status, out.getvalue(), err.getvalue()


def config_of(*argv):
    return cli.read_config(vars(cli.build_parser().parse_args(list(map(str, argv)))))


class Case(support.Case):
    def setUp(self):
        self.folder = self.new_folder()
        self.enter(mock.patch.dict(os.environ))
        os.environ.pop("SOCKS5_USERS", None)

    def ini(self, text, section="[socks5]\n"):
        """The path of a file with these options."""
        path = self.folder / "options.ini"
        path.write_bytes((section + text).encode() if isinstance(text, str) else text)
        return str(path)


class Help(Case):
    def test_every_option_with_its_default(self):
        status, out, err = main("--help", COLUMNS="200")
        self.assertEqual((status, err), (0, ""))
        for item in options():
            with self.subTest(item.name):
                for flag in item.metadata["flags"]:
                    self.assertRegex(out, r"(?m)^ .*%s\b" % re.escape(flag))
                self.assertIn(item.metadata["help"] + cli.default_words(item.default), " ".join(out.split()))
        for flag in ("--config", "--verbose", "--quiet", "--version", "-v", "-q"):
            with self.subTest(flag):
                self.assertIn(flag, out)
        self.assertNotIn("(default )", out)
        self.assertNotIn("==SUPPRESS==", out)

    def test_default_words(self):
        for default, words in ((False, ""), ((), ""), ("", ""), (0, " (default 0)"), (1080, " (default 1080)"),
                               (3600.0, " (default 3600)"), (0.5, " (default 0.5)"),
                               (("127.0.0.1", "::1"), " (default 127.0.0.1 ::1)")):
            with self.subTest(repr(default)):
                self.assertEqual(cli.default_words(default), words)


class Faces(Case):
    """An option means the same on the command line and in the file, under the same name."""

    def test_every_option_both_ways(self):
        for item in options():
            text, value = SAMPLES[item.metadata["kind"]]
            value = (value,) if item.metadata["many"] else value
            needs = {"open": True} if item.name == "proxy_protocol" else {}      # or it is refused as an open proxy
            self.assertNotEqual(value, item.default, "a sample must not be a default")
            expected = Config(**{item.name: value}, **needs)
            given = [] if item.metadata["kind"] is bool else [text]
            for flag in item.metadata["flags"]:
                with self.subTest(flag):
                    self.assertEqual(config_of(flag, *given, *["--open"] * len(needs)), expected)
            lines = ["%s = %s" % (long_flag(item)[2:], text), *["open = yes"] * len(needs)]
            with self.subTest("%s in the file" % item.name):
                self.assertEqual(config_of("--config", self.ini("\n".join(lines))), expected)

    def test_forms_of_the_command_line(self):
        for argv, port in ((["-p", "7"], 7), (["-p7"], 7), (["--port", "7"], 7), (["--port=7"], 7),
                           (["-p", "8", "-p", "7"], 7)):
            with self.subTest(" ".join(argv)):
                self.assertEqual(config_of(*argv).port, port)

    def test_several(self):
        both = (("alice", "secret"), ("bob", "x:y z"))
        self.assertEqual(config_of("-u", "alice:secret", "--user", "bob:x:y z").user, both)
        for name, text in (("on the next lines", "user =\n  alice:secret\n  bob:x:y z\n"),
                           ("from the first line on", "user = alice:secret\n  bob:x:y z\n"),
                           ("an empty line between", "user =\n\talice:secret\n\n\tbob:x:y z\n\n"),
                           ("a comment between", "# who\nuser =\n  alice:secret\n  # and\n  bob:x:y z\n"),
                           ("line ends of Windows", "user =\r\n  alice:secret\r\n  bob:x:y z\r\n")):
            with self.subTest(name):
                self.assertEqual(config_of("--config", self.ini(text)).user, both)

    def test_forms_of_the_file(self):
        for name, raw, port in (("colon", "[socks5]\nport: 7", 7), ("capitals", "[socks5]\nPort = 7", 7),
                                ("nothing", "", 1080), ("section only", "[socks5]\n", 1080),
                                ("comments", "; a\n[socks5]\n# port = 8\nport = 7\n", 7),
                                ("byte order mark", "\ufeff[socks5]\nport = 7\n", 7)):
            with self.subTest(name):
                self.assertEqual(config_of("--config", self.ini(raw.encode())).port, port)

    def test_a_percent_sign_is_one(self):
        password = "100%%(port)s"
        self.assertEqual(config_of("--config", self.ini("user = alice:" + password)).user, (("alice", password),))

    def test_names_are_not_abbreviated(self):
        self.check_refused(main("--max-s", "7"), "--max-s")


class Precedence(Case):
    def test_default_then_file_then_environment_then_command_line(self):
        path = self.ini("port = 7\nuser = file:f\nidle-timeout = 7\n")
        self.assertEqual(config_of("--config", path), Config(port=7, user=(("file", "f"),), idle_timeout=7.0))
        os.environ["SOCKS5_USERS"] = "env:e,env2:e"
        self.assertEqual(config_of().user, (("env", "e"), ("env2", "e")))
        self.assertEqual(config_of("--config", path),
                         Config(port=7, user=(("env", "e"), ("env2", "e")), idle_timeout=7.0))
        self.assertEqual(config_of("--config", path, "-u", "argv:a", "-p", "8"),
                         Config(port=8, user=(("argv", "a"),), idle_timeout=7.0))
        self.assertEqual(config_of("-p", "8", "--config", path).port, 8, "wherever --config stands")

    def test_an_empty_environment_keeps_the_users_of_the_file(self):
        os.environ["SOCKS5_USERS"] = ""
        self.assertEqual(config_of("--config", self.ini("user = file:f")).user, (("file", "f"),))

    def test_what_the_command_line_gives_replaces_the_files_list(self):
        path = self.ini("listen =\n  127.0.0.1\n  ::1\n")
        self.assertEqual(config_of("--config", path, "-l", "127.0.0.2").listen, ("127.0.0.2",))

    def test_the_file_may_open_what_the_command_line_listens_on(self):
        path = self.ini("open = yes\n")
        self.assertEqual(config_of("--config", path, "-l", "0.0.0.0").listen, ("0.0.0.0",))
        self.assertRaises(ConfigError, config_of, "--config", self.ini("open = no\n"), "-l", "0.0.0.0")


class Refusals(Case):
    def test_every_option_with_a_wrong_value(self):
        for item in options():
            if item.metadata["kind"] is bool:
                continue
            flags = item.metadata["flags"]
            for text in WRONG[item.metadata["kind"]]:
                for flag in flags:
                    with self.subTest(flag, text=text[:20]):
                        argv = ["%s=%s" % (flag, text)] if flag.startswith("--") else [flag, text]
                        if flag.startswith("--") or not text.startswith("-"):
                            self.check_refused(main(*argv), "/".join(flags))

    def test_every_option_with_a_wrong_value_in_the_file(self):
        for item in options():
            for text in WRONG[item.metadata["kind"]]:
                with self.subTest(item.name, text=text[:20]):
                    path = self.ini("%s = %s" % (long_flag(item)[2:], text))
                    self.check_refused(main("--config", path), "%s: %s: " % (path, long_flag(item)[2:]))

    def test_command_line(self):
        for argv, words in ((["--nonsense"], "--nonsense"), (["stray"], "stray"), (["-p"], "-p/--port"),
                            (["--open=yes"], "--open"), (["-x"], "-x"), (["two\nlines"], "two lines"),
                            (["-u", "a:b", "-u", "a:c"], "--user"), (["--config"], "--config")):
            with self.subTest(" ".join(argv)):
                self.check_refused(main(*argv), words)

    def test_environment(self):
        self.check_refused(main(SOCKS5_USERS="s3cret"), "SOCKS5_USERS")
        self.assertNotIn("s3cret", "".join(map(str, main(SOCKS5_USERS="s3cret"))))

    def test_file(self):
        for name, raw, words in (
                ("no section", b"port = 7\n", ":1: "),
                ("another section", b"[socks]\nport = 7\n", "[socks] "),
                ("a second section", b"[socks5]\nport = 7\n[more]\n", "[more] "),
                ("DEFAULT is not ours", b"[DEFAULT]\nport = 7\n", "[DEFAULT] "),
                ("unknown option", b"[socks5]\nprot = 7\n", "no option is called 'prot'; did you mean --port?"),
                ("of the command line", b"[socks5]\nquiet = yes\n", "'quiet' is for the command line only"),
                ("underscore", b"[socks5]\nmax_sessions = 7\n", "'max_sessions'"),
                ("no value", b"[socks5]\nport = 7\n\nopen\n", ":4: "),
                ("twice", b"[socks5]\nport = 7\nport = 8\n", ":3: "),
                ("section twice", b"[socks5]\nport = 7\n[socks5]\n", ":3: "),
                ("two lines for one value", b"[socks5]\nport = 7\n  8\n", ": port: "),
                ("starts indented", b"  port = 7\n[socks5]\n", ":1: "),
                ("Latin-1", b"[socks5]\nuser = j\xfcrgen:x\n", "not UTF-8"),
                ("UTF-16", "[socks5]\nport = 7\n".encode("utf-16"), "not UTF-8"),
                ("NUL", b"\0" * 100, ":1: "),
                ("bytes", bytes(range(128)) * 10, ""),
                ("a program", b"\x7fELF\x02\x01\x01\x00" + bytes(100) + b"\xff\xfe", "")):
            with self.subTest(name):
                path = self.ini(raw)
                self.check_refused(main("--config", path, "-p", "0"), path, words)

    def test_file_that_cannot_be_read(self):
        for name, path in (("missing", self.folder / "none.ini"), ("a folder", self.folder), ("no name", "")):
            with self.subTest(name):
                self.check_refused(main("--config", path), "--config %s: " % path)

    def test_other_files(self):
        missing = self.folder / "none"
        for flag in ("--users", "--rules"):
            with self.subTest(flag):
                self.check_refused(main(flag, missing, "-p", "0"), flag, str(missing))

    def test_a_password_in_a_garbled_file_is_not_shown(self):
        for name, raw in (("no section", "user = alice:s3cret"), ("no equals sign", "[socks5]\nuser alice s3cret"),
                          ("no name", "[socks5]\nuser = s3cret"), ("a line of its own", "[socks5]\ns3cret"),
                          ("twice", "[socks5]\nuser = alice:s3cret\nuser = bob:s3cret"),
                          ("a name twice", "[socks5]\nuser =\n alice:s3cret\n alice:s3cret"),
                          ("not indented", "[socks5]\nuser =\nalice:s3cret")):
            with self.subTest(name):
                outcome = main("--config", self.ini(raw.encode()), "-p", "0")
                self.check_refused(outcome)
                self.assertNotIn("s3cret", outcome[2])

    def test_garbage_in_a_file_raises_nothing_else(self):
        seeded = random.Random(2024)
        good = "[socks5]\nlisten =\n  127.0.0.1\n  ::1\nport = 1080\nuser = alice:secret\nopen = no\n# end\n"
        bends = ["", "\n", "[", "]", "=", "\n ", "%", ":", "\0", "\u20ac", "\r"]
        outcomes = set()
        for number in range(1500):
            text = list(good)
            for _ in range(seeded.randrange(1, 6)):
                at = seeded.randrange(len(text))
                text[at:at + seeded.randrange(4)] = seeded.choice(bends)
            path = self.ini("".join(text).encode())
            try:
                outcomes.add(type(cli.read_file(path)))
            except ConfigError as exc:
                outcomes.add(ConfigError)
                self.assertIn(path, str(exc))
                self.assertNotIn("\n", str(exc), (number, "".join(text)))
            except Exception as exc:
                self.fail("%r from file %d: %r" % (exc, number, "".join(text)))
        self.assertEqual(outcomes, {dict, ConfigError})


class Hints(Case):
    """A slip that many make is answered with what is right."""

    def test_of_the_command_line(self):
        for argv, words in ((["-l", "127.0.0.1:22080"], "-l 127.0.0.1 -p 22080"),
                            (["-l", "localhost:80"], "-l localhost -p 80"), (["-l", "[::1]:80"], "-l ::1 -p 80"),
                            (["-l", "example.com"], "not an IP address, nor localhost"), (["22080"], ": -p 22080"),
                            (["--prot", "1"], "did you mean --port?"), (["--prot=1"], "did you mean --port?"),
                            (["-w", "100000"], "from 0 (auto) to 256")):
            with self.subTest(" ".join(argv)):
                self.check_refused(main(*argv), words)

    def test_no_hint_where_nothing_is_like_it(self):
        for argv, words in ((["--zzzzzzz"], "unrecognized arguments: --zzzzzzz\n"), (["-l", "1.2"], "localhost\n")):
            with self.subTest(" ".join(argv)):
                self.check_refused(main(*argv), words)

    def test_localhost(self):
        self.assertEqual(config_of("-l", "localhost").listen, ("127.0.0.1",))

    def test_a_port_that_is_reserved_for_root(self):
        first = Path("/proc/sys/net/ipv4/ip_unprivileged_port_start")
        support.need(self, first.exists() and int(first.read_text()) > 80, "a Linux that reserves low ports")

        def drop():
            if not os.geteuid():
                ctypes.CDLL(None).prctl(24, 10, 0, 0, 0)        # PR_CAPBSET_DROP, CAP_NET_BIND_SERVICE
        self.check_refused(support.run_python(support.SCRIPT, "-p", "80", preexec_fn=drop),
                           "cannot listen on 127.0.0.1 port 80: ", "--run-as USER",
                           "setcap cap_net_bind_service=+ep " + os.path.realpath(sys.executable))


class Reloading(Case):
    """What an administrator is told on SIGHUP beside `reloaded`."""

    def test_options_that_need_a_restart_and_rules_for_no_user(self):
        rules = self.folder / "rules"
        rules.write_text("deny user eve\n")
        path = self.ini("rules = %s\nuser = alice:secret\n" % rules)
        with support.spawned("--config", path, "--idle-timeout", "7") as server:
            server.wait_line("WARNING .*rules:1: there is no user 'eve'")
            rules.write_text("deny user mallory\n")
            self.ini("rules = %s\nuser = alice:hidden\nmax-per-client = 9\nidle-timeout = 8\n" % rules)
            server.signal(signal.SIGHUP)
            server.wait_line("reloaded users=1 rules=1 pid=%d" % server.process.pid)
            server.wait_line("WARNING --user: its change takes a restart$")
            server.wait_line("WARNING --max-per-client: its change takes a restart$")
            server.wait_line("WARNING .*rules:1: there is no user 'mallory'")
            self.ini("port = x\n")
            server.signal(signal.SIGHUP)
            server.wait_line("ERROR not reloaded, users and rules stay as they were: .*options.ini: port: 'x' is not ")
            self.assertEqual([line for line in server.log if "hidden" in line or "--idle-timeout" in line], [])

    def test_nothing_has_changed(self):
        with support.spawned("--config", self.ini("max-per-client = 9\n")) as server:
            server.signal(signal.SIGHUP)
            server.wait_line("reloaded users=0")
            server.signal(signal.SIGUSR1)               # obeyed after it
            server.wait_line("live sessions=0 pid=%d" % server.process.pid)
            self.assertEqual([line for line in server.log if "WARNING" in line], [])


class Beyond(Case):
    """What others can reach asks for users, or for being told."""

    def test_refused_with_the_command_that_would_be_right(self):
        for listen in ("0.0.0.0", "::", "192.0.2.1"):
            with self.subTest(listen):
                self.check_refused(main("-l", listen, "-p", "1234"),
                                   "python3 socks5_server.py -l %s -p 1234 -u NAME:PASSWORD" % listen, "--open")
        self.check_refused(main("--config", self.ini("listen = 0.0.0.0")), "--listen 0.0.0.0")
        self.check_refused(main("-l", "127.0.0.1", "-l", "0.0.0.0"), "--listen 0.0.0.0")

    def test_served_with_users_or_when_told(self):
        for name, argv, environ in (("told", ["--open"], {}), ("user", ["-u", ANY_USER], {}),
                                    ("environment", [], {"SOCKS5_USERS": ANY_USER})):
            with self.subTest(name):
                status, out, err = main("-l", "0.0.0.0", "-p", "0", *argv, **environ)
                self.assertEqual(status, 0, err)
                self.assertRegex(out, r"\Alistening on 0\.0\.0\.0:[1-9]\d*\n"
                                      r"clients: every client that reaches these addresses; %s is required\n\Z"
                                 % ("no password" if name == "told" else "a password"))


class Serving(Case):
    def test_says_where_it_listens_and_ends_on_a_signal(self):
        for workers in ("1", "2"):
            status, out, _ = main("-p", "0", "-w", workers)
            self.assertEqual(status, 0)
            self.assertRegex(out, r"\Alistening on 127\.0\.0\.1:[1-9]\d*\n"
                                  r"clients: programs on this machine; no password is required\n\Z")

    def test_the_same_as_json(self):
        status, out, err = main("-p", "0", "--log-format", "json", "--allow-from", "192.0.2.0/24", "-u", ANY_USER,
                                "--status", "127.0.0.1:0")
        self.assertEqual(status, 0, err)
        listening, page, admission = map(json.loads, out.splitlines())
        self.assertEqual([said["event"] for said in (listening, page, admission)], ["listening", "status", "admission"])
        self.assertRegex(listening["where"], r"\A127\.0\.0\.1:[1-9]\d*\Z")
        self.assertRegex(page["where"], r"\Ahttp://127\.0\.0\.1:[1-9]\d*/\Z")
        self.assertEqual(admission["clients"], "only those at 192.0.2.0/24; a password is required")

    def test_what_cannot_be_listened_on(self):
        with support.taken_port() as port:
            for argv, words in ((["-l", "192.0.2.1", "--open", "-p", "0"], "192.0.2.1 port 0: "),
                                (["-p", port], "127.0.0.1 port %d: Address already in use\n" % port),
                                *[(["-l", "fe80::1%nosuchif", "--open", "-p", "0"], "fe80::1%nosuchif port 0: ")]
                                * support.HAS_IPV6):
                with self.subTest(argv):
                    outcome = main(*argv)
                    self.check_refused(outcome, "cannot listen on " + words)
                    self.assertNotIn("None", outcome[2])

    def test_how_much_is_logged(self):
        for argv, level in (([], logging.INFO), (["-v"], logging.DEBUG), (["--verbose"], logging.DEBUG),
                            (["-q"], logging.WARNING), (["--quiet"], logging.WARNING)):
            levels = []

            def serve(config, *_others):
                levels.append(logging.getLogger("socks5").getEffectiveLevel())
                return 0
            with self.subTest(argv), mock.patch.object(cli, "serve", serve):
                self.assertEqual(main(*argv)[0], 0)
                self.assertEqual(levels, [level])

    def test_the_root_logger_stays_as_it_was_and_hears_nothing(self):
        root, heard, level = logging.getLogger(), [], logging.getLogger().level
        listener = logging.Handler()
        listener.emit = heard.append
        root.addHandler(listener)
        self.addCleanup(root.removeHandler, listener)
        self.addCleanup(root.setLevel, level)
        root.setLevel(logging.ERROR)

        def serve(config, *_others):
            logging.getLogger("socks5.server.server").error("one line")
            return 0
        with mock.patch.object(cli, "serve", serve):
            status, out, err = main("-v")
        self.assertEqual((status, out, err.count("one line")), (0, "", 1))
        self.assertEqual((root.level, heard), (logging.ERROR, []))

    def test_say_survives_a_closed_output(self):
        closed = io.StringIO()
        closed.close()
        for name, stream in (("closed", closed), ("none", None)):
            with self.subTest(name), contextlib.redirect_stdout(stream):
                cli.say("listening on nothing")


class Processes(Case):
    """As people start it."""

    def log_of_a_session(self, *argv):
        """What is written on stderr around one session, the server's end included."""
        with support.target() as (host, port), support.spawned(*argv) as server:
            with support.connect_through(server.port, host, port) as client:
                client.sendall(b"x")
                client.shutdown(socket.SHUT_WR)
                self.assertEqual(support.read_to_end(client), b"x")
            self.assertEqual(server.end(), 0)
            return server.log, port

    def test_one_line_for_a_session(self):
        log, port = self.log_of_a_session()
        sessions = [line for line in log if "session client=" in line]
        self.assertEqual(len(sessions), 1, log)
        self.assertRegex(sessions[0], r" INFO session client=127\.0\.0\.1:\d+ .*cmd=CONNECT dst=127\.0\.0\.1:%d "
                         % port)
        self.assertEqual(sum(" DEBUG " in line for line in log), 0, log)

    def test_quiet(self):
        self.assertEqual(self.log_of_a_session("-q")[0], [])

    def test_verbose_tells_the_steps(self):
        log, port = self.log_of_a_session("-v")
        steps = "\n".join(line for line in log if " DEBUG " in line)
        self.assertIn("127.0.0.1:%d" % port, steps, log)
        self.assertEqual(sum(" INFO session client=" in line for line in log), 1, log)

    def test_serves_when_standard_output_fails(self):
        support.need(self, os.path.exists("/dev/full"), "/dev/full")
        port = support.closed_port()
        server = support.Spawned("-p", str(port), prefix=("sh", "-c", 'exec "$@" >/dev/full', "sh"))
        try:
            def answers():
                with contextlib.suppress(OSError), support.greeted(port):
                    return True
            support.wait_until(lambda: server.process.poll() is not None or answers(), "a server that serves")
            self.assertIsNone(server.process.poll(), server.log)
        finally:
            server.end(signal.SIGKILL)


# The rest of a line behind a program that is not ours has that program's flags.
FOREIGN = re.compile(r"\b(make|useradd|systemd-analyze|curl|wget|git|ncat|pip|pip3|npm|docker|ssh|systemctl|openssl"
                     r"|chromium|google-chrome|firefox|python3?\s+-m\s+(?!socks5\b)\w+)\b[^\n`|]*")
FLAG = re.compile(r"(?<![\w-])--[a-z][a-z0-9-]*")


class Readme(unittest.TestCase):
    """The table of options is the third face of config.py."""

    def setUp(self):
        self.assertTrue(README.exists(), "README.rst is missing")
        self.text = README.read_text(encoding="utf-8")
        self.lines = self.text.splitlines()

    def test_every_option_with_its_default(self):
        for item in options():
            flag, default = long_flag(item), cli.default_words(item.default)[len(" (default "):-1]
            rows = ["\n".join(self.lines[at:at + 3])
                    for at, line in enumerate(self.lines) if flag in FLAG.findall(line)]
            with self.subTest(flag):
                self.assertTrue(rows, "%s is not in README.rst" % flag)
                self.assertTrue(any(re.search(r"(?<![\w.])%s(?![\w]|\.\d)" % re.escape(default), row) for row in rows),
                                "%s is there without its default %s" % (flag, default))

    def test_every_other_flag_of_the_command_line(self):
        for action in cli.build_parser()._actions:
            for flag in action.option_strings:
                if flag.startswith("--"):
                    with self.subTest(flag):
                        self.assertIn(flag, FLAG.findall(self.text))

    def test_names_no_flag_that_does_not_exist(self):
        ours = {flag for action in cli.build_parser()._actions for flag in action.option_strings}
        text = FOREIGN.sub("", self.text.replace("\\\n", " "))
        self.assertEqual(sorted(set(FLAG.findall(text)) - ours), [])
