"""Pruning criteria: scores of cells; the lowest are pruned first.

A score function takes the statistics and a kind and returns finite float64 (layers or 1, heads or 1, Tq, Tk), higher =
keep; an axis of 1 means that all layers or heads share the score. Cells that no recorded sentence reaches may hold any
number.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ap_fairseq.artifacts import AttentionStats
from ap_fairseq.files import ArtifactError
from ap_fairseq.sites import AttentionKind


def mean_attention(stats: AttentionStats, kind: AttentionKind) -> np.ndarray:
    """Mean attention s/n (Rugina et al. 2020, arXiv 2012.02030).

    Each attention row sums to 1 in every sentence, so mean attention is comparable across heads, layers and kinds, and
    pruning by it under a budget on n keeps the most attention mass, within a head as well as over all kinds.
    """
    return stats.mean(kind)


def normalised_attention(stats: AttentionStats, kind: AttentionKind) -> np.ndarray:
    """Mean attention in units of its root mean square over the attendable pairs of the head.

    A head that spreads its attention has low values everywhere and loses against peaked heads under a shared threshold;
    this lets heads compete by the shape of their attention instead.
    """
    mean, support = stats.mean(kind), stats.support[kind]
    mean_square = np.einsum("lhij,lhij,ij->lh", mean, mean, support / support.sum())
    return mean / np.sqrt(np.maximum(mean_square, np.finfo(float).tiny))[..., None, None]


def diagonal_mean_attention(stats: AttentionStats, kind: AttentionKind) -> np.ndarray:
    """Mean attention along the cell's diagonal: one score for all pairs of the same offset j - i.

    The same pattern continues beyond the recorded range; it does not depend on how often a position occurs.
    """
    diagonal = cell_offset(stats.support[kind].shape)
    return mean_along_diagonals(stats.mass[kind], stats.support[kind])[..., diagonal]


def importance(stats: AttentionStats, kind: AttentionKind) -> np.ndarray:
    """Mean squared effect of the cell's removal on the training loss, as ``ap-record --importance`` estimates it.

    See :func:`ap_fairseq.recording.recorder.squared_removal_effect`. The loss is the same for every kind, so a global
    budget prunes where the model needs attention least, not where there is least attention mass.

    Raises:
        ArtifactError: for statistics without importance.
    """
    if kind not in stats.importance:
        raise ArtifactError(
            f"--criterion importance needs the importance of {kind.value} cells, which these statistics lack; "
            "record with ap-record --importance (each file, where several are merged)"
        )
    return stats.importance[kind] / np.maximum(stats.support[kind], 1)


def window(stats: AttentionStats, kind: AttentionKind) -> np.ndarray:
    """Control: minus the distance from the diagonal, the same in every head."""
    return -np.abs(_displacement(stats, kind))[None, None]


def gaussian(stats: AttentionStats, kind: AttentionKind) -> np.ndarray:
    """Control: windows around the centres of hard-coded Gaussian attention (You et al. 2020, arXiv 2005.00742).

    Heads take turns at the centres i - 1, i and i + 1 (i - 1 and i under causality). The log-density of a Gaussian
    falls with the distance from its centre, so a mask of its most probable cells is a window around it.
    """
    displacement = _displacement(stats, kind)
    centres = (-1, 0) if kind.causal else (-1, 0, 1)
    heads = [-np.abs(displacement - centres[head % len(centres)]) for head in range(stats.mass[kind].shape[1])]
    return np.stack(heads)[None]


def fixed_patterns(stats: AttentionStats, kind: AttentionKind) -> np.ndarray:
    """Control: the fixed patterns of Raganato et al. 2020 (arXiv 2002.10260), one to a head in turn.

    Previous, current and next token, the context to the left and to the right (nearer tokens first), and the start of
    the sentence; under causality, only those to the left. Their seventh pattern, the end of the sentence, has no fixed
    position and cannot be part of a global mask.
    """
    displacement = _displacement(stats, kind)
    far = sum(displacement.shape)  # farther than any cell
    left = np.where(displacement <= 0, displacement, -far - displacement)
    right = np.where(displacement >= 0, -displacement, -far + displacement)
    start = np.broadcast_to(-np.arange(displacement.shape[1], dtype=float), displacement.shape)
    previous, current, following = (-np.abs(displacement - centre) for centre in (-1, 0, 1))
    patterns = [previous, current, left, start] if kind.causal else [previous, current, following, left, right, start]
    return np.stack([patterns[head % len(patterns)] for head in range(stats.mass[kind].shape[1])])[None]


@dataclass(frozen=True)
class Criterion:
    """A ranking of cells.

    Attributes:
        score: the score function; None where each unit draws its own.
        smoothable: the score is an estimate from the single cell's recordings, which its neighbours can improve.
        ties: many scores are equal; a seed decides their order.
        relative: also scores the offsets of cross-attention from a scaled diagonal, and whole heads.
    """

    score: Callable[[AttentionStats, AttentionKind], np.ndarray] | None
    smoothable: bool = False
    ties: bool = False
    relative: bool = False


CRITERIA = {
    "mean": Criterion(mean_attention, smoothable=True, relative=True),
    "normalised": Criterion(normalised_attention, smoothable=True, relative=True),
    "diagonal-mean": Criterion(diagonal_mean_attention, relative=True),
    "importance": Criterion(importance, smoothable=True, relative=True),
    "window": Criterion(window, ties=True),
    "gaussian": Criterion(gaussian, ties=True),
    "fixed": Criterion(fixed_patterns, ties=True),
    "random": Criterion(None, relative=True),
    "percentile": Criterion(mean_attention),
}


def percentile_thresholds(mean: np.ndarray, nominal: float | np.ndarray) -> np.ndarray:
    """The authors' thresholds: percentiles of each layer's mean attention over its heads.

    They are taken over the square up to the longest sentence, where cells that cannot exist count as zeros (Rugina et
    al. 2020, arXiv 2012.02030, and its code). Cells up to and including the threshold are pruned.

    Args:
        mean: float64 (layers, heads, Tq, Tk), mean attention.
        nominal: nominal sparsity in [0, 1], a number or (n,).

    Returns:
        float64 (layers,) or (layers, n).
    """
    layers, heads, n_queries, n_keys = mean.shape
    cells = heads * max(n_queries, n_keys) ** 2
    squares = (np.append(layer, np.zeros(cells - layer.size)) for layer in mean)
    return np.stack([np.percentile(square, 100 * np.asarray(nominal)) for square in squares])


# -- geometry ---------------------------------------------------------------------------------------------------------


def cell_offset(shape: tuple[int, int]) -> np.ndarray:
    """Number the diagonals: int64 (Tq, Tk), offset j - i as j - i + Tq - 1."""
    row, column = np.ogrid[: shape[0], : shape[1]]
    return column - row + shape[0] - 1


def sum_by(cell_unit: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Sum the cells (..., Tq, Tk) of each unit: (..., units)."""
    n_units = int(cell_unit.max()) + 1
    if np.array_equal(cell_unit.ravel(), np.arange(cell_unit.size)):  # every cell is a unit
        return values.reshape(*values.shape[:-2], -1)
    heads = values.reshape(-1, cell_unit.size)
    sums = [np.bincount(cell_unit.ravel(), weights=head, minlength=n_units) for head in heads]
    return np.stack(sums).reshape(*values.shape[:-2], n_units)


