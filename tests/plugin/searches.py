"""Models, and batches to translate with them, for tests of searches."""

import copy
import itertools

import torch
from plugin.builders import batch, dictionary, pruned_model, random_masks

from ap_fairseq.model.transformer import PrunedTransformerModel

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
VOCAB = dictionary(30)
SIZES = dict(encoder_embed_dim=32, decoder_embed_dim=32, decoder_input_dim=32, decoder_output_dim=32)


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
