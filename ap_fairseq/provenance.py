"""Where artifacts come from: versions, dictionary hashes, and the provenance that a checkpoint stores."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ap_fairseq.files import ArtifactError
from ap_fairseq.version import __version__

_MASKS_REMEDY = (
    "copy the checkpoint again, or give it the masks that it was trained with (ap-apply CHECKPOINT --attention-masks "
    "FILE)"
)
OTHER_MASKS = (
    "the masks in this checkpoint do not match the SHA-256 stored with them; it is damaged, or an average of "
    f"checkpoints with different masks; {_MASKS_REMEDY}"
)
OTHER_DIRECTION = "the masks were recorded in another direction: "  # and which
NO_PROVENANCE = f"this checkpoint holds attention masks without their provenance (mask_metadata); {_MASKS_REMEDY}"


def encode_provenance(provenance: dict[str, Any]) -> Tensor:
    """Return a JSON document as int64 (n,), one character each."""
    return torch.tensor([ord(c) for c in json.dumps(provenance, sort_keys=True)], dtype=torch.int64)


def decode_provenance(codes: Tensor | None) -> dict[str, Any] | None:
    """Invert :func:`encode_provenance`; None for an absent or empty tensor.

    Raises:
        ArtifactError: if the codes are not a JSON document that names masks and their effective sparsity.
    """
    if codes is None or codes.numel() == 0:
        return None
    try:
        provenance = json.loads("".join(map(chr, codes.tolist())))
        if not isinstance(provenance["masks_sha256"], str):
            raise TypeError("masks_sha256 is not a string")
        if not all(isinstance(sha, str) for sha in dict(provenance.get("dictionaries", {})).values()):
            raise TypeError("dictionaries are not hashes by side")
        effective_sparsity(provenance)
    except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
        raise ArtifactError(
            f"the provenance of the masks in this checkpoint (mask_metadata) is damaged ({type(error).__name__}: "
            f"{error}); {_MASKS_REMEDY}"
        ) from error
    return provenance


def stored_provenance(parameters: Mapping[str, Tensor]) -> dict[str, Any] | None:
    """Return the provenance of the masks among the parameters of a checkpoint, or None if it has no masks.

    Raises:
        ArtifactError: if it has masks without provenance, or that is damaged.
    """
    provenance = decode_provenance(parameters.get("mask_metadata"))
    if provenance is None and any(name.endswith("mask_range") and x.any() for name, x in parameters.items()):
        raise ArtifactError(NO_PROVENANCE)
    return provenance


def lost_masks(parameters: Mapping[str, Tensor], instead: str | None = None) -> str | None:
    """Describe the masks of a checkpoint that are replaced; None if it has none, or they keep every pair.

    Args:
        parameters: of the checkpoint.
        instead: SHA-256 of the masks that replace them; None also if they are the same.
    """
    try:
        provenance = stored_provenance(parameters)
    except ArtifactError:  # which replacing them mends
        return "their provenance is damaged"
    shares = effective_sparsity(provenance)
    if provenance is None or provenance["masks_sha256"] == instead or (shares and not any(shares.values())):
        return None
    return describe_sparsity(provenance)


def effective_sparsity(provenance: dict[str, Any] | None) -> dict[str, float]:
    """Return the effective sparsity of each kind, in [0, 1]; empty without masks."""
    return {kind: value["effective"] for kind, value in (provenance or {}).get("sparsity", {}).items()}


def total_sparsity(provenance: dict[str, Any] | None) -> float:
    """Return the effective sparsity over all kinds, in [0, 1]; 0 without masks."""
    return (provenance or {}).get("total", {}).get("effective", 0.0)


_RENAMED = {
    "procedure": "criterion",
    "pool": "smooth",
    "beyond": "extrapolate",
    "effective": "mean",
    "relative": "diagonal-mean",
    "as-published": "percentile",
}


def mask_spec(provenance: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of the :class:`~ap_fairseq.pruning.spec.MaskSpec` of the masks; empty if they have none.

    Checkpoints of version 0.1 stored them as ``procedure``, in other words.
    """
    if "spec" in provenance:
        return provenance["spec"]
    old = provenance.get("procedure", {})
    words = {key: _RENAMED.get(value, value) if isinstance(value, str) else value for key, value in old.items()}
    return {_RENAMED.get(key, key): value for key, value in words.items()}


def describe_sparsity(provenance: dict[str, Any]) -> str:
    """Return e.g. ``effective sparsity encoder_self 50.0%, cross 49.9% (mean, granularity 1)``."""
    spec = mask_spec(provenance)
    shares = ", ".join(f"{kind} {share:.1%}" for kind, share in effective_sparsity(provenance).items()) or "not told"
    granularity = spec.get("granularity")
    if isinstance(granularity, dict):
        granularity = ", ".join(f"{kind} {size}" for kind, size in sorted(granularity.items()))
    details = f" ({spec['criterion']}, granularity {granularity})" if "criterion" in spec else ""
    return f"effective sparsity {shares}{details}"


def dictionary_sha256(dictionary) -> str:
    """Return the SHA-256 of the symbols of a :class:`fairseq.data.Dictionary`, in order; counts do not matter."""
    return hashlib.sha256("\n".join(dictionary.symbols).encode()).hexdigest()


def dictionary_files(folder) -> list[Path]:
    """Return the dictionaries of a data-bin: of two languages, of one text, or of the parts of a classification set."""
    return [*sorted(Path(folder).glob("dict*.txt")), *sorted(Path(folder).glob("*/dict.txt"))]


def dictionary_hashes(task) -> dict[str, str]:
    """Return ``{"source": sha256, "target": sha256}`` of a fairseq task's dictionaries."""
    return {"source": dictionary_sha256(task.source_dictionary), "target": dictionary_sha256(task.target_dictionary)}


def versions() -> dict[str, str]:
    """Return the versions of everything that can change a number."""
    return {
        "ap_fairseq": __version__,
        "fairseq": importlib.metadata.version("ve-fairseq"),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
