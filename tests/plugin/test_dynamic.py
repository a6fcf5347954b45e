"""Inference-time pruning: top-k keeps k, a threshold keeps what reaches it, rounding has few values.

Masked heads see selected source tokens only.
"""

import argparse
import logging

import numpy as np
import pytest
import torch
from fairseq.sequence_generator import SequenceGenerator
from plugin.builders import batch, dense_model, dictionary, language_models, pruned_model, random_masks
from plugin.hypotheses import assert_same

from ap_fairseq.files import UserError
from ap_fairseq.lengths import support_of
from ap_fairseq.model.dynamic import DynamicPruning, top_k_for
from ap_fairseq.model.head_masking import HeadMasking
from ap_fairseq.search.generator import PrunedSequenceGenerator
from ap_fairseq.sites import AttentionKind, attention_sites, per_kind
from ap_fairseq.tasks import PrunedTranslationTask

VOCAB = dictionary()


def scores(seed=0, masked=0.3):
    draw = torch.Generator().manual_seed(seed)
    values = torch.randn(2, 3, 5, 9, generator=draw) * 3
    hidden = torch.rand(values.shape, generator=draw) < masked
    hidden[..., 0] = False
    return values.masked_fill(hidden, float("-inf"))


@pytest.mark.parametrize("k", [1, 3, 8, 9, 20])
def test_top_k_is_the_softmax_over_the_k_best_visible_keys(k):
    dynamic, raw = DynamicPruning(top_k=k), scores()
    weights = dynamic.probabilities(raw)
    for row, found in zip(raw.reshape(-1, 9), weights.reshape(-1, 9), strict=True):
        order = [j for j in row.argsort(descending=True).tolist() if row[j] > float("-inf")][:k]
        expected = torch.zeros(9)
        expected[order] = row[order].softmax(0)
        torch.testing.assert_close(found, expected)
    assert int(dynamic.pairs) == int(raw.isfinite().sum())
    assert int(dynamic.kept) == int(raw.isfinite().sum(-1).clamp(max=k).sum())


def test_equal_scores_do_not_make_more_than_k():
    weights = DynamicPruning(top_k=2).probabilities(torch.zeros(1, 1, 1, 6))
    assert sorted(weights.flatten().tolist()) == [0, 0, 0, 0, 0.5, 0.5]


def test_a_threshold_zeroes_what_is_below_and_leaves_the_rest_as_it_is():
    dynamic, raw = DynamicPruning(threshold=0.1), scores()
    weights, dense = dynamic.probabilities(raw), raw.softmax(-1)
    torch.testing.assert_close(weights, torch.where(dense >= 0.1, dense, 0))
    assert (weights.sum(-1) < 0.999).any()  # not renormalised
    assert int(dynamic.kept) == int((weights > 0).sum()) < int(dynamic.pairs)


@pytest.mark.parametrize("bits", [2, 3])
def test_rounding_has_two_to_the_bits_values_nearest_on_a_log_scale(bits):
    weights = DynamicPruning(threshold=0.01, log_bits=bits).probabilities(torch.randn(8, 4, 50, 30) * 3)
    values = weights.unique()
    assert len(values) == 2**bits and values[0] == 0
    torch.testing.assert_close(values[1:], torch.logspace(-2, 0, 2**bits - 1))
    raw = scores(masked=0.0)
    dense = raw.softmax(-1)
    rounded = DynamicPruning(threshold=0.01, log_bits=bits).probabilities(raw)
    kept = dense >= 0.01
    half_step = np.log(100) / (2**bits - 2) / 2
    assert ((rounded[kept].log() - dense[kept].log()).abs() <= half_step + 1e-5).all()


def test_padded_queries_are_not_counted():
    dynamic = DynamicPruning(top_k=1)
    raw = torch.zeros(2, 3, 5, 9)
    raw[1, :, 2:] = float("-inf")  # a padded query sees nothing
    dynamic.probabilities(raw)
    assert int(dynamic.pairs) == (5 + 2) * 3 * 9 and int(dynamic.kept) == (5 + 2) * 3


def test_top_k_of_a_budget_counts_the_pairs_of_each_query():
    """Against counting min(k, keys) over the queries of every sentence."""
    lengths = np.array([[5, 7, 3], [9, 2, 1], [4, 4, 2]])
    for kind in AttentionKind:
        keys = []
        for target, source, count in lengths.tolist():
            row = {"encoder_self": [source] * source, "decoder_self": range(1, target + 1), "cross": [source] * target}
            keys += list(row[kind.value]) * count
        for budget in (0.0, 0.3, 0.6, 0.9):
            k, share = top_k_for(support_of(kind, lengths), budget)
            pruned = [1 - sum(min(n, m) for n in keys) / sum(keys) for m in (k - 1, k)]
            assert share == pytest.approx(pruned[1]) and (share <= budget < pruned[0] or k == 1)


