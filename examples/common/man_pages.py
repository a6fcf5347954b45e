"""Aligned text of man pages: the source of a page (roff with the macros of man(7)) as blocks, and two versions aligned.

Translated pages are made by po4a, which keeps every macro that starts a block and translates block by block, so the two
versions of a page align where their kinds of blocks agree. What po4a has no translation of is left in English.
"""

import re
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

from segments import Pair, clean

FONTS = frozenset("B I R BR RB BI IB IR RI SM SB".split())
ALTERNATING = frozenset("BR RB BI IB IR RI".split())  # of their arguments, no space is printed in between
PARAGRAPHS = frozenset("PP P LP HP br sp RS RE in ti YS".split())
CODE = {"nf": "fi", "EX": "EE", "TS": "TE", "EQ": "EN", "PS": "PE", "SY": "YS", "de": ".", "ig": "."}
"""Macros that begin what is no running text, with the macro at its end."""

CHARACTERS = {
    "aq": "'", "dq": '"', "cq": "’", "oq": "‘", "lq": "“", "rq": "”", "bq": "‚", "Bq": "„", "Fo": "«", "Fc": "»",
    "bu": "•", "em": "—", "en": "–", "hy": "-", "ha": "^", "ti": "~", "rs": "\\", "co": "©", "rg": "®", "tm": "™",
    "mu": "×", "->": "→", "<-": "←", "<=": "≤", ">=": "≥", "+-": "±", "at": "@", "sh": "#", "Do": "$", "ga": "`",
    "aa": "´", "lB": "[", "rB": "]", "lC": "{", "rC": "}", "sl": "/", "ba": "|", "or": "|", "br": "|", "mi": "-",
    "pl": "+", "eq": "=", "de": "°", "ss": "ß", ":a": "ä", ":o": "ö", ":u": "ü", ":A": "Ä", ":O": "Ö", ":U": "Ü",
    "'e": "é", "`e": "è", "^e": "ê", "`a": "à", "^a": "â", "^o": "ô", "^i": "î", ",c": "ç", "ul": "_", "*m": "μ",
}  # fmt: skip
STRINGS = {"lq": "“", "rq": "”", "R": "®", "Tm": "™"}

ESCAPE = re.compile(
    r"""\\(?:
        (?P<font>f(?:\[[^\]]*\]|\(..|.)|s[+-]?\(?\d{1,2}|[mM]\[[^\]]*\]|[hvwXDlL]'[^']*'|Z'[^']*') |
        \*(?:\[(?P<long_string>[^\]]*)\]|\((?P<string>..)|(?P<short_string>.)) |
        \[u(?P<code>[0-9A-F]{4,6})\] | \[(?P<long>[^\]]*)\] | \((?P<name>..) |
        (?P<single>.)
    )""",
    re.VERBOSE,
)
SINGLE = {"-": "-", "e": "\\", "\\": "\\", " ": " ", "~": " ", "0": " ", "'": "´", "`": "`", ".": ".", "t": " "}


class Block(NamedTuple):
    """One block of a page. ``kind``: heading, tag (of a list), text, or code, whose text is left out."""

    kind: str
    text: str


def plain(text: str) -> str:
    """The text of a line of roff: fonts and sizes are dropped, characters have their Unicode, comments go."""

    def replaced(match: re.Match) -> str:
        if match["font"]:
            return ""
        if match["code"]:
            return chr(int(match["code"], 16))
        for name in ("long_string", "string", "short_string"):
            if match[name] is not None:
                return STRINGS.get(match[name], "")
        name = match["long"] or match["name"]
        return CHARACTERS.get(name, "") if name else SINGLE.get(match["single"] or "", "")

    return ESCAPE.sub(replaced, re.split(r'\\["#]', text, maxsplit=1)[0])


