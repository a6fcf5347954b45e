"""The caches of the search on a CPU, by sentence, which torch's attention reads.

All hypotheses of a sentence attend to the slots of all of them in one product, under a mask that says which slots a
hypothesis consists of. So nothing is copied when beams are reordered, and a slot that beams share is read once. Slots
that no hypothesis refers to any more are dropped from time to time.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ap_fairseq.model.attention import PrunedMultiheadAttention
from ap_fairseq.model.kv_cache import HostCache
from ap_fairseq.search.beams import BeamSearchState
from ap_fairseq.search.static_decoder import head_slices

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


def by_sentence(q: Tensor, n: int) -> Tensor:
    """(N, H, D), of N / n hypotheses for each sentence -> (n, H, N / n, D), a view: hypotheses are queries."""
    return q.view(n, -1, *q.shape[1:]).transpose(1, 2)


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """Attend with q (n, H, beam, D) to k and v (n, H, L, D); (n, beam, H, D), contiguous.

    Rows that *bias* hides entirely give 0: torch's attention on a CPU sees to that.
    """
    return F.scaled_dot_product_attention(q, k, v, bias, scale=scale).transpose(1, 2)
