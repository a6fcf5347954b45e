"""Heat maps of the report, each with an alternative text made from its numbers."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib
import numpy as np
from matplotlib.colors import LogNorm, Normalize
from matplotlib.patches import Patch

from ap_fairseq.artifacts import AttentionStats, PruningMasks
from ap_fairseq.relative import SLOPE_BITS, offset_support
from ap_fairseq.report import analysis
from ap_fairseq.report.figure import KIND_COLOURS, Figure, styled, subplots
from ap_fairseq.sites import AttentionKind

KIND_TITLES = {
    AttentionKind.ENCODER_SELF: "encoder self-attention",
    AttentionKind.DECODER_SELF: "decoder self-attention",
    AttentionKind.CROSS: "cross-attention",
}
KEPT_MAP = "viridis_r"  # dark = much attention, in print and for the colour blind
PRUNED_MAP = matplotlib.colors.LinearSegmentedColormap.from_list("pruned", ["#ededed", "#8c8c8c"])


def _heat_map(axis, values: np.ndarray, colours, norm, rows: int, columns: int, first: int = 0):
    """Draw *values* over *rows* rows, the first one above, and the columns *first* to *columns* - 1."""
    extent = (first - 0.5, columns - 0.5, rows - 0.5, -0.5)
    return axis.imshow(values, cmap=colours, norm=norm, extent=extent, interpolation="nearest", aspect="auto")


def _name_pruned(canvas, name: str) -> None:
    """Add a legend that says whose pruned cells are grey."""
    canvas.legend(handles=[Patch(color="#b8b8b8", label=f"pruned by {name}")], loc="outside upper right")


def log_scale(maps: Sequence[analysis.Maps]) -> tuple[float, float]:
    """Return the (low, high) of one logarithmic colour scale for the mean attention of several kinds.

    High is the largest value; a hundredth of the recorded pairs lies below low.
    """
    values = np.concatenate([m.mean.ravel() for m in maps])
    weights = np.concatenate([np.broadcast_to(m.support, m.mean.shape).ravel() for m in maps])
    values, weights = values[values > 0], weights[values > 0]
    if not values.size:
        return 0.1, 1.0
    order = np.argsort(values)
    below = np.cumsum(weights[order])
    low, high = float(values[order[np.searchsorted(below, 0.01 * below[-1])]]), float(values.max())
    return (low, high) if low < high else (high / 10, high)


def palette() -> list[int]:
    """Return the 256 colours of the page's heat maps, least attention first on a dark ground: red, green, blue, ..."""
    return (matplotlib.colormaps["viridis"](np.arange(256))[:, :3] * 255).round().astype(int).ravel().tolist()


