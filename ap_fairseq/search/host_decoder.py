"""The search on a CPU without kernels: steps and rules of `StaticDecoder`, over caches that torch's attention reads.

All hypotheses of a sentence attend to the slots of all of them in one product, under a mask that says which slots a
hypothesis consists of. So nothing is copied when beams are reordered, and a slot that beams share is read once. Slots
that no hypothesis refers to any more are dropped from time to time, and finished sentences leave the batch at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ap_fairseq.model.attention import PrunedMultiheadAttention
from ap_fairseq.model.cpu_linear import Product, Products, can_pack, is_int8
from ap_fairseq.model.kv_cache import HostCache
from ap_fairseq.model.layers import is_plain
from ap_fairseq.search.beams import BeamSearchState
from ap_fairseq.search.hypotheses import Hypotheses
from ap_fairseq.search.running import Batch, EncoderOuts, RunningSearch
from ap_fairseq.search.static_decoder import LayerStep, Model, ModelStep, StaticDecoder, head_slices, layer_step
from ap_fairseq.sites import layers_of

FIRST_SLOTS = 64  # of a sentence; slots are compacted, or their number doubled, when they are full
MASK_ROWS_MEMO = 1 << 26  # bytes of mask rows that are remembered: all of searches up to 1,000 positions or so


class SentenceSlots:
    """Which slots of self-attention the hypotheses of the first *n* sentences consist of, alike in all sites.

    Attributes:
        n, step, used: sentences in the batch, the step, and slots in use, which are as many for every sentence.
        position: int64 (B, L), the target position in every slot, if masks prune anything.
        table: (B * beam, L), what is added to attention scores: 0 where a hypothesis consists of a slot, else -inf. It
            is the table of the search's state, which every step permutes with its hypotheses.
        by_sentence: the table, (B, beam, L).
        masks: the mask rows of self-attention.
    """

    @torch.inference_mode(False)  # the next search may come outside of it and finds the table
    def __init__(self, beams: BeamSearchState, n: int, masks: MaskRows, dtype: torch.dtype):
        self.beams, self.n, self.step, self.used, self.masks = beams, n, -1, 0, masks
        self.beam = beams.state.beam
        self.position = torch.zeros(n, FIRST_SLOTS, dtype=torch.int64)
        self.table = torch.empty(n * self.beam, FIRST_SLOTS, dtype=dtype)
        own = torch.eye(self.beam, dtype=torch.bool).repeat(n, 1)
        self.own_slot = self.table.new_zeros(n * self.beam, self.beam).masked_fill_(~own, -math.inf)
        self.own_slot = self.own_slot.view(n, self.beam, self.beam)

    @property
    def table(self) -> Tensor:
        return self.beams.state.block_table

    @table.setter
    def table(self, table: Tensor) -> None:
        self.beams.state = self.beams.state._replace(block_table=table)
        self.by_sentence = table.view(-1, self.beam, table.size(1))  # a view

    @property
    def capacity(self) -> int:
        return self.position.size(1)

    def next_step(self) -> None:
        """Add a slot for the new position of every hypothesis."""
        self.step, n = self.step + 1, self.n
        new, self.used = slice(self.used, self.used + self.beam), self.used + self.beam
        if self.masks.heads:
            self.position[:n, new] = self.step
        self.by_sentence[:n, :, new] = self.own_slot[:n]
        self._bias = self.by_sentence[:n, None, :, : self.used]
        self._pruned_bias: Tensor | None = None

    def begin_with(self, size: int) -> None:
        """Take slots for *size* positions that all hypotheses of a sentence share."""
        self.step, self.used = size - 1, size
        self.position[:, :size] = torch.arange(size)
        self.table[:, :size] = 0

    def bias(self, heads: slice | None) -> Tensor:
        """Return what is added to the attention scores of the step, (n, heads or 1, beam, used), 0 or -inf.

        Args:
            heads: of a site among those whose masks prune anything; None: its mask prunes nothing.
        """
        if heads is None:
            return self._bias
        if self._pruned_bias is None:
            pruned = self.masks.pruned(self.step, self.step + 1, self.n, None)
            position = self.position[: self.n, None, : self.used].expand(-1, pruned.size(1), -1)
            self._pruned_bias = self._bias.masked_fill(pruned.gather(2, position).unsqueeze(2), -math.inf)
        return self._pruned_bias[:, heads]

    def live(self) -> tuple[Tensor, int]:
        """Return the slots of each sentence, int64 (n, used), those first that hypotheses consist of; and how many."""
        live = self.by_sentence[: self.n, :, : self.used].eq(0).any(1)
        return live.logical_not().to(torch.int8).argsort(dim=1, stable=True), int(live.sum(1).max())

    @torch.inference_mode(False)
    def keep(self, order: Tensor, capacity: int) -> None:
        """Drop all slots but *order*, int64 (n, L), and make room for *capacity*."""
        kept = self.by_sentence[: self.n].gather(2, order[:, None].expand(-1, self.beam, -1)).flatten(0, 1)
        self.used = order.size(1)
        self.position = F.pad(self.position[: self.n].gather(1, order), (0, capacity - self.used))
        self.table = F.pad(kept, (0, capacity - self.used))

    def move(self, to: Tensor, source: Tensor, n: int) -> None:
        """Move sentences between places, int64 each; the first *n* go on."""
        self.n = n
        self.position[to] = self.position[source]


class MaskRows:
    """The mask rows of a step, of all sites at once whose masks prune anything; remembered unless sentences differ.

    Args:
        modules: the attention of the sites.
        n_rows, n_columns: positions that count.

    Attributes:
        heads: of those sites, where their heads are among all.
    """

    def __init__(self, modules: list[PrunedMultiheadAttention], n_rows: int, n_columns: int):
        pruned = [module for module in modules if not module.keeps_all(n_rows, n_columns)]
        self.heads = head_slices(pruned)
        self.n_columns, self._common = n_columns, {}  # by step

    def pruned(self, step: int, size: int, n: int, lengths: Tensor | None) -> Tensor:
        """Return what the rows prune of the first *size* columns of n sentences, bool (n, H of all sites, size)."""
        if any(module.is_relative for module in self.heads):
            rows = [module.mask_row(step, size, lengths) for module in self.heads]
            return ~torch.cat([row.expand(n, -1, -1) for row in rows], 1)
        if step not in self._common:
            common = ~torch.cat([module.mask_row(step, self.n_columns) for module in self.heads])
            if (len(self._common) + 1) * common.numel() > MASK_ROWS_MEMO:
                self._common.clear()
            self._common[step] = common
        return self._common[step][:, :size].expand(n, -1, -1)


class HostSelfAttention(HostCache):
    """Keys and values of one decoder self-attention site: (2, B, H, L, D), by sentence and slot."""

    def __init__(self, slots: SentenceSlots, module: PrunedMultiheadAttention, dtype: torch.dtype):
        self.slots, self.heads = slots, slots.masks.heads.get(module)
        self.kv = torch.empty(2, slots.n, module.num_heads, slots.capacity, module.head_dim, dtype=dtype)

    def advance(self, kv: Tensor) -> None:
        self.store(kv.view(self.slots.n, -1, *kv.shape[1:]).permute(2, 0, 3, 1, 4))

    def store(self, kv: Tensor) -> None:
        """Store the keys and values of a step, (2, n, H, beam, D)."""
        slots = self.slots
        self.kv[:, : slots.n, :, slots.used - slots.beam : slots.used] = kv

    def attend(self, q: Tensor, scale: float) -> Tensor:
        return attend(by_sentence(q, self.slots.n), *self.attended(), scale).view_as(q)

    def attended(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the keys and values that a step attends to, (n, H, used, D) each, and what is added to scores."""
        k, v = self.kv[:, : self.slots.n, :, : self.slots.used].unbind()
        return k, v, self.slots.bias(self.heads)

    def keep(self, order: Tensor, capacity: int) -> None:
        """As `SentenceSlots.keep`."""
        n, size = order.shape
        kept = self.kv.new_empty(2, n, self.kv.size(2), capacity, self.kv.size(4))
        kept[..., :size, :] = self.kv[:, torch.arange(n)[:, None], :, order].permute(2, 0, 3, 1, 4)
        self.kv = kept

    def move(self, to: Tensor, source: Tensor) -> None:
        """As `SentenceSlots.move`."""
        self.kv[:, to] = self.kv[:, source]


