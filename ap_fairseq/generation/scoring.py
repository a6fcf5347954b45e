"""The score of a test set, of sums over its sentences where it is BLEU: processes count them while they search."""

from __future__ import annotations

import re

import sacrebleu
from fairseq import scoring
from fairseq.data import Dictionary
from fairseq.scoring.bleu import BleuStat, SacrebleuScorer, Scorer
from sacrebleu.metrics import BLEU

_REFERENCE = re.compile(r"^T-\d+\t(.*)$", re.MULTILINE)
_HYPOTHESIS = re.compile(r"^D-\d+\t.*?\t(.*)$", re.MULTILINE)  # the first is the best
_FIELDS = [name for name, _ in BleuStat._fields_]
_TOGETHER = 1000  # texts that sacreBLEU counts at once


class ScoredLater(scoring.BaseScorer):
    """Stands in for the scorer of a process whose lines are scored elsewhere."""

    def __init__(self):
        super().__init__(None)

    def add_string(self, ref, pred) -> None:
        pass

    def score(self) -> float:
        return 0.0

    def result_string(self) -> str:
        return "scored with the other processes"


class TokenSums(Scorer):
    """fairseq's BLEU of tokens.

    Attributes:
        sums: the fields of ``BleuStat``.
    """

    @property
    def sums(self) -> list[int]:
        return [getattr(self.stat, name) for name in _FIELDS]

    @sums.setter
    def sums(self, sums: list[int]) -> None:
        self.stat = BleuStat(*sums)


class SacrebleuSums(SacrebleuScorer):
    """fairseq's scorer by sacreBLEU, which counts texts on the way: at the end that takes longer than a search.

    Attributes:
        sums: words of hypotheses and of references, then of each order the n-grams that match, and all.
    """

    def __init__(self, cfg):
        super().__init__(cfg)
        self._sums = [0] * 10

    def add_string(self, ref, pred) -> None:
        super().add_string(ref, pred)
        if len(self.ref) == _TOGETHER:
            self._count()

    def _count(self) -> None:
        if self.ref:  # by its own tokeniser, of which sacreBLEU would warn
            found = sacrebleu.corpus_bleu(self.pred, [self.ref], tokenize="none", force=True)
            counted = found.sys_len, found.ref_len, *found.counts, *found.totals
            self._sums = [sum(numbers) for numbers in zip(self._sums, counted, strict=True)]
            self.ref, self.pred = [], []

    @property
    def sums(self) -> list[int]:
        self._count()
        return self._sums

    @sums.setter
    def sums(self, sums: list[int]) -> None:
        self._sums = sums

    def _score(self, order=4):
        length, reference_length, *counts = self.sums
        return BLEU.compute_bleu(counts[:4], counts[4:], length, reference_length, smooth_method="exp")


def summing(scorer) -> TokenSums | SacrebleuSums | None:
    """Return what counts sums in place of fairseq's scorer of BLEU; None for others, and a user's, which may differ."""
    if type(scorer) is SacrebleuScorer:
        return SacrebleuSums(scorer.cfg)
    return TokenSums(scorer) if type(scorer) is Scorer else None  # as a configuration: it reads pad, eos and unk


def score_lines(cfg, sentences: list[bytes], sums: list[list[int]]) -> list[str]:
    """Return fairseq's line with the score of all sentences and, with ``--scoring sacrebleu``, its signature.

    Args:
        sentences: the lines of each, references among them.
        sums: of each process, those of its :func:`summing` scorer; without one there are none.
    """
    scorer = scoring.build_scorer(cfg.scoring, Dictionary())
    if sums:
        scorer = summing(scorer)
        scorer.sums = [sum(numbers) for numbers in zip(*sums, strict=True)]
    else:
        for lines in sentences:
            text = lines.decode()
            scorer.add_string(_found(_REFERENCE, text), _found(_HYPOTHESIS, text))
    score = f"Generate {cfg.dataset.gen_subset} with beam={cfg.generation.beam}: {scorer.result_string()}"
    return [score, *_signature(cfg.scoring)]


def _found(pattern: re.Pattern[str], lines: str) -> str:
    match = pattern.search(lines)
    assert match is not None, lines
    return match[1]


def _signature(scoring_cfg) -> list[str]:
    """Return sacreBLEU's signature of the score, if it has one: fairseq's tokenisation by characters is its own."""
    if getattr(scoring_cfg, "_name", scoring_cfg) != "sacrebleu" or scoring_cfg.sacrebleu_char_level:
        return []
    metric = BLEU(tokenize=scoring_cfg.sacrebleu_tokenizer, lowercase=scoring_cfg.sacrebleu_lowercase)
    metric.corpus_score([""], [[""]])  # from which it knows the number of references
    return [f"sacreBLEU signature: {metric.get_signature()}"]
