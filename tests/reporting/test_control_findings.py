import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from qwen3bench.analysis.run import Run
from qwen3bench.reporting.answer import cards
from qwen3bench.reporting.conditions import conditions
from qwen3bench.reporting.control_findings import aa_series, control_list, heard, noise, outcome_of
from qwen3bench.reporting.finding import Check, Control, ControlOutcome, Finding, Level, Passed
from qwen3bench.reporting.findings import findings
from qwen3bench.reporting.plot_controls import controls_plot
from qwen3bench.reporting.wording.sentences import sentence

Lines = list[dict[str, Any]]


def of_check(run: Run, check: Check) -> list[Finding]:
    return [f for f in control_list(run) if isinstance(f.detail, Control) and f.detail.check == check]


def outcomes(run: Run, check: Check) -> list[ControlOutcome | None]:
    return [outcome_of(finding) for finding in of_check(run, check)]


def detail(finding: Finding) -> Control:
    assert isinstance(finding.detail, Control)
    return finding.detail


def summary(run: Run) -> Passed:
    (found,) = [f.detail for f in findings(run) if isinstance(f.detail, Passed)]
    return found


def test_a_quiet_run_passes_every_control(full_run: Run) -> None:
    assert not [finding for finding in control_list(full_run) if finding.level == Level.WARNING]
    assert not of_check(full_run, Check.ONE_PROCESS)
    for check in (Check.AA, Check.TIE_LATENCY, Check.TIE_MEMORY, Check.DRIFT, Check.EQUIVALENCE, Check.HOST):
        assert of_check(full_run, check)


@pytest.mark.parametrize(("slower", "told"), [(1.051, True), (1.004, False)])
def test_processes_that_are_apart_are_told(full_run: Run, slower: float, told: bool) -> None:
    series = full_run.controls.drift_series.copy()
    series["relative_latency"] = 1.0
    series.loc[series["process"] == series["process"].max(), "relative_latency"] = slower
    run = replace(full_run, controls=replace(full_run.controls, drift_series=series))
    found = of_check(run, Check.PROCESSES)
    assert [finding.estimate for finding in found] == pytest.approx([0.051] * 4 if told else [])
    assert {outcome_of(finding) for finding in found} <= {ControlOutcome.TOLD}
    plot = controls_plot(run, conditions(run)[0])
    assert plot is not None
    assert ("processes are up to 5.1 % apart" in plot.title) == told


def test_drift_is_told_with_its_interval_and_as_that_of_a_process(full_run: Run) -> None:
    drift = full_run.controls.drift.assign(total=-0.0123, lo=-0.0301, hi=0.0049)
    run = replace(full_run, controls=replace(full_run.controls, drift=drift))
    first = of_check(run, Check.DRIFT)[0]
    condition = conditions(run)[0]
    assert (first.condition, first.estimate, first.lo, first.hi) == (str(condition), -0.0123, -0.0301, 0.0049)
    plot = controls_plot(run, condition)
    assert plot is not None
    told = "; from a process's first block to its last, latency moved by −1.23 % [−3.01, +0.49]"
    assert told in plot.title


def test_copies_that_agree_by_their_mean_alone_are_unsure_and_told_what_would_tell(full_run: Run) -> None:
    aa = full_run.controls.aa.assign(lo=0.9)
    found = of_check(replace(full_run, controls=replace(full_run.controls, aa=aa)), Check.AA)
    assert {outcome_of(finding) for finding in found} == {ControlOutcome.UNSURE}
    assert all(f.advice and "measure.min_processes=4" in f.advice.settings for f in found)  # twice as many as now


