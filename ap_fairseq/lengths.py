"""Lengths of sentence pairs, and the pairs of positions that exist in them."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ap_fairseq.sites import AttentionKind


def counted(lengths: np.ndarray) -> np.ndarray:
    """Return int64 (n, 3) of target length, source length and number of sentences with each pair once, in order."""
    pairs, place = np.unique(lengths[:, :2], axis=0, return_inverse=True)
    counts = np.bincount(place.ravel(), weights=lengths[:, 2], minlength=len(pairs))
    return np.column_stack([pairs, counts.astype(np.int64)])


def by_pair(lengths: np.ndarray) -> dict[tuple[int, int], int]:
    """Return int64 (n, 3) of target length, source length and number of sentences as a dictionary."""
    return {(target, source): count for target, source, count in lengths.tolist()}


def support_of(kind: AttentionKind, lengths: Mapping[tuple[int, int], int]) -> np.ndarray:
    """Count the sentences in which each cell is attendable.

    Args:
        lengths: number of sentences for each (target length, source length) in tokens.

    Returns:
        int64 (Tq, Tk) up to the longest sentence: cell (i, j) exists where i < query length, j < key length, and
        j <= i for ``decoder_self``.
    """
    target = max(pair[0] for pair in lengths)
    source = max(pair[1] for pair in lengths)
    joint = np.zeros((target + 1, source + 1), dtype=np.int64)
    for pair, count in lengths.items():
        joint[pair] += count
    if kind is AttentionKind.CROSS:
        # n(i, j) = number of sentences with target length > i and source length > j: a two-sided suffix sum.
        return joint[::-1, ::-1].cumsum(0).cumsum(1)[::-1, ::-1][1:, 1:].copy()
    marginal = joint.sum(0 if kind is AttentionKind.ENCODER_SELF else 1)
    longer_than = marginal[::-1].cumsum()[::-1][1:]  # [i] = number of sentences longer than i
    positions = np.arange(len(longer_than))
    square = longer_than[np.maximum(positions[:, None], positions[None, :])]
    return np.tril(square) if kind.causal else square
