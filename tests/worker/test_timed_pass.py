"""Cells of one workload are made ready and visited, all at one pace."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from qwen3bench.config.choices import options_of
from qwen3bench.config.settings import Settings
from qwen3bench.model.decoder import Decoder
from qwen3bench.record.messages import CellFailure, Pace, Preparation
from qwen3bench.worker import timed_pass
from qwen3bench.worker.clock import TimedValue
from qwen3bench.worker.runtimes import PreparedStep, Runtime
from qwen3bench.worker.serve import Worker
from qwen3bench.worker.session import Session
from qwen3bench.worker.timed_pass import PreparedCell
from qwen3bench.worker.workloads import Step

Ask = Callable[..., Any]


@pytest.mark.parametrize("workload", ["prefill", "decode", "generate"])
def test_a_cell_is_prepared_and_visited(opened: Ask, workload: str) -> None:
    opened("load", cells=["baseline", "flash+tie"])
    opened("enter", workload=workload, runtime="eager", cell="flash+tie")
    for cell, copy in (("baseline", 0), ("flash+tie", 0), ("baseline", 1)):
        assert opened("prepare", cell=cell, copy=copy) == Preparation()
    samples = opened("visit", cell="baseline", copy=1, repeats=3).samples
    assert len(samples) == 3
    for sample in samples:
        assert sample.latency_s > 0
        assert (sample.ttft_s is not None) == (workload == "generate")
        if workload == "generate":
            assert len(sample.itl_s) == 2
            assert sample.ttft_s + sum(sample.itl_s) == pytest.approx(sample.latency_s, rel=1e-6)
            assert sample.tpot_s == pytest.approx(sum(sample.itl_s) / 2)


class Replayed(Runtime):
    """A graph's behavior on a CPU: a step is launched twice, and what is timed is a replay that runs no Python."""

    @property
    def on_device_clock(self) -> bool:
        return True

    def prepare(self, step: Callable[[], Tensor]) -> PreparedStep:
        step()
        step()
        return PreparedStep(lambda: None)


@pytest.mark.parametrize("workload", ["prefill", "generate"])
@pytest.mark.parametrize("finite", [True, False])
def test_what_a_graph_writes_is_looked_at_too(
    opened: Ask, worker: Worker, overflowing: Settings, monkeypatch: pytest.MonkeyPatch, workload: str, finite: bool
) -> None:
    monkeypatch.setattr(Session, "runtime", lambda session, name: Replayed(torch.device("cpu")))
    monkeypatch.setattr(timed_pass, "time_device", lambda launches, repeats, inner: [TimedValue(1.0)] * repeats)
    if not finite:
        opened("open", config=replace(overflowing, workloads=worker.session.settings.workloads).to_dict())
    opened("enter", workload=workload, runtime="eager", cell="baseline")
    if finite:
        opened("prepare", cell="baseline", copy=0)
        (prepared,) = worker.timed_pass.ready.values()
        assert len(prepared.launches) == (3 if workload == "generate" else 1)
    else:
        with pytest.raises(CellFailure, match="logits are not finite"):
            opened("prepare", cell="baseline", copy=0)


def test_cells_have_as_many_values_however_fast_they_are(opened: Ask, worker: Worker) -> None:
    """And as many launches in a value: enough for the fastest of them."""
    opened("enter", workload="prefill", runtime="eager", cell="baseline")
    opened("prepare", cell="baseline", copy=0)
    timed = worker.timed_pass
    model = timed.ready["baseline", 0].model
    asleep_s = {"baseline": 0.008, "flash": 0.0004}
    launched = dict.fromkeys(asleep_s, 0)

    def launch(cell: str) -> None:
        launched[cell] += 1
        time.sleep(asleep_s[cell])

    timed.launch_s.clear()  # as where cells got ready beside others, and their launches are timed now
    for cell in asleep_s:
        timed.ready[cell, 0] = PreparedCell(model, [partial(launch, cell)])
    values = {cell: len(opened("visit", cell=cell, copy=0, repeats=None).samples) for cell in asleep_s}
    assert timed.pace is not None
    assert 2 <= timed.pace.inner <= 3
    assert values == dict.fromkeys(asleep_s, 1)
    before = dict(launched)
    for cell in asleep_s:
        opened("visit", cell=cell, copy=0, repeats=None)
        assert launched[cell] - before[cell] == 1 + timed.pace.inner


