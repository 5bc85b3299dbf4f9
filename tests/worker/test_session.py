"""The real worker's operations, in this process on the tiny model; faults on a real card at the end."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from qwen3bench.campaign.worker_process import WorkerProcess
from qwen3bench.config.settings import Settings
from qwen3bench.errors import UserError
from qwen3bench.kernels import token_attention
from qwen3bench.model.compiled import Region
from qwen3bench.model.qwen3 import Qwen3Model
from qwen3bench.model.weights import load_weights
from qwen3bench.opt import norm
from qwen3bench.record import messages as protocol
from qwen3bench.record.messages import CellFailure
from qwen3bench.worker import session as worker_module
from qwen3bench.worker.clock import TimedValue
from qwen3bench.worker.evidence import compiled_graphs
from qwen3bench.worker.runtimes import Runtime
from qwen3bench.worker.session import Warm, Worker, _kept, failure, serve
from qwen3bench.worker.workloads import Workload, WorkloadSize

Ask = Callable[..., dict[str, Any]]


@pytest.fixture(autouse=True)
def _gradients() -> Iterator[None]:
    """The worker turns them off for its process."""
    yield
    torch.set_grad_enabled(True)


@pytest.fixture
def settings(small_settings: Callable[..., Settings]) -> Settings:
    overrides = ("design=full", "opt=flash,tie", "workload=prefill,decode,generate", "new_tokens=3", "prompt_tokens=8")
    return small_settings(*overrides).resolved("cpu")


@pytest.fixture
def worker() -> Worker:
    return Worker()


@pytest.fixture
def ask(worker: Worker) -> Ask:
    """A request to the worker through its real loop and the real protocol."""

    def send(op: str, **arguments: Any) -> dict[str, Any]:
        replies = io.BytesIO()
        serve(io.BytesIO(protocol.encode({"op": op, **arguments})), replies, worker)
        return protocol.answer(replies.getvalue(), op)

    return send


@pytest.fixture
def opened(ask: Ask, settings: Settings) -> Ask:
    ask("open", config=settings.to_dict())
    return ask


@pytest.mark.parametrize(("dim", "threads"), [(256, [1]), (257, [])])
def test_a_small_model_runs_on_one_thread(
    ask: Ask, settings: Settings, monkeypatch: pytest.MonkeyPatch, dim: int, threads: list[int]
) -> None:
    set_to: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", set_to.append)
    ask("open", config=replace(settings, model=replace(settings.model, emb_dim=dim), device="cpu").to_dict())
    assert set_to == threads


def test_it_finds_the_device(ask: Ask) -> None:
    assert ask("probe", device="cpu") == {"device": "cpu"}
    assert ask("probe", device="auto") == {"device": "cuda" if torch.cuda.is_available() else "cpu"}
    with pytest.raises(UserError, match=r"device=cuda:99: PyTorch sees .* CUDA device"):
        ask("probe", device="cuda:99")


def test_on_a_cpu_there_is_nothing_to_touch(opened: Ask) -> None:
    assert opened("touch") == {}


@pytest.mark.cuda
def test_it_touches_a_card_with_a_kernel(ask: Ask, settings: Settings) -> None:
    ask("open", config=replace(settings, device="cuda").to_dict())
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        ask("touch")
    assert [e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]


def test_it_tells_what_must_not_change(opened: Ask) -> None:
    identity = opened("identify")
    assert set(identity["fingerprint"]) == {"config", "weights", "code", "torch", "device"}
    assert identity["environment"]["torch"] == torch.__version__


@pytest.mark.parametrize("workload", ["prefill", "decode", "generate"])
def test_a_cell_is_prepared_and_visited(opened: Ask, workload: str) -> None:
    opened("load", cells=["baseline", "flash+tie"])
    opened("enter", workload=workload, runtime="eager", cell="flash+tie")
    for cell, copy in (("baseline", 0), ("flash+tie", 0), ("baseline", 1)):
        assert opened("prepare", cell=cell, copy=copy) == {"compile_s": None, "compile_options": None}
    samples = opened("visit", cell="baseline", copy=1, repeats=3)["samples"]
    assert len(samples) == 3
    for sample in samples:
        assert sample["latency_s"] > 0
        assert ("ttft_s" in sample) == (workload == "generate")
        if workload == "generate":
            assert len(sample["itl_s"]) == 2
            assert sample["ttft_s"] + sum(sample["itl_s"]) == pytest.approx(sample["latency_s"], rel=1e-6)
            assert sample["tpot_s"] == pytest.approx(sum(sample["itl_s"]) / 2)


class Replayed(Runtime):
    """A graph's behaviour on a CPU: a step is launched twice, and what is timed is a replay that runs no Python."""

    @property
    def on_device_clock(self) -> bool:
        return True

    def prepare(self, step: Callable[[], torch.Tensor]) -> Callable[[], object]:
        step()
        step()
        return lambda: None


