"""Cross-attention relative to a clamped, scaled diagonal.

Query i of a sentence with S source tokens has its *centre* at key c(i, S) = min(round(slope * i), S - 1): the source
position that corresponds to it where sentences grow evenly, and the last source token where they do not. The cell
(i, c + o) has the *offset* o. Each head has an *anchor*, an offset whose cell it always keeps; where that lies outside
the source, the nearest source token takes its place. So no row is empty, and a pattern in offsets continues to any
length.

The slope is a whole number of 1/65536 key positions per query position, so that every program rounds alike.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ap_fairseq.lengths import rows_by_source

SLOPE_BITS = 16  # as triton_ops.offsets, which needs torch


def slope_of(n_keys: int, n_queries: int) -> int:
    """Return the slope of a diagonal that reaches *n_keys* keys after *n_queries* queries."""
    return round(n_keys / n_queries * (1 << SLOPE_BITS))


def scaled(slope: int, row: Any) -> Any:
    """Return round(slope * row), the centre before it is clamped; *row* is a whole number, or an array or tensor."""
    return (row * slope + (1 << (SLOPE_BITS - 1))) >> SLOPE_BITS


def centre(slope: int, row: np.ndarray, length: np.ndarray) -> np.ndarray:
    """Return the key position from which offsets of query *row* count in a source of *length* tokens; int64."""
    return np.minimum(scaled(slope, row), length - 1)


@dataclass
class RelativeStats:
    """Cross-attention summed by offset.

    Attributes:
        slope: of the diagonal.
        mass: float64 (layers, heads, 2 S - 1): sum of the attention probability over the cells of each offset,
            -(S - 1) to S - 1, in the sentences that lie within the recorded range; S is the longest source.
        importance: float64, as *mass*: sum of the effect on the loss; None unless recorded.
    """

    slope: int
    mass: np.ndarray
    importance: np.ndarray | None = None

    def merge(self, other: RelativeStats) -> RelativeStats:
        """Return the sums of both, of the same slope."""
        size = max(self.mass.shape[2], other.mass.shape[2])
        sums = [widened(self.mass, size, 0) + widened(other.mass, size, 0)]
        if self.importance is not None and other.importance is not None:
            sums.append(widened(self.importance, size, 0) + widened(other.importance, size, 0))
        return RelativeStats(self.slope, *sums)


@dataclass
class RelativeMask:
    """One mask per cross-attention head over offsets.

    Attributes:
        slope: of the diagonal.
        keep: bool (layers, heads, 2 S - 1), True = kept; those of the anchors are True. Offsets outside are kept.
        anchor: int64 (layers, heads), offsets.
    """

    slope: int
    keep: np.ndarray
    anchor: np.ndarray

    def moved(self, rows: np.ndarray) -> np.ndarray:
        """Where the source's ends move an anchor to a pruned offset: bool (layers, heads, S + 1, S)."""
        keep, offset = self.grown(2 * rows.shape[1] - 1), anchored(self.anchor, rows) + rows.shape[1] - 1
        flat = np.take_along_axis(keep, offset.reshape(*keep.shape[:2], -1), 2)
        return ~flat.reshape(offset.shape)

    def kept_pairs(self, rows: np.ndarray) -> np.ndarray:
        """Count the pairs that each head keeps in rows of :func:`rows_by_centre`: int64 (layers, heads)."""
        keep = self.grown(2 * rows.shape[1] - 1)
        return (keep * offset_support(rows)).sum(2) + (self.moved(rows) * rows).sum((2, 3))

    def grown(self, size: int) -> np.ndarray:
        """Return the mask over *size* offsets, an odd number: bool (layers, heads, *size*)."""
        cut = max(0, self.keep.shape[2] - size) // 2
        return widened(self.keep[..., cut : self.keep.shape[2] - cut], size, True)

    def cells(self, n_queries: int, length: int, n_keys: int | None = None) -> np.ndarray:
        """Return the keep mask of a source of *length* tokens: bool (layers, heads, n_queries, n_keys or length)."""
        column = np.arange(length if n_keys is None else n_keys)
        offset = column - centre(self.slope, np.arange(n_queries), np.int64(length))[:, None]
        widest = int(np.abs(offset).max(initial=0))
        kept = self.grown(2 * widest + 1)[..., offset + widest]
        anchor = (column[0] - offset[:, 0] + self.anchor[..., None]).clip(0, length - 1)  # (layers, heads, n_queries)
        return kept | (column == anchor[..., None])


