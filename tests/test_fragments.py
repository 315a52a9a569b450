"""FRAG: what is one datagram in the end, and what is dropped."""
import unittest
from unittest.mock import patch

from socks5.commands import fragments
from socks5.commands.fragments import Fragments
from socks5.protocol.messages import Datagram

from .support import address

HERE, THERE = address("192.0.2.1", 53), address("192.0.2.2", 53)
END = 0x80


class Reassembly(unittest.TestCase):
    def run_through(self, pieces):
        """Add (FRAG, DATA) or (FRAG, DATA, DST): what came out whole, and how many pieces were dropped."""
        collected = Fragments()
        whole = [collected.add(Datagram(dst[0] if dst else HERE, data, frag)) for frag, data, *dst in pieces]
        return [datagram.data for datagram in whole if datagram], collected.dropped

    def test_sequences(self):
        cases = [
            ("two", [(1, b"a"), (2 | END, b"b")], [b"ab"], 0),
            ("a single one", [(1 | END, b"a")], [b"a"], 0),
            ("one after the other", [(1, b"a"), (2 | END, b"b"), (1, b"c"), (2 | END, b"d")], [b"ab", b"cd"], 0),
            ("empty pieces", [(1, b""), (2, b""), (3 | END, b"")], [b""], 0),
            ("127", [(n, b"%d" % n) for n in range(1, 127)] + [(127 | END, b"!")],
             [b"".join(b"%d" % n for n in range(1, 127)) + b"!"], 0),
            ("not from the start", [(2, b"a"), (3 | END, b"b")], [], 2),
            ("position 0 that ends", [(END, b"a")], [], 1),
            ("one missing", [(1, b"a"), (3 | END, b"c")], [], 2),
            ("repeated", [(1, b"a"), (2, b"b"), (2, b"b"), (3 | END, b"c")], [], 4),
            ("lower", [(1, b"a"), (2, b"b"), (1, b"c"), (2 | END, b"d")], [b"cd"], 2),
            ("the first again", [(1, b"a"), (1, b"b"), (2 | END, b"c")], [b"bc"], 1),
            ("another destination", [(1, b"a"), (2 | END, b"b", THERE)], [], 2),
            ("a new one for another", [(1, b"a"), (1, b"b", THERE), (2 | END, b"c", THERE)], [b"bc"], 1),
            ("64 KiB", [(1, bytes(65535)), (2 | END, b"b")], [bytes(65535) + b"b"], 0),
            ("more than 64 KiB", [(1, bytes(65536)), (2, b"b"), (3 | END, b"c")], [], 3),
        ]
        for name, pieces, whole, dropped in cases:
            with self.subTest(name):
                self.assertEqual(self.run_through(pieces), (whole, dropped))

    def test_the_whole_keeps_its_destination(self):
        collected = Fragments()
        collected.add(Datagram(THERE, b"a", 1))
        self.assertEqual(collected.add(Datagram(THERE, b"b", 2 | END)), Datagram(THERE, b"ab"))

    def test_time(self):
        """RFC 1928 section 7: the timer is no less than 5 s."""
        for name, later, whole in [("in time", 4.9, b"ab"), ("too late", 5.0, None)]:
            with self.subTest(name), patch.object(fragments, "monotonic") as clock:
                clock.return_value = 100.0
                collected = Fragments()
                collected.add(Datagram(HERE, b"a", 1))
                self.assertEqual(collected.deadline, 105.0)
                clock.return_value += later
                datagram = collected.add(Datagram(HERE, b"b", 2 | END))
                self.assertEqual(datagram and datagram.data, whole)
                self.assertEqual(collected.deadline, float("inf"))
