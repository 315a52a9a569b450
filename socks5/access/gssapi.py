"""GSS-API by ctypes: the few calls of RFC 2743 that a server and a client of RFC 1961 need. C bindings: RFC 2744.

The system's library is loaded when GSSAPI is asked for, not before. ctypes releases the GIL around each call. What the
library allocates is released here: names and buffers at once, credentials and contexts with their object.
A context is for one thread at a time; credentials are for all. Opens no socket: the owner carries the tokens.
"""
from __future__ import annotations

import ctypes
import threading
from ctypes import POINTER, byref, c_char_p, c_int, c_size_t, c_uint32, c_void_p
from functools import lru_cache
from typing import Any, Dict, List, Optional, Tuple

from ..protocol.codes import Protection
from ..protocol.envelope import MARGIN_BYTES
from ..protocol.errors import GssError, GssUnavailable
from ..protocol.messages import MAX_TOKEN_BYTES

# MIT on Linux, Heimdal on Linux, either on BSD, macOS.
LIBRARIES = ("libgssapi_krb5.so.2", "libgssapi.so.3", "libgssapi_krb5.so", "libgssapi.so",
             "/System/Library/Frameworks/GSS.framework/GSS")
HEIMDALS = "__gss_c_nt_hostbased_service_oid_desc"          # a name that MIT's library lacks
ERRORS = 0xFFFF0000                 # of a major status: calling and routine errors
DUPLICATE, OLD, UNSEQ, GAP = 2, 4, 8, 16
REPEATED, MOVED = DUPLICATE | OLD, DUPLICATE | OLD | UNSEQ | GAP
MOVES = {DUPLICATE: "repeated", OLD: "too old", UNSEQ: "out of order", GAP: "not the next one"}
MUTUAL, REPLAY, SEQUENCE, CONF, INTEG, ANON = 2, 4, 8, 16, 32, 64
CONTINUE_NEEDED, ACCEPT = 1, 2      # a bit of a status; a gss_cred_usage_t
INDEFINITE = 0xFFFFFFFF
GSS_CODE, MECH_CODE = 1, 2          # for gss_display_status
ERRNOS = range(1, 1 << 12)          # of a minor status: an errno as the system has it; codes of a mechanism are above
STATUS_PARTS = 8                    # of one status in words
STATUS_CHARS = 300
NAME_BYTES = 255                    # of a principal: as long as a UNAME
DATA, HEADER, TRAILER, PADDING, STREAM = 1, 2, 7, 9, 10     # GSS_IOV_BUFFER_TYPE


class Buffer(ctypes.Structure):
    """gss_buffer_desc."""

    _fields_ = [("length", c_size_t), ("value", c_void_p)]

    @classmethod
    def of(cls, data: bytes) -> Buffer:
        """A view of `data`, which the caller keeps."""
        return cls(len(data), ctypes.cast(c_char_p(data), c_void_p))


class KeyValue(ctypes.Structure):
    """gss_key_value_element_desc."""

    _fields_ = [("key", c_char_p), ("value", c_char_p)]


class KeyValues(ctypes.Structure):
    """gss_key_value_set_desc."""

    _fields_ = [("count", c_uint32), ("elements", POINTER(KeyValue))]


class Part(ctypes.Structure):
    """gss_iov_buffer_desc."""

    _fields_ = [("kind", c_uint32), ("buffer", Buffer)]


MINOR, HANDLE, BUFFER = POINTER(c_uint32), POINTER(c_void_p), POINTER(Buffer)
# The arguments behind minor_status, which is the first of all. All return a major status.
PROTOTYPES: Dict[str, Tuple[Any, ...]] = {
    "gss_import_name": (BUFFER, c_void_p, HANDLE),
    "gss_display_name": (c_void_p, BUFFER, HANDLE),
    "gss_release_name": (HANDLE,),
    "gss_acquire_cred": (c_void_p, c_uint32, c_void_p, c_int, HANDLE, HANDLE, MINOR),
    "gss_release_cred": (HANDLE,),
    "gss_accept_sec_context": (HANDLE, c_void_p, BUFFER, c_void_p, HANDLE, HANDLE, BUFFER, MINOR, MINOR, HANDLE),
    "gss_init_sec_context": (c_void_p, HANDLE, c_void_p, c_void_p, c_uint32, c_uint32, c_void_p, BUFFER, HANDLE, BUFFER,
                             MINOR, MINOR),
    "gss_delete_sec_context": (HANDLE, BUFFER),
    "gss_wrap": (c_void_p, c_int, c_uint32, BUFFER, POINTER(c_int), BUFFER),
    "gss_unwrap": (c_void_p, BUFFER, BUFFER, POINTER(c_int), MINOR),
    "gss_display_status": (c_uint32, c_int, c_void_p, MINOR, BUFFER),
    "gss_release_buffer": (BUFFER,),
}
FROM_STORE: Dict[str, Tuple[Any, ...]] = {
    "gss_acquire_cred_from": (c_void_p, c_uint32, c_void_p, c_int, POINTER(KeyValues), HANDLE, HANDLE, MINOR)}
