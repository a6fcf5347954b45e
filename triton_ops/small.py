"""Sentences: one program computes whole rows of scores, and one program the whole backward pass of a head.

At these sizes a call is bound by launches and dependent loads, not by arithmetic. Tile lists would only
add latency: the keep bits are loaded together with Q, K and V, there is no loop, and the backward pass
needs one launch, recomputing the probabilities from Q and K alone; where the largest tile is twice as long as a
sentence, that computes it in a smaller one.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .call import Call
from .config import (
    SMALL_BYTES,
    SMALL_TILES,
    ceil_div,
    power_of_two,
    precision,
    small_backward_config,
    small_forward_config,
)
from .launch import Launch, strides
from .primitives import LN2, NO_KEY, dot, dropout_bits, keep_bits_by_key, sequence_length


@triton.jit
def _row_scores(
    p_q, p_k, p_words, p_anchor, o_m, o_n, m_md, m_nd, m_m, k_length, s_qt, s_kt, o_d, KW, LQ, RS, SLOPE, scale_log2,
    BN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """(Q, K, masked scores in base-2 units, pivot of each row)."""
    b_q = tl.load(p_q + o_m.to(tl.int64)[:, None] * s_qt + o_d[None, :], mask=m_md, other=0.0)
    b_k = tl.load(p_k + o_n.to(tl.int64)[:, None] * s_kt + o_d[None, :], mask=m_nd, other=0.0)
    m_s = keep_bits_by_key(p_words, p_anchor, 0, o_m, m_m, k_length, KW, LQ, RS, SLOPE, BN)
    b_s = dot(b_q, tl.trans(b_k), PRECISION) * scale_log2  # [BM, BN]
    b_s = tl.where(m_s, b_s, float("-inf"))
    return b_q, b_k, b_s, tl.maximum(tl.max(b_s, 1), NO_KEY)


@triton.jit(do_not_specialize=["H", "MH", "TQ", "TK", "LQ", "RS", "KW", "SLOPE", "n_tiles", "threshold"])
def _small_forward_kernel(
    p_q, p_k, p_v, p_o, p_lse, p_words, p_q_lengths, p_k_lengths, p_seed, p_anchor,
    scale_log2, threshold, inverse_keep,
    s_qb, s_qh, s_qt, s_kb, s_kh, s_kt, s_vb, s_vh, s_vt, s_ob, s_oh, s_ot,
    H, MH, TQ, TK, LQ, RS, KW, SLOPE, n_tiles,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """O and the log-sum-exp of BM queries of one head of one sentence, whose keys are BN at most.

    p_o, p_lse            written: output, laid out by its own strides, and float32 (B, H, TQ)
    n_tiles               programs of a head
    """
    i_m = (tl.program_id(0) % n_tiles) * BM
    i_bh = tl.program_id(0) // n_tiles
    i_b, i_h = i_bh // H, i_bh % H
    i_b64, i_h64 = i_b.to(tl.int64), i_h.to(tl.int64)
    q_length = sequence_length(p_q_lengths, i_b, TQ)
    k_length = sequence_length(p_k_lengths, i_b, TK)
    o_m, o_n, o_d = i_m + tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, BD)
    m_d = o_d < D
    m_m, m_n = o_m < q_length, o_n < k_length
    m_nd = m_n[:, None] & m_d[None, :]

    i_mh = tl.where(MH > 1, i_h, 0)
    if p_anchor is not None:
        p_anchor += i_mh
    p_v += i_b64 * s_vb + i_h64 * s_vh
    b_v = tl.load(p_v + o_n.to(tl.int64)[:, None] * s_vt + o_d[None, :], mask=m_nd, other=0.0)
    b_q, b_k, b_s, b_m = _row_scores(
        p_q + i_b64 * s_qb + i_h64 * s_qh, p_k + i_b64 * s_kb + i_h64 * s_kh,
        p_words + i_mh.to(tl.int64) * KW * LQ, p_anchor, o_m, o_n, m_m[:, None] & m_d[None, :], m_nd, m_m,
        k_length, s_qt, s_kt, o_d, KW, LQ, RS, SLOPE, scale_log2, BN, PRECISION,
    )  # fmt: skip
    b_p = tl.exp2(b_s - b_m[:, None])
    b_l = tl.sum(b_p, 1)
    if DROPOUT:
        b_p = tl.where(dropout_bits(tl.load(p_seed), i_bh, o_m[:, None], o_n[None, :], threshold), b_p, 0.0)
    b_o = dot(b_p.to(b_v.dtype), b_v, PRECISION)  # [BM, BD]

    m_seen = b_l > 0
    b_l = tl.where(m_seen, b_l, 1.0)
    b_o = b_o * (inverse_keep / b_l)[:, None]
    b_lse = tl.where(m_seen, (b_m + tl.log2(b_l)) * LN2, float("-inf"))
    p_row = p_o + i_b64 * s_ob + i_h64 * s_oh + o_m.to(tl.int64)[:, None] * s_ot + o_d[None, :]
    tl.store(p_row, b_o.to(p_o.dtype.element_ty), mask=(o_m < TQ)[:, None] & m_d[None, :])
    tl.store(p_lse + i_bh.to(tl.int64) * TQ + o_m, b_lse, mask=o_m < TQ)


@triton.jit
def _head_backward(
    p_q, p_k, p_v, p_do, p_dlse, p_dq, p_dk, p_dv, p_words, p_seed, p_anchor,
    scale, scale_log2, threshold, inverse_keep, s_qt, s_kt, s_vt, s_gt, s_dqt, s_dkt, s_dvt,
    i_bh, q_length, k_length, TQ, TK, LQ, RS, KW, SLOPE,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of the first BM queries and BN keys of one head, which pointers and strides belong to."""
    o_m, o_n, o_d = tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, BD)
    o_m64, o_n64 = o_m.to(tl.int64)[:, None], o_n.to(tl.int64)[:, None]
    m_d = o_d < D
    m_m, m_n = o_m < q_length, o_n < k_length
    m_md, m_nd = m_m[:, None] & m_d[None, :], m_n[:, None] & m_d[None, :]

    b_do = tl.load(p_do + o_m64 * s_gt + o_d[None, :], mask=m_md, other=0.0)
    b_v = tl.load(p_v + o_n64 * s_vt + o_d[None, :], mask=m_nd, other=0.0)
    b_q, b_k, b_s, b_m = _row_scores(
        p_q, p_k, p_words, p_anchor, o_m, o_n, m_md, m_nd, m_m, k_length, s_qt, s_kt, o_d, KW, LQ, RS, SLOPE,
        scale_log2, BN, PRECISION,
    )  # fmt: skip
    b_p = tl.exp2(b_s - b_m[:, None])
    b_l = tl.sum(b_p, 1)
    b_p = b_p * (1.0 / tl.where(b_l > 0, b_l, 1.0))[:, None]
    b_dp = dot(b_do, tl.trans(b_v), PRECISION)  # [BM, BN]
    b_pz = b_p
    if DROPOUT:
        m_z = dropout_bits(tl.load(p_seed), i_bh, o_m[:, None], o_n[None, :], threshold)
        b_pz = tl.where(m_z, b_p * inverse_keep, 0.0)
        b_dp = tl.where(m_z, b_dp * inverse_keep, 0.0)
    b_dv = dot(tl.trans(b_pz.to(b_do.dtype)), b_do, PRECISION)  # [BN, BD]
    m_row = (o_n < TK)[:, None] & m_d[None, :]
    tl.store(p_dv + o_n64 * s_dvt + o_d[None, :], b_dv.to(p_dv.dtype.element_ty), mask=m_row)

    b_delta = tl.sum(b_p * b_dp, 1)  # = dO · O: the whole row is here
    if p_dlse is not None:
        # Not where nothing is visible: -inf has no gradient, and merging parts by logaddexp makes it NaN.
        b_delta -= tl.load(p_dlse + i_bh.to(tl.int64) * TQ + o_m, mask=b_l > 0, other=0.0)
    b_ds = (b_p * (b_dp - b_delta[:, None]) * scale).to(b_q.dtype)
    b_dq = dot(b_ds, b_k, PRECISION)
    b_dk = dot(tl.trans(b_ds), b_q, PRECISION)
    tl.store(p_dk + o_n64 * s_dkt + o_d[None, :], b_dk.to(p_dk.dtype.element_ty), mask=m_row)
    m_row = (o_m < TQ)[:, None] & m_d[None, :]
    tl.store(p_dq + o_m64 * s_dqt + o_d[None, :], b_dq.to(p_dq.dtype.element_ty), mask=m_row)


