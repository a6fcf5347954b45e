"""Heads keep a minimum, share the cells of a cap, or keep nothing; rows may be empty."""

import re

import numpy as np
import pytest
from plugin.builders import random_stats
from plugin.mask_building import ALL, build, effective, total_mass

from ap_fairseq.artifacts import AttentionStats, PruningMasks
from ap_fairseq.files import ArtifactError, UserError
from ap_fairseq.pruning import criteria
from ap_fairseq.pruning.build import build_masks
from ap_fairseq.pruning.spec import MaskSpec
from ap_fairseq.pruning.summary import summarize, vanished_heads
from ap_fairseq.sites import AttentionKind


def test_the_summary_counts_rows_that_only_the_guarantee_keeps():
    stats = random_stats(longest=(6, 6), layers=1, heads=1)
    masks = build(stats, 0.0).masks
    keep = masks.keep[AttentionKind.ENCODER_SELF]
    keep[..., 3, :] = False
    keep[..., 3, 3] = True
    rows = summarize(masks, stats)
    assert rows[0].guaranteed_rows == 1 and rows[0].rows == 6


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
    lost = "is kept by any head of cross"
    remedy = "--min-kept SHARE leaves each that share of its pairs, --min-heads N leaves each pair to N heads"
    most = dict(kinds=[kind], empty_rows=True)
    for options, share, but in (
        (dict(granularity="scaled-diagonal"), 0.9, " but the guaranteed cells (one in each row)"),
        (dict(), 1, ""),
    ):
        assert build(stats, share, **most, **options).warnings[-1] == f"nothing{but} {lost}; {remedy}"
        assert not any(lost in text for text in build(stats, share, **most, **options, min_kept=0.3).warnings)


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
