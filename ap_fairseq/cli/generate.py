"""``ap-generate``: translate with fairseq's generators on every GPU of the machine, a test set or a text."""

from __future__ import annotations

import argparse
import functools
import logging
import math
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from fairseq import options, scoring, utils
from fairseq.data import Dictionary, data_utils, encoders
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from omegaconf import OmegaConf

import ap_fairseq.plugin  # noqa: F401  (registers with fairseq)
from ap_fairseq.cli.common import command, drop_stdout, literal, without_usage
from ap_fairseq.cli.user_dir import import_user_dir, user_dir_of
from ap_fairseq.devices import count_gpus
from ap_fairseq.files import ArtifactError, UserError, refuse_existing, require_file, write_pieces
from ap_fairseq.generation.binarised import translate_subset
from ap_fairseq.generation.loading import checkpoint_files
from ap_fairseq.generation.ranks import Ranks, locked
from ap_fairseq.generation.text import PART_LINES, SETTINGS, Text, default_part_lines, spool_stdin, translate_text
from ap_fairseq.generation.translator import Translator
from ap_fairseq.generation.workers import spare_processes
from ap_fairseq.provenance import dictionary_files

logger = logging.getLogger(__name__)

UNPRINTED = "output.txt"  # what standard output did not take

_SHARE = "--num-processes N says how many processes share the work, one for each GPU by default"
_PROGRESS = "the progress of all processes is shown together"
_ONE_LINE = "with --input each line has one translation, and no reference"

_CONSTRAINTS = "fairseq-interactive reads them from the lines that it translates"

REFUSED = {  # options of fairseq-generate and fairseq-interactive without a meaning here
    **dict.fromkeys(("--num-shards", "--shard-id", "--distributed-world-size", "--distributed-rank"), _SHARE),
    **dict.fromkeys(("--distributed-init-method", "--distributed-port", "--distributed-no-spawn"), _SHARE),
    **dict.fromkeys(("--device-id", "--local_rank"), _SHARE),
    **dict.fromkeys(("--log-format", "--log-interval", "--log-file", "--no-progress-bar"), _PROGRESS),
}
REFUSED_FOR_TEXT = {
    **dict.fromkeys(("--gen-subset", "--prefix-size", "--score-reference", "--scoring", "--quiet"), _ONE_LINE),
    **dict.fromkeys(("--print-alignment", "--print-step", "--retain-iter-history"), _ONE_LINE),
    **dict.fromkeys(("--lm-path", "--replace-unk"), "translate a data-bin folder, without --input"),
    "--constraints": _CONSTRAINTS,
    "--results-path": "name the translation with --output FILE",
    "--skip-invalid-size-inputs-valid-test": "cut lines that are too long with --truncate-source",
}
REFUSED_FOR_DATA = {
    "--output": "the lines of a test set go to standard output, or to --results-path DIR",
    "-o": "the lines of a test set go to standard output, or to --results-path DIR",
    "--overwrite": "a result in --results-path is replaced, as fairseq-generate does",
    "--buffer-size": "it is for --input",
    "--constraints": _CONSTRAINTS,
}


def get_parser() -> argparse.ArgumentParser:
    parser = options.get_interactive_generation_parser(default_task="pruned_translation")
    parser.description = (
        "Translate with one process for each GPU, or several on a CPU. Without --input, a test set: lines and score of "
        "fairseq-generate, of all sentences in order. With --input, a text: plain text, one line for each line. All "
        "options are those of fairseq-generate and fairseq-interactive, but --task is pruned_translation unless given."
    )
    group = parser.add_argument_group("ap-generate")
    group.add_argument(
        "--num-processes", type=int, metavar="N", help="processes (default: one for each GPU, one on a CPU)"
    )
    group.add_argument(
        "-o",
        "--output",
        metavar="FILE",
        help="where to write the translation of --input (default, or -: standard output). The same command goes on "
        "where it was cut: finished parts (--buffer-size lines, on a GPU by default "
        f"{PART_LINES[0]:,} to {PART_LINES[1]:,}, on a CPU {PART_LINES[0]:,}) are in FILE.parts until all are done",
    )
    group.add_argument("--overwrite", action="store_true", help="replace an existing output file")
    parser.set_defaults(input=None, num_workers=None)
    return parser


