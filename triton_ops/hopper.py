"""dK and dV on Hopper, in Gluon (triton 3.6 and later): `backward._dkdv_kernel` where lists of full blocks are long.

A warp of its own loads tiles of Q and dO into a ring of shared memory, and the products run asynchronously: scores of
the next tile while those of this one become probabilities. Scores are transposed, [keys, queries]: P and dS leave the
first products in the registers from which the second ones take them, and K and V stay in registers. Two programs share
a multiprocessor.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from .call import Call
from .config import Config, ceil_div
from .descriptors import aligned_row
from .launch import Launch, launches_of, strides
from .primitives import RUN_TIME, list_lengths, listed_start, sequence_length

KEYS, QUERIES, STAGES = 64, 64, 3
# Half of the registers of a multiprocessor. Those that the loading warp leaves go to the others.
CONFIG = Config(QUERIES, KEYS, 4, STAGES, 128)
LOADING_REGISTERS = gl.constexpr(24)
THREADS = gl.constexpr(160)  # of the five warps
FIRST_BARRIER = gl.constexpr(9)  # named barriers of the stages; Triton has the first few
load_tile = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared  # its name until triton 3.8


@gluon.jit
def _next_stage(slot, phase, STAGES: gl.constexpr):
    slot += 1
    wrap = slot == STAGES
    return gl.where(wrap, 0, slot), gl.where(wrap, phase ^ 1, phase)


@gluon.jit
def _release(slot, pred):
    """Let the loading warp have a stage, without waiting: around an `mbarrier.arrive` all four warps would."""
    gl.inline_asm_elementwise(
        "{ .reg .pred some; setp.ne.u32 some, $3, 0; @some bar.arrive $1, $2; mov.u32 $0, 0; }", "=r,r,r,r",
        [slot + FIRST_BARRIER, THREADS, pred.to(gl.int32)], gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def _await_release(slot, pred):
    gl.inline_asm_elementwise(
        "{ .reg .pred some; setp.ne.u32 some, $3, 0; @some bar.sync $1, $2; mov.u32 $0, 0; }", "=r,r,r,r",
        [slot + FIRST_BARRIER, THREADS, pred.to(gl.int32)], gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def _load(run, BM: gl.constexpr, G: gl.constexpr, STAGES: gl.constexpr):
    """Fill the ring with tiles of the first n_tiles * BM queries of the list."""
    d_q, d_do, d_pivot, d_delta, q_ring, do_ring, pivot_ring, delta_ring, full, p_entries, n_tiles, i_b, i_h, i_row = (
        run
    )
    BYTES: gl.constexpr = d_q.block_type.nbytes + d_do.block_type.nbytes + 8 * BM
    slot = 0
    phase = 0
    for j in range(n_tiles):
        start = gl.load(p_entries + j * BM // G) * G + j * BM % G
        _await_release(slot, j >= STAGES)
        bar = full.index(slot)
        mbarrier.expect(bar, BYTES)
        load_tile(d_q, [i_b, i_h, start, 0], bar, q_ring.index(slot))
        load_tile(d_do, [i_b, i_h, start, 0], bar, do_ring.index(slot))
        load_tile(d_pivot, [i_row + start], bar, pivot_ring.index(slot))
        load_tile(d_delta, [i_row + start], bar, delta_ring.index(slot))
        slot, phase = _next_stage(slot, phase, STAGES)


@gluon.jit
def _add(run, tail, out, D: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, G: gl.constexpr, STAGES: gl.constexpr):
    """Add what all listed queries contribute to dK and dV of BN keys, and write them."""
    q_ring, do_ring, pivot_ring, delta_ring, k_own, v_own, full, own, n_tiles, scale_log2 = run
    p_q, p_do, p_pivot, p_delta, p_words, p_entries, s_qt, s_gt, first, n_full, n_total, q_length, NI, LQ, RS = tail
    p_dk, p_dv, s_dkt, s_dvt, i_n, k_length, TK, scale = out
    wide: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BM, 16])
    tall: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    left: gl.constexpr = gl.DotOperandLayout(0, tall, 2)
    k_left: gl.constexpr = gl.DotOperandLayout(0, wide, 2)
    columns: gl.constexpr = gl.SliceLayout(0, wide)
    dtype: gl.constexpr = q_ring.dtype
    no_s = gl.zeros([BN, BM], gl.float32, wide)
    dk = warpgroup_mma_init(gl.zeros([BN, D], gl.float32, tall))
    dv = warpgroup_mma_init(gl.zeros([BN, D], gl.float32, tall))
    mbarrier.wait(own, 0)
    k = k_own.reshape([BN, D]).load(k_left)
    v = v_own.reshape([BN, D]).load(k_left)
    slot = 0
    phase = 0
    if n_tiles > 0:
        mbarrier.wait(full.index(0), 0)
    b_s = warpgroup_mma(k, q_ring.index(0).reshape([BM, D]).permute((1, 0)), no_s, use_acc=False)
    for j in range(n_tiles - 1):
        next_slot, next_phase = _next_stage(slot, phase, STAGES)
        q = q_ring.index(slot).reshape([BM, D])
        do = do_ring.index(slot).reshape([BM, D])
        dp = warpgroup_mma(v, do.permute((1, 0)), no_s, use_acc=False, is_async=True)
        pivot = pivot_ring.index(slot).load(columns)
        p = gl.exp2(b_s * scale_log2 - pivot[None, :])
        p_left = gl.convert_layout(p.to(dtype), left)
        mbarrier.wait(full.index(next_slot), next_phase)
        q_next = q_ring.index(next_slot).reshape([BM, D])
        s = warpgroup_mma(k, q_next.permute((1, 0)), no_s, use_acc=False, is_async=True)
        dv = warpgroup_mma(p_left, do, dv, is_async=True)
        delta = delta_ring.index(slot).load(columns)
        b_dp = warpgroup_mma_wait(2, deps=[dp])
        ds = p * (b_dp - delta[None, :])
        dk = warpgroup_mma(gl.convert_layout(ds.to(dtype), left), q, dk, is_async=True)
        # ptxas runs products one by one if one whose result is read is still on its way into the next step.
        b_s, b_dk, b_dv = warpgroup_mma_wait(0, deps=[s, dk, dv])
        dk = warpgroup_mma_init(b_dk)
        dv = warpgroup_mma_init(b_dv)
        _release(slot, j + STAGES < n_tiles)
        slot = next_slot
        phase = next_phase
    b_dk, b_dv = warpgroup_mma_wait(0, deps=[dk, dv])
    if n_tiles > 0:
        q = q_ring.index(slot).reshape([BM, D])
        do = do_ring.index(slot).reshape([BM, D])
        b_dp = warpgroup_mma(v, do.permute((1, 0)), no_s, use_acc=False)
        pivot = pivot_ring.index(slot).load(columns)
        delta = delta_ring.index(slot).load(columns)
        p = gl.exp2(b_s * scale_log2 - pivot[None, :])
        ds = p * (b_dp - delta[None, :])
        b_dv = warpgroup_mma(gl.convert_layout(p.to(dtype), left), do, b_dv)
        b_dk = warpgroup_mma(gl.convert_layout(ds.to(dtype), left), q, b_dk)

    rows: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    o_m = gl.arange(0, BM, gl.SliceLayout(1, rows))
    o_d = gl.arange(0, D, gl.SliceLayout(0, rows))
    o_x = gl.arange(0, BM, columns)
    o_n = i_n + gl.arange(0, BN, gl.SliceLayout(1, wide))
    # No tile is on its way any more.
    q = q_ring.index(0).reshape([BM, D])
    do = do_ring.index(0).reshape([BM, D])
    for at in range(first, n_total * G, BM):
        start = listed_start(p_entries, at, n_full, n_total, NI, G)
        m_m = (start + o_m < q_length)[:, None]
        o_row = (start + o_m).to(gl.int64)[:, None]
        q.store(gl.load(p_q + o_row * s_qt + o_d[None, :], mask=m_m, other=0.0))
        do.store(gl.load(p_do + o_row * s_gt + o_d[None, :], mask=m_m, other=0.0))
        fence_async_shared()
        m_x = start + o_x < q_length
        pivot = gl.load(p_pivot + start + o_x, mask=m_x, other=float("inf"))
        delta = gl.load(p_delta + start + o_x, mask=m_x, other=0.0)
        p_word = p_words + (o_n // 32).to(gl.int64)[:, None] * LQ + ((start + o_x) >> RS)[None, :]
        b_word = gl.load(p_word, mask=m_x[None, :] & (o_n < k_length)[:, None], other=0)
        m_s = ((b_word >> (o_n % 32)[:, None]) & 1) != 0
        b_s = warpgroup_mma(k, q.permute((1, 0)), no_s, use_acc=False)
        b_dp = warpgroup_mma(v, do.permute((1, 0)), no_s, use_acc=False)
        p = gl.where(m_s, gl.exp2(b_s * scale_log2 - pivot[None, :]), 0.0)
        ds = p * (b_dp - delta[None, :])
        b_dv = warpgroup_mma(gl.convert_layout(p.to(dtype), left), do, b_dv)
        b_dk = warpgroup_mma(gl.convert_layout(ds.to(dtype), left), q, b_dk)

    o_key = i_n + gl.arange(0, BN, gl.SliceLayout(1, tall))
    o_e = gl.arange(0, D, gl.SliceLayout(0, tall))[None, :]
    m_n = (o_key < k_length)[:, None]
    m_row = (o_key < TK)[:, None] & (o_e < D)
    o_key64 = o_key.to(gl.int64)[:, None]
    gl.store(p_dk + o_key64 * s_dkt + o_e, gl.where(m_n, b_dk * scale, 0.0).to(dtype), mask=m_row)
    gl.store(p_dv + o_key64 * s_dvt + o_e, gl.where(m_n, b_dv, 0.0).to(dtype), mask=m_row)


@gluon.jit(do_not_specialize=RUN_TIME)
def _hopper_dkdv_kernel(
    p_q, p_do, p_pivot, p_delta, p_dk, p_dv, p_words, p_entries, p_counts, p_q_lengths, p_k_lengths,
    d_q, d_k, d_v, d_do, d_pivot, d_delta, scale, scale_log2,
    s_qb, s_qh, s_qt, s_gb, s_gh, s_gt, s_dkb, s_dkh, s_dkt, s_dvb, s_dvh, s_dvt,
    H, MH, TQ, TK, TR, LQ, RS, KW, NO, NI, first_h, first_b,
    D: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, G: gl.constexpr, GO: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """dK and dV of BN keys of one head of one sentence: as `backward._dkdv_kernel`.

    p_pivot, p_delta  float32 (B, H, TR): what `backward._dq_kernel` writes; TR as of `descriptors.aligned_row`
    d_q ... d_delta   descriptors of tiles of these tensors
    """
    i_n = gl.program_id(0) * BN
    i_h, i_b = first_h + gl.program_id(1), first_b + gl.program_id(2)
    i_row = (i_b * H + i_h) * TR
    k_length = sequence_length(p_k_lengths, i_b, TK)
    # A tile of padded keys visits no query and writes zeros.
    q_length = gl.where(i_n < k_length, sequence_length(p_q_lengths, i_b, TQ), 0)
    i_b64, i_h64 = i_b.to(gl.int64), i_h.to(gl.int64)
    i_mh = gl.where(MH > 1, i_h, 0)
    i_list = (i_mh * NO + i_n // GO).to(gl.int64)
    p_entries += i_list * NI
    p_counts += i_list * (NI + 1)
    n_inside, n_full, n_total = list_lengths(p_counts, q_length, G)
    n_tiles = n_inside * (G // BM)

    q_ring = gl.allocate_shared_memory(d_q.dtype, [STAGES, 1, 1, BM, D], d_q.layout)
    do_ring = gl.allocate_shared_memory(d_q.dtype, [STAGES, 1, 1, BM, D], d_do.layout)
    k_own = gl.allocate_shared_memory(d_q.dtype, [1, 1, BN, D], d_k.layout)
    v_own = gl.allocate_shared_memory(d_q.dtype, [1, 1, BN, D], d_v.layout)
    pivot_ring = gl.allocate_shared_memory(gl.float32, [STAGES, BM], d_pivot.layout)
    delta_ring = gl.allocate_shared_memory(gl.float32, [STAGES, BM], d_delta.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    own = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
    mbarrier.init(own, count=1)
    fence_async_shared()
    mbarrier.expect(own, 2 * d_k.block_type.nbytes)
    load_tile(d_k, [i_b, i_h, i_n, 0], own, k_own)
    load_tile(d_v, [i_b, i_h, i_n, 0], own, v_own)
    loads = (
        d_q, d_do, d_pivot, d_delta, q_ring, do_ring, pivot_ring, delta_ring, full, p_entries, n_tiles, i_b, i_h, i_row,
    )  # fmt: skip
    run = (q_ring, do_ring, pivot_ring, delta_ring, k_own, v_own, full, own, n_tiles, scale_log2)
    tail = (
        p_q + i_b64 * s_qb + i_h64 * s_qh, p_do + i_b64 * s_gb + i_h64 * s_gh, p_pivot + i_row, p_delta + i_row,
        p_words + i_mh.to(gl.int64) * KW * LQ, p_entries, s_qt, s_gt, n_inside * G, n_full, n_total, q_length,
        NI, LQ, RS,
    )  # fmt: skip
    out = (
        p_dk + i_b64 * s_dkb + i_h64 * s_dkh, p_dv + i_b64 * s_dvb + i_h64 * s_dvh, s_dkt, s_dvt, i_n, k_length, TK,
        scale,
    )  # fmt: skip
    gl.warp_specialize(
        [(_add, (run, tail, out, D, BM, BN, G, STAGES)), (_load, (loads, BM, G, STAGES))], [1], [LOADING_REGISTERS]
    )


class HopperLaunch(Launch):
    """A launch whose descriptors say how tiles lie in shared memory."""

    def _repeat(self, tensors: dict[str, Any], arguments: list[Any]) -> None:
        # Triton is given whole tensors and descriptors, as in all tests and measurements on a GPU. Addresses and kept
        # tensor maps in their place, as `Launch` passes, have not run there with descriptors of Gluon.
        described = {name: self._describe(name, tensors[name]) for name in self.blocks}
        self._compiled[self.grid](*(tensors | described).values(), *self._values)

    def _descriptor(self, x: Tensor, block: list[int]) -> TensorDescriptor:
        layout = gl.NVMMASharedLayout(0 if len(block) == 1 else 128, 8 * x.element_size(), len(block))
        return TensorDescriptor(x, list(x.shape), list(x.stride()), block, layout)


def launches(q: Tensor, k: Tensor, v: Tensor, grad_out: Tensor, dk: Tensor, dv: Tensor, call: Call) -> list[Launch]:
    """Launches that write dK and dV, of the tensors that `_hopper_dkdv_kernel` names."""
    table = call.key_table()
    names = ("MH", "KW", "LQ", "RS", "scale_log2")
    numbers = dict(
        **strides(q=q, g=grad_out, dk=dk, dv=dv),
        H=q.size(1), TQ=q.size(2), TK=k.size(2), TR=aligned_row(q.size(2)), scale=call.scale, D=q.size(3),
        NO=table.entries.size(1), NI=table.entries.size(2), BM=QUERIES, BN=KEYS, G=table.inner, GO=table.outer,
        STAGES=STAGES, **{name: call.numbers()[name] for name in names},
    )  # fmt: skip
    tiles = [1, 1, QUERIES, q.size(3)], [1, 1, KEYS, q.size(3)]
    blocks = dict(d_q=tiles[0], d_k=tiles[1], d_v=tiles[1], d_do=tiles[0], d_pivot=[QUERIES], d_delta=[QUERIES])
    n_tiles = ceil_div(k.size(2), KEYS)
    return launches_of(_hopper_dkdv_kernel, n_tiles, q.size(1), q.size(0), numbers, CONFIG, blocks, HopperLaunch)
