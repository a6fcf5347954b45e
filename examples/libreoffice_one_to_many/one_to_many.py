"""Builds a corpus from English into many languages, of LibreOffice's help and interface, for one model.

A source sentence begins with a tag that names the target language, ``<2de>``. Run by ``prepare.sh``; steps are those of
``examples/common/building.py``.
"""

import argparse
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "common"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "libreoffice_help"))

import building
import debs
import help_packages
import help_text
import parallel_text
import segments
from building import SPLITS, PrepareError, Step, check_options, file_hash, one_line_errors, prepare, prepare_parser
from help_packages import build_packages, package_language, packages_of
from help_text import read_help, read_pair
from parallel_text import build_data_bin, build_sentencepiece, fairseq_language, split_pages, unique_lines, write_level
from segments import Page, Pair

PAIR = ("en", "many")
SHARES = {"test": 0.02, "valid": 0.012}  # of the pages
# Those whose help is translated in large part, but for Chinese, Japanese and Korean.
LANGUAGES = "cs da de el es fi fr hu it nl pl pt pt-br ru sl sv tr".split()


def tag(language: str) -> str:
    """What a source sentence begins with; one piece in SentencePiece."""
    return f"<2{fairseq_language(language)}>"


def language_of(page: str) -> str:
    return page.partition(":")[0]


def tagged(pages: Iterable[Page]) -> list[Page]:
    return [
        Page(page.name, [Pair(f"{tag(language_of(page.name))} {source}", target) for source, target in page.pairs])
        for page in pages
    ]


def build_text(work: Path, out: Path, languages: Sequence[str], seed: int) -> dict[str, Any]:
    """``sentences/``. A page is in the same split in all languages; its name is ``LANGUAGE:PAGE``.

    Held-out segments go whose English is in the training text of any language, or whose translation is.
    """
    pages, interface = [], []
    english_help = read_help(out / "packages", "en")
    for language in languages:
        of_language = read_pair(out / "packages", "en", language, english_help)
        for read, into in zip(of_language[:2], (pages, interface), strict=True):
            into += [Page(f"{language}:{page.name}", page.pairs) for page in read]
    parts, dropped = split_pages(pages, interface, seed, SHARES, unit=lambda name: name.partition(":")[2])
    counts: dict[str, Counter[str]] = {}
    for split in SPLITS:
        lines = unique_lines(tagged([*parts[split], *(interface if split == "train" else [])]))
        counts[split] = Counter(language_of(line.page) for line in lines)
        missing = [language for language in languages if not counts[split][language]]
        if missing:
            raise PrepareError(
                f"no {split} pairs are left for {' '.join(missing)}: too little text, or another --seed helps"
            )
        write_level(work / "sentences", PAIR, split, lines)
    return {
        "dropped_segments_seen_in_training": dropped,
        "split_pairs": {split: sum(counts[split].values()) for split in SPLITS},
        "split_pairs_of_language": {split: dict(counts[split]) for split in SPLITS},
    }


def steps_of(args: argparse.Namespace) -> list[Step]:
    out: Path = args.out
    packages: dict[str, Any] = {"languages": args.languages}
    if args.deb_dir is not None:
        files = debs.find_packages(packages_of(args.languages), args.deb_dir)
        packages |= {"files": file_hash(*files.values())}
    modules = (help_packages, help_text, help_text.corpus, parallel_text, segments, building)
    code = file_hash(*(Path(module.__file__) for module in modules), Path(__file__))
    symbols = [f"▁{tag(language)}" for language in args.languages]
    return [
        Step("packages", ("packages",), packages, lambda work: build_packages(work, args.languages, args.deb_dir)),
        Step(
            "text",
            ("sentences",),
            {"seed": args.seed, "code": code},
            lambda work: build_text(work, out, args.languages, args.seed),
        ),
        Step(
            "sentencepiece",
            ("spm.model", "dict.txt", "bpe-sentences"),
            {"bpe_size": args.bpe_size, "character_coverage": args.character_coverage},
            lambda work: build_sentencepiece(work, out, PAIR, args.bpe_size, args.character_coverage, symbols),
        ),
        Step("data_bin", ("data-bin",), {}, lambda work: build_data_bin(work, out, PAIR, ["sentences"])),
    ]


def summary(counts: dict[str, Any]) -> str:
    of_language = counts["split_pairs_of_language"]
    rows = [("language", *SPLITS)]
    rows += [(language, *(of_language[split][language] for split in SPLITS)) for language in of_language["train"]]
    rows.append(("all", *(counts["split_pairs"][split] for split in SPLITS)))
    return "\n".join("".join(f"{f'{cell:,}' if isinstance(cell, int) else cell:>10}" for cell in row) for row in rows)


def parse_args(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = prepare_parser(__doc__.split("\n")[0], "data/en-many", bpe_size=24000)
    add = parser.add_argument
    add("source", nargs="?", metavar="en", choices=[PAIR[0]], default=PAIR[0], help="the source language is English")
    add("target", nargs="?", metavar="many", choices=[PAIR[1]], default=PAIR[1], help="the target is all --languages")
    add(
        "--languages",
        nargs="+",
        default=LANGUAGES,
        metavar="TGT",
        help="target languages, as in libreoffice-help-TGT (default: 17)",
    )
    add("--character-coverage", type=float, default=0.9999, metavar="P", help="of SentencePiece (default: %(default)s)")
    args = parser.parse_args(arguments)
    args.languages = sorted(map(package_language, args.languages))
    twice = sorted({language for language in args.languages if args.languages.count(language) > 1})
    if twice or "en" in args.languages:
        parser.error(f"--languages names {' '.join(twice) or 'en'}; give each target language once, without en")
    check_options(parser, args, Path(__file__).parent / "data" / "-".join(PAIR))
    return args


def languages(args: argparse.Namespace) -> tuple[str, str]:
    """Source and target language, as they stand in file names."""
    return PAIR


@one_line_errors()
def main(arguments: Sequence[str] | None = None) -> None:
    args = parse_args(arguments)
    counts = prepare(args, steps_of)
    print(summary(counts))
    print(f"counts: {args.out / 'counts.json'}; data: {args.out / 'data-bin' / 'sentences'}")


if __name__ == "__main__":
    main()
