"""Builds the corpus of a data set: archives -> text -> SentencePiece -> data-bin, as its recipe.toml says.

Run by ``run.sh prepare`` of each data set. Raw cased text with a joint SentencePiece model; held-out text as sacreBLEU
reads it. Everything is streamed, so that 40 million pairs need no more memory than 400.
"""

import argparse
import itertools
import os
import sys
import tomllib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import building
import corpora
import downloads
import segments
from building import (
    SPLITS,
    PrepareError,
    Step,
    build,
    encode,
    file_hash,
    known_pieces,
    lines_of,
    load_sentencepiece,
    preprocess,
    require_least,
    train_sentencepiece,
    write_dictionary,
    write_lines,
)
from corpora import Line, TestSet
from downloads import Archive
from segments import Page, Pair, join_documents

BLOCK_LINES = 100_000  # encoded at once


class Recipe:
    """What a data set's recipe.toml says of its text, for one of its variants.

    Attributes:
        pair: (source, target) language.
        training: entries with ``archive``, ``source``, ``target`` (members of the archive) and ``format``.
        held_out: split -> entries: names of sacreBLEU's test sets, or members of an archive.
        archives: name -> Archive, of this variant; those of sacreBLEU go by their address.
    """

    def __init__(self, file: Path, variant: str | None):
        toml = tomllib.loads(file.read_text("utf-8"))
        self.name = file.parent.name
        self.pair = (toml["source"], toml["target"])
        self.variants: list[str] = toml.get("variants", [])
        if variant is None and self.variants:
            variant = self.variants[0]
        if variant is not None and variant not in self.variants:
            raise PrepareError(f"--variant {variant} is unknown; {self.name} has {' '.join(self.variants) or 'none'}")
        self.variant = variant
        self.bpe_size: int = toml["bpe_size"]
        self.max_tokens: int = toml["max_tokens"]
        self.max_ratio: float = toml["max_ratio"]
        self.document_tokens: int | None = toml.get("document_tokens")
        self.valid_every: int | None = toml.get("valid_every")
        self.training = [entry for entry in toml["training"] if entry.get("variant", variant) == variant]
        self.held_out = {split: toml.get(split, []) for split in ("valid", "test")}
        self.archives = {
            entry["name"]: Archive(entry["address"], entry.get("checksum"))
            for entry in toml["archives"]
            if entry.get("variant", variant) == variant
        }
        for entry in itertools.chain(*self.held_out.values()):
            if "sacrebleu" in entry:
                for archive in sacrebleu_archives(entry["sacrebleu"], self.pair):
                    if archive not in self.archives.values():
                        self.archives[archive.address] = archive


def sacrebleu_archives(name: str, pair: Sequence[str]) -> list[Archive]:
    """What sacreBLEU reads a language pair of a test set from."""
    from sacrebleu.dataset import DATASETS

    data_set = DATASETS[name]
    archives = [Archive(*part) for part in zip(data_set.data, (f"md5:{md5}" for md5 in data_set.md5), strict=True)]
    if len(archives) == 1:
        return archives
    # One archive for each direction of each pair, which holds a folder of its name.
    folders = {member.split("/")[0] for member in data_set.langpairs["-".join(pair)]}
    return [archive for archive in archives if Path(archive.path).name.split(".")[0] in folders]


# ---------------------------------------------------------------- text


def read_training(recipe: Recipe, folder: Path, work: Path) -> Iterator[Line]:
    for entry in recipe.training:
        archive = folder / recipe.archives[entry["archive"]].path
        members = corpora.extract(archive, [entry["source"], entry["target"]], work)
        yield from corpora.cleaned(corpora.FORMATS[entry["format"]](*members))
        for member in members:
            member.unlink()


