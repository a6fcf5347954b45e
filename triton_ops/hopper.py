"""What the kernels in Gluon for Hopper share (triton 3.6 and later)."""

from __future__ import annotations

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from .launch import Launch
from .primitives import listed_start

# Their names from triton 3.8 on, and before.
load_tile = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
store_tile = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global
await_warps = getattr(gl, "barrier", None) or gl.thread_barrier


@gluon.jit
def next_stage(slot, phase, STAGES: gl.constexpr):
    """Slot of a ring after this one, and the phase of its barrier."""
    slot += 1
    wrap = slot == STAGES
    return gl.where(wrap, 0, slot), gl.where(wrap, phase ^ 1, phase)


@gluon.jit
def tile_start(p_entries, j, n_full, n_total, NI, STEP: gl.constexpr, G: gl.constexpr):
    """As `primitives.listed_start`, of the j-th tile of STEP positions along the list."""
    return listed_start(p_entries, j * STEP, n_full, n_total, NI, G)


@gluon.jit
def ask(d_x, ring, full, slot, i_b, i_h, start, pred):
    """Ask for a tile, where pred is set; `full` says when it is there."""
    mbarrier.expect(full.index(slot), d_x.block_type.nbytes, pred=pred)
    load_tile(d_x, [i_b, i_h, start, 0], full.index(slot), ring.index(slot), pred=pred)


@gluon.jit
def ask_pair(d_k, d_v, k_ring, v_ring, full, slot, i_b, i_h, start, pred):
    """As `ask`, for tiles of K and V that come together."""
    mbarrier.expect(full.index(slot), 2 * d_k.block_type.nbytes, pred=pred)
    load_tile(d_k, [i_b, i_h, start, 0], full.index(slot), k_ring.index(slot), pred=pred)
    load_tile(d_v, [i_b, i_h, start, 0], full.index(slot), v_ring.index(slot), pred=pred)


@gluon.jit
def keep_bits(
    p_words, start, o_m, q_length, k_length, LQ, RS, BM: gl.constexpr, BN: gl.constexpr, layout: gl.constexpr
):
    """As `primitives.keep_bits`, of the keys from `start` on."""
    o_n = gl.arange(0, BN, gl.SliceLayout(0, layout))
    b_bits = gl.zeros([BM, BN], gl.int32, layout)
    for i in gl.static_range(BN // 32):
        i_key = start + i * 32
        p_word = p_words + (i_key // 32).to(gl.int64) * LQ + (o_m >> RS)
        b_w = gl.load(p_word, mask=(o_m < q_length) & (i_key < k_length), other=0)
        n_keys = gl.minimum(gl.maximum(k_length - i_key, 0), 32)
        b_w = b_w & gl.where(n_keys == 32, -1, (1 << (n_keys % 32)) - 1)
        b_bits = gl.where((o_n // 32 == i)[None, :], b_w[:, None], b_bits)
    return ((b_bits >> (o_n % 8)[None, :]) & (1 << (o_n % 32 // 8 * 8))[None, :]) != 0


class HopperLaunch(Launch):
    """A launch whose descriptors say how tiles lie in shared memory."""

    def _descriptor(self, x: Tensor, block: list[int]) -> TensorDescriptor:
        swizzle = 0 if len(block) == 1 else min(128, block[-1] * x.element_size())
        layout = gl.NVMMASharedLayout(swizzle, 8 * x.element_size(), len(block))
        return TensorDescriptor(x, list(x.shape), list(x.stride()), block, layout)
