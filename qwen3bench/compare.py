"""`python -m qwen3bench.compare A B`: what changed between two runs; a regression gate for CI."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from qwen3bench.analysis.comparison import TOLERANCE, Comparison, compare
from qwen3bench.analysis.run import load_run
from qwen3bench.config.cli import Parser, guarded
from qwen3bench.errors import UserError
from qwen3bench.record.files import write_atomic
from qwen3bench.reporting.comparison_page import comparison_page

_EXITS = """\
Exit status with --fail-on slower:
  0  nothing got slower by the tolerance: every ratio is shown to have lost less
  3  something got slower, or a cell is no longer ok or no longer measured
  4  the runs cannot tell: their controls fail, or a change of the tolerance
     would not be seen. The page says what would tell.
  1  an error: a run cannot be read, both are one, or they measure different things
Status 3 goes before 4. Without --fail-on it is 0, or 1.

Judged are main effects, each cell's speed-up over the baseline, and its ratio
to a peer that both runs have. What every cell shares is seen by --latency alone.
docs/ci.md has a recipe and the reasons."""


def main(argv: Sequence[str] | None = None) -> int:
    """Prints what changed between two runs as markdown.

    Returns 0. With `--fail-on slower` also 3 where something got slower or is no longer measured, and 4 where the runs
    cannot tell. 1 where a run cannot be read, or such a gate is given runs of different sizes.
    """
    return guarded(lambda: _main(argv))


def _main(argv: Sequence[str] | None) -> int:
    options = _parser().parse_args(argv)
    runs = load_run(options.a), load_run(options.b)
    if runs[0].record.path.samefile(runs[1].record.path):
        raise UserError(f"{options.a} and {options.b} are the same run; name two")
    comparison = compare(*runs, options.tolerance, latency=options.latency)
    if options.fail_on and comparison.unlike:
        raise UserError(f"{options.a} and {options.b} measure different things: {'; '.join(comparison.unlike)}")
    title = f"A: {options.a} → B: {options.b}"
    if options.html:
        write_atomic(options.html, comparison_page(comparison, title, "html"))
    status = _status(comparison) if options.fail_on else 0
    with suppress(BrokenPipeError):  # whoever reads has seen enough (`… | head`); the verdict stands
        print(comparison_page(comparison, title, "md"), end="", flush=True)
        return status
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return status


def _status(comparison: Comparison) -> int:
    return 3 if comparison.regressed else 4 if comparison.doubts else 0


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m qwen3bench.compare",
        description="What changed between two runs: settings, effects and ratios within a run. Measures nothing.",
        epilog=_EXITS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("a", metavar="RUN_A", help="directory of the run to compare with")
    parser.add_argument("b", metavar="RUN_B", help="directory of the run to judge")
    parser.add_argument("--fail-on", choices=["slower"], help="be a gate: the exit status is the verdict")
    parser.add_argument(
        "--tolerance",
        type=_fraction,
        default=TOLERANCE,
        metavar="FRACTION",
        help=f"the loss that counts, as a fraction of the latency (default {TOLERANCE:g})",
    )
    parser.add_argument(
        "--latency",
        action="store_true",
        help="judge raw latencies too, where the machine is yours alone: its drift counts as a change",
    )
    parser.add_argument("--html", metavar="FILE", type=Path, help="write the comparison as one HTML file too")
    return parser


def _fraction(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no fraction between 0 and 1; 3 % is 0.03")
    return value


if __name__ == "__main__":
    sys.exit(main())
