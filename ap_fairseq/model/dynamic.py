"""Inference-time pruning from the literature, for comparison with global masks: decided per sentence.

These methods look at all scores before they discard some, so they say what quality a sparsity can have, not how fast it
can be. They run without the kernels, on top of the masks, and are options of the model: of ``fairseq-generate
--model-overrides`` as of training.
"""

from __future__ import annotations

import argparse
from collections.abc import Collection
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from ap_fairseq.files import UserError
from ap_fairseq.sites import AttentionKind, per_kind


@dataclass
class DynamicPruning:
    """What one attention module discards at inference time.

    Attributes:
        top_k: every query attends to its k highest scores only (Gupta et al. 2021, arXiv 2106.06899, section 3; softmax
            over those k). 0 for all.
        threshold: attention probabilities below it become 0, and the others stay as they are, not renormalised (Ji et
            al. 2021, arXiv 2106.01335). 0 for none.
        log_bits: the probabilities that remain are rounded to 2^log_bits - 1 values, equally spaced on a log scale from
            *threshold* to 1; with 0 that makes 2^log_bits values (Ji et al. 2021; 3 bits there). 0 for no rounding.
        pairs, kept: how many query-key pairs were seen and attended to so far.
    """

    top_k: int = 0
    threshold: float = 0.0
    log_bits: int = 0
    pairs: int | Tensor = field(default=0, repr=False)
    kept: int | Tensor = field(default=0, repr=False)

    def __post_init__(self):
        if self.top_k < 0 or not float(self.top_k).is_integer():
            raise UserError(f"--attention-top-k is {self.top_k}, expected a number of keys, or 0 for all")
        self.top_k = int(self.top_k)
        if not 0 <= self.threshold < 1:
            raise UserError(f"--attention-threshold is {self.threshold}, expected a probability in [0, 1)")
        if self.log_bits and (not self.threshold or not 2 <= self.log_bits <= 8):
            raise UserError(
                f"--attention-log-bits is {self.log_bits} with --attention-threshold {self.threshold}: the scale "
                "reaches from the threshold to 1 in 2 to 8 bits, so set both"
            )

    @classmethod
    def from_options(
        cls, kind: AttentionKind, top_k: str | None, threshold: str | None, log_bits: int
    ) -> DynamicPruning | None:
        """Read the model's options for one kind; None if they discard nothing there."""
        k, probability = per_kind("--attention-top-k", top_k), per_kind("--attention-threshold", threshold)
        options = cls(k.get(kind, 0), probability.get(kind, 0.0), log_bits if probability.get(kind) else 0)
        if log_bits and not probability:
            cls(log_bits=log_bits)  # raises the error for rounding without a threshold
        return options if options.top_k or options.threshold else None

    def probabilities(self, scores: Tensor) -> Tensor:
        """Return attention probabilities for *scores* (B, H, Tq, Tk), -inf where masked."""
        visible = scores != float("-inf")
        if self.top_k and self.top_k < scores.size(-1):
            best = torch.zeros_like(visible).scatter_(-1, scores.topk(self.top_k, dim=-1).indices, True)
            scores = scores.masked_fill(~best, float("-inf"))
        weights = torch.softmax(scores, dim=-1)
        if self.threshold:
            weights = torch.where(weights >= self.threshold, weights, 0.0)
        attended = (scores != float("-inf")) & (weights >= self.threshold)
        if self.log_bits:
            weights = torch.where(weights > 0, round_on_log_scale(weights, self.threshold, self.log_bits), 0.0)
        self.pairs, self.kept = self.pairs + visible.sum(), self.kept + attended.sum()
        return weights


def require_kinds(options: argparse.Namespace, kinds: Collection[str]) -> None:
    """Raise UserError for options that name other kinds of attention than *kinds*, those that the model has."""
    for name in ("attention_top_k", "attention_threshold"):
        flag, text = f"--{name.replace('_', '-')}", getattr(options, name)
        named = per_kind(flag, text) if "=" in str(text) else {}
        if others := [kind for kind in named if kind not in kinds]:
            raise UserError(
                f"{flag} {text}: the model has no {' and no '.join(others)} attention; leave that out (it has "
                f"{', '.join(kinds)})"
            )


def round_on_log_scale(weights: Tensor, least: float, bits: int) -> Tensor:
    """Round to the nearest, in logarithms, of 2^bits - 1 values from *least* to 1; zeros become *least*."""
    step = -np.log(least) / (2**bits - 2)
    return torch.exp(-step * torch.round(torch.log(weights.clamp(least, 1)) / -step))


def top_k_for(support: np.ndarray, budget: float) -> tuple[int, float]:
    """Return the smallest k whose effective sparsity does not exceed *budget*, and that sparsity.

    Args:
        support: int64 (Tq, Tk). A query that attends to its k best keys attends to as many pairs as one that attends
            to the first k, so k keeps the pairs of k columns.
        budget: share of pairs to prune, in [0, 1).
    """
    pruned = 1 - support.sum(0).cumsum() / support.sum()
    k = int(np.argmax(pruned <= budget + 1e-12))
    return k + 1, float(pruned[k])
