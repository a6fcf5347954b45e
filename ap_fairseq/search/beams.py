"""The state of a beam search on the device, and the rules by which a step changes it.

The rules are those of ``fairseq.sequence_generator``. Nothing here waits for the device before the results are read,
and no tensor changes its place or shape, so that a CUDA graph can do a step.
"""

from __future__ import annotations

import functools
import itertools
import math

import torch
from torch import Tensor

from ap_fairseq.files import UserError

MAX_KERNEL_BEAM = 64  # beams that the kernels take: all candidates of a sentence are in the registers of one program


class BeamSearchState:
    """Up to B sentences of *beam* hypotheses; T target positions.

    Sentence number B is a bin: what is written for it is never read. The tables of caches have a row for every head of
    every decoder self-attention site, and of every cross-attention site.

    Args:
        sizes: B, T, and the source tokens of the longest sentence.
        self_heads, cross_heads: the heads of each decoder self-attention and cross-attention site.
        kernels: whether Triton's kernels do what a step does beside the decoder.
    """

    def __init__(
        self,
        sizes: tuple[int, int, int],
        beam: int,
        self_heads: list[int],
        cross_heads: list[int],
        device: torch.device,
        kernels: bool,
    ):
        b, t, source_length = sizes

        def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self.beam, self.kernels = beam, kernels
        self.step, self.max_len, self.unfinished = (zeros(1) for _ in range(3))
        # Of the hypotheses that are continued.
        self.number = torch.arange(b * beam, dtype=torch.int32, device=device)
        self.tokens = zeros(b * beam)
        self.rows = zeros(b * beam, t, dtype=torch.int32)
        self.scores = zeros(b, beam, dtype=torch.float32)
        self.ignored = zeros(b, beam, dtype=torch.bool)
        # Of the sentences in the batch.
        self.sentence, self.n_final, self.lengths = (zeros(b) for _ in range(3))
        self.starts = zeros(b, sum(cross_heads))
        self.done = zeros(b, dtype=torch.bool)
        # Of the heads: where the rows of a position begin; of its site, the rows in use.
        self.offsets = zeros(sum(self_heads), t, dtype=torch.int32)
        self.source_offsets = zeros(sum(cross_heads), source_length, dtype=torch.int32)
        self.used = zeros(sum(self_heads))
        self.head = torch.cat([torch.arange(n, device=device) for n in self_heads])
        self.n_heads = torch.cat([torch.full((n,), n, device=device) for n in self_heads])
        # What is read at the end: what every step chose, and which hypotheses ended.
        self.chosen_beam, self.chosen_token = (zeros(t, b + 1, beam, dtype=torch.int32) for _ in range(2))
        self.chosen_score = zeros(t, b + 1, beam, dtype=torch.float32)
        self.final_step, self.final_beam = (zeros(b + 1, beam + 1, dtype=torch.int32) for _ in range(2))
        self.final_score = zeros(b + 1, beam + 1, dtype=torch.float32)

    def begin(self, lengths: Tensor, max_len: int, first_token: int) -> None:
        """Start with sentences of *lengths*, int64 (n,), source tokens, and translations of at most *max_len*."""
        n = lengths.numel()
        for value in (self.step, self.used, self.offsets, self.ignored, self.n_final, self.rows, self.starts):
            value.zero_()
        self.max_len.fill_(max_len)
        self.unfinished.fill_(n)
        self.tokens.fill_(first_token)
        self.scores.fill_(-math.inf)[:, 0] = 0  # at first all hypotheses are alike: only one is continued
        self.final_step.fill_(-1)
        # Empty places of the batch: done, written to the bin, attending to one row that exists.
        self.done.fill_(True)[:n] = False
        torch.arange(n, out=self.sentence.fill_(self.done.numel())[:n])
        self.lengths.fill_(1)[:n] = lengths

    def number_rows(self, n: int) -> None:
        """Number the rows of the caches that a step of the first *n* sentences writes."""
        n_hypotheses = n * self.beam
        self.rows[:n_hypotheses].index_copy_(1, self.step, self.number[:n_hypotheses, None])
        begins = torch.add(self.used, self.head, alpha=n_hypotheses)
        self.offsets.index_copy_(1, self.step, begins.to(torch.int32)[:, None])
        self.used.add_(self.n_heads, alpha=n_hypotheses)

    def advance(self, n: int, logits: Tensor, penalty: Tensor, eos: int) -> None:
        """Choose how the first *n* sentences go on, and record it.

        Args:
            logits: (n * beam, V), of the next word; contiguous.
            penalty: float32 (V,), added to log-probabilities. These count as -inf where they are NaN, as in fairseq.
            eos: the word that ends a hypothesis.
        """
        scores, k = self.scores[:n], 2 * self.beam
        size = group_size(logits.size(1), 2)
        if self.kernels and self.beam <= MAX_KERNEL_BEAM:
            from triton_ops.beam_search import choose, largest_of_groups  # imports triton

            maxima, lse = largest_of_groups(logits, penalty, size)
            choose(self, n, logits, penalty, lse, best_groups(maxima.view(n, self.beam, -1), scores, k), size, eos)
        else:
            log_probs = logits.log_softmax(-1, dtype=torch.float32).add_(penalty).view(n, self.beam, -1)
            groups = best_groups(log_probs.unflatten(2, (-1, size)).amax(-1), scores, k)
            self.choose(n, *best_continuations(log_probs, scores, groups, size), eos)
        self.step.add_(1)

    def choose(self, n: int, sums: Tensor, parent: Tensor, token: Tensor, eos: int) -> None:
        """Record the continuations that end, and go on with the others.

        Args:
            sums: float32 (n, 2 * beam), of log-probabilities, best first.
            parent, token: int64 (n, 2 * beam), the hypothesis that is continued, and with which word.
        """
        beam = self.beam
        sentence, done, ignored, n_final = (x[:n] for x in (self.sentence, self.done, self.ignored, self.n_final))

        ends = token.eq(eos) & sums.ne(-math.inf)
        ends[:, :beam] &= ~ignored
        counted = ends[:, :beam] & ~done[:, None]  # only among the first `beam` candidates
        place = n_final[:, None] + counted.cumsum(1) - 1
        place = torch.where(counted & (place < beam), place, beam)  # the last place is a bin
        where = (sentence[:, None].expand_as(place), place)
        self.final_step.index_put_(where, self.step.to(torch.int32).expand_as(place))
        self.final_beam.index_put_(where, parent[:, :beam].to(torch.int32))
        self.final_score.index_put_(where, sums[:, :beam].contiguous())
        n_final.copy_((n_final + counted.sum(1)).clamp_max(beam))
        ended = (n_final == beam) | (self.step >= self.max_len)
        self.unfinished.sub_((ended & ~done).sum())
        done |= ended

        ends[:, :beam] |= ignored
        order = ends * (2 * beam) + torch.arange(2 * beam, device=ends.device)
        order, active = order.topk(beam, largest=False)
        ignored.copy_(order >= 2 * beam)
        parent, token, sums = (x.gather(1, active) for x in (parent, token, sums))
        at = (self.step.expand_as(sentence), sentence)
        self.chosen_beam.index_put_(at, parent.to(torch.int32))
        self.chosen_token.index_put_(at, token.to(torch.int32))
        self.chosen_score.index_put_(at, sums)
        self.scores[:n] = sums
        self.tokens[: n * beam] = token.flatten()
        parent = parent + beam * torch.arange(n, device=parent.device)[:, None]
        self.rows[: n * beam] = self.rows.index_select(0, parent.flatten())

    def shrink(self, n: int, smaller: int) -> None:
        """Move the unfinished ones of the first *n* sentences to the first *smaller* places."""
        order = self.done[:n].argsort(stable=True)[:smaller]
        hypotheses = (order[:, None] * self.beam + torch.arange(self.beam, device=order.device)).flatten()
        for state in (self.scores, self.ignored, self.sentence, self.n_final, self.starts, self.lengths, self.done):
            state[:smaller] = state[order]
        for state in (self.tokens, self.rows):
            state[: smaller * self.beam] = state[hypotheses]

    def hypotheses(self, n: int, eos: int, len_penalty: float) -> list[list[dict[str, Tensor]]]:
        """Return the ended hypotheses of the first *n* sentences of the search as fairseq does, on the CPU, best first.

        Args:
            len_penalty: scores are divided by the length to the power of it.

        Raises:
            UserError: a sentence has none.
        """
        final_step, final_beam, final_score = (
            x[:n, : self.beam].cpu() for x in (self.final_step, self.final_beam, self.final_score)
        )
        endless = (final_step < 0).all(1)
        if endless.any():
            raise UserError(
                f"sentence {int(endless.nonzero()[0])} of the batch has no hypothesis: all scores are NaN or -inf; the "
                "parameters are damaged, or too large for this precision"
            )
        length = int(final_step.max()) + 1
        chosen_beam, chosen_token, chosen_score = (
            x[:length, :n].cpu() for x in (self.chosen_beam, self.chosen_token, self.chosen_score)
        )
        path = trace_back(chosen_beam, final_beam, final_step)
        inside = torch.arange(length)[:, None, None] < final_step  # before the token that ends it
        tokens = torch.where(inside, chosen_token.long().gather(2, path), eos)
        totals = torch.where(inside, chosen_score.gather(2, path), final_score)  # up to each position
        per_position = totals.diff(dim=0, prepend=torch.zeros(1, n, self.beam))
        scores = final_score / (final_step + 1) ** len_penalty
        return best_first(tokens, per_position, scores, final_step + 1)


