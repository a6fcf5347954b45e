"""Small objects for tests that need no files."""

import argparse

import numpy as np
import torch
from fairseq.data import Dictionary
from fairseq.models.transformer import TransformerConfig, TransformerModelBase
from fairseq.models.transformer_lm import TransformerLanguageModel

from ap_fairseq.artifacts import AttentionStats, PruningMasks
from ap_fairseq.lengths import counted, support_of
from ap_fairseq.model.config import PrunedLanguageModelConfig, PrunedTransformerConfig
from ap_fairseq.model.language_model import PrunedLanguageModel
from ap_fairseq.model.transformer import PrunedTransformerModel
from ap_fairseq.pruning.build import build_masks
from ap_fairseq.pruning.spec import MaskSpec
from ap_fairseq.relative import RelativeStats, offset_support, rows_by_centre, slope_of
from ap_fairseq.sites import AttentionKind


def dictionary(n_words: int = 20) -> Dictionary:
    vocab = Dictionary()
    for k in range(n_words):
        vocab.add_symbol(f"w{k}")
    return vocab


def task(vocab: Dictionary):
    """The part of a translation task that building a model reads."""
    cfg = argparse.Namespace(left_pad_target=False)
    return argparse.Namespace(cfg=cfg, source_dictionary=vocab, target_dictionary=vocab)


SIZES = dict(
    encoder_layers=2,
    decoder_layers=2,
    encoder_embed_dim=16,
    decoder_embed_dim=16,
    encoder_ffn_embed_dim=32,
    decoder_ffn_embed_dim=32,
    encoder_attention_heads=2,
    decoder_attention_heads=2,
    decoder_input_dim=16,
    decoder_output_dim=16,
    dropout=0.0,
)


def pruned_model(masks: PruningMasks | None = None, vocab: Dictionary | None = None, **options):
    """An untrained pruned transformer in eval mode."""
    torch.manual_seed(3)
    cfg = PrunedTransformerConfig(**{**SIZES, **options})
    model = PrunedTransformerModel.build_model(cfg, task(vocab or dictionary()))
    if masks is not None:
        model.set_masks(masks)
    return model.eval()


def dense_model(vocab: Dictionary | None = None, **options):
    """fairseq's own transformer with the same sizes and the same seed."""
    torch.manual_seed(3)
    cfg = TransformerConfig.from_namespace(argparse.Namespace(**{**SIZES, **options}))
    return TransformerModelBase.build_model(cfg, task(vocab or dictionary())).eval()


LM_SIZES = dict(
    decoder_layers=2,
    decoder_embed_dim=16,
    decoder_input_dim=16,
    decoder_output_dim=16,
    decoder_ffn_embed_dim=32,
    decoder_attention_heads=2,
    tokens_per_sample=16,
    max_target_positions=None,
    add_bos_token=False,
    tpu=False,
    dropout=0.0,
)


def language_models(vocab: Dictionary, seed: int = 5, **options):
    """fairseq's language model and ours under all-ones masks, from the same seed, in eval mode."""
    built = []
    lm_task = argparse.Namespace(cfg=None, source_dictionary=vocab, target_dictionary=vocab)
    for model, masks in ((TransformerLanguageModel, {}), (PrunedLanguageModel, {"attention_masks": "none"})):
        torch.manual_seed(seed)
        cfg = PrunedLanguageModelConfig(**{**LM_SIZES, **options, **masks})
        built.append(model.build_model(cfg, lm_task).eval())
    return built


def adaptive(cutoff: str) -> dict[str, object]:
    """Options of a language model whose input and softmax are adaptive and share parameters."""
    tied = dict.fromkeys(("adaptive_input", "tie_adaptive_weights", "tie_adaptive_proj"), True)
    return {**tied, "adaptive_input_cutoff": cutoff, "adaptive_softmax_cutoff": cutoff}


def random_stats(
    seed: int = 0, longest=(9, 11), sentences: int = 40, layers: int = 2, heads: int = 2
) -> AttentionStats:
    """Statistics with random attention and importance on random (target, source) lengths up to *longest*."""
    draw = np.random.default_rng(seed)
    drawn = [[draw.integers(1, side + 1) for side in longest] for _ in range(sentences)]
    counts = counted(np.array([[*pair, 1] for pair in (longest, *drawn)]))
    support = {kind: support_of(kind, counts) for kind in AttentionKind}
    mass = {kind: draw.random((layers, heads, *n.shape)) * n for kind, n in support.items()}
    importance = {kind: draw.random((layers, heads, *n.shape)) * n for kind, n in support.items()}
    slope = slope_of(int(counts[:, 1] @ counts[:, 2]), int(counts[:, 0] @ counts[:, 2]))
    pairs = offset_support(rows_by_centre(counts, slope))
    relative = RelativeStats(slope, *(draw.random((layers, heads, len(pairs))) * pairs for _ in range(2)))
    longer = counts * [2, 2, 1]  # than the recorded sentences
    return AttentionStats(
        mass, support, {}, importance=importance, lengths=counts, relative=relative, validation_lengths=longer
    )


def random_masks(
    sparsity: float, seed: int = 0, kinds=tuple(AttentionKind), empty_rows: bool = False, **shape
) -> PruningMasks:
    """Random masks of the given effective sparsity in *kinds*; the other kinds are kept whole."""
    budgets = {kind: sparsity for kind in kinds}
    spec = MaskSpec(budgets, criterion="random", seed=seed, extrapolate="keep", empty_rows=empty_rows)
    return build_masks(random_stats(**shape), spec).masks


def causal_masks(sparsity: float, longest: int = 16, seed: int = 0) -> PruningMasks:
    """Random masks of a language model."""
    kind, drawn = AttentionKind.DECODER_SELF, random_masks(sparsity, seed, longest=(longest, longest))
    return PruningMasks({kind: drawn.keep[kind]}, {kind: drawn.extrapolation[kind]})


def batch(lengths, vocab: Dictionary, left: bool, seed: int = 0) -> torch.Tensor:
    """Random token rows ending in EOS, padded on one side: int64 (B, T)."""
    draw = torch.Generator().manual_seed(seed)
    rows = torch.full((len(lengths), max(lengths)), vocab.pad())
    for row, length in zip(rows, lengths, strict=True):
        tokens = torch.randint(vocab.nspecial, len(vocab), (length,), generator=draw)
        tokens[-1] = vocab.eos()
        row[len(row) - length if left else 0 :][:length] = tokens
    return rows
