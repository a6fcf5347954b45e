#!/usr/bin/env python3
"""Read the output of ``ap-report export`` and print where each head looks: a start for your own analysis.

    ap-report export --stats stats.safetensors --format npz -o mean.npz
    python examples/mean_attention.py mean.npz

    ap-report export --stats stats.safetensors --format bertviz-json --positions 30 -o mean.json
    python examples/mean_attention.py mean.json

In a notebook with BertViz installed, the second file is shown by::

    from bertviz import model_view
    model_view(**load_bertviz("mean.json"))
"""

import argparse
import json
import os
import signal

import numpy as np


def load_npz(path: str) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], dict]:
    """Return mean attention {kind: (layers, heads, Tq, Tk)}, support {kind: (Tq, Tk)} and the provenance."""
    with np.load(path) as archive:
        mean = {name.removesuffix(".mean"): archive[name] for name in archive if name.endswith(".mean")}
        support = {name.removesuffix(".support"): archive[name] for name in archive if name.endswith(".support")}
        return mean, support, json.loads(str(archive["metadata"]))


def load_bertviz(path: str) -> dict:
    """Return the arguments of ``bertviz.model_view`` and ``bertviz.head_view``: tensors (1, heads, Tq, Tk) by layer."""
    import torch

    with open(path, encoding="utf-8") as stream:
        arguments = json.load(stream)
    return {
        name: value if name.endswith("_tokens") else [torch.tensor(layer) for layer in value]
        for name, value in arguments.items()
    }


def main(path: str) -> None:
    if path.endswith(".json"):
        arguments = load_bertviz(path)
        maps = {name: np.stack(value)[:, 0] for name, value in arguments.items() if not name.endswith("_tokens")}
    else:
        maps = load_npz(path)[0]
    for name, mean in maps.items():
        layers, heads, queries, keys = mean.shape
        print(f"{name}: {layers} layers, {heads} heads, {queries} x {keys} positions")
        for layer, head in np.ndindex(layers, heads):
            query, key = (
                np.unravel_index(mean[layer, head, 1:].argmax(), (queries - 1, keys)) if queries > 1 else (-1, 0)
            )
            share = mean[layer, head, query + 1, key]
            print(f"  {layer}.{head}: most from query {query + 1} to key {key}, {share:.3f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", help="what ap-report export wrote, .npz or .json")
    file = parser.parse_args().file
    if not os.path.isfile(file):
        parser.error(f"{file} does not exist; make it with ap-report export")
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # "| head" ends it silently
    main(file)
