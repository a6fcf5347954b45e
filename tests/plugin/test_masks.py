"""Budgets are met, controls are equal, and masks keep what they must."""

import itertools
import math
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plugin.builders import random_stats

from ap_fairseq.artifacts import AttentionStats, PruningMasks
from ap_fairseq.cli import masks as cli_masks
from ap_fairseq.files import ArtifactError, UserError
from ap_fairseq.lengths import support_of
from ap_fairseq.provenance import describe_sparsity, mask_spec
from ap_fairseq.pruning import criteria, select
from ap_fairseq.pruning.build import build_masks
from ap_fairseq.pruning.criteria import CRITERIA
from ap_fairseq.pruning.spec import MaskSpec
from ap_fairseq.pruning.summary import summarize, total_of, vanished_heads
from ap_fairseq.sites import AttentionKind

ALL = tuple(AttentionKind)
SELF = (AttentionKind.ENCODER_SELF, AttentionKind.DECODER_SELF)


def build(stats, share=0.5, kinds=ALL, **spec):
    return build_masks(stats, MaskSpec({kind: share for kind in kinds}, **spec))


def effective(masks, stats, kind) -> float:
    """Recompute effective sparsity from its definition."""
    weight = np.broadcast_to(stats.support[kind], masks.keep[kind].shape)
    return float((weight * ~masks.keep[kind]).sum() / weight.sum())


@settings(max_examples=60)
@given(
    share=st.floats(0, 0.7),
    scope=st.sampled_from(["kind", "layer", "head"]),
    criterion=st.sampled_from([p for p in CRITERIA if p != "percentile"]),
    seed=st.integers(0, 5),
)
def test_budgets_are_met_within_one_point_or_the_tool_says_why(share, scope, criterion, seed):
    stats = random_stats(seed, longest=(40, 50), sentences=300)
    built = build(stats, share, scope=scope, criterion=criterion, seed=seed)
    masks, missed = built.masks, built.warnings
    assert not missed
    for kind in ALL:
        assert abs(effective(masks, stats, kind) - share) <= 0.01


def test_a_budget_that_cannot_be_met_is_explained():
    """A cross-attention of one-word sentences has nothing but guaranteed cells; whole blocks cannot be halved."""
    support = {kind: support_of(kind, np.array([[1, 1, 5]])) for kind in ALL}
    stats = AttentionStats({k: np.ones((1, 1, *n.shape)) * n for k, n in support.items()}, support)
    missed = build(stats, 0.5).warnings
    assert len(missed) == 3 and "0.0% instead of 50.0%" in missed[0] and "guaranteed" in missed[0]
    missed = build(random_stats(longest=(20, 20)), 0.5, granularity=128).warnings
    assert sum("128x128 blocks" in message for message in missed) == 3


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


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("extrapolate", ["diagonal", "keep"])
def test_the_guarantee_holds_at_any_sparsity(criterion, extrapolate):
    """PruningMasks itself refuses empty rows and non-causal cells, so building must not raise."""
    stats = random_stats(longest=(12, 15))
    masks = build(stats, 0.99, criterion=criterion, extrapolate=extrapolate).masks
    for kind in ALL:
        assert masks.keep[kind].any(-1).all()


def test_kinds_without_a_budget_are_kept_whole():
    stats = random_stats()
    masks = build(stats, 0.6, kinds=[AttentionKind.CROSS]).masks
    for kind in SELF:
        assert effective(masks, stats, kind) == 0
        assert masks.extrapolation[kind].all()


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


@pytest.mark.parametrize(("size", "queries", "keys"), [(16, 16, 16), (32, 32, 32), ("16x8", 16, 8), ("32x1", 32, 1)])
def test_blocks_are_kept_or_pruned_whole_apart_from_the_guarantee(size, queries, keys):
    stats = random_stats(longest=(70, 90), sentences=200)
    masks = build(stats, 0.5, granularity=size, extrapolate="keep").masks
    for kind in ALL:
        support = stats.support[kind]
        assert abs(effective(masks, stats, kind) - 0.5) < 0.1
        for top, left in itertools.product(range(0, len(support), queries), range(0, support.shape[1], keys)):
            block = np.s_[top : top + queries, left : left + keys]
            row, column = np.indices(support.shape)
            free = (support > 0) & (column != (0 if kind is AttentionKind.CROSS else row))
            cells = masks.keep[kind][..., free & _inside(support.shape, block)]
            assert (cells.all(-1) | ~cells.any(-1)).all()


def _inside(shape, block):
    inside = np.zeros(shape, dtype=bool)
    inside[block] = True
    return inside


def test_kinds_may_have_granularities_of_their_own(tmp_path):
    stats = random_stats(longest=(40, 40), sentences=200)
    stats.save(tmp_path / "stats.st")
    flags = ["--total", 0.5, "--granularity", "encoder_self=16x4,decoder_self=diagonal"]
    ap_masks(tmp_path / "stats.st", *flags, "-o", tmp_path / "m.st")
    masks = PruningMasks.load(tmp_path / "m.st")
    assert masks.metadata["spec"]["granularity"] == {"encoder_self": "16x4", "decoder_self": "diagonal"}
    assert "granularity decoder_self diagonal, encoder_self 16x4" in describe_sparsity(masks.metadata)
    own = {AttentionKind.ENCODER_SELF: "16x4", AttentionKind.DECODER_SELF: "diagonal"}
    together = build(stats, 0.5, scope="global", granularity=own).masks
    for kind in ALL:
        np.testing.assert_array_equal(masks.keep[kind], together.keep[kind])
    encoder, decoder = (masks.keep[kind][0, 0] for kind in SELF)
    blocks = encoder[16:32, 32:40].reshape(16, 2, 4)
    assert (blocks.all((0, 2)) | ~blocks.any((0, 2))).all() and len({tuple(np.diagonal(decoder, -3))[0]}) == 1


