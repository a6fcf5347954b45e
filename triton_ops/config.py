"""Tile shapes, warps, pipeline stages and register limits of the attention kernels.

For half precision, head sizes up to 64 and square tiles the choices are the fastest of sweeps on an H200 and an H100
(torch 2.11, triton 3.6, D = 64; `scripts/tune_attention.py` repeats them), those of decode on an H100 with float16.
Those of 64 x 16, and of tiles of 64 and 128 for larger heads, are the best of a few on an H200
(`scripts/kernels.h200.json`). Other tiles for larger heads, float32 and the other flat tiles were chosen by registers
and shared memory alone. A choice depends on tile sizes, head size, type and size classes only, never on a sequence
length inside a size class, so a new length does not compile anything.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton

from .layout import TileTable

INTERPRETED = triton.knobs.runtime.interpret  # TRITON_INTERPRET=1 when triton was imported
SMALL_TILES = (32, 64, 128)  # sizes of the kernels in `small.py`: both sequences at most that long
MAX_GRID_YZ = 65535  # most programs along the second and third axis of a launch grid
MAX_INT32_OFFSET = 2**31  # elements that 32-bit offsets reach
TRITON = tuple(map(int, triton.__version__.split(".")[:2]))
# Whether kernels in Gluon may run on Hopper. Changed later, it holds after `launch.forget`.
HOPPER = TRITON >= (3, 6) and not INTERPRETED and os.environ.get("TRITON_OPS_HOPPER") != "0"
LEAST_COLUMNS = 8 if TRITON >= (3, 5) else 16  # of a product
MAX_SENTENCE = 256  # positions of a cache that holds sentences
SMALL_BYTES = 128 * 64 * 2  # most that one of their operands may take, so that a head's backward fits on chip


class Config(NamedTuple):
    """One launch configuration: rows and keys per step, warps, pipeline stages, registers per thread."""

    block_q: int
    block_k: int
    warps: int
    stages: int
    registers: int | None = None

    def launch(self) -> dict:
        """Launch options for Triton."""
        # Multiply-adds are fused by default until triton 3.9, and no longer from 3.10 on.
        options = dict(num_warps=self.warps, num_stages=self.stages, enable_fp_fusion=True)
        if self.registers is not None:
            options["maxnreg"] = self.registers
        return options


def ceil_div(a: int, b: int) -> int:
    """a / b rounded up; without the microseconds that triton.cdiv takes on the host."""
    return -(-a // b)


def grids(n_tiles: int, heads: int, batch: int) -> Iterator[tuple[tuple[int, int, int], int, int]]:
    """Launch grids (tiles, heads, sentences) that cover all of them, each with its first head and first sentence.

    One grid but for sizes beyond `MAX_GRID_YZ`. Three axes spare every program two divisions, and the tiles of one
    head, which read the same keys and values, still follow one another.
    """
    for first_b in range(0, batch, MAX_GRID_YZ):
        for first_h in range(0, heads, MAX_GRID_YZ):
            yield (n_tiles, min(MAX_GRID_YZ, heads - first_h), min(MAX_GRID_YZ, batch - first_b)), first_h, first_b


def int32_offsets(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether one set of 32-bit offsets finds the rows of a head in both (B, H, T, D): the usual case.

    It spares the loops over rows most of their registers for addresses. Otherwise offsets have 64 bits.
    """
    return a.stride(2) == b.stride(2) and (a.size(2) - 1) * a.stride(2) + a.size(3) <= MAX_INT32_OFFSET


@functools.cache
def overlap(device: torch.device) -> dict[str, bool]:
    """Options of a launch that may start while the kernel before it ends (programmatic dependent launch).

    Of a chain of short kernels each then has read its weights when its inputs are ready. Each waits for the one before
    it, which waited itself, so that all are done that were launched earlier. From Hopper on.
    """
    if not INTERPRETED:
        with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
            target = triton.runtime.driver.active.get_current_target()
        if target.backend == "cuda" and target.arch >= 90:
            return dict(OVERLAP=True, launch_pdl=True)
    return dict(OVERLAP=False)


def power_of_two(n: int) -> int:
    """The least power of two from n on, n >= 1."""
    return 1 << (n - 1).bit_length()


def precision(dtype: torch.dtype) -> str:
    """How products are taken.

    float32: three tf32 products that keep 22 of 24 bits of each factor; plain tf32 only where the user
    allowed it for matrix products. Half precision is exact in float32 accumulators. The interpreter has no
    bfloat16 product, so there the factors are widened first, to the same result.
    """
    if dtype == torch.float32:
        matmul = torch.backends.cuda.matmul  # reading its older flag is an error once the newer one was set
        allowed = matmul.fp32_precision == "tf32" if hasattr(matmul, "fp32_precision") else matmul.allow_tf32
        return "tf32" if allowed else "tf32x3"
    return "upcast" if dtype == torch.bfloat16 and INTERPRETED else "ieee"


