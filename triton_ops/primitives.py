"""Device helpers shared by the kernels.

One code of names for all kernels:

    B H D                 sentences, heads, head size; BD: D rounded up to a power of two
    TQ TK                 queries and keys of a call
    BM BN BW              queries, keys, hypotheses of a tile; STEP: positions of one step of a loop
    MH                    heads of the mask: H, or 1 if all share it
    KW LQ RS              packed mask (MH, KW, LQ): KW words of 32 keys; LQ rows, each for 2^RS queries. In decode.py
                          LQ: rows of the mask
    p_anchor SLOPE        of a mask of offsets (`offsets.py`), of the head: anchor and slope; None and 0 for other masks
    G GO                  sizes of the blocks in tile lists, and of the outer tiles that have the lists
    TR                    TQ, or as many as make rows of p_delta and p_pivot begin where tiles can be read
    NO NI                 outer tiles of a tile table, inner blocks of each
    W                     keys that one word serves in a step
    p_ d_ s_              pointer, descriptor, stride: s_qb s_qh s_qt of sentence, head and position of Q
    i_ o_ m_ b_           program or loop index, offsets, mask, block value
    _q _k _v _o _g        Q, K, V, output, gradient of the output (strides; p_do: its pointer); _d...: gradient of
    threshold             a cell is dropped where its random number is below; inverse_keep: 1 / (1 - p)
    DROPOUT PRECISION     whether there is dropout; how products are taken (`config.precision`)
    INT32_OFFSETS         whether 32-bit offsets find the rows of a head (`config.int32_offsets`)

Positions are int32, addresses int64.
"""

import triton
import triton.language as tl

from .offsets import SLOPE_BITS
from .reference import PHILOX_ROUNDS

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# Pivot of a row that has seen no key: finite, so that exp2(-inf - pivot) is 0 and never NaN.
NO_KEY = tl.constexpr(-1.0e38)
ROUNDS = tl.constexpr(PHILOX_ROUNDS)
BITS = tl.constexpr(SLOPE_BITS)
HALF = tl.constexpr(1 << (SLOPE_BITS - 1))
# Arguments of the kernels over tiles that differ from call to call: no value of them compiles a kernel of its own.
RUN_TIME = ["H", "MH", "TQ", "TK", "LQ", "RS", "KW", "SLOPE", "NO", "NI", "first_h", "first_b", "threshold", "TR"]


@triton.jit
def let_next_start(OVERLAP: tl.constexpr):
    """From here on the next kernel may start, up to where it waits: see `config.overlap`."""
    if OVERLAP:
        tl.inline_asm_elementwise("griddepcontrol.launch_dependents; // $0", "=r", [], tl.int32, is_pure=False, pack=1)


@triton.jit
def wait_for_previous(OVERLAP: tl.constexpr):
    """Wait until the kernels before are done; what they write must not be read before."""
    if OVERLAP:
        tl.inline_asm_elementwise("griddepcontrol.wait; // $0", "=r", [], tl.int32, is_pure=False, pack=1)


@triton.jit
def dot(b_a, b_b, PRECISION: tl.constexpr):
    """b_a · b_b, accumulated in float32."""
    if PRECISION == "upcast":  # the interpreter has no bfloat16 product
        b_a, b_b = b_a.to(tl.float32), b_b.to(tl.float32)
    return tl.dot(b_a, b_b, input_precision="ieee" if PRECISION == "upcast" else PRECISION)


@triton.jit
def dot_add(b_a, b_b, b_c, PRECISION: tl.constexpr):
    """b_a · b_b + b_c, accumulated in float32."""
    if PRECISION == "upcast":
        b_a, b_b = b_a.to(tl.float32), b_b.to(tl.float32)
    return tl.dot(b_a, b_b, b_c, input_precision="ieee" if PRECISION == "upcast" else PRECISION)


@triton.jit
def sequence_length(p_lengths, i_b, T):
    """Valid positions of sentence i_b, at most T whatever the tensor says: never an address out of bounds."""
    length = T
    if p_lengths is not None:
        # Clamped in its own type: int64 beyond 2^31 would wrap.
        length = tl.minimum(tl.maximum(tl.load(p_lengths + i_b), 0), T).to(tl.int32)
    return length


