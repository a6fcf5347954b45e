"""AttentionStats and PruningMasks -> the numbers of the report; pure functions.

All shares are of attention *mass* (s, see :mod:`ap_fairseq.artifacts`), so that a cell counts as often as it occurs.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from ap_fairseq.artifacts import AttentionStats, PruningMasks
from ap_fairseq.files import ArtifactError
from ap_fairseq.lengths import rows_by_source
from ap_fairseq.pruning.criteria import guaranteed, percentile_thresholds, slope
from ap_fairseq.relative import offset_support
from ap_fairseq.sites import AttentionKind, describe_architecture

# The named patterns of heads in machine translation (Voita et al. 2019, arXiv 1905.09418, section 4; Raganato et al.
# 2020, arXiv 2002.10260, section 3), as the mass that lies on one cell of each row.
PATTERNS = ("previous", "next", "diagonal", "first", "end")
BROAD = "broad"
# A head is named after the pattern that holds most of its mass if that is at least this share ...
NAMED_FROM = 0.4
# ... and at least this many times the share of uniform attention.
NAMED_OVER_UNIFORM = 2.0

GRID = np.linspace(0, 1, 101)  # effective sparsities at which curves are reported
_KNOTS = 2048  # points that stand for the sorted cells of one head


# -- do the files belong together? ------------------------------------------------------------------------------------


def check_masks(masks: PruningMasks, stats: AttentionStats, name: str) -> None:
    """Raise :class:`ArtifactError` unless *masks* were made from these statistics.

    Architecture, recorded range, checkpoint, dictionaries and data have to agree: the pairs that a mask removes are
    counted in the statistics.
    """
    remedy = "give the statistics that the masks were made from; several files are merged, as in ap-masks"
    if masks.architecture != stats.architecture:
        raise ArtifactError(
            f"masks {name} are for {describe_architecture(masks.architecture)}, the statistics for "
            f"{describe_architecture(stats.architecture)}; {remedy}"
        )
    for kind in stats.kinds:
        if relative := masks.relative_mask(kind):
            if relative.slope != stats.by_offset().slope:
                raise ArtifactError(
                    f"masks {name} count from a diagonal of slope {relative.slope}, the statistics from one of "
                    f"{stats.by_offset().slope}; {remedy}"
                )
            continue
        ours, theirs = masks.keep[kind].shape[2:], stats.support[kind].shape
        if ours != theirs:
            raise ArtifactError(
                f"masks {name} cover {ours[0]} x {ours[1]} positions of {kind.value}, the statistics {theirs[0]} x "
                f"{theirs[1]}; {remedy}"
            )
    for key in ("checkpoint", "dictionaries", "data"):
        ours, theirs = masks.metadata.get(key), stats.metadata.get(key)
        if ours != theirs:
            raise ArtifactError(f"masks {name} come from {key} {ours}, the statistics from {theirs}; {remedy}")


# -- sentences --------------------------------------------------------------------------------------------------------


def sentences(stats: AttentionStats) -> int:
    """Number of recorded sentences: cell (0, 0) exists in every one."""
    return int(stats.support[stats.kinds[0]][0, 0])


def busy_positions(support: np.ndarray) -> tuple[int, int]:
    """Return the smallest (Tq, Tk) such that 95% of the recorded pairs lie in these rows and these columns."""
    limits = []
    for axis in (1, 0):
        total = support.sum(axis, dtype=np.float64).cumsum()
        limits.append(int(np.searchsorted(total, 0.95 * total[-1])) + 1)
    return limits[0], limits[1]


def uniform_mass(kind: AttentionKind, support: np.ndarray) -> np.ndarray:
    """Mass of a head with uniform attention over each sentence, the baseline of all shares: float64 (Tq, Tk).

    Sentence lengths are recovered from the support, which counts the sentences longer than i and j; sentences cut at
    the recorded range count as ending there.
    """
    rows, columns = support.shape
    if kind is AttentionKind.DECODER_SELF:
        return np.tril(support / np.arange(1, rows + 1)[:, None])
    if kind is AttentionKind.ENCODER_SELF:
        longer = np.append(np.diagonal(support), 0)
        tail = ((longer[:-1] - longer[1:]) / np.arange(1, rows + 1))[::-1].cumsum()[::-1]
        return tail[np.maximum(*np.ogrid[:rows, :columns])]
    return (_pair_counts(support) / np.arange(1, columns + 1))[::-1, ::-1].cumsum(0).cumsum(1)[::-1, ::-1]


def _pair_counts(support: np.ndarray) -> np.ndarray:
    """Number of sentences with i + 1 target and j + 1 source tokens, from the support of cross-attention."""
    padded = np.pad(support, [(0, 1), (0, 1)])
    return padded[:-1, :-1] - padded[1:, :-1] - padded[:-1, 1:] + padded[1:, 1:]


def _uniform_end_share(kind: AttentionKind, support: np.ndarray) -> float:
    """Share of uniform attention that falls on the last source token."""
    if kind is AttentionKind.ENCODER_SELF:
        return float(support[0, 0] / np.trace(support))  # each of a sentence's L rows puts 1/L there
    counts = _pair_counts(support)
    rows = np.arange(1, counts.shape[0] + 1)[:, None]
    columns = np.arange(1, counts.shape[1] + 1)
    return float((counts * rows / columns).sum() / (counts * rows).sum())


# -- concentration ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Concentration:
    """How concentrated each head of one kind is.

    Attributes:
        heads: per measure float64 (layers, heads):
            ``entropy``: bits, of a row's mean attention, averaged over rows by their mass. It includes the variation
            between sentences, so it is an upper bound of the mean entropy within a sentence (Jensen).
            ``relative_entropy``: the same, divided by that of uniform attention over the same sentences; 1 = as broad.
            ``near_diagonal``: share of the mass within one position of the diagonal; in cross-attention of the mean
            source/target length slope.
            ``previous``, ``diagonal``, ``next``: share of the mass at offset -1, 0, +1 from it.
            ``first``: share of the mass on key position 0.
            ``end``: share of the mass on each sentence's last source token; absent for ``decoder_self`` and for
            statistics that do not hold it.
        uniform: the same measures for uniform attention.
        patterns: (layers, heads) names from ``PATTERNS`` or ``broad``.
        attending: bool (layers, heads), False for heads of which a pruned model keeps nothing; all they have is 0.
    """

    heads: dict[str, np.ndarray]
    uniform: dict[str, float]
    patterns: np.ndarray
    attending: np.ndarray

    def average(self, name: str) -> float:
        """Return the mean of a measure over the heads that attend to anything; 0 where none does."""
        return float(self.heads[name].mean(where=self.attending)) if self.attending.any() else 0.0


def concentration(stats: AttentionStats, kind: AttentionKind) -> Concentration:
    """Measure the concentration of every head of *kind*."""
    mass, support = stats.mass[kind], stats.support[kind]
    row, column = np.ogrid[: support.shape[0], : support.shape[1]]
    offset = column - np.rint(slope(stats, kind) * row)
    places = {
        "near_diagonal": np.abs(offset) <= 1,
        "previous": offset == -1,
        "diagonal": offset == 0,
        "next": offset == 1,
        "first": np.broadcast_to(column == 0, support.shape),
    }
    if kind.causal:
        del places["next"]  # does not exist
    uniform_head, total = uniform_mass(kind, support), _per_head(mass, np.sum)
    entropy, uniform_entropy = _per_head(mass, row_entropy), row_entropy(uniform_head)
    # Where sentences have a single token, attention is as broad as it can be.
    relative = _ratio(entropy, np.full_like(entropy, uniform_entropy), 1.0)
    heads = {"entropy": entropy, "relative_entropy": relative}
    uniform = {"entropy": uniform_entropy, "relative_entropy": 1.0}
    for name, place in places.items():
        heads[name] = _ratio(_per_head(mass, lambda head, at=place: head[at].sum()), total, 0.0)
        uniform[name] = float(uniform_head[place].sum() / uniform_head.sum())
    if kind in stats.end_mass:
        heads["end"] = _ratio(stats.end_mass[kind], total, 0.0)
        uniform["end"] = _uniform_end_share(kind, support)
    return Concentration(heads, uniform, _patterns(heads, uniform), total > 0)


def row_entropy(mass: np.ndarray) -> float:
    """Entropy in bits of the rows of (Tq, Tk), each normalised, averaged with the rows' mass as weights."""
    weight = mass.sum(1, keepdims=True)
    p = _ratio(mass, np.broadcast_to(weight, mass.shape), 0.0)
    bits = -(p * np.log2(p, out=np.zeros_like(p), where=p > 0)).sum(1)
    total = weight.sum()
    return float(bits @ weight[:, 0] / total) if total else 0.0


