"""Recipes without their start-up: a server imports fairseq and the plugin once, and each call is a fork of it.

Python's forkserver, and not a fork of pytest: autograd refuses to run in a child of a process that has used it.
"""

import multiprocessing
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"

server = multiprocessing.get_context("forkserver")
server.set_forkserver_preload(["ap_fairseq.plugin", "fairseq_cli.train", "fairseq_cli.generate", "matplotlib.pyplot"])


def run_recipe(arguments: Sequence[object], output: Path, environment: Mapping[str, str]) -> int:
    """What run.sh runs, with its output in a file; returns its exit status."""
    process = server.Process(target=_run, args=([str(word) for word in arguments], str(output), dict(environment)))
    process.start()
    process.join(timeout=300)
    if process.exitcode is None:
        process.terminate()
        raise TimeoutError(f"{arguments} has run for 300 s: {output.read_text()}")
    return process.exitcode


def _run(arguments: list[str], output: str, environment: dict[str, str]) -> None:
    with open(output, "w") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
    os.environ.update(environment)
    sys.path.insert(0, str(EXAMPLES / "common"))
    import recipe

    recipe.main(arguments)
