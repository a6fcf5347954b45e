"""From files to a report, and from a report to the folder it is written to."""

from __future__ import annotations

import json
import re
from pathlib import Path

from ap_fairseq.artifacts import AttentionStats, PruningMasks
from ap_fairseq.files import ArtifactError, atomic_output, file_sha256, write_json, write_text
from ap_fairseq.report import benchmarks, page, tables
from ap_fairseq.report.content import Report
from ap_fairseq.report.figure import Figure
from ap_fairseq.report.systems import System, read_systems


def load(stats_files: list[str], mask_files: list[str], result_files: list[str], benchmark: str | None) -> Report:
    """Return the :class:`Report` of the named files; those of statistics are merged.

    Raises:
        ArtifactError: if a file is missing, damaged or belongs to others, or two masks or systems have one name.
    """
    stats = AttentionStats.load_merged(stats_files)
    masks: dict[str, PruningMasks] = {}
    for path in mask_files:
        name = mask_name(path)
        if name in masks:
            raise ArtifactError(
                f"two mask files are called {name}; rename {path}, as masks are named after their files"
            )
        masks[name] = PruningMasks.load(path)
    pairs = {kind.value: stats.pairs(kind) for kind in stats.kinds}
    systems: dict[tuple, tuple[str, System]] = {}
    for path in result_files:
        for system in read_systems(path, pairs):
            key = (system.name, system.seed, system.settings)
            if key in systems:
                raise ArtifactError(
                    f"system {system.name} has two results, in {systems[key][0]} and in {path}; rename it in one, or "
                    "add a seed"
                )
            systems[key] = (path, system)
    read = [*stats_files, *mask_files, *result_files, *([benchmark] if benchmark else [])]
    hashes = {str(path): file_sha256(path) for path in read}
    scored = [system for _, system in systems.values()]
    return Report(stats, masks, scored, benchmarks.read(benchmark) if benchmark else None, hashes)


def mask_name(path) -> str:
    """Return the file's name without ending, with nothing in it that file names and HTML ids cannot hold."""
    return re.sub(r"[^\w.-]+", "-", Path(path).stem)


def check_folder(path, names: list[str], overwrite: bool) -> Path:
    """Return the output folder, which may not exist yet.

    Raises:
        ArtifactError: if *path* is a file, its parent does not exist, or it holds any of *names* and *overwrite* is not
            set.
    """
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise ArtifactError(f"output {path} is a file; name a folder")
    held = [name for name in names if (path / name).exists()]
    if held and not overwrite:
        raise ArtifactError(f"output {path} already holds {', '.join(held)}; pass --overwrite or choose another folder")
    if not path.parent.is_dir():
        raise ArtifactError(f"cannot make {path}: folder {path.parent} does not exist; create it first")
    return path


def write_figures(figures: list[Figure], folder: Path) -> None:
    """Write each figure as PNG and SVG; the folder is made if need be."""
    folder.mkdir(exist_ok=True)
    for figure in figures:
        for file_format in ("png", "svg"):
            with atomic_output(folder / f"{figure.name}.{file_format}", overwrite=True) as temporary:
                figure.save(temporary, file_format)


def write_report(report: Report, folder: Path) -> None:
    """Write figures/, summary.json, table.md, table.tex and, last, report.html; the folder is made if need be."""
    figures = report.figures()
    folder.mkdir(exist_ok=True)
    write_figures(figures, folder / "figures")
    summary = json.loads(json.dumps(report.summary(), allow_nan=False))
    write_json(folder / "summary.json", summary, overwrite=True)
    write_text(folder / "table.md", tables.markdown(report.tables), overwrite=True)
    write_text(folder / "table.tex", tables.latex(report.tables), overwrite=True)
    write_text(folder / "report.html", page.render(report, figures), overwrite=True)
