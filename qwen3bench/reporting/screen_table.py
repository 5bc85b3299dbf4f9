"""The tables of a screen: which switches pay alone, on average and last, and what was predicted beside measured."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import pandas as pd

from qwen3bench.analysis.screen_results import ScreenResult
from qwen3bench.record.design import cell_of
from qwen3bench.reporting import control_findings
from qwen3bench.reporting.conditions import Condition
from qwen3bench.reporting.finding import Choice, Effect, Finding, Kind, undecided_by_holm
from qwen3bench.reporting.findings_screen import screen_of
from qwen3bench.reporting.lookup import LATENCY, factors, rows, terms
from qwen3bench.reporting.tables import Entry, Table
from qwen3bench.reporting.units import ratio
from qwen3bench.reporting.wording.page_words import (
    CONFIRMED_HEADINGS,
    SCREEN_HEADINGS,
    held_word,
    measured_again,
    worth_word,
)
from qwen3bench.reporting.wording.ratio_words import worth
from qwen3bench.reporting.wording.sentences import sentence

if TYPE_CHECKING:
    from qwen3bench.analysis.run import Run


_KINDS = ("alone", "main", "last")


@dataclass(frozen=True)
class ScreenSection:
    """Of a condition: the screen in sentences, its switches ranked, and its predictions beside what was measured.

    `corrected`: whether an effect is undecided though its interval leaves out 1.
    """

    condition: Condition
    sentences: tuple[str, ...]
    switches: Table
    confirmed: Table | None
    corrected: bool


def screen_section(run: Run, condition: Condition, found: Sequence[Finding]) -> ScreenSection | None:
    """None where the condition has no screen, or it tells no worth of a switch."""
    result = screen_of(run, condition)
    ranked = _ranked(run, condition, found) if result is not None else None
    if result is None or ranked is None:
        return None
    here = [f for f in found if f.kind == Kind.SCREEN and f.condition == str(condition)]
    predicted = [
        [
            Entry(each.prediction.cell, each.prediction.cell),
            Entry(ratio(each.prediction.speedup, each.prediction.lo, each.prediction.hi), each.prediction.speedup),
            Entry(ratio(each.measured.speedup, each.measured.lo, each.measured.hi), each.measured.speedup)
            if each.measured
            else Entry(""),
            Entry(held_word(each.agrees, tested=each.tested, in_screen=each.round == 0)),
        ]
        for each in result.confirmed
    ]
    said = tuple(sentence(replace(finding, condition="")) for finding in here)
    confirmed = Table(CONFIRMED_HEADINGS, predicted, note=_again(run, result)) if predicted else None
    shown = pd.concat([terms(run, condition, LATENCY, kind) for kind in _KINDS])
    corrected = any(undecided_by_holm(_heard(run, condition, row)) for row in rows(shown))
    return ScreenSection(condition, said, ranked, confirmed, corrected)


def _again(run: Run, result: ScreenResult) -> str:
    """Of predicted cells that the screen measured too: that they have two numbers."""
    cells = [each.prediction.cell for each in result.confirmed if each.round]
    return measured_again([cell for cell in cells if cell in run.record.run.cells])


def _ranked(run: Run, condition: Condition, found: Sequence[Finding]) -> Table | None:
    """The switches by their worth on average, with what that is alone and last, and whether to turn each on."""
    by_kind = {kind: {row.term: row for row in rows(terms(run, condition, LATENCY, kind))} for kind in _KINDS}
    names = [name for name in factors(run) if name in by_kind["main"]]
    if not names or any(name not in by_kind[kind] for kind in _KINDS for name in names):
        return None
    answers = [f for f in found if f.kind == Kind.ANSWER and f.condition == str(condition)]
    chosen = [f for f in answers if isinstance(f.detail, Choice) and f.detail.none is None]
    on = set(cell_of(chosen[0].subject)) if chosen else None
    names.sort(key=lambda name: -math.log(by_kind["main"][name].estimate))
    table = []
    for name in names:
        each = [by_kind[kind][name] for kind in _KINDS]
        effects = [_heard(run, condition, row) for row in each]
        advice = worth_word(None if on is None else name in on, [effect.verdict for effect in effects])
        alone, average, last = (Entry(worth(effect), effect.estimate) for effect in effects)
        table.append([Entry(name, name), average, Entry(advice, advice), alone, last])
    return Table(SCREEN_HEADINGS, table)


def _heard(run: Run, condition: Condition, row: Any) -> Effect:
    verdict = control_findings.heard_effect(run, condition, row)
    return Effect(row.term, float(row.estimate), float(row.lo), float(row.hi), str(verdict))
