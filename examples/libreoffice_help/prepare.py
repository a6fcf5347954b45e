"""Builds the LibreOffice-help corpus of one language pair: packages -> text -> SentencePiece -> documents -> data-bin.

Run by ``prepare.sh``. Steps are those of ``examples/common/building.py``.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "common"))

import building
import corpus
import debs
import help_packages
import help_text
import parallel_text
import segments
from building import (
    SPLITS,
    Step,
    add_page_tokens,
    check_options,
    file_hash,
    one_line_errors,
    prepare,
    prepare_parser,
    read_lines,
)
from help_packages import build_packages, package_language, packages_of
from help_text import read_pair
from parallel_text import LEVELS, encoding_steps, fairseq_language, write_text

# Of the pages. With en-de they leave about 2,000 test and 1,500 valid pairs that training does not hold.
SHARES = {"test": 0.084, "valid": 0.062}
# With thousands of characters, the rarest few are not worth a piece each.
COVERAGE_OF_LARGE_SCRIPTS = 0.9995
LARGE_SCRIPTS = frozenset(("ja", "ko", "zh-cn", "zh-tw"))


def build_text(work: Path, out: Path, pair: Sequence[str], seed: int, max_words: int | None) -> dict[str, Any]:
    """``sentences/`` and ``segments.jsonl`` (``parallel_text.write_text``)."""
    pages, interface, counts = read_pair(out / "packages", *pair)
    counts |= write_text(work, pair, pages, interface, seed, SHARES, max_words)
    from_interface = sum(line.startswith("interface/") for line in read_lines(work / "sentences" / "train.pages"))
    return {**counts, "train_pairs_from_interface": from_interface}


# ---------------------------------------------------------------- steps


def steps_of(args: argparse.Namespace) -> list[Step]:
    out: Path = args.out
    pair = (args.source, args.target)
    packages = {"pair": list(pair)}
    if args.deb_dir is not None:
        files = debs.find_packages(packages_of(pair), args.deb_dir)
        packages |= {name: f"{file.name} {file_hash(file)}" for name, file in files.items()}
    code = file_hash(
        *(Path(module.__file__) for module in (corpus, help_packages, help_text, parallel_text, segments, building)),
        Path(__file__),
    )
    return [
        Step("packages", ("packages",), packages, lambda work: build_packages(work, pair, args.deb_dir)),
        Step(
            "text",
            ("sentences", "segments.jsonl"),
            {"seed": args.seed, "max_words": args.max_words, "code": code},
            lambda work: build_text(work, out, pair, args.seed, args.max_words),
        ),
        *encoding_steps(out, pair, args.bpe_size, args.character_coverage, args.page_tokens),
    ]


def summary(counts: dict[str, Any], pair: Sequence[str]) -> str:
    """The counts as a short table for people; ``counts.json`` has all of them."""
    words = ", ".join(f"{language} {number:,}" for language, number in counts["words"].items())
    interface = counts["interface"]
    rows = [
        ("pages", counts["pages"]["in_both_languages"], ""),
        ("aligned segments", counts["aligned_segments"], f"{counts['unique_aligned_pairs']:,} unique pairs"),
        *((f"  dropped: {rule}", number, "") for rule, number in counts["dropped_segments"].items()),
        ("  kept", counts["kept_segments"], f"{counts['unique_pairs']:,} unique pairs; words: {words}"),
        ("interface strings", interface["strings"], f"{interface['unique_pairs']:,} unique pairs kept"),
        ("dictionary", counts["dictionary"], "with fairseq's special symbols"),
    ]
    lines = [f"{name:<24}{number:>9,}  {note}".rstrip() for name, number, note in rows]
    columns = ("tokens", "p50", "p90", "p99", "max", "unknown")
    widths = (12, 6, 6, 6, 6, 8)
    title = f"{'level':<10}{'split':<7}{'pages':>6}{'lines':>8}"
    for language in pair:
        names = (f"{language} tokens", *columns[1:])
        title += "".join(f"{name:>{width}}" for name, width in zip(names, widths, strict=True))
    lines.append(title)
    for level, key in zip(LEVELS, ("sentence_tokens", "page_tokens"), strict=True):
        for split in SPLITS:
            sides = [counts[key][split][language] for language in pair]
            row = f"{level:<10}{split:<7}{counts['split_pages'][split]:>6,}{sides[0]['lines']:>8,}"
            for side in sides:
                row += "".join(f"{side[name]:>{width},}" for name, width in zip(columns, widths, strict=True))
            lines.append(row)
    return "\n".join(lines)


def parse_args(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = prepare_parser(__doc__.split("\n")[0], "data/SRC-TGT", bpe_size=4000)
    add = parser.add_argument
    add(
        "source",
        nargs="?",
        metavar="SRC",
        default="en",
        help="source language, as in libreoffice-help-SRC (default: en)",
    )
    add("target", nargs="?", metavar="TGT", default="de", help="target language (default: de)")
    add_page_tokens(parser)
    add(
        "--max-words",
        type=int,
        metavar="N",
        help="keep only segments of at most N words at sentence level, in all splits: an easier, smaller task",
    )
    add(
        "--character-coverage",
        type=float,
        metavar="P",
        help=f"of SentencePiece (default: {COVERAGE_OF_LARGE_SCRIPTS} with "
        f"{', '.join(sorted(LARGE_SCRIPTS))}, else 1.0)",
    )
    args = parser.parse_args(arguments)
    args.source, args.target = package_language(args.source), package_language(args.target)
    if args.source == args.target:
        parser.error(f"source and target language are both {args.source!r}; choose two different languages")
    if args.character_coverage is None:
        large = LARGE_SCRIPTS & {args.source, args.target}
        args.character_coverage = COVERAGE_OF_LARGE_SCRIPTS if large else 1.0
    out = Path(__file__).parent / "data" / "-".join(languages(args))
    check_options(parser, args, out, page_tokens=1, max_words=1)
    return args


def languages(args: argparse.Namespace) -> tuple[str, str]:
    """Source and target language, as they stand in file names."""
    return fairseq_language(args.source), fairseq_language(args.target)


@one_line_errors()
def main(arguments: Sequence[str] | None = None) -> None:
    args = parse_args(arguments)
    counts = prepare(args, steps_of)
    print(summary(counts, (args.source, args.target)))
    print(f"counts: {args.out / 'counts.json'}; data: {args.out / 'data-bin'}/{{{','.join(LEVELS)}}}")


if __name__ == "__main__":
    main()