def _per_head(mass: np.ndarray, measure) -> np.ndarray:
    """Apply *measure* to each (Tq, Tk) of (layers, heads, Tq, Tk); one at a time, as recordings can be large."""
    values = [measure(mass[index]) for index in np.ndindex(mass.shape[:2])]
    return np.array(values, dtype=np.float64).reshape(mass.shape[:2])


def _ratio(numerator: np.ndarray, denominator: np.ndarray, otherwise: float) -> np.ndarray:
    """Divide; *otherwise* where the denominator is 0."""
    out = np.full(np.shape(numerator), otherwise, dtype=np.float64)
    return np.divide(numerator, denominator, out=out, where=np.asarray(denominator) > 0)


def _patterns(heads: dict[str, np.ndarray], uniform: dict[str, float]) -> np.ndarray:
    known = [name for name in PATTERNS if name in heads]
    shares = np.stack([heads[name] for name in known])  # (patterns, layers, heads)
    needed = np.array([max(NAMED_FROM, NAMED_OVER_UNIFORM * uniform[name]) for name in known])[:, None, None]
    best = np.where(shares >= needed, shares, -1.0).argmax(0)
    return np.where((shares >= needed).any(0), np.array(known, dtype=object)[best], BROAD)


# -- curves -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Curve:
    """Kept mass (n,) over effective sparsity (n,), ascending; ends where only guaranteed cells are left."""

    sparsity: np.ndarray
    kept: np.ndarray

    def at(self, sparsity: float) -> float | None:
        """Kept mass at an effective sparsity, or None if it cannot be reached."""
        if sparsity > self.sparsity[-1] + 1e-9:
            return None
        return float(np.interp(sparsity, self.sparsity, self.kept))


