"""Cross-attention relative to a scaled diagonal: counted, recorded, pruned and computed sentence by sentence."""

import dataclasses
import json
import re
from fractions import Fraction

import numpy as np
import pytest
import torch
from fairseq.sequence_generator import SequenceGenerator
from plugin.builders import batch, dense_model, dictionary, pruned_model, random_masks, random_stats
from plugin.commands import assert_kernels_translate_as_sdpa, generate, run, train
from plugin.hypotheses import assert_same, plain

from ap_fairseq import relative
from ap_fairseq.artifacts import AttentionStats, PruningMasks
from ap_fairseq.files import ArtifactError, UserError
from ap_fairseq.model.attention import OFFSET_BUFFERS
from ap_fairseq.model.checkpoints import load_checkpoint
from ap_fairseq.pruning.build import build_masks
from ap_fairseq.pruning.flags import parse_mask_flags, spec_from
from ap_fairseq.pruning.spec import MaskSpec
from ap_fairseq.pruning.summary import summarize
from ap_fairseq.recording.recorder import AttentionRecorder
from ap_fairseq.relative import RelativeMask
from ap_fairseq.report import analysis
from ap_fairseq.report.content import Report
from ap_fairseq.search.generator import PrunedSequenceGenerator
from ap_fairseq.sites import AttentionKind, attention_sites

VOCAB = dictionary()
PAD, EOS = VOCAB.pad(), VOCAB.eos()
CROSS = AttentionKind.CROSS
SOURCE_LENGTHS, TARGET_LENGTHS = [5, 3, 1, 9], [4, 6, 2, 8]
SCALED = {CROSS: "scaled-diagonal"}
SLOPE = relative.slope_of(9, 10)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # of the kernels
WIDE = dict(encoder_embed_dim=32, decoder_embed_dim=32, decoder_input_dim=32, decoder_output_dim=32)  # for the kernels


def relative_masks(share=0.6, seed=1, **spec) -> PruningMasks:
    """Masks whose heads have different anchors."""
    spec = {"max_heads": {CROSS: 1}, **spec}
    stats = random_stats(longest=(9, 11), seed=seed)
    return build_masks(stats, MaskSpec({CROSS: share}, granularity=SCALED, **spec)).masks


def cells_of(masks: PruningMasks, target: int, source: int) -> np.ndarray:
    """The kept cells of a sentence by the definition: bool (layers, heads, target, source)."""
    slope = Fraction(masks.relative.slope, 1 << relative.SLOPE_BITS)
    n_offsets = masks.relative.keep.shape[2]
    kept = np.ones((*masks.relative.keep.shape[:2], target, source), dtype=bool)
    for i in range(target):
        centre = min(int(slope * i + Fraction(1, 2)), source - 1)
        for j in range(source):
            place = j - centre + n_offsets // 2
            if 0 <= place < n_offsets:
                kept[:, :, i, j] = masks.relative.keep[:, :, place]
        for layer, head in np.ndindex(masks.relative.anchor.shape):
            kept[layer, head, i, min(max(centre + masks.relative.anchor[layer, head], 0), source - 1)] = True
    return kept


def sentences(lengths=None, left=False):
    lengths = lengths or (SOURCE_LENGTHS, TARGET_LENGTHS)
    source, target = batch(lengths[0], VOCAB, left, 1), batch(lengths[1], VOCAB, False, 2)
    inputs = target.clone()
    inputs[:, 0] = EOS
    return source, inputs, target


def translate(model, source, inputs):
    with torch.no_grad():
        return model(source, source.ne(PAD).sum(1), inputs)[0]


# -- counting ---------------------------------------------------------------------------------------------------------


