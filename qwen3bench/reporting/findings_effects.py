"""Findings on effects: all switches together, each one, pairs that interact, memory, what is undecided."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from scipy import special

from qwen3bench.analysis.contrasts import others_of
from qwen3bench.analysis.effects import effects as effects_of
from qwen3bench.analysis.effects import process_shares
from qwen3bench.analysis.frames import analysis_setting, block_matrix
from qwen3bench.record.design import is_peer
from qwen3bench.reporting import control_findings
from qwen3bench.reporting.conditions import Condition, conditions
from qwen3bench.reporting.lookup import (
    AVERAGE,
    BASELINE,
    LATENCY,
    MEMORY,
    UNLIKE,
    all_on,
    band,
    beside,
    device,
    factors,
    rows,
    skewed,
    terms,
    usable,
)
from qwen3bench.reporting.tables import signed_bytes
from qwen3bench.reporting.units import count, is_number, listing, ratio, seconds, significant
from qwen3bench.reporting.wording import Finding, verdict_of, worth

if TYPE_CHECKING:
    from qwen3bench.analysis.run import Run

_MOST_PAIRS = 3  # interactions told of per condition; of more, the size alone
_MOST_FACTORS = 6  # up to here each half of a design is analysed by itself in no time


def together(run: Run, condition: Condition) -> Iterator[Finding]:
    """What all switches give together, or what the baseline alone takes."""
    good = {row.cell: row for row in rows(usable(condition.select(run.cells)))}
    where = f"{condition} on {device(run)}"
    if all_on(run) not in good:
        return
    row = good[all_on(run)]
    if row.cell == BASELINE:
        interval = f" [{seconds(row.latency_lo_s)}, {seconds(row.latency_hi_s)}]" if is_number(row.latency_lo_s) else ""
        rate = f", {significant(row.tokens_per_s)} tokens/s" if is_number(row.tokens_per_s) else ""
        yield Finding(f"The baseline takes {seconds(row.latency_s)}{interval}{rate} ({where}).", "together")
        return
    subject = f"All {len(factors(run))} switches together" if len(factors(run)) > 1 else f"{row.cell} on"
    if BASELINE not in good:
        without = f"{seconds(row.latency_s)}, and the baseline has no latency to compare with"
        yield Finding(f"{subject}: {without} ({where}).", "together")
        return
    verdict = control_findings.heard(run, condition, verdict_of(row.speedup_lo, row.speedup_hi, band(run)), row.speedup)
    said = worth(verdict, row.speedup, row.speedup_lo, row.speedup_hi, band(run))
    times = _times(run, good[BASELINE].latency_s, row)
    noisy = " Noisy." if control_findings.noise(run, condition) else ""
    yield Finding(f"{subject}: {said}{times} ({where}).{noisy}", "together")


def _times(run: Run, baseline_s: float, row: Any) -> str:
    """From the baseline's median to a cell's, and a word where that is not the speed-up beside it."""
    times = f", {seconds(baseline_s)} → {seconds(row.latency_s)}"
    if is_number(row.speedup) and skewed(run, row.speedup, baseline_s, row.latency_s):
        return f"{times} by medians, {ratio(baseline_s / row.latency_s)}, as latencies are spread unevenly"
    return times


def switches(run: Run) -> Iterator[Finding]:
    """What each switch is worth under every condition; where the cells tell it of none, that."""
    main = run.effects[(run.effects["metric"] == LATENCY) & (run.effects["kind"] == "main")]
    if len(main) and main["estimate"].isna().all():
        planned = [name for name in run.record.run["cells"] if not is_peer(name)]
        advice = "; design=full measures enough" if len(planned) < 2 ** len(factors(run)) else ""
        text = f"What a single switch is worth cannot be told from the cells measured{advice}."
        yield Finding(text, "undecided")
        return
    others = beside(main)
    for name in factors(run):
        yield from _switch(run, name, main[main["term"] == name], others)


def _switch(run: Run, name: str, effects: pd.DataFrame, others: str) -> Iterator[Finding]:
    parts = []
    for condition in conditions(run):
        noisy = ", noisy" if control_findings.noise(run, condition) else ""
        for row in rows(condition.select(effects)):
            because = _because(row, others)
            if is_number(row.estimate):
                parts.append(f"{_worth(run, condition, row)} ({condition}{noisy}{because})")
            else:
                parts.append(f"not known ({condition}{because})")
    if parts:
        kind = "switch" if others == AVERAGE else f"switch {others}"
        yield Finding(f"{name}: {'; '.join(parts)}.", kind if _several(run) else "only switch")


def _several(run: Run) -> bool:
    return len(factors(run)) > 1  # of one switch alone nothing is averaged


def _because(row: Any, others: str) -> str:
    """The reason of an effect, without what the heading says of the others; where they differ, what they do."""
    where = others_of(row.reason)
    rest = row.reason.removeprefix(where).removeprefix("; ")
    if others == UNLIKE and is_number(row.estimate):
        rest = "; ".join(filter(None, (where or AVERAGE, rest)))
    return f": {rest}" if rest else ""


def joint(run: Run) -> Iterator[Finding]:
    """Which pairs of switches interact, what one is worth without the other, and what ran differently."""
    told: dict[tuple[str, str], Condition] = {}
    for condition in conditions(run):
        for term, text in _joint(run, condition):
            ran = _evidence(run, condition, *term.split(":"))
            before = told.setdefault((term, ran), condition)
            ran = f" What ran: as in {before}." if ran and before != condition else ran
            noisy = " Noisy." if control_findings.noise(run, condition) else ""
            yield Finding(f"{text}{ran}{noisy}", "interaction")
        if more := list(itertools.islice(_pairs(run, condition), _MOST_PAIRS, None)):
            said = listing([f"{row.term} {ratio(row.estimate, row.lo, row.hi)}" for row in more], len(more))
            yield Finding(f"Smaller joint effects: {said} ({condition}).", "interaction")


def pays_only_with(run: Run, condition: Condition) -> Iterator[tuple[str, str]]:
    """Switches that are faster with another on, and the same or slower with it off: `(mask, flash)`."""
    for row in itertools.islice(_pairs(run, condition), _MOST_PAIRS):
        if (halves := _halves(run, condition, *row.term.split(":"))) and _only_with(run, condition, halves):
            yield halves.small, halves.large


def _pairs(run: Run, condition: Condition) -> Iterator[Any]:
    """Interactions of two switches that are no noise, the largest first."""
    effects = terms(run, condition, LATENCY, "interaction")
    pairs = effects[(effects["term"].str.count(":") == 1) & effects["verdict"].isin(("faster", "slower"))]
    order = np.log(pairs["estimate"]).abs().sort_values(ascending=False, kind="stable").index
    for row in rows(pairs.loc[order]):
        if control_findings.heard(run, condition, row.verdict, row.estimate) == row.verdict:
            yield row


def _joint(run: Run, condition: Condition) -> Iterator[tuple[str, str]]:
    for row in itertools.islice(_pairs(run, condition), _MOST_PAIRS):
        a, b = row.term.split(":")
        much = "more" if row.verdict == "faster" else "less"
        joint_effect = f"joint effect {ratio(row.estimate, row.lo, row.hi)}"
        said = f"{a} and {b}: each is worth {much} with the other on, {joint_effect} ({condition})."
        yield row.term, f"{said}{_with_and_without(run, condition, a, b)}"


@dataclass(frozen=True)
class _Halves:
    """Effects of the switch of a pair that is worth less, with the other on and off."""

    small: str
    large: str
    with_it: Any
    without: Any


def _halves(run: Run, condition: Condition, a: str, b: str) -> _Halves | None:
    """Each from its half of the cells; None where a half cannot tell."""
    main = {row.term: row.estimate for row in rows(terms(run, condition, LATENCY, "main"))}
    if len(factors(run)) > _MOST_FACTORS or not {a, b} <= set(main):
        return None
    small, large = sorted((a, b), key=lambda name: abs(math.log(main[name])))
    samples = _samples(run, condition)
    others = [name for name in factors(run) if name != large]
    found = []
    for level in (1, 0):
        half = effects_of(
            samples[samples[large] == level],
            others,
            block="block",
            band=band(run),
            confidence=analysis_setting(run.record, "confidence"),
        )
        found += rows(half[(half["term"] == small) & (half["kind"] == "main") & half["estimate"].notna()])
    if len(found) < 2 or any(others_of(row.reason) for row in found):  # a half that lacks cells tells no average
        return None
    return _Halves(small, large, *found)


def _only_with(run: Run, condition: Condition, halves: _Halves) -> bool:
    both = (halves.with_it, halves.without)
    verdicts = [control_findings.heard(run, condition, row.verdict, row.estimate) for row in both]
    return verdicts[0] == "faster" and verdicts[1] in ("same", "slower")


def _with_and_without(run: Run, condition: Condition, a: str, b: str) -> str:
    """What the smaller switch of a pair is worth with the other on and off."""
    if not (halves := _halves(run, condition, a, b)):
        return ""
    with_it, without = (_worth(run, condition, row) for row in (halves.with_it, halves.without))
    if _only_with(run, condition, halves):
        return f" {halves.small} pays only with {halves.large}: with it {with_it}; without it {without}."
    return f" {halves.small} with {halves.large}: {with_it}; without: {without}."


def _evidence(run: Run, condition: Condition, a: str, b: str) -> str:
    """What ran in the four cells of a pair, where it differs."""
    good = set(usable(condition.select(run.cells))["cell"])
    lines = {
        line["cell"]: line
        for line in run.evidence
        if line["workload"] == condition.workload and line["runtime"] == condition.runtime and line["cell"] in good
    }
    names = [BASELINE, a, b, "+".join(name for name in factors(run) if name in (a, b))]
    if any(name not in lines for name in names):
        return ""
    said = []
    for key, words in (("attention_backend", "attention backend"), ("kernel_launches", "kernel launches")):
        values = [lines[name].get(key) for name in names]
        if None not in values and len(set(values)) > 1:
            said.append(f"{words} " + ", ".join(f"{v} ({n})" for n, v in zip(names, values, strict=True)))
    notes = [(note, name) for name in names for note in lines[name].get("notes") or []]
    counts = Counter(note for note, _ in notes)
    said += [f"{note} ({name})" for note, name in notes if counts[note] == 1]
    return f" What ran: {'; '.join(said)}." if said else ""


def memory(run: Run) -> Iterator[Finding]:
    """Which switches save peak memory, and whether that costs latency."""
    main = run.effects[(run.effects["metric"] == MEMORY) & (run.effects["kind"] == "main")]
    others = beside(main)
    tail = f", {others}" if others != UNLIKE and _several(run) else ""
    for name in factors(run):
        saved: dict[tuple[str, str], list[str]] = {}
        free = []
        for condition in conditions(run):
            less = [row for row in rows(terms(run, condition, MEMORY, "main")) if row.term == name]
            if less and less[0].verdict == "less":
                because = _because(less[0], others)
                saved.setdefault((signed_bytes(less[0].estimate), because), []).append(str(condition))
                latency = [row for row in rows(terms(run, condition, LATENCY, "main")) if row.term == name]
                if [control_findings.heard(run, condition, r.verdict, r.estimate) for r in latency] == ["same"]:
                    free.append(str(condition))
        if saved:
            everywhere = len(free) == sum(map(len, saved.values()))
            costs = f"costs no latency beyond ±{100 * band(run):g} %"
            said = "; ".join(f"{amount} ({listing(names, 12)}{because})" for (amount, because), names in saved.items())
            text = f"{name} lowers peak memory{f' and {costs} there' if everywhere else ''}: {said}{tail}."
            partly = f" It {costs} in {listing(free, 12)}." if free and not everywhere else ""
            yield Finding(f"{text}{partly}", "memory")


def undecided(run: Run, condition: Condition) -> Iterator[Finding]:
    """What has no verdict, and what would give one: switches, or all together where none can be told, and pairs."""
    main = _with_shares(run, condition, terms(run, condition, LATENCY, "main")) or _together_alone(run, condition)
    joint_effects = terms(run, condition, LATENCY, "interaction")
    pairs = _with_shares(run, condition, joint_effects[joint_effects["term"].str.count(":") == 1])
    yield from _undecided(run, condition, main)
    yield from _undecided(run, condition, pairs, "Interactions: ")


def _undecided(run: Run, condition: Condition, effects: list[Any], what: str = "") -> Iterator[Finding]:
    blocks = condition.select(run.samples)["block"].nunique()
    unknown = [
        row for row in effects if control_findings.heard(run, condition, row.verdict, row.estimate) == "undecided"
    ]
    around = [row for row in unknown if is_number(row.lo) and row.lo <= 1 <= row.hi]
    blind = [row for row in unknown if not is_number(row.lo)]
    beside = [row for row in unknown if row not in around and row not in blind]
    if around:
        advice = _would_decide(run, condition, around)
        yield Finding(f"{what}{_listed(around)} ({condition}). If the estimates stay, {advice}.", "undecided")
    if blind:
        text = f"{what}{_listed(blind)} ({condition}): {count(blocks, 'block')} gives no interval; more would."
        yield Finding(text, "undecided")
    if beside:
        advice = "the interval leaves out 1, but p, corrected for the number of terms, is not below 0.05"
        text = f"{what}{_listed(beside)} ({condition}): {advice}. More processes would decide."
        yield Finding(text, "undecided")


def _listed(effects: list[Any]) -> str:
    return listing([f"{row.term} {ratio(row.estimate, row.lo, row.hi)}" for row in effects])


def _together_alone(run: Run, condition: Condition) -> list[Any]:
    """The speed-up of all switches as an effect with its verdict."""
    good = {row.cell: row for row in rows(usable(condition.select(run.cells))) if is_number(row.speedup)}
    row = good.get(all_on(run))
    if row is None or row.cell == BASELINE:
        return []
    verdict = verdict_of(row.speedup_lo, row.speedup_hi, band(run)).replace("missing", "undecided")
    found = {"estimate": row.speedup, "lo": row.speedup_lo, "hi": row.speedup_hi, "verdict": verdict}
    error = block_matrix(condition.select(run.samples), list(good)).log_ratios(BASELINE, [row.cell])
    found |= {"df": float(error.df[0]), "process_share": float(error.process_share[0])}
    return [SimpleNamespace(term=row.cell, **found)]


def _with_shares(run: Run, condition: Condition, effects: pd.DataFrame) -> list[Any]:
    """The effects as rows, each with `process_share` where one of them is undecided."""
    if not (effects["verdict"] == "undecided").any():
        return rows(effects)
    shares = process_shares(_samples(run, condition), factors(run))
    return rows(effects.assign(process_share=effects["term"].map(shares)))


def _would_decide(run: Run, condition: Condition, effects: list[Any]) -> str:
    """How many blocks give each of these effects a verdict, or processes where these limit any of the intervals.

    Processes limit where what they make of the variance is more than half of what a verdict allows.
    """
    samples = condition.select(run.samples)
    blocks, processes = samples["block"].nunique(), samples["process"].nunique()
    allowed = [(_allowed(run, condition, row, row.df), row.process_share) for row in effects]
    if any(share > part / 2 for part, share in allowed):
        needed = max(_processes_needed(run, condition, row, processes) for row in effects)
        said = f"about {needed:,} processes instead of {processes} would decide"
        return f"{said}; more blocks in the same ones do not lessen what differs between processes"
    needed = max(math.ceil(blocks * (1 - share) / (part - share)) + 1 for part, share in allowed)
    return f"about {needed:,} blocks instead of {blocks} would decide"


def _allowed(run: Run, condition: Condition, row: Any, df: float) -> float:
    """The error's variance with which an effect has a verdict at these degrees of freedom, over the present one.

    Its interval then lies inside the band, or leaves 1 by Holm's p too, in the hardest case: 5 % over the number of
    terms.
    """
    tested = condition.select(run.effects)
    tested = tested[(tested["metric"] == LATENCY) & (tested["kind"] != "shapley") & tested["p"].notna()]
    level = (1 + analysis_setting(run.record, "confidence")) / 2
    usual, strict = special.stdtrit(df, [level, max(level, 1 - 0.025 / max(1, len(tested)))])
    distance, se = abs(math.log(row.estimate)), math.log(row.hi / row.lo) / 2 / special.stdtrit(row.df, level)
    return float((max(distance / strict, (band(run) - distance) / usual) / se) ** 2)


def _processes_needed(run: Run, condition: Condition, row: Any, processes: int) -> int:
    """Processes of as many blocks each with which an effect has a verdict; each gives a degree of freedom more."""
    least = processes / _allowed(run, condition, row, math.inf)
    more = itertools.count(max(processes + 1, math.floor(least)))
    return next(n for n in more if processes / n <= _allowed(run, condition, row, row.df + n - processes))


def _samples(run: Run, condition: Condition) -> pd.DataFrame:
    """Of the cells that count."""
    samples = condition.select(run.samples)
    return samples[samples["cell"].isin(usable(condition.select(run.cells))["cell"])]


def _worth(run: Run, condition: Condition, row: Any) -> str:
    verdict = control_findings.heard(run, condition, row.verdict, row.estimate)
    return worth(verdict, row.estimate, row.lo, row.hi, band(run))
