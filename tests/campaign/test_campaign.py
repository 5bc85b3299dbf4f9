"""The passes of a run: what is asked in which order, when it stops, and what is taken up again."""

from __future__ import annotations

import csv
import io
import json
import math
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from rich.console import Console

from qwen3bench.analysis.frames import SAMPLE_COLUMNS
from qwen3bench.analysis.run import load_run, write_derived
from qwen3bench.analysis.stopping import half_widths
from qwen3bench.campaign.context import RunContext
from qwen3bench.campaign.forecast import processes_for
from qwen3bench.campaign.lanes import Lane, Lanes
from qwen3bench.campaign.passes import Campaign
from qwen3bench.campaign.progress import Reporter
from qwen3bench.campaign.state import Place, RunState
from qwen3bench.campaign.worker_pool import ProcessNumbers, Seat, WorkerPool
from qwen3bench.config.choices import choices
from qwen3bench.config.settings import settings_from
from qwen3bench.record.design import block_order
from qwen3bench.record.lines import (
    LINES,
    BlockLine,
    CompileLine,
    EvidenceLine,
    PassLine,
    ProcessLine,
    RunLine,
    SampleLine,
    SessionLine,
    StopLine,
    Telemetry,
    VisitLine,
)
from qwen3bench.record.messages import Pace
from qwen3bench.record.reader import read_record
from qwen3bench.record.states import CellStatus
from qwen3bench.record.typed import made
from qwen3bench.record.writer import RecordWriter

Measure = Callable[..., Any]
FULL = ("design=full", "opt=flash,tie")
CELLS = ["baseline", "flash", "tie", "flash+tie"]


@pytest.mark.slow
def test_a_process_measures_blocks_of_one_workload_alone(measure: Measure) -> None:
    sizes = ["measure.blocks_per_process=2", "measure.max_blocks=5", "measure.min_blocks=5", "measure.repeats=2"]
    done = measure(*FULL, "workload=prefill,generate", *sizes)
    blocks = done.record.frame(BlockLine).groupby("workload")
    first = done.record.frame(BlockLine)["process"].min()
    for workload, processes in (("prefill", [0, 0, 2, 2, 4]), ("generate", [1, 1, 3, 3, 5])):
        rows = blocks.get_group(workload)
        assert list(rows["block"]) == [0, 1, 2, 3, 4]
        assert list(rows["process"] - first) == processes
    purposes = {line.process: line.purpose for line in done.record.of(ProcessLine)}
    assert [purposes[p] for p in sorted(set(done.record.frame(BlockLine)["process"]))] == ["time"] * 6


def test_one_process_does_not_use_up_the_blocks_of_the_others(measure: Measure) -> None:
    sizes = ["measure.blocks_per_process=50", "measure.max_blocks=7", "measure.min_processes=2"]
    blocks = measure(*FULL, *sizes).record.frame(BlockLine)
    assert list(blocks.process - blocks.process.iloc[0]) == [0, 0, 0, 0, 1, 1, 1]


def test_blocks_are_visited_in_the_seeded_order_with_the_baseline_twice(measure: Measure) -> None:
    done = measure(*FULL, "measure.repeats=3", "seed=7")
    samples = done.record.frame(SampleLine)
    for block in range(3):
        rows = samples[samples["block"] == block].drop_duplicates("position").sort_values("position")
        visited = list(zip(rows["cell"], rows["copy"], strict=True))
        assert visited == block_order(CELLS, 7, "prefill", "eager", block, 0)
    assert all(list(visit) == [0, 1, 2] for _, visit in samples.groupby(["block", "position"])["repeat"])
    assert all(line.samples == 3 for line in done.record.of(VisitLine))


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (["measure.target=0.5", "measure.min_processes=2", "measure.min_blocks=8", "measure.max_blocks=50"], "target"),
        (["measure.max_blocks=4"], "max_blocks"),
        (["measure.max_blocks=50", "measure.max_seconds=1e-6"], "max_seconds"),
    ],
)
def test_it_says_why_it_stops(measure: Measure, overrides: list[str], reason: str) -> None:
    done = measure(*FULL, *overrides)
    (stop,) = done.record.of(StopLine)
    assert stop.reason == reason
    assert stop.blocks == len(done.record.of(BlockLine))
    assert set(stop.half_width) == {"flash", "tie"}
    if reason == "target":
        assert all(width <= 0.5 for width in stop.half_width.values())
        assert stop.processes >= 2


