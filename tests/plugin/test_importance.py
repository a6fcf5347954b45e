"""Importance is what autograd and finite differences say, however sentences are batched, and masks follow it."""

import contextlib

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from plugin.builders import batch, dense_model, dictionary, pruned_model, random_masks, random_stats

from ap_fairseq.artifacts import AttentionStats, PruningMasks
from ap_fairseq.cli import masks as cli_masks
from ap_fairseq.files import ArtifactError, UserError
from ap_fairseq.pruning import criteria
from ap_fairseq.pruning.build import build_masks
from ap_fairseq.pruning.spec import MaskSpec
from ap_fairseq.recording.recorder import SMALLEST_LOSS_SCALE, AttentionRecorder
from ap_fairseq.sites import AttentionKind, attention_sites

VOCAB = dictionary()
PAD = VOCAB.pad()
SOURCE_LENGTHS, TARGET_LENGTHS = (5, 3, 1, 7), (4, 6, 2, 3)
ALL = tuple(AttentionKind)


def sentences(group):
    """Source, decoder input and labels of the sentences of *group*, padded on the right to the longest of them."""
    source, labels = batch(SOURCE_LENGTHS, VOCAB, False, 1), batch(TARGET_LENGTHS, VOCAB, False, 2)
    inputs = labels.clone()
    inputs[:, 0] = VOCAB.eos()
    source = source[group, : max(SOURCE_LENGTHS[k] for k in group)]
    longest = max(TARGET_LENGTHS[k] for k in group)
    return source, inputs[group, :longest], labels[group, :longest]


def loss_of(model, source, inputs, labels):
    logits, _ = model(src_tokens=source, src_lengths=source.ne(PAD).sum(1), prev_output_tokens=inputs)
    logits = logits.float() if logits.dtype is torch.half else logits
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=PAD, reduction="sum")


def record(model, groups, max_positions=(20, 20), importance=True) -> AttentionStats:
    with AttentionRecorder(model, max_positions, importance) as recorder:
        for group in groups:
            source, inputs, labels = sentences(group)
            recorder.begin(source, inputs, PAD)
            recorder.add_importance(loss_of(model, source, inputs, labels))
    return recorder.finish()


@contextlib.contextmanager
def scaled_cell(kind, module, head, row, column, factor):
    """Multiply one attention probability of the only sentence by *factor*, through what it adds to the output."""
    part = slice(head * module.head_dim, (head + 1) * module.head_dim)
    inputs = {}

    def change(projection, args):
        query, key = inputs["query"], inputs["key"]
        scores = module.k_proj(key)[:, 0, part] @ module.q_proj(query)[row, 0, part] / module.head_dim**0.5
        weights = (scores[: row + 1] if kind.causal else scores).softmax(0)
        output = args[0].clone()
        output[row, 0, part] += (factor - 1) * weights[column] * module.v_proj(key)[column, 0, part]
        return (output,)

    hooks = [
        module.register_forward_pre_hook(lambda module, args, kwargs: inputs.update(kwargs), with_kwargs=True),
        module.out_proj.register_forward_pre_hook(change),
    ]
    yield
    for hook in hooks:
        hook.remove()


def test_importance_is_the_squared_effect_of_scaling_a_cell(monkeypatch):
    """Against central differences in float64: the slope of the loss when one probability of one sentence shrinks."""
    monkeypatch.setattr("fairseq.utils.softmax", lambda x, dim, onnx_trace=False: x.softmax(dim))  # else float32
    model = dense_model(VOCAB).double()
    ours = record(model, [[3]])
    source, inputs, labels = sentences([3])
    step = 1e-5
    for (kind, layer), module in attention_sites(model):
        cells = np.argwhere(ours.support[kind])[::4]
        for head, (row, column) in ((head, cell) for head in range(2) for cell in cells):
            losses = []
            for factor in (1 + step, 1 - step):
                with scaled_cell(kind, module, head, row, column, factor), torch.no_grad():
                    losses.append(float(loss_of(model, source, inputs, labels)))
            slope = (losses[0] - losses[1]) / (2 * step)
            assert ours.importance[kind][layer, head, row, column] == pytest.approx(slope**2, rel=1e-4, abs=1e-14)


@pytest.mark.parametrize("groups", [[[0, 1, 2, 3]], [[3, 0], [2, 1]]])
def test_importance_does_not_depend_on_batches_and_padding(groups):
    model = dense_model(VOCAB).double()
    alone, together = record(model, [[0], [1], [2], [3]]), record(model, groups)
    for kind in ALL:
        assert (alone.importance[kind].sum((2, 3)) > 0).all()
        np.testing.assert_allclose(together.importance[kind], alone.importance[kind], rtol=1e-9, atol=1e-20)
        assert (together.importance[kind][..., together.support[kind] == 0] == 0).all()


