"""The plugin's beam search gives fairseq's hypotheses and scores; what it does not cover, it leaves to fairseq."""

import argparse
import collections
import concurrent.futures
import copy
import gc
import logging
import math
import sys
import weakref

import numpy as np
import pytest
import scipy.stats
import torch
from fairseq.data import Dictionary
from fairseq.models.transformer_align import TransformerAlignModel
from fairseq.ngram_repeat_block import NGramRepeatBlock
from fairseq.search import BeamSearch, DiverseBeamSearch, DiverseSiblingsSearch, LengthConstrainedBeamSearch, Sampling
from fairseq.sequence_generator import SequenceGenerator, SequenceGeneratorWithAlignment
from fairseq.utils import extract_soft_alignment
from plugin import builders
from plugin.builders import (
    adaptive,
    batch,
    causal_masks,
    dense_model,
    dictionary,
    language_models,
    pruned_model,
    random_masks,
)
from plugin.hypotheses import assert_same
from plugin.searches import DEVICE, SIZES, VOCAB, by_torch, lively, models, sample

import triton_ops
from ap_fairseq.files import UserError
from ap_fairseq.model import cpu_linear
from ap_fairseq.search import alignment, beams, generator, host_decoder, static_decoder
from ap_fairseq.search.alignment import PrunedSequenceGeneratorWithAlignment
from ap_fairseq.search.generator import PrunedSequenceGenerator
from ap_fairseq.search.hypotheses import Hypotheses, read_out
from ap_fairseq.search.running import FOLLOWING, look_ahead
from ap_fairseq.search.task import ListDictionary, SearchOnDevice
from ap_fairseq.sites import AttentionKind


@pytest.fixture(autouse=True)
def _log_again():
    generator.log_fallback.cache_clear()


@pytest.fixture
def paged(monkeypatch):
    """The search over pools, of which a CPU without kernels has none."""
    monkeypatch.setattr(PrunedSequenceGenerator, "_decoder_class", lambda self, device: static_decoder.StaticDecoder)


LENGTHS = [5, 2, 7, 11, 3, 9, 4, 6, 8, 10, 12, 5, 7]


@pytest.mark.parametrize("backend", ["sdpa", "triton"])
@pytest.mark.parametrize(
    "options",
    [
        dict(beam_size=3),
        dict(beam_size=1, max_len_b=9),
        dict(beam_size=4, len_penalty=0.3, unk_penalty=1.5, temperature=1.3, min_len=4, max_len_a=0.8, max_len_b=3),
        dict(beam_size=5, normalize_scores=False, max_len_b=14, tokens_to_suppress=("w3", "w4")),
    ],
    ids=["beam 3", "greedy", "penalties", "unnormalized"],
)
def test_hypotheses_and_scores_are_those_of_fairseq(options, backend):
    options = {"max_len_b": 12, **options}
    systems = models(attention_backend=backend)
    lengths = LENGTHS if backend == "sdpa" or DEVICE == "cuda" else LENGTHS[:4]  # the interpreter is slow
    generator = PrunedSequenceGenerator(systems, VOCAB, **options)
    for seed in (0, 1):  # the second batch finds the buffers of the first
        expected = SequenceGenerator(by_torch(systems), VOCAB, **options).generate([], sample(lengths, seed))
        assert_same(generator.generate([], sample(lengths, seed)), expected)
        assert len({len(h["tokens"]) for hypotheses in expected for h in hypotheses}) > 1, "all are cut at the end"


@pytest.mark.parametrize("decoder", ["CPU", "pools", "kernels"])
def test_rows_that_keep_nothing_are_read_as_by_fairseqs_search(decoder, request):
    if decoder == "pools":
        request.getfixturevalue("paged")
    systems = models(sparsity=0.9, empty_rows=True, attention_backend="triton" if decoder == "kernels" else "sdpa")
    assert not systems[0].decoder.layers[0].encoder_attn.keep_mask(12, 12).any(-1).all()
    options, lengths = dict(beam_size=3, max_len_b=12), LENGTHS[:4] if decoder == "kernels" else LENGTHS
    expected = SequenceGenerator(by_torch(systems), VOCAB, **options).generate([], sample(lengths))
    assert_same(PrunedSequenceGenerator(systems, VOCAB, **options).generate([], sample(lengths)), expected)
    assert all(torch.isfinite(h["positional_scores"]).all() for sentence in expected for h in sentence)


class WorkingBlock(NGramRepeatBlock):
    """fairseq's, which looks for the last n-gram behind the tokens, in the padding, and so blocks nothing."""

    def forward(self, tokens, lprobs, bsz, beam_size, step):
        return super().forward(tokens[:, : step + 1], lprobs, bsz, beam_size, step)


def strategy(name: str, beam: int):
    """A new search of fairseq's, since those of groups remember a batch."""
    made = {
        "2 groups": lambda: DiverseBeamSearch(VOCAB, 2, 0.5),
        "discounted groups": lambda: DiverseBeamSearch(VOCAB, 3, 1.5, diversity_discount=0.5),
        "groups of one": lambda: DiverseBeamSearch(VOCAB, beam, 2.0),
        "siblings": lambda: DiverseSiblingsSearch(VOCAB, 0.8),
        "match source length": lambda: LengthConstrainedBeamSearch(VOCAB, 1, 0, 1, 0),
        "top 1": lambda: Sampling(VOCAB, sampling_topk=1),
        "top 1e-20": lambda: Sampling(VOCAB, sampling_topp=1e-20),
    }
    return made[name]() if name in made else None


def prefixes(rows) -> torch.Tensor:
    """Prefixes for the sentences of LENGTHS: *rows* in turns, as names of tokens."""
    width = max(map(len, rows))
    rows = [[VOCAB.index(token) for token in [*row, *["<pad>"] * width][:width]] for row in rows]
    return torch.tensor([rows[k % len(rows)] for k in range(len(LENGTHS))], device=DEVICE)


SEARCHES = {
    "prefix": (dict(beam_size=3, unk_penalty=0.5), [["w5", "<unk>", "w7"]]),
    "prefixes of several lengths": (
        dict(beam_size=3, min_len=4, tokens_to_suppress=("w4",)),
        [["w4", "w4"], ["w1"], []],
    ),
    "long prefixes": (dict(beam_size=3, unk_penalty=0.5), [["w5", "w6", "<unk>"] * 3, ["w7"] * 11]),  # in one pass
    "eos in prefixes": (dict(beam_size=3, min_len=3), [["w5", "</s>"], ["w1", "w2", "w3"], ["w6", "w7", "</s>"], []]),
    "prefix beyond the maximum length": (dict(beam_size=2, max_len_b=2), [["w5", "w6", "w7", "w8"], ["w9"]]),
    "match source length": (dict(beam_size=3, match_source_len=True), None),
    "match source length within prefixes": (dict(beam_size=3, match_source_len=True), [["w5", "w6"], ["w7"]]),
    "bigrams": (dict(beam_size=3, no_repeat_ngram_size=2, max_len_b=30), None),
    "trigrams": (dict(beam_size=4, no_repeat_ngram_size=3, max_len_b=30, unk_penalty=9.0), None),
    "bigrams within prefixes": (dict(beam_size=3, no_repeat_ngram_size=2), [["w5", "w6", "w5"], ["w5"]]),
    "2 groups": (dict(beam_size=6, max_len_b=12), None),
    "discounted groups": (dict(beam_size=6, min_len=5, len_penalty=0.4), None),
    "groups of one": (dict(beam_size=4, unk_penalty=0.5), [["w5"], []]),
    "siblings": (dict(beam_size=4, no_repeat_ngram_size=2), None),
    "top 1": (dict(beam_size=3, temperature=0.7), [["w5"], [], ["w6", "</s>"]]),
    "top 1e-20": (dict(beam_size=2, min_len=4), None),
}


