"""What tasks that prune while they train share."""

import logging
import math
from dataclasses import dataclass, field
from typing import List, Optional  # noqa: UP035  # fairseq's parser reads Optional[X], not X | None

from fairseq.dataclass import ChoiceEnum, FairseqDataclass
from omegaconf import II

from ap_fairseq.files import UserError
from ap_fairseq.model.pruned_model import PrunedModel
from ap_fairseq.pruning.flags import allow_flag_values, budget_flags, parse_mask_flags, split_flags
from ap_fairseq.training.pruner import TrainingPruner, unwrapped, warn_of_unfinished
from ap_fairseq.training.schedule import SHAPES, PruningSchedule

logger = logging.getLogger(__name__)


@dataclass
class PruningWhileTrainingConfig(FairseqDataclass):
    """When a task prunes, and how much."""

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
    max_update: int = II("optimization.max_update")
    max_epoch: int = II("optimization.max_epoch")
    stop_time_hours: float = II("optimization.stop_time_hours")
    stop_min_lr: float = II("optimization.stop_min_lr")
    update_freq: List[int] = II("optimization.update_freq")  # noqa: UP006
    train_subset: str = II("dataset.train_subset")
    update_ordered_indices_seed: bool = II("dataset.update_ordered_indices_seed")


def given_without_budget(cfg) -> list[str]:
    """Return the flags of *cfg*, a task's configuration, that say how to prune and differ from their defaults."""
    fields = PruningWhileTrainingConfig.__dataclass_fields__
    names = ("prune_flags", "prune_start", "prune_end", "prune_every", "prune_shape")
    values = {name: getattr(cfg, name, fields[name].default) for name in names}
    return [f"--{name.replace('_', '-')} {x}" for name, x in values.items() if x != fields[name].default]


def build_pruner(task, cfg: PruningWhileTrainingConfig) -> TrainingPruner | None:
    """Return what prunes while *task* trains, None where no flag asks for it.

    Raises:
        UserError: for flags that contradict each other.
    """
    flags = parse_mask_flags(split_flags("--prune-flags", cfg.prune_flags), "--prune-flags")
    given = budget_flags(flags)
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
    batch = dict(max_tokens=cfg.max_tokens, max_sentences=cfg.batch_size)
    return TrainingPruner(task, schedule, flags, cfg.prune_sample, batch, cfg.train_subset)


class PruningWhileTraining:
    """The part of a task that prunes the model while it trains; fairseq's own task class comes after it."""

    @classmethod
    def add_args(cls, parser):
        """As fairseq's; ``--prune-flags`` may be a single flag."""
        super().add_args(parser)
        allow_flag_values(parser, "--prune-flags")

    def __init__(self, cfg, *args, **kwargs):
        super().__init__(cfg, *args, **kwargs)
        # A program may build the task with fairseq's own configuration, which lacks these fields.
        self.pruner = build_pruner(self, cfg) if hasattr(cfg, "prune_flags") else None
        self.begun = False  # whether this process has trained
        self.idle_flags = given_without_budget(cfg) if self.pruner is None else []
        self.max_update, self.max_epoch = (getattr(cfg, f"max_{of}", None) or 0 for of in ("update", "epoch"))
        self.stop_time_hours = getattr(cfg, "stop_time_hours", 0)
        self.stop_min_lr = getattr(cfg, "stop_min_lr", -1.0)
        self.update_freq = getattr(cfg, "update_freq", None) or [1]
        self.seed_counts_epochs = getattr(cfg, "update_ordered_indices_seed", False)

    def build_model(self, cfg, from_checkpoint=False):
        """As fairseq's, after a check that the model can be pruned, if that was asked for.

        Raises:
            UserError: if it cannot, or for flags that say how to prune in a training that prunes nothing.
        """
        if self.idle_flags and not from_checkpoint:
            raise UserError(
                f"{self.idle_flags[0]}: no flag says how much to prune, so nothing would be pruned; add "
                "--attention-sparsity SHARE, or budgets per kind in --prune-flags, or leave the flag out"
            )
        model = super().build_model(cfg, from_checkpoint)
        if self.pruner is not None:
            if not isinstance(model, PrunedModel):
                raise UserError(
                    f"--attention-sparsity prunes pruned_transformer architectures, not {type(model).__name__}; "
                    "train with --arch pruned_transformer..."
                )
            if not from_checkpoint:  # else masks that are named replace those of the checkpoint
                self.pruner.require_fitting(model)
                self._warn_of_early_end()
                model.prefer_checkpoint_masks()  # of a training that resumes
        return model

    def get_batch_iterator(
        self, dataset, *args, seed=1, epoch=1, disable_iterator_cache=False, update_epoch_batch_itr=False, **kw
    ):
        """As fairseq's, but a training that prunes and resumes has the batches that it would have had.

        fairseq makes them once in a process, with random numbers of the epoch that it starts in.
        """
        options = dict(disable_iterator_cache=disable_iterator_cache, update_epoch_batch_itr=update_epoch_batch_itr)
        once = self.can_reuse_epoch_itr(dataset) and not any(options.values())
        if self.pruner is None or not once or dataset in self.dataset_to_epoch_iter:
            return super().get_batch_iterator(dataset, *args, seed=seed, epoch=epoch, **options, **kw)
        if self.seed_counts_epochs:
            seed -= epoch - 1
        iterator = super().get_batch_iterator(dataset, *args, seed=seed, epoch=1, **options, **kw)
        dataset.set_epoch(epoch)
        iterator.epoch = epoch
        if dataset is self.datasets.get(self.pruner.subset):
            last = len(self.update_freq) - 1
            by_epoch = [self.update_freq[min(k, last)] for k in range(self.max_epoch)]  # batches of an update
            updates = sum(math.ceil(len(iterator) / size) for size in by_epoch)
            self._warn_of_end(updates, f"--max-epoch {self.max_epoch} ({updates} updates)")
        return iterator

    def _warn_of_early_end(self) -> None:
        """Warn of flags that end the training before the last pruning, or may do so."""
        self._warn_of_end(self.max_update, f"--max-update {self.max_update}")
        for flag, value, unset, remedy in (
            ("--stop-time-hours", self.stop_time_hours, 0, "more hours"),
            ("--stop-min-lr", self.stop_min_lr, -1, "a lower one"),
        ):
            if value > unset:
                logger.warning(
                    f"{flag} {value:g} may end the training before the last pruning, after --prune-end "
                    f"{self.pruner.schedule.end} updates; then resume it with {remedy}"
                )

    def _warn_of_end(self, updates: int, flag: str) -> None:
        if message := self.pruner.schedule.cut_by(updates, flag):
            logger.warning(message)

    def train_step(self, sample, model, criterion, optimizer, update_num, ignore_grad=False):
        """As fairseq's, after the pruning that is due at this update."""
        if self.pruner is not None:
            self.pruner.before_batch(model, criterion, update_num)
        elif not self.begun and isinstance(unwrapped(model), PrunedModel):
            warn_of_unfinished(model)
        self.begun = True
        return super().train_step(sample, model, criterion, optimizer, update_num, ignore_grad)
