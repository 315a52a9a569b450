"""config.py: the parsers of option values, their error messages, and the description of each option."""
import dataclasses
import random
import unittest
from ipaddress import ip_network

from socks5 import values
from socks5.config import GROUPS, Config, ConfigError, from_environment, long_flag, options, parse
from socks5.values import OneWay, Rate, Upstream

# For each kind of value: a text, and what it stands for. No default of any option is among them.
SAMPLES = {
    bool: ("yes", True),
    values.seconds: ("7.5", 7.5),
    values.count: ("7", 7),
    values.workers: ("7", 7),
    values.port: ("7", 7),
    values.port_range: ("7000-7009", (7000, 7009)),
    values.address: ("::1", "::1"),
    values.own_address: ("192.0.2.7", "192.0.2.7"),
    values.out_address: ("same", "same"),
    values.upstream: ("up=socks5://al:s%3Acret@[::1]:1081", Upstream("up", "::1", 1081, (b"al", b"s:cret"))),
    values.rate: ("1M/20M:1G", Rate(OneWay(1 << 20), OneWay(20 << 20, 1 << 30), False)),
    values.network: ("192.0.2.0/24", ip_network("192.0.2.0/24")),
    values.credentials: ("al ice:se:cret", ("al ice", "se:cret")),
    values.path: ("/no/such/file", "/no/such/file"),
    values.user_group: ("daemon:nogroup", "daemon:nogroup"),
    values.log_format: ("json", "json"),
    values.service: ("sockd@proxy.example.org", "sockd@proxy.example.org"),
    values.protection: ("integrity", "integrity"),
    values.endpoint: ("[::1]:9180", ("::1", 9180)),
}
WRONG = {
    bool: ("", "maybe", "2", "y", "yes no"),
    values.seconds: ("", "x", "-1", "-0.001", "nan", "-nan", "inf", "1e10", "2000001", "10s", "1,5", "0x10", "1 0"),
    values.count: ("", "x", "-1", "1.5", "1e3", "0x10", "inf", "nan", str((1 << 31) + 1), "9" * 5000),
    values.workers: ("", "x", "Auto", "-1", "1.5", "257", "9" * 5000),
    values.port: ("", "x", "-1", "65536", "80.0", "http", "1080 1081", "9" * 5000),
    values.port_range: ("", "-", "x", "0", "0-9", "9-8", "1-65536", "-5", "1-2-3", "1-x", "7,8"),
    values.address: ("", "x", "256.0.0.1", "127.0.0.1:80", "[::1]", "::1/64", "127.1", "127.0.0.1%lo", "%lo",
                     "example.com"),
    values.own_address: ("", "x", "0.0.0.0", "::", "fe80::1%lo", "192.0.2.0/24", "example.com"),
    values.out_address: ("", "x", "Same", "0.0.0.0", "::", "127.0.0.1", "::1", "fe80::1", "fe80::1%lo", "169.254.1.1",
                         "224.0.0.1", "192.0.2.0/24", "192.0.2.1,192.0.2.2", "example.com"),
    values.upstream: ("", "x", "192.0.2.1:1080", "http://192.0.2.1:1080", "socks5://192.0.2.1",
                      "socks5://192.0.2.1:0",
                      "socks5://192.0.2.1:65536", "socks5://192.0.2.256:1080", "socks5://::1:1080",
                      "socks5://[::x]:1080",
                      "socks5://:1080", "socks5://a b:1080", "socks5://alice@h:1080", "socks5://:x@h:1080",
                      "socks5://alice:@h:1080", "socks5://a:b@c@h:1080", "direct=socks5://h:1080", "a b=socks5://h:1",
                      "socks5://" + "a" * 256 + ":x@h:1", "socks5://h:1080/path",
                      "socks5+gssapi://@h:1080", "socks5+gssapi://a%2Fb@h:1080",
                      "socks5+gssapi://alice:secret@h:1080", "socks5+gssapi://alice%3Asecret@h:1080"),
    values.rate: ("", "x", "-1", "1023", "1/2", "1M/2M/3M", "2T", "1025G", "1M:", ":1M", "1M:2000G", "/1M", "1M/",
                  "1e6", "0x10K", "inf", "nan", "1 M", "1,5M", "9" * 5000),
    values.network: ("", "x", "192.0.2.1/24", "192.0.2.0/33", "::/129", "example.com", "192.0.2.0-192.0.2.9"),
    values.credentials: ("", ":", "alice", "alice:", ":secret", "a" * 256 + ":x", "x:" + "a" * 256,
                         "\u20ac" * 86 + ":x"),
    values.path: ("", "a\0b"),
    values.user_group: ("", ":", "daemon:", ":daemon", "a:b:c", "a\x7fb"),
    values.log_format: ("", "xml", "JSON", "text json"),
    values.service: ("", "@", "@host", "sockd@", "a b", "a\tb", "sockd@a@b", "sockd/host", "a\0b"),
    values.protection: ("", "none", "Clear", "selective", "2"),
    values.endpoint: ("", "9180", ":9180", "127.0.0.1", "127.0.0.1:", "127.0.0.1:x", "::1:9180", "[127.0.0.1]:9180",
                      "[::1]", "host:9180", "127.0.0.1:65536"),
}


