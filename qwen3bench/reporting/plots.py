"""The plots of a report; a plot whose data the run does not hold is left out."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING

from qwen3bench.reporting import plot_cells, plot_controls, plot_effects, plot_memory_parts, plot_waterfall
from qwen3bench.reporting.conditions import Condition, conditions
from qwen3bench.reporting.figures import Plot
from qwen3bench.reporting.lookup import MEMORY

if TYPE_CHECKING:
    from qwen3bench.analysis.run import Run

_OF_CONDITION = (
    plot_cells.ranked,
    plot_cells.memory_latency,
    plot_effects.forest,
    partial(plot_waterfall.waterfall, metric=MEMORY),
    plot_memory_parts.memory_parts,
    plot_effects.interactions,
    plot_controls.controls_plot,
)
_CLOSING = (plot_cells.roofline,)


def condition_plots(run: Run, condition: Condition) -> Iterator[Plot]:
    """Plots of one workload under one runtime beside its waterfall, in the order in which they are read."""
    for draw in _OF_CONDITION:
        stands_above = draw is plot_effects.forest and len(conditions(run)) == 1  # see `effect_plots`
        if not stands_above and (plot := draw(run, condition)):
            yield plot


def effect_plots(run: Run) -> Iterator[Plot]:
    """What stands beside the table of switches: their effects under every condition, or under the only one."""
    plot = plot_effects.by_condition(run)
    alone = conditions(run)
    if not plot and len(alone) == 1:
        plot = plot_effects.forest(run, alone[0])
    if plot:
        yield plot


def closing_plots(run: Run) -> Iterator[Plot]:
    """Plots over all workloads and runtimes that come last."""
    yield from (plot for draw in _CLOSING if (plot := draw(run)))
