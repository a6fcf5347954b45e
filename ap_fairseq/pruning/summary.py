"""The effect of masks on the recorded data: sparsity and kept mass per kind and layer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ap_fairseq.artifacts import AttentionStats, PruningMasks
from ap_fairseq.lengths import support_of
from ap_fairseq.pruning import criteria
from ap_fairseq.pruning.spec import Granularity, MaskSpec, block_shape
from ap_fairseq.relative import RelativeMask, kept_in_row, offset_support, rows_by_centre
from ap_fairseq.sites import AttentionKind


@dataclass(frozen=True)
class LayerSummary:
    """The effect of a mask on one kind (``layer`` is None) or one layer of it; shares in [0, 1]."""

    kind: str
    layer: int | None
    pairs: int  # attendable pairs of the recorded data, over heads: sum n
    effective: float  # share of attendable pairs removed: sum n (1 - keep) / sum n
    # share of the cells of the square up to the longest sentence not kept, non-existing cells included; masks relative
    # to a diagonal have no such square: their effective sparsity
    nominal: float
    kept_mass: float  # sum s keep / sum s
    mass: float  # attention mass of the recorded data: sum s
    guaranteed_rows: int  # observed rows (over heads) that keep one cell, the guaranteed one, or nothing
    rows: int  # observed rows (over heads)


def summarize(masks: PruningMasks, stats: AttentionStats) -> list[LayerSummary]:
    """Return effective sparsity, nominal sparsity and kept mass per kind and layer; the kind's own row comes first."""
    rows = []
    for kind in stats.kinds:
        if relative := masks.relative_mask(kind):
            layers = _relative_layers(relative, stats)
        else:
            layers = _layers(masks.keep[kind], stats, kind)
        total = {key: sum(layer[key] for layer in layers) for key in layers[0]}
        for layer, part in [(None, total), *enumerate(layers)]:
            rows.append(
                LayerSummary(
                    kind.value,
                    layer,
                    pairs=int(part["pairs"]),
                    effective=float(part["pruned"] / part["pairs"]),
                    nominal=float(part["not_kept"] / part["cells"]),
                    kept_mass=_kept(part["kept"], part["mass"]),
                    mass=float(part["mass"]),
                    guaranteed_rows=int(part["guaranteed"]),
                    rows=int(part["rows"]),
                )
            )
    return rows


def _layers(keep: np.ndarray, stats: AttentionStats, kind: AttentionKind) -> list[dict[str, float]]:
    """Return the counts of each layer that a summary is made of."""
    mass, support = stats.mass[kind], stats.support[kind]
    observed = support > 0
    longest = max(support.shape)
    return [
        dict(
            pruned=np.sum(support * (keep.shape[1] - keep[layer].sum(0, dtype=np.int64))),
            pairs=support.sum() * keep.shape[1],
            not_kept=keep.shape[1] * longest**2 - keep[layer].sum(),
            cells=keep.shape[1] * longest**2,
            kept=np.sum(mass[layer], where=keep[layer]),
            mass=mass[layer].sum(),
            # A row of one cell keeps one without any pruning: it counts if it keeps none.
            guaranteed=np.sum((keep[layer] & observed).sum(-1) < np.minimum(observed.sum(-1), 2)),
            rows=keep.shape[1] * int(observed.any(-1).sum()),
        )
        for layer in range(keep.shape[0])
    ]


def _relative_layers(masks: RelativeMask, stats: AttentionStats) -> list[dict[str, float]]:
    """As :func:`_layers`, for masks relative to the scaled diagonal; rows are those of all sentences.

    Kept mass leaves out that of anchors which the source's ends moved: it was recorded by offset.
    """
    offsets, rows = stats.in_offsets(), stats.rows_by_centre()
    support = offsets.support[AttentionKind.CROSS][0]
    keep = masks.grown(len(support))
    layers = _layers(keep[:, :, None], offsets, AttentionKind.CROSS)
    alone = kept_in_row(keep, rows) + masks.moved(rows) == 1
    lone = rows * (np.arange(len(rows)) > 1)[:, None] * alone  # of sources of several tokens
    kept = masks.kept_pairs(rows).sum(1)
    for layer, counts in enumerate(layers):
        counts["pruned"] = counts["pairs"] - kept[layer]
        counts |= {"not_kept": counts["pruned"], "cells": counts["pairs"]}
        counts |= {"guaranteed": lone[layer].sum(), "rows": rows.sum() * keep.shape[1]}
    return layers


