"""What a report says of a screen."""

from __future__ import annotations

import io
import json
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from records import write_record
from rich.console import Console

from qwen3bench.analysis.run import Run, load_run
from qwen3bench.compare import main
from qwen3bench.reporting.answer import cards
from qwen3bench.reporting.conditions import conditions
from qwen3bench.reporting.control_findings import idle_effects
from qwen3bench.reporting.finding import BestCell, Check, Control, Finding, Fitted, Kind, OpenEffects
from qwen3bench.reporting.findings import findings
from qwen3bench.reporting.pages import write_report
from qwen3bench.reporting.screen_table import screen_section
from qwen3bench.reporting.switch_table import switch_table
from qwen3bench.reporting.terminal import terminal_summary
from qwen3bench.reporting.whatif import whatif
from qwen3bench.reporting.wording.page_words import held_word
from qwen3bench.reporting.wording.sentences import sentence
from qwen3bench.reporting.wording.terminal_words import prediction_words

Lines = Callable[..., list[dict[str, Any]]]


def test_switches_are_ranked_by_their_worth_alone_on_average_and_last(screened_run: Run) -> None:
    (condition,) = conditions(screened_run)
    section = screen_section(screened_run, condition, findings(screened_run))
    assert section is not None
    rows = [[entry.text for entry in row] for row in section.switches.rows]
    assert [row[0] for row in rows[:3]] == ["norm", "flash", "mask"]
    assert rows[0][3].startswith("1.271×") or rows[0][3].startswith("1.27×")
    # mask is worth something beside flash alone: nothing alone, 2 % on average, 4 % last.
    average, _, alone, last = rows[2][1:]
    assert "same" in alone
    assert average.startswith("1.02")
    assert last.startswith("1.04")
    advice = {row[0]: row[2] for row in rows}
    assert advice["flash"] == advice["norm"] == "on"
    assert advice["gemv"] == "leave off: nowhere shown to be faster"


def test_what_was_predicted_stands_beside_what_was_measured(screened_run: Run) -> None:
    found = [finding for finding in findings(screened_run) if finding.kind == Kind.SCREEN]
    fitted, confirmation = (finding.detail for finding in found)
    assert isinstance(fitted, Fitted)
    assert (fitted.cells, fitted.every, fitted.matters) == (64, 512, False)
    told = [sentence(replace(found[0], detail=replace(fitted, p=p, matters=p < 0.05))) for p in (0.25, 1e-40)]
    assert "(p = 0.25)" in told[0]
    assert "(p < 1e-16)" in told[1]
    assert isinstance(confirmation, BestCell)
    assert confirmation.missed == ("flash+tie+mlp+mask+norm",)
    assert confirmation.still_missed
    said = sentence(found[1])
    assert said.startswith("Predicted to be fastest of all 512: flash+mlp+mask+norm, 1.58× [1.57, 1.59] as fast")
    assert "Measured since: 1.578×" in said
    assert said.endswith("Predictions miss: flash+tie+mlp+mask+norm. Only measured cells are recommended.")
    (condition,) = conditions(screened_run)
    section = screen_section(screened_run, condition, findings(screened_run))
    assert section is not None
    assert section.confirmed is not None
    assert [row[3].text for row in section.confirmed.rows] == ["holds", "missed"]


def test_only_measured_cells_are_recommended(screened_run: Run) -> None:
    measured = set(screened_run.cells["cell"])
    (answer,) = [finding for finding in findings(screened_run) if finding.kind == Kind.ANSWER]
    assert answer.subject in measured
    assert answer.subject == "flash+mlp+mask+norm"  # which the screen itself did not measure


def test_the_toggles_have_every_cell_and_say_what_is_predicted(screened_run: Run) -> None:
    data = whatif(screened_run, {})
    assert data is not None
    (shown,) = data["conditions"]
    assert set(shown["cells"]) == set(screened_run.cells["cell"])
    assert len(shown["predicted"]) == 512
    assert shown["predicted"][0] == (1, 1, 1)
    value, low, high = shown["predicted"][1]  # flash alone
    assert low <= value <= high
    assert value == pytest.approx(1.18, abs=0.01)
    assert shown["predicted"][1 + 16][0] == pytest.approx(1.50, abs=0.01)  # flash+norm
    assert data["words"] == {"predicted": "predicted", "unmeasured": "not measured", "idle": "changes nothing"}
    assert len(json.dumps(data)) < 60_000


BEST, OTHER = "flash+mlp+mask+norm", "flash+tie+mlp+mask+norm"


def confirmation_of(run: Run) -> Finding:
    (found,) = [finding for finding in findings(run) if isinstance(finding.detail, BestCell)]
    return found


