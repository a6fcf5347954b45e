"""scripts/sample_error.py: masks of samples against masks of the whole, by hand on small statistics."""

import pytest
import sample_error
from plugin.builders import random_stats

from ap_fairseq.pruning.spec import MaskSpec
from ap_fairseq.sites import AttentionKind

SPEC = MaskSpec(budgets={kind: 0.5 for kind in AttentionKind})


def test_the_whole_agrees_with_itself_and_differs_from_another_draw():
    full, other = random_stats(seed=1), random_stats(seed=2)
    for row in sample_error.compare(full, full, SPEC).values():
        assert row["overlap"] == 1 and row["kept_mass"] == row["kept_mass_of_whole"]
        assert row["effective"] == pytest.approx(0.5, abs=0.02)
    for row in sample_error.compare(full, other, SPEC).values():
        assert 0.3 < row["overlap"] < 0.9 and row["kept_mass"] < row["kept_mass_of_whole"]
