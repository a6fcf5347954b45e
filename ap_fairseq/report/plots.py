"""Curves, bars and tables of the report, each with an alternative text made from its numbers."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import matplotlib
import numpy as np
from matplotlib.colors import Normalize

from ap_fairseq.artifacts import AttentionStats, PruningMasks
from ap_fairseq.pruning.summary import LayerSummary, of_kinds
from ap_fairseq.report import analysis
from ap_fairseq.report.benchmarks import Measurements
from ap_fairseq.report.figure import INK, KIND_COLOURS, Figure, percent_axis, styled, subplots
from ap_fairseq.report.systems import UNKNOWN, System, curves
from ap_fairseq.sites import AttentionKind

SERIES_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
MARKERS = "osD^vPX*<>"
DASHES = ("-", "--", "-.", ":")
MEASURES = {
    "relative_entropy": "entropy / uniform",
    "near_diagonal": "within ±1 of diagonal",
    "first": "on first column",
    "end": "on last source token",
}
PATTERN_COLOURS = {
    "previous": "#56b4e9",
    "next": "#e69f00",
    "diagonal": "#009e73",
    "first": "#cc79a7",
    "end": "#f0e442",
    analysis.BROAD: "#d9d9d9",
}

# -- curves -----------------------------------------------------------------------------------------------------------


@styled
def kept_mass(kept: dict[AttentionKind, analysis.KeptMass], summaries: dict[str, list[LayerSummary]]) -> Figure:
    """Draw kept mass over effective sparsity: per kind, layer and head, with the masks as points."""
    canvas, axes = subplots(len(kept), sharey=True)
    texts = []
    for axis, (kind, curve) in zip(axes[0], kept.items(), strict=True):
        colour = KIND_COLOURS[kind]
        for layer, heads in enumerate(curve.heads):
            for head, one in enumerate(heads):
                label = "heads" if layer == head == 0 else None
                axis.plot(one.sparsity[::4], one.kept[::4], color=colour, alpha=0.5, lw=0.7, label=label)
        for layer, one in enumerate(curve.layers):
            label = "layers" if layer == 0 else None
            axis.plot(one.sparsity, one.kept, color=colour, lw=1.1, ls="--", label=label)
        axis.plot(curve.kind.sparsity, curve.kind.kept, color=colour, lw=2.4, label="kind")
        axis.plot(curve.even.sparsity, curve.even.kept, color=INK, lw=1, ls=":", label="uniform attention")
        for marker, (name, rows) in zip(itertools.cycle(MARKERS), summaries.items()):
            row = next(row for row in of_kinds(rows) if row.kind == kind.value)
            axis.plot(row.effective, row.kept_mass, marker, color=INK, mfc="none", ms=6, label=name)
        axis.set(title=kind.value, xlim=(0, 1), ylim=(0, 1.02))
        percent_axis(axis.xaxis, "effective sparsity")
        axis.grid(True)
        shares = [f"{curve.kind.at(x):.0%} at {x:.0%}" for x in (0.5, 0.8, 0.9) if curve.kind.at(x) is not None]
        texts.append(f"{kind.value} keeps {', '.join(shares) if shares else 'all: nothing can be pruned'}")
    percent_axis(axes[0, 0].yaxis, "kept attention mass")
    axes[0, -1].legend(fontsize=7, loc="lower left")
    text = "; ".join(texts) + "."
    caption = (
        f"The most attention mass that can be kept when cells are pruned by mean attention: {text} Dotted: the same "
        "for attention spread uniformly over each sentence. Curves end where only guaranteed cells are left, which "
        "--empty-rows prunes, too."
    )
    return Figure("kept_mass", "Kept mass over effective sparsity", caption, f"Falling curves. {text}", canvas)


@styled
def nominal(
    nominal: np.ndarray, effective: dict[AttentionKind, np.ndarray], summaries: dict[str, list[LayerSummary]]
) -> Figure:
    """Draw effective over nominal sparsity of the authors' percentile, with the masks as points."""
    canvas, axes = subplots(1, width=4.6, height=3.2)
    axis, texts = axes[0, 0], []
    axis.plot([0, 1], [0, 1], color=INK, lw=0.8, ls=":", label="equal")
    for dash, (kind, values) in zip(itertools.cycle(DASHES), effective.items()):
        axis.plot(nominal, values, color=KIND_COLOURS[kind], ls=dash, lw=2, label=f"{kind.value}, percentile")
        texts.append(f"{kind.value} {np.interp(0.5, nominal, values):.1%}")
    for marker, (name, rows) in zip(itertools.cycle(MARKERS), summaries.items()):
        totals = of_kinds(rows)
        colours = [KIND_COLOURS[AttentionKind(row.kind)] for row in totals]
        axis.scatter(
            [row.nominal for row in totals],
            [row.effective for row in totals],
            c=colours,
            marker=marker,
            s=30,
            label=name,
        )
    axis.set(xlim=(0, 1), ylim=(0, 1))
    percent_axis(axis.xaxis, "nominal sparsity (of the square of positions)")
    percent_axis(axis.yaxis, "effective sparsity")
    axis.grid(True)
    axis.legend(fontsize=7, loc="upper left")
    text = f"Share of the existing pairs that a nominal 50% prunes: {', '.join(texts)}."
    return Figure("nominal", "Effective against nominal sparsity", text, text, canvas)


