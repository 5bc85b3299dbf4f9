"""`python -m qwen3bench.compare A B`: what changed between two runs; a regression gate for CI."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from qwen3bench.analysis.comparison import compare
from qwen3bench.analysis.run import load_run
from qwen3bench.config.cli import Parser, guarded
from qwen3bench.errors import UserError
from qwen3bench.record.files import write_atomic
from qwen3bench.reporting.comparison_page import comparison_page


def main(argv: Sequence[str] | None = None) -> int:
    """Prints what changed between two runs as markdown.

    Returns 0; 3 with `--fail-on slower` where something got slower or is no longer measured; 1 where a run cannot be
    read, or such a gate is given runs of different sizes.
    """
    return guarded(lambda: _main(argv))


def _main(argv: Sequence[str] | None) -> int:
    parser = Parser(
        prog="python -m qwen3bench.compare",
        description="What changed between two runs: settings, cells and effects. Measures nothing.",
    )
    parser.add_argument("a", metavar="RUN_A", help="directory of the run to compare with")
    parser.add_argument("b", metavar="RUN_B", help="directory of the run to judge")
    parser.add_argument("--fail-on", choices=["slower"], help="exit 3 where a cell or an effect got slower")
    parser.add_argument("--html", metavar="FILE", type=Path, help="write the comparison as one HTML file too")
    options = parser.parse_args(argv)
    comparison = compare(load_run(options.a), load_run(options.b))
    if options.fail_on and comparison.unlike:
        raise UserError(f"{options.a} and {options.b} measure different things: {'; '.join(comparison.unlike)}")
    title = f"{options.a} → {options.b}"
    if options.html:
        write_atomic(options.html, comparison_page(comparison, title, "html"))
    status = 3 if options.fail_on == "slower" and (comparison.slower or comparison.lost) else 0
    with suppress(BrokenPipeError):  # whoever reads has seen enough (`… | head`); the verdict stands
        print(comparison_page(comparison, title, "md"), end="", flush=True)
        return status
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return status


if __name__ == "__main__":
    sys.exit(main())
