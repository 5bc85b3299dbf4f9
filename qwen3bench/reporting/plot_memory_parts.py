"""Peak memory of a training step by what holds it: one bar for the baseline, each switch alone, and all on."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from qwen3bench.reporting.conditions import Condition
from qwen3bench.reporting.figures import BLUE, GRAY, GREEN, ORANGE, Plot, new_figure
from qwen3bench.reporting.lookup import BASELINE, MEMORY, all_on, device, factors, rows, usable
from qwen3bench.reporting.units import BYTES, unit_for
from qwen3bench.reporting.wording.plot_words import TEMPORARY, parts_alt, parts_title

if TYPE_CHECKING:
    from qwen3bench.analysis.run import Run

# Column of cells.csv → what it is; what is left of the peak is temporary.
PARTS = {
    "parameter_bytes": "parameters",
    "optimizer_bytes": "optimizer",
    "gradient_bytes": "gradients",
    "activation_bytes": "activations",
}
_COLORS = (GRAY, GREEN, ORANGE, BLUE)
_MOST_BARS = 14


def memory_parts(run: Run, condition: Condition) -> Plot | None:
    """What of each cell's peak is held, and what is temporary, as a stack of bars."""
    cells = held(condition.select(run.cells))
    named = [BASELINE, *factors(run), all_on(run)]
    few = cells if len(cells) <= _MOST_BARS else cells[cells["cell"].isin(named)]
    if len(few) < 2:
        return None
    few = few.sort_values(MEMORY, kind="stable", ascending=False)
    unit = unit_for(few[MEMORY], BYTES)
    most, least = ((row.cell, unit.text(row.peak_allocated_bytes)) for row in rows(few.iloc[[0, -1]]))
    title = parts_title(most, least, unit.symbol)
    figure = new_figure(title, f"{condition}; {device(run)}", 1.9 + 0.26 * len(few))
    axes = figure.subplots()
    y, left = np.arange(len(few))[::-1], np.zeros(len(few))
    for (column, name), color in zip(PARTS.items(), _COLORS, strict=True):
        width = few[column].to_numpy(float) / unit.size
        axes.barh(y, width, left=left, color=color, label=name, height=0.7)
        left += width
    rest = few["temporary_bytes"].to_numpy(float) / unit.size
    axes.barh(y, rest, left=left, color="none", edgecolor=GRAY, hatch="///", label=TEMPORARY, height=0.7)
    for place, end, value in zip(y, left + rest, few[MEMORY], strict=True):
        axes.annotate(unit.text(value), (end, place), (4, 0), textcoords="offset points", va="center")
    axes.set_yticks(y, list(few["cell"]))
    axes.grid(visible=False, axis="y")
    axes.margins(x=0.12)
    axes.set_xlabel(f"peak allocated memory ({unit.symbol})")
    figure.legend(loc="outside right center")
    return Plot(f"memory-parts-{condition.slug}", figure, title, parts_alt(len(few), title))


def held(cells: pd.DataFrame) -> pd.DataFrame:
    """The usable cells whose peak is known by part, with `temporary_bytes`: what of it none of the parts holds."""
    known = usable(cells).dropna(subset=[MEMORY, *PARTS])
    parts = known[list(PARTS)].astype(float).sum(axis=1)
    return known.assign(temporary_bytes=(known[MEMORY].astype(float) - parts).clip(lower=0))
