#!/usr/bin/env python
"""Benchmark the block-sparse kernels against every rival in one process, behind a float64 correctness gate.

    python scripts/bench_attention.py --out scripts/bench_attention.h100.json           # everything
    python scripts/bench_attention.py --only sentence --only decode --out some.json     # some sections
    python scripts/bench_attention.py --table scripts/bench_attention.h100.json         # Markdown, no GPU needed

Rivals: SDPA with the flash, cuDNN and memory-efficient back ends (dense), SDPA with the mask as a dense float
tensor (what stock fairseq computes), FlexAttention with the same block mask, the definition step by step (reference),
and where installed FlashAttention-4 (dense, and under the same mask) and cuDNN's block-sparse attention (its forward
pass). A rival that cannot run a case is recorded with its error; `difference` is how far its results are from ours.
Everything is timed as CUDA-graph replays: at 90% sparsity even 4 x 16 x 4096 takes no longer than its launch from
Python, which the section `host` measures by itself. What cannot be captured is called eagerly, and its row has the
reason, `eager`. `tflops` counts kept cells only (all of a dense rival): 4 D FLOP per kept cell forward, 10 D more
backward. `gathered` is what forward reads of keys and values, each kept block once per query tile, over its time.
Heads have 64 elements but in the section `head sizes`; blocks are squares but in the section `flat`. The section
`relative` compares masks of offsets with masks of the same cells and with torch's attention, for which it builds the
mask of every sentence in every call, as a model does. The section `ceilings` measures what the chip gives: a matrix
product of 8192³, and reads of the same gathered blocks without any arithmetic.
"""

from __future__ import annotations

import argparse
import functools
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.attention import SDPBackend

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from result_files import add_result_options, git_commit, print_table, require_writable, with_heading, write_report
from rivals_attention import Method, block_sparse, dense, dense_mask, flash_attention_4_dense, flex

from triton_ops import AttentionLayout, block_sparse_attention, decode_attention
from triton_ops.dense import attend_dense
from triton_ops.layout import TILES
from triton_ops.reference import attention_reference
from triton_ops.testing import (
    assert_decode_within_budget,
    assert_within_budget,
    block_mask,
    make_case,
    random_offsets,
)

DEVICE = "cuda"
DENSE_MASK_LIMIT = 2048  # longest sequences for which a dense mask and the scores of the reference are built
DENSE = {
    "sdpa flash": SDPBackend.FLASH_ATTENTION,
    "sdpa cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa efficient": SDPBackend.EFFICIENT_ATTENTION,
}
FORWARD_ONLY = ("cudnn sparse",)
BACKWARD_ONLY = ("fa4 dense deterministic",)  # its forward pass is that of "fa4 dense"
BOTH = ["forward", "forward+backward"]
WRONG = 0.05  # relative difference from our results that bfloat16 does not explain
BFLOAT16 = torch.bfloat16


# --- timing -----------------------------------------------------------------------------------------------------------


def quantiles(times: list[float]) -> dict[str, float]:
    """Median and 20th and 80th percentile, in milliseconds."""
    low, *_, high = statistics.quantiles(times, n=5)
    return dict(median_ms=statistics.median(times), p20_ms=low, p80_ms=high)


def time_events(run: Callable[[], object], repeats: int) -> dict[str, float]:
    for _ in range(3):
        run()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return quantiles(times)


