"""Plots of the cells: ranked by latency, against peak memory, against the roofline."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import LogFormatter
from numpy.typing import NDArray

from qwen3bench.record.lines import CeilingLine, CostLine
from qwen3bench.reporting.conditions import Condition
from qwen3bench.reporting.figures import (
    BLUE,
    GRAY,
    GREEN,
    INK,
    ORANGE,
    PAPER,
    SERIES,
    Plot,
    keep_in_view,
    label_point,
    new_figure,
)
from qwen3bench.reporting.lookup import (
    BASELINE,
    LATENCY,
    MEMORY,
    band,
    device,
    factors,
    level,
    of_peers,
    rows,
    smallest,
    usable,
)
from qwen3bench.reporting.units import BYTES, SECONDS, Unit, count, significant, unit_for
from qwen3bench.reporting.wording.plot_words import (
    INTENSITY,
    ceilings,
    front_alt,
    front_title,
    latency_axis,
    ranked_alt,
    ranked_title,
    roofline_alt,
    roofline_title,
)

if TYPE_CHECKING:
    from qwen3bench.analysis.run import Run

_ROWS_NAMED = 64  # cells that have room for a row of their own
_LABEL = 0.05  # of an axis: what a number beside a point takes
_FRONT_NAMED = 6  # cells of a Pareto front that its legend has room for


def ranked(run: Run, condition: Condition) -> Plot | None:
    """Latency of every cell with its interval, fastest on top, beside the switches that are on."""
    cells = usable(condition.select(run.cells)).sort_values(LATENCY, kind="stable")
    if cells.empty:
        return None
    unit = unit_for(cells[LATENCY], SECONDS)
    few = len(cells) <= _ROWS_NAMED
    title = _ranked_title(cells)
    figure = new_figure(title, f"{condition}; {device(run)}", 1.7 + (0.2 * len(cells) if few else 7.5))
    ratios = (max(1, len(factors(run))) * 0.26, 6)
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=ratios)
    _draw_switches(left, cells, factors(run), few)
    x, y = _scaled(cells, LATENCY, unit), np.arange(len(cells))
    look: dict[str, Any] = {"elinewidth": 1.2, "capsize": 2} if few else {"elinewidth": 0.5, "alpha": 0.35}
    right.errorbar(x, y, xerr=_bars(cells, unit), fmt="none", ecolor=GRAY, **look)
    base, peer = _kinds(cells)
    right.scatter(x[~(base | peer)], y[~(base | peer)], s=22 if few else 5, color=BLUE, zorder=3)
    right.scatter(x[base], y[base], s=46, marker="s", color=ORANGE, zorder=4)
    for latency in x[base]:
        right.axvline(latency, color=ORANGE, linewidth=0.9, linestyle="--")
        look = {"xycoords": right.get_xaxis_transform(), "textcoords": "offset points", "fontsize": 8}
        right.annotate("baseline", (latency, 1), (0, 2), ha="center", va="bottom", **look)  # above all marks
    right.scatter(x[peer], y[peer], s=40, marker="^", color=INK, zorder=4)
    for row in np.flatnonzero(peer):
        left.text(len(factors(run)) - 0.6, row, cells["cell"].iloc[row], ha="right", va="center", fontsize=8.5)
    keep_in_view(right, x)
    right.set_ylim(len(cells) - 0.4, -0.6 if few else -len(cells) * 0.03)
    right.set_xlabel(latency_axis(unit.symbol, level(run), _samples(cells)))
    right.grid(visible=False, axis="y")
    return Plot(f"cells-{condition.slug}", figure, title, ranked_alt(title))


def _ranked_title(cells: pd.DataFrame) -> str:
    first, last = rows(cells)[0], rows(cells)[-1]
    baseline = [row.latency_s for row in rows(cells[cells["cell"] == BASELINE])]
    return ranked_title(len(cells), (first.cell, first.latency_s), last.latency_s, baseline[0] if baseline else None)


def _draw_switches(axes: Axes, cells: pd.DataFrame, names: list[str], few: bool) -> None:
    """Per row a large dot for each switch that is on, a small one for each that is off; a peer has none."""
    for column, name in enumerate(names):
        levels = cells[name].to_numpy(dtype=float, na_value=np.nan)
        for state, color, area in ((1, INK, 26 if few else 4), (0, GRAY, 3 if few else 0)):
            places = np.flatnonzero(levels == state)
            if area:
                marker = "o" if few else "_"
                axes.scatter(np.full(len(places), column), places, s=area, color=color, marker=marker)
    axes.set_xticks(range(len(names)), names, rotation=90)
    axes.xaxis.tick_top()
    axes.set_xlim(-0.6, max(1, len(names)) - 0.4)
    axes.set_yticks([])
    axes.tick_params(length=0)
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)


def memory_latency(run: Run, condition: Condition) -> Plot | None:
    """Latency of every cell against its peak memory, with the Pareto front."""
    cells = usable(condition.select(run.cells)).dropna(subset=[MEMORY])
    if len(cells) < 2:
        return None
    x_unit, y_unit = unit_for(cells[LATENCY], SECONDS), unit_for(cells[MEMORY], BYTES)
    front = pareto_front(cells, band(run))
    title = _front_title(front, cells, band(run))
    figure = new_figure(title, f"{condition}; {device(run)}", 4.6)
    axes = figure.subplots()
    x, y = _scaled(cells, LATENCY, x_unit), _scaled(cells, MEMORY, y_unit)
    if len(cells) <= _ROWS_NAMED:
        axes.errorbar(x, y, xerr=_bars(cells, x_unit), fmt="none", ecolor=GRAY, elinewidth=1)
    base, peer = _kinds(cells)
    ours = ~(base | peer)
    axes.scatter(x[ours], y[ours], s=26, color=BLUE, alpha=0.75, label="cell", zorder=3)
    front_x, front_y = _scaled(front, LATENCY, x_unit), _scaled(front, MEMORY, y_unit)
    axes.step(front_x, front_y, where="post", color=GREEN, linewidth=1.2, zorder=2)
    ring: dict[str, Any] = {"s": 70, "facecolor": "none", "edgecolor": GREEN, "linewidth": 1.8}
    axes.scatter(front_x, front_y, **ring, label="Pareto front", zorder=4)
    if base.any():
        axes.scatter(x[base], y[base], s=60, marker="s", color=ORANGE, label="baseline", zorder=4)
    if peer.any():
        axes.scatter(x[peer], y[peer], s=60, marker="^", color=INK, label="other implementation", zorder=4)
    named = list(dict.fromkeys([*front["cell"][:_FRONT_NAMED], *cells["cell"][peer]]))
    for number, cell in enumerate(named, 1):
        axes.plot([], [], " ", label=f"{number}: {cell}")
    axes.margins(0.14, 0.16)
    keep_in_view(axes, x)
    places = [int(np.flatnonzero(cells["cell"] == cell)[0]) for cell in named]
    for point, numbers in _labels(axes, [(float(x[place]), float(y[place])) for place in places]).items():
        label_point(axes, numbers, point)  # below and left of the front no cell lies
    axes.set_xlabel(latency_axis(x_unit.symbol, level(run), _samples(cells)))
    axes.set_ylabel(f"peak allocated memory ({y_unit.symbol})")
    figure.legend(loc="outside right center")
    return Plot(f"memory-{condition.slug}", figure, title, front_alt(len(cells), list(front["cell"])))


def _labels(axes: Axes, points: list[tuple[float, float]]) -> dict[tuple[float, float], str]:
    """Numbers of the points from 1, by where they stand: one label for those whose labels would touch."""
    width, height = np.ptp(axes.get_xlim()), np.ptp(axes.get_ylim())
    labels: dict[tuple[float, float], str] = {}
    for number, (x, y) in enumerate(points, 1):
        near = (at for at in labels if max(abs(at[0] - x) / width, abs(at[1] - y) / height) < _LABEL)
        at = next(near, (x, y))
        labels[at] = f"{labels[at]}, {number}" if at in labels else str(number)
    return labels


def pareto_front(cells: pd.DataFrame, width: float) -> pd.DataFrame:
    """Cells that no other cell equals or beats in both latency and peak memory, by rising latency.

    What lies within 1 ± width in one of the two is no reason to take the cell that is worse in the other.
    """
    ordered = cells.sort_values([LATENCY, MEMORY], kind="stable")
    memory = ordered[MEMORY].to_numpy(dtype=float)
    best_before = np.concatenate([[np.inf], np.minimum.accumulate(memory)[:-1]])
    front = ordered[memory < best_before]
    latency, memory = (front[name].to_numpy(dtype=float) for name in (LATENCY, MEMORY))
    beaten = [
        ((latency <= a * (1 + width)) & (memory < b / (1 + width))).any()
        or ((memory <= b * (1 + width)) & (latency < a / (1 + width))).any()
        for a, b in zip(latency, memory, strict=True)
    ]
    return front[~np.array(beaten)]


def _front_title(front: pd.DataFrame, cells: pd.DataFrame, width: float) -> str:
    return front_title(len(front), len(cells), width, smallest(cells, MEMORY).peak_allocated_bytes)


class _WrittenOut(LogFormatter):
    """Ticks of a logarithmic axis as plain numbers, 0.1 for 1e−01."""

    def __call__(self, x: float, pos: int | None = None) -> str:
        return f"{x:g}" if super().__call__(x, pos) else ""


def roofline(run: Run) -> Plot | None:
    """Arithmetic rate of every cell against what the device's measured ceilings allow (Williams 2009)."""
    top = next(reversed(run.record.of(CeilingLine)), CeilingLine())
    if not run.record.of(CostLine) or top.matmul_flops_per_s is None or top.copy_bytes_per_s is None:
        return None
    flops_ceiling, bytes_ceiling = float(top.matmul_flops_per_s), float(top.copy_bytes_per_s)
    cost = run.record.frame(CostLine).reindex(columns=["cell", "workload", "flops", "bytes"])
    cost = cost.drop_duplicates(["cell", "workload"], keep="last")
    cells = usable(run.cells).merge(cost, on=["cell", "workload"]).dropna(subset=["flops", "bytes"])
    if cells.empty:
        return None
    cells["intensity"] = cells["flops"] / cells["bytes"]
    cells["rate"] = cells["flops"] / cells[LATENCY]
    cells["share"] = cells["rate"] / np.minimum(flops_ceiling, bytes_ceiling * cells["intensity"])
    title = roofline_title(cells["share"].min(), cells["share"].max())
    scale, unit = (1e12, "TFLOP/s") if flops_ceiling >= 1e12 else (1e9, "GFLOP/s")
    products, copies = f"{significant(flops_ceiling / scale)} {unit}", f"{significant(bytes_ceiling / 1e9)} GB/s"
    figure = new_figure(title, ceilings(device(run), products, copies), 4.6)
    axes = figure.subplots()
    ridge = flops_ceiling / bytes_ceiling
    line = np.geomspace(min(cells["intensity"].min(), ridge) / 3, max(cells["intensity"].max(), ridge) * 3, 200)
    axes.plot(line, np.minimum(flops_ceiling, bytes_ceiling * line) / scale, color=INK, label="roofline")
    for place, ((workload, runtime), group) in enumerate(cells.groupby(["workload", "runtime"], sort=False)):
        shape, color = SERIES[place % len(SERIES)]
        look: dict[str, Any] = {
            "marker": shape,
            "s": 28,
            "facecolor": PAPER,
            "edgecolor": color,
            "linewidth": 1.3,
        }
        label = f"{workload} {runtime} (n = {count(len(group), 'cell')})"
        axes.scatter(group["intensity"], group["rate"] / scale, **look, label=label, zorder=3)
    axes.set_xscale("log")
    axes.set_yscale("log")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(_WrittenOut())
        axis.set_minor_formatter(_WrittenOut(minor_thresholds=(1, 0.4)))
    axes.set_xlabel(INTENSITY)
    axes.set_ylabel(f"achieved rate ({unit})")
    axes.legend(loc="best")
    return Plot("roofline", figure, title, roofline_alt(title))


def _kinds(cells: pd.DataFrame) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Which rows are the baseline, and which another implementation."""
    return (cells["cell"] == BASELINE).to_numpy(), of_peers(cells).to_numpy()


def _scaled(cells: pd.DataFrame, column: str, unit: Unit) -> NDArray[np.float64]:
    return cells[column].to_numpy(dtype=float) / unit.size


def _bars(cells: pd.DataFrame, unit: Unit) -> NDArray[np.float64]:
    """Lengths of the interval's arms of latency; zero where there is no interval."""
    low, middle, high = (_scaled(cells, name, unit) for name in ("latency_lo_s", LATENCY, "latency_hi_s"))
    return np.nan_to_num(np.clip([middle - low, high - middle], 0, None))


def _samples(cells: pd.DataFrame) -> str:
    counts = cells["samples"].dropna()
    low, high = (int(counts.min()), int(counts.max())) if len(counts) else (0, 0)
    return f"{low:,}" if low == high else f"{low:,}–{high:,}"