def read_held_out(recipe: Recipe, split: str, folder: Path) -> TestSet:
    """The test sets of a split, one after the other."""
    from sacrebleu.dataset import DATASETS

    parts = []
    pair = "-".join(recipe.pair)
    for entry in recipe.held_out[split]:
        if "sacrebleu" in entry:
            name, members = entry["sacrebleu"], DATASETS[entry["sacrebleu"]].langpairs[pair]
            archives = sacrebleu_archives(name, recipe.pair)
        else:
            name, members = entry["name"], [entry["source"], entry["target"]]
            archives = [recipe.archives[entry["archive"]]]
        read = corpora.read_test_set(name, [folder / archive.path for archive in archives], pair, members)
        parts.append(read._replace(talks=[f"{name}:{talk}" for talk in read.talks]))
    return TestSet(*(list(itertools.chain.from_iterable(column)) for column in zip(*parts, strict=True)))


def build_text(recipe: Recipe, folder: Path, work: Path) -> dict[str, Any]:
    """``text/``: {train,valid,test}.{source,target,talks}; test sets as sacreBLEU has them."""
    text = work / "text"
    text.mkdir()
    counts: dict[str, int] = dict.fromkeys(SPLITS, 0)
    for split, entries in recipe.held_out.items():
        if entries:
            held_out = read_held_out(recipe, split, folder)
            for suffix, lines in zip((*recipe.pair, "talks"), held_out, strict=True):
                write_lines(text / f"{split}.{suffix}", lines)
            counts[split] = len(held_out.sources)
    lines = read_training(recipe, folder, work)
    splits = ("train", "valid") if recipe.valid_every else ("train",)
    streams = {
        (split, suffix): (text / f"{split}.{suffix}").open("w", encoding="utf-8", newline="\n")
        for split in splits
        for suffix in (*recipe.pair, "talks")
    }
    for number, line in enumerate(lines, 1):
        split = "valid" if recipe.valid_every and number % recipe.valid_every == 0 else "train"
        counts[split] += 1
        for suffix, value in zip((*recipe.pair, "talks"), line, strict=True):
            streams[split, suffix].write(f"{value}\n")
    for stream in streams.values():
        stream.close()
    empty = [split for split in SPLITS if not counts[split]]
    if empty:
        raise PrepareError(f"no {empty[0]} pairs came out of the archives in {folder}: are they whole?")
    return {"text_pairs": counts}


# ---------------------------------------------------------------- pieces


