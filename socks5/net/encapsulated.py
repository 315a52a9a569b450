"""A TCP socket that speaks through an envelope, for clients: plain bytes in and out. RFC 1961 section 5."""
from __future__ import annotations

import socket
from typing import Any

from ..protocol.envelope import Envelope
from ..protocol.errors import ProtocolError, ProxyError

RECEIVE_BYTES = 1 << 16


class ProtectedSocket(socket.socket):
    """The client's end of a tunnel that a security context protects. RFC 1961 §5

    A socket whose recv() and send() take plain bytes. As with TLS, select() may wait although pending() bytes are
    there. One thread at a time; recv_into(), makefile() and time-outs work, flags and the other calls do not.
    """

    def __init__(self, sock: socket.socket, envelope: Envelope, held: bytes = b"") -> None:
        """Takes over `sock`. `held` are plain bytes that were read from it already."""
        timeout = sock.gettimeout()
        super().__init__(fileno=sock.detach())
        self.settimeout(timeout)
        self._envelope = envelope
        self._held = held

    def pending(self) -> int:
        return len(self._held)

    def recv(self, size: int, flags: int = 0) -> bytes:
        """Raises OSError for what is no message of the proxy, and at an EOF within a message."""
        while not self._held:
            raw = super().recv(RECEIVE_BYTES)
            if not raw:
                if self._envelope.unfinished:
                    raise ProxyError("the end within a message")
                return b""
            try:
                self._held = self._envelope.open(raw)
            except ProtocolError as exc:
                raise ProxyError(str(exc)) from None
        data, self._held = self._held[:size], self._held[size:]
        return data

    def recv_into(self, buffer: Any, nbytes: int = 0, flags: int = 0) -> int:
        with memoryview(buffer).cast("B") as view:
            data = self.recv(nbytes or len(view))
            view[:len(data)] = data
            return len(data)

    def sendall(self, data: Any, flags: int = 0) -> None:
        super().sendall(self._envelope.seal(bytes(data)))

    def send(self, data: Any, flags: int = 0) -> int:
        """Sends all of it: a message that is begun has to be finished."""
        self.sendall(data)
        with memoryview(data) as view:
            return view.nbytes
