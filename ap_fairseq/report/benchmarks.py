"""Kernel benchmarks (``scripts/bench_attention.py``), read and grouped by problem."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ap_fairseq.evaluation.results import parse_json, read_text
from ap_fairseq.files import ArtifactError
from ap_fairseq.report.systems import read_number


def read(path) -> dict[str, Any]:
    """Read the JSON of ``scripts/bench_attention.py``: provenance and ``rows`` with ``case``, ``method`` and times.

    Raises:
        ArtifactError: if the file is anything else.
    """
    document = parse_json(read_text(path), path)
    rows = document.get("rows") if isinstance(document, dict) else None
    if not isinstance(rows, list) or not rows:
        raise ArtifactError(f"{path} holds no 'rows'; give a file that scripts/bench_attention.py --out wrote")
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise ArtifactError(f"{path}, row {number} is {row!r}, expected an object")
        missing = [key for key in ("case", "method") if key not in row]
        # A rival that could not run has an error; host times are not of a problem. Neither is drawn.
        if missing or not ({"median_ms", "peak_bytes", "error", "median_us"} & row.keys()):
            needed = ", ".join(missing) or "median_ms or peak_bytes"
            raise ArtifactError(f"{path}, row {number} lacks {needed}; give a file of scripts/bench_attention.py")
        for key in ("median_ms", "peak_bytes", "sparsity"):
            if row.get(key) is not None:
                read_number(row[key], f"{path}, row {number}: {key}", math.inf)
        sizes = row.get("layout_bytes") or {}
        if not isinstance(sizes, dict):
            raise ArtifactError(f"{path}, row {number}: layout_bytes is {sizes!r}, expected an object")
        for part, size in sizes.items():
            read_number(size, f"{path}, row {number}: layout_bytes of {part}", math.inf)
    return document


@dataclass(frozen=True)
class Measurements:
    """Measured values of one problem: per method [(effective sparsity or None for a dense method, value), ...]."""

    title: str
    methods: dict[str, list[tuple[float | None, float]]]


def times(benchmark: Mapping[str, Any]) -> list[Measurements]:
    """Return the median milliseconds of each problem that was measured at some sparsity."""
    return _measurements(benchmark["rows"], "median_ms", 1.0)


def memory(benchmark: Mapping[str, Any]) -> list[Measurements]:
    """Return the memory of each problem in MiB: peak above the inputs where measured, else the mask layout's size."""
    peaks = _measurements(benchmark["rows"], "peak_bytes", 2.0**-20)
    rows = [
        {**row, "bytes": sum(row["layout_bytes"].values()), "direction": "mask layout"}
        for row in benchmark["rows"]
        if row.get("layout_bytes") and row["case"] != "memory" and row.get("direction", "forward") == "forward"
    ]
    return peaks + _measurements(rows, "bytes", 2.0**-20)


def _measurements(rows: Iterable[Mapping[str, Any]], key: str, scale: float) -> list[Measurements]:
    problems: dict[str, dict[str, list]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        if row.get(key) is None:
            continue
        shape = ", ".join(f"{name} {row[name]}" for name in ("batch", "heads", "size") if name in row)
        title = " ".join(filter(None, [row["case"], row.get("direction", ""), f"({shape})"]))
        masked = row.get("block") is not None
        method = f"{row['method']}, {row['block']}-blocks" if masked and row["block"] > 1 else row["method"]
        problems[title][method].append((row.get("sparsity") if masked else None, float(row[key]) * scale))
    return [
        Measurements(title, {name: sorted(points, key=lambda p: p[0] or 0.0) for name, points in methods.items()})
        for title, methods in problems.items()
        if any(sparsity is not None for points in methods.values() for sparsity, _ in points)
    ]
