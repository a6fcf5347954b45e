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
from ap_fairseq.files import ArtifactError, atomic_output, refuse_existing
from ap_fairseq.model.attention import PrunedMultiheadAttention
from ap_fairseq.model.checkpoints import save_checkpoint
from ap_fairseq.provenance import describe_sparsity
from ap_fairseq.sites import AttentionKind
from triton_ops import layout


@given(st.integers(1, 100), st.integers(0, 2**32 - 1))
def test_packing_is_invertible_on_the_host_and_on_the_device(n, seed):
    keep = np.random.default_rng(seed).random((2, 3, n)) < 0.5
    words = pack_cells(keep)
    assert words.dtype == np.int64 and words.shape[-1] == -(-n // 32) and (words < 2**32).all() and (words >= 0).all()
    np.testing.assert_array_equal(unpack_cells(words, n), keep)
    np.testing.assert_array_equal(layout.unpack_cells(torch.from_numpy(words), n).numpy(), keep)
    assert torch.equal(layout.pack_cells(torch.from_numpy(keep)), torch.from_numpy(words).to(torch.int32))


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


@pytest.mark.parametrize(
    "sparsity, fault",
    [
        ({"cross": {"effective": 1.5}}, "m.safetensors: its metadata gives cross the effective sparsity 1.5, expected"),
        ({"cross": {}}, "cross the effective sparsity None, expected a share"),
        (
            {"sideways": {"effective": 0.5}},
            "gives sideways .* expected a share in .* of one of the kinds encoder_self, ",
        ),
        ({"cross": {"effective": float("nan")}}, "the metadata of .*m.safetensors holds NaN, which is not a number"),
    ],
)
def test_the_sparsity_in_the_metadata_is_a_share(tmp_path, sparsity, fault):
    """NaN passed, and `ap-masks --like` left such a kind unpruned; without a number it ended in a KeyError."""
    masks = random_masks(0.5)
    header = {**masks.metadata, "format": masks.FORMAT, "architecture": masks.architecture, "sparsity": sparsity}
    safetensors.numpy.save_file(masks.packed(), tmp_path / "m.safetensors", {"ap_fairseq": json.dumps(header)})
    with pytest.raises(ArtifactError, match=fault):
        PruningMasks.load(tmp_path / "m.safetensors")


@pytest.mark.parametrize("name", ["spec", "sparsity"])
@pytest.mark.parametrize("value", [None, ["empty_rows"], "empty_rows"])
def test_metadata_of_another_form_is_refused(name, value):
    """It ended in an AttributeError or a TypeError."""
    masks = random_masks(0.5)
    with pytest.raises(ArtifactError, match=f"its metadata has {name} .*, expected an object"):
        PruningMasks(masks.keep, masks.extrapolation, {name: value})


def test_rows_may_be_empty_of_masks_of_another_program():
    """Such say so in their metadata, and no more; a description of them ended in a KeyError."""
    drawn = random_masks(0.95, empty_rows=True)
    masks = PruningMasks(drawn.keep, drawn.extrapolation, {"spec": {"empty_rows": True}})
    assert describe_sparsity(masks.metadata) == "effective sparsity not told"
    with pytest.raises(ArtifactError, match="must be kept in every row"):
        PruningMasks(drawn.keep, drawn.extrapolation, {"spec": {"empty_rows": "no"}})


def test_an_existing_file_is_replaced_only_on_demand(tmp_path):
    path = tmp_path / "m.safetensors"
    random_masks(0.5).save(path)
    before = path.read_bytes()
    with pytest.raises(ArtifactError, match=r"m.safetensors exists; pass --overwrite"):
        random_masks(0.2).save(path)
    assert path.read_bytes() == before
    random_masks(0.2).save(path, overwrite=True)
    assert path.read_bytes() != before


def test_a_link_stays_a_link(tmp_path):
    """`-o LINK --overwrite` replaced the link by a file and left the file behind it as it was; cp writes through."""
    (tmp_path / "data").mkdir()
    target, middle, link = tmp_path / "data" / "file", tmp_path / "middle", tmp_path / "link"
    target.write_text("old")
    target.chmod(0o640)
    middle.symlink_to(os.path.join("data", "file"))
    link.symlink_to(middle)
    with pytest.raises(ArtifactError, match="link exists; pass --overwrite"):
        refuse_existing(link, overwrite=False)
    with atomic_output(link, overwrite=True) as temporary:
        temporary.write_text("new")
    assert link.is_symlink() and middle.is_symlink() and target.read_text() == "new"
    assert target.stat().st_mode & 0o777 == 0o640
    assert os.listdir(target.parent) == ["file"] and sorted(os.listdir(tmp_path)) == ["data", "link", "middle"]
    with pytest.raises(ArtifactError, match="output .*link is the input .*file"):
        refuse_existing(link, overwrite=True, inputs=[target])


@pytest.mark.parametrize("to", ["nowhere", "link"])
def test_a_link_that_leads_nowhere_is_refused(tmp_path, to):
    """A broken link, or one in a loop, was replaced without --overwrite."""
    link = tmp_path / "link"
    link.symlink_to(to)
    with pytest.raises(ArtifactError, match=f"link is a broken symbolic link .to {to}."):
        refuse_existing(link, overwrite=True)


def test_the_longest_names_can_be_written(tmp_path):
    """The temporary name is longer than the file's."""
    with atomic_output(tmp_path / ("n" * 255)) as temporary:
        temporary.write_text("x")
    assert os.listdir(tmp_path) == ["n" * 255]


def test_a_device_is_no_output(tmp_path):
    """`-o /dev/null --overwrite` as root replaced the device by a file."""
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ArtifactError, match="pipe is not a regular file"):
        refuse_existing(tmp_path / "pipe", overwrite=True)


