"""Findings on cells: which one to take, peers, what failed and what is missing."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from scipy import special

from qwen3bench.analysis.effective import by_switch
from qwen3bench.analysis.frames import BlockMatrix, analysis_setting, block_matrix
from qwen3bench.config.choices import five
from qwen3bench.record.states import CellStatus, Verdict
from qwen3bench.reporting import control_findings
from qwen3bench.reporting.advice import more_processes
from qwen3bench.reporting.conditions import Condition, conditions
from qwen3bench.reporting.finding import (
    Advice,
    Against,
    Choice,
    Effect,
    Failed,
    Finding,
    Idle,
    Kind,
    Lack,
    Level,
    Missing,
    NoAnswer,
    Times,
    verdict_of,
)
from qwen3bench.reporting.findings_screen import noisy_cells
from qwen3bench.reporting.lookup import (
    BASELINE,
    LATENCY,
    MEMORY,
    all_on,
    band,
    largest,
    of_peers,
    rows,
    smallest,
    usable,
)
from qwen3bench.reporting.units import is_number

if TYPE_CHECKING:
    from qwen3bench.analysis.run import Run


@lru_cache(maxsize=16)  # findings ask, and the terminal in three forms
def recommended(run: Run, condition: Condition) -> tuple[Finding, ...]:
    """The cell to switch on, under the memory limit where one is set, or why there is none; empty without a choice."""
    return tuple(_recommended(run, condition))


def _recommended(run: Run, condition: Condition) -> Iterator[Finding]:
    cells = usable(condition.select(run.cells))
    cells = cells[~of_peers(cells)]
    if len(cells) < 2:
        return
    limit_gib = _memory_limit(run)
    if BASELINE not in set(cells["cell"]):
        yield _nothing(run, condition, Choice(NoAnswer.NO_BASELINE))
        return
    if cells.loc[cells["cell"] != BASELINE, "speedup"].isna().all():
        yield _nothing(run, condition, Choice(NoAnswer.NO_BLOCK))
        return
    if control_findings.noise(run, condition):
        yield _nothing(run, condition, Choice(NoAnswer.NOISY), more_processes(run, condition, 2, times=2))
        return
    cells = cells[~cells["cell"].isin(noisy_cells(run, condition) - set(run.record.run.cells))]
    all_cells = cells
    if limit_gib is not None:
        measured = cells.dropna(subset=[MEMORY])
        cells = measured[measured[MEMORY] <= limit_gib * 2**30]
        if cells.empty:
            yield _nothing(run, condition, _nothing_fits(measured, limit_gib))
            return
    samples = condition.select(run.samples)
    confidence = analysis_setting(run.record, "confidence")
    freedom = cells["cell"].map(_freedom(run, condition, all_cells["cell"].tolist()))
    copy = control_findings.faster_copy(run, condition)
    faster = cells[shown_faster(cells, freedom, band(run), confidence, copy)]
    if faster.empty:
        yield _nothing(run, condition, Choice(NoAnswer.NOTHING_FASTER, limit_gib=limit_gib))
        return
    near, unsure = _as_fast(faster, samples, confidence, band(run))
    alike = faster[near]
    alike = alike.assign(switches=[0 if c == BASELINE else c.count("+") + 1 for c in alike["cell"]])
    by_memory = bool(alike[MEMORY].notna().all())
    pick = rows(alike.sort_values([MEMORY, "switches"] if by_memory else ["switches"], kind="stable"))[0]
    baseline = rows(all_cells[all_cells["cell"] == BASELINE])[0]
    others = alike[alike["cell"] != pick.cell]
    choice = Choice(
        times=times_of(pick, baseline),
        alike=tuple(others["cell"]),
        by_memory=by_memory,
        more_bytes=float((others[MEMORY].astype(float) - getattr(pick, MEMORY)).min()) if by_memory else math.nan,
        unsure=unsure,
        limit_gib=limit_gib,
    )
    yield Finding(
        Kind.ANSWER, pick.cell, str(condition), pick.speedup, pick.speedup_lo, pick.speedup_hi,
        Verdict.FASTER, choice, width=band(run),
    )  # fmt: skip


def _freedom(run: Run, condition: Condition, cells: list[str]) -> dict[str, float]:
    """The degrees of freedom of each cell's speed-up, in the blocks that it stands on."""
    found: dict[str, float] = {}
    for part in (run.samples, *run.rounds):
        samples = condition.select(part)
        if samples.empty:  # no round of it
            continue
        blocks = block_matrix(samples, cells)
        others = [cell for cell in cells if cell in blocks.log_s and cell != BASELINE and cell not in found]
        if others and BASELINE in blocks.log_s:
            found |= zip(others, map(float, blocks.log_ratios(BASELINE, others).df), strict=True)
    return found


def _memory_limit(run: Run) -> float | None:
    report = run.config.get("report")
    given: Any = report.get("memory_limit_gib") if isinstance(report, dict) else None
    return float(given) if is_number(given) else None


