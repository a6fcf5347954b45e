"""Registration with fairseq: the pruned models with their architectures, and the tasks.

A Python program that uses fairseq's functions imports this module; ``--user-dir`` imports it through the package.
"""

import os
import sys

from ap_fairseq.compat import (
    allow_fairseq_checkpoints,
    hide_notices_of_hydra,
    patch_alignment_generators,
    patch_ema_integers,
    patch_gloo_shutdown,
    patch_numpy_long,
    patch_ranks_without_gpu,
    patch_user_dir,
    require_fairseq,
)

require_fairseq()
allow_fairseq_checkpoints()
hide_notices_of_hydra()
patch_ema_integers()
patch_gloo_shutdown()
patch_numpy_long()
patch_ranks_without_gpu()
patch_user_dir()
patch_alignment_generators()

import ap_fairseq.model.language_model  # noqa: E402  (registration needs a checked fairseq)
import ap_fairseq.model.roberta  # noqa: E402
import ap_fairseq.model.transformer  # noqa: E402
import ap_fairseq.search.task  # noqa: E402, F401
from ap_fairseq.files import UserError  # noqa: E402


def report_user_errors() -> None:
    """Let fairseq's commands, too, report what the user can mend in one line; other exceptions keep their traceback."""
    stock = sys.excepthook

    def report(kind, error, traceback) -> None:
        if isinstance(error, UserError):
            print(f"{os.path.basename(sys.argv[0])}: error: {error}", file=sys.stderr)
        else:
            stock(kind, error, traceback)

    sys.excepthook = report


report_user_errors()
