"""The report's files: report.md, report.html and plots/, each written whole or not at all."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen3bench.analysis.stopping import half_widths
from qwen3bench.config.catalogue import described
from qwen3bench.record.files import write_atomic
from qwen3bench.record.lines import BlockLine, CompileLine, FailureLine, SessionLine, StopLine
from qwen3bench.record.states import BlockState, StopReason
from qwen3bench.reporting import control_findings, figures, plots, tables
from qwen3bench.reporting.conditions import Condition, conditions
from qwen3bench.reporting.findings import findings, grouped
from qwen3bench.reporting.lookup import LATENCY, MEMORY, device, directory, factors, level
from qwen3bench.reporting.tables import Table
from qwen3bench.reporting.templates import render
from qwen3bench.reporting.units import listing
from qwen3bench.reporting.wording import Finding

if TYPE_CHECKING:
    from qwen3bench.analysis.run import Run

_EFFECT_HEADINGS = {LATENCY: "Effects on latency", MEMORY: "Effects on peak memory"}
_MARKDOWN_ROWS = 64  # rows of a table in report.md; the page and the csv hold all


@dataclass(frozen=True)
class ConditionSection:
    """All that is shown of one workload under one runtime."""

    condition: Condition
    cells: Table
    effects: list[tuple[str, Table]]
    plots: list[figures.SavedPlot]


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
    with figures.style():
        sections = [_section(run, condition) for condition in conditions(run)]
        opening = [figures.save(plot, directory(run) / "plots") for plot in plots.opening_plots(run)]
        closing = [figures.save(plot, directory(run) / "plots") for plot in plots.closing_plots(run)]
    return {
        "title": f"{run.record.run.model or 'A model'} on {device(run)}",
        "factors": factors(run),
        "level": level(run),
        "about": about(run),
        "switches": switches([run]),
        "findings": grouped([finding for finding in found if finding.level == "plain"]),
        "warnings": [finding for finding in found if finding.level == "warning"],
        "controls": control_findings.sentences(run),
        "sections": sections,
        "opening": opening,
        "closing": closing,
        "equivalence": _equivalence(run),
        "evidence": tables.evidence_table(lines) if (lines := run.evidence) else None,
        "failures": _failures(run),
        "compiled": _compiled(run),
        "measured": _measured(run),
        "commands": [_command(line) for line in run.record.of(SessionLine)],
        "environment": tables.mapping_table(run.environment or {}, ("what", "value")),
        "config": tables.mapping_table(run.config, ("option", "value")),
        "max_rows": _MARKDOWN_ROWS,
    }


def _section(run: Run, condition: Condition) -> ConditionSection:
    cells = condition.select(run.cells)
    effects = condition.select(run.effects)
    tables_of_effects = []
    for metric, heading in _EFFECT_HEADINGS.items():
        chosen = effects[effects["metric"] == metric]
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
        ("dtype", first.dtype),
        ("switches", ", ".join(factors(run)) or "none"),
        ("cells", len(first.cells)),
        ("measured", moment(first.created)),
    ]
    return [(name, str(value)) for name, value in facts if value not in (None, "")]


def switches(runs: Iterable[Run]) -> list[tuple[str, str]]:
    """Each switch of the runs and what it is, where the catalogue can tell."""
    recorded = {name: run.record.run.setting("opt", name) for run in runs for name in factors(run)}
    return [(name, told) for name, options in recorded.items() if (told := described(name, options))]


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
            said += f", for a single token {_assigned(more)}" if more else ""
            with_options.setdefault(said, []).append(line.cell)
    if not with_options:
        return ""
    each = [
        f"{said or 'its defaults'}{f' ({listing(sorted(set(cells)))})' if len(with_options) > 1 else ''}"
        for said, cells in with_options.items()
    ]
    return f"Each process compiled for itself, Inductor's options: {'; '.join(each)}."


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
    reasons = {
        StopReason.TARGET: "every main effect is as tight as asked for",
        StopReason.MAX_SECONDS: "the time allowed was up",
        StopReason.MAX_BLOCKS: "the blocks allowed were used up",
        StopReason.FAILED: "measuring failed",
        StopReason.ENDED: "the run was ended before",
    }
    rows = []
    for line in [*run.record.of(StopLine), *_ended(run)]:
        widest = max((width for width in line.half_width.values() if width is not None), default=None)
        texts = (
            line.workload,
            line.runtime,
            line.blocks,
            line.processes,
            f"{line.measured_s:.1f}" if line.measured_s is not None else "",
            f"{line.more_s:.1f}" if line.more_s else "",
            f"±{100 * widest:.2g} %" if widest is not None else "",
            reasons[line.reason],
        )
        rows.append([tables.Entry("" if text is None else str(text)) for text in texts])
    return tables.drop_empty(tables.Table(headings, rows)) if rows else None


def _ended(run: Run) -> Iterator[StopLine]:
    """What a `stop` line would say of each condition that has none, as the run was ended before."""
    stopped = {(line.workload, line.runtime) for line in run.record.of(StopLine)}
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
