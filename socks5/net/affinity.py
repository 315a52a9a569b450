"""On which CPU a thread may run, and whether it may interrupt others.        sched_setaffinity(2), sched(7)

The threads of a worker process share one CPU. Only one of them at a time can run Python, and they hand the
interpreter's lock (GIL) to one another at nearly every system call. If the next thread is on another CPU, that costs a
wake-up there; on the same CPU most of these hand-overs do not take place at all. Measured with two workers on two CPUs,
32 clients: a connection costs 30 % less CPU. The thread of a busy tunnel may run anywhere: it waits for the kernel
without that lock.

The relay loop has the policy SCHED_BATCH: when it wakes up, it lets others finish their turn, and finds more events at
once. Measured with 64 tunnels on two CPUs: 10 to 20 % more round trips, each for 11 to 17 % less CPU; a connection
takes 9 % less. On an idle CPU it runs at once, as ever. The few threads that it starts have this policy, too (for names
of datagrams, for silent clients when a crowd negotiates), but not those of busy tunnels. Those, in turn, yield the CPU
while relay loops have work: see ..relay.busy.
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


def batch() -> None:
    """Give the calling thread, and those that it starts, the policy SCHED_BATCH in place of the ordinary one. Nothing
    changes where it was started with another policy, or the system does not let us."""
    _change_policy("SCHED_OTHER", "SCHED_BATCH")


def yield_cpu() -> None:
    """Let threads run first that wait for this CPU.                                                   sched_yield(2)"""
    if hasattr(os, "sched_yield"):
        os.sched_yield()


def unpin() -> None:
    """Let the calling thread run on every CPU that the process may use, with the ordinary policy."""
    _change_policy("SCHED_BATCH", "SCHED_OTHER")
    if _allowed:
        _set(_allowed)


def _change_policy(before: str, after: str) -> None:
    try:
        if os.sched_getscheduler(0) == getattr(os, before):
            os.sched_setscheduler(0, getattr(os, after), os.sched_param(0))
    except (OSError, AttributeError):       # a filter of system calls; or no Linux
        pass


def _set(cpus: AbstractSet[int]) -> bool:
    try:
        os.sched_setaffinity(0, cpus)
        return True
    except OSError:                         # a CPU that is not ours any more, or a filter of system calls
        return False