def arguments(line: str) -> list[str]:
    """Of a macro: separated by spaces outside quotation marks; a doubled quotation mark is one."""
    words = re.findall(r'"(?:[^"]|"")*"?|(?:\\.|[^\s\\])+', line)
    return [word[1:].removesuffix('"').replace('""', '"') if word.startswith('"') else word for word in words]


def blocks(source: str) -> list[Block] | None:
    """The blocks of a page in reading order, headings first in their section; None if it has no macros of man(7).

    Pages in mdoc(7), and links to other pages, have none.
    """
    if not re.search(r"^\.\s*TH\s", source, re.MULTILINE):
        return None
    return [block for block in _blocks(source) if block.kind == "code" or block.text]


def _blocks(source: str) -> Iterator[Block]:
    """The blocks of a page, empty ones too."""
    lines = iter(source.splitlines())
    kind, parts = "text", []

    def finished() -> Block:
        nonlocal kind, parts
        done = Block(kind, clean(" ".join(parts)))
        kind, parts = "text", []
        return done

    for line in lines:
        if not line.startswith((".", "'")):
            if not line.strip():
                yield finished()
                continue
            parts.append(plain(line))
            if kind in ("tag", "heading"):  # begun by a macro without arguments, and one line long
                yield finished()
            continue
        name, _, rest = line[1:].strip().partition(" ")
        if name.startswith('\\"') or not name:
            continue
        if name in FONTS:
            words = [plain(word) for word in arguments(rest)]
            if words:
                parts.append(("" if name in ALTERNATING else " ").join(words))
                if kind in ("tag", "heading"):
                    yield finished()
        elif name in ("SH", "SS"):
            yield finished()
            kind = "heading"
            if rest.strip():
                parts.append(plain(" ".join(arguments(rest))))
                yield finished()
        elif name in ("TP", "TQ"):
            yield finished()
            kind = "tag"
        elif name == "IP":
            yield finished()
            if words := arguments(rest):
                yield Block("tag", clean(plain(words[0])))
        elif name in CODE:
            yield finished()
            _skip(lines, CODE[name])
            yield Block("code", "")
        elif name in PARAGRAPHS:
            yield finished()
        elif name in ("UR", "MT"):
            parts.append(plain(rest).strip())
        elif name in ("UE", "ME") and rest.strip() and parts:
            parts[-1] += plain(rest).strip()
    yield finished()


def _skip(lines: Iterator[str], end: str) -> None:
    """Go behind the macro *end*; a full stop stands for the line ``..``, which ends definitions."""
    for line in lines:
        if line.startswith(".") and line[1:].split()[:1] in ([end], [end.strip(".")]):
            return
        if end == "." and line.startswith(".."):
            return


def sections(page: list[Block]) -> list[list[Block]]:
    """The blocks from one heading to the next; what stands before the first heading is left out."""
    parts: list[list[Block]] = []
    for block in page:
        if block.kind == "heading":
            parts.append([])
        if parts:
            parts[-1].append(block)
    return parts


def align(source: list[Block], target: list[Block]) -> tuple[list[Pair], Counter[str]]:
    """Pairs of aligned blocks in reading order, without code, and without tags that are the same on both sides.

    The translation may have one more section, on its translators. Sections whose kinds of blocks differ are left out.
    Counts: ``sections`` and ``unaligned_sections`` of the source.
    """
    ours, theirs = sections(source), sections(target)
    counts = Counter(sections=len(ours), unaligned_sections=0)
    if len(theirs) not in (len(ours), len(ours) + 1):
        counts["unaligned_sections"] = len(ours)
        return [], counts
    pairs = []
    for section, translated in zip(ours, theirs, strict=False):
        if [block.kind for block in section] != [block.kind for block in translated]:
            counts["unaligned_sections"] += 1
            continue
        for block, other in zip(section, translated, strict=True):
            if block.kind != "code" and not (block.kind == "tag" and block.text == other.text):
                pairs.append(Pair(block.text, other.text))
    return pairs, counts