# Extensions of MIT's library. Heimdal's gss_unwrap_iov does not take a STREAM.
IN_PLACE: Dict[str, Tuple[Any, ...]] = {
    "gss_wrap_iov_length": (c_void_p, c_int, c_uint32, POINTER(c_int), POINTER(Part), c_int),
    "gss_wrap_iov": (c_void_p, c_int, c_uint32, POINTER(c_int), POINTER(Part), c_int),
    "gss_unwrap_iov": (c_void_p, POINTER(c_int), MINOR, POINTER(Part), c_int),
}


class Library:
    """The library with its argument types declared, and each status checked."""

    def __init__(self, path: str) -> None:
        """Raises OSError when there is no such library, AttributeError when it is another one."""
        self.path = path
        self.dll = ctypes.CDLL(path)
        self.heimdal = hasattr(self.dll, HEIMDALS)
        self.from_store = all(hasattr(self.dll, name) for name in FROM_STORE)
        self.in_place = not self.heimdal and all(hasattr(self.dll, name) for name in IN_PLACE)
        for name, arguments in {**PROTOTYPES, **(FROM_STORE if self.from_store else {}),
                                **(IN_PLACE if self.in_place else {})}.items():
            function = getattr(self.dll, name)
            function.argtypes, function.restype = (MINOR, *arguments), c_uint32
        # GSS_C_NT_HOSTBASED_SERVICE: a pointer in MIT's library, the address of the thing itself in Heimdal's.
        self.hostbased = (c_void_p(ctypes.addressof(ctypes.c_char.in_dll(self.dll, HEIMDALS))) if self.heimdal else
                          c_void_p.in_dll(self.dll, "GSS_C_NT_HOSTBASED_SERVICE"))

    def call(self, name: str, *arguments: Any) -> int:
        """The supplementary bits of the major status. Raises GssError, GssUnavailable for an errno."""
        minor = c_uint32()
        major = getattr(self.dll, name)(byref(minor), *arguments)
        if major & ERRORS:
            kind = GssUnavailable if minor.value in ERRNOS else GssError
            raise kind("%s: %s" % (name, self.words(major, minor.value)))
        return int(major)

    def words(self, major: int, minor: int) -> str:
        """Both statuses as one line."""
        parts = self._status(major, GSS_CODE) + (self._status(minor, MECH_CODE) if minor else ())
        line = " ".join(" ".join(parts).split())
        return ascii(line)[1:-1][:STATUS_CHARS] or "status 0x%08x" % major

    def _status(self, value: int, kind: int) -> Tuple[str, ...]:
        parts: List[str] = []
        more, minor = c_uint32(), c_uint32()
        while len(parts) < STATUS_PARTS:
            with Output(self) as text:
                if self.dll.gss_display_status(byref(minor), value, kind, None, byref(more), byref(text)) & ERRORS:
                    break
                parts.append(text.bytes().decode("utf-8", "replace"))
            if not more.value:
                break
        return tuple(parts)

    def name(self, handle: c_void_p) -> bytes:
        with Output(self) as text:
            self.call("gss_display_name", handle, byref(text), None)
            return text.bytes()


class Output(Buffer):
    """A buffer that the library fills, released at the end of the block."""

    def __init__(self, library: Library) -> None:
        super().__init__(0, None)
        self.library = library

    def bytes(self) -> bytes:
        return ctypes.string_at(self.value, self.length) if self.length else b""

    def __enter__(self) -> Output:
        return self

    def __exit__(self, *_: object) -> None:
        self.library.dll.gss_release_buffer(byref(c_uint32()), byref(self))


class Name:
    """An imported SERVICE or SERVICE@HOST, released at the end of the block. None for "", which is GSS_C_NO_NAME."""

    def __init__(self, library: Library, service: str) -> None:
        self.library, self.handle = library, c_void_p()
        text = service.encode("utf-8", "surrogateescape")
        if text:
            library.call("gss_import_name", byref(Buffer.of(text)), library.hostbased, byref(self.handle))

    def __enter__(self) -> c_void_p:
        return self.handle

    def __exit__(self, *_: object) -> None:
        if self.handle:
            self.library.dll.gss_release_name(byref(c_uint32()), byref(self.handle))


@lru_cache(maxsize=None)
def library() -> Library:
    """The system's library. Raises GssError when there is none."""
    for path in LIBRARIES:
        try:
            return Library(path)
        except (OSError, AttributeError, ValueError):
            continue
    raise GssError("this system has no GSS-API library (Debian: libgssapi-krb5-2)")


