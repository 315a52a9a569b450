"""Several servers behind a real load balancer: HAProxy; and behind stunnel. Both name the client in a PROXY header."""
import contextlib
import os
import signal
import socket
import ssl
import subprocess
import threading
import time

from socks5.protocol.codes import Cmd, Rep
from tests import support
from tests.support import (PATIENCE_S, ask, closed_port, connect_through, dial, echoes, need_program, negotiate,
                           spawned, target, wait_until)

CLIENTS = int(os.environ.get("SOCKS5_REPLICA_CLIENTS", "60"))       # tunnels that are open when a replica is killed
HAPROXY = """
global
    stats socket %(admin)s mode 600 level admin
    maxconn 2000
defaults
    mode tcp
    timeout connect 20s
    timeout check 20s
    timeout client 1h
    timeout server 1h
    option redispatch 1
frontend socks
    bind 127.0.0.1:%(port)d
    default_backend replicas
backend replicas
    balance leastconn
    default-server send-proxy-v2 check check-send-proxy inter 200ms fall 2 rise 1
"""
STUNNEL = """
foreground = yes
pid =
[socks]
accept = 127.0.0.1:%(port)d
connect = 127.0.0.1:%(server)d
protocol = proxy
cert = %(folder)s/cert
key = %(folder)s/key
"""


class Case(support.Case):
    def setUp(self):
        self.echo = self.enter(target())

    def start(self, *command, port):
        """A program that listens on this port."""
        process = self.enter(subprocess.Popen([*map(str, command)], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                                              stderr=subprocess.DEVNULL))
        self.addCleanup(process.kill)

        def listens():
            self.assertIsNone(process.poll(), "%s has ended" % command[0])
            with contextlib.suppress(OSError):
                dial(port).close()
                return True
        wait_until(listens)


class Newcomers(threading.Thread):
    """Clients that come one after the other, each for one round trip, until they are told to stop."""

    def __init__(self, port, destination):
        super().__init__(daemon=True)
        self.port, self.destination = port, destination
        self.served, self.failed = 0, []                    # when each of those began, and why
        self.over = threading.Event()

    def run(self):
        while not self.over.is_set():
            began = time.monotonic()
            try:
                with connect_through(self.port, *self.destination) as sock:
                    assert echoes(sock)
                self.served += 1
            except (OSError, EOFError, AssertionError) as exc:
                self.failed.append((began, repr(exc)))

    def wait_for(self, more):
        served = self.served
        wait_until(lambda: self.served >= served + more, "new clients are served")


class HAProxy(Case):
    def setUp(self):
        super().setUp()
        program = need_program(self, "haproxy")
        folder = self.new_folder()
        self.admin, self.port = folder / "admin", closed_port()
        self.replicas = {name: self.enter(spawned("--proxy-protocol", "127.0.0.1", "--open", "--drain-timeout", "600"))
                         for name in "abc"}
        (folder / "cfg").write_text(HAPROXY % {"admin": self.admin, "port": self.port} + "".join(
            "    server %s 127.0.0.1:%d\n" % (name, replica.port) for name, replica in self.replicas.items()))
        self.start(program, "-db", "-f", folder / "cfg", port=self.port)

    def command(self, line):
        """An order for HAProxy, over its administrators' socket."""
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(PATIENCE_S)
            sock.connect(str(self.admin))
            sock.sendall(line.encode() + b"\n")
            return b"".join(iter(lambda: sock.recv(4096), b"")).decode().strip()

    def replica_of(self, sock):
        """Which replica has this tunnel."""
        for name, replica in self.replicas.items():
            live = [line for line in replica.log if "live id=" in line]
            if any(" client=127.0.0.1:%d " % sock.getsockname()[1] in line for line in live):
                return name

    def test_one_is_killed_and_one_drained(self):
        tunnels = [self.enter(connect_through(self.port, *self.echo)) for _ in range(CLIENTS)]
        for replica in self.replicas.values():
            replica.signal(signal.SIGUSR1)
            replica.wait_line("live sessions=")
        where = {sock: self.replica_of(sock) for sock in tunnels}
        counts = [list(where.values()).count(name) for name in "abc"]
        self.assertEqual(sum(counts), CLIENTS)
        self.assertGreaterEqual(min(counts), CLIENTS // 4, "leastconn has spread them")

        newcomers = Newcomers(self.port, self.echo)
        newcomers.start()
        newcomers.wait_for(5)
        self.replicas["a"].end(signal.SIGKILL)
        killed_at = time.monotonic()
        newcomers.wait_for(20)
        self.assertEqual(self.command("set server replicas/b state drain"), "")
        newcomers.wait_for(2)                               # what was on its way to it before the order has arrived
        self.replicas["b"].signal(signal.SIGTERM)
        newcomers.wait_for(20)
        lost = {sock for sock in tunnels if not self.answers(sock)}
        newcomers.wait_for(5)
        newcomers.over.set()
        newcomers.join(PATIENCE_S)

        self.assertEqual([where[sock] for sock in lost], ["a"] * counts[0])
        # Until it is dead, its listener completes connections that it does not accept: these are lost with it.
        self.assertEqual([why for began, why in newcomers.failed if began > killed_at], [])
        for sock in tunnels:
            sock.close()
        self.assertEqual(self.replicas["b"].process.wait(PATIENCE_S), 0)
        self.assertFalse([line for line in self.replicas["b"].log if "cut off" in line])

    def answers(self, sock):
        try:
            return echoes(sock)
        except (ConnectionError, EOFError):
            return False

    def test_the_client_is_seen_and_the_health_check_is_not(self):
        for source in ("127.0.0.7", "127.0.0.8"):
            connect_through(self.port, *self.echo, source=source).close()
        wait_until(lambda: sum(" client=127.0.0.%d:" % number in line and "rep=SUCCEEDED" in line for number in (7, 8)
                               for replica in self.replicas.values() for line in replica.log) == 2)
        wait_until(lambda: all("UP" in self.command("show stat").split("replicas,%s," % name)[1].split("\n")[0]
                               for name in "abc"))
        for replica in self.replicas.values():
            self.assertFalse([line for line in replica.log if "PROXY" in line])


class Stunnel(Case):
    def test_tls_in_front(self):
        stunnel, openssl = need_program(self, "stunnel"), need_program(self, "openssl")
        folder = self.new_folder()
        subprocess.run([openssl, "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2",
                        "-subj", "/CN=localhost", "-keyout", str(folder / "key"), "-out", str(folder / "cert")],
                       check=True, capture_output=True)
        server = self.enter(spawned("--proxy-protocol", "127.0.0.1", "-u", "alice:secret"))
        port = closed_port()
        (folder / "conf").write_text(STUNNEL % {"port": port, "server": server.port, "folder": folder})
        self.start(stunnel, folder / "conf", port=port)
        tls = ssl.create_default_context(cafile=str(folder / "cert"))
        tls.check_hostname = False
        for number in (7, 8):
            with dial(port, source="127.0.0.%d" % number) as plain, tls.wrap_socket(plain) as sock:
                negotiate(sock, (b"alice", b"secret"))
                self.assertEqual(ask(sock, Cmd.CONNECT, *self.echo).rep, Rep.SUCCEEDED)
                self.assertTrue(echoes(sock, b"through TLS"))
            server.wait_line(r"session client=127\.0\.0\.%d:\d+ user='alice' .*rep=SUCCEEDED" % number)
