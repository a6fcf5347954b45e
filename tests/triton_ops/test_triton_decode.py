"""One decoding step against float64, and against the full forward pass row by row."""

import hypothesis
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from triton_ops import AttentionLayout, append_to_pool, block_sparse_attention, decode_attention
from triton_ops.testing import assert_decode_within_budget

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
VARIANTS = [(torch.float16, 64), (torch.bfloat16, 32), (torch.float32, 16), (torch.bfloat16, 96), (torch.float32, 128)]
POOLS = ("none", "rows of all heads", "rows of each head")


@st.composite
def problems(draw):
    batch, beam, heads = draw(st.integers(1, 3)), draw(st.integers(1, 6)), draw(st.integers(1, 3))
    size, rows = draw(st.integers(1, 150)), draw(st.integers(1, 20))
    density, pool = draw(st.sampled_from([0.0, 0.1, 0.1, 0.6, 0.6, 1.0])), draw(st.sampled_from(POOLS))
    return batch, beam, heads, size, rows, density, pool, draw(st.integers(0, 10**6))


def check(dtype, dim, shared, problem):
    """Within the error of the reference plus the rounding band of the kernels."""
    batch, beam, heads, size, rows, density, pool, number = problem
    generator = torch.Generator().manual_seed(number)
    keep = torch.rand(heads if number % 2 else 1, rows, size + number % 3, generator=generator) < density
    layout = AttentionLayout.from_keep_mask(keep.to(DEVICE), tile=64)
    q = torch.randn(batch, beam, heads, dim, generator=generator).to(DEVICE, dtype)
    shape = (batch, heads, size, dim) if shared else (batch, beam, heads, size, dim)
    k, v = (torch.randn(shape, generator=generator).to(DEVICE, dtype) for _ in range(2))
    lengths = torch.randint(0, size + 1, (batch,), generator=generator).to(DEVICE)
    stale = (torch.arange(size, device=DEVICE) >= lengths.view(-1, *[1] * (k.dim() - 2)))[..., None]
    step = number % rows
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
        options["block_table"] = place.gather(1, shared_beam).to(torch.int32)
        k, v = (x.transpose(2, 3).flatten(0, 2)[order] for x in (k, v))
    settled = number % 3 == 0
    got = decode_attention(q, k, v, layout, step, backend="triton", settled=settled, **options)
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
    options["block_table"] = order.argsort(0).view(batch, beam, size).to(DEVICE, torch.int32)
    options["cache_offsets"] = ((kept.flatten().cumsum(0) - 1).view_as(kept) * batch * beam).to(DEVICE, torch.int32)
    by_cell = (x.flatten(0, 1).gather(0, order.to(DEVICE)[:, None, :, None].expand(-1, heads, -1, dim)) for x in (k, v))
    return (x.permute(1, 2, 0, 3)[kept.to(DEVICE)].flatten(0, 1) for x in by_cell)


@pytest.mark.parametrize("shared", [False, True], ids=["per hypothesis", "per sentence"])
@pytest.mark.parametrize(("dtype", "dim"), VARIANTS, ids=str)
def test_decode_stays_within_the_float64_budget(dtype, dim, shared):
    random_cases = given(problems())(lambda problem: check(dtype, dim, shared, problem))
    # Other cases for each variant: hypothesis would draw the same for all.
    hypothesis.seed(VARIANTS.index((dtype, dim)) + shared * len(VARIANTS))(settings(max_examples=24)(random_cases))()


@pytest.mark.parametrize("backend", ["triton", "sdpa"])
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
    assert torch.equal(moved, decode_attention(q, *pool, layout, 2, block_table=rows, backend="triton"))


