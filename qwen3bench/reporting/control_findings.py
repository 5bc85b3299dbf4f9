"""Controls as findings: is the machine quiet, do negative controls read as nothing, who is the bottleneck?"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import pandas as pd

from qwen3bench.analysis.controls import beyond_noise
from qwen3bench.record.lines import BlockLine, ConfirmBlockLine, GradientsLine
from qwen3bench.record.states import BlockState, CellStatus, Verdict
from qwen3bench.reporting.advice import more_processes
from qwen3bench.reporting.conditions import Condition, conditions
from qwen3bench.reporting.finding import Check, Control, ControlOutcome, Finding, Kind, Level, NoVerdict, Passed
from qwen3bench.reporting.lookup import BASELINE, all_on, band, rows
from qwen3bench.reporting.units import is_number

if TYPE_CHECKING:
    from qwen3bench.analysis.run import Run

_JUDGED = (ControlOutcome.PASSED, ControlOutcome.FAILED, ControlOutcome.UNSURE)
_NOT_SHOWN = (Verdict.SAME, Verdict.UNDECIDED, NoVerdict.NOISE)  # no difference is
_MANY_LEFT_OUT = 0.05  # of the visits: a quiet machine slows hardly any
_BUSY_ENOUGH = 0.9  # below this share of GPU work, eager latency is to a good part the host's


def control_list(run: Run) -> list[Finding]:
    """ControlOutcome of every control that the run holds, and of those that it lacks."""
    outcome = [*_equivalence(run), *_gradients(run)]
    for condition in conditions(run):
        outcome += [*copies(run, condition), *_tie_latency(run, condition)]
        outcome += [*left_out(run, condition), *_drift(run, condition)]
    of_all = (_processes, _tie_memory, _blocks, _host, _absent)
    return [*outcome, *(control for each in of_all for control in each(run))]


def outcome_of(finding: Finding) -> ControlOutcome | None:
    """What a control came to; None for a finding that is none."""
    return finding.detail.outcome if isinstance(finding.detail, Control) else None


def tally(controls: Iterable[Finding]) -> Passed:
    """How many controls passed, of those that have a limit."""
    outcome = [outcome_of(finding) for finding in controls]
    passed, failed, unsure = (outcome.count(of) for of in _JUDGED)
    return Passed(passed, passed + failed + unsure, unsure)


def _found(check: Check, outcome: ControlOutcome, *, condition: Condition | None = None, **values: Any) -> Finding:
    """A control with its outcome; `values` are of the finding (an estimate, advice) or of the control itself."""
    own = {name: values.pop(name) for name in ("estimate", "lo", "hi", "advice", "subject") if name in values}
    return Finding(
        kind=Kind.CONTROL,
        condition=str(condition or ""),
        detail=Control(check, outcome, **values),
        level=Level.WARNING if outcome == ControlOutcome.FAILED else Level.PLAIN,
        **own,
    )


def noise(run: Run, condition: Condition) -> float:
    """By how much two copies of the baseline differ, in log latency, where the A/A control fails; else 0."""
    return run.controls.noise.get((condition.workload, condition.runtime), 0.0)


def copies_apart(run: Run, condition: Condition) -> float:
    """By how much the ratio of two copies of the baseline differs from 1 where the A/A control fails; else 0."""
    aa = condition.select(run.controls.aa)
    return max((abs(row.ratio - 1) for row in rows(aa) if row.noisy), default=0.0)


def faster_copy(run: Run, condition: Condition) -> float:
    """By how much the second copy of the baseline reads as faster than the first, in log latency; else 0."""
    return max((-math.log(row.ratio) for row in rows(condition.select(run.controls.aa)) if row.ratio < 1), default=0.0)


def heard(run: Run, condition: Condition, verdict: str, estimate: float) -> str:
    """The verdict, or `noise` where two copies of the baseline are as far apart as the estimate is from 1."""
    told = not is_number(estimate) or beyond_noise(estimate, noise(run, condition))
    return verdict if told else NoVerdict.NOISE


def heard_effect(run: Run, condition: Condition, effect: Any) -> str:
    """The verdict of a term that is `heard`; `idle` where it shows no difference and a switch of it changes nothing."""
    verdict = heard(run, condition, effect.verdict, effect.estimate)
    return NoVerdict.IDLE if verdict in _NOT_SHOWN and _is_idle(run, condition, effect.term) else verdict


def heard_effects(run: Run, condition: Condition, effects: pd.DataFrame) -> pd.DataFrame:
    """Effects on latency with the verdicts that are `heard`."""
    verdicts = [heard_effect(run, condition, row) for row in rows(effects)]
    return effects.assign(verdict=pd.Series(verdicts, effects.index, dtype=object))


def idle_effects(run: Run, condition: Condition, effects: pd.DataFrame) -> pd.DataFrame:
    """Effects on latency with their verdicts, `idle` as in `heard_effect`; the noise is not looked at."""
    idle = effects["term"].map(lambda term: _is_idle(run, condition, term)).astype(bool)
    idle &= effects["verdict"].isin(_NOT_SHOWN)
    return effects.assign(verdict=effects["verdict"].astype(object).mask(idle, str(NoVerdict.IDLE)))


def _is_idle(run: Run, condition: Condition, term: str) -> bool:
    names = term.split(":")
    idle = run.idle.get((condition.workload, condition.runtime), {})
    return len(names) <= 2 and not idle.keys().isdisjoint(names)  # larger interactions are counted, not told


def _equivalence(run: Run) -> Iterator[Finding]:
    cells = run.cells.drop_duplicates("cell")
    verdicts = cells["equivalent"].dropna().astype(bool)
    if len(verdicts) and verdicts.all():
        yield _found(Check.EQUIVALENCE, ControlOutcome.PASSED, number=len(verdicts))
    unverified = cells[(cells["status"] == CellStatus.OK) & cells["equivalent"].isna() & (cells["cell"] != BASELINE)]
    if len(unverified):
        yield _found(Check.VERIFIED, ControlOutcome.FAILED, names=tuple(unverified["cell"]))


def _gradients(run: Run) -> Iterator[Finding]:
    verdicts = [line.equivalent for line in run.record.of(GradientsLine)]
    if verdicts and all(verdicts):
        yield _found(Check.GRADIENTS, ControlOutcome.PASSED, number=len(verdicts))


def copies(run: Run, condition: Condition) -> Iterator[Finding]:
    """Whether two copies of the baseline agree, as far as the run can tell; nothing where it has no second copy."""
    for row in rows(condition.select(run.controls.aa)):
        agree = row.lo >= 1 - row.limit and row.hi <= 1 + row.limit  # not where there is no interval
        outcome = ControlOutcome.FAILED if row.noisy else ControlOutcome.PASSED if agree else ControlOutcome.UNSURE
        yield _found(
            Check.AA,
            outcome,
            condition=condition,
            limit=row.limit,
            runtime=condition.runtime,
            **_numbers(row.ratio, row),
            advice=None if outcome == ControlOutcome.PASSED else more_processes(run, condition, 2, times=2),
        )


def _numbers(estimate: float, row: Any) -> dict[str, float]:
    return {"estimate": estimate, "lo": row.lo, "hi": row.hi}


def _tie_latency(run: Run, condition: Condition) -> Iterator[Finding]:
    for row in rows(condition.select(run.controls.tie_latency)):
        outcome = ControlOutcome.PASSED if row.ok else ControlOutcome.FAILED
        yield _found(Check.TIE_LATENCY, outcome, condition=condition, **_numbers(row.estimate, row))


def left_out(run: Run, condition: Condition) -> Iterator[Finding]:
    """How many visits other work slowed, so that no estimate counts them."""
    visits = condition.select(run.samples).drop_duplicates(["block", "cell", "copy"])
    if slowed := int(visits["left_out"].sum()):
        yield _found(
            Check.LEFT_OUT,
            ControlOutcome.TOLD,
            condition=condition,
            number=slowed,
            total=len(visits),
            limit=_MANY_LEFT_OUT,
        )


def many_left_out(finding: Finding) -> bool:
    """Whether it says that other work slowed so many visits that who reads an answer should know."""
    control = finding.detail
    return (
        isinstance(control, Control)
        and control.check == Check.LEFT_OUT
        and control.number > control.limit * control.total
    )


def _drift(run: Run, condition: Condition) -> Iterator[Finding]:
    yield from drifts(run, condition)
    if (apart := processes_apart(run, condition)) > band(run):
        yield _found(Check.PROCESSES, ControlOutcome.TOLD, condition=condition, estimate=apart)


def drifts(run: Run, condition: Condition) -> Iterator[Finding]:
    """By how much latency moves while a process is timed, with its interval."""
    for row in rows(condition.select(run.controls.drift)):
        if is_number(row.total):
            yield _found(Check.DRIFT, ControlOutcome.TOLD, condition=condition, **_numbers(row.total, row))


def _processes(run: Run) -> Iterator[Finding]:
    timed = [(condition, condition.select(run.samples)["process"].nunique()) for condition in conditions(run)]
    if alone := [str(condition) for condition, processes in timed if processes == 1]:
        yield _found(Check.ONE_PROCESS, ControlOutcome.FAILED, names=tuple(alone))


def _tie_memory(run: Run) -> Iterator[Finding]:
    pairs = rows(run.controls.tie_memory)
    if pairs:
        wrong = tuple(str(pair.cell) for pair in pairs if not pair.ok)
        outcome = ControlOutcome.FAILED if wrong else ControlOutcome.PASSED
        yield _found(Check.TIE_MEMORY, outcome, limit=int(pairs[0].head_bytes), number=len(pairs), names=wrong)


def _blocks(run: Run) -> Iterator[Finding]:
    """Blocks under a disturbance; and those at the power cap, where a card may well run all day.

    Of the rounds that confirm, too.
    """
    lines = [*run.record.of(BlockLine), *run.record.of(ConfirmBlockLine)]
    flagged = [line for line in lines if line.state == BlockState.FLAGGED]
    if flagged:
        flags = tuple(dict.fromkeys(flag for line in flagged for flag in line.flags))
        yield _found(Check.FLAGGED, ControlOutcome.FAILED, number=len(flagged), names=flags)
    reasons = [line.throttle_reasons for line in lines if line.throttle_reasons is not None]
    if capped := sum("sw_power_cap" in of_block for of_block in reasons):
        yield _found(Check.POWER_CAP, ControlOutcome.TOLD, number=capped, total=len(reasons))


def _host(run: Run) -> Iterator[Finding]:
    for workload in run.controls.host["workload"].unique():
        shares = {r.cell: r.busy_share for r in rows(run.controls.host) if r.workload == workload}
        named = tuple(name for name in dict.fromkeys((BASELINE, all_on(run))) if name in shares)
        if named:
            yield _found(
                Check.HOST,
                ControlOutcome.TOLD,
                subject=workload,
                limit=_BUSY_ENOUGH,
                names=named,
                shares=tuple(float(shares[name]) for name in named),
                runtime="eager" if "eager" in set(run.cells["runtime"]) else "graph",
            )


def _absent(run: Run) -> Iterator[Finding]:
    """What this run cannot tell."""
    held, runtimes = run.controls, set(run.cells["runtime"])
    if held.aa.empty:
        yield _found(Check.AA, ControlOutcome.ABSENT)
    if held.tie_latency.empty and set(run.cells["workload"]) != {"train"}:
        tie = run.effects[(run.effects["term"] == "tie") & (run.effects["kind"] == "main")]
        yield _found(Check.TIE_LATENCY, ControlOutcome.ABSENT, number=int(tie["estimate"].notna().any()))
    if held.host.empty and (runtimes == {"graph"} or "eager" in runtimes):
        yield _found(Check.HOST, ControlOutcome.ABSENT, runtime="graph" if runtimes == {"graph"} else "eager")


def processes_apart(run: Run, condition: Condition) -> float:
    """By how much the blocks of the slowest process are slower than those of the fastest, relative."""
    of_processes = condition.select(run.controls.drift_series).groupby("process")["relative_latency"].mean()
    return float(of_processes.max() / of_processes.min() - 1) if len(of_processes) else 0.0


def aa_series(run: Run, condition: Condition) -> pd.DataFrame:
    """Per block, latency of the baseline's second copy over that of the first: columns block, ratio."""
    samples = condition.select(run.samples)
    visits = (
        samples[(samples["cell"] == BASELINE) & ~samples["left_out"].astype(bool)]
        .groupby(["block", "copy"])["latency_s"]
        .median()
        .unstack()
    )
    if not {0, 1} <= set(visits.columns):
        return pd.DataFrame(columns=["block", "ratio"])
    return (visits[1] / visits[0]).rename("ratio").dropna().reset_index()
