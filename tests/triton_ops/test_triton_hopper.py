"""dK and dV in Gluon, on the GPUs that have it: against float64, and that it is what runs."""

import pytest
import torch

from triton_ops import AttentionLayout, backward, block_sparse_attention
from triton_ops.testing import assert_within_budget, block_mask, make_case

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0) and backward.hopper is not None
pytestmark = pytest.mark.skipif(not HOPPER, reason="needs compute capability 9.0 and triton 3.6")


@pytest.fixture
def launched(monkeypatch):
    """The number of calls that took the kernel."""
    calls = []
    dkdv = backward.hopper.dkdv
    monkeypatch.setattr(backward.hopper, "dkdv", lambda *arguments: (calls.append(1), dkdv(*arguments)))
    return calls


def mask(kind, q_size, k_size, seed=0):
    keep = block_mask(2, q_size, k_size, 128, 0.5, seed=seed, diagonal=False)
    if kind == "elements":
        keep &= torch.rand(keep.shape, generator=torch.Generator().manual_seed(seed)) < 0.9
    if kind == "mixed":  # full blocks, partial ones and rows without a key
        keep[:, : q_size // 2] &= torch.rand(2, q_size // 2, k_size, generator=torch.Generator().manual_seed(seed)) < 0.9
        keep[:, 130:150] = False
    return torch.ones_like(keep) if kind == "full" else keep


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["full", "blocks", "mixed", "elements"])
@pytest.mark.parametrize("sizes", [(512, 512), (129, 1000), (700, 300)])
@pytest.mark.parametrize("with_lengths", [False, True])
def test_gradients_are_within_the_error_budget(launched, dtype, kind, sizes, with_lengths):
    """Padded positions hold NaN."""
    q_size, k_size = sizes
    lengths = {}
    if with_lengths:
        lengths = dict(q_lengths=torch.tensor([q_size, q_size // 2 + 1, 0]), k_lengths=torch.tensor([k_size // 3, k_size, 5]))
    for number, (causal, time_first) in enumerate([(False, True), (True, False)]):
        case = make_case(
            batch=3, heads=2, q_size=q_size, k_size=k_size, dim=64, dtype=dtype, keep=mask(kind, q_size, k_size, number),
            seed=number, causal=causal, time_first=time_first, use_lse=number == 0, scale=0.125, tile=128, device="cuda",
            **lengths,
        )  # fmt: skip
        assert_within_budget(case)
    assert len(launched) == 2


def test_the_bits_are_the_same_in_every_run_and_in_a_cuda_graph(launched):
    layout = AttentionLayout.from_keep_mask(mask("mixed", 1024, 1024).cuda(), tile=128)
    q, k, v, grad = (torch.randn(2, 2, 1024, 64, device="cuda", dtype=torch.bfloat16) for _ in range(4))
    leaves = [x.requires_grad_() for x in (q, k, v)]

    def run():
        return torch.autograd.grad(block_sparse_attention(*leaves, layout, backend="triton"), leaves, grad)

    first = run()
    for _ in range(20):
        assert all(torch.equal(a, b) for a, b in zip(run(), first, strict=True))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, first, strict=True))
    assert len(launched) == 22


@pytest.mark.parametrize(
    "tile, dim, options",
    [(64, 64, {}), (128, 32, {}), (128, 64, dict(dropout_p=0.1, seed=1)), (128, 64, dict(dtype=torch.float32))],
)
def test_what_it_does_not_cover_takes_the_kernel_in_triton(launched, tile, dim, options):
    arguments = dict(batch=1, heads=2, q_size=200, k_size=200, dtype=torch.bfloat16, scale=0.125) | options
    assert_within_budget(make_case(dim=dim, keep=mask("blocks", 200, 200), tile=tile, device="cuda", **arguments))
    assert not launched
