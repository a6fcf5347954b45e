"""Comparison of what two beam searches found."""

import pytest
import torch


def plain(results):
    """Hypotheses as comparable values: [[(tokens, score, positional scores)]]."""
    return [
        [(h["tokens"].tolist(), float(h["score"]), h["positional_scores"].cpu().float()) for h in hypotheses]
        for hypotheses in results
    ]


def assert_same(ours, fairseqs):
    for mine, theirs in zip(plain(ours), plain(fairseqs), strict=True):
        assert [h[0] for h in mine] == [h[0] for h in theirs]
        for (_, score, positional), (_, expected, expected_positional) in zip(mine, theirs, strict=True):
            assert score == pytest.approx(expected, abs=2e-5)
            torch.testing.assert_close(positional, expected_positional, atol=2e-5, rtol=1e-4)