def test_diagonal_granularity_decides_whole_offsets():
    stats = random_stats(longest=(20, 20), sentences=200)
    masks = build(stats, 0.5, granularity="diagonal", kinds=[AttentionKind.ENCODER_SELF]).masks
    keep = masks.keep[AttentionKind.ENCODER_SELF]
    for offset in range(-19, 20):
        cells = np.diagonal(keep, offset, -2, -1)
        assert (cells.all(-1) | ~cells.any(-1)).all()


def test_scopes_share_thresholds():
    """Per head every head reaches the budget; over all kinds only the sum of pairs does."""
    stats = random_stats(longest=(40, 40), sentences=300)
    stats.mass[AttentionKind.CROSS][:, 0] *= 0.1  # one dull head, which a common threshold prunes first
    masks = build(stats, 0.5, scope="head").masks
    weight = stats.support[AttentionKind.CROSS]
    per_head = (weight * ~masks.keep[AttentionKind.CROSS]).sum((-2, -1)) / weight.sum()
    np.testing.assert_allclose(per_head, 0.5, atol=0.01)

    masks = build(stats, 0.5, scope="kind").masks
    per_head = (weight * ~masks.keep[AttentionKind.CROSS]).sum((-2, -1)) / weight.sum()
    assert per_head[0, 0] > 0.7 > 0.4 > per_head[0, 1]

    masks = build(stats, 0.5, scope="global").masks
    totals = {kind: stats.support[kind].sum() for kind in ALL}
    reached = sum(effective(masks, stats, kind) * totals[kind] for kind in ALL) / sum(totals.values())
    assert abs(reached - 0.5) <= 0.01
    assert max(abs(effective(masks, stats, kind) - 0.5) for kind in ALL) > 0.05


def test_unobserved_cells_follow_the_diagonal_or_are_kept():
    """Sentence pairs (10, 2) and (2, 10) leave the far corner of cross-attention unseen."""
    support = {AttentionKind.CROSS: support_of(AttentionKind.CROSS, np.array([[10, 2, 3], [2, 10, 3]]))}
    mean = np.full((10, 10), 0.1)
    mean[np.abs(np.subtract.outer(range(10), range(10))) <= 1] = 0.9
    stats = AttentionStats({AttentionKind.CROSS: (mean * support[AttentionKind.CROSS])[None, None]}, support)
    unseen = support[AttentionKind.CROSS] == 0
    assert unseen[5, 5] and unseen[9, 5]
    keep = build(stats, 0.5, kinds=[AttentionKind.CROSS]).masks.keep[AttentionKind.CROSS][0, 0]
    assert keep[5, 5] and not keep[9, 5]
    keep = build(stats, 0.5, kinds=[AttentionKind.CROSS], extrapolate="keep").masks.keep[AttentionKind.CROSS][0, 0]
    assert keep[unseen].all()


def test_the_summary_counts_rows_that_only_the_guarantee_keeps():
    stats = random_stats(longest=(6, 6), layers=1, heads=1)
    masks = build(stats, 0.0).masks
    keep = masks.keep[AttentionKind.ENCODER_SELF]
    keep[..., 3, :] = False
    keep[..., 3, 3] = True
    rows = summarize(masks, stats)
    assert rows[0].guaranteed_rows == 1 and rows[0].rows == 6


def test_the_table_has_a_row_for_each_kind_and_nominal_sparsity_only_where_it_is_meant():
    """It took forty lines, and said `nominal 11.0%` of all-ones masks."""
    stats = random_stats(longest=(20, 20), layers=3)
    lines = cli_masks.format_summary(build(stats, 0.5)).splitlines()
    assert [line.split("  ")[0] for line in lines[2:]] == [*AttentionKind, "all kinds"]
    assert "nominal" not in lines[0] and lines[2].split()[1] == "50.0%"
    built = build(stats, 0.5, kinds=SELF, criterion="percentile")
    header, _, encoder, _, cross, _ = cli_masks.format_summary(built).splitlines()
    assert "nominal" in header and len(encoder.split()) == 5 and len(cross.split()) == 4  # no budget
    lines = cli_masks.format_summary(build(stats, 0.5), per_layer=True).splitlines()
    assert len(lines) == 2 + 3 * (1 + 3) + 1 and lines[4].split()[1] == "1"
    assert lines[0].endswith("rows of one cell or none")


