"""Builds the text of a language model from the HTML documentation in Debian's packages, down to fairseq's data-bin.

A document is one HTML page, kept whole: one line for each paragraph, heading, list item or table cell, and an empty
line at its end, as fairseq's --sample-break-mode complete_doc reads it. Pages are split into train, valid and test.
"""

import argparse
import gzip
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "common"))  # beside this folder; see examples/common

import building
import debs
from building import (
    SPLITS,
    PrepareError,
    Step,
    check_options,
    one_line_errors,
    prepare,
    prepare_parser,
    read_lines,
    write_lines,
)
from segments import clean

PACKAGES = (
    "git-doc",
    "libreoffice-help-en-us",
    "linux-doc-6.1",
    "postgresql-doc-15",
    "python3.11-doc",
    "sqlite3-doc",
)
"""Those of Debian 12; --packages names others."""

BLOCKS = frozenset("p h1 h2 h3 h4 h5 h6 li dt dd td th".split())
LISTS = frozenset("ul ol dl table".split())  # whose end closes a block that has no end tag
SKIPPED = frozenset("head nav pre script style header footer form".split())
MOST_PAGES = 10  # a line on more pages of a package than this is navigation
LEAST_WORDS = 50  # of a document
SHARES = {"valid": 0.02, "test": 0.02}


# ---------------------------------------------------------------- text of a page


