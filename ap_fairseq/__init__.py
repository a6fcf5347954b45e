"""Attention Pruning for fairseq machine translation.

Importing this package, or naming its folder with fairseq's ``--user-dir``, registers the tasks ``attention_recording``
and ``pruned_translation`` and the model ``pruned_transformer`` with its architectures.
"""

from ap_fairseq.compat import (
    allow_fairseq_checkpoints,
    compute_alignments_where_they_are_read,
    end_gloo_before_python,
    keep_integers_out_of_averages,
    require_fairseq,
)

__version__ = "0.1.0"

require_fairseq()
allow_fairseq_checkpoints()
keep_integers_out_of_averages()
end_gloo_before_python()
compute_alignments_where_they_are_read()

from ap_fairseq import models, tasks  # noqa: E402  (registration needs a checked fairseq)

__all__ = ["__version__", "models", "tasks"]
