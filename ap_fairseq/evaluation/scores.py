"""Score translations with sacreBLEU: metrics and significance tests, with their signatures.

Every function takes detokenised hypotheses (:mod:`ap_fairseq.evaluation.hypotheses`), as lists of one text per line of
the reference.
"""

from __future__ import annotations

import importlib
import itertools
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sacrebleu.metrics import BLEU, CHRF, TER
from sacrebleu.significance import PairedTest

from ap_fairseq.files import ArtifactError, UserError


class Metric(NamedTuple):
    """A metric of sacreBLEU and its title in tables."""

    title: str
    make: Callable[[], Any]


METRICS = {"bleu": Metric("BLEU", BLEU), "chrf": Metric("chrF2", CHRF), "ter": Metric("TER", TER)}
SIGNIFICANCE_TESTS = {"bootstrap": "bs", "randomization": "ar"}  # as sacreBLEU's --paired-bs and --paired-ar
TOKENIZED_BLEU = ("cased", "lowercased", "compound-split")
LENGTH_BUCKETS = (10, 20, 30, 40, 60)

_COMPOUND = re.compile(r"(\S)-(\S)")


def require_parallel(name: str, hypotheses: Sequence[str], references: Sequence[str]) -> None:
    """Raise :class:`ArtifactError` unless there is one hypothesis for each reference, and at least one."""
    if len(hypotheses) != len(references):
        raise ArtifactError(
            f"{name}: {len(hypotheses)} hypotheses for {len(references)} references; give both of the same data set, "
            "one sentence a line"
        )
    if not references:
        raise ArtifactError(f"{name}: nothing to score, hypotheses and references are empty")


def score(
    hypotheses: Sequence[str], references: Sequence[str], metrics: Sequence[str] = ("bleu", "chrf")
) -> dict[str, Any]:
    """Score detokenised hypotheses against one reference each.

    Args:
        metrics: names from :data:`METRICS`.

    Returns:
        For each metric its score (0-100; TER may exceed 100, and lower is better) and ``<metric>_signature``; with
        ``bleu`` also ``length_ratio``, the hypothesis length over the reference length as sacreBLEU counts tokens, and
        ``bleu_unpenalized``, BLEU without its brevity penalty; and the number of ``sentences``.

    Raises:
        ArtifactError: if the numbers of sentences differ.
    """
    require_parallel("score", hypotheses, references)
    result: dict[str, Any] = {"sentences": len(hypotheses)}
    for name in metrics:
        metric = METRICS[name].make()
        value = metric.corpus_score(list(hypotheses), [list(references)])
        result[name] = value.score
        result[f"{name}_signature"] = str(metric.get_signature())
        if name == "bleu":
            result["length_ratio"] = value.sys_len / max(value.ref_len, 1)  # references may be empty lines
            result["bleu_unpenalized"] = value.score / value.bp if value.bp else 0.0
    return result


def compare_systems(
    systems: Mapping[str, Sequence[str]],
    references: Sequence[str],
    test: str = "bootstrap",
    metrics: Sequence[str] = ("bleu", "chrf"),
    samples: int | None = None,
) -> dict[str, Any]:
    """Test each system against the first one with sacreBLEU's paired significance tests.

    Args:
        systems: name -> hypotheses; the first is the baseline.
        test: ``bootstrap`` (paired bootstrap resampling, Koehn 2004) or ``randomization`` (paired approximate
            randomisation, Riezler and Maxwell 2005).
        metrics: names from :data:`METRICS`.
        samples: resamples or trials; default: sacreBLEU's 1,000 and 10,000.

    Returns:
        ``{"test", "baseline", "samples", "signatures": {metric: signature with the seed},
        "systems": {name: {metric: {"score", "p", "mean", "ci95"}}}}``. ``p`` is two-sided, 1 for translations equal to
        the baseline's, and absent for the baseline. ``mean`` and ``ci95`` (half the width of the 95% interval) are of
        the resampled scores, with ``bootstrap`` only. The seed is sacreBLEU's (12345, or ``SACREBLEU_SEED``).

    Raises:
        UserError: if there are fewer than two systems, or numbers of sentences differ.
    """
    if len(systems) < 2:
        raise UserError(f"a significance test compares two systems or more, got {len(systems)}")
    for name, hypotheses in systems.items():
        require_parallel(name, hypotheses, references)
    paired = PairedTest(
        [(name, list(hypotheses)) for name, hypotheses in systems.items()],
        {name: METRICS[name].make() for name in metrics},
        [list(references)],
        test_type=SIGNIFICANCE_TESTS[test],
        n_samples=samples or 0,
    )
    signatures, columns = paired()
    # sacreBLEU names the columns after the score, e.g. chrF2, in the order in which the metrics were given.
    column_of = dict(zip(metrics, signatures, strict=True))
    compared: dict[str, dict[str, Any]] = {name: {} for name in systems}
    baseline = list(next(iter(systems.values())))
    for metric, column in column_of.items():
        for name, result in zip(systems, columns[column], strict=True):
            values = {"score": result.score, "p": result.p_value, "mean": result.mean, "ci95": result.ci}
            if result.p_value is not None and list(systems[name]) == baseline:
                values["p"] = 1.0  # sacreBLEU counts differences above the real one: none here, so it finds 1/(n + 1)
            compared[name][metric] = {key: float(value) for key, value in values.items() if value is not None}
    return {
        "test": test,
        "baseline": next(iter(systems)),
        "samples": paired.n_samples,
        "signatures": {metric: str(signatures[column]) for metric, column in column_of.items()},
        "systems": compared,
    }


