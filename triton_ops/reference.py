"""Attention under a keep mask in plain torch: the definition that every back end is tested against.

For one head, with S = scale · Q Kᵀ and M the cells that are kept and inside both lengths:

    lse_i = log Σ_{j in M_i} exp S_ij          P_ij = exp(S_ij - lse_i) for j in M_i, else 0
    O_i   = Σ_j Z_ij P_ij V_j / (1 - p)        Z: dropout keep bits (all ones and p = 0 without dropout)

(Vaswani et al., arXiv 1706.03762 §3.2.1; dropout on the probabilities as in §5.4.) A row without a kept
cell has O_i = 0, lse_i = -inf and no gradient. Low precision inputs are multiplied in their own type and
the softmax is taken in float32, as stock fairseq does; float64 inputs stay float64 throughout.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

# Philox-4x32 (Salmon et al., SC 2011, table 2) with 7 rounds, the fewest that pass BigCrush.
PHILOX_ROUNDS = 7
_ROUND = (0xD2511F53, 0xCD9E8D57)
_KEY = (0x9E3779B9, 0xBB67AE85)
_LOW32 = 0xFFFFFFFF
DROPOUT_RESOLUTION = 2**31


def dropout_threshold(dropout_p: float) -> int:
    """A cell is dropped when its 31-bit random number is below this; whatever the rate, one number is not."""
    return min(round(dropout_p * DROPOUT_RESOLUTION), DROPOUT_RESOLUTION - 1)


def dropout_keep(seed: int | Tensor, heads: int, q_size: int, k_size: int, dropout_p: float, device=None) -> Tensor:
    """The keep bits Z (heads, q_size, k_size) that the kernels draw; `heads` counts b · H + h.

    One Philox call serves the four cells {i, i + 8} x {j, j + 8}: the cells that one thread holds in a
    tensor-core accumulator, whether the tile is computed as Q Kᵀ or as K Qᵀ. The bits depend on
    (seed, b · H + h, i, j) alone, never on tile sizes.
    """
    row = torch.arange(q_size, dtype=torch.int64, device=device)[:, None]
    col = torch.arange(k_size, dtype=torch.int64, device=device)[None, :]
    counter = [
        ((row >> 4) * 8 + (row & 7)).expand(heads, q_size, k_size),
        ((col >> 4) * 8 + (col & 7)).expand(heads, q_size, k_size),
        torch.arange(heads, dtype=torch.int64, device=device)[:, None, None].expand(heads, q_size, k_size),
        torch.zeros(heads, q_size, k_size, dtype=torch.int64, device=device),
    ]
    key = [seed & _LOW32, (seed >> 32) & _LOW32]
    for _ in range(PHILOX_ROUNDS):
        # The product may wrap past 2^63: the bits are the same.
        product_a, product_b = counter[0] * _ROUND[0], counter[2] * _ROUND[1]
        counter = [
            ((product_b >> 32) & _LOW32) ^ counter[1] ^ key[0],
            product_b & _LOW32,
            ((product_a >> 32) & _LOW32) ^ counter[3] ^ key[1],
            product_a & _LOW32,
        ]
        key = [(key[0] + _KEY[0]) & _LOW32, (key[1] + _KEY[1]) & _LOW32]
    odd_row, odd_col = (row >> 3) & 1 == 1, (col >> 3) & 1 == 1
    bits = torch.where(
        odd_row, torch.where(odd_col, counter[3], counter[2]), torch.where(odd_col, counter[1], counter[0])
    )
    return (bits >> 1) >= dropout_threshold(dropout_p)


def visible_cells(keep: Tensor, q_lengths: Tensor | None, k_lengths: Tensor | None, causal: bool = False) -> Tensor:
    """Cells that are kept and exist: bool (B or 1, H or 1, Tq, Tk), True = visible; 1 where all share them.

    keep: (H or 1, Tq, Tk), or (B or 1, H or 1, Tq, Tk) where sentences differ. q_lengths, k_lengths: (B,), valid
    positions from the left. causal: no cell j > i.
    """
    cells = keep if keep.dim() == 4 else keep[None]
    if causal:
        cells = cells.tril()
    if q_lengths is not None:
        rows = torch.arange(keep.size(-2), device=keep.device)
        cells = cells & (rows < q_lengths[:, None])[:, None, :, None]
    if k_lengths is not None:
        cols = torch.arange(keep.size(-1), device=keep.device)
        cells = cells & (cols < k_lengths[:, None])[:, None, None, :]
    return cells


def without_padding(x: Tensor, lengths: Tensor | None) -> Tensor:
    """x (B, H, T, D) with zeros from each length on. Padding may hold NaN, which a probability of 0 does not hide."""
    if lengths is None:
        return x
    return x.masked_fill((torch.arange(x.size(2), device=x.device) >= lengths[:, None])[:, None, :, None], 0)


def laid_out_as(x: Tensor, like: Tensor) -> Tensor:
    """x in the order of memory that torch.empty_like gives to a tensor of its shape; differentiable."""
    strides = torch.empty_like(like).stride()
    return x if x.stride() == strides else x.new_empty_strided(x.shape, strides).copy_(x)  # batched under vmap as x is


def attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keep: Tensor,
    *,
    scale: float,
    q_lengths: Tensor | None = None,
    k_lengths: Tensor | None = None,
    causal: bool = False,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    softmax: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention of q (B, H, Tq, D) over k, v (B, H, Tk, D) under keep (H or 1, Tq, Tk), True = kept,
    or one for each sentence as in `visible_cells`.

    softmax: how probabilities come from scores (B, H, Tq, Tk) that are -inf where a cell is not visible, in place of
        torch.softmax over the keys. What it gives for rows without a visible key is ignored.

    Returns (out (B, H, Tq, D) in the type of q and laid out as q, lse (B, H, Tq), probabilities before dropout
    (B, H, Tq, Tk)), the latter two in float32, or float64 for float64 inputs. Differentiable by autograd through all.
    """
    batch, heads, q_size = q.shape[:3]
    k_size = k.size(2)
    hidden = ~visible_cells(keep, q_lengths, k_lengths, causal)
    k, v, queries = without_padding(k, k_lengths), without_padding(v, k_lengths), without_padding(q, q_lengths)
    accumulate = torch.promote_types(q.dtype, torch.float32)
    scores = torch.matmul(queries, k.transpose(-1, -2)).to(accumulate) * scale
    # Rows without a visible key come out of a softmax as NaN. Filled twice, neither they nor their gradient stay so.
    scores = scores.masked_fill(hidden, -torch.inf)
    probs = (torch.softmax(scores, -1) if softmax is None else softmax(scores)).masked_fill(hidden, 0)
    dropped = probs
    if dropout_p > 0:
        if seed is None:
            raise ValueError(f"dropout_p = {dropout_p} needs a seed, got None")
        bits = dropout_keep(seed, batch * heads, q_size, k_size, dropout_p, q.device).view_as(probs)
        dropped = probs * bits / (1 - dropout_threshold(dropout_p) / DROPOUT_RESOLUTION)
    return laid_out_as(torch.matmul(dropped.to(v.dtype), v), q), torch.logsumexp(scores, -1), probs