@dataclass(frozen=True)
class KeptMass:
    """The curves of one kind: one threshold for the whole kind, for each layer, for each head.

    ``even`` is the curve of uniform attention: what masks could keep of attention without structure. It lies above
    1 - sparsity because short sentences give their pairs more mass.
    """

    kind: Curve
    layers: list[Curve]
    heads: list[list[Curve]]
    even: Curve


@dataclass(frozen=True)
class _SortedHead:
    """Cells of one head in ascending order of mean attention, thinned out.

    Attributes: score (m,), and pairs and mass (m + 1,) of all cells below each score.
    """

    score: np.ndarray
    pairs: np.ndarray
    mass: np.ndarray


def kept_mass(stats: AttentionStats, kind: AttentionKind) -> KeptMass:
    """Return the most attention mass that can be kept at each effective sparsity (cells pruned by mean attention)."""
    mass, support = stats.mass[kind], stats.support[kind]
    prunable = (support > 0) & ~guaranteed(support.shape, kind)
    pairs = float(support.sum())
    layers = [[_sort_head(head, support, prunable) for head in layer] for layer in mass]
    totals = mass.sum((2, 3))
    even = uniform_mass(kind, support)

    def curve(members: list[_SortedHead], total: float) -> Curve:
        thresholds = np.unique(np.concatenate([head.score for head in members]))
        at = [np.searchsorted(head.score, thresholds, side="right") for head in members]
        removed = sum(head.pairs[index] for head, index in zip(members, at, strict=True))
        lost = sum(head.mass[index] for head, index in zip(members, at, strict=True))
        sparsity = np.concatenate([[0.0], removed / (pairs * len(members))])
        kept = np.concatenate([[1.0], 1 - lost / total if total else np.ones(len(thresholds))])
        grid = np.append(GRID[sparsity[-1] > GRID], sparsity[-1])
        return Curve(grid, np.interp(grid, sparsity, kept).clip(0, 1))

    return KeptMass(
        curve([head for layer in layers for head in layer], float(totals.sum())),
        [curve(heads, float(total.sum())) for heads, total in zip(layers, totals, strict=True)],
        [
            [curve([head], float(total)) for head, total in zip(heads, row, strict=True)]
            for heads, row in zip(layers, totals, strict=True)
        ],
        curve([_sort_head(even, support, prunable)], float(even.sum())),
    )


