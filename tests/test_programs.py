"""More real clients through the server, each at its own job, with and without a password; test_clients.py has curl and
git. What is not installed is skipped, or fails under SOCKS5_REQUIRE_CLIENTS=1."""
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from .support import PATIENCE_S, closed_port, need, need_program, spawned
from .test_clients import Case, environment, web

HELLO = "hello from the other side\n"
SLOW_S = 120                        # a browser that starts beside the other tests, uTP's slow start
USERS = (("", ""), ("alice", "s3cret"))

PYTHON = {
    "requests": """
import requests, sys
proxy, url = sys.argv[1:]
print(requests.get(url, proxies={"http": proxy}, timeout=60).text, end="")
""",
    "httpx": """
import httpx, sys
proxy, url = sys.argv[1:]
with httpx.Client(proxy=proxy.replace("socks5h", "socks5"), timeout=60) as client:
    print(client.get(url).text, end="")
""",
    "python_socks": """
import sys
from urllib.parse import urlsplit
from python_socks.sync import Proxy
proxy, url = sys.argv[1:]
where = urlsplit(url)
sock = Proxy.from_url(proxy.replace("socks5h", "socks5"), rdns=True).connect(where.hostname, where.port, timeout=60)
sock.sendall(b"GET / HTTP/1.0\\r\\n\\r\\n")
print(sock.makefile("rb").read().split(b"\\r\\n\\r\\n", 1)[1].decode(), end="")
""",
    "aiohttp_socks": """
import aiohttp, asyncio, sys
from aiohttp_socks import ProxyConnector
proxy, url = sys.argv[1:]
async def main():
    connector = ProxyConnector.from_url(proxy.replace("socks5h", "socks5"), rdns=True)
    async with aiohttp.ClientSession(connector=connector) as session, session.get(url) as answer:
        print(await answer.text(), end="")
asyncio.run(main())
"""}

# Two peers, one of them behind the proxy; both speak uTP only, which is UDP. Prints whether all of the file came.
LIBTORRENT = """
import os, sys, time
import libtorrent
folder, port, user, password, seconds = sys.argv[1:]
for name in "seed", "leech":
    os.makedirs(os.path.join(folder, name))
data = os.urandom(1 << 20)
with open(os.path.join(folder, "seed", "file"), "wb") as file:
    file.write(data)
files = libtorrent.file_storage()
libtorrent.add_files(files, os.path.join(folder, "seed", "file"))
made = libtorrent.create_torrent(files)
libtorrent.set_piece_hashes(made, os.path.join(folder, "seed"))
torrent = libtorrent.bencode(made.generate())

def peer(name, **settings):
    session = libtorrent.session({
        "enable_dht": False, "enable_lsd": False, "enable_upnp": False, "enable_natpmp": False,
        "enable_outgoing_tcp": False, "enable_incoming_tcp": False, "listen_interfaces": "127.0.0.1:0", **settings})
    what = libtorrent.add_torrent_params()
    what.ti, what.save_path = libtorrent.torrent_info(torrent), os.path.join(folder, name)
    return session, session.add_torrent(what)

kind = libtorrent.proxy_type_t.socks5_pw if user else libtorrent.proxy_type_t.socks5
seed, full = peer("seed")
leech, got = peer("leech", proxy_type=int(kind), proxy_hostname="127.0.0.1", proxy_port=int(port),
                  proxy_username=user, proxy_password=password, proxy_peer_connections=True)

def complete():                     # a piece counts as seeded when its hash is right; its bytes reach the file later
    with open(os.path.join(folder, "leech", "file"), "rb") as file:
        return file.read() == data

deadline, dial_at = time.monotonic() + float(seconds), 0.0
while time.monotonic() < deadline and not (got.status().is_seeding and complete()):
    if full.status().is_seeding and time.monotonic() > dial_at:
        got.connect_peer(("127.0.0.1", seed.listen_port()))
        dial_at = time.monotonic() + 1
    time.sleep(0.02)
print("complete" if got.status().is_seeding and complete() else "not complete")
"""

