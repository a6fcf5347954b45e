"""Scores rank pairs as their criterion says."""

import itertools

import numpy as np
import pytest
from plugin.builders import random_stats
from plugin.mask_building import ALL, SELF, build, total_mass

from ap_fairseq.artifacts import AttentionStats
from ap_fairseq.files import ArtifactError
from ap_fairseq.lengths import support_of
from ap_fairseq.pruning import criteria
from ap_fairseq.pruning.summary import summarize
from ap_fairseq.sites import AttentionKind


def test_ranking_by_mean_attention_keeps_the_most_mass_a_budget_allows():
    """The fractional-knapsack optimum, against all subsets of the cells of a small head with equal support."""
    support = {AttentionKind.ENCODER_SELF: np.full((3, 3), 4)}
    mass = {AttentionKind.ENCODER_SELF: np.random.default_rng(5).random((1, 1, 3, 3))}
    stats = AttentionStats(mass, support)
    masks = build(stats, 3 / 9, kinds=[AttentionKind.ENCODER_SELF]).masks
    kept = summarize(masks, stats)[0].kept_mass
    off_diagonal = [cell for cell in itertools.product(range(3), repeat=2) if cell[0] != cell[1]]
    values = mass[AttentionKind.ENCODER_SELF][0, 0]
    best = max(values.sum() - sum(values[c] for c in pruned) for pruned in itertools.combinations(off_diagonal, 3))
    assert kept == pytest.approx(best / values.sum())


def test_frequent_cells_count_for_what_they_cost():
    """A count-blind percentile would prune the rare cell; in pairs, both budgets below mean different cells."""
    support = {AttentionKind.CROSS: np.array([[10, 8, 1], [10, 8, 1]])}
    mean = np.array([[0.5, 0.10, 0.4], [0.5, 0.2, 0.05]])
    stats = AttentionStats({AttentionKind.CROSS: (mean * support[AttentionKind.CROSS])[None, None]}, support)
    masks = build(stats, 1 / 38, kinds=[AttentionKind.CROSS]).masks
    assert (~masks.keep[AttentionKind.CROSS][0, 0]).nonzero() == ([1], [2])
    masks = build(stats, 9 / 38, kinds=[AttentionKind.CROSS]).masks
    np.testing.assert_array_equal(masks.keep[AttentionKind.CROSS][0, 0], [[True, False, True], [True, True, False]])


def test_smoothed_scores_are_means_along_the_diagonal():
    stats = random_stats(longest=(9, 12), sentences=40)
    kind, distance = AttentionKind.CROSS, 2
    pairs, mass = (criteria.sum_of_neighbours(part[kind], distance) for part in (stats.support, stats.mass))
    np.testing.assert_allclose(criteria.smoothed(stats.mean(kind), stats.support[kind], distance) * pairs, mass)
    n_queries, n_keys = stats.support[kind].shape
    for i, j in itertools.product(range(n_queries), range(n_keys)):
        steps = range(-min(distance, i, j), min(distance, n_queries - 1 - i, n_keys - 1 - j) + 1)
        neighbours = [i + t for t in steps], [j + t for t in steps]
        assert pairs[i, j] == stats.support[kind][neighbours].sum()
        np.testing.assert_allclose(mass[..., i, j], stats.mass[kind][:, :, *neighbours].sum(-1), rtol=1e-12)
    np.testing.assert_array_equal(criteria.sum_of_neighbours(stats.mass[kind], 0), stats.mass[kind])


@pytest.mark.parametrize("kind", SELF)
def test_smoothing_over_all_positions_ranks_whole_diagonals(kind):
    """One far position more than there are makes every score that of its diagonal, as in diagonal-mean."""
    stats = random_stats(longest=(20, 20), sentences=200)
    whole = build(stats, 0.6, kinds=[kind], smooth=100).masks
    diagonal = build(stats, 0.6, kinds=[kind], criterion="diagonal-mean").masks
    observed = stats.support[kind] > 0
    assert (whole.keep[kind] == diagonal.keep[kind])[..., observed].mean() > 0.99  # sums differ in their last bits


def test_a_late_position_is_ranked_by_its_neighbours():
    """One long sentence looked at key 1 from row 5 by chance; all others, from earlier rows, at the previous token."""
    kind = AttentionKind.ENCODER_SELF
    support = {kind: support_of(kind, np.array([[1, 6, 1], [1, 5, 99]]))}
    mean = np.eye(6, k=-1) * 0.9 + 0.02
    mean[4, 0], mean[5] = 0, [0.02, 0.9, 0.02, 0.02, 0.01, 0.04]
    stats = AttentionStats({kind: (mean * support[kind])[None, None]}, support)
    kept = [build(stats, 0.6, kinds=[kind], smooth=distance).masks.keep[kind][0, 0, 5] for distance in (0, 2)]
    assert [keep[1] for keep in kept] == [True, False] and [keep[4] for keep in kept] == [False, True]


