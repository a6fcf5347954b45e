"""Text that the corpora share: cleaning, aligned segments, and documents cut from them."""

import unicodedata
from collections.abc import Sequence
from typing import NamedTuple

# A document is its segments joined by this token: one SentencePiece piece, so it costs one position.
SEPARATOR = "<sep>"
# SentencePiece writes spaces as "▁". A user-defined symbol that holds the space before it costs one piece, not two.
SEPARATOR_PIECE = f"▁{SEPARATOR}"

ZERO_WIDTH_JOINERS = "\u200c\u200d"


class Pair(NamedTuple):
    """One aligned segment."""

    source: str
    target: str


class Page(NamedTuple):
    """The segments of one page, in reading order."""

    name: str
    pairs: list[Pair]


class Document(NamedTuple):
    """A run of segments of one page: ``page.pairs[first : first + len(pairs)]``."""

    page: str
    first: int
    pairs: list[Pair]


def clean(text: str) -> str:
    """NFC text on one line: single spaces, without control characters and invisible format characters.

    The zero-width joiners stay: they are part of the spelling in Hindi and others.
    """
    kept = []
    for character in unicodedata.normalize("NFC", text):
        if character.isspace():
            kept.append(" ")
        elif unicodedata.category(character) not in ("Cc", "Cf") or character in ZERO_WIDTH_JOINERS:
            kept.append(character)
    return " ".join("".join(kept).split())


def cut_page(page: Page, lengths: Sequence[tuple[int, int]], limit: int) -> tuple[list[Document], int]:
    """Cut a page at segment boundaries into documents of at most ``limit`` tokens on both sides.

    lengths: (source, target) tokens of every segment; a separator between two segments is one more token. A segment
    that is longer than the limit by itself fits no document and is left out: the second result counts those.
    """
    documents: list[Document] = []
    used, too_long = (0, 0), 0
    extend = False
    for index, (pair, (source, target)) in enumerate(zip(page.pairs, lengths, strict=True)):
        if max(source, target) > limit:
            too_long += 1
            extend = False
            continue
        longer = (used[0] + 1 + source, used[1] + 1 + target)
        if extend and max(longer) <= limit:
            documents[-1].pairs.append(pair)
            used = longer
        else:
            documents.append(Document(page.name, index, [pair]))
            used, extend = (source, target), True
    return documents, too_long


def join_documents(
    page: Page, pieces: Sequence[tuple[Sequence[str], Sequence[str]]], limit: int
) -> tuple[list[tuple[Document, Pair, list[list[str]]]], int]:
    """Cut a page as ``cut_page`` does, and join the segments of each document: its raw text, its pieces on both sides.

    pieces: of both sides of every segment. The second result counts the segments that fit no document.
    """
    documents, too_long = cut_page(page, [(len(source), len(target)) for source, target in pieces], limit)
    joined = []
    for document in documents:
        own = pieces[document.first : document.first + len(document.pairs)]
        text = Pair(*map(join_segments, zip(*document.pairs, strict=True)))
        joined.append((document, text, [*map(join_pieces, zip(*own, strict=True))]))
    return joined, too_long


def join_segments(segments: Sequence[str]) -> str:
    """Raw text of a document; splitting at the separator gives the segments back."""
    return f" {SEPARATOR} ".join(segments)


def join_pieces(segments: Sequence[Sequence[str]]) -> list[str]:
    """The pieces of a document, the same as those of its joined raw text."""
    joined = list(segments[0])
    for pieces in segments[1:]:
        joined.append(SEPARATOR_PIECE)
        joined.extend(pieces)
    return joined
