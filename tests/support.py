"""What the tests share: servers to talk to, a SOCKS5 client made of raw bytes, ways to wait that are not sleeping."""
import contextlib
import ctypes
import itertools
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import textwrap
import threading
import time
import unittest
from ipaddress import ip_address
from pathlib import Path
from unittest import mock

import socks5
from socks5 import log
from socks5.access.passwords import Hash
from socks5.net import lookups
from socks5.protocol.codes import Cmd, Method, Rep
from socks5.protocol.errors import ProxyError
from socks5.protocol.messages import Address, Greeting, Login, LoginStatus, Reply, Request, Selection

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "socks5_server.py"
PATIENCE_S = 60             # for what should happen at once: long, because machines are slow
OTHER_THREADS = 4           # of a server that is one process, beside acceptors: signals, serve_forever, relay loop, log
PORTS = 200                 # of one test process, for free_ports(); its neighbours have others, below 32,000
FIRST_PORT = 20000 + int(os.environ.get("SOCKS5_TEST_PLACE") or os.getpid()) % 60 * PORTS
_ports = itertools.count()
lookups.REST_S = 0.05       # a test is over when its threads are: those that look names up would rest for a second
FREE_THREADED = bool(sysconfig.get_config_var("Py_GIL_DISABLED"))
HAS_IPV6 = False
with contextlib.suppress(OSError), socket.socket(socket.AF_INET6) as _probe:
    _probe.bind(("::1", 0))
    HAS_IPV6 = True


class Case(unittest.TestCase):
    """What a test has entered is left when the test is over."""

    def enter(self, context):
        value = context.__enter__()
        self.addCleanup(context.__exit__, None, None, None)
        return value

    def new_folder(self):
        return Path(self.enter(tempfile.TemporaryDirectory()))

    def check_refused(self, outcome, *words):
        """Our command ended with status 2 and one line on stderr that has these words; `outcome` is run_cli()'s."""
        status, out, err = outcome
        self.assertEqual((status, out), (2, ""), err)
        self.assertRegex(err, r"\Asocks5-server: [^\n]+\n\Z")
        for word in words:
            self.assertIn(word, err)

    def check_serves(self, server_address, destination):
        """A tunnel to an echo server works."""
        with connect_through(server_address, *destination) as tunnel:
            self.assertTrue(echoes(tunnel))


# ---- our server --------------------------------------------------------------------------------------------------