class Credentials:
    """The keys of the service: those in the keytab for `service`, or all for "". Any thread may use them.

    The library reads the keytab again for each client. A copy in another process acquires them when first used."""

    def __init__(self, service: str, keytab: str) -> None:
        """Raises GssError when the keytab has no key for the service."""
        self.service = service
        self.keytab = keytab
        self._lock = threading.Lock()
        self._gss = library()
        self._handle: Optional[c_void_p] = self._acquire()

    def __getstate__(self) -> Tuple[str, str]:
        return self.service, self.keytab

    def __setstate__(self, state: Tuple[str, str]) -> None:
        self.service, self.keytab = state
        self._lock, self._gss, self._handle = threading.Lock(), library(), None

    def context(self) -> Acceptor:
        """The server's side of a new security context."""
        return Acceptor(self)

    def handle(self) -> c_void_p:
        with self._lock:
            if self._handle is None:
                self._handle = self._acquire()
            return self._handle

    def usable(self) -> bool:
        """Whether the keytab can still be read and has a key: without, the library refuses every token."""
        try:
            library().dll.gss_release_cred(byref(c_uint32()), byref(self._acquire()))
            return True
        except GssError:
            return False

    def _acquire(self) -> c_void_p:
        gss, handle = self._gss, c_void_p()
        keytab = self.keytab.encode("utf-8", "surrogateescape")
        with Name(gss, self.service) as name:
            if keytab and gss.from_store:
                element = KeyValue(b"keytab", b"FILE:" + keytab)
                gss.call("gss_acquire_cred_from", name, INDEFINITE, None, ACCEPT,
                         byref(KeyValues(1, ctypes.pointer(element))), byref(handle), None, None)
                return handle
            if keytab:                                      # Heimdal's: for the whole process, from now on
                register = gss.dll.gsskrb5_register_acceptor_identity
                register.argtypes, register.restype = (c_char_p,), c_uint32
                status = register(b"FILE:" + keytab)
                if status & ERRORS:
                    raise GssError("gsskrb5_register_acceptor_identity: %s" % gss.words(status, 0))
            gss.call("gss_acquire_cred", name, INDEFINITE, None, ACCEPT, byref(handle), None, None)
        return handle

    def __del__(self) -> None:
        handle = vars(self).get("_handle")
        if handle:
            self._gss.dll.gss_release_cred(byref(c_uint32()), byref(handle))


class Context:
    """A security context. step() until `done`; then `flags` and `peer` are known, and `level` says what wrap() does.

    may_be_replay   the login may be a copy of an earlier one, until unwrap() has taken a message
    """

    def __init__(self) -> None:
        self.gss = library()
        self.handle = c_void_p()
        self.flags = 0
        self.peer = b""
        self.done = False
        self.level = Protection.CLEAR
        self.may_be_replay = False

    def step(self, token: bytes) -> bytes:
        """Take the peer's token; the token for the peer, or b"" if there is none. Raises GssError."""
        raise NotImplementedError

    def supports(self, level: int) -> bool:
        """Whether the mechanism can give this protection here."""
        return bool(level == Protection.CLEAR or self.flags & (CONF if level == Protection.CONFIDENTIALITY else INTEG))

    def wrap(self, data: bytes) -> bytes:
        private = self.level == Protection.CONFIDENTIALITY
        state = c_int()
        with Output(self.gss) as token:
            self.gss.call("gss_wrap", self.handle, private, 0, byref(Buffer.of(data)), byref(state), byref(token))
            if private and not state:
                raise GssError("gss_wrap: the message is not encrypted")
            if token.length > MAX_TOKEN_BYTES:
                raise GssError("gss_wrap: a token of %d bytes" % token.length)
            return token.bytes()

    def unwrap(self, token: bytes, ordered: bool = True) -> bytes:
        state, memory = c_int(), ctypes.create_string_buffer(token)         # which the library changes
        with Output(self.gss) as data:
            source = Buffer(len(token), ctypes.addressof(memory))
            bits = self.gss.call("gss_unwrap", self.handle, byref(source), byref(data), byref(state), None)
            strict = ordered or not data.length             # Heimdal's gives no data where the order is wrong
            self.check_unwrapped(bits, MOVED if strict else REPEATED, state)
            return data.bytes()

    def check_unwrapped(self, bits: int, wrong: int, state: c_int) -> None:
        """Raises GssError for a message that is lost, repeated or moved, as `wrong` says, or not encrypted."""
        if bits & wrong:
            raise GssError("gss_unwrap: a message that is " + next(MOVES[bit] for bit in MOVES if bits & bit))
        if self.level == Protection.CONFIDENTIALITY and not state:
            raise GssError("gss_unwrap: the message is not encrypted")

    def memory(self, size: int) -> Optional[Memory]:
        """Memory in which messages are wrapped and unwrapped where they are; None where the library cannot do that."""
        return Memory(self, size) if self.gss.in_place else None

    def __del__(self) -> None:
        if vars(self).get("handle"):
            self.gss.dll.gss_delete_sec_context(byref(c_uint32()), byref(self.handle), None)


