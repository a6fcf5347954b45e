"""A step of beam search chooses the best continuations, and the kernel changes the state as torch does."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ap_fairseq.search.beams import BeamSearchState, best_continuations, best_groups, group_size

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EOS = 2


@given(
    *(st.integers(1, 5), st.integers(1, 4), st.sampled_from([16, 24, 34, 128, 8 * 11 * 13, 509])),
    *(st.sampled_from(["words", "first step", "last step", "nan"]), st.integers(0, 2**32 - 1)),
)
def test_the_best_continuations_are_the_best_of_all_sums(n, beam, n_words, case, seed):
    torch.manual_seed(seed)
    log_probs, scores = torch.randn(n, beam, n_words).log_softmax(-1), torch.randn(n, beam)
    if case == "first step":
        scores[:, 1:] = -math.inf
    elif case == "last step":
        log_probs[..., torch.arange(n_words) != 2] = -math.inf
    elif case == "nan":
        log_probs[0, 0] = math.nan
        log_probs[-1, -1] = -math.inf
        log_probs[-1, -1, 3] = math.nan
    totals = (log_probs + scores[..., None]).nan_to_num(-math.inf, neginf=-math.inf)
    expected, _ = totals.flatten(1).topk(2 * beam)
    size = group_size(n_words, 2)
    groups = best_groups(log_probs.unflatten(2, (-1, size)).amax(-1), scores, 2 * beam)
    sums, parent, word = best_continuations(log_probs, scores, groups, size)
    torch.testing.assert_close(sums, expected, rtol=0, atol=0)
    chosen = parent * n_words + word
    torch.testing.assert_close(totals.flatten(1).gather(1, chosen), sums, rtol=0, atol=0)
    assert all(len(set(row)) == 2 * beam for row in chosen.tolist())


def distinct(dtype: torch.dtype, n: int) -> torch.Tensor:
    """*n* values of that type, not alike, from -8 to 8 or so."""
    values = torch.linspace(-8, 8, 4 * n + 4, dtype=torch.float64).to(dtype).unique()
    while values.numel() < n:
        values = torch.cat([values, values[values > 0] * 2, values[values < 0] * 2]).unique()
    return values[torch.linspace(0, values.numel() - 1, n).long()]


RECORD = "chosen_beam chosen_token chosen_score final_step final_beam final_score".split()


def random_beams(n: int, beam: int, step: int, n_positions: int, kernels: bool, seed: int) -> BeamSearchState:
    """BeamSearchState in the middle of a search of *n* sentences, one place of which is empty."""
    generator = torch.Generator().manual_seed(seed)

    def random(high: int, *shape: int):
        return torch.randint(high, shape, generator=generator).to(DEVICE)

    beams = BeamSearchState((n + 1, n_positions, 8), beam, [2, 3], [2], torch.device(DEVICE), kernels)
    beams.begin(torch.ones(n, dtype=torch.int64, device=DEVICE), n_positions - 1, EOS)
    beams.step.fill_(step)
    beams.rows.copy_(random(n * beam, *beams.rows.shape))
    if step:
        beams.scores.copy_(torch.randn(n + 1, beam, generator=generator))
        beams.ignored.copy_(random(3, n + 1, beam) == 0)
        beams.n_final[:n] = random(beam + 1, n)
        beams.done[:n] = beams.n_final[:n] == beam
        beams.unfinished.copy_((~beams.done).sum())
    return beams


def assert_alike(ours: BeamSearchState, expected: BeamSearchState, n: int) -> None:
    """Compare the states after a step of *n* sentences; among sums of -inf any may be chosen."""
    step, beam = int(expected.step) - 1, expected.beam
    real = expected.scores[:n] > -math.inf
    hypotheses = real.flatten()
    for name in ("step", "unfinished", "done", "n_final", "scores", "ignored", "tokens", "rows", *RECORD):
        mine, theirs = getattr(ours, name), getattr(expected, name)
        if name == "ignored":
            mine, theirs = mine[:n][real], theirs[:n][real]
        elif name in ("tokens", "rows"):
            mine, theirs = (x[: n * beam][hypotheses] for x in (mine, theirs))
            if name == "rows":
                mine, theirs = mine[:, : step + 1], theirs[:, : step + 1]
        elif name.startswith("chosen"):
            mine, theirs = mine[step, : n - 1][real[:-1]], theirs[step, : n - 1][real[:-1]]
        elif name.startswith("final"):
            mine, theirs = mine[: n - 1, :beam], theirs[: n - 1, :beam]
        torch.testing.assert_close(mine, theirs, msg=lambda text, name=name: f"{name}: {text}")


@settings(max_examples=40)
@given(
    *(st.integers(1, 4), st.integers(1, 6), st.sampled_from([0, 1, 5, 8]), st.sampled_from([24, 34, 11 * 13, 509])),
    st.sampled_from(["words", "ends", "last step", "nan"]),
    st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    st.integers(0, 2**32 - 1),
)
def test_the_kernels_change_the_state_as_torch_does(n, beam, step, n_words, case, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    # No two logits of a sentence alike in half precision either: equal sums may come in any order.
    values = torch.stack([torch.randperm(beam * n_words, generator=generator) for _ in range(n + 1)])
    logits = distinct(dtype, beam * n_words)[values].view(-1, n_words).to(DEVICE)
    penalty = torch.zeros(n_words, device=DEVICE)
    penalty[3], penalty[4] = -math.inf, -1.5
    if case == "ends":
        logits[:, EOS] += 5
    elif case == "last step":
        step = 8
        penalty[torch.arange(n_words) != EOS] = -math.inf
    elif case == "nan":
        logits[0, 5] = math.nan
        logits[-1] = -math.inf
    ours, expected = (random_beams(n, beam, step, 9, kernels, seed) for kernels in (True, False))
    for beams in (ours, expected):
        beams.advance(n + 1, logits, penalty, EOS)
    assert_alike(ours, expected, n + 1)


@pytest.mark.parametrize(("beam", "n_words"), [(12, 1000), (40, 1000), (5, 32768)])
def test_the_kernels_take_wide_beams_long_texts_and_large_vocabularies(beam, n_words):
    ours, expected = (random_beams(2, beam, 300, 500, kernels, seed=1) for kernels in (True, False))
    logits = torch.randn(3 * beam, n_words, generator=torch.Generator().manual_seed(2)).mul(3).to(DEVICE)
    for beams in (ours, expected):
        beams.advance(3, logits, torch.zeros(n_words, device=DEVICE), EOS)
    assert_alike(ours, expected, 3)
