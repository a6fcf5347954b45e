"""Eager attention under a keep mask: the definition that the kernels are tested against.

For one head, with S = scale · Q Kᵀ and M the cells that are kept and inside both lengths:

    lse_i = log Σ_{j in M_i} exp S_ij          P_ij = exp(S_ij - lse_i) for j in M_i, else 0
    O_i   = Σ_j Z_ij P_ij V_j / (1 - p)        Z: dropout keep bits (all ones and p = 0 without dropout)

(Vaswani et al., arXiv 1706.03762 §3.2.1; dropout on the probabilities as in §5.4.) A row without a kept
cell has O_i = 0, lse_i = -inf and no gradient. Low precision inputs are multiplied in their own type and
the softmax is taken in float32, as stock fairseq does; float64 inputs stay float64 throughout.
"""

from __future__ import annotations

import torch
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


def visible_cells(
    keep: Tensor, batch: int, heads: int, q_lengths: Tensor | None, k_lengths: Tensor | None, causal: bool
) -> Tensor:
    """Cells that are kept and exist, (batch, heads, Tq, Tk) bool (expanded where nothing depends on a dimension)."""
    q_size, k_size = keep.shape[1:]
    rows = torch.arange(q_size, device=keep.device)
    cols = torch.arange(k_size, device=keep.device)
    cells = keep[None]
    if causal:
        cells = cells & (cols[None, :] <= rows[:, None])
    if q_lengths is not None:
        cells = cells & (rows[None, :] < q_lengths[:, None])[:, None, :, None]
    if k_lengths is not None:
        cells = cells & (cols[None, :] < k_lengths[:, None])[:, None, None, :]
    return cells.expand(batch, heads, q_size, k_size)


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
) -> tuple[Tensor, Tensor]:
    """Attention of q (B, H, Tq, D) over k, v (B, H, Tk, D) under keep (H or 1, Tq, Tk), True = kept.

    Returns (out (B, H, Tq, D) in the type of q, lse (B, H, Tq) in float32, or float64 for float64 inputs).
    Differentiable by autograd through both.
    """
    batch, heads, q_size = q.shape[:3]
    k_size = k.size(2)
    cells = visible_cells(keep, batch, heads, q_lengths, k_lengths, causal)
    if k_lengths is not None:  # padded keys may hold anything, also NaN
        padding = (torch.arange(k_size, device=k.device) >= k_lengths[:, None])[:, None, :, None]
        k, v = k.masked_fill(padding, 0), v.masked_fill(padding, 0)
    if q_lengths is not None:
        padding = (torch.arange(q_size, device=q.device) >= q_lengths[:, None])[:, None, :, None]
        q = q.masked_fill(padding, 0)
    accumulate = torch.promote_types(q.dtype, torch.float32)
    scores = (torch.matmul(q, k.transpose(-1, -2)).to(accumulate) * scale).masked_fill(~cells, -torch.inf)
    # A finite pivot keeps exp() and its gradient free of NaN in rows without a visible key, or without any.
    lowest = scores.new_full((*scores.shape[:3], 1), torch.finfo(accumulate).min)
    pivot = torch.maximum(scores.detach().amax(-1, keepdim=True), lowest) if k_size else lowest
    weights = torch.exp(scores - pivot)
    total = weights.sum(-1, keepdim=True)
    visible = total > 0
    lse = torch.where(visible, pivot + torch.where(visible, total, 1).log(), -torch.inf).squeeze(-1)
    probs = weights / torch.where(visible, total, 1)
    if dropout_p > 0:
        if seed is None:
            raise ValueError(f"dropout_p = {dropout_p} needs a seed, got None")
        bits = dropout_keep(seed, batch * heads, q_size, k_size, dropout_p, q.device).view_as(probs)
        probs = probs * bits / (1 - dropout_threshold(dropout_p) / DROPOUT_RESOLUTION)
    return torch.matmul(probs.to(v.dtype), v), lse


def decode_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keep_row: Tensor,
    *,
    scale: float,
    k_lengths: Tensor | None = None,
    cache_rows: Tensor | None = None,
    cache_starts: Tensor | None = None,
    cache_offsets: Tensor | None = None,
) -> Tensor:
    """One query row per (sentence, beam, head).

    q (B, beam, H, D); caches as in `api.decode_attention`; keep_row (H or 1, S), True = kept; k_lengths (B,):
    valid cache positions. Returns (B, beam, H, D).
    """
    batch, beam, heads, dim = q.shape
    size = keep_row.size(-1)
    if k.dim() <= 3 and k.size(0) == 0:  # an empty pool: a row that is not read takes its place
        k, v = (x.new_zeros(1, *x.shape[1:]) for x in (k, v))
    if cache_offsets is not None:  # (R, D) -> (B, beam, H, S, D), or (B, H, S, D) with starts
        index = cache_starts[..., None] if cache_rows is None else cache_rows[:, :, None, :size]
        index = (index.long() + cache_offsets[:, :size]).clamp(0, k.size(0) - 1)
        k, v = (x[index] for x in (k, v))
    elif cache_rows is not None:  # (R, H, D) -> (B, beam, H, S, D)
        index = cache_rows[..., :size].long().clamp(0, k.size(0) - 1)
        k, v = (x[index].transpose(2, 3) for x in (k, v))
    elif cache_starts is not None:  # (R, H, D) -> (B, H, S, D)
        index = cache_starts[:, None].long() + torch.arange(size, device=k.device)
        k, v = (x[index.clamp(0, x.size(0) - 1)].transpose(1, 2) for x in (k, v))
    if k.dim() == 4:
        k, v = (x.unsqueeze(1).expand(-1, beam, -1, -1, -1) for x in (k, v))
    # What is not read need not have a row, nor hold numbers.
    unread = ~keep_row.expand(batch, 1, -1, size)
    if k_lengths is not None:
        unread = unread | (torch.arange(size, device=k.device) >= k_lengths[:, None, None, None])
    k, v = (x[:, :, :, :size].masked_fill(unread[..., None], 0) for x in (k, v))
    out, _ = attention_reference(
        q.reshape(batch, beam * heads, 1, dim),
        k.reshape(batch, beam * heads, size, dim),
        v.reshape(batch, beam * heads, size, dim),
        keep_row.expand(heads, size).repeat(beam, 1).unsqueeze(1),
        scale=scale,
        k_lengths=k_lengths,
    )
    return out.view(batch, beam, heads, dim)
