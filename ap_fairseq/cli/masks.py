"""``ap-masks``: derive pruning masks from attention statistics."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Mapping

from ap_fairseq.artifacts import AttentionStats, PruningMasks
from ap_fairseq.cli.common import add_output, command
from ap_fairseq.files import ArtifactError, refuse_existing
from ap_fairseq.pruning.build import build_masks
from ap_fairseq.pruning.spec import CRITERIA, EXTRAPOLATIONS, GRANULARITIES, SCOPES, Granularity, MaskSpec
from ap_fairseq.pruning.summary import format_summary, summarize
from ap_fairseq.sites import AttentionKind, per_kind

logger = logging.getLogger(__name__)


def _budget(text: str) -> float:
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text} is outside [0, 1): it is a share of pairs, e.g. 0.5 for 50%")
    return value


def _count(text: str) -> int:
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text} is no number of positions")
    return int(text)


def _granularity(text: str) -> Granularity:
    value = int(text) if text.isdigit() else text
    if value not in GRANULARITIES:
        raise argparse.ArgumentTypeError(f"{text} is not one of {', '.join(map(str, GRANULARITIES))}")
    return value


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Derive one global pruning mask per attention site and head from attention statistics. "
        "Budgets are effective sparsity: the share of the query-key pairs of the recorded data that is pruned."
    )
    parser.add_argument("stats", nargs="+", help="files written by ap-record; several are merged")
    add_mask_options(parser)
    add_output(parser, "the masks")
    return parser


def add_mask_options(parser: argparse.ArgumentParser) -> None:
    """Add the flags that :func:`spec_from` reads."""
    for kind in AttentionKind:
        help_text = f"share of {kind.value} pairs to prune, in [0, 1); default: prune none"
        parser.add_argument(f"--{kind.flag}", type=_budget, metavar="SHARE", help=help_text)
    parser.add_argument(
        "--total",
        type=_budget,
        metavar="SHARE",
        help="share of the pairs of all kinds together to prune, distributed over kinds, layers and heads by what the "
        "criterion ranks by (one threshold; instead of budgets per kind)",
    )
    parser.add_argument(
        "--like", metavar="MASKS", help="budgets per kind as in this file: for controls at equal effective sparsity"
    )
    parser.add_argument(
        "--criterion",
        choices=CRITERIA,
        default="mean",
        help="mean: by mean attention; normalised: relative to the head's own; diagonal-mean: averaged along the "
        "diagonal; importance: by the effect on the loss, of statistics of ap-record --importance; percentile: the "
        "authors' percentile (budgets are nominal then); random, window, gaussian, fixed: controls at equal effective "
        "sparsity (default: %(default)s)",
    )
    parser.add_argument(
        "--scope",
        choices=SCOPES,
        help="what shares one threshold (default: kind; with --total: global)",
    )
    parser.add_argument(
        "--granularity",
        type=_granularity,
        default=1,
        metavar="{" + ",".join(map(str, GRANULARITIES)) + "}",
        help="size of the square blocks in which the mask is decided, or whole diagonals (default: %(default)s)",
    )
    parser.add_argument(
        "--extrapolate",
        choices=EXTRAPOLATIONS,
        default="diagonal",
        help="cells that no recorded sentence reaches: continue each head's diagonal pattern, or keep "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--min-kept",
        type=_budget,
        default=0.0,
        metavar="SHARE",
        help="share of its pairs that every head keeps at least (default: %(default)s)",
    )
    parser.add_argument(
        "--min-heads",
        metavar="N",
        help="heads, over all layers of a kind, that keep each pair of positions at least: a number for all kinds, or "
        "e.g. decoder_self=1,cross=2 (default: none)",
    )
    parser.add_argument(
        "--keep-diagonal",
        type=_count,
        metavar="W",
        help="always keep cells up to W key positions from the diagonal",
    )
    parser.add_argument(
        "--keep-first", type=_count, default=0, metavar="N", help="always keep the first N columns (default: none)"
    )
    parser.add_argument(
        "--smooth",
        type=_count,
        default=0,
        metavar="N",
        help="score a cell by the statistics of all cells up to N positions away along its diagonal, so that late "
        "positions, which few sentences reach, are not ranked by chance (default: the cell's own)",
    )
    parser.add_argument("--seed", type=int, default=1, help="for random masks and ties (default: %(default)s)")


def _budgets(args: argparse.Namespace, stats: AttentionStats) -> Mapping[AttentionKind, float]:
    """Return the budget of each kind from --total, --like or the kinds' own flags, of which one may be given."""
    own = {kind: getattr(args, kind.value) for kind in AttentionKind if getattr(args, kind.value) is not None}
    given = [name for name, value in (("--total", args.total), ("--like", args.like)) if value is not None]
    given += [f"--{kind.flag}" for kind in own][:1]
    if len(given) > 1:
        raise ArtifactError(f"{' and '.join(given)} both name budgets; give one of them")
    if args.total is not None:
        if args.scope not in (None, "global"):
            raise ArtifactError(
                f"--total is one budget for all kinds, --scope {args.scope} would split it; leave it out"
            )
        return dict.fromkeys(stats.kinds, args.total)
    if args.like is not None:
        if args.criterion == "percentile":
            raise ArtifactError(
                f"--like {args.like} gives effective sparsity, --criterion percentile takes nominal percentiles; "
                "name those with --encoder-self, --decoder-self and --cross"
            )
        shares = PruningMasks.load(args.like).metadata.get("sparsity", {})
        return {AttentionKind(name): share["effective"] for name, share in shares.items() if share["effective"] > 0}
    return own


def spec_from(args: argparse.Namespace, stats: AttentionStats) -> MaskSpec:
    """Return what the flags of :func:`add_mask_options` ask for."""
    return MaskSpec(
        budgets=_budgets(args, stats),
        criterion=args.criterion,
        scope=args.scope or ("global" if args.total is not None else "kind"),
        granularity=args.granularity,
        extrapolate=args.extrapolate,
        min_kept=args.min_kept,
        min_heads=per_kind("--min-heads", args.min_heads),
        keep_diagonal=args.keep_diagonal,
        keep_first=args.keep_first,
        smooth=args.smooth,
        seed=args.seed,
    )


def write_masks(stats: AttentionStats, spec: MaskSpec, output, overwrite: bool = False) -> None:
    """Build masks, print what came out, and save them."""
    result, missed = build_masks(stats, spec)
    result.save(output, overwrite=overwrite)
    print(format_summary(summarize(result, stats)))
    print("all kinds together: effective {effective:.1%}, kept mass {kept_mass:.1%}".format(**result.metadata["total"]))
    for kind, heads in result.metadata["vanished_heads"].items():
        names = ", ".join(f"{layer}.{head}" for layer, head in heads)
        logger.warning(f"{kind}: {len(heads)} heads (layer.head) keep nothing but the guaranteed cells: {names}")
    for message in missed:
        logger.warning(message)
    logger.info(f"masks -> {output}")


@command
def main(argv: list[str]) -> None:
    args = get_parser().parse_args(argv)
    refuse_existing(args.output, args.overwrite, filter(None, [*args.stats, args.like]))
    stats = AttentionStats.load_merged(args.stats)
    write_masks(stats, spec_from(args, stats), args.output, args.overwrite)
