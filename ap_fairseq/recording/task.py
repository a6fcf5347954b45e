"""fairseq tasks: ``attention_recording`` runs a trained translation model over a data set and writes its statistics;
``pruned_translation`` searches on the device.
"""

import collections
import logging
import os
import time
from dataclasses import dataclass, field
from typing import Optional  # fairseq's parser reads Optional[X], not X | None

import numpy as np
import torch
import torch.distributed as dist
from fairseq import distributed_utils
from fairseq.models.transformer import TransformerModelBase
from fairseq.tasks import register_task
from fairseq.tasks.translation import TranslationConfig, TranslationTask

from ap_fairseq.compat import allow_gathering_on_cpu, drop_bettertransformer_copies
from ap_fairseq.files import ArtifactError, file_sha256, refuse_existing
from ap_fairseq.provenance import dictionary_hashes, versions
from ap_fairseq.recording.recorder import AttentionRecorder, sample_by_length
from ap_fairseq.sites import architecture

logger = logging.getLogger(__name__)


@dataclass
class AttentionRecordingConfig(TranslationConfig):
    stats_output: Optional[str] = field(default=None, metadata={"help": "file to write the attention statistics to"})
    stats_max_positions: int = field(
        default=1024,
        metadata={"help": "record positions below this; cells beyond are counted and reported, not recorded"},
    )
    stats_sample: Optional[int] = field(
        default=None, metadata={"help": "record this many sentences, drawn evenly over all lengths, instead of all"}
    )
    stats_sample_seed: int = field(default=1, metadata={"help": "seed of the sample"})
    stats_importance: bool = field(
        default=False, metadata={"help": "also record how much the training loss depends on each cell"}
    )
    stats_overwrite: bool = field(default=False, metadata={"help": "replace an existing statistics file"})
    stats_checkpoint: Optional[str] = field(
        default=None, metadata={"help": "checkpoint whose SHA-256 is stored with the statistics"}
    )


@register_task("attention_recording", dataclass=AttentionRecordingConfig)
class AttentionRecordingTask(TranslationTask):
    """A ``translation`` task for ``fairseq_cli.validate`` that records attention while it validates.

    Statistics are written when the metrics of the subset are reduced, which validation does once, after its last batch
    and on every rank. Nothing is written before, so an interrupted recording leaves nothing behind.

    Validation gathers the logging outputs of all batches of all ranks in a buffer of 16 KiB, which a large data set
    overflows: the losses are summed here, and each batch returns the same empty output.
    """

    cfg: AttentionRecordingConfig

    @classmethod
    def setup_task(cls, cfg: AttentionRecordingConfig, **kwargs):
        if not cfg.stats_output:
            raise ArtifactError("attention_recording needs --stats-output FILE (ap-record: --output FILE)")
        if cfg.stats_max_positions < 1:
            raise ArtifactError(f"--max-positions must be at least 1, got {cfg.stats_max_positions}")
        if cfg.stats_sample is not None and cfg.stats_sample < 1:
            raise ArtifactError(f"--sample must be at least 1 sentence, got {cfg.stats_sample}")
        refuse_existing(cfg.stats_output, cfg.stats_overwrite)
        # Statistics are indexed by token position, so every sentence must start in column 0.
        cfg.left_pad_source = cfg.left_pad_target = False
        cfg.eval_bleu = False
        return super().setup_task(cfg, **kwargs)

    def build_model(self, cfg, from_checkpoint=False):
        if self.cfg.stats_importance:  # a checkpointed layer runs a second time during the backward pass
            cfg.checkpoint_activations = cfg.offload_activations = False
        model = super().build_model(cfg, from_checkpoint)
        if not isinstance(model, TransformerModelBase):
            raise ArtifactError(
                f"attention can be recorded from fairseq's transformer architectures (transformer*, "
                f"pruned_transformer*), not from {type(model).__name__}"
            )
        model.register_load_state_dict_pre_hook(self._before_loading)
        model.requires_grad_(False)  # the backward pass of --importance goes no further than the attention
        self.recorder = None  # made with the first batch, when the model is on its device
        self.subset = None
        self.totals: dict[str, float] = collections.defaultdict(float)
        allow_gathering_on_cpu()
        return model

    def _before_loading(self, module, state_dict, *rest):
        drop_bettertransformer_copies(state_dict)
        sides = {"encoder": self.source_dictionary, "decoder": self.target_dictionary}
        for side, dictionary in sides.items():
            trained = len(state_dict.get(f"{side}.embed_tokens.weight", dictionary.symbols))
            if trained != len(dictionary):
                raise ArtifactError(
                    f"{self.cfg.stats_checkpoint} has {trained} symbols in its {side}, the dictionary of "
                    f"{self.cfg.data} has {len(dictionary)}; record on the data-bin the checkpoint was trained with "
                    "(models of tasks that add symbols, as translation_multi_simple_epoch does, cannot be recorded)"
                )

    def load_dataset(self, split, epoch=1, combine=False, **kwargs):
        try:
            super().load_dataset(split, epoch, combine, **kwargs)
        except FileNotFoundError as error:
            raise ArtifactError(
                f"no subset {split!r} in {self.cfg.data}; fairseq-preprocess names them train, valid, test ({error})"
            ) from error
        self.subset = split

    def filter_indices_by_size(self, indices, dataset, max_positions=None, ignore_invalid_inputs=False):
        """Leave out what is too long for the model, as training does, and draw the sample from the rest."""
        indices = super().filter_indices_by_size(indices, dataset, max_positions, ignore_invalid_inputs=True)
        if self.cfg.stats_sample is None:
            return indices
        return sample_by_length(np.asarray(indices), self.cfg.stats_sample, self.cfg.stats_sample_seed)

    def _start_recording(self, model) -> AttentionRecorder:
        dataset = self.datasets[self.subset]
        limit = self.cfg.stats_max_positions
        longest = (int(dataset.src_sizes.max()), int(dataset.tgt_sizes.max()))
        return AttentionRecorder(model, tuple(min(n, limit) for n in longest), self.cfg.stats_importance)

    def valid_step(self, sample, model, criterion):
        if self.recorder is None:
            self.recorder = self._start_recording(model)
            self.started = time.monotonic()
            self.architecture = architecture(model)
        if not sample:  # ranks with fewer batches than others are handed empty ones
            return 0, 0, _NO_OUTPUT
        net_input = sample["net_input"]
        self.recorder.begin(net_input["src_tokens"], net_input["prev_output_tokens"], self.source_dictionary.pad())
        if self.cfg.stats_importance:
            with torch.enable_grad():
                loss, sample_size, logging_output = criterion(model, sample)
                self.recorder.add_importance(loss)
        else:
            loss, sample_size, logging_output = super().valid_step(sample, model, criterion)
        for name, value in logging_output.items():
            self.totals[name] += float(value)
        return loss, sample_size, _NO_OUTPUT

    def reduce_metrics(self, logging_outputs, criterion):
        if self.recorder is None:
            raise ArtifactError(f"subset {self.subset!r} has no sentences to record")
        totals = self._totals_of_all_ranks()
        super().reduce_metrics([totals], criterion)
        self.recorder.remove()
        stats = self.recorder.finish(
            group=_group(),
            data=[{"name": os.path.basename(os.path.abspath(self.cfg.data)), "subset": self.subset}],
            languages=[self.cfg.source_lang, self.cfg.target_lang],
            checkpoint=file_sha256(self.cfg.stats_checkpoint) if self.cfg.stats_checkpoint else None,
            dictionaries=dictionary_hashes(self),
            max_positions=self.cfg.stats_max_positions,
            sample=self._sample(),
            loss=type(criterion).__name__ if self.cfg.stats_importance else None,  # what importance is of
            versions=versions(),
        )
        self.recorder = None
        seconds = time.monotonic() - self.started
        if distributed_utils.get_global_rank() != 0:
            return
        stats.save(self.cfg.stats_output, overwrite=self.cfg.stats_overwrite)
        for kind in stats.kinds:
            layers, heads, n_queries, n_keys = stats.mass[kind].shape
            logger.info(
                f"{kind.value}: {layers} layers x {heads} heads, {n_queries} x {n_keys} positions, "
                f"{stats.metadata['pairs_recorded'][kind.value]:,} pairs recorded, "
                f"{stats.metadata['pairs_beyond_range'][kind.value]:,} beyond the range"
            )
        sentences, available = stats.metadata["sentences"], len(self.datasets[self.subset])
        logger.info(f"{sentences:,} of {available:,} sentences -> {self.cfg.stats_output}")
        logger.info(
            f"recorded in {seconds:.1f} s: {sentences / seconds:,.0f} sentences and {totals['ntokens'] / seconds:,.0f} "
            "target tokens a second"
        )
        if sentences < min(self.cfg.stats_sample or available, available):
            logger.warning(
                f"{available - sentences:,} sentences were not recorded: longer than the model's positions, or dropped "
                "from the last batch by --required-batch-size-multiple"
            )

    def _totals_of_all_ranks(self) -> dict[str, float]:
        group = _group()
        gathered = [dict(self.totals)]
        if group is not None:
            gathered = [None] * dist.get_world_size(group)
            dist.all_gather_object(gathered, dict(self.totals), group=group)
        return {name: sum(part.get(name, 0.0) for part in gathered) for part in gathered for name in part}

    def _sample(self) -> dict[str, int] | None:
        if self.cfg.stats_sample is None:
            return None
        return {"sentences": self.cfg.stats_sample, "seed": self.cfg.stats_sample_seed}


_NO_OUTPUT: dict = {}  # one object, which pickle stores once, however many batches there are


def _group() -> dist.ProcessGroup | None:
    """Return the group of the ranks that share the data, None for a single process."""
    distributed = dist.is_initialized() and dist.get_world_size() > 1
    return distributed_utils.get_data_parallel_group() if distributed else None
