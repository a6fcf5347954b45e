"""Builds a classification set for RoBERTa from apt's lists: the section of a package, told from its description.

Packages of one source stay together in train, valid or test, because their descriptions are alike; of the same
descriptions one is taken. Sections with few packages are left out.
"""

import argparse
import re
import shutil
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "common"))  # see examples/common

import building
import debs
import descriptions
from apt_lists import Lists
from building import SPLITS, PrepareError, Step, check_options, one_line_errors, prepare, prepare_parser, write_lines

LISTS = ("Translation-en", "Packages")
WORDS = 32  # of a description
LEAST = 200  # training descriptions of a section
SHARES = {"valid": 0.03, "test": 0.1}


def sections_of(lines: Iterable[str]) -> Iterator[tuple[str, str, str]]:
    """(package, source, section) of each stanza of a file ``Packages``; ``contrib/net`` is the section net."""
    fields: dict[str, str] = {}
    for line in [*lines, ""]:
        if not line.strip():
            if "Package" in fields and "Section" in fields:
                source = fields.get("Source", fields["Package"]).split()[0]  # without its version
                yield fields["Package"], source, fields["Section"].rpartition("/")[2]
            fields = {}
        elif match := re.match(r"(Package|Source|Section): (.+)", line):
            fields[match[1]] = match[2].strip()


def examples_of(
    described: Iterable[tuple[str, str, list[str]]], packages: Iterable[tuple[str, str, str]], seed: int
) -> dict[str, list[tuple[str, str]]]:
    """(description, section) by split; each description comes once."""
    known = {package: (source, section) for package, source, section in packages}
    found: dict[str, list[tuple[str, str]]] = {split: [] for split in SPLITS}
    seen = set()
    for package, _, segments in described:
        text = " ".join(" ".join(segments).split()[:WORDS])
        if package in known and text not in seen:
            seen.add(text)
            source, section = known[package]
            found[building.split_of(source, seed, SHARES)].append((text, section))
    counts = Counter(section for _, section in found["train"])
    return {split: [pair for pair in pairs if counts[pair[1]] >= LEAST] for split, pairs in found.items()}


# ---------------------------------------------------------------- steps


def build_lists(work: Path, deb_dir: Path | None) -> dict[str, Any]:
    """``lists/``: the descriptions and packages that apt knows, or those of a folder."""
    out = work / "lists"
    out.mkdir()
    if deb_dir is not None:
        for name in LISTS:
            if not (deb_dir / name).is_file():
                raise PrepareError(
                    f"{deb_dir} has no file {name}; it comes from main/i18n/Translation-en.bz2 and "
                    "main/binary-amd64/Packages.xz of a Debian mirror, unpacked"
                )
            shutil.copyfile(deb_dir / name, out / name)
        return {}
    debs.require_commands(["apt-get"], "apt's lists", "prepare.sh --deb-dir DIR, with Translation-en and Packages")
    lists = Lists(work / ".apt", ("en",), contents=False)
    for name, text in zip(LISTS, (lists.translations("en"), lists.packages()), strict=True):
        (out / name).write_text(text, "utf-8")
    return {}


def build_text(work: Path, out: Path, seed: int) -> dict[str, Any]:
    """``text/``: {train,valid,test}.input0, descriptions, and .label, their sections."""
    lines = [(out / "lists" / name).read_text("utf-8").splitlines() for name in LISTS]
    examples = examples_of(descriptions.stanzas(lines[0]), sections_of(lines[1]), seed)
    if not examples["train"]:
        raise PrepareError(f"no section has {LEAST} described packages in {out / 'lists'}: are the lists Debian's?")
    (work / "text").mkdir()
    for split, pairs in examples.items():
        write_lines(work / "text" / f"{split}.input0", (text for text, _ in pairs))
        write_lines(work / "text" / f"{split}.label", (section for _, section in pairs))
    counts = {split: Counter(section for _, section in pairs) for split, pairs in examples.items()}
    return {
        "examples": {split: len(pairs) for split, pairs in examples.items()},
        "sections": len(counts["train"]),
        "most_frequent": dict(counts["train"].most_common(1)),
    }


def build_pieces(work: Path, out: Path, bpe_size: int) -> dict[str, Any]:
    """``spm.model``, ``dict.txt`` and ``bpe/``: the descriptions in pieces, and the labels."""
    text = {split: building.read_lines(out / "text" / f"{split}.input0") for split in SPLITS}
    dictionary, pieces = building.encode_text(work, text, bpe_size, ".input0")
    for split in SPLITS:
        shutil.copyfile(out / "text" / f"{split}.label", work / "bpe" / f"{split}.label")
    return {"dictionary": dictionary, "lengths": building.length_quantiles(list(map(len, pieces["train"])))}


def build_data_bin(work: Path, out: Path) -> dict[str, Any]:
    """``data-bin/input0`` and ``data-bin/label``, by fairseq-preprocess."""
    building.preprocess_text(out / "bpe", work / "data-bin" / "input0", ".input0", out / "dict.txt")
    building.preprocess_text(out / "bpe", work / "data-bin" / "label", ".label")
    return {}


def steps_of(args: argparse.Namespace) -> list[Step]:
    out, found = args.out, {}
    if args.deb_dir is not None:
        found["files"] = building.file_hash(*(file for file in map(args.deb_dir.joinpath, LISTS) if file.is_file()))
    code = building.file_hash(*(Path(module.__file__) for module in (building, descriptions)), Path(__file__))
    return [
        Step("lists", ("lists",), found, lambda work: build_lists(work, args.deb_dir)),
        Step("text", ("text",), {"seed": args.seed, "code": code}, lambda work: build_text(work, out, args.seed)),
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
    parser = prepare_parser(__doc__.split("\n")[0], "data", bpe_size=4000)
    args = parser.parse_args(arguments)
    check_options(parser, args, Path(__file__).parent / "data")
    return args


@one_line_errors()
def main(arguments: Sequence[str] | None = None) -> None:
    args = parse_args(arguments)
    counts = prepare(args, steps_of)
    print(f"{counts['sections']} sections, {counts['examples']}; data: {args.out / 'data-bin'}")


if __name__ == "__main__":
    main()