def _sort_head(mass: np.ndarray, support: np.ndarray, prunable: np.ndarray) -> _SortedHead:
    s, n = mass[prunable], support[prunable].astype(np.float64)
    order = np.argsort(s / n, kind="stable")
    score = (s / n)[order]
    pairs, lost = np.cumsum(n[order]), np.cumsum(s[order])
    if len(score):
        last = np.flatnonzero(np.append(score[1:] != score[:-1], True))  # cells of one score go together
        if len(last) > _KNOTS:  # equally many pairs from knot to knot
            wanted = np.searchsorted(pairs[last], np.linspace(0, pairs[-1], _KNOTS + 1)[1:])
            last = last[np.unique(wanted.clip(max=len(last) - 1))]
        score, pairs, lost = score[last], pairs[last], lost[last]
    return _SortedHead(score, np.append(0.0, pairs), np.append(0.0, lost))


def effective_at_nominal(stats: AttentionStats, kind: AttentionKind, nominal: np.ndarray) -> np.ndarray:
    """Effective sparsity of the authors' percentile at each *nominal* sparsity: float64, the shape of *nominal*."""
    mean, support = stats.mean(kind), stats.support[kind]
    weights = np.where(guaranteed(support.shape, kind), 0, support).ravel()
    pruned = np.zeros(len(nominal))
    for layer, thresholds in zip(mean, percentile_thresholds(mean, nominal), strict=True):
        for head in layer:
            first = np.searchsorted(thresholds, head.ravel(), side="left")  # first percentile that prunes a cell
            pruned += np.bincount(first, weights=weights, minlength=len(nominal) + 1)[: len(nominal)].cumsum()
    return pruned / (support.sum() * mean.shape[0] * mean.shape[1])


# -- masks ------------------------------------------------------------------------------------------------------------


def _decided(masks: PruningMasks, stats: AttentionStats, kind: AttentionKind) -> tuple[np.ndarray, np.ndarray]:
    """Return what the masks decide about: keep, bool (layers, heads, ...), and support (...), cells or offsets."""
    if (relative := masks.relative_mask(kind)) is None:
        return masks.keep[kind], stats.support[kind]
    support = offset_support(stats.rows_by_centre())
    return relative.grown(len(support)), support


def head_sparsity(masks: PruningMasks, stats: AttentionStats, kind: AttentionKind) -> np.ndarray:
    """Effective sparsity of each head: float64 (layers, heads)."""
    if relative := masks.relative_mask(kind):
        rows = stats.rows_by_centre()
        return 1 - relative.kept_pairs(rows) / offset_support(rows).sum()
    keep, support = _decided(masks, stats, kind)
    kept = np.stack([[support[head].sum() for head in layer] for layer in keep])
    return 1 - kept / support.sum()


