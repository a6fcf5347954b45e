"""The tables of the report in Markdown and LaTeX (booktabs): masks and kinds, and translation scores."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np

from ap_fairseq.evaluation import tables as render
from ap_fairseq.evaluation.tables import Table
from ap_fairseq.pruning.summary import LayerSummary, of_kinds
from ap_fairseq.report.analysis import Concentration, KeptMass
from ap_fairseq.report.systems import METRICS, System
from ap_fairseq.sites import AttentionKind


def kinds_table(measured: Mapping[AttentionKind, Concentration], kept: Mapping[AttentionKind, KeptMass]) -> Table:
    """What distinguishes the kinds: averages over heads."""
    rows = []
    for kind, c in measured.items():
        shares = [f"{c.average(name):.1%}" if name in c.heads else "–" for name in ("near_diagonal", "first", "end")]
        at = [kept[kind].kind.at(sparsity) for sparsity in (0.5, 0.8, 0.9)]
        rows.append(
            [kind.value, f"{c.average('entropy'):.2f}", f"{c.average('relative_entropy'):.2f}", *shares]
            + ["–" if share is None else f"{share:.1%}" for share in at]
        )
    header = ["kind", "entropy (bits)", "relative to uniform", "within ±1", "first column", "last source token"]
    header += ["kept mass at 50%", "at 80%", "at 90%"]
    return Table(header, rows, "Attention of the recorded model; averages over heads, shares of attention mass.")


def heads_table(measured: Mapping[AttentionKind, Concentration]) -> Table:
    """Every measure of every head."""
    names = list(dict.fromkeys(name for c in measured.values() for name in c.heads))
    rows = []
    for kind, c in measured.items():
        for layer, head in np.ndindex(c.patterns.shape):
            values = [f"{c.heads[name][layer, head]:.3f}" if name in c.heads else "–" for name in names]
            rows.append([kind.value, str(layer), str(head), c.patterns[layer, head], *values])
        uniform = [f"{c.uniform[name]:.3f}" if name in c.uniform else "–" for name in names]
        rows.append([kind.value, "–", "–", "uniform", *uniform])
    header = ["kind", "layer", "head", "pattern", *(name.replace("_", " ") for name in names)]
    caption = "Entropy in bits and relative to uniform attention; all other columns are shares of attention mass."
    return Table(header, rows, caption, align="lrrl" + "r" * len(names))


def masks_table(summaries: Mapping[str, list[LayerSummary]], nominal: Collection[str]) -> Table:
    """Effective sparsity and kept mass of each mask and kind.

    Args:
        nominal: names of the masks whose budgets are nominal; only theirs is shown.
    """
    header = ["masks", "kind", "effective", *["nominal"] * bool(nominal), "kept mass", "rows of one cell or none"]
    rows = []
    for name, summary in summaries.items():
        for row in of_kinds(summary):
            shares = [f"{row.effective:.1%}"]
            if nominal:
                shares.append(f"{row.nominal:.1%}" if name in nominal else "–")
            rows.append([name, row.kind, *shares, f"{row.kept_mass:.1%}", f"{row.guaranteed_rows:,}/{row.rows:,}"])
    caption = "Pruning masks. Effective sparsity: share of the recorded pairs that is pruned."
    return Table(header, rows, caption, align="ll" + "r" * (len(header) - 2))


def systems_table(systems: list[System]) -> Table:
    """Scores with half of their 95% bootstrap interval, and the effective sparsity of each kind."""
    rows = []
    for system in systems:
        pruned = [
            f"{system.sparsity[kind.value]:.1%}" if kind.value in system.sparsity else "–" for kind in AttentionKind
        ]
        scores = [
            f"{system.scores[metric]:.2f}"
            + (f" ± {system.half_widths[metric]:.2f}" if metric in system.half_widths else "")
            for metric in METRICS
        ]
        seed = "–" if system.seed is None else str(system.seed)
        rows.append([system.name, "dense" if system.series is None else system.series, *pruned, *scores, seed])
    header = ["system", "series", *(kind.value for kind in AttentionKind), *METRICS, "seed"]
    signatures = {f"{name} {text}" for system in systems for name, text in system.signatures.items()}
    caption = "Translation scores and effective sparsity"
    if any(system.half_widths for system in systems):
        caption += "; ± is half of the 95% bootstrap interval over test sentences"
    caption = " ".join(f"{text}." for text in [caption, *sorted(signatures)])
    return Table(header, rows, caption, align="ll" + "r" * (len(header) - 2))


def markdown(tables: list[Table]) -> str:
    """Render as GitHub-flavoured Markdown with captions."""
    return "\n".join(f"{render.markdown(table)}\n\n{table.caption}\n" for table in tables)


def latex(tables: list[Table]) -> str:
    """Render as ``table`` environments; the document needs ``\\usepackage{booktabs}``."""
    parts = ["% \\usepackage{booktabs}"]
    for table in tables:
        caption = f"\\caption{{{render.escape_latex(table.caption)}}}"
        parts.append("\n".join(["\\begin{table}", "\\centering", render.latex(table), caption, "\\end{table}"]))
    return "\n\n".join(parts) + "\n"
