"""Document-aligned parallel text from the LibreOffice help pages and interface strings.

The same help page exists in every language under the same name, translated paragraph by paragraph, so pages align by
name and the leaf block elements inside a page align by position. This module only has pure functions on text and
folders; ``prepare.py`` runs them, writes files and calls SentencePiece and fairseq.

    page     one HTML file of the help; a document. Its name is its path below ``text/`` without ``.html``
    block    one leaf block element (p, h1-h6, li, td, th) of a page
    segment  the aligned text of one block: a (source, target) pair
"""

import gettext
import re
import sys
from collections import Counter
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "common"))  # beside this folder; see examples/common

from segments import Page, Pair, clean

BLOCK_TAGS = frozenset("p h1 h2 h3 h4 h5 h6 li td th".split())
VOID_TAGS = frozenset("area base br col embed hr img input link meta source track wbr".split())
SKIPPED_TAGS = frozenset("pre code script style".split())
CODE_CLASSES = frozenset("code codeintable smathcode bascode pycode sqlcode".split())
SWITCH_CLASSES = frozenset("switch switchinline".split())

DISPLAY_AREA = re.compile(r'<div\b[^>]*\bid="DisplayArea"')

PLACEHOLDER = re.compile(r"%\{\w+\}|%[A-Z]+(?: [A-Z]+)+%|%\w+%?|\$\(\w+\)|\$\w+\$?|#\w+#|\{\d*\}")
PRODUCT_NAME = "%PRODUCTNAME"
BRACKETED_ACCELERATOR = re.compile(r"\s?[(（][~_]\w[)）]")


class Block(NamedTuple):
    """One leaf block element of a page. ``id`` is empty where the page gives none; ``text`` may be empty."""

    tag: str
    id: str
    text: str


# ---------------------------------------------------------------- help pages


class _Element:
    __slots__ = ("tag", "id", "classes", "children")

    def __init__(self, tag: str, attributes: dict[str, str | None]):
        self.tag = tag
        self.id = attributes.get("id") or ""
        self.classes = frozenset((attributes.get("class") or "").split())
        self.children: list[_Element | str] = []