@pytest.mark.parametrize(
    ("ratio", "lo", "hi", "outcome"),
    [
        (1.001, 0.997, 1.004, ControlOutcome.PASSED),
        (1.054, 0.96, 1.157, ControlOutcome.UNSURE),
        (1.001, math.nan, math.nan, ControlOutcome.UNSURE),
        (0.998, 0.994, 1.002, ControlOutcome.UNSURE),
    ],
)
def test_copies_pass_only_where_they_are_shown_to_agree(
    full_run: Run, ratio: float, lo: float, hi: float, outcome: ControlOutcome
) -> None:
    aa = full_run.controls.aa.assign(ratio=ratio, lo=lo, hi=hi, limit=0.005)
    run = replace(full_run, controls=replace(full_run.controls, aa=aa))
    assert set(outcomes(run, Check.AA)) == {outcome}
    (card, *_) = cards(run, findings(run))
    assert ("cannot tell" in card.sure) == (outcome == ControlOutcome.UNSURE)
    assert card.switches  # what is not shown to be wrong withholds no answer


def test_the_positive_control_gives_the_bytes_of_the_head(full_run: Run) -> None:
    (finding,) = of_check(full_run, Check.TIE_MEMORY)
    assert (detail(finding).limit, detail(finding).number) == (311_164_928, 16)


def test_a_tie_that_saves_other_bytes_fails(full_run: Run) -> None:
    table = full_run.controls.tie_memory.copy()
    table.loc[table["cell"] == "flash", "ok"] = False
    run = replace(full_run, controls=replace(full_run.controls, tie_memory=table))
    (finding,) = of_check(run, Check.TIE_MEMORY)
    assert (outcome_of(finding), detail(finding).names) == (ControlOutcome.FAILED, ("flash",))


@pytest.mark.parametrize("runtime", ["graph", "compile"])
def test_noise_is_told_with_its_runtime_on_which_its_cure_depends(
    record_lines: Callable[..., Lines], run_of: Callable[[Lines], Run], runtime: str
) -> None:
    run = run_of(record_lines(factors=("flash",), copy_shift=0.05))
    for table in (run.cells, run.samples, run.controls.aa):
        table["runtime"] = runtime
    (finding,) = of_check(run, Check.AA)
    assert (outcome_of(finding), detail(finding).runtime) == (ControlOutcome.FAILED, runtime)
    assert finding.level == Level.WARNING


def test_a_control_whose_interval_reaches_beyond_its_limit_is_not_counted_as_passed(full_run: Run) -> None:
    aa = full_run.controls.aa.copy()
    aa.loc[aa.index[0], ["ratio", "lo", "hi"]] = 1.001, 0.99, 1.012
    run = replace(full_run, controls=replace(full_run.controls, aa=aa))
    assert sorted(map(str, outcomes(run, Check.AA))) == ["passed"] * 3 + ["unsure"]
    whole = summary(full_run)
    assert summary(run) == Passed(whole.passed - 1, whole.held, 1)


def test_a_single_process_is_warned_of(record_lines: Callable[..., Lines], run_of: Callable[[Lines], Run]) -> None:
    lines = record_lines(workloads=("prefill", "decode"))
    run = run_of(
        [{**line, "process": 0} if line.get("workload") == "decode" and "process" in line else line for line in lines]
    )
    (finding,) = of_check(run, Check.ONE_PROCESS)
    assert (outcome_of(finding), detail(finding).names) == (ControlOutcome.FAILED, ("decode 1×512 graph",))


def test_a_tie_that_changes_latency_fails(full_run: Run) -> None:
    table = full_run.controls.tie_latency.assign(ok=False)
    run = replace(full_run, controls=replace(full_run.controls, tie_latency=table))
    assert set(outcomes(run, Check.TIE_LATENCY)) == {ControlOutcome.FAILED}


def test_the_host_bound_share_is_graph_over_eager(full_run: Run) -> None:
    (finding,) = [finding for finding in of_check(full_run, Check.HOST) if finding.subject == "prefill"]
    shares = dict(zip(detail(finding).names, detail(finding).shares, strict=True))
    assert shares["baseline"] == pytest.approx(7.2 / 29, rel=0.01)
    assert detail(finding).limit > shares["baseline"]
    assert "passes" not in sentence(finding)  # eager was measured in blocks