def sparsity_on(masks: PruningMasks, lengths: np.ndarray) -> dict[str, float]:
    """Return the effective sparsity of each kind, and of all as ``total``, on sentences of other lengths.

    Args:
        lengths: int64 (n, 3): target length, source length, number of sentences.
    """
    shares, pruned_pairs, all_pairs = {}, 0, 0
    for kind in masks.kinds:
        if relative := masks.relative_mask(kind):
            rows = rows_by_centre(lengths, relative.slope)
            pairs = int(offset_support(rows).sum()) * int(np.prod(relative.anchor.shape))
            pruned = pairs - int(relative.kept_pairs(rows).sum())
        else:
            support = support_of(kind, lengths)
            keep = masks.grown(kind, support.shape)
            heads = int(np.prod(keep.shape[:2]))
            pairs = int(support.sum()) * heads
            pruned = int((support * (heads - keep.sum((0, 1), dtype=np.int64))).sum())
        shares[kind.value] = pruned / pairs
        pruned_pairs, all_pairs = pruned_pairs + pruned, all_pairs + pairs
    return {**shares, "total": pruned_pairs / all_pairs}


def pairs_on(architecture: Mapping[str, Sequence[int]], lengths: np.ndarray) -> dict[str, int]:
    """Count the pairs of each kind in sentences of *lengths*, int64 (n, 3), over layers and heads."""
    counts = {kind: int(support_of(AttentionKind(kind), lengths).sum()) for kind in architecture}
    return {kind: count * int(np.prod(architecture[kind])) for kind, count in counts.items()}


def pairs_beyond(stats: AttentionStats) -> dict[str, float]:
    """Return the share of the pairs of validation sentences, for each kind, that lie beyond the recorded positions."""
    shares = {}
    for kind in stats.kinds:
        support = support_of(kind, stats.validation_lengths)
        n_queries, n_keys = stats.support[kind].shape
        shares[kind.value] = 1 - float(support[:n_queries, :n_keys].sum() / support.sum())
    return shares


def of_kinds(summary: Iterable[LayerSummary]) -> list[LayerSummary]:
    """Return the rows of a summary that are of whole kinds, over all layers."""
    return [row for row in summary if row.layer is None]


def total_of(kinds: Sequence[LayerSummary]) -> dict[str, float]:
    """Return effective sparsity and kept mass over all pairs of several rows of a summary."""
    pairs, mass = sum(row.pairs for row in kinds), sum(row.mass for row in kinds)
    return {
        "effective": sum(row.effective * row.pairs for row in kinds) / pairs,
        "kept_mass": _kept(sum(row.kept_mass * row.mass for row in kinds), mass),
    }


def _kept(kept: float, mass: float) -> float:
    """Return the share of *mass* that is kept; 1 where there is none to lose, as of a model that is pruned already."""
    return float(kept / mass) if mass else 1.0


def vanished_heads(masks: PruningMasks, stats: AttentionStats) -> dict[str, list[list[int]]]:
    """Return ``{kind: [[layer, head], ...]}`` of the heads that keep no observed cell but the guaranteed ones.

    Of masks that may have empty rows, which guarantee none, the heads that keep nothing.
    """
    vanished = {}
    for kind in stats.kinds:
        support, keep = stats.support[kind], masks.keep[kind]
        others = support > 0
        if masks.guarantees(kind):
            others &= ~criteria.guaranteed(support.shape, kind)
        if relative := masks.relative_mask(kind):
            offsets = offset_support(stats.rows_by_centre()) > 0
            place = np.arange(len(offsets)) - len(offsets) // 2
            others = (offsets & (place != relative.anchor[..., None]))[:, :, None]
            keep = relative.grown(len(offsets))[:, :, None]
        empty = ~(keep & others).any((-2, -1)) & others.any()
        if empty.any():
            vanished[kind.value] = np.argwhere(empty).tolist()
    return vanished