@pytest.mark.parametrize("empty_rows", [False, True])
@pytest.mark.parametrize("shape", [(3, 4), (9, 11), (12, 20), (30, 5)])
def test_masks_grow_by_their_pattern(shape, empty_rows):
    """Cells beyond the recorded range follow their diagonal's pattern; offsets it does not have are kept.

    And what keeps rows from being empty: validation sentences beyond the range were said to lose it.
    """
    masks = build(random_stats(longest=(9, 11)), 0.9, empty_rows=empty_rows).masks
    for kind in ALL:
        grown, keep, pattern = masks.grown(kind, shape), masks.keep[kind], masks.extrapolation[kind]
        assert grown.shape == (2, 2, *shape)
        for i, j in np.ndindex(shape):
            offset = j - i + keep.shape[2] - 1
            guaranteed = j == 0 if kind is AttentionKind.CROSS else i == j
            if kind.causal and j > i:
                assert not grown[..., i, j].any()
            elif i < keep.shape[2] and j < keep.shape[3]:
                np.testing.assert_array_equal(grown[..., i, j], keep[..., i, j])
            elif guaranteed and not empty_rows:
                assert grown[..., i, j].all()
            elif 0 <= offset < pattern.shape[-1]:
                np.testing.assert_array_equal(grown[..., i, j], pattern[..., offset])
            else:
                assert grown[..., i, j].all()


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (dict(budgets={AttentionKind.CROSS: 1.0}), r"--cross 1.0 is not a share of pairs in \[0, 1\)"),
        (dict(budgets={AttentionKind.ENCODER_SELF: -0.1}), "--encoder-self -0.1 is not a share"),
        (dict(budgets={AttentionKind.CROSS: math.nan}), "--cross nan is not a share"),
        (dict(budgets={}, scope="site"), "--scope site is not one of kind, layer, head, global"),
        (dict(budgets={}, criterion="best"), "--criterion best is not one of mean, normalised"),
        (dict(budgets={}, granularity="8x"), "--granularity 8x is not N .*, QxK .* or one of diagonal, scaled"),
        (dict(budgets={}, min_kept=1.2), "--min-kept 1.2 is not a share"),
        (dict(budgets={}, min_kept=math.nan), "--min-kept nan is not a share"),
        (dict(budgets={}, min_heads={AttentionKind.CROSS: math.inf}), "--min-heads cross=inf is not a number of heads"),
        (dict(budgets={}, min_heads={AttentionKind.CROSS: math.nan}), "--min-heads cross=nan is not a number of heads"),
        (
            dict(budgets={}, max_heads={AttentionKind.CROSS: 1.5}),
            "--max-heads cross=1.5 is not a number of heads, nor a",
        ),
        (dict(budgets={}, max_heads={AttentionKind.CROSS: 0}), "--max-heads cross=0 is not a number of heads, nor a"),
        (dict(budgets={}, max_heads={AttentionKind.CROSS: math.nan}), "--max-heads cross=nan is not a number of heads"),
        (
            dict(budgets={}, max_heads={AttentionKind.CROSS: 1}, min_heads={AttentionKind.CROSS: 2}),
            "--min-heads cross=2 .* --max-heads cross=1 spreads them; choose one for cross",
        ),
        (dict(budgets={}, max_heads_of="head"), "--max-heads-of head is not one of layer, kind"),
        (dict(budgets={}, criterion="percentile", max_heads={AttentionKind.CROSS: 1}), "leave out --max-heads$"),
        (dict(budgets={}, keep_first=-1), "--keep-first -1 is not a number of positions"),
        (dict(budgets={}, keep_diagonal=-1), "--keep-diagonal -1 is not a number of positions"),
        (dict(budgets={}, criterion="percentile", min_kept=0.1), "--criterion percentile .*; leave out --min-kept$"),
        (
            dict(budgets={}, criterion="percentile", granularity=16, scope="head"),
            "--criterion percentile .*; leave out --scope, --granularity$",
        ),
        (dict(budgets={}, criterion="percentile", smooth=2), "--smooth 2 does not go with --criterion percentile"),
        (dict(budgets={}, criterion="window", smooth=2), "criterion window, only with mean, normalised, importance;"),
        (dict(budgets={}, smooth=-1), "--smooth -1 is not a number of positions"),
        (dict(budgets={}, seed=-1), "--seed -1 is negative"),
    ],
)
def test_bad_specs_name_the_flag(spec, message):
    """They named fields of a Python class, such as scope, to people who had typed --total."""
    with pytest.raises(UserError, match=message):
        MaskSpec(**spec)


def test_a_budget_for_a_kind_that_was_not_recorded_is_an_error():
    stats = random_stats()
    del stats.mass[AttentionKind.CROSS], stats.support[AttentionKind.CROSS]
    with pytest.raises(UserError, match="a budget is given for cross, but the statistics hold only"):
        build(stats, kinds=[AttentionKind.CROSS])


def test_statistics_without_pairs_are_refused():
    """Shares of no pairs are NaN."""
    stats = random_stats()
    stats.mass[AttentionKind.CROSS][:], stats.support[AttentionKind.CROSS][:] = 0, 0
    with pytest.raises(ArtifactError, match="the statistics of cross are empty: .* 0 recorded pairs; record it again"):
        build(stats, kinds=SELF)


def test_scores_that_overflow_are_refused():
    """An infinite score means always kept."""
    stats = random_stats()
    stats.importance[AttentionKind.CROSS][:] = 1e308
    message = "cross: scores by --criterion importance overflow"
    with pytest.raises(ArtifactError, match=message), np.errstate(all="ignore"):
        build(stats, criterion="importance", smooth=4)


def test_the_histogram_search_prunes_what_a_full_sort_would(monkeypatch):
    """Large problems narrow the threshold down by histograms; ties, skew and huge ranges must not change the result."""
    draw = np.random.default_rng(0)
    for values in (
        draw.random(4000) ** 20,
        np.round(draw.random(4000), 1),
        np.full(4000, 0.3),
        -draw.lognormal(0, 9, 4000),
    ):
        weight = draw.integers(0, 50, 4000)
        for share in (0.0, 0.3, 0.9, 1.0):
            target = share * weight.sum()
            expected, threshold = select.prune_lowest([(values, weight)], target)
            with monkeypatch.context() as patch:
                patch.setattr(select, "_SORTED_AT_ONCE", 8)
                found, found_threshold = select.prune_lowest([(values, weight)], target)
            np.testing.assert_array_equal(found[0], expected[0])
            assert found_threshold == threshold


def test_units_of_billions_of_pairs_do_not_overflow():
    """A 128-block of WMT holds over 2^31 pairs; int32 weights made them negative and the budget meaningless."""
    pruned, threshold = select.prune_lowest([(np.array([0.1, 0.2, 0.3]), np.array([3e9, 3e9, 3e9]))], 6e9)
    np.testing.assert_array_equal(pruned[0], [True, True, False])
    assert threshold == 0.2


