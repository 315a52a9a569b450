"""messages.py: every message whole, cut at every byte and with a tail; never a byte too many; garbage is refused."""
import pickle
import random
import unittest
from ipaddress import IPv4Address, IPv6Address

from socks5.protocol.codes import Cmd, Rep
from socks5.protocol.errors import ProtocolError, RequestRefused, SocksError
from socks5.protocol.fields import BytesReader, dissect, host_of, split, split_by_field, text
from socks5.protocol.messages import (
    LAYOUTS, UNSPECIFIED, Address, Datagram, Greeting, Login, LoginStatus, Reply, Request, Selection, whole)

V4 = Address(IPv4Address("127.0.0.1"), 443)
V6 = Address(IPv6Address("2001:db8::1"), 65535)
NAME = Address(b"example.com", 80)
LONG = Address(b"n" * 255, 0)
LONG_HEX = "ff" + "6e" * 255

# name, the bytes as the RFC's box has them, the facts
CASES = [
    ("greeting, one method", "05 01 00", Greeting(b"\x00")),
    ("greeting, three methods", "05 03 00 01 02", Greeting(b"\x00\x01\x02")),
    ("greeting, no method", "05 00", Greeting(b"")),
    ("greeting, 255 methods", "05 ff" + bytes(range(255)).hex(), Greeting(bytes(range(255)))),
    ("selection, none needed", "05 00", Selection(0x00)),
    ("selection, password", "05 02", Selection(0x02)),
    ("selection, none acceptable", "05 ff", Selection(0xFF)),
    ("login", "01 05 616c696365 06 736563726574", Login(b"alice", b"secret")),
    ("login, longest", "01 ff" + "61" * 255 + "ff" + "62" * 255, Login(b"a" * 255, b"b" * 255)),
    ("login, empty fields", "01 00 00", Login(b"", b"")),
    ("login, any bytes", "01 01 00 02 ff0a", Login(b"\x00", b"\xff\n")),
    ("login status, success", "01 00", LoginStatus(0)),
    ("login status, failure", "01 01", LoginStatus(1)),
    ("login status, 255", "01 ff", LoginStatus(255)),
    ("CONNECT IPv4", "05 01 00 01 7f000001 01bb", Request(Cmd.CONNECT, V4)),
    ("CONNECT IPv6", "05 01 00 04 20010db8000000000000000000000001 ffff", Request(Cmd.CONNECT, V6)),
    ("CONNECT name", "05 01 00 03 0b 6578616d706c652e636f6d 0050", Request(Cmd.CONNECT, NAME)),
    ("CONNECT longest name", "05 01 00 03" + LONG_HEX + "0000", Request(Cmd.CONNECT, LONG)),
    ("CONNECT one-byte name", "05 01 00 03 01 00 0001", Request(Cmd.CONNECT, Address(b"\x00", 1))),
    ("CONNECT mapped IPv6 stays IPv6", "05 01 00 04 00000000000000000000ffff7f000001 0050",
     Request(Cmd.CONNECT, Address(IPv6Address("::ffff:127.0.0.1"), 80))),
    ("BIND", "05 02 00 01 00000000 0000", Request(Cmd.BIND, UNSPECIFIED)),
    ("UDP ASSOCIATE", "05 03 00 04 00000000000000000000000000000000 0000",
     Request(Cmd.UDP_ASSOCIATE, Address(IPv6Address("::"), 0))),
    ("reply succeeded, IPv4", "05 00 00 01 7f000001 01bb", Reply(Rep.SUCCEEDED, V4)),
    ("reply succeeded, IPv6", "05 00 00 04 20010db8000000000000000000000001 ffff", Reply(Rep.SUCCEEDED, V6)),
    ("reply succeeded, name", "05 00 00 03 0b 6578616d706c652e636f6d 0050", Reply(Rep.SUCCEEDED, NAME)),
    ("reply refused", "05 05 00 01 00000000 0000", Reply(Rep.CONNECTION_REFUSED)),
    ("reply, last REP that has a name", "05 08 00 01 00000000 0000", Reply(Rep.ADDRESS_TYPE_NOT_SUPPORTED)),
    ("reply, unassigned REP", "05 09 00 01 00000000 0000", Reply(0x09)),
    ("reply, REP FF", "05 ff 00 01 00000000 0000", Reply(0xFF)),
]
DATAGRAMS = [
    ("IPv4", "0000 00 01 7f000001 01bb", "6869", Datagram(V4, b"hi")),
    ("IPv6", "0000 00 04 20010db8000000000000000000000001 ffff", "00", Datagram(V6, b"\x00")),
    ("name", "0000 00 03 0b 6578616d706c652e636f6d 0050", "ff" * 1400, Datagram(NAME, b"\xff" * 1400)),
    ("no data", "0000 00 01 7f000001 01bb", "", Datagram(V4, b"")),
    ("first fragment", "0000 01 01 7f000001 01bb", "61", Datagram(V4, b"a", 1)),
    ("last fragment", "0000 82 01 7f000001 01bb", "62", Datagram(V4, b"b", 0x82)),
    ("longest name", "0000 ff 03" + LONG_HEX + "0000", "63", Datagram(LONG, b"c", 0xFF)),
]
STREAMED = (Greeting, Selection, Login, LoginStatus, Request, Reply)


