"""The kernels with their derivative: as an autograd function, and as torch custom operators.

`torch.compile` sees one opaque operator, which needs no side effects and no host synchronisation; CUDA-graph capture
and activation checkpointing work for the same reason. Dispatching a custom operator takes several hundred microseconds
of Python, more than a sentence-sized kernel runs, so calls outside a trace go through the autograd function.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor

from .backward import backward
from .call import Call
from .decode import append, decode
from .forward import forward
from .layout import RowLists
from .small import small_backward, small_forward, small_size


def _device_of(tensor: Tensor):
    """Triton launches on the current device: make it the one that holds the tensors."""
    if tensor.is_cuda and tensor.device.index != torch.cuda.current_device():
        return torch.cuda.device(tensor.device)
    return nullcontext()


def _forward(q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor]:
    """(out, lse)."""
    if q.numel() == 0:
        return torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)
    with _device_of(q):
        small = small_size(q.size(2), k.size(2), q.size(3), q.dtype)
        return forward(q, k, v, call) if small is None else small_forward(q, k, v, small, call)


def _backward(
    grad_out: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, call: Call
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv)."""
    if q.numel() == 0 or k.numel() == 0:
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    # Expanded or transposed gradients: the kernels read rows of D consecutive elements.
    grad_out = grad_out if grad_out.stride(3) == 1 else grad_out.contiguous()
    grad_lse = None if grad_lse is None else grad_lse.contiguous()
    with _device_of(q):
        small = small_size(q.size(2), k.size(2), q.size(3), q.dtype)
        if small is None:
            return backward(grad_out, grad_lse, q, k, v, out, lse, call)
        return small_backward(grad_out, grad_lse, q, k, v, small, call)


class Attention(torch.autograd.Function):
    """Arguments and results of `_forward`."""

    @staticmethod
    def forward(ctx, q, k, v, call):
        output = _forward(q, k, v, call)
        ctx.set_materialize_grads(False)
        # The layout's tensors never change. Those of the caller may, which autograd reports.
        ctx.save_for_backward(q, k, v, *output, call.q_lengths, call.k_lengths, call.seed)
        ctx.call = call
        return output

    @staticmethod
    def backward(ctx, grad_out, grad_lse):
        if not torch.is_grad_enabled():
            return *Attention._gradients(ctx, grad_out, grad_lse), None
        with torch.no_grad():  # create_graph=True
            grads = Attention._gradients(ctx, grad_out, grad_lse)
        return *_Once.apply(*grads, grad_out, grad_lse, *ctx.saved_tensors[:3]), None

    @staticmethod
    def _gradients(ctx, grad_out, grad_lse):
        q, k, v, out, lse, q_lengths, k_lengths, seed = ctx.saved_tensors
        return _gradients(grad_out, grad_lse, q, k, v, out, lse, ctx.call.on(q_lengths, k_lengths, seed))


class _Once(torch.autograd.Function):
    """Gradients (dq, dk, dv) of what else it takes; what differentiates them once more is told that it cannot.

    torch's `once_differentiable` tells only where the gradient of the output has a gradient itself. Elsewhere, as in
    that of a sum, the second derivative would be 0, unsaid.
    """

    @staticmethod
    def forward(ctx, dq, dk, dv, *_):
        return tuple(None if grad is None else grad.view_as(grad) for grad in (dq, dk, dv))

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError(
            "the kernels have no second derivative; use backend 'sdpa', within "
            "torch.nn.attention.sdpa_kernel(SDPBackend.MATH)"
        )


def _save(ctx, inputs, output) -> None:
    q, k, v, *arguments = inputs
    call = Call(*arguments)
    ctx.set_materialize_grads(False)
    tensors = call.words, call.q_lengths, call.k_lengths, call.seed, call.anchor
    ctx.save_for_backward(q, k, v, *output, *tensors, *call.tables)
    ctx.numbers = dict(row_shift=call.row_shift, tile_q=call.tile_q, tile_k=call.tile_k)
    ctx.numbers |= dict(dropout_p=call.dropout_p, scale=call.scale, slope=call.slope)


def _gradients(grad_out, grad_lse, q, k, v, out, lse, call, backward_of=_backward):
    """Gradients of q, k and v; grad_out and grad_lse are None where nothing depends on the output."""
    if grad_out is None and grad_lse is None:
        return None, None, None
    grad_out = torch.zeros_like(out) if grad_out is None else grad_out
    return backward_of(grad_out, grad_lse, q, k, v, out, lse, call)


