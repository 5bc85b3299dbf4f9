"""Findings on effects: all switches together, each one, pairs that interact, memory."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from qwen3bench.analysis.contrasts import others_of
from qwen3bench.analysis.effects import effects as effects_of
from qwen3bench.analysis.frames import analysis_setting
from qwen3bench.record.design import is_peer
from qwen3bench.record.states import Verdict
from qwen3bench.reporting import control_findings
from qwen3bench.reporting.advice import all_cells
from qwen3bench.reporting.conditions import Condition, conditions
from qwen3bench.reporting.finding import Beside, Detail, Effect, Finding, Kind, LogitsAtPeak, Pair, Saving, verdict_of
from qwen3bench.reporting.findings_cells import times_of
from qwen3bench.reporting.lookup import (
    BASELINE,
    LATENCY,
    MEMORY,
    all_on,
    band,
    factors,
    of_peers,
    others_meanwhile,
    rows,
    samples_of_usable,
    terms,
    usable,
)
from qwen3bench.reporting.units import is_number, listing

if TYPE_CHECKING:
    from qwen3bench.analysis.run import Run

_MAX_PAIRS = 3  # interactions told of per condition; of more, the size alone
_MOST, _ALIKE = 0.8, 1e-3  # of the logits in what is held at the peak (0.84 at 8 × 128 tokens, 0.91 at 1 × 2048)
_MAX_FACTORS = 6  # up to here each half of a design is analyzed by itself in no time


def together(run: Run, condition: Condition) -> Iterator[Finding]:
    """What all switches give together, or what the baseline alone takes."""
    good = {row.cell: row for row in rows(usable(condition.select(run.cells)))}
    if all_on(run) not in good:
        return
    row = good[all_on(run)]
    alone = row.cell == BASELINE
    verdict = verdict_of(row.speedup_lo, row.speedup_hi, band(run))
    yield Finding(
        Kind.TOGETHER,
        row.cell,
        str(condition),
        row.speedup,
        row.speedup_lo,
        row.speedup_hi,
        "" if alone else control_findings.heard(run, condition, verdict, row.speedup),
        times_of(row, None if alone else good.get(BASELINE)),
        width=band(run),
        noisy=_noisy(run, condition) and not alone,
    )


def _noisy(run: Run, condition: Condition) -> bool:
    return control_findings.noise(run, condition) > 0


def each_switch(run: Run) -> Iterator[Finding]:
    """What each switch is worth under every condition; where the cells tell it of none, that."""
    main = run.effects[(run.effects["metric"] == LATENCY) & (run.effects["kind"] == "main")]
    if len(main) and main["estimate"].isna().all():
        planned = [name for name in run.record.run.cells if not is_peer(name)]
        advice = all_cells(run, len(planned)) if len(planned) < 2 ** len(factors(run)) else None
        yield Finding(Kind.UNTOLD, advice=advice)
        return
    for name in factors(run):
        for condition in conditions(run):
            for row in rows(condition.select(main[main["term"] == name])):
                others = others_meanwhile(run, row.reason)
                beside = Beside(others, row.reason.removeprefix(others).removeprefix("; "))
                yield _effect(run, condition, Kind.SWITCH, row, beside)


def _effect(run: Run, condition: Condition, kind: Kind, row: Any, detail: Detail) -> Finding:
    return Finding(
        kind,
        row.term,
        str(condition),
        row.estimate,
        row.lo,
        row.hi,
        control_findings.heard_effect(run, condition, row),
        detail,
        width=band(run),
        noisy=_noisy(run, condition),
    )


@lru_cache(maxsize=8)  # findings, plots and the terminal ask, and halves are analyses of their own
def joint(run: Run) -> tuple[Finding, ...]:
    """Which pairs of switches interact, the largest of each condition, and what one is worth without the other."""
    return tuple(
        _effect(run, condition, Kind.INTERACTION, row, halves(run, condition, *row.term.split(":")))
        for condition in conditions(run)
        for row in itertools.islice(_pairs(run, condition), _MAX_PAIRS)
    )


def _pairs(run: Run, condition: Condition) -> Iterator[Any]:
    """Interactions of two switches that are decided and no noise, the largest first."""
    effects = terms(run, condition, LATENCY, "interaction")
    pairs = effects[(effects["term"].str.count(":") == 1) & effects["verdict"].isin((Verdict.FASTER, Verdict.SLOWER))]
    order = np.log(pairs["estimate"]).abs().sort_values(ascending=False, kind="stable").index
    for row in rows(pairs.loc[order]):
        if control_findings.heard(run, condition, row.verdict, row.estimate) == row.verdict:
            yield row


def halves(run: Run, condition: Condition, a: str, b: str) -> Pair | None:
    """Of a pair the switch that is worth less, with the other on and off; None where a half cannot tell."""
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
    with_it, without = (_heard(run, condition, row) for row in found)
    return Pair(small, large, with_it, without)


def _heard(run: Run, condition: Condition, row: Any) -> Effect:
    verdict = control_findings.heard(run, condition, row.verdict, row.estimate)
    return Effect(row.term, row.estimate, row.lo, row.hi, verdict)


def memory(run: Run) -> Iterator[Finding]:
    """Which switches save peak memory, whether that costs latency, and where the logits hide what others save."""
    for name in factors(run):
        alike: dict[Saving, list[str]] = {}
        for condition in conditions(run):
            for row in rows(terms(run, condition, MEMORY, "main")):
                if row.term == name and row.verdict == Verdict.LESS:
                    latency = [effect for effect in rows(terms(run, condition, LATENCY, "main")) if effect.term == name]
                    free = [_heard(run, condition, effect).verdict for effect in latency] == [Verdict.SAME]
                    saving = Saving(-row.estimate, free, others_of(row.reason))
                    alike.setdefault(saving, []).append(str(condition))
        for saving, where in alike.items():
            yield Finding(Kind.MEMORY, name, listing(where, 12), detail=saving, width=band(run))
    for condition in conditions(run):
        if peak := _logits_at_peak(run, condition):
            yield Finding(Kind.MEMORY, condition=str(condition), detail=peak)


def _logits_at_peak(run: Run, condition: Condition) -> LogitsAtPeak | None:
    """Of a prefill whose cells all peak where its logits are computed; None where that is not shown.

    It is where all cells hold the same beside their parameters, and the logits are most of that. Cells with fused
    attention and without must be among them: these take very different memory, so none peaks there.
    """
    cells = usable(condition.select(run.cells))
    cells = cells[~of_peers(cells)].dropna(subset=[MEMORY, "parameter_bytes"])
    setting = run.record.run.setting
    vocabulary, last_alone = setting("model", "vocab_size"), setting("workload", "prefill", "logits_to_keep")
    both_ways = "flash" in factors(run) and cells["flash"].nunique() == 2
    if condition.workload != "prefill" or last_alone or not both_ways or not is_number(vocabulary):
        return None
    first = rows(cells)[0]
    element = 4 if run.record.run.dtype == "float32" else 2
    logits = float(first.batch_size * first.prompt_tokens * vocabulary * element)
    beside = (cells[MEMORY] - cells["parameter_bytes"]).astype(float)
    alike = beside.max() - beside.min() <= _ALIKE * logits
    shown = alike and beside.min() >= logits >= _MOST * beside.max()
    return LogitsAtPeak(logits, float(beside.max())) if shown else None
