"""A step of a decoder in about as many kernels as it has products and attentions.

fairseq's modules take some twenty kernels for a layer. With few rows each of them takes the time of a launch, so a
single sentence takes nearly as long as ten. Up to `MAX_ROWS` hypotheses a kernel of our own does each product, with all
that is around it; beyond, products are torch's, and what comes between two of them is one kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch.nn.functional as F
from fairseq import utils
from torch import Tensor, nn

from ap_fairseq.model.attention import PrunedMultiheadAttention
from ap_fairseq.model.kv_cache import PagedCache
from ap_fairseq.model.layers import is_plain
from ap_fairseq.search.static_cache import StaticCrossAttentionCache, StaticSelfAttentionCache
from ap_fairseq.sites import layers_of
from triton_ops import append_to_pool
from triton_ops.norm import add_norm
from triton_ops.rows import ACTIVATIONS, MAX_NORMALISED, MAX_ROWS, TYPES, Norm, Slots, embed_rows, linear_rows

Linear = Callable[..., tuple]  # `linear_rows`, or what does the same
FUNCTIONS = {utils.get_activation_fn(name): name for name in ACTIVATIONS if name is not None}


def serves(decoder: nn.Module) -> bool:
    """Whether `FusedDecoder` does the steps of a decoder: half precision, layers without additions."""
    parameters = list(decoder.parameters())
    types = {parameter.dtype for parameter in parameters}
    return (
        all(parameter.is_contiguous() for parameter in parameters)
        and len(types) == 1
        and types <= set(TYPES)
        and type(decoder.embed_tokens) is nn.Embedding  # not adaptive
        and decoder.adaptive_softmax is None
        and type(decoder.output_projection) is nn.Linear
        and decoder.embed_tokens.embedding_dim <= MAX_NORMALISED
        and all(
            part is None
            for part in (
                decoder.quant_noise,
                decoder.project_in_dim,
                decoder.project_out_dim,
                decoder.layernorm_embedding,
            )
        )
        and all(is_plain(layer) and layer.activation_fn in FUNCTIONS for layer in layers_of(decoder))
    )


def _norm(layer_norm: nn.LayerNorm) -> Norm:
    return Norm(layer_norm.weight, layer_norm.bias, layer_norm.eps)


class Sum(NamedTuple):
    """What the next normalisation adds up."""

    x: Tensor
    y: Tensor


def linear_many(
    x: Tensor | Sum,
    weight: Tensor,
    bias: Tensor | None,
    *,
    norm: Norm | None = None,
    keep_normed: bool = False,
    activation: str | None = None,
    residual: Tensor | None = None,
    slots: Slots | None = None,
) -> tuple[Tensor | Sum, Tensor]:
    """As `triton_ops.rows.linear_rows`, for any number of rows: by torch, and one kernel between two products.

    Returns:
        As that, but a residual is added by the kernel of the next normalisation.
    """
    if norm is not None:
        total, rows = add_norm(*x, norm) if isinstance(x, Sum) else add_norm(x, None, norm)
    else:
        total = rows = x.x + x.y if isinstance(x, Sum) else x
    y = F.linear(rows, weight, bias)
    if activation is not None:
        y = F.relu_(y) if activation == "relu" else F.gelu(y)
    if slots is not None:
        heads, dim = slots.offsets.size(0), slots.pool.size(2)
        append_to_pool(y[:, heads * dim :].unflatten(1, (2, heads, dim)), slots.pool, slots.offsets, slots.step)
        y = y[:, : heads * dim]
    return y if residual is None else Sum(residual, y), rows if keep_normed else total


class FusedLayer:
    """A step of one decoder layer.

    A layer normalisation is part of the product after it. Where it comes after a sum (post-norm), the sum goes on with
    the normalisation that it waits for.

    Args:
        layer: of a decoder that is served.
        own, cross: the caches of its attention; *cross* is None in a decoder without cross-attention.
        linear: `linear_rows` or `linear_many`.
    """

    def __init__(
        self, layer: nn.Module, own: StaticSelfAttentionCache, cross: StaticCrossAttentionCache | None, linear: Linear
    ):
        self.layer, self.own, self.cross, self.linear = layer, own, cross, linear
        self.activation = FUNCTIONS[layer.activation_fn]

    def __call__(self, x: Tensor | Sum, pending: Norm | None) -> tuple[Tensor | Sum, Norm | None]:
        layer, own = self.layer, self.own
        before, pending = self._norms(layer.self_attn_layer_norm, pending)
        slots = Slots(own.pool, own.offsets, own.device_step)
        q, x = self.linear(x, *own.projection, norm=before, keep_normed=self._keep(before), slots=slots)
        x = self._attend(layer.self_attn, own, q, x)
        if self.cross is not None:
            before, pending = self._norms(layer.encoder_attn_layer_norm, pending)
            q, x = self._first(layer.encoder_attn.q_proj, x, before)
            x = self._attend(layer.encoder_attn, self.cross, q, x)
        before, pending = self._norms(layer.final_layer_norm, pending)
        hidden, x = self._first(layer.fc1, x, before, self.activation)
        return self.linear(hidden, layer.fc2.weight, layer.fc2.bias, residual=x)[0], pending

    def _norms(self, norm: nn.LayerNorm, pending: Norm | None) -> tuple[Norm | None, Norm | None]:
        """Return what normalises the input of a part of the layer, and what its result waits for."""
        return (_norm(norm), None) if self.layer.normalize_before else (pending, _norm(norm))

    def _keep(self, before: Norm | None) -> bool:
        """Whether the normalised input is the residual."""
        return before is not None and not self.layer.normalize_before

    def _first(
        self, linear: nn.Linear, x: Tensor | Sum, before: Norm | None, activation: str | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the first product of a part of the layer, and its residual."""
        return self.linear(
            x, linear.weight, linear.bias, norm=before, keep_normed=self._keep(before), activation=activation
        )

    def _attend(self, module: PrunedMultiheadAttention, cache: PagedCache, q: Tensor, residual: Tensor) -> Tensor | Sum:
        q = q.unflatten(1, (module.num_heads, module.head_dim))
        x = cache.attend(q, module.layout(*cache.layout_size()), module.scaling).flatten(1)
        return self.linear(x, module.out_proj.weight, module.out_proj.bias, residual=residual)[0]


