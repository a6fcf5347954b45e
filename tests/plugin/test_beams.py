"""A step of beam search chooses the best continuations, and the kernel changes the state as torch does."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ap_fairseq.beams import Beams, best_continuations, best_groups

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EOS = 2


@settings(deadline=None, derandomize=True)
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
    groups = best_groups(log_probs, scores, 2 * beam)
    sums, parent, word = best_continuations(log_probs, scores, *groups)
    torch.testing.assert_close(sums, expected, rtol=0, atol=0)
    chosen = parent * n_words + word
    torch.testing.assert_close(totals.flatten(1).gather(1, chosen), sums, rtol=0, atol=0)
    assert all(len(set(row)) == 2 * beam for row in chosen.tolist())


STATE = "unfinished tokens rows scores ignored n_final done step".split()
RECORD = "chosen_beam chosen_token chosen_score final_step final_beam final_score".split()


def random_beams(n: int, beam: int, step: int, n_positions: int, kernels: bool, seed: int) -> Beams:
    """Beams in the middle of a search of *n* sentences, one place of which is empty."""
    generator = torch.Generator().manual_seed(seed)

    def random(high: int, *shape: int):
        return torch.randint(high, shape, generator=generator).to(DEVICE)

    beams = Beams((n + 1, n_positions, 8), beam, [2, 3], [2], torch.device(DEVICE), kernels)
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


@settings(deadline=None, derandomize=True, max_examples=40)
@given(
    *(st.integers(1, 4), st.integers(1, 6), st.sampled_from([0, 1, 5, 8]), st.sampled_from([24, 34, 11 * 13, 509])),
    *(st.sampled_from(["words", "ends", "last step", "nan"]), st.integers(0, 2**32 - 1)),
)
def test_the_kernel_changes_the_state_as_torch_does(n, beam, step, n_words, case, seed):
    log_probs = torch.randn(n + 1, beam, n_words, generator=torch.Generator().manual_seed(seed)).to(DEVICE)
    if case == "ends":
        log_probs[..., EOS] += 3
    elif case == "last step":
        step = 8
        log_probs[..., torch.arange(n_words) != EOS] = -math.inf
    elif case == "nan":
        log_probs[0, 0] = math.nan
        log_probs[-1] = -math.inf
    ours, expected = (random_beams(n, beam, step, 9, kernels, seed) for kernels in (True, False))
    for beams in (ours, expected):
        beams.advance(n + 1, log_probs, EOS)
    scores = expected.scores > -math.inf  # among sums of -inf any may be chosen
    for name in STATE:
        mine, theirs = getattr(ours, name), getattr(expected, name)
        if name in ("tokens", "rows"):
            mine, theirs = mine[scores.flatten()], theirs[scores.flatten()]
            if name == "rows":
                mine, theirs = mine[:, : step + 1], theirs[:, : step + 1]
        elif name == "ignored":
            mine, theirs = mine[scores], theirs[scores]
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0, msg=lambda text, name=name: f"{name}: {text}")
    for name in RECORD:
        mine, theirs = getattr(ours, name), getattr(expected, name)
        if name.startswith("chosen"):
            mine, theirs = mine[step, :n][scores[:n]], theirs[step, :n][scores[:n]]
        else:
            mine, theirs = mine[:n, :beam], theirs[:n, :beam]
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("beam", [12, 40])
def test_the_kernel_takes_wide_beams_and_long_texts(beam):
    ours, expected = (random_beams(2, beam, 300, 500, kernels, seed=1) for kernels in (True, False))
    log_probs = torch.randn(3, beam, 1000, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    for beams in (ours, expected):
        beams.advance(3, log_probs, EOS)
    for name in ("tokens", "scores", "unfinished", "n_final"):
        torch.testing.assert_close(getattr(ours, name), getattr(expected, name), rtol=0, atol=0)
    torch.testing.assert_close(ours.rows[:, :301], expected.rows[:, :301], rtol=0, atol=0)
