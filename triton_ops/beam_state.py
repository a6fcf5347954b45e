"""A step of beam search after the decoder: the state that it changes, and its definition in torch.

The rules are those of ``fairseq.sequence_generator``. No tensor changes its place or shape and nothing waits for the
device, so that a CUDA graph can do a step. `beam_search` does the same in two kernels.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

MAX_KERNEL_BEAM = 64  # beams that the kernels take: all candidates of a sentence are in the registers of one program


class BeamState(NamedTuple):
    """The hypotheses of up to B sentences in a search of T steps, on the device.

    Sentence number B and place number `beam` of ended hypotheses are scratch slots: they are written but never read.

    Attributes:
        step: int64 (1,), tokens of every hypothesis so far.
        max_len: int64 (1,), the step in which all sentences end.
        unfinished: int64 (1,), sentences that are not done.
        tokens: int64 (B * beam,), the last token of every hypothesis that is continued.
        scores: float32 (B, beam), of them, sums of log-probabilities.
        ignored: bool (B, beam), whether a place holds an ended hypothesis, because fewer go on.
        block_table: int32 (B * beam, T), where a KV cache holds their positions; a search may put another table of its
            hypotheses in its place.
        sentence: int64 (B,), the number of the sentence in every place of the batch.
        n_final: int64 (B,), its ended hypotheses.
        done: bool (B,), whether it has enough of them.
        chosen_beam, chosen_token, chosen_score: int32, int32 and float32 (T, B + 1, beam), what every step chose: the
            hypothesis that is continued, by which token, and the sum. Indexed by sentence, not by place.
        final_step, final_beam, final_score: int32, int32 and float32 (B + 1, beam + 1), the step in which a hypothesis
            ended, the hypothesis that it ended from, and the sum; a step of -1: none. Indexed by sentence.
    """

    step: Tensor
    max_len: Tensor
    unfinished: Tensor
    tokens: Tensor
    scores: Tensor
    ignored: Tensor
    block_table: Tensor
    sentence: Tensor
    n_final: Tensor
    done: Tensor
    chosen_beam: Tensor
    chosen_token: Tensor
    chosen_score: Tensor
    final_step: Tensor
    final_beam: Tensor
    final_score: Tensor

    @classmethod
    def empty(cls, n_sentences: int, n_steps: int, beam: int, device: torch.device) -> BeamState:
        """Allocate the state of *n_sentences* (B) and *n_steps* (T); `begin` makes it ready."""
        b, t = n_sentences, n_steps
        counter, places, record, final = (1,), (b, beam), (t, b + 1, beam), (b + 1, beam + 1)
        kinds: dict[torch.dtype, dict[str, tuple[int, ...]]] = {
            torch.int64: dict(
                step=counter, max_len=counter, unfinished=counter, tokens=(b * beam,), sentence=(b,), n_final=(b,)
            ),
            torch.int32: dict(
                block_table=(b * beam, t), chosen_beam=record, chosen_token=record, final_step=final, final_beam=final
            ),
            torch.float32: dict(scores=places, chosen_score=record, final_score=final),
            torch.bool: dict(ignored=places, done=(b,)),
        }
        return cls(
            **{
                name: torch.zeros(shape, dtype=dtype, device=device)
                for dtype, shapes in kinds.items()
                for name, shape in shapes.items()
            }
        )

    @property
    def beam(self) -> int:
        return self.scores.size(1)

    def begin(self, n: int, max_len: int, first_token: int, n_first: int = 1) -> None:
        """Start with *n* sentences, and hypotheses of at most *max_len* tokens before the one that ends them.

        Of the *beam* hypotheses of a sentence, which are alike at first, only *n_first* are continued.
        """
        for value in (self.step, self.ignored, self.n_final, self.block_table):
            value.zero_()
        self.max_len.fill_(max_len)
        self.unfinished.fill_(n)
        self.tokens.fill_(first_token)
        self.scores.fill_(-math.inf)[:, :n_first] = 0
        self.final_step.fill_(-1)
        # Empty places of the batch are done, and written to the scratch slot.
        self.done.fill_(True)[:n] = False
        torch.arange(n, out=self.sentence.fill_(self.done.numel())[:n])

    def select(self, order: Tensor) -> None:
        """Move the sentences in the places *order*, int64 (n,), to the first n places."""
        n, hypotheses = order.numel(), self.hypotheses(order)
        for value in (self.scores, self.ignored, self.sentence, self.n_final, self.done):
            value[:n] = value[order]
        for value in (self.tokens, self.block_table):
            value[: n * self.beam] = value[hypotheses]

    def hypotheses(self, places: Tensor) -> Tensor:
        """Return the numbers of the hypotheses in the places of sentences: int64 (n,) -> int64 (n * beam,)."""
        return (places[:, None] * self.beam + torch.arange(self.beam, device=places.device)).flatten()

    def parents(self, n: int) -> Tensor:
        """Return the numbers of the hypotheses that the last step continued, of *n* sentences: int64 (n * beam,)."""
        parent = self.chosen_beam.index_select(0, self.step - 1)[0, self.sentence[:n]].long()
        return (parent + self.beam * torch.arange(n, device=parent.device)[:, None]).flatten()


def choose(state: BeamState, n: int, sums: Tensor, parent: Tensor, token: Tensor, eos: int) -> None:
    """Record the continuations of the first *n* sentences that end, and go on with the others.

    Args:
        sums: float32 (n, k), of log-probabilities, best first; k >= beam.
        parent, token: int64 (n, k), the hypothesis that is continued, and by which token.
    """
    if sums.is_cpu:
        choose_on_host(state, n, sums.numpy(), parent.numpy(), token.numpy(), eos)
    else:
        _choose_on_device(state, n, sums, parent, token, eos)


def _choose_on_device(state: BeamState, n: int, sums: Tensor, parent: Tensor, token: Tensor, eos: int) -> None:
    """Do as `choose`, without waiting for the device."""
    parent, token, sums = _end(state, n, sums, parent, token, token.eq(eos))
    at = state.step * state.chosen_beam.size(1) + state.sentence[:n]
    for record, value in ((state.chosen_beam, parent), (state.chosen_token, token), (state.chosen_score, sums)):
        record.flatten(0, 1).index_copy_(0, at, value.to(record.dtype))
    state.scores[:n] = sums
    state.tokens[: n * state.beam] = token.flatten()
    rows = (parent + state.beam * torch.arange(n, device=parent.device)[:, None]).flatten()
    state.block_table[: n * state.beam] = state.block_table.index_select(0, rows)


def choose_on_host(
    state: BeamState, n: int, sums: np.ndarray, parents: np.ndarray, tokens: np.ndarray, eos: int
) -> None:
    """Do as `choose`.

    Nothing has to wait here, so steps in which nothing ends, most of them, do less; and a call of numpy for a few
    numbers takes a fraction of one of torch.
    """
    beam, step, row, ends = state.beam, int(state.step), _column(n), tokens == eos
    if ends.any() or state.ignored.numpy()[:n].any() or step >= int(state.max_len):
        active = row, _end_on_host(state, n, sums, parents, ends)
        sums, parents, tokens = sums[active], parents[active], tokens[active]
    sums, parents, tokens = sums[:, :beam], parents[:, :beam], tokens[:, :beam]
    at = step, state.sentence.numpy()[:n]
    for record, value in ((state.chosen_beam, parents), (state.chosen_token, tokens), (state.chosen_score, sums)):
        record.numpy()[at] = value
    state.scores.numpy()[:n] = sums
    state.tokens.numpy()[: n * beam] = tokens.reshape(-1)
    table = state.block_table.view(torch.uint8).numpy()  # of any type, such as numpy lacks
    table[: n * beam] = table[(parents + beam * row).reshape(-1)]


def _end_on_host(state: BeamState, n: int, sums: np.ndarray, parents: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Record the hypotheses that end, as `_end` does; return the places of the continuations of others, (n, beam)."""
    beam, step, last_step = state.beam, int(state.step), int(state.max_len)
    sentence, done, ignored, n_final = (
        x.numpy()[:n] for x in (state.sentence, state.done, state.ignored, state.n_final)
    )
    ends = ends & (sums != -math.inf)
    ends[:, :beam] &= ~ignored
    final_step, final_beam, final_score = (x.numpy() for x in (state.final_step, state.final_beam, state.final_score))
    for place, candidate in zip(*ends[:, :beam].nonzero(), strict=True):  # few
        if not done[place] and n_final[place] < beam:
            at = sentence[place], n_final[place]
            final_step[at], final_beam[at], final_score[at] = step, parents[place, candidate], sums[place, candidate]
            n_final[place] += 1
    done |= (n_final == beam) | (step >= last_step)
    state.unfinished.fill_(n - int(done.sum()))

    ends[:, :beam] |= ignored
    active = ends.argsort(1, kind="stable")[:, :beam]
    ignored[:] = ends[_column(n), active]
    return active


