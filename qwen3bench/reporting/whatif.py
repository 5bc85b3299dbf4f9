"""What if: the measured cells of a run as data for the page's toggles, and what flipping each switch changes."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from qwen3bench.analysis.frames import block_matrix
from qwen3bench.record.design import BASELINE, cell_of, label
from qwen3bench.reporting import control_findings
from qwen3bench.reporting.conditions import Condition, conditions
from qwen3bench.reporting.finding import Effect, NoVerdict, verdict_of
from qwen3bench.reporting.findings_cells import ratios_over
from qwen3bench.reporting.findings_screen import screen_of
from qwen3bench.reporting.lookup import MEMORY, band, factors, of_peers, rows, usable
from qwen3bench.reporting.tables import signed_bytes
from qwen3bench.reporting.units import is_number, ratio, seconds, significant, size
from qwen3bench.reporting.wording.page_words import TOGGLES
from qwen3bench.reporting.wording.ratio_words import worth_said

if TYPE_CHECKING:
    from qwen3bench.analysis.run import Run

Data = dict[str, Any]


def whatif(run: Run, start: dict[str, str]) -> Data | None:
    """The data of the toggles; None of one switch, and where no two measured cells differ in one and none is predicted.

    `start`: per condition the cell that is shown first.
    """
    if len(factors(run)) < 2:
        return None
    shown = [_condition(run, condition, start.get(str(condition), "baseline")) for condition in conditions(run)]
    shown = [each for each in shown if each["flips"] or each["predicted"]]
    words = {**TOGGLES, "idle": str(NoVerdict.IDLE)}
    return {"switches": factors(run), "conditions": shown, "words": words, "band": band(run)} if shown else None


def as_script(data: Data) -> str:
    """The data as JSON that can stand in a script element: nothing in it can end the element or begin a comment."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for mark, safe in (
        ("<", "\\u003c"),
        (">", "\\u003e"),
        ("&", "\\u0026"),
        ("\u2028", "\\u2028"),
        ("\u2029", "\\u2029"),
    ):
        text = text.replace(mark, safe)
    return text


def _condition(run: Run, condition: Condition, start: str) -> Data:
    cells = condition.select(run.cells)
    cells = cells[~of_peers(cells)]
    return {
        "name": str(condition),
        "start": start,
        "cells": {row.cell: shown_cell(row) for row in rows(cells)},
        "flips": _flips(run, condition),
        "predicted": _predicted(run, condition),
        "steps": _steps(run, condition),
        "idle": sorted(run.idle.get((condition.workload, condition.runtime), {})),
    }


def _predicted(run: Run, condition: Condition) -> list[tuple[float, float, float] | None]:
    """What a screen's model says of every cell: times as fast as the baseline, with the ends of its interval.

    A cell's place is the sum of 2^i over its switches' places i. Empty where there is no such model, or one block that
    gives no interval; None stands for a cell of switches that do not go together.
    """
    result = screen_of(run, condition)
    if result is None or result.predicted.empty or result.predicted["lo"].isna().any():
        return []
    bits = {name: 1 << place for place, name in enumerate(factors(run))}
    found: list[tuple[float, float, float] | None] = [None] * 2 ** len(bits)
    found[0] = (1.0, 1.0, 1.0)
    for row in rows(result.predicted):
        place = sum(bits[name] for name in cell_of(row.cell))
        found[place] = (_rounded(row.speedup), _rounded(row.lo), _rounded(row.hi))
    return found


def _steps(run: Run, condition: Condition) -> dict[str, list[tuple[float, float] | None]]:
    """By switch what the model says of turning it on: times as fast, and by how many times that may be off.

    A step's place is that of the cell it begins from among those without the switch. Empty where `_predicted` is.
    """
    if not _predicted(run, condition):
        return {}
    result = screen_of(run, condition)
    assert result is not None
    names = factors(run)
    found: dict[str, list[tuple[float, float] | None]] = {name: [None] * 2 ** (len(names) - 1) for name in names}
    for row in rows(result.steps):
        others = [name for name in names if name != row.factor]
        place = sum(1 << others.index(name) for name in cell_of(row.cell))
        found[row.factor][place] = _rounded(row.estimate), _rounded(row.hi / row.estimate)
    return found


