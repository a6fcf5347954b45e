"""``ap-record``: run a dense checkpoint over a data set and write its attention statistics.

A thin wrapper of ``fairseq_cli.validate``: batching, progress bars, half precision and distributed runs are fairseq's.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from fairseq import distributed_utils, options
from fairseq.data import Dictionary, data_utils
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from fairseq.models import ARCH_MODEL_REGISTRY, MODEL_REGISTRY
from fairseq_cli import validate
from torch.multiprocessing import ProcessExitedException, ProcessRaisedException

import ap_fairseq.plugin  # noqa: F401  (registers with fairseq)
from ap_fairseq.cli.common import add_output, command
from ap_fairseq.compat import GATHERED_BYTES
from ap_fairseq.files import ArtifactError, UserError, refuse_existing
from ap_fairseq.model.checkpoints import load_checkpoint
from ap_fairseq.provenance import dictionary_sha256

TASK = "attention_recording"
TASK_SETTINGS = {  # of fairseq's TranslationTask, which change what is recorded; with their short flags
    "source_lang": "-s",
    "target_lang": "-t",
    "max_source_positions": None,
    "max_target_positions": None,
    "truncate_source": None,
}
MODELS = ("transformer", "transformer_align", "pruned_transformer")


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Record the attention statistics of a trained transformer. Further options are those of "
        "fairseq-validate (--max-tokens, --batch-size, --fp16, --cpu, --num-workers, --log-format, ...). With "
        "--distributed-world-size N, N GPUs share the work."
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
    parser.add_argument(
        "--sample",
        type=int,
        metavar="N",
        help="record N sentences instead of all, one drawn from each of N runs of sentences of like length (--seed)",
    )
    parser.add_argument(
        "--importance",
        action="store_true",
        help="also record how much the training loss depends on each cell, for ap-masks --criterion importance: a "
        "backward pass for each batch, and twice the size of the file",
    )
    add_output(parser, "the statistics")
    return parser


@command
def main(argv: list[str]) -> None:
    args, fairseq_argv = get_parser().parse_known_args(argv)
    if not os.path.isfile(args.path):
        raise ArtifactError(f"checkpoint {args.path} does not exist")
    refuse_existing(args.output, args.overwrite, [args.path])
    if not os.path.isdir(args.data):
        raise ArtifactError(
            f"data folder {args.data} does not exist; fairseq-preprocess makes it, and it goes before fairseq's flags"
        )
    state = load_checkpoint(args.path)
    _require_supported(state, args.path)
    _require_dictionaries(state, args)
    if "," in args.subset:
        raise ArtifactError(
            f"--subset {args.subset} names several subsets; record each into a file of its own, ap-masks merges them"
        )
    flags = {word.split("=")[0] for word in fairseq_argv}
    if not flags & {"--max-tokens", "--batch-size", "--max-sentences"}:
        fairseq_argv += ["--max-tokens", "12000"]
    # Before the caller's flags, which win. With its default of 8, fairseq main silently drops a last batch that is no
    # multiple of it.
    fairseq_argv = ["--required-batch-size-multiple", "1", *fairseq_argv]

    parser = options.get_validation_parser()
    fairseq_argv = [args.data, "--task", TASK, "--path", args.path, "--valid-subset", args.subset, *fairseq_argv]
    fairseq_argv += ["--all-gather-list-size", str(GATHERED_BYTES)]
    fairseq_args = options.parse_args_and_arch(parser, fairseq_argv)
    _require_task(state, args.path, flags, fairseq_args)
    recording = {
        "data": args.data,
        "stats_output": args.output,
        "stats_max_positions": args.max_positions,
        "stats_sample": args.sample,
        "stats_sample_seed": fairseq_args.seed,
        "stats_importance": args.importance,
        "stats_overwrite": args.overwrite,
        "stats_checkpoint": args.path,
    }
    overrides = argparse.Namespace(**_task_overrides(state, recording))
    if fairseq_args.model_overrides:
        overrides.model_overrides = fairseq_args.model_overrides
    try:
        distributed_utils.call_main(
            convert_namespace_to_omegaconf(fairseq_args), validate.main, override_args=overrides
        )
    except ProcessRaisedException as error:  # the other ranks are stopped by then
        reported = str(error).strip().rsplit("\n", 1)[-1]
        kinds = tuple(f"{kind.__module__}.{kind.__name__}: " for kind in (UserError, ArtifactError))
        if not reported.startswith(kinds):
            raise
        raise UserError(reported.partition(": ")[2]) from error
    except ProcessExitedException as error:
        raise ArtifactError(
            f"rank {error.error_index} of the recording died ({error}); the others were stopped, {args.output} was not "
            "written. If it ran out of memory, lower --max-tokens or --max-positions; then run again"
        ) from error


def _stored(state: dict[str, Any], group: str) -> dict[str, Any]:
    """Return a group of a checkpoint's ``cfg``, or the flat ``args`` that fairseq stored before 0.10."""
    settings = state["cfg"][group] if state.get("cfg") else state["args"]
    return settings if isinstance(settings, dict) else vars(settings)


