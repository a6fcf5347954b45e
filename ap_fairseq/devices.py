"""Whether to use a GPU, and how many there are: what ``--cpu`` says, and what the machine has."""

from __future__ import annotations

import platform

import torch


def uses_gpu(cpu: bool) -> bool:
    """Whether a process computes on a GPU, as fairseq decides it: there is one, and *cpu* does not forbid it."""
    return torch.cuda.is_available() and not cpu


def count_gpus(cpu: bool) -> int:
    """Return how many GPUs may be used, none with *cpu*: with NVML, without starting CUDA, so that forks may follow."""
    return 0 if cpu else torch.cuda.device_count()


def device_name(cpu: bool = False) -> str:
    """Return the name of the GPU, or such as ``CPU (x86_64), 2 threads`` where there is none or *cpu* asks for that."""
    if uses_gpu(cpu):
        return torch.cuda.get_device_name()
    n = torch.get_num_threads()
    return f"CPU ({platform.machine()}), {n} thread{'s' if n > 1 else ''}"
