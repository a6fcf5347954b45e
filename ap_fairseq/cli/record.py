"""``ap-record``: run a checkpoint over a data set and write its attention statistics.

The command line is checked here against checkpoint and data; :mod:`ap_fairseq.recording.run` records on each rank.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from fairseq import distributed_utils, options
from fairseq.data import Dictionary, data_utils
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from torch.multiprocessing import ProcessExitedException, ProcessRaisedException, get_context

import ap_fairseq.plugin  # noqa: F401  (registers with fairseq)
from ap_fairseq.cli.common import add_output, command, literal, without_usage
from ap_fairseq.cli.user_dir import add_user_dir, import_user_dir
from ap_fairseq.data_bin import load_dictionary
from ap_fairseq.files import ArtifactError, UserError
from ap_fairseq.model.checkpoints import load_checkpoint, stored_model
from ap_fairseq.provenance import dictionary_files, dictionary_sha256
from ap_fairseq.recording.run import Recording, record_on_rank
from ap_fairseq.recording.tasks import RecordedTask, recordable_architectures, recorded_task, stored_task

REPLACED = {  # flags of fairseq-validate that recording does not read
    "--valid-subset": "choose what to record with --subset",
    "--combine-valid-subsets": "record each --subset into a file of its own, ap-masks merges them",
    "--combine-val": "record each --subset into a file of its own, ap-masks merges them",
    "--num-shards": "the ranks of --distributed-world-size share the data; --sample N records less of it",
    "--shard-id": "the ranks of --distributed-world-size share the data; --sample N records less of it",
}


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Record the attention statistics of a trained transformer. Further options are those of "
        "fairseq-validate (--max-tokens, --batch-size, --fp16, --bf16, --cpu, --num-workers, --log-format, ...). All "
        "GPUs of the machine share the work, or --distributed-world-size N of them."
    )
    parser.add_argument("data", help="binarised data (fairseq-preprocess)")
    parser.add_argument(
        "--path",
        required=True,
        metavar="CHECKPOINT",
        help="checkpoint of a transformer*, transformer_lm* or roberta* architecture",
    )
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
    add_user_dir(parser)
    add_output(parser, "the statistics")
    return parser


@command
def main(argv: list[str]) -> None:
    args, fairseq_argv = without_usage(get_parser()).parse_known_args(argv)
    _require_data(args.data, args.subset)
    import_user_dir(args.user_dir)
    state = load_checkpoint(args.path)
    task = _task(state, args.path)
    cfg, given = _fairseq_configuration(args, fairseq_argv, task)
    chosen = {name: cfg.task[name] for name in task.chosen if f"--{name.replace('_', '-')}" in given}
    job = Recording(
        checkpoint=args.path,
        data=args.data,
        subset=args.subset,
        output=args.output,
        max_positions=args.max_positions,
        sample=args.sample,
        importance=args.importance,
        overwrite=args.overwrite,
        model_overrides=literal("--model-overrides", cfg.common_eval.model_overrides),
        task_settings=chosen,
        log_interval=cfg.common.log_interval if "--log-interval" in given else None,
    )
    job.require_valid()
    _require_dictionaries(task, state, args)
    _require_training_dictionaries(state, args)
    _require_settings(task, state, args.path, given, cfg.task)
    _record(cfg, job)


def _record(cfg, job: Recording) -> None:
    """Record on all ranks.

    Raises:
        UserError: what a rank raises, and where one dies or cannot be started.
    """
    try:
        distributed_utils.infer_init_method(cfg.distributed_training)
    except AssertionError as error:  # such as "world size is 2 but have 0 available devices"
        raise UserError(
            f"--distributed-world-size {cfg.distributed_training.distributed_world_size}: {error}; leave the flag out, "
            "or start the ranks with torchrun"
        ) from error
    errors = get_context("spawn").SimpleQueue()
    try:
        distributed_utils.call_main(cfg, record_on_rank, job=job, errors=errors)
    except ProcessRaisedException as error:  # of a rank that fairseq spawned; the others are stopped by then
        if errors.empty():
            raise
        raise UserError(errors.get()) from error
    except ProcessExitedException as error:
        raise UserError(
            f"rank {error.error_index} of the recording died ({error}); the others were stopped, {job.output} was not "
            "written. If it ran out of memory, lower --max-tokens or --max-positions; then run again"
        ) from error


def _fairseq_configuration(args: argparse.Namespace, argv: list[str], task: RecordedTask):
    """Return fairseq's configuration, and the flags that the caller gave for it."""
    given = {word.split("=")[0] for word in argv}
    for flag, instead in REPLACED.items():
        if flag in given:
            raise UserError(f"{flag} has no effect on ap-record; {instead}")
    if not given & {"--max-tokens", "--batch-size", "--max-sentences"}:
        argv = [*argv, "--max-tokens", "12000"]
    # Before the caller's flags, which win. With its default of 8, fairseq main silently drops a last batch that is no
    # multiple of it.
    argv = [args.data, "--path", args.path, "--required-batch-size-multiple", "1", *task.flags, *argv]
    if args.user_dir is not None:
        argv += ["--user-dir", args.user_dir]
    fairseq_args = options.parse_args_and_arch(
        without_usage(options.get_validation_parser(default_task=task.name)), argv
    )
    if fairseq_args.task not in (task.name, f"pruned_{task.name}"):
        raise UserError(
            f"--task {fairseq_args.task}: {args.path} is recorded under fairseq's task {task.name}; leave the flag out"
        )
    fairseq_args.tpu = False  # fairseq's parser sets it for --bf16
    return convert_namespace_to_omegaconf(fairseq_args), given


