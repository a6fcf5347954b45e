"""Offsets from a clamped, scaled diagonal -> what the kernels read: one table for sentences of all lengths.

Query i of a sentence of S keys has its *centre* at key c = min(round(slope · i), S - 1), and cell (i, c + o) has the
*offset* o. A head keeps a set of offsets, and in every row one cell whatever the length: that of its *anchor*, an
offset, moved to the nearest key where it lies outside the sentence. So no row is empty.

A row of the mask is a window of the table of offsets that begins at offset -c. The kernels read it as they read packed
cells: word x holds the offsets from x - k_size on, so a query's centre says where its words begin, and all else is the
same.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from .layout import WORD, Layout, RowLists, list_rows, pack_cells

SLOPE_BITS = 16  # the slope is a whole number of 1/65536 keys per query, so that all programs round alike


@dataclass(eq=False)
class OffsetLayout(Layout):
    """Which offsets of a cross-attention site are computed, per head; of sentences of at most k_size keys.

    Build it with `from_offsets`. The lengths of the keys (`k_lengths`) say where the diagonal is clamped. Where a call
    gives none, all sentences have as many keys as there are.

    words: (M, k_size / 16, 32) int32. Word x of a head, in reading order, holds offsets x - k_size to x - k_size + 31.
    k_size: a multiple of 32.
    slope: of the diagonal, in 1 / 2^SLOPE_BITS keys per query.
    anchor: (M,) int32, an offset that each head keeps.
    keep: (M, 2 k_size) bool, True = kept: the offsets from -k_size on.
    """

    words: Tensor
    k_size: int
    slope: int
    anchor: Tensor
    keep: Tensor
    q_size: int = 2**31 - 1  # a pattern continues to any length
    tile: tuple[int, int] = (64, 64)
    row_group: int = 1

    @classmethod
    @torch.inference_mode(False)  # may be saved for backward
    def from_offsets(cls, keep: Tensor, slope: int, anchor: Tensor, k_size: int) -> OffsetLayout:
        """Build from a mask of offsets (heads or 1, 2 R + 1), bool, True = kept, from offset -R to R.

        slope: as above, 0 or more.
        anchor: (heads or 1,) integers, each an offset that its head keeps.
        k_size: keys that the layout covers at least. Offsets beyond R are kept.
        Raises TypeError for a mask that is not bool, ValueError for shapes, a slope or anchors that do not fit.
        """
        if keep.dtype != torch.bool:
            raise TypeError(f"mask of offsets must be torch.bool (True = kept), got {keep.dtype}; use keep != 0")
        if keep.dim() != 2 or keep.size(0) < 1 or keep.size(1) % 2 == 0:
            raise ValueError(f"mask of offsets must be (heads or 1, 2 R + 1), got {tuple(keep.shape)}")
        if anchor.shape != keep.shape[:1] or slope < 0 or k_size < 1:
            raise ValueError(
                f"anchor must be ({keep.size(0)},), slope at least 0 and k_size at least 1, got {tuple(anchor.shape)}, "
                f"{slope} and {k_size}"
            )
        reach = keep.size(1) // 2
        place = anchor.long()[:, None] + reach
        if not bool(((place >= 0) & (place <= 2 * reach)).all() and keep.gather(1, place).all()):
            raise ValueError(f"anchors must be offsets that their heads keep, got {anchor.tolist()}")
        k_size = -(-k_size // WORD) * WORD
        table = pad(keep, (k_size - reach, k_size - reach - 1), value=True)  # negative: cut
        words = pack_cells(pad(table, (0, WORD - 1), value=True).unfold(1, WORD, 1))
        return cls(words.view(keep.size(0), -1, WORD), k_size, slope, anchor.to(torch.int32), table)

    @torch.inference_mode(False)
    def to(self, device) -> OffsetLayout:
        """The same layout on another device (itself when it is there already)."""
        if self.words.device == torch.device(device):
            return self
        words, anchor, keep = (x.to(device) for x in (self.words, self.anchor, self.keep))
        return OffsetLayout(words, self.k_size, self.slope, anchor, keep)

    def tables(self, training: bool) -> list[Tensor]:
        """Placeholders, as the kernels look at the words of every tile (torch's opcheck cannot clone empty tensors)."""
        return [self.words[:, :1, :1]] * (4 if training else 2)

    @torch.inference_mode(False)
    def row_lists(self) -> RowLists:
        """Kept offsets of each head, as columns of `keep`, in one row (decode). One host synchronisation, once."""
        if self._row_lists is None:
            self._row_lists = list_rows(self.keep[:, None])
        return self._row_lists

    def cells(self, rows: Tensor, k_size: int, k_lengths: Tensor | None) -> Tensor:
        """What is kept in query `rows` (R,), int64: bool (B, M, R, k_size), True = kept; B is 1 without `k_lengths`."""
        lengths = rows.new_full((1,), k_size) if k_lengths is None else k_lengths.long()
        last = (lengths - 1).clamp_min(0)[:, None]  # (B, 1)
        scaled = (rows * self.slope + (1 << SLOPE_BITS - 1)) >> SLOPE_BITS
        centre = torch.minimum(scaled, last)  # (B, R)
        key = torch.arange(k_size, device=rows.device)
        kept = self.keep[:, key - centre[..., None] + self.k_size].transpose(0, 1)
        anchor = torch.minimum((centre[:, None] + self.anchor[:, None]).clamp_min(0), last[..., None])  # (B, M, R)
        return kept | (key == anchor[..., None])

    def keep_mask(self, q_size: int, k_size: int, k_lengths: Tensor | None = None) -> Tensor:
        """The first `q_size` rows as `cells` gives them."""
        return self.cells(torch.arange(q_size, device=self.device), k_size, k_lengths)

    def keep_row(self, step: Tensor, k_size: int, k_lengths: Tensor | None = None) -> Tensor:
        """Row `step` (one-element tensor): (B, M, k_size) bool."""
        return self.cells(step.reshape(1).long(), k_size, k_lengths)[:, :, 0]
