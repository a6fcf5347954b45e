"""CUDA graphs that run one after the other and so share their memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

Result = TypeVar("Result")


class GraphPool:
    """Captures graphs into one pool of memory, on one stream: another stream would not find what is free in the pool.

    The pool goes with the last of its graphs; capture into a new one after that.
    """

    def __init__(self):
        self._memory = self._stream = None  # made for the device of the first capture

    def capture(self, run: Callable[[], Result]) -> tuple[torch.cuda.CUDAGraph, Result]:
        """Capture what *run* launches on the current device, and return it with the result of *run*.

        Not by ``torch.cuda.graph``, which collects garbage and frees all cached memory each time.
        """
        if self._stream is None:
            self._memory, self._stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream()
        graph = torch.cuda.CUDAGraph()
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            graph.capture_begin(pool=self._memory, capture_error_mode="thread_local")  # loaders go on in their threads
            try:
                result = run()
            finally:
                graph.capture_end()
        torch.cuda.current_stream().wait_stream(self._stream)
        return graph, result
