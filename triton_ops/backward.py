"""Backward kernels over the tile lists: dq along the query tiles, dk and dv along the key tiles.

With P and Z as in `reference.py` and c = 1 / (1 - p):

    dV = (c Z∘P)ᵀ dO      dP = c Z∘(dO Vᵀ)      δ_i = dO_i · O_i - dlse_i      dS = P∘(dP - δ)
    dQ = scale · dS K     dK = scale · dSᵀ Q

(Dao et al., arXiv 2205.14135, appendix B.4; dlse is the gradient of the log-sum-exp.) Every output
element is written by one program in a fixed order of additions: no atomics, the same bits in every run.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .call import Call
from .config import HOPPER_DKDV, HOPPER_DQ, ceil_div, dkdv_config, dq_config, int32_offsets, power_of_two, precision
from .descriptors import aligned, aligned_row, on_hopper, tile_block
from .launch import Launch, launches_of, strides
from .primitives import (
    LOG2E,
    RUN_TIME,
    any_kept,
    dot,
    dot_add,
    dropout_bits,
    full_positions,
    keep_bits_by_key,
    list_lengths,
    listed_positions,
    load_rows,
    load_tile,
    masked_keys,
    positions,
    sequence_length,
)


@triton.jit
def _dq_step(
    b_dq, b_q, b_do, b_pivot, b_delta, b_k, b_v, m_s, m_z, scale_log2, inverse_keep,
    MASKED: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    b_s = dot(b_q, tl.trans(b_k), PRECISION)  # [BM, BN]
    if MASKED:
        b_s = tl.where(m_s, b_s, float("-inf"))
    b_p = tl.exp2(b_s * scale_log2 - b_pivot)
    b_dp = dot(b_do, tl.trans(b_v), PRECISION)  # [BM, BN]
    if DROPOUT:
        b_dp = tl.where(m_z, b_dp * inverse_keep, 0.0)
    b_ds = b_p * (b_dp - b_delta[:, None])
    return dot_add(b_ds.to(b_k.dtype), b_k, b_dq, PRECISION)


@triton.jit(do_not_specialize=RUN_TIME)
def _dq_kernel(
    p_q, p_k, p_v, p_o, p_do, p_lse, p_dlse, p_dq, p_delta, p_pivot, p_words, p_entries, p_counts,
    p_q_lengths, p_k_lengths, p_seed, p_anchor, d_k, d_v, scale, scale_log2, threshold, inverse_keep,
    s_qb, s_qh, s_qt, s_kb, s_kh, s_kt, s_vb, s_vh, s_vt, s_ob, s_oh, s_ot, s_gb, s_gh, s_gt,
    s_dqb, s_dqh, s_dqt,
    H, MH, TQ, TK, TR, LQ, RS, KW, SLOPE, NO, NI, first_h, first_b,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, G: tl.constexpr, GO: tl.constexpr,
    INT32_OFFSETS: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dQ of BM queries of one head of one sentence, and what the kernel of dK and dV reads of these rows.

    p_o, p_do, p_lse      output, its gradient, log-sum-exp
    p_dlse                gradient of the log-sum-exp, float32 (B, H, TQ), or None
    p_delta               δ, float32 (B, H, TR >= TQ), written
    p_pivot               log2 of what exponentials are divided by, infinity where no key is visible, likewise; or None
    p_entries, p_counts   the query table, with NO query tiles and NI key blocks to a row
    d_k, d_v              descriptors of tiles of K and V, or None
    first_h, first_b      head and sentence of the first program (`config.grids`)
    """
    i_m = (tl.num_programs(0) - 1 - tl.program_id(0)) * BM
    i_h, i_b = first_h + tl.program_id(1), first_b + tl.program_id(2)
    i_bh = i_b * H + i_h
    q_length = sequence_length(p_q_lengths, i_b, TQ)
    k_length = tl.where(i_m < q_length, sequence_length(p_k_lengths, i_b, TK), 0)

    o_m = i_m + tl.arange(0, BM)
    o_m64 = o_m.to(tl.int64)[:, None]
    o_d = tl.arange(0, BD)
    m_d = o_d < D
    m_m = o_m < q_length
    m_md = m_m[:, None] & m_d[None, :]
    i_b64, i_h64 = i_b.to(tl.int64), i_h.to(tl.int64)
    p_k += i_b64 * s_kb + i_h64 * s_kh
    p_v += i_b64 * s_vb + i_h64 * s_vh
    i_mh = tl.where(MH > 1, i_h, 0)
    i_list = (i_mh * NO + i_m // GO).to(tl.int64)
    p_entries += i_list * NI
    p_counts += i_list * (NI + 1)
    p_words += i_mh.to(tl.int64) * KW * LQ
    if INT32_OFFSETS:
        s_vt = s_kt  # equal, and told so the compiler shares the offsets
    if p_anchor is None:
        n_inside, n_full, n_total = list_lengths(p_counts, k_length, G)
    else:
        p_anchor += i_mh
        n_inside, n_full, n_total = 0, 0, (k_length + G - 1) // G
    seed = 0
    if DROPOUT:
        seed = tl.load(p_seed)

    b_q = tl.load(p_q + i_b64 * s_qb + i_h64 * s_qh + o_m64 * s_qt + o_d[None, :], mask=m_md, other=0.0)
    b_do = tl.load(p_do + i_b64 * s_gb + i_h64 * s_gh + o_m64 * s_gt + o_d[None, :], mask=m_md, other=0.0)
    b_o = tl.load(p_o + i_b64 * s_ob + i_h64 * s_oh + o_m64 * s_ot + o_d[None, :], mask=m_md, other=0.0)
    o_row = i_bh.to(tl.int64) * TQ + o_m
    # A row without a visible key has lse = -inf: with +inf in its place all its probabilities are 0.
    b_lse = tl.load(p_lse + o_row, mask=m_m, other=float("-inf")) * LOG2E
    b_lse = tl.where(b_lse == float("-inf"), float("inf"), b_lse)
    o_written = i_bh.to(tl.int64) * TR + o_m
    b_delta = tl.sum(b_o.to(tl.float32) * b_do.to(tl.float32), 1)
    if p_dlse is not None:
        # Not where nothing is visible: -inf has no gradient, and merging parts by logaddexp makes it NaN.
        b_delta -= tl.load(p_dlse + o_row, mask=b_lse < float("inf"), other=0.0)
    tl.store(p_delta + o_written, b_delta, mask=o_m < TQ)
    if p_pivot is not None:
        tl.store(p_pivot + o_written, b_lse, mask=o_m < TQ)

    b_dq = tl.zeros([BM, BD], dtype=tl.float32)
    if p_anchor is None:
        for i in range((n_inside * G + BN - 1) // BN):
            start, o_x, m_n = full_positions(p_entries, i, n_inside, BN, G)
            b_k = load_tile(d_k, i_b, i_h, p_k, s_kt, start, o_x, INT32_OFFSETS, BN, G, D, BD)  # [BN, BD]
            b_v = load_tile(d_v, i_b, i_h, p_v, s_vt, start, o_x, INT32_OFFSETS, BN, G, D, BD)  # [BN, BD]
            m_z = m_m
            if DROPOUT:
                m_z = dropout_bits(seed, i_bh, o_m[:, None], (start + o_x)[None, :], threshold)
            b_pivot = b_lse[:, None]
            if BN > G:
                b_pivot = tl.where(m_n[None, :], b_pivot, float("inf"))
            b_dq = _dq_step(
                b_dq, b_q, b_do, b_pivot, b_delta, b_k, b_v, m_m, m_z, scale_log2, inverse_keep,
                False, DROPOUT, PRECISION,
            )  # fmt: skip
    for first in tl.range(n_inside * G, n_total * G, BN, num_stages=1):
        start, o_x, m_n, m_s = masked_keys(
            p_words, p_anchor, p_entries, first, o_m, m_m, n_full, n_total, k_length, NI, KW, LQ, RS, SLOPE, BN, G
        )
        some = True
        if p_anchor is not None:
            some = any_kept(m_s)
        if some:
            b_k = load_rows(p_k, s_kt, start, o_x, m_n, INT32_OFFSETS, G, D, BD)
            b_v = load_rows(p_v, s_vt, start, o_x, m_n, INT32_OFFSETS, G, D, BD)
            m_z = m_m
            if DROPOUT:
                m_z = dropout_bits(seed, i_bh, o_m[:, None], (start + o_x)[None, :], threshold)
            b_dq = _dq_step(
                b_dq, b_q, b_do, b_lse[:, None], b_delta, b_k, b_v, m_s, m_z, scale_log2, inverse_keep,
                True, DROPOUT, PRECISION,
            )  # fmt: skip
    p_dq += i_b64 * s_dqb + i_h64 * s_dqh
    p_row = p_dq + o_m64 * s_dqt + o_d[None, :]
    tl.store(p_row, (b_dq * scale).to(p_dq.dtype.element_ty), mask=(o_m < TQ)[:, None] & m_d[None, :])


@triton.jit
def _dkdv_step(
    b_dk, b_dv, b_k, b_v, b_q, b_do, b_lse, b_delta, m_s, m_z, scale_log2, inverse_keep,
    MASKED: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    b_lse = b_lse * LOG2E
    b_lse = tl.where(b_lse == float("-inf"), float("inf"), b_lse)
    b_s = dot(b_q, tl.trans(b_k), PRECISION)  # [BM, BN]
    if MASKED:
        b_s = tl.where(m_s, b_s, float("-inf"))
    b_p = tl.exp2(b_s * scale_log2 - b_lse[:, None])
    b_dp = dot(b_do, tl.trans(b_v), PRECISION)  # [BM, BN]
    b_pz = b_p
    if DROPOUT:
        b_pz = tl.where(m_z, b_p, 0.0)  # c is applied to dV once, after the loop
        b_dp = tl.where(m_z, b_dp * inverse_keep, 0.0)
    b_dv = dot_add(tl.trans(b_pz.to(b_do.dtype)), b_do, b_dv, PRECISION)
    b_ds = b_p * (b_dp - b_delta[:, None])
    b_dk = dot_add(tl.trans(b_ds.to(b_q.dtype)), b_q, b_dk, PRECISION)
    return b_dk, b_dv


@triton.jit(do_not_specialize=RUN_TIME)
def _dkdv_kernel(
    p_q, p_k, p_v, p_do, p_lse, p_delta, p_dk, p_dv, p_words, p_entries, p_counts,
    p_q_lengths, p_k_lengths, p_seed, p_anchor, d_q, d_do, scale, scale_log2, threshold, inverse_keep,
    s_qb, s_qh, s_qt, s_kb, s_kh, s_kt, s_vb, s_vh, s_vt, s_gb, s_gh, s_gt,
    s_dkb, s_dkh, s_dkt, s_dvb, s_dvh, s_dvt,
    H, MH, TQ, TK, LQ, RS, KW, SLOPE, NO, NI, first_h, first_b,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, G: tl.constexpr, GO: tl.constexpr,
    INT32_OFFSETS: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dK and dV of BN keys of one head of one sentence; after `_dq_kernel`, which writes δ.

    p_do, p_lse, p_delta  gradient of the output; log-sum-exp and δ, float32 (B, H, TQ)
    p_entries, p_counts   the key table, with NO key tiles and NI query blocks to a row
    d_q, d_do             descriptors of tiles of Q and dO, or None
    first_h, first_b      head and sentence of the first program (`config.grids`)
    """
    i_n = tl.program_id(0) * BN
    i_h, i_b = first_h + tl.program_id(1), first_b + tl.program_id(2)
    i_bh = i_b * H + i_h
    k_length = sequence_length(p_k_lengths, i_b, TK)
    # A tile of padded keys visits no query and writes zeros.
    q_length = tl.where(i_n < k_length, sequence_length(p_q_lengths, i_b, TQ), 0)

    o_n = i_n + tl.arange(0, BN)
    o_n64 = o_n.to(tl.int64)[:, None]
    o_d = tl.arange(0, BD)
    m_d = o_d < D
    m_n = o_n < k_length
    m_nd = m_n[:, None] & m_d[None, :]
    i_b64, i_h64 = i_b.to(tl.int64), i_h.to(tl.int64)
    p_q += i_b64 * s_qb + i_h64 * s_qh
    p_do += i_b64 * s_gb + i_h64 * s_gh
    p_lse += i_bh.to(tl.int64) * TQ
    p_delta += i_bh.to(tl.int64) * TQ
    i_mh = tl.where(MH > 1, i_h, 0)
    i_list = (i_mh * NO + i_n // GO).to(tl.int64)
    p_entries += i_list * NI
    p_counts += i_list * (NI + 1)
    p_words += i_mh.to(tl.int64) * KW * LQ
    if INT32_OFFSETS:
        s_gt = s_qt  # equal, and told so the compiler shares the offsets
    if p_anchor is None:
        n_inside, n_full, n_total = list_lengths(p_counts, q_length, G)
    else:
        p_anchor += i_mh
        n_inside, n_total = 0, (q_length + G - 1) // G
    seed = 0
    if DROPOUT:
        seed = tl.load(p_seed)

    b_k = tl.load(p_k + i_b64 * s_kb + i_h64 * s_kh + o_n64 * s_kt + o_d[None, :], mask=m_nd, other=0.0)
    b_v = tl.load(p_v + i_b64 * s_vb + i_h64 * s_vh + o_n64 * s_vt + o_d[None, :], mask=m_nd, other=0.0)
    b_dk = tl.zeros([BN, BD], dtype=tl.float32)
    b_dv = tl.zeros([BN, BD], dtype=tl.float32)

    if p_anchor is None:
        for i in range((n_inside * G + BM - 1) // BM):
            start, o_x, m_m = full_positions(p_entries, i, n_inside, BM, G)
            b_q = load_tile(d_q, i_b, i_h, p_q, s_qt, start, o_x, INT32_OFFSETS, BM, G, D, BD)  # [BM, BD]
            b_do = load_tile(d_do, i_b, i_h, p_do, s_gt, start, o_x, INT32_OFFSETS, BM, G, D, BD)  # [BM, BD]
            b_lse, b_delta = tl.load(p_lse + start + o_x), tl.load(p_delta + start + o_x)
            if BM > G:
                b_lse = tl.where(m_m, b_lse, float("-inf"))
            m_z = m_n
            if DROPOUT:
                m_z = dropout_bits(seed, i_bh, (start + o_x)[:, None], o_n[None, :], threshold)
            b_dk, b_dv = _dkdv_step(
                b_dk, b_dv, b_k, b_v, b_q, b_do, b_lse, b_delta, m_n, m_z, scale_log2, inverse_keep,
                False, DROPOUT, PRECISION,
            )  # fmt: skip
    for first in tl.range(n_inside * G, n_total * G, BM, num_stages=1):
        some = True
        if p_anchor is not None:
            start, o_x, m_m = positions(first, q_length, BM)
        else:
            start, o_x, m_m = listed_positions(p_entries, first, n_full, n_total, q_length, NI, BM, G)
        o_m = start + o_x
        m_s = keep_bits_by_key(p_words, p_anchor, i_n, o_m, m_m, k_length, KW, LQ, RS, SLOPE, BN)
        if p_anchor is not None:
            some = any_kept(m_s)
        if some:
            b_q = load_rows(p_q, s_qt, start, o_x, m_m, INT32_OFFSETS, G, D, BD)
            b_do = load_rows(p_do, s_gt, start, o_x, m_m, INT32_OFFSETS, G, D, BD)
            b_lse = tl.load(p_lse + o_m, mask=m_m, other=float("-inf"))
            b_delta = tl.load(p_delta + o_m, mask=m_m, other=0.0)
            m_z = m_n
            if DROPOUT:
                m_z = dropout_bits(seed, i_bh, o_m[:, None], o_n[None, :], threshold)
            b_dk, b_dv = _dkdv_step(
                b_dk, b_dv, b_k, b_v, b_q, b_do, b_lse, b_delta, m_s, m_z, scale_log2, inverse_keep,
                True, DROPOUT, PRECISION,
            )  # fmt: skip
    # Padded keys that share a tile with the last key were computed along: their gradient is 0.
    b_dk = tl.where(m_n[:, None], b_dk * scale, 0.0)
    b_dv = tl.where(m_n[:, None], b_dv * inverse_keep, 0.0)
    m_row = (o_n < TK)[:, None] & m_d[None, :]
    p_dk += i_b64 * s_dkb + i_h64 * s_dkh
    p_dv += i_b64 * s_dvb + i_h64 * s_dvh
    tl.store(p_dk + o_n64 * s_dkt + o_d[None, :], b_dk.to(p_dk.dtype.element_ty), mask=m_row)
    tl.store(p_dv + o_n64 * s_dvt + o_d[None, :], b_dv.to(p_dv.dtype.element_ty), mask=m_row)


def _block(a: Tensor, b: Tensor, step: int, inner: int) -> list[int] | None:
    """As `descriptors.tile_block`, but for blocks of 32 rows: pointers are faster there by 3% (on an H100)."""
    return tile_block(a, b, step, inner) if inner >= 64 else None


def _numbers(q: Tensor, k: Tensor, v: Tensor, grad_out: Tensor, call: Call) -> dict[str, Any]:
    """Return the arguments of both kernels that are no tensors."""
    return dict(
        **strides(q=q, k=k, v=v, g=grad_out), H=q.size(1), TQ=q.size(2), TK=k.size(2), scale=call.scale,
        D=q.size(3), BD=power_of_two(q.size(3)), PRECISION=precision(q.dtype), **call.numbers(),
    )  # fmt: skip


def _dkdv_launches(
    q: Tensor, k: Tensor, v: Tensor, grad_out: Tensor, dk: Tensor, dv: Tensor, call: Call
) -> list[Launch]:
    """Of the kernel of dK and dV."""
    counted = q.size(0) * q.size(1) * aligned_row(q.size(2))  # in int32
    if counted < 2**31 and on_hopper(call, HOPPER_DKDV, (q, grad_out), (k, v), (dk, dv)):
        from . import hopper_dkdv  # needs Gluon, which is not in triton before 3.6

        return hopper_dkdv.launches(q, k, call)
    keys = call.key_table()
    config = dkdv_config(keys, q.size(3), q.dtype)
    numbers = dict(
        **strides(dk=dk, dv=dv), NO=keys.entries.size(1), NI=keys.entries.size(2),
        BM=config.block_q, BN=config.block_k, G=keys.inner, GO=keys.outer,
        INT32_OFFSETS=int32_offsets(q, grad_out), **_numbers(q, k, v, grad_out, call),
    )  # fmt: skip
    blocks = dict.fromkeys(("d_q", "d_do"), _block(q, grad_out, config.block_q, keys.inner))
    n_tiles = ceil_div(k.size(2), config.block_k)
    return launches_of(_dkdv_kernel, n_tiles, q.size(1), q.size(0), numbers, config, blocks)


def _dq_launches(
    q: Tensor, k: Tensor, v: Tensor, grad_out: Tensor, out: Tensor, dq: Tensor, row: int, call: Call
) -> list[Launch]:
    """Of the kernel of dQ; *row* is the length of the rows of δ that it writes."""
    if on_hopper(call, HOPPER_DQ, (q, grad_out), (k, v), (out, dq)):
        from . import hopper_dq  # likewise

        return hopper_dq.launches(q, k, row, call)
    queries = call.query_table()
    config = dq_config(queries, q.size(3), q.dtype)
    numbers = dict(
        **strides(o=out, dq=dq), TR=row, NO=queries.entries.size(1), NI=queries.entries.size(2),
        BM=config.block_q, BN=config.block_k, G=queries.inner, GO=queries.outer,
        INT32_OFFSETS=int32_offsets(k, v), **_numbers(q, k, v, grad_out, call),
    )  # fmt: skip
    blocks = dict.fromkeys(("d_k", "d_v"), _block(k, v, config.block_k, queries.inner))
    n_tiles = ceil_div(q.size(2), config.block_q)
    return launches_of(_dq_kernel, n_tiles, q.size(1), q.size(0), numbers, config, blocks)


def backward(
    grad_out: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, call: Call
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch the backward kernels. Returns (dq, dk, dv), laid out in memory as q, k and v."""
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    queries, keys = call.query_table(), call.key_table()

    # The kernel of dK and dV is chosen first, as what it reads decides what that of dQ writes. It runs last.
    at_16_bytes = aligned(k, v), aligned(q, grad_out)
    for_dkdv = call.launches(
        ("dkdv", *at_16_bytes), lambda: _dkdv_launches(q, k, v, grad_out, dk, dv, call), q, k, v, grad_out
    )
    pivot: Tensor | None = None
    if for_dkdv[0].kernel is _dkdv_kernel:
        delta = torch.empty_like(lse)
    else:  # in Gluon: it reads tiles of both
        delta, pivot = lse.new_empty(2, *q.shape[:2], aligned_row(q.size(2))).unbind()

    lists = dict(p_words=call.words, p_entries=queries.entries, p_counts=queries.counts)
    lengths = dict(p_q_lengths=call.q_lengths, p_k_lengths=call.k_lengths)
    kind = "dq", *at_16_bytes, aligned(out), grad_lse is None, pivot is None
    for launch in call.launches(
        kind, lambda: _dq_launches(q, k, v, grad_out, out, dq, delta.size(2), call), q, k, v, grad_out, out
    ):
        if launch.kernel is _dq_kernel:
            launch(
                p_q=q, p_k=k, p_v=v, p_o=out, p_do=grad_out, p_lse=lse, p_dlse=grad_lse, p_dq=dq, p_delta=delta,
                p_pivot=pivot, **lists, **call.tensors(), d_k=k, d_v=v,
            )  # fmt: skip
        else:
            launch(
                p_lse=lse, p_dlse=grad_lse, p_delta=delta, p_pivot=pivot, **lists, **lengths,
                d_q=q, d_k=k, d_v=v, d_o=out, d_do=grad_out, d_dq=dq,
            )  # fmt: skip

    lists = dict(p_words=call.words, p_entries=keys.entries, p_counts=keys.counts)
    for launch in for_dkdv:
        if pivot is None:
            launch(
                p_q=q, p_k=k, p_v=v, p_do=grad_out, p_lse=lse, p_delta=delta, p_dk=dk, p_dv=dv,
                **lists, **call.tensors(), d_q=q, d_do=grad_out,
            )  # fmt: skip
        else:
            launch(
                **lists, **lengths, d_q=q, d_k=k, d_v=v,
                d_do=grad_out, d_dk=dk, d_dv=dv, d_pivot=pivot.view(-1), d_delta=delta.view(-1),
            )  # fmt: skip
    return dq, dk, dv
