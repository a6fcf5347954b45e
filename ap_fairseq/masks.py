"""AttentionStats -> PruningMasks: pure functions.

Every procedure gives each *unit* a score and prunes the units of lowest score. A unit is what is pruned together: one
cell, one square block of cells, or one diagonal. The budget is *effective sparsity*: the share of the attendable pairs
of the recorded data that the mask removes. Pruning in ascending order of mean attention s/n under a budget on n keeps
the most attention mass that the budget allows: the fractional-knapsack greedy, with s as value and n as weight. The
scores themselves are in :mod:`ap_fairseq.criteria`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ap_fairseq import criteria
from ap_fairseq.artifacts import AttentionStats, PruningMasks
from ap_fairseq.sites import AttentionKind

PROCEDURES = (*criteria.SCORES, "random", "as-published")
SCOPES = ("kind", "layer", "head", "global")
GRANULARITIES = (1, 16, 32, 64, 128, "diagonal")
BEYOND = ("diagonal", "keep")
TIES = 1e-6  # weight of the draw among equal scores, in key positions: distances from a sloped diagonal differ by more

_SORTED_AT_ONCE = 1 << 20
_BINS = 1 << 16

Granularity = int | str


@dataclass(frozen=True)
class MaskSpec:
    """How masks are derived from statistics.

    Attributes:
        budgets: per kind the share of attendable pairs to prune, in [0, 1); for ``as-published`` the nominal
            percentile. Kinds without an entry are kept whole.
        procedure: what ranks the units. ``effective`` (mean attention), ``normalised``, ``relative``, ``importance``
            (effect on the loss) and the controls ``window``, ``gaussian`` and ``fixed`` are the scores of
            :mod:`ap_fairseq.criteria`; ``random`` is a seeded draw. ``as-published`` prunes, per layer over its heads,
            everything up to a percentile of the mean attention in the square up to the longest sentence, non-existing
            cells counting as zeros (Rugina et al. 2020, arXiv 2012.02030, and its code).
        scope: what shares one threshold: all sites of a ``kind``, each ``layer`` of a kind, each ``head``, or all kinds
            together (``global``; the budget is then the sum of the kinds' budgets in pairs, and kinds, layers and heads
            that are cheap to prune pay for the others). ``as-published`` has its own scope.
        granularity: 1 (cells), 16, 32, 64, 128 (square blocks) or ``diagonal`` (offsets j - i).
        beyond: cells that no recorded sentence reaches: ``diagonal`` continues each head's scores along the diagonal
            against the same threshold, ``keep`` keeps them.
        min_kept: the share of its attendable pairs that every head keeps, its best, in [0, 1].
        min_heads: per kind how many heads, over all its layers, keep each unit at least: those in which its score is
            highest. A pair of positions that every head loses is lost to the model. Kinds without an entry or a budget
            have no minimum.
        keep_diagonal: also keep every cell at most this many key positions from the diagonal (in cross-attention from
            the mean source/target length slope); None for no such set.
        keep_first: also keep this many first columns.
        pool: score each cell by the mean over the cells up to this many positions away along its diagonal
            (:func:`ap_fairseq.criteria.pooled`): late positions, which few sentences reach, are else ranked by chance.
        seed: for ``random``, and for ties of the controls by distance.

    What these sets and minima keep counts against the budget. *keep_diagonal* and *keep_first* are cells also where the
    granularity is coarser. They hold within the recorded range, and the diagonal of self-attention beyond it.
    """

    budgets: Mapping[AttentionKind, float]
    procedure: str = "effective"
    scope: str = "kind"
    granularity: Granularity = 1
    beyond: str = "diagonal"
    min_kept: float = 0.0
    min_heads: Mapping[AttentionKind, int] = dataclasses.field(default_factory=dict)
    keep_diagonal: int | None = None
    keep_first: int = 0
    pool: int = 0
    seed: int = 1

    def __post_init__(self):
        for name, value, valid in (
            ("procedure", self.procedure, PROCEDURES),
            ("scope", self.scope, SCOPES),
            ("granularity", self.granularity, GRANULARITIES),
            ("beyond", self.beyond, BEYOND),
        ):
            if value not in valid:
                raise ValueError(f"{name} {value!r} is not one of {', '.join(map(str, valid))}")
        for kind, budget in self.budgets.items():
            if not 0 <= budget < 1:
                raise ValueError(f"budget for {kind.value} is {budget}, expected 0 <= budget < 1")
        if not 0 <= self.min_kept <= 1:
            raise ValueError(f"min_kept is {self.min_kept}, expected a share of pairs in [0, 1]")
        for kind, count in self.min_heads.items():
            if count < 0 or count != int(count):
                raise ValueError(f"min_heads for {kind.value} is {count:g}, expected a number of heads")
        if self.keep_first < 0 or (self.keep_diagonal or 0) < 0:
            raise ValueError(f"keep_diagonal {self.keep_diagonal} and keep_first {self.keep_first} cannot be negative")
        if self.pool and (self.pool < 0 or self.procedure not in criteria.OF_CELLS):
            raise ValueError(
                f"pool is {self.pool} for the procedure {self.procedure}; expected a number of positions, and one of "
                f"{', '.join(criteria.OF_CELLS)}"
            )
        if self.procedure == "as-published":
            own = MaskSpec(self.budgets, beyond=self.beyond, seed=self.seed)
            changed = [
                f"{field.name} {getattr(self, field.name)!r}"
                for field in dataclasses.fields(self)
                if field.name != "procedure" and getattr(self, field.name) != getattr(own, field.name)
            ]
            if changed:
                raise ValueError(
                    "as-published decides single cells per layer over its heads and keeps nothing else; leave "
                    f"{' and '.join(changed)} at the default"
                )


@dataclass(frozen=True)
class LayerSummary:
    """What a mask does to one kind (``layer`` is None) or one layer of it; shares in [0, 1]."""

    kind: str
    layer: int | None
    pairs: int  # attendable pairs of the recorded data, over heads: sum n
    effective: float  # share of attendable pairs removed: sum n (1 - keep) / sum n
    nominal: float  # share of the cells of the square up to the longest sentence not kept, non-existing cells included
    kept_mass: float  # sum s keep / sum s
    mass: float  # attention mass of the recorded data: sum s
    guaranteed_rows: int  # observed rows (over heads) whose only kept cell is the guaranteed one
    rows: int  # observed rows (over heads)


def build_masks(stats: AttentionStats, spec: MaskSpec) -> tuple[PruningMasks, list[str]]:
    """Derive pruning masks from attention statistics.

    Returns:
        The masks, and one sentence for each budget that could not be met within one percentage point (a threshold
        cannot split a unit, and guaranteed cells are never pruned).

    Raises:
        ValueError: for a spec that names a kind the statistics lack.
    """
    for kind in spec.budgets:
        if kind not in stats.mass:
            raise ValueError(
                f"a budget is given for {kind.value}, but the statistics hold only "
                f"{', '.join(k.value for k in stats.kinds)}"
            )
    if spec.procedure == "as-published":
        keep, beyond = _as_published(stats, spec)
    else:
        keep, beyond = _ranked(stats, spec)
    for kind in stats.kinds:
        _finish(keep[kind], beyond[kind], stats, kind, spec)
    masks = PruningMasks(keep, beyond)
    summary = summarize(masks, stats)
    kinds = [row for row in summary if row.layer is None]
    masks.metadata = {
        **{key: value for key, value in stats.metadata.items() if key not in ("format", "architecture")},
        "procedure": {
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
    return masks, _missed_budgets(summary, spec)


# -- procedures -------------------------------------------------------------------------------------------------------


def _ranked(stats: AttentionStats, spec: MaskSpec):
    """Prune units in ascending order of score until each scope's budget of pairs is reached."""
    units = {kind: _Units.of(stats, kind, spec) for kind in stats.kinds if kind in spec.budgets}
    keep = {kind: np.ones(stats.mass[kind].shape, dtype=bool) for kind in stats.kinds}
    beyond = {kind: np.ones((*cells.shape[:2], sum(cells.shape[2:]) - 1), dtype=bool) for kind, cells in keep.items()}
    for members, target in _scopes(units, stats, spec):
        parts = [(units[kind].score[index], units[kind].weight) for kind, index in members]
        pruned, threshold = _prune_lowest(parts, target)
        for (kind, index), part in zip(members, pruned, strict=True):
            whole = ~part
            cells = keep[kind][index]  # a view; heads that share a score share its decisions
            if spec.granularity == 1:
                cells[:] = whole.reshape(*whole.shape[:2], *cells.shape[2:])
            else:
                cells[:] = whole[..., units[kind].of_cell]
            beyond[kind][index] = units[kind].offset_score[index] > threshold
    return keep, beyond


