"""What programs of the examples say where the packages that they need are not installed."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def required_modules() -> Iterator[None]:
    """Ends the program with one line if a module that is imported within is missing."""
    try:
        yield
    except ModuleNotFoundError as missing:
        sys.exit(
            f"run.sh: error: {sys.executable} has no module {missing.name}: run scripts/setup.sh in the repository and "
            "activate its environment (source .venv/bin/activate)"
        )
