"""The arguments of the attention operators other than q, k and v."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

from torch import Tensor

from .config import precision
from .launch import Launch, epoch, kept
from .layout import TileTable, key_tile
from .primitives import LOG2E
from .reference import DROPOUT_RESOLUTION, dropout_threshold


class Call(NamedTuple):
    """The arguments of the operators in `ops.py` that say how to attend, checked and in their order, and `alike`.

    words, row_shift, tile_q, tile_k: as in `layout.AttentionLayout`.
    tables: entries and counts of the query table, then of the key table where a gradient is wanted; none where the
        sentence kernels run.
    q_lengths, k_lengths: (B,) or None.
    seed: int64 (1,); None without dropout.
    slope, anchor: as in `layout.Layout`.
    alike: launches of calls that differ in nothing but addresses from this one; None: look for them by all the rest.
        Not an argument of the operators.
    """

    words: Tensor
    row_shift: int
    tables: list[Tensor]
    tile_q: int
    tile_k: int
    q_lengths: Tensor | None
    k_lengths: Tensor | None
    seed: Tensor | None
    dropout_p: float
    scale: float
    slope: int = 0
    anchor: Tensor | None = None
    alike: dict[Hashable, list[Launch]] | None = None

    def on(self, q_lengths: Tensor | None, k_lengths: Tensor | None, seed: Tensor | None) -> Call:
        """Return this call with other tensors of the same kinds."""
        # By hand, once in every call: `_replace` takes half as long again.
        words, row_shift, tables, tile_q, tile_k, _, _, _, dropout_p, scale, slope, anchor, alike = self
        mask, tensors = (words, row_shift, tables, tile_q, tile_k), (q_lengths, k_lengths, seed)
        return Call(*mask, *tensors, dropout_p, scale, slope, anchor, alike)

    def operands(self) -> tuple:
        """Return the arguments of the operators."""
        return self[:-1]

    def query_table(self) -> TileTable:
        return TileTable(self.tables[0], self.tables[1], self.tile_q, self.tile_k)

    def key_table(self) -> TileTable:
        rows, cols = key_tile((self.tile_q, self.tile_k))
        return TileTable(self.tables[2], self.tables[3], cols, rows)

    def launches(
        self, kernel: tuple[Hashable, ...], build: Callable[[], list[Launch]], q: Tensor, k: Tensor, v: Tensor, *others
    ) -> list[Launch]:
        """Return what launches a kernel on such tensors: `build()`, kept for this call's `alike` and for other layouts.

        kernel: its name, and what else `build` looks at beside sizes, strides and types.
        others: further tensors whose sizes follow from those of q, k and v.
        """
        # Of calls that are alike, too: hooks of autograd may give the backward pass copies that are laid out otherwise.
        strides = [x.stride() for x in (q, k, v, *others)]
        key = (*kernel, epoch(), precision(q.dtype), *strides)
        found = None if self.alike is None else self.alike.get(key)
        if found is None:
            found = kept((*key, *self._description(q, k, v)), build)
            if self.alike is not None:
                self.alike[key] = found
        return found

    def _description(self, *inputs: Tensor) -> tuple[Hashable, ...]:
        """Return all that launches depend on but addresses."""
        lengths = [None if x is None else x.dtype for x in (self.q_lengths, self.k_lengths)]
        shapes = [x.shape for x in (self.words, *self.tables)]
        kinds = [(x.shape, x.stride(), x.dtype, x.device) for x in inputs]
        numbers = self.row_shift, self.tile_q, self.tile_k, self.seed is None, self.dropout_p, self.scale
        return *kinds, *shapes, *lengths, *numbers, self.slope, self.anchor is None

    def tensors(self) -> dict[str, Tensor | None]:
        """Return the tensors that all forward and backward kernels take, by the names of `primitives.py`."""
        return dict(p_q_lengths=self.q_lengths, p_k_lengths=self.k_lengths, p_seed=self.seed, p_anchor=self.anchor)

    def numbers(self) -> dict[str, Any]:
        """Return the numbers that all of them take."""
        mask_heads, n_words, word_rows = self.words.shape
        threshold = dropout_threshold(self.dropout_p)
        return dict(
            MH=mask_heads,
            KW=n_words,
            LQ=word_rows,
            RS=self.row_shift,
            SLOPE=self.slope,
            scale_log2=self.scale * LOG2E.value,
            threshold=threshold,
            inverse_keep=1.0 / (1.0 - threshold / DROPOUT_RESOLUTION),  # 1 / (1 - p) with p as the threshold has it
            DROPOUT=self.seed is not None,
        )
