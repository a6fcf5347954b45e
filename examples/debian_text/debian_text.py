"""Builds the Debian text corpus, English to one language: package descriptions, man pages, LibreOffice's help.

Run by ``prepare.sh``. Steps are those of ``examples/common/building.py``.
"""

import argparse
import gzip
import shutil
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "common"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "libreoffice_help"))

import apt_lists
import building
import debs
import descriptions
import help_packages
import help_text
import man_pages
import parallel_text
import segments
from apt_lists import apt_language
from building import (
    SPLITS,
    PrepareError,
    Step,
    add_page_tokens,
    check_options,
    file_hash,
    one_line_errors,
    prepare,
    prepare_parser,
)
from parallel_text import Filter, by_sentence, encoding_steps, english_texts, fairseq_language, filter_pages, write_text
from segments import Page, Pair

SHARES = {"test": 0.022, "valid": 0.01}  # of the pages
COMMANDS = ("apt-get", "apt-cache", "dpkg")
WHAT = "apt's lists of package descriptions and Debian packages with man pages"
FETCH = "examples/debian_text/prepare.sh --fetch DIR"


# ---------------------------------------------------------------- packages


def fetch(folder: Path, language: str, max_package: int) -> None:
    """Download ``Translation-LANGUAGE`` of English and the language, and all packages, into ``folder``.

    max_package: bytes; larger packages are left out. Few of them hold more than a page or two.
    """
    debs.require_commands(COMMANDS, WHAT, FETCH)
    names = ("en", apt_language(language))
    lists = apt_lists.Lists(folder / ".apt", names)
    for name in names:
        text = lists.translations(name)
        if not text.strip():
            raise PrepareError(
                f"apt's sources have no descriptions in {name!r}: are they Debian's? Languages are de, fr …"
            )
        (folder / f"Translation-{name}").write_text(text, "utf-8")
    sizes = lists.sizes(lists.man_packages(names[1]), folder)
    packages = {name for name, size in sizes.items() if size <= max_package}
    debs.download_packages(sorted(packages | set(help_packages.packages_of([language]))), folder, lists.options)
    shutil.rmtree(folder / ".apt")


def build_packages(work: Path, language: str, deb_dir: Path | None, max_package: int) -> dict[str, Any]:
    """``packages/``: the Translation files, man pages in ``man/LANGUAGE``, and LibreOffice's packages, unpacked."""
    debs.require_commands(("dpkg",), WHAT, FETCH)
    if deb_dir is None:
        deb_dir = work / "debs"
        deb_dir.mkdir()
        fetch(deb_dir, language, max_package)
    out = work / "packages"
    out.mkdir()
    names = ("en", apt_language(language))
    for name in names:
        file = deb_dir / f"Translation-{name}"
        if not file.is_file():
            raise PrepareError(f"{deb_dir} has no {file.name}: --deb-dir takes a folder of `{FETCH}`")
        (out / file.name).write_bytes(file.read_bytes())
    office = debs.find_packages(help_packages.packages_of([language]), deb_dir)
    debs.unpack_packages(office, out)
    files = sorted(file for file in deb_dir.glob("*.deb") if file not in office.values())
    for file in files:
        wanted = debs.read_members(file, lambda path: (apt_lists.man_page(path) or ("",))[0] in names)
        for path, packed in wanted.items():
            side, page = apt_lists.man_page(path)
            unpacked = out / "man" / side / page
            unpacked.parent.mkdir(parents=True, exist_ok=True)
            unpacked.write_bytes(gzip.decompress(packed))
    versions = {name: debs.version_of(file) for name, file in office.items()}
    return {"packages": versions | {file.name.split("_")[0]: debs.version_of(file) for file in files}}


# ---------------------------------------------------------------- text


def read_descriptions(packages: Path, language: str) -> tuple[list[Page], Counter[str]]:
    return descriptions.align(
        *((packages / f"Translation-{side}").read_text("utf-8").split("\n") for side in ("en", apt_language(language)))
    )


