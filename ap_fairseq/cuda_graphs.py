"""CUDA graphs that run one after the other and so share their memory."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TypeVar

import torch

Result = TypeVar("Result")


@functools.cache
def capture_stream(device: int) -> torch.cuda.Stream:
    """Return the stream of all captures on a device.

    One for all, because cuBLAS keeps a workspace for every stream that ever multiplied matrices (32 MiB on Hopper), and
    because what is free in a pool is found by the stream that it was freed on alone.
    """
    return torch.cuda.Stream(device)


class GraphPool:
    """Captures graphs into one pool of memory.

    The pool goes with the last of its graphs; capture into a new one after that.
    """

    def __init__(self):
        self._memory = None  # made for the device of the first capture

    def capture(self, run: Callable[[], Result]) -> tuple[torch.cuda.CUDAGraph, Result]:
        """Capture what *run* launches on the current device, and return it with the result of *run*.

        Not by ``torch.cuda.graph``, which collects garbage and frees all cached memory each time.
        """
        if self._memory is None:
            self._memory = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        stream = capture_stream(torch.cuda.current_device())
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            with torch.inference_mode(False):  # torch makes the seed of all graphs then, which replays set in any mode
                graph.capture_begin(pool=self._memory, capture_error_mode="thread_local")  # loaders' threads go on
            try:
                result = run()
            finally:
                graph.capture_end()
        torch.cuda.current_stream().wait_stream(stream)
        return graph, result
