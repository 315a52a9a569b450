"""codes.py: the numbers are the RFC's, and so are the words."""
import unittest

from socks5.protocol.codes import METHOD_RANGES, Atyp, Cmd, Method, Rep, phrase

# Typed off RFC 1928 sections 3, 4, 5 and 6, not off codes.py.
RFC = {
    Method: {0x00: ("NO_AUTHENTICATION", "NO AUTHENTICATION REQUIRED"), 0x01: ("GSSAPI", "GSSAPI"),
             0x02: ("USERNAME_PASSWORD", "USERNAME/PASSWORD"), 0xFF: ("NO_ACCEPTABLE", "NO ACCEPTABLE METHODS")},
    Cmd: {0x01: ("CONNECT", "CONNECT"), 0x02: ("BIND", "BIND"), 0x03: ("UDP_ASSOCIATE", "UDP ASSOCIATE")},
    Atyp: {0x01: ("IPV4", "IP V4 address"), 0x03: ("DOMAINNAME", "fully-qualified domain name"),
           0x04: ("IPV6", "IP V6 address")},
    Rep: {0x00: ("SUCCEEDED", "succeeded"), 0x01: ("GENERAL_FAILURE", "general SOCKS server failure"),
          0x02: ("NOT_ALLOWED", "connection not allowed by ruleset"),
          0x03: ("NETWORK_UNREACHABLE", "Network unreachable"), 0x04: ("HOST_UNREACHABLE", "Host unreachable"),
          0x05: ("CONNECTION_REFUSED", "Connection refused"), 0x06: ("TTL_EXPIRED", "TTL expired"),
          0x07: ("COMMAND_NOT_SUPPORTED", "Command not supported"),
          0x08: ("ADDRESS_TYPE_NOT_SUPPORTED", "Address type not supported")},
}


class Codes(unittest.TestCase):
    def test_every_number_has_the_rfcs_name_and_words(self):
        for kind, numbers in RFC.items():
            with self.subTest(kind.__name__):
                self.assertEqual({int(member): (member.name, member.phrase) for member in kind}, numbers)


class Phrases(unittest.TestCase):
    def test_every_byte_has_words(self):
        for kind, numbers in RFC.items():
            for number in range(256):
                with self.subTest(kind=kind.__name__, number=number):
                    self.assertEqual(phrase(kind, number), numbers[number][1] if number in numbers else "unassigned")

    def test_methods_lie_in_the_rfcs_ranges(self):
        for number, words in ((0x02, "USERNAME/PASSWORD"), (0x03, "IANA ASSIGNED"), (0x7F, "IANA ASSIGNED"),
                              (0x80, "RESERVED FOR PRIVATE METHODS"), (0xFE, "RESERVED FOR PRIVATE METHODS"),
                              (0xFF, "NO ACCEPTABLE METHODS")):
            with self.subTest("0x%02x" % number):
                self.assertEqual(phrase(Method, number, METHOD_RANGES), words)
        self.assertNotIn("unassigned", {phrase(Method, number, METHOD_RANGES) for number in range(256)})
