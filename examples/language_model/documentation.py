"""Builds the English text of a language model from Debian's packages, down to fairseq's data-bin.

A document is one HTML page, man page or package description, kept whole: one line for each paragraph, heading, list
item or table cell, and an empty line at its end, as fairseq's --sample-break-mode complete_doc reads it. Documents are
split into train, valid and test.
"""

import argparse
import gzip
import re
import shutil
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "common"))  # beside this folder; see examples/common

import apt_lists
import building
import debs
import descriptions
import man_pages
import parallel_text
import segments
from building import (
    SPLITS,
    PrepareError,
    Step,
    check_options,
    file_hash,
    one_line_errors,
    prepare,
    prepare_parser,
    read_lines,
    write_lines,
)
from parallel_text import match_key, split_sentences
from segments import clean

PACKAGES = (
    # HTML pages
    *"git-doc libreoffice-help-en-us linux-doc-6.1 postgresql-doc-15 python3.11-doc sqlite3-doc".split(),
    # man pages: of packages that examples/debian_text reads, too, those with most text
    *"apt bash binutils-common btrfs-progs coreutils debhelper devscripts dpkg-dev e2fsprogs groff iptables".split(),
    *"libsane-common manpages manpages-dev netpbm nfs-common passwd procps systemd util-linux".split(),
    # and others with many pages
    *"inn2 iproute2 libcurl4-doc libssl-doc libx11-doc lvm2 ncurses-doc openssl pcp postfix sg3-utils slapd".split(),
    *"tcl8.6-doc tk8.6-doc".split(),
)
"""Those of Debian 12; --packages names others."""
DESCRIPTIONS = "Translation-en"  # a file of apt's lists

BLOCKS = frozenset("p h1 h2 h3 h4 h5 h6 li dt dd td th".split())
LISTS = frozenset("ul ol dl table".split())  # whose end closes a block that has no end tag
SKIPPED = frozenset("head nav pre script style header footer form".split())
VERBATIM = re.compile(r"^\.Vb\b.*?^\.Ve\b", re.MULTILINE | re.DOTALL)
"""Code in man pages that pod2man makes. ``man_pages`` keeps it for Debian text, whose results were measured with it."""
MOST_PAGES = 10  # a line on more pages of a package than this is navigation
LEAST_WORDS = 50  # of a document
LEAST_SHARED = 8  # words: shorter sentences, such as headings, may be in several splits
SHARES = {"valid": 0.02, "test": 0.02}


# ---------------------------------------------------------------- text of a page


class Document(NamedTuple):
    """A page or description; ``name`` is unique and decides on its split."""

    name: str
    lines: list[str]


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


def read_html(package: Path) -> Iterator[Document]:
    """The HTML pages of an unpacked package, compressed ones too; Linux's translations are left out."""
    for file in sorted(package.rglob("*")):
        if file.is_file() and not file.is_symlink() and file.name.removesuffix(".gz").endswith((".html", ".htm")):
            name = file.relative_to(package.parent)
            if "translations" not in name.parts:
                content = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
                yield Document(name.as_posix(), page_lines(content.decode("utf-8", errors="replace")))


def read_man(package: Path) -> Iterator[Document]:
    """The English man pages of an unpacked package that have the macros of man(7), without code."""
    for file in sorted(package.glob("usr/share/man/**/*.gz")):
        language, _ = apt_lists.man_page(file.relative_to(package).as_posix()) or ("", "")
        if language == "en" and file.is_file() and not file.is_symlink():
            source = gzip.decompress(file.read_bytes()).decode("utf-8", errors="replace")
            blocks = man_pages.blocks(VERBATIM.sub("", source)) or []
            lines = [block.text for block in blocks if any(map(str.isalpha, block.text))]
            yield Document(file.relative_to(package.parent).as_posix(), lines)


def read_package(package: Path) -> list[Document]:
    """The man pages of an unpacked package; of one that has none, the HTML pages. Where it has both, they are alike."""
    return list(read_man(package)) or list(read_html(package))


def read_descriptions(file: Path) -> list[Document]:
    """Descriptions of apt's lists: title, paragraphs and list items. Of a package's several versions, the last one."""
    with file.open(encoding="utf-8") as lines:
        described = {package: text for package, _, text in descriptions.stanzas(lines)}
    return [Document(f"descriptions/{package}", text) for package, text in described.items()]


# ---------------------------------------------------------------- filters


def words_of(lines: Iterable[str]) -> int:
    return sum(len(line.split()) for line in lines)


def filtered(pages: Iterable[Document]) -> list[Document]:
    """Pages of one package, or all descriptions, without navigation, short pages and repeated pages."""
    pages = list(pages)
    spread = Counter(line for page in pages for line in set(page.lines))
    documents, seen = [], set()
    for name, lines in pages:
        kept = [line for line in lines if spread[line] <= MOST_PAGES]
        if words_of(kept) >= LEAST_WORDS and tuple(kept) not in seen:
            seen.add(tuple(kept))
            documents.append(Document(name, kept))
    return documents


def without_held_out(splits: dict[str, list[Document]]) -> tuple[dict[str, list[Document]], dict[str, int]]:
    """Test documents as they are; valid ones without lines that share a sentence with test, train with either.

    Documents that become short are left out. Counts: lines that were left out, by split.
    """
    held_out: set[str] = set()
    kept: dict[str, list[Document]] = {}
    counts = {}
    for split in reversed(SPLITS):
        kept[split], counts[split], seen = [], 0, set[str]()
        for name, lines in splits[split]:
            unseen = [line for line in lines if held_out.isdisjoint(keys(line))]
            counts[split] += len(lines) - len(unseen)
            seen.update(*map(keys, lines))
            if words_of(unseen) >= LEAST_WORDS:
                kept[split].append(Document(name, unseen))
        held_out |= seen
    return kept, counts


