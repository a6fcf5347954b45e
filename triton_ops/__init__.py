"""Attention under a global per-head keep mask that never touches a skipped tile.

    layout = AttentionLayout.from_keep_mask(keep)                    # once per attention site
    out = block_sparse_attention(q, k, v, layout, k_lengths=lengths)  # training, encoding, teacher forcing
    out = decode_attention(q, k_cache, v_cache, layout, step)         # generation

Depends on torch; triton is imported when a kernel first runs.
"""

from .api import append_to_pool, block_sparse_attention, check_length_values, decode_attention, interpreted, use_kernels
from .layout import AttentionLayout, Layout
from .offsets import OffsetLayout

__all__ = [
    "AttentionLayout",
    "Layout",
    "OffsetLayout",
    "append_to_pool",
    "block_sparse_attention",
    "check_length_values",
    "decode_attention",
    "interpreted",
    "use_kernels",
]