# -- heads ------------------------------------------------------------------------------------------------------------


@styled
def concentration(measured: dict[AttentionKind, analysis.Concentration]) -> Figure:
    """Draw one table of layers x heads for each kind (rows) and measure (columns)."""
    present = [name for name in MEASURES if any(name in c.heads for c in measured.values())]
    layers, heads = (max(c.patterns.shape[k] for c in measured.values()) for k in range(2))
    height = 0.9 + 0.24 * layers
    canvas, axes = subplots(len(present), len(measured), width=max(2.0, 0.34 * heads + 0.7), height=height)
    texts = []
    for line, (kind, c) in zip(axes, measured.items(), strict=True):
        for axis, name in zip(line, present, strict=True):
            if name not in c.heads:
                axis.set_axis_off()
                reason = "no source keys" if kind.causal else "not recorded"
                axis.text(0.5, 0.5, reason, ha="center", va="center", transform=axis.transAxes)
                continue
            _number_table(axis, c.heads[name], f"uniform {c.uniform[name]:.2f}")
            if kind is next(iter(measured)):
                axis.set_title(f"{MEASURES[name]}\n(uniform {c.uniform[name]:.2f})", fontsize=8)
        line[0].set_ylabel(f"{kind.value}\nlayer")
        averages = [f"{MEASURES[name]} {c.average(name):.2f}" for name in present if name in c.heads]
        texts.append(f"{kind.value}: {', '.join(averages)}")
    text = "; ".join(texts) + "."
    return Figure(
        "concentration",
        "Concentration of each head",
        f"Averages over heads: {text} Above each table: uniform attention.",
        f"Tables of layers by heads. {text}",
        canvas,
    )


def _number_table(axis, values: np.ndarray, title: str) -> None:
    layers, heads = values.shape
    axis.imshow(values, cmap="cividis", norm=Normalize(0, 1), aspect="auto")
    for (layer, head), value in np.ndenumerate(values):
        colour = "white" if value < 0.5 else "black"
        axis.text(
            head,
            layer,
            f"{value:.2f}".lstrip("0") if value < 1 else "1",
            ha="center",
            va="center",
            color=colour,
            fontsize=6.5,
        )
    axis.set_xticks(range(heads))
    axis.set_yticks(range(layers))
    axis.tick_params(labelsize=7, length=0)
    axis.set_title(title, fontsize=8)


