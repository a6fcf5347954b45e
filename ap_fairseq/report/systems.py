"""Translation scores (ap-evaluate, sweeps), read and grouped into curves."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from scipy import stats as distributions

from ap_fairseq.evaluation import scores
from ap_fairseq.evaluation.results import is_number, knows_masks, parse_json, read_text
from ap_fairseq.files import ArtifactError
from ap_fairseq.sites import AttentionKind

VARIANTS = {"untuned": "no fine-tuning", "tuned": "fine-tuned", "scratch": "from scratch"}
UNKNOWN = "–"  # the series of systems that were scored without their checkpoints: dense or pruned
METRICS = {scores.METRICS[key].title: key for key in ("bleu", "chrf")}  # title -> field of a results file


@dataclass(frozen=True)
class Interval:
    """A 95% confidence interval; ``source`` says how it was estimated."""

    low: float
    high: float
    source: str


@dataclass(frozen=True)
class System:
    """One scored system.

    Attributes:
        name: as in the results file.
        series: the curve it belongs to: criterion, kinds, granularity and variant; None for a dense system,
            :data:`UNKNOWN` for one without a checkpoint.
        variant: its schedule, or the part of its name after the last point (such as ``tuned``), or "".
        pruned: the kinds with a budget or, where no budgets are given, with pruned pairs.
        sparsity: effective sparsity of each kind, in [0, 1]; empty if the file only gives the total.
        total: effective sparsity over the kinds that the system prunes, in [0, 1]; None where nothing is known of it.
        scores: {"BLEU": ..., "chrF2": ...}, 0 to 100.
        half_widths: half of the 95% bootstrap interval over test sentences, where the file holds it (``ap-evaluate
            --significance bootstrap``).
        signatures: sacreBLEU signatures.
        seed: of the training run, if known.
        settings: its other settings, e.g. ``smooth 32``; neither budgets nor the seed.
    """

    name: str
    series: str | None
    variant: str
    pruned: list[str]
    sparsity: dict[str, float]
    total: float | None
    scores: dict[str, float]
    half_widths: dict[str, float] = field(default_factory=dict)
    signatures: dict[str, str] = field(default_factory=dict)
    seed: int | None = None
    settings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Point:
    """A series' mean score at one effective sparsity, named after the first run."""

    sparsity: float
    score: float
    interval: Interval | None
    runs: int
    name: str


def read_systems(path, pairs: Mapping[str, int]) -> list[System]:
    """Read the systems of a results file.

    Accepts what ``ap-evaluate -o`` writes (an object with ``systems`` and perhaps ``significance``), a list of such
    systems, or JSON lines with one system each, as sweeps write them. A system has ``system``, either ``bleu`` and
    ``chrf`` or ``scores: {"BLEU": {"score": ..., "ci": half of the 95% interval}, "chrF2": {...}}``. A pruned one has
    ``spec`` or ``criterion``, and ``sparsity`` ({kind: {"effective": ...}}, with ``total`` beside it) or
    ``effective_sparsity`` (a number, or {kind: number, "total": number}); a dense one has ``checkpoint_sha256`` or
    criterion ``dense``, which with a ``schedule`` other than ``untuned`` is a dense system that was fine-tuned.

    Args:
        pairs: recorded pairs of each kind over all heads, the weights of the kinds in the total.

    Raises:
        ArtifactError: if the file is anything else; the message names file, system and field.
    """
    return [_system(record, f"{path}, system {index + 1}", pairs) for index, record in enumerate(_records(path))]


def _records(path) -> list[Any]:
    text = read_text(path)
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if len(lines) > 1 and _is_json(lines[0][1]):
        document = [parse_json(line, f"{path}, line {number}") for number, line in lines]
    else:
        document = parse_json(text, path)
    if isinstance(document, dict):
        tested = _object(document, "significance", path)
        document = document.get("systems", [document])
        for record in document if isinstance(document, list) else []:
            name = record.get("system") if isinstance(record, dict) else None
            if isinstance(name, str):
                found = _object(_object(tested, "systems", path), name, path)
                for key in found:
                    record.setdefault(f"{key}_ci", _object(found, key, path).get("ci95"))
    if not isinstance(document, list) or not document:
        raise ArtifactError(f"{path} holds no systems; give a file that ap-evaluate -o wrote")
    return document


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except json.JSONDecodeError:
        return False
    return True