@pytest.mark.parametrize("workload", ["prefill", "generate"])
@pytest.mark.parametrize("finite", [True, False])
def test_what_a_graph_writes_is_looked_at_too(
    opened: Ask, worker: Worker, overflowing: Settings, monkeypatch: pytest.MonkeyPatch, workload: str, finite: bool
) -> None:
    monkeypatch.setattr(worker, "_make_runtime", lambda name: Replayed(torch.device("cpu")))
    monkeypatch.setattr(worker_module, "time_device", lambda launches, repeats, inner: [TimedValue(1.0)] * repeats)
    if not finite:
        opened("open", config=replace(overflowing, workloads=worker.settings.workloads).to_dict())
    opened("enter", workload=workload, runtime="eager")
    if finite:
        opened("prepare", cell="baseline", copy=0)
        (prepared,) = worker._prepared.values()
        assert len(prepared.launches) == (3 if workload == "generate" else 1)
    else:
        with pytest.raises(CellFailure, match="logits are not finite"):
            opened("prepare", cell="baseline", copy=0)


def test_cells_have_as_many_values_however_fast_they_are(opened: Ask, worker: Worker) -> None:
    """And as many launches in a value: enough for the fastest of them."""
    opened("enter", workload="prefill", runtime="eager")
    opened("prepare", cell="baseline", copy=0)
    model = worker._prepared["baseline", 0].model
    asleep_s = {"baseline": 0.008, "flash": 0.0004}
    launched = dict.fromkeys(asleep_s, 0)

    def launch(cell: str) -> None:
        launched[cell] += 1
        time.sleep(asleep_s[cell])

    for cell in asleep_s:
        worker._prepared[cell, 0] = worker_module.Prepared(model, [partial(launch, cell)])
    worker._pace = None
    values = {cell: len(opened("visit", cell=cell, copy=0, repeats=None)["samples"]) for cell in asleep_s}
    assert worker._pace is not None
    assert 2 <= worker._pace.inner <= 3
    assert values == dict.fromkeys(asleep_s, 1)
    before = dict(launched)
    for cell in asleep_s:
        opened("visit", cell=cell, copy=0, repeats=None)
        assert launched[cell] - before[cell] == 1 + worker._pace.inner


def test_one_generated_token_has_no_time_between_tokens(ask: Ask, small_settings: Callable[..., Settings]) -> None:
    settings = small_settings("workload=generate", "new_tokens=1", "prompt_tokens=4").resolved("cpu")
    ask("open", config=settings.to_dict())
    ask("enter", workload="generate", runtime="eager", cell="baseline")
    ask("prepare", cell="baseline", copy=0)
    (sample,) = ask("visit", cell="baseline", copy=0, repeats=1)["samples"]
    assert sample["latency_s"] > 0
    assert sample.get("tpot_s") is None


