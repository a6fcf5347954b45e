"""Checkpoint surgery: put masks into a dense checkpoint without training, and average checkpoints."""

from __future__ import annotations

import argparse
import collections
import dataclasses
import itertools
import logging
import os
from collections.abc import Sequence
from typing import Any

import torch
from fairseq import tasks, utils
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from fairseq.models import ARCH_CONFIG_REGISTRY, ARCH_MODEL_REGISTRY, MODEL_REGISTRY
from fairseq.models.nat.fairseq_nat_model import FairseqNATModel
from fairseq.models.roberta import RobertaModel
from fairseq.models.transformer import TransformerModel, TransformerModelBase, transformer_legacy
from fairseq.models.transformer_align import TransformerAlignModel
from fairseq.models.transformer_from_pretrained_xlm import TransformerFromPretrainedXLMModel
from fairseq.models.transformer_lm import TransformerLanguageModel
from omegaconf import OmegaConf
from torch import nn

from ap_fairseq.artifacts import CONTENTS, PruningMasks
from ap_fairseq.compat import allow_fairseq_checkpoints, drop_bettertransformer_copies
from ap_fairseq.files import ArtifactError, UserError, atomic_output, not_written, refuse_existing, require_file
from ap_fairseq.model.config import PrunedLanguageModelConfig, PrunedTransformerConfig
from ap_fairseq.model.language_model import PrunedLanguageModel
from ap_fairseq.model.pruned_model import MASK_ENTRIES
from ap_fairseq.model.roberta import PrunedRobertaModel
from ap_fairseq.model.transformer import PrunedTransformerModel
from ap_fairseq.provenance import dictionary_files

logger = logging.getLogger(__name__)

RECORDABLE = (TransformerModelBase, TransformerLanguageModel, RobertaModel)

# Each pruned model, and the models of fairseq's whose parameters and function are its own.
CONVERTIBLE: dict[type, tuple[type, ...]] = {
    PrunedTransformerModel: (
        TransformerModel,
        TransformerModelBase,
        TransformerAlignModel,
        TransformerFromPretrainedXLMModel,
    ),
    PrunedLanguageModel: (TransformerLanguageModel,),
    PrunedRobertaModel: (RobertaModel,),
}


def stored_model(state: dict[str, Any]) -> tuple[str | None, type | None]:
    """Return the architecture that a checkpoint names, and the model class that is registered for it, if any."""
    stored = state["cfg"]["model"] if state.get("cfg") else state["args"]
    settings = vars(stored) if isinstance(stored, argparse.Namespace) else dict(stored)
    name = settings.get("arch") or settings.get("_name")
    return name, ARCH_MODEL_REGISTRY.get(name) or MODEL_REGISTRY.get(name)


def recordable_architectures() -> dict[str, type]:
    """Return the registered architectures whose attention is of the three kinds, with their model classes."""
    models = {**MODEL_REGISTRY, **ARCH_MODEL_REGISTRY}
    return {
        name: model
        for name, model in models.items()
        if issubclass(model, RECORDABLE) and not issubclass(model, FairseqNATModel)
    }


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


def apply_masks(checkpoint, masks_file, output, data: str | None = None, overwrite: bool = False) -> dict[str, Any]:
    """Write a pruned checkpoint: the weights of *checkpoint* under the masks of *masks_file*, without training.

    Optimizer state is left out: the result is for translating, or for ``--finetune-from-model``.

    Args:
        checkpoint: path of a dense ``transformer*``, ``transformer_lm*``, ``roberta*`` or a pruned checkpoint.
        masks_file: path, or ``none`` to keep every cell.
        data: data-bin folder with the dictionaries; default: the one stored in the checkpoint.

    Returns:
        The provenance stored with the masks.

    Raises:
        ArtifactError: if a file is missing or damaged, the architecture is not a transformer, or masks and model do not
            belong together.
    """
    refuse_existing(output, overwrite, (checkpoint, masks_file))
    model, _, state = open_with_masks(checkpoint, masks_file, data)
    own = {"cfg": state["cfg"], "model": model.state_dict(), "task_state": state.get("task_state", {})}
    save_checkpoint(without_training(state, own), output, overwrite)
    return model.masks_provenance()


