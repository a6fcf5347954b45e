"""Registration with fairseq: the pruned models with their architectures, and the tasks.

A Python program that uses fairseq's functions imports this module; ``--user-dir`` imports it through the package.
"""

import argparse
import dataclasses
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
from fairseq.dataclass import FairseqDataclass  # noqa: E402
from fairseq.models import ARCH_MODEL_REGISTRY  # noqa: E402
from fairseq.tasks import TASK_DATACLASS_REGISTRY  # noqa: E402

import ap_fairseq.model.language_model  # noqa: E402  (registration needs a checked fairseq)
import ap_fairseq.model.transformer  # noqa: E402
import ap_fairseq.tasks  # noqa: E402, F401
from ap_fairseq.files import UserError  # noqa: E402
from ap_fairseq.model.checkpoints import load_checkpoint  # noqa: E402
from ap_fairseq.model.config import DecoderOptions, PruningOptions  # noqa: E402
from ap_fairseq.model.roberta import PrunedRobertaModel  # noqa: E402


def report_user_errors() -> None:
    """Let fairseq's commands, too, report what the user can mend in one line; other exceptions keep their traceback."""
    stock = sys.excepthook

    def report(kind, error, traceback) -> None:
        if isinstance(error, UserError):
            print(f"{os.path.basename(sys.argv[0])}: error: {error}", file=sys.stderr)
        else:
            stock(kind, error, traceback)

    sys.excepthook = report
    if os.path.basename(sys.argv[0]) == "fairseq-hydra-train":
        os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # else hydra prints a traceback of its own and asks no hook


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


def own_flags(config: type[FairseqDataclass], stock: type[FairseqDataclass]) -> set[str]:
    """Return the flags that *config* adds to *stock*, without those of fairseq's other groups, which it only reads."""
    known = {field.name for field in dataclasses.fields(stock)}
    added = [field for field in dataclasses.fields(config) if field.name not in known]
    return {f"--{field.name.replace('_', '-')}" for field in added if not str(field.default).startswith("${")}


def require_own_task_and_architecture(argv: list[str]) -> None:
    """Name the task or the architecture whose flag is given without it, which fairseq only calls unrecognized.

    Args:
        argv: the command line of a command of fairseq, which reads it after it has imported its plugins.

    Raises:
        UserError: where the task or the architecture is fairseq's own, and there is a pruned one of it.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--task", default="translation")
    parser.add_argument("--arch", "-a")
    given, others = parser.parse_known_args(argv)
    stock, ours = (TASK_DATACLASS_REGISTRY.get(name, FairseqDataclass) for name in (given.task, f"pruned_{given.task}"))
    model: type[FairseqDataclass] = FairseqDataclass
    if (pruned := ARCH_MODEL_REGISTRY.get(f"pruned_{given.arch}")) is not None:
        model = PruningOptions if pruned is PrunedRobertaModel else DecoderOptions
    task_flags, model_flags = own_flags(ours, stock), own_flags(model, FairseqDataclass)
    for flag in (word.split("=")[0] for word in others):
        for option, name, flags in (("--task", given.task, task_flags), ("--arch", given.arch, model_flags)):
            if flag in flags:
                raise UserError(f"{flag} is a flag of {option} pruned_{name}; give that in place of {name}")


report_user_errors()
report_unreadable_checkpoints()
if os.path.basename(sys.argv[0]) in ("fairseq-train", "fairseq-generate", "fairseq-interactive"):
    require_own_task_and_architecture(sys.argv[1:])
