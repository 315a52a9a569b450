"""The load of bench.py: a target and its clients, each a blocking process of its own, so that none waits for another
one's interpreter lock; and one measurement with them."""
import contextlib
import multiprocessing
import os
import selectors
import signal
import socket
import statistics
import struct
import sys
import tempfile
import threading
import time

HOST = "127.0.0.1"
BLOCK = 1 << 20
GIB = 1 << 30
IN_FLIGHT, DATAGRAM, LOSS = 32, bytes(512), 0.1         # with more lost than this it is no measurement
STREAM = b"\x00"
ENDING = []                 # signals that ask us to end: noted, and obeyed where no process is just being started
CONTEXT = multiprocessing.get_context("fork" if hasattr(os, "fork") else None)      # 64 clients are there at once


class Trouble(Exception):
    """This run gives no figure; says why."""


# ---- the target: each runs in a process of its own, and tells its port first --------------------------------------

def listen(kind=socket.SOCK_STREAM):
    sock = socket.socket(socket.AF_INET, kind)
    if kind == socket.SOCK_STREAM:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.bind((HOST, 0))
    if kind == socket.SOCK_STREAM:
        sock.listen(4096)
    return sock


def echo_target(pipe, _count):
    selector, listener = selectors.DefaultSelector(), listen()
    selector.register(listener, selectors.EVENT_READ)
    pipe.send(listener.getsockname()[1])
    while True:
        for key, _ in selector.select():
            sock = key.fileobj
            if sock is listener:
                sock = listener.accept()[0]
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                selector.register(sock, selectors.EVENT_READ)
                continue
            with contextlib.suppress(OSError):
                data = sock.recv(4096)
                if data and sock.send(data):
                    continue
            selector.unregister(sock)
            sock.close()


conn_target = new_target = rr_target = idle_target = echo_target


def down_target(pipe, count, both=False):
    listener = listen()
    pipe.send(listener.getsockname()[1])
    with listener.accept()[0] as sock:
        exactly(sock, 1)
        sender = start(pump, sock, count)
        drain(sock, count if both else 0)
        sender.join()
        sock.recv(1)


def both_target(pipe, count):
    down_target(pipe, count, both=True)


def beside_target(pipe, _count):
    """Echoes what begins with another byte than STREAM, which asks for bytes without an end."""
    def serve(sock):
        with sock, contextlib.suppress(OSError):
            data = sock.recv(1)
            if data == STREAM:
                pump(sock, float("inf"))
            while data and sock.send(data):
                data = sock.recv(4096)

    listener = listen()
    pipe.send(listener.getsockname()[1])
    while True:
        sock = listener.accept()[0]
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        start(serve, sock)


def udp_target(pipe, _count):
    sock = listen(socket.SOCK_DGRAM)
    pipe.send(sock.getsockname()[1])
    while True:
        sock.sendto(*sock.recvfrom(65536))


def start(function, *args):
    thread = threading.Thread(target=function, args=args, daemon=True)
    thread.start()
    return thread


def pump(sock, count):
    """Send `count` bytes as cheaply as this system can. Where that fails, the reader at the other end notices."""
    with contextlib.suppress(OSError), tempfile.TemporaryFile() as file:
        file.write(bytes(BLOCK))
        file.flush()
        while count > 0:
            size = min(count, BLOCK)
            count -= os.sendfile(sock.fileno(), file.fileno(), 0, size) if hasattr(os, "sendfile") \
                else sock.send(bytes(size))


def drain(sock, count):
    """Read `count` bytes away. Linux drops them in the kernel, uncopied (tcp(7), MSG_TRUNC)."""
    buffer, flags = bytearray(BLOCK), socket.MSG_TRUNC if sys.platform == "linux" else 0
    while count > 0:
        size = sock.recv_into(buffer, min(count, BLOCK), flags)
        if not size:
            raise EOFError("a stream was cut %d bytes short" % count)
        count -= size


# ---- the clients: each runs in a process of its own, and meets the others when it is ready ------------------------

def meet(pipe):
    pipe.send("ready")
    pipe.recv()


