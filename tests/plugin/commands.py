"""A toy language pair, and fairseq's and our commands as functions."""

import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import forked
import numpy as np
import torch
from fairseq import checkpoint_utils

from ap_fairseq.model.checkpoints import load_checkpoint

ROOT = Path(__file__).resolve().parents[2]
PLUGIN = ["--user-dir", str(ROOT / "ap_fairseq")]

NOUNS = {"cell": "Zelle", "table": "Tabelle", "page": "Seite", "line": "Zeile", "window": "Ansicht", "list": "Liste"}
VERBS = {"opens": "öffnet", "closes": "schließt", "moves": "bewegt", "deletes": "löscht", "shows": "zeigt"}
ADJECTIVES = {"new": "neue", "last": "letzte", "empty": "leere", "first": "erste"}


def sentence_pairs(n: int, seed: int) -> list[tuple[str, str]]:
    """Return n distinct pairs of 5 to 23 words; the German verb goes to the end of its clause."""
    draw = random.Random(seed)

    def clause():
        (s, sd), (o, od) = draw.sample(sorted(NOUNS.items()), 2)
        v, vd = draw.choice(sorted(VERBS.items()))
        a, ad = draw.choice(sorted(ADJECTIVES.items()))
        return f"the {s} {v} the {a} {o}", f"die {sd} die {ad} {od} {vd}"

    pairs: dict[str, str] = {}
    while len(pairs) < n:
        clauses = [clause() for _ in range(draw.choice([1, 1, 2, 3]))]
        pairs[" and ".join(c[0] for c in clauses)] = " und ".join(c[1] for c in clauses)
    return list(pairs.items())


def run(*command, expect: int = 0, input: str = "", kernels: bool = False) -> str:
    """Run a console command and return its output; fail with it on another exit status.

    It runs in a fork that has imported fairseq and the plugin already, which saves five seconds. With a GPU it is a
    process of its own.

    Args:
        kernels: the command runs Triton's kernels. Where they are not interpreted it does without its flag ``--cpu``.
    """
    if kernels and torch.cuda.is_available():
        gpus = os.environ.get("CUDA_VISIBLE_DEVICES", "0")
        one = {"CUDA_VISIBLE_DEVICES": gpus.split(",")[0]}  # fairseq trains on all that it sees
        command = [word for word in command if word != "--cpu"]
        return run_process(*command, expect=expect, environment=one, input=input)
    if torch.cuda.is_available() or not forked.is_command(command[0]):
        return run_process(*command, expect=expect, input=input)
    with tempfile.NamedTemporaryFile("r", suffix=".log") as log:
        status = forked.call(forked.command, command, Path(log.name), text=input)
        printed = log.read()
    assert status == expect, f"{command} exited with {status}:\n{printed[-4000:]}"
    return printed


def run_process(*command, expect: int = 0, environment=(), **kwargs) -> str:
    """Run a program of this environment as a user does, in a process of its own; otherwise as :func:`run`."""
    path = os.pathsep.join(
        [str(Path(sys.executable).parent), os.environ["PATH"]]
    )  # elsewhere after pip install --target
    completed = subprocess.run(
        [shutil.which(command[0], path=path), *map(str, command[1:])],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
        # Tiny models: more threads only wait for each other. Fairseq's --cpu clips gradients on a GPU that it sees.
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **dict(environment)},
        **kwargs,
    )
    assert completed.returncode == expect, f"{command} exited with {completed.returncode}:\n{completed.stdout[-4000:]}"
    return completed.stdout


