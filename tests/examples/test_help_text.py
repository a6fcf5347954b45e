"""Segments from help pages and interface strings: alignment, filters, splits, documents."""

import gettext
from collections import Counter

import building
import corpus
import parallel_text
import pytest
import segments
from corpus import Block, Page, Pair
from hypothesis import example, given
from hypothesis import strategies as st
from packages import write_mo

# ---------------------------------------------------------------- help pages

PAGE = """<!DOCTYPE html>
<html><head><title>Title</title></head><body>
<header><p>Before the display area</p></header>
<div id="DisplayArea" itemprop="softwareHelp">
<h1 id="hd_1" dir="auto"><a name="x"></a>Saving &amp; opening&nbsp;files
</h1>
<p id="par_1">Press <span id="s1" class="switchinline"><span hidden="true" id="MACx_1" class="MAC">Command</span><span
 hidden="true" id="defaultx_1"><span class="keycode">Ctrl</span></span></span>+S.</p>
<span id="s2" class="switch"><span hidden="true" id="CALCx_2" class="CALC"><p id="par_2">In a sheet.</p></span>
<span hidden="true" id="WRITERx_2" class="WRITER"><p id="par_3">In a text.</p></span></span>
<p id="par_4" class="code">Print "hello"</p>
<div class="bascode"><pre dir="auto"><code>Sub Main<br>End Sub</code></pre></div>
<ul><li><p id="par_5" class="listitem">One<br>two <img src="i.svg" alt="icon"></p></li><li>Bare item</li></ul>
<table><tr><th>Key</th><td><p id="par_6"></p></td></tr></table>
</div>
<footer><p>After the display area</p></footer></body></html>
"""


def test_page_blocks():
    """Only leaf blocks inside the display area, in order: of a switch the default variant or else the first, no code,
    entities decoded, white space folded, empty blocks kept for the alignment."""
    assert corpus.page_blocks(PAGE) == [
        Block("h1", "hd_1", "Saving & opening files"),
        Block("p", "par_1", "Press Ctrl+S."),
        Block("p", "par_2", "In a sheet."),
        Block("p", "par_5", "One two"),
        Block("li", "", "Bare item"),
        Block("th", "", "Key"),
        Block("p", "par_6", ""),
    ]


def test_page_without_display_area():
    """A page without a display area has no blocks; it is not an error, as stub pages exist."""
    assert corpus.page_blocks("<html><body><p id='par_1'>Text</p></body></html>") == []


def test_align_by_sequence():
    """Equal tag sequences align one to one, blocks without id included; a pair with an empty side is left out."""
    source = [Block("h1", "a", "Title"), Block("p", "", "Note"), Block("p", "b", ""), Block("td", "", "Cell")]
    target = [Block("h1", "a", "Titel"), Block("p", "", "Hinweis"), Block("p", "b", "x"), Block("td", "", "Zelle")]
    pairs, how = corpus.align_blocks(source, target)
    assert how == "sequence"
    assert pairs == [("Title", "Titel"), ("Note", "Hinweis"), ("Cell", "Zelle")]


def test_align_by_id():
    """Sections sorted by their translated titles align by id, although all tags agree: repeated ids in their order,
    blocks without id by the id before them; what has no partner is left out."""
    source = [
        Block("h2", "and", "AND"),
        Block("p", "example", "Example"),
        Block("p", "", "Note for AND"),
        Block("h2", "or", "OR"),
        Block("p", "example", "Example, again"),
        Block("p", "source_only", "New text"),
        Block("h3", "now_a_heading", "Remarks"),
    ]
    target = [
        Block("h2", "or", "ODER"),
        Block("p", "example", "Beispiel"),
        Block("p", "", "Hinweis"),
        Block("h2", "and", "UND"),
        Block("p", "example", "Noch ein Beispiel"),
        Block("p", "target_only", "Alter Text"),
        Block("h3", "target_heading", "Anmerkung"),
    ]
    assert [block.tag for block in source] == [block.tag for block in target]
    pairs, how = corpus.align_blocks(source, target)
    assert how == "id"
    assert pairs == [
        ("AND", "UND"),
        ("Example", "Beispiel"),
        ("Note for AND", "Hinweis"),
        ("OR", "ODER"),
        ("Example, again", "Noch ein Beispiel"),
    ]
    assert corpus.align_blocks(source[-1:], [Block("p", "now_a_heading", "Anmerkungen")]) == ([], "id")


