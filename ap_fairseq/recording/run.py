"""Checkpoint + data-bin -> file of attention statistics: the pass of ``ap-record`` over a subset, on one rank or many.

Data sets, batches, loaders, progress bars, criteria and process groups are fairseq's, as in ``fairseq-validate``.
"""

from __future__ import annotations

import argparse
import collections
import glob
import logging
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fairseq import checkpoint_utils, distributed_utils, utils
from fairseq.criterions import CRITERION_REGISTRY, FairseqCriterion
from fairseq.data import FairseqDataset, LanguagePairDataset, data_utils, iterators
from fairseq.logging import metrics, progress_bar
from fairseq.models import BaseFairseqModel
from fairseq.tasks import FairseqTask
from fairseq.tasks.sentence_prediction import SentencePredictionTask
from omegaconf import OmegaConf, open_dict

from ap_fairseq.artifacts import DIVERGED, AttentionStats
from ap_fairseq.compat import drop_bettertransformer_copies
from ap_fairseq.data_bin import require_whole, setup_task
from ap_fairseq.devices import uses_gpu
from ap_fairseq.files import ArtifactError, UserError, file_sha256, refuse_existing
from ap_fairseq.model.checkpoints import load_parameters, stored_model
from ap_fairseq.recording.lengths import diagonal_slope, lengths_of, longest_sides, sample_by_length, validation_lengths
from ap_fairseq.recording.recorder import AttentionRecorder, data_parallel_group, gathered
from ap_fairseq.recording.tasks import RECORDABLE, provenance, recorded_task, samples_of

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Recording:
    """What to record, and where to write it.

    Attributes:
        checkpoint: path of the model.
        data: folder made by fairseq-preprocess.
        subset: for example ``train``.
        output: file of the statistics.
        max_positions: positions from here on are counted and reported, not recorded.
        sample: record this many sentences, drawn evenly over all lengths (seed: fairseq's ``--seed``); None: all.
        importance: also record how much the training loss depends on each cell.
        overwrite: replace an existing output file.
        model_overrides: of the checkpoint's configuration, as fairseq's ``--model-overrides``.
        task_settings: of the task, in place of those that the checkpoint was trained with.
        log_interval: batches between two lines of progress; None: a tenth of the batches, at most 100.
    """

    checkpoint: str
    data: str
    subset: str
    output: str
    max_positions: int = 1024
    sample: int | None = None
    importance: bool = False
    overwrite: bool = False
    model_overrides: dict[str, Any] = field(default_factory=dict)
    task_settings: dict[str, Any] = field(default_factory=dict)
    log_interval: int | None = None

    def require_valid(self) -> None:
        """Raise UserError for numbers out of range, ArtifactError if the output cannot be written."""
        if self.max_positions < 1:
            raise UserError(f"--max-positions must be at least 1, got {self.max_positions}")
        if self.sample is not None and self.sample < 1:
            raise UserError(f"--sample must be at least 1 sentence, got {self.sample}")
        refuse_existing(self.output, self.overwrite, [self.checkpoint])


def record_on_rank(cfg, job: Recording, errors=None) -> None:
    """Entry point of each rank, called by ``distributed_utils.call_main``.

    Args:
        cfg: fairseq's configuration (``common``, ``dataset``, ``distributed_training``).
        errors: queue for the message of a UserError, which a process that fairseq spawns can hand to its parent only
            as the text of a traceback.
    """
    utils.import_user_module(cfg.common)
    utils.reset_logging()
    try:
        record(cfg, job)
    except UserError as error:
        if errors is not None:
            errors.put(str(error))
        raise


