"""The arguments of the attention operators other than q, k and v."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from .layout import TileTable
from .primitives import LOG2E
from .reference import DROPOUT_RESOLUTION, dropout_threshold


class Call(NamedTuple):
    """The arguments of the operators in `ops.py` that say how to attend, checked and in their order.

    words, row_shift, tile: as in `layout.AttentionLayout`.
    tables: entries and counts of the query table, then of the key table where a gradient is wanted; none where the
        sentence kernels run.
    q_lengths, k_lengths: (B,) or None.
    seed: int64 (1,); None without dropout.
    """

    words: Tensor
    row_shift: int
    tables: list[Tensor]
    tile: int
    q_lengths: Tensor | None
    k_lengths: Tensor | None
    seed: Tensor | None
    dropout_p: float
    scale: float

    def query_table(self) -> TileTable:
        return TileTable(self.tables[0], self.tables[1], self.tile)

    def key_table(self) -> TileTable:
        return TileTable(self.tables[2], self.tables[3], self.tile)

    def kernel_arguments(self) -> dict[str, Any]:
        """Return what all forward and backward kernels take, by the names of `primitives.py`."""
        mask_heads, n_words, word_rows = self.words.shape
        threshold = dropout_threshold(self.dropout_p)
        return dict(
            p_words=self.words,
            MH=mask_heads,
            KW=n_words,
            LQ=word_rows,
            RS=self.row_shift,
            p_q_lengths=self.q_lengths,
            p_k_lengths=self.k_lengths,
            p_seed=self.seed,
            scale_log2=self.scale * LOG2E.value,
            threshold=threshold,
            inverse_keep=1.0 / (1.0 - threshold / DROPOUT_RESOLUTION),  # 1 / (1 - p) with p as the threshold has it
            DROPOUT=self.seed is not None,
        )
