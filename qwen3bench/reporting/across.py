"""One page over several runs."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from qwen3bench.errors import UserError
from qwen3bench.record.files import record_file, write_atomic
from qwen3bench.reporting import figures
from qwen3bench.reporting.conditions import conditions
from qwen3bench.reporting.finding import Level
from qwen3bench.reporting.lookup import band, device, directory, factors, level
from qwen3bench.reporting.over_runs import dependent, effects_over, limits, over_findings, over_table
from qwen3bench.reporting.pages import about, moment, switches
from qwen3bench.reporting.plot_across import regimes, trends
from qwen3bench.reporting.templates import render
from qwen3bench.reporting.units import count
from qwen3bench.reporting.wording.page_words import PAGE, run_described
from qwen3bench.reporting.wording.sentences import METHOD, sentence

if TYPE_CHECKING:
    from qwen3bench.analysis.run import Run

_ROWS = 200  # of the table in report.md; the page holds all


def write_overview(runs: Sequence[Run], home: Path) -> Path:
    """Write report.md, report.html and plots/ over several runs into the directory; the path of report.html.

    Raises `UserError` where the directory cannot be written, or holds a run.
    """
    make_home(home)
    effects = effects_over(runs)
    names = list(dict.fromkeys(name for run in runs for name in factors(run)))
    width = band(runs[0])
    with figures.style():
        drawn = [draw(effects, names, width) for draw in (regimes, trends) if len(effects)]
        saved = [figures.save(plot, home / "plots") for plot in drawn if plot]
    found = [*limits(runs), *over_findings(effects, names, width), *dependent(runs)]
    content = {
        "title": f"{count(len(runs), 'run')} together",
        "about": [fact for fact in about(runs[0]) if all(fact in about(run) for run in runs)],
        "switches": switches(runs),
        "said": [sentence(finding) for finding in found if finding.level == Level.PLAIN],
        "warnings": [sentence(finding) for finding in found if finding.level == Level.WARNING],
        "plots": saved,
        "effects": over_table(effects, names) if len(effects) else None,
        "method": METHOD.format(level=level(runs[0])),
        "max_rows": _ROWS,
        "words": PAGE,
    }
    for name in ("report.md", "report.html"):
        links = [(_link(run, home, name), _described(run)) for run in runs]
        write_atomic(home / name, render(f"over_{name}.jinja", {**content, "runs": links}))
    return home / "report.html"


def make_home(home: Path) -> None:
    """Make the directory of a page over runs. Raises `UserError` where it cannot be made, or holds a run."""
    if record_file(home):
        raise UserError(f"{home}: holds a run, whose report this would replace; name another directory with --out")
    try:
        home.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{home}: cannot be made ({error.strerror}); name another directory with --out") from error


def _link(run: Run, home: Path, name: str) -> str:
    """The way from `home` to a run's page where there is one; from report.md to its directory, as that may be kept
    without the pages of its runs."""
    report = directory(run) / name
    whole = report.suffix == ".html" and report.is_file()
    return os.path.relpath(report if whole else directory(run), home)


def _described(run: Run) -> str:
    where = [str(condition) for condition in conditions(run)]
    measured = moment(created) if (created := run.record.run.created) else ""
    return run_described(f"{run.record.run.model}, {device(run)}", where, measured, finished=run.finished)