def test_pairs_of_offsets_and_rows_are_counted_as_a_loop_over_sentences_counts_them():
    masks = relative_masks()
    assert masks.relative.anchor.any()
    masks.relative.slope = SLOPE
    lengths = np.array([[4, 5, 2], [9, 3, 1], [1, 1, 3], [7, 11, 1]])
    rows = relative.rows_by_centre(lengths, SLOPE)
    support = relative.offset_support(rows)
    longest = lengths[:, 1].max()
    counted, kept_pairs, lone = np.zeros(2 * longest - 1, dtype=int), 0, 0
    for target, source, count in lengths:
        kept = cells_of(masks, target, source)
        np.testing.assert_array_equal(masks.relative.cells(target, source), kept)
        kept_pairs += count * kept.sum((2, 3))
        lone += count * (kept.sum(3) == 1).sum(2)
        for i in range(target):
            centre = relative.centre(SLOPE, np.int64(i), np.int64(source))
            counted[np.arange(source) - centre + longest - 1] += count
    np.testing.assert_array_equal(support, counted)
    np.testing.assert_array_equal(masks.relative.kept_pairs(rows), kept_pairs)
    in_row = relative.kept_in_row(masks.relative.grown(len(support)), rows) + masks.relative.moved(rows)
    np.testing.assert_array_equal((rows * in_row).sum((2, 3)), kept_pairs)
    np.testing.assert_array_equal((rows * (in_row == 1)).sum((2, 3)), lone)


@pytest.mark.parametrize("caps", [{}, {CROSS: 1}])
@pytest.mark.parametrize("criterion", ["mean", "normalised", "diagonal-mean", "importance", "random"])
def test_budgets_hold_over_the_recorded_sentences(criterion, caps):
    stats = random_stats(longest=(40, 50), sentences=400, heads=4)
    spec = MaskSpec({CROSS: 0.8}, granularity="scaled-diagonal", criterion=criterion, max_heads=caps)
    masks = build_masks(stats, spec).masks
    kept = total = 0
    for target, source, count in stats.lengths:
        cells = cells_of(masks, target, source)
        kept, total = kept + count * cells.sum(), total + count * cells.size
        assert cells.any(-1).all()  # no row is empty
    assert 1 - kept / total == pytest.approx(masks.metadata["sparsity"]["cross"]["effective"])
    assert 1 - kept / total == pytest.approx(0.8, abs=0.02)
    assert summarize(masks, stats)[0].guaranteed_rows == 0  # the encoder, which is whole


def test_the_best_offsets_are_kept_by_at_most_so_many_heads():
    stats = random_stats(longest=(30, 30), sentences=300, heads=4)
    spec = MaskSpec({CROSS: 0.7}, granularity=SCALED, criterion="importance", max_heads={CROSS: 2})
    masks = build_masks(stats, spec).masks.relative
    support = relative.offset_support(stats.rows_by_centre())
    seen = support > 0
    assert masks.keep[..., seen].sum(1).max() == 2
    for layer in range(2):
        assert np.bincount(masks.anchor[layer] + 99).max() <= 2
    score = (stats.relative.importance / np.maximum(support, 1))[..., seen]
    keep, ranks = masks.keep[..., seen], score.argsort(1).argsort(1)
    anchor = np.flatnonzero(seen) - len(seen) // 2 == masks.anchor[..., None]
    others = ~anchor.any(1, keepdims=True) & (ranks >= 2)
    assert score[keep & others].min() >= score[~keep & others].max()


def test_anchors_are_the_best_offsets_that_are_left():
    score = np.array([[1.0, 9, 2], [3, 8, 1], [2, 7, 6], [1, 2, 5]])
    assert relative.choose_anchors(score[:3], 1).tolist() == [0, -1, 1]
    assert relative.choose_anchors(score, 2).tolist() == [0, 0, 1, 1]
    assert relative.choose_anchors(score, 4).tolist() == [0, 0, 0, 1]
    assert relative.choose_anchors(score, 1).tolist() == [0, 0, 1, 1]  # one more head than there are offsets


def test_a_global_budget_weighs_offsets_against_cells():
    stats = random_stats(longest=(30, 30), sentences=300)
    kinds = dict.fromkeys(AttentionKind, 0.6)
    built = build_masks(stats, MaskSpec(kinds, scope="global", granularity=SCALED, criterion="importance", smooth=8))
    assert built.masks.metadata["total"]["effective"] == pytest.approx(0.6, abs=0.01)
    assert built.masks.keep[CROSS].shape[2:] == (1, 1) and built.masks.keep[CROSS].all()
    assert not built.masks.keep[AttentionKind.ENCODER_SELF].all()
    everywhere = build_masks(stats, MaskSpec(kinds, granularity="scaled-diagonal")).masks
    diagonal = build_masks(stats, MaskSpec(kinds, granularity="diagonal")).masks
    for kind in (AttentionKind.ENCODER_SELF, AttentionKind.DECODER_SELF):
        np.testing.assert_array_equal(everywhere.keep[kind], diagonal.keep[kind])


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (
            dict(criterion="window"),
            "--criterion window scores cells, .*choose one of mean, normalised, diagonal-mean, imp",
        ),
        (dict(criterion="percentile"), "leave out --granularity"),
        (dict(keep_first=2), "--keep-first 2 keeps columns"),
    ],
)
def test_what_knows_no_offsets_is_refused(spec, message):
    with pytest.raises(UserError, match=message):
        relative_masks(**spec)


