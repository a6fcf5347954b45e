"""The systems of a sweep: entries of its YAML file, one system for each combination of their values."""

from __future__ import annotations

import dataclasses
import itertools
import shlex
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from ap_fairseq.files import ArtifactError
from ap_fairseq.pruning.criteria import CRITERIA
from ap_fairseq.sites import AttentionKind

SCHEDULES = ("untuned", "one-shot", "gradual", "scratch", "while-training")


@dataclass(frozen=True)
class System:
    """One entry of the table, with one seed; `sweep.py --help` describes its fields."""

    criterion: str
    kinds: str = "global"
    sparsity: float = 0.0
    granularity: int | str = 1
    options: str = ""
    threshold: float = 0.0
    log_bits: int = 0
    schedule: str = "untuned"
    rounds: int = 3
    start: float = 0.0
    seed: int = 1
    updates: int | None = None
    flags: str = ""

    def __post_init__(self):
        for name, value, valid in (
            ("criterion", self.criterion, ("dense", *CRITERIA, "top-k", "threshold")),
            ("schedule", self.schedule, SCHEDULES),
        ):
            if value not in valid:
                raise ArtifactError(f"{name} {value!r} of a system is not one of {', '.join(valid)}")
        if self.criterion in ("top-k", "threshold") and self.schedule != "untuned":
            raise ArtifactError(
                f"{self.criterion} prunes at inference time; its schedule is untuned, not {self.schedule}"
            )
        if self.criterion == "threshold" and not self.threshold:
            raise ArtifactError("a system of criterion threshold needs a threshold, e.g. threshold: 0.01")
        if self.start and self.schedule != "gradual":
            raise ArtifactError(f"start {self.start} is for systems of schedule gradual, not {self.schedule}")
        if self.flags and self.schedule == "untuned":
            raise ArtifactError(
                f"flags {self.flags!r} are for fairseq-train, and a system of schedule untuned has none"
            )
        if self.schedule == "while-training" and self.criterion in ("dense", "percentile"):
            raise ArtifactError(f"criterion {self.criterion} is not for systems of schedule while-training")
        self.budget_kinds()  # reports unknown kinds
        if self.kinds == "own" and (self.sparsity or not self.has_masks or not self.budget_kinds()):
            raise ArtifactError(
                "a system of kinds own names its budgets in options (--encoder-self 0.95 --cross 0.7), and no sparsity"
            )

    def budget_kinds(self) -> list[AttentionKind]:
        """The kinds that the sparsity is for."""
        if self.kinds in ("global", "per-kind"):
            return list(AttentionKind)
        if self.kinds == "own":
            return [kind for kind in AttentionKind if f"--{kind.flag}" in shlex.split(self.options)]
        names = self.kinds.split("+")
        if not set(names) <= set(AttentionKind):
            names = "+".join(AttentionKind)
            raise ArtifactError(f"kinds {self.kinds!r} is not global, per-kind, own, or some of {names}")
        return [AttentionKind(name) for name in names]

    def mask_flags(self) -> list[str]:
        """Flags of ap-masks; for systems without masks those of masks that keep every pair."""
        if not self.has_masks:
            return ["--total", "0"]
        if self.kinds == "own":
            budgets = []
        elif self.kinds == "global" and self.criterion != "percentile":
            budgets = ["--total", str(self.sparsity)]
        else:
            budgets = [word for kind in self.budget_kinds() for word in (f"--{kind.flag}", str(self.sparsity))]
        options = ["--criterion", self.criterion, "--granularity", str(self.granularity), "--seed", str(self.seed)]
        return budgets + options + shlex.split(self.options)

    @property
    def has_masks(self) -> bool:
        """Whether masks prune anything."""
        return self.criterion not in ("dense", "top-k", "threshold")

    @property
    def has_dense_model(self) -> bool:
        """Whether it is made from a dense model, or from masks of one."""
        return not (self.schedule == "while-training" or (self.criterion == "dense" and self.schedule == "scratch"))

    @property
    def group(self) -> str:
        """What the table calls it: everything but the seed."""
        parts = [self.criterion]
        if self.criterion == "threshold":
            parts.append(f"{self.threshold:g}" + (f".{self.log_bits}bit" if self.log_bits else ""))
        elif self.criterion != "dense":
            parts += [self.kinds] if self.kinds == "own" else [self.kinds, f"{100 * self.sparsity:g}"]
            parts += [f"g{self.granularity}"] if self.criterion != "top-k" else []
        if self.options:
            parts.append(self.options.replace("--", "").replace(" ", "-"))
        parts += [f"from-{100 * self.start:g}"] if self.start else []
        parts += [self.schedule] + ([f"r{self.rounds}"] if self.schedule == "gradual" else [])
        parts += [self.flags.replace("--", "").replace(" ", "-").replace("/", "_")] if self.flags else []
        return ".".join(parts + ([f"u{self.updates}"] if self.updates else []))

    @property
    def name(self) -> str:
        return f"{self.group}.s{self.seed}"

    @property
    def started_from(self) -> System:
        """The system from scratch that `start` names."""
        return dataclasses.replace(self, sparsity=self.start, start=0.0, schedule="scratch", updates=None)

    @property
    def masks_name(self) -> str:
        untrained = dataclasses.replace(self, schedule="untuned", updates=None, flags="")
        return untrained.name if self.has_masks else "all-ones"


def expand(entries: Iterable[dict[str, Any]]) -> list[System]:
    """Return one system for each combination of the listed values.

    Raises:
        ArtifactError: for unknown keys or values, or two systems of one name.
    """
    known = {field.name for field in dataclasses.fields(System)}
    systems = []
    for entry in entries:
        if entry.keys() - known or "criterion" not in entry:
            raise ArtifactError(f"system {entry} needs a criterion, and only the keys {', '.join(sorted(known))}")
        values = [value if isinstance(value, list) else [value] for value in entry.values()]
        systems += [System(**dict(zip(entry, combination, strict=True))) for combination in itertools.product(*values)]
    names = [system.name for system in systems]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ArtifactError(f"systems named twice: {', '.join(twice)}")
    return systems
