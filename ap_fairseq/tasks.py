"""Tasks that prune while they train and search on the device: ``pruned_translation``, ``pruned_language_modeling``."""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Optional  # fairseq's parser reads Optional[X], not X | None

from fairseq.models import ARCH_MODEL_REGISTRY, MODEL_REGISTRY, FairseqEncoderDecoderModel, FairseqLanguageModel
from fairseq.models.roberta import RobertaModel
from fairseq.tasks import register_task
from fairseq.tasks.language_modeling import LanguageModelingConfig, LanguageModelingTask
from fairseq.tasks.translation import TranslationConfig, TranslationTask

from ap_fairseq.files import UserError
from ap_fairseq.model.head_masking import HeadMasking
from ap_fairseq.search.alignment import PrunedSequenceGeneratorWithAlignment
from ap_fairseq.search.generator import PrunedSequenceGenerator
from ap_fairseq.search.task import SearchOnDevice, SearchOnDeviceConfig
from ap_fairseq.training.task import PruningWhileTraining, PruningWhileTrainingConfig

TASK_OF = {
    FairseqEncoderDecoderModel: "pruned_translation",
    FairseqLanguageModel: "pruned_language_modeling",
    RobertaModel: "masked_lm or sentence_prediction",
}


def require_model_of(task: str, cfg: Any) -> None:
    """Raise UserError if *cfg*, of a model to build, names one that another task of :data:`TASK_OF` has."""
    name = getattr(cfg, "arch", None) or getattr(cfg, "_name", None)
    model = ARCH_MODEL_REGISTRY.get(name) or MODEL_REGISTRY.get(name) or object
    for kind, other in TASK_OF.items():
        if issubclass(model, kind) and other != task:
            raise UserError(
                f"--task {task}: {name} is not one of its models; give --task {other} and data for that, or another "
                "model"
            )


@dataclass
class PrunedTranslationConfig(SearchOnDeviceConfig, PruningWhileTrainingConfig, TranslationConfig):
    """fairseq's configuration of ``translation``, how to search, when and how much to prune, which heads to mask."""

    head_masking: Optional[str] = field(
        default=None,
        metadata={
            "help": "for analysis: file with a line for each sentence of the subset, of 0 and 1 for each source token "
            "(the last for its end of sentence): 1 = --masked-heads may attend to it (Cao and Wang 2021)"
        },
    )
    masked_heads: Optional[str] = field(
        default=None,
        metadata={"help": "cross-attention heads of --head-masking: LAYER:HEAD,LAYER:HEAD,..., counted from 0"},
    )


@register_task("pruned_translation", dataclass=PrunedTranslationConfig)
class PrunedTranslationTask(SearchOnDevice, PruningWhileTraining, TranslationTask):
    """``translation`` that prunes pruned transformers while they train, and whose search is decided on the device."""

    def __init__(self, cfg, *args, **kwargs):
        super().__init__(cfg, *args, **kwargs)
        options = (getattr(cfg, name, None) for name in ("head_masking", "masked_heads"))  # fairseq's own has neither
        self.head_masking = HeadMasking.from_options(*options)

    def build_model(self, cfg, from_checkpoint=False):
        require_model_of("pruned_translation", cfg)
        return super().build_model(cfg, from_checkpoint)

    def load_dataset(self, split, *args, **kwargs):
        super().load_dataset(split, *args, **kwargs)
        if self.head_masking is not None:
            self.head_masking.require_sentences(split, len(self.datasets[split]))

    def inference_step(self, generator, models, sample, prefix_tokens=None, constraints=None):
        """As fairseq's; heads are masked meanwhile, if that was asked for.

        Raises:
            UserError: if they are to be masked for sentences of no subset, such as those of ``fairseq-interactive``.
        """
        masking = self.head_masking
        if masking is not None and not self.datasets:
            raise UserError(
                f"--head-masking {masking.path}: its lines belong to the sentences of a binarised subset, these are of "
                "none; use fairseq-generate"
            )
        with contextlib.nullcontext() if masking is None else masking.applied(models, sample):
            return super().inference_step(generator, models, sample, prefix_tokens, constraints)


@dataclass
class PrunedLanguageModelingConfig(SearchOnDeviceConfig, PruningWhileTrainingConfig, LanguageModelingConfig):
    """fairseq's configuration of ``language_modeling``, how to search, and when and how much to prune."""

    prune_sample: int = field(default=500, metadata={"help": "training blocks that a pruning records"})


@register_task("pruned_language_modeling", dataclass=PrunedLanguageModelingConfig)
class PrunedLanguageModelingTask(SearchOnDevice, PruningWhileTraining, LanguageModelingTask):
    """``language_modeling`` that prunes a ``pruned_transformer_lm`` while it trains, and searches on the device."""

    def build_model(self, cfg, from_checkpoint=False):
        require_model_of("pruned_language_modeling", cfg)
        return super().build_model(cfg, from_checkpoint)

    def load_dataset(self, split, *args, **kwargs):
        tokens = self.args.tokens_per_sample
        if tokens < 1 and self.args.sample_break_mode != "eos":  # a ZeroDivisionError
            raise UserError(
                f"--tokens-per-sample {tokens}: a block has at least 1 token; raise it (fairseq-eval-lm takes "
                "--context-window off it)"
            )
        return super().load_dataset(split, *args, **kwargs)


_OWN_STEPS = PrunedTranslationTask.inference_step, PrunedLanguageModelingTask.inference_step


def return_what_is_printed(step: Callable, generator: Any, nbest: int, in_arrays: bool = True) -> None:
    """Let searches return no more than a command prints, unless code of others works on what they return.

    Args:
        step: ``inference_step`` of the task's class.
        nbest, in_arrays: as attributes of `PrunedSequenceGenerator`.
    """
    if step in _OWN_STEPS and type(generator) in (PrunedSequenceGenerator, PrunedSequenceGeneratorWithAlignment):
        generator.nbest, generator.in_arrays = nbest, in_arrays