# -- criteria ---------------------------------------------------------------------------------------------------------


def total_mass(masks, stats) -> tuple[float, float]:
    """Effective sparsity and kept mass over all kinds, from their definitions."""
    pairs = sum(stats.support[kind].sum() * np.prod(stats.mass[kind].shape[:2]) for kind in ALL)
    pruned = sum((stats.support[kind] * ~masks.keep[kind]).sum() for kind in ALL)
    kept = sum(stats.mass[kind][masks.keep[kind]].sum() for kind in ALL)
    return pruned / pairs, kept / sum(stats.mass[kind].sum() for kind in ALL)


def peaked_stats(seed=0):
    """Statistics whose kinds differ: attention of sharp heads in the decoder, flat heads in the encoder."""
    stats = random_stats(seed, longest=(30, 40), sentences=300)
    for kind, power in zip(ALL, (1, 12, 4), strict=True):
        weight = (stats.mass[kind] / np.maximum(stats.support[kind], 1)) ** power * (stats.support[kind] > 0)
        stats.mass[kind] = weight / weight.sum(-1, keepdims=True) * stats.support[kind]
    return stats


def test_a_global_budget_keeps_more_mass_than_equal_budgets_per_kind():
    """What it is for: cheap-to-prune sites pay for dear ones, at the same number of pruned pairs."""
    stats = peaked_stats()
    built = build(stats, 0.8, scope="global")
    shared, missed = built.masks, built.warnings
    equal = build(stats, 0.8).masks
    (share, kept), (equal_share, equal_kept) = total_mass(shared, stats), total_mass(equal, stats)
    assert not missed and share == pytest.approx(0.8, abs=0.002) and equal_share == pytest.approx(0.8, abs=0.002)
    assert kept > equal_kept + 0.01
    assert shared.metadata["total"] == pytest.approx({"effective": share, "kept_mass": kept})
    assert len({round(effective(shared, stats, kind), 2) for kind in ALL}) == 3
    rows = [row for row in summarize(shared, stats) if row.layer is None]
    assert total_of(rows)["kept_mass"] == pytest.approx(kept)


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


def test_every_head_keeps_its_minimum_and_the_budget_is_met_elsewhere():
    stats = random_stats(longest=(30, 30), sentences=200)
    for kind in ALL:
        stats.mass[kind][0, 0] *= 1e-3
    free = build(stats, 0.7, scope="global").masks
    built = build(stats, 0.7, scope="global", min_kept=0.15)
    floored, missed = built.masks, built.warnings
    assert not missed and total_mass(floored, stats)[0] == pytest.approx(0.7, abs=0.01)
    for kind in ALL:
        n = stats.support[kind]
        kept_free, kept = ((n * m.keep[kind][0, 0]).sum() / n.sum() for m in (free, floored))
        assert kept_free < 0.13 and kept >= 0.15
        best = np.sort((stats.mean(kind)[0, 0])[floored.keep[kind][0, 0] & (n > 0)])
        assert best[-1] == stats.mean(kind)[0, 0].max()


@pytest.mark.parametrize(("of", "groups", "cap"), [("layer", (2, 4), 1), ("kind", (1, 8), 2)])
@pytest.mark.parametrize("granularity", [1, "4x2", "diagonal"])
@pytest.mark.parametrize("criterion", ["mean", "importance", "window", "random", "fixed"])
def test_no_more_heads_than_the_cap_keep_a_unit(criterion, granularity, of, groups, cap):
    stats = random_stats(longest=(24, 24), sentences=200, layers=2, heads=4)
    caps = dict.fromkeys(ALL, cap)
    spec = dict(criterion=criterion, granularity=granularity, max_heads=caps, max_heads_of=of, scope="global")
    masks = build(stats, 0.8, **spec).masks
    free = build(stats, 0.8, criterion=criterion, granularity=granularity, scope="global").masks
    assert total_mass(masks, stats)[0] == pytest.approx(0.8, abs=0.03)
    most = 0  # heads that keep a cell without the cap
    for kind in ALL:
        cells = ~criteria.guaranteed(stats.support[kind].shape, kind) & (stats.support[kind] > 0)
        seen_by = masks.keep[kind].reshape(*groups, *cells.shape).sum(1)[:, cells]
        assert seen_by.max() <= cap
        most = max(most, free.keep[kind].reshape(*groups, *cells.shape).sum(1)[:, cells].max())
        offsets = masks.extrapolation[kind].reshape(*groups, -1).sum(1)
        assert offsets[:, ~criteria.unseen_offsets(stats.support[kind])].max() <= cap
    assert most > cap


@pytest.mark.parametrize("granularity", [1, "4x2", "diagonal"])
def test_rows_may_be_empty_if_asked(granularity, tmp_path):
    """Every cell is a candidate, and the budget holds where guaranteed cells alone are more than what it leaves."""
    stats = random_stats(longest=(12, 12), sentences=200, layers=2, heads=4)
    built = build(stats, 0.95, granularity=granularity, empty_rows=True, scope="global")
    assert total_mass(built.masks, stats)[0] == pytest.approx(0.95, abs=0.02)
    assert total_mass(build(stats, 0.95, granularity=granularity, scope="global").masks, stats)[0] < 0.93
    for kind in ALL:
        seen = (stats.support[kind] > 0).any(-1)
        assert not built.masks.keep[kind][..., seen, :].any(-1).all()
    built.masks.save(tmp_path / "masks.safetensors")
    loaded = PruningMasks.load(tmp_path / "masks.safetensors")
    assert loaded.may_have_empty_rows and loaded.metadata["spec"]["empty_rows"] is True
    with pytest.raises(ArtifactError, match="must be kept in every row"):
        PruningMasks(loaded.keep, loaded.extrapolation)
    assert "empty_rows" not in build(stats, 0.5).masks.metadata["spec"]


