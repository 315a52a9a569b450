"""protocol/proxy.py: the PROXY header of a load balancer, versions 1 and 2; garbage raises our errors only."""
import random
import unittest
from ipaddress import IPv4Address, IPv6Address

from socks5.protocol.errors import ProtocolError
from socks5.protocol.fields import BytesReader
from socks5.protocol.messages import Address
from socks5.protocol.proxy import LONGEST, SIGNATURE, ProxyHeader, begins

A4, B4 = Address(IPv4Address("192.0.2.7"), 51000), Address(IPv4Address("198.51.100.9"), 1080)
A6, B6 = Address(IPv6Address("2001:db8::7"), 0), Address(IPv6Address("2001:db8::9"), 65535)
V4 = "c0000207 c6336409 c738 0438"
V6 = "20010db8000000000000000000000007 20010db8000000000000000000000009 0000 ffff"
TLV = "04 0004 00000000 20 0003 ffffff"         # a NOOP, and a TLV that is cut short: neither is parsed


def v2(tail):
    return SIGNATURE + bytes.fromhex(tail)


# name, bytes, version, source, destination
CASES = [
    ("v1 TCP4", b"PROXY TCP4 192.0.2.7 198.51.100.9 51000 1080\r\n", 1, A4, B4),
    ("v1 TCP6", b"PROXY TCP6 2001:db8::7 2001:DB8:0::9 0 65535\r\n", 1, A6, B6),
    ("v1 UNKNOWN, shortest", b"PROXY UNKNOWN\r\n", 1, None, None),
    ("v1 UNKNOWN, longest", b"PROXY UNKNOWN " + b"f" * 91 + b"\r\n", 1, None, None),
    ("v1 shortest TCP4", b"PROXY TCP4 1.1.1.1 1.1.1.2 0 1\r\n", 1, Address(IPv4Address("1.1.1.1"), 0),
     Address(IPv4Address("1.1.1.2"), 1)),
    ("v1 longest TCP6", b"PROXY TCP6 ffff:f0f0:ffff:ffff:ffff:ffff:ffff:ffff f0ff:ffff:ffff:ffff:ffff:ffff:ffff:ffff "
     b"65535 65535\r\n", None, None, None),      # multicast: see Refused
    ("v2 TCP4", v2("21 11 000c" + V4), 2, A4, B4),
    ("v2 TCP6", v2("21 21 0024" + V6), 2, A6, B6),
    ("v2 TCP4 with TLVs", v2("21 11 0019" + V4 + TLV), 2, A4, B4),
    ("v2 TCP6 with TLVs of all its 65,535 bytes", v2("21 21 ffff" + V6) + b"\xff" * (65535 - 36), 2, A6, B6),
    ("v2 LOCAL", v2("20 00 0000"), 2, None, None),
    ("v2 LOCAL with addresses", v2("20 11 000c" + V4), 2, None, None),
    ("v2 LOCAL of a family that there is not", v2("20 ff 0003 010203"), 2, None, None),
    ("v2 UNSPEC", v2("21 00 0000"), 2, None, None),
    ("v2 UNSPEC with TLVs", v2("21 00 000d" + TLV), 2, None, None),
    ("v2 UNIX", v2("21 31 00d8") + b"/" * 216, 2, None, None),
]
MALFORMED = [
    ("a greeting", b"\x05\x01\x00"), ("a request of HTTP", b"POST / HTTP/1.0\r\n\r\n"), ("lower case", b"proxy"),
    ("no CR", b"PROXY TCP4 192.0.2.7 198.51.100.9 51000 1080\n"),
    ("no CR, UNKNOWN", b"PROXY UNKNOWN \n"), ("two spaces", b"PROXY TCP4  192.0.2.7 198.51.100.9 51000 1080\r\n"),
    ("a space behind", b"PROXY TCP4 192.0.2.7 198.51.100.9 51000 1080 \r\n"),
    ("no family", b"PROXY 192.0.2.7 198.51.100.9 51000 1080\r\n"), ("UDP4", b"PROXY UDP4 192.0.2.7 1.1.1.1 1 1\r\n"),
    ("IPv6 as TCP4", b"PROXY TCP4 2001:db8::7 2001:db8::9 51000 1080\r\n"),
    ("IPv4 as TCP6", b"PROXY TCP6 192.0.2.7 198.51.100.9 51000 1080\r\n"),
    ("one of each", b"PROXY TCP4 192.0.2.7 2001:db8::9 51000 1080\r\n"),
    ("an IPv6 scope", b"PROXY TCP6 fe80::1%lo fe80::2 51000 1080\r\n"),
    ("a leading zero", b"PROXY TCP4 192.0.2.7 198.51.100.9 051000 1080\r\n"),
    ("a port too high", b"PROXY TCP4 192.0.2.7 198.51.100.9 65536 1080\r\n"),
    ("a negative port", b"PROXY TCP4 192.0.2.7 198.51.100.9 -1 1080\r\n"),
    ("digits that are not ASCII", "PROXY TCP4 192.0.2.7 198.51.100.9 \u0665 1080\r\n".encode()),
    ("a byte too many in a number", b"PROXY TCP4 192.0.2.256 198.51.100.9 51000 1080\r\n"),
    ("no CRLF within the length", b"PROXY TCP4 " + b"1" * 97), ("the same, UNKNOWN", b"PROXY UNKNOWN " + b"x" * 100),
    ("two lines", b"PROXY TCP4\r\n192.0.2.7 198.51.100.9 51000 1080\r\n"),
    ("the signature of another version", SIGNATURE[:-1] + b"\r\x21\x11\0\0"), ("empty lines", b"\r\n" * 8),
    ("version 1 in binary", v2("11 11 000c" + V4)), ("version 3", v2("31 11 000c" + V4)),
    ("a command that there is not", v2("22 11 000c" + V4)), ("UDP over IPv4", v2("21 12 000c" + V4)),
    ("a family that there is not", v2("21 41 000c" + V4)), ("IPv4 of a protocol unspecified", v2("21 10 000c" + V4)),
    ("too short for IPv4", v2("21 11 000b" + V4)), ("no addresses", v2("21 11 0000")),
    ("IPv4 as IPv6", v2("21 21 000c" + V4)), ("UNIX, too short", v2("21 31 000c" + V4)),
    ("from 0.0.0.0", v2("21 11 000c 00000000 c6336409 c738 0438")),
    ("from a group", v2("21 11 000c e0000001 c6336409 c738 0438")),
    ("from ::", b"PROXY TCP6 :: ::1 1 1\r\n"), ("from 0.0.0.0, mapped", b"PROXY TCP6 ::ffff:0.0.0.0 ::1 1 1\r\n"),
    ("from ff02::1", b"PROXY TCP6 ff02::1 ::1 1 1\r\n"),
    ("from ffff::, the longest line", CASES[5][1]),
]