# One of each way to choose: the kernels are told of prefixes, n-grams and lengths by penalties alone.
KERNEL_SEARCHES = SEARCHES if DEVICE == "cuda" else ["prefix", "bigrams", "2 groups", "siblings", "top 1"]


@pytest.mark.parametrize(
    ("case", "decoder"),
    [
        *((case, "CPU") for case in SEARCHES if DEVICE == "cpu"),
        *((case, "pools") for case in SEARCHES),
        *((case, "kernels") for case in KERNEL_SEARCHES),
    ],
)
def test_other_searches_find_what_fairseqs_find(case, decoder, caplog, request):
    """Sampling from one token is deterministic; of the 1e-6 that an eos before min_len left, fairseq drew one."""
    if decoder == "pools":
        request.getfixturevalue("paged")
    options, rows = SEARCHES[case]
    systems = models(attention_backend="triton" if decoder == "kernels" else "sdpa")
    options = {"max_len_b": 15, **options}
    n, batches = len(LENGTHS), 2  # the second batch finds the buffers of the first
    if decoder == "kernels" and DEVICE == "cpu":  # the interpreter is slow
        n, batches, options = 4, 1, {**options, "max_len_b": min(options["max_len_b"], 12)}
    prefix = None if rows is None else prefixes(rows)[:n]

    def made(generator, systems):
        search = strategy(case.removesuffix(" within prefixes"), options["beam_size"])
        return generator(systems, VOCAB, search_strategy=search, **options)

    ours, fairseqs = made(PrunedSequenceGenerator, systems), made(SequenceGenerator, by_torch(systems))
    if fairseqs.repeat_ngram_blocker is not None:
        fairseqs.repeat_ngram_blocker = WorkingBlock(options["no_repeat_ngram_size"])
    with caplog.at_level(logging.INFO, "ap_fairseq.search.generator"):
        for seed in range(batches):
            expected = fairseqs.generate([], sample(LENGTHS[:n], seed), prefix_tokens=prefix)
            assert_same(ours.generate([], sample(LENGTHS[:n], seed), prefix_tokens=prefix), expected)
    assert "fairseq's own generator" not in caplog.text