def test_timing_does_not_wait_for_the_compiler_to_be_imported() -> None:
    code = """
import sys
from qwen3bench.worker.session import Worker
from qwen3bench.config.cli import compose

settings = compose(["model=tiny", "opt=flash,tie,mlp,mask,norm,qkv", "workload=decode"]).resolved("cpu")
worker = Worker()
worker.op_open(settings.to_dict())
worker.op_load(settings.labels)
worker.op_parameters(settings.labels[-1])
worker.op_enter("decode", "eager")
worker.op_prepare(settings.labels[-1], 0)
worker.op_visit(settings.labels[-1], 0, 1)
print(settings.labels, "torch._dynamo" in sys.modules)
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.split() == ["['baseline',", "'flash+tie+mlp+mask+norm+qkv']", "False"]


def test_a_compilation_in_the_untimed_launch_counts_too(
    worker: Worker, opened: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened("enter", workload="prefill", runtime="eager")
    opened("prepare", cell="baseline", copy=0)
    launched: list[None] = []
    monkeypatch.setattr(worker, "_compiled_graphs", lambda: min(1, len(launched)))
    worker._prepared["baseline", 0].launches[:] = [lambda: launched.append(None)]
    with pytest.raises(CellFailure, match="compiled again"):
        opened("visit", cell="baseline", copy=0, repeats=1)


def test_parameters_and_costs_are_the_models(opened: Ask) -> None:
    plain, tied = opened("parameters", cell="baseline"), opened("parameters", cell="tie")
    embedding = 512 * 64
    assert plain["num_parameters"] - tied["num_parameters"] == embedding
    assert plain["num_unique_parameters"] == tied["num_unique_parameters"] == tied["num_parameters"]
    assert plain["parameter_bytes"] == 4 * plain["num_parameters"]
    assert opened("cost", cell="tie", workload="prefill")["flops"] > 0


def test_a_true_cell_passes_the_gate(opened: Ask) -> None:
    verdict = opened("verify", cell="flash+tie")
    assert verdict["equivalent"] is True
    assert verdict["reason"] is None


def test_evidence_names_what_ran(opened: Ask) -> None:
    evidence = opened("evidence", cell="flash", workload="prefill", runtime="eager")
    assert (evidence["workload"], evidence["runtime"]) == ("prefill", "eager")
    assert evidence["kernel_launches"] == sum(evidence["kernels"].values()) > 0
    assert evidence["tied_storage"] is False


def test_what_computes_something_else_once_compiled_is_invalid(
    ask: Ask, small_settings: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = small_settings("opt=norm", "model.num_layers=1", "prompt_tokens=8", "runtime=compile").resolved("cpu")
    ask("open", config=settings.to_dict())
    where = {"cell": "norm", "workload": "prefill", "runtime": "compile"}
    assert ask("evidence", **where)["recompiles"] == 0
    right = norm.rms_norm

    def wrong(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        return right(x, weight, eps) * (1.5 if torch.compiler.is_compiling() else 1.0)

    monkeypatch.setattr(norm, "rms_norm", wrong)
    with pytest.raises(CellFailure) as failed:
        ask("evidence", **where)
    assert failed.value.status == "invalid"
    assert "differ by" in failed.value.reason


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


@pytest.fixture
def overflowing(tmp_path: Path, settings: Settings) -> Settings:
    """A checkpoint whose numbers are finite and whose logits are not."""
    shape = settings.model
    weights = {name: tensor.clone() for name, tensor in load_weights("random", shape).items()}
    weights["model.layers.0.mlp.up_proj.weight"].fill_(1e38)
    weights.pop("lm_head.weight", None)
    save_file(weights, tmp_path / "model.safetensors")
    names = {"vocab_size": "vocab_size", "num_layers": "num_hidden_layers", "emb_dim": "hidden_size"}
    names |= {"num_heads": "num_attention_heads", "num_kv_heads": "num_key_value_heads", "head_dim": "head_dim"}
    names |= {"hidden_dim": "intermediate_size", "context_length": "max_position_embeddings"}
    names |= {"rms_norm_eps": "rms_norm_eps", "tie_word_embeddings": "tie_word_embeddings"}
    config = {theirs: getattr(shape, ours) for ours, theirs in names.items()}
    config |= {"rope_theta": shape.rope_base, "hidden_act": "silu", "model_type": "qwen3"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    return replace(settings, weights=str(tmp_path))


def test_logits_that_are_not_finite_are_never_timed(ask: Ask, overflowing: Settings) -> None:
    ask("open", config=overflowing.to_dict())
    ask("enter", workload="prefill", runtime="eager", cell="baseline")
    with pytest.raises(CellFailure, match="logits are not finite") as caught:
        ask("prepare", cell="baseline", copy=0)
    assert caught.value.status == "invalid"
    with pytest.raises(CellFailure):  # it was not made ready
        ask("visit", cell="baseline", copy=0, repeats=1)


def test_what_cannot_be_loaded_is_refused_as_the_users(ask: Ask, settings: Settings, tmp_path: Path) -> None:
    ask("open", config=replace(settings, weights=str(tmp_path / "none")).to_dict())
    with pytest.raises(UserError, match="none"):
        ask("load", cells=["baseline"])


def test_errors_become_a_status_and_one_line() -> None:
    assert failure(UserError("name another")) == {"status": "refused", "reason": "name another"}
    assert failure(ValueError("two\n  lines")) == {"status": "crashed", "reason": "ValueError: two lines"}
    assert failure(MemoryError())["status"] == "oom"
    assert failure(torch.cuda.OutOfMemoryError("CUDA out of memory"))["status"] == "oom"
    assert failure(RuntimeError("DefaultCPUAllocator: can't allocate"))["status"] == "oom"
    assert failure(torch.AcceleratorError("CUDA error: out of memory\nSearch for it"))["status"] == "oom"
    assert failure(torch.AcceleratorError("CUDA error: device-side assert triggered"))["status"] == "crashed"
    assert len(failure(RuntimeError("x" * 10_000))["reason"]) < 600


def test_an_answer_that_is_no_json_is_a_failure_and_the_worker_lives_on(worker: Worker) -> None:
    worker.op_odd = lambda: {"latency_s": float("nan")}  # type: ignore[attr-defined]
    replies = io.BytesIO()
    requests = protocol.encode({"op": "odd"}) + protocol.encode({"op": "probe", "device": "cpu"})
    serve(io.BytesIO(requests), replies, worker)
    odd, probe = replies.getvalue().splitlines()
    with pytest.raises(CellFailure, match="JSON compliant"):
        protocol.answer(odd, "odd")
    assert protocol.answer(probe, "probe") == {"device": "cpu"}


def test_one_token_chosen_otherwise_on_the_way_is_no_other_function(
    ask: Ask, worker: Worker, settings: Settings
) -> None:
    ask("open", config=replace(settings, device="cpu").to_dict())
    workload = Workload(WorkloadSize("generate", 2, 8, 6), worker._on_bank("baseline"))
    model, outputs = worker._on_bank("baseline"), []
    first, *others = (_kept(step, outputs) for step in workload.steps(model))

    def flipped() -> None:
        first()
        workload.token.add_(1)

    warm = Warm(("baseline", "generate", "compile"), model, workload, [flipped, *others], outputs)
    assert worker._against_eager(warm) < 1e-6
    wrong = worker._on_bank("baseline")
    wrong.forward = lambda *given, **named: 1.01 * Qwen3Model.forward(wrong, *given, **named)
    warm.launches[-1] = _kept(workload.steps(wrong)[-1], outputs)
    assert worker._against_eager(warm) > 0.005


def test_a_launch_that_reads_what_the_one_before_it_left_is_another_function(
    ask: Ask, worker: Worker, settings: Settings
) -> None:
    ask("open", config=replace(settings, device="cpu").to_dict())
    model = worker._on_bank("baseline")
    for name in ("prefill", "decode", "generate"):
        outputs: list[Tensor] = []
        workload = Workload(WorkloadSize(name, 2, 8, 3), model)
        tokens = workload.prompt.clone(), workload.token.clone()
        *first, step = workload.steps(model)
        warm = Warm(("baseline", name, "graph"), model, workload, [*first, _kept(step, outputs)], outputs)
        assert worker._against_eager(warm) < 1e-6
        if name != "generate":  # which writes the token itself
            assert torch.equal(workload.prompt, tokens[0])
            assert torch.equal(workload.token, tokens[1])
        stale = [step()]

        def late(step: Callable[[], Tensor] = step, stale: list[Tensor] = stale) -> Tensor:
            stale.append(step())
            return stale.pop(0)

        warm.launches[-1] = _kept(late, outputs)
        assert worker._against_eager(warm) > 0.1


def test_what_a_cell_leaves_for_its_next_token_is_freed_with_the_rest(opened: Ask) -> None:
    token_attention._arrivals(torch.device("cpu"), 4)
    opened("ceilings")
    assert token_attention._arrivals.cache_info().currsize == 0


def test_comparing_with_eager_compiles_nothing(
    ask: Ask, worker: Worker, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    compare = worker._against_eager
    grown = []

    def counted(warm: Warm) -> float:
        before = compiled_graphs()
        found = compare(warm)
        grown.append(compiled_graphs() - before)
        return found

    monkeypatch.setattr(worker, "_against_eager", counted)
    ask("open", config=replace(settings, device="cpu", runtimes={"compile": {}}).to_dict())
    ask("evidence", cell="baseline", workload="decode", runtime="compile")
    assert grown == [0]


# On a real card

FAULTY = """
import sys, torch
from qwen3bench.worker import session as worker
real = worker.Worker.op_prepare