class Stingy(BytesReader):
    """A reader that also remembers how much was asked for, in all, whether or not it was there."""

    asked = 0

    def __call__(self, size):
        self.asked += size
        return super().__call__(size)


class Messages(unittest.TestCase):
    def test_every_kind_is_among_the_cases(self):
        self.assertEqual({type(message) for _, _, message in CASES}, set(STREAMED))

    def test_whole(self):
        for name, hexed, message in CASES:
            with self.subTest(name):
                raw = bytes.fromhex(hexed)
                self.assertEqual(message.pack(), raw)
                self.assertEqual(type(message).parse(raw), message)
                self.assertEqual(type(message).parse(BytesReader(raw)), message)

    def test_a_tail_is_left_over_and_never_asked_for(self):
        for name, hexed, message in CASES:
            for tail in (b"\x00", b"GET / HTTP/1.1\r\n\r\n", bytes.fromhex(hexed)):
                with self.subTest(name, tail=tail):
                    read = Stingy(bytes.fromhex(hexed) + tail)
                    self.assertEqual(type(message).parse(read), message)
                    self.assertEqual((read.rest(), read.asked), (tail, len(bytes.fromhex(hexed))))

    def test_cut_at_every_byte_is_eof(self):
        for name, hexed, message in CASES:
            raw = bytes.fromhex(hexed)
            for cut in range(len(raw)):
                with self.subTest(name, cut=cut):
                    read = Stingy(raw[:cut])
                    self.assertRaises(EOFError, type(message).parse, read)
                    self.assertLessEqual(read.asked, len(raw), "waits for bytes that are not part of the message")

    def test_whole_is_one_message_and_the_same_object_for_the_same_bytes(self):
        for name, hexed, message in CASES:
            raw = bytes.fromhex(hexed)
            with self.subTest(name):
                self.assertEqual(whole(type(message), raw), message)
                self.assertIs(whole(type(message), raw), whole(type(message), bytes(bytearray(raw))))
                self.assertRaises(EOFError, whole, type(message), raw + b"x")
                self.assertRaises(EOFError, whole, type(message), raw[:-1])

    def test_what_is_remembered_is_bounded_and_refused_each_time(self):
        for number in range(10000):
            whole(Request, b"\x05\x01\x00\x01\x7f\x00\x00\x01" + number.to_bytes(2, "big"))
        self.assertLessEqual(whole.cache_info().currsize, 4096)
        for _ in range(2):
            self.assertRaises(ProtocolError, whole, Greeting, b"\x04\x01\x00")
            self.assertRaises(RequestRefused, whole, Request, b"\x05\x09\x00\x01" + bytes(6))