@pytest.mark.parametrize(
    "options", [{}, dict(sampling_topk=4), dict(sampling_topp=0.7)], ids=["all", "top 4", "top 0.7"]
)
@pytest.mark.parametrize("prompt", [0, 10], ids=["translations", "continuations"])
def test_samples_are_distributed_as_fairseqs_and_a_seed_repeats_them(options, prompt):
    """4,000 translations of one sentence each: a chi-square test of how often each of them, or all rare ones, came."""
    vocab = dictionary(6)
    if prompt:
        _, model = language_model(0.5, vocab)
        prefix = batch([prompt + 1], vocab, left=True).to(DEVICE).expand(1000, -1)[:, :-1]
    else:
        model = pruned_model(random_masks(0.5, longest=(9, 9)), vocab, **SIZES).to(DEVICE)
        prefix = None
    model.decoder.output_projection.weight.data.mul_(0.3 if prompt == 0 else 0.1)
    source = batch([4], vocab, left=True).to(DEVICE).expand(1000, -1)
    inputs = {"net_input": {"src_tokens": source, "src_lengths": torch.full((1000,), 4, device=DEVICE)}}

    def sampled(generator, seed):
        search = Sampling(vocab, **options)
        torch.manual_seed(seed)
        made = generator([model], vocab, beam_size=4, max_len_b=prompt + 2, search_strategy=search)
        return [h for sentence in made.generate([], inputs, prefix_tokens=prefix) for h in sentence]

    ours, again, others, fairseqs = (
        sampled(*case) for case in [(PrunedSequenceGenerator, seed) for seed in (1, 1, 2)] + [(SequenceGenerator, 1)]
    )
    texts = [[tuple(h["tokens"].tolist()) for h in part] for part in (ours, again, others, fairseqs)]
    assert texts[0] == texts[1] and texts[0] != texts[2]
    counts = [collections.Counter(part) for part in (texts[0], texts[3])]
    common = [text for text, n in sum(counts, collections.Counter()).items() if n >= 20]
    table = [[count[text] for text in common] + [4000 - sum(count[text] for text in common)] for count in counts]
    table = [[row[k] for row in table] for k in range(len(table[0])) if table[0][k] + table[1][k] > 0]
    assert len(table) >= 8 and scipy.stats.chi2_contingency(table).pvalue > 0.01
    score = {tuple(h["tokens"].tolist()): h["positional_scores"].cpu() for h in fairseqs}
    for h in ours:  # not those of the truncated distribution
        if (text := tuple(h["tokens"].tolist())) in score:
            torch.testing.assert_close(h["positional_scores"], score[text], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("fallback", [None, "tests"])
def test_groups_work_for_any_sentences_of_a_data_set(fallback, monkeypatch):
    """fairseq-generate names them, and fairseq's search took the names for places in the batch: an IndexError."""
    monkeypatch.setattr(PrunedSequenceGenerator, "_not_covered", lambda self, constraints: fallback)
    systems, options = models(), dict(beam_size=4, max_len_b=9)
    named = {**sample(LENGTHS), "id": torch.arange(70, 70 + len(LENGTHS))}
    ours, fairseqs = (
        made(systems, VOCAB, search_strategy=DiverseBeamSearch(VOCAB, 2, 0.5), **options)
        for made in (PrunedSequenceGenerator, SequenceGenerator)
    )
    assert_same(ours.generate([], named), fairseqs.generate([], sample(LENGTHS)))


def test_groups_that_a_beam_has_not_are_refused():
    search = DiverseBeamSearch(VOCAB, 2, 0.5)
    generator = PrunedSequenceGenerator(models(), VOCAB, beam_size=5, search_strategy=search)
    with pytest.raises(UserError, match="--beam 5 is not a multiple of --diverse-beam-groups 2"):
        generator.generate([], sample(LENGTHS))


ALIGNED = {
    "hard": dict(print_alignment="hard"),
    "soft": dict(print_alignment="soft"),
    "prefixes": dict(print_alignment="hard", prefix=[["w5", "w6"], ["w7", "</s>"], []]),
    "another first token": dict(print_alignment="soft", bos_token=7),
    "guided heads": dict(print_alignment="soft", alignment_layer=0, alignment_heads=1),
    "ensemble": dict(print_alignment="soft", n=2),
}


def aligned(hypotheses, how):
    """Alignments as fairseq prints them, of soft ones the numbers."""
    found = [h["alignment"] for sentence in hypotheses for h in sentence]
    return found if how == "hard" else [torch.tensor([[float(p) for p in row] for row in rows]) for rows in found]


@pytest.mark.parametrize(
    ("name", "backend"),
    [
        *((name, "sdpa") for name in ALIGNED),
        *((name, "triton") for name in (ALIGNED if DEVICE == "cuda" else ["prefixes", "soft"])),
    ],
)
def test_alignments_are_those_of_fairseq(name, backend, monkeypatch, caplog):
    case = ALIGNED[name]
    monkeypatch.setattr(alignment, "MAX_ELEMENTS", 9000)  # several passes over the hypotheses
    how, rows, bos = map(case.get, ("print_alignment", "prefix", "bos_token"))
    guided = {option: value for option, value in case.items() if option.startswith("alignment_")}
    systems = models(case.get("n", 1), attention_backend=backend, **guided)
    lengths = LENGTHS if backend == "sdpa" or DEVICE == "cuda" else LENGTHS[:3]
    options = dict(beam_size=3, max_len_b=9, print_alignment=how)
    inputs = dict(prefix_tokens=None if rows is None else prefixes(rows)[: len(lengths)], bos_token=bos)
    fairseqs = SequenceGeneratorWithAlignment(by_torch(systems), VOCAB, **options)
    expected = fairseqs.generate([], sample(lengths), **inputs)
    ours = PrunedSequenceGeneratorWithAlignment(systems, VOCAB, **options)
    with caplog.at_level(logging.INFO, "ap_fairseq.search.generator"):
        found = ours.generate([], sample(lengths), **inputs)
    assert "fairseq's own generator" not in caplog.text and not systems[0].decoder.alignment_needed
    assert_same(found, expected)
    if how == "hard":
        assert aligned(found, how) == aligned(expected, how)
    else:
        for mine, theirs in zip(aligned(found, how), aligned(expected, how), strict=True):
            torch.testing.assert_close(mine, theirs, atol=3e-6, rtol=0)  # they have six digits


def test_guided_alignments_are_those_of_the_layer_and_heads_that_learnt_them():
    """fairseq's `transformer_align` gives them for whole sentences only; translations are aligned by the last layer."""
    guided = dict(alignment_layer=0, alignment_heads=1)
    (model,) = models(sparsity=0.0, **guided)
    options = argparse.Namespace(**{**builders.SIZES, **SIZES}, **guided)
    stock = TransformerAlignModel.build_model(options, builders.task(VOCAB)).eval().to(DEVICE)
    stock.load_state_dict({name: model.state_dict()[name] for name in stock.state_dict()})
    ours = PrunedSequenceGeneratorWithAlignment([model], VOCAB, beam_size=2, max_len_b=9, print_alignment="soft")
    inputs = sample([5, 3])["net_input"]
    for number, hypotheses in enumerate(ours.generate([], {"net_input": inputs})):
        for h in hypotheses:
            source, tokens = inputs["src_tokens"][number], h["tokens"].to(DEVICE)
            with torch.no_grad():
                _, extra = stock(source[None], inputs["src_lengths"][number, None], tokens.roll(1)[None])
            expected = extract_soft_alignment(extra["attn"][0][0], source, tokens, VOCAB.pad(), VOCAB.eos())
            torch.testing.assert_close(*aligned([[h, {"alignment": expected}]], "soft"), atol=3e-6, rtol=0)


def test_a_batch_without_prefixes_may_follow_one_with_them():
    systems = models()
    ours, fairseqs = (
        made(systems, VOCAB, beam_size=3, max_len_b=9) for made in (PrunedSequenceGenerator, SequenceGenerator)
    )
    for prefix in (prefixes([["w5", "w6"]]), None, prefixes([["w7"]])):
        expected = fairseqs.generate([], sample(LENGTHS), prefix_tokens=prefix)
        assert_same(ours.generate([], sample(LENGTHS), prefix_tokens=prefix), expected)


def test_a_reference_of_nothing_is_a_prefix_too():
    """fairseq's search continues one such hypothesis, finds no others, and fails at the maximum length."""
    found = PrunedSequenceGenerator(models(), VOCAB, beam_size=3, max_len_b=9).generate(
        [], sample(LENGTHS), prefix_tokens=prefixes([["</s>"], ["w5"]])
    )
    assert [h["tokens"].tolist() for h in found[0]] == [[VOCAB.eos()]] * 3
    assert all(h["tokens"][0] == VOCAB.index("w5") for h in found[1])


def test_fairseqs_own_search_blocks_ngrams_too(monkeypatch):
    """Stock fairseq without its CUDA extension repeats them (issue 5206), as every sentence here would."""
    monkeypatch.setattr(PrunedSequenceGenerator, "_not_covered", lambda self, constraints: "tests")
    options = dict(beam_size=3, max_len_b=30, min_len=25)

    def repeated(tokens):
        return len({*zip(tokens, tokens[1:], strict=False)}) < len(tokens) - 1

    free, ours = (PrunedSequenceGenerator(models(), VOCAB, no_repeat_ngram_size=n, **options) for n in (0, 2))
    assert all(repeated(h["tokens"].tolist()) for x in free.generate([], sample(LENGTHS)) for h in x)
    assert not any(repeated(h["tokens"].tolist()) for x in ours.generate([], sample(LENGTHS)) for h in x)


@pytest.mark.parametrize(
    ("n", "backend", "lengths", "options"),
    [
        (3, "sdpa", LENGTHS, dict(max_len_b=15, min_len=-1)),
        (3, "sdpa", LENGTHS, dict(max_len_b=5, min_len=5)),
        (2, "triton", LENGTHS[:4], dict(max_len_b=8, min_len=-1)),
    ],
)
def test_an_ensemble_is_averaged_as_in_fairseq(n, backend, lengths, options):
    systems, options = models(n, attention_backend=backend), dict(beam_size=3, max_len_a=0, **options)
    expected = SequenceGenerator(by_torch(systems), VOCAB, **options).generate([], sample(lengths))
    assert_same(PrunedSequenceGenerator(systems, VOCAB, **options).generate([], sample(lengths)), expected)


def test_beams_wider_than_the_kernels_take_are_chosen_from_by_torch(monkeypatch):
    monkeypatch.setattr("triton_ops.beam_state.MAX_KERNEL_BEAM", 2)
    monkeypatch.setattr("triton_ops.beam_search.choose", None)
    systems = models(attention_backend="triton")
    expected = SequenceGenerator(by_torch(systems), VOCAB, beam_size=3, max_len_b=5).generate([], sample([3, 4]))
    generator = PrunedSequenceGenerator(systems, VOCAB, beam_size=3, max_len_b=5)
    assert_same(generator.generate([], sample([3, 4])), expected)


@pytest.mark.parametrize(
    "options", [dict(no_cross_attention=True), dict(adaptive_softmax_cutoff=[8, 20], adaptive_softmax_dropout=0.0)]
)
def test_other_decoders_are_searched_as_in_fairseq(options, caplog):
    systems, options = models(**options), dict(beam_size=3, max_len_b=12, temperature=0.7)
    expected = SequenceGenerator(systems, VOCAB, **options).generate([], sample(LENGTHS))
    with caplog.at_level(logging.INFO, "ap_fairseq.search.generator"):
        assert_same(PrunedSequenceGenerator(systems, VOCAB, **options).generate([], sample(LENGTHS)), expected)
    assert "fairseq's own generator" not in caplog.text


# -- language models --------------------------------------------------------------------------------------------------

ADAPTIVE = dict(**adaptive("8,20"), decoder_input_dim=32, decoder_output_dim=32)
PROMPTS = [12, 9, 17, 14, 10]


def language_model(sparsity: float, vocab=VOCAB, **options):
    """fairseq's model where nothing is pruned, and ours; both lively."""
    stock, ours = language_models(vocab, **{"decoder_embed_dim": 32, "tokens_per_sample": 64, **options})
    for name, parameter in lively(ours).named_parameters():
        if name.endswith(("c_attn", "w_resid")):  # of ones at first
            parameter.data.mul_(torch.linspace(0.5, 2, len(parameter)))
    if sparsity:
        ours.set_masks(causal_masks(sparsity, longest=64))
    stock.load_state_dict({name: ours.state_dict()[name] for name in stock.state_dict()})
    return ours.to(DEVICE) if sparsity else stock.to(DEVICE), ours.to(DEVICE)


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


def test_batches_of_other_shapes_and_changed_models_reuse_or_replace_the_buffers():
    systems = models()
    generator = PrunedSequenceGenerator(systems, VOCAB, beam_size=3, max_len_a=1, max_len_b=5)
    for seed, lengths in enumerate(([3, 4], LENGTHS, [12], [2] * 20)):
        fairseqs = SequenceGenerator(systems, VOCAB, beam_size=3, max_len_a=1, max_len_b=5)
        assert_same(generator.generate([], sample(lengths)), fairseqs.generate([], sample(lengths)))
        with torch.no_grad():  # as training between two validations does
            for parameter in systems[0].parameters():
                parameter.mul_(1.01)
        systems[0].set_masks(random_masks(0.8, seed=seed, longest=(30, 12)))  # as pruning while training does


def test_inference_mode_leaves_nothing_behind_that_training_or_other_batches_cannot_use():
    systems = models(attention_backend="triton" if DEVICE == "cuda" else "sdpa")
    for search in (None, Sampling(VOCAB, sampling_topk=5)):
        generator = PrunedSequenceGenerator(systems, VOCAB, beam_size=2, max_len_b=4, search_strategy=search)
        torch.manual_seed(1)
        with torch.inference_mode():
            inside = generator.generate([], sample(LENGTHS))
        torch.manual_seed(1)
        assert_same(generator.generate([], sample(LENGTHS)), inside)  # now by graphs, with the same random numbers
    source = sample(LENGTHS)["net_input"]["src_tokens"]
    systems[0].train()(source, None, source)[0].sum().backward()
    assert all(p.grad is not None for p in systems[0].parameters())


def test_what_a_search_returns_may_be_trained_on(monkeypatch):
    """Steps on a CPU run in inference mode, whose tensors autograd does not save."""
    if DEVICE == "cpu":
        monkeypatch.setattr(PrunedSequenceGenerator, "_decoder_class", lambda self, device: host_decoder.HostDecoder)
    generator = PrunedSequenceGenerator(models(), VOCAB, beam_size=2, max_len_b=4)
    modes, run = set(), host_decoder.attend
    monkeypatch.setattr(
        host_decoder, "attend", lambda *tensors: modes.add(torch.is_inference_mode_enabled()) or run(*tensors)
    )
    with torch.no_grad():
        hypotheses, encoder_outs = generator.search_on_device(sample(LENGTHS), None, None)
    found = [x for sentence in hypotheses.lists() for one in sentence for x in one.values()]
    found += [x for outs in encoder_outs for values in outs.values() for x in values]
    assert not any(x.is_inference() for x in found)
    assert modes == ({True} if DEVICE == "cpu" else set())


def test_full_pools_drop_dead_rows_and_grow(monkeypatch, paged):
    monkeypatch.setattr(static_decoder, "INITIAL_CAPACITY", 2)
    dropped = []
    real = static_decoder.renumber_live
    monkeypatch.setattr(static_decoder, "renumber_live", lambda rows: dropped.append(rows.numel()) or real(rows))
    systems = models()
    options = dict(beam_size=4, max_len_b=20, min_len=15)
    expected = SequenceGenerator(systems, VOCAB, **options).generate([], sample(LENGTHS))
    assert_same(PrunedSequenceGenerator(systems, VOCAB, **options).generate([], sample(LENGTHS)), expected)
    assert len(dropped) >= 2


@pytest.mark.skipif(DEVICE == "cuda", reason="models are on the GPU")
@pytest.mark.parametrize("case", ["norm after", "norm before", "norm of embeddings", "packed", "double precision"])
def test_slots_of_a_cpu_are_dropped_and_sentences_leave(case, monkeypatch):
    """Weights in double precision are not packed: fairseq's modules compute them. Those of these models are small."""
    if case == "packed":
        monkeypatch.setattr(cpu_linear, "SMALL", 0)
    monkeypatch.setattr(host_decoder, "FIRST_SLOTS", 9)
    monkeypatch.setattr(PrunedSequenceGenerator, "_decoder_class", lambda self, device: host_decoder.HostDecoder)
    kept, sizes, keep, run = [], [], host_decoder.SentenceSlots.keep, host_decoder.HostDecoder._run
    monkeypatch.setattr(
        host_decoder.SentenceSlots,
        "keep",
        lambda self, order, capacity: kept.append((self.used, order.size(1))) or keep(self, order, capacity),
    )
    monkeypatch.setattr(host_decoder.HostDecoder, "_run", lambda self, n, *more: sizes.append(n) or run(self, n, *more))
    norms = dict(decoder_normalize_before=case == "norm before", layernorm_embedding=case == "norm of embeddings")
    systems, options = models(**norms), dict(beam_size=4, max_len_b=30)
    systems = [system.double() if case == "double precision" else system for system in systems]
    expected = SequenceGenerator(systems, VOCAB, **options).generate([], sample(LENGTHS))
    assert_same(PrunedSequenceGenerator(systems, VOCAB, **options).generate([], sample(LENGTHS)), expected)
    assert any(after < before for before, after in kept)
    assert sizes[0] == len(LENGTHS) and sizes == sorted(sizes, reverse=True)
    assert sizes[-1] < len(LENGTHS)


@pytest.mark.skipif(DEVICE == "cuda", reason="models are on the GPU")
def test_a_search_on_a_cpu_remembers_mask_rows_up_to_a_limit(monkeypatch):
    """It remembered every row: of 48 heads at 4,096 columns 0.2 MB a step, for as long as the generator lived."""
    monkeypatch.setattr(host_decoder, "MASK_ROWS_MEMO", 20_000)  # 20 rows or less
    monkeypatch.setattr(PrunedSequenceGenerator, "_decoder_class", lambda self, device: host_decoder.HostDecoder)
    systems, options = models(), dict(beam_size=2, min_len=30, max_len_b=30)
    ours, theirs = (made(systems, VOCAB, **options) for made in (PrunedSequenceGenerator, SequenceGenerator))
    for seed in (0, 1):
        assert_same(ours.generate([], sample(LENGTHS, seed)), theirs.generate([], sample(LENGTHS, seed)))
        for rows in ours.decoder.mask_rows:
            assert 0 < sum(row.numel() for row in rows._common.values()) <= 20_000


@pytest.mark.skipif(DEVICE == "cuda", reason="models are on the GPU")
def test_int8_is_everywhere_and_near(monkeypatch):
    """No layer multiplies in float32, and scores are near those that the model in float32 gives to the same tokens."""
    exact, systems = models(), models()
    made = PrunedSequenceGenerator(systems, VOCAB, beam_size=4, max_len_b=30, cpu_int8=True)
    with monkeypatch.context() as patched:
        for owner, name in ((cpu_linear.FloatProduct, "__init__"), (torch.nn.functional, "linear")):
            patched.setattr(owner, name, None)
        found = made.generate([], sample(LENGTHS))
    off = []
    for number, (best, *_) in enumerate(found):
        source = sample(LENGTHS)["net_input"]["src_tokens"][number]
        off.append((rescored(exact[0], source, best["tokens"]) - best["positional_scores"]).abs())
    assert 0 < torch.cat(off).mean() < 0.1


@pytest.mark.skipif(DEVICE == "cuda", reason="models are on the GPU")
@pytest.mark.parametrize(
    ("message", "change"),
    [
        ("parameters in torch.bfloat16", lambda model: model.bfloat16()),
        ("a model on meta", lambda model: model.to("meta")),
        ("--head-masking", lambda model: setattr(model.decoder.layers[0].encoder_attn, "selected", torch.ones(1))),
        ("--attention-backend triton", lambda model: setattr(model.decoder.layers[0].self_attn, "backend", "triton")),
    ],
)
def test_int8_elsewhere_is_refused(message, change):
    systems = models()
    change(systems[0])
    made = PrunedSequenceGenerator(systems, VOCAB, beam_size=2, max_len_b=3, cpu_int8=True)
    with pytest.raises(UserError, match=f"--cpu-int8 .*{message}"):
        made.generate([], sample(LENGTHS))


def test_rules_changed_after_the_first_batch_hold_for_the_next():
    """The table of penalties was made once, so that another eos or minimum length changed half of the rules."""
    systems = models()
    generator = PrunedSequenceGenerator(systems, VOCAB, beam_size=3, max_len_b=12)
    generator.generate([], sample(LENGTHS))
    generator.min_len, generator.unk_penalty, generator.len_penalty, generator.temperature = 6, 2.0, 0.2, 1.2
    options = dict(beam_size=3, max_len_b=12, min_len=6, unk_penalty=2.0, len_penalty=0.2, temperature=1.2)
    expected = SequenceGenerator(systems, VOCAB, **options).generate([], sample(LENGTHS))
    assert_same(generator.generate([], sample(LENGTHS)), expected)


@pytest.mark.parametrize(
    ("systems", "beam", "imported"),
    [
        (lambda: models(attention_backend="triton"), 3, True),
        (lambda: models(attention_backend="sdpa"), 3, False),
        (lambda: models(attention_backend="triton"), 20, False),
        (lambda: [dense_model(VOCAB)], 3, False),
    ],
    ids=["kernels", "sdpa", "large beam", "stock model"],
)
def test_kernels_are_imported_ahead_where_the_search_runs_them(systems, beam, imported, monkeypatch):
    """Searches that run none of them waited for their import, too."""
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    monkeypatch.delitem(sys.modules, "triton_ops.beam_search", raising=False)
    monkeypatch.delattr(triton_ops, "beam_search", raising=False)
    PrunedSequenceGenerator(systems(), VOCAB, beam_size=beam)
    assert ("triton_ops.beam_search" in sys.modules) is imported


@pytest.mark.parametrize("decoder", ["CPU", "pools", "kernels"])
def test_the_next_search_begins_before_results_are_read(decoder, monkeypatch, request):
    if decoder == "pools":
        request.getfixturevalue("paged")
    systems = models(attention_backend="triton" if decoder == "kernels" else "sdpa")
    lengths = LENGTHS[:4] if decoder == "kernels" else LENGTHS
    batches = [sample(lengths, seed) for seed in range(4)]
    options, events = dict(beam_size=3, max_len_b=12, len_penalty=0.5), []
    expected = [PrunedSequenceGenerator(systems, VOCAB, **options).generate([], batch) for batch in batches]
    begin, read_out = static_decoder.StaticDecoder.begin, beams.read_out
    monkeypatch.setattr(
        static_decoder.StaticDecoder, "begin", lambda self, *args: events.append("begun") or begin(self, *args)
    )
    monkeypatch.setattr(beams, "read_out", lambda *args: events.append("read") or read_out(*args))
    ours = PrunedSequenceGenerator(systems, VOCAB, **options)
    found = [ours.generate([], batch) for batch in look_ahead(batches, DEVICE == "cuda")]
    assert events == ["begun", *["begun", "read"] * 3, "read"]
    for mine, theirs in zip(found, expected, strict=True):
        assert_same(mine, theirs)


@pytest.mark.parametrize(
    "case",
    [
        *("another batch", "longer", "more sentences", "prefix", "samples"),
        *("other rules", "other parameters", "other masks", "inference mode"),
    ],
)
def test_a_search_that_begins_early_is_dropped_or_not_begun(case):
    """What comes may not be what was announced, needs other buffers, or other rules; nothing is mixed up."""
    lengths = {"longer": [300, 5, 3], "more sentences": [5] * 40}.get(case, [4, 9, 5])
    first, then = sample(LENGTHS), sample(lengths, 1)
    options = dict(beam_size=3, max_len_b=12)
    make_strategy = (lambda: Sampling(VOCAB, sampling_topk=4)) if case == "samples" else (lambda: None)
    prefix = torch.full((len(LENGTHS), 2), VOCAB.index("w5"), device=DEVICE) if case == "prefix" else None
    found = []
    for following in (then, None):
        torch.manual_seed(3)
        (system,) = models()
        ours = PrunedSequenceGenerator([system], VOCAB, search_strategy=make_strategy(), **options)
        announced = {**first, FOLLOWING: following} if following else first
        with torch.inference_mode(case == "inference mode"):
            found.append([ours.generate([], announced, prefix_tokens=prefix)])
        if case == "other rules":
            ours.len_penalty, ours.min_len = 0.1, 6
        elif case == "other parameters":
            with torch.no_grad():
                system.encoder.embed_tokens.weight.mul_(-1)
        elif case == "other masks":
            system.set_masks(random_masks(0.8, seed=5, longest=(30, 12)))
        found[-1].append(ours.generate([], sample([6, 2, 7], 2) if case == "another batch" else then))
    for mine, theirs in zip(*found, strict=True):
        assert_same(mine, theirs)


def test_an_error_of_the_next_batch_comes_with_it():
    """Hypotheses of the batch before were lost."""
    first, then = sample([9, 4]), sample([2], 1)
    ours = PrunedSequenceGenerator(models(), VOCAB, beam_size=2, max_len_a=1, max_len_b=0, min_len=5)
    expected = ours.generate([], first)
    assert_same(ours.generate([], {**first, FOLLOWING: then}), expected)
    with pytest.raises(UserError, match=r"--min-len 5 is above the maximum length 2 of this batch"):
        ours.generate([], then)
    assert_same(ours.generate([], first), expected)


def test_a_search_that_was_interrupted_is_begun_anew(monkeypatch):
    """As by Ctrl-C in a notebook: the next call went on with it, a step of which had run and was not counted."""
    first, then = sample(LENGTHS), sample(LENGTHS, 1)
    ours = PrunedSequenceGenerator(models(), VOCAB, beam_size=3, max_len_b=12)
    expected = ours.generate([], then)
    next_step = static_decoder.StaticDecoder._next_step

    def interrupted(self, search):
        next_step(self, search)
        if search.batch.tokens is then["net_input"]["src_tokens"]:
            search.step -= 1
            raise KeyboardInterrupt

    monkeypatch.setattr(static_decoder.StaticDecoder, "_next_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        ours.generate([], {**first, FOLLOWING: then})
    monkeypatch.undo()
    assert_same(ours.generate([], then), expected)


def test_batches_know_the_next_one():
    batches = [{"net_input": k} for k in range(2)] + [{}, {"net_input": 3}]
    seen = [(batch.get("net_input"), batch.get(FOLLOWING)) for batch in look_ahead(batches, on_gpu=False)]
    assert seen == [(0, batches[1]), (1, None), (None, None), (3, None)]
    assert list(look_ahead([], on_gpu=False)) == []


def test_an_error_of_reading_comes_after_the_batches_before_it():
    """The last part of a text before a line that is too long was lost on a GPU, where the next batch is read early."""

    def batches():
        yield from [{"id": 1}, {"id": 2}]
        raise UserError("line 9 has 41 tokens")

    seen = []
    with pytest.raises(UserError, match="line 9 has 41 tokens"):
        for batch in look_ahead(batches(), on_gpu=False):
            seen.append(batch["id"])
    assert seen == [1, 2]


def test_threads_that_share_a_generator_take_turns():
    """The hub gives all threads one generator: they wrote into each other's buffers, and got wrong translations."""
    systems, switch = models(), sys.getswitchinterval()
    ours = PrunedSequenceGenerator(systems, VOCAB, beam_size=3, max_len_b=12)
    expected = [
        SequenceGenerator(systems, VOCAB, beam_size=3, max_len_b=12).generate([], sample(LENGTHS, k)) for k in range(8)
    ]
    sys.setswitchinterval(1e-5)
    try:
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            found = list(pool.map(lambda seed: ours.generate([], sample(LENGTHS, seed)), range(8)))
    finally:
        sys.setswitchinterval(switch)
    for mine, theirs in zip(found, expected, strict=True):
        assert_same(mine, theirs)


@pytest.mark.parametrize("target", [torch.tensor([[4, 2]]), None], ids=["with references", "without"])
def test_what_fairseq_prints_is_on_the_host_after_the_search(target, monkeypatch):
    """It prints source and target token by token, and each would wait for the device; the next search may run there."""
    events = []

    def copy(x):
        events.append("copied")
        return lambda: events.append("waited") or x.numpy()

    class Stock:
        def inference_step(self, generator, models, sample, prefix_tokens, constraints):
            events.append("searched")
            return [[sample, prefix_tokens]]

    class Task(SearchOnDevice, Stock):
        pass

    monkeypatch.setattr("ap_fairseq.search.task.host_copy", copy)
    inputs = {"net_input": {"src_tokens": torch.tensor([[5, 6, 2]])}, "id": torch.tensor([7]), "target": target}
    assert Task().inference_step(None, [], inputs, prefix_tokens=3) == [[inputs, 3]]
    n = 2 if target is None else 3
    assert events == ["copied"] * n + ["searched"] + ["waited"] * n
    assert inputs["net_input"]["src_tokens"].tolist() == [[5, 6, 2]] and inputs["id"].tolist() == [7]
    assert inputs["target"] is None if target is None else inputs["target"].tolist() == [[4, 2]]


@pytest.mark.parametrize("rows", [[4, 6, 3, 2], [[4, 3, 5, 2], [5, 6, 2, 1]], [4, 99, 5, 2], [2], []])
def test_tokens_are_joined_as_in_fairseq(rows):
    ours, theirs = ListDictionary(), Dictionary()
    for word in ("▁a", "b", "▁c"):
        assert ours.add_symbol(word) == theirs.add_symbol(word)
    for options in (
        {},
        dict(escape_unk=True, bpe_symbol="sentencepiece"),
        dict(extra_symbols_to_ignore={5}),
        dict(unk_string="?", include_eos=True, separator="+"),
    ):
        tokens = torch.tensor(rows, dtype=torch.long)
        assert ours.string(tokens, **options) == theirs.string(tokens, **options)
        if tokens.dim() == 1:
            for listed in (rows, list(tokens)):
                assert ours.string(listed, **options) == theirs.string(listed, **options)


@pytest.mark.parametrize("line", ["b ▁c unseen b", "", "another", "\u2003b\x1c▁c\x85b\u200bb\r\n\xa0b"])
@pytest.mark.parametrize(
    "options",
    [{}, dict(add_if_not_exist=False), dict(append_eos=False), dict(reverse_order=True), dict(line_tokenizer=list)],
)
def test_lines_are_encoded_as_in_fairseq(line, options):
    ours, theirs, seen = ListDictionary(), Dictionary(), []
    for words in (ours, theirs):
        words.add_symbol("b")
        words.add_symbol("▁c")
    for more in (options, options | dict(consumer=lambda *pair: seen.append(pair))):
        found, expected = ours.encode_line(line, **more), theirs.encode_line(line, **more)
        assert found.dtype == expected.dtype and found.equal(expected)
    assert seen[: len(seen) // 2] == seen[len(seen) // 2 :]
    assert (ours.symbols, ours.count) == (theirs.symbols, theirs.count)


@pytest.mark.parametrize("n_steps", [1, 2, 9])
def test_hypotheses_are_read_out_along_their_back_pointers(n_steps):
    draw = np.random.default_rng(n_steps)
    parents, tokens = (draw.integers(0, n, (n_steps, 5 * 3), dtype=np.int32) for n in (3, 99))
    sums = draw.standard_normal((n_steps, 5 * 3)).astype(np.float32)
    last, last_step = draw.integers(0, 3, (5, 3)), draw.integers(-1, n_steps, (5, 3), dtype=np.int32)
    last_step[:, 0] = np.maximum(last_step[:, 0], 0)  # every sentence has a hypothesis
    last_step[0] = 0
    last_sum, scores = draw.standard_normal((2, 5, 3)).astype(np.float32)
    scores[0, 1], last_sum[1, 0] = -np.inf, -np.inf
    found = read_out(parents, tokens, sums, last, last_step, last_sum, scores, eos=7)
    for b, hypotheses in enumerate(found.lists()):
        ended = sorted((k for k in range(3) if last_step[b, k] >= 0), key=lambda k: -scores[b, k])
        assert [float(h["score"]) for h in hypotheses] == [scores[b, k] for k in ended]
        for k, hypothesis in zip(ended, hypotheses, strict=True):
            words, totals, place = [7], [last_sum[b, k]], last[b, k]
            for step in reversed(range(last_step[b, k])):
                words.append(tokens[step, b * 3 + place])
                totals.append(sums[step, b * 3 + place])
                place = parents[step, b * 3 + place]
            assert hypothesis["tokens"].tolist() == words[::-1]
            assert hypothesis["positional_scores"].tolist() == np.diff(totals[::-1], prepend=np.float32(0)).tolist()
    again = Hypotheses.of(found.lists(), nbest=3)
    for name in ("counts", "scores", "lengths", "tokens", "positional_scores"):
        assert np.array_equal(getattr(again, name), getattr(found, name)), name
    assert found.best_lengths().tolist() == [len(best["tokens"]) for best, *_ in found.lists()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_scores_are_divided_as_fairseq_divides_them(dtype):
    """By torch, where they are: numpy rounds half precision in another way, and so does a GPU single precision."""
    scores = -10 * torch.rand(2, 999, dtype=dtype)
    words = torch.arange(999)
    found = [[{"tokens": words, "score": x.sum(), "positional_scores": x}] for x in scores]
    made = Hypotheses.of(found, nbest=1, unit=math.log(2))
    assert torch.equal(torch.from_numpy(made.positional_scores), torch.cat([*(scores / math.log(2))]))
    assert torch.equal(torch.from_numpy(made.scores), torch.stack([x.sum() / math.log(2) for x in scores]))


@pytest.mark.parametrize("kind", [PrunedSequenceGenerator, PrunedSequenceGeneratorWithAlignment])
def test_a_search_returns_fairseqs_lists_unless_it_is_asked_for_arrays(kind):
    """A sequence that is no list breaks what users do with the result: ``found + more``, ``found[0] = ...``."""
    generator = kind(by_torch(models()), VOCAB, beam_size=2, max_len_b=5)
    found = generator.generate([], sample(LENGTHS))
    assert type(found) is list and {type(sentence) for sentence in found} == {list}
    generator.in_arrays = True
    again = generator.generate([], sample(LENGTHS))
    assert_same(again.lists() if kind is PrunedSequenceGenerator else again, found)


@pytest.mark.parametrize("nbest", [1, 2, 9])
def test_the_best_hypotheses_alone_are_read_out(nbest):
    """Of five that ``ap-generate`` prints one of: they took longer to read out than half of all steps."""
    generator = PrunedSequenceGeneratorWithAlignment(by_torch(models()), VOCAB, beam_size=4, max_len_b=9)
    every = generator.generate([], sample(LENGTHS))
    assert {len(sentence) for sentence in every} == {4}
    generator.nbest = nbest
    found = generator.generate([], sample(LENGTHS))
    assert_same(found, [sentence[:nbest] for sentence in every])
    for mine, theirs in zip(found, every, strict=True):
        assert [h["alignment"] for h in mine] == [h["alignment"] for h in theirs[:nbest]]


def test_buffers_on_the_device_go_with_the_generator():
    generator = PrunedSequenceGenerator(models(), VOCAB, beam_size=3, max_len_b=5)
    generator.generate([], sample([3, 4]))
    decoder = weakref.ref(generator.decoder)
    gc.disable()  # no cycle keeps them until the next collection
    try:
        del generator
        assert decoder() is None
    finally:
        gc.enable()


def test_the_batch_shrinks_when_sentences_finish(monkeypatch, paged):
    sizes = []
    real = static_decoder.StaticDecoder._run
    monkeypatch.setattr(
        static_decoder.StaticDecoder, "_run", lambda self, n, *more: sizes.append(n) or real(self, n, *more)
    )
    PrunedSequenceGenerator(models(), VOCAB, beam_size=2, max_len_b=20).generate([], sample(LENGTHS))
    assert sizes[0] == 16 and sizes[-1] < 16 and sizes == sorted(sizes, reverse=True)


@pytest.mark.parametrize("decoder", ["CPU", "pools"])
def test_a_search_ends_with_its_longest_hypothesis(decoder, monkeypatch, request):
    """On a CPU, too, it went on for a step: a twentieth of the time of a sentence."""
    if decoder == "pools":
        request.getfixturevalue("paged")
    steps = []
    real = static_decoder.StaticDecoder._next_step
    monkeypatch.setattr(
        static_decoder.StaticDecoder, "_next_step", lambda self, search: steps.append(search) or real(self, search)
    )
    for lengths, seed in (([5], 0), (LENGTHS, 3)):
        steps.clear()
        ours = PrunedSequenceGenerator(models(), VOCAB, beam_size=3, max_len_b=60)
        found = ours.generate([], sample(lengths, seed))
        longest = max(len(h["tokens"]) for sentence in found for h in sentence)
        assert len(steps) == longest + (static_decoder.HOST_LAG_STEPS if DEVICE == "cuda" else 0) < 60


def test_the_host_waits_before_the_encoders_run(monkeypatch, paged):
    """It laid out the slots of a batch, which waits for the device, behind the encoders."""
    order = []
    for kind, name in ((static_decoder.StoredColumns, "slots"), (static_decoder.StaticDecoder, "encode")):
        real = getattr(kind, name)
        monkeypatch.setattr(kind, name, lambda self, *x, real=real, name=name: order.append(name) or real(self, *x))
    PrunedSequenceGenerator(by_torch(models()), VOCAB, beam_size=2, max_len_b=9).generate([], sample(LENGTHS))
    assert order == ["slots", "encode"]


class Repeated:
    """As a captured graph: what was launched once runs again."""

    def __init__(self, run, name):
        self.run, self.name, self.replays = run, name, 0

    def replay(self):
        self.replays += 1
        self.run()


def test_sentences_leave_a_batch_by_a_graph(monkeypatch, paged):
    """A move to fewer places was some forty launches, six times a batch: a twelfth of all time of a search.

    The second batch of a shape, which a graph encodes, lost the steps and moves that the first had captured: its slots
    for columns that no sentence has filled more than the first batch's pool, and the graphs went with that.
    """
    graphs = []

    def capture(self, run):
        graphs.append(Repeated(run, run.__qualname__.split(".")[1]))
        return graphs[-1], None

    def capturing(self, *arguments):
        make(self, *arguments)
        self.capture = self.repeats_sources = True

    make = static_decoder.StaticDecoder.__init__
    monkeypatch.setattr(static_decoder.StaticDecoder, "__init__", capturing)
    monkeypatch.setattr(static_decoder.GraphPool, "capture", capture)
    systems, options = by_torch(models()), dict(beam_size=2, max_len_b=20, no_repeat_ngram_size=2)
    repeating = PrunedSequenceGenerator(systems, VOCAB, **options)
    found = [repeating.generate([], sample(LENGTHS, seed)) for seed in range(3)]
    monkeypatch.undo()
    direct = PrunedSequenceGenerator(systems, VOCAB, **options)
    for seed in range(3):
        assert_same(found[seed], direct.generate([], sample(LENGTHS, seed)))
    moves = [graph for graph in graphs if graph.name == "_shrink"]
    assert collections.Counter(graph.name for graph in graphs) == {
        "_run": len(repeating.decoder.graphs),
        "_shrink": len(repeating.decoder.moves),
        "__call__": 1,
    }
    assert len(moves) >= 2 and sum(graph.replays for graph in moves) >= 2


def rescored(system, source, tokens):
    """The log-probabilities that a model gives to the tokens of a hypothesis, on the CPU."""
    tokens = tokens.to(source.device)
    lengths = source.ne(VOCAB.pad()).sum().view(1)
    with torch.no_grad():
        output = system(source.unsqueeze(0), lengths, tokens.roll(1).unsqueeze(0))
    return system.get_normalized_probs(output, log_probs=True)[0].gather(1, tokens.unsqueeze(1))[:, 0].cpu()


def test_half_precision_translates_as_fairseq_does():
    """Roundings may turn a near tie, but against float32 scores are no further off than in fairseq's own search.

    The test compared the tokens alone, and took two other translations of thirteen, whatever their scores. Which of two
    near ties a search takes is chance, so eight batches count together.
    """
    (system,) = [model.to(torch.bfloat16).eval() for model in models()]
    exact = copy.deepcopy(system).float()
    batches = [sample(LENGTHS, seed) for seed in range(8)]

    def search(generator):
        """The best hypotheses, their float32 scores, and the errors of all scores."""
        best, quality, errors = [], [], []
        for part in batches:
            found = generator([system], VOCAB, beam_size=3, max_len_b=15).generate([], part)
            for source, hypotheses in zip(part["net_input"]["src_tokens"], found, strict=True):
                expected = [rescored(exact, source, h["tokens"]) for h in hypotheses]
                errors += [(h["positional_scores"].cpu() - e).abs() for h, e in zip(hypotheses, expected, strict=True)]
                best.append(hypotheses[0]["tokens"].tolist())
                quality.append(expected[0].mean())
        return best, torch.stack(quality).mean(), torch.cat(errors)

    best, quality, errors = search(PrunedSequenceGenerator)
    fairseqs_best, fairseqs_quality, fairseqs_errors = search(SequenceGenerator)
    assert sum(a == b for a, b in zip(best, fairseqs_best, strict=True)) >= 0.8 * len(best)
    assert errors.mean() <= 1.05 * fairseqs_errors.mean() and errors.max() <= 1.5 * fairseqs_errors.max()
    assert quality >= fairseqs_quality - fairseqs_errors.mean()


@pytest.mark.parametrize(
    ("reason", "systems", "options", "inputs"),
    [
        ("the search Other", models, dict(search_strategy=type("Other", (BeamSearch,), {})(VOCAB)), {}),
        ("a model TransformerModelBase (ap-apply", lambda: [dense_model(VOCAB).to(DEVICE)], {}, {}),
        (
            "LengthConstrainedBeamSearch",
            models,
            dict(search_strategy=LengthConstrainedBeamSearch(VOCAB, 1, 1, 1, 1), max_len_b=14),
            {},
        ),
        ("--beam 20 with a vocabulary of 34 tokens", models, dict(beam_size=20), {}),
    ],
    ids=["search of others", "stock model", "other lengths than the source's", "large beam"],
)
def test_what_is_not_covered_is_left_to_fairseq_and_said_once(reason, systems, options, inputs, caplog):
    made, options = systems(), {"beam_size": 3, "max_len_b": 10, **options}
    generator = PrunedSequenceGenerator(made, VOCAB, **options)
    with caplog.at_level(logging.INFO, "ap_fairseq.search.generator"):
        torch.manual_seed(0)
        ours = generator.generate([], sample(LENGTHS), **inputs)
        torch.manual_seed(0)
        expected = SequenceGenerator(made, VOCAB, **options).generate([], sample(LENGTHS), **inputs)
        assert_same(ours, expected)
        generator.generate([], sample(LENGTHS), **inputs)
    told = [record.message for record in caplog.records if "fairseq's own generator" in record.message]
    assert len(told) == 1 and reason in told[0]


def test_scores_that_are_no_numbers_are_an_error():
    (model,) = made = models()
    model.decoder.layers[0].fc1.weight.data[0, 0] = math.nan
    with pytest.raises(UserError, match=r"sentence 0 of the batch has no hypothesis: all scores are NaN or -inf"):
        PrunedSequenceGenerator(made, VOCAB, beam_size=3, max_len_b=5).generate([], sample(LENGTHS))
    message = " with a model on cuda" if DEVICE == "cuda" else ": a weight is NaN"
    with pytest.raises(UserError, match=f"--cpu-int8{message}"):
        PrunedSequenceGenerator(made, VOCAB, beam_size=3, max_len_b=5, cpu_int8=True).generate([], sample(LENGTHS))


@pytest.mark.parametrize("no_cross_attention", [False, True])
def test_cross_self_attention_translates_with_beams_as_in_fairseq(no_cross_attention):
    """The decoder joins the encoder's output to its own positions, for every hypothesis of a sentence."""
    options = dict(cross_self_attention=True, no_cross_attention=no_cross_attention)
    stock = dense_model(VOCAB, **options).to(DEVICE)
    stock.decoder.output_projection.weight.data.mul_(3)
    model = pruned_model(random_masks(0.0, longest=(30, 30)), VOCAB, **options).to(DEVICE)
    model.load_state_dict(stock.state_dict())
    ours, expected = (
        SequenceGenerator([m], VOCAB, beam_size=3, max_len_b=12).generate([], sample(LENGTHS)) for m in (model, stock)
    )
    assert_same(ours, expected)
