"""Write lines to a descriptor so that no thread waits for their reader.

The log and the trace use it. put() runs in any thread. Where a write that cannot wait is possible, put() writes at
once: to wake another thread for each line costs ten times as much as to write it. What the descriptor does not take at
once waits in a bounded queue for a thread, which writes it in chunks that end at a line's end and are small enough
that the kernel never mixes them with those of another process on the same pipe (PIPE_BUF, pipe(7)).

Processes: the thread starts with the first line that it is to write. os.fork() stops it before and starts it again
afterwards, because a fork copies only the thread that calls it; the child begins with an empty queue and a thread of
its own.
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
BATCH = 1000                    # lines taken at once: bounds what is held beside the queue
REST_S = 0.001                  # between batches: a busy process wakes the thread a thousand times a second, not more
RETRY_S = 0.01                  # a descriptor that does not block, and is full
PAUSE_S = 0.2                   # the longest that a fork waits for a write to end
CLOSE_S = 1.0
SLOW_S = 0.5                    # a disk on which a write at once takes longer (the wait for the GIL included)
SLOW_REST_S = 10.0              # is left to the thread for so long
CUT = b"...\n"

Write = Callable[[bytes], Optional[int]]        # writes some of it, and says how many bytes; None: all of it


class Writer:
    """Lines that are to be written, and the turn at writing them, which one thread at a time has.

    write        as os.write with a descriptor: a short write is continued, an exception loses the chunk
    lost         the text of the line that says how many lines were lost
    chunk_bytes  the most that is given to write() at once; a longer line is cut, and ends in "..."
    release      called once, when nothing will be written any more: closes what was opened for it
    at_once      as `write`, but never waits: it takes less, or raises. None: only the Writer's thread writes

    put() takes the turn if it is free. What at_once() does not take is left to the Writer's thread, and so is the turn:
    the thread gives it back when all is written. So the lines keep their order.

    Methods that any thread may call: put, close, lose. Those for a fork are called by it: pause, resume, after_fork.
    """

    def __init__(self, write: Write, lost: Callable[[int], str], chunk_bytes: int = PIPE_BUF,
                 release: Callable[[], object] = lambda: None, at_once: Optional[Write] = None) -> None:
        self._write = write
        self._at_once = at_once
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

    def put(self, text: str) -> None:
        """Write text, now or later: a line or several, without the last newline. Never waits: beyond the bound, text is
        dropped and counted."""
        lines = self._lines
        if len(lines) >= self._most:
            self.lose(1)
            return
        data = (text + "\n").encode("ascii", "backslashreplace")
        if len(data) <= self._chunk_bytes:
            lines.append(data)
        else:
            lines.extend(chunk for chunk, _count in chunks([cut(data, self._chunk_bytes)], self._chunk_bytes))
        while (lines or self._lost) and self._turn.acquire(False):
            whole = False
            try:
                whole = self._write_at_once(lines) and not self._lost
            finally:
                if whole:
                    self._turn.release()
                else:
                    self._threads_turn = True
        if self._threads_turn:
            self._wake()

    def _write_at_once(self, lines: Deque[bytes]) -> bool:
        """Whether all was written; what was not is left in `lines`."""
        while lines:
            line = lines[0]
            try:
                done = self._at_once(line)              # type: ignore[misc]
            except Exception:                           # it takes nothing now, or never will: the thread finds out
                return False
            if done != len(line) and done is not None:
                lines[0] = line[done:]
                self._half = bool(done)
                return False
            lines.popleft()
        return True

    def lose(self, count: int) -> None:
        """Lines are lost: count them. The thread says so."""
        with self._lock:
            self._lost += count
            self.lost += count
        if self._turn.acquire(False):
            self._threads_turn = True
        if self._threads_turn:
            self._wake()

    def close(self, timeout_s: float = CLOSE_S) -> None:
        """Write what is queued, for timeout_s at the most; what comes later is dropped. In the calling thread where the
        system has no other to give: it is then that the log says why the program ends."""
        with self._lock:
            if self._closed:
                return
            if self._lines:
                self._wake()
            self._closed, self._most = True, 0
            self._give_up_at = monotonic() + timeout_s
            thread = self._thread                       # it ends when it is woken, and none is started any more
        while not self._threads_turn and monotonic() < self._give_up_at:
            if self._turn.acquire(timeout=RETRY_S):     # else a line is being written at once, which may hang, too
                self._threads_turn = True
        self._bell.put(None)
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
            self._bell.put(None)
            thread.join(timeout_s)

    def resume(self) -> None:
        """Go on, in the parent."""
        with self._lock:
            self._paused = False
        if self._threads_turn:
            self._wake()

    def after_fork(self) -> None:
        """Begin anew, in the child: what is queued is the parent's, and so is the thread."""
        self._lines: Deque[bytes] = deque()         # put, and not written yet
        self._bell: SimpleQueue[None] = SimpleQueue()   # wakes the thread; safe in signal handlers, and without a GIL
        self._lock = threading.RLock()      # a signal handler may log while its own thread holds it
        self._thread: Optional[threading.Thread] = None
        self._paused = False
        self._lost = 0                      # and not said yet
        self.lost = 0                       # in all
        self._turn = threading.Lock()
        self._threads_turn = self._at_once is None or self._torn or self._half
        if self._threads_turn:
            self._turn.acquire()

    # ---- the thread -----------------------------------------------------------------------------------------------

    def _wake(self) -> None:
        """Have the thread look at the lines."""
        if self._bell.empty():              # else it will
            self._bell.put(None)
        if self._thread is None:
            with self._lock:
                if self._thread is None and not self._paused and not self._closed:
                    try:                    # a signal handler that logs during start() must not start another one
                        self._thread = threading.Thread(target=self._run_thread, name="writer", daemon=True)
                        self._thread.start()
                    except (RuntimeError, MemoryError):     # no more threads, or the interpreter ends: the next line
                        self._thread = None                 # tries again

    def _run_thread(self) -> None:
        try:
            self._run()
        except BaseException:               # a bug, or no memory: the next line starts another thread
            with self._lock:
                self._thread = None
            raise

    def _run(self) -> None:
        """Write whenever it is woken, until the Writer is closed or paused."""
        while True:
            self._bell.get()
            while self._threads_turn:
                self._write_batch()
                if not self._lines:
                    break
            self._give_back()
            if self._ended():
                return
            if not self._lines:
                sleep(REST_S)

    def _give_back(self) -> None:
        """Let put() write at once again, if that is possible and the last line is whole."""
        with self._lock:
            if not self._threads_turn or self._at_once is None or self._closed or self._torn or self._lost:
                return
            self._threads_turn = False
        self._turn.release()
        if (self._lines or self._lost) and self._turn.acquire(False):       # it came meanwhile
            self._threads_turn = True
            self._bell.put(None)

    def _ended(self) -> bool:
        """Whether the thread is to end."""
        with self._lock:
            closed = self._closed and self._threads_turn            # else a write at once may still need what is opened
            ending = closed or self._paused or monotonic() >= self._give_up_at
            if ending:
                self._thread = None
        if closed:
            self._release()
        return ending

    def _write_batch(self) -> None:
        lines = self._lines
        batch = [lines.popleft() for _ in range(min(len(lines), BATCH))]
        try:
            lost = self._write_all(batch)
        except MemoryError:
            lost = len(batch)
        with self._lock:
            self._lost += lost
            self.lost += lost
            unsaid, self._lost = self._lost, 0
        if unsaid and self._write_all([self._lost_text(unsaid).encode() + b"\n"]):
            with self._lock:
                self._lost += unsaid        # still to be said; `lost` has them already

    def _write_all(self, lines: List[bytes]) -> int:
        """How many were lost."""
        return sum(count for chunk, count in chunks(lines, self._chunk_bytes) if not self._write_chunk(chunk))

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

    A pipe or terminal is opened once more: O_NONBLOCK of our own does not change what other programs see."""
    try:
        fd = stream.fileno()
        status = os.fstat(fd)
        if stat.S_ISREG(status.st_mode):
            return Disk(fd).write, nothing
        if os.path.samestat(status, os.stat(os.devnull)):
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


class Disk:
    """An `at_once` for a file, which has no reader to wait for. After a write that took long it raises for a while: the
    Writer's thread writes then."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._slow_until = 0.0

    def write(self, data: bytes) -> int:
        begun = monotonic()
        if begun < self._slow_until:
            raise BlockingIOError
        done = os.write(self._fd, data)
        if monotonic() - begun > SLOW_S:
            self._slow_until = begun + SLOW_REST_S
        return done


def nothing() -> None:
    pass


def send_at_once(sock: socket.socket, data: bytes) -> int:
    return sock.send(data, socket.MSG_DONTWAIT)


def write_text(stream: Any, data: bytes) -> None:
    stream.write(data.decode("ascii"))
    stream.flush()


def lost_in_all() -> int:
    """How many lines all writers of this process have lost."""
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