def exactly(sock, size):
    data = sock.recv(size, socket.MSG_WAITALL)
    if len(data) < size:
        raise EOFError("closed after %d of %d bytes" % (len(data), size))
    return data


def dial(port):
    sock = socket.socket()
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.connect((HOST, port))
    return sock


def ask(sock, cmd, port, host=b"\x01" + socket.inet_aton(HOST)):
    """Negotiate and ask for `cmd`, `host` being ATYP and ADDR: the port of the reply."""
    sock.send(b"\x05\x01\x00")
    if exactly(sock, 2) != b"\x05\x00":
        raise Trouble("wants a password")
    sock.send(b"\x05%c\x00%s" % (cmd, host) + struct.pack("!H", port))
    _, rep, _, atyp = exactly(sock, 4)
    bnd = exactly(sock, 18 if atyp == 4 else 6)
    if rep:
        raise Trouble("CMD %d refused with REP %d" % (cmd, rep))
    return struct.unpack("!H", bnd[-2:])[0]


def tunnel(proxy, target):
    """A socket that is connected to the target, through the proxy unless that is 0."""
    sock = dial(proxy or target)
    if proxy:
        ask(sock, 1, target)
    return sock


def conn_client(pipe, proxy, target, count):
    """Connect, exchange one byte, close: the seconds that each took, without the close."""
    meet(pipe)
    took = []
    for _ in range(count):
        began = time.perf_counter()
        with tunnel(proxy, target) as sock:
            sock.send(b"x")
            exactly(sock, 1)
            took.append(time.perf_counter() - began)
    return took


def new_client(pipe, proxy, target, count):
    """The same by a name that no request had before: localhost, each time in other capital letters."""
    meet(pipe)
    for number in range(count):
        name = bytes(byte - 32 * (number >> at & 1) for at, byte in enumerate(b"localhost"))
        with dial(proxy) as sock:
            ask(sock, 1, target, b"\x03%c%s" % (len(name), name))
            sock.send(b"x")
            exactly(sock, 1)


def rr_client(pipe, proxy, target, count):
    with tunnel(proxy, target) as sock:
        meet(pipe)
        for _ in range(count):
            sock.send(b"x")
            if not sock.recv(1):
                raise EOFError("a tunnel was closed")


def beside_client(pipe, proxy, target, count):
    """The seconds of each round trip, while the other clients download."""
    with tunnel(proxy, target) as sock:
        meet(pipe)
        time.sleep(0.5)                     # until the downloads are at full speed
        took = []
        for _ in range(count):
            began = time.perf_counter()
            sock.send(b"x")
            exactly(sock, 1)
            took.append(time.perf_counter() - began)
    return took


def stream_client(pipe, proxy, target, _count):
    """Download until it is killed."""
    with tunnel(proxy, target) as sock:
        meet(pipe)
        sock.send(STREAM)
        drain(sock, float("inf"))


def idle_client(pipe, proxy, target, count):
    socks = [tunnel(proxy, target) for _ in range(count)]
    meet(pipe)
    for sock in socks:
        sock.send(b"x")
        exactly(sock, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))   # a reset: no TIME_WAIT


def down_client(pipe, proxy, target, count, both=False):
    """No half-close before all is there: there are servers that close both ways at the first EOF."""
    with tunnel(proxy, target) as sock:
        meet(pipe)
        sock.send(b"x")
        sender = start(pump, sock, count if both else 0)
        drain(sock, count)
        sender.join()
        sock.shutdown(socket.SHUT_WR)
        sock.recv(1)                        # the target has read everything, too


def both_client(*args):
    down_client(*args, both=True)


