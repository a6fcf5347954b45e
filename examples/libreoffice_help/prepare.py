"""Builds the LibreOffice-help corpus of one language pair: packages -> text -> SentencePiece -> documents -> data-bin.

Run by ``prepare.sh``. Steps are those of ``examples/common/building.py``.
"""

import argparse
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "common"))

import building
import corpus
import segments
from building import (
    SPLITS,
    PrepareError,
    Step,
    build,
    encode,
    file_hash,
    known_pieces,
    length_quantiles,
    load_sentencepiece,
    preprocess,
    read_lines,
    train_sentencepiece,
    write_dictionary,
    write_lines,
)
from corpus import Page, Pair
from segments import cut_page, join_pieces, join_segments

LEVELS = ("sentences", "pages")
# Shares of the pages. With en-de they leave about 2,000 test and 1,500 valid pairs that training does not hold.
TEST_FRACTION = 0.084
VALID_FRACTION = 0.062
# With thousands of characters, the rarest few are not worth a piece each.
COVERAGE_OF_LARGE_SCRIPTS = 0.9995
LARGE_SCRIPTS = frozenset(("ja", "ko", "zh-cn", "zh-tw"))


# ---------------------------------------------------------------- packages


def package_language(language: str) -> str:
    """A language as Debian's packages spell it: ``pt_BR`` -> ``pt-br``; plain English is ``en``."""
    language = language.lower().replace("_", "-")
    return "en" if language == "en-us" else language


def fairseq_language(language: str) -> str:
    """A language as it stands in file names; fairseq takes a hyphen for the end of the source language."""
    return language.replace("-", "_")


def help_package(language: str) -> str:
    return f"libreoffice-help-{'en-us' if language == 'en' else language}"


def message_package(language: str) -> str:
    """The interface translations. American English has none: it is the message ids of the others."""
    return f"libreoffice-l10n-{language}"


def is_english(language: str) -> bool:
    return language.split("-")[0] == "en"


def packages_of(pair: Sequence[str]) -> list[str]:
    """The packages a pair needs. English help is always one: it shows what the other languages left untranslated."""
    languages = [language for language in pair if language != "en"]
    return sorted({help_package("en"), *map(help_package, languages), *map(message_package, languages)})


def language_of(package: str) -> str:
    """The language named by a package, for messages."""
    return "en" if package == help_package("en") else package.split("-", 2)[2]


def _require_commands(commands: Sequence[str], packages: Sequence[str]) -> None:
    missing = [command for command in commands if shutil.which(command) is None]
    if not missing:
        return
    names = " ".join(packages)
    if "dpkg" in missing:
        raise PrepareError(
            f"this machine has no {' and no '.join(missing)}: unpacking Debian packages needs the program dpkg. "
            f"Install the package `dpkg` of your system (most have one). Without apt-get, also download the Debian "
            f"packages {names} on a Debian or Ubuntu machine (`apt-get download {names}`) and give their "
            f"folder as --deb-dir DIR"
        )
    raise PrepareError(
        f"this machine has no {missing[0]}: the corpus comes from the Debian packages {names}. Download them on a "
        f"Debian or Ubuntu machine (`apt-get download {names}`), copy the .deb files here and give their folder as "
        f"--deb-dir DIR"
    )


def _run(command: Sequence[str], cwd: Path) -> subprocess.CompletedProcess:
    environment = {**os.environ, "LC_ALL": "C"}
    return subprocess.run(command, cwd=cwd, env=environment, text=True, capture_output=True, errors="replace")


def download_packages(packages: Sequence[str], folder: Path) -> None:
    """``apt-get download`` into ``folder``; any user may."""
    known = {name for name in packages if _run(["apt-cache", "show", name], folder).returncode == 0}
    unknown = [name for name in packages if name not in known]
    if not known:
        raise PrepareError(
            f"apt knows none of the packages {' '.join(packages)}: its package lists are empty or too old. Run "
            f"`apt-get update` as root, or download the packages elsewhere and give their folder as --deb-dir DIR"
        )
    if unknown:
        prefix = "libreoffice-help-"
        listed = _run(["apt-cache", "pkgnames", prefix], folder).stdout.split()
        offered = sorted(name.removeprefix(prefix) for name in listed if name != f"{prefix}common")
        raise PrepareError(
            f"no Debian package {' and no '.join(unknown)}: language {language_of(unknown[0])!r} is not offered. apt "
            f"offers help in: {' '.join(offered)}"
        )
    done = _run(["apt-get", "download", *packages], folder)
    if done.returncode:
        raise PrepareError(
            f"`apt-get download {' '.join(packages)}` failed with exit status {done.returncode}: "
            f"{done.stderr.strip()}. Check the network and run `apt-get update`, or give a folder with the packages as "
            f"--deb-dir DIR"
        )


