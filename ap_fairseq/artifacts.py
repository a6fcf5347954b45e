"""The two files that travel between the stages: attention statistics and pruning masks.

Both are safetensors files whose header carries one JSON document of provenance. They are written to a temporary name
in the target folder and renamed, so that a file of the final name is always whole.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NoReturn

import numpy as np
import safetensors
import safetensors.numpy

from ap_fairseq.files import ArtifactError, atomic_output, file_sha256, not_written, require_file
from ap_fairseq.lengths import counted
from ap_fairseq.relative import RelativeMask, RelativeStats, offset_support, rows_by_centre
from ap_fairseq.sites import AttentionKind

CELLS_PER_WORD = 32


def _write(path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, Any], overwrite: bool) -> None:
    with atomic_output(path, overwrite) as temporary:
        header = {"ap_fairseq": json.dumps(metadata, sort_keys=True, allow_nan=False)}
        try:
            safetensors.numpy.save_file({k: np.ascontiguousarray(v) for k, v in tensors.items()}, temporary, header)
        except safetensors.SafetensorError as error:
            size = sum(tensor.nbytes for tensor in tensors.values())
            raise not_written(path, f"{error}; it needs {size:,} bytes") from error


def _read(path, *formats: str) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    expected = CONTENTS[formats[0]]
    require_file(path, expected)
    if not os.path.getsize(path):
        raise ArtifactError(f"{path} is empty; expected {expected}")
    try:
        with safetensors.safe_open(str(path), framework="numpy") as archive:
            header = archive.metadata() or {}
            tensors = {name: archive.get_tensor(name) for name in archive.keys()}
    except safetensors.SafetensorError as error:
        raise ArtifactError(
            f"{path} cannot be read as a safetensors file ({error}): it is cut off, damaged or of another kind; "
            f"expected {expected}"
        ) from error
    try:
        metadata = json.loads(header["ap_fairseq"], parse_constant=partial(_refuse_constant, path))
        found = metadata["format"]
    except (KeyError, TypeError, ValueError) as error:
        raise ArtifactError(f"{path} is a safetensors file of another program; expected {expected}") from error
    if found not in formats:
        raise ArtifactError(f"{path} has format {found!r}, expected {' or '.join(map(repr, formats))}: {expected}")
    return tensors, metadata


def _refuse_constant(path, constant: str) -> NoReturn:
    raise ArtifactError(f"the metadata of {path} holds {constant}, which is not a number; write the file again")


CONTENTS = {
    "ap-attention-stats-2": "attention statistics, which ap-record writes",
    "ap-pruning-masks-2": "pruning masks, which ap-masks writes",
    "ap-pruning-masks-3": "pruning masks, which ap-masks writes",
}


@contextmanager
def _naming(path):
    """Put the file's name before what is wrong with its contents."""
    try:
        yield
    except ArtifactError as error:
        raise ArtifactError(f"{path}: {error}") from error


def _kinds(metadata: Mapping[str, Any]) -> list[AttentionKind]:
    """Return the kinds that a file claims to hold."""
    named = metadata.get("architecture")
    if not isinstance(named, dict) or not named or set(named) - set(AttentionKind):
        raise ArtifactError(f"its architecture is {named!r}, expected some of the kinds {', '.join(AttentionKind)}")
    return [kind for kind in AttentionKind if kind in named]


def _tensor(tensors: Mapping[str, np.ndarray], name: str, dtype: type[np.generic], ndim: int) -> np.ndarray:
    if name not in tensors:
        raise ArtifactError(f"the tensor {name} is missing; write the file again")
    tensor = tensors[name]
    if tensor.dtype != dtype or tensor.ndim != ndim:
        raise ArtifactError(
            f"{name} is {tensor.dtype} of {tensor.ndim} dimensions, expected {dtype.__name__} of {ndim}; "
            "write the file again"
        )
    return tensor


# -- bit packing ------------------------------------------------------------------------------------------------------


