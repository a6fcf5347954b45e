"""Parallel text from pages: filters, splits, files of sentences and documents, and their encoding.

What the corpora made from Debian's packages share. ``pair`` is (source, target) as the packages spell languages.
"""

import itertools
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from building import (
    SPLITS,
    PrepareError,
    Step,
    encode,
    known_pieces,
    length_quantiles,
    load_sentencepiece,
    preprocess,
    read_lines,
    split_of,
    train_sentencepiece,
    write_dictionary,
    write_lines,
)
from segments import SEPARATOR, SEPARATOR_PIECE, Page, Pair, join_documents

LEVELS = ("sentences", "pages")

MARKUP = re.compile(r"</?[A-Za-z][^<>]*>|&(?:#\d+|[A-Za-z]+);")

# Up to this many words a text may be the same in both languages: names, key names, function names.
MAX_COPY_WORDS = 3
# Longest allowed ratio of the two lengths in characters, after the usual ratio of the two languages is divided out.
MAX_LENGTH_RATIO = 2.5
# Added to both lengths, so that the ratio says little about very short texts.
LENGTH_OFFSET = 5

FILTERS = ("no_letters", "untranslated", "markup", "separator", "length_ratio")


def fairseq_language(language: str) -> str:
    """A language as it stands in file names; fairseq takes a hyphen for the end of the source language."""
    return language.replace("-", "_")


def match_key(text: str) -> str:
    """What counts as the same text when looking for leaks between splits: case and punctuation are ignored."""
    key = "".join(c for c in text.casefold() if c.isalnum())
    return key or text


# ---------------------------------------------------------------- sentences

SENTENCE_END = re.compile(r"""(?<=[.!?…])(\s»|["'”“»›’)\]]*)\s+(?=["'“„«‹‘(\[]*\s?[A-ZÀ-ÖØ-ÝŒ])""")
# Words before a full stop that rarely end a sentence, in English, German and French.
ABBREVIATIONS = frozenset(
    "e.g i.e etc vs cf fig vol ch sec approx resp dr mr mrs ms st inc ltd co corp bzw z.b d.h u.a usw vgl ggf evtl "
    "nr abs abb inkl ca bspw sog u.u z.t s p.ex c.-à-d env n art al ex m mme pp".split()
)


def split_sentences(text: str) -> list[str]:
    """Sentences, by a rule: an end mark, a space and a capital, but not after an abbreviation, a letter or a number."""
    sentences, start = [], 0
    for match in SENTENCE_END.finditer(text):
        word = text[start : match.start()].rsplit(maxsplit=1)[-1] if text[start : match.start()].strip() else ""
        last = word.strip("\"'“”„«»()[]").rstrip(".").casefold()
        if word.endswith(".") and (last in ABBREVIATIONS or len(last) < 2 or last.isdigit()):
            continue
        sentences.append(text[start : match.end(1)].strip())
        start = match.end()
    return [*sentences, text[start:].strip()]


def by_sentence(page: Page) -> Page:
    """The page with its segments split into sentences, where both sides have as many."""
    pairs = []
    for pair in page.pairs:
        sides = [split_sentences(side) for side in pair]
        if len(sides[0]) == len(sides[1]):
            pairs += [Pair(*sentence) for sentence in zip(*sides, strict=True)]
        else:
            pairs.append(pair)
    return Page(page.name, pairs)


# ---------------------------------------------------------------- filters


def english_texts(texts: Iterable[str]) -> frozenset[str]:
    """Those too long to be the same in another language: meeting one there means that it was not translated."""
    return frozenset(text for text in texts if len(text.split()) > MAX_COPY_WORDS)


def _log_ratio(pair: Pair) -> float:
    return math.log((len(pair.source) + LENGTH_OFFSET) / (len(pair.target) + LENGTH_OFFSET))