@pytest.mark.parametrize("quick_s", [60.0, 0.0])
def test_where_judging_takes_long_it_is_not_done_after_each_block(
    measure: Measure, monkeypatch: pytest.MonkeyPatch, quick_s: float
) -> None:
    """Of 10^6 samples it takes seconds."""
    judged: list[int] = []

    def counted(samples: Sequence[SampleLine], factors: Sequence[str]) -> dict[str, float]:
        judged.append(len(samples))
        time.sleep(0.02)
        return half_widths(samples, factors)

    monkeypatch.setattr("qwen3bench.campaign.replication.half_widths", counted)
    monkeypatch.setattr("qwen3bench.campaign.replication.QUICK_S", quick_s)
    done = measure(*FULL, "measure.max_blocks=12", "measure.min_blocks=12", "measure.blocks_per_process=12")
    (stop,) = done.record.of(StopLine)
    assert (stop.blocks, set(stop.half_width)) == (12, {"flash", "tie"})
    assert len(judged) >= 12 if quick_s else len(judged) <= 6
    assert judged[-1] == len(done.record.of(SampleLine))


@pytest.mark.slow
def test_a_process_measures_as_long_as_it_took_to_be_ready(measure: Measure, monkeypatch: pytest.MonkeyPatch) -> None:
    """And getting ready is no part of the time allowed."""
    await_ahead = WorkerPool.await_ahead

    def slowly(workers: WorkerPool) -> None:
        time.sleep(0.4)
        await_ahead(workers)

    monkeypatch.setattr(WorkerPool, "await_ahead", slowly)
    monkeypatch.setattr("qwen3bench.campaign.replication.MEASURED_PER_SETUP", 1.0)
    limits = ("measure.max_seconds=2", "measure.target=1e-9", "measure.max_blocks=1000", "measure.min_blocks=2")
    done = measure(*FULL, *limits, "measure.min_processes=2", "measure.blocks_per_process=1")
    (stop,) = done.record.of(StopLine)
    assert stop.reason == "max_seconds"
    measured_s = done.record.frame(BlockLine).groupby("process")["elapsed_s"].sum()
    assert stop.measured_s == pytest.approx(measured_s.sum())
    assert stop.measured_s >= 2
    assert (measured_s.iloc[:-1] >= 0.4).all()  # the last one ends with the time
    assert 2 <= stop.processes <= 5
    assert stop.more_s >= 0.4 * (stop.processes - 2)
    more_s = done.record.frame(BlockLine).groupby("process")["more_s"].sum()
    assert (more_s.iloc[:2] == 0).all()  # a run takes these two at least
    settings = settings_from(done.record.run.config)
    begun = RunState(settings, done.record).timings["prefill", "eager"]  # as a continued run would begin
    assert begun.more_s == pytest.approx(stop.more_s)


@pytest.mark.slow
def test_a_run_without_an_answer_says_what_one_takes(measure: Measure) -> None:
    limits = ("measure.max_blocks=9", "measure.target=0.0001", "measure.blocks_per_process=1")
    done = measure(*FULL, *limits)
    takes = [line for line in done.err.splitlines() if line.startswith("prefill eager: ")]
    assert takes
    assert re.fullmatch(
        r"prefill eager: (flash|tie) is known to ±[\d.]+ %, and ±0\.01 % takes about "
        r"([\d,]+ more process(es)? \(.*\).*|\d+ (minutes|hours|days): more than this machine can tell .*)",
        takes[-1],
    )
    assert not [
        line for line in measure(*FULL, to=done.directory.with_name("told")).err.splitlines() if " takes about" in line
    ]


@pytest.mark.parametrize(
    ("over", "processes", "more"), [(1.01, 5, 1), (2.0, 5, 15), (1.4, 3, 3), (math.inf, 3, 3), (1e9, 3, 29_997)]
)
def test_an_interval_shrinks_by_the_root_of_its_processes(over: float, processes: int, more: int) -> None:
    assert processes_for(over, processes) == more


