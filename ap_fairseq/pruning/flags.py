"""The flags of ``ap-masks``, which everything that derives masks understands, and the specification they name."""

from __future__ import annotations

import argparse
import dataclasses
import logging
import math
import shlex
import sys
from collections.abc import Mapping, Sequence
from typing import NoReturn

import numpy as np

from ap_fairseq.artifacts import AttentionStats, PruningMasks
from ap_fairseq.files import ArtifactError, UserError
from ap_fairseq.lengths import support_of
from ap_fairseq.pruning.build import build_masks
from ap_fairseq.pruning.criteria import CRITERIA
from ap_fairseq.pruning.spec import EXTRAPOLATIONS, HEAD_GROUPS, SCOPES, Granularity, MaskSpec, block_shape
from ap_fairseq.relative import RelativeStats, slope_of
from ap_fairseq.sites import AttentionKind, per_kind

logger = logging.getLogger(__name__)

SPREAD = 4.5  # heads of a layer that may keep an offset, in units of the share of pairs that the budget leaves


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a share in [0, 1), e.g. 0.5 for 50%")
    return value


def _positions(text: str) -> int:
    if not (text.isascii() and text.isdigit()):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of positions")
    return int(text)


def _granularity(text: str) -> Granularity | dict[AttentionKind, Granularity]:
    """Parse one granularity, or one for each kind: ``encoder_self=64x16,cross=diagonal``."""

    def one(value: str) -> Granularity:
        block_shape(value)
        return int(value) if value.isdigit() else value

    try:
        if "=" not in text:
            return one(text)
        parts = [part.split("=") for part in text.split(",")]
        by_kind = {AttentionKind(kind): one(value) for kind, value in parts}
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error).removeprefix("--granularity ")) from error
    except ValueError as error:
        raise argparse.ArgumentTypeError(
            f"{text!r}: expected KIND=GRANULARITY,... of {', '.join(AttentionKind)}"
        ) from error
    if len(by_kind) < len(parts):
        raise argparse.ArgumentTypeError(f"{text!r} gives a kind twice; give it once")
    return by_kind


def add_mask_options(parser: argparse.ArgumentParser) -> None:
    """Add the flags that :func:`spec_from` reads."""
    for kind in AttentionKind:
        help_text = f"share of {kind.value} pairs to prune, in [0, 1); default: prune none"
        parser.add_argument(f"--{kind.flag}", type=_share, metavar="SHARE", help=help_text)
    parser.add_argument(
        "--total",
        type=_share,
        metavar="SHARE",
        help="share of the pairs of all kinds together to prune: one threshold of the criterion decides how much of it "
        "falls to each kind, layer and head (instead of budgets per kind)",
    )
    parser.add_argument(
        "--like", metavar="MASKS", help="budgets per kind as in this file, for controls of equal effective sparsity"
    )
    parser.add_argument(
        "--criterion",
        choices=CRITERIA,
        default="mean",
        help="mean: mean attention; normalised: mean attention in units of the head's root mean square; diagonal-mean: "
        "mean attention along the diagonal; importance: effect on the loss, which ap-record --importance records; "
        "percentile: the authors' percentile, with nominal budgets; random, window, gaussian, fixed: controls "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--scope", choices=SCOPES, help="what shares one threshold (default: kind; with --total: global)"
    )
    parser.add_argument(
        "--granularity",
        type=_granularity,
        default=1,
        metavar="{N,QxK,diagonal,scaled-diagonal,head}",
        help="what the mask is decided for: blocks of N x N cells, or of Q queries x K keys, whole diagonals, or whole "
        "heads; in cross-attention scaled-diagonal counts diagonals from one scaled to source and target; one for all "
        "kinds, or for some, e.g. encoder_self=64x16,cross=scaled-diagonal (default: %(default)s, single cells)",
    )
    parser.add_argument(
        "--extrapolate",
        choices=EXTRAPOLATIONS,
        default="diagonal",
        help="what happens to cells that no recorded sentence reaches: diagonal continues each head's pattern along "
        "the diagonals, keep keeps them (default: %(default)s)",
    )
    parser.add_argument(
        "--min-kept",
        type=_share,
        default=0.0,
        metavar="SHARE",
        help="minimum share of its pairs that every head keeps (default: %(default)s)",
    )
    parser.add_argument(
        "--min-heads",
        metavar="N",
        help="minimum number of heads, over all layers of a kind, that keep each pair of positions: one number, or one "
        "for each kind, e.g. decoder_self=1,cross=2 (default: none)",
    )
    parser.add_argument(
        "--max-heads",
        metavar="N",
        help="maximum number of heads of a layer that keep a cell (or block, or diagonal), or below 1 a share of them, "
        "so that the heads together see more positions; one for all kinds, or for some, e.g. cross=0.5 (default: none; "
        f"for offsets of scaled-diagonal {SPREAD} times the share of the pairs that stay, of the heads)",
    )
    parser.add_argument(
        "--max-heads-of",
        choices=HEAD_GROUPS,
        default="layer",
        help="the heads that --max-heads counts: of each layer, or of all layers of a kind (default: %(default)s)",
    )
    parser.add_argument(
        "--keep-diagonal",
        type=_positions,
        metavar="W",
        help="always keep cells up to W key positions from the diagonal",
    )
    parser.add_argument(
        "--keep-first", type=_positions, default=0, metavar="N", help="always keep the first N columns (default: none)"
    )
    parser.add_argument(
        "--empty-rows",
        action="store_true",
        help="prune the diagonal of self-attention and column 0 of cross-attention like other cells; a row that keeps "
        "nothing gives 0 (default: each row keeps one of them)",
    )
    parser.add_argument(
        "--smooth",
        type=_positions,
        default=0,
        metavar="N",
        help="score a cell by the mean of all cells up to N positions away along its diagonal, so that late positions, "
        "which few sentences reach, are not ranked by chance (default: 0, the cell alone)",
    )
    parser.add_argument(
        "--calibrate",
        action="store_true",
        help="budgets are shares of the pairs of the validation sentences, whose lengths ap-record stores, not of the "
        "recorded ones",
    )
    parser.add_argument("--seed", type=int, default=1, help="for random masks and ties (default: %(default)s)")