class Datagrams(unittest.TestCase):
    def test_whole(self):
        for name, header, data, message in DATAGRAMS:
            with self.subTest(name):
                raw = bytes.fromhex(header + data)
                self.assertEqual((message.pack(), Datagram.parse(raw)), (raw, message))

    def test_cut_inside_the_header_is_eof_and_behind_it_is_less_data(self):
        for name, header, data, message in DATAGRAMS:
            raw, header_bytes = bytes.fromhex(header + data), len(bytes.fromhex(header))
            for cut in range(header_bytes):
                with self.subTest(name, cut=cut):
                    self.assertRaises(EOFError, Datagram.parse, raw[:cut])
            with self.subTest(name, cut="behind the header"):
                self.assertEqual(Datagram.parse(raw[:header_bytes]), message._replace(data=b""))

    def test_reserved_bytes_are_tolerated(self):
        self.assertEqual(Datagram.parse(bytes.fromhex("beef 00 01 7f000001 01bb 6869")), Datagram(V4, b"hi"))

    def test_unknown_atyp(self):
        for atyp in sorted(set(range(256)) - {1, 3, 4}):
            with self.subTest(atyp):
                with self.assertRaises(RequestRefused) as caught:
                    Datagram.parse(bytes([0, 0, 0, atyp]) + bytes(300))
                self.assertIs(caught.exception.rep, Rep.ADDRESS_TYPE_NOT_SUPPORTED)


class WrongVersions(unittest.TestCase):
    def test_one_byte_is_enough(self):
        for kind in STREAMED:
            right = 0x01 if kind in (Login, LoginStatus) else 0x05
            for ver in sorted(set(range(256)) - {right}):
                with self.subTest(kind.__name__, ver=ver):
                    read = Stingy(bytes([ver]))             # more would be EOFError
                    with self.assertRaises(ProtocolError) as caught:
                        kind.parse(read)
                    self.assertEqual(read.asked, 1)
                    self.assertEqual(str(caught.exception), "VER 0x%02x, expected 0x%02x" % (ver, right))


class Requests(unittest.TestCase):
    def test_unknown_atyp_is_told_without_reading_on(self):
        for kind, second in ((Request, 0x01), (Request, 0x7F), (Reply, 0x00)):
            for atyp in sorted(set(range(256)) - {1, 3, 4}):
                with self.subTest(kind.__name__, second=second, atyp=atyp):
                    read = Stingy(bytes([5, second, 0, atyp]))      # more would be EOFError
                    with self.assertRaises(RequestRefused) as caught:
                        kind.parse(read)
                    self.assertEqual((caught.exception.rep, caught.exception.why, read.asked),
                                     (Rep.ADDRESS_TYPE_NOT_SUPPORTED, "ATYP 0x%02x" % atyp, 4))

    def test_unknown_cmd_is_told_once_the_message_is_read(self):
        for cmd in sorted(set(range(256)) - {1, 2, 3}):
            for name, dst in (("IPv4", V4), ("IPv6", V6), ("name", NAME)):
                raw = bytes([5, cmd, 0]) + dst.pack()
                with self.subTest(name, cmd=cmd):
                    read = BytesReader(raw + b"tail")
                    with self.assertRaises(RequestRefused) as caught:
                        Request.parse(read)
                    self.assertEqual((caught.exception.rep, caught.exception.why, read.rest()),
                                     (Rep.COMMAND_NOT_SUPPORTED, "CMD 0x%02x" % cmd, b"tail"))
        for cut in range(10):
            with self.subTest(cut=cut):
                self.assertRaises(EOFError, Request.parse, BytesReader((b"\x05\x7f\x00" + V4.pack())[:cut]))

    def test_rsv_is_tolerated_and_packed_as_zero(self):
        for rsv in range(256):
            with self.subTest(rsv):
                for message in (Request(Cmd.CONNECT, V4), Reply(Rep.NOT_ALLOWED, V4)):
                    raw = message.pack()
                    self.assertEqual(type(message).parse(BytesReader(raw[:2] + bytes([rsv]) + raw[3:])), message)
                    self.assertEqual(raw[2], 0)

    def test_a_name_is_taken_as_it_came(self):
        for name in (b"", b"a..b", b"127.0.0.1\0.evil", b"\xff\xfe", b" ", b"%s", "b\u00fccher".encode(), b"1.2.3.4"):
            with self.subTest(name):
                raw = b"\x05\x01\x00\x03" + bytes([len(name)]) + name + b"\x00\x50"
                self.assertEqual(Request.parse(BytesReader(raw)).dst, Address(name, 80))

    def test_rep_is_a_name_where_the_rfc_has_one(self):
        for rep in range(256):
            with self.subTest(rep):
                parsed = Reply.parse(BytesReader(bytes([5, rep, 0]) + V4.pack())).rep
                self.assertEqual((parsed, isinstance(parsed, Rep)), (rep, rep <= 8))


