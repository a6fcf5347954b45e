"""Mean attention for other tools: arrays for numpy users, and the nesting that BertViz-style viewers read."""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from ap_fairseq.artifacts import AttentionStats
from ap_fairseq.files import UserError, atomic_output, write_text
from ap_fairseq.sites import AttentionKind

FORMATS = ("npz", "bertviz-json")


def export(stats: AttentionStats, path, file_format: str, positions: int | None, overwrite: bool = False) -> None:
    """Write the mean attention of all kinds.

    ``npz`` (numpy.load) holds per kind ``{kind}.mean`` float64 (layers, heads, Tq, Tk), 0 where nothing was recorded,
    and ``{kind}.support`` int64 (Tq, Tk), plus ``metadata``, a JSON string.

    ``bertviz-json`` holds the arguments that BertViz's views of encoder-decoder models take:
    ``encoder_attention``, ``decoder_attention`` and ``cross_attention`` as [layer][batch of 1][head][query][key], and
    ``encoder_tokens``, ``decoder_tokens``, here the positions as text. Rows are normalised to sum to 1, because the
    mean of a cell is over the sentences that have it, and these differ along a row.

    Args:
        positions: leave out positions from this one on; None = all.

    Raises:
        ArtifactError: if the statistics are empty or the file cannot be written.
        UserError: for an unknown format or less than one position.
    """
    stats.require_pairs()
    if positions is not None and positions < 1:
        raise UserError(f"the number of positions is {positions}, expected at least 1")
    shown = np.s_[..., :positions, :positions]
    if file_format == "npz":
        arrays = {f"{kind.value}.mean": stats.mean(kind)[shown] for kind in stats.kinds}
        arrays |= {f"{kind.value}.support": stats.support[kind][shown] for kind in stats.kinds}
        with atomic_output(path, overwrite) as temporary, open(temporary, "wb") as stream:
            np.savez_compressed(stream, metadata=np.array(json.dumps(stats.metadata, sort_keys=True)), **arrays)
    elif file_format == "bertviz-json":
        document = bertviz_arguments({kind: stats.mean(kind)[shown] for kind in stats.kinds})
        write_text(path, json.dumps(document, allow_nan=False), overwrite)
    else:
        raise UserError(f"format {file_format!r} is not one of {', '.join(FORMATS)}")


_BERTVIZ = {
    AttentionKind.ENCODER_SELF: "encoder_attention",
    AttentionKind.DECODER_SELF: "decoder_attention",
    AttentionKind.CROSS: "cross_attention",
}


def bertviz_arguments(means: dict[AttentionKind, np.ndarray]) -> dict[str, Any]:
    """Return the arguments of BertViz's ``head_view``/``model_view`` as nested lists, rounded to 6 digits."""
    arguments: dict[str, Any] = {}
    for kind, mean in means.items():
        total = mean.sum(-1, keepdims=True)
        rows = np.divide(mean, total, out=np.zeros_like(mean), where=total > 0)
        arguments[_BERTVIZ[kind]] = rows.round(6)[:, None].tolist()
    for side, kinds in {"encoder": ("encoder_self", "cross"), "decoder": ("decoder_self", "cross")}.items():
        axis = 3 if side == "encoder" else 2
        lengths = [means[kind].shape[axis] for kind in map(AttentionKind, kinds) if kind in means]
        if lengths:
            arguments[f"{side}_tokens"] = [str(position) for position in range(max(lengths))]
    return arguments