def test_a_control_that_the_run_does_not_hold_is_named(
    record_lines: Callable[..., Lines], run_of: Callable[[Lines], Run]
) -> None:
    run = run_of(record_lines(factors=("flash",)))
    absent = [detail(finding).check for finding in control_list(run) if outcome_of(finding) == ControlOutcome.ABSENT]
    assert absent == [Check.TIE_LATENCY, Check.HOST]
    judged = [detail(f).check for f in control_list(run) if outcome_of(f) == ControlOutcome.PASSED]
    assert Check.DRIFT not in judged  # no limit, so nothing to pass
    assert summary(run) == Passed(len(judged), len(judged))


@pytest.mark.parametrize("capped", [0, 2])
def test_blocks_at_the_power_limit_are_counted(
    record_lines: Callable[..., Lines], run_of: Callable[[Lines], Run], capped: int
) -> None:
    lines = record_lines(factors=("flash",))
    blocks = [line for line in lines if line["type"] == "block"]
    for line in blocks:
        line["throttle_reasons"] = ["sw_power_cap"] if line in blocks[:capped] else []
    found = [(detail(f).number, detail(f).total) for f in of_check(run_of(lines), Check.POWER_CAP)]
    assert found == ([(capped, len(blocks))] if capped else [])


def test_a_few_passes_in_eager_tell_of_the_host_too(
    record_lines: Callable[..., Lines], run_of: Callable[[Lines], Run]
) -> None:
    (finding,) = of_check(run_of(record_lines(factors=("flash", "tie"), eager_look=True)), Check.HOST)
    assert detail(finding).shares[0] == pytest.approx(7.2 / 29, rel=0.01)
    assert "(eager by one to ten passes of each cell)" in sentence(finding)


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
    (finding,) = of_check(run_of(lines), Check.FLAGGED)
    assert (outcome_of(finding), detail(finding).number) == (ControlOutcome.FAILED, 2)
    assert detail(finding).names == ("hw_thermal_slowdown",)


@pytest.mark.parametrize(("every", "many"), [(31, False), (11, True)])
def test_visits_that_other_work_slowed_are_counted_and_said_beside_the_answer(
    record_lines: Callable[..., Lines], run_of: Callable[[Lines], Run], every: int, many: bool
) -> None:
    lines = record_lines(factors=("flash", "tie"), blocks=24)
    samples = [line for line in lines if line["type"] == "sample"]
    visits = list(dict.fromkeys((line["block"], line["cell"], line["copy"]) for line in samples))
    for line in samples:
        if (line["block"], line["cell"], line["copy"]) in visits[::every]:
            line["latency_s"] *= 1.8
    run = run_of(lines)
    (finding,) = of_check(run, Check.LEFT_OUT)
    assert (detail(finding).number, detail(finding).total) == (len(visits[::every]), len(visits))
    assert sentence(finding).endswith("which no estimate counts (prefill 1×512 graph).")
    (card,) = cards(run, findings(run))
    assert any("which no estimate counts" in note for note in card.notes) is many


def test_a_quiet_run_leaves_no_visit_out(full_run: Run) -> None:
    assert not of_check(full_run, Check.LEFT_OUT)


def test_without_a_second_copy_there_is_no_series(
    record_lines: Callable[..., Lines], run_of: Callable[[Lines], Run]
) -> None:
    lines = [line for line in record_lines(factors=("flash",)) if line.get("copy") != 1]
    run = run_of(lines)
    assert aa_series(run, conditions(run)[0]).empty
    assert outcomes(run, Check.AA) == [ControlOutcome.ABSENT]


def test_a_condition_says_that_the_last_logits_are_computed_alone(full_run: Run) -> None:
    last = {**full_run.config, "workload": {"prefill": {"logits_to_keep": 1}}}
    assert str(conditions(full_run)[0]) == "prefill 1×512 graph"
    assert str(conditions(replace(full_run, config=last))[0]) == "prefill 1×512 (last logits) graph"
