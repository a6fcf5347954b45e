"""Run every kernel once on small cases, compared with the reference: for compute-sanitizer, on a GPU.

compute-sanitizer --tool memcheck python scripts/sanitize_kernels.py
compute-sanitizer --tool racecheck python scripts/sanitize_kernels.py

Every tensor is an allocation of its own: in the segments of torch's caching allocator the sanitizer does not see what
is read past the end of a tensor.
"""

import math
import os
from unittest import mock

os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"  # torch reads it when it first allocates

import torch
import torch.nn.functional as F

from ap_fairseq.search.beams import BeamSearchState
from triton_ops import AttentionLayout, append_to_pool, backward, decode_attention, launch
from triton_ops.layout import TILES
from triton_ops.norm import add_norm
from triton_ops.rows import MAX_ROWS, Norm, Slots, embed_rows, linear_rows
from triton_ops.testing import (
    assert_linear_rows_within_budget,
    assert_within_budget,
    block_mask,
    make_case,
    random_offsets,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # a CPU with TRITON_INTERPRET=1 checks the script itself


def random(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def attention() -> None:
    common = dict(heads=2, dim=64, dtype=torch.bfloat16, scale=0.125, dropout_p=0.1, use_lse=True, device=DEVICE)
    for number, tile in enumerate(TILES):
        keep = block_mask(2, 150, 140, tile, 0.5, seed=number)
        keep[:, :100] &= random(2, 100, 140) < 0.9
        keep[-1, :, -12:] = random(150, 12) < 0.5  # the last block of the last head, behind which memory ends
        lengths = dict(q_lengths=torch.tensor([150, 70]), k_lengths=torch.tensor([90, 140]))
        assert_within_budget(make_case(batch=2, q_size=150, k_size=140, keep=keep, tile=tile, **lengths, **common))
    for size in (32, 47, 64, 127, 128):
        lengths = dict.fromkeys(("q_lengths", "k_lengths"), torch.tensor([size, size // 2, 0]))
        keep = random(2, size, size) < 0.7
        assert_within_budget(make_case(batch=3, q_size=size, k_size=size, keep=keep, causal=True, **lengths, **common))
    for size in (31, 32, 128, 200):
        lengths, offsets = torch.tensor([size, size // 2, 1]), random_offsets(2, size, DEVICE)
        keep = offsets.keep_mask(size, size, lengths.to(DEVICE))
        sizes = dict(batch=3, q_size=size, k_size=size, k_lengths=lengths)
        assert_within_budget(make_case(keep=keep, offsets=offsets, **sizes, **common))


def long_lists() -> None:
    """dK and dV of `hopper.py` where it runs: full blocks, partial ones, both, and padded positions."""
    common = dict(batch=2, heads=2, dim=64, dtype=torch.bfloat16, scale=0.125, tile=128, use_lse=True, device=DEVICE)
    with mock.patch("triton_ops.layout.LONG_LIST", -math.inf):
        for number, (q_size, k_size) in enumerate([(640, 256), (400, 300), (150, 140)]):
            keep = block_mask(2, q_size, k_size, 128, 0.3, seed=number)
            keep[:, q_size // 2 :] &= random(2, q_size - q_size // 2, k_size) < 0.9
            lengths = dict(q_lengths=torch.tensor([q_size, 137]), k_lengths=torch.tensor([90, k_size]))
            for padding in ({}, lengths):
                assert_within_budget(make_case(q_size=q_size, k_size=k_size, keep=keep, **padding, **common))
    launched = {kernel.kernel.__name__ for kernels in launch._kept.values() for kernel in kernels}
    expected = backward.HOPPER and torch.cuda.get_device_capability() == (9, 0)
    if expected != ("_hopper_dkdv_kernel" in launched):
        raise AssertionError(f"expected the kernel of hopper.py {'to run' if expected else 'nowhere'}, got {launched}")


def decoding() -> None:
    cells, offsets = AttentionLayout.from_keep_mask((random(2, 90, 90) < 0.5).to(DEVICE)), random_offsets(2, 90, DEVICE)
    q = random(2, 3, 2, 64).to(DEVICE, torch.float16)
    for layout, shape in [(cells, (2, 3, 2, 90, 64)), (cells, (2, 2, 90, 64)), (offsets, (2, 2, 90, 64))]:
        k, v = (random(*shape, seed=seed).to(DEVICE, torch.float16) for seed in (2, 3))
        ours, reference = (decode_attention(q, k, v, layout, 60, backend=name) for name in ("triton", "sdpa"))
        torch.testing.assert_close(ours, reference, rtol=2e-2, atol=2e-2)


def few_rows() -> None:
    half = dict(device=DEVICE, dtype=torch.float16)
    bias, step = random(3 * 128).to(**half), torch.tensor([3], device=DEVICE)
    norm = Norm(random(128).to(**half), random(128, seed=2).to(**half), 1e-5)
    for n in (1, 9, MAX_ROWS):
        x = embed_rows(torch.arange(n, device=DEVICE), random(n, 128).to(**half), 2.0, random(4, 128).to(**half), step)
        weight = random(3 * 128, 128, seed=n).to(**half) / 128
        slots = Slots(torch.empty(2 * n, 2, 64, **half), torch.tensor([[0] * 4, [n] * 4], device=DEVICE), step)
        q, normed = linear_rows(x, weight, bias, norm=norm, keep_normed=True, slots=slots)
        k, v = slots.pool.view(2, n, 2, 64).permute(2, 1, 0, 3).flatten(2)
        got = torch.cat([q, k, v], 1), normed
        assert_linear_rows_within_budget(got, x, weight, bias=bias, norm=norm)
        for k_size, m, activation in ((100, 128, "relu"), (1100, 128, "gelu"), (128, 101, None)):
            x, weight = random(n, k_size).to(**half), random(m, k_size, seed=2).to(**half) / k_size
            options = dict(bias=None, activation=activation, residual=random(n, m, seed=3).to(**half))
            assert_linear_rows_within_budget(linear_rows(x, weight, **options), x, weight, **options)


def sums() -> None:
    for n, c in ((1, 48), (9, 512), (21, 1000)):
        x, y, gain, shift = (random(*size).to(DEVICE, torch.float16) for size in ((n, c), (n, c), (c,), (c,)))
        total, normed = add_norm(x, y, Norm(gain, shift, 1e-5))
        torch.testing.assert_close(total, x + y)
        torch.testing.assert_close(normed, F.layer_norm(total, (c,), gain, shift), rtol=1e-2, atol=1e-2)


def beam_search() -> None:
    states = []
    for kernels in (True, False):
        beams = BeamSearchState((4, 40, 8), 5, [2, 3], [2], torch.device(DEVICE), kernels)
        beams.begin(torch.ones(3, dtype=torch.int64, device=DEVICE), 30, 2)
        for step in range(3):
            beams.number_slots(4)
            if kernels:
                kv, pool = random(20, 2, 2, 64).to(DEVICE), torch.empty(1000, 2, 64, device=DEVICE)
                append_to_pool(kv, pool, beams.offsets[:2], beams.state.step)
            beams.advance(4, random(20, 500, seed=step).to(DEVICE), torch.zeros(500, device=DEVICE), 2)
        beams.number_slots(4)
        sums, place = random(4, 500, seed=3).to(DEVICE).topk(5)
        beams.continue_by(4, (sums, place % 5, place), 2)  # drawn tokens
        states.append(beams)
    torch.testing.assert_close(states[0].state.scores, states[1].state.scores)


if __name__ == "__main__":
    attention()
    long_lists()
    decoding()
    few_rows()
    sums()
    beam_search()
    print("all kernels agree with their reference")