class PackRefuses(unittest.TestCase):
    def test_what_does_not_fit(self):
        for name, message in (
                ("empty name", Address(b"", 80)), ("256-byte name", Address(b"n" * 256, 80)),
                ("name in a request", Request(Cmd.CONNECT, Address(b"", 80))),
                ("name in a datagram", Datagram(Address(b"n" * 256, 80), b"")),
                ("256 methods", Greeting(bytes(256))),
                ("256-byte UNAME", Login(b"a" * 256, b"b")), ("256-byte PASSWD", Login(b"a", b"b" * 256)),
                ("METHOD 256", Selection(256)), ("STATUS -1", LoginStatus(-1)), ("FRAG 256", Datagram(V4, b"", 256))):
            with self.subTest(name):
                self.assertRaises(ValueError, message.pack)

    def test_ports(self):
        for port in (-1, 65536):
            with self.subTest(port):
                self.assertRaises(OverflowError, Address(V4.host, port).pack)

    def test_an_error_does_not_show_a_password(self):
        with self.assertRaises(ValueError) as caught:
            Login(b"alice", b"s3cret" * 50).pack()
        self.assertNotIn("s3cret", str(caught.exception))


class AddressText(unittest.TestCase):
    def test_forms(self):
        for words, address in (
                ("192.0.2.1:80", Address(IPv4Address("192.0.2.1"), 80)),
                ("0.0.0.0:0", UNSPECIFIED),
                ("[2001:db8::1]:443", Address(IPv6Address("2001:db8:0:0:0:0:0:1"), 443)),
                ("[::]:0", Address(IPv6Address("::"), 0)),
                ("'example.com':80", NAME),
                ("'192.0.2.1':80", Address(b"192.0.2.1", 80)),             # a name: the quotes tell
                ("'':80", Address(b"", 80)),
                (r"'a\nb':80", Address(b"a\nb", 80)),
                (r"'\x00\x1b[31m':80", Address(b"\0\x1b[31m", 80)),
                (r"'b\xfccher':80", Address("b\u00fccher".encode(), 80)),
                (r"'\u202egro':80", Address("\u202egro".encode(), 80)),
                ('"it\'s":80', Address(b"it's", 80))):
            with self.subTest(words):
                self.assertEqual(str(address), words)

    def test_any_bytes_are_one_line_of_printable_ascii(self):
        seeded = random.Random(1)
        names = [bytes([byte]) for byte in range(256)]
        names += [bytes(seeded.randrange(256) for _ in range(seeded.randrange(256))) for _ in range(500)]
        for name in names:
            with self.subTest(name):
                for words in (text(name), str(Address(name, 1))):
                    self.assertTrue(words.isascii() and words.isprintable(), words)

    def test_different_bytes_that_are_not_utf8_look_different(self):
        self.assertNotEqual(text(b"\xff"), text(b"\xfe"))


class Hosts(unittest.TestCase):
    def test_a_host_is_as_the_one_of_ipaddress(self):
        for ours, base in ((host_of(1, b"\xc0\0\2\1"), IPv4Address("192.0.2.1")),
                           (host_of(4, bytes(15) + b"\1"), IPv6Address("::1"))):
            with self.subTest(base):
                self.assertEqual((ours, hash(ours), str(ours), "%s" % ours), (base, hash(base), str(base), str(base)))
                self.assertEqual({base: 1}[ours], 1)
                self.assertEqual(pickle.loads(pickle.dumps(ours)), base)


