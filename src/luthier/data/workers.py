"""Rows through a function, in order, by one process or several."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterable, Iterator
from typing import Any

_CHUNK = 64
_function: Callable[[Any], Any] | None = None


def map_ordered(function: Callable[[Any], Any], items: Iterable[Any], workers: int) -> Iterator[Any]:
    """`map(function, items)`, by `workers` processes where that is more than 1; the order stays.

    Processes are spawned, not forked, as a fork of a process with running threads may hang: `function` and
    the items must be picklable. An error in a worker is raised here.
    """
    if workers <= 1:
        yield from map(function, items)
        return
    context = multiprocessing.get_context("spawn")
    with context.Pool(workers, initializer=_set_function, initargs=(function,)) as pool:
        yield from pool.imap(_call, items, chunksize=_CHUNK)


def _set_function(function: Callable[[Any], Any]) -> None:
    global _function
    _function = function


def _call(item: Any) -> Any:
    if _function is None:
        raise RuntimeError("a worker was not initialised")
    return _function(item)
