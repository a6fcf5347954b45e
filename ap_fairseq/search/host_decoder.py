"""The search on a CPU without kernels: steps and rules of `StaticDecoder`, over caches that torch's attention reads.

All hypotheses of a sentence attend to the slots of all of them in one product, under a mask that says which slots a
hypothesis consists of. So nothing is copied when beams are reordered, and a slot that beams share is read once. Slots
that no hypothesis refers to any more are dropped from time to time, and finished sentences leave the batch at once.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ap_fairseq.model.attention import PrunedMultiheadAttention
from ap_fairseq.model.cpu_linear import Product, can_pack, packed
from ap_fairseq.model.kv_cache import HostCache
from ap_fairseq.model.layers import is_plain
from ap_fairseq.search.static_decoder import LayerStep, Model, StaticDecoder, layer_step
from triton_ops.beam_state import BeamState

FIRST_SLOTS = 64  # of a sentence; slots are compacted, or their number doubled, when they are full
NO_HYPOTHESIS = -1
MASK_ROWS_MEMO = 1 << 26  # bytes of mask rows that are remembered: all of searches up to 1,000 positions or so


class SentenceSlots:
    """Which slots of self-attention the hypotheses of the first *n* sentences consist of, alike in all sites.

    Attributes:
        n, step, used: sentences in the batch, the step, and slots in use, which are as many for every sentence.
        position, number: int64 (B, L), the target position in every slot, and its number in `BeamState.block_table`
            there; *NO_HYPOTHESIS* in empty ones.
        masks, dtype: the mask rows of self-attention, and the type of its scores.
    """

    def __init__(self, state: BeamState, n: int, masks: MaskRows, dtype: torch.dtype):
        self.state, self.n, self.step, self.used = state, n, -1, 0
        self.masks, self.dtype = masks, dtype
        self.position, self.number = torch.zeros(2, n, FIRST_SLOTS, dtype=torch.int64).unbind()

    @property
    def capacity(self) -> int:
        return self.position.size(1)

    def next_step(self) -> None:
        """Add a slot for the new position of every hypothesis."""
        self.step, beam = self.step + 1, self.state.beam
        new, self.used = slice(self.used, self.used + beam), self.used + beam
        self.position[: self.n, new] = self.step
        self.number[: self.n, new] = torch.arange(self.n * beam).view(self.n, beam)
        self._bias: Tensor | None = None
        self._pruned_bias: Tensor | None = None

    def begin_with(self, size: int) -> None:
        """Take slots for *size* positions that all hypotheses of a sentence share, in its slot number of each."""
        self.step, self.used = size - 1, size
        self.position[:, :size] = torch.arange(size)
        self.number[:, :size] = torch.arange(self.n)[:, None]

    def consists_of(self) -> Tensor:
        """Return which slots each hypothesis consists of, bool (n, beam, used)."""
        table = self.state.block_table[: self.n * self.state.beam].view(self.n, self.state.beam, -1)
        position, number = (x[: self.n, None, : self.used] for x in (self.position, self.number))
        return table.gather(2, position.expand(-1, self.state.beam, -1)) == number

    def bias(self, heads: slice | None) -> Tensor:
        """Return what is added to the attention scores of the step, (n, heads or 1, beam, used), 0 or -inf.

        Args:
            heads: of a site among those whose masks prune anything; None: its mask prunes nothing.
        """
        if self._bias is None:  # the same for all sites
            self._bias = torch.zeros(self.n, 1, self.state.beam, self.used, dtype=self.dtype)
            self._bias.masked_fill_(~self.consists_of()[:, None], -math.inf)
        if heads is None:
            return self._bias
        if self._pruned_bias is None:
            pruned = self.masks.pruned(self.step, self.step + 1, self.n, None)
            position = self.position[: self.n, None, : self.used].expand(-1, pruned.size(1), -1)
            self._pruned_bias = self._bias.masked_fill(pruned.gather(2, position).unsqueeze(2), -math.inf)
        return self._pruned_bias[:, heads]

    def live(self) -> tuple[Tensor, int]:
        """Return the slots of each sentence, int64 (n, used), those first that hypotheses consist of; and how many."""
        live = self.consists_of().any(1)
        self.number[: self.n, : self.used].masked_fill_(~live, NO_HYPOTHESIS)
        return live.logical_not().to(torch.int8).argsort(dim=1, stable=True), int(live.sum(1).max())

    def keep(self, order: Tensor, capacity: int) -> None:
        """Drop all slots but *order*, int64 (n, L), and make room for *capacity*."""
        self.used = order.size(1)
        kept = (F.pad(x[: self.n].gather(1, order), (0, capacity - self.used)) for x in (self.position, self.number))
        self.position, self.number = kept

    def move(self, to: Tensor, source: Tensor, n: int) -> None:
        """Move sentences between places, int64 each; the first *n* go on."""
        self.n = n
        for x in (self.position, self.number):
            x[to] = x[source]


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
        ends = itertools.accumulate(module.num_heads for module in pruned)
        self.heads = {module: slice(end - module.num_heads, end) for module, end in zip(pruned, ends, strict=True)}
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
    """Keys and values of one decoder self-attention site: (B, H, 2, L, D), by sentence and slot."""

    def __init__(self, slots: SentenceSlots, module: PrunedMultiheadAttention, dtype: torch.dtype):
        self.slots, self.heads = slots, slots.masks.heads.get(module)
        self.kv = torch.empty(slots.n, module.num_heads, 2, slots.capacity, module.head_dim, dtype=dtype)

    def advance(self, kv: Tensor) -> None:
        n, used, beam = self.slots.n, self.slots.used, self.slots.state.beam
        self.kv[:n, :, :, used - beam : used] = kv.view(n, beam, *kv.shape[1:]).permute(0, 3, 2, 1, 4)

    def attend(self, q: Tensor, scale: float) -> Tensor:
        return attend(q, self.kv[: self.slots.n, :, :, : self.slots.used], self.slots.bias(self.heads), scale)

    def keep(self, order: Tensor, capacity: int) -> None:
        """As `SentenceSlots.keep`."""
        n, size = order.shape
        kept = self.kv.new_empty(n, *self.kv.shape[1:3], capacity, self.kv.size(4))
        kept[:, :, :, :size] = self.kv[torch.arange(n)[:, None], :, :, order].permute(0, 2, 3, 1, 4)
        self.kv = kept

    def move(self, to: Tensor, source: Tensor) -> None:
        """As `SentenceSlots.move`."""
        self.kv[to] = self.kv[source]


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
    """Keys and values of one cross-attention site, (B, H, 2, S, D)."""

    def __init__(self, columns: SourceColumns, module: PrunedMultiheadAttention, kv: Tensor):
        self.columns, self.heads, self.kv = columns, columns.masks.heads.get(module), kv

    def advance(self, kv: None = None) -> None:
        """Nothing: the search counts the steps."""

    def attend(self, q: Tensor, scale: float) -> Tensor:
        return attend(q, self.kv[: self.columns.slots.n], self.columns.bias(self.heads), scale)

    def move(self, to: Tensor, source: Tensor) -> None:
        """As `SentenceSlots.move`."""
        self.kv[to] = self.kv[source]


def attend(q: Tensor, kv: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """Attend with q (N, H, D), of N / n hypotheses for each sentence, to kv (n, H, 2, L, D); (N, H, D).

    Rows that *bias* hides entirely give 0: torch's attention on a CPU sees to that.
    """
    k, v = kv.unbind(2)
    by_sentence = q.view(kv.size(0), -1, *q.shape[1:]).transpose(1, 2)  # a sentence's hypotheses are queries
    return F.scaled_dot_product_attention(by_sentence, k, v, bias, scale=scale).transpose(1, 2).flatten(0, 1)


class HostLayer:
    """A step of one decoder layer with its weights and caches at hand; fairseq's modules spend much of a step on calls.

    Args:
        layer: one that `covers` says so of.
        self_cache, cross_cache: of its attention; *cross_cache* is None in a decoder without cross-attention.
    """

    def __init__(self, layer: nn.Module, self_cache: HostSelfAttention, cross_cache: HostCrossAttention | None):
        own, cross = layer.self_attn, layer.encoder_attn
        self.normalize_before, self.activation = layer.normalize_before, layer.activation_fn
        self.self_cache, self.cross_cache = self_cache, cross_cache
        self.heads, self.scale = (own.num_heads, own.head_dim), own.scaling
        self.qkv, self.out = packed(own.q_proj, own.k_proj, own.v_proj), packed(own.out_proj)
        self.norm, self.final_norm = Norm(layer.self_attn_layer_norm), Norm(layer.final_layer_norm)
        if cross is not None:
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
            x = self._residual(x, self.cross_norm, self._attend_to_source, self.cross_out)
        return self._residual(x, self.final_norm, self._widen, self.fc2)

    def _residual(self, x: Tensor, norm: Norm, part: Callable[[Tensor], Tensor], last: Product) -> Tensor:
        if self.normalize_before:
            return last(part(norm(x))).add_(x)
        return norm(last(part(x)).add_(x))

    def _attend_to_target(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x).view(-1, 3, *self.heads)
        self.self_cache.advance(qkv[:, 1:])
        return self.self_cache.attend(qkv[:, 0], self.scale).flatten(1)

    def _attend_to_source(self, x: Tensor) -> Tensor:
        q = self.q(x).view(-1, *self.cross_heads)
        return self.cross_cache.attend(q, self.cross_scale).flatten(1)

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

    def _places(self, n_sentences: int) -> int:
        return n_sentences

    def _mask_rows(self) -> list[MaskRows]:
        """Return those of self-attention and of cross-attention, the same ones while the masks are the same."""
        positions, source_length = self.capacity.positions, self.capacity.source_length
        asked = [(self.self_sites, positions), (self.cross_sites, source_length)]
        layouts = [module.layout(positions, n_columns) for sites, n_columns in asked for module in sites]
        if self.layouts != layouts:
            self.layouts = layouts
            self.mask_rows = [MaskRows(sites, positions, n_columns) for sites, n_columns in asked]
        return self.mask_rows

    def _prepare_caches(self, encoder_outs: list[dict] | None, real: Tensor, max_len: int) -> None:
        self_rows, cross_rows = self._mask_rows()
        slots = self.slots = SentenceSlots(self.beams.state, real.size(0), self_rows, self.dtype)
        columns = SourceColumns(slots, real, cross_rows, self.dtype)
        self.self_caches = {module: HostSelfAttention(slots, module, self.dtype) for module in self.self_sites}
        self.sources: list[SourceColumns | HostCrossAttention] = [columns]
        self.layers: list[list[LayerStep]] = []
        for model, encoder_out in zip(self.models, encoder_outs or [None] * len(self.models), strict=True):
            self.layers.append([])
            source = None if encoder_out is None else encoder_out["encoder_out"][0].transpose(0, 1)
            for index in range(len(model.decoder.layers)):
                layer, cross = model.decoder.layers[index], None
                if layer.encoder_attn is not None:
                    kv = self._project_source(layer.encoder_attn, source)
                    cross = HostCrossAttention(columns, layer.encoder_attn, kv)
                    self.sources.append(cross)
                self.layers[-1].append(self._layer(layer, self.self_caches[layer.self_attn], cross))
        self.output_layers = [self._output_layer(model) for model in self.models]

    @staticmethod
    def _output_layer(model: Model) -> Callable[[Tensor], Tensor]:
        decoder = model.decoder
        if decoder.adaptive_softmax is not None or not can_pack(decoder.output_projection.weight):
            return decoder.output_layer
        return packed(decoder.output_projection)

    @staticmethod
    def _layer(layer: nn.Module, own: HostSelfAttention, cross: HostCrossAttention | None) -> LayerStep:
        if HostLayer.covers(layer):
            return HostLayer(layer, own, cross)
        state: dict = {}
        layer.self_attn.set_incremental_state(state, "attn_state", {"cache": own})
        if cross is not None:
            layer.encoder_attn.set_incremental_state(state, "attn_state", {"cache": cross})
        return layer_step(layer, state)

    @staticmethod
    def _project_source(module: PrunedMultiheadAttention, source: Tensor) -> Tensor:
        """(B, S, C) -> (B, H, 2, S, D)."""
        kv = module.project_source(source.flatten(0, 1)).unflatten(0, source.shape[:2])
        return kv.permute(0, 3, 2, 1, 4).contiguous()

    def _prefill(self, encoder_outs: list[dict] | None, prefix: Tensor, first_token: int, max_len: int) -> None:
        if prefix.size(1) > self.slots.capacity:
            self._keep(torch.empty(self.slots.n, 0, dtype=torch.int64), 2 * prefix.size(1))
        self.slots.begin_with(prefix.size(1))
        super()._prefill(encoder_outs, prefix, first_token, max_len)

    def _store_prefix(self, module: PrunedMultiheadAttention, kv: Tensor, max_len: int) -> None:
        self.self_caches[module].kv[:, :, :, : kv.size(0)] = kv.permute(1, 3, 2, 0, 4)

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

    def _shrink(self, n: int, smaller: int) -> Tensor:
        order = super()._shrink(n, smaller)
        to = (order != torch.arange(smaller)).nonzero()[:, 0]
        self.slots.move(to, order[to], smaller)
        for cache in (*self.self_caches.values(), *self.sources):
            cache.move(to, order[to])
        return order

    def _run(self, n: int, within_prefix: bool) -> None:
        steps = [self._module_step(index, layers) for index, layers in enumerate(self.layers)]
        self._step(n, within_prefix, steps)
