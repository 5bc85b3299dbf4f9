"""The report's files: report.md, report.html and plots/, each written whole or not at all."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen3bench.analysis.stopping import half_widths
from qwen3bench.config.catalogue import described
from qwen3bench.record.design import label
from qwen3bench.record.files import write_atomic
from qwen3bench.record.lines import BlockLine, CompileLine, FailureLine, GradientsLine, SessionLine, StopLine
from qwen3bench.record.states import BlockState, StopReason
from qwen3bench.reporting import figures, plot_waterfall, plots, tables
from qwen3bench.reporting.answer import cards, not_told
from qwen3bench.reporting.conditions import Condition, conditions
from qwen3bench.reporting.control_findings import control_list, idle_effects
from qwen3bench.reporting.finding import Control, Finding, Kind, Level
from qwen3bench.reporting.findings import findings
from qwen3bench.reporting.lookup import BASELINE, LATENCY, MEMORY, device, directory, factors, level
from qwen3bench.reporting.screen_table import screen_section
from qwen3bench.reporting.stacking import Stack, stack
from qwen3bench.reporting.switch_table import switch_table
from qwen3bench.reporting.tables import Table
from qwen3bench.reporting.templates import render
from qwen3bench.reporting.units import duration_words
from qwen3bench.reporting.whatif import as_script, whatif
from qwen3bench.reporting.wording.control_words import control_mark
from qwen3bench.reporting.wording.page_words import (
    PAGE,
    STOPPED,
    TRAINED,
    compiled_words,
    single_token_words,
    stack_words,
    what_if_words,
)
from qwen3bench.reporting.wording.sentences import FLASH_AND_MASK, METHOD, OPENING, command_of, sentence

if TYPE_CHECKING:
    from qwen3bench.analysis.run import Run

_EFFECT_HEADINGS = {LATENCY: "Effects on latency", MEMORY: "Effects on peak memory"}
_MARKDOWN_ROWS = 64  # rows of a table in report.md; the page and the csv hold all


@dataclass(frozen=True)
class ConditionSection:
    """All that is folded of one workload under one runtime."""

    condition: Condition
    cells: Table
    effects: list[tuple[str, Table]]
    plots: list[figures.SavedPlot]


@dataclass(frozen=True)
class StackSection:
    """Whether the switches of one condition stack: the waterfall and the interactions."""

    condition: Condition
    plot: figures.SavedPlot | None
    stack: Stack | None


def write_report(run: Run, found: list[Finding] | None = None) -> Path:
    """Write report.md, report.html and plots/ into the run's directory; the path of report.html.

    `found` are the run's findings where they are known already. Works on a partial run: what is missing is left out
    and named. Raises UserError where the directory cannot be written.
    """
    content = page_content(run, findings(run) if found is None else found)
    for name in ("report.md", "report.html"):
        write_atomic(directory(run) / name, render(f"{name}.jinja", content))
    return directory(run) / "report.html"


def page_content(run: Run, found: list[Finding]) -> dict[str, Any]:
    """Everything that the templates show, plots already written under the run's directory."""
    home = directory(run) / "plots"
    with figures.style():
        effects = [figures.save(plot, home) for plot in plots.effect_plots(run)]
        stacks = [_stack(run, condition, found) for condition in conditions(run)]
        sections = [_section(run, condition) for condition in conditions(run)]
        closing = [figures.save(plot, home) for plot in plots.closing_plots(run)]
    answers = cards(run, found)
    start = {str(card.condition): label(card.switches) for card in answers}
    data = whatif(run, start)
    alone = [f for f in found if f.level == Level.WARNING and not f.condition]
    return {
        "title": f"{run.record.run.model or 'A model'} on {device(run)}",
        "factors": factors(run),
        "about": about(run),
        "opening": OPENING,
        "warnings": [sentence(finding) for finding in alone],
        "cards": answers,
        "not_told": not_told(run),
        "table_of_switches": switch_table(found),
        "switches": dict(switches([run])),
        "screens": [each for condition in conditions(run) if (each := screen_section(run, condition, found))],
        "effects": effects,
        "about_switches": [sentence(finding) for finding in found if finding.kind in (Kind.IDLE, Kind.MEMORY)],
        "open": open_answers(found),
        "whatif": as_script(data) if data else "",
        "what_if_words": what_if_words(screen=bool(run.screens)),
        "measured_cells": [
            (str(condition), tables.measured_table(condition.select(run.cells))) for condition in conditions(run)
        ]
        if data
        else [],
        "stack_words": stack_words(screen=bool(run.screens)),
        "stacks": [each for each in stacks if each.plot or each.stack],
        "controls": [(control_mark(f.detail), sentence(f)) for f in control_list(run) if isinstance(f.detail, Control)],
        "sections": sections,
        "closing": closing,
        "equivalence": _equivalence(run),
        "evidence": tables.evidence_table(lines) if (lines := run.evidence) else None,
        "parts": tables.parts_table(run.evidence),
        "flash_and_mask": FLASH_AND_MASK if {"flash", "mask"} <= set(factors(run)) else "",
        "failures": _failures(run),
        "method": METHOD.format(level=level(run)) + TRAINED * bool(run.record.of(GradientsLine)),
        "compiled": _compiled(run),
        "measured": _measured(run),
        "commands": [_command(line) for line in run.record.of(SessionLine)],
        "environment": tables.mapping_table(run.environment or {}, ("what", "value")),
        "config": tables.mapping_table(run.config, ("option", "value")),
        "max_rows": _MARKDOWN_ROWS,
        "kept": [BASELINE, *start.values()],
        "words": PAGE,
    }


