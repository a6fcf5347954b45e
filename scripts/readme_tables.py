#!/usr/bin/env python3
"""Regenerate the tables and numbers of all READMEs from the committed results.

    python scripts/readme_tables.py             # lists what is stale; exit status 1 if anything is
    python scripts/readme_tables.py --write     # rewrites it in place

A table stands between ``<!-- results: NAME -->`` and ``<!-- end -->``; `result_tables.py` makes it. A number in running
text stands in a span, ``<!-- n: FILE KEY [OP KEY] FORMAT -->31.6<!-- /n -->``:

    FILE    a .json or .jsonl file, relative to the repository's root
    KEY     keys joined by /; KEY=VALUE (several joined by &) selects from a list; where several rows match, the mean of
            them is mean:KEY, the first of them first:KEY
    OP      - or /, between two keys of the file
    FORMAT  as of Python's format(), e.g. .1f or ,.0f
"""

from __future__ import annotations

import argparse
import difflib
import operator
import re
import shlex
import sys
from pathlib import Path

from result_tables import ROOT, load, lookup, tables

TABLE = re.compile(r"(<!-- results: (\S+) -->\n)((?:(?!<!-- ).*\n)*)(<!-- end -->)")
SPAN = re.compile(r"(<!-- n: (.*?) -->)(.*?)(<!-- /n -->)", re.DOTALL)


def readmes() -> list[Path]:
    """Return every README of the repository: not those of environments, caches, data and runs."""
    skipped = {"build", "data", "runs", "archives"}
    found = (path.relative_to(ROOT) for path in ROOT.rglob("README.md"))
    return sorted(
        ROOT / path for path in found if not any(part.startswith(".") or part in skipped for part in path.parts)
    )


def number(arguments: str) -> str:
    """Return the text of a span, from the arguments in its mark."""
    path, key, *operation, form = shlex.split(arguments)
    document = load(ROOT / path)
    value = lookup(document, key)
    if operation:
        name, other = operation
        value = {"-": operator.sub, "/": operator.truediv}[name](value, lookup(document, other))
    return format(value, form)


def regenerate(text: str) -> str:
    """Return *text* with its tables and numbers regenerated.

    Raises:
        KeyError: for a table that nothing makes, or a number that the file does not hold.
    """
    made = tables()
    text = TABLE.sub(lambda match: f"{match[1]}{made[match[2]]()}\n{match[4]}", text)
    return SPAN.sub(lambda match: match[1] + number(match[2]) + match[4], text)


def differences(old: str, new: str) -> list[str]:
    """Return the new text of the lines that changed."""
    lines = difflib.unified_diff(old.splitlines(), new.splitlines(), n=0, lineterm="")
    return [line[1:].strip()[:110] for line in lines if line.startswith("+") and not line.startswith("+++")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="rewrite what is stale")
    args = parser.parse_args()
    stale = 0
    for path in readmes():
        old = path.read_text(encoding="utf-8")
        new = regenerate(old)
        if new == old:
            continue
        stale += 1
        print(f"{path.relative_to(ROOT)}: {'rewritten' if args.write else 'stale'}")
        print("\n".join(f"  {line}" for line in differences(old, new)))
        if args.write:
            path.write_text(new, encoding="utf-8")
    sys.exit(bool(stale) and not args.write)


if __name__ == "__main__":
    main()
