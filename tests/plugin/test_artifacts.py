"""Statistics and mask files: whole or absent, and never used with what they do not belong to."""

import errno
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import safetensors.numpy
import torch
from hypothesis import given
from hypothesis import strategies as st
from plugin.builders import random_masks, random_stats

from ap_fairseq.artifacts import AttentionStats, PruningMasks, pack_cells, unpack_cells
from ap_fairseq.files import ArtifactError, atomic_output
from ap_fairseq.model import attention
from ap_fairseq.model.checkpoints import save_checkpoint
from ap_fairseq.sites import AttentionKind


@given(st.integers(1, 100), st.integers(0, 2**32 - 1))
def test_packing_is_invertible_on_the_host_and_on_the_device(n, seed):
    keep = np.random.default_rng(seed).random((2, 3, n)) < 0.5
    words = pack_cells(keep)
    assert words.dtype == np.int64 and words.shape[-1] == -(-n // 32) and (words < 2**32).all() and (words >= 0).all()
    np.testing.assert_array_equal(unpack_cells(words, n), keep)
    np.testing.assert_array_equal(attention.unpack_cells(torch.from_numpy(words), n).numpy(), keep)


def test_statistics_survive_a_round_trip(tmp_path):
    stats = random_stats()
    stats.metadata["checkpoint"] = "abc"
    stats.end_mass = {AttentionKind.CROSS: np.random.default_rng(1).random((2, 2))}
    stats.save(tmp_path / "s.safetensors")
    again = AttentionStats.load(tmp_path / "s.safetensors")
    assert again.metadata["checkpoint"] == "abc" and again.architecture == stats.architecture
    for kind in AttentionKind:
        np.testing.assert_array_equal(again.mass[kind], stats.mass[kind])
        np.testing.assert_array_equal(again.support[kind], stats.support[kind])
    np.testing.assert_array_equal(again.end_mass[AttentionKind.CROSS], stats.end_mass[AttentionKind.CROSS])


def test_masks_survive_a_round_trip(tmp_path):
    masks = random_masks(0.5)
    masks.save(tmp_path / "m.safetensors")
    again = PruningMasks.load(tmp_path / "m.safetensors")
    for kind in AttentionKind:
        np.testing.assert_array_equal(again.keep[kind], masks.keep[kind])
        np.testing.assert_array_equal(again.extrapolation[kind], masks.extrapolation[kind])


def test_an_existing_file_is_replaced_only_on_demand(tmp_path):
    path = tmp_path / "m.safetensors"
    random_masks(0.5).save(path)
    before = path.read_bytes()
    with pytest.raises(ArtifactError, match=r"m.safetensors exists; pass --overwrite"):
        random_masks(0.2).save(path)
    assert path.read_bytes() == before
    random_masks(0.2).save(path, overwrite=True)
    assert path.read_bytes() != before


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "out.json"
    path.write_text("old")
    with pytest.raises(RuntimeError, match="disk full"), atomic_output(path, overwrite=True) as temporary:
        temporary.write_text("half")
        raise RuntimeError("disk full")
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["out.json"]


def test_a_terminated_command_leaves_no_file(tmp_path):
    """Job schedulers send SIGTERM."""
    code = """
import sys, time
from ap_fairseq.files import atomic_output
from ap_fairseq.cli.common import command

@command
def main(argv):
    with atomic_output(argv[0]) as temporary:
        temporary.write_text("half")
        print("writing", flush=True)
        time.sleep(60)

main()
"""
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "out")], stdout=subprocess.PIPE) as program:
        assert program.stdout.readline() == b"writing\n" and len(os.listdir(tmp_path)) == 1
        program.terminate()
        assert program.wait(timeout=60) == 143
    assert not os.listdir(tmp_path)


def test_a_full_disk_is_named(tmp_path, monkeypatch):
    def full(*_):
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 28608 vs 28502")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(ArtifactError, match=r"model.pt could not be written: .*; [\d,]+ bytes are free on its disk"):
        save_checkpoint({}, tmp_path / "model.pt", overwrite=False)
    with pytest.raises(ArtifactError, match=r"page.html could not be written: .*No space left.* bytes are free"):
        with atomic_output(tmp_path / "page.html"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert not os.listdir(tmp_path)


def test_a_folder_that_does_not_exist_is_named(tmp_path):
    with pytest.raises(ArtifactError, match=r"folder .*nowhere does not exist; create it first"):
        random_masks(0.5).save(tmp_path / "nowhere" / "m.safetensors")


@pytest.mark.parametrize("damage", ["missing", "empty", "truncated", "garbage", "other format"])
@pytest.mark.parametrize("artifact", [AttentionStats, PruningMasks])
def test_damaged_files_are_named(tmp_path, damage, artifact):
    path = tmp_path / "file.safetensors"
    (random_stats() if artifact is AttentionStats else random_masks(0.5)).save(path)
    whole = path.read_bytes()
    message = "cannot be read as a safetensors file"
    if damage == "missing":
        path.unlink()
        message = "does not exist"
    elif damage == "other format":
        header = {"ap_fairseq": json.dumps({"format": "something-else"})}
        safetensors.numpy.save_file({"x": np.zeros(1)}, path, header)
        message = "has format 'something-else', expected 'ap-"
    else:
        path.write_bytes({"empty": b"", "truncated": whole[: len(whole) // 2], "garbage": b"\xff" * 500}[damage])
    with pytest.raises(ArtifactError, match=message) as error:
        artifact.load(path)
    assert "file.safetensors" in str(error.value)


def test_masks_with_an_empty_row_or_future_cells_are_refused():
    masks = random_masks(0.5)
    masks.keep[AttentionKind.CROSS][0, 0, 2, 0] = False
    with pytest.raises(ArtifactError, match="cross: column 0 must be kept in every row"):
        PruningMasks(masks.keep, masks.extrapolation)
    masks = random_masks(0.5)
    masks.keep[AttentionKind.DECODER_SELF][1, 1, 2, 3] = True
    with pytest.raises(ArtifactError, match="decoder_self: cells with key position > query position"):
        PruningMasks(masks.keep, masks.extrapolation)


def test_masks_of_another_architecture_or_dictionary_are_refused():
    masks = random_masks(0.5)
    masks.metadata["dictionaries"] = {"source": "a" * 64, "target": "b" * 64}
    shape = {kind.value: [2, 2] for kind in AttentionKind}
    masks.require_model(shape, masks.metadata["dictionaries"], "m")
    with pytest.raises(ArtifactError, match="cross 2 layers x 2 heads, the model has .*cross 2 layers x 4 heads"):
        masks.require_model({**shape, "cross": [2, 4]}, masks.metadata["dictionaries"], "m")
    with pytest.raises(ArtifactError, match="the model has encoder_self 2 layers x 2 heads;"):
        masks.require_model({"encoder_self": [2, 2]}, masks.metadata["dictionaries"], "m")
    with pytest.raises(ArtifactError, match="target dictionary with SHA-256 bbbbbbbbbbbb, the data has cccccccccccc"):
        masks.require_model(shape, {"source": "a" * 64, "target": "c" * 64}, "m")
