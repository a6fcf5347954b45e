"""Budgets are met, controls are equal, and masks keep what they must."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plugin.builders import random_stats

from ap_fairseq import masks as masks_module
from ap_fairseq.artifacts import AttentionStats
from ap_fairseq.masks import MaskSpec, build_masks, format_summary, summarize
from ap_fairseq.recording import occupancy_of
from ap_fairseq.sites import AttentionKind

ALL = tuple(AttentionKind)
SELF = (AttentionKind.ENCODER_SELF, AttentionKind.DECODER_SELF)


def build(stats, share=0.5, kinds=ALL, **spec):
    return build_masks(stats, MaskSpec({kind: share for kind in kinds}, **spec))


def effective(masks, stats, kind) -> float:
    """Recompute effective sparsity from its definition."""
    weight = np.broadcast_to(stats.occupancy[kind], masks.keep[kind].shape)
    return float((weight * ~masks.keep[kind]).sum() / weight.sum())


@settings(deadline=None, derandomize=True, max_examples=60)
@given(
    share=st.floats(0, 0.7),
    scope=st.sampled_from(["kind", "layer", "head"]),
    procedure=st.sampled_from(["effective", "random", "window"]),
    seed=st.integers(0, 5),
)
def test_budgets_are_met_within_one_point_or_the_tool_says_why(share, scope, procedure, seed):
    stats = random_stats(seed, longest=(40, 50), sentences=300)
    masks, missed = build(stats, share, scope=scope, procedure=procedure, seed=seed)
    assert not missed
    for kind in ALL:
        assert abs(effective(masks, stats, kind) - share) <= 0.01


def test_a_budget_that_cannot_be_met_is_explained():
    """A cross-attention of one-word sentences has nothing but guaranteed cells; whole blocks cannot be halved."""
    lengths = {(1, 1): 5}
    occupancy = {kind: occupancy_of(kind, lengths) for kind in ALL}
    stats = AttentionStats({k: np.ones((1, 1, *n.shape)) * n for k, n in occupancy.items()}, occupancy)
    _, missed = build(stats, 0.5)
    assert len(missed) == 3 and "0.0% instead of 50.0%" in missed[0] and "guaranteed" in missed[0]
    _, missed = build(random_stats(longest=(20, 20)), 0.5, granularity=128)
    assert len(missed) == 3 and "128x128 blocks" in missed[0]


def test_ranking_by_mean_attention_keeps_the_most_mass_a_budget_allows():
    """The fractional-knapsack optimum, against all subsets of the cells of a small head with equal occupancy."""
    occupancy = {AttentionKind.ENCODER_SELF: np.full((3, 3), 4)}
    mass = {AttentionKind.ENCODER_SELF: np.random.default_rng(5).random((1, 1, 3, 3))}
    stats = AttentionStats(mass, occupancy)
    masks, _ = build(stats, 3 / 9, kinds=[AttentionKind.ENCODER_SELF])
    kept = summarize(masks, stats)[0].kept_mass
    off_diagonal = [cell for cell in itertools.product(range(3), repeat=2) if cell[0] != cell[1]]
    values = mass[AttentionKind.ENCODER_SELF][0, 0]
    best = max(values.sum() - sum(values[c] for c in pruned) for pruned in itertools.combinations(off_diagonal, 3))
    assert kept == pytest.approx(best / values.sum())


def test_frequent_cells_count_for_what_they_cost():
    """A count-blind percentile would prune the rare cell; in pairs, both budgets below mean different cells."""
    occupancy = {AttentionKind.CROSS: np.array([[10, 8, 1], [10, 8, 1]])}
    mean = np.array([[0.5, 0.10, 0.4], [0.5, 0.2, 0.05]])
    stats = AttentionStats({AttentionKind.CROSS: (mean * occupancy[AttentionKind.CROSS])[None, None]}, occupancy)
    masks, _ = build(stats, 1 / 38, kinds=[AttentionKind.CROSS])
    assert (~masks.keep[AttentionKind.CROSS][0, 0]).nonzero() == ([1], [2])
    masks, _ = build(stats, 9 / 38, kinds=[AttentionKind.CROSS])
    np.testing.assert_array_equal(masks.keep[AttentionKind.CROSS][0, 0], [[True, False, True], [True, True, False]])


@pytest.mark.parametrize("procedure", ["effective", "random", "window", "as-published"])
@pytest.mark.parametrize("beyond", ["diagonal", "keep"])
def test_the_guarantee_holds_at_any_sparsity(procedure, beyond):
    """PruningMasks itself refuses empty rows and non-causal cells, so building must not raise."""
    stats = random_stats(longest=(12, 15))
    masks, _ = build(stats, 0.99, procedure=procedure, beyond=beyond)
    for kind in ALL:
        assert masks.keep[kind].any(-1).all()


def test_kinds_without_a_budget_are_kept_whole():
    stats = random_stats()
    masks, _ = build(stats, 0.6, kinds=[AttentionKind.CROSS])
    for kind in SELF:
        assert effective(masks, stats, kind) == 0
        assert masks.beyond[kind].all()


def test_random_masks_depend_on_the_seed_alone():
    stats = random_stats(longest=(30, 30))
    same = [build(stats, procedure="random", seed=s)[0].keep[AttentionKind.CROSS] for s in (4, 4, 5)]
    np.testing.assert_array_equal(same[0], same[1])
    assert (same[0] != same[2]).mean() > 0.2


def test_window_masks_keep_the_cells_nearest_the_diagonal_in_every_head():
    stats = random_stats(longest=(30, 45), sentences=300)
    masks, _ = build(stats, 0.5, procedure="window")
    slopes = {AttentionKind.ENCODER_SELF: 1.0, AttentionKind.DECODER_SELF: 1.0}
    cross = stats.occupancy[AttentionKind.CROSS]
    slopes[AttentionKind.CROSS] = cross[0].sum() / cross[:, 0].sum()  # mean source length / mean target length
    for kind in ALL:
        keep, occupancy = masks.keep[kind], stats.occupancy[kind]
        assert (keep == keep[:1, :1]).all()
        row, column = np.indices(occupancy.shape)
        distance = np.abs(column - slopes[kind] * row)
        prunable = (occupancy > 0) & (column != (0 if kind is AttentionKind.CROSS else row))
        kept, pruned = distance[keep[0, 0] & prunable], distance[~keep[0, 0] & prunable]
        assert kept.max() <= pruned.min() + 1  # ties of one step are broken by the seed


def test_as_published_is_the_percentile_of_the_square_per_layer_with_causal_zeros():
    """numpy's percentile over the square up to the longest sentence, applied by hand."""
    stats = random_stats(longest=(9, 12))
    masks, _ = build(stats, 0.8, procedure="as-published", beyond="keep")
    for kind in ALL:
        n_queries, n_keys = stats.occupancy[kind].shape
        square = np.zeros((2, 2, max(n_queries, n_keys), max(n_queries, n_keys)))
        square[:, :, :n_queries, :n_keys] = stats.mean(kind)
        for layer in range(2):
            expected = stats.mean(kind)[layer] > np.percentile(square[layer], 80)
            expected[..., stats.occupancy[kind] == 0] = True  # never observed, and --beyond keep
            if kind is AttentionKind.CROSS:
                expected[..., :, 0] = True
            else:
                expected |= np.eye(n_queries, dtype=bool)
            if kind.causal:
                expected &= np.tri(n_queries, dtype=bool)
            np.testing.assert_array_equal(masks.keep[kind][layer], expected)