class Secrets(unittest.TestCase):
    def test_a_login_shows_the_name_only(self):
        login = Login(b"alice", b"s3cret")
        for shown in (repr(login), str(login), "%r" % ([login],), "%s" % {"login": login}):
            with self.subTest(shown):
                self.assertIn("alice", shown)
                self.assertNotIn("s3cret", shown)

    def test_neither_the_password_nor_its_length_is_in_words(self):
        secret = [field.name for field in LAYOUTS[Login] if field.secret]
        self.assertEqual(secret, ["PLEN", "PASSWD"])
        for field, _, words in dissect(LAYOUTS[Login], Login(b"alice", b"s3cret").pack()):
            with self.subTest(field.name):
                self.assertNotIn("s3cret", words)


class Dissect(unittest.TestCase):
    """The wire trace shows what dissect gives: it must be what parse saw and pack made."""

    def test_the_fields_are_the_message(self):
        for name, hexed, message in CASES:
            with self.subTest(name):
                pieces = list(dissect(LAYOUTS[type(message)], message.pack()))
                self.assertEqual(b"".join(raw for _, raw, _ in pieces), bytes.fromhex(hexed))
                self.assertEqual(tuple(field for field, _, _ in pieces), LAYOUTS[type(message)])
                for source in (message.pack(), BytesReader(message.pack())):
                    self.assertEqual([raw for _, raw, _ in pieces], list(split(LAYOUTS[type(message)], source)))

    def test_by_one_call_or_by_field_is_the_same(self):
        """Of every message, also cut, with a tail, or with a byte changed."""
        dice, outcomes = random.Random(1928), {"split": 0, "refused": 0}
        for name, hexed, message in CASES:
            raw, layout = bytes.fromhex(hexed), LAYOUTS[type(message)]
            bad = [raw[:size] for size in range(len(raw))] + [raw + b"x"]
            bad += [raw[:at] + bytes([value]) + raw[at + 1:] for at in range(min(len(raw), 6))
                    for value in {0, 1, 3, 4, 5, 16, 255, dice.randrange(256)}]
            for data in [raw, *bad]:
                with self.subTest(name, data=data):
                    try:
                        expected = split_by_field(layout, data)
                    except (EOFError, SocksError) as exc:
                        outcomes["refused"] += 1
                        with self.assertRaises(type(exc)) as caught:
                            split(layout, data)
                        self.assertEqual(str(caught.exception), str(exc))
                    else:
                        outcomes["split"] += 1
                        self.assertEqual(list(split(layout, data)), expected)
        self.assertGreater(min(outcomes.values()), 50, outcomes)

    def test_the_fields_are_a_datagrams_header(self):
        for name, header, _, message in DATAGRAMS:
            with self.subTest(name):
                shown = b"".join(raw for _, raw, _ in dissect(LAYOUTS[Datagram], message.pack()))
                self.assertEqual(shown, bytes.fromhex(header))

    def test_names_and_sizes_are_the_rfcs(self):
        for kind, names in ((Greeting, "VER NMETHODS METHODS"), (Selection, "VER METHOD"),
                            (Login, "VER ULEN UNAME PLEN PASSWD"), (LoginStatus, "VER STATUS"),
                            (Request, "VER CMD RSV ATYP DST.ADDR DST.PORT"),
                            (Reply, "VER REP RSV ATYP BND.ADDR BND.PORT"),
                            (Datagram, "RSV FRAG ATYP DST.ADDR DST.PORT")):
            with self.subTest(kind.__name__):
                self.assertEqual([field.name for field in LAYOUTS[kind]], names.split())
        for name, message, sizes in (("IPv4", Request(Cmd.CONNECT, V4), [1, 1, 1, 1, 4, 2]),
                                     ("IPv6", Reply(Rep.SUCCEEDED, V6), [1, 1, 1, 1, 16, 2]),
                                     ("name", Datagram(NAME, b"data"), [2, 1, 1, 12, 2])):
            with self.subTest(name):
                self.assertEqual([len(raw) for _, raw, _ in dissect(LAYOUTS[type(message)], message.pack())], sizes)

    def test_words(self):
        for message, expected in (
                (Greeting(b"\x00\x02\x80\x10"), {
                    "VER": "SOCKS version 5", "NMETHODS": "4 method(s) follow",
                    "METHODS": "NO AUTHENTICATION REQUIRED, USERNAME/PASSWORD, RESERVED FOR PRIVATE METHODS, "
                               "IANA ASSIGNED"}),
                (Greeting(b""), {"METHODS": "none"}),
                (Selection(0xFF), {"METHOD": "NO ACCEPTABLE METHODS"}),
                (Login(b"al\nice", b"secret"), {"VER": "version 1 of the username/password sub-negotiation",
                                                "ULEN": "6 bytes of UNAME", "UNAME": r"'al\nice'", "PASSWD": ""}),
                (LoginStatus(0), {"STATUS": "success"}),
                (LoginStatus(7), {"STATUS": "failure, the connection closes"}),
                (Request(Cmd.CONNECT, NAME), {"CMD": "CONNECT", "RSV": "reserved",
                                              "ATYP": "fully-qualified domain name", "DST.ADDR": "'example.com'",
                                              "DST.PORT": "80"}),
                (Request(Cmd.BIND, V6), {"CMD": "BIND", "ATYP": "IP V6 address", "DST.ADDR": "2001:db8::1",
                                         "DST.PORT": "65535"}),
                (Reply(Rep.TTL_EXPIRED, V4), {"REP": "TTL expired", "ATYP": "IP V4 address", "BND.ADDR": "127.0.0.1",
                                              "BND.PORT": "443"}),
                (Reply(0x20), {"REP": "unassigned"}),
                (Datagram(V4, b"", 0), {"FRAG": "stands alone", "RSV": "reserved"}),
                (Datagram(V4, b"", 3), {"FRAG": "fragment 3"}),
                (Datagram(V4, b"", 0x83), {"FRAG": "fragment 3, the last of its sequence"})):
            words = {field.name: words for field, _, words in dissect(LAYOUTS[type(message)], message.pack())}
            for name in expected:
                with self.subTest(type(message).__name__, field=name):
                    self.assertEqual(words[name], expected[name])

    def test_a_cut_message_shows_the_fields_that_are_whole(self):
        for name, hexed, message in CASES:
            raw = bytes.fromhex(hexed)
            whole = [piece for _, piece, _ in dissect(LAYOUTS[type(message)], raw)]
            for cut in range(len(raw)):
                with self.subTest(name, cut=cut):
                    pieces = [piece for _, piece, _ in dissect(LAYOUTS[type(message)], raw[:cut])]
                    self.assertEqual(pieces, whole[:len(pieces)])
                    self.assertLessEqual(sum(map(len, pieces)), cut)
                    self.assertGreater(sum(map(len, whole[:len(pieces) + 1])), cut, "a whole field is not shown")

    def test_a_wrong_version_and_an_unknown_cmd_are_shown_as_they_came(self):
        came = b"\x04\x09\x00" + V4.pack()
        shown = [(field.name, raw, words) for field, raw, words in dissect(LAYOUTS[Request], came)]
        self.assertEqual(shown[:2], [("VER", b"\x04", "SOCKS version 4"), ("CMD", b"\x09", "unassigned")])
        self.assertEqual(b"".join(raw for _, raw, _ in shown), came)

    def test_an_unknown_atyp_is_the_last_thing_shown(self):
        shown = [(field.name, words) for field, _, words in dissect(LAYOUTS[Request], b"\x05\x01\x00\x02" + bytes(9))]
        self.assertEqual(shown[-1], ("ATYP", "unassigned"))

    def test_a_tail_is_not_shown(self):
        for name, hexed, message in CASES:
            with self.subTest(name):
                shown = b"".join(raw for _, raw, _ in dissect(LAYOUTS[type(message)], message.pack() + b"tail"))
                self.assertEqual(shown, bytes.fromhex(hexed))