def record(cfg, job: Recording) -> AttentionStats:
    """Record the attention of a checkpoint over a subset; rank 0 writes the statistics.

    Raises:
        UserError: for what the user can mend. Nothing is written then.
    """
    job.require_valid()
    # Made while all ranks are there: a rank that waits for a dead one to join waits for half an hour.
    group = data_parallel_group()
    model, saved_cfg, task = load_model(job)
    cuda = _place(model, cfg)
    criterion = _build_criterion(task, saved_cfg.criterion, job)
    dataset = load_subset(task, job)
    batches = _batches(cfg, job, task, model, dataset, group)
    progress = progress_bar.progress_bar(
        batches,
        log_format=cfg.common.log_format,
        log_interval=job.log_interval or min(100, max(1, len(batches) // 10)),
        prefix=f"valid on '{job.subset}' subset",
        default_log_format="simple" if cfg.common.no_progress_bar else "tqdm",
    )

    started = time.monotonic()
    limits = tuple(min(n, job.max_positions) for n in longest_sides(dataset))
    with AttentionRecorder(model, limits, job.importance, diagonal_slope(dataset)) as recorder:
        logged = _run(recorder, model, criterion, progress, task.source_dictionary.pad(), cuda)
    parts = gathered(logged, group)
    totals = collections.Counter({name: sum(part[name] for part in parts) for part in parts for name in part})
    with metrics.aggregate() as aggregate:
        task.reduce_metrics([totals], criterion)
    progress.print(aggregate.get_smoothed_values(), tag=job.subset)
    stats = recorder.finish(  # names the site and the head where attention itself is not finite
        group=group,
        validation_lengths=validation_lengths(task),
        **provenance(task, [job.data], job.subset, criterion if job.importance else None),
        checkpoint=file_sha256(job.checkpoint),
        max_positions=job.max_positions,
        sample=None if job.sample is None else {"sentences": job.sample, "seed": cfg.common.seed},
    )
    if not np.isfinite(totals["loss"]):
        raise UserError(f"the loss of {job.checkpoint} on subset {job.subset!r} is {totals['loss']}: {DIVERGED}")
    if distributed_utils.get_global_rank() == 0:
        stats.save(job.output, overwrite=job.overwrite)
        _report(stats, job, samples_of(task), len(dataset), totals["ntokens"], time.monotonic() - started)
    return stats


def _place(model: BaseFairseqModel, cfg) -> bool:
    """Convert *model* to the precision of *cfg* and move it to its device; return whether that is a GPU."""
    cuda = uses_gpu(cfg.common.cpu)
    if cfg.common.fp16 or cfg.common.bf16:
        model.to(torch.float16 if cfg.common.fp16 else torch.bfloat16)
    if cuda:
        torch.cuda.set_device(cfg.distributed_training.device_id)
        model.cuda()
    return cuda


def _build_criterion(task: FairseqTask, cfg, job: Recording) -> FairseqCriterion:
    """Build the criterion that the checkpoint was trained with."""
    if cfg._name not in CRITERION_REGISTRY:
        raise UserError(
            f"{job.checkpoint} was trained with the criterion {cfg._name!r}, which is not registered; pass the "
            "--user-dir that registers it"
        )
    return task.build_criterion(cfg).eval()


def _run(recorder: AttentionRecorder, model, criterion, progress, pad: int, cuda: bool) -> collections.Counter[str]:
    """Record every batch of this rank; return the sums of what the criterion logs."""
    totals: collections.Counter[str] = collections.Counter()
    for step, sample in enumerate(progress):
        progress.log({"recorded": f"{step / len(progress):.0%}"}, step=step)
        if not sample:  # ranks with fewer batches than others are handed empty ones
            continue
        sample = utils.move_to_cuda(sample) if cuda else sample
        logging_output = recorder.record(model, criterion, sample, pad)
        totals.update({name: float(value) for name, value in logging_output.items()})
    return totals


def load_model(job: Recording) -> tuple[BaseFairseqModel, Any, FairseqTask]:
    """Load a checkpoint for recording; return (model, configuration, task).

    The task is fairseq's own for models of its kind (:data:`ap_fairseq.recording.tasks.TASKS`).

    Raises:
        ArtifactError: if the model does not fit the data or has no attention of the three kinds.
    """
    state = checkpoint_utils.load_checkpoint_to_cpu(job.checkpoint, dict(job.model_overrides))
    cfg = state["cfg"]
    stored = vars(cfg.task) if isinstance(cfg.task, argparse.Namespace) else OmegaConf.to_container(cfg.task)
    name, model_class = stored_model(state)
    if model_class is None or not issubclass(model_class, RECORDABLE):
        raise ArtifactError(f"{job.checkpoint} holds a {name!r}, not one of fairseq's transformers")
    with open_dict(cfg):
        cfg.task = recorded_task(model_class, stored).settings(stored, job.data, job.task_settings)
        if job.importance:  # a checkpointed layer runs a second time during the backward pass
            cfg.model.checkpoint_activations = cfg.model.offload_activations = False
    task = setup_task(cfg.task, from_checkpoint=True)
    model = task.build_model(cfg.model, from_checkpoint=True)
    parameters = state["model"]
    drop_bettertransformer_copies(parameters)
    for side, dictionary in (
        ("encoder", task.source_dictionary),
        ("encoder.sentence_encoder", task.source_dictionary),
        ("decoder", task.target_dictionary if hasattr(model, "encoder") else task.source_dictionary),
    ):
        trained = len(parameters.get(f"{side}.embed_tokens.weight", dictionary.symbols))
        if trained != len(dictionary):
            raise ArtifactError(
                f"{job.checkpoint} has {trained} symbols in its {side}, the dictionary of {job.data} has "
                f"{len(dictionary)}; record on the data-bin that the checkpoint was trained with (models of tasks that "
                "add symbols, as translation_multi_simple_epoch does, cannot be recorded)"
            )
    load_parameters(model, parameters, job.checkpoint, cfg.model)
    blocks = job.task_settings.get("tokens_per_sample")
    if blocks is not None and not 1 <= blocks <= model.max_positions():
        raise UserError(
            f"--tokens-per-sample {blocks}: the model of {job.checkpoint} takes 1 to {model.max_positions()} "
            "positions; pass a number of these"
        )
    if "ema" in (state.get("extra_state") or {}):
        logger.warning(
            f"{job.checkpoint} also holds averaged parameters (--store-ema); those of its last update are recorded"
        )
    model.requires_grad_(False)  # the backward pass of --importance goes no further than the attention
    return model.eval(), cfg, task


def load_subset(task: FairseqTask, job: Recording) -> FairseqDataset:
    """Load the subset to record.

    Raises:
        ArtifactError: if there is no such subset, or it has no sentences or no target side.
    """
    folder, subset = Path(job.data), job.subset
    files = [path for part in (folder, folder / "input0") for path in part.glob(f"{glob.escape(subset)}.*")]
    if any(path.stat().st_size == 0 for path in files if path.suffix in (".bin", ".idx")):
        raise ArtifactError(f"subset {subset!r} of {folder} has no sentences to record")
    absent = f"no subset {subset!r} in {folder}; fairseq-preprocess names them train, valid, test"
    if not files:
        raise ArtifactError(absent)
    for part in (folder, folder / "input0"):
        require_whole(part, subset, task)
    try:
        task.load_dataset(subset)
    except FileNotFoundError as error:
        raise ArtifactError(f"{absent} ({error})") from error
    except (AssertionError, ValueError) as error:  # of fairseq's reader and numpy's
        raise ArtifactError(
            f"the index files {subset}.*.idx of {folder} are damaged: {error}; copy the data-bin again"
        ) from error
    dataset = task.dataset(subset)
    if isinstance(dataset, LanguagePairDataset) and dataset.tgt is None:
        raise ArtifactError(
            f"subset {subset!r} of {folder} has no target side ({task.cfg.target_lang}), which the decoder reads; "
            "binarise it with both languages (fairseq-preprocess without --only-source)"
        )
    if isinstance(task, SentencePredictionTask) and not any(folder.glob(f"label/{glob.escape(subset)}.*")):
        raise ArtifactError(f"subset {subset!r} of {folder} has no labels in {folder / 'label'}, which the loss needs")
    if not len(dataset):
        raise ArtifactError(f"subset {subset!r} of {folder} has no sentences to record")
    further = sorted({path.name.split(".")[0] for path in folder.glob(f"{glob.escape(subset)}[0-9]*.bin")})
    if further:
        logger.warning(
            f"{subset!r} alone is recorded, not {', '.join(further)} beside it, which fairseq-train reads too; record "
            "each with --subset into a file of its own, ap-masks merges them"
        )
    return dataset


def _batches(cfg, job: Recording, task: FairseqTask, model, dataset: FairseqDataset, group):
    """Return this rank's batches: of what the model can take, or of the sample drawn from that."""
    seed, samples = cfg.common.seed, samples_of(task)
    with data_utils.numpy_seed(seed + 1):  # as fairseq in epoch 1
        indices = dataset.ordered_indices()
    limits = utils.resolve_max_positions(task.max_positions(), model.max_positions())
    indices = np.asarray(task.filter_indices_by_size(indices, dataset, limits, ignore_invalid_inputs=True))
    if not len(indices):
        raise UserError(
            f"all {len(dataset):,} {samples} of subset {job.subset!r} are longer than the model takes (positions: "
            f"{limits}); record a subset with shorter ones"
        )
    if not isinstance(dataset, LanguagePairDataset):  # its own order is by length
        indices = indices[np.argsort(lengths_of(dataset, indices), kind="stable")]
    if job.sample is not None:
        indices = sample_by_length(indices, job.sample, seed)
    longest, most = int(lengths_of(dataset, indices).max()), cfg.dataset.max_tokens
    if most is not None and longest > most:
        raise UserError(
            f"--max-tokens {most}: a {samples[:-1]} of subset {job.subset!r} has {longest} tokens; pass at least that"
        )
    batches = dataset.batch_by_size(
        indices,
        max_tokens=most,
        max_sentences=cfg.dataset.batch_size,
        required_batch_size_multiple=cfg.dataset.required_batch_size_multiple,
    )
    return iterators.EpochBatchIterator(
        dataset=dataset,
        collate_fn=dataset.collater,
        batch_sampler=batches,
        seed=seed,
        num_shards=group.size() if group else 1,
        shard_id=group.rank() if group else 0,
        num_workers=cfg.dataset.num_workers,
        buffer_size=cfg.dataset.data_buffer_size,
    ).next_epoch_itr(shuffle=False)


def _report(
    stats: AttentionStats, job: Recording, samples: str, available: int, n_tokens: float, seconds: float
) -> None:
    for kind in stats.kinds:
        layers, heads, n_queries, n_keys = stats.mass[kind].shape
        logger.info(
            f"{kind.value}: {layers} layers x {heads} heads, {n_queries} x {n_keys} positions, "
            f"{stats.metadata['pairs_recorded'][kind.value]:,} pairs recorded, "
            f"{stats.metadata['pairs_beyond_range'][kind.value]:,} beyond the range"
        )
    recorded = stats.metadata["sentences"]
    logger.info(f"{recorded:,} of {available:,} {samples} -> {job.output}")
    logger.info(
        f"recorded in {seconds:.1f} s: {recorded / seconds:,.0f} {samples} and {n_tokens / seconds:,.0f} target "
        "tokens a second"
    )
    if recorded < min(job.sample or available, available):
        logger.warning(
            f"{available - recorded:,} {samples} were not recorded: longer than the model's positions, or dropped "
            "from the last batch by --required-batch-size-multiple"
        )
