"""Plots over several runs: every switch under every condition, and its effect along the prompt's length."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.ticker import FuncFormatter, NullFormatter

from qwen3bench.reporting.figures import MUTED, PAPER, RULE, SERIES, Plot, heat, new_figure
from qwen3bench.reporting.lookup import rows
from qwen3bench.reporting.units import count, listing

_ROWS_NAMED = 60
_SIGNS = {"faster": "*", "slower": "*", "same": "="}


def regimes(effects: pd.DataFrame, names: Sequence[str], width: float) -> Plot | None:
    """Heat map of main effects, one row per run and condition, one column per switch."""
    groups = list(effects.groupby(["run", "condition"], sort=False))[:_ROWS_NAMED]
    grid = np.full((len(groups), len(names)), np.nan)
    signs: dict[tuple[int, int], str] = {}
    conditions = [_row_label(rows(group)[0]) for _, group in groups]
    for y, (_, group) in enumerate(groups):
        for effect in rows(group):
            x = names.index(effect.term)
            grid[y, x], signs[y, x] = np.log(effect.estimate), _SIGNS.get(effect.verdict, "?")
    title = _regimes_title(effects[~effects["noisy"]], names)
    legend = f"* verdict faster or slower, = same within ±{100 * width:g} %, ? undecided"
    note = f"n = {count(effects['run'].nunique(), 'run')}; {legend}"
    figure = new_figure(title, note, 1.7 + 0.3 * len(groups))
    axes = figure.subplots()
    heat(axes, grid, signs, width, "speed-up when switched on (×)")
    axes.set_xticks(np.arange(len(names)) + 0.5, names)
    axes.set_yticks(np.arange(len(groups)) + 0.5, conditions)
    return Plot("regimes", figure, title, f"Effect of every switch under every condition. {title}.")


def _row_label(first: Any) -> str:
    return f"{first.condition} (noisy)" if first.noisy else str(first.condition)


def _regimes_title(effects: pd.DataFrame, names: Sequence[str]) -> str:
    seen = {name: set(effects.loc[effects["term"] == name, "verdict"]) for name in names}
    turning = [name for name in names if {"faster", "slower"} <= seen[name]]
    fading = [name for name in names if {"faster", "same"} <= seen[name] and name not in turning]
    steady = [name for name in names if seen[name] == {"faster"}]
    parts = [
        f"{words}: {listing(found)}"
        for words, found in (
            ("faster everywhere", steady),
            ("vanishes in places", fading),
            ("changes sign", turning),
        )
        if found
    ]
    title = "; ".join(parts) or "No switch is shown to be faster everywhere"
    return title[0].upper() + title[1:]


def trends(effects: pd.DataFrame, names: Sequence[str], width: float) -> Plot | None:
    """Each switch's effect along the prompt's length, a line per other condition; None below three."""
    lengths = sorted(effects["prompt_tokens"].dropna().astype(int).unique())
    if len(lengths) < 3:
        return None
    columns = min(3, len(names))
    lines = -(-len(names) // columns)
    title = f"Effects from {lengths[0]} to {lengths[-1]} prompt tokens: {_trend_words(effects, names, lengths)}"
    legend = f"95 % intervals; grey: ±{100 * width:g} %; hollow: undecided"
    note = f"n = {count(effects['run'].nunique(), 'run')}; {legend}"
    figure = new_figure(title, note, 1.6 + 2.3 * lines)
    panels = figure.subplots(lines, columns, sharex=True, squeeze=False)
    keys = [
        key
        for key in ("workload", "batch_size", "runtime", "model", "device", "dtype")
        if key in ("workload", "runtime") or effects[key].nunique() > 1
    ]
    for panel, name in zip(panels.flat, names, strict=False):
        panel.axhspan(1 - width, 1 + width, color=RULE, alpha=0.7, linewidth=0)
        panel.axhline(1, color=MUTED, linewidth=0.9)
        panel.set_title(name)
        for place, (key, line) in enumerate(effects[effects["term"] == name].groupby(keys, sort=False)):
            shape, colour = SERIES[place % len(SERIES)]
            line = line.sort_values("prompt_tokens")
            x = line["prompt_tokens"].to_numpy(dtype=float)
            bars = [line["estimate"] - line["lo"], line["hi"] - line["estimate"]]
            label = " ".join(f"batch {v}" if k == "batch_size" else str(v) for k, v in zip(keys, key, strict=True))
            panel.errorbar(
                x,
                line["estimate"],
                yerr=np.clip(bars, 0, None),
                color=colour,
                capsize=2,
                linewidth=1,
                label=label,
            )
            faces = [PAPER if verdict == "undecided" else colour for verdict in line["verdict"]]
            panel.scatter(x, line["estimate"], marker=shape, s=26, facecolor=faces, edgecolor=colour, zorder=3)
        panel.set_xscale("log", base=2)
        panel.set_xticks(lengths)
        panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        panel.xaxis.set_minor_formatter(NullFormatter())
        panel.tick_params(axis="x", labelrotation=45, labelbottom=True)
        panel.ticklabel_format(axis="y", useOffset=False)
    handles, labels = panels[0, 0].get_legend_handles_labels()
    spare = list(panels.flat)[len(names) :]
    for panel in spare:
        panel.set_axis_off()
    (spare or list(panels.flat))[0].legend(handles, labels, loc="center" if spare else "best", fontsize=8)
    for line in panels:
        line[0].set_ylabel("speed-up (×)")
    for panel in panels[-1]:
        panel.set_xlabel("prompt tokens")
    return Plot("trends", figure, title, f"{title}.")


def _trend_words(effects: pd.DataFrame, names: Sequence[str], lengths: Sequence[int]) -> str:
    def middle(name: str, length: int) -> float:
        chosen = effects[(effects["term"] == name) & (effects["prompt_tokens"] == length)]
        return float(chosen["estimate"].median())

    moves = {name: (middle(name, lengths[0]), middle(name, lengths[-1])) for name in names}
    most = max(
        moves,
        key=lambda name: abs(np.log(moves[name][1] / moves[name][0])) if np.isfinite(moves[name]).all() else 0,
    )
    return f"{most} moves most, median {moves[most][0]:.2f}× → {moves[most][1]:.2f}×"