def _nothing(run: Run, condition: Condition, choice: Choice, advice: Advice | None = None) -> Finding:
    level = Level.WARNING if choice.none in (NoAnswer.NOTHING_FITS, NoAnswer.MEMORY_UNKNOWN) else Level.PLAIN
    return Finding(Kind.ANSWER, condition=str(condition), detail=choice, advice=advice, level=level, width=band(run))


def times_of(row: Any, baseline: Any | None) -> Times:
    """What a cell takes beside the baseline, where there is one."""

    def number(value: Any) -> float:
        return float(value) if is_number(value) else math.nan

    baseline_s = number(baseline.latency_s) if baseline is not None else math.nan
    return Times(
        latency_s=number(row.latency_s),
        baseline_s=baseline_s,
        tokens_per_s=number(row.tokens_per_s),
        peak_bytes=number(row.peak_allocated_bytes),
        parameter_bytes=number(row.parameter_bytes),
    )


def _nothing_fits(measured: pd.DataFrame, limit_gib: float) -> Choice:
    if measured.empty:
        return Choice(NoAnswer.MEMORY_UNKNOWN, limit_gib=limit_gib)
    least = smallest(measured, MEMORY)
    needed = float(least.peak_allocated_bytes)
    return Choice(NoAnswer.NOTHING_FITS, limit_gib=limit_gib, smallest=least.cell, smallest_bytes=needed)


def shown_faster(
    cells: pd.DataFrame, freedom: float | pd.Series, width: float, confidence: float = 0.95, copy: float = 0.0
) -> pd.Series:
    """Which cells are faster than both copies of the baseline beyond doubt, though the best of many is looked at.

    Intervals of that confidence are widened as Bonferroni asks at 5 % for one comparison per cell, by quantiles of t
    with their degrees of freedom (of all, or of each); a cell inside the band does not count. `copy`: how much faster
    than the baseline its second copy reads, in log. A baseline that is slow for no reason makes all cells look fast.
    """
    gain, low = np.log(cells["speedup"]), np.log(cells["speedup_lo"])
    inside = (cells["speedup_lo"] >= 1 - width) & (cells["speedup_hi"] <= 1 + width)
    compared = int(low.notna().sum())  # the baseline has no interval
    return (gain - _widening(compared, freedom, confidence) * (gain - low) > copy) & ~inside


def _widening(comparisons: int, freedom: Any, confidence: float) -> Any:
    """By how much Bonferroni, at 5 %, widens each of so many intervals with these degrees of freedom."""
    freedom = np.maximum(freedom, 1)
    widest = special.stdtrit(freedom, 1 - 0.025 / max(1, comparisons))
    return widest / special.stdtrit(freedom, (1 + confidence) / 2)


def _as_fast(
    cells: pd.DataFrame, samples: pd.DataFrame, confidence: float, width: float
) -> tuple[list[bool], tuple[str, ...]]:
    """Which cells read as the fastest does within the band, and may well do so, by ratios within blocks.

    And which others are not shown to be slower, though they read so: to recommend one of these for its fewer
    switches would be to recommend noise.

    Speed-ups share the baseline's scatter, so that their intervals may overlap where the cells are well apart.
    """
    blocks = block_matrix(samples, cells["cell"].tolist())
    fastest = largest(cells, "speedup").cell
    names = [name for name in cells["cell"] if {name, fastest} <= set(blocks.log_s) and name != fastest]
    alike, others = {fastest}, list[str]()
    if names:
        found = blocks.log_ratios(fastest, names)
        half, away = found.half_width(confidence), np.abs(found.estimate)
        unsure = away <= half * _widening(len(names), found.df, confidence)
        near = away <= np.log1p(width)
        alike |= set(np.array(names)[near & (unsure | (away + half <= np.log1p(width)))])
        others += np.array(names)[unsure & ~near].tolist()
    best = rows(cells[cells["cell"] == fastest])[0]
    for row in rows(cells[~cells["cell"].isin([fastest, *names])]):  # of other blocks, as what confirms a screen is
        apart = abs(math.log(best.speedup / row.speedup))
        reach = math.hypot(*(math.log(each.speedup_hi / each.speedup_lo) / 2 for each in (best, row)))
        if apart <= math.log1p(width) and (apart <= reach or apart + reach <= math.log1p(width)):
            alike.add(row.cell)
        elif apart <= reach:
            others.append(row.cell)
    return [name in alike for name in cells["cell"]], tuple(others)


def peers(run: Run) -> Iterator[Finding]:
    """How other implementations stand against the baseline, and cells with switches on against the fastest of them."""
    for condition in conditions(run):
        cells = usable(condition.select(run.cells))
        others = cells[of_peers(cells)]
        for row in rows(others):
            if is_number(row.speedup):
                effect = Effect(row.cell, row.speedup, row.speedup_lo, row.speedup_hi, "")
                yield _against(run, condition, effect, Against("the baseline"))
        if others[LATENCY].notna().any():
            best = Against(smallest(others, LATENCY).cell, best_of=len(others))
            for effect in _ours_over(run, condition, cells, best.other):
                yield _against(run, condition, effect, best)


