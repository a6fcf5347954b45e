"""Result files of the benchmarks: their options, the commit that they name, their tables."""

from __future__ import annotations

import argparse
import json
import subprocess
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def git_commit() -> str:
    """Return the commit of this file's repository, marked if files differ from it; "unknown" without one or git."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=7", "--match="]
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:  # no git here
        return "unknown"
    return result.stdout.strip() or "unknown"


def add_result_options(parser: argparse.ArgumentParser) -> None:
    """Add `--out` and `--table`, a result file to write and one to print."""
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--table", type=Path, metavar="JSON", help="print a Markdown table of a result file and stop")


def print_table(parser: argparse.ArgumentParser, file: Path, table: Callable[[dict], str]) -> None:
    """Print the *table* of a result file; end the program with one line if it is none of this benchmark."""
    try:
        printed = table(json.loads(file.read_text(encoding="utf-8")))
    except (AttributeError, KeyError, IndexError, OSError, TypeError, ValueError) as error:
        parser.error(f"--table {file}: {type(error).__name__}: {error}; give a file that this program wrote with --out")
    print(printed)


def require_writable(parser: argparse.ArgumentParser, file: Path | None) -> None:
    """End the program with one line, before minutes of work, if the result file that it was given cannot be written."""
    from ap_fairseq.files import UserError, refuse_existing

    try:
        if file:
            refuse_existing(file, overwrite=True)
    except UserError as error:
        parser.error(f"--out: {error}")


def write_report(file: Path, report: dict) -> None:
    """Write a result file, or replace it as a whole; in the report's own order, which tables keep."""
    from ap_fairseq.files import write_text  # printing a table needs no plugin

    write_text(file, json.dumps(report, indent=1) + "\n", overwrite=True)


def with_heading(made: str, report: dict, table: str) -> str:
    """Return a table under *made*, what its numbers were measured with, and the note of the report, if it has one."""
    return "\n".join([made, *([report["note"]] if "note" in report else []), "", table])
