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
from ap_fairseq.model.cpu_linear import PackedLinear, can_pack, multiply, packed
from ap_fairseq.model.kv_cache import HostCache
from ap_fairseq.search.static_decoder import LayerStep, StaticDecoder, layer_step
from triton_ops.beam_state import BeamState

FIRST_SLOTS = 64  # of a sentence; slots are compacted, or their number doubled, when they are full
NO_HYPOTHESIS = -1


class SentenceSlots:
    """Which slots of self-attention the hypotheses of the first *n* sentences consist of, alike in all sites.

    Attributes:
        n, step, used: sentences in the batch, the step, and slots in use, which are as many for every sentence.
        position, number: int64 (B, L), the target position in every slot, and its number in `BeamState.block_table`
            there; *NO_HYPOTHESIS* in empty ones.
    """

    def __init__(self, state: BeamState, n: int):
        self.state, self.n, self.step, self.used = state, n, -1, 0
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

    def bias(self) -> Tensor:
        """Return what the attention scores of the step have added, float32 (n, 1, beam, used): 0 or -inf."""
        if self._bias is None:  # the same for all sites
            self._bias = torch.zeros(self.n, 1, self.state.beam, self.used)
            self._bias.masked_fill_(~self.consists_of()[:, None], -math.inf)
        return self._bias

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


class HostSelfAttention(HostCache):
    """Keys and values of one decoder self-attention site: (B, L, 2, H, D), by sentence and slot."""

    def __init__(self, slots: SentenceSlots, heads: int, dim: int, dtype: torch.dtype, whole: bool):
        self.slots, self.whole = slots, whole
        self.kv = torch.empty(slots.n, slots.capacity, 2, heads, dim, dtype=dtype)

    def advance(self, kv: Tensor) -> None:
        n, used, beam = self.slots.n, self.slots.used, self.slots.state.beam
        self.kv[:n, used - beam : used] = kv.unflatten(0, (n, beam))

    def step(self) -> int:
        return self.slots.step

    def n_columns(self) -> int:
        return self.slots.step + 1

    def attend_within(self, q: Tensor, keep: Tensor | None, scale: float) -> Tensor:
        slots, bias = self.slots, self.slots.bias()
        if keep is not None:
            kept = keep[:, slots.position[: slots.n, : slots.used]].transpose(0, 1)  # (n, H, used)
            bias = bias.masked_fill(~kept[:, :, None], -math.inf)
        return attend(q, self.kv[: slots.n, : slots.used], bias, scale)

    def keep(self, order: Tensor, capacity: int) -> None:
        """As `SentenceSlots.keep`."""
        kept = self.kv.new_empty(order.size(0), capacity, *self.kv.shape[2:])
        kept[:, : order.size(1)] = self.kv[torch.arange(order.size(0))[:, None], order]
        self.kv = kept

    def move(self, to: Tensor, source: Tensor) -> None:
        """As `SentenceSlots.move`."""
        self.kv[to] = self.kv[source]


class HostCrossAttention(HostCache):
    """Keys and values of one cross-attention site, (B, S, 2, H, D).

    Args:
        padding: float (B, 1, 1, S), -inf where sentences have no column and else 0; None: all have all.
    """

    def __init__(self, slots: SentenceSlots, kv: Tensor, padding: Tensor | None, lengths: Tensor, whole: bool):
        self.slots, self.kv, self.padding, self.all_lengths, self.whole = slots, kv, padding, lengths, whole

    @property
    def lengths(self) -> Tensor:
        """Tokens of each sentence in the batch, int64 (n,)."""
        return self.all_lengths[: self.slots.n]

    def advance(self, kv: None = None) -> None:
        """Nothing: the search counts the steps."""

    def step(self) -> int:
        return self.slots.step

    def n_columns(self) -> int:
        return self.kv.size(1)

    def attend_within(self, q: Tensor, keep: Tensor | None, scale: float) -> Tensor:
        bias = None if self.padding is None else self.padding[: self.slots.n]
        if keep is not None:
            bias = torch.zeros((), dtype=q.dtype) if bias is None else bias
            bias = bias.masked_fill(~keep.unsqueeze(-2), -math.inf)
        return attend(q, self.kv[: self.slots.n], bias, scale)

    def move(self, to: Tensor, source: Tensor) -> None:
        """As `SentenceSlots.move`."""
        for x in (self.kv, self.padding, self.all_lengths):
            if x is not None:
                x[to] = x[source]