class Header(unittest.TestCase):
    def test_whole_with_a_tail_and_cut_at_every_byte(self):
        for name, raw, version, source, destination in CASES:
            if version is None:
                continue
            with self.subTest(name):
                read = BytesReader(raw + b"\x05\x01\x00tail")
                header = ProxyHeader.parse(read)
                self.assertEqual((header, read.rest()),
                                 (ProxyHeader(version, source, destination), b"\x05\x01\x00tail"))
                self.assertTrue(begins(raw))
                for cut in sorted({*range(min(len(raw), 300)), len(raw) - 1}):
                    self.assertRaises(EOFError, ProxyHeader.parse, BytesReader(raw[:cut]))

    def test_refused(self):
        for name, raw in MALFORMED:
            with self.subTest(name):
                with self.assertRaises(ProtocolError) as caught:
                    ProxyHeader.parse(BytesReader(raw))
                self.assertTrue(str(caught.exception).isprintable())

    def test_no_line_is_read_beyond_its_length(self):
        self.assertEqual(len(CASES[3][1]), LONGEST)
        read = BytesReader(b"PROXY UNKNOWN " + b"x" * 1000)
        self.assertRaises(ProtocolError, ProxyHeader.parse, read)
        self.assertEqual(read.at, LONGEST)

    def test_what_is_skipped_is_never_in_memory_as_a_whole(self):
        sizes = []
        rest = BytesReader(CASES[9][1])
        ProxyHeader.parse(lambda size: sizes.append(size) or rest(size))
        self.assertLess(max(sizes), 5000)

    def test_pack(self):
        for source, destination in ((A4, B4), (A6, B6), (None, None)):
            header = ProxyHeader(2, source, destination)
            self.assertEqual(ProxyHeader.parse(BytesReader(header.pack())), header)
        self.assertEqual(ProxyHeader(2, A4, B4).pack(), CASES[6][1])
        for source, destination in ((A4, B6), (Address(b"example.com", 1), B4)):
            self.assertRaises(ValueError, ProxyHeader(2, source, destination).pack)

    def test_what_begins_like_one(self):
        for seen, it_does in ((b"PROXY ", True), (b"\r\n\r\n", True), (SIGNATURE, True), (SIGNATURE + b"!", True),
                              (b"P", False), (b"PROXY", False), (b"GET / HTTP/1.0", False), (b"\x05", False),
                              (b"\r\nGET", False)):
            with self.subTest(seen):
                self.assertEqual(begins(seen), it_does)

    def test_garbage_raises_nothing_else(self):
        seeded = random.Random(1928)
        whole = [case[1] for case in CASES if len(case[1]) < 1000]
        for _ in range(20000):
            raw = bytearray(seeded.choice(whole))
            for _ in range(seeded.randrange(1, 4)):
                raw[seeded.randrange(len(raw))] = seeded.choice(b"\0\r\n 019:.PROXYTCP46\xff\x11\x21")
            try:
                header = ProxyHeader.parse(BytesReader(bytes(raw)))
                self.assertIn(header.version, (1, 2))
            except (ProtocolError, EOFError):
                pass