def test_heads_that_keep_nothing_are_named():
    stats = random_stats(longest=(12, 12), sentences=100, layers=1, heads=2)
    kind = AttentionKind.CROSS
    stats.mass[kind][0, 0] *= 1e-3
    built = build(stats, 0.6, kinds=[kind], empty_rows=True)
    assert built.masks.metadata["vanished_heads"] == {"cross": [[0, 0]]}
    assert "nothing is kept by 1 of 2 heads of cross (layer.head): 0.0" in built.warnings
    built.masks.keep[kind][0, 1] = False
    built.masks.keep[kind][0, 1, :, 0] = True
    assert vanished_heads(built.masks, stats) == {"cross": [[0, 0]]}  # column 0 is like others
    anchored = build(stats, 0.9, kinds=[kind], granularity="scaled-diagonal", empty_rows=True)
    left = "nothing but the guaranteed cells (one in each row) is kept by 2 of 2 heads of cross (layer.head): 0.0, 0.1"
    assert anchored.warnings[-1] == left


def test_rows_of_one_cell_or_none_are_rows_that_sentences_have():
    stats = random_stats(longest=(12, 12), sentences=100, layers=1, heads=2)
    kind = AttentionKind.CROSS
    stats.support[kind][10:], stats.mass[kind][..., 10:, :] = 0, 0
    masks = build(stats, 0.5, kinds=[kind], empty_rows=True).masks
    masks.keep[kind][:] = False
    total = next(row for row in summarize(masks, stats) if row.kind == kind.value and row.layer is None)
    assert total.guaranteed_rows == total.rows == 2 * 10


def test_a_first_row_that_lost_its_only_cell_is_a_row_of_none():
    """Row 0 of decoder self-attention has one cell, and was counted neither with it nor without."""
    stats, kind = random_stats(longest=(6, 6), layers=1, heads=2), AttentionKind.DECODER_SELF
    masks = build(stats, 0.5, kinds=[kind], empty_rows=True).masks
    for value, lost in ((True, 0), (False, 2 * 6)):
        masks.keep[kind][:] = np.tril(np.full((6, 6), value))
        total = next(row for row in summarize(masks, stats) if row.kind == kind.value and row.layer is None)
        assert (total.guaranteed_rows, total.rows) == (lost, 2 * 6)


def test_a_missed_budget_is_explained_without_guaranteed_cells_where_rows_may_be_empty():
    stats = random_stats(longest=(2, 2), sentences=50, layers=1, heads=1)
    for empty_rows, reason in ((False, "every row keeps one guaranteed cell"), (True, "a cell is pruned in every")):
        warnings = build(stats, 0.9, kinds=[AttentionKind.ENCODER_SELF], empty_rows=empty_rows).warnings
        assert re.match(rf"encoder_self: effective sparsity [\d.]+% instead of 90.0%: {reason}", warnings[0])


def test_a_kind_of_which_a_pruned_model_keeps_nothing_is_pruned_on():
    stats = random_stats(longest=(12, 12), sentences=100, layers=1, heads=2)
    kind = AttentionKind.ENCODER_SELF
    stats.mass[kind][:] = 0
    built = build(stats, 0.6, empty_rows=True, scope="global")
    assert not built.masks.keep[kind][..., stats.support[kind] > 0].any()
    assert built.masks.metadata["sparsity"]["encoder_self"]["kept_mass"] == 1.0
    assert built.masks.metadata["total"]["kept_mass"] < 1
    alone = AttentionStats({kind: stats.mass[kind]}, {kind: stats.support[kind]})
    assert build(alone, 0.6, kinds=[kind], empty_rows=True).masks.metadata["total"]["kept_mass"] == 1.0


def test_a_cap_keeps_the_best_heads_of_each_cell_and_is_a_share_or_a_number():
    stats = random_stats(longest=(12, 12), sentences=100, layers=1, heads=4)
    kind = AttentionKind.ENCODER_SELF
    numbers, shares = (build(stats, 0.46, kinds=[kind], max_heads={kind: most}).masks for most in (2, 0.5))
    np.testing.assert_array_equal(numbers.keep[kind], shares.keep[kind])
    ranks = stats.mean(kind)[0].argsort(0).argsort(0)  # 3: the head with the most attention to the cell
    cells = ~np.eye(12, dtype=bool) & (stats.support[kind] > 0)
    assert (ranks[numbers.keep[kind][0] & cells] >= 2).all()
    one = build(stats, 0.8, kinds=[kind], max_heads={kind: 0.1}).masks.keep[kind][0][:, cells]
    assert one.sum(0).max() == 1


def test_heads_that_score_alike_share_the_cells_of_a_cap():
    """All heads of a window score alike, and the first ones would get every cell."""
    stats = random_stats(longest=(30, 30), sentences=200, layers=1, heads=4)
    kind = AttentionKind.ENCODER_SELF
    keep = build(stats, 0.9, kinds=[kind], criterion="window", max_heads={kind: 1}).masks.keep[kind][0]
    off_diagonal = keep.sum((1, 2)) - 30
    assert off_diagonal.min() > 0.5 * off_diagonal.mean()


