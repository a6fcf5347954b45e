"""Which checkpoints ``ap-average --last`` takes; what averaging does to masks is in test_pipeline.py."""

import pytest

from ap_fairseq.cli.average import last_checkpoints
from ap_fairseq.files import ArtifactError


def names(paths) -> list[str]:
    return [path.name for path in paths]


def test_the_last_checkpoints_by_number_not_by_name(tmp_path):
    for name in ("checkpoint_last.pt", "checkpoint_best.pt", "checkpoint9.pt", "checkpoint10.pt", "checkpoint2.pt"):
        (tmp_path / name).touch()
    assert names(last_checkpoints(tmp_path, 2)) == ["checkpoint9.pt", "checkpoint10.pt"]
    for name in ("checkpoint_1_900.pt", "checkpoint_2_1000.pt", "checkpoint_10_5000.pt"):
        (tmp_path / name).touch()
    assert names(last_checkpoints(tmp_path, 2)) == ["checkpoint_2_1000.pt", "checkpoint_10_5000.pt"]


@pytest.mark.parametrize("count", [0, 4])
def test_too_few_checkpoints_are_an_error(tmp_path, count):
    for name in ("checkpoint_1_10.pt", "checkpoint_1_20.pt", "checkpoint_2_30.pt"):
        (tmp_path / name).touch()
    with pytest.raises(ArtifactError, match=f"--last {count}: .* has 3 numbered checkpoints"):
        last_checkpoints(tmp_path, count)
