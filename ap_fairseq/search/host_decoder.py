"""The search on a CPU without kernels: steps and rules of `StaticDecoder`, over the caches of `host_caches`.

Decoder layers run without their modules, over packed weights, and finished sentences leave the batch at once.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ap_fairseq.model.attention import PrunedMultiheadAttention
from ap_fairseq.model.cpu_linear import Product, Products, can_pack, is_int8
from ap_fairseq.model.layers import is_plain
from ap_fairseq.search.host_caches import (
    HostCrossAttention,
    HostSelfAttention,
    MaskRows,
    SentenceSlots,
    SourceColumns,
    attend,
)
from ap_fairseq.search.hypotheses import Hypotheses
from ap_fairseq.search.running import Batch, EncoderOuts, RunningSearch
from ap_fairseq.search.static_decoder import LayerStep, Model, ModelStep, StaticDecoder, layer_step, model_step
from ap_fairseq.sites import layers_of


class ShortSource:
    """Cross-attention to one short sentence without a mask: two products around a softmax.

    Its keys are multiplied by the weight of the queries once, its values by that of the output. With fewer columns than
    a head has elements that is less to read in every step than these weights.
    """

    def __init__(self, module: PrunedMultiheadAttention, kv: Tensor):
        """Take keys and values (2, 1, H, S, D)."""
        (k, v), heads, scale = kv[:, 0], (module.num_heads, module.head_dim), module.scaling
        self.shape = -1, *k.shape[:2]
        self.keys = (k @ module.q_proj.weight.unflatten(0, heads)).mul_(scale).permute(2, 0, 1).flatten(1)  # (C, H * S)
        self.bias = (k @ module.q_proj.bias.view(*heads, 1)).mul_(scale).flatten()
        self.values = (v @ module.out_proj.weight.t().unflatten(0, heads)).flatten(0, 1)  # (H * S, C)
        self.out_bias = module.out_proj.bias

    @staticmethod
    def covers(module: PrunedMultiheadAttention, cache: HostCrossAttention) -> bool:
        """Whether the cache is that of one short sentence, without padding or mask. 8-bit weights stay as they are."""
        _, n, _, size, head_dim = cache.kv.shape
        masked = cache.heads is not None or not cache.columns.whole
        return n == 1 and size <= head_dim and not masked and not is_int8(module.q_proj)

    def weights(self, x: Tensor) -> Tensor:
        """(N, C) -> attention, (N, H * S)."""
        return torch.addmm(self.bias, x, self.keys).view(self.shape).softmax(-1).flatten(1)

    def attended(self, weights: Tensor) -> Tensor:
        """(N, H * S) -> the output of attention, (N, C)."""
        return torch.addmm(self.out_bias, weights, self.values)


class HostLayer:
    """A step of one decoder layer with its weights and caches at hand; fairseq's modules spend much of a step on calls.

    Args:
        layer: one for which `covers` is true.
        self_cache, cross_cache: of its attention; *cross_cache* is None in a decoder without cross-attention.
        packed: returns the product of linear layers.
    """

    def __init__(
        self,
        layer: nn.Module,
        self_cache: HostSelfAttention,
        cross_cache: HostCrossAttention | None,
        packed: Callable[..., Product],
    ):
        own, cross = layer.self_attn, layer.encoder_attn
        self.normalize_before = layer.normalize_before
        self.activation = torch.relu_ if layer.activation_fn is F.relu else layer.activation_fn
        self.self_cache, self.cross_cache = self_cache, cross_cache
        self.heads, self.scale = (own.num_heads, own.head_dim), own.scaling
        self.qkv, self.out = packed(own.q_proj, own.k_proj, own.v_proj), packed(own.out_proj)
        self.norm, self.final_norm = Norm(layer.self_attn_layer_norm), Norm(layer.final_layer_norm)
        if cross is not None and ShortSource.covers(cross, cross_cache):
            source = ShortSource(cross, cross_cache.kv)
            self.cross_part, self.cross_out = source.weights, source.attended
            self.cross_norm = Norm(layer.encoder_attn_layer_norm)
        elif cross is not None:
            self.cross_part = self._attend_to_source
            self.q, self.cross_out = packed(cross.q_proj), packed(cross.out_proj)
            self.cross_heads, self.cross_scale = (cross.num_heads, cross.head_dim), cross.scaling
            self.cross_norm = Norm(layer.encoder_attn_layer_norm)
        self.fc1, self.fc2 = packed(layer.fc1), packed(layer.fc2)

    @staticmethod
    def covers(layer: nn.Module) -> bool:
        """Whether this class does all that a layer does, and its weights can be packed."""
        return is_plain(layer) and can_pack(layer.fc1.weight)

    def __call__(self, x: Tensor) -> Tensor:
        x = self._residual(x, self.norm, self._attend_to_target, self.out)
        if self.cross_cache is not None:
            x = self._residual(x, self.cross_norm, self.cross_part, self.cross_out)
        return self._residual(x, self.final_norm, self._widen, self.fc2)

    def _residual(self, x: Tensor, norm: Norm, part: Callable[[Tensor], Tensor], last: Product) -> Tensor:
        if self.normalize_before:
            return last(part(norm(x))).add_(x)
        return norm(last(part(x)).add_(x))

    def _attend_to_target(self, x: Tensor) -> Tensor:
        cache = self.self_cache
        qkv = self.qkv(x).view(cache.slots.n, -1, 3, *self.heads).permute(2, 0, 3, 1, 4)  # (3, n, H, beam, D)
        cache.store(qkv[1:])
        return attend(qkv[0], *cache.attended(), self.scale).reshape(x.shape[0], -1)

    def _attend_to_source(self, x: Tensor) -> Tensor:
        cache = self.cross_cache
        q = self.q(x).view(cache.columns.slots.n, -1, *self.cross_heads).transpose(1, 2)
        return attend(q, *cache.attended(), self.cross_scale).reshape(x.shape[0], -1)

    def _widen(self, x: Tensor) -> Tensor:
        return self.activation(self.fc1(x))


class Norm:
    """A layer normalisation with what it needs at hand."""

    def __init__(self, norm: nn.LayerNorm):
        self.arguments = norm.normalized_shape, norm.weight, norm.bias, norm.eps

    def __call__(self, x: Tensor) -> Tensor:
        return torch.layer_norm(x, *self.arguments)


class HostDecoder(StaticDecoder):
    """The search on a CPU: a batch holds only its unfinished sentences, and has caches of its own."""

    def _allocate(self, dtype: torch.dtype, device: torch.device) -> None:
        self.kv_pools, self.projections, self.dtype = {}, {}, dtype
        self.mask_rows: list[MaskRows] = []
        self.packed = Products()

    def _places(self, n_sentences: int) -> int:
        return n_sentences

    # In inference mode torch does not count changes of tensors, which takes a tenth of a step of a small model. What
    # callers get, the outputs of encoders and hypotheses, is made outside of it: they may train on it.

    @torch.inference_mode()
    def launch(self, search: RunningSearch, n_steps: int) -> None:
        super().launch(search, n_steps)

    @torch.inference_mode()
    def finish(self, search: RunningSearch, nbest: int | None = None) -> Callable[[], Hypotheses]:
        return super().finish(search, nbest)

    def _mask_rows(self) -> list[MaskRows]:
        """Return those of self-attention and of cross-attention, the same ones while the masks are the same."""
        positions, source_length = self.capacity.positions, self.capacity.source_length
        asked = [(self.self_sites, positions), (self.cross_sites, source_length)]
        layouts = [module.layout(positions, n_columns) for sites, n_columns in asked for module in sites]
        if self.layouts != layouts:
            self.layouts = layouts
            self.mask_rows = [MaskRows(sites, positions, n_columns) for sites, n_columns in asked]
        return self.mask_rows

    def _prepare_caches(self, batch: Batch, real: Tensor, encoder_outs: EncoderOuts | None) -> EncoderOuts | None:
        if encoder_outs is None:
            encoder_outs = self.encode(batch.net_input)
        self.packed.refresh()
        self_rows, cross_rows = self._mask_rows()
        slots = self.slots = SentenceSlots(self.beams, real.size(0), self_rows, self.dtype)
        columns = SourceColumns(slots, real, cross_rows, self.dtype)
        self.self_caches = {module: HostSelfAttention(slots, module, self.dtype) for module in self.self_sites}
        self.sources: list[SourceColumns | HostCrossAttention] = [columns]
        layers: list[list[LayerStep]] = []
        for model, encoder_out in zip(self.models, encoder_outs or [None] * len(self.models), strict=True):
            layers.append([])
            source = None if encoder_out is None else encoder_out["encoder_out"][0].transpose(0, 1)
            for layer in layers_of(model.decoder):
                cross = None
                if layer.encoder_attn is not None:
                    kv = self._project_source(layer.encoder_attn, source)
                    cross = HostCrossAttention(columns, layer.encoder_attn, kv)
                    self.sources.append(cross)
                layers[-1].append(self._layer(layer, self.self_caches[layer.self_attn], cross))
        self.output_layers = [self._output_layer(model) for model in self.models]
        self.steps = [self._host_step(index, own) for index, own in enumerate(layers)]
        return encoder_outs

    def _output_layer(self, model: Model) -> Callable[[Tensor], Tensor]:
        decoder = model.decoder
        if decoder.adaptive_softmax is not None or not can_pack(decoder.output_projection.weight):
            return decoder.output_layer
        return self.packed(decoder.output_projection)

    def _host_step(self, index: int, layers: list[LayerStep]) -> ModelStep:
        """Return the step of a model with what it needs at hand."""
        decoder = self.models[index].decoder
        plain = decoder.layer_norm is not None and decoder.project_out_dim is None
        finish = Norm(decoder.layer_norm) if plain else decoder.finish
        return model_step(self._embedding(index), layers, finish, self.output_layers[index])

    def _embedding(self, index: int) -> Callable[[Tensor], Tensor]:
        """Return what `_embed` does for a model."""
        decoder, positions, slots = self.models[index].decoder, self.positions[index], self.slots
        embedding, scale = decoder.embed_tokens, decoder.embed_scale
        changed = (decoder.quant_noise, decoder.project_in_dim, decoder.layernorm_embedding)
        if positions is None or type(embedding) is not nn.Embedding or any(x is not None for x in changed):
            return lambda tokens: self._embed(index, tokens)
        weight = embedding.weight
        return lambda tokens: torch.add(positions[slots.step], torch.embedding(weight, tokens), alpha=scale)

    def _layer(self, layer: nn.Module, own: HostSelfAttention, cross: HostCrossAttention | None) -> LayerStep:
        if HostLayer.covers(layer):
            return HostLayer(layer, own, cross, self.packed)
        state: dict = {}
        layer.self_attn.set_incremental_state(state, "attn_state", {"cache": own})
        if cross is not None:
            layer.encoder_attn.set_incremental_state(state, "attn_state", {"cache": cross})
        return layer_step(layer, state)

    @staticmethod
    def _project_source(module: PrunedMultiheadAttention, source: Tensor) -> Tensor:
        """(B, S, C) -> (2, B, H, S, D)."""
        kv = module.project_source(source.flatten(0, 1)).unflatten(0, source.shape[:2])
        return kv.permute(2, 0, 3, 1, 4).contiguous()

    def _prefill(self, encoder_outs: EncoderOuts | None, prefix: Tensor, first_token: int, max_len: int) -> None:
        if prefix.size(1) > self.slots.capacity:
            self._keep(torch.empty(self.slots.n, 0, dtype=torch.int64), 2 * prefix.size(1))
        super()._prefill(encoder_outs, prefix, first_token, max_len)
        self.slots.begin_with(prefix.size(1))

    def _store_prefix(self, module: PrunedMultiheadAttention, kv: Tensor, max_len: int) -> None:
        self.self_caches[module].kv[..., : kv.size(0), :] = kv.permute(2, 1, 3, 0, 4)

    def _reserve_step(self, n: int, step: int, max_len: int) -> None:
        slots = self.slots
        if slots.used + self.rules.beam > slots.capacity:
            order, size = slots.live()
            self._keep(order[:, :size], max(slots.capacity, 2 * (size + self.rules.beam)))
        slots.next_step()

    def _keep(self, order: Tensor, capacity: int) -> None:
        """Drop all slots but *order*, int64 (n, L), and make room for *capacity*."""
        self.slots.keep(order, capacity)
        for cache in self.self_caches.values():
            cache.keep(order, capacity)

    def _move(self, n: int, smaller: int) -> Tensor:
        order = super()._move(n, smaller)
        to = (order != torch.arange(smaller)).nonzero()[:, 0]
        self.slots.move(to, order[to], smaller)
        for cache in (*self.self_caches.values(), *self.sources):
            cache.move(to, order[to])
        return order

    def _number_slots(self, n: int) -> None:
        """Nothing: `SentenceSlots` did."""

    def _run(self, n: int, within_prefix: bool) -> None:
        self._step(n, within_prefix, self.steps)