def seen_by(masks: PruningMasks, stats: AttentionStats, kind: AttentionKind) -> np.ndarray:
    """Share of the pairs of positions of a layer that 0, 1, ... heads of it keep: float64 (heads + 1,), sum 1.

    Of relative masks by offset, without the anchors that a source's ends moved.
    """
    keep, support = _decided(masks, stats, kind)
    layers, heads = keep.shape[:2]
    counts = sum(np.bincount(layer.sum(0).ravel(), weights=support.ravel(), minlength=heads + 1) for layer in keep)
    return counts / (layers * support.sum())


def kept_cells(masks: PruningMasks, stats: AttentionStats, kind: AttentionKind) -> np.ndarray:
    """Return what the masks keep of each cell: (layers, heads, Tq, Tk), bool, or float64 for relative masks.

    What a mask relative to the scaled diagonal keeps depends on the source length: the share of the recorded sentences
    in which it keeps the cell, 0 where none has it.
    """
    if (relative := masks.relative_mask(kind)) is None:
        return masks.keep[kind]
    rows, columns = stats.support[kind].shape
    by_source = rows_by_source(stats.lengths[(stats.lengths[:, :2] <= (rows, columns)).all(1)])
    kept = np.zeros((*masks.keep[kind].shape[:2], rows, columns))
    pairs = np.zeros((rows, columns))
    for size in np.flatnonzero(by_source.any(0)):
        n_rows = np.count_nonzero(by_source[:, size])
        weight = by_source[:n_rows, size, None]
        kept[..., :n_rows, :size] += relative.cells(n_rows, size) * weight
        pairs[:n_rows, :size] += weight
    return kept / np.maximum(pairs, 1)


# -- down-sampling ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Maps:
    """Per-cell values of one kind in square bins of ``factor`` x ``factor`` cells.

    Attributes:
        mean: float64 (layers, heads, R, C): mean attention of the recorded pairs in a bin; 0 where there are none.
        support: float64 (R, C): mean number of sentences in which a cell of the bin is attendable.
        factor: cells to the side of a bin.
    """

    mean: np.ndarray
    support: np.ndarray
    factor: int


def maps(stats: AttentionStats, kind: AttentionKind, factor: int) -> Maps:
    """Bin mean attention and support."""
    support = stats.support[kind]
    pairs = _binned(support, factor)
    area = _binned(np.ones(support.shape), factor)
    mean = [[_ratio(_binned(head, factor), pairs, 0.0) for head in layer] for layer in stats.mass[kind]]
    return Maps(np.array(mean), pairs / area, factor)


def kept_share(keep: np.ndarray, support: np.ndarray, factor: int) -> np.ndarray:
    """Share of the recorded pairs of each bin that is kept: float64 (R, C); 0 where there are none.

    Args:
        keep: (Tq, Tk), True = kept, or the share of heads or sentences that keep the cell.
    """
    return _ratio(_binned(keep * support, factor), _binned(support, factor), 0.0)


def _binned(values: np.ndarray, factor: int) -> np.ndarray:
    """Sum (Tq, Tk) over bins; the last bin of an axis may be smaller."""
    if factor == 1:
        return values.astype(np.float64)
    rows, columns = (np.arange(0, size, factor) for size in values.shape)
    return np.add.reduceat(np.add.reduceat(values.astype(np.float64), rows, 0), columns, 1)


def bin_factor(shapes: Iterable[tuple[int, ...]], cells: int) -> int:
    """Return the smallest side of a bin with which arrays (layers, heads, Tq, Tk) have at most *cells* bins in all."""
    shapes = list(shapes)
    factor = 1
    while sum(shape[0] * shape[1] * -(-shape[2] // factor) * -(-shape[3] // factor) for shape in shapes) > cells:
        factor += 1
    return factor
