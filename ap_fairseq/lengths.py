"""Lengths of sentence pairs, and the pairs of positions that exist in them."""

from __future__ import annotations

import numpy as np

from ap_fairseq.sites import AttentionKind


def counted(lengths: np.ndarray) -> np.ndarray:
    """Return int64 (n, 3) of target length, source length and number of sentences with each pair once, in order."""
    pairs, place = np.unique(lengths[:, :2], axis=0, return_inverse=True)
    counts = np.bincount(place.ravel(), weights=lengths[:, 2], minlength=len(pairs))
    return np.column_stack([pairs, counts.astype(np.int64)])


def sentences_by_length(lengths: np.ndarray) -> np.ndarray:
    """Count the sentences of each target length t and source length s, up to the longest: int64, [t, s].

    Args:
        lengths: int64 (n, 3): target length, source length, number of sentences, in tokens.
    """
    target, source, count = lengths.T
    joint = np.zeros((target.max(initial=0) + 1, source.max(initial=0) + 1), dtype=np.int64)
    np.add.at(joint, (target, source), count)
    return joint


def rows_by_source(lengths: np.ndarray) -> np.ndarray:
    """Count the sentences that have a query row i, those of more than i target tokens, by source length s: [i, s]."""
    return sentences_by_length(lengths)[::-1].cumsum(0)[::-1][1:]


def support_of(kind: AttentionKind, lengths: np.ndarray) -> np.ndarray:
    """Count the sentences in which each cell is attendable.

    Args:
        lengths: int64 (n, 3), as for :func:`sentences_by_length`.

    Returns:
        int64 (Tq, Tk) up to the longest sentence: cell (i, j) exists where i < query length, j < key length, and
        j <= i for ``decoder_self``.
    """
    if kind is AttentionKind.CROSS:
        # n(i, j) = number of sentences with target length > i and source length > j: a two-sided suffix sum.
        return rows_by_source(lengths)[:, ::-1].cumsum(1)[:, ::-1][:, 1:].copy()
    marginal = sentences_by_length(lengths).sum(0 if kind is AttentionKind.ENCODER_SELF else 1)
    longer_than = marginal[::-1].cumsum()[::-1][1:]  # [i] = number of sentences longer than i
    positions = np.arange(len(longer_than))
    square = longer_than[np.maximum(positions[:, None], positions[None, :])]
    return np.tril(square) if kind.causal else square
