"""Linear layers for inference on a CPU compute what torch's do."""

import copy

import pytest
import torch
import torch.nn.functional as F
from fairseq.optim.adam import Adam
from plugin.builders import pruned_model, random_masks

from ap_fairseq.model import cpu_linear
from ap_fairseq.model.cpu_linear import (
    FloatProduct,
    Int8Product,
    PackedLinear,
    Products,
    SmallProduct,
    packed,
    project,
    use_int8,
)


@pytest.fixture(autouse=True)
def any_size(monkeypatch):
    """Weights of these tests are small, and would be left to torch."""
    monkeypatch.setattr(cpu_linear, "SMALL", 0)


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
    monkeypatch.setattr(cpu_linear, "packed", lambda *linears: calls.append(1) or real(*linears))
    linear, x = PackedLinear(48, 80, bias=bias), torch.randn(*shape, 48)
    got = linear(x)
    assert within_rounding(got, linear, x) and got.is_contiguous()
    assert bool(calls) == (x.numel() >= 2 * 48)
    assert within_rounding(linear(x.transpose(0, -1).contiguous().transpose(0, -1)), linear, x)


@pytest.mark.parametrize("kind", [FloatProduct, Int8Product])
@torch.no_grad()
def test_products_of_several_layers(kind):
    """Stacked; in 8 bits within half a step of weights and one of inputs."""
    linears, x = [PackedLinear(48, n) for n in (80, 16)], torch.randn(3, 5, 48)
    if kind is Int8Product:
        use_int8(torch.nn.ModuleList(linears))
    product = packed(*linears)
    assert type(product) is kind
    weight, bias = torch.cat([x.weight for x in linears]), torch.cat([x.bias for x in linears])
    exact = F.linear(x, weight, bias)
    band = 1e-5 * F.linear(x.abs(), weight.abs(), bias.abs())
    if kind is Int8Product:
        of_weights, of_inputs = weight.abs().amax(1) / 127, (x.max() - x.min()) / (127 if product.seven_bits else 255)
        band += x.abs().sum(-1, keepdim=True) * of_weights / 2 + of_inputs * (weight.abs().sum(1) + 48 * of_weights / 2)
    assert ((product(x) - exact).abs() <= band).all()


@pytest.mark.parametrize("n", [1, 3])
@torch.no_grad()
def test_small_weights_are_left_to_torch(n, monkeypatch):
    """Up to the limit, that of the stacked ones where several layers are multiplied at once; 8 bits are not float32."""
    monkeypatch.setattr(cpu_linear, "SMALL", n * 48 * 16)
    linears, x = [PackedLinear(48, 16) for _ in range(n)], torch.randn(5, 48)
    weight, bias = torch.cat([x.weight for x in linears]), torch.cat([x.bias for x in linears])
    product = packed(*linears)
    assert type(product) is SmallProduct
    torch.testing.assert_close(product(x), F.linear(x, weight, bias))
    assert type(packed(*linears, PackedLinear(48, 1))) is FloatProduct
    use_int8(torch.nn.ModuleList(linears))
    assert type(packed(*linears)) is Int8Product


@pytest.mark.parametrize(
    ("rows", "medium", "by_mkl"), [(16, 48 * 80 + 1, True), (17, 48 * 80 + 1, False), (5, 48, False)]
)
@torch.no_grad()
def test_few_rows_of_medium_weights_are_left_to_mkl(rows, medium, by_mkl, monkeypatch):
    """A call of oneDNN takes longer than such a product."""
    monkeypatch.setattr(cpu_linear, "MEDIUM", medium)
    calls, multiply = [], SmallProduct.__call__
    monkeypatch.setattr(SmallProduct, "__call__", lambda self, x: calls.append(1) or multiply(self, x))
    linear, x = PackedLinear(48, 80), torch.randn(rows, 48)
    assert within_rounding(packed(linear)(x), linear, x)
    assert bool(calls) is by_mkl


