"""`python -m qwen3bench ARGUMENT…`, but for the report, as drawing takes longer than all else."""

from __future__ import annotations

import sys

from qwen3bench.campaign import launch
from qwen3bench.config.cli import main

if __name__ == "__main__":
    launch.write_report = lambda run, _: run.path / "report.html"  # type: ignore[assignment]
    sys.exit(main(sys.argv[1:], launch.run))
