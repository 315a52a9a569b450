"""A soak: everything at once for some minutes, and nothing may be missing at the end.

    make soak ARGS="--seconds 600"

Clients of every kind use one server with two workers: bulk with a hash in both directions, small connections, UDP,
BIND, and wrong passwords. Meanwhile the users file changes, SIGHUP comes every second, and one worker is killed every
20 s; the other one is spared, so that what it does not give back adds up. A report comes every minute. It fails when

- a tunnel whose worker was not killed lost a byte, or ended early, or a client was not let in;
- a byte is wrong, whether its worker was killed or not, or a wrong password was let in;
- more than one datagram of 1,000 was lost;
- the log has a bug, lost lines, or the death of a worker that was not killed here;
- a process has more descriptors at the end than at the beginning, or memory beyond the bars below; both are taken
  while no client is there, the first time after a warm-up.

Which tunnels a killed worker had is certain: it is stopped, /proc names its sockets, then it is killed. Linux only.
"""
import argparse
import collections
import contextlib
import hashlib
import os
import random
import signal
import socket
import struct
import sys
import tempfile
import threading
import time
from pathlib import Path

from socks5.access.users import line_for
from socks5.protocol.codes import Cmd, Method, Rep
from socks5.protocol.messages import Datagram, Greeting, Login, LoginStatus, Reply, Selection
from tests import support
from tests.support import children, descriptors, reader_of, resident_kib, threads, wait_until
from tests.test_udp import remote

USER = b"alice", b"correct horse"
WARM_UP_S, REPORT_S, QUIET_S = 10, 60, 30
RESTART_S = 15                      # for a worker in the place of a killed one
MEMORY_KIB = 10 << 10               # more than at the beginning, of a worker; issue 11 allows as much
SUPERVISOR_KIB = 2 << 10
LOST_DATAGRAMS = 0.001
# Without this, glibc keeps the 16 MiB of a slow hash, and fills heaps of its own for each thread unevenly. Neither is
# memory that we have lost, and both would hide what is.
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "1048576", "MALLOC_ARENA_MAX": "1"}
CHUNK = 1 << 16
BLOCK = memoryview(random.Random(1).getrandbits(8 << 20).to_bytes(1 << 20, "big") * 2)
BULK = struct.Struct("!QQQ")        # seed, bytes up, bytes down
SUSPECT = ("Traceback", "bug", "lost lines", "cannot", "worker_died", "ERROR")


@contextlib.contextmanager
def until(stop, running):
    """Run these threads until the block ends; `stop` tells them."""
    for thread in running:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        for thread in running:
            thread.join()


class Wrong(Exception):
    """What is no excuse for: wrong bytes, a wrong password that is let in."""


class Server(support.Spawned):
    """Keeps of the log only what it takes to judge, since there are many lines."""

    reloads = 0

    def _read(self, stream, lines):
        def kept():
            for line in stream:
                self.reloads += " reloaded " in line
                if lines is self.lines or any(word in line for word in SUSPECT):
                    yield line
        super()._read(kept(), lines)


# ---- bulk --------------------------------------------------------------------------------------------------------

def pieces(seed, size):
    """`size` bytes that differ from seed to seed, and never repeat within what fits into the buffers on the way."""
    number = 0
    while size:
        begin = (seed * 7919 + number * 104729) % (1 << 20)
        piece = BLOCK[begin:begin + min(size, CHUNK)]
        yield piece
        size -= len(piece)
        number += 1


def send(sock, seed, size, rest_s=0.0):
    for piece in pieces(seed, size):
        sock.sendall(piece)
        if rest_s:
            time.sleep(rest_s)


def receive(sock, size, rest_s=0.0):
    """The digest of the next `size` bytes. Raises EOFError when there are fewer."""
    made, left = hashlib.blake2b(), size
    while left:
        data = sock.recv(min(left, CHUNK))
        if not data:
            raise EOFError("the end after %d of %d bytes" % (size - left, size))
        made.update(data)
        left -= len(data)
        if rest_s:
            time.sleep(rest_s)
    return made.digest()


