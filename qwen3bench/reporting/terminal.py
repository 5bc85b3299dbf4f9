"""The end of a run in a terminal: the answer, a table of effects, and where the report is."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum, auto
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.text import Text

from qwen3bench.record.states import CellStatus, Verdict
from qwen3bench.reporting import control_findings
from qwen3bench.reporting.conditions import Condition, conditions
from qwen3bench.reporting.finding import (
    BestCell,
    ControlOutcome,
    Effect,
    NoVerdict,
    Pair,
    undecided_by_holm,
    verdict_of,
)
from qwen3bench.reporting.findings_cells import recommended
from qwen3bench.reporting.findings_effects import joint
from qwen3bench.reporting.findings_screen import screened
from qwen3bench.reporting.lookup import (
    BASELINE,
    LATENCY,
    band,
    directory,
    ended_early,
    of_peers,
    others_beside,
    rows,
    terms,
    usable,
)
from qwen3bench.reporting.text_table import narrow_table, packed, text_table, wrapped
from qwen3bench.reporting.units import is_number, ratio, seconds, significant, size
from qwen3bench.reporting.wording.sentences import only_with, sentence
from qwen3bench.reporting.wording.terminal_words import (
    PEERS_TITLE,
    UNFINISHED,
    Left,
    cells_title,
    damaged,
    ended_early_words,
    failed_cells,
    failed_controls,
    gain_words,
    left,
    marks_of,
    noisy_answer,
    noisy_baseline,
    nothing_measured,
    only_helps_with,
    prediction_words,
    switches_title,
)

if TYPE_CHECKING:
    from qwen3bench.analysis.run import Run

MAX_LINES = 25  # one screen, what is told beside the summary included
_WIDTH = 100
_MAX_ROWS = 12  # of the table: as many as the largest screen has switches
_MARKS: dict[str, str] = {Verdict.SAME: "=", Verdict.UNDECIDED: "?", NoVerdict.NOISE: "~", NoVerdict.IDLE: "∅"}
_DIRECTIONS = (Verdict.FASTER, Verdict.SLOWER)
Estimate = tuple[float, float, float, str]  # ratio, its interval, its verdict
Rows = dict[str, list[Estimate | None]]  # one estimate for each condition


class Form(Enum):
    """How much of an answer is told: with rate and memory, with its latency, or the switches and their speed-up."""

    WHOLE = auto()
    BRIEF = auto()
    LINE = auto()


@dataclass(frozen=True)
class Shown:
    """The tables: of switches, those that help only with another one, and of cells."""

    heads: Sequence[str]
    switches: Rows
    switches_title: str
    dependent: Sequence[str]
    cells: Rows
    cells_title: str


def terminal_summary(run: Run, console: Console, beside: int = 0) -> None:
    """Print what to switch on in each condition, the effect of each switch, and the report's path.

    It takes 25 lines, together with the lines that are told `beside` it. Fits 100 columns, or the terminal where that
    is narrower, and breaks no number.
    """
    narrow = console.is_terminal or "COLUMNS" in os.environ
    width = min(console.width, _WIDTH) if narrow else _WIDTH
    report = directory(run) / "report.html"
    where = f"Report: {os.path.relpath(report) if report.is_relative_to(Path.cwd()) else report}"
    room = MAX_LINES - beside - (math.ceil(len(where) / console.width) if narrow else 1)
    warnings = _kept([wrapped(f"Warning: {text}", width) for text in _warnings(run)], room // 2, Left.WARNING)
    for line in warnings:
        console.print(Text(line, style="yellow"), soft_wrap=True)
    for line in (*_fitted(run, width, room - len(warnings)), where):
        console.print(Text(line), soft_wrap=True)


def effect_lines(main: Rows, heads: Sequence[str], width: int, unknown: str = "not known") -> list[str]:
    """A table of ratios, a row for each name and a column for each head, that breaks no number.

    Where it is too wide the intervals are left out, then the last columns, which a line counts.
    """
    whole = {name: [_field(each) or unknown for each in estimates] for name, estimates in main.items()}
    lines = text_table(whole, heads)
    if max(map(len, lines)) <= width:
        return lines
    short = {name: [_field(each, interval=False) or unknown for each in estimates] for name, estimates in main.items()}
    return narrow_table(short, heads, width)


def effects_line(where: str, told: Mapping[str, Estimate | None]) -> str:
    """The first effects in one condition, as one line."""
    first = list(told.items())[:_MAX_ROWS]
    effects = ", ".join(f"{name} {_field(each) or 'not known yet'}" for name, each in first)
    return f"{where}, first effects: {effects}"


def _fitted(run: Run, width: int, room: int) -> list[str]:
    """The answers and the tables in `room` lines: answers get brief first, then tables short, then answers are left."""
    answers = {form: [_answer(run, condition, width, form) for condition in conditions(run)] for form in Form}
    for table in _tables(_shown(run), width):
        for blocks in answers.values():
            lines = [line for block in blocks for line in block]
            if len(lines) + len(table) <= room:
                return [*lines, *table]
    return _kept(answers[Form.LINE], room, Left.ANSWER)


def _kept(blocks: Sequence[Sequence[str]], room: int, what: Left) -> list[str]:
    """The first of the blocks, as many as `room` lines hold; a line counts those that are left."""
    lines: list[str] = []
    for number, block in enumerate(blocks):
        last = number == len(blocks) - 1
        if len(lines) + len(block) > room - (not last):
            return [*lines, left(len(blocks) - number, what)]
        lines += block
    return lines


# The answer


def _answer(run: Run, condition: Condition, width: int, form: Form) -> list[str]:
    cells = usable(condition.select(run.cells))
    apart = control_findings.copies_apart(run, condition)
    alone = set(run.cells["cell"]) == {BASELINE}
    if apart and not alone:
        return wrapped(noisy_answer(str(condition), apart), width)
    by_label = {row.cell: row for row in rows(cells)}
    if not by_label:
        return wrapped(nothing_measured(str(condition)), width)
    finding = next(iter(recommended(run, condition)), None)
    chosen = finding.subject if finding else ""
    if row := by_label.get(chosen):
        gain = ratio(row.speedup, row.speedup_lo, row.speedup_hi)
        lines = packed(f"{condition}:", [f"+opt={chosen.replace('+', ',')}"], width)
        if form is Form.LINE and len(f"{lines[-1]}  {gain.partition(' ')[0]}") <= width:
            return [*lines[:-1], f"{lines[-1]}  {gain.partition(' ')[0]}"]
        if form is not Form.WHOLE:
            return [*lines, *packed(f"  {gain.partition(' ')[0]} as fast,", _facts(row, form), width)]
        gain, facts = gain_words(gain), [*_facts(row, form), *_prediction(run, condition)]
        if len(lines[-1]) + 2 + len(gain) <= width:
            return [*lines[:-1], f"{lines[-1]}  {gain}", *packed("", facts, width)]
        return [*lines, *packed(f"  {gain},", facts, width)]
    if finding is not None:
        return wrapped(f"{condition}: {sentence(finding).replace(f' ({condition})', '')}", width)
    row = by_label.get(BASELINE, next(iter(by_label.values())))
    doubt = [noisy_baseline(apart)] if apart else []
    return packed(f"{condition}:", [row.cell, *_facts(row, form), *doubt], width)


def _prediction(run: Run, condition: Condition) -> list[str]:
    """Whether what a screen predicts to be best was measured so."""
    details = [finding.detail for finding in screened(run, condition)]
    return [prediction_words(each) for each in details if isinstance(each, BestCell)]


def _facts(row: Any, form: Form) -> list[str]:
    """Latency, rate and memory of a cell; its latency alone where it is to be brief."""
    facts = [seconds(row.latency_s)]
    if form is Form.WHOLE:
        if is_number(row.tokens_per_s):
            facts.append(f"{significant(row.tokens_per_s)} tokens/s")
        if is_number(row.peak_allocated_bytes):
            facts.append(f"{size(row.peak_allocated_bytes)} peak memory")
        elif is_number(row.parameter_bytes):
            facts.append(f"{size(row.parameter_bytes)} of parameters")
    return facts


def _warnings(run: Run) -> Iterator[str]:
    """What limits the worth of all answers."""
    if not run.finished:
        yield UNFINISHED
    bad = run.cells[run.cells["status"].notna() & (run.cells["status"] != CellStatus.OK)]
    if len(bad):
        by_status = bad.drop_duplicates(["cell", "status"])["status"].value_counts()
        yield failed_cells({str(status): number for status, number in by_status.items()})
    if run.warnings:
        yield damaged(len(run.warnings))
    early = {str(each): blocks for each in conditions(run) if (blocks := ended_early(run, each))}
    if early:
        yield ended_early_words(early)
    outcomes = [control_findings.outcome_of(control) for control in control_findings.control_list(run)]
    if others := outcomes.count(ControlOutcome.FAILED) - int(run.controls.aa["noisy"].sum()):
        yield failed_controls(others)


# The table


def _largest(estimates: Sequence[Estimate | None]) -> float:
    """The largest effect that has a direction, in log; 0 where none has."""
    return max((abs(math.log(each[0])) for each in estimates if each and each[3] in _DIRECTIONS), default=0.0)


def _tables(shown: Shown, width: int) -> Iterator[list[str]]:
    """The tables as lines, shorter each time: without that of peers, with fewer switches, and none at last."""
    yield _laid_out(shown, width, _MAX_ROWS)
    fewer = replace(shown, cells={}) if shown.switches else shown
    dropped = [left(len(shown.cells), Left.PEER)] * (shown.cells != fewer.cells)
    for most in range(_MAX_ROWS, 1, -1):
        yield [*_laid_out(fewer, width, most), *dropped]
    yield []


def _laid_out(shown: Shown, width: int, most: int) -> list[str]:
    """The tables as lines, `most` rows of each."""
    lines: list[str] = []
    if shown.switches:
        lines += ["", *wrapped(shown.switches_title, width), *_some(shown.switches, shown.heads, width, most)]
        lines += _kept([wrapped(text, width) for text in shown.dependent], most, Left.PAIR)
    if shown.cells:
        lines += ["", *wrapped(shown.cells_title, width), *_some(shown.cells, shown.heads, width, most)]
    return lines


def _some(table: Rows, heads: Sequence[str], width: int, most: int) -> list[str]:
    """At most `most` rows of a table, the largest effects with a direction first; a line counts what is left."""
    more = len(table) - most
    chosen = sorted(table, key=lambda name: -_largest(table[name]))[:most]
    kept = {name: estimates for name, estimates in table.items() if name in chosen}
    return effect_lines(kept, heads, width) + [left(more, Left.ROW)] * (more > 0)


def _shown(run: Run) -> Shown:
    """The effect of each switch in each condition; of each cell where switches cannot be told apart."""
    found = conditions(run)
    heads = [str(condition) for condition in found]
    main = {str(condition): terms(run, condition, LATENCY, "main") for condition in found}
    told = {name for frame in main.values() for name in frame["term"]}
    switches: Rows = {
        name: [_main_effect(run, condition, main[str(condition)], name) for condition in found]
        for name in run.factors
        if name in told
    }
    noisy = any(control_findings.noise(run, condition) for condition in found)
    idle = any(each and each[3] == NoVerdict.IDLE for estimates in switches.values() for each in estimates)
    corrected = any(
        undecided_by_holm(Effect(name, *each)) for name, estimates in switches.items() for each in estimates if each
    )
    marks = marks_of(band(run), noisy=noisy, idle=idle, corrected=corrected)
    title = ""
    if switches:
        others = {others_beside(run, frame) for frame in main.values() if len(frame)}
        others_said = others.pop() if len(others) == 1 else ""
        title = switches_title(others_said, marks)
    names = [str(cell) for cell in dict.fromkeys(run.cells[of_peers(run.cells)]["cell"])]
    if not switches:
        names = list(dict.fromkeys(str(cell) for cell in run.cells["cell"] if cell != BASELINE))
    cells: Rows = {name: [_speedup(run, condition, name) for condition in found] for name in names}
    if not any(each for estimates in cells.values() for each in estimates):
        cells = {}
    return Shown(heads, switches, title, list(_dependent(run)), cells, PEERS_TITLE if switches else cells_title(marks))


def _dependent(run: Run) -> Iterator[str]:
    """Which switches help only with another one on, and where: the table's averages hide it."""
    places: dict[tuple[str, str], list[str]] = {}
    for finding in joint(run):
        if isinstance(finding.detail, Pair) and only_with(finding.detail):
            places.setdefault((finding.detail.small, finding.detail.large), []).append(finding.condition)
    for (small, large), found in places.items():
        yield only_helps_with(small, large, found)


def _main_effect(run: Run, condition: Condition, main: Any, name: str) -> Estimate | None:
    found = rows(main[main["term"] == name])
    if not found:
        return None
    row = found[0]
    return row.estimate, row.lo, row.hi, control_findings.heard_effect(run, condition, row)


def _speedup(run: Run, condition: Condition, cell: str) -> Estimate | None:
    cells = usable(condition.select(run.cells))
    found = rows(cells[(cells["cell"] == cell) & cells["speedup"].notna()])
    if not found:
        return None
    row = found[0]
    verdict = verdict_of(row.speedup_lo, row.speedup_hi, band(run))
    return (
        row.speedup,
        row.speedup_lo,
        row.speedup_hi,
        control_findings.heard(run, condition, verdict, row.speedup),
    )


def _field(estimate: Estimate | None, interval: bool = True) -> str:
    if estimate is None:
        return ""
    value, lo, hi, verdict = estimate
    said = ratio(value, lo, hi)
    return f"{said if interval else said.partition(' ')[0]} {_MARKS.get(verdict, '')}".rstrip()
