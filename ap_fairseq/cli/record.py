"""``ap-record``: run a dense checkpoint over a data set and write its attention statistics.

A thin wrapper of ``fairseq_cli.validate``: batching, progress bars, half precision and distributed runs are fairseq's.
"""

from __future__ import annotations

import argparse
import os

from fairseq import distributed_utils, options
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from fairseq_cli import validate

from ap_fairseq.artifacts import ArtifactError, load_checkpoint
from ap_fairseq.cli.common import add_output, command

TASK = "attention_recording"


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Record the attention statistics of a trained transformer. Further options are those of "
        "fairseq-validate (--max-tokens, --batch-size, --fp16, --cpu, --num-workers, --log-format, ...)."
    )
    parser.add_argument("data", help="binarised data (fairseq-preprocess)")
    parser.add_argument("--path", required=True, metavar="CHECKPOINT", help="checkpoint of a transformer* architecture")
    parser.add_argument("--subset", default="train", help="subset to record on (default: %(default)s)")
    parser.add_argument(
        "--max-positions",
        type=int,
        default=1024,
        metavar="N",
        help="record at most N positions; cells beyond are counted and reported (default: the longest recorded "
        "sentence, at most %(default)s)",
    )
    add_output(parser, "the statistics")
    return parser


@command
def main(argv: list[str]) -> None:
    args, fairseq_argv = get_parser().parse_known_args(argv)
    if not os.path.isfile(args.path):
        raise ArtifactError(f"checkpoint {args.path} does not exist")
    if not os.path.isdir(args.data):
        raise ArtifactError(f"data folder {args.data} does not exist; make it with fairseq-preprocess")
    if not any(flag in fairseq_argv for flag in ("--max-tokens", "--batch-size", "--max-sentences")):
        fairseq_argv += ["--max-tokens", "12000"]
    if "--required-batch-size-multiple" not in fairseq_argv:
        # With its default of 8, fairseq main silently drops a last batch that is no multiple of it.
        fairseq_argv += ["--required-batch-size-multiple", "1"]

    parser = options.get_validation_parser()
    fairseq_argv = [args.data, "--task", TASK, "--path", args.path, "--valid-subset", args.subset, *fairseq_argv]
    fairseq_args = options.parse_args_and_arch(parser, fairseq_argv)
    recording = {
        "data": args.data,
        "stats_output": args.output,
        "stats_max_positions": args.max_positions,
        "stats_overwrite": args.overwrite,
        "stats_checkpoint": args.path,
    }
    overrides = argparse.Namespace(**_task_overrides(args.path, recording))
    if fairseq_args.model_overrides:
        overrides.model_overrides = fairseq_args.model_overrides
    distributed_utils.call_main(convert_namespace_to_omegaconf(fairseq_args), validate.main, override_args=overrides)


def _task_overrides(path: str, recording: dict) -> dict:
    """Return the overrides that make a checkpoint's own task an ``attention_recording`` task.

    ``fairseq-validate --task X`` silently runs the task stored in the checkpoint, so the stored one is replaced: a
    nested config in checkpoints of fairseq >= 0.10, flat arguments in older ones.
    """
    stored = load_checkpoint(path).get("cfg")
    if stored is not None and not isinstance(stored["task"], argparse.Namespace):
        return {"task": {"_name": TASK, **recording}}
    return {"task": TASK, **recording}
