"""Which units a budget prunes: those of lowest score."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

_SORTED_AT_ONCE = 1 << 20
_BINS = 1 << 16


def prune_lowest(parts: Sequence[tuple[np.ndarray, np.ndarray]], target: float, at_most: bool = False):
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
