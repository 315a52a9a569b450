"""normalise and look_up: what never reaches the resolver, and what its answers become. Addresses and sockaddrs."""
import random
import socket
import unittest
from ipaddress import IPv4Address, IPv6Address, ip_address
from unittest import mock

from socks5.protocol.codes import Rep
from socks5.protocol.errors import RequestRefused
from socks5.net import resolver
from socks5.net.addresses import advertised, endpoint_of, family_of, ip_of, is_here, subscriber
from socks5.net.resolver import MOST_ADDRESSES, look_up, normalise

NOW = 1000.0
LABEL = b"a" * 63
LONGEST = b".".join([LABEL] * 3 + [b"a" * 61])          # 253 bytes
TRAPS = [
    ("empty", b""), ("a NUL", b"127.0.0.1\0.evil"), ("a NUL at the end", b"localhost\0"), ("nothing but a NUL", b"\0"),
    ("an empty label", b"a..b"), ("a dot in front", b".a"), ("a dot", b"."), ("two dots at the end", b"a.."),
    ("a space", b"local host"), ("a space in front", b" 127.0.0.1"), ("a space behind", b"127.0.0.1 "),
    ("a tab", b"a\tb"), ("a newline", b"localhost\n"), ("a carriage return", b"a\rb"), ("escape", b"\x1b[31ma"),
    ("delete", b"a\x7f"), ("a slash", b"127.0.0.1/8"), ("a colon", b"localhost:80"), ("brackets", b"[::1]"),
    ("a percent sign", b"a%b"), ("a scope", b"fe80::1%eth0"), ("a scope by number", b"fe80::1%1"),
    ("a scope on loopback", b"::1%lo"), ("an at sign", b"user@localhost"), ("a backslash", b"a\\b"),
    ("not UTF-8", b"caf\xe9.example"), ("half of UTF-8", b"a\xc3"), ("overlong NUL", b"a\xc0\x80b"),
    ("a surrogate", b"a\xed\xa0\x80b"), ("a label of 64", b"a" * 64), ("a label of 64 behind", b"a." + b"a" * 64),
    ("254 bytes", LONGEST + b"a"), ("254 bytes of short labels", b"a." * 126 + b"aa"), ("255 bytes", b"a" * 255),
    ("254 bytes and a dot", LONGEST + b"a."), ("a NUL among IDNA", "bücher\0.example".encode()),
    ("a space among IDNA", "bücher .example".encode()), ("an empty label among IDNA", "bücher..example".encode()),
    ("a label of 64 in IDNA only", ("ü" + "a" * 60).encode()), ("right to left override", "a\u202eb".encode()),
    ("a no-break space", "a\u00a0b".encode()), ("a line separator", "a\u2028b".encode()),
    ("one letter that becomes two labels and a slash", "a\u2100b".encode()),
]


def no_resolver(*args, **kwargs):
    raise AssertionError("the resolver was asked: %r" % (args,))


