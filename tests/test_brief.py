"""brief.py: a session in a short line, for people at a terminal. tests/test_status.py starts a server on one."""
import logging
import time
import unittest
from ipaddress import ip_address

from socks5 import log
from socks5.brief import session
from socks5.net.addresses import Endpoint
from socks5.protocol.codes import Cmd, Rep
from socks5.protocol.facts import Facts, FactsRecord, template
from socks5.protocol.messages import Address
from tests.support import address, time_zone

CLIENT = Endpoint(ip_address("192.0.2.7"), 4711)


def facts(**others):
    return Facts({**dict(client=CLIENT, user=None, cmd=Cmd.CONNECT.word, dst=address("example.com", 443), reached=None,
                         rep=Rep.SUCCEEDED.word, up=0, down=0, seconds=3.44, ended="client", why=""), **others})


class Sessions(unittest.TestCase):
    def test_in_few_words(self):
        for expected, others in (
                ("192.0.2.7 -> example.com:443 ok 3.4 s", {}),
                ("alice -> example.com:443 ok 2.1 MB 3.4 s", dict(user=b"alice", up=1000000, down=1100000)),
                ("192.0.2.7 -> [2001:db8::1]:80 ok 3.4 s", dict(dst=address("2001:db8::1", 80))),
                ("192.0.2.7 -> example.com:443 ok 5 B 3.4 s, idle", dict(up=5, ended="idle")),
                ("192.0.2.7 -> example.com:443 connection refused 3.4 s: 192.0.2.1 ECONNREFUSED",
                 dict(rep=Rep.CONNECTION_REFUSED.word, ended="refused", why="192.0.2.1 ECONNREFUSED")),
                ("192.0.2.7 BIND 0.0.0.0:0 ttl expired 3.4 s",
                 dict(cmd=Cmd.BIND.word, dst=address("0.0.0.0", 0), rep=Rep.TTL_EXPIRED.word, ended="refused")),
                ("192.0.2.7 UDP 0.0.0.0:0 ok 7 B 3.4 s",
                 dict(cmd=Cmd.UDP_ASSOCIATE.word, dst=address("0.0.0.0", 0), down=7)),
                ("eve no request 3.4 s: wrong user name or password",
                 dict(user=b"eve", cmd=None, dst=None, rep="", ended="refused", why="wrong user name or password")),
                ("192.0.2.7 no request 3.4 s, handshake-timeout",
                 dict(cmd=None, dst=None, rep="", ended="handshake-timeout"))):
            with self.subTest(expected):
                self.assertEqual(session(facts(**others)), expected)

    def test_what_a_peer_chose_forges_nothing(self):
        for expected, others in (
                ("'al ice' -> example.com:443 ok 3.4 s", dict(user=b"al ice")),
                ("'a\\n12:00:00 b' -> example.com:443 ok 3.4 s", dict(user=b"a\n12:00:00 b")),
                ("192.0.2.7 -> 'a:1 ok 1 B':443 ok 3.4 s", dict(dst=Address(b"a:1 ok 1 B", 443))),
                ("192.0.2.7 -> '\\x1b[2J':443 ok 3.4 s", dict(dst=Address(b"\x1b[2J", 443)))):
            with self.subTest(expected):
                self.assertEqual(session(facts(**others)), expected)


class Lines(unittest.TestCase):
    def line(self, record, **options):
        return log.formatter("text", None, "", **options).format(record)

    def test_only_where_asked_for(self):
        record = FactsRecord("socks5.x", logging.INFO, template("session", facts()), facts())
        clock = time.strftime("%H:%M:%S", time.localtime(record.created))
        self.assertEqual(self.line(record, brief=True), clock + " 192.0.2.7 -> example.com:443 ok 3.4 s")
        self.assertIn(" INFO session client=192.0.2.7:4711 user=- ", self.line(record))
        self.assertTrue(log.formatter("json", None, "", brief=True).format(record).startswith("{"))

    @unittest.skipUnless(hasattr(time, "tzset"), "no tzset")
    def test_local_time(self):
        record = FactsRecord("socks5.x", logging.INFO, template("session", facts()), facts())
        record.created = 1700000000.25
        with time_zone("XXX-5:30"):
            self.assertRegex(self.line(record, brief=True), r"\A03:43:20 192\.0\.2\.7 -> ")

    def test_other_lines(self):
        record = FactsRecord("socks5.x", logging.WARNING, "auth_failed client=%(client)s", Facts(client=CLIENT))
        self.assertRegex(self.line(record, brief=True),
                         r"\A\d\d:\d\d:\d\d WARNING auth_failed client=192\.0\.2\.7:4711\Z")
        record = logging.LogRecord("socks5.x", logging.ERROR, "x.py", 1, "session %s", ("x\ny",), None)
        self.assertRegex(self.line(record, brief=True), r"\A\d\d:\d\d:\d\d ERROR session x\\ny\Z")
