"""Scores that others can trust: sacreBLEU and chrF with their signatures, from fairseq-generate's output."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from sacrebleu.metrics import BLEU, CHRF

from ap_fairseq.artifacts import ArtifactError, atomic_output

_DETOKENIZED = re.compile(r"^D-(\d+)\t(\S+)\t(.*)$")


def read_lines(path) -> list[str]:
    """Return the lines of a text file; only a line feed ends one, as for fairseq, not every Unicode separator.

    Raises:
        ArtifactError: if the file does not exist.
    """
    if not Path(path).is_file():
        raise ArtifactError(f"{path} does not exist; expected a text file with one sentence or log entry a line")
    with open(path, encoding="utf-8", newline="\n") as lines:
        return [line.rstrip("\n") for line in lines]


def read_hypotheses(path) -> list[str]:
    """Return the detokenised best hypotheses of a fairseq-generate log, in the order of the data set.

    Raises:
        ArtifactError: if the file is missing, or its sentences are not numbered 0 ... n-1: a run that was cut off.
    """
    found: dict[int, str] = {}
    for line in read_lines(path):
        match = _DETOKENIZED.match(line)
        if match:
            found.setdefault(int(match[1]), match[3])  # with --nbest, the best comes first
    if sorted(found) != list(range(len(found))) or not found:
        last = max(found, default=-1)
        raise ArtifactError(
            f"{path} holds {len(found)} hypotheses for sentences numbered 0 to {last}: fairseq-generate was cut off, "
            "or dropped a last batch that was no multiple of 8; translate with --required-batch-size-multiple 1"
        )
    return [found[index] for index in range(len(found))]


def score(hypotheses: list[str], references: list[str]) -> dict[str, Any]:
    """Score detokenised hypotheses against one reference each.

    Returns:
        bleu, chrf (both 0-100), their sacreBLEU signatures, and the ratio of hypothesis to reference length as
        sacreBLEU counts tokens.

    Raises:
        ArtifactError: if the numbers of sentences differ.
    """
    if len(hypotheses) != len(references):
        raise ArtifactError(f"{len(hypotheses)} hypotheses for {len(references)} references")
    bleu, chrf = BLEU(), CHRF()
    bleu_score = bleu.corpus_score(hypotheses, [references])
    chrf_score = chrf.corpus_score(hypotheses, [references])
    return {
        "bleu": bleu_score.score,
        "bleu_signature": str(bleu.get_signature()),
        "chrf": chrf_score.score,
        "chrf_signature": str(chrf.get_signature()),
        "length_ratio": bleu_score.sys_len / bleu_score.ref_len,
        "sentences": len(hypotheses),
    }


def write_json(path, document: Any, overwrite: bool = False) -> None:
    """Write *document* as indented JSON to a temporary name and rename it."""
    with atomic_output(path, overwrite) as temporary:
        Path(temporary).write_text(json.dumps(document, indent=2, sort_keys=True) + "\n", encoding="utf-8")
