"""Everything a report says, computed once from its inputs."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

import numpy as np

from ap_fairseq.artifacts import AttentionStats, PruningMasks
from ap_fairseq.provenance import mask_spec, versions
from ap_fairseq.pruning.summary import LayerSummary, describe_vanished, of_kinds, summarize, total_of, vanished_heads
from ap_fairseq.report import analysis, benchmarks, heat_maps, plots, statements, tables
from ap_fairseq.report.figure import Figure
from ap_fairseq.report.systems import System
from ap_fairseq.sites import AttentionKind

FORMAT = "ap-report-1"
NOMINAL = np.linspace(0, 0.99, 100)
# Cells of all heads and kinds together; larger recordings are binned. Three kinds of 6 x 8 heads x 256 x 256 fit.
MOST_CELLS = 3 * 6 * 8 * 256**2


class Report:
    """The content of a report.

    Args:
        stats: what a model did.
        masks: by name; made from *stats*.
        systems: scores, or none.
        benchmark: kernel measurements, or None.
        files: what to say about the inputs, e.g. {"stats.safetensors": sha256}.

    Raises:
        ArtifactError: if the statistics are empty or damaged, or masks belong to others.
    """

    def __init__(
        self,
        stats: AttentionStats,
        masks: Mapping[str, PruningMasks],
        systems: list[System],
        benchmark: Mapping[str, Any] | None = None,
        files: Mapping[str, str] | None = None,
    ):
        stats.require_pairs()
        for name, one in masks.items():
            analysis.check_masks(one, stats, name)
        self.stats, self.masks, self.systems, self.benchmark = stats, dict(masks), systems, benchmark
        self.files = dict(files or {})
        self.concentration = {kind: analysis.concentration(stats, kind) for kind in stats.kinds}
        # A model that is pruned already may have lost all attention of a kind, about which there is nothing to say.
        self.attended = {kind: c for kind, c in self.concentration.items() if c.attending.any()}
        self.kept = {kind: analysis.kept_mass(stats, kind) for kind in stats.kinds}
        self.nominal = {kind: analysis.effective_at_nominal(stats, kind, NOMINAL) for kind in stats.kinds}
        self.summaries: dict[str, list[LayerSummary]] = {name: summarize(one, stats) for name, one in masks.items()}

    @property
    def title(self) -> str:
        """The title of the page, with the languages where they are known."""
        languages = [language for language in self.stats.metadata.get("languages", []) if language]
        return "Attention report" + (f": {' to '.join(languages)}" if languages else "")

    @property
    def lead(self) -> str:
        """One sentence about the recording."""
        shapes: dict[str, list[str]] = {}
        for kind in self.stats.kinds:
            layers, heads, queries, keys = self.stats.mass[kind].shape
            shape = f"{layers} layers × {heads} heads, {queries} × {keys} positions"
            shapes.setdefault(shape, []).append(kind.value)
        listed = "; ".join(f"{', '.join(kinds)}: {shape}" for shape, kinds in shapes.items())
        what = "sentence pairs" if AttentionKind.CROSS in self.stats.mass else "sentences or blocks of text"
        return f"Recorded on {analysis.sentences(self.stats):,} {what}. {listed}."

    @cached_property
    def maps(self) -> dict[AttentionKind, analysis.Maps]:
        """Mean attention and support, binned where the recording is larger than the page can hold."""
        factor = analysis.bin_factor((mass.shape for mass in self.stats.mass.values()), MOST_CELLS)
        return {kind: analysis.maps(self.stats, kind, factor) for kind in self.stats.kinds}

    @cached_property
    def colour_scale(self) -> tuple[float, float]:
        """The (low, high) mean attention of the one colour scale of all heat maps."""
        return heat_maps.log_scale(list(self.maps.values()))

    @property
    def overview(self) -> dict[AttentionKind, str]:
        """One sentence about each kind, under the first masks if there are any."""
        name = next(iter(self.masks), None)
        found = statements.overview(self.attended, self.kept, name, self.summaries.get(name, []))
        return {kind: found.get(kind, statements.NO_ATTENTION) for kind in self.stats.kinds}

    @cached_property
    def differences(self) -> dict[str, str]:
        """How the kinds differ, in words; see :mod:`ap_fairseq.report.statements`."""
        half = {kind: float(np.interp(0.5, NOMINAL, self.nominal[kind])) for kind in self.attended}
        kept = {kind: self.kept[kind] for kind in self.attended}
        return statements.differences(self.attended, kept, half, self.systems)

    @cached_property
    def vanished(self) -> list[str]:
        """One sentence for each mask and kind with heads that keep nothing, or nothing but guaranteed cells."""
        return [
            f"Under masks “{name}”, {describe_vanished(masks, AttentionKind(kind), heads)}."
            for name, masks in self.masks.items()
            for kind, heads in vanished_heads(masks, self.stats).items()
        ]

    @property
    def digest(self) -> list[str]:
        """The report in about ten lines, for terminals."""
        lines = [self.lead, *(f"{kind.value}: {text}" for kind, text in self.overview.items())]
        for name, summary in self.summaries.items():
            total = total_of(of_kinds(summary))
            lines.append("{}: effective sparsity {effective:.1%}, kept mass {kept_mass:.1%}".format(name, **total))
        if self.systems:
            by_bleu = sorted(self.systems, key=lambda system: system.scores["BLEU"])
            low, high = (f"{system.scores['BLEU']:.2f} ({system.name})" for system in (by_bleu[0], by_bleu[-1]))
            several = f"{len(by_bleu)} systems: BLEU {low} to {high}"
            lines.append(several if len(by_bleu) > 1 else f"1 system: BLEU {low}")
        return lines

    @property
    def provenance(self) -> dict[str, Any]:
        """What the inputs were made from, and the versions of this program and of others."""
        specs = {name: masks.metadata.get("spec") for name, masks in self.masks.items()}
        benchmark = {key: value for key, value in (self.benchmark or {}).items() if key != "rows"}
        return {
            "files": self.files,
            "recording": self.stats.metadata,
            "specs": specs,
            "benchmark": benchmark,
            "versions": versions(),
        }

    @property
    def masks_table(self) -> tables.Table:
        """The effect of each of the masks."""
        specs = {name: mask_spec(masks.metadata) for name, masks in self.masks.items()}
        return tables.masks_table(
            self.summaries, [name for name, spec in specs.items() if spec.get("criterion") == "percentile"]
        )

    @property
    def tables(self) -> list[tables.Table]:
        """All tables for which there are data."""
        found = [tables.kinds_table(self.attended, self.kept)]
        found += [self.masks_table] if self.masks else []
        return found + ([tables.systems_table(self.systems)] if self.systems else [])

    def overview_figures(self) -> list[Figure]:
        """Draw the mean attention of each kind and what the first masks keep of it."""
        name = next(iter(self.masks), None)
        means = {kind: heat_maps.head_average(self.stats, kind) for kind in self.stats.kinds}
        scale = heat_maps.log_scale(list(means.values()))
        return [
            heat_maps.overview(self.stats, kind, means[kind], scale, self.masks.get(name), text)
            for kind, text in self.overview.items()
        ]

    def figures(self) -> list[Figure]:
        """Draw every figure for which there are data."""
        stats, scale, drawn = self.stats, self.colour_scale, self.overview_figures()
        for kind in stats.kinds:
            drawn += [
                heat_maps.attention(stats, kind, scale, one, name) for name, one in (self.masks or {"": None}).items()
            ]
        drawn += [heat_maps.support(stats), plots.kept_mass(self.kept, self.summaries)]
        drawn += [plots.nominal(NOMINAL, self.nominal, self.summaries)]
        drawn += [plots.concentration(self.concentration), plots.patterns(self.concentration)]
        if self.masks:
            relative = {name: one for name, one in self.masks.items() if one.relative is not None}
            drawn += [heat_maps.offsets(stats, one, name) for name, one in relative.items()]
            drawn += [plots.layer_sparsity(self.summaries, stats.kinds), plots.seen_by(self.masks, stats)]
        if self.systems:
            drawn.append(plots.quality(self.systems))
        if self.benchmark:
            device = self.benchmark.get("device", "an unnamed device")
            for name, title, label, problems in (
                ("speed", "Speed over effective sparsity", "milliseconds", benchmarks.times(self.benchmark)),
                ("memory", "Memory over effective sparsity", "MiB", benchmarks.memory(self.benchmark)),
            ):
                if problems:
                    drawn.append(plots.measurements(name, title, label, problems, device))
        return drawn

    def summary(self) -> dict[str, Any]:
        """Return all numbers as a JSON document without NaN; shares are in [0, 1]."""
        return {
            "format": FORMAT,
            "sentences": analysis.sentences(self.stats),
            "provenance": self.provenance,
            "kinds": {kind.value: self._kind(kind) for kind in self.stats.kinds},
            "masks": {name: self._mask(name) for name in self.masks},
            "systems": [vars(system) for system in self.systems],
            "differences": self.differences,
        }

    def _kind(self, kind: AttentionKind) -> dict[str, Any]:
        measured, kept = self.concentration[kind], self.kept[kind]
        layers, heads, queries, keys = self.stats.mass[kind].shape
        return {
            "layers": layers,
            "heads": heads,
            "positions": [queries, keys],
            "pairs": self.stats.pairs(kind),
            "concentration": {
                name: {
                    "mean": measured.average(name),
                    "uniform": float(measured.uniform[name]),
                    "heads": values.round(6).tolist(),
                }
                for name, values in measured.heads.items()
            },
            "patterns": measured.patterns.tolist(),
            "kept_mass": {
                "kind": _curve(kept.kind),
                "layers": [_curve(one) for one in kept.layers],
                "heads": [[_curve(one) for one in row] for row in kept.heads],
                "even": _curve(kept.even),
            },
            "percentile": {"nominal": NOMINAL.round(6).tolist(), "effective": self.nominal[kind].round(6).tolist()},
        }

    def _mask(self, name: str) -> dict[str, Any]:
        masks = self.masks[name]
        return {
            "rows": [vars(row) for row in self.summaries[name]],
            "heads": {
                kind.value: analysis.head_sparsity(masks, self.stats, kind).round(6).tolist()
                for kind in self.stats.kinds
            },
            "seen_by": {
                kind.value: analysis.seen_by(masks, self.stats, kind).round(6).tolist() for kind in self.stats.kinds
            },
            "vanished_heads": vanished_heads(masks, self.stats),
        }


def _curve(curve: analysis.Curve) -> dict[str, list[float]]:
    return {"sparsity": curve.sparsity.round(5).tolist(), "kept": curve.kept.round(5).tolist()}