@pytest.mark.slow
def test_narrow_intervals_take_more_processes(measure: Measure) -> None:
    limits = ("measure.target=null", "measure.min_processes=null", "measure.min_blocks=3", "measure.max_blocks=200")
    done = measure(*FULL, "device=cuda", "runtime=eager,graph", *limits, "measure.blocks_per_process=2")
    stops = {stop.runtime: stop for stop in done.record.of(StopLine)}
    assert {stop.reason for stop in stops.values()} == {"target"}
    assert stops["graph"].processes == 5
    assert stops["eager"].processes in (3, 4)


@pytest.mark.slow
def test_the_blocks_are_shared_among_as_many_processes_as_it_takes(measure: Measure) -> None:
    limits = ("measure.target=null", "measure.min_processes=null", "measure.min_blocks=20", "measure.max_blocks=20")
    done = measure(*FULL, "device=cuda", "runtime=graph", *limits, "measure.blocks_per_process=50")
    blocks = [line.process for line in done.record.of(BlockLine)]
    assert [blocks.count(process) for process in dict.fromkeys(blocks)] == [4] * 5


def test_the_gate_and_the_evidence_come_before_the_first_timing(measure: Measure) -> None:
    done = measure(*FULL)
    types = [json.loads(line)["type"] for line in (done.directory / "samples.jsonl").open()]
    order = ["run", "session", "parameters", "verify", "evidence", "ceiling", "sample", "stop", "end"]
    assert sorted(order, key=types.index) == order
    for before, after in (("parameters", "verify"), ("verify", "evidence"), ("evidence", "ceiling")):
        assert max(i for i, t in enumerate(types) if t == before) < types.index(after)


def test_what_a_switch_changed_is_told_by_cells_that_are_not_measured(measure: Measure) -> None:
    done = measure("design=pair", "opt=flash,tie")
    assert [line.cell for line in done.record.of(EvidenceLine)] == ["baseline", "flash+tie", "tie", "flash"]
    assert [line.cell for line in done.run.evidence] == ["baseline", "flash+tie"]
    notes = " ".join(done.run.evidence[1].notes)
    assert "flash changed nothing that ran: same kernels as tie" in notes  # the fake worker's cells run alike
    assert set(done.run.cells["cell"]) == {"baseline", "flash+tie"}


@pytest.mark.slow
def test_of_generate_whose_last_step_alone_is_looked_at_nothing_is_said_to_be_the_same(measure: Measure) -> None:
    done = measure(*FULL, "workload=[generate,decode]")
    said = {line.workload for line in done.run.evidence if "changed nothing" in " ".join(line.notes)}
    assert said == {"decode"}


# Taken up again


def test_what_crashed_in_the_gradient_gate_is_not_trained_and_what_is_wrong_there_is(
    small_settings: Callable[..., Any],
) -> None:
    """Of its workload alone: the gate says nothing of the others."""
    state = RunState(small_settings("workload=prefill,train"))
    state.failures |= {Place("flash", "train"): CellStatus.CRASHED, Place("tie", "train"): CellStatus.NOT_EQUIVALENT}
    assert not state.runs(Place("flash", "train", "eager"))
    assert state.runs(Place("flash", "prefill", "eager"))
    assert state.runs(Place("flash"))
    assert state.runs(Place("tie", "train", "eager"))


@contextmanager
def _begun(directory: Path, settings: Any, *lines: dict[str, Any]) -> Iterator[RecordWriter]:
    with RecordWriter(directory) as writer:
        run = {"config": settings.to_dict(), "factors": list(settings.factors), "cells": CELLS}
        begun = RunLine(**run, workloads=("prefill",), runtimes=("eager",))
        writer.append(begun, *(made(LINES[line["type"]], line) for line in lines))
        yield writer


def _campaign(settings: Any, writer: RecordWriter, record: Any, start: Any, card: Any) -> Campaign:
    state = RunState(settings, record)
    pool = WorkerPool(settings, writer, Seat(start, "left", "GPU-1"), numbers=ProcessNumbers(state.process))
    quiet = Reporter(Console(file=io.StringIO()))
    context = RunContext(settings, writer, quiet, state, pool)
    return Campaign(Lanes([Lane(context, card)]))


