"""Budgets hold on the validation sentences, or masks say why they do not."""

import re

import numpy as np
import pytest
from plugin.builders import random_stats
from plugin.mask_building import ALL, ap_masks, build

from ap_fairseq.pruning.build import build_masks
from ap_fairseq.pruning.spec import MaskSpec
from ap_fairseq.pruning.summary import pairs_on
from ap_fairseq.sites import AttentionKind


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


@pytest.mark.parametrize(("scope", "shares"), [("kind", ["42%", "48%"]), ("global", ["50%"])])
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


def test_pairs_are_counted_over_layers_and_heads():
    """Of five sentences with two target and three source tokens, and one of one token each."""
    lengths = np.array([[2, 3, 5], [1, 1, 1]])
    sizes = {"encoder_self": [2, 3], "decoder_self": [1, 2], "cross": [4, 1]}
    assert pairs_on(sizes, lengths) == {"encoder_self": 46 * 6, "decoder_self": 16 * 2, "cross": 31 * 4}


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
