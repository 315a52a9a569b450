"""On which CPU a thread may run.                                                     sched_setaffinity(2)

The threads of a worker process share one CPU. Only one of them at a time can run Python, and they hand the
interpreter's lock (GIL) to one another at nearly every system call. If the next thread is on another CPU, that costs a
wake-up there; on the same CPU most of these hand-overs do not take place at all. Measured with two workers on two CPUs,
32 clients: a connection costs 30 % less CPU. The thread of a busy tunnel may run anywhere: it waits for the kernel
without that lock.
"""
from __future__ import annotations

import os
import sysconfig
from typing import AbstractSet, FrozenSet

available = hasattr(os, "sched_setaffinity") and not sysconfig.get_config_var("Py_GIL_DISABLED")
_allowed: FrozenSet[int] = frozenset()      # the CPUs that this process had before it was pinned


def pin(number: int) -> None:
    """Pin the calling thread, and those that it starts, to one of the CPUs that this process may use: the one with this
    number, counted in a circle. Nothing changes where the system does not let us."""
    global _allowed
    if available:
        allowed = frozenset(os.sched_getaffinity(0))
        if _set({sorted(allowed)[number % len(allowed)]}):
            _allowed = allowed


def unpin() -> None:
    """Let the calling thread run on every CPU that the process may use."""
    if _allowed:
        _set(_allowed)


def _set(cpus: AbstractSet[int]) -> bool:
    try:
        os.sched_setaffinity(0, cpus)
        return True
    except OSError:                         # a CPU that is not ours any more, or a filter of system calls
        return False