@triton.jit
def _zero_rows(p_x, first, end, stride, N: tl.constexpr, D: tl.constexpr, BD: tl.constexpr):
    """Write 0 to rows first ... end - 1, at most N."""
    o_x, o_d = first + tl.arange(0, N), tl.arange(0, BD)
    b_zero = tl.zeros([N, BD], dtype=p_x.dtype.element_ty)
    tl.store(
        p_x + o_x.to(tl.int64)[:, None] * stride + o_d[None, :], b_zero, mask=(o_x < end)[:, None] & (o_d < D)[None, :]
    )


@triton.jit(do_not_specialize=["H", "MH", "TQ", "TK", "LQ", "RS", "KW", "SLOPE", "threshold"])
def _small_backward_kernel(
    p_q, p_k, p_v, p_do, p_dlse, p_dq, p_dk, p_dv, p_words, p_q_lengths, p_k_lengths, p_seed, p_anchor,
    scale, scale_log2, threshold, inverse_keep,
    s_qb, s_qh, s_qt, s_kb, s_kh, s_kt, s_vb, s_vh, s_vt, s_gb, s_gh, s_gt,
    s_dqb, s_dqh, s_dqt, s_dkb, s_dkh, s_dkt, s_dvb, s_dvh, s_dvt,
    H, MH, TQ, TK, LQ, RS, KW, SLOPE,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dQ, dK and dV of one head of one sentence, of BM queries and BN keys at most.

    p_do                  gradient of the output
    p_dlse                gradient of the log-sum-exp, float32 (B, H, TQ), or None
    """
    i_bh = tl.program_id(0)
    i_b, i_h = i_bh // H, i_bh % H
    i_b64, i_h64 = i_b.to(tl.int64), i_h.to(tl.int64)
    q_length = sequence_length(p_q_lengths, i_b, TQ)
    k_length = sequence_length(p_k_lengths, i_b, TK)
    p_q += i_b64 * s_qb + i_h64 * s_qh
    p_k += i_b64 * s_kb + i_h64 * s_kh
    p_v += i_b64 * s_vb + i_h64 * s_vh
    p_do += i_b64 * s_gb + i_h64 * s_gh
    p_dq += i_b64 * s_dqb + i_h64 * s_dqh
    p_dk += i_b64 * s_dkb + i_h64 * s_dkh
    p_dv += i_b64 * s_dvb + i_h64 * s_dvh
    i_mh = tl.where(MH > 1, i_h, 0)
    p_words += i_mh.to(tl.int64) * KW * LQ
    if p_anchor is not None:
        p_anchor += i_mh

    if BM >= 128 and q_length <= BM // 2 and k_length <= BN // 2:  # a quarter of the work
        _head_backward(
            p_q, p_k, p_v, p_do, p_dlse, p_dq, p_dk, p_dv, p_words, p_seed, p_anchor,
            scale, scale_log2, threshold, inverse_keep, s_qt, s_kt, s_vt, s_gt, s_dqt, s_dkt, s_dvt,
            i_bh, q_length, k_length, TQ, TK, LQ, RS, KW, SLOPE,
            D, BD, BM // 2, BN // 2, DROPOUT, PRECISION,
        )  # fmt: skip
        _zero_rows(p_dq, BM // 2, TQ, s_dqt, BM // 2, D, BD)
        _zero_rows(p_dk, BN // 2, TK, s_dkt, BN // 2, D, BD)
        _zero_rows(p_dv, BN // 2, TK, s_dvt, BN // 2, D, BD)
    else:
        _head_backward(
            p_q, p_k, p_v, p_do, p_dlse, p_dq, p_dk, p_dv, p_words, p_seed, p_anchor,
            scale, scale_log2, threshold, inverse_keep, s_qt, s_kt, s_vt, s_gt, s_dqt, s_dkt, s_dvt,
            i_bh, q_length, k_length, TQ, TK, LQ, RS, KW, SLOPE,
            D, BD, BM, BN, DROPOUT, PRECISION,
        )  # fmt: skip


def small_size(q_size: int, k_size: int, dim: int, dtype: torch.dtype) -> int | None:
    """Tile size of the small kernels for these shapes, or None where the tile lists are used.

    A power of two, so that lengths share few compiled variants; bounded by what fits in shared memory.
    """
    for tile in SMALL_TILES:
        if max(q_size, k_size) <= tile:
            fits = tile * power_of_two(dim) * dtype.itemsize <= SMALL_BYTES
            return tile if fits else None
    return None


def small_forward(q: Tensor, k: Tensor, v: Tensor, tile: int, call: Call) -> tuple[Tensor, Tensor]:
    """As `forward.forward`, for sizes up to `tile`."""
    batch, heads, q_size, dim = q.shape
    out = torch.empty_like(q)
    lse = torch.empty(batch, heads, q_size, dtype=torch.float32, device=q.device)

    def build() -> list[Launch]:
        config = small_forward_config(tile, q.dtype)
        n_tiles = ceil_div(q_size, config.block_q)
        numbers = dict(
            **strides(q=q, k=k, v=v, o=out),
            H=heads, TQ=q_size, TK=k.size(2), n_tiles=n_tiles,
            D=dim, BD=power_of_two(dim), BM=config.block_q, BN=config.block_k, PRECISION=precision(q.dtype),
            **call.numbers(),
        )  # fmt: skip
        return [Launch(_small_forward_kernel, (n_tiles * batch * heads, 1, 1), numbers, config)]

    for launch in call.launches(("small forward",), build, q, k, v):
        launch(p_q=q, p_k=k, p_v=v, p_o=out, p_lse=lse, p_words=call.words, **call.tensors())
    return out, lse


def small_backward(
    grad_out: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, tile: int, call: Call
) -> tuple[Tensor, Tensor, Tensor]:
    """As `backward.backward`, for sizes up to `tile`."""
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)

    def build() -> list[Launch]:
        batch, heads, q_size, dim = q.shape
        config = small_backward_config(tile, q.dtype)
        numbers = dict(
            **strides(q=q, k=k, v=v, g=grad_out, dq=dq, dk=dk, dv=dv),
            H=heads, TQ=q_size, TK=k.size(2), scale=call.scale,
            D=dim, BD=power_of_two(dim), BM=config.block_q, BN=config.block_k, PRECISION=precision(q.dtype),
            **call.numbers(),
        )  # fmt: skip
        return [Launch(_small_backward_kernel, (batch * heads, 1, 1), numbers, config)]

    for launch in call.launches(("small backward", grad_lse is None), build, q, k, v, grad_out):
        launch(
            p_q=q, p_k=k, p_v=v, p_do=grad_out, p_dlse=grad_lse, p_dq=dq, p_dk=dk, p_dv=dv, p_words=call.words,
            **call.tensors(),
        )  # fmt: skip
    return dq, dk, dv
