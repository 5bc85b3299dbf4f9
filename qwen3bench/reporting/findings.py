"""Findings: sentences made from the analysis, each with its interval and the condition it holds for.

A sentence says what a verdict supports and no more: `same` is said only of an interval inside the band, `faster` and
`slower` only of those verdicts, everything else is named undecided or missing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pandas as pd

from qwen3bench.reporting import controls
from qwen3bench.reporting.conditions import BASELINE, Condition, all_on, conditions, device, factors, usable
from qwen3bench.reporting.plot_effects import LATENCY, MEMORY, band, terms
from qwen3bench.reporting.tables import signed_bytes
from qwen3bench.reporting.units import count, is_number, listing, ratio, seconds, significant, size

if TYPE_CHECKING:
    from qwen3bench.analysis.run import Run

_MOST_PAIRS = 3  # interactions named per condition


@dataclass(frozen=True)
class Finding:
    """One sentence of a report.

    `kind` groups it: together, switch, interaction, memory, recommended, undecided, control, failure, missing. `level`
    is `warning` where it limits what the others are worth, else `plain`.
    """

    text: str
    kind: str
    level: str = "plain"


def findings(run: Run) -> list[Finding]:
    """All findings of a run, warnings about the whole run first."""
    if run.cells.empty:
        return [*missing(run), *failures(run)]
    found = [*missing(run), *controls_findings(run, warnings=True), *failures(run)]
    for condition in conditions(run):
        found += together(run, condition)
    for name in factors(run):
        found += switch(run, name)
    for condition in conditions(run):
        found += joint(run, condition)
    found += free_memory(run)
    for condition in conditions(run):
        found += recommended(run, condition)
    for condition in conditions(run):
        found += undecided(run, condition)
    return [*found, *controls_findings(run, warnings=False)]


_HEADINGS = {
    "together": "All together",
    "switch": "Each switch, on average over the others",
    "interaction": "Switches that interact",
    "memory": "Memory",
    "recommended": "Recommended",
    "undecided": "Undecided",
    "control": "Controls",
}


def grouped(found: list[Finding]) -> list[tuple[str, list[Finding]]]:
    """Findings under their headings, in the order in which they are read."""
    groups = ((heading, [finding for finding in found if finding.kind == kind]) for kind, heading in _HEADINGS.items())
    return [(heading, group) for heading, group in groups if group]


def verdict_of(lo: object, hi: object, width: float) -> str:
    """Verdict on a cell's speed-up from its interval: same inside 1 ± width, faster above 1, slower below 1."""
    if not (is_number(lo) and is_number(hi)):
        return "missing"
    if 1 - width <= lo and hi <= 1 + width:  # type: ignore[operator]
        return "same"
    return "faster" if lo > 1 else "slower" if hi < 1 else "undecided"  # type: ignore[operator]


def worth(verdict: object, estimate: float, lo: float, hi: float, width: float) -> str:
    """What a switch or cell is worth in latency, in the words that its verdict supports."""
    interval = ratio(estimate, lo, hi)
    words = {
        "faster": f"{interval} faster",
        "slower": f"slower, {interval}",
        "same": f"the same within ±{100 * width:g} %, {interval}",
        "undecided": f"undecided, {interval}",
    }
    return words.get(str(verdict), "not measured")


def together(run: Run, condition: Condition) -> Iterator[Finding]:
    """What all switches give together, or what the baseline alone takes."""
    cells = condition.select(run.cells).drop_duplicates("cell").set_index("cell")
    name, where = all_on(run), f"{condition} on {device(run)}"
    if name == BASELINE:
        good = usable(cells)
        if BASELINE in good.index:
            base = good.loc[BASELINE]
            interval = (
                f" [{seconds(base.latency_lo_s)}, {seconds(base.latency_hi_s)}]" if is_number(base.latency_lo_s) else ""
            )
            text = f"The baseline takes {seconds(base.latency_s)}{interval}, {significant(base.tokens_per_s)} tokens/s ({where})."
            yield Finding(text, "together")
        return
    if name not in cells.index:
        return
    row = cells.loc[name]
    if row.status == "ok" and is_number(row.speedup):
        verdict = verdict_of(row.speedup_lo, row.speedup_hi, band(run))
        said = f"{ratio(row.speedup)} without an interval" if verdict == "missing" else worth(verdict, row.speedup, row.speedup_lo, row.speedup_hi, band(run))
        subject = f"All {len(factors(run))} switches together" if len(factors(run)) > 1 else f"{name} on"
        times = ""
        if BASELINE in cells.index and is_number(cells.loc[BASELINE].latency_s):
            times = f", {seconds(cells.loc[BASELINE].latency_s)} → {seconds(row.latency_s)}"
        yield Finding(f"{subject}: {said}{times} ({where}).{controls.caveat(run, condition)}", "together")