@pytest.fixture
def campaign(
    tmp_path: Path, small_settings: Callable[..., Any], telling_worker: Any, fake_card: Any
) -> Callable[..., Any]:
    """Runs a campaign over a record that holds `lines`; gives the record and the operations asked for."""

    def go(*lines: dict[str, Any], looks: list[Telemetry] | None = None) -> tuple[Any, list[str]]:
        asked: list[str] = []

        def note(op: str, fields: dict[str, Any]) -> dict[str, Any]:
            asked.append(op)
            return fields

        settings = small_settings(*FULL).resolved("cpu")
        with _begun(tmp_path, settings, *lines) as writer:
            card = fake_card(*(looks or [Telemetry()]))
            begun = _campaign(settings, writer, read_record(tmp_path), lambda log: telling_worker(note), card)
            begun.check()
            begun.run()
        return load_run(tmp_path), asked

    return go


WHERE = {"workload": "prefill", "runtime": "eager"}


def _visit(block: int, attempt: int, cell: str, copy: int = 0, process: int = 3) -> list[dict[str, Any]]:
    at = {**WHERE, "cell": cell, "copy": copy, "process": process, "block": block, "attempt": attempt, "position": 0}
    sample = {"type": "sample", **at, "repeat": 0, "latency_s": 99.0, "time": 0.0}
    return [sample, {"type": "visit", **at, "samples": 1}]


def _block(block: int, attempt: int, state: str) -> list[dict[str, Any]]:
    visits = [
        v for cell, copy in [*((c, 0) for c in CELLS), ("baseline", 1)] for v in _visit(block, attempt, cell, copy)
    ]
    end = {"type": "block", **WHERE, "process": 3, "block": block, "attempt": attempt, "state": state, "elapsed_s": 5.0}
    return [*visits, end]


PROCESS = {"type": "process", "process": 3, "pid": 1, "purpose": "time"}


def test_a_block_that_was_cut_off_gets_another_attempt_and_counts_once(campaign: Callable[..., Any]) -> None:
    run, _ = campaign(PROCESS, *_block(0, 0, "ok"), *_visit(1, 0, "flash"), *_visit(1, 0, "tie"))
    used = run.samples
    assert set(used[used["latency_s"] == 99.0]["block"]) == {0}
    assert not used.duplicated(["block", "cell", "copy", "repeat"]).any()
    assert sorted(set(zip(used["block"], used["attempt"], strict=True))) == [(0, 0), (1, 1), (2, 0)]
    assert used[used["block"] > 0]["process"].min() > 3


def _without(lines: list[bytes], lost: str) -> list[bytes]:
    """The lines of a record, of block 1 without one value of flash (its line damaged), its visit line, or both."""
    kept = []
    for line in lines:
        told = json.loads(line)
        of_flash = (told.get("block"), told.get("cell")) == (1, "flash")
        if of_flash and lost == "value" and told.get("repeat") == 1:
            kept.append(line.replace(b"latency_s", b"latency_z"))
        elif not (of_flash and (lost == "whole visit" or (lost == "visit line" and told["type"] == "visit"))):
            kept.append(line)
    return kept


@pytest.mark.slow
@pytest.mark.parametrize("stopped", [False, True], ids=["while-it-measured", "behind-its-last-block"])
@pytest.mark.parametrize("lost", ["value", "visit line", "whole visit"])
def test_a_block_that_lost_a_value_is_measured_again(measure: Measure, lost: str, stopped: bool) -> None:
    done = measure(*FULL, "measure.repeats=2")
    record = done.directory / "samples.jsonl"
    lines = record.read_bytes().splitlines(keepends=True)
    blocks = [at for at, line in enumerate(lines) if b'"type":"block"' in line]
    (stop,) = (at for at, line in enumerate(lines) if b'"type":"stop"' in line)
    record.write_bytes(b"".join(_without(lines[: stop + 1 if stopped else blocks[1] + 1], lost)))
    said = "1 block (prefill eager, block 1 first) lost values"
    assert load_run(done.directory).warnings[-1].startswith(said)
    again = measure(resume=done.directory)
    assert again.status == 0
    assert f"warning: {said}" in " ".join(again.err.split())
    assert [(each.block, each.attempt, each.state) for each in again.record.of(BlockLine)] == [
        *((0, 0, "ok"), (1, 0, "ok")),
        *([(2, 0, "ok"), (1, 1, "ok")] if stopped else [(1, 1, "ok"), (2, 0, "ok")]),
    ]
    used = again.run.samples
    assert set(zip(used["block"], used["attempt"], strict=True)) == {(0, 0), (1, 1), (2, 0)}
    assert set(used.groupby(["block", "cell", "copy"]).size()) == {2}
    assert [(each.blocks, each.reason) for each in again.record.stops] == [(3, "max_blocks")]
    assert not [warning for warning in again.run.warnings if "lost values" in warning or "tell again" in warning]