def test_recording_importance_changes_neither_the_rest_nor_the_model():
    model = dense_model(VOCAB)
    with_it, without = record(model, [[0, 1, 2, 3]]), AttentionRecorder(model, (20, 20))
    source, inputs, _ = sentences([0, 1, 2, 3])
    with without, torch.no_grad():
        without.begin(source, inputs, PAD)
        model(src_tokens=source, src_lengths=source.ne(PAD).sum(1), prev_output_tokens=inputs)
    without = without.finish()
    assert not without.importance and all(parameter.grad is None for parameter in model.parameters())
    for kind in ALL:
        np.testing.assert_array_equal(with_it.mass[kind], without.mass[kind])


def test_a_frozen_model_has_the_same_importance():
    """ap-record freezes the parameters, so that the backward pass ends at the first attention."""
    free, frozen = dense_model(VOCAB).double(), dense_model(VOCAB).double().requires_grad_(False)
    expected, ours = record(free, [[0, 1]]), record(frozen, [[0, 1]])
    for kind in ALL:
        np.testing.assert_allclose(ours.importance[kind], expected.importance[kind], rtol=1e-6)


def test_a_pruned_model_has_the_importance_of_the_dense_one_and_none_where_it_is_pruned():
    """As gradual pruning records it. With everything kept, the two must agree; a pruned cell has nothing to lose."""
    dense = dense_model(VOCAB)
    kept, half = (pruned_model(random_masks(share, longest=(9, 11)), VOCAB) for share in (0.0, 0.5))
    expected = record(dense, [[0, 1, 2, 3]])
    for model in (kept, half):
        model.load_state_dict(
            {**dense.state_dict(), **{k: v for k, v in model.state_dict().items() if "_words" in k or "mask_" in k}}
        )
    ours, pruned = record(kept, [[0, 1, 2, 3]]), record(half, [[0, 1, 2, 3]])
    for (kind, layer), module in attention_sites(half):
        np.testing.assert_allclose(ours.importance[kind], expected.importance[kind], rtol=1e-3, atol=1e-9)
        keep = module.keep_mask(*pruned.support[kind].shape).numpy()
        assert (pruned.importance[kind][layer][~keep] == 0).all() and pruned.importance[kind][layer][keep].any()


def test_half_precision_is_near_and_an_overflow_halves_the_scale():
    model = dense_model(VOCAB)
    expected, half = record(model, [[0, 1, 2, 3]]), record(dense_model(VOCAB).half(), [[0, 1, 2, 3]])
    for kind in ALL:
        large = expected.importance[kind] > np.quantile(expected.importance[kind], 0.9)
        np.testing.assert_allclose(half.importance[kind][large], expected.importance[kind][large], rtol=0.1)

    model = dense_model(VOCAB).half()
    source, inputs, labels = sentences([0, 1, 2, 3])
    with AttentionRecorder(model, (20, 20), importance=True) as recorder:
        recorder.begin(source, inputs, PAD)
        recorder.add_importance(1e6 * loss_of(model, source, inputs, labels))
        scaled = recorder.finish()
        recorder.begin(source, inputs, PAD)
        with pytest.raises(UserError, match=f"inf are not finite, even of {SMALLEST_LOSS_SCALE} of it"):
            recorder.add_importance(torch.inf * loss_of(model, source, inputs, labels))
    kind = AttentionKind.CROSS
    large = expected.importance[kind] > np.quantile(expected.importance[kind], 0.9)
    np.testing.assert_allclose(scaled.importance[kind][large] / 1e12, expected.importance[kind][large], rtol=0.1)


def test_importance_survives_files_and_merging(tmp_path):
    model = dense_model(VOCAB)
    parts, whole = [record(model, [[0, 2]]), record(model, [[1], [3]])], record(model, [[0, 1, 2, 3]])
    for number, part in enumerate(parts):
        part.save(tmp_path / str(number))
    first, second = (AttentionStats.load(tmp_path / str(number)) for number in (0, 1))
    for kind in ALL:
        np.testing.assert_array_equal(first.importance[kind], parts[0].importance[kind])
        np.testing.assert_allclose(first.merge(second).importance[kind], whole.importance[kind], rtol=1e-3, atol=1e-9)
    second.importance = {}
    second.save(tmp_path / "without")
    assert not first.merge(AttentionStats.load(tmp_path / "without")).importance
    with pytest.raises(ArtifactError, match=r"cross: importance has shape \(1, 1\), support \("):
        AttentionStats(first.mass, first.support, importance={AttentionKind.CROSS: np.zeros((1, 1))})


