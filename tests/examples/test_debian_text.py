"""The corpus builder of examples/debian_text, on small hand-made descriptions, man pages and packages; no network."""

import gzip
import subprocess
import sys
from pathlib import Path

import apt_lists
import building
import debian_text
import descriptions
import man_pages
import parallel_text
import pytest
from man_pages import Block
from packages import DPKG, contents, write_command, write_deb, write_help_packages
from segments import Page, Pair
from sentences import write_pages

# ---------------------------------------------------------------- package descriptions

ENGLISH = """\
Package: abc
Description-md5: 11
Description-en: simple editor
 The editor reads files.
 It writes them, too.
 .
 Features:
  * undo without
    a limit
  * colours
 .
 This package contains the documentation.

Package: xyz
Description-md5: 22
Description-en: library
 A library for everything.
 .
 Second paragraph.

Package: untranslated
Description-md5: 33
Description-en: other
 Text.
"""
GERMAN = """\
Package: abc
Description-md5: 11
Description-de: einfacher Editor
 Der Editor liest Dateien. Er
 schreibt sie auch.
 .
 Merkmale:
  - unbegrenztes Rückgängigmachen
  - Farben
 .
 Dieses Paket enthält die Dokumentation.

Package: xyz
Description-md5: 22
Description-de: Bibliothek
 Eine Bibliothek für alles.

Package: abc
Description-md5: 44
Description-de: aus einer anderen Version
 Text.
"""


def test_descriptions_align_by_their_md5_and_paragraph_by_paragraph():
    """List items are segments without bullets; other numbers of paragraphs leave the title; another md5, nothing."""
    pages, counts = descriptions.align(ENGLISH.split("\n"), GERMAN.split("\n"))
    assert pages == [
        Page(
            "description/abc",
            [
                Pair("simple editor", "einfacher Editor"),
                Pair("The editor reads files. It writes them, too.", "Der Editor liest Dateien. Er schreibt sie auch."),
                Pair("Features:", "Merkmale:"),
                Pair("undo without a limit", "unbegrenztes Rückgängigmachen"),
                Pair("colours", "Farben"),
                Pair("This package contains the documentation.", "Dieses Paket enthält die Dokumentation."),
            ],
        ),
        Page("description/xyz", [Pair("library", "Bibliothek")]),
    ]
    assert counts == {"english": 3, "translated": 2, "paragraphs_differ": 1}


# ---------------------------------------------------------------- man pages

ENGLISH_MAN = r""".\" Copyright
.TH LS 1 "September 2022" "GNU coreutils 9.1" "User Commands"
.SH NAME
ls \- list directory contents
.SH "SEE ALSO"
.B ls
is like
.BR dir (1),
and `\-a\(aq is an option \(em or \fInot\fP.\"comment
.PP
Second paragraph\&...
on two lines.
.nf
code  {
}
.fi
After the code.
.TP
\fB\-a\fR, \fB\-\-all\fR
do not ignore \fI.files\fP
.TP
.BI \-\-color= WHEN
color the output
.IP \(bu 2
with a \*(lqbullet\*(rq
.SS Exit
0
"""
GERMAN_MAN = r""".TH LS 1 "September 2022" "GNU coreutils 9.1" "Dienstprogramme für Benutzer"
.SH BEZEICHNUNG
ls \- Verzeichnisinhalte auflisten
.SH "SIEHE AUCH"
\fBls\fP ist wie \fBdir\fP(1), und »\-a« ist eine Option – oder \fInicht\fP.
.PP
Zweiter Absatz … auf zwei Zeilen.
.nf
code  {
}
.fi
Nach dem Code.
.TP
\fB\-a\fP, \fB\-\-all\fP
\fI.dateien\fP nicht ignorieren
.TP
\fB\-\-color=\fP\fIWANN\fP
farbig ausgeben
.IP \(bu 2
mit einem \[lq]Punkt\[rq]
.SS Ende
0
.SH ÜBERSETZUNG
Die deutsche Übersetzung stammt von \[u00C4]nne.
"""


