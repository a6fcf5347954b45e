"""The table of a sweep's results: a row for each system, over its seeds."""

from __future__ import annotations

import re
import statistics
from collections.abc import Sequence
from typing import Any

from ap_fairseq.evaluation.tables import Table, markdown
from ap_fairseq.sites import AttentionKind

SCORES = (  # columns of the table: key of a result, name, format
    ("bleu", "BLEU", ".2f"),
    ("chrf", "chrF2", ".2f"),
    ("length_ratio", "length ratio", ".3f"),
    ("bleu_unpenalized", "BLEU without brevity penalty", ".2f"),
    ("lenpen", "length penalty", ".2f"),
    ("valid_ppl", "validation perplexity", ".2f"),
)


def title(result: dict[str, Any]) -> str:
    """Return a group's name in words, e.g. ``importance 80%, smooth 32, fine-tuned``."""
    criterion, kinds, schedule, group = (result[key] for key in ("criterion", "kinds", "schedule", "group"))
    text = {"percentile": "published percentile"}.get(criterion, criterion)
    text = f"sentence-level {text}" if group.startswith("sentence-level.") else text
    masked = criterion not in ("dense", "top-k", "threshold")
    if criterion == "threshold":
        text += f" {result['threshold']:g}" + (f", {result['log_bits']} log bits" if result.get("log_bits") else "")
    elif criterion != "dense" and kinds != "own":
        share = re.search(rf"\.{re.escape(kinds)}\.(\d+(\.\d+)?)\b", group)[1]
        text += (f" {100 * result['start']:g}% → " if result.get("start") else " ") + f"{share}%"
        text += {"global": "", "per-kind": " per kind"}.get(kinds, f" of {kinds}")
    if masked and result["granularity"] != 1:
        blocks = re.fullmatch(r"\d+(x\d+)?", str(result["granularity"]))
        text += f", blocks of {result['granularity']}" if blocks else f", {result['granularity']}"
    text += f", {result['options'].replace('--', '')}" if result["options"] else ""
    rounds = result.get("rounds", 1)
    text += {
        "untuned": ", no fine-tuning" if masked else "",
        "one-shot": ", fine-tuned",
        "scratch": ", from scratch",
        "while-training": ", while training",
        "gradual": f", gradual in {rounds} round{'s' if rounds > 1 else ''}",
    }[schedule]
    text += f", {result['flags'].replace('--', '')}" if result.get("flags") else ""
    own_updates = re.search(r"\.u(\d+)$", group)
    return text + (f", {int(own_updates[1]) / 1000:g}k updates" if own_updates else "")


def table(results: Sequence[dict[str, Any]]) -> Table:
    """Return results as a table: mean over seeds, ± sample standard deviation where they differ."""
    kinds = [kind.value for kind in AttentionKind]
    scored = [(key, name, form) for key, name, form in SCORES if any(key in result for result in results)]
    tests = {
        name: title
        for name, title in (
            ("against_dense_equal", "against dense, equal updates (p)"),
            ("against_dense", "against dense (p)"),
            ("against_dense_tuned", "against dense, fine-tuned (p)"),
        )
        if any(name in result for result in results)
    }
    updates = [key for key in ("updates", "total_updates") if all(key in result for result in results)]
    header = ["system", "seeds", *(key.replace("_", " ") for key in updates), *kinds, "all pairs", "kept mass"]
    header += [name for _, name, _ in scored]
    header += tests.values()
    rows = []
    groups: dict[tuple[str, str | None, int | None], list[dict[str, Any]]] = {}
    for result in results:
        key = result["group"], result.get("subset"), result.get("training_pairs")
        groups.setdefault(key, []).append(result)
    several, sizes = (len({key[column] for key in groups}) > 1 for column in (1, 2))
    for (_, subset, pairs), runs in groups.items():
        name = f"{title(runs[0])} ({subset})" if several else title(runs[0])
        name += f", {pairs:,} training pairs" if sizes and pairs else ""
        shares = [[r["sparsity"].get(kind, {"effective": 0.0})["effective"] for r in runs] for kind in kinds]
        shares.append([r["total"]["effective"] for r in runs])
        shares.append([r["total"]["kept_mass"] for r in runs if "kept_mass" in r["total"]])
        cells = [name, str(len(runs)), *(f"{runs[0][key]:,}" for key in updates)]
        cells += [_mean(values, ".1%") for values in shares]
        cells += [_mean([r[key] for r in runs if key in r], form) for key, _, form in scored]
        for name in tests:
            compared = [r[name]["bleu"] for r in runs if name in r]
            p_values = ", ".join(_p(test["p"]) for test in compared)
            cells.append(f"{_mean([test['difference'] for test in compared], '+.2f')} ({p_values})" if compared else "")
        rows.append(cells)
    return Table(header, rows)


def note(results: Sequence[dict[str, Any]]) -> str:
    """Return what stands below the table: what made the results, and the signatures of the scores."""
    first = results[0]
    made = f"{first['device']}, torch {first['versions']['torch']}"
    if "bleu" in first:
        made = (
            f"{first['sentences']:,} texts, beam {first['search']['beam']}, {made}; BLEU `{first['bleu_signature']}`, "
            f"chrF2 `{first['chrf_signature']}`; differences in BLEU with sacreBLEU's paired bootstrap, one p for each "
            "seed"
        )
    return f"Shares of pairs are effective sparsity; {made}."


def format_table(results: Sequence[dict[str, Any]]) -> str:
    """Render the table as Markdown, with the note below."""
    return f"{markdown(table(results))}\n\n{note(results)}"


def _mean(values: Sequence[float], form: str) -> str:
    if not values:
        return ""
    text = format(statistics.fmean(values), form)
    alike = len({format(value, form) for value in values}) == 1
    return text if alike else f"{text} ± {format(statistics.stdev(values), form.lstrip('+'))}"


def _p(value: float) -> str:
    return "p < 0.001" if value < 0.001 else f"p = {value:.3f}"