@styled
def patterns(measured: dict[AttentionKind, analysis.Concentration]) -> Figure:
    """Draw the named pattern of each head."""
    layers, heads = (max(c.patterns.shape[k] for c in measured.values()) for k in range(2))
    canvas, axes = subplots(len(measured), width=max(2.6, 0.55 * heads + 0.6), height=0.9 + 0.3 * layers)
    names = [*analysis.PATTERNS, analysis.BROAD]
    colours = matplotlib.colors.ListedColormap([PATTERN_COLOURS[name] for name in names])
    texts = []
    for axis, (kind, c) in zip(axes[0], measured.items(), strict=True):
        index = np.vectorize(names.index)(c.patterns)
        axis.imshow(index, cmap=colours, vmin=-0.5, vmax=len(names) - 0.5, aspect="auto")
        for (layer, head), name in np.ndenumerate(c.patterns):
            short = {"previous": "prev", "diagonal": "diag"}.get(name, name)
            axis.text(head, layer, short, ha="center", va="center", fontsize=7, color="black")
        axis.set(title=kind.value, xlabel="head", ylabel="layer")
        axis.set_xticks(range(c.patterns.shape[1]))
        axis.set_yticks(range(c.patterns.shape[0]))
        axis.tick_params(length=0)
        counts = [f"{(c.patterns == name).sum()} {name}" for name in names if (c.patterns == name).any()]
        texts.append(f"{kind.value}: {', '.join(counts)}")
    text = "; ".join(texts) + "."
    caption = (
        f"A head is named after the position with the largest share of its mass if that share is at least "
        f"{analysis.NAMED_FROM:.0%} and {analysis.NAMED_OVER_UNIFORM:g} times that of uniform attention; all others "
        f"are broad. {text}"
    )
    return Figure("patterns", "Named patterns", caption, f"Name of each head's pattern. {text}", canvas)


def _mask_panels(names: Sequence[str], kinds: Sequence[AttentionKind]):
    """Return a canvas for shares, and its axes: a row for each mask, a column for each kind."""
    canvas, axes = subplots(len(kinds), len(names), height=2.2, sharey=True)
    for (row, column), axis in np.ndenumerate(axes):
        kind = kinds[column].value
        axis.set(title=kind if len(names) == 1 else f"{names[row]}: {kind}", ylim=(0, 1.05))
    return canvas, axes


@styled
def layer_sparsity(summaries: dict[str, list[LayerSummary]], kinds: Sequence[AttentionKind]) -> Figure:
    """Draw effective sparsity (bars) and kept mass (dots) of each layer, one row of panels for each mask."""
    canvas, axes = _mask_panels(list(summaries), kinds)
    texts = []
    for line, (name, rows) in zip(axes, summaries.items(), strict=True):
        for axis, kind in zip(line, kinds, strict=True):
            layers = [row for row in rows if row.kind == kind.value and row.layer is not None]
            at = [row.layer for row in layers]
            axis.bar(at, [row.effective for row in layers], color=KIND_COLOURS[kind], width=0.7)
            axis.plot(at, [row.kept_mass for row in layers], "o", color=INK, ms=5)
            axis.set(xlabel="layer", xticks=at)
            shares = [row.effective for row in layers]
            texts.append(f"{name}, {kind.value}: {min(shares):.0%} to {max(shares):.0%} of a layer's pairs")
        percent_axis(line[0].yaxis, "pruned pairs (bar)\nkept mass (dot)")
    text = "; ".join(texts) + "."
    return Figure(
        "layer_sparsity",
        "Effective sparsity of each layer",
        f"Bars: pairs pruned; dots: attention mass kept. {text}",
        f"Bars of effective sparsity by layer. {text}",
        canvas,
    )