def read_man_pages(packages: Path, language: str) -> tuple[list[Page], Counter[str], set[str]]:
    """Pages ``man/man1/ls.1``, counts, and all English texts."""
    pages, english = [], set()
    counts = Counter(pages=0, other_format=0, unaligned_pages=0)
    originals, translations = (packages / "man" / side for side in ("en", apt_language(language)))
    for file in sorted(translations.rglob("*.*")):
        name = file.relative_to(translations).as_posix()
        original = originals / name
        if not original.is_file():
            continue
        sides = [man_pages.blocks(side.read_text("utf-8", errors="replace")) for side in (original, file)]
        if None in sides:
            counts["other_format"] += 1
            continue
        counts["pages"] += 1
        english.update(block.text for block in sides[0])
        pairs, of_page = man_pages.align(*sides)
        counts.update(of_page)
        if pairs:
            pages.append(Page(f"man/{name}", pairs))
        else:
            counts["unaligned_pages"] += 1
    return pages, counts, english


def sentence_pages(pages: Sequence[Page]) -> list[Page]:
    """Pages by sentence, without what is the same on both sides: names, options, code."""
    split = map(by_sentence, pages)
    return [Page(page.name, [pair for pair in page.pairs if pair.source != pair.target]) for page in split]


def filtered(pages: Sequence[Page], english: set[str]) -> tuple[list[Page], dict[str, Any]]:
    """Pages by sentence, without the pairs that break a rule, and counts."""
    pages = sentence_pages(pages)
    aligned = [pair for page in pages for pair in page.pairs]
    texts = english | {pair.source for pair in aligned}
    rules = Filter(aligned, english_texts(texts), source_is_english=True, target_is_english=False)
    kept, dropped = filter_pages(pages, rules)
    unique = {pair for page in kept for pair in page.pairs}
    return kept, {
        "aligned_sentences": len(aligned),
        "dropped_sentences": dropped,
        "kept_sentences": sum(len(page.pairs) for page in kept),
        "unique_pairs": len(unique),
        "words": {"source": _words(unique, 0), "target": _words(unique, 1)},
    }


def _words(pairs: set[Pair], side: int) -> int:
    return sum(len(pair[side].split()) for pair in pairs)


def build_text(work: Path, out: Path, language: str, seed: int, max_words: int) -> dict[str, Any]:
    """``sentences/`` and ``segments.jsonl`` (``parallel_text.write_text``) from all three sources."""
    packages = out / "packages"
    described, description_counts = read_descriptions(packages, language)
    manual, manual_counts, english = read_man_pages(packages, language)
    help_pages, interface, _ = help_text.read_pair(packages, "en", language)
    if not described or not manual:
        raise PrepareError(
            f"{len(described)} package descriptions and {len(manual)} man pages in {language!r} have an English "
            f"original: packages of too different releases?"
        )
    described, description_filter = filtered(described, set())
    manual, manual_filter = filtered(manual, english)
    help_pages = sentence_pages([Page(f"help/{page.name}", page.pairs) for page in help_pages])
    interface = sentence_pages(interface)
    counts = write_text(work, ("en", language), [*described, *manual, *help_pages], interface, seed, SHARES, max_words)
    of_source = {split: Counter[str]() for split in SPLITS}
    for split in SPLITS:
        lines = building.read_lines(work / "sentences" / f"{split}.pages")
        of_source[split].update(line.split("/", 1)[0] for line in lines)
    return {
        "descriptions": {**description_counts, **description_filter},
        "man": {**manual_counts, **manual_filter},
        "help": {"unique_pairs": len({pair for page in help_pages for pair in page.pairs})},
        "interface": {"unique_pairs": len({pair for page in interface for pair in page.pairs})},
        **counts,
        "split_pairs_of_source": {split: dict(of_source[split]) for split in SPLITS},
    }


