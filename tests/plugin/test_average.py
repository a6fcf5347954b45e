"""Which checkpoints ``ap-average --last`` takes; what averaging does to masks is in test_pipeline.py."""

import pytest
import torch

from ap_fairseq.cli import average
from ap_fairseq.cli.average import last_checkpoints
from ap_fairseq.files import ArtifactError
from ap_fairseq.model.checkpoints import average_checkpoints


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


def test_a_folder_that_is_not_there_is_an_error(tmp_path):
    """It was said to have no numbered checkpoints."""
    with pytest.raises(ArtifactError, match="--last 2: .*none is not a folder"):
        last_checkpoints(tmp_path / "none", 2)


def test_averages_count_a_checkpoint_once_and_hold_numbers(tmp_path):
    """A checkpoint named twice counted twice, and one that diverged made an average of NaN, both silently."""
    for name, value in (("a.pt", 1.0), ("b.pt", 3.0), ("diverged.pt", float("inf"))):
        state = {"model": {"weight": torch.tensor([value])}, "cfg": {"model": {"_name": "m"}, "task": {"_name": "t"}}}
        torch.save(state, tmp_path / name)
    (tmp_path / "link.pt").symlink_to("a.pt")
    paths = {name: tmp_path / f"{name}.pt" for name in ("a", "b", "link", "diverged", "out")}
    with pytest.raises(ArtifactError, match="a.pt and .*link.pt are one file, which would count twice; name it once"):
        average_checkpoints([paths["a"], paths["b"], paths["link"]], paths["out"])
    with pytest.raises(ArtifactError, match="diverged.pt: weight is not finite: the model diverged; leave"):
        average_checkpoints([paths["a"], paths["diverged"]], paths["out"])
    assert not paths["out"].exists()
    average_checkpoints([paths["a"], paths["b"]], paths["out"])
    assert torch.load(paths["out"])["model"]["weight"].item() == 2


def test_a_folder_without_a_number_is_told_of_it(tmp_path, capsys):
    """The message asked for a checkpoint, and did not say how to name those of a folder."""
    with pytest.raises(SystemExit):
        average.main([str(tmp_path), "-o", str(tmp_path / "out.pt")])
    assert (
        f"{tmp_path} is a folder; name its checkpoints, or average its last N with --last N" in capsys.readouterr().err
    )