def _require_data(data: str, subset: str) -> None:
    if "," in subset:
        raise UserError(
            f"--subset {subset} names several subsets; record each into a file of its own, ap-masks merges them"
        )
    shards = data.split(os.pathsep)
    if os.path.isdir(data):
        if len(shards) > 1:
            raise UserError(f"data folder {data}: fairseq splits paths at {os.pathsep!r}; rename or link the folder")
        return
    if len(shards) > 1 and all(map(os.path.isdir, shards)):
        raise UserError(f"{data} names {len(shards)} shards; record each into a file of its own, ap-masks merges them")
    raise ArtifactError(
        f"data folder {data} does not exist; fairseq-preprocess makes it, and it goes before fairseq's flags"
    )


def _task(state: dict[str, Any], path: str) -> RecordedTask:
    """Return the task under which a checkpoint is recorded, after a check that its model can be."""
    name, model = stored_model(state)
    architectures = recordable_architectures()
    if model is None or model not in architectures.values():
        raise ArtifactError(
            f"{path} holds a model of architecture {name!r}; attention can be recorded from {', '.join(architectures)}"
            + ("; an architecture of your own needs the --user-dir that registers it" if model is None else "")
        )
    return recorded_task(model, stored_task(state))


def _require_settings(task: RecordedTask, state: dict[str, Any], path: str, given: set[str], cfg) -> None:
    """Refuse settings of the task that are not those of the checkpoint's, which decide."""
    stored = stored_task(state)
    if task.name == "translation" and not stored.get("source_lang"):  # it was taken from the names of the data
        stored["source_lang"], stored["target_lang"] = data_utils.infer_language_pair(cfg.data)
    for name, short in task.refused.items():
        flag = f"--{name.replace('_', '-')}"
        if given & {flag, short} and name in stored and cfg[name] != stored[name]:
            raise UserError(
                f"{flag} {cfg[name]}: {path} was trained with {stored[name]}, and is recorded with the settings of its "
                "task; leave the flag out"
            )


def _require_dictionaries(recorded: RecordedTask, state: dict[str, Any], args: argparse.Namespace) -> None:
    """Raise ArtifactError unless the data have the dictionaries that the task of a checkpoint reads."""
    if not dictionary_files(args.data):
        raise ArtifactError(f"{args.data} has no dictionary dict*.txt; name a folder made by fairseq-preprocess")
    task, missing = stored_task(state), None
    if (
        recorded.name == "translation"
        and not task.get("source_lang")
        and None in data_utils.infer_language_pair(args.data)
    ):
        missing = "no text in two languages"
    elif recorded.name in ("language_modeling", "masked_lm") and not (Path(args.data) / "dict.txt").is_file():
        missing = "no dictionary dict.txt, as text of one language has"
    if missing:
        raise ArtifactError(
            f"{args.data} has {missing}, but {args.path} is recorded under fairseq's task {recorded.name}; record on "
            "the data-bin that it was trained with"
        )
    for side in ("source_lang", "target_lang"):
        if task.get(side) and not (Path(args.data) / f"dict.{task[side]}.txt").is_file():
            raise ArtifactError(
                f"{args.data} has no dictionary dict.{task[side]}.txt, but {args.path} was trained with "
                f"{task[side]!r}; record on the data-bin that it was trained with"
            )


def _require_training_dictionaries(state: dict[str, Any], args: argparse.Namespace) -> None:
    """Compare the dictionaries of the data with those of the training data, if that is still where it was.

    Dictionaries of another size do not fit the model; others of the same size would be recorded without a trace.
    """
    trained_on = str(stored_task(state).get("data") or "").split(os.pathsep)[0]
    for file in dictionary_files(args.data):
        original = Path(trained_on) / file.relative_to(args.data)
        ours = dictionary_sha256(load_dictionary(Dictionary, file))
        if not original.is_file():
            continue
        theirs = dictionary_sha256(load_dictionary(Dictionary, original))
        if ours != theirs:
            raise ArtifactError(
                f"{file} has the SHA-256 {ours[:12]}; {args.path} was trained with {original}, which has "
                f"{theirs[:12]}; record on the data-bin that the checkpoint was trained with"
            )


if __name__ == "__main__":
    main()