def mean_along_diagonals(mass: np.ndarray, support: np.ndarray) -> np.ndarray:
    """Sum of *mass* over sum of *support* on each diagonal: (..., Tq, Tk) -> (..., Tq + Tk - 1); 0 where unseen."""
    diagonal = cell_offset(support.shape)
    return sum_by(diagonal, mass) / np.maximum(sum_by(diagonal, support), 1)


def unseen_offsets(support: np.ndarray) -> np.ndarray:
    """Diagonals that no recorded sentence reaches: bool (Tq + Tk - 1,)."""
    return sum_by(cell_offset(support.shape), support) == 0


def offset_scores(cells: np.ndarray, support: np.ndarray) -> np.ndarray:
    """Mean score of the pairs on each diagonal: (..., Tq, Tk) -> (..., Tq + Tk - 1); infinite where unseen."""
    scores = mean_along_diagonals(cells * support, support)
    scores[..., unseen_offsets(support)] = np.inf
    return scores


def sum_of_neighbours(cells: np.ndarray, distance: int) -> np.ndarray:
    """Sum the cells (i + t, j + t), |t| <= *distance*, for each cell (i, j): (..., Tq, Tk) -> the same shape."""
    n_queries, n_keys = cells.shape[-2:]
    distance = min(distance, n_queries - 1, n_keys - 1)
    total = np.empty_like(cells)
    for index in np.ndindex(cells.shape[:-2]):  # one head is small enough for a processor's cache
        # Runs of 1, 2, 4, ... cells, of which those that the window consists of are added up.
        runs, length, start, window = np.pad(cells[index], distance), 1, 0, 2 * distance + 1
        total[index] = 0
        while window:
            if window & 1:
                total[index] += runs[start : start + n_queries, start : start + n_keys]
                start += length
            window >>= 1
            if window:
                runs = runs[:-length, :-length] + runs[length:, length:]
                length *= 2
    return total


def smoothed(score: np.ndarray, support: np.ndarray, distance: int) -> np.ndarray:
    """Mean score of the cells up to *distance* positions away along the diagonal, weighted by support.

    Few sentences reach late positions, and a mean over few sentences is noisy. Attention changes slowly along a
    diagonal, so neighbours there are further observations of the same pattern. A distance beyond the longest sentence
    gives the mean of whole diagonals.

    Args:
        score: float64 (..., Tq, Tk).
        support: int64 (Tq, Tk).
    """
    pairs = sum_of_neighbours(support, distance)
    return sum_of_neighbours(score * support, distance) / np.maximum(pairs, 1)


def slope(stats: AttentionStats, kind: AttentionKind) -> float:
    """Key positions per query position: 1 in self-attention, mean source length / mean target length in cross."""
    if kind is not AttentionKind.CROSS:
        return 1.0
    # Row 0 exists in every sentence, so row 0 sums to all source tokens and column 0 to all target tokens.
    support = stats.support[kind]
    return float(support[0].sum() / support[:, 0].sum())


def _displacement(stats: AttentionStats, kind: AttentionKind) -> np.ndarray:
    """How far to the right of the (sloped) diagonal a cell lies: float64 (Tq, Tk)."""
    n_queries, n_keys = stats.support[kind].shape
    return np.arange(n_keys)[None, :] - slope(stats, kind) * np.arange(n_queries)[:, None]


def guaranteed(shape: tuple[int, int], kind: AttentionKind) -> np.ndarray:
    """The cell of every row that exists in all sentences, bool (Tq, Tk): the diagonal, or column 0 of cross.

    It is kept, so that no row is empty, unless the masks are made with ``--empty-rows``.
    """
    cells = np.zeros(shape, dtype=bool)
    if kind is AttentionKind.CROSS:
        cells[:, 0] = True
    else:
        np.fill_diagonal(cells, True)
    return cells


def near_diagonal(stats: AttentionStats, kind: AttentionKind, distance: float) -> np.ndarray:
    """Cells at most *distance* key positions from the (sloped) diagonal, bool (Tq, Tk)."""
    return np.abs(_displacement(stats, kind)) <= distance
