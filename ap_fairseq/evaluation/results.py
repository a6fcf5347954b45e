"""Results files, as ``ap-evaluate -o`` writes them, read back and rendered as tables."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from ap_fairseq.evaluation import tables
from ap_fairseq.evaluation.scores import METRICS
from ap_fairseq.evaluation.tables import Table
from ap_fairseq.files import ArtifactError, naming, require_file
from ap_fairseq.sites import AttentionKind

SCORES = {key: (metric.title, ".2f") for key, metric in METRICS.items()} | {
    "s_bleu": ("s-BLEU", ".2f"),
    "d_bleu": ("d-BLEU", ".2f"),
    "tokenized_bleu": ("tokenised BLEU", ".2f"),
    "comet": ("COMET", ".4f"),
    "length_ratio": ("length ratio", ".3f"),
}


# -- reading ----------------------------------------------------------------------------------------------------------


def parse_json(text: str, where: object) -> Any:
    """Parse a JSON document.

    Raises:
        ArtifactError: naming *where*, if it is not JSON, holds NaN or an infinity, or names a key twice.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            keys = [key for key, _ in pairs]
            twice = next(key for key in keys if keys.count(key) > 1)
            raise ArtifactError(f"{where} has two entries {twice!r} in one object; delete one")
        return found

    def refuse(constant: str) -> None:
        raise ArtifactError(f"{where} holds {constant}, which is not a number; score the translations again")

    try:
        return json.loads(text, object_pairs_hook=unique, parse_constant=refuse)
    except json.JSONDecodeError as error:
        raise ArtifactError(f"{where} is not JSON: {error}") from error


def read_text(path) -> str:
    """Read a JSON file as text; raises :class:`ArtifactError` if it does not exist or is not UTF-8."""
    require_file(path, "a JSON file")
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ArtifactError(f"{path} is not UTF-8: {error}") from error


def read_results(path) -> dict[str, Any]:
    """Read a results file.

    Raises:
        ArtifactError: naming file, system and entry, if ``ap-evaluate -o`` did not write it or it was damaged since.
    """
    document = parse_json(read_text(path), path)
    with naming(path):
        _require(isinstance(document, dict) and document.get("systems"), "it has no entry 'systems'")
        _require(isinstance(document["systems"], list), "'systems' is not a list")
        lengths: list[tuple] = []
        for number, result in enumerate(document["systems"], 1):
            named = isinstance(result, dict) and isinstance(result.get("system"), str)
            _require(named, f"system {number} has no name")
            where = f"system {number} ({result['system']})"
            _require_scores(result, where)
            if spans := _buckets(result, where):
                lengths = lengths or spans
                _require(spans == lengths, f"{where}: 'by_length' has the buckets {spans}, another system {lengths}")
        names = [result["system"] for result in document["systems"]]
        _require(len(set(names)) == len(names), "it has two systems of one name")
        versions = document.get("versions")
        _require(isinstance(versions, dict) and {"torch", "fairseq"} <= versions.keys(), "it lacks 'versions'")
        _require(isinstance(document.get("device"), str), "it lacks 'device'")
        if "significance" in document:
            _require_significance(document["significance"], names)
    return document


def _require(condition: object, fault: str) -> None:
    if not condition:
        raise ArtifactError(f"{fault}; give a file that ap-evaluate -o wrote")


def _require_scores(result: Mapping[str, Any], where: str) -> None:
    _require(is_number(result.get("sentences")), f"{where} has no number of 'sentences'")
    for key in SCORES.keys() & result.keys():
        _require(is_number(result[key]), f"{where}: {key} is {result[key]!r}, not a number")
    shares = result.get("sparsity", {})
    _require(isinstance(shares, dict), f"{where}: 'sparsity' is not an object")
    for kind, share in shares.items():
        complete = isinstance(share, dict) and all(is_number(share.get(k)) for k in ("effective", "kept_mass"))
        _require(complete, f"{where}: the sparsity of {kind} lacks 'effective' or 'kept_mass'")


def _buckets(result: Mapping[str, Any], where: str) -> list[tuple]:
    """Return least and most words and the sentences of each bucket of a system; none if it was not scored by length."""
    buckets = result.get("by_length", [])
    _require(isinstance(buckets, list), f"{where}: 'by_length' is not a list")
    for bucket in buckets:
        complete = isinstance(bucket, dict) and {"least", "most", "sentences", "bleu"} <= bucket.keys()
        _require(complete and is_number(bucket["bleu"]), f"{where}: 'by_length' is damaged")
    return [(bucket["least"], bucket["most"], bucket["sentences"]) for bucket in buckets]


