"""Plots of effects: forest, interactions, Shapley waterfall, and each switch over workloads and runtimes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from qwen3bench.reporting.conditions import BASELINE, Condition, all_on, conditions, device, factors, usable
from qwen3bench.reporting.figures import (
    BLUE,
    GREY,
    INK,
    MUTED,
    ORANGE,
    PAPER,
    RULE,
    SERIES,
    VERDICTS,
    Plot,
    mark,
    new_figure,
)
from qwen3bench.reporting.tables import signed_bytes
from qwen3bench.reporting.units import BYTES, SECONDS, Unit, count, listing, ratio, unit_for

if TYPE_CHECKING:
    from qwen3bench.analysis.run import Run

LATENCY, MEMORY = "latency_s", "peak_allocated_bytes"
_MOST_TERMS = 24


def terms(run: Run, condition: Condition, metric: str, kind: str) -> pd.DataFrame:
    """Effects of one kind that could be estimated, in the run's order of terms."""
    if run.effects.empty:
        return run.effects
    chosen = condition.select(run.effects)
    chosen = chosen[(chosen["metric"] == metric) & (chosen["kind"] == kind)]
    return chosen[chosen["estimate"].notna()]


def band(run: Run) -> float:
    """Half-width around 1 inside which an effect counts as none (`analysis.band`)."""
    return float(run.config.get("analysis", {}).get("band", 0.01))


def forest(run: Run, condition: Condition) -> Plot | None:
    """Main effects and the largest interactions on latency, with intervals and the band of no effect."""
    main = terms(run, condition, LATENCY, "main")
    joint = terms(run, condition, LATENCY, "interaction")
    if main.empty and joint.empty:
        return None
    size = np.log(joint["estimate"]).abs().sort_values(ascending=False).index
    shown_main = main.loc[np.log(main["estimate"]).sort_values(ascending=False).index]
    shown = pd.concat([shown_main, joint.loc[size[: max(0, _MOST_TERMS - len(main))]]])
    note = f"{condition}; {device(run)}; n = {_blocks(run, condition)}"
    if len(shown) < len(main) + len(joint):
        note += f"; the {len(shown)} largest of {len(main) + len(joint)} terms"
    title = _forest_title(main if len(main) else joint)
    figure = new_figure(title, note, 1.9 + 0.27 * len(shown))
    axes = figure.subplots()
    width = band(run)
    axes.axvspan(1 - width, 1 + width, color=RULE, alpha=0.7, linewidth=0)
    axes.axvline(1, color=MUTED, linewidth=0.9)
    for row, effect in enumerate(shown.itertuples()):
        mark(axes, effect.estimate, row, effect.lo, effect.hi, effect.verdict)
    if len(shown_main) and len(shown) > len(shown_main):
        axes.axhline(len(shown_main) - 0.5, color=MUTED, linewidth=0.6, linestyle=":")
    axes.set_yticks(range(len(shown)), [term.replace(":", " : ") for term in shown["term"]])
    axes.set_ylim(len(shown) - 0.4, -0.6)
    axes.grid(visible=False, axis="y")
    axes.set_xlabel(f"speed-up when switched on (×, above 1 is faster), 95 % interval; grey: ±{width * 100:g} %")
    axes.legend(handles=_verdict_handles(shown["verdict"]), loc="best")
    alt = f"Effects on latency with intervals: {listing([f'{e.term} {ratio(e.estimate, e.lo, e.hi)}' for e in shown_main.itertuples()], 12)}."
    return Plot(f"effects-{condition.slug}", figure, title, alt)


def _forest_title(effects: pd.DataFrame) -> str:
    faster = effects[effects["verdict"] == "faster"].sort_values("estimate", ascending=False)
    parts = []
    if len(faster):
        best = faster.iloc[0]
        parts.append(f"{best.term} gains most, {ratio(best.estimate, best.lo, best.hi)}")
    for verdict, words in (("slower", "slower"), ("same", "without effect on latency"), ("undecided", "undecided")):
        names = list(effects.loc[effects["verdict"] == verdict, "term"])
        if names:
            parts.append(f"{words}: {listing(names)}")
    return "; ".join(parts) or "No effect on latency could be judged"


def _verdict_handles(verdicts: pd.Series) -> list[Line2D]:
    handles = []
    for verdict in [v for v in VERDICTS if v in set(verdicts)]:
        shape, colour, filled = VERDICTS[verdict]
        face = colour if filled else PAPER
        handles.append(Line2D([], [], marker=shape, color=colour, markerfacecolor=face, linestyle="", label=verdict))
    return handles


