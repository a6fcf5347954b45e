"""Incremental state of pruned attention: what is cached between decoding steps, and which mask row a step reads.

The state is kept under fairseq's own names and shapes (``prev_key`` (B, H, S, D), ``prev_value``,
``prev_key_padding_mask`` (B, S)), so that fairseq's beam reordering, which selects on dimension 0, applies unchanged
when hypotheses are reordered, sentences finish and the batch shrinks.
"""

from __future__ import annotations

import torch
from fairseq.modules import MultiheadAttention
from torch import Tensor


def extend_self_attention(
    module: MultiheadAttention, incremental_state: dict, k: Tensor, v: Tensor, padding: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None, int]:
    """Append this step's keys and values to the cache.

    Args:
        k, v: (B, H, 1, D).
        padding: (B, 1), True = padded, or None.

    Returns:
        Keys and values (B, H, t + 1, D), padding (B, t + 1) or None, and the mask row t of this step: the number of
        tokens that were cached before it.
    """
    state = module._get_input_buffer(incremental_state)
    previous_key, previous_padding = state.get("prev_key"), state.get("prev_key_padding_mask")
    row = 0
    if previous_key is not None:
        row = previous_key.size(2)
        k = torch.cat([previous_key, k], dim=2)
        v = torch.cat([state["prev_value"], v], dim=2)
    if padding is not None or previous_padding is not None:
        padding = MultiheadAttention._append_prev_key_padding_mask(
            key_padding_mask=padding,
            prev_key_padding_mask=previous_padding,
            batch_size=k.size(0),
            src_len=k.size(2),
            static_kv=False,
        ).bool()
    state.update(prev_key=k, prev_value=v, prev_key_padding_mask=padding)
    module._set_input_buffer(incremental_state, state)
    return k, v, padding, row


def reuse_cross_attention(
    module: MultiheadAttention, incremental_state: dict, key: Tensor, padding: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None, int]:
    """Project the encoder output in the first step, reuse the projections in all later ones.

    Args:
        key: encoder output (S, B, C).
        padding: (B, S), True = padded, or None.

    Returns:
        Keys and values (B, H, S, D), padding, and the mask row of this step: its number, counted from 0. (The authors'
        code used the source length here, one wrong row for every step.)
    """
    state = module._get_input_buffer(incremental_state)
    if "prev_key" not in state:
        k, v = module.split_heads(module.k_proj(key)), module.split_heads(module.v_proj(key))
        state = {"prev_key": k, "prev_value": v, "prev_key_padding_mask": padding}
        module._set_input_buffer(incremental_state, state)
    # Apart from the cached tensors: a step number is the same for all rows and must survive reordering as it is.
    step = module.get_incremental_state(incremental_state, "step") or {"row": 0}
    module.set_incremental_state(incremental_state, "step", {"row": step["row"] + 1})
    return state["prev_key"], state["prev_value"], state["prev_key_padding_mask"], step["row"]