@styled
def seen_by(masks: dict[str, PruningMasks], stats: AttentionStats) -> Figure:
    """Draw how many heads of a layer keep a pair of positions, one row of panels for each mask."""
    kinds = stats.kinds
    canvas, axes = _mask_panels(list(masks), kinds)
    texts = []
    for line, (name, one) in zip(axes, masks.items(), strict=True):
        for axis, kind in zip(line, kinds, strict=True):
            shares = analysis.seen_by(one, stats, kind)
            axis.bar(range(len(shares)), shares, color=KIND_COLOURS[kind], width=0.7)
            axis.set(xlabel="heads of a layer", xticks=range(0, len(shares), -(-len(shares) // 9)))
            texts.append(f"{name}, {kind.value}: no head keeps {shares[0]:.0%} of a layer's pairs of positions")
        percent_axis(line[0].yaxis, "pairs of positions")
    text = "; ".join(texts) + "."
    return Figure(
        "seen_by",
        "How many heads of a layer keep a pair of positions",
        f"What no head of a layer keeps, the layer cannot look at. {text}",
        f"Bars of the share of pairs by the number of heads that keep them. {text}",
        canvas,
    )


# -- quality, speed, memory -------------------------------------------------------------------------------------------


@styled
def quality(systems: list[System]) -> Figure:
    """Draw BLEU and chrF over effective sparsity, a line for each series, with 95% confidence intervals."""
    metrics = ("BLEU", "chrF2")
    canvas, axes = subplots(2, width=4.2, height=3.4)
    sources, texts = set(), []
    for axis, metric in zip(axes[0], metrics, strict=True):
        series = curves(systems, metric)
        dense, unknown = series.pop(None, []), series.pop(UNKNOWN, [])
        levels = [("dense" if len(dense) == 1 else f"dense, {point.name}", point, ":") for point in dense]
        for name, point, dashes in levels + [(point.name, point, "-.") for point in unknown]:
            axis.axhline(point.score, color=INK, lw=1, ls=dashes, label=name)
            texts.append(f"{name} {metric} {point.score:.1f}")
            if point.interval:
                axis.axhspan(point.interval.low, point.interval.high, color=INK, alpha=0.08, lw=0)
                sources.add(point.interval.source)
        for number, (name, points) in enumerate(series.items()):
            colour = SERIES_COLOURS[number % len(SERIES_COLOURS)]
            style = dict(
                color=colour, marker=MARKERS[number % len(MARKERS)], ls=DASHES[number // 6 % len(DASHES)], ms=5
            )
            x, y = [p.sparsity for p in points], [p.score for p in points]
            axis.plot(x, y, label=name, lw=1.3, **style)
            banded = [p for p in points if p.interval]
            if banded:
                at = [p.sparsity for p in banded]
                low, high = [p.interval.low for p in banded], [p.interval.high for p in banded]
                axis.fill_between(at, low, high, color=colour, alpha=0.15, lw=0)
                middle = [p.score for p in banded]
                errors = [np.subtract(middle, low), np.subtract(high, middle)]
                axis.errorbar(at, middle, errors, fmt="none", ecolor=colour, elinewidth=1, capsize=2)
            sources |= {p.interval.source for p in banded}
            if metric == "BLEU":
                texts += [f"{name} at {p.sparsity:.0%} BLEU {p.score:.1f}" for p in points]
        axis.set(title=metric, ylabel=metric)
        percent_axis(axis.xaxis, "effective sparsity of the pruned kinds")
        axis.set_xlim(-0.02, 1)
        axis.grid(True)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    canvas.legend(handles, labels, fontsize=7, loc="outside lower center", ncols=min(3, len(labels)))
    bands = f"Bars and bands: 95% intervals ({'; '.join(sorted(sources))})." if sources else "Without intervals."
    return Figure("quality", "Translation quality over effective sparsity", bands, "; ".join(texts) + ".", canvas)


@styled
def measurements(name: str, title: str, label: str, problems: list[Measurements], device: str) -> Figure:
    """Draw a measured quantity over effective sparsity, a panel for each problem; dense methods are level lines."""
    columns = min(2, len(problems))
    canvas, axes = subplots(columns, -(-len(problems) // columns), width=4.2, height=2.9)
    texts = []
    methods = list(dict.fromkeys(method for problem in problems for method in problem.methods))
    for axis in axes.flat[len(problems) :]:
        axis.set_axis_off()
    for axis, problem in zip(axes.flat, problems):  # noqa: B905 (the last panels may be empty)
        for method, points in problem.methods.items():
            number = methods.index(method)
            colour, dash = SERIES_COLOURS[number % len(SERIES_COLOURS)], DASHES[number // 6 % len(DASHES)]
            sparse = [(x, y) for x, y in points if x is not None]
            if sparse:
                x, y = zip(*sparse, strict=True)
                axis.plot(x, y, color=colour, ls=dash, marker=MARKERS[number % len(MARKERS)], ms=5, label=method)
                texts.append(f"{problem.title}, {method}: {y[-1]:.3g} at {x[-1]:.0%}")
            for level in [y for x, y in points if x is None]:
                axis.axhline(level, color=colour, ls=":", lw=1.2, label=f"{method}, dense")
                texts.append(f"{problem.title}, {method}: {level:.3g} dense")
        axis.set_title(problem.title, fontsize=8)
        axis.set_ylabel(label)
        axis.set(xlim=(-0.02, 1), ylim=(0, None))
        percent_axis(axis.xaxis, "effective sparsity")
        axis.grid(True)
        axis.legend(fontsize=6.5)
    return Figure(name, title, f"{label}, measured on {device}.", "; ".join(texts) + ".", canvas)
