"""A search that begins before the results of the one before it are read."""

import pytest
import torch
from fairseq.search import Sampling
from plugin.builders import random_masks
from plugin.hypotheses import assert_same
from plugin.searches import DEVICE, LENGTHS, VOCAB, models, sample

from ap_fairseq.files import UserError
from ap_fairseq.search import beams, static_decoder
from ap_fairseq.search.generator import PrunedSequenceGenerator
from ap_fairseq.search.running import FOLLOWING, look_ahead


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
