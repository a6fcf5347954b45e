"""Files of checkpoints: read and checked, averaged, written."""

from __future__ import annotations

import argparse
import collections
import itertools
import os
from collections.abc import Sequence
from typing import Any

import torch
from fairseq import utils
from fairseq.models import ARCH_MODEL_REGISTRY, MODEL_REGISTRY
from torch import nn

from ap_fairseq.compat import allow_fairseq_checkpoints
from ap_fairseq.files import ArtifactError, atomic_output, naming, not_written, refuse_existing, require_file
from ap_fairseq.model.attention import upgrade_masks
from ap_fairseq.model.pruned_model import MASK_ENTRIES


def stored_model(state: dict[str, Any]) -> tuple[str | None, type | None]:
    """Return the architecture that a checkpoint names, and the model class that is registered for it, if any."""
    stored = state["cfg"]["model"] if state.get("cfg") else state["args"]
    settings = vars(stored) if isinstance(stored, argparse.Namespace) else dict(stored)
    name = settings.get("arch") or settings.get("_name")
    return name, ARCH_MODEL_REGISTRY.get(name) or MODEL_REGISTRY.get(name)


def without_masks(parameters: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the parameters of a model without masks and their provenance."""
    return {name: value for name, value in parameters.items() if not name.endswith(MASK_ENTRIES)}


def without_training(state: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """Return a checkpoint of the entries *own*, whose training is not to go on, with the last optimizer of *state*."""
    nothing = {"args": None, "criterion": None, "task_state": {}, "extra_state": {}, "last_optimizer_state": None}
    return utils.move_to_cpu({**nothing, "optimizer_history": state.get("optimizer_history", [])[-1:], **own})


def save_checkpoint(state: dict[str, Any], path, overwrite: bool) -> None:
    """Write *state* to a temporary name and rename it.

    Raises:
        ArtifactError: if it cannot be written, for instance because the disk is full.
    """
    with atomic_output(path, overwrite) as temporary:
        try:
            torch.save(state, temporary)
        except RuntimeError as error:  # how torch's writer reports a full disk
            raise not_written(path, error) from error


def load_parameters(model: nn.Module, parameters: dict[str, torch.Tensor], path, model_cfg) -> None:
    """Load *parameters* into a model.

    Raises:
        ArtifactError: if they do not fit, naming the first that does not, or their masks are damaged.
    """
    try:
        with naming(path):
            model.load_state_dict(parameters, strict=True, model_cfg=model_cfg)
    except RuntimeError as error:
        reasons = [line.strip() for line in str(error).splitlines()]
        raise ArtifactError(
            f"{path} is damaged, or of another model than it says: {reasons[min(1, len(reasons) - 1)]}"
        ) from error


def average_checkpoints(paths: Sequence, output, overwrite: bool = False) -> None:
    """Write the mean of the parameters of several checkpoints; everything else comes from the last.

    Floating-point tensors are averaged in float64. Integer tensors are masks, positions and versions: they must agree.
    Masks of older versions of this package are brought into today's form.

    Raises:
        ArtifactError: if a file is missing, damaged or named twice, parameters or masks differ between the files, or a
            parameter is not finite.
    """
    refuse_existing(output, overwrite, paths)
    for first, second in itertools.combinations(paths, 2):
        if os.path.exists(first) and os.path.exists(second) and os.path.samefile(first, second):
            raise ArtifactError(f"{first} and {second} are one file, which would count twice; name it once")
    totals: dict[str, torch.Tensor] = collections.OrderedDict()
    state: dict[str, Any] = {}
    for path in paths:
        state = load_checkpoint(path)
        upgrade_masks(state["model"])
        _add(totals, state["model"], path, paths[0])
    dtypes = {name: value.dtype for name, value in state["model"].items()}
    state["model"] = collections.OrderedDict(
        (name, (total / len(paths)).to(dtypes[name]) if total.is_floating_point() else total)
        for name, total in totals.items()
    )
    save_checkpoint(state, output, overwrite)


def _add(totals: dict[str, torch.Tensor], parameters: dict[str, torch.Tensor], path, first) -> None:
    """Add the parameters of the checkpoint *path* to *totals*, which are as yet empty for the *first* one.

    Raises:
        ArtifactError: as :func:`average_checkpoints`.
    """
    if totals and parameters.keys() != totals.keys():
        name = min(parameters.keys() ^ totals.keys())
        has, lacks = (path, first) if name in parameters else (first, path)
        dense = name.endswith(MASK_ENTRIES)
        raise ArtifactError(
            f"{has} and {lacks} hold different parameters, e.g. {name}, which {lacks} lacks; "
            + ("give that one the same masks with ap-apply" if dense else "average checkpoints of one training")
        )
    for name, value in parameters.items():
        if not value.is_floating_point():
            if not torch.equal(totals.setdefault(name, value), value):
                raise ArtifactError(
                    f"{name} differs between {path} and {first}: do they have the same masks? Average checkpoints of "
                    "one training, after its last pruning"
                )
            continue
        if not value.isfinite().all():
            raise ArtifactError(f"{path}: {name} is not finite: the model diverged; leave that checkpoint out")
        total = totals.setdefault(name, torch.zeros_like(value, dtype=torch.float64))
        if total.shape != value.shape:
            raise ArtifactError(
                f"{name} has shape {tuple(value.shape)} in {path}, {tuple(total.shape)} in {first}; average "
                "checkpoints of one training"
            )
        total += value


def load_checkpoint(path: str | os.PathLike) -> dict[str, Any]:
    """Load a fairseq checkpoint on the CPU with torch's safe loader.

    Raises:
        ArtifactError: if the file is missing, unreadable or not a fairseq checkpoint.
    """
    require_file(path, "a fairseq checkpoint")
    allow_fairseq_checkpoints()
    try:
        state = torch.load(path, map_location="cpu")
    except Exception as error:  # the unpickler raises whatever the bytes lead it to
        # torch's safe loader wraps its reason in instructions to turn it off.
        lines = [line.strip() for line in str(error).splitlines()]
        reason = next((line for line in lines if line.startswith("WeightsUnpickler error")), None)
        if reason is None:
            reason = f"{type(error).__name__}: {lines[0]}" if lines and "weights_only" not in lines[0] else "no weights"
        raise ArtifactError(
            f"{path} cannot be read as a checkpoint ({reason}): it is cut off, damaged or of another kind; copy it "
            "again, or name another file"
        ) from error
    _require_entries(state, path)
    return state


def _require_entries(state: Any, path) -> None:
    if not isinstance(state, dict) or "model" not in state or not (state.get("cfg") or state.get("args")):
        raise ArtifactError(
            f"{path} is not a fairseq checkpoint: expected the entries 'model' and 'cfg' or 'args'; name a file that "
            "fairseq-train wrote"
        )
    if not isinstance(state["model"], dict):
        raise ArtifactError(f"{path} is damaged: its entry 'model' is a {type(state['model']).__name__}")
    for name, value in state["model"].items():
        if not isinstance(value, torch.Tensor):
            raise ArtifactError(f"{path} is damaged: its parameter {name} is a {type(value).__name__}, not a tensor")
    for group in ("model", "task"):
        if state.get("cfg") and not state["cfg"].get(group):
            raise ArtifactError(f"{path} is damaged: its entry 'cfg' has no {group!r}")
