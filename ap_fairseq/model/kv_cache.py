"""Incremental state of pruned attention: what decoding caches, and which mask row a step reads.

Both caches are pools of rows, one row for one position of one head of one hypothesis or sentence, that never move:

- decoder self-attention writes every step's keys and values to fresh rows; a table says which of a position's rows a
  hypothesis consists of, and offsets where the rows of a position and head begin. Reordering beams permutes the table,
  and beams with a common prefix share its rows. When the pool is full, rows are dropped that no hypothesis refers to
  any more, or whose position no later mask row of their head keeps; it grows if that frees less than half of it.
- cross-attention projects the encoder output once per sentence, but for source columns that no mask row keeps; all
  beams of a sentence share its rows, and neither padding is stored nor what the mask of a head never reads.

The mask does not depend on the sentence, so what dies is known ahead. Rows belong to single heads because heads differ:
in masks made from attention a local head needs the last few positions, and the union over a layer's heads most of them.

Stock fairseq copies every cache in every step to append to it and again to reorder it, and stores the cross-attention
cache once per beam.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from triton_ops import AttentionLayout, decode_attention

INITIAL_CAPACITY = 24  # positions per hypothesis that a new pool has rows for


# -- decoder self-attention -------------------------------------------------------------------------------------------


@dataclass(eq=False)
class SelfAttentionCache:
    """Keys and values of one decoder self-attention site.

    Attributes:
        pool: (R, 2, D), keys and values.
        rows: int32 (N, S): hypothesis n consists of row number rows[n, s] of each position s < length.
        offsets: int32 (H, S): row number 0 of position s and head h is this row of the pool.
        last_use: returns the last mask row that keeps each of the first S columns, int64 (H, S), for an S; None if all
            may be kept for ever.
        length: cached positions, so the mask row of the next step.
        used: rows taken so far, from the start of the pool.
    """

    pool: Tensor
    rows: Tensor
    offsets: Tensor
    last_use: Callable[[int], Tensor] | None = None
    length: int = 0
    used: int = 0

    @classmethod
    def empty_like(cls, kv: Tensor, last_use: Callable[[int], Tensor] | None) -> SelfAttentionCache:
        """Make a cache for hypotheses with keys and values like *kv* (N, 2, H, D)."""
        n, _, heads, dim = kv.shape
        rows, offsets = (
            torch.zeros(size, INITIAL_CAPACITY, dtype=torch.int32, device=kv.device) for size in (n, heads)
        )
        return cls(kv.new_empty(n * heads * INITIAL_CAPACITY, 2, dim), rows, offsets, last_use)

    def append(self, kv: Tensor) -> None:
        """Cache this step's keys and values (N, 2, H, D)."""
        n, _, heads, _ = kv.shape
        if self.length == self.rows.size(1):
            self.rows, self.offsets = (torch.cat([x, torch.zeros_like(x)], 1) for x in (self.rows, self.offsets))
        if self.used + n * heads > self.pool.size(0):
            self._make_room(n * heads)
        self.pool[self.used : self.used + n * heads].unflatten(0, (heads, n)).copy_(kv.permute(2, 0, 1, 3))
        self.rows[:, self.length] = torch.arange(n, dtype=torch.int32, device=kv.device)
        begins = torch.arange(self.used, self.used + n * heads, n, dtype=torch.int32, device=kv.device)
        self.offsets[:, self.length] = begins
        self.length += 1
        self.used += n * heads

    def _make_room(self, n_new: int) -> None:
        readable = torch.ones_like(self.offsets[:, : self.length], dtype=torch.bool)
        if self.last_use is not None:
            readable = self.last_use(self.length) >= self.length
        live = renumber_live(self.rows[:, : self.length])
        self.pool, self.used = compact(self.pool, self.offsets[:, : self.length], live, readable, n_new)

    def reorder(self, new_order: Tensor) -> None:
        """Make hypothesis i continue hypothesis new_order[i]; hypotheses that are not named leave the batch."""
        self.rows = self.rows.index_select(0, new_order)

    @property
    def row(self) -> int:
        """Mask row of the position that was appended last."""
        return self.length - 1

    @property
    def size(self) -> int:
        """Columns of the mask that this step sees."""
        return int(self.row) + 1

    @property
    def extent(self) -> tuple[int, int]:
        """Rows and columns of the mask that steps ask for before the table grows."""
        return self.rows.size(1), self.rows.size(1)

    def attend(self, q: Tensor, layout: AttentionLayout, scale: float) -> Tensor:
        """Attend with the queries q (N, H, D) of this step, by the kernel; (N, H, D)."""
        k, v = self.pool.unbind(1)
        tables = dict(cache_rows=self.rows[None], cache_offsets=self.offsets)
        return decode_attention(q[None], k, v, layout, self.row, scale=scale, **tables)[0]

    def dense(self, keep: Tensor) -> tuple[Tensor, Tensor, None]:
        """Gather keys and values (N, H, size, D); there is no padding.

        Args:
            keep: bool (H, size), the mask row of this step. Other cells may have no row: they get one that exists.
        """
        rows = self.rows[:, None, : keep.size(1)] + self.offsets[:, : keep.size(1)]
        rows = torch.where(keep, rows, rows[..., -1:]).long()  # (N, H, size)
        k, v = self.pool[rows].unbind(3)
        return k, v, None