def forward_config(table: TileTable, dim: int, dtype: torch.dtype) -> Config:
    """Of `_forward_kernel`, for the query table."""
    tile = table.outer, table.inner
    if dtype == torch.float32:
        return Config(min(table.outer, 64 if dim <= 64 else 32), 32, 4, 1)
    if dim > 64:
        return {
            (16, 16): Config(16, 32, 1, 2),
            (32, 32): Config(32, 32, 2, 2),
            (64, 64): Config(64, 64, 4, 3),
            (128, 128): Config(64, 64, 4, 3),
            (64, 16): Config(64, 64, 4, 2),
            (128, 16): Config(128, 64, 8, 2),
            (64, 1): Config(64, 64, 4, 2),
        }[tile]
    few = table.entries.size(2) <= 64  # blocks of 16 in a row: most lists end before a third stage is filled
    if dim <= 32 and tile in ((64, 64), (128, 128)):  # fewer registers, so that more programs share a multiprocessor
        return Config(64, 64, 4, 3, 80) if tile == (64, 64) else Config(64, 128, 4, 2, 128)
    return {
        (16, 16): Config(16, 32, 1, 2 if few else 3, 128),
        (32, 32): Config(32, 32, 1, 3, 168),
        (64, 64): Config(64, 64, 4, 2, 112),
        (128, 128): Config(64, 128, 4, 2, 168),
        (64, 16): Config(64, 32, 4, 3),
        (128, 16): Config(64, 32, 4, 3),
        (64, 1): Config(64, 64, 4, 2),
    }[tile]


def dq_config(table: TileTable, dim: int, dtype: torch.dtype) -> Config:
    """Of `_dq_kernel`, for the query table."""
    tile = table.outer, table.inner
    if dtype == torch.float32:
        return Config(min(table.outer, 64 if dim <= 64 else 32), 32, 4, 1)
    if table.inner < 64 <= table.outer:
        return Config(64, 64, 4, 2)
    if dim > 64:
        return {
            (16, 16): Config(16, 32, 1, 2),
            (32, 32): Config(32, 32, 2, 2),
            (64, 64): Config(64, 64, 4, 2),
            (128, 128): Config(64, 64, 4, 2),
        }[tile]
    return {
        (16, 16): Config(16, 32, 1, 2, 168),
        (32, 32): Config(32, 32, 1, 2),
        (64, 64): Config(64, 64, 4, 2, 128),
        (128, 128): Config(64, 64, 4, 2, 128),
    }[tile]


def dkdv_config(table: TileTable, dim: int, dtype: torch.dtype) -> Config:
    """Of `_dkdv_kernel`, for the key table: 16 keys against 64 queries or more where tiles are flat."""
    tile = table.outer, table.inner
    if dtype == torch.float32:
        return Config(32, min(table.outer, 32), 4, 1)
    if table.outer < 64 <= table.inner:
        return Config(64, 16, 1 if dim <= 64 else 4, 2)
    if dim > 64:
        return {
            (16, 16): Config(32, 16, 1, 2),
            (32, 32): Config(32, 32, 2, 2),
            (64, 64): Config(64, 64, 4, 2),
            (128, 128): Config(64, 64, 4, 2),
        }[tile]
    return {
        (16, 16): Config(32, 16, 1, 2, 168),
        (32, 32): Config(32, 32, 1, 2),
        (64, 64): Config(64, 64, 4, 2, 168),
        (128, 128): Config(64, 64, 4, 3, 168),
    }[tile]


# Of the kernels in Gluon for Hopper, by elements of a head. Heads of other sizes take the kernels in Triton, also those
# of which a line is deleted here; forward, 32 elements are no faster in Gluon.
HOPPER_FORWARD = {
    64: Config(64, 64, 4, 2, 128),
    96: Config(64, 64, 4, 2, 168),
    128: Config(64, 64, 4, 2, 240),
}
HOPPER_DQ = {
    32: Config(64, 64, 4, 2, 128),
    64: Config(64, 64, 4, 2, 128),
    96: Config(64, 64, 4, 2, 168),
    128: Config(64, 64, 4, 2, 240),
}
HOPPER_DKDV = {
    32: Config(64, 64, 4, 3, 128),
    64: Config(64, 64, 4, 3, 128),
    96: Config(32, 64, 4, 3, 128),
    128: Config(32, 64, 4, 3, 128),
}


def small_forward_config(tile: int, dtype: torch.dtype) -> Config:
    """Of `_small_forward_kernel`, for sequences up to `tile`."""
    wide = dtype == torch.float32
    return {
        32: Config(32, 32, 2 if wide else 1, 1),
        64: Config(64, 64, 4, 1),
        128: Config(128, 128, 4, 1) if wide else Config(128, 128, 8, 1, 128),
    }[tile]


def small_backward_config(tile: int, dtype: torch.dtype) -> Config:
    """Of `_small_backward_kernel`, for sequences up to `tile`."""
    wide = dtype == torch.float32
    return {
        32: Config(32, 32, 4 if wide else 1, 1),
        64: Config(64, 64, 8 if wide else 4, 1),
        128: Config(128, 128, 8, 1),
    }[tile]


def decode_config(shared: bool, k_size: int) -> Config:
    """Of `_decode_kernel`; shared: whether all beams of a sentence share its cache."""
    if k_size <= MAX_SENTENCE:  # programs are many, and end after a step or two
        return Config(1, 32, 2, 2) if shared else Config(1, 32, 1, 2)
    return Config(1, 64, 4, 3) if shared else Config(1, 64, 2, 1)


class RowsConfig(NamedTuple):
    """Of `_linear_rows_kernel`: columns of a program, most elements of rows at a time, warps, pipeline stages."""

    block_n: int
    block_k: int
    warps: int
    stages: int


def rows_config(m: int, k: int, normalised: bool) -> RowsConfig:
    """Of `_linear_rows_kernel`, for rows of k elements and results of m columns.

    Up to 1024 elements the fastest of a sweep on an H200, but for rows of more than 512 that are normalised, whose
    warps were chosen by registers. Tiles take less than 100 KB of shared memory.
    """
    block_n = 64 if m >= 4096 and k <= 512 else 16
    return RowsConfig(block_n, 1024 if k <= 1024 else 512, 8 if normalised and k > 512 else 4, 3)
