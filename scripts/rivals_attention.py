"""The attention of others as methods of bench_attention.py: torch's, FlashAttention-4's and cuDNN's block-sparse one.

A method takes q, k, v (B, H, T, D) and returns the output likewise. The last two are there where `flash-attn-4` and
`nvidia-cudnn-frontend` are installed; they read the blocks of a mask from lists for each head.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

Method = Callable[[Tensor, Tensor, Tensor], Tensor]


def dense(backend: SDPBackend) -> Method:
    def forward(q, k, v):
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v)

    return forward


def dense_mask(mask: Tensor, dropout_p: float = 0.0) -> Method:
    return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout_p)


def flex(keep: Tensor, block: int, autotune: bool) -> Method:
    """FlexAttention under the same mask. Its sparse block is 128 by default; smaller ones need autotuning."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    heads, q_size, k_size = keep.shape
    mask = create_block_mask(
        lambda b, h, i, j: keep[h, i, j], None, heads, q_size, k_size, device=keep.device.type, BLOCK_SIZE=block
    )
    mode = "max-autotune-no-cudagraphs" if autotune else None
    return functools.partial(torch.compile(flex_attention, mode=mode, dynamic=False), block_mask=mask)


def block_sparse(keep: Tensor, block: tuple[int, int], batch: int) -> dict[str, Method]:
    """The installed methods that skip blocks (queries, keys) of keep (H, T, T), each set up in its first call.

    What fails in setting up is a failure of that call. FlashAttention-4 takes blocks of 64 n queries and 16 m keys; its
    backward pass takes 128 x 128 and adds up dQ in any order. cuDNN takes squares of 64 and 128, here forward only.
    """
    kept = keep[:, :: block[0], :: block[1]]
    methods = {}
    if _installed("flash_attn.cute") and block[0] % 64 == 0 and block[1] % 16 == 0:
        methods["fa4"] = _deferred(lambda: _flash_attention_4(**_fa4_lists(kept, block)))
    if _installed("cudnn") and block in ((64, 64), (128, 128)):
        methods["cudnn sparse"] = _deferred(lambda: _cudnn_block_sparse(kept, block[0], batch))
    return methods


def flash_attention_4_dense() -> dict[str, Method]:
    """Without a mask, where installed; `deterministic`: with the parts of dQ added in a fixed order, as ours are."""
    if not _installed("flash_attn.cute"):
        return {}
    return {
        "fa4 dense": _deferred(_flash_attention_4),
        "fa4 dense deterministic": _deferred(lambda: _flash_attention_4(deterministic=True)),
    }


def block_lists(kept: Tensor) -> tuple[Tensor, Tensor]:
    """Of kept (H, rows, columns) bool: how many columns of a row are kept, (1, H, rows), and which, (1, H, rows, most).

    Both int32; a row lists its columns in ascending order, and whatever after them.
    """
    counts = kept.sum(-1, dtype=torch.int32)
    order = kept.to(torch.uint8).argsort(dim=-1, descending=True, stable=True)
    return counts[None], order[None, ..., : max(1, int(counts.max()))].to(torch.int32).contiguous()


def _installed(module: str) -> bool:
    package = module.partition(".")[0]
    return importlib.util.find_spec(package) is not None and importlib.util.find_spec(module) is not None


def _deferred(build: Callable[[], Method]) -> Method:
    built = functools.cache(build)
    return lambda q, k, v: built()(q, k, v)


def _flash_attention_4(**options: Any) -> Method:
    from flash_attn.cute import flash_attn_func

    def forward(q, k, v):  # its tensors are (B, T, H, D), of any strides
        out, _ = flash_attn_func(*(x.transpose(1, 2) for x in (q, k, v)), **options)
        return out.transpose(1, 2)

    return forward


def _fa4_lists(kept: Tensor, block: tuple[int, int]) -> dict[str, Any]:
    """Lists of full blocks along queries, and along keys for the backward pass; those of partial blocks are empty."""
    from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch

    def lists(kept: Tensor) -> BlockSparseTensorsTorch:
        counts, indices = block_lists(kept)
        nothing = torch.zeros_like(counts)
        return BlockSparseTensorsTorch(nothing, nothing[..., None], counts, indices, block_size=block)

    return dict(block_sparse_tensors=lists(kept), block_sparse_tensors_bwd=lists(kept.transpose(1, 2)))


def _cudnn_block_sparse(kept: Tensor, block: int, batch: int) -> Method:
    from cudnn import BSA

    counts, indices = (x.expand(batch, *x.shape[1:]).contiguous() for x in block_lists(kept))

    def forward(q, k, v):
        lists = dict(q2k_block_index=indices, q2k_block_nums=counts, sparse_block_size=block)
        return BSA.block_sparse_attention_forward(q, k, v, **lists)["o_tensor"]

    return forward
