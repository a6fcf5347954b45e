"""The beam search of a batch on the device: its hypotheses, where the KV caches hold them, and how they are read out.

No tensor changes its place or shape, and nothing waits for the device before the results are read, so that a CUDA graph
can do a step.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ap_fairseq.files import UserError
from ap_fairseq.search.capacity import Capacity
from ap_fairseq.search.hypotheses import Hypotheses, read_out
from ap_fairseq.search.running import host_copy
from triton_ops.api import advance_beams, continue_beams
from triton_ops.beam_state import BeamState


class BeamSearchState:
    """Up to B sentences of *beam* hypotheses; T target positions.

    The tables of KV caches have a row for every head of every decoder self-attention site, and of every cross-attention
    site.

    Args:
        capacity: B sentences, T target positions, and the source tokens of the longest sentence.
        self_heads, cross_heads: the heads of each decoder self-attention and cross-attention site.
        kernels: whether Triton's kernels do the part of a step after the decoder.
    """

    def __init__(
        self,
        capacity: Capacity,
        beam: int,
        self_heads: list[int],
        cross_heads: list[int],
        device: torch.device,
        kernels: bool,
    ):
        b, source_length, t = capacity

        def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self.kernels = kernels
        self.state = BeamState.empty(b, t, beam, device)
        self.number = torch.arange(b * beam, dtype=torch.int32, device=device)  # of hypotheses
        # Of the sentences in the batch.
        self.lengths, self.starts = zeros(b), zeros(b, sum(cross_heads))
        # Of the heads: where the slots of a position begin; of its site, the slots in use.
        self.offsets = zeros(sum(self_heads), t, dtype=torch.int32)
        self.source_offsets = zeros(sum(cross_heads), source_length, dtype=torch.int32)
        self.used = zeros(sum(self_heads))
        self.head = torch.cat([torch.arange(n, device=device) for n in self_heads])
        self.n_heads = torch.cat([torch.full((n,), n, device=device) for n in self_heads])

    def begin(self, lengths: Tensor, max_len: int, first_token: int, n_first: int = 1) -> None:
        """Start with sentences of *lengths*, int64 (n,), source tokens, and translations of at most *max_len*.

        Args:
            n_first: hypotheses of a sentence that the first step continues.
        """
        n = lengths.numel()
        self.state.begin(n, max_len, first_token, n_first)
        for value in (self.used, self.offsets, self.starts):
            value.zero_()
        self.lengths.fill_(1)[:n] = lengths  # empty places of the batch attend to one slot that exists

    def skip(self, prefix: Tensor, sums: Tensor) -> None:
        """Go to the step after *prefix*, int64 (B, P), whose position s has sentence b in slot number b.

        Args:
            sums: float32 (B, P), of log-probabilities up to every position.
        """
        state, (n, size) = self.state, prefix.shape
        state.step.fill_(size)
        state.scores[:n] += sums[:, -1:]
        state.chosen_token[:size, :n] = prefix.t()[..., None]
        state.chosen_score[:size, :n] = sums.t()[..., None]
        state.chosen_beam[:size, :n] = 0  # all of them are alike
        hypotheses = slice(n * state.beam)
        state.tokens[hypotheses] = prefix[:, -1].repeat_interleave(state.beam)
        sentence = self.number[:n].repeat_interleave(state.beam)
        state.block_table[hypotheses, :size] = sentence[:, None]

    def number_slots(self, n: int) -> None:
        """Number the slots that a step of the first *n* sentences writes."""
        n_hypotheses = n * self.state.beam
        if self.kernels:
            from triton_ops.decode import number  # imports triton

            tables = (self.state.block_table, self.offsets, self.used, self.head, self.n_heads, self.state.step)
            return number(n_hypotheses, *tables)
        self.state.block_table[:n_hypotheses].index_copy_(1, self.state.step, self.number[:n_hypotheses, None])
        begins = torch.add(self.used, self.head, alpha=n_hypotheses)
        self.offsets.index_copy_(1, self.state.step, begins.to(torch.int32)[:, None])
        self.used.add_(self.n_heads, alpha=n_hypotheses)

    def advance(self, n: int, logits: Tensor, penalty: Tensor | None, eos: int) -> None:
        """Choose how the first *n* sentences go on, and record it (see `triton_ops.api.advance_beams`)."""
        advance_beams(self.state, n, logits, penalty, eos, self.kernels)

    def continue_by(self, n: int, candidates: tuple[Tensor, Tensor, Tensor], eos: int) -> None:
        """Go on by *candidates*: sums, hypotheses and tokens (see `triton_ops.api.continue_beams`)."""
        continue_beams(self.state, n, *candidates, eos, self.kernels)

    def shrink(self, n: int, smaller: int) -> Tensor:
        """Move the unfinished ones of the first *n* sentences to the first *smaller* places; return where they were.

        Those that are there stay.
        """
        done, behind = self.state.done[:smaller], self.state.done[smaller:n]
        rank = done.cumsum(0) - 1  # of the free places
        comes = behind.argsort(stable=True) + smaller
        fills = done & (rank < (~behind).sum())
        order = torch.where(fills, comes[rank.clamp(0, n - smaller - 1)], torch.arange(smaller, device=done.device))
        self.state.select(order)
        for value in (self.starts, self.lengths):
            value[:smaller] = value[order]
        return order

    def hypotheses(
        self,
        n: int,
        n_steps: int,
        eos: int,
        len_penalty: float,
        longest: Tensor | None = None,
        nbest: int | None = None,
    ) -> Callable[[], Hypotheses]:
        """Start reading the ended hypotheses of the first *n* sentences of the search.

        Args:
            n_steps: of the search.
            len_penalty: scores are divided by the length to the power of it.
            longest: int64 (n,), tokens before *eos*, beyond which a hypothesis of the sentence has the score -inf.
            nbest: at most this many of each sentence; None: all.

        Returns:
            What waits for them and returns them. It raises UserError if a sentence has none. Another search may
            begin before.
        """
        state, sentences = self.state, slice(n)
        ends = _on_host(sentences, slice(state.beam), state.final_step, state.final_beam, state.final_score)
        steps = _on_host(slice(n_steps), sentences, state.chosen_beam, state.chosen_token, state.chosen_score)
        limits = None if longest is None else host_copy(longest)

        def wait() -> Hypotheses:
            final_step, final_beam, final_score = ends()
            endless = (final_step < 0).all(1)
            if endless.any():
                raise UserError(
                    f"sentence {int(endless.nonzero()[0])} of the batch has no hypothesis: all scores are NaN or "
                    "-inf; the parameters are damaged, or too large for this precision"
                )
            scores = final_score / (final_step + 1) ** len_penalty
            if limits is not None:
                scores[final_step > limits()[:, None]] = -math.inf
            taken = int(final_step.max()) + 1
            chosen = (x[:taken].flatten(1).numpy() for x in steps())
            return read_out(*chosen, *(x.numpy() for x in (final_beam, final_step, final_score, scores)), eos, nbest)

        return wait


def _on_host(
    rows: slice, columns: slice, first: Tensor, second: Tensor, scores: Tensor
) -> Callable[[], tuple[Tensor, Tensor, Tensor]]:
    """Start reading these parts of two int32 tensors and of float32 *scores* of the same shape by one copy."""
    parts = (x[rows, columns] for x in (first, second, scores.view(torch.int32)))
    copy = host_copy(torch.stack([*parts]))

    def wait() -> tuple[Tensor, Tensor, Tensor]:
        first, second, scores = copy()
        return first, second, scores.view(torch.float32)

    return wait
