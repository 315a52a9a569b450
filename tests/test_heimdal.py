"""GSSAPI with Heimdal's library in place of MIT's, on both sides; the KDC and the other programs are MIT's."""
import contextlib
import ctypes
import os
import signal
from pathlib import Path
from unittest import mock

from socks5 import client
from socks5.access import gssapi
from socks5.access.users import Users
from socks5.client import Gssapi
from socks5.config import Config, ConfigError
from socks5.protocol.errors import GssError, ProxyError
from socks5.protocol.messages import Greeting, ProtectionLevel, SecurityToken
from tests import test_gssapi as mit
from tests.support import ROOT, dial, echoes, logging_of, need, read_to_end, reader_of, spawned, target
from tests.test_gssapi import ALICE, setUpModule      # noqa: F401: unittest calls it here, too

NAME = "libgssapi.so.3"
IN_EVERY_PYTHON = "from socks5.access import gssapi\ngssapi.LIBRARIES = (%r,)\n" % NAME


class Heimdal(mit.Case):
    def setUp(self):
        super().setUp()
        with contextlib.suppress(OSError):
            self.there = ctypes.CDLL(NAME)
        need(self, hasattr(self, "there"), "Heimdal's library (Debian: libgssapi3-heimdal)")
        gssapi.library.cache_clear()
        self.addCleanup(gssapi.library.cache_clear)
        self.enter(mock.patch.object(gssapi, "LIBRARIES", (NAME,)))
        self.assertTrue(gssapi.library().heimdal)


class Levels(Heimdal, mit.Levels):
    """The server and our client, at each level, over TCP and UDP."""


class Others(Heimdal, mit.Others):
    """MIT's clients at our server, and our client at Dante's server, which has MIT's library."""


class Refused(Heimdal):
    test_mutated_tokens = mit.Refused.test_mutated_tokens
    test_garbage_after_the_context_stands = mit.Refused.test_garbage_after_the_context_stands
    test_a_token_stays_as_it_is = mit.Library.test_a_token_stays_as_it_is
    token_at, SCRIPT = mit.Refused.token_at, mit.Refused.SCRIPT

    def test_a_login_that_was_recorded(self):
        """The library remembers none, and lets it in with a new key; the level is not wrapped with that."""
        credentials = gssapi.Credentials("", str(mit.ours.keytab))
        near, server = gssapi.Initiator("rcmd@localhost"), self.serve()
        token = near.step(b"")
        near.step(credentials.context().step(token))
        for level, words in ((b"\0", "the protection level is not wrapped: this may be a replay"),
                             (near.wrap(b"\0"), "gss_unwrap: ")):
            with self.subTest(words), logging_of(self) as logs, dial(server.server_address) as sock:
                read = reader_of(sock)
                sock.sendall(Greeting(b"\1").pack() + SecurityToken(token).pack())
                self.assertEqual(read(2), b"\5\1")
                SecurityToken.parse(read)
                sock.sendall(ProtectionLevel(level).pack())
                self.assertEqual(read_to_end(sock), b"\1\xff")
                logs.wait("ended=refused why='%s" % words)

    def test_without_mutual_authentication(self):
        """The key would be the client's, and a recorded message would be good again."""
        near = gssapi.Initiator("rcmd@localhost")
        near.wanted &= ~gssapi.MUTUAL
        far = gssapi.Credentials("", str(mit.ours.keytab)).context()
        with self.assertRaisesRegex(GssError, "may be a replay"):
            far.step(near.step(b""))

    def test_a_clock_that_is_wrong(self):
        """The library answers with its own time, and waits for another token."""
        token = self.token_at("+1h", mit.ours.login("alice"))
        context = gssapi.Credentials("", str(mit.ours.keytab)).context()
        self.assertTrue(context.step(token))
        self.assertFalse(context.done)

    def test_words(self):
        with self.assertRaisesRegex(GssError, r"^gss_accept_sec_context: A token was invalid$"):
            gssapi.Credentials("", str(mit.ours.keytab)).context().step(b"x")
        near, far = mit.pair()
        near.wrap(b"1")
        with self.assertRaisesRegex(GssError, "^gss_unwrap: a message that is not the next one$"):
            far.unwrap(near.wrap(b"2"))

    def test_keytabs(self):
        folder = self.new_folder()
        (folder / "empty").write_bytes(b"")
        (folder / "empty").chmod(0o600)
        for options in (dict(gssapi="any", keytab=str(folder / "empty")),
                        dict(gssapi="sockd@localhost", keytab=str(mit.ours.keytab))):
            with self.subTest(str(options)), self.assertRaisesRegex(ConfigError, r"^--keytab .*: gss[a-z5_]+: .+$"):
                Users(Config(**options))


class Process(Heimdal):
    def test_several_workers_and_reload(self):
        """There, the library keeps one keytab for the whole process."""
        folder = self.new_folder()
        (folder / "sitecustomize.py").write_text(IN_EVERY_PYTHON)
        env = {**mit.ours.environment, "PYTHONPATH": os.pathsep.join((str(folder), str(ROOT)))}
        keytab, other = folder / "keytab", folder / "other"
        keytab.write_bytes(mit.ours.keytab.read_bytes())
        keytab.chmod(0o600)
        destination = self.enter(target())
        server = self.enter(spawned("--gssapi", "--keytab", keytab, "-w", "2", env=env))

        def works(service):
            with client.connect(("127.0.0.1", server.port), destination, gssapi=Gssapi(service)) as sock:
                return echoes(sock)

        self.assertTrue(all(works("rcmd@localhost") for _ in range(8)))
        self.assertIn(NAME, Path("/proc/%d/maps" % server.process.pid).read_text())
        mit.ours.principal("heimdal/localhost", keytab=other)
        keytab.write_bytes(other.read_bytes())
        server.signal(signal.SIGHUP)
        server.wait_line("reloaded users=0")
        self.assertTrue(all(works("heimdal@localhost") for _ in range(8)))
        self.assertRaises(ProxyError, works, "rcmd@localhost")
        server.wait_line("user='%s'" % ALICE.decode())