def test_random_masks_depend_on_the_seed_alone():
    stats = random_stats(longest=(30, 30))
    same = [build(stats, criterion="random", seed=s).masks.keep[AttentionKind.CROSS] for s in (4, 4, 5)]
    np.testing.assert_array_equal(same[0], same[1])
    assert (same[0] != same[2]).mean() > 0.2


def test_window_masks_keep_the_cells_nearest_the_diagonal_in_every_head():
    stats = random_stats(longest=(30, 45), sentences=300)
    masks = build(stats, 0.5, criterion="window").masks
    slopes = {AttentionKind.ENCODER_SELF: 1.0, AttentionKind.DECODER_SELF: 1.0}
    cross = stats.support[AttentionKind.CROSS]
    slopes[AttentionKind.CROSS] = cross[0].sum() / cross[:, 0].sum()  # mean source length / mean target length
    for kind in ALL:
        keep, support = masks.keep[kind], stats.support[kind]
        assert (keep == keep[:1, :1]).all()
        row, column = np.indices(support.shape)
        distance = np.abs(column - slopes[kind] * row)
        prunable = (support > 0) & (column != (0 if kind is AttentionKind.CROSS else row))
        kept, pruned = distance[keep[0, 0] & prunable], distance[~keep[0, 0] & prunable]
        assert kept.max() <= pruned.min()  # equal distances are told apart by the seed


@pytest.mark.parametrize(
    ("kind", "mean", "nominal", "expected"),
    [
        (
            AttentionKind.DECODER_SELF,
            [[[[1, 0, 0], [0.4, 0.6, 0], [0.2, 0.3, 0.5]]]],
            0.5,
            [[[[1, 0, 0], [1, 1, 0], [0, 0, 1]]]],
        ),
        (
            AttentionKind.DECODER_SELF,
            [[[[1, 0, 0], [0.4, 0.6, 0], [0.2, 0.3, 0.5]], [[1, 0, 0], [0.9, 0.1, 0], [0.8, 0.1, 0.1]]]],
            0.5,
            [[[[1, 0, 0], [1, 1, 0], [1, 1, 1]], [[1, 0, 0], [1, 1, 0], [1, 0, 1]]]],
        ),
        (
            AttentionKind.CROSS,
            [[[[0.5, 0.3, 0.2], [0.1, 0.6, 0.3]]], [[[0.2, 0.6, 0.2], [0.3, 0.2, 0.5]]]],
            0.8,
            [[[[1, 0, 0], [1, 1, 0]]], [[[1, 1, 0], [1, 0, 1]]]],
        ),
    ],
    ids=["causal zeros count", "heads share a threshold", "layers do not"],
)
def test_percentile_by_hand(kind, mean, nominal, expected):
    """Thresholds are percentiles over the square up to the longest sentence, per layer over its heads.

    Decoder, one head: the 9 cells in order are 0 0 0 .2 .3 .4 .5 .6 1, their median .3, and .2 and .3 go: a nominal 50%
    prunes 2 of 6 pairs. With a second head of 0 0 0 .1 .1 .1 .8 .9 1, the median of 18 is .15: in that head .1 goes
    where it is not on the diagonal, and the first keeps all. Cross, 2 x 3 in a square of 9: 0 0 0 .1 .2 .3 .3 .5 .6, at
    80% (position 6.4) .38, and 0 0 0 .2 .2 .2 .3 .5 .6 in the other layer, also .38; column 0 stays.
    """
    support = np.full(np.shape(mean)[2:], 4)
    if kind.causal:
        support = np.tril(support)
    stats = AttentionStats({kind: np.array(mean) * support}, {kind: support})
    masks = build(stats, nominal, kinds=[kind], criterion="percentile").masks
    np.testing.assert_array_equal(masks.keep[kind], np.array(expected, dtype=bool))


def test_percentile_50_prunes_next_to_nothing_of_the_decoder():
    """The causal half of the square is zero, so a nominal 50% is an effective 0%; both numbers are printed."""
    stats = random_stats(longest=(30, 30), sentences=300)
    row = {(r.kind, r.layer): r for r in summarize(build(stats, 0.5, criterion="percentile").masks, stats)}
    decoder = row["decoder_self", None]
    assert decoder.effective < 0.05 and decoder.nominal > 0.45