@contextlib.contextmanager
def served(server, *poll_interval):
    """A server of socketserver's kind in a thread of this process; what is left of it at the end is closed."""
    with server:
        thread = threading.Thread(target=server.serve_forever, args=poll_interval, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join(PATIENCE_S)


def running(handler=socks5.Handler, server_class=socks5.Server, **options):
    """Our server in a thread of this process, on a free port; what is left of it at the end is closed."""
    options.setdefault("port", 0)
    return served(server_class(socks5.Config(**options), handler))


class Spawned:
    """Our server as its users start it: a process. `lines` are those it printed, `log` what it wrote on stderr."""

    def __init__(self, *args, env=None, python=sys.executable, script=SCRIPT, prefix=(), **kwargs):
        self.process = subprocess.Popen([*prefix, python, str(script), *map(str, args)], text=True, **{
            "stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **kwargs},
            env=dict(os.environ, PYTHONUNBUFFERED="1", **(env or {})))
        self.lines, self.log = [], []
        self._news = threading.Condition()
        self._readers = [threading.Thread(target=self._read, args=pair, daemon=True)
                         for pair in ((self.process.stdout, self.lines), (self.process.stderr, self.log)) if pair[0]]
        for reader in self._readers:
            reader.start()

    def _read(self, stream, lines):
        for line in stream:
            with self._news:
                lines.append(line.rstrip("\n"))
                self._news.notify_all()
        with self._news:
            self._news.notify_all()

    def wait_line(self, pattern, lines=None, timeout=PATIENCE_S):
        """The match of the first line that has `pattern`, waiting for it; on stderr if not told otherwise."""
        lines = self.log if lines is None else lines
        deadline = time.monotonic() + timeout
        with self._news:
            while True:
                for line in lines:
                    found = re.search(pattern, line)
                    if found:
                        return found
                if self.process.poll() is not None and not any(reader.is_alive() for reader in self._readers):
                    raise AssertionError("ended with %s before %r: %s" % (
                        self.process.returncode, pattern, self.lines + self.log))
                if not self._news.wait(min(1, max(0, deadline - time.monotonic()))) and time.monotonic() > deadline:
                    raise AssertionError("no line has %r: %s" % (pattern, self.lines + self.log))

    @property
    def listening(self):
        """The lines that say where."""
        return [line for line in self.lines if line.startswith("listening on ")]

    @property
    def port(self):
        return int(self.wait_line(r"listening.*:(\d+)(?:\"})?$", self.lines).group(1))

    def end(self, number=signal.SIGTERM):
        """Signal it, and wait for its end: the exit status."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        try:
            status = self.process.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            status = self.process.wait()
        for reader in self._readers:
            reader.join(PATIENCE_S)
        for stream in filter(None, (self.process.stdout, self.process.stderr)):
            stream.close()
        return status

    def signal(self, number):               # stands last, because it hides the module of that name
        self.process.send_signal(number)


@contextlib.contextmanager
def spawned(*args, **kwargs):
    """Our server as a process, listening; ended at the end. `-p 0` unless a port is among the arguments, and `-w 1`, so
    that its descriptors and threads are those of the process that serves, unless told otherwise."""
    if "-p" not in args:
        args = (*args, "-p", "0")           # behind, because args may begin with a module's name or a program's text
    if "-w" not in args:
        args = (*args, "-w", "1")
    server = Spawned(*args, **kwargs)
    try:
        server.wait_line("listening", server.lines)
        yield server
    finally:
        server.end(signal.SIGKILL)


@contextlib.contextmanager
def script(text):
    """The path of our command with other code in front: what it changes is changed before main() runs."""
    with tempfile.NamedTemporaryFile("w", suffix=".py") as file:
        file.write("import os, signal, sys\nsys.path.insert(0, %r)\n%s\n"
                   "from socks5 import cli\nsys.exit(cli.main())\n" % (str(ROOT), text))
        file.flush()
        yield file.name


def users_line(name, password):
    """A line of a users file, whose hash takes no time, but is one of the slow ones to the server."""
    return "%s:%s" % (name, Hash.of(password, "scrypt", (2, 1, 1)))


def run_cli(*args, env=None, input=None, cwd=None, timeout=PATIENCE_S, python=sys.executable):
    """Run our command to its end: (exit status, stdout, stderr)."""
    done = subprocess.run([python, str(SCRIPT), *map(str, args)], capture_output=True, text=True, input=input, cwd=cwd,
                          timeout=timeout, env=dict(os.environ, **(env or {})))
    return done.returncode, done.stdout, done.stderr


def run_python(*args, **kwargs):
    """Run this Python to its end, in the folder of the project unless told otherwise: (exit status, stdout, stderr)."""
    done = subprocess.run([sys.executable, *map(str, args)], **{
        "cwd": str(ROOT), "capture_output": True, "text": True, "timeout": PATIENCE_S, **kwargs})
    return done.returncode, done.stdout, done.stderr


# ---- the log -----------------------------------------------------------------------------------------------------

def text_of(record):
    """A record as the text log shows it, without the time."""
    return log.TextFormatter(False).format(record)


@contextlib.contextmanager
def logging_of(test, level="INFO"):
    """As test.assertLogs("socks5", level), but `output` are lines as the text log shows them."""
    with test.assertLogs("socks5", level) as logs:
        yield Lines(logs.records)


@contextlib.contextmanager
def time_zone(name):
    try:
        with mock.patch.dict(os.environ, TZ=name):
            time.tzset()
            yield
    finally:
        time.tzset()


class Lines:
    def __init__(self, records):
        self.records = records

    @property
    def output(self):
        return [text_of(record) for record in self.records]

    def wait(self, pattern):
        """The first line that has `pattern`, waiting for it."""
        def found():
            return next((line for line in self.output if re.search(pattern, line)), None)

        try:
            wait_until(found)
        except AssertionError:
            raise AssertionError("no line has %r: %s" % (pattern, self.output)) from None
        return found()


# ---- the client's side, byte by byte -----------------------------------------------------------------------------

def reader_of(sock):
    """read(n) for the parsers of wire.py, from a blocking socket, never asking for more than n."""
    def read(size):
        data = b""
        while len(data) < size:
            piece = sock.recv(size - len(data))
            if not piece:
                raise EOFError("closed after %d of %d bytes" % (len(data), size))
            data += piece
        return data
    return read


def dial(server_address, timeout=PATIENCE_S, source=None):
    """A TCP connection to our server, from the address `source` if one is given; server_address as (host, port, ...) or
    a port on 127.0.0.1."""
    if isinstance(server_address, int):
        server_address = ("127.0.0.1", server_address)
    return socket.create_connection(server_address[:2], timeout, source and (source, 0))


def address(host, port):
    """An Address from the text of an IP address or from a name; bytes are always a name."""
    if isinstance(host, bytes):
        return Address(host, port)
    try:
        return Address(ip_address(host), port)
    except ValueError:
        return Address(host.encode("utf-8"), port)


def negotiate(sock, user=None):
    """Greeting and, with user=(name, password) in bytes, the login. Raises AssertionError when we are not let in."""
    read = reader_of(sock)
    sock.sendall(Greeting(bytes([Method.USERNAME_PASSWORD if user else Method.NO_AUTHENTICATION])).pack())
    method = Selection.parse(read).method
    if method == Method.USERNAME_PASSWORD:
        sock.sendall(Login(*user).pack())
        assert LoginStatus.parse(read).status == 0, "login refused"
    else:
        assert method == Method.NO_AUTHENTICATION, "METHOD 0x%02x" % method


def greeted(server_address, user=None, source=None):
    """A connection to our server, with the METHOD chosen and the login done: the request comes next."""
    with contextlib.ExitStack() as stack:
        sock = stack.enter_context(dial(server_address, source=source))
        negotiate(sock, user)
        stack.pop_all()
        return sock


def ask(sock, cmd, host, port):
    """Send a request and read its (first) reply."""
    sock.sendall(Request(cmd, address(host, port)).pack())
    return Reply.parse(reader_of(sock))


def connect_through(server_address, host, port, user=None, source=None):
    """A socket connected to host:port through our server, or AssertionError with the REP."""
    with contextlib.ExitStack() as stack:
        sock = stack.enter_context(greeted(server_address, user, source))
        reply = ask(sock, Cmd.CONNECT, host, port)
        assert reply.rep == Rep.SUCCEEDED, reply
        stack.pop_all()
        return sock


def refusal(test, call, *args, **kwargs):
    """The REP with which the proxy refuses what our client calls."""
    with test.assertRaises(ProxyError) as caught:
        call(*args, **kwargs).close()
    return caught.exception.rep


def read_to_end(sock):
    """Everything until EOF."""
    pieces = []
    while True:
        piece = sock.recv(1 << 16)
        if not piece:
            return b"".join(pieces)
        pieces.append(piece)


def heard(sock, said=b""):
    """What comes next after `said` was sent, as far as it could be; b"" for EOF and for a reset."""
    try:
        sock.sendall(said)
        return sock.recv(1 << 16)
    except ConnectionError:
        return b""


def echoes(tunnel, data=b"ping"):
    """Whether `tunnel` brings back what is sent into it."""
    tunnel.sendall(data)
    return reader_of(tunnel)(len(data)) == data


def refuses(port):
    """Whether nothing listens on this port of 127.0.0.1 any more. A connection that is reset was still accepted."""
    try:
        dial(port).close()
    except ConnectionRefusedError:
        return True
    except ConnectionError:
        pass
    return False


def reset(sock):
    """Close with RST."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    sock.close()


# ---- the far side ------------------------------------------------------------------------------------------------

@contextlib.contextmanager
def target(serve=None, host="127.0.0.1", port=0):
    """A TCP server that runs serve(connection) in a thread for each client; the default echoes until EOF, then closes.

    Yields its (host, port). Exceptions of `serve` that are the peer's doing (OSError) are swallowed.
    """
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind((host, port))
    listener.listen(1024)

    def one(connection):
        with connection, contextlib.suppress(OSError):
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            (serve or echo)(connection)

    def loop():
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=one, args=(listener.accept()[0],), daemon=True).start()

    thread = threading.Thread(target=loop, daemon=True)
    thread.start()
    try:
        yield listener.getsockname()[:2]
    finally:
        with contextlib.suppress(OSError):
            listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join(PATIENCE_S)


def echo(connection):
    while True:
        data = connection.recv(1 << 16)
        if not data:
            return
        connection.sendall(data)


def udp_socket(host="127.0.0.1", port=0):
    sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_DGRAM)
    sock.bind((host, port))
    sock.settimeout(PATIENCE_S)
    return sock


