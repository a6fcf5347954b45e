"""Heads are kept or pruned whole, at any length."""

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plugin.builders import random_stats
from plugin.commands import assert_kernels_translate_as_sdpa, run, train
from plugin.mask_building import ALL, SELF, ap_masks, build, effective

from ap_fairseq.artifacts import PruningMasks
from ap_fairseq.files import UserError
from ap_fairseq.model.checkpoints import load_checkpoint
from ap_fairseq.pruning import criteria
from ap_fairseq.pruning.build import build_masks
from ap_fairseq.pruning.spec import MaskSpec
from ap_fairseq.sites import AttentionKind

CROSS = AttentionKind.CROSS
SITES = [("encoder", "self_attn"), ("decoder", "self_attn"), ("decoder", "encoder_attn")]


def exists(kind, shape):
    return np.tri(*shape, dtype=bool) if kind.causal else np.ones(shape, dtype=bool)


def kept_heads(masks, kind) -> np.ndarray:
    """Which heads keep all cells that can exist: bool (layers, heads)."""
    keep = masks.keep[kind]
    return keep[..., exists(kind, keep.shape[2:])].all(-1)


@settings(max_examples=60)
@given(
    share=st.floats(0, 0.95),
    scope=st.sampled_from(["kind", "layer", "global"]),
    criterion=st.sampled_from(["mean", "importance", "normalised", "random"]),
    extrapolate=st.sampled_from(["diagonal", "keep"]),
    empty_rows=st.booleans(),
    seed=st.integers(0, 5),
)
def test_a_head_keeps_all_or_only_what_is_guaranteed_at_any_length(
    share, scope, criterion, extrapolate, empty_rows, seed
):
    """Also far from the diagonal beyond the recorded range, where other heads keep all cells."""
    criterion = "importance" if empty_rows and criterion == "mean" else criterion
    stats = random_stats(seed, heads=4)
    options = dict(extrapolate=extrapolate, empty_rows=empty_rows, seed=seed, granularity="head")
    masks = build(stats, share, criterion=criterion, scope=scope, **options).masks
    for kind in ALL:
        recorded = masks.keep[kind].shape[2:]
        whole = kept_heads(masks, kind)
        for shape in (recorded, (5, 40), (40, 5), (40, 50)):
            guaranteed = criteria.guaranteed(shape, kind) & (not empty_rows)
            expected = whole[..., None, None] | guaranteed
            np.testing.assert_array_equal(masks.grown(kind, shape), expected & exists(kind, shape))
        if scope == "kind":  # the nearest number of heads
            support = stats.support[kind]
            free = np.where(criteria.guaranteed(support.shape, kind) & (not empty_rows), 0, support).sum()
            most = free / (support.sum() * whole.size)  # what one head is of all pairs
            assert abs(effective(masks, stats, kind) - min(share, most * whole.size)) <= most / 2 + 1e-9


def test_heads_of_the_least_mean_importance_are_pruned():
    stats = random_stats(2, longest=(20, 20), sentences=200, heads=4)  # of which smoothing would prune others
    for extra in (dict(smooth=4), dict()):
        masks = build(stats, 0.5, [CROSS], criterion="importance", granularity="head", empty_rows=True, **extra).masks
        mean = stats.importance[CROSS].sum((2, 3))  # of as many pairs
        np.testing.assert_array_equal(kept_heads(masks, CROSS), mean > np.median(mean))
        assert effective(masks, stats, CROSS) == 0.5
    pruned = [list(head) for head in np.argwhere(mean <= np.median(mean)).tolist()]
    assert masks.metadata["vanished_heads"] == {"cross": pruned}


def test_pairs_of_lengths_that_were_not_recorded_follow_the_head():
    """Offsets that no sentence has are kept by other masks."""
    stats = random_stats(longest=(12, 12), layers=1, heads=2)
    stats.support[CROSS][8:, 3:], stats.mass[CROSS][..., 8:, 3:] = 0, 0
    stats.support[CROSS][:, 9:], stats.mass[CROSS][..., 9:] = 0, 0
    assert criteria.unseen_offsets(stats.support[CROSS]).any()
    stats.mass[CROSS][0, 1] *= 0.5
    for extrapolate in ("diagonal", "keep"):
        masks = build(stats, 0.5, [CROSS], granularity="head", extrapolate=extrapolate).masks
        assert masks.keep[CROSS][0, 0].all() and not masks.keep[CROSS][0, 1, :, 1:].any()


def test_numbers_of_heads_bound_those_that_stay():
    stats = random_stats(longest=(12, 12), layers=3, heads=4)
    stats.mass[CROSS][0] *= 1e-3
    options = dict(kinds=[CROSS], granularity="head")
    assert kept_heads(build(stats, 0.3, **options).masks, CROSS).sum(1).tolist() == [0, 4, 4]
    spread = build(stats, 0.46, **options, max_heads={CROSS: 2}).masks
    assert kept_heads(spread, CROSS).sum(1).tolist() == [2, 2, 2]
    built = build(stats, 0.95, **options)
    assert not kept_heads(built.masks, CROSS).any() and "--min-heads N leaves each pair to N heads" in str(
        built.warnings
    )
    minimum = build(stats, 0.95, **options, min_heads={CROSS: 3}).masks
    best = np.sort(np.where(criteria.guaranteed((12, 12), CROSS), 0, stats.mass[CROSS]).sum((2, 3)).ravel())[-3:]
    found = np.where(criteria.guaranteed((12, 12), CROSS), 0, stats.mass[CROSS]).sum((2, 3))[kept_heads(minimum, CROSS)]
    np.testing.assert_allclose(np.sort(found), best)


