"""Tiles of a head's rows for the tensor memory accelerator (TMA) of Hopper and later."""

from __future__ import annotations

import functools

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .config import INTERPRETED


def tiles(a: Tensor, b: Tensor, step: int, inner: int) -> tuple[TensorDescriptor | None, TensorDescriptor | None]:
    """Describe tiles (1, 1, step, D) of both (B, H, T, D), which the loop over full blocks of *inner* rows reads.

    One thread asks for a tile, and none computes addresses. (None, None), which means loads by pointers, where a step
    gathers several blocks, and where the accelerator is missing or cannot read the rows: they must have a power of two
    of elements and begin at multiples of 16 bytes.
    """
    if step > inner or not (_describable(a) and _describable(b)):
        return None, None
    return tuple(TensorDescriptor(x, x.shape, x.stride(), [1, 1, step, x.size(3)]) for x in (a, b))


def _describable(x: Tensor) -> bool:
    strides, dim = x.stride()[:3], x.size(3)
    return (
        x.element_size() == 2
        and x.numel() > 0
        and x.stride(3) == 1
        and dim & (dim - 1) == 0
        and all(0 < stride < 2**39 and stride % 8 == 0 for stride in strides)
        and x.data_ptr() % 16 == 0
        and (INTERPRETED or _accelerated(x.device))
    )


@functools.cache
def _accelerated(device: torch.device) -> bool:
    """Whether *device*, now the current one, has the accelerator."""
    target = triton.runtime.driver.active.get_current_target()
    return target.backend == "cuda" and target.arch >= 90