def anchored(anchor: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Return the offset that each row of each head keeps: its anchor, or the nearest one within the source.

    Args:
        anchor: int64 (layers, heads), offsets.
        rows: of :func:`rows_by_centre`.

    Returns:
        int64 (layers, heads, S + 1, S).
    """
    size, middle = np.indices(rows.shape)
    return (middle + anchor[..., None, None]).clip(0, np.maximum(size - 1, 0)) - middle


def choose_anchors(score: np.ndarray, most: int) -> np.ndarray:
    """Give each head its best offset that fewer than *most* heads with higher scores have taken.

    Where there are too few offsets for that, more heads share one.

    Args:
        score: float64 (heads, 2 S - 1).

    Returns:
        int64 (heads,), offsets.
    """
    heads, n_offsets = score.shape
    most = max(most, -(-heads // n_offsets))
    anchor = np.full(heads, n_offsets)
    taken = np.zeros(n_offsets, dtype=np.int64)
    for place in np.argsort(-score, axis=None, kind="stable"):
        head, offset = divmod(int(place), n_offsets)
        if anchor[head] == n_offsets and taken[offset] < most:
            anchor[head] = offset
            taken[offset] += 1
    return anchor - n_offsets // 2


def widened(offsets: np.ndarray, size: int, value: float) -> np.ndarray:
    """Pad an array over offsets (..., 2 S - 1) on both sides to (..., *size*)."""
    margin = (size - offsets.shape[-1]) // 2
    return np.pad(offsets, [(0, 0)] * (offsets.ndim - 1) + [(margin, margin)], constant_values=value)


def rows_by_centre(lengths: np.ndarray, slope: int) -> np.ndarray:
    """Count the query rows of all sentences by source length and centre.

    Args:
        lengths: int64 (n, 3): target length, source length, number of sentences.

    Returns:
        int64 (S + 1, S): [s, c] is the number of rows of sentences with s source tokens whose centre is c.
    """
    by_source = rows_by_source(lengths)
    row, size = np.indices(by_source.shape)
    rows = np.zeros((by_source.shape[1], max(by_source.shape[1] - 1, 1)), dtype=np.int64)
    np.add.at(rows, (size, np.maximum(centre(slope, row, size), 0)), by_source)
    return rows


def offset_support(rows: np.ndarray) -> np.ndarray:
    """Count the pairs of each offset, from :func:`rows_by_centre`: int64 (2 S - 1,)."""
    longest = rows.shape[1]
    size, middle = np.indices(rows.shape)
    changes = np.zeros(2 * longest, dtype=np.int64)
    np.add.at(changes, longest - 1 - middle, rows)  # a row with centre c has the offsets -c ... s - 1 - c
    np.add.at(changes, (longest - 1 + size - middle).clip(0), -rows)
    return changes.cumsum()[:-1]


def kept_in_row(keep: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Count the kept cells of a row: int64 (layers, heads, S + 1, S) for each source length and centre of *rows*.

    Args:
        keep: bool (layers, heads, 2 S - 1), as wide as the sources of *rows* need.
    """
    sums = np.pad(keep.cumsum(-1), [(0, 0), (0, 0), (1, 0)])
    size, middle = np.indices(rows.shape)
    origin = keep.shape[2] // 2
    return sums[..., (origin + size - middle).clip(0)] - sums[..., origin - middle]