def option_named(name):
    return next(item for item in options() if item.name == name)


class Options(unittest.TestCase):
    """Each field of Config has all that the command line, the INI file and README.rst need."""

    def test_each_is_described(self):
        for item in options():
            meta = item.metadata
            with self.subTest(item.name):
                self.assertEqual(long_flag(item), "--" + item.name.replace("_", "-"))
                self.assertTrue(all(flag.startswith("-") for flag in meta["flags"]))
                self.assertIn(meta["group"], GROUPS)
                self.assertTrue(meta["help"])
                self.assertNotIn("\n", meta["help"])
                self.assertEqual(bool(meta["metavar"]), meta["kind"] is not bool)
                self.assertIn(meta["kind"], SAMPLES, "give tests/test_config.py a sample of this kind of value")

    def test_numbers_say_where_their_default_comes_from(self):
        for item in options():
            if isinstance(item.default, (int, float)) and not isinstance(item.default, bool):
                with self.subTest(item.name):
                    self.assertTrue(item.metadata["why"])

    def test_units_are_in_the_kind(self):
        for item in options():
            if item.name.endswith("_timeout"):
                with self.subTest(item.name):
                    self.assertEqual((item.metadata["kind"], type(item.default), item.metadata["metavar"]),
                                     (values.seconds, float, "S"))