@triton.jit
def diagonal(o_m, length, SLOPE):
    """The centres of queries o_m in a sentence of `length` keys: round(SLOPE · o_m / 2^BITS), at most the last key."""
    return tl.minimum((o_m.to(tl.int64) * SLOPE + HALF) >> BITS, length - 1).to(tl.int32)


@triton.jit
def anchored(p_anchor, i_centre, length):
    """The keys of the anchor of a head for queries with these centres."""
    return tl.minimum(tl.maximum(i_centre + tl.load(p_anchor), 0), length - 1)


@triton.jit
def list_lengths(p_counts, length, G: tl.constexpr):
    """(full blocks wholly below `length`, full blocks begun below it, all blocks begun below it)."""
    inside = tl.load(p_counts + length // G)
    begun = tl.load(p_counts + (length + G - 1) // G)
    n_full = begun & 0xFFFF
    return inside & 0xFFFF, n_full, n_full + (begun >> 16)


@triton.jit
def full_positions(p_entries, i_step, n_blocks, STEP: tl.constexpr, G: tl.constexpr):
    """The i_step-th STEP of the first n_blocks full blocks: several gathered blocks, or part of one.

    Returns (start, offset, which positions exist) with positions start + offset, [STEP]. Past the end they are those of
    the last block again, which can be read and must not count; inside a loop that happens only if STEP > G. Only start
    changes from step to step. It is put together from scalar loads: the elements of a thread that lie in one block
    share their address arithmetic.

    A load that the loads of rows wait for takes one of their pipeline stages: where that matters, read it a step ahead.
    """
    o_x = tl.arange(0, STEP)
    m_x = tl.full([STEP], True, dtype=tl.int1)
    if G == 1:
        slot = i_step * STEP + o_x
        m_x = slot < n_blocks
        start = tl.load(p_entries + tl.maximum(tl.minimum(slot, n_blocks - 1), 0))  # a row has at least one entry
    elif STEP > G:
        slot = i_step * (STEP // G)
        start = tl.zeros([STEP], dtype=tl.int32) + _block_start(p_entries, slot, n_blocks, G)
        for j in tl.static_range(1, STEP // G):
            start = tl.where(o_x // G == j, _block_start(p_entries, slot + j, n_blocks, G), start)
            m_x &= (o_x // G != j) | (slot + j < n_blocks)
    else:
        first = i_step * STEP
        start = _block_start(p_entries, first // G, n_blocks, G) + first % G
    return start, o_x % G, m_x


@triton.jit
def _block_start(p_entries, slot, n_blocks, G: tl.constexpr):
    """Position of a full block, or of the last one; 0 where there is none."""
    return tl.load(p_entries + tl.minimum(slot, n_blocks - 1), mask=n_blocks > 0, other=0) * G


@triton.jit
def listed_start(p_entries, first, n_full, n_total, N_INNER, G: tl.constexpr):
    """Position of the first-th listed cell along the list, full blocks before partial ones; 0 past the end."""
    slot = first // G
    # Full blocks are listed from the left end of the row, partial ones from the right end.
    entry = tl.where(slot < n_full, slot, N_INNER - 1 - (slot - n_full))
    return tl.load(p_entries + entry, mask=slot < n_total, other=0) * G + first % G


@triton.jit
def listed_positions(p_entries, first, n_full, n_total, length, N_INNER, STEP: tl.constexpr, G: tl.constexpr):
    """As `full_positions` for the STEP cells from the first-th on along the list of all blocks."""
    o_x = tl.arange(0, STEP)
    if G == 1:
        start = listed_start(p_entries, first + o_x, n_full, n_total, N_INNER, G)
    elif STEP > G:
        start = tl.zeros([STEP], dtype=tl.int32)
        for j in tl.static_range(STEP // G):
            i_start = listed_start(p_entries, first + j * G, n_full, n_total, N_INNER, G)
            start = tl.where(o_x // G == j, i_start, start)
    else:
        start = listed_start(p_entries, first, n_full, n_total, N_INNER, G)
    m_x = (first + o_x < n_total * G) & (start + o_x % G < length)
    return start, o_x % G, m_x


@triton.jit
def any_kept(m_s):
    """Whether any cell of a tile (BM, BN) is kept."""
    return tl.max(tl.max(m_s.to(tl.int32), 1), 0) > 0


@triton.jit
def positions(first, length, STEP: tl.constexpr):
    """As `listed_positions` for masks of offsets, which have no lists: the STEP positions from `first` on."""
    o_x = tl.arange(0, STEP)
    return first, o_x, first + o_x < length


@triton.jit
def load_rows(
    p_x, stride, start, o_x, m_x, INT32_OFFSETS: tl.constexpr, G: tl.constexpr, D: tl.constexpr, BD: tl.constexpr
):
    """Rows start + o_x of p_x, [STEP, BD], 0 where m_x is not set; None: all exist.

    What depends on o_x alone leaves the loop: pointers, or if INT32_OFFSETS (`config.int32_offsets`) 32-bit offsets,
    which two tensors share.
    """
    if not INT32_OFFSETS:
        start, o_x = start.to(tl.int64), o_x.to(tl.int64)
    o_d = tl.arange(0, BD)
    o_tile = o_x[:, None] * stride + o_d[None, :]
    o_start = start * stride
    if o_x.shape[0] > G:
        o_start = o_start[:, None]
    if INT32_OFFSETS:
        p_tile = p_x + (o_start + o_tile)
    else:
        p_tile = p_x + o_tile + o_start
    if m_x is not None:
        b_x = tl.load(p_tile, mask=m_x[:, None] & (o_d < D)[None, :], other=0.0)
    elif BD > D:
        b_x = tl.load(p_tile, mask=(o_d < D)[None, :], other=0.0)
    else:
        b_x = tl.load(p_tile)
    return b_x


@triton.jit
def load_tile(
    d_x, i_b, i_h, p_x, stride, start, o_x,
    INT32_OFFSETS: tl.constexpr, STEP: tl.constexpr, G: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Rows start + o_x of a head, which exist, [STEP, BD]: by descriptor (`descriptors.tile_block`) if there is one."""
    if d_x is not None:
        b_x = d_x.load([i_b, i_h, start, 0]).reshape([STEP, BD])
    else:
        b_x = load_rows(p_x, stride, start, o_x, None, INT32_OFFSETS, G, D, BD)
    return b_x


@triton.jit
def _existing(b_w, i_key, length, W: tl.constexpr):
    """Words shifted so that key i_key is bit 0, without the bits of keys at or past `length`."""
    n_keys = tl.minimum(tl.maximum(length - i_key, 0), W)
    return (b_w >> (i_key % 32)) & tl.where(n_keys == 32, -1, (1 << (n_keys % 32)) - 1)


@triton.jit
def _test_bits(b_bits, o_n, W: tl.constexpr):
    """Bit o_n % W of every word. Split so that a thread shifts once and then tests constant bits."""
    return ((b_bits >> (o_n % 8)[None, :]) & (1 << (o_n % W // 8 * 8))[None, :]) != 0


@triton.jit
def keep_bits(
    p_words, o_m, m_m, p_entries, first, n_full, n_total, length, N_INNER, LQ, RS, STEP: tl.constexpr, G: tl.constexpr
):
    """Keep bits of query rows o_m and the keys of `listed_positions`, False where one does not exist, [BM, STEP].

    One load of [BM] words serves W keys: the words of neighbouring rows are neighbours in memory, or one word
    where groups of 2^RS rows share theirs.
    """
    SIDE: tl.constexpr = STEP if STEP < G else G  # before triton 3.6 there is no min() of constants
    W: tl.constexpr = SIDE if SIDE < 32 else 32
    o_n = tl.arange(0, STEP)
    b_bits = tl.zeros([o_m.shape[0], STEP], dtype=tl.int32)
    for j in tl.static_range(STEP // W):
        i_cell = first + j * W
        i_key = listed_start(p_entries, i_cell, n_full, n_total, N_INNER, G)
        i_word = i_key // 32
        if G > 32:  # the last block may reach past the last word
            i_word = tl.minimum(i_key, length - 1) // 32
        b_w = tl.load(p_words + i_word.to(tl.int64) * LQ + (o_m >> RS), mask=m_m, other=0)  # [BM]
        b_w = _existing(b_w, i_key, tl.where(i_cell < n_total * G, length, 0), W)
        b_bits = tl.where((o_n // W == j)[None, :], b_w[:, None], b_bits)
    return _test_bits(b_bits, o_n, W)


@triton.jit
def keep_bits_of_keys(
    p_words, o_m, m_m, p_entries, first, n_full, n_total, length, N_INNER, LQ, RS, STEP: tl.constexpr
):
    """As `keep_bits` for blocks of one key: each has a word of its own."""
    o_cell = first + tl.arange(0, STEP)
    i_key = listed_start(p_entries, o_cell, n_full, n_total, N_INNER, 1)
    m_key = (o_cell < n_total) & (i_key < length)
    p_word = p_words + ((i_key // 32).to(tl.int64) * LQ)[None, :] + (o_m >> RS)[:, None]
    b_w = tl.load(p_word, mask=m_m[:, None] & m_key[None, :], other=0)  # [BM, STEP]
    return ((b_w >> (i_key % 32)[None, :]) & 1) != 0


@triton.jit
def keep_bits_by_key(p_words, p_anchor, i_n, o_m, m_m, length, KW, LQ, RS, SLOPE, BN: tl.constexpr):
    """Keep bits of query rows o_m and keys i_n ... i_n + BN - 1, False where one does not exist, [BM, BN].

    Those of offsets are a window of their table, which begins where the centre says; `length` is that of the sentence.
    """
    W: tl.constexpr = BN if BN < 32 else 32
    o_n = tl.arange(0, BN)
    o_row = o_m >> RS
    if p_anchor is not None:
        i_centre = diagonal(o_m, length, SLOPE)
        o_row = KW * 16 - i_centre  # offset 0 is in the middle
    b_bits = tl.zeros([o_m.shape[0], BN], dtype=tl.int32)
    for j in tl.static_range(BN // W):
        i_key = i_n + j * W
        # Words exist for keys below `length` only.
        m_w = m_m & (o_m * 0 + i_key < length)
        b_w = tl.load(p_words + (i_key // 32) * LQ.to(tl.int64) + o_row, mask=m_w, other=0)  # [BM]
        b_bits = tl.where((o_n // W == j)[None, :], _existing(b_w, i_key, length, W)[:, None], b_bits)
    m_s = _test_bits(b_bits, o_n, W)
    if p_anchor is not None:
        m_s |= m_m[:, None] & ((i_n + o_n)[None, :] == anchored(p_anchor, i_centre, length)[:, None])
    return m_s


@triton.jit
def masked_keys(
    p_words, p_anchor, p_entries, first, o_m, m_m, n_full, n_total, length, NI, KW, LQ, RS, SLOPE,
    BN: tl.constexpr, G: tl.constexpr,
):  # fmt: skip
    """(start, offset, which keys exist, [BN], which cells are kept, [BM, BN]) for the BN keys from the first-th on.

    Of those listed for the queries o_m, or under a mask of offsets of all.
    """
    if p_anchor is not None:
        start, o_x, m_n = positions(first, length, BN)
        m_s = keep_bits_by_key(p_words, p_anchor, first, o_m, m_m, length, KW, LQ, RS, SLOPE, BN)
    else:
        start, o_x, m_n = listed_positions(p_entries, first, n_full, n_total, length, NI, BN, G)
        if G == 1:
            m_s = keep_bits_of_keys(p_words, o_m, m_m, p_entries, first, n_full, n_total, length, NI, LQ, RS, BN)
        else:
            m_s = keep_bits(p_words, o_m, m_m, p_entries, first, n_full, n_total, length, NI, LQ, RS, BN, G)
    return start, o_x, m_n, m_s


@triton.jit
def dropout_bits(seed, i_bh, o_row, o_col, threshold):
    """Keep bits of dropout for broadcast positions o_row, o_col; `reference.dropout_keep` defines them.

    The counters repeat over the four cells that share a call; in an accumulator layout one thread holds
    these cells and the compiler merges the equal computations.
    """
    # The sums with 0 only broadcast: Philox wants counters of one shape.
    zero = (o_row + o_col) * 0
    c0 = (o_row >> 4) * 8 + (o_row & 7) + zero
    c1 = (o_col >> 4) * 8 + (o_col & 7) + zero
    r0, r1, r2, r3 = tl.philox(seed, c0, c1, zero + i_bh, zero, ROUNDS)
    odd_row = ((o_row >> 3) & 1) == 1
    odd_col = ((o_col >> 3) & 1) == 1
    bits = tl.where(odd_row, tl.where(odd_col, r3, r2), tl.where(odd_col, r1, r0))
    return (bits >> 1).to(tl.int32, bitcast=True) >= threshold