def test_align_pages():
    """Pages align by name; pages of one language only and pages without text are counted, not aligned."""
    text, empty = [Block("p", "a", "x")], [Block("p", "a", "")]
    pages, counts = corpus.align_pages({"1": text, "2": text, "3": empty}, {"1": text, "3": text, "4": text})
    assert pages == [Page("1", [Pair("x", "x")])]
    assert counts == {"aligned_by_sequence": 1, "in_one_language": 2, "without_text": 1}


@given(st.text())
def test_clean_is_one_plain_line(text):
    """Cleaned text is one line without control characters that fairseq or a line-based file could split at, and
    cleaning it again changes nothing."""
    cleaned = corpus.clean(text)
    assert cleaned.splitlines() in ([], [cleaned])
    assert cleaned.split() == cleaned.split(" ") or cleaned == ""
    assert corpus.clean(cleaned) == cleaned


def test_clean_examples():
    """Soft hyphens and byte order marks go, no-break spaces become spaces, accents are composed, joiners stay."""
    assert corpus.clean("\ufeffe\u0301t\u00ade\u00a0 1\n") == "éte 1"
    assert corpus.clean("क\u094d\u200dष") == "क\u094d\u200dष"


# ---------------------------------------------------------------- interface strings


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("_File", "File"),
        ("S~chließen", "Schließen"),
        ("ファイル(_F)", "ファイル"),
        ("ファイル (~F)...", "ファイル..."),
        ("_underline_", "_underline_"),
        ("Ends with _", "Ends with _"),
        ("_Add $(NEW_NAME) to %FILE_NAME", "Add $(NEW_NAME) to %FILE_NAME"),
    ],
)
def test_strip_accelerator(text, expected):
    """Accelerator marks go; marks that are part of the text, also inside placeholders, stay."""
    assert corpus.strip_accelerator(text) == expected


def test_interface_pair_placeholders():
    """Pairs whose placeholders agree (in any order) stay, with the product's name filled in; others are dropped."""
    pair = corpus.interface_pair("_Copy %1 to\n$(ARG1) in %PRODUCTNAME", "In %PRODUCTNAME %1 nach $(ARG1) _kopieren")
    assert pair == ("Copy %1 to $(ARG1) in LibreOffice", "In LibreOffice %1 nach $(ARG1) kopieren")
    assert corpus.interface_pair("Copy %1", "Kopieren") is None
    assert corpus.interface_pair("Copy %1", "%1 und %1 kopieren") is None


def test_align_messages(tmp_path):
    """With English, message ids are the text of the other side, without their context; two other languages meet by
    message id; of a plural the first form counts."""
    write_mo(
        tmp_path / "de/LC_MESSAGES/sw.mo",
        {"MENU|open\x04_Open": "_Öffnen", "row\0rows": "Zeile\0Zeilen", "X\x04Only German": "Nur Deutsch"},
    )
    write_mo(tmp_path / "fr/LC_MESSAGES/sw.mo", {"MENU|open\x04_Open": "_Ouvrir", "row\0rows": "ligne\0lignes"})
    write_mo(tmp_path / "fr/LC_MESSAGES/sc.mo", {"X\x04Only German": "another catalogue"})
    german, french = (corpus.read_messages(tmp_path / language) for language in ("de", "fr"))
    pairs, counts = corpus.align_messages(None, german)
    assert sorted(pairs) == [
        ("sw", ("Only German", "Nur Deutsch")),
        ("sw", ("Open", "Öffnen")),
        ("sw", ("row", "Zeile")),
    ]
    assert counts == {"strings": 3, "placeholders": 0}
    pairs, _ = corpus.align_messages(german, french)
    assert sorted(pairs) == [("sw", ("Zeile", "ligne")), ("sw", ("Öffnen", "Ouvrir"))]
    pairs, _ = corpus.align_messages(german, None)
    assert ("sw", ("Öffnen", "Open")) in pairs


def test_written_catalogue_is_gettext(tmp_path):
    """The catalogues that these tests write mean to Python's gettext what their dictionary says."""
    write_mo(tmp_path / "a.mo", {"ctx\x04id": "text", "row\0rows": "Zeile\0Zeilen"})
    with (tmp_path / "a.mo").open("rb") as stream:
        catalogue = gettext.GNUTranslations(stream)
    assert catalogue.pgettext("ctx", "id") == "text"
    assert catalogue.ngettext("row", "rows", 2) == "Zeilen"


# ---------------------------------------------------------------- filters

LONG_ENGLISH = "This text was never translated at all"


