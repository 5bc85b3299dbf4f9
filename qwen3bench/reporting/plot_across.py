"""Plots over several runs: every switch under every condition, and its effect along the prompt's length."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import cycle
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, NullFormatter

from qwen3bench.record.states import Verdict
from qwen3bench.reporting.figures import MUTED, PAPER, RULE, SERIES, Plot, heat, new_figure
from qwen3bench.reporting.finding import NoVerdict
from qwen3bench.reporting.lookup import rows
from qwen3bench.reporting.units import times
from qwen3bench.reporting.wording.plot_words import (
    OTHERS_DIFFER,
    TIMES_AS_FAST,
    map_alt,
    map_note,
    map_title,
    trends_note,
    trends_title,
)

MAX_ROWS = 60  # that can be told apart on a page
_SIGNS: dict[str, str] = {
    Verdict.FASTER: "*",
    Verdict.SLOWER: "*",
    Verdict.SAME: "=",
    Verdict.UNDECIDED: "?",
    NoVerdict.NOISE: "~",
    NoVerdict.IDLE: "∅",
}
_UNKNOWN = "–"


def regimes(effects: pd.DataFrame, names: Sequence[str], width: float, max_rows: int = MAX_ROWS) -> Plot | None:
    """Heat map of main effects, one row per run and condition (the first `max_rows`), one column per switch."""
    every = list(effects.groupby(["run", "condition"], sort=False))
    groups = every[:max_rows]
    grid = np.full((len(groups), len(names)), np.nan)
    texts: dict[tuple[int, int], str] = {}
    conditions = [_row_label(rows(group)[0]) for _, group in groups]
    for y, (_, group) in enumerate(groups):
        for effect in rows(group):
            x = names.index(effect.term)
            grid[y, x] = np.log(effect.estimate)
            texts[y, x] = f"{times(effect.estimate, effect.lo, effect.hi)[:-1]}{_SIGNS.get(effect.verdict, _UNKNOWN)}"
    title = _regimes_title(effects, names)
    seen = [_SIGNS.get(verdict, _UNKNOWN) for verdict in effects["verdict"]]
    note = map_note(effects["run"].nunique(), seen, width, len(groups), len(every))
    longest = max(map(len, conditions))
    figure = new_figure(title, note, 1.7 + 0.3 * len(groups), 8.0 + 0.07 * max(0, longest - 24))
    axes = figure.subplots()
    heat(axes, grid, texts, width, TIMES_AS_FAST)
    axes.set_xticks(np.arange(len(names)) + 0.5, names)
    axes.set_yticks(np.arange(len(groups)) + 0.5, conditions)
    return Plot("regimes", figure, title, map_alt(title))


def _row_label(first: Any) -> str:
    return f"noisy: {first.condition}" if first.noisy else str(first.condition)


def _regimes_title(effects: pd.DataFrame, names: Sequence[str]) -> str:
    quiet = effects[effects["verdict"] != NoVerdict.NOISE]
    if quiet["others"].nunique() > 1:
        return OTHERS_DIFFER.format(place="run")
    seen = {name: set(quiet.loc[quiet["term"] == name, "verdict"]) for name in names}
    turning = [name for name in names if {Verdict.FASTER, Verdict.SLOWER} <= seen[name]]
    fading = [
        name
        for name in names
        if Verdict.FASTER in seen[name] and seen[name] & {Verdict.SAME, NoVerdict.IDLE} and name not in turning
    ]
    steady = [name for name in names if seen[name] == {Verdict.FASTER}]
    others = next(iter(effects["others"]))
    return map_title(steady, fading, turning, others, quiet=len(quiet) == len(effects))


def trends(effects: pd.DataFrame, names: Sequence[str], width: float) -> Plot | None:
    """Each switch's effect along the prompt's length, a line per other condition; None below three."""
    lengths = sorted(effects["prompt_tokens"].dropna().astype(int).unique())
    if len(lengths) < 3:
        return None
    columns = min(3, len(names) + 1)
    lines = len(names) // columns + 1  # a panel at least is spare, for the legend
    note = trends_note(effects["run"].nunique(), width, effects["verdict"])
    labels = _line_labels(effects)
    effects = effects.assign(label=labels).sort_values("prompt_tokens", kind="stable")
    looks = dict(zip(dict.fromkeys(labels), _looks(), strict=False))
    title = trends_title(lengths[0], lengths[-1], _trend_words(effects))
    figure = new_figure(title, note, 1.6 + 2.3 * lines)
    panels = figure.subplots(lines, columns, sharex=True, squeeze=False)
    for panel, name in zip(panels.flat, names, strict=False):
        panel.axhspan(1 - width, 1 + width, color=RULE, alpha=0.7, linewidth=0)
        panel.axhline(1, color=MUTED, linewidth=0.9)
        panel.set_title(name)
        for label, line in effects[effects["term"] == name].groupby("label", sort=False):
            _trend(panel, line, looks[str(label)])
        panel.set_xscale("log", base=2)
        panel.set_xticks(lengths)
        panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        panel.xaxis.set_minor_formatter(NullFormatter())
        panel.tick_params(axis="x", labelrotation=45, labelbottom=True)
        panel.ticklabel_format(axis="y", useOffset=False)
        panel.set_xlabel("prompt tokens")
    handles = [Line2D([], [], label=label, **look) for label, look in looks.items()]
    spare = list(panels.flat)[len(names) :]
    for panel in spare:
        panel.set_axis_off()
    spare[0].legend(handles=handles, loc="upper left", fontsize=8).set_in_layout(False)
    for line in panels:
        line[0].set_ylabel("× as fast")
    return Plot("trends", figure, title, f"{title}.")


def _line_labels(effects: pd.DataFrame) -> list[str]:
    """The condition of each effect but for the prompt's length, as far as conditions differ."""
    keys = [
        key
        for key in ("workload", "batch_size", "logits", "runtime", "model", "device", "dtype", "threads", "others")
        if key in ("workload", "runtime") or effects[key].nunique() > 1
    ]
    return [
        " ".join(
            f"batch {value}" if key == "batch_size" else str(value)
            for key, value in zip(keys, where, strict=True)
            if value != ""
        )
        for where in effects[keys].itertuples(index=False)
    ]