class Parse(unittest.TestCase):
    def test_as_many_workers_as_there_are_cpus(self):
        for text in ("auto", "0"):
            with self.subTest(text):
                self.assertEqual(parse(option_named("workers"), [text], "x"), 0)

    def test_several(self):
        self.assertEqual(parse(option_named("listen"), ["::1", "127.0.0.1"], "x"), ("::1", "127.0.0.1"))
        self.assertEqual(parse(option_named("port"), ["1", "2"], "x"), 2, "the last one counts")
        self.assertIs(parse(option_named("open"), ["yes", "no"], "x"), False)

    def test_yes_and_no(self):
        for text in ("yes", "true", "on", "1", "YES", "True"):
            with self.subTest(text):
                self.assertIs(parse(option_named("open"), [text], "x"), True)
        for text in ("no", "false", "off", "0", "No"):
            with self.subTest(text):
                self.assertIs(parse(option_named("open"), [text], "x"), False)

    def check_line(self, line, start):
        self.assertTrue(line.startswith(start) and len(line) > len(start), line[:200])
        self.assertTrue(line.isprintable(), "not one line of text: %r" % line[:200])

    def test_limits(self):
        for kind, text, value in ((values.port, "0", 0), (values.port, "65535", 65535), (values.count, "0", 0),
                                  (values.seconds, "0", 0.0), (values.seconds, "1e3", 1000.0),
                                  (values.seconds, "0.05", 0.05), (values.seconds, "2000000", 2e6),
                                  (values.port_range, "1-65535", (1, 65535)), (values.port_range, "80", (80, 80))):
            with self.subTest(kind.__name__, text=text):
                self.assertEqual(kind(text), value)

    def test_addresses(self):
        for text, value in (("localhost", "127.0.0.1"), ("0.0.0.0", "0.0.0.0"), ("::", "::"),
                            ("fe80::1%eth0", "fe80::1%eth0"), ("::ffff:127.0.0.1", "::ffff:127.0.0.1")):
            with self.subTest(text):
                self.assertEqual(values.address(text), value)

    def test_networks(self):
        for text, value in (("192.0.2.7", "192.0.2.7/32"), ("::1", "::1/128"), ("0.0.0.0/0", "0.0.0.0/0"),
                            ("::/0", "::/0"), ("::ffff:192.0.2.0/120", "192.0.2.0/24"), ("::ffff:0:0/96", "0.0.0.0/0")):
            with self.subTest(text):
                self.assertEqual(values.network(text), ip_network(value))

    def test_credentials(self):
        for name, text, pair in (("plain", "a:b", ("a", "b")), ("colons", "a:b:c:", ("a", "b:c:")),
                                 ("spaces stay", " a : b ", (" a ", " b ")), ("comma", "a:b,c", ("a", "b,c")),
                                 ("foreign bytes", "\udcff:\udcfe", ("\udcff", "\udcfe")),
                                 ("255 bytes each", "a" * 255 + ":" + "b" * 255, ("a" * 255, "b" * 255)),
                                 ("85 characters, 255 bytes", "\u20ac" * 85 + ":x", ("\u20ac" * 85, "x"))):
            with self.subTest(name):
                self.assertEqual(values.credentials(text), pair)

    def test_upstreams(self):
        for text, upstream in (
                ("socks5://192.0.2.1:1080", Upstream("upstream", "192.0.2.1", 1080)),
                ("socks5h://proxy.example:9050/", Upstream("upstream", "proxy.example", 9050)),
                ("socks5+gssapi://h:1", Upstream("upstream", "h", 1, None, "rcmd@h")),
                ("up=socks5+gssapi://sockd%40h.example@192.0.2.1:1",
                 Upstream("up", "192.0.2.1", 1, None, "sockd@h.example")),
                ("of-fice=socks5://a%40b:c%2Cd%ff@h_1:1", Upstream("of-fice", "h_1", 1, (b"a@b", b"c,d\xff"))),
                ("socks5://al:with:colon@[::1]:1", Upstream("upstream", "::1", 1, (b"al", b"with:colon"))),
                ("socks5://\u20ac:\udcff@h:1", Upstream("upstream", "h", 1, (b"\xe2\x82\xac", b"\xff")))):
            with self.subTest(text):
                self.assertEqual(values.upstream(text), upstream)
                self.assertNotIn("with:colon", repr(Config(upstream=(upstream,))) + repr(upstream) + str(upstream))

    def test_a_wrong_upstream_does_not_show_its_password(self):
        for text in ("socks5+gssapi://alice:secret@h:1", "socks5+gssapi://alice%3Asecret@h:1",
                     "socks5://alice:secret@h"):
            with self.subTest(text), self.assertRaises(ValueError) as caught:
                values.upstream(text)
            self.assertNotIn("secret", str(caught.exception))

    def test_the_upstream_of_a_rule(self):
        plain, office = values.upstream("socks5://192.0.2.1:1080"), values.upstream("office=socks5://192.0.2.2:1080")
        both = Config(upstream=(plain, office))
        self.assertEqual([both.upstream_of(via) for via in (None, "upstream", "office", "direct")],
                         [plain, plain, office, None])
        self.assertIsNone(Config(upstream=(office,)).upstream_of(None))
        self.assertRaises(KeyError, both.upstream_of, "other")
        for twice in ((plain, plain), (office, office)):
            self.assertRaisesRegex(ConfigError, "^--upstream: a name is given twice", Config, upstream=twice)

    def test_a_password_is_never_shown(self):
        for name, text in [("user", text) for text in (
                "s3cret", ":s3cret", "s3cret:", "a" * 256 + ":s3cret", "alice:" + "s3cret" * 50)] + [
                ("upstream", "socks5://al:s3cret" + rest) for rest in ("", "@h", "@h:0", "@h:x", "@h@h:1080", "@:1")]:
            with self.subTest(text[-20:]):
                with self.assertRaises(ConfigError) as caught:
                    parse(option_named(name), [text], "here")
                self.assertNotIn("s3cret", str(caught.exception))

    def test_garbage_raises_nothing_else(self):
        seeded = random.Random(1929)
        alphabet = "0123456789-+._:/%eExXaAnif \t\n\0\u0663\u20ac\udcff"
        for number in range(3000):
            text = "".join(seeded.choice(alphabet) for _ in range(seeded.randrange(12)))
            for item in options():
                try:
                    parse(item, [text], "here")
                except ConfigError as exc:
                    self.check_line(str(exc), "here: ")
                except Exception as exc:
                    self.fail("%s from %r: %r" % (item.name, text, exc))


