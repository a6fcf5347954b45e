"""Masks of offsets from a scaled diagonal: the kernels against the definition, sentence by sentence."""

from fractions import Fraction

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from triton_ops import OffsetLayout, block_sparse_attention, decode_attention
from triton_ops.offsets import SLOPE_BITS
from triton_ops.ops import attention_op, decode_op
from triton_ops.testing import (
    assert_decode_within_budget,
    assert_within_budget,
    make_case,
    run_kernels,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32


def mask_of_offsets(number, heads, reach, density):
    """(keep (heads, 2 reach + 1), anchor (heads,)), random; the first head keeps its anchor alone."""
    draw = np.random.default_rng(number)
    keep = draw.random((heads, 2 * reach + 1)) < density
    keep[0] = False
    anchor = draw.integers(-reach, reach + 1, heads)
    keep[np.arange(heads), anchor + reach] = True
    return torch.from_numpy(keep), torch.from_numpy(anchor)


def definition(keep, slope, anchor, n_queries, n_keys, lengths):
    """The kept cells of sentences of *lengths* keys: bool (B, heads, n_queries, n_keys)."""
    reach, slope = keep.size(1) // 2, Fraction(slope, 1 << SLOPE_BITS)
    cells = np.zeros((len(lengths), len(keep), n_queries, n_keys), dtype=bool)
    wide = np.pad(keep.numpy(), [(0, 0), (n_keys, n_keys)], constant_values=True)
    for b, length in enumerate(lengths):
        for i in range(n_queries if length else 0):
            centre = min(int(slope * i + Fraction(1, 2)), length - 1)
            first = max(n_keys + reach - centre, 0)
            row = wide[:, first : first + n_keys]
            cells[b, :, i, : row.shape[1]] = row
            cells[b, np.arange(len(keep)), i, np.clip(centre + anchor.numpy(), 0, length - 1)] = True
    return torch.from_numpy(cells)


def problem(number, heads=2, reach=9, density=0.3, slope=Fraction(9, 10), k_size=40):
    """The arguments of a mask, and its layout."""
    keep, anchor = mask_of_offsets(number, heads, reach, density)
    slope = round(slope * (1 << SLOPE_BITS))
    return (keep, slope, anchor), OffsetLayout.from_offsets(keep, slope, anchor, k_size).to(DEVICE)


SLOPES = [Fraction(0), Fraction(1), Fraction(13, 17), Fraction(29, 10), Fraction(1, 2)]


@st.composite
def cases(draw, variant, sizes, most=3):
    dtype, dim, dropout_p = variant
    batch, heads = draw(st.integers(1, most)), draw(st.integers(1, 2))
    n_queries, n_keys = draw(sizes)
    number, reach = draw(st.integers(0, 10**6)), draw(st.sampled_from([0, 3, 20, n_keys, 2 * n_keys]))
    options = dict(reach=reach, density=draw(st.sampled_from([0.1, 0.5, 1.0])), slope=draw(st.sampled_from(SLOPES)))
    mask, layout = problem(number, draw(st.sampled_from([1, heads])), k_size=n_keys, **options)
    generator = torch.Generator().manual_seed(number)
    k_lengths = torch.randint(1, n_keys + 1, (batch,), generator=generator)
    k_lengths[0] = draw(st.sampled_from([1, n_keys, int(k_lengths[0])]))
    q_lengths = torch.randint(0, n_queries + 1, (batch,), generator=generator) if draw(st.booleans()) else None
    if draw(st.booleans()):
        k_lengths = None
    lengths = [n_keys] * batch if k_lengths is None else k_lengths.tolist()
    return make_case(
        batch=batch, heads=heads, q_size=n_queries, k_size=n_keys, dim=dim, dtype=dtype, seed=number,
        keep=definition(*mask, n_queries, n_keys, lengths), offsets=layout, q_lengths=q_lengths, k_lengths=k_lengths,
        dropout_p=dropout_p, scale=dim**-0.5, use_lse=draw(st.booleans()), device=DEVICE,
    )  # fmt: skip


VARIANTS = [(F16, 64, 0.0), (BF16, 32, 0.1), (F32, 16, 0.0)]
SMALL = st.one_of(
    st.tuples(st.integers(1, 32), st.integers(1, 32)),
    st.tuples(st.integers(1, 64), st.integers(33, 64)),
    st.tuples(st.integers(1, 128), st.integers(1, 128)),
)
LONG = st.one_of(
    st.tuples(st.integers(1, 20), st.integers(129, 200)),
    st.tuples(st.integers(129, 170), st.integers(1, 20)),
    st.tuples(st.integers(70, 130), st.integers(129, 150)),
)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize(("sizes", "examples", "most"), [(SMALL, 12, 3), (LONG, 5, 1)], ids=["sentence", "long"])
def test_forward_and_backward_stay_within_the_float64_budget(sizes, examples, most, variant):
    random_case = given(cases(variant, sizes, most))
    check = settings(max_examples=examples)(random_case(lambda case: assert_within_budget(case)))
    hypothesis.seed(VARIANTS.index(variant) + most)(check)()


@pytest.mark.parametrize("lengths", [[1, 2, 33, 60], [60, 59, 5, 0], None], ids=str)
@pytest.mark.parametrize("reach", [0, 4, 90])
def test_the_dense_mask_is_that_of_the_definition(reach, lengths):
    """Also past the recorded offsets, past the source, where it moves anchors; in layouts for longer sources, too."""
    for k_size in (60, 300):
        mask, layout = problem(reach, heads=3, reach=reach, k_size=k_size, slope=Fraction(13, 10))
        given = None if lengths is None else torch.tensor(lengths, device=DEVICE)
        expected = definition(*mask, 70, 60, lengths or [60]).to(DEVICE)
        got = layout.keep_mask(70, 60, given)
        row = layout.keep_row(torch.tensor([69], device=DEVICE), 60, given)
        for b, length in enumerate(lengths or [60]):
            assert torch.equal(got[b, ..., :length], expected[b, ..., :length])
            assert torch.equal(row[b, ..., :length], expected[b, :, 69, :length])
    assert layout.k_size == 320 and layout.to(DEVICE).words is layout.words


def run(mask, layout, n_queries, n_keys, lengths, **options):
    options = dict(dtype=F32, dim=16, scale=0.25) | options
    case = make_case(
        batch=len(lengths), heads=len(mask[0]), q_size=n_queries, k_size=n_keys, offsets=layout, device=DEVICE,
        keep=definition(*mask, n_queries, n_keys, lengths), k_lengths=torch.tensor(lengths), **options,
    )  # fmt: skip
    return case, run_kernels(case)


@pytest.mark.parametrize("n_keys", [40, 140])
def test_two_runs_give_the_same_bits(n_keys):
    mask, layout = problem(1, k_size=n_keys)
    runs = [run(mask, layout, 40, n_keys, [n_keys, 7], dtype=F16, dropout_p=0.3)[1] for _ in range(2)]
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])


