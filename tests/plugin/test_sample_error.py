"""scripts/sample_error.py: masks of samples against masks of the whole, by hand on small statistics."""

import sys

import numpy as np
import pytest
from plugin.builders import random_stats
from plugin.commands import ROOT

from ap_fairseq.pruning.build import build_masks
from ap_fairseq.pruning.spec import MaskSpec
from ap_fairseq.sites import AttentionKind

sys.path.insert(0, str(ROOT / "scripts"))

import sample_error

SPEC = MaskSpec(budgets={kind: 0.5 for kind in AttentionKind})


def test_the_whole_agrees_with_itself_and_differs_from_another_draw():
    full, other = random_stats(seed=1), random_stats(seed=2)
    for row in sample_error.compare(full, full, SPEC).values():
        assert row["overlap"] == 1 and row["kept_mass"] == row["kept_mass_of_whole"]
        assert row["effective"] == pytest.approx(0.5, abs=0.02)
    for row in sample_error.compare(full, other, SPEC).values():
        assert 0.3 < row["overlap"] < 0.9 and row["kept_mass"] < row["kept_mass_of_whole"]


def test_cells_outside_the_sample_follow_the_pattern_beyond_it():
    """A sample of shorter sentences: cells that it has not seen follow their diagonal, all others its mask."""
    full = random_stats(seed=1, longest=(9, 11))
    sample = random_stats(seed=1, longest=(5, 6))
    masks = build_masks(sample, SPEC)[0]
    for kind in AttentionKind:
        shape = full.support[kind].shape
        found = sample_error.grown(masks, kind, shape)
        rows, columns = masks.keep[kind].shape[2:]
        np.testing.assert_array_equal(found[:, :, :rows, :columns], masks.keep[kind])
        beyond = masks.extrapolation[kind]
        for i, j in ((shape[0] - 1, shape[1] - 1), (shape[0] - 1, 0), (rows, 2)):
            offset = j - i + rows - 1
            expected = beyond[..., offset] if 0 <= offset < beyond.shape[-1] else True
            np.testing.assert_array_equal(found[..., i, j], np.broadcast_to(expected, found.shape[:2]))