def test_new_files_have_the_permissions_of_the_umask_which_is_left_alone(tmp_path, monkeypatch):
    """The umask was set to 0 and back for the whole process, while other threads wrote files.

    Nobody but the owner could read statistics and masks: safetensors 0.8 puts a new file in place of the temporary one.
    """
    before = os.umask(0o027)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(os, "umask", None)
            with atomic_output(tmp_path / "file") as temporary:
                assert temporary.stat().st_mode & 0o777 == 0o640
            random_masks(0.5).save(tmp_path / "masks")
        assert {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == dict(file=0o640, masks=0o640)
    finally:
        os.umask(before)


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
        while True:  # a signal that comes just before a sleep is heeded after it
            time.sleep(0.1)

main()
"""
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "out")], stdout=subprocess.PIPE) as program:
        assert program.stdout.readline() == b"writing\n" and len(os.listdir(tmp_path)) == 1
        program.terminate()
        assert program.wait(timeout=60) == 143
    assert not os.listdir(tmp_path)


def test_a_signal_in_a_callback_ends_a_command(tmp_path):
    """Python drops what a callback of a weak reference raises: most trainings of a sweep went on after SIGTERM."""
    code = """
import signal, sys, time, weakref
from ap_fairseq.files import atomic_output
from ap_fairseq.cli.common import command

class Other:
    def __del__(self):
        sys.exit(3)  # dropped, too, but not ours

@command
def main(argv):
    with atomic_output(argv[0]) as temporary:
        temporary.write_text("half")
        Other()
        time.sleep(0.1)
        assert signal.getsignal(signal.SIGALRM) is signal.SIG_DFL  # an alarm from elsewhere is no SIGTERM
        print("goes on", flush=True)
        collected = set()
        reference = weakref.ref(collected, lambda _: signal.raise_signal(signal.SIGTERM))
        del collected
        time.sleep(30)

main()
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "out")], capture_output=True, timeout=100)
    assert done.returncode == 143 and done.stdout == b"goes on\n" and not os.listdir(tmp_path)
    assert done.stderr.count(b"Exception ignored") == 1


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


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 12345\n"
OTHER_FORMAT = {"ap_fairseq": json.dumps({"format": "something-else"})}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path, whole: path.unlink(), "does not exist; expected {expected}"),
        (lambda path, whole: (path.unlink(), path.mkdir()), "is a folder; expected {expected}"),
        (lambda path, whole: (path.unlink(), os.mkfifo(path)), "is not a regular file; expected {expected}"),
        (lambda path, whole: path.write_bytes(b""), "is empty; expected {expected}"),
        (
            lambda path, whole: path.write_bytes(whole[: len(whole) // 2]),
            "cannot be read .* is cut off.* {expected}",
        ),
        (lambda path, whole: path.write_bytes(b"\xff" * 500), "cannot be read as a safetensors file"),
        (lambda path, whole: path.write_bytes(LFS), "is a Git LFS pointer, which stands for {expected}.*git lfs pull"),
        (
            lambda path, whole: safetensors.numpy.save_file({"x": np.zeros(1)}, path),
            "is a safetensors file of another program; expected {expected}",
        ),
        (
            lambda path, whole: safetensors.numpy.save_file({"x": np.zeros(1)}, path, OTHER_FORMAT),
            "has format 'something-else', expected 'ap-.*: {expected}",
        ),
    ],
    ids=["missing", "folder", "fifo", "empty", "cut off", "garbage", "lfs", "other program", "other format"],
)
@pytest.mark.parametrize(
    ("artifact", "expected"),
    [
        (AttentionStats, "attention statistics, which ap-record writes"),
        (PruningMasks, "pruning masks, which ap-masks writes"),
    ],
)
def test_damaged_files_are_named(tmp_path, damage, message, artifact, expected):
    path = tmp_path / "file.safetensors"
    (random_stats() if artifact is AttentionStats else random_masks(0.5)).save(path)
    damage(path, path.read_bytes())
    with pytest.raises(ArtifactError, match=f"file.safetensors {message.format(expected=expected)}"):
        artifact.load(path)


