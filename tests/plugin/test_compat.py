"""What is checked when the package is imported, and what fairseq checkpoints of other versions bring along."""

import argparse
import importlib
import subprocess
import sys
import types

import pytest
import torch
from fairseq import checkpoint_utils
from plugin.commands import PLUGIN, run_process

from ap_fairseq import compat, plugin
from ap_fairseq.files import ArtifactError, UserError


@pytest.mark.parametrize("broken", ["missing", "old"])
def test_a_missing_or_old_fairseq_is_named_with_what_to_install(monkeypatch, broken):
    def import_module(name):
        if broken == "missing":
            raise ModuleNotFoundError("No module named 'fairseq'")
        return types.ModuleType(name)  # a fairseq without the classes that the plugin extends

    monkeypatch.setattr(importlib, "import_module", import_module)
    expected = {"missing": "No module named 'fairseq'", "old": "lacks TransformerConfig"}[broken]
    with pytest.raises(ImportError, match=expected) as error:
        compat.require_fairseq()
    assert "pip install 've-fairseq>=0.12.3'" in str(error.value)


def test_only_the_zero_filled_copies_of_0_12_2_are_dropped():
    kept = ["encoder.layers.0.fc1.weight", "encoder.layers.0.self_attn.out_proj.bias", "decoder.layers.0.fc1_weight"]
    copies = [f"encoder.layers.3.{n}_{p}" for n in ("in_proj", "out_proj", "fc1", "fc2") for p in ("weight", "bias")]
    state = dict.fromkeys([*kept, *copies], 0)
    compat.drop_bettertransformer_copies(state)
    assert list(state) == kept


def test_checkpoints_are_read_before_the_plugin_is_registered(tmp_path):
    """ap-evaluate, which loads fairseq late, refused every checkpoint that holds a Namespace."""
    torch.save({"args": argparse.Namespace(arch="transformer"), "model": {}}, tmp_path / "model.pt")
    program = (
        "import sys; from ap_fairseq.model.checkpoints import load_checkpoint; "
        "assert 'ap_fairseq.plugin' not in sys.modules; print(load_checkpoint(sys.argv[1])['args'].arch)"
    )
    done = subprocess.run([sys.executable, "-c", program, tmp_path / "model.pt"], capture_output=True, text=True)
    assert done.stdout == "transformer\n", done.stderr


def test_fairseq_names_the_checkpoint_that_it_cannot_read(tmp_path):
    """fairseq-generate, and fairseq-train that resumed, ended in torch's traceback, in which no file is named."""
    whole, cut, text, other = (tmp_path / f"{name}.pt" for name in ("whole", "cut", "text", "other"))
    torch.save({"args": argparse.Namespace(arch="transformer"), "model": {}}, whole)
    cut.write_bytes(whole.read_bytes()[:-20])
    text.write_text("hello\n")
    torch.save([1], other)
    damaged = "it is cut off, damaged or of another kind; copy it again, or name another file"
    for path, begin, end in (
        (cut, "cannot be read as a checkpoint (RuntimeError: Pytorch", damaged),
        (text, "cannot be read as a checkpoint (KeyError: 101): ", damaged),
        (other, "is not a fairseq checkpoint: ", "name a file that fairseq-train wrote"),
    ):
        with pytest.raises(ArtifactError) as error:
            checkpoint_utils.load_checkpoint_to_cpu(str(path))
        assert str(error.value).startswith(f"{path} {begin}") and str(error.value).endswith(end)
    with pytest.raises(KeyError, match="best_loss"):  # of fairseq, which wants more of it than we do
        checkpoint_utils.load_checkpoint_to_cpu(str(whole))
    with pytest.raises(FileNotFoundError):
        checkpoint_utils.load_checkpoint_to_cpu(str(tmp_path / "missing.pt"))


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("--attention-sparsity 0.8", "--attention-sparsity is a flag of --task pruned_translation; "),
        ("--prune-flags=-x --task language_modeling", "--task pruned_language_modeling; give that in"),
        ("--cpu-int8 --beam 5", "--cpu-int8 is a flag of --task pruned_translation; give that in"),
        ("-a transformer --attention-masks m", "--attention-masks is a flag of --arch pruned_trans"),
        ("--arch=roberta_base --task masked_lm --attention-masks m", "--arch pruned_roberta_base; "),
        ("--arch roberta_base --task masked_lm --cuda-graphs off", None),  # no flag of pruned_roberta_base
        ("--task pruned_translation --attention-sparsity 0.8 --arch pruned_transformer", None),
        ("--arch transformer --max-tokens 9 --update-freq 1 --share-all-embeddings", None),
        ("--task of_the_user --attention-sparsity 0.8 --arch of_the_user --attention-masks m", None),
    ],
)
def test_flags_name_the_task_and_the_architecture_that_they_need(flags, expected):
    """They ended in argparse's "unrecognized arguments", after 300 lines of usage."""
    argv = ["data-bin", *flags.split()]
    if expected is None:
        plugin.require_own_task_and_architecture(argv)
    else:
        with pytest.raises(UserError) as error:
            plugin.require_own_task_and_architecture(argv)
        assert expected in str(error.value)


def test_a_flag_without_its_task_ends_a_training_in_one_line():
    printed = run_process("fairseq-train", "data-bin", *PLUGIN, "--attention-sparsity", 0.8, expect=1)
    assert printed.splitlines()[-1].startswith("fairseq-train: error: --attention-sparsity is a flag of --task")
    assert "Traceback" not in printed and "usage" not in printed
