"""Attention under a dense mask by torch alone: what the back end `sdpa` runs, and `auto` where the kernels do not."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .reference import attention_reference, laid_out_as, visible_cells


def attend_dense(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keep: Tensor,
    *,
    scale: float,
    q_lengths: Tensor | None = None,
    k_lengths: Tensor | None = None,
    causal: bool = False,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    softmax: Callable[[Tensor], Tensor] | None = None,
    details: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(out, lse, probabilities) as `attention_reference`; padding must be finite (`reference.without_padding`).

    torch's fused attention gives out alone, and drops by torch's own generator. For a given `seed`, another `softmax`
    or `details` (lse and probabilities are wanted) the reference takes its place.
    """
    if details or seed is not None or softmax is not None or k.size(2) == 0:
        if dropout_p > 0 and seed is None:
            seed = draw_seed(q.device)
        return attention_reference(
            q,
            k,
            v,
            keep,
            scale=scale,
            q_lengths=q_lengths,
            k_lengths=k_lengths,
            causal=causal,
            dropout_p=dropout_p,
            seed=seed,
            softmax=softmax,
        )
    cells = visible_cells(keep, q_lengths, k_lengths, causal)
    # A row without a visible key attends to all, so that neither it nor its gradient is NaN, and is written as 0.
    # amax of bytes: `any` takes up to a hundred times as long on a CPU.
    empty = cells.view(torch.uint8).amax(-1, keepdim=True) == 0
    out = torch.nn.functional.scaled_dot_product_attention(
        _aligned(q), _aligned(k), _aligned(v), attn_mask=cells | empty, dropout_p=dropout_p, scale=scale
    )
    return laid_out_as(out.masked_fill(empty, 0), q), None, None


def _aligned(x: Tensor) -> Tensor:
    """*x*, copied unless its rows begin at multiples of 16 bytes.

    torch's cuDNN attention takes other rows of half precision silently and returns wrong values (torch 2.11,
    cuDNN 9, H200: off by more than 1 where the values are below 4).
    """
    aligned = 16 // x.element_size()
    offset = 0 if torch.compiler.is_compiling() else x.storage_offset()  # the compiler cannot trace it
    starts = (offset, *x.stride()[:3])
    return x if x.stride(3) == 1 and all(start % aligned == 0 for start in starts) else x.contiguous()


def draw_seed(device: torch.device) -> Tensor:
    """A seed of dropout from torch's generator."""
    return torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64, device=device)
