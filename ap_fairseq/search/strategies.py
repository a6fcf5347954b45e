"""How a step chooses among the continuations of hypotheses where that is not beam search, as in `fairseq.search`.

A strategy sees what the decoder says and returns candidates; `triton_ops.api.continue_beams` records those of them that
end, and goes on with the others. No shape depends on a value and nothing waits for the device.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from fairseq import search as fairseq_search
from torch import Tensor

from ap_fairseq.files import UserError
from triton_ops.api import best_tokens
from triton_ops.beam_state import BeamState, best_continuations, best_groups, group_size, penalized_log_probs


@dataclass(frozen=True)
class Step:
    """What a step chooses from.

    Attributes:
        state: its first *n* sentences go on.
        logits: (n * beam, V), of the next token.
        penalty: float32 (V,), added to log-probabilities; None: *logits* are float32 log-probabilities with penalties.
        memory: of the strategy; it changes it in place.
        kernels: whether Triton's kernels run.
    """

    state: BeamState
    n: int
    logits: Tensor
    penalty: Tensor | None
    memory: Tensor
    kernels: bool

    def scores(self) -> Tensor:
        """Return the sums of the hypotheses so far, float32 (n, beam)."""
        return self.state.scores[: self.n]

    def log_probs(self) -> Tensor:
        """Return penalized log-probabilities, float32 (n, beam, V)."""
        log_probs = penalized_log_probs(self.logits, self.penalty)
        return log_probs.view(self.n, self.state.beam, -1)

    def best_tokens(self, k: int) -> tuple[Tensor, Tensor]:
        """Return the k best penalized log-probabilities of each hypothesis, and their tokens: (n, beam, k) each."""
        found = best_tokens(self.logits, self.penalty, k, self.kernels)
        values, tokens = (x.view(self.n, self.state.beam, k) for x in found)
        return values, tokens


class Strategy(ABC):
    """A way to choose the continuations of a step."""

    @abstractmethod
    def n_first(self, beam: int) -> int:
        """Return how many hypotheses are continued in the first step, when all are alike."""

    def memory(self, n_sentences: int, device: torch.device) -> Tensor:
        """Allocate what a search remembers of each sentence; zeros at its start. The last slot is for empty places."""
        return torch.zeros(n_sentences + 1, 0, device=device)

    @abstractmethod
    def candidates(self, step: Step) -> tuple[Tensor, Tensor, Tensor]:
        """Choose continuations of each sentence, beam <= k <= 2 * beam.

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

    def candidates(self, step: Step) -> tuple[Tensor, Tensor, Tensor]:
        tokens = None
        if 0 < self.top_k and self.top_p <= 0:
            values, tokens = step.best_tokens(min(self.top_k, step.logits.size(1)))
        else:
            values = step.log_probs().nan_to_num_(-math.inf, posinf=math.inf, neginf=-math.inf)
        if self.top_p > 0:
            values, tokens = values.sort(-1, descending=True)
            mass = values.exp().cumsum(-1)
            values[..., 1:].masked_fill_(mass[..., :-1] >= self.top_p, -math.inf)
        # An exponential race: which of independent clocks of these rates rings first is a draw by them, without a wait.
        clock = torch.empty_like(values).exponential_().clamp_min_(torch.finfo(values.dtype).tiny)
        drawn = clock.log_().neg_().add_(values).argmax(-1, keepdim=True)
        sums = step.scores() + values.gather(-1, drawn)[..., 0]
        token = (drawn if tokens is None else tokens.gather(-1, drawn))[..., 0]
        return sums, torch.arange(token.size(1), device=token.device).expand_as(token), token


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

    def candidates(self, step: Step) -> tuple[Tensor, Tensor, Tensor]:
        log_probs, memory, sentence = step.log_probs(), step.memory, step.state.sentence[: step.n]
        k, size = log_probs.size(1) // self.n_groups, group_size(log_probs.size(2), 2)
        price = 1 + memory[sentence]  # (n, groups, groups)
        found: list[tuple[Tensor, ...]] = []
        for group in range(self.n_groups):
            part, scores = (x[:, group :: self.n_groups] for x in (log_probs, step.scores()))
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

    def candidates(self, step: Step) -> tuple[Tensor, Tensor, Tensor]:
        k = 2 * step.state.beam
        values, tokens = step.best_tokens(k)
        rank = torch.arange(1, k + 1, device=values.device) * (step.state.step > 0)  # at first there are no siblings
        sums, place = (values + step.scores()[..., None] - rank * self.rate).flatten(1).topk(k)
        return sums, place // k, tokens.flatten(1).gather(1, place)


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