@pytest.mark.parametrize(
    ("flags", "heads"),
    [
        ("--total 0.95", 1),
        ("--total 0.9", 1),  # 4.5 x 0.1 of 4 heads, rounded down
        ("--cross 0.85", 2),
        ("--cross 0.8 --max-heads decoder_self=2 --decoder-self 0.5", 3),
        ("--cross 0.75", None),
        ("--cross 0.9 --max-heads 2", 2),
        ("--cross 0.9 --min-heads 2", None),
        ("--cross 0.9 --min-kept 0.05", None),
        ("--encoder-self 0.9", None),
    ],
)
def test_the_tighter_the_budget_the_fewer_heads_keep_an_offset(flags, heads):
    stats = random_stats(longest=(30, 30), sentences=300, heads=4)
    spec = spec_from(parse_mask_flags([*flags.split(), "--granularity", "scaled-diagonal"]), stats)
    assert (CROSS in spec.max_heads) == (heads is not None)
    if heads:
        same = dataclasses.replace(spec, max_heads={**spec.max_heads, CROSS: heads})
        ours, expected = (build_masks(stats, x).masks.packed() for x in (spec, same))
        assert all(np.array_equal(ours[name], expected[name]) for name in expected)


def test_statistics_of_version_0_2_are_told_to_be_recorded_anew():
    stats = random_stats()
    old = AttentionStats(stats.mass, stats.support)
    with pytest.raises(ArtifactError, match="scaled-diagonal needs .* record them anew with ap-record"):
        build_masks(old, MaskSpec({CROSS: 0.5}, granularity=SCALED))


