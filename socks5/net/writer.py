"""Write lines to a descriptor so that no thread waits for their reader.

The log and the trace use it. put() runs in any thread. Where a write that cannot wait is possible, put() writes at
once: to wake another thread for each line costs ten times as much as to write it. What the descriptor does not take at
once goes into a bounded queue. A thread makes text of the queued items and writes it, in chunks that end at a line's
end and are small enough that the kernel never mixes them with those of another process on the same pipe (PIPE_BUF,
pipe(7)).

Processes: the thread starts with the first queued item. os.fork() stops it before and starts it again afterwards,
because a fork copies only the thread that calls it; the child begins with an empty queue and a thread of its own.
"""
from __future__ import annotations

import os
import select
import socket
import stat
import threading
import weakref
from collections import deque
from functools import partial
from queue import SimpleQueue
from time import monotonic, sleep
from typing import Any, Callable, Deque, Iterable, Iterator, List, Optional, Tuple

PIPE_BUF = getattr(select, "PIPE_BUF", 512)     # POSIX promises 512 at the least
MOST_QUEUED = 10000
BATCH = 1000                    # items taken at once: bounds what is held beside the queue
REST_S = 0.001                  # between batches: a busy process wakes the thread a thousand times a second, not more
RETRY_S = 0.01                  # a descriptor that does not block, and is full
PAUSE_S = 0.2                   # the longest that a fork waits for a write to end
CLOSE_S = 1.0
SLOW_S = 0.5                    # a disk on which a write at once takes longer (the wait for the GIL included)
SLOW_REST_S = 10.0              # is left to the thread for so long
STOP = object()                 # in the queue: everything before it is written, then the thread ends
CUT = b"...\n"

Write = Callable[[bytes], Optional[int]]        # writes some of it, and says how many bytes; None: all of it


