"""What a search found: read out, cut to the best, and in the forms that fairseq's commands take."""

import math

import numpy as np
import pytest
import torch
from fairseq.data import Dictionary
from plugin.hypotheses import assert_same
from plugin.searches import LENGTHS, VOCAB, by_torch, models, sample

from ap_fairseq.search.alignment import PrunedSequenceGeneratorWithAlignment
from ap_fairseq.search.generator import PrunedSequenceGenerator
from ap_fairseq.search.hypotheses import Hypotheses, read_out
from ap_fairseq.search.task import ListDictionary, SearchOnDevice


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
