"""Which CPU the Python threads of this process live on.

Only one thread runs Python code at a time, the one that holds the GIL, and it lets go at every system call. On many
CPUs each of these moments wakes a thread on another CPU: some 25 hand-overs make one small connection cost three times
what it costs on one CPU. So threads that run Python stay on one, their home; a thread that turns to bulk work, where
the kernel moves the bytes, takes all CPUs back. A free-threaded Python has no need of this.
"""
from __future__ import annotations

import os
import sys
from time import monotonic, process_time
from typing import Dict, List, Optional

LOOK_EVERY_S = 0.5
CROWDED = 0.3               # of the home's time goes to others,
BETTER = 0.2                # and another CPU is this much less busy: twice in a row, and we move


def has_gil() -> bool:
    return bool(getattr(sys, "_is_gil_enabled", lambda: True)())


def needed() -> bool:
    """Whether there is a GIL, a choice, and a way to choose."""
    return has_gil() and hasattr(os, "sched_setaffinity") and len(os.sched_getaffinity(0)) > 1


class Home:
    """One for a process. `which` spreads several processes over the CPUs."""

    def __init__(self, which: int = 0) -> None:
        self.everywhere = sorted(os.sched_getaffinity(0))
        self.cpu = self.everywhere[which % len(self.everywhere)]
        self._looked = monotonic()
        self._before: Dict[int, float] = {}
        self._ours = 0.0
        self._crowded = False

    def settle(self) -> None:
        """The calling thread lives at home, and so will all that it starts."""
        self._affinity(0, [self.cpu])

    def on_bulk(self, bulk: bool) -> None:
        """The calling thread has bulk work to do, or no longer."""
        self._affinity(0, self.everywhere if bulk else [self.cpu])

    def look(self) -> None:
        """To be called now and then: move when somebody else is burning our CPU and another one has room."""
        now = monotonic()
        if now - self._looked < LOOK_EVERY_S:
            return
        busy, ours = busy_seconds(), process_time()
        if self.cpu in self._before and self.cpu in busy:
            span = now - self._looked
            share = {cpu: (busy[cpu] - self._before.get(cpu, 0.0)) / span for cpu in self.everywhere if cpu in busy}
            others = share[self.cpu] - (ours - self._ours) / span
            best = min(share, key=lambda cpu: share[cpu])
            crowded = others > CROWDED and share[best] < others - BETTER
            if crowded and self._crowded:
                self.move(best)
                crowded = False                 # the new home is judged anew
            self._crowded = crowded
        self._looked, self._before, self._ours = now, busy, ours

    def move(self, cpu: int) -> None:
        """Take every thread along that is at home."""
        old, self.cpu = self.cpu, cpu
        for tid in map(int, os.listdir("/proc/self/task")):
            try:
                if os.sched_getaffinity(tid) == {old}:
                    self._affinity(tid, [cpu])
            except OSError:                     # this thread ended meanwhile
                pass

    @staticmethod
    def _affinity(tid: int, cpus: List[int]) -> None:
        try:
            os.sched_setaffinity(tid, cpus)
        except OSError:                         # gone, or a CPU was taken from us: then we live where we may
            pass


def busy_seconds() -> Dict[int, float]:
    """Of each CPU, how long it has not been idle; empty where nobody tells.             proc_stat(5)"""
    found = {}
    try:
        with open("/proc/stat", "rb") as file:
            for line in file:
                name, *fields = line.split()
                if name.startswith(b"cpu") and name != b"cpu":
                    times = list(map(int, fields))
                    found[int(name[3:])] = (sum(times[:8]) - times[3] - times[4]) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError):
        pass
    return found


def make(which: int = 0) -> Optional[Home]:
    return Home(which) if needed() else None
