"""Run every kernel once on small cases, compared with the reference: for compute-sanitizer, on a GPU.

compute-sanitizer --tool memcheck python scripts/sanitize_kernels.py
compute-sanitizer --tool racecheck python scripts/sanitize_kernels.py attention --only "tiles of 16"

Each case is named before it runs, with the seconds since the start. The reference runs on the CPU: a sanitizer watches
every kernel, those of torch as well, and racecheck every access to shared memory, of which products in float64 make far
more than our kernels. Sections, and parts of them by --only, can run in processes side by side:

for section in attention hopper decoding few_rows sums beam_search; do
    compute-sanitizer --tool racecheck python scripts/sanitize_kernels.py $section > $section.txt 2>&1 &
done; wait

Every tensor is an allocation of its own: in the segments of torch's caching allocator the sanitizer does not see what
is read past the end of a tensor.
"""

import argparse
import functools
import os
import time
from collections.abc import Callable, Iterator

os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"  # torch reads it when it first allocates

import torch
import torch.nn.functional as F

from triton_ops import AttentionLayout, append_to_pool, config, decode_attention, launch
from triton_ops.layout import TILES
from triton_ops.norm import add_norm
from triton_ops.rows import MAX_ROWS, Norm, Slots, embed_rows, linear_rows
from triton_ops.testing import (
    HOPPER_KERNELS,
    assert_linear_rows_within_budget,
    assert_within_budget,
    block_mask,
    make_case,
    random_offsets,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # a CPU with TRITON_INTERPRET=1 checks the script itself
STARTED = time.monotonic()
Cases = Iterator[tuple[str, Callable[[], None]]]  # what each is, and what runs it


def random(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def half(*shape: int, seed: int = 1) -> torch.Tensor:
    return random(*shape, seed=seed).half()


def attend(**options) -> None:
    common = dict(heads=2, dim=64, dtype=torch.bfloat16, scale=0.125, use_lse=True)
    assert_within_budget(make_case(**common | options), DEVICE)


def attention() -> Cases:
    for number, tile in enumerate(TILES):
        keep = block_mask(2, 150, 140, tile, 0.5, seed=number)
        keep[:, :100] &= random(2, 100, 140) < 0.9
        keep[-1, :, -12:] = random(150, 12) < 0.5  # the last block of the last head, behind which memory ends
        lengths = dict(q_lengths=torch.tensor([150, 70]), k_lengths=torch.tensor([90, 140]))
        case = dict(batch=2, q_size=150, k_size=140, keep=keep, tile=tile, dropout_p=0.1, **lengths)
        yield f"tiles of {tile[0]} x {tile[1]}", functools.partial(attend, **case)
    for size in (32, 47, 64, 127, 128):
        lengths = dict.fromkeys(("q_lengths", "k_lengths"), torch.tensor([size, size // 2, 0]))
        keep = random(2, size, size) < 0.7
        case = dict(batch=3, q_size=size, k_size=size, keep=keep, causal=True, dropout_p=0.1, **lengths)
        yield f"sentences of {size}", functools.partial(attend, **case)
    for size in (31, 32, 128, 200):
        lengths, offsets = torch.tensor([size, size // 2, 1]), random_offsets(2, size)
        keep = offsets.keep_mask(size, size, lengths)
        case = dict(batch=3, q_size=size, k_size=size, keep=keep, offsets=offsets, dropout_p=0.1, k_lengths=lengths)
        yield f"offsets, sentences of {size}", functools.partial(attend, **case)


def attend_on_hopper(dim: int, **case) -> None:
    launch.forget()
    attend(batch=2, dim=dim, **case)
    launched = launch.kept_kernels()
    expected = set()
    if config.HOPPER and torch.cuda.get_device_capability() == (9, 0):
        expected = {name for name, sizes in HOPPER_KERNELS.items() if dim in sizes}
    if expected != {name for name in launched if "hopper" in name}:
        raise AssertionError(f"expected of the kernels in Gluon {expected} to run, got {launched}")


def hopper() -> Cases:
    """The kernels in Gluon where they run: full blocks, partial ones, both, and padded positions.

    A list has up to three full blocks, one, or none: six tiles, twice as many as a ring has stages, two, or none.
    """
    for number, (q_size, k_size) in enumerate([(640, 256), (280, 300), (150, 140), (200, 500)]):
        tile = 128 if number < 3 else 64
        keep = block_mask(2, q_size, k_size, tile, 0.3, seed=number)
        keep[:, q_size - 140 :] &= random(2, 140, k_size) < 0.9
        lengths = dict(q_lengths=torch.tensor([q_size, 137]), k_lengths=torch.tensor([90, k_size]))
        for what, padding in (("", {}), (", padded", lengths)):
            case = dict(q_size=q_size, k_size=k_size, keep=keep, tile=tile, **padding)
            for dim in (64,) if number > 1 else (64, 32, 96, 128):
                name = f"{q_size} x {k_size}, tiles of {tile}{what}, heads of {dim}"
                yield name, functools.partial(attend_on_hopper, dim, **case)


def decoding() -> Cases:
    cells, offsets = AttentionLayout.from_keep_mask(random(2, 90, 90) < 0.5), random_offsets(2, 90)

    def decode(layout, shape) -> None:
        inputs = half(2, 3, 2, 64), half(*shape, seed=2), half(*shape, seed=3)
        reference = decode_attention(*inputs, layout, 60, backend="sdpa")
        ours = decode_attention(*(x.to(DEVICE) for x in inputs), layout.to(DEVICE), 60, backend="triton")
        torch.testing.assert_close(ours.cpu(), reference, rtol=2e-2, atol=2e-2)

    yield "cells, a cache for each hypothesis", functools.partial(decode, cells, (2, 3, 2, 90, 64))
    yield "cells, a shared cache", functools.partial(decode, cells, (2, 2, 90, 64))
    yield "offsets, a shared cache", functools.partial(decode, offsets, (2, 2, 90, 64))


def few_rows() -> Cases:
    def projections(n: int) -> None:
        table, positions, bias = half(n, 128), half(4, 128), half(3 * 128)
        norm, weight = Norm(half(128), half(128, seed=2), 1e-5), half(3 * 128, 128, seed=n) / 128
        step, offsets = torch.tensor([3], device=DEVICE), torch.tensor([[0] * 4, [n] * 4], device=DEVICE)
        pool = torch.empty(2 * n, 2, 64, device=DEVICE, dtype=torch.float16)
        x = embed_rows(torch.arange(n, device=DEVICE), table.to(DEVICE), 2.0, positions.to(DEVICE), step)
        ours = Norm(norm.weight.to(DEVICE), norm.bias.to(DEVICE), norm.epsilon)
        slots = Slots(pool, offsets, step)
        q, normed = linear_rows(x, weight.to(DEVICE), bias.to(DEVICE), norm=ours, keep_normed=True, slots=slots)
        k, v = pool.view(2, n, 2, 64).permute(2, 1, 0, 3).flatten(2)
        got = torch.cat([q, k, v], 1).cpu(), normed.cpu()
        torch.testing.assert_close(x.cpu(), 2 * table + positions[3])
        assert_linear_rows_within_budget(got, x.cpu(), weight, bias=bias, norm=norm)

    def product(n: int, k_size: int, m: int, activation: str | None) -> None:
        x, weight, residual = half(n, k_size), half(m, k_size, seed=2) / k_size, half(n, m, seed=3)
        options = dict(bias=None, activation=activation)
        y, _ = linear_rows(x.to(DEVICE), weight.to(DEVICE), residual=residual.to(DEVICE), **options)
        assert_linear_rows_within_budget((y.cpu(), x), x, weight, residual=residual, **options)

    for n in (1, 9, MAX_ROWS):
        yield f"{n}: embedding, normalisation, queries, keys and values", functools.partial(projections, n)
        for k_size, m, activation in ((100, 128, "relu"), (1100, 128, "gelu"), (128, 101, None), (128, 4101, None)):
            yield f"{n}: {k_size} x {m}, {activation}", functools.partial(product, n, k_size, m, activation)


def sums() -> Cases:
    def add(n: int, c: int) -> None:
        x, y, gain, shift = half(n, c), half(n, c), half(c), half(c)
        total, normed = add_norm(x.to(DEVICE), y.to(DEVICE), Norm(gain.to(DEVICE), shift.to(DEVICE), 1e-5))
        torch.testing.assert_close(total.cpu(), x + y)
        reference = F.layer_norm((x + y).float(), (c,), gain.float(), shift.float())
        torch.testing.assert_close(normed.cpu().float(), reference, rtol=1e-2, atol=1e-2)

    for n, c in ((1, 48), (9, 512), (21, 1000)):
        yield f"{n} rows of {c}", functools.partial(add, n, c)


def beam_search() -> Cases:
    from ap_fairseq.search.beams import BeamSearchState  # needs fairseq, the other sections do not
    from ap_fairseq.search.capacity import Capacity

    def search(device: str, kernels: bool) -> torch.Tensor:
        beams = BeamSearchState(Capacity(4, 8, 40), 5, [2, 3], [2], torch.device(device), kernels)
        beams.begin(torch.ones(3, dtype=torch.int64, device=device), 30, 2)
        for step in range(3):
            beams.number_slots(4)
            if kernels:
                kv, pool = random(20, 2, 2, 64).to(device), torch.empty(1000, 2, 64, device=device)
                append_to_pool(kv, pool, beams.offsets[:2], beams.state.step)
            beams.advance(4, random(20, 500, seed=step).to(device), torch.zeros(500, device=device), 2)
        beams.number_slots(4)
        sums, place = random(4, 500, seed=3).topk(5)
        beams.continue_by(4, tuple(x.to(device) for x in (sums, place % 5, place)), 2)  # drawn tokens
        return beams.state.scores.cpu()

    yield "four steps", lambda: torch.testing.assert_close(search(DEVICE, True), search("cpu", False))


SECTIONS = {section.__name__: section for section in (attention, hopper, decoding, few_rows, sums, beam_search)}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Run every kernel on small cases, for compute-sanitizer.")
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=f"of {', '.join(SECTIONS)}; by default all")
    parser.add_argument("--only", default="", metavar="TEXT", help="cases with TEXT in their name")
    args = parser.parse_args(arguments)
    unknown = [name for name in args.sections if name not in SECTIONS]
    if unknown:
        parser.error(f"unknown section {', '.join(unknown)}; choose from {', '.join(SECTIONS)}")
    n = 0
    for section in args.sections or SECTIONS:
        for name, run in SECTIONS[section]():
            if args.only in name:
                print(f"{time.monotonic() - STARTED:7.1f} s  {section}: {name}", flush=True)
                run()
                n += 1
    if n == 0:
        parser.error(f"no case of these sections has {args.only!r} in its name")
    print(f"{time.monotonic() - STARTED:7.1f} s  cases that agree with the reference: {n}", flush=True)


if __name__ == "__main__":
    main()