# -- custom operators --------------------------------------------------------------------------------------------------

# Schemas are written out: what torch infers from annotations depends on its version. The fields of a `Call`:
_CALL = (
    "Tensor words, int row_shift, Tensor[] tables, int tile_q, int tile_k, "
    "Tensor? q_lengths, Tensor? k_lengths, Tensor? seed, float dropout_p, float scale, int slope, Tensor? anchor"
)

attention_op = torch.library.custom_op(
    "triton_ops::block_sparse_attention",
    lambda q, k, v, *arguments: _forward(q, k, v, Call(*arguments)),
    mutates_args=(),
    schema=f"(Tensor q, Tensor k, Tensor v, {_CALL}) -> (Tensor, Tensor)",
)
attention_backward_op = torch.library.custom_op(
    "triton_ops::block_sparse_attention_backward",
    lambda grad_out, grad_lse, q, k, v, out, lse, *arguments: _backward(
        grad_out, grad_lse, q, k, v, out, lse, Call(*arguments)
    ),
    mutates_args=(),
    schema="(Tensor grad_out, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    f"{_CALL}) -> (Tensor, Tensor, Tensor)",
)


@attention_op.register_fake
def _(q, k, v, *arguments):
    return torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)


@attention_backward_op.register_fake
def _(grad_out, grad_lse, q, k, v, *arguments):
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _operator_gradients(ctx, grad_out, grad_lse):
    q, k, v, out, lse, words, q_lengths, k_lengths, seed, anchor, *tables = ctx.saved_tensors
    tensors = dict(words=words, tables=tables, q_lengths=q_lengths, k_lengths=k_lengths, seed=seed, anchor=anchor)
    call = Call(**tensors, **ctx.numbers)

    def backward_of(*arguments):
        *tensors, call = arguments
        return attention_backward_op(*tensors, *call.operands())

    grads = [*_gradients(grad_out, grad_lse, q, k, v, out, lse, call, backward_of), *[None] * (len(Call._fields) - 1)]
    tables = 3 + Call._fields.index("tables")
    grads[tables] = [None] * len(ctx.needs_input_grad[tables])  # an operator wants one for each tensor of a list
    return tuple(grads)


attention_op.register_autograd(_operator_gradients, setup_context=_save)


def attend(q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor]:
    """(out, lse), differentiable: the operator inside a trace, the autograd function elsewhere."""
    if torch.compiler.is_compiling():
        return attention_op(q, k, v, *call.operands())
    _refuse_transforms()
    return Attention.apply(q, k, v, call)


def _refuse_transforms() -> None:
    """Raise RuntimeError under torch.func: support costs every call the time to inspect a signature."""
    if torch._C._are_functorch_transforms_active():
        raise RuntimeError("the kernels do not take part in torch.func transforms (grad, vmap); use backend 'sdpa'")


def _decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    columns: Tensor,
    pointers: Tensor,
    step: Tensor,
    k_size: int,
    k_lengths: Tensor | None,
    block_table: Tensor | None,
    cache_starts: Tensor | None,
    cache_offsets: Tensor | None,
    scale: float,
    slope: int,
    anchor: Tensor | None,
    settled: bool = False,
) -> Tensor:
    if q.numel() == 0:
        return torch.empty_like(q)
    tables = k_lengths, block_table, cache_starts, cache_offsets
    with _device_of(q):
        return decode(q, k, v, RowLists(columns, pointers), step, k_size, *tables, scale, slope, anchor, settled)


decode_op = torch.library.custom_op(
    "triton_ops::decode_attention",
    _decode,
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor columns, Tensor pointers, Tensor step, SymInt k_size, "
    "Tensor? k_lengths, Tensor? block_table, Tensor? cache_starts, Tensor? cache_offsets, float scale, "
    "int slope, Tensor? anchor, bool settled=False) -> Tensor",
)


@decode_op.register_fake
def _(q, *_):
    return torch.empty_like(q)


def decode_step(*inputs) -> Tensor:
    """`_decode`: the operator inside a trace, a plain call elsewhere."""
    if torch.compiler.is_compiling():
        return decode_op(*inputs)
    _refuse_transforms()
    return _decode(*inputs)


def append_step(kv: Tensor, pool: Tensor, offsets: Tensor, step: Tensor) -> None:
    """As `api.append_to_pool`, whatever the current device."""
    with _device_of(kv):
        append(kv, pool, offsets, step)
