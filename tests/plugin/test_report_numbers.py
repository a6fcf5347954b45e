"""The numbers of the report are those of the recordings and masks, which belong together."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plugin.builders import random_stats

from ap_fairseq.artifacts import AttentionStats
from ap_fairseq.files import ArtifactError
from ap_fairseq.lengths import support_of
from ap_fairseq.pruning.build import build_masks
from ap_fairseq.pruning.spec import MaskSpec
from ap_fairseq.pruning.summary import summarize
from ap_fairseq.report import analysis
from ap_fairseq.sites import AttentionKind

ENCODER, DECODER, CROSS = AttentionKind


# -- numbers ----------------------------------------------------------------------------------------------------------


@settings(max_examples=25)
@given(st.dictionaries(st.tuples(st.integers(1, 6), st.integers(1, 6)), st.integers(1, 4), min_size=1, max_size=6))
def test_uniform_attention_is_recovered_from_the_support(lengths):
    """Against a sum over sentences."""
    for kind in AttentionKind:
        support = support_of(kind, np.array([[*pair, count] for pair, count in lengths.items()]))
        expected, on_end = np.zeros(support.shape), 0.0
        for (target, source), count in lengths.items():
            queries, keys = {ENCODER: (source, source), DECODER: (target, target), CROSS: (target, source)}[kind]
            cells = np.tri(queries) if kind.causal else np.ones((queries, keys))
            expected[:queries, :keys] += count * cells / cells.sum(1, keepdims=True)
            on_end += count * queries / keys
        np.testing.assert_allclose(analysis.uniform_mass(kind, support), expected, atol=1e-12)
        if kind is not DECODER:
            assert analysis._uniform_end_share(kind, support) == pytest.approx(on_end / expected.sum())


def test_curves_agree_with_the_masks_that_are_really_built():
    stats = random_stats(seed=3, longest=(15, 18), sentences=300)
    for kind in AttentionKind:
        kept = analysis.kept_mass(stats, kind)
        for scope, curves in {"kind": [kept.kind], "layer": kept.layers, "head": sum(kept.heads, [])}.items():
            for sparsity in (0.0, 0.3, 0.6):
                masks = build_masks(stats, MaskSpec({kind: sparsity}, scope=scope)).masks
                kept_cells = masks.keep[kind]
                heads = [np.sum(stats.mass[kind][index], where=kept_cells[index]) for index in np.ndindex(2, 2)]
                groups = np.reshape(heads, (len(curves), -1)).sum(1)
                totals = stats.mass[kind].sum((2, 3)).reshape(len(curves), -1).sum(1)
                removed = analysis.head_sparsity(masks, stats, kind).reshape(len(curves), -1).mean(1)
                for curve, group, total, at in zip(curves, groups, totals, removed, strict=True):
                    assert curve.at(at) == pytest.approx(group / total, abs=2e-3)
        assert kept.kind.at(1.0) is None and kept.kind.kept[0] == 1


def test_large_heads_are_thinned_out_without_changing_the_curve(monkeypatch):
    stats = random_stats(seed=4, longest=(30, 30), sentences=50, layers=1, heads=2)
    whole = analysis.kept_mass(stats, CROSS)
    monkeypatch.setattr(analysis, "_KNOTS", 200)
    thinned = analysis.kept_mass(stats, CROSS)
    for sparsity in (0.1, 0.5, 0.9):
        assert thinned.kind.at(sparsity) == pytest.approx(whole.kind.at(sparsity), abs=2e-3)
        assert thinned.heads[0][1].at(sparsity) == pytest.approx(whole.heads[0][1].at(sparsity), abs=2e-3)


def test_cells_of_one_score_go_together_and_few_knots_stand_for_many(monkeypatch):
    support, mass = np.full((10, 10), 2), np.repeat(np.arange(50.0), 2).reshape(10, 10)
    head = analysis._sort_head(mass, support, support > 0)
    np.testing.assert_array_equal(head.score, np.arange(50) / 2)
    np.testing.assert_array_equal(head.pairs, np.arange(51) * 4)
    monkeypatch.setattr(analysis, "_KNOTS", 5)
    thinned = analysis._sort_head(mass, support, support > 0)
    np.testing.assert_array_equal(thinned.pairs, np.arange(6) * 40)
    np.testing.assert_array_equal(thinned.mass, head.mass[::10])


@pytest.mark.parametrize("nominal", [0.0, 0.5, 0.8, 0.97])
def test_nominal_sparsity_agrees_with_the_percentile_criterion(nominal):
    stats = random_stats(seed=5)
    for kind in AttentionKind:
        masks = build_masks(stats, MaskSpec({kind: nominal}, criterion="percentile", extrapolate="keep")).masks
        total = next(row for row in summarize(masks, stats) if row.kind == kind.value and row.layer is None)
        found = analysis.effective_at_nominal(stats, kind, np.array([nominal]))
        assert found[0] == pytest.approx(total.effective, abs=1e-12)


def shaped_stats(kind, shape, length=9):
    """Statistics of ten sentences of one length, one layer, in which each head puts 90% on one cell of a row."""
    support = {kind: support_of(kind, np.array([[length, length, 10]]))}
    row, column = np.ogrid[:length, :length]
    mass = []
    for wanted in shape:
        target = np.broadcast_to(column == wanted(row, length), (length, length)) & (support[kind] > 0)
        even = np.where(support[kind] > 0, 1.0, 0.0)
        head = even / even.sum(1, keepdims=True) * 0.1 + 0.9 * target
        mass.append(head / head.sum(1, keepdims=True) * 10)
    mass = {kind: np.array(mass)[None]}
    ends = {} if kind.causal else {kind: mass[kind][..., -1].sum(-1)}
    return AttentionStats(mass, support, {}, ends)


def test_heads_are_named_after_their_pattern():
    at = {
        "previous": lambda row, n: row - 1,
        "next": lambda row, n: row + 1,
        "diagonal": lambda row, n: row,
        "first": lambda row, n: 0,
        "end": lambda row, n: n - 1,
        "broad": lambda row, n: -5,
    }
    measured = analysis.concentration(shaped_stats(ENCODER, at.values()), ENCODER)
    assert measured.patterns[0].tolist() == list(at)
    assert measured.heads["relative_entropy"][0, -1] == pytest.approx(1)
    assert measured.heads["near_diagonal"][0, 2] > 0.9 > measured.heads["near_diagonal"][0, 3]
    causal = analysis.concentration(shaped_stats(DECODER, [at["previous"], at["diagonal"]]), DECODER)
    assert causal.patterns[0].tolist() == ["previous", "diagonal"]
    assert "next" not in causal.heads and "end" not in causal.heads


def test_heads_that_attend_to_nothing_are_no_part_of_averages():
    """Of a model that is pruned already; they counted as the most concentrated heads."""
    stats = shaped_stats(ENCODER, [lambda row, n: row, lambda row, n: row, lambda row, n: 0])
    stats.mass[ENCODER][0, 1:] = stats.end_mass[ENCODER][0, 1:] = 0
    measured = analysis.concentration(stats, ENCODER)
    for name, values in measured.heads.items():
        assert measured.average(name) == values[0, 0]
    assert measured.average("diagonal") > 0.9


def test_entropy_in_bits():
    assert analysis.row_entropy(np.eye(4)) == 0
    assert analysis.row_entropy(np.ones((3, 8))) == pytest.approx(3)
    assert analysis.row_entropy(np.array([[1.0, 1.0], [6.0, 0.0]])) == pytest.approx(0.25)  # rows weigh 2 and 6
    assert analysis.row_entropy(np.zeros((2, 2))) == 0


def test_bins_keep_mass_and_pairs():
    stats = random_stats(seed=6, longest=(10, 7), layers=1)
    for kind in AttentionKind:
        m = analysis.maps(stats, kind, 3)
        pairs = analysis._binned(stats.support[kind], 3)
        np.testing.assert_allclose((m.mean * pairs).sum(), stats.mass[kind].sum())
        assert m.mean.shape[2:] == tuple(-(-n // 3) for n in stats.support[kind].shape)
    assert analysis.bin_factor([(2, 2, 100, 100)], 40_000) == 1
    assert analysis.bin_factor([(2, 2, 100, 100)], 39_999) == 2


# -- what does not belong together ------------------------------------------------------------------------------------


def test_empty_statistics_are_refused():
    with pytest.raises(ArtifactError, match="hold no attention kind; record it again"):
        AttentionStats({}, {}).require_pairs()
    empty = AttentionStats({CROSS: np.zeros((1, 1, 2, 2))}, {CROSS: np.zeros((2, 2), dtype=np.int64)})
    with pytest.raises(ArtifactError, match=r"of cross are empty: mass of shape \(1, 1, 2, 2\), 0 recorded pairs"):
        empty.require_pairs()


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(layers=3), "masks m are for .*2 layers x 2 heads.*, the statistics for .*3 layers x 2 heads"),
        (dict(longest=(9, 12)), "masks m cover 11 x 11 positions of encoder_self, the statistics 12 x 12"),
        (dict(checkpoint="b"), "masks m come from checkpoint a, the statistics from b"),
        (dict(dictionaries={"source": "y"}), "masks m come from dictionaries None, the statistics from"),
        (dict(data=[{"subset": "valid"}]), r"masks m come from data None, .*give the statistics that the masks"),
    ],
)
def test_masks_of_other_statistics_are_refused(change, message):
    stats = random_stats()
    stats.metadata = {"checkpoint": "a"}
    masks = build_masks(stats, MaskSpec({})).masks
    analysis.check_masks(masks, stats, "m")
    shape = {key: change[key] for key in ("layers", "longest") if key in change}
    other = random_stats(**shape)
    other.metadata = {"checkpoint": "a", **{key: value for key, value in change.items() if key not in shape}}
    with pytest.raises(ArtifactError, match=message):
        analysis.check_masks(masks, other, "m")
