"""Several processes at once, which verify or get ready: what fails there is asked again alone.

So no cell pays for another.
"""

from __future__ import annotations

import itertools
import os
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from qwen3bench.campaign import assembly, capacity, continuation
from qwen3bench.campaign.lanes import Lanes
from qwen3bench.campaign.worker_process import WorkerProcess
from qwen3bench.record.lines import (
    BlockLine,
    CompileLine,
    EagerLine,
    EvidenceLine,
    FailureLine,
    GradientsLine,
    MemoryLine,
    ProcessLine,
    Telemetry,
    VerifyLine,
)
from qwen3bench.record.messages import CollectEvidence, MeasureMemory, Request, Verify, VerifyGradients

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("titles_told")]

Measure = Callable[..., Any]
Asked = list[tuple[int, Request[Any]]]
ON_A_CARD = ("design=full", "opt=flash,tie,mask,norm", "device=cuda", "runtime=graph")
DIES = {"does": "die"}
TIMED = (*ON_A_CARD, "workload=prefill,decode", "measure.min_processes=2", "measure.blocks_per_process=1")
OUT_OF_MEMORY = {"does": "error", "status": "oom", "reason": "CUDA out of memory"}
BABBLES = {"does": "raw", "text": "\xff\x00 {]\n"}


@pytest.fixture(autouse=True)
def sixteen_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capacity, "usable_cores", lambda: 16)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Asked:
    """Every request that is sent, with the process that it is sent to."""
    noted: Asked = []
    send = WorkerProcess.send

    def sent(self: WorkerProcess, request: Request[Any]) -> None:
        noted.append((self.pid, request))
        send(self, request)

    monkeypatch.setattr(WorkerProcess, "send", sent)
    return noted


def test_each_cell_is_verified_once_and_the_processes_beside_are_gone(measure: Measure) -> None:
    done = measure(*ON_A_CARD)
    alone = measure(*ON_A_CARD[:2], to=done.directory.with_name("alone"))
    assert done.status == alone.status == 0
    verified = [line.cell for line in done.record.of(VerifyLine)]
    assert sorted(verified) == sorted(line.cell for line in alone.record.of(VerifyLine))
    assert len(verified) == len(set(verified)) == 16
    assert len(done.pids) == len(alone.pids) + 3
    assert not done.alive
    assert "4 at a time" in done.err
    assert "at a time" not in alone.err


@pytest.mark.parametrize(
    ("device", "cells", "expected"), [("cuda", "full", 4), ("cuda", "each", 2), ("cpu", "full", 1)]
)
def test_processes_that_look_start_with_the_first_one_where_there_is_a_card(
    measure: Measure, monkeypatch: pytest.MonkeyPatch, fake_card: Any, device: str, cells: str, expected: int
) -> None:
    card = fake_card(Telemetry())
    card.handle = object()
    running: list[int] = []
    identified = continuation.identified

    def noted(*asked: Any) -> Any:
        running.append(len(psutil.Process().children()))
        return identified(*asked)

    monkeypatch.setattr(assembly, "usable_cores", lambda: 16)
    monkeypatch.setattr(continuation, "identified", noted)
    done = measure(*ON_A_CARD, f"design={cells}", f"device={device}", "runtime=eager", card=card)
    assert done.status == 0
    assert running[0] == expected
    assert len(done.pids) == len(
        measure(*ON_A_CARD, f"design={cells}", f"device={device}", "runtime=eager", to=Path("later")).pids
    )
    assert not done.alive


def test_they_end_where_pytorch_cannot_use_that_card(
    measure: Measure, monkeypatch: pytest.MonkeyPatch, fake_card: Any
) -> None:
    card = fake_card(Telemetry())
    card.handle = object()
    monkeypatch.setattr(assembly, "usable_cores", lambda: 16)
    probed = continuation.identified
    left: list[int] = []

    def on_a_cpu(settings: Any, *asked: Any) -> Any:
        return probed(replace(settings, device="cpu"), *asked)

    def begun(*asked: Any) -> None:
        left.append(len(psutil.Process().children()))
        begin(*asked)

    begin = continuation.begin
    monkeypatch.setattr(continuation, "identified", on_a_cpu)
    monkeypatch.setattr(continuation, "begin", begun)
    assert measure(*ON_A_CARD, "device=auto", "runtime=eager", card=card).status == 0
    assert left == [1]


