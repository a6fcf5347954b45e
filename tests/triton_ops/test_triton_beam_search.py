"""A step of beam search chooses the best continuations, and the kernel changes the state as torch does."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from triton_ops.api import advance_beams, best_tokens, continue_beams
from triton_ops.beam_state import (
    BeamState,
    _choose_on_device,
    best_continuations,
    best_groups,
    best_on_host,
    choose_on_host,
    group_size,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EOS = 2


@given(
    *(st.integers(1, 5), st.integers(1, 4), st.sampled_from([16, 24, 34, 128, 8 * 11 * 13, 509])),
    *(st.sampled_from(["tokens", "first step", "last step", "nan"]), st.integers(0, 2**32 - 1)),
)
def test_the_best_continuations_are_the_best_of_all_sums(n, beam, vocab_size, case, seed):
    torch.manual_seed(seed)
    log_probs, scores = torch.randn(n, beam, vocab_size).log_softmax(-1), torch.randn(n, beam)
    if case == "first step":
        scores[:, 1:] = -math.inf
    elif case == "last step":
        log_probs[..., torch.arange(vocab_size) != 2] = -math.inf
    elif case == "nan":
        log_probs[0, 0] = math.nan
        log_probs[-1, -1] = -math.inf
        log_probs[-1, -1, 3] = math.nan
    totals = (log_probs + scores[..., None]).nan_to_num(-math.inf, neginf=-math.inf)
    expected, _ = totals.flatten(1).topk(2 * beam)
    size = group_size(vocab_size, 2)
    groups = best_groups(log_probs.unflatten(2, (-1, size)).amax(-1), scores, 2 * beam)
    on_host = map(torch.from_numpy, best_on_host(log_probs, scores, 2 * beam))
    for sums, parent, token in (best_continuations(log_probs, scores, groups, size), on_host):
        torch.testing.assert_close(sums, expected, rtol=0, atol=0)
        chosen = parent * vocab_size + token
        torch.testing.assert_close(totals.flatten(1).gather(1, chosen), sums, rtol=0, atol=0)
        assert all(len(set(row)) == 2 * beam for row in chosen.tolist())


def distinct(dtype: torch.dtype, n: int) -> torch.Tensor:
    """*n* values of that type, not alike, from -8 to 8 or so."""
    values = torch.linspace(-8, 8, 4 * n + 4, dtype=torch.float64).to(dtype).unique()
    while values.numel() < n:
        values = torch.cat([values, values[values > 0] * 2, values[values < 0] * 2]).unique()
    return values[torch.linspace(0, values.numel() - 1, n).long()]


RECORD = "chosen_beam chosen_token chosen_score final_step final_beam final_score".split()


def random_state(n: int, beam: int, step: int, n_positions: int, seed: int) -> BeamState:
    """Make the state in the middle of a search of *n* sentences, one place of which is empty."""
    generator = torch.Generator().manual_seed(seed)

    def random(high: int, *shape: int):
        return torch.randint(high, shape, generator=generator).to(DEVICE)

    state = BeamState.empty(n + 1, n_positions, beam, torch.device(DEVICE))
    state.begin(n, n_positions - 1, EOS)
    state.step.fill_(step)
    state.block_table.copy_(random(n * beam, *state.block_table.shape))
    if step:
        state.scores.copy_(torch.randn(n + 1, beam, generator=generator))
        state.ignored.copy_(random(3, n + 1, beam) == 0)
        state.n_final[:n] = random(beam + 1, n)
        state.done[:n] = state.n_final[:n] == beam
        state.unfinished.copy_((~state.done).sum())
    return state


def assert_alike(ours: BeamState, expected: BeamState, n: int) -> None:
    """Compare the states after a step of *n* sentences; among sums of -inf any may be chosen."""
    step, beam = int(expected.step) - 1, expected.beam
    real = expected.scores[:n] > -math.inf
    hypotheses = real.flatten()
    for name in ("step", "unfinished", "done", "n_final", "scores", "ignored", "tokens", "block_table", *RECORD):
        mine, theirs = getattr(ours, name), getattr(expected, name)
        if name == "ignored":
            mine, theirs = mine[:n][real], theirs[:n][real]
        elif name in ("tokens", "block_table"):
            mine, theirs = (x[: n * beam][hypotheses] for x in (mine, theirs))
            if name == "block_table":
                mine, theirs = mine[:, : step + 1], theirs[:, : step + 1]
        elif name.startswith("chosen"):
            mine, theirs = mine[step, : n - 1][real[:-1]], theirs[step, : n - 1][real[:-1]]
        elif name.startswith("final"):
            mine, theirs = mine[: n - 1, :beam], theirs[: n - 1, :beam]
        torch.testing.assert_close(mine, theirs, msg=lambda text, name=name: f"{name}: {text}")


@settings(max_examples=40)
@given(
    *(st.integers(1, 4), st.integers(1, 6), st.sampled_from([0, 1, 5, 8]), st.sampled_from([24, 34, 11 * 13, 509])),
    st.sampled_from(["tokens", "ends", "last step", "nan"]),
    st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    st.integers(0, 2**32 - 1),
)
def test_the_kernels_change_the_state_as_torch_does(n, beam, step, vocab_size, case, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    # No two logits of a sentence alike in half precision either: equal sums may come in any order.
    values = torch.stack([torch.randperm(beam * vocab_size, generator=generator) for _ in range(n + 1)])
    logits = distinct(dtype, beam * vocab_size)[values].view(-1, vocab_size).to(DEVICE)
    penalty = torch.zeros(vocab_size, device=DEVICE)
    penalty[3], penalty[4] = -math.inf, -1.5
    if case == "ends":
        logits[:, EOS] += 5
    elif case == "last step":
        step = 8
        penalty[torch.arange(vocab_size) != EOS] = -math.inf
    elif case == "nan":
        logits[0, 5] = math.nan
        logits[-1] = -math.inf
    ours, expected = (random_state(n, beam, step, 9, seed) for _ in range(2))
    for state, kernels in ((ours, True), (expected, False)):
        advance_beams(state, n + 1, logits, penalty, EOS, kernels)
    assert_alike(ours, expected, n + 1)


@pytest.mark.skipif(DEVICE == "cuda", reason="a CPU does it in its own way")
@pytest.mark.parametrize("ends", [0.0, 0.3])
@pytest.mark.parametrize("step", [0, 1, 5, 8])
def test_a_cpu_changes_the_state_as_a_device_does(step, ends):
    """In steps in which something ends, and in the others, of which it does less."""
    n, beam = 4, 3
    states = [random_state(n, beam, step, 9, seed=1) for _ in range(2)]
    if not ends:
        for state in states:
            state.ignored.zero_()
    sums = torch.randn(n + 1, 2 * beam).sort(descending=True).values
    parent = torch.randint(beam, sums.shape)
    token = torch.where(torch.rand(sums.shape) < ends, EOS, torch.randint(3, 50, sums.shape))
    choose_on_host(states[0], n + 1, sums.numpy(), parent.numpy(), token.numpy(), EOS)
    _choose_on_device(states[1], n + 1, sums, parent, token, EOS)
    for name, mine, theirs in zip(BeamState._fields, *states, strict=True):
        if name.startswith("chosen"):  # without scratch slots
            mine, theirs = mine[:, : n + 1], theirs[:, : n + 1]
        elif name.startswith("final"):
            mine, theirs = mine[: n + 1, :beam], theirs[: n + 1, :beam]
        assert torch.equal(mine, theirs), name


def test_logits_may_have_any_stride():
    """Kernels that read a row as if its tokens lay side by side went on with wrong ones, without an error."""
    logits = torch.randn(34, 9, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    ours, expected = (random_state(2, 3, 1, 9, seed=4) for _ in range(2))
    for state, rows in ((ours, logits.t()), (expected, logits.t().contiguous())):
        advance_beams(state, 3, rows, torch.zeros(34, device=DEVICE), EOS, True)
    assert_alike(ours, expected, 3)


@pytest.mark.parametrize("step", [0, 3, 8])
@pytest.mark.parametrize(("beam", "k"), [(1, 1), (1, 2), (3, 3), (3, 6), (5, 5)])
def test_the_kernel_goes_on_by_given_candidates_as_torch_does(beam, k, step):
    """As many as hypotheses when each draws one token, twice as many when siblings compete. Some are impossible."""
    ours, expected = (random_state(3, beam, step, 9, seed=beam + k) for _ in range(2))
    generator = torch.Generator().manual_seed(step)
    sums = torch.randn(4, k, generator=generator).sort(descending=True)[0]
    sums[0, k - 1] = -math.inf
    parent = torch.arange(beam).expand(4, beam) if k == beam else torch.randint(beam, (4, k), generator=generator)
    token = torch.randint(EOS, EOS + 2, (4, k), generator=generator)
    for state, kernels in ((ours, True), (expected, False)):
        continue_beams(state, 4, sums.to(DEVICE), parent.to(DEVICE), token.to(DEVICE), EOS, kernels)
    assert_alike(ours, expected, 4)


@pytest.mark.parametrize("kernels", [True, False])
@pytest.mark.parametrize("penalized", [True, False])
def test_the_best_tokens_are_those_of_a_full_sort(kernels, penalized):
    logits = torch.randn(5, 1144, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    penalty = torch.zeros(1144, device=DEVICE)
    penalty[logits[0].argmax()], penalty[3] = -math.inf, -1.5
    log_probs = logits.log_softmax(-1) + penalty
    given = (logits, penalty) if penalized else (log_probs, None)
    values, tokens = best_tokens(*given, 10, kernels)
    torch.testing.assert_close(values, log_probs.topk(10)[0])
    torch.testing.assert_close(log_probs.gather(1, tokens), values)


@pytest.mark.parametrize("kernels", [True, False])
def test_penalized_log_probabilities_are_summed_as_they_are(kernels):
    """Where a prefix leaves one token of each hypothesis, its probability is not normalized to 1."""
    state, expected = (random_state(3, 2, 4, 9, seed=5) for _ in range(2))
    for part in (state, expected):
        part.done.fill_(False), part.ignored.fill_(False), part.n_final.zero_()
    log_probs = torch.full((8, 34), -math.inf, device=DEVICE)
    log_probs[torch.arange(8), 7] = torch.linspace(-3, -1, 8, device=DEVICE)
    advance_beams(state, 4, log_probs, None, EOS, kernels)
    sums = expected.scores + log_probs[:, 7].view(4, 2)
    torch.testing.assert_close(state.scores, sums.sort(descending=True)[0])
    assert state.tokens.tolist() == [7] * 8


@pytest.mark.parametrize(("beam", "vocab_size"), [(12, 1000), (40, 1000), (5, 32768), (20, 32768)])
def test_the_kernels_take_wide_beams_long_texts_and_large_vocabularies(beam, vocab_size):
    ours, expected = (random_state(2, beam, 300, 500, seed=1) for _ in range(2))
    logits = torch.randn(3 * beam, vocab_size, generator=torch.Generator().manual_seed(2)).mul(3).to(DEVICE)
    for state, kernels in ((ours, True), (expected, False)):
        advance_beams(state, 3, logits, torch.zeros(vocab_size, device=DEVICE), EOS, kernels)
    assert_alike(ours, expected, 3)
