"""Selection of the units that a budget prunes: those of lowest score."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import numpy as np

_SORTED_AT_ONCE = 1 << 20
_BINS = 1 << 16

Rows = list[tuple[np.ndarray, np.ndarray]]  # scores and weights (units,) of each head


def prune_lowest(
    parts: Sequence[tuple[np.ndarray, np.ndarray]], target: float, at_most: bool = False
) -> tuple[list[np.ndarray], float]:
    """Mark units in ascending order of score until their weight comes nearest to *target*, or the last below it.

    Args:
        parts: pairs of scores, float64 (..., units), and weights, numbers of the same shape or (units,). Units of
            weight 0 (never observed, or always kept) and of infinite score are not candidates.
        at_most: never exceed the target.

    Returns:
        bool arrays of the shapes of the scores (True = pruned), and the score up to which units were pruned (-inf for
        none).
    """
    rows = _rows(parts)
    low, high, spent = _critical_range(rows, target)
    undecided = list(_candidates(rows, low, high))
    score, weight = (np.concatenate([part[k] for part in undecided]) for k in (0, 1))
    chosen = _take(score, weight, target - spent, at_most)

    marks, threshold = [], -np.inf
    decided = np.split(chosen, np.cumsum([len(index) for *_, index in undecided])[:-1])
    for (row, row_weight), (*_, index), part in zip(rows, undecided, decided, strict=True):
        mark = (row < low) & (row_weight > 0)
        mark[index] = part
        marks.append(mark)
        threshold = max(threshold, row.max(where=mark, initial=-np.inf))
    remaining = iter(marks)
    shapes = [score.shape for score, _ in parts]
    pruned = [np.stack(list(itertools.islice(remaining, int(np.prod(s[:-1]))))).reshape(s) for s in shapes]
    return pruned, float(threshold)


def beyond_best(score: np.ndarray, most: int, draw: np.random.Generator) -> np.ndarray:
    """Mark the heads of each unit that are not among the *most* in which its score is highest; *draw* decides ties.

    Args:
        score: float64 (heads, units).

    Returns:
        bool (heads, units), True in ``heads - most`` heads of each unit.
    """
    order = np.lexsort((draw.random(score.shape), score), axis=0)
    beyond = np.zeros(score.shape, dtype=bool)
    np.put_along_axis(beyond, order[: len(score) - most], True, axis=0)
    return beyond


def prune_surplus_first(
    parts: Sequence[tuple[np.ndarray, np.ndarray]], surplus: Sequence[np.ndarray], target: float
) -> tuple[list[np.ndarray], float, float]:
    """As :func:`prune_lowest`, but no unit is pruned before all *surplus* units are.

    Args:
        surplus: bool arrays of the shapes of the scores.

    Returns:
        As :func:`prune_lowest`, with two thresholds: of the surplus units (inf where all are pruned), and of others.
    """
    if not any(marks.any() for marks in surplus):
        pruned, threshold = prune_lowest(parts, target)
        return pruned, np.inf, threshold
    if target < weight_of(parts, surplus):
        first = [(np.where(s, score, np.inf), weight) for (score, weight), s in zip(parts, surplus, strict=True)]
        pruned, threshold = prune_lowest(first, target)
        return pruned, threshold, -np.inf
    others = [(np.where(s, np.inf, score), weight) for (score, weight), s in zip(parts, surplus, strict=True)]
    pruned, threshold = prune_lowest(others, target - weight_of(parts, surplus))
    return [part | s for part, s in zip(pruned, surplus, strict=True)], np.inf, threshold


def weight_of(parts: Sequence[tuple[np.ndarray, np.ndarray]], marks: Sequence[np.ndarray]) -> float:
    """Return the weight of the marked units, bool arrays of the shapes of the scores."""
    rows = _rows([(mark, weight) for (_, weight), mark in zip(parts, marks, strict=True)])
    return float(sum(weight[row].sum() for row, weight in rows))


def _rows(parts: Sequence[tuple[np.ndarray, np.ndarray]]) -> Rows:
    """Pair each head's scores (or marks) with its weights; views, as 10^8 units would be copied."""
    spread = [(score, np.broadcast_to(weight, score.shape)) for score, weight in parts]
    return [(score[head], weight[head]) for score, weight in spread for head in np.ndindex(score.shape[:-1])]


def _candidates(rows: Rows, low: float, high: float) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Yield score, weight and index of each row's candidates in [low, high].

    Row by row, because 10^8 units and their indices would take gigabytes.
    """
    for row, weight in rows:
        index = np.flatnonzero((weight > 0) & (row >= low) & (row <= high))
        yield row[index], weight[index], index


def _critical_range(rows: Rows, target: float) -> tuple[float, float, float]:
    """Find the few candidates whose order matters by histograms: sorting 10^8 units takes minutes.

    Returns:
        (low, high, spent): all candidates below low are pruned, none above high, those between are undecided; spent is
        the weight of those below.
    """
    low, high, spent = -np.inf, float(np.finfo(float).max), 0.0
    while True:
        extents = [(len(s), s.min(initial=np.inf), s.max(initial=-np.inf)) for s, *_ in _candidates(rows, low, high)]
        counts, lows, highs = zip(*extents, strict=True)
        count = sum(counts)
        if count:
            low, high = float(min(lows)), float(max(highs))
        if count <= _SORTED_AT_ONCE or low == high:
            return low, high, spent
        histogram = sum(
            np.bincount(_bin(score, low, high), weights=weight, minlength=_BINS + 1)
            for score, weight, _ in _candidates(rows, low, high)
        )
        below = spent + np.cumsum(histogram)
        critical = int(np.searchsorted(below, target, side="right"))
        if critical > _BINS:  # the target exceeds all weight
            return np.inf, -np.inf, float(below[-1])
        spent = float(below[critical - 1]) if critical else spent
        inside = [score[_bin(score, low, high) == critical] for score, *_ in _candidates(rows, low, high)]
        low = float(min(part.min(initial=np.inf) for part in inside))
        high = float(max(part.max(initial=-np.inf) for part in inside))


def _take(score: np.ndarray, weight: np.ndarray, target: float, at_most: bool) -> np.ndarray:
    """Choose units in ascending order of score up to a weight of *target*: bool, the shape of the scores."""
    order = np.argsort(score, kind="stable")
    sums = np.cumsum(weight[order], dtype=np.float64)
    count = int(np.searchsorted(sums, target, side="right"))
    if count < len(order) and not at_most:
        before = sums[count - 1] if count else 0.0
        if sums[count] - target < target - before:
            count += 1
    chosen = np.zeros(len(order), dtype=bool)
    chosen[order[:count]] = True
    return chosen


def _bin(score: np.ndarray, low: float, high: float) -> np.ndarray:
    """Number equal intervals of [low, high]: int64, 0 to _BINS."""
    return ((score - low) / (high - low) * _BINS).astype(np.int64)
