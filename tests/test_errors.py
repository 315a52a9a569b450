"""errors.py: which REP an OSError is, which of several failures is told, and what the exceptions carry."""
import errno
import itertools
import os
import socket
import unittest

from socks5.protocol.codes import Rep
from socks5.protocol.errors import ProtocolError, RequestRefused, SocksError, name_of, rep_of, telling

# PROTOCOL's table, "REP from what happened".
REP_BY_NAME = {
    "ECONNREFUSED": Rep.CONNECTION_REFUSED,
    "ENETUNREACH": Rep.NETWORK_UNREACHABLE, "ENETDOWN": Rep.NETWORK_UNREACHABLE,
    "EHOSTUNREACH": Rep.HOST_UNREACHABLE, "EHOSTDOWN": Rep.HOST_UNREACHABLE,
    "ETIMEDOUT": Rep.TTL_EXPIRED,
    "EACCES": Rep.NOT_ALLOWED, "EPERM": Rep.NOT_ALLOWED,
    "EAFNOSUPPORT": Rep.ADDRESS_TYPE_NOT_SUPPORTED,
}


def failure(name):
    number = getattr(errno, name)
    return OSError(number, os.strerror(number))


class RepOfAnOSError(unittest.TestCase):
    def test_every_errno_of_this_machine(self):
        for name in errno.errorcode.values():
            with self.subTest(name):
                self.assertEqual(rep_of(failure(name)), REP_BY_NAME.get(name, Rep.GENERAL_FAILURE))

    def test_an_error_without_a_number_or_with_the_resolvers_own(self):
        for error in (OSError(), OSError("words only"), socket.timeout("timed out"), OSError(None, "none"),
                      socket.gaierror(socket.EAI_NONAME, "Name or service not known")):
            with self.subTest(repr(error)):
                self.assertIs(rep_of(error), Rep.GENERAL_FAILURE)


class Telling(unittest.TestCase):
    def test_refused_before_unreachable_before_timed_out_before_the_rest(self):
        ladder = (("ECONNREFUSED",), ("EHOSTUNREACH", "EHOSTDOWN", "ENETUNREACH", "ENETDOWN"), ("ETIMEDOUT",),
                  ("EMFILE", "EIO"))
        for higher, lower in itertools.combinations(ladder, 2):
            for one, other in itertools.product(higher, lower):
                for failures in ([failure(one), failure(other)], [failure(other), failure(one)]):
                    with self.subTest(first=name_of(failures[0]), second=name_of(failures[1])):
                        self.assertEqual(name_of(min(failures, key=telling)), one)

    def test_whatever_the_order_the_answer_is_the_same(self):
        failures = [failure(name) for name in REP_BY_NAME] + [failure("EMFILE"), OSError()]
        answers = {rep_of(min(failures[at:] + failures[:at], key=telling)) for at in range(len(failures))}
        self.assertEqual(answers, {Rep.CONNECTION_REFUSED})

    def test_errors_without_a_number_can_be_sorted(self):
        self.assertEqual(telling(OSError()), telling(OSError("words")))
        self.assertGreater(telling(OSError()), telling(failure("ETIMEDOUT")))


class Exceptions(unittest.TestCase):
    def test_family(self):
        self.assertTrue(issubclass(ProtocolError, SocksError) and issubclass(RequestRefused, SocksError))
        self.assertFalse(issubclass(ProtocolError, RequestRefused) or issubclass(RequestRefused, ProtocolError))
        for kind in (ProtocolError, RequestRefused):
            with self.subTest(kind.__name__):
                self.assertFalse(issubclass(kind, (OSError, EOFError, ValueError)), "would be caught as something else")

    def test_a_refusal_carries_the_answer_and_the_reason(self):
        refused = RequestRefused(Rep.NOT_ALLOWED, "rule 3")
        self.assertEqual((refused.rep, refused.why, str(refused)), (Rep.NOT_ALLOWED, "rule 3", "NOT_ALLOWED: rule 3"))

    def test_name_of_what_has_no_errno(self):
        self.assertEqual(name_of(OSError("out of luck")), "out of luck")
        self.assertEqual(name_of(OSError(99999, "strange")), "[Errno 99999] strange")