def open_with_masks(checkpoint, masks_file, data: str | None = None):
    """Return (model, task, state): the weights of *checkpoint* in a pruned model under the given masks.

    Args and errors as for :func:`apply_masks`, but with None for *masks_file* the masks are those of the checkpoint;
    ``state["cfg"]`` is the configuration of the pruned model.
    """
    if masks_file is not None and str(masks_file) != "none":
        require_file(masks_file, CONTENTS[PruningMasks.FORMAT])
    state = _with_pruned_config(load_checkpoint(checkpoint), checkpoint)
    cfg = OmegaConf.create(state["cfg"], flags={"allow_objects": True})
    if data is not None:
        if os.path.isdir(data) and os.pathsep in str(data):
            raise UserError(f"--data {data}: fairseq splits paths at {os.pathsep!r}; rename or link the folder")
        cfg.task.data = str(data)
    folder = utils.split_paths(cfg.task.data)[0]
    if not dictionary_files(folder):
        raise ArtifactError(f"the dictionaries of {checkpoint} are not in {folder}; pass --data DIR")
    task = tasks.setup_task(cfg.task, from_checkpoint=True)
    cfg.model.attention_masks = None if masks_file is None else str(masks_file)
    if str(masks_file) == "none":  # those of a pruned checkpoint are not kept
        state["model"] = without_masks(state["model"])
    model = task.build_model(cfg.model, from_checkpoint=True)
    load_parameters(model, state["model"], checkpoint, cfg.model)
    return model, task, state


def load_parameters(model: nn.Module, parameters: dict[str, torch.Tensor], path, model_cfg) -> None:
    """Load *parameters* into a model.

    Raises:
        ArtifactError: if they do not fit, naming the first that does not.
    """
    try:
        model.load_state_dict(parameters, strict=True, model_cfg=model_cfg)
    except RuntimeError as error:
        reasons = [line.strip() for line in str(error).splitlines()]
        raise ArtifactError(
            f"{path} is damaged, or of another model than it says: {reasons[min(1, len(reasons) - 1)]}"
        ) from error


def _with_pruned_config(state: dict[str, Any], checkpoint) -> dict[str, Any]:
    """Return *state* with a ``cfg`` whose model is the pruned one of the same sizes."""
    if state.get("cfg"):
        cfg = OmegaConf.to_container(OmegaConf.create(state["cfg"], flags={"allow_objects": True}))
    else:
        cfg = OmegaConf.to_container(convert_namespace_to_omegaconf(state["args"]))
    name, model = stored_model(state)
    try:
        cfg["model"] = pruned_options(name, model, cfg["model"])
    except UserError as error:
        raise ArtifactError(f"{checkpoint}: {error}") from error
    drop_bettertransformer_copies(state["model"])
    return {**state, "cfg": cfg}


def pruned_options(name: str | None, model: type | None, stored) -> dict[str, Any]:
    """Return the options of the pruned model that computes what a stored model does.

    Args:
        name: its architecture.
        model: the class registered for that.
        stored: its options, as a Namespace or a (nested) dictionary.

    Raises:
        UserError: if none does.
    """
    given = argparse.Namespace(**_flattened(stored))
    if model is None and {"encoder_layers", "decoder_layers", "share_all_embeddings"} <= vars(given).keys():
        logger.warning(
            f"the architecture {name!r} is not registered here; it has the options of fairseq's transformer and is "
            "taken for one, if its parameters agree (--user-dir DIR tells)"
        )
        model = TransformerModel
    pruned = next((ours for ours, stock in CONVERTIBLE.items() if issubclass(model or object, (ours, *stock))), None)
    if pruned is None:
        hint = "; pass the --user-dir that registers it" if model is None else ""
        raise UserError(
            f"it holds a model {name!r}; masks apply to fairseq's encoder-decoder transformer*, to transformer_lm* and "
            f"to roberta*{hint}"
        )
    if model not in (pruned, *CONVERTIBLE[pruned]):
        raise UserError(
            f"its model {name!r} is a class of its own ({model.__module__}.{model.__qualname__}), which "
            f"{pruned.__name__} may not compute"
        )
    if getattr(given, "full_context_alignment", False):
        raise UserError(
            "it was trained with --full-context-alignment, whose decoder reads words to come: masks of decoder_self "
            "are defined for causal attention only, so it cannot be converted"
        )
    if pruned is PrunedRobertaModel:
        ARCH_CONFIG_REGISTRY[name](given)
        return {**vars(given), "_name": "pruned_roberta", "arch": "pruned_roberta"}
    if pruned is PrunedLanguageModel:
        return {**dataclasses.asdict(PrunedLanguageModelConfig.from_namespace(given)), "_name": "pruned_transformer_lm"}
    ARCH_CONFIG_REGISTRY.get(name, transformer_legacy.base_architecture)(given)
    transformer_legacy.base_architecture(given)
    return {**dataclasses.asdict(PrunedTransformerConfig.from_namespace(given)), "_name": "pruned_transformer"}


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
        parameters = state["model"]
        if totals and parameters.keys() != totals.keys():
            different = sorted(parameters.keys() ^ totals.keys())
            raise ArtifactError(f"{path} and {paths[0]} hold different parameters, e.g. {different[0]}")
        for name, value in parameters.items():
            if not value.is_floating_point():
                if not torch.equal(totals.setdefault(name, value), value):
                    raise ArtifactError(f"{name} differs between {path} and {paths[0]}: do they have the same masks?")
                continue
            if not value.isfinite().all():
                raise ArtifactError(f"{path}: {name} is not finite: the model diverged; leave that checkpoint out")
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
