"""Worker processes of one that searches: they read what it searches next, and write what it found before."""

from __future__ import annotations

import gc
import os
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager, contextmanager
from multiprocessing.context import ForkContext, ForkProcess
from typing import Any, TypeVar

import torch

from ap_fairseq.devices import count_gpus
from ap_fairseq.files import UserError
from ap_fairseq.generation.ranks import end_with_parent

MAX_PENDING = 4  # calls that the search is ahead of, and results that it has yet to take

Item = TypeVar("Item")
_functions: dict[str, Callable] = {}  # of this process, if it is a worker


def spare_processes(searches: int, most: int, cpu: bool) -> int:
    """Return how many processes may read, or write, for each of the *searches* of this machine: on a CPU one.

    On a GPU one may be slower than the search, so there are up to *most*, as cores allow.
    """
    if not count_gpus(cpu):
        return 1
    cores = len(os.sched_getaffinity(0)) // searches
    return max(1, min(most, (cores - 1) // 2))


class _Worker(ForkProcess):
    def __init__(self, *args, **options):
        # Ended with its parent: a pool that cannot start all of its processes forgets the others, which wait for calls.
        super().__init__(*args, daemon=True, **options)

    def start(self) -> None:
        # Python forgets a signal that arrives in a new process before it runs: SIGTERM waits for `_begin`.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        try:
            super().start()
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})


class _ForkContext(ForkContext):
    Process = _Worker


class Workers(AbstractContextManager):
    """Call functions in other processes while this one goes on; not in threads, as a search is Python, too.

    The workers are copies of this process, made at the first call: functions may use all that it held then, but no GPU.
    What a function changes stays in the worker that called it. Arguments and results are pickled. All methods raise
    UserError if a worker died.

    Args:
        processes: how many; one makes its calls in order.
        functions: by name.
    """

    def __init__(self, processes: int, **functions: Callable):
        self._pool = ProcessPoolExecutor(processes, _ForkContext(), _begin, (functions,))
        self._submitted: deque[Future] = deque()

    def __exit__(self, kind, *error) -> None:
        """Wait for all calls; raise what a submitted one raised, unless the block has raised something."""
        with self._pool:
            if kind is None:
                self.finish()

    def prefetch(self, name: str, items: Iterable[Item]) -> Iterator[tuple[Item, Any]]:
        """Yield each item with the result of function *name*, which is called for the next items meanwhile.

        What a call raises is raised here, when its result is due.
        """
        pending: deque[tuple[Item, Future]] = deque()
        for item in items:
            pending.append((item, self._submit(name, item)))
            if len(pending) > MAX_PENDING:
                done, future = pending.popleft()
                yield done, _result(future)
        for done, future in pending:
            yield done, _result(future)

    def submit(self, name: str, *arguments: Any) -> None:
        """Call function *name*, whose result nobody takes; what it raises is raised later, at the latest by the end."""
        if len(self._submitted) == MAX_PENDING:
            _result(self._submitted.popleft())
        self._submitted.append(self._submit(name, *arguments))

    def call(self, name: str, *arguments: Any) -> Any:
        """Return the result of function *name*, after all submitted calls."""
        self.finish()
        return _result(self._submit(name, *arguments))

    def finish(self) -> None:
        """Wait for the submitted calls."""
        while self._submitted:
            _result(self._submitted.popleft())

    def _submit(self, name: str, *arguments: Any) -> Future:
        with _death_as_user_error():
            return self._pool.submit(_call, name, *arguments)


def _result(future: Future) -> Any:
    with _death_as_user_error():
        return future.result()


@contextmanager
def _death_as_user_error() -> Iterator[None]:
    try:
        yield
    except BrokenProcessPool as error:
        raise UserError(
            "a process that reads or writes beside a search died; if memory ran out, lower --num-processes"
        ) from error


def _begin(functions: dict[str, Callable]) -> None:
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as an exception the pool would send it as a call's result
            signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    end_with_parent()
    gc.freeze()  # what a worker shares with its parent is copied where a collection marks it
    torch.set_num_threads(1)  # those of its parent are not here, and it would wait for them for ever
    _functions.update(functions)


def _call(name: str, *arguments: Any) -> Any:
    return _functions[name](*arguments)
