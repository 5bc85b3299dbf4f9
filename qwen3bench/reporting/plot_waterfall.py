"""Waterfall of Shapley shares: what each switch has of the way from the baseline to all on."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from qwen3bench.record.states import Verdict
from qwen3bench.reporting import control_findings
from qwen3bench.reporting.conditions import Condition
from qwen3bench.reporting.figures import BLUE, GRAY, MUTED, ORANGE, Plot, new_figure
from qwen3bench.reporting.findings_screen import screen_of
from qwen3bench.reporting.lookup import (
    BASELINE,
    LATENCY,
    all_on,
    blocks_of,
    device,
    factors,
    rows,
    terms,
    usable,
)
from qwen3bench.reporting.tables import signed_bytes
from qwen3bench.reporting.units import BYTES, SECONDS, Unit, ratio, times, unit_for
from qwen3bench.reporting.wording.plot_words import (
    SHAPLEY,
    SHAPLEY_OF_MODEL,
    noisy_title,
    waterfall_alt,
    waterfall_title,
)

if TYPE_CHECKING:
    from qwen3bench.analysis.run import Run


def waterfall(run: Run, condition: Condition, metric: str) -> Plot | None:
    """Shapley shares from the baseline to all switches on, the largest first; together the whole."""
    shares = terms(run, condition, metric, "shapley")
    cells = {row.cell: getattr(row, metric) for row in rows(usable(condition.select(run.cells)))}
    if len(shares) < 2 or len(shares) < len(factors(run)) or not {BASELINE, all_on(run)} <= set(cells):
        return None
    start, end = float(cells[BASELINE]), float(cells[all_on(run)])
    latency = metric == LATENCY
    order = np.log(shares["estimate"]) if latency else -shares["estimate"]
    shares = shares.loc[order.sort_values(ascending=False, kind="stable").index]
    unit = unit_for([start], SECONDS if latency else BYTES)
    levels = [start]
    for share in shares["estimate"]:
        levels.append(levels[-1] / share if latency else levels[-1] + share)
    what = "latency" if latency else "peak memory"
    title = _waterfall_title(shares, what, latency, start, end)
    title = noisy_title(title, noisy=latency and control_findings.noise(run, condition) > 0)
    about = f"{condition}; {device(run)}; n = {blocks_of(run, condition)}"
    figure = new_figure(title, about, 3.6)
    axes = figure.subplots()
    _steps(axes, shares, levels, latency, unit)
    bars = [start / unit.size, end / unit.size]
    axes.bar([0, len(shares) + 1], bars, width=0.62, color=GRAY, zorder=2)
    for x, value in zip((0, len(shares) + 1), bars, strict=True):
        axes.annotate(unit.text(value * unit.size), (x, value), (0, 3), textcoords="offset points", ha="center")
    axes.set_xticks(range(len(shares) + 2), [BASELINE, *shares["term"], "all on"])
    axes.grid(visible=False, axis="x")
    axes.margins(y=0.12 if latency else 0.2)
    axes.set_ylabel(f"{what} ({unit.symbol})")
    axes.set_xlabel(SHAPLEY if screen_of(run, condition) is None else SHAPLEY_OF_MODEL)
    name = f"waterfall-{'latency' if latency else 'memory'}-{condition.slug}"
    return Plot(name, figure, title, waterfall_alt(what, title))


def _steps(axes: Axes, shares: pd.DataFrame, levels: list[float], latency: bool, unit: Unit) -> None:
    for i, row in enumerate(rows(shares)):
        share = row.estimate
        before, after = levels[i] / unit.size, levels[i + 1] / unit.size
        low, high = sorted((before, after))
        gain = after <= before
        axes.bar(
            i + 1,
            high - low,
            bottom=low,
            width=0.62,
            color=BLUE if gain else ORANGE,
            hatch="" if gain else "//",
            zorder=2,
        )
        axes.plot([i - 0.31, i + 1.31], [before, before], color=MUTED, linewidth=0.7)
        text = times(share, row.lo, row.hi) if latency else signed_bytes(share).replace(" ", "\n")  # a bar is narrow
        axes.annotate(text, (i + 1, high), (0, 3), textcoords="offset points", ha="center")
    axes.plot([len(shares) - 0.31, len(shares) + 1.31], [levels[-1] / unit.size] * 2, color=MUTED, linewidth=0.7)


def _waterfall_title(shares: pd.DataFrame, what: str, latency: bool, start: float, end: float) -> str:
    unit = unit_for([start], SECONDS if latency else BYTES)
    ends = f"{unit.text(start)} → {unit.text(end)} {unit.symbol}"
    first, second = rows(shares)[:2]
    apart = first.lo > second.hi if latency else first.hi < second.lo  # or it is named by chance
    if first.verdict not in (Verdict.FASTER, Verdict.LESS) or not apart:
        return waterfall_title(what, ends, None)
    share = ratio(first.estimate, first.lo, first.hi) if latency else signed_bytes(first.estimate)
    return waterfall_title(what, ends, (first.term, share))