def test_a_cap_that_prunes_more_than_the_budget_is_refused_unless_the_budget_grows():
    stats = random_stats(longest=(30, 30), sentences=200, layers=2, heads=4)
    kind = AttentionKind.CROSS
    spec = MaskSpec({kind: 0.3}, max_heads={kind: 1})
    with pytest.raises(
        UserError, match=r"--max-heads cross=1 prunes at least 7\d\.\d% of .* cross, the budget is 30.0%"
    ):
        build_masks(stats, spec)
    growing = build_masks(stats, MaskSpec({kind: 0.9}, max_heads={kind: 1}), share=1 / 3).masks
    assert effective(growing, stats, kind) == pytest.approx(0.3, abs=0.01)
    final = build_masks(stats, MaskSpec({kind: 0.9}, max_heads={kind: 1})).masks
    assert not (final.keep[kind] & ~growing.keep[kind]).any()  # what a growing budget prunes stays pruned


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (dict(max_heads={AttentionKind.CROSS: 5}), "--max-heads cross=5, but it has 4 heads in a layer"),
        (dict(max_heads={AttentionKind.CROSS: 9}, max_heads_of="kind"), "=9, but it has 2 layers of 4 heads"),
        (dict(max_heads={AttentionKind.CROSS: 1}, min_kept=0.5), "--min-kept 0.5 is more than --max-heads cross=1"),
    ],
)
def test_caps_that_do_not_fit_the_model_are_refused(spec, message):
    with pytest.raises(UserError, match=message):
        build(random_stats(layers=2, heads=4), 0.8, **spec)


def test_a_head_keeps_its_minimum_within_the_cap():
    stats = random_stats(longest=(30, 30), sentences=200, layers=1, heads=4)
    kind = AttentionKind.CROSS
    stats.mass[kind][0, 0] *= 1e-3  # would keep nothing
    stats.mass[kind][0, 0, :, 5] *= 2e3
    keep = build(stats, 0.8, kinds=[kind], max_heads={kind: 2}, min_kept=0.02).masks.keep[kind]
    share = (stats.support[kind] * keep[0, 0]).sum() / stats.support[kind].sum()
    assert share >= 0.02 and keep[0][:, :, 1:][:, stats.support[kind][:, 1:] > 0].sum(0).max() <= 2


def test_vanished_heads_are_named():
    stats = random_stats(longest=(20, 20), sentences=200)
    stats.mass[AttentionKind.CROSS][1, 0] *= 1e-9
    masks = build(stats, 0.5, kinds=[AttentionKind.CROSS]).masks
    assert masks.metadata["vanished_heads"] == {"cross": [[1, 0]]}
    assert build(stats, 0.5, kinds=[AttentionKind.CROSS], min_kept=0.2).masks.metadata["vanished_heads"] == {}


@pytest.mark.parametrize("granularity", [1, 16])
def test_always_kept_sets_hold_at_any_budget(granularity):
    stats = random_stats(longest=(40, 60), sentences=300)
    masks = build(stats, 0.6, keep_diagonal=2, keep_first=3, granularity=granularity).masks
    ratio = criteria.slope(stats, AttentionKind.CROSS)
    for kind in ALL:
        row, column = np.indices(stats.support[kind].shape)
        expected = (np.abs(column - (ratio if kind is AttentionKind.CROSS else 1) * row) <= 2) | (column < 3)
        if kind.causal:
            expected &= column <= row
        assert masks.keep[kind][..., expected].all()
        assert effective(masks, stats, kind) == pytest.approx(0.6, abs=0.01 if granularity == 1 else 0.1)
    middle = stats.support[AttentionKind.ENCODER_SELF].shape[0] - 1
    assert masks.extrapolation[AttentionKind.ENCODER_SELF][..., middle - 2 : middle + 3].all()


def on_validation(masks, stats, kind) -> float:
    """Effective sparsity on the validation sentences, one after the other."""
    pruned = total = 0
    for target, source, count in stats.validation_lengths.tolist():
        shape = {
            AttentionKind.ENCODER_SELF: (source, source),
            AttentionKind.DECODER_SELF: (target, target),
            AttentionKind.CROSS: (target, source),
        }[kind]
        if masks.relative is not None and kind is AttentionKind.CROSS:
            keep = masks.relative.cells(*shape)
        else:
            keep = masks.grown(kind, shape)
        exist = np.tri(*shape, dtype=bool) if kind.causal else np.ones(shape, dtype=bool)
        pruned, total = pruned + count * (~keep & exist).sum(), total + count * exist.sum() * keep[..., 0, 0].size
    return pruned / total


@pytest.mark.parametrize(("scope", "shares"), [("kind", ["53%", "42%", "48%"]), ("global", ["50%"])])
def test_a_budget_that_validation_sentences_beyond_the_range_cannot_meet_is_explained(scope, shares):
    """Guaranteed cells or the size of units were blamed."""
    stats = random_stats(longest=(9, 11), sentences=200)
    stats.validation_lengths = np.array([[12, 16, 5]])
    held, free = (build(stats, 0.9, scope=scope, calibrate=calibrate).warnings for calibrate in (True, False))
    missed = [text.partition("instead of 90.0%: ")[2] for text in held if "instead of" in text]
    assert [text.partition(" of the pairs of validation sentences lie beyond")[0] for text in missed] == shares
    assert not any("beyond" in text for text in free)


@pytest.mark.parametrize("granularity", [1, {AttentionKind.CROSS: "scaled-diagonal"}])
@pytest.mark.parametrize("scope", ["kind", "global"])
def test_budgets_hold_on_the_validation_sentences_where_that_is_asked(scope, granularity):
    stats = random_stats(longest=(30, 35), sentences=200)
    free, held = (build(stats, 0.8, scope=scope, granularity=granularity, calibrate=c) for c in (False, True))
    for built in (free, held):
        validation = built.masks.metadata["validation"]
        for kind in ALL:
            assert validation[kind.value] == pytest.approx(on_validation(built.masks, stats, kind))
    errors = [abs(m.masks.metadata["validation"]["total"] - 0.8) for m in (free, held)]
    assert errors[1] < 0.01 < errors[0]
    assert not held.warnings and held.masks.metadata["spec"]["budgets"] == dict.fromkeys(ALL, 0.8)
    assert abs(held.masks.metadata["total"]["effective"] - 0.8) > 0.01  # of the recorded sentences
    if scope == "kind":
        assert all(abs(held.masks.metadata["validation"][kind] - 0.8) < 0.01 for kind in ALL)


