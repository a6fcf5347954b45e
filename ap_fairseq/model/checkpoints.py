"""Checkpoint surgery: put masks into a dense checkpoint without training, and average checkpoints."""

from __future__ import annotations

import argparse
import collections
import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from fairseq import tasks, utils
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from fairseq.models.transformer import transformer_legacy
from omegaconf import OmegaConf

from ap_fairseq.compat import allow_fairseq_checkpoints
from ap_fairseq.files import ArtifactError, atomic_output, not_written, refuse_existing
from ap_fairseq.model.config import PrunedTransformerConfig

MODEL = "pruned_transformer"


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


def apply_masks(checkpoint, masks_file, output, data: str | None = None, overwrite: bool = False) -> dict[str, Any]:
    """Write a pruned checkpoint: the weights of *checkpoint* under the masks of *masks_file*, without training.

    Optimizer state is left out: the result is for translating, or for ``--finetune-from-model``.

    Args:
        checkpoint: path of a dense ``transformer*`` or a pruned checkpoint.
        data: data-bin folder with the dictionaries; default: the one stored in the checkpoint.

    Returns:
        The provenance stored with the masks.

    Raises:
        ArtifactError: if a file is missing or damaged, the architecture is no transformer, or masks and model do not
            belong together.
    """
    refuse_existing(output, overwrite, (checkpoint, masks_file))
    model, _, state = open_with_masks(checkpoint, masks_file, data)
    result = {
        "args": None,
        "cfg": state["cfg"],
        "model": model.state_dict(),
        "criterion": None,
        "optimizer_history": state.get("optimizer_history", [])[-1:],
        "task_state": state.get("task_state", {}),
        "extra_state": {},
        "last_optimizer_state": None,
    }
    save_checkpoint(utils.move_to_cpu(result), output, overwrite)
    return model.masks_provenance()


def open_with_masks(checkpoint, masks_file, data: str | None = None):
    """Return (model, task, state): the weights of *checkpoint* in a ``pruned_transformer`` under the given masks.

    Args and errors as for :func:`apply_masks`; ``state["cfg"]`` is the configuration of the pruned model.
    """
    state = _with_pruned_config(load_checkpoint(checkpoint), checkpoint)
    cfg = OmegaConf.create(state["cfg"], flags={"allow_objects": True})
    if data is not None:
        cfg.task.data = str(data)
    folder = utils.split_paths(cfg.task.data)[0]
    if not any(Path(folder).glob("dict.*.txt")):
        raise ArtifactError(f"the dictionaries of {checkpoint} are not in {folder}; pass --data DIR")
    task = tasks.setup_task(cfg.task, from_checkpoint=True)
    cfg.model.attention_masks = str(masks_file)
    model = task.build_model(cfg.model, from_checkpoint=True)
    model.load_state_dict(state["model"], strict=True, model_cfg=cfg.model)
    return model, task, state


def _with_pruned_config(state: dict[str, Any], checkpoint) -> dict[str, Any]:
    """Return *state* with a ``cfg`` whose model is ``pruned_transformer`` of the same sizes."""
    if state.get("cfg"):
        cfg = OmegaConf.to_container(OmegaConf.create(state["cfg"], flags={"allow_objects": True}))
    else:
        legacy = convert_namespace_to_omegaconf(state["args"])
        cfg = OmegaConf.to_container(legacy)
    stored = cfg["model"]
    name = stored.get("_name") if isinstance(stored, dict) else getattr(stored, "_name", getattr(stored, "arch", None))
    if name is not None and name.startswith(MODEL):
        return {**state, "cfg": cfg}
    if name is None or not name.startswith("transformer") or name.startswith("transformer_lm"):
        raise ArtifactError(
            f"{checkpoint} holds a model {name!r}; masks apply to fairseq's encoder-decoder transformer* architectures"
        )
    sizes = argparse.Namespace(**_flattened(stored))
    transformer_legacy.base_architecture(sizes)
    cfg["model"] = {**dataclasses.asdict(PrunedTransformerConfig.from_namespace(sizes)), "_name": MODEL}
    return {**state, "cfg": cfg}


def _flattened(stored) -> dict[str, Any]:
    """Return the flat names of a stored model configuration, which is a Namespace or a nested TransformerConfig."""
    if isinstance(stored, argparse.Namespace):
        return vars(stored)
    flat = {}
    for key, value in stored.items():
        if isinstance(value, dict):
            flat.update({f"{key}_{inner}": inner_value for inner, inner_value in value.items()})
        else:
            flat[key] = value
    return flat


def average_checkpoints(paths: Sequence, output, overwrite: bool = False) -> None:
    """Write the mean of the parameters of several checkpoints; everything else comes from the last.

    Floating-point tensors are averaged in float64. Integer tensors are masks, positions and versions: they must agree.

    Raises:
        ArtifactError: if a file is missing or damaged, or parameters or masks differ between the files.
    """
    refuse_existing(output, overwrite, paths)
    totals: dict[str, torch.Tensor] = collections.OrderedDict()
    state: dict[str, Any] = {}
    for path in paths:
        state = load_checkpoint(path)
        parameters = state["model"]
        if totals and parameters.keys() != totals.keys():
            different = sorted(parameters.keys() ^ totals.keys())
            raise ArtifactError(f"{path} and {paths[0]} hold different parameters, e.g. {different[0]}")
        for name, value in parameters.items():
            if not value.is_floating_point():
                if not torch.equal(totals.setdefault(name, value), value):
                    raise ArtifactError(f"{name} differs between {path} and {paths[0]}: do they have the same masks?")
                continue
            total = totals.setdefault(name, torch.zeros_like(value, dtype=torch.float64))
            if total.shape != value.shape:
                raise ArtifactError(f"{name} has shape {value.shape} in {path}, {total.shape} in {paths[0]}")
            total += value
    dtypes = {name: value.dtype for name, value in state["model"].items()}
    state["model"] = collections.OrderedDict(
        (name, (total / len(paths)).to(dtypes[name]) if total.is_floating_point() else total)
        for name, total in totals.items()
    )
    save_checkpoint(state, output, overwrite)


def load_checkpoint(path: str | os.PathLike) -> dict[str, Any]:
    """Load a fairseq checkpoint on the CPU with torch's safe loader.

    Raises:
        ArtifactError: if the file is missing, unreadable or no fairseq checkpoint.
    """
    if not os.path.isfile(path):
        raise ArtifactError(f"checkpoint {path} does not exist")
    allow_fairseq_checkpoints()
    try:
        state = torch.load(path, map_location="cpu")
    except Exception as error:  # the unpickler raises whatever the bytes lead it to
        # torch's safe loader wraps its reason in instructions to turn it off.
        reasons = [line.strip() for line in str(error).splitlines()] or [type(error).__name__]
        reason = next((line for line in reasons if line.startswith("WeightsUnpickler error")), reasons[0])
        raise ArtifactError(f"{path} cannot be read as a checkpoint: {reason}") from error
    if not isinstance(state, dict) or "model" not in state or not (state.get("cfg") or state.get("args")):
        raise ArtifactError(f"{path} is no fairseq checkpoint: expected the entries 'model' and 'cfg' or 'args'")
    return state
