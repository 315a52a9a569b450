"""Names to addresses, with the traps closed.

`getaddrinfo` is too willing for bytes that a stranger chose: it stops at a NUL and answers for what stood before it, so
"127.0.0.1\\0.example" would be 127.0.0.1. A name reaches it only after `clean`. RFC 1928 section 5, RFC 1123
section 2.1. `resolve` is for a thread that may block; Names is for one that may not.
"""
from __future__ import annotations

import re
import socket
from collections import deque
from ipaddress import ip_address
from threading import Condition, Lock, Thread
from time import monotonic
from typing import Callable, Deque, Dict, Generic, Iterator, List, Optional, Sequence, Tuple, TypeVar

from ..protocol.codes import Rep
from ..protocol.errors import RequestRefused
from ..protocol.fields import Host, text
from .addresses import IP, unmapped

Tell = Callable[[bytes, Sequence[IP]], None]

T = TypeVar("T")

MOST_ADDRESSES = 64             # of one name: its owner must not make thousands of attempts of one request
LOOKUP_THREADS = 16             # a resolver that hangs holds one of them for each name,
LOOKUP_NAMES = 256              # and more names than this are not waited for
LOOKUP_REST_S = 1.0             # a thread without work ends after that
ANSWER_S = 30.0                 # getaddrinfo does not tell the TTL: short enough for names that move
FAILURE_S = 5.0                 # RFC 2308 §7.1: failures may be remembered for 5 minutes at the most
ANSWERS = 1024
WAITING_NAMES = 8               # of one Waiting, so that others have lookups left,
WAITING_ITEMS = 64              # and what may wait for them
WAITING_BYTES = 1 << 18

# Letters, digits, hyphen and dot are RFC 1123's; the underscore stands in many names that people do use.
ASCII_NAME = re.compile(rb"[A-Za-z0-9_-]{1,63}(\.[A-Za-z0-9_-]{1,63})*\.?")


def clean(name: bytes) -> Host:
    """An IP address if the name is the text of one, else the name in ASCII (IDNA where it was UTF-8).

    Raises RequestRefused X'04' for anything else: empty, NUL, control characters, spaces, empty labels, foreign bytes.
    """
    try:
        address = ip_address(name.decode("ascii"))
        if "%" not in str(address):             # a scope would choose one of our interfaces
            return address
    except ValueError:                          # UnicodeDecodeError is one
        pass
    ascii_name = name
    try:
        if not name.isascii():
            ascii_name = name.decode("utf-8").encode("idna")
    except UnicodeError:
        ascii_name = b""
    letters = len(ascii_name) - ascii_name.endswith(b".")       # the root's dot does not count: RFC 1035 §2.3.4
    if letters > 253 or not ASCII_NAME.fullmatch(ascii_name):
        raise RequestRefused(Rep.HOST_UNREACHABLE, "not a name to look up: %s" % text(name))
    return ascii_name


def normalise(host: Host) -> Host:
    """A host in the one form that is judged and looked up: an IP address (IPv4-mapped as IPv4), or a `clean` name.

    Raises RequestRefused X'04' as `clean`."""
    host = clean(host) if isinstance(host, bytes) else host
    return host if isinstance(host, bytes) else unmapped(host)


def resolve(host: Host) -> List[IP]:
    """The addresses of `host`, the resolver's favourite first, without repetition. Blocks while names are looked up.

    IPv4 in an IPv6 coat (::ffff:192.0.2.1) comes out as IPv4. Raises RequestRefused X'04' when nothing is found.
    """
    host = normalise(host)
    if not isinstance(host, bytes):
        return [host]
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as exc:
        raise RequestRefused(Rep.HOST_UNREACHABLE, "%s does not resolve: %s" % (text(host), exc)) from None
    addresses = (unmapped(ip_address(str(sockaddr[0]).partition("%")[0])) for *_, sockaddr in found)
    return list(dict.fromkeys(addresses))[:MOST_ADDRESSES]


class Busy(Exception):
    """Too much is waiting for names already."""


