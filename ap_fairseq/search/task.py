"""The task ``pruned_translation``: fairseq's translation that prunes while it trains and searches on the device."""

import copy
import shlex
from dataclasses import dataclass, field
from typing import Any, Optional  # fairseq's parser reads Optional[X], not X | None

from fairseq.dataclass import ChoiceEnum
from fairseq.tasks import register_task
from fairseq.tasks.translation import TranslationConfig, TranslationTask
from omegaconf import II

from ap_fairseq.files import UserError
from ap_fairseq.model.transformer import PrunedTransformerModel
from ap_fairseq.pruning.flags import parse_mask_flags
from ap_fairseq.search.generator import PrunedSequenceGenerator, log_fallback
from ap_fairseq.sites import AttentionKind
from ap_fairseq.training.pruner import TrainingPruner
from ap_fairseq.training.schedule import SHAPES, PruningSchedule


@dataclass
class PrunedTranslationConfig(TranslationConfig):
    attention_sparsity: Optional[float] = field(
        default=None,
        metadata={
            "help": "prune while training: share of the pairs of all kinds together that is pruned in the end, in "
            "(0, 1); budgets per kind go into --prune-flags instead"
        },
    )
    prune_start: int = field(default=2000, metadata={"help": "updates before the first pruning"})
    prune_end: int = field(default=8000, metadata={"help": "updates before the last pruning, from which all is pruned"})
    prune_every: int = field(default=1000, metadata={"help": "updates between two prunings"})
    prune_shape: ChoiceEnum(tuple(SHAPES)) = field(
        default="cubic",
        metadata={"help": "growth of the pruned share: cubic prunes most at first (Zhu and Gupta 2017)"},
    )
    prune_flags: str = field(
        default="--criterion importance --smooth 32", metadata={"help": "flags of ap-masks in one argument"}
    )
    prune_sample: int = field(
        default=4000, metadata={"help": "training sentences that a pruning records, drawn evenly over all lengths"}
    )
    max_tokens: Optional[int] = II("dataset.max_tokens")
    batch_size: Optional[int] = II("dataset.batch_size")


def build_pruner(task, cfg: PrunedTranslationConfig) -> TrainingPruner | None:
    """Return what prunes while *task* trains, None where no flag asks for it.

    Raises:
        UserError: for flags that contradict each other.
    """
    flags = parse_mask_flags(shlex.split(cfg.prune_flags))
    given = [name for name in ("total", "like", *AttentionKind) if getattr(flags, name) is not None]
    if cfg.attention_sparsity is None and not given:
        return None
    if cfg.attention_sparsity is not None:
        if given:
            raise UserError(
                f"--attention-sparsity {cfg.attention_sparsity} and --prune-flags {cfg.prune_flags!r} both name "
                "budgets; give one of them"
            )
        if not 0 < cfg.attention_sparsity < 1:
            raise UserError(f"--attention-sparsity {cfg.attention_sparsity} is not a share of pairs between 0 and 1")
        flags.total = cfg.attention_sparsity
    schedule = PruningSchedule(cfg.prune_start, cfg.prune_end, cfg.prune_every, cfg.prune_shape)
    return TrainingPruner(
        task, schedule, flags, cfg.prune_sample, dict(max_tokens=cfg.max_tokens, max_sentences=cfg.batch_size)
    )


@register_task("pruned_translation", dataclass=PrunedTranslationConfig)
class PrunedTranslationTask(TranslationTask):
    """``translation`` that prunes pruned transformers while they train, and whose search is decided on the device."""

    _built: tuple[tuple, Any] | None = None  # what the last generator was built for, and that generator

    def __init__(self, cfg, src_dict, tgt_dict):
        super().__init__(cfg, src_dict, tgt_dict)
        # A program may build the task with fairseq's own configuration, which lacks these fields.
        self.pruner = build_pruner(self, cfg) if hasattr(cfg, "prune_flags") else None

    def build_model(self, cfg, from_checkpoint=False):
        model = super().build_model(cfg, from_checkpoint)
        if self.pruner is not None:
            if not isinstance(model, PrunedTransformerModel):
                raise UserError(
                    f"--attention-sparsity prunes pruned_transformer architectures, not {type(model).__name__}; "
                    "train with --arch pruned_transformer..."
                )
            model.prefer_checkpoint_masks()  # of a training that resumes
        return model

    def train_step(self, sample, model, criterion, optimizer, update_num, ignore_grad=False):
        """As fairseq's, after the pruning that is due at this update."""
        if self.pruner is not None:
            self.pruner.before_batch(model, criterion, update_num)
        return super().train_step(sample, model, criterion, optimizer, update_num, ignore_grad)

    def build_generator(self, models, args, seq_gen_cls=None, extra_gen_cls_kwargs=None, prefix_allowed_tokens_fn=None):
        """As fairseq's. The same call gives the same generator, with its buffers: the hub asks in every translation."""
        if seq_gen_cls is None and getattr(args, "print_alignment", False):
            log_fallback("--print-alignment")
        elif seq_gen_cls is None:
            seq_gen_cls = PrunedSequenceGenerator
        options = seq_gen_cls, extra_gen_cls_kwargs, prefix_allowed_tokens_fn
        wanted = [id(model) for model in models], copy.deepcopy(args), options
        if self._built is None or self._built[0] != wanted:
            self._built = wanted, super().build_generator(models, args, *options)
        return self._built[1]
