"""Recorded statistics are what one would compute by hand, sentence by sentence."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plugin.builders import batch, dense_model, dictionary

from ap_fairseq.artifacts import ArtifactError, AttentionStats
from ap_fairseq.recording import AttentionRecorder, occupancy_of
from ap_fairseq.sites import AttentionKind, attention_sites

WORDS = dictionary()
PAD = WORDS.pad()
SOURCE_LENGTHS, TARGET_LENGTHS = (5, 3, 1, 7), (4, 6, 2, 3)


def decoder_input(lengths, seed):
    rows = batch(lengths, WORDS, left=False, seed=seed)
    rows[:, 0] = WORDS.eos()  # row 0 is the leading EOS
    return rows


def record(model, groups, max_positions=(20, 20)) -> AttentionStats:
    """Record the sentences of each group as one batch."""
    source, target = batch(SOURCE_LENGTHS, WORDS, False, 1), decoder_input(TARGET_LENGTHS, 2)
    with AttentionRecorder(model, max_positions) as recorder, torch.no_grad():
        for group in groups:
            src = source[group][:, : max(SOURCE_LENGTHS[k] for k in group)]
            tgt = target[group][:, : max(TARGET_LENGTHS[k] for k in group)]
            recorder.begin(src, tgt, PAD)
            model(src_tokens=src, src_lengths=src.ne(PAD).sum(1), prev_output_tokens=tgt)
    return recorder.finish()


def by_hand(model) -> AttentionStats:
    """Compute softmax(q k / sqrt(D)) from the inputs of every module, one unpadded sentence at a time."""
    inputs = {}
    hooks = [
        module.register_forward_pre_hook(
            lambda module, args, kwargs, site=site: inputs.__setitem__(site, (module, kwargs["query"], kwargs["key"])),
            with_kwargs=True,
        )
        for site, module in attention_sites(model)
    ]
    longest = {"q": max(TARGET_LENGTHS), "k": max(SOURCE_LENGTHS)}
    shapes = {
        AttentionKind.ENCODER_SELF: (longest["k"], longest["k"]),
        AttentionKind.DECODER_SELF: (longest["q"], longest["q"]),
        AttentionKind.CROSS: (longest["q"], longest["k"]),
    }
    mass = {kind: np.zeros((2, 2, *shape)) for kind, shape in shapes.items()}
    occupancy = {kind: np.zeros(shape, dtype=np.int64) for kind, shape in shapes.items()}
    end_mass = {kind: np.zeros((2, 2)) for kind in (AttentionKind.ENCODER_SELF, AttentionKind.CROSS)}
    source, target = batch(SOURCE_LENGTHS, WORDS, False, 1), decoder_input(TARGET_LENGTHS, 2)
    for k in range(len(source)):
        src, tgt = source[k : k + 1, : SOURCE_LENGTHS[k]], target[k : k + 1, : TARGET_LENGTHS[k]]
        with torch.no_grad():
            model(src_tokens=src, src_lengths=torch.tensor([SOURCE_LENGTHS[k]]), prev_output_tokens=tgt)
        for (kind, layer), (module, query, key) in inputs.items():
            for head in range(module.num_heads):
                part = slice(head * module.head_dim, (head + 1) * module.head_dim)
                q = module.q_proj(query)[:, 0, part].detach().double()
                scores = q @ module.k_proj(key)[:, 0, part].detach().double().T / module.head_dim**0.5
                if kind.causal:
                    scores = scores.masked_fill(torch.ones_like(scores).triu(1).bool(), float("-inf"))
                weights = scores.softmax(-1).numpy()
                mass[kind][layer, head, : scores.size(0), : scores.size(1)] += weights
                if kind in end_mass:
                    end_mass[kind][layer, head] += weights[:, -1].sum()
            cells = np.ones((query.size(0), key.size(0)), dtype=np.int64)
            if layer == 0:
                occupancy[kind][: query.size(0), : key.size(0)] += np.tril(cells) if kind.causal else cells
    for hook in hooks:
        hook.remove()
    return AttentionStats(mass, occupancy, {}, end_mass)


def assert_same(ours: AttentionStats, expected: AttentionStats, tolerance=2e-6):
    for kind in AttentionKind:
        np.testing.assert_array_equal(ours.occupancy[kind], expected.occupancy[kind])
        np.testing.assert_allclose(ours.mass[kind], expected.mass[kind], atol=tolerance)
    assert ours.end_mass.keys() == expected.end_mass.keys() == {AttentionKind.ENCODER_SELF, AttentionKind.CROSS}
    for kind, on_end in expected.end_mass.items():
        np.testing.assert_allclose(ours.end_mass[kind], on_end, atol=tolerance)


@pytest.mark.parametrize("groups", [[[0, 1, 2, 3]], [[0], [1, 2], [3]], [[3, 0], [2, 1]]])
def test_statistics_equal_a_hand_computed_sum_however_sentences_are_batched(groups):
    """Padded queries carry full probability mass in stock fairseq; they, and padded keys, must not count."""
    model = dense_model(WORDS)
    expected = by_hand(model)
    assert_same(record(model, groups), expected)
    assert all(expected.mass[kind].sum() > 0 for kind in AttentionKind)


def test_every_observed_row_sums_to_its_number_of_sentences():
    stats = record(dense_model(WORDS), [[0, 1, 2, 3]])
    for kind in AttentionKind:
        sentences = stats.occupancy[kind].max(-1)
        np.testing.assert_allclose(
            stats.mass[kind].sum(-1), np.broadcast_to(sentences, stats.mass[kind].shape[:3]), rtol=1e-6
        )


def test_a_merge_of_two_recordings_equals_one_recording():
    model = dense_model(WORDS)
    merged = record(model, [[0, 2]]).merge(record(model, [[1], [3]]))
    assert_same(merged, record(model, [[0, 1, 2, 3]]))


def test_recordings_of_different_checkpoints_do_not_merge():
    one, other = record(dense_model(WORDS), [[0]]), record(dense_model(WORDS), [[1]])
    one.metadata["checkpoint"], other.metadata["checkpoint"] = "aaa", "bbb"
    with pytest.raises(ArtifactError, match="different checkpoint: aaa and bbb"):
        one.merge(other)


def test_dropout_is_not_recorded():
    """The authors' code recorded after attention dropout and with dropout on; here it must change nothing."""
    model = dense_model(WORDS)
    expected = record(model, [[0, 1, 2, 3]])
    for _, module in attention_sites(model):
        module.dropout_module.p = 0.5
        module.dropout_module.train()
    recorded = record(model, [[0, 1, 2, 3]])
    np.testing.assert_array_equal(
        recorded.mass[AttentionKind.ENCODER_SELF][0], expected.mass[AttentionKind.ENCODER_SELF][0]
    )


