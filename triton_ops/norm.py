"""The sum and the layer normalisation between two products of a decoding step, as one kernel.

With many hypotheses the products of a step are torch's. What is between them are kernels of a few microseconds, most of
which a launch takes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .config import ceil_div, overlap, power_of_two
from .primitives import let_next_start, wait_for_previous
from .rows import Norm, require_alike

WARPS = 4  # of a program, each with a row


@triton.jit(do_not_specialize=["N"])
def _add_norm_kernel(
    p_x, p_y, p_gain, p_shift, p_sum, p_normed, epsilon, N,
    C: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """BM of the N rows."""
    let_next_start(OVERLAP)
    o_m, o_c = tl.program_id(0) * BM + tl.arange(0, BM), tl.arange(0, BC)
    m_c = o_c < C
    m_mc = (o_m < N)[:, None] & m_c[None, :]
    o_mc = o_m.to(tl.int64)[:, None] * C + o_c[None, :]
    b_gain = tl.load(p_gain + o_c, mask=m_c, other=0.0).to(tl.float32)
    b_shift = tl.load(p_shift + o_c, mask=m_c, other=0.0).to(tl.float32)
    wait_for_previous(OVERLAP)
    b_x = tl.load(p_x + o_mc, mask=m_mc, other=0.0).to(tl.float32)
    if p_y is not None:
        b_x += tl.load(p_y + o_mc, mask=m_mc, other=0.0).to(tl.float32)
        b_sum = b_x.to(p_sum.dtype.element_ty)
        tl.store(p_sum + o_mc, b_sum, mask=m_mc)
        b_x = b_sum.to(tl.float32)  # what torch would normalise
    b_x = tl.where(m_mc, b_x - (tl.sum(b_x, 1) / C)[:, None], 0.0)
    b_x *= (1 / tl.sqrt(tl.sum(b_x * b_x, 1) / C + epsilon))[:, None]
    b_x = b_x * b_gain[None, :] + b_shift[None, :]
    tl.store(p_normed + o_mc, b_x.to(p_normed.dtype.element_ty), mask=m_mc)


def add_norm(x: Tensor, y: Tensor | None, norm: Norm) -> tuple[Tensor, Tensor]:
    """Compute x + y and norm(x + y), both (N, C), by one kernel; the sum is rounded before it is normalised.

    Args:
        x, y: (N, C), contiguous, of one floating-point type; None adds nothing, and x itself is returned.
        norm: of the same type.

    Raises:
        TypeError: more than one type, or tensors that are not contiguous.
    """
    require_alike(x, y, norm.weight, norm.bias)
    (n, c), normed = x.shape, torch.empty_like(x)
    total = x if y is None else torch.empty_like(x)
    _add_norm_kernel[(ceil_div(n, WARPS),)](
        p_x=x, p_y=y, p_gain=norm.weight, p_shift=norm.bias, p_sum=total, p_normed=normed, epsilon=norm.epsilon, N=n,
        C=c, BM=WARPS, BC=power_of_two(c), num_warps=WARPS, **overlap(x.device),
    )  # fmt: skip
    return total, normed
