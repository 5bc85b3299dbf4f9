"""Effects of several runs side by side: where a switch pays, where it does not, where its effect turns around."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import product
from typing import TYPE_CHECKING, Any

import pandas as pd

from qwen3bench.record.states import Verdict
from qwen3bench.reporting import control_findings
from qwen3bench.reporting.conditions import conditions
from qwen3bench.reporting.finding import (
    Check,
    Control,
    ControlOutcome,
    Effect,
    Finding,
    Kind,
    Lack,
    Level,
    Missing,
    NoVerdict,
    Pair,
    Regime,
)
from qwen3bench.reporting.findings_cells import failures, missing
from qwen3bench.reporting.findings_effects import joint
from qwen3bench.reporting.lookup import AVERAGE, LATENCY, band, level, others_meanwhile, rows, terms
from qwen3bench.reporting.tables import Entry, Table, drop_empty
from qwen3bench.reporting.units import count
from qwen3bench.reporting.wording.control_words import copies_words
from qwen3bench.reporting.wording.ratio_words import band_words, worth
from qwen3bench.reporting.wording.sentences import only_with

if TYPE_CHECKING:
    from qwen3bench.analysis.run import Run

_CELLS_WHERE = ("model", "device", "dtype")
_WHERE = (*_CELLS_WHERE, "threads")  # part of a condition's name only where the runs differ in them


def effects_over(runs: Sequence[Run]) -> pd.DataFrame:
    """Main effects on latency of all runs, one row per run, workload, runtime and switch.

    Columns: run (from 1), model, device, dtype, threads (of a CPU, in words), workload, runtime, batch_size,
    prompt_tokens, logits (in words, where not of all tokens), blocks, processes, noisy, control (of the baseline's
    copies, in words), condition, others (what the other switches do, see `lookup.others_beside`), term, estimate, lo,
    hi, verdict.
    """
    lines: list[dict[str, Any]] = []
    for number, run in enumerate(runs, start=1):
        for condition in conditions(run):
            cell = rows(condition.select(run.cells))[0]
            same = {key: getattr(cell, key) for key in (*_CELLS_WHERE, "batch_size", "prompt_tokens")}
            where = {"run": number, **same, "workload": condition.workload, "runtime": condition.runtime}
            where |= {"threads": "" if run.threads is None else count(run.threads, "thread")}
            where |= {"logits": "last logits" if condition.workload in run.last_logits else ""}
            timed = condition.select(run.samples)
            where |= {key: timed[of].nunique() for key, of in (("blocks", "block"), ("processes", "process"))}
            where |= {"noisy": control_findings.noise(run, condition) > 0}
            where |= {"control": ", ".join(map(copies_words, control_findings.copies(run, condition)))}
            for effect in rows(control_findings.heard_effects(run, condition, terms(run, condition, LATENCY, "main"))):
                others = others_meanwhile(run, effect.reason)
                named = str(condition) if others in (AVERAGE, "") else f"{condition}, {others}"
                where |= {"condition": named, "others": others}
                values = {key: getattr(effect, key) for key in ("term", "estimate", "lo", "hi", "verdict")}
                lines.append(where | values)
    frame = pd.DataFrame(lines)
    for key in _WHERE if lines else ():
        if frame[key].nunique(dropna=False) > 1:
            told = frame[key].astype(str)
            frame["differs"] = frame.get("differs", "") + told.where(told == "", ", " + told)
    if "differs" in frame:
        frame["condition"] += frame.pop("differs").map(lambda told: told and f" ({told.removeprefix(', ')})")
    return frame


def limits(runs: Sequence[Run]) -> Iterator[Finding]:
    """What single runs lack: their end, cells that failed or were not measured, conditions without any effect, and a
    band or a confidence of their own."""
    if len({(band(run), level(run)) for run in runs}) > 1:
        told = [f"run {n}: {band_words(band(run))}, {level(run)}" for n, run in enumerate(runs, start=1)]
        detail = Missing(Lack.ONE_BAND, tuple(told))
        yield Finding(Kind.MISSING, detail=detail, level=Level.WARNING)
    for number, run in enumerate(runs, start=1):
        for finding in (*missing(run), *failures(run)):
            yield replace(finding, run=number)


def dependent(runs: Sequence[Run]) -> Iterator[Finding]:
    """Which switches help only with another on, and in how many conditions: what an average over the other hides."""
    pairs = [finding.detail for run in runs for finding in joint(run) if isinstance(finding.detail, Pair)]
    found = Counter((pair.small, pair.large) for pair in pairs if only_with(pair))
    for (small, large), places in found.items():
        yield Finding(Kind.DEPENDENT, f"{small}:{large}", detail=Regime(total=places))


def over_findings(effects: pd.DataFrame, names: Sequence[str], width: float) -> Iterator[Finding]:
    """Per switch, where it is faster, slower, the same or undecided, or no more than the noise of a noisy condition."""
    if effects.empty:
        yield Finding(Kind.MISSING, detail=Missing(Lack.EFFECTS), level=Level.WARNING)
        return
    if noisy := tuple(dict.fromkeys(effects.loc[effects["noisy"], "condition"])):
        control = Control(Check.NOISY_RUNS, ControlOutcome.FAILED, names=noisy)
        yield Finding(Kind.CONTROL, detail=control, level=Level.WARNING)
    for name, others in product(names, dict.fromkeys(effects["others"])):  # averages stand by themselves
        found = rows(effects[(effects["term"] == name) & (effects["others"] == others)])
        verdicts = Counter(row.verdict for row in found)
        if found:
            regime = Regime(
                total=len(found),
                faster=_decided(found, Verdict.FASTER),
                slower=_decided(found, Verdict.SLOWER),
                same=verdicts[Verdict.SAME],
                undecided=verdicts[Verdict.UNDECIDED],
                noise=verdicts[NoVerdict.NOISE],
                idle=verdicts[NoVerdict.IDLE],
                others=others,
            )
            yield Finding(Kind.REGIME, name, detail=regime, width=width)


def _decided(found: Sequence[Any], verdict: Verdict) -> tuple[Effect, ...]:
    return tuple(Effect(row.term, row.estimate, row.lo, row.hi, row.verdict) for row in found if row.verdict == verdict)


def over_table(effects: pd.DataFrame, names: Sequence[str]) -> Table:
    """One row per run and condition, one column per switch: its effect and verdict."""
    lines = []
    for _, group in effects.groupby(["run", "condition"], sort=False):
        first = rows(group)[0]
        found = {
            row.term: Entry(worth(Effect(row.term, row.estimate, row.lo, row.hi, row.verdict)), float(row.estimate))
            for row in rows(group)
        }
        opening = [Entry(str(first.run), float(first.run)), Entry(first.condition, first.condition)]
        opening += [Entry(f"{n:,}", float(n)) for n in (first.blocks, first.processes)]
        opening += [Entry(first.control)]
        lines.append([*opening, *(found.get(name, Entry("")) for name in names)])
    return drop_empty(Table(["run", "condition", "blocks", "processes", "control", *names], lines))
