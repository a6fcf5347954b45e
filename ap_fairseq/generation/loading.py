"""The start of a process that only translates: models without the optimizer's state, and CUDA beside reading them."""

from __future__ import annotations

import ctypes
import functools
import os
import sys
import threading
import zipfile
from collections.abc import Callable
from contextlib import suppress
from queue import SimpleQueue

import torch
from fairseq import checkpoint_utils, utils
from torch import Tensor
from torch.nn import init
from torch.overrides import TorchFunctionMode

# While threads start what a search needs, each of their calls waits that long for one that runs Python; usual are 5 ms.
TURN_SECONDS = 1e-4


class _NoRandomValues(TorchFunctionMode):
    """Leaves new parameters as they are where they would become random."""

    # Those of `init` are asked themselves, and then what they call is not.
    functions = {Tensor.uniform_, Tensor.normal_, init.uniform_, init.normal_, init.kaiming_uniform_}

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        return (args[0] if args else kwargs["tensor"]) if function in self.functions else function(*args, **kwargs)


def checkpoint_files(paths: str, suffix: str, shards: int) -> list[str]:
    """Return the files that fairseq reads for ``--path``, ``--checkpoint-suffix`` and ``--checkpoint-shard-count``."""
    name = checkpoint_utils.get_maybe_sharded_checkpoint_filename
    return [name(path, suffix, shard, shards) for path in utils.split_paths(paths) for shard in range(shards)]


def load_faster(on_gpu: bool) -> None:
    """Let fairseq load models in half the time in this process.

    Args:
        on_gpu: the models go to a GPU. On a CPU, sampling draws from the random numbers that follow those of the
            parameters, and these are drawn so that it samples what ``fairseq-generate`` does.
    """
    stock_read, stock_load = torch.load, checkpoint_utils.load_model_ensemble_and_task

    @functools.wraps(stock_read)
    def read(file, *args, **options):
        path = getattr(file, "name", file)
        if isinstance(path, (str, os.PathLike)) and zipfile.is_zipfile(path):  # as torch saves since 1.6
            file, options = path, {"mmap": True, **options}  # what nobody asks for is not read
        return stock_read(file, *args, **options)

    @functools.wraps(stock_load)
    def load(*args, **options):
        with _NoRandomValues():
            return stock_load(*args, **options)

    torch.load = read
    if on_gpu:
        checkpoint_utils.load_model_ensemble_and_task = load


def use_gpu(number: int) -> bool:
    """Let this process use one of the GPUs that it sees, counted from 0, and see no other.

    Returns:
        Whether CUDA has yet to start. It has where GPUs were counted without NVML, and then all are seen.
    """
    seen = os.environ.get("CUDA_VISIBLE_DEVICES")
    os.environ["CUDA_VISIBLE_DEVICES"] = str(number) if seen is None else seen.split(",")[number].strip()
    if torch.cuda.device_count() == 1:
        return True
    torch.cuda.set_device(number)
    return False


def start_cuda() -> None:
    """Start CUDA, its library of products and Triton in threads, which take a second before a first batch.

    Forks wait for them: a copy of this process would have the locks that a thread holds, and never get them.
    """
    kernels: SimpleQueue[tuple[Callable, ...]] = SimpleQueue()
    usual = sys.getswitchinterval()
    sys.setswitchinterval(TURN_SECONDS)
    _start(_first_kernels, kernels, usual)
    # Meanwhile triton is imported, which the command itself, that only waits, does without, and what searches run.
    from triton.runtime import cache

    # Its hash of itself, half a gigabyte, by which it finds compiled kernels; it keeps that.
    hashed = _start(getattr(cache, "triton_key", int))  # triton 3.4 has it elsewhere
    from triton_ops import beam_search, norm, ops, rows  # noqa: F401

    kernels.put((hashed.join, norm.add_norm, rows.Norm))


def _start(function: Callable, *args) -> threading.Thread:
    thread = threading.Thread(target=function, args=args, daemon=True)  # a process that fails need not wait for it
    thread.start()
    os.register_at_fork(before=thread.join)
    return thread


def _first_kernels(kernels: SimpleQueue[tuple[Callable, ...]], switch_seconds: float) -> None:
    with suppress(OSError):  # torch would have no other thread run Python meanwhile
        ctypes.CDLL("libcuda.so.1").cuInit(0)
    x = torch.ones(16, 16, dtype=torch.float16, device="cuda")
    product = x @ x
    # Imported by now: not here, as threads that import the same wait for each other.
    wait_for_hash, add_norm, norm = kernels.get()
    wait_for_hash()
    add_norm(product, None, norm(x[0], x[0], 1.0))
    sys.setswitchinterval(switch_seconds)
