"""What the tensor memory accelerator (TMA) of Hopper and later can read, and where the kernels in Gluon run.

A descriptor holds a tensor's address, shape and strides, and the shape of the tiles that are copied through it.
"""

from __future__ import annotations

import functools
from collections.abc import Container

import torch
import triton
from torch import Tensor

from . import config
from .call import Call
from .config import INTERPRETED, ceil_div


def tile_block(a: Tensor, b: Tensor, step: int, inner: int) -> list[int] | None:
    """Block shape of descriptors of both (B, H, T, D), whose tiles the loop over full blocks of *inner* rows reads.

    One thread asks for a tile of *step* rows, and none computes addresses. None, which means loads by pointers, where a
    step gathers several blocks, and where the accelerator is missing or cannot read the rows: they must have a power of
    two of elements and begin at multiples of 16 bytes.
    """
    dim = a.size(3)
    if step > inner or dim & (dim - 1) != 0 or not (_describable(a) and _describable(b)):
        return None
    return [1, 1, step, dim]


def on_hopper(call: Call, sizes: Container[int], *pairs: tuple[Tensor, Tensor]) -> bool:
    """Whether a kernel in Gluon computes this call, on a GPU of compute capability 9.0.

    They take half precision, square tiles of 64 and 128, masks of cells, and no dropout.

    sizes: of heads that the kernel takes.
    pairs: the tensors (B, H, T, D) of which it reads or writes tiles; both of a pair by the same blocks.
    """
    return (
        config.HOPPER
        and call.tile_q == call.tile_k >= 64
        and call.seed is None
        and call.anchor is None
        and all(a.size(3) in sizes and _describable(a) and _describable(b) for a, b in pairs)
        and triton.runtime.driver.active.get_current_target().arch == 90
    )


def aligned(*tensors: Tensor) -> bool:
    """Whether all begin at multiples of 16 bytes, which the accelerator asks for and Triton compiles for."""
    address = 0
    for x in tensors:
        address |= x.data_ptr()
    return address % 16 == 0


def aligned_row(size: int) -> int:
    """Return *size* rounded up to 16 bytes of float32: the stride of rows of numbers of which tiles are read.

    Where a tile begins is no part of a descriptor: no check finds one that begins at no multiple of 16 bytes, and the
    kernel fails.
    """
    return 4 * ceil_div(size, 4)


def _describable(x: Tensor) -> bool:
    return (
        x.element_size() == 2
        and x.numel() > 0
        and x.stride(3) == 1
        and all(0 < stride < 2**39 and stride % 8 == 0 for stride in x.stride()[:3])
        and aligned(x)
        and (INTERPRETED or _accelerated(x.device))
    )


@functools.cache
def _accelerated(device: torch.device) -> bool:
    """Whether *device*, now the current one, has the accelerator."""
    target = triton.runtime.driver.active.get_current_target()
    return target.backend == "cuda" and target.arch >= 90