class Names:
    """Looks names up in threads of its own, for who must not block; remembers answers, and failures, for a short time.

    Threads are started when there is work and end when there is none; all that is kept is bounded.
    """

    def __init__(self) -> None:
        self._news = Condition()
        self._queue: Deque[bytes] = deque()
        self._asking: Dict[bytes, List[Tell]] = {}                      # queued, or being looked up
        self._known: Dict[bytes, Tuple[float, Sequence[IP]]] = {}       # and until when
        self._threads = self._resting = 0

    def ask(self, name: bytes, tell: Tell) -> Optional[Sequence[IP]]:
        """The addresses of a `clean` name, none if it does not resolve; or None, and another thread will call
        tell(name, addresses). Raises Busy when too many names are waiting."""
        with self._news:
            until, addresses = self._known.get(name, (0.0, ()))
            if until > monotonic():
                return addresses
            if name in self._asking:
                self._asking[name].append(tell)
                return None
            if len(self._asking) >= LOOKUP_NAMES:
                raise Busy("%d names are waiting" % LOOKUP_NAMES)
            if len(self._queue) >= self._resting and self._threads < LOOKUP_THREADS:
                self._start()
            self._asking[name] = [tell]
            self._queue.append(name)
            self._news.notify()
        return None

    def _start(self) -> None:
        try:
            Thread(target=self._work, name="names", daemon=True).start()
            self._threads += 1
        except (RuntimeError, MemoryError):             # out of threads: those that there are will do
            if not self._threads:
                raise Busy("no thread to look names up") from None

    def _work(self) -> None:
        while True:
            with self._news:
                self._resting += 1
                found = self._news.wait_for(lambda: self._queue, LOOKUP_REST_S)
                self._resting -= 1
                if not found:
                    self._threads -= 1
                    return
                name = self._queue.popleft()
            addresses: Sequence[IP] = ()
            try:
                addresses = resolve(name)
            except (RequestRefused, MemoryError):
                pass
            with self._news:
                while len(self._known) >= ANSWERS:
                    del self._known[next(iter(self._known))]
                self._known[name] = monotonic() + (ANSWER_S if addresses else FAILURE_S), addresses
                tells = self._asking.pop(name)
            for tell in tells:
                tell(name, addresses)


class Waiting(Generic[T]):
    """Things of one poll loop that wait for the addresses of names. `readable` wakes the loop: then `take`.

    The sockets belong to the loop's thread, which closes them; a lookup may outlive that, so its answer is left under
    a lock and only while there is somebody to take it.
    """

    def __init__(self, names: Names) -> None:
        self.names = names
        self.readable, self._bell = socket.socketpair()
        self._lock = Lock()
        self._open = True
        self._answers: List[Tuple[bytes, Sequence[IP]]] = []
        self._items: Dict[bytes, List[Tuple[T, int]]] = {}      # by name, with their sizes

    def ask(self, name: bytes, item: T, size: int) -> Optional[Sequence[IP]]:
        """The addresses of a `clean` name; or None, and `item`, of `size` bytes, is kept for take(). Raises Busy."""
        if name not in self._items:
            if len(self._items) >= WAITING_NAMES:
                raise Busy("%d names are waiting" % WAITING_NAMES)
            addresses = self.names.ask(name, self._tell)
            if addresses is not None:
                return addresses
            self._items[name] = []
        sizes = [size for items in self._items.values() for _item, size in items]
        if len(sizes) >= WAITING_ITEMS or sum(sizes) + size > WAITING_BYTES:
            raise Busy("%d bytes are waiting" % sum(sizes))
        self._items[name].append((item, size))
        return None

    def take(self) -> Iterator[Tuple[T, Sequence[IP]]]:
        """Every item whose addresses have come, in order."""
        with self._lock:
            self.readable.recv(4096)
            answers, self._answers = self._answers, []
        for name, addresses in answers:
            for item, _size in self._items.pop(name):
                yield item, addresses

    def _tell(self, name: bytes, addresses: Sequence[IP]) -> None:
        with self._lock:
            if self._open:
                self._answers.append((name, addresses))
                self._bell.send(b"\0")                  # never blocks: WAITING_NAMES of them at the most

    def close(self) -> None:
        with self._lock:
            self._open = False
            self.readable.close()
            self._bell.close()
