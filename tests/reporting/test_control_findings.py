from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from qwen3bench.analysis.run import Run
from qwen3bench.reporting.conditions import conditions
from qwen3bench.reporting.control_findings import aa_series, heard, noise, sentences
from qwen3bench.reporting.findings import findings
from qwen3bench.reporting.plot_controls import controls_plot

Lines = list[dict[str, Any]]


def said(run: Run, start: str) -> list[tuple[str, bool]]:
    return [(control.text, control.failed) for control in sentences(run) if control.text.startswith(start)]


def test_a_quiet_run_passes_every_control(full_run: Run) -> None:
    assert not [control.text for control in sentences(full_run) if control.failed]
    assert not said(full_run, "Timed in one process")
    for start in ("A/A", "Negative control", "Positive control", "Drift", "Equivalence", "Under eager"):
        assert said(full_run, start)


@pytest.mark.parametrize(("slower", "told"), [(1.051, True), (1.004, False)])
def test_processes_that_are_apart_are_told(full_run: Run, slower: float, told: bool) -> None:
    series = full_run.controls.drift_series.copy()
    series["relative_latency"] = 1.0
    series.loc[series["process"] == series["process"].max(), "relative_latency"] = slower
    run = replace(full_run, controls=replace(full_run.controls, drift_series=series))
    found = said(run, "Processes: the slowest is 5.1 % slower than the fastest")
    assert bool(found) == told
    assert not any(failed for _, failed in found)
    plot = controls_plot(run, conditions(run)[0])
    assert plot is not None
    assert ("processes are up to 5.1 % apart" in plot.title) == told


def test_drift_is_told_with_its_interval_and_as_that_of_a_process(full_run: Run) -> None:
    drift = full_run.controls.drift.assign(total=-0.0123, lo=-0.0301, hi=0.0049)
    run = replace(full_run, controls=replace(full_run.controls, drift=drift))
    told = "rom a process's first block to its last, latency moved by −1.23 % [−3.01, +0.49]"
    condition = conditions(run)[0]
    text = f"Drift: f{told} ({condition}); effects are taken within blocks."
    assert (text, False) in said(run, "Drift")
    plot = controls_plot(run, condition)
    assert plot is not None
    assert f"; f{told}" in plot.title


def test_copies_that_agree_by_their_mean_alone_are_said_to(full_run: Run) -> None:
    further = "The interval reaches further: more processes would tell."
    assert not [text for text, _ in said(full_run, "A/A") if text.endswith(further)]
    aa = full_run.controls.aa.assign(lo=0.9)
    found = said(replace(full_run, controls=replace(full_run.controls, aa=aa)), "A/A")
    assert [(text.endswith(further), failed) for text, failed in found] == [(True, False)] * len(aa)


def test_the_positive_control_gives_the_bytes_of_the_head(full_run: Run) -> None:
    ((text, _),) = said(full_run, "Positive control")
    assert "311,164,928 bytes" in text
    assert "16 pairs" in text


def test_a_tie_that_saves_other_bytes_fails(full_run: Run) -> None:
    table = full_run.controls.tie_memory.copy()
    table.loc[table["cell"] == "flash", "ok"] = False
    run = replace(full_run, controls=replace(full_run.controls, tie_memory=table))
    ((text, failed),) = said(run, "Positive control")
    assert failed
    assert text.endswith("when added to flash.")


@pytest.mark.parametrize(("runtime", "mend"), [("graph", "on a quiet machine."), ("compile", "in more processes.")])
def test_noise_is_told_with_what_would_mend_it(
    record_lines: Callable[..., Lines], run_of: Callable[[Lines], Run], runtime: str, mend: str
) -> None:
    run = run_of(record_lines(factors=("flash",), copy_shift=0.05))
    for table in (run.cells, run.samples, run.controls.aa):
        table["runtime"] = runtime
    ((text, failed),) = said(run, "Noisy")
    assert failed
    assert text.endswith(mend)


def test_a_control_whose_interval_reaches_beyond_its_limit_is_not_counted_as_passed(full_run: Run) -> None:
    aa = full_run.controls.aa.copy()
    aa.loc[aa.index[0], ["ratio", "lo", "hi"]] = 1.001, 0.99, 1.012
    run = replace(full_run, controls=replace(full_run.controls, aa=aa))
    marks = {control.text: control.mark for control in sentences(run) if control.text.startswith("A/A")}
    assert [mark for text, mark in marks.items() if "more processes would tell" in text] == ["–"]
    assert set(marks.values()) == {"–", "✓"}
    (text,) = [finding.text for finding in findings(run) if finding.kind == "control" and finding.level == "plain"]
    (whole,) = [f.text for f in findings(full_run) if f.kind == "control" and f.level == "plain"]
    passed, held = int(whole.split()[0]), int(whole.split()[2])
    assert text == f"{passed - 1} of {held} controls show nothing wrong; the interval of 1 reaches too far to tell."


