"""A tunnel of which one side is encoded, or both: a Pipe decodes, another encodes what goes through.

All else is as in any tunnel: half-close, reset, backpressure, time limits, a thread of its own while it is busy. No
kernel pipe: the bytes have to be seen. Kerberos takes some 150 us to encrypt or decrypt FIRST_BYTES in one message:
that is how long other tunnels wait for one in the relay loop, which has it only while it is quiet. Messages without a
payload cost 9 ms for as many bytes: a tunnel with such ones gets a thread of its own at once. Urgent data is passed on
in line. Knows no SOCKS.
"""
from __future__ import annotations

from functools import partial
from typing import Callable, Optional, Tuple, Union

from ..protocol.envelope import PAYLOAD_BYTES, Envelope, Opening, Sealing
from ..protocol.errors import ProtocolError
from .pipe import DONTWAIT, Broken, Pipe
from .tunnel import BUSY_READS, Tunnel

FIRST_BYTES = 1 << 14                       # one read, and what is encoded or decoded before others are served;
MORE_BYTES = PAYLOAD_BYTES                  # and in a thread of its own
COSTLY_BYTES = 1 << 12                      # so much in whole messages, less than half of it payload, is busy in itself
CUT = "the end within a message"

Place = Union[Sealing, Opening]


def read_bytes(size: int, _coded: int) -> int:
    """The payload of what was encoded."""
    return size


def coded_bytes(_size: int, coded: int) -> int:
    """The payload of what was decoded."""
    return coded


class CodingPipe(Pipe):
    """A Pipe that passes on code(what it read), and whose `total` counts plain bytes that were delivered.

    measure         how many of them there are, from the sizes of what was read and of its code
    unfinished      says how many bytes are kept because their message is not whole; an EOF would cut it off
    payload         plain bytes in `chunk`; they count when all of it is delivered
    size            of one read
    place           while it is busy: memory into which it receives, and in which the bytes are coded without a copy
    """

    __slots__ = ("code", "unfinished", "measure", "payload", "size", "place", "make_place")

    def __init__(self, plain: Pipe, code: Callable[[bytes], bytes], measure: Callable[[int, int], int],
                 unfinished: Callable[[], int] = lambda: 0,
                 make_place: Callable[[], Optional[Place]] = lambda: None) -> None:
        """`plain` is the Pipe in whose place it is: what that has in hand is passed on as it is."""
        early = bytes(plain.chunk)
        super().__init__(plain.source, plain.sink, early)
        self.small = False
        self.code = code
        self.measure = measure
        self.unfinished = unfinished
        self.payload = len(early)
        self.size = FIRST_BYTES
        self.place: Optional[Place] = None
        self.make_place = make_place

    def fill(self) -> Optional[bool]:
        try:
            most, size, coded, unfinished = self._read_coded()
            if not size and unfinished:
                raise OSError(0, CUT)
        except BlockingIOError:
            return None
        except OSError as exc:
            raise Broken(self.source, exc) from None
        except ProtocolError as exc:
            raise Broken(self.source, OSError(0, str(exc))) from None
        self.done = not size
        self.large = self.large + 1 if size == most else 0
        if len(coded) < size // 2 and size - unfinished >= COSTLY_BYTES:
            self.large = BUSY_READS
        if coded:
            self.chunk, self.held = coded, len(coded)
            self.payload = self.measure(size, len(coded))
            self.drain()
        return self.done or self.held > 0 or self.large > 0

    def _read_coded(self) -> Tuple[int, int, Union[bytes, memoryview], int]:
        """The most that could be read, what was, its code, and the bytes of a message that is not whole."""
        place = self.place
        if place:
            memory = place.room()
            size = self.source.recv_into(memory, min(len(memory), self.room), DONTWAIT)
            return len(memory), size, place.code(size) if size else b"", place.unfinished
        data = self.source.recv(min(self.size, self.room), DONTWAIT)
        return self.size, len(data), self.code(data) if data else b"", self.unfinished()

    def fill_urgent(self) -> Optional[bool]:
        return self.fill()

    def drain(self) -> None:
        try:
            sent = self.sink.send(self.chunk, DONTWAIT)
        except BlockingIOError:
            return
        except OSError as exc:
            raise Broken(self.sink, exc) from None
        self.held -= sent
        self.chunk = memoryview(self.chunk)[sent:] if self.held else b""
        if not self.held:
            self.total += self.payload          # another thread may read it at any time: encoded bytes never count

    def taken(self) -> int:
        """The same in plain bytes, and what is kept of a message that is not whole: so a long one is read in portions,
        and paid for only once."""
        kept = self.place.unfinished if self.place else self.unfinished()
        return self.total + (self.payload if self.held else 0) + kept

    def use_kernel(self, owner: str = "") -> None:
        """Not here, but a thread of its own may read more at a time, and has memory in which the bytes are coded."""
        self.size = MORE_BYTES
        self.place = self.place or self.make_place()

    def leave_kernel(self) -> None:
        self.size = FIRST_BYTES
        if self.place:
            self.place.close()
            self.place = None


class ProtectedTunnel(Tunnel):
    """A Tunnel whose client or remote, or both, speak through an envelope."""

    __slots__ = ()

    def __init__(self, plain: Tunnel, client: Optional[Envelope], remote: Optional[Envelope] = None,
                 held: bytes = b"") -> None:
        """In the place of `plain`, which has not begun. `held` was read from the remote already, and is plain."""
        super().__init__(plain.client, plain.remote, b"", plain.idle_s, plain.half_closed_s, plain.session,
                         plain.owner)
        self.up = coding(plain.up, client, remote, bytes(plain.up.chunk))
        self.down = coding(plain.down, remote, client, held)


def coding(plain: Pipe, opens: Optional[Envelope], seals: Optional[Envelope], early: bytes) -> Pipe:
    """A pipe from a side that is opened to a side that is sealed for. `early` is plain, and goes first."""
    plain.chunk = seals.seal(early) if seals and early else early
    if opens and seals:
        both = Recoder(opens, seals)
        pipe = CodingPipe(plain, both.code, both.measure, lambda: both.opens.unfinished)
    elif opens:
        pipe = CodingPipe(plain, opens.open, coded_bytes, partial(getattr, opens, "unfinished"), opens.opening)
    elif seals:
        pipe = CodingPipe(plain, seals.seal, read_bytes, make_place=seals.sealing)
    pipe.payload = len(early)
    return pipe


class Recoder:
    """From one envelope into another."""

    def __init__(self, opens: Envelope, seals: Envelope) -> None:
        self.opens, self.seals = opens, seals
        self.plain = 0

    def code(self, data: bytes) -> bytes:
        plain = self.opens.open(data)
        self.plain = len(plain)
        return self.seals.seal(plain) if plain else b""

    def measure(self, _size: int, _coded: int) -> int:
        return self.plain
