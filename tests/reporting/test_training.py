"""What a report says of training steps: memory by part and by switch, the time of parts, and no false control."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from matplotlib import pyplot

from qwen3bench.analysis.run import Run, load_run
from qwen3bench.reporting import plot_memory_parts, tables
from qwen3bench.reporting.conditions import conditions
from qwen3bench.reporting.control_findings import control_list
from qwen3bench.reporting.finding import Check
from qwen3bench.reporting.pages import write_report
from qwen3bench.reporting.wording.sentences import sentence
from tests.records import write_record

Line = dict[str, Any]
GRADIENTS, MOMENTS, ACTIVATIONS = 2 * 10**9, 4 * 10**9, 6 * 10**9


def trained(lines: list[Line]) -> list[Line]:
    """The lines of a run that trained in bf16, of which the memory is known by part."""
    lines[0]["config"]["workload"]["train"]["precision"] = "bf16"
    cells = lines[0]["cells"]
    for line in lines:
        if line["type"] == "memory":
            line |= {"gradient_bytes": GRADIENTS, "optimizer_bytes": MOMENTS, "activation_bytes": ACTIVATIONS}
            line["peak_allocated_bytes"] += 20 * 10**9
        if line["type"] == "evidence":
            line["parts_s"] = {"forward": 0.04, "loss": 0.03, "backward": 0.09, "optimizer": 0.006}
    judged = [{"type": "gradients", "cell": cell, "workload": "train", "equivalent": True} for cell in cells]
    return [*lines[:-1], *judged, lines[-1]]


@pytest.fixture(scope="module")
def run(record_lines: Callable[..., list[Line]], tmp_path_factory: pytest.TempPathFactory) -> Run:
    lines = trained(record_lines(factors=("flash", "tie", "mask"), workloads=("train",)))
    return load_run(write_record(tmp_path_factory.mktemp("train"), lines))


def test_cells_hold_the_parts_and_count_tokens(run: Run) -> None:
    cells = run.cells.set_index("cell")
    assert set(cells["gradient_bytes"]) == {GRADIENTS}
    assert set(cells["optimizer_bytes"]) == {MOMENTS}
    assert set(cells["activation_bytes"]) == {ACTIVATIONS}
    assert set(cells["dtype"]) == {"bf16"}
    assert cells.loc["baseline", "tokens_per_s"] == pytest.approx(512 / cells.loc["baseline", "latency_s"])


@pytest.mark.parametrize(("precision", "size"), [("amp", 4), ("bf16", 2)])
def test_weights_are_those_of_the_precision(
    record_lines: Callable[..., list[Line]], tmp_path: Path, precision: str, size: int
) -> None:
    lines = trained(record_lines(factors=("flash", "tie"), workloads=("prefill", "train")))
    lines[0]["config"]["workload"]["train"]["precision"] = precision
    cells = load_run(write_record(tmp_path / "run", lines)).cells
    of_training, of_inference = (cells[cells["workload"] == name] for name in ("train", "prefill"))
    assert (of_training["parameter_bytes"] == size * of_training["num_parameters"]).all()
    assert (of_inference["parameter_bytes"] == 2 * of_inference["num_parameters"]).all()


def test_tie_is_no_control_of_training(run: Run) -> None:
    checks = {finding.detail.check for finding in control_list(run)}
    assert Check.TIE_LATENCY not in checks
    assert Check.AA in checks
    said = [sentence(finding) for finding in control_list(run)]
    assert "Gradients: all 8 verified cells train as the baseline does." in said


def test_memory_is_drawn_by_part(run: Run) -> None:
    (condition,) = conditions(run)
    plot = plot_memory_parts.memory_parts(run, condition)
    assert plot is not None
    (axes,) = plot.figure.axes
    heights = [[bar.get_width() for bar in container] for container in axes.containers]
    assert len(heights) == 5
    total = [sum(each) for each in zip(*heights, strict=True)]
    peaks = sorted(run.cells["peak_allocated_bytes"].astype(float) / 2**30, reverse=True)
    assert total == pytest.approx(peaks)
    assert "at the peak" in plot.title
    pyplot.close(plot.figure)


def test_parts_of_a_step_are_a_table(run: Run) -> None:
    table = tables.parts_table(run.evidence)
    assert table is not None
    said = dict(table.constants)
    assert said["forward (ms)"] == "40.00"
    assert said["optimizer (ms)"] == "6.000"


def test_inference_has_neither(full_run: Run) -> None:
    assert tables.parts_table(full_run.evidence) is None
    assert all(plot_memory_parts.memory_parts(full_run, each) is None for each in conditions(full_run))
    assert full_run.cells["gradient_bytes"].isna().all()


@pytest.mark.slow
def test_the_page_shows_both(run: Run) -> None:
    page = write_report(run).with_suffix(".md").read_text("utf-8")
    assert "memory-parts-train-graph.svg" in page
    assert "How long the parts of a step take" in page
    assert "Negative control" not in page
    assert "each visit begins from the same weights" in page