def _require_significance(tested: Any, names: Iterable[str]) -> None:
    parts = [tested.get(key) for key in ("signatures", "systems")] if isinstance(tested, dict) else [None]
    complete = all(isinstance(part, dict) for part in parts) and set(names) <= parts[1].keys()
    _require(complete, "'significance' does not cover every system")
    for name, compared in parts[1].items():
        values = list(compared.values()) if isinstance(compared, dict) else [None]
        complete = all(isinstance(value, dict) and is_number(value.get("p", 0)) for value in values)
        _require(complete, f"the 'significance' of {name} is damaged")


def knows_masks(result: Mapping[str, Any]) -> bool:
    """Whether a system of a results file was scored with its checkpoint; else nothing is known of its masks."""
    return bool({"checkpoint_sha256", "sparsity"} & result.keys())


def is_number(value: Any) -> bool:
    """Whether a value of a JSON document is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


# -- tables -----------------------------------------------------------------------------------------------------------


def score_table(document: dict[str, Any]) -> Table:
    """Return the scores of all systems; columns that no system has are left out.

    "pruned" is effective sparsity, "kept" is kept mass, p that of the significance test against the first system.
    """
    systems = document["systems"]
    columns = [(key, *form) for key, form in SCORES.items() if any(key in result for result in systems)]
    tested = document.get("significance", {})
    metrics = [metric for metric in METRICS if metric in tested.get("signatures", {})]
    header = ["system", *(title for _, title, _ in columns), *(f"p ({METRICS[metric].title})" for metric in metrics)]
    kinds = list(AttentionKind) if any(map(knows_masks, systems)) else []
    header += [f"{kind.value} pruned / kept" for kind in kinds]
    rows = []
    for result in systems:
        scores = [format(result[key], digits) if key in result else "-" for key, _, digits in columns]
        compared = [tested["systems"][result["system"]].get(metric, {}).get("p") for metric in metrics]
        p_values = ["-" if p is None else f"{p:.3f}" for p in compared]
        parts = [result.get("sparsity", {}).get(kind.value) for kind in kinds]
        whole = "dense" if knows_masks(result) else "-"
        shares = [whole if part is None else "{effective:.1%} / {kept_mass:.1%}".format(**part) for part in parts]
        rows.append([result["system"], *scores, *p_values, *shares])
    return Table(header, rows)


def length_tables(document: dict[str, Any]) -> list[Table]:
    """Return the table of BLEU by length of the reference; empty if nothing was scored by length."""
    scored = [result for result in document["systems"] if "by_length" in result]
    if not scored:
        return []
    header = ["BLEU by reference words"]
    for bucket in scored[0]["by_length"]:
        words = f"> {bucket['least'] - 1}" if bucket["most"] is None else f"{bucket['least']}-{bucket['most']}"
        header.append(f"{words} (n={bucket['sentences']:,})")
    rows = [[result["system"], *(f"{bucket['bleu']:.2f}" for bucket in result["by_length"])] for result in scored]
    return [Table(header, rows)]


def signatures(document: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the title and the signature of each score in the tables."""
    first = document["systems"][0]
    found = [(title, first[f"{key}_signature"]) for key, (title, _) in SCORES.items() if f"{key}_signature" in first]
    if "comet_model" in first:
        found.append(("COMET", first["comet_model"]))
    tested = document.get("significance", {}).get("signatures", {})
    return found + [(f"p ({METRICS[metric].title})", text) for metric, text in tested.items()]


def format_plain(document: dict[str, Any]) -> str:
    """Render the tables for terminals, with the signatures below."""
    lines = [f"{title} {signature}" for title, signature in signatures(document)]
    return "\n\n".join([*_rendered(document, tables.plain), "\n".join(lines)])


def format_markdown(document: dict[str, Any]) -> str:
    """Render the tables as Markdown, with device, versions and signatures below."""
    versions = document["versions"]
    made = f"{document['device']}, torch {versions['torch']}, fairseq {versions['fairseq']}"
    found = ", ".join(f"{title} `{signature}`" for title, signature in signatures(document))
    note = f"{made}; {document['systems'][0]['sentences']:,} sentences; {found}."
    return "\n\n".join([*_rendered(document, tables.markdown), note])


def format_latex(document: dict[str, Any]) -> str:
    """Render the tables as LaTeX (package booktabs), with the signatures in comments above."""
    lines = [f"% {title}: {signature}" for title, signature in signatures(document)]
    return "\n".join([*lines, *_rendered(document, tables.latex)])


def _rendered(document: dict[str, Any], render: Callable[[Table], str]) -> Iterable[str]:
    return map(render, [score_table(document), *length_tables(document)])