def interactions(run: Run, condition: Condition) -> Plot | None:
    """Heat map of the two-way interactions of latency."""
    names = factors(run)
    joint = terms(run, condition, LATENCY, "interaction")
    pairs = joint[joint["term"].str.count(":") == 1] if len(joint) else joint
    if len(names) < 3 or pairs.empty:
        return None
    place = {name: i for i, name in enumerate(names)}
    grid = np.full((len(names), len(names)), np.nan)
    notes: dict[tuple[int, int], str] = {}
    for effect in pairs.itertuples():
        column, row = sorted(place[name] for name in effect.term.split(":"))
        grid[row, column] = np.log(effect.estimate)
        decided = effect.verdict in ("faster", "slower")
        notes[row, column] = f"{effect.estimate:.3f}" + ("*" if decided else "")
    decided = pairs[pairs["verdict"].isin(("faster", "slower"))]
    title = _interactions_title(pairs, decided)
    figure = new_figure(title, f"{condition}; {device(run)}; n = {_blocks(run, condition)}", 1.6 + 0.55 * len(names), 6.6)
    axes = figure.subplots()
    limit = max(float(np.nanmax(np.abs(grid))), band(run))
    mesh = axes.pcolormesh(grid[1:, :-1], cmap="PuOr", vmin=-limit, vmax=limit, edgecolors=PAPER, linewidth=1)
    for (row, column), text in notes.items():
        dark = abs(grid[row, column]) > 0.6 * limit
        axes.text(column + 0.5, row - 0.5, text, ha="center", va="center", color="#fefefe" if dark else "#1e1e1e")
    axes.set_xticks(np.arange(len(names) - 1) + 0.5, names[:-1])
    axes.set_yticks(np.arange(len(names) - 1) + 0.5, names[1:])
    axes.invert_yaxis()
    axes.grid(visible=False)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    bar = figure.colorbar(mesh, ax=axes, label="joint effect (×, above 1: faster together)")
    ticks = np.array([-limit, 0, limit])
    bar.set_ticks(ticks, labels=[f"{np.exp(tick):.3f}" for tick in ticks])
    axes.set_xlabel("* verdict faster or slower; without: same or undecided")
    alt = f"Two-way interactions of latency. {title}."
    return Plot(f"interactions-{condition.slug}", figure, title, alt)


def _interactions_title(pairs: pd.DataFrame, decided: pd.DataFrame) -> str:
    if decided.empty:
        return f"None of {count(len(pairs), 'pair')} is shown to gain or lose together"
    most = decided.loc[np.log(decided["estimate"]).abs().idxmax()]
    manner = "gain more together" if most.estimate > 1 else "take from each other"
    words = f"{' and '.join(most.term.split(':'))} {manner}, {ratio(most.estimate, most.lo, most.hi)}"
    return f"{words}; {len(decided)} of {count(len(pairs), 'pair')} interact"


def waterfall(run: Run, condition: Condition, metric: str) -> Plot | None:
    """Shapley shares from the baseline to all switches on, the largest first; shares combine to the whole exactly."""
    shares = terms(run, condition, metric, "shapley")
    cells = usable(condition.select(run.cells)).drop_duplicates("cell").set_index("cell")
    if len(shares) < 2 or len(shares) < len(factors(run)) or not {BASELINE, all_on(run)} <= set(cells.index):
        return None
    start, end = float(cells.loc[BASELINE, metric]), float(cells.loc[all_on(run), metric])
    latency = metric == LATENCY
    order = np.log(shares["estimate"]) if latency else -shares["estimate"]
    shares = shares.loc[order.sort_values(ascending=False, kind="stable").index]
    unit = unit_for([start], SECONDS if latency else BYTES)
    levels = [start]
    for share in shares["estimate"]:
        levels.append(levels[-1] / share if latency else levels[-1] + share)
    what = "latency" if latency else "peak memory"
    title = _waterfall_title(shares, what, latency, start, end)
    figure = new_figure(title, f"{condition}; {device(run)}; n = {_blocks(run, condition)}", 3.6)
    axes = figure.subplots()
    _steps(axes, shares, levels, latency, unit)
    bars = [start / unit.size, end / unit.size]
    axes.bar([0, len(shares) + 1], bars, width=0.62, color=GREY, zorder=2)
    for x, value in zip((0, len(shares) + 1), bars, strict=True):
        axes.annotate(unit.text(value * unit.size), (x, value), (0, 3), textcoords="offset points", ha="center")
    axes.set_xticks(range(len(shares) + 2), [BASELINE, *shares["term"], "all on"])
    axes.grid(visible=False, axis="x")
    axes.margins(y=0.12)
    axes.set_ylabel(f"{what} ({unit.symbol})")
    axes.set_xlabel("Shapley share of each switch, the mean over all orders of switching on; the largest first")
    name = f"waterfall-{'latency' if latency else 'memory'}-{condition.slug}"
    return Plot(name, figure, title, f"Waterfall of {what} from baseline to all on. {title}.")


