"""Linear layers for the few rows of a decoding step, each with all that happens around it in one kernel.

With few hypotheses a step is bound by the number of its kernels: each waits for the one before it, and reads weights
for a microsecond. So the layer normalisation before a product, the bias, activation and residual after it, and the way
of keys and values to the slots of a KV cache are part of the product's kernel. It reads its weights while the kernel
before it ends.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .config import LEAST_COLUMNS, RowsConfig, ceil_div, overlap, power_of_two, precision, rows_config
from .primitives import dot, let_next_start, wait_for_previous

MAX_ROWS = 16  # that a call may have: every program normalises all of them, which 32 make too slow
MAX_NORMALISED = 1024  # elements of a row that is normalised: it is in registers too
ACTIVATIONS = (None, "relu", "gelu")
TYPES = (torch.float16, torch.bfloat16)


class Norm(NamedTuple):
    """A layer normalisation over rows of C elements: weight and bias (C,), epsilon."""

    weight: Tensor
    bias: Tensor
    epsilon: float


class Slots(NamedTuple):
    """Where keys and values go: pool, offsets and step as in `api.append_to_pool`, whose pool is contiguous."""

    pool: Tensor
    offsets: Tensor
    step: Tensor


# The numbers of rows and of steps that tables are made for change from batch to batch.
@triton.jit(do_not_specialize=["N", "s_fh"])
def _linear_rows_kernel(
    p_x, p_w, p_b, p_y, p_residual, p_gain, p_shift, p_normed, p_pool, p_offsets, p_step, epsilon, s_fh, N, M,
    K: tl.constexpr, D: tl.constexpr, ACTIVATION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PARTS: tl.constexpr, PRECISION: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """BN columns of the (N, M) results: y = activation(normalised x · wᵀ + b) + residual; N <= BM.

    BK elements of the K of a row at a time, in PARTS that are summed by different warps: a chain of products as long as
    a row would take longer than to read the weights. A row that is normalised is BK or less.

    p_normed: the normalised rows are stored there, too.
    p_pool: the columns are those of q, k and v; keys and values, of heads of D, go to the pool, and q to p_y.
    """
    let_next_start(OVERLAP)
    i_n = tl.program_id(0)
    o_m, o_n = tl.arange(0, BM), i_n * BN + tl.arange(0, BN)
    m_m, m_n = o_m < N, o_n < M
    o_k = (tl.arange(0, PARTS) * (BK // PARTS))[:, None, None] + tl.arange(0, BK // PARTS)[None, None, :]
    p_x += o_m[None, :, None] * K
    p_w += o_n.to(tl.int64)[None, :, None] * K
    m_mk = m_m[None, :, None] & (o_k < K)
    b_w = tl.load(p_w + o_k, mask=m_n[None, :, None] & (o_k < K), other=0.0)  # [PARTS, BN, BK / PARTS]
    if p_b is not None:
        b_b = tl.load(p_b + o_n, mask=m_n, other=0.0).to(tl.float32)
    if p_gain is not None:
        b_gain = tl.load(p_gain + o_k, mask=o_k < K, other=0.0).to(tl.float32)
        b_shift = tl.load(p_shift + o_k, mask=o_k < K, other=0.0).to(tl.float32)
    wait_for_previous(OVERLAP)
    b_x = tl.load(p_x + o_k, mask=m_mk, other=0.0)  # [PARTS, BM, BK / PARTS]
    o_y, m_y = o_m.to(tl.int64)[:, None] * M + o_n[None, :], m_m[:, None] & m_n[None, :]  # [BM, BN]
    if p_residual is not None:
        b_residual = tl.load(p_residual + o_y, mask=m_y, other=0.0).to(tl.float32)
    if p_pool is not None:
        step = tl.load(p_step)
    if p_gain is not None:
        b_f = b_x.to(tl.float32)
        b_mean = tl.sum(tl.sum(b_f, 2), 0) / K  # [BM]
        b_f = tl.where(m_mk, b_f - b_mean[None, :, None], 0.0)
        b_variance = tl.sum(tl.sum(b_f * b_f, 2), 0) / K
        b_f = b_f * (1 / tl.sqrt(b_variance + epsilon))[None, :, None]
        b_x = (b_f * b_gain + b_shift).to(b_x.dtype)
        if p_normed is not None:
            if i_n == 0:
                tl.store(p_normed + o_m[None, :, None] * K + o_k, b_x, mask=m_mk)
    b_y = dot(b_w, tl.permute(b_x, (0, 2, 1)), PRECISION)  # [PARTS, BN, BM]: products take few columns, but not rows
    for start in range(BK, K, BK):
        o_l = start + o_k
        b_w = tl.load(p_w + o_l, mask=m_n[None, :, None] & (o_l < K), other=0.0)
        b_x = tl.load(p_x + o_l, mask=m_m[None, :, None] & (o_l < K), other=0.0)
        b_y += dot(b_w, tl.permute(b_x, (0, 2, 1)), PRECISION)
    b_y = tl.trans(tl.sum(b_y, 0))  # [BM, BN]

    if p_b is not None:
        b_y += b_b[None, :]
    if ACTIVATION == "relu":
        b_y = tl.where(b_y <= 0, 0.0, b_y)  # NaN stays
    elif ACTIVATION == "gelu":
        b_y = 0.5 * b_y * (1 + tl.erf(b_y * 0.7071067811865476))
    if p_residual is not None:
        b_y += b_residual
    b_y = b_y.to(p_y.dtype.element_ty)
    if p_pool is None:
        tl.store(p_y + o_y, b_y, mask=m_y)
    else:
        C = M // 3
        i_part, i_c = i_n * BN // C, i_n * BN % C
        if i_part == 0:
            tl.store(p_y + o_m[:, None] * C + o_n[None, :], b_y, mask=m_y)
        else:
            first = tl.load(p_offsets + (i_c // D).to(tl.int64) * s_fh + step)
            o_slot = (first + o_m).to(tl.int64) * 2 + (i_part - 1)
            tl.store(p_pool + o_slot[:, None] * D + (i_c % D + tl.arange(0, BN))[None, :], b_y, mask=m_y)


def require_alike(*tensors: Tensor | None) -> None:
    """Raise TypeError unless tensors, those that are not None, are contiguous and of one type."""
    given = [tensor for tensor in tensors if tensor is not None]
    if any(tensor.dtype != given[0].dtype or not tensor.is_contiguous() for tensor in given):
        found = ", ".join(f"{tensor.dtype} of strides {tensor.stride()}" for tensor in given)
        raise TypeError(f"expected contiguous tensors of one type, got {found}")


def linear_rows(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    norm: Norm | None = None,
    keep_normed: bool = False,
    activation: str | None = None,
    residual: Tensor | None = None,
    slots: Slots | None = None,
    config: RowsConfig | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute activation(norm(x) · weightᵀ + bias) + residual for N <= `MAX_ROWS` rows by one kernel.

    All tensors are contiguous and of one half-precision type. Sums and what follows are float32, rounded once at the
    end; normalised rows are rounded before the product.

    Args:
        x: (N, K); K <= `MAX_NORMALISED` with *norm*.
        weight, bias: (M, K) and (M,).
        norm: applied to x first.
        keep_normed: whether the normalised rows are wanted.
        activation: one of `ACTIVATIONS`; gelu by the error function.
        residual: (N, M).
        slots: the M = 3C columns are those of queries, keys and values; the latter two are written there.
        config: None: that of `rows_config`.

    Returns:
        (N, M), or the queries (N, C) with *slots*; and the normalised rows (N, K), or x where they are not asked for.

    Raises:
        ValueError: sizes or an activation that the kernel does not take; with *slots* heads that `RowsConfig.block_n`
            does not divide.
        TypeError: another type than float16 or bfloat16, more than one type, or tensors that are not contiguous.
    """
    (n, k), m = x.shape, weight.size(0)
    if n > MAX_ROWS or (norm is not None and k > MAX_NORMALISED):
        raise ValueError(
            f"at most {MAX_ROWS} rows, of {MAX_NORMALISED} elements if they are normalised, got {n} of {k}: use torch"
        )
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {ACTIVATIONS}, got {activation!r}")
    if x.dtype not in TYPES:
        raise TypeError(f"rows must be float16 or bfloat16, got {x.dtype}")
    require_alike(x, weight, bias, residual, *(norm or ())[:2])
    config = rows_config(m, k, norm is not None) if config is None else config
    head_size = m // 3 // (1 if slots is None else slots.offsets.size(0))
    if slots is not None and head_size % config.block_n:
        raise ValueError(f"heads of {head_size} columns are no multiple of block_n = {config.block_n}: lower it")
    block_k = power_of_two(k) if norm is not None else min(config.block_k, power_of_two(k))
    block_k = max(block_k, 16 * config.warps)  # the least of a product
    y = x.new_empty(n, m if slots is None else m // 3)
    normed = torch.empty_like(x) if keep_normed else None
    _linear_rows_kernel[(ceil_div(m, config.block_n),)](
        p_x=x, p_w=weight, p_b=bias, p_y=y, p_residual=residual,
        p_gain=None if norm is None else norm.weight, p_shift=None if norm is None else norm.bias, p_normed=normed,
        p_pool=None if slots is None else slots.pool, p_offsets=None if slots is None else slots.offsets,
        p_step=None if slots is None else slots.step, epsilon=0.0 if norm is None else norm.epsilon,
        s_fh=0 if slots is None else slots.offsets.stride(0), N=n, M=m,
        K=k, D=head_size, ACTIVATION=activation,
        BM=max(LEAST_COLUMNS, power_of_two(n)), BN=config.block_n, BK=block_k,
        PARTS=config.warps, PRECISION=precision(x.dtype), num_warps=config.warps, num_stages=config.stages,
        **overlap(x.device),
    )  # fmt: skip
    return y, x if normed is None else normed


@triton.jit
def _embed_rows_kernel(
    p_tokens, p_table, p_position, p_step, p_y, scale, C: tl.constexpr, BC: tl.constexpr, OVERLAP: tl.constexpr
):
    """One hypothesis."""
    wait_for_previous(OVERLAP)
    let_next_start(OVERLAP)  # so all tables of a step are there before its layers begin
    i_m = tl.program_id(0)
    o_c = tl.arange(0, BC)
    token = tl.load(p_tokens + i_m)
    b_y = tl.load(p_table + token * C + o_c, mask=o_c < C, other=0.0)
    b_y = (b_y.to(tl.float32) * scale).to(b_y.dtype).to(tl.float32)  # rounded as a product of torch
    if p_position is not None:
        b_y += tl.load(p_position + tl.load(p_step) * C + o_c, mask=o_c < C, other=0.0).to(tl.float32)
    tl.store(p_y + i_m * C + o_c, b_y.to(p_y.dtype.element_ty), mask=o_c < C)


def embed_rows(tokens: Tensor, table: Tensor, scale: float, positions: Tensor | None, step: Tensor) -> Tensor:
    """Embed the *tokens* int64 (N,) of a step: scale * table[tokens] + positions[step], (N, C), by one kernel.

    Args:
        table: (V, C), contiguous.
        positions: (T, C), contiguous; None: nothing is added.
        step: int64 (1,).
    """
    n, c = tokens.numel(), table.size(1)
    y = table.new_empty(n, c)
    _embed_rows_kernel[(n,)](
        p_tokens=tokens, p_table=table, p_position=positions, p_step=step, p_y=y, scale=scale,
        C=c, BC=power_of_two(c), num_warps=2, **overlap(table.device),
    )  # fmt: skip
    return y
