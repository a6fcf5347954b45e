#!/usr/bin/env python
"""Check the backward kernels of gluon_kernels.py and time them in turns with those of triton_ops.

    python scripts/gluon_backward.py --out some.json

An experiment for Hopper with triton 3.6 or later, whose results so far are the entry `gluon` of kernels.h200.json:
dK and dV take less time than in triton_ops, dQ does not. Both are right, with the same bits in every run. They cover
half precision, heads of 64 elements, contiguous tensors and masks of whole blocks of 128, without lengths, dropout,
partial blocks or gradients of the log-sum-exp; nothing in the package calls them.

The results are from two rounds of variants, of which these files hold the best for each gradient. On triton 3.6 both
compile to the machine code that was timed; the launches below were rewritten and have not run on a GPU since.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import gluon_kernels
from bench_attention import BFLOAT16, DEVICE, provenance
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from triton_ops import AttentionLayout, ops
from triton_ops.backward import backward
from triton_ops.call import Call
from triton_ops.layout import TileTable
from triton_ops.primitives import LOG2E
from triton_ops.reference import attention_reference
from triton_ops.testing import block_mask

BLOCK, DIM, ROWS, STAGES = 128, 64, 64, 3
SCALE = DIM**-0.5
CALLS = 4  # in a graph


class Problem(NamedTuple):
    """Contiguous (B, H, T, 64), and what the forward pass leaves, float32 (B, H, T)."""

    q: Tensor
    k: Tensor
    v: Tensor
    grad: Tensor
    out: Tensor
    lse: Tensor
    pivot: Tensor  # of dkdv
    delta: Tensor


def describe(x: Tensor) -> TensorDescriptor:
    """Tiles of rows of (B, H, T, 64), or of numbers of rows (B, H, T)."""
    if x.dim() == 3:
        return TensorDescriptor(x.view(-1), [x.numel()], [1], [ROWS], gl.NVMMASharedLayout(0, 32, 1))
    x = x.view(-1, DIM)
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [ROWS, DIM], gl.NVMMASharedLayout(128, 16, 2))


def numbers(q: Tensor, table: TileTable) -> dict:
    heads, rows, blocks = table.entries.shape
    return dict(
        H=q.size(1), MH=heads, T=q.size(2), NO=rows, NI=blocks, scale=SCALE, scale_log2=SCALE * LOG2E.value,
        D=DIM, G=BLOCK, STAGES=STAGES, **gluon_kernels.OPTIONS,
    )  # fmt: skip


def dkdv(x: Problem, table: TileTable) -> tuple[Tensor, Tensor]:
    """Return dK and dV."""
    dk, dv = torch.empty_like(x.k), torch.empty_like(x.v)
    batch, heads, size, _ = x.q.shape
    gluon_kernels.dkdv_kernel[size // ROWS, heads, batch](
        *map(describe, (x.q, x.grad, x.k, x.v, x.pivot, x.delta)), dk, dv, table.entries, table.counts,
        **numbers(x.q, table),
    )  # fmt: skip
    return dk, dv


@functools.cache
def counter(device: torch.device) -> Tensor:
    return torch.zeros(2, dtype=torch.int32, device=device)


def dq(x: Problem, table: TileTable, multiprocessors: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return dQ, and pivots and δ for `dkdv`."""
    grad_q, pivot, delta = torch.empty_like(x.q), torch.empty_like(x.lse), torch.empty_like(x.lse)
    n_rows = x.q.size(2) // ROWS
    n_items = n_rows * x.q.size(0) * x.q.size(1)
    gluon_kernels.dq_kernel[(min(n_items, 2 * multiprocessors),)](
        *map(describe, (x.q, x.grad, x.out, x.k, x.v, x.lse)), pivot, delta, grad_q, table.entries, table.counts,
        counter(x.q.device), n_rows=n_rows, n_items=n_items, **numbers(x.q, table),
    )  # fmt: skip
    return grad_q, pivot, delta


class OneKernel(Call):
    """A call whose backward pass launches the kernel `kernel` only."""

    def launches(self, kernel, build, *tensors):
        return super().launches(kernel, build, *tensors) if kernel[0] == self.kernel else []


class OnlyDQ(OneKernel):
    kernel = "dq"


class OnlyDKDV(OneKernel):
    kernel = "dkdv"