def spaced(lines: Iterable[str], count: int, limit: int) -> Iterator[str]:
    """At most ``limit`` of ``count`` lines, evenly spaced: what SentencePiece learns from."""
    return itertools.islice(lines, 0, None, -(-count // limit))


def encoded(processor, text: Path, split: str, pair: Sequence[str]) -> Iterator[tuple[list[str], list[str], str]]:
    """(source pieces, target pieces, talk) of each line."""
    rows = zip(*(lines_of(text / f"{split}.{suffix}") for suffix in (*pair, "talks")), strict=True)
    while block := list(itertools.islice(rows, BLOCK_LINES)):
        sides = [encode(processor, [segments.clean(row[side]) for row in block]) for side in (0, 1)]
        yield from zip(*sides, [row[2] for row in block], strict=True)


def fits(source: Sequence[str], target: Sequence[str], most: int, ratio: float) -> bool:
    """fairseq's recipes keep training pairs of 1 to ``most`` tokens whose lengths differ by at most the factor."""
    shorter, longer = sorted((len(source), len(target)))
    return 0 < shorter and longer <= most and longer <= ratio * shorter


def build_pieces(recipe: Recipe, out: Path, work: Path, spm_lines: int) -> dict[str, Any]:
    """``spm.model``, ``dict.txt`` and the encoded sentences in ``bpe-sentences/``; test pairs are never left out."""
    text = out / "text"
    sizes = {suffix: sum(1 for _ in lines_of(text / f"train.{suffix}")) for suffix in recipe.pair}
    sample = itertools.chain.from_iterable(
        spaced(lines_of(text / f"train.{suffix}"), sizes[suffix], spm_lines // 2) for suffix in recipe.pair
    )
    train_sentencepiece(work / "spm.model", sample, recipe.bpe_size, coverage=0.9999)
    processor = load_sentencepiece(work / "spm.model")
    known = known_pieces(processor)
    (work / "bpe-sentences").mkdir()
    frequency: Counter[str] = Counter()
    sentences = {}
    for split in SPLITS:
        pairs = (sides for *sides, _ in encoded(processor, text, split, recipe.pair))
        files = [work / "bpe-sentences" / f"{split}.{language}" for language in recipe.pair]
        fitting = None if split == "test" else recipe
        sentences[split] = write_pairs(files, pairs, fitting, known, frequency if split == "train" else Counter())
        if not sentences[split]["pairs"]:
            raise PrepareError(
                f"all {sentences[split]['left_out']} {split} pairs are longer than {recipe.max_tokens} tokens or too "
                "unequal"
            )
    return {"sentences": sentences, "dictionary": write_dictionary(work / "dict.txt", processor, frequency)}


def write_pairs(
    files: Sequence[Path],
    pairs: Iterable[Sequence[list[str]]],
    fitting: Recipe | None,
    known: frozenset[str],
    frequency: Counter[str],
) -> dict[str, Any]:
    """Write the pieces of both sides of pairs to two files; return how many pairs, pieces and unknown pieces.

    fitting: whose limits decide which pairs are left out; None: none is.
    frequency: pieces are counted in it.
    """
    kept = left_out = unknown = 0
    tokens = [0, 0]
    with ExitStack() as stack:
        streams = [stack.enter_context(file.open("w", encoding="utf-8", newline="\n")) for file in files]
        for sides in pairs:
            if fitting is not None and not fits(*sides, fitting.max_tokens, fitting.max_ratio):
                left_out += 1
                continue
            kept += 1
            for side, (pieces, stream) in enumerate(zip(sides, streams, strict=True)):
                stream.write(" ".join(pieces) + "\n")
                tokens[side] += len(pieces)
                unknown += sum(piece not in known for piece in pieces)
                frequency.update(pieces)
    return {"pairs": kept, "left_out": left_out, "tokens": tokens, "unknown": unknown}


def build_documents(recipe: Recipe, out: Path, work: Path, limit: int) -> dict[str, Any]:
    """``documents/`` (raw text and talk names) and ``bpe-documents/``: talks cut at sentence ends into documents."""
    processor = load_sentencepiece(out / "spm.model")
    for name in ("documents", "bpe-documents"):
        (work / name).mkdir()
    counts: dict[str, Any] = {}
    for split in SPLITS:
        raw = zip(*(lines_of(out / "text" / f"{split}.{language}") for language in recipe.pair), strict=True)
        rows = zip(raw, encoded(processor, out / "text", split, recipe.pair), strict=True)
        written: dict[str, list[str]] = {suffix: [] for suffix in (*recipe.pair, "talks")}
        pieces_of: tuple[list[str], list[str]] = ([], [])
        too_long = 0
        for talk, group in itertools.groupby(rows, key=lambda row: row[1][2]):
            members = list(group)
            page = Page(talk, [Pair(*text) for text, _ in members])
            documents, left_out = join_documents(page, [pieces[:2] for _, pieces in members], limit)
            too_long += left_out
            for _, text, pieces in documents:
                written["talks"].append(talk)
                for side, language in enumerate(recipe.pair):
                    written[language].append(text[side])
                    pieces_of[side].append(" ".join(pieces[side]))
        if split == "test" and too_long:
            raise PrepareError(f"{too_long} test segments are longer than --document-tokens {limit}: choose more")
        if not written["talks"]:
            raise PrepareError(f"no {split} segment fits --document-tokens {limit}: choose more")
        for suffix, lines in written.items():
            write_lines(work / "documents" / f"{split}.{suffix}", lines)
        for side, language in enumerate(recipe.pair):
            write_lines(work / "bpe-documents" / f"{split}.{language}", pieces_of[side])
        counts[split] = {"documents": len(written["talks"]), "segments_left_out": too_long}
    return {"documents": counts}


def build_data_bin(recipe: Recipe, out: Path, work: Path, levels: Sequence[str], workers: int) -> dict[str, Any]:
    folders = {level: out / f"bpe-{level}" for level in levels}
    preprocess(recipe.pair, folders, out / "dict.txt", work / "data-bin", out / "logs", workers)
    return {}


# ---------------------------------------------------------------- command


def steps_of(recipe: Recipe, args: argparse.Namespace, archives: dict[str, Any]) -> list[Step]:
    out, folder = args.out, args.archives
    code = file_hash(*(Path(module.__file__) for module in (corpora, segments, building)), Path(__file__))
    levels = ["sentences"] + (["documents"] if recipe.document_tokens else [])
    identity = {"variant": recipe.variant, "valid_every": recipe.valid_every, "code": code}
    identity |= {name: archive["sha256"] for name, archive in archives.items()}
    pieces = {"bpe_size": recipe.bpe_size, "spm_lines": args.spm_lines}
    pieces |= {"max_tokens": recipe.max_tokens, "max_ratio": recipe.max_ratio}
    steps = [
        Step("text", ("text",), identity, lambda work: build_text(recipe, folder, work)),
        Step(
            "pieces",
            ("spm.model", "dict.txt", "bpe-sentences"),
            pieces,
            lambda work: build_pieces(recipe, out, work, args.spm_lines),
        ),
    ]
    if recipe.document_tokens:
        limit = recipe.document_tokens
        steps.append(
            Step(
                "documents",
                ("documents", "bpe-documents"),
                {"document_tokens": limit},
                lambda work: build_documents(recipe, out, work, limit),
            )
        )
    steps.append(Step("data_bin", ("data-bin",), {}, lambda work: build_data_bin(recipe, out, work, levels, args.jobs)))
    return steps


def parse_args(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="run.sh prepare", description=__doc__.split("\n")[0])
    parser.add_argument("data_set", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, metavar="DIR", help="output folder (run.sh gives it)")
    parser.add_argument("--archives", type=Path, metavar="DIR", help="downloaded archives (default: examples/archives)")
    parser.add_argument("--variant", help="which training data, where recipe.toml has several (default: its first)")
    parser.add_argument("--bpe-size", type=int, metavar="N", help="size of the joint dictionary (default: recipe.toml)")
    parser.add_argument("--valid-every", type=int, metavar="N", help="which training lines are for validation")
    parser.add_argument("--document-tokens", type=int, metavar="N", help="longest document (default: recipe.toml)")
    parser.add_argument(
        "--spm-lines",
        type=int,
        default=5_000_000,
        metavar="N",
        help="lines that SentencePiece learns from, evenly spaced (default: %(default)s)",
    )
    jobs = os.cpu_count() or 1
    parser.add_argument("--jobs", type=int, default=jobs, metavar="N", help="processes of fairseq-preprocess")
    args = parser.parse_args(arguments)
    require_least(parser, args, bpe_size=100, valid_every=2, document_tokens=1, spm_lines=100, jobs=1)
    return args


def languages(args: argparse.Namespace) -> tuple[str, str]:
    """Source and target language, as they stand in file names.

    Raises:
        PrepareError: for an unknown --variant.
    """
    return Recipe(args.data_set / "recipe.toml", args.variant).pair


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse_args(arguments)
    try:
        recipe = Recipe(args.data_set.resolve() / "recipe.toml", args.variant)
        for name in ("bpe_size", "valid_every", "document_tokens"):
            if getattr(args, name) and not getattr(recipe, name):
                raise PrepareError(f"{recipe.name} has no {name} in its recipe.toml: leave the option out")
            setattr(recipe, name, getattr(args, name) or getattr(recipe, name))
        args.out = args.out.absolute()
        args.archives = (args.archives or Path(__file__).parents[1] / "archives").absolute()
        archives = {name: downloads.fetch(part, args.archives) for name, part in recipe.archives.items()}
        counts = build(args.out, steps_of(recipe, args, archives), {**vars(args), "archives": archives})
    except (PrepareError, OSError) as error:
        sys.exit(f"run.sh prepare: error: {error}")
    print(f"pairs: {counts['sentences']}")
    print(f"counts: {args.out / 'counts.json'}; data: {args.out / 'data-bin'}")


if __name__ == "__main__":
    main()
