"""Search loops of others: whatever they do with the hooks of fairseq, a step gives what it gives with stock models."""

import copy

import pytest
import torch
from plugin.builders import batch, dense_model, dictionary, pruned_model, random_masks

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
VOCAB = dictionary(20)
LENGTHS = [5, 2, 7]
SIZES = dict(encoder_embed_dim=32, decoder_embed_dim=32, decoder_input_dim=32, decoder_output_dim=32)


def systems(**options):
    """An all-ones mask, and stock fairseq with the same parameters."""
    stock = dense_model(VOCAB, **SIZES).to(DEVICE)
    ours = pruned_model(random_masks(0.0, longest=(30, 30)), VOCAB, **SIZES, **options).to(DEVICE)
    ours.load_state_dict(stock.state_dict())
    return ours, stock


class Loop:
    """The steps of a search with our model, in the order that its owner likes.

    Stock fairseq computes every step anew from the tokens and the sentence of each hypothesis. Its own incremental
    state does not follow orders across sentences.
    """

    def __init__(self, **options):
        (self.model, self.stock), self.state = systems(**options), {}
        self.source = batch(LENGTHS, VOCAB, left=True).to(DEVICE)
        with torch.no_grad():
            self.encoder_out = self.model.encoder(self.source)
        self.tokens = torch.full((len(LENGTHS), 1), VOCAB.eos(), device=DEVICE)

    def reorder(self, order):
        order = torch.tensor(order, device=DEVICE)
        self.encoder_out = self.model.encoder.reorder_encoder_out(self.encoder_out, order)
        self.model.decoder.reorder_incremental_state_scripting(self.state, order)
        self.source, self.tokens = self.source[order], self.tokens[order]

    def step(self, incremental=True, tolerance=1e-5):
        state = self.state if incremental else None
        with torch.no_grad():
            ours, _ = self.model.decoder(self.tokens, encoder_out=self.encoder_out, incremental_state=state)
            stock, _ = self.stock.decoder(self.tokens, encoder_out=self.stock.encoder(self.source))
        torch.testing.assert_close(ours[:, -1], stock[:, -1], atol=tolerance, rtol=tolerance)
        hypotheses = torch.arange(self.tokens.size(0), device=DEVICE)
        token = 4 + (hypotheses + 3 * self.tokens.size(1)) % 20  # other tokens in every hypothesis
        self.tokens = torch.cat([self.tokens, token[:, None]], 1)


