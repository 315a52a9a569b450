"""The lookup service: names of CONNECT, BIND and UDP are looked up here, in a bounded number of threads.

A lookup that hangs in getaddrinfo cannot be interrupted: it holds its thread until the resolver gives up. That is why
a handler does not call getaddrinfo itself: it could neither time out nor notice that its client has left. The
hand-over to another thread and back costs 100 us more than the 30 us of a direct call for a name in /etc/hosts, once in
30 seconds for a name; until then the remembered answer takes 1 us.

The threads are shared fairly among clients, each known by what addresses.subscriber() gives:
- The client with the fewest lookups under way is served next; among equals they take turns.
- One client holds PER_CLIENT threads at the most, also after it has left: a lookup under way stays on its account.
- The last RESERVE threads are for clients that hold none.
- A name that nothing waits for any more is dropped from the queue.

`Names` may be called from any thread; `Waiting` belongs to the thread that relays an association.
"""
from __future__ import annotations

import errno
import socket
from queue import Empty, SimpleQueue
from threading import TIMEOUT_MAX, Lock, Thread
from time import monotonic
from typing import Callable, Dict, Generic, Iterator, List, Optional, Sequence, Tuple, TypeVar

from ..protocol.codes import Rep
from ..protocol.errors import RequestRefused, name_of, rep_of
from ..protocol.fields import Host, text
from .addresses import IP
from .poller import READ, new_poll
from .resolver import Answer, look_up
from .wakeup import Wakeup

Tell = Callable[[Answer], object]           # called once, in a lookup thread
T = TypeVar("T")

THREADS = 64                    # at the most; there are as many as there are lookups under way
PER_CLIENT = 16                 # of these; a browser looks up some ten names at once
RESERVE = 8
QUEUED_NAMES = 1024             # of one client
SOON_S = 0.01                   # answers from near come within that: to wait for more takes a descriptor
REST_S = 1.0                    # a thread without work ends after that
ANSWERS = 1024                  # that are remembered
WAITING_NAMES = 8               # of one Waiting,
WAITING_ITEMS = 64              # and what may wait for them
WAITING_BYTES = 1 << 18


class Busy(Exception):
    """Too much is waiting for names already."""