class Environment(unittest.TestCase):
    def test_users(self):
        for text, given in ((None, {}), ("", {}), (",,", {}), ("alice:secret", {"user": (("alice", "secret"),)}),
                            ("alice:s:1,bob:x", {"user": (("alice", "s:1"), ("bob", "x"))}),
                            ("alice:secret,", {"user": (("alice", "secret"),)})):
            with self.subTest(text):
                self.assertEqual(from_environment({} if text is None else {"SOCKS5_USERS": text}), given)

    def test_upstreams(self):
        self.assertEqual(from_environment({"SOCKS5_UPSTREAM": "socks5://h:1,b=socks5://c:d@i:2,"}), {
            "upstream": (Upstream("upstream", "h", 1), Upstream("b", "i", 2, (b"c", b"d")))})
        self.assertRaisesRegex(ConfigError, "^SOCKS5_UPSTREAM: not ", from_environment, {"SOCKS5_UPSTREAM": "s3cret"})

    def test_wrong_ones_are_named_and_not_shown(self):
        for text in ("s3cret", "alice:s3cret,bob", ":s3cret"):
            with self.subTest(text):
                with self.assertRaises(ConfigError) as caught:
                    from_environment({"SOCKS5_USERS": text})
                self.assertTrue(str(caught.exception).startswith("SOCKS5_USERS: "))
                self.assertNotIn("s3cret", str(caught.exception))


class WholeConfig(unittest.TestCase):
    def test_an_open_proxy_beyond_loopback_needs_the_option_open(self):
        for listen in ("0.0.0.0", "::", "192.0.2.1", "2001:db8::1", "fe80::1%eth0", "::ffff:0.0.0.0"):
            for name, others in (("alone", ()), ("behind loopback", ("127.0.0.1", "::1"))):
                with self.subTest(name, listen=listen):
                    with self.assertRaises(ConfigError) as caught:
                        Config(listen=others + (listen,), port=1234)
                    words = str(caught.exception)
                    self.assertTrue(words.startswith("--listen %s: " % listen), words)
                    self.assertTrue(words.isprintable(), "one line")
                    for command in ("python3 socks5_server.py -l %s -p 1234 -u NAME:PASSWORD" % listen, "--open"):
                        self.assertIn(command, words)
        all_networks = tuple(map(ip_network, ("0.0.0.0/0", "::/0")))
        for name, networks in (("all of both", all_networks), ("all of IPv4", all_networks[:1]),
                               ("all, and one", all_networks + (ip_network("192.0.2.1"),))):
            with self.subTest(name):
                self.assertRaises(ConfigError, Config, listen=("0.0.0.0",), allow_from=networks)

    def test_what_makes_a_proxy_beyond_loopback_safe(self):
        for name, given in (("users", {"user": (("a", "b"),)}), ("a users file", {"users": "file"}),
                            ("rules", {"rules": "file"}),
                            ("one network", {"allow_from": (ip_network("192.0.2.0/24"),)}), ("open", {"open": True})):
            with self.subTest(name):
                self.assertEqual(Config(listen=("::",), **given).listen, ("::",))

    def test_loopback_needs_nothing(self):
        for listen in ("127.0.0.1", "127.8.9.10", "::1", "::1%lo"):
            with self.subTest(listen):
                self.assertEqual(Config(listen=(listen,)).listen, (listen,))

    def test_one_out_address_for_each_ip_version(self):
        for out in (("same",), ("192.0.2.1", "2001:db8::1"), ("same", "192.0.2.1", "2001:db8::1")):
            with self.subTest(out):
                self.assertEqual(Config(out=out).out, out)
        for out, version in ((("192.0.2.1", "192.0.2.2"), 4), (("2001:db8::1", "same", "2001:db8::2"), 6)):
            with self.subTest(out), self.assertRaisesRegex(ConfigError, "^--out: more than one IPv%d add" % version):
                Config(out=out)
        self.assertEqual(values.out_address("::ffff:192.0.2.1"), "192.0.2.1")

    def test_no_address(self):
        with self.assertRaises(ConfigError) as caught:
            Config(listen=())
        self.assertIn("--listen", str(caught.exception))

    def test_passwords_are_not_in_its_repr(self):
        for shown in (repr(Config(user=(("alice", "s3cret"),))), str(Config(user=(("alice", "s3cret"),)))):
            self.assertNotIn("s3cret", shown)
            self.assertIn("port=1080", shown)

    def test_cannot_be_changed(self):
        for item in options():
            with self.subTest(item.name):
                self.assertRaises(dataclasses.FrozenInstanceError, setattr, Config(), item.name, None)

    def test_an_error_is_a_value_error(self):
        self.assertTrue(issubclass(ConfigError, ValueError))
