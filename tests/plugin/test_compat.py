"""What is checked when the package is imported, and what fairseq checkpoints of other versions bring along."""

import argparse
import importlib
import subprocess
import sys
import types

import pytest
import torch

from ap_fairseq import compat


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