class Garbage(unittest.TestCase):
    """20,000 inputs that no client sends."""

    INPUTS = 20000

    @staticmethod
    def inputs(seeded, seeds):
        """Random bytes, and real messages bent: bytes changed, cut out, put in, doubled, joined."""
        for number in range(Garbage.INPUTS):
            if number % 4 == 0:
                yield bytes(seeded.getrandbits(8) for _ in range(seeded.randrange(40)))
                continue
            raw = bytearray(seeded.choice(seeds))
            for _ in range(seeded.randrange(1, 5)):
                at = seeded.randrange(len(raw) + 1)
                bend = seeded.randrange(5)
                if bend == 0 and at < len(raw):
                    raw[at] = seeded.getrandbits(8)
                elif bend == 1:
                    del raw[at:at + seeded.randrange(4)]
                elif bend == 2:
                    raw[at:at] = bytes(seeded.getrandbits(8) for _ in range(seeded.randrange(4)))
                elif bend == 3:
                    raw[at:at] = raw[:seeded.randrange(20)]
                else:
                    raw = raw[:at] + bytearray(seeded.choice(seeds))
            yield bytes(raw)

    def test_only_our_errors_and_what_parses_packs_to_what_came(self):
        kinds = STREAMED + (Datagram,)
        seeds = [message.pack() for *_, message in CASES + DATAGRAMS if len(message.pack()) < 60]
        outcomes = dict.fromkeys(["parsed", "EOFError", "ProtocolError", "RequestRefused"], 0)
        for number, data in enumerate(self.inputs(random.Random(1928), seeds)):
            for kind in (kinds[number % len(kinds)], kinds[(number // 7) % len(kinds)]):
                read = BytesReader(data)
                try:
                    message = Datagram.parse(data) if kind is Datagram else kind.parse(read)
                except (SocksError, EOFError) as exc:
                    outcomes[type(exc).__name__] += 1
                    self.assertTrue(str(exc).isprintable() and str(exc).isascii(), (number, data, str(exc)))
                except Exception as exc:
                    self.fail("input %d, %s.parse(%r) raised %r" % (number, kind.__name__, data, exc))
                else:
                    outcomes["parsed"] += 1
                    self.check_parsed(kind, message, data if kind is Datagram else data[:read.at])
                self.check_dissected(kind, data)
        for outcome, times in outcomes.items():
            self.assertGreater(times, 500, "the inputs hardly ever end in %s: %s" % (outcome, outcomes))

    def test_bytes_and_a_stream_come_to_the_same(self):
        seeds = [message.pack() for _, _, message in CASES if isinstance(message, Request) and len(message.pack()) < 60]
        equal = 0
        for data in self.inputs(random.Random(5), seeds):
            read = BytesReader(data)
            outcomes = []
            for source in (read, data):
                try:
                    outcomes.append(Request.parse(source))
                except (SocksError, EOFError) as exc:
                    outcomes.append(type(exc))
            streamed, whole_one = outcomes
            if read.rest() and whole_one is EOFError:                       # bytes may not hold more than the message
                continue
            self.assertEqual(whole_one, streamed, data)
            self.assertFalse(isinstance(whole_one, Request) and read.rest(), data)
            equal += isinstance(whole_one, Request) and isinstance(whole_one.dst.host, bytes)
        self.assertGreater(equal, 200, "requests for a name")

    def check_parsed(self, kind, message, came):
        str(message), repr(message), hash(message)
        try:
            packed = message.pack()
        except ValueError:                      # an empty name: parsed for the resolver to refuse, never sent by us
            self.assertIn(b"", [value.host for value in message if isinstance(value, Address)], came)
            return
        reserved = {Request: [2], Reply: [2], Datagram: [0, 1]}.get(kind, [])
        self.assertEqual(packed, bytes(0 if at in reserved else byte for at, byte in enumerate(came)), kind)

    def check_dissected(self, kind, data):
        shown = b""
        for _, raw, words in dissect(LAYOUTS[kind], data):
            shown += raw
            self.assertTrue(words.isprintable() and words.isascii(), (kind, data, words))
        self.assertTrue(data.startswith(shown), (kind, data, shown))


class Reader(unittest.TestCase):
    def test_piece_by_piece(self):
        read = BytesReader(b"abcdef")
        self.assertEqual((read(0), read(2), read(1), read.rest(), read.rest()), (b"", b"ab", b"c", b"def", b"def"))
        with self.assertRaises(EOFError):
            read(4)
        self.assertEqual((read(3), read.rest()), (b"def", b""), "a failed read takes nothing")
        self.assertEqual(read(0), b"")
        self.assertRaises(EOFError, read, 1)
