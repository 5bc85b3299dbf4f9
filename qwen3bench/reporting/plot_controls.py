"""Plot of the controls: two copies of the baseline against each other, and latency over the run."""

from __future__ import annotations

from typing import TYPE_CHECKING

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from qwen3bench.reporting.conditions import Condition
from qwen3bench.reporting.control_findings import aa_series, drifts, processes_apart
from qwen3bench.reporting.figures import BLUE, MUTED, ORANGE, PAPER, RULE, SERIES, Plot, new_figure
from qwen3bench.reporting.lookup import band, device, level, rows
from qwen3bench.reporting.units import is_number
from qwen3bench.reporting.wording.control_words import drift_words
from qwen3bench.reporting.wording.plot_words import copies_axis, copies_title, drift_axis, processes_title

if TYPE_CHECKING:
    from qwen3bench.analysis.run import Run

_MANY = 2_000  # points that an SVG still holds one by one; more are an image inside it


def controls_plot(run: Run, condition: Condition) -> Plot | None:
    """A/A ratio of every block beside the mean latency of the blocks over time."""
    pairs, drift = aa_series(run, condition), condition.select(run.controls.drift_series)
    if len(pairs) < 2 and len(drift) < 2:
        return None
    parts = [*_aa_title(run, condition), *_drift_title(run, condition)]
    figure = new_figure("; ".join(parts) or "Controls", f"{condition}; {device(run)}", 3.4)
    left, right = figure.subplots(1, 2)
    _draw_aa(left, run, condition)
    _draw_drift(figure, right, run, condition)
    return Plot(f"controls-{condition.slug}", figure, "; ".join(parts), f"Controls. {'; '.join(parts)}.")


def _draw_aa(axes: Axes, run: Run, condition: Condition) -> None:
    pairs = aa_series(run, condition)
    axes.axhline(1, color=MUTED, linewidth=0.9)
    for row in rows(condition.select(run.controls.aa)):
        color = ORANGE if row.noisy else BLUE
        axes.axhspan(1 - row.limit, 1 + row.limit, color=RULE, alpha=0.7, linewidth=0)
        axes.axhline(row.ratio, color=color, linestyle="--")
        if is_number(row.lo):
            axes.axhspan(row.lo, row.hi, color=color, alpha=0.25, linewidth=0)
    axes.scatter(pairs["block"], pairs["ratio"], s=18, color=BLUE, zorder=3, rasterized=len(pairs) > _MANY)
    axes.set_xlabel(copies_axis(len(pairs), level(run)))
    axes.set_ylabel("second copy / first")
    axes.ticklabel_format(useOffset=False)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _draw_drift(figure: Figure, axes: Axes, run: Run, condition: Condition) -> None:
    series = condition.select(run.controls.drift_series)
    if series.empty:
        return
    start = series["time"].min()
    for place, (_, blocks) in enumerate(series.groupby("process", sort=False)):
        shape, color = SERIES[place % len(SERIES)]
        axes.plot(
            blocks["time"] - start,
            100 * (blocks["relative_latency"] - 1),
            linewidth=0.8,
            color=color,
            marker=shape,
            markersize=4,
            markerfacecolor=color if place % 2 == 0 else PAPER,
            label=f"process {place + 1}",
            rasterized=len(series) > _MANY,
        )
    axes.axhline(0, color=MUTED, linewidth=0.9)
    axes.set_xlabel(drift_axis(len(series)))
    axes.set_ylabel("latency over its mean (%)")
    if series["process"].nunique() <= 8:
        figure.legend(loc="outside right center", fontsize=8)


def _aa_title(run: Run, condition: Condition) -> list[str]:
    summary = rows(condition.select(run.controls.aa))
    return [copies_title(row.ratio, row.lo, row.hi, noisy=row.noisy) for row in summary]


def _drift_title(run: Run, condition: Condition) -> list[str]:
    if (apart := processes_apart(run, condition)) > band(run):
        return [processes_title(apart)]
    return [drift_words(drift) for drift in drifts(run, condition)]