class _Page(HTMLParser):
    """Collects the text of block elements in reading order; text outside of any block is left out."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.lines: list[str] = []
        self._text: list[str] | None = None  # of the block that is open
        self._skipped = 0  # depth of elements that are left out

    def _end_block(self) -> None:
        line = clean("".join(self._text or ()))
        if any(map(str.isalpha, line)):
            self.lines.append(line)
        self._text = None

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in SKIPPED:
            self._skipped += 1
        if tag in BLOCKS or tag in SKIPPED:
            self._end_block()
        if tag in BLOCKS:
            self._text = []
        elif tag == "br" and self._text is not None:
            self._text.append(" ")

    def handle_endtag(self, tag: str) -> None:
        if tag in SKIPPED:
            self._skipped = max(0, self._skipped - 1)
        if tag in BLOCKS or tag in LISTS:
            self._end_block()

    def handle_data(self, data: str) -> None:
        if not self._skipped and self._text is not None:
            self._text.append(data)


def page_lines(html: str) -> list[str]:
    """The text of a page, one line for each innermost block element; code is left out."""
    page = _Page()
    page.feed(html)
    page.close()
    return page.lines


def read_pages(package: Path) -> Iterator[tuple[str, list[str]]]:
    """(name, lines) of the HTML pages of an unpacked package, compressed ones too."""
    for file in sorted(package.rglob("*")):
        if file.is_file() and not file.is_symlink() and file.name.removesuffix(".gz").endswith((".html", ".htm")):
            content = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
            yield str(file.relative_to(package.parent)), page_lines(content.decode("utf-8", errors="replace"))


def documents_of(package: Path) -> list[tuple[str, list[str]]]:
    """(name, lines) of the documents of a package: without navigation, short pages and repeated pages."""
    pages = list(read_pages(package))
    spread = Counter(line for _, lines in pages for line in set(lines))
    documents, seen = [], set()
    for name, lines in pages:
        kept = [line for line in lines if spread[line] <= MOST_PAGES]
        if sum(len(line.split()) for line in kept) >= LEAST_WORDS and tuple(kept) not in seen:
            seen.add(tuple(kept))
            documents.append((name, kept))
    return documents


# ---------------------------------------------------------------- steps


def build_packages(work: Path, packages: Sequence[str], deb_dir: Path | None) -> dict[str, Any]:
    """``packages/``: downloaded or found, and unpacked."""
    named = f"the Debian packages {' '.join(packages)}"
    debs.require_commands(["dpkg"] if deb_dir else ["apt-get", "dpkg"], named, f"apt-get download {' '.join(packages)}")
    if deb_dir is None:
        if unknown := debs.unknown_packages(packages, work):
            raise PrepareError(
                f"apt does not know {' '.join(unknown)}; name packages of your release with --packages NAME ..."
            )
        (work / "debs").mkdir()
        debs.download_packages(packages, work / "debs")
    files = debs.find_packages(packages, deb_dir or work / "debs")
    (work / "packages").mkdir()
    debs.unpack_packages(files, work / "packages")
    return {"packages": {name: debs.version_of(file) for name, file in files.items()}}


def build_text(work: Path, out: Path, packages: Sequence[str], seed: int) -> dict[str, Any]:
    """``text/``: {train,valid,test}.txt."""
    lines: dict[str, list[str]] = {split: [] for split in SPLITS}
    documents: dict[str, Counter[str]] = {split: Counter() for split in SPLITS}
    words: dict[str, int] = {}
    for package in packages:
        found = documents_of(out / "packages" / package)
        if not found:
            raise PrepareError(f"the package {package} has no HTML pages; leave it out of --packages")
        words[package] = sum(len(line.split()) for _, text in found for line in text)
        for name, text in found:
            split = building.split_of(name, seed, SHARES)
            documents[split][package] += 1
            lines[split] += [*text, ""]
    (work / "text").mkdir()
    for split in SPLITS:
        write_lines(work / "text" / f"{split}.txt", lines[split])
    return {
        "words": words,
        "documents": {split: dict(counts) for split, counts in documents.items()},
        "split_words": {split: sum(len(line.split()) for line in lines[split]) for split in SPLITS},
    }


def build_pieces(work: Path, out: Path, bpe_size: int) -> dict[str, Any]:
    """``spm.model``, ``dict.txt`` and ``bpe/``: the text in pieces."""
    text = {split: read_lines(out / "text" / f"{split}.txt") for split in SPLITS}
    dictionary, pieces = building.encode_text(work, text, bpe_size)
    return {
        "dictionary": dictionary,
        "tokens": {split: sum(map(len, lines)) + len(lines) for split, lines in pieces.items()},  # ends of line count
    }


def build_data_bin(work: Path, out: Path) -> dict[str, Any]:
    """``data-bin/``, by fairseq-preprocess."""
    building.preprocess_text(out / "bpe", work / "data-bin", dictionary=out / "dict.txt")
    return {}


def steps_of(args: argparse.Namespace) -> list[Step]:
    out, packages = args.out, sorted(set(args.packages))
    found = {"packages": packages}
    if args.deb_dir is not None:
        found["files"] = building.file_hash(*debs.find_packages(packages, args.deb_dir).values())
    code = building.file_hash(Path(building.__file__), Path(__file__))
    return [
        Step("packages", ("packages",), found, lambda work: build_packages(work, packages, args.deb_dir)),
        Step(
            "text",
            ("text",),
            {"seed": args.seed, "code": code},
            lambda work: build_text(work, out, packages, args.seed),
        ),
        Step(
            "pieces",
            ("spm.model", "dict.txt", "bpe"),
            {"bpe_size": args.bpe_size},
            lambda work: build_pieces(work, out, args.bpe_size),
        ),
        Step("data_bin", ("data-bin",), {}, lambda work: build_data_bin(work, out)),
    ]


# ---------------------------------------------------------------- command


def parse_args(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = prepare_parser(__doc__.split("\n")[0], "data/full", bpe_size=8000)
    parser.add_argument(
        "--packages",
        nargs="+",
        metavar="NAME",
        default=PACKAGES,
        help="Debian packages with HTML pages in English (default: six)",
    )
    args = parser.parse_args(arguments)
    if args.out is None:
        args.out = Path(__file__).resolve().parent / "data" / "full"
    check_options(parser, args)
    return args


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse_args(arguments)
    with one_line_errors():
        counts = prepare(args, steps_of)
    for split in SPLITS:
        print(
            f"{split:>6}: {sum(counts['documents'][split].values()):,} documents, {counts['split_words'][split]:,} "
            f"words, {counts['tokens'][split]:,} tokens"
        )
    print(f"counts: {args.out / 'counts.json'}; data: {args.out / 'data-bin'}")


if __name__ == "__main__":
    main()
