"""Attention statistics: what ``ap-record`` writes."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ap_fairseq.artifacts.storage import CONTENTS, read, require_architecture, stored_kinds, tensor_of, write
from ap_fairseq.files import ArtifactError, file_sha256, naming, require_file
from ap_fairseq.lengths import counted
from ap_fairseq.relative import RelativeStats, offset_support, rows_by_centre
from ap_fairseq.sites import AttentionKind, describe_architecture

ROUNDING = 1e-3  # by which a sum of probabilities may exceed their number
DIVERGED = (  # why a number of a recording is not finite, and what to do
    "the model diverged, or its numbers overflow in this precision; record in fp32 (without --fp16) or with --bf16, or "
    "take a checkpoint from before it diverged"
)
NO_LENGTHS = np.zeros((0, 3), dtype=np.int64)
LISTED = ("data", "sample", "versions")  # one entry for each recording that was merged

AGAIN = "the file is damaged, record again"
ONE_MODEL = "name recordings of one model, made alike"


@dataclass
class AttentionStats:
    """Attention of a model, summed by position over the sentences of a data set.

    Attributes:
        mass: per kind float64 (layers, heads, Tq, Tk): sum of the attention probability of each cell over the
            recorded sentences in which it is attendable, without dropout.
        support: per kind int64 (Tq, Tk): number of recorded sentences in which the cell is attendable.
        metadata: provenance (checkpoint, dictionaries, data, versions, cells beyond the recorded range).
        end_mass: per kind with source keys (``encoder_self``, ``cross``) float64 (layers, heads): the part of the mass
            on each sentence's last source token, whose position differs from sentence to sentence. Empty where only
            some of the merged recordings have it.
        importance: per kind float64 (layers, heads, Tq, Tk): sum over those sentences of the estimated effect of the
            cell's removal on the training loss (:func:`ap_fairseq.recording.recorder.squared_removal_effect`). Empty
            unless recorded with ``ap-record --importance``.
        lengths: int64 (n, 3): target length, source length, number of recorded sentences with both, in tokens. Empty in
            files of version 0.2.
        relative: cross-attention by offset from a scaled diagonal. None in files of version 0.2, for models without
            cross-attention, and where recordings with different slopes were merged.
        validation_lengths: as *lengths*, of the validation sentences, on which budgets can be held; nothing of them was
            recorded. Empty where there are none.
    """

    FORMAT = "ap-attention-stats-2"

    mass: dict[AttentionKind, np.ndarray]
    support: dict[AttentionKind, np.ndarray]
    metadata: dict[str, Any] = field(default_factory=dict)
    end_mass: dict[AttentionKind, np.ndarray] = field(default_factory=dict)
    importance: dict[AttentionKind, np.ndarray] = field(default_factory=dict)
    lengths: np.ndarray = field(default_factory=lambda: NO_LENGTHS)
    relative: RelativeStats | None = None
    validation_lengths: np.ndarray = field(default_factory=lambda: NO_LENGTHS)

    def __post_init__(self):
        self.require_valid()

    def require_valid(self) -> None:
        """Raise :class:`ArtifactError` unless shapes agree and every number is one that a recording can give."""
        for kind, support in self.support.items():
            layers_heads = self.mass[kind].shape[:2]
            cells = (*layers_heads, *support.shape)
            for name, array, shape in (
                ("mass", self.mass[kind], cells),
                ("end_mass", self.end_mass.get(kind), layers_heads),
                ("importance", self.importance.get(kind), cells),
            ):
                if array is not None and (array.shape != shape or len(cells) != 4):
                    raise ArtifactError(
                        f"{kind.value}: {name} has shape {array.shape}, support {support.shape}; expected (layers, "
                        "heads, Tq, Tk) for mass and importance, (layers, heads) for end_mass, (Tq, Tk) for support; "
                        f"{AGAIN}"
                    )
            if support.min(initial=0) < 0:
                raise ArtifactError(
                    f"{kind.value}: support is {support.min()} somewhere, which counts sentences; {AGAIN}"
                )
            most = support * (1 + ROUNDING)
            for layer, head in np.ndindex(layers_heads):
                where = f"{kind.value} layer {layer} head {head}"
                mass = self.mass[kind][layer, head]
                _require_between(mass, most, f"{where}: the attention mass")
                if kind in self.importance:
                    _require_between(self.importance[kind][layer, head], np.inf, f"{where}: the importance")
                if kind in self.end_mass:
                    _require_between(self.end_mass[kind][layer, head], np.inf, f"{where}: the mass on the last token")
        for name, lengths in (("lengths", self.lengths), ("validation lengths", self.validation_lengths)):
            if lengths.ndim != 2 or lengths.shape[1] != 3 or lengths.min(initial=1) < 1:
                raise ArtifactError(
                    f"{name} of shape {lengths.shape}, least {lengths.min(initial=1)}; expected rows of target length, "
                    f"source length and number of sentences, each at least 1; {AGAIN}"
                )
        if self.relative is not None:
            self._require_valid_relative(self.relative)

    def _require_valid_relative(self, relative: RelativeStats) -> None:
        kind = AttentionKind.CROSS
        rows = self.rows_by_centre() if kind in self.support else np.zeros((1, 1), dtype=np.int64)
        support = offset_support(rows)
        expected = (*self.mass[kind].shape[:2], len(support)) if kind in self.mass else None
        for name, sums in (("mass", relative.mass), ("importance", relative.importance)):
            if sums is not None and sums.shape != expected:
                raise ArtifactError(
                    f"{kind.value}: relative {name} has shape {sums.shape}, expected {expected}: layers, heads, and "
                    f"offsets of the recorded lengths; {AGAIN}"
                )
        for layer, head in np.ndindex(relative.mass.shape[:2]):
            where = f"{kind.value} layer {layer} head {head}"
            most = support * (1 + ROUNDING)
            _require_between(relative.mass[layer, head], most, f"{where}: the attention mass of offsets")
            if relative.importance is not None:
                _require_between(relative.importance[layer, head], np.inf, f"{where}: the importance of offsets")

    def by_offset(self) -> RelativeStats:
        """Return cross-attention by offset from the scaled diagonal.

        Raises:
            ArtifactError: for statistics without it.
        """
        if self.relative is None:
            raise ArtifactError(
                "--granularity scaled-diagonal needs cross-attention by offset from a scaled diagonal, which these "
                "statistics lack; record them anew with ap-record, in one file"
            )
        return self.relative

    def rows_by_centre(self) -> np.ndarray:
        """Count the rows of the sentences that lie in the recorded range: :func:`ap_fairseq.relative.rows_by_centre`.

        Raises:
            ArtifactError: for statistics without cross-attention by offset.
        """
        relative = self.by_offset()
        n_queries, n_keys = self.support[AttentionKind.CROSS].shape
        inside = (self.lengths[:, 0] <= n_queries) & (self.lengths[:, 1] <= n_keys)
        return rows_by_centre(self.lengths[inside], relative.slope)

    def in_offsets(self) -> AttentionStats:
        """Return these statistics with cross-attention by offset, as a single row of 2 S - 1 keys.

        Raises:
            ArtifactError: for statistics without cross-attention by offset.
        """
        kind, relative = AttentionKind.CROSS, self.by_offset()
        support = offset_support(self.rows_by_centre())[None]
        importance = {k: cells for k, cells in self.importance.items() if k is not kind}
        if relative.importance is not None:
            importance[kind] = relative.importance[:, :, None]
        return AttentionStats(
            {**self.mass, kind: relative.mass[:, :, None]},
            {**self.support, kind: support},
            self.metadata,
            end_mass=self.end_mass,
            importance=importance,
        )

    def require_pairs(self) -> None:
        """Raise :class:`ArtifactError` unless pairs of every kind were recorded.

        They may have no attention mass: a model that is pruned already may keep nothing of a kind.
        """
        remedy = "record it again with ap-record, on a subset that has sentences"
        if not self.kinds:
            raise ArtifactError(f"the statistics hold no attention kind; {remedy}")
        for kind in self.kinds:
            if not self.support[kind].any():  # includes arrays of size 0
                raise ArtifactError(
                    f"the statistics of {kind.value} are empty: mass of shape {self.mass[kind].shape}, "
                    f"{int(self.support[kind].sum())} recorded pairs; {remedy}"
                )

    @property
    def kinds(self) -> list[AttentionKind]:
        """The kinds of attention that it holds, in the order of :class:`AttentionKind`."""
        return [kind for kind in AttentionKind if kind in self.mass]

    @property
    def architecture(self) -> dict[str, list[int]]:
        """``{kind: [layers, heads]}``."""
        return {kind.value: list(self.mass[kind].shape[:2]) for kind in self.kinds}

    def pairs(self, kind: AttentionKind) -> int:
        """Recorded pairs of a kind, over layers and heads."""
        return int(self.support[kind].sum()) * math.prod(self.mass[kind].shape[:2])

    def mean(self, kind: AttentionKind) -> np.ndarray:
        """Mean attention s/n, float64 (layers, heads, Tq, Tk); 0 where a cell was never attendable."""
        return self.mass[kind] / np.maximum(self.support[kind], 1)

    @classmethod
    def load_merged(cls, paths: Sequence[str | os.PathLike]) -> AttentionStats:
        """Read one or more files of the same model and merge them.

        Raises:
            ArtifactError: if a file cannot be read, is given twice, or does not belong with the first.
        """
        seen: dict[str, str | os.PathLike] = {}
        for path in paths:
            require_file(path, CONTENTS[cls.FORMAT])
            digest = file_sha256(path)
            if digest in seen:
                raise ArtifactError(
                    f"{path} and {seen[digest]} are the same statistics, which would count twice; name them once"
                )
            seen[digest] = path
        merged = cls.load(paths[0])
        held_out = [merged.validation_lengths]
        for path in paths[1:]:
            other = cls.load(path)
            held_out.append(other.validation_lengths)
            with naming(f"{paths[0]} and {path} cannot be merged"):
                merged = merged.merge(other)
        merged.validation_lengths = _together(held_out)  # of A, B and again A
        return merged

    def merge(self, other: AttentionStats) -> AttentionStats:
        """Return the statistics of both recordings together, as if recorded in one run.

        What only one of them has (the mass on the last source token, importance) is left out. Numbers of sentences and
        pairs add up; ``data``, ``sample`` and ``versions`` become lists, one entry for each recording.
        Validation sentences are those of both data-bins; equal lengths are taken for the same sentences, and count
        once.

        Raises:
            ArtifactError: if they belong to different models, dictionaries, languages or losses, or were cut at
                different positions.
        """
        self._require_same_origin(other)
        both = self.metadata, other.metadata
        outside = {kind.value: _beyond(both, kind) for kind in self.kinds}
        mass = {kind: _added(self.mass[kind], other.mass[kind]) for kind in self.kinds}
        support = {kind: _added(self.support[kind], other.support[kind]) for kind in self.kinds}
        metadata = {**self.metadata, "pairs_beyond_range": outside}
        metadata |= {key: _as_list(self.metadata, key) + _as_list(other.metadata, key) for key in LISTED}
        metadata["sentences"] = sum(m.get("sentences", 0) for m in both)
        metadata["pairs_recorded"] = {kind.value: int(support[kind].sum()) for kind in self.kinds}
        ends = self.end_mass.keys() & other.end_mass.keys()
        end_mass = {kind: self.end_mass[kind] + other.end_mass[kind] for kind in ends}
        estimated = self.importance.keys() & other.importance.keys()
        importance = {kind: _added(self.importance[kind], other.importance[kind]) for kind in estimated}
        lengths = NO_LENGTHS
        if len(self.lengths) and len(other.lengths):
            lengths = counted(np.concatenate([self.lengths, other.lengths]))
        relative = None
        if self.relative and other.relative and self.relative.slope == other.relative.slope:
            relative = self.relative.merge(other.relative)
        return AttentionStats(
            mass,
            support,
            metadata,
            end_mass=end_mass,
            importance=importance,
            lengths=lengths,
            relative=relative,
            validation_lengths=_together([self.validation_lengths, other.validation_lengths]),
        )

    def _require_same_origin(self, other: AttentionStats) -> None:
        """Raise :class:`ArtifactError` where the recordings cannot be added."""
        if self.architecture != other.architecture:
            raise ArtifactError(
                f"different architectures: {describe_architecture(self.architecture)} and "
                f"{describe_architecture(other.architecture)}; {ONE_MODEL}"
            )
        both, same = (self.metadata, other.metadata), ["checkpoint", "dictionaries"]
        if any(_beyond(both, kind) for kind in self.kinds):  # pairs between two limits count in one recording alone
            same.append("max_positions")
        if self.importance and other.importance:
            same.append("loss")
        if all("languages" in metadata for metadata in both):
            same.append("languages")
        for key in same:
            ours, theirs = (metadata.get(key) for metadata in both)
            if ours != theirs:
                raise ArtifactError(f"different {key}: {ours} and {theirs}; {ONE_MODEL}")

    def save(self, path, overwrite: bool = False) -> None:
        """Write the statistics; raises :class:`ArtifactError` for invalid ones, or if *path* may not be written."""
        self.require_valid()
        tensors = {f"{kind.value}.mass": self.mass[kind] for kind in self.kinds}
        tensors |= {f"{kind.value}.support": self.support[kind] for kind in self.kinds}
        tensors |= {f"{kind.value}.end_mass": mass for kind, mass in self.end_mass.items()}
        tensors |= {f"{kind.value}.importance": importance for kind, importance in self.importance.items()}
        tensors |= {"lengths": self.lengths, "validation.lengths": self.validation_lengths}
        if self.relative is not None:
            tensors["cross.relative.mass"] = self.relative.mass
            tensors["cross.relative.slope"] = np.array([self.relative.slope], dtype=np.int64)
            if self.relative.importance is not None:
                tensors["cross.relative.importance"] = self.relative.importance
        write(path, tensors, {**self.metadata, "format": self.FORMAT, "architecture": self.architecture}, overwrite)

    @classmethod
    def load(cls, path) -> AttentionStats:
        """Read statistics; raises :class:`ArtifactError` if the file is missing, damaged or of another format."""
        tensors, metadata = read(path, cls.FORMAT)

        def by_kind(name: str, dtype: type[np.generic], ndim: int, optional: bool = False):
            present = [k for k in stored_kinds(metadata) if not optional or f"{k.value}.{name}" in tensors]
            return {kind: tensor_of(tensors, f"{kind.value}.{name}", dtype, ndim) for kind in present}

        def lengths(name: str) -> np.ndarray:
            return tensor_of(tensors, name, np.int64, 2) if name in tensors else NO_LENGTHS

        with naming(path):
            relative = None
            if "cross.relative.slope" in tensors:
                relative = RelativeStats(
                    int(tensor_of(tensors, "cross.relative.slope", np.int64, 1)[0]),
                    tensor_of(tensors, "cross.relative.mass", np.float64, 3),
                    tensors.get("cross.relative.importance"),
                )
            stats = cls(
                by_kind("mass", np.float64, 4),
                by_kind("support", np.int64, 2),
                metadata,
                by_kind("end_mass", np.float64, 2, optional=True),
                by_kind("importance", np.float64, 4, optional=True),
                lengths("lengths"),
                relative,
                lengths("validation.lengths"),
            )
            require_architecture(metadata, stats.architecture)
            return stats


def _require_between(values: np.ndarray, most: np.ndarray | float, what: str) -> None:
    """Raise :class:`ArtifactError` unless *values* are finite and in [0, *most*]: a cell, (offsets,) or (Tq, Tk)."""
    infinite = ~np.isfinite(values)
    wrong = infinite | (values < 0) | (values > most)
    if not wrong.any():
        return
    cell = np.argwhere(infinite if infinite.any() else wrong)[0]
    where = ""
    if len(cell) == 1:
        where = f" at offset {cell[0] - len(values) // 2}"
    elif len(cell) == 2:
        where = f" at query {cell[0]}, key {cell[1]}"
    value = values[tuple(cell)]
    if infinite.any():
        raise ArtifactError(f"{what} is {value}{where}: {DIVERGED}")
    limit = np.broadcast_to(most, values.shape)[tuple(cell)]
    raise ArtifactError(f"{what} is {value:g}{where}, expected 0 to {limit:g}; {AGAIN}")


def _beyond(metadata: Sequence[Mapping[str, Any]], kind: AttentionKind) -> int:
    """Count the pairs beyond the recorded positions in several recordings."""
    return sum(one.get("pairs_beyond_range", {}).get(kind.value, 0) for one in metadata)


def _added(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Add two arrays (..., Tq, Tk) of different Tq and Tk; the smaller one counts as 0 outside."""
    sums = np.zeros((*one.shape[:-2], *np.maximum(one.shape[-2:], other.shape[-2:])), dtype=one.dtype)
    for cells in (one, other):
        sums[..., : cells.shape[-2], : cells.shape[-1]] += cells
    return sums


def _together(validation: Sequence[np.ndarray]) -> np.ndarray:
    """Return the lengths of the validation sentences of several recordings; equal ones are taken for the same."""
    different = {lengths.tobytes(): lengths for lengths in validation}
    return counted(np.concatenate(list(different.values())))


def _as_list(metadata: Mapping[str, Any], key: str) -> list:
    value = metadata.get(key, [])
    return value if isinstance(value, list) else [value]