class Names:
    """Looks names up, and remembers the answers for a short time. All that is kept is bounded."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._known: Dict[bytes, Answer] = {}
        self._askers: Dict[bytes, List[Tuple[str, Tell]]] = {}          # of each name in a queue or under way
        self._running: Dict[bytes, str] = {}                            # names under way, on whose account
        # Names that cannot be looked up yet, by client, in order; and these clients, by how many each has under way.
        self._queues: Dict[str, Dict[bytes, None]] = {}
        self._turns: Tuple[Dict[str, None], ...] = tuple({} for _ in range(PER_CLIENT))
        # Of each thread without work, where it takes the next name. One for all would not do: where several threads
        # call it, SimpleQueue.get(timeout=...) could wait for ever, seen in CPython 3.8, 3.11 and 3.12.
        self._idle: List[SimpleQueue[bytes]] = []

    # ---- for one request ------------------------------------------------------------------------------------------

    def resolve(self, host: Host, deadline: float, connection: Optional[socket.socket], client: str) -> Sequence[IP]:
        """The addresses of a normalised host. Waits until `deadline` (monotonic; inf: for ever), or until `connection`
        is reset; a FIN may be a half-close, and ends nothing.

        Raises RequestRefused: X'04' when it does not resolve, or not in time; X'01' when we have no thread or
        descriptor for it. Raises ConnectionResetError when the client has left.
        """
        if not isinstance(host, bytes):
            return [host]
        answer = self._known.get(host)
        if answer is None or answer.until <= monotonic():
            answer = self._wait(host, deadline, connection, client)
        if not answer.addresses:
            raise RequestRefused(Rep.HOST_UNREACHABLE, answer.why)
        return answer.addresses

    def _wait(self, name: bytes, deadline: float, connection: Optional[socket.socket], client: str) -> Answer:
        answers: SimpleQueue[Answer] = SimpleQueue()
        try:
            self._join(name, client, answers.put)
            try:
                return answers.get(True, SOON_S)
            except Empty:
                return self._wait_longer(name, deadline, connection, client, answers)
        except Busy as exc:
            raise RequestRefused(Rep.GENERAL_FAILURE, "%s is not looked up: %s" % (text(name), exc)) from None
        except ConnectionResetError:
            raise ConnectionResetError(errno.ECONNRESET, "client left before %s resolved" % text(name)) from None
        except OSError as exc:
            raise RequestRefused(rep_of(exc), "%s is not looked up: %s" % (text(name), name_of(exc))) from None

    def _wait_longer(self, name: bytes, deadline: float, connection: Optional[socket.socket], client: str,
                     answers: SimpleQueue[Answer]) -> Answer:
        """Wait with a descriptor, which poll() can wait for together with the client's."""
        began = monotonic() - SOON_S
        tell: Tell = answers.put
        try:
            with Wakeup() as wakeup:
                def tell_and_wake(answer: Answer) -> None:
                    answers.put(answer)
                    wakeup.set()

                if self._replace(name, client, tell, tell_and_wake):
                    tell = tell_and_wake
                    self._watch(wakeup, deadline, connection)
                    return answers.get_nowait()
            left_s = deadline - monotonic()
            return answers.get(timeout=min(max(left_s, SOON_S), TIMEOUT_MAX))       # a lookup thread is calling tell()
        except Empty:
            why = "%s did not resolve within %g s" % (text(name), round(deadline - began, 2))
            raise RequestRefused(Rep.HOST_UNREACHABLE, why) from None
        finally:
            self.drop(name, client, tell)

    @staticmethod
    def _watch(wakeup: Wakeup, deadline: float, connection: Optional[socket.socket]) -> None:
        """Return when `wakeup` is set or the time is over. Raises ConnectionResetError when the client has left."""
        poll = new_poll()
        poll.register(wakeup.fileno(), READ)
        if connection is not None:
            poll.register(connection.fileno(), 0)       # no events: a reset is reported all the same, and a FIN is not
        left_s = deadline - monotonic()
        while left_s > 0:
            ready = poll.poll(None if left_s == float("inf") else left_s * 1000 + 1)
            if any(fd == wakeup.fileno() for fd, _events in ready):
                return
            if ready:
                raise ConnectionResetError
            left_s = deadline - monotonic()

    # ---- for whatever must not wait -------------------------------------------------------------------------------

    def ask(self, name: bytes, client: str, tell: Tell) -> Optional[Answer]:
        """What is known of a normalised name; or None, and another thread calls tell(answer) unless drop() comes
        first. Raises Busy when too many names of this client are waiting, or there is no thread."""
        answer = self._known.get(name)
        if answer and answer.until > monotonic():
            return answer
        self._join(name, client, tell)
        return None

    def drop(self, name: bytes, client: str, tell: Tell) -> None:
        """Do not call tell(answer) any more; one call may be under way. Also after it was called."""
        with self._lock:
            self._forget(name, client, tell)

    def _join(self, name: bytes, client: str, tell: Tell) -> None:
        """Look this name up, or wait until it can be; if it is under way, wait for that. Raises Busy."""
        with self._lock:
            running = self._running
            self._askers.setdefault(name, []).append((client, tell))
            if name in running:
                return
            if running and not self._has_thread(client):
                if self._enqueue(name, client) > QUEUED_NAMES:
                    self._forget(name, client, tell)
                    raise Busy("%d names are waiting" % QUEUED_NAMES)
                return
            running[name] = client
            if self._queues:                                # seldom
                self._unqueue_all(name)
            if self._idle:
                self._idle.pop().put(name)
            elif not self._start(name):
                self._forget(name, client, tell)
                raise Busy("no thread to look names up")

    def _replace(self, name: bytes, client: str, tell: Tell, other: Tell) -> bool:
        """Call other() in place of tell(). False: tell() was called, or is being called."""
        with self._lock:
            askers = self._askers.get(name, [])
            if (client, tell) not in askers:
                return False
            askers[askers.index((client, tell))] = client, other
            return True

    # ---- turns, all of it under the lock --------------------------------------------------------------------------

    def _forget(self, name: bytes, client: str, tell: Tell) -> None:
        askers = self._askers.get(name, [])
        if (client, tell) not in askers:
            return
        askers.remove((client, tell))
        if name in self._running:
            return
        if all(other != client for other, _tell in askers):
            self._unqueue(name, client)
        if not askers:
            del self._askers[name]

    def _has_thread(self, client: str) -> bool:
        """Whether there is a thread for one more lookup of this client."""
        held = self._held(client)
        return held < PER_CLIENT and len(self._running) < THREADS - (RESERVE if held else 0)

    def _held(self, client: str) -> int:
        return list(self._running.values()).count(client)

    def _enqueue(self, name: bytes, client: str) -> int:
        """Returns how many names of this client are waiting."""
        queue = self._queues.setdefault(client, {})
        queue[name] = None
        self._place(client)
        return len(queue)

    def _unqueue(self, name: bytes, client: str) -> None:
        if client in self._queues:
            self._queues[client].pop(name, None)
            self._place(client)

    def _place(self, client: str) -> None:
        """Put a client whose names are waiting into the turns where it belongs: last among those that hold as many."""
        for turn in self._turns:
            turn.pop(client, None)
        held = self._held(client)
        if not self._queues[client]:
            del self._queues[client]
        elif held < PER_CLIENT:
            self._turns[held][client] = None

    def _next(self) -> Optional[bytes]:
        """The name to be looked up next, which is under way from now on; None if there is none."""
        free = THREADS - len(self._running)
        turns = self._turns if free > RESERVE else self._turns[:1] if free else ()
        client = next((client for turn in turns for client in turn), None)
        if client is None:
            return None
        name = next(iter(self._queues[client]))
        self._running[name] = client
        self._unqueue_all(name)
        return name

    def _unqueue_all(self, name: bytes) -> None:
        """What is looked up now waits in no queue."""
        for asker in {asker for asker, _tell in self._askers[name]}:
            self._unqueue(name, asker)

    def _start(self, name: bytes) -> bool:
        """Give a name that is under way to a new thread, or enqueue it. False when there is no thread at all."""
        try:
            Thread(target=self._serve, args=(name,), name="names", daemon=True).start()
        except (RuntimeError, MemoryError):             # the next thread that has done its work takes it
            del self._running[name]
            for asker, _tell in self._askers[name]:
                self._enqueue(name, asker)
        return bool(self._running)

    # ---- the lookup threads ---------------------------------------------------------------------------------------

    def _serve(self, name: bytes) -> None:
        work: SimpleQueue[bytes] = SimpleQueue()
        more: Optional[bytes] = name
        while more:
            more = self._look_up(more, work)
            if more is None:
                try:
                    more = work.get(True, REST_S)
                except Empty:
                    more = self._leave(work)

    def _leave(self, work: SimpleQueue[bytes]) -> Optional[bytes]:
        """The thread ends, unless a name has come in this moment."""
        with self._lock:
            if work in self._idle:
                self._idle.remove(work)
                return None
        return work.get()

    def _look_up(self, name: bytes, work: SimpleQueue[bytes]) -> Optional[bytes]:
        """Look up, tell those that wait for it, and take the next; without one this thread is idle from now on."""
        answer, after = look_up(name), None
        with self._lock:
            if answer.until:
                known = self._known
                known.pop(name, None)                   # or it would keep its old place
                if len(known) >= ANSWERS:
                    del known[next(iter(known))]
                known[name] = answer
            askers, client = self._askers.pop(name), self._running.pop(name)
            if self._queues:                            # seldom
                if client in self._queues:
                    self._place(client)
                after = self._next()
            if after is None:
                self._idle.append(work)
        for _client, tell in askers:
            tell(answer)
        return after


