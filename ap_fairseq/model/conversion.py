"""Checkpoints of fairseq's models as checkpoints of pruned ones: the same weights under masks, without training."""

from __future__ import annotations

import argparse
import dataclasses
import logging
import os
from typing import Any

from fairseq import utils
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from fairseq.models import ARCH_CONFIG_REGISTRY
from fairseq.models.roberta import RobertaModel
from fairseq.models.transformer import TransformerModel, TransformerModelBase, transformer_legacy
from fairseq.models.transformer_align import TransformerAlignModel
from fairseq.models.transformer_from_pretrained_xlm import TransformerFromPretrainedXLMModel
from fairseq.models.transformer_lm import TransformerLanguageModel
from omegaconf import OmegaConf

from ap_fairseq.artifacts import CONTENTS, PruningMasks
from ap_fairseq.compat import drop_bettertransformer_copies
from ap_fairseq.data_bin import setup_task
from ap_fairseq.files import ArtifactError, UserError, refuse_existing, require_file
from ap_fairseq.model.checkpoints import (
    load_checkpoint,
    load_parameters,
    save_checkpoint,
    stored_model,
    without_masks,
    without_training,
)
from ap_fairseq.model.config import PrunedLanguageModelConfig, PrunedTransformerConfig
from ap_fairseq.model.language_model import PrunedLanguageModel
from ap_fairseq.model.roberta import PrunedRobertaModel
from ap_fairseq.model.transformer import PrunedTransformerModel
from ap_fairseq.provenance import dictionary_files, lost_masks

logger = logging.getLogger(__name__)

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
    if str(masks_file) == "none":
        warn_of_dropped(state, checkpoint)
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
    task = setup_task(cfg.task, from_checkpoint=True)
    cfg.model.attention_masks = None if masks_file is None else str(masks_file)
    # With none, those of a pruned checkpoint are not kept.
    parameters = without_masks(state["model"]) if str(masks_file) == "none" else state["model"]
    model = task.build_model(cfg.model, from_checkpoint=True)
    load_parameters(model, parameters, checkpoint, cfg.model)
    return model, task, state


def warn_of_dropped(state: dict[str, Any], checkpoint) -> None:
    """Log the masks of a checkpoint that is used without them, if they prune anything."""
    if lost := lost_masks(state["model"]):
        logger.warning(f"the masks of {checkpoint} are dropped: {lost}")


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