@pytest.mark.parametrize("cap", [None, 1])
@pytest.mark.parametrize("granularity", [1, 4, "diagonal"])
def test_calibration_comes_as_near_as_any_budget(granularity, cap):
    """It was up to 9 points off where its corrections went to and fro, or a cap of heads made them change nothing."""
    stats = random_stats(longest=(12, 14), sentences=200)
    for kind in ALL:
        options = dict(kinds=[kind], granularity=granularity, max_heads={kind: cap} if cap else {})
        wanted = 0.75 if granularity == "diagonal" else 0.6
        budgets = np.linspace(wanted if cap else 0.4, 0.98, 50)  # the cap takes as much
        built = [build(stats, budget, **options) for budget in budgets]
        built.append(build(stats, wanted, **options, calibrate=True))
        *errors, error = (abs(one.masks.metadata["validation"][kind] - wanted) for one in built)
        assert error < max(0.01, min(errors) + 1e-3)


def test_one_budget_of_some_kinds_holds_on_their_validation_pairs():
    """The pairs of the kinds without a budget were counted too: masks as asked for came with a warning."""
    stats = random_stats(longest=(30, 35), sentences=200)
    budgets = {AttentionKind.CROSS: 0.9, AttentionKind.ENCODER_SELF: 0.6}
    built = build_masks(stats, MaskSpec(budgets, scope="global", calibrate=True))
    lengths = stats.validation_lengths  # target, source, number
    pairs = {
        kind: (lengths[:, 1] * lengths[:, int(kind is not AttentionKind.CROSS)] * lengths[:, 2]).sum()
        for kind in budgets
    }
    pruned = sum(built.masks.metadata["validation"][kind] * n for kind, n in pairs.items())
    assert pruned / sum(pairs.values()) == pytest.approx(
        sum(budgets[kind] * n for kind, n in pairs.items()) / sum(pairs.values()), abs=1e-3
    )
    assert not built.warnings


def test_a_cap_that_allows_a_budget_allows_its_calibration():
    """It was refused with a budget that nobody had given: a correction went below what the cap prunes."""
    stats = random_stats(longest=(30, 35), sentences=200)
    stats.validation_lengths = stats.lengths[stats.lengths[:, :2].min(1) > 20]
    built = build(stats, 0.48, kinds=[AttentionKind.CROSS], max_heads={AttentionKind.CROSS: 1}, calibrate=True)
    assert built.masks.metadata["validation"]["cross"] == pytest.approx(0.48, abs=0.01) and not built.warnings


def test_both_sparsities_are_printed_and_older_statistics_are_refused(tmp_path, capsys):
    stats = random_stats(longest=(30, 30), sentences=200)
    stats.save(tmp_path / "s.st")
    ap_masks(tmp_path / "s.st", "--cross", 0.8, "--calibrate", "-o", tmp_path / "m.st")
    table = capsys.readouterr().out
    assert "effective on validation" in table and re.search(r"cross +\d\d\.\d% +\d\d\.\d% +(79\.9|80\.[01])%", table)
    stats.validation_lengths = stats.validation_lengths[:0]
    stats.save(tmp_path / "old.st")
    with pytest.raises(SystemExit):
        ap_masks(tmp_path / "old.st", "--cross", 0.8, "--calibrate", "-o", tmp_path / "n.st")
    assert "--calibrate needs the lengths of the validation sentences" in capsys.readouterr().err
    ap_masks(tmp_path / "old.st", "--cross", 0.8, "-o", tmp_path / "n.st")
    assert "on validation" not in capsys.readouterr().out


def test_masks_are_described_in_todays_words():
    """Checkpoints of version 0.1 hold the specification of their masks under other names."""
    masks = build(random_stats(longest=(20, 20)), 0.5, kinds=[AttentionKind.CROSS], scope="head").masks
    expected = "effective sparsity encoder_self 0.0%, decoder_self 0.0%, cross 49.9% (mean, granularity 1)"
    assert describe_sparsity(masks.metadata) == expected
    old = {"procedure": "effective", "scope": "head", "granularity": 1, "beyond": "diagonal", "pool": 0, "seed": 1}
    provenance = {"procedure": old, "sparsity": masks.metadata["sparsity"]}
    assert describe_sparsity(provenance) == expected
    spec = mask_spec(provenance)
    assert {key: masks.metadata["spec"][key] for key in spec} == spec


# -- the command ------------------------------------------------------------------------------------------------------


def ap_masks(*arguments):
    cli_masks.main([str(argument) for argument in arguments])


def test_controls_take_the_budgets_of_other_masks(tmp_path, capsys):
    """--total distributes over kinds; --like gives a control the same share of each kind."""
    stats = peaked_stats()
    stats.save(tmp_path / "stats.st")
    ap_masks(tmp_path / "stats.st", "--total", 0.7, "-o", tmp_path / "ours.st")
    assert re.search(r"^all kinds +70\.0%", capsys.readouterr().out, re.M)
    ap_masks(tmp_path / "stats.st", "--like", tmp_path / "ours.st", "--criterion", "random", "-o", tmp_path / "r.st")
    ours, control = (PruningMasks.load(tmp_path / name) for name in ("ours.st", "r.st"))
    for kind in ALL:
        assert effective(control, stats, kind) == pytest.approx(effective(ours, stats, kind), abs=0.005)
    assert total_mass(control, stats)[1] < total_mass(ours, stats)[1]