def _object(parent: Mapping[str, Any], key: str, where: object) -> Mapping[str, Any]:
    """Return the object at *key*, an empty one if there is none."""
    value = parent.get(key)
    if not isinstance(value, dict | None):
        raise ArtifactError(f"{where}: {key} is {value!r}, expected an object; give a file that ap-evaluate -o wrote")
    return value or {}


def _system(record: Any, where: str, pairs: Mapping[str, int]) -> System:
    if not isinstance(record, dict) or not isinstance(record.get("system"), str):
        raise ArtifactError(f"{where} has no name in 'system'; give a file that ap-evaluate -o wrote")
    name = record["system"]
    where = f"{where} ({name})"
    scores, half_widths, signatures = {}, {}, {}
    for metric, key in METRICS.items():
        nested = _object(_object(record, "scores", where), metric, where)
        scores[metric] = read_number(record.get(key, nested.get("score")), f"{where}: {key}", 100)
        signature = record.get(f"{key}_signature", nested.get("signature"))
        if signature is not None:
            signatures[metric] = str(signature)
        half_width = record.get(f"{key}_ci", nested.get("ci"))
        if half_width is not None:
            half_widths[metric] = read_number(half_width, f"{where}: {key}_ci", 100)
    sparsity, total = _sparsity(record, where)
    pruned = _pruned_kinds(record, sparsity)
    weights = {kind: pairs[kind] for kind in pruned if kind in pairs}
    if weights:
        total = sum(weight * sparsity[kind] for kind, weight in weights.items()) / sum(weights.values())
    elif total is None and (knows_masks(record) or _spec(record).get("criterion") == "dense"):
        total = 0.0
    variant = str(record.get("schedule") or (name.rpartition(".")[2] if "." in name else ""))
    series = _series(record, sparsity, pruned, variant)
    seed, settings = record.get("seed"), _settings(record)
    if not isinstance(seed, int | str | None):
        raise ArtifactError(f"{where}: seed is {seed!r}, expected a number")
    return System(name, series, variant, pruned, sparsity, total, scores, half_widths, signatures, seed, settings)


def read_number(value: Any, where: str, most: float) -> float:
    """Return *value*, which must be a number from 0 to *most*; the error begins with *where*."""
    if not is_number(value) or not 0 <= value <= most:
        raise ArtifactError(f"{where} is {value!r}, expected a number from 0 to {most:g}")
    return float(value)


def _sparsity(record: dict, where: str) -> tuple[dict[str, float], float | None]:
    """Return the effective sparsity of each kind, and the total, as far as they are given."""
    given = record.get("effective_sparsity")
    if given is None:
        parts = {**_object(record, "sparsity", where), "total": record.get("total")}
        given = {name: part.get("effective") if isinstance(part, dict) else part for name, part in parts.items()}
    if not isinstance(given, dict):
        return {}, read_number(given, f"{where}: effective_sparsity", 1)
    sparsity = {
        kind.value: read_number(given[kind.value], f"{where}: effective sparsity of {kind.value}", 1)
        for kind in AttentionKind
        if given.get(kind.value) is not None
    }
    total = given.get("total")
    return sparsity, None if total is None else read_number(total, f"{where}: total effective sparsity", 1)


def _spec(record: dict) -> dict[str, Any]:
    """Return how the masks were made: the whole of it, as ap-evaluate writes, or the criterion, as sweeps write."""
    spec = record.get("spec")
    return spec if isinstance(spec, dict) else {"criterion": record.get("criterion")}


def _pruned_kinds(record: dict, sparsity: Mapping[str, float]) -> list[str]:
    budgets = _spec(record).get("budgets")
    return [kind for kind in sparsity if (budgets.get(kind, 0) > 0 if budgets else sparsity[kind] > 0)]


