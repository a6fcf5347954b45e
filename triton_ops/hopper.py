"""What the kernels in Gluon for Hopper share (triton 3.6 and later).

A program reads tiles through *rings*: STAGES tiles in shared memory, which the tensor memory accelerator fills ahead.
Each *slot* of a ring has a barrier, `full`. Who asks for a tile tells the barrier how many bytes to expect; who needs
it waits for the barrier's *phase*, 0 the first time, 1 the next, and so on in turns: `next_stage` moves both on. A
tile is asked for only when all warps are done with what the slot held: they meet (`await_warps`), or tell a warp that
does nothing but load (`hopper_dkdv.py`).

Tensors have powers of two of columns, so tiles of heads of 96 elements come in *parts* of 64 and 32, and others in one.
Descriptors, rings, tiles and results [BM, D] are tuples of parts, and each part of a result is a product of its own.

Layouts say which thread holds which elements: `wide` those of scores [BM, BN] (transposed in `hopper_dkdv.py`), `tall`
those of results [BM, D]. A product with is_async returns at once: its result may be read, and its factors overwritten,
after `warpgroup_mma_wait`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from .call import Call
from .config import Config
from .launch import Launch, launches_of
from .layout import TileTable
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


@gluon.constexpr_function
def tall(columns):
    """The layout of a part of a result."""
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, columns, 16])


@gluon.constexpr_function
def matrix(part):
    """The shape of a part of a tile of a ring: rows, columns."""
    return part.shape[3:]


@gluon.jit
def parts_of(d_x, d_rest):
    """Descriptors of the parts of tiles, from those of the first part and of the rest, or None."""
    if d_rest is None:
        return (d_x,)
    else:
        return d_x, d_rest


@gluon.jit
def new_ring(d_x, STAGES: gl.constexpr):
    """A ring of STAGES tiles."""
    return [gl.allocate_shared_memory(d.dtype, [STAGES] + d.block_type.shape, d.layout) for d in d_x]


@gluon.jit
def tile(ring, slot):
    """The tile in a slot of a ring: parts [rows, columns]."""
    parts = ()  # type: Any
    for i in gl.static_range(len(ring)):
        parts += (ring[i].index(slot).reshape(matrix(ring[i])),)
    return parts


@gluon.jit
def load(d_x, ring, bar, slot, i_b, i_h, start, pred=True):
    """Load the tile of positions from `start` on, where pred is set: `bar` has been told to expect it."""
    W: gl.constexpr = ring[0].shape[4]
    for i in gl.static_range(len(ring)):
        load_tile(d_x[i], [i_b, i_h, start, i * W], bar, ring[i].index(slot), pred=pred)


@gluon.constexpr_function
def tile_bytes(d_x):
    """Bytes of a tile."""
    return sum(d.block_type.nbytes for d in d_x)


@gluon.jit
def ask(d_x, ring, full, slot, i_b, i_h, start, pred):
    """Ask for the tile of BN positions from `start` on, where pred is set; `full` of the slot says when it is there."""
    mbarrier.expect(full.index(slot), tile_bytes(d_x), pred=pred)
    load(d_x, ring, full.index(slot), slot, i_b, i_h, start, pred)


@gluon.jit
def ask_pair(d_k, d_v, k_ring, v_ring, full, slot, i_b, i_h, start, pred):
    """As `ask`, for tiles of K and V that come together."""
    mbarrier.expect(full.index(slot), 2 * tile_bytes(d_k), pred=pred)
    load(d_k, k_ring, full.index(slot), slot, i_b, i_h, start, pred)
    load(d_v, v_ring, full.index(slot), slot, i_b, i_h, start, pred)


@gluon.jit
def put(ring, b_x):
    """Put a result into the first slot of a ring. After `fence_async_shared` it can be sent."""
    x = tile(ring, 0)
    for i in gl.static_range(len(x)):
        x[i].store(b_x[i].to(x[i].dtype))


@gluon.jit
def send(d_x, ring, i_b, i_h, start):
    """Write the first slot of a ring to memory. It has left after `tma.store_wait`."""
    W: gl.constexpr = ring[0].shape[4]
    for i in gl.static_range(len(ring)):
        store_tile(d_x[i], [i_b, i_h, start, i * W], ring[i].index(0))


@gluon.jit
def zeros(ring):
    """Zeros for a result in parts as of the tiles of a ring."""
    parts = ()  # type: Any
    for i in gl.static_range(len(ring)):
        parts += (gl.zeros(matrix(ring[i]), gl.float32, tall(ring[i].shape[4])),)
    return parts


@gluon.jit
def in_registers(x, layout: gl.constexpr):
    """The parts of a tile in shared memory, each in *layout*."""
    return [part.load(layout) for part in x]


@gluon.jit
def multiply(a, b, no_s, is_async: gl.constexpr = False):
    """a · bᵀ, a sum over parts."""
    s = no_s
    for i in gl.static_range(len(a)):
        s = warpgroup_mma(a[i], b[i].permute((1, 0)), s, use_acc=i > 0, is_async=is_async or i + 1 < len(a))
    return s


@gluon.jit
def accumulate(a, b, acc):
    """acc + a · b, where only b and acc have parts. It runs asynchronously, as len(b) products."""
    parts = ()  # type: Any
    for i in gl.static_range(len(b)):
        a_left = gl.convert_layout(a, gl.DotOperandLayout(0, tall(b[i].shape[1]), 2))
        parts += (warpgroup_mma(a_left, b[i], acc[i], is_async=True),)
    return parts


@gluon.jit
def scaled(b_x, b_a):
    """A result with its rows multiplied by b_a."""
    return [part * gl.convert_layout(b_a, gl.SliceLayout(1, tall(part.shape[1])))[:, None] for part in b_x]


@gluon.jit
def rows_below(part, n):
    """Whether rows of a part of a tile or of a result come before the n-th: [rows, 1]."""
    return (gl.arange(0, part.shape[0], gl.SliceLayout(1, tall(part.shape[1]))) < n)[:, None]


@gluon.jit
def finished(b_x, scale, n):
    """A result multiplied by a number, with zeros from the n-th row on."""
    return [gl.where(rows_below(part, n), part * scale, 0.0) for part in b_x]


@gluon.jit
def clear(x, n):
    """Put zeros into a tile from the n-th row on."""
    for i in gl.static_range(len(x)):
        x[i].store(gl.where(rows_below(x[i], n), x[i].load(tall(x[i].shape[1])), 0.0))
    fence_async_shared()


@gluon.jit
def row_products(x, y, layout: gl.constexpr):
    """Inner products of the rows of two tiles, in a layout."""
    ROWS: gl.constexpr = x[0].shape[0]
    b_sum = gl.zeros([ROWS], gl.float32, layout)
    for i in gl.static_range(len(x)):
        b_x = x[i].load(tall(x[i].shape[1])).to(gl.float32)
        b_y = y[i].load(tall(y[i].shape[1])).to(gl.float32)
        b_sum += gl.convert_layout(gl.sum(b_x * b_y, 1), layout)
    return b_sum


@gluon.jit
def wait_for(products):
    """Wait for all products, and return the results of these."""
    results = warpgroup_mma_wait(0, deps=products)
    if len(products) == 1:
        return (results,)
    else:
        return results


@gluon.jit
def keep_bits(
    p_words, start, o_m, q_length, k_length, LQ, RS, BM: gl.constexpr, BN: gl.constexpr, layout: gl.constexpr
):
    """As `primitives.keep_bits`, of the BN keys from `start` on, in the layout of the scores: [BM, BN]."""
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


def tile_blocks(config: Config, dim: int, queries: Iterable[str], keys: Iterable[str]) -> dict[str, list[int]]:
    """Shapes of the parts of tiles of queries, and of tiles of keys, by the names of the descriptors.

    Those of second parts are named d_x_rest.
    """
    rows = dict.fromkeys(queries, config.block_q) | dict.fromkeys(keys, config.block_k)
    first = 1 << (dim.bit_length() - 1)
    blocks = {name: [1, 1, n, first] for name, n in rows.items()}
    if first < dim:
        blocks |= {f"{name}_rest": [1, 1, n, dim - first] for name, n in rows.items()}
    return blocks


class HopperLaunch(Launch):
    """A launch with descriptors of Gluon, which also say how tiles lie in shared memory: as products read them."""

    def __init__(self, *arguments: Any):
        super().__init__(*arguments)
        self._split = [name for name in self.kernel.arg_names if f"{name}_rest" in self.blocks]

    def __call__(self, **tensors: Tensor | None) -> None:
        for name in self._split:  # its tiles have a second part
            tensors[f"{name}_rest"] = tensors[name]
        super().__call__(**tensors)

    def _descriptor(self, x: Tensor, block: list[int]) -> TensorDescriptor:
        swizzle = 0 if len(block) == 1 else min(128, block[-1] * x.element_size())
        layout = gl.NVMMASharedLayout(swizzle, 8 * x.element_size(), len(block))
        return TensorDescriptor(x, list(x.shape), list(x.stride()), block, layout)


def hopper_launches(
    kernel: Any,
    q: Tensor,
    k: Tensor,
    call: Call,
    table: TileTable,
    n_tiles: int,
    config: Config,
    blocks: dict[str, list[int]],
    **numbers: Any,
) -> list[Launch]:
    """Launches of a kernel in Gluon over all tiles of all heads.

    table: of the lists that it follows.
    n_tiles: of a head, each for one program.
    blocks: of `tile_blocks`, and of other descriptors.
    numbers: arguments that not all of these kernels take.
    """
    batch, heads, q_size, dim = q.shape
    of_call = call.numbers()  # of which dropout and masks of offsets have no part here
    numbers |= {name: of_call[name] for name in ("MH", "KW", "LQ", "RS", "scale_log2")}
    numbers |= dict(
        H=heads, TQ=q_size, TK=k.size(2), D=dim, NO=table.entries.size(1), NI=table.entries.size(2),
        BM=config.block_q, BN=config.block_k, G=table.inner, GO=table.outer, STAGES=config.stages,
    )  # fmt: skip
    numbers |= {name: None for name in kernel.arg_names if name.endswith("_rest") and name not in blocks}
    return launches_of(kernel, n_tiles, heads, batch, numbers, config, blocks, HopperLaunch)
