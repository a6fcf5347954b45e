"""The KV caches of decoding: keys and values of earlier steps and of the source, and which mask row a step reads.

Keys and values lie in the slots of a pool, one slot for one position of one head, and never move:

- decoder self-attention writes every step's keys and values to fresh slots. A block table says which of a position's
  slots belongs to a hypothesis, and offsets say where the slots of a position and head begin. Reordering beams permutes
  the table, and beams with a common prefix share its slots. When the pool is full, slots are dropped that no hypothesis
  refers to any more, or whose position no later mask row of their head keeps; it grows if that frees less than half.
- cross-attention projects the encoder output once per sentence. All beams of a sentence share its slots, and neither
  padding nor columns that no mask row of a head keeps are stored.

The mask does not depend on the sentence, so the last use of a position is known ahead. Slots belong to single heads
because heads differ: in masks made from attention a local head needs the last few positions, and the union over a
layer's heads most of them.

Stock fairseq copies every cache in every step to append to it and again to reorder it, and stores the cross-attention
cache once per beam.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from ap_fairseq.files import UserError
from triton_ops import Layout, decode_attention

INITIAL_CAPACITY = 24  # positions per hypothesis that a new pool has slots for


# -- the interface ----------------------------------------------------------------------------------------------------


class KVCache(ABC):
    """The cache of one attention site, as a step of decoding uses it.

    Attributes:
        projection: stacked weight (3C, C) and bias (3C,) of q, k and v, by which self-attention projects a step in one
            product; None: by three.
    """

    projection: tuple[Tensor, Tensor] | None = None

    @abstractmethod
    def advance(self, kv: Tensor | None) -> None:
        """Begin a step; self-attention caches its keys and values *kv* (N, 2, H, D)."""


class PagedCache(KVCache):
    """A cache that the decoding kernel reads, and torch's attention once it is gathered.

    Attributes:
        selected: bool (B, H, S), the source tokens that each head may attend to; None: all.
        settled: whether tables are written at least two kernels before attention reads them (see `decode_attention`).
    """

    selected: Tensor | None = None
    settled: bool = False

    @abstractmethod
    def step(self) -> int | Tensor:
        """Return the mask row of the step: a number, or a one-element tensor if the device counts the steps."""

    @abstractmethod
    def n_columns(self) -> int:
        """Return the number of mask columns that the step sees."""

    @abstractmethod
    def layout_size(self) -> tuple[int, int]:
        """Return the rows and columns of the layout that `attend` needs, known without waiting."""

    @abstractmethod
    def attend(self, q: Tensor, layout: Layout, scale: float) -> Tensor:
        """Attend with the queries q (N, H, D) of the step, by the kernel; (N, H, D)."""

    @abstractmethod
    def dense(self, keep: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Gather keys and values (B, H, columns, D), and their lengths (B,), or None for all columns.

        B is the number of hypotheses in self-attention, and of sentences in cross-attention.

        Args:
            keep: bool (H, columns), the mask row of the step. Other cells may have no slot: they get one that exists.
        """


class HostCache(KVCache):
    """A cache that torch's attention reads as it is, on a CPU; it knows the masks."""

    @abstractmethod
    def attend(self, q: Tensor, scale: float) -> Tensor:
        """Attend with the queries q (N, H, D) of the step within the mask; (N, H, D)."""


def limit_steps(incremental_state: dict, max_steps: int) -> None:
    """Bound the steps of the search that *incremental_state* belongs to: the fewer, the more its caches can drop."""
    incremental_state["step_limit"] = {"max_steps": max_steps}


def step_limit(incremental_state: dict, default: int | None) -> int | None:
    """Return the bound that `limit_steps` set."""
    return incremental_state.get("step_limit", {}).get("max_steps", default)


def _check_step(step: int, max_steps: int | None) -> None:
    if max_steps is not None and step >= max_steps:
        raise UserError(
            f"decoding step {step} of a search of at most {max_steps} steps (--max-target-positions, or the maximum "
            "length of the batch): the caches hold nothing for it; use --task pruned_translation, or raise the former: "
            "--model-overrides \"{'max_target_positions': N}\""
        )


# -- decoder self-attention -------------------------------------------------------------------------------------------


