"""What is asked for: how masks are derived from statistics."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

from ap_fairseq.files import UserError
from ap_fairseq.pruning import criteria
from ap_fairseq.sites import AttentionKind

CRITERIA = (*criteria.SCORES, "random", "percentile")
SCOPES = ("kind", "layer", "head", "global")
GRANULARITIES = (1, 16, 32, 64, 128, "diagonal")
EXTRAPOLATIONS = ("diagonal", "keep")

Granularity = int | str


@dataclass(frozen=True)
class MaskSpec:
    """How masks are derived from statistics.

    Attributes:
        budgets: per kind the share of attendable pairs to prune, in [0, 1); for ``percentile`` the nominal
            percentile. Kinds without an entry are kept whole.
        criterion: what ranks the units. ``mean`` (attention), ``normalised``, ``diagonal-mean``, ``importance``
            (effect on the loss) and the controls ``window``, ``gaussian`` and ``fixed`` are the scores of
            :mod:`ap_fairseq.pruning.criteria`; ``random`` is a seeded draw. ``percentile`` prunes, per layer over its
            heads, everything up to a percentile of the mean attention in the square up to the longest sentence,
            non-existing cells counting as zeros (Rugina et al. 2020, arXiv 2012.02030, and its code).
        scope: what shares one threshold: all sites of a ``kind``, each ``layer`` of a kind, each ``head``, or all kinds
            together (``global``; the budget is then the sum of the kinds' budgets in pairs, and kinds, layers and heads
            that are cheap to prune pay for the others). ``percentile`` has its own scope.
        granularity: 1 (cells), 16, 32, 64, 128 (square blocks) or ``diagonal`` (offsets j - i).
        extrapolate: cells that no recorded sentence reaches: ``diagonal`` continues each head's scores along the
            diagonal against the same threshold, ``keep`` keeps them.
        min_kept: the share of its attendable pairs that every head keeps, its best, in [0, 1].
        min_heads: per kind how many heads, over all its layers, keep each unit at least: those in which its score is
            highest. A pair of positions that every head loses is lost to the model. Kinds without an entry or a budget
            have no minimum.
        keep_diagonal: also keep every cell at most this many key positions from the diagonal (in cross-attention from
            the mean source/target length slope); None for no such set.
        keep_first: also keep this many first columns.
        smooth: score each cell by the mean over the cells up to this many positions away along its diagonal
            (:func:`ap_fairseq.pruning.criteria.smoothed`): late positions, which few sentences reach, are else
            ranked by chance.
        seed: for ``random``, and for ties of the controls by distance.

    What these sets and minima keep counts against the budget. *keep_diagonal* and *keep_first* are cells also where the
    granularity is coarser. They hold within the recorded range, and the diagonal of self-attention beyond it.
    """

    budgets: Mapping[AttentionKind, float]
    criterion: str = "mean"
    scope: str = "kind"
    granularity: Granularity = 1
    extrapolate: str = "diagonal"
    min_kept: float = 0.0
    min_heads: Mapping[AttentionKind, int] = dataclasses.field(default_factory=dict)
    keep_diagonal: int | None = None
    keep_first: int = 0
    smooth: int = 0
    seed: int = 1

    def __post_init__(self):
        for name, value, valid in (
            ("criterion", self.criterion, CRITERIA),
            ("scope", self.scope, SCOPES),
            ("granularity", self.granularity, GRANULARITIES),
            ("extrapolate", self.extrapolate, EXTRAPOLATIONS),
        ):
            if value not in valid:
                raise UserError(f"{name} {value!r} is not one of {', '.join(map(str, valid))}")
        for kind, budget in self.budgets.items():
            if not 0 <= budget < 1:
                raise UserError(f"budget for {kind.value} is {budget}, expected 0 <= budget < 1")
        if not 0 <= self.min_kept <= 1:
            raise UserError(f"min_kept is {self.min_kept}, expected a share of pairs in [0, 1]")
        for kind, count in self.min_heads.items():
            if count < 0 or count != int(count):
                raise UserError(f"min_heads for {kind.value} is {count:g}, expected a number of heads")
        if self.keep_first < 0 or (self.keep_diagonal or 0) < 0:
            raise UserError(f"keep_diagonal {self.keep_diagonal} and keep_first {self.keep_first} cannot be negative")
        if self.smooth and (self.smooth < 0 or self.criterion not in criteria.OF_CELLS):
            raise UserError(
                f"smooth is {self.smooth} for the criterion {self.criterion}; expected a number of positions, and one "
                f"of {', '.join(criteria.OF_CELLS)}"
            )
        if self.criterion == "percentile":
            own = MaskSpec(self.budgets, extrapolate=self.extrapolate, seed=self.seed)
            changed = [
                f"{field.name} {getattr(self, field.name)!r}"
                for field in dataclasses.fields(self)
                if field.name != "criterion" and getattr(self, field.name) != getattr(own, field.name)
            ]
            if changed:
                raise UserError(
                    "percentile decides single cells per layer over its heads and keeps nothing else; leave "
                    f"{' and '.join(changed)} at the default"
                )
