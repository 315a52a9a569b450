"""Ask a worker: the request goes over a socket made before the fork, the answer over a socket sent with the request.

The request's datagram carries one end of a fresh socket pair; the worker writes its answer there and closes it. So an
answer ends with EOF, a worker that dies amid one leaves nothing behind for the next, and neither side waits for the
other without a time limit. The requests to a worker that has died go to its replacement.
"""
from __future__ import annotations

import array
import json
import logging
import socket
from time import monotonic
from typing import Any, Callable, Dict, Iterable, Iterator, List

log = logging.getLogger(__name__)

ASK_BYTES = 1 << 16                 # a character of the HTTP request, which has at most 8 KiB, takes up to 6 bytes
ANSWER_BYTES = 16 << 20             # of one worker; a session takes some 200
ANSWER_S = 2.0
FD_BYTES = array.array("i").itemsize

Query = Dict[str, str]
Answer = Callable[[Query], Iterable[bytes]]     # lines of JSON


class Channel:
    """The way to one worker: `ask` in the process that asks, `answer` in the worker. Made before both are forked."""

    def __init__(self) -> None:
        self._asking, self._answering = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._asking.setblocking(False)

    def ask(self, query: Query) -> "Asked":
        """Send it; read the result of all that were asked together, so that they work at the same time."""
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                self._asking.sendmsg([json.dumps(query).encode()], [
                    (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [theirs.fileno()]))])
            except OSError:                     # its queue is full: it answers nothing at the moment
                pass
        return Asked(ours)

    def answer(self, answer: Answer, idle: Callable[[], object], every_s: float) -> None:
        """For a thread of the worker: answer what comes; call idle() every `every_s` seconds. Returns after close()."""
        due = monotonic()
        while True:
            left_s = due - monotonic()
            if left_s <= 0:
                idle()
                due = monotonic() + every_s
                continue
            try:
                self._answering.settimeout(left_s)
                data, extra, _flags, _sender = self._answering.recvmsg(ASK_BYTES, socket.CMSG_LEN(FD_BYTES))
            except OSError:
                if self._answering.fileno() < 0:            # closed
                    return
                continue                        # the time is over
            for sock in received(extra):
                with sock:
                    try:
                        sock.settimeout(ANSWER_S)
                        for line in answer(json.loads(data)):
                            sock.sendall(line + b"\n")
                    except OSError:             # the worker that asked has ended
                        pass
                    except Exception:           # costs this answer
                        log.exception("bug in an answer for the status page")

    def close(self) -> None:
        self._asking.close()
        self._answering.close()


class Asked:
    """A request under way, whose answer can be read once."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._deadline = monotonic() + ANSWER_S

    def read(self) -> List[bytes]:
        """The lines of the answer; those that came where the worker died or is too slow."""
        pieces: List[bytes] = []
        size = 0
        with self._sock:
            while size < ANSWER_BYTES:
                self._sock.settimeout(max(self._deadline - monotonic(), 0.001))
                try:
                    data = self._sock.recv(1 << 16)
                except OSError:
                    break
                if not data:
                    break
                pieces.append(data)
                size += len(data)
        return b"".join(pieces).split(b"\n")[:-1]


def received(extra: Iterable[Any]) -> Iterator[socket.socket]:
    """The sockets that came with a datagram."""
    for level, kind, data in extra:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            fds = array.array("i")
            fds.frombytes(data[:len(data) - len(data) % FD_BYTES])
            for fd in fds:
                yield socket.socket(fileno=fd)
