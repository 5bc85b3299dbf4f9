"""The fault matrix: what strikes one cell costs that cell alone, and nothing that was measured is lost."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from qwen3bench.campaign.blocks import PAUSED
from qwen3bench.campaign.worker_pool import WorkerPool
from qwen3bench.campaign.worker_process import WorkerProcess
from qwen3bench.record.lines import (
    BlockLine,
    EndLine,
    EvidenceLine,
    FailureLine,
    SampleLine,
    StopLine,
    Telemetry,
    VerifyLine,
    VisitLine,
)
from qwen3bench.record.messages import Request
from qwen3bench.record.writer import RecordWriter

pytestmark = pytest.mark.slow

Measure = Callable[..., Any]
OPTS = "opt=flash,tie"
FULL = ("design=full", OPTS)
CELLS = ("baseline", "flash", "tie", "flash+tie")
DIES = {"does": "die"}
HANGS = {"does": "hang"}
ENDS = {"does": "exit"}
OUT_OF_MEMORY = {"does": "error", "status": "oom", "reason": "CUDA out of memory"}
NOT_FINITE = {"does": "error", "status": "invalid", "reason": "its logits are not finite"}
BABBLES = {"does": "raw", "text": "\xff\x00 {]\n"}


def _counts(samples: pd.DataFrame) -> dict[tuple[str, int], int]:
    return samples.groupby(["cell", "copy"]).size().to_dict()


def test_without_faults_every_cell_is_ok(measure: Measure) -> None:
    done = measure(*FULL)
    assert done.status == 0
    assert done.statuses == dict.fromkeys(CELLS, "ok")
    assert _counts(done.run.samples) == {**{(cell, 0): 3 for cell in CELLS}, ("baseline", 1): 3}
    assert done.record.of(EndLine)[-1].status == "finished"
    assert not done.alive


@pytest.mark.parametrize(
    ("op", "fault", "status", "reason"),
    [
        *(
            (op, DIES, "crashed", "was ended by SIGKILL")
            for op in ("load", "parameters", "verify", "evidence", "visit")
        ),
        ("visit", ENDS, "crashed", "ended with exit status 0 without an answer"),
        ("visit", BABBLES, "crashed", "is no message"),
        ("prepare", OUT_OF_MEMORY, "oom", "CUDA out of memory"),
    ],
)
def test_a_fault_in_any_step_costs_its_cell_alone(
    measure: Measure, op: str, fault: dict[str, Any], status: str, reason: str
) -> None:
    where = {"cells": ["tie"]} if op == "load" else {"cell": "tie"}
    done = measure(*FULL, faults=[{**fault, "op": op, **where}])
    assert done.status == 3
    assert "Traceback" not in done.err
    assert done.statuses == {**dict.fromkeys(CELLS, "ok"), "tie": status}
    (failure,) = done.record.of(FailureLine)
    assert (failure.cell, failure.status) == ("tie", status)
    assert reason in failure.reason
    others = {key: n for key, n in _counts(done.run.samples).items() if key[0] != "tie"}
    assert others == {**{(cell, 0): 3 for cell in CELLS if cell != "tie"}, ("baseline", 1): 3}
    assert not done.alive


def test_a_worker_killed_amid_a_block_has_the_block_done_again_in_one_process(measure: Measure, tmp_path: Path) -> None:
    done = measure(*FULL, faults=[{**DIES, "op": "visit", "cell": "flash", "once": str(tmp_path / "struck")}])
    assert done.statuses == dict.fromkeys(CELLS, "ok")
    samples = done.record.frame(SampleLine)
    used = done.run.samples
    assert len(samples) > len(used)  # what the killed worker measured stays in the record
    assert set(used.groupby("block")["process"].nunique()) == {1}
    assert not used.duplicated(["block", "cell", "copy", "repeat"]).any()


FEW = {"does": "answer", "fields": {"samples": []}}


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str, int]]:
    """Every request that is sent: its operation, its cell and the process that it is sent to."""
    noted: list[tuple[str, str, int]] = []
    send = WorkerProcess.send

    def sent(self: WorkerProcess, request: Request[Any]) -> None:
        noted.append((request.op, *getattr(request, "cells", [getattr(request, "cell", "")]), self.pid))
        send(self, request)

    monkeypatch.setattr(WorkerProcess, "send", sent)
    return noted


@pytest.mark.parametrize(
    ("op", "fault"),
    [
        *((op, DIES) for op in ("load", "parameters", "verify", "evidence", "enter", "prepare", "visit")),
        *((op, fault) for op in ("evidence", "visit") for fault in (HANGS, ENDS, BABBLES)),
        ("visit", FEW),
    ],
)
def test_what_may_be_an_accident_costs_no_cell(
    measure: Measure, tmp_path: Path, asked: list[Any], op: str, fault: dict[str, Any]
) -> None:
    cell = "baseline" if op == "enter" else "tie"
    where = {"cells": [cell]} if op == "load" else {"cell": cell}
    faults = [{**fault, "op": op, **where, "once": str(tmp_path / "struck")}]
    done = measure(*FULL, "measure.step_timeout_s=0.5", faults=faults)
    assert done.status == 0
    assert done.statuses == dict.fromkeys(CELLS, "ok")
    assert done.record.of(FailureLine) == []
    assert done.err.count("to be asked again") == 1
    assert _counts(done.run.samples) == {**{(each, 0): 3 for each in CELLS}, ("baseline", 1): 3}
    first, again, *_ = (pid for name, of, pid in asked if (name, of) == (op, cell))
    assert first != again
    assert not done.alive


@pytest.mark.parametrize(("fault", "times"), [(DIES, 2), (HANGS, 2), (BABBLES, 2), (OUT_OF_MEMORY, 1), (NOT_FINITE, 1)])
@pytest.mark.parametrize("op", ["verify", "visit"])
def test_a_fault_is_asked_again_once_and_what_a_worker_says_itself_never(
    measure: Measure, asked: list[Any], op: str, fault: dict[str, Any], times: int
) -> None:
    done = measure(*FULL, "measure.step_timeout_s=0.5", faults=[{**fault, "op": op, "cell": "tie"}])
    assert {cell for cell, status in done.statuses.items() if status != "ok"} == {"tie"}
    assert len(done.record.of(FailureLine)) == 1
    assert len([pid for name, cell, pid in asked if (name, cell) == (op, "tie")]) == times


@pytest.mark.parametrize("op", ["verify", "prepare"])
def test_where_one_cell_hung_twice_the_hangs_of_others_are_waited_for_once(
    measure: Measure, asked: list[Any], op: str
) -> None:
    faults = [{**HANGS, "op": op, "cell": cell} for cell in CELLS[1:]]
    done = measure(*FULL, "measure.step_timeout_s=0.3", faults=faults)
    assert done.statuses == {"baseline": "ok", **dict.fromkeys(CELLS[1:], "timeout")}
    hung = [cell for name, cell, _ in asked if name == op and cell != "baseline"]
    assert sorted(map(hung.count, CELLS[1:])) == [1, 1, 2]


def test_a_baseline_that_fails_leaves_the_others_without_a_speedup(measure: Measure) -> None:
    done = measure(*FULL, faults=[{**DIES, "op": "prepare", "cell": "baseline"}])
    assert done.status == 3
    assert done.statuses == {**dict.fromkeys(CELLS, "ok"), "baseline": "crashed"}
    assert done.run.cells["speedup"].isna().all()
    assert (done.run.samples["cell"] != "baseline").all()


@pytest.mark.parametrize("op", ["memory", "visit"])
def test_out_of_memory_is_told_with_its_peak(measure: Measure, op: str) -> None:
    fault = {"does": "raw", "op": op, "cell": "flash"}
    fault["text"] = '{"error":{"status":"oom","reason":"out of memory","peak_allocated_bytes":123}}\n'
    done = measure(*FULL, "device=cuda", faults=[fault])
    assert done.status == 3
    assert done.statuses == {**dict.fromkeys(CELLS, "ok"), "flash": "oom"}
    (failure,) = done.record.of(FailureLine)
    assert (failure.pass_, failure.peak_allocated_bytes) == ("time" if op == "visit" else op, 123)
    looked_at = [line.cell for line in done.record.of(EvidenceLine)]
    assert looked_at == [cell for cell in CELLS if op == "visit" or cell != "flash"]


def test_memory_for_no_cache_costs_the_cells_of_that_workload_alone(measure: Measure) -> None:
    """`enter` makes the inputs: what fails there is laid at each cell in turn, and the run ends."""
    done = measure(*FULL, "workload=prefill,decode", faults=[{**OUT_OF_MEMORY, "op": "enter", "workload": "decode"}])
    assert done.status == 3
    by_workload = done.run.cells.groupby("workload")["status"].unique()
    assert list(by_workload["prefill"]) == ["ok"]
    assert list(by_workload["decode"]) == ["oom"]
    assert {line.workload: line.reason for line in done.record.of(StopLine)} == {
        "prefill": "max_blocks",
        "decode": "failed",
    }


def test_a_worker_that_hangs_times_out_and_its_group_is_ended(measure: Measure) -> None:
    started = time.monotonic()
    done = measure(*FULL, "measure.step_timeout_s=0.5", faults=[{**HANGS, "op": "visit", "cell": "flash+tie"}])
    assert time.monotonic() - started < 60
    assert done.status == 3
    assert done.statuses == {**dict.fromkeys(CELLS, "ok"), "flash+tie": "timeout"}
    assert "said nothing for 0.5 s" in done.record.of(FailureLine)[0].reason
    assert not done.alive


def test_logits_that_are_not_finite_publish_no_timing(measure: Measure) -> None:
    done = measure(*FULL, faults=[{**NOT_FINITE, "op": "prepare", "cell": "flash"}])
    assert done.status == 3
    row = done.run.cells.set_index("cell").loc["flash"]
    assert row["status"] == "invalid"
    assert row[["latency_s", "latency_lo_s", "latency_hi_s", "tokens_per_s", "speedup", "mfu", "mbu"]].isna().all()
    assert "flash" not in set(done.run.samples["cell"])


def test_a_cell_that_is_not_equivalent_gets_no_speedup(measure: Measure) -> None:
    fields = {"equivalent": False, "reason": "leaks the future"}
    done = measure(*FULL, faults=[{"does": "answer", "fields": fields, "op": "verify", "cell": "flash"}])
    assert done.status == 3
    row = done.run.cells.set_index("cell").loc["flash"]
    assert (row["status"], row["reason"]) == ("not_equivalent", "leaks the future")
    assert pd.isna(row["speedup"])
    assert row["latency_s"] > 0


def test_a_cell_compiled_again_after_its_warm_up_is_invalid_and_not_timed(measure: Measure) -> None:
    done = measure(*FULL, faults=[{"does": "answer", "fields": {"recompiles": 2}, "op": "evidence", "cell": "flash"}])
    assert done.status == 3
    row = done.run.cells.set_index("cell").loc["flash"]
    assert row["status"] == "invalid"
    assert "compiled 2 more graphs" in row["reason"]
    assert "flash" not in set(done.run.samples["cell"])


@pytest.mark.parametrize(
    ("pass_", "fields", "status"),
    [
        ("evidence", {"recompiles": 2}, "invalid"),
        ("verify", {"equivalent": False}, "not_equivalent"),
        ("verify", {"equivalent": False, "ran": False}, "crashed"),
    ],
)
def test_a_cell_stays_failed_wherever_the_record_was_cut(
    measure: Measure, tmp_path: Path, pass_: str, fields: dict[str, Any], status: str
) -> None:
    faults = [{"does": "answer", "fields": fields, "op": pass_, "cell": "flash"}]
    whole = measure(*FULL, faults=faults)
    lines = (whole.directory / "samples.jsonl").read_bytes().splitlines(keepends=True)
    told = [
        i for i, line in enumerate(lines) if b'"flash"' in line and (b'"failure"' in line or pass_.encode() in line)
    ]
    for cut in range(min(told), max(told) + 2):
        part = tmp_path / f"cut-{cut}"
        part.mkdir()
        (part / "samples.jsonl").write_bytes(b"".join(lines[:cut]))
        done = measure(resume=part, faults=faults)
        assert done.statuses == whole.statuses, cut
        assert done.statuses["flash"] == status


def test_the_worker_started_ahead_may_die_before_it_is_needed(
    measure: Measure, start_fake: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    await_ahead = WorkerPool.await_ahead

    def killed(workers: WorkerPool) -> None:
        await_ahead(workers)
        for worker in workers.ahead:
            os.kill(worker.pid, signal.SIGKILL)

    monkeypatch.setattr(WorkerPool, "await_ahead", killed)
    done = measure(*FULL, "measure.max_blocks=6", "measure.min_blocks=6")
    assert done.status == 0
    assert len(done.record.of(BlockLine)) == 6
    assert len({line.process for line in done.record.of(BlockLine)}) == 3


def test_without_what_the_gate_said_a_cell_gets_no_speedup(measure: Measure) -> None:
    done = measure(*FULL)
    record = done.directory / "samples.jsonl"
    lines = record.read_bytes().splitlines(keepends=True)
    (at,) = (i for i, line in enumerate(lines) if b'"type":"verify"' in line and b'"cell":"flash",' in line)
    lines[at] = lines[at].replace(b"true", b"tru3", 1)
    record.write_bytes(b"".join(lines))
    row = done.run.cells.set_index("cell").loc["flash"]
    assert row["status"] == "not_equivalent"
    assert "lost what the gate said" in row["reason"]
    assert pd.isna(row["speedup"])


def test_a_device_that_cannot_tell_its_ceilings_is_measured_all_the_same(measure: Measure) -> None:
    done = measure(*FULL, faults=[{**OUT_OF_MEMORY, "op": "ceilings"}])
    assert done.status == 0
    assert done.run.cells["mfu"].isna().all()
    assert done.record.of(FailureLine) == []


@pytest.mark.parametrize(
    ("op", "fault"),
    [("probe", ENDS), ("open", DIES), ("identify", BABBLES), ("probe", {"does": "answer", "fields": {"device": None}})],
)
def test_a_worker_that_cannot_start_is_one_clear_line(measure: Measure, op: str, fault: dict[str, Any]) -> None:
    done = measure(*FULL, faults=[{**fault, "op": op}])
    assert "no worker could be started" in done.error


def test_a_later_worker_that_cannot_start_leaves_a_run_that_can_be_continued(measure: Measure) -> None:
    broken = measure(*FULL, faults=[{**DIES, "op": "open"}], since=2)
    assert "no worker could be started" in broken.error
    assert {line.cell for line in broken.record.of(VerifyLine)} == set(CELLS)
    assert measure(resume=broken.directory).status == 0


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"package": "/other/qwen3bench"}, "/other/qwen3bench: a worker runs this"),
        ({"code": "0"}, "its code has changed"),
    ],
)
def test_a_worker_that_runs_other_code_measures_nothing(measure: Measure, fields: dict[str, str], said: str) -> None:
    fault = {"does": "answer", "fields": fields, "op": "open"}
    assert said in measure(*FULL, faults=[fault]).error
    broken = measure(*FULL, faults=[fault], since=2)
    assert said in broken.error
    assert {line.process for line in broken.record.of(SampleLine)} <= {0, 1}
    assert measure(resume=broken.directory).status == 0


def test_every_cell_failing_is_said_and_leaves_a_report_that_says_why(measure: Measure) -> None:
    done = measure(*FULL, faults=[{**DIES, "op": "prepare"}], report=True)
    assert done.status == 3
    assert "qwen3bench: error: no cell could be measured" in done.err
    assert done.statuses == dict.fromkeys(CELLS, "crashed")
    for name in ("report.md", "report.html"):
        text = (done.directory / name).read_text("utf-8")
        assert "crashed" in text
        assert "was ended by SIGKILL" in text
    assert done.run.effects[done.run.effects["metric"] == "latency_s"].empty
    assert done.run.cells[["latency_s", "speedup"]].isna().all(axis=None)


@pytest.mark.parametrize("missing", [("flash",), ("baseline",), ("flash", "tie+norm"), ("flash+tie+norm",)])
def test_missing_cells_give_no_made_up_number(measure: Measure, missing: tuple[str, ...]) -> None:
    faults = [{**DIES, "op": "prepare", "cell": cell} for cell in missing]
    done = measure("design=full", "opt=flash,tie,norm", faults=faults)
    assert done.status == 3
    cells = done.run.cells.set_index("cell")
    assert cells.loc[list(missing), ["latency_s", "speedup", "tokens_per_s"]].isna().all(axis=None)
    effects = done.run.effects[done.run.effects["metric"] == "latency_s"]
    shapley = effects[effects["kind"] == "shapley"]
    assert shapley["estimate"].isna().all()
    assert shapley["verdict"].isin(["faster", "slower", "same"]).sum() == 0
    assert effects.loc[effects["estimate"].isna(), ["lo", "hi", "p_holm"]].isna().all(axis=None)
    known = effects[(effects["kind"] == "main") & effects["estimate"].notna()].set_index("term")["estimate"]
    truth = {"flash": 1 / 0.9, "tie": 1.0, "norm": 1 / 0.8}
    for term, estimate in known.items():
        assert estimate == pytest.approx(truth[term], rel=0.02)


# The card


THROTTLED = Telemetry(throttle_reasons=("hw_thermal_slowdown",), sm_clock_mhz=900)
COOL = Telemetry(throttle_reasons=("gpu_idle",), sm_clock_mhz=1900)


def test_a_block_that_was_throttled_is_done_again(measure: Measure, fake_card: Callable[..., Any]) -> None:
    done = measure(*FULL, card=fake_card(COOL, THROTTLED, COOL))
    assert done.status == 0
    states = [(line.block, line.attempt, line.state) for line in done.record.of(BlockLine)]
    assert states == [(0, 0, "ok"), (1, 0, "repeat"), (1, 1, "ok"), (2, 0, "ok")]
    used = done.run.samples
    assert set(used[used["block"] == 1]["attempt"]) == {1}
    assert _counts(used) == {**{(cell, 0): 3 for cell in CELLS}, ("baseline", 1): 3}


def test_throttling_that_stays_is_flagged_and_never_an_empty_row(
    measure: Measure, fake_card: Callable[..., Any]
) -> None:
    done = measure(*FULL, card=fake_card(THROTTLED))
    assert done.status == 0
    blocks = done.record.of(BlockLine)
    assert [line.state for line in blocks] == 3 * ["repeat", "repeat", "flagged"]
    assert all(line.flags == ("hw_thermal_slowdown",) for line in blocks)
    assert done.run.cells["latency_s"].notna().all()


def test_a_block_with_a_pause_is_done_again(measure: Measure, tmp_path: Path) -> None:
    fault = {
        "does": "answer",
        "op": "visit",
        "cell": "tie",
        "fields": {"paused": True},
        "once": str(tmp_path / "paused"),
    }
    done = measure(*FULL, faults=[fault])
    assert done.status == 0
    blocks = done.record.of(BlockLine)
    assert [(line.block, line.state) for line in blocks] == [(0, "repeat"), (0, "ok"), (1, "ok"), (2, "ok")]
    assert blocks[0].flags == (PAUSED,)
    assert [(line.cell, line.attempt) for line in done.record.of(VisitLine) if line.paused] == [("tie", 0)]
    assert set(done.run.samples[done.run.samples["block"] == 0]["attempt"]) == {1}


def test_pauses_that_stay_are_flagged(measure: Measure) -> None:
    done = measure(*FULL, faults=[{"does": "answer", "op": "visit", "cell": "tie", "fields": {"paused": True}}])
    blocks = done.record.of(BlockLine)
    assert [line.state for line in blocks] == 3 * ["repeat", "repeat", "flagged"]
    assert all(line.flags == (PAUSED,) for line in blocks)


# The results directory


@pytest.mark.parametrize("after", [1, 2])
def test_a_directory_that_is_removed_while_it_runs_is_named(
    measure: Measure, fake_card: Any, tmp_path: Path, after: int
) -> None:
    class Removing(fake_card):  # type: ignore[misc]
        looked = 0

        def sample(self, own_pids: object = None) -> Telemetry:
            self.looked += 1
            if self.looked == after:
                shutil.rmtree(tmp_path / "run")
            return COOL

    done = measure(*FULL, card=Removing(COOL))
    assert "was removed while the run wrote there; what it held is lost, so start the run again" in done.error
    assert not (tmp_path / "run").exists()
    assert done.alive == []


def test_a_foreign_process_on_the_card_is_flagged(measure: Measure, fake_card: Callable[..., Any]) -> None:
    done = measure(*FULL, card=fake_card(Telemetry(foreign_processes=(4711,))))
    blocks = done.record.of(BlockLine)
    assert [line.state for line in blocks] == 3 * ["repeat", "repeat", "flagged"]
    assert all(line.flags == ("foreign process 4711",) for line in blocks)
    assert all(line.foreign_processes == (4711,) for line in blocks)


def test_without_nvml_its_fields_are_empty(measure: Measure, fake_card: Callable[..., Any]) -> None:
    done = measure(*FULL, card=fake_card(Telemetry()))
    names = ("sm_clock_mhz", "memory_clock_mhz", "temperature_c", "power_w", "throttle_reasons", "foreign_processes")
    for line in done.record.of(BlockLine):
        assert line.state == "ok"
        assert [getattr(line, name) for name in names] == [None] * len(names)


def test_a_clock_set_back_changes_no_duration(measure: Measure, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = time.time, iter(range(10**9))
    monkeypatch.setattr(time, "time", lambda: real() - 1000 * next(calls))
    started = time.monotonic()
    done = measure(*FULL)
    elapsed_s = time.monotonic() - started
    assert done.status == 0
    durations = [line.elapsed_s for line in done.record.of(BlockLine)]
    durations += [line.measured_s for line in done.record.of(StopLine)]
    assert all(0 <= duration_s <= elapsed_s for duration_s in durations)
    blocks = [line.time for line in done.record.of(BlockLine)]
    assert blocks == sorted(blocks, reverse=True)  # the clock did jump


# The disk


def test_an_unwritable_directory_is_refused_before_a_worker_starts(measure: Measure, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    done = measure(to=tmp_path / "file" / "run")
    assert "is a file, or below one" in done.error
    assert done.pids == []


def test_a_second_run_in_a_directory_is_refused_before_a_worker_starts(measure: Measure, tmp_path: Path) -> None:
    with RecordWriter(tmp_path / "run"):
        done = measure(*FULL)
    assert f"another run (process {os.getpid()}) is writing there" in done.error
    assert done.pids == []


@pytest.mark.parametrize("room_bytes", [0, 3000, 7000])
def test_a_full_disk_is_one_clear_line_and_the_run_goes_on_later(
    measure: Measure, monkeypatch: pytest.MonkeyPatch, room_bytes: int
) -> None:
    whole = measure(*FULL, to=Path("whole"))
    real = os.write

    def write(file: int, data: bytes) -> int:
        path = Path(f"/proc/self/fd/{file}")
        if path.exists() and path.readlink().name == "samples.jsonl":
            room = room_bytes - os.fstat(file).st_size
            if room <= 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            data = data[:room]
        return real(file, data)

    with monkeypatch.context() as patched:
        patched.setattr(os, "write", write)
        full = measure(*FULL)
    assert "No space left on device" in full.error
    assert not full.alive
    content = (full.directory / "samples.jsonl").read_bytes()
    assert content == b"" or content.endswith(b"}\n")
    assert measure(*FULL).status == 0
    assert _counts(full.run.samples) == _counts(whole.run.samples)