def rewritten(path, change) -> None:
    """Write a file again after *change* of its tensors and metadata."""
    with safetensors.safe_open(str(path), framework="numpy") as archive:
        tensors = {name: archive.get_tensor(name) for name in archive.keys()}
        metadata = json.loads(archive.metadata()["ap_fairseq"])
    change(tensors, metadata)
    safetensors.numpy.save_file(tensors, path, {"ap_fairseq": json.dumps(metadata)})


@pytest.mark.parametrize(
    ("artifact", "change", "message"),
    [
        (AttentionStats, lambda t, m: t.pop("cross.mass"), "the tensor cross.mass is missing"),
        (AttentionStats, lambda t, m: m.pop("architecture"), "its architecture is None, expected some of the kinds"),
        (
            AttentionStats,
            lambda t, m: m["architecture"].update(other=[1, 1]),
            "its architecture is .*'other'.*, expected some of the kinds encoder_self",
        ),
        (
            AttentionStats,
            lambda t, m: m["architecture"].update(cross=[2, 4]),
            r"its tensors are of .*'cross': \[2, 2\].*, its metadata says .*'cross': \[2, 4\]",
        ),
        (
            AttentionStats,
            lambda t, m: t.update({"cross.support": t["cross.support"].astype(np.float64)}),
            "cross.support is float64 of 2 dimensions, expected int64 of 2",
        ),
        (
            AttentionStats,
            lambda t, m: t.update({"cross.mass": t["cross.mass"][:, :, 1:].copy()}),
            r"cross: mass has shape \(2, 2, 8, 11\), support \(9, 11\)",
        ),
        (PruningMasks, lambda t, m: t.pop("cross.range"), "the tensor cross.range is missing"),
        (PruningMasks, lambda t, m: t["cross.range"].fill(70), r"cross: masks of shapes .* for the range \[70, 70\]"),
        (
            PruningMasks,
            lambda t, m: t["encoder_self.range"].__setitem__(1, 9),
            "encoder_self: a mask of 11 x 9 positions",
        ),
        (PruningMasks, lambda t, m: t["cross.range"].fill(-1), r"cross: masks of shapes .* for the range \[-1, -1\]"),
        (PruningMasks, lambda t, m: t["cross.keep"].fill(-1), "cross: bits beyond those of 32 cells"),
        (PruningMasks, lambda t, m: t["cross.keep"].fill(0), "cross: column 0 must be kept"),
    ],
)
def test_damage_inside_a_readable_file_is_named_with_the_file(tmp_path, artifact, change, message):
    """A missing tensor was a KeyError, a range of the wrong size pruned cells silently; some told no remedy."""
    path = tmp_path / "file.safetensors"
    (random_stats() if artifact is AttentionStats else random_masks(0.5)).save(path)
    rewritten(path, change)
    with pytest.raises(ArtifactError, match=f"file.safetensors: {message}.*; .*again$"):
        artifact.load(path)


