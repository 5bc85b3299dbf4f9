"""Figures: the one style, the colours and markers of verdicts, and how a figure becomes files and page."""

from __future__ import annotations

import io
import re
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

INK, MUTED, RULE, PAPER = "#1f1f1f", "#6b6b6b", "#dedede", "#ffffff"
BLUE, ORANGE, GREEN, GREY = "#0072b2", "#d55e00", "#009e73", "#8a8a8a"
# In the page these follow the reader's light or dark theme; report.css gives the dark values.
_THEMED = {"ink": INK, "muted": MUTED, "rule": RULE, "paper": PAPER, "blue": BLUE, "orange": ORANGE, "green": GREEN, "grey": GREY}
# Verdict → marker, colour, whether filled: each differs in shape or filling too, so that grey print tells them apart.
VERDICTS = {
    "faster": ("o", BLUE, True),
    "less": ("o", BLUE, True),
    "slower": ("s", ORANGE, True),
    "more": ("s", ORANGE, True),
    "same": ("D", GREY, True),
    "undecided": ("o", INK, False),
}
SERIES = (("o", BLUE), ("s", ORANGE), ("^", GREEN), ("D", INK), ("v", "#cc79a7"), ("P", "#56b4e9"), ("X", "#e69f00"))
_STYLE = Path(__file__).with_name("report.mplstyle")
_WIDTH_IN = 8.0


@dataclass(frozen=True)
class Plot:
    """A drawn figure with the name of its files and the words that stand for it where it cannot be seen."""

    name: str
    figure: Figure
    title: str
    alt: str


@dataclass(frozen=True)
class SavedPlot:
    """A plot on disk: its name (files are plots/NAME.svg and .png), its words and the SVG to set into a page."""

    name: str
    title: str
    alt: str
    svg: str


@contextmanager
def style() -> Iterator[None]:
    """Within this context figures take the report's style, whatever the user's matplotlibrc says."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(matplotlib.rc_params_from_file(_STYLE, use_default_template=False))
        yield


def new_figure(title: str, note: str, height_in: float, width_in: float = _WIDTH_IN) -> Figure:
    """An empty figure whose title states what is seen, with a note on what it holds for underneath."""
    figure = Figure(figsize=(width_in, height_in), layout="constrained")
    lines = textwrap.wrap(title, int(width_in * 11.5))
    figure.suptitle("\n".join([*lines, *textwrap.wrap(note, int(width_in * 13))]), x=0.01, ha="left", fontsize=10.5)
    return figure


def mark(axes: Axes, x: float, y: float, lo: float, hi: float, verdict: object, horizontal: bool = True) -> None:
    """One estimate with its interval, in the shape and colour of its verdict."""
    shape, colour, filled = VERDICTS.get(str(verdict), VERDICTS["undecided"])
    bars = [[max(0.0, (x if horizontal else y) - lo)], [max(0.0, hi - (x if horizontal else y))]]
    axes.errorbar(
        x,
        y,
        **{"xerr" if horizontal else "yerr": bars},
        fmt=shape,
        color=colour,
        markerfacecolor=colour if filled else PAPER,
        markersize=6,
        capsize=2.5,
        zorder=3,
    )


def save(plot: Plot, directory: Path) -> SavedPlot:
    """Write plots/NAME.svg and plots/NAME.png under the directory; the same figure always gives the same bytes."""
    from qwen3bench.bench.record import write_atomic

    directory.mkdir(parents=True, exist_ok=True)
    svg, png = io.BytesIO(), io.BytesIO()
    plot.figure.savefig(svg, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    plot.figure.savefig(png, format="png", metadata={"Software": None})
    write_atomic(directory / f"{plot.name}.svg", svg.getvalue())
    write_atomic(directory / f"{plot.name}.png", png.getvalue())
    return SavedPlot(plot.name, plot.title, plot.alt, embedded(svg.getvalue().decode(), plot))


def embedded(svg: str, plot: Plot) -> str:
    """SVG for a page: no prologue or metadata, identifiers unique to the plot, colours that follow the theme."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{plot.name}-", svg)
    for name, colour in _THEMED.items():
        svg = svg.replace(f": {colour}", f": var(--{name}, {colour})")
    return svg.replace("<svg", f'<svg role="img" aria-label="{escape(plot.alt)}"', 1)