def _steps(axes: Axes, shares: pd.DataFrame, levels: list[float], latency: bool, unit: Unit) -> None:
    for i, share in enumerate(shares["estimate"]):
        before, after = levels[i] / unit.size, levels[i + 1] / unit.size
        low, high = sorted((before, after))
        gain = after <= before
        axes.bar(i + 1, high - low, bottom=low, width=0.62, color=BLUE if gain else ORANGE, hatch="" if gain else "//", zorder=2)
        axes.plot([i - 0.31, i + 1.31], [before, before], color=MUTED, linewidth=0.7)
        text = f"{share:.3f}×" if latency else signed_bytes(share)
        axes.annotate(text, (i + 1, high), (0, 3), textcoords="offset points", ha="center")
    axes.plot([len(shares) - 0.31, len(shares) + 1.31], [levels[-1] / unit.size] * 2, color=MUTED, linewidth=0.7)


def _waterfall_title(shares: pd.DataFrame, what: str, latency: bool, start: float, end: float) -> str:
    unit = unit_for([start], SECONDS if latency else BYTES)
    whole = f"All on: {what} {unit.text(start)} → {unit.text(end)} {unit.symbol}"
    first = shares.iloc[0]
    gain = first.estimate > 1 if latency else first.estimate < 0
    if not gain:
        return whole
    share = ratio(first.estimate, first.lo, first.hi) if latency else signed_bytes(first.estimate)
    return f"{whole}; the largest share is that of {first.term}, {share}"


def by_condition(run: Run) -> Plot | None:
    """Main effect of each switch under every workload and runtime of the run."""
    frames = [(condition, terms(run, condition, LATENCY, "main")) for condition in conditions(run)]
    frames = [(condition, effects.set_index("term")) for condition, effects in frames if len(effects)]
    names = factors(run)
    if len(frames) < 2:
        return None
    title = _by_condition_title(frames, names)
    figure = new_figure(title, device(run), 2.1 + len(names) * (0.25 + 0.17 * len(frames)))
    axes = figure.subplots()
    width = band(run)
    axes.axvspan(1 - width, 1 + width, color=RULE, alpha=0.7, linewidth=0)
    axes.axvline(1, color=MUTED, linewidth=0.9)
    step = 0.75 / len(frames)
    for place, (condition, effects) in enumerate(frames):
        shape, colour = SERIES[place % len(SERIES)]
        rows = [i for i, name in enumerate(names) if name in effects.index]
        chosen = effects.loc[[names[i] for i in rows]]
        decided = chosen["verdict"] != "undecided"
        offset = (place - (len(frames) - 1) / 2) * step
        y = np.array(rows) + offset
        bars = [chosen["estimate"] - chosen["lo"], chosen["hi"] - chosen["estimate"]]
        axes.errorbar(chosen["estimate"], y, xerr=np.clip(bars, 0, None), fmt="none", ecolor=colour, capsize=2)
        axes.scatter(chosen["estimate"], y, marker=shape, s=34, facecolor=[colour if d else PAPER for d in decided], edgecolor=colour, zorder=3)
        handle = f"{condition} (n = {_blocks(run, condition)})"
        axes.scatter([], [], marker=shape, s=34, color=colour, label=handle)
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.45, -0.55)
    axes.grid(visible=False, axis="y")
    axes.set_xlabel(f"speed-up when switched on (×), 95 % interval; hollow: undecided; grey: ±{width * 100:g} %")
    figure.legend(loc="outside lower left", ncols=1 if len(frames) < 3 else 2, fontsize=8.5)
    return Plot("effects-by-condition", figure, title, f"Main effects by workload and runtime. {title}.")


def _by_condition_title(frames: list[tuple[Condition, pd.DataFrame]], names: list[str]) -> str:
    def verdicts(name: str) -> set[str]:
        return {str(effects.loc[name, "verdict"]) for _, effects in frames if name in effects.index}

    everywhere = [name for name in names if verdicts(name) == {"faster"}]
    turns = [name for name in names if "faster" in verdicts(name) and verdicts(name) & {"same", "slower"}]
    parts = [f"{words}: {listing(found)}" for words, found in (("Faster everywhere", everywhere), ("Faster only in places", turns)) if found]
    return "; ".join(parts) or "No switch is shown to be faster everywhere"


def _blocks(run: Run, condition: Condition) -> str:
    """Blocks and processes behind the numbers of a condition, in words."""
    samples = condition.select(run.samples)
    if samples.empty:
        return "0 blocks"
    blocks, processes = samples["block"].nunique(), samples["process"].nunique()
    return f"{count(blocks, 'block')} in {count(processes, 'process', 'processes')}"