@dataclass(eq=False)
class PagedSelfAttention(PagedCache):
    """How a step reads the slots of one decoder self-attention site.

    Attributes:
        pool: (R, 2, D), keys and values of the slots.
        block_table: int32 (N, S): position s of hypothesis n is in slot number block_table[n, s] of that position.
        offsets: int32 (H, S): slot number 0 of position s and head h is this slot of the pool.
    """

    pool: Tensor
    block_table: Tensor
    offsets: Tensor

    def n_columns(self) -> int:
        return int(self.step()) + 1  # waits for the device if that counts the steps

    def layout_size(self) -> tuple[int, int]:  # until the table grows
        return self.block_table.size(1), self.block_table.size(1)

    def attend(self, q: Tensor, layout: Layout, scale: float) -> Tensor:
        k, v = self.pool.unbind(1)
        tables = dict(block_table=self.block_table[None], cache_offsets=self.offsets)
        return decode_attention(q[None], k, v, layout, self.step(), scale=scale, settled=self.settled, **tables)[0]

    def dense(self, keep: Tensor) -> tuple[Tensor, Tensor, None]:
        slots = self.block_table[:, None, : keep.size(1)] + self.offsets[:, : keep.size(1)]
        slots = torch.where(keep, slots, slots[..., -1:]).long()  # (N, H, columns)
        k, v = self.pool[slots].unbind(3)
        return k, v, None


@dataclass(eq=False)
class SelfAttentionCache(PagedSelfAttention):
    """The cache of fairseq's search loop, which grows, and whose steps are counted on the host.

    Attributes:
        last_use: of numbers of rows and columns: the last of the rows that keeps each column, int64 (H, columns).
        max_steps: at most this many steps come; None: unknown, so that nothing is dropped that a hypothesis refers to.
        length: cached positions.
        used: slots taken so far, from the start of the pool.
    """

    last_use: Callable[[int, int], Tensor]
    max_steps: int | None
    length: int = 0
    used: int = 0

    @classmethod
    def empty_like(
        cls, kv: Tensor, last_use: Callable[[int, int], Tensor], max_steps: int | None
    ) -> SelfAttentionCache:
        """Make a cache for hypotheses with keys and values like *kv* (N, 2, H, D)."""
        n, _, heads, dim = kv.shape
        block_table, offsets = (
            torch.zeros(size, INITIAL_CAPACITY, dtype=torch.int32, device=kv.device) for size in (n, heads)
        )
        pool = kv.new_empty(n * heads * INITIAL_CAPACITY, 2, dim)
        return cls(pool, block_table, offsets, last_use, max_steps)

    def advance(self, kv: Tensor) -> None:
        _check_step(self.length, self.max_steps)
        n, _, heads, _ = kv.shape
        if self.length == self.block_table.size(1):
            self.block_table, self.offsets = (
                torch.cat([x, torch.zeros_like(x)], 1) for x in (self.block_table, self.offsets)
            )
        if self.used + n * heads > self.pool.size(0):
            self._make_room(n * heads)
        self.pool[self.used : self.used + n * heads].unflatten(0, (heads, n)).copy_(kv.permute(2, 0, 1, 3))
        self.block_table[:, self.length] = torch.arange(n, dtype=torch.int32, device=kv.device)
        begins = torch.arange(self.used, self.used + n * heads, n, dtype=torch.int32, device=kv.device)
        self.offsets[:, self.length] = begins
        self.length += 1
        self.used += n * heads

    def _make_room(self, n_new: int) -> None:
        readable = torch.ones_like(self.offsets[:, : self.length], dtype=torch.bool)
        if self.max_steps is not None:
            readable = self.last_use(self.max_steps, self.length) >= self.length
        live = renumber_live(self.block_table[:, : self.length])
        self.pool, self.used = compact(self.pool, self.offsets[:, : self.length], live, readable, n_new)

    def step(self) -> int:
        return self.length - 1

    def reorder(self, new_order: Tensor) -> None:
        """Make hypothesis i continue hypothesis new_order[i]; hypotheses that are not named leave the batch."""
        self.block_table = self.block_table.index_select(0, new_order)


@dataclass(frozen=True)
class LiveSlots:
    """The slots that hypotheses refer to, by position and by number within it.

    Attributes:
        position, number: int64 (E,), of each slot as it was numbered before.
        counts: int64 (S,), slots of each position.
    """

    position: Tensor
    number: Tensor
    counts: Tensor


