"""A report is quick, however many cells it has."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from records import write_record

from qwen3bench.report import main


@pytest.mark.slow
@pytest.mark.parametrize(
    ("factors", "workloads", "copy_shift", "limit_s"),
    [(5, 1, 0.0, 5), (7, 2, 0.0, 20), (7, 2, 0.05, 20), (10, 1, 0.0, 30)],
    ids=["32 cells", "128 cells twice", "128 cells twice, noisy", "1,024 cells"],
)
def test_a_report_keeps_its_time(
    record_lines: Callable[..., list[dict[str, Any]]],
    tmp_path: Path,
    factors: int,
    workloads: int,
    copy_shift: float,
    limit_s: float,
) -> None:
    """In processor time, which other processes of the machine do not lengthen."""
    names = ("flash", "tie", "mlp", "mask", "norm", "a", "b", "c", "d", "e")[:factors]
    of = ("prefill", "decode")[:workloads]
    write_record(tmp_path, record_lines(factors=names, workloads=of, copy_shift=copy_shift))
    before = time.process_time()
    assert main([str(tmp_path)]) == 0
    assert time.process_time() - before < limit_s