def open_answers(found: list[Finding]) -> list[tuple[str, str, str]]:
    """What has no answer: in words, the settings that give one if any do, and how long that takes in words."""
    said = []
    for finding in found:
        if finding.kind not in (Kind.UNDECIDED, Kind.UNTOLD) or not finding.advice:
            continue
        # What no cell tells has no estimate that may hold.
        if not finding.advice.settings or finding.kind == Kind.UNTOLD:
            said.append((sentence(finding), "", ""))
        else:
            took = finding.advice.seconds
            how_long = f"about {duration_words(took)}" if took is not None else ""
            said.append((sentence(replace(finding, advice=None)), command_of(finding.advice), how_long))
    return said


def _stack(run: Run, condition: Condition, found: list[Finding]) -> StackSection:
    plot = plot_waterfall.waterfall(run, condition, LATENCY)
    saved = figures.save(plot, directory(run) / "plots") if plot else None
    return StackSection(condition, saved, stack(run, condition, found))


def _section(run: Run, condition: Condition) -> ConditionSection:
    cells = condition.select(run.cells)
    effects = condition.select(run.effects)
    tables_of_effects = []
    for metric, heading in _EFFECT_HEADINGS.items():
        chosen = effects[effects["metric"] == metric]
        if metric == LATENCY:
            chosen = idle_effects(run, condition, chosen)
        if chosen["estimate"].notna().any():
            tables_of_effects.append((heading, tables.effects_table(chosen)))
    drawn = [figures.save(plot, directory(run) / "plots") for plot in plots.condition_plots(run, condition)]
    return ConditionSection(condition, tables.ranking_table(cells), tables_of_effects, drawn)


def about(run: Run) -> list[tuple[str, str]]:
    """What holds for the whole report, said once."""
    first = run.record.run
    facts = [
        ("model", first.model),
        ("weights", run.config.get("weights")),
        ("device", first.device),
        ("machine", run.environment.get("host")),
        ("threads", _threads(run)),
        ("machines", ", ".join(dict.fromkeys(run.environment.get("hosts") or ()))),
        ("cards", ", ".join(map(str, run.environment.get("cards") or ()))),
        ("dtype", first.dtype),
        ("switches", ", ".join(factors(run)) or "none"),
        ("cells", len(first.cells)),
        ("measured", moment(first.created)),
    ]
    return [(name, str(value)) for name, value in facts if value not in (None, "")]


def _threads(run: Run) -> str:
    """How many threads computed on a CPU, of as many cores as there are; empty on a card, whose own they are."""
    cores = run.environment.get("usable_cores")
    if run.threads is None:
        return ""
    return f"{run.threads} on {cores} cores" if cores else str(run.threads)


