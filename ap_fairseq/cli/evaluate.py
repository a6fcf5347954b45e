"""``ap-evaluate``: score translations, and record everything that a score depends on."""

from __future__ import annotations

import argparse
import logging
import os
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from ap_fairseq.cli.common import command, without_usage
from ap_fairseq.devices import device_name
from ap_fairseq.evaluation import scores
from ap_fairseq.evaluation.hypotheses import hold_subwords, read_hypotheses
from ap_fairseq.evaluation.results import format_latex, format_markdown, format_plain, read_results
from ap_fairseq.experiments.stages import read_mark
from ap_fairseq.files import ArtifactError, UserError, file_sha256, naming, read_lines, refuse_existing, write_json
from ap_fairseq.provenance import mask_spec, stored_provenance, versions

logger = logging.getLogger(__name__)


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Score translations with sacreBLEU's metrics and print a table. Each system is NAME=FILE or "
        "NAME=FILE,CHECKPOINT. FILE is a log of fairseq-generate (those of several ranks joined by colons) or plain "
        "text with one hypothesis a line. The checkpoint adds its hash and the sparsity of its masks. Significance "
        "tests compare with the first system."
    )
    parser.add_argument("systems", nargs="*", metavar="NAME=FILE[,CHECKPOINT]")
    parser.add_argument("--reference", help="raw reference text, one sentence a line")
    parser.add_argument(
        "--metrics",
        nargs="+",
        choices=scores.METRICS,
        default=["bleu", "chrf"],
        help="default: bleu chrf; TER takes ten times as long as both",
    )
    parser.add_argument(
        "--significance",
        choices=scores.SIGNIFICANCE_TESTS,
        help="test every system against the first: paired bootstrap or paired approximate randomization",
    )
    parser.add_argument(
        "--samples", type=int, metavar="N", help="resamples or trials; default: 1,000 for bootstrap, 10,000 otherwise"
    )
    parser.add_argument(
        "--by-length",
        nargs="*",
        type=int,
        metavar="WORDS",
        help="also score by reference length; the numbers are the upper ends of the buckets, default: "
        f"{' '.join(map(str, scores.LENGTH_BUCKETS))}",
    )
    parser.add_argument(
        "--documents",
        metavar="FILE",
        help="also score whole documents (d-BLEU): each line of FILE starts with the name of its document, up to the "
        "first tab; consecutive lines of a document are joined",
    )
    parser.add_argument(
        "--separator",
        metavar="TEXT",
        help="lines are documents with this text between segments, e.g. '<sep>': adds s-BLEU, and d-BLEU without it",
    )
    parser.add_argument(
        "--tokenized-bleu",
        choices=scores.TOKENIZED_BLEU,
        help="add Moses-tokenised BLEU, for comparison with old tables (needs sacremoses and --language)",
    )
    parser.add_argument("--language", help="language of the translations, for --tokenized-bleu, e.g. de")
    parser.add_argument(
        "--comet", metavar="FILE", help="add COMET with this local model (needs unbabel-comet and --source)"
    )
    parser.add_argument("--source", help="raw source text, for --comet")
    tables = parser.add_mutually_exclusive_group()
    tables.add_argument("--markdown", metavar="JSON", help="only print a results file as Markdown tables")
    tables.add_argument("--latex", metavar="JSON", help="only print a results file as LaTeX tables")
    parser.add_argument(
        "--stages", metavar="DIR", help="folder `stages` of an example's run: adds the seconds of each stage"
    )
    parser.add_argument("-o", "--output", metavar="FILE", help="write the scores as JSON")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output file")
    return parser


# -- scoring ----------------------------------------------------------------------------------------------------------


def describe_checkpoint(checkpoint: str) -> dict:
    """Return what a checkpoint adds to the scores of its translations: its hash, and its masks if it has any."""
    from ap_fairseq.model.checkpoints import load_checkpoint  # loads fairseq, which tables do not need

    result, state = {"checkpoint_sha256": file_sha256(checkpoint)}, load_checkpoint(checkpoint)
    with naming(checkpoint):
        provenance = stored_provenance(state["model"])
    if provenance is not None:
        result |= {key: provenance[key] for key in ("masks_sha256", "sparsity") if key in provenance} | {
            "spec": mask_spec(provenance)
        }
    return result


def evaluate(args: argparse.Namespace) -> dict:
    """Return the scores of all systems as ``{"systems": [...]}``, with ``"significance"`` if asked for."""
    references = read_lines(args.reference)
    documents = [line.partition("\t")[0] for line in read_lines(args.documents)] if args.documents else None
    hypotheses = {system.name: read_hypotheses(system.files, references) for system in args.systems}
    for what, lines in (("the references", references), *hypotheses.items()):
        if hold_subwords(lines):
            logger.warning(
                f"{what}: most lines hold subwords (▁ or @@), so the scores cannot be compared with others; translate "
                "with --remove-bpe (for SentencePiece: --remove-bpe sentencepiece), and give plain references"
            )
    results = [_scores(system, hypotheses[system.name], references, documents, args) for system in args.systems]
    document = {"systems": results}
    if args.significance:
        document["significance"] = scores.compare_systems(
            hypotheses, references, args.significance, args.metrics, args.samples
        )
    if args.comet:
        sources = read_lines(args.source)
        comet = scores.comet_scores(args.comet, sources, hypotheses, references)
        for result in results:
            result["comet"] = comet[result["system"]]
            result["comet_model"] = Path(args.comet).resolve().parent.parent.name
    return document


