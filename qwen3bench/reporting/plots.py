"""The plots of a report; a plot whose data the run does not hold is left out."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING

from qwen3bench.reporting import plot_cells, plot_controls, plot_effects, plot_waterfall
from qwen3bench.reporting.conditions import Condition
from qwen3bench.reporting.figures import Plot
from qwen3bench.reporting.lookup import LATENCY, MEMORY

if TYPE_CHECKING:
    from qwen3bench.analysis.run import Run

_OF_CONDITION = (
    plot_effects.forest,
    plot_cells.ranked,
    plot_cells.memory_latency,
    partial(plot_waterfall.waterfall, metric=LATENCY),
    partial(plot_waterfall.waterfall, metric=MEMORY),
    plot_effects.interactions,
    plot_controls.controls_plot,
)
_OPENING = (plot_effects.by_condition,)
_CLOSING = (plot_cells.roofline,)


def condition_plots(run: Run, condition: Condition) -> Iterator[Plot]:
    """Plots of one workload under one runtime, in the order in which they are read."""
    for draw in _OF_CONDITION:
        if plot := draw(run, condition):
            yield plot


def opening_plots(run: Run) -> Iterator[Plot]:
    """Plots over all workloads and runtimes that come first."""
    yield from (plot for draw in _OPENING if (plot := draw(run)))


def closing_plots(run: Run) -> Iterator[Plot]:
    """Plots over all workloads and runtimes that come last."""
    yield from (plot for draw in _CLOSING if (plot := draw(run)))