def time_graph(run: Callable[[], object], repeats: int, calls: int = 10) -> dict[str, float]:
    """Per call, over replays of a graph of `calls` calls."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    # The outer context: a capture that fails leaves its own stream behind.
    with torch.cuda.stream(torch.cuda.current_stream()), torch.cuda.graph(graph):
        for _ in range(calls):
            run()
    timing = time_events(graph.replay, repeats)
    return {name: value / calls for name, value in timing.items()}


def measure(run: Callable[[], object], repeats: int) -> dict[str, object]:
    """Timing of `run`, of eager calls where it cannot be captured; or the reason why it cannot run."""
    try:
        run()
        torch.cuda.synchronize()
    except Exception as error:  # rivals raise all kinds
        return dict(error=_reason(error))
    try:
        return dict(time_graph(run, repeats))
    except Exception as error:
        torch.cuda.synchronize()
        return dict(time_events(run, repeats), eager=_reason(error))


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"


def training_step(forward: Method, q: Tensor, k: Tensor, v: Tensor, grad: Tensor) -> Callable[[], tuple[Tensor, ...]]:
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]

    def run():
        return torch.autograd.grad(forward(*leaves), leaves, grad)

    return run


def directed(direction: str, method: Method, *tensors: Tensor) -> Callable[[], tuple[Tensor, ...]]:
    """What to time of a method for q, k, v and a gradient: its output, or the gradients of q, k and v."""
    return training_step(method, *tensors) if direction != "forward" else lambda: (method(*tensors[:3]),)


def difference(got: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> float:
    """The largest of the relative differences of these tensors, in the Euclidean norm."""
    pairs = zip(got, expected, strict=True)
    return max(float((a.float() - b.float()).norm() / b.float().norm()) for a, b in pairs)


# --- sections ---------------------------------------------------------------------------------------------------------


def gate() -> None:
    """Refuse to time kernels that are not right: tile lists, sentence kernels, dropout, decode against float64."""
    shared = dict(heads=2, dim=64, dtype=BFLOAT16, scale=0.125, dropout_p=0.1, device=DEVICE)
    for number, tile in enumerate(TILES):
        for block in (tile, 1):
            keep = block_mask(2, 300, 260, tile, 0.5, seed=number)
            if block == 1:
                keep &= torch.rand(keep.shape, generator=torch.Generator().manual_seed(1)) < 0.8
            lengths = dict(q_lengths=torch.tensor([300, 170]), k_lengths=torch.tensor([90, 260]))
            assert_within_budget(make_case(batch=2, q_size=300, k_size=260, keep=keep, tile=tile, **lengths, **shared))
    for size in (32, 64, 128):
        keep = torch.rand(2, size, size, generator=torch.Generator().manual_seed(2)) < 0.7
        lengths = dict.fromkeys(("q_lengths", "k_lengths"), torch.tensor([size, size // 2, 0]))
        assert_within_budget(make_case(batch=3, q_size=size, k_size=size, keep=keep, causal=True, **lengths, **shared))
    for size in (32, 128, 200):
        layout, lengths = random_offsets(2, size, DEVICE), torch.tensor([size, size // 2, 1])
        mask = dict(keep=layout.keep_mask(size, size, lengths.to(DEVICE)), offsets=layout)
        assert_within_budget(make_case(batch=3, q_size=size, k_size=size, k_lengths=lengths, **mask, **shared))

    keep = torch.rand(2, 90, 100, device=DEVICE) < 0.3
    layout, step = AttentionLayout.from_keep_mask(keep), torch.tensor([60], device=DEVICE)
    q = torch.randn(3, 5, 2, 64, device=DEVICE, dtype=BFLOAT16)
    for shape in [(3, 5, 2, 100, 64), (3, 2, 100, 64)]:
        tensors = [q, *(torch.randn(shape, device=DEVICE, dtype=BFLOAT16) for _ in range(2))]
        ours = decode_attention(*tensors, layout, step, backend="triton")
        assert_decode_within_budget(ours, *tensors, keep[:, 60], scale=0.125)
    layout, lengths = random_offsets(2, 100, DEVICE), torch.tensor([100, 40, 1], device=DEVICE)
    ours = decode_attention(*tensors, layout, step, k_lengths=lengths, backend="triton")
    row = layout.keep_row(step, 100, lengths)
    assert_decode_within_budget(ours, *tensors, row, k_lengths=lengths, scale=0.125)


def square_methods(
    keep: Tensor, layout: AttentionLayout, block: tuple[int, int], batch: int, dim: int, rivals: bool
) -> tuple[dict[str, Method], dict[str, Method]]:
    """Ours and those rivals that know of the mask; and those that do not, if *rivals* are asked for."""
    size = keep.size(1)
    methods: dict[str, Method] = {"ours": lambda q, k, v: block_sparse_attention(q, k, v, layout, backend="triton")}
    if rivals and size <= DENSE_MASK_LIMIT:  # the mask alone takes heads x size² elements, scores batch times that
        float_mask = torch.zeros(keep.shape, device=DEVICE, dtype=BFLOAT16).masked_fill_(~keep, -torch.inf)
        methods["sdpa dense mask"] = dense_mask(float_mask[None])
        methods["reference"] = lambda q, k, v: attention_reference(q, k, v, keep, scale=dim**-0.5)[0]
    if block == (128, 128):
        methods["flex 128"] = flex(keep, 128, autotune=False)
    if block == (64, 64) and rivals and size > DENSE_MASK_LIMIT:  # minutes of compilation: once
        methods["flex 64 autotuned"] = flex(keep, 64, autotune=True)
    methods |= block_sparse(keep, block, batch)
    without_mask = {name: dense(backend) for name, backend in DENSE.items()} | flash_attention_4_dense()
    return methods, without_mask if rivals else {}


def square_case(
    batch: int,
    heads: int,
    size: int,
    sparsity: float,
    block: int | tuple[int, int],
    directions: list[str],
    repeats: int,
    rivals: bool,
    dim: int = 64,
    without: tuple[str, ...] = (),
) -> list[dict]:
    """Self-attention under random masks of blocks, a size or queries x keys: ours and the rivals, both directions.

    rivals: time those that skip no blocks, too. without: beginnings of the names of rivals to leave out.
    """
    torch.manual_seed(0)
    q, k, v, grad = (torch.randn(batch, heads, size, dim, device=DEVICE, dtype=BFLOAT16) for _ in range(4))
    keep = block_mask(heads, size, size, block, sparsity, seed=1, device=DEVICE)
    layout = AttentionLayout.from_keep_mask(keep).prepare()
    kept = int(keep.sum()) * batch
    shape, label = ((block, block), block) if isinstance(block, int) else (block, f"{block[0]}x{block[1]}")
    methods, without_mask = square_methods(keep, layout, shape, batch, dim, rivals)
    case = dict(case="square", batch=batch, heads=heads, size=size, dim=dim, dtype="bfloat16")
    masked = dict(block=label, nominal_sparsity=sparsity, sparsity=1 - float(keep.float().mean()))
    rows = []
    for direction in directions:
        results = None
        other = BACKWARD_ONLY if direction == "forward" else FORWARD_ONLY
        for name, method in {**methods, **without_mask}.items():
            if name.startswith(without) or name in other:
                continue
            run = directed(direction, method, q, k, v, grad)
            timing = measure(run, repeats)
            if "median_ms" in timing and name in methods:
                results = results or run()
                timing["difference"] = difference(run(), results)
            row = dict(case, direction=direction, method=name, tile=list(layout.tile) if name == "ours" else None)
            row |= (masked if name in methods else {}) | timing
            if "median_ms" in timing:
                computed = kept if name in methods else batch * keep.numel()
                flop = computed * dim * (4 if direction == "forward" else 14)
                row["tflops"] = flop / timing["median_ms"] / 1e9
                if name == "ours" and direction == "forward":
                    row["gathered"] = kept / shape[0] * dim * 2 * 2 / timing["median_ms"] / 1e9
            rows.append(row)
    rows[0]["layout_bytes"] = layout.memory()
    rows[0]["cells"] = keep.numel()
    return rows


def sentence_problem(batch: int, heads: int, size: int) -> tuple[list[Tensor], Tensor, Tensor]:
    """Time-first [q, k, v, gradient], D = 64, random lengths (B,) and an element mask (H, T, T) of half the cells."""
    torch.manual_seed(0)
    shape = size, batch, heads, 64
    tensors = [torch.randn(shape, device=DEVICE, dtype=BFLOAT16).permute(1, 2, 0, 3) for _ in range(4)]
    lengths = torch.randint(size // 4, size + 1, (batch,), device=DEVICE)
    keep = torch.rand(heads, size, size, device=DEVICE) < 0.5
    return tensors, lengths, keep | torch.eye(size, dtype=torch.bool, device=DEVICE)


def both_directions(
    case: dict[str, object], methods: dict[str, Method], tensors: list[Tensor], repeats: int
) -> list[dict]:
    """Time methods forward and forward + backward on q, k, v and a gradient; the rows have the items of *case*."""
    return [
        dict(case, direction=direction, method=name, **measure(directed(direction, method, *tensors), repeats))
        for direction in BOTH
        for name, method in methods.items()
    ]


def sentence_case(batch: int, heads: int, size: int, repeats: int) -> list[dict]:
    """Element masks, random lengths, dropout 0.1, forward + backward: SDPA gets them as one dense float mask."""
    dropout_p = 0.1
    (q, k, v, grad), lengths, keep = sentence_problem(batch, heads, size)
    layout = AttentionLayout.from_keep_mask(keep)
    seed = torch.ones(1, dtype=torch.int64, device=DEVICE)
    padding = torch.arange(size, device=DEVICE) >= lengths[:, None]
    visible = keep[None] & ~padding[:, None, None, :]
    visible[..., 0] |= ~visible.any(-1)  # SDPA gives NaN for a row without a visible key
    float_mask = torch.zeros(visible.shape, device=DEVICE, dtype=BFLOAT16).masked_fill_(~visible, -torch.inf)
    options = dict(q_lengths=lengths, k_lengths=lengths, dropout_p=dropout_p, seed=seed)
    methods = {
        "ours": lambda q, k, v: block_sparse_attention(q, k, v, layout, backend="triton", **options),
        "sdpa dense mask": dense_mask(float_mask, dropout_p),
        "reference": lambda q, k, v: attention_reference(q, k, v, keep, scale=64**-0.5, **options)[0],
    }
    case = dict(case="sentence", batch=batch, heads=heads, size=size, dim=q.size(-1), dtype="bfloat16", block=1)
    case |= dict(sparsity=1 - float(keep.float().mean()), mean_length=float(lengths.float().mean()), dropout=dropout_p)
    return both_directions(case, methods, [q, k, v, grad], repeats)


def decode_case(batch: int, beam: int, heads: int, size: int, sparsity: float, repeats: int) -> list[dict]:
    """One decode step over the dense cache: bmm, softmax in float32, bmm (stock fairseq), or torch's attention.

    In cross-attention stock fairseq has a cache for each hypothesis; for torch's the beams are queries of one.
    """
    dim = 64
    torch.manual_seed(0)
    keep = torch.rand(heads, 1024, 1024, device=DEVICE) >= sparsity
    layout = AttentionLayout.from_keep_mask(keep).prepare(decode=True)
    step = torch.tensor([size - 1], device=DEVICE)
    q = torch.randn(batch, beam, heads, dim, device=DEVICE, dtype=BFLOAT16)
    pool_rows = torch.arange(batch * beam * size, device=DEVICE, dtype=torch.int32).view(batch, beam, size)
    rows = []
    for kind, shape in [("self", (batch, beam, heads, size, dim)), ("cross", (batch, heads, size, dim))]:
        k, v = (torch.randn(shape, device=DEVICE, dtype=BFLOAT16) for _ in range(2))
        wide = [x if kind == "self" else x.unsqueeze(1).expand(-1, beam, -1, -1, -1).contiguous() for x in (k, v)]

        def stock(k=wide[0], v=wide[1]):
            scores = torch.matmul(q.unsqueeze(3) * dim**-0.5, k.transpose(-1, -2))
            return torch.matmul(torch.softmax(scores, -1, dtype=torch.float32).to(BFLOAT16), v)

        queries = q.flatten(0, 1).unsqueeze(2) if kind == "self" else q.transpose(1, 2)
        caches = [x.flatten(0, 1) if kind == "self" else x for x in (k, v)]
        methods = {
            "ours": functools.partial(decode_attention, q, k, v, layout, step, backend="triton"),
            "bmm softmax bmm": stock,
            "sdpa of a step": functools.partial(F.scaled_dot_product_attention, queries, *caches),
        }
        if kind == "self":
            pool = [x.transpose(2, 3).reshape(-1, heads, dim) for x in (k, v)]
            methods["ours, pool of rows"] = functools.partial(
                decode_attention, q, *pool, layout, step, block_table=pool_rows, backend="triton"
            )
        case = dict(case=f"decode {kind}", batch=batch, beam=beam, heads=heads, size=size, dim=dim, dtype="bfloat16")
        case |= dict(sparsity=1 - float(keep.float().mean()))
        rows += [dict(case, method=name, **measure(run, repeats)) for name, run in methods.items()]
    return rows


def relative_case(batch: int, heads: int, size: int, repeats: int) -> list[dict]:
    """Cross-attention of sentences of random lengths under a mask of offsets, forward + backward."""
    (q, k, v, grad), lengths, _ = sentence_problem(batch, heads, size)
    layout = random_offsets(heads, size, DEVICE)
    keep = layout.keep_mask(size, size)[0]
    absolute = AttentionLayout.from_keep_mask(keep).prepare()
    methods = {
        "ours": functools.partial(block_sparse_attention, layout=layout, k_lengths=lengths, backend="triton"),
        "mask of cells": functools.partial(
            block_sparse_attention, layout=absolute, k_lengths=lengths, backend="triton"
        ),
        "sdpa, mask built": functools.partial(block_sparse_attention, layout=layout, k_lengths=lengths, backend="sdpa"),
    }
    case = dict(case="relative", batch=batch, heads=heads, size=size, dim=q.size(-1), dtype="bfloat16")
    case |= dict(sparsity=1 - float(keep.float().mean()), mean_length=float(lengths.float().mean()))
    return both_directions(case, methods, [q, k, v, grad], repeats)


def relative_decode_case(batch: int, beam: int, heads: int, size: int, repeats: int) -> list[dict]:
    """One step of cross-attention, whose beams share a cache, under a mask of offsets."""
    (q, k, v, _), lengths, _ = sentence_problem(batch, heads, size)
    q = q[:, :, :1].expand(-1, -1, beam, -1).transpose(1, 2).contiguous()
    layout, step = random_offsets(heads, size, DEVICE), torch.tensor([size // 2], device=DEVICE)
    keep = layout.keep_mask(size, size)[0]
    absolute = AttentionLayout.from_keep_mask(keep).prepare(decode=True)
    layout.row_lists()

    def dense():
        row = layout.keep_row(step, size, lengths).unsqueeze(-2)
        return attend_dense(q.transpose(1, 2), k, v, row, scale=0.125, k_lengths=lengths)[0]

    step_of = functools.partial(decode_attention, q, k, v, step=step, k_lengths=lengths, backend="triton")
    methods = {
        "ours": functools.partial(step_of, layout=layout),
        "mask of cells": functools.partial(step_of, layout=absolute),
        "sdpa, mask built": dense,
    }
    shape = dict(case="decode relative", batch=batch, beam=beam, heads=heads, size=size, dim=q.size(-1))
    shape |= dict(dtype="bfloat16", sparsity=1 - float(keep[:, size // 2].float().mean()))
    return [dict(**shape, method=name, **measure(run, repeats)) for name, run in methods.items()]


def memory_case(batch: int, heads: int, size: int) -> list[dict]:
    """Peak memory of forward + backward above the inputs, ours against SDPA's flash back end."""
    q, k, v, grad = (torch.randn(batch, heads, size, 64, device=DEVICE, dtype=BFLOAT16) for _ in range(4))
    layout = AttentionLayout.from_keep_mask(block_mask(heads, size, size, 64, 0.9, 1, DEVICE)).prepare()
    methods = {
        "ours": lambda q, k, v: block_sparse_attention(q, k, v, layout, backend="triton"),
        "sdpa flash": dense(SDPBackend.FLASH_ATTENTION),
    }
    rows = []
    for name, method in methods.items():
        run = training_step(method, q, k, v, grad)
        run()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        peak = torch.cuda.max_memory_allocated() - before
        row = dict(case="memory", batch=batch, heads=heads, size=size, method=name, peak_bytes=peak)
        rows.append(row | dict(layout_bytes=layout.memory() if name == "ours" else None))
    return rows


