"""The status page in a real browser: what a person sees, what a hostile peer cannot do, how it looks and how fast.

SOCKS5_SCREENSHOTS=DIR keeps a picture of each, to be looked at.
"""
import contextlib
import os
import select
import unittest
from pathlib import Path

from tests.browser import browser
from tests.support import connect_through, dial, need, need_program, negotiate, reader_of, spawned, target

HOSTILE = b"<img src=x onerror=document.title=1>"
ROWS = "[...document.querySelectorAll('#sessions tbody tr')]"


class Page(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.stack = contextlib.ExitStack()
        cls.addClassCleanup(cls.stack.close)
        cls.browser = None

    def setUp(self):
        for name in ("chromium", "chromedriver"):
            need_program(self, name)
        if not self.browser:
            type(self).browser = self.stack.enter_context(browser(self))
        self.browser.screen(1280, 1000)

    @contextlib.contextmanager
    def opened(self, *args):
        """A server whose page is open in the browser."""
        with spawned("--status", "127.0.0.1:0", "-w", "2" if hasattr(os, "fork") else "1", *args) as server:
            url = server.wait_line(r"status on (http://\S+)", server.lines).group(1)
            self.browser.complaints()           # those of the test before
            self.browser.go(url)
            self.browser.wait("return window.refreshes")
            try:
                yield server
            finally:
                self.browser.go("about:blank")

    def picture(self, name):
        folder = os.environ.get("SOCKS5_SCREENSHOTS")
        if folder:
            Path(folder, name + ".png").write_bytes(self.browser.screenshot())

    def test_a_session_appears_grows_is_opened_and_goes(self):
        page = self.browser
        with target() as echo, self.opened() as server:
            self.assertIn("No client is connected", page.run("return document.body.innerText"))
            with connect_through(server.port, *echo) as tunnel:
                page.wait("return %s.length === 1" % ROWS)
                for _ in range(100):
                    tunnel.sendall(b"x" * 1000)
                    reader_of(tunnel)(1000)
                page.wait("return %s[0].innerText.includes('200 kB')" % ROWS)
                page.wait("return document.getElementById('up-all').textContent === '100 kB in all'")
                page.run("%s[0].querySelector('button').focus()" % ROWS)
                page.key("Enter")
                page.wait("return document.querySelectorAll('.message').length === 4")
                text = page.run("return document.getElementById('dialog').innerText")
                for words in ("Greeting", "NMETHODS", "NO AUTHENTICATION REQUIRED", "DST.ADDR", "7f 00 00 01",
                              "IP V4 address follows", "port %d" % echo[1], "BND.PORT", "succeeded"):
                    self.assertIn(words, text)
                self.picture("handshake")
                page.key("Escape")
                page.wait("return !document.getElementById('dialog').open")
            page.wait("return %s.length === 0" % ROWS)
            page.wait("return document.querySelectorAll('#ended tbody tr').length === 1")
            self.picture("ended")
            self.assertEqual(page.complaints(), [])

    def test_a_refusal_is_explained(self):
        page = self.browser
        with self.opened() as server:
            with self.assertRaises(AssertionError):
                connect_through(server.port, b"no such name", 80)
            page.wait("return document.querySelector('#refused tbody button')")
            page.run("document.querySelector('#refused tbody button').click()")
            page.wait("return document.querySelectorAll('.message').length === 4")
            text = page.run("return document.getElementById('dialog').innerText")
            self.assertIn("there is a way, but the host was not found; or its name does not exist", text)
            self.assertIn("Refused: ", text)
            self.picture("refused")

    def test_hostile_names_do_not_run(self):
        page = self.browser
        with self.opened("-u", "bob:right") as server:
            title = page.run("return document.title")
            with self.assertRaises(AssertionError), dial(server.port) as sock:
                negotiate(sock, (HOSTILE, b"wrong"))
            with self.assertRaises(AssertionError):
                connect_through(server.port, HOSTILE, 80, user=(b"bob", b"right"))
            page.wait("return document.querySelectorAll('#refused tbody tr').length === 2")
            for row in range(2):
                page.run("document.querySelectorAll('#refused tbody button')[arguments[0]].click()", row)
                page.wait("return document.querySelector('.message')")
                self.assertEqual(page.run("return document.querySelectorAll('img').length"), 0)
            self.assertIn(HOSTILE.decode(), page.run("return document.body.innerText"))
            self.assertEqual(page.run("return document.title"), title)
            self.assertEqual(page.complaints(), [])
            page.run("const s = document.createElement('script'); s.textContent = 'document.title = 2';"
                     "document.body.append(s)")
            self.assertEqual(page.run("return document.title"), title, "the policy lets no other script run")
            self.assertIn("Content Security Policy", " ".join(page.complaints()))

    def test_a_thousand_sessions_searched_and_sorted(self):
        need(self, hasattr(select, "poll"), "poll(): select() takes no more than 1,024 descriptors")
        page = self.browser
        with target() as echo, target() as other, self.opened() as server, contextlib.ExitStack() as stack:
            for number in range(1000):
                stack.enter_context(connect_through(server.port, *(other if number == 500 else echo)))
            page.wait("return document.getElementById('count').textContent === '1,000'")
            now = page.run("return window.refreshes")
            page.wait("return window.refreshes > arguments[0] + 1", now)
            page.wait("render(); return window.renderMs < 100")         # once, on a machine that does other things
            page.run("const s = document.getElementById('search'); s.value = arguments[0];"
                     "s.dispatchEvent(new Event('input'))", ":%d" % other[1])
            page.wait("return %s.length === 1" % ROWS)
            page.run("const s = document.getElementById('search'); s.value = ''; s.dispatchEvent(new Event('input'))")
            heads = "document.querySelectorAll('#sessions th')"
            page.run(heads + "[3].querySelector('button').click()")
            self.assertEqual(page.run("return %s[3].getAttribute('aria-sort')" % heads), "ascending")
            shown = page.run("return %s.map(row => row.cells[3].textContent)" % ROWS)
            self.assertEqual(shown, sorted(shown))
            self.picture("thousand")

    def test_phone_and_dark(self):
        page = self.browser
        with target() as echo, self.opened() as server, connect_through(server.port, *echo):
            page.wait("return %s.length === 1" % ROWS)
            light = page.run("return getComputedStyle(document.body).backgroundColor")
            for name, screen in (("phone", (360, 740)), ("phone-dark", (360, 740, True)), ("dark", (1280, 900, True))):
                page.screen(*screen, mobile=screen[0] == 360)
                page.wait("return innerWidth === arguments[0]", screen[0])
                self.assertLessEqual(page.run("return document.documentElement.scrollWidth"), screen[0], name)
                self.assertEqual(page.run("return getComputedStyle(document.body).backgroundColor") == light,
                                 name == "phone")
                page.run("%s[0].querySelector('button').click()" % ROWS)
                page.wait("return document.querySelectorAll('.message').length === 4")
                self.assertLessEqual(page.run("return document.getElementById('dialog').scrollWidth"), screen[0])
                self.picture(name + "-handshake")
                page.run("document.getElementById('dialog').close()")
                self.picture(name)

    def test_every_control_has_a_name_and_a_lost_server_is_shown(self):
        page = self.browser
        with target() as echo, self.opened() as server, connect_through(server.port, *echo):
            page.wait("return %s.length === 1" % ROWS)
            nameless = page.run("""return [...document.querySelectorAll("button, input, a, canvas")].filter(one =>
                !(one.textContent.trim() || one.getAttribute("aria-label") || (one.labels && one.labels.length)))
                .map(one => one.outerHTML)""")
            self.assertEqual(nameless, [])
            self.assertEqual(page.run("return document.documentElement.lang"), "en")
            server.end(9)
            page.wait("return document.querySelector('[role=alert]').textContent.includes('has not answered')")
            self.assertEqual(page.run("return document.getElementById('health').textContent"), "connection lost")
            self.assertEqual(page.run("return %s.length" % ROWS), 1, "what was known stays")
            self.picture("lost")
