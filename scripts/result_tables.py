"""The tables of READMEs, from the committed results: `tables` says what makes each of them."""

from __future__ import annotations

import importlib.util
import json
import math
import re
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ap_fairseq.evaluation.results import format_markdown
from ap_fairseq.evaluation.tables import Table, markdown
from ap_fairseq.sites import AttentionKind

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ROOT / "scripts"
EXAMPLE = ROOT / "examples" / "libreoffice_help"
RESULTS = EXAMPLE / "results"
DEBIAN_RESULTS = ROOT / "examples" / "debian_text" / "results"
LM_RESULTS = ROOT / "examples" / "language_model" / "results"
DIGEST = (  # of the results by system
    r"^dense\.(untuned|one-shot|scratch)"
    r"|^importance\.global\.(80|90)\.g1\.smooth-32\.(one-shot|scratch|from-80)|^importance\.global\.80\.g16.*one-shot"
    r"|^(mean|window|gaussian|random)\.global\.(80|90)\.g1\.one-shot|^gaussian.*scratch|^percentile.*one-shot"
    r"|^top-k\.global\.(80|90)"
)


def load(path: Path) -> Any:
    """Return the document of a JSON file, or a list of those of a JSON-lines file."""
    text = path.read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()] if path.suffix == ".jsonl" else json.loads(text)


def script(path: Path) -> Any:
    """Import a script, which is in no package."""
    sys.path.insert(0, str(path.parent))  # scripts import each other
    try:
        spec = importlib.util.spec_from_file_location(path.stem, path)
        module = sys.modules[path.stem] = importlib.util.module_from_spec(spec)  # dataclasses look their module up
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(path.parent))
    return module


def lookup(document: Any, key: str) -> float:
    """Return the number that *key* selects; ``mean:KEY`` is the mean of several, ``first:KEY`` the first of them.

    Raises:
        KeyError: if nothing matches, or several numbers where neither was asked for.
    """
    wanted = re.fullmatch(r"(?:(mean|first):)?(.*)", key)
    values = [document]
    for part in wanted[2].split("/"):
        if "=" in part:
            fields = dict(condition.split("=", 1) for condition in part.split("&"))
            values = [
                item for value in values for item in value if all(str(item.get(k)) == v for k, v in fields.items())
            ]
        else:
            values = [value[int(part)] if isinstance(value, list) else value[part] for value in values]
    if not values:
        raise KeyError(f"nothing matches {key}")
    if len(values) > 1 and not wanted[1]:
        raise KeyError(f"{len(values)} numbers match {key}; add conditions, or ask for mean:KEY or first:KEY")
    return statistics.fmean(values) if wanted[1] == "mean" else values[0]


def quality(pair: str) -> str:
    """All systems of a language pair that the maintainers measured."""
    rows = [row for row in load(RESULTS / "en-fr-es.json")["rows"] if row["pair"] == pair]
    scores = {"BLEU": ("bleu", ".2f"), "chrF2": ("chrf", ".2f"), "length ratio": ("length_ratio", ".3f")}
    scores |= {"validation perplexity": ("valid_ppl", ".2f")}
    scores = {title: score for title, score in scores.items() if any(score[0] in row for row in rows)}
    body = []
    for row in rows:
        columns = [row["system"], row["dropout"], f"{row['updates']:,}", f"{row['pruned']:.0%}"]
        body.append(columns + [format(row[key], form) if key in row else "" for key, form in scores.values()])
    header = ["system", "dropout", "updates", "pairs pruned", *scores]
    return markdown(Table(header, body, align="ll" + "r" * (len(header) - 2)))


