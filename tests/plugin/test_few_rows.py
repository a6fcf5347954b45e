"""Linear layers for few rows on a CPU compute what torch's do."""

import pytest
import torch
import torch.nn.functional as F

from ap_fairseq.model.few_rows import FEW_ROWS, StepLinear, project


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 2), (5,), (1, 5), (3, 1), (1, 1), (6,), (2, 4)])
def test_few_rows_are_projected_as_torch_does(shape, bias, monkeypatch):
    """Within the rounding of sums of C products in single precision; row by row in memory, as kernels read them."""
    n_in, n_out = 48, 80
    linear, x = StepLinear(n_in, n_out, bias=bias), torch.randn(*shape, n_in)
    calls = []
    real = F.linear
    monkeypatch.setattr(F, "linear", lambda *args: calls.append(1) or real(*args))
    got = linear(x)
    rows = x.numel() // n_in
    assert bool(calls) == (rows not in FEW_ROWS)
    exact = real(x.double(), linear.weight.double(), linear.bias.double() if bias else None)
    band = (
        (n_in + 1)
        * torch.finfo(torch.float32).eps
        * real(x.abs(), linear.weight.abs(), linear.bias.abs() if bias else None)
    )
    assert got.shape == exact.shape and got.is_contiguous()
    assert ((got.double() - exact).abs() <= band).all()


def test_other_types_and_gradients():
    linear, x = StepLinear(16, 8), torch.randn(4, 16, requires_grad=True)
    half = StepLinear(16, 8).to(torch.bfloat16)
    assert project(half, x.detach().bfloat16()).dtype == torch.bfloat16
    linear(x).square().sum().backward()
    mine = linear.weight.grad.clone(), linear.bias.grad.clone(), x.grad.clone()
    linear.zero_grad()
    x.grad = None
    F.linear(x, linear.weight, linear.bias).square().sum().backward()
    for got, expected in zip(mine, (linear.weight.grad, linear.bias.grad, x.grad), strict=True):
        torch.testing.assert_close(got, expected)