@command
def main(argv: list[str]) -> None:
    import_user_dir(user_dir_of(argv))
    # Before the caller's flags, which win. With its default of 8, fairseq main drops an incomplete last batch.
    args = options.parse_args_and_arch(without_usage(get_parser()), ["--required-batch-size-multiple", "1", *argv])
    _refuse_flags(argv, args.input is not None)
    _require_checkpoints(args)
    _require_data(args)
    _require_settings(args)
    if args.max_tokens is None and args.batch_size is None:
        args.max_tokens = 12000  # as fairseq-generate
    args.log_format, args.tpu = "simple", False  # fairseq's parser sets the latter for --bf16
    args.num_processes = count_ranks(args.num_processes, args.cpu)
    if args.num_workers is None:
        args.num_workers = spare_processes(args.num_processes, 4, args.cpu)
    if args.input is None:
        _translate_subset(args)
    else:
        _translate_text(args)


# -- the command line is checked before processes start ---------------------------------------------------------------


def _refuse_flags(argv: list[str], is_text: bool) -> None:
    given = {word.split("=")[0] if word.startswith("--") else word[:2] for word in argv}
    for refused in (REFUSED, REFUSED_FOR_TEXT if is_text else REFUSED_FOR_DATA):
        for flag in [flag for flag in refused if flag in given]:
            raise UserError(f"{flag} has no meaning for ap-generate{' --input' * is_text}; {refused[flag]}")


def _require_checkpoints(args: argparse.Namespace) -> None:
    if args.path is None:
        raise UserError("--path is missing; name a checkpoint, or several joined by colons")
    for path in checkpoint_files(args.path, args.checkpoint_suffix, args.checkpoint_shard_count):
        require_file(path, "a fairseq checkpoint")
        with open(path, "rb") as stream:
            begin = stream.read(2)
        if not begin or (begin == b"PK" and not zipfile.is_zipfile(path)):
            raise ArtifactError(f"{path} is empty or cut off, expected a fairseq checkpoint; copy it again")


def _require_data(args: argparse.Namespace) -> None:
    """Raise UserError unless the data-bin folders have the dictionaries of the languages, and the subset."""
    folders = utils.split_paths(args.data)
    if not dictionary_files(folders[0]):
        raise UserError(f"{folders[0]} has no dictionary dict*.txt; name a folder made by fairseq-preprocess")
    if args.task == "pruned_translation" and not list(Path(folders[0]).glob("dict.*.txt")):
        raise UserError(
            f"{folders[0]} has one dictionary dict.txt, as text of a language model has; add --task "
            "pruned_language_modeling"
        )
    if args.task in ("pruned_language_modeling", "language_modeling") and not (Path(folders[0]) / "dict.txt").exists():
        raise UserError(
            f"--task {args.task}: {folders[0]} has no dictionary dict.txt, as text of a language model has; name the "
            "data-bin that it was trained with, or leave the flag out for a translation model"
        )
    if args.lm_path is not None:
        require_file(args.lm_path, "a fairseq checkpoint of a language model")
        if not (Path(folders[0]) / "dict.txt").exists():
            raise UserError(
                f"--lm-path {args.lm_path}: fairseq reads its dictionary from {folders[0]}/dict.txt, which does not "
                "exist; copy that of the target language to there, with which the language model was trained"
            )
    if args.task in ("pruned_translation", "translation"):
        _require_languages(folders[0], {"--source-lang": args.source_lang, "--target-lang": args.target_lang})
    if args.input is None and not any(list(Path(folder).glob(f"{args.gen_subset}.*")) for folder in folders):
        subsets = sorted({file.name.split(".")[0] for folder in folders for file in Path(folder).glob("*.idx")})
        raise UserError(f"--gen-subset {args.gen_subset}: {args.data} has {', '.join(subsets) or 'no subset'}")


def _require_languages(folder: str, languages: dict[str, str | None]) -> None:
    """Raise UserError unless *languages*, by flag, have dictionaries in *folder*, or its text names those left out."""
    if None in languages.values() and data_utils.infer_language_pair(folder)[0] is None:
        raise UserError(f"{folder} has no text that names its languages; give --source-lang and --target-lang")
    for flag, language in languages.items():
        if language is not None and not (Path(folder) / f"dict.{language}.txt").exists():
            found = sorted(file.name.split(".")[1] for file in Path(folder).glob("dict.*.txt"))
            raise UserError(f"{flag} {language}: {folder} has dictionaries of {', '.join(found)}; name one of them")


