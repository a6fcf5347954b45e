"""Incremental state of pruned attention: what decoding caches, and which mask row a step reads.

Both caches are pools of rows, one row for one position of one hypothesis or sentence, that never move:

- decoder self-attention writes every step's keys and values to fresh rows; a table says which rows a hypothesis
  consists of. Reordering beams permutes the table, and beams with a common prefix share its rows. When the pool is
  full, rows that no hypothesis refers to any more are dropped, and it grows if that frees less than half of it.
- cross-attention projects the encoder output once per sentence; all beams of a sentence share its rows, and padding
  is not stored.

Stock fairseq copies every cache in every step to append to it and again to reorder it, and stores the cross-attention
cache once per beam.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from triton_ops import AttentionLayout, decode_attention

FIRST_CAPACITY = 32  # positions per hypothesis before a pool is compacted or grows for the first time


@dataclass(eq=False)
class SelfAttentionCache:
    """Keys and values of one decoder self-attention site.

    Attributes:
        pool: (R, 2, H, D), keys and values.
        rows: int32 (N, S), the pool row of position s of hypothesis n, for s < length.
        length: cached positions, so the mask row of the next step.
        used: rows taken so far, from the start of the pool.
    """

    pool: Tensor
    rows: Tensor
    length: int = 0
    used: int = 0

    @classmethod
    def empty_like(cls, kv: Tensor) -> SelfAttentionCache:
        """Make a cache for hypotheses with keys and values like *kv* (N, 2, H, D)."""
        pool = kv.new_empty(kv.size(0) * FIRST_CAPACITY, *kv.shape[1:])
        return cls(pool, torch.zeros(kv.size(0), FIRST_CAPACITY, dtype=torch.int32, device=kv.device))

    def append(self, kv: Tensor) -> None:
        """Cache this step's keys and values (N, 2, H, D)."""
        n = kv.size(0)
        if self.length == self.rows.size(1):
            self.rows = torch.cat([self.rows, torch.zeros_like(self.rows)], 1)
        if self.used + n > self.pool.size(0):
            live = drop_dead_rows(self.rows[:, : self.length])
            capacity = max(self.pool.size(0), 2 * live.numel() + n)
            self.pool, self.used = keep_rows(self.pool, live, capacity), live.numel()
        self.pool[self.used : self.used + n] = kv
        self.rows[:, self.length] = torch.arange(self.used, self.used + n, dtype=torch.int32, device=kv.device)
        self.length += 1
        self.used += n

    def reorder(self, new_order: Tensor) -> None:
        """Make hypothesis i continue hypothesis new_order[i]; hypotheses that are not named leave the batch."""
        self.rows = self.rows.index_select(0, new_order)

    @property
    def row(self) -> int:
        """Mask row of the position that was appended last."""
        return self.length - 1

    @property
    def extent(self) -> tuple[int, int]:
        """Rows and columns of the mask that steps ask for before the table grows."""
        return self.rows.size(1), self.rows.size(1)

    def attend(self, q: Tensor, layout: AttentionLayout, scale: float) -> Tensor:
        """Attend with the queries q (N, H, D) of this step, by the kernel; (N, H, D)."""
        k, v = self.pool.unbind(1)
        return decode_attention(q[None], k, v, layout, self.row, cache_rows=self.rows[None], scale=scale)[0]

    def dense(self) -> tuple[Tensor, Tensor, None]:
        """Gather keys and values (N, H, length, D); there is no padding."""
        k, v = self.pool[self.rows[:, : self.length].long()].permute(2, 0, 3, 1, 4)
        return k, v, None


def drop_dead_rows(rows: Tensor) -> Tensor:
    """Renumber the table *rows* in place so that it uses the first pool rows only.

    Returns:
        int64, the old numbers of the new rows 0, 1, ...
    """
    live, renumbered = rows.unique(return_inverse=True)
    rows.copy_(renumbered)
    return live.long()


def keep_rows(pool: Tensor, live: Tensor, capacity: int) -> Tensor:
    """Move the rows *live* of *pool* to its start, or to that of a larger one if it has less than *capacity* rows."""
    kept = pool[live]
    if capacity > pool.size(0):
        pool = pool.new_empty(capacity, *pool.shape[1:])
    pool[: live.numel()] = kept
    return pool


@dataclass(eq=False)
class CrossAttentionCache:
    """Keys and values of one cross-attention site.

    Attributes:
        pool: (R, 2, H, D), keys and values of all sentences, one after the other, without padding.
        starts: int64 (B,), the first row of each sentence.
        lengths: int64 (B,), its number of rows.
        size: at least the longest length.
        row: mask row of the step: its number, counted from 0. (The authors' code used the source length here, one
            wrong row for every step.)
    """

    pool: Tensor
    starts: Tensor
    lengths: Tensor
    size: int
    row: int = -1
    beam: int = 1

    @classmethod
    def of_encoder_output(
        cls, project: Callable[[Tensor], Tensor], key: Tensor, padding: Tensor | None, n_hypotheses: int
    ) -> CrossAttentionCache:
        """Project the encoder output.

        Args:
            project: (R, C) -> (R, 2, H, D), keys and values.
            key: encoder output (S, B, C).
            padding: bool (B, S), True = padded, on the right only; or None.
            n_hypotheses: N, a multiple of B: hypotheses b * N / B and on belong to sentence b.
        """
        size, batch, _ = key.shape
        if padding is None:
            real, lengths = key.transpose(0, 1).flatten(0, 1), torch.full((batch,), size, device=key.device)
        else:
            padding = padding.bool()
            real, lengths = key.transpose(0, 1)[~padding], size - padding.sum(1)
        return cls(project(real), lengths.cumsum(0) - lengths, lengths, size, beam=n_hypotheses // batch)

    def advance(self) -> None:
        """Begin a step."""
        self.row += 1

    @property
    def extent(self) -> tuple[int, int]:
        """Rows and columns of the mask that this step asks for."""
        return self.row + 1, self.size

    def reorder(self, new_order: Tensor) -> None:
        """Keep the sentences of the hypotheses *new_order*; the *beam* hypotheses of a sentence stay together."""
        if self.beam == 1 or new_order.numel() != self.starts.numel() * self.beam:
            sentences = new_order[:: self.beam] // self.beam
            self.starts, self.lengths = self.starts[sentences], self.lengths[sentences]

    def attend(self, q: Tensor, layout: AttentionLayout, scale: float) -> Tensor:
        """Attend with the queries q (N, H, D) of this step, by the kernel; (N, H, D)."""
        by_sentence = q.unflatten(0, (self.starts.numel(), -1))
        k, v = self.pool.unbind(1)
        tables = dict(k_lengths=self.lengths, cache_starts=self.starts)
        return decode_attention(by_sentence, k, v, layout, self.row, scale=scale, **tables).flatten(0, 1)

    def dense(self) -> tuple[Tensor, Tensor, Tensor]:
        """Gather keys and values (B, H, S, D), and their padding (B, S), True = padded."""
        position = torch.arange(self.size, device=self.pool.device)
        padding = position >= self.lengths[:, None]
        index = (self.starts[:, None] + position).clamp_max(self.pool.size(0) - 1)
        k, v = self.pool[index].permute(2, 0, 3, 1, 4)
        return k, v, padding