@pytest.mark.parametrize(("slowest_s", "fastest_s", "untimed"), [(0.5, 0.1, False), (0.5, 0.09, True)])
def test_where_every_launch_is_long_none_is_untimed(
    opened: Ask, worker: Worker, slowest_s: float, fastest_s: float, untimed: bool
) -> None:
    opened("enter", workload="prefill", runtime="eager", cell="baseline")
    timed, launched = worker.timed_pass, dict.fromkeys(("baseline", "flash"), 0)

    def launch(cell: str) -> None:
        launched[cell] += 1

    for cell in launched:
        opened("prepare", cell=cell, copy=0)
        timed.ready[cell, 0] = replace(timed.ready[cell, 0], launches=[partial(launch, cell)])
    timed.launch_s = {("baseline", 0): slowest_s, ("flash", 0): fastest_s}
    found = opened("visit", cell="flash", copy=0, repeats=2)
    assert found.untimed is (None if untimed else False)
    assert launched["flash"] == 2 + untimed
    opened("visit", cell="flash", copy=0, repeats=2, inner=1, untimed=not untimed)  # as it was found elsewhere
    assert launched["flash"] == 4 + 1


def test_a_cell_gets_ready_without_a_launch_where_none_is_asked_for(opened: Ask, worker: Worker) -> None:
    opened("enter", workload="prefill", runtime="eager", cell="baseline")
    with torch.profiler.profile() as profile:
        opened("prepare", cell="flash", copy=0, launch=False)
    assert not [event for event in profile.events() if event.name == "aten::mm"]
    assert not worker.timed_pass.launch_s
    (sample,) = opened("visit", cell="flash", copy=0, repeats=1, inner=1, untimed=False).samples
    assert sample.latency_s > 0


@pytest.mark.parametrize(("seconds", "launched"), [(0.2, False), (0.01, True)])
def test_a_long_launch_tells_the_pace_for_cells_that_are_not_launched(
    opened: Ask, worker: Worker, seconds: float, launched: bool
) -> None:
    opened("enter", workload="prefill", runtime="eager", cell="baseline")
    opened("prepare", cell="baseline", copy=0)
    worker.timed_pass.launch_s["baseline", 0] = seconds
    with torch.profiler.profile() as profile:
        opened("prepare", cell="flash", copy=0)
    assert any(event.name == "aten::mm" for event in profile.events()) == launched
    assert opened("visit", cell="flash", copy=0, repeats=None).untimed is (None if launched else False)


def test_one_launch_that_was_held_up_does_not_call_launches_long(opened: Ask, worker: Worker) -> None:
    """All cells would be timed without a launch before, at the pace of long ones."""
    opened("enter", workload="prefill", runtime="eager", cell="baseline")
    workload = worker.timed_pass.workload
    usual, held_up_s = workload.steps, [0.3]

    def steps(model: Decoder) -> list[Step]:
        (step,) = usual(model)

        def held_up() -> Tensor:
            time.sleep(held_up_s.pop() if held_up_s else 0.0)
            return step()

        return [held_up]

    workload.steps = steps  # type: ignore[method-assign]
    opened("prepare", cell="baseline", copy=0)
    opened("prepare", cell="flash", copy=0)
    found = opened("visit", cell="flash", copy=0, repeats=None)
    assert set(worker.timed_pass.launch_s) == {("baseline", 0), ("flash", 0)}
    assert found.untimed is None


