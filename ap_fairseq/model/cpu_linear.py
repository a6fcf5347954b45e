"""Linear layers for inference on a CPU, by oneDNN over weights that were brought into its own layout once."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

USUAL_ROWS = 40  # for which weights are laid out: it serves 2 to 500 rows as well as a layout of their own does


def project(linear: nn.Linear, x: Tensor) -> Tensor:
    """Return what *linear* makes of x (..., C), up to rounding; without gradients on a CPU 2 to 5 times as fast.

    MKL, which torch multiplies by, reads weights as they are, which takes most of the time where rows are few, and has
    no AVX-512 on CPUs of AMD (torch 2.13, EPYC: 110 us for 5 rows by 1024 x 512, by oneDNN 36). One row is faster so.
    """
    weight = linear.weight
    if x.numel() < 2 * x.size(-1) or x.dtype != weight.dtype or torch.is_grad_enabled() or not can_pack(weight):
        return F.linear(x, weight, linear.bias)
    return multiply(x, packed(weight), linear.bias)


def can_pack(weight: Tensor) -> bool:
    """Whether `packed` takes a weight."""
    return weight.is_cpu and weight.dtype == torch.float32 and torch.backends.mkldnn.is_available()


def multiply(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Compute a linear layer of x (..., C), whose *weight* is packed."""
    return torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, "none", [], "")


def packed(*weights: Tensor) -> Tensor:
    """Return weights, stacked, in oneDNN's layout, which is kept until one of them changes.

    Changes that torch does not count, those of a weight's ``data``, are seen if they reach more than a few elements.
    """
    now = [(x.data_ptr(), None if x.is_inference() else x._version, _sampled(x)) for x in weights]
    kept = _PACKED.setdefault(weights[0], {})
    if len(weights) not in kept or kept[len(weights)][0] != now:
        whole = weights[0].detach() if len(weights) == 1 else torch.cat(weights).detach()
        kept[len(weights)] = now, torch.ops.mkldnn._reorder_linear_weight(whole, USUAL_ROWS)
    return kept[len(weights)][1]


def _sampled(weight: Tensor) -> bytes:
    """Return about 32 elements of a weight (rows, columns), along its diagonal."""
    step = max(1, (weight.numel() + weight.size(1)) // 32)
    return weight.detach().reshape(-1)[::step].numpy().tobytes()


def forget_packed(module: nn.Module) -> None:
    """Free the packed weights of a module."""
    for weight in module.parameters() if _PACKED else ():
        _PACKED.pop(weight, None)


# The first of some weights: by their number, what they were packed from, and that.
_PACKED: WeakIdKeyDictionary = WeakIdKeyDictionary()


class PackedLinear(nn.Linear):
    """torch's linear layer, computed by `project`."""

    def forward(self, x: Tensor) -> Tensor:
        return project(self, x)
