#!/usr/bin/env python
"""What recording a sample of the data costs: masks of samples against masks of the whole.

    ap-record DATA-BIN --path dense.pt -o full.safetensors
    for n in 1000 4000 16000; do ap-record DATA-BIN --path dense.pt --sample $n -o $n.safetensors; done
    python scripts/sample_error.py full.safetensors 1000.safetensors 4000.safetensors 16000.safetensors --share 0.5

For each sample and attention kind, measured on the pairs of the whole data set:
    overlap     share of the pairs kept by the whole's mask that the sample's mask keeps too
    effective   effective sparsity of the sample's mask (its budget was met on the sample)
    kept mass   of the sample's mask, and of the whole's mask in brackets
"""

from __future__ import annotations

import argparse

from result_files import add_result_options, git_commit, print_table, write_report

from ap_fairseq.artifacts import AttentionStats
from ap_fairseq.cli.common import command
from ap_fairseq.evaluation.tables import Table, markdown, plain
from ap_fairseq.files import ArtifactError, UserError, refuse_existing
from ap_fairseq.provenance import versions
from ap_fairseq.pruning.build import build_masks
from ap_fairseq.pruning.spec import MaskSpec
from ap_fairseq.sites import AttentionKind


def compare(full: AttentionStats, sample: AttentionStats, spec: MaskSpec) -> dict[str, dict[str, float]]:
    """Compare the masks of both recordings on the pairs of the full one, by kind."""
    whole, drawn = (build_masks(stats, spec).masks for stats in (full, sample))
    result = {}
    for kind in full.kinds:
        support, mass = full.support[kind], full.mass[kind]
        expected, found = whole.keep[kind], drawn.grown(kind, support.shape)
        result[kind.value] = {
            "overlap": float((support * (expected & found)).sum() / (support * expected).sum()),
            "effective": float(1 - (support * found).sum() / full.pairs(kind)),
            "kept_mass": float(mass[found].sum() / mass.sum()),
            "kept_mass_of_whole": float(mass[expected].sum() / mass.sum()),
        }
    return result


def table(document: dict) -> str:
    """Render the written JSON as a Markdown table, one row for each number of sentences."""
    kinds = [kind.value for kind in AttentionKind if kind.value in document["samples"][0]["kinds"]]
    cell = "{overlap:.1%} / {effective:.1%} / {kept_mass:.1%}"
    rows = [
        [f"{sample['sentences']:,}", *(cell.format(**sample["kinds"][kind]) for kind in kinds)]
        for sample in document["samples"]
    ]
    last = document["samples"][-1]["kinds"]
    whole = [f"100% / {document['share']:.1%} / {last[kind]['kept_mass_of_whole']:.1%}" for kind in kinds]
    rows.append([f"{document['whole']['sentences']:,} (all)", *whole])
    header = ["sentences", *(f"{kind} overlap / sparsity / kept mass" for kind in kinds)]
    return markdown(Table(header, rows, align="r" * len(header)))


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("full", nargs="?", help="statistics of the whole data set")
    parser.add_argument("samples", nargs="*", help="statistics of samples (ap-record --sample)")
    parser.add_argument("--share", type=float, default=0.5, help="of the pairs to prune (default: %(default)s)")
    parser.add_argument("--granularity", default=1, help="as ap-masks takes it")
    add_result_options(parser)
    return parser


@command
def main(argv: list[str]) -> None:
    parser = get_parser()
    args = parser.parse_args(argv)
    if args.table:
        print_table(parser, args.table, table)
        return
    if not args.samples:
        raise UserError("name the statistics of the whole data set and of at least one sample")
    if args.out:
        refuse_existing(args.out, overwrite=True, inputs=[args.full, *args.samples])
    full = AttentionStats.load(args.full)
    spec = MaskSpec(budgets={kind: args.share for kind in full.kinds}, granularity=args.granularity)
    samples, rows = [], []
    for path in args.samples:
        sample = AttentionStats.load(path)
        if sample.metadata["checkpoint"] != full.metadata["checkpoint"]:
            raise ArtifactError(f"{path} and {args.full} were recorded from different checkpoints")
        kinds = compare(full, sample, spec)
        size = sample.metadata["sentences"]
        samples.append({"sentences": size, "sample": sample.metadata["sample"], "kinds": kinds})
        for kind, row in kinds.items():
            masses = f"{row['kept_mass']:.2%} ({row['kept_mass_of_whole']:.2%})"
            rows.append([f"{size:,}", kind, f"{row['overlap']:.2%}", f"{row['effective']:.2%}", masses])
    if args.out:
        document = {"share": args.share, "granularity": args.granularity, "samples": samples, "whole": full.metadata}
        write_report(args.out, {**document, "versions": versions(), "commit": git_commit()})
    print(plain(Table(["sentences", "kind", "overlap", "effective", "kept mass"], rows, align="rlrrr")))


if __name__ == "__main__":
    main()
