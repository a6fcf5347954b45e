"""Lines about sentences, in files that several processes write, each with an index: joining them parses nothing."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np


def append_sentences(path: Path, numbers: list[int], lines: list[bytes]) -> None:
    """Append the lines of sentences, which have these numbers, to a file, and their places to its index."""
    with open(path, "ab") as stream, open(_index(path), "ab") as index:
        stream.writelines(lines)
        np.array([numbers, [*map(len, lines)]], dtype=np.int64).T.tofile(index)


def join(paths: Iterable[Path]) -> list[bytes]:
    """Return the lines of each sentence that was appended to these files, sorted by the numbers of the sentences."""
    numbers, lines = [np.empty(0, dtype=np.int64)], []
    for path in paths:
        found, lengths = np.fromfile(_index(path), dtype=np.int64).reshape(-1, 2).T
        ends, content = lengths.cumsum(), path.read_bytes()
        lines += [content[begin:end] for begin, end in zip((ends - lengths).tolist(), ends.tolist(), strict=True)]
        numbers.append(found)
    return [lines[k] for k in np.concatenate(numbers).argsort().tolist()]


def _index(path: Path) -> Path:
    return path.with_suffix(".index")
