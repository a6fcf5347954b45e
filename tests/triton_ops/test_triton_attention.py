"""The kernels against float64 (random shapes, masks, lengths, strides, types); what the public function promises."""

import functools
import math

import hypothesis
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from triton_ops import AttentionLayout, block_sparse_attention
from triton_ops.call import Call
from triton_ops.config import INTERPRETED
from triton_ops.descriptors import tile_block
from triton_ops.ops import attend
from triton_ops.reference import dropout_keep
from triton_ops.testing import (
    assert_within_budget,
    block_mask,
    make_case,
    random_offsets,
    run_kernels,
    run_reference,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32

# (dtype, head size, tile, dropout, lengths given). What is compiled depends on these; all the rest is drawn.
VARIANTS = [
    (F16, 64, 16, 0.0, True),
    (F16, 32, 32, 0.2, True),
    (F16, 128, 64, 0.0, False),
    (F16, 96, 128, 0.1, True),
    (BF16, 64, 64, 0.1, True),
    (BF16, 16, 128, 0.0, True),
    (BF16, 96, 16, 0.3, False),
    (BF16, 128, 32, 0.0, True),
    (F32, 64, 32, 0.0, True),
    (F32, 32, 64, 0.2, True),
    (F32, 16, 16, 0.0, False),
    (F32, 96, 128, 0.0, True),
    (F16, 64, (64, 16), 0.2, True),
    (BF16, 32, (128, 16), 0.0, False),
    (F32, 16, (64, 16), 0.0, True),
    (F16, 128, (64, 1), 0.1, True),
    (F32, 32, (64, 1), 0.0, False),
]


@st.composite
def cases(draw, variant, sizes, batch_heads=3):
    dtype, dim, tile, dropout_p, with_lengths = variant
    batch, heads = draw(st.integers(1, batch_heads)), draw(st.integers(1, 2))
    q_size, k_size = draw(sizes)
    number = draw(st.integers(0, 10**6))
    generator = torch.Generator().manual_seed(number)
    mask_heads = draw(st.sampled_from([1, heads]))
    shape = (mask_heads, q_size + draw(st.sampled_from([0, 3, 70])), k_size + draw(st.sampled_from([0, 1, 40])))
    kind = draw(st.sampled_from(4 * ["elements", "blocks"] + ["full", "one cell", "empty"]))
    if kind == "blocks":
        keep = block_mask(*shape, tile, 0.5, number, diagonal=draw(st.booleans()))
    elif kind == "elements":
        keep = torch.rand(shape, generator=generator) < draw(st.sampled_from([0.5, 0.1, 0.9]))
    else:
        keep = torch.full(shape, kind == "full")
        if kind == "one cell":
            keep[number % mask_heads, number % q_size, number % k_size] = True

    def lengths(size):
        drawn = torch.randint(1, size + 1, (batch,), generator=generator)
        drawn[0] = draw(st.sampled_from([int(drawn[0]), int(drawn[0]), size, size, size, 0]))
        return drawn if draw(st.booleans()) else drawn.to(torch.int32)

    return make_case(
        batch=batch,
        heads=heads,
        q_size=q_size,
        k_size=k_size,
        dim=dim,
        dtype=dtype,
        keep=keep,
        seed=number,
        q_lengths=lengths(q_size) if with_lengths else None,
        k_lengths=lengths(k_size) if with_lengths else None,
        causal=draw(st.booleans()),
        dropout_p=dropout_p,
        scale=draw(st.sampled_from([dim**-0.5, 0.5])),
        time_first=draw(st.booleans()),
        gap=draw(st.sampled_from([0, 0, 1, 8])),
        use_lse=draw(st.booleans()),
        tile=tile,
        device=DEVICE,
    )


SMALL = st.one_of(
    st.tuples(st.integers(1, 32), st.integers(1, 32)),
    st.tuples(st.integers(1, 64), st.integers(33, 64)),
    st.tuples(st.integers(1, 64), st.integers(1, 128)),
)
# One side beyond the sizes of the small kernels: tile lists. The other side stays short, for the interpreter.
LISTS = st.one_of(
    st.tuples(st.integers(1, 20), st.integers(129, 200)),
    st.tuples(st.integers(129, 170), st.integers(1, 20)),
    st.tuples(st.integers(33, 70), st.integers(129, 150)),
)


def check_random_cases(variant, examples, *arguments, **options):
    """Other cases for each variant: hypothesis would draw the same for all."""
    random_case = given(cases(variant, *arguments, **options))
    check = settings(max_examples=examples)(random_case(lambda case: assert_within_budget(case)))
    hypothesis.seed(VARIANTS.index(variant))(check)()


@pytest.mark.parametrize("variant", [v for v in VARIANTS if isinstance(v[2], int)], ids=str)  # they know no tiles
def test_sentence_kernels_stay_within_the_float64_budget(variant):
    check_random_cases(variant, 20, SMALL)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_list_kernels_stay_within_the_float64_budget(variant):
    check_random_cases(variant, 10, LISTS, batch_heads=1)


def simple_case(q_size=150, k_size=140, dim=16, dtype=F32, **options):
    options = dict(batch=2, heads=1, scale=0.25, seed=3, device=DEVICE) | options
    keep = options.pop("keep", None)
    if keep is None:
        keep = torch.rand(options["heads"], q_size, k_size, generator=torch.Generator().manual_seed(9)) < 0.5
    return make_case(q_size=q_size, k_size=k_size, dim=dim, dtype=dtype, keep=keep, **options)


@pytest.mark.parametrize("offsets", [False, True])
def test_a_case_moves_as_a_whole_and_keeps_its_strides(offsets):
    """Memory ends behind its tensors, where compute-sanitizer sees what is read too far, on another device, too."""
    lengths = torch.tensor([150, 70])
    layout = random_offsets(1, 140, DEVICE) if offsets else None
    case = simple_case(use_lse=True, q_lengths=lengths, k_lengths=lengths - 10, offsets=layout)
    before, after = vars(case), vars(case.to("meta"))
    assert before.keys() == after.keys()
    for name, value in before.items():
        if hasattr(value, "device"):
            assert (value.device.type, after[name].device.type) == (torch.device(DEVICE).type, "meta"), name
        else:
            assert value == after[name], name
    assert all(after[name].stride() == before[name].stride() for name in ("q", "k", "v", "grad_out"))


@pytest.mark.parametrize("dtype", [F32, torch.bfloat16])
@pytest.mark.parametrize("time_first, row", [(False, 17), (True, 34)])
def test_cases_have_the_gaps_that_were_asked_for(dtype, time_first, row):
    """In half precision, and on a GPU, their rows lay side by side: conversion closes gaps."""
    case = simple_case(dim=16, dtype=dtype, gap=1, time_first=time_first)
    assert all(x.shape[3] == 16 and x.stride()[2:] == (row, 1) for x in (case.q, case.k, case.v, case.grad_out))


@pytest.mark.skipif(not INTERPRETED, reason="only the interpreter checks addresses: run it without a GPU")
@pytest.mark.parametrize("tile", [64, 128])
def test_nothing_beyond_the_last_word_is_read(tile):
    """The kernels read words of keys that a tile has and the mask has not: memory of others, or of nobody."""
    case = simple_case(20, 130, batch=1, tile=tile)
    words = case.layout.words
    case.layout.words = words.repeat(2, 1, 1)[:1]  # what follows belongs to no tensor of a launch
    assert_within_budget(case)


def test_gradient_through_the_log_sum_exp(size):
    assert_within_budget(simple_case(size, size, use_lse=True, tile=32))


@pytest.mark.parametrize("backend", ["triton", "sdpa"])
def test_the_log_sum_exp_of_a_row_without_a_visible_key_has_no_gradient(size, backend):
    """Whatever comes for it: logaddexp, which merges parts of a row, makes NaN of two -inf."""
    keep = torch.ones(1, size, size, dtype=torch.bool)
    keep[0, 5] = False
    case = simple_case(size, size, keep=keep)
    inputs = [x.requires_grad_() for x in (case.q, case.k, case.v)]
    out, lse = block_sparse_attention(*inputs, case.layout, backend=backend, return_lse=True)
    grads = []
    for value in (0.0, torch.nan):
        grad_lse = torch.ones_like(lse)
        grad_lse[:, :, 5] = value
        grads.append(torch.autograd.grad((out, lse), inputs, (case.grad_out, grad_lse), retain_graph=True))
    for without, with_nan in zip(*grads, strict=True):
        assert torch.equal(without, with_nan)


def test_log_sum_exp_is_natural_and_minus_infinity_where_nothing_is_visible(size):
    keep = torch.ones(1, size, size, dtype=torch.bool)
    keep[0, 5] = False
    case = simple_case(size, size, keep=keep, q_lengths=torch.tensor([size, size - 9]))
    scores = case.q.double() @ case.k.double().mT * case.scale
    lse = run_kernels(case)["lse"]
    expected = torch.logsumexp(scores, -1)
    expected[:, :, 5], expected[1, :, size - 9 :] = -math.inf, -math.inf
    torch.testing.assert_close(lse.double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("lengths", [(64, 64), (64, 65), (65, 64), (30, 1), (0, 64)], ids=str)
def test_short_sentences_between_long_ones(lengths, monkeypatch):
    monkeypatch.setattr(torch, "empty_like", functools.partial(torch.full_like, fill_value=torch.nan))
    keep = torch.rand(2, 120, 128, generator=torch.Generator().manual_seed(1)) < 0.6
    q_lengths, k_lengths = torch.tensor([lengths[0], 120]), torch.tensor([lengths[1], 128])
    assert_within_budget(
        make_case(
            batch=2, heads=2, q_size=120, k_size=128, dim=32, dtype=F16, keep=keep, scale=0.2, dropout_p=0.1,
            q_lengths=q_lengths, k_lengths=k_lengths, device=DEVICE,
        )
    )  # fmt: skip


def test_every_element_is_written(size, monkeypatch):
    """Outputs start as NaN: an element that no program writes shows, as do padded rows that are not zeroed."""

    def poisoned(make, *arguments, **options):
        x = make(*arguments, **options)
        return x.fill_(torch.nan) if x.is_floating_point() else x

    for make in (torch.empty, torch.empty_like):
        monkeypatch.setattr(torch, make.__name__, functools.partial(poisoned, make))
    case = simple_case(size, size, q_lengths=torch.tensor([size // 3, 0]), k_lengths=torch.tensor([0, size // 2]))
    for name, value in run_kernels(case).items():
        assert not value.isnan().any(), name
        if name != "lse":
            assert (value == 0).all(), name  # no cell is visible in either sentence


def test_padded_rows_and_keys_are_zero(size):
    q_lengths, k_lengths = torch.tensor([size, size // 2]), torch.tensor([size // 3, size])
    got = run_kernels(simple_case(size, size, q_lengths=q_lengths, k_lengths=k_lengths))
    for b in range(2):
        assert (got["out"][b, :, q_lengths[b] :] == 0).all() and (got["dq"][b, :, q_lengths[b] :] == 0).all()
        assert (got["dk"][b, :, k_lengths[b] :] == 0).all() and (got["dv"][b, :, k_lengths[b] :] == 0).all()
    assert (got["dq"][0, :, : size // 4] != 0).any()


def test_two_runs_give_the_same_bits(size):
    case = simple_case(size, size, dtype=F16, dropout_p=0.3)
    first, second = run_kernels(case), run_kernels(case)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("tile", [16, 32, 64, 128, (64, 16), (64, 1)])
def test_dropout_bits_do_not_depend_on_tiles(tile):
    """With V = identity the output is Z∘P / (1 - p): the kernels' own bits can be read off it."""
    size, p, seed = 140, 0.25, 2**40 + 17
    layout = AttentionLayout.from_keep_mask(torch.ones(1, size, size, dtype=torch.bool, device=DEVICE), tile=tile)
    q = torch.zeros(1, 1, size, 128, device=DEVICE)
    bits = torch.empty(size, size, dtype=torch.bool, device=DEVICE)
    for first in range(0, size, 128):
        v = torch.zeros(1, 1, size, 128, device=DEVICE)
        n = min(128, size - first)
        v[0, 0, first : first + n, :n] = torch.eye(n, device=DEVICE)
        out = block_sparse_attention(q, q, v, layout, dropout_p=p, seed=seed, backend="triton")
        torch.testing.assert_close(out[out != 0] * size * (1 - p), torch.ones_like(out[out != 0]))
        bits[:, first : first + n] = out[0, 0, :, :n] != 0
    assert torch.equal(bits, dropout_keep(seed, 1, size, size, p, DEVICE)[0])


def test_dropout_seeds(size):
    case = simple_case(size, 20, batch=1, heads=1)

    def run(seed):
        options = case.options() | dict(dropout_p=0.4, seed=seed)
        return block_sparse_attention(case.q, case.k, case.v, case.layout, backend="triton", **options)

    assert torch.equal(run(5), run(torch.tensor([5], device=DEVICE)))
    assert not torch.equal(run(5), run(6))
    torch.manual_seed(0)
    first = run(None)
    assert not torch.equal(first, run(None))
    torch.manual_seed(0)
    assert torch.equal(first, run(None))


def test_dropout_keeps_the_expectation(size):
    """Values of 1 give 1 but for dropout; each row is the mean of `size` independent terms of variance p / (1 - p)."""
    p, n_rows, n_seeds = 0.3, 20, 8
    q = torch.zeros(1, 1, n_rows, 16, device=DEVICE)
    k, v = torch.zeros(1, 1, size, 16, device=DEVICE), torch.ones(1, 1, size, 16, device=DEVICE)
    layout = AttentionLayout.from_keep_mask(torch.ones(1, n_rows, size, dtype=torch.bool, device=DEVICE))
    outs = [
        block_sparse_attention(q, k, v, layout, backend="triton", dropout_p=p, seed=number) for number in range(n_seeds)
    ]
    assert abs(torch.stack(outs).mean() - 1) < 4 * math.sqrt(p / (1 - p) / (size * n_rows * n_seeds)) < p / 4


def test_both_back_ends_agree_with_dropout(size):
    case = simple_case(size, size, dropout_p=0.35, causal=True)
    results = [
        block_sparse_attention(case.q, case.k, case.v, case.layout, backend=backend, **case.options())
        for backend in ("triton", "sdpa")
    ]
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


def test_time_first_tensors_go_in_and_come_out_without_a_copy(size):
    batch, heads, dim = 2, 3, 16
    packed = torch.randn(size, batch, 3, heads, dim, device=DEVICE)
    q, k, v = (packed[:, :, i].permute(1, 2, 0, 3) for i in range(3))
    layout = AttentionLayout.from_keep_mask(torch.ones(1, size, size, dtype=torch.bool, device=DEVICE))
    out = block_sparse_attention(q, k, v, layout, backend="triton")
    expected = block_sparse_attention(q.contiguous(), k.contiguous(), v.contiguous(), layout, backend="triton")
    assert torch.equal(out, expected)
    assert out.permute(2, 0, 1, 3).is_contiguous()  # reshape(T, B, E) is a view


LAYOUTS = {
    "contiguous": lambda x: x.contiguous(),
    "time first": lambda x: x.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3),
    "head last": lambda x: x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2),
    "with gaps": lambda x: torch.cat([x, x], 3)[..., : x.size(3)],
}


@pytest.mark.parametrize("options", [{}, dict(return_lse=True)], ids=["out", "lse"])
@pytest.mark.parametrize("backend", ["triton", "sdpa"])
@pytest.mark.parametrize("order", LAYOUTS)
def test_the_output_is_laid_out_as_q(order, backend, options):
    """The back end in torch returned a contiguous tensor whatever q was."""
    q, k = (torch.randn(2, 3, size, 16, device=DEVICE) for size in (20, 30))
    layout = AttentionLayout.from_keep_mask(torch.ones(1, 20, 30, dtype=torch.bool, device=DEVICE))
    result = block_sparse_attention(LAYOUTS[order](q), k, k, layout, backend=backend, **options)
    plain = block_sparse_attention(q, k, k, layout, backend=backend, **options)
    out, expected = (x[0] if options else x for x in (result, plain))
    assert out.stride() == torch.empty_like(LAYOUTS[order](q)).stride()
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("backend", ["triton", "sdpa"])
def test_gradients_of_sdpa_and_the_kernels_are_those_of_the_definition(size, backend):
    """Also where a row sees nothing: in the mask, before any key of a sentence, in padding."""
    keep = torch.rand(1, size, size, generator=torch.Generator().manual_seed(9)) < 0.5
    keep[0, 5], keep[0, 7, :30] = False, False
    lengths = dict(q_lengths=torch.tensor([size, size - 9]), k_lengths=torch.tensor([size, 30]))
    case = simple_case(size, size, keep=keep, causal=True, **lengths)
    inputs = [x.detach().requires_grad_() for x in (case.q, case.k, case.v)]
    out = block_sparse_attention(*inputs, case.layout, backend=backend, **case.options())
    grad = torch.nan_to_num(case.grad_out)
    results = dict(zip(("dq", "dk", "dv"), torch.autograd.grad(out, inputs, grad), strict=True), out=out)
    expected = run_reference(case, torch.float64)
    for name, value in results.items():
        torch.testing.assert_close(value.double(), expected[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", ["triton", "sdpa"])
def test_probabilities_are_those_of_the_definition_and_change_nothing(size, backend):
    case = simple_case(size, size, dropout_p=0.3, k_lengths=torch.tensor([size, size // 2]))
    attend = functools.partial(
        block_sparse_attention, case.q, case.k, case.v, case.layout, backend=backend, **case.options()
    )
    plain, (out, probs) = attend(), attend(return_probs=True)
    assert torch.equal(plain, out)
    everything = attend(return_lse=True, return_probs=True)
    assert len(everything) == 3 and torch.equal(everything[2], probs)
    scores = (case.q.double() @ case.k.double().mT * case.scale).nan_to_num().exp() * case.keep
    scores[1, :, :, size // 2 :] = 0
    torch.testing.assert_close(probs.double(), scores / scores.sum(-1, keepdim=True), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_lengths_are_clamped_whatever_they_are(size, dtype):
    """The kernels cut int64 lengths to int32 before they clamped them: 2^32 + 3 became 3, and 2^31 became 0."""
    keep = torch.rand(1, size, size, generator=torch.Generator().manual_seed(9)) < 0.5
    wild = torch.tensor([2**31 - 1, -(2**31)] if dtype == torch.int32 else [2**32 + 3, -(2**32) + 3], dtype=dtype)
    tame = torch.tensor([size, 0])
    q = torch.randn(2, 1, size, 16, device=DEVICE)
    layout = AttentionLayout.from_keep_mask(keep.to(DEVICE))
    tables = list(layout.query_table()[:2])
    results = []
    for lengths in (wild.to(DEVICE), tame.to(DEVICE)):  # beneath the check, which the API makes for tensors on a CPU
        mask = layout.words, layout.row_shift, tables, *layout.tile
        results.append(attend(q, q, q, Call(*mask, lengths, lengths, None, 0.0, 0.25)))
    for ours, expected in zip(*results, strict=True):
        assert torch.equal(ours, expected)
    assert (results[0][0][0] != 0).any()


def poisoned(x, value, *index):
    result = x.clone()
    result[index] = value
    return result


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("backend", ["triton", "sdpa"])
def test_what_padding_holds_has_no_effect(size, backend, value):
    keep = torch.rand(2, size, size, generator=torch.Generator().manual_seed(9)) < 0.5
    layout = AttentionLayout.from_keep_mask(keep.to(DEVICE), tile=32)
    lengths = torch.tensor([size, size - 7], device=DEVICE)
    clean = [torch.randn(2, 2, size, 16, device=DEVICE) for _ in range(3)]
    dirty = [poisoned(x, value, 1, slice(None), slice(size - 7, None)) for x in clean]
    results = []
    for inputs in (clean, dirty):
        inputs = [x.detach().requires_grad_() for x in inputs]
        out = block_sparse_attention(*inputs, layout, q_lengths=lengths, k_lengths=lengths, backend=backend)
        results.append([out, *torch.autograd.grad(out.square().sum(), inputs)])
    for ours, expected in zip(*results, strict=True):
        assert ours.isfinite().all()
        if backend == "triton":
            assert torch.equal(ours, expected)
        else:  # torch's backward pass does not promise the same bits in every run
            torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("backend", ["triton", "sdpa"])
def test_a_pruned_value_that_is_not_finite_reaches_its_head_of_its_sentence_at_most(size, backend, value):
    """No row keeps column 5. It was said that what is pruned is never read, which holds for tile lists alone."""
    keep = torch.ones(2, size, size, dtype=torch.bool)
    keep[:, :, 5] = False
    layout = AttentionLayout.from_keep_mask(keep.to(DEVICE), tile=32)
    q, k, v = (torch.randn(2, 2, size, 16, device=DEVICE) for _ in range(3))
    attend = functools.partial(block_sparse_attention, layout=layout, backend=backend)
    expected = attend(q, k, v)
    for dirty in (attend(q, k, poisoned(v, value, 0, 1, 5)), attend(q, poisoned(k, value, 0, 1, 5), v)):
        assert torch.equal(dirty[1], expected[1]) and torch.equal(dirty[0, 0], expected[0, 0])


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_skipped_tiles_are_not_read(value):
    """Above the sizes of the sentence kernels, forward and backward."""
    keep = torch.ones(1, 160, 160, dtype=torch.bool)
    keep[:, :, 32:64], keep[:, 96:128, 64:96] = False, False
    keep[0, 3, 1] = False  # a partial tile
    layout = AttentionLayout.from_keep_mask(keep.to(DEVICE), tile=32)
    clean = [torch.randn(1, 1, 160, 16, device=DEVICE) for _ in range(3)]
    dirty = [clean[0], *(poisoned(x, value, slice(None), slice(None), slice(32, 64)) for x in clean[1:])]
    results = []
    for inputs in (clean, dirty):
        inputs = [x.detach().requires_grad_() for x in inputs]
        out = block_sparse_attention(*inputs, layout, backend="triton")
        grads = torch.autograd.grad(out.square().sum(), inputs)
        kept = [torch.cat([x[:, :, :32], x[:, :, 64:]], 2) for x in grads[1:]]
        results.append([out, grads[0], *kept])
    for ours, expected in zip(*results, strict=True):
        assert ours.isfinite().all() and torch.equal(ours, expected)


def test_gradients_may_have_any_strides(size):
    case = simple_case(size, size, batch=1)
    q = case.q.detach().requires_grad_()

    def grad(g):
        out = block_sparse_attention(q, case.k, case.v, case.layout, backend="triton", scale=0.25)
        return torch.autograd.grad(out, q, g)[0]

    g = torch.ones_like(q).contiguous()
    assert torch.equal(grad(g), grad(torch.ones((), device=DEVICE).expand_as(q)))
    g = torch.randn_like(q).contiguous()
    assert torch.equal(grad(g), grad(g.transpose(2, 3).contiguous().transpose(2, 3)))


VIEWS = {  # of half-precision tensors; whether the tensor memory accelerator can read their rows
    "contiguous": (lambda x: x, True),
    "time first": (lambda x: x.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3), True),
    "one head": (lambda x: x[:1, :1], True),
    "aligned part": (lambda x: torch.cat([x, x], 3)[..., 8:72], True),
    "unaligned part": (lambda x: torch.cat([x, x], 3)[..., 1:65], False),
    "odd rows": (lambda x: torch.cat([x, x[..., :1]], 3)[..., :64], False),
    "expanded": (lambda x: x[:, :1].expand(-1, 2, -1, -1), False),
    "float32": (lambda x: x.float(), False),
}


@pytest.mark.parametrize("view", VIEWS)
def test_tiles_come_by_descriptor_where_the_accelerator_can_read_them_and_else_by_pointer(view):
    view, by_descriptor = VIEWS[view]
    generator = torch.Generator().manual_seed(3)
    q, k, v, g = (view(torch.randn(2, 2, 150, 64, generator=generator).half().to(DEVICE)) for _ in range(4))
    keep = block_mask(q.size(1), 150, 150, 64, 0.4, seed=1, device=DEVICE)
    layout = AttentionLayout.from_keep_mask(keep, tile=64)
    accelerated = DEVICE == "cpu" or torch.cuda.get_device_capability()[0] >= 9
    assert tile_block(k, v, 64, 64) == ([1, 1, 64, 64] if by_descriptor and accelerated else None)
    assert tile_block(k, v, 64, 32) is None
    results = []
    for backend in ("triton", "sdpa"):
        inputs = [x.detach().requires_grad_() for x in (q, k, v)]
        out = block_sparse_attention(*inputs, layout, backend=backend)
        results.append([out, *torch.autograd.grad(out, inputs, g)])
    for ours, reference in zip(*results, strict=True):
        torch.testing.assert_close(ours, reference, atol=2e-2, rtol=2e-2)


def test_a_slice_of_a_layout_is_the_layout_of_the_slice():
    keep = torch.rand(2, 260, 250, generator=torch.Generator().manual_seed(2)) < 0.5
    whole = AttentionLayout.from_keep_mask(keep.to(DEVICE), tile=32)
    for q_size, k_size in [(140, 3), (3, 140), (130, 131)]:
        case = simple_case(q_size, k_size, heads=2, keep=keep[:, :q_size, :k_size].clone(), tile=32)
        results = [
            block_sparse_attention(case.q, case.k, case.v, layout, backend="triton", scale=0.25)
            for layout in (whole, case.layout)
        ]
        assert torch.equal(*results)


@pytest.mark.parametrize("size", [30, 150])
def test_lengths_may_have_any_stride(size):
    """A column of a table, and one length for all sentences."""
    q = torch.randn(3, 2, size, 32, device=DEVICE)
    layout = AttentionLayout.from_keep_mask(torch.ones(2, size, size, dtype=torch.bool, device=DEVICE))
    table = torch.tensor([[size, 1], [7, 2], [11, 3]], device=DEVICE)
    for lengths in (table[:, 0], torch.tensor([9], device=DEVICE).expand(3)):
        ours, expected = (
            block_sparse_attention(q, q, q, layout, q_lengths=given, k_lengths=given, backend="triton")
            for given in (lengths, lengths.clone())
        )
        torch.testing.assert_close(ours, expected, rtol=0, atol=0)


def test_a_dropout_rate_of_nearly_one_drops_all_but_next_to_nothing():
    q = torch.randn(1, 1, 8, 16, device=DEVICE)
    layout = AttentionLayout.from_keep_mask(torch.ones(1, 8, 8, dtype=torch.bool, device=DEVICE))
    for backend in ("triton", "sdpa"):
        out = block_sparse_attention(q, q, q, layout, dropout_p=1 - 1e-12, seed=1, backend=backend)
        torch.testing.assert_close(out, torch.zeros_like(out))


def test_no_heads_no_rows_no_keys():
    layout = AttentionLayout.from_keep_mask(torch.ones(1, 200, 200, dtype=torch.bool, device=DEVICE))
    for batch, q_size, k_size in [(0, 4, 4), (2, 0, 4), (2, 4, 0), (1, 150, 0)]:
        q = torch.randn(batch, 2, q_size, 16, device=DEVICE, requires_grad=True)
        k = torch.randn(batch, 2, k_size, 16, device=DEVICE, requires_grad=True)
        for backend in ("triton", "sdpa"):
            out = block_sparse_attention(q, k, k, layout, backend=backend)
            assert out.shape == q.shape and (out == 0).all()
            grads = torch.autograd.grad(out.sum(), (q, k))
            assert all((g == 0).all() for g in grads) and grads[1].shape == k.shape


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU with 9 GB of free memory")
def test_addresses_beyond_two_to_the_31_elements():
    """Offsets are int64: sentence 1 starts past 2^31 elements, and its rows lie 2^22 elements apart."""
    keep = block_mask(2, 256, 256, 64, 0.5, 1, DEVICE)
    layout = AttentionLayout.from_keep_mask(keep, tile=64)
    store = torch.empty(2**31 + 2**30 + 2**12, dtype=BF16, device=DEVICE)
    for strides in [(2**31, 64, 128, 1), (64, 128, 2**22, 1)]:
        far = []
        for shift in range(3):
            view = store[shift * 256 :].as_strided((2, 2, 256, 64), strides)
            view.copy_(torch.randn(2, 2, 256, 64, device=DEVICE))
            far.append(view)
        near = [x.contiguous().requires_grad_() for x in far]
        far = [x.detach().requires_grad_() for x in far]
        out_far, out_near = (block_sparse_attention(*x, layout, backend="triton") for x in (far, near))
        assert torch.equal(out_far, out_near)
        g = torch.randn_like(out_near)
        pairs = zip(torch.autograd.grad(out_far, far, g), torch.autograd.grad(out_near, near, g), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