def switch(run: Run, name: str) -> Iterator[Finding]:
    """What one switch is worth on average over the others, under every condition."""
    parts = []
    for condition in conditions(run):
        chosen = condition.select(run.effects) if len(run.effects) else run.effects
        if chosen.empty:
            continue
        effect = chosen[(chosen["metric"] == LATENCY) & (chosen["kind"] == "main") & (chosen["term"] == name)]
        for row in effect.itertuples():
            if is_number(row.estimate):
                noisy = ", noisy" if controls.caveat(run, condition) else ""
                parts.append(f"{worth(row.verdict, row.estimate, row.lo, row.hi, band(run))} ({condition}{noisy})")
            else:
                reason = getattr(row, "reason", None)
                parts.append(f"cannot be told apart{f': {reason}' if isinstance(reason, str) else ''} ({condition})")
    if parts:
        yield Finding(f"{name}: {'; '.join(parts)}.", "switch")


def joint(run: Run, condition: Condition) -> Iterator[Finding]:
    """Which pairs of switches interact, and what of what ran differs with them."""
    effects = terms(run, condition, LATENCY, "interaction")
    if effects.empty:
        return
    pairs = effects[(effects["term"].str.count(":") == 1) & effects["verdict"].isin(("faster", "slower"))]
    order = pairs["estimate"].map(lambda value: abs(math.log(value))).sort_values(ascending=False, kind="stable").index
    for row in pairs.loc[order[:_MOST_PAIRS]].itertuples():
        a, b = row.term.split(":")
        manner = "give more together than each alone" if row.verdict == "faster" else "take from each other"
        text = f"{a} and {b} {manner}: joint effect {ratio(row.estimate, row.lo, row.hi)} ({condition})."
        yield Finding(f"{text}{_evidence(run, condition, a, b)}{controls.caveat(run, condition)}", "interaction")


def _evidence(run: Run, condition: Condition, a: str, b: str) -> str:
    """What ran in the four cells of a pair, where it differs."""
    lines = {
        line["cell"]: line
        for line in run.record.of("evidence")
        if line["workload"] == condition.workload and line["runtime"] == condition.runtime
    }
    names = [BASELINE, a, b, "+".join(name for name in factors(run) if name in (a, b))]
    if any(name not in lines for name in names):
        return ""
    said = []
    for key, words in (("attention_backend", "attention backend"), ("kernel_launches", "kernel launches")):
        values = [lines[name].get(key) for name in names]
        if None not in values and len(set(values)) > 1:
            said.append(f"{words} " + ", ".join(f"{v} ({n})" for n, v in zip(names, values, strict=True)))
    return f" What ran: {'; '.join(said)}." if said else ""


def free_memory(run: Run) -> Iterator[Finding]:
    """Which switches save memory, and whether that costs latency."""
    for name in factors(run):
        for condition in conditions(run):
            saved = terms(run, condition, MEMORY, "main")
            saved = saved[(saved["term"] == name) & (saved["verdict"] == "less")] if len(saved) else saved
            if saved.empty:
                continue
            effect = terms(run, condition, LATENCY, "main")
            effect = effect[effect["term"] == name] if len(effect) else effect
            saving = signed_bytes(saved.iloc[0].estimate)
            if effect.empty:
                cost = "what it does to latency was not measured"
            else:
                row = effect.iloc[0]
                said = worth(row.verdict, row.estimate, row.lo, row.hi, band(run))
                cost = f"costs nothing: latency {said}" if row.verdict == "same" else f"latency {said}"
            yield Finding(f"{name} changes peak memory by {saving} on average; {cost} ({condition}).", "memory")