def test_blocks_of_a_man_page():
    """Fonts, escapes and comments go; a block is a heading, a tag, a paragraph, or code without its text."""
    assert man_pages.blocks(ENGLISH_MAN) == [
        Block("heading", "NAME"),
        Block("text", "ls - list directory contents"),
        Block("heading", "SEE ALSO"),
        Block("text", "ls is like dir(1), and `-a' is an option — or not."),
        Block("text", "Second paragraph... on two lines."),
        Block("code", ""),
        Block("text", "After the code."),
        Block("tag", "-a, --all"),
        Block("text", "do not ignore .files"),
        Block("tag", "--color=WHEN"),
        Block("text", "color the output"),
        Block("tag", "•"),
        Block("text", "with a “bullet”"),
        Block("heading", "Exit"),
        Block("text", "0"),
    ]
    assert man_pages.blocks(".so man1/ls.1\n") is None
    assert man_pages.blocks(".Dd June 1\n.Dt LS 1\n.Sh NAME\n") is None


def test_man_pages_align_block_by_block():
    """The section on translators is left out, and so are code and tags that are the same on both sides."""
    pairs, counts = man_pages.align(man_pages.blocks(ENGLISH_MAN), man_pages.blocks(GERMAN_MAN))
    assert pairs == [
        ("NAME", "BEZEICHNUNG"),
        ("ls - list directory contents", "ls - Verzeichnisinhalte auflisten"),
        ("SEE ALSO", "SIEHE AUCH"),
        (
            "ls is like dir(1), and `-a' is an option — or not.",
            "ls ist wie dir(1), und »-a« ist eine Option – oder nicht.",
        ),
        ("Second paragraph... on two lines.", "Zweiter Absatz … auf zwei Zeilen."),
        ("After the code.", "Nach dem Code."),
        ("do not ignore .files", ".dateien nicht ignorieren"),
        ("--color=WHEN", "--color=WANN"),
        ("color the output", "farbig ausgeben"),
        ("with a “bullet”", "mit einem “Punkt”"),
        ("Exit", "Ende"),
        ("0", "0"),
    ]
    assert counts == {"sections": 3, "unaligned_sections": 0}


def test_a_section_of_another_version_is_left_out():
    other = GERMAN_MAN.replace(".PP\nZweiter Absatz … auf zwei Zeilen.\n", "")
    pairs, counts = man_pages.align(man_pages.blocks(ENGLISH_MAN), man_pages.blocks(other))
    assert [pair.source for pair in pairs] == ["NAME", "ls - list directory contents", "Exit", "0"]
    assert counts == {"sections": 3, "unaligned_sections": 1}
    assert man_pages.align(man_pages.blocks(ENGLISH_MAN), man_pages.blocks(GERMAN_MAN + ".SH A\nb\n"))[0] == []


# ---------------------------------------------------------------- sentences


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("One sentence. Another one! A third?", ["One sentence.", "Another one!", "A third?"]),
        ("See e.g. Figure 3. It shows a b.", ["See e.g. Figure 3. It shows a b."]),
        ("Zum Beispiel z. B. Debian. Am 1. Januar.", ["Zum Beispiel z. B. Debian.", "Am 1. Januar."]),
        ("He said “No.” Then he left.", ["He said “No.”", "Then he left."]),
        ("C'est tout. « Non. » Étrange.", ["C'est tout.", "« Non. »", "Étrange."]),
        ("version 1.2.3 of file.Name. lower case", ["version 1.2.3 of file.Name. lower case"]),
        ("", [""]),
    ],
)
def test_sentences(text, sentences):
    assert parallel_text.split_sentences(text) == sentences


def test_segments_are_split_where_both_sides_have_as_many_sentences():
    two, other, one = "One day. Two days.", "Ein Tag. Zwei Tage.", "Ein Tag, zwei Tage."
    page = Page("p", [Pair(two, other), Pair(two, one), Pair("Title", "Titel")])
    assert parallel_text.by_sentence(page).pairs == [
        ("One day.", "Ein Tag."),
        ("Two days.", "Zwei Tage."),
        (two, one),
        ("Title", "Titel"),
    ]


# ---------------------------------------------------------------- apt's lists


def test_languages_as_apt_spells_them():
    """LibreOffice's packages have pt-br where descriptions and man pages have pt_BR."""
    assert [apt_lists.apt_language(language) for language in ("de", "pt-br", "zh-cn")] == ["de", "pt_BR", "zh_CN"]


def test_paths_of_man_pages():
    assert apt_lists.man_page("usr/share/man/man1/ls.1.gz") == ("en", "man1/ls.1")
    assert apt_lists.man_page("usr/share/man/pt_BR/man8/a.8.gz") == ("pt_BR", "man8/a.8")
    assert apt_lists.man_page("usr/share/doc/man1/ls.1.gz") is None


