"""Hypotheses and references are read line by line, and gaps are refused."""

import pytest

from ap_fairseq.artifacts import ArtifactError
from ap_fairseq.evaluation import read_hypotheses, read_lines


def test_only_line_feeds_end_a_line(tmp_path):
    """str.splitlines breaks at U+2028 and others, which shifted references against hypotheses."""
    path = tmp_path / "text"
    path.write_text("one\u2028still one\ntwo\x85\n", encoding="utf-8")
    assert read_lines(path) == ["one\u2028still one", "two\x85"]


def test_the_best_hypothesis_of_each_sentence_in_order(tmp_path):
    path = tmp_path / "log"
    path.write_text("D-1\t-0.1\tb\nH-1\t-0.1\tx\nD-1\t-0.9\tworse\nD-0\t-0.2\ta\n")
    assert read_hypotheses(path) == ["a", "b"]


def test_a_log_with_gaps_is_refused(tmp_path):
    path = tmp_path / "log"
    path.write_text("D-0\t-0.1\ta\nD-2\t-0.1\tc\n")
    with pytest.raises(ArtifactError, match="holds 2 hypotheses for sentences numbered 0 to 2"):
        read_hypotheses(path)