class _DisplayAreaParser(HTMLParser):
    """Builds the element tree of the first element fed, and ignores what follows its end tag."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.root: _Element | None = None
        self._open: list[_Element] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if self.root is not None and not self._open:
            return
        if tag in VOID_TAGS:
            if tag == "br":
                self._open[-1].children.append(" ")
            return
        element = _Element(tag, dict(attrs))
        if self.root is None:
            self.root = element
        else:
            self._open[-1].children.append(element)
        self._open.append(element)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID_TAGS:
            self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        for depth in range(len(self._open) - 1, -1, -1):
            if self._open[depth].tag == tag:
                del self._open[depth:]
                return

    def handle_data(self, data: str) -> None:
        if self._open:
            self._open[-1].children.append(data)


def _visible(element: _Element) -> list["_Element | str"]:
    """The children a reader sees.

    A switch holds one hidden span per system or application, of which a script shows one: that is the default span, or
    the first where there is none. Taking out all of them would leave holes in sentences ("Press +F").
    """
    if not element.classes & SWITCH_CLASSES:
        return element.children
    variants = [child for child in element.children if isinstance(child, _Element)]
    default = [child for child in variants if child.id.startswith("default")]
    return [*(default or variants)[:1]]


def _is_code(element: _Element) -> bool:
    return element.tag in SKIPPED_TAGS or bool(element.classes & CODE_CLASSES)


def _text(element: _Element) -> str:
    parts = []
    for child in _visible(element):
        if isinstance(child, str):
            parts.append(child)
        elif not _is_code(child):
            parts.append(_text(child))
    return "".join(parts)


def _leaf_blocks(element: _Element, blocks: list[Block]) -> bool:
    """Append the leaf blocks below and including ``element``; say whether there were any."""
    found = False
    for child in _visible(element):
        if isinstance(child, _Element) and not _is_code(child):
            found |= _leaf_blocks(child, blocks)
    if not found and element.tag in BLOCK_TAGS:
        blocks.append(Block(element.tag, element.id, clean(_text(element))))
        found = True
    return found


def page_blocks(html: str) -> list[Block]:
    """The leaf blocks of one help page in reading order; none if the page has no display area."""
    start = DISPLAY_AREA.search(html)
    if start is None:
        return []
    parser = _DisplayAreaParser()
    parser.feed(html[start.start() :])
    parser.close()
    blocks: list[Block] = []
    if parser.root is not None:
        _leaf_blocks(parser.root, blocks)
    return blocks


def _id_keys(blocks: Sequence[Block]) -> list[tuple[str, int, int]]:
    """A key per block that survives reordered sections: (nearest id before it, distance from it, repetition)."""
    keys, seen = [], Counter()
    anchor, distance = "", 0
    for block in blocks:
        anchor, distance = (block.id, 0) if block.id else (anchor, distance + 1)
        keys.append((anchor, distance, seen[anchor, distance]))
        seen[anchor, distance] += 1
    return keys


def align_blocks(source: Sequence[Block], target: Sequence[Block]) -> tuple[list[Pair], str]:
    """Aligned texts of two versions of a page, in source order, and how they were aligned.

    ``"sequence"``: the tags (and ids) agree one by one. ``"id"``: they do not, as on pages whose sections are sorted
    by their translated titles; blocks are then matched by element id and the rest left out. Empty blocks count for the
    sequence but give no pair.
    """
    if [block[:2] for block in source] == [block[:2] for block in target]:
        aligned, how = list(zip(source, target, strict=True)), "sequence"
    else:
        by_key = dict(zip(_id_keys(target), target, strict=True))
        candidates = ((block, by_key.get(key)) for key, block in zip(_id_keys(source), source, strict=True))
        aligned, how = [(s, t) for s, t in candidates if t is not None and s.tag == t.tag], "id"
    return [Pair(s.text, t.text) for s, t in aligned if s.text and t.text], how


def read_help(folder: Path) -> dict[str, list[Block]]:
    """page name -> blocks, for every page of one language below its ``text`` folder."""
    files = sorted(folder.rglob("*.html"))
    if not files:
        raise ValueError(
            f"no help pages (*.html) below {folder}: is this the `text` folder of a libreoffice-help package?"
        )
    return {file.relative_to(folder).with_suffix("").as_posix(): page_blocks(file.read_text("utf-8")) for file in files}


def align_pages(source: dict[str, list[Block]], target: dict[str, list[Block]]) -> tuple[list[Page], Counter[str]]:
    """Pages that both languages have and that share text, by name; and how many were aligned how or left out."""
    pages, counts = [], Counter()
    for name in sorted(source.keys() | target.keys()):
        if name not in source or name not in target:
            counts["in_one_language"] += 1
            continue
        pairs, how = align_blocks(source[name], target[name])
        counts[f"aligned_by_{how}" if pairs else "without_text"] += 1
        if pairs:
            pages.append(Page(name, pairs))
    return pages, counts


# ---------------------------------------------------------------- interface strings


def strip_accelerator(text: str) -> str:
    """Without the mark of a keyboard shortcut: ``_File``, ``S~chließen``, ``ファイル(_F)``.

    A mark that occurs more than once is part of a name (``user_profile_path``) and stays.
    """
    text = BRACKETED_ACCELERATOR.sub("", text)
    pieces = re.split(f"({PLACEHOLDER.pattern})", text)  # odd positions hold placeholders
    for mark in "~_":
        if sum(piece.count(mark) for piece in pieces[::2]) == 1:
            pieces[::2] = [re.sub(rf"{mark}(?=\w)", "", piece) for piece in pieces[::2]]
    return "".join(pieces)


def interface_text(text: str) -> str:
    """One interface string as a reader sees it."""
    return clean(strip_accelerator(text.replace(PRODUCT_NAME, "LibreOffice")))


def interface_pair(source: str, target: str) -> Pair | None:
    """One cleaned interface string, or None if the two sides do not hold the same placeholders (%1, $(ARG1), ...)."""
    if Counter(PLACEHOLDER.findall(source)) != Counter(PLACEHOLDER.findall(target)):
        return None
    return Pair(interface_text(source), interface_text(target))


def read_messages(folder: Path) -> dict[tuple[str, str], str]:
    """(catalogue, message id with its context) -> translation, for every .mo file below ``folder``."""
    files = sorted(folder.rglob("*.mo"))
    if not files:
        raise ValueError(f"no message catalogues (*.mo) below {folder}: is this an unpacked libreoffice-l10n package?")
    messages = {}
    for file in files:
        with file.open("rb") as stream:
            # gettext has no public way to list a catalogue. Plural forms have the key (id, form): the first one
            # translates the singular id.
            catalogue = gettext.GNUTranslations(stream)._catalog
        for key, text in catalogue.items():
            key, form = key if isinstance(key, tuple) else (key, 0)
            if key and form == 0:
                messages[file.stem, key] = text
    return messages


def english_message(key: str) -> str:
    """The English text of a message id: what follows the context."""
    return key.rsplit("\x04", 1)[-1]


def align_messages(
    source: dict[tuple[str, str], str] | None, target: dict[tuple[str, str], str] | None
) -> tuple[list[tuple[str, Pair]], Counter[str]]:
    """(catalogue, pair) of every message that both sides have, and counts. None, for one side, stands for English."""
    if source is None:
        source = {key: english_message(key[1]) for key in target}
    if target is None:
        target = {key: english_message(key[1]) for key in source}
    pairs, counts = [], Counter(strings=0, placeholders=0)
    for key in sorted(source.keys() & target.keys()):
        counts["strings"] += 1
        pair = interface_pair(source[key], target[key])
        if pair is None:
            counts["placeholders"] += 1
        else:
            pairs.append((key[0], pair))
    return pairs, counts
