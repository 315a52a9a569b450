"""What runs beside the servers and looks at them: the status page. This is what the supervisor knows of it.

Where there are several server processes, the companion has a process of its own, which the supervisor forks and
replaces like a worker; else it has threads in the one process. The base class is for a server without one.
"""
from __future__ import annotations

import socket
from typing import Any

from ..server.server import Server
from .files import Access
from .orders import Order, read


class Companion:
    """To be overridden; the process that calls it in brackets.

    wanted                  whether it takes a process of its own
    attend(server, row)     this Server is about to serve; `row` is its number [worker, or the only process]
    start(access)           begin, in threads; does not wait [its own, or the only process]
    obey(order, access)     the servers are told this [the same]
    started, ended          a worker with this number [supervisor]
    due, work               something to be done in the main loop, and when [supervisor, or the only process]
    close                   everything has ended [the same]
    """

    wanted = False

    def attend(self, server: Server, row: int) -> None:
        pass

    def start(self, access: Access) -> None:
        pass

    def obey(self, order: Order, access: Any) -> None:
        pass

    def started(self, row: int, pid: int) -> None:
        pass

    def ended(self, row: int) -> None:
        pass

    def due(self) -> float:
        return float("inf")

    def work(self) -> None:
        pass

    def close(self) -> None:
        pass

    def wait(self, channel: socket.socket) -> None:
        """In its own process: obey what comes over the channel until the supervisor is gone."""
        with channel.makefile("rb") as stream:
            for order, access in read(stream):
                self.obey(order, access)
