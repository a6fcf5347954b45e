"""Steps in few kernels: hypotheses and logits are those of the layers' modules."""

import copy

import pytest
import torch
from plugin.builders import adaptive, causal_masks, language_models, pruned_model, random_masks
from plugin.searches import DEVICE, SIZES, VOCAB

from ap_fairseq.search import fused_decoder
from ap_fairseq.search.generator import PrunedSequenceGenerator
from ap_fairseq.search.static_decoder import StaticDecoder
from triton_ops.rows import MAX_ROWS

STEPS = 7 if DEVICE == "cuda" else 5  # the interpreter is slow
LM_SIZES = dict(decoder_embed_dim=32, decoder_input_dim=32, decoder_output_dim=32, max_target_positions=64)


def lively(model, dtype=torch.float16):
    """Let all parameters count, and the softmax be less flat than an untrained one, which has near ties."""
    for name, parameter in model.named_parameters():
        if "layer_norm" in name or name.endswith("bias"):  # ones and zeros at first
            parameter.data.add_(0.3 * torch.randn_like(parameter))
    if model.decoder.adaptive_softmax is None:
        model.decoder.output_projection.weight.data.mul_(4)
    return model.to(DEVICE, dtype).eval()


def translation_model(**options):
    masks = random_masks(0.6, longest=(30, 12))
    return lively(pruned_model(masks, VOCAB, attention_backend="triton", **SIZES, **options))


def language_model(**options):
    _, model = language_models(VOCAB, attention_backend="triton", **LM_SIZES, **options)
    model.set_masks(causal_masks(0.5, longest=64))
    return lively(model)


def inputs(system):
    """Sources of 5 and 3 tokens, or a prompt of each."""
    source = torch.randint(4, len(VOCAB), (2, 5), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    source[1, 3:] = VOCAB.pad()
    batch = {"net_input": {"src_tokens": source, "src_lengths": torch.tensor([5, 3], device=DEVICE)}}
    return batch, None if hasattr(system, "encoder") else source[:, :2]


def tokens(found):
    return [[h["tokens"].tolist() for h in hypotheses] for hypotheses in found]


def search(systems, served=True):
    """Return the tokens of the hypotheses, and the logits of all steps, which no graph replays."""
    logits = []
    make, combined = StaticDecoder.__init__, StaticDecoder._combined

    def uncaptured(self, *arguments):
        make(self, *arguments)
        self.capture = False

    with pytest.MonkeyPatch.context() as patch:
        if not served:
            patch.setattr(fused_decoder, "serves", lambda *_: False)
        patch.setattr(StaticDecoder, "__init__", uncaptured)
        patch.setattr(PrunedSequenceGenerator, "_decoder_class", lambda self, device: StaticDecoder)
        patch.setattr(
            StaticDecoder, "_combined", lambda self, x: logits.append(combined(self, x)) or logits[-1].clone()
        )
        batch, prefix = inputs(systems[0])
        generator = PrunedSequenceGenerator(systems, VOCAB, beam_size=2, max_len_b=STEPS)
        found = generator.generate([], batch, prefix_tokens=prefix)
    return tokens(found), torch.stack(logits).double()


def in_float64(systems):
    exact = [copy.deepcopy(system).double() for system in systems]
    for system in exact:
        for module in system.modules():
            if hasattr(module, "backend"):
                module.backend = "sdpa"
    return exact


CASES = {
    "post-norm": lambda: [translation_model()],
    "pre-norm": lambda: [translation_model(decoder_normalize_before=True, activation_fn="gelu")],
    "no positions": lambda: [
        translation_model(
            no_token_positional_embeddings=True, share_decoder_input_output_embed=True, no_scale_embedding=True
        )
    ],
    "no final norm": lambda: [translation_model(decoder_normalize_before=True, no_decoder_final_norm=True)],
    "ensemble": lambda: [translation_model(), translation_model(decoder_ffn_embed_dim=48)],
    "language model": lambda: [language_model(decoder_normalize_before=True)],
    "learned positions": lambda: [language_model(decoder_learned_pos=True)],
}


@pytest.fixture(scope="module", params=CASES)
def case(request):
    """Systems, what their modules find and compute, and the same in float64."""
    systems = CASES[request.param]()
    return systems, search(systems, served=False), search(in_float64(systems))


@pytest.mark.parametrize("most", [MAX_ROWS, 0], ids=["few", "many"])
def test_steps_are_those_of_the_modules(case, most, monkeypatch):
    """With half-precision errors no larger than theirs, but for the rounding band."""
    systems, (theirs, expected), (found, exact) = case
    used = set()
    monkeypatch.setattr(fused_decoder, "MAX_ROWS", most)
    for name in ("linear_rows", "linear_many"):
        stock = getattr(fused_decoder, name)
        monkeypatch.setattr(
            fused_decoder, name, lambda *x, name=name, stock=stock, **more: used.add(name) or stock(*x, **more)
        )
    assert all(fused_decoder.serves(system.decoder) for system in systems)
    ours, logits = search(systems)
    assert used == {"linear_rows" if most else "linear_many"}
    batch, prefix = inputs(systems[0])
    generator = PrunedSequenceGenerator(systems, VOCAB, beam_size=2, max_len_b=STEPS)  # by graphs where there is a GPU
    for _ in range(3 if DEVICE == "cuda" else 0):
        assert tokens(generator.generate([], batch, prefix_tokens=prefix)) == ours
    assert ours == theirs == found
    error, allowed = ((x - exact).norm() for x in (logits, expected))
    assert error <= allowed + torch.finfo(torch.float16).eps * exact.norm()


def test_changed_weights_are_seen():
    """Graphs hold the addresses of weights, and stacked copies of some."""
    system = translation_model()
    batch, _ = inputs(system)
    generator = PrunedSequenceGenerator([system], VOCAB, beam_size=2, max_len_b=STEPS)
    before = generator.generate([], batch)
    layer = system.decoder.layers[1]
    for parameter in (layer.self_attn.k_proj.weight, layer.encoder_attn_layer_norm.bias, layer.fc2.weight):
        parameter.data.neg_()
    after, _ = search([system], served=False)
    assert tokens(generator.generate([], batch)) == after != tokens(before)


@pytest.mark.parametrize(
    "options",
    [
        dict(activation_fn="tanh"),
        dict(layernorm_embedding=True),
        dict(decoder_output_dim=24),
        dict(decoder_input_dim=24),
        *({name: True} for name in ("scale_heads", "scale_attn", "scale_fc", "scale_resids")),
        adaptive("8,16"),
    ],
    ids=str,
)
def test_other_decoders_are_left_to_their_modules(options):
    _, model = language_models(VOCAB, **{**LM_SIZES, **options})
    assert not fused_decoder.serves(model.half().decoder)


def test_other_parameters_are_left_to_the_modules():
    system = translation_model()
    assert fused_decoder.serves(system.decoder)
    assert not fused_decoder.serves(copy.deepcopy(system).float().decoder)
    weight = system.decoder.layers[0].fc1.weight
    weight.data = weight.data.t().contiguous().t()  # other strides
    assert not fused_decoder.serves(system.decoder)
