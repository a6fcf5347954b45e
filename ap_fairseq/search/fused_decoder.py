"""A step of a decoder for few hypotheses, in about as many kernels as it has products and attentions.

fairseq's modules take some twenty kernels for a layer. With few rows each of them takes the time of a launch, no matter
how little it does, so that a sentence alone is translated hardly faster than ten.
"""

from __future__ import annotations

from collections.abc import Mapping

from fairseq import utils
from torch import Tensor, nn

from ap_fairseq.model.attention import PrunedMultiheadAttention
from ap_fairseq.model.kv_cache import PagedCache
from ap_fairseq.model.layers import is_plain
from ap_fairseq.search.static_cache import StaticCrossAttentionCache, StaticSelfAttentionCache
from triton_ops.rows import ACTIVATIONS, MAX_NORMALISED, MAX_ROWS, TYPES, Norm, Slots, embed_rows, linear_rows

FUNCTIONS = {utils.get_activation_fn(name): name for name in ACTIVATIONS if name is not None}


def serves(decoder: nn.Module, n_hypotheses: int) -> bool:
    """Whether `FusedDecoder` does the steps of a decoder: few hypotheses, half precision, layers without additions."""
    parameters = list(decoder.parameters())
    types = {parameter.dtype for parameter in parameters}
    layers = [decoder.layers[i] for i in range(len(decoder.layers))]  # iterating draws random numbers for LayerDrop
    return (
        n_hypotheses <= MAX_ROWS
        and all(parameter.is_contiguous() for parameter in parameters)
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
        and all(is_plain(layer) and layer.activation_fn in FUNCTIONS for layer in layers)
    )


def _norm(layer_norm: nn.LayerNorm) -> Norm:
    return Norm(layer_norm.weight, layer_norm.bias, layer_norm.eps)


class FusedLayer:
    """A step of one decoder layer.

    A layer normalisation is part of the product after it. Where it comes after a sum (post-norm), the sum goes on with
    the normalisation that it waits for.

    Args:
        layer: of a decoder that is served.
        own, cross: the caches of its attention; *cross* is None in a decoder without cross-attention.
    """

    def __init__(
        self,
        layer: nn.Module,
        own: StaticSelfAttentionCache,
        cross: StaticCrossAttentionCache | None,
    ):
        self.layer, self.own, self.cross = layer, own, cross
        self.activation = FUNCTIONS[layer.activation_fn]

    def __call__(self, x: Tensor, pending: Norm | None) -> tuple[Tensor, Norm | None]:
        layer, own = self.layer, self.own
        before, pending = self._norms(layer.self_attn_layer_norm, pending)
        slots = Slots(own.pool, own.offsets, own.device_step)
        q, x = linear_rows(x, *own.projection, norm=before, keep_normed=self._keep(before), slots=slots)
        x = self._attend(layer.self_attn, own, q, x)
        if self.cross is not None:
            before, pending = self._norms(layer.encoder_attn_layer_norm, pending)
            q, x = self._first(layer.encoder_attn.q_proj, x, before)
            x = self._attend(layer.encoder_attn, self.cross, q, x)
        before, pending = self._norms(layer.final_layer_norm, pending)
        hidden, x = self._first(layer.fc1, x, before, self.activation)
        return linear_rows(hidden, layer.fc2.weight, layer.fc2.bias, residual=x)[0], pending

    def _norms(self, norm: nn.LayerNorm, pending: Norm | None) -> tuple[Norm | None, Norm | None]:
        """Return what normalises the input of a part of the layer, and what its result waits for."""
        return (_norm(norm), None) if self.layer.normalize_before else (pending, _norm(norm))

    def _keep(self, before: Norm | None) -> bool:
        """Whether the normalised input is the residual."""
        return before is not None and not self.layer.normalize_before

    def _first(
        self, linear: nn.Linear, x: Tensor, before: Norm | None, activation: str | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the first product of a part of the layer, and its residual."""
        return linear_rows(
            x, linear.weight, linear.bias, norm=before, keep_normed=self._keep(before), activation=activation
        )

    @staticmethod
    def _attend(module: PrunedMultiheadAttention, cache: PagedCache, q: Tensor, residual: Tensor) -> Tensor:
        q = q.unflatten(1, (module.num_heads, module.head_dim))
        x = cache.attend(q, module.layout(*cache.layout_size()), module.scaling).flatten(1)
        return linear_rows(x, module.out_proj.weight, module.out_proj.bias, residual=residual)[0]


class FusedDecoder:
    """A step of a decoder, from the last tokens int64 (N,) of its hypotheses to logits (N, V).

    Args:
        decoder: one that it `serves`.
        caches: of its attention.
        positions: the embeddings of target positions, (T, C); None: the decoder has none.
        step: int64 (1,), the position.
    """

    def __init__(
        self,
        decoder: nn.Module,
        caches: Mapping[PrunedMultiheadAttention, StaticSelfAttentionCache | StaticCrossAttentionCache],
        positions: Tensor | None,
        step: Tensor,
    ):
        self.decoder, self.positions, self.step = decoder, positions, step
        layers = (decoder.layers[i] for i in range(len(decoder.layers)))
        self.layers = [FusedLayer(layer, caches[layer.self_attn], caches.get(layer.encoder_attn)) for layer in layers]

    def __call__(self, tokens: Tensor) -> Tensor:
        decoder, pending = self.decoder, None
        x = embed_rows(tokens, decoder.embed_tokens.weight, decoder.embed_scale, self.positions, self.step)
        for layer in self.layers:
            x, pending = layer(x, pending)
        if decoder.layer_norm is not None:
            pending = _norm(decoder.layer_norm)
        projection = decoder.output_projection
        return linear_rows(x, projection.weight, projection.bias, norm=pending)[0]