def recommended(run: Run, condition: Condition) -> Iterator[Finding]:
    """The cell to switch on, under the memory limit where one is set."""
    limit_gib = run.config.get("report", {}).get("memory_limit_gib")
    cells = usable(condition.select(run.cells))
    cells = cells[~cells["cell"].str.startswith("transformers")]
    if len(cells) < 2:
        return
    if caveat := controls.caveat(run, condition):
        yield Finding(f"No cell is recommended for {condition}:{caveat}", "recommended", "warning")
        return
    within = ""
    if limit_gib is not None:
        within = f" within {limit_gib:g} GiB"
        measured = cells.dropna(subset=["peak_allocated_bytes"])
        if measured.empty:
            yield Finding(f"The memory limit of {limit_gib:g} GiB cannot be applied: peak memory was not measured ({condition}).", "recommended", "warning")
            return
        cells = measured[measured["peak_allocated_bytes"] <= limit_gib * 2**30]
        if cells.empty:
            least = measured.loc[measured["peak_allocated_bytes"].idxmin()]
            yield Finding(f"No cell fits{within}: the smallest, {least.cell}, needs {size(least.peak_allocated_bytes)} ({condition}).", "recommended", "warning")
            return
    faster = cells[[verdict_of(r.speedup_lo, r.speedup_hi, band(run)) == "faster" for r in cells.itertuples()]]
    if faster.empty:
        yield Finding(f"No cell{within} is shown to be faster than the baseline ({condition}).", "recommended")
        return
    best = faster.loc[faster["speedup"].idxmax()]
    alike = faster[faster["speedup_hi"] >= best.speedup_lo]
    alike = alike.assign(switches=[0 if c == BASELINE else c.count("+") + 1 for c in alike["cell"]])
    pick = alike.sort_values(["peak_allocated_bytes", "switches"], kind="stable", na_position="last").iloc[0]
    memory = f", peak memory {size(pick.peak_allocated_bytes)}" if is_number(pick.peak_allocated_bytes) else ""
    text = f"Recommended{within}: {pick.cell}, {ratio(pick.speedup, pick.speedup_lo, pick.speedup_hi)} faster than the baseline{memory} ({condition})."
    if len(alike) > 1:
        text += f" {count(len(alike), 'cell')} cannot be told apart in latency; of them it needs the least memory, then the fewest switches."
    yield Finding(text, "recommended")


def undecided(run: Run, condition: Condition) -> Iterator[Finding]:
    """Main effects without a verdict, and how many blocks would give one."""
    effects = terms(run, condition, LATENCY, "main")
    effects = effects[effects["verdict"] == "undecided"] if len(effects) else effects
    if effects.empty:
        return
    blocks = condition.select(run.samples)["block"].nunique()
    said, factor = [], 1.0
    for row in effects.itertuples():
        said.append(f"{row.term} {ratio(row.estimate, row.lo, row.hi)}")
        distance, half = abs(math.log(row.estimate)), math.log(row.hi / row.lo) / 2
        factor = max(factor, (half / max(distance, band(run) - distance)) ** 2)
    needed = math.ceil(blocks * factor) + 1
    text = f"Undecided: {listing(said)} ({condition}). If the estimates stay, about {needed} blocks instead of {blocks} would decide."
    yield Finding(text, "undecided")


def failures(run: Run) -> Iterator[Finding]:
    """Cells that got no number, by status, each with its first reason."""
    bad = run.cells[run.cells["status"].notna() & (run.cells["status"] != "ok")] if len(run.cells) else run.cells
    if bad.empty:
        return
    for status, rows in bad.groupby("status", sort=False):
        names = list(dict.fromkeys(rows["cell"]))
        reasons = [reason for reason in rows["reason"] if isinstance(reason, str) and reason]
        because = f": {reasons[0].splitlines()[0]}" if reasons else ""
        word = "has" if len(names) == 1 else "have"
        yield Finding(f"{listing(names)} {word} status {status} and no speed-up{because}", "failure", "warning")


def missing(run: Run) -> Iterator[Finding]:
    """What the run does not hold: it did not finish, cells without a latency, damaged lines of the record."""
    ends = run.record.of("end")
    if not ends or ends[-1].get("status") != "finished":
        state = "was interrupted" if ends else "has not finished"
        yield Finding(f"This run {state}: what is here is what was measured until then.", "missing", "warning")
    planned = {(w, r) for w in run.record.run["workloads"] for r in run.record.run["runtimes"]}
    there = {(c.workload, c.runtime) for c in conditions(run) if len(usable(c.select(run.cells)))}
    if planned - there:
        names = sorted(f"{workload}, {runtime}" for workload, runtime in planned - there)
        yield Finding(f"Without any latency: {listing(names)}.", "missing", "warning")
    for condition in conditions(run):
        cells = condition.select(run.cells)
        lost = cells[(cells["status"].isna() | (cells["status"] == "ok")) & cells["latency_s"].isna()]
        if len(lost) and (condition.workload, condition.runtime) in there:
            text = f"{count(len(lost), 'cell')} of {len(cells)} without a latency: {listing(list(lost['cell']))} ({condition})."
            yield Finding(text, "missing", "warning")
    if run.record.warnings:
        yield Finding(f"The record has damage: {'; '.join(run.record.warnings[:3])}.", "missing", "warning")


def controls_findings(run: Run, warnings: bool) -> Iterator[Finding]:
    """Sentences of the controls: those that warn, or those that assure."""
    for control in controls.sentences(run):
        if control.failed == warnings:
            yield Finding(control.text, "control", "warning" if control.failed else "plain")
