"""How problems are put on the device: several launches, and addresses of 32 or 64 bits."""

import functools

import pytest
import torch

from triton_ops import AttentionLayout, block_sparse_attention, config
from triton_ops.testing import assert_within_budget, block_mask, make_case

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


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


@pytest.mark.parametrize("size", [40, 140], ids=["sentence", "lists"])
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