APT_GET = r"""
lists=; for word; do case "$word" in Dir::State::lists=*) lists=${word#*=};; esac; done
case " $* " in
    *" update "*)
        for name in en de pt%5fBR; do printf 'Package: a\n' > "$lists/x_Translation-$name"; done
        printf 'usr/share/man/de/man1/%s.1.gz utils/manpages-de\n' ls big > "$lists/x_Contents-all"
        printf 'usr/share/man/man1/ls.1.gz  admin/coreutils,x/other\nusr/share/man/man1/big.1.gz  x/huge\n' >> "$lists/x_Contents-all"
        printf 'usr/share/man/man1/alone.1.gz  x/alone\n' >> "$lists/x_Contents-all";;
    *" download "*) shift $(($# - 6)); printf '%s\n' "$@" > downloaded;;
esac
"""  # noqa: E501
APT_CACHE = r"""
printf 'Package: %s\nSize: %s\n\n' coreutils 3000000 huge 5000000 manpages-de 3600000 libreoffice-help-de 1
"""


def test_only_packages_that_hold_both_sides_of_a_page_are_downloaded(tmp_path, monkeypatch):
    """In folders of its own; packages over the limit are left out."""
    for name, script in (("apt-get", APT_GET), ("apt-cache", APT_CACHE), ("helper", 'cat "$2"'), ("dpkg", "exit 1")):
        write_command(tmp_path / "bin", name, script)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    monkeypatch.setattr(apt_lists, "APT_HELPER", str(tmp_path / "bin" / "helper"))
    folder = tmp_path / "fetched"
    folder.mkdir()
    (folder / ".apt" / "lists" / "partial").mkdir(parents=True)  # of an interrupted run
    debian_text.fetch(folder, "de", 4_000_000)
    assert (folder / "downloaded").read_text().split() == [
        "download",
        "coreutils",
        "libreoffice-help-de",
        "libreoffice-help-en-us",
        "libreoffice-l10n-de",
        "manpages-de",
    ]
    assert (folder / "Translation-de").read_text() == "Package: a\n"
    assert not (folder / ".apt").exists()
    lists = apt_lists.Lists(tmp_path / "other", ("en", "pt_BR"))
    assert lists.translations("pt_BR") == "Package: a\n"


# ---------------------------------------------------------------- the whole builder


@pytest.fixture(scope="module")
def fetched(tmp_path_factory):
    """A folder of --fetch: a third of a small corpus's pages as descriptions, man pages and help pages each."""
    folder = tmp_path_factory.mktemp("fetched")
    pages = write_pages(120, seed=3)
    described, manual, helped = pages[::3], pages[1::3], pages[2::3]
    for language in ("en", "de"):
        stanzas = []
        for number, (_, parts) in enumerate(described):
            title, *rest = (part[language] for part in parts)
            text = "\n .\n ".join(rest)
            stanzas.append(f"Package: p{number}\nDescription-md5: {number}\nDescription-{language}: {title}\n {text}\n")
        (folder / f"Translation-{language}").write_text("\n".join(stanzas), "utf-8")
        where = "usr/share/man/man1" if language == "en" else "usr/share/man/de/man1"
        files = {}
        for number, (_, parts) in enumerate(manual):
            roff = "\n.PP\n".join(part[language] for part in parts)
            files[f"{where}/page{number}.1.gz"] = gzip.compress(f".TH P 1\n.SH NAME\n{roff}\n".encode(), mtime=0)
        write_deb(folder, f"man-{language}", {**files, "usr/share/doc/man/copyright": b"free"})
    write_help_packages(folder, helped, ["en", "de"])
    return folder


@pytest.fixture
def run(tmp_path, fetched, monkeypatch):
    write_command(tmp_path / "bin", "dpkg", DPKG)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    monkeypatch.setattr(parallel_text, "preprocess", lambda pair, folders, dictionary, out, *rest: out.mkdir())

    def run(*options, deb_dir=fetched):
        words = ["en", "de", "--out", str(tmp_path / "out"), "--deb-dir", str(deb_dir), "--bpe-size", "400", *options]
        args = debian_text.parse_args(words)
        return building.build(args.out, debian_text.steps_of(args), vars(args))

    return run