NODE_AGENT = """
const [modules, proxy, url] = process.argv.slice(1);
import(modules + '/socks-proxy-agent/dist/index.js').then(({ SocksProxyAgent }) =>
  require('http').get(url, { agent: new SocksProxyAgent(proxy) }, answer => answer.pipe(process.stdout)));
"""

FIREFOX = {                         # the preferences behind Settings, Network Settings; and no errands of its own
    "network.proxy.type": 1, "network.proxy.socks": "127.0.0.1", "network.proxy.socks_version": 5,
    "network.proxy.socks_remote_dns": True, "network.proxy.allow_hijacking_localhost": True,
    "network.captive-portal-service.enabled": False, "network.connectivity-service.enabled": False,
    "app.update.enabled": False, "datareporting.policy.dataSubmissionEnabled": False,
    "toolkit.telemetry.enabled": False, "browser.safebrowsing.downloads.enabled": False,
    "browser.safebrowsing.malware.enabled": False, "browser.safebrowsing.phishing.enabled": False,
    "services.settings.server": "http://127.0.0.1:1/", "extensions.update.enabled": False,
    "browser.shell.checkDefaultBrowser": False, "browser.aboutwelcome.enabled": False,
    "browser.chrome.site_icons": False}

JAVA = """
public class Get {
    public static void main(String[] args) throws Exception {
        if (args.length > 1)
            java.net.Authenticator.setDefault(new java.net.Authenticator() {
                protected java.net.PasswordAuthentication getPasswordAuthentication() {
                    return new java.net.PasswordAuthentication(args[1], args[2].toCharArray());
                }
            });
        try (java.io.InputStream in = new java.net.URL(args[0]).openStream()) { in.transferTo(System.out); }
    }
}
"""

SOCKSIFIED = """
import sys, urllib.request
print(urllib.request.urlopen(sys.argv[1]).read().decode(), end="")
"""


class Program(Case):
    def each(self, client, users=USERS, seen=r"(127\.0\.0\.1|'localhost')"):
        """client(server, page's port, user, password) prints the page; our log has its session."""
        port = self.enter(web())
        for user, password in users:
            with self.subTest(user or "anonymous"), spawned(*["-u", "%s:%s" % (user, password)] * bool(user)) as server:
                self.assertIn(HELLO.strip(), client(server, port, user, password))
                server.wait_line("session .*user=%s cmd=CONNECT dst=%s:%d .*rep=SUCCEEDED" % (
                    "'%s'" % user if user else "-", seen, port))

    @staticmethod
    def url(server, user, password):
        return "socks5h://%s127.0.0.1:%d" % (user and "%s:%s@" % (user, password), server.port)


class Netcats(Program):
    REQUEST = "GET / HTTP/1.0\r\n\r\n"

    def ask(self, *args):
        done = subprocess.run(list(map(str, args)), input=self.REQUEST, capture_output=True, text=True,
                              timeout=PATIENCE_S, env=environment())
        self.assertEqual(done.returncode, 0, done.stderr)
        return done.stdout

    def test_ncat(self):
        ncat = need_program(self, "ncat")
        self.each(lambda server, port, user, password: self.ask(
            ncat, "--proxy-type", "socks5", "--proxy", "127.0.0.1:%d" % server.port,
            *["--proxy-auth", "%s:%s" % (user, password)] * bool(user), "--proxy-dns", "remote", "localhost", port))

    def test_netcat_openbsd(self):
        nc = need_program(self, "nc.openbsd")
        self.each(lambda server, port, *_: self.ask(
            nc, "-X", "5", "-x", "127.0.0.1:%d" % server.port, "localhost", port), USERS[:1])


