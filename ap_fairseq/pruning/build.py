"""AttentionStats -> PruningMasks: pure functions.

Every criterion scores *units*, and those of lowest score are pruned. A unit is pruned as a whole: one cell, one block
of cells, one diagonal, or one head. The budget is *effective sparsity*: the share of the attendable pairs of the
recorded data that the mask removes. Pruning in ascending order of mean attention s/n under a budget on n keeps the most
attention mass that the budget allows: the fractional-knapsack greedy, with s as value and n as weight. The scores
themselves are in :mod:`ap_fairseq.pruning.criteria`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ap_fairseq.artifacts import AttentionStats, PruningMasks, extrapolated
from ap_fairseq.files import UserError
from ap_fairseq.pruning import criteria
from ap_fairseq.pruning.select import prune_surplus_first, weight_of
from ap_fairseq.pruning.spec import MaskSpec
from ap_fairseq.pruning.summary import (
    LayerSummary,
    describe_vanished,
    missed_budgets,
    of_kinds,
    pairs_beyond,
    pairs_on,
    sparsity_on,
    summarize,
    total_of,
    vanished_heads,
)
from ap_fairseq.pruning.units import Units, always_kept
from ap_fairseq.relative import RelativeMask
from ap_fairseq.sites import AttentionKind

Cells = dict[AttentionKind, np.ndarray]


@dataclass(frozen=True)
class BuiltMasks:
    """Masks and what they do to the recorded data.

    Attributes:
        masks: the masks, with their provenance.
        summary: one row for each kind and each of its layers, the kind's own first.
        warnings: one sentence for each budget missed by more than one percentage point (a threshold cannot split a
            unit, and guaranteed cells are not pruned), and for each kind with heads that keep nothing else.
    """

    masks: PruningMasks
    summary: list[LayerSummary]
    warnings: list[str]


def build_masks(stats: AttentionStats, spec: MaskSpec, share: float = 1.0) -> BuiltMasks:
    """Derive pruning masks from attention statistics.

    Args:
        share: of the budgets, in (0, 1]. Below 1 they are to grow, and a ``max_heads`` for which they are too small
            need not hold yet.

    Raises:
        UserError: for statistics without pairs or scores, or a spec that does not fit them.
    """
    for kind in spec.budgets:
        if kind not in stats.mass:
            raise UserError(
                f"a budget is given for {kind.value}, but the statistics hold only {', '.join(stats.kinds)}; leave it "
                "out"
            )
    stats.require_pairs()
    spec = dataclasses.replace(spec, budgets={kind: budget * share for kind, budget in spec.budgets.items()})
    return _calibrated(stats, spec, share < 1) if spec.calibrate else _build(stats, spec, spec, share < 1)


CALIBRATIONS = 10  # at most; two or three come within CLOSE where masks are of single cells
CLOSE = 1e-3


def _calibrated(stats: AttentionStats, spec: MaskSpec, growing: bool) -> BuiltMasks:
    """Build masks whose budgets hold on the validation lengths, by correcting the budgets for what they miss there.

    A budget is corrected by its error, or by bisection between budgets that were too small and too large: where units
    are few, or ``max_heads`` prunes much, a small correction changes nothing or too much.
    """
    if not len(stats.validation_lengths):
        raise UserError(
            "--calibrate needs the lengths of the validation sentences, which these statistics lack; record a "
            "translation model with ap-record on a data-bin that has a subset valid, or leave --calibrate out"
        )
    pairs = pairs_on(stats.architecture, stats.validation_lengths)
    budgets = dict(spec.budgets)
    tried: dict[AttentionKind, list[tuple[float, float]]] = {kind: [] for kind in budgets}
    low, high = dict.fromkeys(budgets, 0.0), dict.fromkeys(budgets, 1.0)
    for _ in range(CALIBRATIONS):
        built = _build(stats, dataclasses.replace(spec, budgets=budgets), spec, growing)
        reached = built.masks.metadata["validation"]
        errors = {kind: budget - reached[kind.value] for kind, budget in spec.budgets.items()}
        if spec.scope == "global" and errors:
            shared = np.average(list(errors.values()), weights=[pairs[kind.value] for kind in errors])
            errors = dict.fromkeys(errors, float(shared))
        if all(abs(error) < CLOSE for error in errors.values()):
            return built
        for kind, error in errors.items():
            budget = budgets[kind]
            tried[kind].append((abs(error), budget))
            if abs(error) >= CLOSE:
                (low if error > 0 else high)[kind] = budget
                within = low[kind] < budget + error < high[kind]
                budgets[kind] = budget + error if within else (low[kind] + high[kind]) / 2
    best = {kind: min(attempts)[1] for kind, attempts in tried.items()}
    return _build(stats, dataclasses.replace(spec, budgets=best), spec, growing)


def _build(stats: AttentionStats, spec: MaskSpec, wanted: MaskSpec, growing: bool) -> BuiltMasks:
    """Build masks by *spec*; errors, warnings and provenance are those of *wanted*, whose budgets were not corrected.

    Args:
        growing: a ``max_heads`` for which the budgets are too small need not hold yet.
    """
    masks = _derive(stats, spec, wanted, growing)
    summary = summarize(masks, stats)
    vanished = vanished_heads(masks, stats)
    validation = sparsity_on(masks, stats.validation_lengths) if len(stats.validation_lengths) else {}
    kinds = of_kinds(summary)
    masks.metadata = {
        **{key: value for key, value in stats.metadata.items() if key not in ("format", "architecture")},
        "spec": _plain(wanted),
        "sparsity": {
            row.kind: {"effective": row.effective, "nominal": row.nominal, "kept_mass": row.kept_mass} for row in kinds
        },
        "total": total_of(kinds),
        **({"validation": validation} if validation else {}),
        "vanished_heads": vanished,
    }
    held = None
    if spec.calibrate and validation:
        pairs, beyond = pairs_on(masks.architecture, stats.validation_lengths), pairs_beyond(stats)
        held = {kind: (validation[kind], n, beyond[kind]) for kind, n in pairs.items()}
    warnings = missed_budgets(summary, wanted, held)
    warnings += [describe_vanished(masks, AttentionKind(kind), heads) for kind, heads in vanished.items()]
    return BuiltMasks(masks, summary, warnings)


def _derive(stats: AttentionStats, spec: MaskSpec, wanted: MaskSpec, growing: bool) -> PruningMasks:
    """Decide what masks by *spec* keep; args as for :func:`_build`."""
    recorded, rows = stats, np.zeros((1, 1), dtype=np.int64)
    if spec.in_offsets(AttentionKind.CROSS):
        rows, stats = stats.rows_by_centre(), stats.in_offsets()
        stats.require_pairs()
    if spec.criterion == "percentile":
        keep, extrapolation = _by_percentile(stats, spec)
    else:
        keep, extrapolation, units = _ranked(stats, spec, wanted, growing, rows)
    for kind in stats.kinds:
        _finish(keep[kind], extrapolation[kind], stats, kind, spec)
    relative = None
    if spec.in_offsets(AttentionKind.CROSS):
        slope, anchor = recorded.by_offset().slope, units[AttentionKind.CROSS].anchor
        relative, keep, extrapolation = _relative(keep, extrapolation, slope, anchor)
    return PruningMasks(keep, extrapolation, {"spec": {"empty_rows": spec.empty_rows}}, relative)


def _plain(spec: MaskSpec) -> dict[str, Any]:
    """Return a specification as metadata hold it: ``max_heads_of`` and ``empty_rows`` only where they matter."""
    options = dataclasses.asdict(spec)
    if not spec.max_heads:
        del options["max_heads_of"]
    if not spec.empty_rows:
        del options["empty_rows"]
    return {
        **options,
        "budgets": _named(spec.budgets),
        "granularity": _named(spec.granularity) if isinstance(spec.granularity, Mapping) else spec.granularity,
        "min_heads": {kind.value: int(count) for kind, count in spec.min_heads.items()},
        "max_heads": _named(spec.max_heads),
    }


def _relative(keep: Cells, extrapolation: Cells, slope: int, anchor: np.ndarray) -> tuple[RelativeMask, Cells, Cells]:
    """Turn decisions about offsets of cross-attention into a relative mask over a mask that keeps everything."""
    kind = AttentionKind.CROSS
    offsets = keep[kind][:, :, 0]
    np.put_along_axis(offsets, anchor[..., None] + offsets.shape[2] // 2, True, axis=2)
    everything = np.ones((*offsets.shape[:2], 1, 1), dtype=bool)
    return (
        RelativeMask(slope, offsets, anchor),
        {**keep, kind: everything},
        {**extrapolation, kind: everything[..., 0]},
    )


def _named(by_kind: Mapping[AttentionKind, Any]) -> dict[str, Any]:
    return {kind.value: value for kind, value in by_kind.items()}


def _all_kept(stats: AttentionStats) -> tuple[Cells, Cells]:
    """Return all-ones keep masks and extrapolation patterns."""
    keep = {kind: np.ones(mass.shape, dtype=bool) for kind, mass in stats.mass.items()}
    patterns = {kind: np.ones((*k.shape[:2], sum(k.shape[2:]) - 1), dtype=bool) for kind, k in keep.items()}
    return keep, patterns


# -- criteria -------------------------------------------------------------------------------------------------------


def _ranked(
    stats: AttentionStats, spec: MaskSpec, wanted: MaskSpec, growing: bool, rows: np.ndarray
) -> tuple[Cells, Cells, dict[AttentionKind, Units]]:
    """Prune units in ascending order of score until each scope's budget of pairs is reached.

    Args:
        wanted, growing: as for :func:`_build`.
        rows: those of cross-attention by centre, where its units are offsets.
    """
    units = {kind: Units.from_stats(stats, kind, spec, rows) for kind in stats.kinds if kind in spec.budgets}
    keep, extrapolation = _all_kept(stats)
    for (members, target), (_, asked) in zip(*(_scopes(units, stats, s) for s in (spec, wanted)), strict=True):
        parts = [(units[kind].score[index], units[kind].weight[index]) for kind, index in members]
        surplus = [units[kind].surplus[index] for kind, index in members]
        if not growing:
            target = max(target, _required_by_cap(parts, surplus, asked, members, stats, spec))
        pruned, surplus_threshold, threshold = prune_surplus_first(parts, surplus, target)
        for (kind, index), part in zip(members, pruned, strict=True):
            whole = ~part
            cells = keep[kind][index]  # a view; heads that share a score share its decisions
            if spec.granularity_of(kind) == 1 or spec.in_offsets(kind):
                cells[:] = whole.reshape(*whole.shape[:2], *cells.shape[2:])
            else:
                cells[:] = whole[..., units[kind].cell_unit]
            thresholds = np.where(units[kind].offset_surplus[index], surplus_threshold, threshold)
            decided = whole if spec.of_heads(kind) else units[kind].offset_score[index] > thresholds
            extrapolation[kind][index] = decided
    return keep, extrapolation, units


def _required_by_cap(parts, surplus, asked: float, members, stats: AttentionStats, spec: MaskSpec) -> float:
    """Return the pairs that ``max_heads`` prunes at least.

    Raises:
        UserError: for more than one percentage point above the budget *asked* for.
    """
    least = weight_of(parts, surplus)
    kinds = list(dict.fromkeys(kind for kind, _ in members))
    pairs = sum(stats.support[kind].sum() * np.prod(stats.mass[kind][index].shape[:2]) for kind, index in members)
    if least > asked + 0.01 * pairs:
        caps = ", ".join(f"{kind.value}={spec.max_heads[kind]:g}" for kind in kinds if kind in spec.max_heads)
        raise UserError(
            f"--max-heads {caps} prunes at least {least / pairs:.1%} of the pairs of {', '.join(kinds)}, the budget is "
            f"{asked / pairs:.1%}; raise one of them"
        )
    return least


def _scopes(units: Mapping[AttentionKind, Units], stats: AttentionStats, spec: MaskSpec):
    """Return (members, pairs to prune) of each group that shares a threshold; a member is (kind, index into L, H)."""
    groups = []
    for kind, unit in units.items():
        layers, heads = unit.score.shape[:2]  # those that share one score are one group
        n_layers = layers if spec.scope in ("layer", "head") else 1
        n_heads = heads if spec.scope == "head" else 1
        for layer, head in np.ndindex(n_layers, n_heads):
            index = (
                slice(layer, layer + 1) if n_layers > 1 else slice(None),
                slice(head, head + 1) if n_heads > 1 else slice(None),
            )
            groups.append(([(kind, index)], spec.budgets[kind] * stats.pairs(kind) / (n_layers * n_heads)))
    if spec.scope == "global" and groups:
        groups = [([member for members, _ in groups for member in members], sum(target for _, target in groups))]
    return groups


def _by_percentile(stats: AttentionStats, spec: MaskSpec) -> tuple[Cells, Cells]:
    """Prune, in each layer of a kind, the cells up to the authors' percentile."""
    keep, extrapolation = _all_kept(stats)
    for kind, budget in spec.budgets.items():
        mean = stats.mean(kind)
        threshold = criteria.percentile_thresholds(mean, budget)[:, None, None]
        keep[kind] = mean > threshold[..., None]
        extrapolation[kind] = criteria.offset_scores(mean, stats.support[kind]) > threshold
    return keep, extrapolation


def _finish(keep, extrapolation, stats: AttentionStats, kind: AttentionKind, spec: MaskSpec) -> None:
    """Apply to every mask, in place: extrapolation to unobserved cells, always-kept cells, causality."""
    support = stats.support[kind]
    if spec.in_offsets(kind):
        keep[..., (support == 0) | always_kept(stats, kind, spec)] = True
        return
    if spec.extrapolate == "keep" and not spec.of_heads(kind):
        extrapolation[:] = True
    if spec.keep_diagonal is not None and kind is not AttentionKind.CROSS:
        middle = support.shape[0] - 1
        extrapolation[..., max(0, middle - spec.keep_diagonal) : middle + spec.keep_diagonal + 1] = True
    unseen = support == 0
    keep[..., unseen] = extrapolated(extrapolation, len(support), support.shape)[..., unseen]
    keep[..., always_kept(stats, kind, spec)] = True
    if kind.causal:
        keep &= np.tri(*support.shape, dtype=np.bool_)
