"""Masks in checkpoints: what is damaged or lost is said, with the remedy; those of older versions load."""

import logging

import pytest
import torch
from plugin.builders import dictionary, pruned_model, random_masks, task
from plugin.commands import changed_checkpoint, run

from ap_fairseq.artifacts import PruningMasks
from ap_fairseq.files import ArtifactError
from ap_fairseq.model.checkpoints import average_checkpoints, load_checkpoint
from ap_fairseq.model.conversion import apply_masks
from ap_fairseq.provenance import decode_provenance, dictionary_hashes, encode_provenance
from ap_fairseq.sites import architecture

REMEDY = r"copy the checkpoint again, or .*ap-apply CHECKPOINT --attention-masks FILE"


def without(name: str):
    return lambda parameters: {key: value for key, value in parameters.items() if not key.endswith(name)}


def with_metadata(change):
    return lambda parameters: {**parameters, "mask_metadata": change(parameters["mask_metadata"])}


def as_old(parameters: dict, beyond: bool) -> dict:
    """The masks of a checkpoint of version 0.2, or with *beyond* of 0.1."""
    old = {name: value for name, value in parameters.items() if ".offset_" not in name}
    return {name.replace("extrapolation_words", "beyond_words") if beyond else name: x for name, x in old.items()}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (without("mask_metadata"), r"holds attention masks without their provenance \(mask_metadata\)"),
        (with_metadata(lambda x: x[:0]), r"holds attention masks without their provenance \(mask_metadata\)"),
        (with_metadata(lambda x: x[:50]), r"provenance .* \(mask_metadata\) is damaged \(JSONDecodeError"),
        (with_metadata(torch.Tensor.float), r"provenance .* \(mask_metadata\) is damaged \(TypeError"),
        (with_metadata(lambda x: x * 10**12), r"provenance .* \(mask_metadata\) is damaged \(OverflowError"),
        (with_metadata(lambda x: x.new_tensor([ord(c) for c in "[1]"])), "is damaged .TypeError"),
        (with_metadata(lambda x: encode_provenance({"a": 1})), "is damaged .KeyError: 'masks_sha256'"),
        (
            with_metadata(lambda x: encode_provenance({**decode_provenance(x), "dictionaries": ["x"]})),
            "is damaged .Val",
        ),
        (
            with_metadata(lambda x: encode_provenance({**decode_provenance(x), "dictionaries": {"x": 1}})),
            "is damaged .Ty",
        ),
        (without("1.self_attn.keep_words"), "do not match the SHA-256 stored with them"),
        (without("_words"), "do not match the SHA-256 stored with them"),
    ],
)
def test_damaged_masks_are_named_with_the_remedy(damage, message):
    """Without provenance they loaded as "no attention masks"; damage of other kinds ended in a traceback."""
    stored = damage(pruned_model(random_masks(0.5)).state_dict())
    with pytest.raises(ArtifactError, match=f"{message}.*; {REMEDY}"):
        pruned_model().load_state_dict(stored)


def test_a_score_of_a_damaged_checkpoint_is_no_dense_score(dense, data_bin, masks_file, tmp_path):
    """ap-evaluate took masks without provenance for none. ap-apply gives the masks back, as the messages say."""
    pruned, again = tmp_path / "pruned.pt", tmp_path / "again.pt"
    apply_masks(dense, masks_file, pruned, str(data_bin))
    damaged = changed_checkpoint(pruned, tmp_path / "damaged.pt", lambda state: state["model"].pop("mask_metadata"))
    (tmp_path / "text").write_text("die Seite\n", "utf-8")
    scored = f"x={tmp_path / 'text'},{damaged}"
    log = run("ap-evaluate", scored, "--reference", tmp_path / "text", expect=2)
    assert f"{damaged}: this checkpoint holds attention masks without their provenance" in log
    log = run("ap-apply", damaged, "--to-stock", "--data", data_bin, "-o", again, expect=2)
    assert f"{damaged}: this checkpoint holds attention masks without their provenance" in log and not again.exists()
    log = run("ap-apply", damaged, "--attention-masks", masks_file, "--data", data_bin, "-o", again)
    assert "replace those of the checkpoint: their provenance is damaged" in log
    expected, found = (load_checkpoint(path)["model"] for path in (pruned, again))
    assert expected.keys() == found.keys() and all(torch.equal(found[name], x) for name, x in expected.items())