class Wrappers(Program):
    def setUp(self):
        self.conf = self.new_folder() / "conf"

    def test_proxychains4(self):
        proxychains, curl = need_program(self, "proxychains4"), need_program(self, "curl")

        def client(server, port, user, password):
            self.conf.write_text("proxy_dns\n[ProxyList]\nsocks5 127.0.0.1 %d %s %s\n" % (server.port, user, password))
            return self.run_client(proxychains, "-q", "-f", self.conf, curl, "-q", "-sS",
                                   "http://127.0.0.1:%d/" % port)

        self.each(client)

    def test_dante_socksify(self):
        socksify = need_program(self, "socksify")

        def client(server, port, user, password):
            self.conf.write_text(
                "resolveprotocol: fake\nroute {\nfrom: 0.0.0.0/0 to: 0.0.0.0/0 via: 127.0.0.1 port = %d\n"
                "protocol: tcp\ncommand: connect\nproxyprotocol: socks_v5\nmethod: %s\n}\n" % (
                    server.port, "username" if user else "none"))
            return self.run_client(socksify, sys.executable, "-c", SOCKSIFIED, "http://localhost:%d/" % port,
                                   env=environment(SOCKS_CONF=str(self.conf), SOCKS_USERNAME=user,
                                                   SOCKS_PASSWORD=password))

        self.each(client)


class Ssh(Program):
    def test_ProxyCommand(self):
        ssh, sshd, keygen, nc = (need_program(self, name) for name in ("ssh", "sshd", "ssh-keygen", "nc.openbsd"))
        need(self, os.geteuid() == 0, "root, because sshd lets only root in")
        os.makedirs("/run/sshd", exist_ok=True)             # sshd's privilege separation directory
        folder = self.new_folder()
        key, port = folder / "key", closed_port()
        self.run_client(keygen, "-q", "-t", "ed25519", "-N", "", "-f", key)
        options = ["Port %d" % port, "ListenAddress 127.0.0.1", "HostKey %s" % key, "AuthorizedKeysFile %s.pub" % key,
                   "StrictModes no", "PidFile none", "UsePAM no", "PermitRootLogin yes"]
        (folder / "sshd").write_text("\n".join(options) + "\n")
        process = subprocess.Popen([sshd, "-D", "-e", "-f", str(folder / "sshd")], stdin=subprocess.DEVNULL,
                                   stderr=subprocess.PIPE, text=True)
        try:
            self.assertIn("listening", process.stderr.readline())
            server = self.enter(spawned())
            said = self.run_client(ssh, "-F", "none", "-i", key, "-p", port, "-o", "StrictHostKeyChecking=no",
                                   "-o", "UserKnownHostsFile=%s" % (folder / "known"), "-o", "BatchMode=yes",
                                   "-o", "ProxyCommand=%s -X 5 -x 127.0.0.1:%d %%h %%p" % (nc, server.port),
                                   "root@127.0.0.1", "echo", "hello")
            self.assertEqual(said, "hello\n")
            server.wait_line(r"session .*cmd=CONNECT dst=127\.0\.0\.1:%d .*rep=SUCCEEDED" % port)
        finally:
            process.terminate()
            process.communicate(timeout=PATIENCE_S)


