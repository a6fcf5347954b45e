"""The prunable units of a kind (cells, blocks, diagonals or heads): scores, weights, what the specification keeps."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ap_fairseq.artifacts import AttentionStats
from ap_fairseq.files import ArtifactError, UserError
from ap_fairseq.pruning import criteria
from ap_fairseq.pruning.select import beyond_best, prune_lowest
from ap_fairseq.pruning.spec import Granularity, MaskSpec, block_shape
from ap_fairseq.relative import anchored, choose_anchors
from ap_fairseq.sites import AttentionKind

TIES = 1e-6  # weight of the draw among equal scores, in key positions: distances from a sloped diagonal differ by more


@dataclass
class Units:
    """The prunable units of one kind.

    Attributes:
        score: float64 (layers, heads, units), with 1 for an axis that shares scores; higher = keep, infinite = always.
        weight: int64, the shape of *score*: observed pairs in the unit, over all heads that share the score, without
            always-kept cells.
        offset_score: float64 (layers or 1, heads or 1, Tq + Tk - 1): the score along each diagonal, +inf where never
            observed.
        cell_unit: int64 (Tq, Tk): the unit of each cell.
        surplus: bool, the shape of *score*: units in heads beyond those that ``max_heads`` leaves them, pruned first.
        offset_surplus: bool, the shape of *offset_score*: offsets likewise.
        anchor: int64 (layers, heads), the offset that each head always keeps; of cross-attention by offset.
    """

    score: np.ndarray
    weight: np.ndarray
    offset_score: np.ndarray
    cell_unit: np.ndarray
    surplus: np.ndarray
    offset_surplus: np.ndarray
    anchor: np.ndarray

    @classmethod
    def from_stats(cls, stats: AttentionStats, kind: AttentionKind, spec: MaskSpec, rows: np.ndarray) -> Units:
        """Score the units of *kind*, in the order in which its options decide: criterion, anchors, heads, minimum.

        Args:
            rows: those of cross-attention by centre (:func:`ap_fairseq.relative.rows_by_centre`), where its units are
                offsets.

        Raises:
            UserError: for options that contradict each other or do not fit the model.
            ArtifactError: for scores that overflow.
        """
        support, heads = stats.support[kind], stats.mass[kind].shape[:2]
        cell_unit = _number_units(support.shape, 1 if spec.in_offsets(kind) else spec.granularity_of(kind))
        prunable = np.where(always_kept(stats, kind, spec), 0, support)
        pairs = criteria.sum_by(cell_unit, prunable)
        score, offset_score = _scores(stats, kind, spec, cell_unit, prunable)
        anchor = np.zeros(heads, dtype=np.int64)
        if spec.in_offsets(kind):
            score = np.broadcast_to(score, (*heads, len(pairs))).copy()
            anchor = _anchors(score * support[0], kind, spec)
            pairs = pairs - _anchored_pairs(anchor, rows, pairs)
            np.put_along_axis(score, anchor[..., None] + score.shape[2] // 2, np.inf, axis=2)
        if count := int(spec.min_heads.get(kind, 0)):
            score, offset_score = (_always_in_best_heads(s, heads, count, kind) for s in (score, offset_score))
        surplus, offset_surplus = (np.zeros(s.shape, dtype=bool) for s in (score, offset_score))
        if kind in spec.max_heads:
            score, offset_score = (np.broadcast_to(s, (*heads, s.shape[2])).copy() for s in (score, offset_score))
            surplus, offset_surplus = (_beyond_cap(s, kind, spec) for s in (score, offset_score))
            offset_surplus &= np.isfinite(offset_score)  # offsets that were never observed are kept
        if spec.min_kept:
            _keep_best_of_each_head(score, surplus, np.broadcast_to(pairs, score.shape), support.sum(), kind, spec)
        sharing = np.prod(heads) // np.prod(score.shape[:2])
        weights = np.broadcast_to(pairs * sharing, score.shape)
        return cls(score, weights, offset_score, cell_unit, surplus, offset_surplus, anchor)


def _scores(
    stats: AttentionStats, kind: AttentionKind, spec: MaskSpec, cell_unit: np.ndarray, prunable: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return the scores of units and of offsets by the criterion, as in :class:`Units`.

    Args:
        prunable: int64 (Tq, Tk), the support without always-kept cells.

    Raises:
        ArtifactError: for scores that are not finite.
    """
    support, heads = stats.support[kind], stats.mass[kind].shape[:2]
    criterion, pairs = criteria.CRITERIA[spec.criterion], criteria.sum_by(cell_unit, prunable)
    if criterion.score is None:
        draw = np.random.default_rng([spec.seed, list(AttentionKind).index(kind)])
        score, offset_score = draw.random((*heads, len(pairs))), draw.random((*heads, sum(support.shape) - 1))
        offset_score[..., criteria.unseen_offsets(support)] = np.inf
    else:
        cells = criterion.score(stats, kind)
        if spec.smooth and not (spec.in_offsets(kind) or spec.of_heads(kind)):  # these are means over many cells
            cells = criteria.smoothed(cells, support, spec.smooth)
        offset_score = criteria.offset_scores(cells, support)
        score = criteria.sum_by(cell_unit, cells * prunable) / np.maximum(pairs, 1)
    if not np.isfinite(score).all():
        raise ArtifactError(f"{kind.value}: scores by --criterion {spec.criterion} overflow; record again")
    if criterion.ties:
        score = score - TIES * np.random.default_rng(spec.seed).random(len(pairs))
    return score, offset_score


