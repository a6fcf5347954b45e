"""What comes before the steps of a search is replayed for few short sources: with columns that no sentence has."""

import gc
import weakref

import pytest
import torch
from plugin.hypotheses import assert_same
from plugin.searches import DEVICE, VOCAB, models, sample

from ap_fairseq.search.alignment import PrunedSequenceGeneratorWithAlignment
from ap_fairseq.search.generator import PrunedSequenceGenerator
from ap_fairseq.search.source_pass import SourcePass
from ap_fairseq.search.static_decoder import StaticDecoder

BACKEND = "triton" if DEVICE == "cuda" else "sdpa"  # the interpreter is slow


@pytest.fixture
def passes(monkeypatch):
    """The shapes of the passes that began batches. A CPU captures no graph, but can do the same directly."""
    seen = []
    make, call = StaticDecoder.__init__, SourcePass.__call__

    def repeating(self, *arguments):
        make(self, *arguments)
        self.repeats_sources = True

    monkeypatch.setattr(StaticDecoder, "__init__", repeating)
    monkeypatch.setattr(PrunedSequenceGenerator, "_decoder_class", lambda self, device: StaticDecoder)
    monkeypatch.setattr(
        SourcePass, "__call__", lambda self, *x: seen.append(tuple(self.tokens.shape)) or call(self, *x)
    )
    return seen


BATCHES = [[9], [11], [3], [12], [10, 7], [12, 5], [9, 2], [9]]
PASSED = [(1, 12), (1, 12), (2, 12), (2, 12)]  # not the first of a shape


@pytest.mark.parametrize("options", [{}, dict(max_len_a=1.5, max_len_b=3)], ids=["", "lengths by sources"])
@pytest.mark.parametrize("n_models", [1, 2])
def test_hypotheses_are_those_of_single_passes(n_models, options, passes):
    options = dict(beam_size=3, max_len_b=14) | options
    systems = models(n_models, attention_backend=BACKEND)
    generator = PrunedSequenceGenerator(systems, VOCAB, **options)
    found = [generator.generate([], sample(lengths, seed)) for seed, lengths in enumerate(BATCHES)]
    assert passes == PASSED
    for seed, lengths in enumerate(BATCHES):
        alone = PrunedSequenceGenerator(systems, VOCAB, **options)  # its first batch
        assert_same(found[seed], alone.generate([], sample(lengths, seed)))
    assert passes == PASSED


def test_alignments_are_those_of_single_passes(passes):
    system = models(attention_backend=BACKEND)
    generator = PrunedSequenceGeneratorWithAlignment(system, VOCAB, beam_size=2, max_len_b=9)
    for seed, lengths in enumerate(BATCHES):
        alone = PrunedSequenceGeneratorWithAlignment(system, VOCAB, beam_size=2, max_len_b=9)
        ours, expected = (x.generate(system, sample(lengths, seed)) for x in (generator, alone))
        assert [[h["alignment"] for h in row] for row in ours] == [[h["alignment"] for h in row] for row in expected]
    assert passes == PASSED


def test_prefixes_follow_a_pass(passes):
    """A long one is read in one pass of the decoder, over what the encoders said."""
    system = models(attention_backend=BACKEND)
    prefix = torch.randint(4, len(VOCAB), (1, 9)).to(DEVICE)
    generator = PrunedSequenceGenerator(system, VOCAB, beam_size=2, max_len_b=14)
    for seed, lengths in enumerate([[9], [11], [3], [12]]):
        alone = PrunedSequenceGenerator(system, VOCAB, beam_size=2, max_len_b=14)
        ours, expected = (x.generate([], sample(lengths, seed), prefix_tokens=prefix) for x in (generator, alone))
        assert_same(ours, expected)
    assert passes == PASSED[:2]


def test_new_masks_make_a_new_pass(passes):
    (system,) = models(attention_backend=BACKEND)
    generator = PrunedSequenceGenerator([system], VOCAB, beam_size=2, max_len_b=9)
    for seed in range(3):
        generator.generate([], sample([9], seed))
    (other,) = models(sparsity=0.9, attention_backend=BACKEND)
    system.load_state_dict(other.state_dict())
    expected = PrunedSequenceGenerator([system], VOCAB, beam_size=2, max_len_b=9).generate([], sample([9], 7))
    before = [*generator.decoder.source_passes.values()]
    assert_same(generator.generate([], sample([9], 7)), expected)
    assert [*generator.decoder.source_passes.values()] != before


def test_long_or_many_sources_are_encoded_directly(passes):
    system = models(attention_backend=BACKEND)
    generator = PrunedSequenceGenerator(system, VOCAB, beam_size=2, max_len_b=3)
    for _ in range(3):
        generator.generate([], sample([30] * 20))
    assert not passes


def test_buffers_go_with_the_generator(passes):
    """At once, without a search for cycles: the next decoder may need their memory."""
    generator = PrunedSequenceGenerator(models(attention_backend=BACKEND), VOCAB, beam_size=2, max_len_b=9)
    for seed in range(3):
        generator.generate([], sample([9], seed))
    decoder, made = weakref.ref(generator.decoder), [weakref.ref(x) for x in generator.decoder.source_passes.values()]
    gc.disable()
    try:
        generator.decoder = None
        assert passes and decoder() is None and all(x() is None for x in made)
    finally:
        gc.enable()