@styled
def attention(
    stats: AttentionStats, kind: AttentionKind, scale: tuple[float, float], masks: PruningMasks | None, name: str = ""
) -> Figure:
    """Draw the mean attention of every layer (rows) and head (columns); pruned cells are grey."""
    support = stats.support[kind]
    rows, columns = analysis.busy_positions(support)
    factor = -(-max(rows, columns) // 160)
    maps = analysis.maps(stats, kind, factor)
    shown = np.s_[: -(-rows // factor), : -(-columns // factor)]
    layers, heads = maps.mean.shape[:2]
    canvas, axes = subplots(heads, layers, width=1.5, height=1.6, sharex=True, sharey=True)
    norm = LogNorm(*scale)
    cells = None if masks is None else analysis.kept_cells(masks, stats, kind)
    for layer, head in np.ndindex(layers, heads):
        axis, mean = axes[layer, head], np.maximum(maps.mean[layer, head], scale[0])
        seen = maps.support > 0
        kept = seen
        if cells is not None:
            kept = seen & (analysis.kept_share(cells[layer, head], support, factor) >= 0.5)
            pruned = np.ma.array(mean, mask=~(seen & ~kept))[shown]
            _heat_map(axis, pruned, PRUNED_MAP, norm, rows, columns)
        image = _heat_map(axis, np.ma.array(mean, mask=~kept)[shown], KEPT_MAP, norm, rows, columns)
        axis.set_title(f"layer {layer}, head {head}", fontsize=8)
        axis.tick_params(labelsize=7)
        axis.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(3, integer=True))
        axis.yaxis.set_major_locator(matplotlib.ticker.MaxNLocator(3, integer=True))
    canvas.supxlabel("key position (tokens)", fontsize=9)
    canvas.supylabel("query position (tokens)", fontsize=9)
    canvas.colorbar(image, ax=axes, label="mean attention", shrink=min(1.0, 2.2 / layers), pad=0.02)
    pruned_text = ""
    if masks is not None:
        _name_pruned(canvas, name)
        share = analysis.head_sparsity(masks, stats, kind)
        pruned_text = (
            f" Grey: pairs pruned by {name}, {share.mean():.1%} in all, {share.min():.1%} to {share.max():.1%} of a "
            "head."
        )
    part = f"positions below {rows} x {columns} of {support.shape[0]} x {support.shape[1]}, 95% of pairs"
    return Figure(
        "_".join(filter(None, ["attention", kind.value, name])),
        f"Mean attention, {kind.value}",
        f"Logarithmic colours, one scale for all kinds; {part}.{pruned_text}",
        f"Heat maps of the mean attention of {kind.value}, {layers} layers by {heads} heads, {part}; from below "
        f"{scale[0]:.1g} to {maps.mean.max():.2g}.{pruned_text}",
        canvas,
    )


def head_average(stats: AttentionStats, kind: AttentionKind) -> analysis.Maps:
    """Return the mean attention averaged over layers and heads, binned to at most 160 positions."""
    factor = -(-max(analysis.busy_positions(stats.support[kind])) // 160)
    maps = analysis.maps(stats, kind, factor)
    return analysis.Maps(maps.mean.mean((0, 1), keepdims=True), maps.support, factor)


@styled
def overview(
    stats: AttentionStats,
    kind: AttentionKind,
    average: analysis.Maps,
    scale: tuple[float, float],
    masks: PruningMasks | None,
    caption: str,
) -> Figure:
    """Draw the mean attention of one kind over all heads and, below it, the share of heads that keep each pair."""
    support, factor = stats.support[kind], average.factor
    rows, columns = analysis.busy_positions(support)
    if kind is not AttentionKind.CROSS:
        rows = columns = max(rows, columns)
    shown = np.s_[: -(-rows // factor), : -(-columns // factor)]
    unseen = average.support == 0
    mean = np.ma.array(np.maximum(average.mean[0, 0], scale[0]), mask=unseen)
    panels = [("mean attention, averaged over heads", mean, KEPT_MAP, LogNorm(*scale), None)]
    if masks is not None:
        cells = analysis.kept_cells(masks, stats, kind).mean((0, 1))
        kept = np.ma.array(analysis.kept_share(cells, support, factor), mask=unseen)
        share = 1 - analysis.head_sparsity(masks, stats, kind).mean()
        shades = matplotlib.colors.LinearSegmentedColormap.from_list("kept", ["#ededed", KIND_COLOURS[kind]])
        title = f"kept: {share:.1%} of the pairs (shade: share of heads)"
        panels.append((title, kept, shades, Normalize(0, 1), matplotlib.ticker.PercentFormatter(1.0, decimals=0)))
    canvas, axes = subplots(1, len(panels), width=4.0, height=2.9)
    for axis, (title, values, colours, norm, percent) in zip(axes[:, 0], panels, strict=True):
        image = _heat_map(axis, values[shown], colours, norm, rows, columns)
        axis.set(xlabel="key position (tokens)", ylabel="query position (tokens)")
        axis.set_title(title, fontsize=9)
        for each in (axis.xaxis, axis.yaxis):
            each.set_major_locator(matplotlib.ticker.MaxNLocator(6, integer=True))
        canvas.colorbar(image, ax=axis, pad=0.02, format=percent)
    drawn = "; ".join(title for title, *_ in panels)
    alt = f"Heat maps of {KIND_TITLES[kind]} by query and key position: {drawn}. {caption}"
    return Figure(f"overview_{kind.value}", KIND_TITLES[kind], caption, alt, canvas)


@styled
def support(stats: AttentionStats) -> Figure:
    """Draw in how many sentences each cell is attendable."""
    canvas, axes = subplots(len(stats.kinds))
    top = max(int(stats.support[kind].max()) for kind in stats.kinds)
    norm = LogNorm(1, top) if top > 1 else Normalize(0, 1)
    texts = []
    for axis, kind in zip(axes[0], stats.kinds, strict=True):
        factor = -(-max(stats.support[kind].shape) // 300)
        values = analysis.maps(stats, kind, factor).support
        rows, columns = stats.support[kind].shape
        seen = np.ma.array(np.maximum(values, norm.vmin), mask=values == 0)
        image = _heat_map(axis, seen, "cividis_r", norm, rows, columns)
        axis.set(title=kind.value, xlabel="key position (tokens)", ylabel="query position (tokens)")
        busy = analysis.busy_positions(stats.support[kind])
        texts.append(f"{kind.value}: 95% of pairs lie below {busy[0]} x {busy[1]} of {rows} x {columns} positions")
    canvas.colorbar(image, ax=axes, label="sentences with this cell", pad=0.02)
    text = "; ".join(texts) + "."
    return Figure("support", "Support", text, f"In how many sentences each cell exists. {text}", canvas)


@styled
def offsets(stats: AttentionStats, masks: PruningMasks, name: str) -> Figure:
    """Draw cross-attention by offset from the scaled diagonal, a row for each head; pruned offsets are grey."""
    relative, support = stats.by_offset(), offset_support(stats.rows_by_centre())
    origin = len(support) // 2
    reach = max(1, int(np.searchsorted(_pairs_within(support), 0.95 * support.sum())))
    shown = np.s_[..., origin - reach : origin + reach + 1]
    layers, heads = relative.mass.shape[:2]
    mean = (relative.mass / np.maximum(support, 1))[shown].reshape(layers * heads, -1)
    keep = masks.relative.grown(len(support))[shown].reshape(layers * heads, -1)
    canvas, axes = subplots(1, width=6.4, height=1.2 + 0.16 * layers * heads)
    low, high = log_scale([analysis.Maps(mean, support[shown], 1)])
    norm = LogNorm(max(high * 1e-3, low), high)
    size = layers * heads, reach + 1, -reach
    mean = np.maximum(mean, norm.vmin)
    axis = axes[0, 0]
    _heat_map(axis, np.ma.array(mean, mask=keep), PRUNED_MAP, norm, *size)
    image = _heat_map(axis, np.ma.array(mean, mask=~keep), KEPT_MAP, norm, *size)
    axis.set(xlabel="source tokens from the scaled diagonal", ylabel="layer.head")
    axis.set_yticks(range(layers * heads), [f"{layer}.{head}" for layer, head in np.ndindex(layers, heads)], fontsize=7)
    canvas.colorbar(image, ax=axis, label="mean attention", pad=0.02)
    _name_pruned(canvas, name)
    slope = relative.slope / (1 << SLOPE_BITS)
    seen = analysis.seen_by(masks, stats, AttentionKind.CROSS)
    text = (
        f"Offset 0 of query i is key min(round({slope:.3f} i), S - 1) of a source of S tokens. {1 - seen[0]:.1%} of "
        f"the pairs are kept by some head of a layer; offsets to {reach} on either side have 95% of all pairs. "
        f"Anchors: {', '.join(map(str, masks.relative.anchor.ravel().tolist()))}."
    )
    return Figure(
        f"offsets_{name}",
        f"Cross-attention by offset from the scaled diagonal, {name}",
        text,
        f"A heat map of {layers * heads} heads by offset. {text}",
        canvas,
    )


def _pairs_within(support: np.ndarray) -> np.ndarray:
    """Pairs at most 0, 1, ... offsets from the middle of *support* (2 S - 1,): (S,)."""
    origin = len(support) // 2
    sides = support[origin:] + support[origin::-1]
    sides[0] = support[origin]
    return sides.cumsum()
