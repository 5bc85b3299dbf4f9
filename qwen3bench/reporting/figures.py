"""Figures: the one style, the colors and markers of verdicts, and how a figure becomes files and page."""

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

from qwen3bench.errors import UserError
from qwen3bench.record.files import write_atomic
from qwen3bench.record.states import Verdict
from qwen3bench.reporting.finding import NoVerdict

INK, MUTED, RULE, PAPER = "#1f1f1f", "#6b6b6b", "#dedede", "#ffffff"
BLUE, ORANGE, GREEN, GRAY = "#0072b2", "#d55e00", "#009e73", "#8a8a8a"
# In the page these follow the reader's light or dark theme; report.css gives the dark values.
_THEMED = {
    "ink": INK,
    "muted": MUTED,
    "rule": RULE,
    "paper": PAPER,
    "blue": BLUE,
    "orange": ORANGE,
    "green": GREEN,
    "gray": GRAY,
}
# Verdict → marker, color, whether filled: shape or filling differ too, so that gray print tells them apart.
VERDICTS: dict[str, tuple[str, str, bool]] = {
    Verdict.FASTER: ("o", BLUE, True),
    Verdict.LESS: ("o", BLUE, True),
    Verdict.SLOWER: ("s", ORANGE, True),
    Verdict.MORE: ("s", ORANGE, True),
    Verdict.SAME: ("D", GRAY, True),
    NoVerdict.IDLE: ("D", GRAY, False),
    Verdict.UNDECIDED: ("o", INK, False),
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
    """A plot on disk as plots/NAME.svg: its name, its words and the SVG to set into a page."""

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


def mark(axes: Axes, y: float, effect: Any) -> None:
    """One row of effects: its estimate with its horizontal interval, in the shape and color of its verdict."""
    x, lo, hi = effect.estimate, effect.lo, effect.hi
    shape, color, filled = VERDICTS.get(effect.verdict, VERDICTS[Verdict.UNDECIDED])
    arms = [[max(0.0, x - lo)], [max(0.0, hi - x)]]
    face = color if filled else PAPER
    look: dict[str, Any] = {
        "fmt": shape,
        "color": color,
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


def label_point(axes: Axes, text: str, point: tuple[float, float]) -> None:
    """A small label below a point, and to its left."""
    axes.annotate(text, point, (-8, -10), textcoords="offset points", ha="right", va="top", fontsize=8)


def heat(axes: Axes, logs: NDArray[np.float64], texts: dict[tuple[int, int], str], width: float, label: str) -> None:
    """A heat map of ratios, given as logarithms, with its color bar; each field says its text.

    `logs` (rows, columns), NaN where there is none; `texts` by row and column; the colors reach to `width` at
    least, so that noise is not blown up.
    """
    limit = max(float(np.nanmax(np.abs(logs))), width)
    mesh = axes.pcolormesh(logs, cmap="PuOr", vmin=-limit, vmax=limit, edgecolors=PAPER, linewidth=1)
    for (row, column), text in texts.items():
        color = "#fefefe" if abs(logs[row, column]) > 0.6 * limit else "#1e1e1e"
        axes.text(column + 0.5, row + 0.5, text, ha="center", va="center", color=color, fontsize=9)
    axes.invert_yaxis()
    axes.grid(visible=False)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    ends = [-limit, 0.0, limit]
    bar = axes.figure.colorbar(mesh, ax=axes, label=label)
    bar.set_ticks(ends, labels=[f"{np.exp(end):.3f}" for end in ends])


def save(plot: Plot, directory: Path) -> SavedPlot:
    """Write NAME.svg into the directory; the same figure always gives the same bytes.

    Raises `UserError` where the directory cannot be made or written.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"{directory}: cannot be made ({error.strerror}); check the room on the disk and the permissions"
        ) from error
    plot.figure.draw_without_rendering()  # laid out at the figure's own dpi, as in every earlier report
    plot.figure.set_layout_engine(None)
    svg = io.BytesIO()
    plot.figure.savefig(svg, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    write_atomic(directory / f"{plot.name}.svg", svg.getvalue())
    return SavedPlot(plot.name, plot.title, plot.alt, embedded(svg.getvalue().decode(), plot))


def embedded(svg: str, plot: Plot) -> str:
    """SVG for a page: without prologue, with identifiers of its own and colors that follow the theme."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{plot.name}-", svg)
    for name, color in _THEMED.items():
        svg = svg.replace(f": {color}", f": var(--{name}, {color})")
    return svg.replace("<svg", f'<svg role="img" aria-label="{escape(plot.alt)}"', 1)
