"""``ap-masks``: derive pruning masks from attention statistics."""

from __future__ import annotations

import argparse
import itertools
import logging
from collections.abc import Mapping

from ap_fairseq.artifacts import AttentionStats
from ap_fairseq.cli.common import add_output, command, without_usage
from ap_fairseq.evaluation.tables import Table, plain
from ap_fairseq.files import refuse_existing
from ap_fairseq.pruning.build import BuiltMasks, build_masks
from ap_fairseq.pruning.flags import add_mask_options, spec_from
from ap_fairseq.pruning.spec import MaskSpec

logger = logging.getLogger(__name__)


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Derive one global pruning mask per attention site and head from attention statistics. "
        "Budgets are effective sparsity: the share of the query-key pairs of the recorded data that is pruned."
    )
    parser.add_argument("stats", nargs="+", help="files written by ap-record; several are merged")
    add_mask_options(parser)
    parser.add_argument(
        "--per-layer",
        action="store_true",
        help="print a row for each layer, with the rows that keep one cell only, or none",
    )
    add_output(parser, "the masks")
    return parser


def format_summary(built: BuiltMasks, per_layer: bool = False) -> str:
    """Render the effect of masks as a table for terminals: one row for each kind, or also for each layer, and all."""
    metadata = built.masks.metadata
    nominal = metadata["spec"]["criterion"] == "percentile"
    validation = {} if per_layer else metadata.get("validation", {})
    shown = {
        "kind": True,
        "layer": per_layer,
        "effective": True,
        "nominal": nominal,
        "kept mass": True,
        "effective on validation": bool(validation),
        "rows of one cell or none": per_layer,
    }
    rows = []
    for row in built.summary:
        if row.layer is None or per_layer:
            layer = "all" if row.layer is None else str(row.layer)
            square = f"{row.nominal:.1%}" if nominal and row.kind in metadata["spec"]["budgets"] else ""
            shares = [f"{row.effective:.1%}", square, f"{row.kept_mass:.1%}", _share(validation, row.kind)]
            rows.append([row.kind, layer, *shares, f"{row.guaranteed_rows}/{row.rows}"])
    total = metadata["total"]
    shares = [f"{total['effective']:.1%}", "", f"{total['kept_mass']:.1%}", _share(validation, "total")]
    rows.append(["all kinds", "all", *shares, ""])
    header, *rows = [[*itertools.compress(cells, shown.values())] for cells in ([*shown], *rows)]
    return plain(Table(header, rows))


def _share(shares: Mapping[str, float], name: str) -> str:
    return f"{shares[name]:.1%}" if shares else ""


def write_masks(
    stats: AttentionStats, spec: MaskSpec, output, overwrite: bool, per_layer: bool = False, share: float = 1.0
) -> None:
    """Build masks for a *share* of the budgets, save them, and print their effect on the recorded data."""
    built = build_masks(stats, spec, share)
    built.masks.save(output, overwrite=overwrite)
    for message in built.warnings:
        logger.warning(message)
    logger.info(f"masks -> {output}")
    print(format_summary(built, per_layer))


@command
def main(argv: list[str]) -> None:
    args = without_usage(get_parser()).parse_args(argv)
    refuse_existing(args.output, args.overwrite, filter(None, [*args.stats, args.like]))
    stats = AttentionStats.load_merged(args.stats)
    write_masks(stats, spec_from(args, stats), args.output, args.overwrite, args.per_layer)


if __name__ == "__main__":
    main()
