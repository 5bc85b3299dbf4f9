"""The tables of committed runs come out of their records byte for byte, whatever becomes of the code between."""

from __future__ import annotations

from pathlib import Path

import pytest

from qwen3bench.analysis.run import load_run, to_csv

REFERENCE = Path(__file__).parents[2] / "results" / "reference"
POINT = "h100-regimes/single/0"


@pytest.mark.parametrize("name", ["h200-ablate-1x2048", "h200-screen-1x2048", POINT])
def test_tables_are_the_committed_ones(name: str) -> None:
    """All cells, a screen, a point of a multirun."""
    run = load_run(REFERENCE / name)
    for table, file in ((run.cells, "cells.csv"), (run.effects, "effects.csv")):
        assert to_csv(table).encode() == (REFERENCE / name / file).read_bytes()