def test_a_single_process_is_warned_of(record_lines: Callable[..., Lines], run_of: Callable[[Lines], Run]) -> None:
    lines = record_lines(workloads=("prefill", "decode"))
    run = run_of(
        [{**line, "process": 0} if line.get("workload") == "decode" and "process" in line else line for line in lines]
    )
    ((text, failed),) = said(run, "Timed in one process")
    assert failed
    assert "(decode 1×512 graph)" in text


def test_a_tie_that_changes_latency_fails(full_run: Run) -> None:
    table = full_run.controls.tie_latency.assign(ok=False)
    run = replace(full_run, controls=replace(full_run.controls, tie_latency=table))
    assert all(failed for _, failed in said(run, "Negative control"))


def test_the_host_bound_share_is_graph_over_eager(full_run: Run) -> None:
    text = next(text for text, _ in said(full_run, "Under eager") if "in prefill" in text)
    assert "25 % of the time (baseline)" in text
    assert "not kernel time" in text


def test_a_control_that_the_run_does_not_hold_is_named(
    record_lines: Callable[..., Lines], run_of: Callable[[Lines], Run]
) -> None:
    run = run_of(record_lines(factors=("flash",)))
    absent = [control for control in sentences(run) if control.absent]
    assert [control.text.partition(":")[0] for control in absent] == ["Negative control", "Host"]
    assert all(control.mark == "–" for control in absent)
    held = [control for control in sentences(run) if control.mark == "✓"]
    assert not [control.text for control in held if control.text.startswith("Drift")]  # no limit, so nothing to pass
    texts = [finding.text for finding in findings(run) if finding.kind == "control"]
    assert texts == [f"{len(held)} of {len(held)} controls show nothing wrong."]


@pytest.mark.parametrize("capped", [0, 2])
def test_blocks_at_the_power_limit_are_counted(
    record_lines: Callable[..., Lines], run_of: Callable[[Lines], Run], capped: int
) -> None:
    lines = record_lines(factors=("flash",))
    blocks = [line for line in lines if line["type"] == "block"]
    for line in blocks:
        line["throttle_reasons"] = ["sw_power_cap"] if line in blocks[:capped] else []
    expected = [(f"{capped} of {len(blocks)} blocks ended at the card's power limit", False)] if capped else []
    found = [(text.partition(",")[0], failed) for text, failed in said(run_of(lines), f"{capped} of")]
    assert [(text, failed) for text, failed in found if "power" in text] == expected


def test_a_few_passes_in_eager_tell_of_the_host_too(
    record_lines: Callable[..., Lines], run_of: Callable[[Lines], Run]
) -> None:
    (text,) = (text for text, _ in said(run_of(record_lines(factors=("flash", "tie"), eager_look=True)), "Under eager"))
    assert "25 % of the time (baseline)" in text


def test_noise_hides_what_is_smaller_than_it(
    record_lines: Callable[..., Lines], run_of: Callable[[Lines], Run]
) -> None:
    run = run_of(record_lines(factors=("flash",), copy_shift=-0.02))
    (condition,) = conditions(run)
    assert noise(run, condition) == pytest.approx(0.02, abs=0.002)
    assert heard(run, condition, "faster", 1.01) == "noise"
    assert heard(run, condition, "slower", 0.99) == "noise"
    assert heard(run, condition, "faster", 1.1) == "faster"
    assert aa_series(run, condition)["ratio"].mean() == pytest.approx(0.98, abs=0.002)


def test_a_quiet_condition_hides_nothing(full_run: Run) -> None:
    condition = conditions(full_run)[0]
    assert noise(full_run, condition) == 0
    assert heard(full_run, condition, "faster", 1.0001) == "faster"


def test_blocks_under_a_disturbance_are_counted(
    record_lines: Callable[..., Lines], run_of: Callable[[Lines], Run]
) -> None:
    lines = record_lines(factors=("flash",))
    for line in [line for line in lines if line["type"] == "block"][:2]:
        line |= {"state": "flagged", "flags": ["hw_thermal_slowdown"]}
    ((text, failed),) = said(run_of(lines), "2 blocks")
    assert failed
    assert text == "2 blocks measured under a disturbance that stayed: hw_thermal_slowdown."


def test_without_a_second_copy_there_is_no_series(
    record_lines: Callable[..., Lines], run_of: Callable[[Lines], Run]
) -> None:
    lines = [line for line in record_lines(factors=("flash",)) if line.get("copy") != 1]
    run = run_of(lines)
    assert aa_series(run, conditions(run)[0]).empty
    assert said(run, "A/A") == [("A/A: no second copy of the baseline was timed.", False)]
