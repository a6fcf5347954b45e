#!/usr/bin/env python3
"""How sure a sweep's differences in BLEU are when pages of the test set are drawn, not sentences.

    examples/common/resample_pages.py RUN --data DATA --target de --out FILE      RUN: --out of sweep.py

Sentences of one page are alike, and some pages are long. A paired bootstrap over sentences takes them as independent;
this one draws whole pages, and sentences beside that. For every system that results.jsonl compares with a dense one of
as many updates, FILE gets the difference and both 95% intervals; and the pages of the test set.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from sacrebleu.metrics import BLEU

from ap_fairseq.cli.common import command
from ap_fairseq.evaluation.scores import require_parallel
from ap_fairseq.files import UserError, read_lines, refuse_existing, write_json


def statistics(hypotheses: Sequence[str], references: Sequence[str]) -> np.ndarray:
    """Return what BLEU adds up: lengths of both sides, n-grams that match and all n-grams, int64 [sentences, 10]."""
    metric = BLEU(effective_order=True)  # sentence_score warns without; it changes no count
    scores = (metric.sentence_score(one, [other]) for one, other in zip(hypotheses, references, strict=True))
    return np.array([[score.sys_len, score.ref_len, *score.counts, *score.totals] for score in scores])


def bleu(counts: np.ndarray) -> float:
    """Return the BLEU of a sum of statistics."""
    translated, reference, *ngrams = counts.tolist()
    return BLEU.compute_bleu(ngrams[:4], ngrams[4:], translated, reference, smooth_method="exp").score


def interval(one: np.ndarray, other: np.ndarray, units: np.ndarray, samples: int, seed: int) -> list[float]:
    """Return the 95% interval of BLEU(one) - BLEU(other) when *units* are drawn with replacement.

    Args:
        one, other: counts of each sentence.
        units: the number of each sentence's unit, from 0.
    """
    size = units.max() + 1
    drawn = np.random.default_rng(seed).multinomial(size, np.full(size, 1 / size), samples)[:, units]
    return np.quantile([bleu(row @ one) - bleu(row @ other) for row in drawn], [0.025, 0.975]).tolist()


def resample(
    systems: dict[str, tuple[str, Sequence[str], Sequence[str]]],
    references: Sequence[str],
    pages: Sequence[str],
    samples: int = 1000,
    seed: int = 1,
) -> dict[str, Any]:
    """Compare translations with those of a baseline.

    Args:
        systems: name -> the baseline's name, the system's translations and the baseline's.
        pages: the page of each sentence.

    Raises:
        UserError: if numbers of sentences differ.
    """
    if len(pages) != len(references):
        raise UserError(f"the pages of {len(pages)} sentences are given for {len(references)} references")
    for name, (baseline, *texts) in systems.items():
        for side, lines in zip((name, baseline), texts, strict=True):
            require_parallel(side, lines, references)
    counts = Counter(pages)
    number = {page: at for at, page in enumerate(counts)}
    by_page = np.array([number[page] for page in pages])
    found = []
    for name, (baseline, *texts) in systems.items():
        one, other = (statistics(text, references) for text in texts)
        found.append(
            {
                "system": name,
                "baseline": baseline,
                "difference": bleu(one.sum(0)) - bleu(other.sum(0)),
                "sentences": interval(one, other, np.arange(len(references)), samples, seed),
                "pages": interval(one, other, by_page, samples, seed),
            }
        )
    return {
        "samples": samples,
        "test_sentences": len(references),
        "test_pages": len(counts),
        "largest_pages": [{"page": page, "sentences": size} for page, size in counts.most_common(3)],
        "systems": found,
    }


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("run", type=Path, help="output folder of sweep.py, with its translations")
    parser.add_argument("--data", type=Path, required=True, help="folder of prepare.sh")
    parser.add_argument("--target", required=True, metavar="LANGUAGE", help="ending of the reference: test.LANGUAGE")
    parser.add_argument(
        "--parts", metavar="CHARACTER", help="a page is what stands after it: the same page in all languages is one"
    )
    parser.add_argument("--samples", type=int, default=1000, metavar="N", help="default: %(default)s")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="JSON file to write")
    return parser


@command
def main(argv: list[str]) -> None:
    args = get_parser().parse_args(argv)
    refuse_existing(args.out, overwrite=False)
    test = args.data / "sentences" / "test"
    pages = [line.split("\t")[0] for line in read_lines(test.with_suffix(".pages"))]
    if args.parts:
        pages = [page.partition(args.parts)[2] for page in pages]
    compared = [json.loads(line) for line in read_lines(args.run / "results.jsonl")]
    compared = [line for line in compared if "against_dense_equal" in line]
    if not compared:
        raise UserError(f"{args.run / 'results.jsonl'} compares no system with a dense one of as many updates")

    def translations(name: str) -> list[str]:
        return read_lines(args.run / "translations" / f"{name}.txt")

    systems = {
        line["system"]: (baseline, translations(line["system"]), translations(baseline))
        for line in compared
        for baseline in (line["against_dense_equal"]["baseline"],)
    }
    references = read_lines(test.with_suffix(f".{args.target}"))
    write_json(args.out, resample(systems, references, pages, args.samples))


if __name__ == "__main__":
    main()
