"""Budgets are met, controls are equal, and masks keep what they must."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plugin.builders import random_stats
from plugin.mask_building import ALL, SELF, build, effective, peaked_stats, total_mass

from ap_fairseq.artifacts import AttentionStats
from ap_fairseq.files import ArtifactError, UserError
from ap_fairseq.lengths import support_of
from ap_fairseq.pruning import criteria, select
from ap_fairseq.pruning.criteria import CRITERIA
from ap_fairseq.pruning.summary import summarize, total_of
from ap_fairseq.sites import AttentionKind


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
    mixed = dict.fromkeys(SELF, "diagonal") | {AttentionKind.CROSS: 128}
    missed = build(random_stats(longest=(20, 20)), 0.5, granularity=mixed).warnings
    assert any(message.startswith("cross") and "few 128x128 blocks, and" in message for message in missed)
    missed = build(random_stats(longest=(20, 20)), 0.9, keep_first=10).warnings
    assert "; cells kept by --min-kept, --min-heads, --keep-first" in missed[0]


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


@pytest.mark.parametrize("share", [0.6, 0.9])
@pytest.mark.parametrize("empty_rows", [False, True])
@pytest.mark.parametrize("shape", [(3, 4), (9, 11), (12, 20), (30, 5)])
def test_masks_grow_by_their_pattern(shape, empty_rows, share):
    """Cells beyond the recorded range follow their diagonal's pattern; offsets it does not have are kept.

    And what keeps rows from being empty: validation sentences beyond the range were said to lose it. But heads that
    kept nothing came back far from the diagonal.
    """
    masks = build(random_stats(longest=(9, 11)), share, empty_rows=empty_rows).masks
    for kind in ALL:
        grown, keep, pattern = masks.grown(kind, shape), masks.keep[kind], masks.extrapolation[kind]
        others = keep & ~criteria.guaranteed(keep.shape[2:], kind)
        keeps_some = others.any((-2, -1)) | pattern.any(-1)
        vanish = share == 0.9 and not (empty_rows or kind.causal)
        assert not keeps_some.any() if vanish else keeps_some.all()
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
                np.testing.assert_array_equal(grown[..., i, j], keeps_some)


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