class NormaliseTest(unittest.TestCase):
    def test_traps_never_reach_the_resolver(self):
        for name, raw in TRAPS:
            with self.subTest(name), mock.patch.object(socket, "getaddrinfo", no_resolver):
                for _ in range(2):                          # nor when it comes again
                    with self.assertRaises(RequestRefused) as caught:
                        normalise(raw)
                    self.assertEqual(caught.exception.rep, Rep.HOST_UNREACHABLE)
                    self.assertTrue(caught.exception.why.isprintable() and caught.exception.why.isascii())

    def test_names(self):
        cases = [("plain", b"example.com", b"example.com"), ("capitals stay", b"Example.COM", b"Example.COM"),
                 ("the root's dot", b"example.com.", b"example.com."), ("one label", b"localhost", b"localhost"),
                 ("underscore", b"_dmarc.example.com", b"_dmarc.example.com"), ("digits", b"4.example", b"4.example"),
                 ("hyphens", b"a--b.example", b"a--b.example"), ("a label of 63", LABEL, LABEL),
                 ("253 bytes", LONGEST, LONGEST), ("253 bytes and a dot", LONGEST + b".", LONGEST + b"."),
                 ("IDNA", "bücher.example".encode(), b"xn--bcher-kva.example"),
                 ("IDNA, capitals", "BÜCHER.example".encode(), b"xn--bcher-kva.example"),
                 ("IDNA, another dot", "bücher。example".encode(), b"xn--bcher-kva.example"),
                 ("IDNA, the root's dot", "bücher.example.".encode(), b"xn--bcher-kva.example."),
                 ("IDNA already", b"xn--bcher-kva.example", b"xn--bcher-kva.example")]
        for name, raw, expected in cases:
            with self.subTest(name):
                self.assertEqual(normalise(raw), expected)
                self.assertEqual(normalise(expected), expected)

    def test_literals_are_addresses(self):
        cases = [("IPv4", b"192.0.2.1", IPv4Address("192.0.2.1")), ("IPv6", b"2001:DB8::1", IPv6Address("2001:db8::1")),
                 ("IPv4 in IPv6", b"::ffff:192.0.2.1", IPv4Address("192.0.2.1")),
                 ("unspecified", b"0.0.0.0", IPv4Address(0)), ("IPv6 unspecified", b"::", IPv6Address(0))]
        for name, raw, expected in cases:
            with self.subTest(name), mock.patch.object(socket, "getaddrinfo", no_resolver):
                self.assertEqual(normalise(raw), expected)
                self.assertEqual(normalise(ip_address(raw.decode())), expected)

    def test_an_address_in_full_width_digits(self):
        for raw in ("１９２.0.2.1", "192。0。2。1"):
            with self.subTest(raw), mock.patch.object(socket, "getaddrinfo", no_resolver):
                self.assertEqual(normalise(raw.encode()), IPv4Address("192.0.2.1"))

    def test_5000_random_names_raise_nothing_else(self):
        rng = random.Random(5000)
        alphabets = [bytes(range(256)), b"abcXYZ019-_.", b"0123456789.", b"0123456789abcdef:.%", b"a.\0 \n%",
                     "aüß。．İſ\u200d\u0301\u05d0\u0660\U0001f600\u2488\uff0e.-".encode()]
        points = [range(0x20, 0x7f), range(0xa0, 0x250), range(0x590, 0x700), range(0x2000, 0x2200),
                  range(0x3000, 0x3100), range(0xfe00, 0xfffe), range(0x1f600, 0x1f650), range(0xe0000, 0xe0080)]
        passed = 0
        for number in range(5000):
            size = rng.choice([rng.randrange(1, 20), rng.randrange(256)])
            if number % 3:
                alphabet = rng.choice(alphabets)
                raw = bytes(rng.choice(alphabet) for _ in range(size))
            else:
                raw = "".join(chr(rng.choice(rng.choice(points))) for _ in range(size)).encode()[:255]
            with self.subTest(number=number, raw=raw):
                try:
                    host = normalise(raw)
                except RequestRefused as exc:
                    self.assertEqual(exc.rep, Rep.HOST_UNREACHABLE)
                    continue
                passed += 1
                if isinstance(host, bytes):
                    self.assertRegex(host, rb"\A[A-Za-z0-9._-]{1,254}\Z")
                    self.assertNotIn(b"..", host)
        self.assertGreater(passed, 100, "some do pass")
        self.assertLess(passed, 4000, "some do not")