@contextlib.contextmanager
def taken_port():
    """A port of 127.0.0.1 on which something listens."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        yield taken.getsockname()[1]


def free_ports(number, *hosts):
    """The first of so many ports in a row that TCP and UDP have free on all of these addresses (127.0.0.1 if none is
    given): below those that the kernel gives to sockets that bind to any port or connect, and from a range of this
    process, so that none is taken before it is used, nor given twice within a short time."""
    while True:
        low = FIRST_PORT + next(_ports) % PORTS
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
            for host, port, kind in itertools.product(hosts or ["127.0.0.1"], range(low, low + number),
                                                      (socket.SOCK_STREAM, socket.SOCK_DGRAM)):
                sock = stack.enter_context(socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, kind))
                sock.bind((host, port))
            for _ in range(1, number):
                next(_ports)
            return low


def authorizing(authorizer):
    """A Handler class whose clients are authorized by this one."""
    return type("Handler", (socks5.Handler,), {"AuthorizerClass": authorizer})


def closed_port(*hosts):
    """A port on which nothing listens, on none of these addresses."""
    return free_ports(1, *hosts)


# ---- waiting, counting, skipping ---------------------------------------------------------------------------------

def wait_until(condition, what="", timeout=PATIENCE_S):
    """Poll a condition of which no event tells, such as a count in /proc. AssertionError after `timeout`."""
    deadline = time.monotonic() + timeout
    never = threading.Event()
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError("did not happen: %s" % (what or condition))
        never.wait(0.01)


def in_threads(number, call, *args):
    """call(*args) in so many threads at once, to their ends."""
    threads = [threading.Thread(target=call, args=args, daemon=True) for _ in range(number)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)


def descriptors(pid="self"):
    return len(os.listdir("/proc/%s/fd" % pid))


def threads(pid="self"):
    return len(os.listdir("/proc/%s/task" % pid))


def resident_kib(pid):
    with open("/proc/%d/status" % pid) as file:
        return int(re.search(r"VmRSS:\s+(\d+)", file.read()).group(1))


def children(pid):
    with open("/proc/%d/task/%d/children" % (pid, pid)) as file:
        return list(map(int, file.read().split()))


def need(test, present, what):
    """Skip `test`, and say why, where `what` is missing; fail instead where CI has installed all that it needs."""
    if not present:
        if os.environ.get("SOCKS5_REQUIRE_CLIENTS") == "1":
            test.fail("%s is required here" % what)
        test.skipTest("%s is not here" % what)


def need_program(test, name):
    """The path of a real client or server program, or skip."""
    path = shutil.which(name) or shutil.which(name, path="/usr/sbin:/sbin:/usr/local/sbin")
    need(test, path, name)
    return path


def by_another_clock(test, *command, env=None):
    """What a command prints that runs by faketime, whose options come first. A semaphore that another faketime left
    behind has a process id in its name: the next process has another one."""
    for _ in range(10):
        done = subprocess.run([need_program(test, "faketime"), *command], cwd=str(ROOT), timeout=PATIENCE_S, text=True,
                              env=dict(os.environ, **(env or {})), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        if not done.returncode:
            return done.stdout.strip()
        if "sem_open: File exists" not in done.stderr:
            break
    raise AssertionError(done.stderr)


# ---- README.rst ---------------------------------------------------------------------------------------------------

def readme_blocks(language):
    """The code blocks of README.rst in this language; "" for those behind `::`."""
    text = (ROOT / "README.rst").read_text(encoding="utf-8")
    begin = r"\.\. code-block:: %s" % language if language else r"(?:|.*[^:])::"
    return [textwrap.dedent(block).strip() + "\n"
            for block in re.findall(r"(?m)^%s\n\n((?:(?: +.*)?\n)+)" % begin, text)]


def readme_block(language, word):
    """The first of them that has `word` in it."""
    return next(block for block in readme_blocks(language) if word in block)


# ---- two hosts ---------------------------------------------------------------------------------------------------

NEAR = {4: "198.51.100.1", 6: "2001:db8:51::1"}
FAR = {4: "198.51.100.2", 6: "2001:db8:51::2"}


class TwoHosts:
    """For a TestCase: two network namespaces with a cable between them, the proxy on the near one."""

    @classmethod
    def setUpClass(cls):
        cls.names = ["socks5-%s-%d" % (end, os.getpid()) for end in ("near", "far")]
        try:
            for name in cls.names:
                subprocess.run(["ip", "netns", "add", name], check=True, capture_output=True)
                cls.addClassCleanup(subprocess.run, ["ip", "netns", "del", name], capture_output=True)
            ip = "ip -n %s " % cls.names[0]
            lines = [ip + "link add cable type veth peer name cable netns %s" % cls.names[1]]
            for name, addresses in zip(cls.names, (NEAR, FAR)):
                ip = "ip -n %s " % name
                lines += [ip + "link set lo up", ip + "addr add %s/24 dev cable" % addresses[4],
                          ip + "addr add %s/64 dev cable nodad" % addresses[6], ip + "link set cable up"]
            for line in lines:
                subprocess.run(line.split(), check=True, capture_output=True)
            cls.why_not = ""
        except (OSError, subprocess.CalledProcessError) as exc:
            cls.why_not = str(getattr(exc, "stderr", None) or exc)

    def setUp(self):
        need(self, not self.why_not, "the right to make network namespaces (%s)" % self.why_not)

    def at(self, name, function, *args, **kwargs):
        """function() in a thread that has moved to the namespace: sockets that it makes live there for good."""
        outcome = []

        def run():
            with open("/run/netns/" + name) as namespace:
                if ctypes.CDLL(None, use_errno=True).setns(namespace.fileno(), 0x40000000):     # CLONE_NEWNET
                    outcome.append(OSError(ctypes.get_errno(), "setns"))
                    return
            try:
                outcome.append(function(*args, **kwargs))
            except Exception as exc:
                outcome.append(exc)

        thread = threading.Thread(target=run)
        thread.start()
        thread.join(PATIENCE_S)
        if isinstance(outcome[0], Exception):
            raise outcome[0]
        return outcome[0]

    def near(self, function, *args, **kwargs):
        return self.at(self.names[0], function, *args, **kwargs)

    def far(self, function, *args, **kwargs):
        return self.at(self.names[1], function, *args, **kwargs)

    def proxy(self, *args):
        return spawned(*args, prefix=("ip", "netns", "exec", self.names[0]))
