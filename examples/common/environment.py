"""How programs of the examples start, and what they say when they cannot go on."""

import argparse
import logging
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from building import PrepareError, make_absolute


@contextmanager
def required_modules() -> Iterator[None]:
    """End the program with one line if a module that is imported within is missing, and without any on Ctrl-C."""
    interrupted = signal.getsignal(signal.SIGINT)
    if interrupted is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    except ModuleNotFoundError as missing:
        sys.exit(
            f"run.sh: error: {sys.executable} has no module {missing.name}: run scripts/setup.sh in the repository and "
            "activate its environment (source .venv/bin/activate)"
        )
    finally:
        signal.signal(signal.SIGINT, interrupted)


def run_example(run: Callable[[argparse.Namespace], Any], args: argparse.Namespace) -> None:
    """Call ``run(args)`` for a ``run.sh``; it ends with one line for what the user can put right."""
    from ap_fairseq.cli.common import exit_on_sigterm
    from ap_fairseq.files import UserError

    make_absolute(args)
    exit_on_sigterm()
    logging.getLogger().setLevel(logging.WARNING)  # hydra, which fairseq loads, lets through what others debug
    try:
        run(args)
    except KeyboardInterrupt:
        print("run.sh: interrupted; the same command goes on", file=sys.stderr)
        sys.exit(130)
    except (UserError, PrepareError) as error:
        sys.exit(f"run.sh: error: {error}")
    except OSError as error:
        if error.filename is None:
            raise
        sys.exit(f"run.sh: error: {error}")
