"""What a worker tells of single cells, on the tiny model."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from typing import Any

import pytest
import torch
from torch import Tensor

from qwen3bench.config.settings import Settings
from qwen3bench.kernels.token_attention import shared_counters
from qwen3bench.model.compiled import Region
from qwen3bench.opt import norm
from qwen3bench.record.messages import CellFailure
from qwen3bench.worker import inspection
from qwen3bench.worker.clock import TimedValue
from qwen3bench.worker.compile_counters import compiled_graphs
from qwen3bench.worker.inspection import Warm, error_against_eager
from qwen3bench.worker.serve import Worker
from qwen3bench.worker.session import Session
from qwen3bench.worker.workloads import Workload, WorkloadSize, keeping_output

Ask = Callable[..., Any]


def test_parameters_and_costs_are_the_models(opened: Ask) -> None:
    plain, tied = opened("parameters", cell="baseline"), opened("parameters", cell="tie")
    embedding = 512 * 64
    assert plain.num_parameters - tied.num_parameters == embedding
    assert plain.num_unique_parameters == tied.num_unique_parameters == tied.num_parameters
    assert plain.parameter_bytes == 4 * plain.num_parameters
    assert opened("cost", cell="tie", workload="prefill").flops > 0


def test_a_disturbed_forward_does_not_tell_how_long_one_takes(opened: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of them neither, where they do not agree."""
    times = (TimedValue(value) for value in (2.8, 1.9, 0.4, 0.41))
    monkeypatch.setattr(inspection, "time_host", lambda launches, pace, synchronize: islice(times, pace.repeats))
    assert opened("forward", prompt_tokens=8).seconds == 0.4


def test_a_forward_beyond_the_hosts_memory_is_not_tried(opened: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inspection, "available_memory_bytes", lambda: 100_000)
    with pytest.raises(CellFailure, match="1 × 8 tokens do not fit the memory here") as found:
        opened("forward", prompt_tokens=8)
    assert found.value.status == "oom"


def test_a_true_cell_passes_the_gate(opened: Ask) -> None:
    verdict = opened("verify", cell="flash+tie")
    assert verdict.equivalent is True
    assert verdict.reason is None


def test_evidence_names_what_ran(opened: Ask) -> None:
    evidence = opened("evidence", cell="flash", workload="prefill", runtime="eager")
    assert evidence.kernel_launches == sum(evidence.kernels.values()) > 0
    assert evidence.tied_storage is False


def test_evidence_of_logits_that_are_not_finite_is_refused(ask: Ask, overflowing: Settings) -> None:
    ask("open", config=overflowing.to_dict())
    with pytest.raises(CellFailure, match="logits are not finite") as caught:
        ask("evidence", cell="baseline", workload="prefill", runtime="eager")
    assert caught.value.status == "invalid"