@dataclass(frozen=True)
class LiveRows:
    """The rows that hypotheses refer to, by position and by number within it.

    Attributes:
        position, number: int64 (E,), of each row as it was numbered before.
        counts: int64 (S,), rows of each position.
    """

    position: Tensor
    number: Tensor
    counts: Tensor


def renumber_live(rows: Tensor) -> LiveRows:
    """Renumber the table *rows* (N, S) in place, so that it uses the numbers 0, 1, ... of each position.

    One synchronisation of the host.
    """
    n, size = rows.shape
    position = torch.arange(size, device=rows.device)
    base = rows.max().long() + 1 if rows.numel() else 1
    keys, renumbered = (position * base + rows).unique(return_inverse=True)
    counts = torch.zeros(size, dtype=torch.int64, device=rows.device)
    counts.index_add_(0, keys // base, torch.ones_like(keys))
    rows.copy_(renumbered - (counts.cumsum(0) - counts))
    return LiveRows(keys // base, keys % base, counts)


def compact(
    pool: Tensor, offsets: Tensor, live: LiveRows, readable: Tensor, n_new: int, n_steps: int | None = None
) -> tuple[Tensor, int]:
    """Move the rows that are live and readable to the start of *pool*, or of a larger one if they fill half of it.

    Args:
        offsets: int32 (H, S), changed in place; 0 for positions that lose their rows.
        readable: bool (H, S), whether a coming mask row of the head keeps the position.
        n_new: rows that the next step needs.
        n_steps: how many steps may come, each with at most as many rows; a pool never has more than they can fill.

    Returns:
        The pool, *pool* itself unless it grew, and the number of rows in use.
    """
    kept = (offsets[:, live.position] + live.number)[readable[:, live.position]]
    sizes = (readable * live.counts).flatten()
    offsets.copy_(((sizes.cumsum(0) - sizes).view_as(readable)) * readable)
    most = math.inf if n_steps is None else kept.numel() + n_steps * n_new
    if min(2 * kept.numel(), most) <= pool.size(0):
        pool[: kept.numel()] = pool[kept]
        return pool, kept.numel()
    larger = pool.new_empty(min(2 * kept.numel() + n_new, most), *pool.shape[1:])
    torch.index_select(pool, 0, kept, out=larger[: kept.numel()])
    return larger, kept.numel()


# -- cross-attention --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SourceRows:
    """Which source columns a cross-attention site stores, and where.

    Attributes:
        projected: int64 (P,) twice, sentence and column of those that some head stores.
        row, head: int64 (R,): row r of the pool is head[r] of the projected column number row[r].
        starts: int64 (B, H), the first row of each sentence and head.
        offsets: int32 (H, S): where a column comes after it.
    """

    projected: tuple[Tensor, Tensor]
    row: Tensor
    head: Tensor
    starts: Tensor
    offsets: Tensor

    @classmethod
    def of_mask(cls, stored: Tensor, real: Tensor) -> SourceRows:
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

    def pool(self, projected: Tensor) -> Tensor:
        """Lay out keys and values (P, 2, H, D) of the projected columns as a pool (R, 2, D)."""
        return projected[self.row, :, self.head]


def stored_columns(last_use: Tensor | None, size: int, heads: int, device: torch.device) -> Tensor:
    """Return the source columns that some mask row of a head keeps, bool (H, size). Column 0 always counts."""
    if last_use is None:
        return torch.ones(heads, size, dtype=torch.bool, device=device)
    stored = last_use[:, :size] >= 0
    stored[:, 0] = True
    return stored


@dataclass(eq=False)
class CrossAttentionCache:
    """Keys and values of one cross-attention site.

    Attributes:
        pool: (R, 2, D), keys and values of the stored columns: sentence by sentence, head by head.
        starts: int64 (B, H), the first row of each sentence and head.
        offsets: int32 (H, S), where a column comes after it.
        lengths: int64 (B,), tokens of each sentence.
        size: at least the longest length.
        row: mask row of the step: its number, counted from 0. (The authors' code used the source length here, one
            wrong row for every step.)
        stored: bool (H, S), the columns that have a row; None if that is not known, as where the pool is shared.
    """

    pool: Tensor
    starts: Tensor
    offsets: Tensor
    lengths: Tensor
    size: int
    row: int = -1
    beam: int = 1
    stored: Tensor | None = None
    _dense: tuple[Tensor, Tensor, Tensor] | None = None  # what `dense` returns, until sentences leave

    @classmethod
    def of_encoder_output(
        cls,
        project: Callable[[Tensor], Tensor],
        stored: Tensor,
        key: Tensor,
        padding: Tensor | None,
        n_hypotheses: int,
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
        rows = SourceRows.of_mask(stored, real)
        pool = rows.pool(project(key.transpose(0, 1)[rows.projected]))
        return cls(pool, rows.starts, rows.offsets, real.sum(1), size, beam=n_hypotheses // batch, stored=stored)

    def advance(self) -> None:
        """Begin a step."""
        self.row += 1

    @property
    def extent(self) -> tuple[int, int]:
        """Rows and columns of the mask that this step asks for."""
        return self.row + 1, self.size

    def reorder(self, new_order: Tensor) -> None:
        """Keep the sentences of the hypotheses *new_order*; the *beam* hypotheses of a sentence stay together."""
        if self.beam == 1 or new_order.numel() != self.lengths.numel() * self.beam:
            sentences = new_order[:: self.beam] // self.beam
            self.starts, self.lengths, self._dense = self.starts[sentences], self.lengths[sentences], None

    def attend(self, q: Tensor, layout: AttentionLayout, scale: float) -> Tensor:
        """Attend with the queries q (N, H, D) of this step, by the kernel; (N, H, D)."""
        by_sentence = q.unflatten(0, (self.lengths.numel(), -1))
        k, v = self.pool.unbind(1)
        tables = dict(k_lengths=self.lengths, cache_starts=self.starts, cache_offsets=self.offsets)
        return decode_attention(by_sentence, k, v, layout, self.row, scale=scale, **tables).flatten(0, 1)

    def dense(self, keep: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Gather keys and values (B, H, size, D), and their padding (B, size), True = padded.

        Args:
            keep: bool (H, size), the mask row of this step. Other cells may have no row: they get one that exists.
        """
        if self._dense is not None:
            return self._dense
        padding = torch.arange(self.size, device=self.pool.device) >= self.lengths[:, None]
        starts, exists = self.starts[..., None], keep if self.stored is None else self.stored
        rows = torch.where(exists & ~padding[:, None], starts + self.offsets[:, : self.size], starts)
        k, v = self.pool[rows].unbind(3)
        if self.stored is not None:  # then they serve all steps
            self._dense = k, v, padding
        return k, v, padding


# -- what the mask saves ----------------------------------------------------------------------------------------------


def peak_share(last_use: Iterable[Tensor]) -> tuple[int, int]:
    """How much of its decoder self-attention caches a hypothesis needs at most at a time, over all sites.

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
