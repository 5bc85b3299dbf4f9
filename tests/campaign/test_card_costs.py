"""What is said of a run on a GPU against how long it took: records of four shapes, the times as on an H200."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from records import write_record

from qwen3bench.campaign import assembly, capacity
from qwen3bench.campaign.card_costs import REPORT_S, START_S, CardForecast, CardPace, SoFar, reached_by, whole_run_s
from qwen3bench.campaign.looks import compared, looks, shared_out
from qwen3bench.campaign.progress import Reporter, duration
from qwen3bench.campaign.state import RunState
from qwen3bench.config.cli import compose
from qwen3bench.config.settings import Settings, settings_from
from qwen3bench.record.lines import BlockLine, ConfirmStopLine, EndLine, PassLine, ProcessLine, SessionLine
from qwen3bench.record.messages import Request, Verify, VerifyGradients
from qwen3bench.record.reader import Record, read_record

PAIR = (
    "opt=[flash,tie,mlp,mask,norm,rope,residual,qkv]",
    "peer=[transformers,liger]",
    "peer.transformers.attention=[sdpa]",
    "measure=quick",
    "workload=prefill",
    "runtime=[graph,compile]",
    "prompt_tokens=2048",
)
TRAIN = (
    "opt=[flash,tie,mlp,mask,norm,rope,residual,qkv,flce]",
    "peer=[transformers,liger]",
    "workload=train",
    "batch_size=8",
    "prompt_tokens=2048",
    "workload.train.precision=bf16",
    "runtime=eager",
    "measure=quick",
)
LOOKS = "verify, memory, evidence"
REFERENCE = Path(__file__).parents[2] / "results" / "reference"
COMMITTED = [path.parent for path in sorted(REFERENCE.glob("*/samples.jsonl.xz"))]
FACTOR = 1.5  # within which a forecast holds


@dataclass(frozen=True)
class Process:
    """One that timed: seconds until it was ready, and those of its blocks."""

    ready_s: float
    blocks_s: Sequence[float]


@dataclass(frozen=True)
class Shape:
    """A run as it was seen: seconds of each step of its session, and its processes by where they timed."""

    overrides: tuple[str, ...]
    build_s: float
    passes_s: dict[str, float]
    processes: dict[tuple[str, str], list[Process]]

    @cached_property
    def settings(self) -> Settings:
        return compose(self.overrides).resolved("cuda")

    def record(self, directory: Path) -> Record:
        """A record with these times, as a run writes it."""
        settings, now = self.settings, 1000.0
        lines: list[dict[str, Any]] = [
            {"type": "run", "config": settings.to_dict(), "factors": [*settings.factors], "cells": settings.labels}
            | {"workloads": [*settings.workloads], "runtimes": [*settings.runtimes]},
            {"type": "session", "time": now},
        ]
        now += self.build_s
        for name, seconds in self.passes_s.items():
            now += seconds
            lines.append({"type": "pass", "name": name, "time": now, "seconds": seconds})
        began, number = now, 0
        for (workload, runtime), processes in self.processes.items():
            at, block = {"workload": workload, "runtime": runtime}, 0
            for process in processes:
                now, number = now + process.ready_s, number + 1
                lines.append({"type": "process", "process": number, "purpose": "time", "time": now})
                for elapsed_s in process.blocks_s:
                    now += elapsed_s
                    told = {"process": number, "block": block, "state": "ok", "time": now, "elapsed_s": elapsed_s}
                    lines.append({"type": "block", **at, **told})
                    block += 1
        lines.append({"type": "pass", "name": "time", "time": now, "seconds": now - began})
        return read_record(write_record(directory, lines))


def _even(processes: int, ready_s: float, blocks: int, measured_s: float) -> list[Process]:
    """Processes that are ready after the same time and share blocks."""
    shares = [blocks // processes + (place < blocks % processes) for place in range(processes)]
    return [Process(ready_s, [measured_s / blocks] * share) for share in shares]


def _ablate(looks_s: float, decode: list[Process]) -> Shape:
    return Shape(
        ("design=full",),
        1.5,
        {"parameters": 0.0, LOOKS: looks_s, "ceilings": 2.4},
        {("prefill", "graph"): _even(5, 1.7, 13, 18.5), ("decode", "graph"): decode},
    )


def _pair(looks_s: float) -> Shape:
    compiled = [Process(ready_s, [0.095] * 21) for ready_s in (39, 24, 27, 33, 31)]
    return Shape(
        PAIR,
        0.9,
        {"parameters": 0.8, LOOKS: looks_s, "ceilings": 0.8},
        {("prefill", "graph"): _even(5, 13.2, 59, 10.0), ("prefill", "compile"): compiled},
    )


SHAPES = {
    "32 cells": _ablate(26.9, _even(5, 1.6, 13, 8.6)),
    "32 cells, more processes": _ablate(34.8, _even(10, 1.9, 30, 20.4)),
    # Without the 14 and 28.9 s that processes took to start behind the first one.
    "two beside peers, compiled": _pair(86.0),
    "the same beside two other runs": _pair(121.7),
    # Interrupted within the first block of the first of its processes: what timing takes is not known.
    "training beside peers": Shape(TRAIN, 0.6, {"parameters": 0.2, LOOKS: 83.3, "ceilings": 0.5}, {}),
}
FINISHED = [name for name, shape in SHAPES.items() if shape.processes]


@dataclass(frozen=True)
class Said:
    """What a run says before it measures, with what it knows then; and how long things took by its record."""

    shape: Shape
    record: Record

    @property
    def forecast(self) -> CardForecast:
        pace = CardPace(reached_by("NVIDIA H200"))
        return CardForecast(self.shape.settings, pace, at_once=1 if "train" in self.shape.settings.workloads else 10)

    @property
    def looking_s(self) -> float:
        return self.forecast.looking_s(*_steps(self.shape.settings))

    @property
    def corrected(self) -> CardForecast:
        """The forecast, once the looks at cells have taken what they took."""
        pace = self.forecast.pace.after(self.took_s(LOOKS), self.looking_s)
        return replace(self.forecast, pace=pace)

    def took_s(self, name: str) -> float:
        """Seconds of a pass, by the record."""
        return next(line.seconds for line in self.record.of(PassLine) if line.name == name and line.seconds is not None)

    @property
    def from_announcement_s(self) -> float:
        """Seconds from the announcement to the last block and the report, by the record."""
        ends = [line.time for line in self.record.of(PassLine) if line.time is not None]
        (session,) = self.record.of(SessionLine)
        assert session.time is not None
        return max(ends) - session.time - self.shape.build_s + REPORT_S

    def known(self, where: tuple[str, str], processes: int) -> SoFar:
        """What is known of a workload and runtime once so many of its processes are done."""
        done = {line.process for line in self.record.of(ProcessLine)[:processes]}
        kept = Record(self.record.path, self.record.run)
        for line in self.record.of(BlockLine):
            if line.process in done:
                kept.add(line)
        return RunState(self.shape.settings, kept).timings[where].so_far


def _steps(settings: Settings) -> tuple[list[list[Request[Any]]], list[Request[Any]]]:
    """The looks of a run with 16 cores: shared out, and one by one."""
    trained = [name for name, sizes in settings.workloads.items() if sizes.precision is not None]
    every = looks(settings, product(settings.workloads, settings.runtimes), compared(settings))
    beside = [step for step in every if step.workload not in trained]  # type: ignore[attr-defined]
    then = [step for step in every if step.workload in trained]  # type: ignore[attr-defined]
    gates: list[Request[Any]] = [Verify(cell=c) for c in settings.labels]
    gates += [VerifyGradients(cell=c, workload=name) for name in trained for c in settings.labels]
    return shared_out([*gates, *beside], settings.factors, 8), then


@pytest.fixture(params=SHAPES)
def said(request: pytest.FixtureRequest, tmp_path: Path) -> Said:
    shape = SHAPES[request.param]
    return Said(shape, shape.record(tmp_path))


@pytest.fixture(params=FINISHED)
def finished(request: pytest.FixtureRequest, tmp_path: Path) -> Said:
    shape = SHAPES[request.param]
    return Said(shape, shape.record(tmp_path))


def holds(said_s: float, took_s: float) -> bool:
    """Whether a forecast is neither too short nor too long."""
    return took_s / FACTOR <= said_s <= took_s * FACTOR


def test_how_long_looks_take(said: Said) -> None:
    assert holds(said.looking_s, said.took_s(LOOKS))


def test_how_long_a_run_takes_is_said_before_it_measures(said: Said) -> None:
    wheres = dict.fromkeys(said.shape.processes, SoFar())
    whole_s = said.looking_s + said.forecast.timing_s(wheres)
    assert not wheres or holds(whole_s, said.from_announcement_s)  # of one that was interrupted nobody knows


def test_looks_that_take_longer_say_that_getting_ready_does(finished: Said) -> None:
    wheres = dict.fromkeys(finished.shape.processes, SoFar())
    assert holds(finished.corrected.timing_s(wheres), finished.took_s("time") + REPORT_S)
    slow = finished.forecast.pace.after(2 * finished.looking_s, finished.looking_s)
    assert slow.slower == 2.0
    for where in wheres:
        assert replace(finished.forecast, pace=slow).setup_s(*where) > 1.5 * finished.forecast.setup_s(*where)
    assert finished.forecast.pace.after(0.3, 0.0) == finished.forecast.pace  # of a run that goes on: nothing was left


def test_a_training_run_is_not_said_to_be_over_in_its_first_block(tmp_path: Path) -> None:
    """The run was ended 19 s after its looks, in the first block of its first process."""
    shape = SHAPES["training beside peers"]
    said = Said(shape, shape.record(tmp_path))
    where = {("train", "eager"): SoFar()}
    assert said.corrected.timing_s(where) > 3 * 19
    assert said.forecast.block_s("train", "eager") == pytest.approx(
        3.5, rel=0.2
    )  # 6 visits of two steps of 0.16 to 0.53 s


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2, 3])
def test_what_processes_took_corrects_what_is_left(tmp_path: Path, processes: int) -> None:
    shape = SHAPES["the same beside two other runs"]
    where, five = ("prefill", "compile"), shape.processes["prefill", "compile"]
    said = Said(replace(shape, processes={where: five}), replace(shape, processes={where: five}).record(tmp_path))
    known = replace(said.known(where, processes), setup_s=five[processes - 1].ready_s)
    assert (known.processes, known.blocks) == (processes, 21 * processes)
    left_s = sum(each.ready_s + sum(each.blocks_s) for each in five[processes:])
    assert holds(said.corrected.left_s(*where, known), left_s)


def test_a_slower_card_a_longer_prompt_and_more_cells_take_longer() -> None:
    def block_s(*overrides: str, device: str = "NVIDIA H200") -> float:
        pace = CardPace(flops_per_s=reached_by(device))
        return CardForecast(compose(overrides).resolved("cuda"), pace).block_s("prefill", "graph")

    short = block_s("prompt_tokens=2048")
    assert block_s("prompt_tokens=8192") > 2 * short
    assert block_s("prompt_tokens=2048", device="NVIDIA L4") > 4 * short
    assert block_s("prompt_tokens=2048", "opt=flash") == pytest.approx(1.5 * short)
    assert reached_by("a card that nobody knows") == reached_by("NVIDIA H200")


def test_a_prefill_of_the_last_logits_leaves_out_the_heads_product() -> None:
    """Which is 155 M of 830 M multiply-adds a token; eight sequences, so that computing takes longest."""

    def block_s(*overrides: str) -> float:
        sizes = ("workload=prefill", "batch_size=8", "prompt_tokens=2048", *overrides)
        return CardForecast(compose(sizes).resolved("cuda")).block_s("prefill", "graph")

    assert block_s("prefill.logits_to_keep=1") == pytest.approx((830 - 155) / 830 * block_s(), rel=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("run", COMMITTED, ids=lambda run: str(run.name))
def test_how_long_committed_runs_took(run: Path) -> None:
    """From the command on, by their first settings alone."""
    record = read_record(run)
    settings = settings_from(record.run.config)
    said_s = whole_run_s(settings)
    if settings.design == "screen" and not record.of(ConfirmStopLine):  # all that it predicts was measured
        said_s -= CardForecast(settings).after_s() - REPORT_S
    begun, ended = record.of(SessionLine)[0], record.of(EndLine)[-1]
    assert begun.time is not None
    assert ended.time is not None
    assert holds(said_s, ended.time - (begun.started or begun.time) + REPORT_S)  # which is written after its end


@pytest.mark.parametrize("name", FINISHED)
def test_cfg_says_what_the_run_says(name: str) -> None:
    """Before a device is known, an H100 or H200 is meant."""
    settings = SHAPES[name].settings
    forecast = CardForecast(settings)
    wheres = dict.fromkeys(product(settings.workloads, settings.runtimes), SoFar())
    run_s = forecast.looking_s(*_steps(settings)) + forecast.timing_s(wheres)
    assert whole_run_s(settings) == pytest.approx(START_S + run_s)


# In a run


@pytest.fixture
def expected(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    """What a run expects to be left, each time that it says so."""
    told: list[float] = []
    expect = Reporter.expect

    def noted(reporter: Reporter, left_s: float) -> None:
        told.append(left_s)
        expect(reporter, left_s)

    monkeypatch.setattr(Reporter, "expect", noted)
    monkeypatch.setattr(capacity, "usable_cores", lambda: 16)
    return told


@pytest.mark.slow
def test_a_run_corrects_its_forecast_by_its_looks_and_by_its_first_process(
    measure: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, expected: list[float]
) -> None:
    """The fake workers answer at once, so that everything takes a small part of what was said."""
    monkeypatch.setattr(assembly, "CardPace", lambda _: CardPace())
    cells = ("design=full", "opt=flash,tie,mask,norm", "device=cuda", "runtime=graph", "measure.min_processes=3")
    done = measure(*cells, "workload=prefill,decode", "measure.max_seconds=5")
    assert done.status == 0
    first, looked, ready, *_ = expected
    assert f"about {duration(first)}\n" in done.err
    forecast = CardForecast(settings_from(done.record.run.config))
    assert whole_run_s(forecast.settings) == pytest.approx(first + START_S, rel=0.1)  # loads at once
    fast = replace(forecast, pace=CardPace(slower=0.5))  # half of what was said is the least
    known = dict.fromkeys(product(("prefill", "decode"), ("graph",)), SoFar())
    assert looked == pytest.approx(fast.timing_s(known), rel=0.01)
    assert fast.timing_s(known) < forecast.timing_s(known) - 1
    known["prefill", "graph"] = SoFar(setup_s=0.1)
    assert ready == pytest.approx(fast.timing_s(known), abs=1.0)
    assert ready < looked - 2