def test_throttling_before_the_interruption_counts(campaign: Callable[..., Any]) -> None:
    throttled = Telemetry(throttle_reasons=("hw_slowdown",))
    before = [*_block(0, 0, "repeat"), *_block(0, 1, "repeat")]
    run, _ = campaign(PROCESS, *before, looks=[throttled, Telemetry()])
    states = [(b.block, b.attempt, b.state) for b in run.record.of(BlockLine)]
    assert states == [(0, 0, "repeat"), (0, 1, "repeat"), (0, 2, "flagged"), (1, 0, "ok"), (2, 0, "ok")]


def test_an_attempt_that_lost_values_was_not_disturbed(campaign: Callable[..., Any]) -> None:
    *visits, block = _block(0, 0, "ok")
    throttled = [Telemetry(throttle_reasons=("hw_slowdown",))] * 3
    run, _ = campaign(PROCESS, *visits, {**block, "visits": len(visits)}, looks=[*throttled, Telemetry()])
    states = [(b.attempt, b.state) for b in run.record.of(BlockLine) if b.block == 0]
    assert states == [(0, "ok"), (1, "repeat"), (2, "repeat"), (3, "flagged")]


def test_a_run_that_had_enough_blocks_only_says_so(campaign: Callable[..., Any]) -> None:
    run, asked = campaign(PROCESS, *(line for block in range(3) for line in _block(block, 0, "ok")))
    assert "visit" not in asked
    assert [(line.reason, line.blocks, line.measured_s) for line in run.record.of(StopLine)] == [
        ("max_blocks", 3, 15.0)
    ]


def test_a_cell_that_failed_is_not_tried_again(campaign: Callable[..., Any]) -> None:
    failure = {"type": "failure", "cell": "tie", **WHERE, "status": "oom", "reason": "too large", "pass": "time"}
    run, _ = campaign(failure)
    assert dict(zip(run.cells["cell"], run.cells["status"], strict=True)) == {
        **dict.fromkeys(CELLS, "ok"),
        "tie": "oom",
    }
    assert "tie" not in set(run.samples["cell"])


def test_steps_that_ended_are_not_done_again(campaign: Callable[..., Any]) -> None:
    lines = [{"type": "verify", "cell": cell, "equivalent": True} for cell in CELLS[:3]]
    lines += [{"type": "parameters", "cell": cell, "num_parameters": 1} for cell in CELLS]
    _, asked = campaign(*lines, {"type": "ceiling"})
    assert (asked.count("verify"), asked.count("parameters"), asked.count("ceilings"), asked.count("load")) == (
        1,
        0,
        0,
        0,
    )
    assert asked.count("evidence") == 4


# Whatever a worker says

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
NAMES = ["reason", "equivalent", "max_abs_error", "checks", "peak_allocated_bytes", "attention_backend", "kernels"]
NAMES += ["notes", "kernel_launches", "flops", "copy_bytes_per_s", "vendor", "samples", "time", "compile_s", "type"]
NAMES += ["v", "crc", "cell", "workload", "block", "process", "status", "num_parameters", "top1_agreement"]
CHANGES = st.dictionaries(st.sampled_from(NAMES), VALUES, min_size=1, max_size=4)
SAMPLE = st.dictionaries(
    st.sampled_from(["latency_s", "ttft_s", "tpot_s", "itl_s", "cell", "block", "attempt", "type"]), VALUES, max_size=3
)


