"""Plots of the cells: ranked by latency, against peak memory, against the roofline."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from qwen3bench.reporting.conditions import BASELINE, Condition, all_on, device, factors, usable
from qwen3bench.reporting.figures import BLUE, GREEN, GREY, INK, ORANGE, PAPER, SERIES, Plot, new_figure
from qwen3bench.reporting.units import BYTES, SECONDS, count, is_number, percent, ratio, seconds, size, unit_for

if TYPE_CHECKING:
    from qwen3bench.analysis.run import Run

_ROWS_NAMED = 64  # cells whose labels fit beside their marks


def ranked(run: Run, condition: Condition) -> Plot | None:
    """Latency of every cell with its interval, fastest on top, beside the switches that are on."""
    cells = usable(condition.select(run.cells)).sort_values("latency_s", kind="stable").reset_index(drop=True)
    if cells.empty:
        return None
    names = factors(run)
    unit = unit_for(cells["latency_s"], SECONDS)
    title = _ranked_title(cells)
    named = len(cells) <= _ROWS_NAMED
    height = 1.5 + (0.2 * len(cells) if named else 7.5)
    figure = new_figure(title, f"{condition}; {device(run)}", height)
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(max(1, len(names)) * 0.26, 6))
    y = np.arange(len(cells))
    _switches(left, cells, names, named)
    latency = cells["latency_s"] / unit.size
    bars = [
        (latency - cells["latency_lo_s"] / unit.size).clip(lower=0).fillna(0),
        (cells["latency_hi_s"] / unit.size - latency).clip(lower=0).fillna(0),
    ]
    right.errorbar(latency, y, xerr=bars, fmt="none", ecolor=GREY, elinewidth=1.2, capsize=2 if named else 0)
    right.scatter(latency, y, s=22 if named else 5, color=BLUE, zorder=3)
    reference = cells.index[cells["cell"] == BASELINE]
    for row in reference:
        right.scatter(latency[row], row, s=46, marker="s", color=ORANGE, zorder=4)
        right.axvline(latency[row], color=ORANGE, linewidth=0.9, linestyle="--")
        right.text(latency[row], -0.9, "baseline", color=INK, ha="right", va="bottom", fontsize=8)
    if named:
        peers = [str(c) if str(c).startswith("transformers") else "" for c in cells["cell"]]
        for row, text in enumerate(peers):
            if text:
                right.annotate(text, (latency[row], row), (6, 0), textcoords="offset points", va="center", fontsize=8)
    right.set_ylim(len(cells) - 0.4, -1.4 if named else -len(cells) * 0.03)
    right.set_xlabel(f"latency ({unit.symbol}): median and 95 % interval; n = {_samples(cells)} samples per cell")
    right.grid(visible=False, axis="y")
    alt = f"Latency of {count(len(cells), 'cell')}, fastest on top. {title}."
    return Plot(f"cells-{condition.slug}", figure, title, alt)


def _ranked_title(cells: pd.DataFrame) -> str:
    fastest, baseline = cells.iloc[0], cells[cells["cell"] == BASELINE]
    if len(cells) == 1:
        return f"{fastest.cell}: {seconds(fastest.latency_s)}"
    if baseline.empty:
        return f"{fastest.cell} has the lowest latency, {seconds(fastest.latency_s)}"
    return (
        f"{fastest.cell} has the lowest latency, {seconds(fastest.latency_s)}; "
        f"the baseline takes {seconds(baseline.iloc[0].latency_s)}"
    )


def _switches(axes: Axes, cells: pd.DataFrame, names: list[str], named: bool) -> None:
    """Per row, a filled dot for each switch that is on and a small one for each that is off."""
    for column, name in enumerate(names):
        on = cells[name].fillna(-1).to_numpy(dtype=float)
        for level, colour in ((1, INK), (0, GREY)):
            rows = np.flatnonzero(on == level)
            area = (26 if level else 3) if named else (4 if level else 0)
            if area:
                axes.scatter(np.full(len(rows), column), rows, s=area, color=colour, marker="o" if named else "_")
    axes.set_xticks(range(len(names)), names, rotation=90)
    axes.xaxis.tick_top()
    axes.set_xlim(-0.6, max(1, len(names)) - 0.4)
    axes.set_yticks([])
    axes.tick_params(length=0)
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)


def memory_latency(run: Run, condition: Condition) -> Plot | None:
    """Latency of every cell against its peak memory, with the Pareto front."""
    cells = usable(condition.select(run.cells)).dropna(subset=["peak_allocated_bytes"])
    if len(cells) < 2:
        return None
    x_unit, y_unit = unit_for(cells["latency_s"], SECONDS), unit_for(cells["peak_allocated_bytes"], BYTES)
    front = pareto_front(cells)
    smallest = cells.loc[cells["peak_allocated_bytes"].idxmin()]
    title = (
        f"{count(len(front), 'cell')} of {len(cells)} cannot be bettered in both latency and memory; "
        f"the smallest peak is {size(smallest.peak_allocated_bytes)}"
    )
    figure = new_figure(title, f"{condition}; {device(run)}", 4.6)
    axes = figure.subplots()
    x, y = cells["latency_s"] / x_unit.size, cells["peak_allocated_bytes"] / y_unit.size
    bars = [
        (x - cells["latency_lo_s"] / x_unit.size).clip(lower=0).fillna(0),
        (cells["latency_hi_s"] / x_unit.size - x).clip(lower=0).fillna(0),
    ]
    axes.errorbar(x, y, xerr=bars, fmt="none", ecolor=GREY, elinewidth=1)
    axes.scatter(x, y, s=26, color=BLUE, alpha=0.75, label="cell", zorder=3)
    fx, fy = front["latency_s"] / x_unit.size, front["peak_allocated_bytes"] / y_unit.size
    axes.step(fx, fy, where="post", color=GREEN, linewidth=1.2, zorder=2)
    axes.scatter(fx, fy, s=70, facecolor="none", edgecolor=GREEN, linewidth=1.8, label="Pareto front", zorder=4)
    base = cells["cell"] == BASELINE
    if base.any():
        axes.scatter(x[base], y[base], s=60, marker="s", color=ORANGE, label="baseline", zorder=4)
    for cell, fx_one, fy_one in zip(front["cell"][:6], fx, fy, strict=False):
        right_half = fx_one > (x.min() + x.max()) / 2
        axes.annotate(
            cell,
            (fx_one, fy_one),
            (-8 if right_half else 8, -10),
            textcoords="offset points",
            ha="right" if right_half else "left",
            va="top",
            fontsize=8,
        )
    axes.margins(0.08, 0.16)
    axes.set_xlabel(f"latency ({x_unit.symbol}): median and 95 % interval; n = {_samples(cells)} samples per cell")
    axes.set_ylabel(f"peak allocated memory ({y_unit.symbol})")
    axes.legend(loc="best")
    alt = f"Latency against peak memory of {len(cells)} cells; Pareto front: {', '.join(front['cell'][:6])}."
    return Plot(f"memory-{condition.slug}", figure, title, alt)


def pareto_front(cells: pd.DataFrame) -> pd.DataFrame:
    """Cells that no other cell beats in latency and peak memory at once, by rising latency."""
    ordered = cells.sort_values(["latency_s", "peak_allocated_bytes"], kind="stable")
    lowest = ordered["peak_allocated_bytes"].cummin().shift(fill_value=np.inf)
    return ordered[ordered["peak_allocated_bytes"] < lowest]


def roofline(run: Run) -> Plot | None:
    """Arithmetic rate of every cell against what the device's measured ceilings allow."""
    ceilings, costs = run.record.of("ceiling"), run.record.of("cost")
    if not ceilings or not costs:
        return None
    peak_flops, peak_bytes = ceilings[-1].get("matmul_flops_per_s"), ceilings[-1].get("copy_bytes_per_s")
    if not (is_number(peak_flops) and is_number(peak_bytes)):
        return None
    cost = pd.DataFrame(costs).drop_duplicates(["cell", "workload"], keep="last")
    cells = usable(run.cells).merge(cost[["cell", "workload", "flops", "bytes"]], on=["cell", "workload"])
    cells = cells.dropna(subset=["flops", "bytes"])
    if cells.empty:
        return None
    intensity, rate = cells["flops"] / cells["bytes"], cells["flops"] / cells["latency_s"]
    share = rate / np.minimum(peak_flops, peak_bytes * intensity)
    best = cells.loc[share.idxmax()]
    title = (
        f"{best.cell} comes closest to the roofline: {percent(share.max())} of what the device allows "
        f"({best.workload}, {best.runtime})"
    )
    note = f"{device(run)}; ceilings measured: {peak_flops / 1e12:.3g} TFLOP/s in matrix products, {peak_bytes / 1e12:.3g} TB/s in copies"
    figure = new_figure(title, note, 4.6)
    axes = figure.subplots()
    low, high = min(intensity.min(), peak_flops / peak_bytes) / 3, max(intensity.max(), peak_flops / peak_bytes) * 3
    line = np.geomspace(low, high, 200)
    axes.plot(line, np.minimum(peak_flops, peak_bytes * line) / 1e12, color=INK, label="roofline")
    groups = cells.groupby(["workload", "runtime"], sort=False)
    for (shape, colour), ((workload, runtime), group) in zip(SERIES * len(groups), groups, strict=False):
        axes.scatter(
            intensity[group.index],
            rate[group.index] / 1e12,
            marker=shape,
            s=28,
            facecolor=PAPER,
            edgecolor=colour,
            linewidth=1.3,
            label=f"{workload}, {runtime} (n = {len(group)} cells)",
            zorder=3,
        )
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("arithmetic intensity (FLOP per byte moved at least)")
    axes.set_ylabel("achieved rate (TFLOP/s)")
    axes.legend(loc="best")
    return Plot("roofline", figure, title, f"Achieved arithmetic rate of each cell under the roofline. {title}.")


def _samples(cells: pd.DataFrame) -> str:
    counts = cells["samples"].dropna().astype(int)
    low, high = (counts.min(), counts.max()) if len(counts) else (0, 0)
    return f"{low:,}" if low == high else f"{low:,}–{high:,}"