def test_cells_beyond_the_limit_are_counted():
    stats = record(dense_model(WORDS), [[0, 1, 2, 3]], max_positions=(4, 3))
    full = record(dense_model(WORDS), [[0, 1, 2, 3]])
    for kind in AttentionKind:
        n_queries, n_keys = stats.occupancy[kind].shape
        np.testing.assert_array_equal(stats.mass[kind], full.mass[kind][:, :, :n_queries, :n_keys])
        beyond = full.occupancy[kind].sum() - stats.occupancy[kind].sum()
        assert stats.metadata["pairs_beyond_range"][kind.value] == beyond > 0


def test_mass_on_the_last_source_token_counts_within_the_limit():
    """Of the last tokens, only those below the limit of 3 source positions: sentences 1 and 2."""
    model = dense_model(WORDS)
    stats, short = record(model, [[0, 1, 2, 3]], max_positions=(3, 6)), record(model, [[1, 2]])
    for kind, on_end in stats.end_mass.items():
        np.testing.assert_allclose(on_end, short.end_mass[kind], atol=2e-6)
        assert (on_end <= stats.mass[kind].sum((2, 3))).all()


def test_left_padded_batches_are_refused():
    recorder = AttentionRecorder(dense_model(WORDS), (20, 20))
    with pytest.raises(ValueError, match="source batch is padded on the left"):
        recorder.begin(batch([2, 4], WORDS, left=True), decoder_input([2, 4], 0), PAD)


def test_an_empty_recording_is_an_error():
    with pytest.raises(ValueError, match="no sentence was recorded"):
        AttentionRecorder(dense_model(WORDS), (20, 20)).finish()


@settings(deadline=None, derandomize=True, max_examples=50)
@given(st.lists(st.tuples(st.integers(1, 6), st.integers(1, 7)), min_size=1, max_size=8))
def test_occupancy_counts_the_sentences_of_each_cell(pairs):
    lengths = {pair: pairs.count(pair) for pair in pairs}
    longest_target, longest_source = (max(pair[side] for pair in pairs) for side in (0, 1))
    exists = {
        AttentionKind.ENCODER_SELF: (longest_source, longest_source, lambda i, j, t, s: i < s and j < s),
        AttentionKind.DECODER_SELF: (longest_target, longest_target, lambda i, j, t, s: i < t and j <= i),
        AttentionKind.CROSS: (longest_target, longest_source, lambda i, j, t, s: i < t and j < s),
    }
    for kind, (n_queries, n_keys, attendable) in exists.items():
        expected = [[sum(attendable(i, j, *pair) for pair in pairs) for j in range(n_keys)] for i in range(n_queries)]
        np.testing.assert_array_equal(occupancy_of(kind, lengths), expected)
