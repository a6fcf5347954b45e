"""Processes that share a translation: one or more for each GPU, or on a CPU; they are started and ended together."""

from __future__ import annotations

import fcntl
import gc
import logging
import multiprocessing
import multiprocessing.connection
import multiprocessing.util
import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from ap_fairseq.devices import count_gpus
from ap_fairseq.files import UserError
from ap_fairseq.generation.loading import load_faster, start_cuda, use_gpu
from ap_fairseq.logs import end_of, lines_of
from ap_fairseq.processes import POLL_SECONDS, PROCESSES, run_logged
from ap_fairseq.progress import Progress
from ap_fairseq.provenance import OTHER_DIRECTION
from ap_fairseq.search.generator import FALLBACK

logger = logging.getLogger(__name__)

GRACE_SECONDS = 10  # that a process has to end when it is asked to
LEAST_FREE = 1 << 20  # bytes on the disk of a log that was written to its end


class Ranks(AbstractContextManager):
    """Processes on the GPUs in turn, if the machine has any, which start before their work is known.

    Everything that a process prints goes to its log. Those that have not done their work are ended with the context;
    the others end on their own, and nothing waits until they have given their GPUs back.

    Args:
        logs: of each process.
        cpu: use no GPU; the processes share the cores.
    """

    def __init__(self, logs: list[Path], cpu: bool):
        self.logs, self.cpu, self.have_work = logs, cpu, False
        self.processes: list[BaseProcess] = []
        self.connections: list[Connection] = []  # their work there, and back that it is done
        self.done: list[BaseProcess] = []

    def __enter__(self) -> Ranks:
        # The folder of sockets, made here, is that of all further processes, too, and goes with this one: those that
        # read data-bin folders are ended by signals and would leave folders of their own.
        multiprocessing.util.get_temp_dir()
        try:
            for rank, log in enumerate(self.logs):
                log.unlink(missing_ok=True)
                connection, theirs = PROCESSES.Pipe()
                arguments = log, _run, (rank, self.cpu, theirs)
                process = PROCESSES.Process(target=run_logged, args=arguments)
                self.processes.append(process)
                self.connections.append(connection)
                process.start()
                theirs.close()  # so that nothing can be sent to a process that has died
        except BaseException:  # those that wait for work would keep this program from ending
            self.__exit__()
            raise
        return self

    def __len__(self) -> int:
        return len(self.logs)

    def load(self, function: Callable, *args: Any) -> None:
        """Begin ``function(*args)`` in all processes, beside what this one has yet to find out about their work.

        What it returns comes after the rank among the arguments of the function that :meth:`run` names.
        """
        for connection in self.connections:
            with suppress(BrokenPipeError):  # `run` says why
                connection.send((0, function, args))

    def run(self, name: str, most: int, function: Callable, *args: Any) -> None:
        """Run ``function(rank, *args)`` in *most* processes, or in all if these are fewer.

        Their progress is shown added up. That a search falls back to fairseq's own, or masks belong to another
        direction, is said once.

        Args:
            name: of the work, for its progress.

        Raises:
            UserError: if a process fails; it names the log and shows its end.
        """
        logs, ranks = self.logs[:most], self.processes[:most]
        for idle in self.processes[most:]:
            idle.kill()
        self.have_work = True
        running = dict(zip(self.connections, ranks, strict=False))
        for connection in running:
            with suppress(BrokenPipeError):  # its process has failed, which is said below
                connection.send((len(ranks), function, args))
        with Progress(name, (), logs) as progress:
            while running and not any(rank.exitcode for rank in running.values()):
                for connection in multiprocessing.connection.wait(running, timeout=POLL_SECONDS):
                    rank = running[connection]
                    if _is_done(connection):
                        self.done.append(rank)
                    else:
                        rank.join()
                    if not rank.exitcode:
                        del running[connection]
                progress.update()
        for number, (rank, log) in enumerate(zip(ranks, logs, strict=True)):
            if rank.exitcode and rank not in self.done:
                raise UserError(_failure(number, rank.exitcode, log))
        for notice, level in ((FALLBACK, logging.INFO), (OTHER_DIRECTION, logging.WARNING)):
            for reason in sorted({line.partition(notice)[2] for line in lines_of(*logs)} - {""}):
                logger.log(level, f"{notice}{reason}")

    def __exit__(self, kind=None, *error) -> None:
        started = [rank for rank in self.processes if rank.pid is not None]
        if kind is None and count_gpus(self.cpu):
            started = [rank for rank in started if rank not in self.done]
            for rank in self.done:
                _let_go(rank)
        for rank in started:
            rank.terminate() if self.have_work else rank.kill()
        for rank in started:
            rank.join(GRACE_SECONDS)
            rank.kill()


def _is_done(connection: Connection) -> bool:
    """Whether a process says that its work is done; else it has ended."""
    try:
        return connection.recv()
    except (EOFError, ConnectionResetError):
        return False


def _let_go(process: BaseProcess) -> None:
    """Do not wait for the end of a process, not at the end of this one either: a GPU takes long to be given back."""
    multiprocessing.process._children.discard(process)  # type: ignore[attr-defined]
    threading.Thread(target=process.join, daemon=True).start()


def _run(rank: int, cpu: bool, connection: Connection) -> None:
    end_with_parent()
    gc.freeze()  # what was imported stays; full collections that look through it take longer than reading hypotheses
    gpus = count_gpus(cpu)
    load_faster(on_gpu=gpus > 0)
    if gpus and use_gpu(rank % gpus):
        start_cuda()
    try:
        ranks, function, args = connection.recv()
        if not ranks:  # of `load`
            loaded = function(*args)
            ranks, function, args = connection.recv()
            args = loaded, *args
        if not gpus:  # those that have work share the cores
            torch.set_num_threads(max(1, torch.get_num_threads() // ranks))
        function(rank, *args)
        connection.send(True)
    except (UserError, OSError) as error:  # a file's is one line, as that of a command
        if isinstance(error, OSError) and error.filename is None:
            raise
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)


def end_with_parent() -> None:
    """Let this process end when its parent has ended, which may have been killed."""
    threading.Thread(target=_exit_after, args=(multiprocessing.parent_process(),), daemon=True).start()


def _exit_after(parent: BaseProcess) -> None:
    parent.join()
    os._exit(1)


def _failure(rank: int, status: int, log: Path) -> str:
    end = end_of(log)
    last = end.rpartition("\n")[2]
    if status == 2 and last.startswith("error: "):
        return f"{last.removeprefix('error: ')} (process {rank}; its log is {log})"
    died = f"died of {signal.Signals(-status).name}" if status < 0 else f"failed with status {status}"
    hint = "; if memory ran out, lower --max-tokens" if status == -signal.SIGKILL else ""
    if (free := shutil.disk_usage(log.parent).free) < LEAST_FREE:  # then the log lacks what went wrong
        return (
            f"process {rank} {died}, the others were ended: {free:,} bytes are free on the disk of {log.parent}, "
            f"expected at least {LEAST_FREE:,}; make room there, or name a folder on another disk"
        )
    return f"process {rank} {died}, the others were ended{hint}; the end of its log {log}:\n{end}"


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder; it is free when this process and those that it started have ended, for any reason.

    Raises:
        UserError: if another program holds it.
    """
    with open(folder / "lock", "w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(
                f"another ap-generate works in {folder}; wait until it has ended, or name another output"
            ) from error
        yield