def _series(record: dict, sparsity: Mapping[str, float], pruned: list[str], variant: str) -> str | None:
    spec = _spec(record)
    criterion = spec.get("criterion")
    if criterion is None and not pruned:
        return None if knows_masks(record) else UNKNOWN
    if criterion == "dense" and record.get("schedule", "untuned") == "untuned":
        return None
    if criterion == "dense" or (sparsity and not pruned):
        parts = ["no pruning"]
    else:
        parts = [str(criterion or "unnamed criterion")]
        parts += ["global budget"] if record.get("kinds") == "global" else []
        parts += [] if len(pruned) == len(sparsity) else ["+".join(pruned) + " only"]
        granularity = spec.get("granularity", record.get("granularity", 1))
        if isinstance(granularity, dict):
            granularity = ",".join(f"{kind}={size}" for kind, size in granularity.items())
        parts += [] if granularity == 1 else [f"granularity {granularity}"]
        parts += [record["options"]] if record.get("options") else []
    return ", ".join(parts + ([VARIANTS.get(variant, variant)] if variant else []))


def _settings(record: dict) -> tuple[str, ...]:
    """Return the settings of a system that neither its series nor its budgets and seed say."""
    given = {key: record.get(key) for key in ("log_bits", "updates", "subset")}
    given["rounds"] = record.get("rounds") if record.get("schedule") == "gradual" else None
    spec = _spec(record)
    given |= {key: spec[key] for key in spec.keys() - {"criterion", "granularity", "budgets", "seed"}}
    return tuple(f"{key.replace('_', ' ')} {value}" for key, value in sorted(given.items()) if value)


def curves(systems: Iterable[System], metric: str) -> dict[str | None, list[Point]]:
    """Return each series' points in order of effective sparsity; systems that differ in their seed alone are one point.

    A series whose systems differ in other settings becomes several, named by what differs. Effective sparsity is
    measured, so one budget gives slightly different ones: runs of a point lie within half a percentage point.

    The interval of several runs is Student's t interval of their mean; of a single run, the bootstrap interval over
    test sentences if the results file holds it.
    """
    groups: dict[str | None, dict[tuple[str, ...], list[System]]] = defaultdict(lambda: defaultdict(list))
    for system in systems:
        groups[system.series][system.settings if system.series not in (None, UNKNOWN) else ()].append(system)
    result: dict[str | None, list[Point]] = {}
    for series, by_settings in groups.items():
        shared = set.intersection(*map(set, by_settings))
        for settings, members in by_settings.items():
            own = [text for text in settings if text not in shared]
            name = ", ".join([series, *own]) if series else None
            result[name] = [_point(runs, metric) for runs in _points(members)]
    return result


def _points(systems: Iterable[System]) -> list[list[System]]:
    """Put systems of different seeds and nearly the same sparsity together, in ascending order of sparsity."""
    points: list[list[System]] = []
    for system in sorted(systems, key=_place):
        others = [
            runs
            for runs in points
            if _place(system) - _place(runs[0]) <= 0.005 and all(run.seed not in (None, system.seed) for run in runs)
        ]
        if others and system.seed is not None:
            others[-1].append(system)
        else:
            points.append([system])
    return points


def _point(runs: list[System], metric: str) -> Point:
    values = np.array([run.scores[metric] for run in runs])
    mean = float(values.mean())
    interval = None
    if len(runs) > 1:
        half = float(distributions.t.ppf(0.975, len(runs) - 1) * values.std(ddof=1) / math.sqrt(len(runs)))
        interval = Interval(mean - half, mean + half, f"Student t over {len(runs)} runs")
    elif metric in runs[0].half_widths:
        half = runs[0].half_widths[metric]
        interval = Interval(mean - half, mean + half, "bootstrap over test sentences")
    return Point(float(np.mean([_place(run) for run in runs])), mean, interval, len(runs), runs[0].name)


def _place(system: System) -> float:
    """Where a system lies along its series: those of unknown sparsity are lines that have no place."""
    return 0.0 if system.total is None else system.total
