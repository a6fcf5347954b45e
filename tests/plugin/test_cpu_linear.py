"""Linear layers for inference on a CPU compute what torch's do."""

import copy

import pytest
import torch
import torch.nn.functional as F
from plugin.builders import pruned_model, random_masks

from ap_fairseq.model import cpu_linear
from ap_fairseq.model.cpu_linear import PackedLinear, packed, project


def within_rounding(got, linear, x):
    """Whether single precision sums of C products may give *got*."""
    weight, bias = linear.weight, linear.bias
    exact = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    band = (
        (x.size(-1) + 1)
        * torch.finfo(torch.float32).eps
        * F.linear(x.abs(), weight.abs(), None if bias is None else bias.abs())
    )
    return got.shape == exact.shape and bool(((got.double() - exact).abs() <= band).all())


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 2), (5,), (1, 1), (2, 4), (150,), (0,), (600,)])
@torch.no_grad()
def test_inference_is_that_of_torch(shape, bias, monkeypatch):
    """Row by row in memory, as kernels read it; more than one row by the packed weight."""
    calls, real = [], packed
    monkeypatch.setattr(cpu_linear, "packed", lambda weight: calls.append(1) or real(weight))
    linear, x = PackedLinear(48, 80, bias=bias), torch.randn(*shape, 48)
    got = linear(x)
    assert within_rounding(got, linear, x) and got.is_contiguous()
    assert bool(calls) == (x.numel() >= 2 * 48)
    assert within_rounding(linear(x.transpose(0, -1).contiguous().transpose(0, -1)), linear, x)


@torch.no_grad()
def test_changed_weights_are_packed_again():
    """Optimizers write to ``data``, which counts no version: the model forgets its packed weights when it trains."""
    linear, x = PackedLinear(16, 8), torch.randn(4, 16)
    linear(x)
    twin = copy.deepcopy(linear)
    linear.weight.mul_(2)
    assert within_rounding(linear(x), linear, x) and within_rounding(twin(x), twin, x)
    linear.weight.data = torch.randn(8, 16)
    assert within_rounding(linear(x), linear, x)

    model = pruned_model(random_masks(0.5)).eval()
    layer = model.decoder.output_projection
    x = torch.randn(4, layer.in_features)
    project(layer, x)
    model.train()
    layer.weight.data.mul_(2)
    model.eval()
    assert within_rounding(project(layer, x), layer, x)


def test_other_types_and_gradients():
    linear, x = PackedLinear(16, 8), torch.randn(4, 16, requires_grad=True)
    half = PackedLinear(16, 8).to(torch.bfloat16)
    with torch.no_grad():
        assert project(half, x.bfloat16()).dtype == torch.bfloat16
    linear(x).square().sum().backward()
    mine = linear.weight.grad.clone(), linear.bias.grad.clone(), x.grad.clone()
    linear.zero_grad()
    x.grad = None
    F.linear(x, linear.weight, linear.bias).square().sum().backward()
    for got, expected in zip(mine, (linear.weight.grad, linear.bias.grad, x.grad), strict=True):
        torch.testing.assert_close(got, expected)