def keys(line: str) -> set[str]:
    """Equal for sentences that differ in case and punctuation alone; those of few words have none."""
    return {match_key(text) for text in split_sentences(line) if len(text.split()) >= LEAST_SHARED}


# ---------------------------------------------------------------- steps


def build_packages(
    work: Path, packages: Sequence[str], with_descriptions: bool, deb_dir: Path | None
) -> dict[str, Any]:
    """``packages/``: downloaded or found, and unpacked; apt's descriptions beside them."""
    named = f"the Debian packages {' '.join(packages)}"
    debs.require_commands(["dpkg"] if deb_dir else ["apt-get", "dpkg"], named, f"apt-get download {' '.join(packages)}")
    if deb_dir is None:
        if unknown := debs.unknown_packages(packages, work):
            raise PrepareError(
                f"apt does not know {' '.join(unknown)}; name packages of your release with --packages NAME ..."
            )
        deb_dir = work / "debs"
        deb_dir.mkdir()
        debs.download_packages(packages, deb_dir)
        if with_descriptions:
            text = apt_lists.Lists(work / ".apt", ("en",), contents=False).translations("en")
            (deb_dir / DESCRIPTIONS).write_text(text, "utf-8")
    files = debs.find_packages(packages, deb_dir)
    (work / "packages").mkdir()
    debs.unpack_packages(files, work / "packages")
    if with_descriptions:
        shutil.copyfile(deb_dir / DESCRIPTIONS, work / "packages" / DESCRIPTIONS)
    return {"packages": {name: debs.version_of(file) for name, file in files.items()}}


def build_text(work: Path, out: Path, packages: Sequence[str], with_descriptions: bool, seed: int) -> dict[str, Any]:
    """``text/``: {train,valid,test}.txt."""
    sources = {name: filtered(read_package(out / "packages" / name)) for name in packages}
    if with_descriptions:
        sources["descriptions"] = filtered(read_descriptions(out / "packages" / DESCRIPTIONS))
    if empty := [name for name, found in sources.items() if not found]:
        raise PrepareError(
            f"no HTML page, man page or description of {' and '.join(empty)} has {LEAST_WORDS} words of text: leave "
            "out what has none with --packages or --no-descriptions"
        )
    splits: dict[str, list[Document]] = {split: [] for split in SPLITS}
    for found in sources.values():
        for document in found:
            splits[building.split_of(document.name, seed, SHARES)].append(document)
    splits, left_out = without_held_out(splits)
    (work / "text").mkdir()
    for split, found in splits.items():
        write_lines(work / "text" / f"{split}.txt", (line for document in found for line in (*document.lines, "")))
    documents, words = ({split: Counter[str]() for split in SPLITS} for _ in range(2))
    for split, found in splits.items():
        for name, lines in found:
            source = name.split("/")[0]
            documents[split][source] += 1
            words[split][source] += words_of(lines)
    return {
        "documents": documents,
        "words": words,
        "split_words": {split: words[split].total() for split in SPLITS},
        "held_out_lines_left_out": left_out,
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
    out, packages, described = args.out, sorted(set(args.packages)), args.descriptions
    found: dict[str, Any] = {"packages": packages, "descriptions": described}
    if args.deb_dir is not None:
        files = list(debs.find_packages(packages, args.deb_dir).values())
        if described:
            files.append(args.deb_dir / DESCRIPTIONS)
            if not files[-1].is_file():
                raise PrepareError(
                    f"{args.deb_dir} has no file {DESCRIPTIONS}; it comes from main/i18n/{DESCRIPTIONS}.bz2 of a "
                    "Debian mirror, unpacked; without it, give --no-descriptions"
                )
        found["files"] = file_hash(*files)
    modules = (apt_lists, building, descriptions, man_pages, parallel_text, segments)
    code = file_hash(*(Path(module.__file__) for module in modules), Path(__file__))
    return [
        Step("packages", ("packages",), found, lambda work: build_packages(work, packages, described, args.deb_dir)),
        Step(
            "text",
            ("text",),
            {"seed": args.seed, "code": code},
            lambda work: build_text(work, out, packages, described, args.seed),
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
        help=f"Debian packages with HTML or man pages in English (default: {len(PACKAGES)})",
    )
    parser.add_argument(
        "--no-descriptions",
        dest="descriptions",
        action="store_false",
        help=f"leave out the descriptions of all packages, for which --deb-dir holds {DESCRIPTIONS}",
    )
    args = parser.parse_args(arguments)
    check_options(parser, args, Path(__file__).parent / "data" / "full")
    return args


@one_line_errors()
def main(arguments: Sequence[str] | None = None) -> None:
    args = parse_args(arguments)
    counts = prepare(args, steps_of)
    for split in SPLITS:
        print(
            f"{split:>6}: {sum(counts['documents'][split].values()):,} documents, {counts['split_words'][split]:,} "
            f"words, {counts['tokens'][split]:,} tokens"
        )
    print(f"counts: {args.out / 'counts.json'}; data: {args.out / 'data-bin'}")


if __name__ == "__main__":
    main()