class FusedDecoder:
    """A step of a decoder, from the last tokens int64 (N,) of its hypotheses to logits (N, V).

    Args:
        decoder: one that it `serves`.
        caches: of its attention.
        positions: the embeddings of target positions, (T, C); None: the decoder has none.
        step: int64 (1,), the position.
        n_hypotheses: N.
    """

    def __init__(
        self,
        decoder: nn.Module,
        caches: Mapping[PrunedMultiheadAttention, StaticSelfAttentionCache | StaticCrossAttentionCache],
        positions: Tensor | None,
        step: Tensor,
        n_hypotheses: int,
    ):
        self.decoder, self.positions, self.step = decoder, positions, step
        self.linear: Linear = linear_rows if n_hypotheses <= MAX_ROWS else linear_many
        self.layers = [
            FusedLayer(layer, caches[layer.self_attn], caches.get(layer.encoder_attn), self.linear)
            for layer in layers_of(decoder)
        ]

    def __call__(self, tokens: Tensor) -> Tensor:
        decoder, pending = self.decoder, None
        x = embed_rows(tokens, decoder.embed_tokens.weight, decoder.embed_scale, self.positions, self.step)
        for layer in self.layers:
            x, pending = layer(x, pending)
        if decoder.layer_norm is not None:
            pending = _norm(decoder.layer_norm)
        projection = decoder.output_projection
        return self.linear(x, projection.weight, projection.bias, norm=pending)[0]