def test_what_ran_in_confirmed_cells_and_what_disturbed_their_blocks_is_told(
    run_of: Callable[[Any], Run], record_lines: Lines, confirming: Lines, nine: tuple[str, ...]
) -> None:
    looked = next(line for line in record_lines(("flash",)) if line["type"] == "evidence")
    lines = record_lines(nine, screen=True, memory=False, evidence=False)
    screened = set(lines[0]["cells"])
    pairs = ["+".join(pair) for pair in combinations(nine, 2)]
    chosen, compared = [pair for pair in pairs if pair not in screened][:2]
    lines = confirming(lines, {chosen: (1.58, 1.57, 1.59)}, {chosen: 1.578})
    lines[-1:-1] = [looked | {"cell": name} for name in (chosen, "baseline", compared)]
    disturbed = next(line for line in lines if line["type"] == "confirm_block")
    disturbed |= {"state": "flagged", "flags": ["hw_thermal_slowdown"]}
    run = run_of(lines)
    assert [line.cell for line in run.evidence] == [chosen, "baseline"]
    (found,) = [each.detail for each in findings(run) if getattr(each.detail, "check", None) == Check.FLAGGED]
    assert isinstance(found, Control)
    assert (found.number, found.names) == (1, ("hw_thermal_slowdown",))


def test_the_second_round_may_name_again_what_the_first_measured(
    run_of: Callable[[Any], Run], record_lines: Lines, confirming: Lines, nine: tuple[str, ...]
) -> None:
    """Fitted again, the model may say that the same cell is the fastest: it is measured already."""
    lines = record_lines(nine, screen=True, memory=False, evidence=False)
    lines = confirming(lines, {BEST: (1.58, 1.57, 1.59), OTHER: (1.579, 1.569, 1.589)}, {BEST: 1.578, OTHER: 1.4})
    where = {"type": "confirm", "workload": "prefill", "runtime": "graph", "round": 2, "cells": []}
    again = {**where, "best": BEST, "predicted": [BEST], "speedup": [1.578], "lo": [1.57], "hi": [1.586]}
    run = run_of([*lines[:-1], again, lines[-1]])
    last = run.screens[0].confirmed[-1]
    assert last.measured is not None
    assert (last.round, last.agrees) == (1, True)
    found = confirmation_of(run)
    assert "Measured since: 1.578×" in sentence(found)
    assert sentence(found).endswith(f"Predictions miss: {OTHER}. Only measured cells are recommended.")
    assert isinstance(found.detail, BestCell)
    assert found.detail.held is False


