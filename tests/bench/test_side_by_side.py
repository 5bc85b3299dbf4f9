"""The gate in several processes at once: what fails there is asked again alone, so no cell pays for another."""

from __future__ import annotations

import itertools
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from qwen3bench.bench import campaign
from qwen3bench.bench.workers import Workers

Measure = Callable[..., Any]
ON_A_CARD = ("design=full", "opt=flash,tie,mask,norm", "device=cuda", "runtime=graph")
DIES = {"does": "die"}
OUT_OF_MEMORY = {"does": "error", "status": "oom", "reason": "CUDA out of memory"}
BABBLES = {"does": "raw", "text": "\xff\x00 {]\n"}


@pytest.fixture(autouse=True)
def sixteen_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(campaign, "_cores", lambda: 16)


def test_each_cell_is_verified_once_and_the_processes_beside_are_gone(measure: Measure) -> None:
    done = measure(*ON_A_CARD)
    alone = measure(*ON_A_CARD[:2], to=done.directory.with_name("alone"))
    assert done.status == alone.status == 0
    verified = [line["cell"] for line in done.record.of("verify")]
    assert sorted(verified) == sorted(line["cell"] for line in alone.record.of("verify"))
    assert len(verified) == len(set(verified)) == 16
    assert len(done.pids) == len(alone.pids) + 3
    assert not done.alive
    assert "4 at a time" in done.err
    assert "at a time" not in alone.err


def test_no_process_but_the_one_at_work_and_the_next_lives_when_memory_is_measured(
    measure: Measure, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive = []
    ask = Workers.ask

    def counted(self: Workers, op: str, **arguments: Any) -> dict[str, Any]:
        if op == "memory":
            children = psutil.Process().children()
            alive.append(sum(child.status() != psutil.STATUS_ZOMBIE for child in children))
        return ask(self, op, **arguments)

    monkeypatch.setattr(Workers, "ask", counted)
    measure(*ON_A_CARD)
    assert alive == [2] * 16


def test_cells_with_the_same_kernels_go_to_the_same_process(measure: Measure, monkeypatch: pytest.MonkeyPatch) -> None:
    shared: list[list[str]] = []
    monkeypatch.setattr(Workers, "side_by_side", lambda self, op, shares: shared.extend(shares) or iter(()))
    assert measure(*ON_A_CARD).status == 0  # all alone, as none was verified beside others
    assert [{("flash" in cell, "tie" in cell) for cell in share} for share in shared] == [
        {(True, True)},
        {(True, False)},
        {(False, True)},
        {(False, False)},
    ]


@pytest.mark.parametrize("cell", ["flash+tie+mask+norm", "tie+mask", "baseline"])
@pytest.mark.parametrize("fault", [DIES, OUT_OF_MEMORY, BABBLES])
def test_a_failure_beside_others_is_no_ones_until_it_fails_alone(
    measure: Measure, tmp_path: Path, fault: dict[str, Any], cell: str
) -> None:
    done = measure(*ON_A_CARD, faults=[{**fault, "op": "verify", "cell": cell, "once": str(tmp_path / "struck")}])
    assert done.status == 0
    assert set(done.statuses.values()) == {"ok"}
    assert not done.record.of("failure")
    assert len(done.record.of("verify")) == 16
    assert not done.alive


@pytest.mark.parametrize(("fault", "status"), [(DIES, "crashed"), (OUT_OF_MEMORY, "oom"), (BABBLES, "crashed")])
@pytest.mark.parametrize("cell", ["flash", "norm"])
def test_a_cell_that_fails_alone_too_fails_and_no_other(
    measure: Measure, fault: dict[str, Any], status: str, cell: str
) -> None:
    done = measure(*ON_A_CARD, faults=[{**fault, "op": "verify", "cell": cell}])
    assert done.status == 3
    assert {name for name, each in done.statuses.items() if each != "ok"} == {cell}
    assert done.statuses[cell] == status
    assert len(done.record.of("failure")) == 1
    assert len(done.record.of("verify")) == 15


def test_a_cell_that_is_not_equivalent_is_recorded_once_with_its_reason(measure: Measure) -> None:
    wrong = {"does": "answer", "op": "verify", "cell": "tie+norm", "fields": {"equivalent": False, "reason": "wrong"}}
    done = measure(*ON_A_CARD, faults=[wrong])
    assert done.statuses["tie+norm"] == "not_equivalent"
    (failure,) = done.record.of("failure")
    assert failure["reason"] == "wrong"
    assert len(done.record.of("verify")) == 16


def test_a_cell_refused_beside_others_is_judged_alone(measure: Measure, tmp_path: Path) -> None:
    """As where a library raises for want of memory what the gate takes for the cell's own error."""
    once = {"once": str(tmp_path / "struck")}
    wrong = {"does": "answer", "op": "verify", "cell": "tie", "fields": {"equivalent": False, "reason": "wrong"}}
    done = measure(*ON_A_CARD, faults=[{**wrong, **once}])
    assert Path(once["once"]).exists()
    assert set(done.statuses.values()) == {"ok"}
    assert len(done.record.of("verify")) == 16


def test_a_process_that_hangs_takes_no_other_with_it(measure: Measure, tmp_path: Path) -> None:
    fault = {"does": "hang", "op": "verify", "cell": "tie", "once": str(tmp_path / "struck")}
    done = measure(*ON_A_CARD, "measure.step_timeout_s=1", faults=[fault])
    assert set(done.statuses.values()) == {"ok"}
    assert not done.alive


def test_a_cell_that_could_not_be_built_is_not_verified(measure: Measure) -> None:
    done = measure(*ON_A_CARD, faults=[{**DIES, "op": "load", "cells": ["mask"]}])
    assert done.statuses["mask"] == "crashed"
    assert "mask" not in [line["cell"] for line in done.record.of("verify")]
    assert not done.alive


def test_a_continued_run_verifies_what_is_left(measure: Measure, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Workers.side_by_side

    def cut_off(self: Workers, op: str, shares: Any) -> Any:
        yield from itertools.islice(whole(self, op, shares), 5)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(10)

    with monkeypatch.context() as patched:
        patched.setattr(Workers, "side_by_side", cut_off)
        begun = measure(*ON_A_CARD)
    assert begun.status == 130
    assert len(begun.record.of("verify")) == 5
    assert not begun.alive
    done = measure(resume=begun.directory)
    assert done.status == 0
    assert len(done.record.of("verify")) == 16
