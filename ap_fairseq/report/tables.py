"""The tables of the report in Markdown and LaTeX (booktabs): masks and kinds, and translation scores."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ap_fairseq.pruning.summary import LayerSummary
from ap_fairseq.report.analysis import Concentration, KeptMass
from ap_fairseq.report.results import METRICS, System
from ap_fairseq.sites import AttentionKind

_TEX = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
_TEX |= {character: "\\" + character for character in "&%$#_{}"}


@dataclass(frozen=True)
class Table:
    """A caption, a header, and rows of plain text; columns after the first are set flush right."""

    caption: str
    header: list[str]
    rows: list[list[str]]


def kinds_table(measured: Mapping[AttentionKind, Concentration], kept: Mapping[AttentionKind, KeptMass]) -> Table:
    """What distinguishes the kinds: averages over heads."""
    rows = []
    for kind, c in measured.items():
        shares = [
            f"{c.heads[name].mean():.1%}" if name in c.heads else "–" for name in ("near_diagonal", "first", "end")
        ]
        at = [kept[kind].kind.at(sparsity) for sparsity in (0.5, 0.8, 0.9)]
        rows.append(
            [kind.value, f"{c.heads['entropy'].mean():.2f}", f"{c.heads['relative_entropy'].mean():.2f}", *shares]
            + ["–" if share is None else f"{share:.1%}" for share in at]
        )
    header = ["kind", "entropy (bits)", "of uniform", "within ±1", "first column", "last source token"]
    header += ["kept mass at 50%", "at 80%", "at 90%"]
    return Table("Attention of the dense model; averages over heads, shares of attention mass.", header, rows)


def heads_table(measured: Mapping[AttentionKind, Concentration]) -> Table:
    """Every measure of every head."""
    names = list(dict.fromkeys(name for c in measured.values() for name in c.heads))
    rows = []
    for kind, c in measured.items():
        for layer, head in np.ndindex(c.patterns.shape):
            values = [f"{c.heads[name][layer, head]:.3f}" if name in c.heads else "–" for name in names]
            rows.append([kind.value, str(layer), str(head), c.patterns[layer, head], *values])
        uniform = [f"{c.uniform[name]:.3f}" if name in c.uniform else "–" for name in names]
        rows.append([kind.value, "–", "–", "evenly spread", *uniform])
    header = ["kind", "layer", "head", "pattern", *(name.replace("_", " ") for name in names)]
    return Table(
        "Entropy in bits and relative to evenly spread attention; else shares of attention mass.", header, rows
    )


def masks_table(summaries: Mapping[str, list[LayerSummary]]) -> Table:
    """Effective and nominal sparsity and kept mass of each mask and kind."""
    rows = [
        [name, row.kind, f"{row.effective:.1%}", f"{row.nominal:.1%}", f"{row.kept_mass:.1%}",
         f"{row.guaranteed_rows:,}/{row.rows:,}"]
        for name, summary in summaries.items()
        for row in summary
        if row.layer is None
    ]  # fmt: skip
    header = ["masks", "kind", "effective", "nominal", "kept mass", "guaranteed rows"]
    return Table("Pruning masks. Effective sparsity: share of the recorded pairs that is pruned.", header, rows)


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
    caption = "Translation scores and effective sparsity; ± is half of the 95% bootstrap interval over test sentences."
    return Table(" ".join([caption, *(f"{text}." for text in sorted(signatures))]), header, rows)


def markdown(tables: list[Table]) -> str:
    """Render as GitHub-flavoured Markdown."""
    parts = []
    for table in tables:
        lines = [table.header, ["---"] + ["---:"] * (len(table.header) - 1), *table.rows]
        body = "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
        parts.append(f"{body}\n\n{table.caption}\n")
    return "\n".join(parts)


def latex(tables: list[Table]) -> str:
    """Render as ``table`` environments; the document needs ``\\usepackage{booktabs}``."""
    parts = ["% \\usepackage{booktabs}"]
    for table in tables:
        columns = "l" + "r" * (len(table.header) - 1)
        lines = ["\\begin{table}", "  \\centering", f"  \\begin{{tabular}}{{{columns}}}", "    \\toprule"]
        lines += [_tex_line(table.header), "    \\midrule", *map(_tex_line, table.rows), "    \\bottomrule"]
        lines += ["  \\end{tabular}", f"  \\caption{{{escape_tex(table.caption)}}}", "\\end{table}"]
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def _tex_line(cells: list[str]) -> str:
    return "    " + " & ".join(map(escape_tex, cells)) + r" \\"


def escape_tex(text: str) -> str:
    """Escape what LaTeX reads as a command, and set ± and – for every input encoding."""
    escaped = re.sub(r"[\\~^&%$#_{}]", lambda match: _TEX[match[0]], text)
    return escaped.replace("±", r"$\pm$").replace("–", "--")
