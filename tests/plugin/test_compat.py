"""What is checked when the package is imported, and what fairseq checkpoints of other versions bring along."""

import importlib
import types

import pytest

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
