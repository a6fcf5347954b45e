"""Tables say in every format what their cells say."""

import re

import pytest

from ap_fairseq.evaluation.tables import Table, escape_latex, latex, markdown, plain

NAME = r"k^2|{x}~\y_%&$#<b>"
TABLE = Table(["system", "BLEU", "note"], [[NAME, "1.00 ± 0.20", "a"], ["dense", "", "–"]], align="lrl")


def test_a_bar_in_a_name_adds_no_column_in_markdown():
    r"""``ap-evaluate --markdown`` wrote it as it is; "\|" is an escape on GitHub alone."""
    lines = markdown(TABLE).split("\n")
    assert {line.count("|") for line in lines} == {4}
    assert re.fullmatch(r"\|:-+\|-+:\|:-+\|", lines[1])
    assert lines[2].startswith(r"| k^2&#124;{x}\~\\y\_%&\$#&lt;b> ")


@pytest.mark.parametrize(
    ("text", "written"),
    [
        ("encoder_self", "encoder_self"),
        ("_cross_", r"\_cross\_"),
        ("p < 0.001", "p < 0.001"),
        ("</td>", "&lt;/td>"),
        ("&lt;", "&amp;lt;"),
        ("R&D", "R&D"),
        ("[x](y) *z* `c`", r"\[x\](y) \*z\* \`c\`"),
    ],
)
def test_markdown_escapes_markup_alone(text, written):
    assert markdown(Table([text], [])).startswith(f"| {written} ")


def test_latex_escapes_what_stops_it():
    r"""``ap-evaluate --latex`` left ``^ { } ~ \`` as they are: "Missing $ inserted"."""
    lines = latex(TABLE).split("\n")
    name = r"k\^{}2|\{x\}\textasciitilde{}\textbackslash{}y\_\%\&\$\#\ensuremath{<}b\ensuremath{>}"
    assert lines[:2] == [r"\begin{tabular}{lrl}", r"\toprule"] and lines[-2:] == [r"\bottomrule", r"\end{tabular}"]
    assert lines[4].startswith(name + " & 1.00 $\\pm$ 0.20 & a")
    assert all(line.endswith(r"\\") for line in (lines[2], *lines[4:-2])) and re.search(r"& -- +\\\\", lines[5])
    assert escape_latex(NAME) == name


def test_terminals_see_the_text_itself():
    lines = plain(TABLE).split("\n")
    assert lines[2].split("  ")[0] == NAME and len(lines) == 4
    assert plain(Table(["a"], [["two\nlines"]])).endswith("two lines")


def test_numbers_stay_as_they_were_formatted():
    """tabulate would read "0.10" and "1,000" as numbers and align them by its own rules."""
    assert plain(Table(["x", "y"], [["0.10", "1,000"], ["12.5", "007"]])).split("\n")[2:] == [
        "0.10  1,000",
        "12.5    007",
    ]
