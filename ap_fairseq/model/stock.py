"""Dense models of this package as checkpoints of fairseq's own models."""

from __future__ import annotations

import argparse
import collections
import copy
from typing import Any

from fairseq.models import build_model
from fairseq.models.transformer_lm import TransformerLanguageModelConfig
from fairseq.tasks.language_modeling import LanguageModelingConfig
from fairseq.tasks.translation import TranslationConfig
from omegaconf import OmegaConf

from ap_fairseq.files import ArtifactError, refuse_existing
from ap_fairseq.model.checkpoints import (
    load_checkpoint,
    load_parameters,
    save_checkpoint,
    stored_model,
    without_masks,
    without_training,
)
from ap_fairseq.model.config import OWN_DEFAULTS
from ap_fairseq.model.conversion import open_with_masks, warn_of_dropped
from ap_fairseq.model.pruned_model import PrunedModel
from ap_fairseq.model.roberta import PrunedRobertaModel
from ap_fairseq.provenance import describe_sparsity
from ap_fairseq.sites import attention_sites

# The models and tasks of this package, and fairseq's own; of a task with its options.
MODELS = {"pruned_transformer": "transformer", "pruned_transformer_lm": "transformer_lm", "pruned_roberta": "roberta"}
TASKS = {
    "pruned_translation": ("translation", TranslationConfig),
    "pruned_language_modeling": ("language_modeling", LanguageModelingConfig),
}


def convert_to_stock(checkpoint, output, drop_masks: bool = False, data: str | None = None, overwrite: bool = False):
    """Write a pruned checkpoint whose masks keep everything as one of fairseq's own model.

    Its form is that of ``fairseq-train``, so fairseq reads it without this plugin, and CTranslate2's converter does.

    Args:
        drop_masks: compute the pairs that the masks prune, which a model trained under them was not trained to use.
        data: data-bin folder with the dictionaries; default: the one stored in the checkpoint.

    Raises:
        ArtifactError: if masks prune anything and are not to be dropped, or the architecture is fairseq's already.
    """
    refuse_existing(output, overwrite, (checkpoint,))
    state = load_checkpoint(checkpoint)
    name, model_class = stored_model(state)
    if model_class is not None and not issubclass(model_class, PrunedModel):
        raise ArtifactError(
            f"{checkpoint} holds a model {name!r}; --to-stock takes {', '.join(MODELS)}, and fairseq's own "
            "architectures need no conversion"
        )
    model, task, state = open_with_masks(checkpoint, "none" if drop_masks else None, data)
    if drop_masks:
        warn_of_dropped(state, checkpoint)
    require_dense(model, state["cfg"]["model"], checkpoint)
    cfg = {**state["cfg"], "model": stock_options(state["cfg"]), "task": _stock_task(state["cfg"]["task"])}
    parameters = without_masks(model.state_dict())
    given = OmegaConf.create(copy.deepcopy(cfg), flags={"allow_objects": True}).model
    if isinstance(model, PrunedRobertaModel):
        given.load_checkpoint_heads = True  # those of a classifier
    load_parameters(build_model(given, task), dict(parameters), checkpoint, given)
    own = {"cfg": cfg, "model": collections.OrderedDict(parameters)}
    save_checkpoint(without_training(state, own), output, overwrite)


def require_dense(model: PrunedModel, options: dict[str, Any], checkpoint) -> None:
    """Raise :class:`ArtifactError` unless the model computes what fairseq's own does."""
    given = [name for name in ("attention_top_k", "attention_threshold") if options.get(name) is not None]
    if given:
        flag = f"--{given[0].replace('_', '-')} {options[given[0]]}"
        raise ArtifactError(f"{checkpoint} has {flag}, which fairseq's own model cannot do; it cannot be --to-stock")
    # One row and column beyond the recorded range: these have all offsets of the diagonals that continue a mask.
    if all(module.keeps_all(*(module.mask_range + 1).tolist()) for _, module in attention_sites(model)):
        return
    pruned = describe_sparsity(model.masks_provenance() or {})
    raise ArtifactError(
        f"{checkpoint} has masks ({pruned}); fairseq's own model would compute the pruned pairs, too, and do worse "
        "than it does under its masks. Use it with --user-dir, or drop the masks with --attention-masks none "
        "--to-stock, and fine-tune what that writes"
    )


def stock_options(cfg: dict[str, Any]) -> argparse.Namespace | dict[str, Any]:
    """Return the options of fairseq's model that has the sizes of a pruned one, as ``fairseq-train`` stores them.

    They are a dictionary for a language model, and else those of the model beside those of the task.

    Args:
        cfg: configuration of a checkpoint of a pruned model.
    """
    arch = MODELS[cfg["model"]["_name"]]
    if arch == "transformer_lm":
        fields = TransformerLanguageModelConfig.__dataclass_fields__
        return {**{name: value for name, value in cfg["model"].items() if name in fields}, "_name": arch}
    options = {name: value for name, value in cfg["model"].items() if name not in (*OWN_DEFAULTS, "_name")}
    layer, heads = (cfg["model"].get(f"alignment_{name}") for name in ("layer", "heads"))
    if layer is not None or heads is not None:
        arch = "transformer_align"
        options["alignment_layer"] = options["decoder_layers"] - 1 if layer is None else layer
        options["alignment_heads"] = options["decoder_attention_heads"] if heads is None else heads
    task = _stock_task(cfg["task"])
    return argparse.Namespace(**{**task, **options, "_name": arch, "arch": arch, "task": task["_name"]})


def _stock_task(task: dict[str, Any]) -> dict[str, Any]:
    """Return the options of fairseq's own task for those of one of this package; others stay."""
    if task["_name"] not in TASKS:
        return task
    stock, config = TASKS[task["_name"]]
    return {**{name: value for name, value in task.items() if name in config.__dataclass_fields__}, "_name": stock}
