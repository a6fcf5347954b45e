"""What the console commands share: error reporting and the log line that makes a run repeatable."""

from __future__ import annotations

import argparse
import functools
import logging
import multiprocessing
import os
import shlex
import signal
import sys
import threading
from collections.abc import Callable

from ap_fairseq.version import __version__

logger = logging.getLogger(__name__)


def exit_on_sigterm() -> None:
    """Let SIGTERM, with which schedulers end jobs, end the program's child processes and leave no unfinished file."""

    def end(number: int, _) -> None:
        for child in multiprocessing.active_children():
            child.terminate()
        sys.exit(128 + number)

    if threading.current_thread() is threading.main_thread():  # no other thread may set it
        signal.signal(signal.SIGTERM, end)


def command(main: Callable[[list[str]], None]) -> Callable[[], None]:
    """Turn ``main(argv)`` into an entry point that logs the call and reports bad input in one line with status 2."""

    @functools.wraps(main)
    def entry_point(argv: list[str] | None = None) -> None:
        argv = sys.argv[1:] if argv is None else argv
        program = os.path.basename(sys.argv[0])
        logging.basicConfig(
            format="%(asctime)s | %(levelname)s | %(name)s | %(message)s",
            datefmt="%Y-%m-%d %H:%M:%S",
            level=os.environ.get("LOGLEVEL", "INFO").upper(),
            stream=sys.stderr,
            force=True,  # importing fairseq sets up logging in its own format
        )
        exit_on_sigterm()
        logger.info(f"ap_fairseq {__version__}: {shlex.join([program, *argv])}")
        try:
            main(argv)
        except (ValueError, OSError) as error:  # bad input and files; anything else is a fault and keeps its traceback
            print(f"{program}: error: {error}", file=sys.stderr)
            raise SystemExit(2) from error

    return entry_point


def add_output(parser: argparse.ArgumentParser, what: str) -> None:
    """Add ``--output`` and ``--overwrite``."""
    parser.add_argument("-o", "--output", required=True, metavar="FILE", help=f"where to write {what}")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output file")