@pytest.mark.parametrize("int8", [False, True])
@torch.no_grad()
def test_a_layer_is_packed_once(int8, monkeypatch):
    made, kind = [], Int8Product if int8 else FloatProduct
    init = kind.__init__
    monkeypatch.setattr(kind, "__init__", lambda self, *args: made.append(1) or init(self, *args))
    linear, x = PackedLinear(16, 8), torch.randn(4, 16)
    if int8:
        use_int8(linear)
    first = linear(x)
    assert torch.equal(linear(x), first) and len(made) == 1
    linear.bias.add_(1)
    torch.testing.assert_close(linear(x), first + 1)
    assert len(made) == 2


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("change", ["checkpoint", "optimizer", "average", "in place", "a head", "of a head", "another"])
def test_a_cpu_computes_with_changed_weights(change, together):
    """fairseq's optimizers change the `data` of weights, which torch does not count: the packed ones were stale."""
    torch.manual_seed(3)
    linear, other, x = PackedLinear(128, 256).eval(), PackedLinear(128, 256), torch.randn(5, 128)
    products, unchanged = Products(), PackedLinear(128, 64)

    def computed():
        products.refresh()
        with torch.no_grad():
            products(unchanged)
            return products(linear)(x) if together else linear(x)

    before = computed()
    if change == "checkpoint":
        linear.load_state_dict(other.state_dict())
    elif change == "optimizer":
        linear(x).sum().backward()
        Adam(linear.parameters(), lr=0.1).step()
    elif change == "average":  # swapped in for a validation
        linear.weight.data, other.weight.data = other.weight.data, linear.weight.data
    elif change == "in place":
        linear.weight.data.copy_(other.weight.data)
    elif change == "a head":
        linear.weight.data[48:64] = 0
    elif change == "another":
        linear.weight = other.weight
    else:
        linear.weight.data[:, 48:64] = 0
    expected = (x.double() @ linear.weight.double().T + linear.bias.double()).detach()
    assert (before - expected).abs().max() > 0.1
    torch.testing.assert_close(computed().double(), expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_weight_of_any_strides_is_watched():
    """Only a view shows changes of ``data``, and a flat one there is of contiguous weights only."""
    linear, x = PackedLinear(64, 128), torch.randn(5, 64)
    linear.weight.data, linear.bias.data = torch.randn(64, 128).T, torch.randn(256)[::2]
    linear(x)
    for parameter in (linear.weight, linear.bias):
        parameter.data.neg_()
        assert within_rounding(linear(x), linear, x)
    square = PackedLinear(64, 64)
    square(x)
    square.weight.data = square.weight.data.T
    assert within_rounding(square(x), square, x)


@torch.no_grad()
def test_looking_for_changes_reads_no_parameter_one_by_one(monkeypatch):
    """A millisecond of a sentence went into samples of weights that were gathered anew, one after the other."""
    linear, x = PackedLinear(64, 128), torch.randn(5, 64)
    linear(x)
    sampled = []
    monkeypatch.setattr(cpu_linear, "_sample", lambda parameter: sampled.append(parameter))
    linear(x)
    assert not sampled


@torch.no_grad()
def test_a_copy_has_packed_weights_of_its_own():
    linear, x = PackedLinear(16, 8), torch.randn(4, 16)
    linear(x)
    twin = copy.deepcopy(linear)
    linear.weight.mul_(2)
    assert within_rounding(linear(x), linear, x) and within_rounding(twin(x), twin, x)


@torch.no_grad()
def test_training_forgets_packed_weights():
    """What changes of ``data`` leave no trace, as that of one element, counts after a training all the same."""
    model, products = pruned_model(random_masks(0.5)).eval(), Products()
    layer = model.decoder.output_projection
    x = torch.randn(4, layer.in_features)
    project(layer, x), products(layer)
    model.train()
    layer.weight.data[0, 1] += 10
    model.eval()
    products.refresh()
    assert within_rounding(project(layer, x), layer, x) and within_rounding(products(layer)(x), layer, x)
    use_int8(model)
    products.refresh()
    assert type(products(layer)) is Int8Product


@torch.no_grad()
def test_products_are_kept_and_looked_through_together(monkeypatch):
    """Each search looked at the weights of one layer after the other: a millisecond of a sentence."""
    layers, products = [PackedLinear(16, 8) for _ in range(4)], Products()
    made = [products(layer) for layer in layers]
    monkeypatch.setattr(cpu_linear, "_packed", None)
    compared, equal = [], torch.equal
    monkeypatch.setattr(torch, "equal", lambda *pair: compared.append(1) or equal(*pair))
    products.refresh()
    assert [products(layer) for layer in layers] == made and len(compared) == 1


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
