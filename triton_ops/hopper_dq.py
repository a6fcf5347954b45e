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
    warpgroup_mma_wait,
)

from .call import Call
from .config import HOPPER_DQ, ceil_div
from .hopper import (
    accumulate,
    ask_pair,
    await_warps,
    clear,
    finished,
    hopper_launches,
    keep_bits,
    load,
    multiply,
    new_ring,
    next_stage,
    parts_of,
    put,
    row_products,
    send,
    tile,
    tile_blocks,
    tile_bytes,
    tile_start,
    wait_for,
    zeros,
)
from .launch import Launch
from .primitives import LOG2E, RUN_TIME, list_lengths, sequence_length


@gluon.jit(do_not_specialize=RUN_TIME)
def _hopper_dq_kernel(
    p_lse, p_dlse, p_delta, p_pivot, p_words, p_entries, p_counts, p_q_lengths, p_k_lengths,
    d_q, d_k, d_v, d_o, d_do, d_dq,
    d_q_rest, d_k_rest, d_v_rest, d_o_rest, d_do_rest, d_dq_rest, scale, scale_log2,
    H, MH, TQ, TK, TR, LQ, RS, KW, NO, NI, first_h, first_b,
    D: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, G: gl.constexpr, GO: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """dQ of BM queries of one head of one sentence, δ and pivots: as `backward._dq_kernel`.

    d_q ... d_dq  descriptors of tiles of these tensors; dQ is written through its own
    """
    wide: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])
    by_row: gl.constexpr = gl.SliceLayout(1, wide)
    dtype: gl.constexpr = d_q.dtype
    d_q = parts_of(d_q, d_q_rest)
    d_k = parts_of(d_k, d_k_rest)
    d_v = parts_of(d_v, d_v_rest)
    d_o = parts_of(d_o, d_o_rest)
    d_do = parts_of(d_do, d_do_rest)
    d_dq = parts_of(d_dq, d_dq_rest)
    q_own = new_ring(d_q, 1)
    do_own = new_ring(d_do, 1)
    k_ring = new_ring(d_k, STAGES)
    v_ring = new_ring(d_v, STAGES)
    own_full = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    mbarrier.init(own_full.index(0), count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
    fence_async_shared()

    # The last tiles first, as in `forward._forward_kernel`.
    i_m = (gl.num_programs(0) - 1 - gl.program_id(0)) * BM
    i_h, i_b = first_h + gl.program_id(1), first_b + gl.program_id(2)
    mbarrier.expect(own_full.index(0), 3 * tile_bytes(d_q))
    load(d_q, q_own, own_full.index(0), 0, i_b, i_h, i_m)
    load(d_do, do_own, own_full.index(0), 0, i_b, i_h, i_m)
    # O waits where values will be that nobody has asked for yet.
    load(d_o, v_ring, own_full.index(0), STAGES - 1, i_b, i_h, i_m)
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
    q = tile(q_own, 0)
    do = tile(do_own, 0)
    b_delta = row_products(tile(v_ring, STAGES - 1), do, by_row)
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
    b_dq = zeros(q_own)
    slot = 0
    phase = 0
    if inside > 0:
        mbarrier.wait(full.index(0), 0)
        b_s = multiply(q, tile(k_ring, 0), no_s)
        for j in range(inside - 1):
            start = tile_start(p_entries, j + STAGES, n_full, n_total, NI, BN, G)
            dp = multiply(do, tile(v_ring, slot), no_s, is_async=True)
            b_p = gl.exp2(b_s * scale_log2 - b_pivot[:, None])
            b_dp = warpgroup_mma_wait(0, deps=[dp])
            b_ds = b_p * (b_dp - b_delta[:, None])
            ds_left = b_ds.to(dtype)
            next_slot, next_phase = next_stage(slot, phase, STAGES)
            mbarrier.wait(full.index(next_slot), next_phase)
            s = multiply(q, tile(k_ring, next_slot), no_s, is_async=True)
            dq = accumulate(ds_left, tile(k_ring, slot), b_dq)
            # ptxas runs products one by one if one whose result is read is still on its way into the next step.
            results = wait_for((s,) + dq)
            b_s = results[0]
            b_dq = results[1:]
            await_warps()
            ask_pair(d_k, d_v, k_ring, v_ring, full, slot, i_b, i_h, start, j + STAGES < steps)
            slot = next_slot
            phase = next_phase
        start = tile_start(p_entries, inside - 1 + STAGES, n_full, n_total, NI, BN, G)
        b_dp = multiply(do, tile(v_ring, slot), no_s)
        b_ds = gl.exp2(b_s * scale_log2 - b_pivot[:, None]) * (b_dp - b_delta[:, None])
        ds_left = b_ds.to(dtype)
        b_dq = wait_for(accumulate(ds_left, tile(k_ring, slot), b_dq))
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
        k = tile(k_ring, slot)
        v = tile(v_ring, slot)
        s = multiply(q, k, no_s, is_async=True)
        dp = multiply(do, v, no_s, is_async=True)
        b_s, b_dp = warpgroup_mma_wait(0, deps=[s, dp])
        b_ds = gl.exp2(b_s * scale_log2 - b_pivot[:, None]) * (b_dp - b_delta[:, None])
        b_ds = gl.where(m_s, b_ds, 0.0)
        if start + BN > k_length:  # padded keys: not 0 · k, which is NaN if they are not finite
            await_warps()
            clear(k, k_length - start)
        b_dq = wait_for(accumulate(b_ds.to(dtype), k, b_dq))
        await_warps()
        ask_pair(d_k, d_v, k_ring, v_ring, full, slot, i_b, i_h, next_start, j + STAGES < steps)
        slot, phase = next_stage(slot, phase, STAGES)

    put(q_own, finished(b_dq, scale, q_length - i_m))
    fence_async_shared()
    send(d_dq, q_own, i_b, i_h, i_m)
    tma.store_wait(0)


def launches(q: Tensor, k: Tensor, row: int, call: Call) -> list[Launch]:
    """Launches that write dQ, δ and pivots, in rows of *row* numbers, of the tensors that `_hopper_dq_kernel` names."""
    config = HOPPER_DQ[q.size(3)]
    blocks = tile_blocks(config, q.size(3), ("d_q", "d_o", "d_do", "d_dq"), ("d_k", "d_v"))
    kernel, n_tiles = _hopper_dq_kernel, ceil_div(q.size(2), config.block_q)
    return hopper_launches(kernel, q, k, call, call.query_table(), n_tiles, config, blocks, TR=row, scale=call.scale)
