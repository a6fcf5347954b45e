"""What all figures of the report share: their style, and how they become files and parts of the page.

Everything that is not data is drawn in ``INK``, which the page replaces by its text colour. Data colours are of the
Okabe-Ito palette, which readers with the common kinds of colour blindness can tell apart; lines differ by marker or
style as well.
"""

from __future__ import annotations

import functools
import io
import re
from dataclasses import dataclass

import matplotlib
from matplotlib.figure import Figure as Canvas

from ap_fairseq.sites import AttentionKind

INK = "#1b1f24"
KIND_COLOURS = {
    AttentionKind.ENCODER_SELF: "#0072b2",
    AttentionKind.DECODER_SELF: "#d55e00",
    AttentionKind.CROSS: "#009e73",
}
_STYLE = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.facecolor": "none",
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "grid.color": "#8a8f98",
    "grid.alpha": 0.35,
    "legend.frameon": False,
    "svg.fonttype": "none",
    # A figure is laid out once, when it is made; matplotlib would do so again for each file.
    "figure.autolayout": False,
    "figure.constrained_layout.use": False,
}


@dataclass(frozen=True)
class Figure:
    """A drawn figure: file name without ending, heading, caption, and a text for those who cannot see it."""

    name: str
    title: str
    caption: str
    alt: str
    canvas: Canvas

    def __post_init__(self):
        with matplotlib.rc_context(_STYLE):
            self.canvas.draw_without_rendering()
            self.canvas.set_layout_engine(None)

    def save(self, path, file_format: str) -> None:
        """Write PNG (150 dots per inch) or SVG on a white ground."""
        with matplotlib.rc_context({**_STYLE, "svg.hashsalt": self.name}):
            metadata = {"Date": None} if file_format == "svg" else {}  # the same input gives the same file
            self.canvas.savefig(path, format=file_format, dpi=150, facecolor="white", metadata=metadata)

    def inline_svg(self) -> str:
        """Return an ``<svg>`` element for the page: no ground, lines and text in the colour of the surrounding text."""
        stream = io.StringIO()
        with matplotlib.rc_context({**_STYLE, "svg.hashsalt": self.name}):
            self.canvas.savefig(stream, format="svg", facecolor="none", metadata={"Date": None})
        svg = stream.getvalue()
        svg = svg[svg.index("<svg") :]
        svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
        svg = re.sub(r'(<image [^>]*?) id="[^"]*"', r"\1", svg)  # equal for equal images, and nothing refers to it
        # Ids are unique within one figure only, and the namespaces are implied in HTML.
        svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{self.name}-", svg)
        svg = re.sub(r' xmlns(:xlink)?="[^"]*"', "", svg)
        width, height = re.search(r'width="([\d.]+)pt" height="([\d.]+)pt"', svg).groups()
        # Neither so large that it looks clumsy nor so small that it cannot be read: a narrow page scrolls it instead.
        size = f"width: 100%; max-width: {1.7 * float(width):.0f}px; min-width: {1.1 * float(width):.0f}px"
        svg = svg.replace(f'width="{width}pt" height="{height}pt"', f'style="{size}" aria-hidden="true"', 1)
        return svg.replace(INK, "currentColor")


def subplots(columns: int, rows: int = 1, width: float = 3.1, height: float = 2.7, **options):
    """Return a canvas and its axes (rows, columns); room for labels is left however few axes there are."""
    canvas = Canvas(figsize=(max(4.0, width * columns), max(2.2, height * rows)), layout="constrained")
    return canvas, canvas.subplots(rows, columns, squeeze=False, **options)


def styled(draw):
    """Run a drawing function under the report's style."""

    @functools.wraps(draw)
    def styled(*args, **kwargs):
        with matplotlib.rc_context(_STYLE):
            return draw(*args, **kwargs)

    return styled


def percent_axis(axis, label: str) -> None:
    """Label an axis of shares, which are shown in percent."""
    axis.set_label_text(label)
    axis.set_major_formatter(matplotlib.ticker.PercentFormatter(1.0, decimals=0))