def _keep_best_of_each_head(
    score: np.ndarray, surplus: np.ndarray, weight: np.ndarray, pairs: int, kind: AttentionKind, spec: MaskSpec
) -> None:
    """Give each head's best units, ``min_kept`` of its *pairs*, an infinite score, in place.

    Args:
        score, surplus, weight: as in :class:`Units`, the weight of one head.

    Raises:
        UserError: if they are more than ``max_heads`` leaves the head.
    """
    for layer, head in np.ndindex(score.shape[:2]):
        here = layer, head
        ranked = np.where(surplus[here], score[here].min() - 1, score[here])
        (free,), _ = prune_lowest([(ranked, weight[here])], (1 - spec.min_kept) * pairs, at_most=True)
        if (surplus[here] & ~free & (weight[here] > 0)).any():
            raise UserError(
                f"--min-kept {spec.min_kept} is more than --max-heads {kind.value}={spec.max_heads[kind]:g} leaves "
                f"head {head} of layer {layer}; lower --min-kept or raise --max-heads"
            )
        score[layer, head, ~free] = np.inf


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
        raise UserError(f"--min-heads {kind.value}={count}, but it has {heads[0]} layers of {heads[1]} heads; lower it")
    by_head = np.broadcast_to(score, (*heads, score.shape[2])).reshape(-1, score.shape[2]).copy()
    best = np.argpartition(by_head, -count, axis=0)[-count:]
    np.put_along_axis(by_head, best, np.inf, axis=0)
    return by_head.reshape(*heads, -1)


def _anchors(total: np.ndarray, kind: AttentionKind, spec: MaskSpec) -> np.ndarray:
    """Choose the offset that each head always keeps: int64 (layers, heads).

    That is the diagonal, or with ``max_heads`` each head's best offset that not too many heads have: one offset in
    every head would take most of what a high budget leaves.

    Args:
        total: float64 (layers, heads, offsets), score of all pairs of each offset.
    """
    layers, heads, n_offsets = total.shape
    if kind not in spec.max_heads:
        return np.zeros((layers, heads), dtype=np.int64)
    groups = total if spec.max_heads_of == "layer" else total.reshape(1, -1, n_offsets)
    most = _cap(groups.shape[1], kind, spec)
    return np.stack([choose_anchors(group, most) for group in groups]).reshape(layers, heads)


def _anchored_pairs(anchor: np.ndarray, rows: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """Count the prunable *pairs* (offsets,) that anchors keep anyhow: int64 (layers, heads, offsets)."""
    n_offsets = len(pairs)
    counts = np.zeros((*anchor.shape, n_offsets), dtype=np.int64)
    offset = anchored(anchor, rows) + n_offsets // 2
    for head in np.ndindex(anchor.shape):
        np.add.at(counts[head], offset[head].ravel(), rows.ravel())
    return np.minimum(counts, pairs)


def _cap(heads: int, kind: AttentionKind, spec: MaskSpec) -> int:
    """Return how many of *heads* heads may keep a unit: ``max_heads``, or as many as its share of them."""
    most = spec.max_heads[kind]
    return int(most) if most >= 1 else max(1, int(most * heads + 1e-9))


def _beyond_cap(score: np.ndarray, kind: AttentionKind, spec: MaskSpec) -> np.ndarray:
    """Mark, for each unit, the heads beyond the best that ``max_heads`` allows: bool (layers, heads, units).

    Args:
        score: float64 (layers, heads, units).

    Raises:
        UserError: if there are fewer heads.
    """
    layers, heads, units = score.shape
    groups = score if spec.max_heads_of == "layer" else score.reshape(1, -1, units)
    most = spec.max_heads[kind]
    if most > groups.shape[1]:
        of = f"{heads} heads in a layer" if spec.max_heads_of == "layer" else f"{layers} layers of {heads} heads"
        raise UserError(f"--max-heads {kind.value}={most:g}, but it has {of}; lower it, or leave it out")
    count = _cap(groups.shape[1], kind, spec)
    draw = np.random.default_rng([spec.seed, list(AttentionKind).index(kind)])
    return np.stack([beyond_best(group, count, draw) for group in groups]).reshape(score.shape)


def always_kept(stats: AttentionStats, kind: AttentionKind, spec: MaskSpec) -> np.ndarray:
    """The guaranteed cell of each row, unless rows may be empty, and the sets that *spec* names, bool (Tq, Tk)."""
    if spec.in_offsets(kind):
        n_offsets = stats.support[kind].shape[1]
        distance = np.abs(np.arange(n_offsets) - n_offsets // 2)[None]
        return distance <= (-1 if spec.keep_diagonal is None else spec.keep_diagonal)
    cells = criteria.guaranteed(stats.support[kind].shape, kind) & (not spec.empty_rows)
    cells[:, : spec.keep_first] = True
    if spec.keep_diagonal is not None:
        cells |= criteria.near_diagonal(stats, kind, spec.keep_diagonal)
    return cells


def _number_units(shape: tuple[int, int], granularity: Granularity) -> np.ndarray:
    """Return the number of each cell's unit: int64 (Tq, Tk)."""
    if granularity == "head":
        return np.zeros(shape, dtype=np.int64)
    block = block_shape(granularity)
    if block is None:  # diagonals
        return criteria.cell_offset(shape)
    row, column = np.ogrid[: shape[0], : shape[1]]
    per_row = -(-shape[1] // block[1])
    return row // block[0] * per_row + column // block[1]
