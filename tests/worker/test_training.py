"""A training step, the state that cells share, and what is told of it."""

from __future__ import annotations

import re
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from qwen3bench import ModelConfig, build_model
from qwen3bench.config.choices import options_of
from qwen3bench.config.settings import Settings
from qwen3bench.model.qwen3 import Qwen3Model
from qwen3bench.record.messages import CellFailure
from qwen3bench.worker import training_inspection
from qwen3bench.worker.bank import Bank
from qwen3bench.worker.costs import cell_cost
from qwen3bench.worker.equivalence.gradient_gate import GradientGate
from qwen3bench.worker.evidence import SEPARATE
from qwen3bench.worker.peers import build_peer, gradients_of_peer
from qwen3bench.worker.runtimes import make_runtime
from qwen3bench.worker.serve import Worker
from qwen3bench.worker.session import Session
from qwen3bench.worker.training import LEARNING_RATE, PARTS, TrainingState, TrainingWorkload
from qwen3bench.worker.workloads import WorkloadSize, keeping_output

Ask = Callable[..., Any]
SIZE = WorkloadSize("train", batch_size=2, prompt_tokens=9, new_tokens=0, precision="fp32")


@pytest.fixture
def model(tiny: ModelConfig, tiny_weights: dict[str, Tensor]) -> Qwen3Model:
    return build_model(tiny, (), {name: tensor.clone() for name, tensor in tiny_weights.items()})


@pytest.fixture
def settings(small_settings: Callable[..., Settings]) -> Settings:
    overrides = ("design=full", "opt=flash,tie,mlp", "workload=train", "prompt_tokens=8")
    return small_settings(*overrides).resolved("cpu")


def by_hand(model: Qwen3Model, workload: TrainingWorkload, steps: int, clip: float | None = None) -> list[float]:
    """Plain training of the same model, with an optimizer of its own; the losses."""
    parameters = list(model.requires_grad_(True).parameters())
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE)
    losses = []
    for _ in range(steps):
        with torch.enable_grad():
            loss = F.cross_entropy(model(workload.prompt).flatten(0, 1), workload.targets.flatten())
        loss.backward()
        if clip:
            torch.nn.utils.clip_grad_norm_(parameters, clip)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("clip", [None, 0.1])
def test_steps_are_those_of_a_plain_loop(
    tiny: ModelConfig, tiny_weights: dict[str, Tensor], model: Qwen3Model, clip: float | None
) -> None:
    workload = TrainingWorkload(WorkloadSize("train", 2, 9, 0, "fp32", clip), model)
    (step,) = workload.steps(model)
    losses = [step().item() for _ in range(4)]
    twin = build_model(tiny, (), {name: tensor.clone() for name, tensor in tiny_weights.items()})
    assert losses == pytest.approx(by_hand(twin, workload, 4, clip), rel=1e-6)
    assert losses[0] > losses[1] > losses[2] > losses[3]
    for (name, trained), plain in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(trained, plain, rtol=1e-5, atol=1e-8, msg=name)
        assert trained.grad is None


def test_each_token_is_to_tell_the_next(model: Qwen3Model) -> None:
    workload = TrainingWorkload(SIZE, model)
    assert workload.prompt.shape == workload.targets.shape == (2, 9)
    assert torch.equal(workload.prompt[:, 1:], workload.targets[:, :-1])


def test_every_visit_begins_from_the_same(model: Qwen3Model) -> None:
    workload = TrainingWorkload(SIZE, model)
    (step,) = workload.steps(model)
    first = [step().item() for _ in range(3)]
    workload.restore()
    assert [step().item() for _ in range(3)] == first


