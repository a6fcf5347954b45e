"""A toy corpus and the artefacts of each stage, made once through the real commands."""

import itertools
import random
from pathlib import Path

import pytest
from plugin.commands import run, sentence_pairs, train

import ap_fairseq.plugin  # noqa: F401  (registers with fairseq)
from ap_fairseq.search.generator import PrunedSequenceGenerator, log_fallback
from ap_fairseq.search.static_decoder import StaticDecoder


@pytest.fixture(scope="session")
def toy_text(tmp_path_factory) -> Path:
    """Raw text: {train,valid,test}.{en,de}."""
    folder = tmp_path_factory.mktemp("text")
    pairs = sentence_pairs(1300, seed=1)
    random.Random(2).shuffle(pairs)
    for split, (first, last) in {"train": (0, 1000), "valid": (1000, 1060), "test": (1060, 1280)}.items():
        for side, language in enumerate(("en", "de")):
            (folder / f"{split}.{language}").write_text("".join(p[side] + "\n" for p in pairs[first:last]), "utf-8")
    return folder


@pytest.fixture(scope="session")
def data_bin(toy_text, tmp_path_factory) -> Path:
    """The toy corpus, binarised by fairseq-preprocess."""
    folder = tmp_path_factory.mktemp("data") / "data-bin"
    run(
        *["fairseq-preprocess", "-s", "en", "-t", "de", "--joined-dictionary", "--destdir", folder],
        *itertools.chain(*[(f"--{split}pref", toy_text / split) for split in ("train", "valid", "test")]),
    )
    return folder


@pytest.fixture(scope="session")
def text_bin(toy_text, tmp_path_factory) -> Path:
    """The English side of the toy text, binarised for language models."""
    folder = tmp_path_factory.mktemp("text-bin") / "data-bin"
    prefixes = [word for split in ("train", "valid", "test") for word in (f"--{split}pref", toy_text / f"{split}.en")]
    run("fairseq-preprocess", "--only-source", "--destdir", folder, *prefixes)
    return folder


@pytest.fixture(scope="session")
def dense(data_bin, tmp_path_factory) -> Path:
    """A dense checkpoint, trained with fairseq's default left padding of the source."""
    folder = tmp_path_factory.mktemp("dense")
    train(data_bin, folder)
    return folder / "checkpoint_last.pt"


@pytest.fixture(scope="session")
def stats_file(data_bin, dense, tmp_path_factory) -> Path:
    """Statistics of the dense model on the training data, recorded by ap-record."""
    path = tmp_path_factory.mktemp("stats") / "stats.safetensors"
    run("ap-record", data_bin, "--path", dense, "--subset", "train", "-o", path, "--cpu", "--max-tokens", 2000)
    return path


@pytest.fixture(scope="session")
def masks_file(stats_file, tmp_path_factory) -> Path:
    """Masks at 50% effective sparsity of every kind, made by ap-masks."""
    path = tmp_path_factory.mktemp("masks") / "masks.safetensors"
    run("ap-masks", stats_file, "--encoder-self", 0.5, "--decoder-self", 0.5, "--cross", 0.5, "-o", path)
    return path


@pytest.fixture
def paged(monkeypatch):
    """The search over pools, of which a CPU without kernels has none."""
    monkeypatch.setattr(PrunedSequenceGenerator, "_decoder_class", lambda self, device: StaticDecoder)


@pytest.fixture(autouse=True)
def log_again():
    """Let every test log why a search falls back, which is logged once in a process."""
    log_fallback.cache_clear()