def decode_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keep_row: Tensor,
    *,
    scale: float,
    k_lengths: Tensor | None = None,
    block_table: Tensor | None = None,
    cache_starts: Tensor | None = None,
    cache_offsets: Tensor | None = None,
) -> Tensor:
    """One query row per (sentence, beam, head).

    q (B, beam, H, D); caches as in `api.decode_attention`; keep_row (H or 1, S), or (B or 1, H or 1, S) where sentences
    differ, True = kept; k_lengths (B,): valid cache positions. Returns (B, beam, H, D).
    """
    batch, beam, heads, dim = q.shape
    size = keep_row.size(-1)
    if k.dim() <= 3 and k.size(0) == 0:  # an empty pool: a slot that is not read takes its place
        k, v = (x.new_zeros(1, *x.shape[1:]) for x in (k, v))
    if cache_offsets is not None:  # (R, D) -> (B, beam, H, S, D), or (B, H, S, D) with starts
        if block_table is not None:
            index = block_table[:, :, None, :size]
        elif cache_starts is not None:
            index = cache_starts[..., None]
        else:
            raise ValueError("cache_offsets needs block_table or cache_starts")
        index = (index.long() + cache_offsets[:, :size]).clamp(0, k.size(0) - 1)
        k, v = (x[index] for x in (k, v))
    elif block_table is not None:  # (R, H, D) -> (B, beam, H, S, D)
        index = block_table[..., :size].long().clamp(0, k.size(0) - 1)
        k, v = (x[index].transpose(2, 3) for x in (k, v))
    elif cache_starts is not None:  # (R, H, D) -> (B, H, S, D)
        index = cache_starts[:, None].long() + torch.arange(size, device=k.device)
        k, v = (x[index.clamp(0, x.size(0) - 1)].transpose(1, 2) for x in (k, v))
    per_beam = k.dim() == 5  # as sentences of their own; beams that share a cache are queries of one sentence
    if per_beam:
        q = q.flatten(0, 1)[:, :, None]
        k, v = k.flatten(0, 1), v.flatten(0, 1)
        k_lengths = None if k_lengths is None else k_lengths.repeat_interleave(beam)
        keep_row = keep_row.repeat_interleave(beam, 0) if keep_row.dim() == 3 and keep_row.size(0) > 1 else keep_row
    else:
        q = q.transpose(1, 2)
    # What is not read need not have a slot, nor hold numbers.
    k, v = (x[:, :, :size].masked_fill(~keep_row[..., None], 0) for x in (k, v))
    keep = keep_row.unsqueeze(-2).expand(*keep_row.shape[:-1], q.size(2), -1)
    out = attention_reference(q, k, v, keep, scale=scale, k_lengths=k_lengths)[0]
    return out.view(batch, beam, heads, dim) if per_beam else out.transpose(1, 2)


def linear_rows_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    norm: tuple[Tensor, Tensor, float] | None = None,
    activation: str | None = None,
    residual: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return activation(norm(x) · weightᵀ + bias) + residual, and norm(x): see `rows.linear_rows`."""
    if norm is not None:
        x = F.layer_norm(x, x.shape[1:], *norm)
    y = F.linear(x, weight, bias)
    if activation is not None:
        y = getattr(F, activation)(y)
    return y if residual is None else y + residual, x
