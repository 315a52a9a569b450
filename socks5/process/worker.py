"""A worker: a process with one server, which does what its supervisor says.

Its main thread serves; a thread of its own reads the supervisor's orders. A worker whose supervisor is gone reads EOF,
and ends.
"""
from __future__ import annotations

import logging
import os
import socket
import threading
from typing import Callable, Iterable, NoReturn, Optional

from ..server.acceptors import NoThread
from ..server.server import Server
from . import signals
from .files import Access
from .orders import Order, read

log = logging.getLogger(__name__)


class CannotStart(Exception):
    """The system lacks what a worker needs."""


def serve(server: Server, hurry: threading.Event) -> None:
    """Serve until server.stop(), then drain and close; `hurry` ends the drain at once. Raises CannotStart."""
    with server:
        try:
            server.serve_forever()
        except NoThread as exc:
            raise CannotStart(str(exc)) from None
        aborted = server.drain(server.config.drain_timeout, hurry)
    if aborted:
        log.warning("stopped with %d session%s cut off, in process %d", aborted, "s" * (aborted > 1), os.getpid())


def obey(server: Server, hurry: threading.Event, order: Order, access: Optional[Access] = None) -> None:
    """Have the server do what was ordered. Does not wait for it."""
    if order == Order.RELOAD:
        server.reload(access)
    elif order == Order.SESSIONS:
        server.log_sessions_soon()
    else:
        if order == Order.ABORT:
            hurry.set()
        server.stop()


def listen(server: Server, hurry: threading.Event, channel: socket.socket) -> None:
    """Obey the orders that come over the channel; stop at once when the supervisor is gone."""
    try:
        with channel.makefile("rb") as stream:
            for order, access in read(stream):
                obey(server, hurry, order, access)
    except Exception:                           # it may not have the rules that the others have: so it has to go
        log.exception("worker %d cannot obey its supervisor", os.getpid())
        server.stop()
    else:
        obey(server, hurry, Order.ABORT)


def become(make: Callable[[], Server], channel: socket.socket, supervisors: Iterable[socket.socket]) -> NoReturn:
    """In the child, after the fork: be a worker, and end the process. `supervisors` are the sockets to close."""
    def work() -> None:
        hurry = threading.Event()
        try:
            server = make()
            threading.Thread(target=listen, args=(server, hurry, channel), daemon=True).start()
            server.relay_loop()
        except (RuntimeError, MemoryError, OSError) as exc:     # no thread, no memory, no descriptor
            raise CannotStart(str(exc) or "out of memory") from None
        serve(server, hurry)

    end_after(work, supervisors)


def end_after(work: Callable[[], None], supervisors: Iterable[socket.socket]) -> NoReturn:
    """In the child, after the fork: do the work, and end the process."""
    status = 1
    try:
        signals.ignore()
        for sock in supervisors:
            sock.close()
        work()
        status = 0
    except CannotStart as exc:
        log.error("worker %d cannot start: %s", os.getpid(), exc)
    except BaseException:
        log.exception("worker %d cannot go on", os.getpid())
    finally:
        logging.shutdown()
        os._exit(status)                        # never return into the supervisor's code