def _scores(
    system: System, hypotheses: list[str], references: list[str], documents: list[str] | None, args: argparse.Namespace
) -> dict:
    """Return the scores of one system that need no other, and what its checkpoint adds."""
    scores.require_parallel(system.name, hypotheses, references)
    result = {"system": system.name, **scores.score(hypotheses, references, args.metrics)}
    if args.by_length is not None:
        edges = args.by_length or scores.LENGTH_BUCKETS
        result["by_length"] = scores.score_by_length(hypotheses, references, edges)
    if documents is not None or args.separator is not None:
        result |= scores.score_documents(hypotheses, references, documents, args.separator)
    if args.tokenized_bleu:
        result |= scores.tokenized_bleu(hypotheses, references, args.tokenized_bleu, args.language)
    if system.checkpoint:
        result |= describe_checkpoint(system.checkpoint)
    return result


# -- the command line -------------------------------------------------------------------------------------------------


class System(NamedTuple):
    """A system to score, as named on the command line."""

    name: str
    files: list[str]
    checkpoint: str | None


def parse_system(text: str) -> System:
    """Parse ``NAME=FILE`` or ``NAME=FILE,CHECKPOINT``, where FILE may be several files joined by colons.

    Names and paths may hold these separators, too: the first reading whose files exist is taken, short names before
    long ones and long paths before short ones. ``./`` before a path selects another reading.

    Raises:
        UserError: if there is none.
    """
    readings = list(_readings(text))
    if not readings:
        raise UserError(f"system {text!r} is not of the form NAME=FILE or NAME=FILE,CHECKPOINT")
    found = [reading for reading in readings if all(map(os.path.isfile, reading.files))]
    for reading in found:
        if reading.checkpoint is None or os.path.isfile(reading.checkpoint):
            return reading
    if found:
        raise UserError(f"system {text!r}: checkpoint {found[0].checkpoint} does not exist")
    files = text.partition("=")[2].partition(",")[0].split(os.pathsep)
    missing = next((file for file in files if not os.path.isfile(file)), files[0])
    raise UserError(f"system {text!r}: {missing} is not a file; name a log of fairseq-generate or plain text")


def _readings(text: str) -> Iterator[System]:
    for name, rest in _splits(text, "="):
        yield System(name, _files(rest) or [rest], None)
        for files, checkpoint in reversed(_splits(rest, ",")):
            yield System(name, _files(files) or [files], checkpoint)


def _files(text: str) -> list[str]:
    """Split at colons into existing files, the first as long as it can be; empty if that cannot be done."""
    if os.path.isfile(text):
        return [text]
    for first, rest in reversed(_splits(text, os.pathsep)):
        if os.path.isfile(first) and (others := _files(rest)):
            return [first, *others]
    return []


def _splits(text: str, separator: str) -> list[tuple[str, str]]:
    """Return both sides of each separator that has something on either side."""
    places = (k for k in range(1, len(text) - 1) if text[k] == separator)
    return [(text[:k], text[k + 1 :]) for k in places]


def read_seconds(folder: str) -> dict[str, float]:
    """Return the seconds of the finished stages of a run, in the order in which they ended.

    Raises:
        ArtifactError: if there are none, or files of another kind.
    """
    marks = sorted(Path(folder).glob("*"), key=lambda mark: mark.stat().st_mtime)
    if not marks:
        raise ArtifactError(f"--stages {folder} holds no stage marks; they are in the folder `stages` of a run")
    return {mark.stem: read_mark(mark)[1] for mark in marks}


def _check(args: argparse.Namespace) -> None:
    if not args.systems or not args.reference:
        raise UserError("nothing to score: name at least one NAME=FILE and the --reference")
    names = [system.name for system in args.systems]
    once = (("system", names, "give each a name of its own"), ("--metrics", args.metrics, "name each once"))
    for option, given, remedy in once:
        if twice := sorted({name for name in given if given.count(name) > 1}):
            raise UserError(f"{option} {', '.join(twice)} is given twice; {remedy}")
    for flag, needs in (("tokenized_bleu", "language"), ("comet", "source")):
        if getattr(args, flag) and not getattr(args, needs):
            raise UserError(f"--{flag.replace('_', '-')} needs --{needs}")
    if args.separator == "":
        raise UserError("--separator is empty; give the text between segments, e.g. '<sep>'")
    if args.samples is not None and (args.significance is None or args.samples < 1):
        raise UserError(f"--samples {args.samples} takes at least 1 and goes with --significance")
    if args.significance and len(names) < 2:
        raise UserError(f"--significance compares two systems or more, got {len(names)}")


@command
def main(argv: list[str]) -> None:
    args = without_usage(get_parser()).parse_args(argv)
    if args.markdown:
        print(format_markdown(read_results(args.markdown)))
        return
    if args.latex:
        print(format_latex(read_results(args.latex)))
        return
    args.systems = [parse_system(text) for text in args.systems]
    _check(args)
    if args.output:
        read = [args.reference, args.source, args.documents]
        read += [file for system in args.systems for file in (*system.files, system.checkpoint)]
        refuse_existing(args.output, args.overwrite, filter(None, read))
    seconds = read_seconds(args.stages) if args.stages else {}  # what is wrong with it is said before the scoring
    document = {"command": shlex.join(["ap-evaluate", *argv]), **evaluate(args)}
    document |= {"device": device_name(), "versions": versions()}
    if seconds:
        document["seconds"] = seconds
    if args.output:  # before printing, which ends the program if nobody reads it
        write_json(args.output, document, args.overwrite)
    print(format_plain(document))
    if seconds:
        print("seconds: " + ", ".join(f"{name} {value:.0f}" for name, value in seconds.items()))


if __name__ == "__main__":
    main()
