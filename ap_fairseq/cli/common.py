"""Shared by the console commands: error reporting, and the log line that makes a run repeatable."""

from __future__ import annotations

import argparse
import ast
import functools
import gc
import logging
import multiprocessing
import os
import select
import shlex
import signal
import sys
import threading
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any, NoReturn

from ap_fairseq import cli
from ap_fairseq.files import UserError
from ap_fairseq.logs import set_up_logging
from ap_fairseq.version import __version__

logger = logging.getLogger(__name__)


def exit_on_sigterm() -> None:
    """On SIGTERM, which schedulers send, end the program's child processes and leave no unfinished file.

    So on SIGHUP, which a terminal that closes sends, unless nohup ignores it. From then on neither of them, nor SIGINT,
    is lost where Python drops exceptions.
    """
    if threading.current_thread() is not threading.main_thread():  # no other thread may set it
        return
    if signal.getsignal(signal.SIGTERM) is _end:
        return
    signal.signal(signal.SIGTERM, _end)
    if signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:
        signal.signal(signal.SIGHUP, _end)
    report = sys.unraisablehook

    def again(dropped) -> None:
        # In a finalizer or a callback of a weak reference Python only reports what is raised: try outside of it.
        if dropped.exc_type is _Terminated:
            handler = functools.partial(_end, dropped.exc_value.code - 128)
        elif dropped.exc_type is KeyboardInterrupt:
            handler = signal.default_int_handler
        else:
            return report(dropped)
        signal.signal(signal.SIGALRM, handler)
        signal.setitimer(signal.ITIMER_REAL, 0.01)

    sys.unraisablehook = again


class _Terminated(SystemExit):
    """The end of a program on SIGTERM or SIGHUP."""


def _end(number: int, *_) -> NoReturn:
    for child in multiprocessing.active_children():
        child.terminate()
    raise _Terminated(128 + number)


def _fail(program: str, error: Exception) -> NoReturn:
    print(f"{program}: error: {error}", file=sys.stderr)
    raise SystemExit(2) from error


def _flush() -> None:
    if sys.stdout is not None:  # closed by the caller: >&-
        sys.stdout.flush()


def drop_stdout() -> None:
    """Let what is left for standard output go nowhere: Python flushes it once more at its end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextmanager
def _without_reader():
    """End the program silently if nobody reads standard output any more, as after ``| head -1``."""
    try:
        try:
            yield
        except SystemExit:  # argparse has printed its help
            _flush()
            raise
        _flush()
    except BrokenPipeError:
        poll = select.poll()
        poll.register(sys.stdout.fileno(), 0)
        if not any(event & select.POLLERR for _, event in poll.poll(0)):
            raise  # another pipe
        drop_stdout()
        sys.exit(128 + signal.SIGPIPE)


def command(main: Callable[[list[str]], None]) -> Callable[[], None]:
    """Turn ``main(argv)`` into an entry point that logs the call.

    What the user can mend, a :class:`UserError` or an ``OSError`` about a file, is one line and status 2; any other
    exception is a bug and keeps its traceback. If the reader of standard output leaves, as ``head`` does, the command
    ends silently with the status of a program that died of SIGPIPE.
    """

    @functools.wraps(main)
    def entry_point(argv: list[str] | None = None) -> None:
        is_program = argv is None  # else a program that goes on after it
        argv = sys.argv[1:] if argv is None else argv
        if not gc.isenabled():  # since the imports
            gc.freeze()
            gc.enable()
        program = os.path.basename(sys.argv[0])
        if sys.stderr is None:  # closed by the caller: 2>&-
            sys.stderr = open(os.devnull, "w")  # else messages go to standard output
        set_up_logging(sys.stderr)
        exit_on_sigterm()
        if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:  # since the imports
            signal.signal(signal.SIGINT, signal.default_int_handler)
        logger.info(f"ap_fairseq {__version__}: {shlex.join([program, *argv])}")
        with _without_reader():
            try:
                main(argv)
            except UserError as error:
                _fail(program, error)
            except OSError as error:
                if error.filename is None:
                    raise
                _fail(program, error)
            except KeyboardInterrupt:
                print(f"{program}: interrupted", file=sys.stderr)
                sys.exit(128 + signal.SIGINT)
        cli.succeeded = is_program

    return entry_point


def without_usage(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Let a parser's errors be a :class:`UserError` each, not one below its usage: with fairseq's flags 130 lines."""

    def error(message: str) -> NoReturn:
        raise UserError(f"{message}; all flags: {parser.prog} --help")

    parser.error = error  # type: ignore[method-assign]
    return parser


def literal(flag: str, text: str) -> dict[str, Any]:
    """Return the Python dictionary that *text* spells, such as ``--model-overrides``.

    Raises:
        UserError: if it spells none.
    """
    try:
        return dict(ast.literal_eval(text or "{}"))
    except (SyntaxError, TypeError, ValueError) as error:
        raise UserError(f"{flag} {text!r} is not a Python dictionary such as \"{{'name': 1}}\"") from error


def add_output(parser: argparse.ArgumentParser, what: str) -> None:
    """Add ``--output`` and ``--overwrite``."""
    parser.add_argument("-o", "--output", required=True, metavar="FILE", help=f"where to write {what}")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output file")
