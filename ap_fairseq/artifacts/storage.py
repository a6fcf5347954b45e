"""Safetensors files whose header holds one JSON document, and masks packed into words.

Files are written to a temporary name in the target folder and renamed, so that a file of the final name is always
whole.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from functools import partial
from typing import Any, NoReturn

import numpy as np
import safetensors
import safetensors.numpy

from ap_fairseq.files import ArtifactError, atomic_output, not_written, require_file
from ap_fairseq.sites import AttentionKind

CONTENTS = {
    "ap-attention-stats-2": "attention statistics, which ap-record writes",
    "ap-pruning-masks-2": "pruning masks, which ap-masks writes",
    "ap-pruning-masks-3": "pruning masks, which ap-masks writes",
}
CELLS_PER_WORD = 32


def write(path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, Any], overwrite: bool) -> None:
    """Write tensors, and *metadata* as JSON in the header.

    Raises:
        ArtifactError: if *path* exists and *overwrite* is not set, or cannot be written.
    """
    with atomic_output(path, overwrite) as temporary:
        header = {"ap_fairseq": json.dumps(metadata, sort_keys=True, allow_nan=False)}
        try:
            safetensors.numpy.save_file({k: np.ascontiguousarray(v) for k, v in tensors.items()}, temporary, header)
        except safetensors.SafetensorError as error:
            size = sum(tensor.nbytes for tensor in tensors.values())
            raise not_written(path, f"{error}; it needs {size:,} bytes") from error


def read(path, *formats: str) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Return the tensors and the metadata of a file in one of *formats*, keys of :data:`CONTENTS`.

    Raises:
        ArtifactError: if the file is missing, damaged or in another format.
    """
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


def stored_kinds(metadata: Mapping[str, Any]) -> list[AttentionKind]:
    """Return the kinds that a file claims to hold; raises :class:`ArtifactError` for others than ours."""
    named = metadata.get("architecture")
    if not isinstance(named, dict) or not named or set(named) - set(AttentionKind):
        raise ArtifactError(
            f"its architecture is {named!r}, expected some of the kinds {', '.join(AttentionKind)}; write it again"
        )
    return [kind for kind in AttentionKind if kind in named]


def tensor_of(tensors: Mapping[str, np.ndarray], name: str, dtype: type[np.generic], ndim: int) -> np.ndarray:
    """Return a tensor of a file; raises :class:`ArtifactError` unless it has this dtype and number of dimensions."""
    if name not in tensors:
        raise ArtifactError(f"the tensor {name} is missing; write the file again")
    tensor = tensors[name]
    if tensor.dtype != dtype or tensor.ndim != ndim:
        raise ArtifactError(
            f"{name} is {tensor.dtype} of {tensor.ndim} dimensions, expected {dtype.__name__} of {ndim}; "
            "write the file again"
        )
    return tensor


def require_architecture(metadata: Mapping[str, Any], found: Mapping[str, list[int]]) -> None:
    """Raise :class:`ArtifactError` unless a file's metadata name the architecture *found* in its tensors."""
    if metadata["architecture"] != found:
        raise ArtifactError(f"its tensors are of {found}, its metadata says {metadata['architecture']}; write it again")


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


def words_for(n: int) -> int:
    """Words that hold *n* cells."""
    return -(-n // CELLS_PER_WORD)


def unpack_cells(words: np.ndarray, n: int) -> np.ndarray:
    """Invert :func:`pack_cells`: int64 (..., w) -> bool (..., n)."""
    bits = np.ascontiguousarray(words.astype("<u4")).view(np.uint8)
    return np.unpackbits(bits, axis=-1, count=n, bitorder="little").astype(bool)
