"""AttentionStats -> PruningMasks: pure functions.

Every procedure gives each *unit* a score and prunes the units of lowest score. A unit is what is pruned together: one
cell, one square block of cells, or one diagonal. The budget is *effective sparsity*: the share of the attendable pairs
of the recorded data that the mask removes. Pruning in ascending order of mean attention s/n under a budget on n keeps
the most attention mass that the budget allows: the fractional-knapsack greedy, with s as value and n as weight.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from ap_fairseq.artifacts import AttentionStats, PruningMasks
from ap_fairseq.sites import AttentionKind

PROCEDURES = ("effective", "as-published", "random", "window")
SCOPES = ("kind", "layer", "head", "global")
GRANULARITIES = (1, 16, 32, 64, 128, "diagonal")
BEYOND = ("diagonal", "keep")

_SORTED_AT_ONCE = 1 << 20
_BINS = 1 << 16

Granularity = int | str


@dataclass(frozen=True)
class MaskSpec:
    """How masks are derived from statistics.

    Attributes:
        budgets: per kind the share of attendable pairs to prune, in [0, 1); for ``as-published`` the nominal
            percentile. Kinds without an entry are kept whole.
        procedure: ``effective`` ranks by mean attention; ``random`` by a seeded draw; ``window`` by distance from the
            diagonal (in cross-attention from the mean source/target length slope); ``as-published`` prunes, per layer
            over its heads, everything up to a percentile of the mean attention in the square up to the longest
            sentence, non-existing cells counting as zeros (Rugina et al. 2020, arXiv 2012.02030, and its code).
        scope: what shares one threshold: all sites of a ``kind``, each ``layer`` of a kind, each ``head``, or all kinds
            together (``global``; the budget is then the sum of the kinds' budgets in pairs). ``as-published`` has its
            own scope.
        granularity: 1 (cells), 16, 32, 64, 128 (square blocks) or ``diagonal`` (offsets j - i).
        beyond: cells that no recorded sentence reaches: ``diagonal`` continues each head's mean attention along the
            diagonal against the same threshold, ``keep`` keeps them.
        seed: for ``random``, and for ties of ``window``.
    """

    budgets: Mapping[AttentionKind, float]
    procedure: str = "effective"
    scope: str = "kind"
    granularity: Granularity = 1
    beyond: str = "diagonal"
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
        if self.procedure == "as-published" and (self.granularity != 1 or self.scope != "kind"):
            raise ValueError(
                "as-published decides single cells per layer over its heads; leave --granularity and --scope at their "
                f"defaults (got granularity {self.granularity!r}, scope {self.scope!r})"
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
        _finish(keep[kind], beyond[kind], kind, stats.occupancy[kind], spec)
    masks = PruningMasks(keep, beyond)
    summary = summarize(masks, stats)
    masks.metadata = {
        **{key: value for key, value in stats.metadata.items() if key not in ("format", "architecture")},
        "procedure": {
            **dataclasses.asdict(spec),
            "budgets": {kind.value: budget for kind, budget in spec.budgets.items()},
        },
        "sparsity": {
            row.kind: {"effective": row.effective, "nominal": row.nominal, "kept_mass": row.kept_mass}
            for row in summary
            if row.layer is None
        },
    }
    return masks, _missed_budgets(summary, spec)


# -- procedures -------------------------------------------------------------------------------------------------------


def _ranked(stats: AttentionStats, spec: MaskSpec):
    """Prune units in ascending order of score until each scope's budget of pairs is reached."""
    units = {kind: _Units.of(stats, kind, spec) for kind in stats.kinds}
    pruned = {kind: np.zeros(unit.score.shape, dtype=bool) for kind, unit in units.items()}
    beyond = {kind: np.ones(unit.offset_score.shape, dtype=bool) for kind, unit in units.items()}
    for members, target in _scopes(units, stats, spec):
        scores = [units[kind].score[index] for kind, index in members]
        weights = [np.broadcast_to(units[kind].weight, units[kind].score.shape)[index] for kind, index in members]
        parts, threshold = _prune_lowest(scores, weights, target)
        for (kind, index), part in zip(members, parts, strict=True):
            pruned[kind][index] = part
            beyond[kind][index] = units[kind].offset_score[index] > threshold
    keep = {}
    for kind, unit in units.items():
        shape = stats.mass[kind].shape
        whole = ~pruned[kind]
        cells = whole.reshape(*whole.shape[:2], *shape[2:]) if spec.granularity == 1 else whole[..., unit.of_cell]
        keep[kind] = np.broadcast_to(cells, shape).copy()
        beyond[kind] = np.broadcast_to(beyond[kind], (*shape[:2], beyond[kind].shape[-1])).copy()
    return keep, beyond


def _scopes(units: Mapping[AttentionKind, _Units], stats: AttentionStats, spec: MaskSpec):
    """Return (members, pairs to prune) of each group that shares a threshold; a member is (kind, index into L, H)."""
    groups = []
    for kind in (kind for kind in units if kind in spec.budgets):
        layers, heads = units[kind].score.shape[:2]
        n_layers, n_heads = {"layer": (layers, 1), "head": (layers, heads)}.get(spec.scope, (1, 1))
        target = spec.budgets[kind] * stats.occupancy[kind].sum() * layers * heads / (n_layers * n_heads)
        for layer, head in np.ndindex(n_layers, n_heads):
            index = (
                slice(layer, layer + 1) if n_layers > 1 else slice(None),
                slice(head, head + 1) if n_heads > 1 else slice(None),
            )
            groups.append(([(kind, index)], target))
    if spec.scope == "global" and groups:
        groups = [([member for members, _ in groups for member in members], sum(target for _, target in groups))]
    return groups


def _prune_lowest(scores: list[np.ndarray], weights: list[np.ndarray], target: float):
    """Mark units in ascending order of score until their weight comes nearest to *target*.

    Args:
        scores: float64 arrays.
        weights: number arrays of the same shapes; units of weight 0 (never observed, or guaranteed) are not candidates.

    Returns:
        bool arrays of the same shapes (True = pruned), and the score up to which units were pruned (-inf for none).
    """
    score = np.concatenate([part.ravel() for part in scores])
    # Half the memory where it fits; a block of a large corpus holds more pairs than int32 counts.
    fits = max(part.max() for part in weights) < 2**31
    weight = np.concatenate([part.astype(np.int32 if fits else np.float64).ravel() for part in weights])
    pruned = np.zeros(len(score), dtype=bool)
    candidates = np.flatnonzero(weight)
    spent = 0.0
    while len(candidates) > _SORTED_AT_ONCE:
        # Sorting 10^8 units takes minutes. A histogram finds the few whose order matters: all in lower bins go.
        low, high = score[candidates].min(), score[candidates].max()
        if low == high:
            break
        chunks = np.array_split(candidates, -(-len(candidates) // _SORTED_AT_ONCE))
        bins = [((score[chunk] - low) * (_BINS / (high - low))).astype(np.int32) for chunk in chunks]
        histogram = sum(
            np.bincount(part, weights=weight[chunk], minlength=_BINS + 1)
            for part, chunk in zip(bins, chunks, strict=True)
        )
        total = spent + np.cumsum(histogram)
        critical = int(np.searchsorted(total, target, side="right"))
        for part, chunk in zip(bins, chunks, strict=True):
            pruned[chunk[part < critical]] = True
        spent = total[critical - 1] if critical else spent
        candidates = np.concatenate([chunk[part == critical] for part, chunk in zip(bins, chunks, strict=True)])
    order = candidates[np.argsort(score[candidates], kind="stable")]
    total = spent + np.cumsum(weight[order], dtype=np.float64)
    count = int(np.searchsorted(total, target, side="right"))
    if count < len(order):
        before = total[count - 1] if count else spent
        if total[count] - target < target - before:
            count += 1
    pruned[order[:count]] = True
    threshold = score.max(where=pruned, initial=-np.inf)
    splits = np.cumsum([part.size for part in scores])[:-1]
    return [p.reshape(s.shape) for p, s in zip(np.split(pruned, splits), scores, strict=True)], threshold


@dataclass
class _Units:
    """The prunable units of one kind.

    Attributes:
        score: float64 (layers, heads, units), or (1, 1, units) for what all heads share; higher = keep.
        weight: int64 (units,): observed pairs of one head in the unit, guaranteed cells left out.
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
        mass, occupancy = stats.mass[kind], stats.occupancy[kind]
        shape, heads = occupancy.shape, mass.shape[:2]
        of_cell = _unit_of_cell(shape, spec.granularity)
        diagonal = _unit_of_cell(shape, "diagonal")
        prunable = np.where(_guaranteed(shape, kind), 0, occupancy)
        weight = _sum_by(of_cell, prunable)
        seen = _sum_by(diagonal, occupancy)
        if spec.procedure == "effective":
            score = _sum_by(of_cell, mass * (prunable > 0)) / np.maximum(weight, 1)
            offset_score = _sum_by(diagonal, mass) / np.maximum(seen, 1)
        elif spec.procedure == "random":
            draw = np.random.default_rng([spec.seed, list(AttentionKind).index(kind)])
            score = draw.random((*heads, len(weight)))
            offset_score = draw.random((*heads, len(seen)))
        else:
            jitter = np.random.default_rng(spec.seed).random(len(weight))
            distance = np.abs(np.arange(shape[1])[None, :] - _slope(stats, kind) * np.arange(shape[0])[:, None])
            mean_distance = _sum_by(of_cell, distance * prunable) / np.maximum(weight, 1)
            score = -(mean_distance + jitter)[None, None]  # the same window in every head
            offset_score = -(_sum_by(diagonal, distance * occupancy) / np.maximum(seen, 1))[None, None]
        offset_score[..., seen == 0] = np.inf
        return cls(score, weight, offset_score, of_cell)


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
        offsets = _Units.of(stats, kind, dataclasses.replace(spec, procedure="effective")).offset_score
        for layer in range(mean.shape[0]):
            square = np.zeros((mean.shape[1], longest, longest))
            square[:, : shape[0], : shape[1]] = mean[layer]
            threshold = np.percentile(square, 100 * spec.budgets[kind])
            keep[kind][layer] = mean[layer] > threshold
            beyond[kind][layer] = offsets[layer] > threshold
    return keep, beyond


def _finish(keep, beyond, kind: AttentionKind, occupancy: np.ndarray, spec: MaskSpec) -> None:
    """Apply, in place, what holds for every mask: unobserved cells follow *beyond*, no row is empty, causality."""
    if spec.beyond == "keep":
        beyond[:] = True
    unseen = occupancy == 0
    keep[..., unseen] = beyond[..., _unit_of_cell(occupancy.shape, "diagonal")[unseen]]
    keep[..., _guaranteed(occupancy.shape, kind)] = True
    if kind.causal:
        keep &= np.tri(*occupancy.shape, dtype=bool)


# -- cells and units --------------------------------------------------------------------------------------------------


def _unit_of_cell(shape: tuple[int, int], granularity: Granularity) -> np.ndarray:
    """Number the units: int64 (Tq, Tk)."""
    row, column = np.ogrid[: shape[0], : shape[1]]
    if granularity == "diagonal":
        return column - row + shape[0] - 1
    per_row = -(-shape[1] // granularity)
    return row // granularity * per_row + column // granularity


def _sum_by(unit_of_cell: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Sum the cells (..., Tq, Tk) of each unit: (..., units)."""
    n_units = int(unit_of_cell.max()) + 1
    if n_units == unit_of_cell.size:
        return values.reshape(*values.shape[:-2], -1)
    heads = values.reshape(-1, unit_of_cell.size)
    sums = [np.bincount(unit_of_cell.ravel(), weights=head, minlength=n_units) for head in heads]
    return np.stack(sums).reshape(*values.shape[:-2], n_units)


def _guaranteed(shape: tuple[int, int], kind: AttentionKind) -> np.ndarray:
    """The cell that exists in every sentence of every row, bool (Tq, Tk): the diagonal, or column 0 of cross."""
    cells = np.zeros(shape, dtype=bool)
    if kind is AttentionKind.CROSS:
        cells[:, 0] = True
    else:
        np.fill_diagonal(cells, True)
    return cells


def _slope(stats: AttentionStats, kind: AttentionKind) -> float:
    """Key positions per query position: 1 in self-attention, mean source length / mean target length in cross."""
    if kind is not AttentionKind.CROSS:
        return 1.0
    # Row 0 exists in every sentence, so row 0 sums to all source tokens and column 0 to all target tokens.
    occupancy = stats.occupancy[kind]
    return float(occupancy[0].sum() / occupancy[:, 0].sum())


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
                    guaranteed_rows=int(part["guaranteed"]),
                    rows=int(part["rows"]),
                )
            )
    return rows


def _single(observed: np.ndarray) -> int:
    """Rows in which only one cell was ever attendable; keeping it is no sign of pruning."""
    return int(np.sum(observed.sum(-1) == 1))


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
        pairs = sum(row.pairs for row in totals)
        reached = sum(row.pairs * row.effective for row in totals) / pairs
        target = sum(row.pairs * spec.budgets[AttentionKind(row.kind)] for row in totals) / pairs
        checks = [("all kinds together", reached, target)]
    if spec.granularity == 1:
        reason = "every row keeps one guaranteed cell, and rows of short sentences have few others"
    else:
        unit = "diagonals" if spec.granularity == "diagonal" else f"{spec.granularity}x{spec.granularity} blocks"
        reason = f"the recorded pairs fall into few {unit}, and a unit is pruned whole; use a finer --granularity"
    return [
        f"{name}: effective sparsity {reached:.1%} instead of {target:.1%}: {reason}"
        for name, reached, target in checks
        if abs(reached - target) > 0.01
    ]
