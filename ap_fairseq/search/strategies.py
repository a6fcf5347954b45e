"""How a step chooses among the continuations of hypotheses where that is not beam search, as in `fairseq.search`.

A strategy sees log-probabilities and returns candidates. `triton_ops.beam_state.choose` records those of them that end,
and goes on with the others. No shape depends on a value and nothing waits for the device.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from fairseq import search as fairseq_search
from torch import Tensor

from ap_fairseq.files import UserError
from triton_ops.beam_state import BeamState, best_continuations, best_groups, group_size


class Strategy(ABC):
    """A way to choose the continuations of a step."""

    @abstractmethod
    def n_first(self, beam: int) -> int:
        """Return how many hypotheses are continued in the first step, when all are alike."""

    def memory(self, n_sentences: int, device: torch.device) -> Tensor:
        """Allocate what a search remembers of each sentence; zeros at its start. The last slot is for empty places."""
        return torch.zeros(n_sentences + 1, 0, device=device)

    @abstractmethod
    def candidates(self, log_probs: Tensor, state: BeamState, memory: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Choose k >= beam continuations of each sentence.

        Args:
            log_probs: float32 (n, beam, V), of the next token; may be changed.
            memory: changed in place.

        Returns:
            Sums float32, hypotheses int64 and tokens int64, (n, k) each.
        """


@dataclass(frozen=True)
class Sampling(Strategy):
    """Draw one token for every hypothesis, of the *top_k* best or of the smallest set with a probability of *top_p*.

    0 or less: no such limit; *top_p* takes precedence. Scores are sums of the model's own log-probabilities. Random
    numbers are those of torch's generator of the device, in graphs too, so a seed repeats a translation.
    """

    top_k: int
    top_p: float

    def n_first(self, beam: int) -> int:
        return beam

    def candidates(self, log_probs: Tensor, state: BeamState, memory: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        n, beam, vocab_size = log_probs.shape
        values, tokens = log_probs.nan_to_num_(-math.inf, posinf=math.inf, neginf=-math.inf), None
        if self.top_p > 0:
            values, tokens = values.sort(-1, descending=True)
            mass = values.exp().cumsum(-1)
            values[..., 1:].masked_fill_(mass[..., :-1] >= self.top_p, -math.inf)
        elif self.top_k > 0:
            found = best_tokens(values.flatten(0, 1), min(self.top_k, vocab_size))
            values, tokens = (x.view(n, beam, -1) for x in found)
        # The first of independent exponential clocks of these rates to ring is a draw by them, and none is waited for.
        clock = torch.empty_like(values).exponential_().clamp_min_(torch.finfo(values.dtype).tiny)
        drawn = (values - clock.log_()).argmax(-1, keepdim=True)
        sums = state.scores[:n] + values.gather(-1, drawn)[..., 0]
        token = (drawn if tokens is None else tokens.gather(-1, drawn))[..., 0]
        return sums, torch.arange(beam, device=token.device).expand(n, beam), token


@dataclass(frozen=True)
class DiverseGroups(Strategy):
    """Beam search in groups, each of which pays for the tokens that those before it chose (Vijayakumar et al. 2016).

    The price of a token is *strength* for each group that chose it, and for each time, discounted by *discount*, that
    the two groups chose the same before.
    """

    n_groups: int
    strength: float
    discount: float

    def n_first(self, beam: int) -> int:
        return self.n_groups

    def memory(self, n_sentences: int, device: torch.device) -> Tensor:
        return torch.zeros(n_sentences + 1, self.n_groups, self.n_groups, device=device)  # how often two chose the same

    def candidates(self, log_probs: Tensor, state: BeamState, memory: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        n, beam, vocab_size = log_probs.shape
        k, size, sentence = beam // self.n_groups, group_size(vocab_size, 2), state.sentence[:n]
        price = 1 + memory[sentence]  # (n, groups, groups)
        found: list[tuple[Tensor, ...]] = []
        for group in range(self.n_groups):
            part, scores = (x[:, group :: self.n_groups] for x in (log_probs, state.scores[:n]))
            if group:
                chosen = torch.stack([token for *_, token in found], 2)  # (n, k, groups before)
                prices = price[:, None, group, :group].expand_as(chosen)
                paid = torch.zeros_like(log_probs[:, 0]).scatter_add_(1, chosen.flatten(1), prices.flatten(1))
                part = part - self.strength * paid[:, None]
            groups = best_groups(part.unflatten(2, (-1, size)).amax(-1), scores, k)
            sums, parent, token = best_continuations(part, scores, groups, size)
            found.append((sums, parent * self.n_groups + group, token))
        sums, parent, token = (torch.stack(x, 2) for x in zip(*found, strict=True))  # (n, k, groups)
        alike = token[:, :, None].eq(token[..., None]).sum(1)
        memory[sentence] = self.discount * (memory[sentence] + alike)
        return sums.flatten(1), parent.flatten(1), token.flatten(1)


@dataclass(frozen=True)
class DiverseSiblings(Strategy):
    """Beam search in which the continuation that is number r of its hypothesis pays r times *rate* (Li et al. 2016)."""

    rate: float

    def n_first(self, beam: int) -> int:
        return 1

    def candidates(self, log_probs: Tensor, state: BeamState, memory: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        n, beam, _ = log_probs.shape
        k = 2 * beam
        values, tokens = (x.view(n, beam, k) for x in best_tokens(log_probs.flatten(0, 1), k))
        rank = torch.arange(1, k + 1, device=values.device) * (state.step > 0)  # at first there are no siblings
        sums, place = (values + state.scores[:n, :, None] - rank * self.rate).flatten(1).topk(k)
        return sums, place // k, tokens.flatten(1).gather(1, place)


def best_tokens(log_probs: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the k largest of each row, float32 (N, V), best first, and their places: (N, k) each."""
    rows, nothing = log_probs[:, None], log_probs.new_zeros(log_probs.size(0), 1)
    size = group_size(log_probs.size(1), k)
    groups = best_groups(rows.unflatten(2, (-1, size)).amax(-1), nothing, k)
    values, _, tokens = best_continuations(rows, nothing, groups, size)
    return values, tokens


def covers(search: fairseq_search.Search) -> bool:
    """Whether `from_fairseq` knows fairseq's *search*, and flags can have chosen its settings."""
    if isinstance(search, fairseq_search.LengthConstrainedBeamSearch):
        return (search.min_len_a, search.min_len_b, search.max_len_a, search.max_len_b) == (1, 0, 1, 0)
    return type(search) in STRATEGIES and getattr(search, "candidate_multiple", 1) == 1


def from_fairseq(search: fairseq_search.Search, beam: int) -> Strategy | None:
    """Return the strategy of a *search* that is covered; None: beam search.

    Raises:
        UserError: *beam* hypotheses cannot be divided into its groups.
    """
    if isinstance(search, fairseq_search.DiverseBeamSearch) and beam % search.num_groups:
        raise UserError(
            f"--beam {beam} is not a multiple of --diverse-beam-groups {search.num_groups}: the groups must be alike"
        )
    return STRATEGIES[type(search)](search)


STRATEGIES = {
    fairseq_search.BeamSearch: lambda search: None,
    fairseq_search.LengthConstrainedBeamSearch: lambda search: None,  # a restriction
    fairseq_search.Sampling: lambda search: Sampling(search.sampling_topk, search.sampling_topp),
    fairseq_search.DiverseBeamSearch: lambda search: DiverseGroups(
        search.num_groups, -search.diversity_strength, search.diversity_discount
    ),
    fairseq_search.DiverseSiblingsSearch: lambda search: DiverseSiblings(search.diversity_rate),
}