class Memory:
    """`view` is memory in which messages are wrapped and unwrapped where they are, without a copy."""

    def __init__(self, context: Context, size: int) -> None:
        self.view = memoryview(bytearray(size))
        self._address = ctypes.addressof((ctypes.c_char * size).from_buffer(self.view))
        self._context = context
        self._state = c_int()
        self._sealed = (Part * 4)(*(Part(kind) for kind in (HEADER, DATA, PADDING, TRAILER)))
        self._opened = (Part * 2)(Part(STREAM), Part(DATA))

    def wrap(self, at: int, size: int) -> Tuple[int, int]:
        """Wrap the payload that begins at `at`; its token then is from here to there, within the margin on both sides.
        Raises GssError."""
        context, state, parts = self._context, self._state, self._sealed
        private = context.level == Protection.CONFIDENTIALITY
        header, data, padding, trailer = (part.buffer for part in parts)
        data.length = size
        context.gss.call("gss_wrap_iov_length", context.handle, private, 0, byref(state), parts, len(parts))
        start, end = at - header.length, at + size + padding.length + trailer.length
        if header.length > MARGIN_BYTES or end - at - size > MARGIN_BYTES or end - start > MAX_TOKEN_BYTES:
            raise GssError("gss_wrap_iov: a token of %d bytes" % (end - start))
        place = self._address + start
        for part in (header, data, padding, trailer):
            part.value = place
            place += part.length
        context.gss.call("gss_wrap_iov", context.handle, private, 0, byref(state), parts, len(parts))
        if private and not state:
            raise GssError("gss_wrap_iov: the message is not encrypted")
        return start, end

    def unwrap(self, at: int, size: int) -> Tuple[int, int]:
        """Unwrap the token that begins at `at`; its payload then is from here to there. Raises GssError."""
        context, (stream, data) = self._context, (part.buffer for part in self._opened)
        stream.length, stream.value = size, self._address + at
        bits = context.gss.call("gss_unwrap_iov", context.handle, byref(self._state), None, self._opened,
                                len(self._opened))
        context.check_unwrapped(bits, MOVED, self._state)
        start = data.value - self._address if data.length else at
        return start, start + data.length


class Acceptor(Context):
    """The server's side."""

    def __init__(self, credentials: Credentials) -> None:
        super().__init__()
        self.credentials = credentials
        self.may_be_replay = self.gss.heimdal               # which does not remember the tokens that it has accepted

    def step(self, token: bytes) -> bytes:
        flags, peer = c_uint32(), c_void_p()
        try:
            with Output(self.gss) as answer:
                bits = self.gss.call("gss_accept_sec_context", byref(self.handle), self.credentials.handle(),
                                     byref(Buffer.of(token)), None, byref(peer), None, byref(answer), byref(flags),
                                     None, None)
                if not bits & CONTINUE_NEEDED:
                    self.done, self.flags, self.peer = True, flags.value, self._name(peer, flags.value)
                    if self.may_be_replay and not self.flags & MUTUAL:      # without a new key from this side
                        raise GssError("a client without mutual authentication: this may be a replay")
                return answer.bytes()
        finally:
            if peer:
                self.gss.dll.gss_release_name(byref(c_uint32()), byref(peer))

    def _name(self, peer: c_void_p, flags: int) -> bytes:
        name = self.gss.name(peer) if peer else b""
        if flags & ANON or not 0 < len(name) <= NAME_BYTES:
            raise GssError("a client without a name, or one of more than %d bytes" % NAME_BYTES)
        return name


class Initiator(Context):
    """The client's side, with the user's own tickets. step() may wait for a KDC. Datagrams are not `ordered`."""

    def __init__(self, service: str, ordered: bool = True) -> None:
        super().__init__()
        self.service = service
        self.wanted = MUTUAL | REPLAY | CONF | INTEG | SEQUENCE * ordered

    def step(self, token: bytes) -> bytes:
        flags = c_uint32()
        with Name(self.gss, self.service) as name, Output(self.gss) as answer:
            bits = self.gss.call("gss_init_sec_context", None, byref(self.handle), name, None, self.wanted, 0, None,
                                 byref(Buffer.of(token)) if token else None, None, byref(answer), byref(flags), None)
            if not bits & CONTINUE_NEEDED:
                self.done, self.flags = True, flags.value
            return answer.bytes()