def test_cells_share_weights_and_moments(tiny: ModelConfig) -> None:
    bank = Bank(tiny, "random", torch.device("cpu"), torch.float32, 0, {})
    plain, tied = bank.build(()), bank.build(("tie", "mlp", "qkv"))
    workload = TrainingWorkload(SIZE, plain, state=bank.training)
    (one,), (other,) = workload.steps(plain), workload.steps(tied)
    held = workload.state.num_bytes
    steps = 4 * len(list(plain.parameters()))
    assert held == 2 * plain.parameter_bytes + steps  # a tied model adds none
    first = one().item()
    workload.restore()
    assert other().item() == pytest.approx(first, rel=1e-6)
    workload.restore()
    assert one().item() == first


def test_a_tied_matrix_is_one_entry_of_the_optimizer(tiny: ModelConfig, tiny_weights: dict[str, Tensor]) -> None:
    state = TrainingState()
    model = build_model(tiny, ("tie",), dict(tiny_weights)).requires_grad_(True)
    (group,) = state.optimizer(model.parameters()).param_groups
    assert sum(p is model.tok_emb.weight for p in group["params"]) == 1
    assert model.out_head.weight is model.tok_emb.weight


def test_parts_are_told_in_order(model: Qwen3Model) -> None:
    workload = TrainingWorkload(SIZE, model)
    told: list[str] = []
    workload.step_in_parts(model, told.append)
    assert tuple(told) == PARTS
    workload.restore()
    told.clear()
    workload.step_in_parts(model, told.append, of_gradient="gradient")
    assert told.count("gradient") == len(list(model.parameters()))
    assert told.index("loss") < told.index("gradient") < told.index("backward")


