from collections.abc import Callable
from typing import Any

import pytest

from qwen3bench.analysis.run import Run
from qwen3bench.reporting.conditions import conditions
from qwen3bench.reporting.findings import findings
from qwen3bench.reporting.stacking import Stack, stack

Lines = list[dict[str, Any]]


def first(run: Run) -> Stack | None:
    return stack(run, conditions(run)[0], findings(run))


@pytest.fixture
def run(record_lines: Callable[..., Lines], run_of: Callable[[Lines], Run]) -> Run:
    return run_of(record_lines(factors=("flash", "mask", "norm")))


def test_interactions_are_sentences_and_what_ran_is_a_table(run: Run) -> None:
    found = first(run)
    assert found
    assert len(found.sentences) == 1
    assert found.sentences[0].startswith("mask helps only with flash: 1.04")
    assert found.note == "2 other pairs of 3: a smaller joint effect, or none shown."
    assert found.halves
    (row,) = found.halves.rows
    assert [entry.text for entry in row[:2]] == ["mask", "flash"]
    assert row[2].text.startswith("1.04")
    assert row[3].text.endswith("] same")
    assert found.ran
    assert [row[0].text for row in found.ran.rows] == ["baseline", "flash", "mask", "flash+mask"]
    assert {"attention", "kernel launches", "notes"} <= set(found.ran.headings)


def test_a_cell_that_failed_explains_no_interaction(
    record_lines: Callable[..., Lines], run_of: Callable[[Lines], Run]
) -> None:
    lines = record_lines(factors=("flash", "mask", "norm"))
    failure = {"type": "failure", "cell": "mask", "workload": "prefill", "runtime": "graph", "status": "oom"}
    found = first(run_of([*lines[:-1], failure, lines[-1]]))
    assert found
    assert found.ran
    assert "mask" not in [row[0].text for row in found.ran.rows]


def test_one_cell_alone_explains_no_interaction(
    record_lines: Callable[..., Lines], run_of: Callable[[Lines], Run]
) -> None:
    def with_evidence_of(*cells: str) -> Stack | None:
        lines = record_lines(factors=("flash", "mask", "norm"))
        return first(run_of([line for line in lines if line["type"] != "evidence" or line["cell"] in cells]))

    one, two = with_evidence_of("flash"), with_evidence_of("flash", "mask")
    assert one
    assert two
    assert one.ran is None
    assert two.ran


def test_that_nothing_interacts_is_said(record_lines: Callable[..., Lines], run_of: Callable[[Lines], Run]) -> None:
    found = first(run_of(record_lines(factors=("flash", "tie"))))
    assert found == Stack((), "No interaction of 1 pair is shown.", None, None)


def test_cells_that_tell_of_no_pair_have_no_section(
    record_lines: Callable[..., Lines], run_of: Callable[[Lines], Run]
) -> None:
    assert first(run_of(record_lines(factors=("flash",)))) is None
