"""--status and the terminal's line: what the supervisor, each worker and the process of the page do for them."""
from __future__ import annotations

import importlib.util
import os
import socket
import threading
from functools import partial
from typing import Any, Dict, List, Optional, Sequence, Tuple

from .. import __version__
from ..config import Config, ConfigError
from ..net.addresses import endpoint_of
from ..process.companion import Companion
from ..process.files import Access
from ..process.orders import Order
from ..protocol.memory import persist
from ..server.counters import Shared
from ..server.server import Server
from . import metrics, views
from .channel import Channel, Query
from .history import History, summary
from .line import Line
from .meter import Board, Meter, descriptor_limit
from .views import Body

SWEEP_S = 1.0


def check(config: Config) -> None:
    """Raises ConfigError where --status cannot be served."""
    if config.status and not importlib.util.find_spec("http.server"):
        raise ConfigError("--status: this Python lacks http.server, a part of its standard library")


class Status(Companion):
    """A Companion, and the Source of the page. Made before any process is forked.

    listeners   of the page; none: only the terminal's line is wanted
    terminal    the descriptor for the line; None: no line
    """

    def __init__(self, config: Config, shared: Shared, proxies: Sequence[socket.socket],
                 listeners: Sequence[socket.socket], terminal: Optional[int]) -> None:
        self.config = config
        self.shared = shared
        self.listeners = listeners
        self.proxies = [str(endpoint_of(sock.getsockname())) for sock in proxies]
        self.several = shared.rows > 1
        self.wanted = self.several and bool(listeners)
        self.board = Board(shared.rows, bool(config.max_sessions))
        self.history = History(self.board, shared.given)
        self.draining = False
        self._channels = [Channel() for _ in range(shared.rows)] if self.wanted else []
        self._local: Optional[Tuple[Server, Meter]] = None      # where there is one process
        self._line = None if terminal is None else Line(terminal, self.board, shared.given)
        self._webs: List[Any] = []                              # of web.Web
        self._stop = threading.Event()
        self._threads: List[threading.Thread] = []
        self._ran: Dict[int, int] = {}

    # ---- a Companion ----------------------------------------------------------------------------------------------

    def attend(self, server: Server, row: int) -> None:
        server.meter = meter = Meter(self.board, row)
        self.board.put(row, "max_sessions", "", int(min(server.sessions.maximum, server.sessions.maximum_here)))
        self.board.put(row, "max_fds", "", descriptor_limit())
        sweep = partial(meter.sweep, server.sessions)
        if not self.several:
            self.started(row, os.getpid())
            self._local = server, meter
            self._start(partial(self._sweep, sweep))
        elif self.wanted:
            for listener in self.listeners:
                listener.close()
            self._start(partial(self._channels[row].answer, partial(views.answer, server, meter), sweep, SWEEP_S))
        else:
            self._start(partial(self._sweep, sweep))

    def start(self, access: Access) -> None:
        if not self.listeners:
            return
        from .web import Web                    # most servers have no page, and need not load http.server
        self.history.start()
        for listener in self.listeners:
            web = Web(listener, self, access[0], bool(self.config.status_beyond() and not self.config.open))
            self._webs.append(web)
            self._start(web.serve_forever)

    def obey(self, order: Order, access: Any) -> None:
        if order == Order.RELOAD and access:
            for web in self._webs:
                access[0].join(web.users)       # what another process has read comes without its Logins
                web.users = access[0]
        elif order in (Order.STOP, Order.ABORT):
            self.draining = True

    def started(self, row: int, pid: int) -> None:
        self.board.put(row, "pid", "", pid)
        if self._ran.setdefault(row, pid) != pid:
            self.board.add(row, "restarts")
            self._ran[row] = pid

    def ended(self, row: int) -> None:
        self.board.clear_gauges(row)

    def due(self) -> float:
        return self._line.due if self._line else float("inf")

    def work(self) -> None:
        if self._line:
            self._line.draw()

    def close(self) -> None:
        self._stop.set()
        if self._webs:
            self.history.stop()
        for web in self._webs:
            web.shutdown()
        for thread in self._threads:
            thread.join()
        for listener in self.listeners:
            listener.close()
        for channel in self._channels:
            channel.close()
        if self._line:
            self._line.close()

    def _start(self, target: Any) -> None:
        thread = threading.Thread(target=persist, args=(target,), name="status", daemon=True)
        thread.start()
        self._threads.append(thread)

    def _sweep(self, sweep: Any) -> None:
        while not self._stop.wait(SWEEP_S):
            sweep()

    # ---- a Source -------------------------------------------------------------------------------------------------

    def metrics(self) -> Body:
        return metrics.CONTENT_TYPE, metrics.page(self.board, self.shared.given(), __version__).encode()

    def health(self) -> Tuple[bool, str]:
        if self.draining:
            return False, "draining"
        running = any(self.board.get(row, "pid") for row in range(self.board.rows))
        return running, "ok" if running else "no server process runs"

    def summary(self, since: float) -> Dict[str, Any]:
        return summary(self.board, self.history, self.shared.given(), since, version=__version__,
                       draining=self.draining, listening=self.proxies)

    def sessions(self, query: Dict[str, str], limit: int) -> bytes:
        return views.merged(self._ask(dict(query, what="sessions", limit=str(limit + 1))), limit)

    def session(self, number: int) -> Optional[Dict[str, Any]]:
        found = views.newest_first(self._ask({"what": "session", "id": str(number)}))
        return views.explain(found[0]) if found else None

    def recent(self) -> List[Dict[str, Any]]:
        return views.newest_first(self._ask({"what": "recent"}))

    def _ask(self, query: Query) -> List[List[bytes]]:
        """The answers of all server processes."""
        if self._local:
            return [list(views.answer(*self._local, query))]
        asked = [channel.ask(query) for channel in self._channels]
        return [one.read() for one in asked]
