"""Pruning while training: record the model as it is, derive masks for the share that is due, train on under them."""

from __future__ import annotations

import argparse
import contextlib
import copy
import logging
import time
from collections.abc import Iterator, Mapping

import numpy as np
import torch
from fairseq import checkpoint_utils, utils
from fairseq.data import LanguagePairDataset, MonolingualDataset, data_utils
from fairseq_cli.train import should_stop_early
from torch import nn

from ap_fairseq.artifacts import AttentionStats
from ap_fairseq.files import UserError
from ap_fairseq.model.pruned_model import PrunedModel
from ap_fairseq.provenance import mask_spec, total_sparsity
from ap_fairseq.pruning.build import build_masks
from ap_fairseq.pruning.flags import require_fitting, spec_from
from ap_fairseq.recording.lengths import diagonal_slope, longest_sides, sample_by_length, validation_lengths
from ap_fairseq.recording.recorder import AttentionRecorder, data_parallel_group
from ap_fairseq.recording.tasks import provenance, samples_of
from ap_fairseq.sites import architecture
from ap_fairseq.training.schedule import PruningSchedule

logger = logging.getLogger(__name__)

MAX_POSITIONS = 1024  # as ap-record records by default


class TrainingPruner:
    """Prunes a model at the updates of a schedule.

    A pruning depends on the parameters, the training data and the flags, and draws no random number of the training:
    a training that resumes from any checkpoint gets the masks that it would have got.

    Args:
        task: the fairseq task, whose training data are recorded.
        schedule: when, and which share of the budgets.
        flags: parsed flags of ap-masks, with the final budgets.
        sample: sentences to record, drawn evenly over all lengths.
        batch: ``max_tokens`` and ``max_sentences`` of a recorded batch.
        subset: that is trained on.

    Raises:
        UserError: for a sample of no sentences.
    """

    def __init__(
        self,
        task,
        schedule: PruningSchedule,
        flags: argparse.Namespace,
        sample: int,
        batch: dict[str, int | None],
        subset: str = "train",
    ):
        self.task, self.schedule, self.flags, self.subset = task, schedule, flags, subset
        if sample < 1:
            raise UserError(f"--prune-sample {sample}: a pruning records at least 1 sentence")
        self.sample, self.batch = sample, batch
        self.importance = self.flags.criterion == "importance"
        self.budgets: dict[str, float] = {}  # share of each kind that is pruned in the end
        self.begun = False  # whether this process has trained
        self.done: int | None = None  # the update at which masks were derived last: updates have several batches
        self.seconds = 0.0
        self.started = time.monotonic()

    def require_fitting(self, model: PrunedModel) -> None:
        """Raise :class:`UserError` for flags that do not fit the model, before it trains."""
        held_out = self.flags.calibrate and validation_lengths(self.task) is not None
        spec = require_fitting(self.flags, architecture(model), held_out)
        self.budgets = {kind.value: share for kind, share in spec.budgets.items()}

    def before_batch(self, model: nn.Module, criterion: nn.Module, update: int) -> None:
        """Prune *model* if that is due after *update* updates. Every rank calls it.

        Raises:
            UserError: if memory runs out, or for a training that resumes after the last pruning without its masks.
        """
        if not self.begun and update > self.schedule.end:
            self._require_pruned(unwrapped(model), update)
        self.begun = True
        if update <= self.schedule.end:  # --patience would compare with losses of a model that was pruned less
            should_stop_early.__dict__.pop("best", None)
        if update == self.done or update not in self.schedule.updates:
            return
        try:
            self.prune(unwrapped(model), criterion, update)
        except torch.OutOfMemoryError as error:  # fairseq would skip the batch and come back for ever
            raise UserError(
                f"no memory to record attention after update {update} in batches of {self.batch}; train with smaller "
                "batches (--max-tokens, with --update-freq to make up for it)"
            ) from error
        self.done = update

    def _require_pruned(self, model: PrunedModel, update: int) -> None:
        """Raise :class:`UserError` unless the masks of *model* are of the whole budget: no pruning is to come."""
        own = mask_spec(model.masks_provenance() or {}).get("budgets", {})
        if differing := [kind for kind in sorted({*own, *self.budgets}) if not _close(own, self.budgets, kind)]:
            held, wanted = (
                ", ".join(f"{kind} {budgets.get(kind, 0):.1%}" for kind in differing) for budgets in (own, self.budgets)
            )
            raise UserError(
                f"the training goes on after update {update}, the last pruning was due after --prune-end "
                f"{self.schedule.end}, and the checkpoint's masks have another budget ({held}) than the flags ask for "
                f"({wanted}); raise --prune-end (and --max-update) above {update}, or start anew from the model with "
                "--finetune-from-model"
            )

    def prune(self, model: PrunedModel, criterion: nn.Module, update: int) -> None:
        """Derive masks for the share that is due after *update* and give them to *model*."""
        started = time.monotonic()
        before = total_sparsity(model.masks_provenance())
        stats = self.record(model, criterion)
        recorded = time.monotonic()
        share = self.schedule.share(update)
        built = build_masks(stats, spec_from(self.flags, stats), share)
        built.masks.metadata["budget_share"] = share
        model.set_masks(built.masks)
        # fairseq compares with the best loss so far, which a model had that was pruned less.
        checkpoint_utils.save_checkpoint.__dict__.pop("best", None)
        self.seconds += time.monotonic() - started
        total = time.monotonic() - self.started
        validation = built.masks.metadata.get("validation")
        also = f" ({validation['total']:.1%} of those of the validation sentences)" if validation else ""
        logger.info(
            f"update {update}: {built.masks.metadata['total']['effective']:.1%} of the pairs pruned{also}, "
            f"{share:.1%} of the budget; {stats.metadata['sentences']:,} {samples_of(self.task)} recorded in "
            f"{recorded - started:.1f} s, masks in {time.monotonic() - recorded:.1f} s; pruning took "
            f"{self.seconds / total:.1%} of the time so far"
        )
        after = built.masks.metadata["total"]["effective"]
        if after < before - 0.01:  # less may be chance: the sentences that sparsity counts on may be others
            logger.warning(
                f"update {update}: masks of {after:.1%} replace masks of {before:.1%}, which gives back pairs: "
                "start from a model that is pruned less, or prune it further from outside with ap-prune-schedule"
            )
        for message in built.warnings:
            logger.warning(message)

    def record(self, model: PrunedModel, criterion: nn.Module) -> AttentionStats:
        """Record the attention of *model* on the sample of the training data; each rank records its part."""
        dataset = copy.copy(self.task.dataset(self.subset))
        if isinstance(dataset, LanguagePairDataset):
            dataset.left_pad_source = dataset.left_pad_target = False  # statistics are indexed by token position
        elif isinstance(dataset, MonolingualDataset):
            dataset.fixed_pad_length = dataset.pad_to_bsz = None  # rows of padding alone are no blocks of text
        device = next(model.parameters()).device
        pad = self.task.source_dictionary.pad()
        limits = tuple(min(n, MAX_POSITIONS) for n in longest_sides(dataset))
        group = data_parallel_group()
        rank, ranks = (group.rank(), group.size()) if group else (0, 1)
        slope = diagonal_slope(dataset)
        with evaluating(model, criterion), AttentionRecorder(model, limits, self.importance, slope) as recorder:
            for indices in self.batches(dataset, model)[rank::ranks]:
                batch = dataset.collater([dataset[index] for index in indices])
                batch = utils.move_to_cuda(batch, device) if device.type == "cuda" else batch
                recorder.record(model, criterion, batch, pad)
        folders = utils.split_paths((self.task.cfg or self.task.args).data)  # language modelling is an old-style task
        return recorder.finish(
            group,
            validation_lengths(self.task),
            **provenance(self.task, folders, self.subset, criterion if self.importance else None),
            max_positions=MAX_POSITIONS,
            sample={"sentences": self.sample, "seed": 1},
        )

    def batches(self, dataset, model: PrunedModel) -> list[np.ndarray]:
        """Return the batches of a sample of what training sees, the same ones in every call."""
        with data_utils.numpy_seed(1):  # the order of equal lengths; also keeps the training's own random numbers
            indices = dataset.ordered_indices()
        limits = utils.resolve_max_positions(self.task.max_positions(), model.max_positions(), self.batch["max_tokens"])
        indices, _ = dataset.filter_indices_by_size(indices, limits)
        indices = sample_by_length(np.asarray(indices), self.sample, seed=1)
        return list(dataset.batch_by_size(indices, **self.batch, required_batch_size_multiple=1))


def warn_of_unfinished(model: nn.Module) -> None:
    """Log that a model, now trained without pruning, comes from the middle of a pruning schedule."""
    share = (unwrapped(model).masks_provenance() or {}).get("budget_share", 1.0)
    if share < 1:
        logger.warning(
            f"the model was pruned while training up to {share:.1%} of the budget, and is not pruned further: to go "
            "on, give the flags with which that began (--attention-sparsity, --prune-...)"
        )


def _close(own: Mapping[str, float], wanted: Mapping[str, float], kind: str) -> bool:
    return abs(own.get(kind, 0.0) - wanted.get(kind, 0.0)) < 1e-6


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model inside fairseq's wrappers for distributed training."""
    while isinstance(getattr(model, "module", None), nn.Module):
        model = model.module
    return model


@contextlib.contextmanager
def evaluating(*modules: nn.Module) -> Iterator[None]:
    """Put *modules* into evaluation mode, and back into the mode each of them was in."""
    modes = [(part, part.training) for module in modules for part in module.modules()]
    for module in modules:
        module.eval()
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode
