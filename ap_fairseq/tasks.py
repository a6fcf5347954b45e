"""fairseq tasks: ``attention_recording`` runs a trained translation model over a data set and writes its statistics."""

import logging
import os
from dataclasses import dataclass, field
from typing import Optional  # fairseq's parser reads Optional[X], not X | None

import torch.distributed as dist
from fairseq import distributed_utils
from fairseq.models.transformer import TransformerModelBase
from fairseq.tasks import register_task
from fairseq.tasks.translation import TranslationConfig, TranslationTask

from ap_fairseq.artifacts import ArtifactError, dictionary_hashes, file_sha256, refuse_existing, versions
from ap_fairseq.compat import drop_bettertransformer_copies
from ap_fairseq.generation import PrunedSequenceGenerator
from ap_fairseq.recording import AttentionRecorder
from ap_fairseq.sites import architecture

logger = logging.getLogger(__name__)


@dataclass
class AttentionRecordingConfig(TranslationConfig):
    stats_output: Optional[str] = field(default=None, metadata={"help": "file to write the attention statistics to"})
    stats_max_positions: int = field(
        default=1024,
        metadata={"help": "record positions below this; cells beyond are counted and reported, not recorded"},
    )
    stats_overwrite: bool = field(default=False, metadata={"help": "replace an existing statistics file"})
    stats_checkpoint: Optional[str] = field(
        default=None, metadata={"help": "checkpoint whose SHA-256 is stored with the statistics"}
    )


@register_task("attention_recording", dataclass=AttentionRecordingConfig)
class AttentionRecordingTask(TranslationTask):
    """A ``translation`` task for ``fairseq_cli.validate`` that records attention while it validates.

    Statistics are written when the metrics of the subset are reduced, which validation does once, after its last batch
    and on every rank.
    """

    cfg: AttentionRecordingConfig

    @classmethod
    def setup_task(cls, cfg: AttentionRecordingConfig, **kwargs):
        if not cfg.stats_output:
            raise ArtifactError("attention_recording needs --stats-output FILE (ap-record: --output FILE)")
        if cfg.stats_max_positions < 1:
            raise ArtifactError(f"--max-positions must be at least 1, got {cfg.stats_max_positions}")
        refuse_existing(cfg.stats_output, cfg.stats_overwrite)
        # Statistics are indexed by token position, so every sentence must start in column 0.
        cfg.left_pad_source = cfg.left_pad_target = False
        cfg.eval_bleu = False
        return super().setup_task(cfg, **kwargs)

    def build_model(self, cfg, from_checkpoint=False):
        model = super().build_model(cfg, from_checkpoint)
        if not isinstance(model, TransformerModelBase):
            raise ArtifactError(
                f"attention can be recorded from fairseq's transformer architectures (transformer*, "
                f"pruned_transformer*), not from {type(model).__name__}"
            )
        model.register_load_state_dict_pre_hook(
            lambda module, state_dict, prefix, *rest: drop_bettertransformer_copies(state_dict)
        )
        self.recorder = None  # made with the first batch, when the model is on its device
        self.subset = None
        return model

    def load_dataset(self, split, epoch=1, combine=False, **kwargs):
        try:
            super().load_dataset(split, epoch, combine, **kwargs)
        except FileNotFoundError as error:
            raise ArtifactError(
                f"no subset {split!r} in {self.cfg.data}; fairseq-preprocess names them train, valid, test ({error})"
            ) from error
        self.subset = split

    def _start_recording(self, model) -> AttentionRecorder:
        dataset = self.datasets[self.subset]
        limit = self.cfg.stats_max_positions
        longest = (int(dataset.src_sizes.max()), int(dataset.tgt_sizes.max()))
        return AttentionRecorder(model, tuple(min(n, limit) for n in longest))

    def valid_step(self, sample, model, criterion):
        if self.recorder is None:
            self.recorder = self._start_recording(model)
            self.architecture = architecture(model)
        if not sample:  # ranks with fewer batches than others are handed empty ones
            return 0, 0, {}
        net_input = sample["net_input"]
        self.recorder.begin(net_input["src_tokens"], net_input["prev_output_tokens"], self.source_dictionary.pad())
        return super().valid_step(sample, model, criterion)

    def reduce_metrics(self, logging_outputs, criterion):
        super().reduce_metrics(logging_outputs, criterion)
        if self.recorder is None:
            raise ArtifactError(f"subset {self.subset!r} has no sentences to record")
        self.recorder.remove()
        distributed = dist.is_initialized() and dist.get_world_size() > 1
        stats = self.recorder.finish(
            group=distributed_utils.get_data_parallel_group() if distributed else None,
            data=[{"name": os.path.basename(os.path.abspath(self.cfg.data)), "subset": self.subset}],
            languages=[self.cfg.source_lang, self.cfg.target_lang],
            checkpoint=file_sha256(self.cfg.stats_checkpoint) if self.cfg.stats_checkpoint else None,
            dictionaries=dictionary_hashes(self),
            max_positions=self.cfg.stats_max_positions,
            versions=versions(),
        )
        self.recorder = None
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
        if sentences < available:
            logger.warning(
                f"{available - sentences:,} sentences were not recorded: longer than the model's positions, or dropped "
                "from the last batch by --required-batch-size-multiple"
            )


@register_task("pruned_translation", dataclass=TranslationConfig)
class PrunedTranslationTask(TranslationTask):
    """``translation`` whose beam search over pruned transformers is decided on the device (`generation`)."""

    def build_generator(self, models, args, seq_gen_cls=None, extra_gen_cls_kwargs=None, prefix_allowed_tokens_fn=None):
        if seq_gen_cls is None and not getattr(args, "print_alignment", False):
            seq_gen_cls = PrunedSequenceGenerator
        return super().build_generator(models, args, seq_gen_cls, extra_gen_cls_kwargs, prefix_allowed_tokens_fn)