@pytest.mark.parametrize("n_keys", [40, 140])
def test_a_head_that_keeps_its_anchor_alone_copies_one_value(n_keys):
    (keep, slope, anchor), layout = problem(2, reach=n_keys, density=0.0, k_size=n_keys)
    case, got = run((keep, slope, anchor), layout, 40, n_keys, [n_keys, 5, 1], dtype=F16)
    for b, length in enumerate([n_keys, 5, 1]):
        for i in (0, 3, 39):
            centre = min(int(Fraction(slope, 1 << SLOPE_BITS) * i + Fraction(1, 2)), length - 1)
            place = np.clip(centre + anchor.numpy(), 0, length - 1)
            assert torch.equal(got["out"][b, :, i], case.v[b, [0, 1], place])


def test_tiles_of_which_no_offset_is_kept_are_not_read():
    """Above the sizes of the sentence kernels, forward and backward: NaN there reaches nothing."""
    keep = torch.zeros(1, 1001, dtype=torch.bool)
    keep[:, 495:506] = True
    layout = OffsetLayout.from_offsets(keep, 1 << SLOPE_BITS, torch.tensor([0]), 300).to(DEVICE)
    clean = [torch.randn(1, 1, 300, 16, device=DEVICE) for _ in range(3)]
    n = 60  # queries: keys from 128 on are in tiles of which they keep nothing
    dirty = [clean[0], *(torch.cat([x[:, :, :128], x[:, :, 128:] * torch.nan], 2) for x in clean[1:])]
    results = []
    for q, k, v in (clean, dirty):
        inputs = [x.detach().requires_grad_() for x in (q[:, :, :n], k, v)]
        out = block_sparse_attention(*inputs, layout, backend="triton")
        results.append([out, *torch.autograd.grad(out.square().sum(), inputs)])
    for ours, expected in zip(*results, strict=True):
        assert torch.equal(ours, expected) and ours.isfinite().all()


@st.composite
def steps(draw):
    batch, beam, heads = draw(st.integers(1, 3)), draw(st.integers(1, 6)), draw(st.integers(1, 3))
    size, reach = draw(st.integers(1, 150)), draw(st.sampled_from([0, 3, 40, 200]))
    options = dict(
        reach=reach, density=draw(st.sampled_from([0.0, 0.1, 0.6, 1.0])), slope=draw(st.sampled_from(SLOPES))
    )
    step, cache = draw(st.integers(0, 200)), draw(st.sampled_from(["pool", "sentence", "hypothesis"]))
    return batch, beam, heads, size, step, cache, options, draw(st.integers(0, 10**6))