def quality_digest() -> str:
    """The rows of the main README: dense models and pruned ones of the same recipe and updates, on two corpora."""
    header = ["training text", "pairs", "pruned", "seeds", "BLEU", "chrF2", "length ratio"]
    scores = (("bleu", ".2f"), ("chrf", ".2f"), ("length_ratio", ".3f"))
    rows = []
    names = {"global": ""} | {kind.value: f" of {kind.flag}" for kind in AttentionKind}
    kinds = "|".join(kind.value for kind in AttentionKind)
    for text, path, wanted in (
        ("LibreOffice's help", RESULTS / "longer.jsonl", r"dense\.|importance\.(global)\.(90)\."),
        (
            "Debian text",
            DEBIAN_RESULTS / "longer.jsonl",
            r"dense\.scratch\.dropout-0\.2-|importance\.(global)\.([89]0)\.g1\.",
        ),
        # with attention dropout
        ("Debian text", DEBIAN_RESULTS / "masks.jsonl", rf"importance\.({kinds})\.(90)\.g1\.smooth-32\.while"),
    ):
        groups: dict[str, list[dict[str, Any]]] = {}
        for line in load(path):
            groups.setdefault(line["group"], []).append(line)
        for group, lines in groups.items():
            if found := re.match(wanted, group):
                pruned = f"{found[2] or 0}%{names[found[1] or 'global']}"
                rows.append((text, lines[0]["training_pairs"], pruned, lines))
    body = [
        [text, f"{pairs:,}", pruned, str(len(lines))]
        + [f"{statistics.fmean(line[key] for line in lines):{form}}" for key, form in scores]
        for text, pairs, pruned, lines in rows
    ]
    return markdown(Table(header, body, align="lrlrrrr"))


def one_command_systems() -> list[dict[str, Any]]:
    """Systems that were pruned while training, after the dense one."""
    return load(RESULTS / "one-command.json")["systems"]


def one_command() -> str:
    """Pruning while training against the dense model of the same recipe and updates."""
    header = ["pruned", *(kind.value for kind in AttentionKind), "BLEU", "chrF2", "length ratio", "p of BLEU"]
    body = []
    for s in one_command_systems():
        shares = [f"{s['pruned'][kind.value]:.0%}" for kind in AttentionKind]
        scores = [f"{s['bleu']:.2f}", f"{s['chrf']:.2f}", f"{s['length_ratio']:.3f}", f"{s.get('p_bleu', '')}"]
        body.append([s["system"], *shares, *scores])
    return markdown(Table(header, body))


def dropout() -> str:
    """Dense and 80% pruned at the same number of own updates, by the strength of regularisation."""
    rows = []
    for dropout, updates in (("0.2 / 0 / 0", 6000), ("0.2 / 0 / 0", 12000), ("0.3 / 0.1 / 0.1", 12000)):
        found = {
            row["system"]: row["bleu"]
            for row in load(RESULTS / "en-fr-es.json")["rows"]
            if (row["pair"], row["dropout"], row["updates"]) == ("en-fr", dropout, updates)
        }
        rows.append(("en-fr", dropout, "from scratch", updates, found["dense"], found["importance 80%, from scratch"]))
    lines = load(RESULTS / "h100-converged.jsonl")
    groups = ("dense.untuned", "importance.global.80.g1.smooth-32.scratch")
    rows.append(
        ("en-de", "0.2 / 0 / 0", "from scratch", 6000, *(lookup(lines, f"mean:group={name}/bleu") for name in groups))
    )
    corpora = {"LibreOffice's help": RESULTS / "regularisation.jsonl", "Debian text": DEBIAN_RESULTS / "tuned.jsonl"}
    dense, pruned, *_ = one_command_systems()
    rows = [("LibreOffice's help", *row) for row in rows]
    for corpus, path in corpora.items():
        found: dict[str, dict[str, float]] = {}
        for line in load(path):
            if line["total"]["effective"] < 0.85:
                strengths = dict(re.findall(r"--(\S+) (\S+)", line["flags"]))
                names = ("dropout", "attention-dropout", "activation-dropout")
                strength = " / ".join(strengths.get(name, "0") for name in names)
                found.setdefault(strength, {})[line["criterion"]] = line["bleu"]
        if path.parent == RESULTS:
            found["0.3 / 0.1 / 0.1"] = {"dense": dense["bleu"], "importance": pruned["bleu"]}
        for strength, bleu in sorted(found.items()):
            settings = (corpus, "en-de", strength, "while training", dense["updates"])
            rows.append((*settings, bleu["dense"], bleu["importance"]))
    header = ["corpus", "pair", "dropout", "80% pruned", "updates", "dense, BLEU", "80%, BLEU", "difference"]
    body = [
        [*names, f"{updates:,}", f"{dense:.2f}", f"{pruned:.2f}", f"{pruned - dense:+.2f}"]
        for *names, updates, dense, pruned in rows
    ]
    return markdown(Table(header, body, align="llllrrrr"))


