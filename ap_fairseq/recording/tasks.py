"""The fairseq tasks under which models are recorded, and their settings."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fairseq.criterions import FairseqCriterion
from fairseq.dataclass import FairseqDataclass
from fairseq.models import ARCH_MODEL_REGISTRY, MODEL_REGISTRY, BaseFairseqModel
from fairseq.models.nat.fairseq_nat_model import FairseqNATModel
from fairseq.models.roberta import RobertaModel
from fairseq.models.transformer import TransformerModelBase
from fairseq.models.transformer_lm import TransformerLanguageModel
from fairseq.tasks import FairseqTask
from fairseq.tasks.language_modeling import LanguageModelingConfig, LanguageModelingTask
from fairseq.tasks.masked_lm import MaskedLMConfig, MaskedLMTask
from fairseq.tasks.sentence_prediction import SentencePredictionConfig
from fairseq.tasks.translation import TranslationConfig, TranslationTask

from ap_fairseq.provenance import dictionary_hashes, versions


@dataclass(frozen=True)
class RecordedTask:
    """A task of fairseq's and what recording makes of its settings.

    Attributes:
        name, config: as fairseq registers it.
        models: what it records.
        fixed: settings that recording needs, whatever the checkpoint was trained with.
        refused: settings that change what is recorded and are the checkpoint's, with their short flags.
        chosen: settings that a command line may choose; the checkpoint's are the default.
        flags: of fairseq-validate, to which settings of the task refer.
    """

    name: str
    config: type[FairseqDataclass]
    models: type[BaseFairseqModel]
    fixed: Mapping[str, Any] = field(default_factory=dict)
    refused: Mapping[str, str | None] = field(default_factory=dict)
    chosen: tuple[str, ...] = ()
    flags: tuple[str, ...] = ()

    def settings(self, stored: Mapping[str, Any], data: str, chosen: Mapping[str, Any]) -> dict[str, Any]:
        """Return the settings of the task for recording: those *stored* in the checkpoint, but for a few."""
        kept = {name: value for name, value in stored.items() if name in self.config.__dataclass_fields__}
        return {**kept, **self.fixed, **chosen, "_name": self.name, "data": data}


BLOCKS = ("tokens_per_sample", "sample_break_mode")

TASKS = (
    RecordedTask(
        "translation",
        TranslationConfig,
        TransformerModelBase,
        # Statistics are indexed by token position, so every sentence starts in column 0. Buckets only add padding.
        fixed={"left_pad_source": False, "left_pad_target": False, "eval_bleu": False, "num_batch_buckets": 0},
        refused={
            "source_lang": "-s",
            "target_lang": "-t",
            "max_source_positions": None,
            "max_target_positions": None,
            "truncate_source": None,
        },
    ),
    RecordedTask(
        "language_modeling",
        LanguageModelingConfig,
        TransformerLanguageModel,
        fixed={"pad_to_fixed_length": False, "pad_to_fixed_bsz": False},
        refused={"add_bos_token": None, "output_dictionary_size": None, "max_target_positions": None},
        chosen=BLOCKS,
    ),
    RecordedTask(
        "masked_lm",
        MaskedLMConfig,
        RobertaModel,
        refused={"mask_prob": None, "leave_unmasked_prob": None, "random_token_prob": None},
        chosen=BLOCKS,
    ),
    RecordedTask(
        "sentence_prediction",
        SentencePredictionConfig,
        RobertaModel,
        refused={"init_token": None, "separator_token": None, "num_classes": None, "max_positions": None},
        flags=("--criterion", "sentence_prediction"),
    ),
)


RECORDABLE = tuple({task.models for task in TASKS})


def recordable_architectures() -> dict[str, type]:
    """Return the registered architectures that can be recorded, with their model classes."""
    models = {**MODEL_REGISTRY, **ARCH_MODEL_REGISTRY}
    return {
        name: model
        for name, model in models.items()
        if issubclass(model, RECORDABLE) and not issubclass(model, FairseqNATModel)
    }


def stored_task(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return the task of a checkpoint's ``cfg``, or the flat ``args`` that fairseq stored before 0.10."""
    settings = state["cfg"]["task"] if state.get("cfg") else state["args"]
    return vars(settings).copy() if isinstance(settings, argparse.Namespace) else dict(settings)


def recorded_task(model: type, stored: Mapping[str, Any]) -> RecordedTask:
    """Return the task that records a class of models: its only one, or that of the settings *stored* with it."""
    tasks = [task for task in TASKS if issubclass(model, task.models)]
    name = str(stored.get("_name") or stored.get("task"))
    return next((task for task in tasks if name.endswith(task.name)), tasks[0])


def provenance(
    task: FairseqTask, folders: Sequence[str], subset: str, criterion: FairseqCriterion | None
) -> dict[str, Any]:
    """Return the provenance of statistics that a task records.

    Args:
        folders: those of the data.
        criterion: whose loss importance is of; None: there is no importance.
    """
    pair = {"languages": [task.cfg.source_lang, task.cfg.target_lang]} if isinstance(task, TranslationTask) else {}
    return {
        **pair,
        "data": [{"name": os.path.basename(os.path.abspath(folder)), "subset": subset} for folder in folders],
        "dictionaries": dictionary_hashes(task),
        "loss": None if criterion is None else type(criterion).__name__,
        "versions": versions(),
    }


def samples_of(task: FairseqTask) -> str:
    """Return what the samples of a task are, for its logs: ``sentences``, or ``blocks`` of running text."""
    return "blocks" if isinstance(task, LanguageModelingTask | MaskedLMTask) else "sentences"
