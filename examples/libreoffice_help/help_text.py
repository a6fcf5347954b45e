"""The filtered text of two languages in a folder of unpacked packages of LibreOffice's help and interface."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import corpus
from building import PrepareError
from corpus import Block
from help_packages import help_folder, is_english, message_package
from parallel_text import Filter, english_texts, filter_pages
from segments import Page, Pair

Help = dict[str, list[Block]]  # of each page
Catalogues = dict[tuple[str, str], str]  # (catalogue, message id) -> translation


def read_help(packages: Path, language: str) -> Help:
    return corpus.read_help(help_folder(packages, language))


def read_pair(
    packages: Path, source: str, target: str, english_help: Help | None = None
) -> tuple[list[Page], list[Page], dict[str, Any]]:
    """Help pages, interface strings, counts.

    Interface strings are a page for each catalogue, named ``interface/CATALOGUE``.

    english_help: what ``read_help`` gives for ``en``, where it was read before.

    Raises:
        PrepareError: if the two languages share no page.
    """
    pair = (source, target)
    blocks = {"en": english_help or read_help(packages, "en")}
    blocks |= {language: read_help(packages, language) for language in {*pair} - {"en"}}
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
    aligned = [segment for page in pages for segment in page.pairs]
    english = english_texts(_english_of(blocks["en"], filter(None, messages.values())))
    rules = Filter(aligned, english, is_english(source), is_english(target))
    kept, dropped = filter_pages(pages, rules)
    interface, interface_dropped = filter_pages(_catalogue_pages(strings), rules)
    unique = _unique(kept)
    counts = {
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
            "unique_pairs": len(_unique(interface)),
        },
        "usual_log_length_ratio": round(rules.usual_log_ratio, 4),
    }
    return kept, interface, counts


def _english_of(pages: Help, catalogues: Iterable[Catalogues]) -> list[str]:
    texts = [block.text for page in pages.values() for block in page]
    return texts + [
        corpus.interface_text(corpus.english_message(key)) for catalogue in catalogues for _, key in catalogue
    ]


def _catalogue_pages(strings: Sequence[tuple[str, Pair]]) -> list[Page]:
    of_catalogue: dict[str, list[Pair]] = {}
    for catalogue, segment in strings:
        of_catalogue.setdefault(f"interface/{catalogue}", []).append(segment)
    return [Page(*item) for item in of_catalogue.items()]


def _unique(pages: Sequence[Page]) -> set[Pair]:
    return {segment for page in pages for segment in page.pairs}
