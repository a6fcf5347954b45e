"""How problems are put on the device: calls like earlier ones, several launches, and addresses of 32 or 64 bits."""

import copy
import functools

import pytest
import torch
import triton

from triton_ops import AttentionLayout, api, backward, block_sparse_attention, config, forward, launch
from triton_ops import layout as layout_module
from triton_ops.testing import assert_within_budget, block_mask, make_case

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def _no_launches_of_other_tests():
    launch.forget()
    yield
    launch.forget()


def small_problem(size, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2, 2, size, 16, generator=generator).to(DEVICE).requires_grad_() for _ in range(3)]


def random_layout(size):
    keep = torch.rand(2, size, size, generator=torch.Generator().manual_seed(1)) < 0.7
    return AttentionLayout.from_keep_mask(keep.to(DEVICE), tile=32)


def test_a_call_like_an_earlier_one_is_neither_checked_nor_bound_again(size, monkeypatch):
    """Same results as from a fresh layout, gradients included, for other tensors and lengths of the same kinds."""
    layout = random_layout(size)

    def run(layout, seed):
        q, k, v = small_problem(size, seed)
        lengths = torch.tensor([size, seed + 3], device=DEVICE)
        options = dict(k_lengths=lengths, dropout_p=0.2, seed=torch.tensor([seed], device=DEVICE), backend="triton")
        out = block_sparse_attention(q, k, v, layout, **options)
        return [out, *torch.autograd.grad(out.square().sum(), (q, k, v))]

    expected = [run(random_layout(size), seed) for seed in (1, 2)]
    run(layout, 1)

    def again(*_):
        raise AssertionError("checked, or put together, again")

    monkeypatch.setattr(api, "_check_kinds", again)
    monkeypatch.setattr(launch.Launch, "__init__", again)
    for module in (forward, backward):
        monkeypatch.setattr(module, "on_hopper", again)
    for seed, results in zip((1, 2), expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(run(layout, seed), results, strict=True))


def test_layers_share_launches(size, monkeypatch):
    """Every layer has a mask, and most batches sizes that no earlier one had: they are bound for the first layer."""

    def run(layout):
        q, k, v = small_problem(size)
        out = block_sparse_attention(q, k, v, layout, backend="triton")
        return [out, *torch.autograd.grad(out.square().sum(), (q, k, v))]

    other = AttentionLayout.from_keep_mask(~random_layout(size).keep_mask(), tile=32)
    expected = run(other)
    launch.forget()
    other.known_calls.clear()
    run(random_layout(size))
    monkeypatch.setattr(launch.Launch, "__init__", None)
    assert all(torch.equal(a, b) for a, b in zip(run(other), expected, strict=True))


OTHERWISE = {
    "causal": dict(causal=True),
    "dropout": dict(dropout_p=0.3, seed=5),
    "scale": dict(scale=0.5),
    "lengths": dict(k_lengths=torch.tensor([7, 9])),
    "short lengths": dict(k_lengths=torch.tensor([7, 9], dtype=torch.int32)),
    "lse": dict(return_lse=True),
    "back end": dict(backend="sdpa"),
}


@pytest.mark.parametrize("name", OTHERWISE)
def test_a_call_with_another_option_is_another_call(size, name):
    layout, (q, k, v) = random_layout(size), small_problem(size)
    change = {key: x.to(DEVICE) if isinstance(x, torch.Tensor) else x for key, x in OTHERWISE[name].items()}
    options = dict(backend="triton")
    first = block_sparse_attention(q, k, v, layout, **options)
    for _ in range(2):
        got = block_sparse_attention(q, k, v, layout, **options | change)
        expected = block_sparse_attention(q, k, v, random_layout(size), **options | change)
        torch.testing.assert_close(got, expected, rtol=0, atol=0)
    assert torch.equal(block_sparse_attention(q, k, v, layout, **options), first)


def test_addresses_may_change_from_multiples_of_16_bytes_to_others_and_back(size):
    """Kernels are compiled for either; calls alike otherwise must not share them."""
    layout, tensors = random_layout(size), [x.detach() for x in small_problem(size)]
    results = []
    for shift in (0, 1, 0, 1):
        moved = [torch.cat([x.new_zeros(shift), x.flatten()])[shift:].view_as(x).requires_grad_() for x in tensors]
        out = block_sparse_attention(*moved, layout, backend="triton")
        results.append([out, *torch.autograd.grad(out.square().sum(), moved)])
    for other in results[1:]:
        torch.testing.assert_close(other, results[0])