ORDERS = {
    "equal beams": [[0, 0, 1, 1, 2, 2]],
    "other numbers for each sentence": [[0, 0, 0, 1, 2, 2]],
    "sentences in another order": [[2, 2, 0, 0]],
    "one sentence twice": [[1, 1, 0, 2, 2, 1]],
    "a sentence leaves before the first step": [[0, 0, 1, 1, 2, 2], [0, 1, 4, 5]],
    "beams of beams": [[0, 0, 1, 1, 2, 2], [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3, 4, 4, 4, 5, 5, 5]],
    "as many hypotheses, of other sentences": [[0, 0, 1, 1, 2, 2], [0, 2, 2, 3, 5, 0]],
    "beam by beam": [[0, 1, 2, 0, 1, 2]],
}
LATER = {
    "within sentences": lambda n: [*range(n)][::-1] if n < 2 else [1, 0, *range(2, n)],
    "across sentences": lambda n: [n - 1, *range(n - 1)],
    "fewer": lambda n: [0, n - 1],
    "other numbers": lambda n: [0, 0, 0, n - 1, n // 2],
    "many more": lambda n: [k for k in range(n) for _ in range(60)],
}


@pytest.mark.parametrize("later", LATER)
@pytest.mark.parametrize("before", ORDERS)
def test_hypotheses_follow_any_order(before, later):
    """Where sentences had differing numbers of hypotheses, a hypothesis silently read another sentence's source."""
    loop = Loop()
    for order in ORDERS[before]:
        loop.reorder(order)
    loop.step()
    loop.reorder([*range(loop.tokens.size(0))])
    loop.step()
    loop.step()
    loop.reorder(LATER[later](loop.tokens.size(0)))
    loop.step()
    loop.step()


def test_hypotheses_follow_any_order_by_the_kernels():
    loop = Loop(attention_backend="triton")
    for order in ([0, 0, 1, 1, 2, 2], [1, 0, 2, 2, 5, 5], [0, 0, 0, 5, 2], [4, 0]):
        loop.reorder(order)
        loop.step(tolerance=1e-4)


def test_beams_may_start_from_one_hypothesis_each():
    """A search that steps once for each sentence and then repeats it had caches too small for the next step."""
    loop = Loop()
    loop.step()
    loop.reorder([k for k in range(3) for _ in range(90)])
    loop.step()


@pytest.mark.parametrize("order", ORDERS)
def test_a_repeated_encoder_output_serves_whole_sentences_too(order):
    """Scoring n-best lists without incremental state: repetitions that were only noted failed in shapes."""
    loop = Loop()
    for step in ORDERS[order]:
        loop.reorder(step)
    for _ in range(3):
        loop.step(incremental=False)


@pytest.mark.parametrize("incremental", [True, False])
def test_an_encoder_output_that_others_repeat_is_read_as_it_is(incremental):
    loop = Loop()
    loop.encoder_out = {
        "encoder_out": [loop.encoder_out["encoder_out"][0].repeat_interleave(2, 1)],
        "encoder_padding_mask": [loop.encoder_out["encoder_padding_mask"][0].repeat_interleave(2, 0)],
    }
    loop.tokens, loop.source = (x.repeat_interleave(2, 0) for x in (loop.tokens, loop.source))
    for _ in range(3):
        loop.step(incremental)


@pytest.mark.parametrize("incremental", [True, False])
@pytest.mark.parametrize(("repeated", "n"), [(1, 6), (2, 3), (2, 12), (2, 5)])
def test_hypotheses_without_an_encoder_output_of_their_own_are_refused(repeated, n, incremental):
    """Tokens in the order of beams were taken for those of sentences: each read another one's source."""
    loop = Loop()
    loop.reorder([k for k in range(3) for _ in range(repeated)])
    loop.tokens = loop.tokens[:1].repeat(n, 1)
    message = rf"{n} hypotheses, but encoder output of {3 * repeated} \(3 sentences x {repeated}\): repeat it with"
    with pytest.raises(ValueError, match=message):
        loop.step(incremental)


def test_a_search_may_go_on_from_a_copy_of_its_state():
    """As look-ahead does: the branches share nothing that a step changes."""
    loop = Loop()
    loop.step()
    branch = copy.copy(loop)
    branch.state = copy.deepcopy(loop.state)
    branch.reorder([2, 2, 0])
    for _ in range(2):
        branch.step()
        loop.step()


@pytest.mark.parametrize("order", ORDERS)
def test_alignments_belong_to_their_hypotheses(order):
    loop = Loop()
    for step in ORDERS[order]:
        loop.reorder(step)
    options = dict(incremental_state={}, alignment_layer=1)
    with torch.no_grad():
        ours = loop.model.decoder.extract_features(loop.tokens, encoder_out=loop.encoder_out, **options)
        stock = loop.stock.decoder.extract_features(loop.tokens, encoder_out=loop.stock.encoder(loop.source), **options)
    torch.testing.assert_close(ours[1]["attn"][0], stock[1]["attn"][0], atol=1e-5, rtol=1e-5)


def test_alignments_with_a_shift_of_other_hypotheses_are_refused():
    loop = Loop()
    loop.encoder_out["encoder_out"] = [loop.encoder_out["encoder_out"][0].repeat(1, 2, 1)]
    loop.encoder_out["encoder_padding_mask"] = [loop.encoder_out["encoder_padding_mask"][0].repeat(2, 1)]
    options = dict(encoder_out=loop.encoder_out, incremental_state={}, alignment_layer=1)
    with pytest.raises(ValueError, match="alignments of 6 hypotheses need the source_shift of each, got 3"):
        loop.model.decoder.extract_features(loop.tokens.repeat(2, 1), **options)