def _rounded(value: float) -> float:
    """To four digits; a bound that is no number of use is as large as can be written."""
    return float(f"{min(max(float(value), 1e-9), 1e9):.4g}")


def shown_cell(row: Any) -> dict[str, str]:
    """A row of cells.csv in words, by the names of the page; what was not measured is left out."""
    texts = {
        "latency": seconds(row.latency_s) if is_number(row.latency_s) else "",
        "speed-up": ratio(row.speedup, row.speedup_lo, row.speedup_hi),
        "tokens/s": significant(row.tokens_per_s) if is_number(row.tokens_per_s) else "",
        "peak memory": size(row.peak_allocated_bytes) if is_number(row.peak_allocated_bytes) else "",
        "parameters": size(row.parameter_bytes) if is_number(row.parameter_bytes) else "",
    }
    if row.status != "ok":
        texts["status"] = ": ".join(str(part) for part in (row.status, row.reason) if isinstance(part, str))
    return {name: text for name, text in texts.items() if text}


def _flips(run: Run, condition: Condition) -> dict[str, dict[str, dict[str, str]]]:
    """Per cell and switch what turning it on or off from there gives, by ratios within blocks.

    Of a screen by those that confirm it, where both cells are in them. Of cells that have no block in common by their
    speed-ups over the baseline.
    """
    cells = usable(condition.select(run.cells))
    cells = cells[~of_peers(cells)]
    speedups = {row.cell: row for row in rows(cells)}
    memory = dict(zip(cells["cell"], cells[MEMORY], strict=True))
    matrices = [
        block_matrix(condition.select(samples), cells["cell"].tolist())
        for samples in (*reversed(run.rounds), run.samples)
    ]
    flips: dict[str, dict[str, dict[str, str]]] = {}
    for off in cells["cell"]:
        with_one_more = {}
        for name in factors(run):
            on = label(tuple(f for f in factors(run) if f in (*cell_of(off), name)))
            if name not in cell_of(off) and on in speedups:
                with_one_more[on] = name
        effects: list[Effect] = []
        left = list(with_one_more)
        for blocks in matrices:
            together = [on for on in left if {off, on} <= set(blocks.log_s)]
            effects += ratios_over(run, blocks, off, together) if together else ()
            left = [on for on in left if on not in together]
        for effect in [*effects, *(_apart(speedups[off], speedups[on]) for on in left)]:
            name, on = with_one_more[effect.term], effect.term
            change = (
                float(memory[on]) - float(memory[off]) if is_number(memory[on]) and is_number(memory[off]) else math.nan
            )
            back = replace(effect, estimate=1 / effect.estimate, lo=1 / effect.hi, hi=1 / effect.lo)
            flips.setdefault(off, {})[name] = _flip(run, condition, name, effect, change)
            flips.setdefault(on, {})[name] = _flip(run, condition, name, back, -change)
    return flips


def _apart(off: Any, on: Any) -> Effect:
    """How many times as fast a cell is as another that was measured in other blocks, each beside the baseline there.

    Their errors are independent, so that squares of half-widths add up.
    """
    ends = [[math.log(value) if value > 0 else math.nan for value in _ends(row)] for row in (off, on)]
    estimate = ends[1][0] - ends[0][0]
    half = math.hypot(*((hi - lo) / 2 for _, lo, hi in ends))
    return Effect(on.cell, math.exp(estimate), math.exp(estimate - half), math.exp(estimate + half), "")


def _ends(row: Any) -> tuple[float, float, float]:
    """A cell's speed-up with the ends of its interval, exact for the baseline's own; NaN where there is none."""
    known = 1.0 if row.cell == BASELINE else math.nan
    speedup, lo, hi = (float(v) if is_number(v) else known for v in (row.speedup, row.speedup_lo, row.speedup_hi))
    return speedup, lo, hi


def _flip(run: Run, condition: Condition, name: str, effect: Effect, change: float) -> dict[str, str]:
    """What flipping a switch gives, in words; `change` is of memory, in bytes."""
    judged = replace(effect, term=name, verdict=verdict_of(effect.lo, effect.hi, band(run)))
    verdict = control_findings.heard_effect(run, condition, judged)
    told = {"latency": worth_said(replace(effect, verdict=verdict)), "verdict": str(verdict)}
    return told | ({"memory": signed_bytes(change)} if change else {})
