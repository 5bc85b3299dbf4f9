"""A report is quick, however many cells it has."""

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from records import write_record
from rich.console import Console

from qwen3bench.analysis.run import Run
from qwen3bench.report import main
from qwen3bench.reporting import findings_cells, findings_effects
from qwen3bench.reporting.conditions import conditions
from qwen3bench.reporting.findings import findings
from qwen3bench.reporting.terminal import terminal_summary


def test_a_pair_is_analyzed_once_whoever_asks(full_run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[object, ...]] = []
    halves = findings_effects.halves

    def counted(run: Run, *pair: Any) -> Any:
        asked.append(pair)
        return halves(run, *pair)

    monkeypatch.setattr(findings_effects, "halves", counted)
    run = replace(full_run)
    findings(run)
    terminal_summary(run, Console(quiet=True))
    assert asked
    assert len(asked) == len(set(asked))


def test_what_to_switch_on_is_worked_out_once_for_each_condition(full_run: Run) -> None:
    before = findings_cells.recommended.cache_info()
    run = replace(full_run)
    findings(run)
    terminal_summary(run, Console(quiet=True))
    after = findings_cells.recommended.cache_info()
    assert after.misses - before.misses == len(conditions(run))
    assert after.hits > before.hits


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
