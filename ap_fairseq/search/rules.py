"""The rules of a search, read off fairseq's generator for every batch."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from fairseq.search import LengthConstrainedBeamSearch
from fairseq.sequence_generator import SequenceGenerator
from torch import Tensor

from ap_fairseq.search import strategies
from ap_fairseq.search.strategies import Strategy

NORMAL, BEFORE_MIN_LEN, AT_MAX_LEN, WITHIN_PREFIX = range(4)  # phases of a search


@dataclass(frozen=True)
class SearchRules:
    """Rules of a search, as ``fairseq.sequence_generator`` defines them.

    Attributes:
        beam: hypotheses of a sentence.
        vocab_size, pad, unk, eos: size and special tokens of the target dictionary.
        suppressed: tokens that are never chosen.
        unk_penalty: subtracted from the score of every *unk*.
        temperature: divides the logits.
        min_len: tokens of a hypothesis before *eos* at least.
        len_penalty: hypotheses are ranked by score / length ** len_penalty; 0 ranks by the score.
        no_repeat_ngram_size: of the n-grams that a hypothesis may have once only; 0: none.
        exact_length: a hypothesis has as many tokens before *eos* as its source, *eos* included, and then ends at no
            cost.
        match_source_len: what is longer is ranked last.
        strategy: chooses among continuations; None: beam search.
    """

    beam: int
    vocab_size: int
    pad: int
    unk: int
    eos: int
    suppressed: tuple[int, ...]
    unk_penalty: float
    temperature: float
    min_len: int
    len_penalty: float
    no_repeat_ngram_size: int
    exact_length: bool
    match_source_len: bool
    strategy: Strategy | None

    @classmethod
    def from_generator(cls, generator: SequenceGenerator) -> SearchRules:
        """Read them off fairseq's generator."""
        suppressed, blocker = generator.token_indices_to_suppress, generator.repeat_ngram_blocker
        return cls(
            beam=generator.beam_size,
            vocab_size=generator.vocab_size,
            pad=generator.pad,
            unk=generator.unk,
            eos=generator.eos,
            suppressed=() if suppressed is None else tuple(suppressed.tolist()),
            unk_penalty=generator.unk_penalty,
            temperature=generator.temperature,
            min_len=generator.min_len,
            len_penalty=generator.len_penalty if generator.normalize_scores else 0,
            no_repeat_ngram_size=0 if blocker is None else blocker.no_repeat_ngram_size,
            exact_length=isinstance(generator.search, LengthConstrainedBeamSearch),
            match_source_len=generator.match_source_len,
            strategy=strategies.from_fairseq(generator.search, generator.beam_size),
        )

    @property
    def restricted(self) -> bool:
        """Whether penalties differ between hypotheses in every step."""
        return self.exact_length or self.no_repeat_ngram_size > 0

    def token_penalties(self, device: torch.device) -> Tensor:
        """Penalties of all tokens in every phase, float32 (4, V): added to log-probabilities of all hypotheses."""
        penalties = torch.zeros(4, self.vocab_size)
        penalties[:WITHIN_PREFIX, list(self.suppressed)] = -math.inf
        penalties[:, self.pad] = -math.inf
        penalties[:, self.unk] -= self.unk_penalty
        penalties[BEFORE_MIN_LEN, self.eos] = -math.inf
        penalties[AT_MAX_LEN, torch.arange(self.vocab_size) != self.eos] = -math.inf
        return penalties.to(device)

    def phase(self, step: int, max_len: int, prefix_len: int) -> int:
        """Return the phase of a step of a search of *max_len* tokens at most, of which a prefix gives *prefix_len*."""
        if step >= max_len:
            return AT_MAX_LEN
        if step < prefix_len:
            return WITHIN_PREFIX
        return BEFORE_MIN_LEN if step < self.min_len else NORMAL
