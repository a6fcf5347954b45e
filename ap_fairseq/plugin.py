"""Registration with fairseq: the pruned models with their architectures, and the tasks.

A Python program that uses fairseq's functions imports this module; ``--user-dir`` imports it through the package.
"""

import functools
import os
import sys

from ap_fairseq.compat import (
    allow_fairseq_checkpoints,
    hide_notices_of_hydra,
    patch_alignment_generators,
    patch_ema_integers,
    patch_gloo_shutdown,
    patch_numpy_long,
    patch_ranks,
    patch_user_dir,
    require_fairseq,
)

require_fairseq()
allow_fairseq_checkpoints()
hide_notices_of_hydra()
patch_ema_integers()
patch_gloo_shutdown()
patch_numpy_long()
patch_ranks()
patch_user_dir()
patch_alignment_generators()

from fairseq import checkpoint_utils  # noqa: E402

import ap_fairseq.model.language_model  # noqa: E402  (registration needs a checked fairseq)
import ap_fairseq.model.roberta  # noqa: E402
import ap_fairseq.model.transformer  # noqa: E402
import ap_fairseq.tasks  # noqa: E402, F401
from ap_fairseq.files import UserError  # noqa: E402
from ap_fairseq.model.checkpoints import load_checkpoint  # noqa: E402


def report_user_errors() -> None:
    """Let fairseq's commands, too, report what the user can mend in one line; other exceptions keep their traceback."""
    stock = sys.excepthook

    def report(kind, error, traceback) -> None:
        if isinstance(error, UserError):
            print(f"{os.path.basename(sys.argv[0])}: error: {error}", file=sys.stderr)
        else:
            stock(kind, error, traceback)

    sys.excepthook = report


def report_unreadable_checkpoints() -> None:
    """Let fairseq name the checkpoint that it cannot read: torch's error does not."""
    stock = checkpoint_utils.load_checkpoint_to_cpu

    @functools.wraps(stock)
    def load_checkpoint_to_cpu(path, *args, **kwargs):
        try:
            return stock(path, *args, **kwargs)
        except Exception:
            if os.path.exists(path):
                load_checkpoint(path)  # raises if the file is at fault
            raise

    checkpoint_utils.load_checkpoint_to_cpu = load_checkpoint_to_cpu


report_user_errors()
report_unreadable_checkpoints()