def _require_settings(args: argparse.Namespace) -> None:
    """Raise UserError for numbers that fairseq takes and cannot use, and for what leads hydra to a traceback."""
    for name, number in vars(args).items():
        if isinstance(number, float) and not math.isfinite(number):
            raise UserError(f"--{name.replace('_', '-')} {number}: give a finite number")
    for flag, number in (("--beam", args.beam), ("--nbest", args.nbest)):
        if number < 1:
            raise UserError(f"{flag} {number}: a search keeps and returns at least 1 hypothesis")
    if args.temperature <= 0:
        raise UserError(f"--temperature {args.temperature}: scores are divided by it; give a number above 0")
    if args.sampling and args.input is None and args.nbest != args.beam:
        raise UserError(
            f"--sampling --beam {args.beam} --nbest {args.nbest}: each hypothesis is a sample; give both one number"
        )
    if args.buffer_size < 0:
        raise UserError(f"--buffer-size {args.buffer_size} is not a number of lines")
    if args.num_workers is not None and args.num_workers < 0:
        raise UserError(f"--num-workers {args.num_workers} is not a number of processes; give 0 or more")
    if not 0 <= args.seed < 1 << 32:
        raise UserError(f"--seed {args.seed}: numpy's random numbers take one from 0 to {(1 << 32) - 1}")
    literal("--model-overrides", args.model_overrides)
    if args.tokenizer == "moses" and None in (args.source_lang, args.target_lang):
        raise UserError("--tokenizer moses needs --source-lang and --target-lang")


def _require_parts(cfg) -> None:
    """Raise UserError unless the processes can build --bpe, --tokenizer and --scoring, and know --remove-bpe's."""
    try:
        data_utils.post_process("", cfg.common_eval.post_process)
    except NotImplementedError as error:
        raise UserError(
            f"--remove-bpe {cfg.common_eval.post_process}: fairseq joins the tokens of sentencepiece, subword_nmt (or "
            "'@@ '), wordpiece, letter, silence and _EOW, or none; name one of them"
        ) from error
    build_scorer = functools.partial(scoring.build_scorer, tgt_dict=Dictionary())
    builders = {"bpe": encoders.build_bpe, "tokenizer": encoders.build_tokenizer, "scoring": build_scorer}
    for flag, build in builders.items():
        chosen = cfg[flag]
        if chosen is not None and (missing := OmegaConf.missing_keys(chosen)):
            names = sorted(name.rpartition(".")[2].replace("_", "-") for name in missing)
            raise UserError(f"--{flag} {chosen._name} needs {' and '.join(f'--{name}' for name in names)}")
        try:
            build(chosen)
        except (ImportError, OSError, RuntimeError, ValueError) as error:  # no package, no file, or a wrong one
            raise UserError(f"--{flag} {chosen._name}: {' '.join(str(error).split())}") from error


# -- translation ------------------------------------------------------------------------------------------------------


def count_ranks(wanted: int | None, cpu: bool) -> int:
    """Return how many processes share the work: more than GPUs share these.

    Raises:
        UserError: if none is wanted.
    """
    if wanted is None:
        return max(1, count_gpus(cpu))
    if wanted < 1:
        raise UserError(f"--num-processes {wanted}: at least one process translates")
    return wanted


def _start_ranks(args: argparse.Namespace, folder: Path) -> Ranks:
    return Ranks([folder / f"rank{rank}.log" for rank in range(args.num_processes)], args.cpu)


def _configuration(args: argparse.Namespace):
    """Return fairseq's configuration, which takes half a second: the processes start meanwhile."""
    cfg = convert_namespace_to_omegaconf(argparse.Namespace(**{**vars(args), "input": args.input or "-"}))
    _require_parts(cfg)
    return cfg