def attend(q: Tensor, kv: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """Attend with q (N, H, D), of N / n hypotheses for each sentence, to kv (n, L, 2, H, D); (N, H, D)."""
    k, v = kv.permute(2, 0, 3, 1, 4)
    by_sentence = q.unflatten(0, (kv.size(0), -1)).transpose(1, 2)  # a sentence's hypotheses are queries
    bias = None if bias is None else bias.to(q.dtype)
    return F.scaled_dot_product_attention(by_sentence, k, v, bias, scale=scale).transpose(1, 2).flatten(0, 1)


class HostLayer:
    """A step of one decoder layer with its weights and caches at hand; fairseq's modules spend much of a step on calls.

    Args:
        layer: one that `covers` says so of.
        self_cache, cross_cache: of its attention; *cross_cache* is None in a decoder without cross-attention.
    """

    def __init__(self, layer: nn.Module, self_cache: HostSelfAttention, cross_cache: HostCrossAttention | None):
        attention, cross = layer.self_attn, layer.encoder_attn
        self.normalize_before, self.activation = layer.normalize_before, layer.activation_fn
        self.self_cache, self.cross_cache = self_cache, cross_cache
        self.self_attn, self.cross_attn = attention, cross
        parts = (attention.q_proj, attention.k_proj, attention.v_proj)
        self.qkv = packed(*(part.weight for part in parts)), torch.cat([part.bias for part in parts])
        self.out = prepared(attention.out_proj)
        self.norm, self.final_norm = layer.self_attn_layer_norm, layer.final_layer_norm
        if cross is not None:
            self.q, self.cross_out = prepared(cross.q_proj), prepared(cross.out_proj)
            self.cross_norm = layer.encoder_attn_layer_norm
        self.fc1, self.fc2 = prepared(layer.fc1), prepared(layer.fc2)

    @staticmethod
    def covers(layer: nn.Module) -> bool:
        """Whether a layer does nothing else than this class, and its weights can be packed."""
        dropouts = (layer.dropout_module, layer.activation_dropout_module)
        linear = [layer.fc1, layer.fc2, layer.self_attn.q_proj, layer.self_attn.out_proj]
        return (
            not any(dropout.apply_during_inference for dropout in dropouts)
            and all(type(part) in (nn.Linear, PackedLinear) for part in linear)
            and can_pack(layer.fc1.weight)
        )

    def __call__(self, x: Tensor) -> Tensor:
        x = self._residual(x, self.norm, self._attend_to_target)
        if self.cross_cache is not None:
            x = self._residual(x, self.cross_norm, self._attend_to_source)
        return self._residual(x, self.final_norm, self._feed_forward)

    def _residual(self, x: Tensor, norm: nn.LayerNorm, part: Callable[[Tensor], Tensor]) -> Tensor:
        if self.normalize_before:
            return part(normalized(x, norm)).add_(x)
        return normalized(part(x).add_(x), norm)

    def _attend_to_target(self, x: Tensor) -> Tensor:
        module, cache = self.self_attn, self.self_cache
        qkv = multiply(x, *self.qkv).view(-1, 3, module.num_heads, module.head_dim)
        cache.advance(qkv[:, 1:])
        return self._attended(module, cache, qkv[:, 0], self.out)

    def _attend_to_source(self, x: Tensor) -> Tensor:
        module = self.cross_attn
        q = multiply(x, *self.q).view(-1, module.num_heads, module.head_dim)
        return self._attended(module, self.cross_cache, q, self.cross_out)

    @staticmethod
    def _attended(module, cache, q: Tensor, out: tuple[Tensor, Tensor | None]) -> Tensor:
        return multiply(module.attend_step(q, cache).flatten(1), *out)

    def _feed_forward(self, x: Tensor) -> Tensor:
        return multiply(self.activation(multiply(x, *self.fc1)), *self.fc2)


def prepared(linear: nn.Linear) -> tuple[Tensor, Tensor | None]:
    """Return the packed weight and the bias of a layer."""
    return packed(linear.weight), linear.bias


def normalized(x: Tensor, norm: nn.LayerNorm) -> Tensor:
    return torch.layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, norm.eps)


class HostDecoder(StaticDecoder):
    """The search on a CPU: a batch is as large as its unfinished sentences are many, and its caches are its own."""

    def _allocate(self, dtype: torch.dtype, device: torch.device) -> None:
        self.kv_pools, self.projections, self.dtype = {}, {}, dtype

    def _places(self, n_sentences: int) -> int:
        return n_sentences

    def _prepare_caches(self, encoder_outs: list[dict] | None, real: Tensor, max_len: int) -> None:
        slots = self.slots = SentenceSlots(self.beams.state, real.size(0))
        padding, lengths = None, real.sum(1)
        if not real.all():
            padding = torch.zeros(real.size(0), 1, 1, real.size(1), dtype=self.dtype)
            padding.masked_fill_(~real[:, None, None], -math.inf)
        self.self_caches: dict[PrunedMultiheadAttention, HostSelfAttention] = {}
        self.cross_caches: list[HostCrossAttention] = []
        self.layers: list[list[LayerStep]] = []
        for model, encoder_out in zip(self.models, encoder_outs or [None] * len(self.models), strict=True):
            self.layers.append([])
            for index in range(len(model.decoder.layers)):
                layer, cross = model.decoder.layers[index], None
                module = layer.self_attn
                whole = module.keeps_all(max_len + 1, max_len + 1)
                own = HostSelfAttention(slots, module.num_heads, module.head_dim, self.dtype, whole)
                self.self_caches[module] = own
                if layer.encoder_attn is not None:
                    source = self._project_source(layer.encoder_attn, encoder_out["encoder_out"][0])
                    whole = layer.encoder_attn.keeps_all(max_len + 1, real.size(1))
                    cross = HostCrossAttention(slots, source, padding, lengths, whole)
                    self.cross_caches.append(cross)
                self.layers[-1].append(self._layer(layer, own, cross))

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
        """(S, B, C) -> (B, S, 2, H, D)."""
        return module.project_source(source.transpose(0, 1).flatten(0, 1)).unflatten(0, (source.size(1), -1))

    def _prefill(self, encoder_outs: list[dict] | None, prefix: Tensor, first_token: int, max_len: int) -> None:
        if prefix.size(1) > self.slots.capacity:
            self._keep(torch.empty(self.slots.n, 0, dtype=torch.int64), 2 * prefix.size(1))
        self.slots.begin_with(prefix.size(1))
        super()._prefill(encoder_outs, prefix, first_token, max_len)

    def _store_prefix(self, module: PrunedMultiheadAttention, kv: Tensor, max_len: int) -> None:
        self.self_caches[module].kv[:, : kv.size(0)] = kv.transpose(0, 1)

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
        for cache in (*self.self_caches.values(), *self.cross_caches):
            cache.move(to, order[to])
        return order

    def _run(self, n: int, within_prefix: bool) -> None:
        self._step(n, within_prefix, self.layers)
