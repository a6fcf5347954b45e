"""What a search found, in few arrays: of all hypotheses of a batch at once."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor


@dataclass(eq=False)
class Hypotheses:
    """The hypotheses of B sentences, those of each best first.

    fairseq's are lists of dictionaries of tensors; to make them takes as long as half of the search on a GPU.

    Attributes:
        counts: int64 (B,), hypotheses of each sentence; N of all.
        scores: float32 (N,).
        lengths: int64 (N,), tokens of each hypothesis.
        tokens: int64 (sum of lengths,).
        positional_scores: float32 (sum of lengths,), log-probabilities.
    """

    counts: np.ndarray
    scores: np.ndarray
    lengths: np.ndarray
    tokens: np.ndarray
    positional_scores: np.ndarray

    @classmethod
    def of(cls, found: Hypotheses | list[list[dict[str, Tensor]]], nbest: int, unit: float = 1.0) -> Hypotheses:
        """Return what a search returned, in arrays on the CPU.

        Args:
            found: hypotheses of this kind, which are *nbest* at most already, or fairseq's lists.
            nbest: hypotheses of each sentence at most.
            unit: scores are divided by it, on the device that holds them: a GPU rounds quotients in its own way.
        """
        if isinstance(found, cls):
            return replace(found, scores=found.scores / unit, positional_scores=found.positional_scores / unit)
        printed = [hypotheses[:nbest] for hypotheses in found]
        flat = [hypothesis for hypotheses in printed for hypothesis in hypotheses]
        return cls(
            counts=np.array([*map(len, printed)]),
            scores=torch.stack([hypothesis["score"] for hypothesis in flat]).div(unit).cpu().numpy(),
            lengths=np.array([len(hypothesis["tokens"]) for hypothesis in flat]),
            tokens=torch.cat([hypothesis["tokens"] for hypothesis in flat]).cpu().numpy(),
            positional_scores=torch.cat([h["positional_scores"] for h in flat]).div(unit).cpu().numpy(),
        )

    def best_lengths(self) -> np.ndarray:
        """Return the tokens of each sentence's best hypothesis, int64 (B,)."""
        return self.lengths[self.counts.cumsum() - self.counts]

    def lists(self) -> list[list[dict[str, Tensor]]]:
        """Return them as fairseq does, on the CPU."""
        nothing, sizes = torch.empty(0), self.lengths.tolist()
        parts = (torch.from_numpy(x).split(sizes) for x in (self.tokens, self.positional_scores))
        hypotheses = (
            {"tokens": x, "score": score, "attention": nothing, "alignment": nothing, "positional_scores": positional}
            for x, positional, score in zip(*parts, torch.from_numpy(self.scores), strict=True)
        )
        return [list(itertools.islice(hypotheses, n)) for n in self.counts.tolist()]


def read_out(
    parents: np.ndarray,
    tokens: np.ndarray,
    sums: np.ndarray,
    last: np.ndarray,
    last_step: np.ndarray,
    last_sum: np.ndarray,
    scores: np.ndarray,
    eos: int,
    nbest: int | None = None,
) -> Hypotheses:
    """Return the hypotheses of each sentence, by falling scores, from the back-pointers of a search.

    It takes time by their tokens, not by that of the longest one: few sentences take many steps.

    Args:
        parents: int32 (T, B * beam), which hypothesis of its sentence each one continued in each step.
        tokens: int32, sums: float32, likewise; of log-probabilities up to each step.
        last: int32 (B, beam), the one that each hypothesis ended from.
        last_step: int32 (B, beam), when; negative where there is none.
        last_sum, scores: float32 (B, beam).
        eos: the token of the last step.
        nbest: hypotheses of a sentence at most; None: all.
    """
    missing, (n_sentences, beam) = last_step < 0, last_step.shape
    number = (beam - missing.sum(1)).clip(max=beam if nbest is None else nbest)  # numpy < 2.1 refuses None
    rank = np.lexsort((-scores, missing))  # those that are missing come last
    ranked = (np.arange(n_sentences)[:, None] * beam + rank)[np.arange(beam) < number[:, None]]
    sizes = last_step.ravel()[ranked].astype(np.int64) + 1
    ends = sizes.cumsum()
    begins = ends - sizes
    source, target = _traced(parents, ranked // beam * beam, last.ravel()[ranked], begins, sizes)
    chosen, totals = np.full(ends[-1], eos, dtype=np.int64), np.empty(ends[-1], dtype=np.float32)
    chosen[target] = tokens.ravel()[source]
    totals[target], totals[ends - 1] = sums.ravel()[source], last_sum.ravel()[ranked]
    with np.errstate(invalid="ignore"):  # from one hypothesis to the next
        per_position = np.diff(totals, prepend=np.float32(0))
    per_position[begins] = totals[begins]
    return Hypotheses(number, scores.ravel()[ranked], sizes, chosen, per_position)


def _traced(
    parents: np.ndarray, first: np.ndarray, last: np.ndarray, begins: np.ndarray, sizes: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Find the tokens of N hypotheses but for the last of each, step by step from the end.

    Args:
        parents: as in `read_out`.
        first: int64 (N,), the place of the first hypothesis of each one's sentence.
        last: int32 (N,), the hypothesis of the sentence that each ended from.
        begins, sizes: int64 (N,), where the tokens of each begin in the result, and how many it has.

    Returns:
        Where each token is recorded, counted through (T, B * beam), and where it belongs in the result: int64 each.
    """
    order = np.argsort(-sizes, kind="stable")  # in a step go on those that are longer, which come first
    first, begin = first[order], begins[order]
    place = first + last[order]
    n_steps, n_places = parents.shape
    longer = np.searchsorted(-sizes[order], -1 - np.arange(n_steps))
    source, target = np.empty((2, sizes.sum() - len(sizes)), dtype=np.int64)
    filled = 0
    for step in reversed(range(n_steps)):
        n = longer[step]
        part = slice(filled, filled := filled + n)
        source[part] = place[:n] + step * n_places
        target[part] = begin[:n] + step
        place[:n] = first[:n] + parents[step, place[:n]]
    return source, target
