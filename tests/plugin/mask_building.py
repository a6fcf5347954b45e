"""Masks of random statistics, and what they keep by definition."""

import numpy as np
from plugin.builders import random_stats

from ap_fairseq.cli import masks as cli_masks
from ap_fairseq.pruning.build import build_masks
from ap_fairseq.pruning.spec import MaskSpec
from ap_fairseq.sites import AttentionKind

ALL = tuple(AttentionKind)
SELF = (AttentionKind.ENCODER_SELF, AttentionKind.DECODER_SELF)


def build(stats, share=0.5, kinds=ALL, **spec):
    return build_masks(stats, MaskSpec({kind: share for kind in kinds}, **spec))


def effective(masks, stats, kind) -> float:
    """Recompute effective sparsity from its definition."""
    weight = np.broadcast_to(stats.support[kind], masks.keep[kind].shape)
    return float((weight * ~masks.keep[kind]).sum() / weight.sum())


def total_mass(masks, stats) -> tuple[float, float]:
    """Effective sparsity and kept mass over all kinds, from their definitions."""
    pairs = sum(stats.support[kind].sum() * np.prod(stats.mass[kind].shape[:2]) for kind in ALL)
    pruned = sum((stats.support[kind] * ~masks.keep[kind]).sum() for kind in ALL)
    kept = sum(stats.mass[kind][masks.keep[kind]].sum() for kind in ALL)
    return pruned / pairs, kept / sum(stats.mass[kind].sum() for kind in ALL)


def peaked_stats(seed=0):
    """Statistics whose kinds differ: attention of sharp heads in the decoder, flat heads in the encoder."""
    stats = random_stats(seed, longest=(30, 40), sentences=300)
    for kind, power in zip(ALL, (1, 12, 4), strict=True):
        weight = (stats.mass[kind] / np.maximum(stats.support[kind], 1)) ** power * (stats.support[kind] > 0)
        stats.mass[kind] = weight / weight.sum(-1, keepdims=True) * stats.support[kind]
    return stats


def ap_masks(*arguments):
    cli_masks.main([str(argument) for argument in arguments])