def wait_for(what, seconds: float = 120):
    """Return the first true value of what()."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if value := what():
            return value
        time.sleep(0.02)
    raise AssertionError("nothing happened")


TINY = (
    "--encoder-layers 2 --decoder-layers 2 --encoder-embed-dim 32 --encoder-ffn-embed-dim 64 "
    "--encoder-attention-heads 2 --decoder-attention-heads 2 --share-all-embeddings"
).split()


def train(data, save_dir, *flags, arch="transformer", updates=200, expect=0, kernels=False) -> str:
    """Train a tiny model with fairseq-train, on the CPU but for *kernels* (see `run`)."""
    return run(
        *["fairseq-train", data, *PLUGIN, "--arch", arch, *TINY, "--save-dir", save_dir, "--max-update", updates],
        *"--optimizer adam --lr 3e-3 --lr-scheduler inverse_sqrt --warmup-updates 40 --clip-norm 1.0".split(),
        *"--criterion label_smoothed_cross_entropy --label-smoothing 0.1 --max-tokens 2000 --cpu --seed 7".split(),
        *"--no-epoch-checkpoints --log-format json --log-interval 1 --num-workers 0".split(),
        *flags,
        expect=expect,
        kernels=kernels,
    )


def train_on_text(data, save_dir, *flags, updates, expect=0) -> str:
    """Train a tiny model of one text on the CPU; return what is printed."""
    return run(
        *["fairseq-train", data, *PLUGIN, "--save-dir", save_dir, "--max-update", updates],
        *"--optimizer adam --lr 3e-3 --lr-scheduler inverse_sqrt --warmup-updates 10 --max-tokens 960 --cpu".split(),
        *"--seed 7 --no-epoch-checkpoints --log-format json --log-interval 1 --num-workers 0".split(),
        *flags,
        expect=expect,
    )


def changed_checkpoint(path, output: Path, change) -> Path:
    """Save what *change* makes of the state of a checkpoint."""
    state = load_checkpoint(path)
    change(state)
    torch.save(state, output)
    return output


def losses(log: str) -> list[str]:
    """The losses of a training that is logged as JSON, of updates and of validations."""
    return re.findall(r'"(?:loss|valid_loss)": "([\d.]+)"', log)


def generate(data, path, *flags, subset="test", expect=0, kernels=False) -> str:
    """Translate with fairseq-generate, on the CPU but for *kernels* (see `run`)."""
    return run(
        *["fairseq-generate", data, *PLUGIN, "--path", path, "--gen-subset", subset, "--cpu", "--beam", 3],
        *["--max-tokens", 1500, "--required-batch-size-multiple", 1, "--num-workers", 0, *flags],
        expect=expect,
        kernels=kernels,
    )


# Flags of `generate` by which Triton's interpreter, which is slow, translates a fifth of the batches: of the 60
# sentences of "valid" two batches of six, short and long ones.
FEW = ["--batch-size", 6, "--distributed-world-size", 5, "--distributed-rank", 0]


def assert_kernels_translate_as_sdpa(data_bin, pruned) -> None:
    """Check that a few sentences get the same text, and scores within 1e-4, by fairseq and by the kernels."""
    short = ["--beam", 2, "--max-len-a", 0, "--max-len-b", 4, *FEW]
    by_kernels = ["--task", "pruned_translation", "--model-overrides", "{'attention_backend': 'triton'}"]
    logs = [
        generate(data_bin, pruned, *short, subset="valid"),
        generate(data_bin, pruned, *short, *by_kernels, subset="valid", kernels=True),
    ]
    expected, found = (re.findall(r"^H-\d+\t(\S+)\t(.*)", log, re.M) for log in logs)
    assert [text for _, text in found] == [text for _, text in expected] != []
    np.testing.assert_allclose([float(x) for x, _ in found], [float(x) for x, _ in expected], atol=1e-4)


def assert_reads_as_stock(path, dense) -> None:
    """Check that fairseq reads a checkpoint as the model and the parameters of a dense one, without the plugin."""
    found, expected = (checkpoint_utils.load_model_ensemble([str(part)])[0][0] for part in (path, dense))
    assert type(found) is type(expected)
    assert type(found).__module__.startswith("fairseq.")
    parameters = found.state_dict()
    assert parameters.keys() == expected.state_dict().keys()
    assert all(torch.equal(parameters[name], value) for name, value in expected.state_dict().items())
