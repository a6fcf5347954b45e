"""Keep mask -> what the kernels read: bit-packed cells, tile lists, per-row column lists.

A *cell* is one (query position, key position) of one head; the keep mask says which cells are
computed (True = kept). A *tile* is the rectangle that a kernel handles at once: it is skipped
(no kept cell), full (all kept) or partial. Everything here is built with torch operations on the
device of the mask, once per attention site.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

WORD = 32  # cells per packed word
TILE_SIZES = (16, 32, 64, 128)
# Queries by keys. In the flat ones many queries share each gathered key.
TILES = ((16, 16), (32, 32), (64, 64), (128, 128), (64, 16), (128, 16), (64, 1))
COLUMN_GROUP = 64  # keys per step of the row pointers

MOST_LISTED = 2**31 - 1 - 2 * COLUMN_GROUP  # int32 pointers; a decode step may count a group past the last cell
MOST_BLOCKS = (1 << 15) - 1  # numbers of full and of partial blocks share an int32
MOST_LAST_USES = 16  # kept: searches ask for a few numbers of rows again and again
MOST_CALLS = 512  # of other sizes that are remembered, some 3 KB each

# Time per cell of a full tile relative to 128 x 128 tiles: small tiles load keys and values for fewer rows. Forward
# under block masks of 90% (H100, bfloat16, D = 64, T = 4096); at 50% and in training it differs by up to 0.15.
# Those of flat tiles, on an H200, lie between forward (1.15) and training (1.6); 64 x 1 forward.
TILE_COST = {
    (16, 16): 2.3,
    (32, 32): 1.4,
    (64, 64): 1.0,
    (128, 128): 1.0,
    (64, 16): 1.4,
    (128, 16): 1.4,
    (64, 1): 2.1,
}


class TileTable(NamedTuple):
    """For every outer tile (query tiles for forward and dq, key tiles for dk and dv) its inner blocks.

    entries: (M, n_outer, n_inner) int32. Row (h, o) holds the indices of the full blocks in ascending
        order from the left, and those of the partial blocks in ascending order from the right end
        inwards. A row starts where arithmetic says, not where a pointer would.
    counts: (M, n_outer, n_inner + 1) int32. counts[h, o, x] holds the number of full (low 16 bits) and
        partial (high 16 bits) blocks whose index is below x. A sequence length becomes a list length
        with one load, so lengths are run-time values and padding is skipped as blocks.
    outer, inner: sizes of tiles and of blocks in positions.
    """

    entries: Tensor
    counts: Tensor
    outer: int
    inner: int


class RowLists(NamedTuple):
    """For every query position the kept key positions, in ascending order: what one decode step reads.

    columns: (nnz,) int16 or int32. pointers: (M, Tq, ceil(Tk / 64) + 1) int32; pointers[h, i, x] is the
    place in `columns` of the first kept key of row (h, i) that is >= 64 x.
    """

    columns: Tensor
    pointers: Tensor


def pack_cells(cells: Tensor) -> Tensor:
    """bool (..., n) -> int32 (..., ceil(n / 32)): cell c is bit c % 32 of word c // 32."""
    n_words = -(-cells.size(-1) // WORD)
    by_bit = torch.nn.functional.pad(cells, (0, n_words * WORD - cells.size(-1))).unflatten(-1, (n_words, WORD))
    words = torch.zeros(by_bit.shape[:-1], dtype=torch.int32, device=cells.device)
    for bit in range(WORD):
        words |= by_bit[..., bit].to(torch.int32) << bit
    return words


def unpack_cells(words: Tensor, n: int) -> Tensor:
    """Inverse of `pack_cells`, cut to n cells. Words of 32 cells in int64, as checkpoints hold them, will do too."""
    bits = words[..., : -(-n // WORD), None] >> torch.arange(WORD, device=words.device, dtype=torch.int32) & 1
    return bits.flatten(-2)[..., :n].bool()


def _tile_status(words: Tensor, k_size: int, rows: int, cols: int) -> tuple[Tensor, Tensor]:
    """(any kept, all kept) of every rows x cols tile, each (M, n_query_tiles, n_key_tiles) bool.

    Cells outside the mask do not count: a ragged edge tile is full when all its cells that exist are kept.
    """
    if cols < 16:
        return _column_status(words, k_size, rows)
    mask_heads, n_words, q_size = words.shape
    unit = min(cols, WORD)
    # Keys that do not exist count as kept in `filled` and as dropped in `words`.
    first_key = torch.arange(n_words, device=words.device) * WORD
    missing = (first_key + WORD - k_size).clamp(0, WORD)
    edge = torch.where(missing == WORD, -1, -(1 << (WORD - missing)))
    filled = words | edge.to(torch.int32)[None, :, None]
    if unit == 16:
        words = torch.stack((words & 0xFFFF, (words >> 16) & 0xFFFF), dim=2).flatten(1, 2)
        filled = torch.stack((filled & 0xFFFF, (filled >> 16) & 0xFFFF), dim=2).flatten(1, 2)
    some, every = words != 0, filled == (0xFFFF if unit == 16 else -1)

    n_rows, n_cols, per_tile = -(-q_size // rows), -(-k_size // cols), cols // unit
    pad = (0, n_rows * rows - q_size, 0, n_cols * per_tile - some.size(1))
    if pad[3] < 0:  # the upper half of the last word lies beyond the last 16-key tile
        some, every, pad = some[:, : pad[3]], every[:, : pad[3]], (0, pad[1], 0, 0)
    shape = (mask_heads, n_cols, per_tile, n_rows, rows)
    some = torch.nn.functional.pad(some, pad, value=False).view(shape).any(-1).any(2)
    every = torch.nn.functional.pad(every, pad, value=True).view(shape).all(-1).all(2)
    return some.transpose(1, 2), every.transpose(1, 2)


def _column_status(words: Tensor, k_size: int, rows: int) -> tuple[Tensor, Tensor]:
    """`_tile_status` of tiles of one key and a power of two of rows."""
    n_rows = -(-words.size(2) // rows)
    pad = (0, n_rows * rows - words.size(2))
    some = torch.nn.functional.pad(words, pad).unflatten(2, (n_rows, rows))
    every = torch.nn.functional.pad(words, pad, value=-1).unflatten(2, (n_rows, rows))
    while rows > 1:
        rows //= 2
        some, every = some[..., :rows] | some[..., rows:], every[..., :rows] & every[..., rows:]
    some, every = (unpack_cells(x.squeeze(3).transpose(1, 2), k_size) for x in (some, every))
    return some, every


def _table(some: Tensor, every: Tensor, outer: int, inner: int) -> TileTable:
    """Compact the tile status (M, n_outer, n_inner) into lists, without a host synchronisation."""
    full, partial = every, some & ~every
    n_inner = full.size(2)
    if n_inner > MOST_BLOCKS:
        raise ValueError(
            f"{n_inner} blocks of {inner} positions, at most {MOST_BLOCKS} can be counted; use a larger tile"
        )
    n_full, n_partial = full.cumsum(2, dtype=torch.int32), partial.cumsum(2, dtype=torch.int32)
    slot = torch.where(full, n_full - 1, torch.where(partial, n_inner - n_partial, n_inner))
    entries = torch.zeros(*full.shape[:2], n_inner + 1, dtype=torch.int32, device=full.device)
    index = torch.arange(n_inner, dtype=torch.int32, device=full.device).expand_as(slot)
    entries.scatter_(2, slot.long(), index.contiguous())  # skipped blocks land in the extra last column
    counts = torch.nn.functional.pad(n_full | (n_partial << 16), (1, 0))
    return TileTable(entries[..., :n_inner].contiguous(), counts.contiguous(), outer, inner)


def _spread(words: Tensor, row_group: int, q_size: int) -> Tensor:
    """Words of single rows from words of row groups."""
    return words if row_group == 1 else words.repeat_interleave(row_group, 2)[..., :q_size]


def _choose_tile(words: Tensor, k_size: int) -> tuple[int, int]:
    """The tile with the least predicted time: Σ area of tiles that are not skipped x TILE_COST.

    One host synchronisation.
    """
    areas = []
    for rows, cols in TILES:
        some, _ = _tile_status(words, k_size, rows, cols)
        areas.append(some.sum(dtype=torch.float64) * rows * cols)
    costs = {tile: area * TILE_COST[tile] for tile, area in zip(TILES, torch.stack(areas).tolist(), strict=True)}
    return min(TILES, key=lambda tile: (costs[tile], -tile[0] * tile[1]))


def _choose_row_group(words: Tensor) -> int:
    """The largest tile size whose aligned groups of rows have equal `words`, or 1. One host synchronisation."""
    alike = [(_spread(words[..., ::group], group, words.size(2)) == words).all() for group in TILE_SIZES]
    return max([1] + [group for group, same in zip(TILE_SIZES, torch.stack(alike).tolist(), strict=True) if same])


def list_rows(keep: Tensor) -> RowLists:
    """The lists of a keep mask (M, Tq, Tk). One host synchronisation."""
    columns = keep.nonzero()[:, 2].to(torch.int16 if keep.size(2) <= 2**15 else torch.int32)
    if keep.numel() > MOST_LISTED and columns.numel() > MOST_LISTED:  # in a trace only the former is known
        raise ValueError(
            f"{columns.numel()} kept cells, at most {MOST_LISTED} can be listed for decoding with int32 "
            "pointers; use a sparser or a smaller mask"
        )
    n_groups = -(-keep.size(2) // COLUMN_GROUP)
    keep = torch.nn.functional.pad(keep, (0, n_groups * COLUMN_GROUP - keep.size(2)))
    per_group = keep.view(*keep.shape[:2], n_groups, COLUMN_GROUP).sum(3)
    ends = per_group.flatten().cumsum(0).view_as(per_group)
    first = ends[..., :1] - per_group[..., :1]
    return RowLists(columns, torch.cat((first, ends), 2).to(torch.int32))


def key_tile(tile: tuple[int, int]) -> tuple[int, int]:
    """Queries and keys of the tiles of the key table.

    One key is too few for a matrix product, and some of 16 keys is kept nearly everywhere.
    """
    return tile if tile[1] > 1 else (tile[0], tile[0])


class Layout(ABC):
    """A mask as the kernels read it: cell by cell (`AttentionLayout`), or by offset (`offsets.OffsetLayout`).

    words: (M, KW, LQ) int32, packed cells; M is the number of heads, or 1 when all heads share the mask.
    q_size, k_size: queries and keys that it covers. A call may use any Tq <= q_size and Tk <= k_size.
    tile: queries and keys of the tiles of the kernels, one of TILES.
    slope, anchor: as in `offsets.OffsetLayout`; 0 and None for a mask of cells.

    Its tensors must not change in place. Nothing notices: eager calls do not hand them to autograd, whose check of what
    changed before the backward pass covers q, k, v, lengths and seed alone, and tables are built once.
    """

    words: Tensor
    q_size: int
    k_size: int
    tile: tuple[int, int]
    row_group: int
    slope: int
    anchor: Tensor | None

    def __post_init__(self) -> None:
        self._row_lists: RowLists | None = None
        self.known_calls: dict[tuple, Any] = {}  # which `api.block_sparse_attention` has checked: see there

    def __getstate__(self) -> dict[str, Any]:  # compiled kernels cannot be copied
        return self.__dict__ | dict(known_calls={})

    @property
    def mask_heads(self) -> int:
        return self.words.size(0)

    @property
    def row_shift(self) -> int:
        """log2 of row_group: row i reads word row i >> row_shift."""
        return self.row_group.bit_length() - 1

    @property
    def device(self) -> torch.device:
        return self.words.device

    def remember(self, key: tuple, call: Any) -> None:
        """Keep a checked call for the next ones like it; where there are MOST_CALLS, they make room."""
        if len(self.known_calls) >= MOST_CALLS:
            self.known_calls.clear()
        self.known_calls[key] = call

    @abstractmethod
    def to(self, device) -> Layout:
        """The same layout on another device (itself when it is there already)."""

    @abstractmethod
    def tables(self, training: bool) -> list[Tensor]:
        """What the kernels of long sequences read beside the words: tensors of one tile table, in training of two."""

    @abstractmethod
    def row_lists(self) -> RowLists:
        """What a decode step reads."""

    @abstractmethod
    def keep_mask(self, q_size: int, k_size: int, k_lengths: Tensor | None = None) -> Tensor:
        """The upper left corner as bool, True = kept: (M, q_size, k_size), or (B, M, ...) where sentences differ."""

    @abstractmethod
    def keep_row(self, step: Tensor, k_size: int, k_lengths: Tensor | None = None) -> Tensor:
        """Row `step` (one-element tensor) likewise: (M, k_size), or (B, M, k_size)."""


@dataclass(eq=False)
class AttentionLayout(Layout):
    """Which cells of an attention site are computed, per head.

    Build it with `from_keep_mask`, once per site. Tables for the kernels are derived on first use and
    kept (`prepare` does so ahead of torch.compile or CUDA-graph capture). A call may use any
    Tq <= q_size and Tk <= k_size: it reads the upper left corner, with no rebuild and no copy.

    words: (M, ceil(k_size / 32), ceil(q_size / row_group)) int32, one bit per key and group of rows; M is the
        number of heads, or 1 when all heads share the mask.
    tile: queries and keys of the tiles of the kernels, one of TILES.
    row_group: rows that share their words: 1 for element masks, more where the mask consists of blocks.
    """

    words: Tensor
    q_size: int
    k_size: int
    tile: tuple[int, int]
    row_group: int = 1
    is_causal: bool = False
    slope: int = 0
    anchor: Tensor | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self._tables: dict[str, TileTable] = {}
        self._causal: AttentionLayout | None = None
        self._keep: Tensor | None = None
        self._last_use: dict[int, Tensor] = {}

    @classmethod
    @torch.inference_mode(False)  # may be saved for backward
    def from_keep_mask(
        cls, keep: Tensor, *, tile: int | tuple[int, int] | None = None, causal: bool = False
    ) -> AttentionLayout:
        """Build from a keep mask (heads or 1, Tq, Tk), bool, True = kept.

        tile: tile of the kernels, a size or (queries, keys) of TILES; by default that with the least predicted time for
            this mask.
        causal: drop the cells j > i. A site that is always causal then needs no second layout from `causal()`.
        Raises TypeError for a mask that is not bool, ValueError for a wrong rank, an empty dimension or
        an unknown tile.
        """
        if keep.dtype != torch.bool:
            raise TypeError(f"keep mask must be torch.bool (True = kept), got {keep.dtype}; use keep != 0")
        if keep.dim() != 3 or 0 in keep.shape:
            raise ValueError(f"keep mask must be (heads or 1, Tq, Tk) with no empty dimension, got {tuple(keep.shape)}")
        pair = (tile, tile) if isinstance(tile, int) else tile
        if pair is not None and pair not in TILES:
            raise ValueError(
                f"tile must be one of {', '.join(map(str, TILES))}, a size of a square one or None, got {tile}"
            )
        # Query positions innermost: the rows of a tile read consecutive words.
        words = pack_cells(keep.tril() if causal else keep).transpose(1, 2).contiguous()
        if pair is None:
            pair = _choose_tile(words, keep.size(2))
        row_group = _choose_row_group(words)
        words = words[..., ::row_group].contiguous()
        return cls(words, keep.size(1), keep.size(2), pair, row_group, causal)

    @torch.inference_mode(False)
    def to(self, device) -> AttentionLayout:
        """The same layout on another device (itself when it is there already); tables are derived again."""
        words = self.words.to(device)
        if words is self.words:
            return self
        return replace(self, words=words)

    def causal(self) -> AttentionLayout:
        """This layout with the cells j > i removed: kept after the first call, with words of its own, row by row."""
        if self.is_causal:
            return self
        if self._causal is None:
            with torch.inference_mode(False):  # kept, and saved for backward
                rows = torch.arange(self.q_size, device=self.device)
                first_key = torch.arange(self.words.size(1), device=self.device) * WORD
                visible = (rows[None, :] + 1 - first_key[:, None]).clamp(0, WORD)  # keys of the word with j <= i
                triangle = torch.where(visible == WORD, -1, (1 << visible) - 1).to(torch.int32)
                words = _spread(self.words, self.row_group, self.q_size) & triangle
                self._causal = AttentionLayout(words, self.q_size, self.k_size, self.tile, is_causal=True)
        return self._causal

    def _status(self, rows: int, cols: int) -> tuple[Tensor, Tensor]:
        words = _spread(self.words, self.row_group, self.q_size)
        return _tile_status(words, self.k_size, rows, cols)

    def query_table(self) -> TileTable:
        """Key blocks of every query tile (forward, dq)."""
        if "query" not in self._tables:
            with torch.inference_mode(False):
                self._tables["query"] = _table(*self._status(*self.tile), *self.tile)
        return self._tables["query"]

    def key_table(self) -> TileTable:
        """Query blocks of every key tile (dk, dv): the transposed lists, of `key_tile`."""
        if "key" not in self._tables:
            with torch.inference_mode(False):
                rows, cols = key_tile(self.tile)
                some, every = self._status(rows, cols)
                self._tables["key"] = _table(some.transpose(1, 2), every.transpose(1, 2), cols, rows)
        return self._tables["key"]

    def tables(self, training: bool) -> list[Tensor]:
        """Entries and counts of the query table, and in training of the key table."""
        return [*self.query_table()[:2], *(self.key_table()[:2] if training else ())]

    @torch.inference_mode(False)
    def row_lists(self) -> RowLists:
        """Kept keys of every query position (decode). One host synchronisation, on the first call."""
        if self._row_lists is None:
            self._row_lists = list_rows(self._unpack())
        return self._row_lists

    def prepare(self, *, training: bool = True, causal: bool = False, decode: bool = False) -> AttentionLayout:
        """Derive now what later calls need, so that none of it happens inside a capture or a trace."""
        layout = self.causal() if causal else self
        layout.query_table()
        if training:
            layout.key_table()
        if decode:
            layout.row_lists()
        return self

    def keep_mask(
        self, q_size: int | None = None, k_size: int | None = None, k_lengths: Tensor | None = None
    ) -> Tensor:
        """The upper left corner (M, q_size, k_size) of the keep mask as bool, by default all of it; kept unpacked.

        Whatever `k_lengths`, of which only offsets make use. Raises ValueError for sizes beyond the mask.
        """
        q_size = self.q_size if q_size is None else q_size
        k_size = self.k_size if k_size is None else k_size
        if q_size > self.q_size or k_size > self.k_size:
            raise ValueError(f"the mask has {self.q_size} x {self.k_size} positions, asked for {q_size} x {k_size}")
        if self._keep is None:
            self._keep = self._unpack()
        return self._keep[:, :q_size, :k_size]

    @torch.inference_mode(False)  # kept, and saved for backward
    def _unpack(self) -> Tensor:
        return unpack_cells(_spread(self.words, self.row_group, self.q_size).transpose(1, 2), self.k_size)

    def keep_row(self, step: Tensor, k_size: int, k_lengths: Tensor | None = None) -> Tensor:
        """Row `step` (one-element tensor) of the keep mask: (M, k_size) bool. `k_lengths` as in `keep_mask`."""
        words = self.words.index_select(2, step.reshape(1) // self.row_group)
        return unpack_cells(words.squeeze(2), k_size)

    @torch.inference_mode(False)  # kept
    def last_use(self, n_rows: int) -> Tensor:
        """The last of the first `n_rows` >= 1 rows that keeps each column, int64 (M, k_size); -1 where none does."""
        if n_rows not in self._last_use:
            if len(self._last_use) == MOST_LAST_USES:
                self._last_use.clear()
            words = self.words[..., : -(-n_rows // self.row_group)]
            group = torch.arange(1, words.size(2) + 1, dtype=torch.int32, device=self.device)
            # Bit by bit: all cells at once would be 32 times the size of the words.
            last = torch.stack([((words >> bit & 1) * group).amax(2) for bit in range(WORD)], 2)
            last = last.flatten(1)[:, : self.k_size].long()
            self._last_use[n_rows] = (last * self.row_group).clamp_max(min(n_rows, self.q_size)) - 1
        return self._last_use[n_rows]

    def memory(self) -> dict[str, int]:
        """Bytes on the device: packed cells, tile lists, decode lists and the dense mask, those that exist so far."""

        def size(tensors) -> int:
            return sum(t.numel() * t.element_size() for t in tensors)

        lists = [t for table in self._tables.values() for t in (table.entries, table.counts)]
        report = {"cells": size([self.words]), "tile_lists": size(lists), "row_lists": size(self._row_lists or [])}
        report["dense_mask"] = 0 if self._keep is None else size([self._keep])
        if self._causal is not None:
            for name, nbytes in self._causal.memory().items():
                report[name] += nbytes
        return report
