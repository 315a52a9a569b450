"""A headless Chromium for the tests, driven by chromedriver over HTTP.  https://www.w3.org/TR/webdriver2/"""
import base64
import contextlib
import http.client
import json
import subprocess
import tempfile
import time

from tests.support import PATIENCE_S, need_program

ARGUMENTS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
             "--disable-background-networking", "--disable-component-update", "--no-proxy-server"]


class Browser:
    """One window. `run` evaluates the body of a function in the page; `wait` until one returns something true."""

    def __init__(self, port, chromium):
        self.port = port
        self.session = ""
        capabilities = {"alwaysMatch": {"goog:chromeOptions": {"binary": chromium, "args": ARGUMENTS},
                                        "goog:loggingPrefs": {"browser": "ALL"}}}
        self.session = self.call("POST", "", {"capabilities": capabilities})["sessionId"]

    def call(self, method, path, body=None):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        with contextlib.closing(connection):
            where = "/session" + (self.session and "/" + self.session) + path
            connection.request(method, where, None if body is None else json.dumps(body))
            answer = json.loads(connection.getresponse().read())["value"]
        if isinstance(answer, dict) and "error" in answer:
            raise AssertionError("%s: %s" % (answer["error"], answer["message"]))
        return answer

    def go(self, url):
        self.call("POST", "/url", {"url": url})

    def run(self, script, *args):
        return self.call("POST", "/execute/sync", {"script": script, "args": args})

    def wait(self, script, *args):
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            found = self.run("return new Promise(done => setTimeout(() => done((() => {%s})(...arguments)), 30))"
                             % script, *args)
            if found:
                return found
        raise AssertionError("never true in the page: %s\n%s" % (script, self.run("return document.body.innerText")))

    def devtools(self, command, **parameters):
        return self.call("POST", "/goog/cdp/execute", {"cmd": command, "params": parameters})

    def screen(self, width, height, dark=False, mobile=False):
        self.devtools("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1,
                      mobile=mobile)
        self.devtools("Emulation.setEmulatedMedia", features=[
            {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}])

    def screenshot(self):
        return base64.b64decode(self.call("GET", "/screenshot"))

    def key(self, name):
        keys = {"Tab": "\ue004", "Enter": "\ue007", "Escape": "\ue00c"}
        actions = [{"type": kind, "value": keys[name]} for kind in ("keyDown", "keyUp")]
        self.call("POST", "/actions", {"actions": [{"type": "key", "id": "keys", "actions": actions}]})

    def complaints(self):
        """What the browser's console says of errors."""
        return [entry["message"] for entry in self.call("POST", "/se/log", {"type": "browser"})
                if entry["level"] == "SEVERE"]


@contextlib.contextmanager
def browser(test):
    """A Browser; skips the test, and says why, where there is none."""
    chromium = need_program(test, "chromium")
    with tempfile.TemporaryDirectory() as folder, driver(need_program(test, "chromedriver"), folder) as port:
        window = Browser(port, chromium)
        try:
            yield window
        finally:
            window.call("DELETE", "")


@contextlib.contextmanager
def driver(program, folder):
    """The port of a chromedriver. It takes a free port of IPv4 and the same of IPv6; where another program has that, it
    ends, and is started again."""
    for _ in range(10):
        with subprocess.Popen([program, "--port=0"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
                              cwd=folder) as process:
            try:
                line = next((line for line in process.stdout if "successfully on port" in line), "")
                if line:
                    yield int(line.rstrip().rstrip(".").rpartition(" ")[2])
                    return
            finally:
                process.kill()
    raise AssertionError("%s does not start" % program)
