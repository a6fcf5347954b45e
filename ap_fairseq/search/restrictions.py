"""What a search forbids single sentences or hypotheses: other tokens than a prefix, other lengths, repeated n-grams.

Penalties that hold for all hypotheses alike are those of `SearchRules`.
"""

from __future__ import annotations

import math

import torch
from fairseq.ngram_repeat_block import NGramRepeatBlock
from torch import Tensor

from ap_fairseq.search.rules import SearchRules
from triton_ops.beam_state import BeamState, copy_first_hypothesis


class Restrictions:
    """The restrictions of the sentences of a search on the device, in buffers that stay where they are."""

    def __init__(self, state: BeamState, rules: SearchRules):
        (n_hypotheses, n_positions), device = state.block_table.shape, state.block_table.device
        n_sentences = n_hypotheses // rules.beam
        self.state, self.rules = state, rules
        # Like the records of a search they are indexed by sentence, with a scratch slot for empty places.
        self.prefix = torch.empty(n_positions, n_sentences + 1, dtype=torch.int64, device=device)
        self.lengths = torch.zeros(n_sentences + 1, dtype=torch.int64, device=device)
        size = (n_hypotheses, n_positions) if rules.no_repeat_ngram_size else (0, 0)
        self.history = torch.zeros(size, dtype=torch.int64, device=device)  # the tokens of every hypothesis

    def begin(self, prefix: Tensor, lengths: Tensor) -> None:
        """Start with sentences of *lengths*, int64 (n,), which begin with *prefix*, int64 (n, P), padded."""
        self.lengths[: lengths.numel()] = lengths
        self.prefix.fill_(self.rules.pad)[: prefix.size(1), : prefix.size(0)] = prefix.t()

    def skip(self, previous: Tensor) -> None:
        """Go to the step after those that decoded the tokens *previous*, int64 (B, P), of all hypotheses."""
        if self.rules.no_repeat_ngram_size:
            (n, size), beam = previous.shape, self.rules.beam
            self.history[: n * beam, :size] = previous.repeat_interleave(beam, 0)

    def apply(self, n: int, log_probs: Tensor, within_prefix: bool) -> None:
        """Change *log_probs*, float32 (n * beam, V), of the next token of the first *n* sentences."""
        rules, state = self.rules, self.state
        sentence = state.sentence[:n]
        forced = self.prefix.index_select(0, state.step)[0, sentence] if within_prefix else None  # pad: free
        if forced is not None:
            self._force(n, log_probs, forced)
        if rules.no_repeat_ngram_size:
            history = self.history[: log_probs.size(0)]
            history.index_copy_(1, state.step, state.tokens[: log_probs.size(0), None])
            free = None if forced is None else forced.eq(rules.pad)[:, None].expand(n, rules.beam).reshape(-1)
            forbid_repetitions(log_probs, history, state.step, rules.no_repeat_ngram_size, rules.pad, free)
        if rules.exact_length:
            too_short = state.step < self.lengths[sentence]
            ends = log_probs.new_zeros(n).masked_fill_(too_short, -math.inf)
            log_probs.view(n, rules.beam, -1)[..., rules.eos] = ends[:, None]

    def _force(self, n: int, log_probs: Tensor, token: Tensor) -> None:
        """Leave sentences only their *token*, int64 (n,), unless that is padding.

        Where a prefix ends a sentence, all of its hypotheses are that prefix, as in fairseq.
        """
        by_sentence = log_probs.view(n, self.rules.beam, -1)
        others = torch.arange(log_probs.size(1), device=token.device) != token[:, None]
        by_sentence.masked_fill_((others & token.ne(self.rules.pad)[:, None])[:, None], -math.inf)
        ends = token.eq(self.rules.eos)
        copy_first_hypothesis(self.state, n, ends)
        by_sentence.copy_(torch.where(ends[:, None, None], by_sentence[:, :1], by_sentence))

    def follow(self, n: int) -> None:
        """Give the hypotheses of the first *n* sentences the tokens of those that the last step continued."""
        if self.rules.no_repeat_ngram_size:
            parent = self.state.parents(n)
            self.history[: parent.numel()] = self.history.index_select(0, parent)

    def select(self, order: Tensor) -> None:
        """Move the sentences in the places *order*, int64 (n,), to the first n places."""
        if self.rules.no_repeat_ngram_size:
            hypotheses = self.state.hypotheses(order)
            self.history[: hypotheses.numel()] = self.history[hypotheses]


def forbid_repetitions(
    log_probs: Tensor, history: Tensor, step: Tensor, size: int, pad: int, free: Tensor | None = None
) -> None:
    """Set tokens that would complete an n-gram a second time to -inf in *log_probs* (N, V).

    Args:
        history: int64 (N, T), the token in front of each hypothesis, which is part of no n-gram that it generated
            (it counts as context only), and the tokens that followed.
        step: int64 (1,), column of the last token; what is behind it is not read.
        size: of the n-grams.
        pad: a token that is never chosen.
        free: bool (N,), the rows that are changed; None: all.
    """
    n_windows = history.size(1) - size + 1
    if n_windows <= 0:
        return
    last = torch.arange(size - 1, device=history.device) + step - (size - 2)
    context = history.index_select(1, last.clamp_min(0))  # (N, size - 1)
    place = torch.arange(size - 1, history.size(1), device=history.device)  # of the token that completed an n-gram
    repeats = ((place <= step) & (place >= 1)).expand(history.size(0), n_windows)
    if free is not None:
        repeats = repeats & free[:, None]
    for k in range(size - 1):
        repeats = repeats & history[:, k : k + n_windows].eq(context[:, k : k + 1])
    log_probs.scatter_(1, history[:, size - 1 :].masked_fill(~repeats, pad), -math.inf)


class NGramBlock(NGramRepeatBlock):
    """``--no-repeat-ngram-size`` in fairseq's own search.

    Without its CUDA extension fairseq compares with the end of the padded buffer, where no token is yet, and so blocks
    nothing (fairseq issue 5206).
    """

    def __init__(self, size: int, pad: int):
        super().__init__(size, use_extension=False)
        self.pad = pad

    def forward(self, tokens, lprobs, bsz, beam_size, step):
        size, last = self.no_repeat_ngram_size, torch.tensor([step], device=tokens.device)
        forbid_repetitions(lprobs, tokens[:, : step + 1], last, size, self.pad)
        return lprobs
