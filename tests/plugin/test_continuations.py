"""Language models continue prompts as in fairseq's search."""

import logging

import numpy as np
import pytest
import torch
from fairseq.sequence_generator import SequenceGenerator
from plugin.builders import adaptive, causal_masks
from plugin.hypotheses import assert_same
from plugin.searches import VOCAB, WorkingBlock, by_torch, language_model, sample, strategy

from ap_fairseq.files import UserError
from ap_fairseq.search import static_decoder
from ap_fairseq.search.alignment import PrunedSequenceGeneratorWithAlignment
from ap_fairseq.search.generator import PrunedSequenceGenerator
from ap_fairseq.sites import AttentionKind

ADAPTIVE = dict(**adaptive("8,20"), decoder_input_dim=32, decoder_output_dim=32)


PROMPTS = [12, 9, 17, 14, 10]


def prompts(lengths, seed: int = 0):
    """A sample of `language_modeling`, and what its `inference_step` makes of it: the tokens after the first."""
    inputs = sample([n + 1 for n in lengths], seed)
    rows = inputs["net_input"]["src_tokens"]
    for row, n in zip(rows, lengths, strict=True):
        row.copy_(row.roll(n + 1))  # to the left
        row[: n + 1] = row[: n + 1].roll(1)  # end of sentence first
    return inputs, rows[:, 1:]


CONTINUED = {
    "beam": (dict(beam_size=4, max_len_b=24, len_penalty=0.5), PROMPTS, {}),
    "greedy": (dict(max_len_b=24), PROMPTS, {}),
    "short prompts": (dict(beam_size=3, max_len_b=24), [3, 1, 5, 0], {}),
    "as long as the context": (dict(beam_size=3, max_len_b=999, min_len=60), PROMPTS, {}),
    "beyond the context": (dict(beam_size=3, max_len_b=999), [64, 66], {}),
    "another first token": (dict(beam_size=3, max_len_b=20, temperature=1.4, bos_token=7), PROMPTS, {}),
    "unknown words": (dict(beam_size=3, max_len_b=24, unk_penalty=2.0, tokens_to_suppress=("w3",)), PROMPTS, {}),
    "bigrams": (dict(beam_size=3, max_len_b=40, no_repeat_ngram_size=2, min_len=30), PROMPTS, {}),
    "siblings": (dict(beam_size=4, max_len_b=24), PROMPTS, {}),
    "discounted groups": (dict(beam_size=3, max_len_b=24), PROMPTS, {}),
    "top 1": (dict(beam_size=3, max_len_b=24), PROMPTS, {}),
    "as the prompt is long": (dict(beam_size=3, match_source_len=True), PROMPTS, {}),
    "adaptive": (dict(beam_size=3, max_len_b=24, temperature=0.8), PROMPTS, ADAPTIVE),
    "gpt": (dict(beam_size=3, max_len_b=999), PROMPTS, dict(decoder_learned_pos=True, decoder_normalize_before=True)),
    **{
        name: (dict(beam_size=3, max_len_b=24), PROMPTS, {name: True, "decoder_normalize_before": True})
        for name in ("scale_heads", "scale_attn", "scale_fc", "scale_resids")  # the search on a CPU left them out
    },
}


@pytest.mark.parametrize("sparsity", [0.0, 0.7], ids=["all ones, fairseq's model", "pruned"])
@pytest.mark.parametrize("case", CONTINUED)
def test_prompts_are_continued_as_by_fairseq(case, sparsity, monkeypatch, caplog):
    """Slots that nothing was written to hold NaN; those of a prompt that no later row keeps have none."""
    monkeypatch.setattr(static_decoder, "MAX_LOGITS", 34 * 5 * 4)  # several parts
    options, lengths, sizes = CONTINUED[case]
    stock, ours = language_model(sparsity, **sizes)
    options, search = {**options}, strategy(case, options.get("beam_size", 1))
    bos = options.pop("bos_token", None)
    generator = PrunedSequenceGenerator([ours], VOCAB, search_strategy=search, **options)
    fairseqs = SequenceGenerator([stock], VOCAB, search_strategy=strategy(case, options.get("beam_size", 1)), **options)
    if fairseqs.repeat_ngram_blocker is not None:
        fairseqs.repeat_ngram_blocker = WorkingBlock(options["no_repeat_ngram_size"])
    with caplog.at_level(logging.INFO, "ap_fairseq.search.generator"):
        for seed in (0, 1):
            inputs, prefix = prompts(lengths, seed)
            if case == "unknown words":
                prefix[0, :5] = VOCAB.unk()
            expected = fairseqs.generate([], inputs, prefix_tokens=prefix, bos_token=bos)
            assert_same(generator.generate([], inputs, prefix_tokens=prefix, bos_token=bos), expected)
            for pool in generator.decoder.kv_pools.values():
                pool.fill_(torch.nan)
    assert "fairseq's own generator" not in caplog.text


def test_prompts_are_continued_by_the_kernels_and_by_ensembles():
    systems = [language_model(0.6, seed=seed, attention_backend="triton")[1] for seed in (5, 6)]
    inputs, prefix = prompts([9, 12])
    options = dict(beam_size=2, max_len_b=16)
    expected = SequenceGenerator(by_torch(systems), VOCAB, **options).generate([], inputs, prefix_tokens=prefix)
    generator = PrunedSequenceGenerator(systems, VOCAB, **options)
    assert_same(generator.generate([], inputs, prefix_tokens=prefix), expected)


def test_alignments_of_continuations_are_refused():
    """They failed on the missing encoder."""
    with pytest.raises(UserError, match="--print-alignment: a language model has no cross-attention"):
        PrunedSequenceGeneratorWithAlignment([language_model(0.0)[1]], VOCAB)


def test_a_prompt_is_read_in_one_pass_and_its_slots_are_shared(monkeypatch, paged):
    steps, search, run = [], static_decoder.StaticDecoder.finish, static_decoder.StaticDecoder._run
    slots = []
    monkeypatch.setattr(static_decoder, "SHORTEST_PREFILL", 9)
    monkeypatch.setattr(static_decoder.StaticDecoder, "_run", lambda *args: steps.append(args) or run(*args))
    monkeypatch.setattr(
        static_decoder.StaticDecoder, "finish", lambda self, *args: slots.append({**self.used}) or search(self, *args)
    )
    _, model = language_model(0.0)
    keep = causal_masks(0.0, longest=64)
    window = np.tri(64, k=0, dtype=bool) & ~np.tri(64, k=-4, dtype=bool)
    keep.keep[AttentionKind.DECODER_SELF] &= window
    model.set_masks(keep)
    for lengths, n_steps, n_slots in (
        ([9, 12], 20 - 9 + 1, 2 * 2 * 3),  # two sentences, two heads, three columns that row 9 keeps beside its own
        ([8, 12], 20 + 1, 0),
    ):
        steps.clear(), slots.clear()
        inputs, prefix = prompts(lengths)
        generator = PrunedSequenceGenerator([model], VOCAB, beam_size=3, max_len_b=20, min_len=20)
        generator.generate([], inputs, prefix_tokens=prefix)
        assert len(steps) == n_steps
        assert [*slots[0].values()] == [n_slots] * 2  # of two layers
