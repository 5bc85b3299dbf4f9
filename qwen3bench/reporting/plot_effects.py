"""Plots of effects: forest, two-way interactions, and each switch over workloads and runtimes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.transforms import ScaledTranslation
from numpy.typing import NDArray

from qwen3bench.record.states import Verdict
from qwen3bench.reporting import control_findings
from qwen3bench.reporting.conditions import Condition, conditions
from qwen3bench.reporting.figures import (
    MUTED,
    PAPER,
    RULE,
    SERIES,
    VERDICTS,
    Plot,
    heat,
    keep_in_view,
    mark,
    new_figure,
)
from qwen3bench.reporting.finding import Effect, NoVerdict, Pair
from qwen3bench.reporting.findings_effects import joint
from qwen3bench.reporting.lookup import (
    AVERAGE,
    LATENCY,
    UNLIKE,
    band,
    blocks_of,
    device,
    factors,
    largest,
    level,
    others_beside,
    rows,
    terms,
)
from qwen3bench.reporting.units import times
from qwen3bench.reporting.wording.plot_words import (
    DECIDED_MARK,
    JOINT_EFFECT,
    NOISE_NOT_COUNTED,
    NOISY_EVERYWHERE,
    OTHERS_DIFFER,
    by_condition_alt,
    by_condition_title,
    each_switch_beside,
    effect_axis,
    effects_alt,
    effects_title,
    interactions_alt,
    interactions_left_out,
    interactions_title,
    noisy_title,
)
from qwen3bench.reporting.wording.sentences import only_with

if TYPE_CHECKING:
    from qwen3bench.analysis.run import Run

_MAX_TERMS = 24  # rows that a page has room for
_UNDER_AXIS = 0.42  # inches from the axis to what stands below its numbers and its label
_COLUMN = 48  # characters of a legend's entry of which two stand side by side


def forest(run: Run, condition: Condition) -> Plot | None:
    """Main effects and the largest interactions on latency, with intervals and the band of no effect."""
    main, joint = (
        control_findings.idle_effects(run, condition, terms(run, condition, LATENCY, kind))
        for kind in ("main", "interaction")
    )
    if main.empty and joint.empty:
        return None
    worth_a_row = joint[(joint["term"].str.count(":") == 1) | joint["verdict"].isin((Verdict.FASTER, Verdict.SLOWER))]
    size = np.log(worth_a_row["estimate"]).abs().sort_values(ascending=False, kind="stable").index
    shown_main = main.loc[np.log(main["estimate"]).sort_values(ascending=False, kind="stable").index]
    shown = pd.concat([shown_main, joint.loc[size[: max(0, _MAX_TERMS - len(main))]]])
    others = others_beside(run, main) if len(main) else ""
    note = f"{condition}; {device(run)}; n = {blocks_of(run, condition)}{each_switch_beside(others)}"
    if left_out := len(main) + len(joint) - len(shown):
        note += interactions_left_out(left_out)
    title = _noisy(run, condition, _forest_title(main if len(main) else joint, others, band(run)))
    figure = new_figure(title, note, 1.6 + 0.27 * len(shown))
    axes = figure.subplots()
    width = band(run)
    axes.axvspan(1 - width, 1 + width, color=RULE, alpha=0.7, linewidth=0)
    axes.axvline(1, color=MUTED, linewidth=0.9)
    for row, effect in enumerate(rows(shown)):
        mark(axes, row, effect)
    keep_in_view(axes, [*shown["estimate"], 1])
    if len(shown_main) and len(shown) > len(shown_main):
        axes.axhline(len(shown_main) - 0.5, color=MUTED, linewidth=0.6, linestyle=":")
    axes.set_yticks(range(len(shown)), [term.replace(":", " : ") for term in shown["term"]])
    axes.set_ylim(len(shown) - 0.4, -0.6)
    axes.grid(visible=False, axis="y")
    axes.set_xlabel(effect_axis(level(run), width, pairs=len(shown) > len(shown_main)))
    axes.legend(handles=_verdict_handles(shown["verdict"]), loc="best")
    return Plot(f"effects-{condition.slug}", figure, title, effects_alt(rows(shown_main)))


def _forest_title(effects: pd.DataFrame, others: str, width: float) -> str:
    """Which switches have which verdict, those that are faster by their size."""
    ordered = effects.sort_values("estimate", ascending=False, kind="stable")
    names = {str(verdict): list(found) for verdict, found in ordered.groupby("verdict", sort=False)["term"]}
    return effects_title(names, others, width)


def _verdict_handles(verdicts: pd.Series) -> list[Line2D]:
    handles = []
    for verdict in [v for v in VERDICTS if v in set(verdicts)]:
        shape, color, filled = VERDICTS[verdict]
        face = color if filled else PAPER
        handles.append(Line2D([], [], marker=shape, color=color, markerfacecolor=face, linestyle="", label=verdict))
    return handles


def interactions(run: Run, condition: Condition) -> Plot | None:
    """Heat map of the two-way interactions of latency."""
    names = factors(run)
    joint = terms(run, condition, LATENCY, "interaction")
    pairs = joint[joint["term"].str.count(":") == 1] if len(joint) else joint
    if len(names) < 3 or pairs.empty:
        return None
    grid = np.full((len(names) - 1, len(names) - 1), np.nan)
    texts: dict[tuple[int, int], str] = {}
    for effect in rows(pairs):
        column, row = sorted(names.index(name) for name in effect.term.split(":"))
        grid[row - 1, column] = np.log(effect.estimate)
        sign = "*" if effect.verdict in (Verdict.FASTER, Verdict.SLOWER) else ""
        texts[row - 1, column] = f"{times(effect.estimate, effect.lo, effect.hi)[:-1]}{sign}"
    title = _noisy(run, condition, _interactions_title(pairs))
    note = f"{condition}; {device(run)}; n = {blocks_of(run, condition)}"
    figure = new_figure(title, note, 1.6 + 0.55 * len(names), 6.6)
    axes = figure.subplots()
    heat(axes, grid, texts, band(run), JOINT_EFFECT)
    axes.set_xticks(np.arange(len(names) - 1) + 0.5, names[:-1])
    axes.set_yticks(np.arange(len(names) - 1) + 0.5, names[1:])
    axes.set_xlabel(DECIDED_MARK)
    return Plot(f"interactions-{condition.slug}", figure, title, interactions_alt(title))


def _noisy(run: Run, condition: Condition, title: str) -> str:
    return noisy_title(title, noisy=control_findings.noise(run, condition) > 0)


def _interactions_title(pairs: pd.DataFrame) -> str:
    decided = pairs[pairs["verdict"].isin((Verdict.FASTER, Verdict.SLOWER))]
    if decided.empty:
        return interactions_title(0, len(pairs), None)
    most = largest(decided.assign(size=np.log(decided["estimate"]).abs()), "size")
    effect = Effect(most.term, most.estimate, most.lo, most.hi, most.verdict)
    return interactions_title(len(decided), len(pairs), effect)


def by_condition(run: Run) -> Plot | None:
    """Main effect of each switch under every workload and runtime of the run."""
    frames = [(condition, terms(run, condition, LATENCY, "main")) for condition in conditions(run)]
    frames = [(condition, control_findings.heard_effects(run, condition, effects)) for condition, effects in frames]
    frames = [(condition, effects.set_index("term")) for condition, effects in frames if len(effects)]
    names = factors(run)
    if len(frames) < 2:
        return None
    others = others_beside(run, pd.concat([effects for _, effects in frames]))
    title = _by_condition_title(run, frames, others)
    note = device(run) + each_switch_beside(others) * (others not in (AVERAGE, UNLIKE))
    noisy = any(control_findings.noise(run, condition) > 0 for condition, _ in frames)
    note += NOISE_NOT_COUNTED if noisy else ""
    figure = new_figure(title, note, 2.1 + len(names) * (0.25 + 0.17 * len(frames)))
    axes = figure.subplots()
    width = band(run)
    axes.axvspan(1 - width, 1 + width, color=RULE, alpha=0.7, linewidth=0)
    axes.axvline(1, color=MUTED, linewidth=0.9)
    step = 0.75 / len(frames)
    for place, (condition, effects) in enumerate(frames):
        shape, color = SERIES[place % len(SERIES)]
        there = [name for name in names if name in effects.index]
        offset = (place - (len(frames) - 1) / 2) * step
        heights = np.array([names.index(name) for name in there]) + offset
        _dots(axes, effects.loc[there], heights, shape, color)
        where = f"{condition}, {others_beside(run, effects)}" if others == UNLIKE else str(condition)
        handle = f"{_noisy(run, condition, where)} (n = {blocks_of(run, condition)})"
        axes.scatter([], [], marker=shape, s=34, color=color, label=handle)
    keep_in_view(axes, [1, *(estimate for _, effects in frames for estimate in effects["estimate"])])
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.45, -0.55)
    axes.grid(visible=False, axis="y")
    hollow = pd.concat([effects["verdict"] for _, effects in frames])
    axes.set_xlabel(effect_axis(level(run), width, [*hollow]))
    longest = max(len(str(text)) for text in axes.get_legend_handles_labels()[1])
    under = axes.transAxes + ScaledTranslation(0, -_UNDER_AXIS, figure.dpi_scale_trans)
    columns = 1 if longest > _COLUMN else 2
    axes.legend(loc="upper left", bbox_to_anchor=(0, 0), bbox_transform=under, ncols=columns, fontsize=8.5)
    return Plot("effects-by-condition", figure, title, by_condition_alt(title))


def _by_condition_title(run: Run, frames: list[tuple[Condition, pd.DataFrame]], others: str) -> str:
    """Which switches are faster under every condition, and which under some; noise tells neither."""
    if others == UNLIKE:
        return OTHERS_DIFFER.format(place="condition")
    told = [(condition, effects[effects["verdict"] != NoVerdict.NOISE]) for condition, effects in frames]
    count_told = sum(len(effects) for _, effects in told)
    if not count_told:
        return NOISY_EVERYWHERE
    helped = _helped_by(run)
    everywhere, in_places = _faster(told, [name for name in factors(run) if name not in helped])
    quiet = sum(len(effects) for _, effects in frames) == count_told
    return by_condition_title(everywhere, in_places, helped, others, quiet=quiet)


def _dots(axes: Axes, effects: pd.DataFrame, heights: NDArray[np.float64], shape: str, color: str) -> None:
    """Effects with their intervals, one at each height, hollow where they are undecided."""
    estimate, decided = effects["estimate"], effects["verdict"].isin((Verdict.FASTER, Verdict.SLOWER, Verdict.SAME))
    bars = np.clip([estimate - effects["lo"], effects["hi"] - estimate], 0, None)
    axes.errorbar(estimate, heights, xerr=bars, fmt="none", ecolor=color, capsize=2)
    faces = [color if each else PAPER for each in decided]
    axes.scatter(estimate, heights, marker=shape, s=34, facecolor=faces, edgecolor=color, zorder=3)


def _helped_by(run: Run) -> dict[str, str]:
    """The switches that help only with another one on, and that: their average says nothing of either."""
    pairs = (finding.detail for finding in joint(run))
    return {pair.small: pair.large for pair in pairs if isinstance(pair, Pair) and only_with(pair)}


def _faster(frames: list[tuple[Condition, pd.DataFrame]], names: list[str]) -> tuple[list[str], list[str]]:
    """Which switches are faster under all conditions, and which under some and not under others."""

    def verdicts(name: str) -> set[str]:
        return {str(effects.loc[name, "verdict"]) for _, effects in frames if name in effects.index}

    everywhere = [name for name in names if verdicts(name) == {Verdict.FASTER}]
    turns = [
        name
        for name in names
        if Verdict.FASTER in verdicts(name) and verdicts(name) & {Verdict.SAME, Verdict.SLOWER, NoVerdict.IDLE}
    ]
    return everywhere, turns
