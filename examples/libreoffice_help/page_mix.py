#!/usr/bin/env python3
"""Build ``data-bin/mix`` of a corpus: training text of several lengths, and the test pages cut to each of them.

A transformer trained from scratch on two thousand pages does not learn to translate pages; one trained on sentences,
chunks and pages together does better (multi-resolution training, Sun et al. 2022, arXiv 2010.08961). Chunks are runs of
segments of one page, joined by ``<sep>``, of at most this many tokens on either side.

    train        sentences, pages, and the training pages cut at each of --lengths
    valid        pages
    test         pages; test1, test2, ...: the same pages cut at each of --lengths, longest first; the last one of these
                 subsets holds their single segments, so all translate the same text

Beside it, ``mix/SUBSET.{SRC,TGT}`` is the raw text and ``mix/SUBSET.pages`` the page of each line, for document scores.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "common"))

from building import read_lines, write_lines
from segments import SEPARATOR_PIECE, join_pieces

Segment = tuple[list[str], list[str]]  # pieces of the source and of the target


def read_pages(data: Path, pair: Sequence[str], split: str) -> list[tuple[str, list[Segment]]]:
    """Return (name of the page, its segments) for each line of ``bpe-pages``."""
    names = [line.split("\t")[0] for line in read_lines(data / "pages" / f"{split}.pages")]
    sides = [[_segments(line) for line in read_lines(data / "bpe-pages" / f"{split}.{language}")] for language in pair]
    return [(name, list(zip(source, target, strict=True))) for name, source, target in zip(names, *sides, strict=True)]


def _segments(line: str) -> list[list[str]]:
    segments: list[list[str]] = [[]]
    for piece in line.split(" "):
        if piece == SEPARATOR_PIECE:
            segments.append([])
        else:
            segments[-1].append(piece)
    return segments


def cut(pages: Sequence[tuple[str, list[Segment]]], limit: int) -> list[tuple[str, list[Segment]]]:
    """Cut pages between segments into chunks of at most *limit* tokens; a longer segment is a chunk by itself."""
    chunks: list[tuple[str, list[Segment]]] = []
    for name, segments in pages:
        used = (0, 0)
        for position, segment in enumerate(segments):
            longer = tuple(n + 1 + len(side) for n, side in zip(used, segment, strict=True))
            if position and max(longer) <= limit:
                chunks[-1][1].append(segment)
                used = longer
            else:
                chunks.append((name, [segment]))
                used = (len(segment[0]), len(segment[1]))
    return chunks


def encoded(chunks: Sequence[tuple[str, list[Segment]]], side: int) -> list[str]:
    return [" ".join(join_pieces([segment[side] for segment in segments])) for _, segments in chunks]


def raw(line: str) -> str:
    """The text of a line of pieces, as fairseq's ``--remove-bpe sentencepiece`` gives it back."""
    return line.replace(" ", "").replace("▁", " ").strip()


def build(data: Path, lengths: Sequence[int]) -> dict[str, int]:
    """Write text and ``data-bin/mix``; return the number of lines of each subset."""
    options = json.loads((data / "counts.json").read_text(encoding="utf-8"))["options"]
    pair = [options[side].replace("-", "_") for side in ("source", "target")]
    folder, counts = data / "mix", {}
    folder.mkdir(exist_ok=True)
    train, valid, test = (read_pages(data, pair, split) for split in ("train", "valid", "test"))
    longest_first = sorted(lengths, reverse=True)
    subsets = {"valid": valid, "test": test}
    subsets |= {f"test{k}": cut(test, limit) for k, limit in enumerate([*longest_first, 0], start=1)}
    for name, chunks in subsets.items():
        for side, language in enumerate(pair):
            lines = encoded(chunks, side)
            write_lines(folder / f"{name}.bpe.{language}", lines)
            write_lines(folder / f"{name}.{language}", map(raw, lines))
        write_lines(folder / f"{name}.pages", [page for page, _ in chunks])
        counts[name] = len(chunks)
    mixed = [train, *(cut(train, limit) for limit in longest_first)]
    for side, language in enumerate(pair):
        lines = read_lines(data / "bpe-sentences" / f"train.{language}")
        for chunks in mixed:
            lines += encoded(chunks, side)
        write_lines(folder / f"train.bpe.{language}", lines)
        counts["train"] = len(lines)
    tests = ",".join(f"{name}.bpe" for name in subsets if name.startswith("test"))
    # fmt: off
    subprocess.run(
        [
            sys.executable, "-m", "fairseq_cli.preprocess", "--source-lang", pair[0], "--target-lang", pair[1],
            "--trainpref", "train.bpe", "--validpref", "valid.bpe", "--testpref", tests, "--joined-dictionary",
            "--srcdict", data.absolute() / "dict.txt", "--destdir", data.absolute() / "data-bin" / "mix",
        ],
        cwd=folder,  # a comma in its name would separate two prefixes
        check=True,
    )
    # fmt: on
    return counts


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder of prepare.sh, made without --max-words")
    parser.add_argument("--lengths", type=int, nargs="+", default=[128, 256, 512], metavar="TOKENS", help="chunks")
    args = parser.parse_args(arguments)
    if not (args.data / "counts.json").is_file():
        parser.error(f"{args.data} holds no finished corpus (counts.json); make it with prepare.sh")
    if min(args.lengths) < 1 or len(set(args.lengths)) < len(args.lengths):
        parser.error(f"--lengths {args.lengths} are not different numbers of tokens from 1")
    for name, lines in build(args.data, args.lengths).items():
        print(f"{name}: {lines:,} lines")


if __name__ == "__main__":
    main()