class Filter:
    """Says which rule a pair breaks.

    ``no_letters``    a side without any letter: numbers, signs
    ``untranslated``  the sides are equal, or a side that should be another language is an English text of the corpus;
                      both only above MAX_COPY_WORDS words
    ``markup``        tags or entities that the two sides do not share
    ``separator``     the text holds the page separator itself
    ``length_ratio``  one side is more than MAX_LENGTH_RATIO times as long as usual for the other
    """

    def __init__(
        self, pairs: Iterable[Pair], english: frozenset[str], source_is_english: bool, target_is_english: bool
    ):
        """``pairs``: the corpus, of which the usual length ratio is taken; ``english``: see ``english_texts``."""
        self.not_source = frozenset() if source_is_english else english
        self.not_target = frozenset() if target_is_english else english
        # Copies would pull it to 0, and where much is untranslated they are many.
        translated = [_log_ratio(pair) for pair in pairs if pair.source != pair.target and not self._broken(pair)]
        self.usual_log_ratio = median(translated) if translated else 0.0

    def _broken(self, pair: Pair) -> str | None:
        """The broken rule apart from ``length_ratio``."""
        source, target = pair
        if not (any(map(str.isalpha, source)) and any(map(str.isalpha, target))):
            return "no_letters"
        if source == target and len(source.split()) > MAX_COPY_WORDS:
            return "untranslated"
        if source in self.not_source or target in self.not_target:
            return "untranslated"
        if Counter(MARKUP.findall(source.lower())) != Counter(MARKUP.findall(target.lower())):
            return "markup"
        if SEPARATOR in source or SEPARATOR in target:
            return "separator"
        return None

    def broken_rule(self, pair: Pair) -> str | None:
        rule = self._broken(pair)
        if rule is None and abs(_log_ratio(pair) - self.usual_log_ratio) > math.log(MAX_LENGTH_RATIO):
            return "length_ratio"
        return rule


# ---------------------------------------------------------------- splits


class Seen:
    """Texts that a held-out split must not hold, whichever side they are on: the data serve both directions."""

    def __init__(self):
        self.sources: set[str] = set()
        self.targets: set[str] = set()

    def add(self, pairs: Iterable[Pair]) -> None:
        for source, target in pairs:
            self.sources.add(match_key(source))
            self.targets.add(match_key(target))

    def __contains__(self, pair: Pair) -> bool:
        return match_key(pair.source) in self.sources or match_key(pair.target) in self.targets


def without_seen(pages: Iterable[Page], seen: Seen) -> list[Page]:
    """The pages without the segments in ``seen``, and without the pages that then are empty."""
    kept = (Page(page.name, [pair for pair in page.pairs if pair not in seen]) for page in pages)
    return [page for page in kept if page.pairs]


# ---------------------------------------------------------------- files


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
    pages: Sequence[Page],
    train_only: Sequence[Page],
    seed: int,
    shares: Mapping[str, float],
    unit: Callable[[str], str] = str,
) -> tuple[dict[str, list[Page]], dict[str, int]]:
    """Pages by split; valid and test without the segments that are in training, valid also without those in test.

    train_only: text for training that belongs to no page, as interface strings; it is not in the result.
    shares: of the pages, for test and valid; the rest is for training.
    unit: of the name of a page, what decides its split.
    """
    parts: dict[str, list[Page]] = {split: [] for split in SPLITS}
    for page in pages:
        parts[split_of(unit(page.name), seed, shares)].append(page)
    seen, dropped = Seen(), {}
    for part in (*parts["train"], *train_only):
        seen.add(part.pairs)
    for split in ("test", "valid"):
        before = sum(len(page.pairs) for page in parts[split])
        parts[split] = without_seen(parts[split], seen)
        dropped[split] = before - sum(len(page.pairs) for page in parts[split])
        for page in parts[split]:
            seen.add(page.pairs)
    return parts, dropped


def filter_pages(pages: Iterable[Page], rules: Filter) -> tuple[list[Page], dict[str, int]]:
    """Pages without the segments that break a rule, and how many broke which."""
    dropped = Counter(dict.fromkeys(FILTERS, 0))
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


