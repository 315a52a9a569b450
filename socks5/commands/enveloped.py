"""The socket of a UDP association with a client or an upstream by GSSAPI: each datagram is one encapsulated message.

It has the methods that udp.py and datagrams.py call of a socket. RFC 1961 section 5.
"""
from __future__ import annotations

import errno
import socket
from typing import Any, Tuple, Union

from ..protocol.envelope import Envelope
from ..protocol.errors import ProtocolError


class EnvelopedSocket:
    """Opens what it receives from `client` and seals what it sends."""

    def __init__(self, sock: socket.socket, envelope: Envelope, client: str) -> None:
        """`client`, or the upstream, is the only IP address from which datagrams are opened; what comes from others is
        returned empty."""
        self.sock = sock
        self.envelope = envelope
        self.client = client
        self.fileno, self.close, self.getsockname = sock.fileno, sock.close, sock.getsockname

    def recvfrom_into(self, buffer: bytearray) -> Tuple[int, Any]:
        """Raises OSError EBADMSG for a datagram that is not encapsulated by this client, and for a replay."""
        size, sender = self.sock.recvfrom_into(buffer)
        if sender[0] != self.client:
            return 0, sender
        try:
            data = self.envelope.open_one(bytes(buffer[:size]))
        except ProtocolError as exc:
            raise OSError(errno.EBADMSG, str(exc)) from None
        buffer[:len(data)] = data
        return len(data), sender

    def sendto(self, datagram: Union[bytes, bytearray], address: Any) -> int:
        """Raises OSError EMSGSIZE when it is too long with its envelope."""
        try:
            return self.sock.sendto(self.envelope.seal_one(bytes(datagram)), address)
        except ProtocolError as exc:
            raise OSError(errno.EMSGSIZE, str(exc)) from None

    def getsockopt(self, *_: int) -> int:
        """The kernel is not to cut up one long datagram: datagrams.py asks for that."""
        raise OSError(errno.ENOPROTOOPT, "each datagram has an envelope of its own")