class Writer:
    """A bounded queue, and the thread that writes it.

    write        as os.write with a descriptor: a short write is continued, an exception loses the chunk
    render       an item's text in ASCII, one line or several, without the last newline. Runs in the thread that writes
    lost         the text of the line that says how many items were lost
    chunk_bytes  the most that is given to write() at once; a longer line is cut, and ends in "..."
    release      called once, when nothing will be written any more: closes what was opened for it
    at_once      as `write`, but never waits: it takes less, or raises. None: only the thread writes

    Methods that any thread may call: put, close. Those for a fork are called by it: pause, resume, after_fork.
    """

    def __init__(self, write: Write, render: Callable[[Any], str], lost: Callable[[int], str],
                 chunk_bytes: int = PIPE_BUF, release: Callable[[], object] = lambda: None,
                 at_once: Optional[Write] = None) -> None:
        self._write = write
        self._at_once = at_once
        self._render = render
        self._lost_text = lost
        self._chunk_bytes = chunk_bytes
        self._release = release
        self._most = MOST_QUEUED
        self._torn = False                  # a line was written in part: the next one must not continue it,
        self._half = False                  # or it must, because it is the rest of that line
        self._closed = False
        self._give_up_at = float("inf")
        self.after_fork()
        WRITERS.add(self)

    def put(self, item: object) -> None:
        """Have it written. Never waits: beyond the bound the item is dropped and counted."""
        if self._at_once is None:
            self._enqueue(item)
            return
        if len(self._fresh) >= self._most:
            self._lose(1)
            return
        self._fresh.append(item)
        while self._fresh and self._turn.acquire(False):    # else the thread that has the turn writes it as well
            try:
                self._write_fresh(self._at_once)
            except MemoryError:
                self._lose(1)
            finally:
                self._turn.release()

    def _write_fresh(self, at_once: Write) -> None:
        """Write at once, or queue, what put() was given. The order is kept: nothing is written at once while the thread
        has something to write."""
        while self._fresh:
            item = self._fresh.popleft()
            if self._given == self._handled and not (self._lost or self._torn or self._closed):
                item = self._left_of(self._block(item), at_once)
            if item != b"":
                self._given += self._enqueue(item)

    def _left_of(self, line: bytes, at_once: Write) -> bytes:
        """What the descriptor did not take at once of a line."""
        now = monotonic()
        if len(line) > self._chunk_bytes or now < self._slow_until:     # the former is several lines
            return line
        try:
            done = at_once(line)
        except Exception:                               # it takes nothing now, or never will: the thread finds out
            return line
        if monotonic() - now > SLOW_S:
            self._slow_until = now + SLOW_REST_S
        left = b"" if done is None else line[done:]
        self._half = 0 < len(left) < len(line)
        return left

    def _enqueue(self, item: object) -> bool:
        """Leave it to the thread. Whether there was room.

        SimpleQueue is safe with and without a GIL and in signal handlers; it wakes the thread only if that waits."""
        if self._queue.qsize() >= self._most:
            self._lose(1)
            return False
        try:
            self._queue.put(item)
        except MemoryError:
            self._lose(1)
            return False
        if self._thread is None:
            self._start()
        return True

    def close(self, timeout_s: float = CLOSE_S) -> None:
        """Write what is queued, for timeout_s at the most; what comes later is dropped. In the calling thread where the
        system has no other to give: it is then that the log says why the program ends."""
        with self._lock:
            if self._closed:
                return
            if self._queue.qsize():
                self._start()
            self._closed, self._most = True, 0
            self._give_up_at = monotonic() + timeout_s
            thread = self._thread
            queued = self._queue.qsize()
        with self._turn:                    # nothing is being written at once
            pass
        if thread is None and not queued:
            self._release()
            return
        self._queue.put(STOP)
        if thread is None:
            self._run()
        else:
            thread.join(timeout_s)

    # ---- a fork ---------------------------------------------------------------------------------------------------

    def pause(self, timeout_s: float = PAUSE_S) -> None:
        """End the thread before os.fork(); waits for timeout_s at the most where a write hangs."""
        with self._lock:
            self._paused = True
            thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            self._queue.put(STOP)
            thread.join(timeout_s)

    def resume(self) -> None:
        """Go on, in the parent."""
        with self._lock:
            self._paused = False
            if self._queue.qsize():
                self._start()

    _slow_until = 0.0

    def after_fork(self) -> None:
        """Begin anew, in the child: what is queued is the parent's, and so is the thread."""
        self._queue: SimpleQueue[Any] = SimpleQueue()
        self._fresh: Deque[Any] = deque()   # given to put(), and neither written nor queued yet:
        self._turn = threading.Lock()       # its holder does that
        self._given = self._handled = 0     # items that the holder has queued; that the thread has written or lost
        self._lock = threading.RLock()      # a signal handler may log while its own thread holds it
        self._thread: Optional[threading.Thread] = None
        self._paused = False
        self._lost = 0
        self.lost = 0                       # in all

    # ---- inside ---------------------------------------------------------------------------------------------------

    def _start(self) -> None:
        with self._lock:
            if self._thread is None and not self._paused and not self._closed:
                try:
                    thread = threading.Thread(target=self._run_thread, name="writer", daemon=True)
                    thread.start()
                except (RuntimeError, MemoryError):     # no more threads, or the interpreter ends: the next item
                    return                              # tries again
                self._thread = thread

    def _lose(self, count: int) -> None:
        with self._lock:
            self._lost += count
            self.lost += count

    def _run_thread(self) -> None:
        try:
            self._run()
        except BaseException:               # a bug, or no memory: the next item starts another thread
            with self._lock:
                self._thread = None
            raise

    def _run(self) -> None:
        """Write until STOP."""
        queue = self._queue
        while True:
            batch = [queue.get()]
            batch += [queue.get() for _ in range(min(queue.qsize(), BATCH))]
            items = [item for item in batch if item is not STOP]
            try:
                lost = self._write_all(map(self._block, items))
            except MemoryError:
                lost = len(items)
            if lost:
                self._lose(lost)
            if self._lost:
                self._tell_lost()
            self._handled += len(items)
            if len(items) < len(batch) and self._ended():
                return
            del batch, items                # while it waits, nothing keeps a record alive
            if not queue.qsize():
                sleep(REST_S)

    def _ended(self) -> bool:
        """Whether the thread is to end: STOP may be of a fork that did not wait for it."""
        with self._lock:
            ending = self._paused or self._closed
            if ending:
                self._thread = None
            closed = self._closed
        if closed:
            self._release()
        return ending

    def _block(self, item: object) -> bytes:
        if type(item) is bytes:             # rendered, and perhaps written in part
            return item
        try:
            text = self._render(item)
        except Exception as exc:            # an argument that does not fit its format, say: one item, not the thread
            text = "ERROR cannot be written: %s" % ascii(exc)
        data = text.encode("ascii", "backslashreplace") + b"\n"
        return data if len(data) <= self._chunk_bytes else cut(data, self._chunk_bytes)

    def _write_all(self, blocks: Iterable[bytes]) -> int:
        """How many items were lost."""
        lost = 0
        for chunk, count in chunks(blocks, self._chunk_bytes):
            if not self._write_chunk(chunk):
                lost += count
        return lost

    def _tell_lost(self) -> None:
        with self._lock:
            count, self._lost = self._lost, 0
        if count and self._write_all([self._lost_text(count).encode() + b"\n"]):
            with self._lock:
                self._lost += count         # still to be said; `lost` has them already

    def _write_chunk(self, data: bytes) -> bool:
        """Whether the whole of it was written."""
        if self._torn:
            data = b"\n" + data
        whole = len(data)
        while data:
            try:
                done = self._write(data)
            except BlockingIOError:
                if monotonic() >= self._give_up_at:
                    break
                sleep(RETRY_S)
                continue
            except Exception:               # a full disk, a reader that left, a stream that was closed
                break
            data = data[len(data) if done is None else done:]
        if len(data) < whole or self._half:
            self._torn = bool(data)
        self._half = False
        return not data


