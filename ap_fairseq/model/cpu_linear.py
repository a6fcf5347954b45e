"""Linear layers for inference on a CPU, over weights that were brought into a layout of their own once.

In float32 the products are oneDNN's, and those of small weights MKL's. With int8 (`use_int8`) they are FBGEMM's, which
torch calls: weights are 8-bit integers with a scale for every output; inputs become 8-bit integers by the smallest and
the largest of all rows.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from ap_fairseq.files import UserError

USUAL_ROWS = 40  # for which weights are laid out: it serves 2 to 500 rows as well as a layout of their own does
SMALL = 1 << 16  # elements of a weight: up to this many, oneDNN's calls take longer than its products save
MEDIUM = 1 << 18  # below this many, they do so for few rows
FEW_ROWS = 16


class Product(ABC):
    """A linear layer, or several of one input, over their packed weights."""

    @abstractmethod
    def __call__(self, x: Tensor) -> Tensor:
        """Compute the layer of x (..., C)."""


class SmallProduct(Product):
    """In single precision, by MKL, from a transposed copy of the weight: this takes half the time of few rows."""

    def __init__(self, weight: Tensor, bias: Tensor | None):
        self.weight, self.bias = weight.t().contiguous().t(), bias

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class FloatProduct(Product):
    """In single precision, by oneDNN; of few rows and a weight of medium size by MKL."""

    def __init__(self, weight: Tensor, bias: Tensor | None):
        self.weight, self.bias = torch.ops.mkldnn._reorder_linear_weight(weight, USUAL_ROWS), bias
        self.of_few = SmallProduct(weight, bias) if weight.numel() < MEDIUM else None

    def __call__(self, x: Tensor) -> Tensor:
        if self.of_few is not None and x.numel() <= FEW_ROWS * x.size(-1):
            return self.of_few(x)
        return torch.ops.mkldnn._linear_pointwise.default(x, self.weight, self.bias, "none", [], "")


class Int8Product(Product):
    """In 8-bit integers, by FBGEMM."""

    def __init__(self, weight: Tensor, bias: Tensor | None):
        # Without the instructions for 8-bit products, sums of two are kept in 16 bits, for which 7-bit inputs are safe.
        self.seven_bits = not torch.cpu._is_vnni_supported()
        if not weight.isfinite().all():  # which integers would hide
            raise UserError("--cpu-int8: a weight is NaN or infinite; the parameters are damaged")
        scale = weight.abs().amax(1).double().clamp_min(torch.finfo(torch.float32).tiny) / 127
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*quantized tensor creation functions")  # until torch offers another way
            integers = torch.quantize_per_channel(weight, scale, torch.zeros_like(scale).long(), 0, torch.qint8)
        self.weight = torch.ops.quantized.linear_prepack(integers, bias)

    def __call__(self, x: Tensor) -> Tensor:
        return torch.ops.quantized.linear_dynamic(x, self.weight, self.seven_bits)


def project(linear: nn.Linear, x: Tensor) -> Tensor:
    """Return what *linear* makes of x (..., C), up to rounding, which is coarse after `use_int8`.

    Without gradients on a CPU, in float32, this is 2 to 5 times as fast: MKL, which torch multiplies by, reads weights
    as they are, which takes most of the time where rows are few, and has no AVX-512 on CPUs of AMD (torch 2.13, EPYC:
    110 us for 5 rows by 1024 x 512, by oneDNN 36). One row and small weights are faster by MKL.
    """
    weight = linear.weight
    little = not is_int8(linear) and (x.numel() < 2 * x.size(-1) or weight.numel() <= SMALL)
    if little or x.dtype != weight.dtype or torch.is_grad_enabled() or not can_pack(weight):
        return F.linear(x, weight, linear.bias)
    return packed(linear)(x)


def can_pack(weight: Tensor) -> bool:
    """Whether `packed` takes layers of such a weight."""
    return weight.is_cpu and weight.dtype == torch.float32 and torch.backends.mkldnn.is_available()


def packed(*linears: nn.Linear) -> Product:
    """Return the product of layers, stacked, which is kept until one of their parameters changes.

    Changes that torch does not count, those of a weight's ``data``, are seen if they reach more than a few elements.
    """
    return _packed(linears).product


class Products:
    """As `packed`, for many layers between two calls of `refresh`, which looks for changes of all of them at once."""

    def __init__(self):
        self.made: dict[tuple[nn.Linear, ...], _Packed] = {}
        self.forgotten = _forgotten

    def __call__(self, *linears: nn.Linear) -> Product:
        if linears not in self.made:
            self.made[linears] = _packed(linears)
        return self.made[linears].product

    def refresh(self) -> None:
        """Give up the products if parameters have changed, or may have, since they were packed."""
        same = self.forgotten == _forgotten and all(
            one.marks == [_mark(x) for x in _parameters(linears)] for linears, one in self.made.items()
        )
        if self.made and not (same and _samples_hold(list(self.made.values()))):
            self.made = {}
        self.forgotten = _forgotten


class _Packed:
    """A product, and how the parameters were that it was packed from.

    Attributes:
        marks: of each parameter, what shows that it is the same memory.
        samples: of each parameter, a view of some elements.
        sampled: what these were.
    """

    def __init__(self, product: Product, parameters: list[Tensor]):
        self.product, self.marks = product, [_mark(x) for x in parameters]
        self.samples = [_sample(x) for x in parameters]
        self.sampled = torch.cat(self.samples)

    def have_changed(self, parameters: list[Tensor]) -> bool:
        return self.marks != [_mark(x) for x in parameters] or not _samples_hold([self])


def _samples_hold(many: list[_Packed]) -> bool:
    """Whether the sampled elements of all parameters have kept their values, in one comparison."""
    now = torch.cat([x for one in many for x in one.samples])
    then = torch.cat([one.sampled for one in many])
    return torch.equal(now.view(torch.int32), then.view(torch.int32))  # NaN is no change


def _packed(linears: tuple[nn.Linear, ...]) -> _Packed:
    parameters = _parameters(linears)
    made, kind = _PACKED.setdefault(linears[0].weight, {}), _kind(linears)
    kept = made.get((kind, len(linears)))
    if kept is None or kept.have_changed(parameters):
        weights, biases = ([getattr(linear, name) for linear in linears] for name in ("weight", "bias"))
        bias = None if biases[0] is None else torch.cat(biases).detach()
        kept = made[kind, len(linears)] = _Packed(kind(torch.cat(weights).detach(), bias), parameters)
    return kept


def _parameters(linears: tuple[nn.Linear, ...]) -> list[Tensor]:
    return [x for linear in linears for x in (linear.weight, linear.bias) if x is not None]


def _kind(linears: tuple[nn.Linear, ...]) -> type[Product]:
    if is_int8(linears[0]):
        return Int8Product
    return SmallProduct if sum(linear.weight.numel() for linear in linears) <= SMALL else FloatProduct


def _mark(parameter: Tensor) -> tuple[int, tuple[int, ...], int | None]:
    return parameter.data_ptr(), parameter.stride(), None if parameter.is_inference() else parameter._version


def _sample(parameter: Tensor) -> Tensor:
    """Return a view of about 32 elements of a weight (rows, columns), along its diagonal, or of a bias."""
    x = parameter.detach()
    if not x.is_contiguous():  # then only its real diagonal is a view
        x = x.diagonal() if x.dim() > 1 else x
        return x[:: max(1, len(x) // 32)]
    return x.view(-1)[:: max(1, (x.numel() + x.size(-1)) // 32)]


def forget_packed(module: nn.Module) -> None:
    """Forget the packed weights of a module that is to be trained: they would take memory, and miss small changes."""
    global _forgotten
    _forgotten += 1
    for weight in module.parameters() if _PACKED else ():
        _PACKED.pop(weight, None)


# By the first weight of some layers: {(kind, number of layers): their product}.
_PACKED: WeakIdKeyDictionary = WeakIdKeyDictionary()
_forgotten = 0  # how often `forget_packed` was called


def use_int8(model: nn.Module) -> None:
    """Let the linear layers of a model multiply in 8-bit integers, where `project` or `packed` compute them."""
    forget_packed(model)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.int8 = True


def is_int8(linear: nn.Linear) -> bool:
    """Whether `use_int8` was called for a model of the layer."""
    return getattr(linear, "int8", False)


class PackedLinear(nn.Linear):
    """torch's linear layer, computed by `project`."""

    def forward(self, x: Tensor) -> Tensor:
        return project(self, x)