def test_the_corpus_holds_all_sources_and_no_test_pair_of_training(run, tmp_path, monkeypatch):
    monkeypatch.setattr(debian_text, "SHARES", {"test": 0.15, "valid": 0.1})
    counts = run()
    keys, sources = {}, {}
    for split in building.SPLITS:
        sides = [building.read_lines(tmp_path / "out/sentences" / f"{split}.{side}") for side in ("en", "de", "pages")]
        assert len(sides[0]) == len(sides[1]) == len(sides[2]) == counts["split_pairs"][split] > 0
        keys[split] = [set(map(parallel_text.match_key, side)) for side in sides[:2]]
        sources[split] = {page.split("/")[0] for page in sides[2]}
        assert sum(counts["split_pairs_of_source"][split].values()) == len(sides[0])
    for side in (0, 1):
        assert not keys["test"][side] & keys["train"][side] and not keys["valid"][side] & keys["test"][side]
    assert sources["train"] == {"description", "man", "help", "interface"}
    assert {"man", "description"} <= sources["test"] <= {"description", "man", "help"}
    assert counts["packages"]["man-de"] == "1:2-3"
    # Sentences of one paragraph are lines of their own, and stay together in the documents.
    assert counts["man"]["aligned_sentences"] > 0 and counts["man"]["unaligned_pages"] == 0
    whole = (tmp_path / "out/pages/train.en").read_text("utf-8")
    assert " <sep> " in whole
    summary = debian_text.summary(counts)
    assert f"{counts['split_pairs']['train']:,}" in summary


def test_same_input_same_output(run, tmp_path, monkeypatch):
    monkeypatch.setattr(debian_text, "SHARES", {"test": 0.15, "valid": 0.1})
    run()
    first = contents(tmp_path / "out")
    (tmp_path / "out").rename(tmp_path / "before")
    run()
    assert contents(tmp_path / "out") == first


def test_long_sentences_are_left_out_of_the_sentences_only(run, tmp_path, monkeypatch):
    monkeypatch.setattr(debian_text, "SHARES", {"test": 0.15, "valid": 0.1})
    counts = run("--max-words", "12")
    assert counts["dropped_lines_over_max_words"]["train"] > 0
    lines = building.read_lines(tmp_path / "out/sentences/train.en")
    assert max(len(line.split()) for line in lines) <= 12
    pages = (tmp_path / "out/pages/train.en").read_text("utf-8").replace("\n", " <sep> ").split(" <sep> ")
    assert max(len(segment.split()) for segment in pages) > 12


def test_a_folder_without_descriptions_is_named(run, fetched, tmp_path):
    folder = tmp_path / "debs"
    folder.mkdir()
    for file in fetched.glob("*.deb"):
        (folder / file.name).symlink_to(file)
    with pytest.raises(building.PrepareError, match="has no Translation-en: --deb-dir takes a folder of `examples"):
        run(deb_dir=folder)


def test_a_damaged_package_is_named(run, fetched, tmp_path):
    folder = tmp_path / "debs"
    folder.mkdir()
    for file in fetched.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "man-de_1%3a2-3_all.deb").write_bytes(b"half")
    with pytest.raises(building.PrepareError, match=r"man-de_.*\.deb cannot be read .*: download the package again"):
        run(deb_dir=folder)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["de", "fr"], "the pair is de fr; this corpus translates from en into another language"),
        (["en", "en"], "the pair is en en"),
        (["--deb-dir", "/nothing/here"], "--deb-dir /nothing/here is not a folder"),
        (["--max-words", "0"], "--max-words is 0, expected at least 1"),
    ],
)
def test_bad_arguments(arguments, message, capsys):
    with pytest.raises(SystemExit):
        debian_text.parse_args(arguments)
    assert message in capsys.readouterr().err


def test_without_apt(tmp_path):
    """The message names what to run elsewhere and --deb-dir."""
    write_command(tmp_path / "bin", "dpkg", "exit 0")
    command = [sys.executable, str(Path(debian_text.__file__)), "--out", str(tmp_path / "out")]
    done = subprocess.run(command, env={"PATH": str(tmp_path / "bin")}, text=True, capture_output=True)
    assert done.returncode == 1 and "this machine has no apt-get" in done.stderr
    assert "prepare.sh --fetch DIR" in done.stderr and "--deb-dir DIR" in done.stderr
    assert not (tmp_path / "out/counts.json").exists()
