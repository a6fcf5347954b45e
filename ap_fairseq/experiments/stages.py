"""Resumable stages of an experiment, each a console command or a function, with live progress.

A stage runs in a forked child, so that the seconds of importing torch and fairseq are spent once, and a stage can leave
its GPU memory, its random state and fairseq's globals behind. The parent must not have used the GPU, nor run operators
on several threads, which would not be there in the child. Importing fairseq counts GPUs, which torch does through
NVML. Where there is no NVML, and CUDA refuses forked processes, set AP_START_METHOD=spawn: each stage then imports
everything again.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import multiprocessing.connection
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import ap_fairseq
from ap_fairseq.files import ArtifactError, UserError, read_json, write_json
from ap_fairseq.logs import end_of
from ap_fairseq.processes import POLL_SECONDS, PROCESSES, load_command, run_logged, run_program
from ap_fairseq.progress import Progress

PLUGIN = ("--user-dir", str(Path(ap_fairseq.__file__).parent))
"""The flags with which fairseq's commands load this package."""

_slot = 0  # of a process of run_together: the line of the terminal that its progress bars take


class StageError(UserError):
    """A stage failed; its log says why."""


class Stages:
    """The stages of a run folder: ``logs/NAME.log`` and, once done, ``stages/NAME.json`` (command, seconds).

    Raises:
        UserError: under torchrun, whose ranks would wait for each other: one for a stage, the other within it.
    """

    def __init__(self, folder: str | os.PathLike):
        if "RANK" in os.environ and (ranks := int(os.environ.get("WORLD_SIZE", 1))) > 1:
            raise UserError(
                f"this program runs once, not as {ranks} ranks of torchrun: start it alone; its stages use all GPUs of "
                "the machine"
            )
        self.folder = Path(folder)

    def run(self, name: str, program: str | Callable, *args: Any) -> None:
        """Run a stage unless it was done before with the same arguments.

        If another process is at this stage, wait for it.

        Args:
            program: the name of an installed console command, called as with *args* on its command line, or a function.

        Raises:
            ArtifactError: if the stage was done with other arguments: its results would mix with the old ones.
            StageError: if it fails.
        """
        mark, log = self._mark(name), self.log(name)
        command = json.loads(json.dumps([_name(program), *args], default=str))
        for file in (mark, log):
            file.parent.mkdir(parents=True, exist_ok=True)
        with _locked(log.with_name(f".{name}.lock"), name):
            if not mark.exists():
                seconds = self.run_always(name, program, *args)
                write_json(mark, {"command": command, "seconds": seconds})
                return
        done, seconds = read_mark(mark)
        if done != command:
            raise ArtifactError(
                f"stage {name} in {self.folder} was done with other settings:\n  then {json.dumps(done)}\n  now  "
                f"{json.dumps(command)}\nname another output folder (--out), or remove {mark} and what it made"
            )
        _say(f"{name}: done before, {seconds} s")

    def forget(self, name: str) -> None:
        """Let the next call run the stage again."""
        self._mark(name).unlink(missing_ok=True)

    def log(self, name: str) -> Path:
        """Return the log of a stage."""
        return self.folder / "logs" / f"{name}.log"

    def _mark(self, name: str) -> Path:
        return self.folder / "stages" / f"{name}.json"

    def run_always(self, name: str, program: str | Callable, *args: Any) -> float:
        """Run a stage whatever was done before, for programs that skip finished work themselves; return the seconds.

        Raises:
            StageError: if it fails.
            UserError: if there is no such command.
        """
        log = self.log(name)
        log.parent.mkdir(parents=True, exist_ok=True)
        if log.exists():  # never two runs in one log: its translations would be read twice
            log.replace(log.with_suffix(".previous.log"))
        words = [str(arg) for arg in args]
        if isinstance(program, str):
            log.write_text(f"$ {shlex.join([program, *words])}\n", encoding="utf-8")
            load_command(program)  # here, so that all stages share the import
        started = time.monotonic()
        _say(f"{name}: running, log in {log}")
        child = PROCESSES.Process(target=run_logged, args=(log, program, args))
        child.start()
        with Progress(name, words, [log], _slot) as progress:
            while child.is_alive():
                child.join(POLL_SECONDS)
                progress.update()
        if child.exitcode != 0:
            raise StageError(f"stage {name} failed with status {child.exitcode}; the end of {log}:\n{end_of(log)}")
        seconds = round(time.monotonic() - started, 1)
        _say(f"{name}: {seconds} s")
        return seconds


def read_mark(mark: Path) -> tuple[list[Any], float]:
    """Return the command and the seconds of a finished stage.

    Raises:
        ArtifactError: if the file is not a stage mark.
    """
    try:
        document = read_json(mark)
        return document["command"], float(document["seconds"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtifactError(
            f"{mark} is not the mark of a finished stage (JSON with command and seconds): {error!r}; remove it to run "
            "the stage again"
        ) from error


@contextlib.contextmanager
def _locked(path: Path, name: str) -> Iterator[None]:
    """Hold a lock in the block. Children inherit it: it is free when the last of them has ended, for any reason."""
    with open(path, "w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _say(f"{name}: waiting for another program that runs this stage")
            fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def _say(text: str) -> None:
    """Print a line, over a progress bar that another process may have drawn there."""
    print(f"\r\x1b[K{text}" if sys.stdout.isatty() else text, flush=True)


def _name(program: str | Callable) -> str:
    return program if isinstance(program, str) else program.__qualname__


def call(program: str, *args: Any) -> None:
    """Run a console command in a child process that prints where this one does.

    Raises:
        StageError: if it fails.
        UserError: if there is no such command.
    """
    load_command(program)
    child = PROCESSES.Process(target=run_program, args=(program, args))
    child.start()
    child.join()
    if child.exitcode != 0:
        raise StageError(f"{program} failed with status {child.exitcode}")


def run_together(jobs: int, tasks: Iterable[tuple[Callable, Sequence[Any]]]) -> None:
    """Run ``function(*args)`` for each task, *jobs* at a time, each in a process of its own; wait for all.

    The tasks that run at the same time share torch's threads.

    Raises:
        StageError: naming how many failed, after the others have ended.
    """
    waiting, running, failed = list(reversed(list(tasks))), {}, 0
    jobs = min(jobs, len(waiting))
    while waiting or running:
        while waiting and len(running) < jobs:
            function, args = waiting.pop()
            slot = min(set(range(jobs)) - {slot for _, slot in running.values()})
            process = PROCESSES.Process(target=_work, args=(slot, jobs, function, args))
            process.start()
            running[process.sentinel] = process, slot
        for sentinel in multiprocessing.connection.wait(list(running)):
            process, _ = running.pop(sentinel)
            process.join()
            failed += process.exitcode != 0
    if failed:
        raise StageError(f"{failed} jobs failed, as said above; when that is mended, the same command goes on")


def _work(slot: int, jobs: int, function: Callable, args: Sequence[Any]) -> None:
    global _slot
    _slot = slot
    if jobs > 1 and (torch := sys.modules.get("torch")):
        torch.set_num_threads(max(1, torch.get_num_threads() // jobs))
    try:
        function(*args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(1)
