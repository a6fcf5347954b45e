"""Products of few rows, with all that is fused into them, against float64."""

import hypothesis
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from triton_ops.config import rows_config
from triton_ops.decode import number
from triton_ops.reference import linear_rows_reference
from triton_ops.rows import ACTIVATIONS, MAX_ROWS, TYPES, Norm, Slots, embed_rows, linear_rows
from triton_ops.testing import assert_linear_rows_within_budget

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def _poisoned_memory(monkeypatch):
    """An element that a kernel does not write is NaN."""
    real = torch.Tensor.new_empty

    def poisoned(like, *shape, **more):
        made = real(like, *shape, **more)
        return made.fill_(torch.nan) if made.is_floating_point() else made

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)
    monkeypatch.setattr(torch, "empty_like", lambda x: torch.full_like(x, torch.nan))


def random(dtype, *shape, scale=1.0):
    return (scale * torch.randn(shape)).to(DEVICE, dtype)


@st.composite
def problems(draw):
    n, k, m = draw(st.integers(1, MAX_ROWS)), draw(st.sampled_from([16, 48, 96, 512, 1000])), draw(st.integers(1, 70))
    options = {"norm": draw(st.booleans()), "bias": draw(st.booleans()), "residual": draw(st.booleans())}
    return n, k, m, options, draw(st.sampled_from(ACTIVATIONS)), draw(st.integers(0, 10**6))


def check(dtype, problem):
    n, k, m, wanted, activation, seed = problem
    torch.manual_seed(seed)
    x, weight = random(dtype, n, k, scale=3.0) + 2.0, random(dtype, m, k, scale=k**-0.5)
    options = dict(
        norm=Norm(random(dtype, k), random(dtype, k), 1e-5) if wanted["norm"] else None,
        bias=random(dtype, m) if wanted["bias"] else None,
        residual=random(dtype, n, m) if wanted["residual"] else None,
        activation=activation,
    )
    got = linear_rows(x, weight, keep_normed=wanted["norm"], **options)
    assert_linear_rows_within_budget(got, x, weight, **options)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_products_stay_within_the_float64_budget(dtype):
    random_cases = given(problems())(lambda problem: check(dtype, problem))
    hypothesis.seed(TYPES.index(dtype))(settings(max_examples=30)(random_cases))()


def test_rows_longer_than_a_tile_are_summed_up():
    x, weight, residual = random(torch.float16, 5, 2500), random(torch.float16, 40, 2500), random(torch.float16, 5, 40)
    options = dict(bias=None, residual=residual, activation="relu")
    assert_linear_rows_within_budget(linear_rows(x, weight, **options), x, weight, **options)


def test_programs_of_large_vocabularies_take_more_columns():
    assert rows_config(4101, 128, normalised=True).block_n > rows_config(128, 128, normalised=True).block_n
    wanted = dict(norm=True, bias=True, residual=True)
    check(torch.float16, (9, 128, 4101, wanted, None, 1))  # the last program has five of its columns


@pytest.mark.parametrize("heads, dim", [(3, 16), (2, 64)])
def test_keys_and_values_go_to_their_slots(heads, dim):
    """And nothing else of the pool is written."""
    n, c, step = 6, heads * dim, torch.tensor([2], device=DEVICE)
    x, weight, bias = (
        random(torch.float16, n, c),
        random(torch.float16, 3 * c, c, scale=c**-0.5),
        random(torch.float16, 3 * c),
    )
    pool = torch.full((100, 2, dim), torch.nan, dtype=torch.float16, device=DEVICE)
    offsets = torch.randperm(12)[: heads * 4].view(heads, 4).to(DEVICE, torch.int32) * 8
    norm = Norm(random(torch.float16, c), random(torch.float16, c), 1e-5)
    q, normed = linear_rows(x, weight, bias, norm=norm, keep_normed=True, slots=Slots(pool, offsets, step))
    slots = offsets[:, 2].long() + torch.arange(n, device=DEVICE)[:, None]  # (N, H)
    written = torch.stack([q, *pool[slots].transpose(1, 2).flatten(2).unbind(1)], 1).flatten(1)
    assert_linear_rows_within_budget((written, normed), x, weight, bias=bias, norm=norm)
    pool[slots] = torch.nan
    assert pool.isnan().all()


def test_numbers_beyond_the_type_stay_so():
    x, weight = random(torch.float16, 3, 32), random(torch.float16, 16, 32)
    x[0, 3], weight[5] = torch.nan, torch.inf
    for activation in ACTIVATIONS:
        ours, _ = linear_rows(x, weight, None, activation=activation)
        expected, _ = linear_rows_reference(x, weight, activation=activation)
        torch.testing.assert_close(ours, expected, equal_nan=True, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("positions", [True, False])
def test_embeddings_are_those_of_torch(positions):
    table, step = random(torch.float16, 50, 24), torch.tensor([3], device=DEVICE)
    tokens, table_of_positions = torch.randint(50, (7,)).to(DEVICE), random(torch.float16, 5, 24) if positions else None
    ours = embed_rows(tokens, table, 24**0.5, table_of_positions, step)
    expected = 24**0.5 * table[tokens] + (table_of_positions[3] if positions else 0)
    torch.testing.assert_close(ours, expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (dict(x=torch.empty(MAX_ROWS + 1, 8, dtype=torch.float16)), "at most 16 rows"),
        (dict(x=torch.empty(2, 2000, dtype=torch.float16), norm=Norm(torch.empty(0), torch.empty(0), 0.1)), "of 1024"),
        (dict(activation="tanh"), "activation must be one of .*, got 'tanh'"),
        (dict(x=torch.empty(2, 8)), "must be float16 or bfloat16, got torch.float32"),
        (dict(weight=torch.empty(4, 8)), "of one type, got torch.float16 .*, torch.float32"),
        (dict(x=torch.empty(8, 2, dtype=torch.float16).T), r"expected contiguous .* of strides \(1, 2\)"),
        (
            dict(
                weight=torch.empty(24, 8, dtype=torch.float16),
                slots=Slots(torch.empty(4, 2, 8), torch.empty(1, 4), torch.zeros(1)),
            ),
            "heads of 8 columns are no multiple of block_n = 16",
        ),
    ],
)
def test_what_the_kernel_does_not_take_is_refused(change, error):
    half = dict(dtype=torch.float16)
    arguments = dict(x=torch.empty(2, 8, **half), weight=torch.empty(4, 8, **half), bias=None) | change
    with pytest.raises((ValueError, TypeError), match=error):
        linear_rows(**arguments)


@pytest.mark.parametrize("n", [3, 200])
def test_slots_of_a_step_follow_those_of_other_heads(n):
    table = torch.full((n + 1, 4), -1, dtype=torch.int32, device=DEVICE)
    offsets = torch.full((5, 4), -1, dtype=torch.int32, device=DEVICE)
    used, step = torch.tensor([10, 10, 70, 70, 70], device=DEVICE), torch.tensor([2], device=DEVICE)
    head, heads = torch.tensor([0, 1, 0, 1, 2], device=DEVICE), torch.tensor([2, 2, 3, 3, 3], device=DEVICE)
    expected = used + head * n
    number(n, table, offsets, used, head, heads, step)
    assert table[:n, 2].tolist() == list(range(n)) and (table[:, [0, 1, 3]] == -1).all() and table[n, 2] == -1
    assert torch.equal(offsets[:, 2].long(), expected) and (offsets[:, [0, 1, 3]] == -1).all()
    assert used.tolist() == [10 + 2 * n] * 2 + [70 + 3 * n] * 3