def test_what_interactions_of_three_leave_open_more_cells_decide_and_no_more_blocks(
    run_of: Callable[[Any], Run], record_lines: Any, nine: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(record_lines.__globals__["JOINT_GAINS"], ("flash", "mlp", "norm"), 0.2)
    run = run_of(record_lines(nine, screen=True, memory=False, evidence=False))
    unsure = [finding for finding in findings(run) if finding.kind == Kind.UNDECIDED]
    assert unsure
    assert {finding.advice.settings for finding in unsure if finding.advice} == {("design=full",)}


@pytest.mark.parametrize("apart", [0.0, 0.02])
def test_what_was_measured_where_copies_differ_misses_nothing_and_is_not_recommended(
    run_of: Callable[[Any], Run], record_lines: Lines, confirming: Lines, nine: tuple[str, ...], apart: float
) -> None:
    lines = record_lines(nine, screen=True, memory=False, evidence=False)
    lines = confirming(lines, {BEST: (1.60, 1.59, 1.61)}, {BEST: 1.578})
    for line in [line for line in lines if line["type"] == "confirm_sample" and line["cell"] == "baseline"]:
        copy = {**line, "copy": 1, "position": 9, "latency_s": line["latency_s"] * (1 + apart)}
        lines.insert(lines.index(line), copy)
    run = run_of(lines)
    (each,) = run.screens[0].confirmed
    assert each.noisy == (apart > 0)
    assert each.agrees == (apart > 0)  # 1.4 % off is less than the copies are
    (answer,) = [finding for finding in findings(run) if finding.kind == Kind.ANSWER]
    assert (answer.subject == BEST) == (apart == 0)
    noisy = sentence(confirmation_of(run)).endswith("What was measured since is noisy, and not recommended.")
    assert noisy == (apart > 0)


def test_what_does_not_compute_the_same_confirms_nothing(
    run_of: Callable[[Any], Run], record_lines: Lines, confirming: Lines, nine: tuple[str, ...]
) -> None:
    lines = record_lines(nine, screen=True, memory=False, evidence=False)
    lines = confirming(lines, {BEST: (1.58, 1.57, 1.59)}, {BEST: 1.578})
    for line in lines:
        if line["type"] == "verify" and line["cell"] == BEST:
            line |= {"equivalent": False, "reason": "off by one"}
    run = run_of(lines)
    assert sentence(confirmation_of(run)).endswith("It has no measured speed-up, so it is not recommended.")
    assert run.screens[0].cells == 64


@pytest.mark.slow
def test_a_screen_of_one_block_has_a_page_and_predicts_nothing(
    run_of: Callable[[Any], Run], record_lines: Lines, nine: tuple[str, ...]
) -> None:
    run = run_of(record_lines(nine, screen=True, memory=False, evidence=False, blocks=1))
    assert whatif(run, {}) is None
    assert "is not known: too few cells or blocks tell" in write_report(run).read_text("utf-8")


@pytest.mark.slow
def test_the_report_has_its_section_and_marks_shares_as_the_models(screened_run: Run) -> None:
    page = write_report(screened_run).read_text("utf-8")
    assert "which multiply to it" not in page  # shares of a fit multiply to what the fit says
    for text in (
        "Which switches pay",
        "The last bar was measured",
        "of the model fitted to the screen",
        "leave off: nowhere shown to be faster",
    ):
        assert text in page
    markdown = (screened_run.record.path.parent / "report.md").read_text("utf-8")
    assert "## Which switches pay" in markdown
    assert "Predictions miss: flash+tie+mlp+mask+norm" in markdown


def test_terminal_and_answer_say_whether_predictions_held(screened_run: Run) -> None:
    console = Console(width=100, record=True, file=io.StringIO())
    terminal_summary(screened_run, console)
    assert "predictions missed" in console.export_text()
    (card,) = cards(screened_run, findings(screened_run))
    assert any(note.startswith("Predicted to be fastest of all 512") for note in card.notes)


def test_of_a_prediction_that_nothing_tests_the_reader_is_told_what_to_rely_on(screened_run: Run) -> None:
    found = [finding for finding in findings(screened_run) if isinstance(finding.detail, BestCell)]
    assert isinstance(found[0].detail, BestCell)
    wide = replace(found[0].detail, missed=(), still_missed=False, tested=False)
    assert wide.held is None
    assert sentence(replace(found[0], detail=wide)).endswith(
        " Rely on the measured number: the intervals are too wide to tell whether another cell is faster."
    )
    noisy = sentence(replace(found[0], detail=wide, noisy=True))
    assert "Rely on" not in noisy
    assert "The intervals are too wide to tell whether that holds." in noisy
    assert prediction_words(wide) == "rely on this number; another cell may be faster"
    assert prediction_words(replace(wide, measured=None)) == "the predicted best has no speed-up"


def test_a_row_of_a_prediction_that_nothing_tests_is_too_wide_to_tell_unless_it_missed() -> None:
    said = [held_word(agrees, tested=False, in_screen=False) for agrees in (True, False)]
    assert said == ["too wide to tell", "missed"]


def undecided_effects(run: Run, *terms: str, lo: float) -> Run:
    """The run with these terms undecided in all kinds of effects on latency."""
    effects = run.effects.copy()
    of_terms = effects["term"].isin(terms) & (effects["metric"] == "latency_s")
    effects.loc[of_terms, ["estimate", "lo", "hi", "verdict"]] = [1.02, lo, 1.04, "undecided"]
    return replace(run, effects=effects)


def test_what_changes_nothing_that_runs_is_called_so_in_each_table_and_is_not_open(
    run_of: Callable[[Any], Run], record_lines: Lines, nine: tuple[str, ...]
) -> None:
    lines = record_lines(nine, screen=True, memory=False)
    looked = next(line for line in lines if line["type"] == "evidence" and line["cell"] == "baseline")
    looked["output"] = "a"
    lines.insert(-1, {**looked, "cell": "gemv"})
    run = undecided_effects(run_of(lines), "rope", "gemv", "flash:gemv", "flash:rope", lo=0.99)
    found = findings(run)
    section, table = screen_section(run, conditions(run)[0], found), switch_table(found)
    assert section is not None
    assert table is not None
    by_name = {row[0].text: [entry.text for entry in row[1:]] for row in section.switches.rows}
    assert [text.removeprefix("1.02× [0.99, 1.04] ") for text in by_name["gemv"]] == ["changes nothing"] * 4
    assert by_name["rope"][:2] == ["1.02× [0.99, 1.04] undecided", "not known"]
    words = {name: fields[0].word for name, fields in table.rows}
    assert (words["gemv"], words["rope"]) == ("changes nothing", "undecided")
    latency = run.effects[run.effects["metric"] == "latency_s"]
    told = idle_effects(run, conditions(run)[0], latency).set_index(["term", "kind"])["verdict"]
    assert told["gemv", "main"] == told["flash:gemv", "interaction"] == "changes nothing"
    data = whatif(run, {})
    assert data
    assert data["conditions"][0]["idle"] == ["gemv"]
    open_terms = {effect.term for f in found if isinstance(f.detail, OpenEffects) for effect in f.detail.effects}
    assert open_terms == {"rope", "flash:rope"}
    effects = run.effects.assign(verdict="slower")
    (shown,) = [f for f in findings(replace(run, effects=effects)) if (f.kind, f.subject) == (Kind.SWITCH, "gemv")]
    assert shown.verdict == "slower"


@pytest.mark.parametrize(("lo", "corrected"), [(0.99, False), (1.01, True)])
def test_an_undecided_effect_whose_interval_leaves_out_1_is_explained(
    screened_run: Run, lo: float, corrected: bool
) -> None:
    run = undecided_effects(screened_run, "rope", lo=lo)
    section, table = screen_section(run, conditions(run)[0], findings(run)), switch_table(findings(run))
    assert section is not None
    assert table is not None
    assert section.corrected == table.corrected == corrected


def test_a_predicted_cell_that_the_screen_measured_too_is_said_to_have_two_numbers(
    run_of: Callable[[Any], Run], record_lines: Lines, confirming: Lines, nine: tuple[str, ...]
) -> None:
    lines = record_lines(nine, screen=True, memory=False, evidence=False)
    every = "+".join(nine)
    run = run_of(confirming(lines, {BEST: (1.58, 1.57, 1.59), every: (1.57, 1.56, 1.58)}, {BEST: 1.578, every: 1.57}))
    section = screen_section(run, conditions(run)[0], findings(run))
    assert section is not None
    assert section.confirmed is not None
    assert section.confirmed.note == f"Measured again here, so the screen's number differs: {every}."


def test_a_whole_design_has_no_such_section(full_run: Run) -> None:
    assert full_run.screens == ()
    assert all(screen_section(full_run, condition, []) is None for condition in conditions(full_run))


@pytest.mark.slow
@pytest.mark.parametrize(("second", "status"), [(1.578, 0), (1.45, 3)])
def test_two_screens_are_compared_by_the_cells_that_confirmed_too(
    tmp_path: Path,
    record_lines: Lines,
    confirming: Lines,
    nine: tuple[str, ...],
    capsys: pytest.CaptureFixture[str],
    second: float,
    status: int,
) -> None:
    best = "flash+mlp+mask+norm"
    for name, seed, gain in (("a", 1, 1.578), ("b", 2, second)):
        lines = record_lines(nine, screen=True, memory=False, seed=seed, blocks=10)
        write_record(tmp_path / name, confirming(lines, {best: (1.58, 1.57, 1.59)}, {best: gain}))
    assert main([str(tmp_path / "a"), str(tmp_path / "b"), "--fail-on", "slower"]) == status
    said = capsys.readouterr().out
    assert "45 compared: 0 slower" in said  # effects
    assert "64 compared" in said  # ratios: 63 of the screen, and the best
    assert (best in said) == (status == 3)


@pytest.mark.slow
def test_two_screens_that_confirm_other_cells_have_lost_none(
    tmp_path: Path, record_lines: Lines, confirming: Lines, nine: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    for seed, best in enumerate((BEST, OTHER)):
        lines = record_lines(nine, screen=True, memory=False, evidence=False, seed=seed, blocks=10)
        write_record(tmp_path / best, confirming(lines, {best: (1.58, 1.57, 1.59)}, {best: 1.578}))
    assert main([str(tmp_path / BEST), str(tmp_path / OTHER), "--fail-on", "slower"]) == 0
    said = capsys.readouterr().out
    assert f"cell in A alone: {BEST}" in said
    assert "no longer measured" not in said


@pytest.mark.slow
def test_128_cells_in_two_workloads_take_under_twenty_seconds(
    tmp_path: Path, record_lines: Callable[..., list[dict[str, Any]]]
) -> None:
    """A screen of twelve in 112 cells."""
    names = ("flash", "tie", "mlp", "mask", "norm", "rope", "residual", "qkv", "gemv", "a", "b", "c")
    lines = record_lines(names, ("prefill", "decode"), blocks=15, screen=True)
    directory = write_record(tmp_path / "run", lines)
    started = time.process_time()
    write_report(load_run(directory))
    assert time.process_time() - started < 20