POOL, ROWS = torch.zeros(99, 2, 16), torch.zeros(2, 4, 7, dtype=torch.int32)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(step=9), ValueError, r"\[0, 9\).*9"),
        (dict(step=torch.tensor([-1])), ValueError, r"\[0, 9\).*-1"),
        (dict(step=torch.tensor([3, 5])), ValueError, "one int32 or int64 on cpu, got 2 of torch.int64"),
        (dict(step=torch.tensor([])), ValueError, "one int32 or int64 on cpu, got 0 of torch.float32"),
        (dict(step=3.7), TypeError, "3.7"),
        (dict(k=torch.zeros(2, 3, 5, 30, 16)), ValueError, r"\(2, 4, 2, 30, 16\).*\(2, 3, 5, 30, 16\)"),
        (dict(q=torch.zeros(2, 4, 2, 16).half()), TypeError, "float16, torch.float32"),
        (dict(block_table=ROWS), ValueError, r"\(2, 4, 2, 30, 16\) with 1"),
        (dict(k=POOL), ValueError, r"\(99, 2, 16\) with 0"),
        (dict(k=POOL, block_table=ROWS[:, :3]), ValueError, r"\(2, 4, 7\).*\(2, 3, 7\)"),
        (dict(k=POOL, block_table=ROWS.bool()), TypeError, "block_table.*bool"),
        (dict(k=POOL, block_table=ROWS.to("meta")), ValueError, "block_table is on meta but q is on cpu"),
        (dict(k=POOL[:, :1], block_table=ROWS), ValueError, r"\(99, 2, 16\).*\(99, 1, 16\)"),
        (dict(k=POOL, cache_starts=ROWS[:, 0, 0]), ValueError, "needs k_lengths"),
        (dict(k=POOL[:, 0], block_table=ROWS), ValueError, r"\(99, 16\) with 1 .* without"),
        (
            dict(k=POOL[:, 0], block_table=ROWS, cache_offsets=torch.zeros(2, 8).long()),
            ValueError,
            r"cache_offsets.*\(2, 7\), got \(2, 8\)",
        ),
        (dict(k_lengths=torch.tensor([1, 31])), ValueError, r"\[0, 30\].*31"),
        (dict(k=torch.zeros(2, 4, 2, 40, 16), k_lengths=torch.tensor([1, 31])), ValueError, r"\[0, 30\].*31"),
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


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(pool=torch.zeros(9, 2, 8)), ValueError, r"\(4, 2, 3, 16\), \(9, 2, 8\)"),
        (dict(kv=torch.zeros(4, 3, 16)), ValueError, r"\(4, 3, 16\), \(9, 2, 16\)"),
        (dict(offsets=torch.zeros(3).long()), ValueError, r"\(9, 2, 16\) and \(3,\)"),
        (dict(pool=torch.zeros(9, 2, 16).half()), TypeError, "float32, torch.float16"),
        (dict(offsets=torch.zeros(3, 5)), TypeError, "float32, torch.float32 and torch.float32"),
        (dict(step=torch.zeros(2).long()), ValueError, "one int32 or int64 on cpu, got 2"),
    ],
)
def test_a_step_that_does_not_fit_its_pool_is_refused_with_both_values(change, error, message):
    arguments = dict(
        kv=torch.zeros(4, 2, 3, 16), pool=torch.zeros(9, 2, 16), offsets=torch.zeros(3, 5).long(),
        step=torch.zeros(1).long(),
    )  # fmt: skip
    with pytest.raises(error, match=message):
        append_to_pool(**(arguments | change))


@pytest.mark.parametrize("backend", ["triton", "sdpa"])
def test_a_step_of_nothing_has_an_output_of_zeros(backend):
    layout = AttentionLayout.from_keep_mask(torch.ones(1, 4, 5, dtype=torch.bool, device=DEVICE))
    for batch, beam, size in [(0, 2, 5), (2, 0, 5), (2, 2, 0)]:
        q, k = torch.ones(batch, beam, 2, 16, device=DEVICE), torch.ones(batch, 2, size, 16, device=DEVICE)
        out = decode_attention(q, k, k, layout, 3, backend=backend)
        assert out.shape == q.shape and not (out != (1 if size else 0)).any()
    q, empty = torch.ones(2, 2, 1, 16, device=DEVICE), torch.ones(0, 1, 16, device=DEVICE)
    nothing = torch.zeros(2, dtype=torch.int64, device=DEVICE)
    out = decode_attention(q, empty, empty, layout, 3, cache_starts=nothing, k_lengths=nothing, backend=backend)
    assert out.shape == q.shape and (out == 0).all()


@pytest.mark.parametrize("backend", ["triton", "sdpa"])
def test_a_step_has_no_gradient_and_takes_the_autocast_type(backend):
    layout = AttentionLayout.from_keep_mask(torch.ones(1, 4, 5, dtype=torch.bool, device=DEVICE))
    q = torch.randn(2, 2, 2, 16, device=DEVICE, requires_grad=True)
    k = torch.randn(2, 2, 5, 16, device=DEVICE)

    def step(q):
        return decode_attention(q, k, k, layout, 3, backend=backend)

    layout.prepare(decode=True)
    for run in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        assert not run(q).requires_grad
    with torch.autocast(DEVICE, torch.bfloat16):
        assert step(q).dtype == torch.bfloat16