def _against(run: Run, condition: Condition, effect: Effect, other: Against) -> Finding:
    verdict = verdict_of(effect.lo, effect.hi, band(run))
    return Finding(
        Kind.PEER,
        effect.term,
        str(condition),
        effect.estimate,
        effect.lo,
        effect.hi,
        control_findings.heard(run, condition, verdict, effect.estimate),
        other,
        width=band(run),
        noisy=control_findings.noise(run, condition) > 0,
    )


def _ours_over(run: Run, condition: Condition, cells: pd.DataFrame, peer: str) -> Iterator[Effect]:
    """What telling cells of ours give over a peer, by ratios within blocks."""
    blocks = block_matrix(condition.select(run.samples), cells["cell"].tolist())
    ours = _telling(run, cells[~of_peers(cells)])
    names = [name for name in ours if name in blocks.log_s and peer in blocks.log_s]
    if names:
        yield from ratios_over(run, blocks, peer, names)


def ratios_over(run: Run, blocks: BlockMatrix, over: str, names: list[str]) -> Iterator[Effect]:
    """How many times as fast as `over` each named cell is, within blocks that hold both; without a verdict yet."""
    found = blocks.log_ratios(over, names)
    half = found.half_width(analysis_setting(run.record, "confidence"))
    bounds = np.exp([found.estimate, found.estimate - half, found.estimate + half])
    for name, estimate, lo, hi in zip(names, *bounds, strict=True):
        if is_number(estimate):
            yield Effect(name, float(estimate), float(lo), float(hi), "")


def _telling(run: Run, cells: pd.DataFrame) -> list[str]:
    """Of our cells: all on, the five of `make ablate` where these are fewer, and the fastest.

    The latter where it is another, by more than the band: among many cells alike one has to come out first.
    """
    latency = cells.set_index("cell")[LATENCY]
    told = [name for name in (all_on(run), "+".join(five())) if name in latency and name != BASELINE]
    fastest = str(latency.idxmin()) if len(latency) else BASELINE
    if fastest != BASELINE and latency[fastest] * (1 + band(run)) < latency.get(all_on(run), math.inf):
        told.append(fastest)
    return list(dict.fromkeys(told))


def failures(run: Run) -> Iterator[Finding]:
    """Cells that got no number, by status and where they got none, with the reason of the first."""
    bad = run.cells[run.cells["status"].notna() & (run.cells["status"] != CellStatus.OK)]
    everywhere = [str(condition) for condition in conditions(run)]
    groups: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for (cell, status), rows_of in bad.groupby(["cell", "status"], sort=False):
        there = tuple(str(condition) for condition in conditions(run) if len(condition.select(rows_of)))
        groups.setdefault((str(status), there), []).append(str(cell))
    for (status, there), names in groups.items():
        told = bad.loc[(bad["status"] == status) & bad["cell"].isin(names), ["cell", "reason"]].dropna()
        firsts = [str(text).strip().split("\n")[0].rstrip(".") for text in told["reason"]]
        reasons = list(dict.fromkeys(reason for reason in firsts if reason))
        where = () if list(there) == everywhere else there
        failed = Failed(tuple(names), where, reasons[0] if reasons else "", len(reasons))
        yield Finding(Kind.FAILURE, names[0], verdict=status, detail=failed, level=Level.WARNING)


def idle(run: Run) -> Iterator[Finding]:
    """Switches that change nothing that runs, each once with its conditions."""
    found = run.idle
    switches = {str(each): found.get((each.workload, each.runtime), {}) for each in conditions(run)}
    for (name, pairs), places in by_switch(switches).items():
        yield Finding(Kind.IDLE, name, ", ".join(places), detail=Idle(pairs))


def missing(run: Run) -> Iterator[Finding]:
    """What the run does not hold: its end, cells without a latency, damaged lines of the record."""
    if not run.finished:
        yield _lacking(Lack.END)
    there = {str(condition): usable(condition.select(run.cells)) for condition in conditions(run)}
    nothing = [name for name, cells in there.items() if cells.empty]
    if nothing or not there:
        yield _lacking(Lack.LATENCY, nothing)
    for condition in conditions(run):
        cells = condition.select(run.cells)
        lost = cells[(cells["status"].isna() | (cells["status"] == CellStatus.OK)) & cells[LATENCY].isna()]
        if len(lost) and len(there[str(condition)]):
            yield _lacking(Lack.CELLS, list(lost["cell"]), str(condition), len(cells))
    if run.record.warnings:
        yield _lacking(Lack.LINES, run.record.warnings[:3])


def _lacking(lack: Lack, names: Sequence[str] = (), condition: str = "", total: int = 0) -> Finding:
    return Finding(Kind.MISSING, condition=condition, detail=Missing(lack, tuple(names), total), level=Level.WARNING)