def cut(lines: bytes, most_bytes: int) -> bytes:
    """Lines of text, none longer than most_bytes."""
    return b"".join(line if len(line) <= most_bytes else line[:most_bytes - len(CUT)] + CUT
                    for line in lines.splitlines(True))


def chunks(blocks: Iterable[bytes], most_bytes: int) -> Iterator[Tuple[bytes, int]]:
    """Join blocks of lines to (chunk, number of blocks); a block that is too long for one chunk is split at line ends,
    and each of its parts counts."""
    parts: List[bytes] = []
    size = 0
    for block in blocks:
        if size + len(block) > most_bytes:
            if parts:
                yield b"".join(parts), len(parts)
            parts, size = [], 0
            while len(block) > most_bytes:
                end = block.rindex(b"\n", 0, most_bytes) + 1
                yield block[:end], 1
                block = block[end:]
        parts.append(block)
        size += len(block)
    if parts:
        yield b"".join(parts), len(parts)


def writing_to(stream: Any) -> Write:
    """A `write` for a text stream: to its descriptor where it has one, past its buffer and its lock."""
    try:
        return partial(os.write, stream.fileno())
    except (OSError, ValueError, AttributeError):
        return partial(write_text, stream)


def writing_at_once(stream: Any) -> Tuple[Optional[Write], Callable[[], object]]:
    """An `at_once` for a text stream, and its `release`; None where there is none.

    A pipe or terminal is opened once more: O_NONBLOCK of our own does not change what other programs see. A file does
    not wait for a reader."""
    try:
        fd = stream.fileno()
        status = os.fstat(fd)
        if stat.S_ISREG(status.st_mode) or os.path.samestat(status, os.stat(os.devnull)):
            return partial(os.write, fd), nothing
        if stat.S_ISSOCK(status.st_mode):               # of the journal, say
            sock = socket.socket(fileno=os.dup(fd))
            return partial(send_at_once, sock), sock.close
        if stat.S_ISFIFO(status.st_mode) or stat.S_ISCHR(status.st_mode):
            own = os.open("/proc/self/fd/%d" % fd, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
            return partial(os.write, own), partial(os.close, own)
    except (OSError, ValueError, AttributeError):       # no descriptor, or no Linux, or no permission
        pass
    return None, nothing


def nothing() -> None:
    pass


def send_at_once(sock: socket.socket, data: bytes) -> int:
    return sock.send(data, socket.MSG_DONTWAIT)


def write_text(stream: Any, data: bytes) -> None:
    stream.write(data.decode("ascii"))
    stream.flush()


def lost_in_all() -> int:
    """How many items all writers of this process have lost."""
    return sum(writer.lost for writer in list(WRITERS))


# ---- os.fork(), from wherever it is called -----------------------------------------------------------------------

WRITERS: "weakref.WeakSet[Writer]" = weakref.WeakSet()


def before_fork() -> None:
    for writer in list(WRITERS):
        writer.pause()


def after_fork_in_parent() -> None:
    for writer in list(WRITERS):
        writer.resume()


def after_fork_in_child() -> None:
    for writer in list(WRITERS):
        writer.after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=before_fork, after_in_parent=after_fork_in_parent, after_in_child=after_fork_in_child)
