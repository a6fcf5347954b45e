"""The plugin's beam search gives fairseq's hypotheses and scores; what it does not cover, it leaves to fairseq."""

import argparse
import collections
import copy
import logging
import math

import pytest
import scipy.stats
import torch
from fairseq.models.transformer_align import TransformerAlignModel
from fairseq.search import BeamSearch, DiverseBeamSearch, LengthConstrainedBeamSearch, Sampling
from fairseq.sequence_generator import SequenceGenerator, SequenceGeneratorWithAlignment
from fairseq.utils import extract_soft_alignment
from plugin import builders
from plugin.builders import batch, dense_model, dictionary, pruned_model, random_masks
from plugin.hypotheses import assert_same
from plugin.searches import (
    DEVICE,
    LENGTHS,
    SIZES,
    VOCAB,
    WorkingBlock,
    by_torch,
    language_model,
    models,
    sample,
    strategy,
)

from ap_fairseq.files import UserError
from ap_fairseq.model import cpu_linear
from ap_fairseq.search import alignment
from ap_fairseq.search.alignment import PrunedSequenceGeneratorWithAlignment
from ap_fairseq.search.generator import PrunedSequenceGenerator


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