def pack_cells(keep: np.ndarray) -> np.ndarray:
    """Pack booleans along the last axis into int64 words of 32 cells, cell c in bit c % 32 of word c // 32.

    Only the low half of a word is used: fairseq's checkpoint averaging sums integer buffers in their own dtype before
    it divides, and full words would overflow.

    Args:
        keep: bool (..., n), True = kept.

    Returns:
        int64 (..., ceil(n / 32)).
    """
    padding = -keep.shape[-1] % CELLS_PER_WORD
    bits = np.packbits(np.pad(keep, [(0, 0)] * (keep.ndim - 1) + [(0, padding)]), axis=-1, bitorder="little")
    return bits.view("<u4").astype(np.int64)


def _words(n: int) -> int:
    """Words that hold *n* cells."""
    return -(-n // CELLS_PER_WORD)


def unpack_cells(words: np.ndarray, n: int) -> np.ndarray:
    """Invert :func:`pack_cells`: int64 (..., w) -> bool (..., n)."""
    bits = np.ascontiguousarray(words.astype("<u4")).view(np.uint8)
    return np.unpackbits(bits, axis=-1, count=n, bitorder="little").astype(bool)


# -- attention statistics ---------------------------------------------------------------------------------------------

ROUNDING = 1e-3  # by which a sum of probabilities may exceed their number


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
    lengths: np.ndarray = field(default_factory=lambda: np.zeros((0, 3), dtype=np.int64))
    relative: RelativeStats | None = None
    validation_lengths: np.ndarray = field(default_factory=lambda: np.zeros((0, 3), dtype=np.int64))

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
                        "heads, Tq, Tk) for mass and importance, (layers, heads) for end_mass, (Tq, Tk) for support"
                    )
            if support.min(initial=0) < 0:
                raise ArtifactError(f"{kind.value}: support is {support.min()} somewhere; it counts sentences")
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
                    "source length and number of sentences, each at least 1"
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
                    "offsets of the recorded lengths"
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
            self.end_mass,
            importance,
        )

    def require_pairs(self) -> None:
        """Raise :class:`ArtifactError` unless pairs of every kind were recorded."""
        remedy = "record it again with ap-record, on a subset that has sentences"
        if not self.kinds:
            raise ArtifactError(f"the statistics hold no attention kind; {remedy}")
        for kind in self.kinds:
            if not self.mass[kind].any():  # includes arrays of size 0
                raise ArtifactError(
                    f"the statistics of {kind.value} are empty: mass of shape {self.mass[kind].shape}, "
                    f"{int(self.support[kind].sum())} recorded pairs; {remedy}"
                )

    @property
    def kinds(self) -> list[AttentionKind]:
        return [kind for kind in AttentionKind if kind in self.mass]

    @property
    def architecture(self) -> dict[str, list[int]]:
        """``{kind: [layers, heads]}``."""
        return {kind.value: list(self.mass[kind].shape[:2]) for kind in self.kinds}

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
        for path in paths[1:]:
            other = cls.load(path)
            with _naming(f"{paths[0]} and {path} cannot be merged"):
                merged = merged.merge(other)
        return merged

    def merge(self, other: AttentionStats) -> AttentionStats:
        """Return the statistics of both recordings together, as if recorded in one run.

        What only one of them has (the mass on the last source token, importance) is left out. Numbers of sentences and
        pairs add up; ``data``, ``sample`` and ``versions`` become lists, one entry for each recording.

        Raises:
            ArtifactError: if they belong to different models, dictionaries, languages or losses, or were cut at
                different positions.
        """
        if self.architecture != other.architecture:
            raise ArtifactError(
                f"different architectures: {describe_architecture(self.architecture)} and "
                f"{describe_architecture(other.architecture)}"
            )
        both = self.metadata, other.metadata
        outside = {k.value: sum(m.get("pairs_beyond_range", {}).get(k.value, 0) for m in both) for k in self.kinds}
        same = ["checkpoint", "dictionaries"]
        if any(outside.values()):  # pairs between the two limits would be counted in one recording alone
            same.append("max_positions")
        if self.importance and other.importance:
            same.append("loss")
        if all("languages" in metadata for metadata in both):
            same.append("languages")
        for key in same:
            ours, theirs = (metadata.get(key) for metadata in both)
            if ours != theirs:
                raise ArtifactError(f"different {key}: {ours} and {theirs}")
        mass, support = {}, {}
        for kind in self.kinds:
            shape = np.maximum(self.support[kind].shape, other.support[kind].shape)
            mass[kind] = _grown(self.mass[kind], shape) + _grown(other.mass[kind], shape)
            support[kind] = _grown(self.support[kind], shape) + _grown(other.support[kind], shape)
        metadata = {**self.metadata, "pairs_beyond_range": outside}
        metadata |= {key: _as_list(self.metadata, key) + _as_list(other.metadata, key) for key in LISTED}
        metadata["sentences"] = sum(m.get("sentences", 0) for m in both)
        metadata["pairs_recorded"] = {kind.value: int(support[kind].sum()) for kind in self.kinds}
        ends = self.end_mass.keys() & other.end_mass.keys()
        end_mass = {kind: self.end_mass[kind] + other.end_mass[kind] for kind in ends}
        importance = {
            kind: _grown(self.importance[kind], support[kind].shape)
            + _grown(other.importance[kind], support[kind].shape)
            for kind in self.importance.keys() & other.importance.keys()
        }
        lengths = np.zeros((0, 3), dtype=np.int64)
        if len(self.lengths) and len(other.lengths):
            lengths = counted(np.concatenate([self.lengths, other.lengths]))
        relative = None
        if self.relative and other.relative and self.relative.slope == other.relative.slope:
            relative = self.relative.merge(other.relative)
        validation = self.validation_lengths if len(self.validation_lengths) else other.validation_lengths
        return AttentionStats(mass, support, metadata, end_mass, importance, lengths, relative, validation)

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
        _write(path, tensors, {**self.metadata, "format": self.FORMAT, "architecture": self.architecture}, overwrite)

    @classmethod
    def load(cls, path) -> AttentionStats:
        """Read statistics; raises :class:`ArtifactError` if the file is missing, damaged or of another format."""
        tensors, metadata = _read(path, cls.FORMAT)

        def by_kind(name: str, dtype: type[np.generic], ndim: int, optional: bool = False):
            present = [k for k in _kinds(metadata) if not optional or f"{k.value}.{name}" in tensors]
            return {kind: _tensor(tensors, f"{kind.value}.{name}", dtype, ndim) for kind in present}

        with _naming(path):
            stats = cls(
                by_kind("mass", np.float64, 4),
                by_kind("support", np.int64, 2),
                metadata,
                by_kind("end_mass", np.float64, 2, optional=True),
                by_kind("importance", np.float64, 4, optional=True),
            )
            _require_architecture(metadata, stats.architecture)
            if "lengths" in tensors:
                stats.lengths = _tensor(tensors, "lengths", np.int64, 2)
            if "validation.lengths" in tensors:
                stats.validation_lengths = _tensor(tensors, "validation.lengths", np.int64, 2)
            if "cross.relative.slope" in tensors:
                stats.relative = RelativeStats(
                    int(_tensor(tensors, "cross.relative.slope", np.int64, 1)[0]),
                    _tensor(tensors, "cross.relative.mass", np.float64, 3),
                    tensors.get("cross.relative.importance"),
                )
            stats.require_valid()
            return stats


