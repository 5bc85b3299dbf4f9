"""A screen's best cells are measured in further blocks of the same run."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qwen3bench.config.settings import Settings
from qwen3bench.record.lines import (
    ConfirmBlockLine,
    ConfirmLine,
    ConfirmSampleLine,
    EvidenceLine,
    FailureLine,
    SampleLine,
    VerifyLine,
)

Measure = Callable[..., Any]
ALL_ON = "flash+tie+mlp+mask+norm+qkv+gemv"
SCREEN = ("design=screen", "opt=flash,tie,mlp,mask,norm,qkv,gemv", "measure.min_processes=2")
SMALL = ("design=screen", "design.cells=30", "opt=flash,tie,mlp,mask,norm,qkv", "measure.min_processes=2")


def slow(cell: str) -> dict[str, Any]:
    """A fault: this cell alone takes three times as long as the baseline."""
    sample = {"latency_s": 0.03, "waited_s": 0.0, "switches": 0}
    return {"does": "answer", "op": "visit", "cell": cell, "fields": {"samples": [sample]}}


@pytest.mark.slow
def test_what_is_predicted_to_be_best_is_measured_in_blocks_of_its_own(measure: Measure) -> None:
    done = measure(*SCREEN)
    assert done.status == 0
    (chosen,) = done.record.of(ConfirmLine)
    assert len(chosen.predicted) == 3
    assert chosen.best == chosen.predicted[0]
    screened = {line.cell for line in done.record.of(SampleLine)}
    assert len(screened) == 64
    unmeasured = [cell for cell in chosen.predicted if cell not in screened]
    assert list(chosen.cells) == ["baseline", ALL_ON, *unmeasured]
    confirming = done.record.of(ConfirmSampleLine)
    assert {line.cell for line in confirming} == set(chosen.cells)
    assert {line.process for line in confirming}.isdisjoint({line.process for line in done.record.of(SampleLine)})
    assert len({(line.process, line.block) for line in confirming}) == len(done.record.of(ConfirmBlockLine))
    # Through the gate and the evidence, too; and a row of cells.csv, whose effects stand on the screen alone.
    assert set(unmeasured) <= {line.cell for line in done.record.of(VerifyLine)}
    assert set(unmeasured) <= {line.cell for line in done.record.of(EvidenceLine)}
    cells = done.run.cells.set_index("cell")
    assert len(cells) == 64 + len(unmeasured)
    assert set(cells["status"]) == {"ok"}
    assert set(done.run.samples["cell"]) == screened
    (result,) = done.run.screens
    assert (result.cells, result.every) == (64, 128)
    assert [each.prediction.cell for each in result.confirmed] == list(chosen.predicted)
    assert all(each.agrees for each in result.confirmed)
    for each in result.confirmed:
        assert each.measured is not None
        assert cells.loc[each.prediction.cell, "speedup"] == pytest.approx(each.measured.speedup, rel=1e-6)
    assert (cells["latency_s"] * cells["speedup"] / cells.loc["baseline", "latency_s"] - 1).abs().max() < 1e-9


@pytest.mark.slow
def test_a_missed_prediction_takes_one_round_more_and_no_third(measure: Measure) -> None:
    first = measure(*SMALL, to=Path("first"))
    (chosen,) = first.record.of(ConfirmLine)
    unmeasured = [cell for cell in chosen.cells if cell not in ("baseline", "flash+tie+mlp+mask+norm+qkv")]
    assert unmeasured
    missed = measure(*SMALL, to=Path("missed"), faults=[slow(cell) for cell in unmeasured])
    rounds = missed.record.of(ConfirmLine)
    assert [line.round for line in rounds] == [1, 2]
    assert rounds[0].predicted == chosen.predicted
    assert not set(rounds[1].cells) & set(unmeasured)
    assert set(rounds[1].predicted).isdisjoint(unmeasured)
    (result,) = missed.run.screens
    assert {each.prediction.cell for each in result.confirmed if each.agrees is False} >= set(unmeasured)


@pytest.mark.slow
def test_a_killed_confirmation_continues_with_the_cells_that_it_chose(measure: Measure, tmp_path: Path) -> None:
    whole = measure(*SMALL, to=Path("whole"))
    lines = (whole.directory / "samples.jsonl").read_bytes().splitlines(keepends=True)
    of_round = [number for number, line in enumerate(lines) if b'"type":"confirm' in line]
    for kept in (of_round[0], of_round[0] + 1, of_round[len(of_round) // 2]):
        cut = tmp_path / f"cut{kept}"
        shutil.copytree(whole.directory, cut)
        (cut / "samples.jsonl").write_bytes(b"".join(lines[:kept]))
        again = measure(resume=cut)
        assert again.status == 0
        assert again.record.of(ConfirmLine) == whole.record.of(ConfirmLine)
        samples = [(line.cell, line.copy, line.block, line.repeat) for line in again.record.of(ConfirmSampleLine)]
        attempts = {line.attempt for line in again.record.of(ConfirmSampleLine)}
        assert set(samples) == {(s.cell, s.copy, s.block, s.repeat) for s in whole.record.of(ConfirmSampleLine)}
        assert len(samples) == len(set(samples)) or len(attempts) > 1
        assert len(again.record.of(SampleLine)) == len(whole.record.of(SampleLine))
        assert len(again.run.screens[0].confirmed) == len(whole.run.screens[0].confirmed)


@pytest.mark.slow
def test_a_best_cell_that_computes_something_else_has_no_speed_up(measure: Measure) -> None:
    first = measure(*SMALL, to=Path("first"))
    chosen = first.record.of(ConfirmLine)[0]
    wrong = next(cell for cell in chosen.cells if cell not in ("baseline", "flash+tie+mlp+mask+norm+qkv"))
    fault = {"does": "answer", "op": "verify", "cell": wrong, "fields": {"equivalent": False, "reason": "as told"}}
    done = measure(*SMALL, to=Path("wrong"), faults=[fault])
    cells = done.run.cells.set_index("cell")
    assert cells.loc[wrong, "status"] == "not_equivalent"
    assert cells["speedup"].isna()[wrong]


@pytest.mark.slow
@pytest.mark.parametrize("fails", ["baseline", "unmeasured"])
def test_what_fails_while_it_confirms_leaves_the_screen_as_it_was(measure: Measure, fails: str) -> None:
    first = measure(*SMALL, to=Path("first"))
    (chosen,) = first.record.of(ConfirmLine)
    unmeasured = next(cell for cell in chosen.cells if cell not in first.record.run.cells)
    cell = unmeasured if fails == "unmeasured" else fails
    fault = {"does": "error", "op": "visit", "cell": cell, "status": "crashed"}
    timed = {line.process for line in first.record.of(SampleLine)}
    done = measure(*SMALL, to=Path("again"), faults=[fault], since=max(timed) + 1)
    cells = done.run.cells.set_index("cell")
    assert set(cells.loc[list(first.record.run.cells), "status"]) == {"ok"}
    assert cells.loc[list(first.record.run.cells), "speedup"].notna().all()
    assert cells.loc[unmeasured, "status"] == ("crashed" if fails == "unmeasured" else "ok")
    assert cells["speedup"].isna()[unmeasured]
    assert [(line.cell, line.pass_) for line in done.record.of(FailureLine)] == [(cell, "confirm")]


def test_a_screen_of_no_switch_measures_the_baseline(measure: Measure) -> None:
    done = measure("design=screen", "opt=")
    assert done.status == 0
    assert list(done.run.cells["cell"]) == ["baseline"]
    assert done.run.screens == ()


@pytest.mark.slow
def test_a_cell_that_does_not_train_alike_predicts_nothing(
    measure: Measure, small_settings: Callable[..., Settings]
) -> None:
    """Its gradients are wrong, and it is ten times as fast: no other cell may look fast for that."""
    wrong = small_settings(*SMALL).labels[7]
    fast = {"latency_s": 0.001, "waited_s": 0.0, "switches": 0}
    faults = [
        {"does": "answer", "op": "gradients", "cell": wrong, "fields": {"equivalent": False, "reason": "as told"}},
        {"does": "answer", "op": "visit", "cell": wrong, "fields": {"samples": [fast]}},
    ]
    done = measure(*SMALL, "workload=train", faults=faults)
    assert done.statuses[wrong] == "not_equivalent"
    chosen = done.record.of(ConfirmLine)
    assert chosen
    assert max(speedup for line in chosen for speedup in line.speedup) < 1.6
