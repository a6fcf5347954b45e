"""The definition: its gradient, its agreement with torch's own attention, its random bits."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from triton_ops.reference import attention_reference, decode_reference, dropout_keep


def tensors(batch, heads, q_size, k_size, dim, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, heads, t, dim, generator=generator, dtype=dtype) for t in (q_size, k_size, k_size)]


@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
@pytest.mark.parametrize("causal", [False, True])
def test_gradient_of_the_definition(causal, dropout_p):
    q, k, v = (x.requires_grad_() for x in tensors(2, 2, 4, 5, 3))
    keep = torch.rand(2, 4, 5, generator=torch.Generator().manual_seed(1)) < 0.6
    keep[0, 1] = False  # a row without a visible key
    lengths = dict(q_lengths=torch.tensor([4, 2]), k_lengths=torch.tensor([5, 3]))

    def outputs(q, k, v):
        out, lse, _ = attention_reference(
            q, k, v, keep, scale=0.7, causal=causal, dropout_p=dropout_p, seed=5, **lengths
        )
        return out, torch.where(lse.isfinite(), lse, 0.0)

    assert torch.autograd.gradcheck(outputs, (q, k, v))


@settings(max_examples=40)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 10**6))
def test_agrees_with_scaled_dot_product_attention(q_size, k_size, seed):
    q, k, v = tensors(2, 3, q_size, k_size, 8, seed)
    keep = torch.rand(3, q_size, k_size, generator=torch.Generator().manual_seed(seed)) < 0.5
    keep[:, :, 0] = True
    out, lse, _ = attention_reference(q, k, v, keep, scale=8**-0.5)
    torch.testing.assert_close(out, torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=keep[None]))
    scores = (q @ k.mT * 8**-0.5).masked_fill(~keep, -torch.inf)
    torch.testing.assert_close(lse, torch.logsumexp(scores, -1))


def test_invisible_rows_are_zero_and_poisoned_padding_stays_out():
    q, k, v = tensors(2, 1, 3, 4, 8)
    k[0, :, 2:], v[0, :, 2:], q[1, :, 1:] = torch.nan, torch.nan, torch.nan
    keep = torch.ones(1, 3, 4, dtype=torch.bool)
    keep[0, 1] = False
    q.requires_grad_()
    out, lse, _ = attention_reference(
        q, k, v, keep, scale=1.0, q_lengths=torch.tensor([3, 1]), k_lengths=torch.tensor([2, 4])
    )
    (grad,) = torch.autograd.grad(out.sum(), q)
    assert out.isfinite().all() and grad.isfinite().all()
    for row in [(0, 0, 1), (1, 0, 1), (1, 0, 2)]:
        assert (out[row] == 0).all() and (grad[row] == 0).all() and lse[row] == -math.inf


def test_dropout_rate_independence_and_seeds():
    bits = dropout_keep(1234567890123, 6, 200, 300, 0.3)
    n = bits.numel()
    assert abs(bits.double().mean().item() - 0.7) < 5 * math.sqrt(0.3 * 0.7 / n)
    for axis in (0, 1, 2):
        a, b = bits.narrow(axis, 1, bits.size(axis) - 1), bits.narrow(axis, 0, bits.size(axis) - 1)
        agree = (a == b).double().mean().item()  # 0.7² + 0.3² where the cells are independent
        assert abs(agree - 0.58) < 5 * math.sqrt(0.58 * 0.42 / a.numel())
    eight_apart = (bits[:, 8:] == bits[:, :-8]).double().mean().item()  # the cells that share a Philox call
    assert abs(eight_apart - 0.58) < 5 * math.sqrt(0.58 * 0.42 / n)
    assert not torch.equal(bits, dropout_keep(1234567890124, 6, 200, 300, 0.3))
    assert not torch.equal(bits, dropout_keep(1234567890123 + 2**32, 6, 200, 300, 0.3))
    assert torch.equal(bits, dropout_keep(torch.tensor([1234567890123]), 6, 200, 300, 0.3))


def test_dropout_bits_of_a_corner_are_those_of_the_whole():
    assert torch.equal(dropout_keep(7, 3, 50, 40, 0.5)[:, :13, :21], dropout_keep(7, 3, 13, 21, 0.5))


def test_philox_matches_the_published_generator():
    """Known answer of Philox-4x32-7, counter and key 0 (Random123, kat_vectors), read through the keep bits."""
    words = (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48)
    cells = [(0, 0), (0, 8), (8, 0), (8, 8)]
    for word, (row, col) in zip(words, cells, strict=True):
        low, high = (word >> 1) / 2**31, ((word >> 1) + 1) / 2**31
        assert dropout_keep(0, 1, 9, 9, low)[0, row, col] and not dropout_keep(0, 1, 9, 9, high)[0, row, col]


def test_decode_reads_the_pool_rows_of_the_table():
    q = torch.randn(1, 2, 1, 4)
    k, v = torch.randn(6, 1, 4), torch.randn(6, 1, 4)
    table = torch.tensor([[[1, 0, 5], [1, 2, 4]]])
    keep = torch.ones(1, 3, dtype=torch.bool)
    got = decode_reference(q, k, v, keep, scale=1.0, block_table=table)
    for beam in range(2):
        kk, vv = (x[table[0, beam], 0] for x in (k, v))
        torch.testing.assert_close(got[0, beam, 0], torch.softmax(q[0, beam, 0] @ kk.T, -1) @ vv)


def test_decode_reads_each_sentence_from_its_start():
    q = torch.randn(2, 3, 1, 4)
    k, v = torch.randn(7, 1, 4), torch.randn(7, 1, 4)
    lengths, starts = torch.tensor([2, 4]), torch.tensor([5, 1])
    keep = torch.ones(1, 5, dtype=torch.bool)
    got = decode_reference(q, k, v, keep, scale=1.0, k_lengths=lengths, cache_starts=starts)
    for b, (start, length) in enumerate(zip(starts, lengths, strict=True)):
        kk, vv = (x[start : start + length, 0] for x in (k, v))
        torch.testing.assert_close(got[b, :, 0], torch.softmax(q[b, :, 0] @ kk.T, -1) @ vv)


def test_probabilities_come_with_the_output():
    q, k, v = tensors(2, 2, 4, 5, 3)
    keep = torch.rand(2, 4, 5, generator=torch.Generator().manual_seed(1)) < 0.6
    keep[0, 1] = False
    out, lse, probs = attention_reference(q, k, v, keep, scale=0.7, k_lengths=torch.tensor([5, 3]))
    torch.testing.assert_close(probs @ v, out)
    assert (probs[:, ~keep] == 0).all() and (probs[1, :, :, 3:] == 0).all()
    torch.testing.assert_close(probs.sum(-1), lse.isfinite().double())


def test_another_softmax_takes_the_place_of_torchs():
    q, k, v = tensors(1, 1, 3, 4, 8)
    keep = torch.ones(1, 3, 4, dtype=torch.bool)
    keep[0, 1] = False
    out, _, probs = attention_reference(
        q, k, v, keep, scale=1.0, softmax=lambda scores: torch.softmax(scores, -1).round()
    )
    assert (probs[:, :, 1] == 0).all() and ((probs == 0) | (probs == 1)).all()
    torch.testing.assert_close(out, probs @ v)
