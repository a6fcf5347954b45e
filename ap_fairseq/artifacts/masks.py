"""Pruning masks: what ``ap-masks`` writes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ap_fairseq.artifacts.storage import (
    CELLS_PER_WORD,
    pack_cells,
    read,
    require_architecture,
    stored_kinds,
    tensor_of,
    unpack_cells,
    words_for,
    write,
)
from ap_fairseq.files import ArtifactError, naming
from ap_fairseq.relative import RelativeMask
from ap_fairseq.sites import AttentionKind, describe_architecture

AGAIN = "write the masks again"


@dataclass
class PruningMasks:
    """One global sparseness mask per attention site and head.

    Attributes:
        keep: per kind bool (layers, heads, Tq, Tk), True = kept. Cells that cannot exist (j > i in ``decoder_self``)
            are False. The diagonal of self-attention and column 0 of cross-attention are True: they exist in every
            sentence, so no row is empty; unless the specification in the metadata has ``empty_rows``.
        extrapolation: per kind bool (layers, heads, Tq + Tk - 1), True = kept: what happens at offset j - i =
            d - (Tq - 1) outside the recorded range. Offsets outside this table are kept, except by heads that keep
            nothing else (:func:`grown`).
        metadata: provenance of the statistics, the specification of the masks and the resulting sparsity.
        relative: what cross-attention keeps by offset from a scaled diagonal; ``keep`` then keeps all of it.
            A file with it has a format of its own, which version 0.2 refuses.
    """

    FORMAT = "ap-pruning-masks-2"
    RELATIVE_FORMAT = "ap-pruning-masks-3"

    keep: dict[AttentionKind, np.ndarray]
    extrapolation: dict[AttentionKind, np.ndarray]
    metadata: dict[str, Any] = field(default_factory=dict)
    relative: RelativeMask | None = None

    def __post_init__(self):
        self.require_valid()

    def require_valid(self) -> None:
        """Raise :class:`ArtifactError` for masks of the wrong shape, rows that may be empty, or future cells.

        Also for metadata of another form, or whose effective sparsity is not a share.
        """
        for name in ("spec", "sparsity"):
            if not isinstance(self.metadata.get(name, {}), dict):
                raise ArtifactError(f"its metadata has {name} {self.metadata[name]!r}, expected an object; {AGAIN}")
        shares = self.metadata.get("sparsity", {})
        for name in shares:
            effective = shares[name].get("effective") if isinstance(shares[name], dict) else None
            if name not in self.kinds or not isinstance(effective, int | float) or not 0 <= effective <= 1:
                raise ArtifactError(
                    f"its metadata gives {name} the effective sparsity {effective!r}, expected a share in [0, 1] of "
                    f"one of the kinds {', '.join(self.kinds)}; {AGAIN}"
                )
        for kind, keep in self.keep.items():
            layers, heads, n_queries, n_keys = keep.shape
            if min(n_queries, n_keys) < 1 or (kind is not AttentionKind.CROSS and n_queries != n_keys):
                raise ArtifactError(
                    f"{kind.value}: a mask of {n_queries} x {n_keys} positions; expected at least 1 x 1, and as many "
                    f"queries as keys in self-attention; {AGAIN}"
                )
            expected = (layers, heads, n_queries + n_keys - 1)
            if self.extrapolation[kind].shape != expected:
                raise ArtifactError(
                    f"{kind.value}: the pattern beyond the recorded range has shape {self.extrapolation[kind].shape}, "
                    f"expected {expected}; {AGAIN}"
                )
            if not (guaranteed_cells(keep, kind).all() or self.may_have_empty_rows):
                where = "column 0" if kind is AttentionKind.CROSS else "the diagonal"
                raise ArtifactError(
                    f"{kind.value}: {where} must be kept in every row, or a row could be empty; {AGAIN}"
                )
            if kind.causal and np.triu(keep, 1).any():
                raise ArtifactError(f"{kind.value}: cells with key position > query position cannot be kept; {AGAIN}")
        if self.relative is not None:
            self._require_valid_relative(self.relative)

    def _require_valid_relative(self, relative: RelativeMask) -> None:
        shape, cross = relative.keep.shape, self.keep.get(AttentionKind.CROSS)
        if cross is None or len(shape) != 3 or shape[:2] != cross.shape[:2] or shape[2] % 2 == 0:
            heads = None if cross is None else cross.shape[:2]
            raise ArtifactError(
                f"cross: relative masks of shape {shape}, expected (layers, heads, 2 S - 1) of {heads} layers and "
                f"heads; {AGAIN}"
            )
        place = relative.anchor + shape[2] // 2
        inside = place.shape == shape[:2] and place.min() >= 0 and place.max() < shape[2]
        kept = inside and np.take_along_axis(relative.keep, place[..., None], 2).all()
        if relative.slope < 0 or not kept:
            raise ArtifactError(
                f"cross: relative masks of slope {relative.slope} with anchors {relative.anchor.tolist()}; expected a "
                f"slope of at least 0, and an anchor for each head that it keeps, or a row could be empty; {AGAIN}"
            )

    @classmethod
    def all_ones(cls, shape: Mapping[str, list[int]], dictionaries: Mapping[str, str]) -> PruningMasks:
        """Return masks that keep every cell of a model: ``--attention-masks none``.

        Args:
            shape: ``{kind: [layers, heads]}`` (:func:`ap_fairseq.sites.architecture`).
            dictionaries: ``{"source": sha256, "target": sha256}``.
        """
        keep = {AttentionKind(kind): np.ones((*size, 1, 1), dtype=bool) for kind, size in shape.items()}
        nothing = {"effective": 0.0, "kept_mass": 1.0}
        metadata = {"dictionaries": dict(dictionaries), "sparsity": dict.fromkeys(shape, nothing), "total": nothing}
        return cls(keep, {kind: cells[..., 0] for kind, cells in keep.items()}, metadata)

    @property
    def may_have_empty_rows(self) -> bool:
        """Whether the cells that exist in every sentence are pruned like any other."""
        return self.metadata.get("spec", {}).get("empty_rows") is True

    @property
    def kinds(self) -> list[AttentionKind]:
        """The kinds of attention that it holds, in the order of :class:`AttentionKind`."""
        return [kind for kind in AttentionKind if kind in self.keep]

    @property
    def architecture(self) -> dict[str, list[int]]:
        """``{kind: [layers, heads]}``."""
        return {kind.value: list(self.keep[kind].shape[:2]) for kind in self.kinds}

    def grown(self, kind: AttentionKind, shape: tuple[int, int]) -> np.ndarray:
        """Return the keep mask up to *shape*, which may lie beyond the recorded range: bool (layers, heads, *shape)."""
        return grown(self.keep[kind], self.extrapolation[kind], kind, shape)

    def relative_mask(self, kind: AttentionKind) -> RelativeMask | None:
        """Return what *kind* keeps by offset from the scaled diagonal; None where its masks are of cells."""
        return self.relative if kind is AttentionKind.CROSS else None

    def guarantees(self, kind: AttentionKind) -> bool:
        """Whether every row of *kind* keeps a cell that exists in every sentence, or its head's anchor."""
        return self.relative_mask(kind) is not None or not self.may_have_empty_rows

    def packed(self) -> dict[str, np.ndarray]:
        """Return the tensors as stored: int64 words of 32 cells and int64 (2,) ranges (Tq, Tk).

        Relative masks add ``cross.offsets``, words likewise, ``cross.geometry`` int64 (2,): slope, offsets, and
        ``cross.anchor`` int64 (layers, heads).
        """
        tensors = {}
        for kind in self.kinds:
            tensors[f"{kind.value}.keep"] = pack_cells(self.keep[kind])
            tensors[f"{kind.value}.extrapolation"] = pack_cells(self.extrapolation[kind])
            tensors[f"{kind.value}.range"] = np.array(self.keep[kind].shape[2:], dtype=np.int64)
        if self.relative is not None:
            tensors["cross.offsets"] = pack_cells(self.relative.keep)
            tensors["cross.anchor"] = self.relative.anchor
            tensors["cross.geometry"] = np.array([self.relative.slope, self.relative.keep.shape[2]], dtype=np.int64)
        return tensors

    def save(self, path, overwrite: bool = False) -> None:
        """Write the masks; raises :class:`ArtifactError` for invalid ones, or if *path* may not be written."""
        self.require_valid()
        file_format = self.FORMAT if self.relative is None else self.RELATIVE_FORMAT
        metadata = {**self.metadata, "format": file_format, "architecture": self.architecture}
        write(path, self.packed(), metadata, overwrite)

    @classmethod
    def load(cls, path) -> PruningMasks:
        """Read masks; raises :class:`ArtifactError` if the file is missing, damaged or of another format."""
        tensors, metadata = read(path, cls.FORMAT, cls.RELATIVE_FORMAT)
        keep, extrapolation = {}, {}
        with naming(path):
            for kind in stored_kinds(metadata):
                words, offsets = (
                    tensor_of(tensors, f"{kind.value}.{name}", np.int64, ndim)
                    for name, ndim in (("keep", 4), ("extrapolation", 3))
                )
                size = tensor_of(tensors, f"{kind.value}.range", np.int64, 1)
                n_queries, n_keys = size.tolist() if size.shape == (2,) else (0, 0)
                stored = words.shape[2:], offsets.shape[2:]
                if (words >> CELLS_PER_WORD).any() or (offsets >> CELLS_PER_WORD).any():
                    raise ArtifactError(
                        f"{kind.value}: bits beyond those of {CELLS_PER_WORD} cells are set in a word; {AGAIN}"
                    )
                if stored != ((n_queries, words_for(n_keys)), (words_for(n_queries + n_keys - 1),)):
                    raise ArtifactError(
                        f"{kind.value}: masks of shapes {stored} for the range {size.tolist()}; {AGAIN}"
                    )
                keep[kind] = unpack_cells(words, n_keys)
                extrapolation[kind] = unpack_cells(offsets, n_queries + n_keys - 1)
            relative = _read_relative(tensors) if metadata["format"] == cls.RELATIVE_FORMAT else None
            masks = cls(keep, extrapolation, metadata, relative)
            require_architecture(metadata, masks.architecture)
            return masks

    def require_model(self, shape: Mapping[str, list[int]], dictionaries: Mapping[str, str], path) -> None:
        """Raise :class:`ArtifactError` unless the masks were made for this model shape and these dictionaries.

        Args:
            shape: ``{kind: [layers, heads]}`` of the model (:func:`ap_fairseq.sites.architecture`).
            dictionaries: ``{"source": sha256, "target": sha256}`` (:func:`dictionary_hashes`).
            path: where the masks came from, for the message.
        """
        if self.architecture != dict(shape):
            raise ArtifactError(
                f"masks of {path} are for {describe_architecture(self.architecture)}, the model has "
                f"{describe_architecture(shape)}; record and derive masks with a model of this architecture"
            )
        expected = self.metadata.get("dictionaries", {})
        for side, sha in dictionaries.items():
            if expected.get(side) != sha:
                raise ArtifactError(
                    f"masks of {path} belong to a {side} dictionary with SHA-256 {str(expected.get(side))[:12]}, the "
                    f"data has {sha[:12]}; a mask is tied to its tokenizer: use the data-bin it was recorded on"
                )