def split_pairs(example: str) -> str:
    """Training, validation and test pairs by source of the text, or by language."""
    columns = load(ROOT / "examples" / example / "results" / "corpus.json")["pairs"]
    header = ["", *(f"{name}, {split}" for name in columns for split in ("train", "valid", "test"))]
    names = list(dict.fromkeys(name for splits in columns.values() for part in splits.values() for name in part))
    splits = [part for found in columns.values() for part in found.values()]
    body = [[name, *(f"{part.get(name, 0):,}" for part in splits)] for name in names]
    body.append(["all", *(f"{sum(part.values()):,}" for part in splits)])
    return markdown(Table(header, body))


def cross_masks() -> str:
    """Masks of cross-attention, alone and with the other kinds, on a small model."""
    report = load(RESULTS / "cross-masks.json")
    dense, runs = report["dense"], report["runs"]
    header = ["budget", "cross-attention by", "most heads for one", "always kept", "cross pruned", "perplexity"]
    body = [["none: dense", "", "", "", "0%", f"{dense['valid_ppl']:.2f}", "0"]]
    first = [run for run in runs if run["seed"] == 1]
    for run in sorted(first, key=lambda run: (budget_of(run), -run["valid_ppl"])):
        losses = [f"{run['valid_ppl']:.2f}", f"{run['valid_nll'] - dense['valid_nll']:.2f}"]
        body.append([*cross_mask(run), f"{run['pruned']['cross']:.1%}", *losses])
    by_row: dict[str, list[float]] = {}
    for run in runs:
        row = str([run.get(key) for key in ("flags", "kept", "note", "annealed")])
        by_row.setdefault(row, []).append(run["valid_nll"])
    spread = max(max(losses) - min(losses) for losses in by_row.values())
    table = markdown(Table([*header, "bits above dense"], body, align="llllrrr"))
    return f"{table}\n\nFirst of the seeds; another one moves a row by at most {spread:.2f} bits."


def budget_of(run: dict[str, Any]) -> list[str]:
    """The flag of a run's budget and its share."""
    return run["flags"].replace("--criterion importance ", "").split()[:2]


def cross_mask(run: dict[str, Any]) -> list[str]:
    """Budget, what ranks, how many heads may keep the same, and what every row keeps, from the flags of a run."""
    flags, (budget, share) = run["flags"], budget_of(run)
    scaled, cap = "scaled-diagonal" in flags, re.search(r"--max-heads (?:cross=)?(\S+)", flags)
    units = "offset" if scaled else "cell"
    units += ", mean attention" if "--criterion mean" in flags else ""
    units += f", annealed over {run['annealed']['updates']}" if "annealed" in run else ""
    heads = f"{cap[1]} of the {'8' if '-of kind' in flags else '4 of a layer'}" if cap else "any"
    kept = "column 0" if not scaled else "own anchors" if cap and "note" not in run else "offset 0"
    kinds = "cross" if budget == "--cross" else "all kinds"
    return [f"{kinds} {float(share):.0%}", units, heads, run.get("kept", kept)]