class Libraries(Program):
    def test_python(self):
        python = os.environ.get("SOCKS5_VENV_PYTHON")
        need(self, python, "a Python with client libraries (SOCKS5_VENV_PYTHON)")
        there = self.run_client(python, "-c", "import sys, importlib.util as u; "
                                "print(*(name for name in sys.argv[1:] if u.find_spec(name)))", *PYTHON).split()
        port = self.enter(web())
        for user, password in USERS:
            with spawned(*["-u", "%s:%s" % (user, password)] * bool(user)) as server:
                for name, script in PYTHON.items():
                    with self.subTest(name, user=user):
                        need(self, name in there, name)
                        server.log.clear()
                        self.assertEqual(self.run_client(python, "-c", script, self.url(server, user, password),
                                                         "http://localhost:%d/" % port), HELLO)
                        server.wait_line("session .*cmd=CONNECT dst='localhost':%d .*rep=SUCCEEDED" % port)

    def test_node_socks_proxy_agent(self):
        node, modules = need_program(self, "node"), os.environ.get("SOCKS5_NODE_MODULES", "")
        need(self, os.path.isdir(os.path.join(modules, "socks-proxy-agent")), "Node's socks-proxy-agent")
        self.each(lambda server, port, *user: self.run_client(
            node, "-e", NODE_AGENT, modules, self.url(server, *user), "http://localhost:%d/" % port),
                  seen="'localhost'")

    def test_java(self):
        java, javac = need_program(self, "java"), need_program(self, "javac")
        folder = self.new_folder()
        (folder / "Get.java").write_text(JAVA)
        self.run_client(javac, "-d", folder, folder / "Get.java")
        self.each(lambda server, port, *user: self.run_client(
            java, "-Xshare:auto", "-XX:TieredStopAtLevel=1", "-DsocksProxyHost=127.0.0.1",
            "-DsocksProxyPort=%d" % server.port, "-DsocksNonProxyHosts=", "-Dhttp.nonProxyHosts=", "-cp", folder, "Get",
            "http://localhost:%d/" % port, *filter(None, user)))


class Torrents(Program):
    def test_libtorrent(self):
        """Its peers speak UDP through UDP ASSOCIATE: a megabyte."""
        python = os.environ.get("SOCKS5_VENV_PYTHON")
        need(self, python and not subprocess.run([python, "-c", "import libtorrent"],
                                                 stderr=subprocess.DEVNULL).returncode,
             "a Python with libtorrent (SOCKS5_VENV_PYTHON)")
        for user, password in USERS:
            with self.subTest(user or "anonymous"), tempfile.TemporaryDirectory() as folder, \
                    spawned(*["-u", "%s:%s" % (user, password)] * bool(user)) as server:
                said = self.run_client(python, "-c", LIBTORRENT, folder, server.port, user, password, SLOW_S / 2,
                                       timeout=SLOW_S)
                self.assertEqual(said, "complete\n")
                moved = server.wait_line(r"session .*user=%s cmd=UDP_ASSOCIATE .*rep=SUCCEEDED up=(\d+) down=(\d+) " % (
                    "'%s'" % user if user else "-"))
                self.assertGreater(int(moved.group(2)), 1 << 20)


class Browsers(Program):
    def test_chromium(self):
        """It has no password for SOCKS5."""
        chromium = need_program(self, "chromium")
        folder = self.enter(tempfile.TemporaryDirectory(ignore_cleanup_errors=True) if sys.version_info >= (3, 10)
                            else tempfile.TemporaryDirectory())
        self.each(lambda server, port, *_: self.run_client(
            chromium, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
            "--user-data-dir=" + folder, "--proxy-server=socks5://127.0.0.1:%d" % server.port,
            "--proxy-bypass-list=<-loopback>", "--dump-dom", "http://localhost:%d/" % port,
            env=dict(environment(), HOME=folder)), USERS[:1], seen="'localhost'")

    def test_firefox(self):
        """It has no field for a password, either. It takes a picture of the page, and ends."""
        firefox = need_program(self, "firefox-esr")
        folder = Path(self.enter(tempfile.TemporaryDirectory(ignore_cleanup_errors=True) if sys.version_info >= (3, 10)
                                 else tempfile.TemporaryDirectory()))

        def visit(server, port, *_):
            profile = folder / "profile"
            profile.mkdir()
            (profile / "user.js").write_text("".join(
                "user_pref(%s, %s);\n" % (json.dumps(name), json.dumps(value)) for name, value in FIREFOX.items())
                + 'user_pref("network.proxy.socks_port", %d);\n' % server.port)
            self.run_client(firefox, "--headless", "--no-remote", "--profile", profile, "--screenshot",
                            folder / "page.png", "http://localhost:%d/" % port,
                            env=dict(environment(), HOME=str(folder)), timeout=SLOW_S)
            self.assertEqual((folder / "page.png").read_bytes()[:4], b"\x89PNG")
            return HELLO

        self.each(visit, USERS[:1], seen="'localhost'")
