"""One decoding step against float64, and against the full forward pass row by row."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from triton_ops import AttentionLayout, append_to_pool, block_sparse_attention, decode_attention
from triton_ops.testing import assert_decode_within_budget

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FIXED = settings(derandomize=True, deadline=None)
VARIANTS = [(torch.float16, 64), (torch.bfloat16, 32), (torch.float32, 16), (torch.bfloat16, 96), (torch.float32, 128)]
POOLS = ("none", "rows of all heads", "rows of each head")


@st.composite
def problems(draw):
    batch, beam, heads = draw(st.integers(1, 3)), draw(st.integers(1, 6)), draw(st.integers(1, 3))
    size, rows = draw(st.integers(1, 150)), draw(st.integers(1, 20))
    density, pool = draw(st.sampled_from([0.0, 0.1, 0.6, 1.0])), draw(st.sampled_from(POOLS))
    return batch, beam, heads, size, rows, density, pool, draw(st.integers(0, 10**6))


def check(dtype, dim, shared, problem):
    """Within the eager error plus the rounding band of the kernels."""
    batch, beam, heads, size, rows, density, pool, seed = problem
    generator = torch.Generator().manual_seed(seed)
    keep = torch.rand(heads if seed % 2 else 1, rows, size + seed % 3, generator=generator) < density
    layout = AttentionLayout.from_keep_mask(keep.to(DEVICE), tile=64)
    q = torch.randn(batch, beam, heads, dim, generator=generator).to(DEVICE, dtype)
    shape = (batch, heads, size, dim) if shared else (batch, beam, heads, size, dim)
    k, v = (torch.randn(shape, generator=generator).to(DEVICE, dtype) for _ in range(2))
    lengths = torch.randint(0, size + 1, (batch,), generator=generator).to(DEVICE)
    stale = (torch.arange(size, device=DEVICE) >= lengths.view(-1, *[1] * (k.dim() - 2)))[..., None]
    step = seed % rows
    for x in (k, v):  # past the lengths, and where nothing is kept, caches hold whatever was there
        x.masked_fill_(stale, torch.nan).masked_fill_(~keep[:, step, :size, None].to(DEVICE), torch.nan)
    options = dict(k_lengths=lengths)
    if pool == "rows of each head":
        k, v = pool_of_kept_cells(k, v, keep, generator, options)
    elif pool != "none" and shared:
        k, v = (x.transpose(1, 2).flatten(0, 1) for x in (k, v))  # (B, S) positions as rows
        options["cache_starts"] = torch.arange(batch, device=DEVICE) * size
    elif pool != "none":  # rows in any order, some shared by the beams of a sentence
        order = torch.randperm(batch * beam * size, generator=generator).to(DEVICE)
        place = torch.argsort(order).view(batch, beam, size)
        shared_beam = torch.randint(0, beam, (batch, beam, size), generator=generator).to(DEVICE)
        options["cache_rows"] = place.gather(1, shared_beam).to(torch.int32)
        k, v = (x.transpose(2, 3).flatten(0, 2)[order] for x in (k, v))
    got = decode_attention(q, k, v, layout, step, backend="triton", **options)
    assert not got.isnan().any()
    assert_decode_within_budget(got, q, k, v, keep[:, step, :size].to(DEVICE), scale=dim**-0.5, **options)


def pool_of_kept_cells(k, v, keep, generator, options):
    """Pools (R, D) without rows for the columns that a head never keeps, and their tables."""
    kept = keep.any(1)[:, : k.size(-2)].expand(k.size(-3), k.size(-2)).clone()
    kept[:, 0] = True
    if k.dim() == 4:  # sentence by sentence, head by head
        stored = kept[None].expand(k.shape[:3])
        counts = stored.sum(2).flatten()
        options["cache_starts"] = (counts.cumsum(0) - counts).view(stored.shape[:2]).to(DEVICE)
        options["cache_offsets"] = (kept.cumsum(1) - 1).to(DEVICE, torch.int32)
        return k[stored.to(DEVICE)], v[stored.to(DEVICE)]
    # Head by head, position by position: a row of each hypothesis, in an order that differs between positions.
    batch, beam, heads, size, dim = k.shape
    order = torch.rand(batch * beam, size, generator=generator).argsort(0)
    options["cache_rows"] = order.argsort(0).view(batch, beam, size).to(DEVICE, torch.int32)
    options["cache_offsets"] = ((kept.flatten().cumsum(0) - 1).view_as(kept) * batch * beam).to(DEVICE, torch.int32)
    by_cell = (x.flatten(0, 1).gather(0, order.to(DEVICE)[:, None, :, None].expand(-1, heads, -1, dim)) for x in (k, v))
    return (x.permute(1, 2, 0, 3)[kept.to(DEVICE)].flatten(0, 1) for x in by_cell)


@pytest.mark.parametrize("shared", [False, True], ids=["per hypothesis", "per sentence"])
@pytest.mark.parametrize(("dtype", "dim"), VARIANTS, ids=str)
def test_decode_stays_within_the_float64_budget(dtype, dim, shared):
    settings(FIXED, max_examples=12)(given(problems())(lambda problem: check(dtype, dim, shared, problem)))()


@pytest.mark.parametrize("backend", ["triton", "eager"])
def test_steps_reproduce_the_rows_of_the_full_forward(backend):
    batch, heads, size, dim = 2, 2, 20, 16
    keep = torch.rand(heads, 32, 32, generator=torch.Generator().manual_seed(4)).to(DEVICE) < 0.5
    layout = AttentionLayout.from_keep_mask(keep)
    q, k, v = (torch.randn(batch, heads, size, dim, device=DEVICE) for _ in range(3))
    whole = block_sparse_attention(q, k, v, layout, causal=True, backend=backend)
    for step in range(size):
        row = decode_attention(
            q[:, :, step].unsqueeze(1),
            k.unsqueeze(1),
            v.unsqueeze(1),
            layout,
            torch.tensor([step], device=DEVICE),
            k_lengths=torch.full((batch,), step + 1, device=DEVICE),
            backend=backend,
        )
        torch.testing.assert_close(row.squeeze(1), whole[:, :, step], rtol=1e-5, atol=1e-5)


def test_one_cache_per_sentence_equals_one_per_hypothesis():
    batch, beam, heads, size, dim = 3, 5, 2, 77, 32
    layout = AttentionLayout.from_keep_mask(torch.rand(heads, 9, size, device=DEVICE) < 0.3)
    q = torch.randn(batch, beam, heads, dim, device=DEVICE)
    k, v = (torch.randn(batch, heads, size, dim, device=DEVICE) for _ in range(2))
    shared = decode_attention(q, k, v, layout, 4, backend="triton")
    copies = [x.unsqueeze(1).expand(-1, beam, -1, -1, -1) for x in (k, v)]
    torch.testing.assert_close(shared, decode_attention(q, *copies, layout, 4, backend="triton"), rtol=1e-5, atol=1e-5)


def test_permuting_the_rows_equals_reordering_the_caches():
    batch, beam, heads, size, dim = 2, 4, 2, 30, 16
    layout = AttentionLayout.from_keep_mask(torch.rand(heads, 9, size, device=DEVICE) < 0.5)
    q = torch.randn(batch, beam, heads, dim, device=DEVICE)
    k, v = (torch.randn(batch, beam, heads, size, dim, device=DEVICE) for _ in range(2))
    parents = torch.randint(0, beam, (batch, beam), device=DEVICE)
    index = parents[:, :, None, None, None].expand_as(k)
    moved = decode_attention(q, k.gather(1, index), v.gather(1, index), layout, 2, backend="triton")
    rows = torch.arange(batch * beam * size, device=DEVICE).view(batch, beam, size)
    rows = rows.gather(1, parents[:, :, None].expand(-1, -1, size))
    pool = [x.transpose(2, 3).flatten(0, 2) for x in (k, v)]
    assert torch.equal(moved, decode_attention(q, *pool, layout, 2, cache_rows=rows, backend="triton"))


POOL = torch.zeros(99, 2, 16)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(step=9), ValueError, r"\[0, 9\).*9"),
        (dict(k=torch.zeros(2, 3, 5, 30, 16)), ValueError, r"\(2, 4, 2, 30, 16\).*\(2, 3, 5, 30, 16\)"),
        (dict(cache_rows=torch.zeros(2, 4, 7, dtype=torch.int32)), ValueError, r"\(2, 4, 2, 30, 16\) with 1"),
        (dict(k=POOL), ValueError, r"\(99, 2, 16\) with 0"),
        (dict(k=POOL, cache_rows=torch.zeros(2, 3, 7).long()), ValueError, r"\(2, 4, S\).*\(2, 3, 7\)"),
        (dict(k=POOL[:, :1], cache_rows=torch.zeros(2, 4, 7).long()), ValueError, r"\(99, 2, 16\).*\(99, 1, 16\)"),
        (dict(k=POOL, cache_starts=torch.zeros(2).long()), ValueError, "without k_lengths"),
        (dict(k=POOL[:, 0], cache_rows=torch.zeros(2, 4, 7).long()), ValueError, r"\(99, 16\) with 1 .* without"),
        (
            dict(k=POOL[:, 0], cache_rows=torch.zeros(2, 4, 7).long(), cache_offsets=torch.zeros(2, 8).long()),
            ValueError,
            r"\(2, 7\) integers, got \(2, 8\)",
        ),
        (dict(k_lengths=torch.tensor([1, 31])), ValueError, r"\[0, 30\].*31"),
    ],
)
def test_bad_decode_arguments_are_refused_with_their_values(change, error, message):
    options = dict(
        q=torch.zeros(2, 4, 2, 16), k=torch.zeros(2, 4, 2, 30, 16), step=0,
        layout=AttentionLayout.from_keep_mask(torch.ones(2, 9, 30, dtype=torch.bool)),
    ) | change  # fmt: skip
    with pytest.raises(error, match=message):
        decode_attention(
            options.pop("q"), k := options.pop("k"), k, options.pop("layout"), options.pop("step"), **options
        )


@pytest.mark.parametrize("kv_last", [(32, 2, 3, 64), (5, 2, 1, 16)])
def test_a_step_is_appended_where_the_table_says(kv_last):
    n, _, heads, dim = kv_last
    kv = torch.randn(heads, n, 2, dim, device=DEVICE).permute(1, 2, 0, 3)  # not contiguous
    pool = torch.zeros(heads * n + 40, 2, dim, device=DEVICE)
    offsets = torch.randint(7, (heads, 9), device=DEVICE, dtype=torch.int32)
    offsets[:, 4] = torch.arange(heads, device=DEVICE) * n + 3
    append_to_pool(kv, pool, offsets, torch.tensor([4], device=DEVICE))
    expected = torch.zeros_like(pool)
    expected[3 : 3 + heads * n] = kv.transpose(1, 2).transpose(0, 1).flatten(0, 1)
    assert torch.equal(pool, expected)


def test_a_step_that_does_not_fit_its_pool_is_refused_with_both_shapes():
    with pytest.raises(ValueError, match=r"\(4, 2, 3, 16\) torch.float32, \(9, 2, 8\)"):
        append_to_pool(
            torch.zeros(4, 2, 3, 16), torch.zeros(9, 2, 8), torch.zeros(3, 5, dtype=torch.int32), torch.zeros(1).long()
        )
