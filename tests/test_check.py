"""check.py and --check: what would be served, with which login, what is open; and that nothing is listened on."""
import contextlib
import errno
import io
import os
import subprocess
import sys
import unittest
from ipaddress import ip_network
from unittest import mock

from socks5.access import passwords
from socks5.access.passwords import Hash
from socks5.access.check import report, warnings
from socks5.access.rules import Rules
from socks5.cli import main
from socks5.config import Config
from tests import support
from tests.support import PATIENCE_S, SCRIPT, connect_through, run_cli, spawned, taken_port, target

OPEN = "warning: open proxy: every client that reaches %s is let in without a password"


class Case(support.Case):
    def setUp(self):
        self.folder = self.new_folder()

    def write(self, name, *lines):
        path = self.folder / name
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return str(path)

    def command(self, *args):
        """Exit status, stdout and stderr of our command, run in this process."""
        with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
            return main(list(map(str, args))), out.getvalue(), err.getvalue()

    def users(self, *names):
        return self.write("users", *("%s:%s" % (name, Hash.of(b"secret", "pbkdf2", (1,))) for name in names))


class Report(Case):
    def test_lines(self):
        users = self.users("bob", "zo\u00eb")
        rules = self.write("rules", "# office", "allow from 10.0.0.0/8 to any", "deny user bob", "allow user eve")
        everywhere = {"listen": ("0.0.0.0",), "port": 1081}
        for name, options, present, absent in (
                ("plain", {}, ["would listen on 127.0.0.1:1080", "clients: programs on this machine",
                               "users: none, no password is required",
                               "rules: the default ones, the first that matches decides", "  deny to 169.254.0.0/16",
                               "  and what none of them matches is denied"], ["warning"]),
                ("addresses", {"listen": ("127.0.0.1", "::1", "fe80::1%eth0", "::"), "open": True},
                 ["would listen on 127.0.0.1:1080", "would listen on [::1]:1080", "would listen on [fe80::1%eth0]:1080",
                  "would listen on [::]:1080", "clients: every client that reaches these addresses",
                  OPEN % "[fe80::1%eth0]:1080, [::]:1080"], []),
                ("quotes", {"rules": self.write("quoted", 'allow   user "al b"  # he', 'deny user "#1" to any')},
                 ['  allow user "al b"', '  deny user "#1" to any'], [" he"]),
                ("ranges of ports", {"bind_ports": (5000, 5009), "udp_ports": (5000, 5010)},
                 ["BIND: 10 clients at a time by --bind-ports",
                  "UDP ASSOCIATE: 5 clients at a time by --udp-ports"], ["warning"]),
                ("any port", {"port": 0}, ["would listen on 127.0.0.1, any free port"], ["warning"]),
                ("open", dict(everywhere, open=True), [OPEN % "0.0.0.0:1081"], []),
                ("open by a rule",
                 dict(everywhere, open=True, rules=self.write("open", "deny port 25", "allow to any")),
                 [OPEN % "0.0.0.0:1081" + " (%s/open:2: allow to any)" % self.folder], []),
                ("open, but for a rule", dict(everywhere, open=True, rules=rules), [], ["open proxy"]),
                ("users", dict(everywhere, users=users, user=(("al", "x"),)),
                 ["users: only with a password: 'al', 'bob', 'zo\\xeb'"], ["warning", "secret"]),
                ("clients", dict(everywhere, allow_from=(ip_network("10.0.0.0/8"), ip_network("::1/128"))),
                 ["clients: only those at 10.0.0.0/8, ::1/128"], ["warning"]),
                ("clients from everywhere", dict(everywhere, open=True, allow_from=(ip_network("0.0.0.0/0"),)),
                 ["clients: only those at 0.0.0.0/0", OPEN % "0.0.0.0:1081"], []),
                ("rules", {"rules": rules, "users": users},
                 ["rules: %s, the first that matches decides" % rules, "  allow from 10.0.0.0/8 to any",
                  "warning: %s:4: there is no user 'eve'" % rules], ["user 'bob'", "open proxy", "office"])):
            lines = report(Config(**options))
            for line in present:
                with self.subTest(name, line=line):
                    self.assertIn(line, lines)
            for word in absent:
                with self.subTest(name, absent=word):
                    self.assertNotIn(word, "\n".join(lines))

    def test_a_thousand_users(self):
        users = report(Config(user=tuple(("u%03d" % number, "x") for number in range(1000))))[2]
        self.assertTrue(users.endswith("'u009' and 990 more"), users)


