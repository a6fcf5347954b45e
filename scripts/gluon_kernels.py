"""Backward kernels in Gluon for Hopper, an experiment: `gluon_backward.py` checks and times them.

A warp of its own loads tiles into a ring of STAGES buffers, by the tensor memory accelerator. The four other warps run
the products asynchronously: the scores of the next tile while those of this one become probabilities. Their operands
that stay are kept in registers, and P and dS leave the first products in the registers from which the second ones take
them; for dK and dV the scores are transposed to that end. Two programs share a multiprocessor.

What is missing next to `triton_ops/backward.py`: sequence lengths, blocks of which only some elements are kept,
dropout, masks of offsets, heads of other than 64 elements, strides, gradients of the log-sum-exp.

Names are those of `triton_ops/primitives.py`. `p_entries` and `p_counts` are tables of `triton_ops/layout.py`.
"""

from __future__ import annotations

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

# Names until triton 3.8, and since.
load_tile = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
barrier = getattr(gl, "barrier", None) or gl.thread_barrier

ROWS = gl.constexpr(64)  # of a tile
THREADS = gl.constexpr(160)  # of the five warps
# Registers of each: the four warps have what the fifth leaves of half a multiprocessor's, 232.
OPTIONS = dict(num_warps=4, maxnreg=128)
LOADING_REGISTERS = gl.constexpr(24)
FIRST_BARRIER = gl.constexpr(9)  # named barriers of the stages; Triton has the first few
OWN_BARRIER = gl.constexpr(6)  # that of the rows that a program keeps, counted from there


@gluon.jit
def _next_stage(slot, phase, STAGES: gl.constexpr):
    slot += 1
    wrap = slot == STAGES
    return gl.where(wrap, 0, slot), gl.where(wrap, phase ^ 1, phase)