def renumber_live(block_table: Tensor) -> LiveSlots:
    """Renumber *block_table* (N, S) in place, so that it uses the numbers 0, 1, ... of each position.

    One synchronisation of the host.
    """
    n, size = block_table.shape
    position = torch.arange(size, device=block_table.device)
    base = block_table.max().long() + 1 if block_table.numel() else 1
    keys, renumbered = (position * base + block_table).unique(return_inverse=True)
    counts = torch.zeros(size, dtype=torch.int64, device=block_table.device)
    counts.index_add_(0, keys // base, torch.ones_like(keys))
    block_table.copy_(renumbered - (counts.cumsum(0) - counts))
    return LiveSlots(keys // base, keys % base, counts)


def compact(
    pool: Tensor, offsets: Tensor, live: LiveSlots, readable: Tensor, n_new: int, n_steps: int | None = None
) -> tuple[Tensor, int]:
    """Move the slots that are live and readable to the start of *pool*, or of a larger one if they fill half of it.

    Args:
        offsets: int32 (H, S), changed in place; 0 for positions that lose their slots.
        readable: bool (H, S), whether a coming mask row of the head keeps the position.
        n_new: slots that the next step needs.
        n_steps: how many steps may come, each with at most as many slots; a pool never has more than they can fill.
            None: unknown.

    Returns:
        The pool, *pool* itself unless it grew, and the number of slots in use.
    """
    kept = (offsets[:, live.position] + live.number)[readable[:, live.position]]
    sizes = (readable * live.counts).flatten()
    offsets.copy_(((sizes.cumsum(0) - sizes).view_as(readable)) * readable)
    most = math.inf if n_steps is None else kept.numel() + n_steps * n_new
    if min(max(2 * kept.numel(), kept.numel() + n_new), most) <= pool.size(0):
        pool[: kept.numel()] = pool[kept]
        return pool, kept.numel()
    larger = pool.new_empty(min(2 * kept.numel() + n_new, most), *pool.shape[1:])
    torch.index_select(pool, 0, kept, out=larger[: kept.numel()])
    return larger, kept.numel()


# -- cross-attention --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SourceSlots:
    """Which source columns a cross-attention site stores, and where.

    Attributes:
        projected: int64 (P,) twice, sentence and column of those that some head stores.
        column, head: int64 (R,): slot r of the pool is head[r] of the projected column number column[r].
        starts: int64 (B, H), the first slot of each sentence and head.
        offsets: int32 (H, S): where a column comes after it.
    """

    projected: tuple[Tensor, Tensor]
    column: Tensor
    head: Tensor
    starts: Tensor
    offsets: Tensor

    @classmethod
    def from_mask(cls, stored: Tensor, real: Tensor) -> SourceSlots:
        """Lay out the columns *stored* (H, S) of sentences with tokens *real* (B, S); both bool. Synchronises."""
        cells = real[:, None] & stored  # (B, H, S)
        sentence, head, column = cells.nonzero(as_tuple=True)
        counts = cells.sum(2)
        projected = cells.any(1)
        number = projected.flatten().cumsum(0).view_as(projected) - 1
        return cls(
            projected.nonzero(as_tuple=True),
            number[sentence, column],
            head,
            (counts.flatten().cumsum(0) - counts.flatten()).view_as(counts),
            (stored.cumsum(1) - 1).clamp_min(0).to(torch.int32),
        )

    def gather(self, projected: Tensor) -> Tensor:
        """Return the slots (R, 2, D) with the keys and values (P, 2, H, D) of the projected columns."""
        return projected[self.column, :, self.head]


def group_hypotheses(new_order: Tensor, n_sentences: int, beam: int) -> tuple[Tensor | None, int]:
    """Find the sentences that the hypotheses *new_order* share, where *beam* in a row shared each of *n_sentences*.

    One synchronisation, and a few more when sentences leave or are repeated.

    Returns:
        Sentences, int64 (B,), or None if all stay in their places; and how many hypotheses in a row share each. Where
        these numbers differ, the latter is 1, and each sentence comes once for each hypothesis.
    """
    sentences = new_order // beam
    places = torch.arange(n_sentences, device=new_order.device)
    if sentences.numel() == n_sentences * beam and torch.equal(sentences, places.repeat_interleave(beam)):
        return None, beam
    distinct, sizes = sentences.unique_consecutive(return_counts=True)
    if sizes.unique().numel() != 1:
        return sentences, 1
    return None if torch.equal(distinct, places) else distinct, int(sizes[0])


def stored_columns(last_use: Tensor | None, size: int, heads: int, device: torch.device) -> Tensor:
    """Return the source columns that some mask row of a head keeps, bool (H, size). Column 0 always counts."""
    if last_use is None:
        return torch.ones(heads, size, dtype=torch.bool, device=device)
    stored = last_use[:, :size] >= 0
    stored[:, 0] = True
    return stored


@dataclass(eq=False)
class PagedCrossAttention(PagedCache):
    """How a step reads the slots of one cross-attention site.

    Attributes:
        pool: (R, 2, D), keys and values of the slots: sentence by sentence, head by head.
        starts: int64 (B, H), the first slot of each sentence and head.
        offsets: int32 (H, S), where a column comes after it.
        lengths: int64 (B,), tokens of each sentence, at most S.
    """

    pool: Tensor
    starts: Tensor
    offsets: Tensor
    lengths: Tensor

    def n_columns(self) -> int:
        return self.offsets.size(1)

    def attend(self, q: Tensor, layout: Layout, scale: float) -> Tensor:
        by_sentence = q.unflatten(0, (self.lengths.numel(), -1))
        k, v = self.pool.unbind(1)
        tables = dict(k_lengths=self.lengths, cache_starts=self.starts, cache_offsets=self.offsets)
        return decode_attention(
            by_sentence, k, v, layout, self.step(), scale=scale, settled=self.settled, **tables
        ).flatten(0, 1)

    def dense(self, keep: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        padding = torch.arange(self.n_columns(), device=self.pool.device) >= self.lengths[:, None]
        starts = self.starts[..., None]
        slots = torch.where(keep & ~padding[:, None], starts + self.offsets, starts)
        k, v = self.pool[slots].unbind(3)
        return k, v, self.lengths


@dataclass(eq=False)
class CrossAttentionCache(PagedCrossAttention):
    """The cache of fairseq's search loop, whose steps are counted on the host.

    Attributes:
        stored: bool (H, S), the columns that have a slot.
        beam: hypotheses of each sentence; they follow one another.
        max_steps: as in `SelfAttentionCache`.
        row: mask row of the step: its number, not the source length.
    """

    stored: Tensor
    beam: int
    max_steps: int | None
    row: int = -1
    # Of all columns, which serve all steps until sentences leave.
    _dense: tuple[Tensor, Tensor, Tensor | None] | None = None

    @classmethod
    def from_encoder_output(
        cls,
        project: Callable[[Tensor], Tensor],
        stored: Tensor,
        key: Tensor,
        padding: Tensor | None,
        n_hypotheses: int,
        max_steps: int | None,
    ) -> CrossAttentionCache:
        """Project the encoder output.

        Args:
            project: (R, C) -> (R, 2, H, D), keys and values.
            stored: bool (H, S), the columns that a mask row of each head keeps.
            key: encoder output (S, B, C).
            padding: bool (B, S), True = padded, on the right only; or None.
            n_hypotheses: N, a multiple of B: hypotheses b * N / B and on belong to sentence b.
        """
        size, batch, _ = key.shape
        real = torch.ones(batch, size, dtype=torch.bool, device=key.device) if padding is None else ~padding.bool()
        slots = SourceSlots.from_mask(stored, real)
        pool = slots.gather(project(key.transpose(0, 1)[slots.projected]))
        return cls(pool, slots.starts, slots.offsets, real.sum(1), stored, n_hypotheses // batch, max_steps)

    def advance(self, kv: None = None) -> None:
        self.row += 1
        _check_step(self.row, self.max_steps)

    def step(self) -> int:
        return self.row

    def layout_size(self) -> tuple[int, int]:
        return self.row + 1, self.n_columns()

    def reorder(self, new_order: Tensor) -> None:
        """Make hypothesis i continue hypothesis new_order[i], of whatever sentence."""
        sentences, self.beam = group_hypotheses(new_order, self.lengths.numel(), self.beam)
        if sentences is not None:
            self.starts, self.lengths, self._dense = self.starts[sentences], self.lengths[sentences], None
            self.selected = None if self.selected is None else self.selected[sentences]

    def dense(self, keep: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        if self._dense is None:
            k, v, lengths = super().dense(self.stored)
            whole = lengths.is_cpu and bool((lengths == self.n_columns()).all())  # a GPU would have to be waited for
            self._dense = k, v, None if whole else lengths
        return self._dense


# -- what the mask saves ----------------------------------------------------------------------------------------------


def peak_share(last_use: Iterable[Tensor]) -> tuple[int, int]:
    """Count the decoder self-attention slots that a hypothesis needs at most at a time, over all sites.

    Args:
        last_use: int64 (H, T) of each site, the last mask row that keeps each column.

    Returns:
        The largest number of (site, head, position) that a step or a later one reads, and the number of all.
    """
    alive, total = torch.zeros(0), 0
    for last in last_use:
        heads, size = last.shape
        last = last.clamp_min(torch.arange(size, device=last.device)).flatten()
        changes = torch.zeros(size + 1, dtype=torch.int64, device=last.device)
        changes[:size] = heads
        changes.index_add_(0, last + 1, -torch.ones_like(last))
        now = changes[:size].cumsum(0).cpu()
        alive = alive + now if total else now
        total += heads * size
    return int(alive.max()) if total else 0, total