def check_step(dtype, dim, drawn):
    batch, beam, heads, size, step, cache, options, number = drawn
    mask, layout = problem(number, heads, k_size=size + number % 70, **options)
    generator = torch.Generator().manual_seed(number)
    lengths = torch.randint(1, size + 1, (batch,), generator=generator)
    lengths[0] = [1, size, 0][number % 3]
    shape = (batch, beam, heads, size, dim) if cache == "hypothesis" else (batch, heads, size, dim)
    q = torch.randn(batch, beam, heads, dim, generator=generator).to(DEVICE, dtype)
    k, v = (torch.randn(shape, generator=generator).to(DEVICE, dtype) for _ in range(2))
    keep = definition(*mask, step + 1, size, lengths.tolist())[:, :, step].to(DEVICE)  # (B, heads, S)
    seen = keep & (torch.arange(size) < lengths[:, None, None]).to(DEVICE)
    seen = seen[:, None] if cache == "hypothesis" else seen
    k, v = (x.masked_fill(~seen[..., None], torch.nan) for x in (k, v))
    tables = dict(k_lengths=lengths.to(DEVICE))
    if cache == "pool":  # as the caches of a search: sentence by sentence, head by head
        k, v = k.flatten(0, 2), v.flatten(0, 2)
        tables["cache_starts"] = (torch.arange(batch * heads) * size).view(batch, heads).to(DEVICE)
        tables["cache_offsets"] = torch.arange(size, dtype=torch.int32).expand(heads, size).to(DEVICE)
    for at in (step, torch.tensor([step], device=DEVICE)):
        got = decode_attention(q, k, v, layout, at, backend="triton", settled=step % 2 == 0, **tables)
        assert not got.isnan().any()
        assert_decode_within_budget(got, q, k, v, keep, scale=dim**-0.5, **tables)
    dense = decode_attention(q, k, v, layout, step, backend="sdpa", **tables)
    torch.testing.assert_close(dense, got, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize(("dtype", "dim"), [(F16, 64), (BF16, 32), (F32, 16)], ids=str)
def test_steps_of_decoding_stay_within_the_float64_budget(dtype, dim):
    check = settings(max_examples=15)(given(steps())(lambda drawn: check_step(dtype, dim, drawn)))
    hypothesis.seed(dim)(check)()


def test_operators_take_offsets(n_keys=132):
    """In a trace the kernels are custom operators, with all that they read as arguments."""
    _, layout = problem(3, heads=1, k_size=n_keys)
    q, k = (torch.randn(2, 1, n, 16, device=DEVICE, requires_grad=True) for n in (20, n_keys))
    lengths = torch.tensor([n_keys, 9], device=DEVICE)
    mask, diagonal = (layout.words, 0, layout.tables(True), *layout.tile), (layout.slope, layout.anchor)
    torch.library.opcheck(
        attention_op, (q, k, k, *mask, None, lengths, None, 0.0, 0.25, *diagonal), rtol=1e-4, atol=1e-5
    )
    step, cache = torch.tensor([7], device=DEVICE), k.detach()
    arguments = *layout.row_lists(), step, n_keys, lengths, None, None, None, 0.25, *diagonal
    torch.library.opcheck(decode_op, (q[:, :, :3].detach().transpose(1, 2), cache, cache, *arguments))

    def loss(q, k):
        return block_sparse_attention(q, k, k, layout, k_lengths=lengths, backend="triton").sin().sum()

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    for ours, eager in zip(*(torch.autograd.grad(f(q, k), (q, k)) for f in (compiled, loss)), strict=True):
        assert torch.equal(ours, eager)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(keep=torch.ones(2, 5)), TypeError, r"torch.bool .*got torch.float32"),
        (dict(keep=torch.ones(2, 4, dtype=torch.bool)), ValueError, r"\(heads or 1, 2 R \+ 1\), got \(2, 4\)"),
        (dict(anchor=torch.tensor([0])), ValueError, r"anchor must be \(2,\), .* got \(1,\), 9 and 20"),
        (dict(slope=-1), ValueError, "slope at least 0 .*, -1 and 20"),
        (dict(k_size=0), ValueError, "k_size at least 1, .*9 and 0"),
        (dict(anchor=torch.tensor([0, 3])), ValueError, r"offsets that their heads keep, got \[0, 3\]"),
        (dict(keep=torch.zeros(2, 5, dtype=torch.bool)), ValueError, "offsets that their heads keep"),
    ],
)
def test_masks_that_do_not_fit_are_refused_with_their_values(change, error, message):
    arguments = dict(keep=torch.ones(2, 5, dtype=torch.bool), slope=9, anchor=torch.tensor([0, -2]), k_size=20)
    with pytest.raises(error, match=message):
        OffsetLayout.from_offsets(**arguments | change)


def test_calls_that_do_not_fit_are_refused_with_their_values():
    _, layout = problem(4, k_size=20)
    q, k = torch.zeros(1, 2, 9, 16, device=DEVICE), torch.zeros(1, 2, 33, 16, device=DEVICE)
    with pytest.raises(ValueError, match="layout covers .* x 32 positions but q x k has 9 x 33"):
        block_sparse_attention(q, k, k, layout)
    with pytest.raises(ValueError, match="causal=True with a layout of offsets"):
        block_sparse_attention(q, q, q, layout, causal=True)
