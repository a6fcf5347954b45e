"""Forward kernel over the tile lists, and its launcher."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .call import Call
from .config import HOPPER_FORWARD, ceil_div, forward_config, int32_offsets, power_of_two, precision
from .descriptors import aligned, on_hopper, tile_block
from .launch import Launch, launches_of, strides
from .primitives import (
    LN2,
    NO_KEY,
    RUN_TIME,
    any_kept,
    dot,
    dot_add,
    dropout_bits,
    full_positions,
    list_lengths,
    load_rows,
    load_tile,
    masked_keys,
    sequence_length,
)


@triton.jit(do_not_specialize=RUN_TIME)
def _forward_kernel(
    p_q, p_k, p_v, p_o, p_lse, p_words, p_entries, p_counts, p_q_lengths, p_k_lengths, p_seed, p_anchor,
    d_k, d_v, scale_log2, threshold, inverse_keep,
    s_qb, s_qh, s_qt, s_kb, s_kh, s_kt, s_vb, s_vh, s_vt, s_ob, s_oh, s_ot,
    H, MH, TQ, TK, LQ, RS, KW, SLOPE, NO, NI, first_h, first_b,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, G: tl.constexpr, GO: tl.constexpr,
    INT32_OFFSETS: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """O and the log-sum-exp of BM queries of one head of one sentence.

    p_o, p_lse            written: output, laid out by its own strides, and float32 (B, H, TQ)
    p_entries, p_counts   the query table, with NO query tiles and NI key blocks to a row
    d_k, d_v              descriptors of tiles of K and V (`descriptors.tile_block`), or None: by pointers
    first_h, first_b      head and sentence of the first program (`config.grids`)
    """
    # The last tiles first: under a causal mask they are the longest, and long programs should not start last.
    i_m = (tl.num_programs(0) - 1 - tl.program_id(0)) * BM
    i_h, i_b = first_h + tl.program_id(1), first_b + tl.program_id(2)
    i_bh = i_b * H + i_h
    q_length = sequence_length(p_q_lengths, i_b, TQ)
    # A tile of padded rows visits no key and writes zeros.
    k_length = tl.where(i_m < q_length, sequence_length(p_k_lengths, i_b, TK), 0)

    o_m = i_m + tl.arange(0, BM)
    o_d = tl.arange(0, BD)
    m_d = o_d < D
    m_m = o_m < q_length
    p_q += i_b.to(tl.int64) * s_qb + i_h.to(tl.int64) * s_qh
    p_k += i_b.to(tl.int64) * s_kb + i_h.to(tl.int64) * s_kh
    p_v += i_b.to(tl.int64) * s_vb + i_h.to(tl.int64) * s_vh
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
    if DROPOUT:
        seed = tl.load(p_seed)

    b_q = tl.load(p_q + o_m.to(tl.int64)[:, None] * s_qt + o_d[None, :], mask=m_m[:, None] & m_d[None, :], other=0.0)
    b_o = tl.zeros([BM, BD], dtype=tl.float32)
    b_l = tl.zeros([BM, 8], dtype=tl.float32)  # sums of every eighth key: a thread adds up those that it holds
    b_m = tl.full([BM], NO_KEY, dtype=tl.float32)

    if p_anchor is None:
        # Where a step begins is read a step ahead, so that its keys and values are asked for without waiting for that.
        next_start, o_x, next_m = full_positions(p_entries, 0, n_inside, BN, G)
        for i in range((n_inside * G + BN - 1) // BN):
            start, m_n = next_start, next_m
            next_start, o_x, next_m = full_positions(p_entries, i + 1, n_inside, BN, G)
            b_k = load_tile(d_k, i_b, i_h, p_k, s_kt, start, o_x, INT32_OFFSETS, BN, G, D, BD)  # [BN, BD]
            b_s = dot(b_q, tl.trans(b_k), PRECISION)  # [BM, BN]
            b_new = tl.maximum(b_m, tl.max(b_s, 1) * scale_log2)
            b_pivot = b_new[:, None]
            if BN > G:  # a block that is there twice does not change the maximum; the second time it must not count
                b_pivot = tl.where(m_n[None, :], b_pivot, float("inf"))
            b_p = tl.exp2(b_s * scale_log2 - b_pivot)
            b_a = tl.exp2(b_m - b_new)
            b_l = b_l * b_a[:, None] + tl.sum(b_p.reshape([BM, BN // 8, 8]), 1)
            b_m = b_new
            if DROPOUT:
                b_p = tl.where(dropout_bits(seed, i_bh, o_m[:, None], (start + o_x)[None, :], threshold), b_p, 0.0)
            b_v = load_tile(d_v, i_b, i_h, p_v, s_vt, start, o_x, INT32_OFFSETS, BN, G, D, BD)  # [BN, BD]
            b_o = dot_add(b_p.to(b_v.dtype), b_v, b_o * b_a[:, None], PRECISION)

    # What is left: full blocks that reach past the last key, and partial blocks. Of a mask of offsets: everything.
    for first in tl.range(n_inside * G, n_total * G, BN, num_stages=1):
        start, o_x, m_n, m_s = masked_keys(
            p_words, p_anchor, p_entries, first, o_m, m_m, n_full, n_total, k_length, NI, KW, LQ, RS, SLOPE, BN, G
        )
        some = True
        if p_anchor is not None:
            some = any_kept(m_s)
        if some:
            b_k = load_rows(p_k, s_kt, start, o_x, m_n, INT32_OFFSETS, G, D, BD)
            b_s = dot(b_q, tl.trans(b_k), PRECISION)
            b_s = tl.where(m_s, b_s, float("-inf"))
            b_new = tl.maximum(b_m, tl.max(b_s, 1) * scale_log2)
            b_p = tl.exp2(b_s * scale_log2 - b_new[:, None])
            b_a = tl.exp2(b_m - b_new)
            b_l = b_l * b_a[:, None] + tl.sum(b_p.reshape([BM, BN // 8, 8]), 1)
            b_m = b_new
            if DROPOUT:
                b_p = tl.where(dropout_bits(seed, i_bh, o_m[:, None], (start + o_x)[None, :], threshold), b_p, 0.0)
            b_v = load_rows(p_v, s_vt, start, o_x, m_n, INT32_OFFSETS, G, D, BD)
            b_o = dot_add(b_p.to(b_v.dtype), b_v, b_o * b_a[:, None], PRECISION)

    b_l = tl.sum(b_l, 1)
    m_seen = b_l > 0
    b_scale = inverse_keep / tl.where(m_seen, b_l, 1.0)
    b_lse = tl.where(m_seen & m_m, (b_m + tl.log2(tl.where(m_seen, b_l, 1.0))) * LN2, float("-inf"))
    b_o = b_o * b_scale[:, None]
    p_o += i_b.to(tl.int64) * s_ob + i_h.to(tl.int64) * s_oh
    p_row = p_o + o_m.to(tl.int64)[:, None] * s_ot + o_d[None, :]
    tl.store(p_row, b_o.to(p_o.dtype.element_ty), mask=m_m[:, None] & m_d[None, :])
    if q_length < i_m + BM:  # padded rows: not 0 · b_o, which is NaN beside keys or values that are not finite
        b_zero = tl.zeros([BM, BD], dtype=p_o.dtype.element_ty)
        tl.store(p_row, b_zero, mask=((o_m >= q_length) & (o_m < TQ))[:, None] & m_d[None, :])
    tl.store(p_lse + i_bh.to(tl.int64) * TQ + o_m, b_lse, mask=o_m < TQ)


def forward(q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor]:
    """Launch the kernel. Returns out, laid out in memory as q, and lse (B, H, Tq) float32."""
    batch, heads, q_size, dim = q.shape
    table = call.query_table()
    out = torch.empty_like(q)
    lse = torch.empty(batch, heads, q_size, dtype=torch.float32, device=q.device)

    def build() -> list[Launch]:
        if on_hopper(call, HOPPER_FORWARD, (q, out), (k, v)):
            from . import hopper_forward  # needs Gluon, which is not in triton before 3.6

            return hopper_forward.launches(q, k, call)
        config = forward_config(table, dim, q.dtype)
        numbers = dict(
            **strides(q=q, k=k, v=v, o=out),
            H=heads, TQ=q_size, TK=k.size(2), NO=table.entries.size(1), NI=table.entries.size(2),
            D=dim, BD=power_of_two(dim), BM=config.block_q, BN=config.block_k, G=table.inner, GO=table.outer,
            INT32_OFFSETS=int32_offsets(k, v), PRECISION=precision(q.dtype), **call.numbers(),
        )  # fmt: skip
        blocks = dict.fromkeys(("d_k", "d_v"), tile_block(k, v, config.block_k, table.inner))
        return launches_of(_forward_kernel, ceil_div(q_size, config.block_q), heads, batch, numbers, config, blocks)

    lists = dict(p_words=call.words, p_entries=table.entries, p_counts=table.counts)
    for launch in call.launches(("forward", aligned(k, v), aligned(q)), build, q, k, v):
        if launch.kernel is _forward_kernel:
            launch(p_q=q, p_k=k, p_v=v, p_o=out, p_lse=lse, **lists, **call.tensors(), d_k=k, d_v=v)
        else:
            lengths = dict(p_q_lengths=call.q_lengths, p_k_lengths=call.k_lengths)
            launch(p_lse=lse, **lists, **lengths, d_q=q, d_k=k, d_v=v, d_o=out)
    return out, lse
