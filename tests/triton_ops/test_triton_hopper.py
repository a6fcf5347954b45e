"""dK and dV in Gluon, on the GPUs that have it: against float64, and that it is what runs."""

import math

import pytest
import torch

from triton_ops import AttentionLayout, backward, block_sparse_attention, launch
from triton_ops import layout as layout_module
from triton_ops.testing import assert_within_budget, block_mask, make_case

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0) and backward.HOPPER
pytestmark = pytest.mark.skipif(not HOPPER, reason="needs compute capability 9.0 and triton 3.6")


@pytest.fixture
def launched(monkeypatch):
    """The launches of the kernel."""
    from triton_ops.hopper import HopperLaunch

    calls, call = [], HopperLaunch.__call__
    monkeypatch.setattr(HopperLaunch, "__call__", lambda self, **tensors: (calls.append(self), call(self, **tensors)))
    launch.forget()
    yield calls
    launch.forget()


@pytest.fixture
def lists_of_any_length(monkeypatch):
    monkeypatch.setattr(layout_module, "LONG_LIST", -math.inf)


def mask(kind, q_size, k_size, seed=0):
    keep = block_mask(2, q_size, k_size, 128, 0.5, seed=seed, diagonal=False)
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
@pytest.mark.usefixtures("lists_of_any_length")
def test_gradients_are_within_the_error_budget(launched, dtype, kind, sizes, with_lengths):
    """Padded positions hold NaN."""
    q_size, k_size = sizes
    shape = dict(batch=3, heads=2, q_size=q_size, k_size=k_size, dim=64)
    if with_lengths:
        shape["q_lengths"] = torch.tensor([q_size, q_size // 2 + 1, 0])
        shape["k_lengths"] = torch.tensor([k_size // 3, k_size, 5])
    for number, (causal, time_first) in enumerate([(False, True), (True, False)]):
        how = dict(seed=number, causal=causal, time_first=time_first, use_lse=number == 0, scale=0.125)
        keep = mask(kind, q_size, k_size, number)
        assert_within_budget(make_case(dtype=dtype, keep=keep, tile=128, device="cuda", **shape, **how))
    assert len(launched) == 2


@pytest.mark.parametrize("heads, kind", [(2, "mixed"), (1, "blocks"), (2, "full")])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.usefixtures("lists_of_any_length")
def test_the_bits_are_the_same_in_every_run_and_in_a_cuda_graph(launched, heads, kind, dtype):
    """heads: of the mask."""
    layout = AttentionLayout.from_keep_mask(mask(kind, 1024, 1024)[:heads].cuda(), tile=128)
    q, k, v, grad = (torch.randn(2, 2, 1024, 64, device="cuda", dtype=dtype) for _ in range(4))
    leaves = [x.requires_grad_() for x in (q, k, v)]

    def run():
        return torch.autograd.grad(block_sparse_attention(*leaves, layout, backend="triton"), leaves, grad)

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
    assert len(launched) == 22


@pytest.mark.usefixtures("lists_of_any_length")
def test_several_launches_give_what_one_gives(launched, monkeypatch):
    monkeypatch.setattr("triton_ops.config.MAX_GRID_YZ", 2)
    keep = mask("mixed", 300, 300)[:1].expand(3, -1, -1)
    sizes = dict(batch=5, heads=3, q_size=300, k_size=300, dim=64, tile=128, scale=0.125)
    assert_within_budget(make_case(dtype=torch.bfloat16, keep=keep, device="cuda", **sizes))
    assert len(launched) == 6


@pytest.mark.parametrize(
    "tile, dim, options",
    [
        (64, 64, {}),
        (128, 32, {}),
        (128, 128, {}),
        (128, 64, dict(dropout_p=0.1, seed=1)),
        (128, 64, dict(dtype=torch.float32)),
        (128, 64, dict(gap=1)),  # rows that the accelerator cannot read
    ],
)
@pytest.mark.usefixtures("lists_of_any_length")
def test_what_it_does_not_cover_takes_the_kernel_in_triton(launched, tile, dim, options):
    arguments = dict(batch=1, heads=2, q_size=200, k_size=200, dtype=torch.bfloat16, scale=0.125) | options
    assert_within_budget(make_case(dim=dim, keep=mask("blocks", 200, 200), tile=tile, device="cuda", **arguments))
    assert not launched


@pytest.mark.parametrize("sparsity, taken", [(0.5, 1), (0.95, 0)])
def test_long_lists_take_it_and_short_ones_do_not(launched, sparsity, taken):
    keep = block_mask(2, 2048, 2048, 128, sparsity, seed=1)
    sizes = dict(batch=1, heads=2, q_size=2048, k_size=2048, dim=64, tile=128, scale=0.125)
    assert_within_budget(make_case(dtype=torch.bfloat16, keep=keep, device="cuda", **sizes))
    assert len(launched) == taken


def test_it_can_be_switched_off(launched, monkeypatch):
    monkeypatch.setattr(backward, "HOPPER", False)
    sizes = dict(batch=1, heads=2, q_size=512, k_size=512, dim=64, tile=128, scale=0.125)
    assert_within_budget(make_case(dtype=torch.bfloat16, keep=mask("full", 512, 512), device="cuda", **sizes))
    assert not launched
