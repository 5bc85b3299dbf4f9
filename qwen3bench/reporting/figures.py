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
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from numpy.typing import ArrayLike, NDArray

from qwen3bench.record.reader import write_atomic

INK, MUTED, RULE, PAPER = "#1f1f1f", "#6b6b6b", "#dedede", "#ffffff"
BLUE, ORANGE, GREEN, GREY = "#0072b2", "#d55e00", "#009e73", "#8a8a8a"
# In the page these follow the reader's light or dark theme; report.css gives the dark values.
_THEMED = {
    "ink": INK,
    "muted": MUTED,
    "rule": RULE,
    "paper": PAPER,
    "blue": BLUE,
    "orange": ORANGE,
    "green": GREEN,
    "grey": GREY,
}
# Verdict → marker, colour, whether filled: shape or filling differ too, so that grey print tells them apart.
VERDICTS = {
    "faster": ("o", BLUE, True),
    "less": ("o", BLUE, True),
    "slower": ("s", ORANGE, True),
    "more": ("s", ORANGE, True),
    "same": ("D", GREY, True),
    "undecided": ("o", INK, False),
}
SERIES = (
    ("o", BLUE),
    ("s", ORANGE),
    ("^", GREEN),
    ("D", INK),
    ("v", "#cc79a7"),
    ("P", "#56b4e9"),
    ("X", "#e69f00"),
)
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
    """A plot on disk as plots/NAME.svg and .png: its name, its words and the SVG to set into a page."""

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
    """An empty figure whose title states what is seen, with a note underneath on what it holds for."""
    figure = Figure(figsize=(width_in, height_in), layout=ConstrainedLayoutEngine(w_pad=0.09, h_pad=0.07, wspace=0.04))
    lines = textwrap.wrap(_whole_values(title), int(width_in * 11))
    figure.suptitle("\n".join(lines), x=0.012, ha="left", fontsize=10.5, fontweight="bold")
    figure.supxlabel("\n".join(textwrap.wrap(note, int(width_in * 14))), x=0.012, ha="left", fontsize=8.5, color=MUTED)
    return figure


def _whole_values(text: str) -> str:
    """The text, to be broken into lines, with no break between a number, its unit and its interval."""
    text = re.sub(r"\[[^]]*\]", lambda interval: interval[0].replace(" ", "\N{NO-BREAK SPACE}"), text)
    return re.sub(r"(?<=[\d×]) (?=\[|[nµm]?s\b|[KMGT]?i?B\b|%)", "\N{NO-BREAK SPACE}", text)


def mark(axes: Axes, x: float, y: float, lo: float, hi: float, verdict: str) -> None:
    """One estimate with its horizontal interval, in the shape and colour of its verdict."""
    shape, colour, filled = VERDICTS.get(verdict, VERDICTS["undecided"])
    arms = [[max(0.0, x - lo)], [max(0.0, hi - x)]]
    face = colour if filled else PAPER
    look: dict[str, Any] = {
        "fmt": shape,
        "color": colour,
        "markerfacecolor": face,
        "markersize": 6,
        "capsize": 2.5,
    }
    axes.errorbar(x, y, xerr=arms, **look, zorder=3)


def keep_in_view(axes: Axes, estimates: ArrayLike) -> None:
    """End the horizontal axis at a third of the least and thrice the largest estimate, whatever the intervals are."""
    values = np.asarray(estimates, dtype=float)
    low, high = axes.get_xlim()
    axes.set_xlim(max(low, np.nanmin(values) / 3), min(high, np.nanmax(values) * 3))


def beside(
    axes: Axes,
    text: str,
    x: float,
    y: float,
    *,
    leftwards: bool = False,
    above: bool = False,
    below: bool = False,
) -> None:
    """A small label next to a point: to its right, or where the flags say."""
    shift = (-8 if leftwards or above else 8, 10 if above else -10 if below else 0)
    side = "right" if leftwards or above else "left"
    up = "bottom" if above else "top" if below else "center"
    axes.annotate(text, (x, y), shift, textcoords="offset points", ha=side, va=up, fontsize=8)


def heat(axes: Axes, logs: NDArray[np.float64], signs: dict[tuple[int, int], str], least: float, label: str) -> None:
    """A heat map of ratios, given as logarithms, with its colour bar; each field says its ratio and its sign.

    `logs` (rows, columns), NaN where there is none; `signs` by row and column; `least` is the smallest limit
    of the colours, so that noise is not blown up.
    """
    limit = max(float(np.nanmax(np.abs(logs))), least)
    mesh = axes.pcolormesh(logs, cmap="PuOr", vmin=-limit, vmax=limit, edgecolors=PAPER, linewidth=1)
    for (row, column), sign in signs.items():
        colour = "#fefefe" if abs(logs[row, column]) > 0.6 * limit else "#1e1e1e"
        text = f"{np.exp(logs[row, column]):.3f}{sign}"
        axes.text(column + 0.5, row + 0.5, text, ha="center", va="center", color=colour, fontsize=9)
    axes.invert_yaxis()
    axes.grid(visible=False)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    ends = [-limit, 0.0, limit]
    colours = axes.figure.colorbar(mesh, ax=axes, label=label)
    colours.set_ticks(ends, labels=[f"{np.exp(end):.3f}" for end in ends])


def save(plot: Plot, directory: Path) -> SavedPlot:
    """Write NAME.svg and NAME.png into the directory; the same figure always gives the same bytes."""
    directory.mkdir(parents=True, exist_ok=True)
    plot.figure.draw_without_rendering()
    plot.figure.set_layout_engine(None)  # laid out once, not once per file
    svg, png = io.BytesIO(), io.BytesIO()
    plot.figure.savefig(svg, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    plot.figure.savefig(png, format="png", metadata={"Software": None})
    write_atomic(directory / f"{plot.name}.svg", svg.getvalue())
    write_atomic(directory / f"{plot.name}.png", png.getvalue())
    return SavedPlot(plot.name, plot.title, plot.alt, embedded(svg.getvalue().decode(), plot))


def embedded(svg: str, plot: Plot) -> str:
    """SVG for a page: without prologue, with identifiers of its own and colours that follow the theme."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{plot.name}-", svg)
    for name, colour in _THEMED.items():
        svg = svg.replace(f": {colour}", f": var(--{name}, {colour})")
    return svg.replace("<svg", f'<svg role="img" aria-label="{escape(plot.alt)}"', 1)