class Waiting(Generic[T]):
    """Items of one poll loop that wait for the addresses of names: take() them after `wake` was called.

    The loop's thread creates and closes it; a lookup may outlive that.
    """

    def __init__(self, names: Names, client: str, wake: Callable[[], object]) -> None:
        """`wake` is called by another thread when an answer has come."""
        self.names = names
        self.client = client
        self._wake: Optional[Callable[[], object]] = wake
        self._lock = Lock()
        self._answers: List[Answer] = []
        self._items: Dict[bytes, List[Tuple[T, int]]] = {}      # by name, with their sizes

    def ask(self, name: bytes, item: T, size: int) -> Optional[Answer]:
        """What is known of a normalised name; or None, and `item`, of `size` bytes, is kept for take(). Raises Busy."""
        sizes = [size for items in self._items.values() for _item, size in items]
        if name not in self._items:
            if len(self._items) >= WAITING_NAMES:
                raise Busy("%d names are waiting" % WAITING_NAMES)
            answer = self.names.ask(name, self.client, self._tell)
            if answer is not None:
                return answer
            self._items[name] = []
        if len(sizes) >= WAITING_ITEMS or sum(sizes) + size > WAITING_BYTES:
            raise Busy("%d bytes are waiting" % sum(sizes))
        self._items[name].append((item, size))
        return None

    def take(self) -> Iterator[Tuple[T, Answer]]:
        """Every item whose answer has come, in order."""
        with self._lock:
            answers, self._answers = self._answers, []
        for answer in answers:
            for item, _size in self._items.pop(answer.name):
                yield item, answer

    def _tell(self, answer: Answer) -> None:
        with self._lock:
            self._answers.append(answer)
            wake = self._wake
        if wake:
            wake()

    def close(self) -> None:
        """Drop what still waits."""
        with self._lock:
            self._wake = None
        for name in self._items:
            self.names.drop(name, self.client, self._tell)