@pytest.mark.parametrize("granularity", [1, "scaled-diagonal"])
def test_controls_of_masks_that_leave_nothing_of_a_kind(granularity, tmp_path, capsys):
    """Their budget of 100% was refused."""
    stats = random_stats()
    stats.mass[AttentionKind.CROSS] *= 1e-9
    stats.save(tmp_path / "stats.st")
    ap_masks(tmp_path / "stats.st", "--total", 0.8, "--empty-rows", "-o", tmp_path / "ours.st")
    control = ["--like", tmp_path / "ours.st", "--criterion", "random", "--granularity", f"cross={granularity}"]
    ap_masks(tmp_path / "stats.st", *control, "--empty-rows", "-o", tmp_path / "control.st")
    ours, drawn = (PruningMasks.load(tmp_path / name).metadata["sparsity"] for name in ("ours.st", "control.st"))
    assert ours["cross"]["effective"] == 1 and (drawn["cross"]["effective"] == 1) == (granularity == 1)
    for kind in SELF:
        assert drawn[kind.value]["effective"] == pytest.approx(ours[kind.value]["effective"], abs=0.01)
    with pytest.raises(SystemExit):
        ap_masks(tmp_path / "stats.st", *control, "-o", tmp_path / "full.st")
    assert "--cross 1.0 is not a share of pairs in [0, 1), or 1 with --empty-rows" in capsys.readouterr().err


def test_masks_say_how_far_their_statistics_were_smoothed(tmp_path):
    random_stats(longest=(20, 20)).save(tmp_path / "stats.st")
    for distance in (0, 8):
        ap_masks(tmp_path / "stats.st", "--total", 0.5, "--smooth", distance, "-o", tmp_path / f"{distance}.st")
    masks = [PruningMasks.load(tmp_path / f"{distance}.st") for distance in (0, 8)]
    assert [m.metadata["spec"]["smooth"] for m in masks] == [0, 8]
    assert not np.array_equal(*(m.keep[AttentionKind.CROSS] for m in masks))


def test_budgets_are_not_taken_from_masks_that_do_not_tell_them(tmp_path, capsys):
    """Such a file counted as an all-ones mask."""
    random_stats().save(tmp_path / "stats.st")
    masks = build(random_stats(), 0.5).masks
    del masks.metadata["sparsity"]
    masks.save(tmp_path / "m.st")
    with pytest.raises(SystemExit):
        ap_masks(tmp_path / "stats.st", "--like", tmp_path / "m.st", "-o", tmp_path / "out.st")
    assert "m.st does not tell its sparsity" in capsys.readouterr().err and not (tmp_path / "out.st").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--total", 0.5, "--cross", 0.5], "budgets are given by --total and --cross; choose one"),
        (["--total", 0.5, "--scope", "layer"], "--scope layer splits it"),
        (["--total", "half"], "argument --total: 'half' is not a share in"),
        (["--total", "nan"], "argument --total: 'nan' is not a share in"),
        (["--keep-first=-1"], "argument --keep-first: '-1' is not a number of positions"),
        (["--keep-first", "²"], "argument --keep-first: '²' is not a number of positions"),
        (["--granularity", "²"], "argument --granularity: ² is not N "),
        (["--granularity", "16x"], "argument --granularity: 16x is not N "),
        (["--granularity", "cross=16,cross=1"], "'cross=16,cross=1' gives a kind twice"),
        (["--granularity", "source=16"], "'source=16': expected KIND=GRANULARITY"),
        (["--total", 0.5, "--max-heads", "two"], "--max-heads is 'two', expected a number"),
        (["--cross", 0.5, "--max-heads", "decoder_self=1"], "--max-heads names decoder_self, which has no budget"),
        (
            ["--cross", 0.5, "--granularity", "cross=16,encoder_self=16"],
            "--granularity names encoder_self, which has no",
        ),
        (
            ["--total", 0.5, "--criterion", "percentile"],
            "error: --total gives effective sparsity, --criterion percentile",
        ),
        (["--like", "ours.st", "--criterion", "percentile"], "error: --like gives effective sparsity, --criterion"),
        (["--total", 0.5, "--criterion", "window", "--smooth", 8], "--smooth 8 does not go with --criterion window"),
        (
            ["--total", 0.5, "--min-heads", "cross=1,cross=2"],
            "'cross=1,cross=2', which gives cross twice",
        ),
        (
            ["--total", 0.5, "--min-heads", "cross=1=2"],
            "--min-heads is 'cross=1=2', expected a number, or",
        ),
        (["--total", 0.5, "--seed", "-3"], "--seed -3 is negative"),
    ],
)
def test_flags_that_contradict_each_other_are_refused(flags, message, tmp_path, capsys):
    random_stats().save(tmp_path / "stats.st")
    with pytest.raises(SystemExit) as stop:
        ap_masks(tmp_path / "stats.st", *flags, "-o", tmp_path / "out.st")
    assert stop.value.code == 2 and re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "out.st").exists()


def test_masks_without_a_budget_are_asked_for(capsys, tmp_path):
    """ap-masks without a budget wrote masks that keep everything, without a word."""
    stats, output = tmp_path / "stats.safetensors", tmp_path / "masks.safetensors"
    random_stats().save(stats)
    for flags in ([], ["--criterion", "importance", "--smooth", "2", "--calibrate"]):
        with pytest.raises(SystemExit):
            cli_masks.main([str(stats), "-o", str(output), *flags])
        message = "no budget is given, so nothing would be pruned; give --total SHARE, a share for each kind"
        assert message in capsys.readouterr().err and not output.exists()
    for flags in (["--total", "0"], ["--cross", "0"]):
        cli_masks.main([str(stats), "-o", str(output), "--overwrite", *flags])
        assert PruningMasks.load(output).metadata["total"]["effective"] == 0