def write_text(
    work: Path,
    pair: Sequence[str],
    pages: Sequence[Page],
    train_only: Sequence[Page],
    seed: int,
    shares: Mapping[str, float],
    max_words: int | None = None,
) -> dict[str, Any]:
    """``sentences/`` and, for the page level, ``segments.jsonl``: every page with its split and its segments.

    max_words: the longest segments of ``sentences/``, in words; None: all.

    Raises:
        PrepareError: if a split has no text.
    """
    parts, seen_dropped = split_pages(pages, train_only, seed, shares)
    unique_of = {split: unique_lines([*parts[split], *(train_only if split == "train" else [])]) for split in SPLITS}
    lines = {split: at_most(unique_of[split], max_words) for split in SPLITS}
    for split in SPLITS:
        if not lines[split]:
            raise PrepareError(
                f"no {split} pairs are left of {len(pages)} pages: too little text, or another --seed helps"
            )
        write_level(work / "sentences", pair, split, lines[split])
    write_jsonl(
        work / "segments.jsonl",
        ({"page": page.name, "split": split, "pairs": page.pairs} for split in SPLITS for page in parts[split]),
    )
    return {
        "dropped_segments_seen_in_training": seen_dropped,
        "dropped_lines_over_max_words": {split: len(unique_of[split]) - len(lines[split]) for split in SPLITS},
        "split_pages": {split: len(parts[split]) for split in SPLITS},
        "split_pairs": {split: len(lines[split]) for split in SPLITS},
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


def build_sentencepiece(
    work: Path,
    out: Path,
    pair: Sequence[str],
    bpe_size: int,
    coverage: float,
    symbols: Sequence[str] = (SEPARATOR_PIECE,),
) -> dict[str, Any]:
    """``spm.model``, ``dict.txt`` and the encoded sentences in ``bpe-sentences/``; ``symbols`` are one piece each."""
    text = {
        split: [read_lines(out / "sentences" / f"{split}.{fairseq_language(language)}") for language in pair]
        for split in SPLITS
    }
    lines = (line for side in text["train"] for line in side)
    train_sentencepiece(work / "spm.model", lines, bpe_size, coverage, symbols)
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
        pages = [Page(r["page"], [Pair(*segment) for segment in r["pairs"]]) for r in records if r["split"] == split]
        lines, sides, too_long = cut_into_documents(processor, pages, page_tokens)
        if not lines:
            raise PrepareError(
                f"no {split} segment fits --page-tokens {page_tokens}: all {too_long} are longer; choose a larger limit"
            )
        write_level(work / "pages", pair, split, lines)
        counts["page_tokens"][split] = write_encoded(work / "bpe-pages", pair, split, sides, known)
        counts["documents_cut_from_pages"][split] = {"pages": len(pages), "documents": len(lines)}
        counts["segments_longer_than_a_document"][split] = too_long
    return counts


def cut_into_documents(
    processor, pages: Sequence[Page], page_tokens: int
) -> tuple[list[Line], tuple[list[list[str]], list[list[str]]], int]:
    """The documents of pages as lines, the pieces of both sides of each, and how many segments fit no document."""
    segments = [segment for page in pages for segment in page.pairs]
    encoded = (encode(processor, [segment[side] for segment in segments]) for side in (0, 1))
    pieces = zip(*encoded, strict=True)
    lines, sides, too_long = [], ([], []), 0
    for page in pages:
        documents, left_out = join_documents(page, list(itertools.islice(pieces, len(page.pairs))), page_tokens)
        too_long += left_out
        for document, text, of_document in documents:
            lines.append(Line(text, page.name, document.first, len(document.pairs)))
            for side, joined in zip(sides, of_document, strict=True):
                side.append(joined)
    return lines, sides, too_long


# ---------------------------------------------------------------- data-bin


def build_data_bin(work: Path, out: Path, pair: Sequence[str], levels: Sequence[str] = LEVELS) -> dict[str, Any]:
    """``data-bin/sentences`` and ``data-bin/pages``, by fairseq-preprocess with one dictionary for all sides."""
    folders = {level: out / f"bpe-{level}" for level in levels}
    languages = [fairseq_language(language) for language in pair]
    preprocess(languages, folders, out / "dict.txt", work / "data-bin", out / "logs")
    return {}


# ---------------------------------------------------------------- steps


def encoding_steps(out: Path, pair: Sequence[str], bpe_size: int, coverage: float, page_tokens: int) -> list[Step]:
    """The steps after the one that calls ``write_text``: pieces, documents, data-bin."""
    return [
        Step(
            "sentencepiece",
            ("spm.model", "dict.txt", "bpe-sentences"),
            {"bpe_size": bpe_size, "character_coverage": coverage},
            lambda work: build_sentencepiece(work, out, pair, bpe_size, coverage),
        ),
        Step(
            "pages",
            ("pages", "bpe-pages"),
            {"page_tokens": page_tokens},
            lambda work: build_pages(work, out, pair, page_tokens),
        ),
        Step("data_bin", ("data-bin",), {}, lambda work: build_data_bin(work, out, pair)),
    ]
