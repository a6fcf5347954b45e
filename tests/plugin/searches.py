"""Models, and batches to translate with them, for tests of searches."""

import copy
import itertools

import torch
from fairseq.ngram_repeat_block import NGramRepeatBlock
from fairseq.search import DiverseBeamSearch, DiverseSiblingsSearch, LengthConstrainedBeamSearch, Sampling
from plugin.builders import batch, causal_masks, dictionary, language_models, pruned_model, random_masks

from ap_fairseq.model.transformer import PrunedTransformerModel

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
VOCAB = dictionary(30)
SIZES = dict(encoder_embed_dim=32, decoder_embed_dim=32, decoder_input_dim=32, decoder_output_dim=32)
LENGTHS = [5, 2, 7, 11, 3, 9, 4, 6, 8, 10, 12, 5, 7]


def models(n: int = 1, sparsity: float = 0.6, empty_rows: bool = False, **options) -> list[PrunedTransformerModel]:
    """Small models under random masks, each with other masks."""
    made = []
    for seed in range(n):
        masks = random_masks(sparsity, seed=seed, longest=(30, 12), empty_rows=empty_rows)
        model = pruned_model(masks, VOCAB, **SIZES, **options)
        for parameter in model.parameters():
            parameter.data.mul_(1 + seed / 10)
        made.append(lively(model).to(DEVICE))
    return made


def by_torch(systems: list) -> list:
    """Copies whose attention is torch's on a CPU, where Triton's interpreter is slow."""
    if DEVICE == "cuda":
        return systems
    copies = copy.deepcopy(systems)
    for module in itertools.chain.from_iterable(system.modules() for system in copies):
        if hasattr(module, "backend"):
            module.backend = "sdpa"
    return copies


def lively(model):
    """Let hypotheses end everywhere: those of untrained models end nowhere or at once."""
    if model.decoder.adaptive_softmax is None:
        model.decoder.output_projection.weight.data.mul_(3)
        model.decoder.output_projection.weight.data[VOCAB.eos()].mul_(4)
    return model


def sample(lengths, seed: int = 0) -> dict[str, dict[str, torch.Tensor]]:
    """Sentences of those lengths, padded on the left as fairseq does."""
    source = batch(lengths, VOCAB, left=True, seed=seed).to(DEVICE)
    return {"net_input": {"src_tokens": source, "src_lengths": torch.tensor(lengths, device=DEVICE)}}


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