class LookUpTest(unittest.TestCase):
    def found(self, *addresses):
        """getaddrinfo, which is the system's and not under test, answers with these."""
        answer = [(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_STREAM, 6, "",
                   (address, 0, 0, 2) if ":" in address else (address, 0)) for address in addresses]
        return mock.patch.object(socket, "getaddrinfo", lambda *_args, **_kwargs: answer)

    def test_a_name_of_this_machine(self):
        self.assertIn(IPv4Address("127.0.0.1"), look_up(b"localhost").addresses)

    def test_order_is_kept_and_repetition_is_not(self):
        with self.found("2001:db8::1", "192.0.2.1", "2001:db8::1", "::ffff:192.0.2.1", "192.0.2.2"), \
                mock.patch.object(resolver, "monotonic", lambda: NOW):
            answer = look_up(b"name.test")
        self.assertEqual(answer.addresses, tuple(map(ip_address, ("2001:db8::1", "192.0.2.1", "192.0.2.2"))))
        self.assertEqual(answer.until, NOW + resolver.ANSWER_S)

    def test_a_name_with_thousands_of_addresses_is_cut_short(self):
        with self.found(*("10.0.%d.%d" % (n // 200, n % 200) for n in range(4000))):
            found = look_up(b"name.test").addresses
        self.assertEqual(found, tuple(IPv4Address("10.0.0.%d" % n) for n in range(MOST_ADDRESSES)))

    def test_which_addresses_are_of_this_machine(self):
        for given, expected in (("127.0.0.1", True), ("192.0.2.1", False), ("2001:db8::1", False)):
            with self.subTest(given):
                self.assertEqual(is_here(ip_address(given)), expected)

    def test_a_scope_in_the_answer_is_cut_off(self):
        with self.found("fe80::1%eth0"):
            self.assertEqual(look_up(b"name.test").addresses, (IPv6Address("fe80::1"),))

    def test_failures_say_why_and_only_what_is_known_not_to_exist_is_remembered(self):
        for error, until in ((socket.gaierror(socket.EAI_NONAME, "no"), NOW + resolver.FAILURE_S),
                             (socket.gaierror(socket.EAI_AGAIN, "later"), 0),
                             (UnicodeError("label empty or too long"), 0), (MemoryError(), 0),
                             (OSError(24, "Too many open files"), 0)):
            with self.subTest(repr(error)), mock.patch.object(socket, "getaddrinfo", side_effect=error), \
                    mock.patch.object(resolver, "monotonic", lambda: NOW):
                answer = look_up(b"name.test")
                self.assertEqual((answer.addresses, answer.until), ((), until))
                self.assertEqual(answer.why, "'name.test' does not resolve: %s" % error)


class AddressTest(unittest.TestCase):
    def test_of_sockaddr(self):
        cases = [("IPv4", ("192.0.2.1", 80), "192.0.2.1:80"), ("IPv6", ("2001:db8::1", 80, 0, 0), "[2001:db8::1]:80"),
                 ("IPv4 in IPv6", ("::ffff:192.0.2.1", 80, 0, 0), "192.0.2.1:80"),
                 ("a scope", ("fe80::1%eth0", 80, 0, 2), "[fe80::1]:80")]
        for name, sockaddr, expected in cases:
            with self.subTest(name):
                self.assertEqual(str(endpoint_of(sockaddr)), expected)
                self.assertEqual(ip_of(sockaddr), endpoint_of(sockaddr).ip)

    def test_family(self):
        self.assertEqual((family_of(IPv4Address("192.0.2.1")), family_of(IPv6Address("2001:db8::1"))),
                         (socket.AF_INET, socket.AF_INET6))

    def test_subscriber(self):
        self.assertEqual(subscriber(IPv4Address("192.0.2.1")), "192.0.2.1")
        self.assertEqual(subscriber(IPv6Address("2001:db8:1:2:3:4:5:6")), "2001:db8:1:2::/64")

    def test_advertised(self):
        here = {4: IPv4Address("10.0.0.1"), 6: IPv6Address("fd00::1")}
        both = ("192.0.2.1", "2001:db8::1")
        cases = [("nothing configured", (), 4, "10.0.0.1"), ("its family", both, 4, "192.0.2.1"),
                 ("its family, IPv6", both, 6, "2001:db8::1"), ("only the other family", both[:1], 6, "fd00::1")]
        for name, configured, version, expected in cases:
            with self.subTest(name):
                self.assertEqual(advertised(configured, here[version]), ip_address(expected))