@gluon.jit
def _release(slot, pred):
    """Let the loading warp have a buffer, without waiting: around an `mbarrier.arrive` all four warps would."""
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
def _load_queries(run, G: gl.constexpr, STAGES: gl.constexpr):
    """Load the tiles of Q and dO, of pivots and δ, of a list of blocks."""
    d_q, d_do, d_pivot, d_delta, q_ring, do_ring, pivot_ring, delta_ring, full, p_list, n_tiles, first_row = run
    PER: gl.constexpr = G // ROWS
    BYTES: gl.constexpr = d_q.block_type.nbytes + d_do.block_type.nbytes + ROWS * 8
    slot = 0
    phase = 0
    block = gl.load(p_list, mask=n_tiles > 0, other=0)
    for j in range(n_tiles):
        part = j % PER
        row = first_row + block * G + part * ROWS
        if part == PER - 1:
            block = gl.load(p_list + (j + 1) // PER, mask=j + 1 < n_tiles, other=0)
        _await_release(slot, j >= STAGES)
        bar = full.index(slot)
        mbarrier.expect(bar, BYTES)
        load_tile(d_q, [row, 0], bar, q_ring.index(slot))
        load_tile(d_do, [row, 0], bar, do_ring.index(slot))
        load_tile(d_pivot, [row], bar, pivot_ring.index(slot))
        load_tile(d_delta, [row], bar, delta_ring.index(slot))
        slot, phase = _next_stage(slot, phase, STAGES)


@gluon.jit
def _add_dkdv(run, D: gl.constexpr, STAGES: gl.constexpr):
    """Add to dK and dV of the keys what the tiles contribute."""
    q_ring, do_ring, pivot_ring, delta_ring, k_own, v_own, full, own, p_dk, p_dv, n_tiles, scale, scale_log2 = run
    wide: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, ROWS, 16])
    tall: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    left: gl.constexpr = gl.DotOperandLayout(0, tall, 2)
    k_left: gl.constexpr = gl.DotOperandLayout(0, wide, 2)
    columns: gl.constexpr = gl.SliceLayout(0, wide)
    dtype: gl.constexpr = q_ring.dtype
    no_s = gl.zeros([ROWS, ROWS], gl.float32, wide)
    dk = warpgroup_mma_init(gl.zeros([ROWS, D], gl.float32, tall))
    dv = warpgroup_mma_init(gl.zeros([ROWS, D], gl.float32, tall))
    mbarrier.wait(own, 0)
    k = k_own.load(k_left)
    v = v_own.load(k_left)
    slot = 0
    phase = 0
    if n_tiles > 0:
        mbarrier.wait(full.index(0), 0)
    b_s = warpgroup_mma(k, q_ring.index(0).permute((1, 0)), no_s, use_acc=False)
    barrier()  # else the compiler puts one into the loop
    for j in range(n_tiles - 1):
        next_slot, next_phase = _next_stage(slot, phase, STAGES)
        dp = warpgroup_mma(v, do_ring.index(slot).permute((1, 0)), no_s, use_acc=False, is_async=True)
        pivot = pivot_ring.index(slot).load(columns)
        p = gl.exp2(b_s * scale_log2 - pivot[None, :])
        p_left = gl.convert_layout(p.to(dtype), left)
        mbarrier.wait(full.index(next_slot), next_phase)
        s = warpgroup_mma(k, q_ring.index(next_slot).permute((1, 0)), no_s, use_acc=False, is_async=True)
        dv = warpgroup_mma(p_left, do_ring.index(slot), dv, is_async=True)
        delta = delta_ring.index(slot).load(columns)
        b_dp = warpgroup_mma_wait(2, deps=[dp])
        ds = p * (b_dp - delta[None, :])
        ds_left = gl.convert_layout(ds.to(dtype), left)
        dk = warpgroup_mma(ds_left, q_ring.index(slot), dk, is_async=True)
        # ptxas runs products one by one if one whose result is read is still on its way into the next step.
        b_s, b_dk, b_dv = warpgroup_mma_wait(0, deps=[s, dk, dv])
        dk = warpgroup_mma_init(b_dk)
        dv = warpgroup_mma_init(b_dv)
        _release(slot, j + STAGES < n_tiles)
        slot = next_slot
        phase = next_phase
    b_dk, b_dv = warpgroup_mma_wait(0, deps=[dk, dv])
    if n_tiles > 0:
        b_dp = warpgroup_mma(v, do_ring.index(slot).permute((1, 0)), no_s, use_acc=False)
        pivot = pivot_ring.index(slot).load(columns)
        delta = delta_ring.index(slot).load(columns)
        p = gl.exp2(b_s * scale_log2 - pivot[None, :])
        ds = p * (b_dp - delta[None, :])
        b_dv = warpgroup_mma(gl.convert_layout(p.to(dtype), left), do_ring.index(slot), b_dv)
        b_dk = warpgroup_mma(gl.convert_layout(ds.to(dtype), left), q_ring.index(slot), b_dk)
    o_n = gl.arange(0, ROWS, gl.SliceLayout(1, tall))
    o_d = gl.arange(0, D, gl.SliceLayout(0, tall))
    o_nd = o_n[:, None] * D + o_d[None, :]
    gl.store(p_dk + o_nd, (b_dk * scale).to(dtype))
    gl.store(p_dv + o_nd, b_dv.to(dtype))


