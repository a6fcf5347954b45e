"""Resumable stages of a long experiment: fairseq's and this package's commands, run as functions.

A stage runs in a forked child, so that the seconds of importing torch and fairseq are spent once, and a stage can leave
its GPU memory, its random state and fairseq's globals behind. The parent must not have used the GPU; importing fairseq
counts GPUs, which torch does through NVML. Where there is no NVML, and CUDA refuses forked processes, set
AP_START_METHOD=spawn: each stage then imports everything anew.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import multiprocessing
import multiprocessing.connection
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from fairseq_cli import train

from ap_fairseq.files import ArtifactError, UserError, read_lines, write_json

# Asking whether there is a GPU must not open it: an opened GPU cannot be used after a fork.
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")

_processes = multiprocessing.get_context(os.environ.get("AP_START_METHOD", "fork"))


class StageError(RuntimeError):
    """A stage failed; its log says why."""


class Stages:
    """The stages of a run folder: ``logs/NAME.log`` and, once done, ``stages/NAME.json`` (settings, seconds)."""

    def __init__(self, folder: str | os.PathLike):
        self.folder = Path(folder)

    def run(self, name: str, function: Callable, *args: Any) -> None:
        """Call ``function(*args)`` in a child process, unless it was done before with the same arguments.

        If another program is at this stage, wait for it.

        Raises:
            ArtifactError: if the stage was done with other arguments: its results would mix with the old ones.
            StageError: if it fails.
        """
        mark, log = self.folder / "stages" / f"{name}.json", self.log(name)
        settings = [function.__qualname__, *json.loads(json.dumps(args, default=str))]
        if not mark.exists():
            for file in (mark, log):
                file.parent.mkdir(parents=True, exist_ok=True)
            with _locked(log.with_name(f".{name}.lock")):
                if not mark.exists():  # nor was it done meanwhile
                    seconds = self.run_always(name, function, *args)
                    write_json(mark, {"settings": settings, "seconds": seconds})
                    return
        done = json.loads(mark.read_text(encoding="utf-8"))["settings"]
        if done != settings:
            raise ArtifactError(
                f"stage {name} in {self.folder} was done with other settings:\n  then {json.dumps(done)}\n  now  "
                f"{json.dumps(settings)}\nname another output folder, or remove {mark} and what it made"
            )

    def log(self, name: str) -> Path:
        return self.folder / "logs" / f"{name}.log"

    def run_always(self, name: str, function: Callable, *args: Any) -> float:
        """Call ``function(*args)``, which knows itself what was done before, in a child process; return the seconds.

        Raises:
            StageError: if it fails.
        """
        log = self.log(name)
        log.parent.mkdir(parents=True, exist_ok=True)
        started = time.monotonic()
        child = _processes.Process(target=_call, args=(log, function, args))
        child.start()
        child.join()
        if child.exitcode != 0:
            tail = "\n".join(read_lines(log)[-12:])
            raise StageError(f"stage {name} failed with status {child.exitcode}; the end of {log}:\n{tail}")
        seconds = round(time.monotonic() - started, 1)
        print(f"{name}: {seconds} s", flush=True)
        return seconds


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock meanwhile. Children inherit it: it is free when the last of them has ended, however that came."""
    with open(path, "w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def _call(log: Path, function: Callable, args: Sequence[Any]) -> None:
    """Run in the child: everything printed goes to the log, faults with their traceback."""
    sys.stdout = sys.stderr = stream = open(log, "a", encoding="utf-8", buffering=1)
    os.dup2(stream.fileno(), 1)
    os.dup2(stream.fileno(), 2)
    try:
        function(*args)
    except SystemExit:
        raise
    except BaseException:
        traceback.print_exc()
        sys.exit(1)


def run_together(jobs: int, tasks: Iterable[tuple[Callable, Sequence[Any]]]) -> None:
    """Run ``function(*args)`` for each task, *jobs* at a time, each in a process of its own; wait for all.

    Raises:
        StageError: naming how many failed, after the others have ended.
    """
    waiting, running, failed = list(reversed(list(tasks))), {}, 0
    while waiting or running:
        while waiting and len(running) < jobs:
            function, args = waiting.pop()
            process = _processes.Process(target=_report_errors, args=(function, args))
            process.start()
            running[process.sentinel] = process
        for sentinel in multiprocessing.connection.wait(list(running)):
            process = running.pop(sentinel)
            process.join()
            failed += process.exitcode != 0
    if failed:
        raise StageError(f"{failed} jobs failed; run the same command again to resume with what is missing")


def _report_errors(function: Callable, args: Sequence[Any]) -> None:
    try:
        function(*args)
    except (StageError, UserError) as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(1)


def fairseq_train(argv: Sequence[Any]) -> None:
    """``fairseq-train`` with the plugin loaded."""
    sys.argv = ["fairseq-train", *map(str, argv)]
    train.cli_main()
