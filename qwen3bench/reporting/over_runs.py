"""Effects of several runs side by side: where a switch pays, where it does not, where its effect turns around."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import product
from typing import TYPE_CHECKING, Any

import pandas as pd

from qwen3bench.analysis.contrasts import others_of
from qwen3bench.record.states import Verdict
from qwen3bench.reporting.conditions import conditions
from qwen3bench.reporting.control_findings import heard_effects, noise
from qwen3bench.reporting.findings_cells import failures, missing
from qwen3bench.reporting.findings_effects import pays_only_with
from qwen3bench.reporting.lookup import AVERAGE, LATENCY, band, largest, level, rows, smallest, terms
from qwen3bench.reporting.tables import Entry, Table, drop_empty
from qwen3bench.reporting.units import count, listing, ratio
from qwen3bench.reporting.wording import Finding, NoVerdict

if TYPE_CHECKING:
    from qwen3bench.analysis.run import Run

_WHERE = ("model", "device", "dtype")  # part of a condition's name only where the runs differ in them


def effects_over(runs: Sequence[Run]) -> pd.DataFrame:
    """Main effects on latency of all runs, one row per run, workload, runtime and switch.

    Columns: run (from 1), model, device, dtype, workload, runtime, batch_size, prompt_tokens, blocks, processes, noisy,
    condition, others (what the other switches do, see `lookup.others_beside`), term, estimate, lo, hi, verdict.
    """
    lines: list[dict[str, Any]] = []
    for number, run in enumerate(runs, start=1):
        for condition in conditions(run):
            cell = rows(condition.select(run.cells))[0]
            same = {key: getattr(cell, key) for key in (*_WHERE, "batch_size", "prompt_tokens")}
            where = {"run": number, **same, "workload": condition.workload, "runtime": condition.runtime}
            timed = condition.select(run.samples)
            where |= {key: timed[of].nunique() for key, of in (("blocks", "block"), ("processes", "process"))}
            where |= {"noisy": noise(run, condition) > 0}
            for effect in rows(heard_effects(run, condition, terms(run, condition, LATENCY, "main"))):
                others = others_of(effect.reason) or AVERAGE
                named = str(condition) if others == AVERAGE else f"{condition}, {others}"
                where |= {"condition": named, "others": others}
                values = {key: getattr(effect, key) for key in ("term", "estimate", "lo", "hi", "verdict")}
                lines.append(where | values)
    frame = pd.DataFrame(lines)
    for key in _WHERE if lines else ():
        if frame[key].nunique(dropna=False) > 1:
            frame["differs"] = frame.get("differs", "") + ", " + frame[key].astype(str)
    if "differs" in frame:
        frame["condition"] = frame["condition"] + " (" + frame.pop("differs").str.removeprefix(", ") + ")"
    return frame


def limits(runs: Sequence[Run]) -> Iterator[Finding]:
    """What single runs lack: their end, cells that failed or were not measured, conditions without any effect, and a
    band or a confidence of their own."""
    told = listing([f"run {n}: ±{100 * band(run):g} %, {level(run)}" for n, run in enumerate(runs, start=1)], 12)
    if len({(band(run), level(run)) for run in runs}) > 1:
        text = f"Verdicts are by different bands and intervals ({told}); the page shows the first run's."
        yield Finding(text, "control", "warning")
    for number, run in enumerate(runs, start=1):
        for finding in (*missing(run), *failures(run)):
            yield replace(finding, text=f"Run {number}: {finding.text}")


def dependent(runs: Sequence[Run]) -> Iterator[Finding]:
    """Which switches pay only with another on, and where: what an average over the other hides."""
    places: dict[tuple[str, str], list[str]] = {}
    for number, run in enumerate(runs, start=1):
        for condition in conditions(run):
            for pair in pays_only_with(run, condition):
                places.setdefault(pair, []).append(f"{condition} (run {number})")
    for (small, large), found in places.items():
        text = f"{small} pays only with {large} at {listing(found, 12)}"
        yield Finding(f"{text}: there an average over both hides what it is worth.", "interaction")


def over_findings(effects: pd.DataFrame, names: Sequence[str], width: float) -> Iterator[Finding]:
    """Per switch, where it is faster, slower, the same or undecided, or no more than the noise of a noisy condition."""
    if effects.empty:
        yield Finding("No run holds an effect on latency that could be estimated.", "missing", "warning")
        return
    noisy = list(dict.fromkeys(effects.loc[effects["noisy"], "condition"]))
    if noisy:
        yield Finding(
            f"Noisy, where only effects larger than the noise count: {'; '.join(noisy)}.", "control", "warning"
        )
    unlike = {Verdict.SAME: f"the same within ±{100 * width:g} %", NoVerdict.NOISE: "no more than the noise"}
    for name, others in product(names, dict.fromkeys(effects["others"])):  # averages stand by themselves
        found = dict(iter(effects[(effects["term"] == name) & (effects["others"] == others)].groupby("verdict")))
        said = []
        for verdict in (Verdict.FASTER, Verdict.SLOWER, Verdict.UNDECIDED, Verdict.SAME, NoVerdict.NOISE):
            if verdict in found:
                words = unlike.get(verdict, verdict)
                how_much = f" ({_range(found[verdict])})" if verdict in (Verdict.FASTER, Verdict.SLOWER) else ""
                said.append(f"{words} in {len(found[verdict])}{how_much}")
        if not said:
            continue
        subject = name if others == AVERAGE else f"{name}, {others}"
        text = f"{subject}: of {count(sum(map(len, found.values())), 'condition')}, {', '.join(said)}."
        if {Verdict.FASTER, Verdict.SLOWER} <= set(found):
            text += f" Its effect changes sign: slower at {_places(found[Verdict.SLOWER])}."
        if Verdict.SAME in found and {Verdict.FASTER, Verdict.SLOWER} & set(found):
            text += f" On average the same at {_places(found[Verdict.SAME])}."
        if Verdict.UNDECIDED in found:
            text += f" Undecided at {_places(found[Verdict.UNDECIDED])}; more blocks and processes there would tell."
        yield Finding(text, "switch")


def _range(effects: pd.DataFrame) -> str:
    ends = smallest(effects, "estimate"), largest(effects, "estimate")
    said = [f"{ratio(row.estimate, row.lo, row.hi)} at {row.condition}" for row in ends]
    return said[0] if len(effects) == 1 else f"from {said[0]} to {said[1]}"


def _places(effects: pd.DataFrame) -> str:
    return listing(list(effects["condition"]), 4)


def over_table(effects: pd.DataFrame, names: Sequence[str]) -> Table:
    """One row per run and condition, one column per switch: its effect and verdict."""
    lines = []
    for _, group in effects.groupby(["run", "condition"], sort=False):
        first = rows(group)[0]
        found = {
            row.term: Entry(f"{ratio(row.estimate, row.lo, row.hi)} {row.verdict}", float(row.estimate))
            for row in rows(group)
        }
        opening = [Entry(str(first.run), float(first.run)), Entry(first.condition, first.condition)]
        opening += [Entry(f"{n:,}", float(n)) for n in (first.blocks, first.processes)]
        opening += [Entry("noisy" if first.noisy else "")]
        lines.append([*opening, *(found.get(name, Entry("")) for name in names)])
    return drop_empty(Table(["run", "condition", "blocks", "processes", "control", *names], lines))
