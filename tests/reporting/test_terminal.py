"""The closing text of a run: what to switch on, the effects, the report; at most 25 lines, no number broken."""

import io
import re
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
from rich.console import Console

from qwen3bench.analysis.run import Run
from qwen3bench.reporting import terminal
from qwen3bench.reporting.finding import Effect, Finding, Kind, Pair
from qwen3bench.reporting.terminal import MAX_LINES, terminal_summary

Lines = list[dict[str, Any]]
RunOf = Callable[[Lines], Run]
NUMBER = re.compile(r"\d[\d.,]*[×%]?")


def printed(run: Run, width: int = 100, beside: int = 0) -> list[str]:
    out = io.StringIO()
    terminal_summary(run, Console(file=out, force_terminal=True, width=width, color_system=None), beside)
    return out.getvalue().splitlines()


@pytest.fixture(scope="module")
def wide(full_run: Run) -> list[str]:
    return printed(full_run)


def test_it_is_plain_and_a_hundred_columns_wide_where_there_is_no_terminal(
    full_run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    out = io.StringIO()
    terminal_summary(full_run, Console(file=out))
    assert "\x1b" not in out.getvalue()
    assert 80 < max(map(len, out.getvalue().splitlines()[:-1])) <= 100


def test_columns_in_the_environment_are_kept_to(full_run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    out = io.StringIO()
    terminal_summary(full_run, Console(file=out))
    assert max(map(len, out.getvalue().splitlines()[:-1])) <= 40


def test_each_condition_names_the_switches_to_turn_on(wide: list[str]) -> None:
    answer = re.compile(
        r"^(prefill|decode) 1×512 (graph|eager): \+opt=flash,tie(,mlp)?,mask,norm  1\.\d+× \[.*\] as fast"
    )
    found = [(match[1], match[2]) for line in wide if (match := answer.match(line))]
    assert found == list(product(("prefill", "decode"), ("graph", "eager")))
    assert re.fullmatch(r"  4\.\d+ ms, 11\d,\d+ tokens/s, 1\.\d+ GiB peak memory", wide[1])


def test_each_switch_has_a_row_and_each_condition_a_column(full_run: Run, wide: list[str]) -> None:
    rows = {
        line.split()[0]: NUMBER.findall(line) for line in wide if line.split()[:1] in [[f] for f in full_run.factors]
    }
    assert list(rows) == full_run.factors
    assert all(len(values) == 4 for values in rows.values())
    norm = full_run.effects[(full_run.effects["term"] == "norm") & (full_run.effects["kind"] == "main")]
    for value, row in zip(rows["norm"], norm[norm["metric"] == "latency_s"].itertuples(), strict=True):
        assert float(value[:-1]) == pytest.approx(row.estimate, abs=1e-3)
    assert rows["tie"][0].startswith(("1.000", "0.999"))


def test_one_condition_shows_intervals_and_verdicts(record_lines: Callable[..., Lines], run_of: RunOf) -> None:
    run = run_of(record_lines(factors=("flash", "tie")))
    lines = printed(run)
    assert any(re.fullmatch(r"flash  1\.\d+× \[1\.\d+, 1\.\d+\]", line) for line in lines)
    assert any(re.fullmatch(r"tie    [01]\.\d+× \[[01]\.\d+, 1\.\d+\] =", line) for line in lines)


@pytest.mark.parametrize(
    ("name", "told"), [("mask", ["mask helps only with flash on (prefill 1×512 graph)."]), ("tie", [])]
)
def test_a_switch_that_helps_only_with_another_is_named_under_the_table(
    record_lines: Callable[..., Lines], run_of: RunOf, name: str, told: list[str]
) -> None:
    lines = printed(run_of(record_lines(factors=("flash", name))))
    assert [line for line in lines if "helps only" in line] == told


def test_a_switch_that_helps_without_the_other_too_is_not_named(
    record_lines: Callable[..., Lines], run_of: RunOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_of(record_lines(factors=("flash", "norm")))
    both = Pair("norm", "flash", Effect("norm", 1.5, 1.4, 1.6, "faster"), Effect("norm", 1.2, 1.1, 1.3, "faster"))
    monkeypatch.setattr(terminal, "joint", lambda _: [Finding(Kind.INTERACTION, "flash:norm", detail=both)])
    assert [line for line in printed(run) if "helps only" in line] == []


@pytest.mark.slow
@pytest.mark.parametrize("width", [40, 60, 72])
def test_a_narrow_terminal_breaks_no_number(full_run: Run, width: int) -> None:
    lines = printed(full_run, width)
    *body, report = lines
    whole = {number for line in printed(full_run, 400) for number in NUMBER.findall(line)}
    for cell in full_run.effects.itertuples():
        whole |= {f"{cell.estimate:.{decimals}f}×" for decimals in (2, 3, 4)}
    assert {number for line in body for number in NUMBER.findall(line)} <= whole | {"1"}
    assert max(map(len, body)) <= width
    assert all(line.count("[") == line.count("]") for line in body)
    assert report.startswith("Report: ")


@pytest.mark.parametrize("width", [40, 100])
def test_it_takes_one_screen(record_lines: Callable[..., Lines], run_of: RunOf, width: int) -> None:
    everywhere = {"workloads": ("prefill", "decode"), "runtimes": ("graph", "eager")}
    lines = record_lines(factors=("flash", "tie", "mlp", "norm"), blocks=4, **everywhere)
    run = run_of([*lines[:-1], *_failures(lines, 4)])
    text = printed(run, width)
    assert len(text) <= MAX_LINES
    assert text[-1].startswith("Report: ")
    said = " ".join(line.strip() for line in text)
    assert "has not finished" in said
    assert "cells without a speed-up: 1 oom" in said


def test_answers_without_room_are_counted(full_run: Run) -> None:
    text = printed(full_run, 26, beside=16)
    assert len(text) <= MAX_LINES - 16
    assert any(re.match(r"\d more answers? in the report", line) for line in text)


def _failures(lines: Lines, count: int) -> Lines:
    cell = lines[0]["cells"][-1]
    places = list(product(lines[0]["workloads"], lines[0]["runtimes"]))[:count]
    return [
        {
            "type": "failure",
            "cell": cell,
            "workload": w,
            "runtime": r,
            "status": "oom",
            "reason": "no room",
            "pass": "time",
        }
        for w, r in places
    ]


def test_with_a_failed_control_no_winner_is_named(record_lines: Callable[..., Lines], run_of: RunOf) -> None:
    lines = printed(run_of(record_lines(factors=("flash", "norm"), copy_shift=0.02)))
    assert lines[0].startswith("prefill 1×512 graph: noisy: two copies of the baseline differ by 2.0 %")
    assert not re.search(r"\+opt=|owest|astest", "\n".join(lines))
    assert any("? undecided, ~ within the noise)" in line for line in lines)


def test_without_peak_memory_parameters_are_told(record_lines: Callable[..., Lines], run_of: RunOf) -> None:
    lines = printed(run_of(record_lines(factors=("flash", "tie"), memory=False)))
    assert any(line.endswith("GiB of parameters") for line in lines)


def test_a_partial_run_says_so_first(record_lines: Callable[..., Lines], run_of: RunOf) -> None:
    lines = printed(run_of(record_lines(factors=("flash",))[:-1]))
    assert lines[0].startswith("Warning: this run has not finished")


def test_the_baseline_alone_has_its_latency(record_lines: Callable[..., Lines], run_of: RunOf) -> None:
    lines = printed(run_of(record_lines(factors=())))
    assert re.match(r"prefill 1×512 graph: baseline, 7\.\d+ ms, 7\d,\d+ tokens/s", lines[0])
    assert len(lines) == 2


def test_the_baseline_alone_has_its_latency_though_its_copies_differ(
    record_lines: Callable[..., Lines], run_of: RunOf
) -> None:
    text = " ".join(printed(run_of(record_lines(factors=(), copy_shift=0.02)))).replace("\N{NO-BREAK SPACE}", " ")
    assert re.match(
        r"prefill 1×512 graph: baseline, 7\.\d+ ms, .* noisy: two copies of the baseline differ by 2\.0 %", text
    )
    assert "recommended" not in text


@pytest.mark.parametrize("shift", [0.4, -0.4])
def test_copies_differ_by_what_the_report_reads(
    record_lines: Callable[..., Lines], run_of: RunOf, shift: float
) -> None:
    run = run_of(record_lines(factors=("flash",), copy_shift=shift))
    apart = abs(run.controls.aa["ratio"].iloc[0] - 1)
    assert f"two copies of the baseline differ by {100 * apart:.0f} %" in " ".join(printed(run)).replace("\xa0", " ")


def test_rows_that_have_no_room_are_those_without_a_direction(
    record_lines: Callable[..., Lines], run_of: RunOf
) -> None:
    lines = printed(run_of(record_lines()), beside=15)
    names = [line.split()[0] for line in lines if re.match(r"\w+ +[01]\.\d", line)]
    assert names == ["flash", "mask", "norm"]  # not mlp, the smallest with a direction, nor tie
    assert "2 more rows in the report" in lines


def test_a_question_mark_beside_an_interval_without_1_is_explained(full_run: Run) -> None:
    assert not any("Holm" in line for line in printed(full_run))
    effects = full_run.effects.copy()
    norm = (effects["term"] == "norm") & (effects["kind"] == "main") & (effects["metric"] == "latency_s")
    effects.loc[norm, "verdict"] = "undecided"
    said = " ".join(" ".join(printed(replace(full_run, effects=effects))).split())
    assert "? undecided, by Holm also where an interval leaves out 1)" in said


def test_all_ten_switches_of_training_have_a_row(record_lines: Callable[..., Lines], run_of: RunOf) -> None:
    ten = ("flash", "tie", "mlp", "mask", "norm", "rope", "residual", "qkv", "flce", "recompute")
    lines = printed(run_of(record_lines(ten, screen=True, workloads=("train",), memory=False, evidence=False)))
    assert {line.split()[0] for line in lines if re.match(r"\w+ +[01]\.\d", line)} == set(ten)