@triton.jit
def _gather_kernel(p_x, p_out, n_blocks, BLOCK: tl.constexpr, AREA: tl.constexpr, N: tl.constexpr):
    """Sum N blocks of BLOCK elements at pseudo-random places of the AREA blocks that a program's head owns."""
    i_program = tl.program_id(0)
    p_x += (i_program // n_blocks).to(tl.int64) * AREA * BLOCK
    b_sum = tl.zeros([BLOCK], dtype=tl.float32)
    for i in tl.range(N, num_stages=4):
        place = ((i_program.to(tl.int64) * N + i) * 7919) % AREA
        b_sum += tl.load(p_x + place * BLOCK + tl.arange(0, BLOCK)).to(tl.float32)
    tl.store(p_out + i_program, tl.sum(b_sum, 0))


def ceiling_case(repeats: int) -> list[dict]:
    """What the chip gives: a large product, and gathered blocks as the forward pass at 4 x 16 x 4096 reads them."""
    a, b = (torch.randn(8192, 8192, device=DEVICE, dtype=BFLOAT16) for _ in range(2))
    timing = measure(lambda: a @ b, repeats)
    rows = [dict(case="ceiling", method="product 8192³", **timing)]
    if "median_ms" in timing:
        rows[0]["tflops"] = 2 * 8192**3 / timing["median_ms"] / 1e9
    for block, warps in [(16, 1), (32, 1), (64, 4), (128, 8)]:
        heads, elements = 64, block * 64  # a block of keys, or of values, with D = 64
        n_tiles, per_tile = 4096 // block, 2 * max(1, round(4096 // block * 0.1))
        x = torch.randn(heads, 2 * 4096 * 64, device=DEVICE, dtype=BFLOAT16)  # 1 MiB: keys and values of a head
        out = torch.empty(heads * n_tiles, device=DEVICE)

        def gather(x=x, out=out, elements=elements, n_tiles=n_tiles, per_tile=per_tile, warps=warps):
            area = x.size(1) // elements
            _gather_kernel[(out.numel(),)](x, out, n_tiles, elements, area, per_tile, num_warps=warps)

        timing = measure(gather, repeats)
        row = dict(case="ceiling", method=f"gathered blocks of {block}", **timing)
        if "median_ms" in timing:
            row["gathered"] = out.numel() * per_tile * elements * 2 / timing["median_ms"] / 1e9
        rows.append(row)
    return rows


def host_case(batch: int, heads: int, size: int, dropout_p: float, repeats: int) -> list[dict]:
    """What a call costs the host, in microseconds, at sizes for which nobody waits for the device."""
    torch.manual_seed(0)
    q, k, v, grad = (torch.randn(batch, heads, size, 64, device=DEVICE, dtype=BFLOAT16) for _ in range(4))
    layout = AttentionLayout.from_keep_mask(torch.ones(heads, size, size, dtype=torch.bool, device=DEVICE))
    float_mask = torch.zeros(batch, heads, size, size, device=DEVICE, dtype=BFLOAT16)
    methods = {
        "ours": lambda q, k, v: block_sparse_attention(q, k, v, layout, dropout_p=dropout_p, backend="triton"),
        "sdpa dense mask": dense_mask(float_mask, dropout_p),
    }
    rows = []
    for direction in BOTH:
        for name, method in methods.items():
            run = directed(direction, method, q, k, v, grad)
            times = []
            for _ in range(repeats + 3):
                torch.cuda.synchronize()
                start = time.perf_counter()
                for _ in range(20):
                    run()
                times.append((time.perf_counter() - start) / 20)
            torch.cuda.synchronize()
            median_us = statistics.median(times[3:]) * 1e6
            row = dict(case="host", size=size, dropout=dropout_p, direction=direction, method=name)
            rows.append(row | dict(median_us=median_us))
    return rows


def sections(repeats: int, without: tuple[str, ...] = ()) -> dict[str, list[Callable[[], list[dict]]]]:
    """The cases of every section."""

    def square(size: int, batch: int, heads: int, cases: list[tuple], dim: int = 64) -> list[Callable[[], list[dict]]]:
        case = functools.partial(square_case, batch, heads, size, dim=dim, without=without)
        return [
            functools.partial(case, sparsity, block, BOTH, repeats, rivals=i == 0)
            for i, (sparsity, block) in enumerate(cases)
        ]

    long_cases = [(0.9, 64), (0.9, 128), (0.9, 32), (0.9, 16), (0.5, 128), (0.5, 64), (0.0, 128)]
    flat_cases = [(0.9, block) for block in TILES if block[0] > block[1]]
    return {
        "medium": square(1024, 8, 8, [(0.9, 64), (0.9, 128), (0.9, 16)]),
        "sentence": [
            functools.partial(sentence_case, batch, 8, size, repeats)
            for batch, size in [(256, 32), (128, 64), (64, 128)]
        ],
        "decode": [lambda: decode_case(64, 5, 8, 1000, 0.9, repeats)],
        "relative": [
            functools.partial(relative_case, batch, 8, size, repeats)
            for batch, size in [(256, 32), (128, 64), (64, 128), (8, 1024)]
        ]
        + [functools.partial(relative_decode_case, 64, 5, 8, size, repeats) for size in (30, 1000)],
        "memory": [lambda: memory_case(2, 16, 8192)],
        "host": [
            functools.partial(host_case, batch, heads, size, dropout_p, repeats)
            for batch, heads, size in [(4, 8, 32), (1, 4, 512)]
            for dropout_p in (0.1, 0.0)
        ],
        "ceilings": [lambda: ceiling_case(repeats)],
        "long": square(4096, 4, 16, long_cases),
        "flat": square(4096, 4, 16, flat_cases),
        "head sizes": [
            case for dim in (32, 96, 128) for case in square(4096, 4, 16, [(0.9, 64), (0.9, 128), (0.0, 128)], dim)
        ],
    }


# --- output -----------------------------------------------------------------------------------------------------------


def provenance() -> dict[str, object]:
    return dict(
        device=torch.cuda.get_device_name(),
        torch=torch.__version__,
        triton=triton.__version__,
        cuda=torch.version.cuda,
        commit=git_commit(),
        command=shlex.join(["python", *sys.argv]),
        time=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def group_key(row: dict) -> tuple:
    names = ("case", "batch", "beam", "heads", "size", "dim", "nominal_sparsity", "block", "direction")
    return tuple(row.get(name) for name in names)


def shape_of(row: dict) -> tuple:
    return tuple(row.get(name) for name in ("case", "batch", "heads", "size", "dim", "direction"))


RIVALS = {  # column of the table, if measured: what is in it
    "FlashAttention-4": ("fa4",),
    "FlashAttention-4, dense": ("fa4 dense",),
    "the same, deterministic": ("fa4 dense deterministic",),
    "cuDNN, block-sparse": ("cudnn sparse",),
    "cuDNN": ("sdpa cudnn",),
    "FlashAttention-2": ("sdpa flash",),
    "efficient": ("sdpa efficient",),
    "FlexAttention": ("flex 128", "flex 64 autotuned"),
    "dense mask": ("sdpa dense mask",),
    "bmm, softmax, bmm": ("bmm softmax bmm",),
    "SDPA of a step": ("sdpa of a step",),
    "reference": ("reference",),
    "mask of cells": ("mask of cells",),
    "SDPA, mask built": ("sdpa, mask built",),
}


def table(report: dict) -> str:
    """One Markdown row per case: our time, and how many times as long each rival takes."""
    from ap_fairseq.evaluation.tables import Table, markdown  # measuring needs torch and triton only

    groups: dict[tuple, list[dict]] = {}
    for row in report["rows"]:
        groups.setdefault(group_key(row), []).append(row)
    dense_rows = [row for row in report["rows"] if row["method"] in DENSE or row["method"].startswith("fa4 dense")]
    measured = {row["method"] for row in report["rows"]}
    columns = {name: methods for name, methods in RIVALS.items() if measured.intersection(methods)}
    body = []
    for rows in groups.values():
        ours = next((row for row in rows if row["method"] == "ours"), None)
        if ours is None or "median_ms" not in ours:
            continue
        # Dense rivals do not depend on the mask: they are timed once per shape.
        rivals = rows + [row for row in dense_rows if shape_of(row) == shape_of(ours)]
        batch = f"{ours['batch']}x{ours['beam']}" if "beam" in ours else ours["batch"]
        rate = f"{ours['tflops']:.0f}" if "tflops" in ours else ""
        shape = f"{batch}, {ours['heads']}, {ours['size']}" + (f", D = {ours['dim']}" if ours["dim"] != 64 else "")
        cells = [ours["case"], shape, f"{ours['sparsity']:.1%}"]
        cells += [str(ours.get("block", 1)), ours.get("direction", "step"), f"{ours['median_ms']:.3g}", rate]
        body.append(cells + [_times_longer(rivals, methods, ours["median_ms"]) for methods in columns.values()])
    header = ["case", "B, H, T", "sparsity", "block", "direction", "ours, ms", "TFLOP/s", *columns]
    versions = f"torch {report['torch']}, triton {report['triton']}"
    made = f"{report['device']}, {versions}, commit {report['commit']}: `{report['command']}`"
    return with_heading(made, report, markdown(Table(header, body, align="llrrl" + "r" * (2 + len(columns)))))


def _times_longer(rows: list[dict], methods: tuple[str, ...], ours: float) -> str:
    row = next((row for row in rows if row["method"] in methods), None)
    if row is None:
        return ""
    if "median_ms" not in row:
        return "error"
    if row.get("difference", 0) > WRONG:
        return "wrong"
    return f"{row['median_ms'] / ours:.2f}" + (" (eager)" if "eager" in row else "")


def details(report: dict) -> str:
    """What is not a time: failures of rivals, sizes of layouts, peak memory, ceilings of the chip, host time."""
    lines = []
    for row in report["rows"]:
        if "error" in row:
            lines.append(f"{row['method']}, {group_key(row)}: {row['error']}")
        if "eager" in row:
            lines.append(f"{row['method']}, {group_key(row)}, called eagerly, as a capture fails: {row['eager']}")
        if row.get("difference", 0) > WRONG:
            lines.append(f"{row['method']}, {group_key(row)}: {row['difference']:.0%} off our results")
        if row.get("layout_bytes") and row.get("cells"):
            total = sum(row["layout_bytes"].values())
            lines.append(
                f"Layout of {row['heads']} x {row['size']}², block {row['block']}: {total / 2**20:.2f} MiB, "
                f"{total / row['cells']:.4f} bytes per cell ({row['layout_bytes']})."
            )
        if "gathered" in row and row["case"] == "square":
            lines.append(
                f"Forward, {row['size']} positions, blocks of {row['block']}, {row['sparsity']:.1%}: "
                f"gathers {row['gathered']:.1f} TB/s."
            )
        if row["case"] == "memory":
            lines.append(f"Peak memory above inputs, {row['method']}: {row['peak_bytes'] / 2**20:.0f} MiB.")
        if row["case"] == "ceiling" and "median_ms" in row:
            rate = f"{row['tflops']:.0f} TFLOP/s" if "tflops" in row else f"{row['gathered']:.1f} TB/s"
            lines.append(f"Ceiling, {row['method']}: {rate}.")
        if row["case"] == "host":
            which = f"{row.get('size', 32)} positions, dropout {row.get('dropout', 0.1)}, {row['direction']}"
            lines.append(f"Host time of a call, {which}, {row['method']}: {row['median_us']:.0f} us.")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", choices=list(sections(1)), help="sections to run (default: all)")
    parser.add_argument(
        "--without",
        action="append",
        default=[],
        metavar="NAME",
        help="rivals to leave out, as flex (minutes to compile)",
    )
    parser.add_argument("--repeats", type=int, default=30, help="timed calls or graph replays (default: 30)")
    add_result_options(parser)
    options = parser.parse_args(arguments)
    if options.table:
        print_table(parser, options.table, lambda report: f"{table(report)}\n\n{details(report)}")
        return
    if options.repeats < 2:
        parser.error(f"--repeats {options.repeats}: percentiles take at least 2")
    require_writable(parser, options.out)
    if not torch.cuda.is_available():
        sys.exit("bench_attention.py: no CUDA device; only --table works without one")
    gate()
    report: dict[str, object] = provenance()
    rows: list[dict] = []
    report["rows"] = rows
    for name, cases in sections(options.repeats, tuple(options.without)).items():
        if not options.only or name in options.only:
            for case in cases:
                rows += case()
                if options.out:  # after every case: a run that is cut short keeps what it measured
                    write_report(options.out, report)
            print(f"{name}: {len(rows)} rows", flush=True)
    print(table(report), details(report), sep="\n\n")


if __name__ == "__main__":
    main()