def allow_flag_values(parser: argparse.ArgumentParser, *names: str) -> None:
    """Let options of *parser* take a value that is a single flag, such as ``--calibrate``.

    argparse takes it for a flag of the parser's own, unless it is joined to the option with ``=``.
    """
    stock = parser.parse_known_args

    def parse_known_args(args=None, namespace=None):
        words: list[str] = []
        for word in sys.argv[1:] if args is None else args:
            if words and words[-1] in names:
                words[-1] += f"={word}"
            else:
                words.append(word)
        return stock(words, namespace)

    parser.parse_known_args = parse_known_args  # type: ignore[method-assign]


def split_flags(name: str, flags: str) -> list[str]:
    """Split the argument of the option *name* into words, as a shell does."""
    try:
        return shlex.split(flags)
    except ValueError as error:
        raise UserError(f"{name} {flags!r} cannot be split into flags: {error}") from error


def parse_mask_flags(flags: Sequence[str], of: str = "ap-masks") -> argparse.Namespace:
    """Read flags of :func:`add_mask_options` alone, as another command's flag *of* holds them.

    Raises:
        UserError: for what ap-masks does not understand.
    """
    parser = argparse.ArgumentParser(add_help=False)
    add_mask_options(parser)

    def refuse(message: str) -> NoReturn:
        raise UserError(f"{of} {shlex.join(flags)!r}: {message}; flags that choose masks: ap-masks --help")

    parser.error = refuse  # type: ignore[method-assign]
    return parser.parse_args(list(flags))


def budget_flags(args: argparse.Namespace) -> list[str]:
    """Return which of --total, --like and the kinds' own flags are given; these last count as one."""
    given = [name for name, value in (("--total", args.total), ("--like", args.like)) if value is not None]
    return given + [f"--{kind.flag}" for kind in AttentionKind if getattr(args, kind.value) is not None][:1]


