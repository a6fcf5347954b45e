"""Lengths of the samples of data sets, and samples that keep their distribution."""

from __future__ import annotations

import numpy as np
from fairseq.data import FairseqDataset, LanguagePairDataset
from fairseq.tasks import FairseqTask
from fairseq.tasks.translation import TranslationTask

from ap_fairseq.lengths import counted
from ap_fairseq.relative import slope_of


def longest_sides(dataset: FairseqDataset) -> tuple[int, int]:
    """Return the most tokens that a (source, target) of a data set has; they are the same where there is one text."""
    if isinstance(dataset, LanguagePairDataset):
        return int(dataset.src_sizes.max()), int(dataset.tgt_sizes.max())
    longest = int(np.max(dataset.sizes)) + 1  # --add-bos-token is not counted
    return longest, longest


def diagonal_slope(dataset: FairseqDataset) -> int | None:
    """Return the slope of the diagonal of cross-attention in a data set of sentence pairs, None for others."""
    if not isinstance(dataset, LanguagePairDataset):
        return None
    return slope_of(int(dataset.src_sizes.sum()), int(dataset.tgt_sizes.sum()))


def validation_lengths(task: FairseqTask) -> np.ndarray | None:
    """Return the lengths of the validation sentences of a translation task, int64 (n, 3); None where there are none.

    They are those of the subset ``valid``, which is loaded unless it is there already; its sentences are not read.
    """
    if not isinstance(task, TranslationTask):
        return None
    if "valid" not in task.datasets:
        try:
            task.load_dataset("valid")
        except FileNotFoundError:
            return None
    dataset = task.dataset("valid")
    if dataset.tgt_sizes is None or not len(dataset):
        return None
    return counted(np.column_stack([dataset.tgt_sizes, dataset.src_sizes, np.ones(len(dataset), dtype=np.int64)]))


def lengths_of(dataset: FairseqDataset, indices: np.ndarray) -> np.ndarray:
    """Return the tokens of samples as batches count them, int64 (n,)."""
    try:
        return dataset.num_tokens_vec(indices)
    except NotImplementedError:  # not all data sets have it
        return np.array([dataset.num_tokens(index) for index in indices])


def sample_by_length(indices: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Draw *count* sentences whose lengths are distributed as in the whole data set.

    The indices are split into *count* runs of (nearly) equal size, and one sentence is drawn from each.

    Args:
        indices: int64 (n,) of sentences in the order of their length.

    Returns:
        int64 (min(count, n),) in the same order.
    """
    if count >= len(indices):
        return indices
    edges = np.linspace(0, len(indices), count + 1).astype(np.int64)
    return indices[np.random.default_rng(seed).integers(edges[:-1], edges[1:])]