def _require_architecture(metadata: Mapping[str, Any], found: Mapping[str, list[int]]) -> None:
    if metadata["architecture"] != found:
        raise ArtifactError(f"its tensors are of {found}, its metadata says {metadata['architecture']}; write it again")


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
        raise ArtifactError(
            f"{what} is {value}{where}: the model diverged, or its numbers overflow in this precision; record in fp32 "
            "(without --fp16) or with --bf16, or take a checkpoint from before it diverged"
        )
    limit = np.broadcast_to(most, values.shape)[tuple(cell)]
    raise ArtifactError(f"{what} is {value:g}{where}, expected 0 to {limit:g}; the file is damaged, record again")


def _grown(array: np.ndarray, shape) -> np.ndarray:
    """Pad the last two axes with zeros up to *shape*."""
    grow = [(0, 0)] * (array.ndim - 2) + [(0, shape[k] - array.shape[array.ndim - 2 + k]) for k in range(2)]
    return np.pad(array, grow)


LISTED = ("data", "sample", "versions")  # one entry for each recording that was merged


def _as_list(metadata: Mapping[str, Any], key: str) -> list:
    value = metadata.get(key, [])
    return value if isinstance(value, list) else [value]


# -- pruning masks ----------------------------------------------------------------------------------------------------


@dataclass
class PruningMasks:
    """One global sparseness mask per attention site and head.

    Attributes:
        keep: per kind bool (layers, heads, Tq, Tk), True = kept. Cells that cannot exist (j > i in ``decoder_self``)
            are False. The diagonal of self-attention and column 0 of cross-attention are True: they exist in every
            sentence, so no row is empty.
        extrapolation: per kind bool (layers, heads, Tq + Tk - 1), True = kept: what happens at offset j - i =
            d - (Tq - 1) outside the recorded range. Offsets outside this table are kept.
        metadata: provenance of the statistics, the specification of the masks and the resulting sparsity.
        relative: what cross-attention keeps by offset from a scaled diagonal, on top of ``keep``, which then keeps all.
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
        """Raise :class:`ArtifactError` for masks of the wrong shape, with rows that may be empty or future cells.

        So does an effective sparsity in the metadata that is not a share.
        """
        shares = self.metadata.get("sparsity", {})
        for name in shares:
            effective = shares[name].get("effective") if isinstance(shares[name], dict) else None
            if name not in self.kinds or not isinstance(effective, int | float) or not 0 <= effective <= 1:
                raise ArtifactError(
                    f"its metadata gives {name} the effective sparsity {effective!r}, expected a share in [0, 1] of "
                    f"one of the kinds {', '.join(self.kinds)}; write the masks again"
                )
        for kind, keep in self.keep.items():
            layers, heads, n_queries, n_keys = keep.shape
            if min(n_queries, n_keys) < 1 or (kind is not AttentionKind.CROSS and n_queries != n_keys):
                raise ArtifactError(
                    f"{kind.value}: a mask of {n_queries} x {n_keys} positions; expected at least 1 x 1, and as many "
                    "queries as keys in self-attention"
                )
            expected = (layers, heads, n_queries + n_keys - 1)
            if self.extrapolation[kind].shape != expected:
                raise ArtifactError(
                    f"{kind.value}: the pattern beyond the recorded range has shape {self.extrapolation[kind].shape}, "
                    f"expected {expected}"
                )
            guaranteed = keep[..., :, 0] if kind is AttentionKind.CROSS else np.diagonal(keep, axis1=-2, axis2=-1)
            if not guaranteed.all():
                where = "column 0" if kind is AttentionKind.CROSS else "the diagonal"
                raise ArtifactError(f"{kind.value}: {where} must be kept in every row, or a row could be empty")
            if kind.causal and np.triu(keep, 1).any():
                raise ArtifactError(f"{kind.value}: cells with key position > query position cannot be kept")
        if self.relative is not None:
            shape, cross = self.relative.keep.shape, self.keep.get(AttentionKind.CROSS)
            if cross is None or len(shape) != 3 or shape[:2] != cross.shape[:2] or shape[2] % 2 == 0:
                heads = None if cross is None else cross.shape[:2]
                raise ArtifactError(
                    f"cross: relative masks of shape {shape}, expected (layers, heads, 2 S - 1) of {heads} layers and "
                    "heads"
                )
            place = self.relative.anchor + shape[2] // 2
            inside = place.shape == shape[:2] and place.min() >= 0 and place.max() < shape[2]
            kept = inside and np.take_along_axis(self.relative.keep, place[..., None], 2).all()
            if self.relative.slope < 0 or not kept:
                raise ArtifactError(
                    f"cross: relative masks of slope {self.relative.slope} with anchors "
                    f"{self.relative.anchor.tolist()}; expected a slope of at least 0, and an anchor for each head "
                    "that it keeps, or a row could be empty"
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
    def kinds(self) -> list[AttentionKind]:
        return [kind for kind in AttentionKind if kind in self.keep]

    @property
    def architecture(self) -> dict[str, list[int]]:
        """``{kind: [layers, heads]}``."""
        return {kind.value: list(self.keep[kind].shape[:2]) for kind in self.kinds}

    def grown(self, kind: AttentionKind, shape: tuple[int, int]) -> np.ndarray:
        """Return the keep mask up to *shape*, which may lie beyond the recorded range: bool (layers, heads, *shape)."""
        keep = self.keep[kind]
        n_queries, n_keys = (min(a, b) for a, b in zip(keep.shape[2:], shape, strict=True))
        cells = extrapolated(self.extrapolation[kind], keep.shape[2], shape)
        cells[:, :, :n_queries, :n_keys] = keep[:, :, :n_queries, :n_keys]
        return cells

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
        _write(path, self.packed(), metadata, overwrite)

    @classmethod
    def load(cls, path) -> PruningMasks:
        """Read masks; raises :class:`ArtifactError` if the file is missing, damaged or of another format."""
        tensors, metadata = _read(path, cls.FORMAT, cls.RELATIVE_FORMAT)
        keep, extrapolation = {}, {}
        with _naming(path):
            for kind in _kinds(metadata):
                words, offsets = (
                    _tensor(tensors, f"{kind.value}.{name}", np.int64, ndim)
                    for name, ndim in (("keep", 4), ("extrapolation", 3))
                )
                size = _tensor(tensors, f"{kind.value}.range", np.int64, 1)
                n_queries, n_keys = size.tolist() if size.shape == (2,) else (0, 0)
                stored = words.shape[2:], offsets.shape[2:]
                if (words >> CELLS_PER_WORD).any() or (offsets >> CELLS_PER_WORD).any():
                    raise ArtifactError(f"{kind.value}: bits beyond those of {CELLS_PER_WORD} cells are set in a word")
                if stored != ((n_queries, _words(n_keys)), (_words(n_queries + n_keys - 1),)):
                    raise ArtifactError(f"{kind.value}: masks of shapes {stored} for the range {size.tolist()}")
                keep[kind] = unpack_cells(words, n_keys)
                extrapolation[kind] = unpack_cells(offsets, n_queries + n_keys - 1)
            relative = None
            if metadata["format"] == cls.RELATIVE_FORMAT:
                geometry, words = (
                    _tensor(tensors, "cross.geometry", np.int64, 1),
                    _tensor(tensors, "cross.offsets", np.int64, 3),
                )
                slope, n_offsets = geometry.tolist() if geometry.shape == (2,) else (0, 0)
                if words.shape[2] != _words(n_offsets):
                    raise ArtifactError(
                        f"cross: relative masks of shape {words.shape} for geometry {geometry.tolist()}"
                    )
                anchor = _tensor(tensors, "cross.anchor", np.int64, 2)
                relative = RelativeMask(slope, unpack_cells(words, n_offsets), anchor)
            masks = cls(keep, extrapolation, metadata, relative)
            _require_architecture(metadata, masks.architecture)
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


def describe_architecture(shape: Mapping[str, list[int]]) -> str:
    """Return e.g. ``encoder_self 6 layers x 4 heads, cross 6 layers x 4 heads``."""
    return ", ".join(f"{kind} {layers} layers x {heads} heads" for kind, (layers, heads) in shape.items())
