"""Attention that computes only the cells its pruning mask keeps."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from fairseq.modules import MultiheadAttention
from torch import Tensor

from ap_fairseq import decoding
from ap_fairseq.artifacts import CELLS_PER_WORD, ArtifactError
from ap_fairseq.dynamic import DynamicPruning
from ap_fairseq.sites import AttentionKind

BACKENDS = ("auto", "triton", "eager")
MASK_BUFFERS = ("keep_words", "beyond_words", "mask_range")


class PrunedMultiheadAttention(MultiheadAttention):
    """fairseq's multi-head attention under a global mask per head.

    Parameters and their names are those of the stock module. The mask is stored in persistent buffers, so checkpoints
    are self-contained:

    - ``keep_words`` int64 (heads, Tq, ceil(Tk / 32)) and ``beyond_words`` int64 (heads, ceil((Tq + Tk - 1) / 32)): 32
      cells to a word, bit set = kept (see :func:`ap_fairseq.artifacts.pack_cells`);
    - ``mask_range`` int64 (2,): Tq, Tk. Before a mask is set all three are empty, and a forward pass is an error.

    Args:
        embed_dim, num_heads: as in fairseq.
        kind: the attention kind, which decides causality and where keys come from.
        backend: ``eager`` (torch, any device), ``triton`` (block-sparse kernels) or ``auto``.
        dynamic: what is discarded anew for every sentence, on top of the mask; eager only.

    Raises:
        ValueError: for options that have no meaning under a mask (quant-noise, xFormers, bias_kv, zero_attn).
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        kind: AttentionKind,
        backend: str = "auto",
        dynamic: DynamicPruning | None = None,
        **kwargs,
    ):
        unsupported = {
            "q_noise": "--quant-noise-pq",
            "xformers_att_config": "--encoder-xformers-att-config/--decoder-xformers-att-config",
            "add_bias_kv": "add_bias_kv",
            "add_zero_attn": "add_zero_attn",
        }
        for name, option in unsupported.items():
            if kwargs.get(name):
                raise ValueError(f"{option} is set ({name}={kwargs[name]!r}); pruned attention does not support it")
        if backend == "triton":
            raise ValueError(
                "--attention-backend triton: the kernels are not connected to the model yet; use auto or eager"
            )
        if dynamic is not None and backend == "triton":
            raise ValueError(
                "--attention-backend triton with --attention-top-k or --attention-threshold: these need all scores, "
                "which the kernels never form; use eager"
            )
        super().__init__(
            embed_dim,
            num_heads,
            self_attention=kind is not AttentionKind.CROSS,
            encoder_decoder_attention=kind is AttentionKind.CROSS,
            **kwargs,
        )
        self.kind = kind
        self.backend = backend
        self.dynamic = dynamic
        # The name that --retain-dropout-modules knows.
        self.dropout_module.module_name = MultiheadAttention.__name__
        self.register_buffer("keep_words", torch.zeros(num_heads, 0, 0, dtype=torch.int64))
        self.register_buffer("beyond_words", torch.zeros(num_heads, 0, dtype=torch.int64))
        self.register_buffer("mask_range", torch.zeros(2, dtype=torch.int64))
        self.mask_is_explicit = False
        self._forget_derived()

    # -- the mask -----------------------------------------------------------------------------------------------------

    def set_mask(self, keep_words: Tensor, beyond_words: Tensor, mask_range: Tensor) -> None:
        """Take a packed mask (shapes as the buffers). A checkpoint loaded afterwards does not replace it."""
        for name, value in zip(MASK_BUFFERS, (keep_words, beyond_words, mask_range), strict=True):
            setattr(self, name, value.to(self.out_proj.weight.device))
        self.mask_is_explicit = True
        self._forget_derived()

    def _forget_derived(self) -> None:
        self._keep_cells: Tensor | None = None

    def _load_from_state_dict(self, state_dict, prefix, *args):
        for name in MASK_BUFFERS:
            key = prefix + name
            if self.mask_is_explicit or key not in state_dict:  # a dense checkpoint, or an explicit mask that wins
                state_dict[key] = getattr(self, name)
            else:
                setattr(self, name, torch.empty_like(state_dict[key], device=getattr(self, name).device))
        self._forget_derived()
        super()._load_from_state_dict(state_dict, prefix, *args)

    def keep_mask(self, n_queries: int, n_keys: int) -> Tensor:
        """Return the keep mask, bool (heads, n_queries, n_keys), True = kept; the diagonal pattern beyond its range."""
        cells = self._keep_cells
        device = self.keep_words.device
        if cells is None or cells.device != device or cells.size(1) < n_queries or cells.size(2) < n_keys:
            cells = self._keep_cells = self._unpack(n_queries, n_keys)
        return cells[:, :n_queries, :n_keys]

    def _unpack(self, n_queries: int, n_keys: int) -> Tensor:
        recorded_queries, recorded_keys = self.mask_range.tolist()
        if recorded_queries == 0:
            raise ArtifactError(
                f"this pruned_transformer has no masks for its {self.kind.value} attention: start training with "
                "--attention-masks FILE, or load a checkpoint that was trained with it"
            )
        keep = unpack_cells(self.keep_words, recorded_keys)
        if n_queries <= recorded_queries and n_keys <= recorded_keys:
            return keep
        # Doubling, so that ever longer sentences unpack a mask only a few times.
        n_queries = max(recorded_queries, 1 << (n_queries - 1).bit_length())
        n_keys = max(recorded_keys, 1 << (n_keys - 1).bit_length())
        row = torch.arange(n_queries, device=keep.device)[:, None]
        column = torch.arange(n_keys, device=keep.device)[None, :]
        pattern = unpack_cells(self.beyond_words, recorded_queries + recorded_keys - 1)
        offset = column - row + recorded_queries - 1
        known = (offset >= 0) & (offset < pattern.size(1))
        cells = pattern[:, offset.clamp(0, pattern.size(1) - 1)] | ~known
        cells |= column == (0 if self.kind is AttentionKind.CROSS else row)
        if self.kind.causal:
            cells &= column <= row
        cells[:, :recorded_queries, :recorded_keys] = keep
        return cells

    # -- attention ----------------------------------------------------------------------------------------------------

    def split_heads(self, x: Tensor) -> Tensor:
        """(T, B, H*D) -> (B, H, T, D), a view."""
        return x.unflatten(-1, (self.num_heads, self.head_dim)).permute(1, 2, 0, 3)

    def forward(
        self,
        query: Tensor,
        key: Tensor | None = None,
        value: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        incremental_state: dict | None = None,
        need_weights: bool = True,
        static_kv: bool = False,
        attn_mask: Tensor | None = None,
        before_softmax: bool = False,
        need_head_weights: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend as fairseq's module does, within the mask.

        Args:
            query: (Tq, B, C); one token with *incremental_state*.
            key: (Tk, B, C) encoder output for cross-attention; ignored in self-attention.
            value: ignored: it is the key.
            key_padding_mask: (B, Tk), True = padded. Padding must be on the right: masks count tokens from column 0.
            attn_mask: decoder self-attention passes its causal mask; only its presence is read.
            need_weights, need_head_weights: return attention probabilities, averaged over heads or not.

        Returns:
            Output (Tq, B, C), in which padded queries of self-attention are 0 before the output projection, and
            weights: None, (B, Tq, Tk), or (H, B, Tq, Tk).

        Raises:
            ArtifactError: if no mask was set.
            ValueError: for full-context decoder self-attention, *before_softmax* or an encoder *attn_mask*.
        """
        if before_softmax:
            raise ValueError("before_softmax: pruned attention has no raw scores for pruned cells")
        expects_causal_mask = self.kind.causal and incremental_state is None
        if (attn_mask is not None) != expects_causal_mask:
            raise ValueError(
                f"{self.kind.value} attention {'needs' if expects_causal_mask else 'does not take'} an attn_mask: its "
                "pruning mask is defined for the order of attention that was recorded"
            )
        n_queries = query.size(0)
        q = self.split_heads(self.q_proj(query))
        first_row = 0
        if self.self_attention:
            k, v = self.split_heads(self.k_proj(query)), self.split_heads(self.v_proj(query))
            if incremental_state is not None:
                k, v, key_padding_mask, first_row = decoding.extend_self_attention(
                    self, incremental_state, k, v, key_padding_mask
                )
        elif incremental_state is not None:
            k, v, key_padding_mask, first_row = decoding.reuse_cross_attention(
                self, incremental_state, key, key_padding_mask
            )
        else:
            k, v = self.split_heads(self.k_proj(key)), self.split_heads(self.v_proj(key))

        keep = self.keep_mask(first_row + n_queries, k.size(2))[:, first_row:]  # (H, Tq, Tk)
        query_padding = key_padding_mask if self.self_attention and incremental_state is None else None
        dropout = self.dropout_module
        dropout_p = dropout.p if self.training or dropout.apply_during_inference else 0.0
        attend = attend_fused
        if need_weights or need_head_weights or self.dynamic is not None:
            attend = functools.partial(attend_with_weights, dynamic=self.dynamic)
        output, weights = attend(q, k, v, keep, key_padding_mask, query_padding, self.scaling, dropout_p)
        output = self.out_proj(output.permute(2, 0, 1, 3).flatten(2))
        if not (need_weights or need_head_weights):
            return output, None
        return output, weights.transpose(0, 1) if need_head_weights else weights.mean(1)


def visible_cells(keep: Tensor, key_padding: Tensor | None, query_padding: Tensor | None) -> Tensor:
    """Combine mask and padding: bool (1 or B, H, Tq, Tk), True = attend. Padded queries see everything.

    They must see something, or their softmax would be NaN and its gradient poison the projections; their output is
    zeroed instead. Real rows are never empty: the diagonal, or column 0 of cross-attention, is always kept.
    """
    visible = keep[None]
    if key_padding is not None:
        visible = visible & ~key_padding[:, None, None, :].bool()
    if query_padding is not None:
        visible = visible | query_padding[:, None, :, None].bool()
    return visible


def attend_with_weights(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keep: Tensor,
    key_padding: Tensor | None,
    query_padding: Tensor | None,
    scale: float,
    dropout_p: float,
    dynamic: DynamicPruning | None = None,
) -> tuple[Tensor, Tensor]:
    """The reference: softmax over the visible cells in float32, dropout, weighted sum of values.

    Args:
        q: (B, H, Tq, D).
        k, v: (B, H, Tk, D).
        keep: bool (H, Tq, Tk), True = kept.
        key_padding: (B, Tk), query_padding: (B, Tq), True = padded, or None.
        dynamic: inference-time pruning of the probabilities.

    Returns:
        Output (B, H, Tq, D), 0 for padded queries, and probabilities before dropout, float32 (B, H, Tq, Tk).
    """
    scores = torch.matmul(q * scale, k.transpose(-1, -2))
    scores = scores.masked_fill(~visible_cells(keep, key_padding, query_padding), float("-inf"))
    if dynamic is None:
        weights = torch.softmax(scores, dim=-1, dtype=torch.float32)
    else:
        weights = dynamic.probabilities(scores, query_padding)
    output = torch.matmul(F.dropout(weights.type_as(v), dropout_p, training=dropout_p > 0), v)
    return _zero_padded(output, query_padding), weights


def attend_fused(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keep: Tensor,
    key_padding: Tensor | None,
    query_padding: Tensor | None,
    scale: float,
    dropout_p: float,
) -> tuple[Tensor, None]:
    """The same through torch's fused attention, which is faster and returns no weights."""
    visible = visible_cells(keep, key_padding, query_padding)
    output = F.scaled_dot_product_attention(q, k, v, attn_mask=visible, dropout_p=dropout_p, scale=scale)
    return _zero_padded(output, query_padding), None


def _zero_padded(output: Tensor, query_padding: Tensor | None) -> Tensor:
    if query_padding is None:
        return output
    return output.masked_fill(query_padding[:, None, :, None].bool(), 0)


def unpack_cells(words: Tensor, n: int) -> Tensor:
    """Invert :func:`ap_fairseq.artifacts.pack_cells` on the device of *words*: int64 (..., w) -> bool (..., n)."""
    bits = torch.arange(CELLS_PER_WORD, device=words.device)
    return (words.unsqueeze(-1) >> bits & 1).flatten(-2)[..., :n].bool()
