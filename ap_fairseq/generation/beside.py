"""Processes beside one that searches: they read what it searches next, and write what it found before."""

from __future__ import annotations

import gc
import multiprocessing
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import torch

from ap_fairseq.generation.ranks import end_with_parent

WAITING = 4  # results of a function that may wait for their turn, or calls of it

Item = TypeVar("Item")
_functions: dict[str, Callable] = {}  # of this process, if it is one of those


class Beside(AbstractContextManager):
    """Calls functions in processes of their own, while this one goes on; not in threads, as a search is Python, too.

    The processes are copies of this one, made at the first call: functions may use all that it held then, but no GPU.
    Arguments and results are pickled. What a function raises is raised here when its result is asked for.

    Args:
        processes: how many; one does its calls in order.
        functions: by name.
    """

    def __init__(self, processes: int, **functions: Callable):
        fork = multiprocessing.get_context("fork")
        self._pool = ProcessPoolExecutor(processes, fork, _begin, (functions,))
        self._behind: deque[Future] = deque()

    def __exit__(self, kind, *error) -> None:
        """Wait for all calls; raise what they raised, unless something was."""
        with self._pool:
            if kind is None:
                self.finish()

    def ahead(self, name: str, items: Iterable[Item]) -> Iterator[tuple[Item, Any]]:
        """Yield each item, and what the function *name* returns for it; it is called for the next items meanwhile."""
        results: deque[tuple[Item, Future]] = deque()
        for item in items:
            results.append((item, self._pool.submit(_call, name, item)))
            if len(results) > WAITING:
                yield _result(*results.popleft())
        while results:
            yield _result(*results.popleft())

    def behind(self, name: str, *arguments: Any) -> None:
        """Call the function *name*, whose result nobody waits for."""
        if len(self._behind) == WAITING:
            self._behind.popleft().result()
        self._behind.append(self._pool.submit(_call, name, *arguments))

    def call(self, name: str, *arguments: Any) -> Any:
        """Return what the function *name* does, after the calls behind, of which it raises what one raised."""
        self.finish()
        return self._pool.submit(_call, name, *arguments).result()

    def finish(self) -> None:
        """Wait for the calls behind, and raise what one raised."""
        while self._behind:
            self._behind.popleft().result()


def _result(item: Item, future: Future) -> tuple[Item, Any]:
    return item, future.result()


def _begin(functions: dict[str, Callable]) -> None:
    end_with_parent()
    gc.freeze()  # what the process shares with its parent is copied where a collection marks it
    torch.set_num_threads(1)  # those of its parent are not here, and it would wait for them for ever
    _functions.update(functions)


def _call(name: str, *arguments: Any) -> Any:
    return _functions[name](*arguments)