def test_masks_are_said_to_be_replaced_where_they_prune(caplog):
    """It was said of masks that keep everything, too, and of the same masks from a file of another name."""
    caplog.set_level(logging.INFO)
    masks, other = random_masks(0.5, seed=1), random_masks(0.5, seed=2)
    ones = PruningMasks.all_ones(architecture(pruned_model()), dictionary_hashes(task(dictionary())))
    same = PruningMasks(masks.keep, masks.extrapolation, {**masks.metadata, "data": "elsewhere"})
    for stored, said in ((ones, False), (same, False), (other, True)):
        caplog.clear()
        pruned_model(masks).load_state_dict(pruned_model(stored).state_dict())
        assert ("replace those of the checkpoint: effective sparsity" in caplog.text) == said


def test_masks_that_are_loaded_again_are_not_hashed(monkeypatch):
    """--store-ema loads after every update: with a mask file, its average hashed all masks each time."""
    model = pruned_model(random_masks(0.5))
    stored, hashed = model.state_dict(), []
    monkeypatch.setattr(type(model), "masks_sha256", lambda self: hashed.append(self) or "")
    model.load_state_dict({name: x.clone() for name, x in stored.items()})
    assert not hashed


def test_masks_are_said_to_be_dropped_where_they_prune(dense, data_bin, masks_file, tmp_path, caplog):
    """ap-apply --attention-masks none silently dropped those of a pruned checkpoint."""
    paths = [tmp_path / name for name in ("ones.pt", "half.pt", "again.pt", "from-half.pt")]
    apply_masks(dense, "none", paths[0], str(data_bin))
    apply_masks(dense, masks_file, paths[1], str(data_bin))
    apply_masks(paths[0], "none", paths[2], str(data_bin))
    assert "are dropped" not in caplog.text
    apply_masks(paths[1], "none", paths[3], str(data_bin))
    assert f"the masks of {paths[1]} are dropped: effective sparsity" in caplog.text


@pytest.mark.parametrize("beyond", [False, True])
def test_masks_of_older_versions(beyond, tmp_path):
    """Averaged with checkpoints of today, the same masks under older names were an error without a remedy."""
    model = pruned_model(random_masks(0.5))
    state = {"cfg": {"model": {"_name": "m"}, "task": {"_name": "t"}}}
    for name, parameters in (("old", as_old(model.state_dict(), beyond)), ("new", model.state_dict())):
        torch.save({**state, "model": parameters}, tmp_path / f"{name}.pt")
    average_checkpoints([tmp_path / "old.pt", tmp_path / "new.pt"], tmp_path / "average.pt")
    parameters = load_checkpoint(tmp_path / "average.pt")["model"]
    assert parameters.keys() == model.state_dict().keys()
    assert all(torch.equal(parameters[name], value) for name, value in model.state_dict().items())
    loaded = pruned_model()
    loaded.load_state_dict(load_checkpoint(tmp_path / "old.pt")["model"])
    assert loaded.masks_provenance() == model.masks_provenance()


def test_what_does_not_average_is_said_with_the_remedy(tmp_path):
    state = {"cfg": {"model": {"_name": "m"}, "task": {"_name": "t"}}}
    dense, wide = {"weight": torch.ones(2)}, {"weight": torch.ones(3)}
    words = torch.ones(2, 3, 1, dtype=torch.int64)
    files = {
        "dense": dense,
        "wide": wide,
        "more": {**dense, "bias": torch.ones(2)},
        "pruned": {**dense, "attn.keep_words": words},
        "other": {**dense, "attn.keep_words": 2 * words},
    }
    for name, parameters in files.items():
        torch.save({**state, "model": parameters}, tmp_path / name)
    for first, second, message in (
        ("dense", "more", "different parameters, e.g. bias, which .*dense lacks; average checkpoints of one training"),
        ("pruned", "dense", "e.g. attn.keep_words, which .*dense lacks; give that one the same masks with ap-apply"),
        ("dense", "wide", r"weight has shape \(3,\) in .*wide, \(2,\) in .*dense; average checkpoints of one training"),
        ("pruned", "other", "differs between .*other and .*pruned: .* of one training, after its last pruning"),
    ):
        with pytest.raises(ArtifactError, match=message):
            average_checkpoints([tmp_path / first, tmp_path / second], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_masks_of_languages_that_are_not_known_are_of_no_other_direction(caplog):
    """They could not be loaded, as the warning could not be written."""
    model = pruned_model()
    model._languages = ["de", "en"]
    model._warn_of_direction({"languages": [None, None]})
    assert not caplog.messages
    model._warn_of_direction({"languages": ["en", "de"]})
    assert "in another direction: en to de, the data are de to en" in caplog.text
