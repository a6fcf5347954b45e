"""Logs of commands: their format, and reading them."""

from __future__ import annotations

import collections
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO


def set_up_logging(stream: TextIO) -> None:
    """Log to a stream in the format of fairseq's commands, at the level in ``LOGLEVEL``."""
    logging.basicConfig(
        format="%(asctime)s | %(levelname)s | %(name)s | %(message)s",
        datefmt="%Y-%m-%d %H:%M:%S",
        level=os.environ.get("LOGLEVEL", "INFO").upper(),
        stream=stream,
        force=True,  # importing fairseq sets up logging, maybe in the parent of this process
    )


def lines_of(*logs: Path) -> Iterator[str]:
    """Yield the lines of logs, which may hold all translations of a test set, and bytes that are no text."""
    for log in logs:
        with log.open(encoding="utf-8", errors="replace") as lines:
            yield from (line.rstrip("\n") for line in lines)


def end_of(log: Path) -> str:
    """Return the last lines of a log, for a message."""
    return "\n".join(collections.deque(lines_of(log), maxlen=12))
