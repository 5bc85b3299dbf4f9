"""`python -m qwen3bench.report RUN…`: rebuild the report of finished or partial runs; measures nothing."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rich.console import Console

from qwen3bench.config.cli import Parser, guarded
from qwen3bench.errors import UserError


def main(arguments: list[str] | None = None) -> int:
    """Rebuild cells.csv, effects.csv and the report of each run, and of several together; the exit status."""
    return guarded(lambda: _main(arguments))


def _main(arguments: list[str] | None) -> int:
    options = _parser().parse_args(arguments)
    _rebuild([Path(name) for name in options.runs], options.out)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m qwen3bench.report",
        description="Rebuild the report of finished or partial runs from their records. Measures nothing.",
        epilog="Several runs, or a multirun's directory, give one page over all of them as well.",
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="directory of a run, or of a multirun")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where the page over several runs goes")
    return parser


def _rebuild(paths: list[Path], out: Path | None) -> None:
    from qwen3bench.analysis.run import load_run, write_derived
    from qwen3bench.record.files import clean_stale, find_runs
    from qwen3bench.reporting.across import write_overview
    from qwen3bench.reporting.findings import findings
    from qwen3bench.reporting.pages import write_report
    from qwen3bench.reporting.terminal import terminal_summary

    console = Console()
    directories = find_runs(paths)
    if out and len(directories) == 1:
        raise UserError(f"--out is for the page over several runs; {directories[0]} is one, and keeps its report")
    runs = []
    for directory in directories:
        clean_stale(directory)
        run = load_run(directory)
        write_derived(run)
        found = findings(run)
        report = write_report(run, found)
        runs.append(run)
        if len(directories) == 1:
            terminal_summary(run, found, console)
        else:
            console.print(f"Report: {report}", soft_wrap=True, markup=False, highlight=False)
    if len(runs) > 1:
        overview = write_overview(runs, out or _home(paths, directories))
        console.print(f"Over all runs: {overview}", soft_wrap=True, markup=False, highlight=False)


def _home(paths: list[Path], directories: list[Path]) -> Path:
    """Where the page over runs goes: the multirun's directory, else `over-runs` beside the first run."""
    return paths[0] if len(paths) == 1 else directories[0].parent / "over-runs"


if __name__ == "__main__":
    sys.exit(main())
