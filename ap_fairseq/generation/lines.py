"""The lines that ``fairseq-generate`` prints about a batch, and its BLEU of tokens, made for all sentences at once.

fairseq's own loop handles tensors of single sentences, which takes as long as the search.
"""

from __future__ import annotations

import ctypes
import math
from typing import Any, TextIO

import numpy as np
import torch
from fairseq.scoring.bleu import Scorer
from fairseq_cli.generate import get_symbols_to_strip_from_output
from torch import Tensor


class BatchLines:
    """Writes the lines of batches, and counts what BLEU needs.

    Args:
        cfg: fairseq's configuration of ``fairseq-generate``, of those that :meth:`covers` accepts.
        generator: that searches.
        scorer: fairseq's BLEU of tokens; None for scores of the printed lines.
    """

    def __init__(self, cfg, task, generator, scorer: Scorer | None, stream: TextIO):
        self.source, self.target = getattr(task, "source_dictionary", None), task.target_dictionary
        self.ignored = get_symbols_to_strip_from_output(generator)
        self.bpe, self.tokenizer = task.build_bpe(cfg.bpe), task.build_tokenizer(cfg.tokenizer)
        self.post_process, self.nbest = cfg.common_eval.post_process, cfg.generation.nbest
        self.numbers = _Numbers(self.target.indices)
        self.scorer, self.stream = scorer, stream

    @staticmethod
    def covers(cfg, scorer) -> bool:
        """Whether lines of these options are made here; else it takes fairseq's loop."""
        options = cfg.generation
        others = options.replace_unk, options.print_alignment, options.print_step, options.retain_iter_history
        return all(option in (None, False) for option in others) and (
            isinstance(scorer, Scorer) or hasattr(scorer, "add_string")
        )

    def write(self, sample: dict[str, Any], found: list[list[dict[str, Tensor]]]) -> None:
        """Write the lines of a batch, and add it to the score.

        Args:
            found: the hypotheses of each sentence, best first.
        """
        best = [hypotheses[: self.nbest] for hypotheses in found]
        flat = [hypothesis for hypotheses in best for hypothesis in hypotheses]
        scores = iter((torch.stack([hypothesis["score"] for hypothesis in flat]) / math.log(2)).tolist())
        tokens = iter(_lists([hypothesis["tokens"] for hypothesis in flat]))
        positional = iter(_lists([hypothesis["positional_scores"] for hypothesis in flat], math.log(2)))
        sources = self._rows(sample["net_input"]["src_tokens"])
        targets = None if sample["target"] is None else self._rows(sample["target"])
        pairs, lines = [], []
        for i, number in enumerate(sample["id"].tolist()):
            if self.source is not None:
                lines.append(f"S-{number}\t{self._decode(self.source.string(sources[i], self.post_process))}\n")
            if targets is not None:
                reference = self.target.string(
                    targets[i], self.post_process, escape_unk=True, extra_symbols_to_ignore=self.ignored
                )
                reference = self._decode(reference)
                lines.append(f"T-{number}\t{reference}\n")
            for j in range(len(best[i])):
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
        self.stream.write("".join(lines))
        if pairs:
            assert self.scorer is not None
            add(self.scorer, pairs)

    def _rows(self, tokens: Tensor) -> list[list[int]]:
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


def _lists(tensors: list[Tensor], divisor: float = 1) -> list[list]:
    """Return the values of one-dimensional tensors, divided by *divisor* as each alone would be."""
    whole = torch.cat(tensors)
    values, ends = (whole if divisor == 1 else whole / divisor).tolist(), np.cumsum([len(x) for x in tensors]).tolist()
    return [values[begin:end] for begin, end in zip([0, *ends[:-1]], ends, strict=True)]


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