def trace_back(parents: Tensor, last: Tensor, last_step: Tensor) -> Tensor:
    """Follow the back-pointers of hypotheses.

    Args:
        parents: int32 (T, B, beam), which hypothesis each one continued in each step.
        last: int32 (B, beam), the one that each hypothesis ended from.
        last_step: int32 (B, beam), when.

    Returns:
        int64 (T, B, beam), the place of each hypothesis in each step before its last; arbitrary afterwards.
    """
    place, path = last.long(), []
    for step, pointers in reversed(list(enumerate(parents.long().unbind()))):
        path.append(place)
        place = torch.where(step < last_step, pointers.gather(1, place), place)
    return torch.stack(path[::-1])


def best_first(tokens: Tensor, per_position: Tensor, scores: Tensor, lengths: Tensor) -> list[list[dict[str, Tensor]]]:
    """Return the hypotheses of each sentence as fairseq does, by falling scores.

    Args:
        tokens: int64 (T, B, beam), per_position: float32 (T, B, beam), padded on the right.
        scores: float32 (B, beam).
        lengths: int32 (B, beam), 0 where there is no hypothesis.
    """
    beam, sizes, values = scores.size(1), lengths.tolist(), scores.tolist()
    ranked = [
        sorted((place for place in range(beam) if sizes[b][place]), key=lambda place: -values[b][place])
        for b in range(len(sizes))
    ]
    real = [sizes[b][place] for b, places in enumerate(ranked) for place in places]
    order = torch.tensor([b * beam + place for b, places in enumerate(ranked) for place in places])
    # Tensors of all hypotheses at once: to index them one by one would take as long as the search.
    inside = torch.arange(tokens.size(0)) < torch.tensor(real)[:, None]
    tokens, per_position = (x.flatten(1).t()[order][inside].split(real) for x in (tokens, per_position))
    nothing = torch.empty(0)
    hypotheses = (
        {"tokens": x, "score": score, "attention": nothing, "alignment": nothing, "positional_scores": positional}
        for x, score, positional in zip(tokens, scores.flatten()[order].unbind(), per_position, strict=True)
    )
    return [list(itertools.islice(hypotheses, len(places))) for places in ranked]