def test_one_generated_token_has_no_time_between_tokens(ask: Ask, small_settings: Callable[..., Settings]) -> None:
    settings = small_settings("workload=generate", "new_tokens=1", "prompt_tokens=4").resolved("cpu")
    ask("open", config=settings.to_dict())
    ask("enter", workload="generate", runtime="eager", cell="baseline")
    ask("prepare", cell="baseline", copy=0)
    (sample,) = ask("visit", cell="baseline", copy=0, repeats=1).samples
    assert sample.latency_s > 0
    assert sample.tpot_s is None


class Recompiling(Runtime):
    """Its first launch compiles, as one does whose code was made for other shapes."""

    launched = 0

    def compilations(self) -> int:
        return min(1, self.launched)

    def launch(self) -> None:
        self.launched += 1

    def prepare(self, step: Callable[[], Tensor]) -> PreparedStep:
        return PreparedStep(self.launch)


def test_a_compilation_in_the_untimed_launch_counts_too(opened: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Session, "runtime", lambda session, name: Recompiling(torch.device("cpu")))
    monkeypatch.setattr(timed_pass, "pace_of", lambda launch_s, single: Pace(inner=1, repeats=1))
    monkeypatch.setattr(timed_pass, "seconds_of", lambda launches, synchronize: 1.0)
    opened("enter", workload="prefill", runtime="eager", cell="baseline")
    opened("prepare", cell="baseline", copy=0)
    with pytest.raises(CellFailure, match="compiled again"):
        opened("visit", cell="baseline", copy=0, repeats=1)


def test_logits_that_are_not_finite_are_never_timed(ask: Ask, overflowing: Settings) -> None:
    ask("open", config=overflowing.to_dict())
    ask("enter", workload="prefill", runtime="eager", cell="baseline")
    with pytest.raises(CellFailure, match="logits are not finite") as caught:
        ask("prepare", cell="baseline", copy=0)
    assert caught.value.status == "invalid"
    with pytest.raises(CellFailure):  # it was not made ready
        ask("visit", cell="baseline", copy=0, repeats=1)


@pytest.mark.parametrize("op", ["prepare", "evidence"])
def test_eager_is_never_reported_as_compiled(ask: Ask, settings: Settings, op: str) -> None:
    import torch._dynamo

    ask("open", config=replace(settings, runtimes={"compile": options_of("runtime", "compile")}).to_dict())
    where = {"cell": "flash", "workload": "prefill", "runtime": "compile"}
    with torch._dynamo.config.patch(disable=True, fail_on_recompile_limit_hit=False):
        if op == "prepare":
            ask("enter", **where)
        with pytest.raises(CellFailure, match="eager") as failed:
            ask(op, **({"cell": "flash", "copy": 0} if op == "prepare" else where))
    assert failed.value.status == "invalid"


@pytest.mark.parametrize("on_device", [True, False])
def test_each_step_of_what_is_generated_is_looked_at(
    opened: Ask, worker: Worker, monkeypatch: pytest.MonkeyPatch, on_device: bool
) -> None:
    if on_device:
        monkeypatch.setattr(Session, "runtime", lambda session, name: Replayed(torch.device("cpu")))
    opened("enter", workload="generate", runtime="eager", cell="baseline")
    workload = worker.timed_pass.workload
    usual = workload.steps

    def steps(model: Decoder) -> list[Step]:
        first, *later = usual(model)
        return [lambda: torch.inf * first(), *later]

    monkeypatch.setattr(workload, "steps", steps)
    with pytest.raises(CellFailure, match="logits are not finite"):
        opened("prepare", cell="baseline", copy=0)


@pytest.mark.parametrize("workload", ["prefill", "decode", "generate"])
def test_a_cell_that_is_no_longer_finite_when_it_is_timed_is_invalid(
    opened: Ask, worker: Worker, workload: str
) -> None:
    opened("enter", workload=workload, runtime="eager", cell="baseline")
    opened("prepare", cell="baseline", copy=0)
    assert opened("visit", cell="baseline", copy=0, repeats=2).samples
    with torch.no_grad():
        worker.timed_pass.ready["baseline", 0].model.final_norm.weight[0] = torch.nan
    with pytest.raises(CellFailure, match="logits are not finite") as caught:
        opened("visit", cell="baseline", copy=0, repeats=2)
    assert caught.value.status == "invalid"