def test_of_two_steps_the_quicker_tells_each_part(
    ask: Ask, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    ends = iter([0.0, 5.0, 6.0, 8.0, 9.0, 10.0, 11.0, 13.0, 14.0, 18.0])  # of both: forward, loss, backward, optimizer
    ask("open", config=settings.to_dict())
    monkeypatch.setattr(training_inspection, "time", SimpleNamespace(perf_counter=lambda: next(ends)))
    evidence = ask("evidence", cell="baseline", workload="train", runtime="eager")
    assert list(evidence.parts_s.values()) == [1.0, 1.0, 1.0, 1.0]


def test_eager_is_timed_in_the_precision_of_training(
    ask: Ask, small_settings: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the run's first workload computes in another."""
    overrides = ("workload=[prefill,train]", "dtype=bfloat16", "train.precision=fp32", "runtime=eager", "device=cpu")
    ask("open", config=small_settings(*overrides).resolved("cpu").to_dict())
    built: list[torch.dtype] = []
    on_bank = Session.on_bank

    def noted(session: Session, *asked: Any) -> Any:
        model = on_bank(session, *asked)
        built.append(model.tok_emb.weight.dtype)
        return model

    monkeypatch.setattr(Session, "on_bank", noted)
    ask("eager", cell="baseline", workload="train")
    assert built == [torch.float32]


def test_a_training_worker_answers_every_request(ask: Ask, settings: Settings) -> None:
    ask("open", config=settings.to_dict())
    ask("load", cells=settings.labels)
    evidence = ask("evidence", cell="flash+tie", workload="train", runtime="eager")
    assert evidence.attention_backend == "FlashAttention"
    assert evidence.tied_storage is True
    assert set(evidence.parts_s) == set(PARTS)
    assert any("backward" in name for name in evidence.kernels)
    assert any("adamw" in name for name in evidence.kernels)
    assert 0 < ask("eager", cell="flash+tie", workload="train").eager_s < 10 * sum(evidence.parts_s.values())
    ask("enter", workload="train", runtime="eager", cell="baseline")
    for cell, copy in (("baseline", 0), ("flash+tie+mlp", 0), ("baseline", 1)):
        ask("prepare", cell=cell, copy=copy)
    for cell, copy in (("baseline", 0), ("flash+tie+mlp", 0), ("baseline", 1)):
        assert len(ask("visit", cell=cell, copy=copy, repeats=2).samples) == 2


def test_what_a_visit_trained_is_put_back_for_the_next(ask: Ask, worker: Worker, settings: Settings) -> None:
    ask("open", config=settings.to_dict())
    ask("enter", workload="train", runtime="eager", cell="baseline")
    ask("prepare", cell="baseline", copy=0)
    before = {name: t.clone() for name, t in worker.session.bank(torch.float32).weights.items()}
    worker.timing.workload.restore()
    start = {name: t.clone() for name, t in worker.session.bank(torch.float32).weights.items()}
    assert any(not torch.equal(before[name], start[name]) for name in start)  # getting ready has trained
    ask("visit", cell="baseline", copy=0, repeats=1)
    worker.timing.workload.restore()
    assert all(torch.equal(t, start[name]) for name, t in worker.session.bank(torch.float32).weights.items())


def test_a_loss_that_is_not_finite_is_invalid(ask: Ask, worker: Worker, settings: Settings) -> None:
    ask("open", config=settings.to_dict())
    ask("enter", workload="train", runtime="eager", cell="baseline")
    worker.session.bank(torch.float32).weights["model.norm.weight"].fill_(float("nan"))
    with pytest.raises(CellFailure, match="its loss is not finite"):
        ask("prepare", cell="baseline", copy=0)


def test_a_step_costs_three_forwards(tiny: ModelConfig) -> None:
    forward = cell_cost(tiny, True, WorkloadSize("prefill", 2, 9, 0), 4)
    step = cell_cost(tiny, True, SIZE, 4)
    assert step.flops == 3 * forward.flops
    assert step.bytes is None


def test_cost_of_a_token_of_the_smallest_qwen3() -> None:
    """4.28 GFLOP a token at 2048: six operations for each of 596 million weights, and causal attention once."""
    config = ModelConfig(**options_of("model", "qwen3-0.6b"))
    flops = cell_cost(config, True, WorkloadSize("train", 8, 2048, 0, "bf16"), 2).flops
    assert flops is not None
    assert flops / (8 * 2048) == pytest.approx(4.28e9, rel=0.002)


@pytest.mark.slow
def test_a_compiled_step_has_the_gradients_of_eager(
    ask: Ask, small_settings: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides = ("opt=mlp", "workload=train", "model.num_layers=1", "prompt_tokens=8", "runtime=compile")
    ask("open", config=small_settings(*overrides).resolved("cpu").to_dict())
    where = {"cell": "mlp", "workload": "train", "runtime": "compile"}
    found = ask("evidence", **where)
    assert found.recompiles == 0
    assert set(found.parts_s) == set(PARTS)

    real = F.silu
    monkeypatch.setattr(
        F, "silu", lambda x, *more, **named: real(x, *more, **named) * (1.1 if torch.compiler.is_compiling() else 1.0)
    )
    with pytest.raises(CellFailure, match="its gradients differ by"):
        ask("evidence", **where)


@pytest.mark.slow
def test_a_peer_trains_as_the_baseline_does(tiny: ModelConfig, tiny_weights: dict[str, Tensor]) -> None:
    gate = GradientGate(tiny, torch.device("cpu"), "fp32")
    judged = gradients_of_peer(gate, "transformers:sdpa")
    assert judged.equivalent, judged.reason
    assert 1e-7 < judged.checks["float32_relative"] < 1e-4  # it rounds the rotary angles to float32
    apart = [{name: tensor.clone() for name, tensor in tiny_weights.items()} for _ in range(2)]
    peer, ours = build_peer("transformers:sdpa", tiny, apart[0]), build_model(tiny, ("tie",), apart[1])
    losses = []
    for model in (peer, ours):
        (step,) = TrainingWorkload(SIZE, model).steps(model)
        losses.append([step().item() for _ in range(3)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.slow
def test_a_peers_step_is_compiled_and_has_the_gradients_of_eager(
    tiny: ModelConfig, tiny_weights: dict[str, Tensor]
) -> None:
    weights = {name: tensor.clone() for name, tensor in tiny_weights.items()}
    peer, state = build_peer("transformers:sdpa", tiny, weights), TrainingState()
    workload = TrainingWorkload(SIZE, peer, state=state)
    (eager,) = workload.steps(peer)
    loss = eager()
    expected = [moment.clone() for moment in state.first_moments]
    workload.restore()
    runtime = make_runtime("compile", torch.device("cpu"))
    (step,) = workload.steps(runtime.prepare_model(peer).model)
    launch = runtime.prepare(step).launch
    workload.restore()
    torch.testing.assert_close(launch(), loss)
    for found, right in zip(state.first_moments, expected, strict=True):
        assert (found - right).norm() <= 1e-5 * right.norm()


@pytest.mark.cuda
@pytest.mark.parametrize("attention", ["sdpa", "eager", "sdpa_mask"])
@pytest.mark.parametrize("runtime_name", ["graph", "compile"])
def test_a_peers_step_is_captured(tiny: ModelConfig, attention: str, runtime_name: str) -> None:
    bank = Bank(tiny, "random", torch.device("cuda", 0), torch.float32, 0, {})
    peer = build_peer(f"transformers:{attention}", tiny, bank.weights)
    workload = TrainingWorkload(SIZE, peer, state=bank.training)
    (eager,) = workload.steps(peer)
    loss = eager().clone()
    runtime = make_runtime(runtime_name, torch.device("cuda", 0))
    (step,) = workload.steps(runtime.prepare_model(peer).model)
    outputs: list[Tensor] = []
    launch = runtime.prepare(keeping_output(step, outputs)).launch
    workload.restore()
    launch()
    torch.testing.assert_close(outputs[0], loss, rtol=1e-4, atol=0)


@pytest.mark.cuda
@pytest.mark.parametrize("precision", ["amp", "bf16"])
@pytest.mark.parametrize("opts", [(), ("flash", "tie", "mlp", "mask", "norm", "qkv")], ids="+".join)
def test_memory_of_a_step_by_part(
    ask: Ask, small_settings: Callable[..., Settings], precision: str, opts: tuple[str, ...]
) -> None:
    names = ",".join(opts)
    overrides = (f"opt=[{names}]", "workload=train", f"train.precision={precision}", "device=cuda", "runtime=graph")
    ask("open", config=small_settings(*overrides, "prompt_tokens=256").resolved("cuda").to_dict())
    cell = "+".join(opts) or "baseline"
    memory = ask("memory", cell=cell, workload="train", runtime="graph")
    parameters = ask("parameters", cell=cell).num_parameters * (4 if precision == "amp" else 2)
    assert memory.optimizer_bytes == pytest.approx(2 * parameters, rel=0.01)
    assert memory.activation_bytes > 0
    held = parameters + memory.optimizer_bytes + memory.gradient_bytes + memory.activation_bytes
    assert held <= 1.05 * memory.peak_allocated_bytes
    evidence = ask("evidence", cell=cell, workload="train", runtime="graph")
    eager_s = ask("eager", cell=cell, workload="train").eager_s
    assert 0 < eager_s < 10 * sum(evidence.parts_s.values())


@pytest.mark.cuda
@pytest.mark.parametrize(("cell", "backend"), [("baseline", SEPARATE), ("flash+mask", "FlashAttention|cuDNN")])
def test_looking_at_a_compiled_step_compiles_nothing(
    ask: Ask, small_settings: Callable[..., Settings], cell: str, backend: str
) -> None:
    overrides = ("opt=[flash,mask]", "workload=train", "device=cuda", "runtime=compile", "prompt_tokens=64")
    ask("open", config=small_settings(*overrides).resolved("cuda").to_dict())
    found = ask("evidence", cell=cell, workload="train", runtime="compile")
    assert found.recompiles == 0
    assert re.fullmatch(backend, found.attention_backend)
    assert not any("unknown" in note or SEPARATE in note for note in found.notes)
