"""The buffers of a search: what is dropped and kept in them, and how batches, threads and generators share them."""

import collections
import concurrent.futures
import gc
import sys
import weakref

import pytest
import torch
from fairseq.search import Sampling
from fairseq.sequence_generator import SequenceGenerator
from plugin.builders import dense_model, random_masks
from plugin.hypotheses import assert_same
from plugin.searches import DEVICE, LENGTHS, VOCAB, by_torch, models, sample

import triton_ops
from ap_fairseq.model import cpu_linear
from ap_fairseq.search import host_caches, host_decoder, static_decoder
from ap_fairseq.search.generator import PrunedSequenceGenerator


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
    monkeypatch.setattr(host_caches, "FIRST_SLOTS", 9)
    monkeypatch.setattr(PrunedSequenceGenerator, "_decoder_class", lambda self, device: host_decoder.HostDecoder)
    kept, sizes, keep, run = [], [], host_caches.SentenceSlots.keep, host_decoder.HostDecoder._run
    monkeypatch.setattr(
        host_caches.SentenceSlots,
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
@pytest.mark.parametrize(
    ("case", "lengths", "served"),
    [("", [9], True), ("longer than heads are wide", [17], False), ("two sentences", [9, 9], False)]
    + [(case, [9], False) for case in ("padded", "pruned", "int8")],
)
def test_cross_attention_to_one_short_sentence_is_two_products(case, lengths, served, monkeypatch):
    made, init = [], host_decoder.ShortSource.__init__
    monkeypatch.setattr(host_decoder.ShortSource, "__init__", lambda *args: made.append(1) or init(*args))
    monkeypatch.setattr(PrunedSequenceGenerator, "_decoder_class", lambda self, device: host_decoder.HostDecoder)
    systems, options = models(sparsity=0.6 if case == "pruned" else 0.0), dict(beam_size=4, max_len_b=30)
    source = sample(lengths)
    if case == "padded":
        tokens = source["net_input"]["src_tokens"]
        source["net_input"]["src_tokens"] = torch.nn.functional.pad(tokens, (3, 0), value=VOCAB.pad())
    expected = SequenceGenerator(systems, VOCAB, **options).generate([], source)
    found = PrunedSequenceGenerator(systems, VOCAB, **options, cpu_int8=case == "int8").generate([], source)
    assert bool(made) is served
    if case != "int8":
        assert_same(found, expected)


@pytest.mark.skipif(DEVICE == "cuda", reason="models are on the GPU")
def test_a_search_on_a_cpu_remembers_mask_rows_up_to_a_limit(monkeypatch):
    """It remembered every row: of 48 heads at 4,096 columns 0.2 MB a step, for as long as the generator lived."""
    monkeypatch.setattr(host_caches, "MASK_ROWS_MEMO", 20_000)  # 20 rows or less
    monkeypatch.setattr(PrunedSequenceGenerator, "_decoder_class", lambda self, device: host_decoder.HostDecoder)
    systems, options = models(), dict(beam_size=2, min_len=30, max_len_b=30)
    ours, theirs = (made(systems, VOCAB, **options) for made in (PrunedSequenceGenerator, SequenceGenerator))
    for seed in (0, 1):
        assert_same(ours.generate([], sample(LENGTHS, seed)), theirs.generate([], sample(LENGTHS, seed)))
        for rows in ours.decoder.mask_rows:
            assert 0 < sum(row.numel() for row in rows._common.values()) <= 20_000


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