def test_hooks_of_autograd_may_lay_out_anew_what_the_backward_pass_reads(size):
    """As `save_on_cpu` into pinned memory does; gradients of keys and values were those of scrambled rows, unsaid."""
    layout, grad = random_layout(size), small_problem(size, 1)[0].detach()
    leaves = [x.detach().permute(2, 0, 1, 3).contiguous().requires_grad_() for x in small_problem(size)]

    def gradients():
        out = block_sparse_attention(*[x.permute(1, 2, 0, 3) for x in leaves], layout, backend="triton")
        return torch.autograd.grad(out, leaves, grad)

    expected = gradients()
    with torch.autograd.graph.saved_tensors_hooks(torch.Tensor.contiguous, lambda x: x):
        torch.testing.assert_close(gradients(), expected)
    torch.testing.assert_close(gradients(), expected)


def test_a_layout_that_was_attended_with_can_be_copied():
    """Fairseq copies models for their moving average; compiled kernels cannot be copied."""
    layout, (q, k, v) = random_layout(20), small_problem(20)
    out = block_sparse_attention(q, k, v, layout, backend="triton")
    assert layout.known_calls
    copied = copy.deepcopy(layout)
    assert not copied.known_calls and torch.equal(block_sparse_attention(q, k, v, copied, backend="triton"), out)


@pytest.mark.parametrize("name", ["k_lengths", "seed"])
def test_tensors_of_the_caller_that_change_before_the_backward_pass_are_reported(size, name):
    """It reads them again: the gradient would be that of another call."""
    layout, (q, k, v) = random_layout(size), small_problem(size)
    changed = dict(k_lengths=torch.tensor([7, 9], device=DEVICE), seed=torch.tensor([1], device=DEVICE))
    for _ in range(2):
        out = block_sparse_attention(q, k, v, layout, dropout_p=0.1, backend="triton", **changed)
        changed[name] -= 1
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            torch.autograd.grad(out.sum(), q)


@pytest.mark.skipif(DEVICE == "cpu", reason="the interpreter has no hooks: run on a machine with a GPU")
def test_hooks_see_launches_that_repeat(size):
    layout, (q, k, v) = random_layout(size), small_problem(size)
    seen = []

    def note(metadata):
        seen.append(metadata.get()["name"])

    def run():
        return block_sparse_attention(q, k, v, layout, backend="triton")

    first = [run() for _ in range(2)][-1]
    hooks = triton.knobs.runtime.launch_enter_hook
    if not hasattr(hooks, "add"):
        pytest.skip(f"triton {triton.__version__} has no list of hooks")
    hooks.add(note)
    try:
        assert torch.equal(run(), first) and len(seen) == 1
    finally:
        hooks.remove(note)
    assert torch.equal(run(), first) and len(seen) == 1


@pytest.mark.skipif(DEVICE == "cpu", reason="the interpreter compiles nothing: run on a machine with a GPU")
@pytest.mark.parametrize("tile", [16, 32, 64, 128])
def test_launches_that_repeat_read_the_tensors_of_each_call(tile):
    """Descriptors of tensors (tiles of 32 and more) are kept by address."""
    layout = AttentionLayout.from_keep_mask(block_mask(2, 300, 300, tile, 0.5, seed=1).to(DEVICE), tile=tile)

    def run(seed):
        generator = torch.Generator().manual_seed(seed)
        tensors = [torch.randn(2, 2, 300, 64, generator=generator).to(DEVICE, torch.bfloat16) for _ in range(4)]
        *inputs, grad = [x.requires_grad_() for x in tensors]
        out = block_sparse_attention(*inputs, layout, backend="triton")
        return inputs, [out, *torch.autograd.grad(out, inputs, grad)]

    expected = []
    for seed in range(3):
        launch.forget()
        expected.append(run(seed))  # bound to these tensors alone; held, so that addresses differ
    launch.forget()
    for seed in (0, 1, 2, 0, 1, 2):
        assert all(torch.equal(a, b) for a, b in zip(run(seed)[1], expected[seed][1], strict=True))


def test_calls_and_launches_are_kept_up_to_a_number(monkeypatch):
    monkeypatch.setattr(layout_module, "MOST_CALLS", 3)
    monkeypatch.setattr(launch, "MOST_KEPT", 3)
    layout = random_layout(20)
    for size in range(1, 9):
        x = torch.randn(1, 2, size, 16, device=DEVICE)
        block_sparse_attention(x, x, x, layout, backend="triton")
        assert len(layout.known_calls) <= 3
        launch.kept(size, list)
        assert launch.kept(size, lambda: [1]) == []


