"""dK and dV on Hopper, in Gluon (triton 3.6 and later): `backward._dkdv_kernel` for blocks of 64 and 128.

A warp of its own loads tiles of Q and dO into a ring of shared memory, and the products run asynchronously: scores of
the next tile while those of this one become probabilities. Scores are transposed, [keys, queries]: P and dS leave the
first products in the registers from which the second ones take them, and K and V stay in registers. Two programs share
a multiprocessor.
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
from .config import HOPPER_DKDV, ceil_div
from .descriptors import aligned_row
from .hopper import (
    accumulate,
    clear,
    finished,
    hopper_launches,
    in_registers,
    load,
    load_tile,
    multiply,
    new_ring,
    next_stage,
    parts_of,
    put,
    send,
    tile,
    tile_blocks,
    tile_bytes,
    tile_start,
    wait_for,
    zeros,
)
from .launch import Launch
from .primitives import RUN_TIME, list_lengths, sequence_length

# A program takes half of the registers of a multiprocessor. Those that the loading warp leaves go to the others.
LOADING_REGISTERS = gl.constexpr(24)
THREADS = gl.constexpr(160)  # of the five warps
FIRST_BARRIER = gl.constexpr(9)  # named barriers of the stages; Triton has the first few


@gluon.jit
def _at_barrier(HOW: gl.constexpr, slot, pred):
    gl.inline_asm_elementwise(
        "{ .reg .pred some; setp.ne.u32 some, $3, 0; @some bar." + HOW + " $1, $2; mov.u32 $0, 0; }", "=r,r,r,r",
        [slot + FIRST_BARRIER, THREADS, pred.to(gl.int32)], gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def _release(slot, pred):
    """Let the loading warp have a stage, without waiting: around an `mbarrier.arrive` all four warps would."""
    _at_barrier("arrive", slot, pred)


@gluon.jit
def _await_release(slot, pred):
    """Wait, where pred is set, until all four warps have let a stage go."""
    _at_barrier("sync", slot, pred)


@gluon.jit
def _sums(dk, dv):
    """Wait for all products; dK and dV."""
    results = wait_for(dk + dv)
    return results[: len(dk)], results[len(dk) :]


@gluon.jit
def _results(s, dk, dv):
    """As `_sums`, and the scores before them."""
    results = wait_for((s,) + dk + dv)
    return results[0], results[1 : 1 + len(dk)], results[1 + len(dk) :]


@gluon.jit
def _load(loads, lists, BM: gl.constexpr, G: gl.constexpr, STAGES: gl.constexpr):
    """Fill the rings with tiles of all listed queries, and with zeros where a tile reaches past the last query.

    This is what the loading warp does. Arguments come in tuples, as `warp_specialize` passes them on.
    """
    d_q, d_do, d_pivot, d_delta, q_ring, do_ring, pivot_ring, delta_ring, full, i_b, i_h, i_row = loads
    p_entries, n_full, n_total, NI = lists
    slot = 0
    phase = 0
    for j in range(n_total * (G // BM)):
        start = tile_start(p_entries, j, n_full, n_total, NI, BM, G)
        _await_release(slot, j >= STAGES)
        bar = full.index(slot)
        mbarrier.expect(bar, 2 * tile_bytes(d_q) + 8 * BM)
        load(d_q, q_ring, bar, slot, i_b, i_h, start)
        load(d_do, do_ring, bar, slot, i_b, i_h, start)
        load_tile(d_pivot, [i_row + start], bar, pivot_ring.index(slot))
        load_tile(d_delta, [i_row + start], bar, delta_ring.index(slot))
        slot, phase = next_stage(slot, phase, STAGES)


@gluon.jit
def _add(
    run, lists, tail, out, D: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, G: gl.constexpr, STAGES: gl.constexpr
):
    """Add what all listed queries contribute to dK and dV of BN keys, and write them: what the other four warps do.

    run      rings, K and V of the program, the barriers of both, the number of tiles without a mask
    lists    as of `_load`
    tail     what else the tiles after them need
    out      where dK and dV go
    """
    q_ring, do_ring, pivot_ring, delta_ring, k_own, v_own, full, own, n_tiles, scale_log2 = run
    p_entries, n_full, n_total, NI = lists
    p_words, q_length, LQ, RS = tail
    d_dk, d_dv, i_b, i_h, i_n, k_length, scale = out
    wide: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BM, 16])
    k_left: gl.constexpr = gl.DotOperandLayout(0, wide, 2)
    columns: gl.constexpr = gl.SliceLayout(0, wide)
    dtype: gl.constexpr = k_own[0].dtype
    n_all = n_total * (G // BM)
    no_s = gl.zeros([BN, BM], gl.float32, wide)
    b_dk = zeros(k_own)
    b_dv = zeros(v_own)
    mbarrier.wait(own, 0)
    k = tile(k_own, 0)
    v = tile(v_own, 0)
    if D <= 96:  # otherwise registers do not suffice
        k = in_registers(k, k_left)
        v = in_registers(v, k_left)
    slot = 0
    phase = 0
    if n_tiles > 0:
        mbarrier.wait(full.index(0), 0)
    b_s = multiply(k, tile(q_ring, 0), no_s)
    for j in range(n_tiles - 1):
        next_slot, next_phase = next_stage(slot, phase, STAGES)
        q = tile(q_ring, slot)
        do = tile(do_ring, slot)
        dp = multiply(v, do, no_s, is_async=True)
        pivot = pivot_ring.index(slot).load(columns)
        p = gl.exp2(b_s * scale_log2 - pivot[None, :])
        p_left = p.to(dtype)
        mbarrier.wait(full.index(next_slot), next_phase)
        s = multiply(k, tile(q_ring, next_slot), no_s, is_async=True)
        dv = accumulate(p_left, do, b_dv)
        delta = delta_ring.index(slot).load(columns)
        b_dp = warpgroup_mma_wait(2 * len(dv), deps=[dp])
        ds = p * (b_dp - delta[None, :])
        dk = accumulate(ds.to(dtype), q, b_dk)
        # ptxas runs products one by one if one whose result is read is still on its way into the next step.
        b_s, b_dk, b_dv = _results(s, dk, dv)
        _release(slot, j + STAGES < n_all)
        slot = next_slot
        phase = next_phase
    if n_tiles > 0:
        q = tile(q_ring, slot)
        do = tile(do_ring, slot)
        b_dp = multiply(v, do, no_s)
        pivot = pivot_ring.index(slot).load(columns)
        delta = delta_ring.index(slot).load(columns)
        p = gl.exp2(b_s * scale_log2 - pivot[None, :])
        ds = p * (b_dp - delta[None, :])
        dv = accumulate(p.to(dtype), do, b_dv)
        dk = accumulate(ds.to(dtype), q, b_dk)
        b_dk, b_dv = _sums(dk, dv)
        _release(slot, n_tiles - 1 + STAGES < n_all)
        slot, phase = next_stage(slot, phase, STAGES)

    # What is left: full blocks that reach past the last query, and partial blocks.
    o_n = i_n + gl.arange(0, BN, gl.SliceLayout(1, wide))
    o_x = gl.arange(0, BM, columns)
    for j in range(n_tiles, n_all):
        start = tile_start(p_entries, j, n_full, n_total, NI, BM, G)
        b_word = gl.zeros([BN, BM], gl.int32, wide)
        for i in gl.static_range(BN // 32):
            i_word = (i_n // 32 + i).to(gl.int64)
            m_x = (start + o_x < q_length) & (i_n + i * 32 < k_length)
            b_w = gl.load(p_words + i_word * LQ + ((start + o_x) >> RS), mask=m_x, other=0)
            b_word = gl.where(((o_n - i_n) // 32 == i)[:, None], b_w[None, :], b_word)
        m_s = (((b_word >> (o_n % 32)[:, None]) & 1) != 0) & (o_n < k_length)[:, None]
        mbarrier.wait(full.index(slot), phase)
        q = tile(q_ring, slot)
        do = tile(do_ring, slot)
        if start + BM > q_length:  # padded queries: not 0 · q, which is NaN if they are not finite
            clear(q + do, q_length - start)
        s = multiply(k, q, no_s, is_async=True)
        dp = multiply(v, do, no_s, is_async=True)
        pivot = pivot_ring.index(slot).load(columns)
        delta = delta_ring.index(slot).load(columns)
        b_s, b_dp = warpgroup_mma_wait(0, deps=[s, dp])
        p = gl.where(m_s, gl.exp2(b_s * scale_log2 - pivot[None, :]), 0.0)
        ds = gl.where(m_s, p * (b_dp - delta[None, :]), 0.0)
        p_left = p.to(dtype)
        ds_left = ds.to(dtype)
        dv = accumulate(p_left, do, b_dv)
        dk = accumulate(ds_left, q, b_dk)
        b_dk, b_dv = _sums(dk, dv)
        _release(slot, j + STAGES < n_all)
        slot, phase = next_stage(slot, phase, STAGES)

    put(k_own, finished(b_dk, scale, k_length - i_n))
    put(v_own, finished(b_dv, 1.0, k_length - i_n))
    fence_async_shared()
    send(d_dk, k_own, i_b, i_h, i_n)
    send(d_dv, v_own, i_b, i_h, i_n)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=RUN_TIME)
def _hopper_dkdv_kernel(
    p_words, p_entries, p_counts, p_q_lengths, p_k_lengths,
    d_q, d_k, d_v, d_do, d_dk, d_dv, d_pivot, d_delta,
    d_q_rest, d_k_rest, d_v_rest, d_do_rest, d_dk_rest, d_dv_rest, scale, scale_log2,
    H, MH, TQ, TK, TR, LQ, RS, KW, NO, NI, first_h, first_b,
    D: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, G: gl.constexpr, GO: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """dK and dV of BN keys of one head of one sentence: as `backward._dkdv_kernel`.

    d_q ... d_delta  descriptors of tiles of these tensors
    pivot, delta     float32 (B * H * TR,): what `backward._dq_kernel` writes; TR as of `descriptors.aligned_row`
    """
    i_n = gl.program_id(0) * BN
    i_h, i_b = first_h + gl.program_id(1), first_b + gl.program_id(2)
    i_row = (i_b * H + i_h) * TR
    k_length = sequence_length(p_k_lengths, i_b, TK)
    # A tile of padded keys visits no query and writes zeros.
    q_length = gl.where(i_n < k_length, sequence_length(p_q_lengths, i_b, TQ), 0)
    i_mh = gl.where(MH > 1, i_h, 0)
    i_list = (i_mh * NO + i_n // GO).to(gl.int64)
    p_entries += i_list * NI
    p_counts += i_list * (NI + 1)
    n_inside, n_full, n_total = list_lengths(p_counts, q_length, G)
    n_tiles = n_inside * (G // BM)

    d_q = parts_of(d_q, d_q_rest)
    d_k = parts_of(d_k, d_k_rest)
    d_v = parts_of(d_v, d_v_rest)
    d_do = parts_of(d_do, d_do_rest)
    d_dk = parts_of(d_dk, d_dk_rest)
    d_dv = parts_of(d_dv, d_dv_rest)
    q_ring = new_ring(d_q, STAGES)
    do_ring = new_ring(d_do, STAGES)
    k_own = new_ring(d_k, 1)
    v_own = new_ring(d_v, 1)
    pivot_ring = gl.allocate_shared_memory(gl.float32, [STAGES, BM], d_pivot.layout)
    delta_ring = gl.allocate_shared_memory(gl.float32, [STAGES, BM], d_delta.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    own = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
    mbarrier.init(own, count=1)
    fence_async_shared()
    mbarrier.expect(own, 2 * tile_bytes(d_k))
    load(d_k, k_own, own, 0, i_b, i_h, i_n)
    load(d_v, v_own, own, 0, i_b, i_h, i_n)
    lists = p_entries, n_full, n_total, NI
    loads = d_q, d_do, d_pivot, d_delta, q_ring, do_ring, pivot_ring, delta_ring, full, i_b, i_h, i_row
    run = q_ring, do_ring, pivot_ring, delta_ring, k_own, v_own, full, own, n_tiles, scale_log2
    tail = p_words + i_mh.to(gl.int64) * KW * LQ, q_length, LQ, RS
    out = d_dk, d_dv, i_b, i_h, i_n, k_length, scale
    gl.warp_specialize(
        [(_add, (run, lists, tail, out, D, BM, BN, G, STAGES)), (_load, (loads, lists, BM, G, STAGES))],
        [1],
        [LOADING_REGISTERS],
    )


def launches(q: Tensor, k: Tensor, call: Call) -> list[Launch]:
    """Launches that write dK and dV, of the tensors that `_hopper_dkdv_kernel` names."""
    config = HOPPER_DKDV[q.size(3)]
    blocks = tile_blocks(config, q.size(3), ("d_q", "d_do"), ("d_k", "d_v", "d_dk", "d_dv"))
    blocks |= dict.fromkeys(("d_pivot", "d_delta"), [config.block_q])
    kernel, n_tiles, row = _hopper_dkdv_kernel, ceil_div(k.size(2), config.block_k), aligned_row(q.size(2))
    return hopper_launches(kernel, q, k, call, call.key_table(), n_tiles, config, blocks, TR=row, scale=call.scale)
