"""``ap-evaluate``: score translations, with everything a score depends on beside it."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path

import torch

import ap_fairseq.plugin  # noqa: F401  (registers with fairseq)
from ap_fairseq.cli.common import command
from ap_fairseq.evaluation import scores as evaluation
from ap_fairseq.evaluation.tables import format_latex, format_markdown, format_results, read_results
from ap_fairseq.files import ArtifactError, file_sha256, read_lines, refuse_existing, write_json
from ap_fairseq.model.checkpoints import load_checkpoint
from ap_fairseq.provenance import decode_provenance, versions


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Score translations with sacreBLEU's metrics and print a table. Each system is NAME=FILE or "
        "NAME=FILE,CHECKPOINT; FILE is a log of fairseq-generate (or those of its ranks, joined by "
        "colons) or plain text, one hypothesis a line, and the checkpoint adds its hash and the sparsity "
        "of its masks. The first system is the baseline of significance tests."
    )
    parser.add_argument("systems", nargs="*", metavar="NAME=FILE[,CHECKPOINT]")
    parser.add_argument("--reference", help="raw reference text, one sentence a line")
    parser.add_argument(
        "--metrics",
        nargs="+",
        choices=evaluation.METRICS,
        default=["bleu", "chrf"],
        help="default: bleu chrf; TER takes ten times as long as both",
    )
    parser.add_argument(
        "--significance",
        choices=evaluation.SIGNIFICANCE_TESTS,
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
        f"{' '.join(map(str, evaluation.LENGTH_BUCKETS))}",
    )
    parser.add_argument(
        "--documents",
        metavar="FILE",
        help="also score whole documents (d-BLEU): the document of each line, up to the first tab; neighbouring lines "
        "of one document are joined",
    )
    parser.add_argument(
        "--separator",
        metavar="TEXT",
        help="what separates the segments of a line that is a document, e.g. '<sep>': adds d-BLEU without it, and "
        "s-BLEU",
    )
    parser.add_argument(
        "--tokenized-bleu",
        choices=evaluation.TOKENIZED_BLEU,
        help="add Moses-tokenised BLEU, to compare with old tables only (needs sacremoses and --language)",
    )
    parser.add_argument("--language", help="language of the translations, for --tokenized-bleu, e.g. de")
    parser.add_argument(
        "--comet", metavar="FILE", help="add COMET with this local model (needs unbabel-comet and --source)"
    )
    parser.add_argument("--source", help="raw source text, for --comet")
    parser.add_argument("--markdown", metavar="JSON", help="print a results file as a Markdown table, and nothing else")
    parser.add_argument("--latex", metavar="JSON", help="print a results file as a LaTeX table, and nothing else")
    parser.add_argument(
        "--stages", metavar="DIR", help="stage marks of an example's run: adds the seconds of each stage"
    )
    parser.add_argument("-o", "--output", metavar="FILE", help="write the scores as JSON")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output file")
    return parser


# -- scoring ----------------------------------------------------------------------------------------------------------


def describe_checkpoint(checkpoint: str) -> dict:
    """Return what a checkpoint adds to the scores of its translations: its hash, and its masks if it has any."""
    result = {"checkpoint_sha256": file_sha256(checkpoint)}
    provenance = decode_provenance(load_checkpoint(checkpoint)["model"].get("mask_metadata"))
    if provenance is not None:
        result |= {key: provenance[key] for key in ("masks_sha256", "criterion", "sparsity")}
    return result


def evaluate(args: argparse.Namespace) -> dict:
    """Return the scores of all systems as ``{"systems": [...]}``, with ``"significance"`` if asked for."""
    references = read_lines(args.reference)
    documents = None
    if args.documents:
        documents = [line.partition("\t")[0] for line in read_lines(args.documents)]
    systems = [_parse_system(text) for text in args.systems]
    hypotheses = {name: evaluation.read_hypotheses(file) for name, file, _ in systems}
    if len(hypotheses) < len(systems):
        raise ArtifactError(f"two systems have the same name; names given: {', '.join(name for name, *_ in systems)}")
    results = []
    for name, _, checkpoint in systems:
        evaluation.require_parallel(name, hypotheses[name], references)
        result = {"system": name, **evaluation.score(hypotheses[name], references, args.metrics)}
        if args.by_length is not None:
            edges = args.by_length or evaluation.LENGTH_BUCKETS
            result["by_length"] = evaluation.score_by_length(hypotheses[name], references, edges)
        if documents is not None or args.separator is not None:
            result |= evaluation.score_documents(hypotheses[name], references, documents, args.separator)
        if args.tokenized_bleu:
            result |= evaluation.tokenized_bleu(hypotheses[name], references, args.tokenized_bleu, args.language)
        if checkpoint:
            result |= describe_checkpoint(checkpoint)
        results.append(result)
    document = {"systems": results}
    if args.significance:
        document["significance"] = evaluation.compare_systems(
            hypotheses, references, args.significance, args.metrics, args.samples
        )
    if args.comet:
        sources = read_lines(args.source)
        scores = evaluation.comet_scores(args.comet, sources, hypotheses, references)
        for result in results:
            result["comet"] = scores[result["system"]]
            result["comet_model"] = Path(args.comet).resolve().parent.parent.name
    return document


def _parse_system(text: str) -> tuple[str, str, str | None]:
    name, _, files = text.partition("=")
    file, _, checkpoint = files.partition(",")
    if not file:
        raise ArtifactError(f"system {text!r} is not of the form NAME=FILE or NAME=FILE,CHECKPOINT")
    return name, file, checkpoint or None


def environment() -> dict:
    """Return the device and the versions that produced the scores."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU ({torch.get_num_threads()} threads)"
    return {"device": device, "versions": versions()}