def test_masks_by_importance_keep_the_most_of_it():
    """Of all masks with this budget; a budget over all kinds goes where little of the loss is at stake."""
    stats = random_stats(longest=(20, 20), sentences=200)
    stats.importance[AttentionKind.ENCODER_SELF] = stats.importance[AttentionKind.ENCODER_SELF] / 100
    budgets = dict.fromkeys(ALL, 0.6)

    def kept(criterion):
        masks = build_masks(stats, MaskSpec(budgets, criterion=criterion, scope="global")).masks
        return masks, sum((stats.importance[kind] * masks.keep[kind]).sum() for kind in ALL)

    masks, ours = kept("importance")
    assert ours > kept("mean")[1] and masks.metadata["total"]["effective"] == pytest.approx(0.6, abs=0.01)
    share = {kind: masks.metadata["sparsity"][kind.value]["effective"] for kind in ALL}
    assert share[AttentionKind.ENCODER_SELF] > 0.85 > 0.6 > share[AttentionKind.CROSS]


def test_the_command_ranks_by_importance_where_it_was_recorded(tmp_path, capsys):
    stats = random_stats(longest=(20, 20), sentences=200)
    stats.save(tmp_path / "with")
    stats.importance = {}
    stats.save(tmp_path / "without")
    flags = ["--total", "0.6", "--criterion", "importance", "--min-heads", "decoder_self=1,cross=2"]
    cli_masks.main([str(tmp_path / "with"), *flags, "-o", str(tmp_path / "masks")])
    masks = PruningMasks.load(tmp_path / "masks")
    assert masks.metadata["spec"]["criterion"] == "importance" and masks.metadata["spec"]["min_heads"] == {
        "decoder_self": 1,
        "cross": 2,
    }
    assert masks.metadata["total"]["effective"] == pytest.approx(0.6, abs=0.01)
    for names in (["without"], ["with", "without"]):
        with pytest.raises(SystemExit):
            cli_masks.main([*(str(tmp_path / name) for name in names), *flags, "-o", str(tmp_path / "none")])
        printed = capsys.readouterr().err
        assert (
            "needs the importance of encoder_self cells, which these statistics lack; record with ap-record" in printed
        )
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("criterion", ["importance", "window", "random"])
@pytest.mark.parametrize("granularity", [1, 16, "diagonal"])
def test_every_pair_stays_in_a_minimum_of_heads_within_the_budget(criterion, granularity):
    stats = random_stats(longest=(40, 40), sentences=300, layers=3, heads=4)
    spec = dict(criterion=criterion, scope="global", granularity=granularity)
    minimum = {AttentionKind.DECODER_SELF: 2, AttentionKind.CROSS: 3}
    built = build_masks(stats, MaskSpec(dict.fromkeys(ALL, 0.7), min_heads=minimum, **spec))
    masks, missed = built.masks, built.warnings
    free = build_masks(stats, MaskSpec(dict.fromkeys(ALL, 0.7), **spec)).masks
    for kind in ALL:
        heads = masks.keep[kind].sum((0, 1))
        exists = np.tri(*heads.shape, dtype=bool) if kind.causal else np.ones(heads.shape, dtype=bool)
        assert (heads[exists] >= minimum.get(kind, 0)).all()  # also where no recorded sentence reaches
        assert (masks.extrapolation[kind].sum((0, 1)) >= minimum.get(kind, 0)).all()
    cross = AttentionKind.CROSS
    assert (free.keep[cross].sum((0, 1)) < 3)[stats.support[cross] > 0].any()
    if granularity == 1:
        assert not missed and masks.metadata["total"]["effective"] == pytest.approx(0.7, abs=0.01)


def test_the_minimum_of_heads_are_those_of_the_highest_score():
    """At a sparsity that leaves nothing else, exactly the best head of each cell and what is always kept remain."""
    stats = random_stats(longest=(12, 12), layers=2, heads=3)
    cross = AttentionKind.CROSS
    built = build_masks(stats, MaskSpec({cross: 0.99}, criterion="importance", min_heads={cross: 1}))
    masks, missed = built.masks, built.warnings
    observed = stats.support[cross] > 0
    observed[:, 0] = False
    score = criteria.importance(stats, cross).reshape(6, 12, 12)
    best = np.arange(6)[:, None, None] == score.argmax(0)
    keep = masks.keep[cross].reshape(6, 12, 12)
    np.testing.assert_array_equal(keep[:, observed], best[:, observed])
    assert len(missed) == 1 and "--min-heads" in missed[0]
    with pytest.raises(UserError, match="--min-heads cross=7, but it has 2 layers of 3 heads"):
        build_masks(stats, MaskSpec({cross: 0.5}, min_heads={cross: 7}))
    for count in (-1, 0.5):
        with pytest.raises(UserError, match=f"--min-heads cross={count:g} is not a number of heads"):
            MaskSpec({}, min_heads={cross: count})
