"""The lines that ``fairseq-generate`` prints about a batch, and its BLEU of tokens, made for all sentences at once.

fairseq's own loop handles tensors of single sentences, which takes as long as the search.
"""

from __future__ import annotations

import ctypes
import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from fairseq.scoring.bleu import BleuStat, Scorer
from fairseq_cli.generate import get_symbols_to_strip_from_output
from torch import Tensor


class Batch(NamedTuple):
    """What is printed of the B sentences of a batch, in few arrays, which go to another process in no time.

    Attributes:
        numbers: of the sentences.
        sources, targets: int64 (B, T), padded; None: there are none.
        best: hypotheses of each sentence that are printed; N of all.
        scores: float32 (N,), in base 2.
        sizes: int64 (N,), tokens of each hypothesis.
        tokens, positional: int64 and float32 (sum of sizes,), and scores of the tokens in base 2.
    """

    numbers: list[int]
    sources: np.ndarray
    targets: np.ndarray | None
    best: list[int]
    scores: np.ndarray
    sizes: np.ndarray
    tokens: np.ndarray
    positional: np.ndarray

    @classmethod
    def collect(cls, sample: dict[str, Any], found: list[list[dict[str, Tensor]]], nbest: int) -> Batch:
        """Collect it from a batch and the hypotheses of each sentence, best first."""
        flat = [hypothesis for hypotheses in found for hypothesis in hypotheses[:nbest]]
        tokens, positional = (
            torch.cat([hypothesis[name] for hypothesis in flat]) for name in ("tokens", "positional_scores")
        )
        scores = torch.stack([hypothesis["score"] for hypothesis in flat])
        return cls(
            sample["id"].tolist(),
            sample["net_input"]["src_tokens"].cpu().numpy(),
            None if sample["target"] is None else sample["target"].cpu().numpy(),
            [len(hypotheses[:nbest]) for hypotheses in found],
            (scores / math.log(2)).cpu().numpy(),
            np.array([len(hypothesis["tokens"]) for hypothesis in flat]),
            tokens.cpu().numpy(),
            (positional / math.log(2)).cpu().numpy(),
        )


class BatchLines:
    """Writes the lines of batches, and counts what BLEU needs.

    Args:
        cfg: fairseq's configuration of ``fairseq-generate``, of those that :meth:`covers` accepts.
        generator: that searches.
        scorer: fairseq's BLEU of tokens; None for scores of the printed lines.
        path: of the file.
    """

    def __init__(self, cfg, task, generator, scorer: Scorer | None, path: Path):
        self.source, self.target = getattr(task, "source_dictionary", None), task.target_dictionary
        self.ignored = get_symbols_to_strip_from_output(generator)
        self.bpe, self.tokenizer = task.build_bpe(cfg.bpe), task.build_tokenizer(cfg.tokenizer)
        self.post_process = cfg.common_eval.post_process
        self.numbers = _Numbers(self.target.indices)
        self.scorer, self.path = scorer, path

    @staticmethod
    def covers(cfg, scorer) -> bool:
        """Whether lines of these options are made here; else it takes fairseq's loop."""
        options = cfg.generation
        others = options.replace_unk, options.print_alignment, options.print_step, options.retain_iter_history
        return all(option in (None, False) for option in others) and (
            isinstance(scorer, Scorer) or hasattr(scorer, "add_string")
        )

    def write(self, batch: Batch) -> None:
        """Append the lines of a batch to the file, and add it to the score."""
        scores, ends = iter(batch.scores.tolist()), batch.sizes.cumsum().tolist()
        tokens, positional = (iter(_split(values.tolist(), ends)) for values in (batch.tokens, batch.positional))
        sources = self._rows(batch.sources)
        targets = None if batch.targets is None else self._rows(batch.targets)
        pairs, lines = [], []
        for i, number in enumerate(batch.numbers):
            if self.source is not None:
                lines.append(f"S-{number}\t{self._decode(self.source.string(sources[i], self.post_process))}\n")
            if targets is not None:
                reference = self.target.string(
                    targets[i], self.post_process, escape_unk=True, extra_symbols_to_ignore=self.ignored
                )
                reference = self._decode(reference)
                lines.append(f"T-{number}\t{reference}\n")
            for j in range(batch.best[i]):
                hypothesis, score, parts = next(tokens), next(scores), next(positional)
                text = self.target.string(hypothesis, self.post_process, extra_symbols_to_ignore=self.ignored)
                detokenised = self._decode(text)
                lines.append(f"H-{number}\t{score}\t{text}\n")
                lines.append(f"D-{number}\t{score}\t{detokenised}\n")
                lines.append(f"P-{number}\t{' '.join([f'{part:.4f}' for part in parts])}\n")
                if self.scorer is not None and targets is not None and j == 0:
                    if self.post_process is None:
                        pairs.append((targets[i], hypothesis))
                    else:  # BLEU of words, not of the tokens that were joined
                        pairs.append((self._encode(reference), self._encode(detokenised)))
        with open(self.path, "a", encoding="utf-8") as stream:
            stream.write("".join(lines))
        if pairs:
            assert self.scorer is not None
            add(self.scorer, pairs)

    def statistics(self) -> list[int] | None:
        """Return what the scorer has counted."""
        return statistics(self.scorer)

    def _rows(self, tokens: np.ndarray) -> list[list[int]]:
        """Return the tokens of each row, int64 (B, T), without padding."""
        pad = self.target.pad()
        return [[token for token in row if token != pad] for row in tokens.tolist()]

    def _decode(self, text: str) -> str:
        if self.bpe is not None:
            text = self.bpe.decode(text)
        return text if self.tokenizer is None else self.tokenizer.decode(text)

    def _encode(self, text: str) -> list[int]:
        """Return a number for each word, and the end: those of the dictionary, and new ones for other words."""
        return [*map(self.numbers.__getitem__, text.split()), self.target.eos()]


class _Numbers(dict[str, int]):
    """Numbers of words; a new word gets the next one. A dictionary of fairseq also counts its words."""

    def __missing__(self, word: str) -> int:
        self[word] = number = len(self)
        return number


def _split(values: list, ends: list[int]) -> list[list]:
    """Return the parts of *values* that end there."""
    return [values[begin:end] for begin, end in zip([0, *ends[:-1]], ends, strict=True)]


def statistics(scorer: Any) -> list[int] | None:
    """Return what fairseq's BLEU of tokens has counted, the fields of ``BleuStat``; None of another scorer."""
    return [getattr(scorer.stat, name) for name, _ in BleuStat._fields_] if hasattr(scorer, "stat") else None


def add(scorer: Scorer, pairs: list[tuple[list[int], list[int]]]) -> None:
    """Add references and hypotheses to fairseq's BLEU, as ``scorer.add`` does with tensors of each."""
    references, hypotheses = (
        np.fromiter((token for pair in pairs for token in pair[side]), dtype=np.int32) for side in (0, 1)
    )
    references[references == scorer.unk] = -999  # no word matches an unknown one
    size, reference, hypothesis = references.itemsize, references.ctypes.data, hypotheses.ctypes.data
    pad, eos, statistics = ctypes.c_int(scorer.pad), ctypes.c_int(scorer.eos), ctypes.byref(scorer.stat)
    for words, others in pairs:
        n, m = ctypes.c_size_t(len(words)), ctypes.c_size_t(len(others))
        scorer.C.bleu_add(statistics, n, ctypes.c_void_p(reference), m, ctypes.c_void_p(hypothesis), pad, eos)
        reference, hypothesis = reference + size * len(words), hypothesis + size * len(others)
