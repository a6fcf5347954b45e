"""The kernels with their derivative: as an autograd function, and as torch custom operators.

`torch.compile` sees one opaque operator, which needs no side effects and no host synchronisation; CUDA-graph capture
and activation checkpointing work for the same reason. Dispatching a custom operator takes several hundred microseconds
of Python, more than a sentence-sized kernel runs, so calls outside a trace go through the autograd function.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .backward import backward
from .decode import append, decode
from .forward import forward
from .layout import RowLists, TileTable
from .primitives import LOG2E
from .reference import DROPOUT_RESOLUTION, dropout_threshold
from .small import small_backward, small_forward, small_size


def _device_of(tensor: Tensor):
    """Triton launches on the current device: make it the one that holds the tensors."""
    if tensor.is_cuda and tensor.device.index != torch.cuda.current_device():
        return torch.cuda.device(tensor.device)
    return nullcontext()


def _dropout_arguments(dropout_p: float) -> tuple[int, float]:
    """(threshold of the kernels, 1 / (1 - p) with p as the threshold represents it)."""
    threshold = dropout_threshold(dropout_p)
    return threshold, 1.0 / (1.0 - threshold / DROPOUT_RESOLUTION)


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    words: Tensor,
    row_shift: int,
    tables: list[Tensor],
    tile: int,
    q_lengths: Tensor | None,
    k_lengths: Tensor | None,
    seed: Tensor | None,
    dropout_p: float,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """(out, lse). tables: entries and counts of the query table, then of the key table when a gradient is wanted."""
    threshold, inverse_keep = _dropout_arguments(dropout_p)
    if q.numel() == 0:
        return torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)
    with _device_of(q):
        small = small_size(q.size(2), k.size(2), q.size(3), q.dtype)
        if small is not None:
            return small_forward(
                q, k, v, words, row_shift, small, q_lengths, k_lengths, seed, scale, threshold, inverse_keep
            )
        table = TileTable(tables[0], tables[1], tile)
        scale_log2 = scale * LOG2E.value
        return forward(
            q, k, v, words, row_shift, table, q_lengths, k_lengths, seed, scale_log2, threshold, inverse_keep
        )


def _backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    words: Tensor,
    row_shift: int,
    tables: list[Tensor],
    tile: int,
    q_lengths: Tensor | None,
    k_lengths: Tensor | None,
    seed: Tensor | None,
    dropout_p: float,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv)."""
    threshold, inverse_keep = _dropout_arguments(dropout_p)
    if q.numel() == 0 or k.numel() == 0:
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    # Expanded or transposed gradients: the kernels read rows of D consecutive elements.
    grad_out = grad_out if grad_out.stride(3) == 1 else grad_out.contiguous()
    grad_lse = None if grad_lse is None else grad_lse.contiguous()
    with _device_of(q):
        small = small_size(q.size(2), k.size(2), q.size(3), q.dtype)
        if small is not None:
            return small_backward(
                grad_out, grad_lse, q, k, v, words, row_shift, small, q_lengths, k_lengths, seed,
                scale, threshold, inverse_keep,
            )  # fmt: skip
        query_table = TileTable(tables[0], tables[1], tile)
        key_table = TileTable(tables[2], tables[3], tile)
        return backward(
            grad_out, grad_lse, q, k, v, out, lse, words, row_shift, query_table, key_table, q_lengths, k_lengths, seed,
            scale, scale * LOG2E.value, threshold, inverse_keep,
        )  # fmt: skip


class Attention(torch.autograd.Function):
    """Arguments and results of `_forward`."""

    @staticmethod
    def forward(ctx, *inputs):
        output = _forward(*inputs)
        _save(ctx, inputs, output)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out, grad_lse):
        return _gradients(ctx, _backward, grad_out, grad_lse)


def _save(ctx, inputs, output) -> None:
    q, k, v, words, ctx.row_shift, tables, ctx.tile, q_lengths, k_lengths, seed, ctx.dropout_p, ctx.scale = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, *output, words, q_lengths, k_lengths, seed, *tables)