@pytest.mark.parametrize(
    ("rule", "source", "target"),
    [
        ("no_letters", "12.5 %", "Zwölf"),
        ("no_letters", "Twelve", "12"),
        ("untranslated", "svc.Do(a: str, b: str) : int", "svc.Do(a: str, b: str) : int"),
        ("untranslated", "An older English text, since changed", LONG_ENGLISH),
        ("markup", "Use the <br> tag", "Den Tag benutzen"),
        ("markup", "Fish &amp; chips", "Fisch und Chips"),
        ("separator", f"a {segments.SEPARATOR} b", f"a {segments.SEPARATOR} b"),
        ("length_ratio", "Back", "Rückseiten, linke Seiten und alle anderen"),
        (None, "LibreOffice Basic", "LibreOffice Basic"),
        (None, LONG_ENGLISH, "Dieser Text wurde nie übersetzt"),
        (None, "Use the <br> tag, or 1 < 2 & 3", "Den Tag <BR> oder 1 < 2 & 3"),
        (None, "Back", "Rückseiten"),
    ],
)
def test_filter_rules(rule, source, target):
    """Each rule drops what its name says and leaves its near misses: short copies, English on the English side, shared
    markup, comparison signs."""
    ordinary = [Pair("A short text", "Ein kurzer Text"), Pair("Another text", "Noch ein Text")]
    rules = parallel_text.Filter(
        ordinary, parallel_text.english_texts([LONG_ENGLISH, "LibreOffice Basic"]), True, False
    )
    assert rules.broken_rule(Pair(source, target)) == rule


def test_length_ratio_is_relative_to_the_languages():
    """With a target script of a third of the length, such pairs pass and pairs of equal length fail, however many
    untranslated copies the corpus has."""
    ordinary = [Pair("e" * 90, "j" * 30), Pair("e" * 60, "j" * 20)]
    copies = [Pair(f"Copy{number}", f"Copy{number}") for number in range(10)]
    rules = parallel_text.Filter([*ordinary, *copies], frozenset(), True, False)
    assert rules.broken_rule(Pair("e" * 120, "j" * 40)) is None
    assert rules.broken_rule(Pair("e" * 120, "k" * 120)) == "length_ratio"


# ---------------------------------------------------------------- splits


def test_split_is_fixed_by_page_name_and_seed():
    """The split of a page never changes between versions, machines and language pairs; the seed changes it; shares are
    those asked for."""
    names = [f"swriter/guide/{number}" for number in range(4000)]
    splits = [building.split_of(name, 1, {"test": 0.1, "valid": 0.2}) for name in names]
    assert "".join(split[1] for split in splits[:24]) == "rererrrarrrrrrrrarrrrare"
    assert splits != [building.split_of(name, 2, {"test": 0.1, "valid": 0.2}) for name in names]
    share = Counter(splits)
    assert share["test"] / len(names) == pytest.approx(0.1, abs=0.02)
    assert share["valid"] / len(names) == pytest.approx(0.2, abs=0.02)


def test_seen_ignores_case_and_punctuation_on_either_side():
    """A held-out pair is seen when either of its sides is in training, up to case and punctuation."""
    seen = parallel_text.Seen()
    seen.add([Pair("Click OK.", "Klicken Sie auf OK."), Pair("->", "=>")])
    assert Pair("click ok", "Auf OK klicken") in seen
    assert Pair("Press OK", "klicken sie auf OK") in seen
    assert Pair("Press OK", "OK drücken") not in seen
    assert Pair("<-", "<=") not in seen


# ---------------------------------------------------------------- documents


@given(
    st.lists(st.tuples(st.integers(0, 12), st.integers(0, 12)), min_size=1, max_size=30),
    st.integers(1, 20),
)
@example([(1, 1), (9, 1), (1, 1)], 5)
def test_cut_page(lengths, limit):
    """Documents hold every segment that fits, once and in order; none is longer than the limit on either side,
    separators counted; no document could also have taken the segment after it."""
    page = Page("p", [Pair(f"s{index}", f"t{index}") for index in range(len(lengths))])
    documents, too_long = segments.cut_page(page, lengths, limit)

    def tokens(first, count):
        return [sum(length[side] for length in lengths[first : first + count]) + count - 1 for side in (0, 1)]

    fits = [index for index, length in enumerate(lengths) if max(length) <= limit]
    covered = [index for d in documents for index in range(d.first, d.first + len(d.pairs))]
    assert covered == fits
    assert too_long == len(lengths) - len(fits)
    for document in documents:
        assert document.pairs == page.pairs[document.first : document.first + len(document.pairs)]
        assert max(tokens(document.first, len(document.pairs))) <= limit
        following = document.first + len(document.pairs)
        if following in fits:
            assert max(tokens(document.first, len(document.pairs) + 1)) > limit
