"""The lines that ``fairseq-generate`` prints about a batch, and its BLEU of tokens, made for all sentences at once.

fairseq's own loop handles tensors of single sentences, which takes as long as the search. What it prints with the
options that :meth:`BatchLines.covers` accepts is made here in the same words; a test compares the two.
"""

from __future__ import annotations

import ctypes
from collections import defaultdict
from collections.abc import Iterator
from itertools import count, islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from fairseq.scoring.bleu import Scorer
from fairseq_cli.generate import get_symbols_to_strip_from_output

from ap_fairseq.generation.joining import append_sentences
from ap_fairseq.generation.scoring import SacrebleuSums, TokenSums
from ap_fairseq.search.hypotheses import Hypotheses


class TranslatedBatch(NamedTuple):
    """What is printed about the B sentences of a batch, in few arrays: quick to pickle for another process.

    Attributes:
        ids: of the sentences.
        sources, targets: int64 (B, T), padded; None: there are none.
        found: the hypotheses that are printed of each sentence, with scores in bits.
    """

    ids: list[int]
    sources: np.ndarray | None
    targets: np.ndarray | None
    found: Hypotheses

    @classmethod
    def collect(cls, sample: dict[str, Any], found: Hypotheses) -> TranslatedBatch:
        """Collect it from a batch of fairseq's and the hypotheses of its sentences."""
        sources, targets = sample["net_input"].get("src_tokens"), sample["target"]
        return cls(
            ids=sample["id"].tolist(),
            sources=None if sources is None else sources.cpu().numpy(),
            targets=None if targets is None else targets.cpu().numpy(),
            found=found,
        )


class BatchLines:
    """Writes the lines of batches, and counts what BLEU needs.

    Args:
        cfg: fairseq's configuration of ``fairseq-generate``, of those that :meth:`covers` accepts.
        generator: that searches.
        scorer: that counts here; None: there is none.
        path: of the file.
    """

    def __init__(self, cfg, task, generator, scorer: TokenSums | SacrebleuSums | None, path: Path):
        self.source, self.target = getattr(task, "source_dictionary", None), task.target_dictionary
        self.ignored = get_symbols_to_strip_from_output(generator)
        self.bpe, self.tokenizer = task.build_bpe(cfg.bpe), task.build_tokenizer(cfg.tokenizer)
        self.post_process = cfg.common_eval.post_process
        # Of all words, as fairseq's encode_line numbers those that are new: but that counts each, too.
        self.indices = defaultdict(count(len(self.target)).__next__, self.target.indices)
        self.scorer, self.path = scorer, path

    @staticmethod
    def covers(options) -> bool:
        """Whether lines with these options of the group ``generation`` are made here; else it takes fairseq's loop."""
        others = options.replace_unk, options.print_alignment, options.print_step, options.retain_iter_history
        return all(option in (None, False) for option in others)

    def write(self, batch: TranslatedBatch) -> None:
        """Append the lines of a batch to the file, and add it to the score."""
        found = batch.found
        parts = (split(x, found.lengths) for x in (found.tokens, found.positional_scores))
        hypotheses = zip(found.scores.tolist(), *parts, strict=True)
        sources, targets = self._rows(batch.sources), self._rows(batch.targets)
        printed = []
        for i, (number, n) in enumerate(zip(batch.ids, found.counts.tolist(), strict=True)):
            lines = []
            if self.source is not None:
                lines.append(f"S-{number}\t{self._decode(self.source.string(sources[i], self.post_process))}\n")
            if targets:
                reference = self._decode(self._string(targets[i], escape_unk=True))
                lines.append(f"T-{number}\t{reference}\n")
            for rank, (score, tokens, positional) in enumerate(islice(hypotheses, n)):
                text = self._string(tokens)
                detokenised = self._decode(text)
                lines.append(f"H-{number}\t{score}\t{text}\n")
                lines.append(f"D-{number}\t{score}\t{detokenised}\n")
                lines.append(f"P-{number}\t{' '.join([f'{part:.4f}' for part in positional])}\n")
                if targets and rank == 0:
                    self._score((reference, targets[i]), (detokenised, tokens))
            printed.append("".join(lines).encode())
        append_sentences(self.path, batch.ids, printed)

    def _score(self, *pair: tuple[str, list[int]]) -> None:
        """Add a reference and a hypothesis to the score, each as a text and as tokens."""
        texts, tokens = zip(*pair, strict=True)
        if isinstance(self.scorer, SacrebleuSums):
            self.scorer.add_string(*texts)
        elif self.scorer is not None:  # of words, where tokens were joined
            add_tokens(self.scorer, *(tokens if self.post_process is None else map(self._encode, texts)))

    def _rows(self, tokens: np.ndarray | None) -> list[list[int]]:
        """Return the tokens of each row, int64 (B, T), without padding; of None, no row."""
        pad = self.target.pad()
        return [] if tokens is None else [[token for token in row if token != pad] for row in tokens.tolist()]

    def _string(self, tokens: list[int], escape_unk: bool = False) -> str:
        return self.target.string(tokens, self.post_process, escape_unk, extra_symbols_to_ignore=self.ignored)

    def _decode(self, text: str) -> str:
        if self.bpe is not None:
            text = self.bpe.decode(text)
        text = text if self.tokenizer is None else self.tokenizer.decode(text)
        return text.replace("\n", " ")  # which a BPE of bytes may spell, and which would end the line

    def _encode(self, text: str) -> list[int]:
        return [*map(self.indices.__getitem__, text.split()), self.target.eos()]


def split(values: np.ndarray, lengths: np.ndarray) -> Iterator[list]:
    """Yield the parts of *values* that have these lengths, one after the other."""
    whole, ends = values.tolist(), lengths.cumsum().tolist()
    return (whole[begin:end] for begin, end in zip([0, *ends[:-1]], ends, strict=True))


def add_tokens(scorer: Scorer, reference: list[int], hypothesis: list[int]) -> None:
    """Count a pair as ``scorer.add`` does, whose tensors take as long as the lines of a sentence."""
    known = [-999 if token == scorer.unk else token for token in reference]  # no word matches an unknown one
    sides = [(ctypes.c_size_t(len(side)), (ctypes.c_int * len(side))(*side)) for side in (known, hypothesis)]
    pad, eos = ctypes.c_int(scorer.pad), ctypes.c_int(scorer.eos)
    scorer.C.bleu_add(ctypes.byref(scorer.stat), *sides[0], *sides[1], pad, eos)