def ours(x: Problem, call: Call) -> tuple[Tensor, Tensor, Tensor]:
    """Return dQ, dK and dV of triton_ops; of a `OneKernel` those that it computes."""
    empty_like = torch.empty_like
    # `OnlyDKDV` leaves δ as it is.
    with mock.patch("torch.empty_like", lambda like: x.delta if like is x.lse else empty_like(like)):
        return backward(x.grad, None, x.q, x.k, x.v, x.out, x.lse, call)


def problem(batch: int, heads: int, size: int, sparsity: float) -> tuple[Problem, Call, AttentionLayout, Tensor]:
    """Return inputs, how triton_ops attends, and the mask, as a layout and dense."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    shape = batch, heads, size, DIM
    q, k, v, grad = (torch.randn(shape, device=DEVICE, generator=generator).to(BFLOAT16) for _ in range(4))
    keep = block_mask(heads, size, size, BLOCK, sparsity, seed=1, device=DEVICE)
    layout = AttentionLayout.from_keep_mask(keep, tile=BLOCK)
    tables = layout.tables(training=True)
    call = Call(layout.words, layout.row_shift, tables, *layout.tile, None, None, None, 0.0, SCALE)
    out, lse = ops._forward(q, k, v, call)
    pivot = torch.where(lse.isneginf(), torch.inf, lse * LOG2E.value)
    return Problem(q, k, v, grad, out, lse, pivot, (out.float() * grad.float()).sum(-1)), call, layout, keep


def difference(got: Tensor, expected: Tensor) -> float:
    """The largest, to the largest magnitude that is expected."""
    return float((got.double() - expected).abs().max() / expected.abs().max())


def check(multiprocessors: int) -> list[dict]:
    """Errors against float64 of both, and whether a second run gives the same bits."""
    rows = []
    for sparsity in (0.0, 0.5):
        x, call, layout, keep = problem(1, 2, 512, sparsity)
        q, k, v = (tensor.double().requires_grad_() for tensor in x[:3])
        out, _, _ = attention_reference(q, k, v, keep, scale=SCALE)
        expected = torch.autograd.grad(out, (q, k, v), x.grad.double())
        runs = [(dq(x, layout.query_table(), multiprocessors)[0], *dkdv(x, layout.key_table())) for _ in range(2)]
        same = all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
        for name, reference, gluon, triton in zip(("dq", "dk", "dv"), expected, runs[0], ours(x, call), strict=True):
            errors = dict(gluon=difference(gluon, reference), triton=difference(triton, reference))
            rows.append(dict(sparsity=sparsity, gradient=name, errors=errors, same_bits=same))
    return rows


def capture(run: Callable[[], object]) -> torch.cuda.CUDAGraph:
    for _ in range(3):
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(CALLS):
            run()
    return graph


def time_in_turns(runs: Sequence[Callable[[], object]], repeats: int) -> list[float]:
    """Median milliseconds of a call of each."""
    graphs = [capture(run) for run in runs]
    events = []
    for _ in range(3 + repeats):
        events.append([[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in graphs])
        for graph, (start, end) in zip(graphs, events[-1], strict=True):
            start.record()
            graph.replay()
            end.record()
    torch.cuda.synchronize()
    times = [[start.elapsed_time(end) / CALLS for start, end in row] for row in events[3:]]
    return [statistics.median(column) for column in zip(*times, strict=True)]


def compare(sparsity: float, multiprocessors: int, repeats: int) -> list[dict]:
    x, call, layout, _ = problem(4, 16, 4096, sparsity)
    rows = []
    for name, theirs, gluon in (
        ("dkdv", OnlyDKDV(*call), functools.partial(dkdv, x, layout.key_table())),
        ("dq", OnlyDQ(*call), functools.partial(dq, x, layout.query_table(), multiprocessors)),
    ):
        triton_ms, gluon_ms = time_in_turns([functools.partial(ours, x, theirs), gluon], repeats)
        rows.append(dict(kernel=name, sparsity=sparsity, triton=triton_ms, gluon=gluon_ms, ratio=gluon_ms / triton_ms))
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--repeats", type=int, default=20, help="replays (default: %(default)s)")
    args = parser.parse_args(arguments)
    multiprocessors = torch.cuda.get_device_properties(DEVICE).multi_processor_count
    report = dict(provenance(), checks=check(multiprocessors), rows=[])
    for row in report["checks"]:
        print(json.dumps(row), flush=True)
    for sparsity in (0.0, 0.5, 0.9):
        for row in compare(sparsity, multiprocessors, args.repeats):
            report["rows"].append(row)
            print(json.dumps(row), flush=True)
    if args.out:
        args.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