def test_a_missed_budget_names_the_guaranteed_cells_that_pruned_heads_keep():
    """It asked for a finer granularity, also where as many heads are pruned as was asked for."""
    stats = random_stats(longest=(12, 12), layers=1, heads=4)
    options = dict(kinds=[CROSS], criterion="importance", granularity="head")
    missed, empty = (build(stats, 0.5, **options, empty_rows=rows) for rows in (False, True))
    assert kept_heads(missed.masks, CROSS).sum() == kept_heads(empty.masks, CROSS).sum() == 2
    assert "a budget is met to the nearest head, and pruned heads keep the guaranteed cells" in missed.warnings[0]
    assert not [warning for warning in empty.warnings if "instead of" in warning]
    nearest = build(stats, 0.6, **options, empty_rows=True).warnings[0]
    assert nearest.endswith("instead of 60.0%: a budget is met to the nearest head")
    bounded = build(stats, 0.9, **options, empty_rows=True, min_heads={CROSS: 3}).warnings[0]
    assert "the nearest head; cells kept by --min-kept, --min-heads" in bounded


def test_a_missed_budget_speaks_of_the_units_of_its_kind_alone():
    units = {AttentionKind.ENCODER_SELF: "diagonal", CROSS: "head"}
    spec = MaskSpec(dict.fromkeys(units, 0.6), granularity=units, criterion="importance", empty_rows=True)
    warnings = build_masks(random_stats(longest=(12, 12), layers=1, heads=4), spec).warnings
    assert [w for w in warnings if w.startswith("cross: ") and w.endswith("to the nearest head")], warnings


def test_heads_of_one_kind_compete_with_cells_of_others(tmp_path, capsys):
    stats = random_stats(longest=(20, 20), sentences=200, heads=4)
    stats.save(tmp_path / "stats.st")
    flags = ["--total", 0.5, "--criterion", "importance", "--smooth", 4, "--calibrate", "--empty-rows"]
    ap_masks(
        tmp_path / "stats.st", *flags, "--granularity", "encoder_self=diagonal,cross=head", "-o", tmp_path / "m.st"
    )
    masks = PruningMasks.load(tmp_path / "m.st")
    assert masks.metadata["validation"]["total"] == pytest.approx(0.5, abs=0.03)  # half a head
    assert masks.metadata["spec"]["granularity"] == {"encoder_self": "diagonal", "cross": "head"}
    nothing = ~masks.keep[CROSS].any((2, 3))
    assert (nothing | kept_heads(masks, CROSS)).all()
    control = ["--like", tmp_path / "m.st", "--criterion", "random", "--empty-rows", "--granularity", "head"]
    ap_masks(tmp_path / "stats.st", *control, "-o", tmp_path / "r.st")
    drawn = PruningMasks.load(tmp_path / "r.st")
    assert kept_heads(drawn, CROSS).sum() == kept_heads(masks, CROSS).sum()
    assert "kept mass" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (
            dict(criterion="window"),
            "--criterion window scores cells, --granularity head decides for whole heads; choose",
        ),
        (dict(empty_rows=True), "--criterion mean scores all heads of a kind alike .* choose importance, normalised"),
        (dict(scope="head"), r"--granularity head keeps or prunes whole heads; leave out --scope head \(--min-heads"),
        (
            dict(min_kept=0.1, keep_first=1, keep_diagonal=0),
            "leave out --min-kept 0.1, --keep-first 1, --keep-diagonal 0",
        ),
        (dict(criterion="percentile"), "leave out --granularity$"),
    ],
)
def test_options_that_mean_nothing_for_whole_heads_are_refused(spec, message):
    MaskSpec(dict.fromkeys(SELF, 0.5), granularity={CROSS: "head"}, **{**spec, "criterion": "mean"})  # no budget
    with pytest.raises(UserError, match=message):
        MaskSpec({CROSS: 0.5}, granularity="head", **spec)


def test_translation_without_some_heads(data_bin, dense, tmp_path):
    stats, masks, pruned = (tmp_path / name for name in ("s.st", "m.st", "pruned.pt"))
    run("ap-record", data_bin, "--path", dense, "--importance", "-o", stats, "--cpu", "--max-tokens", 2000)
    flags = ["--cross", 0.5, "--criterion", "importance", "--granularity", "cross=head", "--empty-rows"]
    log = run("ap-masks", stats, *flags, "-o", masks)
    assert re.search(r"nothing is kept by 2 of 4 heads of cross \(layer.head\): \d\.\d, \d\.\d$", log, re.M)
    assert re.search(r"^cross +50\.0% ", log, re.M)
    run("ap-apply", dense, "--attention-masks", masks, "--data", data_bin, "-o", pruned)
    assert_kernels_translate_as_sdpa(data_bin, pruned)


def test_heads_are_pruned_while_training(data_bin, tmp_path):
    flags = ["--task", "pruned_translation", "--attention-masks", "none", "--attention-sparsity", 0.7]
    flags += ["--prune-start", 4, "--prune-end", 12, "--prune-every", 4, "--prune-shape", "linear"]
    flags += ["--prune-flags", "--criterion importance --granularity head --empty-rows"]
    log = train(data_bin, tmp_path, *flags, arch="pruned_transformer", updates=14)
    shares = [float(share) for share in re.findall(r"update \d+: ([\d.]+)% of the pairs pruned", log)]
    assert len(shares) == 3 and shares == sorted(shares) and shares[2] == pytest.approx(70, abs=5)
    state = load_checkpoint(tmp_path / "checkpoint_last.pt")["model"]
    words = [state[f"{part}.layers.{layer}.{kind}.keep_words"] for layer in range(2) for part, kind in SITES]
    nothing = [not head.any() for site in words for head in site]
    assert 7 <= sum(nothing) <= 10  # of 12, which differ in their pairs
