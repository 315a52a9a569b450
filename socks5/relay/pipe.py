"""One direction of a tunnel: what was read from one socket and is not yet written to the other.

A Pipe reads only while it holds nothing, and writes only while it holds something. That is the whole of backpressure
and of half-close. Nothing here waits. Any thread that has the tunnel may run it, one at a time: the relay loop, or the
thread of a busy tunnel, which sends the bytes through a kernel pipe (splice.py).
"""
from __future__ import annotations

import os
import socket
import struct
import sys
from contextlib import suppress
from typing import Any, List, Optional, Union

from . import splice

try:
    import fcntl
except ImportError:                         # Windows
    fcntl = None                            # type: ignore[assignment]

CHUNK_BYTES = 1 << 16                       # one read
LARGE_BYTES = CHUNK_BYTES // 2              # a large read, which tells of much to move
SMALL_BYTES = 448                           # one read where little comes: for up to 479, Python need not ask malloc()
DONTWAIT = getattr(socket, "MSG_DONTWAIT", 0)       # spares small tunnels the call that makes a socket non-blocking
RESET_ON_CLOSE = struct.pack("ii", 1, 0)    # SO_LINGER on, for 0 s: close() sends RST
# ioctl(): is the next byte to be read the urgent one? Linux, then BSD and macOS: asm/sockios.h, sys/sockio.h.
SIOCATMARK = 0x8905 if sys.platform.startswith("linux") else 0x40047307 if fcntl else 0

# Receive buffers that no thread uses just now: as many as ever read at the same time. recv() would allocate CHUNK_BYTES
# for each read and shrink that to what has come, which leaves holes in the heap: tens of MiB with glibc. The first one
# is not made amid a crowd: see protocol/memory.py.
_buffers: List[memoryview] = [memoryview(bytearray(CHUNK_BYTES))]


class Broken(Exception):
    """The connection of this socket failed while bytes were moved."""

    def __init__(self, sock: socket.socket, error: OSError) -> None:
        super().__init__(sock, error)
        self.sock = sock
        self.error = error