def digest(seed, size):
    made = hashlib.blake2b()
    for piece in pieces(seed, size):
        made.update(piece)
    return made.digest()


def bulk_target(sock):
    """Answer with what was asked for, then with the digest of what has come."""
    with contextlib.suppress(EOFError):                     # the client tells what it lacks
        seed, up, down = BULK.unpack(reader_of(sock)(BULK.size))
        sender = threading.Thread(target=quietly, args=(send, sock, seed + 1, down))
        sender.start()
        try:
            found = receive(sock, up)
        finally:
            sender.join()
        sock.sendall(found)


def quietly(call, *args):
    with contextlib.suppress(OSError):
        call(*args)


# ---- the clients: each kind takes a connection to the proxy, and returns how many bytes it has moved --------------

class Clients:
    def __init__(self, targets):
        self.targets = targets
        self.datagrams, self.strangers = collections.Counter(), 0

    def connect(self, sock, target):
        support.negotiate(sock, USER)
        self.granted(support.ask(sock, Cmd.CONNECT, *target))

    @staticmethod
    def granted(reply):
        assert reply.rep == Rep.SUCCEEDED, reply
        return reply

    def bulk(self, sock):
        seed, slow = random.getrandbits(32), random.random() < 0.25
        up, down = (random.choice((0, random.randrange(1 << 16), random.randrange(1 << 24))) for _ in "ud")
        if slow:                                            # long enough that a kill or a reload meets it
            up, down = up % (4 << 20), (1 << 20) + down % (4 << 20)
        self.connect(sock, self.targets["bulk"])
        sock.sendall(BULK.pack(seed, up, down))
        sender = threading.Thread(target=quietly, args=(send, sock, seed, up, 0.01 * slow))
        sender.start()
        try:
            if receive(sock, down, 0.02 * slow) != digest(seed + 1, down):
                raise Wrong("%d bytes came, and were not those that were sent" % down)
            if reader_of(sock)(hashlib.blake2b().digest_size) != digest(seed, up):
                raise Wrong("%d bytes arrived at the destination, and were not those that were sent" % up)
        except BaseException:
            quietly(sock.shutdown, socket.SHUT_RDWR)        # for the sender
            raise
        finally:
            sender.join()
        if sock.recv(1):
            raise Wrong("more came than was sent")
        return up + down

    def small(self, sock):
        self.connect(sock, self.targets["echo"])
        said = os.urandom(random.randrange(1, 500))
        sock.sendall(said)
        if reader_of(sock)(len(said)) != said:
            raise Wrong("another echo")
        if random.random() < 0.5:                           # the end comes from both sides by turns
            sock.shutdown(socket.SHUT_WR)
            if sock.recv(1):
                raise Wrong("more came than was sent")
        return 2 * len(said)

    def udp(self, sock):
        support.negotiate(sock, USER)
        bnd = self.granted(support.ask(sock, Cmd.UDP_ASSOCIATE, "0.0.0.0", 0)).bnd
        host, port = self.targets["udp"]
        moved = 0
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
            udp.connect(("127.0.0.1", bnd.port))
            udp.settimeout(2)
            for number in range(20):
                said = struct.pack("!I", number) + os.urandom(random.randrange(4000))
                udp.send(Datagram(support.address(host, port), said).pack())
                self.datagrams["sent"] += 1
                heard = self.heard(udp, sock, number)
                if heard is None:
                    self.datagrams["lost"] += 1
                elif heard != said:
                    raise Wrong("another datagram than was sent")
                moved += 2 * len(said)
        return moved

    @staticmethod
    def heard(udp, control, number):
        """The answer to this datagram; None if it was lost. Raises EOFError when the association has ended."""
        while True:
            try:
                data = Datagram.parse(udp.recv(1 << 16)).data
                if len(data) < 4 or struct.unpack("!I", data[:4])[0] >= number:     # else a late one
                    return data
            except (socket.timeout, ConnectionRefusedError):
                control.settimeout(0.01)
                try:
                    control.recv(1)
                except socket.timeout:
                    return None
                raise EOFError("the association has ended") from None

    def bind(self, sock):
        support.negotiate(sock, USER)
        bnd = self.granted(support.ask(sock, Cmd.BIND, "0.0.0.0", 0)).bnd
        try:
            peer = support.dial(bnd.port)
        except ConnectionRefusedError:                      # then another program of this machine was faster:
            self.granted(Reply.parse(reader_of(sock)))      # the proxy takes one peer, and names it
            self.strangers += 1
            return 0
        with peer:
            self.granted(Reply.parse(reader_of(sock)))
            size = random.randrange(CHUNK)
            for seed, (here, there) in enumerate(((sock, peer), (peer, sock))):
                send(here, seed, size)
                if receive(there, size) != digest(seed, size):
                    raise Wrong("other bytes than were sent")
        return 2 * size

    def guess(self, sock):
        """A wrong password, for a user or for none. The answer may take long: the client does not wait for it."""
        sock.settimeout(5)
        sock.sendall(Greeting(bytes([Method.USERNAME_PASSWORD])).pack())
        Selection.parse(reader_of(sock))
        sock.sendall(Login(random.choice((b"bob", b"mallory")), b"%d" % random.getrandbits(32)).pack())
        with contextlib.suppress(socket.timeout):
            if LoginStatus.parse(reader_of(sock)).status == 0:
                raise Wrong("a wrong password was let in")
        return 0


