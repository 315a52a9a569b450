"""What bench.py --rates measures: how exact --rate-per-client is, with one tunnel and with many, over ten seconds."""
import contextlib
import selectors
import socket
import threading
import time

from bench_load import BLOCK, ENDING, GIB, Trouble, hear_port, listen, process, tunnel

RATES = {"16K": 1 << 14, "1M": 1 << 20, "64M": 1 << 26, "1G": GIB}
TUNNELS = (1, 200)
BEFORE_S, SECONDS = 2.0, 10.0       # what is in buffers and the burst come in the time before
BAR = 0.05


def pour_target(pipe, _count):
    """Sends to each client for ever."""
    listener = listen()
    pipe.send(listener.getsockname()[1])

    def pour(sock):
        with contextlib.suppress(OSError):
            while True:
                sock.sendall(bytes(BLOCK))

    while True:
        threading.Thread(target=pour, args=(listener.accept()[0],), daemon=True).start()


def read_all(socks, seconds, sizes=None):
    """Read what comes for so long: bytes a second. `sizes` gets the bytes of each socket."""
    buffer, total, began = bytearray(BLOCK), 0, time.perf_counter()
    with selectors.DefaultSelector() as selector:
        for sock in socks:
            selector.register(sock, selectors.EVENT_READ)
        while time.perf_counter() < began + seconds and not ENDING:
            for key, _ in selector.select(0.01):
                with contextlib.suppress(BlockingIOError):
                    size = key.fileobj.recv_into(buffer)
                    if not size:
                        raise Trouble("a tunnel was closed")
                    total += size
                    if sizes is not None:
                        sizes[key.fileobj] += size
    return total / (time.perf_counter() - began)


def measure_rate(port, number, timeout, seconds):
    """(bytes a second of `number` tunnels, those of the slowest over those of the fastest)."""
    with contextlib.ExitStack() as stack:
        target = hear_port(stack.enter_context(process(timeout, pour_target, 0)))
        socks = [stack.enter_context(tunnel(port, target)) for _ in range(number)]
        for sock in socks:
            sock.setblocking(False)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 18)
        read_all(socks, min(BEFORE_S, seconds))
        sizes = dict.fromkeys(socks, 0)
        speed = read_all(socks, seconds, sizes)
        return speed, min(sizes.values()) / max(1, max(sizes.values()))


def table(serving, args):
    """Print a line for each rate and number of tunnels: the exit status."""
    good = True
    print("%-6s %8s %14s %8s %18s" % ("rate", "tunnels", "bytes/s", "of it", "slowest of fastest"))
    for text, rate in list(RATES.items())[:1 if args.quick else None]:
        for number in TUNNELS[:1] if args.quick else TUNNELS:
            try:
                with serving("ours=--rate-per-client %s" % text, args) as (port, _pid):
                    speed, share = measure_rate(port, number, args.timeout, 0.5 if args.quick else SECONDS)
                good = good and abs(speed / rate - 1) <= BAR
                print("%-6s %8d %14.0f %8.3f %18.2f" % (text, number, speed, speed / rate, share), flush=True)
            except Trouble as exc:
                good = False
                print("%-6s %8d %14s %s" % (text, number, "-", exc), flush=True)
            if ENDING:
                return 128 + ENDING[0]
    return 0 if good else 1
