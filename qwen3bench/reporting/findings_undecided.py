"""Findings on what has no verdict: which effects, and how much more measuring would decide."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import pandas as pd
from scipy import special

from qwen3bench.analysis.effects import process_shares
from qwen3bench.analysis.frames import analysis_setting, block_matrix
from qwen3bench.analysis.predictions import model_shares
from qwen3bench.record.states import Verdict
from qwen3bench.reporting import control_findings
from qwen3bench.reporting.advice import more_blocks, more_cells, more_processes, within_reason
from qwen3bench.reporting.conditions import Condition
from qwen3bench.reporting.finding import Advice, Effect, Finding, Kind, NoVerdict, OpenEffects, verdict_of
from qwen3bench.reporting.lookup import (
    BASELINE,
    LATENCY,
    all_on,
    band,
    factors,
    rows,
    samples_of_usable,
    terms,
    usable,
)
from qwen3bench.reporting.units import is_number

if TYPE_CHECKING:
    from qwen3bench.analysis.run import Run


@dataclass(frozen=True)
class Judged:
    """An effect on latency with its interval and verdict.

    `process_share` of its error's variance is of processes, `model_share` of what a screen's model does not describe.
    """

    term: str
    estimate: float
    lo: float
    hi: float
    df: float
    verdict: str
    process_share: float = math.nan
    model_share: float = 0.0


def undecided(run: Run, condition: Condition) -> Iterator[Finding]:
    """What has no verdict, and what would give one: switches, or all together where none can be told, and pairs."""
    main = _judged(run, condition, terms(run, condition, LATENCY, "main")) or _together_alone(run, condition)
    joint_effects = terms(run, condition, LATENCY, "interaction")
    pairs = _judged(run, condition, joint_effects[joint_effects["term"].str.count(":") == 1])
    for effects, of_pairs in ((main, False), (pairs, True)):
        unknown = [
            effect for effect in effects if control_findings.heard_effect(run, condition, effect) == Verdict.UNDECIDED
        ]
        blind = [effect for effect in unknown if not is_number(effect.lo)]
        known = [effect for effect in unknown if is_number(effect.lo)]
        if known:
            width = max(math.expm1(math.log(effect.hi / effect.lo) / 2) for effect in known)
            advice = within_reason(run, condition, would_decide(run, condition, known), width)
            yield _open(run, condition, known, advice, OpenEffects((), of_pairs))
        if blind:
            needed = max(6, 2 * condition.select(run.samples)["block"].nunique())
            advice = more_blocks(run, condition, needed)
            yield _open(run, condition, blind, advice, OpenEffects((), of_pairs, blind=True))


def _open(run: Run, condition: Condition, effects: Sequence[Judged], advice: Advice, detail: OpenEffects) -> Finding:
    told = tuple(Effect(e.term, e.estimate, e.lo, e.hi, e.verdict) for e in effects)
    names = ",".join(effect.term for effect in effects)
    return Finding(
        Kind.UNDECIDED,
        names,
        str(condition),
        detail=replace(detail, effects=told),
        verdict=Verdict.UNDECIDED,
        advice=advice,
        width=band(run),
    )


def _judged(run: Run, condition: Condition, effects: pd.DataFrame) -> list[Judged]:
    """Rows of effects; each with its shares where one of them is undecided."""
    unsure = (effects["verdict"] == Verdict.UNDECIDED).any()
    samples = samples_of_usable(run, condition) if unsure else None
    shares = {} if samples is None else process_shares(samples, factors(run))
    of_model = {} if samples is None else model_shares(samples, factors(run))
    found = []
    for row in rows(effects):
        model = of_model.get(row.term, 0.0)
        share = shares.get(row.term, math.nan) * (1 - model)
        found.append(Judged(row.term, row.estimate, row.lo, row.hi, row.df, row.verdict, share, model))
    return found


def _together_alone(run: Run, condition: Condition) -> list[Judged]:
    """The speed-up of all switches as an effect with its verdict."""
    good = {row.cell: row for row in rows(usable(condition.select(run.cells))) if is_number(row.speedup)}
    row = good.get(all_on(run))
    if row is None or row.cell == BASELINE:
        return []
    lo, hi = row.speedup_lo, row.speedup_hi
    verdict = verdict_of(lo, hi, band(run))
    known = Verdict.UNDECIDED if verdict == NoVerdict.MISSING else verdict
    error = block_matrix(condition.select(run.samples), list(good)).log_ratios(BASELINE, [row.cell])
    return [Judged(row.cell, row.speedup, lo, hi, float(error.df[0]), known, float(error.process_share[0]))]


def would_decide(run: Run, condition: Condition, effects: Sequence[Judged]) -> Advice:
    """How many blocks give each of these effects a verdict, or processes where these limit any of the intervals.

    Processes limit where what they make of the variance is more than half of what a verdict allows. So does a screen's
    model, and then more cells are needed.
    """
    samples = condition.select(run.samples)
    blocks, processes = samples["block"].nunique(), samples["process"].nunique()
    allowed = [(allowed_variance(run, condition, effect, effect.df), effect.process_share) for effect in effects]
    if any(effect.model_share > part / 2 for effect, (part, _) in zip(effects, allowed, strict=True)):
        return more_cells(run)
    if any(share > part / 2 for part, share in allowed):
        needed = max(processes_needed(run, condition, effect, processes) for effect in effects)
        return more_processes(run, condition, needed)
    fixed = [effect.model_share for effect in effects]
    known = [
        (part, of + (0.0 if math.isnan(share) else share)) for (part, share), of in zip(allowed, fixed, strict=True)
    ]
    if any(share >= part for part, share in known):
        return more_cells(run)
    needed = max(math.ceil(blocks * (1 - share) / (part - share)) + 1 for part, share in known)
    return more_blocks(run, condition, max(needed, blocks + 1))


def allowed_variance(run: Run, condition: Condition, effect: Judged, df: float) -> float:
    """The error's variance with which an effect has a verdict at these degrees of freedom, over the present one.

    Its interval then lies inside the band, or leaves 1 by Holm's p too, in the hardest case: 5 % over the number of
    terms of its order.
    """
    tested = condition.select(run.effects)
    tested = tested[(tested["metric"] == LATENCY) & tested["kind"].isin(("main", "interaction")) & tested["p"].notna()]
    tested = tested[tested["term"].str.count(":") == effect.term.count(":")]
    level = (1 + analysis_setting(run.record, "confidence")) / 2
    usual, strict = special.stdtrit(df, [level, max(level, 1 - 0.025 / max(1, len(tested)))])
    distance = abs(math.log(effect.estimate))
    se = math.log(effect.hi / effect.lo) / 2 / special.stdtrit(effect.df, level)
    return float((max(distance / strict, (band(run) - distance) / usual) / se) ** 2)


def processes_needed(run: Run, condition: Condition, effect: Judged, processes: int) -> int:
    """Processes of as many blocks each with which an effect has a verdict; each gives a degree of freedom more."""
    fixed = effect.model_share
    shrinking = processes * (1 - fixed)
    enough_with_many = shrinking / (allowed_variance(run, condition, effect, math.inf) - fixed)
    more = itertools.count(max(processes + 1, math.floor(enough_with_many)))
    return next(
        n for n in more if fixed + shrinking / n <= allowed_variance(run, condition, effect, effect.df + n - processes)
    )