KINDS = {"bulk": Clients.bulk, "small": Clients.small, "udp": Clients.udp, "bind": Clients.bind,
         "guess": Clients.guess}
Failure = collections.namedtuple("Failure", "kind port began ended error")
Kill = collections.namedtuple("Kill", "pid at ports")


# ---- the soak ----------------------------------------------------------------------------------------------------

class Soak:
    def __init__(self, server, targets, users, options):
        self.server, self.users, self.options = server, users, options
        self.pid, self.port = server.process.pid, server.port
        self.clients = Clients(targets)
        self.spared = children(self.pid)[0]
        self.lock = threading.Lock()
        self.done, self.bytes = collections.Counter(), collections.Counter()
        self.failures, self.kills, self.trouble = [], [], []
        self.hangups = 0

    def run(self):
        """What is wrong."""
        with support.dial(self.port) as sock:               # from here on, the right password is known
            support.negotiate(sock, USER)
        with self.load():
            time.sleep(WARM_UP_S)
        before = self.quiet_measures({})
        self.tell("after the warm-up", before)
        began = time.monotonic()
        with self.load(), self.disturbance():
            while time.monotonic() - began < self.options.seconds:
                time.sleep(min(REPORT_S, max(0, began + self.options.seconds - time.monotonic())))
                self.tell("%d s" % (time.monotonic() - began), self.measures())
        after = self.quiet_measures(before)
        self.tell("at the end", after)
        self.judge_clients()
        self.judge_processes(before, after)
        status = self.server.end(signal.SIGTERM)
        if status:
            self.trouble.append("exit status %d" % status)
        self.judge_log()
        return self.trouble

    # ---- clients

    @contextlib.contextmanager
    def load(self):
        stop = threading.Event()
        names = [name for name in KINDS for _ in range(self.options.clients)]
        with until(stop, [threading.Thread(target=self.repeat, args=(name, stop), daemon=True) for name in names]):
            yield

    def repeat(self, name, stop):
        while not stop.wait(self.options.rest * random.random() * 2):
            began, port = time.monotonic(), 0
            try:
                with support.dial(self.port) as sock:
                    port = sock.getsockname()[1]
                    moved = KINDS[name](self.clients, sock)
                with self.lock:
                    self.done[name] += 1
                    self.bytes[name] += moved
            except Exception as exc:
                self.failures.append(Failure(name, port, began, time.monotonic(), exc))

    def excused(self, failure):
        return not isinstance(failure.error, Wrong) and any(
            failure.port in kill.ports and failure.began <= kill.at <= failure.ended for kill in self.kills)

    # ---- what disturbs them

    @contextlib.contextmanager
    def disturbance(self):
        stop = threading.Event()
        running = [threading.Thread(target=self.every, args=(seconds, call, stop), daemon=True) for seconds, call in (
            (self.options.reload_every, self.reload), (self.options.kill_every, self.kill))]
        with until(stop, running):
            yield

    def every(self, seconds, call, stop):
        while not stop.wait(seconds):
            try:
                call()
            except Exception as exc:
                self.trouble.append("%s: %r" % (call.__name__, exc))

    def reload(self):
        self.hangups += 1
        write_users(self.users, self.hangups)
        os.kill(self.pid, signal.SIGHUP)

    def kill(self):
        victim, = set(children(self.pid)) - {self.spared}
        os.kill(victim, signal.SIGSTOP)
        wait_until(lambda: is_stopped(victim), "the worker is stopped")
        self.kills.append(Kill(victim, time.monotonic(), client_ports(victim, self.port)))
        os.kill(victim, signal.SIGKILL)
        wait_until(lambda: len(set(children(self.pid)) - {victim}) == 2, "another worker", RESTART_S)

    # ---- processes

    def measures(self):
        """{pid: (KiB of memory, descriptors, threads)}"""
        found = {}
        for pid in [self.pid, *children(self.pid)]:
            with contextlib.suppress(OSError):              # killed meanwhile
                found[pid] = resident_kib(pid), descriptors(pid), threads(pid)
        return found

    def quiet_measures(self, before):
        """The same, when no client is there any more and the last sessions have been closed."""
        with contextlib.suppress(AssertionError):           # then it is found and said what is too much
            wait_until(lambda: not any(client_ports(pid, self.port) for pid in children(self.pid)), "", QUIET_S)
            time.sleep(2)                                   # a sweep of the relay loop, the end of threads
            wait_until(lambda: not before or not self.excess(before, self.measures()), "", QUIET_S)
        return self.measures()

    def excess(self, before, after):
        """Of a worker that was started meanwhile, the one that was spared tells what it may have."""
        found = []
        for pid, (kib, count, _threads) in after.items():
            kib_before, count_before, _ = before.get(pid, before[self.spared])
            limit = kib_before + (SUPERVISOR_KIB if pid == self.pid else MEMORY_KIB)
            if kib > limit:
                found.append("process %d has %d KiB, had %d, and may have %d" % (pid, kib, kib_before, limit))
            if count > count_before:
                found.append("process %d has %d descriptors, had %d" % (pid, count, count_before))
        return found

    # ---- the verdict

    def judge_clients(self):
        for failure in self.failures:
            if not self.excused(failure):
                self.trouble.append("%s from port %d: %r after %.3f s" % (
                    failure.kind, failure.port, failure.error, failure.ended - failure.began))
        counts = self.clients.datagrams
        if counts["lost"] > LOST_DATAGRAMS * counts["sent"] + 1:
            self.trouble.append("%(lost)d of %(sent)d datagrams were lost" % counts)
        self.trouble += ["no %s was done" % name for name in KINDS if not self.done[name]]

    def judge_processes(self, before, after):
        self.trouble += self.excess(before, after)
        if self.spared not in after or len(after) != 3:
            self.trouble.append("other processes are there than should be: %s" % list(after))

    def judge_log(self):
        ours = {kill.pid for kill in self.kills}
        for line in self.server.log:
            if "worker_died" not in line or not any("pid=%d how=signal-9" % pid in line for pid in ours):
                self.trouble.append("the log has: " + line)
        if self.hangups > 5 and self.server.reloads < self.hangups:     # each of two workers says so
            self.trouble.append("%d SIGHUP and only %d reloads" % (self.hangups, self.server.reloads))

    def tell(self, when, measures):
        failures = list(self.failures)
        excused = sum(map(self.excused, failures))
        done = ", ".join("%s %d (%.0f MiB)" % (name, self.done[name], self.bytes[name] / (1 << 20)) for name in KINDS)
        counts, strangers = self.clients.datagrams, self.clients.strangers
        print("%s: %s; %d of %d datagrams lost; %d SIGHUP, %d kills that ended %d sessions; %d strangers at BINDs; "
              "%d other failures" % (when, done, counts["lost"], counts["sent"], self.hangups, len(self.kills), excused,
                                     strangers, len(failures) - excused))
        for pid, found in measures.items():
            role = "supervisor" if pid == self.pid else "worker, spared" if pid == self.spared else "worker"
            print("    %-14s %7d: %6d KiB, %3d descriptors, %3d threads" % (role, pid, *found), flush=True)