def score_by_length(
    hypotheses: Sequence[str], references: Sequence[str], edges: Sequence[int] = LENGTH_BUCKETS
) -> list[dict[str, Any]]:
    """Score sentences by the length of their reference in words, separated by white space.

    Args:
        edges: ascending; the buckets are up to edges[0], up to edges[1], ..., and above the last.

    Returns:
        For each bucket that holds a sentence: ``least`` and ``most`` words (None: no limit), ``sentences``, ``bleu``,
        ``chrf`` and ``length_ratio``.
    """
    require_parallel("by length", hypotheses, references)
    if list(edges) != sorted(set(edges)) or not edges or edges[0] < 1:
        raise UserError(f"length buckets {list(edges)} are not ascending numbers of words from 1")
    lengths = [len(reference.split()) for reference in references]
    buckets = []
    for least, most in itertools.pairwise([0, *[edge + 1 for edge in edges], None]):
        inside = [k for k, n in enumerate(lengths) if n >= least and (most is None or n < most)]
        if not inside:
            continue
        found = _score_some(hypotheses, references, inside)
        buckets.append({"least": least, "most": None if most is None else most - 1, **found})
    return buckets


def score_parts(
    hypotheses: Sequence[str], references: Sequence[str], parts: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """Score each part of a test set by itself, e.g. each target language.

    Args:
        parts: the part that each text belongs to.

    Returns:
        part -> ``sentences``, ``bleu``, ``chrf`` and ``length_ratio``, the parts in alphabetical order.
    """
    require_parallel("parts", hypotheses, references)
    if len(parts) != len(references):
        raise ArtifactError(f"{len(parts)} names of parts for {len(references)} references; expected one a text")
    members = {part: [k for k, name in enumerate(parts) if name == part] for part in sorted(set(parts))}
    return {part: _score_some(hypotheses, references, inside) for part, inside in members.items()}


def _score_some(hypotheses: Sequence[str], references: Sequence[str], inside: Sequence[int]) -> dict[str, Any]:
    scores = score([hypotheses[k] for k in inside], [references[k] for k in inside])
    return {key: scores[key] for key in ("sentences", "bleu", "chrf", "length_ratio")}


def score_documents(
    hypotheses: Sequence[str],
    references: Sequence[str],
    documents: Sequence[str] | None = None,
    separator: str | None = None,
) -> dict[str, Any]:
    """Score whole documents: d-BLEU, whose n-grams cross segment boundaries.

    Args:
        documents: the document of each line; neighbouring lines of the same document are joined. Default: a line is a
            document.
        separator: what stands between the segments of a line, e.g. ``<sep>``; default: a line is one segment.

    Returns:
        ``documents``, ``d_bleu``, ``d_chrf``, ``d_bleu_signature``. With a *separator* also ``s_bleu``, the BLEU of
        segments paired by their place in the line (a missing segment counts as empty, surplus ones belong to the last),
        ``segments``, and ``lines_with_equal_segments``, the share of lines with as many segments as their reference.
    """
    require_parallel("documents", hypotheses, references)
    if documents is not None and len(documents) != len(references):
        raise ArtifactError(f"{len(documents)} document names for {len(references)} references; expected one a line")
    names = documents if documents is not None else range(len(references))
    split = [[_segments(line, separator) for line in side] for side in (hypotheses, references)]
    joined: list[list[str]] = [[], []]
    for _, lines in itertools.groupby(range(len(references)), key=lambda k: names[k]):
        members = list(lines)
        for side in (0, 1):
            joined[side].append(" ".join(itertools.chain.from_iterable(split[side][k] for k in members)))
    whole = score(joined[0], joined[1])
    result = {"documents": len(joined[0]), "d_bleu": whole["bleu"], "d_chrf": whole["chrf"]}
    result["d_bleu_signature"] = whole["bleu_signature"]
    if separator is not None:
        paired = [_paired_segments(*lines) for lines in zip(*split, strict=True)]
        segments = score([h for line in paired for h, _ in line], [r for line in paired for _, r in line])
        equal = sum(len(h) == len(r) for h, r in zip(*split, strict=True))
        result |= {
            "s_bleu": segments["bleu"],
            "segments": segments["sentences"],
            "lines_with_equal_segments": equal / len(references),
        }
    return result


def _segments(line: str, separator: str | None) -> list[str]:
    return [line] if separator is None else [segment.strip() for segment in line.split(separator)]


def _paired_segments(hypothesis: list[str], reference: list[str]) -> list[tuple[str, str]]:
    last = len(reference) - 1
    segments = hypothesis[:last] + [" ".join(hypothesis[last:])]
    return list(zip(segments + [""] * (len(reference) - len(segments)), reference, strict=True))


def tokenized_bleu(hypotheses: Sequence[str], references: Sequence[str], style: str, language: str) -> dict[str, Any]:
    """Moses-tokenised BLEU, for comparison with tables from before sacreBLEU only.

    Args:
        style: ``cased``; ``lowercased``, as IWSLT14 tables are; ``compound-split``, as most WMT14 En-De tables are
            (words joined by a hyphen count as several).
        language: of the text, e.g. ``de``, for sacremoses.

    Returns:
        ``tokenized_bleu`` and ``tokenized_bleu_signature``, which names style and tokenizer.

    Raises:
        UserError: if sacremoses is not installed.
    """
    require_parallel("tokenised BLEU", hypotheses, references)
    try:
        sacremoses = importlib.import_module("sacremoses")
    except ImportError as error:
        raise UserError("tokenised BLEU needs the package sacremoses: pip install sacremoses") from error
    tokenizer = sacremoses.MosesTokenizer(lang=language)

    def tokenized(text: str) -> str:
        if style == "lowercased":
            text = text.lower()
        text = tokenizer.tokenize(text, return_str=True, escape=False)
        return _COMPOUND.sub(r"\1 ##AT##-##AT## \2", text) if style == "compound-split" else text

    metric = BLEU(tokenize="none", force=True, smooth_method="none")
    value = metric.corpus_score([tokenized(text) for text in hypotheses], [[tokenized(text) for text in references]])
    signature = f"{metric.get_signature()}|moses:{style}-{language}|sacremoses:{sacremoses.__version__}"
    return {"tokenized_bleu": value.score, "tokenized_bleu_signature": signature}


def comet_scores(model, sources: Sequence[str], systems: Mapping[str, Sequence[str]], references: Sequence[str]):
    """COMET system scores (0-1, higher is better) from a model file on this machine; nothing is downloaded.

    Args:
        model: path of a COMET checkpoint, e.g. ``.../wmt22-comet-da/checkpoints/model.ckpt``. The language model it is
            built on must be in the local cache of the transformers package.

    Returns:
        name -> score.

    Raises:
        UserError: if the package or the model is not there.
    """
    if not Path(model).is_file():
        raise ArtifactError(
            f"COMET model {model} does not exist, and ap-evaluate does not download one: fetch it with comet's "
            "download_model and pass its checkpoints/model.ckpt"
        )
    # Read by transformers when comet imports it: its encoder must come from the local cache.
    os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1")
    try:
        comet = importlib.import_module("comet")
    except ImportError as error:
        raise UserError("COMET needs the package unbabel-comet: pip install unbabel-comet") from error
    import torch

    loaded = comet.load_from_checkpoint(str(model))
    scores = {}
    for name, hypotheses in systems.items():
        require_parallel(name, hypotheses, references)
        require_parallel("source", sources, references)
        data = [{"src": s, "mt": h, "ref": r} for s, h, r in zip(sources, hypotheses, references, strict=True)]
        prediction = loaded.predict(data, batch_size=16, gpus=int(torch.cuda.is_available()))
        scores[name] = float(prediction.system_score)
        if not math.isfinite(scores[name]):
            raise ArtifactError(f"COMET of {name} is {scores[name]}; check the model file {model}")
    return scores
