"""Findings on cells: which one to take, peers, what failed and what is missing."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from scipy import special

from qwen3bench.analysis.frames import analysis_setting, block_matrix
from qwen3bench.config.choices import five
from qwen3bench.record.states import CellStatus
from qwen3bench.reporting import control_findings
from qwen3bench.reporting.conditions import Condition, conditions
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
from qwen3bench.reporting.units import count, is_number, listing, ratio, seconds, size
from qwen3bench.reporting.wording import Finding, NoVerdict, verdict_of, worth

if TYPE_CHECKING:
    from qwen3bench.analysis.run import Run


def recommended(run: Run, condition: Condition) -> Iterator[Finding]:
    """The cell to switch on, under the memory limit where one is set."""
    cells = usable(condition.select(run.cells))
    cells = cells[~of_peers(cells)]
    if len(cells) < 2:
        return
    if BASELINE not in set(cells["cell"]):
        yield Finding(f"No recommendation for {condition}: the baseline has no latency to compare with.", "recommended")
        return
    if control_findings.noise(run, condition):
        yield Finding(f"No recommendation for {condition}: it is noisy.", "recommended")
        return
    report = run.config.get("report")
    limit_gib = report.get("memory_limit_gib") if isinstance(report, dict) else None
    within = f" within {limit_gib:g} GiB" if is_number(limit_gib) else ""
    if limit_gib is not None and within:
        measured = cells.dropna(subset=[MEMORY])
        cells = measured[measured[MEMORY] <= limit_gib * 2**30]
        if cells.empty:
            yield _nothing_fits(measured, within, condition)
            return
    samples = condition.select(run.samples)
    confidence = analysis_setting(run.record, "confidence")
    blocks = block_matrix(samples, cells["cell"].tolist())
    others = [cell for cell in cells["cell"] if cell in blocks.log_s and cell != BASELINE]
    freedom = blocks.log_ratios(BASELINE, others).df.min() if others and BASELINE in blocks.log_s else 0
    faster = cells[shown_faster(cells, freedom, band(run), confidence)]
    if faster.empty:
        yield Finding(f"No cell{within} is shown to be faster than the baseline ({condition}).", "recommended")
        return
    near, unsure = _as_fast(faster, samples, confidence, band(run))
    alike = faster[near]
    alike = alike.assign(switches=[0 if c == BASELINE else c.count("+") + 1 for c in alike["cell"]])
    pick = rows(alike.sort_values([MEMORY, "switches"], kind="stable", na_position="last"))[0]
    gain = ratio(pick.speedup, pick.speedup_lo, pick.speedup_hi)
    memory = f", peak memory {size(pick.peak_allocated_bytes)}" if is_number(pick.peak_allocated_bytes) else ""
    text = f"{pick.cell}{within}: {gain} faster than the baseline{memory} ({condition})."
    if len(alike) > 1:
        more = count(len(alike) - 1, "other cell")
        text += f" It and {more} are as fast within ±{100 * band(run):g} %, as far as can be told"
        text += f"; of these it has {'the least memory, then ' if memory else ''}the fewest switches."
    if unsure:
        text += f" Of {count(unsure, 'more cell')} it is not shown that they are slower; more processes would tell."
    yield Finding(text, "recommended")


def _nothing_fits(measured: pd.DataFrame, within: str, condition: Condition) -> Finding:
    if measured.empty:
        return Finding(
            f"What fits{within} is unknown: peak memory was not measured ({condition}).",
            "recommended",
            "warning",
        )
    least = smallest(measured, MEMORY)
    needs = f"the smallest, {least.cell}, takes {size(least.peak_allocated_bytes)}"
    return Finding(f"No cell fits{within}: {needs} ({condition}).", "recommended", "warning")


def shown_faster(cells: pd.DataFrame, freedom: float, width: float, confidence: float = 0.95) -> pd.Series:
    """Which cells are faster than the baseline beyond doubt, though the best of many is looked at.

    Intervals of that confidence are widened as Bonferroni asks at 5 % for one comparison per cell, by quantiles of t
    with their degrees of freedom; a cell inside the band does not count.
    """
    gain, low = np.log(cells["speedup"]), np.log(cells["speedup_lo"])
    inside = (cells["speedup_lo"] >= 1 - width) & (cells["speedup_hi"] <= 1 + width)
    return (gain - _widening(len(cells) - 1, freedom, confidence) * (gain - low) > 0) & ~inside


def _widening(comparisons: int, freedom: Any, confidence: float) -> Any:
    """By how much Bonferroni, at 5 %, widens each of so many intervals with these degrees of freedom."""
    freedom = np.maximum(freedom, 1)
    widest = special.stdtrit(freedom, 1 - 0.025 / max(1, comparisons))
    return widest / special.stdtrit(freedom, (1 + confidence) / 2)


def _as_fast(cells: pd.DataFrame, samples: pd.DataFrame, confidence: float, width: float) -> tuple[list[bool], int]:
    """Which cells read as the fastest does within the band, and may well do so, by ratios within blocks.

    And how many others are not shown to be slower, though they read so: to recommend one of these for its fewer
    switches would be to recommend noise.

    Speed-ups share the baseline's scatter, so that their intervals may overlap where the cells are well apart.
    """
    blocks = block_matrix(samples, cells["cell"].tolist())
    fastest = largest(cells, "speedup").cell
    names = [name for name in cells["cell"] if name in blocks.log_s and name != fastest]
    alike, others = {fastest}, 0
    if names and fastest in blocks.log_s:
        found = blocks.log_ratios(fastest, names)
        half, away = found.half_width(confidence), np.abs(found.estimate)
        unsure = away <= half * _widening(len(names), found.df, confidence)
        near = away <= np.log1p(width)
        alike |= set(np.array(names)[near & (unsure | (away + half <= np.log1p(width)))])
        others = int((unsure & ~near).sum())
    return [name in alike for name in cells["cell"]], others


def peers(run: Run) -> Iterator[Finding]:
    """How other implementations of the model stand against the baseline, and cells with switches on against them."""
    for condition in conditions(run):
        cells = usable(condition.select(run.cells))
        for row in rows(cells[of_peers(cells)]):
            verdict = control_findings.heard(
                run, condition, verdict_of(row.speedup_lo, row.speedup_hi, band(run)), row.speedup
            )
            said = worth(verdict, row.speedup, row.speedup_lo, row.speedup_hi, band(run))
            against = f"; against the baseline {said}" if verdict != NoVerdict.MISSING else ""
            ours = _ours_against(run, condition, row.cell)
            noisy = " Noisy." if control_findings.noise(run, condition) else ""
            yield Finding(f"{row.cell} takes {seconds(row.latency_s)}{against}{ours} ({condition}).{noisy}", "peer")


def _ours_against(run: Run, condition: Condition, peer: str) -> str:
    """What cells of ours give over a peer, by ratios within blocks."""
    cells = usable(condition.select(run.cells))
    blocks = block_matrix(condition.select(run.samples), cells["cell"].tolist())
    ours = _telling(run, cells[~of_peers(cells)])
    names = [name for name in ours if name in blocks.log_s and peer in blocks.log_s]
    if not names:
        return ""
    found = blocks.log_ratios(peer, names)
    half = found.half_width(analysis_setting(run.record, "confidence"))
    said = ""
    for name, *logs in zip(names, found.estimate, found.estimate - half, found.estimate + half, strict=True):
        gain, lo, hi = (float(np.exp(value)) for value in logs)
        verdict = control_findings.heard(run, condition, verdict_of(lo, hi, band(run)), gain)
        said += f"; {ours[name]} against it {worth(verdict, gain, lo, hi, band(run))}"
    return said


def _telling(run: Run, cells: pd.DataFrame) -> dict[str, str]:
    """Of our cells, in words: all on, the five of `make ablate` where these are fewer, and the fastest.

    The latter where it is another, by more than the band: among many cells alike one has to come out first.
    """
    names = [all_on(run), "+".join(five())]
    latency = cells.set_index("cell")[LATENCY]
    told = {name: name for name in names if name in latency and name != BASELINE}
    fastest = str(latency.idxmin()) if len(latency) else BASELINE
    if fastest != BASELINE and latency[fastest] * (1 + band(run)) < latency.get(all_on(run), math.inf):
        told[fastest] = f"{fastest}, the fastest,"
    return told


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
        reasons = {
            cell: lines[0].rstrip(".") for cell, text in told.to_numpy() if (lines := str(text).strip().split("\n"))[0]
        }
        because = f": {next(iter(reasons.values()))}" if reasons else ""
        if len(set(reasons.values())) > 1:
            because += f" ({next(iter(reasons))}; the others' stand under What went wrong)"
        where = "" if list(there) == everywhere else f" ({listing(list(there), 12)})"
        word = "has" if len(names) == 1 else "have"
        yield Finding(f"{listing(names)} {word} status {status} and no speed-up{because}{where}.", "failure", "warning")


def missing(run: Run) -> Iterator[Finding]:
    """What the run does not hold: its end, cells without a latency, damaged lines of the record."""
    if not run.finished:
        text = "This run has not finished: what is here is what was measured until now."
        yield Finding(text, "missing", "warning")
    there = {str(condition): usable(condition.select(run.cells)) for condition in conditions(run)}
    nothing = [name for name, cells in there.items() if cells.empty]
    if nothing or not there:
        yield Finding(f"Without any latency: {listing(nothing) or 'every workload'}.", "missing", "warning")
    for condition in conditions(run):
        cells = condition.select(run.cells)
        lost = cells[(cells["status"].isna() | (cells["status"] == CellStatus.OK)) & cells[LATENCY].isna()]
        if len(lost) and len(there[str(condition)]):
            text = f"{count(len(lost), 'cell')} of {len(cells)} without a latency: {listing(list(lost['cell']))}"
            yield Finding(f"{text} ({condition}).", "missing", "warning")
    if run.record.warnings:
        text = f"The record is damaged: {'; '.join(run.record.warnings[:3])}."
        yield Finding(text, "missing", "warning")
