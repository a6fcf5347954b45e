"""AttentionStats -> PruningMasks: pure functions.

Every criterion gives each *unit* a score and prunes the units of lowest score. A unit is what is pruned together: one
cell, one square block of cells, or one diagonal. The budget is *effective sparsity*: the share of the attendable pairs
of the recorded data that the mask removes. Pruning in ascending order of mean attention s/n under a budget on n keeps
the most attention mass that the budget allows: the fractional-knapsack greedy, with s as value and n as weight. The
scores themselves are in :mod:`ap_fairseq.pruning.criteria`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ap_fairseq.artifacts import AttentionStats, PruningMasks
from ap_fairseq.files import UserError
from ap_fairseq.pruning import criteria
from ap_fairseq.pruning.select import prune_lowest
from ap_fairseq.pruning.spec import Granularity, MaskSpec
from ap_fairseq.pruning.summary import missed_budgets, summarize, total_of, vanished_heads
from ap_fairseq.sites import AttentionKind

TIES = 1e-6  # weight of the draw among equal scores, in key positions: distances from a sloped diagonal differ by more


def build_masks(stats: AttentionStats, spec: MaskSpec) -> tuple[PruningMasks, list[str]]:
    """Derive pruning masks from attention statistics.

    Returns:
        The masks, and one sentence for each budget that could not be met within one percentage point (a threshold
        cannot split a unit, and guaranteed cells are never pruned).

    Raises:
        UserError: for a spec that names a kind the statistics lack.
    """
    for kind in spec.budgets:
        if kind not in stats.mass:
            raise UserError(
                f"a budget is given for {kind.value}, but the statistics hold only "
                f"{', '.join(k.value for k in stats.kinds)}"
            )
    if spec.criterion == "percentile":
        keep, extrapolation = _as_published(stats, spec)
    else:
        keep, extrapolation = _ranked(stats, spec)
    for kind in stats.kinds:
        _finish(keep[kind], extrapolation[kind], stats, kind, spec)
    masks = PruningMasks(keep, extrapolation)
    summary = summarize(masks, stats)
    kinds = [row for row in summary if row.layer is None]
    masks.metadata = {
        **{key: value for key, value in stats.metadata.items() if key not in ("format", "architecture")},
        "criterion": {
            **dataclasses.asdict(spec),
            "budgets": {kind.value: budget for kind, budget in spec.budgets.items()},
            "min_heads": {kind.value: int(count) for kind, count in spec.min_heads.items()},
        },
        "sparsity": {
            row.kind: {"effective": row.effective, "nominal": row.nominal, "kept_mass": row.kept_mass} for row in kinds
        },
        "total": total_of(kinds),
        "vanished_heads": vanished_heads(masks, stats),
    }
    return masks, missed_budgets(summary, spec)


# -- criteria -------------------------------------------------------------------------------------------------------


def _ranked(stats: AttentionStats, spec: MaskSpec):
    """Prune units in ascending order of score until each scope's budget of pairs is reached."""
    units = {kind: _Units.of(stats, kind, spec) for kind in stats.kinds if kind in spec.budgets}
    keep = {kind: np.ones(stats.mass[kind].shape, dtype=bool) for kind in stats.kinds}
    extrapolation = {
        kind: np.ones((*cells.shape[:2], sum(cells.shape[2:]) - 1), dtype=bool) for kind, cells in keep.items()
    }
    for members, target in _scopes(units, stats, spec):
        parts = [(units[kind].score[index], units[kind].weight) for kind, index in members]
        pruned, threshold = prune_lowest(parts, target)
        for (kind, index), part in zip(members, pruned, strict=True):
            whole = ~part
            cells = keep[kind][index]  # a view; heads that share a score share its decisions
            if spec.granularity == 1:
                cells[:] = whole.reshape(*whole.shape[:2], *cells.shape[2:])
            else:
                cells[:] = whole[..., units[kind].of_cell]
            extrapolation[kind][index] = units[kind].offset_score[index] > threshold
    return keep, extrapolation


def _scopes(units: Mapping[AttentionKind, _Units], stats: AttentionStats, spec: MaskSpec):
    """Return (members, pairs to prune) of each group that shares a threshold; a member is (kind, index into L, H)."""
    groups = []
    for kind, unit in units.items():
        layers, heads = unit.score.shape[:2]  # those that share one score are one group
        n_layers = layers if spec.scope in ("layer", "head") else 1
        n_heads = heads if spec.scope == "head" else 1
        pairs = stats.support[kind].sum() * np.prod(stats.mass[kind].shape[:2])
        for layer, head in np.ndindex(n_layers, n_heads):
            index = (
                slice(layer, layer + 1) if n_layers > 1 else slice(None),
                slice(head, head + 1) if n_heads > 1 else slice(None),
            )
            groups.append(([(kind, index)], spec.budgets[kind] * pairs / (n_layers * n_heads)))
    if spec.scope == "global" and groups:
        groups = [([member for members, _ in groups for member in members], sum(target for _, target in groups))]
    return groups