# ---------------------------------------------------------------- command


def steps_of(args: argparse.Namespace) -> list[Step]:
    out: Path = args.out
    packages: dict[str, Any] = {"language": args.language, "max_package_mb": args.max_package_mb}
    if args.deb_dir is not None:
        files = sorted([*args.deb_dir.glob("*.deb"), *args.deb_dir.glob("Translation-*")])
        packages |= {"files": file_hash(*files)}
    modules = (
        apt_lists,
        descriptions,
        man_pages,
        help_packages,
        help_text,
        help_text.corpus,
        parallel_text,
        segments,
        building,
    )
    code = file_hash(*(Path(module.__file__) for module in modules), Path(__file__))
    limit = round(args.max_package_mb * 1e6)
    return [
        Step(
            "packages", ("packages",), packages, lambda work: build_packages(work, args.language, args.deb_dir, limit)
        ),
        Step(
            "text",
            ("sentences", "segments.jsonl"),
            {"seed": args.seed, "max_words": args.max_words, "code": code},
            lambda work: build_text(work, out, args.language, args.seed, args.max_words),
        ),
        *encoding_steps(out, ("en", args.language), args.bpe_size, 1.0, args.page_tokens),
    ]


def summary(counts: dict[str, Any]) -> str:
    rows = [("source", "unique pairs", *SPLITS)]
    for name in ("descriptions", "man", "help", "interface"):
        splits = [counts["split_pairs_of_source"][split].get(name.removesuffix("s"), 0) for split in SPLITS]
        rows.append((name, counts[name]["unique_pairs"], *splits))
    rows.append(("all", "", *(counts["split_pairs"][split] for split in SPLITS)))
    return "\n".join("".join(f"{f'{cell:,}' if isinstance(cell, int) else cell:>14}" for cell in row) for row in rows)


def parse_args(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = prepare_parser(__doc__.split("\n")[0], "data/en-TGT", bpe_size=12000)
    add = parser.add_argument
    add("source", nargs="?", metavar="en", default="en", help="the source language is English")
    add("target", nargs="?", metavar="TGT", default="de", help="target language: de, fr, es, pt-br, … (default: de)")
    add_page_tokens(parser)
    add(
        "--max-words",
        type=int,
        default=100,
        metavar="N",
        help="longest sentence, in words; pages keep all (default: 100)",
    )
    add("--max-package-mb", type=float, default=4, metavar="X", help="download no package that is larger (default: 4)")
    add("--fetch", type=Path, metavar="DIR", help="download what --deb-dir takes into this folder, and do nothing else")
    args = parser.parse_args(arguments)
    if args.source != "en" or args.target == "en":
        parser.error(f"the pair is {args.source} {args.target}; this corpus translates from en into another language")
    args.language = help_packages.package_language(args.target)
    out = Path(__file__).parent / "data" / "-".join(languages(args))
    check_options(parser, args, out, page_tokens=1, max_words=1)
    if args.deb_dir is not None and not args.deb_dir.is_dir():
        parser.error(f"--deb-dir {args.deb_dir} is not a folder")
    return args


def languages(args: argparse.Namespace) -> tuple[str, str]:
    """Source and target language, as they stand in file names."""
    return "en", fairseq_language(args.language)


@one_line_errors()
def main(arguments: Sequence[str] | None = None) -> None:
    args = parse_args(arguments)
    if args.fetch is not None:
        args.fetch.mkdir(parents=True, exist_ok=True)
        fetch(args.fetch, args.language, round(args.max_package_mb * 1e6))
        print(f"fetched: {args.fetch}")
        return
    counts = prepare(args, steps_of)
    print(summary(counts))
    print(f"counts: {args.out / 'counts.json'}; data: {args.out / 'data-bin'}/{{{','.join(parallel_text.LEVELS)}}}")


if __name__ == "__main__":
    main()