def test_processes_that_are_done_with_looking_end_side_by_side(
    measure: Measure, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each takes 0.2 s to give a card's memory back, which nothing is measured beside."""
    done: list[tuple[str, int]] = []
    kill, end = WorkerProcess.kill, WorkerProcess.end

    def killed(self: WorkerProcess) -> None:
        done.append(("kill", self.pid))
        kill(self)

    def ended(self: WorkerProcess) -> None:
        done.append(("end", self.pid))
        end(self)

    monkeypatch.setattr(WorkerProcess, "kill", killed)
    monkeypatch.setattr(WorkerProcess, "end", ended)
    assert measure(*ON_A_CARD).status == 0
    assert [what for what, _ in done[:4]] == ["kill", "kill", "kill", "end"]
    assert len({pid for _, pid in done[:3]}) == 3


def test_memory_and_evidence_are_looked_at_by_the_processes_that_verified(measure: Measure, asked: Asked) -> None:
    """Evidence of a cell comes right behind its memory; processes that are to time have not been told of a device."""
    done = measure(*TIMED)
    assert done.status == 0
    assert len(done.record.of(MemoryLine)) == len(done.record.of(EvidenceLine)) == 2 * 16
    by_cell: dict[str, set[int]] = {}
    for pid, request in asked:
        if isinstance(request, Verify | MeasureMemory | CollectEvidence):
            by_cell.setdefault(request.cell, set()).add(pid)
    assert {len(pids) for pids in by_cell.values()} == {1}
    assert len(set.union(*by_cell.values())) == 4
    for mine in set.union(*by_cell.values()):
        looks = [each for pid, each in asked if pid == mine and isinstance(each, MeasureMemory | CollectEvidence)]
        for memory, evidence in zip(looks[::2], looks[1::2], strict=True):
            assert isinstance(memory, MeasureMemory)
            assert isinstance(evidence, CollectEvidence)
            assert (memory.cell, memory.workload) == (evidence.cell, evidence.workload)
    last_look = max(i for i, (_, each) in enumerate(asked) if isinstance(each, CollectEvidence))
    timed = {line.pid for line in done.record.of(ProcessLine) if line.purpose == "time"}
    assert not timed & {pid for pid, _ in asked[:last_look]}


def test_gradients_are_judged_side_by_side_and_evidence_of_training_is_alone(measure: Measure, asked: Asked) -> None:
    """Each once; evidence holds times, which would be of the others' making."""
    done = measure(*ON_A_CARD, "workload=train")
    assert done.status == 0
    judged = {each.cell: pid for pid, each in asked if isinstance(each, VerifyGradients)}
    assert len(judged) == len(done.record.of(GradientsLine)) == 16
    assert len(set(judged.values())) == 4
    looks = [(pid, i) for i, (pid, each) in enumerate(asked) if isinstance(each, CollectEvidence)]
    assert len({pid for pid, _ in looks}) == 1
    assert min(i for _, i in looks) > max(i for i, (_, each) in enumerate(asked) if isinstance(each, VerifyGradients))


def test_cells_that_do_not_fit_together_are_looked_at_alone(measure: Measure, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capacity, "CONTEXT_BYTES", 21 * 2**30)  # of 80 GiB
    done = measure(*ON_A_CARD)
    assert "verifying every cell, measuring memory, recording what really runs, 4 at a time" in done.err
    assert "\nmeasuring peak memory, recording what really runs\n" in done.err
    assert len(done.record.of(MemoryLine)) == len(done.record.of(EvidenceLine)) == 16


@pytest.mark.parametrize("op", ["memory", "evidence"])
@pytest.mark.parametrize("fault", [DIES, OUT_OF_MEMORY, BABBLES])
def test_a_look_that_fails_beside_others_is_taken_again_alone(
    measure: Measure, tmp_path: Path, fault: dict[str, Any], op: str
) -> None:
    done = measure(*ON_A_CARD, faults=[{**fault, "op": op, "cell": "tie+mask", "once": str(tmp_path / "struck")}])
    assert done.status == 0
    assert not done.record.of(FailureLine)
    assert len(done.record.of(MemoryLine)) == len(done.record.of(EvidenceLine)) == 16


def test_eager_beside_a_graph_is_timed_once_nothing_else_runs(measure: Measure) -> None:
    done = measure(*ON_A_CARD)
    ends = ["baseline", "flash+tie+mask+norm"]
    assert [line.cell for line in done.record.of(EagerLine)] == ends
    trained = measure(*ON_A_CARD, "workload=train", to=done.directory.with_name("trained"))
    assert [line.cell for line in trained.record.of(EagerLine)] == ends
    assert not measure(*ON_A_CARD[:3], "runtime=eager,graph", to=done.directory.with_name("two")).record.of(EagerLine)
    assert len(done.run.controls.host) == 2
    failed = measure(*ON_A_CARD, faults=[{**DIES, "op": "eager"}], to=done.directory.with_name("died"))
    assert failed.status == 0
    assert not failed.record.of(EagerLine)


@pytest.mark.parametrize("at_once", ["alone", "side by side"])
def test_the_card_has_turned_to_another_process_before_one_is_timed(
    measure: Measure, monkeypatch: pytest.MonkeyPatch, asked: Asked, at_once: str
) -> None:
    """Since it was ready. Else some processes would start kernels later than others."""
    if at_once == "alone":
        monkeypatch.setattr(capacity, "usable_cores", lambda: 1)
    done = measure(*TIMED)
    timed = {line.pid for line in done.record.of(ProcessLine) if line.purpose == "time"}
    assert len(timed) >= 4
    for pid in timed:
        mine = [(i, request.op) for i, (each, request) in enumerate(asked) if each == pid]
        ready = max(i for i, op in mine if op == "prepare")
        first_visit = min(i for i, op in mine if op == "visit")
        assert any(request.op == "touch" and each != pid for each, request in asked[ready:first_visit])


def test_the_process_that_comes_next_starts_while_others_get_ready(measure: Measure, ahead: list[int]) -> None:
    """Its imports take seconds, and no block begins before they are done."""
    assert measure(*TIMED).status == 0
    assert ahead
    assert all(ahead)


def test_each_process_looks_at_cells_with_and_without_flash(measure: Measure, monkeypatch: pytest.MonkeyPatch) -> None:
    shared: list[list[Verify]] = []
    monkeypatch.setattr(Lanes, "side_by_side", lambda self, shares: shared.extend(shares) or iter(()))
    assert measure(*ON_A_CARD).status == 0  # all alone, as none was verified beside others
    assert [{("norm" in step.cell, "mask" in step.cell) for step in share} for share in shared] == [
        {(True, True)},
        {(True, False)},
        {(False, True)},
        {(False, False)},
    ]
    assert all({"flash" in step.cell for step in share} == {True, False} for share in shared)


@pytest.mark.parametrize("cell", ["flash+tie+mask+norm", "tie+mask", "baseline"])
@pytest.mark.parametrize("fault", [DIES, OUT_OF_MEMORY, BABBLES])
def test_a_failure_beside_others_is_no_ones_until_it_fails_alone(
    measure: Measure, tmp_path: Path, fault: dict[str, Any], cell: str
) -> None:
    done = measure(*ON_A_CARD, faults=[{**fault, "op": "verify", "cell": cell, "once": str(tmp_path / "struck")}])
    assert done.status == 0
    assert set(done.statuses.values()) == {"ok"}
    assert not done.record.of(FailureLine)
    assert len(done.record.of(VerifyLine)) == 16
    assert not done.alive


@pytest.mark.parametrize(("fault", "status"), [(DIES, "crashed"), (OUT_OF_MEMORY, "oom"), (BABBLES, "crashed")])
@pytest.mark.parametrize("cell", ["flash", "norm"])
def test_a_cell_that_fails_alone_too_fails_and_no_other(
    measure: Measure, asked: Asked, fault: dict[str, Any], status: str, cell: str
) -> None:
    done = measure(*ON_A_CARD, faults=[{**fault, "op": "verify", "cell": cell}])
    assert done.status == 3
    assert len([pid for pid, each in asked if each == Verify(cell=cell)]) == 2  # beside others and alone
    assert {name for name, each in done.statuses.items() if each != "ok"} == {cell}
    assert done.statuses[cell] == status
    assert len(done.record.of(FailureLine)) == 1
    assert len(done.record.of(VerifyLine)) == 15


def test_a_cell_that_is_not_equivalent_is_recorded_once_with_its_reason(measure: Measure) -> None:
    wrong = {"does": "answer", "op": "verify", "cell": "tie+norm", "fields": {"equivalent": False, "reason": "wrong"}}
    done = measure(*ON_A_CARD, faults=[wrong])
    assert done.statuses["tie+norm"] == "not_equivalent"
    (failure,) = done.record.of(FailureLine)
    assert failure.reason == "wrong"
    assert len(done.record.of(VerifyLine)) == 16


def test_a_cell_refused_beside_others_is_judged_alone(measure: Measure, tmp_path: Path) -> None:
    """As where a library raises for want of memory what the gate takes for the cell's own error."""
    once = {"once": str(tmp_path / "struck")}
    wrong = {"does": "answer", "op": "verify", "cell": "tie", "fields": {"equivalent": False, "reason": "wrong"}}
    done = measure(*ON_A_CARD, faults=[{**wrong, **once}])
    assert Path(once["once"]).exists()
    assert set(done.statuses.values()) == {"ok"}
    assert len(done.record.of(VerifyLine)) == 16


def test_a_process_that_hangs_takes_no_other_with_it(measure: Measure, tmp_path: Path) -> None:
    fault = {"does": "hang", "op": "verify", "cell": "tie", "once": str(tmp_path / "struck")}
    done = measure(*ON_A_CARD, "measure.step_timeout_s=1", faults=[fault])
    assert set(done.statuses.values()) == {"ok"}
    assert not done.alive


def test_a_cell_that_could_not_be_built_is_not_verified(measure: Measure) -> None:
    done = measure(*ON_A_CARD, faults=[{**DIES, "op": "load", "cells": ["mask"]}])
    assert done.statuses["mask"] == "crashed"
    assert "mask" not in [line.cell for line in done.record.of(VerifyLine)]
    assert not done.alive


def test_a_continued_run_verifies_what_is_left(measure: Measure, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Lanes.side_by_side

    def cut_off(self: Lanes, shares: Any) -> Any:
        yield from itertools.islice(whole(self, shares), 5)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(10)

    with monkeypatch.context() as patched:
        patched.setattr(Lanes, "side_by_side", cut_off)
        begun = measure(*ON_A_CARD)
    assert begun.status == 130
    assert len(begun.record.of(VerifyLine)) == 5
    assert not begun.alive
    done = measure(resume=begun.directory)
    assert done.status == 0
    assert len(done.record.of(VerifyLine)) == 16


# Getting ready to time


def _timed_in(done: Any) -> dict[tuple[str, int], int]:
    """The process of each workload's block."""
    blocks = [line for line in done.record.of(BlockLine) if line.state == "ok"]
    return {(line.workload, line.block): line.process for line in blocks}


def test_the_processes_that_time_get_ready_side_by_side(measure: Measure) -> None:
    done = measure(*TIMED)
    assert done.status == 0
    assert "preparing prefill graph, decode graph in 4 processes at a time" in done.err
    processes = _timed_in(done)
    assert len(processes) == 2 * 3
    # a third block is needed after the two of the first four processes, in a process of its own
    assert len(set(processes.values())) == 6
    timing = [line.process for line in done.record.of(ProcessLine) if line.purpose == "time"]
    assert sorted(processes.values()) == sorted(timing)
    assert not done.alive


def test_where_the_least_were_not_enough_as_many_again_get_ready_together(measure: Measure) -> None:
    done = measure(*TIMED, "measure.min_blocks=8", "measure.max_blocks=8")
    assert done.status == 0
    assert len(set(_timed_in(done).values())) == 2 * 8  # 2, 2 and 4 of each
    told = done.err.splitlines()
    assert told.count("preparing prefill graph, decode graph in 4 processes at a time") == 2
    assert told.count("preparing prefill graph, decode graph in 8 processes at a time") == 1
    assert "in 2 processes at a time" not in done.err
    assert not done.alive


def test_all_that_live_while_one_is_timed_count_as_the_runs_own(measure: Measure, fake_card: Any) -> None:
    strangers = []

    class Looking(fake_card):  # type: ignore[misc]
        def sample(self, own_pids: Any = None) -> Any:
            alive = {each.pid for each in psutil.Process().children() if each.status() != psutil.STATUS_ZOMBIE}
            strangers.append((alive - own_pids, len(alive)))
            return super().sample(own_pids)

    measure(*TIMED, card=Looking(Telemetry()))
    assert len(strangers) == 1 + 2 * 3  # before anything is measured, and behind each block
    assert not any(stranger for stranger, _ in strangers)
    assert max(count for _, count in strangers) == 5  # the next one stands by


@pytest.mark.parametrize(("context", "at_once"), [(30 * 2**30, 2), (50 * 2**30, 1)])
def test_no_more_of_them_than_the_card_holds(
    measure: Measure, monkeypatch: pytest.MonkeyPatch, context: int, at_once: int
) -> None:
    monkeypatch.setattr(capacity, "CONTEXT_BYTES", context)
    done = measure(*TIMED)
    assert done.status == 0
    assert ("in 2 processes at a time" in done.err) == (at_once == 2)
    assert "in 4 processes" not in done.err
    assert len(_timed_in(done)) == 2 * 3


@pytest.mark.parametrize("op", ["enter", "prepare", "visit"])
@pytest.mark.parametrize("fault", [DIES, OUT_OF_MEMORY])
def test_what_fails_beside_others_is_timed_again_alone(
    measure: Measure, tmp_path: Path, fault: dict[str, Any], op: str
) -> None:
    struck = tmp_path / "struck"
    cell = "flash+tie+mask+norm" if op != "enter" else "baseline"
    done = measure(*TIMED, faults=[{**fault, "op": op, "cell": cell, "once": str(struck)}])
    assert struck.exists()
    assert done.status == 0
    assert not done.record.of(FailureLine)
    assert len(_timed_in(done)) == 2 * 3
    assert not done.alive


@pytest.mark.parametrize("op", ["prepare", "visit"])
def test_what_fails_alone_too_fails_and_is_timed_no_more(measure: Measure, asked: Asked, op: str) -> None:
    done = measure(*TIMED, faults=[{**DIES, "op": op, "cell": "tie"}])
    assert done.status == 3
    # Four get ready beside each other, one alone for each workload. One is timed beside others, which are gone then.
    times = 4 + 2 if op == "prepare" else (1 + 1) + 2
    assert len([pid for pid, each in asked if each.op == op and getattr(each, "cell", "") == "tie"]) == times
    failures = [(line.cell, line.workload, line.status) for line in done.record.of(FailureLine)]
    assert sorted(failures) == [("tie", "decode", "crashed"), ("tie", "prefill", "crashed")]
    assert len(_timed_in(done)) == 2 * 3
    cells = done.run.cells.set_index(["cell", "workload"])["status"]
    assert set(cells.drop([("tie", "prefill"), ("tie", "decode")])) == {"ok"}


def test_compiling_is_done_alone_and_each_process_records_what_it_took(measure: Measure) -> None:
    compiled = {"does": "answer", "op": "prepare", "fields": {"compile_s": 1.5, "compile_options": {"a": 1}}}
    done = measure(*ON_A_CARD[:3], "runtime=graph,compile", *TIMED[4:], faults=[compiled])
    lines = [line for line in done.record.of(CompileLine) if line.runtime == "compile"]
    blocks = done.record.of(BlockLine)
    by_process = {line.process for line in lines}
    assert by_process == {line.process for line in blocks if line.runtime == "compile"}
    assert len(by_process) == 2 * 3
    assert {(line.seconds, line.options["a"]) for line in lines} == {(1.5, 1)}
    assert len(lines) == len(by_process) * 17  # the baseline's copy, too
    assert "preparing prefill graph, decode graph in 4 processes at a time" in done.err
    assert "preparing prefill compile in process" in done.err
    assert "compile in 2" not in done.err