class CommandLine(Case):
    def test_0_and_nothing_listens(self):
        with taken_port() as port:
            status, out, err = run_cli("--check", "-p", port)
            self.assertEqual((status, out.split("\n")[0], err), (0, "would listen on 127.0.0.1:%d" % port, ""))

    def test_starting_one_is_warned_of_as_well(self):
        with spawned("-l", "0.0.0.0", "--open") as server:
            server.wait_line(r"WARNING open proxy: every client that reaches 0\.0\.0\.0, any free port is let in")

    def test_rules_for_no_user_are_warned_of_at_the_start(self):
        rules = self.write("rules", "deny user eve", "allow user alice")
        with spawned("-u", "alice:secret", "--rules", rules) as server:
            server.wait_line("WARNING %s:1: there is no user 'eve'" % rules)
            self.assertEqual(len([line for line in server.log if "no user" in line]), 1)

    def test_a_principal_need_not_be_in_the_users_file(self):
        path = self.write("rules", "deny user eve", "deny user eve@EXAMPLE.ORG")
        for gssapi, warned in (("", [1, 2]), ("any", [1])):
            with self.subTest(gssapi=gssapi):
                config = Config(rules=path, **({"gssapi": gssapi} if gssapi else {}))
                found = warnings(config, mock.Mock(names=frozenset()), Rules(config))
                self.assertEqual([line.split(": there is no user ")[0] for line in found],
                                 ["%s:%d" % (path, number) for number in warned])

    def test_2_and_the_error(self):
        bad_rules, bad_users = self.write("rules", "allow", "allow nobody"), self.write("users", "bob:secret")
        for name, args, why in (
                ("rules", ["--rules", bad_rules], bad_rules + ":2: 'nobody' is not a part of a rule"),
                ("users", ["--users", bad_users], bad_users + ":1: the part after the colon"),
                ("no file", ["--users", self.folder / "none"], "/none: No such file or directory"),
                ("an option", ["-p", "x"], "-p/--port: 'x' is not a port"),
                ("open, and not asked for", ["-l", "0.0.0.0"], "every client that reaches it could use this proxy"),
                ("an address of another machine", ["--out", "192.0.2.1"], "--out 192.0.2.1: not an address of this"),
                ("no such user", ["--run-as", "no-such-user"], "--run-as no-such-user: "),
                ("open by a rule", ["-l", "0.0.0.0", "--rules", self.write("open", "allow")],
                 "/open:1: lets in every client")):
            with self.subTest(name):
                outcome = self.command("--check", *args)
                self.check_refused(outcome, why)
                self.assertNotIn("secret", outcome[2])


