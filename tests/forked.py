"""Programs without their start-up: a server imports fairseq and the plugin once, and each call is a fork of it.

Python's forkserver, and not a fork of pytest: autograd refuses to run in a child of a process that has used it.
"""

import importlib.metadata
import io
import multiprocessing
import multiprocessing.forkserver
import os
import runpy
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from ap_fairseq.processes import run_logged

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"

PRELOADED = ["torch._dynamo", "ap_fairseq.plugin", "ap_fairseq.experiments.translation", "matplotlib.pyplot"]
PRELOADED += [f"ap_fairseq.cli.{name}" for name in ("apply", "average", "evaluate", "generate", "masks", "record")]
PRELOADED += [
    f"fairseq_cli.{name}" for name in ("eval_lm", "generate", "interactive", "preprocess", "train", "validate")
]

server = multiprocessing.get_context("forkserver")
server.set_forkserver_preload(PRELOADED)


def start_server() -> None:
    """Start the server, unless it runs, without GPUs: fairseq counts them when it is imported."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    try:
        multiprocessing.forkserver.ensure_running()
    finally:
        del os.environ["CUDA_VISIBLE_DEVICES"]
        if visible is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = visible


def call(
    function: Callable, arguments: Sequence[object], output: Path, environment: Mapping[str, str] = {}, text: str = ""
) -> int:
    """Run ``function(*words)`` in a fork of the server, without GPUs; return its exit status.

    Args:
        arguments: become the words.
        output: file of all that it prints.
        environment: variables to change.
        text: what it reads from standard input.
    """
    start_server()
    output.write_text("")
    words = [str(argument) for argument in arguments]
    process = server.Process(target=_run, args=(function, words, str(output), dict(environment), text))
    process.start()
    process.join(timeout=300)
    if process.exitcode is None:
        process.terminate()
        raise TimeoutError(f"{words} has run for 300 s: {output.read_text()}")
    return process.exitcode


def _run(function: Callable, words: list[str], output: str, environment: dict[str, str], text: str) -> None:
    multiprocessing.set_start_method("fork", force=True)  # of data loaders, as in a program: a server takes seconds
    sys.stdin = io.StringIO(text)
    os.environ.update(environment)
    torch.set_num_threads(1)
    run_logged(Path(output), function, words)


def recipe(*words: str) -> None:
    """What run.sh of the examples runs."""
    sys.path.insert(0, str(EXAMPLES / "common"))
    import recipe

    recipe.main(list(words))


def sweep(*words: str) -> None:
    """``python examples/common/sweep.py``."""
    program = EXAMPLES / "common" / "sweep.py"
    sys.path.insert(0, str(program.parent))
    sys.argv = [str(program), *words]
    runpy.run_path(str(program), run_name="__main__")


def is_command(name: str) -> bool:
    """Whether *name* is an installed console command in Python."""
    return bool(importlib.metadata.entry_points(group="console_scripts", name=name))


def command(name: str, *words: str) -> None:
    """What an installed console command runs."""
    sys.argv = [name, *words]
    (entry_point,) = importlib.metadata.entry_points(group="console_scripts", name=name)
    sys.exit(entry_point.load()())