def udp_client(pipe, proxy, target, count):
    """Keep IN_FLIGHT datagrams on their way; those that do not come back in 3 s (valgrind is slow) are lost."""
    with contextlib.ExitStack() as stack:
        sock, message, to = stack.enter_context(listen(socket.SOCK_DGRAM)), DATAGRAM, target
        if proxy:
            to = ask(stack.enter_context(dial(proxy)), 3, sock.getsockname()[1])
            message = b"\x00\x00\x00\x01" + socket.inet_aton(HOST) + struct.pack("!H", target) + DATAGRAM
        sock.connect((HOST, to))
        if os.name == "posix":              # a time-out of Python's costs a poll before every call
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", 3, 0))
        else:
            sock.settimeout(3.0)
        meet(pipe)
        sent = done = lost = 0
        while done + lost < count:
            while sent < count and sent - done - lost < IN_FLIGHT:
                sock.send(message)
                sent += 1
            try:
                sock.recv(65536)
                done += 1
            except (BlockingIOError, socket.timeout):
                lost = sent - done
                if lost > count * LOSS:
                    raise Trouble("%d of %d datagrams lost" % (lost, sent)) from None
        return done


# ---- one measurement ----------------------------------------------------------------------------------------------

def play(pipe, seconds, function, *args):
    """What a process of the load does. A signal ends it when its parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if hasattr(signal, "alarm"):
        signal.alarm(int(seconds) + 10)
    try:
        pipe.send(function(pipe, *args))
    except (OSError, EOFError, Trouble) as exc:
        pipe.send(Trouble("%s: %s" % (function.__name__, exc)))


def hear_port(pipe, seconds=20):
    """The port that a target tells. Raises Trouble."""
    if not pipe.poll(seconds):
        raise Trouble("the target did not start")
    return pipe.recv()


@contextlib.contextmanager
def process(seconds, *args):
    """Our end of the pipe to a process of the load, which is ended in the end."""
    ours, theirs = CONTEXT.Pipe()
    child = CONTEXT.Process(target=play, args=(theirs, seconds, *args), daemon=True)
    child.start()
    theirs.close()
    try:
        yield ours
    finally:
        child.kill()                        # not by SIGTERM: at first it has our handler, which only takes note
        child.join()
        ours.close()


def measure(load, proxy, cpu_seconds, memory_kib, seconds):
    """(figure, server CPU per unit), None where the two functions do not know; proxy 0 for none. Raises Trouble."""
    deadline = time.monotonic() + seconds

    def hear(pipe):
        while not pipe.poll(min(0.2, max(0, deadline - time.monotonic()))):
            if ENDING:
                raise SystemExit(128 + ENDING[0])
            if time.monotonic() >= deadline:
                raise Trouble("not done in %d s" % seconds)
        try:
            answer = pipe.recv()
        except (EOFError, OSError):
            raise Trouble("a process of the load died") from None
        if isinstance(answer, Trouble):
            raise answer
        return answer

    roles = [globals()[load.kind + "_client"]] * load.clients
    if load.kind == "beside":
        roles[1:] = [stream_client] * (load.clients - 1)
    cpu, memory, total = cpu_seconds(), memory_kib(), load.clients * load.count
    with contextlib.ExitStack() as stack:
        target = stack.enter_context(process(seconds, globals()[load.kind + "_target"], load.count))
        port = hear(target)
        clients = [stack.enter_context(process(seconds, role, proxy, port, load.count)) for role in roles]
        for pipe in clients:
            hear(pipe)
        if load.kind == "idle":
            time.sleep(0.5)                 # servers that tidy up behind a negotiation get the time for it
            held = memory_kib()
        began = time.perf_counter()
        for pipe in clients:
            pipe.send("go")
        answers = [hear(pipe) for pipe, role in zip(clients, roles) if role is not stream_client]
        took = time.perf_counter() - began
    if load.kind == "beside":               # its CPU time is that of the downloads
        return statistics.quantiles(answers[0], n=100)[98] * 1e6, None
    cpu = None if cpu is None else (cpu_seconds() - cpu) * load.per / total
    if load.kind == "idle":
        return None if memory is None else (held - memory) / total, cpu
    if load.kind == "conn" and load.clients == 1:
        return statistics.median(answers[0]) * 1e6, cpu
    if load.kind in ("down", "both"):
        return total * (2 if load.kind == "both" else 1) / GIB / took, cpu
    return (sum(answers) if load.kind == "udp" else total) / took, cpu
