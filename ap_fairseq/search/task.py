"""The task ``pruned_translation``: translation that searches on the device."""

import copy
from typing import Any  # fairseq's parser reads Optional[X], not X | None

from fairseq.tasks import register_task
from fairseq.tasks.translation import TranslationConfig, TranslationTask

from ap_fairseq.search.generator import PrunedSequenceGenerator, log_fallback


@register_task("pruned_translation", dataclass=TranslationConfig)
class PrunedTranslationTask(TranslationTask):
    """``translation`` whose beam search over pruned transformers is decided on the device (`generation`)."""

    _built: tuple[tuple, Any] | None = None  # what the last generator was built for, and that generator

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