class Written(Replayed):
    """A graph's behavior on a CPU: what is timed writes, and returns nothing."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.buffers: list[Tensor] = []  # of each step that was prepared
        self.value = 1.0

    def prepare(self, step: Callable[[], Tensor]) -> PreparedStep:
        written = step().clone()
        self.buffers.append(written)

        def launch() -> None:
            written.fill_(self.value)

        return PreparedStep(launch, written=written)


def _launched(launches: Any, repeats: int, inner: int) -> list[TimedValue]:
    """As `time_device`, on a CPU."""
    for launch in launches:
        launch()
    return [TimedValue(1.0)] * repeats


@pytest.mark.parametrize("workload", ["prefill", "generate"])
def test_a_graph_whose_logits_are_no_longer_finite_when_it_is_timed_is_invalid(
    opened: Ask, worker: Worker, monkeypatch: pytest.MonkeyPatch, workload: str
) -> None:
    runtime = Written(torch.device("cpu"))
    monkeypatch.setattr(Session, "runtime", lambda session, name: runtime)
    monkeypatch.setattr(timed_pass, "time_device", _launched)
    opened("enter", workload=workload, runtime="eager", cell="baseline")
    opened("prepare", cell="baseline", copy=0)
    visit = partial(opened, "visit", cell="baseline", copy=0, repeats=2, inner=1)
    assert len(visit().samples) == 2
    runtime.value = torch.nan
    with pytest.raises(CellFailure, match="logits are not finite") as caught:
        visit()
    assert caught.value.status == "invalid"
    assert worker.timed_pass.ready["baseline", 0].written is runtime.buffers[-1]  # the last step's


@pytest.mark.cuda
@pytest.mark.parametrize("runtime", ["graph", "compile"])
@pytest.mark.parametrize(
    ("workload", "named"), [("prefill", "logits are"), ("decode", "logits are"), ("train", "loss is")]
)
def test_what_a_graph_writes_while_it_is_timed_is_looked_at_on_cuda(
    ask: Ask,
    worker: Worker,
    small_settings: Callable[..., Settings],
    monkeypatch: pytest.MonkeyPatch,
    runtime: str,
    workload: str,
    named: str,
) -> None:
    overrides = ("design=full", "opt=flash,tie", f"workload={workload}", f"runtime={runtime}", "device=cuda")
    ask("open", config=small_settings(*overrides, "prompt_tokens=16").resolved("cuda").to_dict())
    ask("enter", workload=workload, runtime=runtime, cell="baseline")
    for cell in ("baseline", "flash", "flash+tie"):  # the later ones' graphs write where the first one's did
        ask("prepare", cell=cell, copy=0)
    for cell in ("flash+tie", "baseline", "flash", "baseline"):
        assert ask("visit", cell=cell, copy=0, repeats=2, inner=1).samples
    monkeypatch.setattr(worker.timed_pass.workload, "restore", lambda: None)  # of the weights that train
    with torch.no_grad():
        worker.timed_pass.ready["baseline", 0].model.original.final_norm.weight[0] = torch.nan
    with pytest.raises(CellFailure, match=f"{named} not finite") as caught:
        ask("visit", cell="baseline", copy=0, repeats=2, inner=1)
    assert caught.value.status == "invalid"


def test_a_step_whose_gradients_are_not_finite_is_never_timed(
    ask: Ask, worker: Worker, small_settings: Callable[..., Settings]
) -> None:
    """Its loss is finite until the weights have been changed by them."""
    ask("open", config=small_settings("workload=train", "prompt_tokens=4").resolved("cpu").to_dict())
    ask("enter", workload="train", runtime="eager", cell="baseline")
    ask("prepare", cell="baseline", copy=0)
    weight = worker.timed_pass.ready["baseline", 0].model.final_norm.weight
    weight.register_hook(lambda gradient: torch.nan * gradient)
    with pytest.raises(CellFailure, match="loss is not finite"):
        ask("visit", cell="baseline", copy=0, repeats=1)