def _scopes(units: Mapping[AttentionKind, _Units], stats: AttentionStats, spec: MaskSpec):
    """Return (members, pairs to prune) of each group that shares a threshold; a member is (kind, index into L, H)."""
    groups = []
    for kind, unit in units.items():
        layers, heads = unit.score.shape[:2]  # those that share one score are one group
        n_layers = layers if spec.scope in ("layer", "head") else 1
        n_heads = heads if spec.scope == "head" else 1
        pairs = stats.occupancy[kind].sum() * np.prod(stats.mass[kind].shape[:2])
        for layer, head in np.ndindex(n_layers, n_heads):
            index = (
                slice(layer, layer + 1) if n_layers > 1 else slice(None),
                slice(head, head + 1) if n_heads > 1 else slice(None),
            )
            groups.append(([(kind, index)], spec.budgets[kind] * pairs / (n_layers * n_heads)))
    if spec.scope == "global" and groups:
        groups = [([member for members, _ in groups for member in members], sum(target for _, target in groups))]
    return groups


def _prune_lowest(parts: Sequence[tuple[np.ndarray, np.ndarray]], target: float, at_most: bool = False):
    """Mark units in ascending order of score until their weight comes nearest to *target*, or the last below it.

    Args:
        parts: pairs of scores, float64 (..., units), and weights, numbers (units,). Units of weight 0 (never observed,
            or always kept) and of infinite score are no candidates.
        at_most: never exceed the target.

    Returns:
        bool arrays of the shapes of the scores (True = pruned), and the score up to which units were pruned (-inf for
        none).
    """
    rows = [(row, weight) for score, weight in parts for row in score.reshape(-1, score.shape[-1])]

    def candidates():  # row by row, because 10^8 units and their indices would take gigabytes
        for row, weight in rows:
            index = np.flatnonzero((weight > 0) & (row >= low) & (row <= high))
            yield row[index], weight[index], index

    # Sorting 10^8 units takes minutes. A histogram finds the few whose order matters: all below them go.
    low, high, spent = -np.inf, np.finfo(float).max, 0.0
    while True:
        counts, lows, highs = zip(
            *((len(score), score.min(initial=np.inf), score.max(initial=-np.inf)) for score, _, _ in candidates()),
            strict=True,
        )
        if sum(counts):
            low, high = min(lows), max(highs)
        if sum(counts) <= _SORTED_AT_ONCE or low == high:
            break
        histogram = sum(
            np.bincount(_bin(score, low, high), weights=weight, minlength=_BINS + 1)
            for score, weight, _ in candidates()
        )
        below = spent + np.cumsum(histogram)
        critical = int(np.searchsorted(below, target, side="right"))
        if critical > _BINS:  # the target exceeds all weight
            low, high = np.inf, -np.inf
            break
        inside = [score[_bin(score, low, high) == critical] for score, _, _ in candidates()]
        spent = below[critical - 1] if critical else spent
        low, high = min(part.min(initial=np.inf) for part in inside), max(part.max(initial=-np.inf) for part in inside)

    undecided = list(candidates())
    score, weight = (np.concatenate([part[k] for part in undecided]) for k in (0, 1))
    order = np.argsort(score, kind="stable")
    below = spent + np.cumsum(weight[order], dtype=np.float64)
    count = int(np.searchsorted(below, target, side="right"))
    if count < len(order) and not at_most:
        before = below[count - 1] if count else spent
        if below[count] - target < target - before:
            count += 1
    chosen = np.zeros(len(order), dtype=bool)
    chosen[order[:count]] = True
    marks, threshold = [], -np.inf
    decided = np.split(chosen, np.cumsum([len(index) for _, _, index in undecided])[:-1])
    for (row, row_weight), (_, _, index), part in zip(rows, undecided, decided, strict=True):
        mark = (row < low) & (row_weight > 0)
        mark[index] = part
        marks.append(mark)
        threshold = max(threshold, row.max(where=mark, initial=-np.inf))
    of_row = iter(marks)
    pruned = [np.stack([next(of_row) for _ in range(s.size // s.shape[-1])]).reshape(s.shape) for s, _ in parts]
    return pruned, threshold


def _bin(score: np.ndarray, low: float, high: float) -> np.ndarray:
    """Number equal intervals of [low, high]: int64, 0 to _BINS."""
    return ((score - low) / (high - low) * _BINS).astype(np.int64)


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
        occupancy, heads = stats.occupancy[kind], stats.mass[kind].shape[:2]
        of_cell = _unit_of_cell(occupancy.shape, spec.granularity)
        prunable = np.where(_always_kept(stats, kind, spec), 0, occupancy)
        pairs = criteria.sum_by(of_cell, prunable)
        seen = criteria.sum_by(criteria.offset_of_cell(occupancy.shape), occupancy)
        if spec.procedure == "random":
            draw = np.random.default_rng([spec.seed, list(AttentionKind).index(kind)])
            score, offset_score = draw.random((*heads, len(pairs))), draw.random((*heads, len(seen)))
        else:
            name = "effective" if spec.procedure == "as-published" else spec.procedure
            cells = criteria.SCORES[name](stats, kind)
            if spec.pool:
                cells = criteria.pooled(cells, occupancy, spec.pool)
            offset_score = criteria.mean_along_diagonals(cells * occupancy, occupancy)
            score = criteria.sum_by(of_cell, cells * prunable) / np.maximum(pairs, 1)
            if name in criteria.WITH_TIES:
                score = score - TIES * np.random.default_rng(spec.seed).random(len(pairs))
        if count := int(spec.min_heads.get(kind, 0)):
            score, offset_score = (_always_in_best_heads(s, heads, count, kind) for s in (score, offset_score))
        offset_score[..., seen == 0] = np.inf
        for layer, head in np.ndindex(score.shape[:2]) if spec.min_kept else ():
            share = [(score[layer, head], pairs)]
            (free,), _ = _prune_lowest(share, (1 - spec.min_kept) * occupancy.sum(), at_most=True)
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
        ValueError: if there are fewer heads.
    """
    if count > np.prod(heads):
        raise ValueError(
            f"min_heads for {kind.value} is {count}, but it has {heads[0]} layers of {heads[1]} heads; lower it"
        )
    of_head = np.broadcast_to(score, (*heads, score.shape[2])).reshape(-1, score.shape[2]).copy()
    best = np.argpartition(of_head, -count, axis=0)[-count:]
    np.put_along_axis(of_head, best, np.inf, axis=0)
    return of_head.reshape(*heads, -1)


def _as_published(stats: AttentionStats, spec: MaskSpec):
    """The authors' percentile; see :class:`MaskSpec`."""
    keep, beyond = {}, {}
    for kind in stats.kinds:
        mean, shape = stats.mean(kind), stats.occupancy[kind].shape
        keep[kind] = np.ones(mean.shape, dtype=bool)
        beyond[kind] = np.ones((*mean.shape[:2], sum(shape) - 1), dtype=bool)
        if kind not in spec.budgets:
            continue
        longest = max(shape)
        offsets = _Units.of(stats, kind, spec).offset_score
        for layer in range(mean.shape[0]):
            square = np.zeros((mean.shape[1], longest, longest))
            square[:, : shape[0], : shape[1]] = mean[layer]
            threshold = np.percentile(square, 100 * spec.budgets[kind])
            keep[kind][layer] = mean[layer] > threshold
            beyond[kind][layer] = offsets[layer] > threshold
    return keep, beyond


def _finish(keep, beyond, stats: AttentionStats, kind: AttentionKind, spec: MaskSpec) -> None:
    """Apply, in place, what holds for every mask: unobserved cells follow *beyond*, what is always kept, causality."""
    occupancy = stats.occupancy[kind]
    if spec.beyond == "keep":
        beyond[:] = True
    if spec.keep_diagonal is not None and kind is not AttentionKind.CROSS:
        middle = occupancy.shape[0] - 1
        beyond[..., max(0, middle - spec.keep_diagonal) : middle + spec.keep_diagonal + 1] = True
    unseen = occupancy == 0
    keep[..., unseen] = beyond[..., criteria.offset_of_cell(occupancy.shape)[unseen]]
    keep[..., _always_kept(stats, kind, spec)] = True
    if kind.causal:
        keep &= np.tri(*occupancy.shape, dtype=bool)


def _always_kept(stats: AttentionStats, kind: AttentionKind, spec: MaskSpec) -> np.ndarray:
    """The guaranteed cell of each row and the sets that *spec* names, bool (Tq, Tk)."""
    cells = criteria.guaranteed(stats.occupancy[kind].shape, kind)
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


# -- what came out ----------------------------------------------------------------------------------------------------


def summarize(masks: PruningMasks, stats: AttentionStats) -> list[LayerSummary]:
    """Return effective sparsity, nominal sparsity and kept mass per kind and layer; the kind's own row comes first."""
    rows = []
    for kind in stats.kinds:
        keep, mass, occupancy = masks.keep[kind], stats.mass[kind], stats.occupancy[kind]
        observed = occupancy > 0
        longest = max(occupancy.shape)
        layers = [
            dict(
                pruned=np.sum(occupancy * (keep.shape[1] - keep[layer].sum(0, dtype=np.int64))),
                pairs=occupancy.sum() * keep.shape[1],
                not_kept=keep.shape[1] * longest**2 - keep[layer].sum(),
                cells=keep.shape[1] * longest**2,
                kept=np.sum(mass[layer], where=keep[layer]),
                mass=mass[layer].sum(),
                guaranteed=np.sum((keep[layer] & observed).sum(-1) == 1) - keep.shape[1] * _single(observed),
                rows=keep.shape[1] * int(observed.any(-1).sum()),
            )
            for layer in range(keep.shape[0])
        ]
        total = {key: sum(layer[key] for layer in layers) for key in layers[0]}
        for layer, part in [(None, total), *enumerate(layers)]:
            rows.append(
                LayerSummary(
                    kind.value,
                    layer,
                    pairs=int(part["pairs"]),
                    effective=float(part["pruned"] / part["pairs"]),
                    nominal=float(part["not_kept"] / part["cells"]),
                    kept_mass=float(part["kept"] / part["mass"]),
                    mass=float(part["mass"]),
                    guaranteed_rows=int(part["guaranteed"]),
                    rows=int(part["rows"]),
                )
            )
    return rows


def _single(observed: np.ndarray) -> int:
    """Rows in which only one cell was ever attendable; keeping it is no sign of pruning."""
    return int(np.sum(observed.sum(-1) == 1))


def total_of(kinds: Sequence[LayerSummary]) -> dict[str, float]:
    """Return effective sparsity and kept mass over all pairs of several rows of a summary."""
    pairs, mass = sum(row.pairs for row in kinds), sum(row.mass for row in kinds)
    return {
        "effective": sum(row.effective * row.pairs for row in kinds) / pairs,
        "kept_mass": sum(row.kept_mass * row.mass for row in kinds) / mass,
    }


def vanished_heads(masks: PruningMasks, stats: AttentionStats) -> dict[str, list[list[int]]]:
    """Return ``{kind: [[layer, head], ...]}`` of the heads that keep no observed cell but the guaranteed ones."""
    vanished = {}
    for kind in stats.kinds:
        occupancy = stats.occupancy[kind]
        others = (occupancy > 0) & ~criteria.guaranteed(occupancy.shape, kind)
        empty = ~(masks.keep[kind] & others).any((-2, -1)) & others.any()
        if empty.any():
            vanished[kind.value] = np.argwhere(empty).tolist()
    return vanished


def format_summary(rows: Iterable[LayerSummary]) -> str:
    """Render the summary as a table for terminals, shares in percent."""
    lines = [f"{'kind':<14}{'layer':>6}{'effective':>11}{'nominal':>9}{'kept mass':>11}{'guaranteed rows':>20}"]
    for row in rows:
        layer = "all" if row.layer is None else str(row.layer)
        guaranteed = f"{row.guaranteed_rows}/{row.rows}"
        lines.append(
            f"{row.kind:<14}{layer:>6}{row.effective:>10.1%} {row.nominal:>8.1%}{row.kept_mass:>10.1%} {guaranteed:>19}"
        )
    return "\n".join(lines)


def _missed_budgets(summary: Iterable[LayerSummary], spec: MaskSpec) -> list[str]:
    """Say why an effective sparsity is more than one percentage point off its budget."""
    if spec.procedure == "as-published":
        return []  # its budgets are nominal
    totals = [row for row in summary if row.layer is None and AttentionKind(row.kind) in spec.budgets]
    checks = [(row.kind, row.effective, spec.budgets[AttentionKind(row.kind)]) for row in totals]
    if spec.scope == "global" and totals:
        target = np.average([target for _, _, target in checks], weights=[row.pairs for row in totals])
        checks = [("all kinds together", total_of(totals)["effective"], target)]
    if spec.granularity == 1:
        reason = "every row keeps one guaranteed cell, and rows of short sentences have few others"
        if spec.min_kept or spec.min_heads or spec.keep_first or spec.keep_diagonal is not None:
            reason = f"{reason}; what min_kept, min_heads, keep_first and keep_diagonal keep is never pruned either"
    else:
        unit = "diagonals" if spec.granularity == "diagonal" else f"{spec.granularity}x{spec.granularity} blocks"
        reason = f"the recorded pairs fall into few {unit}, and a unit is pruned whole; use a finer --granularity"
    return [
        f"{name}: effective sparsity {reached:.1%} instead of {target:.1%}: {reason}"
        for name, reached, target in checks
        if abs(reached - target) > 0.01
    ]