@dataclass
class _Units:
    """The prunable units of one kind.

    Attributes:
        score: float64 (layers, heads, units), with 1 for an axis that shares scores; higher = keep, infinite = always.
        weight: int64 (units,): observed pairs in the unit, over all heads that share the score, always-kept cells left
            out.
        offset_score: float64 (layers or 1, heads or 1, Tq + Tk - 1): the score along each diagonal, +inf where never
            observed.
        of_cell: int64 (Tq, Tk): the unit of each cell.
    """

    score: np.ndarray
    weight: np.ndarray
    offset_score: np.ndarray
    of_cell: np.ndarray

    @classmethod
    def of(cls, stats: AttentionStats, kind: AttentionKind, spec: MaskSpec) -> _Units:
        support, heads = stats.support[kind], stats.mass[kind].shape[:2]
        of_cell = _unit_of_cell(support.shape, spec.granularity)
        prunable = np.where(_always_kept(stats, kind, spec), 0, support)
        pairs = criteria.sum_by(of_cell, prunable)
        seen = criteria.sum_by(criteria.offset_of_cell(support.shape), support)
        if spec.criterion == "random":
            draw = np.random.default_rng([spec.seed, list(AttentionKind).index(kind)])
            score, offset_score = draw.random((*heads, len(pairs))), draw.random((*heads, len(seen)))
        else:
            name = "mean" if spec.criterion == "percentile" else spec.criterion
            cells = criteria.SCORES[name](stats, kind)
            if spec.smooth:
                cells = criteria.smoothed(cells, support, spec.smooth)
            offset_score = criteria.mean_along_diagonals(cells * support, support)
            score = criteria.sum_by(of_cell, cells * prunable) / np.maximum(pairs, 1)
            if name in criteria.WITH_TIES:
                score = score - TIES * np.random.default_rng(spec.seed).random(len(pairs))
        if count := int(spec.min_heads.get(kind, 0)):
            score, offset_score = (_always_in_best_heads(s, heads, count, kind) for s in (score, offset_score))
        offset_score[..., seen == 0] = np.inf
        for layer, head in np.ndindex(score.shape[:2]) if spec.min_kept else ():
            share = [(score[layer, head], pairs)]
            (free,), _ = prune_lowest(share, (1 - spec.min_kept) * support.sum(), at_most=True)
            score[layer, head, ~free] = np.inf
        sharing = np.prod(heads) // np.prod(score.shape[:2])
        return cls(score, pairs * sharing, offset_score, of_cell)


def _always_in_best_heads(score: np.ndarray, heads: tuple[int, int], count: int, kind: AttentionKind) -> np.ndarray:
    """Give each unit an infinite score in the *count* heads of all layers that score it highest.

    Args:
        score: float64 (layers or 1, heads or 1, units).
        heads: layers, heads.

    Returns:
        float64 (layers, heads, units).

    Raises:
        UserError: if there are fewer heads.
    """
    if count > np.prod(heads):
        raise UserError(
            f"min_heads for {kind.value} is {count}, but it has {heads[0]} layers of {heads[1]} heads; lower it"
        )
    of_head = np.broadcast_to(score, (*heads, score.shape[2])).reshape(-1, score.shape[2]).copy()
    best = np.argpartition(of_head, -count, axis=0)[-count:]
    np.put_along_axis(of_head, best, np.inf, axis=0)
    return of_head.reshape(*heads, -1)


def _as_published(stats: AttentionStats, spec: MaskSpec):
    """The authors' percentile; see :class:`MaskSpec`."""
    keep, extrapolation = {}, {}
    for kind in stats.kinds:
        mean, shape = stats.mean(kind), stats.support[kind].shape
        keep[kind] = np.ones(mean.shape, dtype=bool)
        extrapolation[kind] = np.ones((*mean.shape[:2], sum(shape) - 1), dtype=bool)
        if kind not in spec.budgets:
            continue
        longest = max(shape)
        offsets = _Units.of(stats, kind, spec).offset_score
        for layer in range(mean.shape[0]):
            square = np.zeros((mean.shape[1], longest, longest))
            square[:, : shape[0], : shape[1]] = mean[layer]
            threshold = np.percentile(square, 100 * spec.budgets[kind])
            keep[kind][layer] = mean[layer] > threshold
            extrapolation[kind][layer] = offsets[layer] > threshold
    return keep, extrapolation


def _finish(keep, extrapolation, stats: AttentionStats, kind: AttentionKind, spec: MaskSpec) -> None:
    """Apply, in place, what holds for every mask: extrapolation to unobserved cells, what is always kept, causality."""
    support = stats.support[kind]
    if spec.extrapolate == "keep":
        extrapolation[:] = True
    if spec.keep_diagonal is not None and kind is not AttentionKind.CROSS:
        middle = support.shape[0] - 1
        extrapolation[..., max(0, middle - spec.keep_diagonal) : middle + spec.keep_diagonal + 1] = True
    unseen = support == 0
    keep[..., unseen] = extrapolation[..., criteria.offset_of_cell(support.shape)[unseen]]
    keep[..., _always_kept(stats, kind, spec)] = True
    if kind.causal:
        keep &= np.tri(*support.shape, dtype=bool)


def _always_kept(stats: AttentionStats, kind: AttentionKind, spec: MaskSpec) -> np.ndarray:
    """The guaranteed cell of each row and the sets that *spec* names, bool (Tq, Tk)."""
    cells = criteria.guaranteed(stats.support[kind].shape, kind)
    cells[:, : spec.keep_first] = True
    if spec.keep_diagonal is not None:
        cells |= criteria.near_diagonal(stats, kind, spec.keep_diagonal)
    return cells


def _unit_of_cell(shape: tuple[int, int], granularity: Granularity) -> np.ndarray:
    """Number the units: int64 (Tq, Tk)."""
    if granularity == "diagonal":
        return criteria.offset_of_cell(shape)
    row, column = np.ogrid[: shape[0], : shape[1]]
    per_row = -(-shape[1] // granularity)
    return row // granularity * per_row + column // granularity
