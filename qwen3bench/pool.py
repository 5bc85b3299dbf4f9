"""`python -m qwen3bench.pool RUN RUN… --out DIR`: runs of the same question on several machines as one."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from qwen3bench.config.cli import Parser, guarded


def main(argv: Sequence[str] | None = None) -> int:
    """Writes the page over the runs and prints what it says. Returns 0, or 1 where they are not of one question."""
    return guarded(lambda: _main(argv))


def _main(argv: Sequence[str] | None) -> int:
    from qwen3bench.analysis.pooling import pool
    from qwen3bench.analysis.run import load_run
    from qwen3bench.record.files import find_runs
    from qwen3bench.reporting.pool_page import pool_sentences, pool_warnings, write_pool

    options = _parser().parse_args(argv)
    runs = [load_run(directory) for directory in find_runs([Path(name) for name in options.runs])]
    pooled = pool(runs, options.machines)
    page = write_pool(pooled, options.out)
    console = Console()
    warnings = [f"Warning: {text}" for text in pool_warnings(pooled)]
    for text in (*warnings, *pool_sentences(pooled), f"Report: {page}"):
        console.print(text, soft_wrap=True, markup=False, highlight=False)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m qwen3bench.pool",
        description="Runs of the same question on several machines as one analysis. Measures nothing.",
        epilog="Machine, card, process and block are levels of replication; intervals hold for this kind of card.",
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="directory of a run, or of several")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where the page goes")
    parser.add_argument(
        "--machines",
        type=_names,
        metavar="NAME,NAME,…",
        help="the machine of each run, where a record does not name it, or machines share a name",
    )
    return parser


def _names(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    if not all(names):
        raise argparse.ArgumentTypeError(f"{text!r} has an empty name; name the machine of each run, in their order")
    return names


if __name__ == "__main__":
    sys.exit(main())