def test_scores_that_overflow_are_refused():
    """An infinite score means always kept."""
    stats = random_stats()
    stats.importance[AttentionKind.CROSS][:] = 1e308
    message = "cross: scores by --criterion importance overflow"
    with pytest.raises(ArtifactError, match=message), np.errstate(all="ignore"):
        build(stats, criterion="importance", smooth=4)


@pytest.mark.parametrize("criterion", ["window", "gaussian", "fixed"])
def test_a_global_budget_counts_every_head_of_a_shared_score(criterion):
    """Kinds with fewer heads must not weigh as much as others only because their heads share one score."""
    stats = random_stats(longest=(30, 30), sentences=200)
    cross = AttentionKind.CROSS
    stats.mass[cross] = np.tile(stats.mass[cross], (3, 2, 1, 1))
    built = build(stats, 0.6, scope="global", criterion=criterion)
    masks, missed = built.masks, built.warnings
    assert not missed and total_mass(masks, stats)[0] == pytest.approx(0.6, abs=0.01)


def test_normalised_scores_do_not_depend_on_how_peaked_a_head_is():
    stats = random_stats()
    doubled = AttentionStats({kind: mass.copy() for kind, mass in stats.mass.items()}, stats.support)
    for kind in ALL:
        doubled.mass[kind][0, 1] *= 7
        np.testing.assert_allclose(
            criteria.normalised_attention(doubled, kind), criteria.normalised_attention(stats, kind)
        )
        score, n = criteria.normalised_attention(stats, kind), stats.support[kind]
        np.testing.assert_allclose((score**2 * n).sum((-2, -1)) / n.sum(), 1)


def test_diagonal_means_average_the_diagonal_by_pairs():
    stats = random_stats()
    for kind in ALL:
        score = criteria.diagonal_mean_attention(stats, kind)
        n, s = stats.support[kind], stats.mass[kind]
        for offset in range(1 - n.shape[0], n.shape[1]):
            if np.diagonal(n, offset).any():
                expected = np.diagonal(s, offset, -2, -1).sum(-1) / np.diagonal(n, offset).sum()
                found = np.diagonal(score, offset, -2, -1)
                np.testing.assert_allclose(found, np.broadcast_to(expected[..., None], found.shape))


def test_diagonals_of_a_single_column_keep_their_order():
    """With one key position there are as many diagonals as cells, numbered from the last row to the first."""
    cell_unit = criteria.cell_offset((3, 1))
    np.testing.assert_array_equal(criteria.sum_by(cell_unit, np.array([[1], [2], [4]])), [4, 2, 1])


def test_gaussian_heads_attend_around_their_own_centre():
    stats = random_stats(longest=(30, 30), sentences=200, heads=4)
    masks = build(stats, 0.8, criterion="gaussian", kinds=SELF).masks
    for kind, centres in ((AttentionKind.ENCODER_SELF, (-1, 0, 1, -1)), (AttentionKind.DECODER_SELF, (-1, 0, -1, 0))):
        row, column = np.indices(stats.support[kind].shape)
        free = (stats.support[kind] > 0) & (row != column)
        for head, centre in enumerate(centres):
            keep = masks.keep[kind][0, head]
            distance = np.abs(column - row - centre)
            assert distance[keep & free].max() <= distance[~keep & free].min() + 1


def test_fixed_heads_attend_to_what_their_pattern_names():
    stats = random_stats(longest=(24, 24), sentences=200, heads=6)
    kind = AttentionKind.ENCODER_SELF
    keep = build(stats, 0.8, criterion="fixed", kinds=[kind]).masks.keep[kind][1]
    row, column = np.indices(stats.support[kind].shape)
    free = (stats.support[kind] > 0) & (row != column)
    offsets = [set((column - row)[keep[head] & free].tolist()) for head in range(6)]
    assert min(offsets[0]) < -1 < max(offsets[0]) and -1 in offsets[0]
    assert max(offsets[3]) < 0 and min(offsets[4]) > 0  # left context, right context
    assert column[keep[5] & free].max() < 6  # start of the sentence


def test_fixed_patterns_rank_nearer_tokens_first():
    stats = random_stats(longest=(5, 5), sentences=200, heads=6)
    previous, current, following, left, right, start = criteria.fixed_patterns(stats, AttentionKind.ENCODER_SELF)[0]
    best_first = [np.argsort(-head[2], kind="stable").tolist() for head in (left, right, start)]
    assert best_first == [[2, 1, 0, 3, 4], [2, 3, 4, 1, 0], [0, 1, 2, 3, 4]]
    assert [head[2].argmax() for head in (previous, current, following)] == [1, 2, 3]
