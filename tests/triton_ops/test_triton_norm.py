"""Sums and normalisations of rows in one kernel, against float64."""

import pytest
import torch
import torch.nn.functional as F

from triton_ops.norm import add_norm
from triton_ops.rows import Norm

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EPSILON = 1e-5


def problem(n, c, dtype):
    torch.manual_seed(n + c)
    x, y = (3 * torch.randn(n, c) + 2 for _ in range(2))
    return [value.to(DEVICE, dtype) for value in (x, y, torch.randn(c), torch.randn(c))]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("n, c", [(1, 16), (3, 100), (8, 512), (21, 48)])
def test_errors_are_those_of_torch(n, c, dtype):
    x, y, gain, shift = problem(n, c, dtype)
    for other in (y, None):
        total, normed = add_norm(x, other, Norm(gain, shift, EPSILON))
        added = x.double() if other is None else x.double() + other.double()
        band = torch.finfo(dtype).eps
        assert ((total.double() - added).abs() <= band * added.abs()).all()  # the interpreter cuts bfloat16 off
        exact = F.layer_norm(total.double(), (c,), gain.double(), shift.double(), EPSILON)
        low = F.layer_norm(total, (c,), gain, shift, EPSILON)
        error, allowed = ((value.double() - exact).norm() for value in (normed, low))
        assert error <= allowed + band * exact.norm()


def test_other_tensors_are_refused():
    x, y, gain, shift = problem(4, 32, torch.float16)
    with pytest.raises(TypeError, match="of one type"):
        add_norm(x, y.float(), Norm(gain, shift, EPSILON))
    with pytest.raises(TypeError, match="contiguous"):
        add_norm(x.t().contiguous().t(), None, Norm(gain, shift, EPSILON))