def cross_heads() -> str:
    """Perplexity of a model of eight heads by budget and by how many heads of a layer may keep an offset."""
    found = {
        (run["total"], run["max_heads"]): run["valid_ppl"]
        for run in load(RESULTS / "cross-masks.json")["eight_heads"]["runs"]
    }
    caps = sorted({cap for _, cap in found})
    header = ["budget of all kinds", *(str(cap) if cap else "any" for cap in caps)]
    budgets = sorted({budget for budget, _ in found})
    cells = [[f"{found[b, cap]:.2f}" if (b, cap) in found else "" for cap in caps] for b in budgets]
    return markdown(Table(header, [[f"{b:.0%}", *row] for b, row in zip(budgets, cells, strict=True)]))


def corpus() -> str:
    """Sizes of the corpus for each language pair."""
    pairs = load(RESULTS / "corpus.json")["pairs"]
    names = next(iter(pairs.values()))
    cells = (
        [f"{counts[name]:,}" if isinstance(counts[name], int) else counts[name] for counts in pairs.values()]
        for name in names
    )
    return markdown(Table(["", *pairs], [[name, *row] for name, row in zip(names, cells, strict=True)]))


def rivals_translation() -> str:
    """Target tokens per second, with stock fairseq and CTranslate2."""
    report = load(SCRIPTS / "rivals.json")["translation"]
    header = ["tokens/s", "stock fairseq", "all-ones mask", "90% pruned", "CTranslate2", "memory, ours / CTranslate2"]
    rows = []
    for row in report["rows"]:
        rates = (f"{row[key]:,}" for key in ("stock", "all_ones", "pruned_90", "ctranslate2"))
        rows.append([row["case"], *rates, f"{row['memory_gib']} / {row['ctranslate2_memory_gib']} GiB"])
    return markdown(Table(header, rows))


def head_sizes() -> str:
    """Our kernels on heads of several sizes, against our Triton kernels, and rivals against ours in a run with them."""
    sizes, rivals = load(SCRIPTS / "kernels.h200.json")["sizes"], load(SCRIPTS / "bench_attention.h200-heads.json")

    def case(row: dict[str, Any]) -> tuple:
        return tuple(row.get(name) for name in ("method", "dim", "block", "nominal_sparsity", "direction"))

    def problem(row: dict[str, Any]) -> tuple:
        return row["block"], round(row["sparsity"], 1), row["direction"]

    times = {case(row): row.get("median_ms") for row in rivals["rows"]}
    usual = {problem(row): row["tflops"] for row in sizes["rows"] if row["dim"] == 64}
    body = []
    for row in sorted(sizes["rows"], key=lambda row: row["dim"]):
        share = row["tflops"] / usual[problem(row)]
        cells = [str(row["dim"]), f"{row['sparsity']:.1%}", str(row["block"]), row["direction"]]
        cells += [f"{row['ms']:.3g}", f"{row['tflops']:.0f}", f"{share:.2f}", f"{row['gluon']:.2f}"]
        for method in ("fa4", "cudnn sparse"):
            rival, ours = (times.get((name, row["dim"], *problem(row))) for name in (method, "ours"))
            cells.append(f"{rival / ours:.2f}" if rival and ours else "")
        body.append(cells)
    header = ["elements", "sparsity", "block", "direction", "ours, ms", "TFLOP/s", "share of the rate at 64", "Gluon"]
    header += ["FlashAttention-4", "cuDNN, block-sparse"]
    table = markdown(Table(header, body, align="rrrl" + "r" * 6))
    return f"{sizes['device']}, torch {sizes['torch']}, triton {sizes['triton']}, commit {sizes['commit']}\n\n{table}"


def kinds() -> str:
    """BLEU with one kind pruned, by share and training."""
    bleu = {line["group"]: line["bleu"] for line in load(RESULTS / "h100-converged.jsonl") if line["seed"] == 1}
    shares = (50, 80, 90, 95)
    rows = []
    for kind in AttentionKind:
        name = f"importance.{kind.value}.{{}}.g1.smooth-32.{{}}"
        cells = (" / ".join(f"{bleu[name.format(s, how)]:.1f}" for how in ("untuned", "one-shot")) for s in shares)
        rows.append([kind.value, *cells])
    return markdown(Table(["pruned", *(f"{share}%" for share in shares)], rows))


