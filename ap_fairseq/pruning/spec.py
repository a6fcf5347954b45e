"""The specification of masks: how they are derived from statistics."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass

from ap_fairseq.files import UserError
from ap_fairseq.pruning.criteria import CRITERIA
from ap_fairseq.sites import AttentionKind

SCOPES = ("kind", "layer", "head", "global")
EXTRAPOLATIONS = ("diagonal", "keep")
HEAD_GROUPS = ("layer", "kind")

Granularity = int | str  # N for N x N blocks (1: cells), "QxK", or one of NAMED
NAMED = ("diagonal", "scaled-diagonal", "head")


def block_shape(granularity: Granularity) -> tuple[int, int] | None:
    """Return the queries and keys of a block, (1, 1) for cells; None for diagonals and heads.

    Raises:
        UserError: for anything that is no granularity.
    """
    if granularity in NAMED:
        return None
    size = re.fullmatch(r"([1-9][0-9]*)(?:x([1-9][0-9]*))?", str(granularity), re.ASCII)
    if size is None:
        raise UserError(
            f"--granularity {granularity} is not N (N x N blocks, 1 for cells), QxK (Q queries x K keys) or one of "
            f"{', '.join(NAMED)}"
        )
    return int(size[1]), int(size[2] or size[1])


@dataclass(frozen=True)
class MaskSpec:
    """How masks are derived from statistics.

    Attributes:
        budgets: per kind the share of attendable pairs to prune, in [0, 1), or 1 with *empty_rows*; for ``percentile``
            the nominal sparsity. Kinds without an entry are not pruned.
        criterion: what ranks the units. ``mean`` (attention), ``normalised``, ``diagonal-mean``, ``importance``
            (effect on the loss) and the controls ``window``, ``gaussian`` and ``fixed`` are the scores of
            :mod:`ap_fairseq.pruning.criteria`; ``random`` is a seeded draw. ``percentile`` is the authors' own rule:
            per layer over its heads, everything up to a percentile of mean attention is pruned
            (:func:`ap_fairseq.pruning.criteria.percentile_thresholds`).
        scope: what shares one threshold: all sites of a ``kind``, each ``layer`` of a kind, each ``head``, or all kinds
            together (``global``; the budget is then the sum of the kinds' budgets in pairs, and kinds, layers and heads
            that are cheap to prune pay for the others). ``percentile`` has its own scope.
        granularity: N (square blocks, 1 for cells), ``QxK`` (blocks of Q queries x K keys), ``diagonal`` (offsets
            j - i), ``scaled-diagonal`` (in cross-attention offsets from the clamped, scaled diagonal of
            :mod:`ap_fairseq.relative`, in self-attention the same as ``diagonal``) or ``head`` (all cells of a head at
            any length, whatever *extrapolate* and *smooth* say); or one for each kind, where kinds without an entry
            have cells.
        extrapolate: for cells that no recorded sentence reaches, ``diagonal`` compares the head's mean score along
            their diagonal with the same threshold, ``keep`` keeps them.
        min_kept: the share of its attendable pairs, the best of them, that every head keeps at least, in [0, 1].
        min_heads: per kind, the number of heads, over all its layers, that keep each unit at least: those in which its
            score is highest. A pair of positions that no head keeps is lost to the model. Kinds without an entry or a
            budget have no minimum.
        max_heads: per kind, the number of heads that keep each unit at most, those in which its score is highest, so
            that the heads together see more positions; below 1, a share of the heads (at least one). Kinds without an
            entry or a budget have no maximum. Always-kept cells do not count.
        max_heads_of: the heads that *max_heads* counts: those of each ``layer``, or of all layers of the ``kind``.
        keep_diagonal: also keep every cell at most this many key positions from the diagonal (in cross-attention from
            the mean source/target length slope); None for no such set.
        keep_first: also keep this many first columns.
        empty_rows: the cell that would keep a row from being empty (the diagonal of self-attention, column 0 of
            cross-attention) is pruned like any other. A row of which nothing is kept gives 0. Heads of a mask relative
            to the scaled diagonal keep their anchors.
        smooth: score each cell by the mean over the cells up to this many positions away along its diagonal
            (:func:`ap_fairseq.pruning.criteria.smoothed`); without it, late positions, which few sentences reach, are
            ranked by chance.
        calibrate: budgets are shares of the pairs of the validation sentences, not of the recorded ones: masks that
            were derived from training sentences prune more of longer ones.
        seed: for ``random``, and for ties in the controls by distance.

    Cells kept by these sets and minima count against the budget. *keep_diagonal* and *keep_first* keep single cells at
    any granularity. They apply within the recorded range; the diagonal of self-attention is also kept beyond it.

    Raises:
        UserError: for values that are out of range or do not go together, named by the flags of ``ap-masks``.
    """

    budgets: Mapping[AttentionKind, float]
    criterion: str = "mean"
    scope: str = "kind"
    granularity: Granularity | Mapping[AttentionKind, Granularity] = 1
    extrapolate: str = "diagonal"
    min_kept: float = 0.0
    min_heads: Mapping[AttentionKind, float] = dataclasses.field(default_factory=dict)
    max_heads: Mapping[AttentionKind, float] = dataclasses.field(default_factory=dict)
    max_heads_of: str = "layer"
    keep_diagonal: int | None = None
    keep_first: int = 0
    empty_rows: bool = False
    smooth: int = 0
    calibrate: bool = False
    seed: int = 1

    def __post_init__(self):
        for name, value, valid in (
            ("criterion", self.criterion, CRITERIA),
            ("scope", self.scope, SCOPES),
            ("extrapolate", self.extrapolate, EXTRAPOLATIONS),
            ("max-heads-of", self.max_heads_of, HEAD_GROUPS),
        ):
            if value not in valid:
                raise UserError(f"--{name} {value} is not one of {', '.join(map(str, valid))}")
        for kind in AttentionKind:
            block_shape(self.granularity_of(kind))
        self._require_numbers()
        self._require_head_counts()
        if self.in_offsets(AttentionKind.CROSS):
            self._require_offset_options()
        if any(map(self.of_heads, self.budgets)):
            self._require_head_options()
        if self.criterion == "percentile":
            self._require_no_options()

    def _require_numbers(self) -> None:
        for kind, budget in self.budgets.items():
            if not (0 <= budget < 1 or (budget == 1 and self.empty_rows)):
                raise UserError(f"--{kind.flag} {budget} is not a share of pairs in [0, 1), or 1 with --empty-rows")
        if not 0 <= self.min_kept <= 1:
            raise UserError(f"--min-kept {self.min_kept} is not a share of pairs in [0, 1]")
        for name in ("keep_diagonal", "keep_first", "smooth"):
            if (getattr(self, name) or 0) < 0:
                flag = f"--{name.replace('_', '-')}"
                raise UserError(f"{flag} {getattr(self, name)} is not a number of positions")
        if self.smooth and not CRITERIA[self.criterion].smoothable:
            smoothable = ", ".join(name for name, criterion in CRITERIA.items() if criterion.smoothable)
            raise UserError(
                f"--smooth {self.smooth} does not go with --criterion {self.criterion}, only with {smoothable}; leave "
                "it out"
            )
        if self.seed < 0:
            raise UserError(f"--seed {self.seed} is negative; expected 0 or more")

    def _require_head_counts(self) -> None:
        for kind, count in self.min_heads.items():
            if count < 0 or not float(count).is_integer():
                raise UserError(f"--min-heads {kind.value}={count:g} is not a number of heads")
        for kind, most in self.max_heads.items():
            if not (0 < most < 1 or (most >= 1 and float(most).is_integer())):
                raise UserError(f"--max-heads {kind.value}={most:g} is not a number of heads, nor a share of them")
            if self.min_heads.get(kind):
                raise UserError(
                    f"--min-heads {kind.value}={self.min_heads[kind]:g} gathers heads on the same cells, --max-heads "
                    f"{kind.value}={most:g} spreads them; choose one for {kind.value}"
                )

    def _require_relative(self, granularity: str, units: str) -> None:
        if not CRITERIA[self.criterion].relative and self.criterion != "percentile":
            relative = ", ".join(name for name, criterion in CRITERIA.items() if criterion.relative)
            raise UserError(
                f"--criterion {self.criterion} scores cells, --granularity {granularity} decides for {units}; choose "
                f"one of {relative}"
            )

    def _require_offset_options(self) -> None:
        self._require_relative("scaled-diagonal", "offsets in cross-attention")
        if self.keep_first:
            raise UserError(
                f"--keep-first {self.keep_first} keeps columns, which --granularity scaled-diagonal does not know "
                "in cross-attention; leave it out, or choose another granularity for cross"
            )

    def _require_head_options(self) -> None:
        self._require_relative("head", "whole heads")
        if self.empty_rows and self.criterion in ("mean", "diagonal-mean"):
            raise UserError(
                f"--criterion {self.criterion} scores all heads of a kind alike with --granularity head and "
                "--empty-rows, as every row of attention sums to 1; choose importance, normalised or random"
            )
        given = ["--scope head"] if self.scope == "head" else []
        given += [f"--min-kept {self.min_kept}"] if self.min_kept else []
        given += [f"--keep-first {self.keep_first}"] if self.keep_first else []
        given += [f"--keep-diagonal {self.keep_diagonal}"] if self.keep_diagonal is not None else []
        if given:
            raise UserError(
                f"--granularity head keeps or prunes whole heads; leave out {', '.join(given)} (--min-heads keeps a "
                "number of heads)"
            )

    def _require_no_options(self) -> None:
        own = MaskSpec(self.budgets, extrapolate=self.extrapolate, seed=self.seed)
        changed = [
            f"--{field.name.replace('_', '-')}"
            for field in dataclasses.fields(self)
            if field.name != "criterion" and getattr(self, field.name) != getattr(own, field.name)
        ]
        if changed:
            raise UserError(
                f"--criterion percentile decides single cells, per layer over its heads, and has no other "
                f"options; leave out {', '.join(changed)}"
            )

    def in_offsets(self, kind: AttentionKind) -> bool:
        """Whether the masks of *kind* are relative to the scaled diagonal."""
        scaled = self.granularity_of(kind) == "scaled-diagonal"
        return scaled and kind is AttentionKind.CROSS and kind in self.budgets

    def of_heads(self, kind: AttentionKind) -> bool:
        """Whether the heads of *kind* are kept or pruned whole."""
        return self.granularity_of(kind) == "head" and kind in self.budgets

    def granularity_of(self, kind: AttentionKind) -> Granularity:
        """Return the granularity of one kind."""
        return self.granularity.get(kind, 1) if isinstance(self.granularity, Mapping) else self.granularity
