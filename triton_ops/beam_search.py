"""A step of beam search after the decoder in two kernels, from logits to the hypotheses that go on.

The reference, some eighty operations of torch with a launch each, is `beam_state`. Here one kernel reads the logits
once, and log-probabilities exist only for the few tokens that may be chosen.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .beam_state import BeamState, best_groups
from .config import overlap, power_of_two
from .primitives import let_next_start, wait_for_previous

LOWEST = tl.constexpr(-3.0e38)  # stands for -inf
TAKEN = tl.constexpr(-(2**31))  # below the order of LOWEST: what is taken already, or does not exist
NO_PLACE = tl.constexpr(2**31 - 1)
TOKEN_TILE = 4096  # tokens at a time
MAX_MAXIMA = 8192  # of the groups of a sentence, of which one program finds the best
TABLE_TILE = 1024  # cells of the block table that are moved at a time


@triton.jit  # V is a constant of a model; where it is a multiple of 16 the loads are wide
def _group_kernel(
    p_logits, p_penalty, p_maxima, p_lse, V,
    SIZE: tl.constexpr, BS: tl.constexpr, BG: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """One hypothesis: log-sum-exp of its logits, and the largest of every group of SIZE <= BS penalized ones."""
    let_next_start(OVERLAP)
    wait_for_previous(OVERLAP)
    i_row = tl.program_id(0).to(tl.int64)
    n_groups = V // SIZE
    p_logits += i_row * V
    b_m = tl.full([BG], float("-inf"), dtype=tl.float32)
    b_l = tl.zeros([BG], dtype=tl.float32)
    o_s = tl.arange(0, BS)
    for start in range(0, n_groups, BG):
        o_g = start + tl.arange(0, BG)
        o_x = o_g[:, None] * SIZE + o_s[None, :]
        m_x = (o_g < n_groups)[:, None] & (o_s < SIZE)[None, :]
        b_x = tl.load(p_logits + o_x, mask=m_x, other=float("-inf")).to(tl.float32)
        b_penalized = b_x
        if p_penalty is not None:
            b_penalized += tl.load(p_penalty + o_x, mask=m_x, other=0.0)
        tl.store(p_maxima + i_row * n_groups + o_g, tl.max(b_penalized, 1), mask=o_g < n_groups)
        b_new = tl.maximum(b_m, tl.max(b_x, 1))
        b_pivot = tl.where(b_new > float("-inf"), b_new, 0.0)
        b_l = b_l * tl.exp(b_m - b_pivot) + tl.sum(tl.exp(b_x - b_pivot[:, None]), 1)
        b_m = b_new
    # NaN and inf among the logits make it NaN, as a log-softmax does.
    m_max = tl.max(b_m, 0)
    lse = m_max + tl.log(tl.sum(b_l * tl.exp(b_m - m_max), 0))
    tl.store(p_lse + i_row, lse)
    if p_penalty is not None:
        tl.debug_barrier()  # all maxima are stored
        for start in range(0, n_groups, BG):
            o_g = start + tl.arange(0, BG)
            b_x = tl.load(p_maxima + i_row * n_groups + o_g, mask=o_g < n_groups)
            tl.store(p_maxima + i_row * n_groups + o_g, b_x - lse, mask=o_g < n_groups)


@triton.jit
def _order(b_x):
    """Integers in the order of b_x, of which a warp finds the largest at once; NaN is LOWEST, as all below it."""
    b_i = tl.where(b_x >= LOWEST, b_x, LOWEST).to(tl.int32, bitcast=True)
    return tl.where(b_i < 0, b_i ^ 0x7FFFFFFF, b_i)


@triton.jit
def _first_best(b_order, o_x):
    """The first place of the largest."""
    return tl.min(tl.where(b_order == tl.max(b_order, 0), o_x, NO_PLACE), 0)


@triton.jit
def _best_groups(p_maxima, p_scores, p_groups, i_b, n_groups, BEAM: tl.constexpr, K: tl.constexpr, BX: tl.constexpr):
    """Store the K groups of a sentence with the best sums, counted through (BEAM, n_groups), which is at most BX."""
    o_x = tl.arange(0, BX)
    m_x = o_x < BEAM * n_groups
    b_x = tl.load(p_maxima + i_b * BEAM * n_groups + o_x, mask=m_x, other=0.0)
    b_x += tl.load(p_scores + i_b * BEAM + o_x // n_groups, mask=m_x, other=0.0)
    b_order = tl.where(m_x, _order(b_x), TAKEN)
    for j in range(K):
        i_best = _first_best(b_order, o_x)
        tl.store(p_groups + i_b * K + j, i_best.to(tl.int64))
        b_order = tl.where(o_x == i_best, TAKEN, b_order)
    tl.debug_barrier()  # they are read by all


@triton.jit
def _sum(p_logits, p_penalty, p_lse, p_scores, i_b, i_x, m_x, V, BEAM: tl.constexpr):
    """Scores of hypotheses with one more token; i_x counts through (BEAM, V)."""
    i_row, i_token = i_b * BEAM + i_x // V, i_x % V
    b_x = tl.load(p_logits + i_row * V + i_token, mask=m_x, other=0.0).to(tl.float32)
    if p_penalty is not None:
        b_x = b_x - tl.load(p_lse + i_row, mask=m_x, other=0.0) + tl.load(p_penalty + i_token, mask=m_x, other=0.0)
    return b_x + tl.load(p_scores + i_row, mask=m_x, other=0.0)


@triton.jit
def _best_sums(
    p_logits, p_penalty, p_lse, p_scores, p_groups, i_b, V,
    BEAM: tl.constexpr, K: tl.constexpr, SIZE: tl.constexpr, BK: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    """The K best sums of a hypothesis and a token, among the tokens of the K best groups; best first."""
    o_x = tl.arange(0, BK * BS)
    m_x = (o_x // BS < K) & (o_x % BS < SIZE)
    i_x = tl.load(p_groups + i_b * K + o_x // BS, mask=m_x, other=0) * SIZE + o_x % BS  # into BEAM * V
    b_x = _sum(p_logits, p_penalty, p_lse, p_scores, i_b, i_x, m_x, V, BEAM)
    b_order = tl.where(m_x, _order(b_x), TAKEN)
    o_k = tl.arange(0, BK)
    b_place = tl.zeros([BK], dtype=tl.int32)
    for j in range(K):
        i_best = _first_best(b_order, o_x)
        b_place = tl.where(o_k == j, i_best, b_place)
        b_order = tl.where(o_x == i_best, TAKEN, b_order)
    m_k = o_k < K
    i_k = tl.load(p_groups + i_b * K + b_place // BS, mask=m_k, other=0) * SIZE + b_place % BS
    b_sum = _sum(p_logits, p_penalty, p_lse, p_scores, i_b, i_k, m_k, V, BEAM)
    return tl.where(b_sum >= LOWEST, b_sum, float("-inf")), i_k // V, i_k % V


@triton.jit(do_not_specialize=["V", "EOS", "s_table", "s_record", "s_final"])
def _choose_kernel(
    p_logits, p_penalty, p_lse, p_maxima, p_groups, p_sums, p_parent, p_token, p_step, p_max_len, p_sentence,
    p_unfinished, p_scores, p_tokens, p_ignored, p_done, p_n_final, p_table,
    p_chosen_beam, p_chosen_token, p_chosen_score, p_final_step, p_final_beam, p_final_score,
    V, EOS, s_table, s_record, s_final,
    BEAM: tl.constexpr, K: tl.constexpr, SIZE: tl.constexpr,
    BK: tl.constexpr, BS: tl.constexpr, BB: tl.constexpr, BC: tl.constexpr, BX: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """BK >= K >= BEAM candidates, those of p_sums or the best of p_groups; BS >= SIZE tokens of a group, BB >= BEAM; BC
    columns of the block table at a time. The groups are found here, too, if there is p_maxima, of BX or less."""
    let_next_start(OVERLAP)
    wait_for_previous(OVERLAP)
    i_b = tl.program_id(0).to(tl.int64)
    step = tl.load(p_step)
    last_step = step >= tl.load(p_max_len)

    o_k = tl.arange(0, BK)
    m_k = o_k < K
    if p_sums is None:
        if p_maxima is not None:
            _best_groups(p_maxima, p_scores, p_groups, i_b, V // SIZE, BEAM, K, BX)
        b_sum, b_parent, b_token = _best_sums(
            p_logits, p_penalty, p_lse, p_scores, p_groups, i_b, V, BEAM, K, SIZE, BK, BS
        )
    else:
        b_sum = tl.load(p_sums + i_b * K + o_k, mask=m_k, other=float("-inf"))
        b_parent = tl.load(p_parent + i_b * K + o_k, mask=m_k, other=0)
        b_token = tl.load(p_token + i_b * K + o_k, mask=m_k, other=0)

    # Those that end: recorded if they are among the first BEAM, while the sentence lacks hypotheses.
    i_sentence = tl.load(p_sentence + i_b)
    done, n_final = tl.load(p_done + i_b), tl.load(p_n_final + i_b)
    b_ignored = tl.load(p_ignored + i_b * BEAM + o_k, mask=o_k < BEAM, other=0)
    m_ends = m_k & (b_token == EOS) & (b_sum > float("-inf")) & (b_ignored == 0)
    m_counted = m_ends & (o_k < tl.where(done == 0, BEAM, 0))
    b_final = n_final + tl.cumsum(m_counted.to(tl.int64), 0) - 1
    m_final = m_counted & (b_final < BEAM)
    o_final = i_sentence * s_final + b_final
    tl.store(p_final_step + o_final, (step + o_k * 0).to(tl.int32), mask=m_final)
    tl.store(p_final_beam + o_final, b_parent.to(tl.int32), mask=m_final)
    tl.store(p_final_score + o_final, b_sum, mask=m_final)
    n_final = tl.minimum(n_final + tl.sum(m_counted.to(tl.int64), 0), BEAM)
    ended = (n_final == BEAM) | last_step
    tl.atomic_add(p_unfinished, -(ended & (done == 0)).to(tl.int64))

    # The first BEAM of those that do not end go on; where these are fewer, ended ones fill the places.
    m_over = m_ends | (b_ignored != 0)
    b_over = m_over.to(tl.int32)
    b_open = tl.where(m_k, 1 - b_over, 0)
    b_rank = tl.where(m_over, tl.sum(b_open, 0) + tl.cumsum(b_over, 0), tl.cumsum(b_open, 0)) - 1
    m_on = m_k & (b_rank < BEAM)
    tl.debug_barrier()  # all of the old state is read
    o_record = step * s_record + i_sentence * BEAM + b_rank
    tl.store(p_chosen_beam + o_record, b_parent.to(tl.int32), mask=m_on)
    tl.store(p_chosen_token + o_record, b_token.to(tl.int32), mask=m_on)
    tl.store(p_chosen_score + o_record, b_sum, mask=m_on)
    tl.store(p_scores + i_b * BEAM + b_rank, b_sum, mask=m_on)
    tl.store(p_tokens + i_b * BEAM + b_rank, b_token, mask=m_on)
    tl.store(p_ignored + i_b * BEAM + b_rank, m_over.to(tl.int8), mask=m_on)
    tl.store(p_n_final + i_b, n_final)
    tl.store(p_done + i_b, ((done != 0) | ended).to(tl.int8))

    # A hypothesis that goes on consists of the slots of its parent.
    o_b = tl.arange(0, BB)
    b_from = tl.sum(tl.where((b_rank[None, :] == o_b[:, None]) & m_on[None, :], b_parent[None, :], 0), 1)
    p_table += i_b * BEAM * s_table
    for start in range(0, step + 1, BC):
        o_c = start + tl.arange(0, BC)
        m_bc = (o_b < BEAM)[:, None] & (o_c <= step)[None, :]
        b_slots = tl.load(p_table + b_from[:, None] * s_table + o_c[None, :], mask=m_bc)
        tl.debug_barrier()
        tl.store(p_table + o_b[:, None] * s_table + o_c[None, :], b_slots, mask=m_bc)


def largest_of_groups(logits: Tensor, penalty: Tensor | None, size: int) -> tuple[Tensor, Tensor]:
    """Launch `_group_kernel`.

    Args:
        logits: (N, V), contiguous.
        penalty: float32 (V,), added to log-probabilities. None: the logits are penalized log-probabilities.
        size: a divisor of V.

    Returns:
        float32 (N, V / size), the largest log-probability, penalized, of every group; float32 (N,), log-sum-exps.
    """
    n, vocab_size = logits.shape
    maxima = torch.empty(n, vocab_size // size, dtype=torch.float32, device=logits.device)
    lse = torch.empty(n, dtype=torch.float32, device=logits.device)
    width = power_of_two(size)
    _group_kernel[(n,)](
        p_logits=logits,
        p_penalty=penalty,
        p_maxima=maxima,
        p_lse=lse,
        V=vocab_size,
        SIZE=size,
        BS=width,
        BG=max(TOKEN_TILE // width, 1),
        num_warps=8,
        **overlap(logits.device),
    )
    return maxima, lse


def choose(
    state: BeamState, n: int, logits: Tensor, penalty: Tensor | None, lse: Tensor, maxima: Tensor, size: int, eos: int
) -> None:
    """Launch `_choose_kernel`, which changes *state* as `beam_state.choose` does for the best continuations.

    Args:
        state: its first *n* sentences go on.
        logits, penalty: of the next token, as in `largest_of_groups`; NaN counts as a log-probability of -inf.
        lse, maxima: float32 (N,) and (N, V / size), from there.
        size: of a group of tokens.
    """
    k, n_maxima = 2 * state.beam, state.beam * maxima.size(1)
    if n_maxima <= MAX_MAXIMA:
        groups, found = dict(p_maxima=maxima, BX=power_of_two(n_maxima)), state.step.new_empty(n, k)
    else:
        groups, found = {}, best_groups(maxima.view(n, state.beam, -1), state.scores[:n], k)
    best = dict(p_logits=logits, p_penalty=penalty, p_lse=lse, p_groups=found, V=logits.size(1), SIZE=size)
    _launch_choose(state, n, k, eos, **best, **groups, BS=power_of_two(size))


def continue_by(state: BeamState, n: int, sums: Tensor, parent: Tensor, token: Tensor, eos: int) -> None:
    """Launch `_choose_kernel` for given candidates: see `beam_state.choose`. The tensors are contiguous."""
    _launch_choose(state, n, sums.size(1), eos, p_sums=sums, p_parent=parent, p_token=token)


def _launch_choose(state: BeamState, n: int, k: int, eos: int, **candidates) -> None:
    beam = state.beam
    width = power_of_two(beam)
    sizes = dict(V=0, SIZE=1, BS=1, BX=1) | candidates
    ranked = max(sizes["BX"], power_of_two(k) * sizes["BS"], TABLE_TILE)
    nothing = dict.fromkeys(("p_logits", "p_penalty", "p_lse", "p_maxima", "p_groups", "p_sums", "p_parent", "p_token"))
    _choose_kernel[(n,)](
        **{**nothing, **sizes},
        p_step=state.step,
        p_max_len=state.max_len,
        p_unfinished=state.unfinished,
        p_sentence=state.sentence,
        p_scores=state.scores,
        p_tokens=state.tokens,
        p_n_final=state.n_final,
        p_chosen_beam=state.chosen_beam,
        p_chosen_token=state.chosen_token,
        p_chosen_score=state.chosen_score,
        p_final_step=state.final_step,
        p_final_beam=state.final_beam,
        p_final_score=state.final_score,
        p_ignored=state.ignored.view(torch.int8),
        p_done=state.done.view(torch.int8),
        p_table=state.block_table,
        EOS=eos,
        s_table=state.block_table.stride(0),
        s_record=state.chosen_beam.stride(0),
        s_final=state.final_step.stride(0),
        BEAM=beam,
        K=k,
        BK=max(power_of_two(k), 2),
        BB=width,
        BC=max(TABLE_TILE // width, 16),
        num_warps=min(ranked // 1024, 4),  # a warp alone waits for no others
        **overlap(state.step.device),
    )