@pytest.mark.slow
@given(
    op=st.sampled_from(["parameters", "verify", "evidence", "cost", "ceilings", "prepare", "visit"]),
    change=CHANGES,
    sample=SAMPLE,
    strikes=st.integers(0, 6),
)
@hypothesis_settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_a_worker_says_no_traceback_and_no_wrong_cell(
    tmp_path_factory: pytest.TempPathFactory,
    small_settings: Callable[..., Any],
    telling_worker: Any,
    fake_card: Any,
    op: str,
    change: dict[str, Any],
    sample: dict[str, Any],
    strikes: int,
) -> None:
    calls = 0

    def confuse(asked: str, fields: dict[str, Any]) -> dict[str, Any]:
        nonlocal calls
        calls += asked == op
        if asked != op or calls != strikes + 1:
            return fields
        if op == "visit" and sample:
            return {**fields, "samples": [{**fields["samples"][0], **sample}]}
        return {**fields, **change}

    directory = tmp_path_factory.mktemp("run")
    settings = small_settings(*FULL).resolved("cpu")
    with _begun(directory, settings) as writer:
        begun = _campaign(settings, writer, None, lambda log: telling_worker(confuse), fake_card(Telemetry()))
        begun.check()
        begun.run()
    run = load_run(directory)
    assert run.warnings == []
    assert set(run.cells["cell"]) == set(CELLS)
    write_derived(run)


# Hostile names

HOSTILE = '../../../outside/<script>alert(1)</script>\n=HYPERLINK("x")\x1b[31m'


@pytest.mark.slow
def test_hostile_names_stay_inside_and_are_escaped(
    measure: Measure, tmp_path: Path, small_settings: Callable[..., Any]
) -> None:
    settings = small_settings(*FULL)
    opts = {name: {**options, "note": HOSTILE} for name, options in settings.opts.items()}
    done = measure(
        *FULL,
        model=replace(settings.model, name=HOSTILE),
        weights=HOSTILE,
        opts=opts,
        dir=None,
        report=True,
    )
    assert done.status == 0
    assert "\x1b" not in done.err
    (directory,) = (path for path in (tmp_path / "results").iterdir() if path.name != "latest")
    assert {path.name for path in tmp_path.iterdir()} == {"results"}
    assert (tmp_path / "results" / "latest").resolve() == directory
    page = (directory / "report.html").read_text("utf-8")
    assert "<script>alert" not in page
    assert "&lt;script&gt;alert" in page
    with (directory / "cells.csv").open(newline="", encoding="utf-8") as file:
        assert not [field for row in csv.reader(file) for field in row if field.startswith(("=", "+", "-", "@"))]
    assert set(pd.read_csv(directory / "cells.csv")["status"]) == {"ok"}


def test_a_model_whose_name_is_a_formula_makes_none_in_the_tables(
    measure: Measure, small_settings: Callable[..., Any]
) -> None:
    done = measure(*FULL, model=replace(small_settings(*FULL).model, name="=1+1"))
    cells = pd.read_csv(done.directory / "cells.csv")
    assert set(cells["model"]) == {"'=1+1"}


@pytest.mark.slow
def test_every_optimization_has_columns_of_its_own(measure: Measure) -> None:
    done = measure("design=each", f"opt=[{','.join(choices('opt'))}]", "workload=generate")
    assert done.status == 0
    factors = set(choices("opt"))
    assert set(done.run.samples.columns) == {*SAMPLE_COLUMNS, *factors} - {"disturbed"}  # which no sample is
    assert set(done.run.samples[["host", "card"]].itertuples(index=False, name=None)) == {("here", "GPU-1")}
    mains = done.run.effects[done.run.effects["kind"] == "main"]
    assert set(mains["term"]) == factors


@pytest.mark.parametrize("name", ["block", "latency_s", "status", "itl_p50_s"])
def test_an_optimization_named_like_a_column_is_refused_before_anything_is_measured(
    measure: Measure, name: str
) -> None:
    done = measure(opts={name: {"_target_": "somewhere.apply"}})
    assert f"the results have a column '{name}' already; give the YAML file another name" in done.error
    assert not done.directory.exists()


