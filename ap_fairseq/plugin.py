"""Registration with fairseq: task ``pruned_translation``, model ``pruned_transformer`` and its architectures.

A Python program that uses fairseq's functions imports this module; ``--user-dir`` imports it through the package.
"""

from ap_fairseq.compat import (
    allow_fairseq_checkpoints,
    patch_alignment_generators,
    patch_ema_integers,
    patch_gloo_shutdown,
    patch_ranks_without_gpu,
    patch_user_dir,
    require_fairseq,
)

require_fairseq()
allow_fairseq_checkpoints()
patch_ema_integers()
patch_gloo_shutdown()
patch_ranks_without_gpu()
patch_user_dir()
patch_alignment_generators()

import ap_fairseq.model.transformer  # noqa: E402  (registration needs a checked fairseq)
import ap_fairseq.search.task  # noqa: E402, F401
