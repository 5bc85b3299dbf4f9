"""A switch that changes nothing that runs is named before time is spent on it, and in the report."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from qwen3bench.reporting.finding import Kind
from qwen3bench.reporting.findings import findings
from qwen3bench.reporting.wording.sentences import sentence

Measure = Callable[..., Any]
FULL = ("design=full", "opt=tie,mask")
SEEN = {"does": "answer", "op": "evidence"}
SAME = {**SEEN, "fields": {"output": "a"}}  # tie is seen all the same, by what it stores
IDLE = "mask changes neither the kernels that run nor the output"
SAID = f"{IDLE} (prefill eager), in both pairs of cells"


def idle(done: Any) -> list[str]:
    return [sentence(finding) for finding in findings(done.run) if finding.kind == Kind.IDLE]


@pytest.mark.slow
def test_it_is_told_while_it_runs_and_in_the_report(measure: Measure) -> None:
    done = measure(*FULL, faults=[SAME], report=True)
    assert done.status == 0
    assert done.err.count(SAID) == 1
    assert "tie changes neither" not in done.err
    (said,) = idle(done)
    assert said.startswith(f"{IDLE} (prefill 1×16 eager), in both pairs of cells. Any effect on its latency")
    assert IDLE in (done.directory / "report.md").read_text(encoding="utf-8")


def test_one_bit_in_one_cell_is_enough(measure: Measure) -> None:
    done = measure(*FULL, faults=[{**SEEN, "cell": "tie+mask", "fields": {"output": "b", "tied_storage": True}}, SAME])
    assert IDLE not in done.err
    assert not idle(done)


@pytest.mark.slow
def test_it_is_told_before_the_timing_and_a_continued_run_tells_it_too(measure: Measure) -> None:
    stopped = measure(*FULL, faults=[{**SAME}, {"does": "error", "op": "ceilings", "status": "refused"}])
    assert (stopped.status, stopped.err.count(SAID)) == (1, 1)
    done = measure(resume=stopped.directory)
    assert (done.status, done.err.count(SAID)) == (0, 1)
    screened = measure("design=screen", "opt=tie,mask", faults=[SAME], to=stopped.directory.with_name("screen"))
    assert screened.err.count(IDLE) == 1
