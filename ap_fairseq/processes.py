"""Programs and functions in processes of their own, which write to logs."""

from __future__ import annotations

import importlib.metadata
import multiprocessing
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ap_fairseq.files import UserError
from ap_fairseq.logs import set_up_logging

# Asking whether there is a GPU must not open it: an opened GPU cannot be used after a fork.
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")

# Forked processes unless the user chooses otherwise.
PROCESSES = multiprocessing.get_context(os.environ.get("AP_START_METHOD", "fork"))

POLL_SECONDS = 0.25  # between two looks at how far a process is


def load_command(program: str) -> Callable[[], Any]:
    """Return the function of an installed console command.

    Raises:
        UserError: if there is none.
    """
    found = importlib.metadata.entry_points(group="console_scripts", name=program)
    if not found:
        raise UserError(f"no command {program} is installed in the environment of {sys.executable}")
    return next(iter(found)).load()


def run_program(program: str | Callable, args: Sequence[Any]) -> None:
    """Run a console command, with *args* on its command line, or a function in this process."""
    if isinstance(program, str):
        sys.argv = [program, *map(str, args)]
        load_command(program)()
    else:
        program(*args)


def run_logged(log: Path, program: str | Callable, args: Sequence[Any]) -> None:
    """Run a command or a function in a child process: what it prints goes to the log, faults as of a program.

    That is one line for what the user can mend (:func:`ap_fairseq.plugin.report_user_errors`), else a traceback.
    """
    sys.stdout = sys.stderr = stream = open(log, "a", encoding="utf-8", buffering=1)
    os.dup2(stream.fileno(), 1)
    os.dup2(stream.fileno(), 2)
    set_up_logging(stream)
    try:
        run_program(program, args)
    except SystemExit:
        raise
    except BaseException:
        sys.excepthook(*sys.exc_info())
        sys.exit(1)