def read_seconds(folder: str) -> dict[str, float]:
    """Read the stage marks of ``scripts/stages.sh``: the first line of each file is its duration in seconds.

    Raises:
        ArtifactError: if there are none, or files of another kind.
    """
    marks = sorted(Path(folder).glob("*"), key=lambda mark: mark.stat().st_mtime)
    if not marks:
        raise ArtifactError(f"--stages {folder} holds no stage marks; they are in the folder `stages` of a run")
    seconds = {}
    for mark in marks:
        first = mark.read_text(encoding="utf-8").partition("\n")[0]
        try:
            seconds[mark.name] = float(first)
        except ValueError as error:
            raise ArtifactError(
                f"{mark} is no stage mark of scripts/stages.sh: it starts with {first[:40]!r}, not with seconds"
            ) from error
    return seconds


def _check(args: argparse.Namespace, systems: Sequence[str]) -> None:
    if not systems or not args.reference:
        raise ArtifactError("nothing to score: name at least one NAME=FILE and the --reference")
    for flag, needs in (("tokenized_bleu", "language"), ("comet", "source")):
        if getattr(args, flag) and not getattr(args, needs):
            raise ArtifactError(f"--{flag.replace('_', '-')} needs --{needs}")
    if args.samples is not None and (args.significance is None or args.samples < 1):
        raise ArtifactError(f"--samples {args.samples} takes at least 1 and goes with --significance")
    if args.significance and len(systems) < 2:
        raise ArtifactError(f"--significance compares two systems or more, got {len(systems)}")
    for _, _, checkpoint in map(_parse_system, systems):
        if checkpoint and not Path(checkpoint).is_file():
            raise ArtifactError(f"checkpoint {checkpoint} does not exist")


@command
def main(argv: list[str]) -> None:
    args = get_parser().parse_args(argv)
    if args.markdown:
        print(format_markdown(read_results(args.markdown)))
        return
    if args.latex:
        print(format_latex(read_results(args.latex)))
        return
    _check(args, args.systems)
    if args.output:
        refuse_existing(args.output, args.overwrite)
    seconds = read_seconds(args.stages) if args.stages else {}  # what is wrong with it is said before the scoring
    document = {"command": shlex.join(["ap-evaluate", *argv]), **evaluate(args), **environment()}
    print(format_results(document))
    if seconds:
        document["seconds"] = seconds
        print("seconds: " + ", ".join(f"{name} {value:.0f}" for name, value in seconds.items()))
    if args.output:
        write_json(args.output, document, args.overwrite)
