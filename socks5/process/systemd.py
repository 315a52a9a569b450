"""What systemd passes to a service, and what it is told: listening sockets and states, without its library.

Sockets come as descriptors from 3 on (LISTEN_FDS, sd_listen_fds(3)). States go as datagrams to NOTIFY_SOCKET
(sd_notify(3)). Outside of systemd the variables are missing, and nothing here does anything. Runs in the main thread.
"""
from __future__ import annotations

import contextlib
import os
import socket
import time
from typing import List, MutableMapping, Optional

from ..config import ConfigError
from ..net import listeners as listening

FIRST = 3                       # SD_LISTEN_FDS_START
MAX_SOCKETS = 1024
Environ = MutableMapping[str, str]


def passed_sockets(environ: Environ) -> List[socket.socket]:
    """The listening sockets that systemd has passed to this process, ready for a Server; none if it has passed none.
    Takes the variables away: they are for this process only. Raises ConfigError for a socket that is of no use."""
    pid, number, _names = [environ.pop(name, "") for name in ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES")]
    if pid != str(os.getpid()):
        return []
    if not number.isdecimal() or not 0 <= int(number) <= MAX_SOCKETS:
        raise ConfigError("LISTEN_FDS: %s is not a number of sockets" % ascii(number))
    found = []
    try:
        for fd in range(FIRST, FIRST + int(number)):
            found.append(_listener(fd))
    except OSError as exc:
        listening.close_all(found)
        raise ConfigError("LISTEN_FDS: descriptor %d: %s" % (fd, exc.strerror or exc)) from None
    return found


def _listener(fd: int) -> socket.socket:
    """Raises OSError."""
    os.set_inheritable(fd, False)
    sock = socket.socket(fileno=fd)
    try:
        if sock.family not in (socket.AF_INET, socket.AF_INET6) or sock.type != socket.SOCK_STREAM \
                or not sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            raise OSError("not a TCP socket that listens (ListenStream= with Accept=no)")
        sock.setblocking(True)
        listening.tune_listener(sock)
        return listening.SharedListener(fileno=sock.detach())
    except OSError:
        sock.detach()                           # not ours to close
        raise


class Notifier:
    """Tells the service manager how the service is. Never waits, and an error costs a message."""

    def __init__(self, environ: Optional[Environ] = None) -> None:
        environ = {} if environ is None else environ
        address = environ.get("NOTIFY_SOCKET", "")
        self._address = "\0" + address[1:] if address[:1] == "@" else address
        self._sock: Optional[socket.socket] = None
        if self._address[:1] in ("/", "\0") and hasattr(socket, "AF_UNIX"):
            with contextlib.suppress(OSError):
                self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
                self._sock.setblocking(False)
        self.watchdog_s = self._watchdog_s(environ) if self._sock else 0.0

    @staticmethod
    def _watchdog_s(environ: Environ) -> float:
        """Half of the time after which systemd considers the service dead; 0 without a watchdog."""
        usec, pid = environ.get("WATCHDOG_USEC", ""), environ.get("WATCHDOG_PID", str(os.getpid()))
        return int(usec) / 2e6 if usec.isdecimal() and pid == str(os.getpid()) else 0.0

    def _tell(self, *lines: str) -> None:
        if self._sock:
            with contextlib.suppress(OSError):
                self._sock.sendto("\n".join(lines).encode(), self._address)

    def ready(self, status: str) -> None:
        self._tell("READY=1", "STATUS=" + status)

    def reloading(self) -> None:
        """Before ready() says that it is over. MONOTONIC_USEC is what Type=notify-reload asks for."""
        self._tell("RELOADING=1", "MONOTONIC_USEC=%d" % (time.monotonic() * 1e6), "STATUS=reloading")

    def stopping(self, longest_s: float) -> None:
        """Sessions may take as long as --drain-timeout says, also where TimeoutStopSec= in the unit is shorter."""
        self._tell("STOPPING=1", "EXTEND_TIMEOUT_USEC=%d" % (longest_s * 1e6), "STATUS=draining")

    def alive(self) -> None:
        self._tell("WATCHDOG=1")

    def close(self) -> None:
        if self._sock:
            self._sock.close()
