"""``report.html``: one file with style, script and data inside, which makes no network requests."""

from __future__ import annotations

import base64
import gzip
import json
from typing import Any

import jinja2
import numpy as np

from ap_fairseq.report import analysis, heat_maps, tables
from ap_fairseq.report.content import Report
from ap_fairseq.report.figure import Figure
from ap_fairseq.sites import AttentionKind

_STEPS = 254  # of the logarithmic scale in which mean attention is stored: codes 1 to 255; 0 is 0


def render(report: Report, figures: list[Figure]) -> str:
    """Return the page as text."""
    data, blobs = _explorer(report)
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("ap_fairseq.report", "template"), autoescape=True, undefined=jinja2.StrictUndefined
    )
    style, script = (environment.loader.get_source(environment, f"page.{ending}")[0] for ending in ("css", "js"))
    return environment.get_template("page.html.j2").render(
        title=report.title,
        lead=report.lead,
        style=jinja2.utils.markupsafe.Markup(style),
        script=jinja2.utils.markupsafe.Markup(script),
        differences=report.differences,
        kinds=tables.kinds_table(report.attended, report.kept),
        explorer_note=_note(data),
        overview=[figure for figure in figures if figure.name.startswith("overview_")],
        # The explorer shows what the heat maps show.
        figures=[figure for figure in figures if not figure.name.startswith(("overview_", "attention_", "support"))],
        masks=report.masks_table if report.masks else None,
        masks_shown=len(report.masks),
        vanished=report.vanished,
        systems=tables.systems_table(report.systems) if report.systems else None,
        heads=tables.heads_table(report.concentration),
        provenance=json.dumps(report.provenance, indent=2, sort_keys=True),
        data=data,
        blobs=blobs,
    )


def _note(data: dict[str, Any]) -> str:
    error = (data["high"] / data["low"]) ** (0.5 / _STEPS) - 1
    note = (
        f"Mean attention is stored in {_STEPS + 1} logarithmic steps, accurate to {error:.1%}; ap-report export writes "
        "exact values."
    )
    factor = data["kinds"][0]["factor"]
    if factor > 1:
        note += f" The recording is large: each cell shown is the mean of up to {factor} x {factor} positions."
    return note


def _explorer(report: Report) -> tuple[dict[str, Any], dict[str, str]]:
    """Return what the script reads: a JSON document, and named arrays, gzipped, in base64.

    Arrays: ``mean-KIND-LAYER`` uint8 (heads, R, C) codes; ``support-KIND`` float32 (R, C); ``kept-MASK-KIND-LAYER``
    uint8 (heads, R, C), 255 = all recorded pairs of the bin kept.
    """
    stats, maps = report.stats, report.maps
    palest, high = report.colour_scale
    positive = [float(m.mean.min(where=m.mean > 0, initial=palest)) for m in maps.values()]
    low = max(min(positive), high * 1e-5)
    data = {
        "low": low,
        "high": high,
        "palest": palest,
        "colours": heat_maps.palette(),
        "masks": list(report.masks),
        "kinds": [_kind(report, kind, maps[kind]) for kind in stats.kinds],
    }
    blobs = {}
    for kind, m in maps.items():
        kept_by = [analysis.kept_cells(masks, stats, kind) for masks in report.masks.values()]
        blobs[f"support-{kind.value}"] = _packed(m.support.astype("<f4"))
        codes = encode(m.mean, low, high)
        for layer in range(len(codes)):
            blobs[f"mean-{kind.value}-{layer}"] = _packed(codes[layer])
            for number, cells in enumerate(kept_by):
                heads = [analysis.kept_share(keep, stats.support[kind], m.factor) for keep in cells[layer]]
                kept = (np.array(heads) * 255).round().astype(np.uint8)
                blobs[f"kept-{number}-{kind.value}-{layer}"] = _packed(kept)
    return data, blobs


def _kind(report: Report, kind: AttentionKind, m: analysis.Maps) -> dict[str, Any]:
    queries, keys = report.stats.support[kind].shape
    return {
        "name": kind.value,
        "causal": kind.causal,
        "layers": m.mean.shape[0],
        "heads": m.mean.shape[1],
        "rows": m.mean.shape[2],
        "columns": m.mean.shape[3],
        "queries": queries,
        "keys": keys,
        "factor": m.factor,
        "busy": max(analysis.busy_positions(report.stats.support[kind])),
        "most": float(m.support.max()),
        "patterns": report.concentration[kind].patterns.tolist(),
    }


def encode(mean: np.ndarray, low: float, high: float) -> np.ndarray:
    """Return uint8 codes: 0 for 0, 1 for up to *low*, 255 for *high*, equal ratios between."""
    share = np.log(np.maximum(mean, low) / low) / np.log(high / low)
    return np.where(mean > 0, 1 + (share * _STEPS).round(), 0).clip(0, 255).astype(np.uint8)


def _packed(array: np.ndarray) -> str:
    return base64.b64encode(gzip.compress(np.ascontiguousarray(array).tobytes(), 6, mtime=0)).decode("ascii")