def _budgets(args: argparse.Namespace, stats: AttentionStats) -> Mapping[AttentionKind, float]:
    """Return the budget of each kind from --total, --like or the kinds' own flags; a kind without one keeps all."""
    own = {kind: getattr(args, kind.value) for kind in AttentionKind if getattr(args, kind.value) is not None}
    given = budget_flags(args)
    if not given:
        logger.warning(
            "no budget is given, so the masks keep every pair; to prune, give --total SHARE, a share for each kind "
            f"({', '.join(f'--{kind.flag} SHARE' for kind in stats.kinds)}) or --like MASKS; --total 0 says that "
            "nothing is to be pruned"
        )
    if len(given) > 1:
        raise UserError(f"budgets are given by {' and '.join(given)}; choose one of them")
    if args.criterion == "percentile" and given and not own:
        raise UserError(
            f"{given[0]} gives effective sparsity, --criterion percentile takes nominal sparsity; give that with "
            f"{', '.join(f'--{kind.flag}' for kind in AttentionKind)}"
        )
    if args.total is not None:
        if args.scope not in (None, "global"):
            raise UserError(f"--total is one budget for all kinds, --scope {args.scope} splits it; leave that out")
        return dict.fromkeys(stats.kinds, args.total)
    if args.like is not None:
        shares = PruningMasks.load(args.like).metadata.get("sparsity")
        if shares is None:
            raise ArtifactError(f"--like {args.like} does not tell its sparsity; give a file that ap-masks wrote")
        return {AttentionKind(name): share["effective"] for name, share in shares.items() if share["effective"] > 0}
    return own


def spec_from(args: argparse.Namespace, stats: AttentionStats) -> MaskSpec:
    """Return what the flags of :func:`add_mask_options` ask for.

    Raises:
        UserError: for flags that contradict each other, or settings by name of a kind that no budget prunes.
    """
    budgets = _budgets(args, stats)
    for flag in ("--granularity", "--min-heads", "--max-heads"):
        value = getattr(args, flag[2:].replace("-", "_"))
        named = value if isinstance(value, Mapping) else per_kind(flag, value) if "=" in str(value) else ()
        if unused := [kind.value for kind in named if kind not in budgets]:
            raise UserError(
                f"{flag} names {', '.join(unused)}, which has no budget and keeps every pair; leave it out there, or "
                f"give a budget ({', '.join(f'--{AttentionKind(kind).flag}' for kind in unused)})"
            )
    spec = MaskSpec(
        budgets=budgets,
        criterion=args.criterion,
        scope=args.scope or ("global" if args.total is not None else "kind"),
        granularity=args.granularity,
        extrapolate=args.extrapolate,
        min_kept=args.min_kept,
        min_heads=per_kind("--min-heads", args.min_heads),
        max_heads=per_kind("--max-heads", args.max_heads),
        max_heads_of=args.max_heads_of,
        keep_diagonal=args.keep_diagonal,
        keep_first=args.keep_first,
        empty_rows=args.empty_rows,
        smooth=args.smooth,
        calibrate=args.calibrate,
        seed=args.seed,
    )
    return _spread(spec)


def _spread(spec: MaskSpec) -> MaskSpec:
    """Limit the heads that keep an offset of cross-attention, unless *spec* says how many, or what heads keep."""
    kind = AttentionKind.CROSS
    if not spec.in_offsets(kind) or kind in spec.max_heads or spec.min_heads.get(kind) or spec.min_kept:
        return spec
    most = SPREAD * (1 - spec.budgets[kind])
    return dataclasses.replace(spec, max_heads={**spec.max_heads, kind: most}) if 0 < most < 1 else spec


def require_fitting(args: argparse.Namespace, architecture: Mapping[str, Sequence[int]], held_out: bool) -> MaskSpec:
    """Derive masks from made-up statistics, so that flags that do not fit a model fail before any work.

    Not found is what only real statistics show: budgets that a minimum or maximum of heads does not allow.

    Args:
        architecture: ``{kind: [layers, heads]}``.
        held_out: the real statistics will have the lengths of validation sentences.

    Returns:
        What the flags ask for.

    Raises:
        UserError: for such flags.
    """
    lengths = np.array([[2, 2, 1]])
    support = {AttentionKind(kind): support_of(AttentionKind(kind), lengths) for kind in architecture}
    mass = {kind: np.ones((*architecture[kind], 2, 2)) * cells for kind, cells in support.items()}
    relative = None
    if AttentionKind.CROSS in mass:
        relative = RelativeStats(slope_of(1, 1), *2 * [np.ones((*mass[AttentionKind.CROSS].shape[:2], 3))])
    stats = AttentionStats(mass, support, importance=mass, lengths=lengths, relative=relative)
    stats.validation_lengths = lengths[: int(held_out)]
    spec = spec_from(args, stats)
    build_masks(stats, dataclasses.replace(spec, min_kept=0.0), share=0.5)
    return spec
