"""A report is quick, however many cells it has."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from records import write_record

from qwen3bench.report import main


@pytest.mark.slow
@pytest.mark.parametrize(("factors", "limit_s"), [(5, 5), (10, 30)])
def test_a_report_keeps_its_time(
    record_lines: Callable[..., list[dict[str, Any]]], tmp_path: Path, factors: int, limit_s: float
) -> None:
    """In processor time, which other processes of the machine do not lengthen."""
    names = ("flash", "tie", "mlp", "mask", "norm", "a", "b", "c", "d", "e")[:factors]
    write_record(tmp_path, record_lines(factors=names))
    before = time.process_time()
    assert main([str(tmp_path)]) == 0
    assert time.process_time() - before < limit_s