def _read_relative(tensors: Mapping[str, np.ndarray]) -> RelativeMask:
    geometry = tensor_of(tensors, "cross.geometry", np.int64, 1)
    words = tensor_of(tensors, "cross.offsets", np.int64, 3)
    slope, n_offsets = geometry.tolist() if geometry.shape == (2,) else (0, 0)
    if words.shape[2] != words_for(n_offsets):
        raise ArtifactError(f"cross: relative masks of shape {words.shape} for geometry {geometry.tolist()}; {AGAIN}")
    return RelativeMask(slope, unpack_cells(words, n_offsets), tensor_of(tensors, "cross.anchor", np.int64, 2))


def guaranteed_cells(keep: np.ndarray, kind: AttentionKind) -> np.ndarray:
    """Return whether *keep* (..., Tq, Tk) has each row's guaranteed cell: column 0, in self-attention the diagonal."""
    return keep[..., 0] if kind is AttentionKind.CROSS else np.diagonal(keep, axis1=-2, axis2=-1)


def grown(keep: np.ndarray, pattern: np.ndarray, kind: AttentionKind, shape: tuple[int, int]) -> np.ndarray:
    """Continue keep masks beyond the recorded range by their patterns over offsets.

    A head that keeps the guaranteed cell in all its rows keeps it in later rows, too. A head that keeps nothing else,
    nor any offset of its pattern, keeps none outside the pattern.

    Args:
        keep: bool (..., Tq, Tk), True = kept.
        pattern: bool (..., Tq + Tk - 1), likewise.

    Returns:
        bool (..., *shape).
    """
    recorded_queries, recorded_keys = keep.shape[-2:]
    cells = extrapolated(pattern, recorded_queries, shape)
    guaranteed = guaranteed_cells(keep, kind)
    cells[~pattern.any(-1) & (keep.sum((-2, -1)) == guaranteed.sum(-1))] = False
    row = np.arange(shape[0] if kind is AttentionKind.CROSS else min(shape))
    cells[..., row, 0 if kind is AttentionKind.CROSS else row] |= guaranteed.all(-1, keepdims=True)
    if kind.causal:
        cells &= np.tri(*shape, dtype=np.bool_)
    n_queries, n_keys = min(shape[0], recorded_queries), min(shape[1], recorded_keys)
    cells[..., :n_queries, :n_keys] = keep[..., :n_queries, :n_keys]
    return cells


def extrapolated(pattern: np.ndarray, n_queries: int, shape: tuple[int, int]) -> np.ndarray:
    """Spread a pattern over offsets to cells; offsets outside the pattern are kept.

    Args:
        pattern: bool (..., offsets), True = kept: offset j - i at j - i + *n_queries* - 1.

    Returns:
        bool (..., *shape).
    """
    row, column = np.ogrid[: shape[0], : shape[1]]
    offset = column - row + n_queries - 1
    inside = (offset >= 0) & (offset < pattern.shape[-1])
    return np.where(inside, pattern[..., offset.clip(0, pattern.shape[-1] - 1)], True)