def find_packages(packages: Sequence[str], folder: Path) -> dict[str, Path]:
    """package name -> its one .deb file in ``folder``."""
    if not folder.is_dir():
        raise PrepareError(f"{folder} is not a folder: --deb-dir takes the folder that holds the .deb files")
    found = {name: sorted(folder.glob(f"{name}_*.deb")) for name in packages}
    missing = [name for name, files in found.items() if not files]
    if missing:
        raise PrepareError(
            f"{folder} has no .deb file of {' '.join(missing)} (language {language_of(missing[0])!r}). Download with "
            f"`apt-get download {' '.join(missing)}` into that folder; a language for which that fails is not offered"
        )
    for name, files in found.items():
        if len(files) > 1:
            raise PrepareError(
                f"{folder} has {len(files)} versions of {name}: {', '.join(f.name for f in files)}. Keep one"
            )
    return {name: files[0] for name, files in found.items()}


def unpack_packages(files: dict[str, Path], folder: Path) -> None:
    """``dpkg -x`` of every package into ``folder/<package name>``."""
    for name, file in files.items():
        done = _run(["dpkg", "-x", str(file.absolute()), str(folder / name)], folder)
        if done.returncode:
            raise PrepareError(
                f"{file} cannot be unpacked (dpkg -x, exit status {done.returncode}): {done.stderr.strip()}. "
                f"Download the package again"
            )


def build_packages(work: Path, pair: Sequence[str], deb_dir: Path | None) -> dict[str, Any]:
    """Unpacked packages in ``packages/``. Returns the version of each, from its file name."""
    names = packages_of(pair)
    if deb_dir is None:
        _require_commands(("apt-get", "apt-cache", "dpkg"), names)
        deb_dir = work / "debs"
        deb_dir.mkdir()
        download_packages(names, deb_dir)
    else:
        _require_commands(("dpkg",), names)
    files = find_packages(names, deb_dir)
    (work / "packages").mkdir()
    unpack_packages(files, work / "packages")
    # In a file name, the colon of a version is written %3a.
    return {"packages": {name: file.name.split("_")[1].replace("%3a", ":") for name, file in files.items()}}


def help_folder(packages: Path, language: str) -> Path:
    """The ``text`` folder of an unpacked help package; its parent is named as LibreOffice spells the language."""
    root = packages / help_package(language) / "usr/share/libreoffice/help"
    folders = sorted(root.glob("*/text"))
    if len(folders) != 1:
        raise PrepareError(
            f"package {help_package(language)} has {len(folders)} folders usr/share/libreoffice/help/*/text, expected "
            f"1: its layout is not the one of LibreOffice 6 to 7"
        )
    return folders[0]


# ---------------------------------------------------------------- text


def write_jsonl(file: Path, records: Iterable[Any]) -> None:
    write_lines(file, (json.dumps(record, ensure_ascii=False) for record in records))


class Line(NamedTuple):
    """One line of a parallel file and where it comes from: ``page.pairs[first : first + segments]``."""

    pair: Pair
    page: str
    first: int
    segments: int


