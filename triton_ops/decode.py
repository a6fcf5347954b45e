"""Decode: one query row per (sentence, beam, head) over the kept cached positions only.

Every hypothesis of a batch is at the same step, so row `step` of the mask serves all of them and the
kept positions come as a list. With a cache per hypothesis (decoder self-attention) a program serves one
(sentence, beam, head); with one cache per sentence (cross-attention) it serves all beams of a (sentence,
head), so the cache is read once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .config import MAX_SENTENCE, ceil_div, decode_config, overlap, power_of_two, precision
from .layout import COLUMN_GROUP, RowLists
from .primitives import (
    LOG2E,
    NO_KEY,
    anchored,
    diagonal,
    dot,
    dot_add,
    let_next_start,
    sequence_length,
    wait_for_previous,
)


@triton.jit
def _slots(p_columns, p_table, p_offsets, p_anchor, start, last, k_length, shift, i_anchor, BN: tl.constexpr):
    """The slots of BN kept positions from `start` on, and which of them exist, [BN]."""
    o_f = start + tl.arange(0, BN)
    m_f = o_f < last
    o_n = tl.load(p_columns + o_f, mask=m_f, other=0).to(tl.int32)
    m_n = m_f & (o_n < k_length)
    if p_anchor is not None:
        o_n = tl.where(m_f, o_n - shift, i_anchor)
        m_n = ((m_f & (o_n != i_anchor)) | (o_f == last)) & (o_n >= 0) & (o_n < k_length)
    o_row = o_n.to(tl.int64)
    if p_table is not None:
        o_row = tl.load(p_table + o_n, mask=m_n, other=0).to(tl.int64)
    if p_offsets is not None:
        o_offset = tl.load(p_offsets + o_n, mask=m_n, other=0).to(tl.int64)
        o_row = o_offset if p_table is None else o_row + o_offset
    return o_row, m_n


# Strides of tables are sizes of caches, which change from sentence to sentence.
@triton.jit(
    do_not_specialize=["s_rb", "s_rw", "s_sb", "s_sh", "s_fh", "BEAM", "H", "MH", "TK", "LQ", "N_GROUPS", "SLOPE"]
)
def _decode_kernel(
    p_q, p_k, p_v, p_o, p_columns, p_pointers, p_step, p_k_lengths, p_table, p_starts, p_offsets, p_anchor, scale_log2,
    s_qb, s_qw, s_qh, s_kb, s_kw, s_kh, s_kt, s_vb, s_vw, s_vh, s_vt, s_ob, s_ow, s_oh, s_rb, s_rw, s_sb, s_sh, s_fh,
    BEAM, H, MH, TK, LQ, N_GROUPS, SLOPE,
    D: tl.constexpr, BD: tl.constexpr, BW: tl.constexpr, BN: tl.constexpr, GROUP: tl.constexpr,
    PRECISION: tl.constexpr, OVERLAP: tl.constexpr, SETTLED: tl.constexpr,
):  # fmt: skip
    """BW = 1: one hypothesis per program, its own cache. BW > 1: all BEAM <= BW hypotheses, a shared cache.

    In a pool (p_table or p_starts) s_kt is the stride of slots, and s_kb and s_kw are 0; so is s_kh where every head
    has slots of its own (p_offsets).

    A mask of offsets has one row, whose columns `shift` makes those of a step; the anchor comes last.

    SETTLED: all but q, k and v is there before the kernel before this one ends, and is read a step of the loop ahead.
    """
    let_next_start(OVERLAP)
    if not SETTLED:
        wait_for_previous(OVERLAP)
    pid = tl.program_id(0)
    i_h = pid % H
    if BW == 1:
        i_w, i_b = (pid // H) % BEAM, pid // H // BEAM
    else:
        i_w, i_b = 0, pid // H
    i_b64, i_h64, i_w64 = i_b.to(tl.int64), i_h.to(tl.int64), tl.cast(i_w, tl.int64)
    k_length = sequence_length(p_k_lengths, i_b, TK)
    i_mh = tl.where(MH > 1, i_h, 0)
    # A step outside the mask would read past the lists; the caller checks it where it can.
    step = tl.maximum(tl.load(p_step), 0)
    p_pointers += (i_mh * LQ + tl.minimum(step, LQ - 1).to(tl.int32)).to(tl.int64) * (N_GROUPS + 1)
    i_anchor, shift = 0, 0
    if p_anchor is None:
        first = tl.load(p_pointers)
        last = tl.load(p_pointers + (k_length + GROUP - 1) // GROUP)
        end = last
    else:
        i_centre = diagonal(step, k_length, SLOPE)
        i_anchor = anchored(p_anchor + i_mh, i_centre, k_length)
        shift = N_GROUPS * (GROUP // 2) - i_centre  # offset 0 is in the middle
        first = tl.load(p_pointers + shift // GROUP)
        last = tl.load(p_pointers + (shift + k_length + GROUP - 1) // GROUP)
        end = last + 1

    o_d = tl.arange(0, BD)
    m_d = o_d < D
    p_q += i_b64 * s_qb + i_h64 * s_qh
    p_k += i_b64 * s_kb + i_h64 * s_kh
    p_v += i_b64 * s_vb + i_h64 * s_vh
    p_o += i_b64 * s_ob + i_h64 * s_oh
    if p_starts is not None:
        first_row = tl.load(p_starts + i_b64 * s_sb + i_h64 * s_sh).to(tl.int64)
        p_k += first_row * s_kt
        p_v += first_row * s_vt
    if p_table is not None:
        p_table += i_b64 * s_rb + i_w64 * s_rw
    if p_offsets is not None:
        p_offsets += i_h64 * s_fh
    if SETTLED:
        o_row, m_n = _slots(p_columns, p_table, p_offsets, p_anchor, first, last, k_length, shift, i_anchor, BN)
        wait_for_previous(OVERLAP)
    if BW == 1:
        b_q = tl.load(p_q + i_w64 * s_qw + o_d, mask=m_d, other=0.0).to(tl.float32)  # [BD]
        b_o = tl.zeros([BD], dtype=tl.float32)
        b_m = tl.full([1], NO_KEY, dtype=tl.float32)
        b_l = tl.zeros([1], dtype=tl.float32)
    else:
        o_w = tl.arange(0, BW)
        m_wd = (o_w < BEAM)[:, None] & m_d[None, :]
        b_q = tl.load(p_q + o_w.to(tl.int64)[:, None] * s_qw + o_d[None, :], mask=m_wd, other=0.0)  # [BW, BD]
        b_o = tl.zeros([BW, BD], dtype=tl.float32)
        b_m = tl.full([BW], NO_KEY, dtype=tl.float32)
        b_l = tl.zeros([BW], dtype=tl.float32)

    for start in range(first, end, BN):
        if not SETTLED:
            o_row, m_n = _slots(p_columns, p_table, p_offsets, p_anchor, start, last, k_length, shift, i_anchor, BN)
        m_nd = m_n[:, None] & m_d[None, :]
        o_k, o_v = o_row * s_kt + i_w64 * s_kw, o_row * s_vt + i_w64 * s_vw
        b_k = tl.load(p_k + o_k[:, None] + o_d[None, :], mask=m_nd, other=0.0)  # [BN, BD]
        b_v = tl.load(p_v + o_v[:, None] + o_d[None, :], mask=m_nd, other=0.0)  # [BN, BD]
        if BW == 1:
            b_s = tl.sum(b_k.to(tl.float32) * b_q[None, :], 1) * scale_log2
            b_s = tl.where(m_n, b_s, float("-inf"))  # [BN]
            b_new = tl.maximum(b_m, tl.max(b_s, 0))
            b_p = tl.exp2(b_s - b_new)
            b_a = tl.exp2(b_m - b_new)
            b_l = b_l * b_a + tl.sum(b_p, 0)
            b_o = b_o * b_a + tl.sum(b_p[:, None] * b_v.to(tl.float32), 0)
        else:
            b_s = dot(b_q, tl.trans(b_k), PRECISION) * scale_log2
            b_s = tl.where(m_n[None, :], b_s, float("-inf"))  # [BW, BN]
            b_new = tl.maximum(b_m, tl.max(b_s, 1))
            b_p = tl.exp2(b_s - b_new[:, None])
            b_a = tl.exp2(b_m - b_new)
            b_l = b_l * b_a + tl.sum(b_p, 1)
            b_o = dot_add(b_p.to(b_v.dtype), b_v, b_o * b_a[:, None], PRECISION)
        b_m = b_new
        if SETTLED:
            o_row, m_n = _slots(
                p_columns, p_table, p_offsets, p_anchor, start + BN, last, k_length, shift, i_anchor, BN
            )

    # No visible key: b_o is 0 and the output too.
    if BW == 1:
        b_o = b_o / tl.where(b_l > 0, b_l, 1.0)
        tl.store(p_o + i_w64 * s_ow + o_d, b_o.to(p_o.dtype.element_ty), mask=m_d)
    else:
        b_o = b_o / tl.where(b_l > 0, b_l, 1.0)[:, None]
        p_row = p_o + o_w.to(tl.int64)[:, None] * s_ow + o_d[None, :]
        tl.store(p_row, b_o.to(p_o.dtype.element_ty), mask=m_wd)


def _cache_strides(x: Tensor) -> tuple[int, int, int, int]:
    """Strides of sentence, beam, head and position; 0 where a cache has no such dimension."""
    if x.dim() <= 3:  # pool (R, H, D) or (R, D)
        return 0, 0, x.stride(1) if x.dim() == 3 else 0, x.stride(0)
    return x.stride(0), x.stride(1) if x.dim() == 5 else 0, x.stride(-3), x.stride(-2)


def decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lists: RowLists,
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
    """Launch the decode kernel. q (B, beam, H, D); caches as in `api.decode_attention`."""
    batch, beam, heads, dim = q.shape
    out = torch.empty_like(q)
    shared = k.dim() == 4 or cache_starts is not None
    rows = max(16, power_of_two(beam)) if shared else 1
    config = decode_config(shared, k_size)
    s_kb, s_kw, s_kh, s_kt = _cache_strides(k)
    s_vb, s_vw, s_vh, s_vt = _cache_strides(v)
    s_rb, s_rw = (0, 0) if block_table is None else block_table.stride()[:2]
    s_sb, s_sh = (0, 0) if cache_starts is None else (*cache_starts.stride(), 0)[:2]
    n_rows, n_pointers = lists.pointers.shape[1:]
    _decode_kernel[(batch * heads * (1 if shared else beam),)](
        p_q=q, p_k=k, p_v=v, p_o=out, p_columns=lists.columns, p_pointers=lists.pointers, p_step=step,
        p_k_lengths=k_lengths, p_table=block_table, p_starts=cache_starts, p_offsets=cache_offsets,
        p_anchor=anchor, scale_log2=scale * LOG2E.value,
        s_qb=q.stride(0), s_qw=q.stride(1), s_qh=q.stride(2), s_kb=s_kb, s_kw=s_kw, s_kh=s_kh, s_kt=s_kt,
        s_vb=s_vb, s_vw=s_vw, s_vh=s_vh, s_vt=s_vt, s_ob=out.stride(0), s_ow=out.stride(1), s_oh=out.stride(2),
        s_rb=s_rb, s_rw=s_rw, s_sb=s_sb, s_sh=s_sh, s_fh=0 if cache_offsets is None else cache_offsets.stride(0),
        BEAM=beam, H=heads, MH=lists.pointers.size(0), TK=k_size, LQ=n_rows, N_GROUPS=n_pointers - 1, SLOPE=slope,
        D=dim, BD=power_of_two(dim), BW=rows, BN=config.block_k, GROUP=COLUMN_GROUP,
        PRECISION=precision(q.dtype), SETTLED=settled and k_size <= MAX_SENTENCE,
        **config.launch(), **overlap(q.device),
    )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["s_fh", "N"])
def _append_kernel(
    p_kv, p_pool, p_offsets, p_step, s_kvn, s_kvx, s_kvh, s_pr, s_px, s_fh, N,
    D: tl.constexpr, BD: tl.constexpr, BW: tl.constexpr,
):  # fmt: skip
    """BW hypotheses of one head."""
    i_h = tl.program_id(1)
    o_w, o_d = tl.program_id(0) * BW + tl.arange(0, BW), tl.arange(0, BD)
    m_wd = (o_w < N)[:, None] & (o_d < D)[None, :]
    o_row = (tl.load(p_offsets + i_h.to(tl.int64) * s_fh + tl.load(p_step)) + o_w).to(tl.int64)
    for x in tl.static_range(2):
        p_x = p_kv + o_w.to(tl.int64)[:, None] * s_kvn + x * s_kvx + i_h.to(tl.int64) * s_kvh + o_d[None, :]
        tl.store(p_pool + o_row[:, None] * s_pr + x * s_px + o_d[None, :], tl.load(p_x, mask=m_wd), mask=m_wd)


def append(kv: Tensor, pool: Tensor, offsets: Tensor, step: Tensor) -> None:
    """Launch the kernel; arguments as in `api.append_to_pool`."""
    n, _, heads, dim = kv.shape
    block = 16
    _append_kernel[(ceil_div(n, block), heads)](
        p_kv=kv, p_pool=pool, p_offsets=offsets, p_step=step, s_kvn=kv.stride(0), s_kvx=kv.stride(1),
        s_kvh=kv.stride(2), s_pr=pool.stride(0), s_px=pool.stride(1), s_fh=offsets.stride(0), N=n,
        D=dim, BD=power_of_two(dim), BW=block, num_warps=2,
    )  # fmt: skip


@triton.jit(do_not_specialize=["s_table", "s_fh", "N", "N_HEADS"])
def _number_kernel(
    p_table, p_offsets, p_used, p_head, p_n_heads, p_step, s_table, s_fh, N, N_HEADS, BX: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """BX hypotheses and BX heads."""
    let_next_start(OVERLAP)
    wait_for_previous(OVERLAP)
    o_x = tl.program_id(0) * BX + tl.arange(0, BX)
    step = tl.load(p_step)
    tl.store(p_table + o_x.to(tl.int64) * s_table + step, o_x, mask=o_x < N)
    m_h = o_x < N_HEADS
    b_used = tl.load(p_used + o_x, mask=m_h)
    b_first = b_used + tl.load(p_head + o_x, mask=m_h) * N
    tl.store(p_offsets + o_x.to(tl.int64) * s_fh + step, b_first.to(tl.int32), mask=m_h)
    tl.store(p_used + o_x, b_used + tl.load(p_n_heads + o_x, mask=m_h) * N, mask=m_h)


def number(
    n: int, block_table: Tensor, offsets: Tensor, used: Tensor, head: Tensor, n_heads: Tensor, step: Tensor
) -> None:
    """Number the slots that a step of *n* hypotheses writes, those of one head after those of another of its site.

    Args:
        block_table, offsets: int32 (N, T) and (H, T), as in `api.decode_attention`; column *step* is written.
        used: int64 (H,), slots in use in the pool of each head's site, which those of the step are added to.
        head, n_heads: int64 (H,), the number of each head in its site, and the heads there.
        step: int64 (1,).
    """
    block = 128
    _number_kernel[(ceil_div(max(n, used.numel()), block),)](
        p_table=block_table, p_offsets=offsets, p_used=used, p_head=head, p_n_heads=n_heads, p_step=step,
        s_table=block_table.stride(0), s_fh=offsets.stride(0), N=n, N_HEADS=used.numel(), BX=block, num_warps=4,
        **overlap(used.device),
    )  # fmt: skip