@pytest.mark.skipif(DEVICE == "cuda", reason="values are checked on a CPU: run with CUDA_VISIBLE_DEVICES=")
def test_values_of_lengths_are_checked_in_every_call():
    layout, (q, k, v) = random_layout(20), small_problem(20)
    block_sparse_attention(q, k, v, layout, k_lengths=torch.tensor([20, 3]), backend="triton")
    with pytest.raises(ValueError, match=r"k_lengths.*\[0, 20\].*from 3 to 21"):
        block_sparse_attention(q, k, v, layout, k_lengths=torch.tensor([21, 3]), backend="triton")


def test_grids_cover_every_head_and_sentence_once(monkeypatch):
    monkeypatch.setattr(config, "MAX_GRID_YZ", 4)
    seen = [
        (first_h + i_h, first_b + i_b)
        for (n_tiles, heads, batch), first_h, first_b in config.grids(3, 5, 9)
        for i_h in range(heads)
        for i_b in range(batch)
    ]
    assert sorted(seen) == [(i_h, i_b) for i_h in range(5) for i_b in range(9)]


@pytest.mark.parametrize("axis", [1, 2])
def test_several_launches_give_what_one_gives(axis, monkeypatch):
    monkeypatch.setattr(config, "MAX_GRID_YZ", axis)
    keep = block_mask(3, 140, 130, 32, 0.5, seed=1)
    lengths = dict(q_lengths=torch.tensor([140, 30, 77]), k_lengths=torch.tensor([130, 130, 50]))
    assert_within_budget(
        make_case(
            batch=3, heads=3, q_size=140, k_size=130, dim=16, dtype=torch.float32, keep=keep, tile=32, scale=0.25,
            dropout_p=0.2, device=DEVICE, **lengths,
        )
    )  # fmt: skip


def strided(shape, row_stride):
    """Like a tensor of `shape`, with rows that lie `row_stride` elements apart; nothing is allocated."""
    return torch.empty(1, device="meta").as_strided(shape, (0, 0, row_stride, 1))


def test_offsets_of_32_bits_need_equal_row_strides_and_near_rows():
    shape = 2, 3, 257, 64
    assert config.int32_offsets(strided(shape, 64), strided(shape, 64))
    assert not config.int32_offsets(strided(shape, 64), strided(shape, 128))
    assert config.int32_offsets(strided(shape, 2**23 - 1), strided(shape, 2**23 - 1))
    assert not config.int32_offsets(strided(shape, 2**23), strided(shape, 2**23))


@pytest.mark.parametrize("tile", [16, 32])
def test_far_rows_give_what_near_rows_give(tile, monkeypatch):
    keep = block_mask(2, 140, 130, tile, 0.5, seed=1) & (torch.rand(2, 140, 130) < 0.99)
    build = functools.partial(
        make_case, batch=2, heads=2, q_size=140, k_size=130, dim=16, dtype=torch.float32, keep=keep, tile=tile,
        scale=0.25, device=DEVICE,
    )  # fmt: skip
    monkeypatch.setattr(config, "MAX_INT32_OFFSET", 0)
    assert_within_budget(build(q_lengths=torch.tensor([140, 33]), k_lengths=torch.tensor([130, 99])))


def test_keys_and_values_may_have_different_strides(size):
    packed = torch.randn(1, 2, size, 3, 16, device=DEVICE)
    q, k, v = packed[..., 0, :], packed[..., 1, :].contiguous(), packed[..., 2, :]
    layout = AttentionLayout.from_keep_mask(torch.ones(1, size, size, dtype=torch.bool, device=DEVICE))
    out = block_sparse_attention(q, k, v, layout, backend="triton")
    expected = block_sparse_attention(q, k, v.contiguous(), layout, backend="triton")
    torch.testing.assert_close(out, expected, rtol=0, atol=0)


def test_padded_rows_are_zero_beside_values_that_are_not_finite():
    q = torch.randn(1, 1, 140, 16, device=DEVICE)
    v = q.clone()
    v[:, :, 3] = torch.inf
    layout = AttentionLayout.from_keep_mask(torch.ones(1, 140, 140, dtype=torch.bool, device=DEVICE), tile=32)
    out = block_sparse_attention(q, q, v, layout, q_lengths=torch.tensor([70], device=DEVICE), backend="triton")
    assert (out[:, :, 70:] == 0).all() and out[:, :, :70].isinf().all()
