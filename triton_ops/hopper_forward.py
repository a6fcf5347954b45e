"""The forward pass on Hopper, in Gluon (triton 3.6 and later): `forward._forward_kernel` for blocks of 64 and 128.

Scores of the next tile are computed while those of this one become probabilities, and one thread asks for tiles of K
and V two steps ahead. The output leaves by the tensor memory accelerator, too, from where Q was: at 90% sparsity a
program computes some six tiles of 64 keys, and a seventh of its time went into writing the output by pointers.
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
from .config import HOPPER_FORWARD, ceil_div
from .hopper import (
    accumulate,
    ask,
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
    scaled,
    send,
    tile,
    tile_blocks,
    tile_bytes,
    tile_start,
    wait_for,
    zeros,
)
from .launch import Launch
from .primitives import LN2, NO_KEY, RUN_TIME, list_lengths, sequence_length


@gluon.jit
def _partial_sums(p):
    """Sums of every eighth key: a thread adds up those that it holds."""
    BM: gl.constexpr = p.shape[0]
    BN: gl.constexpr = p.shape[1]
    return gl.sum(p.reshape([BM, BN // 8, 8]), 1)


@gluon.jit
def _probabilities(b_s, b_m, b_l, scale_log2):
    """(P, pivots, sums, by what earlier sums are multiplied) after these scores."""
    b_new = gl.maximum(b_m, gl.max(b_s, 1) * scale_log2)
    b_p = gl.exp2(b_s * scale_log2 - b_new[:, None])
    b_a = gl.exp2(b_m - b_new)
    sums: gl.constexpr = gl.SliceLayout(1, b_l.type.layout)
    b_l = b_l * gl.convert_layout(b_a, sums)[:, None] + _partial_sums(b_p)
    return b_p, b_new, b_l, b_a


@gluon.jit(do_not_specialize=RUN_TIME)
def _hopper_forward_kernel(
    p_lse, p_words, p_entries, p_counts, p_q_lengths, p_k_lengths, d_q, d_k, d_v, d_o,
    d_q_rest, d_k_rest, d_v_rest, d_o_rest, scale_log2,
    H, MH, TQ, TK, LQ, RS, KW, NO, NI, first_h, first_b,
    D: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, G: gl.constexpr, GO: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """O and the log-sum-exp of BM queries of one head of one sentence: as `forward._forward_kernel`.

    d_q ... d_o  descriptors of tiles of these tensors; O is written through its own
    """
    wide: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])
    dtype: gl.constexpr = d_q.dtype
    d_q = parts_of(d_q, d_q_rest)
    d_k = parts_of(d_k, d_k_rest)
    d_v = parts_of(d_v, d_v_rest)
    d_o = parts_of(d_o, d_o_rest)
    q_own = new_ring(d_q, 1)
    k_ring = new_ring(d_k, STAGES)
    v_ring = new_ring(d_v, STAGES)
    q_full = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    mbarrier.init(q_full.index(0), count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(v_full.index(i), count=1)
    fence_async_shared()

    # The last tiles first, as in `forward._forward_kernel`.
    i_m = (gl.num_programs(0) - 1 - gl.program_id(0)) * BM
    i_h, i_b = first_h + gl.program_id(1), first_b + gl.program_id(2)
    ask(d_q, q_own, q_full, 0, i_b, i_h, i_m, True)
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
    for i in gl.static_range(STAGES):
        first = tile_start(p_entries, i, n_full, n_total, NI, BN, G)
        ask(d_k, k_ring, k_full, i, i_b, i_h, first, i < steps)
        ask(d_v, v_ring, v_full, i, i_b, i_h, first, i < steps)
    start = tile_start(p_entries, STAGES, n_full, n_total, NI, BN, G)

    no_s = gl.zeros([BM, BN], gl.float32, wide)
    b_m = gl.full([BM], NO_KEY, gl.float32, gl.SliceLayout(1, wide))
    b_l = _partial_sums(no_s)
    b_o = zeros(q_own)
    q = tile(q_own, 0)
    slot = 0
    phase = 0
    mbarrier.wait(q_full.index(0), 0)
    if inside > 0:
        mbarrier.wait(k_full.index(0), 0)
        b_s = multiply(q, tile(k_ring, 0), no_s)
        await_warps()
        ask(d_k, k_ring, k_full, 0, i_b, i_h, start, steps > STAGES)
        b_p, b_m, b_l, b_a = _probabilities(b_s, b_m, b_l, scale_log2)
        for j in range(inside - 1):
            next_start = tile_start(p_entries, j + STAGES + 1, n_full, n_total, NI, BN, G)
            p_left = b_p.to(dtype)
            next_slot, next_phase = next_stage(slot, phase, STAGES)
            mbarrier.wait(k_full.index(next_slot), next_phase)
            s = multiply(q, tile(k_ring, next_slot), no_s, is_async=True)
            mbarrier.wait(v_full.index(slot), phase)
            o = accumulate(p_left, tile(v_ring, slot), b_o)
            b_s = warpgroup_mma_wait(len(o), deps=[s])
            b_p, b_m, b_l, b_a = _probabilities(b_s, b_m, b_l, scale_log2)
            # ptxas runs products one by one if one whose result is read is still on its way into the next step.
            b_o = wait_for(o)
            await_warps()
            more_v = j + STAGES < steps
            more_k = j + STAGES + 1 < steps
            # Warps wait for one another between what is expected and the loads: once, not for each.
            mbarrier.expect(v_full.index(slot), tile_bytes(d_v), pred=more_v)
            mbarrier.expect(k_full.index(next_slot), tile_bytes(d_k), pred=more_k)
            load(d_v, v_ring, v_full.index(slot), slot, i_b, i_h, start, more_v)
            load(d_k, k_ring, k_full.index(next_slot), next_slot, i_b, i_h, next_start, more_k)
            b_o = scaled(b_o, b_a)
            start = next_start
            slot = next_slot
            phase = next_phase
        p_left = b_p.to(dtype)
        mbarrier.wait(v_full.index(slot), phase)
        b_o = wait_for(accumulate(p_left, tile(v_ring, slot), b_o))
        await_warps()
        ask(d_v, v_ring, v_full, slot, i_b, i_h, start, inside - 1 + STAGES < steps)
        slot, phase = next_stage(slot, phase, STAGES)

    # What is left: full blocks that reach past the last key, and partial blocks.
    p_words += i_mh.to(gl.int64) * KW * LQ
    o_m = i_m + gl.arange(0, BM, gl.SliceLayout(1, wide))
    for j in range(inside, steps):
        start = tile_start(p_entries, j, n_full, n_total, NI, BN, G)
        next_start = tile_start(p_entries, j + STAGES, n_full, n_total, NI, BN, G)
        m_s = keep_bits(p_words, start, o_m, q_length, k_length, LQ, RS, BM, BN, wide)
        mbarrier.wait(k_full.index(slot), phase)
        b_s = multiply(q, tile(k_ring, slot), no_s)
        b_p, b_m, b_l, b_a = _probabilities(gl.where(m_s, b_s, float("-inf")), b_m, b_l, scale_log2)
        mbarrier.wait(v_full.index(slot), phase)
        v = tile(v_ring, slot)
        if start + BN > k_length:  # padded values: not 0 · v, which is NaN if they are not finite
            clear(v, k_length - start)
        b_o = scaled(b_o, b_a)
        b_o = wait_for(accumulate(b_p.to(dtype), v, b_o))
        await_warps()
        ask(d_k, k_ring, k_full, slot, i_b, i_h, next_start, j + STAGES < steps)
        ask(d_v, v_ring, v_full, slot, i_b, i_h, next_start, j + STAGES < steps)
        slot, phase = next_stage(slot, phase, STAGES)

    b_l = gl.convert_layout(gl.sum(b_l, 1), gl.SliceLayout(1, wide))
    m_seen = b_l > 0
    b_l = gl.where(m_seen, b_l, 1.0)
    b_lse = gl.where(m_seen & (o_m < q_length), (b_m + gl.log2(b_l)) * LN2, float("-inf"))
    gl.store(p_lse + (i_b * H + i_h).to(gl.int64) * TQ + o_m, b_lse, mask=o_m < TQ)
    b_o = scaled(b_o, 1.0 / b_l)
    put(q_own, finished(b_o, 1.0, q_length - i_m))
    fence_async_shared()
    send(d_o, q_own, i_b, i_h, i_m)
    tma.store_wait(0)


def launches(q: Tensor, k: Tensor, call: Call) -> list[Launch]:
    """Launches that write the output and lse, of the tensors that `_hopper_forward_kernel` names."""
    config = HOPPER_FORWARD[q.size(3)]
    blocks = tile_blocks(config, q.size(3), ("d_q", "d_o"), ("d_k", "d_v"))
    n_tiles = ceil_div(q.size(2), config.block_q)
    return hopper_launches(_hopper_forward_kernel, q, k, call, call.query_table(), n_tiles, config, blocks)