def test_keeping_the_diagonal_keeps_offsets_near_it():
    keep = relative_masks(0.6, keep_diagonal=1, max_heads={}).relative.keep
    assert keep[..., keep.shape[2] // 2 - 1 : keep.shape[2] // 2 + 2].all() and not keep.all()


# -- files ------------------------------------------------------------------------------------------------------------


def test_files_hold_offsets_and_older_programs_refuse_them(tmp_path):
    stats, masks = random_stats(), relative_masks()
    stats.save(tmp_path / "s.st")
    masks.save(tmp_path / "m.st")
    read = AttentionStats.load(tmp_path / "s.st")
    np.testing.assert_array_equal(read.lengths, stats.lengths)
    assert read.relative.slope == stats.relative.slope
    np.testing.assert_array_equal(read.relative.mass, stats.relative.mass)
    np.testing.assert_array_equal(read.relative.importance, stats.relative.importance)
    again = PruningMasks.load(tmp_path / "m.st")
    assert again.relative.slope == masks.relative.slope
    np.testing.assert_array_equal(again.relative.keep, masks.relative.keep)
    np.testing.assert_array_equal(again.relative.anchor, masks.relative.anchor)
    assert again.metadata["format"] == "ap-pruning-masks-3"  # version 0.2 reads -2 alone
    random_masks(0.5).save(tmp_path / "absolute.st")
    assert PruningMasks.load(tmp_path / "absolute.st").metadata["format"] == "ap-pruning-masks-2"


def test_damaged_offsets_are_refused():
    masks, stats = relative_masks(), random_stats()
    keep, anchor = masks.relative.keep.copy(), masks.relative.anchor
    keep[0, 1, keep.shape[2] // 2 + anchor[0, 1]] = False
    for wrong, message in (
        (RelativeMask(SLOPE, keep, anchor), "an anchor for each head that it keeps"),
        (RelativeMask(SLOPE, masks.relative.keep, anchor + 99), "an anchor for each head"),
        (RelativeMask(-1, masks.relative.keep, anchor), "slope -1"),
        (RelativeMask(SLOPE, masks.relative.keep[..., 1:], anchor), "relative masks of shape"),
    ):
        with pytest.raises(ArtifactError, match=message):
            PruningMasks(masks.keep, masks.extrapolation, relative=wrong)
    stats.relative.mass[1, 0, 3] = np.nan
    with pytest.raises(ArtifactError, match="cross layer 1 head 0: the attention mass of offsets is nan at offset -7"):
        stats.require_valid()
    stats = random_stats()
    stats.lengths = stats.lengths[stats.lengths[:, 1] < 10]
    with pytest.raises(ArtifactError, match="relative mass has shape"):
        stats.require_valid()


def test_recordings_merge_where_the_slope_is_the_same():
    first, second = random_stats(), random_stats(3, longest=(9, 7))
    assert first.merge(second).relative is None
    second.relative.slope = first.relative.slope
    pairs = relative.offset_support(relative.rows_by_centre(second.lengths, first.relative.slope))
    second.relative.mass = second.relative.importance = np.ones((2, 2, 1)) * pairs
    both = first.merge(second)
    assert both.lengths[:, 2].sum() == first.lengths[:, 2].sum() + second.lengths[:, 2].sum()
    assert len(np.unique(both.lengths[:, :2], axis=0)) == len(both.lengths)
    np.testing.assert_allclose(both.relative.mass[..., 4:-4], first.relative.mass[..., 4:-4] + pairs)
    np.testing.assert_array_equal(both.relative.importance[..., :4], first.relative.importance[..., :4])


# -- recording --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limits", [(20, 20), (5, 7)])
def test_recorded_offsets_are_those_of_each_sentence(limits):
    model = dense_model(VOCAB)

    def loss_of(source, inputs, target):
        logits = model(source, source.ne(PAD).sum(1), inputs)[0]
        return torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), target.flatten(), ignore_index=PAD, reduction="sum"
        )

    def record(groups, **options):
        with AttentionRecorder(model, limits, importance=True, **options) as recorder:
            for group in groups:
                source, inputs, target = sentences([[x[k] for k in group] for x in (SOURCE_LENGTHS, TARGET_LENGTHS)])
                recorder.begin(source, inputs, PAD)
                recorder.add_importance(loss_of(source, inputs, target))
        return recorder.finish()

    together = record([[0, 1], [2, 3]], slope=SLOPE)
    longest = (together.relative.mass.shape[2] + 1) // 2
    expected = np.zeros((2, *together.relative.mass.shape))
    for group in ([0, 1], [2, 3]):  # alone, with the tokens that the pair had
        lengths = [[x[k] for k in group] for x in (SOURCE_LENGTHS, TARGET_LENGTHS)]
        source, inputs, target = sentences(lengths)
        for row, (s, t) in enumerate(zip(*lengths, strict=True)):
            if s > limits[0] or t > limits[1]:
                continue
            with AttentionRecorder(model, limits, importance=True) as recorder:
                recorder.begin(source[row : row + 1, :s], inputs[row : row + 1, :t], PAD)
                recorder.add_importance(
                    loss_of(source[row : row + 1, :s], inputs[row : row + 1, :t], target[row : row + 1, :t])
                )
            alone = recorder.finish()
            for i in range(t):
                offset = np.arange(s) - relative.centre(SLOPE, np.int64(i), np.int64(s)) + longest - 1
                for part, cells in enumerate((alone.mass[CROSS], alone.importance[CROSS])):
                    expected[part][..., offset] += cells[:, :, i]
    np.testing.assert_allclose(together.relative.mass, expected[0], rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(together.relative.importance, expected[1], rtol=1e-4, atol=1e-9)
    assert together.lengths.tolist() == [[2, 1, 1], [4, 5, 1], [6, 3, 1], [8, 9, 1]]
    assert record([[0, 1]]).relative is None


# -- the model --------------------------------------------------------------------------------------------------------


def test_offsets_that_keep_everything_change_nothing():
    everything = random_masks(0.0)
    ones = np.ones((2, 2, 21), dtype=bool)
    offsets = PruningMasks(
        everything.keep, everything.extrapolation, relative=RelativeMask(SLOPE, ones, np.array([[0, 1], [-2, 3]]))
    )
    dense, ours = (pruned_model(masks, VOCAB) for masks in (everything, offsets))
    source, inputs, _ = sentences(([5, 3, 1, 30], [4, 6, 2, 40]))  # beyond the recorded range, too
    assert torch.equal(translate(dense, source, inputs), translate(ours, source, inputs))
    stock, real = dense_model(VOCAB), inputs.ne(PAD)
    torch.testing.assert_close(translate(ours, source, inputs)[real], translate(stock, source, inputs)[real])


@pytest.mark.parametrize("need_weights", [False, True])
def test_each_sentence_attends_to_the_offsets_of_its_own_length(need_weights):
    masks = relative_masks()
    module = dict(attention_sites(pruned_model(masks, VOCAB)))[CROSS, 1]
    query, key = (torch.randn(n, 3, 16, generator=torch.Generator().manual_seed(n)) for n in (8, 7))
    lengths = [7, 4, 1]
    padding = torch.arange(7) >= torch.tensor(lengths)[:, None]
    with torch.no_grad():
        ours, weights = module(query, key, key, key_padding_mask=padding, need_weights=need_weights)
        q, k, v = module.q_proj(query), module.k_proj(key), module.v_proj(key)
        expected = torch.zeros_like(q)
        for b, length in enumerate(lengths):
            kept = cells_of(masks, 8, length)[1]
            for h in range(2):
                part = slice(8 * h, 8 * h + 8)
                scores = q[:, b, part] @ k[:length, b, part].T / 8**0.5
                scores = scores.masked_fill(~torch.from_numpy(kept[h]), -torch.inf)
                expected[:, b, part] = scores.softmax(1) @ v[:length, b, part]
        torch.testing.assert_close(ours, module.out_proj(expected), atol=1e-6, rtol=1e-5)
    if need_weights:
        assert (weights[1, :, 4:] == 0).all()
        torch.testing.assert_close(weights.sum(2), torch.ones(3, 8))


def test_padding_on_either_side_and_other_sentences_change_nothing():
    model = pruned_model(relative_masks(), VOCAB)
    source, inputs, _ = sentences()
    together = translate(model, source, inputs)
    left = sentences(left=True)[0]
    torch.testing.assert_close(translate(model, left, inputs), together)
    for row, (s, t) in enumerate(zip(SOURCE_LENGTHS, TARGET_LENGTHS, strict=True)):
        alone = translate(model, source[row : row + 1, :s], inputs[row : row + 1, :t])
        torch.testing.assert_close(alone[0], together[row, :t])


def test_decoding_step_by_step_equals_the_full_forward():
    model = pruned_model(relative_masks(), VOCAB, max_target_positions=40)
    source, inputs, _ = sentences(([9, 9], [12, 12]), left=True)
    full = translate(model, source, inputs)
    with torch.no_grad():
        encoder_out = model.encoder(source, source.ne(PAD).sum(1))
        state: dict = {}
        steps = [model.decoder(inputs[:, : i + 1], encoder_out, incremental_state=state)[0] for i in range(12)]
    torch.testing.assert_close(torch.cat(steps, 1), full)


@pytest.mark.parametrize("backend", ["sdpa", "triton"])
@pytest.mark.parametrize("generator", [SequenceGenerator, PrunedSequenceGenerator])
def test_beam_search_equals_a_search_by_full_forwards(generator, backend):
    """The masks of a step depend on its row and on the length of each sentence, in both loops."""
    model = pruned_model(relative_masks(), VOCAB, max_target_positions=40, attention_backend=backend, **WIDE).to(DEVICE)
    model.decoder.output_projection.weight.data.mul_(3)
    lengths = [9, 2, 5, 1]
    source = batch(lengths, VOCAB, left=True).to(DEVICE)
    sample = {"net_input": {"src_tokens": source, "src_lengths": torch.tensor(lengths, device=DEVICE)}}
    options = dict(beam_size=3, max_len_b=14) if backend == "sdpa" else dict(beam_size=2, max_len_b=11)
    found = generator([model], VOCAB, **options).generate([model], sample)
    for _, module in attention_sites(model):
        module.backend = "sdpa"
    for sentence, hypotheses in zip(source, plain(found), strict=True):
        for tokens, score, *_ in hypotheses[:1]:
            tokens = torch.as_tensor(tokens, device=DEVICE)
            inputs = torch.cat([tokens.new_tensor([EOS]), tokens[:-1]])[None]
            logits = translate(model, sentence[sentence.ne(PAD)][None], inputs)[0]
            chosen = logits.log_softmax(-1).gather(1, tokens[:, None]).sum() / len(tokens)
            assert float(chosen) == pytest.approx(float(score), abs=1e-4)
    other = PrunedSequenceGenerator if generator is SequenceGenerator else SequenceGenerator
    assert_same(found, other([model], VOCAB, **options).generate([model], sample))


def test_gradients_reach_kept_keys_only():
    masks = relative_masks(0.7)
    module = dict(attention_sites(pruned_model(masks, VOCAB)))[CROSS, 0]
    query, key = torch.randn(6, 2, 16), torch.randn(9, 2, 16, requires_grad=True)
    padding = torch.arange(9) >= torch.tensor([9, 4])[:, None]
    module(query, key, key, key_padding_mask=padding)[0].square().sum().backward()
    for b, length in enumerate([9, 4]):
        read = cells_of(masks, 6, length)[0].any((0, 1))
        reached = key.grad[:, b].abs().sum(1) > 0
        assert reached.tolist() == [*read.tolist(), *[False] * (9 - length)]


def test_checkpoints_carry_offsets_and_those_of_version_0_2_load():
    model = pruned_model(relative_masks(), VOCAB)
    source, inputs, _ = sentences()
    expected = translate(model, source, inputs)
    fresh = pruned_model(None, VOCAB)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(translate(fresh, source, inputs), expected)
    old = pruned_model(random_masks(0.5), VOCAB)
    state = {k: v for k, v in old.state_dict().items() if not k.endswith(OFFSET_BUFFERS)}
    fresh.load_state_dict(state)  # over relative masks
    assert torch.equal(translate(fresh, source, inputs), translate(old, source, inputs))
    assert fresh.masks_sha256() == old.masks_sha256()


def test_relative_masks_run_where_others_do():
    """The default, auto, takes the kernels on a GPU."""
    for backend in ("auto", "triton", "sdpa"):
        model = pruned_model(relative_masks(), VOCAB, attention_backend=backend, **WIDE)
        for _, module in attention_sites(model):
            assert module.runs_kernels(torch.float16, torch.device("cuda")) == (backend != "sdpa")


@pytest.mark.parametrize("lengths", [([5, 2, 1], [4, 6, 9]), ([131, 40], [30, 20])], ids=["sentences", "long"])
def test_kernels_and_sdpa_agree_in_outputs_and_gradients(lengths):
    """Padded on the left as fairseq does; beyond the recorded lengths; targets that are longer than their sources."""
    masks, results = relative_masks(0.7), []
    source, inputs, target = (tokens.to(DEVICE) for tokens in sentences(lengths, left=True))
    for backend in ("sdpa", "triton"):
        model = pruned_model(masks, VOCAB, attention_backend="sdpa", **WIDE).to(DEVICE).train()
        for (kind, _), module in attention_sites(model):
            module.backend = backend if kind is CROSS else "sdpa"  # the interpreter is slow
        logits = model(source, source.ne(PAD).sum(1), inputs)[0][target.ne(PAD)]
        logits.log_softmax(-1)[:, 5].mean().backward()
        results.append((logits, {name: p.grad for name, p in model.named_parameters()}))
    torch.testing.assert_close(results[0][0], results[1][0], atol=1e-5, rtol=1e-4)
    for name, gradient in results[0][1].items():
        difference = (gradient - results[1][1][name]).abs().max()
        assert difference <= 1e-5 + 1e-3 * gradient.abs().max(), name


# -- the report -------------------------------------------------------------------------------------------------------


def test_the_report_counts_what_each_sentence_keeps():
    stats = random_stats(longest=(9, 11), heads=3)
    masks = build_masks(stats, MaskSpec({CROSS: 0.7}, granularity=SCALED)).masks
    kept = np.zeros(stats.mass[CROSS].shape)
    seen, total = np.zeros(4), 0
    for target, source, count in stats.lengths:
        cells = cells_of(masks, target, source)
        kept[:, :, :target, :source] += count * cells
        for heads in cells.sum(1):
            seen += count * np.bincount(heads.ravel(), minlength=4)
            total += count * heads.size
    expected = kept / np.maximum(stats.support[CROSS], 1)
    np.testing.assert_allclose(analysis.kept_cells(masks, stats, CROSS), expected)
    np.testing.assert_allclose(analysis.seen_by(masks, stats, CROSS), seen / total)
    assert analysis.head_sparsity(masks, stats, CROSS).mean() == pytest.approx(
        masks.metadata["sparsity"]["cross"]["effective"]
    )


def test_the_report_draws_offsets_in_their_own_coordinates():
    stats = random_stats(longest=(9, 11), heads=3)
    masks = build_masks(stats, MaskSpec(dict.fromkeys(AttentionKind, 0.6), granularity=SCALED)).masks
    analysis.check_masks(masks, stats, "ours")
    report = Report(stats, {"ours": masks}, [], None, {})
    figures = {figure.name: figure for figure in report.figures()}
    assert {"offsets_ours", "seen_by", "overview_cross", "attention_cross_ours"} <= figures.keys()
    assert f"round({masks.relative.slope / 65536:.3f} i)" in figures["offsets_ours"].caption
    json.dumps(report.summary(), allow_nan=False)
    masks.relative.slope += 1
    with pytest.raises(ArtifactError, match="masks ours count from a diagonal of slope"):
        analysis.check_masks(masks, stats, "ours")


# -- the commands -----------------------------------------------------------------------------------------------------


def test_from_recording_to_translation(data_bin, dense, tmp_path):
    stats, masks, pruned = (tmp_path / name for name in ("s.st", "m.st", "pruned.pt"))
    run("ap-record", data_bin, "--path", dense, "--importance", "-o", stats, "--cpu", "--max-tokens", 2000)
    recorded = AttentionStats.load(stats)
    assert recorded.lengths[:, 2].sum() == 1000 and recorded.validation_lengths[:, 2].sum() == 60
    flags = ["--total", 0.5, "--criterion", "importance", "--granularity", "cross=scaled-diagonal"]
    run("ap-masks", stats, *flags, "--calibrate", "-o", masks)
    assert PruningMasks.load(masks).metadata["validation"]["total"] == pytest.approx(0.5, abs=0.01)
    run("ap-apply", dense, "--attention-masks", masks, "--data", data_bin, "-o", pruned)
    hypotheses = generate(data_bin, pruned)
    on_device = generate(data_bin, pruned, "--task", "pruned_translation")
    texts, scores = (
        [re.findall(pattern, log, re.M) for log in (hypotheses, on_device)]
        for pattern in (r"^D-(\d+)\t\S+\t(.*)", r"^D-\d+\t(\S+)")
    )
    assert texts[0] == texts[1] != []
    np.testing.assert_allclose(*(np.array(log, dtype=float) for log in scores), atol=1e-5)
    # The kernels: in translation, and in training from scratch.
    assert_kernels_translate_as_sdpa(data_bin, pruned)
    flags = ["--attention-masks", masks, "--max-tokens", 80, "--disable-validation", "--dropout", 0]
    losses = {}
    for backend in ("sdpa", "triton"):
        options = [*flags, "--attention-backend", backend]
        log = train(data_bin, tmp_path / backend, *options, arch="pruned_transformer", updates=3, kernels=True)
        losses[backend] = [float(x) for x in re.findall(r'"loss": "([\d.]+)"', log)]
    assert len(losses["triton"]) >= 3
    np.testing.assert_allclose(losses["triton"], losses["sdpa"], atol=0.002)  # printed with three digits


def test_pruning_while_training_by_offsets(data_bin, tmp_path):
    flags = ["--task", "pruned_translation", "--attention-masks", "none", "--attention-sparsity", 0.8]
    flags += ["--prune-start", 4, "--prune-end", 8, "--prune-every", 4]
    mask_flags = "--criterion importance --granularity cross=scaled-diagonal --max-heads cross=1 --calibrate"
    flags += ["--prune-flags", mask_flags]
    log = train(data_bin, tmp_path, *flags, arch="pruned_transformer", updates=10)
    held = re.search(r"update 8: [\d.]+% of the pairs pruned \(([\d.]+)% of those of the validation sentences\)", log)
    assert float(held[1]) == pytest.approx(80, abs=1)
    state = load_checkpoint(tmp_path / "checkpoint_last.pt")["model"]
    assert state["decoder.layers.0.encoder_attn.offset_words"].numel() > 0
    assert "Generate test with beam" in generate(data_bin, tmp_path / "checkpoint_last.pt")