def _trend(panel: Axes, line: pd.DataFrame, look: Mapping[str, Any]) -> None:
    """One switch under one condition, along the prompt's length, with intervals; hollow where undecided."""
    x, estimate, color = line["prompt_tokens"].to_numpy(dtype=float), line["estimate"], look["color"]
    bars = np.clip([estimate - line["lo"], line["hi"] - estimate], 0, None)
    panel.errorbar(x, estimate, yerr=bars, capsize=2, color=color, linestyle=look["linestyle"], linewidth=1)
    decided = line["verdict"].isin((Verdict.FASTER, Verdict.SLOWER, Verdict.SAME))
    faces = [color if each else PAPER for each in decided]
    panel.scatter(x, estimate, s=26, zorder=3, marker=look["marker"], edgecolor=color, facecolor=faces)


def _looks() -> Iterator[dict[str, Any]]:
    """Marker, color and stroke of one line after another, told apart in gray too."""
    for stroke in cycle(("-", "--", ":")):
        for shape, color in SERIES:
            yield {"marker": shape, "color": color, "linestyle": stroke, "linewidth": 1, "markersize": 5}


def _trend_words(effects: pd.DataFrame) -> str:
    """The effect whose estimate moves most along one line, of those whose intervals at both ends do not overlap."""
    moves = []
    for (name, label), line in effects[effects["verdict"] != NoVerdict.NOISE].groupby(["term", "label"], sort=False):
        first, last = rows(line.head(1))[0], rows(line.tail(1))[0]
        apart = first.hi < last.lo or last.hi < first.lo
        if apart and first.prompt_tokens < last.prompt_tokens:
            ends = " → ".join(f"{times(e.estimate, e.lo, e.hi)} at {int(e.prompt_tokens)}" for e in (first, last))
            moves.append((abs(np.log(last.estimate / first.estimate)), f": {name} {ends} ({label})"))
    return max(moves)[1] if moves else ""