@gluon.jit
def dkdv_kernel(
    d_q, d_do, d_k, d_v, d_pivot, d_delta, p_dk, p_dv, p_entries, p_counts, H, MH, T, NO, NI, scale, scale_log2,
    D: gl.constexpr, G: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """dK and dV of 64 keys of one head of one sentence, over the key table.

    d_pivot, d_delta  descriptors of what `dq_kernel` writes
    """
    i_n, i_h, i_b = gl.program_id(0), gl.program_id(1), gl.program_id(2)
    i_bh = i_b * H + i_h
    i_list = gl.where(MH > 1, i_h, 0) * NO + i_n * ROWS // G
    n_tiles = (gl.load(p_counts + i_list * (NI + 1) + NI) & 0xFFFF) * (G // ROWS)
    p_list = p_entries + i_list * NI
    q_ring = gl.allocate_shared_memory(d_q.dtype, [STAGES, ROWS, D], d_q.layout)
    do_ring = gl.allocate_shared_memory(d_q.dtype, [STAGES, ROWS, D], d_do.layout)
    k_own = gl.allocate_shared_memory(d_q.dtype, [ROWS, D], d_k.layout)
    v_own = gl.allocate_shared_memory(d_q.dtype, [ROWS, D], d_v.layout)
    pivot_ring = gl.allocate_shared_memory(gl.float32, [STAGES, ROWS], d_pivot.layout)
    delta_ring = gl.allocate_shared_memory(gl.float32, [STAGES, ROWS], d_delta.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    own = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
    mbarrier.init(own, count=1)
    fence_async_shared()
    row = i_bh * T + i_n * ROWS
    mbarrier.expect(own, 2 * d_k.block_type.nbytes)
    load_tile(d_k, [row, 0], own, k_own)
    load_tile(d_v, [row, 0], own, v_own)
    o_row = row.to(gl.int64) * D
    loads = (d_q, d_do, d_pivot, d_delta, q_ring, do_ring, pivot_ring, delta_ring, full, p_list, n_tiles, i_bh * T)
    adds = (
        q_ring, do_ring, pivot_ring, delta_ring, k_own, v_own, full, own, p_dk + o_row, p_dv + o_row, n_tiles, scale,
        scale_log2,
    )  # fmt: skip
    gl.warp_specialize(
        [(_add_dkdv, (adds, D, STAGES)), (_load_queries, (loads, G, STAGES))], [1], [LOADING_REGISTERS]
    )  # fmt: skip


@gluon.jit
def _tell(work, item, n_tiles):
    """Leave a row of tiles and their number to the other warps."""
    one: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    work.index(0).store(gl.zeros([1], gl.int32, one) + item)
    work.index(1).store(gl.zeros([1], gl.int32, one) + n_tiles)
    barrier()


@gluon.jit
def _told(work, i: gl.constexpr):
    one: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    return gl.max(work.index(i).load(one), 0)


@gluon.jit
def _load_keys(run, G: gl.constexpr, STAGES: gl.constexpr):
    """Fetch rows of tiles, and load their queries and the tiles of K and V of their lists."""
    rings, tiles, d_lse, lse_own, full, own_full, work, lists, numbers = run
    d_k, d_v, k_ring, v_ring = rings
    d_q, d_do, d_o, q_own, do_own, o_own = tiles
    p_entries, p_counts, p_counter = lists
    H, MH, T, NO, NI, n_rows, n_items = numbers
    PER: gl.constexpr = G // ROWS
    BYTES: gl.constexpr = d_k.block_type.nbytes + d_v.block_type.nbytes
    OWN_BYTES: gl.constexpr = d_q.block_type.nbytes * 3 + ROWS * 4
    slot = 0
    total = 0
    n_own = 0
    phase = 0
    item = gl.program_id(0)
    while item < n_items:
        i_m = item % n_rows
        i_bh = item // n_rows
        i_h = i_bh % H
        i_list = gl.where(MH > 1, i_h, 0) * NO + i_m * ROWS // G
        n_tiles = (gl.load(p_counts + i_list * (NI + 1) + NI) & 0xFFFF) * PER
        p_list = p_entries + i_list * NI
        block = gl.load(p_list)
        first_row = i_bh * T
        own_row = first_row + i_m * ROWS
        _await_release(OWN_BARRIER, n_own > 0)
        n_own += 1
        _tell(work, item, n_tiles)
        mbarrier.expect(own_full, OWN_BYTES)
        load_tile(d_q, [own_row, 0], own_full, q_own)
        load_tile(d_do, [own_row, 0], own_full, do_own)
        load_tile(d_o, [own_row, 0], own_full, o_own)
        load_tile(d_lse, [own_row], own_full, lse_own)
        item = gl.num_programs(0) + gl.atomic_add(p_counter, 1)
        for j in range(n_tiles):
            part = j % PER
            row = first_row + block * G + part * ROWS
            if part == PER - 1:
                block = gl.load(p_list + (j + 1) // PER, mask=j + 1 < n_tiles, other=0)
            _await_release(slot, total >= STAGES)
            total += 1
            bar = full.index(slot)
            mbarrier.expect(bar, BYTES)
            load_tile(d_k, [row, 0], bar, k_ring.index(slot))
            load_tile(d_v, [row, 0], bar, v_ring.index(slot))
            slot, phase = _next_stage(slot, phase, STAGES)
    _await_release(OWN_BARRIER, total >= 0)
    _tell(work, -1, 0)
    mbarrier.arrive(own_full, count=1)
    slot = gl.where(total >= STAGES, slot, 0)
    for _ in range(gl.minimum(total, STAGES)):
        _await_release(slot, total > 0)
        slot, phase = _next_stage(slot, phase, STAGES)
    # The last program to end leaves zeros to the next launch.
    if gl.atomic_add(p_counter + 1, 1) == gl.num_programs(0) - 1:
        gl.store(p_counter, 0)
        gl.store(p_counter + 1, 0)


@gluon.jit
def _add_dq(run, D: gl.constexpr, STAGES: gl.constexpr):
    """Add to dQ what the tiles contribute, of one row of tiles after the other."""
    k_ring, v_ring, q_own, do_own, o_own, lse_own, bars, work, results, T, n_rows, scale, scale_log2 = run
    full, own_full = bars
    p_pivot, p_delta, p_dq = results
    wide: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, ROWS, 16])
    tall: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    left: gl.constexpr = gl.DotOperandLayout(0, tall, 2)
    q_left: gl.constexpr = gl.DotOperandLayout(0, wide, 2)
    rows: gl.constexpr = gl.SliceLayout(1, wide)
    dtype: gl.constexpr = k_ring.dtype
    no_s = gl.zeros([ROWS, ROWS], gl.float32, wide)
    o_m = gl.arange(0, ROWS, rows)
    o_t = gl.arange(0, ROWS, gl.SliceLayout(1, tall))
    o_d = gl.arange(0, D, gl.SliceLayout(0, tall))
    o_md = o_t[:, None] * D + o_d[None, :]
    slot = 0
    phase = 0
    own_phase = 0
    mbarrier.wait(own_full, 0)
    item = _told(work, 0)
    while item >= 0:
        n_tiles = _told(work, 1)
        row = ((item // n_rows) * T + (item % n_rows) * ROWS).to(gl.int64)
        lse = lse_own.load(rows)
        pivot = gl.where(lse == float("-inf"), float("inf"), lse * 1.4426950408889634)
        o = o_own.load(tall)
        g = do_own.load(tall)
        delta = gl.convert_layout(gl.sum(o.to(gl.float32) * g.to(gl.float32), 1), rows)
        q = q_own.load(q_left)
        do = do_own.load(q_left)
        _release(OWN_BARRIER, item >= 0)
        gl.store(p_pivot + row + o_m, pivot)
        gl.store(p_delta + row + o_m, delta)
        b_dq = gl.zeros([ROWS, D], gl.float32, tall)
        if n_tiles > 0:
            dq = warpgroup_mma_init(b_dq)
            mbarrier.wait(full.index(slot), phase)
            b_s = warpgroup_mma(q, k_ring.index(slot).permute((1, 0)), no_s, use_acc=False)
            barrier()
            for _ in range(n_tiles - 1):
                next_slot, next_phase = _next_stage(slot, phase, STAGES)
                dp = warpgroup_mma(do, v_ring.index(slot).permute((1, 0)), no_s, use_acc=False, is_async=True)
                p = gl.exp2(b_s * scale_log2 - pivot[:, None])
                mbarrier.wait(full.index(next_slot), next_phase)
                s = warpgroup_mma(q, k_ring.index(next_slot).permute((1, 0)), no_s, use_acc=False, is_async=True)
                b_dp = warpgroup_mma_wait(1, deps=[dp])
                ds = p * (b_dp - delta[:, None])
                ds_left = gl.convert_layout(ds.to(dtype), left)
                dq = warpgroup_mma(ds_left, k_ring.index(slot), dq, is_async=True)
                b_s, b_dq = warpgroup_mma_wait(0, deps=[s, dq])
                dq = warpgroup_mma_init(b_dq)
                _release(slot, n_tiles > 0)
                slot = next_slot
                phase = next_phase
            b_dq = warpgroup_mma_wait(0, deps=[dq])
            b_dp = warpgroup_mma(do, v_ring.index(slot).permute((1, 0)), no_s, use_acc=False)
            p = gl.exp2(b_s * scale_log2 - pivot[:, None])
            ds = p * (b_dp - delta[:, None])
            b_dq = warpgroup_mma(gl.convert_layout(ds.to(dtype), left), k_ring.index(slot), b_dq)
            _release(slot, n_tiles > 0)
            slot, phase = _next_stage(slot, phase, STAGES)
        gl.store(p_dq + row * D + o_md, (b_dq * scale).to(dtype))
        own_phase ^= 1
        mbarrier.wait(own_full, own_phase)
        item = _told(work, 0)


@gluon.jit
def dq_kernel(
    d_q, d_do, d_o, d_k, d_v, d_lse, p_pivot, p_delta, p_dq, p_entries, p_counts, p_counter, H, MH, T, NO, NI, n_rows,
    n_items, scale, scale_log2, D: gl.constexpr, G: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """dQ, pivots and δ of rows of 64 queries over the query table: of one after the other, as programs get ready.

    p_pivot          written: log2 of what exponentials are divided by, infinity where nothing is visible
    p_counter        int32 (2,), zeros, and left so
    n_rows, n_items  rows of tiles of one head, and of all heads of all sentences
    """
    k_ring = gl.allocate_shared_memory(d_q.dtype, [STAGES, ROWS, D], d_k.layout)
    v_ring = gl.allocate_shared_memory(d_q.dtype, [STAGES, ROWS, D], d_v.layout)
    q_own = gl.allocate_shared_memory(d_q.dtype, [ROWS, D], d_q.layout)
    do_own = gl.allocate_shared_memory(d_q.dtype, [ROWS, D], d_do.layout)
    o_own = gl.allocate_shared_memory(d_q.dtype, [ROWS, D], d_o.layout)
    lse_own = gl.allocate_shared_memory(gl.float32, [ROWS], d_lse.layout)
    work = gl.allocate_shared_memory(gl.int32, [2, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    own_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
    mbarrier.init(own_full, count=1)
    fence_async_shared()
    loads = (
        (d_k, d_v, k_ring, v_ring), (d_q, d_do, d_o, q_own, do_own, o_own), d_lse, lse_own, full, own_full, work,
        (p_entries, p_counts, p_counter), (H, MH, T, NO, NI, n_rows, n_items),
    )  # fmt: skip
    adds = (
        k_ring, v_ring, q_own, do_own, o_own, lse_own, (full, own_full), work, (p_pivot, p_delta, p_dq), T, n_rows,
        scale, scale_log2,
    )  # fmt: skip
    gl.warp_specialize(
        [(_add_dq, (adds, D, STAGES)), (_load_keys, (loads, G, STAGES))], [1], [LOADING_REGISTERS]
    )  # fmt: skip
