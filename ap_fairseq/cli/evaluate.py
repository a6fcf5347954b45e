"""``ap-evaluate``: score fairseq-generate logs, with everything a score depends on beside it."""

from __future__ import annotations

import argparse
import json
import shlex
from pathlib import Path

import torch

from ap_fairseq.artifacts import ArtifactError, file_sha256, load_checkpoint, refuse_existing, versions
from ap_fairseq.cli.common import command
from ap_fairseq.evaluation import read_hypotheses, read_lines, score, write_json
from ap_fairseq.models import decode_provenance
from ap_fairseq.sites import AttentionKind


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Score the output of fairseq-generate with sacreBLEU and chrF and print a table. Each system is "
        "NAME=LOG or NAME=LOG,CHECKPOINT; the checkpoint adds its hash and the sparsity of its masks."
    )
    parser.add_argument("systems", nargs="*", metavar="NAME=LOG[,CHECKPOINT]")
    parser.add_argument("--reference", help="raw reference text, one sentence a line")
    parser.add_argument("--markdown", metavar="JSON", help="print a results file as a Markdown table, and nothing else")
    parser.add_argument(
        "--stages", metavar="DIR", help="stage marks of an example's run: adds the seconds of each stage"
    )
    parser.add_argument("-o", "--output", metavar="FILE", help="write the scores as JSON")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output file")
    return parser


def evaluate(name: str, log: str, checkpoint: str | None, references: list[str]) -> dict:
    """Return the scores of one system with its signature."""
    result = {"system": name, **score(read_hypotheses(log), references)}
    if checkpoint:
        result["checkpoint_sha256"] = file_sha256(checkpoint)
        provenance = decode_provenance(load_checkpoint(checkpoint)["model"].get("mask_metadata"))
        if provenance is not None:
            result["masks_sha256"] = provenance["masks_sha256"]
            result["procedure"] = provenance["procedure"]
            result["sparsity"] = provenance["sparsity"]
    return result


def environment() -> dict:
    """Return the device and the versions that produced the scores."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU ({torch.get_num_threads()} threads)"
    return {"device": device, "versions": versions()}


def read_seconds(folder: str) -> dict[str, float]:
    """Read the stage marks of ``scripts/stages.sh``: the first line of each file is its duration in seconds."""
    marks = sorted(Path(folder).glob("*"), key=lambda mark: mark.stat().st_mtime)
    return {mark.name: float(mark.read_text(encoding="utf-8").split("\n", 1)[0]) for mark in marks}


def _pruned_cells(result: dict) -> list[str]:
    """Return effective sparsity and kept mass of each kind in percent, or ``dense``."""
    parts = [result.get("sparsity", {}).get(kind.value) for kind in AttentionKind]
    return ["dense" if part is None else "{effective:.1%} / {kept_mass:.1%}".format(**part) for part in parts]


def format_results(results: list[dict]) -> str:
    """Render the scores as a table for terminals; effective sparsity and kept mass in percent."""
    header = f"{'system':<28}{'BLEU':>7}{'chrF2':>7}{'ratio':>7}"
    header += "".join(f"{kind.value + ' pruned/kept mass':>32}" for kind in AttentionKind)
    lines = [header]
    for result in results:
        line = f"{result['system']:<28}{result['bleu']:>7.2f}{result['chrf']:>7.2f}{result['length_ratio']:>7.3f}"
        lines.append(line + "".join(f"{cell:>32}" for cell in _pruned_cells(result)))
    lines.append(f"BLEU {results[0]['bleu_signature']}")
    lines.append(f"chrF2 {results[0]['chrf_signature']}")
    return "\n".join(lines)


def format_markdown(document: dict) -> str:
    """Render a results file as a Markdown table; pruned = effective sparsity, kept = kept mass, in percent."""
    lines = [
        "| system | BLEU | chrF2 | length ratio | "
        + " | ".join(f"{kind.value} pruned / kept" for kind in AttentionKind)
        + " |",
        "|---|---:|---:|---:|" + "---:|" * len(AttentionKind),
    ]
    for result in document["systems"]:
        cells = [result["system"], f"{result['bleu']:.2f}", f"{result['chrf']:.2f}", f"{result['length_ratio']:.3f}"]
        lines.append("| " + " | ".join(cells + _pruned_cells(result)) + " |")
    first, versions = document["systems"][0], document["versions"]
    lines += [
        "",
        f"{document['device']}, torch {versions['torch']}, fairseq {versions['fairseq']}; "
        f"{first['sentences']:,} sentences; BLEU `{first['bleu_signature']}`, chrF2 `{first['chrf_signature']}`.",
    ]
    return "\n".join(lines)


@command
def main(argv: list[str]) -> None:
    args = get_parser().parse_args(argv)
    if args.markdown:
        print(format_markdown(json.loads(Path(args.markdown).read_text(encoding="utf-8"))))
        return
    if not args.systems or not args.reference:
        raise ArtifactError("nothing to score: name at least one NAME=LOG and the --reference")
    if args.output:
        refuse_existing(args.output, args.overwrite)
    references = read_lines(args.reference)
    results = []
    for system in args.systems:
        name, _, files = system.partition("=")
        log, _, checkpoint = files.partition(",")
        if not log:
            raise ArtifactError(f"system {system!r} is not of the form NAME=LOG or NAME=LOG,CHECKPOINT")
        results.append(evaluate(name, log, checkpoint or None, references))
    document = {"command": shlex.join(["ap-evaluate", *argv]), "systems": results, **environment()}
    print(format_results(results))
    if args.stages:
        document["seconds"] = read_seconds(args.stages)
        print("seconds: " + ", ".join(f"{name} {seconds:.0f}" for name, seconds in document["seconds"].items()))
    if args.output:
        write_json(args.output, document, args.overwrite)