def switches(runs: Iterable[Run]) -> list[tuple[str, str]]:
    """Each switch of the runs and what it is, where the catalogue can tell, or the record of one of the user's own."""
    found: dict[str, str] = {}
    for run in runs:
        first = run.record.run
        for name in factors(run):
            found[name] = described(name, first.setting("opt", name)) or (first.own_switches or {}).get(name, "")
    return [(name, told) for name, told in found.items() if told]


def moment(text: object) -> str:
    """A time of the record, to the minute."""
    try:
        return f"{datetime.fromisoformat(str(text)).astimezone(UTC):%Y-%m-%d %H:%M} UTC"
    except ValueError:
        return str(text or "")


def _equivalence(run: Run) -> Table | None:
    if run.cells.empty or "equivalent" not in run.cells or run.cells["equivalent"].isna().all():
        return None
    return tables.equivalence_table(run.cells)


def _failures(run: Run) -> Table | None:
    lines = run.record.of(FailureLine)
    if not lines:
        return None
    said = [(line.cell, line.workload, line.runtime, line.pass_, line.status, line.reason) for line in lines]
    rows = [[tables.Entry(text, text) for text in (str(value or "") for value in values)] for values in said]
    return tables.drop_empty(tables.Table(["cell", "workload", "runtime", "pass", "status", "reason"], rows))


def _compiled(run: Run) -> str:
    """How cells were compiled, where the record tells."""
    with_options: dict[str, list[str]] = {}
    for line in run.record.of(CompileLine):
        if (options := line.options) is not None:
            more = options.get("single_token", {})
            said = _assigned({key: value for key, value in options.items() if value is not more})
            said += single_token_words(_assigned(more)) if more else ""
            with_options.setdefault(said, []).append(line.cell)
    return compiled_words(with_options) if with_options else ""


def _assigned(options: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}={value}".lower() for key, value in options.items())


def _measured(run: Run) -> Table | None:
    """Per condition how much was measured and why it stopped: from its `stop` line, else from what there is of it."""
    headings = [
        "workload",
        "runtime",
        "blocks",
        "processes",
        "measured (s)",
        "getting more processes ready (s)",
        "half-width reached",
        "stopped because",
    ]
    rows = []
    for line in [*run.record.stops, *_ended(run)]:
        widest = max((width for width in line.half_width.values() if width is not None), default=None)
        texts = (
            line.workload,
            line.runtime,
            line.blocks,
            line.processes,
            f"{line.measured_s:.1f}" if line.measured_s is not None else "",
            f"{line.more_s:.1f}" if line.more_s else "",
            f"±{100 * widest:.2g} %" if widest is not None else "",
            STOPPED[line.reason],
        )
        rows.append([tables.Entry("" if text is None else str(text)) for text in texts])
    return tables.drop_empty(tables.Table(headings, rows)) if rows else None


def _ended(run: Run) -> Iterator[StopLine]:
    """What a `stop` line would say of each condition that has none, as the run was ended before."""
    stopped = {(line.workload, line.runtime) for line in run.record.stops}
    for (workload, runtime), samples in run.samples.groupby(["workload", "runtime"], sort=False):
        where = str(workload), str(runtime)
        if where not in stopped:
            blocks = [line for line in run.record.of(BlockLine) if (line.workload, line.runtime) == where]
            widths = half_widths(samples, run.factors)
            yield StopLine(
                workload=where[0],
                runtime=where[1],
                reason=StopReason.ENDED,
                half_width={name: width if isfinite(width) else None for name, width in widths.items()},
                blocks=samples["block"].nunique(),
                processes=samples["process"].nunique(),
                measured_s=sum(line.elapsed_s or 0.0 for line in blocks),
                more_s=sum(line.more_s or 0.0 for line in blocks if line.state != BlockState.REPEAT),
            )


def _command(line: SessionLine) -> str:
    when = "" if line.time is None else f"{datetime.fromtimestamp(line.time, UTC):%Y-%m-%d %H:%M:%S} UTC: "
    return f"{when}{shlex.join(line.command)}"