def test_as_published_50_percent_prunes_next_to_nothing_of_the_decoder():
    """The causal half of the square is zero, so a nominal 50% is an effective 0%; both numbers are printed."""
    stats = random_stats(longest=(30, 30), sentences=300)
    row = {(r.kind, r.layer): r for r in summarize(build(stats, 0.5, procedure="as-published")[0], stats)}
    decoder = row["decoder_self", None]
    assert decoder.effective < 0.05 and decoder.nominal > 0.45


@pytest.mark.parametrize("size", [16, 32])
def test_blocks_are_kept_or_pruned_whole_apart_from_the_guarantee(size):
    stats = random_stats(longest=(70, 90), sentences=200)
    masks, _ = build(stats, 0.5, granularity=size, beyond="keep")
    for kind in ALL:
        occupancy = stats.occupancy[kind]
        for top, left in itertools.product(*(range(0, n, size) for n in occupancy.shape)):
            block = np.s_[top : top + size, left : left + size]
            row, column = np.indices(occupancy.shape)
            free = (occupancy > 0) & (column != (0 if kind is AttentionKind.CROSS else row))
            cells = masks.keep[kind][..., free & _inside(occupancy.shape, block)]
            assert (cells.all(-1) | ~cells.any(-1)).all()


def _inside(shape, block):
    inside = np.zeros(shape, dtype=bool)
    inside[block] = True
    return inside


def test_diagonal_granularity_decides_whole_offsets():
    stats = random_stats(longest=(20, 20), sentences=200)
    masks, _ = build(stats, 0.5, granularity="diagonal", kinds=[AttentionKind.ENCODER_SELF])
    keep = masks.keep[AttentionKind.ENCODER_SELF]
    for offset in range(-19, 20):
        cells = np.diagonal(keep, offset, -2, -1)
        assert (cells.all(-1) | ~cells.any(-1)).all()