def test_a_directory_with_control_characters_is_refused(measure: Measure, tmp_path: Path) -> None:
    done = measure(*FULL, to=tmp_path / "a\nb")
    assert "holds control characters" in done.error
    assert not (tmp_path / "a\nb").exists()


@pytest.mark.parametrize("below", ["", "run"])
def test_a_file_is_no_directory(measure: Measure, tmp_path: Path, below: str) -> None:
    (tmp_path / "file").write_text("…")
    done = measure(*FULL, to=tmp_path / "file" / below)
    assert "is a file, or below one; name a directory" in done.error
    assert "Errno" not in done.error


def test_a_directory_with_other_files_is_refused(measure: Measure, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("…")
    done = measure(*FULL, to=tmp_path / "mine")
    assert "holds other files and no run; name a new directory" in done.error
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.tex"]


def test_where_launches_are_long_later_processes_get_ready_with_one(measure: Measure) -> None:
    long = {"does": "answer", "op": "visit", "inner": None, "fields": {"inner": 1, "untimed": False}}
    built = {"does": "answer", "op": "prepare", "launch": False, "fields": {"compile_s": 7.0}}  # so that it shows
    done = measure(*FULL, faults=[long, built])
    assert done.status == 0, done.err
    _, second = sorted({line.process for line in done.record.of(VisitLine)})
    assert [(line.process, line.cell) for line in done.record.of(CompileLine)] == [
        (second, cell) for cell in ("flash", "tie", "flash+tie", "baseline")
    ]


def test_the_pace_is_found_once_and_kept(measure: Measure, tmp_path: Path) -> None:
    """By all processes of a workload, and where the run goes on."""
    first = {"does": "answer", "op": "visit", "inner": None}
    found = [
        {**first, "fields": {"inner": inner, "untimed": False}, "once": str(tmp_path / str(inner))} for inner in (7, 3)
    ]
    done = measure("workload=prefill,decode", faults=found)
    visits = done.record.of(VisitLine)
    for workload, inner in (("prefill", 7), ("decode", 3)):
        there = [visit for visit in visits if visit.workload == workload]
        assert [(visit.inner, visit.untimed) for visit in there] == [(inner, False)] * 6
        assert len({visit.process for visit in there}) == 2
    settings = settings_from(done.run.config)
    assert RunState(settings, done.record).timings["prefill", "eager"].pace == Pace(repeats=1, inner=7, untimed=False)
    assert RunState(settings).timings["prefill", "eager"].pace is None


def test_first_effects_are_told_after_the_first_whole_block(
    measure: Measure, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    told: list[tuple[int, str]] = []

    def note(_: Reporter, line: str) -> None:
        if line:
            told.append((len(read_record(tmp_path / "run").of(BlockLine)), line))

    monkeypatch.setattr(Reporter, "first_answer", note)
    measure(*FULL)
    ((blocks, line),) = told
    samples = read_record(tmp_path / "run").of(SampleLine)
    assert blocks == 1 or any(each.disturbed for each in samples if each.block == 0)
    assert line.startswith("prefill eager, first effects: flash")


def test_more_takes_make_a_block_at_most_twice_as_long(measure: Measure) -> None:
    """Each visit is disturbed: of five visits there are at most five more takes."""
    again = [{"does": "answer", "op": "visit", "takes": takes, "fields": {"takes": takes}} for takes in (3, 2)]
    done = measure(*FULL, "measure.max_blocks=1", "measure.min_blocks=1", faults=again)
    assert [visit.takes for visit in done.record.of(VisitLine)] == [3, 3, 2, 1, 1]


def test_the_record_tells_how_long_each_pass_took(measure: Measure) -> None:
    done = measure(*FULL)
    (session,) = done.record.of(SessionLine)
    passes = done.record.of(PassLine)
    assert [each.name for each in passes] == ["parameters", "verify, memory, evidence", "ceilings", "time"]
    assert session.started < session.time <= passes[0].time
    assert sum(each.seconds for each in passes) <= passes[-1].time - session.time + 0.01
    assert passes[-1].seconds >= sum(block.elapsed_s for block in done.record.of(BlockLine))
