"""``ap-masks``: derive pruning masks from attention statistics."""

from __future__ import annotations

import argparse
import functools
import logging

from ap_fairseq import masks
from ap_fairseq.artifacts import AttentionStats, refuse_existing
from ap_fairseq.cli.common import add_output, command
from ap_fairseq.sites import AttentionKind

logger = logging.getLogger(__name__)


def _budget(text: str) -> float:
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text} is outside [0, 1): it is a share of pairs, e.g. 0.5 for 50%")
    return value


def _granularity(text: str) -> masks.Granularity:
    value = int(text) if text.isdigit() else text
    if value not in masks.GRANULARITIES:
        raise argparse.ArgumentTypeError(f"{text} is not one of {', '.join(map(str, masks.GRANULARITIES))}")
    return value


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Derive one global pruning mask per attention site and head from attention statistics. "
        "Budgets are effective sparsity: the share of the query-key pairs of the recorded data that is pruned."
    )
    parser.add_argument("stats", nargs="+", help="files written by ap-record; several are merged")
    for kind in AttentionKind:
        help_text = f"share of {kind.value} pairs to prune, in [0, 1); default: prune none"
        parser.add_argument(f"--{kind.flag}", type=_budget, metavar="SHARE", help=help_text)
    parser.add_argument(
        "--procedure",
        choices=masks.PROCEDURES,
        default="effective",
        help="effective: by mean attention; as-published: the authors' percentile (budgets are nominal then); "
        "random, window: controls at equal effective sparsity (default: %(default)s)",
    )
    parser.add_argument(
        "--scope", choices=masks.SCOPES, default="kind", help="what shares one threshold (default: %(default)s)"
    )
    parser.add_argument(
        "--granularity",
        type=_granularity,
        default=1,
        metavar="{" + ",".join(map(str, masks.GRANULARITIES)) + "}",
        help="size of the square blocks in which the mask is decided, or whole diagonals (default: %(default)s)",
    )
    parser.add_argument(
        "--beyond",
        choices=masks.BEYOND,
        default="diagonal",
        help="cells that no recorded sentence reaches: continue each head's diagonal pattern, or keep "
        "(default: %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=1, help="for random masks (default: %(default)s)")
    add_output(parser, "the masks")
    return parser


@command
def main(argv: list[str]) -> None:
    args = get_parser().parse_args(argv)
    refuse_existing(args.output, args.overwrite)
    stats = functools.reduce(AttentionStats.merge, map(AttentionStats.load, args.stats))
    given = {kind: getattr(args, kind.value) for kind in AttentionKind}
    spec = masks.MaskSpec(
        budgets={kind: budget for kind, budget in given.items() if budget is not None},
        procedure=args.procedure,
        scope=args.scope,
        granularity=args.granularity,
        beyond=args.beyond,
        seed=args.seed,
    )
    result, missed = masks.build_masks(stats, spec)
    result.save(args.output, overwrite=args.overwrite)
    print(masks.format_summary(masks.summarize(result, stats)))
    for message in missed:
        logger.warning(message)
    logger.info(f"masks -> {args.output}")
