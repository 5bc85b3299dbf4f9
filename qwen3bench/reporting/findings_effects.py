"""Findings on effects: all switches together, each one, pairs that interact, memory."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from qwen3bench.analysis.contrasts import others_of
from qwen3bench.analysis.effects import effects as effects_of
from qwen3bench.analysis.frames import analysis_setting
from qwen3bench.record.design import is_peer
from qwen3bench.record.states import Verdict
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
    device,
    factors,
    others_beside,
    rows,
    samples_of_usable,
    terms,
    usable,
)
from qwen3bench.reporting.tables import signed_bytes
from qwen3bench.reporting.units import is_number, listing, ratio, seconds, significant
from qwen3bench.reporting.wording import Finding, verdict_of, worth

if TYPE_CHECKING:
    from qwen3bench.analysis.run import Run

_MAX_PAIRS = 3  # interactions told of per condition; of more, the size alone
_MAX_FACTORS = 6  # up to here each half of a design is analyzed by itself in no time


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
    times = f", {seconds(good[BASELINE].latency_s)} → {seconds(row.latency_s)}"
    noisy = " Noisy." if control_findings.noise(run, condition) else ""
    yield Finding(f"{subject}: {said}{times} ({where}).{noisy}", "together")


def each_switch(run: Run) -> Iterator[Finding]:
    """What each switch is worth under every condition; where the cells tell it of none, that."""
    main = run.effects[(run.effects["metric"] == LATENCY) & (run.effects["kind"] == "main")]
    if len(main) and main["estimate"].isna().all():
        planned = [name for name in run.record.run.cells if not is_peer(name)]
        advice = "; design=full measures enough" if len(planned) < 2 ** len(factors(run)) else ""
        text = f"What a single switch is worth cannot be told from the cells measured{advice}."
        yield Finding(text, "undecided")
        return
    others = others_beside(main)
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
        if more := list(itertools.islice(_pairs(run, condition), _MAX_PAIRS, None)):
            said = listing([f"{row.term} {ratio(row.estimate, row.lo, row.hi)}" for row in more], len(more))
            yield Finding(f"Smaller joint effects: {said} ({condition}).", "interaction")


def pays_only_with(run: Run, condition: Condition) -> Iterator[tuple[str, str]]:
    """Switches that are faster with another on, and the same or slower with it off: `(mask, flash)`."""
    for row in itertools.islice(_pairs(run, condition), _MAX_PAIRS):
        if (halves := _halves(run, condition, *row.term.split(":"))) and _only_with(run, condition, halves):
            yield halves.small, halves.large


def _pairs(run: Run, condition: Condition) -> Iterator[Any]:
    """Interactions of two switches that are no noise, the largest first."""
    effects = terms(run, condition, LATENCY, "interaction")
    pairs = effects[(effects["term"].str.count(":") == 1) & effects["verdict"].isin((Verdict.FASTER, Verdict.SLOWER))]
    order = np.log(pairs["estimate"]).abs().sort_values(ascending=False, kind="stable").index
    for row in rows(pairs.loc[order]):
        if control_findings.heard(run, condition, row.verdict, row.estimate) == row.verdict:
            yield row


def _joint(run: Run, condition: Condition) -> Iterator[tuple[str, str]]:
    for row in itertools.islice(_pairs(run, condition), _MAX_PAIRS):
        a, b = row.term.split(":")
        much = "more" if row.verdict == Verdict.FASTER else "less"
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
    if len(factors(run)) > _MAX_FACTORS or not {a, b} <= set(main):
        return None
    small, large = sorted((a, b), key=lambda name: abs(math.log(main[name])))
    samples = samples_of_usable(run, condition)
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
    return verdicts[0] == Verdict.FASTER and verdicts[1] in (Verdict.SAME, Verdict.SLOWER)


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
        line.cell: line
        for line in run.evidence
        if line.workload == condition.workload and line.runtime == condition.runtime and line.cell in good
    }
    names = [BASELINE, a, b, "+".join(name for name in factors(run) if name in (a, b))]
    if any(name not in lines for name in names):
        return ""
    said = []
    for key, words in (("attention_backend", "attention backend"), ("kernel_launches", "kernel launches")):
        values = [getattr(lines[name], key) for name in names]
        if None not in values and len(set(values)) > 1:
            said.append(f"{words} " + ", ".join(f"{v} ({n})" for n, v in zip(names, values, strict=True)))
    notes = [(note, name) for name in names for note in lines[name].notes]
    counts = Counter(note for note, _ in notes)
    said += [f"{note} ({name})" for note, name in notes if counts[note] == 1]
    return f" What ran: {'; '.join(said)}." if said else ""


def memory(run: Run) -> Iterator[Finding]:
    """Which switches save peak memory, and whether that costs latency."""
    main = run.effects[(run.effects["metric"] == MEMORY) & (run.effects["kind"] == "main")]
    others = others_beside(main)
    tail = f", {others}" if others != UNLIKE and _several(run) else ""
    for name in factors(run):
        saved: dict[tuple[str, str], list[str]] = {}
        free = []
        for condition in conditions(run):
            less = [row for row in rows(terms(run, condition, MEMORY, "main")) if row.term == name]
            if less and less[0].verdict == Verdict.LESS:
                because = _because(less[0], others)
                saved.setdefault((signed_bytes(less[0].estimate), because), []).append(str(condition))
                latency = [row for row in rows(terms(run, condition, LATENCY, "main")) if row.term == name]
                if [control_findings.heard(run, condition, r.verdict, r.estimate) for r in latency] == [Verdict.SAME]:
                    free.append(str(condition))
        if saved:
            everywhere = len(free) == sum(map(len, saved.values()))
            costs = f"costs no latency beyond ±{100 * band(run):g} %"
            said = "; ".join(f"{amount} ({listing(names, 12)}{because})" for (amount, because), names in saved.items())
            text = f"{name} lowers peak memory{f' and {costs} there' if everywhere else ''}: {said}{tail}."
            partly = f" It {costs} in {listing(free, 12)}." if free and not everywhere else ""
            yield Finding(f"{text}{partly}", "memory")


def _worth(run: Run, condition: Condition, row: Any) -> str:
    verdict = control_findings.heard(run, condition, row.verdict, row.estimate)
    return worth(verdict, row.estimate, row.lo, row.hi, band(run))
