"""Aligned text of package descriptions, from apt's ``Translation-LANGUAGE`` files.

A file holds one stanza for each description: ``Package``, ``Description-md5`` (of the English text) and
``Description-LANGUAGE``: a title, then paragraphs, indented by a space and separated by lines of a dot. Lines that are
indented further are printed as they are: lists, code.
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator

from segments import Page, Pair, clean

BULLET = re.compile(r"(?:[*+o•·-]|\d+[.)])\s+")


def stanzas(lines: Iterable[str]) -> Iterator[tuple[str, str, list[str]]]:
    """(package, md5, segments) of each stanza."""
    package, md5, text = "", "", []
    for line in [*lines, ""]:
        line = line.rstrip("\n")
        if not line.strip():
            if package and md5 and text:
                yield package, md5, segments_of(text)
            package, md5, text = "", "", []
        elif line.startswith("Package: "):
            package = line.removeprefix("Package: ").strip()
        elif line.startswith("Description-md5: "):
            md5 = line.removeprefix("Description-md5: ").strip()
        elif line.startswith("Description-"):
            text = [line.partition(":")[2].strip()]
        elif line.startswith(" ") and text:
            text.append(line[1:])


def segments_of(lines: list[str]) -> list[str]:
    """The title, paragraphs and list items of a description, each on one line; bullets are dropped."""
    segments, item = [[lines[0]]], False
    start = True
    for line in lines[1:]:
        if line.strip() in (".", ""):
            start = True
            continue
        bullet = BULLET.match(line.strip())
        # An item's further lines are indented, too; a line of plain text after an item starts a paragraph.
        if start or bullet or (item and not line.startswith(" ")):
            segments.append([])
            item = bool(bullet)
        segments[-1].append(line.strip()[bullet.end() :] if bullet else line.strip())
        start = False
    return [clean(" ".join(segment)) for segment in segments]


def align(source: Iterable[str], target: Iterable[str]) -> tuple[list[Page], Counter[str]]:
    """A page ``description/PACKAGE`` for each package described in both; equal md5 sums belong together.

    Descriptions that fall into different numbers of segments give only their titles. The English files of several
    releases may be joined; of a package that has several descriptions then, the last one counts.
    """
    english = {md5: (package, segments) for package, md5, segments in stanzas(source)}
    counts: Counter[str] = Counter(english=len(english), translated=0, paragraphs_differ=0)
    pages: dict[str, Page] = {}
    for _, md5, segments in stanzas(target):
        if md5 not in english:
            continue
        package, original = english[md5]
        counts["translated"] += 1
        if len(original) != len(segments):
            counts["paragraphs_differ"] += 1
            original, segments = original[:1], segments[:1]
        name = f"description/{package}"
        pages[name] = Page(name, [Pair(*pair) for pair in zip(original, segments, strict=True)])
    return [pages[name] for name in sorted(pages)], counts
