"""What a server process can be told to do, and how the orders reach a worker: over a socket, each behind its length.

The supervisor's end never waits. The worker's end is read by a thread of its own. Both ends are ours, and nothing is
read from a worker, which is the process that attackers talk to; so pickle is safe here.
"""
from __future__ import annotations

import enum
import pickle
import socket
import struct
from typing import Any, BinaryIO, Dict, Iterator, Tuple

SIZE = struct.Struct("!I")


class Order(enum.IntEnum):
    """The most urgent first."""

    ABORT = 1               # end now, whatever the sessions do
    STOP = 2                # stop listening, give the sessions the drain timeout, end
    RELOAD = 3              # put these users and rules in force
    SESSIONS = 4            # log a line for each live session


def pack(order: Order, access: Any = None) -> bytes:
    """The order as it goes over the socket. `access` is what RELOAD puts in force; it has to be picklable."""
    body = pickle.dumps((int(order), access), pickle.HIGHEST_PROTOCOL)
    return SIZE.pack(len(body)) + body


def read(stream: BinaryIO) -> Iterator[Tuple[Order, Any]]:
    """The orders, each with its `access`, until EOF."""
    while True:
        size = stream.read(SIZE.size)
        if len(size) < SIZE.size:
            return
        body = stream.read(*SIZE.unpack(size))
        if len(body) < SIZE.unpack(size)[0]:
            return
        order, access = pickle.loads(body)
        yield Order(order), access


class Outbox:
    """The orders for one worker. What its socket does not take waits here: the latest of each kind, so that a worker
    that does not read costs neither time nor unbounded memory."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self.sock = sock
        self._begun = memoryview(b"")               # the rest of the order that is being sent
        self._waiting: Dict[Order, bytes] = {}

    def put(self, order: Order, message: bytes) -> None:
        self._waiting[order] = message
        self.flush()

    def flush(self) -> bool:
        """Send what the socket takes, the most urgent first. Returns whether something is left."""
        try:
            while self._begun or self._waiting:
                if not self._begun:
                    self._begun = memoryview(self._waiting.pop(min(self._waiting)))
                self._begun = self._begun[self.sock.send(self._begun):]
        except BlockingIOError:
            return True
        except OSError:                             # the worker is dying, and will be replaced
            self._begun = memoryview(b"")
            self._waiting.clear()
        return False