# -- values -----------------------------------------------------------------------------------------------------------


def _set(name: str, cell: tuple[int, ...], value: float):
    def change(stats: AttentionStats) -> None:
        stats.end_mass = {AttentionKind.CROSS: np.ones((2, 2))}
        getattr(stats, name)[AttentionKind.CROSS][cell] = value

    return change


DIVERGED = ": the model diverged, or its numbers overflow in this precision; record in fp32 .* or with --bf16"
IMPOSSIBLE = [
    (
        _set("mass", (1, 0, 2, 3), np.nan),
        f"cross layer 1 head 0: the attention mass is nan at query 2, key 3{DIVERGED}",
    ),
    (
        _set("mass", (0, 1, 0, 1), np.inf),
        f"cross layer 0 head 1: the attention mass is inf at query 0, key 1{DIVERGED}",
    ),
    (
        _set("importance", (0, 0, 1, 1), np.nan),
        f"cross layer 0 head 0: the importance is nan at query 1, key 1{DIVERGED}",
    ),
    (_set("importance", (0, 0, 1, 1), -np.inf), "the importance is -inf"),
    (_set("end_mass", (1, 1), np.nan), f"cross layer 1 head 1: the mass on the last token is nan{DIVERGED}"),
    (_set("end_mass", (1, 1), -1), "the mass on the last token is -1, expected 0 to inf; the file is damaged"),
    (_set("mass", (0, 0, 4, 4), -0.5), "the attention mass is -0.5 at query 4, key 4, expected 0 to"),
    (_set("mass", (0, 0, 0, 0), 1e6), r"the attention mass is 1e\+06 at query 0, key 0, expected 0 to 41.041"),
    (_set("support", (3, 3), -2), "cross: support is -2 somewhere"),
]


@pytest.mark.parametrize(("change", "message"), IMPOSSIBLE)
def test_values_that_no_recording_gives_are_refused_where_they_are_made_and_read(tmp_path, change, message):
    """A diverged model gave NaN statistics and masks that pruned 23% for --total 0.5, with status 0."""
    stats, path = random_stats(), tmp_path / "file.safetensors"
    change(stats)
    parts = stats.mass, stats.support, stats.metadata, stats.end_mass, stats.importance
    with pytest.raises(ArtifactError, match=message):
        AttentionStats(*parts)
    with pytest.raises(ArtifactError, match=message):
        stats.save(path)
    assert not path.exists()

    def damage(tensors, metadata):
        for name in ("mass", "support", "end_mass", "importance"):
            tensors[f"cross.{name}"] = getattr(stats, name)[AttentionKind.CROSS]

    random_stats().save(path)
    rewritten(path, damage)
    with pytest.raises(ArtifactError, match=f"file.safetensors: .*{message}"):
        AttentionStats.load(path)


# -- merging ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["checkpoint", "dictionaries", "languages", "loss"])
def test_recordings_that_do_not_belong_together_are_refused(tmp_path, key):
    """Importances of different losses and statistics of different languages were summed silently."""
    for seed, name in enumerate("ab"):
        stats = random_stats(seed)
        stats.metadata[key] = f"{key} of {name}"
        stats.save(tmp_path / name)
    message = f"a and .*b cannot be merged: different {key}: {key} of a and {key} of b"
    with pytest.raises(ArtifactError, match=message):
        AttentionStats.load_merged([tmp_path / "a", tmp_path / "b"])