def prepare(self, cell, copy):
    if cell == "flash":
        if sys.argv[1] == "assert":  # an index outside, noticed on the device
            table = torch.zeros(4, 4, device="cuda")
            torch.nn.functional.embedding(torch.tensor([10**6], device="cuda"), table).sum().item()
        torch.cuda.set_per_process_memory_fraction(0.05)  # what else runs on the card keeps the rest
        keep = [torch.empty(2**30, dtype=torch.uint8, device="cuda") for _ in range(10**6)]
    return real(self, cell, copy)

worker.Worker.op_prepare = prepare
worker.main()
"""


@pytest.mark.cuda
@pytest.mark.parametrize(("fault", "status", "reason"), [("memory", "oom", "memory"), ("assert", "crashed", "assert")])
def test_a_fault_on_the_card_costs_its_cell_alone(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    small_settings: Callable[..., Settings],
    fault: str,
    status: str,
    reason: str,
) -> None:
    from qwen3bench.analysis.run import load_run
    from qwen3bench.campaign import launch as run_module

    monkeypatch.setattr(run_module, "write_report", lambda run, found: None)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]), prepend=os.pathsep)
    settings = replace(small_settings("design=full", "opt=flash,tie"), device="cuda", dir=tmp_path / "run")
    command = (sys.executable, "-c", FAULTY, fault)
    assert run_module.run(settings, lambda log: WorkerProcess(log, command)) == 3
    run = load_run(tmp_path / "run")
    assert dict(zip(run.cells["cell"], run.cells["status"], strict=True)) == {
        "baseline": "ok",
        "flash": status,
        "tie": "ok",
        "flash+tie": "ok",
    }
    (line,) = run.record.of("failure")
    assert reason in line["reason"]
    if status == "oom":
        assert line["peak_allocated_bytes"] > 2**30


@pytest.mark.cuda
def test_memory_is_the_cells_own(ask: Ask, settings: Settings) -> None:
    ask("open", config=replace(settings, device="cuda").to_dict())
    plain, tied = (ask("memory", cell=cell, workload="decode", runtime="eager") for cell in ("baseline", "tie"))
    assert plain["peak_allocated_bytes"] - tied["peak_allocated_bytes"] == 4 * 512 * 64
    assert plain["peak_reserved_bytes"] >= plain["peak_allocated_bytes"] > 0
    assert plain["cache_bytes"] == tied["cache_bytes"] > 0


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
    assert token_attention._arrivals.cache_info().currsize == 1
    assert ask("memory", cell="baseline", **where) == first
    assert token_attention._arrivals.cache_info().currsize == 0


@pytest.mark.cuda
@pytest.mark.parametrize("runtime", ["graph", "compile"])
def test_evidence_after_the_memory_pass_is_that_of_a_cell_built_anew(
    ask: Ask, worker: Worker, settings: Settings, runtime: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask("open", config=replace(settings, device="cuda", runtimes={runtime: {}}).to_dict())
    built = []
    monkeypatch.setattr(worker, "_on_bank", lambda cell: built.append(cell) or Worker._on_bank(worker, cell))
    where = {"workload": "decode", "runtime": runtime}
    ask("memory", cell="tie", **where)
    kept = ask("evidence", cell="tie", **where)
    assert not built
    anew = ask("evidence", cell="tie", **where)
    ask("memory", cell="baseline", **where)
    another = ask("evidence", cell="tie", **where)
    assert built == ["tie", "tie"]
    assert [each.pop("eager_s") is None for each in (kept, anew, another)] == [runtime == "compile"] * 3
    assert kept == anew == another
    assert kept["tied_storage"]
    assert kept["kernel_launches"] > 0
