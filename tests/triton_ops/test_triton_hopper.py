"""The kernels in Gluon, on the GPUs that have it: against float64, and that they are what runs."""

from collections import Counter

import pytest
import torch

from triton_ops import AttentionLayout, block_sparse_attention, config, launch
from triton_ops.testing import HOPPER_KERNELS, assert_within_budget, block_mask, make_case

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0) and config.HOPPER
pytestmark = pytest.mark.skipif(not HOPPER, reason="needs compute capability 9.0 and triton 3.6")


def each(times, dim=64):
    """Launches of the kernels that take heads of this size."""
    return {name: times for name, sizes in HOPPER_KERNELS.items() if dim in sizes}


@pytest.fixture
def launched(monkeypatch):
    """How often each of the kernels was launched."""
    from triton_ops.hopper import HopperLaunch

    counts, call = Counter(), HopperLaunch.__call__

    def counted(self, **tensors):
        counts[self.kernel.__name__] += 1
        call(self, **tensors)

    monkeypatch.setattr(HopperLaunch, "__call__", counted)
    launch.forget()
    yield counts
    launch.forget()


def mask(kind, q_size, k_size, seed=0, tile=128):
    keep = block_mask(2, q_size, k_size, tile, 0.5, seed=seed, diagonal=False)
    most = torch.rand(keep.shape, generator=torch.Generator().manual_seed(seed)) < 0.9
    if kind == "elements":
        keep &= most
    if kind == "mixed":  # full blocks, partial ones and rows without a key
        keep[:, : q_size // 2] &= most[:, : q_size // 2]
        keep[:, 130:150] = False
    return torch.ones_like(keep) if kind == "full" else keep


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["full", "blocks", "mixed", "elements"])
@pytest.mark.parametrize("sizes", [(512, 512), (129, 1000), (700, 300)])
@pytest.mark.parametrize("with_lengths", [False, True])
@pytest.mark.parametrize("tile", [64, 128])
def test_output_and_gradients_are_within_the_error_budget(launched, dtype, kind, sizes, with_lengths, tile):
    """Padded positions hold NaN."""
    q_size, k_size = sizes
    shape = dict(batch=3, heads=2, q_size=q_size, k_size=k_size, dim=64)
    if with_lengths:
        shape["q_lengths"] = torch.tensor([q_size, q_size // 2 + 1, 0])
        shape["k_lengths"] = torch.tensor([k_size // 3, k_size, 5])
    for number, (causal, time_first) in enumerate([(False, True), (True, False)]):
        how = dict(seed=number, causal=causal, time_first=time_first, use_lse=number == 0, scale=0.125)
        keep = mask(kind, q_size, k_size, number, tile)
        assert_within_budget(make_case(dtype=dtype, keep=keep, tile=tile, device="cuda", **shape, **how))
    assert launched == each(2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["full", "mixed"])
@pytest.mark.parametrize("dim", [32, 96, 128])
@pytest.mark.parametrize("tile", [64, 128])
def test_heads_of_other_sizes_are_within_the_error_budget(launched, dtype, kind, dim, tile):
    """Tiles of heads of 96 elements come in two parts. Padded positions hold NaN."""
    shape = dict(batch=3, heads=2, q_size=700, k_size=500, dim=dim, scale=dim**-0.5)
    lengths = dict(q_lengths=torch.tensor([700, 351, 0]), k_lengths=torch.tensor([166, 500, 5]))
    for number, options in enumerate([dict(time_first=True, use_lse=True), dict(time_first=False, **lengths)]):
        how = dict(seed=number, causal=number == 1, **options)
        keep = mask(kind, 700, 500, number, tile)
        assert_within_budget(make_case(dtype=dtype, keep=keep, tile=tile, device="cuda", **shape, **how))
    assert launched == each(2, dim)


@pytest.mark.parametrize(
    "heads, kind, dim", [(2, "mixed", 64), (1, "blocks", 64), (2, "full", 64), (2, "mixed", 96), (2, "mixed", 128)]
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_bits_are_the_same_in_every_run_and_in_a_cuda_graph(launched, heads, kind, dim, dtype):
    """heads: of the mask."""
    layout = AttentionLayout.from_keep_mask(mask(kind, 1024, 1024)[:heads].cuda(), tile=128)
    q, k, v, grad = (torch.randn(2, 2, 1024, dim, device="cuda", dtype=dtype) for _ in range(4))
    leaves = [x.requires_grad_() for x in (q, k, v)]

    def run():
        out = block_sparse_attention(*leaves, layout, backend="triton")
        return out.detach(), *torch.autograd.grad(out, leaves, grad)

    first = run()
    for _ in range(20):
        assert all(torch.equal(a, b) for a, b in zip(run(), first, strict=True))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for _ in range(3):
        for x in captured:
            x.fill_(torch.nan)
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(captured, first, strict=True))
    assert launched == each(22, dim)


def test_several_launches_give_what_one_gives(launched, monkeypatch):
    monkeypatch.setattr("triton_ops.config.MAX_GRID_YZ", 2)
    keep = mask("mixed", 300, 300)[:1].expand(3, -1, -1)
    sizes = dict(batch=5, heads=3, q_size=300, k_size=300, dim=64, tile=128, scale=0.125)
    assert_within_budget(make_case(dtype=torch.bfloat16, keep=keep, device="cuda", **sizes))
    assert launched == each(6)


@pytest.mark.parametrize(
    "tile, dim, options",
    [
        (32, 64, {}),
        (128, 16, {}),
        (128, 64, dict(dropout_p=0.1, seed=1)),
        (128, 64, dict(dtype=torch.float32)),
        (128, 64, dict(gap=1)),  # rows that the accelerator cannot read
        (128, 96, dict(gap=4)),
    ],
)
def test_what_they_do_not_cover_takes_the_kernels_in_triton(launched, tile, dim, options):
    arguments = dict(batch=1, heads=2, q_size=200, k_size=200, dtype=torch.bfloat16, scale=0.125) | options
    assert_within_budget(make_case(dim=dim, keep=mask("blocks", 200, 200), tile=tile, device="cuda", **arguments))
    assert not launched


@pytest.mark.parametrize("dim", config.HOPPER_DQ)
@pytest.mark.parametrize("name", HOPPER_KERNELS)
def test_sizes_of_heads_can_be_taken_from_each_of_them(launched, monkeypatch, name, dim):
    monkeypatch.delitem(HOPPER_KERNELS[name], dim, raising=False)
    sizes = dict(batch=1, heads=2, q_size=512, k_size=512, dim=dim, tile=128, scale=0.125)
    assert_within_budget(make_case(dtype=torch.bfloat16, keep=mask("full", 512, 512), device="cuda", **sizes))
    assert launched == each(1, dim) and name not in launched


def test_they_can_be_switched_off(launched, monkeypatch):
    monkeypatch.setattr(config, "HOPPER", False)
    sizes = dict(batch=1, heads=2, q_size=512, k_size=512, dim=64, tile=128, scale=0.125)
    assert_within_budget(make_case(dtype=torch.bfloat16, keep=mask("full", 512, 512), device="cuda", **sizes))
    assert not launched
