"""The end of a run in a terminal: findings, a short table per condition, and where the report is."""

from __future__ import annotations

import os
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
from rich.console import Console
from rich.table import Table
from rich.text import Text

from qwen3bench.record.states import CellStatus
from qwen3bench.reporting.conditions import Condition, conditions
from qwen3bench.reporting.finding import Finding
from qwen3bench.reporting.findings import grouped
from qwen3bench.reporting.lookup import BASELINE, LATENCY, MEMORY, all_on, directory, smallest, usable
from qwen3bench.reporting.tables import ranking_table
from qwen3bench.reporting.units import seconds, size
from qwen3bench.reporting.wording import sentence

if TYPE_CHECKING:
    from qwen3bench.analysis.run import Run

_MAX_ROWS = 8  # of a table of cells, which is to fit one screen together with the findings
_WIDTH = 100
_INDENT: dict[str, Any] = {"initial_indent": "  ", "subsequent_indent": "  ", "break_on_hyphens": False}


def terminal_summary(run: Run, found: list[Finding], console: Console) -> None:
    """Print the findings `found`, the most telling cells, fastest and smallest of each condition, the report's path.

    Fits 100 columns; plain text where the console is no terminal.
    """
    console = console if console.is_terminal else Console(file=console.file, width=_WIDTH, color_system=None)
    width = min(console.width, _WIDTH)
    found = [finding for finding in found if finding.kind != "control" or finding.level == "warning"]
    for finding in found:
        if finding.level == "warning":
            console.print(Text(f"Warning: {sentence(finding)}", style="yellow"), width=width)
    for heading, group in grouped([finding for finding in found if finding.level == "plain"]):
        console.print(Text(heading, style="bold"), width=width)
        for finding in group:
            console.print(Text(textwrap.fill(sentence(finding), width, **_INDENT)), soft_wrap=True)
    for condition in conditions(run):
        _print_cells(run, condition, console, width)
    report = directory(run) / "report.html"
    console.print(
        Text(f"Report: {os.path.relpath(report) if report.is_relative_to(Path.cwd()) else report}"),
        soft_wrap=True,
    )


def _print_cells(run: Run, condition: Condition, console: Console, width: int) -> None:
    cells = condition.select(run.cells)
    table = ranking_table(_telling(cells, all_on(run)), basics=True)
    shown = Table(title=str(condition), title_justify="left", title_style="bold", box=None, pad_edge=False)
    for heading, flush in zip(table.headings, table.numeric, strict=True):
        shown.add_column(heading, justify="right" if flush else "left", overflow="fold", no_wrap=heading == "cell")
    for row in table.rows:
        shown.add_row(*(Text(entry.text) for entry in row))
    console.print()
    console.print(shown, width=width)
    good = usable(cells)
    if good.empty:
        return
    fastest = smallest(good, LATENCY)
    words = f"Lowest latency: {fastest.cell}, {seconds(fastest.latency_s)}"
    if good[MEMORY].notna().any():
        least = smallest(good, MEMORY)
        words += f". Least peak memory: {least.cell}, {size(least.peak_allocated_bytes)}"
    elif good["parameter_bytes"].notna().any():
        least = smallest(good, "parameter_bytes")
        words += f". Fewest bytes of parameters: {least.cell}, {size(least.parameter_bytes)}"
    console.print(Text(f"{words}."), width=width)


def _telling(cells: pd.DataFrame, everything: str) -> pd.DataFrame:
    """All cells where they are few, else the baseline, all on, what failed and the fastest."""
    if len(cells) <= _MAX_ROWS:
        return cells
    must = cells["cell"].isin((BASELINE, everything)) | (cells["status"].notna() & (cells["status"] != CellStatus.OK))
    chosen = pd.concat([cells[must].head(_MAX_ROWS - 3), cells[~must].sort_values(LATENCY, kind="stable")])
    return chosen.head(_MAX_ROWS)
