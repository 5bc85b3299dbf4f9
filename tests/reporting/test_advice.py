import math
from collections.abc import Callable
from typing import Any

import pytest

from qwen3bench.analysis.run import Run
from qwen3bench.reporting.advice import all_cells, more_blocks, more_processes, spent, within_reason
from qwen3bench.reporting.conditions import conditions
from qwen3bench.reporting.finding import Advice, Kind
from qwen3bench.reporting.findings import findings

Lines = list[dict[str, Any]]
START, WORK = 1_000.0, 1_030.0


def timed(lines: Lines, setup_s: float = 10.0, block_s: float = 2.0) -> Lines:
    """The lines with times: a session, a process's set-up before its first block, each block's seconds."""
    clock, seen = WORK, set()
    for line in lines:
        if line["type"] == "session":
            line["time"] = START
        if line["type"] == "block":
            if line["process"] not in seen:
                begun = next(each for each in lines if each["type"] == "process" and each["process"] == line["process"])
                clock += setup_s if seen else 0.0
                begun["time"] = clock
                seen.add(line["process"])
            clock += block_s
            line |= {"elapsed_s": block_s, "time": clock}
    return lines


@pytest.fixture
def run(record_lines: Callable[..., Lines], run_of: Callable[[Lines], Run]) -> Run:
    """Two processes of three blocks of 2 s each, 10 s to set up the second, 30 s before the first."""
    return run_of(timed(record_lines(factors=("flash", "tie"))))


def test_what_a_run_spent_is_read_from_its_record(run: Run) -> None:
    now = spent(run, conditions(run)[0])
    assert (now.blocks, now.processes) == (6, 2)
    assert (now.measured_s, now.setup_s, now.before_s) == pytest.approx((12, 10, 30))


def test_more_processes_take_their_blocks_and_their_set_up(run: Run) -> None:
    advice = more_processes(run, conditions(run)[0], 8)
    assert advice.settings == ("measure.min_processes=8", "measure.max_seconds=60")
    assert advice.seconds == pytest.approx(30 + 8 * (6 + 10))


def test_more_blocks_than_a_run_takes_by_itself_are_allowed(run: Run) -> None:
    advice = more_blocks(run, conditions(run)[0], 600)
    assert advice.settings == ("measure.min_blocks=600", "measure.max_seconds=1500", "measure.max_blocks=600")
    assert advice.seconds == pytest.approx(30 + 1200 + 200 * 10)


def test_of_several_conditions_one_is_named(record_lines: Callable[..., Lines], run_of: Callable[[Lines], Run]) -> None:
    run = run_of(record_lines(factors=("flash",), workloads=("prefill", "decode")))
    advice = more_processes(run, conditions(run)[1], 4)
    assert advice.settings == ("workload=decode", "runtime=graph", "measure.min_processes=4")
    assert advice.seconds is None  # the record has no times


def test_all_cells_take_as_much_more_as_they_are_more(run: Run) -> None:
    advice = all_cells(run, 2)
    assert advice.settings == ("design=full",)
    assert advice.seconds == pytest.approx(2 * (30 + 12 + 2 * 10))


def test_of_many_switches_a_screen_is_advised_and_no_design_that_is_refused(
    record_lines: Callable[..., Lines], run_of: Callable[[Lines], Run], nine: tuple[str, ...]
) -> None:
    lines = record_lines(nine, screen=True, memory=False, evidence=False, blocks=1)
    ends = ("baseline", "+".join(nine))
    pair = [line for line in lines if line.get("cell", "baseline") in ends]
    run = run_of([{**pair[0], "cells": list(ends)}, *pair[1:]])
    (untold,) = [finding for finding in findings(run) if finding.kind == Kind.UNTOLD]
    assert untold.advice == Advice(("design=screen", "design.resolution=5"))


def test_what_takes_hours_is_out_of_reach_and_says_what_ten_minutes_tell(run: Run) -> None:
    """The run has measured 12 s and set up two processes in 20, 30 s after it began."""
    condition = conditions(run)[0]
    soon, late = more_processes(run, condition, 200), more_processes(run, condition, 9830)
    assert within_reason(run, condition, soon, 0.012) == soon
    found = within_reason(run, condition, late, 0.012)
    assert found.settings == ()
    assert found.seconds == pytest.approx(30 + 9830 * 16)
    assert found.reach == pytest.approx(0.012 * math.sqrt(32 / 570))
    cells = Advice(("design.cells=128",), 7200.0)
    assert within_reason(run, condition, cells, 0.012) == Advice((), 7200.0)
    unknown = Advice(("measure.min_processes=9830",))
    assert within_reason(run, condition, unknown, 0.012) == unknown


def test_a_run_that_took_long_itself_may_be_doubled(
    record_lines: Callable[..., Lines], run_of: Callable[[Lines], Run]
) -> None:
    run = run_of(timed(record_lines(factors=("flash",)), block_s=600.0))
    condition = conditions(run)[0]
    double, many = (more_processes(run, condition, processes) for processes in (4, 64))
    assert within_reason(run, condition, double, 0.012) == double
    assert within_reason(run, condition, many, 0.012) == Advice((), many.seconds)
