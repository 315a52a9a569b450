"""fields: the parts of a Layout, taken and shown one by one. What messages make of them is in test_messages.py."""
import pickle
import unittest
from ipaddress import IPv4Address, IPv6Address

from socks5.protocol.fields import BytesReader, Field, dissect, host_of, split, take_address


def words(raw):
    return raw.hex()


class Fields(unittest.TestCase):
    LAYOUT = (Field("VER", 1, words, must=5), Field("LEN", 1, words), Field("DATA", "LEN", words),
              Field("END", 2, words))

    def test_a_size_may_stand_in_an_earlier_field(self):
        read = BytesReader(b"\x05\x03abc\x00\x01tail")
        self.assertEqual(split(self.LAYOUT, read), {"VER": b"\x05", "LEN": b"\x03", "DATA": b"abc", "END": b"\x00\x01"})
        self.assertEqual(read.rest(), b"tail")

    def test_dissect_shows_what_split_takes(self):
        message = b"\x05\x01x\x00\x02"
        shown = {field.name: raw for field, raw, _ in dissect(self.LAYOUT, message)}
        self.assertEqual(shown, split(self.LAYOUT, BytesReader(message)))
        self.assertEqual([said for _, _, said in dissect(self.LAYOUT, b"\x07\x01")], ["07", "01"])


class Hosts(unittest.TestCase):
    def test_each_kind(self):
        for atyp, packed, host in ((1, b"\x7f\0\0\1", IPv4Address("127.0.0.1")),
                                   (4, bytes(15) + b"\1", IPv6Address("::1")),
                                   (3, b"\x03abc", b"abc"), (3, b"\x0f" + b"n" * 15, b"n" * 15), (3, b"\0", b"")):
            with self.subTest(atyp=atyp, packed=packed):
                read = BytesReader(packed + b"tail")
                self.assertEqual(take_address(read, atyp), packed)
                self.assertEqual((host_of(atyp, packed), read.rest()), (host, b"tail"))

    def test_a_host_is_as_the_one_of_ipaddress(self):
        for ours, base in ((host_of(1, b"\xc0\0\2\1"), IPv4Address("192.0.2.1")),
                           (host_of(4, bytes(15) + b"\1"), IPv6Address("::1"))):
            with self.subTest(base):
                self.assertEqual((ours, hash(ours), str(ours), "%s" % ours), (base, hash(base), str(base), str(base)))
                self.assertEqual({base: 1}[ours], 1)
                self.assertEqual(pickle.loads(pickle.dumps(ours)), base)
