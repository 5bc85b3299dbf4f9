"""Each machine's effects beside the pooled ones."""

from __future__ import annotations

from itertools import cycle

import pandas as pd
from matplotlib.lines import Line2D

from qwen3bench.analysis.changes import Compared
from qwen3bench.analysis.pooling import Pool
from qwen3bench.reporting.conditions import Condition
from qwen3bench.reporting.figures import MUTED, RULE, SERIES, Plot, new_figure
from qwen3bench.reporting.lookup import device, rows
from qwen3bench.reporting.units import count
from qwen3bench.reporting.wording.pool_words import BESIDE_POOLED, machines_title

_ROOM = 0.6  # of a row that the machines' marks share
_NAMED = 12  # machines that a legend can name


def machines_plot(pool: Pool, condition: Condition) -> Plot | None:
    """How far each machine's main effects lie from the pooled ones, in %; None with one machine."""
    names = pool.machine_names
    pooled = condition.select(pool.effects)
    pooled = pooled[(pooled["kind"] == Compared.MAIN) & pooled["estimate"].notna()]
    if len(names) < 2 or pooled.empty:
        return None
    title = machines_title(len(names))
    stand = f"{count(len(pool.cards), 'card')} in {count(len(names), 'machine')}"
    figure = new_figure(
        title, f"{condition}; {device(pool.runs[0])}; n = {stand}; bars: intervals", 1.9 + 0.5 * len(pooled)
    )
    axes = figure.subplots()
    axes.use_sticky_edges = False  # a bar's end is no end of the axis
    axes.axvline(0, color=MUTED, linewidth=0.9)
    looks = dict(zip(names, cycle(SERIES), strict=False))
    for row, effect in enumerate(rows(pooled)):
        lo, hi = (100 * (end / effect.estimate - 1) for end in (effect.lo, effect.hi))
        axes.barh(row, hi - lo, left=lo, height=0.8, color=RULE, zorder=1)
        here = _of_machines(pool, condition, effect.term)
        for place, (name, (shape, color)) in enumerate(looks.items()):
            own = here.loc[name]
            values = [100 * (own[key] / effect.estimate - 1) for key in ("estimate", "lo", "hi")]
            y = row + _ROOM * ((place + 0.5) / len(names) - 0.5)
            arms = [[values[0] - values[1]], [values[2] - values[0]]]
            axes.errorbar(values[0], y, xerr=arms, fmt=shape, color=color, markersize=4.5, capsize=2, zorder=3)
    axes.set_yticks(range(len(pooled)), list(pooled["term"]))
    axes.set_ylim(len(pooled) - 0.4, -0.6)
    axes.grid(visible=False, axis="y")
    axes.set_xlabel(BESIDE_POOLED)
    shown = list(looks.items())[:_NAMED]
    handles = [Line2D([], [], marker=shape, color=color, linestyle="", label=name) for name, (shape, color) in shown]
    axes.legend(handles=handles, loc="best", fontsize=8)
    return Plot(f"machines-{condition.slug}", figure, title, f"{title}, {condition}.")


def _of_machines(pool: Pool, condition: Condition, term: str) -> pd.DataFrame:
    here = condition.select(pool.machines)
    return here[(here["kind"] == Compared.MAIN) & (here["term"] == term)].set_index("machine")