def language_models(file: Path) -> str:
    """Test perplexities of language models: means over the seeds, and standard deviations where there are several."""
    ways = {"scratch": "under the masks from the start", "gradual": "pruned while training"}
    blocks = {"1": "cells", "64": "64-blocks", "diagonal": "diagonals", "head": "heads"}

    def over_seeds(rows: list[dict[str, Any]], key: str, form: str) -> str:
        values = [row[key] for row in rows]
        spread = f" ± {statistics.stdev(values):{form.lstrip('+z')}}" if len({*values}) > 1 else ""
        return f"{statistics.fmean(values):{form}}{spread}"

    document, systems = load(file), {}
    for row in document["rows"]:
        systems.setdefault(row["system"], []).append(row)
    body = []
    for system, rows in systems.items():
        way, masks = system.replace(".dropout-", ", dropout "), ""
        if not way.startswith("dense"):
            criterion, percent, granularity, way = way.split(".")
            way, masks = ways[way], blocks[granularity.removeprefix("g")]
            published = f", published percentile at nominal {percent}%"
            masks = {"importance": masks, "percentile": masks + published, "window": "a window"}[criterion]
        seeds = ", ".join(str(row.get("seed", document.get("seed"))) for row in rows)
        scores = [over_seeds(rows, "perplexity", ".1f"), over_seeds(rows, "change", "+z.1%")]
        body.append([way, masks, f"{rows[0]['pruned']:.0%}", seeds, *scores])
    return markdown(Table(["system", "masks", "pairs pruned", "seeds", "perplexity", "change"], body, align="llrrrr"))


def completed(line: dict[str, Any], dense_updates: int) -> dict[str, Any]:
    """Return a line of a sweep with what older ones do not state: all its updates, BLEU without brevity penalty."""
    own = line["schedule"] == "while-training" or (line["criterion"], line["schedule"]) == ("dense", "scratch")
    before = 0 if own else dense_updates * (2 if line["start"] else 1)  # the dense model, and the system it starts from
    penalty = math.exp(min(0.0, 1 - 1 / line["length_ratio"]))
    return {"total_updates": before + line["updates"], "bleu_unpenalized": line["bleu"] / penalty} | line


def sweep(path: Path, keep: Callable[[dict[str, Any]], Any] = bool, dense_updates: int = 0) -> str:
    """Some systems of a sweep, dense ones first, without the columns of kinds.

    dense_updates: of the dense models, where lines do not state all updates behind a system.
    """
    lines = [completed(line, dense_updates) for line in load(path) if keep(line)]
    flags = [re.findall(r"--\S+(?: (?!--)\S+)*", line.get("flags", "")) for line in lines]
    common = set(flags[0]).intersection(*flags)  # said beside the table
    own = [" ".join(flag for flag in found if flag not in common) for found in flags]
    lines = [line | {"flags": text} for line, text in zip(lines, own, strict=True)]
    order = {"dense": 0, "importance": 1}
    lines.sort(key=lambda line: (line["subset"], order.get(line["criterion"], 2)))
    module = script(ROOT / "examples" / "common" / "sweep_table.py")
    whole = module.table(lines)
    dropped = {*(kind.value for kind in AttentionKind), "against dense (p)", "updates"}
    kept = [column for column, title in enumerate(whole.header) if title not in dropped]
    rows = [[row[column] for column in kept] for row in whole.rows]
    return f"{markdown(Table([whole.header[column] for column in kept], rows))}\n\n{module.note(lines)}"