def test_options_reach_the_kinds_they_name():
    model = pruned_model(random_masks(0.0), VOCAB, attention_top_k="encoder_self=2,cross=3")
    found = {site.kind: module.dynamic for site, module in attention_sites(model)}
    assert found[AttentionKind.ENCODER_SELF].top_k == 2 and found[AttentionKind.CROSS].top_k == 3
    assert found[AttentionKind.DECODER_SELF] is None


def test_a_model_translates_with_top_k_as_teacher_forcing_says():
    """Step by step = all at once, and large k = no pruning."""
    masks = random_masks(0.3)
    source = batch([9, 6, 4], VOCAB, left=True)
    target = batch([7, 7, 7], VOCAB, left=False, seed=1)
    outputs = {}
    for k in (None, "2", "50"):
        model = pruned_model(masks, VOCAB, attention_top_k=k)
        with torch.no_grad():
            encoded = model.encoder(source, source.ne(VOCAB.pad()).sum(1))
            outputs[k] = model.decoder(target, encoder_out=encoded)[0]
            state = {}
            steps = [
                model.decoder(target[:, : t + 1], encoder_out=encoded, incremental_state=state)[0] for t in range(7)
            ]
        torch.testing.assert_close(torch.cat(steps, 1), outputs[k], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(outputs["50"], outputs[None], atol=1e-5, rtol=1e-4)
    assert (outputs["2"] - outputs[None]).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(attention_top_k="-1"), "--attention-top-k is -1"),
        (dict(attention_top_k="2.5"), "--attention-top-k is 2.5, expected a number of keys"),
        (dict(attention_top_k="encoder=3"), "--attention-top-k is 'encoder=3', expected a number, or numbers per kind"),
        (dict(attention_threshold="1.5"), "--attention-threshold is 1.5, expected a probability"),
        (dict(attention_log_bits=3), "--attention-log-bits is 3 with --attention-threshold 0.0"),
        (dict(attention_threshold="0.1", attention_log_bits=1), "--attention-log-bits is 1"),
    ],
)
def test_bad_options_name_the_fault(options, message):
    with pytest.raises(UserError, match=message):
        pruned_model(random_masks(0.0), VOCAB, **options)


@pytest.mark.parametrize("name", ["attention_top_k", "attention_threshold"])
def test_kinds_that_a_model_has_not_are_refused(name):
    """For a language model they had no effect, silently."""
    flag = f"--{name.replace('_', '-')}"
    message = (
        f"{flag} decoder_self=0.0,cross=0.0: the model has no cross attention; leave that out .it has decoder_self"
    )
    with pytest.raises(UserError, match=message):
        language_models(VOCAB, **{name: "decoder_self=0.0,cross=0.0"})
    with pytest.raises(UserError, match="no encoder_self and no cross attention"):
        language_models(VOCAB, **{name: "encoder_self=0.5,cross=0.5"})
    language_models(VOCAB, **{name: "0.0"})
    pruned_model(random_masks(0.0), VOCAB, **{name: "decoder_self=0.0,cross=0.0"})


def test_numbers_per_kind():
    assert per_kind("x", None) == {} and per_kind("x", "0.5") == dict.fromkeys(AttentionKind, 0.5)
    assert per_kind("x", "cross=2, encoder_self=3") == {AttentionKind.CROSS: 2, AttentionKind.ENCODER_SELF: 3}


# -- attention head masking -------------------------------------------------------------------------------------------

LENGTHS = [5, 2, 7, 4]
LINES = "1 0\n0 1 1 0 1\n1 1 1 1 1 1 1\n0 0 0 0\n"
WIDE = dict(encoder_embed_dim=32, decoder_embed_dim=32, decoder_input_dim=32, decoder_output_dim=32)
ORDER = [1, 0, 2, 3]  # the lines of LENGTHS: all tokens of the third are selected, none of the fourth


def masking(tmp_path, lines=LINES, heads="1:0") -> HeadMasking:
    (tmp_path / "selected.txt").write_text(lines, "utf-8-sig")  # a byte order mark belongs to no line
    return HeadMasking.from_options(str(tmp_path / "selected.txt"), heads)


def sentences(which=(0, 1, 2, 3)):
    source = batch(LENGTHS, VOCAB, left=True)[list(which)]
    lengths, numbers = (torch.tensor(values)[list(which)] for values in (LENGTHS, ORDER))
    return {"id": numbers, "net_input": {"src_tokens": source[:, -int(lengths.max()) :], "src_lengths": lengths}}