def _gradients(ctx, backward_of, grad_out, grad_lse):
    """Gradients of the inputs of `_forward`, by `_backward` or its operator."""
    q, k, v, out, lse, words, q_lengths, k_lengths, seed, *tables = ctx.saved_tensors
    grads: tuple[Tensor | None, ...] = (None, None, None)
    if grad_out is not None or grad_lse is not None:
        grads = backward_of(
            torch.zeros_like(out) if grad_out is None else grad_out, grad_lse, q, k, v, out, lse, words, ctx.row_shift,
            tables, ctx.tile, q_lengths, k_lengths, seed, ctx.dropout_p, ctx.scale,
        )  # fmt: skip
    return (*grads, None, None, None, None, None, None, None, None, None)


# -- custom operators --------------------------------------------------------------------------------------------------

# Schemas are written out: what torch infers from annotations depends on its version.
_MASK = "Tensor words, int row_shift, Tensor[] tables, int tile"
_CALL = "Tensor? q_lengths, Tensor? k_lengths, Tensor? seed, float dropout_p, float scale"

attention_op = torch.library.custom_op(
    "triton_ops::block_sparse_attention",
    _forward,
    mutates_args=(),
    schema=f"(Tensor q, Tensor k, Tensor v, {_MASK}, {_CALL}) -> (Tensor, Tensor)",
)
attention_backward_op = torch.library.custom_op(
    "triton_ops::block_sparse_attention_backward",
    _backward,
    mutates_args=(),
    schema="(Tensor grad_out, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    f"{_MASK}, {_CALL}) -> (Tensor, Tensor, Tensor)",
)


@attention_op.register_fake
def _(q, k, v, words, row_shift, tables, tile, q_lengths, k_lengths, seed, dropout_p, scale):
    return torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)


@attention_backward_op.register_fake
def _(
    grad_out, grad_lse, q, k, v, out, lse, words, row_shift, tables, tile, q_lengths, k_lengths, seed, dropout_p, scale
):  # fmt: skip
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _operator_gradients(ctx, grad_out, grad_lse):
    grads = list(_gradients(ctx, attention_backward_op, grad_out, grad_lse))
    grads[5] = [None] * (len(ctx.saved_tensors) - 9)  # an operator wants one for each tensor of a list
    return tuple(grads)


attention_op.register_autograd(_operator_gradients, setup_context=_save)


def attend(*inputs) -> tuple[Tensor, Tensor]:
    """`_forward`, differentiable: the operator inside a trace, the autograd function elsewhere."""
    return (attention_op if torch.compiler.is_compiling() else Attention.apply)(*inputs)


def _decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    columns: Tensor,
    pointers: Tensor,
    step: Tensor,
    k_size: int,
    k_lengths: Tensor | None,
    cache_rows: Tensor | None,
    cache_starts: Tensor | None,
    cache_offsets: Tensor | None,
    scale: float,
) -> Tensor:
    if q.numel() == 0:
        return torch.empty_like(q)
    with _device_of(q):
        lists = RowLists(columns, pointers)
        return decode(q, k, v, lists, step, k_size, k_lengths, cache_rows, cache_starts, cache_offsets, scale)


decode_op = torch.library.custom_op(
    "triton_ops::decode_attention",
    _decode,
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor columns, Tensor pointers, Tensor step, SymInt k_size, "
    "Tensor? k_lengths, Tensor? cache_rows, Tensor? cache_starts, Tensor? cache_offsets, float scale) -> Tensor",
)


@decode_op.register_fake
def _(q, k, v, columns, pointers, step, k_size, k_lengths, cache_rows, cache_starts, cache_offsets, scale):
    return torch.empty_like(q)


def decode_step(*inputs) -> Tensor:
    """`_decode`: the operator inside a trace, a plain call elsewhere."""
    return (decode_op if torch.compiler.is_compiling() else _decode)(*inputs)


def append_step(kv: Tensor, pool: Tensor, offsets: Tensor, step: Tensor) -> None:
    """As `api.append_to_pool`, whatever the current device."""
    with _device_of(kv):
        append(kv, pool, offsets, step)