def sweep_parts(path: Path) -> str:
    """BLEU of each part of a sweep's test set, and the mean of the parts."""
    lines = sorted(load(path), key=lambda line: line["criterion"] != "dense")
    module = script(ROOT / "examples" / "common" / "sweep_table.py")
    parts = lines[0]["parts"]
    rows = [[name, f"{parts[name]['sentences']:,}", *(line["parts"][name]["bleu"] for line in lines)] for name in parts]
    means = [statistics.fmean(column) for column in list(zip(*rows, strict=True))[2:]]
    rows.append(["mean", "", *means])
    header = ["BLEU", "test pairs", *(module.title(line) for line in lines)]
    body = [[name, pairs, *(f"{bleu:.2f}" for bleu in scores)] for name, pairs, *scores in rows]
    return markdown(Table(header, body))


def tables() -> dict[str, Callable[[], str]]:
    """Return what makes each table, by the name in its mark."""
    converged, pages = (RESULTS / f"h100-{name}.jsonl" for name in ("converged", "pages"))
    made = {
        "en-fr": lambda: quality("en-fr"),
        "en-es": lambda: quality("en-es"),
        "digest": quality_digest,
        "one-command": one_command,
        "help-longer": lambda: sweep(RESULTS / "longer.jsonl"),
        "help-seeds": lambda: sweep(RESULTS / "seeds.jsonl"),
        "cross-masks": cross_masks,
        "cross-heads": cross_heads,
        "dropout": dropout,
        "debian-seeds": lambda: sweep(DEBIAN_RESULTS / "seeds.jsonl"),
        "debian-longer": lambda: sweep(DEBIAN_RESULTS / "longer.jsonl"),
        "debian-longest": lambda: sweep(DEBIAN_RESULTS / "longest.jsonl"),
        "debian-shapes": lambda: sweep(DEBIAN_RESULTS / "shapes.jsonl"),
        "debian-tuned": lambda: sweep(DEBIAN_RESULTS / "tuned.jsonl"),
        "debian-rate-heads": lambda: sweep(DEBIAN_RESULTS / "rate-heads.jsonl"),
        "debian-masks": lambda: sweep(DEBIAN_RESULTS / "masks.jsonl"),
        "debian-text": lambda: split_pairs("debian_text"),
        "package-sections": lambda: script(ROOT / "examples" / "package_sections" / "run.py").summary(
            load(ROOT / "examples" / "package_sections" / "results" / "cpu.json")["rows"]
        ),
        "one-to-many": lambda: split_pairs("libreoffice_one_to_many"),
        "h100-converged-digest": lambda: sweep(converged, lambda line: re.search(DIGEST, line["system"]), 6000),
        "h100-converged-kinds": kinds,
        "h100-pages-digest": lambda: sweep(pages, lambda line: line["subset"] in ("test", "test2"), 5000),
        "empty-rows": lambda: sweep(RESULTS / "empty-rows.jsonl"),
        "pages-tuned": lambda: sweep(RESULTS / "pages-tuned.jsonl"),
        "corpus": corpus,
        "cpu": lambda: format_markdown(load(RESULTS / "cpu.json")),
        "rivals.translation": rivals_translation,
    }
    without_table = {LM_RESULTS / f"{name}.json" for name in ("corpus", "cpu-updates")}
    for path in sorted({*LM_RESULTS.glob("*.json")} - without_table):
        made[f"language-model.{path.stem}"] = lambda path=path: language_models(path)
    one_to_many = ROOT / "examples" / "libreoffice_one_to_many" / "results"
    for path in sorted(one_to_many.glob("*.jsonl")):
        made[f"one-to-many.{path.stem}"] = lambda path=path: sweep(path)
    made["one-to-many.tuned-languages"] = lambda: sweep_parts(one_to_many / "tuned.jsonl")
    for path in sorted(SCRIPTS.glob("*_*.*.json")):
        name = path.name.split(".")[0]
        made[path.stem] = lambda path=path, name=name: script(SCRIPTS / f"{name}.py").table(load(path))
    made["bench_attention.h200-heads"] = head_sizes
    return made
