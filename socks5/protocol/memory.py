"""Functions that remember what they have returned; and giving memory back after a crowd.

The interpreter takes memory in arenas of 1 MiB (256 KiB before 3.10), and gives an arena back when nothing is left in
it. One small object that was made amid a crowd of clients and is kept holds all of its arena.
"""
from __future__ import annotations

import gc
import weakref
from functools import lru_cache
from typing import Any, Callable, List, TypeVar

T = TypeVar("T")

_remembered: List["weakref.ref[Any]"] = []         # weak: rules that were read again go


def remembered(most: int) -> Callable[[Callable[..., T]], Callable[..., T]]:
    """Decorate a function by functools.lru_cache(most), until memory is given back."""
    def decorate(function: Callable[..., T]) -> Callable[..., T]:
        return emptied(lru_cache(most)(function))

    return decorate


def emptied(cache: T) -> T:
    """Have an lru_cache, or an instance of a subclass of dict, emptied when memory is given back."""
    _remembered[:] = [one for one in _remembered if one() is not None] + [weakref.ref(cache)]
    return cache


def give_back(*tables: Any) -> None:
    """To be called when a crowd has left. `tables` are a dict or set each, which keeps what it needed for as many
    entries as it ever had. The interpreter's free lists have blocks in all arenas: a collection empties them."""
    for table in tables:
        kept = table.copy()
        table.clear()
        table.update(kept)
    for one in _remembered[:]:
        cache = one()
        if cache is not None:
            (cache.clear if isinstance(cache, dict) else cache.cache_clear)()
    if gc.get_freeze_count():                   # or it would look at all objects of a larger program
        gc.collect()