@pytest.mark.slow
def test_what_computes_something_else_once_compiled_is_invalid(
    ask: Ask, small_settings: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = small_settings("opt=norm", "model.num_layers=1", "prompt_tokens=8", "runtime=compile").resolved("cpu")
    ask("open", config=settings.to_dict())
    where = {"cell": "norm", "workload": "prefill", "runtime": "compile"}
    assert ask("evidence", **where).recompiles == 0
    right = norm.rms_norm

    def wrong(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        return right(x, weight, eps) * (1.5 if torch.compiler.is_compiling() else 1.0)

    monkeypatch.setattr(norm, "rms_norm", wrong)
    with pytest.raises(CellFailure) as failed:
        ask("evidence", **where)
    assert failed.value.status == "invalid"
    assert "differ by" in failed.value.reason


@pytest.mark.slow
def test_what_is_compiled_is_held_to_the_model_that_the_gate_judged(
    ask: Ask, small_settings: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = small_settings("model.num_layers=1", "prompt_tokens=8", "runtime=compile").resolved("cpu")
    ask("open", config=settings.to_dict())
    right = Region.forward

    def wrong(region: Region, *given: Any, **named: Any) -> tuple[torch.Tensor, torch.Tensor]:
        x, normed = right(region, *given, **named)
        return x, 1.5 * normed

    monkeypatch.setattr(Region, "forward", wrong)
    with pytest.raises(CellFailure, match="differ by") as failed:
        ask("evidence", cell="baseline", workload="prefill", runtime="compile")
    assert failed.value.status == "invalid"


def test_one_token_chosen_otherwise_on_the_way_is_no_other_function(
    ask: Ask, worker: Worker, settings: Settings
) -> None:
    ask("open", config=replace(settings, device="cpu").to_dict())
    session = worker.session
    workload = Workload(WorkloadSize("generate", 2, 8, 6), session.on_bank("baseline"))
    model, outputs = session.on_bank("baseline"), []
    first, *others = (keeping_output(step, outputs) for step in workload.steps(model))

    def flipped() -> None:
        first()
        workload.token.add_(1)

    warm = Warm(("baseline", "generate", "compile"), model, workload, [flipped, *others], outputs)
    assert error_against_eager(warm) < 1e-6
    wrong = keeping_output(workload.steps(lambda *given, **named: 1.01 * model(*given, **named))[-1], outputs)
    assert error_against_eager(replace(warm, launches=[*warm.launches[:-1], wrong])) > 0.005


def test_a_launch_that_reads_what_the_one_before_it_left_is_another_function(
    ask: Ask, worker: Worker, settings: Settings
) -> None:
    ask("open", config=replace(settings, device="cpu").to_dict())
    model = worker.session.on_bank("baseline")
    for name in ("prefill", "decode", "generate"):
        outputs: list[Tensor] = []
        workload = Workload(WorkloadSize(name, 2, 8, 3), model)
        tokens = workload.prompt.clone(), workload.token.clone()
        *first, step = workload.steps(model)
        warm = Warm(("baseline", name, "graph"), model, workload, [*first, keeping_output(step, outputs)], outputs)
        assert error_against_eager(warm) < 1e-6
        if name != "generate":  # which writes the token itself
            assert torch.equal(workload.prompt, tokens[0])
            assert torch.equal(workload.token, tokens[1])
        stale = [step()]

        def late(step: Callable[[], Tensor] = step, stale: list[Tensor] = stale) -> Tensor:
            stale.append(step())
            return stale.pop(0)

        warm = replace(warm, launches=[*first, keeping_output(late, outputs)])
        assert error_against_eager(warm) > 0.1


def test_what_a_cell_leaves_for_its_next_token_is_freed_with_the_rest(opened: Ask) -> None:
    shared_counters(torch.device("cpu"), 4)
    opened("ceilings")
    assert shared_counters.cache_info().currsize == 0


@pytest.mark.slow
def test_comparing_with_eager_compiles_nothing(
    ask: Ask, worker: Worker, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    grown = []

    def counted(warm: Warm) -> float:
        before = compiled_graphs()
        found = error_against_eager(warm)
        grown.append(compiled_graphs() - before)
        return found

    monkeypatch.setattr(inspection, "error_against_eager", counted)
    ask("open", config=replace(settings, device="cpu", runtimes={"compile": {}}).to_dict())
    ask("evidence", cell="baseline", workload="decode", runtime="compile")
    assert grown == [0]


@pytest.mark.cuda
def test_memory_is_the_cells_own(ask: Ask, settings: Settings) -> None:
    ask("open", config=replace(settings, device="cuda").to_dict())
    plain, tied = (ask("memory", cell=cell, workload="decode", runtime="eager") for cell in ("baseline", "tie"))
    assert plain.peak_allocated_bytes - tied.peak_allocated_bytes == 4 * 512 * 64
    assert plain.peak_reserved_bytes >= plain.peak_allocated_bytes > 0
    assert plain.cache_bytes == tied.cache_bytes > 0


@pytest.mark.cuda
def test_a_graph_takes_memory_of_its_own_and_eager_has_none(ask: Ask, settings: Settings) -> None:
    ask("open", config=replace(settings, device="cuda", runtimes={"graph": {}, "eager": {}}).to_dict())
    graph = ask("memory", cell="baseline", workload="decode", runtime="graph")
    eager = ask("memory", cell="baseline", workload="decode", runtime="eager")
    assert 0 <= graph.graph_bytes < 2**28
    assert eager.graph_bytes is None


@pytest.mark.cuda
def test_what_a_cell_leaves_for_its_next_token_counts_for_no_other(
    ask: Ask, small_settings: Callable[..., Settings]
) -> None:
    overrides = "opt=flash,mask", "flash.decode=split", "workload=decode", "batch_size=1", "prompt_tokens=8"
    settings = replace(small_settings(*overrides).resolved("cpu"), device="cuda", runtimes={"graph": {}})
    ask("open", config=settings.to_dict())
    where = {"workload": "decode", "runtime": "graph"}
    first = ask("memory", cell="baseline", **where)
    ask("memory", cell="flash+mask", **where)
    assert shared_counters.cache_info().currsize == 1
    again = ask("memory", cell="baseline", **where)
    assert replace(again, graph_bytes=first.graph_bytes) == first  # the card counts graphs in pages of 2 MiB
    assert shared_counters.cache_info().currsize == 0


@pytest.mark.cuda
@pytest.mark.parametrize("runtime", ["graph", "compile"])
def test_evidence_after_the_memory_pass_is_that_of_a_cell_built_anew(
    ask: Ask, worker: Worker, settings: Settings, runtime: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask("open", config=replace(settings, device="cuda", runtimes={runtime: {}}).to_dict())
    built = []
    build = worker.session.on_bank
    monkeypatch.setattr(worker.session, "on_bank", lambda cell, *_: built.append(cell) or build(cell))
    where = {"workload": "decode", "runtime": runtime}
    ask("memory", cell="tie", **where)
    kept = ask("evidence", cell="tie", **where)
    assert not built
    anew = ask("evidence", cell="tie", **where)
    ask("memory", cell="baseline", **where)
    another = ask("evidence", cell="tie", **where)
    assert built == ["tie", "tie"]
    if runtime == "compile":  # each compilation chooses its kernels, which round in their own ways
        kept, anew, another = (replace(each, output=None) for each in (kept, anew, another))
    assert kept == anew == another
    assert kept.tied_storage
    assert kept.kernel_launches > 0


@pytest.mark.parametrize("workload", ["prefill", "decode", "generate"])
def test_eager_is_timed_alone(opened: Ask, workload: str) -> None:
    started = time.perf_counter()
    eager_s = opened("eager", cell="flash+tie", workload=workload).eager_s
    assert 0 < eager_s < time.perf_counter() - started


@pytest.mark.parametrize(
    ("taken_s", "least_s"),
    [([0.05] * 8 + [0.03, 0.05, 0.01], 0.03), ([1.2, 0.9, 0.3], 0.9), ([3.8, 0.3], 3.8)],
    ids=["ten", "two seconds", "one"],
)
def test_of_passes_in_eager_the_quickest_counts(
    opened: Ask, monkeypatch: pytest.MonkeyPatch, taken_s: list[float], least_s: float
) -> None:
    """Others only slow them: the median of three had read 23 to 53 ms of one cell."""
    monkeypatch.setattr(
        inspection, "time_host", lambda steps, pace, _: (TimedValue(each) for each in taken_s[: pace.repeats])
    )
    assert opened("eager", cell="baseline", workload="prefill").eager_s == least_s


def test_what_a_cell_costs_is_told_of_the_model_that_was_counted(opened: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, tied = (opened("cost", cell=cell, workload="decode") for cell in ("baseline", "tie"))
    for cell in ("baseline", "tie"):
        opened("parameters", cell=cell)
    monkeypatch.setattr(Session, "build", lambda *_: pytest.fail("it was built again"))
    assert [opened("cost", cell=cell, workload="decode") for cell in ("baseline", "tie")] == [plain, tied]


@pytest.mark.parametrize("cell", ["baseline", "tie", "flash+tie+mlp+mask+norm"])
def test_what_was_loaded_is_counted_as_it_stands_and_not_built_again(
    opened: Ask, settings: Settings, monkeypatch: pytest.MonkeyPatch, cell: str
) -> None:
    counted = opened("parameters", cell=cell)
    opened("open", config=settings.to_dict())
    opened("load", cells=[cell])
    monkeypatch.setattr(Session, "build", lambda *_: pytest.fail("it was built again"))
    assert opened("parameters", cell=cell) == counted


def test_what_is_loaded_in_another_dtype_than_it_runs_in_is_counted_in_that(
    opened: Ask, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of training in amp, whose weights are in float32."""
    counted = opened("parameters", cell="tie")
    opened("open", config=settings.to_dict())
    monkeypatch.setattr(Session, "weights_dtype", lambda *_: torch.float64)
    opened("load", cells=["tie"])
    assert opened("parameters", cell="tie") == counted