# ---- /proc -------------------------------------------------------------------------------------------------------

def is_stopped(pid):
    """All threads of it."""
    return all(Path("/proc/%d/task/%s/stat" % (pid, task)).read_text().rpartition(")")[2].split()[0] == "T"
               for task in os.listdir("/proc/%d/task" % pid))


def client_ports(pid, port):
    """The ports of the clients whose connections to `port` this process has."""
    inodes = set()
    for number in os.listdir("/proc/%d/fd" % pid):
        with contextlib.suppress(OSError):
            link = os.readlink("/proc/%d/fd/%s" % (pid, number))
            if link.startswith("socket:["):
                inodes.add(link[len("socket:["):-1])
    found = set()
    for line in Path("/proc/%d/net/tcp" % pid).read_text().splitlines()[1:]:
        fields = line.split()
        here, there = (int(field.rpartition(":")[2], 16) for field in fields[1:3])
        if here == port and there and fields[9] in inodes:
            found.add(there)
    return found


def write_users(path, number):
    """A comment changes every time, and the line of one user now and then."""
    fresh = path.with_name("fresh")
    fresh.write_text("# %d\n%s\n%s\n" % (number, LINES[0], LINES[1 + number // 5 % 2]))
    fresh.replace(path)


LINES = []


def main():
    parser = argparse.ArgumentParser("make soak", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    for flag, kind, default, words in (
            ("--seconds", float, 600, "how long"), ("--clients", int, 2, "of each kind at a time"),
            ("--rest", float, 0.02, "seconds between two sessions of a client"),
            ("--reload-every", float, 1, "seconds"), ("--kill-every", float, 20, "seconds")):
        parser.add_argument(flag, type=kind, default=default, help="%s (default %g)" % (words, default))
    options = parser.parse_args()
    if not sys.platform.startswith("linux"):
        parser.exit(2, "make soak: it takes Linux\n")
    LINES.extend(line_for(*user) for user in (("alice", USER[1]), ("bob", b"one"), ("bob", b"two")))
    with contextlib.ExitStack() as stack:
        users = Path(stack.enter_context(tempfile.TemporaryDirectory()), "users")
        write_users(users, 0)
        targets = {"bulk": stack.enter_context(support.target(bulk_target)),
                   "echo": stack.enter_context(support.target()), "udp": stack.enter_context(remote(bytes))}
        server = Server("-p", "0", "-w", "2", "--users", users, env=GIVE_BACK)
        stack.callback(server.end, signal.SIGKILL)
        server.wait_line("listening on", server.lines)
        wait_until(lambda: len(children(server.process.pid)) == 2, "both workers")
        trouble = Soak(server, targets, users, options).run()
    print("\n".join(trouble[:50]))
    print("%d troubles" % len(trouble) if trouble else "nothing was lost, and nothing was left behind")
    return bool(trouble)


if __name__ == "__main__":
    sys.exit(main())