def test_scopes_share_thresholds():
    """Per head every head reaches the budget; over all kinds only the sum of pairs does."""
    stats = random_stats(longest=(40, 40), sentences=300)
    stats.mass[AttentionKind.CROSS][:, 0] *= 0.1  # one dull head, which a common threshold prunes first
    masks, _ = build(stats, 0.5, scope="head")
    weight = stats.occupancy[AttentionKind.CROSS]
    per_head = (weight * ~masks.keep[AttentionKind.CROSS]).sum((-2, -1)) / weight.sum()
    np.testing.assert_allclose(per_head, 0.5, atol=0.01)

    masks, _ = build(stats, 0.5, scope="kind")
    per_head = (weight * ~masks.keep[AttentionKind.CROSS]).sum((-2, -1)) / weight.sum()
    assert per_head[0, 0] > 0.7 > 0.4 > per_head[0, 1]

    masks, _ = build(stats, 0.5, scope="global")
    totals = {kind: stats.occupancy[kind].sum() for kind in ALL}
    reached = sum(effective(masks, stats, kind) * totals[kind] for kind in ALL) / sum(totals.values())
    assert abs(reached - 0.5) <= 0.01
    assert max(abs(effective(masks, stats, kind) - 0.5) for kind in ALL) > 0.05


def test_unobserved_cells_follow_the_diagonal_or_are_kept():
    """Sentence pairs (10, 2) and (2, 10) leave the far corner of cross-attention unseen."""
    lengths = {(10, 2): 3, (2, 10): 3}
    occupancy = {AttentionKind.CROSS: occupancy_of(AttentionKind.CROSS, lengths)}
    mean = np.full((10, 10), 0.1)
    mean[np.abs(np.subtract.outer(range(10), range(10))) <= 1] = 0.9
    stats = AttentionStats({AttentionKind.CROSS: (mean * occupancy[AttentionKind.CROSS])[None, None]}, occupancy)
    unseen = occupancy[AttentionKind.CROSS] == 0
    assert unseen[5, 5] and unseen[9, 5]
    keep = build(stats, 0.5, kinds=[AttentionKind.CROSS])[0].keep[AttentionKind.CROSS][0, 0]
    assert keep[5, 5] and not keep[9, 5]
    keep = build(stats, 0.5, kinds=[AttentionKind.CROSS], beyond="keep")[0].keep[AttentionKind.CROSS][0, 0]
    assert keep[unseen].all()


def test_the_summary_counts_rows_that_only_the_guarantee_keeps():
    stats = random_stats(longest=(6, 6), layers=1, heads=1)
    masks, _ = build(stats, 0.0)
    keep = masks.keep[AttentionKind.ENCODER_SELF]
    keep[..., 3, :] = False
    keep[..., 3, 3] = True
    rows = summarize(masks, stats)
    assert rows[0].guaranteed_rows == 1 and rows[0].rows == 6
    table = format_summary(rows)
    assert table.splitlines()[1].split()[:2] == ["encoder_self", "all"] and "1/6" in table


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (dict(budgets={AttentionKind.CROSS: 1.0}), "budget for cross is 1.0, expected 0 <= budget < 1"),
        (dict(budgets={AttentionKind.CROSS: -0.1}), "budget for cross is -0.1"),
        (dict(budgets={}, scope="site"), "scope 'site' is not one of kind, layer, head, global"),
        (dict(budgets={}, procedure="best"), "procedure 'best' is not one of"),
        (dict(budgets={}, granularity=8), "granularity 8 is not one of 1, 16, 32, 64, 128, diagonal"),
        (dict(budgets={}, procedure="as-published", granularity=16), "leave --granularity and --scope at their"),
    ],
)
def test_bad_specs_name_the_fault(spec, message):
    with pytest.raises(ValueError, match=message):
        MaskSpec(**spec)


def test_a_budget_for_a_kind_that_was_not_recorded_is_an_error():
    stats = random_stats()
    del stats.mass[AttentionKind.CROSS], stats.occupancy[AttentionKind.CROSS]
    with pytest.raises(ValueError, match="budget is given for cross, but the statistics hold only encoder_self"):
        build(stats, kinds=[AttentionKind.CROSS])


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
            expected, threshold = masks_module._prune_lowest([values], [weight], target)
            with monkeypatch.context() as patch:
                patch.setattr(masks_module, "_SORTED_AT_ONCE", 8)
                found, found_threshold = masks_module._prune_lowest([values], [weight], target)
            np.testing.assert_array_equal(found[0], expected[0])
            assert found_threshold == threshold


def test_units_of_billions_of_pairs_do_not_overflow():
    """A 128-block of WMT holds over 2^31 pairs; int32 weights made them negative and the budget meaningless."""
    pruned, threshold = masks_module._prune_lowest([np.array([0.1, 0.2, 0.3])], [np.array([3e9, 3e9, 3e9])], 6e9)
    np.testing.assert_array_equal(pruned[0], [True, True, False])
    assert threshold == 0.2
