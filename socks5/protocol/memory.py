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

_forget: List[Callable[[], Any]] = []           # each gives a function that forgets; None when its object is gone


def remembered(most: int) -> Callable[[Callable[..., T]], Callable[..., T]]:
    """Decorate a function of a module by functools.lru_cache(most), until memory is given back."""
    def decorate(function: Callable[..., T]) -> Callable[..., T]:
        cache = lru_cache(most)(function)
        _forget.append(lambda: cache.cache_clear)
        return cache

    return decorate


def when_given_back(forget: Callable[[], object]) -> None:
    """Have this method called when memory is given back, as long as its object lives."""
    _forget[:] = [one for one in _forget if one()] + [weakref.WeakMethod(forget)]


def give_back(*tables: Any) -> None:
    """To be called when a crowd has left. `tables` are a dict or set each, which keeps what it needed for as many
    entries as it ever had. The interpreter's free lists have blocks in all arenas: a collection empties them."""
    for table in tables:
        kept = table.copy()
        table.clear()
        table.update(kept)
    for forget in filter(None, [one() for one in _forget]):
        forget()
    if gc.get_freeze_count():                   # or it would look at all objects of a larger program
        gc.collect()
