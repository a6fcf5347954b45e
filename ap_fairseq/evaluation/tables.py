"""Scores as tables: for terminals, Markdown and LaTeX."""

from __future__ import annotations

import json
from pathlib import Path

from ap_fairseq.files import ArtifactError
from ap_fairseq.sites import AttentionKind

METRIC_TITLES = {"bleu": "BLEU", "chrf": "chrF2", "ter": "TER"}


def _pruned_cells(result: dict) -> list[str]:
    """Return effective sparsity and kept mass of each kind in percent, or ``dense``."""
    parts = [result.get("sparsity", {}).get(kind.value) for kind in AttentionKind]
    return ["dense" if part is None else "{effective:.1%} / {kept_mass:.1%}".format(**part) for part in parts]


def _p_value(document: dict, system: str, metric: str) -> str:
    tested = document["significance"]["systems"][system].get(metric, {})
    return f"{tested['p']:.3f}" if "p" in tested else "-"


def score_table(document: dict) -> list[list[str]]:
    """Return the scores of a results file as rows of cells, the header first; columns that no system has are left out.

    pruned = effective sparsity, kept = kept mass; p = of the significance test against the first system.
    """
    keys = [("bleu", "BLEU", ".2f"), ("chrf", "chrF2", ".2f"), ("ter", "TER", ".2f"), ("s_bleu", "s-BLEU", ".2f")]
    keys += [("d_bleu", "d-BLEU", ".2f"), ("tokenized_bleu", "tokenised BLEU", ".2f"), ("comet", "COMET", ".4f")]
    keys += [("length_ratio", "length ratio", ".3f")]
    columns = [key for key in keys if any(key[0] in result for result in document["systems"])]
    tested = [m for m in METRIC_TITLES if m in document.get("significance", {}).get("signatures", {})]
    header = ["system", *[title for _, title, _ in columns], *[f"p ({METRIC_TITLES[m]})" for m in tested]]
    rows = [header + [f"{kind.value} pruned / kept" for kind in AttentionKind]]
    for result in document["systems"]:
        scores = [format(result[key], digits) if key in result else "-" for key, _, digits in columns]
        p_values = [_p_value(document, result["system"], metric) for metric in tested]
        rows.append([result["system"], *scores, *p_values, *_pruned_cells(result)])
    return rows


def length_table(document: dict) -> list[list[str]]:
    """Return BLEU by length of the reference as rows of cells, the header first; empty if it was not asked for."""
    scored = [result for result in document["systems"] if "by_length" in result]
    if not scored:
        return []
    buckets = scored[0]["by_length"]
    rows = [["BLEU by reference words", *[f"{_bucket_title(b)} (n={b['sentences']:,})" for b in buckets]]]
    return rows + [[result["system"], *[f"{b['bleu']:.2f}" for b in result["by_length"]]] for result in scored]


def _bucket_title(bucket: dict) -> str:
    return f"> {bucket['least'] - 1}" if bucket["most"] is None else f"{bucket['least']}-{bucket['most']}"


def signature_parts(document: dict) -> list[tuple[str, str]]:
    """Return (what, signature) of everything in the tables."""
    first = document["systems"][0]
    titles = [*METRIC_TITLES.items(), ("d_bleu", "d-BLEU"), ("tokenized_bleu", "tokenised BLEU")]
    parts = [(title, first[f"{key}_signature"]) for key, title in titles if f"{key}_signature" in first]
    if "comet_model" in first:
        parts.append(("COMET", first["comet_model"]))
    if "significance" in document:
        tested = document["significance"]
        parts += [(f"p ({METRIC_TITLES[metric]})", text) for metric, text in tested["signatures"].items()]
    return parts


def format_results(document: dict) -> str:
    """Render the scores as tables for terminals."""
    lines = []
    for rows in filter(None, [score_table(document), length_table(document)]):
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        for row in rows:
            cells = [row[0].ljust(widths[0]), *[cell.rjust(width) for cell, width in zip(row, widths, strict=True)][1:]]
            lines.append("  ".join(cells))
        lines.append("")
    return "\n".join(lines + [f"{title} {signature}" for title, signature in signature_parts(document)])


def format_markdown(document: dict) -> str:
    """Render a results file as Markdown tables, with device, versions and signatures below."""
    lines = []
    for rows in filter(None, [score_table(document), length_table(document)]):
        alignment = "|---|" + "---:|" * (len(rows[0]) - 1)
        body = ["| " + " | ".join(row) + " |" for row in rows]
        lines += [body[0], alignment, *body[1:], ""]
    versions = document["versions"]
    return "\n".join(lines) + (
        f"\n{document['device']}, torch {versions['torch']}, fairseq {versions['fairseq']}; "
        f"{document['systems'][0]['sentences']:,} sentences; "
        + ", ".join(f"{title} `{signature}`" for title, signature in signature_parts(document))
        + "."
    )


def format_latex(document: dict) -> str:
    """Render a results file as LaTeX tables (package booktabs), the signatures in a comment above each."""
    lines = [f"% {title}: {signature}" for title, signature in signature_parts(document)]
    for rows in filter(None, [score_table(document), length_table(document)]):
        body = [" & ".join(_latex(cell) for cell in row) + r" \\" for row in rows]
        lines += [rf"\begin{{tabular}}{{l{'r' * (len(rows[0]) - 1)}}}", r"\toprule", body[0], r"\midrule", *body[1:]]
        lines += [r"\bottomrule", r"\end{tabular}"]
    return "\n".join(lines)


def _latex(text: str) -> str:
    for character in "&%_#$":
        text = text.replace(character, rf"\{character}")
    return text.replace(">", "$>$")


def read_results(path: str) -> dict:
    """Read a results file; raises :class:`ArtifactError` if it is none."""
    try:
        document = json.loads(Path(path).read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ArtifactError(f"{path} is no JSON file ({error}); expected one that ap-evaluate -o wrote") from error
    if not isinstance(document, dict) or not document.get("systems"):
        raise ArtifactError(f"{path} has no entry 'systems'; expected a file that ap-evaluate -o wrote")
    return document