class SourceColumns:
    """The columns of cross-attention, alike in all sites.

    Args:
        slots: count the sentences in the batch and the steps.
        real: bool (B, S), whether a sentence has the column.
        masks: the mask rows of cross-attention.
        dtype: of its scores.
    """

    def __init__(self, slots: SentenceSlots, real: Tensor, masks: MaskRows, dtype: torch.dtype):
        self.slots, self.lengths, self.masks, self.step = slots, real.sum(1), masks, -1
        self.padding = torch.zeros(real.size(0), 1, 1, real.size(1), dtype=dtype)  # -inf where there is no column
        self.padding.masked_fill_(~real[:, None, None], -math.inf)
        self.whole = bool(real.all())

    def bias(self, heads: slice | None) -> Tensor | None:
        """Return what is added to the scores of the step, (n, heads or 1, 1, S), 0 or -inf; None: nothing."""
        n = self.slots.n
        if heads is None:
            return None if self.whole else self.padding[:n]
        if self.step != self.slots.step:
            self.step, size = self.slots.step, self.padding.size(3)
            pruned = self.masks.pruned(self.step, size, n, self.lengths[:n])
            self._masked = self.padding[:n].masked_fill(pruned.unsqueeze(2), -math.inf)
        return self._masked[:, heads]

    def move(self, to: Tensor, source: Tensor) -> None:
        """As `SentenceSlots.move`."""
        for x in (self.padding, self.lengths):
            x[to] = x[source]


