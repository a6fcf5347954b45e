"""The dense checkpoint that a benchmark is given."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator

import torch
from fairseq.data import Dictionary
from fairseq.data.data_utils import infer_language_pair

import ap_fairseq.plugin  # noqa: F401  (registers the plugin)
from ap_fairseq.files import UserError
from ap_fairseq.model.checkpoints import load_checkpoint, stored_model
from ap_fairseq.model.config import InheritedConfig
from ap_fairseq.model.conversion import pruned_options
from ap_fairseq.model.pruned_model import PrunedModel
from ap_fairseq.model.stock import convert_to_stock


def trained_model(path: str) -> tuple[dict[str, torch.Tensor], dict]:
    """Return the parameters of a checkpoint, and the options of its transformer by the names of the command line."""
    state = load_checkpoint(path)
    stored = state["cfg"]["model"] if state.get("cfg") else state["args"]
    options = pruned_options(*stored_model(state), stored)
    return state["model"], {name: options[name] for name in InheritedConfig.__dataclass_fields__ if name != "_name"}


@contextlib.contextmanager
def stock_checkpoint(path: str, data: str) -> Iterator[str]:
    """Yield the path of a checkpoint of fairseq's own transformer: *path*, or what `convert_to_stock` makes of it.

    Raises:
        UserError: if it is no translation model, its masks prune anything, or it has other dictionaries than *data*.
    """
    state = load_checkpoint(path)
    name, model = stored_model(state)
    if "encoder.embed_tokens.weight" not in state["model"] or "decoder.embed_tokens.weight" not in state["model"]:
        raise UserError(f"--path {path} is of the architecture {name!r}; give a translation model, or leave it out")
    source, _ = infer_language_pair(data)
    n, words = len(state["model"]["encoder.embed_tokens.weight"]), len(Dictionary.load(f"{data}/dict.{source}.txt"))
    if n != words:
        raise UserError(
            f"--path {path} has {n:,} source tokens, {data} {words:,}; name the data that it was trained on"
        )
    if not issubclass(model or object, PrunedModel):
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        convert_to_stock(path, f"{folder}/stock.pt", data=data)
        yield f"{folder}/stock.pt"


def architecture_of(path: str) -> str:
    """Return e.g. ``transformer (4 + 4 layers of width 256)``."""
    _, own = trained_model(path)
    layers = f"{own['encoder_layers']} + {own['decoder_layers']}"
    return f"transformer ({layers} layers of width {own['decoder_embed_dim']})"
