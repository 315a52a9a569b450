"""Caches, giving memory back after a crowd of clients has left, and going on when memory has run out.

The interpreter takes memory in arenas of 1 MiB (256 KiB before 3.10), and gives an arena back when nothing is left in
it. One small object that was made amid a crowd of clients and is kept holds all of its arena.
"""
from __future__ import annotations

import gc
import weakref
from functools import lru_cache
from time import sleep
from typing import Any, Callable, List, TypeVar

T = TypeVar("T")
REST_S = 0.1                    # when memory has run out

_forget: List[Callable[[], Any]] = []           # each returns a function that empties a cache, or None if that is gone


def remembered(most: int) -> Callable[[Callable[..., T]], Callable[..., T]]:
    """Decorate a function of a module by functools.lru_cache(most); give_back() empties the cache."""
    def decorate(function: Callable[..., T]) -> Callable[..., T]:
        cache = lru_cache(most)(function)
        _forget.append(lambda: cache.cache_clear)
        return cache

    return decorate


def when_given_back(forget: Callable[[], object]) -> None:
    """give_back() calls this method, as long as its object exists."""
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


def persist(serve: Callable[[], object]) -> None:
    """Call serve(), and again after a MemoryError: what it could not do is still due, and later there may be memory."""
    while True:
        try:
            serve()
            return
        except MemoryError:
            sleep(REST_S)