class HostCrossAttention(HostCache):
    """Keys and values of one cross-attention site, (2, B, H, S, D)."""

    def __init__(self, columns: SourceColumns, module: PrunedMultiheadAttention, kv: Tensor):
        self.columns, self.heads, self.kv = columns, columns.masks.heads.get(module), kv
        self.k_v = kv.unbind()

    def advance(self, kv: None = None) -> None:
        """Nothing: the search counts the steps."""

    def attend(self, q: Tensor, scale: float) -> Tensor:
        return attend(by_sentence(q, self.columns.slots.n), *self.attended(), scale).view_as(q)

    def attended(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return keys and values, (n, H, S, D) each, and what is added to scores."""
        return *self.k_v, self.columns.bias(self.heads)

    def move(self, to: Tensor, source: Tensor) -> None:
        """As `SentenceSlots.move`."""
        self.kv[:, to] = self.kv[:, source]
        self.k_v = self.kv[:, : self.columns.slots.n].unbind()


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


def by_sentence(q: Tensor, n: int) -> Tensor:
    """(N, H, D), of N / n hypotheses for each sentence -> (n, H, N / n, D), a view: hypotheses are queries."""
    return q.view(n, -1, *q.shape[1:]).transpose(1, 2)


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """Attend with q (n, H, beam, D) to k and v (n, H, L, D); (n, beam, H, D), contiguous.

    Rows that *bias* hides entirely give 0: torch's attention on a CPU sees to that.
    """
    return F.scaled_dot_product_attention(q, k, v, bias, scale=scale).transpose(1, 2)


class HostLayer:
    """A step of one decoder layer with its weights and caches at hand; fairseq's modules spend much of a step on calls.

    Args:
        layer: one that `covers` says so of.
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
        """Whether a layer does nothing else than this class, and its weights can be packed."""
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
    """The search on a CPU: a batch is as large as its unfinished sentences are many, and its caches are its own."""

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
        """Do as `_module_step`, with what a step needs at hand."""
        decoder, embed, project = self.models[index].decoder, self._embedding(index), self.output_layers[index]
        plain = decoder.layer_norm is not None and decoder.project_out_dim is None
        finish = Norm(decoder.layer_norm) if plain else decoder.finish

        def run(tokens: Tensor) -> Tensor:
            x = embed(tokens)
            for layer in layers:
                x = layer(x)
            return project(finish(x))

        return run

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