@pytest.mark.parametrize("step_by_step", [False, True])
def test_masked_heads_attend_to_selected_tokens_and_other_heads_as_before(step_by_step, tmp_path):
    """Softmax over fewer scores is the softmax over all of them, divided by the share of those that are left."""
    model, draw = pruned_model(random_masks(0.3), VOCAB).requires_grad_(False), torch.Generator().manual_seed(1)
    module = model.decoder.layers[1].encoder_attn
    query, key = (torch.randn(n, 4, 16, generator=draw) for n in (6, 7))
    padding = torch.arange(7) >= torch.tensor(LENGTHS)[:, None]

    def attend():
        """Output (T, B, C), and weights of the heads (H, B, T, S)."""
        if not step_by_step:
            return module(query, key, key, key_padding_mask=padding, need_head_weights=True)
        state, options = {}, dict(key_padding_mask=padding, need_head_weights=True)
        steps = [module(row[None], key, key, incremental_state=state, **options) for row in query]
        return torch.cat([output for output, _ in steps]), torch.cat([weights for _, weights in steps], 2)

    output, free = attend()
    with masking(tmp_path).applied([model], sentences()):
        masked_output, masked = attend()
        assert model.decoder.layers[0].encoder_attn.selected is None
    assert module.selected is None and torch.equal(attend()[0], output)
    assert torch.equal(masked[1], free[1])
    rows = [[0, 1, 1, 0, 1], [1, 0], [1] * 7, [0] * 4]
    for b, row in enumerate(rows):
        part = free[0, b, :, : len(row)] * torch.tensor(row)
        expected = torch.nan_to_num(part / part.sum(-1, keepdim=True))
        torch.testing.assert_close(masked[0, b, :, : len(row)], expected)
        assert not masked[0, b, :, len(row) :].any()
    assert not masked[0, 3].any() and masked[0, 0].any()
    torch.testing.assert_close(masked_output[:, 2], output[:, 2])  # all tokens selected
    module.v_proj.weight.data[:8], module.v_proj.bias.data[:8] = 0, 0
    torch.testing.assert_close(masked_output[:, 3], attend()[0][:, 3])  # none: the head adds nothing


def test_lines_follow_their_sentences_through_a_search(tmp_path, caplog):
    """Sentences leave it one after the other; each finds what it finds alone."""
    model = pruned_model(random_masks(0.3, longest=(30, 12)), VOCAB, **WIDE)
    model.decoder.output_projection.weight.data.mul_(3)
    search = PrunedSequenceGenerator([model], VOCAB, beam_size=3, max_len_b=20)
    free = search.generate([], sentences())
    heads = masking(tmp_path, heads="1:0,0:0,0:1")
    with caplog.at_level(logging.INFO, "ap_fairseq.search.generator"), heads.applied([model], sentences()):
        together = search.generate([], sentences())
        whole = model(**sentences()["net_input"], prev_output_tokens=sentences()["net_input"]["src_tokens"])[0]
    assert "masking of heads (--head-masking) is not covered" in caplog.text
    ends = [max(h["tokens"].numel() for h in hypotheses) for hypotheses in together]
    assert ends[0] != ends[1] < ends[2]  # the search goes on with fewer sentences
    for number in range(4):
        with heads.applied([model], sentences([number])):
            assert_same(
                [together[number]],
                SequenceGenerator([model], VOCAB, beam_size=3, max_len_b=20).generate([], sentences([number])),
            )
    assert_same([together[2]], [free[2]])
    assert whole.isfinite().all()
    assert [h["score"] for h in together[0]] != [h["score"] for h in free[0]]


def test_files_and_heads_that_do_not_fit_are_refused(tmp_path):
    model, heads = pruned_model(random_masks(0.3), VOCAB), masking(tmp_path)
    heads.require_sentences("test", 4)
    path = tmp_path / "selected.txt"
    with pytest.raises(UserError, match=f"{path} has 4 lines, the subset 'test' 5 sentences"):
        heads.require_sentences("test", 5)
    for lines, options, message in (
        ("1 0 1\n" + LINES[4:], {}, "line 1 has 3 numbers, the sentence 2 tokens; write one for each token, the last"),
        ("1 0 x\n", {}, "line 1 has 'x', expected 0 or 1"),
        (LINES, {"heads": "2:0"}, "--masked-heads 2:0: the model has 2 layers of cross-attention with 2 heads"),
        (LINES, {"heads": "0:2"}, "--masked-heads 0:2: the model has 2 layers"),
        (LINES, {"heads": "0.1"}, "--masked-heads '0.1': expected LAYER:HEAD"),
    ):
        with pytest.raises(UserError, match=message), masking(tmp_path, lines, **options).applied([model], sentences()):
            pass
    assert HeadMasking.from_options(None, None) is None
    with pytest.raises(UserError, match="--head-masking without --masked-heads"):
        HeadMasking.from_options(str(path), None)
    with pytest.raises(UserError, match="--masked-heads without --head-masking"):
        HeadMasking.from_options(None, "0:0")
    masked = masking(tmp_path)
    with pytest.raises(UserError, match="belong to the sentences of a binarised subset, these are of none"):
        interactive = argparse.Namespace(head_masking=masked, datasets={})
        PrunedTranslationTask.inference_step(interactive, None, [model], sentences())
    with (
        pytest.raises(UserError, match="heads of pruned_transformer"),
        masked.applied([dense_model(VOCAB)], sentences()),
    ):
        pass
    kernels = pruned_model(random_masks(0.3), VOCAB, attention_backend="triton", **WIDE)
    with pytest.raises(UserError, match="triton with --head-masking"), masked.applied([kernels], sentences()):
        pass
