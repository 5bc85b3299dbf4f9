"""`python -m qwen3bench.report RUN…`: rebuild the report of finished or partial runs; measures nothing."""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from qwen3bench.config.cli import Parser, guarded
from qwen3bench.errors import UserError

if TYPE_CHECKING:
    from qwen3bench.analysis.run import Run


def main(arguments: list[str] | None = None) -> int:
    """Rebuild cells.csv, effects.csv and the report of each run, and of several together; the exit status."""
    return guarded(lambda: _main(arguments))


def _main(arguments: list[str] | None) -> int:
    options = _parser().parse_args(arguments)
    return _rebuild([Path(name) for name in options.runs], options.out)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m qwen3bench.report",
        description="Rebuild the report of finished or partial runs from their records. Measures nothing.",
        epilog="Several runs, or a multirun's directory, give one page over all of them as well.",
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="directory of a run, or of a multirun")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where the page over several runs goes")
    return parser


def _rebuild(paths: list[Path], out: Path | None) -> int:
    """The worst exit status of the runs: one that is damaged costs its own page alone."""
    from qwen3bench.record.files import find_runs
    from qwen3bench.reporting.across import write_overview

    console = Console()
    directories = find_runs(paths)
    if out and len(directories) == 1:
        raise UserError(f"--out is for the page over several runs; {directories[0]} is one, and keeps its report")
    runs: list[Run] = []

    def rebuild(directory: Path) -> int:
        runs.append(_rebuilt(directory, console, alone=len(directories) == 1))
        return 0

    worst = 0
    for directory in directories:
        status = guarded(partial(rebuild, directory))
        if status > 1:  # interrupted
            return status
        worst = max(worst, status)
    if len(runs) > 1:
        overview = write_overview(runs, out or _home(paths, directories))
        console.print(f"Over all runs: {overview}", soft_wrap=True, markup=False, highlight=False)
    return worst


def _rebuilt(directory: Path, console: Console, *, alone: bool) -> Run:
    """One run, its tables and report written."""
    from qwen3bench.analysis.run import load_run, write_derived
    from qwen3bench.record.files import clean_stale
    from qwen3bench.reporting.findings import findings
    from qwen3bench.reporting.pages import write_report
    from qwen3bench.reporting.terminal import terminal_summary

    run = load_run(directory)
    clean_stale(directory)
    write_derived(run)
    found = findings(run)
    report = write_report(run, found)
    if alone:
        terminal_summary(run, console)
    else:
        console.print(f"Report: {report}", soft_wrap=True, markup=False, highlight=False)
    return run


def _home(paths: list[Path], directories: list[Path]) -> Path:
    """Where the page over runs goes: the multirun's directory, else `over-runs` beside the first run."""
    return paths[0] if len(paths) == 1 else directories[0].parent / "over-runs"


if __name__ == "__main__":
    sys.exit(main())
