"""Tables as text for terminals, Markdown and LaTeX, with what each format needs escaped."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import tabulate

# What GitHub would read as markup. A bar ends a cell in every dialect, even as "\|", so it becomes an entity.
_MARKDOWN = re.compile(r"[\\`*~$\[\]|]|<(?=[A-Za-z/!?])|&(?=#?\w+;)|(?<!\w)_|_(?!\w)")
_ENTITIES = {"|": "&#124;", "<": "&lt;", "&": "&amp;"}


@dataclass(frozen=True)
class Table:
    """A header, rows of plain text, and a caption.

    Attributes:
        align: one letter a column, l (left) or r (right); default: the first column left, the others right.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""
    align: str = ""

    @property
    def alignment(self) -> str:
        """The letters of all columns."""
        return self.align or "l" + "r" * (len(self.header) - 1)


def plain(table: Table) -> str:
    """Render for terminals."""
    return _render(table, "simple")


def markdown(table: Table) -> str:
    """Render as GitHub-flavoured Markdown, without the caption."""

    def escape(text: str) -> str:
        return _MARKDOWN.sub(lambda match: _ENTITIES.get(match[0], "\\" + match[0]), text)

    rows = [[escape(cell) for cell in row] for row in table.rows]
    return _render(Table([escape(cell) for cell in table.header], rows, align=table.align), "pipe")


def latex(table: Table) -> str:
    """Render as a ``tabular`` environment (package booktabs), without the caption."""
    lines = _render(table, "latex_booktabs").split("\n")
    return "\n".join(map(_replace_symbols, map(str.strip, lines)))


def escape_latex(text: str) -> str:
    """Escape running text as :func:`latex` escapes cells."""
    return _replace_symbols("".join(tabulate.LATEX_ESCAPE_RULES.get(character, character) for character in text))


def _replace_symbols(text: str) -> str:
    """Write ± and – in ASCII, for every input encoding."""
    return text.replace("±", r"$\pm$").replace("–", "--")


def _render(table: Table, form: str) -> str:
    return tabulate.tabulate(
        [[" ".join(cell.split()) for cell in row] for row in table.rows],
        table.header,
        form,
        disable_numparse=True,  # the numbers are formatted already
        colalign=[{"l": "left", "r": "right"}[letter] for letter in table.alignment],
    )