class HashPassword(Case):
    """--hash-password, and that its line is let in."""

    def typing(self, typed, *args):
        """As command(), with a hash that is cheap."""
        pipe = io.TextIOWrapper(io.BytesIO(typed))
        with mock.patch.object(passwords, "SCRYPT_N", 2), mock.patch.object(sys, "stdin", pipe):
            return self.command(*args)

    def hash_password(self, *args, typed):
        return self.typing(typed, "--hash-password", *args)

    def test_a_line_from_a_pipe(self):
        cyrillic = "\u043f\u0430\u0440\u043e\u043b\u044c".encode()
        for name, args, typed, expected in (
                ("with a name", ["alice"], b"s3cret: of alice\n", ("alice", b"s3cret: of alice")),
                ("without one", [], b"secret\n", ("NAME", b"secret")),
                ("no newline", ["bob"], b"secret", ("bob", b"secret")),
                ("from Windows", ["bob"], b"secret\r\n", ("bob", b"secret")),
                ("one line only", ["bob"], b"secret\nmore\n", ("bob", b"secret")),
                ("spaces count", ["bob"], b" secret \n", ("bob", b" secret ")),
                ("any bytes", ["bob"], b"\xff\x80\n", ("bob", b"\xff\x80")),
                ("UTF-8", ["zo\u00eb"], cyrillic + b"\n", ("zo\u00eb", cyrillic))):
            with self.subTest(name):
                status, out, err = self.hash_password(*args, typed=typed)
                self.assertEqual((status, err, out.count("\n")), (0, "", 1))
                user, _, line = out.rstrip("\n").partition(":")
                self.assertEqual(user, expected[0])
                self.assertTrue(Hash.parse(line).matches(expected[1]))
                self.assertFalse(Hash.parse(line).matches(expected[1] + b"x"))

    def test_not_these(self):
        for name, user, typed in (("nothing", "bob", b""), ("an empty line", "bob", b"\n"),
                                  ("too long", "bob", b"x" * 256), ("a colon", "b:b", b"x\n"),
                                  ("a space", "b b", b"x\n"), ("a comment", "#b", b"x\n"),
                                  ("a long name", "b" * 256, b"x\n"), ("a newline", "b\nb", b"x\n")):
            with self.subTest(name):
                self.check_refused(self.hash_password(user, typed=typed), "--hash-password: a ")

    def test_no_two_lines_are_alike(self):
        self.assertEqual(len({self.hash_password("bob", typed=b"x")[1] for _ in range(2)}), 2)

    @unittest.skipUnless(hasattr(os, "fork"), "needs a terminal of its own")
    def test_on_a_terminal_twice_and_without_echo(self):
        import pty                                          # not everywhere
        for name, typed, status in (("the same", ["bob", "secret", "secret"], 0),
                                    ("two", ["bob", "secret", "Secret"], 2)):
            with self.subTest(name):
                fd, terminal = pty.openpty()
                child = subprocess.Popen([sys.executable, str(SCRIPT), "--hash-password"], stdin=terminal,
                                         stdout=terminal, stderr=terminal, start_new_session=True)
                os.close(terminal)
                shown = b""
                for prompt, line in zip((b"user name: ", b"password: ", b"again: "), typed):
                    while prompt not in shown:
                        shown += os.read(fd, 1000)
                    before, shown = shown, b""
                    os.write(fd, line.encode() + b"\n")
                try:
                    while True:
                        shown += os.read(fd, 1000)
                except OSError:                             # EIO: the other end is closed
                    pass
                os.close(fd)
                self.assertEqual(child.wait(PATIENCE_S), status)
                self.assertNotIn(b"ecret", before + shown)
                if not status:
                    user, _, line = shown.decode().strip().rpartition("\n")[2].partition(":")
                    self.assertEqual(user, "bob")
                    self.assertTrue(Hash.parse(line).matches(b"secret"))
                else:
                    self.assertIn(b"these are two passwords", shown)

    def set_password(self, name, typed, *more):
        return self.typing(typed, "--set-password", name, *more)

    def test_set_password_puts_one_line_into_the_file(self):
        path = self.folder / "users"
        for name, before, user, after in (
                ("no file", None, "alice", ["alice"]), ("an empty one", "", "alice", ["alice"]),
                ("one more", "# people\nbob:x\n", "alice", ["# people", "bob", "alice"]),
                ("no newline at the end", "bob:x", "alice", ["bob", "alice"]),
                ("replaced in its place", "bob:x\n# a\ncarol:y\n", "bob", ["bob", "# a", "carol"]),
                ("twice there", "bob:x\ncarol:y\n bob:z\n", "bob", ["bob", "carol"])):
            with self.subTest(name):
                line = str(Hash.of(b"old", "pbkdf2", (1,)))
                if before is None:
                    self.assertFalse(path.exists())
                else:
                    path.write_text(before.replace(":x", ":" + line).replace(":y", ":" + line))
                status, out, err = self.set_password(user, b"secret\n", "--users", path)
                self.assertEqual((status, err), (0, ""))
                self.assertIn("%s has a new password" % user if "%s:" % user in (before or "") else
                              "%s was added" % user, out)
                text = path.read_text()
                self.assertEqual([line.partition(":")[0] for line in text.split("\n")], [*after, ""][:len(after) + (
                    before != "bob:x")])
                found = {name: hashed for name, _, hashed in (line.partition(":") for line in text.splitlines())}
                self.assertTrue(Hash.parse(found[user]).matches(b"secret"))
                self.assertEqual([other for other in os.listdir(str(self.folder)) if other != "users"], [])

    @unittest.skipUnless(os.name == "posix", "modes of POSIX")
    def test_set_password_keeps_the_file_private(self):
        path = self.folder / "users"
        self.set_password("alice", b"a\n", "--users", path)
        self.assertEqual(path.stat().st_mode & 0o7777, 0o600)
        for before, after in ((0o644, 0o640), (0o640, 0o640), (0o660, 0o640), (0o400, 0o600)):
            with self.subTest("%o" % before):
                path.chmod(before)
                if not os.getuid():
                    os.chown(str(path), 65534, 65533)
                self.set_password("alice", b"b\n", "--users", path)
                self.assertEqual(path.stat().st_mode & 0o7777, after)
                if not os.getuid():
                    self.assertEqual((path.stat().st_uid, path.stat().st_gid), (65534, 65533))
        link = self.folder / "link"
        link.symlink_to("users")
        self.set_password("bob", b"c\n", "--users", link)
        self.assertTrue(link.is_symlink())
        self.assertEqual(len(path.read_text().splitlines()), 2)

    def test_set_password_changes_nothing_after_an_error(self):
        path = self.folder / "users"
        for name, text, user, typed, more, words in (
                ("a bad line", "bob\n", "alice", b"a\n", ["--users", path], "users:1: not NAME:HASH"),
                ("a bad name", "", "b:b", b"a\n", ["--users", path], "--set-password: a user name has"),
                ("no password", "", "bob", b"\n", ["--users", path], "--set-password: a password has"),
                ("no file named", "", "bob", b"a\n", [], "it takes --users FILE"),
                ("no folder", "", "bob", b"a\n", ["--users", path / "x" / "y"], "--users %s/x/y: " % path),
                ("a folder", "", "bob", b"a\n", ["--users", self.folder], "Is a directory"),
                ("a bad INI file", "", "bob", b"a\n", ["--config", self.write("ini", "port = 7")], "ini:1: ")):
            with self.subTest(name):
                path.write_text(text)
                self.check_refused(self.set_password(user, typed, *more), words)
                self.assertEqual(path.read_text(), text)

    def test_set_password_leaves_nothing_behind_on_a_full_disk(self):
        path = self.folder / "users"
        path.write_text("")
        with mock.patch.object(os, "replace", side_effect=OSError(errno.ENOSPC, "No space left on device")):
            self.check_refused(self.set_password("bob", b"a\n", "--users", path), "--users %s: No space left" % path)
        self.assertEqual((os.listdir(str(self.folder)), path.read_text()), (["users"], ""))

    def test_set_password_takes_the_file_of_the_ini_file(self):
        path = self.folder / "users"
        ini = self.write("ini", "[socks5]", "users = %s" % path)
        self.assertEqual(self.set_password("bob", b"a\n", "--config", ini)[0], 0)
        self.assertTrue(path.read_text().startswith("bob:"))

    def test_the_line_lets_in(self):
        line = run_cli("--hash-password", "alice", input="s3cret\n")[1]
        users = self.write("users", line.strip())
        with target() as destination, spawned("--users", users, "--handshake-timeout", "60") as server:
            connect_through(server.port, *destination, user=(b"alice", b"s3cret")).close()
            with self.assertRaises(AssertionError):
                connect_through(server.port, *destination, user=(b"alice", b"s3cre"))
