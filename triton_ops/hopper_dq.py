"""dQ on Hopper, in Gluon (triton 3.6 and later): `backward._dq_kernel` for blocks of 64 and 128.

As `hopper_forward.py`: scores of the next tile while dQ of this one is added up, and tiles in and out by the tensor
memory accelerator.
"""

from __future__ import annotations

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

from .call import Call
from .config import Config, ceil_div
from .hopper import ask_pair, await_warps, hopper_launches, keep_bits, load_tile, next_stage, store_tile, tile_start
from .launch import Launch
from .primitives import LOG2E, RUN_TIME, list_lengths, sequence_length

CONFIG = Config(64, 64, 4, 2, 128)


@gluon.jit(do_not_specialize=RUN_TIME)
def _hopper_dq_kernel(
    p_lse, p_dlse, p_delta, p_pivot, p_words, p_entries, p_counts, p_q_lengths, p_k_lengths,
    d_q, d_k, d_v, d_o, d_do, d_dq, scale, scale_log2,
    H, MH, TQ, TK, TR, LQ, RS, KW, NO, NI, first_h, first_b,
    D: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, G: gl.constexpr, GO: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """dQ of BM queries of one head of one sentence, δ and pivots: as `backward._dq_kernel`.

    d_q ... d_dq  descriptors of tiles of these tensors; dQ is written through its own
    """
    wide: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])
    tall: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    left: gl.constexpr = gl.DotOperandLayout(0, tall, 2)
    by_row: gl.constexpr = gl.SliceLayout(1, wide)
    dtype: gl.constexpr = d_q.dtype
    q_own = gl.allocate_shared_memory(dtype, [1, 1, BM, D], d_q.layout)
    do_own = gl.allocate_shared_memory(dtype, [1, 1, BM, D], d_do.layout)
    k_ring = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BN, D], d_k.layout)
    v_ring = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BN, D], d_v.layout)
    own_full = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    mbarrier.init(own_full.index(0), count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
    fence_async_shared()

    # The last tiles first, as in `forward._forward_kernel`.
    i_m = (gl.num_programs(0) - 1 - gl.program_id(0)) * BM
    i_h, i_b = first_h + gl.program_id(1), first_b + gl.program_id(2)
    mbarrier.expect(own_full.index(0), 3 * d_q.block_type.nbytes)
    load_tile(d_q, [i_b, i_h, i_m, 0], own_full.index(0), q_own)
    load_tile(d_do, [i_b, i_h, i_m, 0], own_full.index(0), do_own)
    # O waits where values will be that nobody has asked for yet.
    load_tile(d_o, [i_b, i_h, i_m, 0], own_full.index(0), v_ring.index(STAGES - 1))
    i_bh = i_b * H + i_h
    i_mh = gl.where(MH > 1, i_h, 0)
    i_list = (i_mh * NO + i_m // GO).to(gl.int64)
    p_entries += i_list * NI
    p_counts += i_list * (NI + 1)
    q_length = sequence_length(p_q_lengths, i_b, TQ)
    # A tile of padded queries visits no key and writes zeros.
    k_length = gl.where(i_m < q_length, sequence_length(p_k_lengths, i_b, TK), 0)
    n_inside, n_full, n_total = list_lengths(p_counts, k_length, G)
    inside = n_inside * (G // BN)
    steps = n_total * (G // BN)
    for i in gl.static_range(STAGES - 1):
        first = tile_start(p_entries, i, n_full, n_total, NI, BN, G)
        ask_pair(d_k, d_v, k_ring, v_ring, full, i, i_b, i_h, first, i < steps)
    start = tile_start(p_entries, STAGES - 1, n_full, n_total, NI, BN, G)

    o_m = i_m + gl.arange(0, BM, by_row)
    o_row = i_bh.to(gl.int64) * TQ + o_m
    # A row without a visible key has lse = -inf: with +inf in its place all its probabilities are 0.
    b_pivot = gl.load(p_lse + o_row, mask=o_m < q_length, other=float("-inf")) * LOG2E
    b_pivot = gl.where(b_pivot == float("-inf"), float("inf"), b_pivot)
    mbarrier.wait(own_full.index(0), 0)
    q = q_own.reshape([BM, D])
    do = do_own.reshape([BM, D])
    b_o = v_ring.index(STAGES - 1).reshape([BM, D]).load(tall).to(gl.float32)
    b_delta = gl.convert_layout(gl.sum(b_o * do.load(tall).to(gl.float32), 1), by_row)
    if p_dlse is not None:
        # Not where nothing is visible: -inf has no gradient, and merging parts by logaddexp makes it NaN.
        b_delta -= gl.load(p_dlse + o_row, mask=b_pivot < float("inf"), other=0.0)
    b_delta = gl.where(o_m < q_length, b_delta, 0.0)
    await_warps()
    ask_pair(d_k, d_v, k_ring, v_ring, full, STAGES - 1, i_b, i_h, start, steps > STAGES - 1)
    o_written = i_bh.to(gl.int64) * TR + o_m
    gl.store(p_delta + o_written, b_delta, mask=o_m < TQ)
    if p_pivot is not None:
        gl.store(p_pivot + o_written, b_pivot, mask=o_m < TQ)

    no_s = gl.zeros([BM, BN], gl.float32, wide)
    b_dq = gl.zeros([BM, D], gl.float32, tall)
    slot = 0
    phase = 0
    if inside > 0:
        mbarrier.wait(full.index(0), 0)
        b_s = warpgroup_mma(q, k_ring.index(0).reshape([BN, D]).permute((1, 0)), no_s, use_acc=False)
        for j in range(inside - 1):
            start = tile_start(p_entries, j + STAGES, n_full, n_total, NI, BN, G)
            v = v_ring.index(slot).reshape([BN, D])
            dp = warpgroup_mma(do, v.permute((1, 0)), no_s, use_acc=False, is_async=True)
            b_p = gl.exp2(b_s * scale_log2 - b_pivot[:, None])
            b_dp = warpgroup_mma_wait(0, deps=[dp])
            b_ds = b_p * (b_dp - b_delta[:, None])
            ds_left = gl.convert_layout(b_ds.to(dtype), left)
            next_slot, next_phase = next_stage(slot, phase, STAGES)
            mbarrier.wait(full.index(next_slot), next_phase)
            k_next = k_ring.index(next_slot).reshape([BN, D])
            s = warpgroup_mma(q, k_next.permute((1, 0)), no_s, use_acc=False, is_async=True)
            dq = warpgroup_mma(ds_left, k_ring.index(slot).reshape([BN, D]), warpgroup_mma_init(b_dq), is_async=True)
            # ptxas runs products one by one if one whose result is read is still on its way into the next step.
            b_s, b_dq = warpgroup_mma_wait(0, deps=[s, dq])
            await_warps()
            ask_pair(d_k, d_v, k_ring, v_ring, full, slot, i_b, i_h, start, j + STAGES < steps)
            slot = next_slot
            phase = next_phase
        start = tile_start(p_entries, inside - 1 + STAGES, n_full, n_total, NI, BN, G)
        b_dp = warpgroup_mma(do, v_ring.index(slot).reshape([BN, D]).permute((1, 0)), no_s, use_acc=False)
        b_ds = gl.exp2(b_s * scale_log2 - b_pivot[:, None]) * (b_dp - b_delta[:, None])
        ds_left = gl.convert_layout(b_ds.to(dtype), left)
        b_dq = warpgroup_mma(ds_left, k_ring.index(slot).reshape([BN, D]), b_dq)
        await_warps()
        ask_pair(d_k, d_v, k_ring, v_ring, full, slot, i_b, i_h, start, inside - 1 + STAGES < steps)
        slot, phase = next_stage(slot, phase, STAGES)

    # What is left: full blocks that reach past the last key, and partial blocks.
    p_words += i_mh.to(gl.int64) * KW * LQ
    for j in range(inside, steps):
        start = tile_start(p_entries, j, n_full, n_total, NI, BN, G)
        next_start = tile_start(p_entries, j + STAGES, n_full, n_total, NI, BN, G)
        m_s = keep_bits(p_words, start, o_m, q_length, k_length, LQ, RS, BM, BN, wide)
        mbarrier.wait(full.index(slot), phase)
        k = k_ring.index(slot).reshape([BN, D])
        v = v_ring.index(slot).reshape([BN, D])
        s = warpgroup_mma(q, k.permute((1, 0)), no_s, use_acc=False, is_async=True)
        dp = warpgroup_mma(do, v.permute((1, 0)), no_s, use_acc=False, is_async=True)
        b_s, b_dp = warpgroup_mma_wait(0, deps=[s, dp])
        b_ds = gl.exp2(b_s * scale_log2 - b_pivot[:, None]) * (b_dp - b_delta[:, None])
        b_ds = gl.where(m_s, b_ds, 0.0)
        if start + BN > k_length:  # padded keys: not 0 · k, which is NaN if they are not finite
            o_n = start + gl.arange(0, BN, gl.SliceLayout(1, tall))
            await_warps()
            k.store(gl.where((o_n < k_length)[:, None], k.load(tall), 0.0))
            fence_async_shared()
        b_dq = warpgroup_mma(gl.convert_layout(b_ds.to(dtype), left), k, b_dq)
        await_warps()
        ask_pair(d_k, d_v, k_ring, v_ring, full, slot, i_b, i_h, next_start, j + STAGES < steps)
        slot, phase = next_stage(slot, phase, STAGES)

    o_q = i_m + gl.arange(0, BM, gl.SliceLayout(1, tall))
    q.store(gl.where((o_q < q_length)[:, None], b_dq * scale, 0.0).to(dtype))
    fence_async_shared()
    store_tile(d_dq, [i_b, i_h, i_m, 0], q_own)
    tma.store_wait(0)


def launches(q: Tensor, k: Tensor, row: int, call: Call) -> list[Launch]:
    """Launches that write dQ, δ and pivots, in rows of *row* numbers, of the tensors that `_hopper_dq_kernel` names."""
    queries, keys = [1, 1, CONFIG.block_q, q.size(3)], [1, 1, CONFIG.block_k, q.size(3)]
    blocks = dict.fromkeys(("d_q", "d_o", "d_do", "d_dq"), queries) | dict.fromkeys(("d_k", "d_v"), keys)
    kernel, n_tiles = _hopper_dq_kernel, ceil_div(q.size(2), CONFIG.block_q)
    return hopper_launches(kernel, q, k, call, call.query_table(), n_tiles, CONFIG, blocks, TR=row, scale=call.scale)
