"""auth.py: which METHOD is picked, and who is let in."""
import unittest

from socks5.auth import Users, choose
from socks5.codes import Method
from socks5.config import Config, credentials

ANYBODY = (Method.NO_AUTHENTICATION,)
BY_PASSWORD = (Method.USERNAME_PASSWORD,)
EVERY_METHOD = bytes(range(256))


class Choose(unittest.TestCase):
    def test_what_was_offered_and_is_acceptable(self):
        for name, offered, acceptable, method in (
                ("00 alone", b"\x00", ANYBODY, 0x00),
                ("00 last of three", b"\x01\x02\x00", ANYBODY, 0x00),
                ("00 twice", b"\x00\x00", ANYBODY, 0x00),
                ("everything", EVERY_METHOD[:255], ANYBODY, 0x00),
                ("users: 02 behind 00", b"\x00\x02", BY_PASSWORD, 0x02),
                ("users: 00 is never chosen", b"\x00", BY_PASSWORD, 0xFF),
                ("users: all but 02", EVERY_METHOD.replace(b"\x02", b""), BY_PASSWORD, 0xFF),
                ("nothing offered", b"", ANYBODY, 0xFF),
                ("nothing offered, users", b"", BY_PASSWORD, 0xFF),
                ("no users: 02 alone", b"\x02", ANYBODY, 0xFF),
                ("GSSAPI and a private one", b"\x01\x80", ANYBODY, 0xFF),
                ("FF is no method, though offered", b"\xff", ANYBODY, 0xFF),
                ("ours first, not the client's", b"\x00\x02", BY_PASSWORD + ANYBODY, 0x02),
                ("a table's keys", b"\x02", {Method.USERNAME_PASSWORD: None}, 0x02)):
            with self.subTest(name):
                self.assertEqual(choose(offered, acceptable), method)

    def test_one_answer_fits_in_a_byte(self):
        for offered in (b"", b"\x00"):
            self.assertEqual(len(bytes([choose(offered, ANYBODY)])), 1)


def users(*pairs):
    return Users(Config(user=tuple(credentials(pair) for pair in pairs)))


class Check(unittest.TestCase):
    def test_without_users_there_is_nobody(self):
        nobody = users()
        self.assertFalse(nobody)
        for login in ((b"", b""), (b"a", b"b"), (b"a", b"")):
            with self.subTest(login):
                self.assertIs(nobody.check(*login), False)

    def test_right_and_wrong(self):
        known = users("alice:secret", "bob:b:o:b", "carol:x")
        self.assertTrue(known)
        for name, uname, passwd, right in (
                ("right", b"alice", b"secret", True),
                ("a colon in the password", b"bob", b"b:o:b", True),
                ("one byte", b"carol", b"x", True),
                ("another's password", b"alice", b"x", False),
                ("one letter less", b"alice", b"secre", False),
                ("one letter more", b"alice", b"secretx", False),
                ("a NUL behind it", b"alice", b"secret\0", False),
                ("other case", b"alice", b"SECRET", False),
                ("name in other case", b"Alice", b"secret", False),
                ("a NUL behind the name", b"alice\0", b"secret", False),
                ("empty password", b"alice", b"", False),
                ("empty name", b"", b"secret", False),
                ("nothing at all", b"", b"", False),
                ("unknown, empty password", b"mallory", b"", False),
                ("unknown", b"mallory", b"secret", False),
                ("both in the name", b"alice:secret", b"", False),
                ("255 bytes", b"a" * 255, b"b" * 255, False)):
            with self.subTest(name):
                self.assertIs(known.check(uname, passwd), right)

    def test_compared_as_bytes_whatever_their_encoding(self):
        known = users("j\u00fcrgen:\u20ac5", "raw\udcff:\udc80\udcfe")    # the last: foreign bytes from argv or environ
        for name, uname, passwd, right in (
                ("UTF-8", "j\u00fcrgen".encode(), "\u20ac5".encode(), True),
                ("Latin-1 is other bytes", "j\u00fcrgen".encode("latin-1"), "\u20ac5".encode(), False),
                ("decomposed is other bytes", "ju\u0308rgen".encode(), "\u20ac5".encode(), False),
                ("not UTF-8 at all", b"raw\xff", b"\x80\xfe", True)):
            with self.subTest(name):
                self.assertIs(known.check(uname, passwd), right)

    def test_an_empty_password_in_the_configuration_lets_nobody_in(self):
        known = Users(Config(user=(("alice", ""), ("", "secret"))))       # past credentials(), as an embedder might
        self.assertTrue(known, "a password is asked for all the same")
        self.assertFalse(known.check(b"alice", b""))
        self.assertFalse(known.check(b"alice", b"x"))

    def test_secrets_do_not_show(self):
        self.assertNotIn("s3cret", repr(users("alice:s3cret")))


if __name__ == "__main__":
    unittest.main()