def _translate_subset(args: argparse.Namespace) -> None:
    name = f"generate-{args.gen_subset}.txt"
    results = Path(args.results_path) if args.results_path else None
    if results is None:
        _require_stdout("--results-path DIR")
    else:
        results.mkdir(parents=True, exist_ok=True)
        refuse_existing(results / name, overwrite=True)
    with _work_folder(results / f"{name}.parts" if results else None) as folder:
        with _start_ranks(args, folder) as ranks:
            joined = translate_subset(_configuration(args), ranks, folder)
        if results is None:
            return _print(lambda: joined.pieces(args.quiet), folder)
    write_pieces(results / name, joined.pieces(args.quiet), overwrite=True)


def _translate_text(args: argparse.Namespace) -> None:
    if args.nbest > 1:
        raise UserError(f"--nbest {args.nbest}: with --input each line has one translation; leave the flag out")
    if args.sampling and args.beam > 1:
        raise UserError(f"--sampling --beam {args.beam}: with --input each line has one sample; give --beam 1")
    output = Path(args.output) if args.output not in (None, "-") else None
    if output is None:
        _require_stdout("--output FILE")
    else:
        refuse_existing(output, args.overwrite, [args.input])
    if args.input == "-" and sys.stdin is None:
        raise UserError("--input -: standard input is closed; name a text with --input FILE")
    with _work_folder(output.with_name(f"{output.name}.parts") if output else None, keep=(SETTINGS, "part")) as folder:
        with _start_ranks(args, folder) as ranks:
            cfg = _configuration(args)
            ranks.load(Translator, cfg)  # while the text is read and the checkpoint hashed, which may take as long
            path = spool_stdin(folder) if args.input == "-" else Path(args.input)
            name = "standard input" if args.input == "-" else args.input
            part_lines = args.buffer_size or default_part_lines(path, cpu=not count_gpus(args.cpu))
            text = Text.scan(path, name, part_lines)
            parts = translate_text(args, cfg, text, ranks, folder)
        if output is None:
            _print(lambda: map(Path.read_bytes, parts), folder)
        else:
            write_pieces(output, map(Path.read_bytes, parts), args.overwrite)
    lines = f"{text.lines:,} line{'s' * (text.lines != 1)}"
    logger.info(f"{lines} translated -> {output or 'standard output'}")


def _require_stdout(instead: str) -> None:
    if sys.stdout is None:
        raise UserError(f"standard output is closed; open it, or name the result with {instead}")


def _print(pieces: Callable[[], Iterable[bytes]], folder: Path) -> None:
    """Write what *pieces* returns to standard output.

    Raises:
        UserError: if it does not take them, as on a full disk; then they are in :data:`UNPRINTED` in *folder*.
    """
    try:
        sys.stdout.buffer.writelines(pieces())
        sys.stdout.buffer.flush()
    except BrokenPipeError:  # nobody reads any more
        raise
    except OSError as error:
        drop_stdout()
        write_pieces(folder / UNPRINTED, pieces())
        raise UserError(
            f"standard output could not be written ({error}); all that belongs there is in {folder / UNPRINTED}"
        ) from error


@contextmanager
def _work_folder(path: Path | None, keep: tuple[str, ...] = ()) -> Iterator[Path]:
    """Yield a folder for logs and parts, which goes when all is done; a run that fails leaves its logs.

    Args:
        path: of the folder; None for a temporary one, which stays only for the file that an error names.
        keep: what names of further files begin with that a run which fails leaves there.
    """
    temporary = path is None
    if path is None:
        path, keep = Path(tempfile.mkdtemp(prefix="ap-generate-")), (UNPRINTED,)
    elif path.exists() and not path.is_dir():
        raise ArtifactError(f"{path} is a file, a folder of this name holds what is unfinished; move it away")
    path.mkdir(exist_ok=True)
    with locked(path):
        try:
            yield path
        except BaseException as error:
            for entry in path.iterdir():
                if entry.is_dir():
                    shutil.rmtree(entry)
                elif not entry.name.startswith(keep) and not (entry.suffix == ".log" and entry.stat().st_size):
                    entry.unlink()
            if not any(path.iterdir()) or (temporary and str(path) not in str(error)):
                shutil.rmtree(path)
            elif isinstance(error, KeyboardInterrupt) and any(
                entry.name.startswith("part") for entry in path.iterdir()
            ):
                logger.info(f"what is done is in {path}; the same command goes on")
            raise
        shutil.rmtree(path)


if __name__ == "__main__":
    main()