def write_level(folder: Path, pair: Sequence[str], split: str, lines: Sequence[Line]) -> None:
    """split.<source>, split.<target> and split.pages (TSV: page, first segment, number of segments) in ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    for side, language in enumerate(pair):
        write_lines(folder / f"{split}.{fairseq_language(language)}", (line.pair[side] for line in lines))
    write_lines(folder / f"{split}.pages", (f"{line.page}\t{line.first}\t{line.segments}" for line in lines))


def unique_lines(pages: Iterable[Page]) -> list[Line]:
    """One line per distinct pair, where it first occurs."""
    lines: dict[Pair, Line] = {}
    for page in pages:
        for index, pair in enumerate(page.pairs):
            lines.setdefault(pair, Line(pair, page.name, index, 1))
    return list(lines.values())


def split_pages(
    pages: Sequence[Page], interface: Sequence[Page], seed: int
) -> tuple[dict[str, list[Page]], dict[str, int]]:
    """Pages by split; valid and test without the segments that are in training, valid also without those in test."""
    parts: dict[str, list[Page]] = {split: [] for split in SPLITS}
    for page in pages:
        parts[corpus.split_of(page.name, seed, TEST_FRACTION, VALID_FRACTION)].append(page)
    seen, dropped = corpus.Seen(), {}
    for part in (*parts["train"], *interface):
        seen.add(part.pairs)
    for split in ("test", "valid"):
        before = sum(len(page.pairs) for page in parts[split])
        parts[split] = corpus.without_seen(parts[split], seen)
        dropped[split] = before - sum(len(page.pairs) for page in parts[split])
        for page in parts[split]:
            seen.add(page.pairs)
    return parts, dropped


def filter_pages(pages: Iterable[Page], rules: corpus.Filter) -> tuple[list[Page], dict[str, int]]:
    """Pages without the segments that break a rule, and how many broke which."""
    dropped = Counter(dict.fromkeys(corpus.FILTERS, 0))
    kept = []
    for page in pages:
        broken = [rules.broken_rule(pair) for pair in page.pairs]
        dropped.update(rule for rule in broken if rule)
        pairs = [pair for pair, rule in zip(page.pairs, broken, strict=True) if rule is None]
        if pairs:
            kept.append(Page(page.name, pairs))
    return kept, dict(dropped)


def at_most(lines: Iterable[Line], max_words: int | None) -> list[Line]:
    """The lines of at most ``max_words`` words, separated by white space, on both sides; all for None."""
    return [line for line in lines if max_words is None or max(len(side.split()) for side in line.pair) <= max_words]


def build_text(work: Path, out: Path, pair: Sequence[str], seed: int, max_words: int | None) -> dict[str, Any]:
    """``sentences/`` and, for the page level, ``segments.jsonl``: every page with its split and its segments."""
    source, target = pair
    packages = out / "packages"
    blocks = {language: corpus.read_help(help_folder(packages, language)) for language in {"en", *pair}}
    messages = {
        language: None if language == "en" else corpus.read_messages(packages / message_package(language))
        for language in pair
    }

    pages, page_counts = corpus.align_pages(blocks[source], blocks[target])
    strings, string_counts = corpus.align_messages(messages[source], messages[target])
    if not pages:
        raise PrepareError(
            f"the help packages of {source} and {target} share no page with text: versions too different?"
        )
    english = corpus.english_texts(
        [block.text for page in blocks["en"].values() for block in page]
        + [
            corpus.interface_text(corpus.english_message(key))
            for catalogue in messages.values()
            if catalogue
            for _, key in catalogue
        ]
    )
    aligned = [segment for page in pages for segment in page.pairs]
    rules = corpus.Filter(aligned, english, is_english(source), is_english(target))
    kept, dropped = filter_pages(pages, rules)
    by_catalogue: dict[str, list[Pair]] = {}
    for catalogue, segment in strings:
        by_catalogue.setdefault(f"interface/{catalogue}", []).append(segment)
    interface, interface_dropped = filter_pages([Page(*item) for item in by_catalogue.items()], rules)

    parts, seen_dropped = split_pages(kept, interface, seed)
    unique_of = {split: unique_lines([*parts[split], *(interface if split == "train" else [])]) for split in SPLITS}
    lines = {split: at_most(unique_of[split], max_words) for split in SPLITS}
    for split in SPLITS:
        if not lines[split]:
            raise PrepareError(
                f"no {split} pairs are left of {len(kept)} pages: too little text, or another --seed helps"
            )
        write_level(work / "sentences", pair, split, lines[split])
    write_jsonl(
        work / "segments.jsonl",
        ({"page": page.name, "split": split, "pairs": page.pairs} for split in SPLITS for page in parts[split]),
    )

    unique = {segment for page in kept for segment in page.pairs}
    return {
        "pages": {"in_both_languages": len(pages), **page_counts},
        "aligned_segments": len(aligned),
        "unique_aligned_pairs": len(set(aligned)),
        "dropped_segments": dropped,
        "kept_segments": sum(len(page.pairs) for page in kept),
        "unique_pairs": len(unique),
        "words": {language: sum(len(s[side].split()) for s in unique) for side, language in enumerate(pair)},
        "interface": {
            **string_counts,
            "dropped": interface_dropped,
            "kept": sum(len(page.pairs) for page in interface),
            "unique_pairs": len({segment for page in interface for segment in page.pairs}),
        },
        "dropped_segments_seen_in_training": seen_dropped,
        "dropped_lines_over_max_words": {split: len(unique_of[split]) - len(lines[split]) for split in SPLITS},
        "split_pages": {split: len(parts[split]) for split in SPLITS},
        "split_pairs": {split: len(lines[split]) for split in SPLITS},
        "train_pairs_from_interface": sum(line.page.startswith("interface/") for line in lines["train"]),
        "usual_log_length_ratio": round(rules.usual_log_ratio, 4),
    }


# ---------------------------------------------------------------- SentencePiece


def write_encoded(
    folder: Path, pair: Sequence[str], split: str, sides: Sequence[Sequence[Sequence[str]]], known: frozenset[str]
) -> dict[str, Any]:
    """split.<language> of both sides; ``sides[side][line]`` is a list of pieces. Returns lengths and unknown pieces."""
    folder.mkdir(parents=True, exist_ok=True)
    counts = {}
    for language, encoded in zip(pair, sides, strict=True):
        write_lines(folder / f"{split}.{fairseq_language(language)}", map(" ".join, encoded))
        unknown = sum(piece not in known for pieces in encoded for piece in pieces)
        counts[language] = {**length_quantiles([len(pieces) for pieces in encoded]), "unknown": unknown}
    return counts


def build_sentencepiece(work: Path, out: Path, pair: Sequence[str], bpe_size: int, coverage: float) -> dict[str, Any]:
    """``spm.model``, ``dict.txt`` and the encoded sentences in ``bpe-sentences/``."""
    text = {
        split: [read_lines(out / "sentences" / f"{split}.{fairseq_language(language)}") for language in pair]
        for split in SPLITS
    }
    train_sentencepiece(work / "spm.model", (line for side in text["train"] for line in side), bpe_size, coverage)
    processor = load_sentencepiece(work / "spm.model")
    encoded = {split: [encode(processor, side) for side in text[split]] for split in SPLITS}
    frequency = Counter(piece for side in encoded["train"] for pieces in side for piece in pieces)
    size = write_dictionary(work / "dict.txt", processor, frequency)
    known = known_pieces(processor)
    return {
        "dictionary": size,
        "sentence_tokens": {
            split: write_encoded(work / "bpe-sentences", pair, split, encoded[split], known) for split in SPLITS
        },
    }


# ---------------------------------------------------------------- documents


def build_pages(work: Path, out: Path, pair: Sequence[str], page_tokens: int) -> dict[str, Any]:
    """``pages/`` and ``bpe-pages/``: documents of at most ``page_tokens`` tokens on both sides."""
    processor = load_sentencepiece(out / "spm.model")
    known = known_pieces(processor)
    records = [json.loads(line) for line in read_lines(out / "segments.jsonl")]
    counts: dict[str, Any] = {"page_tokens": {}, "documents_cut_from_pages": {}, "segments_longer_than_a_document": {}}
    for split in SPLITS:
        lines, sides, too_long = [], ([], []), 0
        pages = [Page(r["page"], [Pair(*segment) for segment in r["pairs"]]) for r in records if r["split"] == split]
        segments = [segment for page in pages for segment in page.pairs]
        pieces = list(
            zip(*(encode(processor, [segment[side] for segment in segments]) for side in (0, 1)), strict=True)
        )
        start = 0
        for page in pages:
            of_page = pieces[start : start + len(page.pairs)]
            start += len(page.pairs)
            documents, left_out = cut_page(page, [(len(s), len(t)) for s, t in of_page], page_tokens)
            too_long += left_out
            for document in documents:
                span = slice(document.first, document.first + len(document.pairs))
                joined = Pair(*(join_segments([segment[side] for segment in document.pairs]) for side in (0, 1)))
                lines.append(Line(joined, page.name, document.first, len(document.pairs)))
                for side in (0, 1):
                    sides[side].append(join_pieces([segment[side] for segment in of_page[span]]))
        if not lines:
            raise PrepareError(
                f"no {split} segment fits --page-tokens {page_tokens}: all {too_long} are longer; choose a larger limit"
            )
        write_level(work / "pages", pair, split, lines)
        counts["page_tokens"][split] = write_encoded(work / "bpe-pages", pair, split, sides, known)
        counts["documents_cut_from_pages"][split] = {"pages": len(pages), "documents": len(lines)}
        counts["segments_longer_than_a_document"][split] = too_long
    return counts


# ---------------------------------------------------------------- data-bin


def build_data_bin(work: Path, out: Path, pair: Sequence[str]) -> dict[str, Any]:
    """``data-bin/sentences`` and ``data-bin/pages``, by fairseq-preprocess with one dictionary for all sides."""
    folders = {level: out / f"bpe-{level}" for level in LEVELS}
    languages = [fairseq_language(language) for language in pair]
    preprocess(languages, folders, out / "dict.txt", work / "data-bin", out / "logs")
    return {}


# ---------------------------------------------------------------- steps


def steps_of(args: argparse.Namespace, pair: tuple[str, str]) -> list[Step]:
    out: Path = args.out
    packages = {"pair": list(pair)}
    if args.deb_dir is not None:
        files = find_packages(packages_of(pair), args.deb_dir)
        packages |= {name: f"{file.name} {file_hash(file)}" for name, file in files.items()}
    code = file_hash(*(Path(module.__file__) for module in (corpus, segments, building)), Path(__file__))
    return [
        Step("packages", ("packages",), packages, lambda work: build_packages(work, pair, args.deb_dir)),
        Step(
            "text",
            ("sentences", "segments.jsonl"),
            {"seed": args.seed, "max_words": args.max_words, "code": code},
            lambda work: build_text(work, out, pair, args.seed, args.max_words),
        ),
        Step(
            "sentencepiece",
            ("spm.model", "dict.txt", "bpe-sentences"),
            {"bpe_size": args.bpe_size, "character_coverage": args.character_coverage},
            lambda work: build_sentencepiece(work, out, pair, args.bpe_size, args.character_coverage),
        ),
        Step(
            "pages",
            ("pages", "bpe-pages"),
            {"page_tokens": args.page_tokens},
            lambda work: build_pages(work, out, pair, args.page_tokens),
        ),
        Step("data_bin", ("data-bin",), {}, lambda work: build_data_bin(work, out, pair)),
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


def prepare(args: argparse.Namespace) -> dict[str, Any]:
    """All steps for one language pair; returns what ``counts.json`` holds."""
    return build(args.out, steps_of(args, (args.source, args.target)), vars(args))


def parse_args(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="prepare.sh", description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument(
        "source", nargs="?", metavar="SRC", default="en", help="source language, as in libreoffice-help-SRC"
    )
    parser.add_argument("target", nargs="?", metavar="TGT", default="de", help="target language")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="output folder (default: data/SRC-TGT beside prepare.sh)"
    )
    parser.add_argument("--bpe-size", type=int, default=4000, metavar="N", help="entries of the joint dictionary")
    parser.add_argument(
        "--page-tokens", type=int, default=1000, metavar="N", help="longest document, in tokens per side"
    )
    parser.add_argument(
        "--max-words",
        type=int,
        metavar="N",
        help="keep only segments of at most N words at sentence level, in all splits: an easier, smaller task",
    )
    parser.add_argument(
        "--deb-dir", type=Path, metavar="DIR", help="folder with downloaded .deb files, used instead of apt"
    )
    parser.add_argument("--seed", type=int, default=1, metavar="N", help="of the split into train, valid and test")
    parser.add_argument(
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
    for name, least in (("bpe_size", 100), ("page_tokens", 1), ("max_words", 1)):
        if getattr(args, name) is not None and getattr(args, name) < least:
            parser.error(f"--{name.replace('_', '-')} is {getattr(args, name)}, expected at least {least}")
    if args.character_coverage is None:
        large = LARGE_SCRIPTS & {args.source, args.target}
        args.character_coverage = COVERAGE_OF_LARGE_SCRIPTS if large else 1.0
    if not 0.9 <= args.character_coverage <= 1:
        parser.error(f"--character-coverage is {args.character_coverage}, expected between 0.9 and 1")
    if args.out is None:
        name = f"{fairseq_language(args.source)}-{fairseq_language(args.target)}"
        args.out = Path(__file__).resolve().parent / "data" / name
    # Absolute, because apt-get, dpkg and fairseq-preprocess do not all run in this folder.
    args.out = args.out.absolute()
    return args


def languages(args: argparse.Namespace) -> tuple[str, str]:
    """Source and target language, as they stand in file names."""
    return fairseq_language(args.source), fairseq_language(args.target)


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse_args(arguments)
    missing = [name for name in ("sentencepiece", "fairseq") if importlib.util.find_spec(name) is None]
    try:
        if missing:
            raise PrepareError(
                f"{sys.executable} has no module {' and no '.join(missing)}: activate the environment in which "
                f"ap-fairseq is installed, or install it there (`python3 -m pip install -e .` in the repository root)"
            )
        counts = prepare(args)
    except PrepareError as error:
        sys.exit(f"prepare.sh: error: {error}")
    print(summary(counts, (args.source, args.target)))
    print(f"counts: {args.out / 'counts.json'}; data: {args.out / 'data-bin'}/{{{','.join(LEVELS)}}}")


if __name__ == "__main__":
    main()