def best_groups(maxima: Tensor, scores: Tensor, k: int) -> Tensor:
    """Find the groups of words that hold the k best sums of a hypothesis and one more word, of each sentence.

    They lie in the k groups with the best maxima. So the large tensor is read once, where ``topk`` of all sums reads it
    once for every eight bits, and the sums need not be formed.

    Args:
        maxima: float32 (n, beam, groups), of the log-probabilities of a group's words.
        scores: float32 (n, beam), of the hypotheses so far.

    Returns:
        int64 (n, k), counted through (beam, groups).
    """
    return _best(maxima + scores[..., None], k)[1]


def best_continuations(log_probs: Tensor, scores: Tensor, groups: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Find the k best sums of a hypothesis and one more word among the k *groups* of each sentence, int64 (n, k).

    Args:
        log_probs: float32 (n, beam, V), of the next word.
        size: of a group.

    Returns:
        Sums float32, hypotheses int64 and words int64, (n, k) each, best first.
    """
    n_words, k = log_probs.size(2), groups.size(1)
    index = (groups[..., None] * size + torch.arange(size, device=groups.device)).flatten(1)  # into beam * V
    parent, word = index // n_words, index % n_words
    sums, place = _best(log_probs.flatten(1).gather(1, index) + scores.gather(1, parent), k)
    return sums, parent.gather(1, place), word.gather(1, place)


def _best(sums: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k best of each sentence, best first, and their places; NaN counts as -inf."""
    return sums.nan_to_num_(-math.inf, posinf=math.inf, neginf=-math.inf).flatten(1).topk(k)


@functools.cache
def group_size(n_words: int, least: int) -> int:
    """The divisor of *n_words* nearest to 64, up to 128, that leaves *least* groups or more."""
    divisors = (size for size in range(1, min(n_words // least, 128) + 1) if n_words % size == 0)
    return min(divisors, key=lambda size: abs(math.log2(size / 64)))