def test_recordings_of_which_one_has_no_importance_merge_whatever_the_loss():
    first, second = random_stats(0), random_stats(1)
    first.metadata["loss"], second.metadata["loss"] = "LabelSmoothedCrossEntropyCriterion", None
    second.importance = {}
    assert not first.merge(second).importance


def test_validation_sentences_of_all_data_count_once(tmp_path):
    """Those of the first file alone were taken, so budgets held on one of several corpora."""
    for name, seed, lengths in (
        ("a", 0, [[2, 3, 5], [4, 4, 1]]),
        ("b", 1, [[2, 3, 1]]),
        ("a again", 2, [[2, 3, 5], [4, 4, 1]]),  # another subset of the same data-bin
        ("no valid", 3, []),
    ):
        stats = random_stats(seed)
        stats.validation_lengths = np.array(lengths, dtype=np.int64).reshape(-1, 3)
        stats.save(tmp_path / name)
    for names, expected in (
        (["a", "b", "a again", "no valid"], [[2, 3, 6], [4, 4, 1]]),
        (["no valid", "a", "a again"], [[2, 3, 5], [4, 4, 1]]),
        (["no valid"], []),
    ):
        merged = AttentionStats.load_merged([tmp_path / name for name in names])
        assert merged.validation_lengths.tolist() == expected


@pytest.mark.parametrize("again", ["same name", "link", "copy"])
def test_statistics_given_twice_are_refused(tmp_path, again):
    """`ap-masks stats.st stats.st` counted every sentence twice."""
    first = second = tmp_path / "a"
    random_stats().save(first)
    if again != "same name":
        second = tmp_path / "b"
        second.symlink_to(first) if again == "link" else second.write_bytes(first.read_bytes())
    with pytest.raises(ArtifactError, match="a are the same statistics, which would count twice; name them once"):
        AttentionStats.load_merged([first, second])


def test_masks_with_an_empty_row_or_future_cells_are_refused():
    masks = random_masks(0.5)
    masks.keep[AttentionKind.CROSS][0, 0, 2, 0] = False
    with pytest.raises(ArtifactError, match="cross: column 0 must be kept in every row"):
        PruningMasks(masks.keep, masks.extrapolation)
    masks = random_masks(0.5)
    masks.keep[AttentionKind.DECODER_SELF][1, 1, 2, 3] = True
    with pytest.raises(ArtifactError, match="decoder_self: cells with key position > query position"):
        PruningMasks(masks.keep, masks.extrapolation)


def test_masks_that_became_invalid_are_not_written(tmp_path):
    masks = random_masks(0.5)
    masks.keep[AttentionKind.CROSS][0, 0, 2, 0] = False
    with pytest.raises(ArtifactError, match="cross: column 0 must be kept in every row"):
        masks.save(tmp_path / "m.st")
    assert not os.listdir(tmp_path)


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


@pytest.mark.parametrize("kind", [AttentionKind.DECODER_SELF, AttentionKind.CROSS])
def test_masks_of_none_keep_every_cell_of_any_size(kind):
    """--attention-masks none: a recorded range of one position, and all that lies beyond it is kept."""
    packed = PruningMasks.all_ones({kind.value: [1, 4]}, {"source": "a", "target": "b"}).packed()
    module = PrunedMultiheadAttention(64, 4, kind=kind)
    module.set_mask(
        *(torch.from_numpy(packed[f"{kind.value}.{name}"][0]) for name in ("keep", "extrapolation")),
        torch.tensor([1, 1]),
    )
    cells = torch.ones(4, 9, 7, dtype=torch.bool)
    assert torch.equal(module.keep_mask(9, 7), cells.tril() if kind.causal else cells)