class Pipe:
    """From the socket `source` to the socket `sink`.

    held        bytes in hand: in `chunk`, or in the kernel pipe where there is one
    total       bytes that the sink has taken
    done        the source has said EOF, and nothing is in hand
    large       how many large reads there were, all delivered: see Tunnel.busy
    urgent      `chunk` is the one byte that the source sent as urgent data
    parked      bytes of `chunk` that count for splice.parked: what a kernel pipe held when it was given back
    small       fill_small() will do: nothing is in hand, the last read was small, no gate or kernel pipe is in the way
    room        bytes of one read
    gate        limits what is read (limited.Gate); None while no rate limit holds
    resume_at   when it may read again, or write early data, while the gate holds it back; 0: now
    """

    __slots__ = ("source", "sink", "chunk", "kernel", "held", "total", "done", "large", "urgent", "parked", "small",
                 "room", "gate", "resume_at")

    def __init__(self, source: socket.socket, sink: socket.socket, early: bytes = b"") -> None:
        """`early` is what was read from the source before the tunnel stood."""
        self.source = source
        self.sink = sink
        self.chunk: Union[bytes, memoryview] = early
        self.kernel: Optional[splice.KernelPipe] = None
        self.held = len(early)
        self.total = 0
        self.done = False
        self.large = 0
        self.urgent = False
        self.parked = 0
        self.small = not early
        self.room = CHUNK_BYTES
        self.gate: Any = None
        self.resume_at = 0.0

    def fill_small(self) -> Optional[bool]:
        """The same as fill() for what nearly all tunnels have: a few bytes now and then. Only while `small`."""
        try:
            data = self.source.recv(SMALL_BYTES, DONTWAIT)
        except BlockingIOError:
            return None
        except OSError as exc:
            raise Broken(self.source, exc) from None
        if not data:
            self.small, self.done = False, True
            return True
        if len(data) == SMALL_BYTES:
            return self._fill_buffer(data)
        try:
            sent = self.sink.send(data, DONTWAIT)
        except BlockingIOError:
            sent = 0
        except OSError as exc:
            raise Broken(self.sink, exc) from None
        self.total += sent
        if sent == len(data):
            return False
        self.small = False
        self.chunk, self.held = data[sent:], len(data) - sent
        return True

    def fill(self) -> Optional[bool]:
        """Read what the source has and pass on what the sink takes; to be called while nothing is in hand.

        None when nothing was there after all; True when the caller has to look: something is in hand, the source said
        EOF, or a read was large. Raises Broken.
        """
        return self._fill_buffer() if self.kernel is None else self._fill_kernel(self.kernel)

    def _fill_buffer(self, begun: bytes = b"") -> Optional[bool]:
        """fill() without a kernel pipe. `begun` was read already, and goes first."""
        self.small = False
        try:
            buffer = _buffers.pop()
        except IndexError:
            buffer = memoryview(bytearray(CHUNK_BYTES))
        try:
            size = self._read_on(buffer, begun) if begun else self.source.recv_into(buffer, self.room, DONTWAIT)
            if not size:
                self.done = True
                return True
            try:
                sent = self.sink.send(buffer[:size], DONTWAIT)
            except BlockingIOError:
                sent = 0
            except OSError as exc:
                raise Broken(self.sink, exc) from None
            if sent < size:
                self.chunk, self.held = bytes(buffer[sent:size]), size - sent
        except BlockingIOError:
            return None
        except OSError as exc:
            raise Broken(self.source, exc) from None
        finally:
            _buffers.append(buffer)
        self.total += sent
        if sent < size:
            return True
        if size < LARGE_BYTES:
            self.small = size < SMALL_BYTES and self.gate is None
            return False
        self.large += 1
        return True

    def _read_on(self, buffer: memoryview, begun: bytes) -> int:
        """Read what comes behind `begun`, so that a message goes on in one piece. How many bytes it is with that."""
        size = len(begun)
        buffer[:size] = begun
        try:
            return size + self.source.recv_into(buffer[size:], 0, DONTWAIT)
        except BlockingIOError:
            return size
        except OSError:                     # a reset: what came before it is passed on
            with suppress(OSError):
                self.total += self.sink.send(begun, DONTWAIT)
            raise

    def _fill_kernel(self, kernel: splice.KernelPipe) -> Optional[bool]:
        try:
            self.held = kernel.fill(self.source.fileno())
        except BlockingIOError:
            pass
        except OSError as exc:
            raise Broken(self.source, exc) from None
        if self.held:
            self.drain()
            return self.held > 0
        self.close_kernel()                 # EOF, or urgent data in the way: what it is, recv() says
        return self.fill()

    def fill_urgent(self) -> Optional[bool]:
        """The same while urgent data is on its way. recv() stops in front of the urgent byte, which is passed on as
        urgent data again, so that it keeps its place among the others.                         RFC 6093, tcp(7)"""
        if not self.at_mark():
            self.close_kernel()             # splice() stops in front of it as well, and does not say so
            return self.fill()
        self.small = False
        try:
            self.chunk = self.source.recv(1, DONTWAIT)
        except BlockingIOError:
            return None
        except OSError as exc:
            raise Broken(self.source, exc) from None
        self.held = len(self.chunk)
        self.done = not self.held
        if self.held:
            self.urgent = True
            self.drain()
        return True

    def at_mark(self) -> bool:
        try:
            return bool(SIOCATMARK and any(fcntl.ioctl(self.source.fileno(), SIOCATMARK, bytes(4))))
        except OSError:                     # then it is passed on in line
            return False

    def drain(self) -> None:
        """Pass on what the sink takes of what is in hand. Raises Broken."""
        kernel = self.kernel
        try:
            if kernel is not None and kernel.held:
                sent = kernel.empty(self.sink.fileno())
            else:
                sent = self.sink.send(self.chunk, DONTWAIT | socket.MSG_OOB if self.urgent else DONTWAIT)
                self.chunk = memoryview(self.chunk)[sent:] if sent < self.held else b""
                self.urgent = False
        except BlockingIOError:
            return
        except OSError as exc:
            raise Broken(self.sink, exc) from None
        self.held -= sent
        self.total += sent
        if self.parked and not self.held:
            self._unpark()

    def use_kernel(self, owner: str = "") -> None:
        """Send the bytes through a kernel pipe from now on, if the owner can have one. Nothing is in hand, and neither
        socket blocks: splice() has no flag for that."""
        self.large = 0
        if self.kernel is None and splice.available:
            try:
                self.kernel = splice.KernelPipe(owner)
                self.small = False
            except OSError:
                pass

    def leave_kernel(self) -> None:
        """Take back what the kernel pipe holds, and close it."""
        if self.kernel is not None:
            if self.kernel.held:
                self.parked = self.kernel.held
                splice.park(self.parked)
                self.chunk = self.kernel.read()
            self.close_kernel()

    def close_kernel(self) -> None:
        """Close the kernel pipe, with all that it holds."""
        if self.kernel is not None:
            self.kernel.close()
            self.kernel = None

    def close(self) -> None:
        """Let go of what is in hand, and of what the gate has reserved. The sockets are the owner's."""
        self.close_kernel()
        if self.gate is not None:
            self.gate.close(self)
        self.chunk = b""
        self._unpark()

    def taken(self) -> int:
        """Bytes that were read: those that the sink has taken, and those in hand."""
        return self.total + self.held

    def _unpark(self) -> None:
        splice.park(-self.parked)
        self.parked = 0


def reset_on_close(sock: socket.socket) -> None:
    """Make close() send RST in place of FIN: the peer learns that the stream was cut off."""
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
    except OSError:                         # the connection is dead already
        pass


def error_of(sock: socket.socket) -> Optional[OSError]:
    """The error that the kernel has noted for this socket, which then forgets it; None if there is none."""
    number = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
    return OSError(number, os.strerror(number)) if number else None