@functools.lru_cache
def _column(n: int) -> np.ndarray:
    """0 ... n - 1, int64 (n, 1)."""
    return np.arange(n)[:, None]


def _end(
    state: BeamState, n: int, sums: Tensor, parent: Tensor, token: Tensor, ends: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Record the hypotheses that end, *ends* bool (n, k); return the *beam* best continuations of others, (n, beam)."""
    beam, k = state.beam, sums.size(1)
    sentence, done, ignored, n_final = (x[:n] for x in (state.sentence, state.done, state.ignored, state.n_final))
    ends = ends & sums.ne(-math.inf)
    ends[:, :beam] &= ~ignored
    counted = ends[:, :beam] & ~done[:, None]  # only among the first `beam` candidates
    place = n_final[:, None] + counted.cumsum(1) - 1
    place = torch.where(counted & (place < beam), place, beam)
    where = (sentence[:, None].expand_as(place), place)
    state.final_step.index_put_(where, state.step.to(torch.int32).expand_as(place))
    state.final_beam.index_put_(where, parent[:, :beam].to(torch.int32))
    state.final_score.index_put_(where, sums[:, :beam].contiguous())
    n_final.copy_((n_final + counted.sum(1)).clamp_max(beam))
    ended = (n_final == beam) | (state.step >= state.max_len)
    state.unfinished.sub_((ended & ~done).sum())
    done |= ended

    ends[:, :beam] |= ignored
    order = ends * k + torch.arange(k, device=ends.device)
    order, active = order.topk(beam, largest=False)
    ignored.copy_(order >= k)
    return parent.gather(1, active), token.gather(1, active), sums.gather(1, active)


def copy_first_hypothesis(state: BeamState, n: int, rows: Tensor) -> None:
    """Let all hypotheses of the sentences *rows*, bool (n,), be their first one up to here. They must end in this step:
    the slots that they consist of stay as they are."""
    rows = rows[:, None]
    scores = state.scores[:n]
    scores.copy_(torch.where(rows, scores[:, :1], scores))
    at = ((state.step - 1).clamp_min(0).expand(n), state.sentence[:n])
    for record in (state.chosen_beam, state.chosen_token, state.chosen_score):
        last = record[at]
        record.index_put_(at, torch.where(rows, last[:, :1], last))


def penalized_log_probs(logits: Tensor, penalty: Tensor | None) -> Tensor:
    """Return float32 log-probabilities (N, V) with the *penalty* float32 (V,) of a step; None: *logits* are that."""
    return logits if penalty is None else logits.log_softmax(-1, dtype=torch.float32).add_(penalty)


def best_groups(maxima: Tensor, scores: Tensor, k: int) -> Tensor:
    """Find the groups of tokens that hold the k best sums of a hypothesis and one more token, of each sentence.

    They lie in the k groups with the best maxima. So the large tensor is read once, where ``topk`` of all sums reads it
    once for every eight bits, and the sums need not be formed.

    Args:
        maxima: float32 (n, beam, groups), of the log-probabilities of a group's tokens.
        scores: float32 (n, beam), of the hypotheses so far.

    Returns:
        int64 (n, k), counted through (beam, groups).
    """
    return _best(maxima + scores[..., None], k)[1]


def best_continuations(log_probs: Tensor, scores: Tensor, groups: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Find the k best sums of a hypothesis and one more token among the k *groups* of each sentence, int64 (n, k).

    Args:
        log_probs: float32 (n, beam, V), of the next token.
        size: of a group.

    Returns:
        Sums float32, hypotheses int64 and tokens int64, (n, k) each, best first.
    """
    n_groups, k = log_probs.size(2) // size, groups.size(1)
    parent = groups // n_groups
    of_groups = log_probs.reshape(groups.size(0), -1, size).gather(1, groups[..., None].expand(-1, -1, size))
    sums, place = _best(of_groups.add_(scores.gather(1, parent)[..., None]), k)
    group, token = place // size, place % size
    return sums, parent.gather(1, group), (groups.gather(1, group) % n_groups).mul_(size).add_(token)


def best_on_host(log_probs: Tensor, scores: Tensor, k: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Find what `best_groups` and `best_continuations` find, by calls of numpy.

    Tokens of a group are apart, so that their maximum is that of whole rows of groups.

    Args:
        log_probs: float32 (n, beam, V), of the next token.
        scores: float32 (n, beam), of the hypotheses so far.

    Returns:
        Sums float32, hypotheses int64 and tokens int64, (n, k) each, best first.
    """
    n, beam, vocab_size = log_probs.shape
    size = group_size(vocab_size, 2, vocab_size**0.5 / 2)
    grouped, sums, row = log_probs.view(n, beam, size, -1), scores.numpy(), _column(n)
    n_groups = grouped.size(3)
    # What is less is better: numpy sorts NaN to the end.
    groups = (-sums[..., None] - grouped.amax(2).numpy()).reshape(n, -1).argpartition(k - 1, 1)[:, :k]
    parent, group = np.divmod(groups, n_groups)
    costs = (-sums[row, parent][..., None] - grouped.numpy()[row, parent, :, group]).reshape(n, -1)
    place = costs.argpartition(k - 1, 1)[:, :k]
    place = place[row, costs[row, place].argsort(1)]
    which, token = np.divmod(place, size)
    return np.fmax(-costs[row, place], -np.inf), parent[row, which], token * n_groups + group[row, which]


def best_of_groups(
    logits: Tensor, penalty: Tensor | None, lse: Tensor, maxima: Tensor, size: int, k: int
) -> tuple[Tensor, Tensor]:
    """Find the k largest penalized log-probabilities of each hypothesis, as `best_groups` and `best_continuations` do.

    Args:
        logits: (N, V), less *lse*, float32 (N,), and plus *penalty*, float32 (V,), what is compared.
        penalty: None: the logits are what is compared.
        maxima: float32 (N, V / size), of every group of *size* tokens.

    Returns:
        Log-probabilities float32 and tokens int64, (N, k) each, best first.
    """
    _, groups = _best(maxima, k)
    token = (groups[..., None] * size + torch.arange(size, device=groups.device)).flatten(1)
    values = logits.gather(1, token).float()
    if penalty is not None:
        values = values - lse[:, None] + penalty[token]
    values, place = _best(values, k)
    return values, token.gather(1, place)


def _best(sums: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k best of each sentence, best first, and their places; NaN counts as -inf."""
    return sums.nan_to_num_(-math.inf, posinf=math.inf, neginf=-math.inf).flatten(1).topk(k)


@functools.cache
def group_size(vocab_size: int, least: int, aim: float = 64) -> int:
    """The divisor of *vocab_size* nearest to *aim*, up to 128, that leaves *least* groups or more."""
    divisors = (size for size in range(1, min(vocab_size // least, 128) + 1) if vocab_size % size == 0)
    return min(divisors, key=lambda size: abs(math.log2(size / aim)))