def _require_supported(state: dict[str, Any], path: str) -> None:
    settings = _stored(state, "model")
    name = settings.get("arch") or settings.get("_name")
    supported = {MODEL_REGISTRY[model] for model in MODELS}
    architectures = [arch for arch, model in ARCH_MODEL_REGISTRY.items() if model in supported]
    if name not in (*architectures, *MODELS):
        raise ArtifactError(
            f"{path} holds a model of architecture {name!r}; attention can be recorded from {', '.join(architectures)}"
        )


def _require_task(state: dict[str, Any], path: str, given: set[str], args: argparse.Namespace) -> None:
    """Refuse settings of the task that are not those of the checkpoint's, which decide."""
    stored = dict(_stored(state, "task"))
    if not stored.get("source_lang"):  # the pair was taken from the names of the data then, as it is now
        stored["source_lang"], stored["target_lang"] = data_utils.infer_language_pair(args.data)
    for name, short in TASK_SETTINGS.items():
        flag = f"--{name.replace('_', '-')}"
        if given & {flag, short} and name in stored and getattr(args, name) != stored[name]:
            raise ArtifactError(
                f"{flag} {getattr(args, name)}: {path} was trained with {stored[name]}, and is recorded with the "
                "settings of its task; leave the flag out"
            )


def _require_dictionaries(state: dict[str, Any], args: argparse.Namespace) -> None:
    """Compare the dictionaries of the data with those of the training data, if that is still where it was.

    Dictionaries of another size do not fit the model; others of the same size would be recorded without a trace.
    """
    if not any(Path(args.data).glob("dict.*.txt")):
        raise ArtifactError(f"{args.data} has no dictionary dict.*.txt; it is no folder made by fairseq-preprocess")
    trained_on = str(_stored(state, "task").get("data") or "").split(os.pathsep)[0]
    for file in sorted(Path(args.data).glob("dict.*.txt")):
        original = Path(trained_on) / file.name
        if not original.is_file():
            continue
        ours, theirs = (dictionary_sha256(Dictionary.load(str(path))) for path in (file, original))
        if ours != theirs:
            raise ArtifactError(
                f"{file} has the SHA-256 {ours[:12]}; {args.path} was trained with {original}, which has "
                f"{theirs[:12]}; record on the data-bin that the checkpoint was trained with"
            )


def _task_overrides(state: dict[str, Any], recording: dict[str, Any]) -> dict[str, Any]:
    """Return the overrides that make a checkpoint's own task an ``attention_recording`` task.

    ``fairseq-validate --task X`` silently runs the task stored in the checkpoint, so the stored one is replaced: a
    nested config in checkpoints of fairseq >= 0.10, flat arguments in older ones.
    """
    stored = state.get("cfg")
    if stored is not None and not isinstance(stored["task"], argparse.Namespace):
        return {"task": {"_name": TASK, **recording}}
    return {"task": TASK, **recording}