def describe_vanished(masks: PruningMasks, kind: AttentionKind, heads: Sequence[Sequence[int]]) -> str:
    """Say which *heads* of :func:`vanished_heads` keep nothing, or nothing but guaranteed cells."""
    but = " but the guaranteed cells (one in each row)" if masks.guarantees(kind) else ""
    total = masks.keep[kind][:, :, 0, 0].size
    if len(heads) == total:
        remedy = "--min-kept SHARE leaves each that share of its pairs, --min-heads N leaves each pair to N heads"
        return f"nothing{but} is kept by any head of {kind.value}; {remedy}"
    listed = ", ".join(f"{layer}.{head}" for layer, head in heads)
    return f"nothing{but} is kept by {len(heads)} of {total} heads of {kind.value} (layer.head): {listed}"


def missed_budgets(
    summary: Iterable[LayerSummary], spec: MaskSpec, validation: Mapping[str, tuple[float, int, float]] | None = None
) -> list[str]:
    """Explain, in one sentence each, effective sparsities more than one percentage point off their budget.

    Args:
        validation: sparsity and pairs of each kind that count in place of the recorded ones, for calibrated budgets,
            and the share of these pairs beyond the recorded positions.
    """
    if spec.criterion == "percentile":
        return []  # its budgets are nominal
    found = validation or {row.kind: (row.effective, row.pairs, 0.0) for row in of_kinds(summary)}
    checks = [(kind.value, found[kind][0], budget, found[kind][2]) for kind, budget in spec.budgets.items()]
    if spec.scope == "global" and checks:
        weights = [found[name][1] for name, *_ in checks]
        shares = (np.average(share, weights=weights) for share in list(zip(*checks, strict=True))[1:])
        checks = [("all kinds together", *shares)]
    kinds = {kind.value: [kind] for kind in spec.budgets}
    return [
        f"{name}: effective sparsity {reached:.1%} instead of {target:.1%}: "
        + (
            f"{beyond:.0%} of the pairs of validation sentences lie beyond the recorded positions, where masks "
            "continue diagonals or keep all; record longer sentences (--max-positions, --sample)"
            if beyond >= abs(reached - target)  # that much they can explain
            else _coarseness(spec, kinds.get(name, spec.budgets))
        )
        for name, reached, target, beyond in checks
        if abs(reached - target) > 0.01
    ]


def _coarseness(spec: MaskSpec, kinds: Iterable[AttentionKind]) -> str:
    """Say why a threshold cannot meet every budget of these kinds."""
    granularities = {spec.granularity_of(kind) for kind in kinds}
    if granularities == {"head"}:
        reason = "a budget is met to the nearest head"
        if not spec.empty_rows:
            reason += ", and pruned heads keep the guaranteed cells; --empty-rows prunes those too"
    elif granularities != {1}:
        units = " or ".join(map(_plural, sorted(granularities - {1}, key=str)))
        reason = f"the recorded pairs fall into few {units}, and a unit is pruned whole; use a finer --granularity"
    elif spec.empty_rows:
        reason = "a cell is pruned in every sentence that has it, and the first cells are in all"
    else:
        reason = "every row keeps one guaranteed cell, and rows of short sentences have few others"
    if spec.min_kept or spec.min_heads or spec.keep_first or spec.keep_diagonal is not None:
        reason += "; cells kept by --min-kept, --min-heads, --keep-first and --keep-diagonal are not pruned either"
    return reason


def _plural(granularity: Granularity) -> str:
    if size := block_shape(granularity):
        return f"{size[0]}x{size[1]} blocks"
    return "whole heads" if granularity == "head" else "diagonals"
